"""How a valid input becomes a hostile one: by the structure of its format, and byte by byte.

A mutation takes a random generator and the files of a case, and changes the files. It may fail to find anything to
change; the case is then as harmless as its seed.
"""

import copy
import json
import re
import struct
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

from .corpus import Parser, join_safetensors, split_safetensors

OUTSIDE = "{outside}"
"""Stands, in a link, for a folder beside the model's that no case may read."""


@dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


@dataclass(frozen=True)
class Special:
    """A FIFO, a socket or a folder in place of a file."""

    kind: str


Content = bytes | Link | Special
Case = dict[str, Content]
Mutation = Callable[[Random, Case], None]

NAMES = (
    "",
    ".",
    "..",
    "/",
    "../../etc/passwd",
    "/etc/passwd",
    "../outside/model.safetensors",
    "a/../../model.safetensors",
    "a\\..\\b.safetensors",
    "/dev/zero",
    "\0",
    "a\0b",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\x7f",
    "\u202eabc",
    "\u200b",
    "\ud800",
    "\U0010ffff",
    "[red]x[/red]",
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    "%s%n",
    "{expert}",
    "{0.__class__}",
    "x" * 5000,
    "9" * 5000,
    "\u0663",
    "layers.1." * 300 + "\n",
    "e\u0301" * 300,
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.block_sparse_moe.experts.999999999999999999.w1.weight",
    "model.layers.999999999.block_sparse_moe.experts.0.w1.weight",
    "model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight",
    "__metadata__",
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 65_535, 10**7),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400),
    *(-1, -2, -8, -(2**31), -(2**63), -(10**30)),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0.5, -0.0, 4.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "4", "0", "-1", "all", [], {}, [[]], [0], [None], {"a": 1}, {"": {}}, [2**63], ["x"], "9" * 5000 + "x1"),
)
DTYPES = [
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64"),
    *("I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64", "X"),
]
ITEM = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "C64": 8}
TEXTS = (
    b"",
    b"\x00",
    b"null",
    b"[]",
    b"17",
    b'"x"',
    b"{",
    b'{"a":1,"a":2}',
    b'{"a":NaN}',
    b'{"a":-Infinity}',
    b'{"a":1e999999}',
    b'{"a":' + b"9" * 5000 + b"}",
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b'{"a":' * 400 + b"1" + b"}" * 400,
    b'{"text_config":' * 300 + b"{}" + b"}" * 300,
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"a":"\\ud800"}',
    b'{"a":"\xed\xa0\x80"}',
    b"{" + b",".join(b'"%d":%d' % (n, n) for n in range(3000)) + b"}",
)
"""In place of a JSON file, or of a header."""

CONFIG: dict[str, tuple[Any, ...]] = {
    "model_type": ("mixtral", "gpt_oss", "deepseek_v3", "dbrx", "nemotron_h", "qwen3_moe", "llama4", "gemma3n", "no"),
    "num_hidden_layers": (0, 1, 2, -1),
    "num_local_experts": (0, 1, 2, 3, 4, -1),
    "n_routed_experts": (0, 2, 4),
    "num_experts_per_tok": (0, 1, 2, 99, [2], []),
    "moe_topk": ([2, 2], [[]]),
    "hidden_act": ("silu", "gelu", "relu2", "\x1b[31m", "[red]x[/red]", "none"),
    "scoring_func": ("softmax", "sigmoid", "x"),
    "norm_topk_prob": (True, False),
    "ffn_config": ({}, {"moe_num_experts": 4, "ffn_act_fn": {"name": "gelu"}}, {"ffn_act_fn": {"name": []}}),
    "text_config": ({}, {"model_type": "mixtral"}, {"text_config": {}}),
    "thinker_config": ({}, {"text_config": {"num_experts": 4}}),
    "per_layer_config": ({}, {"0": {"num_experts": 2}}, {"0": []}),
    "overlay_config": ({}, {"version": 1}),
    "auto_map": ({"AutoModelForCausalLM": "canary.Model", "AutoConfig": "canary.Config"},),
    "model_file": ("canary.py",),
    "torch_dtype": ("bfloat16",),
    "quantization": ({}, {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    "quantization_config": ({}, {"quant_method": "gptq", "bits": 4, "group_size": 32}, {"quant_method": "gguf"}),
}
QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": (
        *("gptq", "awq", "auto-round", "compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "mxfp4"),
        *("bitsandbytes", "gguf"),
    ),
    "bits": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "w_bit": (4, 8),
    "group_size": (-1, 1, 8, 16, 32, 64, 128),
    "q_group_size": (-1, 32),
    "mode": ("affine", "mxfp4", "mxfp8", "nvfp4"),
    "checkpoint_format": ("gptq", "gptq_v2", "marlin", "gemm"),
    "format": ("gptq", "pack-quantized", "gemm"),
    "packing_format": ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"),
    "version": ("gemm", "gemv", "GEMM"),
    "desc_act": (True, False),
    "is_marlin_format": (True,),
    "dynamic": ({"x": {}},),
    "extra_config": ({"x": {}},),
    "weight_block_size": ([128, 128], [1, 32], [8, 8], [2**40, 1], [0, 1]),
    "scale_fmt": ("ue8m0",),
    "quant_algo": ("FP8", "NVFP4", "fp8_pb_wo", "fp8_per_channel_per_token"),
    "config_groups": ({}, {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}),
    "num_bits": (1, 2, 3, 4, 8),
    "strategy": ("group", "channel", "tensor", "block"),
    "symmetric": (True, False),
    "block_structure": ("128x128", "1x" + "9" * 5000, [8, 8], "\u0663x1", "x"),
    "type": ("int", "float"),
}


def odd_value(random: Random) -> Any:
    """Something that does not belong where it is put."""
    return random.choice((random.choice(NUMBERS), random.choice(ODD), random.choice(NAMES), random.choice(NUMBERS)))


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree of objects and lists."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        one = pending.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one))) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        pending += [one[key] for key in keys]
    return found


def change_tree(random: Random, tree: Any) -> None:
    """Change one place of a tree."""
    if not (found := places(tree)):
        return
    holder, key = random.choice(found)
    value = holder[key]
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, name = random.choice(found)
            holder[key] = copy.deepcopy(other[name])
        case 2 if isinstance(holder, dict):
            holder[random.choice(NAMES)] = holder.pop(key)
        case 3:
            holder[key] = [value]
        case 4 if isinstance(holder, dict):
            holder[random.choice(NAMES)] = copy.deepcopy(value)
        case _ if type(value) is int and random.random() < 0.7:
            holder[key] = random.choice(
                (value + 1, value - 1, value * 2, value // 2, -value, *random.sample(NUMBERS, 3))
            )
        case _:
            holder[key] = copy.deepcopy(odd_value(random))


def change_config(random: Random, config: Any) -> None:
    """Set something that configs have, to what it may be or to something odd."""
    if not isinstance(config, dict):
        return
    objects = [config, *(holder[key] for holder, key in places(config) if isinstance(holder[key], dict))]
    holder = random.choice(objects[:20])
    known = QUANTIZATION if holder is not config or random.random() < 0.2 else CONFIG
    key = random.choice(list(known))
    holder[key] = (
        copy.deepcopy(random.choice(known[key])) if random.random() < 0.6 else copy.deepcopy(odd_value(random))
    )


def edit_json(random: Random, data: bytes, *changes: Callable[[Random, Any], None]) -> bytes:
    if random.random() < 0.1:
        return random.choice(TEXTS)
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(changes)(random, tree)
    return json.dumps(tree).encode()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def change_header(random: Random, header: dict[str, Any], body: bytearray) -> None:
    """Change the header in a way that it does not fit the bytes, most likely."""
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match random.randrange(8):
        case 0:
            entry["dtype"] = random.choice(DTYPES)
        case 1:
            place = random.randrange(2)
            entry["data_offsets"][place] = random.choice((*NUMBERS, entry["data_offsets"][1 - place], len(body) + 1))
        case 2:
            entry["shape"].insert(random.randint(0, len(entry["shape"])), random.choice(NUMBERS))
        case 3:
            entry["shape"] = [2**62] * random.choice((2, 3, 70, 3000))
        case 4:
            header[random.choice(NAMES)] = header.pop(name)
        case 5:
            other = random.choice([name for name in header if name != "__metadata__"])
            header[name], header[other] = header[other], entry
        case 6:
            entry["data_offsets"] = [offset + random.choice((-8, -1, 1, 8)) for offset in entry["data_offsets"]]
        case _:
            change_tree(random, entry)


def change_tensor(random: Random, header: dict[str, Any], body: bytearray) -> None:
    """Change a tensor so that header and bytes still agree: what is wrong is then for others to find."""
    name = random.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    shape, dtype, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if "quant_state" in name and random.random() < 0.8:  # bitsandbytes keeps JSON in a tensor
        text = edit_json(random, bytes(body[start:stop]), change_tree)
        header[name] = {**entry, "shape": [len(text)], "data_offsets": [len(body), len(body) + len(text)]}
        body.extend(text)
        return
    match random.randrange(11):
        case 0:
            shape.reverse()
        case 1 if shape:
            place = random.randrange(len(shape))
            for factor in (2, 3, 4, shape[place]):
                if factor and shape[place] % factor == 0:
                    shape[place : place + 1] = random.choice(
                        ([factor, shape[place] // factor], [shape[place] // factor, factor])
                    )
                    break
        case 2 if len(shape) > 1:
            place = random.randrange(len(shape) - 1)
            shape[place : place + 2] = [shape[place] * shape[place + 1]]
        case 3:
            shape.insert(random.randint(0, len(shape)), 1)
        case 4:
            alike = [other for other, size in ITEM.items() if size == ITEM.get(dtype, 1) and other != dtype]
            entry["dtype"] = random.choice(alike or ["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"])
        case 5 if shape and dtype in ITEM:
            entry["dtype"], shape[-1] = random.choice(("U8", "I8", "F8_E4M3")), shape[-1] * ITEM[dtype]
        case 6:
            entry["data_offsets"] = [start, start]
            entry["shape"] = random.choice(
                ([0], [0, 2**61], [2**61, 0], [*shape, 0], [0, *shape], [2**61, *shape[1:], 0])
            )
        case 7 if shape and shape[0] > 1:
            rows = random.randrange(1, shape[0])
            entry["data_offsets"] = [start, start + (stop - start) // shape[0] * rows]
            shape[0] = rows
        case 8:
            del header[name]
        case 9:
            other = name.replace(".0.", random.choice((".1.", ".7.", ".99999.", ".0.0.")), 1)
            header[other] = {**entry, "data_offsets": [len(body), len(body) + stop - start]}
            body.extend(body[start:stop])
        case _:
            for _ in range(random.choice((1, 4))):
                if stop - start >= 8:
                    place = random.randrange(start, stop - 7)
                    body[place : place + 8] = random.choice((bytes(8), b"\xff" * 8, b"\x7f\x80" * 4, b"\x80\x7f" * 4))


def resize(random: Random, header: dict[str, Any], body: bytearray) -> None:
    """Give all tensors of one kind another size along one axis, with zeros for bytes."""
    name = random.choice([name for name in header if name != "__metadata__"])
    leaf, shape = name.rpartition(".")[2], header[name]["shape"]
    if not shape:
        return
    place, length = random.randrange(len(shape)), random.choice((0, 1, 2, 3, 5, 7, 8, 33))
    for other, entry in header.items():
        if other.rpartition(".")[2] == leaf and other != "__metadata__" and entry["shape"] == shape:
            size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // max(1, prod(shape))
            new = [*shape[:place], length, *shape[place + 1 :]]
            header[other] = {**entry, "shape": new, "data_offsets": [len(body), len(body) + size * prod(new)]}
            body.extend(bytes(size * prod(new)))


def edit_safetensors(random: Random, data: bytes) -> bytes:
    header, rest = split_safetensors(data)
    body = bytearray(rest)
    if random.random() < 0.08:
        return join_safetensors(random.choice(TEXTS), rest)
    for _ in range(random.choice((1, 1, 2, 3))):
        if len(header) > 1:
            random.choice((change_header, change_tensor, change_tensor, resize))(random, header, body)
    result = join_safetensors(header, bytes(body))
    if random.random() < 0.05:
        result = random.choice((*NUMBERS[:-7], len(result) - 8, len(result))).to_bytes(200, "little")[:8] + result[8:]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def edit_gguf(random: Random, data: bytes) -> bytes:
    """Write over fields of the header: counts, lengths, types, sizes, offsets, and the bytes of names."""
    result, fields = bytearray(data), find_fields(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        kind, start, stop = random.choice(fields)
        if kind == "text":
            new = random.choice(NAMES).encode(errors="surrogatepass")[: stop - start]
            result[start : start + len(new)] = new
        else:
            old = int.from_bytes(result[start:stop], "little")
            near = (old + 1, old - 1, old * 2, old // 2, old ^ 32, len(data), len(data) - stop)
            new_value = random.choice((*near, *random.sample(NUMBERS, 6), *range(45)))
            result[start:stop] = (new_value % 2 ** (8 * (stop - start))).to_bytes(stop - start, "little")
    return bytes(result)


def find_fields(data: bytes) -> list[tuple[str, int, int]]:
    """Where a valid header has its numbers and texts: (number or text, start, stop)."""
    fields: list[tuple[str, int, int]] = [("number", 4, 8), ("number", 8, 16), ("number", 16, 24)]
    at = 24
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(width: int) -> int:
        nonlocal at
        if at + width > len(data):
            raise ValueError("not a valid header")
        fields.append(("number", at, at + width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        fields.append(("text", at, at + length))
        at += length

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        else:
            number(widths[kind])

    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    for _ in range(pairs):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# Bytes and folders


def edit_bytes(random: Random, data: bytes) -> bytes:
    """Change, cut, double or insert bytes, most of them near the beginning, where headers are."""
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        reach = len(result) if random.random() < 0.4 else min(len(result), 4096)
        place, length = random.randint(0, reach), random.choice((1, 1, 2, 4, 8, 100))
        match random.randrange(6):
            case 0:
                result[place : place + 1] = bytes([random.randrange(256)])
            case 1:
                result[place : place + length] = random.choice(NUMBERS[:20]).to_bytes(8, "little")[:length]
            case 2:
                del result[place : place + length]
            case 3:
                result[place:place] = result[place : place + length]
            case 4:
                result[place:place] = random.choice(NAMES).encode(errors="surrogatepass")[:40]
            case _ if random.random() < 0.2:
                del result[place:]
    return bytes(result)


def edit_folder(random: Random, case: Case) -> None:
    """Put something else in the place of a file, or beside the files."""
    name = random.choice(
        [*case, "config.json", "tokenizer.json", "LICENSE", "quantize_config.json", "hf_quant_config.json"]
    )
    name = random.choice(
        (name, name, "model.safetensors", "model-00001-of-00002.safetensors", "m.gguf", "pytorch_model.bin")
    )
    targets = (
        *(f"{OUTSIDE}/{file}" for file in ("model.safetensors", "config.json", "secret", "nothing", "m.gguf")),
        *("/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/environ", "/proc/self/mem", "/dev/stdin"),
        *("config.json", "model.safetensors", name, ".", "..", "../outside", "../outside/secret", "nothing"),
    )
    match random.randrange(6):
        case 0 | 1 | 2:
            case[name] = Link(random.choice(targets))
        case 3:
            case[name] = Special(random.choice(("fifo", "socket", "folder")))
        case 4:
            case.pop(name, None)
        case _:
            case[name] = random.choice(
                (b"", b"{}", b"GGUF", *(data for data in case.values() if isinstance(data, bytes)))
            )


def edit_file(*endings: str, edit: Callable[[Random, bytes], bytes]) -> Mutation:
    """The mutation that edits one of the files with such an ending."""

    def mutate(random: Random, case: Case) -> None:
        names = [name for name, data in case.items() if name.endswith(endings) and isinstance(data, bytes)]
        if names:
            name = random.choice(names)
            data = case[name]
            assert isinstance(data, bytes)
            try:
                case[name] = edit(random, data)
            except Exception:  # an earlier mutation has left nothing that this one understands
                case[name] = edit_bytes(random, data)

    return mutate


def edit_index(random: Random, tree: Any) -> None:
    """Change where an index says that tensors are."""
    files = tree.get("weight_map") if isinstance(tree, dict) else None
    if isinstance(files, dict) and files:
        name = random.choice(list(files))
        files[name] = random.choice((*NAMES, *files.values(), "config.json", "model.safetensors.index.json", "x.bin"))


SAFETENSORS = edit_file(".safetensors", edit=edit_safetensors)
BYTES = edit_file("", edit=edit_bytes)
JSON = edit_file(".json", edit=lambda random, data: edit_json(random, data, change_tree))
CONFIGS = edit_file(
    "config.json", edit=lambda random, data: edit_json(random, data, change_tree, change_config, change_config)
)
INDEXES = edit_file(
    "index.json", edit=lambda random, data: edit_json(random, data, change_tree, edit_index, edit_index)
)
GGUF = edit_file(".gguf", edit=edit_gguf)


def side_file(random: Random, case: Case) -> None:
    """What is said of the quantisation moves to, or comes again in, a file beside the config."""
    name = random.choice(("quantize_config.json", "quant_config.json", "hf_quant_config.json"))
    config: Any = None
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        config = json.loads(case["config.json"])  # type: ignore[arg-type]
    said = config.pop("quantization_config", None) if isinstance(config, dict) else None
    if said and random.random() < 0.7:
        case["config.json"] = json.dumps(config).encode()
    said = {"quantization": said or {"bits": 4}} if name == "hf_quant_config.json" else said or {"bits": 4}
    case[name] = edit_json(random, json.dumps(said).encode(), change_tree, change_config)


def edit_text(random: Random, data: bytes) -> bytes:
    """A number, or a word, becomes an evil one."""
    words = list(re.finditer(rb"\d+" if random.random() < 0.4 else rb"[^\s=\"]+", data))
    word = random.choice(words)
    evil = str(random.choice((*NUMBERS, *NAMES))).encode("utf-8", "surrogatepass")
    return data[: word.start()] + evil + data[word.end() :]


def edit_row(random: Random, data: bytes) -> bytes:
    """One line of JSON is changed."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines) - 1)
    lines[place] = edit_json(random, lines[place], change_tree)
    return b"\n".join(lines)


def rename_file(random: Random, case: Case) -> None:
    """A file goes, or goes under another name."""
    name = random.choice(list(case))
    folder, _, file = name.rpartition("/")
    numbers = [str(random.choice(NUMBERS)) for _ in range(2)]
    new = random.choice(("x.json", f"{numbers[0]}-{numbers[1]}-00000000", file[:-1], f"0{file}", ".part-x"))
    data = case.pop(name)
    if random.random() < 0.7:
        case[f"{folder}/{new}" if folder else new] = data


LISTS = edit_file("list.txt", "list.toml", edit=edit_text)
ROWS = edit_file("rows.jsonl", edit=edit_row)

MUTATIONS: dict[Parser, MutableSequence[Mutation]] = {
    "safetensors": [SAFETENSORS, SAFETENSORS, SAFETENSORS, BYTES],
    "index": [INDEXES, INDEXES, SAFETENSORS, BYTES, edit_folder],
    "gguf": [GGUF, GGUF, GGUF, BYTES],
    "config": [CONFIGS, CONFIGS, CONFIGS, side_file, BYTES],
    "codec": [SAFETENSORS, SAFETENSORS, CONFIGS, CONFIGS, side_file],
    "overlay": [SAFETENSORS, CONFIGS, CONFIGS, BYTES, JSON, edit_folder],
    "folder": [edit_folder, edit_folder, CONFIGS],
    "kept": [JSON, JSON, BYTES, rename_file],
    "cache": [JSON, BYTES, BYTES, rename_file],
    "survey": [LISTS, LISTS, ROWS, ROWS, BYTES],
}


def mutate(random: Random, parser: Parser, files: dict[str, bytes]) -> Case:
    """A case made from a seed's files by one mutation, or a few."""
    case: Case = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if case:
            random.choice(MUTATIONS[parser])(random, case)
    return case
