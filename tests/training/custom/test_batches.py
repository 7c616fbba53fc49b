from collections import namedtuple

import numpy
import pytest
import torch
from torch.utils.data import default_collate

from sqloss.common.errors import UserError
from sqloss.training.custom.batches import rows_of

Pair = namedtuple("Pair", ["x", "name"])
X = torch.arange(6.0).view(3, 2)
NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, X[[0, 2]]),
        ([X, ("a", "b", "c")], [X[[0, 2]], ("a", "c")]),
        (
            {"x": X, "name": NAMES, "of all": "abc"},
            {"x": X[[0, 2]], "name": ["a", "c"], "of all": "abc"},
        ),
        (Pair(X, NAMES), Pair(X[[0, 2]], ["a", "c"])),
        ((X, [{"a": 1}, {"b": 2}, None]), (X[[0, 2]], [{"a": 1}, None])),
        ((X, [["a", "b"], [], ["c"]]), (X[[0, 2]], [["a", "b"], ["c"]])),
        (
            (X, numpy.array(NAMES), numpy.int64(3)),
            (X[[0, 2]], numpy.array(["a", "c"]), numpy.int64(3)),
        ),
        ((X, [], None, 2.5), (X[[0, 2]], [], None, 2.5)),
        (
            default_collate(
                [(x, (name, name * 2), {"k": name}) for x, name in zip(X, NAMES, strict=True)]
            ),
            [X[[0, 2]], [("a", "c"), ("aa", "cc")], {"k": ["a", "c"]}],
        ),
    ],
)
@pytest.mark.parametrize("rows", [slice(0, 3, 2), torch.tensor([0, 2])], ids=["slice", "rows"])
def test_all_that_has_an_item_per_sample_is_cut(batch, expected, rows):
    found = rows_of(batch, rows)
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("part", "got"),
    [
        (["a", "b"], "a list of 2 with 3 samples"),
        ([["a", "b", "c"], ["d"]], "a list of 1 with 3 samples"),
        ([NAMES, NAMES, NAMES], "3 lists of 3: either may be the samples"),
        (numpy.zeros(2), "ndarray"),
        ({"a": object()}, "object"),
    ],
)
def test_what_cannot_be_cut_is_refused(part, got):
    with pytest.raises(UserError, match=f"data: expected batches that can be cut, .*, got {got}"):
        rows_of((X, part), slice(0, 2))
