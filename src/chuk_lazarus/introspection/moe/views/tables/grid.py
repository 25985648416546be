"""What all tables are made of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...reports import Identity, LayerLayout
from ...text import format_ranges

if TYPE_CHECKING:
    from rich.table import Table


def fact_grid(rows: Sequence[tuple[str, Any]]) -> "Table":
    """A key and its value on each line."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(Text(key, style="dim"), value if isinstance(value, Text) else Text(str(value)))
    return grid


VERDICT_STYLES = {"UPCYCLED": "bold cyan", "NATIVE": "bold green", "UNDETERMINED": "bold yellow"}


def heading_blocks(title: str, report: Identity, *rows: tuple[str, Any]) -> list[Any]:
    """A title, and below it which model the report is about."""
    from rich.text import Text

    name = report.model + (f" @ {report.revision[:12]}" if report.revision else "")
    kind = f"{report.family} ({report.model_type or 'unknown type'}, {report.experts} experts, {report.storage})"
    return [Text(title, style="bold"), fact_grid([("Model", name), ("Family", kind), *rows])]


def number_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    """A table of numbers, all columns to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def count_things(number: int, thing: str) -> str:
    """For instance "1 layer" or "3 layers"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def name_layers(layers: Sequence[LayerLayout]) -> str:
    """For instance "layer 3" or "layers 0-2, 5"."""
    return f"layer{'' if len(layers) == 1 else 's'} {format_ranges([layer.layer for layer in layers])}"
