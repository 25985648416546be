"""Numbers as text, and text as numbers: figures with their units, sizes, ranges of integers."""

import csv
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

from .errors import InvalidRequest


def format_ranges(numbers: Sequence[int]) -> str:
    """Integers as short text: [0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)


def format_numbers(numbers: Sequence[int]) -> str:
    """As `format_ranges`, shortened where there are many: "0, 2, 4, ...\"."""
    return _shorten(format_ranges(numbers).split(", "), ", ")


def format_groups(groups: Sequence[Sequence[int]]) -> str:
    """For instance "0-3; 4-7; 8-11; ...", or "that are 8 apart" if eight groups are interleaved."""
    step, total = len(groups), sum(map(len, groups))
    if step < total and all([*group] == [*range(i, total, step)] for i, group in enumerate(groups)):
        return f"that are {step} apart"
    return _shorten([format_numbers(group) for group in groups], "; ")


def _shorten(names: Sequence[str], separator: str) -> str:
    """Up to four names, or three and dots."""
    return separator.join(names if len(names) <= 4 else [*names[:3], "..."])


def percent(share: float) -> str:
    """For instance "48.9 %"."""
    return f"{100 * share:.1f} %"


def whole_percent(share: float) -> str:
    """For instance "49 %"."""
    return f"{100 * share:.0f} %"


def format_count(number: float) -> str:
    """A number with three digits or so and a unit: 46.7 B, 805 M, 12.3 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number:,.0f}"


def format_bytes(count: float) -> str:
    """For instance "1.2 GB"; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """A time in its largest unit: 0.4 s, 12 s, 3 min, 5.9 h, 11 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV, by RFC 4180 except for the line ends; None is an empty field."""
    file = StringIO()
    writer = csv.DictWriter(file, rows[0] if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def format_markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Container[str]) -> str:
    """A table in Markdown; headings in `left` are of text columns, the others of numbers. Special characters in cells
    are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def escape(cell: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", cell)

    dashes = ["---" if heading in left else "---:" for heading in headings]
    return line(headings) + line(dashes) + "".join(line(map(escape, row)) for row in rows)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, what: str) -> int:
    """A number of bytes, written like 500MB or 20GB; raises InvalidRequest that names `what` it is."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise InvalidRequest(f"{what} is {text!r}, which is not a size", "write it like 500MB or 20GB")
    return int(float(match[1]) * _UNITS[match[2]])
