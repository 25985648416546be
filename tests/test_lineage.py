"""Matching neurons: against closed forms and against made layers whose history is known."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.classifier import LINEAGE, judge
from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.lineage import Nearest, draw_neurons, find_nearest, join, weigh

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


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("make", "origin", "kind"),
    [
        (copies, "UPCYCLED", "copies"),
        (shuffled, "UPCYCLED", "shuffled copies"),
        (noisy, "UPCYCLED", "shuffled copies"),
        (half_redrawn, "UPCYCLED", "copies, partly re-initialised"),
        (sliced, "UPCYCLED", "shuffled slices"),
        (trained_apart, "UPCYCLED", "copies, trained far apart"),
        (native, "NATIVE", None),
        (with_common_direction, "NATIVE", None),
        (with_hubs, "NATIVE", None),
        (with_scales, "NATIVE", None),
    ],
)
def test_made_histories(make: Make, origin: str, kind: str | None, seed: int, gated: bool, tmp_path: Path) -> None:
    report = MoETypeService.analyze(write(tmp_path / "m", make(np.random.default_rng(seed)), gated))
    assert (report.type, report.kind) == (origin, kind)
    lineage = report.layers[0].lineage
    assert lineage.neurons == 512
    assert (min(lineage.p_value, lineage.cosine_p_value) < 1e-9) == (origin == "UPCYCLED")


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
    assert report.kind == "slices"
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
    asked, pool = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (asked, pool))
    center = asked.mean(axis=0)
    for i, query in enumerate(asked - center):
        cosines = [query @ one / max(np.linalg.norm(query) * np.linalg.norm(one), 1e-30) for one in pool - center]
        assert cosines[found.neuron[i, 0]] == pytest.approx(max(cosines), abs=1e-5)
        assert found.cosine[i, 0] == pytest.approx(max(cosines), abs=1e-5)
        assert found.in_place[i, 0] == pytest.approx(cosines[positions[i]], abs=1e-5)
        assert found.runner_up[i, 0] == pytest.approx(sorted(cosines)[-2], abs=1e-5)
        assert found.mean[i, 0] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found.deviation[i, 0] == pytest.approx(np.std(cosines), abs=1e-5)


def some(found: NDArray[np.int32]) -> Nearest:
    zeros = np.zeros(found.shape, np.float32)
    return Nearest(found, zeros, zeros, zeros, zeros, zeros)


def test_chance_is_what_roles_that_know_nothing_of_each_other_give() -> None:
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(4), 2000)
    hubs = np.array([0.3, *[0.7 / 31] * 31])  # one neuron of 32 is nearest to nearly a third of all
    roles = {role: some(rng.choice(32, (8000, 4), p=hubs).astype(np.int32)) for role in ("gate", "up", "down")}
    evidence = weigh(roles, own, np.zeros(8000, np.intp), 32)
    pair = 0.3**3 + 31 * (0.7 / 31) ** 3
    assert evidence.chance == pytest.approx(1 - (1 - pair) ** 3, rel=0.05)
    assert evidence.kept == pytest.approx(evidence.chance, rel=0.15)
    assert evidence.p_value > 1e-4


@dataclass(frozen=True)
class Facts:
    neurons: int
    kept: float
    close: float
    chance: float
    cosine: float = 0.0
    permuted_cosine: float = 0.0
    cosine_p_value: float = 0.5


@given(st.integers(1, 10**6), *[st.floats(0, 1)] * 5)
def test_more_kept_is_never_more_native(
    neurons: int, kept: float, more: float, close: float, closer: float, chance: float
) -> None:
    order = {"NATIVE": 0, "UNDETERMINED": 1, "UPCYCLED": 2}
    (low, high), (far, near) = sorted((kept, more)), sorted((close, closer))
    less, greater = Facts(neurons, low, far, chance), Facts(neurons, high, near, chance)
    assert order[judge([less]).origin] <= order[judge([greater]).origin]


MANY, FEW = 4096, 8


@pytest.mark.parametrize(
    ("facts", "origin"),
    [
        (Facts(MANY, 0.2, 0.0, 0.2), "UNDETERMINED"),  # experts of too few neurons
        (Facts(MANY, 0.13, 0.0, 0.026), "UNDETERMINED"),  # as a dense layer cut into such experts
        (Facts(MANY, 0.001, 0.0, 0.0), "NATIVE"),
        (Facts(MANY, LINEAGE.upcycled + 0.001, 0.0, 0.0001), "UPCYCLED"),
        (Facts(FEW, 0.125, 0.0, 0.01), "UNDETERMINED"),  # one neuron of eight
        (Facts(MANY, 0.06, 0.001, 0.0001), "NATIVE"),  # as layers of one trained model are to each other
        (Facts(MANY, 0.06, 0.06, 0.0001), "UPCYCLED"),
        (Facts(MANY, 0.08, 0.0, 0.0001), "UNDETERMINED"),
        (Facts(MANY, 0.001, 0.0, 0.0, 0.05, 0.0, 1e-30), "UPCYCLED"),  # copies, trained far apart
        (Facts(MANY, 0.001, 0.0, 0.0, 0.05, 0.045, 1e-30), "NATIVE"),
        (Facts(MANY, 0.001, 0.0, 0.0, 0.05, 0.0, 1e-6), "NATIVE"),
    ],
)
def test_verdicts(facts: Facts, origin: str) -> None:
    assert judge([facts]).origin == origin
    assert judge([facts, facts]).origin == origin


def test_layers_count_by_their_neurons() -> None:
    native, copies = Facts(100, 0.0, 0.0, 0.0001), Facts(100, 1.0, 1.0, 0.0001)
    assert judge([native, copies]).origin == "UPCYCLED"
    assert judge([native] * 200 + [copies]).origin == "NATIVE"


def cosine_p_value(base: NDArray[np.float32], copies: list[NDArray[np.float32]]) -> float:
    """Of a layer whose first expert is `base`, in one role."""
    positions = np.tile(np.arange(len(base)), len(copies) + 1)
    experts = [base, *copies]
    found = join([find_nearest(np.concatenate(experts), positions, expert) for expert in experts])
    return weigh({"up": found}, np.repeat(np.arange(len(experts)), len(base)), positions, len(base)).cosine_p_value


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

ZOO = Path(__file__).parent / "fixtures/zoo"


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
    found = MoETypeService.analyze(str(ZOO / "split-400"), parent=str(ZOO / "parent-1000")).layers[0]
    assert found.type == "UNDETERMINED"  # 16 neurons in an expert are too few
    assert found.lineage.parent
    assert found.lineage.parent.kept > 0.95


def test_every_neuron_is_counted_in_the_histograms(tmp_path: Path) -> None:
    """A cosine of copies may be a rounding above 1."""
    lineage = MoETypeService.analyze(write(tmp_path / "m", copies(np.random.default_rng(0)))).layers[0].lineage
    assert sum(lineage.matches.nearest) == sum(lineage.matches.runner_up) == lineage.neurons
