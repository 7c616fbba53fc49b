import dataclasses

import torch

from sqloss.datasets import load_dataset


def test_what_there_is_to_train_on_is_told_by_name(digits):
    whole = dataclasses.replace(digits, class_names=("c\nat", *digits.class_names[1:]))
    data = whole.imbalanced("3:0.1", seed=0)
    counts, before = data.class_counts(), whole.class_counts()
    words = data.in_words(whole)
    assert words.startswith(f"data: digits, {sum(counts)} training images of 1 x 8 x 8, per class ")
    assert f"per class c\\nat: {counts[0]}, 1: " in words
    assert f"2: {counts[2]}, 3: {counts[3]} of {before[3]}, 4: " in words
    assert words.endswith("; 360 test images")


def test_the_fingerprint_tells_data_apart(digits):
    assert digits.fingerprint() == load_dataset("digits").fingerprint()
    assert digits.fingerprint() != digits.imbalanced("0:0.1", seed=0).fingerprint()
    for labels in ("train_labels", "test_labels"):
        relabelled = {labels: getattr(digits, labels).flip(0)}
        assert digits.fingerprint() != dataclasses.replace(digits, **relabelled).fingerprint()


def test_batches_have_the_rows_asked_for_in_their_order(digits):
    rows = [torch.tensor([5, 3]), torch.tensor([3, 3, 1000])]
    batches = list(digits.batches(iter(rows)))
    assert len(batches) == 2
    for (images, labels), batch in zip(batches, rows, strict=True):
        assert torch.equal(images, digits.train_images[batch])
        assert torch.equal(labels, digits.train_labels[batch])
