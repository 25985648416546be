"""The overlay in MLX, against mlx-lm's own models of the same weights put together, and against plain loops."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.numerics.low_rank import Factors, factorise, rebuild
from chuk_lazarus.introspection.moe.overlays.codes import RoleCodes, parse_code
from chuk_lazarus.introspection.moe.overlays.codes.bf16 import Bf16Code
from chuk_lazarus.introspection.moe.overlays.codes.bits import BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from chuk_lazarus.introspection.moe.overlays.codes.trellis import TrellisCode
from chuk_lazarus.introspection.moe.overlays.quantisation import BF16, as_stored
from chuk_lazarus.introspection.moe.reports import Evaluation
from places import FIXTURES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.generate import generate_step
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from chuk_lazarus.introspection.moe.overlays.runtime.evaluate import evaluate
    from chuk_lazarus.introspection.moe.overlays.runtime.load import load_overlay
    from chuk_lazarus.introspection.moe.overlays.runtime.modules import CodedGLU, OverlayGLU, OverlayLinear, OverlayMoE

Array = NDArray[np.float32]
Matrices = dict[int, dict[str, Array]]  # layer -> role -> [experts, out, in]

ROLES = ("gate", "up", "down")
FULL = 10**6
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: an overlay, and the same model with its experts put together


def name_by_projection(layer: int, expert: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"


def name_as_mixtral(layer: int, expert: int, role: str) -> str:
    short = {"gate": "w1", "up": "w3", "down": "w2"}[role]
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{short}.weight"


@dataclass(frozen=True)
class Family:
    """A fixture, what mlx-lm wants to find in its config, and how its experts' tensors are named.

    Without `expert_name` the standard checkpoint takes mlx-lm's own names.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    expert_name: Callable[[int, int, str], str] | None = name_by_projection
    first_layer: int = 0  # mlx-lm has no dense layers in this family: leave out those before


ROPE = {"rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "mixtral": Family(expert_name=name_as_mixtral),
    "olmoe": Family({"norm_topk_prob": True}),
    "qwen2_moe": Family({**ROPE, "num_hidden_layers": 1}, first_layer=1),
    "qwen3_moe": Family({**ROPE, "num_experts": 4}),
    "gpt_oss": Family({"rope_theta": 150000}, expert_name=None),
    "deepseek_v2": Family({"rope_scaling": YARN}),
    "deepseek_v3": Family(),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@dataclass(frozen=True)
class Source:
    """A fixture's config, its tensors that are no expert's matrix, and its experts."""

    config: dict[str, Any]
    others: dict[str, Any]
    experts: Matrices


@cache
def read(name: str) -> Source:
    family, folder = FAMILIES[name], FIXTURES / name
    shift = family.first_layer
    config = json.loads((folder / "config.json").read_text()) | dict(family.config)
    others = {}
    for key, value in mx.load(str(folder / "model.safetensors")).items():
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else None
        routed = ".experts." in key and not key.endswith("bias")
        if not routed and (layer is None or layer >= shift):
            others[key if layer is None else key.replace(f"layers.{layer}.", f"layers.{layer - shift}.")] = value
    experts: Matrices = {}
    with np.load(folder / "oracle.npz") as arrays:
        for key in arrays.files:
            number, role = key.split(".")
            experts.setdefault(int(number) - shift, {})[role] = arrays[key]
    return Source(config, others, experts)


@dataclass(frozen=True)
class Overlay:
    """One role of one layer: base [out, in] and the factors of each expert, in numbers as they are stored."""

    base: Array
    factors: tuple[Factors, ...]

    @property
    def rank(self) -> int:
        return self.factors[0].left.shape[1]

    def rebuilt(self) -> Array:
        return np.stack([rebuild(self.base, factors) for factors in self.factors])


Overlays = dict[int, dict[str, Overlay]]


def overlay(experts: Array, rank: int, store: Callable[[Array], Array] = as_stored) -> Overlay:
    base = store(experts.mean(axis=0, dtype=np.float64).astype(np.float32))
    found = [factorise(expert - base, min(rank, *base.shape)) for expert in experts]
    return Overlay(base, tuple(Factors(store(each.left), store(each.right)) for each in found))


def overlay_all(source: Source, ranks: Mapping[str, int], store: Callable[[Array], Array] = as_stored) -> Overlays:
    return {
        layer: {role: overlay(matrices, ranks[role], store) for role, matrices in roles.items()}
        for layer, roles in source.experts.items()
    }


def write_overlay(folder: Path, source: Source, overlays: Overlays, kept: Mapping[str, Any] | None = None) -> Path:
    """The overlay checkpoint as its format says, in two shards; `kept` are experts that stay as they were."""
    folder.mkdir()
    tensors = {}
    for layer, roles in overlays.items():
        for role, each in roles.items():
            parts = {
                "base": each.base,
                "left": np.stack([factors.left for factors in each.factors]),
                "right": np.stack([factors.right for factors in each.factors]),
            }
            for part, array in parts.items():
                exact = (as_stored(array) == array).all()
                stored = mx.array(array).astype(mx.bfloat16 if exact else mx.float32)
                tensors[f"model.layers.{layer}.overlay.{role}.{part}"] = stored
    weight_map = {}
    for number, shard in enumerate((source.others | dict(kept or {}), tensors), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    layers = {str(n): {role: each.rank for role, each in roles.items()} for n, roles in overlays.items()}
    config = {"version": 1, "source": "made", "revision": None, "family": "any", "dtype": "bfloat16", "layers": layers}
    (folder / "config.json").write_text(json.dumps(source.config | {"overlay_config": config}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def standard_tensors(name: str, experts: Matrices) -> dict[str, Any]:
    """The experts' tensors, in float32, as a checkpoint of the family that mlx-lm can load has them."""
    tensors: dict[str, Any] = {}
    expert_name = FAMILIES[name].expert_name
    for layer, roles in experts.items():
        for role, matrices in roles.items():
            if expert_name is None:
                tensors[f"model.layers.{layer}.mlp.experts.{role}_proj.weight"] = mx.array(matrices)
            else:
                tensors |= {expert_name(layer, e, role): mx.array(each) for e, each in enumerate(matrices)}
    return tensors


def write_standard(folder: Path, name: str, experts: Matrices) -> Path:
    folder.mkdir()
    source = read(name)
    others = dict(source.others)
    for key in [key for key in others if FAMILIES[name].expert_name is None and ".experts." in key]:
        bias = others.pop(key)  # gpt_oss stores the biases of gate and up in turns
        path = key.rpartition(".")[0]
        if key.endswith("gate_up_proj_bias"):
            others |= {f"{path}.gate_proj.bias": bias[:, 0::2], f"{path}.up_proj.bias": bias[:, 1::2]}
        else:
            others[f"{path}.down_proj.bias"] = bias
    mx.save_safetensors(str(folder / "model.safetensors"), others | standard_tensors(name, experts))
    (folder / "config.json").write_text(json.dumps(source.config))
    return folder


def rebuilt(overlays: Overlays) -> Matrices:
    return {layer: {role: each.rebuilt() for role, each in roles.items()} for layer, roles in overlays.items()}


def load_both(tmp_path: Path, name: str, overlays: Overlays) -> tuple[nn.Module, nn.Module]:
    """The overlay, and mlx-lm's own model of the experts put together, both computing in float32."""
    ours, _ = load_overlay(write_overlay(tmp_path / "overlay", read(name), overlays))
    theirs, _ = load_model(write_standard(tmp_path / "standard", name, rebuilt(overlays)))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    return ours, theirs


def logits(model: nn.Module, length: int, batch: int = 2) -> Array:
    tokens = mx.random.randint(0, 32, (batch, length), key=mx.random.key(length))
    return np.array(model(tokens).astype(mx.float32))


def modules(model: nn.Module, kind: type) -> list[Any]:
    return [module for _, module in model.named_modules() if isinstance(module, kind)]


# ---------------------------------------------------------------------------------------------------------------------
# The model


@every_family
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 2, 5), (0, 4, 1)], ids=str)
def test_an_overlay_is_the_model_of_its_experts_put_together(
    name: str, ranks: tuple[int, int, int], tmp_path: Path
) -> None:
    overlays = overlay_all(read(name), dict(zip(ROLES, ranks, strict=True)))
    ours, theirs = load_both(tmp_path, name, overlays)
    assert len(modules(ours, OverlayGLU)) == len(modules(theirs, SwitchGLU)) == len(overlays)
    assert not modules(ours, SwitchLinear)
    for length in (1, 5, 40):  # 2 x 40 tokens are sorted by expert
        expected = logits(theirs, length)
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(logits(ours, length), expected, **CLOSE)


@every_family
def test_full_rank_is_the_original_model(name: str, tmp_path: Path) -> None:
    source = read(name)
    overlays = overlay_all(source, dict.fromkeys(ROLES, FULL), store=lambda array: array)
    ours, _ = load_overlay(write_overlay(tmp_path / "overlay", source, overlays))
    theirs, _ = load_model(write_standard(tmp_path / "standard", name, source.experts))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    for length in (5, 40):
        np.testing.assert_allclose(logits(ours, length), logits(theirs, length), **CLOSE)


def test_rank_0_is_the_mean_expert_for_all(tmp_path: Path) -> None:
    source = read("mixtral")
    ours, _ = load_overlay(write_overlay(tmp_path / "overlay", source, overlay_all(source, dict.fromkeys(ROLES, 0))))
    mean = {
        layer: {role: np.repeat(as_stored(m.mean(axis=0, keepdims=True)), len(m), axis=0) for role, m in roles.items()}
        for layer, roles in source.experts.items()
    }
    theirs, _ = load_model(write_standard(tmp_path / "standard", "mixtral", mean))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(ours, 40), logits(theirs, 40), **CLOSE)


@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)], ids=str)
def test_gpt_oss_at_full_rank_is_the_published_form(layers: tuple[int, ...], tmp_path: Path) -> None:
    """Here mlx-lm itself takes apart gate, up and their biases, from MXFP4; a layer that is not overlaid stays in
    MXFP4."""
    folder = FIXTURES / "gpt_oss_mxfp4"
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}  # it wants one of each
    weights = mx.load(str(folder / "model.safetensors"))
    weights |= {
        name.replace("layers.0.", "layers.1."): array if array.dtype == mx.uint8 else -array
        for name, array in weights.items()
        if ".layers.0." in name
    }
    standard = tmp_path / "standard"
    standard.mkdir()
    mx.save_safetensors(str(standard / "model.safetensors"), weights)
    (standard / "config.json").write_text(json.dumps(config))
    theirs, _ = load_model(standard)
    if len(layers) == 2:
        del config["quantization_config"]
    packed = tuple(
        f"layers.{layer}.mlp.experts.{tensor}_" for layer in layers for tensor in ("gate_up_proj", "down_proj")
    )
    others = {
        name: array
        for name, array in weights.items()
        if name.endswith("_bias") or not any(start in name for start in packed)
    }
    with np.load(folder / "oracle.npz") as arrays:
        experts = {layer: {role: arrays[f"0.{role}"] for role in ROLES} for layer in layers}
    source = Source(config, others, experts)
    overlays = overlay_all(source, dict.fromkeys(ROLES, FULL), store=lambda array: array)
    ours, _ = load_overlay(write_overlay(tmp_path / "overlay", source, overlays))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    assert len(modules(ours, OverlayGLU)) == len(layers)
    for length in (5, 40):
        np.testing.assert_allclose(logits(ours, length), logits(theirs, length), **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_may_stay_as_it_was(name: str, layer: int, tmp_path: Path) -> None:
    source = read(name)
    overlays = overlay_all(source, dict.fromkeys(ROLES, 3))
    other = 1 - layer
    kept = standard_tensors(name, {other: source.experts[other]})
    ours, _ = load_overlay(write_overlay(tmp_path / "overlay", source, {layer: overlays[layer]}, kept))
    experts = {layer: rebuilt(overlays)[layer], other: source.experts[other]}
    theirs, _ = load_model(write_standard(tmp_path / "standard", name, experts))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(ours, 40), logits(theirs, 40), **CLOSE)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_generation_with_a_cache(name: str, tmp_path: Path) -> None:
    models = load_both(tmp_path, name, overlay_all(read(name), dict.fromkeys(ROLES, 3)))
    prompt = mx.array([3, 1, 4, 1, 5, 9, 2, 6])
    ours, theirs = ([(t, np.array(p)) for t, p in generate_step(prompt, m, max_tokens=6)] for m in models)
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)


def test_a_layer_that_mlx_lm_drops_is_dropped(tmp_path: Path) -> None:
    source = read("deepseek_v3")
    overlays = overlay_all(source, dict.fromkeys(ROLES, 2))
    ours, _ = load_overlay(write_overlay(tmp_path / "one", source, overlays))
    again, _ = load_overlay(write_overlay(tmp_path / "two", source, overlays | {61: overlays[1]}))
    np.testing.assert_array_equal(logits(ours, 5), logits(again, 5))


def test_half_precision(tmp_path: Path) -> None:
    """As stored, in bfloat16: the dtype stays, also on a CPU, and the result is near that in float32."""
    source = read("olmoe")
    folder = write_overlay(tmp_path / "overlay", source, overlay_all(source, dict.fromkeys(ROLES, 2)))
    model, config = load_overlay(folder)
    assert config["overlay_config"]["layers"]["1"] == {"gate": 2, "up": 2, "down": 2}
    exact, _ = load_overlay(folder)
    exact.set_dtype(mx.float32)
    for length in (5, 40):
        expected = logits(exact, length)
        errors = np.linalg.norm(logits(model, length) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert np.median(errors) < 0.02  # a few tokens may change their experts
    tokens = mx.array([[1, 2, 3]])
    assert model(tokens).dtype == mx.bfloat16
    model.set_dtype(mx.float16)
    for linear in modules(model, OverlayLinear):
        linear.set_dtype(mx.bfloat16)
    assert model(tokens).dtype == mx.float16


# ---------------------------------------------------------------------------------------------------------------------
# In codes

CODES: dict[str, RoleCodes] = {
    "ternary on 4 bits": RoleCodes(BitsCode(16), BitsCode(3)),
    "2 bits on 5": RoleCodes(BitsCode(32, 64), BitsCode(4, 64)),
    "7 bits plain": RoleCodes(None, BitsCode(128)),
    "factors on bf16": RoleCodes(Bf16Code(), FactorsCode(3, BitsCode(8))),
    "factors and signs on 4 bits": RoleCodes(BitsCode(16), SumCode(FactorsCode(2, BitsCode(16)), BitsCode(2))),
    "nothing on 8 bits": RoleCodes(BitsCode(256), FactorsCode(0, BitsCode(8))),
    "bf16 plain": RoleCodes(None, Bf16Code()),
    "trellis on 4 bits": RoleCodes(BitsCode(16), TrellisCode(2)),
    "trellis plain": RoleCodes(None, TrellisCode(3)),
    "factors and a trellis on a trellis": RoleCodes(
        TrellisCode(4), SumCode(FactorsCode(2, BitsCode(16)), TrellisCode(1))
    ),
}
every_coding = pytest.mark.parametrize("codes", CODES.values(), ids=CODES.keys())


def write_coded(folder: Path, source: Source, codes: RoleCodes) -> Matrices:
    """The overlay checkpoint as its format says; returns the experts that it stands for."""
    folder.mkdir()
    tensors, layers = dict(source.others), {}
    decoded: Matrices = {}
    for layer, roles in source.experts.items():
        for role, matrices in roles.items():
            _, out, inner = matrices.shape
            base = np.zeros((out, inner), np.float32)
            prefix = f"model.layers.{layer}.overlay.{role}"
            if codes.base:
                parts = codes.base.encode(matrices.mean(axis=0))
                base = codes.base.decode(parts, (out, inner))
                tensors |= {f"{prefix}.base.{name}": to_mlx(part) for name, part in parts.items()}
            each = [codes.delta.encode(matrix - base) for matrix in matrices]
            tensors |= {f"{prefix}.delta.{name}": to_mlx(np.stack([e[name] for e in each])) for name in each[0]}
            found = np.stack([base + codes.delta.decode(parts, (out, inner)) for parts in each])
            decoded.setdefault(layer, {})[role] = found
        experts, intermediate, hidden = roles["gate"].shape
        texts = {"base": str(codes.base) if codes.base else None, "delta": str(codes.delta)}
        sizes = {"experts": experts, "hidden": hidden, "intermediate": intermediate}
        layers[str(layer)] = sizes | {"codes": dict.fromkeys(ROLES, texts)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    config = {"version": 2, "source": "made", "revision": None, "family": "any", "layers": layers}
    (folder / "config.json").write_text(json.dumps(source.config | {"overlay_config": config}))
    return decoded


def to_mlx(array: NDArray[Any]) -> Any:
    return mx.array(array.astype(np.float32)).astype(mx.bfloat16) if array.dtype == BF16 else mx.array(array)


@pytest.mark.sample
@every_family
@every_coding
def test_codes_are_the_model_of_the_decoded_experts(name: str, codes: RoleCodes, tmp_path: Path) -> None:
    source = read(name)
    decoded = write_coded(tmp_path / "overlay", source, codes)
    ours, _ = load_overlay(tmp_path / "overlay")
    theirs, _ = load_model(write_standard(tmp_path / "standard", name, decoded))
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    assert len(modules(ours, CodedGLU)) == len(decoded)
    assert all(block.are_added_up for block in modules(ours, CodedGLU))
    assert not modules(ours, SwitchLinear)
    for length in (1, 5, 40):  # 2 x 40 tokens are sorted by expert
        np.testing.assert_allclose(logits(ours, length), logits(theirs, length), **CLOSE)


@pytest.mark.parametrize(("name", "bits"), [("ternary on 4 bits", (4, 2)), ("2 bits on 5", (5, 2))])
def test_codes_stay_in_few_bits(name: str, bits: tuple[int, int], tmp_path: Path) -> None:
    """In memory a weight of a ternary delta takes two bits; a scale and a bias of four bytes serve a group."""
    source = read("mixtral")
    write_coded(tmp_path / "overlay", source, CODES[name])
    block, _ = modules(load_overlay(tmp_path / "overlay")[0], CodedGLU)
    arrays = dict(tree_flatten(block.parameters()))
    shapes = [matrices.shape for matrices in next(iter(source.experts.values())).values()]
    found = {key: sum(array.nbytes for path, array in arrays.items() if key in path) for key in ("base", "delta")}
    scales = {
        key: sum(array.nbytes for path, array in arrays.items() if key in path and path.endswith(("scales", "biases")))
        for key in ("base", "delta")
    }
    padded = [(count, out, -(-inner // 32) * 32) for count, out, inner in shapes]  # to whole groups
    assert found["base"] - scales["base"] == sum(out * inner * bits[0] // 8 for _, out, inner in padded)
    assert found["delta"] - scales["delta"] == sum(count * out * inner * bits[1] // 8 for count, out, inner in padded)


def test_generation_in_codes(tmp_path: Path) -> None:
    source = read("mixtral")
    decoded = write_coded(tmp_path / "overlay", source, CODES["factors and signs on 4 bits"])
    models = [load_overlay(tmp_path / "overlay")[0], load_model(write_standard(tmp_path / "b", "mixtral", decoded))[0]]
    for model in models:
        model.set_dtype(mx.float32)
    prompt = mx.array([3, 1, 4, 1, 5, 9, 2, 6])
    ours, theirs = ([token for token, _ in generate_step(prompt, model, max_tokens=6)] for model in models)
    assert ours == theirs


def test_half_precision_in_codes(tmp_path: Path) -> None:
    write_coded(tmp_path / "overlay", read("olmoe"), CODES["factors and signs on 4 bits"])
    model, _ = load_overlay(tmp_path / "overlay")
    assert model(mx.array([[1, 2, 3]])).dtype == mx.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model.layers.0.overlay.up.delta.scales"),
        lambda t: t.update({"model.layers.0.overlay.up.delta.more": mx.zeros((2,))}),
        lambda t: t.update({"model.layers.0.overlay.up.base.levels": mx.zeros((2, 3))}),
    ],
)
def test_parts_that_do_not_fit(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    write_coded(tmp_path / "overlay", read("mixtral"), CODES["ternary on 4 bits"])
    file = tmp_path / "overlay/model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(ModelUnreadable, match="up projection") as caught:
        load_overlay(tmp_path / "overlay")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are no overlay, or broken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = read("mixtral")
    return write_overlay(tmp_path / "overlay", source, overlay_all(source, {"gate": 1, "up": 2, "down": 3}))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_shard(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of the second shard, and have the index follow."""
    file = folder / "model-00002-of-00002.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: place for name, place in index["weight_map"].items() if place != file.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def layers_of(config: dict[str, Any]) -> dict[str, Any]:
    layers: dict[str, Any] = config["overlay_config"]["layers"]
    return layers


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda c: c.pop("overlay_config"), ModelUnreadable, "no overlay_config"),
        (lambda c: c["overlay_config"].update(version=3), UnknownFormat, "version 3"),
        (lambda c: c["overlay_config"].update(version=2), ModelUnreadable, "lists no layers"),
        (lambda c: c["overlay_config"].update(layers={}), ModelUnreadable, "lists no layers"),
        (lambda c: c["overlay_config"].update(layers=[1]), ModelUnreadable, "lists no layers"),
        (lambda c: layers_of(c).update({"1": {"gate": -1, "up": 1, "down": 1}}), ModelUnreadable, "lists no layers"),
        (lambda c: layers_of(c)["1"].pop("gate"), UnknownFormat, "layer 1"),
        (lambda c: layers_of(c)["1"].update(gate=2), ModelUnreadable, "shape"),
        (lambda c: layers_of(c).pop("1"), UnknownFormat, "model.layers.1"),
        (lambda c: c.pop("model_type"), UnknownFormat, "model_type None"),
        (lambda c: c.update(model_type="unheard_of"), UnknownFormat, "unheard_of"),
        (lambda c: c.update(model_type="switch_layers"), UnknownFormat, "switch_layers"),
        (lambda c: c.update(model_type="llama"), UnknownFormat, "llama has no block"),
        (lambda c: c.update(model_type="qwen3_moe"), ModelUnreadable, "mlx-lm can't load it"),
        (lambda c: c.update(num_hidden_layers=1), UnknownFormat, "model.layers.1"),
        (lambda c: c.update(num_local_experts=5), ModelUnreadable, "shape"),
        (lambda c: c.update(model_file="model.py"), ModelUnreadable, "custom module"),
    ],
)
def test_a_config_that_does_not_fit(
    change: Callable[[dict[str, Any]], Any], kind: type[MoEError], text: str, folder: Path
) -> None:
    edit_config(folder, change)
    with pytest.raises(kind, match=text) as caught:
        load_overlay(folder)
    assert str(folder) in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.layers.0.overlay.up.left"), "Missing 1 parameters.*up_proj.left"),
        (lambda t: t.update({"model.layers.0.overlay.up.middle": mx.zeros((2,))}), "not in model.*up.middle"),
        (lambda t: t.update({"model.layers.0.overlay.up.base": mx.zeros((2, 3))}), "Expected shape"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[dict[str, Any]], Any], text: str, folder: Path) -> None:
    edit_shard(folder, change)
    with pytest.raises(ModelUnreadable, match=text) as caught:
        load_overlay(str(folder))
    assert "\n" not in str(caught.value)


def test_a_broken_folder(folder: Path, tmp_path: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shutil.copy(shard, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(ModelUnreadable, match="is not one of the model's files"):
        load_overlay(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelUnreadable, match="ends at byte"):
        load_overlay(folder)
    shard.unlink()
    with pytest.raises(ModelUnreadable, match="missing"):
        load_overlay(folder)
    with pytest.raises(ModelUnreadable, match="no such folder"):
        load_overlay(tmp_path / "nowhere")
    with pytest.raises(ModelUnreadable, match="no overlay_config"):
        load_overlay(FIXTURES / "mixtral")


# ---------------------------------------------------------------------------------------------------------------------
# The layer


def random_linear(experts: int, out: int, inner: int, rank: int, bias: bool, seed: int = 0) -> OverlayLinear:
    mx.random.seed(seed)
    linear = OverlayLinear(inner, out, experts, rank, bias)
    linear.right = mx.random.normal(linear.right.shape)
    if bias:
        linear.bias = mx.random.normal((experts, out))
    return linear


def expert_weights(linear: OverlayLinear) -> Array:
    base, left, right = (np.array(linear[part]) for part in ("base", "left", "right"))
    return np.stack([base + left[e] @ right[e] for e in range(len(left))])


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_expert", [False, True])
def test_a_layer_is_a_loop_over_tokens_and_experts(rank: int, bias: bool, per_expert: bool) -> None:
    linear = random_linear(4, 6, 5, rank, bias)
    assert (linear.input_dims, linear.output_dims, linear.num_experts, linear.rank) == (5, 6, 4, rank)
    rng = np.random.default_rng(1)
    indices = rng.integers(0, 4, (2, 3, 2))
    x = rng.standard_normal((2, 3, 2 if per_expert else 1, 1, 5)).astype(np.float32)
    weights = expert_weights(linear)
    expected = np.zeros((2, 3, 2, 1, 6), np.float32)
    for b, t, k in np.ndindex(2, 3, 2):
        expected[b, t, k, 0] = weights[indices[b, t, k]] @ x[b, t, k if per_expert else 0, 0]
        if bias:
            expected[b, t, k, 0] += np.array(linear.bias)[indices[b, t, k]]
    found = linear(mx.array(x), mx.array(indices))
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_a_layer_is_called_as_a_switch_linear_is(rank: int, bias: bool, sort: bool) -> None:
    linear = random_linear(4, 6, 5, rank, bias)
    switch = SwitchLinear(5, 6, 4, bias)
    switch.weight = mx.array(expert_weights(linear))
    if bias:
        switch.bias = linear.bias
    indices = mx.random.randint(0, 4, (100,))
    indices = mx.sort(indices) if sort else indices
    x = mx.random.normal((100, 1, 5))
    found, expected = (layer(x, indices, sorted_indices=sort) for layer in (linear, switch))
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-5)


def test_a_new_layer_is_its_base() -> None:
    linear = OverlayLinear(64, 48, 4, 3)
    x = mx.random.normal((7, 1, 64))
    found = linear(x, mx.array([0, 1, 2, 3, 0, 1, 2]))
    np.testing.assert_allclose(np.array(found), np.array(x @ linear.base.T), rtol=1e-6, atol=1e-6)
    assert np.linalg.norm(np.array(linear.left), axis=1).mean() == pytest.approx(1, abs=0.1)


def overlaid_glu(rank: int) -> OverlayGLU:
    mx.random.seed(rank)
    glu = OverlayGLU(8, 12, 5, {"gate": rank, "up": 2, "down": 3})
    for role in ROLES:
        glu[f"{role}_proj"].right = mx.random.normal(glu[f"{role}_proj"].right.shape)
    return glu


def as_switch_glu(parameters: Any) -> SwitchGLU:
    glu = SwitchGLU(8, 12, 5)
    for role in ROLES:
        linear = parameters[f"{role}_proj"]
        glu[f"{role}_proj"].weight = linear["base"] + linear["left"] @ linear["right"]
    return glu


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tokens", [1, 21, 22, 100])  # top 3: sorted from 22 tokens on
def test_experts_and_their_gradients_are_those_of_a_switch_glu(rank: int, tokens: int) -> None:
    glu = overlaid_glu(rank)
    x = mx.random.normal((1, tokens, 8))
    indices = mx.random.randint(0, 5, (1, tokens, 3))
    found, expected = glu(x, indices), as_switch_glu(glu.parameters())(x, indices)
    assert found.shape == expected.shape == (1, tokens, 3, 8)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)

    def ours(parameters: Any, x: Any) -> Any:
        glu.update(parameters)
        return mx.square(glu(x, indices)).mean()

    def theirs(parameters: Any, x: Any) -> Any:
        return mx.square(as_switch_glu(parameters)(x, indices)).mean()

    parameters = glu.parameters()
    gradients = [dict(tree_flatten(mx.grad(loss, argnums=(0, 1))(parameters, x))) for loss in (ours, theirs)]
    assert len(gradients[0]) == 10
    for name, expected in gradients[1].items():
        scale = float(mx.abs(expected).max()) if expected.size else 1.0
        np.testing.assert_allclose(np.array(gradients[0][name]), np.array(expected), rtol=1e-3, atol=1e-4 * scale)


# ---------------------------------------------------------------------------------------------------------------------
# The block to train


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tokens", [1, 21, 22, 100])
def test_outputs_that_are_added_up_are_those_of_each_expert(rank: int, tokens: int) -> None:
    """Sums and gradients are the same, whether down has the base's product for each expert or for their sum."""
    glu = overlaid_glu(rank)
    x, weights = mx.random.normal((1, tokens, 8)), mx.random.normal((1, tokens, 3))
    indices = mx.random.randint(0, 5, (1, tokens, 3))

    def add_up(parameters: Any, x: mx.array, weights: mx.array) -> mx.array:
        glu.update(parameters)
        return (glu(x, indices) * weights[..., None]).sum(axis=-2)

    results = []
    for glu.are_added_up in (False, True):
        assert isinstance(glu(x, indices), mx.array) is not glu.are_added_up
        loss = mx.value_and_grad(lambda *inputs: mx.square(add_up(*inputs)).sum(), argnums=(0, 1, 2))
        value, gradients = loss(glu.parameters(), x, weights)
        results.append([value, *(array for _, array in tree_flatten(gradients))])
    for found, expected in zip(*results, strict=True):
        scale = float(mx.abs(expected).max()) if expected.size else 0.0
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4 * scale)
    with pytest.raises(ValueError, match="axis -2"):
        glu(x, indices).sum(axis=-1)


def dense(seed: int = 0) -> tuple[Any, Any, Any]:
    mx.random.seed(seed)
    return tuple(mx.random.normal(shape) * 0.3 for shape in ((24, 16), (24, 16), (16, 24)))


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_block_from_a_dense_feed_forward_starts_as_it(tokens: int, rank: int) -> None:
    gate, up, down = dense()
    block = OverlayMoE.from_dense(gate, up, down, experts=8, top_k=2, rank=rank)
    x = mx.random.normal((2, tokens, 16))
    expected = (nn.silu(x @ gate.T) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(np.array(block(x)), np.array(expected), rtol=1e-4, atol=1e-5)
    block.experts.gate_proj.base[0] = 0
    assert (gate[0] != 0).all(), "the base is a copy"
    half = OverlayMoE.from_dense(
        *(each.astype(mx.bfloat16) for each in (gate, up, down)), experts=8, top_k=2, rank=rank
    )
    assert {array.dtype for _, array in tree_flatten(half.parameters())} == {mx.bfloat16}


def test_a_block_weighs_its_experts_as_the_router_says() -> None:
    block = OverlayMoE(16, 24, 5, 2, 3)
    for role in ROLES:
        linear = block.experts[f"{role}_proj"]
        linear.right = mx.random.normal(linear.right.shape)
    weights = {role: expert_weights(block.experts[f"{role}_proj"]) for role in ROLES}
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    expected = np.zeros_like(x)
    for token, out in zip(x, expected, strict=True):
        logits = np.array(block.router.weight) @ token
        chosen = np.argsort(logits)[-2:]
        shares = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = weights["gate"][expert] @ token, weights["up"][expert] @ token
            out += share * (weights["down"][expert] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(np.array(block(mx.array(x))), expected, rtol=1e-3, atol=1e-4)


def gradient_norms(block: OverlayMoE) -> dict[str, float]:
    x, y = mx.random.normal((4, 20, 16)), mx.random.normal((4, 20, 16))
    _, gradients = nn.value_and_grad(block, lambda block: mx.square(block(x) - y).mean())(block)
    return {name: float(mx.linalg.norm(value.flatten())) for name, value in tree_flatten(gradients)}


@pytest.mark.parametrize("freeze_base", [False, True])
def test_gradients_reach_all_that_trains(freeze_base: bool) -> None:
    block = OverlayMoE(16, 24, 5, 2, 3, freeze_base=freeze_base)
    for role in ROLES:
        linear = block.experts[f"{role}_proj"]
        linear.right = mx.random.normal(linear.right.shape)
    norms = gradient_norms(block)
    parts = ("left", "right") if freeze_base else ("base", "left", "right")
    assert set(norms) == {"router.weight", *(f"experts.{role}_proj.{part}" for role in ROLES for part in parts)}
    assert all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("freeze_base", [False, True])
def test_training_lowers_the_loss(freeze_base: bool) -> None:
    gate, up, down = dense()
    block = OverlayMoE.from_dense(gate, up, down, experts=4, top_k=2, rank=4, freeze_base=freeze_base)
    x, y = mx.random.normal((2, 40, 16)), mx.random.normal((2, 40, 16))
    optimizer = optim.Adam(learning_rate=0.02)
    step = nn.value_and_grad(block, lambda block: mx.square(block(x) - y).mean())
    losses = []
    for _ in range(20):
        loss, gradients = step(block)
        optimizer.update(block, gradients)
        mx.eval(block.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    same = bool((block.experts.up_proj.base == up).all())
    assert same is freeze_base
    assert float(mx.abs(block.experts.up_proj.right).max()) > 0


def test_a_block_refuses_what_does_not_fit() -> None:
    gate, up, down = dense()
    with pytest.raises(ValueError, match="top 5 of 4"):
        OverlayMoE(16, 24, 4, 5, 1)
    with pytest.raises(ValueError, match="down has shape"):
        OverlayMoE.from_dense(gate, up, down.T, experts=4, top_k=2, rank=1)


def coded_block(code: str, dtype: Any = mx.float32) -> OverlayMoE:
    mx.random.seed(3)
    gate, up, down = (matrix.astype(dtype) for matrix in dense())
    block = OverlayMoE.from_dense(gate, up, down, experts=4, top_k=2, rank=4)
    for role in ROLES:
        right = block.experts[f"{role}_proj"].right
        block.experts[f"{role}_proj"].right = 0.1 * mx.random.normal(right.shape).astype(dtype)
    block.code_base(code)
    return block


def decoded_block(block: OverlayMoE, code: str) -> OverlayMoE:
    """The same block with its bases in floating point, decoded by the code that numpy has."""
    other = OverlayMoE(16, 24, 4, 2, 4, freeze_base=True)
    other.router.weight = block.router.weight
    for role, matrix in zip(ROLES, dense(), strict=True):
        linear = other.experts[f"{role}_proj"]
        bits = parse_code(code)
        linear.base = mx.array(bits.decode(bits.encode(np.array(matrix)), matrix.shape))
        linear.left, linear.right = (block.experts[f"{role}_proj"][part] for part in ("left", "right"))
    return other


@pytest.mark.parametrize("code", ["4bit:128", "1.6bit:64", "7bit:64"])
@pytest.mark.parametrize("tokens", [3, 40])  # sorted from 32 tokens on
def test_gradients_on_a_coded_base_are_those_on_the_decoded_one(code: str, tokens: int) -> None:
    coded = coded_block(code)
    x, y = mx.random.normal((tokens, 16)), mx.random.normal((tokens, 16))

    def take(block: OverlayMoE) -> tuple[Any, Any, dict[str, Any]]:
        loss = lambda block, x: mx.square(block(x) - y).mean()  # noqa: E731
        value, gradients = nn.value_and_grad(block, loss)(block, x)
        return value, mx.grad(lambda x: loss(block, x))(x), dict(tree_flatten(gradients))

    found, expected = take(coded), take(decoded_block(coded, code))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    np.testing.assert_allclose(np.array(found[1]), np.array(expected[1]), rtol=1e-3, atol=1e-6)
    parts = {"router.weight", *(f"experts.{role}_proj.{part}" for role in ROLES for part in ("left", "right"))}
    assert found[2].keys() == expected[2].keys() == parts
    for name in parts:
        np.testing.assert_allclose(np.array(found[2][name]), np.array(expected[2][name]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_training_on_a_coded_base_leaves_it_as_it_is(dtype: Any) -> None:
    block = coded_block("4bit:128", dtype)
    bases = {name: np.array(array.view(mx.uint32)) for name, array in frozen(block).items()}
    assert len(bases) == 9
    x, y = mx.random.normal((2, 40, 16)).astype(dtype), mx.random.normal((2, 40, 16)).astype(dtype)
    optimizer = optim.Adam(learning_rate=0.02)
    step = nn.value_and_grad(block, lambda block: mx.square(block(x) - y).mean())
    losses = []
    for _ in range(20):
        loss, gradients = step(block)
        optimizer.update(block, gradients)
        mx.eval(block.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, array in frozen(block).items():
        np.testing.assert_array_equal(np.array(array.view(mx.uint32)), bases[name])


def frozen(block: nn.Module) -> dict[str, Any]:
    return {name: array for name, array in tree_flatten(block.parameters()) if ".base." in name}


def test_a_base_that_cannot_be_coded() -> None:
    block = coded_block("4bit:128")
    assert block.experts.down_proj.base.weight.nbytes == 16 * 32 / 2  # 24 columns, in whole groups
    with pytest.raises(ValueError, match="already"):
        block.code_base("3bit:64")
    for code in ("bf16", "rank2:4bit:64"):
        with pytest.raises(ValueError, match="in bits"):
            OverlayMoE(16, 24, 4, 2, 1).code_base(code)
    with pytest.raises(ValueError, match="not a code"):
        OverlayMoE(16, 24, 4, 2, 1).code_base("9bit:64")


@pytest.mark.parametrize("name", ["ternary on 4 bits", "factors and signs on 4 bits"])
def test_gradients_of_adapters_pass_through_codes(name: str, tmp_path: Path) -> None:
    """mlx-lm's LoRA of the attention, on a model in codes and on that of its decoded experts."""
    source = read("mixtral")
    decoded = write_coded(tmp_path / "overlay", source, CODES[name])
    ours, _ = load_overlay(tmp_path / "overlay")
    theirs, _ = load_model(write_standard(tmp_path / "standard", "mixtral", decoded))
    tokens = mx.random.randint(0, source.config["vocab_size"], (4, 24))
    attention = ["self_attn.q_proj", "self_attn.v_proj"]
    gradients = []
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
        model.freeze()
        mx.random.seed(1)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": attention})
        adapters = {
            key: 0.1 * mx.random.normal(value.shape) for key, value in tree_flatten(model.trainable_parameters())
        }
        model.update(tree_unflatten(list(adapters.items())))
        step = nn.value_and_grad(model, lambda m: nn.losses.cross_entropy(m(tokens[:, :-1]), tokens[:, 1:]).mean())
        gradients.append(dict(tree_flatten(step(model)[1])))
    found, expected = gradients
    assert found.keys() == expected.keys()
    assert sum(".lora_" in key for key in found) == len(found) > 4
    for key, gradient in expected.items():
        scale = float(mx.abs(gradient).max())
        assert scale > 0
        np.testing.assert_allclose(np.array(found[key]), np.array(gradient), rtol=1e-3, atol=1e-3 * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def loss_by_hand(model: nn.Module, tokens: Array, context: int) -> float:
    total = 0.0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        scores = np.array(model(mx.array(window[None, :-1])).astype(mx.float32))[0].astype(np.float64)
        for row, target in zip(scores, window[1:], strict=True):
            total += np.log(np.exp(row).sum()) - row[target]
    return total / (len(tokens) - 1)


@pytest.mark.parametrize(("count", "context"), [(101, 10), (98, 10), (2, 10), (30, 1), (11, 10)])
def test_evaluation_is_the_mean_loss_of_every_token_but_the_first(count: int, context: int, tmp_path: Path) -> None:
    overlays = overlay_all(read("mixtral"), dict.fromkeys(ROLES, 3))
    tokens = np.random.default_rng(0).integers(0, 32, count)
    results = []
    for model in load_both(tmp_path, "mixtral", overlays):
        result = evaluate(model, tokens, context, batch=3)
        assert result.loss == pytest.approx(loss_by_hand(model, tokens, context), rel=1e-5)
        assert result.perplexity == pytest.approx(np.exp(result.loss))
        assert (result.tokens, result.context) == (count - 1, context)
        assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
        assert result.parameter_bytes == sum(4 * array.size for _, array in tree_flatten(model.parameters()))
        results.append(result)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].parameter_bytes < results[1].parameter_bytes
    assert Evaluation.model_validate_json(results[0].model_dump_json()) == results[0]
    assert evaluate(model, [int(token) for token in tokens], context).loss == pytest.approx(results[1].loss, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "context"), [([], 4), ([1], 4), ([[1, 2], [3, 4]], 4), ([0.5, 1.5], 4), ([1, 2], 0)]
)
def test_evaluation_refuses_what_it_cannot_predict(tokens: Any, context: int) -> None:
    with pytest.raises(InvalidRequest):
        evaluate(nn.Embedding(4, 4), tokens, context)


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_evaluation_refuses_a_loss_that_is_not_finite(weight: float) -> None:
    model = nn.Embedding(4, 4)
    model.weight = mx.full((4, 4), weight)
    with pytest.raises(ModelUnreadable, match="loss on this text is nan"):
        evaluate(model, [1, 2, 3], 2)


def test_a_perplexity_beyond_floats_stays_a_number() -> None:
    model = nn.Embedding(4, 4)
    model.weight = 1e4 * mx.eye(4)  # each token is sure to come again
    result = evaluate(model, [1, 2, 3], 2)
    assert result.loss == pytest.approx(1e4)
    assert 1e300 < result.perplexity < np.inf
