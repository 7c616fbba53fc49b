"""``python -m sqloss``."""

import sys

from sqloss.cli import main

sys.exit(main())
