"""How all figures look, and how they become files.

Colours are those of Okabe and Ito and matplotlib's cividis, which colour-blind readers can tell apart; lines differ by
dash or marker, too. Figures are made without pyplot, so any thread can make them, and a notebook shows them as is.
"""

import hashlib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial, wraps
from io import BytesIO
from math import ceil
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar, cast
from xml.etree import ElementTree

import numpy as np

from ...errors import InvalidRequest, printable
from ...files import write_file
from ...terms import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
WIDTH = 7.5  # inches: the width of a page, so that type is printed at its nominal size
PAD = 0.08  # inches around panels
SMALL = 8  # points, the smallest type


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of text and axes, of what is beside the point (`grey`), of grid lines, of the ground, and of lines.

    No two are the same, so that a page can put others in their place.
    """

    ink: str
    dark: str
    grey: str
    edge: str
    grid: str
    ground: str
    colors: tuple[str, ...]

    @property
    def styles(self) -> list[tuple[str, str, str]]:
        """Colour, dash and marker of 56 lines, no two alike."""
        return [(self.colors[i % 7], ("-", "--", "-.", ":")[i % 4], "os^DvPX*"[i % 8]) for i in range(56)]

    @property
    def role_styles(self) -> dict[str, tuple[str, str, str]]:
        """Those of the three projections."""
        return dict(zip(ROLES, self.styles, strict=False))

    @property
    def named(self) -> dict[str, str]:
        """Each colour by a name of its own."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "colors"}
        return plain | {f"line-{number}": color for number, color in enumerate(self.colors)}


LIGHT = Palette(
    ink="#1a1b1d",
    dark="#404040",
    grey="#767676",
    edge="#777777",
    grid="#e4e4e4",
    ground="#ffffff",
    colors=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"),
)
DARK = Palette(
    ink="#e6e6e3",
    dark="#c4c4c0",
    grey="#9a9a97",
    edge="#8a8a88",
    grid="#34373b",
    ground="#17191c",
    colors=("#4fa8e0", "#f28a4b", "#2fc496", "#e0a0c6", "#9ad6f8", "#f3c04f", "#f6f6f4"),
)
_palette: ContextVar[Palette] = ContextVar("palette", default=LIGHT)


def palette() -> Palette:
    """The colours of the figure that is being drawn."""
    return _palette.get()


STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.edgecolor": "none",
    "legend.handletextpad": 0.5,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a model's name may have dollars
    "svg.fonttype": "none",  # text stays text: it can be found, copied and read aloud
    "svg.hashsalt": "chuk-lazarus",
    "pdf.fonttype": 42,
}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

_lock = RLock()

Plot = TypeVar("Plot", bound=Callable[..., Any])


def _colors(chosen: Palette) -> dict[str, str]:
    """Matplotlib's settings of a palette."""
    return {
        "text.color": chosen.ink,
        "axes.labelcolor": chosen.ink,
        "axes.titlecolor": chosen.ink,
        "axes.edgecolor": chosen.edge,
        "xtick.color": chosen.dark,
        "ytick.color": chosen.dark,
        "grid.color": chosen.grid,
        "figure.facecolor": chosen.ground,
        "axes.facecolor": chosen.ground,
        "legend.facecolor": chosen.ground,
        "savefig.facecolor": "auto",
    }


@contextmanager
def styled(dark: bool = False) -> Iterator[None]:
    """Our style alone, in one thread at a time, since matplotlib's settings belong to the process."""
    from matplotlib import style

    chosen = DARK if dark else LIGHT
    with _lock, style.context(["default", STYLE, _colors(chosen)]):
        token = _palette.set(chosen)
        try:
            yield
        finally:
            _palette.reset(token)


def needs_style(plot: Plot) -> Plot:
    """Let a function draw in our style, dark where its argument `dark` says so."""

    @wraps(plot)
    def drawn(*arguments: Any, **options: Any) -> Any:
        with styled(bool(options.get("dark"))):
            return plot(*arguments, **options)

    return cast(Plot, drawn)


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all; the same figure gives the same bytes.

    Raises InvalidRequest for anything but a figure, for another ending and where nothing can be written.
    """
    from matplotlib.figure import Figure as AnyFigure

    if not isinstance(figure, AnyFigure):
        raise InvalidRequest(f"{type(figure).__name__} is no Figure of matplotlib", "give what report.plot() returns")
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InvalidRequest(f"a figure can't be written as '{path.name}'", "end its name in .png, .svg or .pdf")
    if ending == ".svg":
        data = to_svg(figure).encode()
    else:
        data = _render(figure, ending[1:], {"Software": None} if ending == ".png" else {"CreationDate": None})
    try:
        write_file(path, data)
    except OSError as error:
        raise InvalidRequest(f"can't write '{path}': {error.strerror}") from None


def to_svg(figure: "Figure", themed: bool = False) -> str:
    """A figure as one `<svg>` element, for a page or a file: text as text, and no reference to other files.

    Ids begin with a digest of the figure, so that those of several figures on a page do not clash. The colours of a
    `themed` one, which must be a light figure, are those of the page's `theme`.
    """
    file = _render(figure, "svg", dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file)
    prefix = f"f{hashlib.sha256(file).hexdigest()[:8]}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    references = {reference for value in values for reference in re.findall(r"#([\w-]+)", value)}
    ids = {element.get("id") for element in root.iter()} & references
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        attributes = {name.replace(f"{{{XLINK}}}", "xlink:"): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                if value in ids:
                    element.set("id", prefix + value)
            else:
                element.set(name, re.sub(r"#([\w-]+)", lambda m: f"#{prefix * (m[1] in ids)}{m[1]}", value))
        if themed and (look := element.get("style")):
            element.set("style", re.sub(r"#[0-9a-f]{6}\b", _as_variable, look))
    # matplotlib sets these two in a style sheet for "*", which would hold for the whole page
    root.attrib |= {"xmlns": SVG, "xmlns:xlink": XLINK, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


def _as_variable(color: re.Match[str]) -> str:
    """The variable of a page that has this colour; other colours as they are."""
    named = {value: f"var(--{name})" for name, value in LIGHT.named.items()}
    return named.get(color[0], color[0])


def theme(chosen: Palette) -> str:
    """The declarations of a page's style sheet that give `themed` figures these colours."""
    return " ".join(f"--{name}: {color};" for name, color in chosen.named.items())


@styled()
def _render(figure: "Figure", kind: str, metadata: Mapping[str, None]) -> bytes:
    """The figure's file, without the metadata that would change from one run to the next."""
    file = BytesIO()
    figure.savefig(file, format=kind, metadata=dict(metadata))
    return file.getvalue()


def new_figure(height: float, title: str = "", width: float = WIDTH) -> "Figure":
    """A figure whose panels get `height` inches; the title is added to that here, the caption by `finish`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    wrapped = wrap(title, width - 2 * PAD, 11)
    height += wrapped.count("\n") * 1.2 * 11 / 72
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))
    if wrapped:
        figure.suptitle(wrapped, x=PAD / width, ha="left", fontsize=11, fontweight="bold")
    figure._repr_svg_ = partial(to_svg, figure)  # type: ignore[attr-defined]  # what a notebook calls
    return figure


def finish(figure: "Figure", caption: Sequence[str] = ()) -> "Figure":
    """The figure, laid out, with its caption below."""
    width = figure.get_figwidth()
    if caption:
        text = wrap("\n".join(caption), width - 2 * PAD)
        lines = text.count("\n") + 1
        figure.supxlabel(text, x=PAD / width, ha="left", fontsize=SMALL, color=palette().dark, linespacing=1.3)
        figure.set_figheight(figure.get_figheight() + lines * 1.3 * SMALL / 72)
    for ax in (one for panel in figure.axes for one in (panel, *panel.child_axes)):
        ax.tick_params(labelsize=SMALL)  # the number of ticks must not depend on the program that draws it
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine(None)  # another layout would move everything by a hair, and take another drawing
    return figure


def wrap(text: str, inches: float, points: float = SMALL) -> str:
    """The text in lines that fit, even where it has no blanks; characters that the font lacks are escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points, weight="bold" if points > SMALL else "normal")
    known = get_font(findfont(font)).get_char_index

    def width(line: str) -> float:
        # 10 % more than is measured: at 100 dots per inch, each letter is a whole number of dots wide
        return 1.1 / 72 * float(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0])

    lines = []
    for paragraph in text.split("\n"):
        escaped = "".join(c if known(ord(c)) else c.encode("unicode_escape").decode() for c in printable(paragraph))
        broken, most = [escaped], len(escaped)
        while (widest := max(map(width, broken), default=0.0)) > inches and most > 1:
            most = min(most - 1, ceil(most * inches / widest))
            broken = textwrap.wrap(escaped, most, break_on_hyphens=False)
        lines += broken
    return "\n".join(lines)


def format_share(value: float, _place: object = None) -> str:
    """A tick of a scale of shares: "0.5 %"."""
    return f"{100 * value:.4g} %"


def given_panels(ax: Any, count: int) -> "list[Axes]":
    """The panels that a caller gives to draw on: one, for the panel that decides, or all `count`.

    Raises InvalidRequest for another number, and for what is no Axes.
    """
    from matplotlib.axes import Axes

    panels = list(np.ravel(np.asarray(ax, dtype=object)))
    if not all(isinstance(panel, Axes) for panel in panels):
        raise InvalidRequest(
            f"ax is {type(ax).__name__}, and no Axes of matplotlib", "give what plt.subplots() returns"
        )
    if len(panels) not in (1, count):
        many = f"1 or {count}" if count > 1 else "1"
        raise InvalidRequest(f"there are {len(panels)} axes, and the figure has {count} panels", f"give {many}")
    return panels


def figure_of(panels: "Sequence[Axes]") -> "Figure":
    """The figure that panels are in."""
    figure: Any = panels[0].figure
    return cast("Figure", figure)


def add_panels(figure: "Figure", place: Any, count: int) -> list["Axes"]:
    """`count` panels side by side in a place of the figure's grid."""
    grid = place.subgridspec(1, count)
    return [figure.add_subplot(grid[0, i]) for i in range(count)]
