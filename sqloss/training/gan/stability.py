"""How a GAN fails without any number being infinite, told in the epoch in which it begins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Of pairs of a real and a generated image. Every GAN is there for some epochs, the first ones above
# all; where it stays there, the generator has lost.
TELLS_ALL, EPOCHS_LOST = 0.999, 5
CONSTANT = 1e-3  # of logits, whose spread is of the order of 1
ALIKE = 0.05  # of the spread of real images


def is_lost(rows: Sequence[Row]) -> bool:
    accuracies = [row["d_accuracy"] for row in rows[-EPOCHS_LOST:]]
    return len(accuracies) == EPOCHS_LOST and min(accuracies) >= TELLS_ALL


FAILURES: dict[str, Callable[[Sequence[Row]], bool]] = {
    f"the discriminator has told every generated image from every real one for {EPOCHS_LOST} "
    "epochs, the generator may learn nothing more (try a smaller --lr-d, or --g-steps 2)": is_lost,
    "the discriminator has collapsed: it gives all images the same logit": lambda rows: (
        rows[-1]["d_spread"] <= CONSTANT
    ),
    "the generator has collapsed: it makes the same image of all noise": lambda rows: (
        rows[-1]["g_spread"] <= ALIKE
    ),
}


def failures(history: Sequence[Row], name: str, loss: str) -> dict[int, list[str]]:
    """What is wrong with a model after each of its epochs."""
    rows = [row for row in history if row["model"] == name]
    # A critic that tells all apart is what the Wasserstein distance asks for.
    watched = {w: found for w, found in FAILURES.items() if loss != "wgan-gp" or found != is_lost}
    return {
        row["epoch"]: [words for words, found in watched.items() if found(rows[: i + 1])]
        for i, row in enumerate(rows)
    }


def alarms(history: Sequence[Row], loss: str) -> list[str]:
    """What has gone wrong in the last epoch and was well in the one before."""
    told = []
    for name in dict.fromkeys(row["model"] for row in history):
        by_epoch = failures(history, name, loss)
        last = max(by_epoch)
        before = by_epoch.get(last - 1, [])
        told += [f"epoch {last}: {name}: {w}" for w in by_epoch[last] if w not in before]
    return told
