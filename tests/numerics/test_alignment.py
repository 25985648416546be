"""Neurons in one order: recovered where they were shuffled, left where they are, and the function is the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe.numerics import alignment
from chuk_lazarus.introspection.moe.numerics.alignment import align, keep_order, permute, permute_vectors
from chuk_lazarus.introspection.moe.numerics.forward import run_expert
from made_layers import EXPERTS, NEURONS, Matrices, copies, flip, native, rescale, scale_columns
from sampling import examples

SEEDS = st.integers(0, 2**32 - 1)
IN_PLACE = np.tile(np.arange(NEURONS), (EXPERTS, 1))


def shuffled(rng: np.random.Generator, found: Matrices) -> tuple[Matrices, np.ndarray]:
    """All experts but the first in an order of their own, and the permutations that undo it."""
    orders = np.stack([rng.permutation(found["up"].shape[1]) for _ in found["up"]])
    orders[0] = np.arange(orders.shape[1])
    return {role: np.take_along_axis(m, orders[:, :, None], axis=1) for role, m in found.items()}, orders.argsort(
        axis=1
    )


@given(SEEDS, st.sampled_from(["plain", "lengths", "columns"]))
@settings(deadline=None, max_examples=examples(15))
def test_shuffled_copies_are_recovered_exactly(seed: int, how: str) -> None:
    rng = np.random.default_rng(seed)
    change = {"plain": lambda rng, found: found, "lengths": rescale, "columns": scale_columns}[how]
    found, orders = shuffled(rng, change(rng, copies(rng)))
    aligned = align(found)
    assert aligned.groups == (tuple(range(EXPERTS)),)
    np.testing.assert_array_equal(aligned.permutations, orders)
    assert not aligned.is_identity


def test_distant_copies_are_recovered_by_the_mean() -> None:
    """Of cosine 0.3 to each other, with vectors as long as they are kept of a large layer."""
    rng = np.random.default_rng(0)
    base = native(rng, 1, 256, 128)
    copied = {role: m + 1.5 * native(rng, EXPERTS, 256, 128)[role] for role, m in base.items()}
    found, orders = shuffled(rng, copied)
    recovered = align(found, [tuple(range(EXPERTS))]).permutations == orders
    assert recovered.mean() > 0.99


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_what_is_in_order_stays(sigma: float) -> None:
    rng = np.random.default_rng(1)
    base = native(rng, 1)
    found = {role: m + np.float32(sigma) * native(rng)[role] for role, m in base.items()}
    assert align(found).is_identity


def test_natives_stay_as_one_group() -> None:
    aligned = align(native(np.random.default_rng(2)))
    assert aligned.is_identity
    assert aligned.groups == (tuple(range(EXPERTS)),)


def test_copies_with_neurons_drawn_anew_stay_in_order_and_are_recovered() -> None:
    rng = np.random.default_rng(3)
    copied, fresh = copies(rng), native(rng)
    is_fresh = rng.random((EXPERTS, NEURONS, 1)) < 0.5
    found = {role: np.where(is_fresh, fresh[role], m) for role, m in copied.items()}
    assert align(found).is_identity
    moved, orders = shuffled(rng, found)
    aligned = align(moved)
    is_copy = ~is_fresh[..., 0] & ~is_fresh[0, :, 0]
    assert (aligned.permutations == orders)[is_copy].mean() > 0.97
    np.testing.assert_array_equal(np.sort(aligned.permutations, axis=1), IN_PLACE)


@given(SEEDS)
@settings(deadline=None, max_examples=examples(10))
def test_a_permuted_expert_computes_the_same(seed: int) -> None:
    """Exactly: numbers of few bits, whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (24, 16), "up": (24, 16), "down": (16, 24)}
    matrices = {role: rng.integers(-4, 5, shape).astype(np.float32) for role, shape in shapes.items()}
    biases = {role: rng.integers(-4, 5, shape[0]).astype(np.float32) for role, shape in shapes.items()}
    inputs = rng.integers(-3, 4, (10, 16)).astype(np.float32)
    order = rng.permutation(24)
    permuted = {role: permute(role, matrix, order) for role, matrix in matrices.items()}
    moved = {role: permute(role, bias, order) for role, bias in biases.items()}
    before, after = (run_expert(inputs, m, b, "relu") for m, b in ((matrices, biases), (permuted, moved)))
    np.testing.assert_array_equal(before, after)


def test_slices_are_aligned_within_their_groups() -> None:
    """Experts 0, 2, 4, 6 are shuffled copies of one slice, the others of another; and one expert is apart."""
    rng = np.random.default_rng(4)
    slices = native(rng, 2)
    noise, stranger = native(rng), native(rng, 1)
    copied = {
        role: np.concatenate([np.tile(m, (4, 1, 1)) + 0.35 * noise[role], stranger[role]]) for role, m in slices.items()
    }
    found, orders = shuffled(rng, copied)
    groups = ((0, 2, 4, 6), (1, 3, 5, 7), (8,))
    aligned = align(found)
    assert aligned.groups == align(found, groups[:2]).groups == groups
    np.testing.assert_array_equal(aligned.permutations, align(found, groups[:2]).permutations)
    undone = permute_vectors(np.broadcast_to(orders.argsort(axis=1)[:, :, None], (9, NEURONS, 1)), aligned)[..., 0]
    np.testing.assert_array_equal(undone[::2][:4], np.tile(undone[0], (4, 1)))
    np.testing.assert_array_equal(undone[1::2], np.tile(undone[1], (4, 1)))
    np.testing.assert_array_equal(aligned.permutations[8], np.arange(NEURONS))


def test_a_reference_that_is_a_stranger_is_passed_over() -> None:
    rng = np.random.default_rng(5)
    copied, stranger = copies(rng), native(rng, 1)
    found, _ = shuffled(rng, {role: np.concatenate([stranger[role], m]) for role, m in copied.items()})
    aligned = align(found, [tuple(range(9))])
    energies = permute_vectors(found["up"], aligned)[1:]
    assert np.square(energies - energies.mean(axis=0)).sum() < 0.2 * np.square(energies).sum()


def test_signs_are_left_as_they_are() -> None:
    """A neuron with another sign in up and down is no place for it: the delta would be larger than the expert."""
    rng = np.random.default_rng(6)
    assert align(flip(rng, copies(rng)), [tuple(range(EXPERTS))]).is_identity


def test_zeros_and_tied_roles_do_no_harm() -> None:
    rng = np.random.default_rng(7)
    found, orders = shuffled(rng, copies(rng))
    found["gate"] = found["up"]
    for matrix in found.values():
        matrix[3] = 0
    with np.errstate(all="raise"):
        aligned = align(found)
    others = np.delete(np.arange(EXPERTS), 3)
    np.testing.assert_array_equal(aligned.permutations[others], orders[others])


def test_blocks_of_assignment_make_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    copied, fresh = copies(rng), native(rng)
    found, _ = shuffled(
        rng, {role: np.concatenate([m[:, :64], fresh[role][:, 64:]], axis=1) for role, m in copied.items()}
    )
    monkeypatch.setattr(alignment, "ASSIGNED", 10)
    monkeypatch.setattr(alignment, "BLOCK", 7 * NEURONS)
    np.testing.assert_array_equal(np.sort(align(found).permutations, axis=1), IN_PLACE)


def test_no_groups_are_one() -> None:
    assert keep_order(3, 4).groups == ((0, 1, 2),)
    assert keep_order(4, 4, [(1, 3)]).groups == ((0,), (1, 3), (2,))
    assert keep_order(4, 4).is_identity


def test_vectors_that_are_too_short_say_nothing() -> None:
    rng = np.random.default_rng(9)
    found, _ = shuffled(rng, {role: m[..., :7] for role, m in copies(rng).items()})
    assert align(found).is_identity
