"""The GGUF container of llama.cpp: metadata, a table of the tensors, then the tensors' bytes.

We read versions 2 and 3 in little-endian order (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A model may
be split into parts named "-00001-of-00003.gguf", each a complete file with `split.*` in its metadata.
"""

import struct
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

from ..errors import ModelUnreadable, UnknownFormat
from .codecs.refused import IK_LLAMA
from .repositories.source import LFS, ByteSource, refuse_pointer
from .tensor_info import MAX_HEADER, MAX_NAME, TensorInfo, check_apart, check_name

PIECE = 2**20  # bytes of a header that are read at once; the first read is a quarter of them
MAX_METADATA = 4096  # keys
MAX_TENSORS = 200_000
MAX_ITEMS = 1024  # longer arrays, such as a vocabulary, are skipped
MAX_STRING = 65_535  # bytes; longer values are skipped
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "attention.head_count": "num_attention_heads",
}
"""Keys of the metadata, which follow the architecture's name there, and the keys of a config.json."""

SCORING = {1: "softmax", 2: "sigmoid"}
ACTIVATIONS = {
    "gemma4": "gelu_pytorch_tanh",
    "grok": "gelu",
    "nemotron_h_moe": "relu2",
    "nomic-bert-moe": "gelu",
    "smallthinker": "relu",
}
"""The architectures whose experts have another activation than silu, which is not in the metadata."""


# ik_llama.cpp's own types, by their numbers (gguf-py/gguf/constants.py of ik_llama.cpp)
_IK_TYPES = {
    36: "I2_S", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K",
    140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 147: "Q8_K16", 148: "Q8_K32",
    149: "Q8_KR8", 150: "Q8_K128", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT",
    156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4",
    211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4",
    218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8",
    229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4",
    339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip


def read_model(sources: Mapping[str, ByteSource]) -> tuple[dict[str, Any], dict[str, dict[str, TensorInfo]]]:
    """The config of a model, and the tensors in each of the files that make it up.

    Raises ModelUnreadable for files that are broken or do not belong together, UnknownFormat for another version.
    """
    first: dict[str, Any] = {}
    headers: dict[str, dict[str, TensorInfo]] = {}
    owner: dict[str, str] = {}
    for file, source in sources.items():
        metadata, tensors = read_header(file, source)
        first = first or metadata
        count = metadata.get("split.count", 0)
        if count not in (0, len(sources)):
            raise ModelUnreadable(
                f"{file} says that it is one of {str(count)[:20]} parts, but {len(sources)} are here",
                "put all parts into one folder, under the names they were published with",
            )
        for name in tensors:
            if name in owner:
                raise ModelUnreadable(f"{name} is in both {owner[name]} and {file}", "download the model again")
            owner[name] = file
        headers[file] = tensors
    total = first.get("split.tensors.count", len(owner))
    if total != len(owner):
        raise ModelUnreadable(
            f"the model has {len(owner)} tensors, but says that it has {str(total)[:20]}", "download it again"
        )
    kind = str(first.get("general.type", "model"))
    if kind != "model":
        raise ModelUnreadable(f"{next(iter(sources))} holds no model: it says that it is of type {kind[:100]}")
    return make_config(first), headers


def make_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a model under the keys of a `config.json` on the Hub."""
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {"quantization_config": {"quant_method": "gguf"}}
    if not isinstance(architecture, str):
        return config

    def number(key: str) -> int:
        value = metadata.get(f"{architecture}.{key}")
        return value if type(value) is int and value > 0 else 0

    config["model_type"] = architecture
    config |= {word: number(key) for key, word in CONFIG_KEYS.items() if number(key)}
    heads = metadata.get(f"{architecture}.attention.head_count")
    if isinstance(heads, list):  # of each layer
        config["num_attention_heads"] = heads
    if number("nextn_predict_layers") < number("block_count"):  # the last blocks are for multi-token prediction
        config["num_hidden_layers"] = number("block_count") - number("nextn_predict_layers")
    if scoring := SCORING.get(number("expert_gating_func")):
        config["scoring_func"] = scoring
    normalised = metadata.get(f"{architecture}.expert_weights_norm")
    if isinstance(normalised, bool):
        config["norm_topk_prob"] = normalised
    if architecture in ACTIVATIONS:
        config["hidden_act"] = ACTIVATIONS[architecture]
    return config


def read_header(file: str, source: ByteSource) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata of a file, without long arrays and texts, and its tensors.

    Raises ModelUnreadable for a header that is broken or does not fit the file, UnknownFormat for another version.
    """
    reader = _Reader(file, source)
    magic, version, tensor_count, metadata_count = reader.unpack("<4sIQQ") if source.size >= 24 else (b"", 0, 0, 0)
    if magic != b"GGUF":
        refuse_pointer(file, source.read(0, min(source.size, len(LFS))))
        raise ModelUnreadable(f"{file} is not a GGUF file", "it is truncated or of another format: download it again")
    if version & 0xFFFF == 0:
        raise UnknownFormat(f"{file} is a GGUF file in big-endian byte order, which we can't read")
    if version not in (2, 3):
        raise UnknownFormat(f"{file} has GGUF version {version}, but we read only 2 and 3", "convert the model again")
    for count, limit, what in ((tensor_count, MAX_TENSORS, "tensors"), (metadata_count, MAX_METADATA, "metadata")):
        if count > limit:
            raise reader.broken(f"announces {count:,} {what}")
    metadata: dict[str, Any] = {}
    keys: set[str] = set()
    for _ in range(metadata_count):
        key = reader.name()
        if key in keys:
            raise reader.broken(f"has {key} twice")
        keys.add(key)
        if (value := reader.value(key)) is not None:
            metadata[key] = value
    entries = [reader.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.broken("has a general.alignment that is not valid")
    return metadata, _place(reader, entries, -(-reader.position // alignment) * alignment, alignment)


_Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's name, its shape in numpy's order, the number of its type, and its offset in the data."""


def _place(reader: "_Reader", entries: list[_Entry], data_start: int, alignment: int) -> dict[str, TensorInfo]:
    """The tensors with their places in the file, all of which are checked."""
    size = reader.source.size
    starts = sorted({offset for _, _, _, offset in entries})
    next_start = dict(pairwise([*starts, size - data_start]))
    tensors: dict[str, TensorInfo] = {}
    for name, shape, number, offset in entries:
        check_name(name, reader.file)
        if name in tensors:
            raise reader.broken(f"has {name} twice")
        if offset % alignment:
            raise reader.broken(f"has {name} at {offset:,}, which is not a multiple of {alignment}")
        unknown = f"{IK_LLAMA}{_IK_TYPES[number]}" if number in _IK_TYPES else f"GGML type {number}"
        dtype, block, block_bytes = _types().get(number, (unknown, 0, 0))
        columns = shape[-1] if shape else 1
        if block and columns % block:
            raise reader.broken(f"has {name} as {dtype}, in blocks of {block}, with rows of {columns:,}")
        # a tensor of a type that we don't know reaches to the next tensor
        length = prod(shape) // block * block_bytes if block else max(next_start[offset] - offset, 0)
        start, stop = data_start + offset, data_start + offset + length
        if stop > size:
            raise ModelUnreadable(
                f"{reader.file}: {name} ends at byte {stop:,}, but the file ends at {size:,}",
                "the file is truncated or broken: download it again",
            )
        tensors[name] = TensorInfo(name, dtype, shape, reader.file, start, stop, packed=block > 1)
    check_apart(tensors.values(), reader.file)
    return tensors


@cache
def _types() -> dict[int, tuple[str, int, int]]:
    """The name of each type, by its number, and the elements and bytes of a block of it."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class _Reader:
    """Reads a header from its beginning, a piece of the file at a time."""

    def __init__(self, file: str, source: ByteSource) -> None:
        self.file = file
        self.source = source
        self._data = b""
        self._start = 0  # the offset of the piece in the file
        self._at = 0  # the offset in the piece; it may lie beyond the end of the piece once something was skipped

    @property
    def position(self) -> int:
        return self._start + self._at

    def broken(self, why: str) -> ModelUnreadable:
        return ModelUnreadable(f"{self.file}: the header {why}", "the file is truncated or broken: download it again")

    def unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        self._need(size)
        values = struct.unpack_from(form, self._data, self._at)
        self._at += size
        return values

    def name(self) -> str:
        """The name that follows: a metadata key or a tensor's name."""
        (length,) = self.unpack("<Q")
        if length > MAX_NAME:
            raise self.broken(f"has a name of {length:,} bytes")
        return self._text(length)

    def value(self, key: str) -> Any:
        """The value of a metadata key; None for long texts and arrays, which are skipped."""
        (kind,) = self.unpack("<I")
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self.unpack(f"<{SCALARS[kind]}")[0]
        if kind != ARRAY:
            raise self.broken(f"has {key} as a value of type {kind}, which does not exist")
        kind, count = self.unpack("<IQ")
        if kind == STRING:
            if count <= MAX_ITEMS:
                return [self._string() for _ in range(count)]
            return self._skip_strings(count)
        if kind not in SCALARS:
            raise self.broken(f"has {key} as an array of values of type {kind}, which does not exist")
        if count <= MAX_ITEMS:
            return list(self.unpack(f"<{count}{SCALARS[kind]}"))
        return self._skip(count * struct.calcsize(f"<{SCALARS[kind]}"))

    def tensor(self) -> _Entry:
        """The entry of the tensors' table that follows."""
        name = self.name()
        (dimensions,) = self.unpack("<I")
        if dimensions > MAX_DIMENSIONS:
            raise self.broken(f"has {name} with {dimensions:,} dimensions")
        *shape, kind, offset = self.unpack(f"<{dimensions}QIQ")
        if max(*shape, prod(shape), offset) >= 2**62:
            raise self.broken(f"has {name} with a shape or an offset that is not valid")
        return name, tuple(reversed(shape)), kind, offset

    def _string(self) -> str | None:
        (length,) = self.unpack("<Q")
        if length <= MAX_STRING:
            return self._text(length)
        self._skip(length)
        return None

    def _text(self, length: int) -> str:
        self._need(length)
        self._at += length
        return self._data[self._at - length : self._at].decode(errors="replace")

    def _skip(self, length: int) -> None:
        self._at += length
        self._need(0)

    def _skip_strings(self, count: int) -> None:
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._need(8)
            data, at, last = self._data, self._at, len(self._data) - 8
            while count and at <= last:
                at += 8 + unpack(data, at)[0]
                count -= 1
            self._at = at
        self._need(0)

    def _need(self, length: int) -> None:
        """Make the piece reach over the next `length` bytes.

        Raises ModelUnreadable where the file ends before them, or the header is longer than MAX_HEADER.
        """
        if self._at + length <= len(self._data):
            return
        position = self.position
        if position + length > self.source.size:
            raise self.broken(f"ends at byte {position + length:,}, but the file ends at {self.source.size:,}")
        if position + length > MAX_HEADER:
            raise self.broken(f"is longer than {MAX_HEADER:,} bytes")
        if length:
            ahead = PIECE if self._data else PIECE // 4
            rest = self._data[self._at :]
            end = position + len(rest)
            data = self.source.read(end, min(max(position + length, end + ahead), self.source.size))
            self._data, self._start, self._at = rest + data, position, 0
