"""Neurons looked for in another set: against a loop over single neurons, and blind to what may differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.numerics import search
from chuk_lazarus.introspection.moe.numerics.pairs import LEAD, agreement_chance
from chuk_lazarus.introspection.moe.numerics.search import find_neurons, prepare_queries, prepare_role
from sampling import examples

Neurons = dict[str, NDArray[np.float32]]  # role -> [neurons, inputs]
ROLES = ("gate", "up", "down")
SEEDS = st.integers(0, 2**32 - 1)


def draw(rng: np.random.Generator, count: int, inputs: int = 32) -> Neurons:
    return {role: rng.standard_normal((count, inputs), np.float32) for role in ROLES}


def find(queries: Neurons, neurons: Neurons) -> search.Found:
    return find_neurons(prepare_queries(queries), {role: prepare_role(matrix) for role, matrix in neurons.items()})


@given(SEEDS, st.booleans(), st.sampled_from([1, 5, 200]))
@settings(max_examples=examples(30))
def test_as_one_neuron_after_the_other(seed: int, gated: bool, count: int) -> None:
    """Some queries are neurons of the pool, with noise, and some of these have the other sign in up and down."""
    rng = np.random.default_rng(seed)
    pool, queries = draw(rng, 40), draw(rng, count)
    for place in range(0, count, 2):
        sign = rng.choice([-1, 1])
        for role in ROLES:
            noisy = pool[role][place % 40] + 0.5 * rng.standard_normal(32)
            queries[role][place] = noisy if role == "gate" else sign * noisy
    roles = ROLES if gated else ROLES[1:]
    asked = prepare_queries({role: queries[role] for role in roles})
    neurons = {role: prepare_role(pool[role]) for role in roles}
    found = find_neurons(asked, neurons)
    for place in range(count):
        cosines = {role: neurons[role] @ asked[role][place] for role in roles}
        signs = (1, -1) if gated else (1,)
        best, near, flip = max(
            (np.mean([m[n] * (sign if role != "gate" and gated else 1) for role, m in cosines.items()]), n, sign)
            for n in range(40)
            for sign in signs
        )
        turned = {role: m * (flip if role != "gate" and gated else 1) for role, m in cosines.items()}
        others = [
            max(np.mean([m[n] * (s if role != "gate" and gated else 1) for role, m in cosines.items()]) for s in signs)
            for n in range(40)
            if n != near
        ]
        agree = all(int(m.argmax()) == near and m[near] > 0 for m in turned.values())
        lead = best - max(others)
        if abs(lead - LEAD) < 1e-5:
            continue
        assert found.neuron[place] == (near if agree and lead >= LEAD else -1)
        assert found.cosine[place] == pytest.approx(best, abs=1e-5)
        if found.neuron[place] >= 0:
            assert found.is_flipped[place] == (flip < 0)


@given(SEEDS)
@settings(max_examples=examples(20))
def test_columns_may_be_scaled_on_one_side(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = draw(rng, 96)
    scale = np.exp(rng.normal(0, 1.5, 32)).astype(np.float32)
    queries = {role: matrix[:64] * (1 if role == "down" else scale) for role, matrix in pool.items()}
    assert np.mean(find(queries, pool).neuron == np.arange(64)) > 0.95


@pytest.mark.parametrize("block", [64, 1000, 10**6])
def test_blocks_make_no_difference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pool, queries = draw(rng, 50), draw(rng, 70)
    whole = find(queries, pool)
    monkeypatch.setattr(search, "BLOCK", block)
    parts = find(queries, pool)
    np.testing.assert_array_equal(parts.neuron, whole.neuron)
    np.testing.assert_allclose(parts.cosine, whole.cosine, rtol=1e-5)
    assert parts.chance == pytest.approx(whole.chance)


@pytest.mark.parametrize("gated", [True, False])
def test_chance_is_how_often_unrelated_neurons_agree(gated: bool) -> None:
    """A lead is asked for beside, so that fewer are found; with a gate, up and down may have either sign."""
    rng = np.random.default_rng(1)
    pool, queries = ({role: m[role] for role in ROLES[not gated :]} for m in (draw(rng, 8, 16), draw(rng, 4000, 16)))
    found = find(queries, pool)
    assert found.chance == pytest.approx(2 / 8**2 if gated else 1 / 8, rel=0.3)
    assert 0.3 * found.chance < np.mean(found.neuron >= 0) < found.chance


def test_equal_roles_count_once() -> None:
    rng = np.random.default_rng(2)
    queries, pool = draw(rng, 4000, 16), draw(rng, 8, 16)
    tied = find({**queries, "up": queries["gate"]}, {**pool, "up": pool["gate"]})
    assert tied.chance == pytest.approx(1 / 8, rel=0.3)


def test_agreement_by_its_definition() -> None:
    nearest = np.array([[0, 0, 1, 2], [0, 1, 1, 2]])
    assert agreement_chance(nearest, np.ones(4, bool), 3) == pytest.approx(0.5 * 0.25 + 0.25 * 0.5 + 0.25 * 0.25)
    assert agreement_chance(nearest, np.zeros(4, bool), 3) == 0.0
