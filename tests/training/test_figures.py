import os

import pytest
import torch

pytest.importorskip("matplotlib")

from sqloss.training.figures import label_rows, mosaic, new_figure, save_picture, show


def test_any_name_names_a_row(tmp_path):
    """Matplotlib would read mathematics in some, and fail at others."""
    names = ["$$", r"\$a$", "$x^", "a_b", os.fsdecode(b"\xe9"), "\x1b[31m", "two\nlines", "", " "]
    figure = new_figure(3, 3)
    axes = figure.subplots()
    show(axes, mosaic(torch.rand(len(names), 1, 2, 2), columns=1))
    label_rows(axes, names, height=2)
    save_picture(tmp_path / "picture.png", figure)
    told = [label.get_text() for label in axes.get_yticklabels()]
    assert told == [*names[:4], r"\udce9", r"\x1b[31m", *names[6:]]
