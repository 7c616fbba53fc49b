"""Every example in the documentation runs and says what it says; recipes, commands, links too."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch

import sqloss
from sqloss import cli
from sqloss.datasets import DATASETS
from sqloss.training.risks import RISKS
from sqloss.training.samplers import SAMPLERS
from sqloss.training.trainers import TRAINERS
from sqloss.training.vae.trainer import VAETrainer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]
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


def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them trains
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["model"].weight.grad is not None


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# Of existing files: what a recipe may touch at most, without its test.
MOST = {"A risk": 2, "A sampler": 2, "A data set": 2, "A metric": 2, "A trainer": 3}
TINY = ["--train-limit", "60", "--hidden", "4", "--latent", "2", "--num-samples", "20"]
TINY += ["--epochs", "1"]


@pytest.mark.parametrize("name", MOST)
def test_recipes(name, tmp_path, monkeypatch, quick_reports):
    for needed in ("joblib", "matplotlib", "scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(VAETrainer, "metrics", dict(VAETrainer.metrics))
    for registry in (RISKS, SAMPLERS, DATASETS, TRAINERS):
        monkeypatch.setattr(registry, "_things", dict(registry))
    recipe = CONTRIBUTING.read_text().partition(f"### {name}\n")[2].partition("\n###")[0]
    touched = re.findall(r"^- `(.*?)`", recipe, re.MULTILINE)
    assert 0 < len(touched) <= MOST[name]
    assert all((ROOT / path).is_file() for path in touched)
    for block in blocks(recipe, "python"):
        add_to_its_file(block, touched)
    threads = torch.get_num_threads()
    for command in blocks(recipe, "sh")[0].splitlines():
        program, *arguments = shlex.split(command)
        tiny = TINY if "vae" in arguments else []
        assert program == "sqloss" and cli.main([*arguments, *tiny]) == 0
    torch.set_num_threads(threads)


def add_to_its_file(block, touched):
    """Run a block with the names that there are in the file of its first line."""
    path, new = re.match(r"# (\S+)( \(new\))?\n", block).groups()
    module = path.removesuffix(".py").replace("/", ".")
    assert bool(new) != (path in touched)
    exec(block, {"__name__": module} if new else dict(vars(importlib.import_module(module))))


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an sdist has no docs")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_commands_are_understood(capsys):
    """Those that are not run, by their flags."""
    text = "\n".join(page.read_text() for page in PAGES if page != CONTRIBUTING)
    command = r"^(?:    )?(?:torchrun .* -m )?sqloss ((?:vae|gan|sweep|impute|evaluate|sample) .*)"
    lines = re.findall(command, text.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        if "--help" not in line:
            cli.parser().parse_args(shlex.split(line, comments=True))
    assert capsys.readouterr().err == "", "no flag by a former name"
