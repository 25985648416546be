"""What sharing saves, as reports tell it: copies, shuffled ones, natives, slices, and files of earlier versions."""

from functools import cache
from io import StringIO
from math import log2
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from chuk_lazarus.introspection.moe import (
    MoECompressionService,
    MoESurveyService,
    MoETypeAnalysis,
    MoETypeService,
    MoETypeSurvey,
)
from chuk_lazarus.introspection.moe.reports import MoEOverlayEstimate, Report, SurveyRow
from chuk_lazarus.introspection.moe.views.page import to_page
from chuk_lazarus.introspection.moe.views.words import explain_saving
from made_layers import HIDDEN, copies, native, shuffle, write
from sampling import keep

PLAIN = "Not by a shared base: the experts have too little in common. Use plain quantisation."


@cache
def analysis(model: str) -> MoETypeAnalysis:
    return MoETypeService.analyze(model, layers="all")


@cache
def estimate(model: str) -> MoEOverlayEstimate:
    return MoECompressionService.estimate(model)


def show(report: Report) -> str:
    text = StringIO()
    Console(width=200, file=text).print(report)
    return text.getvalue()


def test_shuffled_copies_save_what_unshuffled_ones_do() -> None:
    plain, permuted = analysis("demo:upcycled"), analysis("demo:permuted")
    for here, there in zip(plain.layers, permuted.layers, strict=True):
        for role, one in here.projections.items():
            other = there.projections[role]
            assert one.aligned_delta_energy == pytest.approx(other.aligned_delta_energy, rel=1e-3)
            assert one.aligned_delta_energy == pytest.approx(one.delta_energy, rel=0.01)
            assert one.bits_saved == pytest.approx(other.bits_saved, abs=1e-3)
            assert one.aligned_delta_energy is not None
            assert one.bound is not None
            by_formula = 0.5 * log2(1 / one.aligned_delta_energy) - 4 / 8
            assert one.bits_saved == pytest.approx(min(one.bound, by_formula), abs=1e-9)
            assert by_formula - one.bound < 0.15
    assert permuted.bits_saved == pytest.approx(plain.bits_saved, abs=1e-3)
    assert (plain.bits_saved or 0) > 1.5


def test_natives_save_nothing() -> None:
    native_model = analysis("demo:native")
    assert native_model.bits_saved == 0
    for layer in native_model.layers:
        for one in layer.projections.values():
            assert one.bits_saved == pytest.approx(-0.4, abs=0.05)
            assert one.bound == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("model", ["demo:upcycled", "demo:permuted", "demo:native"])
def test_the_estimate_finds_the_same(model: str) -> None:
    """By groups that it finds itself."""
    found = estimate(model)
    assert found.bits_saved == pytest.approx(analysis(model).bits_saved, abs=1e-3)
    for layer, one in zip(found.layers, analysis(model).layers, strict=True):
        assert layer.sharing is not None
        for role, rate in layer.sharing.items():
            assert rate.bits_saved == pytest.approx(one.projections[role].bits_saved, abs=1e-3)
            assert rate.bound == pytest.approx(one.projections[role].bound, abs=1e-3)


def test_layers_that_were_not_measured_lie_between() -> None:
    found = MoECompressionService.estimate("demo:upcycled", layers=[0])
    measured, other = found.layers
    assert measured.bits_saved == found.bits_saved
    assert other.sharing is other.bits_saved is None


@pytest.mark.parametrize("by_copy", [True, False])
@pytest.mark.parametrize("is_shuffled", [True, False])
def test_slices_have_a_base_each(by_copy: bool, is_shuffled: bool, tmp_path: Path) -> None:
    """Four slices of a layer, each copied four times, in both orders of experts."""
    rng = np.random.default_rng(2)
    whole = {role: m.reshape(4, 32, HIDDEN) for role, m in native(rng, 1, 128).items()}
    number = np.tile(np.arange(4), 4) if by_copy else np.repeat(np.arange(4), 4)
    found = {role: m[number] + 0.4 * native(rng, 16, 32)[role] for role, m in whole.items()}
    model = write(tmp_path / "m", shuffle(rng, found) if is_shuffled else found)
    share = 0.16 * 0.75 / 1.16
    saved = 0.5 * log2(1 / share) - 4 * 4 / 16
    report, estimated = MoETypeService.analyze(model), MoECompressionService.estimate(model)
    for one in report.layers[0].projections.values():
        assert one.aligned_delta_energy == pytest.approx(share, rel=0.1)
        assert one.bits_saved == pytest.approx(saved, abs=0.06)
        assert one.delta_energy > 0.5
    assert report.bits_saved == pytest.approx(saved, abs=0.05)
    assert estimated.bits_saved == pytest.approx(report.bits_saved, abs=1e-3)


def test_identical_experts_leave_the_base_alone(tmp_path: Path) -> None:
    found = {role: np.repeat(m, 8, axis=0) for role, m in native(np.random.default_rng(0), 1).items()}
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    assert report.bits_saved == pytest.approx(3.5, abs=0.01)
    assert "At 0.5 bits instead of 4" in explain_saving(report)


def test_experts_of_zeros_save_what_can_be_told(tmp_path: Path) -> None:
    found = {role: np.zeros_like(m) for role, m in native(np.random.default_rng(0), 4, 32).items()}
    assert MoETypeService.analyze(write(tmp_path / "m", found)).bits_saved == 0


def test_one_shuffled_expert_among_many_is_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    found = copies(rng)
    moved = rng.permutation(found["up"].shape[1])
    for matrix in found.values():
        matrix[5] = matrix[5, moved]
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    for one in report.layers[0].projections.values():
        assert one.aligned_delta_energy == pytest.approx(0.35**2 * 7 / 8 / (1 + 0.35**2), rel=0.1)


def test_the_sentence() -> None:
    """196,608 weights at 4 bits are 98.3 kB a layer."""
    model = analysis("demo:upcycled")
    bits = 4 - (model.bits_saved or 0)
    needed = 2 * 196_608 * bits / 8 / 1000
    assert explain_saving(model) == (
        f"Yes: a shared base saves about {model.bits_saved:.1f} bits per weight at the same error. "
        f"At {bits:.1f} bits instead of 4, all 2 layers take {needed:.1f} kB instead of 196.6 kB."
    )
    assert explain_saving(analysis("demo:native")) == explain_saving(estimate("demo:native")) == PLAIN
    assert explain_saving(estimate("demo:upcycled")) == explain_saving(model)
    one = model.model_copy(update={"moe_layers": (0,), "layers": model.layers[:1], "original_bytes": 393_216})
    assert explain_saving(one).endswith("instead of 98.3 kB.")


@pytest.mark.parametrize("model", keep(["demo:upcycled", "demo:native"], "demo:upcycled"))
def test_the_sentence_is_shown_everywhere(model: str) -> None:
    for report in (analysis(model), estimate(model)):
        assert explain_saving(report) in show(report)
    assert explain_saving(analysis(model)) in to_page(analysis(model)).replace("\u00a0", " ")
    assert explain_saving(analysis(model)) in analysis(model)._repr_html_().replace("\u00a0", " ")


@pytest.mark.parametrize(("model", "is_low_rank"), [("demo:lora", True), ("demo:upcycled", False)])
def test_low_rank_deltas_save_more(model: str, is_low_rank: bool) -> None:
    for report in (analysis(model), estimate(model)):
        assert explain_saving(report).endswith("low rank, more can be saved.") == is_low_rank


def test_reports_of_earlier_versions_are_shown_without() -> None:
    new = analysis("demo:upcycled").model_dump(mode="json")
    del new["bits_saved"]
    for layer in new["layers"]:
        for one in layer["projections"].values():
            for key in ("aligned_delta_energy", "bits_saved", "bound"):
                del one[key]
    old = MoETypeAnalysis.model_validate(new)
    assert explain_saving(old) == ""
    assert old.bits_saved is None
    assert "Sharing" not in show(old)
    assert "–" in show(old)
    assert to_page(old)
    before = estimate("demo:native").model_dump(mode="json")
    del before["bits_saved"]
    for layer in before["layers"]:
        del layer["sharing"], layer["bits_saved"]
    assert "Aligned" not in show(MoEOverlayEstimate.model_validate(before))


def test_rows_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """And a survey of new and old ones has a column, with nothing in it for the old."""
    file = tmp_path / "rows.jsonl"
    survey = MoESurveyService.survey(["demo:upcycled", "demo:native"], file=file)
    assert [round(row.answer.bits_saved or 0, 1) for row in survey.rows if row.answer] == [2.1, 0.0]
    assert "Saved" in show(survey)
    data = survey.rows[0].model_dump(mode="json")
    del data["answer"]["bits_saved"]
    old = SurveyRow.model_validate(data)
    assert old.answer is not None
    assert old.answer.bits_saved is None
    assert "Saved" in show(MoETypeSurvey(rows=(old, survey.rows[1])))
    assert "Saved" not in show(MoETypeSurvey(rows=(old,)))
