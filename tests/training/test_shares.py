import dataclasses

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.models import classifier as classifiers
from sqloss.models.pixels import pixels
from sqloss.training import shares
from sqloss.training.shares import batch_sizes, check_classifier_file, kept_classifier

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(classifiers, "STEPS", 5)


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The seeds of the classifiers that are trained."""
    seeds = []

    def spy(images, labels, classes, seed):
        seeds.append(seed)
        return classifiers.train_classifier(images, labels, classes, seed)

    monkeypatch.setattr(shares, "train_classifier", spy)
    return seeds


def test_a_classifier_is_made_once_and_then_reused(trainer, tmp_path, trained, assert_same):
    path = tmp_path / "judge.pt"
    check_classifier_file(path, trainer.data)
    first = kept_classifier(path, trainer.data, CPU, seed=3)
    content = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    check_classifier_file(path, trainer.data)
    again = kept_classifier(path, trainer.data, CPU, seed=4)
    assert trained == [3], "whoever reads it gets that of another seed"
    assert_same(dict(first.state_dict()), dict(again.state_dict()))
    assert path.read_bytes() == content
    images = pixels(trainer.data.test_images)
    assert torch.equal(first.see(images)[1], again.see(images)[1])


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_a_classifier_of_other_data_is_refused(trainer, tmp_path, trained, part):
    path = tmp_path / "judge.pt"
    kept_classifier(path, trainer.data, CPU, seed=0)
    content = path.read_bytes()
    changed = getattr(trainer.data, part).clone()
    changed[0] = (changed[0] + 1) % 3
    other = dataclasses.replace(trainer.data, **{part: changed})
    for use in (
        lambda: kept_classifier(path, other, CPU, seed=0),
        lambda: check_classifier_file(path, other),
    ):
        with pytest.raises(UserError) as raised:
            use()
        assert str(raised.value) == (
            f"--classifier: expected a file with the classifier of this data set, got {path} "
            "(its classifier has learnt other images or labels)"
        )
    assert path.read_bytes() == content
    assert trained == [0]


def damaged(path, data):
    stored = torch.load(path, weights_only=True)
    del stored["classifier"]["logits.bias"]
    torch.save(stored, path)


DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "half": lambda path, data: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path, data: path.write_text("a classifier"),
    "another file of torch's": lambda path, data: torch.save([1, 2], path),
    "without some weights": damaged,
    "a folder": lambda path, data: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(trainer, tmp_path, trained, damage):
    path = tmp_path / "judge.pt"
    kept_classifier(path, trainer.data, CPU, seed=0)
    DAMAGES[damage](path, trainer.data)
    expected = "--classifier: expected a file with the classifier of this data set, got"
    with pytest.raises(UserError, match=expected) as raised:
        kept_classifier(path, trainer.data, CPU, seed=0)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    with pytest.raises(UserError, match=expected):
        check_classifier_file(path, trainer.data)
    assert trained == [0], "it is not made over whatever the file is"


def test_a_file_runs_no_code(trainer, tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("made").touch, ())

    torch.save(Code(), tmp_path / "judge.pt")
    with pytest.raises(UserError, match="--classifier"):
        kept_classifier(tmp_path / "judge.pt", trainer.data, CPU, seed=0)
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_not_there_is_told(trainer, tmp_path):
    path = tmp_path / "none" / "judge.pt"
    with pytest.raises(UserError) as raised:
        check_classifier_file(path, trainer.data)
    assert str(raised.value) == (
        f"--classifier: expected a file in a folder that is there, got {path}"
    )


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (1000, [1000]), (2500, [1000, 1000, 500])])
def test_batches_of_generated_images(count, sizes):
    assert batch_sizes(count) == sizes
