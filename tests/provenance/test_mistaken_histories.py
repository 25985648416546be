"""Histories that are easily mistaken, each made small: what was done to experts must not hide how they came about."""

from pathlib import Path

import numpy as np
import pytest

from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.provenance.lineage import pair_evidence
from made_layers import EXPERTS, NEURONS, Matrices, copies, flip, native, rescale, shuffle, write


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
