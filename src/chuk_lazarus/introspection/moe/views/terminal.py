"""A layer drawn with characters, for a terminal: the decay of its deltas, and how alike its experts are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from ..numerics.spectra import noise_decay
from ..reports import LayerAnalysis, Projection, Similarity
from ..text import whole_percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
HEIGHT = 8  # lines of a curve
NARROW, WIDE = 18, 36  # least and greatest width of a curve with its scale, in columns
GAP = 2  # columns between two curves
BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # bits of the dots in a character
STYLES = {"gate": "cyan", "up": "yellow", "down": "green"}


@dataclass(frozen=True, slots=True)
class LayerDrawing:
    """A layer's decay curves and cosines for `rich.print`, as wide as the terminal and legible without colour."""

    layer: LayerAnalysis

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        number, plain = self.layer.layer, options.ascii_only
        yield ""
        yield Text(f"SINGULAR VALUES OF THE DELTAS, LAYER {number}", style="bold")
        yield from _draw_decays(self.layer, options.max_width, plain)
        yield Text(
            "Line: over their root mean square, by rank; dots: of random numbers in that shape; "
            f"{'^' if plain else '┴'}: the 95 % rank",
            style="dim",
        )
        yield ""
        yield Text(f"COSINES BETWEEN THE DOWN PROJECTIONS, LAYER {number}", style="bold")
        yield from _draw_cosines(self.layer.similarity, options.max_width, plain)


def _draw_decays(layer: LayerAnalysis, width: int, plain: bool) -> Iterator[Text]:
    """A curve for each projection, all on one scale, as many side by side as fit."""
    projections = list(layer.projections.items())
    top = max(max(*projection.decay, *noise_decay(projection.shape)) for _, projection in projections)
    abreast = min(len(projections), max(1, (width + GAP) // (NARROW + GAP)))
    columns = min(WIDE, (width + GAP) // abreast - GAP)
    for start in range(0, len(projections), abreast):
        row = projections[start : start + abreast]
        curves = [_draw_decay(role, projection, columns, top, plain) for role, projection in row]
        yield from (Text(" " * GAP).join(lines) for lines in zip(*curves, strict=True))


def _draw_decay(role: str, projection: Projection, width: int, top: float, plain: bool) -> list[Text]:
    """Title, curve and axes of one projection, in lines of the same width."""
    scale = f"{top:.1f}"
    columns = width - len(scale) - 1
    down, across = (1, 1) if plain else BRAILLE.shape
    canvas = (HEIGHT * down, columns * across)
    curve = _trace(projection.decay, canvas, top)
    noise = _trace(noise_decay(projection.shape), canvas, top)
    noise[:, np.arange(canvas[1]) % 3 > 0] = False

    title = f"{role} {projection.rank['0.95']:.0f} ({whole_percent(projection.rank_ratio)})"
    lines = [Text(title.ljust(width), style=STYLES[role])]
    wall, corner, floor, marker = "|+-^" if plain else "│└─┴"
    for row in range(HEIGHT):
        label = {0: scale, HEIGHT - 1: "0.0"}.get(row, "")
        line = Text(f"{label:>{len(scale)}}{wall}")
        for column in range(columns):
            cell = np.s_[row * down : (row + 1) * down, column * across : (column + 1) * across]
            is_curve = bool(curve[cell].any())
            if plain:
                char = "*" if is_curve else "." if noise[cell].any() else " "
            else:
                bits = int(BRAILLE[curve[cell] | noise[cell]].sum())
                char = chr(0x2800 + bits) if bits else " "
            line.append(char, style=STYLES[role] if is_curve else "dim")
        lines.append(line)
    place = min(columns - 1, round(projection.rank_ratio * (columns - 1)))
    axis = (floor * place + marker).ljust(columns, floor)
    lines.append(Text(f"{'':{len(scale)}}{corner}{axis}"))
    lines.append(Text(f"{'':{len(scale)}} 1{projection.max_rank:>{columns - 1}}"))
    return lines


def _trace(values: Sequence[float], canvas: tuple[int, int], top: float) -> NDArray[np.bool_]:
    """Which dots of a canvas of [rows, columns] are on an unbroken line through the values; row 0 is at `top`."""
    rows, columns = canvas
    heights = np.interp(np.linspace(0, 1, columns), np.linspace(0, 1, len(values)), values)
    places = ((1 - heights / top) * (rows - 1)).round().astype(int)
    before = np.concatenate([places[:1], places[:-1]])
    first, last = np.where(before < places, before + 1, places), np.where(before > places, before - 1, places)
    row = np.arange(rows)[:, None]
    return np.asarray((first <= row) & (row <= last))


def _draw_cosines(similarity: Similarity, width: int, plain: bool) -> Iterator[Text]:
    """A row and a column for each expert: hundredths where numbers fit, otherwise shades."""
    experts = similarity.experts
    label = len(str(experts[-1])) + 1
    cosines = np.array(similarity.cosine)
    texts = [[str(round(100 * cosine)) for cosine in row] for row in cosines]
    cell = 1 + max(len(str(experts[-1])), *(len(text) for row in texts for text in row))
    if label + cell * len(experts) <= width:
        yield Text(" " * label + "".join(f"{expert:>{cell}}" for expert in experts), style="dim")
        for expert, row, values in zip(experts, texts, cosines, strict=True):
            line = Text(f"{expert:>{label}}", style="dim")
            for text, value in zip(row, values, strict=True):
                line.append(f"{text:>{cell}}", style=_paint(value))
            yield line
        yield Text("in hundredths", style="dim")
        return
    step = -(-len(experts) // (width - label - 1))
    shades = " .:+#" if plain else " ░▒▓█"
    for expert, values in zip(experts[::step], cosines[::step, ::step], strict=True):
        levels = (values.clip(0, 0.99) * len(shades)).astype(int)
        yield Text.assemble((f"{expert:>{label}} ", "dim"), "".join(shades[level] for level in levels))
    legend = ", ".join(f"{shade} from {place / len(shades):.1f}" for place, shade in enumerate(shades) if place)
    yield Text(f"{legend}" + (f"; every {step}th expert" if step > 1 else ""), style="dim")


def _paint(cosine: float) -> str:
    """The style of a cell: from dark blue (0 and below) through grey to yellow (1), with legible type."""
    share = min(1.0, max(0.0, cosine))
    red, green, blue = (round(low + share * (high - low)) for low, high in ((0, 253), (32, 232), (76, 70)))
    return f"{'#000000' if share > 0.44 else '#ffffff'} on rgb({red},{green},{blue})"
