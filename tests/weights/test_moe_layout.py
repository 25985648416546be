"""What moe-layout says of a checkpoint, by headers parsed here and by published sizes; and that it reads no weight."""

import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    InvalidRequest,
    ModelUnreadable,
    MoELayout,
    MoELayoutService,
    MoETypeService,
    NotMoE,
    UnknownFormat,
)
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.weights.repositories.hub import READ_AHEAD
from chuk_lazarus.introspection.moe.weights.repositories.local import LocalFile
from encoders_float import ENCODERS as FLOAT_ENCODERS
from encoders_packed import ENCODERS as PACKED_ENCODERS
from hub_server import HubServer
from places import FIXTURES, ROOT
from terminals import without_steps

LAYOUT = ["introspect", "moe-expert", "moe-layout"]
DOCS = ROOT / "docs" / "json.md"
ITEM = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U32": 4, "F8_E4M3": 1, "U8": 1}

Capture = pytest.CaptureFixture[str]
Specs = dict[str, tuple[str, tuple[int, ...]]]
"""A tensor's name -> its dtype and shape."""


def describe(model: Path | str, layers: Sequence[int] | str | None = None) -> MoELayout:
    return MoELayoutService.describe(str(model), layers=layers)


def without_seconds(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"cost": {key: value for key, value in data["cost"].items() if key != "seconds"}}


def layout_json(capsys: Capture, model: Path | str, *options: str) -> dict[str, Any]:
    """What the command prints on stdout, which is nothing but one object; it says nothing on stderr."""
    capsys.readouterr()
    assert run([*LAYOUT, "-m", str(model), "--json", *options]) == 0
    out, err = capsys.readouterr()
    assert without_steps(err) == ""
    found: dict[str, Any] = json.loads(out)
    return found


def table(capsys: Capture, model: Path | str, *options: str) -> str:
    capsys.readouterr()
    assert run([*LAYOUT, "-m", str(model), *options]) == 0
    out, err = capsys.readouterr()
    assert without_steps(err) == ""
    return out


def row(text: str, name: str) -> str:
    """What stands behind a name in the table, lines joined."""
    match = re.search(rf"^{name}(?: {{2,}})(.*(?:\n {{6,}}.*)*)", text, re.MULTILINE)
    assert match, text
    return " ".join(match[1].split())


# ---------------------------------------------------------------------------------------------------------------------
# The headers, parsed here


def header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def stored_sizes(folder: Path) -> dict[str, int]:
    """The bytes of every tensor in a folder's safetensors files, all slices together where it is cut."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            entries = json.loads(file.read(header_end(path))[8:])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            found[name] = found.get(name, 0) + stop - start
    return found


def arrays(name: str, kind: str) -> dict[int, dict[str, tuple[int, ...]]]:
    """An oracle's shapes: layer -> role -> [experts, out, in]."""
    folder, _, stack = name.partition("#")
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    path = FIXTURES / folder / f"{kind}{'.' if stack else ''}{stack}.npz"
    if path.exists():
        with np.load(path) as oracle:
            for key in oracle.files:
                layer, role = key.split(".")
                found.setdefault(int(layer), {})[role] = oracle[key].shape
    return found


def with_oracle(kind: str) -> list[str]:
    paths = sorted(FIXTURES.glob(f"*/{kind}*.npz"))
    return [path.parent.name + path.stem.removeprefix(kind).replace(".", "#", 1) for path in paths]


@pytest.mark.parametrize("name", with_oracle("oracle"))
def test_every_field_is_what_oracle_and_headers_say(name: str) -> None:
    layout = describe(f"{FIXTURES}/{name}", "all")
    oracle, tensors = arrays(name, "oracle"), stored_sizes(FIXTURES / name.partition("#")[0])
    assert layout.model == f"{FIXTURES}/{name}"
    assert layout.revision is None
    assert layout.moe_layers == tuple(sorted(oracle))
    assert layout.exact
    assert [layer.layer for layer in layout.layers] == sorted(oracle)
    first = layout.layers[0]
    assert layout.experts == first.experts
    for layer in layout.layers:
        shapes = oracle[layer.layer]
        assert {role: (layer.experts, *shape) for role, shape in layer.shapes.items()} == shapes
        assert list(layer.formats) == [role for role in ("gate", "up", "down") if role in shapes]
        assert layer.parameters == sum(math.prod(shape) for shape in shapes.values())
        assert layer.storage == "+".join(dict.fromkeys(layer.formats.values()))
        # the names are those of the files, and their bytes are all that the layer has
        names = {
            template.replace(f".{first.layer}.", f".{layer.layer}.", 1).replace("{expert}", str(expert))
            for templates in layout.tensors.values()
            for template in templates
            for expert in range(layer.experts)
        }
        assert names <= tensors.keys()
        assert layer.stored_bytes == sum(tensors[each] for each in names)
        assert sum("expert" in each and "{" in each for each in names) == 0
    assert layout.parameters == sum(layer.parameters for layer in layout.layers)
    assert layout.stored_bytes == sum(layer.stored_bytes for layer in layout.layers)
    assert layout.analysis_bytes - layout.further_bytes == first.stored_bytes  # no expert is too large to be kept
    assert layout.further_bytes <= first.stored_bytes // 2
    assert {role for roles in layout.tensors for role in roles.split("_")} == set(first.shapes)
    assert all(
        name.startswith((f"{layout.stack}.", f"{layout.stack}_blocks.") if layout.stack else "")
        for n in layout.tensors.values()
        for name in n
    )
    default = describe(f"{FIXTURES}/{name}")
    same = {"cost": layout.cost}
    assert default.model_copy(update=same) == layout or not default.exact


@pytest.mark.parametrize("name", with_oracle("oracle"))
def test_shared_experts_and_dense_layers(name: str) -> None:
    layout = describe(f"{FIXTURES}/{name}")
    shared, dense = arrays(name, "shared"), arrays(name, "dense")
    assert [
        note for note in layout.notes if "left out" not in note and "stacks" not in note and "in a head" not in note
    ] == []
    assert set(layout.dense_layers) >= set(dense)
    if shared:
        assert layout.shared
        assert layout.shared.layers == tuple(sorted(shared))
        one = shared[layout.shared.layers[0]]
        assert layout.shared.shapes == {role: shape[1:] for role, shape in one.items()}
        if layout.shared.storage == "bf16":
            assert layout.shared.stored_bytes == 2 * sum(math.prod(shape) for shape in one.values())


@dataclass(frozen=True)
class Kind:
    """A fixture of one kind, and what is to be said of it."""

    name: str
    family: str
    storage: str
    tensors: dict[str, tuple[str, ...]]
    more: dict[str, Any] = field(default_factory=dict)


def per_expert(prefix: str, gate: str, up: str, down: str, *parts: str) -> dict[str, tuple[str, ...]]:
    return {
        role: tuple(f"{prefix}.{{expert}}.{leaf}.{part}" for part in parts or ("weight",))
        for role, leaf in (("gate", gate), ("up", up), ("down", down))
        if leaf
    }


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KINDS = (
    Kind(
        "mixtral",
        "w1_w3_w2",
        "bf16",
        per_expert("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"),
        {"top_k": 2, "activation": "silu", "dense_layers": (), "mtp_layers": (), "shared": None, "stack": "model"},
    ),
    Kind(
        "deepseek_v3_fp8",
        "gate_up_down",
        "fp8",
        per_expert("model.layers.1.mlp.experts", *PROJECTIONS, "weight", "weight_scale_inv"),
        # 2 experts of 3 matrices of 132 x 136 bytes, each with 2 x 2 scales of 4 bytes
        {"moe_layers": (1,), "mtp_layers": (2,), "dense_layers": (0,), "stored_bytes": 2 * 3 * (132 * 136 + 16)},
    ),
    Kind(
        "gpt_oss_mxfp4",
        "gpt_oss",
        "mxfp4",
        {
            "gate_up": tuple(f"model.layers.0.mlp.experts.gate_up_proj_{part}" for part in ("blocks", "scales")),
            "down": tuple(f"model.layers.0.mlp.experts.down_proj_{part}" for part in ("blocks", "scales")),
        },
        {"activation": "swiglu_oai", "parameters": 3 * 3 * 96 * 64, "stored_bytes": 3 * 3 * 96 * 64 * 17 // 32},
    ),
    Kind(
        "mlx_qwen3_moe_mixed",
        "stacked_gate_up_down",
        "mlx-4bit+mlx-5bit+mlx-6bit",
        {
            role: tuple(f"model.layers.1.mlp.switch_mlp.{role}_proj.{part}" for part in ("weight", "biases", "scales"))
            for role in ("gate", "up", "down")
        },
        {"dense_layers": (0,)},
    ),
    Kind(
        "nemotron_h",
        "up_down",
        "bf16",
        per_expert("backbone.layers.1.mixer.experts", "", "up_proj", "down_proj"),
        {"moe_layers": (1, 4), "dense_layers": (3,), "activation": "relu2"},
    ),
    Kind(
        "switch_transformers#encoder",
        "switch",
        "bf16",
        {
            role: (f"encoder.block.1.layer.1.mlp.experts.expert_{{expert}}.{leaf}.weight",)
            for role, leaf in (("up", "wi"), ("down", "wo"))
        },
        {"stack": "encoder", "stacks": ("decoder", "encoder"), "notes": (), "top_k": 1, "activation": "relu"},
    ),
    Kind(
        "kimi_k25",
        "gate_up_down",
        "bf16",
        per_expert("language_model.model.layers.1.mlp.experts", *PROJECTIONS),
        {"stack": "language_model.model", "dense_layers": (0,)},
    ),
    Kind(
        "published_deepseek_v4",
        "w1_w3_w2",
        "mxfp4",
        per_expert("layers.0.ffn.experts", "w1", "w3", "w2", "weight", "scale"),
        {"stack": ""},
    ),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kinds(capsys: Capture, kind: Kind) -> None:
    model = f"{FIXTURES}/{kind.name}"
    layout = describe(model)
    assert (layout.family, layout.storage, layout.tensors) == (kind.family, kind.storage, kind.tensors)
    assert {key: getattr(layout, key) for key in kind.more} == kind.more
    data = layout_json(capsys, model)
    assert without_seconds(data) == without_seconds(json.loads(layout.model_dump_json()))


def test_the_bits_of_each_projection_are_told_apart(capsys: Capture) -> None:
    layout = describe(FIXTURES / "mlx_qwen3_moe_mixed")
    assert layout.layers[0].formats == {"gate": "mlx-4bit", "up": "mlx-5bit", "down": "mlx-6bit"}
    text = table(capsys, FIXTURES / "mlx_qwen3_moe_mixed")
    assert row(text, "Storage") == "mlx-4bit (gate), mlx-5bit (up), mlx-6bit (down)"


def test_experts_of_a_stack_that_has_no_shared_or_dense_ones() -> None:
    """Another stack has them: the vision part, the talker."""
    for name in ("aria", "dots3_note", "inkling2", "inkling2_fused", "qwen3_omni_moe"):
        layout = describe(FIXTURES / name)
        assert layout.stack in layout.stacks
    assert describe(FIXTURES / "aria").dense_layers == ()
    assert describe(FIXTURES / "qwen3_omni_moe").stack == "talker.model"
    assert describe(f"{FIXTURES}/qwen3_omni_moe#thinker").stack == "thinker.model"
    assert describe(f"{FIXTURES}/dots3_note#model").dense_layers == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints made here: headers are real, and the weights are holes in the files


def size_of(spec: tuple[str, tuple[int, ...]]) -> int:
    return ITEM[spec[0]] * math.prod(spec[1])


def cut(specs: Specs, limit: int | None) -> list[Specs]:
    """The tensors in shards of so many bytes, in their order."""
    shards: list[Specs] = [{}]
    room = math.inf if limit is None else limit
    left = room
    for name, spec in specs.items():
        if size_of(spec) > left and shards[-1]:
            shards.append({})
            left = room
        shards[-1][name] = spec
        left -= size_of(spec)
    return shards


def header_of(specs: Specs) -> bytes:
    stops = list(itertools.accumulate(size_of(spec) for spec in specs.values()))
    starts = [0, *stops[:-1]]
    described = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        for (name, (dtype, shape)), start, stop in zip(specs.items(), starts, stops, strict=True)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **described}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_holes(
    folder: Path,
    specs: Specs,
    config: Mapping[str, Any],
    limit: int | None = None,
    values: Callable[[str], bytes | None] = lambda name: None,
) -> Path:
    """A checkpoint whose weights take no room on the disk, with an index where it has several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = cut(specs, limit)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):06}.safetensors" if len(shards) > 1 else "model.safetensors"
        header = header_of(shard)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            position = file.tell()
            for tensor, spec in shard.items():
                if (value := values(tensor)) is not None:
                    file.seek(position)
                    file.write(value)
                position += size_of(spec)
            file.truncate(position)
        places |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(size_of, specs.values()))}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


Matrices = Iterator[tuple[str, int, int]]
"""A matrix's name, its outputs and its inputs."""


def gated(prefix: str, names: Sequence[str], hidden: int, inner: int) -> Matrices:
    """The matrices [out, in] of a gated feed-forward."""
    for name in names:
        yield f"{prefix}.{name}", *((hidden, inner) if name in ("down_proj", "w2") else (inner, hidden))


def all_experts(prefix: str, names: Sequence[str], hidden: int, inner: int, count: int) -> Matrices:
    for expert in range(count):
        yield from gated(f"{prefix}.{expert}", names, hidden, inner)


def bf16(matrices: Matrices) -> Specs:
    return {f"{name}.weight": ("BF16", (out, inputs)) for name, out, inputs in matrices}


def fp8(matrices: Matrices) -> Specs:
    specs: Specs = {}
    for name, out, inputs in matrices:
        specs[f"{name}.weight"] = ("F8_E4M3", (out, inputs))
        specs[f"{name}.weight_scale_inv"] = ("F32", (-(-out // 128), -(-inputs // 128)))
    return specs


def int4(matrices: Matrices) -> Specs:
    specs: Specs = {}
    for name, out, inputs in matrices:
        specs[f"{name}.weight_packed"] = ("I32", (out, inputs // 8))
        specs[f"{name}.weight_scale"] = ("BF16", (out, inputs // 32))
        specs[f"{name}.weight_shape"] = ("I32", (2,))
    return specs


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
}


def deepseek_v3() -> Specs:
    """Every tensor of DeepSeek-V3, in the order of its layers."""
    hidden = 7168
    specs: Specs = {"model.embed_tokens.weight": ("BF16", (129280, hidden))}
    for layer in range(62):
        prefix = f"model.layers.{layer}"
        attention = (
            ("q_a_proj", 1536, hidden),
            ("q_b_proj", 24576, 1536),
            ("kv_a_proj_with_mqa", 576, hidden),
            ("kv_b_proj", 32768, 512),
            ("o_proj", hidden, 16384),
        )
        specs |= fp8((f"{prefix}.self_attn.{name}", out, inputs) for name, out, inputs in attention)
        if layer < 3:
            specs |= fp8(gated(f"{prefix}.mlp", PROJECTIONS, hidden, 18432))
        else:
            specs[f"{prefix}.mlp.gate.weight"] = ("BF16", (256, hidden))
            specs[f"{prefix}.mlp.gate.e_score_correction_bias"] = ("F32", (256,))
            specs |= fp8(gated(f"{prefix}.mlp.shared_experts", PROJECTIONS, hidden, 2048))
            specs |= fp8(all_experts(f"{prefix}.mlp.experts", PROJECTIONS, hidden, 2048, 256))
        specs[f"{prefix}.input_layernorm.weight"] = ("BF16", (hidden,))
        specs[f"{prefix}.post_attention_layernorm.weight"] = ("BF16", (hidden,))
    for name in ("embed_tokens", "shared_head.head"):
        specs[f"model.layers.61.{name}.weight"] = ("BF16", (129280, hidden))
    specs["model.layers.61.eh_proj.weight"] = ("BF16", (hidden, 2 * hidden))
    specs["model.norm.weight"] = ("BF16", (hidden,))
    specs["lm_head.weight"] = ("BF16", (129280, hidden))
    return specs


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "quantization_config": FP8,
}
SHARD = 4_262_000_000  # which makes 163 of DeepSeek-V3


def kimi_k2_thinking() -> Specs:
    specs = bf16(gated("model.layers.0.mlp", PROJECTIONS, 7168, 18432))
    for layer in range(1, 61):
        prefix = f"model.layers.{layer}.mlp"
        specs |= bf16(gated(f"{prefix}.shared_experts", PROJECTIONS, 7168, 2048))
        specs[f"{prefix}.gate.weight"] = ("BF16", (384, 7168))
        experts = int4(all_experts(f"{prefix}.experts", PROJECTIONS, 7168, 2048, 384))
        # the small ones side by side, so that holes in the file are long
        specs |= dict(sorted(experts.items(), key=lambda item: item[0].endswith(".weight_shape")))
    return specs


def kimi_shape(name: str) -> bytes | None:
    if not name.endswith(".weight_shape"):
        return None
    return struct.pack("<ii", *((7168, 2048) if "down_proj" in name else (2048, 7168)))


def stacked_layers(layers: int, tensors: Specs) -> Specs:
    return {name.format(layer): spec for layer in range(layers) for name, spec in tensors.items()}


def every_layer(
    layers: int,
    prefix: str,
    names: Sequence[str],
    sizes: tuple[int, int, int],
    store: Callable[[Matrices], Specs] = bf16,
) -> Specs:
    """A tensor per expert; the sizes are the hidden and the intermediate one, and the number of experts."""
    specs: Specs = {}
    for layer in range(layers):
        specs |= store(all_experts(prefix.format(layer), names, *sizes))
    return specs


def gpt_oss(experts: int, size: int) -> Specs:
    """24 layers in MXFP4, whose hidden and intermediate size are the same."""
    experts_of = "model.layers.{}.mlp.experts"
    specs: Specs = {}
    for name, rows in (("gate_up_proj", 2 * size), ("down_proj", size)):
        specs[f"{experts_of}.{name}_blocks"] = ("U8", (experts, rows, size // 32, 16))
        specs[f"{experts_of}.{name}_scales"] = ("U8", (experts, rows, size // 32))
        specs[f"{experts_of}.{name}_bias"] = ("BF16", (experts, rows))
    return stacked_layers(24, specs)


@dataclass(frozen=True)
class Published:
    """A published model: its tensors, and what is known of it.

    `layer_bytes` is what one layer's routed experts take, computed from the published config; `layers` how many there
    are, `parameters` how many weights a layer's experts have.
    """

    name: str
    specs: Callable[[], Specs]
    config: dict[str, Any]
    layer_bytes: int
    layers: int
    parameters: int
    more: dict[str, Any]
    limit: int | None = 4_900_000_000
    values: Callable[[str], bytes | None] = lambda name: None


GPT_OSS = Published(
    "gpt-oss-20b",
    lambda: gpt_oss(32, 2880),
    {
        "model_type": "gpt_oss",
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    423_567_360 - 32 * (5760 + 2880) * 2,  # the table counts biases, which are no part of a matrix
    24,
    32 * 3 * 2880 * 2880,
    {"family": "gpt_oss", "storage": "mxfp4", "experts": 32, "top_k": 4, "activation": "swiglu_oai"},
)

PUBLISHED = (
    Published(
        "Mixtral-8x7B",
        lambda: every_layer(32, "model.layers.{}.block_sparse_moe.experts", ("w1", "w2", "w3"), (4096, 14336, 8)),
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32},
        2_818_572_288,
        32,
        8 * 3 * 4096 * 14336,
        {"family": "w1_w3_w2", "storage": "bf16", "experts": 8, "top_k": 2},
    ),
    Published(
        "OLMoE-1B-7B",
        lambda: every_layer(16, "model.layers.{}.mlp.experts", PROJECTIONS, (2048, 1024, 64)),
        {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16},
        805_306_368,
        16,
        64 * 3 * 2048 * 1024,
        {"family": "gate_up_down", "storage": "bf16", "experts": 64, "top_k": 8},
    ),
    GPT_OSS,
    Published(
        "DeepSeek-V3",
        deepseek_v3,
        DEEPSEEK_V3,
        11_277_041_664,
        58,
        256 * 3 * 7168 * 2048,
        {
            "family": "gate_up_down",
            "storage": "fp8",
            "experts": 256,
            "top_k": 8,
            "mtp_layers": (61,),
            "dense_layers": (0, 1, 2),
        },
        SHARD,
    ),
    Published(
        "Qwen3-30B-A3B",
        lambda: every_layer(48, "model.layers.{}.mlp.experts", PROJECTIONS, (2048, 768, 128)),
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48},
        1_207_959_552,
        48,
        128 * 3 * 2048 * 768,
        {"family": "gate_up_down", "storage": "bf16", "experts": 128, "top_k": 8},
    ),
    Published(
        "Qwen3-30B-A3B-FP8",
        lambda: every_layer(48, "model.layers.{}.mlp.experts", PROJECTIONS, (2048, 768, 128), fp8),
        {"model_type": "qwen3_moe", "num_experts": 128, "num_hidden_layers": 48, "quantization_config": FP8},
        604_127_232,
        48,
        128 * 3 * 2048 * 768,
        {"family": "gate_up_down", "storage": "fp8", "experts": 128},
    ),
    Published(
        "dbrx-base",
        lambda: stacked_layers(
            40,
            {
                "transformer.blocks.{}.ffn.router.layer.weight": ("BF16", (16, 6144)),
                **{
                    f"transformer.blocks.{{}}.ffn.experts.mlp.{w}": ("BF16", (16 * 10752, 6144))
                    for w in ("v1", "w1", "w2")
                },
            },
        ),
        {
            "model_type": "dbrx",
            "n_layers": 40,
            "ffn_config": {"ffn_act_fn": {"name": "silu"}, "moe_num_experts": 16, "moe_top_k": 4},
        },
        6_341_787_648,
        40,
        16 * 3 * 6144 * 10752,
        {"family": "dbrx", "storage": "bf16", "experts": 16, "top_k": 4},
    ),
    Published(
        "Kimi-K2-Thinking",
        kimi_k2_thinking,
        {
            "model_type": "kimi_k2",
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "quantization_config": INT4,
        },
        9_512_690_688,
        60,
        384 * 3 * 7168 * 2048,
        {"family": "gate_up_down", "storage": "int4", "experts": 384, "dense_layers": (0,), "mtp_layers": ()},
        9_800_000_000,
        kimi_shape,
    ),
    Published(
        "granite-3.1-1b-a400m",
        lambda: stacked_layers(
            24,
            {
                "model.layers.{}.block_sparse_moe.input_linear.weight": ("BF16", (32, 1024, 1024)),
                "model.layers.{}.block_sparse_moe.output_linear.weight": ("BF16", (32, 1024, 512)),
                "model.layers.{}.block_sparse_moe.router.layer.weight": ("BF16", (32, 1024)),
            },
        ),
        {"model_type": "granitemoe", "num_local_experts": 32, "num_experts_per_tok": 8, "num_hidden_layers": 24},
        100_663_296,
        24,
        32 * 3 * 1024 * 512,
        {"family": "granite", "storage": "bf16", "experts": 32, "top_k": 8},
        None,
    ),
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every read of a local file: name, start, stop."""
    found: list[tuple[str, int, int]] = []
    read = LocalFile.read

    def note(self: LocalFile, start: int, stop: int) -> bytes:
        found.append((str(self.path), start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(LocalFile, "read", note)
    return found


def beyond_headers(reads: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The reads of weight files that go beyond their headers."""
    weights = [one for one in reads if one[0].endswith(".safetensors")]
    ends = {name: header_end(Path(name)) for name, _, _ in weights}
    return [(name, start, stop) for name, start, stop in weights if stop > ends[name]]


# large headers; of DeepSeek-V3 there is more below
LONG = ("Kimi-K2-Thinking", "DeepSeek-V3", "Qwen3-30B-A3B-FP8")


@pytest.mark.skipif(sys.platform == "win32", reason="files with holes are otherwise there")
@pytest.mark.parametrize(
    "model",
    [pytest.param(model, id=model.name, marks=pytest.mark.long if model.name in LONG else ()) for model in PUBLISHED],
)
def test_published_sizes(model: Published, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    specs = model.specs()
    folder = write_holes(tmp_path / model.name, specs, model.config, model.limit, model.values)
    layout = describe(folder)
    assert {key: getattr(layout, key) for key in model.more} == model.more
    assert len(layout.moe_layers) == model.layers
    for layer in layout.layers:
        assert layer.stored_bytes == model.layer_bytes
        assert layer.parameters == model.parameters
    assert {layout.moe_layers[0], layout.moe_layers[-1]} <= {layer.layer for layer in layout.layers}
    assert layout.stored_bytes == model.layers * model.layer_bytes
    assert layout.parameters == model.layers * model.parameters
    assert layout.stored_bytes <= sum(map(size_of, specs.values()))
    # three tiny tensors of the first expert tell its shape, in each layer
    shapes = set(beyond_headers(reads))
    assert [stop - start for _, start, stop in shapes] == [8] * (
        3 * len(layout.layers) if model.values(".weight_shape") else 0
    )
    assert layout.cost.bytes_read == sum(stop - start for _, start, stop in reads)
    opened = {name for name, _, _ in reads if name.endswith(".safetensors")}
    jsons = sum(path.stat().st_size for path in folder.glob("*.json"))
    assert layout.cost.bytes_read - jsons - 8 * 3 * 3 <= sum(header_end(Path(name)) for name in opened)
    assert len(opened) <= 7  # a layer of DeepSeek-V3 lies in three or four of its shards
    assert layout.exact == (len(opened) == len(list(folder.glob("*.safetensors"))))


@pytest.mark.long
def test_chosen_layers_of_a_published_model(tmp_path: Path) -> None:
    layout = describe(write_holes(tmp_path, deepseek_v3(), DEEPSEEK_V3, SHARD))
    assert layout.shared
    assert layout.shared.layers == tuple(range(3, 61))
    assert layout.shared.shapes == {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}
    assert layout.shared.stored_bytes == 11_277_041_664 // 256
    assert layout.shared.storage == "fp8"
    # a layer of multi-token prediction is described, and is in no sum unless it is all there is
    both, alone = describe(tmp_path, [5, 61]), describe(tmp_path, "61")
    assert [[layer.layer for layer in found.layers] for found in (both, alone)] == [[5, 61], [61]]
    assert both.stored_bytes == alone.stored_bytes == layout.stored_bytes
    assert not alone.exact


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are not alike


def write_gguf(path: Path, kinds: Sequence[tuple[str, str, str]], experts: int, hidden: int, inner: int) -> Path:
    """A GGUF file with a layer for each triple of types: gate, up and down."""
    writer = gguf.GGUFWriter(path, "mixtral")
    facts = {"block_count": len(kinds), "expert_count": experts, "expert_used_count": 2, "embedding_length": hidden}
    for key, value in facts.items():
        writer.add_uint32(f"mixtral.{key}", value)
    for layer, types in enumerate(kinds):
        for role, name in zip(("gate", "up", "down"), types, strict=True):
            kind = GGMLQuantizationType[name]
            block, size = GGML_QUANT_SIZES[kind]
            out, inputs = (hidden, inner) if role == "down" else (inner, hidden)
            data = np.zeros((experts, out, inputs // block * size), np.uint8)
            writer.add_tensor(f"blk.{layer}.ffn_{role}_exps.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bytes(kind: str, weights: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return weights // block * size


def test_gguf_whose_types_differ_by_layer(capsys: Capture, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    """As in Q4_K_M: some layers have their down projections in more bits."""
    kinds = [("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K"), ("Q4_K", "Q5_K", "Q6_K"), ("Q4_K", "Q4_K", "Q4_K")]
    path = write_gguf(tmp_path / "model-Q4_K_M.gguf", kinds, 4, 256, 512)
    layout = describe(path)
    assert (layout.model_type, layout.experts, layout.top_k, layout.exact) == ("mixtral", 4, 2, True)
    assert layout.moe_layers == (0, 1, 2, 3)
    assert layout.tensors["gate"] == ("blk.0.ffn_gate_exps.weight",)
    sizes = [sum(gguf_bytes(kind, 4 * 256 * 512) for kind in each) for each in kinds]
    assert [layer.stored_bytes for layer in layout.layers] == sizes
    assert (layout.stored_bytes, layout.parameters) == (sum(sizes), 4 * 3 * 4 * 256 * 512)
    for layer, types in zip(layout.layers, kinds, strict=True):
        assert [name.upper() for name in layer.formats.values()] == list(types)
    assert layout.analysis_bytes - layout.further_bytes == sizes[0]
    assert sum(stop - start for _, start, stop in reads) <= 2**18  # a header is read in pieces of this size
    text = table(capsys, path)
    assert re.search(r"^ 1, 3 +4 +\S+ +\S+ kB$", text, re.MULTILINE), text
    assert row(text, "Layer 0").startswith("1.")
    assert row(text, "Storage") == "Q4_K, Q6_K, Q5_K, by layer below"


def test_layers_with_other_numbers_of_experts(capsys: Capture) -> None:
    layout = describe(FIXTURES / "dots3_note")
    assert [layer.experts for layer in layout.layers] == [3, 4]
    assert row(table(capsys, FIXTURES / "dots3_note"), "Experts").startswith("3 to 4, ")


def write_mlx(folder: Path, bits: Sequence[int], limit: int | None) -> Path:
    """Layers of MLX in so many bits each, by modules that the config names."""
    specs: Specs = {}
    modules: dict[str, Any] = {}
    for layer, width in enumerate(bits):
        for role in ("gate", "up", "down"):
            module = f"model.layers.{layer}.mlp.switch_mlp.{role}_proj"
            specs[f"{module}.weight"] = ("U32", (8, 64, 64 * width // 32))
            specs |= dict.fromkeys((f"{module}.scales", f"{module}.biases"), ("BF16", (8, 64, 1)))
            modules[module] = {"group_size": 64, "bits": width}
    config = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": len(bits)}
    quantization = {"group_size": 64, "bits": 4, **modules}
    return write_holes(folder, specs, config | {"quantization": quantization}, limit)


def mlx_bytes(bits: int) -> int:
    return 3 * 8 * 64 * 64 * bits // 8 + 3 * 8 * 64 * 4


def test_sums_where_not_all_headers_were_read(capsys: Capture, tmp_path: Path) -> None:
    """The first and the last layer stand for those between them, until all are asked for."""
    bits = (6, 4, 4, 4)
    whole = write_mlx(tmp_path / "whole", bits, None)
    shards = write_mlx(tmp_path / "shards", bits, mlx_bytes(4))
    sizes = [mlx_bytes(width) for width in bits]
    layout = describe(whole)
    assert (layout.exact, layout.stored_bytes) == (True, sum(sizes))
    assert [layer.stored_bytes for layer in layout.layers] == sizes
    layout = describe(shards)
    assert (layout.exact, layout.stored_bytes) == (False, (sizes[0] + sizes[3]) * 2)
    assert [layer.layer for layer in layout.layers] == [0, 3]
    text = table(capsys, shards)
    assert row(text, "All layers") == "about 270.3 kB, 393 k weights (from the headers of layers 0, 3)"
    assert row(text, "Storage") == "mlx-6bit, mlx-4bit, by layer below"
    layout = describe(shards, "all")
    assert (layout.exact, layout.stored_bytes) == (True, sum(sizes))
    layout = describe(shards, [2])
    assert (layout.exact, layout.stored_bytes, layout.storage) == (False, 4 * sizes[2], "mlx-4bit")
    assert layout.analysis_bytes - layout.further_bytes == sizes[0]  # of the layer that an analysis takes by default
    assert "(from the headers of layer 2)" in row(table(capsys, shards, "--layers", "2"), "All layers")


def test_shared_experts_that_can_not_be_read_are_a_note(tmp_path: Path) -> None:
    specs = bf16(all_experts("model.layers.0.mlp.experts", PROJECTIONS, 64, 32, 4))
    specs |= bf16(gated("model.layers.0.mlp.shared_experts", PROJECTIONS, 64, 32))
    specs["model.layers.0.mlp.shared_experts.up_proj.weight"] = ("BF16", (31, 64))
    layout = describe(write_holes(tmp_path, specs, {"model_type": "deepseek_v3", "num_hidden_layers": 1}))
    assert layout.shared is None
    (note,) = layout.notes
    assert "shared" in note
    assert "31" in note


# ---------------------------------------------------------------------------------------------------------------------
# What an analysis would read


def data_read(reads: Sequence[tuple[str, int, int]]) -> int:
    """The bytes of tensors that were read."""
    return sum(stop - start for _, start, stop in beyond_headers(reads))


ANALYSED = (
    "mixtral",
    "deepseek_v3_fp8",
    "deepseek_v3_sharded",
    "gpt_oss_mxfp4",
    "mlx_qwen3_moe_mixed",
    "mlx_nemotron_h_4bit",
    "dbrx",
    "nllb_moe#encoder",
    "llama4",
    "published_grok2",
    "published_kimi_k3",
)


@pytest.mark.parametrize("kept", [Resources.current().kept_weights, 0])
@pytest.mark.parametrize("name", ANALYSED)
def test_an_analysis_reads_what_was_said(
    name: str, kept: int, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int, int]]
) -> None:
    monkeypatch.setattr(Resources, "kept_weights", kept)
    layout = describe(f"{FIXTURES}/{name}")
    assert data_read(reads) == 0
    times = 1 if kept else 2  # no fixture has more experts than an analysis takes the spectra of
    first, further = layout.layers[0], layout.further_bytes
    assert layout.analysis_bytes == times * first.stored_bytes + further
    reads.clear()
    MoETypeService.analyze(f"{FIXTURES}/{name}", layer=first.layer)
    assert data_read(reads) == pytest.approx(layout.analysis_bytes - further, rel=0.01)
    reads.clear()
    analysis = MoETypeService.analyze(f"{FIXTURES}/{name}")
    assert layout.analysis_bytes - further <= 1.01 * data_read(reads) <= 1.02 * layout.analysis_bytes
    assert {part.layer for part in analysis.further_layers} <= set(layout.further_layers)
    assert analysis.cost.bytes_read == sum(stop - start for _, start, stop in reads)


def test_an_analysis_of_many_experts_reads_the_chosen_ones_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 32, "num_hidden_layers": 1}
    folder = write_holes(tmp_path, bf16(all_experts("model.layers.0.mlp.experts", PROJECTIONS, 64, 48, 32)), config)
    monkeypatch.setattr(Resources, "kept_weights", 8 * 48 * 64 - 1)
    layout = describe(folder)
    assert layout.analysis_bytes == layout.stored_bytes * (32 + 8) // 32
    reads.clear()
    MoETypeService.analyze(str(folder))
    assert data_read(reads) == layout.analysis_bytes


ENCODERS = {**FLOAT_ENCODERS, **PACKED_ENCODERS}
NEEDED = {"pack_int4_sym": ".weight_shape", "gptq_4": ".g_idx", "bnb_nf4_nested": ".weight.quant_state."}
"""The part that must be read to recognise a format."""


def write_encoded(folder: Path, name: str, experts: int, hidden: int, inner: int) -> Path:
    """A Mixture of Experts in a storage format, by the encoders of the codecs' tests."""
    encoder, _ = ENCODERS[name]
    rng = np.random.default_rng(0)  # of the matrices; an encoder draws the same variant for each
    stored: dict[str, tuple[str, NDArray[Any]]] = {}
    quantization: dict[str, Any] = {}
    for module, out, inputs in all_experts("model.layers.0.mlp.experts", PROJECTIONS, hidden, inner, experts):
        encoded = encoder(rng.standard_normal((out, inputs)).astype(np.float32), np.random.default_rng(0))
        stored |= {f"{module}.{part}": value for part, value in encoded.parts.items()}
        quantization = encoded.quantization
    config = {"model_type": "qwen3_moe", "num_experts": experts, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    header, data = {}, b""
    for tensor, (dtype, array) in stored.items():
        start, data = len(data), data + array.tobytes()
        shape = [*array.shape[:-1], 2 * array.shape[-1]] if dtype == "F4" else list(array.shape)
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.mark.parametrize(
    "name",
    ["fp8_block", "fp8_tensor", "nvfp4_modelopt", "mxfp4_packed", "mxfp4_f4", "awq_4", *NEEDED],
)
def test_storage_formats(name: str, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    """The bytes of every part; only what a format needs to be recognised is read."""
    folder = write_encoded(tmp_path, name, 3, 256, 128)
    sizes = stored_sizes(folder)
    layout = describe(folder)
    assert layout.stored_bytes == sum(sizes.values())
    names = {re.sub(r"experts\.\d+", "experts.{expert}", tensor) for tensor in sizes}
    assert set(itertools.chain(*layout.tensors.values())) == names
    read = {stop - start for _, start, stop in beyond_headers(reads)}
    assert read == {
        size for tensor, size in sizes.items() if NEEDED.get(name, "none") in tensor and "experts.0" in tensor
    }
    once = data_read(reads)
    reads.clear()
    MoETypeService.analyze(str(folder))
    assert data_read(reads) == pytest.approx(layout.analysis_bytes, rel=0.01, abs=once)


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched from the Hub


def write_miniature(folder: Path, specs: Specs, config: Mapping[str, Any], limit: int, shrink: int) -> Path:
    """The same shards and headers of the same length, and matrices that are smaller by a factor in each axis."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = cut(specs, limit)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):06}.safetensors"
        small = {
            tensor: (dtype, tuple(max(1, size // shrink) for size in shape)) for tensor, (dtype, shape) in shard.items()
        }
        header = header_of(small).ljust(len(header_of(shard)))
        data = bytes(sum(map(size_of, small.values())))
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + data)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(size_of, specs.values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


@pytest.mark.long
def test_deepseek_v3_on_the_hub(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """Of 688 GB, the index and the headers of a few shards; and nothing again."""
    folder = write_miniature(tmp_path / "model", deepseek_v3(), DEEPSEEK_V3, SHARD, 256)
    revision = hub.add("tests/deepseek-v3", folder)
    layout = describe("tests/deepseek-v3")
    assert (layout.model, layout.revision) == ("tests/deepseek-v3", revision)
    assert (len(layout.moe_layers), layout.mtp_layers, layout.dense_layers) == (58, (61,), (0, 1, 2))
    weights = [request for request in hub.requests if request.file.endswith(".safetensors")]
    assert layout.cost.bytes_fetched == hub.body_bytes() <= 700_000
    files = {request.file for request in weights}
    assert len(files) == 7  # the dense first layers', and those of a layer at each end
    # each is asked for its size once, and for its header once, which the Hub redirects
    assert len(weights) == 3 * len(files)
    for request in weights:
        if request.range:
            assert request.range == f"bytes=0-{min(READ_AHEAD, (folder / request.file).stat().st_size) - 1}"
    index = folder / "model.safetensors.index.json"
    assert hub.body_bytes(".json") == index.stat().st_size + (folder / "config.json").stat().st_size
    assert len(hub.requests) <= 30
    hub.clear_requests()
    again = describe("tests/deepseek-v3")
    assert again.cost.bytes_fetched == hub.body_bytes() == hub.body_bytes(".json") == 0
    assert without_seconds(again.model_dump()) == without_seconds(layout.model_dump()) | {
        "cost": {"bytes_read": layout.cost.bytes_read, "bytes_fetched": 0}
    }


def test_a_stacked_model_on_the_hub(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """A model in one file costs one request for its header."""
    config = GPT_OSS.config | {"num_local_experts": 4}
    hub.add("tests/stacked", write_holes(tmp_path / "model", gpt_oss(4, 320), config))
    layout = describe("tests/stacked")
    assert len(layout.layers) == 24
    assert layout.cost.bytes_fetched == hub.body_bytes() <= READ_AHEAD
    assert [request.method for request in hub.requests if request.file.endswith(".safetensors")] == [
        "HEAD",
        "GET",
        "GET",
    ]


def test_unindexed_shards_on_the_hub(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "model", (4, 4, 4), mlx_bytes(4))
    (folder / "model.safetensors.index.json").unlink()
    hub.add("tests/unindexed", folder)
    layout = describe("tests/unindexed")
    assert layout.exact
    assert layout.cost.bytes_fetched == hub.body_bytes() <= 3 * READ_AHEAD


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_the_json_contract_is_documented(capsys: Capture) -> None:
    """Every key is in its part of docs/json.md, and goes back into the report."""
    part = DOCS.read_text().partition("\n## moe-layout/1\n")[2].partition("\n## ")[0]
    data = layout_json(capsys, FIXTURES / "deepseek_v3")
    assert data["schema"] == "moe-layout/1"
    assert data["shared"]
    keys = {*data, *data["layers"][0], *data["shared"], *data["cost"]} - {"schema"}
    assert sorted(key for key in keys if f"`{key}`" not in part) == []
    assert MoELayout.model_validate_json(json.dumps(data)).model_dump(mode="json") == data


def test_output(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    data = layout_json(capsys, "demo:native", "-o", str(file))
    assert json.loads(file.read_text()) == data
    assert table(capsys, "demo:native", "-o", str(file)) == table(capsys, "demo:native")
    assert without_seconds(json.loads(file.read_text())) == without_seconds(data)


def test_verbose_tells_the_cost_on_stderr(capsys: Capture) -> None:
    assert run([*LAYOUT, "-m", "demo:native", "-v"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"read .*B.* in .* s\n", without_steps(err))
    assert out == table(capsys, "demo:native")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-m", str(FIXTURES / "dense_llama")], 4, "routed experts"),
        (["-m", "/no/such/model"], 3, "/no/such/model"),
        (["-m", str(FIXTURES / "mixtral"), "--layers", "0,99"], 2, "layer 99"),
        (["-m", str(FIXTURES / "mixtral"), "--layers", "first"], 2, "first"),
        (["-m", str(FIXTURES / "mixtral"), "--layers", ""], 2, "not a list of layers"),
        (["-m", f"{FIXTURES}/mixtral#encoder"], 2, "encoder"),
        (["-m", "demo:native", "-o", "/no/such/folder/x.json"], 2, "/no/such/folder"),
        ([], 2, "--model"),
        (["-m", "demo:native", "surplus"], 2, "surplus"),
    ],
)
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_errors(capsys: Capture, arguments: list[str], code: int, words: str, as_json: list[str]) -> None:
    assert run([*LAYOUT, *as_json, *arguments]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    if as_json:
        assert json.loads(err)["error"]["code"] == code


def test_errors_of_the_service(tmp_path: Path) -> None:
    with pytest.raises(NotMoE):
        describe(FIXTURES / "dense_llama")
    with pytest.raises(ModelUnreadable):
        describe(tmp_path)
    with pytest.raises(InvalidRequest, match="0-1"):
        describe(FIXTURES / "mixtral", [7])
    with pytest.raises(InvalidRequest):
        describe(FIXTURES / "mixtral", [])
    odd = {"model.layers.0.mlp.experts.0.strange.weight": ("BF16", (8, 8))}
    with pytest.raises(UnknownFormat, match="strange"):
        describe(write_holes(tmp_path / "odd", odd, {}))


SHOWN = (
    "mixtral",
    "deepseek_v3_fp8",
    "nllb_moe",
    "kimi_k25",
    "dots3_note",
    "mlx_qwen3_moe_mixed",
    "gemma4",
    "published_kimi_k3",
)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_table_fits_its_width(capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = table(capsys, FIXTURES / name)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    names = [name for names in describe(FIXTURES / name).tensors.values() for name in names]
    leaves = {re.split(r"experts?[.]|[{]expert[}][.]|switch_mlp[.]", name)[-1] for name in names}
    assert {leaf for leaf in leaves if leaf not in "".join(text.split())} == set()


def test_what_a_person_reads(capsys: Capture) -> None:
    text = table(capsys, FIXTURES / "deepseek_v3_fp8")
    assert row(text, "Dense layers") == "1 (0)"
    assert row(text, "MTP layers") == "1 (2), not counted below"
    assert row(text, "A layer") == "107.8 kB, 108 k weights of 8.01 bits"
    text = table(capsys, FIXTURES / "deepseek_v3")
    assert row(text, "Shared").endswith("bf16, in 1 layer of 4.6 kB")
    assert row(text, "Tensors").split() == [
        "model.layers.1.mlp.experts.{expert}.",
        *("gate", "gate_proj.weight", "up", "up_proj.weight", "down", "down_proj.weight"),
    ]
    assert "beside the experts" in row(table(capsys, FIXTURES / "gemma4"), "Dense layers")
    assert "Dense" not in table(capsys, FIXTURES / "mixtral")
    assert "#encoder" in row(table(capsys, FIXTURES / "switch_transformers"), "Note")


def test_reports_in_a_notebook() -> None:
    html = describe("demo:native")._repr_html_()
    assert "MOE LAYOUT" in html
    assert "{expert}" in html
