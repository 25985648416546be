"""Kinds of upcycling in words: from given shares, and of layers that were made so."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.provenance.kinds import group_experts, name_kind
from chuk_lazarus.introspection.moe.provenance.lineage import PairEvidence
from chuk_lazarus.introspection.moe.text import format_groups
from made_layers import HIDDEN, Matrices, native, shuffle, write


def evidence_of(
    pairs: NDArray[np.float64],
    shared: float = 1.0,
    twins: tuple[tuple[int, ...], ...] = (),
    in_place: float = 1.0,
    strong: float | None = None,
    anywhere: float | None = None,
    without_down: float | None = None,
) -> PairEvidence:
    repeated = {expert for group in twins for expert in group[1:]}
    experts = tuple(e for e in range(len(pairs) + len(repeated)) if e not in repeated)
    none = np.empty(0, np.float32)
    return PairEvidence(
        experts,
        twins,
        1024,
        shared,
        shared if strong is None else strong,
        without_down,
        pairs,
        (),
        in_place,
        shared if anywhere is None else anywhere,
        none,
        none,
        3,
    )


ALL = np.ones((4, 4))
GROUPS = np.kron(np.eye(2), np.ones((3, 3)))
PAIRS = np.kron(np.eye(4), np.ones((2, 2)))
OVERLAP = 0.5 * (np.roll(np.eye(6), 1, axis=1) + np.roll(np.eye(6), -1, axis=1))  # each with two others of five
CUT = np.kron(0.5 * (1 - np.eye(3)), np.ones((2, 2)))  # three copies, each shuffled and cut in two
TWO = "3 copies of a layer in 2 slices, or of 2 layers"


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [
        (evidence_of(ALL), "copies"),
        (evidence_of(ALL, in_place=0.5), "shuffled copies"),
        (evidence_of(0.8 * ALL, 0.8), "copies"),
        (evidence_of(0.7 * ALL, 0.7), "copies, about 30 % of the neurons re-initialised"),  # the same ones in all
        (evidence_of(0.25 * ALL, 0.25, anywhere=0.4375), "copies, about 50 % of the neurons re-initialised"),
        (evidence_of(0.01 * ALL, 0.01, anywhere=0.0271), "copies, about 90 % of the neurons re-initialised"),
        (evidence_of(0.5 * ALL, 0.5, strong=0.2), "copies, partly re-initialised, or trained far apart"),
        (evidence_of(ALL, 0.01, without_down=1.0, anywhere=1.0), "copies; the down projections do not agree"),
        (evidence_of(GROUPS), f"copies in 2 groups of 3, experts 0-2; 3-5: {TWO}"),
        (evidence_of(0.5 * GROUPS, 0.5, in_place=0.0),
         f"shuffled copies in 2 groups of 3, experts 0-2; 3-5: {TWO}, about 50 % of the neurons re-initialised"),
        (evidence_of(PAIRS),
         "copies in 4 pairs, experts 0-1; 2-3; 4-5; 6-7: of a smaller mixture, or 2 copies of a layer in 4 slices"),
        (evidence_of(np.pad(GROUPS[:5, :5], (0, 1))),
         "copies in 2 groups of 2 to 3, experts 0-2; 3-4: slices of a layer, or copies of several; expert 5 apart"),
        (evidence_of(np.pad(ALL, (0, 2))), "copies; experts 4-5 apart"),
        (evidence_of(OVERLAP, 0.5, in_place=0.0, anywhere=1.0), "shuffled slices that overlap"),
        (evidence_of(CUT, 0.5, in_place=0.0, anywhere=1.0),
         "shuffled slices that overlap: 3 copies of a layer, each in 2 slices"),
        (evidence_of(np.ones((1, 1)), 0.0), "identical copies"),
        (evidence_of(np.zeros((2, 2)), 0.0, ((0, 1, 2, 3), (4, 5, 6, 7))),
         "identical copies in 2 groups of 4, experts 0-3; 4-7: 4 copies of a layer in 2 slices, or of 2 layers"),
    ],
)  # fmt: skip
def test_kinds(evidence: PairEvidence, kind: str) -> None:
    assert name_kind(evidence) == kind


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (((0, 1), (2, 3)), "0-1; 2-3"),
        (tuple((2 * i, 2 * i + 1) for i in range(8)), "0-1; 2-3; 4-5; ..."),
        (tuple((i, i + 8) for i in range(8)), "that are 8 apart"),
        (((0, 3), (1, 5), (2, 4)), "0, 3; 1, 5; 2, 4"),
        (((0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 12)), "0, 2, 4, ...; 1, 3, 5, ..."),
    ],
)
def test_names_of_groups(groups: tuple[tuple[int, ...], ...], text: str) -> None:
    assert format_groups(groups) == text


def test_twins_are_of_one_group() -> None:
    twins = ((0, 4), (1, 5))
    assert group_experts(evidence_of(np.zeros((4, 4)), 0.0, twins)) == twins
    assert group_experts(evidence_of(np.zeros((4, 4)), 0.0)) == ()
    both = np.kron(np.eye(2), np.ones((2, 2)))  # of experts 0, 1, 2, 3
    assert group_experts(evidence_of(both, 1.0, twins)) == ((0, 1, 4, 5), (2, 3))


def cut(rng: np.random.Generator, slices: int, is_shuffled: bool) -> Matrices:
    """Two copies of a layer of 256 neurons in slices, half of the neurons of each expert drawn anew."""
    whole = native(rng, 1, 256)
    both = {role: np.repeat(matrix, 2, axis=0) for role, matrix in whole.items()}
    both = shuffle(rng, both) if is_shuffled else both
    return {role: matrix.reshape(2 * slices, -1, HIDDEN) for role, matrix in both.items()}


def near(rng: np.random.Generator, found: Matrices) -> Matrices:
    return {role: matrix + 0.3 * rng.standard_normal(matrix.shape).astype(np.float32) for role, matrix in found.items()}


def test_shuffled_slices_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    report = MoETypeService.analyze(write(tmp_path / "m", near(rng, cut(rng, 2, is_shuffled=True))))
    assert report.kind == "shuffled slices that overlap: 2 copies of a layer, each in 2 slices"


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.75])
def test_the_share_that_was_drawn_anew_is_found(kept: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base, found = native(rng, 1, 256), native(rng, 8, 256)
    for expert in range(8):
        chosen = rng.permutation(256)[: round(256 * kept)]
        for role, matrix in found.items():
            matrix[expert, chosen] = base[role][0, chosen] + 0.3 * matrix[expert, chosen]
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    assert report.kind == f"copies, about {100 * (1 - kept):.0f} % of the neurons re-initialised"


def test_a_small_mixture_with_its_experts_doubled(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    found = near(rng, {role: np.tile(matrix, (2, 1, 1)) for role, matrix in native(rng, 8, 32).items()})
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    assert report.type == "UPCYCLED"
    assert report.kind == (
        "copies in 8 pairs, experts that are 8 apart: of a smaller mixture, or 2 copies of a layer in 8 slices"
    )


def test_copies_of_two_layers_and_an_expert_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    found = near(rng, {role: np.repeat(matrix, 4, axis=0) for role, matrix in native(rng, 2).items()})
    found = {role: np.concatenate([matrix, native(rng, 1)[role]]) for role, matrix in found.items()}
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    assert report.kind == (
        "copies in 2 groups of 4, experts 0-3; 4-7: 4 copies of a layer in 2 slices, or of 2 layers; expert 8 apart"
    )
    assert report.layers[0].lineage.sharing.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
