"""How a GAN fails without any number being infinite, reported in the epoch in which it begins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Of the discriminator's losses of a real and a generated image. An even chance costs 1.4, in hinge
# 2, in least squares 0.5. Most GANs come near 0 for an epoch or two at first; where one stays
# there, its generator has lost.
ALL_BUT_SURE, EPOCHS_LOST = 0.02, 5
CONSTANT = 1e-3  # of logits, whose spread is of the order of 1
ALIKE = 0.05  # of the spread of real images


def is_lost(rows: Sequence[Row]) -> bool:
    losses = [row["d_loss_mean"] for row in rows[-EPOCHS_LOST:]]
    return len(losses) == EPOCHS_LOST and max(losses) <= ALL_BUT_SURE


def has_collapsed(spread: str, bar: float) -> Callable[[Sequence[Row]], bool]:
    """Whether a spread is at its bar: fallen there, or there from the first epochs on.

    Small networks begin with little spread, and are above the bar some epochs later.
    """

    def found(rows: Sequence[Row]) -> bool:
        spreads = [row[spread] for row in rows]
        has_begun = max(spreads) > bar or len(spreads) >= EPOCHS_LOST
        return has_begun and spreads[-1] <= bar

    return found


FAILURES: dict[str, Callable[[Sequence[Row]], bool]] = {
    f"the discriminator has been all but sure of every image for {EPOCHS_LOST} epochs, the "
    "generator may learn nothing more (try a smaller --lr-d, or --g-steps 2)": is_lost,
    "the discriminator has collapsed: it gives all images the same logit": has_collapsed(
        "d_spread", CONSTANT
    ),
    "the generator has collapsed: it makes the same image of all noise": has_collapsed(
        "g_spread", ALIKE
    ),
}


def failures_after(rows: Sequence[Row], loss: str) -> list[str]:
    """What is wrong with a model after the last of these epochs, which are its first ones."""
    # A critic's loss is minus a distance, which a good one makes large.
    watched = {w: found for w, found in FAILURES.items() if loss != "wgan-gp" or found != is_lost}
    return [words for words, found in watched.items() if rows and found(rows)]


def rows_by_model(history: Sequence[Row]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in history:
        rows.setdefault(row["model"], []).append(row)
    return rows


def failures(history: Sequence[Row], name: str, loss: str) -> dict[str, list[int]]:
    """What was wrong with a model, and after which of its epochs."""
    rows = rows_by_model(history)[name]
    epochs: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        for words in failures_after(rows[:number], loss):
            epochs.setdefault(words, []).append(row["epoch"])
    return epochs


def alarms(history: Sequence[Row], loss: str) -> list[str]:
    """The failures of the last epoch that the one before did not have."""
    told = []
    for name, rows in rows_by_model(history).items():
        before = failures_after(rows[:-1], loss)
        now = failures_after(rows, loss)
        told += [f"epoch {rows[-1]['epoch']}: {name}: {w}" for w in now if w not in before]
    return told
