import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset

pytestmark = pytest.mark.usefixtures("torchvision")


@pytest.fixture
def root(tmp_path, write_images):
    """Grey images of one value each: it is even with A, and a multiple of 3 with B."""
    write_images(tmp_path, {"cat": 10, "dog": 10})
    write_table(tmp_path)
    return tmp_path


def write_table(root, header="file,A,B", change=lambda lines: lines):
    lines = [
        f"{folder}/{i}.png,{int(value % 2 == 0)},{int(value % 3 == 0)}"
        for start, folder in enumerate(("cat", "dog"))
        for i in range(10)
        for value in [10 * start + i]
    ]
    (root / "attributes.csv").write_text("\n".join([header, *change(lines)]) + "\n")


def test_images_of_a_folder_have_the_attributes_of_its_table(root):
    data = load_dataset("folder", data_dir=root)
    assert data.class_names == ("cat", "dog")
    for part in ("train", "test"):
        values = getattr(data, f"{part}_images")[:, 0, 0, 0].int()
        attributes = getattr(data, f"{part}_attributes")
        assert torch.equal(attributes["A"], values % 2 == 0)
        assert torch.equal(attributes["B"], values % 3 == 0)
    rare = data.imbalanced("A=1,B=0:0,dog:0.5", 0)
    values = rare.train_images[:, 0, 0, 0].int()
    assert not ((values % 2 == 0) & (values % 3 != 0)).any()


def test_an_attribute_may_be_the_class(root):
    data = load_dataset("folder", data_dir=root, folder_attribute="A")
    assert data.class_names == ("not A", "A")
    assert torch.equal(data.train_labels, data.train_attributes["A"].long())
    both = load_dataset("folder", data_dir=root, folder_attribute="A,B", train_limit=5)
    values = both.train_images[:, 0, 0, 0].int()
    assert torch.equal(both.train_labels, 2 * (values % 2 == 0) + (values % 3 == 0))
    assert len(both.train_attributes["B"]) == 5


def test_with_an_attribute_for_the_class_folders_are_not_needed(tmp_path, write_images):
    write_images(tmp_path, {".": 10})
    lines = [f"{i}.png,{i % 2}" for i in range(10)]
    (tmp_path / "attributes.csv").write_text("\n".join(["file,Odd", *lines]))
    data = load_dataset("folder", data_dir=tmp_path, folder_attribute="Odd")
    assert torch.equal(data.train_labels, data.train_images[:, 0, 0, 0].long() % 2)


def test_a_split_has_a_table_in_each_part(tmp_path, write_images):
    for part in ("train", "test"):
        write_images(tmp_path / part, {"cat": 10, "dog": 10})
    write_table(tmp_path / "train")
    with pytest.raises(UserError, match=r"the same attributes in .* got A, B in one of them only"):
        load_dataset("folder", data_dir=tmp_path)
    write_table(tmp_path / "test")
    data = load_dataset("folder", data_dir=tmp_path)
    for images, attributes in (
        (data.train_images, data.train_attributes),
        (data.test_images, data.test_attributes),
    ):
        assert torch.equal(attributes["A"], images[:, 0, 0, 0] % 2 == 0)


@pytest.mark.parametrize(
    ("header", "change", "message"),
    [
        ("file,A,B", lambda lines: lines[1:], "a row for every image, got none for cat/0.png"),
        ("file,A,B", lambda lines: [*lines, "x.png,0,1"], "rows of images, got no image x.png"),
        ("file,A,B", lambda lines: [*lines, lines[4]], "line 22: expected a file without a row"),
        ("file,A,B", lambda lines: ["cat/0.png,0", *lines[1:]], "line 2: .* got cat/0.png,0"),
        ("file,A,B", lambda lines: [*lines[:-1], "dog/9.png,0,-1"], "line 21: .* 0 or 1 for each"),
        ("name,A,B", list, "expected the header file,NAME,... .* got name,A,B"),
        ("file,A,A", list, "names that differ"),
        ("file,A,B=1", list, "none of , = :"),
        ("file", list, "got file"),
        ("", lambda lines: [], "expected the header"),
    ],
)
def test_a_table_that_does_not_fit_is_told(root, header, change, message):
    write_table(root, header, change)
    with pytest.raises(UserError, match=rf"{root / 'attributes.csv'}.*{message}"):
        load_dataset("folder", data_dir=root)


def test_a_table_in_no_text_is_told(root):
    (root / "attributes.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match=rf"cannot read the attributes {root}"):
        load_dataset("folder", data_dir=root)


def test_a_class_of_an_attribute_needs_the_table(root):
    (root / "attributes.csv").unlink()
    with pytest.raises(UserError, match=r"--folder-attribute: expected the table .*csv, got none"):
        load_dataset("folder", data_dir=root, folder_attribute="A")


def test_an_attribute_that_the_table_lacks(root):
    with pytest.raises(UserError, match="--folder-attribute: expected one of A, B, got 'C'"):
        load_dataset("folder", data_dir=root, folder_attribute="C")
