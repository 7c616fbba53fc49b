"""What a sampler without labels has drawn and what a risk of groups weighs: so users see what was
lifted."""

from typing import TYPE_CHECKING, Any

import torch

from sqloss import groups
from sqloss.common.tables import table
from sqloss.common.text import in_markdown

if TYPE_CHECKING:
    from sqloss.training.loop import Training, TrainingData


def section(training: "Training", data: "TrainingData", names: tuple[str, ...]) -> dict[str, Any]:
    """What was drawn, as ``sampling``, and the groups of each model's risk, as ``groups``.

    Nothing where there is no such sampler or risk, or where it has not begun. ``names`` are those
    of the classes.
    """
    described = {name: risk.described() for name, risk in training.risks.items()}
    weighed = {name: of_model for name, of_model in described.items() if of_model}
    kept = training.of_sampler
    return ({"sampling": drawn_by(kept, data, names)} if kept else {}) | (
        {"groups": weighed} if weighed else {}
    )


def drawn_by(kept: dict[str, Any], data: "TrainingData", names: tuple[str, ...]) -> dict[str, Any]:
    """What a sampler has drawn. A class pays whose share of the draws is below the data's."""
    p = kept["p"]
    weight = p * len(p)  # 1: drawn as often as without
    described: dict[str, Any] = {
        "since_epoch": kept["epoch"] + 1,
        "effective_sample_size": groups.effective_sample_size(p),
        "share_lifted_over_3": float((weight > 3).double().mean()),
        "drawn_of_lifted_over_3": float(p[weight > 3].sum()),
        "largest_weight": float(weight.max()),
        "smallest_weight": float(weight.min()),
    }
    if "power" in kept:
        described["power"] = float(kept["power"])
    if "reached" in kept:  # nothing, where no group may be lifted
        described["reached"] = float(kept["reached"]) if kept["reached"].isfinite() else None
    if "groups" in kept:
        sizes = torch.bincount(kept["groups"])
        drawn_shares = torch.zeros(len(sizes), dtype=p.dtype).index_add(0, kept["groups"], p)
        described["groups"] = [
            {"size": size, "drawn": share}
            for size, share in zip(sizes.tolist(), drawn_shares.tolist(), strict=True)
        ]
        for group, score in zip(described["groups"], kept.get("stability", ()), strict=False):
            group["stability"] = float(score)
        for group, parts in zip(described["groups"], kept.get("parts", ()), strict=False):
            group["parts"] = int(parts)
    if data.labels is not None:
        counts = torch.bincount(data.labels, minlength=len(names)).double() / len(p)
        drawn_classes = torch.zeros(len(names), dtype=p.dtype).index_add(0, data.labels, p)
        described["classes_that_pay"] = {
            name: {"in_data": before, "drawn": after}
            for name, before, after in zip(
                names, counts.tolist(), drawn_classes.tolist(), strict=True
            )
            if after < before
        }
    return described


def note(report: dict[str, Any]) -> str:
    """The sections on the sampler and on the groups, in Markdown; "" where there are none."""
    sampling = drawn_note(report["sampling"]) if "sampling" in report else ""
    weighed = report.get("groups", {}).items()
    return sampling + "".join(weighed_note(model, found) for model, found in weighed)


def weighed_note(model: str, found: dict[str, Any]) -> str:
    total = sum(group["size"] for group in found["groups"])
    rows = [
        [
            str(group["group"]),
            str(group["size"]),
            f"{group['size'] / total:.2%}",
            "" if group["mean_loss"] is None else f"{group['mean_loss']:.4g}",
            f"{group['weight']:.2%}",
        ]
        for group in found["groups"]
    ]
    return (
        f"\n## Groups of `{model}`\n\nFrom epoch {found['since_epoch']} on it was trained on them "
        "by these weights in the end, of the running means of their\ntraining losses.\n\n"
        + table([["group", "samples", "share", "mean loss", "weight"], *rows])
        + "\n"
    )


def drawn_note(found: dict[str, Any]) -> str:
    lines = [
        "\n## What was drawn\n",
        f"From epoch {found['since_epoch']} on{power_in_words(found)}. The draws are worth "
        f"{found['effective_sample_size']:.0%} of the samples (effective sample size). "
        f"{found['share_lifted_over_3']:.2%} of\nthe samples are drawn more than three times their "
        f"share: they are {found['drawn_of_lifted_over_3']:.1%} of the draws, outliers\namong them "
        "included. Look at samples of the smallest groups before you trust them.\n",
    ]
    if "groups" in found:
        lines.append("| group | samples | share | drawn | stability |\n|:--|--:|--:|--:|--:|")
        total = sum(group["size"] for group in found["groups"])
        lines += [
            f"| {number} | {group['size']} | {group['size'] / total:.2%} | {group['drawn']:.2%} | "
            f"{format(group['stability'], '.2f') if 'stability' in group else ''} |"
            for number, group in enumerate(found["groups"])
        ]
        merged = [
            f"{number} ({group['parts']})"
            for number, group in enumerate(found["groups"])
            if group.get("parts", 1) > 1
        ]
        if merged:
            lines.append(
                f"\nGroups joined of several communities, and of how many: {', '.join(merged)}."
            )
    if "smallest_weight" in found:
        lines.append(
            f"\nNo sample is drawn less than {found['smallest_weight']:.2f} times its usual share."
        )
    if paying := found.get("classes_that_pay"):
        words = (
            f"{in_markdown(n)} {s['in_data']:.1%} -> {s['drawn']:.1%}" for n, s in paying.items()
        )
        lines.append(f"\nClasses that are drawn less for it: {', '.join(words)}.")
    return "\n".join(lines) + "\n"


def power_in_words(found: dict[str, Any]) -> str:
    """The power, and what share a target reached by it."""
    if "reached" not in found:
        return f", with power {found['power']:g}" if "power" in found else ""
    if found["reached"] is None:
        return ", with power 0, as no group may be lifted"
    return (
        f", with power {found['power']:.3g}, at which every group that may be lifted is "
        f"{found['reached']:.2%}\nof the draws or more"
    )
