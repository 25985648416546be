"""What comes from a parent, as it is shown: sentences, rows and the figure say what the report says."""

from functools import cache
from html import unescape
from math import isnan

import numpy as np
import pytest

from chuk_lazarus.introspection.moe import InvalidRequest, MoETypeAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.plots import plot_parents, to_svg
from chuk_lazarus.introspection.moe.reports import ParentMatch
from chuk_lazarus.introspection.moe.views import facts
from chuk_lazarus.introspection.moe.views.page import to_page
from chuk_lazarus.introspection.moe.views.words import explain_parent, format_likeness, name_sources


@cache
def analyse(name: str, parent: str | None = "demo:parent") -> MoETypeAnalysis:
    return MoETypeService.analyze(f"demo:{name}", layers="all", parent=parent)


def changed(report: MoETypeAnalysis, *changes: dict[str, object]) -> MoETypeAnalysis:
    """The report with other figures of the parent in each layer."""
    layers = []
    for layer, values in zip(report.layers, changes, strict=True):
        assert layer.lineage.parent
        match = layer.lineage.parent.model_copy(update=values)
        lineage = layer.lineage.model_copy(update={"parent": match})
        layers.append(layer.model_copy(update={"lineage": lineage}))
    return report.model_copy(update={"layers": tuple(layers)})


def match_of(report: MoETypeAnalysis, place: int = 0) -> ParentMatch:
    match = report.layers[place].lineage.parent
    assert match
    return match


def test_rows_name_the_layers_and_how_alike_attention_is() -> None:
    report = analyse("permuted")
    table = facts.list_parents(report)
    assert table.headings == ["Layer", "From", "Found", "Place", "Cosine", "Searched", "Like", "q", "k", "v", "o"]
    for place, row in enumerate(table.rows):
        match = match_of(report, place)
        assert match.attention
        assert row[:3] == [str(place), str(place), "100 %"]
        assert row[5:7] == [f"1 of {match.of_layers}", str(match.attention.layer)]
        assert row[7:] == [format_likeness(match.attention.projections[role].cka) for role in "qkvo"]


def test_what_was_not_found_has_no_place() -> None:
    report = changed(analyse("native"), *2 * [{"kept": 0.0, "layers": {0: 0.0, 1: 0.0}, "attention": None}])
    table = facts.list_parents(report)
    assert [row[1:5] for row in table.rows] == 2 * [["none", "0 %", "–", "–"]]
    assert "Like" not in table.headings


def test_moved_layers_are_named() -> None:
    report = changed(analyse("upcycled"), {"layers": {0: 0.0, 1: 1.0}}, {"layers": {0: 0.4, 1: 0.6}})
    assert "layers moved: 0 from 1, 1 from 0-1" in explain_parent(report)
    assert "moved" not in explain_parent(analyse("upcycled"))


def test_signs_are_told() -> None:
    assert "100.0 % with flipped signs in up and down" in explain_parent(
        changed(analyse("upcycled"), *2 * [{"flipped": 1.0}])
    )
    assert "sign" not in explain_parent(analyse("upcycled"))


def test_sources_are_layers_with_a_good_part() -> None:
    match = match_of(analyse("upcycled"))
    named = [
        name_sources(match.model_copy(update={"layers": layers}))
        for layers in ({0: 0.01, 3: 0.99}, {1: 0.5, 2: 0.3, 7: 0.2}, {0: 0.0})
    ]
    assert named == ["3", "1-2, 7", "none"]


def test_a_likeness_about_zero_has_no_sign() -> None:
    assert [format_likeness(value) for value in (-0.001, 0.001, -0.06, 0.976)] == ["0.00", "0.00", "-0.06", "0.98"]


def test_the_native_demo_is_not_from_the_parent() -> None:
    report = analyse("native")
    assert report.type == "NATIVE"
    assert "the attention is not similar" in explain_parent(report)
    assert "a dense model that it may come from" not in to_page(report)
    assert "a dense model that it may come from" in to_page(analyse("native", None))


def test_the_figure_has_a_square_for_each_pair_of_layers() -> None:
    report = changed(analyse("upcycled"), {"layers": {0: 0.25, 1: 0.75}}, {"layers": {1: 1.0}})
    shares = facts.share_by_layer(report)
    assert (shares.layers, shares.parents) == ([0, 1], [0, 1])
    assert shares.values[0] == [0.25, 0.75]
    assert isnan(shares.values[1][0])
    figure = plot_parents(report)
    neurons, attention = [ax for ax in figure.axes if ax.get_title(loc="left")]
    np.testing.assert_array_equal(neurons.images[0].get_array().filled(np.nan), shares.values)  # type: ignore[union-attr]
    assert {"25 %", "75 %", "100 %"} <= {text.get_text() for text in neurons.texts}
    likeness = [match_of(report, place).attention for place in range(2)]
    assert {text.get_text() for text in attention.texts} == {format_likeness(one.cka) for one in likeness if one}
    assert "layer of the parent" in to_svg(figure)


@pytest.mark.parametrize("layers", [1, 7, 60])
def test_figures_of_any_depth(layers: int) -> None:
    report = analyse("upcycled")
    match = match_of(report).model_copy(update={"layers": {n: n / 60 for n in range(layers)}, "attention": None})
    lineage = report.layers[0].lineage.model_copy(update={"parent": match})
    deep = [report.layers[0].model_copy(update={"layer": n, "lineage": lineage}) for n in range(layers)]
    figure = plot_parents(report.model_copy(update={"layers": tuple(deep)}))
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert len(ax.get_xticks()) <= 12
    assert bool(ax.texts) == (layers == 1)


def test_without_a_parent_there_is_no_figure() -> None:
    with pytest.raises(InvalidRequest, match="no parent"):
        plot_parents(analyse("native", None))


def test_the_page_tells_of_the_parents_layers() -> None:
    page = to_page(analyse("permuted"))
    assert "The parent's layers" in unescape(page)
    assert "layer 0: 100.0 % of the neurons found in layer 0 (1 of 2 layers of the parent searched)" in page
    assert "Searched" in page
    only = analyse("permuted").model_copy(update={"kind": "from this parent, no neuron twice"})
    assert "It was upcycled from the given parent." in to_page(only)
    assert "The parent" not in to_page(analyse("permuted", None))
