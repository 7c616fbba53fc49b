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


PUBLIC = {f"sqloss.{name}": getattr(sqloss, name) for name in sqloss.__all__} | {
    f"{module.__name__}.{name}": found
    for module in (sqloss.distributed, sqloss.distributions, sqloss.losses, sqloss.nn)
    for name, found in vars(module).items()
    if getattr(found, "__module__", None) == module.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", [name for name, found in PUBLIC.items() if callable(found)])
def test_public_functions_and_classes_have_examples(name):
    assert ">>> " in PUBLIC[name].__doc__


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["model"].weight.grad is not None
