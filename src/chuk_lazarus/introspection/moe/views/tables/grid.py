"""What all tables are made of. Rich is imported late, so that a program that shows nothing does not wait for it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...reports import Identity, MoEQuickAnalysis, MoETypeAnalysis
from ...terms import Origin
from ..words import describe_family, format_confidence, identify

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

Options = Mapping[str, Any]
Fact = tuple["str | Text", "str | Text"]

ORIGIN_STYLES: dict[Origin, str] = {"UPCYCLED": "bold cyan", "NATIVE": "bold green", "UNDETERMINED": "bold yellow"}

# how a column stands that is not of numbers; `wraps` allows lines to end between words, all else is in one piece
LEFT: Options = {"justify": "left"}
WORDS: Options = {"justify": "left", "wraps": True}

WIDE, NARROW = 3, 2  # columns of the terminal between two columns of a table
LONG_WORD = 16  # from which length on a word may be broken after a hyphen and the like
LONGEST_PIECE = 20  # a piece of a word longer than that is broken anywhere

# a number stays with its unit, and an expert with its figure
WORD = re.compile(r"#\d+ \d+,?|\S+(?:(?: (?=[%±]|[kMGT]?B?\b(?!\w))|(?<=±) )\S+)*")
PIECE = re.compile(r"[^-/_.:]*[-/_.:]*")


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


@dataclass(frozen=True, slots=True)
class Facts:
    """A name and its value on each line, for `rich.print`, wrapped between words to the width of the terminal."""

    facts: Sequence[Fact]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table

        names = [_as_text(name, "dim") for name, _ in self.facts]
        room = max(1, options.max_width - max((name.cell_len for name in names), default=0) - 2)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, (_, value) in zip(names, self.facts, strict=True):
            grid.add_row(name, wrap(_as_text(value), room))
        yield grid


def draw_facts(facts: Iterable[Fact], notes: Iterable[str] = ()) -> Facts:
    """A name and its value on each line, then the notes."""
    return Facts([*facts, *(("Note", note) for note in notes)])


def draw_note(text: str) -> "RenderableType":
    """A pale text of its own, as wide as the terminal."""
    return paint(text, "dim")


def wrap(text: "Text", width: int) -> "Text":
    """The text in lines of at most so many columns: they end between words, or in those that are too long for a line
    after a hyphen, a slash and the like."""
    from rich.text import Text

    lines = []
    for line in text.split("\n", allow_blank=True):
        for part in line.divide(_breaks(line.plain, width)):
            part.rstrip()
            lines.append(part)
    return Text("\n").join(lines)


def _breaks(line: str, width: int) -> list[int]:
    """Where lines begin but the first."""
    from rich.cells import cell_len

    breaks, start = [], 0
    for word in WORD.finditer(line):
        for piece in _pieces(word[0], width):
            end = word.start() + piece.end()
            if cell_len(line[start:end]) > width and word.start() + piece.start() > start:
                start = word.start() + piece.start()
                breaks.append(start)
            while cell_len(line[start:end]) > width > 1:
                fits = end - start
                while cell_len(line[start : start + fits]) > width:
                    fits -= 1
                start += fits
                breaks.append(start)
    return breaks


def _pieces(word: str, width: int) -> "Iterable[re.Match[str]]":
    """The parts of a word between which a line may end: the whole word, if it fits into a line."""
    from rich.cells import cell_len

    return re.finditer(r".+" if cell_len(word) <= width else PIECE, word)


def draw_commands(commands: Iterable[str]) -> "Text":
    """What to run next, each command in one line, however long, so that it can be copied."""
    from rich.text import Text

    return Text("\n".join(["Next:", *(f"    {command}" for command in commands)]), no_wrap=True, overflow="ignore")


@dataclass(frozen=True, slots=True)
class Grid:
    """A table for `rich.print`, laid out for the width of the terminal: no number is broken and nothing is cut off.

    Where there is no room for all columns, those named in `leave` are left out, in that order, and a line says so; what
    is still too wide goes on in a further table with the same first column.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence["str | Text"]]
    columns: Mapping[str, Options]
    footers: Sequence[str]
    leave: Sequence[str]
    title: str
    caption: str

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        shown, width = list(range(len(self.headings))), options.max_width
        left_out = []
        for heading in self.leave:
            if self._least(shown) > width and heading in self.headings:
                shown.remove(self.headings.index(heading))
                left_out.append(heading)
        if self.title:
            yield wrap(paint(self.title, "italic"), width)
        for part in self._parts(shown, width):
            yield self._draw(part, width)
        if self.caption:
            yield wrap(paint(self.caption, "dim"), width)
        if left_out:
            yield wrap(paint(f"No room for {', '.join(left_out)}: widen the terminal, or use --json.", "dim"), width)

    def _cells(self, place: int) -> "Iterator[str]":
        for row in self.rows:
            yield str(row[place])
        if self.footers:
            yield self.footers[place]

    def _range(self, place: int) -> tuple[int, int]:
        """The least and the best width of a column."""
        from rich.cells import cell_len

        heading = self.headings[place]
        of_cells = max((cell_len(line) for cell in self._cells(place) for line in cell.split("\n")), default=0)
        most = max(of_cells, cell_len(heading))
        if self.columns.get(heading, {}).get("wraps"):
            of_cells = max(map(_longest, self._cells(place)), default=0)
        return max(of_cells, _longest(heading)), most

    def _least(self, shown: Sequence[int]) -> int:
        """The width of a table of these columns that is as narrow as it may be."""
        return 2 + sum(self._range(place)[0] for place in shown) + NARROW * (len(shown) - 1)

    def _parts(self, shown: Sequence[int], width: int) -> "Iterator[Sequence[int]]":
        """The columns of each of the tables, mostly one, into which these go."""
        part = list(shown[:1])
        for place in shown[1:]:
            if self._least([*part, place]) > width and len(part) > 1:
                yield part
                part = list(shown[:1])
            part.append(place)
        yield part

    def _draw(self, shown: Sequence[int], width: int) -> "Table":
        """One table, with the wide gap if that leaves all columns their best width."""
        from rich import box
        from rich.table import Table

        ranges = [self._range(place) for place in shown]
        gaps = len(shown) - 1
        is_wide = 2 + sum(most for _, most in ranges) + WIDE * gaps <= width
        sizes = [most for _, most in ranges]
        while sum(sizes) + 2 + NARROW * gaps > width:
            wider = [i for i, (least, _) in enumerate(ranges) if sizes[i] > least]
            if not wider:
                break
            sizes[max(wider, key=sizes.__getitem__)] -= 1
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=bool(self.footers), collapse_padding=not is_wide)
        for size, place in zip(sizes, shown, strict=True):
            heading = self.headings[place]
            justify = self.columns.get(heading, {}).get("justify", "right")
            footer = paint(self.footers[place] if self.footers else "")
            table.add_column(wrap(paint(heading), size), footer, justify=justify, overflow="fold", width=size)
        for row in self.rows:
            table.add_row(*(wrap(_as_text(row[place]), size) for size, place in zip(sizes, shown, strict=True)))
        return table


def draw_table(
    headings: Sequence[str],
    rows: Iterable[Sequence["str | Text"]],
    columns: Mapping[str, Options] = MappingProxyType({}),
    footers: Sequence[str] = (),
    leave: Sequence[str] = (),
    title: str = "",
    caption: str = "",
) -> Grid:
    """A table of numbers; `columns` says how the other columns stand, by heading, `leave` which ones make room."""
    return Grid(headings, list(rows), columns, footers, leave, title, caption)


def _longest(text: str) -> int:
    """The columns of the longest part of a text that stays together."""
    from rich.cells import cell_len

    pieces = (piece[0] for word in WORD.findall(text) for piece in _pieces(word, LONG_WORD))
    return max((min(cell_len(piece), LONGEST_PIECE) for piece in pieces), default=0)


def _as_text(value: "str | Text", style: str = "") -> "Text":
    return paint(value, style) if isinstance(value, str) else value
