"""How all figures look, and how they become files.

Colours are those of Okabe and Ito and matplotlib's cividis, which the colour-blind tell apart; lines differ by dash or
marker, too. Figures are made without pyplot, so in any thread, and a notebook shows them as they are.
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
from ...text import format_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
WIDTH = 7.5  # inches: a page's, so that type is printed in its own size
PAD = 0.08  # inches around panels
SMALL = 8  # points, the smallest type
GREY, DARK = "#767676", "#404040"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = [(COLORS[i % 7], ("-", "--", "-.", ":")[i % 4], "os^DvPX*"[i % 8]) for i in range(56)]  # no two alike
ROLE_STYLES = dict(zip(("gate", "up", "down"), STYLES, strict=False))
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
    """Our style and nobody else's; one thread at a time, since matplotlib's settings belong to the process."""
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
        raise InvalidRequest(f"a figure can't be written as {path.name!r}", "end its name in .png, .svg or .pdf")
    if ending == ".svg":
        data = to_svg(figure).encode()
    else:
        data = _render(figure, ending[1:], {"Software": None} if ending == ".png" else {"CreationDate": None})
    try:
        write_file(path, data)
    except OSError as error:
        raise InvalidRequest(f"can't write {str(path)!r}: {error.strerror}") from None


def to_svg(figure: "Figure") -> str:
    """A figure as one `<svg>` element, for a page or a file of its own: text as text, nothing from elsewhere.

    Ids begin with a digest of the figure, so that several figures on a page don't meet.
    """
    drawn = _render(figure, "svg", dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(drawn)
    prefix = f"f{hashlib.sha256(drawn).hexdigest()[:8]}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {found for one in root.iter() for value in one.attrib.values() for found in re.findall(r"#([\w-]+)", value)}
    known = {one.get("id") for one in root.iter()} & used
    for one in root.iter():
        one.tag = one.tag.split("}")[-1]
        attributes = {name.replace(f"{{{XLINK}}}", "xlink:"): value for name, value in one.attrib.items()}
        one.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                if value in known:
                    one.set("id", prefix + value)
            else:
                one.set(name, re.sub(r"#([\w-]+)", lambda m: f"#{prefix * (m[1] in known)}{m[1]}", value))
    # what matplotlib says in a style sheet for "*", which would hold for the whole page
    root.attrib |= {"xmlns": SVG, "xmlns:xlink": XLINK, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, encoding="unicode")


@styled()
def _render(figure: "Figure", kind: str, metadata: Mapping[str, None]) -> bytes:
    """The figure's file, without the metadata that would change from one run to the next."""
    file = BytesIO()
    figure.savefig(file, format=kind, metadata=dict(metadata))
    return file.getvalue()


def new_figure(height: float, title: str) -> "Figure":
    """A figure with so many inches for its panels, beside title and caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = wrap(title, WIDTH - 2 * PAD, 11)
    height += shown.count("\n") * 1.2 * 11 / 72
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD))
    figure.suptitle(shown, x=PAD / WIDTH, ha="left", fontsize=11, fontweight="bold")
    figure._repr_svg_ = partial(to_svg, figure)  # type: ignore[attr-defined]  # what a notebook asks for
    return figure


def finish(figure: "Figure", text: str, source: Sequence[str], command: str | None) -> "Figure":
    """The figure with its caption: what is to be seen, of which model and layers, by which command."""
    from matplotlib.axes import Axes

    caption = wrap("\n".join([text, *source, *([command] if command else [])]), WIDTH - 2 * PAD)
    lines = caption.count("\n") + 1
    figure.supxlabel(caption, x=PAD / WIDTH, ha="left", fontsize=SMALL, color=DARK, linespacing=1.3)
    figure.set_figheight(figure.get_figheight() + lines * 1.3 * SMALL / 72)
    for ax in figure.findobj(Axes):
        ax.tick_params(labelsize=SMALL)  # how many numbers an axis gets must not depend on whoever draws it
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once for all: again, it would move by a hair
    return figure


def wrap(text: str, inches: float, points: float = SMALL) -> str:
    """The text in lines that fit, also where it has no blanks; what the font can't show is escaped."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points, weight="bold" if points > SMALL else "normal")
    known = get_font(findfont(font)).get_char_index

    def width(line: str) -> float:
        # more than is measured: at 100 dots per inch, letters are made whole dots wide
        return 1.1 / 72 * float(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0])

    lines = []
    for paragraph in text.split("\n"):
        shown = "".join(c if known(ord(c)) else c.encode("unicode_escape").decode() for c in printable(paragraph))
        broken, most = [shown], len(shown)
        while (widest := max(map(width, broken), default=0.0)) > inches and most > 1:
            most = min(most - 1, ceil(most * inches / widest))
            broken = textwrap.wrap(shown, most, break_on_hyphens=False)
        lines += broken
    return "\n".join(lines)


def name_layers(numbers: Sequence[int]) -> str:
    """For instance "layer 3" or "layers 0-2, 5"."""
    return f"layer{'' if len(numbers) == 1 else 's'} {format_ranges(numbers)}"


def format_share(value: float, _place: object = None) -> str:
    """A tick of a scale of shares: "0.5 %"."""
    return f"{100 * value:.4g} %"


def panels(figure: "Figure", place: Any, panels: int) -> list["Axes"]:
    """So many panels side by side in a place of the figure's grid."""
    grid = place.subgridspec(1, panels)
    return [figure.add_subplot(grid[0, i]) for i in range(panels)]
