"""Histories that are easily mistaken, each made small: what was done to experts must not hide how they came about."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.provenance.lineage import pair_evidence
from made_layers import EXPERTS, HIDDEN, NEURONS, Matrices, copies, flip, native, rescale, shuffle, write


def mix_down(rng: np.random.Generator, found: Matrices) -> Matrices:
    """The neurons' side of each expert's down projection rotated, which a runtime would undo."""
    turns = [np.linalg.qr(rng.standard_normal((matrix.shape[0],) * 2))[0] for matrix in found["down"]]
    mixed = np.stack([turn @ matrix for turn, matrix in zip(turns, found["down"], strict=True)])
    return {**found, "down": mixed.astype(np.float32)}


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_copies_with_mixed_down_projections_are_upcycled(is_shuffled: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = rescale(rng, flip(rng, copies(rng)))
    model = write(tmp_path / "m", mix_down(rng, shuffle(rng, found) if is_shuffled else found))
    report = MoETypeService.analyze(model)
    sharing = report.layers[0].lineage.sharing
    assert report.type == MoETypeService.quick(model).type == "UPCYCLED"
    assert report.kind == f"{'shuffled ' if is_shuffled else ''}copies; the down projections do not agree"
    assert sharing.shared < 0.05
    assert sharing.without_down is not None
    assert sharing.without_down > 0.95
    assert np.array(sharing.pairs)[~np.eye(EXPERTS, dtype=bool)].min() > 0.9


def test_natives_with_mixed_down_projections_are_native(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    assert MoETypeService.analyze(write(tmp_path / "m", mix_down(rng, native(rng)))).type == "NATIVE"


@pytest.mark.parametrize("tied", [("gate", "up"), ("gate", "down"), ("up", "down")])
def test_gate_and_up_alone_are_asked_where_all_three_roles_differ(tied: tuple[str, str]) -> None:
    rng = np.random.default_rng(2)
    found = native(rng)
    assert pair_evidence(found, 512).without_down == pytest.approx(0, abs=0.02)
    found[tied[1]] = found[tied[0]]
    assert pair_evidence(found, 512).without_down is None
    del found["gate"]
    assert pair_evidence(found, 512).without_down is None


@pytest.mark.parametrize(("half", "least", "most"), [("near", 0.45, 0.55), ("far", 0.0, 0.05)])
def test_gate_and_up_alone_count_where_they_are_near(half: str, least: float, most: float) -> None:
    """Half of the neurons have a relative in the other expert; its down column is another."""
    rng = np.random.default_rng(3)
    found = native(rng, 2)
    for role in ("gate", "up"):
        noise = 0.7 if half == "near" else 2.0  # a cosine of 0.82, or 0.45
        found[role][1, : NEURONS // 2] = found[role][0, : NEURONS // 2] + noise * native(rng, 1, NEURONS // 2)[role][0]
    evidence = pair_evidence(found, None)
    assert evidence.shared < 0.05
    assert evidence.without_down is not None
    assert least <= evidence.without_down <= most


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_which_an_eighth_is_left_are_upcycled(seed: int, tmp_path: Path) -> None:
    """Each expert keeps an eighth of its own choice; any two have a sixty-fourth in common."""
    rng = np.random.default_rng(seed)
    base, found = native(rng, 1, 256), native(rng, 8, 256)
    for expert in range(8):
        kept = rng.permutation(256)[:32]
        for role, matrix in found.items():
            matrix[expert, kept] = base[role][0, kept] + 0.1 * matrix[expert, kept]
    report = MoETypeService.analyze(write(tmp_path / "m", shuffle(rng, found)))
    assert report.type == "UPCYCLED"
    assert report.kind
    assert report.kind.removeprefix("shuffled copies, about ")[:4] in ("85 %", "90 %")


def verdicts(path: Path, found: Matrices) -> tuple[str, str]:
    """Full and quick."""
    model = write(path, found)
    return MoETypeService.analyze(model).type, MoETypeService.quick(model).type


def converged(rng: np.random.Generator) -> Matrices:
    """Natives that saw the same text: one neuron in 30 is like one of another expert, with a cosine of 0.65."""
    found = native(rng)
    for number in range(4):
        common = {role: matrix[0, 0] for role, matrix in native(rng, 1, 1).items()}
        for expert in rng.permutation(EXPERTS)[:4]:
            for role, matrix in found.items():
                matrix[expert, 9 * number] = 0.8 * common[role] + 0.6 * matrix[expert, 9 * number]
    return found


def decayed(rng: np.random.Generator) -> Matrices:
    """Natives of few directions, as strong weight decay leaves them: the same ones in all experts, and a little
    noise."""
    found = native(rng)
    for matrix in found.values():
        spread = np.exp(-np.arange(HIDDEN) / 6)
        matrix *= spread
        matrix += 0.02 * rng.standard_normal(matrix.shape)
        matrix @= np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0]
    return found


def tied(rng: np.random.Generator) -> Matrices:
    """Natives of a squared ReLU that is stored as if it were gated."""
    found = native(rng, 16, 32, 32)
    return {**found, "up": found["gate"].copy()}


def merged(rng: np.random.Generator) -> Matrices:
    """Natives of which every two were averaged: half of the experts are left, none of them twice."""
    return {role: (matrix[::2] + matrix[1::2]) / 2 for role, matrix in native(rng, 16).items()}


@pytest.mark.parametrize("make", [converged, decayed, tied, merged], ids=lambda make: make.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_natives_with_something_in_common_are_not_upcycled(
    make: Callable[[np.random.Generator], Matrices], seed: int, tmp_path: Path
) -> None:
    assert "UPCYCLED" not in verdicts(tmp_path / "m", make(np.random.default_rng(seed)))


@pytest.mark.parametrize("rank", [2, 8, 16, 32])
@pytest.mark.parametrize("is_trained", [False, True])
def test_natives_rebuilt_from_a_base_and_deltas_are_not_upcycled(rank: int, is_trained: bool, tmp_path: Path) -> None:
    """The mean of the experts plus a delta of low rank for each, as an overlay exports them."""
    found = (decayed if is_trained else native)(np.random.default_rng(4))
    for role, matrix in found.items():
        base = matrix.mean(axis=0)
        left, values, right = np.linalg.svd(matrix - base, full_matrices=False)
        found[role] = base + (left[:, :, :rank] * values[:, None, :rank]) @ right[:, :rank]
    assert "UPCYCLED" not in verdicts(tmp_path / "m", found)


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_one_base_with_deltas_of_few_directions_is_not_sure(rank: int, tmp_path: Path) -> None:
    """Copies with adapters, or natives through an overlay: of one size, base and deltas don't tell."""
    rng = np.random.default_rng(5)
    found = native(rng, 1)
    for role, matrix in found.items():
        delta = rng.standard_normal((EXPERTS, NEURONS, rank)) @ rng.standard_normal((EXPERTS, rank, HIDDEN))
        found[role] = (matrix + delta / np.sqrt(rank)).astype(np.float32)
    full, quick = verdicts(tmp_path / "m", found)
    assert full == ("UNDETERMINED" if rank < 32 else "UPCYCLED")
    assert quick in ("UNDETERMINED", full)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_natives_with_an_adapter_that_all_have_are_not_upcycled(rank: int, tmp_path: Path) -> None:
    """Of a fifth of their norm."""
    rng = np.random.default_rng(6)
    found = native(rng)
    for matrix in found.values():
        update = rng.standard_normal((NEURONS, rank)) @ rng.standard_normal((rank, HIDDEN))
        matrix += (0.2 * np.linalg.norm(matrix[0]) / np.linalg.norm(update) * update).astype(np.float32)
    assert "UPCYCLED" not in verdicts(tmp_path / "m", found)


@pytest.mark.sample
@pytest.mark.parametrize(("experts", "slices"), [(16, 8), (32, 8), (64, 8), (64, 16), (128, 16)])
@pytest.mark.parametrize("by_copy", [True, False])
@pytest.mark.parametrize("is_disguised", [True, False])
def test_copies_that_were_cut_alike_are_upcycled(
    experts: int, slices: int, by_copy: bool, is_disguised: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    place = np.arange(experts)
    number = place % slices if by_copy else place // (experts // slices)
    whole = native(rng, slices, 16)
    found = {role: m[number] + 0.4 * native(rng, experts, 16)[role] for role, m in whole.items()}
    if is_disguised:
        found = rescale(rng, flip(rng, shuffle(rng, found)))
    model = write(tmp_path / "m", found)
    report = MoETypeService.analyze(model)
    assert report.type == "UPCYCLED"
    groups = report.layers[0].lineage.sharing.groups
    assert groups == tuple(tuple(np.flatnonzero(number == piece).tolist()) for piece in range(slices))
    assert MoETypeService.quick(model).type != "NATIVE"


def test_one_expert_with_all_signs_changed_is_still_a_copy(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    found = {role: matrix[:2] for role, matrix in copies(rng).items()}
    for role in ("up", "down"):
        found[role][1] *= -1
    assert verdicts(tmp_path / "m", found) == ("UPCYCLED", "UPCYCLED")
