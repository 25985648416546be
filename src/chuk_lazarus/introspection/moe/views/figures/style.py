"""How all figures look, and how they become files.

Colours are those of Okabe and Ito and matplotlib's cividis, which colour-blind readers can tell apart; lines differ by
dash or marker, too. Figures are made without pyplot, so any thread can make them, and a notebook shows them as is.
"""

import hashlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from math import ceil
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

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
GREY, DARK = "#767676", "#404040"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = [(COLORS[i % 7], ("-", "--", "-.", ":")[i % 4], "os^DvPX*"[i % 8]) for i in range(56)]  # no two alike
ROLE_STYLES = dict(zip(ROLES, STYLES, strict=False))
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": DARK,
    "ytick.color": DARK,
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


@contextmanager
def styled() -> Iterator[None]:
    """Our style alone, in one thread at a time, since matplotlib's settings belong to the process."""
    from matplotlib import style

    with _lock, style.context(["default", STYLE]):
        yield


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as .png, .svg or .pdf, whole or not at all; the same figure gives the same bytes.

    Raises InvalidRequest for another ending and where nothing can be written.
    """
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


def to_svg(figure: "Figure") -> str:
    """A figure as one `<svg>` element, for a page or a file: text as text, and no reference to other files.

    Ids begin with a digest of the figure, so that those of several figures on a page do not clash.
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
    # matplotlib sets these two in a style sheet for "*", which would hold for the whole page
    root.attrib |= {"xmlns": SVG, "xmlns:xlink": XLINK, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


@styled()
def _render(figure: "Figure", kind: str, metadata: Mapping[str, None]) -> bytes:
    """The figure's file, without the metadata that would change from one run to the next."""
    file = BytesIO()
    figure.savefig(file, format=kind, metadata=dict(metadata))
    return file.getvalue()


def new_figure(height: float, title: str) -> "Figure":
    """A figure whose panels get `height` inches; the title is added to that here, the caption by `finish`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    wrapped = wrap(title, WIDTH - 2 * PAD, 11)
    height += wrapped.count("\n") * 1.2 * 11 / 72
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))
    figure.suptitle(wrapped, x=PAD / WIDTH, ha="left", fontsize=11, fontweight="bold")
    figure._repr_svg_ = partial(to_svg, figure)  # type: ignore[attr-defined]  # what a notebook calls
    return figure


def finish(figure: "Figure", text: str, source: Sequence[str], command: str | None) -> "Figure":
    """The figure with its caption: what it shows, of which model and layers, and the command that made it."""
    from matplotlib.axes import Axes

    caption = wrap("\n".join([text, *source, *([command] if command else [])]), WIDTH - 2 * PAD)
    lines = caption.count("\n") + 1
    figure.supxlabel(caption, x=PAD / WIDTH, ha="left", fontsize=SMALL, color=DARK, linespacing=1.3)
    figure.set_figheight(figure.get_figheight() + lines * 1.3 * SMALL / 72)
    for ax in figure.findobj(Axes):
        ax.tick_params(labelsize=SMALL)  # the number of ticks must not depend on the program that draws it
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a second layout would move everything by a hair
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


def add_panels(figure: "Figure", place: Any, count: int) -> list["Axes"]:
    """`count` panels side by side in a place of the figure's grid."""
    grid = place.subgridspec(1, count)
    return [figure.add_subplot(grid[0, i]) for i in range(count)]
