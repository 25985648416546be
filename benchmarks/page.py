"""Renew docs/performance.svg, and the tables of docs/performance.md, from the results kept in benchmarks/results.

    python benchmarks/page.py

Each table stands between `<!-- NAME -->` and `<!-- end -->`; the words around them are written by hand.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from measuring import CLOCKS, Figures

from chuk_lazarus.introspection.moe.views.figures.style import LIGHT, WIDTH, save, styled

COLORS, GREY = LIGHT.colors, LIGHT.grey
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("startup", "analyze", "methods", "growth", "large", "factorise", "remote")
PACKAGES = ("numpy", "scipy", "ml_dtypes", "torch", "weightwatcher", "scikit-learn")
CASES = {
    "OLMoE-shaped, 8 experts sampled": "OLMoE, 8",
    "OLMoE-shaped, all 64 experts": "OLMoE, all 64",
    "GPT-OSS-shaped, 8 experts sampled": "GPT-OSS, 8",
}
RIVALS = {
    "numpy_svd": "numpy's full SVD, on all cores",
    "numpy_svd_side_by_side": "numpy's full SVD, one per core",
    "torch_svdvals": "torch's svdvals",
    "weightwatcher_analyze": "WeightWatcher",
    "lazarus_0_4_1": "chuk-lazarus 0.4.1's algorithm",
}
STAGES = (
    "eigenvalues",
    "delta products",
    "expert products",
    "matching",
    "read",
    "decode",
    "mean of experts",
    "close calls again, in float64",
    "everything else",
)

Rows = Iterable[Iterable[str]]


def table(heads: Iterable[str], rows: Rows) -> str:
    """In Markdown; all columns but the first are numbers."""
    names = list(heads)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def both(values: Mapping[str, float], names: tuple[str, str] = CLOCKS, digits: int = 2) -> str:
    """Wall-clock seconds, and CPU seconds in parentheses."""
    return f"{values[names[0]]:.{digits}f} ({values[names[1]]:.{digits}f})"


def source(name: str, found: Figures) -> str:
    before, after = (found["load"][when][0] for when in ("before", "after"))
    rounds = "one run" if found["rounds"] == 1 else f"medians of {found['rounds']} rounds"
    return (
        f"[benchmarks/results/{name}.json](../benchmarks/results/{name}.json), by `python benchmarks/{name}.py`; "
        f"{rounds}; load {before:.1f} before, {after:.1f} after."
    )


def machine(found: Figures) -> str:
    own = found["machine"]
    versions = ", ".join(f"{name} {own[name]}" for name in PACKAGES if name in own)
    where = f"{own['processor']}, {own['cores']} cores, {own['memory_gib']} GiB, {own['system']}"
    return f"Measured on {where}; Python {own['python']}, {versions}; {own['blas']}."


def wanted(results: Mapping[str, Figures]) -> str:
    """The targets beside the results; wall-clock times, with CPU times in parentheses."""
    cases, large, growth = results["analyze"]["cases"], results["large"], results["growth"]["series"]
    every, gpt = (cases[name] for name in list(CASES)[1:])
    jobs = {**large["analysis"]["jobs"], **large["compression"]["jobs"]}
    biggest = results["remote"]["models"]["DeepSeek-V3"]
    quick = biggest["modes"]["quick"]["first"]
    share = 100 * (quick["weight_bytes"] + quick["other_bytes"]) / biggest["expert_bytes"]
    floor, rivals = ("over_floor", "over_floor_cpu"), ("rivals_over_analysis", "rivals_over_analysis_cpu")
    with_matching = ("over_floor_with_matching", "over_floor_with_matching_cpu")
    start = results["startup"]
    most: dict[str, tuple[Mapping[str, float], tuple[str, str], float]] = {
        "analysis over its floor, OLMoE, all 64": (every, floor, 1.3),
        "the same with the products of matching in the floor": (every, with_matching, 1.3),
        "analysis over its floor, GPT-OSS, 8": (gpt, floor, 1.3),
        **{
            f"slope over {name}": (series["slope"], CLOCKS, 1.05)
            for name, series in growth.items()
            if name.startswith("experts")
        },
        "slowest start of a command, seconds": ({clock: max(start[clock].values()) for clock in CLOCKS}, CLOCKS, 0.4),
    }
    least = {
        f"full SVDs over the analysis, {name}": ({ratio: case[ratio]["numpy_svd"] for ratio in rivals}, rivals, aim)
        for name, case, aim in (("OLMoE, all 64", every, 12), ("GPT-OSS, 8", gpt, 8))
    }
    counts = {
        "peak memory with a layer of 11.3 GB, GiB": (max(job["peak_gib"] for job in jobs.values()), 2),
        **{
            f"reads per weight, {name.partition(',')[0]}": (most_read(job), 2)
            for name, job in jobs.items()
            if "2GB" in name
        },
        "share that `--quick` fetches of 654 GB, %": (share, 0.1),
    }
    rows = [
        *(
            (name, both(*figures), f"≤ {aim:g}", figures[0][figures[1][0]] <= aim)
            for name, (*figures, aim) in most.items()
        ),
        *(
            (name, both(*figures, 1), f"≥ {aim:g}", figures[0][figures[1][0]] >= aim)
            for name, (*figures, aim) in least.items()
        ),
        *((name, f"{got:.2g}", f"≤ {aim:g}", got <= aim) for name, (got, aim) in counts.items()),
    ]
    return table(
        ["figure", "value", "target", "met"],
        ((name, value, aim, "yes" if is_reached else "no") for name, value, aim, is_reached in rows),
    )


def most_read(job: Figures) -> int:
    """How often bytes are read that make up more than a thousandth of the file: not scales and headers."""
    times = {int(n): count for n, count in job["bytes_by_times_read"].items()}
    return max(n for n, count in times.items() if count > sum(times.values()) / 1000)


def analyses(cases: Figures) -> str:
    floors = [(name, f"{name}_cpu") for name in ("over_floor", "over_floor_with_matching", "over_floor_with_all")]
    return table(
        ["layer", "experts", "seconds", "over floor", "with matching", "with all", "peak, GiB", "read / stored"],
        (
            (
                name,
                size(case["expert_bytes"]),
                both({clock: case[clock]["analysis"] for clock in CLOCKS}, digits=1),
                *(both(case, names) for names in floors),
                f"{case['peak_gib']:.2f}",
                f"{case['bytes_read_over_expert_bytes']:.4f}",
            )
            for name, case in cases.items()
        ),
    )


def stages(cases: Figures) -> str:
    columns = [case[which] for case in cases.values() for which in ("stages_cpu_seconds", "floor_cpu_seconds")]
    return table(
        ["stage", *(f"{label}{end}" for label in CASES.values() for end in ("", ", floor"))],
        (
            (stage, *(f"{column[stage]:.2f}" if stage in column else "" for column in columns))
            for stage in STAGES
            if any(stage in column for column in columns)
        ),
    )


def rivals(cases: Figures) -> str:
    ratios = ("rivals_over_analysis", "rivals_over_analysis_cpu")
    return table(
        ["times as long as our analysis", *CASES.values()],
        (
            (
                label,
                *(
                    both({which: case[which][name] for which in ratios}, ratios, 1) if name in case[ratios[0]] else ""
                    for case in cases.values()
                ),
            )
            for name, label in RIVALS.items()
        ),
    )


def methods(shapes: Figures) -> str:
    ratios = ("over_ours", "over_ours_cpu")
    ways = next(iter(shapes.values()))["over_ours"]
    return table(
        ["times as long as ours", *shapes, *(f"error, {name}" for name in shapes)],
        (
            (
                way,
                *(both({which: found[which][way] for which in ratios}, ratios, 1) for found in shapes.values()),
                *(f"{found['error'][way]:.0e}" for found in shapes.values()),
            )
            for way in ways
        ),
    )


def growth(series: Figures) -> str:
    def from_to(values: list[float], digits: int) -> str:
        return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"

    return table(
        ["what grows", "from, to", "experts", "CPU seconds", "slope", "peak, GiB"],
        (
            (
                name,
                from_to(one["points"], 0),
                " to ".join(size(one["expert_bytes"][place]) for place in (0, -1)),
                from_to(one["cpu_seconds"], 2),
                both(one["slope"]),
                from_to([peak / 2**30 for peak in one["peak_bytes"]], 2),
            )
            for name, one in series.items()
        ),
    )


def large(found: Figures) -> str:
    return table(
        ["job", "memory allowed", "peak, GiB", "seconds", "read / stored", "reads per weight", "more than twice"],
        (
            (
                f"{name.partition(', ')[0]}, {part['experts']} experts",
                name.partition(", ")[2],
                f"{job['peak_gib']:.2f}",
                both(job, digits=0),
                f"{job['bytes_read_over_expert_bytes']:.3f}",
                str(most_read(job)),
                f"{100 * job['share_read_more_than_twice']:.2f} %",
            )
            for part in (found["analysis"], found["compression"])
            for name, job in part["jobs"].items()
        ),
    )


def factors(found: Figures) -> str:
    return table(
        ["method", "seconds", "times ours", "relative error"],
        (
            (
                way,
                f"{found['seconds_per_delta'][way]:.3f} ({found['cpu_seconds_per_delta'][way]:.3f})",
                f"{found['over_ours'][way]:.1f} ({found['over_ours_cpu'][way]:.1f})",
                f"{found['relative_error'][way]:.4f}",
            )
            for way in found["over_ours"]
        ),
    )


def throughput(jobs: Figures) -> str:
    return table(
        ["job", "seconds", "MB per second", "peak, GiB"],
        (
            (
                name,
                both(job, digits=1),
                both(job, ("mb_per_second", "mb_per_cpu_second"), 0),
                f"{job['peak_gib']:.2f}",
            )
            for name, job in jobs.items()
        ),
    )


def remote(models: Figures) -> str:
    return table(
        ["model and its experts", "mode", "weights", "other files", "requests", "repeat: bytes", "requests"],
        (
            (
                f"{name}, {size(model['expert_bytes'])}",
                mode,
                size(runs["first"]["weight_bytes"]),
                size(runs["first"]["other_bytes"]),
                str(runs["first"]["requests"]),
                size(runs["again"]["weight_bytes"] + runs["again"]["other_bytes"]),
                str(runs["again"]["requests"]),
            )
            for name, model in models.items()
            for mode, runs in model["modes"].items()
        ),
    )


def startup(found: Figures) -> str:
    return table(
        ["command", "seconds"],
        ((f"`{name}`", both({clock: found[clock][name] for clock in CLOCKS})) for name in found["seconds"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The figure


def draw(results: Mapping[str, Figures]) -> Figure:
    with styled():
        figure = Figure((WIDTH, 6.6), layout="constrained")
        (by_stage, by_rival), (time, memory) = figure.subplots(2, 2)
        draw_stages(by_stage, results["analyze"]["cases"])
        draw_rivals(by_rival, results["analyze"]["cases"])
        time.set_title("CPU seconds of an analysis")
        draw_growth(time, results["growth"]["series"], "cpu_seconds", 1.0, "log")
        memory.set_title("Its peak memory, GiB")
        draw_growth(memory, results["growth"]["series"], "peak_bytes", 2**30, "linear")
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.draw_without_rendering()
        return figure


def draw_stages(axes: Axes, cases: Figures) -> None:
    """A bar for each analysis, and one for its floor, as shares of the analysis' CPU seconds."""
    axes.set_title("CPU time, and that of the floor")
    bars = [(case, which) for case in cases.values() for which in ("stages_cpu_seconds", "floor_cpu_seconds")]
    places = [-(place + place // 2) for place in range(len(bars))]
    left = [0.0] * len(bars)
    for color, stage in zip([*COLORS[:4], GREY], [*STAGES[:4], "all else"], strict=True):
        widths = []
        for case, which in bars:
            seconds = {name if name in STAGES[:4] else "all else": 0.0 for name in case[which]}
            for name, spent in case[which].items():
                seconds[name if name in seconds else "all else"] += spent
            widths.append(seconds[stage] / sum(case["stages_cpu_seconds"].values()))
        axes.barh(places, widths, left=left, color=color, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [label for name in CASES.values() for label in (name, "floor")])
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=3, columnspacing=1.0, handlelength=1.0)


def draw_rivals(axes: Axes, cases: Figures) -> None:
    axes.set_title("CPU time of other methods over ours")
    for number, (case, label) in enumerate(CASES.items()):
        ratios = cases[case]["rivals_over_analysis_cpu"]
        places = [-(4 * list(RIVALS).index(name) + number) for name in ratios]
        axes.barh(places, list(ratios.values()), color=COLORS[number], label=label)
    axes.axvline(1, color=GREY, linewidth=1)
    names = (
        "numpy's SVD,\nall cores",
        "numpy's SVD,\none per core",
        "torch's\nsvdvals",
        "Weight-\nWatcher",
        "0.4.1's\nalgorithm",
    )
    axes.set_yticks([-(4 * place + 1) for place in range(len(RIVALS))], names)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=3, columnspacing=1.0, handlelength=1.0)


def draw_growth(axes: Axes, series: Figures, figure: str, unit: float, scale: str) -> None:
    for number, (name, found) in enumerate(series.items()):
        sizes = [count / 1e6 for count in found["expert_bytes"]]
        values = [value / unit for value in found[figure]]
        axes.plot(sizes, values, color=COLORS[number], marker="os^D"[number], label=name)
    axes.set(xscale="log", yscale=scale, xlabel="experts, MB")
    if scale == "linear":
        axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}
    cases = results["analyze"]["cases"]
    parts = {
        **{f"source {name}": source(name, found) for name, found in results.items()},
        "machine": machine(results["analyze"]),
        "wanted": wanted(results),
        "analyses": analyses(cases),
        "stages": stages(cases),
        "rivals": rivals(cases),
        "methods": methods(results["methods"]["shapes"]),
        "growth": growth(results["growth"]["series"]),
        "large": large(results["large"]),
        "factors": factors(results["factorise"]["factors"]),
        "throughput": throughput(results["factorise"]["throughput"]),
        "remote": remote(results["remote"]["models"]),
        "startup": startup(results["startup"]),
    }
    page = DOCS / "performance.md"
    pattern = r"<!-- (?P<name>[\w ]+) -->\n.*?<!-- end -->"
    text = re.sub(
        pattern,
        lambda found: f"<!-- {found['name']} -->\n{parts[found['name']]}\n<!-- end -->",
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)
    save(draw(results), DOCS / "performance.svg")
