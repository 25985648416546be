"""GGUF files, written and read back by the gguf package: every type, every part of the header, and what is hostile."""

import contextlib
import itertools
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from huggingface_hub import hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe.errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.codecs import Part, recognise
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.gguf import PIECE, read_header
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from chuk_lazarus.introspection.moe.weights.stored import open_stored, read_rows
from hub_server import HubServer

Array = NDArray[Any]
Type = GGMLQuantizationType
Capture = pytest.CaptureFixture[str]

ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]
TYPES = {kind.name: kind for kind in Type}
NOT_DECODED = ("Q8_1", "Q8_K", "Q1_0")
BLOCKS = [name for name, kind in TYPES.items() if GGML_QUANT_SIZES[kind][0] > 1 and name not in NOT_DECODED]
FLOATS = ("F32", "F16", "BF16")
EXPERTS, WIDE, HIDDEN = 3, 256, 512
_numbers = itertools.count()


def encode(values: NDArray[np.float32], kind: Type, seed: int = 0) -> Array:
    """The values in a type; bytes at random where the package does not encode it."""
    try:
        encoded: Array = gguf.quants.quantize(values, kind)
        return encoded
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        shape = (*values.shape[:-1], values.shape[-1] // block * size)
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path: Path,
    tensors: dict[str, tuple[Array, Type]],
    arch: str = "mixtral",
    facts: dict[str, int] | None = None,
    **how: Any,
) -> Path:
    """A GGUF file of encoded tensors, by the package's own writer, which is given what else to know as `how`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch, **how)
    for key, value in (facts or {}).items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def oracle(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor as the package reads and decodes it."""
    with np.errstate(all="ignore"):
        return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def moe(kind: str = "Q8_0", down: str | None = None, layers: int = 2) -> dict[str, tuple[Array, Type]]:
    """The tensors of a small Mixture of Experts."""
    tensors: dict[str, tuple[Array, Type]] = {}
    for layer in range(layers):
        block = f"blk.{layer}"
        tensors[f"{block}.ffn_norm.weight"] = (np.ones(HIDDEN, np.float32), Type.F32)
        tensors[f"{block}.ffn_gate_inp.weight"] = (numbers(EXPERTS, HIDDEN, seed=layer), Type.F32)
        for role, shape, name in (
            ("gate", (EXPERTS, WIDE, HIDDEN), kind),
            ("up", (EXPERTS, WIDE, HIDDEN), kind),
            ("down", (EXPERTS, HIDDEN, WIDE), down or kind),
        ):
            values = numbers(*shape, seed=len(tensors))
            tensors[f"{block}.ffn_{role}_exps.weight"] = (encode(values, TYPES[name]), TYPES[name])
    return tensors


FACTS = {"block_count": 2, "expert_count": EXPERTS, "expert_used_count": 2, "embedding_length": HIDDEN}


def open_file(model: Path | str) -> Checkpoint:
    return Checkpoint(find_repository(str(model)))


def decode(checkpoint: Checkpoint, name: str, start: int, stop: int, index: int = 0, scale: str = "") -> Array:
    """Decoded rows of one matrix of a tensor, and the bytes that this took, checked to be no more than they occupy."""
    parts = {"weight": name} | ({"scale": scale} if scale else {})
    infos, stored = open_stored(checkpoint, parts, checkpoint.config["quantization_config"])
    before = checkpoint.bytes_read
    rows = stored.shape[-2]
    values = read_rows(checkpoint, infos, stored, rows, start, stop, index)
    info = infos["weight"]
    assert checkpoint.bytes_read - before <= info.nbytes * (stop - start) // np.prod(info.shape[:-1]) + 4
    return values


# Types


@pytest.mark.parametrize("kind", [*BLOCKS, *FLOATS])
def test_every_type_is_decoded_as_the_package_does(tmp_path: Path, kind: str) -> None:
    block = max(32, GGML_QUANT_SIZES[TYPES[kind]][0])
    shapes = {"matrix": (70, 3 * block), "stacked": (3, 21, 2 * block), "one": (1, block)}
    tensors = {f"{name}.weight": (encode(numbers(*shape), TYPES[kind]), TYPES[kind]) for name, shape in shapes.items()}
    path = write(tmp_path / "m.gguf", tensors)
    checkpoint, expected = open_file(path), oracle(path)
    for name, shape in shapes.items():
        info = checkpoint.info(f"{name}.weight")
        assert (info.dtype, info.shape) == (kind, shape)
        data = path.read_bytes()[info.start : info.stop]
        assert data == np.ascontiguousarray(tensors[info.name][0]).tobytes()
        matrices = expected[info.name].reshape(-1, *shape[-2:])
        for index, matrix in enumerate(matrices):
            rows = len(matrix)
            for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2 + 1)):
                decoded = decode(checkpoint, info.name, start, stop, index)
                assert decoded.dtype == np.float32
                np.testing.assert_array_equal(decoded, matrix[start:stop])


@pytest.mark.parametrize("kind", NOT_DECODED)
def test_a_type_that_the_package_does_not_decode_is_named(tmp_path: Path, kind: str) -> None:
    block, size = GGML_QUANT_SIZES[TYPES[kind]]
    path = write(tmp_path / "m.gguf", {"x.weight": (np.zeros((4, size), np.uint8), TYPES[kind])})
    checkpoint = open_file(path)
    assert checkpoint.info("x.weight").shape == (4, block)
    with pytest.raises(UnknownFormat, match=rf"x\.weight.*{kind}"):
        decode(checkpoint, "x.weight", 0, 4)


@pytest.mark.parametrize("kind", ["I8", "I16", "I32", "I64", "F64"])
def test_plain_numbers(tmp_path: Path, kind: str) -> None:
    values = np.arange(-3, 5).reshape(2, 4).astype({"F": "f", "I": "i"}[kind[0]] + str(int(kind[1:]) // 8))
    checkpoint = open_file(write(tmp_path / "m.gguf", {"x": (values, TYPES[kind])}))
    np.testing.assert_array_equal(checkpoint.whole(checkpoint.info("x")), values)
    np.testing.assert_array_equal(checkpoint.rows(checkpoint.info("x"), 1, 2), values[1:])


@pytest.mark.parametrize("scale", [numbers(3), numbers(1), np.float32(0.25)])
def test_nvfp4_is_multiplied_by_its_second_scale(tmp_path: Path, scale: Array) -> None:
    scale = np.asarray(scale)
    tensors = {
        "x.weight": (encode(numbers(3, 5, 128), Type.NVFP4), Type.NVFP4),
        "x.scale": (scale, Type.F32),
    }
    path = write(tmp_path / "m.gguf", tensors)
    checkpoint, expected = open_file(path), oracle(path)["x.weight"]
    for expert, one in enumerate(np.broadcast_to(scale, 3)):
        decoded = decode(checkpoint, "x.weight", 1, 4, expert, "x.scale")
        np.testing.assert_array_equal(decoded, expected[expert, 1:4] * one)


def test_nvfp4_whose_scales_are_of_another_number_is_refused() -> None:
    parts = {"weight": Part("NVFP4", (3, 5, 128)), "weight_scale": Part("F32", (4,))}
    with pytest.raises(ModelUnreadable, match=r"\[3, 5, 128\].*\[4\]"):
        recognise(parts, {})


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_scale_beside_another_type_is_not_the_matrix_s(tmp_path: Path, kind: str) -> None:
    tensors = {"x.weight": (encode(numbers(3, 5, 64), TYPES[kind]), TYPES[kind]), "x.scale": (numbers(3), Type.F32)}
    path = write(tmp_path / "m.gguf", tensors)
    np.testing.assert_array_equal(decode(open_file(path), "x.weight", 0, 5, 2, "x.scale"), oracle(path)["x.weight"][2])


def test_outside_of_gguf_a_scale_beside_plain_numbers_is_not_passed_over() -> None:
    with pytest.raises(UnknownFormat):
        recognise({"weight": Part("F16", (3, 5, 64)), "weight_scale": Part("F32", (3,))}, {})


# The header


def test_the_config_says_what_the_metadata_says(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek2")
    writer.add_block_count(5)
    writer.add_nextn_predict_layers(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_expert_feed_forward_length(32)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_shared_count(1)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    finish(writer)
    (tmp_path / "config.json").write_text("{")  # it may be anyone's
    for model in (tmp_path, tmp_path / "m.gguf"):
        assert open_file(model).config == {
            "quantization_config": {"quant_method": "gguf"},
            "model_type": "deepseek2",
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
        }


def test_every_kind_of_metadata_is_read_but_for_long_arrays(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, Any] = {}
    for name, value in {
        "uint8": 200, "int8": -5, "uint16": 60_000, "int16": -7, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "ä\n",
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(f"a.{name}", value)
        values[f"a.{name}"] = value
    for name, array in {
        "ints": [1, 2, 3],
        "floats": [0.5, 1.5],
        "strings": ["a", "", "ß"],
        "bools": [True, False],
    }.items():
        writer.add_array(f"b.{name}", array)
        values[f"b.{name}"] = array
    writer.add_array("c.tokens", [f"token {number}" for number in range(5000)])
    writer.add_array("c.scores", [0.5] * 5000)
    writer.add_string("c.text", "x" * 100_000)
    writer.add_uint32("d.last", 1)
    writer.add_tensor("x", numbers(3, 2))
    finish(writer)
    data = (tmp_path / "m.gguf").read_bytes()
    metadata, tensors = read_header("m.gguf", Memory(data))
    assert metadata == {"general.architecture": "llama", **values, "d.last": 1}
    assert data[tensors["x"].start : tensors["x"].stop] == numbers(3, 2).tobytes()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    tensors = {"a": (numbers(3, 5), Type.F32), "b": (numbers(7), Type.F32)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    checkpoint = open_file(tmp_path / "m.gguf")
    for name, (data, _) in tensors.items():
        np.testing.assert_array_equal(checkpoint.whole(checkpoint.info(name)), data)


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([f"token{number}" for number in range(150_000)])
    writer.add_token_merges([f"to ken{number}" for number in range(150_000)])
    writer.add_tensor("x", numbers(2000, 2000))
    finish(writer)
    open_file(tmp_path / "m.gguf")  # imports the package
    start = time.process_time()
    checkpoint = open_file(tmp_path / "m.gguf")
    assert time.process_time() - start < 1
    assert checkpoint.bytes_read <= checkpoint.info("x").start + PIECE


# Models


@pytest.mark.parametrize(("kind", "down"), [("Q4_K", "Q6_K"), ("BF16", None), ("MXFP4", None), ("Q8_0", "Q4_1")])
def test_the_experts_of_a_model(tmp_path: Path, capsys: Capture, kind: str, down: str | None) -> None:
    path = write(tmp_path / "m.gguf", moe(kind, down), "qwen3moe", FACTS)
    experts, expected = Experts.open(str(path)), oracle(path)
    assert (experts.model_type, experts.layers, experts.top_k) == ("qwen3moe", (0, 1), 2)
    for number in experts.layers:
        layer = experts.layer(number)
        assert layer.sizes == {"E": EXPERTS, "I": WIDE, "H": HIDDEN}
        for expert in range(EXPERTS):
            for role, matrix in layer.matrices(expert).items():
                np.testing.assert_array_equal(matrix, expected[f"blk.{number}.ffn_{role}_exps.weight"][expert])
    if kind == "Q8_0":
        assert run([*ANALYZE, "-m", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model_type"] == "qwen3moe"


def test_types_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    tensors = moe("Q8_0")
    name = "blk.1.ffn_down_exps.weight"
    tensors[name] = (encode(numbers(EXPERTS, HIDDEN, WIDE), Type.Q4_0), Type.Q4_0)
    path = write(tmp_path / "m.gguf", tensors, facts=FACTS)
    experts = Experts.open(str(path))
    assert [experts.layer(number).storage for number in experts.layers] == ["Q8_0", "Q8_0+Q4_0"]
    np.testing.assert_array_equal(experts.layer(1).matrices(2)["down"], oracle(path)[name][2])


def split(folder: Path, name: str = "m", **how: Any) -> list[Path]:
    """A model in several parts."""
    write(folder / f"{name}.gguf", moe(), facts=FACTS, split_max_tensors=4, **how)
    return sorted(folder.glob(f"{name}-*.gguf"))


@pytest.mark.parametrize("first_is_small", [False, True])
def test_a_split_file_is_read_whole(tmp_path: Path, first_is_small: bool) -> None:
    parts = split(tmp_path, small_first_shard=first_is_small)
    assert len(parts) >= 3
    expected: dict[str, Array] = {}
    for part in parts:
        expected |= oracle(part)
    for model in (tmp_path, parts[0], parts[-1]):
        checkpoint = open_file(model)
        assert set(checkpoint.names) == set(expected)
        assert Experts(checkpoint).layers == (0, 1)
        name = "blk.1.ffn_down_exps.weight"
        np.testing.assert_array_equal(decode(checkpoint, name, 3, 90, 1), expected[name][1, 3:90])


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    for model in (tmp_path, parts[0]):
        with pytest.raises(ModelUnreadable, match=f"{parts[1].name} is missing"):
            open_file(model)


def test_a_part_under_another_name_is_not_taken_for_the_model(tmp_path: Path) -> None:
    parts = split(tmp_path)
    with pytest.raises(ModelUnreadable, match=f"one of {len(parts)} parts"):
        open_file(parts[0].rename(tmp_path / "renamed.gguf"))


def test_parts_of_two_models_are_not_put_together(tmp_path: Path) -> None:
    one, other = split(tmp_path / "a"), split(tmp_path / "b", "n")
    one[1].write_bytes(other[0].read_bytes())
    with pytest.raises(ModelUnreadable, match="again"):
        open_file(tmp_path / "a")


def test_several_quantisations_are_listed(tmp_path: Path, capsys: Capture) -> None:
    for kind in ("Q8_0", "Q4_0"):
        write(tmp_path / f"m-{kind}.gguf", moe(kind), facts=FACTS)
    split(tmp_path, "m-F16")
    with pytest.raises(InvalidRequest, match=r"3 GGUF models: m-F16-00001-of-00003\.gguf, m-Q4_0\.gguf, m-Q8_0\.gguf"):
        open_file(tmp_path)
    assert run([*ANALYZE, "-m", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert open_file(tmp_path / "m-Q4_0.gguf").info("blk.0.ffn_up_exps.weight").dtype == "Q4_0"


@pytest.mark.parametrize(
    "beside", ["mmproj-F16.gguf", "m-mmproj-f16.gguf", "imatrix.gguf", "m.imatrix.gguf", "imatrix_unsloth.gguf"]
)
def test_what_lies_beside_a_model_is_not_it(tmp_path: Path, beside: str) -> None:
    write(tmp_path / "m-i1-imatrix-Q8_0.gguf", moe(), facts=FACTS)
    (tmp_path / beside).write_bytes(b"anything")
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert open_file(tmp_path).config["num_experts"] == EXPERTS


def test_a_projector_by_itself_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "mmproj-F16.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.x", numbers(2, 2))
    finish(writer)
    with pytest.raises(ModelUnreadable, match="mmproj"):
        open_file(path)


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    write(tmp_path / "m.gguf", moe(), facts=FACTS)
    assert open_file(tmp_path).names == ("x",)


# The Hub


@pytest.fixture
def repository(tmp_path: Path, hub: HubServer, cache: Path) -> str:
    """A model in three quantisations on the Hub, one of them split and in a folder of its own."""
    write(tmp_path / "hub/m-Q8_0.gguf", moe("Q8_0"), facts=FACTS)
    write(tmp_path / "hub/m-Q4_0.gguf", moe("Q4_0"), facts=FACTS)
    split(tmp_path / "hub/Q5")
    (tmp_path / "hub/config.json").write_text("{}")
    name = f"tests/gguf-{next(_numbers)}"
    hub.add(name, tmp_path / "hub", commit="d" * 40)
    return name


def test_a_file_of_the_hub_costs_its_header_and_what_is_read(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "hub/m.gguf", {"x.weight": (encode(numbers(16, 4096, 256), Type.Q8_0), Type.Q8_0)})
    name = f"tests/gguf-{next(_numbers)}"
    hub.add(name, tmp_path / "hub")
    checkpoint = open_file(name)
    assert hub.body_bytes(".gguf") == PIECE // 4
    assert len([request for request in hub.requests if (request.method, request.file) == ("GET", "m.gguf")]) == 1
    expected = oracle(path)["x.weight"]
    hub.clear_requests()
    np.testing.assert_array_equal(decode(checkpoint, "x.weight", 0, 4096, 9), expected[9])
    assert hub.body_bytes(".gguf") == checkpoint.info("x.weight").nbytes // 16
    assert len([request for request in hub.requests if request.method == "GET"]) == 1
    hub.clear_requests()
    np.testing.assert_array_equal(decode(open_file(name), "x.weight", 0, 4096, 9), expected[9])
    assert hub.body_bytes(".gguf") == 0


def test_several_quantisations_on_the_hub(repository: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"3 GGUF models: Q5/m-00001-of-00003\.gguf, m-Q4_0\.gguf, m"):
        open_file(repository)
    for file, kind, count in (("m-Q8_0", "Q8_0", 1), ("m-Q4_0", "Q4_0", 1), ("Q5/m-00002-of-00003", "Q8_0", 3)):
        for revision in ("", "@main", f"@{'d' * 40}"):
            checkpoint = open_file(f"{repository}/{file}.gguf{revision}")
            assert checkpoint.repository.revision == "d" * 40
            assert {checkpoint.info(name).dtype for name in checkpoint.names if "exps" in name} == {kind}
            assert len({checkpoint.info(name).file for name in checkpoint.names}) == count
    name = "blk.1.ffn_up_exps.weight"
    expected = oracle(tmp_path / "hub/Q5/m-00003-of-00003.gguf") | oracle(tmp_path / "hub/Q5/m-00002-of-00003.gguf")
    np.testing.assert_array_equal(
        decode(open_file(f"{repository}/Q5/m-00001-of-00003.gguf"), name, 5, 9), expected[name][0, 5:9]
    )


def test_a_file_that_the_hub_has_not_got_is_named_with_those_it_has(repository: str) -> None:
    with pytest.raises(ModelUnreadable, match=r"no file m-Q2_K\.gguf.*Q5/m-00001-of-00003\.gguf.*m-Q8_0\.gguf"):
        open_file(f"{repository}/m-Q2_K.gguf")


def test_a_downloaded_file_is_enough_offline(repository: str, hub: HubServer) -> None:
    hf_hub_download(repository, "m-Q8_0.gguf")
    hub.clear_requests()
    command = [sys.executable, "-m", "chuk_lazarus.cli", *ANALYZE, "--json", "-m", f"{repository}/m-Q8_0.gguf"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == "d" * 40
    assert hub.requests == []


# Files that are broken or hostile


class Memory:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= self.size
        return self.data[start:stop]


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(name: str = "x", shape: tuple[int, ...] = (32, 2), kind: int = Type.F32, offset: int = 0) -> bytes:
    """An entry of the tensors' table, with the shape in GGML's order."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def fact(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def container(
    facts: list[bytes] | None = None,
    entries: list[bytes] | None = None,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    facts, entries = facts or [], [entry()] if entries is None else entries
    tensors, keys = counts or (len(entries), len(facts))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join([*facts, *entries])
    return header + bytes(-len(header) % 32 + data)


U32, F32, STRING, ARRAY = 4, 6, 8, 9
HUGE = (2**31, 2**63, 2**64 - 1)


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "magic alone": b"GGUF",
    "another magic": b"GGML" + container()[4:],
    "html": b"<!doctype html>" + bytes(100),
    "cut before the counts": container()[:23],
    "cut in a fact": container([fact("a", STRING, text("b" * 100))])[:60],
    "cut in an entry": container()[:50],
    "cut in the data": container(data=100),
    **{f"{count} tensors": container(counts=(count, 0)) for count in (2, *HUGE)},
    **{f"{count} facts": container(counts=(1, count)) for count in (1, *HUGE)},
    **{f"a key of {size}": container([struct.pack("<Q", size)], counts=(1, 1)) for size in (1025, *HUGE)},
    **{f"a text of {size}": container([fact("a", STRING, struct.pack("<Q", size))]) for size in HUGE},
    **{f"{count} texts": container([fact("a", ARRAY, array(STRING, count))]) for count in (2000, *HUGE)},
    **{f"{count} floats": container([fact("a", ARRAY, array(F32, count))]) for count in (2000, *HUGE)},
    "a text in an array that goes on": container([fact("a", ARRAY, array(STRING, 2000, struct.pack("<Q", 2**63)))]),
    "an array of arrays": container([fact("a", ARRAY, array(ARRAY, 1, array(U32, 0)))]),
    "a fact of type 13": container([fact("a", 13, bytes(8))]),
    "an array of type 13": container([fact("a", ARRAY, array(13, 1, bytes(8)))]),
    "a fact twice": container([fact("a", U32, bytes(4))] * 2),
    **{
        f"alignment {value}": container([fact("general.alignment", U32, struct.pack("<I", value))])
        for value in (0, 3, 33, 2**31, 2**32 - 1)
    },
    "an alignment that is none": container([fact("general.alignment", STRING, text("32"))]),
    "a tensor twice": container(entries=[entry(offset=0), entry(offset=256)]),
    "tensors that overlap": container(entries=[entry("x"), entry("y", offset=224)]),
    "a tensor out of step": container(entries=[entry(offset=4)]),
    "five dimensions": container(entries=[entry(shape=(2, 2, 2, 2, 2))]),
    "many dimensions": container(entries=[text("x") + struct.pack("<I", 2**32 - 1)]),
    **{f"{size} columns": container(entries=[entry(shape=(size, 2))]) for size in HUGE},
    "a shape whose product wraps": container(entries=[entry(shape=(2**32, 2**32))]),
    **{f"offset {offset}": container(entries=[entry(offset=offset)]) for offset in (2**31, 2**63)},
    "rows of half a block": container(entries=[entry(shape=(48, 2), kind=Type.Q8_0)]),
    "a number in blocks": container(entries=[entry(shape=(), kind=Type.Q4_K)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_a_line_and_at_no_cost(name: str, tmp_path: Path, capsys: Capture) -> None:
    read_header("m.gguf", Memory(container()))
    tracemalloc.start()
    try:
        with pytest.raises(ModelUnreadable, match=r"^m\.gguf"):
            read_header("m.gguf", Memory(HOSTILE[name]))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    (tmp_path / "m.gguf").write_bytes(HOSTILE[name])
    assert run([*ANALYZE, "-m", str(tmp_path / "m.gguf")]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_version_2_is_read() -> None:
    assert read_header("m.gguf", Memory(container(version=2))) == read_header("m.gguf", Memory(container()))


@pytest.mark.parametrize("version", [0, 1, 4])
def test_other_versions_are_refused_by_name(version: int) -> None:
    with pytest.raises(UnknownFormat, match="big-endian" if version == 0 else f"version {version}"):
        read_header("m.gguf", Memory(container(version=version)))


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"x": (numbers(2, 2), Type.F32)}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnknownFormat, match=r"m\.gguf.*big-endian"):
        open_file(path)


def test_a_type_from_the_future_is_named_when_it_is_used(tmp_path: Path) -> None:
    entries = [entry("a.weight", (32, 3), 99), entry("b", (8, 3), Type.F32, 128)]
    (tmp_path / "m.gguf").write_bytes(container(entries=entries))
    checkpoint = open_file(tmp_path / "m.gguf")
    assert (checkpoint.info("a.weight").dtype, checkpoint.info("a.weight").nbytes) == ("GGML type 99", 128)
    assert checkpoint.whole(checkpoint.info("b")).shape == (3, 8)
    with pytest.raises(UnknownFormat, match=r"a\.weight.*GGML type 99"):
        checkpoint.whole(checkpoint.info("a.weight"))
    with pytest.raises(UnknownFormat, match=r"a\.weight.*GGML type 99"):
        decode(checkpoint, "a.weight", 0, 1)


@pytest.mark.parametrize(("number", "name"), [(139, "IQ4_K"), (153, "IQ2_KT"), (212, "Q4_K_R4"), (399, "Q8_K_R8")])
def test_types_of_ik_llama_are_refused_by_name(number: int, name: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(container(entries=[entry("a.weight", (256, 3), number)]))
    with pytest.raises(UnknownFormat, match=rf"a\.weight.*stored as ik_llama\.cpp's {name}, which we don't decode"):
        decode(open_file(tmp_path / "m.gguf"), "a.weight", 0, 1)


def test_the_norm_beside_arctic_s_experts_is_no_expert(tmp_path: Path) -> None:
    names = {f"blk.0.ffn_{role}_exps.weight": (numbers(2, 32, 32), Type.F32) for role in ("gate", "up", "down")}
    write(tmp_path / "m.gguf", names | {"blk.0.ffn_norm_exps.weight": (numbers(32), Type.F32)})
    assert Experts.open(str(tmp_path)).family == "gguf"


SEED = container(
    [
        fact("general.architecture", STRING, text("llama")),
        fact("general.alignment", U32, struct.pack("<I", 32)),
        fact("tokens", ARRAY, array(STRING, 1100, text("ab") * 1100)),
        fact("types", ARRAY, array(U32, 3, bytes(12))),
    ],
    [entry("a.weight", (32, 2, 3), Type.Q4_0), entry("b", (5, 2), Type.F16, 128), entry("c", (7,), 99, 192)],
    data=256,
)


def test_what_is_changed_at_random_below_is_valid() -> None:
    metadata, tensors = read_header("m.gguf", Memory(SEED))
    assert (metadata["types"], [info.nbytes for info in tensors.values()]) == ([0, 0, 0], [108, 20, 64])


PLACES = st.integers(0, len(SEED) - 1) | st.integers(0, 140) | st.integers(len(SEED) - 450, len(SEED) - 256)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(PLACES, st.integers(0, 255) | st.sampled_from([0, 1, 8, 9, 127, 128, 255])), max_size=6),
    st.just(len(SEED)) | st.integers(0, len(SEED)),
)
def test_bytes_changed_at_random_are_read_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(SEED)
    for place, value in changes:
        data[place] = value
    start = time.process_time()
    with contextlib.suppress(MoEError):
        _, tensors = read_header("m.gguf", Memory(bytes(data[:length])))
        assert all(0 <= info.start <= info.stop <= length for info in tensors.values())
    assert time.process_time() - start < 2


# A trained model


@pytest.mark.real
def test_a_trained_model_is_read_as_the_package_reads_it(smollm2: Path) -> None:
    checkpoint = open_file(smollm2)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    assert {name: (info.dtype, info.start) for name in checkpoint.names for info in [checkpoint.info(name)]} == {
        name: (tensor.tensor_type.name, tensor.data_offset) for name, tensor in tensors.items()
    }
    for layer in (0, 13, 29):
        for role, shape in (("gate", (1536, 576)), ("up", (1536, 576)), ("down", (576, 1536))):
            name = f"blk.{layer}.ffn_{role}.weight"
            assert checkpoint.info(name).dtype == "Q4_1"
            expected = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
            assert expected.shape == shape
            np.testing.assert_array_equal(decode(checkpoint, name, 0, shape[0]), expected)
            np.testing.assert_array_equal(decode(checkpoint, name, 100, 103), expected[100:103])
    config = checkpoint.config
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)


@pytest.mark.real
def test_a_trained_dense_model_is_no_mixture_of_experts(smollm2: Path, capsys: Capture) -> None:
    assert run([*ANALYZE, "-m", str(smollm2)]) == 4
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "not a Mixture of Experts" in err
    dense = Experts.open(str(smollm2), "dense")
    matrix = dense.layer(7).matrices(0)["down"]
    tensor = next(t for t in gguf.GGUFReader(smollm2).tensors if t.name == "blk.7.ffn_down.weight")
    np.testing.assert_array_equal(matrix, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
