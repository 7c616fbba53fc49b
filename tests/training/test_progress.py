import io
import sys

import pytest

from sqloss.training.progress import Progress

pytest.importorskip("tqdm")

MODELS = ["standard -ELBO 123.46", "cvar -ELBO 113.46"]
LINE = "epoch 3/100: standard -ELBO 123.46; cvar -ELBO 113.46"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream: io.StringIO) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(steps=300, done=6, epochs=100) as progress:
        progress.step()
        progress.epoch(3, MODELS)
    return stream.getvalue()


def test_a_line_per_epoch(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == LINE + "\n"


def test_on_a_terminal_the_line_stands_above_a_bar_that_has_room(monkeypatch):
    parts = shown(monkeypatch, Terminal()).replace("\n", "\r").split("\r")
    assert LINE in parts
    bars = [part for part in parts if part.startswith("training:")]
    assert all("|" in bar and len(bar) <= 80 for bar in bars)
    assert "/300 [" in bars[-1]
