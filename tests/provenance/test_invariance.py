"""What must not change the verdict, in any combination, full and quick; and noise of any shape."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chuk_lazarus.introspection.moe import MoETypeService
from made_layers import (
    Change,
    Matrices,
    add_unrelated,
    copies,
    flip,
    native,
    reorder_experts,
    repeat_one,
    rescale,
    scale_columns,
    scale_one_column,
    shuffle,
    write,
)
from sampling import examples

SEEDS = st.integers(0, 2**32 - 1)
CHANGES: list[Change] = [
    shuffle,
    rescale,
    flip,
    scale_one_column,
    scale_columns,
    reorder_experts,
    repeat_one,
    add_unrelated,
]


def judge(found: Matrices) -> tuple[str, str]:
    """The full and the quick verdict."""
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder) / "m", found)
        return MoETypeService.analyze(model).type, MoETypeService.quick(model).type


def is_judged(changes: Sequence[Change]) -> bool:
    """Several scales together make the deltas of copies look as if they had few directions: UNDETERMINED."""
    return len({scale_one_column, scale_columns, rescale} & set(changes)) < 2


@pytest.mark.parametrize(("make", "origin"), [(native, "NATIVE"), (copies, "UPCYCLED")])
@given(seed=SEEDS, changes=st.lists(st.sampled_from(CHANGES), min_size=2, max_size=5, unique=True).filter(is_judged))
@settings(max_examples=examples(12))
def test_what_must_not_change_the_verdict_in_any_order(
    make: Callable[[np.random.Generator], Matrices], origin: str, seed: int, changes: Sequence[Change]
) -> None:
    rng = np.random.default_rng(seed)
    found = make(rng)
    for change in changes:
        found = change(rng, found)
    assert judge(found) == (origin, origin)


@given(
    seed=SEEDS,
    experts=st.integers(2, 128),
    neurons=st.integers(16, 64),
    hidden=st.sampled_from([8, 16, 32, 64, 96]),
    tied=st.sampled_from(["", "up", "down"]),
    tail=st.sampled_from([1, 3]),
)
@settings(max_examples=examples(25))
def test_noise_of_any_shape_is_never_upcycled(
    seed: int, experts: int, neurons: int, hidden: int, tied: str, tail: int
) -> None:
    found = {
        role: matrix**tail for role, matrix in native(np.random.default_rng(seed), experts, neurons, hidden).items()
    }
    if tied:
        found[tied] = found["gate"].copy()
    assert "UPCYCLED" not in judge(found)
