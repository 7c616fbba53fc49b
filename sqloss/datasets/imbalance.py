"""Which training images an imbalance makes rare: classes, or combinations of attributes."""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sqloss.common.errors import UserError

# What attributes an image has and lacks: (("Eyeglasses", True), ("Male", False)), sorted.
Combination = tuple[tuple[str, bool], ...]
Part = int | Combination  # a class by its number, or the images with a combination of attributes

NAMES_TOLD = 20  # in an error that lists them
# A class, whose name may have commas and colons of its own, and the share to keep of it.
NAME_SHARE = re.compile(r"(?P<name>.+?):(?P<share>[-+.\deE\s]+)(?:,(?=.)|\Z)", re.DOTALL)
ATTRIBUTE = re.compile(r"\s*(?P<name>[^=,]+)=(?P<value>[01])\s*")


def parse_imbalance(text: str) -> dict[str, float]:
    """The share to keep of each part: "0:0.1,cat:0.5" is {"0": 0.1, "cat": 0.5}, "none" is {}."""
    if text == "none":
        return {}
    shares: dict[str, float] = {}
    end = 0
    while match := NAME_SHARE.match(text, end):
        end, name = match.end(), match["name"]
        try:
            share = float(match["share"])
        except ValueError:
            share = -1.0
        if name in shares or not 0 <= share <= 1:
            raise wrong_imbalance(text)
        shares[name] = share
    if end < len(text) or not shares:
        raise wrong_imbalance(text)
    return shares


def wrong_imbalance(text: str) -> UserError:
    return UserError(
        "--imbalance: expected 'none' or CLASS:SHARE,... with each class once and shares from 0 to "
        "1, such as 0:0.1 or 0:0.1,cat:0.5, where CLASS may be a combination of attributes, such "
        f"as Eyeglasses=1,Male=0:0.1, got {text!r}"
    )


def thinned(
    imbalance: str, class_names: Sequence[str], attributes: Collection[str] = ()
) -> dict[Part, float]:
    """The share to keep of each part of the training images that an imbalance names.

    A part is a class by its name; what is no class's name is a combination of attributes; what is
    none is a number, in the order of the classes.
    """
    shares: dict[Part, float] = {}
    for name, share in parse_imbalance(imbalance).items():
        part = part_of(name, class_names, attributes)
        if part in shares:
            raise wrong_imbalance(imbalance)
        shares[part] = share
    return shares


def part_of(name: str, class_names: Sequence[str], attributes: Collection[str]) -> Part:
    for given in (name, name.strip()):
        if given in class_names:
            return class_names.index(given)
    if attributes and "=" in name:
        return combination_of(name, attributes)
    last = len(class_names) - 1
    try:
        label = int(name)
    except ValueError:
        label = -1
    if not 0 <= label <= last:
        of_attributes = ", a combination of attributes like A=1,B=0" if attributes else ""
        raise UserError(
            f"--imbalance: expected one of the classes {listed(class_names)}{of_attributes}, or a "
            f"number from 0 to {last}, got {name!r}"
        )
    return label


def combination_of(text: str, attributes: Collection[str]) -> Combination:
    """What "Eyeglasses=1,Male=0" names."""
    values: dict[str, bool] = {}
    for piece in text.split(","):
        match = ATTRIBUTE.fullmatch(piece)
        if match is None or match["name"] in values:
            raise UserError(
                "--imbalance: expected a combination of attributes, each once with 0 or 1, such as "
                f"Eyeglasses=1,Male=0, got {text!r}"
            )
        if match["name"] not in attributes:
            raise UserError(
                f"--imbalance: expected attributes among {listed(sorted(attributes))}, got "
                f"{match['name']!r}"
            )
        values[match["name"]] = match["value"] == "1"
    return tuple(sorted(values.items()))


def listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more


def in_text(combination: Combination) -> str:
    """A combination as a user writes it."""
    return ",".join(f"{name}={int(value)}" for name, value in combination)


def members(part: Part, labels: Tensor, attributes: Mapping[str, Tensor]) -> Tensor:
    """Which images belong to a part, bool [N]."""
    if isinstance(part, int):
        return labels == part
    return torch.stack([attributes[name] == value for name, value in part]).all(0)
