"""The small valid inputs that the fuzzer starts from.

Most are fixtures of the tests. Storage formats come from the tests' reference encoders, GGUF files from the gguf
package; overlays, kept results and caches are what the package itself writes, made anew for each run.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

import encoders_float
import encoders_packed
from chuk_lazarus.introspection.moe import Experts, MoECompressionService, MoESurveyService, MoETypeService
from places import FIXTURES

ENCODERS = encoders_float.ENCODERS | encoders_packed.ENCODERS

# One of each kind of layout: a tensor per expert, stacked, fused in halves and in turns, transposed, flattened,
# without a gate, with biases, shared experts, prediction layers, two stacks, experts of two kinds, sliced, sharded.
LAYOUTS = (
    "mixtral",
    "olmoe",
    "mixtral_fused",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "dbrx",
    "deepseek_v3",
    "deepseek_v3_sharded",
    "jetmoe",
    "llama4_text",
    "nemotron_h",
    "switch_transformers",
    "ernie4_5_vl_moe_fused",
    "published_grok2",
    "published_nomic_bert_moe",
    "qwen3_omni_moe",
    "mlx_qwen3_moe_mixed",
    "mlx_qwen3_moe_nvfp4_global",
    "dense_llama",
)
OVERLAID = ("mixtral", "gpt_oss", "dbrx", "nemotron_h", "mlx_qwen3_moe_mixed")
GGUF_TYPES = ("F16", "Q8_0", "Q4_K", "MXFP4", "NVFP4", "IQ4_XS")
REPOSITORY = "fuzz/mixtral"

Parser = Literal["safetensors", "index", "gguf", "config", "codec", "overlay", "folder", "kept", "cache", "survey"]
Files = dict[str, bytes]
Progress = Callable[[str, int, int], None]

Job = Callable[[str, Path, Progress], Any]
JOBS: dict[str, tuple[Job, str]] = {
    "analyze": (lambda model, folder, watch: MoETypeService.analyze(model, layers="all", progress=watch), "layer 1"),
    "compute": (
        lambda model, folder, watch: MoECompressionService.compute(model, layers="all", max_error=0.1, progress=watch),
        "layer 1",
    ),
    "estimate": (
        lambda model, folder, watch: MoECompressionService.estimate(model, layers="all", progress=watch),
        "alternatives for layer 1",
    ),
    "verify": (
        lambda model, folder, watch: MoECompressionService.verify(model, layers="all", progress=watch),
        "verifying layer 1",
    ),
    "compress": (
        lambda model, folder, watch: MoECompressionService.compress(model, folder, energy=0.9, progress=watch),
        "writing folder",
    ),
}
"""What goes over all layers of a model and keeps what it has done when it is stopped, and the work to stop it in."""


@dataclass(frozen=True)
class Seed:
    """Files by their place below the folder that a case is made in."""

    name: str
    parser: Parser
    files: Files


def read_folder(folder: Path) -> Files:
    """Every file below a folder by its relative path."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def write_folder(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def join_safetensors(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def fixture_files(name: str) -> Files:
    wanted = (".safetensors", "config.json", "index.json")
    return {file: data for file, data in read_folder(FIXTURES / name).items() if file.endswith(wanted)}


def encoded_files(name: str, stacked: bool = False) -> Files:
    """One layer of two experts in a storage format, a tensor for each expert or for both."""
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    body, is_mlx = b"", name.startswith("mlx")
    quantization: dict[str, Any] = {}

    def add(name: str, dtype: str, array: NDArray[Any]) -> None:
        nonlocal body
        start, body = len(body), body + array.tobytes()
        columns = [array.shape[-1] * (2 if dtype == "F4" else 1)] if array.shape else []
        shape = [*array.shape[:-1], *columns]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(body)]}

    for role, weight, shape in (("gate", "w1", (32, 64)), ("up", "w3", (32, 64)), ("down", "w2", (64, 32))):
        matrices = rng.standard_normal((2, *shape)).astype(np.float32)
        # an encoder draws how it stores a matrix: for both in the same way
        both = [ENCODERS[name][0](matrix, np.random.default_rng(0)) for matrix in matrices]
        modules = [f"model.layers.0.block_sparse_moe.experts.{expert}.{weight}" for expert in range(2)]
        modules = [f"model.layers.0.mlp.switch_mlp.{role}_proj"] if stacked else modules
        for part, (dtype, array) in both[0].parts.items():
            arrays = [array, both[1].parts[part][1]]
            for module, stored in zip(modules, [np.stack(arrays)] if stacked else arrays, strict=True):
                add(f"{module}.{part}", dtype, stored)
        quantization |= both[0].quantization
        if is_mlx:
            quantization |= dict.fromkeys(modules, both[0].quantization)
    key = "quantization" if is_mlx else "quantization_config"
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 2, key: quantization}
    return {"model.safetensors": join_safetensors(header, body), "config.json": json.dumps(config).encode()}


def gguf_files(kind: str, folder: Path, split: int = 0) -> Files:
    """Two layers of three experts in a GGML type, in one file or in parts of `split` tensors."""
    folder.mkdir(parents=True)
    rng, stored_as = np.random.default_rng(0), GGMLQuantizationType[kind]
    block, _ = GGML_QUANT_SIZES[stored_as]
    experts, inner, hidden = 3, 32, max(64, block)
    writer = gguf.GGUFWriter(folder / "model.gguf", "mixtral", split_max_tensors=split)
    writer.add_block_count(2)
    writer.add_expert_count(experts)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"] * 8)
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", rng.standard_normal((experts, hidden), np.float32))
        for role, (rows, columns) in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            own = stored_as if columns % block == 0 else GGMLQuantizationType.Q8_0
            length, nbytes = GGML_QUANT_SIZES[own]
            # any bytes are numbers of some size; small ones keep the scales among them finite
            data = rng.integers(0, 56, (experts, rows, columns // length * nbytes), np.uint8)
            writer.add_tensor(f"blk.{layer}.ffn_{role}_exps.weight", data, raw_dtype=own)
            if kind == "NVFP4":
                writer.add_tensor(f"blk.{layer}.ffn_{role}_exps.scale", np.ones(experts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_folder(folder)


def model_seeds(scratch: Path) -> Iterator[Seed]:
    """Models of every container, layout and storage format."""
    for name in LAYOUTS:
        files = fixture_files(name)
        yield Seed(name, "safetensors", files)
        yield Seed(name, "config", files)
        yield Seed(name, "folder", files)
        if any(file.endswith("index.json") for file in files):
            yield Seed(name, "index", files)
    for name in ENCODERS:
        yield Seed(name, "codec", encoded_files(name))
        if not name.startswith("bnb"):  # which has no stacks
            yield Seed(f"{name}, stacked", "codec", encoded_files(name, stacked=True))
    for kind in GGUF_TYPES:
        yield Seed(kind, "gguf", gguf_files(kind, scratch / kind))
    yield Seed("Q8_0 in parts", "gguf", gguf_files("Q8_0", scratch / "parts", 4))


def overlay_seeds(scratch: Path) -> Iterator[Seed]:
    """Overlay checkpoints, of several ranks and of rank 0."""
    for name, rank in product(OVERLAID, (0, 3)):
        folder = scratch / f"{name}-{rank}"
        experts = Experts.open(str(FIXTURES / name))
        ranks = dict.fromkeys(experts.layer(experts.layers[0]).roles, rank)
        MoECompressionService.compress(str(FIXTURES / name), folder, ranks=ranks)
        yield Seed(f"{name} at rank {rank}", "overlay", read_folder(folder))


SURVEYED = ("demo:native", "demo:upcycled", "no/such-model")
TEXT_LIST = "# models\ndemo:native parent=demo:parent layers=0,1  # a comment\norg/name experts=all\n"
TOML_LIST = """\
[[model]]
id = "org/name"
origin = "upcycled"
parent = "org/dense"
layers = "0-10/5"
storage = "mxfp4"
shape = { layers = 12, experts = 8, top_k = 2, hidden = 512, intermediate = 2048 }

[[model]]
id = "org/other"
parent_needs = "a row"
storage = "bf16"
gated = false
shape = { layers = 3, experts = 4, hidden = 64, intermediate = 128 }
"""


def survey_seeds(folder: Path) -> Iterator[Seed]:
    """The lists that a survey reads, and the rows that it has written and goes on with."""
    yield Seed("text", "survey", {"list.txt": TEXT_LIST.encode()})
    yield Seed("toml", "survey", {"list.toml": TOML_LIST.encode()})
    folder.mkdir(parents=True)
    MoESurveyService.survey(SURVEYED, file=folder / "rows.jsonl")
    MoESurveyService.survey(SURVEYED[:2], file=folder / "rows.jsonl", budget="1MB")
    yield Seed("rows", "survey", read_folder(folder))


class Stopped(BaseException):
    """What stops a job in the middle."""


def kept_seeds(model: str, cache: Path, beside: Path) -> Iterator[Seed]:
    """What each job over the layers of `model` keeps when it is stopped in the last: in `cache`, or in `beside`."""
    for name, (job, last) in JOBS.items():

        def stop(what: str, done: int, total: int, last: str = last) -> None:
            if what == last and done > total // 2:
                raise Stopped

        for folder in (cache, beside):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with suppress(Stopped):
            job(model, beside / "folder", stop)
        kept = {
            f"{folder.name}/{place}": data for folder in (cache, beside) for place, data in read_folder(folder).items()
        }
        yield Seed(name, "kept", kept)
