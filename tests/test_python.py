"""What a person in Python or in a notebook types: it works, or it is one line that says what to do."""

import doctest
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import chuk_lazarus
from chuk_lazarus.introspection import moe
from chuk_lazarus.introspection.moe import (
    Experts,
    InvalidRequest,
    MoECompressionService,
    MoEError,
    MoELayoutService,
    MoESurveyService,
    MoETypeService,
    MoEWeightsService,
    memory_limit,
    plots,
)
from chuk_lazarus.introspection.moe.reports import as_rows
from places import DEMO
from sampling import keep

NATIVE = DEMO / "native"
DOORS = ("moe_type", "moe_survey", "moe_layout", "moe_compression", "moe_weights", "weights.experts")

# Names


def test_the_package_is_imported_at_once() -> None:
    code = "import sys, chuk_lazarus; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "scipy", "pydantic", "rich", "typer", "matplotlib"} & set(eval(done.stdout))


@pytest.mark.parametrize("package", [chuk_lazarus, moe], ids=lambda package: package.__name__)
def test_dir_has_every_public_name(package: object) -> None:
    names = dir(package)
    assert names == sorted(set(names))
    assert set(package.__all__) <= set(names)  # type: ignore[attr-defined]
    assert {"__doc__", "__name__", "plots"} <= set(names)
    public = [name for name in names if not name.startswith("_") and name not in ("Any", "TYPE_CHECKING")]
    needs_mlx = {"load_overlay", "overlay_classes", "OverlayMoE"}
    assert all(hasattr(package, name) for name in public if name not in needs_mlx)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chuk_lazarus.no_such_name


def test_the_short_names_are_the_services() -> None:
    assert chuk_lazarus.analyze is MoETypeService.analyze
    assert chuk_lazarus.compare is MoETypeService.compare
    assert chuk_lazarus.survey is MoESurveyService.survey
    assert chuk_lazarus.layout is MoELayoutService.describe
    assert chuk_lazarus.shrink is MoECompressionService.compress


def test_shrink_writes_a_checkpoint(tmp_path: Path) -> None:
    done = chuk_lazarus.shrink(DEMO / "permuted", tmp_path / "small", bits=2.25)
    assert done.bytes_after < done.bytes_before
    assert (tmp_path / "small/config.json").exists()


@pytest.mark.parametrize("door", ["", *DOORS])
def test_the_examples_in_docstrings_run(door: str) -> None:
    module = import_module(f"{moe.__name__}.{door}" if door else "chuk_lazarus")
    found = doctest.testmod(module)
    assert found.attempted
    assert found.failed == 0


# What works


def test_a_path_is_a_model(tmp_path: Path) -> None:
    analysis = MoETypeService.analyze(NATIVE, parent=DEMO / "parent")
    assert (analysis.model, analysis.type, analysis.parent) == (str(NATIVE), "NATIVE", str(DEMO / "parent"))
    assert MoETypeService.quick(NATIVE).model == str(NATIVE)
    assert MoELayoutService.describe(NATIVE).experts == 8
    assert MoECompressionService.compute(NATIVE, ranks={"gate": 1, "up": 1, "down": 1}).model == str(NATIVE)
    assert Experts.open(NATIVE).layers == (0, 1)
    assert [model.type for model in MoETypeService.compare(NATIVE, "demo:upcycled").models] == ["NATIVE", "UPCYCLED"]


@pytest.mark.parametrize(
    "models",
    keep(
        ["demo:native", Path("demo:native"), ["demo:native"], (Path("demo:native"),)],
        "demo:native",
        (Path("demo:native"),),
    ),
)
def test_a_survey_takes_one_model_or_several(models: object) -> None:
    assert [row.request.model for row in MoESurveyService.survey(models, layers=0).rows] == ["demo:native"]  # type: ignore[arg-type]


def test_all_experts_one_layer_and_one_share() -> None:
    one = MoETypeService.analyze("demo:native", experts="all", layers=0, variance=0.9)
    assert len(one.layers[0].lineage.experts) == 8
    assert list(one.layers[0].projections["gate"].rank) == ["0.90", "0.95"]
    same = MoETypeService.analyze("demo:native", experts=None, layers=[0], variance=[0.9])
    assert one.layers == same.layers


@pytest.mark.parametrize("layers", [1, np.int64(1), np.array([1]), range(1, 2), "1"])
def test_numbers_of_layers(layers: object) -> None:
    quick = MoETypeService.quick("demo:native", layers=layers)  # type: ignore[arg-type]
    assert [layer.layer for layer in quick.layers] == [1]


def test_experts_can_be_looked_at() -> None:
    experts = Experts.open("demo:native")
    assert repr(experts) == "Experts('demo:native', w1_w3_w2, layers 0-1)"
    assert len(experts) == 2
    assert [layer.number for layer in experts] == [0, 1]
    layer = experts.layer(0)
    assert repr(layer) == "ExpertLayer(0, 8 experts, gate and up 128 x 64)"
    assert len(layer) == 8
    for number, matrices in enumerate(layer):
        np.testing.assert_array_equal(matrices["down"], layer.matrices(number)["down"])


# What a report shows


@cache
def reports() -> dict[str, Any]:
    """One of each kind; what has to be written comes from `shrink`."""
    with TemporaryDirectory() as folder:
        shrunk = chuk_lazarus.shrink("demo:upcycled", Path(folder, "overlay"), bits=2.25)
        exported = MoECompressionService.export(shrunk.folder, Path(folder, "export"))
    return {
        "analysis": MoETypeService.analyze("demo:native", layers="all"),
        "quick": MoETypeService.quick("demo:native"),
        "comparison": MoETypeService.compare("demo:native", "demo:permuted"),
        "survey": MoESurveyService.survey(["demo:native", "no/such/model"]),
        "plan": MoESurveyService.plan(["demo:native"]),
        "layout": MoELayoutService.describe("demo:native"),
        "overlay": MoECompressionService.compute("demo:upcycled", target_ratio=2),
        "verification": MoECompressionService.verify("demo:upcycled", max_error=0.05),
        "estimate": MoECompressionService.estimate("demo:upcycled", samples=1),
        "compression": shrunk,
        "export": exported,
        "weights": MoEWeightsService.verify("demo:native", DEMO / "native"),
    }


KINDS = (
    *("analysis", "quick", "comparison", "survey", "plan", "layout", "overlay", "verification", "estimate"),
    *("compression", "export", "weights"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_print_is_short(kind: str) -> None:
    report = reports()[kind]
    lines = str(report).splitlines()
    assert 1 <= len(lines) <= 6
    assert sum(map(len, lines)) < 800
    assert "=" not in lines[0]  # pydantic's way
    assert repr(report) == f"<{type(report).__name__} {lines[0]}>"
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_print_says_the_verdict() -> None:
    assert str(reports()["analysis"]).startswith("demo:native: NATIVE (")
    assert "demo:permuted: UPCYCLED (" in str(reports()["comparison"])
    assert "2 models, 1 failed" in str(reports()["survey"])
    assert "layer" in repr(reports()["analysis"].layers[0])  # parts of a report are shown as they were


def test_a_long_survey_prints_a_part() -> None:
    survey = reports()["survey"]
    many = survey.model_copy(update={"rows": survey.rows * 50})
    assert len(str(many).splitlines()) == 12
    assert str(many).endswith("... and 90 more")


WITHOUT = """
import sys; sys.modules[sys.argv[1]] = None  # what Python does for a module that can't be had
from chuk_lazarus import MoEError, analyze
try:
    getattr(analyze("demo:native"), sys.argv[2])()
except MoEError as error:
    print(error)
"""


@pytest.mark.parametrize(("library", "method"), [("pandas", "to_frame"), ("matplotlib", "plot")])
def test_what_is_not_installed_is_named(library: str, method: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, library, method], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert f"pip install {library}" in done.stdout


ROWS = {"analysis": 2, "quick": 2, "comparison": 2, "survey": 2, "plan": 1, "layout": 2, "overlay": 1}


@pytest.mark.parametrize("kind", [*ROWS, "verification", "estimate", "weights"])
def test_to_frame(kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    report = reports()[kind]
    frame = report.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(as_rows(report)) == ROWS.get(kind, len(as_rows(report)))
    assert frame.columns[0] == "model"


def test_rows_are_what_the_report_says() -> None:
    report = reports()["analysis"]
    rows = as_rows(report)
    for row, layer in zip(rows, report.layers, strict=True):
        assert (row["model"], row["layer"], row["type"]) == ("demo:native", layer.layer, layer.type)
        assert row["shared"] == layer.lineage.sharing.shared
        assert row["gate_rank"] == layer.projections["gate"].rank["0.95"]
        assert row["cosine"] == layer.cosine.mean
    answered, failed = as_rows(reports()["survey"])
    assert (answered["type"], answered["error"]) == ("NATIVE", None)
    assert failed["type"] is None
    assert "no/such/model" in failed["error"]
    assert all(
        not isinstance(value, dict | list | tuple)
        for kind in ROWS
        for row in as_rows(reports()[kind])
        for value in row.values()
    )


@pytest.mark.parametrize("kind", ["compression", "export"])
def test_what_is_no_table_says_so(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a table"):
        reports()[kind].to_frame()


@pytest.mark.parametrize("kind", ["analysis", "comparison", "estimate", "weights"])
def test_a_report_plots_itself(kind: str) -> None:
    report = reports()[kind]
    assert len(report.plot().axes) >= 1
    figure = Figure()
    ax = figure.subplots()
    assert report.plot(ax=ax) is figure
    assert ax.has_data()
    assert report.plot(caption=True).get_supxlabel()
    assert report.plot(dark=True).get_facecolor()[:3] < (0.2, 0.2, 0.2)


def test_what_has_no_figure_says_so() -> None:
    with pytest.raises(InvalidRequest, match="has no figure"):
        reports()["layout"].plot()


# What does not

FIRST = Experts.open("demo:native").layer(0)
analyze, survey = MoETypeService.analyze, MoESurveyService.survey
compute, verify = MoECompressionService.compute, MoECompressionService.verify
WRONG: dict[str, Callable[[], object]] = {
    "expert 99": lambda: FIRST.matrices(99),
    "kind 'router'": lambda: Experts.open("demo:native", "router"),  # type: ignore[arg-type]
    "experts of a name": lambda: Experts("demo:native"),  # type: ignore[arg-type]
    "no figure": lambda: plots.save(3, "figure.png"),  # type: ignore[arg-type]
    "format 'gguf' of a smaller copy": lambda: chuk_lazarus.shrink("demo:native", "f", bits=4, format="gguf"),  # type: ignore[arg-type]
    "format 'gguf' of an export": lambda: MoECompressionService.export("demo:native", "f", format="gguf"),  # type: ignore[arg-type]
    "expert -1": lambda: FIRST.matrices(-1),
    "expert 'a'": lambda: FIRST.matrices("a"),  # type: ignore[arg-type]
    "biases of expert 8": lambda: FIRST.biases(8),
    "layer 99": lambda: Experts.open("demo:native").layer(99),
    "layer None": lambda: Experts.open("demo:native").layer(None),  # type: ignore[arg-type]
    "no experts' model": lambda: Experts.open(3),  # type: ignore[arg-type]
    "model None": lambda: analyze(None),  # type: ignore[arg-type]
    "model of bytes": lambda: analyze(b"demo:native"),  # type: ignore[arg-type]
    "model of a list": lambda: analyze(["demo:native"]),  # type: ignore[arg-type]
    "model that is empty": lambda: analyze(""),
    "parent 3": lambda: analyze("demo:native", parent=3),  # type: ignore[arg-type]
    "layer 'x'": lambda: analyze("demo:native", layer="x"),  # type: ignore[arg-type]
    "layers True": lambda: analyze("demo:native", layers=True),
    "layers 0.5": lambda: analyze("demo:native", layers=[0.5]),  # type: ignore[list-item]
    "layers []": lambda: analyze("demo:native", layers=[]),
    "layers 'x'": lambda: analyze("demo:native", layers="x"),
    "experts 'some'": lambda: analyze("demo:native", experts="some"),  # type: ignore[arg-type]
    "experts 0": lambda: analyze("demo:native", experts=0),
    "variance 'x'": lambda: analyze("demo:native", variance="x"),  # type: ignore[arg-type]
    "variance 2": lambda: analyze("demo:native", variance=2),
    "variance None": lambda: analyze("demo:native", variance=None),  # type: ignore[arg-type]
    "dask 3": lambda: analyze("demo:native", dask=3),  # type: ignore[arg-type]
    "nothing to compare": lambda: MoETypeService.compare(),
    "budget 1.5": lambda: MoETypeService.quick("demo:native", budget=1.5),  # type: ignore[arg-type]
    "layout of None": lambda: MoELayoutService.describe(None),  # type: ignore[arg-type]
    "survey of 3": lambda: survey(3),  # type: ignore[arg-type]
    "survey of [3]": lambda: survey([3]),  # type: ignore[list-item]
    "survey of nothing": lambda: survey([]),
    "jobs 'x'": lambda: survey("demo:native", jobs="x"),  # type: ignore[arg-type]
    "jobs 0": lambda: survey("demo:native", jobs=0),
    "file 3": lambda: survey("demo:native", file=3),  # type: ignore[arg-type]
    "energy 'x'": lambda: compute("demo:native", energy="x"),  # type: ignore[arg-type]
    "energy None": lambda: compute("demo:native", energy=None),  # type: ignore[arg-type]
    "bits True": lambda: compute("demo:native", bits=True),
    "fit {}": lambda: compute("demo:native", fit={}),  # type: ignore[arg-type]
    "ranks 3": lambda: compute("demo:native", ranks=3),  # type: ignore[arg-type]
    "ranks of no role": lambda: compute("demo:native", ranks={"gat": 3}),
    "rank 's'": lambda: compute("demo:native", ranks={"gate": "s"}),  # type: ignore[dict-item]
    "text 3": lambda: compute("demo:native", bits=2.25, calibrate=3),  # type: ignore[arg-type]
    "inputs 0": lambda: verify("demo:native", inputs=0),
    "seed -1": lambda: verify("demo:native", seed=-1),
    "tolerance 'a'": lambda: verify("demo:native", tolerance="a"),  # type: ignore[arg-type]
    "samples -2": lambda: MoECompressionService.estimate("demo:native", samples=-2),
    "folder 3": lambda: chuk_lazarus.shrink("demo:native", 3),  # type: ignore[arg-type]
    "overlay 3": lambda: MoECompressionService.export(3, "folder"),  # type: ignore[arg-type]
    "original 3": lambda: MoEWeightsService.verify("demo:native", 3),  # type: ignore[arg-type]
    "factor 'a'": lambda: MoEWeightsService.verify("demo:native", "demo:native", tolerance="a"),  # type: ignore[arg-type]
    "compared 0": lambda: MoEWeightsService.verify("demo:native", "demo:native", experts=0),
    "memory []": lambda: memory_limit([]).__enter__(),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_what_can_not_be_is_one_line(what: str) -> None:
    with pytest.raises(MoEError) as caught:
        WRONG[what]()
    assert "\n" not in str(caught.value)
    assert caught.value.hint or "no model" in caught.value.message


def test_a_message_quotes_no_more_than_the_beginning() -> None:
    with pytest.raises(InvalidRequest) as caught:
        analyze(["x" * 10**6])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250


def test_in_a_text_but_not_in_a_path_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    os.symlink(NATIVE, tmp_path / "native")
    os.symlink(NATIVE, tmp_path / "~native")
    assert Experts.open("~/native").layers == (0, 1)
    assert Experts.open(Path("~native")).layers == (0, 1)
    with pytest.raises(MoEError):
        Experts.open(Path("~/native"))
