"""What the user can put right is a ``UserError``: its message names what was expected and got."""

from sqloss._extras import UserError as UserError
from sqloss._extras import require as require
