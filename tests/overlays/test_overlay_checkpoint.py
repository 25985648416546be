"""Overlay checkpoints on disk: written, read, exported, interrupted."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from html import unescape
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from markdown_it import MarkdownIt
from numpy.typing import NDArray
from safetensors.numpy import save_file

import encoders_float
import encoders_packed
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, UnknownFormat
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.low_rank import relative_error
from chuk_lazarus.introspection.moe.overlays.checkpoint import folder as model_folder
from chuk_lazarus.introspection.moe.overlays.checkpoint.export import export_overlay
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import OverlayCheckpoint, read_overlay
from chuk_lazarus.introspection.moe.overlays.checkpoint.writer import planned_ranks, write_overlay
from chuk_lazarus.introspection.moe.weights.expert_layer import stored_rows
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.layouts import load_table, split_name
from chuk_lazarus.introspection.moe.weights.model_config import name_dtype
from chuk_lazarus.introspection.moe.weights.stored import group_quantised
from places import FIXTURES


def one_of_each() -> dict[str, str]:
    """A fixture of each layout in each storage format, with that format."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(FIXTURES.glob("*/oracle.npz")):
        experts = Experts.open(str(path.parent))
        if path.parent.name != "published_grok2":  # split over files: refused, see below
            found.setdefault((experts.family, experts.layer(experts.layers[0]).storage), path.parent.name)
    return {name: storage for (_, storage), name in found.items()}


STORAGE = one_of_each()
WITH_ORACLE = list(STORAGE)
QUANTISED = [name for name, storage in STORAGE.items() if storage not in ("bf16", "f32")]
BF16 = ml_dtypes.bfloat16

Ranks = dict[int, dict[str, int]]
every_fixture = pytest.mark.parametrize("name", WITH_ORACLE)


def quiet(what: str, done: int, total: int) -> None:
    pass


def open_model(folder: Path) -> Experts:
    return Experts.open(str(folder))


def all_ranks(experts: Experts, most: int = 10**9) -> Ranks:
    layers = (experts.layer(number) for number in experts.layers)
    return {layer.number: {role: min(most, *layer.shape(role)) for role in layer.roles} for layer in layers}


def write(model: Path, folder: Path, most: int = 10**9, **options: Any) -> OverlayCheckpoint:
    experts = open_model(model)
    write_overlay(experts, all_ranks(experts, most), folder, resources=Resources.current(), progress=quiet, **options)
    return read_overlay(folder)


def parse(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The tensors of a file as the safetensors library sees them."""
    return list(safetensors.deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's dtype, shape and bytes, as the safetensors library reads them."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in parse(file)
    }


def save_stored(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write what `stored` reads, whatever the dtypes."""
    body, entries = b"", {}
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body)


def signature(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, shape) for name, (dtype, shape, _) in stored(folder).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expert_names(experts: Experts, layers: tuple[int, ...] | None = None) -> set[str]:
    chosen = (experts.layer(number) for number in layers or experts.layers)
    return {info.name for layer in chosen for tensor in layer.tensors for info in tensor.infos()}


def round_bf16(array: NDArray[Any]) -> NDArray[np.float32]:
    return array.astype(BF16).astype(np.float32)


def oracle(name: str) -> dict[int, dict[str, NDArray[np.float32]]]:
    found: dict[int, dict[str, NDArray[np.float32]]] = {}
    with np.load(FIXTURES / name / "oracle.npz") as arrays:
        for key in arrays.files:
            layer, role = key.split(".")
            found.setdefault(int(layer), {})[role] = arrays[key]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@every_fixture
def test_an_overlay_is_the_model_with_its_experts_replaced(name: str, tmp_path: Path) -> None:
    model, folder = FIXTURES / name, tmp_path / "overlay"
    overlay = write(model, folder, 3)
    experts = open_model(model)
    before, after = stored(model), stored(folder)
    copied = before.keys() - expert_names(experts)
    copied -= {key for key in copied - after.keys() if key.endswith("input_scale")}  # they go with the settings
    assert {key: after[key] for key in copied} == {key: before[key] for key in copied}
    assert overlay.names == after.keys() - copied
    assert (overlay.family, overlay.layers) == (experts.family, experts.layers)
    for number, truth in oracle(name).items():
        prefix = overlay.prefix(number)
        for role, matrices in truth.items():
            count, out, inner = matrices.shape
            shapes = {"base": (out, inner), "left": (count, out, 3), "right": (count, 3, inner)}
            base = after[f"{prefix}.overlay.{role}.base"]
            assert base[2] == matrices.mean(axis=0, dtype=np.float64).astype(BF16).tobytes()
            for part, shape in shapes.items():
                assert after[f"{prefix}.overlay.{role}.{part}"][:2] == ("BF16", shape)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {key for key, place in index["weight_map"].items() if place == file.name}
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())
    assert {path.name for path in tmp_path.iterdir()} == {"overlay"}


@every_fixture
def test_factors_are_the_best_of_their_rank(name: str, tmp_path: Path) -> None:
    """Against the singular value decomposition: an oracle that shares no code."""
    overlay = write(FIXTURES / name, tmp_path / "overlay", 5)
    for number, truth in oracle(name).items():
        for role, matrices in truth.items():
            base = overlay.base(number, role)
            for expert, matrix in enumerate(matrices):
                found = overlay.expert(number, expert)[role]
                left = float(np.sqrt((np.linalg.svd(matrix - base)[1][5:] ** 2).sum()))
                assert np.linalg.norm(found - matrix) <= 1.005 * left + 0.005 * np.linalg.norm(matrix)


def test_the_config_tells_what_it_is(tmp_path: Path) -> None:
    original = json.loads((FIXTURES / "mixtral/config.json").read_text())
    overlay = write(
        FIXTURES / "mixtral", tmp_path / "overlay", 2, source="org/mixtral", card=lambda: "Made for a test."
    )
    facts = {
        "version": 1,
        "source": "org/mixtral",
        "revision": None,
        "family": "w1_w3_w2",
        "dtype": "bfloat16",
        "rule": "",
        "names": {
            "gate": "block_sparse_moe.experts.{expert}.w1.weight",
            "up": "block_sparse_moe.experts.{expert}.w3.weight",
            "down": "block_sparse_moe.experts.{expert}.w2.weight",
        },
        "layers": {number: {"gate": 2, "up": 2, "down": 2} for number in "01"},
    }
    assert overlay.config == {**original, "model_file": "overlay_model.py", "overlay_config": facts}
    card = (tmp_path / "overlay/README.md").read_text()
    for text in (
        "org/mixtral",
        "layers 0-1: gate 2 up 2 down 2",
        "18,432 bytes",
        "Made for a test.",
        "-overlay-verify",
    ):
        assert text in card


@pytest.mark.parametrize(
    "source",
    ["org/a_b-c_d", "a b;touch pwn", "[x](y)", "![x](y)", "<img src=x>", "https://a.example", "`", "a``b`", "``a`"],
)
def test_a_card_shows_the_models_name_as_it_is(source: str, tmp_path: Path) -> None:
    """To a reader of Markdown and to the shell."""
    write(FIXTURES / "mixtral", tmp_path / "overlay", 2, source=source)
    card = (tmp_path / "overlay/README.md").read_text()
    shown = MarkdownIt("commonmark").render(card)
    assert "<a" not in shown
    assert "<img" not in shown
    assert unescape(shown).count(f"<code>{source}</code>") == 2
    command = next(line for line in card.splitlines() if "moe-overlay-verify" in line)
    words = shlex.split(command)
    assert words[words.index("-m") + 1 :][:2] == [source, "--layer"]


def test_quantization_config_goes_with_the_last_quantised_tensor(tmp_path: Path) -> None:
    assert "quantization_config" not in write(FIXTURES / "gpt_oss_mxfp4", tmp_path / "a").config
    # its multi-token-prediction layer has experts in FP8 and is copied
    assert "quantization_config" in write(FIXTURES / "deepseek_v3_fp8", tmp_path / "b").config


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "olmoe", model)
    wanted = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt", "vocab.json"]
    wanted += ["tokenizer.model", "chat_template.jinja", "special_tokens_map.json", "modeling_own.py", "LICENSE"]
    (model / "origin.json").unlink()
    unwanted = ["README.md", "pytorch_model.bin", "consolidated.safetensors.index.json", "training.log"]
    for name in wanted + unwanted:
        (model / name).write_text(f"{name} of the model")
    write(model, tmp_path / "overlay")
    made = {"README.md", "config.json", "overlay_model.py", "model.safetensors.index.json"} | {
        path.name for path in (tmp_path / "overlay").glob("*.safetensors")
    }
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    for folder in (tmp_path / "overlay", tmp_path / "export"):
        assert {name for name in content(folder) if name not in made} == set(wanted)
        assert all((folder / name).read_text() == f"{name} of the model" for name in wanted)
    assert not any((tmp_path / "export" / name).exists() for name in ("README.md", "overlay_model.py"))


def test_copies_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "SHARD", 1500)
    monkeypatch.setattr(model_folder, "CHUNK", 100)
    experts = open_model(FIXTURES / "olmoe")
    write(FIXTURES / "olmoe", tmp_path / "overlay")
    files = sorted((tmp_path / "overlay").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    names = [[name for name, _ in parse(file)] for file in files]
    assert all(".overlay." in name for file in names[-2:] for name in file)
    copied = [sorted(file) for file in names[:-2]]
    assert [name for file in copied for name in file] == sorted(set(experts.checkpoint.names) - expert_names(experts))
    before = stored(FIXTURES / "olmoe")
    for file in copied:
        assert len(file) == 1 or sum(len(before[name][2]) for name in file) <= 1500
    assert {name: tensor for name, tensor in stored(tmp_path / "overlay").items() if name in before} == {
        name: before[name] for file in copied for name in file
    }


def test_some_layers_and_rank_zero(tmp_path: Path) -> None:
    experts = open_model(FIXTURES / "mixtral")
    folder, ranks = tmp_path / "overlay", {1: {"gate": 0, "up": 3, "down": 0}}
    write_overlay(experts, ranks, folder, resources=Resources.current(), progress=quiet)
    overlay = read_overlay(folder)
    assert (overlay.layers, overlay.ranks) == ((1,), ranks)
    assert signature(folder)["model.layers.1.overlay.gate.left"] == ("BF16", (4, 24, 0))
    found = overlay.expert(1, 2)
    np.testing.assert_array_equal(found["gate"], overlay.base(1, "gate"))
    assert not np.array_equal(found["up"], overlay.base(1, "up"))
    export_overlay(folder, tmp_path / "export", resources=Resources.current(), progress=quiet)
    before, after = stored(FIXTURES / "mixtral"), stored(tmp_path / "export")
    assert after.keys() == before.keys()
    same = before.keys() - expert_names(experts, (1,))
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_progress_counts_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    experts = open_model(FIXTURES / "olmoe")
    write_overlay(
        experts,
        all_ranks(experts, 2),
        tmp_path / "o",
        resources=Resources.current(),
        progress=lambda *report: seen.append(report),
    )
    total = sum(len(data) for _, _, data in stored(tmp_path / "o").values())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {total for _, _, total in seen} == {total}
    assert seen[-1][1] == total


# ---------------------------------------------------------------------------------------------------------------------
# Export


@every_fixture
def test_full_rank_gives_the_model_back(name: str, tmp_path: Path) -> None:
    write(FIXTURES / name, tmp_path / "overlay")
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    found, experts = open_model(tmp_path / "export"), open_model(FIXTURES / name)
    assert (found.layers, found.mtp_layers, found.notes) == (experts.layers, experts.mtp_layers, experts.notes)
    for number, roles in oracle(name).items():
        for expert in range(found.layer(number).count):
            for role, matrix in found.layer(number).matrices(expert).items():
                # the base is as long as the longest expert, and rounded
                longest = np.linalg.norm(roles[role], axis=(1, 2)).max()
                assert np.linalg.norm(matrix - roles[role][expert]) < 0.006 * longest
    before, after = stored(FIXTURES / name), stored(tmp_path / "export")
    assert {"overlay_config", "quantization_config"}.isdisjoint(found.checkpoint.config)
    if name not in QUANTISED:
        signed = signature(FIXTURES / name)
        rest = before.keys() - expert_names(experts)
        sizes = Counter({dtype: 0 for dtype, _ in signed.values()})
        for key in rest:
            sizes[before[key][0]] += len(before[key][2])
        rounded = {"F16", max(sizes, key=sizes.__getitem__)} - {"BF16"}  # the dtype of most becomes bf16
        changed = expert_names(experts) | {key for key in rest if signed[key][0] in rounded}
        assert signature(tmp_path / "export") == signed | {key: ("BF16", signed[key][1]) for key in changed}
        assert found.checkpoint.config == name_dtype(experts.checkpoint.config, "bfloat16")
        same = before.keys() - changed
    else:
        same = before.keys() - expert_names(experts, experts.layers + experts.mtp_layers)
        assert {dtype for dtype, _, _ in after.values()} <= {"BF16", "F32"}
        same = {key for key in same if not set(group_quantised(before)).intersection({key}) and key in after}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


@every_fixture
def test_an_export_is_base_and_factors(name: str, tmp_path: Path) -> None:
    overlay = write(FIXTURES / name, tmp_path / "overlay", 4)
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    raw, found = stored(tmp_path / "overlay"), open_model(tmp_path / "export")
    for number in overlay.layers:
        for expert in range(found.layer(number).count):
            for role, matrix in found.layer(number).matrices(expert).items():
                base, left, right = (
                    np.frombuffer(data, BF16).reshape(shape).astype(np.float32)
                    for _, shape, data in (
                        raw[f"{overlay.prefix(number)}.overlay.{role}.{p}"] for p in ("base", "left", "right")
                    )
                )
                exact = base + left[expert] @ right[expert]
                np.testing.assert_allclose(matrix, exact, rtol=2**-7, atol=1e-6)
                assert np.mean(matrix == round_bf16(exact)) > 0.99  # all but for the order of sums


def test_fp8_beside_the_experts_is_decoded(tmp_path: Path) -> None:
    export = tmp_path / "export"
    write(FIXTURES / "deepseek_v3_fp8", tmp_path / "overlay")
    export_overlay(tmp_path / "overlay", export, resources=Resources.current(), progress=quiet)
    assert not [name for name in stored(export) if "scale" in name]
    before, after = open_model(FIXTURES / "deepseek_v3_fp8").layer(2), open_model(export).layer(2)
    for expert in range(2):
        exact = before.matrices(expert)
        for role, matrix in after.matrices(expert).items():
            np.testing.assert_array_equal(matrix, round_bf16(exact[role]))


def test_mxfp4_beside_the_overlay_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the layer, as another one that is no overlay."""
    model, export = tmp_path / "model", tmp_path / "export"
    shutil.copytree(FIXTURES / "gpt_oss_mxfp4", model)
    tensors = stored(model)
    more = {name.replace("layers.0", "layers.1"): tensor for name, tensor in tensors.items() if "layers.0" in name}
    save_stored(model / "model.safetensors", tensors | more)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    ranks = {0: {"gate": 9, "up": 9, "down": 9}}
    write_overlay(open_model(model), ranks, tmp_path / "overlay", resources=Resources.current(), progress=quiet)
    assert "quantization_config" in read_overlay(tmp_path / "overlay").config
    export_overlay(tmp_path / "overlay", export, resources=Resources.current(), progress=quiet)
    found = open_model(export)
    assert (found.family, found.layers) == ("gpt_oss_transposed", (0, 1))
    for expert in range(3):
        for role, matrix in found.layer(1).matrices(expert).items():
            np.testing.assert_array_equal(matrix, oracle("gpt_oss_mxfp4")[0][role][expert])


def test_what_cannot_be_decoded_is_not_exported(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(model, extra={"model.layers.0.self_attn.q_proj.qweight": np.zeros((4, 4), np.int32)})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    write(model, tmp_path / "overlay", 1)
    with pytest.raises(UnknownFormat, match="qweight"):
        export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    assert not (tmp_path / "export").exists()


ENCODERS = encoders_float.ENCODERS | encoders_packed.ENCODERS
NEED_NO_CONFIG = [
    "nvfp4_modelopt", "mxfp4_packed", "mxfp4_f4", "fp8_unscaled", "fp8_channel", "fp8_tensor", "int8_channel",
    "awq_4", "bnb_nf4", "bnb_nf4_bf16_storage", "bnb_int8",
]  # fmt: skip
ACTIVATION_SCALES = ("input_scale", "input_global_scale", "activation_scale")


def make_encoded(folder: Path, name: str, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """A model of two layers whose experts and attention are in this storage format; returns what is stored, by module.

    Every module has scales for its inputs, and every expert a bias.
    """
    rng, encoder = np.random.default_rng(0), ENCODERS[name][0]
    shapes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    modules = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(2)
        for leaf, shape in shapes.items()
    } | {f"model.layers.{layer}.self_attn.q_proj": (32, 64) for layer in range(2)}
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    truth = {}
    for module, shape in modules.items():
        encoded = encoder(rng.standard_normal(shape).astype(np.float32), rng)
        truth[module] = encoded.values
        for part, (dtype, array) in encoded.parts.items():
            wide = 2 if dtype == "F4" else 1
            tensors[f"{module}.{part}"] = (
                dtype,
                (*array.shape[:-1], wide * array.shape[-1]) if array.shape else (),
                array.tobytes(),
            )
        for part in ACTIVATION_SCALES:
            tensors[f"{module}.{part}"] = ("F32", (1,), np.ones(1, np.float32).tobytes())
        tensors[f"{module}.bias"] = ("F32", shape[:1], rng.standard_normal(shape[0]).astype(np.float32).tobytes())
    folder.mkdir()
    save_stored(folder / "model.safetensors", tensors)
    facts = {"model_type": "olmoe", "num_experts": 2, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({**facts, **config}))
    return truth


def overlay_second(model: Path, folder: Path) -> None:
    """An overlay of layer 1 alone."""
    write_overlay(
        open_model(model),
        {1: {"gate": 32, "up": 32, "down": 32}},
        folder,
        resources=Resources.current(),
        progress=quiet,
    )


@pytest.mark.parametrize("name", NEED_NO_CONFIG)
def test_whatever_is_quantised_is_decoded_without_a_word_in_the_config(name: str, tmp_path: Path) -> None:
    truth = make_encoded(tmp_path / "model", name, {})
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    after = stored(tmp_path / "export")
    assert after.keys() == {f"{module}.{part}" for module in truth for part in ("weight", "bias")}
    for module, matrix in truth.items():
        dtype, shape, data = after[f"{module}.weight"]
        assert dtype == "BF16"
        found = np.frombuffer(data, BF16).reshape(shape).astype(np.float32)
        if "layers.1.mlp" in module:
            assert relative_error(found, matrix) < 0.004
        else:
            stands = matrix.T if found.shape != matrix.shape else matrix
            np.testing.assert_array_equal(found, round_bf16(stands))


def test_scales_of_the_inputs_go_with_their_experts(tmp_path: Path) -> None:
    """And biases stay: they are no part of the matrices that the overlay replaces."""
    make_encoded(tmp_path / "model", "fp8_tensor", {})
    before = stored(tmp_path / "model")
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    after = {name for name in stored(tmp_path / "overlay") if ".overlay." not in name}
    assert after == {name for name in before if "layers.1.mlp" not in name or name.endswith(".bias")}


def test_fp8_without_scales_is_decoded_whatever_its_shape(tmp_path: Path) -> None:
    make_encoded(tmp_path / "model", "fp8_unscaled", {"quantization_config": {}})
    tensors, rng = stored(tmp_path / "model"), np.random.default_rng(0)
    for name, shape in {"norm.weight": (64,), "scalar": (), "conv.weight": (3, 4, 5), "empty.weight": (5, 0)}.items():
        for kind, dtype in (("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)):
            tensors[f"{kind}.{name}"] = (kind, shape, np.array(rng.standard_normal(shape)).astype(dtype).tobytes())
    save_stored(tmp_path / "model/model.safetensors", tensors)
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    after = stored(tmp_path / "export")
    for kind, dtype in (("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)):
        for name, (_, shape, data) in tensors.items():
            if name.startswith(kind):
                assert after[name] == ("BF16", shape, np.frombuffer(data, dtype).astype(BF16).tobytes())


@pytest.mark.parametrize("shape", [(8, 8), (8,)])
def test_fp8_that_lacks_its_scale_is_not_exported(shape: tuple[int, ...], tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 24]}}
    make_encoded(tmp_path / "model", "fp8_block", config)
    alone = {"lm_head.weight": ("F8_E4M3", shape, bytes(int(np.prod(shape))))}
    save_stored(tmp_path / "model/model.safetensors", stored(tmp_path / "model") | alone)
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    with pytest.raises(UnknownFormat, match=r"lm_head.weight: FP8 without its scale"):
        export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    assert not (tmp_path / "export").exists()


def test_plain_tensors_that_are_only_named_like_quantised_ones_are_copied(tmp_path: Path) -> None:
    extra: dict[str, NDArray[Any]] = {
        "vision.norm.weight": np.ones(4, np.float32),
        "vision.norm.scale": np.ones(4, np.float32),
        "vision.position_ids": np.arange(4, dtype=np.int32),
        "vision.mask": np.ones((1, 4), np.uint8),
    }
    make_model(tmp_path / "model", extra=extra)
    write(tmp_path / "model", tmp_path / "overlay", 1)
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    before, after = stored(tmp_path / "model"), stored(tmp_path / "export")
    assert {name: after[name] for name in extra} == {name: before[name] for name in extra}


def test_a_weight_of_integers_alone_is_not_exported(tmp_path: Path) -> None:
    make_model(tmp_path / "model", extra={"model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.int8)})
    write(tmp_path / "model", tmp_path / "overlay", 1)
    with pytest.raises(UnknownFormat, match=r"q_proj.weight.*I8"):
        export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)


@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
def test_an_empty_word_on_quantisation_is_none(where: str, tmp_path: Path) -> None:
    """What the experts are read by, the export is made by."""
    said: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    inner = {"model_type": "olmoe", "num_experts": 2, "num_hidden_layers": 2}
    config: dict[str, Any] = {
        "quantization_config": {},
        "text_config": {**inner, "quantization_config": {}, "quantization": said},
    }
    if where == "quantization_config":
        config = {"quantization_config": {}, "quantization": said}
    truth = make_encoded(tmp_path / "model", "fp8_block", config)
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    name = "model.layers.0.self_attn.q_proj"
    _, shape, data = stored(tmp_path / "export")[f"{name}.weight"]
    found = np.frombuffer(data, BF16).reshape(shape).astype(np.float32)
    np.testing.assert_array_equal(found, round_bf16(truth[name]))


@pytest.mark.parametrize("name", ["fp8_block_modelopt", "gptq_4"])
def test_an_overlay_keeps_what_a_file_beside_the_config_says_of_quantisation(name: str, tmp_path: Path) -> None:
    truth = make_encoded(tmp_path / "model", name, {})
    said = ENCODERS[name][0](np.ones((32, 64), np.float32), np.random.default_rng(0)).quantization
    side = {"quantization": said} if name.startswith("fp8") else said
    file = "hf_quant_config.json" if name.startswith("fp8") else "quantize_config.json"
    (tmp_path / "model" / file).write_text(json.dumps(side))
    overlay_second(tmp_path / "model", tmp_path / "overlay")
    assert json.loads((tmp_path / "overlay/config.json").read_text())["quantization_config"].items() >= said.items()
    assert not (tmp_path / "overlay" / file).exists()
    export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    found = open_model(tmp_path / "export").layer(0)
    for role in ("gate", "up", "down"):
        matrix = truth[f"model.layers.0.mlp.experts.1.{role}_proj"]
        np.testing.assert_array_equal(found.matrices(1)[role], round_bf16(matrix))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mixtral", {}),
        ("olmoe", {}),
        ("qwen3_moe", {"rope_theta": 10000.0, "num_experts": 4}),
        ("granitemoe", {"rope_theta": 10000.0}),
    ],
)
def test_mlx_lm_loads_an_export(name: str, config: Mapping[str, Any], tmp_path: Path) -> None:
    """Not gpt_oss: MLX LM reads neither the original fixture nor what transformers writes of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlx_lm")
        import mlx.core as mx
        from mlx_lm.utils import load_model

        def logits(folder: Path) -> NDArray[np.float32]:
            model, _ = load_model(folder, strict=True, model_config=dict(config))
            model.set_dtype(mx.float32)  # its bf16 products need a GPU
            return np.array(model(mx.array([[1, 5, 2, 7, 3]])))

        write(FIXTURES / name, tmp_path / "overlay")
        export_overlay(tmp_path / "overlay", tmp_path / "export", resources=Resources.current(), progress=quiet)
        assert relative_error(logits(tmp_path / "export"), logits(FIXTURES / name)) < 0.02


@pytest.mark.parametrize(
    "layout", [row for row in load_table() if row.kind == "routed"], ids=lambda layout: layout.name
)
def test_stored_rows_undo_the_cut(layout: Any) -> None:
    """Every number is in its place: with rows from a fixture of that layout."""
    names = [
        name for name in WITH_ORACLE if open_model(FIXTURES / name).family == layout.name and name not in QUANTISED
    ]
    for name in names:
        experts = open_model(FIXTURES / name)
        layer = experts.layer(experts.layers[-1])
        for tensor in layer.tensors:
            data = stored(FIXTURES / name)
            for expert in range(layer.count):
                dtype = BF16 if STORAGE[name] == "bf16" else np.float32
                rows = stored_rows(tensor.spec, layer.matrices(expert)).astype(dtype)
                prefix, template = tensor.place
                whole = data[f"{prefix}.{template}".replace("{expert}", str(expert))][2]
                start = expert * rows.nbytes if tensor.spec.axes.stacked else 0
                assert whole[start : start + rows.nbytes] == rows.tobytes()
    quantised_only = (
        "gpt_oss",
        "gpt_oss_original",
        "gpt_oss_per_expert",
        "gguf",
        "gguf_fused",
        "gguf_per_expert",
        "gguf_up_down",
    )
    assert names or layout.name in (*quantised_only, "fc1_fc3_fc2", "switch", "nllb")  # and in stacks


def test_split_name() -> None:
    assert split_name("a.layers.3.mlp.experts.12.w1.weight") == ("a.layers.3", "mlp.experts.{expert}.w1.weight")
    assert split_name("transformer.blocks.0.ffn.experts.mlp.w1") == ("transformer.blocks.0", "ffn.experts.mlp.w1")
    with pytest.raises(ValueError, match="no layer"):
        split_name("lm_head.weight")


# ---------------------------------------------------------------------------------------------------------------------
# Broken overlays


def edit_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def facts(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["overlay_config"].update(changes))


def cut_short(folder: Path) -> None:
    os.truncate(max(folder.glob("*.safetensors")), 5000)


def rename_base(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b"overlay.up.base", b"overlay.up.bass"))


RANKS = {"gate": 2, "up": 2, "down": 2}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="no folder"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="no config"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="no JSON"),
        pytest.param(lambda folder: max(folder.glob("*.safetensors")).unlink(), id="a shard is missing"),
        pytest.param(cut_short, id="a shard is cut short"),
        pytest.param(rename_base, id="a tensor is missing"),
        pytest.param(edit_config(lambda config: config.pop("overlay_config")), id="no overlay"),
        pytest.param(facts(version=2), id="another version"),
        pytest.param(facts(family="x"), id="unknown family"),
        pytest.param(facts(layers={}), id="no layers"),
        pytest.param(facts(layers=None), id="layers are none"),
        pytest.param(facts(layers={"0": RANKS}), id="a layer too few"),
        pytest.param(facts(layers={"0": RANKS, "1": RANKS, "2": RANKS}), id="a layer too many"),
        pytest.param(facts(layers={"0": RANKS, "1": {**RANKS, "up": 3}}), id="another rank"),
        pytest.param(facts(layers={"0": RANKS, "1": {**RANKS, "up": -1}}), id="a negative rank"),
        pytest.param(facts(layers={"0": RANKS, "1": {"up": 2, "down": 2}}), id="no gate"),
        pytest.param(facts(layers={"0": RANKS, "x": RANKS}), id="a layer that is none"),
        pytest.param(facts(names=None), id="no names"),
        pytest.param(facts(names={"gate": "a", "up": "b", "down": "c"}), id="names without a number"),
    ],
)
def test_a_broken_overlay_is_one_line(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "overlay"
    write(FIXTURES / "olmoe", folder, 2)
    damage(folder)
    with pytest.raises((ModelUnreadable, UnknownFormat)) as caught:
        export_overlay(folder, tmp_path / "export", resources=Resources.current(), progress=quiet)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("export*"))


def test_what_an_overlay_has_not_got(tmp_path: Path) -> None:
    overlay = write(FIXTURES / "olmoe", tmp_path / "overlay", 2)
    for call in (overlay.expert, overlay.base, overlay.factors):
        with pytest.raises(InvalidRequest, match="layer 7"):
            call(7, *{overlay.expert: (0,), overlay.base: ("up",)}.get(call, ("up", 0)))
    with pytest.raises(InvalidRequest, match="expert 5"):
        overlay.factors(0, "up", 5)


# ---------------------------------------------------------------------------------------------------------------------
# Requests that are refused


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({}, "for any layer"),
        ({5: RANKS}, "layer 5 is not"),
        ({0: {"gate": 1, "up": 1}}, "needs ranks for"),
        ({0: {**RANKS, "router": 1}}, "needs ranks for"),
        ({0: {**RANKS, "up": 17}}, "0 to 16"),
        ({0: {**RANKS, "up": -1}}, "0 to 16"),
        ({0: {**RANKS, "up": 1.5}}, "0 to 16"),
    ],
)
def test_ranks_that_do_not_fit(ranks: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        write_overlay(
            open_model(FIXTURES / "olmoe"), ranks, tmp_path / "overlay", resources=Resources.current(), progress=quiet
        )
    assert not list(tmp_path.iterdir())


def test_multi_token_prediction_layers_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="layer 2 is not"):
        write_overlay(
            open_model(FIXTURES / "deepseek_v3_fp8"),
            {2: RANKS},
            tmp_path / "overlay",
            resources=Resources.current(),
            progress=quiet,
        )


def test_an_overlay_of_an_overlay_is_refused(tmp_path: Path) -> None:
    write_overlay(
        open_model(FIXTURES / "olmoe"), {0: RANKS}, tmp_path / "overlay", resources=Resources.current(), progress=quiet
    )
    with pytest.raises(InvalidRequest, match="already"):
        write_overlay(
            open_model(tmp_path / "overlay"),
            {1: RANKS},
            tmp_path / "again",
            resources=Resources.current(),
            progress=quiet,
        )


def test_an_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = tmp_path / "overlay"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match="already"):
        write(FIXTURES / "olmoe", folder)
    assert content(folder) == {"precious.txt": b"mine"}
    write(FIXTURES / "olmoe", folder, force=True)
    assert "precious.txt" not in content(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"overlay"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidRequest, match="already"):
        write(FIXTURES / "olmoe", tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def link_folder(partial: Path, mine: Path) -> None:
    partial.symlink_to(mine)


def link_temporary(partial: Path, mine: Path) -> None:
    partial.mkdir()
    (partial / "plan.json.tmp").symlink_to(mine / "precious.txt")


def link_shard(partial: Path, mine: Path) -> None:
    stopped_half_way(mine.with_name("model"), partial.with_suffix(""))
    shard = min(partial.glob("*.safetensors"))
    shard.rename(mine / "shard")
    shard.symlink_to(mine / "shard")


def pipe_plan(partial: Path, mine: Path) -> None:
    partial.mkdir()
    os.mkfifo(partial / "plan.json")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("prepare", [link_folder, link_temporary, link_shard, pipe_plan])
def test_unfinished_work_that_leads_elsewhere_is_refused(
    prepare: Callable[[Path, Path], None], force: bool, tmp_path: Path
) -> None:
    """Nothing is written, deleted or read where it leads."""
    make_model(tmp_path / "model")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    prepare(tmp_path / "folder.partial", mine)
    before = content(mine)
    with pytest.raises(InvalidRequest, match=r"folder\.partial"):
        write(tmp_path / "model", tmp_path / "folder", 4, force=force)
    assert content(mine) == before
    assert not (tmp_path / "folder").exists()


def test_a_temporary_file_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    """It may have another name elsewhere."""
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "precious.txt").write_text("mine")
    os.link(tmp_path / "precious.txt", tmp_path / "folder.partial/plan.json.tmp")
    write(FIXTURES / "olmoe", tmp_path / "folder")
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["model", "model/inside", "", "link", "link/inside"])
def test_the_models_own_folder_is_never_touched(place: str, tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    shutil.copytree(FIXTURES / "olmoe", model)
    (model.parent / "link").symlink_to(model)
    before = content(model)
    for force in (False, True):
        with pytest.raises(InvalidRequest, match="own folder"):
            write(model, model.parent / place, force=force)
    assert content(model) == before
    # nor is a model that has the name of unfinished work
    model.rename(model.with_name("x.partial"))
    with pytest.raises(InvalidRequest, match="own folder"):
        write(model.with_name("x.partial"), model.with_name("x"), force=True)
    assert content(model.with_name("x.partial")) == before


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", spoil=True)
    with pytest.raises(ModelUnreadable, match=r"layer 1: .*up projection holds NaN"):
        write(tmp_path / "model", tmp_path / "overlay", 1)
    assert not (tmp_path / "overlay").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


def make_model(
    folder: Path,
    layers: int = 3,
    experts: int = 6,
    intermediate: int = 96,
    hidden: int = 64,
    extra: Mapping[str, NDArray[Any]] | None = None,
    spoil: bool = False,
) -> None:
    """A model of random numbers in the layout of OLMoE, a shard per layer, written by the safetensors library."""
    folder.mkdir()
    places: dict[str, str] = {}
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    rng = np.random.default_rng(0)
    for layer in range(layers):
        tensors: dict[str, NDArray[Any]] = {}
        for expert in range(experts):
            for leaf, shape in shapes.items():
                values = (rng.random(shape, np.float32) - np.float32(0.5)).astype(BF16)
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"] = values
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = rng.standard_normal((experts, hidden)).astype(BF16)
        if spoil and layer == 1:
            tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = np.nan
        if layer == 0:
            tensors |= {"lm_head.weight": rng.standard_normal((50, hidden)), **(extra or {})}
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "olmoe", "num_experts": experts, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


WORK = """
import os, sys
from chuk_lazarus.introspection.moe.errors import MoEError
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.overlays.checkpoint.export import export_overlay
from chuk_lazarus.introspection.moe.overlays.checkpoint.writer import write_overlay
from chuk_lazarus.introspection.moe.weights.experts import Experts
from pathlib import Path
import scipy.linalg, threadpoolctl

def ignore(what, done, total): pass

def work(what, model, folder, rank):
    if what == "export":
        return export_overlay(model, folder, resources=Resources.current(), progress=ignore)
    experts = Experts.open(str(model))
    ranks = {layer: {"gate": rank, "up": rank, "down": rank} for layer in experts.layers}
    write_overlay(experts, ranks, folder, resources=Resources.current(), progress=ignore)

arguments = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
"""
ONCE = """
try:
    work(*arguments)
except MoEError as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""
AS_ASKED = """
for line in sys.stdin:  # a fork for each line: all that it needs is imported already
    child = os.fork()
    if not child:
        work(*arguments)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def command(code: str, model: Path, folder: Path, rank: int = 8, what: str = "write") -> list[str]:
    return [sys.executable, "-c", WORK + code, what, str(model), str(folder), str(rank)]


def run(code: str, *arguments: Any) -> tuple[int, str]:
    """The exit code of a process that writes, and what it printed."""
    done = subprocess.run(command(code, *arguments), stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.long
@pytest.mark.parametrize(("what", "kills"), [("write", 20), ("export", 5)])
def test_killed_and_resumed_it_ends_with_the_same_bytes(what: str, kills: int, tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "folder"
    make_model(model, layers=4, experts=8, intermediate=320, hidden=192)
    if what == "export":
        model = tmp_path / "overlay"
        write(tmp_path / "model", model, 8)
    assert run(ONCE, model, tmp_path / "whole", 8, what)[0] == 0
    expected, chance = content(tmp_path / "whole"), random.Random(7)
    killed, kept, seconds = 0, set(), 0.0
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    calm = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command(AS_ASKED, model, folder, 8, what), env=calm, **pipes) as process:
        assert process.stdin
        assert process.stdout
        while killed < kills or not folder.exists():
            if folder.exists():
                shutil.rmtree(folder)
            began = time.monotonic()
            process.stdin.write("go\n")
            child = int(process.stdout.readline())
            if killed < kills and seconds:  # the first one tells how long it takes
                time.sleep(chance.uniform(0, seconds))
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            status = int(process.stdout.readline())
            assert status in (0, signal.SIGKILL)
            seconds = seconds or time.monotonic() - began
            killed += status == signal.SIGKILL
            kept.add(len(list(folder.with_name("folder.partial").glob("*.safetensors"))))
            assert folder.exists() or status
            if folder.exists():
                assert content(folder) == expected, "a folder with the final name is whole"
                assert not folder.with_name("folder.partial").exists()
        process.stdin.close()
    assert content(folder) == expected
    assert what == "export" or max(kept) > 0, "some runs were stopped with part of the work done"


class Killed(BaseException):
    """The end of the process, as far as the code can tell."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the given one of the steps that change a folder on, nothing works any more."""
    count = [0]

    def die_in(module: Any, name: str) -> None:
        original = getattr(module, name)

        def changed(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] > step:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(module, name, changed)

    for name in ("rename", "unlink", "mkdir"):
        die_in(Path, name)
    for name in ("fsync", "ftruncate", "pwrite"):
        die_in(os, name)
    die_in(shutil, "rmtree")
    return count


@pytest.mark.long
@pytest.mark.parametrize("force", [False, True])
def test_a_stop_between_any_two_steps_does_no_harm(force: bool, tmp_path: Path) -> None:
    model, folder = FIXTURES / "llama4_text", tmp_path / "folder"
    with pytest.MonkeyPatch.context() as patch:
        steps = stop_at(1000, patch)
        write(model, tmp_path / "whole", 4)
    expected, old = content(tmp_path / "whole"), {"old.txt": b"old"}
    assert steps[0] > 30
    for step in range(steps[0] - 6 if force else 0, steps[0] + 10):
        if force:
            folder.mkdir()
            (folder / "old.txt").write_bytes(b"old")
        stopped = False
        with pytest.MonkeyPatch.context() as patch:
            stop_at(step, patch)
            try:
                write(model, folder, 4, force=force)
            except Killed:
                stopped = True
        assert not folder.exists() or content(folder) == expected or (force and content(folder) == old)
        if force and not folder.exists():
            assert content(tmp_path / "folder.replaced") == old
        if not folder.exists() or force:
            write(model, folder, 4, force=force)
        assert content(folder) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "folder"}
        shutil.rmtree(folder)
    assert not stopped, "the last one had all the steps that it wants"


def test_finished_shards_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = tmp_path / "model", tmp_path / "folder"
    make_model(model)
    write(model, tmp_path / "whole", 4)
    expected = content(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(30, patch)
        with pytest.raises(Killed):
            write(model, folder, 4)
    partial = tmp_path / "folder.partial"
    shards = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert 0 < len(shards) < 4
    first = min(shards)
    os.truncate(partial / first, 100)
    write(model, folder, 4)
    assert content(folder) == expected
    assert {name: (folder / name).stat().st_mtime_ns for name in shards if name != first} == {
        name: when for name, when in shards.items() if name != first
    }


def stopped_half_way(model: Path, folder: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(30, patch)
        with pytest.raises(Killed):
            write(model, folder, 4)
    found = content(folder.with_name(f"{folder.name}.partial"))
    assert any(name.endswith(".safetensors") for name in found)
    return found


def test_ranks_of_unfinished_work_are_found_by_way_of_a_link(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "link").symlink_to("folder")
    stopped_half_way(tmp_path / "model", tmp_path / "folder")
    ranks = planned_ranks(open_model(tmp_path / "model"), tmp_path / "link", "")
    assert ranks == dict.fromkeys(range(3), dict.fromkeys(("gate", "up", "down"), 4))


@pytest.mark.parametrize("other", ["ranks", "model", "changed", "export", "nobody's"])
def test_other_unfinished_work_is_refused(other: str, tmp_path: Path) -> None:
    model, folder, partial = tmp_path / "model", tmp_path / "folder", tmp_path / "folder.partial"
    make_model(model)
    make_model(tmp_path / "second")
    write(model, tmp_path / "overlay", 5)
    left = stopped_half_way(model, folder)
    if other == "changed":
        os.utime(model / "model-00002-of-00003.safetensors", ns=(0, 0))
    if other == "nobody's":
        (partial / "plan.json").unlink()
        left = content(partial)

    def again(force: bool) -> None:
        if other == "export":
            export_overlay(tmp_path / "overlay", folder, force=force, resources=Resources.current(), progress=quiet)
        else:
            write(tmp_path / "second" if other == "model" else model, folder, 5 if other == "ranks" else 4, force=force)

    with pytest.raises(InvalidRequest, match="unfinished"):
        again(False)
    assert content(partial) == left
    again(True)
    assert not partial.exists()
    assert (folder / "config.json").exists()


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "folder"
    (tmp_path / "folder.partial").mkdir()
    descriptor = os.open(tmp_path / "folder.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(InvalidRequest, match="another process"):
            write(FIXTURES / "olmoe", folder)
    finally:
        os.close(descriptor)
    write(FIXTURES / "olmoe", folder)


# ---------------------------------------------------------------------------------------------------------------------
# Disks and memory


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(InvalidRequest, match=r"needs [\d,]+ bytes, but only 20,000 are free"):
        write(FIXTURES / "olmoe", tmp_path / "overlay")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_disk_that_fills_up_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "folder"
    make_model(model)
    write(model, tmp_path / "whole", 8)
    largest = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, {largest - 1}))\n"
    code, output = run(limit + ONCE, model, folder)
    (line,) = output.splitlines()
    assert code == 3
    assert line.startswith("InvalidRequest can't write ")
    assert "run the same command again to continue" in line
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "folder.partial"}
    assert not [name for name in content(tmp_path / "folder.partial") if name.endswith(".tmp")]
    assert run(ONCE, model, folder)[0] == 0
    assert content(folder) == content(tmp_path / "whole")


def test_no_space_left_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, original = [0], os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 100_000:
            raise OSError(28, "No space left on device")
        return original(descriptor, memoryview(data)[:1000], offset)  # and a disk may take a part only

    make_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(InvalidRequest, match="No space left on device") as caught:
            write(tmp_path / "model", tmp_path / "folder", 4)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "folder.partial"}
    write(tmp_path / "model", tmp_path / "folder", 4)


@pytest.mark.parametrize("place", ["file/inside", "x" * 300, "a\0b", "/", "readonly/inside"])
def test_a_target_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "readonly").mkdir(mode=0o500)
    target = tmp_path / place
    if place.startswith("readonly") and os.geteuid() == 0:  # root may write anywhere but where the system takes nothing
        target = Path("/proc/self/inside")
    with pytest.raises(InvalidRequest) as caught:
        write(FIXTURES / "olmoe", target)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "readonly"}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A layer of 315 MB of experts is overlaid, and exported, with less than 100 MB more than the imports take."""
    model = tmp_path / "model"
    make_model(model, layers=1, experts=200, intermediate=256, hidden=1024)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert size > 300_000_000
    peak = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    code = f"start = {peak}\nwork(*arguments)\nprint({peak} - start)"
    for source, target, what in ((model, "overlay", "write"), (tmp_path / "overlay", "export", "export")):
        grown = int(run(code, source, tmp_path / target, 2, what)[1])
        assert grown < 100_000, f"{grown} kB"
