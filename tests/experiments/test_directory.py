import pytest

from sqloss.common.errors import UserError
from sqloss.experiments.directory import alone_in

pytest.importorskip("filelock")


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    with alone_in(tmp_path):
        held = pytest.raises(UserError, match=rf"^--output-dir: .* no sweep is .*, got {tmp_path},")
        with held, alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"^--output-dir: cannot make the directory .*file")
    with refused, alone_in(tmp_path / "file"):
        pass
