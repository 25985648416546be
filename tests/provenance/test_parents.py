"""Which of a dense parent's layers an MoE's neurons come from: on made models whose history is known."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.stats import binomtest

from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable
from chuk_lazarus.introspection.moe.numerics.search import Found, searching_order
from chuk_lazarus.introspection.moe.provenance.parent import parent_evidence
from chuk_lazarus.introspection.moe.reports import AttentionMatch, ParentMatch
from chuk_lazarus.introspection.moe.views.words import explain_parent
from sampling import examples

Layer = dict[str, NDArray[np.float32]]  # role -> [experts, neurons, inputs]
Tensors = dict[str, NDArray[np.float32]]  # by their names
EXPERTS, NEURONS, HIDDEN, LAYERS = 8, 128, 48, 3
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


def draw(rng: np.random.Generator, experts: int = 1, neurons: int = NEURONS) -> Layer:
    return {role: rng.standard_normal((experts, neurons, HIDDEN), np.float32) for role in SHORT}


@pytest.fixture
def dense() -> list[Layer]:
    rng = np.random.default_rng(0)
    return [draw(rng) for _ in range(LAYERS)]


def copy(layer: Layer, noise: float = 0.3, seed: int = 1) -> Layer:
    """Copies that were trained on, each in its own way."""
    rng = np.random.default_rng(seed)
    return {
        r: np.repeat(m, EXPERTS, 0) + noise * rng.standard_normal((EXPERTS, *m.shape[1:])) for r, m in layer.items()
    }


def write_moe(folder: Path, layers: Sequence[Layer], others: Tensors | None = None) -> str:
    tensors = {
        f"model.layers.{number}.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight": as_stored(role, neurons)
        for number, layer in enumerate(layers)
        for role, matrix in layer.items()
        for expert, neurons in enumerate(matrix)
    }
    return write(folder, tensors | (others or {}), '{"model_type": "mixtral"}')


def write_dense(folder: Path, layers: Sequence[Layer], others: Tensors | None = None) -> str:
    tensors = {
        f"model.layers.{number}.mlp.{role}_proj.weight": as_stored(role, matrix[0])
        for number, layer in enumerate(layers)
        for role, matrix in layer.items()
    }
    return write(folder, tensors | (others or {}), '{"model_type": "llama"}')


def write(folder: Path, tensors: Tensors, config: str) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    return str(folder)


def as_stored(role: str, neurons: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(neurons.T if role == "down" else neurons, np.float32)


def analyze(folder: Path, moe: Sequence[Layer], dense: Sequence[Layer]) -> MoETypeAnalysis:
    model, parent = write_moe(folder / "moe", moe), write_dense(folder / "dense", dense)
    return MoETypeService.analyze(model, layers="all", parent=parent)


def matches(report: MoETypeAnalysis) -> list[ParentMatch]:
    found = [layer.lineage.parent for layer in report.layers]
    return [match for match in found if match]


def test_layers_in_their_order_are_found_without_a_search(dense: list[Layer], tmp_path: Path) -> None:
    report = analyze(tmp_path, [copy(layer) for layer in dense], dense)
    for number, match in enumerate(matches(report)):
        assert (match.layer, match.of_layers) == (number, LAYERS)
        assert match.layers == {number: match.kept}
        assert match.kept > 0.99
        assert match.in_place == 1.0
        assert set(match.sources.values()) == {number}


def test_exchanged_layers(dense: list[Layer], tmp_path: Path) -> None:
    report = analyze(tmp_path, [copy(layer) for layer in dense[::-1]], dense)
    assert [match.layer for match in matches(report)] == [2, 1, 0]
    assert all(match.kept > 0.99 for match in matches(report))
    first = matches(report)[0]
    assert first.layers == {0: 0.0, 1: 0.0, 2: first.kept}


def test_deeper_than_the_parent(dense: list[Layer], tmp_path: Path) -> None:
    """The last layer is there twice, and the MoE has a layer that the parent lacks."""
    report = analyze(tmp_path, [copy(layer) for layer in [*dense, dense[-1]]], dense)
    assert [match.layer for match in matches(report)] == [0, 1, 2, 2]


def test_a_cut_model(dense: list[Layer], tmp_path: Path) -> None:
    report = analyze(tmp_path, [copy(dense[0]), copy(dense[2])], dense)
    assert [match.layer for match in matches(report)] == [0, 2]


def test_a_layer_of_two(dense: list[Layer], tmp_path: Path) -> None:
    """Half of its experts are from one layer of the parent, half from another."""
    first, last = copy(dense[0]), copy(dense[2])
    both = {role: np.concatenate([first[role][:4], last[role][4:]]) for role in SHORT}
    (match,) = matches(analyze(tmp_path, [both], dense))
    assert match.kept > 0.99
    assert match.layers == {0: pytest.approx(0.5, abs=0.01), 1: 0.0, 2: pytest.approx(0.5, abs=0.01)}
    assert list(match.sources.values()) == [0] * 4 + [2] * 4


def negate(rng: np.random.Generator, layer: Layer) -> Layer:
    return {**layer, "up": -layer["up"], "down": -layer["down"]}


def shuffle(rng: np.random.Generator, layer: Layer) -> Layer:
    orders = np.stack([rng.permutation(NEURONS) for _ in range(EXPERTS)])[:, :, None]
    return {role: np.take_along_axis(matrix, orders, axis=1) for role, matrix in layer.items()}


def scale_columns(rng: np.random.Generator, layer: Layer) -> Layer:
    """As where a norm's weight was folded into what reads it."""
    scale = np.exp(rng.normal(0, 1, HIDDEN))
    return {**layer, "gate": layer["gate"] * scale, "up": layer["up"] * scale}


def rescale(rng: np.random.Generator, layer: Layer) -> Layer:
    scale = np.exp(rng.normal(0, 1, (EXPERTS, NEURONS, 1)))
    return {**layer, "up": layer["up"] * scale, "down": layer["down"] / scale}


@pytest.mark.parametrize("change", [negate, shuffle, scale_columns, rescale], ids=lambda change: change.__name__)
def test_what_hides_nothing(
    change: Callable[[np.random.Generator, Layer], Layer], dense: list[Layer], tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    report = analyze(tmp_path, [change(rng, copy(layer)) for layer in dense], dense)
    assert report.type == "UPCYCLED"
    for number, match in enumerate(matches(report)):
        assert match.layer == number
        assert match.kept > 0.95
        assert match.flipped == (1.0 if change is negate else 0.0)
        assert (match.in_place > 0.9) == (change is not shuffle)


def test_slices_that_were_cut_once(dense: list[Layer], tmp_path: Path) -> None:
    """No two experts share anything: only the parent shows what they are."""
    slices = [{role: m.reshape(EXPERTS, -1, HIDDEN) for role, m in layer.items()} for layer in dense]
    report = analyze(tmp_path, slices, dense)
    assert (report.type, report.kind) == ("UPCYCLED", "from this parent, no neuron twice")
    width = NEURONS // EXPERTS
    for match in matches(report):
        assert match.kept == 1.0
        for expert, (first, last) in match.ranges.items():
            assert expert * width <= first <= last < (expert + 1) * width


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_neurons_drawn_anew(share: float, dense: list[Layer], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    layers = [copy(layer) for layer in dense]
    for layer in layers:
        for expert in range(EXPERTS):
            chosen = rng.permutation(NEURONS)[: round(share * NEURONS)]
            for matrix in layer.values():
                matrix[expert, chosen] = rng.standard_normal((len(chosen), HIDDEN))
    report = analyze(tmp_path, layers, dense)
    assert report.type == "UPCYCLED"
    assert np.mean([match.kept for match in matches(report)]) == pytest.approx(1 - share, abs=0.03)
    if share > 0.9:  # too few to be seen between experts
        assert report.kind == "from this parent, mostly re-initialised"


@pytest.mark.parametrize("seed", range(3))
def test_an_unrelated_parent(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(10 + seed)
    report = analyze(tmp_path, [draw(rng, EXPERTS) for _ in range(2)], [draw(rng) for _ in range(LAYERS)])
    assert report.type == "NATIVE"
    for match in matches(report):
        assert match.kept < 0.01
        assert match.p_value > 1e-6
        assert len(match.layers) == LAYERS


def test_nothing_is_found_in_zeros(dense: list[Layer], tmp_path: Path) -> None:
    nothing = [{role: 0 * matrix for role, matrix in layer.items()} for layer in dense]
    (match,) = matches(analyze(tmp_path, [copy(dense[0])], nothing))
    assert (match.kept, match.layer, match.chance, match.p_value) == (0.0, None, 1.0, 1.0)
    assert set(match.sources.values()) == {None}
    assert set(match.ranges.values()) == {(-1, -1)}


def test_another_hidden_size_is_refused(dense: list[Layer], tmp_path: Path) -> None:
    narrow = [{role: matrix[..., :-8] for role, matrix in layer.items()} for layer in dense]
    with pytest.raises(InvalidRequest, match="hidden size is 40, but that of the experts is 48"):
        analyze(tmp_path, [copy(dense[0])], narrow)


def test_a_broken_parent_is_refused(dense: list[Layer], tmp_path: Path) -> None:
    dense[1]["up"][0, 3, 4] = np.nan
    with pytest.raises(ModelUnreadable, match="layer 1, expert 0: the up projection holds NaN"):
        analyze(tmp_path, [draw(np.random.default_rng(4), EXPERTS)], dense)


def test_progress_is_in_bytes_of_the_parent(dense: list[Layer], tmp_path: Path) -> None:
    model, parent = write_moe(tmp_path / "moe", [copy(dense[1])]), write_dense(tmp_path / "dense", dense)
    seen: dict[str, list[tuple[int, int]]] = {}
    MoETypeService.analyze(
        model, parent=parent, progress=lambda what, done, total: seen.setdefault(what, []).append((done, total))
    )
    of_parent = seen["layer 0 in its parent"]
    size = 4 * 3 * NEURONS * HIDDEN
    assert of_parent[:2] == [(size, 3 * size), (2 * size, 3 * size)]
    assert of_parent[-1] == (3 * size, 3 * size)


# Attention and embeddings


def draw_attention(seed: int, layers: int = LAYERS) -> Tensors:
    """Embeddings, and attention with four heads, of which two share their keys and values."""
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((600, HIDDEN), np.float32)}
    for layer in range(layers):
        for role, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            name = f"model.layers.{layer}.self_attn.{role}_proj.weight"
            tensors[name] = rng.standard_normal((rows, HIDDEN), np.float32)
    return tensors


def train_on(tensors: Tensors, noise: float = 0.3, seed: int = 7) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(matrix + noise * rng.standard_normal(matrix.shape, np.float32))
        for name, matrix in tensors.items()
    }


def disguise(rng: np.random.Generator, layers: Sequence[Layer], others: Tensors) -> tuple[list[Layer], Tensors]:
    """The same function, the hidden side in another order and with other signs."""
    order, signs = rng.permutation(HIDDEN), rng.choice(np.array([-1, 1], np.float32), HIDDEN)

    def turn(columns: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray((columns * signs)[..., order])

    turned = {name: turn(m.T).T if "o_proj" in name else turn(m) for name, m in others.items()}
    return [{role: turn(m) for role, m in layer.items()} for layer in layers], {
        name: np.ascontiguousarray(m) for name, m in turned.items()
    }


def compare(
    folder: Path, moe: Sequence[Layer], ours: Tensors, dense: Sequence[Layer], theirs: Tensors
) -> MoETypeAnalysis:
    model, parent = write_moe(folder / "moe", moe, ours), write_dense(folder / "dense", dense, theirs)
    return MoETypeService.analyze(model, layers="all", parent=parent)


def redrawn(seed: int = 5, layers: int = LAYERS) -> list[Layer]:
    rng = np.random.default_rng(seed)
    return [draw(rng, EXPERTS) for _ in range(layers)]


def attention_of(report: MoETypeAnalysis) -> list[AttentionMatch]:
    found = [match.attention for match in matches(report)]
    return [attention for attention in found if attention]


@pytest.mark.parametrize("hidden", ["as it was", "permuted"])
def test_redrawn_experts_are_told_by_their_attention(hidden: str, dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    experts, ours = redrawn(), train_on(theirs)
    if hidden == "permuted":
        experts, ours = disguise(np.random.default_rng(6), experts, ours)
    report = compare(tmp_path, experts, ours, dense, theirs)
    assert (report.type, report.kind) == ("UPCYCLED", "from this parent, experts re-initialised")
    assert report.parent_embeddings
    assert report.parent_embeddings.assigned == (hidden == "permuted")
    assert report.parent_embeddings.tokens == 600
    assert report.parent_embeddings.cosine > 0.9
    for number, attention in enumerate(attention_of(report)):
        assert attention.layer == number
        assert attention.cka > 0.8
        assert attention.cosine
        assert attention.cosine > 0.9
        assert set(attention.projections) == {"q", "k", "v", "o"}
    assert matches(report)[0].kept < 0.02
    text = explain_parent(report)
    assert "the attention comes from it" in text
    assert "experts were re-initialised" in text
    assert ("hidden dimensions" in text) == (hidden == "permuted")


def test_neurons_are_found_on_a_permuted_hidden_side(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    experts, ours = disguise(np.random.default_rng(8), [copy(layer) for layer in dense], train_on(theirs))
    report = compare(tmp_path, experts, ours, dense, theirs)
    for number, match in enumerate(matches(report)):
        assert (match.layer, match.attention and match.attention.layer) == (number, number)
        assert match.kept > 0.99


def test_heads_in_another_order(dense: list[Layer], tmp_path: Path) -> None:
    """Rows at equal places have nothing in common, and CKA does not see it."""
    theirs = draw_attention(0)
    order = np.random.default_rng(9).permutation(HIDDEN)
    ours = {name: matrix[order] if "q_proj" in name else matrix for name, matrix in theirs.items()}
    attention = attention_of(compare(tmp_path, redrawn(), ours, dense, theirs))[0]
    assert attention.projections["q"].cka == pytest.approx(1.0, abs=1e-4)
    assert attention.projections["q"].cosine == pytest.approx(0.0, abs=0.1)


def test_keys_that_were_copied_to_more_heads(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    ours = {n: np.concatenate([m, m]) if "k_proj" in n or "v_proj" in n else m for n, m in theirs.items()}
    report = compare(tmp_path, redrawn(), ours, dense, theirs)
    keys = attention_of(report)[0].projections["k"]
    assert (keys.cosine, keys.cka) == (None, pytest.approx(1.0, abs=1e-4))
    assert report.type == "UPCYCLED"


def test_exchanged_layers_are_told_by_attention(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    ours = {name.replace(".2.", ".x.").replace(".0.", ".2.").replace(".x.", ".0."): m for name, m in theirs.items()}
    report = compare(tmp_path, redrawn(), ours, dense, theirs)
    assert [attention.layer for attention in attention_of(report)] == [2, 1, 0]
    assert set(attention_of(report)[1].layers) == {1}  # the others were not looked into


def test_attention_tells_where_to_look_for_neurons(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    ours = {name.replace(".2.", ".x.").replace(".0.", ".2.").replace(".x.", ".0."): m for name, m in theirs.items()}
    report = compare(tmp_path, [copy(layer) for layer in dense[::-1]], ours, dense, theirs)
    assert [set(match.layers) for match in matches(report)] == [{2}, {1}, {0}]


def test_neurons_of_a_layer_whose_attention_is_anothers(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    report = compare(tmp_path, [copy(layer) for layer in dense[::-1]], theirs, dense, theirs)
    assert [match.layer for match in matches(report)] == [2, 1, 0]
    assert [attention.layer for attention in attention_of(report)] == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_attention_of_an_unrelated_parent(seed: int, dense: list[Layer], tmp_path: Path) -> None:
    report = compare(tmp_path, redrawn(20 + seed), draw_attention(30 + seed), dense, draw_attention(40 + seed))
    assert report.type == "NATIVE"
    assert max(abs(attention.cka) for attention in attention_of(report)) < 0.2
    assert report.parent_embeddings
    assert not report.parent_embeddings.assigned
    assert "the attention is not similar" in explain_parent(report)


def test_vocabularies_of_two_sizes_are_compared_as_far_as_both_go(dense: list[Layer], tmp_path: Path) -> None:
    theirs = draw_attention(0)
    ours = {name: matrix[:300] if "embed" in name else matrix for name, matrix in theirs.items()}
    report = compare(tmp_path, redrawn(), ours, dense, theirs)
    assert report.parent_embeddings
    assert (report.parent_embeddings.tokens, report.parent_embeddings.cosine) == (300, pytest.approx(1.0))


def test_without_attention_a_note_says_so(dense: list[Layer], tmp_path: Path) -> None:
    report = analyze(tmp_path, redrawn(), dense)
    assert report.type == "NATIVE"
    assert (report.parent_embeddings, attention_of(report)) == (None, [])
    assert any("attention" in note for note in report.notes)


def test_attention_of_another_mixture_does_not_count(tmp_path: Path) -> None:
    """A model with shared experts may be its own parent, and has its own attention."""
    rng = np.random.default_rng(11)
    tensors = draw_attention(0, 1)
    for role, matrix in draw(rng).items():
        named = {"shared_expert": matrix[0]} | {f"experts.{e}": m for e, m in enumerate(draw(rng, EXPERTS)[role])}
        tensors |= {f"model.layers.0.mlp.{n}.{role}_proj.weight": as_stored(role, m) for n, m in named.items()}
    model = write(tmp_path / "moe", tensors, '{"model_type": "qwen2_moe", "num_experts": 8}')
    report = MoETypeService.analyze(model, parent=model)
    assert report.type == "NATIVE"
    assert attention_of(report) == []
    assert any("itself a Mixture of Experts" in note for note in report.notes)


def test_a_parent_whose_attention_is_broken(dense: list[Layer], tmp_path: Path) -> None:
    """What is not finite is left out, and what else there is counts."""
    theirs = draw_attention(0)
    theirs["model.layers.0.self_attn.q_proj.weight"][3, 4] = np.inf
    theirs["model.embed_tokens.weight"][0, 0] = np.nan
    report = compare(tmp_path, redrawn(layers=1), train_on(draw_attention(0)), dense, theirs)
    (attention,) = attention_of(report)
    assert set(attention.projections) == {"k", "v", "o"}
    assert "attention of the parent: layer 0: q is not finite: left out" in report.notes
    assert report.parent_embeddings is None
    assert report.type == "UPCYCLED"


def test_the_same_number_first() -> None:
    assert searching_order(2, range(5)) == [2, 1, 3, 0, 4]
    assert searching_order(7, [0, 1, 3]) == [3, 1, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(deadline=None, max_examples=examples(40))
def test_evidence_by_its_definitions(seed: int, layers: int) -> None:
    rng = np.random.default_rng(seed)
    owner, positions = np.repeat(np.arange(3), 7), rng.integers(0, 9, 21)
    found = {
        5 * number: Found(
            rng.integers(-1, 9, 21).astype(np.int32),
            rng.uniform(0.1, 1, 21).astype(np.float32),
            rng.random(21) < 0.3,
            float(rng.uniform(0, 0.2)),
        )
        for number in range(layers)
    }
    evidence = parent_evidence(found, owner, positions)
    where = [[number for number, layer in found.items() if layer.neuron[q] >= 0] for q in range(21)]
    best = {q: max(numbers, key=lambda n: found[n].cosine[q]) for q, numbers in enumerate(where) if numbers}
    chance = 1 - np.prod([1 - layer.chance for layer in found.values()])
    assert evidence.kept == pytest.approx(len(best) / 21)
    assert evidence.strong == pytest.approx(sum(found[n].cosine[q] >= 0.8 for q, n in best.items()) / 21)
    assert evidence.chance == pytest.approx(chance)
    assert evidence.p_value == pytest.approx(binomtest(len(best), 21, chance, alternative="greater").pvalue)
    for figure, values in (
        (evidence.in_place, [found[n].neuron[q] == positions[q] for q, n in best.items()]),
        (evidence.cosine, [found[n].cosine[q] for q, n in best.items()]),
        (evidence.flipped, [found[n].is_flipped[q] for q, n in best.items()]),
    ):
        assert figure == pytest.approx(np.mean(values) if values else 0.0, rel=1e-5)
    for number, layer in found.items():
        assert evidence.layers[number] == pytest.approx(np.mean(layer.neuron >= 0))
    for expert in range(3):
        mine = np.flatnonzero(owner == expert)
        assert evidence.shares[expert] == pytest.approx(np.mean([q in best for q in mine]))
        counts = {number: sum(layer.neuron[q] >= 0 for q in mine) for number, layer in found.items()}
        source = max(counts, key=lambda number: counts[number])
        if counts[source]:
            assert evidence.sources[expert] == source
            places = [found[source].neuron[q] for q in mine if found[source].neuron[q] >= 0]
            assert evidence.ranges[expert].tolist() == [min(places), max(places)]
        else:
            assert evidence.sources[expert] == -1
