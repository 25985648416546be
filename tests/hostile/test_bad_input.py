"""Whatever is wrong with a model ends in one line that names the culprit, and in the documented exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

import encoders_float
import encoders_packed
from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from hub_server import HubServer
from places import FIXTURES
from processor_time import HANGS
from sampling import keep
from terminals import without_steps

ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]
COMPARE = ["introspect", "moe-expert", "moe-type-compare"]
USAGE, UNREADABLE, UNKNOWN = 2, 3, 4
DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}

Tensors = dict[str, NDArray[Any]]
Header = dict[str, Any]
Config = dict[str, Any]
Capture = pytest.CaptureFixture[str]

SHAPES = {"w1": (12, 8), "w3": (12, 8), "w2": (8, 12)}
CONFIG: Config = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}


def weight_name(layer: int, expert: int, weight: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"


def mixtral(layers: int = 2, experts: int = 4, dtype: Any = np.float32) -> Tensors:
    """One tensor per expert and role: w1 is the gate, w3 up, w2 down."""
    rng = np.random.default_rng(0)
    return {
        weight_name(layer, expert, weight): rng.standard_normal(shape).astype(dtype)
        for layer in range(layers)
        for expert in range(experts)
        for weight, shape in SHAPES.items()
    }


def stacked(dtype: Any = np.float32) -> Tensors:
    """All experts in one tensor, gate and up in another: how these lie is for the model type to say."""
    rng = np.random.default_rng(0)
    return {
        "model.layers.0.mlp.experts.gate_up_proj": rng.standard_normal((4, 24, 8)).astype(dtype),
        "model.layers.0.mlp.experts.down_proj": rng.standard_normal((4, 8, 12)).astype(dtype),
    }


def split(data: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Header | bytes, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def write(folder: Path, weights: Tensors | bytes, config: Config | str | None = None) -> str:
    """A model's folder; without a config if that is None, and with a config that is no JSON if that is a str."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights if isinstance(weights, bytes) else save(weights))
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


def write_shards(folder: Path, weight_map: Any) -> str:
    """One shard, `a.safetensors`, that holds everything, below an index with this weight_map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.safetensors").write_bytes(save(mixtral()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)


def load(fixture: str) -> tuple[Header, bytes, Config]:
    header, body = split((FIXTURES / fixture / "model.safetensors").read_bytes())
    header.pop("__metadata__", None)
    return header, body, json.loads((FIXTURES / fixture / "config.json").read_text())


def refused(capsys: Capture, code: int, model: str, *words: str, options: list[str] | None = None) -> str:
    """Check that the model, or the options, end in this code and one line with these words; returns the line."""
    arguments = [*ANALYZE, "-m", model, *(options or [])]
    capsys.readouterr()
    got = run(arguments)
    out, line = capsys.readouterr()
    assert (got, out) == (code, ""), line
    assert line.endswith("\n")
    assert line[:-1].isprintable(), line  # so it is a single line, without control characters
    assert len(line) < 10_000
    assert [word for word in words if word.lower() not in line.lower()] == [], line

    assert run([*arguments, "--json"]) == code
    out, as_json = capsys.readouterr()
    assert (out, as_json.count("\n")) == ("", 1)
    error = json.loads(as_json)
    assert error.keys() == {"error"}
    assert error["error"].keys() == {"code", "message", "hint"}
    assert error["error"]["code"] == code
    assert error["error"]["message"] in line
    assert error["error"]["hint"] in line
    return line


def limited(model: str, seconds: int = 8) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own with 2 GB of address space and so many seconds of processor time, for what may eat
    all time and memory."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}));"
        "from chuk_lazarus.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *ANALYZE, "-m", model]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)


# What was typed


@pytest.mark.parametrize(
    "model",
    [
        "/no/such/path",
        "no-such-name",
        "a/b/c/d",
        "nobody/nothing",
        "nobody/nothing@v9",
        "nobody/nothing@",
        "n--o/..",
        "what is this?",
        "/no/such/model.safetensors",
        "/no/such/model.gguf",
        "demo:nothing",
        "demo:",
        "demo:../native",
        "~no-such-user/model",
        "x" * 300,
        "[red]no[/red]",
        "\x1b[31mred",
        "two\nlines",
    ],
)
def test_a_model_that_is_not_there(capsys: Capture, model: str) -> None:
    typed = model.replace("\x1b", "\\x1b").replace("\n", "\\n").partition("@")[0]
    refused(capsys, UNREADABLE, model, typed)


def test_an_unknown_demo_tells_which_there_are(capsys: Capture) -> None:
    refused(capsys, UNREADABLE, "demo:nothing", "demo:upcycled", "demo:native")


def test_an_empty_name_is_not_the_current_folder(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a script's unset variable gives."""
    monkeypatch.chdir(write(tmp_path / "m", mixtral(), CONFIG))
    code = run([*ANALYZE, "-m", ""])
    out, line = capsys.readouterr()
    assert (code in (USAGE, UNREADABLE), out, line.count("\n")) == (True, "", 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "7"], ["layer 7", "0-1"]),
        (["--layer", "-1"], ["layer -1", "0-1"]),
        (["--layer", "seven"], ["--layer", "seven"]),
        (["--layer", "1.5"], ["--layer", "1.5"]),
        (["--layers", "0-5"], ["layer 2", "0-1"]),
        (["--layers", "nonsense"], ["nonsense", "0,5,10"]),
        (["--layers", "0,,1"], ["0,,1"]),
        (["--layers", ""], ["layers"]),
        (["--layers", "0-1/0"], ["0-1/0"]),
        (["--layers", "1-0"], ["layer"]),
        (["--layers", "-1"], ["-1"]),
        (["--layer", "0", "--layers", "1"], ["layer", "both"]),
        (["--experts", "0"], ["--experts", "0"]),
        (["--experts", "-1"], ["--experts", "-1"]),
        (["--experts", "x"], ["--experts", "x"]),
        (["--experts", ""], ["--experts"]),
        (["--experts", "1.5"], ["--experts", "1.5"]),
        (["--experts", "9" * 5000], ["--experts"]),
    ],
)
def test_options_that_ask_for_nonsense(capsys: Capture, tmp_path: Path, options: list[str], words: list[str]) -> None:
    refused(capsys, USAGE, write(tmp_path / "m", mixtral(), CONFIG), *words, options=options)


def test_a_dense_layer_is_refused_with_the_moe_layers(capsys: Capture) -> None:
    refused(capsys, USAGE, str(FIXTURES / "deepseek_v3"), "layer 0", "layers are 1", options=["--layer", "0"])


def test_a_layer_of_multi_token_prediction_can_be_chosen(capsys: Capture) -> None:
    model = str(FIXTURES / "deepseek_v3_fp8")
    assert run([*ANALYZE, "-m", model, "--layer", "2", "--json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in analysis["layers"]] == [2]
    assert (analysis["moe_layers"], analysis["mtp_layers"]) == ([1], [2])


# Folders and files that hold something else


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ([], UNREADABLE, ["safetensors", "the-folder"]),
        (["config.json", "README.md"], UNREADABLE, ["safetensors", "the-folder"]),
        (["pytorch_model.bin"], UNREADABLE, ["pytorch_model.bin", "pickle"]),
        (["__0_0.distcp", ".metadata"], UNREADABLE, ["__0_0.distcp", "pickle"]),
        (["model_state.pdparams"], UNREADABLE, ["model_state.pdparams", "pickle"]),
        (["model.pt"], UNREADABLE, ["model.pt", "pickle"]),
        (["model-q4.gguf"], UNREADABLE, ["model-q4.gguf", "not a GGUF file"]),
        (["model-q4.gguf", "model-q8.gguf", "mmproj-f16.gguf"], USAGE, ["model-q4.gguf, model-q8.gguf", "2 GGUF"]),
        (["m-00001-of-00002.gguf"], UNREADABLE, ["m-00002-of-00002.gguf is missing"]),
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], UNREADABLE, ["shard 2 of 3"]),
    ],
)
def test_folders_without_weights(
    capsys: Capture, tmp_path: Path, files: list[str], code: int, words: list[str]
) -> None:
    (tmp_path / "the-folder").mkdir()
    for file in files:
        (tmp_path / "the-folder" / file).write_text("{}")
    refused(capsys, code, str(tmp_path / "the-folder"), *words)


@pytest.mark.parametrize("file", ["config.json", "notes.txt", "oracle.npz"])
def test_a_file_that_is_no_model(capsys: Capture, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    refused(capsys, UNREADABLE, str(tmp_path / file), file, "safetensors")


def test_a_link_that_leads_nowhere(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(capsys, UNREADABLE, str(tmp_path), "model.safetensors", "No such file")


def test_a_folder_under_the_name_of_a_file(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(capsys, UNREADABLE, str(tmp_path), "safetensors")


def test_a_dense_model(capsys: Capture) -> None:
    refused(capsys, UNKNOWN, str(FIXTURES / "dense_llama"), "no routed experts", "dense_llama")


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_comparison_says_which_of_the_two_is_broken(capsys: Capture, broken_first: bool) -> None:
    dense, good = str(FIXTURES / "dense_llama"), str(FIXTURES / "mixtral")
    first, second = (dense, good) if broken_first else (good, dense)
    assert run([*COMPARE, "-m", first, "-c", second]) == UNKNOWN
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert "dense_llama" in line


# Layouts and storage formats


@pytest.mark.parametrize("experts", [range(4), [2]])
def test_an_unknown_layout_names_its_tensor(capsys: Capture, tmp_path: Path, experts: list[int]) -> None:
    tensors = mixtral()
    new = [weight_name(0, expert, "fancy_proj") for expert in experts]
    for expert, name in zip(experts, new, strict=True):
        tensors[name] = tensors.pop(weight_name(0, expert, "w1"))
    refused(capsys, UNKNOWN, write(tmp_path / "m", tensors, CONFIG), new[0])


@pytest.mark.parametrize("config", [None, {}, {"model_type": "unheard_of"}])
def test_stacked_experts_whose_model_type_is_unknown_are_ambiguous(
    capsys: Capture, tmp_path: Path, config: Config | None
) -> None:
    """Their weights are random numbers, and show no order either."""
    refused(capsys, UNKNOWN, write(tmp_path / "m", stacked(), config), "halves", "turns", "config.json")


def test_shapes_that_fit_no_layout(capsys: Capture, tmp_path: Path) -> None:
    tensors = mixtral()
    for expert in range(4):
        tensors[weight_name(0, expert, "w2")] = np.ones((7, 12), np.float32)
    refused(capsys, UNKNOWN, write(tmp_path / "m", tensors, CONFIG), "layer 0", "down [7, 12]")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
def test_weights_in_a_dtype_that_needs_more(capsys: Capture, tmp_path: Path, dtype: Any) -> None:
    names = {"bool": "BOOL", "int8": "I8", "uint8": "U8", "int32": "I32"}
    model = write(tmp_path / "m", mixtral(dtype=dtype), CONFIG)
    refused(capsys, UNKNOWN, model, weight_name(0, 0, "w1"), names[np.dtype(dtype).name])


def test_a_dtype_from_the_future(capsys: Capture, tmp_path: Path) -> None:
    header, body = split(save(mixtral()))
    for entry in header.values():
        entry["dtype"] = "F3_E1M1"
    refused(capsys, UNKNOWN, write(tmp_path / "m", join(header, body), CONFIG), weight_name(0, 0, "w1"), "F3_E1M1")


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quip"])
def test_a_quantisation_that_we_can_not_decode_is_named(capsys: Capture, tmp_path: Path, method: str) -> None:
    tensors: Tensors = {}
    for name in mixtral():
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.codes"] = np.zeros((1, 12), np.int32)
        tensors[f"{stem}.codebooks"] = np.zeros((1, 2), np.int32)
    config = CONFIG | {"quantization_config": {"quant_method": method, "bits": 4}}
    line = refused(capsys, UNKNOWN, write(tmp_path / "m", tensors, config), "codes", "codebooks", method)
    assert "experts.0.w1" in line


def test_float8_weights_without_the_scales_that_the_config_announces(capsys: Capture, tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    model = write(tmp_path / "m", mixtral(dtype=ml_dtypes.float8_e4m3fn), config)
    refused(capsys, UNKNOWN, model, weight_name(0, 0, "w1"), "FP8 without its scale")


# Containers


def test_files_cut_short(capsys: Capture, tmp_path: Path) -> None:
    data = save(mixtral(layers=1, experts=2))
    start = 8 + int.from_bytes(data[:8], "little")
    for cut in (0, 1, 7, 8, 9, 100, start - 1, start, start + 1, (start + len(data)) // 2, len(data) - 1):
        refused(capsys, UNREADABLE, write(tmp_path / "m", data[:cut]), "model.safetensors")


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_can_not_be(capsys: Capture, tmp_path: Path, length: int) -> None:
    header, body = split(save(mixtral()))
    refused(capsys, UNREADABLE, write(tmp_path / "m", join(header, body, length)), "model.safetensors")


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json}", ["JSON"]),
        (b"\xff\xff\xff\xff", ["JSON"]),
        (b"[]", ["object"]),
        (b"null", ["object"]),
        (b'"text"', ["object"]),
        (b"17", ["object"]),
        (b"[" * 100_000, ["nested"]),
        (b'{"a":' * 100_000, ["nested"]),
        (b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), ["'a'", "twice"]),
        (b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', ["'shape'", "twice"]),
        (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), ["JSON"]),
    ],
)
def test_headers_that_are_none(capsys: Capture, tmp_path: Path, header: bytes, words: list[str]) -> None:
    refused(capsys, UNREADABLE, write(tmp_path / "m", join(header, bytes(16))), "model.safetensors", *words)


WRONG_ENTRIES: list[Any] = [
    None,
    [],
    "F32",
    17,
    {},
    {"dtype": "F32", "shape": [12, 8]},
    {"dtype": None},
    {"dtype": 32},
    {"dtype": ["F32"]},
    {"shape": None},
    {"shape": "12, 8"},
    {"shape": ""},
    {"shape": {}},
    {"shape": 96},
    {"shape": ["12", "8"]},
    {"shape": [-12, -8]},
    {"shape": [12.0, 8.0]},
    {"shape": [12, 8, True]},
    {"shape": [12, None]},
    {"shape": [[12], [8]]},
    {"shape": [12, 9]},
    {"shape": [2**40, 2**40]},
    {"shape": [2**32, 2**32, 0, 2**62]},
    {"data_offsets": None},
    {"data_offsets": []},
    {"data_offsets": [0]},
    {"data_offsets": [0, 384, 384]},
    {"data_offsets": "04"},
    {"data_offsets": ["0", "384"]},
    {"data_offsets": [0.0, 384.0]},
    {"data_offsets": [False, 384]},
    {"data_offsets": [-384, 0]},
    {"data_offsets": [384, 0]},
    {"data_offsets": [0, 2**64]},
    {"data_offsets": [2**64, 2**64 + 384]},
    {"data_offsets": [10**4299, 10**4300 - 1]},
    {"data_offsets": [0, 383]},
]


@pytest.mark.parametrize("wrong", WRONG_ENTRIES, ids=lambda wrong: json.dumps(wrong)[:40])
def test_header_entries_that_are_wrong(capsys: Capture, tmp_path: Path, wrong: Any) -> None:
    header, body = split(save(mixtral()))
    name = weight_name(0, 0, "w1")
    partial = isinstance(wrong, dict) and wrong and wrong.keys() != {"dtype", "shape"}
    header[name] = header[name] | wrong if partial else wrong
    refused(capsys, UNREADABLE, write(tmp_path / "m", join(header, body), CONFIG), "model.safetensors", name)


def test_tensors_that_overlap(capsys: Capture, tmp_path: Path) -> None:
    header, body = split(save(mixtral()))
    one, other = weight_name(0, 0, "w1"), weight_name(1, 2, "w1")
    header[other]["data_offsets"] = [offset + 4 for offset in header[one]["data_offsets"]]
    refused(capsys, UNREADABLE, write(tmp_path / "m", join(header, body), CONFIG), "model.safetensors", one)


DIGITS = "9" * 5000


@pytest.mark.parametrize("number", [f"{DIGITS}.block_sparse_moe.experts.0", f"0.block_sparse_moe.experts.{DIGITS}"])
def test_numbers_of_thousands_of_digits_in_names(capsys: Capture, tmp_path: Path, number: str) -> None:
    tensors = mixtral() | {f"model.layers.{number}.w1.weight": np.ones((12, 8), np.float32)}
    assert run([*ANALYZE, "-m", write(tmp_path / "m", tensors, CONFIG)]) in (0, UNREADABLE, UNKNOWN)


# Indexes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", ["JSON"]),
        ("[]", ["object"]),
        ("{}", ["weight_map"]),
        ('{"weight_map": null}', ["weight_map"]),
        ('{"weight_map": ["a.safetensors"]}', ["weight_map"]),
        ('{"weight_map": {"a": 1}}', ["weight_map"]),
        ('{"weight_map": {"a": null}}', ["weight_map"]),
        ('{"weight_map": {"a": ["a.safetensors"]}}', ["weight_map"]),
        ('{"weight_map": {"a": "a.safetensors", "a": "a.safetensors"}}', ["twice"]),
    ],
)
def test_indexes_that_are_none(capsys: Capture, tmp_path: Path, text: str, words: list[str]) -> None:
    model = write_shards(tmp_path / "m", {})
    (tmp_path / "m" / "model.safetensors.index.json").write_text(text)
    refused(capsys, UNREADABLE, model, "model.safetensors.index.json", *words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model-00007.safetensors", ["model-00007.safetensors", "missing"]),
        ("", ["index.json"]),
        ("../outside.safetensors", ["../outside.safetensors"]),
        ("x/../../outside.safetensors", ["x/../../outside.safetensors"]),
        ("/etc/outside.safetensors", ["/etc/outside.safetensors"]),
        ("..\\outside.safetensors", ["outside.safetensors"]),
        ("C:\\outside.safetensors", ["outside.safetensors"]),
        ("pytorch_model.bin", ["pytorch_model.bin"]),
        ("config.json", ["config.json"]),
        ("a\x00.safetensors", ["index.json"]),
        ("\x1b[31m.safetensors", ["\\x1b[31m"]),
        ("\ud800.safetensors", ["index.json"]),
    ],
)
def test_indexes_that_name_a_wrong_file(capsys: Capture, tmp_path: Path, file: str, words: list[str]) -> None:
    (tmp_path / "outside.safetensors").write_bytes(save(mixtral()))
    names = dict.fromkeys(mixtral(), "a.safetensors")
    model = write_shards(tmp_path / "m", names | {weight_name(0, 0, "w1"): file})
    refused(capsys, UNREADABLE, model, "index.json", *words)


def test_a_tensor_that_its_shard_has_not_got(capsys: Capture, tmp_path: Path) -> None:
    name = weight_name(0, 4, "w1")
    names = dict.fromkeys(mixtral(), "a.safetensors")
    names |= {weight_name(0, 4, weight): "a.safetensors" for weight in SHAPES}
    refused(capsys, UNREADABLE, write_shards(tmp_path / "m", names), name, "a.safetensors")


# Experts that are not all there, or not alike


def drop(*keys: tuple[int, int, str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for key in keys:
            del tensors[weight_name(*key)]

    return change


def replace(layer: int, expert: int, weight: str, values: NDArray[Any]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[weight_name(layer, expert, weight)] = values

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(*((0, 2, weight) for weight in SHAPES)), ["layer 0", "expert 2"]),
        (drop(*((0, 3, weight) for weight in SHAPES)), ["layer 0"]),
        (drop((0, 1, "w1")), ["layer 0", "expert 1", "gate"]),
        (drop((0, 3, "w2")), ["layer 0", "expert 3", "down"]),
        (drop(*((0, expert, "w2") for expert in range(4))), ["layer 0", "w2"]),
        (replace(0, 2, "w1", np.ones((12, 9), np.float32)), [weight_name(0, 2, "w1"), "[12, 9]", "[12, 8]"]),
        (replace(0, 2, "w1", np.ones((8, 12), np.float32)), [weight_name(0, 2, "w1"), "[8, 12]", "[12, 8]"]),
        (replace(0, 2, "w1", np.ones((12, 8), np.float16)), [weight_name(0, 2, "w1"), "f16", "f32"]),
        (replace(0, 2, "w1", np.ones(96, np.float32)), [weight_name(0, 2, "w1"), "[96]"]),
    ],
)
def test_an_expert_that_is_missing_or_unlike(
    capsys: Capture, tmp_path: Path, change: Callable[[Tensors], None], words: list[str]
) -> None:
    tensors = mixtral()
    change(tensors)
    line = refused(capsys, UNREADABLE, write(tmp_path / "m", tensors, CONFIG), *words)
    assert "{" not in line  # no template of ours


def test_a_role_that_is_missing_everywhere_is_what_is_named(capsys: Capture, tmp_path: Path) -> None:
    """The tensors that are there are not the ones to complain of."""
    tensors = {name: values for name, values in mixtral().items() if "w2" not in name}
    code = run([*ANALYZE, "-m", write(tmp_path / "m", tensors, CONFIG)])
    out, line = capsys.readouterr()
    assert (code in (UNREADABLE, UNKNOWN), out, line.count("\n")) == (True, "", 1)
    assert "w2" in line or "down" in line


def test_a_single_expert(capsys: Capture, tmp_path: Path) -> None:
    refused(capsys, UNKNOWN, write(tmp_path / "m", mixtral(experts=1)), "single expert", "layer 0")


@pytest.mark.parametrize(
    ("count", "inner", "hidden", "stack"),
    [(4, 0, 8, False), (4, 12, 0, False), (4, 0, 0, False), (4, 0, 8, True), (4, 12, 0, True), (0, 12, 8, True)],
)
def test_dimensions_of_zero(capsys: Capture, tmp_path: Path, count: int, inner: int, hidden: int, stack: bool) -> None:
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    tensors = {weight_name(0, e, w): np.ones(shape, np.float32) for e in range(count) for w, shape in shapes.items()}
    if stack:
        tensors = {
            "model.layers.0.mlp.experts.gate_up_proj": np.ones((count, 2 * inner, hidden), np.float32),
            "model.layers.0.mlp.experts.down_proj": np.ones((count, hidden, inner), np.float32),
        }
    code = run([*ANALYZE, "-m", write(tmp_path / "m", tensors, {"model_type": "mixtral"})])
    out, line = capsys.readouterr()
    assert (code in (UNREADABLE, UNKNOWN), out, line.count("\n")) == (True, "", 1)
    assert "layer" in line


@pytest.mark.parametrize("count", keep([10**7, 10**12], 10**12))
@pytest.mark.parametrize("where", ["name", "config"])
def test_a_huge_number_of_experts_costs_neither_time_nor_memory(tmp_path: Path, where: str, count: int) -> None:
    tensors = mixtral(layers=1) | (
        {weight_name(0, count, "w1"): np.ones((12, 8), np.float32)} if where == "name" else {}
    )
    done = limited(write(tmp_path / "m", tensors, CONFIG | {"num_local_experts": count if where == "config" else 4}))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (UNREADABLE, "", 1), done.stderr[-2000:]


# Weights that are not numbers


@pytest.mark.sample
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "role"), [("w1", "gate"), ("w3", "up"), ("w2", "down")])
def test_a_weight_that_is_not_finite(
    capsys: Capture, tmp_path: Path, value: float, dtype: str, weight: str, role: str
) -> None:
    tensors = mixtral(dtype=DTYPES[dtype])
    tensors[weight_name(1, 2, weight)][3, 5] = value
    model = write(tmp_path / "m", tensors, CONFIG)
    refused(capsys, UNREADABLE, model, "layer 1", "expert 2", role, options=["--layer", "1", "--experts", "1"])
    assert run([*ANALYZE, "-m", model, "--layer", "0"]) == 0  # a layer that nobody asked for is not looked at


@pytest.mark.sample
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_type", "row", "role"),
    [("mixtral", 5, "gate"), ("mixtral", 17, "up"), ("gpt_oss", 6, "gate"), ("gpt_oss", 7, "up")],
)
def test_a_stacked_weight_that_is_not_finite(
    capsys: Capture, tmp_path: Path, value: float, dtype: str, model_type: str, row: int, role: str
) -> None:
    tensors = stacked(DTYPES[dtype])
    tensors["model.layers.0.mlp.experts.gate_up_proj"][2, row, 3] = value
    model = write(tmp_path / "m", tensors, {"model_type": model_type})
    refused(capsys, UNREADABLE, model, "layer 0", "expert 2", role)


def test_a_weight_beyond_float32(capsys: Capture, tmp_path: Path) -> None:
    tensors = mixtral(dtype=np.float64)
    tensors[weight_name(0, 2, "w1")][3, 5] = 1e300
    refused(capsys, UNREADABLE, write(tmp_path / "m", tensors, CONFIG), "layer 0", "expert 2", "gate", "too large")


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-60, 2.0**50, 2.0**100])
def test_the_scale_of_the_weights_does_not_matter(capsys: Capture, tmp_path: Path, scale: float) -> None:
    """Not even where their squares vanish or overflow in float32."""
    plain = mixtral()
    scaled = {name: values * np.float32(scale) for name, values in plain.items()}
    figures = []
    for place, tensors in enumerate((plain, scaled)):
        assert run([*ANALYZE, "-m", write(tmp_path / str(place), tensors, CONFIG), "--json"]) == 0
        analysis = json.loads(capsys.readouterr().out)
        figures.append((analysis["type"], round(analysis["rank_ratio"], 3), round(analysis["cosine"], 3)))
    assert figures[0] == figures[1]


@pytest.mark.parametrize("magnitude", [2.0**58, 2.0**60, 1.2e18, 1.8e18, 1.88e18])
def test_a_delta_larger_than_its_expert(capsys: Capture, tmp_path: Path, magnitude: float) -> None:
    """The experts' energies still fit a float32, and the outlier's distance from their mean may not."""
    tensors = {
        weight_name(0, expert, weight): np.full(shape, magnitude if expert else -magnitude, np.float32)
        for expert in range(8)
        for weight, shape in SHAPES.items()
    }
    code = run([*ANALYZE, "-m", write(tmp_path / "m", tensors)])
    assert code in (0, UNREADABLE)
    assert without_steps(capsys.readouterr().err).count("\n") == (code != 0)


# Configs


@pytest.mark.parametrize("text", ["", "{broken", "[]", "null", "[1, 2]", '"mixtral"', '{"a": 1, "a": 2}', "\x00"])
def test_a_config_that_is_none(capsys: Capture, tmp_path: Path, text: str) -> None:
    refused(capsys, UNREADABLE, write(tmp_path / "m", mixtral(), text), "config.json")


@pytest.mark.parametrize("wrong", ["2", 2.0, True, None, [2], {"n": 2}, 10**30])
def test_a_depth_of_a_wrong_type_is_as_none(capsys: Capture, tmp_path: Path, wrong: Any) -> None:
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), CONFIG | {"num_hidden_layers": wrong})]) == 0


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_depth_below_every_layer(capsys: Capture, tmp_path: Path, wrong: int) -> None:
    model = write(tmp_path / "m", mixtral(), CONFIG | {"num_hidden_layers": wrong})
    refused(capsys, UNREADABLE, model, "config.json", f"num_hidden_layers is {wrong}")


@pytest.mark.parametrize("wrong", [7, None, ["mixtral"], {"mixtral": 1}, True, "", "unheard_of", "\x1b[31m[red]"])
def test_a_model_type_that_is_none(capsys: Capture, tmp_path: Path, wrong: Any) -> None:
    """The names decide, and the report says so."""
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), CONFIG | {"model_type": wrong})]) == 0
    out, line = capsys.readouterr()
    assert "w1_w3_w2 was chosen by its tensors' names" in " ".join(out.split())
    assert "\x1b" not in out
    assert without_steps(line) == ""


@pytest.mark.parametrize("count", [0, -4, 3, 5, 8])
def test_another_number_of_experts_in_the_config(capsys: Capture, tmp_path: Path, count: int) -> None:
    model = write(tmp_path / "m", mixtral(), CONFIG | {"num_local_experts": count})
    refused(capsys, UNREADABLE, model, "layer 0", str(count) if count < 5 else "expert 4", "incomplete")


@pytest.mark.parametrize("count", ["4", 4.0, True, None, [4]])
def test_a_number_of_experts_of_a_wrong_type_is_as_none(capsys: Capture, tmp_path: Path, count: Any) -> None:
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), CONFIG | {"num_local_experts": count})]) == 0


@pytest.mark.parametrize("key", ["text_config", "quantization_config", "ffn_config"])
@pytest.mark.parametrize("wrong", [None, [], "x", 7])
def test_parts_of_the_config_of_a_wrong_type_are_as_none(capsys: Capture, tmp_path: Path, key: str, wrong: Any) -> None:
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), CONFIG | {key: wrong})]) == 0


@pytest.mark.parametrize("depth", [300, 900, 960, 980, 5000])
def test_a_config_within_configs(capsys: Capture, tmp_path: Path, depth: int) -> None:
    text = '{"text_config":' * depth + "{}" + "}" * depth
    code = run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), text)])
    assert code in (0, UNREADABLE)
    assert without_steps(capsys.readouterr().err).count("\n") == (code != 0)


def test_the_router_of_dbrx_without_a_shape(capsys: Capture, tmp_path: Path) -> None:
    """Without the config, it is the router that tells how many experts there are."""
    header, body, _ = load("dbrx")
    router = next(name for name in header if name.endswith("router.layer.weight"))
    start = header[router]["data_offsets"][0]
    header[router] |= {"shape": [], "data_offsets": [start, start + 2]}
    refused(capsys, UNKNOWN, write(tmp_path / "m", join(header, body)), "dbrx")


# What says how the weights are quantised, where config.json does not

ENCODERS = encoders_float.ENCODERS | encoders_packed.ENCODERS
GPTQ_FILE: Config = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False}
AWQ_FILE: Config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


def modelopt(algorithm: str | None, **more: Any) -> Config:
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}


SIDE_FILES = [
    ("fp8_block_modelopt", "hf_quant_config.json", modelopt("FP8_PB_WO")),
    ("fp8_tensor", "hf_quant_config.json", modelopt("FP8")),
    ("nvfp4_modelopt", "hf_quant_config.json", modelopt("NVFP4", group_size=16)),
    ("gptq_4", "quantize_config.json", GPTQ_FILE),
    ("gptq_4_v2", "quantize_config.json", GPTQ_FILE | {"checkpoint_format": "gptq_v2", "quant_method": "gptq"}),
    ("gptq_3_act_order", "quantize_config.json", GPTQ_FILE | {"bits": 3, "desc_act": True, "quant_method": None}),
    ("awq_4", "quant_config.json", AWQ_FILE),
    ("awq_4", "quantize_config.json", GPTQ_FILE | {"quant_method": "awq", "checkpoint_format": "gemm"}),
]
side_files = pytest.mark.parametrize(("name", "file", "said"), SIDE_FILES)


def write_encoded(folder: Path, name: str, config: Config | None = CONFIG) -> dict[str, NDArray[np.float32]]:
    """A model of one layer and two experts in this storage format; returns its matrices by expert and weight."""
    rng, body, header = np.random.default_rng(0), b"", {}
    truth = {}
    for expert in range(2):
        for weight, shape in {"w1": (32, 64), "w3": (32, 64), "w2": (64, 32)}.items():
            encoded = ENCODERS[name][0](rng.standard_normal(shape).astype(np.float32), rng)
            truth[f"{expert}.{weight}"] = encoded.values
            for part, (dtype, array) in encoded.parts.items():
                start, body = len(body), body + array.tobytes()
                shape_stored = [*array.shape[:-1], array.shape[-1] * (2 if dtype == "F4" else 1)] if array.shape else []
                header[weight_name(0, expert, weight).removesuffix("weight") + part] = {
                    "dtype": dtype,
                    "shape": shape_stored,
                    "data_offsets": [start, len(body)],
                }
    config = None if config is None else config | {"num_hidden_layers": 1, "num_local_experts": 2}
    write(folder, join(header, body), config)
    return truth


def check_read(model: str, truth: dict[str, NDArray[np.float32]]) -> None:
    layer = Experts.open(model).layer(0)
    for expert in range(2):
        found = layer.matrices(expert)
        for role, weight in {"gate": "w1", "up": "w3", "down": "w2"}.items():
            np.testing.assert_array_equal(found[role], truth[f"{expert}.{weight}"])


@side_files
@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"quantization_config": {}}, None], ids=["said", "empty", "none"])
def test_the_quantisation_is_read_from_a_file_beside_the_config(
    tmp_path: Path, name: str, file: str, said: Config, config: Config | None
) -> None:
    truth = write_encoded(tmp_path / "m", name, config)
    (tmp_path / "m" / file).write_text(json.dumps(said))
    check_read(str(tmp_path / "m"), truth)
    check_read(str(tmp_path / "m/model.safetensors"), truth)


@side_files
def test_the_quantisation_is_read_from_a_file_on_the_hub(
    tmp_path: Path, hub: HubServer, cache: Path, name: str, file: str, said: Config
) -> None:
    truth = write_encoded(tmp_path / "m", name)
    (tmp_path / "m" / file).write_text(json.dumps(said))
    repository = f"tests/side-{name}-{file.partition('.')[0]}"
    hub.add(repository, tmp_path / "m")
    check_read(repository, truth)


@pytest.mark.parametrize("where", ["outside", "text_config"])
def test_what_the_config_says_of_quantisation_goes_before_other_files(tmp_path: Path, where: str) -> None:
    said = {"quant_method": "gptq", **GPTQ_FILE}
    config = {"quantization_config": said} if where == "outside" else {"text_config": {"quantization_config": said}}
    truth = write_encoded(tmp_path / "m", "gptq_4", CONFIG | config)
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(GPTQ_FILE | {"checkpoint_format": "gptq_v2"}))
    (tmp_path / "m/hf_quant_config.json").write_text("{broken")
    check_read(str(tmp_path / "m"), truth)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("text", ["{}", '{"quantization": 7}', '{"quantization": {}}', '{"w_bit": "four"}'])
def test_files_on_quantisation_that_say_nothing(capsys: Capture, tmp_path: Path, file: str, text: str) -> None:
    model = write(tmp_path / "m", mixtral(), CONFIG)
    (tmp_path / "m" / file).write_text(text)
    assert run([*ANALYZE, "-m", model]) == 0


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("text", ["", "{broken", "[]", '{"a": 1, "a": 2}'])
def test_files_on_quantisation_that_are_none(capsys: Capture, tmp_path: Path, file: str, text: str) -> None:
    model = write(tmp_path / "m", mixtral(), CONFIG)
    (tmp_path / "m" / file).write_text(text)
    refused(capsys, UNREADABLE, model, file)


def test_a_model_whose_cache_alone_is_quantised(tmp_path: Path) -> None:
    write(tmp_path / "m", mixtral(), CONFIG)
    (tmp_path / "m/hf_quant_config.json").write_text(json.dumps(modelopt(None) | {"kv_cache_quant_algo": "FP8"}))
    assert Checkpoint(find_repository(str(tmp_path / "m"))).config == CONFIG


def test_an_mlx_model_that_was_converted_from_a_quantised_one(tmp_path: Path) -> None:
    """Older versions of MLX LM left the original's quantization_config beside their own."""
    header, body, config = load("mlx_qwen3_moe_3bit")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    layer = Experts.open(write(tmp_path / "m", join(header, body), config)).layer(0)
    with np.load(FIXTURES / "mlx_qwen3_moe_3bit/oracle.npz") as oracle:
        for role in layer.roles:
            np.testing.assert_array_equal(layer.matrices(1)[role], oracle[f"0.{role}"][1])


# Adapters


def lora(names: list[str], mark: str = "lora_A.weight", other: str = "lora_B.weight") -> Tensors:
    return {f"{name}.{part}": np.ones((4, 4), np.float32) for name in names for part in (mark, other)}


EXPERT_MODULES = [weight_name(0, expert, weight).removesuffix(".weight") for expert in range(4) for weight in SHAPES]


@pytest.mark.sample
@pytest.mark.parametrize(
    "tensors",
    [
        lora([f"base_model.model.{name}" for name in EXPERT_MODULES]),
        lora(["base_model.model.model.layers.0.self_attn.q_proj"]),
        lora(EXPERT_MODULES, "lora_A.default.weight", "lora_B.default.weight"),
        lora(["model.layers.0.block_sparse_moe.switch_mlp.gate_proj"], "lora_a", "lora_b"),
        lora(["q_proj"]) | {"q_proj.bias": np.ones(4), "q_proj.lora_magnitude_vector": np.ones(4)},
        lora(["base_model.model.model.layers.0.self_attn.q_proj"]) | {"base_model.model.lm_head.weight": np.eye(4)},
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors", "model.safetensors"])
def test_an_adapter_is_refused_as_such(capsys: Capture, tmp_path: Path, tensors: Tensors, file: str) -> None:
    (tmp_path / file).write_bytes(save(tensors))
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(capsys, UNKNOWN, str(tmp_path), "LoRA adapter", "merged")
    refused(capsys, UNKNOWN, str(tmp_path / file), "LoRA adapter", "merged")


@pytest.mark.parametrize("base", ["", ".weight", ".base_layer.weight", ".base_layer.gate_up"])
def test_adapters_beside_other_weights_of_a_model_do_no_harm(capsys: Capture, tmp_path: Path, base: str) -> None:
    """Phi-4-multimodal has them in its attention, for speech and vision."""
    name = "model.layers.0.self_attn.q_proj"
    tensors = mixtral() | lora([name]) | {f"{name}{base}": np.ones((4, 4), np.float32)}
    assert run([*ANALYZE, "-m", write(tmp_path / "m", tensors, CONFIG)]) == 0


# Quantised storage

FP8_CONFIG: Config = {"model_type": "mixtral"}


def fp8(weight_shape: tuple[int, ...] = (8, 8), scale_shape: tuple[int, ...] = (2, 2), scale: float = 1.0) -> Tensors:
    tensors: Tensors = {}
    for expert in range(2):
        for weight in SHAPES:
            name = weight_name(0, expert, weight)
            tensors[name] = np.ones(weight_shape, ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = np.full(scale_shape, scale, np.float32)
    return tensors


@pytest.mark.parametrize(
    "block", [None, [], [4], [4, 4, 4], 4, "4x4", [0, 4], [4, -4], ["4", "4"], [4.0, 4.0], [True, 4]]
)
def test_fp8_without_a_block_size(capsys: Capture, tmp_path: Path, block: Any) -> None:
    config = FP8_CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    refused(capsys, UNKNOWN, write(tmp_path / "m", fp8(), config), weight_name(0, 0, "w1"), "weight_block_size")


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (2, 3), (4, 4), (2, 2, 1), (0, 2)])
def test_fp8_with_scales_of_another_shape(capsys: Capture, tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = FP8_CONFIG | {"quantization_config": {"weight_block_size": [4, 4]}}
    model = write(tmp_path / "m", fp8(scale_shape=shape), config)
    refused(capsys, UNREADABLE, model, weight_name(0, 0, "w1"), str(list(shape)), "[2, 2]")


@pytest.mark.parametrize("shape", [(), (8,)])
def test_fp8_weights_that_are_no_matrix(capsys: Capture, tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = FP8_CONFIG | {"quantization_config": {"weight_block_size": [4, 4]}}
    code = run([*ANALYZE, "-m", write(tmp_path / "m", fp8(weight_shape=shape), config)])
    assert code in (UNREADABLE, UNKNOWN)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("size", keep([2**31, 2**40, 10**30], 10**30))
def test_fp8_blocks_larger_than_the_matrix_are_a_single_one(tmp_path: Path, size: int) -> None:
    config = FP8_CONFIG | {"quantization_config": {"weight_block_size": [size, size]}}
    done = limited(write(tmp_path / "m", fp8(scale_shape=(1, 1)), config))
    assert done.returncode in (0, UNREADABLE, UNKNOWN), done.stderr[-2000:]
    assert without_steps(done.stderr).count("\n") == (done.returncode != 0)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_fp8_with_a_scale_that_is_not_finite(capsys: Capture, tmp_path: Path, scale: float) -> None:
    tensors = fp8()
    tensors[weight_name(0, 1, "w3") + "_scale_inv"][1, 0] = scale
    config = FP8_CONFIG | {"quantization_config": {"weight_block_size": [4, 4]}}
    refused(capsys, UNREADABLE, write(tmp_path / "m", tensors, config), "layer 0", "expert 1", "up")


def mxfp4() -> Tensors:
    rng = np.random.default_rng(0)
    gate_up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    return {
        f"{gate_up}_blocks": rng.integers(0, 256, (2, 64, 1, 16), np.uint8),
        f"{gate_up}_scales": np.full((2, 64, 1), 127, np.uint8),
        f"{down}_blocks": rng.integers(0, 256, (2, 32, 1, 16), np.uint8),
        f"{down}_scales": np.full((2, 32, 1), 127, np.uint8),
    }


MXFP4_CONFIG: Config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def test_mxfp4_is_read(tmp_path: Path) -> None:
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mxfp4(), MXFP4_CONFIG)]) == 0


@pytest.mark.parametrize(
    ("part", "shape", "code"),
    [
        ("blocks", (2, 64, 1, 15), UNREADABLE),
        ("blocks", (2, 64, 16), UNREADABLE),
        ("blocks", (2, 63, 1, 16), UNREADABLE),
        ("blocks", (16,), UNREADABLE),
        ("blocks", (), UNREADABLE),
        ("scales", (2, 64), UNREADABLE),
        ("scales", (2, 64, 2), UNREADABLE),
        ("scales", (3, 64, 1), UNREADABLE),
        ("scales", (), UNREADABLE),
    ],
)
def test_mxfp4_with_shapes_at_odds(
    capsys: Capture, tmp_path: Path, part: str, shape: tuple[int, ...], code: int
) -> None:
    name = f"model.layers.0.mlp.experts.gate_up_proj_{part}"
    tensors = mxfp4() | {name: np.zeros(shape, np.uint8)}
    model = write(tmp_path / "m", tensors, MXFP4_CONFIG)
    refused(capsys, code, model, "model.layers.0.mlp.experts.gate_up_proj", str(list(shape)))


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_mxfp4_that_lacks_a_part(capsys: Capture, tmp_path: Path, part: str) -> None:
    tensors = mxfp4()
    del tensors[f"model.layers.0.mlp.experts.down_proj_{part}"]
    refused(capsys, UNKNOWN, write(tmp_path / "m", tensors, MXFP4_CONFIG), "model.layers.0.mlp.experts.down_proj")


def test_mxfp4_with_a_scale_that_is_nan(capsys: Capture, tmp_path: Path) -> None:
    tensors = mxfp4()
    tensors["model.layers.0.mlp.experts.down_proj_scales"][1, 3, 0] = 255
    model = write(tmp_path / "m", tensors, MXFP4_CONFIG)
    refused(capsys, UNREADABLE, model, "layer 0", "expert 1", "down", "NaN")


# Names that would like to be more than names

EVIL = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "[red]x[/red]",
    "[/]",
    "a\rb",
    "a\nb",
    "\u202eabc",
    "\ud800",
]


@pytest.mark.parametrize("evil", [evil for evil in EVIL if "\n" not in evil], ids=ascii)
def test_evil_names_of_tensors(capsys: Capture, tmp_path: Path, evil: str) -> None:
    header, body = split(save(mixtral()))
    name = f"model.layers.0.block_sparse_moe.experts.0.{evil}.weight"
    header[name] = header.pop(weight_name(0, 0, "w1"))
    line = refused(capsys, UNKNOWN, write(tmp_path / "m", join(header, body), CONFIG), "experts.0.")
    if evil.isprintable():
        assert evil in line  # as it is: markup is not for us to interpret


@pytest.mark.parametrize("evil", EVIL[:-1], ids=ascii)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_evil_names_of_models(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: str, stream: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = evil.replace("/", "-")
    write(Path(folder), mixtral() if stream == "stdout" else b"", CONFIG)
    assert run([*ANALYZE, "-m", folder]) == (0 if stream == "stdout" else UNREADABLE)
    text = "".join(capsys.readouterr())
    assert not [char for char in text if not char.isprintable() and char != "\n"], ascii(text)
    if folder.isprintable() and stream == "stdout":
        assert folder in text


@pytest.mark.parametrize("evil", ["\x1b[31mred", "[red]x[/red]"])
def test_evil_names_in_a_comparison(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("[red]x[-red]"), mixtral(), CONFIG | {"model_type": evil})
    assert run([*COMPARE, "-m", "[red]x[-red]", "-c", "[red]x[-red]", "-v"]) == 0
    out, line = capsys.readouterr()
    assert "\x1b" not in out + line
    assert "[red]x[-red]" in out


@pytest.mark.parametrize(
    "arguments", [["--\x1b[31m"], ["\x1b[31m"], [*ANALYZE, "-m", "demo:native", "--layer", "\x1b[31m"]]
)
def test_evil_arguments(capsys: Capture, arguments: list[str]) -> None:
    assert run(arguments) == USAGE
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert "\x1b" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in Unicode")
def test_a_name_that_is_not_utf_8(capsys: Capture, tmp_path: Path) -> None:
    model = write(tmp_path / os.fsdecode(b"caf\xe9"), mixtral(), CONFIG)
    for options in ([], ["--json"]):
        assert run([*ANALYZE, "-m", model, *options]) == 0
        assert "UNDETERMINED" in capsys.readouterr().out


# Odd models that are fine


def analyse(capsys: Capture, model: str) -> dict[str, Any]:
    assert run([*ANALYZE, "-m", model, "--experts", "all", "--json"]) == 0
    out, line = capsys.readouterr()
    assert line == ""
    analysis: dict[str, Any] = json.loads(out)
    return analysis


def test_experts_that_are_all_zero(capsys: Capture, tmp_path: Path) -> None:
    zero = {name: np.zeros_like(values) for name, values in mixtral().items()}
    analysis = analyse(capsys, write(tmp_path / "m", zero, CONFIG))
    projections = analysis["layers"][0]["projections"].values()
    assert {rank for projection in projections for rank in projection["rank"].values()} == {0.0}
    assert analysis["cosine"] == 0.0


def test_one_dead_expert(capsys: Capture, tmp_path: Path) -> None:
    tensors = mixtral()
    for weight, shape in SHAPES.items():
        tensors[weight_name(0, 1, weight)] = np.zeros(shape, np.float32)
    analysis = analyse(capsys, write(tmp_path / "m", tensors, CONFIG))
    assert all(np.isfinite(p["rank_ratio"]) for p in analysis["layers"][0]["projections"].values())


@pytest.mark.parametrize("experts", [2, 3, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_experts(capsys: Capture, tmp_path: Path, experts: int, dtype: str) -> None:
    first = mixtral(layers=1, experts=1, dtype=DTYPES[dtype])
    tensors = {weight_name(0, e, weight): first[weight_name(0, 0, weight)] for e in range(experts) for weight in SHAPES}
    analysis = analyse(capsys, write(tmp_path / "m", tensors))
    projections = analysis["layers"][0]["projections"].values()
    assert [(p["rank"]["0.95"], p["delta_energy"]) for p in projections] == [(0.0, 0.0)] * 3
    assert analysis["type"] == ("UPCYCLED" if experts > 2 else "UNDETERMINED")  # two may have been averaged
    rule = analysis["documented_rule"]
    assert (rule["type"], rule["confidence"]) == ("UPCYCLED", 1.0)
    assert analysis["cosine"] == pytest.approx(1.0, abs=1e-6)


def test_matrices_of_one_number(capsys: Capture, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {weight_name(0, e, w): rng.standard_normal((1, 1)).astype("f4") for e in range(3) for w in SHAPES}
    assert analyse(capsys, write(tmp_path / "m", tensors))["layers"][0]["projections"]["gate"]["max_rank"] == 1


def test_more_experts_than_there_are_is_all_of_them(capsys: Capture, tmp_path: Path) -> None:
    assert run([*ANALYZE, "-m", write(tmp_path / "m", mixtral(), CONFIG), "--experts", "99", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["projections"]["up"]["experts"] == [0, 1, 2, 3]


# Anything at all

VALID = save(mixtral(layers=1, experts=2, dtype=ml_dtypes.bfloat16))
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
PLACES = st.integers(0, HEADER_END - 1) | st.integers(0, len(VALID) - 1)
MUTATIONS = st.lists(st.tuples(PLACES, st.integers(0, 255) | st.sampled_from(b'0129-"[]{},:.')), max_size=4)


@pytest.mark.long
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(MUTATIONS, st.just(len(VALID)) | st.integers(0, len(VALID)))
def test_bytes_changed_at_random_are_read_or_refused(
    capsys: Capture, tmp_path: Path, mutations: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(VALID)
    for place, value in mutations:
        data[place] = value
    code = run([*ANALYZE, "-m", write(tmp_path / "m", bytes(data[:length])), "--experts", "1"])
    out, line = capsys.readouterr()
    assert code in (0, UNREADABLE, UNKNOWN)
    assert without_steps(line).count("\n") == (code != 0)
    assert bool(out) == (code == 0)
