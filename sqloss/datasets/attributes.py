"""Attributes of images, of which each image has any: read from a table, or made the classes."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sqloss.common.errors import UserError
from sqloss.datasets.imbalance import listed

TABLE = "attributes.csv"
MOST_AS_CLASSES = 6  # attributes: 64 classes
RESERVED = ",=:"  # in names: they have a meaning in --imbalance


def classes_of(
    flag: str, text: str, attributes: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], Tensor]:
    """The names and, of each image, the number of the classes that some attributes make.

    Every combination of the attributes in ``text``, like "Smiling" or "Smiling,Male", is a class:
    "not Smiling" and "Smiling", or "not Smiling, not Male" to "Smiling, Male".
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in attributes:
            known = ", ".join(attributes)
            raise UserError(f"{flag}: expected one of {known}, got {name!r}")
    if len(set(names)) < len(names) or len(names) > MOST_AS_CLASSES:
        raise UserError(
            f"{flag}: expected at most {MOST_AS_CLASSES} attributes, each once, got {text!r}"
        )
    labels = torch.zeros_like(attributes[names[0]], dtype=torch.int64)
    for name in names:
        labels = 2 * labels + attributes[name]
    words = itertools.product(*((f"not {name}", name) for name in names))
    return tuple(map(", ".join, words)), labels


def read_attributes(root: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """The attributes of image files in the table of their folder, in their order; {} without one.

    Its first column, ``file``, has their paths in the folder; every other is an attribute with the
    values 0 and 1.
    """
    table = root / TABLE
    if not table.is_file():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as text:
            header, *rows = csv.reader(text)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the attributes {table}: {error}") from error
    names = [name.strip() for name in header[1:]]
    broken = [name for name in names if not name or set(name) & set(RESERVED)]
    if header[:1] != ["file"] or not names or broken or len(set(names)) < len(names):
        raise UserError(
            f"{table}: expected the header file,NAME,... with names that differ and have none of "
            f"{' '.join(RESERVED)}, got {','.join(header)}"
        )
    values = values_by_file(table, len(names), rows)
    paths = [file.relative_to(root).as_posix() for file in files]
    if missing := [path for path in paths if path not in values]:
        raise UserError(f"{table}: expected a row for every image, got none for {listed(missing)}")
    if unknown := sorted(values.keys() - set(paths)):
        raise UserError(f"{table}: expected rows of images, got no image {listed(unknown)}")
    columns = torch.tensor([values[path] for path in paths], dtype=torch.bool).T
    return dict(zip(names, columns, strict=True))


def values_by_file(
    table: Path, attributes: int, rows: Sequence[Sequence[str]]
) -> dict[str, list[bool]]:
    values: dict[str, list[bool]] = {}
    for line, row in enumerate(rows, 2):
        if not row:
            continue
        path, *given = row
        has = [value.strip() for value in given]
        if path in values or len(has) != attributes or not set(has) <= {"0", "1"}:
            raise UserError(
                f"{table}, line {line}: expected a file without a row yet, and 0 or 1 for each of "
                f"{attributes} attributes, got {','.join(row)}"
            )
        values[path] = [value == "1" for value in has]
    return values
