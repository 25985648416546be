"""How sure a verdict is: by the weight of its evidence, as fitted to models of known history."""

import json
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.provenance.classifier import (
    CALIBRATION,
    QUICK_CALIBRATION,
    Calibration,
    weigh,
)
from places import ROOT

FITTED = json.loads((ROOT / "experiments/04_unseen_histories/calibration.json").read_text())
CALIBRATIONS = {"type": CALIBRATION, "quick": QUICK_CALIBRATION}
SHARES = st.floats(0, 1)


@pytest.mark.parametrize("rule", CALIBRATIONS)
def test_the_constants_are_the_fitted_ones(rule: str) -> None:
    assert asdict(CALIBRATIONS[rule]) == FITTED[rule]["calibration"]


@pytest.mark.parametrize("rule", CALIBRATIONS)
def test_it_says_more_than_a_constant_of_models_it_was_not_fitted_to(rule: str) -> None:
    found = FITTED[rule]
    assert found["log_loss"] < 0.6 * found["log_loss_of_a_constant"]
    assert found["brier"] < 0.5 * found["brier_of_a_constant"]


@given(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4), st.sampled_from(list(CALIBRATIONS.values())))
def test_more_evidence_is_surer(one: float, other: float, calibration: Calibration) -> None:
    low, high = sorted((one, other))
    assert calibration.floor <= calibration.probability(low) <= calibration.probability(high) <= calibration.ceiling
    assert calibration.decide("UPCYCLED", low).confidence <= calibration.decide("UPCYCLED", high).confidence
    assert calibration.decide("NATIVE", low).confidence >= calibration.decide("NATIVE", high).confidence
    assert calibration.decide("UNDETERMINED", one).confidence == 0.5
    assert calibration.decide("NATIVE", one).confidence >= 0.5


@given(SHARES, SHARES, st.integers(0, 5000))
def test_the_weight_of_shares(one: float, other: float, neurons: int) -> None:
    limits = [(one, 0.1), (other, 0.01)]
    weight = weigh(limits, neurons)
    assert weight == weigh(limits[::-1], neurons) >= 0.5 / (neurons + 1) / 0.01
    assert weight <= weigh([*limits, (1.0, 0.01)], neurons)


def test_that_nothing_is_found_of_few_neurons_says_less() -> None:
    sure, unsure = (CALIBRATION.decide("NATIVE", weigh([(0.0, 0.01)], neurons)) for neurons in (2048, 64))
    assert sure.confidence > unsure.confidence


def test_no_two_models_have_one_confidence(tmp_path: Path) -> None:
    """Copies that drifted apart, and natives of few neurons, are less sure."""

    def analyze(name: str, own: float, neurons: int) -> tuple[str, float]:
        rng, tensors = np.random.default_rng(0), {}
        base = rng.standard_normal((3, neurons, 64))
        for expert in range(4):
            drawn = rng.standard_normal(base.shape)
            for role, matrix in zip(("w1", "w3", "w2"), (1 - own) * base + own * drawn, strict=True):
                values = np.ascontiguousarray(matrix.T if role == "w2" else matrix)
                tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{role}.weight"] = values.astype(
                    ml_dtypes.bfloat16
                )
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "mixtral"}')
        found = MoETypeService.analyze(str(tmp_path / name))
        return found.type, found.confidence

    near, far = analyze("near", 0.2, 128), analyze("far", 0.53, 128)
    assert near[0] == far[0] == "UPCYCLED"
    assert near[1] > far[1]
    many, few = analyze("many", 1.0, 256), analyze("few", 1.0, 24)
    assert many[0] == "NATIVE"
    assert few[0] in ("NATIVE", "UNDETERMINED")
    assert many[1] > few[1]
