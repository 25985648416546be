"""The embedded models, against the figures that their training script took with full SVDs in float64."""

import json
from typing import Any

import pytest

from chuk_lazarus.introspection.moe import MoECompressionService, MoETypeService
from places import ROOT

RULE = {
    "upcycled": ("UNDETERMINED", 0.5),
    "native": ("NATIVE", 1.0),
    "permuted": ("NATIVE", 0.96),
    "lora": ("UPCYCLED", 0.76),
}
VERDICTS = {
    "upcycled": ("UPCYCLED", "copies"),
    "native": ("NATIVE", None),
    "permuted": ("UPCYCLED", "shuffled copies"),
    "lora": ("UPCYCLED", "copies"),
}
RESULTS = json.loads((ROOT / "experiments/demo_models/results.json").read_text())


@pytest.mark.parametrize("name", list(VERDICTS))
def test_figures_equal_those_of_the_training_script(name: str) -> None:
    report = MoETypeService.analyze(f"demo:{name}", layers="all", experts=None)
    expected: list[dict[str, Any]] = RESULTS["oracle"][name]["layers"]
    assert len(report.layers) == len(expected)
    for layer, oracle in zip(report.layers, expected, strict=True):
        for role, projection in layer.projections.items():
            assert projection.rank_ratio == pytest.approx(oracle["rank95"][role], abs=1e-9)
            assert getattr(layer.cosine, role) == pytest.approx(oracle["cosine"][role], abs=1e-5)
        assert layer.cosine.std == pytest.approx(oracle["cosine_std"]["down"], abs=1e-5)


def test_the_verdict_on_known_histories() -> None:
    """Right about all; the documented rule is right about the native one and the adapters only: see RESULTS.md."""
    found = {name: MoETypeService.analyze(f"demo:{name}", layers="all", experts=None) for name in VERDICTS}
    assert {name: (report.type, report.kind) for name, report in found.items()} == VERDICTS
    rules = {name: report.documented_rule for name, report in found.items()}
    assert {name: (rule.type, round(rule.confidence, 2)) for name, rule in rules.items()} == RULE
    assert rules["native"].why is None
    assert "high rank" in (rules["upcycled"].why or "")
    assert "position" in (rules["permuted"].why or "")


@pytest.mark.parametrize("name", list(VERDICTS))
def test_a_dense_parent_is_recognised(name: str) -> None:
    report = MoETypeService.analyze(f"demo:{name}", layers="all", parent="demo:parent")
    for layer in report.layers:
        parent = layer.lineage.parent
        assert parent is not None
        assert (parent.kept > 0.99) == (name != "native")
        assert parent.chance < 0.01
        if name != "native":
            assert parent.cosine > 0.9
            assert (parent.in_place > 0.99) == (name != "permuted")


def test_adapters_of_one_parent_pay_as_an_overlay() -> None:
    """At 2 bits a weight, experts that are a dense layer and a LoRA adapter err less than half as much as at 4."""
    estimate = MoECompressionService.estimate("demo:lora", layers="all", experts=None)
    rows = {row.bits: row for row in estimate.ladder}
    four_bits = next(row.quantisation for row in estimate.same_bytes if row.bits == 4)
    assert all(row.best == "coded" for row in rows.values())
    assert (rows[2].coded or 1.0) < four_bits / 2
    assert estimate.ratio > 2.5  # in bfloat16, of low rank
