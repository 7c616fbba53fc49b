import pytest
import torch

from sqloss.common.errors import UserError
from sqloss.datasets import Dataset
from sqloss.datasets.imbalance import parse_imbalance, thinned
from sqloss.models.seeding import generator


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("none", {}),
        ("0:0.1, 3:0.5", {"0": 0.1, " 3": 0.5}),
        ("2:0", {"2": 0.0}),
        ("cat:1e-1,sea lion:.5", {"cat": 0.1, "sea lion": 0.5}),
        ("A=1,B=0:0.1,cat:0.5", {"A=1,B=0": 0.1, "cat": 0.5}),
        ("a,b:0.5,c:d:1,e:f,g:0", {"a,b": 0.5, "c:d": 1.0, "e:f,g": 0.0}),
    ],
)
def test_imbalance_is_parsed(text, shares):
    assert parse_imbalance(text) == shares


@pytest.mark.parametrize("text", ["", "0", "0:", ":0.1", "0:0.1,", "0:1.5", "0:nan", "0:.1,0:.2"])
def test_a_bad_imbalance_says_what_is_expected(text):
    with pytest.raises(UserError, match="--imbalance: expected 'none' or CLASS:SHARE") as raised:
        parse_imbalance(text)
    assert repr(text) in str(raised.value)


def test_imbalance_keeps_exact_shares_of_the_training_images_only(digits):
    rare = digits.imbalanced("0:0.1,3:0.5", seed=0)
    before, after = digits.class_counts(), rare.class_counts()
    assert after[0] == round(0.1 * before[0])
    assert after[3] == round(0.5 * before[3])
    assert [after[i] for i in (1, 2, 4, 5, 6, 7, 8, 9)] == [
        before[i] for i in (1, 2, 4, 5, 6, 7, 8, 9)
    ]
    assert rare.test_images is digits.test_images
    assert rare.test_labels is digits.test_labels


def test_imbalance_keeps_images_with_their_labels(digits):
    rare = digits.imbalanced("0:0.1", seed=0)
    known = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    }
    assert all(
        (image.numpy().tobytes(), int(label)) in known
        for image, label in zip(rare.train_images, rare.train_labels, strict=True)
    )


def test_imbalance_depends_on_the_seed_only(digits, assert_equal_data):
    first, second, other = (digits.imbalanced("0:0.1", seed) for seed in (0, 0, 1))
    assert_equal_data(first, second)
    assert first.class_counts() == other.class_counts()
    assert not torch.equal(first.train_images, other.train_images)


def test_imbalance_none_keeps_all(digits, assert_equal_data):
    assert_equal_data(digits, digits.imbalanced("none", seed=0))


@pytest.mark.parametrize("name", ["10", "-1", "x", "0.5"])
def test_imbalance_of_an_unknown_class(digits, name):
    with pytest.raises(
        UserError, match=rf"^--imbalance: expected one of the classes 0, 1, .* 0 to 9, got '{name}'"
    ):
        digits.imbalanced(f"{name}:0.5", seed=0)


@pytest.mark.parametrize(
    ("imbalance", "shares"),
    [
        ("2:0.1", {4: 0.1}),  # the class of that name, and not the third one
        ("cat:0.1, dog, or not:0.5", {5: 0.1, 6: 0.5}),
        ("5:0.1", {5: 0.1}),  # nobody's name
    ],
)
def test_a_class_is_named_or_else_counted(imbalance, shares):
    assert thinned(imbalance, ("0", "1", "10", "11", "2", "cat", "dog, or not")) == shares


@pytest.mark.parametrize("imbalance", ["cat:0.1,0:0.5", "0:0.5, 0:0.1"])
def test_imbalance_of_one_class_twice(imbalance):
    with pytest.raises(UserError, match="each class once"):
        thinned(imbalance, ("cat", "dog"))


@pytest.mark.parametrize(("share", "left"), [(1e-9, 1), (0, 0)])
def test_only_a_share_of_0_removes_a_class(digits, share, left):
    assert digits.imbalanced(f"4:{share}", seed=0).class_counts()[4] == left


def test_a_class_without_images_stays_so(digits):
    none_left = digits.imbalanced("4:0", seed=0)
    assert none_left.imbalanced("4:0.5", seed=0).class_counts()[4] == 0


def test_imbalance_that_leaves_nothing(digits):
    with pytest.raises(UserError, match="leaves no training image"):
        digits.imbalanced(",".join(f"{i}:0" for i in range(10)), seed=0)


# combinations of attributes

ATTRIBUTES = ("Eyeglasses", "Male")


@pytest.mark.parametrize(
    ("imbalance", "parts"),
    [
        ("Male=1:0.1", {(("Male", True),): 0.1}),
        (
            "Male=0, Eyeglasses=1:0.1,cat:0.5,Male=1:0",
            {(("Eyeglasses", True), ("Male", False)): 0.1, 0: 0.5, (("Male", True),): 0.0},
        ),
        ("Eyeglasses=1:0.5", {1: 0.5}),  # the class of that name
    ],
)
def test_a_combination_of_attributes_is_named(imbalance, parts):
    assert thinned(imbalance, ("cat", "Eyeglasses=1"), ATTRIBUTES) == parts


@pytest.mark.parametrize(
    ("imbalance", "message"),
    [
        ("Bald=1:0.1", "expected attributes among Eyeglasses, Male, got 'Bald'"),
        ("Male=2:0.1", "each once with 0 or 1, such as Eyeglasses=1,Male=0, got 'Male=2'"),
        ("Male=1,Male=0:0.1", "each once with 0 or 1"),
        ("Male:0.1", "expected one of the classes cat, dog, a combination of attributes"),
        ("Male=1,Eyeglasses=0:0.1,Eyeglasses=0,Male=1:0.2", "each class once"),
    ],
)
def test_a_combination_that_is_none(imbalance, message):
    with pytest.raises(UserError, match=rf"^--imbalance: .*{message}"):
        thinned(imbalance, ("cat", "dog"), ATTRIBUTES)


def test_without_attributes_there_is_no_combination():
    with pytest.raises(UserError, match="expected one of the classes cat, dog, or a number"):
        thinned("Male=1:0.1", ("cat", "dog"))


@pytest.fixture
def people() -> Dataset:
    """A thousand images with attributes, each image of its own value, in two classes."""
    draws = generator(0, "people")
    images = torch.arange(1000).view(-1, 1, 1, 1)
    has = {name: torch.rand(1000, generator=draws) < 0.5 for name in ATTRIBUTES}
    labels = has["Male"].long()
    return Dataset("people", ("not Male", "Male"), images, labels, images, labels, has, has)


def test_an_exact_share_of_a_combination_is_kept(people):
    rare = people.imbalanced("Eyeglasses=1,Male=0:0.1", seed=0)
    glasses, male = (people.train_attributes[name] for name in ATTRIBUTES)
    left = torch.zeros(1000, dtype=torch.bool)
    left[rare.train_images.flatten()] = True
    members = glasses & ~male
    assert left[members].sum() == round(0.1 * members.sum().item())
    assert left[~members].all()
    for name, has in rare.train_attributes.items():
        assert torch.equal(has, people.train_attributes[name][left])
    assert torch.equal(rare.train_labels, people.train_labels[left])
    assert rare.test_attributes is people.test_attributes


def test_parts_that_overlap_are_thinned_each_for_itself(people):
    both = people.imbalanced("Male:0.5,Eyeglasses=1:0.5", seed=3)
    male = set(people.imbalanced("Male:0.5", seed=3).train_images.flatten().tolist())
    glasses = set(people.imbalanced("Eyeglasses=1:0.5", seed=3).train_images.flatten().tolist())
    assert set(both.train_images.flatten().tolist()) == male & glasses


def test_a_combination_is_thinned_alike_whatever_its_order(people, assert_equal_data):
    orders = ("Eyeglasses=1,Male=0:0.1", "Male=0,Eyeglasses=1:0.1")
    assert_equal_data(*(people.imbalanced(order, seed=0) for order in orders))
