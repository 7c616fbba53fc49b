import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from sqloss.common.errors import UserError
from sqloss.common.streams import flush_stdout, show, tell
from sqloss.training.progress import Progress


@pytest.fixture
def left() -> Iterator[TextIO]:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_work_outlives_the_readers_of_stdout(monkeypatch, left):
    monkeypatch.setattr(sys, "stdout", left)
    for _ in range(2):
        show("a table")
    print("of others")
    flush_stdout()


def test_what_is_left_in_stdout_at_the_end(monkeypatch, left):
    monkeypatch.setattr(sys, "stdout", left)
    print("of others")
    flush_stdout()


def test_work_outlives_the_readers_of_stderr(monkeypatch, left):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", left)
    with Progress(steps=3, done=0, epochs=1) as progress:
        progress.tell("a line")
        tell("another line")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_a_stream(monkeypatch):
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        tell("a line")
        with pytest.raises(UserError, match="stdout: cannot write: No space left on device"):
            show("a table")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"\u732b \xe9 \udce9"),
        ("latin-1", b"\\u732b \xe9 \\udce9"),
        ("utf-8", "猫 é \\udce9".encode()),
    ],
)
def test_a_terminal_that_lacks_letters(monkeypatch, encoding, shown):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding, newline="\n"))
    show("猫 é \udce9")
    assert content.getvalue() == shown + b"\n"


def test_closed_streams(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    show("a table")
    tell("a line")
    flush_stdout()
