from pathlib import Path

import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.common.files import as_json
from sqloss.datasets import DATASETS, Place, load_dataset
from sqloss.datasets.folder import image_folder

pytestmark = pytest.mark.usefixtures("torchvision")


def test_a_folder_is_split_evenly_and_keeps_its_grey_and_its_size(
    tmp_path, write_images, assert_equal_data
):
    write_images(tmp_path, {"cat": 10, "dog": 20})
    data = load_dataset("folder", data_dir=tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.shape == (1, 5, 6)
    assert data.class_counts() == [8, 16]
    assert torch.bincount(data.test_labels).tolist() == [2, 4]
    values = torch.cat([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == sorted([*range(10), *range(10, 30)])
    assert all(
        (value >= 10) == label
        for value, label in zip(
            data.train_images[:, 0, 0, 0].tolist(), data.train_labels.tolist(), strict=True
        )
    )
    assert_equal_data(data, load_dataset("folder", data_dir=tmp_path))


def test_a_folder_with_train_and_test_keeps_that_split(tmp_path, write_images):
    write_images(tmp_path / "train", {"cat": 6, "dog": 6}, mode="RGB")
    write_images(tmp_path / "test", {"cat": 1, "dog": 2}, mode="RGB")
    data = load_dataset("folder", data_dir=tmp_path)
    assert data.shape == (3, 5, 6)
    assert data.class_counts() == [6, 6]
    assert data.test_labels.tolist() == [0, 1, 1]
    assert data.test_images[2, :, 0, 0].tolist() == [1, 1, 9]
    first = load_dataset("folder", data_dir=tmp_path, train_limit=6)
    assert all(first.class_counts()), "the first images are not all of the first class"


def test_a_folder_of_mixed_sizes_and_colours(tmp_path, write_images):
    write_images(tmp_path, {"cat": 5}, size=(40, 50))
    write_images(tmp_path, {"dog": 5}, size=(64, 64), mode="RGB")
    assert load_dataset("folder", data_dir=tmp_path).shape == (3, 32, 32)
    assert load_dataset("folder", data_dir=tmp_path, image_size=20).shape == (3, 20, 20)


@pytest.mark.parametrize("make", [[], ["empty-class"]])
def test_a_folder_without_images(tmp_path, make):
    for name in make:
        (tmp_path / name).mkdir()
    with pytest.raises(
        UserError, match="--dataset folder: expected one folder of images per class"
    ):
        load_dataset("folder", data_dir=tmp_path)


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"one folder of images per class.* Not a directory"):
        load_dataset("folder", data_dir=tmp_path / "file")


def test_a_folder_with_half_a_split(tmp_path, write_images):
    write_images(tmp_path / "train", {"cat": 3})
    with pytest.raises(UserError, match=r"expected train/ and test/ .* got only one"):
        load_dataset("folder", data_dir=tmp_path)


def test_a_folder_with_other_classes_in_test(tmp_path, write_images):
    write_images(tmp_path / "train", {"cat": 3, "dog": 3})
    write_images(tmp_path / "test", {"cat": 3})
    with pytest.raises(UserError, match=r"the same classes .* got dog in one of them only"):
        load_dataset("folder", data_dir=tmp_path)


def test_a_folder_too_small_to_split(tmp_path, write_images):
    write_images(tmp_path, {"cat": 1, "dog": 9})
    with pytest.raises(UserError, match="expected enough images for a test set"):
        load_dataset("folder", data_dir=tmp_path)


def test_hidden_files_and_folders_are_no_data(tmp_path, write_images, assert_equal_data):
    write_images(tmp_path, {"cat": 5, "dog": 5, ".ipynb_checkpoints": 5})
    seen = load_dataset("folder", data_dir=tmp_path)
    assert seen.class_names == ("cat", "dog")
    for place in (".git", "__MACOSX/cat", "cat/.thumbnails", "dog/@eaDir/x", "lost+found"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(b"no image")
    (tmp_path / "lost+found" / "1.png").unlink()
    (tmp_path / "cat" / "._1.png").write_bytes(b"no image")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"no image")
    assert_equal_data(load_dataset("folder", data_dir=tmp_path), seen)
    hidden = tmp_path.rename(tmp_path.with_name(f".{tmp_path.name}"))
    assert_equal_data(load_dataset("folder", data_dir=hidden), seen)
    for shown in ("cat", "dog"):
        (hidden / shown).rename(hidden / f".{shown}")
    with pytest.raises(UserError, match=r"one folder of images per class.*no folder in"):
        load_dataset("folder", data_dir=hidden)


def test_images_are_ordered_as_by_torchvision(tmp_path, torchvision):
    """So that runs of before can be resumed."""
    for name in ("cat", "cat/b", "cat/b-c", "cat/b/a", "cat/B", "Dog"):
        (tmp_path / name).mkdir()
        for i in ("10.png", "9.PNG", "x.jpeg", "y.gif", "z.txt"):
            (tmp_path / name / i).touch()
    found = torchvision.datasets.ImageFolder(tmp_path)
    files, labels, classes = image_folder(tmp_path)
    assert [str(file) for file in files] == [file for file, _ in found.samples]
    assert labels.tolist() == found.targets
    assert list(classes) == found.classes


@pytest.mark.parametrize("place", [".", "runs/vae-1", "cat/deep/er"])
def test_a_run_among_the_images_is_no_data(tmp_path, place, write_images):
    write_images(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "cat" / "config.json").write_text('{"command": "of another program"}')
    assert len(load_dataset("folder", data_dir=tmp_path).class_names) == 2
    run = tmp_path / place
    write_images(run, {"pictures": 1})
    (run / "config.json").write_bytes(
        as_json({"command": "vae", "dataset": "digits", "imbalance": "none"})
    )
    with pytest.raises(UserError, match=rf"--dataset folder: .* got the run {run}, .* move it"):
        load_dataset("folder", data_dir=tmp_path)


@pytest.mark.parametrize("split", [False, True])
def test_output_among_the_images_is_refused(tmp_path, monkeypatch, split):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    part = "train/" if split else ""
    for name in ("train", "test") if split else (".",):
        (root / name / "cat").mkdir(parents=True)
    elsewhere.mkdir()
    (root / part / "linked").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)

    def is_refused(directory: Path) -> bool:
        for data_dir in (root, Path(".")):
            try:
                DATASETS["folder"]().check_output(Place(data_dir=data_dir), directory)
            except UserError as error:
                assert f"got {directory}, which is in" in str(error)
                continue
            return False
        return True

    inside = [f"{part}{place}" for place in ("", "cat/run", "runs/new", "cat/../cat", "linked/run")]
    for place in (*inside, f"../link/{part}x", str(elsewhere)):
        assert is_refused(Path(place)), place
    for place in ("../runs", f"{part}.runs/new", f"{part}cat/.run", "/", *["runs"] * split):
        assert not is_refused(Path(place)), place
    DATASETS["digits"]().check_output(Place(data_dir=root), Path("runs"))
    DATASETS["folder"]().check_output(Place(data_dir=tmp_path / "none"), Path("runs"))
