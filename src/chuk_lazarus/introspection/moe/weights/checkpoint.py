"""A checkpoint: which tensors it has, in which files they lie, and their rows.

The container is safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes, row-major and
little-endian (https://github.com/huggingface/safetensors#format). Headers are read one file at a time, when first
asked.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable, UnknownFormat
from .source import ByteSource, Progress, Range, Repository

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the safetensors library's own limit

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

PACKED = frozenset({"F4"})
"""Types whose elements share bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `start` and `stop` are byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Checkpoint:
    """The tensors of a model, read row by row.

    `names` are all its tensors, `config` is its `config.json` ({} without one), `bytes_read` counts every byte asked
    of the repository. Raises ModelUnreadable for a broken index, header or config.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._sources: dict[str, ByteSource] = {}
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self.config = self._json("config.json") if "config.json" in repository.files else {}
        if INDEX in repository.files:
            self._files = self._read_index()
        else:
            self._files = {name: file for file in find_weight_files(repository.files) for name in self.header(file)}
        self.names = tuple(self._files)
        if not self.names:
            raise ModelUnreadable("the model's files hold no tensors", "download it again")

    def info(self, name: str) -> TensorInfo:
        """Where the tensor lies; reads the header of its file if need be."""
        file = self._files[name]
        try:
            return self.header(file)[name]
        except KeyError:
            raise ModelUnreadable(
                f"{INDEX} says that {name} is in {file}, and it is not", "download it again"
            ) from None

    def header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of one file."""
        if file not in self._headers:
            source = self._source(file)
            self._headers[file] = self._read_header(file, source)
        return self._headers[file]

    def rows(self, name: str, start: int, stop: int, leading: int = 1) -> NDArray[Any]:
        """Rows [start, stop) of a tensor whose first `leading` axes are seen as one.

        The dtype is the stored one; elements that share bytes come as these bytes, uint8 [rows, bytes].
        """
        info = self.info(name)
        dtype = _element(info)
        low, high = self.row_range(info, start, stop, leading)
        if high > info.stop:
            raise ModelUnreadable(f"{name} has fewer rows than the other tensors of its expert call for")
        data = np.frombuffer(self._read(self._source(info.file), low, high), dtype)
        return (
            data.reshape(stop - start, -1)
            if info.dtype in PACKED
            else data.reshape(stop - start, *info.shape[leading:])
        )

    def whole(self, name: str) -> NDArray[Any]:
        """A tensor as it is; for small ones."""
        info = self.info(name)
        data = self._read(self._source(info.file), info.start, info.stop)
        return np.frombuffer(data, _element(info)).reshape(-1 if info.dtype in PACKED else info.shape)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of a tensor as they are stored, whatever its dtype, at most `size` at a time."""
        info = self.info(name)
        source = self._source(info.file)
        for start in range(info.start, info.stop, size):
            yield self._read(source, start, min(start + size, info.stop))

    @staticmethod
    def row_range(info: TensorInfo, start: int, stop: int, leading: int = 1) -> Range:
        """The byte offsets, in the tensor's file, of its rows [start, stop)."""
        row_bytes = info.nbytes // max(1, prod(info.shape[:leading]))
        return info.start + start * row_bytes, info.start + stop * row_bytes

    def prefetch(self, ranges: Iterable[tuple[str, Range]], progress: Progress) -> None:
        """Bring byte ranges, each with its file's name, near."""
        wanted: dict[str, list[Range]] = {}
        for file, span in ranges:
            wanted.setdefault(file, []).append(span)
        self.repository.prefetch(wanted, progress)

    def _source(self, file: str) -> ByteSource:
        if file not in self._sources:
            self._sources[file] = self.repository.open(file)
        return self._sources[file]

    def _read(self, source: ByteSource, start: int, stop: int) -> bytes:
        with self._lock:
            self.bytes_read += stop - start
        return source.read(start, stop)

    def _json(self, file: str) -> dict[str, Any]:
        source = self._source(file)
        if source.size > MAX_HEADER:
            raise ModelUnreadable(f"{file} is {source.size:,} bytes long, far more than such a file can be")
        return parse_json_object(self._read(source, 0, source.size), file)

    def _read_index(self) -> dict[str, str]:
        files = self._json(INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ModelUnreadable(f"{INDEX} has no weight_map of names to files")
        for file in set(files.values()):
            if file.startswith("/") or "\\" in file or ".." in file.split("/") or "\0" in file:
                raise ModelUnreadable(f"{INDEX} names a file outside of the model: {file}", "do not trust this model")
            if not file.endswith(".safetensors"):
                raise ModelUnreadable(f"{INDEX} names {file}, which is not a safetensors file")
            if file not in self.repository.files:
                raise ModelUnreadable(f"{file} is missing, and {INDEX} names it", "download the rest of the model")
        return files

    def _read_header(self, file: str, source: ByteSource) -> dict[str, TensorInfo]:
        if source.size < 8:
            raise ModelUnreadable(f"{file} is {source.size} bytes long: not a safetensors file", "download it again")
        length = int.from_bytes(self._read(source, 0, 8), "little")
        if length > source.size - 8:
            hint = "it is cut short or not a safetensors file: download it again"
            raise ModelUnreadable(f"{file} announces a header of {length:,} bytes and has {source.size:,}", hint)
        if length > MAX_HEADER:
            raise ModelUnreadable(f"{file} announces a header of {length:,} bytes; {MAX_HEADER:,} is the limit")
        entries = parse_json_object(self._read(source, 8, 8 + length), f"the header of {file}")
        entries.pop("__metadata__", None)
        return parse_entries(entries, file, 8 + length, source.size)


def _element(info: TensorInfo) -> np.dtype[Any]:
    """The numpy type of a tensor's elements, bytes for packed ones; raises UnknownFormat where there is none."""
    if info.dtype in PACKED:
        return DTYPES["U8"]
    if info.dtype not in DTYPES:
        raise UnknownFormat(f"{info.name} has elements of type {info.dtype}, which we can't decode")
    return DTYPES[info.dtype]


def find_weight_files(files: frozenset[str]) -> list[str]:
    """The safetensors files that make up a model without an index; raises ModelUnreadable when there is none."""
    weights = sorted(file for file in files if file.endswith(".safetensors"))
    if "model.safetensors" in weights:
        return ["model.safetensors"]
    if not weights:
        if pickles := sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))):
            raise ModelUnreadable(
                f"the model has only {pickles[0]}: a pickle, which can run code when it is opened, so we do not",
                "use a safetensors version of the model, or convert it",
            )
        if ggufs := sorted(file for file in files if file.endswith(".gguf")):
            raise UnknownFormat(f"{ggufs[0]}: GGUF is not read yet", "use a safetensors version of the model")
        raise ModelUnreadable("there is no safetensors file in the model", "give the folder that holds the weights")
    # Mistral's repositories hold a second copy of the weights under this name
    shards = [file for file in weights if not file.startswith("consolidated")] or weights
    numbered = [match for file in shards if (match := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file))]
    if len(shards) > 1 and numbered:  # a single shard may be all that the user asked for
        count = int(numbered[0][2])
        if missing := sorted(set(range(1, count + 1)) - {int(match[1]) for match in numbered}):
            raise ModelUnreadable(f"shard {missing[0]} of {count} is missing", "download the rest of the model")
    return shards


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; raises ModelUnreadable, naming `what`, for anything else, duplicate keys included."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:200]
        raise ModelUnreadable(f"{what} is not valid JSON: {reason}", "download it again") from None
    if not isinstance(value, dict):
        raise ModelUnreadable(f"{what} is not a JSON object", "download it again")
    return value


def parse_entries(entries: dict[str, Any], file: str, data_start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a safetensors header, checked: offsets in the file, in keeping with the shapes, not
    overlapping."""
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ModelUnreadable(f"{file}: the header's entry for {name} lacks its dtype, shape or offsets") from None
        if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ModelUnreadable(f"{file}: the header's entry for {name} has a dtype, shape or offset that is none")
        if not start <= stop <= size - data_start:
            raise ModelUnreadable(
                f"{file}: {name} ends at byte {data_start + stop:,} and the file at {size:,}",
                "the file is cut short or broken: download it again",
            )
        if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise ModelUnreadable(f"{file}: {name} is {dtype} {list(shape)}, and that is not {stop - start:,} bytes")
        tensors[name] = TensorInfo(name, dtype, shape, file, data_start + start, data_start + stop)
    in_order = sorted((info for info in tensors.values() if info.nbytes), key=lambda info: info.start)
    for before, after in pairwise(in_order):
        if after.start < before.stop:
            raise ModelUnreadable(f"{file}: {before.name} and {after.name} share bytes: the header is broken")
    return tensors
