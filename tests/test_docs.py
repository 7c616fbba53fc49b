"""Every example in the documentation runs and says what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sqloss

README = Path(__file__).parents[1] / "README.md"
MODULES = [
    module.name
    for module in pkgutil.walk_packages(sqloss.__path__, "sqloss.")
    if module.name.rpartition(".")[2] not in ("_C", "__main__")
]


@pytest.mark.parametrize("name", ["sqloss", *MODULES])
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["cvar", "value_at_risk", "tail_weights", "show_config"])
def test_public_functions_have_examples(name):
    assert ">>> " in getattr(sqloss, name).__doc__


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["model"].weight.grad is not None
