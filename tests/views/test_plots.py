"""Figures: what is drawn is what the report says, it can be read, and the files are the same every time."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from chuk_lazarus.introspection.moe import (
    Experts,
    InvalidRequest,
    MoECompressionService,
    MoEOverlayEstimate,
    MoETypeAnalysis,
    MoETypeComparison,
    MoETypeService,
    MoEWeightsService,
)
from chuk_lazarus.introspection.moe.numerics.spectra import noise_decay, noise_rank
from chuk_lazarus.introspection.moe.plots import save, to_svg
from chuk_lazarus.introspection.moe.reports.provenance import LayerAnalysis, Similarity
from chuk_lazarus.introspection.moe.views.figures.conversion import plot_verification
from chuk_lazarus.introspection.moe.views.figures.overlays import plot_estimate
from chuk_lazarus.introspection.moe.views.figures.provenance import (
    plot_analysis,
    plot_comparison,
    plot_decay,
    plot_depth,
    plot_matches,
    plot_parents,
    plot_sharing,
    plot_similarity,
)
from chuk_lazarus.introspection.moe.views.figures.style import DARK, LIGHT, theme
from places import DEMO, FIXTURES
from sampling import keep

HOSTILE = "/models/$\\frac{x$/_a_/<b>&amp;\"'--></svg>/\u6a21\u578b/\u202e/" + "W" * 200
ROLES = ("gate", "up", "down")
NATIVE = "demo:native"


@cache
def analyse(name: str) -> MoETypeAnalysis:
    return MoETypeService.analyze(name, layers="all")


@cache
def estimate(name: str) -> MoEOverlayEstimate:
    return MoECompressionService.estimate(name)


def changed(report: Any, **values: Any) -> Any:
    return report.model_copy(update=values)


def with_layers(*layers: LayerAnalysis) -> MoETypeAnalysis:
    found: MoETypeAnalysis = changed(analyse("demo:native"), layers=layers)
    return found


def native(number: int = 0) -> LayerAnalysis:
    return analyse("demo:native").layers[number]


def with_experts(count: int, most: int = 8, largest: int = 255) -> LayerAnalysis:
    """A layer of so many experts, numbered up to `largest`, in four groups that take turns."""
    group = np.arange(count) % 4
    cosine = np.where(group[:, None] == group, 0.6, 0.05)
    np.fill_diagonal(cosine, 1.0)
    experts = tuple(int(i) for i in np.linspace(0, largest, count).round())
    sampled = np.linspace(0, count - 1, min(most, count)).round().astype(int)
    pairs = np.where(group[sampled][:, None] == group[sampled], 0.5, 0.01)
    np.fill_diagonal(pairs, 0.0)
    sharing = changed(native().lineage.sharing, experts=tuple(experts[i] for i in sampled), pairs=pairs.tolist())
    lineage = changed(native().lineage, sharing=sharing)
    return changed(native(), similarity=Similarity(experts=experts, cosine=cosine.tolist()), lineage=lineage)


def with_roles(*roles: str) -> LayerAnalysis:
    cosine = changed(native().cosine, gate=native().cosine.gate if "gate" in roles else None)
    return changed(native(), projections={role: native().projections[role] for role in roles}, cosine=cosine)


def of_low_rank() -> LayerAnalysis:
    decay = (53.6, *(0.01 / i for i in range(1, 65)))
    low = {"shape": (2880, 2880), "max_rank": 2880, "decay": decay, "rank": {"0.5": 1.0, "0.95": 1.0, "0.999": 30.5}}
    return changed(native(), projections={role: changed(p, **low) for role, p in native().projections.items()})


def many_layers(count: int) -> MoETypeAnalysis:
    layers = [
        changed(
            native(),
            layer=i,
            cosine=changed(native().cosine, down=i / count, gate=0.5),
            lineage=changed(
                native().lineage,
                sharing=changed(native().lineage.sharing, shared=i / count, strong=i / count / 2),
            ),
        )
        for i in range(count)
    ]
    return with_layers(*layers)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose experts are all the same."""
    folder = tmp_path_factory.mktemp("copies")
    shutil.copy(DEMO / "native/config.json", folder)
    tensors = load_file(DEMO / "native/model.safetensors")
    equal = {name: tensors[re.sub(r"experts\.\d+", "experts.0", name)] for name in tensors}
    save_file(equal, folder / "model.safetensors")
    return str(folder)


ANALYSES: dict[str, Callable[[], MoETypeAnalysis]] = {
    "two layers": lambda: analyse("demo:upcycled"),
    "ungated": lambda: analyse(str(FIXTURES / "nemotron_h")),
    "one role": lambda: with_layers(with_roles("down")),
    "two experts": lambda: with_layers(with_experts(2, largest=1)),
    "64 experts of 256, 8 sampled": lambda: with_layers(with_experts(64)),
    "64 experts, all sampled": lambda: with_layers(with_experts(64, 64, 63)),
    "low rank": lambda: with_layers(of_low_rank()),
    "60 layers": lambda: many_layers(60),
    "hostile name": lambda: changed(analyse("demo:permuted"), model=HOSTILE, revision="0123456789abcdef" * 2),
}


@cache
def hostile_figure() -> Figure:
    return plot_analysis(ANALYSES["hostile name"](), "lazarus --plot 'a b.svg'", caption=True)


def figures() -> Iterator[tuple[str, Callable[[], Figure]]]:
    for name, make in ANALYSES.items():
        yield name, lambda make=make: plot_analysis(make(), "lazarus -m " + "x" * 300, caption=True)
    layer = lambda name: analyse(name).layers[0]  # noqa: E731
    yield "decay", lambda: plot_decay(layer("demo:native"))
    yield "sharing", lambda: plot_sharing(layer("demo:native"), caption=True)
    yield "similarity", lambda: plot_similarity(layer("demo:permuted"), analyse("demo:permuted"), caption=True)
    yield "similarity of 64", lambda: plot_similarity(with_experts(64))
    yield "matches", lambda: plot_matches(layer("demo:upcycled"), caption=True)
    yield "depth of 1", lambda: plot_depth(with_layers(native()))
    yield "depth of 60", lambda: plot_depth(many_layers(60), caption=True)
    yield "dark", lambda: plot_analysis(analyse("demo:native"), dark=True)
    yield "comparison", lambda: plot_comparison(compare("demo:upcycled", "demo:native"))
    yield (
        "comparison of all",
        lambda: plot_comparison(MoETypeComparison(models=tuple(f() for f in ANALYSES.values())), caption=True),
    )
    yield "estimate", lambda: plot_estimate(estimate("demo:upcycled"), "lazarus", caption=True)
    yield "estimate without errors", lambda: plot_estimate(without_errors())


def compare(*names: str) -> MoETypeComparison:
    return MoETypeComparison(models=tuple(analyse(name) for name in names))


@cache
def plotted(name: str) -> Figure:
    """A figure of ON_AXES, for tests that only look at it."""
    return ON_AXES[name][0]()


@cache
def decay_of(model: str) -> Figure:
    return plot_decay(analyse(model).layers[0])


@cache
def depth_of(model: str) -> Figure:
    return plot_depth(analyse(model))


def without_errors() -> MoEOverlayEstimate:
    """Of equal experts, where the base does not fit into the fewest bytes."""
    found = estimate("demo:upcycled")
    nothing = {"plain": 0.0, "coded": 0.0, "svd": 0.0, "bound": 0.0}
    rows = [
        changed(row, low_rank=None if row.bits < 2 else 0.0, rounding=row.rounding and 0.0, **nothing)
        for row in found.ladder
    ]
    same: MoEOverlayEstimate = changed(found, ladder=tuple(rows), weight_error=0.0)
    return same


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (ax for ax in figure.axes if ax.get_title(loc="left").startswith(title))
    return found


def line(ax: Axes, label: str) -> Line2D:
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return found


def points(one: Line2D) -> NDArray[np.float64]:
    """[n, 2]."""
    return np.asarray(one.get_xydata(), float)


def caption(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


# what is drawn


@pytest.mark.parametrize("model", ["demo:native", "demo:upcycled"])
@pytest.mark.parametrize("role", ROLES)
def test_decay_is_that_of_the_deltas_by_numpy(model: str, role: str) -> None:
    ax = panel(decay_of(model), role)
    experts = Experts.open(model).layer(0)
    matrices = np.stack([experts.matrices(expert)[role] for expert in range(experts.count)]).astype(np.float64)
    values = np.linalg.svd(matrices - matrices.mean(axis=0), compute_uv=False)
    expected = (values / np.sqrt((values**2).mean(axis=1, keepdims=True))).mean(axis=0)
    _, deltas, *_ = (points(one) for one in ax.lines)
    ranks = (deltas[:, 0] * 64 / 100).round().astype(int)
    assert list(ranks) == list(range(1, 65))
    np.testing.assert_allclose(deltas[:, 1], expected[ranks - 1], rtol=2e-3)


def test_decay_has_the_noise_of_the_shape_and_the_ranks() -> None:
    layer = native()
    figure = plotted("decay")
    for role, projection in layer.projections.items():
        ax = panel(figure, role)
        out, inner = projection.shape
        assert ax.get_title(loc="left") == f"{role}, {out} × {inner}"
        noise, deltas, *_ = (points(one) for one in ax.lines)
        np.testing.assert_allclose(noise[:, 1], noise_decay(projection.shape, len(noise)))
        np.testing.assert_array_equal(noise[:, 0], deltas[:, 0])
        for energy, rank in projection.rank.items():
            ((x, y),) = points(line(ax, f"{100 * float(energy):.0f} %: rank {rank:.0f}"))
            assert x == pytest.approx(100 * rank / projection.max_rank)
            assert y == pytest.approx(np.interp(x, *deltas.T))
        low, high = ax.get_ylim()
        assert low < deltas[:, 1].min()
        assert deltas[:, 1].max() < high


def test_marks_of_any_shares() -> None:
    layer = MoETypeService.analyze("demo:native", variance=(0.5, 0.999)).layers[0]
    labels = {str(one.get_label()).split(":")[0] for one in panel(plot_decay(layer), "up").lines}
    assert {"50 %", "95 %", "99.9 %"} <= labels


def test_equal_experts_have_no_deltas(copies: str) -> None:
    figure = plot_decay(analyse(copies).layers[0])
    for role in ROLES:
        ax = panel(figure, role)
        assert any("no deltas" in text.get_text() for text in ax.texts)
        assert np.isnan([points(one)[0, 1] for one in ax.lines[1:]]).all()  # marks of rank 0 are in the key only
    assert plot_analysis(analyse(copies)).axes


def heat_map(ax: Axes) -> dict[tuple[int, int], float]:
    """The colours' values by the experts' numbers, of a map that names them all."""
    figure = ax.figure
    assert figure is not None
    rows, columns = ([int(tick.get_text()) for tick in ticks] for ticks in (ax.get_yticklabels(), ax.get_xticklabels()))
    values = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)  # type: ignore[union-attr]
    assert values.shape == (len(rows), len(columns))
    return {(row, column): values[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}


@pytest.mark.parametrize("model", ["demo:native", "demo:permuted"])
def test_heat_maps_have_the_values_at_the_experts_numbers(model: str) -> None:
    layer = analyse(model).layers[1]
    figure = plot_similarity(layer)
    cosines, pairs = heat_map(panel(figure, "Cosine")), heat_map(panel(figure, "Neurons shared"))
    for i in range(8):
        for j in range(8):
            if i == j:
                assert np.isnan([cosines[i, j], pairs[i, j]]).all()
            else:
                assert cosines[i, j] == layer.similarity.cosine[i][j]
                assert pairs[i, j] == layer.lineage.sharing.pairs[i][j]
    for name, values in (("Cosine", cosines), ("Neurons shared", pairs)):
        low, high = panel(figure, name).images[0].get_clim()
        assert low <= np.nanmin(list(values.values())) <= np.nanmax(list(values.values())) <= high
        assert low <= 0.0
        assert high >= 0.1  # so that noise does not look like structure


@pytest.mark.parametrize("sampled", [8, 64])
def test_alike_experts_stand_together(sampled: int) -> None:
    figure = plot_similarity(with_experts(64, sampled))
    for name, high in (("Cosine", 0.6), ("Neurons shared", 0.5)):
        values = np.ma.filled(panel(figure, name).images[0].get_array().astype(float), high)  # type: ignore[union-attr]
        borders = (np.diff(values, axis=1) != 0).sum(axis=1)
        assert borders.max() <= 2  # one block in each row


def test_experts_without_groups_keep_their_order() -> None:
    figure = plot_similarity(analyse("demo:upcycled").layers[0])
    assert [tick.get_text() for tick in panel(figure, "Cosine").get_yticklabels()] == [str(i) for i in range(8)]


def test_matches_are_shares_of_neurons() -> None:
    lineage = native().lineage
    ax = plotted("matches").axes[0]
    second, _, nearest = (patch.get_data() for patch in ax.patches)  # type: ignore[attr-defined]
    for drawn, counts in ((nearest, lineage.matches.nearest), (second, lineage.matches.runner_up)):
        np.testing.assert_allclose(drawn.values, np.array(counts) / lineage.sharing.neurons)
        np.testing.assert_allclose(drawn.edges, np.linspace(-1, 1, 51))
        shown = drawn.edges[:-1][drawn.values > 0]
        assert ax.get_xlim()[0] < shown.min()
        assert drawn.values.max() < ax.get_ylim()[1]
    key = ax.get_legend()
    assert key is not None
    assert [text.get_text() for text in key.get_texts()] == ["second nearest", "nearest"]


def test_depth_has_every_layer() -> None:
    analysis = analyse("demo:upcycled")
    figure = depth_of("demo:upcycled")
    for role in ROLES:
        np.testing.assert_allclose(
            points(line(panel(figure, "Rank"), role)),
            [(layer.layer, layer.projections[role].rank_ratio) for layer in analysis.layers],
        )
        np.testing.assert_allclose(
            points(line(panel(figure, "Cosine"), role)),
            [(layer.layer, getattr(layer.cosine, role)) for layer in analysis.layers],
        )
    noise = points(line(panel(figure, "Rank"), "noise"))
    np.testing.assert_allclose(noise[:, 1], noise_rank((128, 64), 0.95) / 64)
    for label, name in (("shared", "shared"), ("strongly", "strong")):
        found = points(line(panel(figure, "Neurons shared"), label))
        np.testing.assert_allclose(found[:, 1], [getattr(layer.lineage.sharing, name) for layer in analysis.layers])


def test_depth_of_layers_with_and_without_a_gate() -> None:
    figure = plot_depth(with_layers(native(0), changed(with_roles("up", "down"), layer=3)))
    gate = points(line(panel(figure, "Rank"), "gate"))
    assert gate[0, 1] == native().projections["gate"].rank_ratio
    assert np.isnan(gate[1, 1])


def test_layer_numbers_are_whole() -> None:
    for layers in (1, 2, 60):
        figure = plot_depth(many_layers(layers))
        ax = figure.axes[-1]
        low, high = ax.get_xlim()
        labels = [tick.get_text() for tick in ax.get_xticklabels() if low <= tick.get_position()[0] <= high]
        assert labels
        assert set(labels) <= {str(layer) for layer in range(layers)}


def figure_of(layer: LayerAnalysis, title: str, name: str) -> float:
    if title == "Rank":
        return layer.projections[name].rank_ratio
    if title == "Cosine":
        return float(getattr(layer.cosine, name))
    return {"all": layer.lineage.sharing.shared, "strongly": layer.lineage.sharing.strong}[name]


def test_comparison_has_each_models_means() -> None:
    comparison = compare("demo:upcycled", "demo:native")
    figure = plot_comparison(comparison)
    for title, rows in (("Rank", 3), ("Cosine", 3), ("Neurons", 2)):
        ax = panel(figure, title)
        names = [tick.get_text() for tick in ax.get_yticklabels()]
        assert len(names) == rows
        for place, name in enumerate(names):
            near = [one for one in ax.lines if one.get_marker() in ("o", "s") and abs(points(one)[0, 1] - place) < 0.5]
            drawn = [points(one)[0, 0] for one in sorted(near, key=lambda one: points(one)[0, 1])]
            for value, model in zip(drawn, comparison.models, strict=True):
                expected = [figure_of(layer, title, name) for layer in model.layers]
                assert value == pytest.approx(np.mean(expected))
    for role in ROLES:
        curves = [points(one)[:, 1] for one in panel(figure, role).lines]
        for model in comparison.models:
            decay = model.layers[0].projections[role].decay
            assert any(np.array_equal(curve, decay) for curve in curves)


def test_comparison_names_every_model() -> None:
    models = [changed(analyse("demo:native"), model=f"_org/model-{i}") for i in range(9)]
    figure = plot_comparison(MoETypeComparison(models=tuple(models)))
    key = figure.axes[0].get_legend()
    assert key is not None
    names = [text.get_text().split(":")[0] for text in key.get_texts()]
    assert names == [model.model for model in models]
    styles = {(one.get_color(), one.get_linestyle(), one.get_marker()) for one in figure.axes[0].lines}
    assert len(styles) == 9


LINES = {
    "codes on a base": "coded",
    "plain codes": "plain",
    "quantised": "rounding",
    "low rank, bf16": "low_rank",
    "plain SVD, bf16": "svd",
    "bound": "bound",
}


def test_estimate_has_the_ladder_and_labels_its_lines() -> None:
    report = MoECompressionService.estimate("demo:upcycled", bits=2.25)
    ax = plot_estimate(report).axes[0]
    for label, name in LINES.items():
        errors = [np.nan if getattr(row, name) is None else getattr(row, name) for row in report.ladder]
        np.testing.assert_allclose(points(line(ax, label)), list(zip([1.5, 2, 2.5, 3, 4, 8], errors, strict=True)))
    (chosen,) = (points(one)[0] for one in ax.lines if one.get_marker() == "*")
    assert tuple(chosen) == pytest.approx((16 * report.overlay_bytes / report.original_bytes, report.weight_error))
    heights = {text.get_text(): text.xyann[1] for text in ax.texts if isinstance(text, Annotation)}
    assert heights.keys() == LINES.keys()
    assert min(np.diff(sorted(heights.values()))) > 0.04, "labels lie over each other"
    lowest_first = [label for label, _ in sorted(heights.items(), key=lambda item: item[1])]
    assert lowest_first == sorted(LINES, key=lambda label: float(points(line(ax, label))[-1, 1]))


def test_what_is_out_of_sight_is_not_drawn() -> None:
    """An estimate of 16 bits, and a line for bases where none pays."""
    ax = plot_estimate(estimate("demo:native")).axes[0]
    assert not any(one.get_marker() == "*" for one in ax.lines)
    labels = {one.get_label() for one in ax.lines}
    assert labels == LINES.keys() - {"codes on a base"}


def test_estimate_of_a_file_in_few_bits_shows_what_it_takes() -> None:
    report = estimate("demo:native")
    ax = plot_estimate(changed(report, stored_bytes=report.original_bytes // 4)).axes[0]
    assert set(points(line(ax, "as stored"))[:, 0]) == {4.0}


def test_estimate_where_the_base_does_not_fit_and_nothing_is_lost() -> None:
    ax = plot_estimate(without_errors()).axes[0]
    low_rank = points(line(ax, "low rank, bf16"))[:, 1]
    assert np.isnan(low_rank[0])
    assert list(low_rank[1:]) == [0.0] * 5
    assert ax.get_ylim()[0] < 0.0


def test_an_estimate_of_an_earlier_version_has_no_ladder() -> None:
    with pytest.raises(InvalidRequest, match="has no ladder"):
        plot_estimate(changed(estimate("demo:native"), ladder=()))


def test_a_notebook_shows_an_estimate_with_its_figure() -> None:
    html = estimate("demo:native")._repr_html_()
    assert "MOE OVERLAY ESTIMATE" in html
    assert "plain SVD, bf16" in html[html.index("<svg") :]
    assert "<svg" not in changed(estimate("demo:native"), ladder=())._repr_html_()


@pytest.mark.long
def test_captions_say_what_and_of_which_model() -> None:
    analysis = changed(analyse("demo:upcycled"), model="org/name", revision="0123456789abcdef" * 2)
    comparison = MoETypeComparison(models=(analysis, analyse("demo:native")))
    overlay = changed(estimate("demo:upcycled"), model="org/name", revision="0123456789abcdef" * 2)
    one, command = analysis.layers[1], "lazarus introspect moe-expert moe-type-analyze"
    for figure in (plot(one, analysis, command, caption=True) for plot in (plot_decay, plot_similarity, plot_matches)):
        assert caption(figure).endswith(f"org/name @ 0123456789ab, layer 1 {command}")
    drawn = ((plot_depth, analysis), (plot_analysis, analysis), (plot_estimate, overlay))
    for figure in (plot(report, command, caption=True) for plot, report in drawn):  # type: ignore[operator]
        assert caption(figure).endswith(f"org/name @ 0123456789ab, layers 0-1 {command}")
    assert caption(plot_comparison(comparison, command, caption=True)).endswith(
        f"org/name @ 0123456789ab, layers 0-1 demo:native, layers 0-1 {command}"
    )
    assert caption(plot_decay(one, caption=True)).endswith("Layer 1")
    assert estimate("demo:upcycled").advice in caption(plot_estimate(overlay, caption=True))


def test_names_are_shown_as_they_are_or_escaped() -> None:
    shown = caption(hostile_figure()).replace(" ", "")
    assert HOSTILE[: HOSTILE.index("\u6a21")] in shown
    assert r"/\u6a21\u578b/\u202e/" + "W" * 200 + "@0123456789ab,layers0-1" in shown


def test_no_caption_unless_asked() -> None:
    for figure in (
        plot_analysis(analyse("demo:native"), "lazarus"),
        plot_comparison(compare("demo:native"), "lazarus"),
    ):
        assert figure.get_supxlabel() == figure.get_suptitle() == ""
        assert "lazarus" not in " ".join(text.get_text() for text in texts(figure))


def titles(figure: Figure) -> list[str]:
    return [title for ax in figure.axes if (title := ax.get_title(loc="left"))]


def test_what_decides_comes_first() -> None:
    assert titles(plotted("analysis"))[0] == "Neurons shared"
    assert titles(plotted("similarity")) == ["Neurons shared", "Cosine (down)"]
    assert titles(plotted("depth"))[0] == "Neurons shared"
    shown = titles(plotted("comparison"))
    assert shown[0] == "Neurons shared"
    assert shown[-3:] == ["gate, deltas", "up, deltas", "down, deltas"]


@cache
def with_parent() -> MoETypeAnalysis:
    return MoETypeService.analyze("demo:permuted", parent="demo:parent")


ON_AXES: dict[str, tuple[Callable[..., Figure], int, str]] = {
    "sharing": (lambda **o: plot_sharing(native(), **o), 1, "Neurons shared"),
    "similarity": (lambda **o: plot_similarity(native(), **o), 2, "Neurons shared"),
    "decay": (lambda **o: plot_decay(native(), **o), 3, "gate"),
    "matches": (lambda **o: plot_matches(native(), **o), 1, "Nearest neurons"),
    "depth": (lambda **o: plot_depth(analyse("demo:native"), **o), 3, "Neurons shared"),
    "parents": (lambda **o: plot_parents(with_parent(), **o), 2, "Neurons found"),
    "analysis": (lambda **o: plot_analysis(analyse("demo:native"), **o), 1, "Neurons shared"),
    "comparison": (lambda **o: plot_comparison(compare("demo:native", "demo:upcycled"), **o), 1, "Neurons shared"),
    "estimate": (lambda **o: plot_estimate(estimate("demo:native"), **o), 1, ""),
    "verification": (lambda **o: plot_verification(MoEWeightsService.verify(NATIVE, NATIVE), **o), 1, ""),
}


@pytest.mark.parametrize("name", ON_AXES)
def test_it_is_drawn_on_axes_that_are_given(name: str) -> None:
    plot, count, title = ON_AXES[name]
    for given in {1, count}:
        figure = Figure()
        axes = figure.subplots(1, given)
        assert plot(ax=axes) is figure
        first, *others = np.ravel(axes)
        assert first.get_title(loc="left").startswith(title)
        assert all(ax.has_data() for ax in (first, *others))
        assert figure.get_suptitle() == figure.get_supxlabel() == ""
    for wrong in (Figure().subplots(1, count + 1), [], "ax", [3]):
        with pytest.raises(InvalidRequest):
            plot(ax=wrong)


def light(color: Any) -> float:
    return sum(share * value for share, value in zip((0.21, 0.72, 0.07), to_rgb(color), strict=True))


@pytest.mark.parametrize("name", keep(ON_AXES, "sharing"))
def test_figures_have_a_white_ground_unless_asked(name: str) -> None:
    assert light(plotted(name).get_facecolor()[:3]) == pytest.approx(1)


@pytest.mark.parametrize("name", ON_AXES)
def test_dark_figures_are_legible_on_dark_ground(name: str) -> None:
    figure = ON_AXES[name][0](dark=True)
    assert light(figure.get_facecolor()[:3]) < 0.15
    for text in texts(figure):
        inside = text.axes is not None and text.axes.images and text in text.axes.texts  # in a heat map's squares
        assert inside or light(text.get_color()) > 0.4, text.get_text()
    for ax in figure.axes:
        assert all(light(one.get_color()) > 0.2 for one in ax.lines)


def test_the_colour_of_shares_turns_where_upcycled_begins() -> None:
    """The same colours for all models: what natives share never looks like blocks."""
    for name in ("demo:native", "demo:upcycled"):
        image = panel(plot_sharing(analyse(name).layers[0]), "Neurons shared").images[0]
        assert image.get_clim() == (0.0, 1.0)
        assert [float(image.norm(share)) for share in (0.0, 0.1, 1.0)] == [0.0, 0.5, 1.0]
        assert panel(plot_similarity(analyse(name).layers[0]), "Cosine").images[0].get_clim()[1] == 1.0


def test_a_part_of_the_experts_is_called_one() -> None:
    layer = with_experts(64)
    sharing = changed(layer.lineage.sharing, partners=dict.fromkeys(range(256), 0))
    shown = plot_sharing(changed(layer, lineage=changed(layer.lineage, sharing=sharing)))
    assert panel(shown, "Neurons shared").get_xlabel() == "in expert (8 of 256)"
    assert panel(plotted("sharing"), "Neurons shared").get_xlabel() == "in expert"


def test_themed_figures_take_the_colours_of_the_page() -> None:
    figure = plotted("analysis")
    themed = to_svg(figure, themed=True)
    for name, color in LIGHT.named.items():
        if f"var(--{name})" in themed:
            assert f": {color}" not in themed
    assert {"ground", "ink", "grid", "line-0", "line-1", "line-2"} <= set(re.findall(r"var\(--([\w-]+)\)", themed))
    assert set(re.findall(r"var\(--([\w-]+)\)", themed)) <= set(re.findall(r"--([\w-]+):", theme(DARK)))
    assert "var(" not in to_svg(figure)
    assert len(set(LIGHT.named.values())) == len(LIGHT.named)


# that it can be read


LONG = (
    "two layers",
    "one role",
    "two experts",
    "64 experts of 256, 8 sampled",
    "64 experts, all sampled",
    "60 layers",
    "low rank",
    "dark",
    "comparison of all",
)


@pytest.mark.parametrize(
    ("name", "make"),
    [pytest.param(*pair, id=pair[0], marks=pytest.mark.long if pair[0] in LONG else ()) for pair in figures()],
)
def test_nothing_is_cut_off_or_too_small(name: str, make: Callable[[], Figure]) -> None:
    figure = make()
    for text in texts(figure):
        assert float(text.get_fontsize()) >= 8
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert drawn.x0 >= 0
    assert drawn.y0 >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
    for ax in figure.axes:
        for ticks in (ax.get_xticklabels(), ax.get_yticklabels()) if ax.axison else ():
            boxes = [tick.get_window_extent() for tick in ticks if tick.get_text()]
            shared = [one for one, other in pairwise(boxes) if one.overlaps(other)]
            assert not shared, f"{ax.get_title(loc='left')}: numbers overlap"


@pytest.mark.long
def test_the_panels_leave_the_edge_white() -> None:
    """As the pixels say, which know nothing of boxes."""
    figure = hostile_figure()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pixels = np.asarray(Image.open(file).convert("L"))
    assert pixels.min() < 100
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert edge.min() == 255


@pytest.mark.parametrize("title", ["Rank", "Cosine", "Neurons"])
def test_lines_differ_by_more_than_colour(title: str) -> None:
    ax = panel(depth_of("demo:upcycled"), title)
    styles = [(one.get_linestyle(), one.get_marker(), one.get_linewidth()) for one in ax.lines]
    assert len(set(styles)) == len(styles)


# files


def test_files_are_what_their_ending_says(tmp_path: Path) -> None:
    figure = plotted("decay")
    for name in ("a.png", "a.PDF", "a.svg"):
        save(figure, tmp_path / name)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == 1500
    pdf = (tmp_path / "a.PDF").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert b"CreationDate" not in pdf
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PDF", "a.png", "a.svg"]


SCRIPT = """
import sys
from pathlib import Path
from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.plots import plot_decay, plot_similarity, save
layer = MoETypeService.analyze("demo:native", layers="all").layers[0]
for plot in (plot_decay, plot_similarity):
    for ending in ("png", "svg", "pdf"):
        save(plot(layer), Path(sys.argv[1], f"{plot.__name__}.{ending}"))
assert "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.long
def test_the_same_report_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True)
    for plot in (plot_decay, plot_similarity):
        figure = plot(native())
        for ending in ("png", "svg", "pdf"):  # drawn before or not
            save(figure, tmp_path / f"again.{ending}")
            assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / f"{plot.__name__}.{ending}").read_bytes()


def test_settings_of_others_neither_matter_nor_change(tmp_path: Path) -> None:
    plain = to_svg(plotted("decay"))
    others = {"font.size": 30, "text.usetex": True, "figure.facecolor": "black", "svg.fonttype": "path"}
    with matplotlib.rc_context(others):
        before = dict(matplotlib.rcParams)
        assert to_svg(plot_decay(native())) == plain
        assert dict(matplotlib.rcParams) == before


@pytest.mark.long
def test_figures_in_threads() -> None:
    jobs = [lambda: plot_decay(native()), lambda: plot_matches(native())]
    before = dict(matplotlib.rcParams)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many changes of thread as can be had
    try:
        with ThreadPoolExecutor(4) as pool:
            drawn = list(pool.map(lambda job: to_svg(job()), jobs * 3))
    finally:
        sys.setswitchinterval(interval)
    assert drawn == [to_svg(job()) for job in jobs] * 3
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "figure.png.txt", ".png"])
def test_another_ending_is_refused_with_the_three(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(repr(name))) as caught:
        save(plotted("matches"), tmp_path / name)
    assert all(ending in caught.value.hint for ending in (".png", ".svg", ".pdf"))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    figure = plotted("matches")
    (tmp_path / "folder.svg").mkdir()
    for place in (tmp_path / "folder.svg", tmp_path / "missing/a.svg", tmp_path / ("x" * 300 + ".svg")):
        with pytest.raises(InvalidRequest, match="can't write") as caught:
            save(figure, place)
        assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]
    assert not list((tmp_path / "folder.svg").iterdir())


def test_a_file_is_replaced_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "old.svg").write_text("old")
    (tmp_path / "link.svg").symlink_to(tmp_path / "old.svg")
    save(plotted("matches"), tmp_path / "link.svg")
    assert (tmp_path / "link.svg").is_symlink()
    assert (tmp_path / "old.svg").read_text() == to_svg(plotted("matches"))


def test_a_pipe_or_a_device_gets_the_figure_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.svg"
    os.mkfifo(pipe)
    (tmp_path / "link.svg").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        for place in (pipe, tmp_path / "link.svg"):
            save(plotted("matches"), place)
            assert pipe.is_fifo()
            assert os.read(reader, 2**20).decode() == to_svg(plotted("matches"))
    finally:
        os.close(reader)


# in a page and in a notebook


def test_svg_has_its_text_as_text() -> None:
    figure = hostile_figure()
    shown = {"".join(one.itertext()) for one in ElementTree.fromstring(to_svg(figure)).iter(f"{SVG}text")}
    lines = {one for text in texts(figure) for one in text.get_text().split("\n")}
    assert {"gate, 128 × 64", "Nearest neurons", "lazarus --plot 'a b.svg'"} <= shown
    assert set(figure.get_supxlabel().split("\n")) <= shown <= lines


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.long
def test_svgs_on_one_page_do_not_meet() -> None:
    analysis = analyse("demo:native")
    drawn = [to_svg(plot_decay(layer)) for layer in analysis.layers] + [to_svg(plot_similarity(native()))]
    ids = [re.findall(r'\bid="([^"]*)"', one) for one in drawn]
    together = [one for found in ids for one in found]
    assert together
    assert len(set(together)) == len(together)
    for one, found in zip(drawn, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]*)\)", one)) | set(re.findall(r'href="#([^"]*)"', one)) == set(found)


def test_svg_needs_nothing_from_elsewhere() -> None:
    drawn = to_svg(plotted("analysis"))
    root = ElementTree.fromstring(drawn)
    assert drawn.startswith("<svg ")
    assert not [one.tag for one in root.iter() if one.tag.removeprefix(SVG) in ("style", "script", "metadata")]
    for one in root.iter():
        for name, value in one.attrib.items():
            assert "//" not in value.removeprefix("data:image/png;base64,") or value.startswith("data:"), (name, value)
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))


def test_a_notebook_shows_the_figure() -> None:
    figure = plotted("matches")
    assert figure._repr_svg_() == to_svg(figure)  # type: ignore[attr-defined]
