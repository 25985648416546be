"""Matching neurons: against closed forms and against made layers whose history is known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.stats import binomtest, norm

from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.numerics.neurons import Nearest, draw_neurons, find_nearest, join
from chuk_lazarus.introspection.moe.provenance.classifier import (
    LINEAGE,
    classify_by_neurons,
    is_alike_in_place,
)
from chuk_lazarus.introspection.moe.provenance.lineage import (
    Evidence,
    find_groups,
    match_evidence,
)
from places import FIXTURES

Matrices = dict[str, NDArray[np.float32]]  # role -> [experts, neurons, inputs]
EXPERTS, NEURONS, HIDDEN = 8, 256, 48
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


def dense(rng: np.random.Generator, neurons: int = NEURONS) -> Matrices:
    return {role: rng.standard_normal((1, neurons, HIDDEN), np.float32) for role in SHORT}


def copies(rng: np.random.Generator) -> Matrices:
    return {role: np.repeat(matrix, EXPERTS, axis=0) for role, matrix in dense(rng).items()}


def shuffled(rng: np.random.Generator, found: Matrices | None = None) -> Matrices:
    found = found or copies(rng)
    orders = [rng.permutation(len(expert)) for expert in found["up"]]
    return {role: np.stack([e[o] for e, o in zip(m, orders, strict=True)]) for role, m in found.items()}


def noisy(rng: np.random.Generator) -> Matrices:
    return {role: m + 0.6 * rng.standard_normal(m.shape, np.float32) for role, m in shuffled(rng).items()}


def half_redrawn(rng: np.random.Generator) -> Matrices:
    found = copies(rng)
    for expert in range(EXPERTS):
        chosen = rng.permutation(NEURONS)[: NEURONS // 2]
        for matrix in found.values():
            matrix[expert, chosen] = rng.standard_normal((len(chosen), HIDDEN), np.float32)
    return found


def sliced(rng: np.random.Generator) -> Matrices:
    """Two copies, each cut into four slices after a shuffle."""
    whole = dense(rng, 4 * NEURONS)
    parts = [shuffled(rng, whole) for _ in range(2)]
    return {role: np.concatenate([p[role].reshape(4, NEURONS, HIDDEN) for p in parts]) for role in SHORT}


def native(rng: np.random.Generator) -> Matrices:
    return {role: rng.standard_normal((EXPERTS, NEURONS, HIDDEN), np.float32) for role in SHORT}


def with_common_direction(rng: np.random.Generator) -> Matrices:
    """Independent experts whose neurons all lean the same way: they are alike, and not the same."""
    return {role: m + 3 * rng.standard_normal(HIDDEN).astype(np.float32) for role, m in native(rng).items()}


def with_hubs(rng: np.random.Generator) -> Matrices:
    """Independent experts, each with one neuron that points where most others do."""
    found = with_common_direction(rng)
    for matrix in found.values():
        matrix[:, 0] = 100 * matrix.mean(axis=1)
    return found


def with_scales(rng: np.random.Generator) -> Matrices:
    """Independent experts whose neurons' lengths differ a thousandfold, alike in all experts."""
    lengths = np.exp(rng.uniform(-3.5, 3.5, (1, NEURONS, 1))).astype(np.float32)
    return {role: m * lengths for role, m in native(rng).items()}


def trained_apart(rng: np.random.Generator) -> Matrices:
    """In place a tenth of the energy is common: far too little for a neuron to be found."""
    found = native(rng)
    return {role: m + 0.33 * common for (role, m), common in zip(found.items(), dense(rng).values(), strict=True)}


def padded(rng: np.random.Generator, found: Matrices | None = None) -> Matrices:
    """Independent experts whose last neurons are zeros, as where a width was rounded up."""
    found = found or native(rng)
    for matrix in found.values():
        matrix[:, -16:] = 0
    return found


def pruned(rng: np.random.Generator) -> Matrices:
    """Independent experts that lean one way, with neurons set to zero here and there."""
    found = with_common_direction(rng)
    for expert in range(EXPERTS):
        chosen = rng.permutation(NEURONS)[:16]
        for matrix in found.values():
            matrix[expert, chosen] = 0
    return found


def padded_copies(rng: np.random.Generator) -> Matrices:
    return padded(rng, copies(rng))


def write(folder: Path, found: Matrices, gated: bool = True) -> str:
    """A Mixtral of one layer; without a gate, a Nemotron."""
    tensors = {}
    for role, matrix in found.items():
        for expert, neurons in enumerate(matrix):
            values = np.ascontiguousarray(neurons.T if role == "down" else neurons)
            if gated:
                tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight"] = values
            elif role != "gate":
                tensors[f"backbone.layers.0.mixer.experts.{expert}.{role}_proj.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"model_type": "{"mixtral" if gated else "nemotron_h"}"}}')
    return str(folder)


def write_dense(folder: Path, found: Matrices) -> str:
    tensors = {
        f"model.layers.0.mlp.{role}_proj.weight": np.ascontiguousarray(m[0].T if role == "down" else m[0])
        for role, m in found.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


Make = Callable[[np.random.Generator], Matrices]


@pytest.mark.sample
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("make", "origin", "kind"),
    [
        (copies, "UPCYCLED", "identical copies"),
        (shuffled, "UPCYCLED", "shuffled copies"),
        (noisy, "UPCYCLED", "shuffled copies"),
        (half_redrawn, "UPCYCLED", "copies, about 50 % of the neurons re-initialised"),
        (sliced, "UPCYCLED", "shuffled slices that overlap: 2 copies of a layer, each in 4 slices"),
        (trained_apart, "UNDETERMINED", None),
        (native, "NATIVE", None),
        (with_common_direction, "NATIVE", None),
        (with_hubs, "UNDETERMINED", None),
        (with_scales, "NATIVE", None),
        (padded, "NATIVE", None),
        (pruned, "NATIVE", None),
        (padded_copies, "UPCYCLED", "identical copies"),
    ],
)
def test_made_histories(make: Make, origin: str, kind: str | None, seed: int, gated: bool, tmp_path: Path) -> None:
    report = MoETypeService.analyze(write(tmp_path / "m", make(np.random.default_rng(seed)), gated))
    assert (report.type, report.kind) == (origin, kind)
    lineage = report.layers[0].lineage
    assert lineage.neurons == 512
    if make is not with_hubs:  # which is found by chance, and by few neurons
        assert (min(lineage.p_value, lineage.cosine_p_value) < 1e-9) == (origin != "NATIVE")


def test_the_share_of_kept_neurons_is_what_was_kept(tmp_path: Path) -> None:
    """Half of each expert's neurons are the parent's; one of the 7 others has such a neuron nearly always."""
    report = MoETypeService.analyze(write(tmp_path / "m", half_redrawn(np.random.default_rng(3))), thorough=True)
    lineage = report.layers[0].lineage
    assert lineage.neurons == EXPERTS * NEURONS
    assert lineage.kept == pytest.approx(0.5 * (1 - 0.5**7), abs=0.03)
    assert lineage.spread == pytest.approx(0.5, abs=0.05)
    assert lineage.in_place > 0.95


def test_slices_are_found_in_the_other_copy_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    whole = dense(rng, 4 * NEURONS)
    cut = {role: np.concatenate([m.reshape(4, NEURONS, HIDDEN)] * 2) for role, m in whole.items()}
    report = MoETypeService.analyze(write(tmp_path / "m", cut), parent=write_dense(tmp_path / "parent", whole))
    lineage = report.layers[0].lineage
    assert report.kind == "from this parent, in identical copies"
    assert lineage.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    parent = lineage.parent
    assert parent is not None
    assert (parent.kept, set(parent.shares.values())) == (1.0, {1.0})
    for expert, (first, last) in parent.ranges.items():
        assert NEURONS * (expert % 4) <= first <= last < NEURONS * (expert % 4 + 1)


def test_shared_experts_count_as_a_parent(tmp_path: Path) -> None:
    """As in an MoE whose dense layer became the shared expert, and, half of it redrawn, the routed ones."""
    rng = np.random.default_rng(6)
    whole = dense(rng)
    tensors = {}
    for role, matrix in whole.items():
        routed = np.repeat(matrix, EXPERTS, axis=0)
        routed[:, : NEURONS // 2] = rng.standard_normal(routed[:, : NEURONS // 2].shape)
        named = {"shared_expert": matrix[0], **{f"experts.{e}": one for e, one in enumerate(routed)}}
        for name, one in named.items():
            key = f"model.layers.0.mlp.{name}.{role}_proj.weight"
            tensors[key] = np.ascontiguousarray(one.T if role == "down" else one)
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text('{"model_type": "qwen2_moe", "num_experts": 8}')
    parent = MoETypeService.analyze(str(tmp_path / "m"), parent=str(tmp_path / "m")).layers[0].lineage.parent
    assert parent
    assert parent.kept == pytest.approx(0.5, abs=0.05)


def test_a_parent_that_is_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    model = write(tmp_path / "m", copies(rng))
    report = MoETypeService.analyze(model, parent=write_dense(tmp_path / "other", dense(rng)))
    parent = report.layers[0].lineage.parent
    assert parent is not None
    assert parent.kept < 0.02
    with pytest.raises(InvalidRequest, match="hidden size"):
        MoETypeService.analyze(model, parent="demo:parent")


def test_several_layers_are_compared_with_each_other() -> None:
    one, two = (MoETypeService.analyze("demo:upcycled", layers=layers) for layers in ("0", "all"))
    assert one.layers[0].lineage.above is None
    for layer in two.layers:
        assert layer.lineage.above is not None
        assert layer.lineage.unrelated is not None
        assert min(layer.lineage.above.values()) > 0.99
        assert max(layer.lineage.unrelated.values()) < 0.9


@pytest.mark.parametrize("model", ["upcycled", "native"])
def test_a_sample_says_what_all_neurons_say(model: str) -> None:
    def kept(thorough: bool) -> MoETypeAnalysis:
        return MoETypeService.analyze(f"demo:{model}", layers="all", thorough=thorough)

    for sample, everything in zip(kept(False).layers, kept(True).layers, strict=True):
        assert everything.lineage.neurons > sample.lineage.neurons
        assert sample.lineage.kept == pytest.approx(everything.lineage.kept, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 60), st.integers(0, 5))
def test_drawn_neurons_are_distinct_and_the_same_again(experts: int, neurons: int, queries: int, seed: int) -> None:
    drawn = draw_neurons(experts, neurons, queries, seed)
    assert drawn.shape == (experts, min(neurons, -(-queries // experts)))
    assert all(len(set(row)) == len(row) for row in drawn.tolist())
    assert ((drawn >= 0) & (drawn < neurons)).all()
    np.testing.assert_array_equal(drawn, draw_neurons(experts, neurons, queries, seed))


@given(st.integers(0, 1000), st.integers(2, 9), st.integers(2, 30), st.integers(2, 12))
@settings(deadline=None)
def test_the_nearest_is_the_largest_cosine(seed: int, queries: int, neurons: int, inputs: int) -> None:
    rng = np.random.default_rng(seed)
    asked, pool = (rng.standard_normal((n, inputs)).astype(np.float32) for n in (queries, neurons))
    positions = rng.integers(0, neurons, queries)
    found = find_nearest(asked * rng.uniform(0.1, 9, (queries, 1)).astype(np.float32), positions, 1e30 * pool)
    asked, pool = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (asked.astype(np.float64), pool.astype(np.float64))
    )
    center = asked.mean(axis=0)
    # what lies at the center has no direction, and of what lies near it float32 has lost it
    assume(min(np.linalg.norm(rows - center, axis=1).min() for rows in (asked, pool)) > 0.1)
    for i, query in enumerate(asked - center):
        cosines = [query @ one / max(np.linalg.norm(query) * np.linalg.norm(one), 1e-30) for one in pool - center]
        assert cosines[found.neuron[i, 0]] == pytest.approx(max(cosines), abs=1e-5)
        assert found.cosine[i, 0] == pytest.approx(max(cosines), abs=1e-5)
        assert found.in_place[i, 0] == pytest.approx(cosines[positions[i]], abs=1e-5)
        assert found.runner_up[i, 0] == pytest.approx(sorted(cosines)[-2], abs=1e-5)
        assert found.mean[i, 0] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found.deviation[i, 0] == pytest.approx(np.std(cosines), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1.0, 1e30])
def test_the_lengths_of_vectors_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(2)
    asked, pool = (rng.standard_normal((n, 6)).astype(np.float32) for n in (5, 9))
    plain = find_nearest(asked, np.arange(5), pool)
    scaled = find_nearest(asked * np.float32(scale), np.arange(5), pool * np.float32(scale))
    np.testing.assert_array_equal(plain.neuron, scaled.neuron)
    np.testing.assert_allclose(plain.cosine, scaled.cosine, atol=1e-5)


def test_zero_vectors_are_like_nothing() -> None:
    rng = np.random.default_rng(3)
    asked = 1 + rng.standard_normal((8, 6)).astype(np.float32)
    asked[[2, 6]] = 0
    found = find_nearest(asked, np.arange(8), asked)
    for figure in (found.cosine, found.runner_up, found.in_place, found.mean, found.deviation):
        assert (figure[[2, 6]] == 0).all()
    # and the others are as near to each other as without them
    alive = [0, 1, 3, 4, 5, 7]
    without = find_nearest(asked[alive], np.arange(6), asked[alive])
    np.testing.assert_allclose(found.cosine[alive], without.cosine, atol=1e-6)
    np.testing.assert_allclose(found.in_place[alive], without.in_place, atol=1e-6)
    assert find_nearest(asked[:1], np.arange(1), asked).cosine == 0  # one alone is the mean
    nothing = find_nearest(0 * asked, np.arange(8), 0 * asked)
    assert not nothing.cosine.any()
    both = {"gate": join([nothing, nothing]), "up": join([nothing, nothing])}
    lost = match_evidence(both, np.repeat([0, 1], 4), np.arange(8), 8)
    assert (lost.kept, lost.close, lost.chance) == (0, 0, 1)  # nothing to judge by


def test_a_position_beyond_the_last_neuron_is_the_last() -> None:
    """As when a parent has fewer neurons than an expert."""
    rng = np.random.default_rng(4)
    asked, pool = (rng.standard_normal((n, 6)).astype(np.float32) for n in (5, 3))
    beyond = find_nearest(asked, np.array([0, 1, 2, 3, 9]), pool)
    np.testing.assert_array_equal(beyond.in_place, find_nearest(asked, np.array([0, 1, 2, 2, 2]), pool).in_place)


def some(found: NDArray[np.int32]) -> Nearest:
    zeros = np.zeros(found.shape, np.float32)
    return Nearest(found, zeros + 0.25, zeros, zeros, zeros, zeros)


def test_chance_is_what_roles_that_know_nothing_of_each_other_give() -> None:
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(4), 2000)
    hubs = np.array([0.3, *[0.7 / 31] * 31])  # one neuron of 32 is nearest to nearly a third of all
    roles = {role: some(rng.choice(32, (8000, 4), p=hubs).astype(np.int32)) for role in ("gate", "up", "down")}
    evidence = match_evidence(roles, own, np.zeros(8000, np.intp), 32)
    pair = 0.3**3 + 31 * (0.7 / 31) ** 3
    assert evidence.chance == pytest.approx(1 - (1 - pair) ** 3, rel=0.05)
    assert evidence.kept == pytest.approx(evidence.chance, rel=0.15)
    assert evidence.p_value > 1e-4


ROLES = ("gate", "up", "down")


def drawn(rng: np.random.Generator, queries: int, experts: int, neurons: int) -> dict[str, Nearest]:
    """Roles that agree about two of three matches, with cosines on both sides of 0.5."""
    common = rng.integers(0, neurons, (queries, experts)).astype(np.int32)
    roles = {}
    for role in ROLES:
        found = np.where(rng.random(common.shape) < 0.12, rng.integers(0, neurons, common.shape), common)
        figures = [rng.uniform(-0.2, 1.0, common.shape).astype(np.float32) for _ in range(4)]
        roles[role] = Nearest(found.astype(np.int32), *figures, rng.uniform(0.1, 0.3, common.shape).astype(np.float32))
    return roles


@pytest.mark.parametrize(("experts", "neurons", "each", "seed"), [(2, 5, 12, 0), (3, 40, 30, 1), (5, 9, 20, 2)])
def test_evidence_by_its_definitions(experts: int, neurons: int, each: int, seed: int) -> None:
    """As docs/concepts.md has them, neuron by neuron."""
    rng = np.random.default_rng(seed)
    own, positions = np.repeat(np.arange(experts), each), rng.integers(0, neurons, experts * each)
    roles = drawn(rng, len(own), experts, neurons)
    for nearest in roles.values():  # some at their own position
        nearest.neuron[::3] = positions[::3, None]
    kept, close, in_place, spreads, tallies = 0, 0, 0, [], np.zeros((experts, experts))
    means: dict[str, list[float]] = {"in_place": [], "mean": [], "deviation": []}
    greatest, second = [], []
    for q, expert in enumerate(own):
        others = [other for other in range(experts) if other != expert]
        found = [
            other
            for other in others
            if len({roles[role].neuron[q, other] for role in ROLES}) == 1
            and min(roles[role].cosine[q, other] for role in ROLES) > 0
        ]
        kept += bool(found)
        close += any(np.mean([roles[role].cosine[q, other] for role in ROLES]) >= 0.5 for other in found)
        in_place += sum(roles["up"].neuron[q, other] == positions[q] for other in found)
        spreads += [len(found) / (experts - 1)] if found else []
        for other in found:
            tallies[expert, other] += 1 / each
        for name, values in means.items():
            values += [float(np.mean([getattr(roles[role], name)[q, other] for role in ROLES])) for other in others]
        greatest.append(max(np.mean([roles[role].cosine[q, other] for role in ROLES]) for other in others))
        second.append(max(np.mean([roles[role].runner_up[q, other] for role in ROLES]) for other in others))
    missed = []
    near = np.min([nearest.cosine for nearest in roles.values()], axis=0) > 0
    for expert in range(experts):
        shares = {
            (role, other): [
                np.mean(nearest.neuron[(own == expert) & near[:, other], other] == n) for n in range(neurons)
            ]
            for role, nearest in roles.items()
            for other in range(experts)
        }
        agree = [
            sum(np.prod([shares[role, other][n] for role in ROLES]) for n in range(neurons))
            for other in range(experts)
            if other != expert
        ]
        missed.append(np.prod([1 - one for one in agree]))
    chance = 1 - np.mean(missed)
    z = sum(np.subtract(means["in_place"], means["mean"])) / np.sqrt(2 * np.square(means["deviation"]).sum())

    evidence = match_evidence(roles, own, positions, neurons)
    assert evidence.queries == len(own)
    assert evidence.kept == pytest.approx(kept / len(own))
    assert evidence.close == pytest.approx(close / len(own))
    assert evidence.chance == pytest.approx(chance)
    assert evidence.p_value == pytest.approx(binomtest(kept, len(own), chance, alternative="greater").pvalue)
    assert evidence.spread == pytest.approx(np.mean(spreads))
    assert evidence.in_place == pytest.approx(in_place / (tallies.sum() * each))
    np.testing.assert_allclose(evidence.pairs, tallies)
    assert evidence.cosine == pytest.approx(np.mean(means["in_place"]), rel=1e-5)
    assert evidence.permuted_cosine == pytest.approx(np.mean(means["mean"]), rel=1e-5)
    assert evidence.cosine_p_value == pytest.approx(norm.sf(z), rel=1e-4)
    # where nothing is near, 0
    np.testing.assert_allclose(evidence.nearest, np.maximum(greatest, 0), rtol=1e-5)
    np.testing.assert_allclose(evidence.runner_up, np.maximum(second, 0), rtol=1e-5)


@pytest.mark.parametrize(("cosine", "close"), [(0.5, 1.0), (0.49, 0.0)])
def test_close_begins_at_a_half(cosine: float, close: float) -> None:
    found, figures = np.zeros((2, 2), np.int32), np.full((2, 2), cosine, np.float32)
    role = Nearest(found, figures, figures, figures, figures, figures)
    assert match_evidence({"gate": role, "up": role}, np.arange(2), np.zeros(2, np.intp), 3).close == close


def test_nothing_found_again() -> None:
    """And cosines that do not scatter: no z-score, so nothing is proved."""
    own, nowhere = np.repeat(np.arange(2), 4), np.zeros(8, np.intp)
    roles = {role: some(np.full((8, 2), place, np.int32)) for place, role in enumerate(ROLES)}
    evidence = match_evidence(roles, own, nowhere, 3)
    figures = (evidence.kept, evidence.close, evidence.chance, evidence.spread, evidence.in_place)
    assert figures == (0, 0, 0, 0, 0)
    assert (evidence.p_value, evidence.cosine_p_value) == (1, 1)


def evidence_of(pairs: NDArray[np.float64]) -> Evidence:
    none = np.zeros(0, np.float32)
    return Evidence(512, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, pairs, 0.0, 0.0, 0.5, none, none)


def test_groups_share_more_than_half_in_one_direction() -> None:
    pairs = np.zeros((5, 5))
    pairs[0, 3] = 0.51  # 3 has more neurons, so 0 is less of it
    pairs[4, 3] = 0.6
    pairs[1, 2] = pairs[2, 1] = 0.5
    assert find_groups(evidence_of(pairs), [10, 11, 12, 13, 14]) == ((10, 13, 14),)


@dataclass(frozen=True)
class Shares:
    shared: float = 0.0
    strong: float = 0.0
    without_down: float | None = None
    roles: int = 3
    neurons: int = 1024
    twins: tuple[tuple[int, ...], ...] = ()
    partners: dict[int, int] = field(default_factory=lambda: {expert: (expert + 1) % 8 for expert in range(8)})


@dataclass(frozen=True)
class Facts:
    sharing: Shares
    cosine: float = 0.0
    permuted_cosine: float = 0.0
    cosine_p_value: float = 0.5
    neurons: int = 512


@dataclass(frozen=True)
class Deltas:
    breadth: dict[str, float]
    delta_energy: float = 0.5


BROAD = {"up": Deltas({"base": 1.0, "deltas": 1.0})}


def judge(*facts: Facts, deltas: float = 1.0, base: float = 1.0, delta_energy: float = 0.5) -> str:
    projections = [{"up": Deltas({"base": base, "deltas": deltas}, delta_energy)}] * len(facts)
    return classify_by_neurons(facts, projections).origin


@given(*[st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)] * 3)
def test_more_shared_is_never_more_native(shared: list[float], strong: list[float], without_down: list[float]) -> None:
    order = {"NATIVE": 0, "UNDETERMINED": 1, "UPCYCLED": 2}
    less, greater = (Facts(Shares(*figures)) for figures in zip(shared, strong, without_down, strict=True))
    assert order[judge(less)] <= order[judge(greater)]


ALIKE = {"cosine": 0.05, "permuted_cosine": 0.0, "cosine_p_value": 1e-30}
PAIRS = Shares(twins=((0, 1), (2, 3)), partners={0: 2, 2: 0})
FOURS = Shares(twins=((0, 1, 2, 3), (4, 5, 6, 7)), partners={0: 4, 4: 0})


@pytest.mark.parametrize(
    ("facts", "origin"),
    [
        (Facts(Shares(LINEAGE.upcycled)), "UPCYCLED"),
        (Facts(Shares(LINEAGE.upcycled - 1e-9)), "UNDETERMINED"),
        (Facts(Shares(0.0, LINEAGE.strong)), "UPCYCLED"),  # a few, and nearly the same: mostly re-initialised
        (Facts(Shares(0.0, 8 / 1024)), "UPCYCLED"),  # as few, and more than natives have
        (Facts(Shares(0.0, 7 / 1024)), "UNDETERMINED"),
        (Facts(Shares(0.0, 41 / 8192, neurons=8192)), "UPCYCLED"),
        (Facts(Shares(0.0, LINEAGE.strong - 1e-9, neurons=512)), "UNDETERMINED"),
        (Facts(Shares(0.02)), "NATIVE"),
        (Facts(Shares(LINEAGE.native - 1e-9)), "UNDETERMINED"),  # by so much, either is as probable
        (Facts(Shares(LINEAGE.native)), "UNDETERMINED"),
        (Facts(Shares(0.0, LINEAGE.strong_native)), "UNDETERMINED"),
        (Facts(Shares(11 / 64, neurons=64)), "UPCYCLED"),
        (Facts(Shares(10 / 64, neurons=64)), "UNDETERMINED"),  # of few neurons
        (Facts(Shares(0.0, 4 / 256, neurons=256)), "UPCYCLED"),
        (Facts(Shares(0.0, 3 / 256, neurons=256)), "UNDETERMINED"),
        (Facts(Shares(without_down=16 / 64, neurons=64)), "UPCYCLED"),
        (Facts(Shares(without_down=15 / 64, neurons=64)), "UNDETERMINED"),
        (Facts(Shares(without_down=LINEAGE.without_down)), "UPCYCLED"),  # down projections were mixed
        (Facts(Shares(without_down=LINEAGE.without_down - 1e-9)), "UNDETERMINED"),
        (Facts(Shares(without_down=LINEAGE.native_without_down)), "UNDETERMINED"),
        (Facts(Shares(without_down=0.04)), "NATIVE"),
        (Facts(Shares(neurons=0)), "UNDETERMINED"),
        (Facts(Shares(neurons=100)), "UNDETERMINED"),  # too few to call that NATIVE
        (Facts(Shares(neurons=512)), "NATIVE"),
        (Facts(Shares(0.9, 0.9, roles=1)), "UNDETERMINED"),  # one role agrees with itself
        (Facts(Shares(), **ALIKE), "UNDETERMINED"),  # copies that were trained far apart, or natives with a base
        (Facts(Shares(), cosine=0.05, permuted_cosine=0.045, cosine_p_value=1e-30), "NATIVE"),
        (Facts(Shares(), cosine=0.05, cosine_p_value=1e-6), "NATIVE"),
        (Facts(Shares(partners={0: 0}, twins=((0, 1, 2),))), "UPCYCLED"),  # all experts are identical
        (Facts(Shares(partners={0: 0}, twins=((0, 1),))), "UNDETERMINED"),  # two, perhaps averaged
        (Facts(PAIRS), "UNDETERMINED"),  # merged, or duplicated
        (Facts(FOURS), "UPCYCLED"),  # identical copies of slices
        (Facts(Shares(twins=((0, 1),))), "NATIVE"),  # one expert stored twice
    ],
)
def test_where_verdicts_begin(facts: Facts, origin: str) -> None:
    assert judge(facts) == origin
    if not facts.sharing.strong and facts.sharing.neurons != 64:  # of twice as many neurons, a smaller share is enough
        assert judge(facts, facts) == (origin if facts.sharing.neurons != 100 else "NATIVE")


def test_one_base_and_deltas_of_few_directions_are_not_copies() -> None:
    copies, alike = Facts(Shares(0.9, 0.9)), Facts(Shares(), **ALIKE)
    assert judge(copies, deltas=0.2) == "UNDETERMINED"
    assert judge(copies, deltas=0.2, delta_energy=0.04) == "UPCYCLED"  # small deltas: copies, hardly changed
    assert judge(copies, deltas=0.7) == "UPCYCLED"
    assert judge(Facts(Shares(0.9)), deltas=0.7) == "UNDETERMINED"  # not even strong matches speak for copies
    assert judge(Facts(Shares(without_down=0.9)), deltas=0.7) == "UNDETERMINED"
    assert judge(Facts(Shares(without_down=0.9)), deltas=0.9) == "UPCYCLED"
    assert judge(alike, deltas=0.2) == "NATIVE"
    assert judge(alike, base=0.2) == "NATIVE"  # an adapter that was added to all
    assert judge(copies, base=0.4) == "UNDETERMINED"  # a strong one
    assert judge(copies, base=0.6) == "UPCYCLED"
    assert judge(Facts(Shares(0.9)), base=0.6) == "UNDETERMINED"


def test_more_layers_have_more_chances() -> None:
    one, other = Facts(Shares(), 0.05, 0.0, 0.4e-12), Facts(Shares(), 0.05, 0.0, 0.3)
    assert is_alike_in_place([one, other])
    assert not is_alike_in_place([one, other, other])
    larger = Facts(Shares(), 0.0, 0.0, 0.3, neurons=3 * 512)
    assert not is_alike_in_place([one, larger])  # 0.0125 by their neurons


def test_layers_count_alike() -> None:
    native, copied = Facts(Shares()), Facts(Shares(1.0, 1.0))
    assert judge(native, copied) == "UPCYCLED"
    assert judge(*[native] * 500, copied) == "NATIVE"


def cosine_p_value(base: NDArray[np.float32], copies: list[NDArray[np.float32]]) -> float:
    """Of a layer whose first expert is `base`, in one role."""
    positions = np.tile(np.arange(len(base)), len(copies) + 1)
    experts = [base, *copies]
    found = join([find_nearest(np.concatenate(experts), positions, expert) for expert in experts])
    return match_evidence(
        {"up": found}, np.repeat(np.arange(len(experts)), len(base)), positions, len(base)
    ).cosine_p_value


def test_the_p_value_of_the_positional_cosine_is_that_of_shuffled_neurons() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 16)).astype(np.float32)
    shuffled = [cosine_p_value(base, [base[rng.permutation(40)]]) for _ in range(400)]
    for level in (
        0.05,
        0.2,
        0.5,
    ):
        assert np.mean(np.array(shuffled) < level) < 2 * level
    assert min(shuffled) > 1e-6
    assert cosine_p_value(base, [base + 0.5 * rng.standard_normal(base.shape).astype(np.float32)]) < 1e-12


# Trained: the first layers of checkpoints whose history is known (experiments/02_training_history, held-out family 6)

ZOO = FIXTURES / "zoo"


@pytest.mark.parametrize(
    ("name", "origin", "rule", "from_parent"),
    [
        ("copy-hot-1300", "UPCYCLED", "UNDETERMINED", (0.7, 1.0)),
        ("shuffle-noise-1300", "UPCYCLED", "NATIVE", (0.9, 1.0)),
        ("drop50-apart-1300", "UPCYCLED", "NATIVE", (0.05, 0.25)),
        ("slice-shuffle-drop50-400", "UPCYCLED", "NATIVE", (0.4, 0.6)),
        ("native-2300", "NATIVE", "NATIVE", (0.0, 0.02)),
        ("redrawn-400", "NATIVE", "NATIVE", (0.0, 0.02)),  # as it must be: nothing of the parent is left
    ],
)
@pytest.mark.parametrize("thorough", [False, True])
def test_trained_models_of_known_history(
    name: str, origin: str, rule: str, from_parent: tuple[float, float], thorough: bool
) -> None:
    found = MoETypeService.analyze(str(ZOO / name), parent=str(ZOO / "parent-1000"), thorough=thorough)
    assert (found.type, found.documented_rule.type) == (origin, rule)
    match = found.layers[0].lineage.parent
    assert match
    assert from_parent[0] <= match.kept <= from_parent[1]


def test_a_dense_layer_cut_into_experts_is_found_in_its_parent_only() -> None:
    found = MoETypeService.analyze(str(ZOO / "split-400"), parent=str(ZOO / "parent-1000"))
    assert (found.type, found.kind) == ("UPCYCLED", "from this parent, no neuron twice")
    assert found.layers[0].type != "UPCYCLED"  # no two experts share anything
    assert found.layers[0].lineage.sharing.shared < 0.05
    parent = found.layers[0].lineage.parent
    assert parent
    assert parent.kept > 0.95


def test_every_neuron_is_counted_in_the_histograms(tmp_path: Path) -> None:
    """A cosine of copies may be a rounding above 1."""
    for make in (copies, native):  # of identical copies there are no pairs: of those that were sampled
        lineage = (
            MoETypeService.analyze(write(tmp_path / make.__name__, make(np.random.default_rng(0)))).layers[0].lineage
        )
        counted = lineage.sharing.neurons or lineage.neurons
        assert sum(lineage.matches.nearest) == sum(lineage.matches.runner_up) == counted
