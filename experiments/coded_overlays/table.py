"""The tables and the figure of results.json.

    python experiments/coded_overlays/table.py        # prints the tables, writes comparison.svg

A cell is another method's KL over ours. Of a method's rows those within 8 % of the budget count, and of these the one
of the least KL; where there is none, the nearest. Ours is taken
at the bits of that row.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from models import MODELS, NATIVES
from run import OURS, PEERS

from chuk_lazarus.introspection.moe.views.figures import style

HERE = Path(__file__).resolve().parent
CALIBRATED = ("GPTQ", "REAP", "HC-SMoE")
WITHIN = 0.08
SHOWN = (
    "copies, cosine 0.97",
    "shuffled copies",
    "copies + noise",
    "half re-initialised",
    "copies, E = 64",
    "native",
)
LEAST, MOST = 1.35, 3.6  # bits that the figure shows

Row = dict[str, Any]


def rows_of(rows: Iterable[Row], model: str, method: str) -> list[Row]:
    return [row for row in rows if row["model"] == model and row["method"] == method]


def at_budget(rows: list[Row], budget: float) -> Row | None:
    if not rows:
        return None
    near = [row for row in rows if abs(row["bits"] / budget - 1) <= WITHIN]
    return min(near, key=lambda row: row["kl"]) if near else min(rows, key=lambda row: abs(row["bits"] - budget))


def at_bits(rows: list[Row], bits: float) -> Row | None:
    """Our KL at so many bits, with its standard error: the logarithm is interpolated between the neighbouring rows."""
    rows = sorted(rows, key=lambda row: row["bits"])
    for lower, upper in pairwise(rows):
        if lower["bits"] <= bits <= upper["bits"] and lower["bits"] < upper["bits"]:
            share = (bits - lower["bits"]) / (upper["bits"] - lower["bits"])
            kl = math.exp((1 - share) * math.log(lower["kl"]) + share * math.log(upper["kl"]))
            return {"bits": bits, "kl": kl, "kl_stderr": kl * lower["kl_stderr"] / lower["kl"]}
    return None


def compare(rows: list[Row], model: str, method: str, budget: float) -> tuple[Row, Row] | None:
    """A row of another method and ours at its bytes."""
    theirs = at_budget(rows_of(rows, model, method), budget)
    own = at_bits(rows_of(rows, model, "overlay"), theirs["bits"]) if theirs else None
    return (theirs, own) if theirs and own else None


def verdict(theirs: Row, own: Row) -> float:
    """By how many standard errors theirs is worse, as if the two were independent."""
    return (theirs["kl"] - own["kl"]) / math.hypot(theirs["kl_stderr"], own["kl_stderr"])


def print_table(rows: list[Row], budget: float, methods: Sequence[str]) -> None:
    print(f"\n| at {budget} bits | our KL | {' | '.join(methods)} |")
    print("|---" * (len(methods) + 2) + "|")
    for model in MODELS:
        own = at_bits(rows_of(rows, model, "overlay"), budget)
        if own is None:
            continue
        cells = []
        for method in methods:
            pair = compare(rows, model, method, budget)
            if pair is None:
                cells.append("")
                continue
            theirs, ours = pair
            ratio = theirs["kl"] / ours["kl"]
            text = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
            if abs(theirs["bits"] / budget - 1) > WITHIN:
                text += f" ({theirs['bits']:.2g})"
            cells.append(f"**{text}**" if verdict(theirs, ours) < -2 else text)
        print(f"| {model} | {own['kl']:.2g} ± {own['kl_stderr']:.1g} | {' | '.join(cells)} |")


def print_losses(rows: list[Row], ours: str) -> None:
    """Every row of another method that is better than ours at its bytes, or no worse than by chance."""
    print(f"\nWhere ours ({ours}) is not better by two standard errors:\n")
    print("| model | method | setting | bits | KL | our bits | our KL | standard errors |")
    print("|---|---|---|---|---|---|---|---|")
    counts: dict[tuple[bool, bool], list[int]] = {}
    for model in MODELS:
        for method in PEERS:
            for theirs in rows_of(rows, model, method):
                own = at_bits(rows_of(rows, model, ours), theirs["bits"])
                if own is None:
                    continue
                count = counts.setdefault((model in NATIVES, method in CALIBRATED), [0, 0, 0])
                distance = verdict(theirs, own)
                count[0 if distance > 2 else 1 if distance > -2 else 2] += 1
                if distance <= 2:
                    print(
                        f"| {model} | {method} | {theirs['variant']} {theirs['setting'][:60]} | {theirs['bits']:.2f} "
                        f"| {theirs['kl']:.4f} | {own['bits']:.2f} | {own['kl']:.4f} | {distance:+.1f} |"
                    )
    for (is_native, is_calibrated), (better, same, worse) in counts.items():
        kind = ("native" if is_native else "upcycled") + (", calibrated" if is_calibrated else ", data-free")
        print(f"\n{kind}: ours is better in {better}, the same within two standard errors in {same}, worse in {worse}")


# ---------------------------------------------------------------------------------------------------------------------
# Figure


def draw(rows: list[Row], path: Path) -> None:
    with style.styled():
        figure = style.new_figure(9.0, "What a byte buys: coded overlays, plain codes, and other methods")
        shown = [model for model in SHOWN if rows_of(rows, model, "overlay")]
        grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False)
        for ax, model in zip(grid.flat, shown, strict=False):
            draw_panel(ax, rows, model)
        for ax in grid.flat[len(shown) :]:
            ax.set_visible(False)
        for ax in grid.flat[: len(shown)][-2:]:
            ax.set_xlabel("bits per weight of the experts, everything counted")
        for ax in grid[:, 0]:
            ax.set_ylabel("KL from the original, nats per token")
        text = (
            "Lower is better. Grey: other methods without data, each near 1.6, 2.1 and 3.1 bits; dotted: calibrated "
            "on text. One checkpoint each, 8,192 held-out tokens; standard errors are 3 to 5 % of a value."
        )
        style.finish(figure, [text])
        style.save(figure, path)


def draw_panel(ax: Any, rows: list[Row], model: str) -> None:
    labels: list[tuple[float, str, str]] = []
    for method in PEERS:
        curve = lower_curve(rows_of(rows, model, method))
        if not curve:
            continue
        line = ":" if method in CALIBRATED else "-"
        bits, kl = zip(*curve, strict=True)
        ax.plot(bits, kl, line, color="#9A9A9A", linewidth=0.9, marker="o", markersize=2.2)
        labels.append((kl[-1], method, style.LIGHT.grey))
        ax.plot([bits[-1], MOST + 0.04], [kl[-1], kl[-1]], color="#D8D8D8", linewidth=0.5, zorder=0)
    for method, color, name in (
        ("plain", style.LIGHT.colors[1], "plain codes"),
        ("overlay", style.LIGHT.colors[0], "overlay"),
        ("trellis", style.LIGHT.colors[2], "with trellises"),
    ):
        curve = [(row["bits"], row["kl"]) for row in rows_of(rows, model, method) if LEAST <= row["bits"] <= MOST]
        if curve:
            bits, kl = zip(*sorted(curve), strict=True)
            ax.plot(bits, kl, "--" if method == "plain" else "-", color=color, linewidth=2.2, zorder=5)
            labels.append((kl[-1], name, color))
    ax.set_yscale("log")
    ax.set_xlim(LEAST, MOST + 1.15)
    ax.set_xticks([1.5, 2, 2.5, 3, 3.5])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    low, high = ax.get_ylim()
    step = math.log(high / low) / 19
    places = spread([math.log(value) for value, _, _ in sorted(labels)], step, math.log(low) + step / 2, math.log(high))
    for (value, name, color), place in zip(sorted(labels), places, strict=True):
        weight = "bold" if color != style.LIGHT.grey else "normal"
        ax.annotate(
            name,
            (MOST + 0.04, value),
            (MOST + 0.3, math.exp(place)),
            fontsize=6.5,
            color=color,
            fontweight=weight,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": "#D0D0D0",
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
    ax.set_title(model)


def lower_curve(rows: list[Row]) -> list[tuple[float, float]]:
    """The points that no other of the method beats with fewer bits, by bits."""
    points: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl"])):
        if LEAST <= row["bits"] <= MOST and (not points or row["kl"] < points[-1][1]):
            points.append((row["bits"], row["kl"]))
    return points


def spread(places: list[float], step: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as need be so that neighbours are `step` apart, within the limits.

    Least squares with an order is isotonic regression: neighbours that would cross are pooled at their mean.
    """
    pools: list[list[float]] = []
    for number, place in enumerate(places):
        pools.append([place - number * step])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) > sum(pools[-1]) / len(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    levels = [sum(pool) / len(pool) for pool in pools for _ in pool]
    most = high - step * (len(places) - 1)
    return [min(max(level, low), most) + number * step for number, level in enumerate(levels)]


def main() -> None:
    rows = json.loads((HERE / "results.json").read_text())
    free = [name for name in ("plain", "trellis", *PEERS) if name not in CALIBRATED]
    for methods, budget in product((free, CALIBRATED), (1.6, 2.1, 3.1)):
        print_table(rows, budget, methods)
    for ours in ("overlay", "trellis"):
        print_losses(rows, ours)
    draw(rows, HERE / "comparison.svg")


assert set(OURS) == {"plain", "overlay", "trellis"}

if __name__ == "__main__":
    main()
