"""Names from outside, such as those of a user's folders, as text for where it goes.

JSON needs none of this: it escapes by itself.
"""

import re
import unicodedata

# Control characters, bytes that are no UTF-8, and what ends a line or a paragraph.
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
# What Markdown reads as a sign within a line. An underscore between letters is none, and bars are
# escaped by whoever makes a table.
MARKUP = re.compile(r"[\\`*<\[\]$~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")


def printable(name: str) -> str:
    """The name in one line that every UTF-8 file takes and that commands no terminal."""
    return "".join(map(shown, name))


def shown(char: str) -> str:
    is_escaped = unicodedata.category(char) in UNPRINTABLE
    return char.encode("unicode_escape").decode() if is_escaped else char


def in_markdown(name: str) -> str:
    """The name as Markdown that shows it as it is."""
    return MARKUP.sub(r"\\\g<0>", printable(name))
