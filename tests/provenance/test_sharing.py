"""The verdict by pairs of experts: what must not change it, and histories that are easily mistaken."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from chuk_lazarus.introspection.moe import MoETypeService
from chuk_lazarus.introspection.moe.numerics.pairs import group_partners
from chuk_lazarus.introspection.moe.provenance.lineage import (
    best_partners,
    find_twins,
    pair_evidence,
)
from chuk_lazarus.introspection.moe.views.words import explain, explain_quick
from made_layers import (
    EXPERTS,
    HIDDEN,
    NEURONS,
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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("make", "origin"), [(native, "NATIVE"), (copies, "UPCYCLED")])
def test_what_must_not_change_the_verdict(
    make: Callable[[np.random.Generator], Matrices], origin: str, change: Change, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    model = write(tmp_path / "m", change(rng, make(rng)))
    assert MoETypeService.analyze(model).type == origin
    assert MoETypeService.quick(model).type == origin


@pytest.mark.parametrize("experts", [2, 8, 40])
def test_shares_mean_the_same_for_any_number_of_experts(experts: int) -> None:
    """Half of each expert's neurons are its partner's; no other expert has any of them."""
    rng = np.random.default_rng(1)
    found = native(rng, experts)
    for matrix in found.values():
        matrix[1::2, : NEURONS // 2] = matrix[::2, : NEURONS // 2]
    evidence = pair_evidence(found, None)
    assert evidence.shared == pytest.approx(0.5, abs=0.01)
    assert evidence.strong == pytest.approx(0.5, abs=0.01)
    assert evidence.partners == tuple(expert ^ 1 for expert in range(experts))
    sampled = pair_evidence(found, 512)
    assert sampled.shared == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("experts", "neurons", "hidden", "tied"),
    [
        (2, 512, 64, False),
        (4, 16, 16, False),
        (8, 16, 64, True),
        (16, 32, 32, True),
        (64, 16, 16, False),
        (128, 16, 32, False),
        (3, 64, 8, False),
        (8, 256, 4, False),
        (5, 40, 24, True),
    ],
)
def test_noise_is_never_upcycled(experts: int, neurons: int, hidden: int, tied: bool, tmp_path: Path) -> None:
    for seed in range(3):
        found = native(np.random.default_rng(seed), experts, neurons, hidden)
        if tied:
            found["up"] = found["gate"].copy()
        model = write(tmp_path / str(seed), found)
        assert MoETypeService.analyze(model).type != "UPCYCLED"
        assert MoETypeService.quick(model).type != "UPCYCLED"


@pytest.mark.parametrize("slices", [2, 4, 16])
@pytest.mark.parametrize("by_copy", [True, False])
def test_granular_upcycling_is_seen(slices: int, by_copy: bool, tmp_path: Path) -> None:
    """Every copy of a dense layer is cut in the same slices; two orders of experts."""
    rng = np.random.default_rng(2)
    whole = {role: m.reshape(slices, 32, HIDDEN) for role, m in native(rng, 1, slices * 32).items()}
    number = np.tile(np.arange(slices), 4) if by_copy else np.repeat(np.arange(slices), 4)
    found = {
        role: m[number] + 0.4 * rng.standard_normal((4 * slices, 32, HIDDEN), np.float32) for role, m in whole.items()
    }
    model = write(tmp_path / "m", found)
    report = MoETypeService.analyze(model)
    assert report.type == "UPCYCLED"
    members = (
        f"that are {slices} apart"
        if by_copy
        else {2: "0-3; 4-7", 4: "0-3; 4-7; 8-11; 12-15"}.get(slices, "0-3; 4-7; 8-11; ...")
    )
    assert report.kind == (
        f"copies in {slices} groups of 4, experts {members}: "
        f"4 copies of a layer in {slices} slices, or of {slices} layers"
    )
    assert report.layers[0].lineage.sharing.groups == tuple(
        tuple(np.flatnonzero(number == piece).tolist()) for piece in range(slices)
    )
    assert MoETypeService.quick(model).type == "UPCYCLED"


def test_natives_with_a_base_or_an_adapter_are_not_upcycled(tmp_path: Path) -> None:
    """Independent experts, rebuilt from their mean and deltas of rank 6; and with a rank-2 update that all have."""
    rng = np.random.default_rng(3)
    rebuilt, adapted = native(rng), native(rng)
    for role, matrix in rebuilt.items():
        base = matrix.mean(axis=0)
        left, values, right = np.linalg.svd(matrix - base, full_matrices=False)
        rebuilt[role] = base + (left[:, :, :6] * values[:, None, :6]) @ right[:, :6]
        update = rng.standard_normal((NEURONS, 2)) @ rng.standard_normal((2, HIDDEN))
        adapted[role] = (adapted[role] + 0.6 * update).astype(np.float32)
    for name, found in (("rebuilt", rebuilt), ("adapted", adapted)):
        model = write(tmp_path / name, found)
        assert MoETypeService.analyze(model).type != "UPCYCLED"
        assert MoETypeService.quick(model).type != "UPCYCLED"
    text = repr(MoETypeService.analyze(str(tmp_path / "adapted")))
    assert "NATIVE" in text


def test_identical_experts_are_named_and_counted_once(tmp_path: Path) -> None:
    found = native(np.random.default_rng(4))
    for matrix in found.values():
        matrix[5] = matrix[1]
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    sharing = report.layers[0].lineage.sharing
    assert (report.type, sharing.twins) == ("NATIVE", ((1, 5),))
    assert sharing.identical == ((1, 5),)
    assert report.notes[0] == "layer 0: experts 1, 5 are identical, to the last bit"
    assert "copies of each other: layer 0: experts 1, 5." in str(report)
    assert set(sharing.partners) == set(range(8)) - {5}
    pairs = np.array(sharing.pairs)
    assert pairs[1, 5] == pairs[5, 1] == 1.0
    np.testing.assert_array_equal(np.delete(pairs[1], [1, 5]), np.delete(pairs[5], [1, 5]))


def is_in(report: object, sentence: str) -> bool:
    """Whether a terminal shows the sentence, wherever it breaks lines."""
    console = Console(file=StringIO(), width=100)
    console.print(report)
    return sentence in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([range(8)], "all 8 experts are identical"),
        ([(2, 6)], "experts 2, 6 are identical"),
        ([(0, 4), (1, 2, 7)], "5 experts are identical in 2 groups, experts 0, 4; 1-2, 7"),
        ([(0, 4), (1, 5), (2, 6), (3, 7)], "8 experts are identical in 4 groups, experts that are 4 apart"),
    ],
)
def test_identical_experts_are_noted_wherever_experts_are_looked_at(
    groups: list[tuple[int, ...]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = native(np.random.default_rng(4))
    for matrix in found.values():
        for first, *others in groups:
            matrix[list(others)] = matrix[first]
    write(tmp_path / "model", found)
    monkeypatch.chdir(tmp_path)  # a long name would be folded
    model = "model"
    analysis, quick = MoETypeService.analyze(model), MoETypeService.quick(model)
    comparison = MoETypeService.compare(model, "demo:native")
    wanted = tuple(tuple(group) for group in groups)
    assert analysis.layers[0].lineage.sharing.identical == quick.layers[0].identical == wanted
    note = f"layer 0: {said}, to the last bit"
    assert [each for each in analysis.notes if "identical" in each] == [note]
    assert [each for each in quick.notes if "identical" in each] == [f"{note} of what was read"]
    assert is_in(analysis, note)
    assert is_in(quick, note)
    assert is_in(comparison, f"model: {note}")
    assert not any("identical" in each for each in comparison.models[1].notes)


def test_experts_that_differ_in_one_bit_are_not_identical(tmp_path: Path) -> None:
    """They are one expert, nearly, and noted as that."""
    found = native(np.random.default_rng(4))
    for matrix in found.values():
        matrix[5] = matrix[1]
    last = found["down"][5, -1:, -1:].view(np.uint32)
    last ^= 1
    report = MoETypeService.analyze(write(tmp_path / "m", found))
    assert report.layers[0].lineage.sharing.identical == ()
    assert not any("identical, to the last bit" in note for note in report.notes)


def test_the_same_layers_are_noted_together(tmp_path: Path) -> None:
    found = native(np.random.default_rng(4))
    for matrix in found.values():
        matrix[5] = matrix[1]
    model = write(tmp_path / "m", found, layers=3)
    notes = MoETypeService.analyze(model, layers="all").notes
    assert [note for note in notes if "identical" in note] == [
        "layers 0-2: experts 1, 5 are identical, to the last bit"
    ]
    first = MoETypeService.analyze(model).notes
    assert "layers 1-2: experts 1, 5 are identical, to the last bit of what was read" in first


def test_experts_that_were_merged_in_pairs_are_undetermined(tmp_path: Path) -> None:
    found = {role: np.repeat(matrix, 2, axis=0) for role, matrix in native(np.random.default_rng(5), 4).items()}
    model = write(tmp_path / "m", found)
    assert MoETypeService.analyze(model).type == "UNDETERMINED"
    assert MoETypeService.quick(model).type == "UNDETERMINED"


def test_twins_have_the_same_bits_in_all_roles() -> None:
    found = native(np.random.default_rng(6), 6)
    for role, matrix in found.items():
        matrix[3] = matrix[0]
        matrix[4] = matrix[0]
        if role == "down":
            matrix[4, 0, 0] += 1
        matrix[[1, 5]] = 0
    assert find_twins(found) == ((0, 3),)  # and not those of zeros


def test_twins_differ_nowhere_else() -> None:
    """Only a part of the numbers was kept; the scalar products are of all."""
    rng = np.random.default_rng(6)
    found = native(rng, 4)
    for matrix in found.values():
        matrix[1:] = matrix[0]
    whole = {role: np.tile(rng.standard_normal(500).astype(np.float32), (4, 1)) for role in found}
    whole["up"][2, 7] += 1
    grams = [matrix @ matrix.T for matrix in whole.values()]
    assert find_twins(found) == ((0, 1, 2, 3),)
    assert find_twins(found, grams) == ((0, 1, 3),)
    assert pair_evidence(found, 512, grams=grams).experts == (0, 2)


@pytest.mark.parametrize("change", [shuffle, flip, rescale])
def test_one_expert_in_two_disguises_does_not_make_copies_of_all(change: Change) -> None:
    rng = np.random.default_rng(10)
    evidence = pair_evidence(change(rng, repeat_one(rng, native(rng))), 512)
    assert evidence.twins == ((2, EXPERTS),)
    assert evidence.shared < 0.05
    assert pair_evidence(change(rng, repeat_one(rng, copies(rng))), 512).shared > 0.95
    doubled = {role: np.repeat(matrix, 2, axis=0) for role, matrix in native(rng, 4).items()}
    assert pair_evidence(change(rng, doubled), 512).twins == ()  # of most experts: copies


def test_the_histogram_is_of_the_best_partner(tmp_path: Path) -> None:
    """Of slices, eight evenly spaced experts are eight different ones; the pairs are all copies."""
    rng = np.random.default_rng(9)
    whole = native(rng, 8, 32)
    found = {role: m.repeat(4, axis=0) + 0.4 * native(rng, 32, 32)[role] for role, m in whole.items()}
    matches = MoETypeService.analyze(write(tmp_path / "m", found)).layers[0].lineage.matches
    edges = np.linspace(-1, 1, 51)[:-1]
    assert edges[np.flatnonzero(matches.nearest)].min() > 0.6
    assert edges[np.flatnonzero(matches.runner_up)].max() < 0.5


def test_partners_and_groups() -> None:
    pairs = np.array([[0, 0.2, 0.9, 0], [0.2, 0, 0, 0.8], [0.9, 0, 0, 0.1], [0, 0.8, 0.1, 0]])
    assert best_partners(pairs).tolist() == [2, 3, 0, 1]
    assert best_partners(np.zeros((3, 3))).tolist() == [1, 2, 0]
    assert group_partners(pairs) == ((0, 2), (1, 3))


def test_a_verdict_without_a_kind_is_still_a_sentence() -> None:
    """As when the layers together are UPCYCLED, and none of them by itself."""
    full = MoETypeService.analyze("demo:upcycled").model_copy(update={"kind": None})
    quick = MoETypeService.quick("demo:upcycled").model_copy(update={"kind": None})
    assert explain(full).endswith(". The experts are copies.")
    assert explain_quick(quick).endswith(". The experts are copies or slices.")


def test_a_quick_verdict_on_narrow_experts_says_so(tmp_path: Path) -> None:
    """Not that they are a base plus deltas, which nothing shows."""
    base = native(np.random.default_rng(7), 1, NEURONS, 16)
    found = {role: m + 0.1 * native(np.random.default_rng(8), EXPERTS, NEURONS, 16)[role] for role, m in base.items()}
    quick = MoETypeService.quick(write(tmp_path / "m", found))
    assert quick.type == "UNDETERMINED"
    assert "16 numbers of each neuron's vectors are too few to tell (64 are needed)" in explain_quick(quick)
