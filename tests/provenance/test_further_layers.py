"""An analysis of one layer looks into parts of two further ones: what is read, what they say, and who decides."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoELayoutService, MoETypeAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.jobs.parts import further_budget, further_layers
from chuk_lazarus.introspection.moe.provenance.classifier import Verdict, combine
from chuk_lazarus.introspection.moe.views.words import explain, explain_further

HIDDEN, NEURONS, EXPERTS = 128, 144, 8
NAMES = ("w1", "w3", "w2")


def write_model(folder: Path, kinds: Sequence[str], broken: int | None = None) -> str:
    """Mixtral's names, a layer for each kind: copies, noise, or copies of a few of the neurons."""
    rng, tensors = np.random.default_rng(0), {}
    for layer, kind in enumerate(kinds):
        base = rng.standard_normal((3, NEURONS, HIDDEN))
        for expert in range(EXPERTS):
            own = rng.standard_normal((3, NEURONS, HIDDEN))
            matrices = {"copies": 0.95 * base + 0.3 * own, "noise": own, "few": own}[kind]
            if kind == "few":  # strong matches, as many as leave the verdict open
                matrices[:, :1] = base[:, :1]
            for name, matrix in zip(NAMES, matrices, strict=True):
                values = matrix.T if name == "w2" else matrix
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)
    if broken is not None:
        tensors[f"model.layers.{broken}.block_sparse_moe.experts.0.w1.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": len(kinds)}))
    return str(folder)


def said(analysis: MoETypeAnalysis) -> Mapping[int, str]:
    layers = {layer.layer: layer.type for layer in analysis.layers}
    return layers | {part.layer: part.type for part in analysis.further_layers}


@pytest.mark.parametrize(
    ("count", "first", "further"), [(1, 0, ()), (2, 0, (1,)), (3, 0, (1, 2)), (9, 0, (4, 8)), (58, 3, (31, 60))]
)
def test_a_middle_and_the_last_layer(count: int, first: int, further: tuple[int, ...]) -> None:
    assert further_layers(tuple(range(first, first + count)), first) == further


def test_by_default_three_layers(tmp_path: Path) -> None:
    model = write_model(tmp_path, ["copies"] * 5)
    analysis = MoETypeService.analyze(model)
    assert [layer.layer for layer in analysis.layers] == [0]
    assert said(analysis) == {0: "UPCYCLED", 2: "UPCYCLED", 4: "UPCYCLED"}
    assert analysis.kind == "copies"  # which a part can't tell from slices
    assert MoETypeAnalysis.model_validate(analysis.model_dump(mode="json")) == analysis


@pytest.mark.parametrize("chosen", [{"layer": 0}, {"layers": "0"}, {"layers": [0, 3]}, {"layers": "all"}], ids=str)
def test_no_further_layers_where_some_are_asked_for(tmp_path: Path, chosen: dict[str, int | str | list[int]]) -> None:
    model = write_model(tmp_path, ["noise"] * 4)
    assert MoETypeService.analyze(model, **chosen).further_layers == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "origin", "words"),
    [
        (["noise", "noise", "noise"], "NATIVE", "read in part"),
        (["few", "noise", "noise"], "NATIVE", "in common"),
        (["noise", "copies", "noise"], "UPCYCLED", "further apart"),
        (["copies", "noise", "noise"], "UPCYCLED", "further apart"),
        (["few", "copies", "copies"], "UPCYCLED", "too far apart"),
    ],
)
def test_who_decides(tmp_path: Path, kinds: list[str], origin: str, words: str) -> None:
    analysis = MoETypeService.analyze(write_model(tmp_path, kinds))
    assert analysis.type == origin
    assert words in explain_further(analysis)
    assert f"layer 1 {said(analysis)[1]}" in explain_further(analysis)
    decides_elsewhere = analysis.layers[0].type != origin
    assert ("further layers below decide" in explain(analysis)) == decides_elsewhere
    assert (analysis.kind is None) == (origin != "UPCYCLED")


def test_narrow_layers_differ_for_want_of_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HIDDEN", 32)
    analysis = MoETypeService.analyze(write_model(tmp_path, ["copies"] * 3))
    assert said(analysis) == {0: "UPCYCLED", 1: "UNDETERMINED", 2: "UNDETERMINED"}
    assert "32 numbers" in explain_further(analysis)


def test_each_combination_of_verdicts() -> None:
    native, upcycled, unsure = (Verdict(origin, 0.9) for origin in ("NATIVE", "UPCYCLED", "UNDETERMINED"))
    for whole, parts, may_be_native, expected in [
        (native, None, True, native),
        (native, unsure, True, native),
        (native, upcycled, True, upcycled),
        (upcycled, native, True, upcycled),
        (unsure, native, True, native),
        (unsure, native, False, unsure),
        (unsure, unsure, True, unsure),
        (unsure, upcycled, False, upcycled),
    ]:
        assert combine(whole, parts, may_be_native) is expected


def test_bytes_grow_by_half_at_most(tmp_path: Path) -> None:
    model = write_model(tmp_path, ["noise"] * 4)
    alone, usual = MoETypeService.analyze(model, layer=0), MoETypeService.analyze(model)
    layout = MoELayoutService.describe(model)
    stored = alone.layers[0].stored_bytes
    assert layout.further_layers == (2, 3) == tuple(part.layer for part in usual.further_layers)
    assert layout.analysis_bytes == stored + layout.further_bytes
    assert 0.9 * layout.further_bytes < usual.cost.bytes_read - alone.cost.bytes_read <= layout.further_bytes
    assert layout.further_bytes <= stored // 2
    assert further_budget(10**12) == 64_000_000  # of large models the further layers cost next to nothing


def test_a_further_layer_that_can_not_be_read_is_a_note(tmp_path: Path) -> None:
    analysis = MoETypeService.analyze(write_model(tmp_path, ["noise"] * 3, broken=2))
    assert [part.layer for part in analysis.further_layers] == [1]
    (note,) = (note for note in analysis.notes if note.startswith("layer 2 was not read: "))
    assert "NaN" in note


def test_the_table_says_what_each_layer_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = write_model(tmp_path, ["noise", "copies", "noise"])
    assert run(["introspect", "moe-expert", "moe-type-analyze", "-m", model]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Further layer 1 UPCYCLED" in text
    assert "The further layers below decide. Layer 0 alone would be NATIVE" in text
    assert run(["introspect", "moe-expert", "moe-layout", "-m", model]) == 0
    assert "of layers 1-2)" in " ".join(capsys.readouterr().out.split())
