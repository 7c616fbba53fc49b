"""Tables of numbers, as Markdown that a terminal shows well too."""

from collections.abc import Iterable, Iterator, Sequence

CONFIDENCE = 0.95  # of every interval


def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as a Markdown table: the first column to the left, numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = rows
    yield line(header, widths)
    yield "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    for row in body:
        yield line(row, widths)


def table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(aligned(list(rows)))


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"
