"""Matching neurons of all pairs of experts: against a loop over single neurons, and blind to what it should be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from chuk_lazarus.introspection.moe.numerics import pairs
from chuk_lazarus.introspection.moe.numerics.pairs import (
    LEAD,
    PairMatches,
    are_mutual,
    connected_experts,
    match_neurons,
    nearest_of_all_roles,
    prepare_neurons,
)
from sampling import examples

Matrices = dict[str, NDArray[np.float32]]
ROLES = ("gate", "up", "down")
SEEDS = st.integers(0, 2**32 - 1)


def experts(rng: np.random.Generator, count: int = 3, neurons: int = 24, inputs: int = 32) -> Matrices:
    return {role: rng.standard_normal((count, neurons, inputs), np.float32) for role in ROLES}


def everywhere(roles: Matrices) -> NDArray[np.intp]:
    count, neurons, _ = roles["up"].shape
    return np.tile(np.arange(neurons), (count, 1))


def find(roles: Matrices) -> PairMatches:
    prepared = prepare_neurons(roles)
    return match_neurons(prepared, everywhere(roles))


@given(SEEDS, st.sampled_from(["plain", "rows", "signs", "columns", "one column", "direction", "all"]))
@settings(deadline=None, max_examples=examples(40))
def test_a_copy_is_found_whatever_hides_it(seed: int, how: str) -> None:
    """The second expert is the first, shuffled; all experts are disguised, each neuron in its own way."""
    rng = np.random.default_rng(seed)
    roles = experts(rng, neurons=48, inputs=64)
    order = rng.permutation(48)
    for matrix in roles.values():
        matrix[1] = matrix[0, order]
    if how in ("rows", "all"):
        roles = {role: m * np.exp(rng.normal(0, 2, (3, 48, 1))).astype(np.float32) for role, m in roles.items()}
    if how in ("signs", "all"):
        sign = rng.choice(np.float32([-1, 1]), (3, 48, 1))
        roles = {role: matrix if role == "gate" else matrix * sign for role, matrix in roles.items()}
    if how in ("columns", "all"):
        roles = {role: m * np.exp(rng.normal(0, 1.5, 64)).astype(np.float32) for role, m in roles.items()}
    if how == "one column":
        for matrix in roles.values():
            matrix[..., rng.integers(64)] *= 30
    if how == "direction":
        roles = {role: m + 0.5 * rng.standard_normal(64).astype(np.float32) for role, m in roles.items()}
    found = find(roles)
    in_first = found.neuron[48:96, 0]
    assert (in_first == order).mean() > 0.9
    assert (found.lead[48:96, 0][in_first == order] >= LEAD).mean() > 0.9
    is_found = (found.neuron[96:, :2] >= 0) & (found.lead[96:, :2] >= LEAD)
    assert is_found.mean() < 0.05  # the third is unrelated


@given(SEEDS, st.booleans())
@settings(deadline=None, max_examples=examples(40))
def test_the_nearest_of_all_roles_by_a_loop(seed: int, is_gated: bool) -> None:
    rng = np.random.default_rng(seed)
    roles = ROLES if is_gated else ROLES[1:]
    cosines = {role: rng.uniform(-1, 1, (12, 5)).astype(np.float32) for role in roles}
    for matrix in cosines.values():
        matrix[::2, 2] += 1  # else three roles hardly ever agree
    found = nearest_of_all_roles(cosines, is_gated)
    for query in range(12):
        by_sign = []
        for sign in (1, -1) if is_gated else (1,):
            signed = {role: row[query] * (1 if role == "gate" else sign) for role, row in cosines.items()}
            mean = np.mean([signed[role] for role in roles], axis=0)
            places = {int(row.argmax()) for row in signed.values()}
            agreed = places.pop() if len(places) == 1 and min(row.max() for row in signed.values()) > 0 else -1
            by_sign.append((mean, agreed))
        best = np.max([mean for mean, _ in by_sign], axis=0)
        place = int(best.argmax())
        sign_taken = int(np.argmax([mean[place] for mean, _ in by_sign]))
        agreed = by_sign[sign_taken][1]
        assert found.neuron[query] == (place if agreed == place else -1)
        assert found.cosine[query] == pytest.approx(best[place], abs=1e-6)
        assert found.lead[query] == pytest.approx(best[place] - np.delete(best, place).max(), abs=1e-6)


def test_one_neuron_leads_by_all_there_is() -> None:
    found = nearest_of_all_roles({"up": np.float32([[0.5]])}, is_gated=False)
    assert (found.neuron[0], found.cosine[0], found.lead[0]) == (0, 0.5, 1.5)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = experts(np.random.default_rng(0))
    whole = find(roles)
    monkeypatch.setattr(pairs, "BLOCK", 5 * 24)
    cut = find(roles)
    np.testing.assert_array_equal(cut.neuron, whole.neuron)
    np.testing.assert_allclose(cut.cosine, whole.cosine, atol=1e-6)


def test_equal_roles_count_once() -> None:
    """One role agrees with itself, which proves nothing; up to a sign, too."""
    roles = experts(np.random.default_rng(1))
    for tied in (roles["up"], -roles["up"], 3 * roles["up"]):
        assert list(prepare_neurons({**roles, "gate": tied})) == ["gate", "down"]
    assert list(prepare_neurons(roles)) == list(ROLES)


def test_zeros_stay_zeros_and_are_found_nowhere() -> None:
    roles = experts(np.random.default_rng(2))
    for matrix in roles.values():
        matrix[:, 3] = 0
    prepared = prepare_neurons(roles)
    assert not any(matrix[:, 3].any() for matrix in prepared.values())
    assert (find(roles).neuron[3::24] == -1).all()


def test_found_is_mutual_or_not() -> None:
    """All of the first expert's neurons lie near one of the second, which is near to one of them only."""
    rng = np.random.default_rng(3)
    roles = experts(rng, count=2)
    for matrix in roles.values():
        matrix[0, 1:6] = matrix[1, 7] + 0.7 * rng.standard_normal((5, 32), np.float32)
        matrix[0, 2] = matrix[1, 7]
    prepared = prepare_neurons(roles)
    positions = np.array([[1, 2, 3], [0, 7, 8]])
    neurons = np.array([[7, 7, 7], [-1, 2, -1]], np.int32)
    mutual = are_mutual(prepared, positions, np.array([1, 0]), neurons)
    np.testing.assert_array_equal(mutual, [[False, True, False], [False, True, False]])


@given(st.integers(0, 12), st.floats(0.0, 0.4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=examples(60))
def test_connected_experts_are_the_components_of_the_graph(count: int, density: float, seed: int) -> None:
    alike = np.random.default_rng(seed).random((count, count)) < density
    number, labels = connected_components(alike, directed=False)
    expected = tuple(tuple(np.flatnonzero(labels == label)) for label in range(number))
    assert connected_experts(alike) == expected


def test_a_long_chain_of_experts_is_connected() -> None:
    assert connected_experts(np.eye(300, k=1, dtype=bool)) == (tuple(range(300)),)
