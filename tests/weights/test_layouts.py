"""Tensor names and axes -> expert matrices, against oracles that do not come from the code under test."""

import json
import os
import re
import shutil
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from checkpoints_in_memory import (
    TABLE,
    Array,
    Matrices,
    Memory,
    as_stored,
    header_bytes,
    load_folder,
    make,
    open_made,
    random_experts,
    roles_of,
    row_axes,
    safetensors,
    some_type,
    store,
)
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, MoEError, NotMoE, UnknownFormat
from chuk_lazarus.introspection.moe.jobs.measure import measure_layer
from chuk_lazarus.introspection.moe.jobs.model import evenly_spaced
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.expert_layer import ExpertLayer, ExpertTensor
from chuk_lazarus.introspection.moe.weights.experts import Experts, split_model
from chuk_lazarus.introspection.moe.weights.layouts import Kind, Layout, StoredAxes, is_listed, match_names
from chuk_lazarus.introspection.moe.weights.repositories.local import Folder
from chuk_lazarus.introspection.moe.weights.repositories.source import Range
from mlx_lm_recipes import RECIPES, ROPE, Recipe
from places import FIXTURES
from sampling import examples, in_turn, sampled


def name_oracles(kind: str) -> list[str]:
    """The models with an oracle of this kind: a fixture's name, with "#stack" behind it where it has several stacks."""
    paths = sorted(FIXTURES.glob(f"*/{kind}*.npz"))
    return [path.parent.name + path.stem.removeprefix(kind).replace(".", "#", 1) for path in paths]


WITH_ORACLE = name_oracles("oracle")
ROWS = {name: layout for name, layout in TABLE.items() if layout.kind == "routed"}

every_fixture = pytest.mark.parametrize("name", WITH_ORACLE)


def every_fixture_and(what: str, *values: int) -> pytest.MarkDecorator:
    """Each fixture with each value; by default each fixture with one of them, in turn."""
    pairs = [(name, value) for value in values for name in WITH_ORACLE]
    chosen = in_turn(WITH_ORACLE, values)
    return pytest.mark.parametrize(("name", what), sampled(pairs, chosen, lambda name, value: f"{value}-{name}"))


every_row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


@cache
def oracle(name: str, kind: str = "oracle") -> dict[int, Matrices]:
    """layer -> role -> [experts, out, in]."""
    found: dict[int, Matrices] = {}
    folder, _, stack = name.partition("#")
    with np.load(FIXTURES / folder / f"{kind}{'.' if stack else ''}{stack}.npz") as arrays:
        for key in arrays.files:
            layer, role = key.split(".")
            found.setdefault(int(layer), {})[role] = arrays[key]
    return found


@cache
def open_fixture(name: str, kind: Kind = "routed") -> Experts:
    return Experts.open(str(FIXTURES / name), kind)


def read_all(layer: ExpertLayer) -> Matrices:
    experts = [layer.matrices(expert) for expert in range(layer.count)]
    return {role: np.stack([expert[role] for expert in experts]) for role in layer.roles}


def assert_same(found: Matrices, expected: Mapping[str, Array]) -> None:
    assert list(found) == [role for role in ("gate", "up", "down") if role in expected]
    for role, matrices in found.items():
        assert matrices.dtype == np.float32
        np.testing.assert_array_equal(matrices, expected[role], err_msg=role)


# ---------------------------------------------------------------------------------------------------------------------
# The fixtures' own oracles


@every_fixture
def test_every_expert_equals_the_oracle(name: str) -> None:
    experts, expected = open_fixture(name), oracle(name)
    assert experts.layers == tuple(sorted(expected))
    assert [note for note in experts.notes if "left out" not in note and "in a head" not in note] == []
    for number, roles in expected.items():
        layer = experts.layer(number)
        assert layer.count == len(roles["down"])
        assert {role: layer.shape(role) for role in layer.roles} == {r: m.shape[1:] for r, m in roles.items()}
        assert_same(read_all(layer), roles)


@every_fixture
def test_family_is_a_row_for_the_model_type(name: str) -> None:
    experts = open_fixture(name)
    assert experts.model_type in ROWS[experts.family].model_types or not is_listed(experts.model_type)


@pytest.mark.parametrize("kind", ["shared", "dense"])
@pytest.mark.parametrize("name", sorted({*name_oracles("shared"), *name_oracles("dense")}))
def test_shared_experts_and_dense_layers_equal_the_oracle(name: str, kind: Kind) -> None:
    if name not in name_oracles(kind):
        return
    found = open_fixture(name, kind)
    assert found.layers == tuple(sorted(oracle(name, kind)))
    for number, roles in oracle(name, kind).items():
        assert_same(read_all(found.layer(number)), roles)


def test_experts_of_another_kind_are_left_out_with_a_note() -> None:
    """Identity experts have no down projection; the experts of another modality have another size."""
    for name, others in (("longcat_flash", "4-5"), ("ernie4_5_vl_moe", "3-5")):
        (note,) = open_fixture(name).notes
        assert f"experts {others} " in note


def test_multi_token_prediction_layers_are_apart_and_can_be_read() -> None:
    with_mtp = {"deepseek_v3_fp8": 2, "published_bailing_moe_v2": 2}
    for name, number in with_mtp.items():
        experts = open_fixture(name)
        assert experts.mtp_layers == (number,)
        assert number not in experts.layers
        assert_same(read_all(experts.layer(number)), oracle(name)[number - 1])
    assert [name for name in WITH_ORACLE if open_fixture(name).mtp_layers] == list(with_mtp)


def test_experts_of_each_head_are_no_dense_model() -> None:
    """MAGI-2 has a bank of experts for each head of the hidden state."""
    tensors = {f"layers.0.mlp.moe_mlp.W_{name}": np.zeros((6, 4, 4), np.float32) for name in ("gate", "up", "down")}
    with pytest.raises(UnknownFormat, match=r"no layout in our table holds these tensors.*moe_mlp\.W_gate"):
        open_made(tensors, {})


def test_a_dense_model_is_no_mixture_of_experts() -> None:
    with pytest.raises(NotMoE):
        Experts.open(str(FIXTURES / "dense_llama"))


def is_square(layer: ExpertLayer) -> bool:
    """Whether some stored matrix has as many rows as columns, so that its shape does not tell which are which."""
    return any(tensor.rows == tensor.columns for tensor in layer.tensors)


def two_configs(experts: Experts) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole config and its text part."""
    return experts.config, experts.checkpoint.config


BY_THE_CONTAINER = {name for name in TABLE if "gguf" in name}  # tests/weights/test_gguf.py
OF_STACKS = ("stacked", "gpt_oss", "gpt_oss_transposed", "llama4", "dbrx", "granite")


@pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
def test_every_row_of_the_table_has_a_fixture(row: Layout) -> None:
    if row.name in BY_THE_CONTAINER:
        return
    oracles = {"routed": "oracle"}.get(row.kind, row.kind)
    found = [open_fixture(name, row.kind) for name in name_oracles(oracles)]
    configs = [config for experts in found if experts.family == row.name for config in two_configs(experts)]
    assert {config.get("model_type", config.get("_class_name")) for config in configs} >= row.model_types
    layers = [experts.layer(experts.layers[0]) for experts in found if experts.family == row.name]
    assert {is_square(layer) for layer in layers} >= ({False, True} if row.name in OF_STACKS else set())
    assert layers


# ---------------------------------------------------------------------------------------------------------------------
# Factors of each expert beside the matrices, in mlx-vlm's form of Inkling

INKLING = {"model_type": "inkling_mm_model"}
SWITCH = "model.layers.0.mlp.switch_mlp."


def with_factors(**factors: Array) -> dict[str, Array]:
    stacks = random_experts(3, 6, 4)
    tensors = {f"{SWITCH}{role}_proj.weight": stack for role, stack in stacks.items()}
    return tensors | {SWITCH + name: np.asarray(factor, np.float32) for name, factor in factors.items()}


def test_factors_belong_to_the_matrices() -> None:
    """What down puts out is scaled by both factors, hence down itself by out_scale / gate_scale."""
    layer = open_made(with_factors(gate_scale=[1, 2, 4], out_scale=[1, 1, 0.5]), INKLING).layer(0)
    stacks = random_experts(3, 6, 4)
    for expert, (first, last) in enumerate([(1, 1), (2, 0.5), (4, 0.125)]):
        found = layer.matrices(expert)
        np.testing.assert_array_equal(found["gate"], stacks["gate"][expert] * first)
        np.testing.assert_array_equal(found["up"], stacks["up"][expert] * first)
        np.testing.assert_array_equal(found["down"], stacks["down"][expert] * last)
    with pytest.raises(UnknownFormat, match=r"gate_proj.* has separate factors for each expert, and can't be replaced"):
        layer.tensors[0].place  # noqa: B018


def test_factors_of_one_change_nothing() -> None:
    layer = open_made(with_factors(gate_scale=[1, 1, 1], out_scale=[1, 1, 1]), INKLING).layer(0)
    assert layer.factors == {}
    assert layer.tensors[0].place == ("model.layers.0", "mlp.switch_mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"gate_scale": [1, 2, 3]}, "layer 0 has gate_scale, but lacks the other factors of its experts"),
        ({"gate_scale": [1, 2], "out_scale": [1, 2, 3]}, "gate_scale should hold one factor for each of 3 experts"),
        ({"gate_scale": [1, 0, 2], "out_scale": [1, 2, 3]}, "gate_scale should hold one factor for each of 3 experts"),
        ({"gate_scale": [1, 1, 2], "out_scale": [1, np.nan, 3]}, "out_scale should hold one factor for each of 3"),
    ],
)
def test_factors_that_are_broken_are_refused(factors: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelUnreadable, match=message):
        open_made(with_factors(**factors), INKLING).layer(0).matrices(0)


# ---------------------------------------------------------------------------------------------------------------------
# Windows of rows


def assemble(tensor: ExpertTensor, experts: Sequence[int], windows: Iterable[Range]) -> Matrices:
    """The matrices put together from windows, after a check that each weight comes exactly once."""
    shapes = {role: (len(experts), *tensor.layer.shape(role)) for role in tensor.spec.roles}
    result = {role: np.full(shape, np.nan, np.float32) for role, shape in shapes.items()}
    times = {role: np.zeros(shape, int) for role, shape in shapes.items()}
    for low, high in windows:
        for piece in tensor.read(experts, low, high):
            result[piece.role][:, *piece.index] = piece.values
            times[piece.role][:, *piece.index] += 1
    assert all((count == 1).all() for count in times.values())
    return result


@every_fixture_and("budget", 1, 200, 1000, 10**9)
def test_windows_cover_every_weight_once(name: str, budget: int) -> None:
    experts = open_fixture(name)
    layer = experts.layer(experts.layers[-1])
    chosen = [layer.count - 1, 0]
    for tensor in layer.tensors:
        windows = tensor.windows(budget)
        assert [low for low, _ in windows] == [0, *(high for _, high in windows[:-1])]
        row = layer.count * tensor.columns
        least = min(8, tensor.stored.granule)  # rows share scales, which are read once a window
        assert windows[-1][1] == tensor.rows
        assert all((high - low) * row <= max(budget, least * row) for low, high in windows)
        assert budget > 1 or len(windows) == -(-tensor.rows // least)
        for role, matrices in assemble(tensor, chosen, windows).items():
            np.testing.assert_array_equal(matrices, oracle(name)[layer.number][role][chosen])


@every_fixture_and("step", 3, 7)
def test_windows_may_start_between_a_gate_and_its_up(name: str, step: int) -> None:
    experts = open_fixture(name)
    layer = experts.layer(experts.layers[0])
    for tensor in layer.tensors:
        windows = [(low, min(low + step, tensor.rows)) for low in range(0, tensor.rows, step)]
        for role, matrices in assemble(tensor, range(layer.count), windows).items():
            np.testing.assert_array_equal(matrices, oracle(name)[layer.number][role])


# ---------------------------------------------------------------------------------------------------------------------
# A second oracle: what MLX LM makes of the same files


IN_MLX_LM = [
    *RECIPES,
    "dbrx",
    "dbrx_square",
    "deepseek_v3",
    "deepseek_v3_sharded",
    "jamba",
    "lfm2_moe",
    "mixtral",
    "mixtral_square",
    "olmoe",
    "phimoe",
]
LEAVES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "v1": "up", "w2": "down"}


def load_mlx_lm(folder: Path, recipe: Recipe, scratch: Path) -> dict[int, Matrices]:
    """layer -> role -> [experts, out, in], from MLX LM's model with the weights loaded."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    config = dict(recipe.config)
    if recipe.rename:
        for file in folder.glob("*.safetensors"):
            weights = mx.load(str(file))
            if recipe.shift:
                weights = {key: value for key, value in weights.items() if "layers.0." not in key}
            renamed = {re.sub(*recipe.rename, key): value for key, value in weights.items()}
            mx.save_safetensors(str(scratch / file.name), renamed)
        original = json.loads((folder / "config.json").read_text())
        (scratch / "config.json").write_text(json.dumps(original))
        if config.get("model_type") == "llama4":
            config["text_config"] = {**original, **ROPE, "rope_scaling": None, "num_experts_per_tok": 1}
        folder = scratch
    model, _ = load_model(folder, strict=False, model_config=config)
    found: dict[int, dict[str, dict[int, Array]]] = {}
    for path, module in model.named_modules():
        place = re.search(r"\.(\d+)\.\w+\.(?:switch_mlp|experts)\.(?:(\d+)\.)?(\w+)$", path)
        if not place or place[3] not in LEAVES:
            continue
        weight = module["weight"]
        if "scales" in module:
            weight = mx.dequantize(weight, module["scales"], group_size=32, bits=4, mode=module.mode, dtype=mx.float32)
        roles = found.setdefault(int(place[1]) + recipe.shift, {})
        roles.setdefault(LEAVES[place[3]], {})[int(place[2] or 0)] = np.array(weight.astype(mx.float32))
    return {
        layer: {r: np.stack([e[i] for i in sorted(e)]) if len(e) > 1 else e[0] for r, e in roles.items()}
        for layer, roles in found.items()
    }


@pytest.mark.parametrize("name", IN_MLX_LM)
def test_mlx_lm_reads_the_same_matrices(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlx_lm")
        theirs = load_mlx_lm(FIXTURES / name, RECIPES.get(name, Recipe()), tmp_path)
    ours = open_fixture(name)
    assert sorted(theirs) == list(ours.layers)
    for number, expected in theirs.items():
        found = read_all(ours.layer(number))
        if ours.layer(number).storage == "fp8":  # MLX LM keeps what it decodes in bfloat16
            found = {role: m.astype(ml_dtypes.bfloat16).astype(np.float32) for role, m in found.items()}
        assert_same(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Axes


@pytest.mark.parametrize(
    ("text", "groups", "stacked", "flattened"),
    [
        ("I H", (("I",), ("H",)), False, False),
        ("H I", (("H",), ("I",)), False, False),
        ("E (2 I) H", (("2", "I"), ("H",)), True, False),
        ("E (I 2) H", (("I", "2"), ("H",)), True, False),
        ("E H (2 I)", (("H",), ("2", "I")), True, False),
        ("(E I) H", (("I",), ("H",)), True, True),
        ("(E 2 I) H", (("2", "I"), ("H",)), True, True),
    ],
)
def test_axes_parse(text: str, groups: tuple[Any, Any], stacked: bool, flattened: bool) -> None:
    assert StoredAxes.parse(text) == StoredAxes(text, groups, stacked, flattened)


@pytest.mark.parametrize(
    "text", ["", "()", "E", "I", "E I", "I H H", "E I H 2", "E X H", "E E I", "(2 I)", "(2 H) I", "H E I", "I (E H)"]
)
def test_axes_refuse_what_describes_no_expert(text: str) -> None:
    with pytest.raises(ValueError, match="axes"):
        StoredAxes.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "known", "expected"),
    [
        ("I H", (24, 16), {}, {"I": 24, "H": 16}),
        ("E (2 I) H", (4, 48, 16), {}, {"E": 4, "I": 24, "H": 16}),
        ("E (2 I) H", (4, 47, 16), {}, None),
        ("E (2 I) H", (48, 16), {}, None),
        ("E H I", (4, 16, 24), {"E": 5}, None),
        ("E H I", (4, 16, 24), {"I": 16}, None),
        ("E H I", (4, 16, 24), {"E": 4, "I": 24, "H": 16}, {"E": 4, "I": 24, "H": 16}),
        ("(E I) H", (96, 16), {}, {"H": 16}),
        ("(E I) H", (96, 16), {"E": 4}, {"E": 4, "I": 24, "H": 16}),
        ("(E I) H", (97, 16), {"E": 4}, None),
    ],
)
def test_axes_solve(text: str, shape: tuple[int, ...], known: dict[str, int], expected: dict[str, int] | None) -> None:
    assert StoredAxes.parse(text).solve(shape, known) == expected


sizes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@every_row
@given(sizes=sizes)
@settings(deadline=None)
def test_shapes_give_the_sizes_back(row: Layout, sizes: tuple[int, int, int]) -> None:
    matrices = random_experts(*sizes)
    shapes = {t.role: store(row_axes(row)[t.role], t.role, matrices).shape for t in row.tensors}
    if not row.is_stacked:
        shapes = {role: shape[1:] for role, shape in shapes.items()}
    told = sizes[0] if row.is_flattened or not row.is_stacked else None
    assert row.solve(shapes, told) == dict(zip("EIH", sizes, strict=True))


@every_row
@given(sizes=sizes, block=st.integers(0, 2), seed=st.integers(0, 99), budget=st.integers(1, 300))
@settings(deadline=None, max_examples=examples(25))
def test_values_stored_by_a_rows_axes_are_read_back(
    row: Layout, sizes: tuple[int, int, int], block: int, seed: int, budget: int
) -> None:
    matrices = {role: random_experts(*sizes, seed)[role] for role in roles_of(row)}
    model_types = sorted(row.model_types) or ["mystery"]
    config = {"model_type": model_types[seed % len(model_types)]}
    experts = open_made(as_stored(row, matrices, block=block), config)
    assert experts.family == row.name
    layer = experts.layer(0)
    assert_same(read_all(layer), matrices)
    assert layer.parameters == len(matrices) * prod(sizes)
    assert layer.stored_bytes == 4 * layer.parameters
    for tensor in layer.tensors:
        for role, found in assemble(tensor, range(sizes[0]), tensor.windows(budget)).items():
            np.testing.assert_array_equal(found, matrices[role])


# ---------------------------------------------------------------------------------------------------------------------
# Matching names

SIZES = (3, 6, 4)  # experts, intermediate, hidden: neither is twice the other
MATRICES = random_experts(*SIZES)


@pytest.mark.parametrize("model_type", ["mystery_moe", None])
@pytest.mark.parametrize("name", ["gate_up_down", "w1_w3_w2", "dbrx", "granite", "llama4"])
def test_names_that_fit_one_row_need_no_known_model_type(name: str, model_type: str | None) -> None:
    experts = open_made(as_stored(ROWS[name], MATRICES), model_type and {"model_type": model_type})
    assert experts.family == name
    assert_same(read_all(experts.layer(0)), MATRICES)
    (note,) = experts.notes
    assert name in note
    assert (model_type or "none") in note


@pytest.mark.parametrize("intermediate", [2, 3, 6])  # with hidden 4: gate_up square, neither, neither
@pytest.mark.parametrize(("name", "block"), [("stacked", 2), ("llama4", 0)])
def test_shapes_tell_a_transposed_stack(name: str, block: int, intermediate: int) -> None:
    matrices = random_experts(3, intermediate, 4)
    experts = open_made(as_stored(ROWS[name], matrices, block=block), {"model_type": "mystery_moe"})
    assert experts.family == name
    assert_same(read_all(experts.layer(0)), matrices)


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss_transposed"])
@pytest.mark.parametrize("intermediate", [2, 3, 4, 6, 8])
def test_shapes_tell_the_two_forms_of_gpt_oss(name: str, intermediate: int) -> None:
    matrices = random_experts(3, intermediate, 4)
    experts = open_made(as_stored(ROWS[name], matrices), {"model_type": "gpt_oss"})
    assert (experts.family, experts.notes) == (name, [])
    assert_same(read_all(experts.layer(0)), matrices)


HALVES = {"gate_up_proj": "E (2 I) H", "down_proj": "E H I"}
TURNS = {"gate_up_proj": "E (I 2) H", "down_proj": "E H I"}
HALVES_TRANSPOSED = {"gate_up_proj": "E H (2 I)", "down_proj": "E I H"}
TURNS_TRANSPOSED = {"gate_up_proj": "E H (I 2)", "down_proj": "E I H"}


def stack(axes: Mapping[str, str], prefix: str = "model.layers.0.") -> dict[str, Array]:
    return {
        f"{prefix}mlp.experts.{leaf}": store(text, leaf.removesuffix("_proj"), MATRICES) for leaf, text in axes.items()
    }


@pytest.mark.parametrize("axes", [HALVES, TURNS, HALVES_TRANSPOSED, TURNS_TRANSPOSED])
@pytest.mark.parametrize("config", [None, {}, {"model_type": "mystery_moe"}])
def test_halves_or_turns_are_never_guessed(axes: Mapping[str, str], config: dict[str, Any] | None) -> None:
    """No shape tells "all gates, then all ups" from "gate and up in turns": only a known model type does."""
    with pytest.raises(UnknownFormat):
        open_made(stack(axes), config)


@pytest.mark.parametrize("axes", [HALVES, HALVES_TRANSPOSED])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe_text", "openai_privacy_filter", "mixtral"])
def test_a_family_of_halves_is_read_right_or_refused(axes: Mapping[str, str], model_type: str) -> None:
    try:
        experts = open_made(stack(axes), {"model_type": model_type})
    except UnknownFormat:
        return
    assert_same(read_all(experts.layer(0)), MATRICES)


@pytest.mark.parametrize(
    "prefix",
    [
        "layers.0.",
        "language_model.model.layers.0.",
        "model.language_model.layers.0.",
        "backbone.layers.0.",
        "transformer.blocks.0.",
        "model.decoder_layer.0.",
        "thinker.model.layers.0.",
    ],
)
def test_any_prefix_before_the_layers(prefix: str) -> None:
    experts = open_made(as_stored(ROWS["gate_up_down"], MATRICES, prefix), {"model_type": "qwen3_moe"})
    assert experts.layers == (0,)
    assert_same(read_all(experts.layer(0)), MATRICES)


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 3, "num_hidden_layers": 1}},
        {"llm_config": {"model_type": "qwen3_moe"}},
        {"thinker_config": {"model_type": "x", "text_config": {"model_type": "qwen3_moe"}}},
        {"text_config": {"num_experts": 3}},
    ],
)
def test_the_text_part_of_a_multimodal_config_decides(config: dict[str, Any]) -> None:
    experts = open_made(stack(HALVES, "model.language_model.layers.0."), {"model_type": "qwen3_5_moe", **config})
    assert (experts.family, experts.notes) == ("stacked", [])
    assert_same(read_all(experts.layer(0)), MATRICES)


NOT_ROUTED = [
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "mlp.experts.e_score_correction_bias",
    "mlp.router.weight",
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert_gate.weight",
    "mlp.shared_experts.up_proj.weight",
    "mlp.shared_mlp.down_proj.weight",
    "mlp.shared_experts.experts.0.up_proj.weight",
    "shared_mlp.input_linear.weight",
    "shared_mlp.output_linear.weight",
    "self_attention.experts.input_linear.weight",
    "self_attention.experts.output_linear.weight",
    "residual_mlp.w1.weight",
    "feed_forward.w1.weight",
    "feed_forward.expert_bias",
    "feed_forward.shared_expert.gate_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.gate_up_proj.weight",
    "mlp.moe_statics.e_score_correction_bias",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.shared_experts.gate_proj.weight",
]


def test_what_is_not_routed_is_never_counted() -> None:
    names = [f"model.layers.0.{name}" for name in NOT_ROUTED]
    assert match_names(names) == ([], [], [])
    experts = as_stored(ROWS["gate_up_down"], MATRICES)
    (match,), _, left = match_names([*names, *experts])
    assert (match.names, left) == (set(experts), [])


@every_row
def test_what_is_not_routed_changes_nothing(row: Layout) -> None:
    others = {f"model.layers.{i}.{name}": np.ones((2, 2), "<f4") for i in (0, 1) for name in NOT_ROUTED}
    layout = {"model_type": some_type(row), "num_hidden_layers": 2}
    experts = open_made(others | as_stored(row, MATRICES, "model.layers.1."), layout)
    assert (experts.layers, experts.layer(1).stored_bytes) == ((1,), 4 * len(roles_of(row)) * prod(SIZES))
    assert_same(read_all(experts.layer(1)), {role: MATRICES[role] for role in roles_of(row)})


@pytest.mark.parametrize("root", ["mtp", "model.mtp"])
@pytest.mark.parametrize("main", ["gate_up_down", "stacked"])
def test_a_multi_token_prediction_root_is_kept_apart(root: str, main: str) -> None:
    other = as_stored(ROWS["gate_up_down"], random_experts(*SIZES, seed=1), f"{root}.layers.0.")
    experts = open_made(
        other | as_stored(ROWS[main], MATRICES), {"model_type": "qwen3_next", "num_experts": 3, "num_hidden_layers": 1}
    )
    assert (experts.family, experts.layers, experts.mtp_layers) == (main, (0,), ())
    assert_same(read_all(experts.layer(0)), MATRICES)
    (note,) = experts.notes
    assert f"#{root} " in note
    apart = Experts(experts.checkpoint, stack=root)
    assert apart.stack == root
    assert_same(read_all(apart.layer(0)), random_experts(*SIZES, seed=1))


def test_two_stacks_are_kept_apart() -> None:
    other = random_experts(4, 8, 6, 1)
    tensors = as_stored(ROWS["gate_up_down"], MATRICES, "model.encoder.layers.0.")
    for number in (0, 1):
        tensors |= as_stored(ROWS["gate_up_down"], other, f"model.decoder.layers.{number}.")
    repository = make(tensors, {"model_type": "olmoe"})
    larger = Experts(Checkpoint(repository))
    assert (larger.stack, larger.stacks, larger.layers) == ("model.decoder", ("model.decoder", "model.encoder"), (0, 1))
    (note,) = larger.notes
    assert "#model.encoder" in note
    for name in ("encoder", "model.encoder"):
        encoder = Experts(Checkpoint(repository), stack=name)
        assert (encoder.stack, encoder.layers, encoder.notes) == ("model.encoder", (0,), [])
        assert_same(read_all(encoder.layer(0)), MATRICES)
    for name in ("model", "vision", ""):
        with pytest.raises(InvalidRequest, match=r"model\.decoder, model\.encoder"):
            Experts(Checkpoint(repository), stack=name)


def test_a_folder_may_have_the_sign_of_a_stack_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "switch#encoder"
    shutil.copytree(FIXTURES / "switch_transformers", folder)
    assert Experts.open(str(folder)).stack == "decoder"
    assert Experts.open(f"{folder}#encoder").stack == "encoder"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["mixer.experts.gate_and_up_projs", "mixer.experts.down_projs"], id="nemo"),
        pytest.param(["mlp.experts.0.alpha.weight", "mlp.experts.0.beta.weight"], id="per expert"),
        pytest.param(["mlp.experts.alpha", "mlp.experts.beta"], id="stacked"),
        pytest.param(["mlp.switch_mlp.alpha.weight"], id="mlx"),
        pytest.param(["moe.0.alpha.weight", "moe.0.beta.weight"], id="numbered"),
        pytest.param(["ffn_alpha_exps.weight"], id="gguf"),
        pytest.param(["mlp.experts.w13_weight"], id="half of a row"),
        pytest.param(["mlp.switch_mlp.gate_proj.weight", "mlp.switch_mlp.up_proj.weight"], id="two thirds of a row"),
    ],
)
def test_experts_in_no_row_are_an_unknown_format_and_not_a_dense_model(names: list[str]) -> None:
    tensors = {f"model.layers.0.{name}": np.ones((4, 6, 4), "<f4") for name in names}
    with pytest.raises((UnknownFormat, ModelUnreadable)):
        open_made(tensors, {"model_type": "mystery_moe", "num_experts": 4})


@pytest.mark.parametrize("other", ["stacked", "w1_w3_w2", "granite"])
def test_part_of_the_experts_in_another_layout_is_refused(other: str) -> None:
    tensors = as_stored(ROWS["gate_up_down"], MATRICES) | as_stored(ROWS[other], MATRICES, "model.layers.1.")
    with pytest.raises(UnknownFormat):
        open_made(tensors, {"model_type": "olmoe"})


@pytest.mark.parametrize("sizes", [(0, 6, 4), (2, 0, 4), (2, 6, 0)])
@every_row
def test_experts_without_a_weight_are_refused(row: Layout, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(MoEError):
        open_made(as_stored(row, random_experts(*sizes)), {"model_type": some_type(row)}).layer(0).sizes  # noqa: B018


@pytest.mark.parametrize("count", [2, 8])
def test_the_router_is_right_where_a_config_contradicts_it(count: int) -> None:
    """Flattened experts could be cut into any number of them."""
    tensors = as_stored(ROWS["dbrx"], random_experts(4, 6, 4))
    experts = open_made(tensors, {"model_type": "dbrx", "ffn_config": {"moe_num_experts": count}})
    assert experts.layer(0).count == 4
    assert f"layer 0 has 4 experts, as its router says, although config.json says {count}" in experts.notes


def test_a_huge_expert_number_costs_nothing() -> None:
    tensors = as_stored(ROWS["gate_up_down"], MATRICES)
    tensors["model.layers.0.mlp.experts.1000000.up_proj.weight"] = tensors[min(tensors)]
    repository = make(tensors, {"model_type": "olmoe"})
    tracemalloc.start()
    try:
        with pytest.raises(MoEError, match="expert 3"):
            Experts(Checkpoint(repository))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["model.layers.{}.mlp.experts.0.up_proj.weight", "layers.0.ffn.experts.{}.w1.weight"])
def test_a_number_too_long_for_an_integer_is_refused(name: str) -> None:
    with pytest.raises(MoEError):
        open_made({name.format("9" * 5000): np.ones((2, 2), "<f4")}, {"model_type": "olmoe"})


# ---------------------------------------------------------------------------------------------------------------------
# Biases


def change_biases(data: bytes, change: Callable[[dict[str, Any], bytearray, str], None]) -> tuple[bytes, int]:
    """A safetensors file with its experts' biases changed, and how many there were."""
    start = header_bytes(data)
    header, body = json.loads(data[8:start]), bytearray(data[start:])
    names = [name for name in header if re.search(r"experts\..*bias$", name)]
    for name in names:
        change(header, body, name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body), len(names)


def remove(header: dict[str, Any], body: bytearray, name: str) -> None:
    del header[name]


def spoil(header: dict[str, Any], body: bytearray, name: str) -> None:
    low, high = header[name]["data_offsets"]
    body[low:high] = b"\xff" * (high - low)  # NaN


@pytest.mark.parametrize("change", [remove, spoil])
@pytest.mark.parametrize("name", [name for name in WITH_ORACLE if name.startswith("gpt_oss")])
def test_a_bias_never_reaches_a_weight(
    name: str, change: Callable[[dict[str, Any], bytearray, str], None], tmp_path: Path
) -> None:
    data, count = change_biases((FIXTURES / name / "model.safetensors").read_bytes(), change)
    assert count == 2 * len(oracle(name))
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_bytes((FIXTURES / name / "config.json").read_bytes())
    experts = Experts.open(str(tmp_path))
    for number, expected in oracle(name).items():
        assert_same(read_all(experts.layer(number)), expected)
        assert experts.layer(number).stored_bytes == open_fixture(name).layer(number).stored_bytes


# ---------------------------------------------------------------------------------------------------------------------
# FP8 across the cuts


def fp8_tensor(rows: int, columns: int, block: int, seed: int) -> tuple[Array, Array, NDArray[np.float32]]:
    """Codes, scales, and what they mean by a loop over the elements."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 126, (rows, columns), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, (-(-rows // block), -(-columns // block))).astype(np.float32)
    values = np.empty((rows, columns), np.float32)
    for i, j in np.ndindex(rows, columns):
        values[i, j] = np.float32(codes[i, j]) * scales[i // block, j // block]
    return codes, scales, values


@pytest.mark.parametrize("budget", [1, 10**9])
@pytest.mark.parametrize(("intermediate", "hidden", "block"), [(4, 6, 4), (6, 6, 4), (4, 7, 3)])
def test_stacked_fp8_with_blocks_across_gate_and_up(intermediate: int, hidden: int, block: int, budget: int) -> None:
    shapes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
    tensors: dict[str, Array] = {}
    expected: dict[str, Array] = {}
    for seed, (leaf, shape) in enumerate(shapes.items()):
        codes, scales, values = zip(*(fp8_tensor(*shape, block, 10 * seed + e) for e in range(3)), strict=True)
        tensors[f"model.layers.0.mlp.experts.{leaf}"] = np.stack(codes)
        tensors[f"model.layers.0.mlp.experts.{leaf}_scale_inv"] = np.stack(scales)
        expected[leaf] = np.stack(values)
    quantization = {"quantization_config": {"weight_block_size": [block, block]}}
    text = {"text_config": {"model_type": "qwen3_5_moe_text"}}
    config = text | quantization if budget == 1 else {"text_config": text["text_config"] | quantization}
    layer = open_made(tensors, config).layer(0)
    gate, up = np.split(expected["gate_up_proj"], 2, axis=1)
    truth = {"gate": gate, "up": up, "down": expected["down_proj"]}
    assert_same(read_all(layer), truth)
    for tensor in layer.tensors:
        for role, found in assemble(tensor, range(3), tensor.windows(budget)).items():
            np.testing.assert_array_equal(found, truth[role])


def test_blocks_that_may_end_between_gate_and_up_are_refused() -> None:
    """With 5 rows each and blocks of 3, two grids of 2 rows and one grid of 4 look the same."""
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 10, 6), ml_dtypes.float8_e4m3fn),
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv": np.ones((2, 4, 2), "<f4"),
        "model.layers.0.mlp.experts.down_proj": np.ones((2, 6, 5), ml_dtypes.float8_e4m3fn),
        "model.layers.0.mlp.experts.down_proj_scale_inv": np.ones((2, 2, 2), "<f4"),
    }
    config = {"model_type": "qwen3_moe", "quantization_config": {"weight_block_size": [3, 3]}}
    with pytest.raises(UnknownFormat, match="gate and up"):
        open_made(tensors, config).layer(0).matrices(0)


def test_an_expert_without_its_scales_is_refused() -> None:
    tensors: dict[str, Array] = {}
    for name, array in as_stored(ROWS["gate_up_down"], MATRICES).items():
        tensors[name] = np.zeros(array.shape, ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale"] = np.ones((array.shape[0], 1), "<f4")
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale"]
    with pytest.raises(ModelUnreadable, match="layer 0: expert 2 lacks the weight_scale"):
        open_made(tensors, {"model_type": "olmoe"}).layer(0).sizes  # noqa: B018


LISTED_ELSEWHERE = sorted({kind for row in TABLE.values() if row.kind != "routed" for kind in row.model_types})


@pytest.mark.parametrize("model_type", [*LISTED_ELSEWHERE, "llama", "mistral"])
@pytest.mark.parametrize("axes", [TURNS, TURNS_TRANSPOSED])
def test_what_is_known_of_other_layers_says_nothing_of_halves_or_turns(
    axes: Mapping[str, str], model_type: str
) -> None:
    if is_listed(model_type):
        return
    with pytest.raises(UnknownFormat):
        open_made(stack(axes), {"model_type": model_type})


@pytest.mark.parametrize("intermediate", [4, 6])
def test_flattened_fp8_is_read_right_or_refused(intermediate: int) -> None:
    """With 6 rows in an expert and blocks of 4, a block holds rows of two experts."""
    tensors: dict[str, Array] = {}
    values: Matrices = {}
    for seed, (leaf, role) in enumerate({"w1": "gate", "v1": "up", "w2": "down"}.items()):
        name = f"transformer.blocks.0.ffn.experts.mlp.{leaf}"
        tensors[name], tensors[f"{name}_scale_inv"], flat = fp8_tensor(3 * intermediate, 8, 4, seed)
        cube = flat.reshape(3, intermediate, 8)
        values[role] = cube.transpose(0, 2, 1) if role == "down" else cube
    config = {
        "model_type": "dbrx",
        "ffn_config": {"moe_num_experts": 3},
        "quantization_config": {"weight_block_size": [4, 4]},
    }
    try:
        found = read_all(open_made(tensors, config).layer(0))
    except MoEError:
        assert intermediate == 6
        return
    assert_same(found, values)


# ---------------------------------------------------------------------------------------------------------------------
# Laziness


def quiet(what: str, done: int, total: int) -> None:
    pass


def three_layers(shards: bool) -> Memory:
    """3 layers of 12 experts, 96 x 64 in bfloat16, each layer in a file of its own where `shards`."""
    tensors: dict[str, Array] = {}
    for number in range(3):
        stored = as_stored(ROWS["gate_up_down"], random_experts(12, 96, 64, number), f"model.layers.{number}.")
        tensors |= {name: array.astype(ml_dtypes.bfloat16) for name, array in stored.items()}
    config = {"model_type": "olmoe", "num_experts": 12, "num_hidden_layers": 3}
    if not shards:
        return make(tensors, config)
    place = {name: f"model-0000{int(name.split('.')[2]) + 1}-of-00003.safetensors" for name in tensors}
    contents = {
        file: safetensors({name: array for name, array in tensors.items() if place[name] == file})
        for file in set(place.values())
    }
    index = {"model.safetensors.index.json": json.dumps({"weight_map": place}).encode()}
    return Memory(contents | index | {"config.json": json.dumps(config).encode()})


def bytes_of_headers(repository: Memory) -> int:
    return sum(
        header_bytes(data) if name.endswith(".safetensors") else len(data) for name, data in repository.contents.items()
    )


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("wanted", [8, None])
def test_one_layer_costs_the_headers_and_that_layer(shards: bool, number: int, wanted: int | None) -> None:
    repository = three_layers(shards)
    checkpoint = Checkpoint(repository)
    layer = Experts(checkpoint).layer(number)
    measure_layer(layer, evenly_spaced(layer.count, wanted), Resources.current(), quiet)
    experts = 12 * 3 * 96 * 64 * 2
    assert layer.stored_bytes == experts
    read = sum(stop - start for _, start, stop in repository.reads)
    assert checkpoint.bytes_read == read
    assert read <= bytes_of_headers(repository) + 1.01 * experts


@every_fixture_and("window", 1, 4_000_000)
def test_every_byte_of_the_layer_is_read_once(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resources, "window_weights", window)
    folder, stack = split_model(str(FIXTURES / name))
    repository = load_folder(Path(folder))
    experts = Experts(Checkpoint(repository), stack=stack)
    layer = experts.layer(experts.layers[-1])
    wanted = {(info.file, info.start, info.stop) for tensor in layer.tensors for info in tensor.infos()}
    assert set(layer.factors) <= set(layer.roles)  # tensors beside the experts, read once and kept
    repository.reads.clear()
    measure_layer(layer, evenly_spaced(layer.count, 8), Resources.current(), quiet)
    read = sum(stop - start for _, start, stop in repository.reads)
    # each window reads the scales of its block of rows, and what belongs to the whole tensor
    scales_again = {"fp8": 0.06, "mlx-nvfp4": 0.8, "nvfp4": 0.8}.get(layer.storage, 0.0) if window == 1 else 0.0
    if name == "published_inkling2_loop":  # one denominator for all experts, which is read with each
        scales_again += 0.01
    # the shapes of packed integers were read when they were recognised
    shapes = sum(info.nbytes for tensor in layer.tensors for info in tensor.infos() if info.name.endswith("_shape"))
    least = layer.stored_bytes - shapes
    if layer.has_shared_last:  # a shared expert at the end of each stack is not read
        least = least * layer.count // (layer.count + 1)
    assert least <= read <= layer.stored_bytes * (1 + scales_again)
    for file, start, stop in repository.reads:
        assert any(file == inside and low <= start <= stop <= high for inside, low, high in wanted)


def test_only_the_chosen_experts_are_read_again_when_they_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resources, "kept_weights", 0)
    repository = three_layers(False)
    layer = Experts(Checkpoint(repository)).layer(1)
    repository.reads.clear()
    measure_layer(layer, evenly_spaced(layer.count, 3), Resources.current(), quiet)
    assert sum(stop - start for _, start, stop in repository.reads) == layer.stored_bytes * (12 + 3) // 12


def test_shards_of_other_layers_stay_closed() -> None:
    repository = load_folder(FIXTURES / "deepseek_v3_sharded")
    experts = Experts(Checkpoint(repository))
    measure_layer(experts.layer(1), evenly_spaced(4, 8), Resources.current(), quiet)
    index = json.loads(repository.contents["model.safetensors.index.json"])["weight_map"]
    needed = {file for name, file in index.items() if ".mlp.experts." in name}
    assert needed < set(index.values())
    opened = {file for file, _, _ in repository.reads if file.endswith(".safetensors")}
    assert opened == needed


def test_shards_are_opened_only_for_the_first_and_the_asked_layer() -> None:
    repository = three_layers(True)
    measure_layer(Experts(Checkpoint(repository)).layer(1), evenly_spaced(12, 8), Resources.current(), quiet)
    read = [read for read in repository.reads if read[0].startswith("model-0000")]
    assert {file[:11] for file, _, _ in read} == {"model-00001", "model-00002"}
    data = sum(stop - start for file, start, stop in read if file.startswith("model-00001"))
    first = next(content for file, content in repository.contents.items() if file.startswith("model-00001"))
    assert data < 0.3 * len(first), "the first layer tells the layout by its header alone"


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    ("name", "parameters", "stored"),
    [
        ("olmoe", 5 * 3 * 24 * 16, 5 * 3 * 24 * 16 * 2),
        ("dbrx", 4 * 3 * 24 * 16, 4 * 3 * 24 * 16 * 2),
        ("gpt_oss", 4 * 3 * 24 * 16, 4 * 3 * 24 * 16 * 2),
        ("granitemoe_square", 4 * 3 * 16 * 32, 4 * 3 * 16 * 32 * 2),
        # one byte a weight, and 2 x 2 float32 scales a matrix
        ("deepseek_v3_fp8", 2 * 3 * 132 * 136, 2 * 3 * (132 * 136 + 2 * 2 * 4)),
        # half a byte a weight, and one byte for 32 of them
        ("gpt_oss_mxfp4", 3 * 3 * 96 * 64, 3 * 3 * 96 * 64 // 2 + 3 * 3 * 96 * 64 // 32),
    ],
)
def test_parameters_and_stored_bytes(name: str, parameters: int, stored: int) -> None:
    layer = open_fixture(name).layer(open_fixture(name).layers[0])
    assert (layer.parameters, layer.stored_bytes) == (parameters, stored)


def test_four_layers_of_olmoe_are_3072_mib(tmp_path: Path) -> None:
    shapes = {"gate_proj": [1024, 2048], "up_proj": [1024, 2048], "down_proj": [2048, 1024]}
    entries: dict[str, Any] = {}
    for number in (0, 5, 10, 15):
        for expert in range(64):
            for leaf, shape in shapes.items():
                start = len(entries) * 1024 * 2048 * 2
                entries[f"model.layers.{number}.mlp.experts.{expert}.{leaf}.weight"] = {
                    "dtype": "BF16",
                    "shape": shape,
                    "data_offsets": [start, start + 1024 * 2048 * 2],
                }
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + len(entries) * 1024 * 2048 * 2)
    config = {"model_type": "olmoe", "num_experts": 64, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(Folder(tmp_path))
    experts = Experts(checkpoint)
    assert experts.layers == (0, 5, 10, 15)
    layers = [experts.layer(number) for number in experts.layers]
    assert sum(layer.stored_bytes for layer in layers) == 3072 * 2**20
    assert sum(layer.parameters for layer in layers) == 4 * 64 * 3 * 1024 * 2048
    assert checkpoint.bytes_read < 2**18


# ---------------------------------------------------------------------------------------------------------------------
# Heads, shared experts in a stack, layers of several sizes


@pytest.mark.parametrize(
    "head",
    [
        "model.mtp.layers.0.transformer_block.",
        "mtp.layers.0.mtp_block.inner.",
        "model.layers.7.inner.",
        "mtp_predictor.layers.0.inner.",
        "model.nextn.layers.0.inner.",
        "mtp.0.",
        "model.mtp_block.",
    ],
)
def test_experts_nested_in_a_prediction_head_are_a_note(head: str) -> None:
    row = TABLE["gate_up_down"]
    matrices = random_experts(3, 6, 4)
    nested = {name.replace("model.layers.0.", head): w for name, w in as_stored(row, matrices).items()}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1}
    experts = open_made(as_stored(row, matrices) | nested, config)
    (note,) = experts.notes
    assert "multi-token prediction" in note
    assert head in note
    assert_same(read_all(experts.layer(0)), matrices)


def test_experts_nested_elsewhere_are_refused() -> None:
    row = TABLE["gate_up_down"]
    matrices = random_experts(3, 6, 4)
    nested = {
        name.replace("model.layers.0.", "model.layers.0.inner."): w for name, w in as_stored(row, matrices).items()
    }
    with pytest.raises(UnknownFormat, match="which look like routed experts"):
        open_made(as_stored(row, matrices) | nested, {"model_type": "deepseek_v3", "num_hidden_layers": 1})


def test_a_shared_expert_at_the_end_of_a_stack_is_no_routed_one_and_is_not_replaced() -> None:
    experts = open_fixture("published_mlx_minimax_m3_fused")
    assert experts.notes == ["expert 4 of each stack is the shared expert, and is left out"]
    tensor = experts.layer(0).tensors[0]
    with pytest.raises(UnknownFormat, match="also holds the shared expert"):
        _ = tensor.place


@pytest.mark.parametrize("plain", [0, 2])
def test_some_experts_may_be_left_unquantised(plain: int) -> None:
    row = TABLE["gate_up_down"]
    tensors = as_stored(row, random_experts(3, 6, 4))
    expected = {role: values.copy() for role, values in random_experts(3, 6, 4).items()}
    for role in expected:
        for expert in range(3):
            if expert != plain:
                name = f"model.layers.0.mlp.experts.{expert}.{role}_proj.weight"
                coded = tensors[name].astype(ml_dtypes.float8_e4m3fn)
                tensors |= {name: coded, f"{name}_scale": np.asarray(2, np.float32)}
                expected[role][expert] = 2 * coded.astype(np.float32)
    layer = open_made(tensors, {"model_type": "qwen3_moe", "num_experts": 3}).layer(0)
    assert_same(read_all(layer), expected)
    assert layer.storage == ("f32+fp8" if plain == 0 else "fp8+f32")


@pytest.mark.parametrize(
    ("row", "block"),
    [("gate_up_down", "zaya_block.experts.{expert}"), ("stacked_gate_up_down", "zaya_block.experts.switch_mlp")],
)
def test_other_names_of_zaya(row: str, block: str) -> None:
    """Cut apart by a quantiser, and stacked for MLX."""
    tensors = as_stored(TABLE[row], matrices := random_experts(3, 6, 4))
    old = re.compile(r"mlp\.experts\.(\d+)\." if "{expert}" in block else r"mlp\.switch_mlp\.")
    new = block.replace("{expert}", r"\1") + "."
    experts = open_made({old.sub(new, name): w for name, w in tensors.items()}, {"model_type": "zaya"})
    assert_same(read_all(experts.layer(0)), matrices)


def test_a_stack_with_one_expert_too_many_is_refused_for_other_models() -> None:
    tensors = as_stored(TABLE["stacked"], random_experts(5, 6, 4))
    with pytest.raises(ModelUnreadable, match=r"5 experts, but config\.json says 4"):
        _ = open_made(tensors, {"model_type": "qwen3_moe", "num_experts": 4}).layer(0).sizes


def test_the_number_of_experts_may_differ_by_layer() -> None:
    """As in gpt-oss-puzzle, whose config lists the blocks."""
    row = TABLE["gpt_oss"]
    layers = {0: random_experts(4, 6, 8, 1), 1: random_experts(2, 6, 8, 2)}
    tensors = as_stored(row, layers[0]) | as_stored(row, layers[1], "model.layers.1.")
    blocks = [{"num_local_experts": 4}, {"num_local_experts": 2}]
    experts = open_made(tensors, {"model_type": "gpt_oss_puzzle", "block_configs": blocks})
    for number, matrices in layers.items():
        assert_same(read_all(experts.layer(number)), matrices)
    wrong = {"model_type": "gpt_oss_puzzle", "block_configs": blocks[::-1]}
    with pytest.raises(ModelUnreadable, match=r"layer 0 has 4 experts, but config\.json says 2"):
        _ = open_made(tensors, wrong).layer(0).sizes


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_gates_and_ups_in_turns_are_those_of_their_row_s_types_alone(model_type: str) -> None:
    """vLLM's own parameters have Inkling's names, in halves."""
    with pytest.raises(UnknownFormat, match="may be in halves or in turns"):
        open_made(as_stored(TABLE["inkling"], random_experts(3, 6, 4)), {"model_type": model_type})


def test_the_vision_experts_of_a_list_are_left_out_even_where_they_are_as_large() -> None:
    tensors = as_stored(TABLE["gate_up_down"], matrices := random_experts(6, 6, 4))
    experts = open_made(tensors, {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [4, 2]})
    assert_same(read_all(experts.layer(0)), {role: m[:4] for role, m in matrices.items()})
    assert "experts 4-5 " in experts.notes[0]


def test_tensors_of_a_method_that_is_not_decoded_are_refused_by_its_name() -> None:
    """torchao flattens the parameters of stacked experts, so that no row has their names."""
    names = [
        f"model.layers.0.mlp.experts._{leaf}_proj_{part}" for leaf in ("gate_up", "down") for part in ("qdata", "scale")
    ]
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "torchao"}}
    with pytest.raises(UnknownFormat, match="stored as torchao, which we don't decode"):
        open_made({name: np.zeros((2, 4), np.uint8) for name in names}, config)
