"""How a GAN fails without any number being infinite, told in the epoch in which it begins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

TELLS_ALL = 0.999  # of pairs of a real and a generated image: the generator's gradient vanishes
CONSTANT = 1e-3  # of logits, whose spread is of the order of 1
ALIKE = 0.05  # of the spread of real images

FAILURES: dict[str, Callable[[Row], bool]] = {
    "the discriminator tells every generated image from every real one, its generator may learn "
    "nothing more (try a smaller --lr-d, or --g-steps 2)": lambda row: (
        row["d_accuracy"] >= TELLS_ALL
    ),
    "the discriminator has collapsed: it gives all images the same logit": lambda row: (
        row["d_spread"] <= CONSTANT
    ),
    "the generator has collapsed: it makes the same image of all noise": lambda row: (
        row["g_spread"] <= ALIKE
    ),
}


def failures(row: Row, loss: str) -> list[str]:
    """What is wrong with a model after an epoch."""
    found = [words for words, is_so in FAILURES.items() if is_so(row)]
    # A critic that tells all apart is what the Wasserstein distance wants, and not a failure.
    return found[1:] if loss == "wgan-gp" and row["d_accuracy"] >= TELLS_ALL else found


def alarms(history: Sequence[Row], loss: str) -> list[str]:
    """What has gone wrong in the last epoch and was well in the one before."""
    if not history:
        return []
    last = history[-1]["epoch"]
    before = {
        (row["model"], words)
        for row in history
        if row["epoch"] == last - 1
        for words in failures(row, loss)
    }
    return [
        f"epoch {last}: {row['model']}: {words}"
        for row in history
        if row["epoch"] == last
        for words in failures(row, loss)
        if (row["model"], words) not in before
    ]
