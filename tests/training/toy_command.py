"""``sqloss`` with the toy trainer, for torchrun."""

import importlib.util
import sys
from pathlib import Path

place = Path(__file__).with_name("toy.py")
spec = importlib.util.spec_from_file_location("toy", place)
sys.modules["toy"] = toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

from sqloss import cli  # noqa: E402

if __name__ == "__main__":
    sys.exit(cli.main())
