import subprocess
import sys

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.training import checkpoint


def state(epoch: int, step: int = 0) -> dict:
    return {"epoch": epoch, "step": step, "weights": torch.full((3,), float(epoch))}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_is_none_at_first(tmp_path):
    assert checkpoint.load(tmp_path / "absent") is None


def test_the_newest_is_loaded_as_it_was_saved(tmp_path):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, state(epoch))
    loaded = checkpoint.load(tmp_path)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["weights"], state(2)["weights"])


def test_the_last_two_are_kept(tmp_path):
    for epoch in (9, 10, 11, 10_000):
        checkpoint.save(tmp_path, state(epoch))
    assert names(tmp_path) == ["epoch-0011.pt", "epoch-10000.pt"]


def test_within_an_epoch_the_name_tells_the_step_and_the_order_is_that_of_training(tmp_path):
    checkpoint.save(tmp_path, state(4))
    checkpoint.save(tmp_path, state(4, step=12))
    assert names(tmp_path) == ["epoch-0004-step-000012.pt", "epoch-0004.pt"]
    assert checkpoint.load(tmp_path)["step"] == 12
    checkpoint.save(tmp_path, state(5))
    assert names(tmp_path) == ["epoch-0004-step-000012.pt", "epoch-0005.pt"]


def test_files_of_other_names_are_left_alone(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"mine")
    for epoch in (1, 2, 3):
        checkpoint.save(tmp_path, state(epoch))
    assert names(tmp_path) == ["best.pt", "epoch-0002.pt", "epoch-0003.pt"]


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_an_unreadable_one_names_itself_and_the_intact_one_before(tmp_path, damage):
    for epoch in (1, 2):
        checkpoint.save(tmp_path, state(epoch))
    newest = tmp_path / "epoch-0002.pt"
    newest.write_bytes(newest.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UserError) as raised:
        checkpoint.load(tmp_path)
    message = str(raised.value)
    assert f"cannot read the checkpoint {newest}: not a checkpoint, or damaged" in message
    assert "weights_only" not in message, "torch's advice would run the code of a stranger"
    assert "delete it and resume again to continue from" in message
    assert str(tmp_path / "epoch-0001.pt") in message
    newest.unlink()  # as told
    assert checkpoint.load(tmp_path)["epoch"] == 1


def test_a_single_flipped_bit_is_noticed(tmp_path):
    checkpoint.save(tmp_path, state(1) | {"weights": torch.zeros(10_000)})
    path = tmp_path / "epoch-0001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint, or damaged"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 4}, {"epoch": "4", "step": 0}, torch.ones(2)]
)
def test_a_file_that_torch_reads_but_that_is_no_state(tmp_path, content):
    torch.save(content, tmp_path / "epoch-0004.pt")
    with pytest.raises(UserError, match="not a checkpoint, or damaged"):
        checkpoint.load(tmp_path)


def test_where_none_is_intact_it_says_so(tmp_path):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / "epoch-0001.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="no intact one before it"):
        checkpoint.load(tmp_path)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"epoch": 1, "step": 0, "weights": Malicious()}, tmp_path / "epoch-0001.pt")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*, got builtins\.exec, "):
        checkpoint.load(tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from sqloss.training import checkpoint
from sqloss.common.errors import UserError

folder = Path(sys.argv[1])
checkpoint.save(folder, {"epoch": 1, "step": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoint.save(folder, {"epoch": 2, "step": 0, "weights": torch.zeros(100_000)})
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE, which Windows has not")
def test_a_full_disk_leaves_the_older_one_and_no_rest(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True
    )
    assert "cannot save the checkpoint: cannot write" in done.stdout
    assert "epoch-0002.pt: File too large" in done.stdout
    assert f"{tmp_path / 'epoch-0001.pt'} is intact" in done.stdout
    assert names(tmp_path) == ["epoch-0001.pt"]
    assert checkpoint.load(tmp_path)["epoch"] == 1
