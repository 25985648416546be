"""Codes where deltas are of low rank: factors by what they err, and bits as before where they are of none."""

import json
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

import chuk_lazarus
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.hull import lower_hull
from chuk_lazarus.introspection.moe.overlays.alignment import align_layer
from chuk_lazarus.introspection.moe.overlays.bit_budget import BitRule
from chuk_lazarus.introspection.moe.overlays.codes import LayerCodes
from chuk_lazarus.introspection.moe.overlays.codes.bits import BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from chuk_lazarus.introspection.moe.overlays.factor_budget import measure_tails, participation
from chuk_lazarus.introspection.moe.overlays.trials import RoleTrial, predict_error, try_layer
from chuk_lazarus.introspection.moe.weights.experts import Experts
from sampling import keep

HIDDEN, INTERMEDIATE, EXPERTS, RANK = 128, 256, 8, 4
NAMES = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}


def plant(folder: Path, rank: int, delta: float = 0.3) -> str:
    """One layer of Mixtral whose experts are a Gaussian matrix and deltas of a rank, 0 for all ranks."""
    draw = np.random.default_rng(rank)

    def gaussian(out: int, inner: int) -> NDArray[np.float32]:
        return draw.standard_normal((out, inner), dtype=np.float32)

    def draw_delta(out: int, inner: int) -> NDArray[np.float32]:
        return gaussian(out, rank) @ gaussian(rank, inner) / np.float32(rank**0.5) if rank else gaussian(out, inner)

    tensors = {}
    for name, shape in NAMES.items():
        base = gaussian(*shape)
        for expert in range(EXPERTS):
            matrix = base + np.float32(delta) * draw_delta(*shape)
            tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix
    demo = Path(chuk_lazarus.__file__).parent / "demo" / "upcycled" / "config.json"
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(json.loads(demo.read_text()) | sizes))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def try_model(name: str) -> dict[int, dict[str, RoleTrial]]:
    resources, experts = Resources.current(), Experts.open(name)
    layers = [experts.layer(number) for number in experts.layers]
    return {layer.number: try_layer(layer, align_layer(layer, resources), resources) for layer in layers}


@cache
def demo_trials() -> dict[int, dict[str, RoleTrial]]:
    return try_model("demo:upcycled")


def bits_of(found: dict[int, dict[str, RoleTrial]], codes: dict[int, LayerCodes]) -> float:
    each = [(codes[number][role], trial) for number, roles in found.items() for role, trial in roles.items()]
    weights = sum(trial.experts * prod(trial.shape) for _, trial in each)
    return 8 * sum(code.nbytes(trial.shape, trial.experts) for code, trial in each) / weights


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 1.0)), min_size=1, max_size=30), st.floats(0, 1))
def test_no_mix_of_two_points_is_below_the_hull(points: list[tuple[int, float]], part: float) -> None:
    prices, losses = zip(*points, strict=True)
    chosen = lower_hull(prices, losses)
    on_hull = [prices[place] for place in chosen], [losses[place] for place in chosen]
    assert all(np.diff(on_hull[0]) > 0)
    assert all(np.diff(on_hull[1]) < 0)
    assert on_hull[0][0] == min(prices)
    assert on_hull[1][-1] == min(losses)
    (first, lost), (second, left) = points[0], points[-1]
    price, loss = part * first + (1 - part) * second, part * lost + (1 - part) * left
    assert loss >= float(np.interp(price, *on_hull)) - 1e-9


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_tails_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) ** 3
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    tails = measure_tails(delta)
    assert tails[0] == 1
    assert list(tails)[-1] == 30
    for rank, tail in tails.items():
        assert tail == pytest.approx(values[rank:].sum() / values.sum(), abs=1e-5)
    assert measure_tails(np.zeros(shape, np.float32)) == {}


def test_noise_has_all_directions_and_factors_have_few() -> None:
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((128, 256), dtype=np.float32)
    assert participation(rows) == pytest.approx(1, rel=0.05)
    assert participation(rows[:, :8] @ rows[:8]) == pytest.approx(8 / (128 * 256 / 385), rel=0.3)
    assert participation(np.zeros_like(rows)) == 1


@pytest.mark.parametrize("bits", keep([1.2, 1.6, 2.1], 1.6))
def test_deltas_of_low_rank_get_factors_and_err_less(bits: float, tmp_path: Path) -> None:
    """Than with bits alone, both coded and rebuilt."""
    model = plant(tmp_path, RANK)
    trials = try_model(model)
    codes = BitRule(bits).choose(trials)
    assert all(isinstance(code.delta, FactorsCode | SumCode) for code in codes[0].values())
    assert 0.995 * bits <= bits_of(trials, codes) <= bits
    coded = MoECompressionService.compute(model, layers="all", bits=bits)
    assert coded.layers[0].weight_error == pytest.approx(predict_error(trials[0], codes[0]), rel=0.1)
    flat = MoECompressionService.compute(plant(tmp_path, 0), layers="all", bits=bits)  # errs as its bits do
    assert coded.layers[0].weight_error < 0.5 * flat.layers[0].weight_error


@pytest.mark.parametrize("bits", [1.2, 1.6, 2.1, 3.0])
def test_deltas_of_all_ranks_get_one_width_or_two_that_are_neighbours(bits: float, tmp_path: Path) -> None:
    trials = try_model(plant(tmp_path, 0))
    assert not any(trial.spectrum for trial in trials[0].values())
    assert all(trial.has_base for trial in trials[0].values())
    codes = [code.delta for code in BitRule(bits).choose(trials)[0].values()]
    widths = [code.rest if isinstance(code, SumCode) else code for code in codes]
    levels = {code.levels for code in widths if isinstance(code, BitsCode)}
    assert len(levels) + any(isinstance(code, FactorsCode) for code in widths) <= 2
    assert sum(isinstance(code, SumCode) for code in codes) <= 1


@pytest.mark.parametrize("bits", keep([1.3, 1.6, 2.1, 3.1], 1.3, 3.1))
def test_what_factors_err_is_as_measured(bits: float) -> None:
    codes = BitRule(bits).choose(demo_trials())
    assert any(isinstance(code.delta, FactorsCode | SumCode) for layer in codes.values() for code in layer.values())
    measured = MoECompressionService.compute("demo:upcycled", layers="all", bits=bits)
    for (number, roles), layer in zip(demo_trials().items(), measured.layers, strict=True):
        assert predict_error(roles, codes[number]) == pytest.approx(layer.weight_error, rel=0.1)


@pytest.mark.parametrize("bits", [1.3, 2.1, 3.1])
def test_what_factors_leave_may_be_in_a_trellis(bits: float) -> None:
    chosen = [BitRule(bits, trellis=trellis).choose(demo_trials()) for trellis in (True, False)]
    codes = [code.delta for layer in chosen[0].values() for code in layer.values()]
    assert not any(isinstance(code, BitsCode) for code in codes)
    assert not any(isinstance(code.rest, BitsCode) for code in codes if isinstance(code, SumCode))
    errors = [[predict_error(roles, each[n]) for n, roles in demo_trials().items()] for each in chosen]
    assert np.linalg.norm(errors[0]) <= np.linalg.norm(errors[1])


@pytest.mark.parametrize("error", [0.05, 0.15])
def test_a_greatest_error_is_met_by_bits_alone(error: float) -> None:
    """What factors leave is in few directions: at equal errors of weights outputs err more."""
    codes = BitRule(max_error=error).choose(demo_trials())
    assert max(predict_error(roles, codes[number]) for number, roles in demo_trials().items()) <= error
    assert all(isinstance(code.delta, BitsCode) for layer in codes.values() for code in layer.values())
