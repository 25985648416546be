"""What all tables are made of. Rich is imported late, so that a program that shows nothing does not wait for it."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...reports import Identity, MoEQuickAnalysis, MoETypeAnalysis
from ...terms import Origin
from ..words import describe_family, format_confidence, identify

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

Options = Mapping[str, Any]
Fact = tuple["str | Text", "str | Text"]

ORIGIN_STYLES: dict[Origin, str] = {"UPCYCLED": "bold cyan", "NATIVE": "bold green", "UNDETERMINED": "bold yellow"}

# rich's options of columns that are not plain numbers
LEFT: Options = {"justify": "left"}
CUT: Options = {"justify": "left", "overflow": "ellipsis"}
WHOLE: Options = {"overflow": "ellipsis", "no_wrap": True}


def paint(text: str, style: str = "") -> "Text":
    """Text that is shown as it is, without markup."""
    from rich.text import Text

    return Text(text, style=style)


def paint_verdict(report: MoETypeAnalysis | MoEQuickAnalysis) -> "Text":
    """A verdict in its colour, with its confidence."""
    from rich.text import Text

    return Text.assemble((report.type, ORIGIN_STYLES[report.type]), format_confidence(report))


def stack(title: str, *blocks: "RenderableType") -> "Group":
    """A title, and below it tables and texts."""
    from rich.console import Group

    return Group(paint(title, "bold"), *blocks)


def identity_facts(report: Identity) -> list[Fact]:
    """Which model a report is about."""
    return [("Model", identify(report)), ("Family", describe_family(report))]


def draw_facts(facts: Iterable[Fact], notes: Iterable[str] = ()) -> "Table":
    """A name and its value on each line, then the notes."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in (*facts, *(("Note", note) for note in notes)):
        grid.add_row(_as_text(name, "dim"), _as_text(value))
    return grid


def draw_commands(commands: Iterable[str]) -> "Text":
    """What to run next, each command in one line, however long, so that it can be copied."""
    from rich.text import Text

    return Text("\n".join(["Next:", *(f"    {command}" for command in commands)]), no_wrap=True, overflow="ignore")


def draw_table(
    headings: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    columns: Mapping[str, Options] = MappingProxyType({}),
    footers: Sequence[str] = (),
    **options: Any,
) -> "Table":
    """A table of numbers; `columns` has rich's options for the other columns, by heading, `options` for the table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=bool(footers), **options)
    for heading, footer in zip_longest(headings, footers, fillvalue=""):
        of_column = {"justify": "right", "overflow": "fold", **columns.get(heading, {})}
        table.add_column(paint(heading), paint(footer), **of_column)
    for row in rows:
        table.add_row(*map(_as_text, row))
    return table


def _as_text(value: "str | Text", style: str = "") -> "Text":
    return paint(value, style) if isinstance(value, str) else value
