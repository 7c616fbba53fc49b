import os

import pytest

from sqloss.common.text import in_markdown, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sea lion, Ω 猫 👩\u200d🚀", "sea lion, Ω 猫 👩\u200d🚀"),
        ("two\nlines\r\t\x1b[31m\x85\u2028", r"two\nlines\r\t\x1b[31m\x85\u2028"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
        (r"back\slash", r"back\slash"),
    ],
)
def test_names_are_shown_in_one_line(name, shown):
    assert printable(name) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("snake_case, 3 - 1 & more (#2)!", "snake_case, 3 - 1 & more (#2)!"),
        ("$$", r"\$\$"),
        ("_a_ *b* `c` <d> [e](f) ~g~ &lt; h\\", r"\_a\_ \*b\* \`c\` \<d> \[e\](f) \~g\~ \&lt; h\\"),
        ("a\nb", r"a\\nb"),
    ],
)
def test_names_are_no_markup(name, shown):
    assert in_markdown(name) == shown
