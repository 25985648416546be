"""A checkpoint: which tensors it has, in which files they lie, and their rows.

Two containers are read, safetensors and GGUF; tensors lie row-major and little-endian in both. Headers of safetensors
files are read one file at a time, when first asked.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable, UnknownFormat
from ..progress import Progress
from . import gguf
from .model_config import QUANTIZATION_KEYS, nested_objects, read_quantization
from .repositories.source import QUANTIZATION_FILES, ByteSource, Range, Repository, is_inside, list_parts
from .safetensors_header import parse_json_object, read_header
from .tensor_info import DTYPES, MAX_HEADER, TensorInfo, check_name

__all__ = ["DTYPES", "INDEX", "QUANTIZATION_KEYS", "Checkpoint", "TensorInfo", "find_weight_files"]

INDEX = "model.safetensors.index.json"
_LORA = re.compile(r"(?P<stem>.+?)[.]lora_[aAbB](?:[.].+)?")
_RANK = re.compile(r"-TP-\d+\.safetensors$")  # a file of one tensor parallel rank, as Grok-2 has them


class Checkpoint:
    """The tensors of a model, read row by row.

    `names` are all its tensors, `config` is its `config.json` ({} without one), with what a file beside it says of the
    quantisation where it says nothing, or what a GGUF file says in its place, `config_file` the file that says it;
    `bytes_read` counts every byte asked of the repository. Raises ModelUnreadable for a broken index, header or config,
    InvalidRequest where the repository holds several models, UnknownFormat where it holds an adapter.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._sources: dict[str, ByteSource] = {}
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        files = [] if INDEX in repository.files else find_weight_files(repository.files)
        self.config_file = "config.json"
        if files and files[0].endswith(".gguf"):
            self.config_file = files[0]
            self.config, self._headers = gguf.read_model({file: self._source(file) for file in files})
        else:
            self.config = self._read_config()
        self._files = self._read_headers(files) if files else self._read_index()
        self.names = tuple(self._files)
        if not self.names:
            raise ModelUnreadable("the model's files hold no tensors", "download it again")
        if self._is_adapter():
            raise UnknownFormat(
                "this is a LoRA adapter: it holds changes to a model's weights, and not the weights",
                "give the merged model, or the one that the adapter is for",
            )

    @property
    def files(self) -> set[str]:
        """The files that hold its tensors."""
        return {file for files in self._files.values() for file in files}

    @property
    def is_gguf(self) -> bool:
        return self.config_file.endswith(".gguf")

    @property
    def is_split(self) -> bool:
        """Whether tensors are cut into slices, each in a file of its own."""
        return any(len(files) > 1 for files in self._files.values())

    def info(self, name: str) -> TensorInfo:
        """Where the tensor, or the first slice of it, lies; reads the header of its file if need be."""
        return self._find(name, self._files[name][0])

    def slices(self, name: str) -> tuple[TensorInfo, ...]:
        """Where the slices lie that the tensor is cut into; nearly always it is one."""
        return tuple(self._find(name, file) for file in self._files[name])

    def _find(self, name: str, file: str) -> TensorInfo:
        try:
            return self.header(file)[name]
        except KeyError:
            raise ModelUnreadable(
                f"{INDEX} says that {name} is in {file}, and it is not", "download it again"
            ) from None

    def is_at_hand(self, name: str) -> bool:
        """Whether the header that describes the tensor has been read already."""
        return self._files[name][0] in self._headers

    def header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of one file."""
        if file not in self._headers:
            self._headers[file] = read_header(file, self._source(file))
        return self._headers[file]

    def rows(self, info: TensorInfo, start: int, stop: int, leading: int = 1) -> NDArray[Any]:
        """Rows [start, stop) of a tensor whose first `leading` axes are seen as one.

        The dtype is the stored one; elements that share bytes come as these bytes, uint8 [rows, bytes].
        """
        dtype = _element(info)
        low, high = self.row_range(info, start, stop, leading)
        if high > info.stop:
            raise ModelUnreadable(f"{info.name} has fewer rows than the other tensors of its expert call for")
        data = np.frombuffer(self._source(info.file).read(low, high), dtype)
        return data.reshape(stop - start, -1) if info.packed else data.reshape(stop - start, *info.shape[leading:])

    def whole(self, info: TensorInfo) -> NDArray[Any]:
        """A tensor as it is; for small ones."""
        data = self._source(info.file).read(info.start, info.stop)
        return np.frombuffer(data, _element(info)).reshape(-1 if info.packed else info.shape)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of a tensor as they are stored, whatever its dtype, at most `size` at a time."""
        info = self.info(name)
        source = self._source(info.file)
        for start in range(info.start, info.stop, size):
            yield source.read(start, min(start + size, info.stop))

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
            self._sources[file] = _Counted(self.repository.open(file), self._count)
        return self._sources[file]

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def _json(self, file: str) -> dict[str, Any]:
        source = self._source(file)
        if source.size > MAX_HEADER:
            raise ModelUnreadable(f"{file} is {source.size:,} bytes long, far more than such a file can be")
        return parse_json_object(source.read(0, source.size), file)

    def _read_config(self) -> dict[str, Any]:
        """config.json, with `quantization_config` as it holds for these weights."""
        config = self._json("config.json") if "config.json" in self.repository.files else {}
        own = config.get("quantization")
        if isinstance(own, dict) and {"bits", "group_size"} <= own.keys() and "quantization_config" in config:
            # MLX's; the other may be that of the model it was converted from, whose format is gone
            return {**config, "quantization_config": own}
        said = (part.get(key) for part in nested_objects(config) for key in QUANTIZATION_KEYS)
        if any(isinstance(one, dict) and one for one in said):
            return config
        for file in QUANTIZATION_FILES:
            if file in self.repository.files and (found := read_quantization(file, self._json(file))):
                return {**config, "quantization_config": found}
        return config

    def _is_adapter(self) -> bool:
        """Whether there are LoRA's factors of a weight, and not the weight; a model may have adapters beside it."""
        match = next((match for name in self.names if ".lora_" in name and (match := _LORA.fullmatch(name))), None)
        if match is None:
            return False
        stem, below = match["stem"], f"{match['stem']}."
        return stem not in self._files and not any(
            name.startswith(below) and ".lora_" not in name and not name.endswith(".bias") for name in self.names
        )

    def _read_headers(self, files: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Which file each tensor is in, or which files hold its slices: those of tensor parallel ranks do."""
        places: dict[str, tuple[str, ...]] = {}
        for file in files:
            for name in self.header(file):
                if name in places and not (_RANK.search(file) and _RANK.search(places[name][0])):
                    raise ModelUnreadable(
                        f"{name} is in {places[name][0]} and in {file}",
                        "give one of the files, or one copy of the model",
                    )
                places[name] = (*places.get(name, ()), file)
        return places

    def _read_index(self) -> dict[str, tuple[str, ...]]:
        files = self._json(INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ModelUnreadable(f"{INDEX} has no weight_map of names to files")
        for name in files:
            check_name(name, INDEX)
        for file in set(files.values()):
            if not is_inside(file):
                raise ModelUnreadable(f"{INDEX} names a file outside of the model: {file}", "do not trust this model")
            if not file.endswith(".safetensors"):
                raise ModelUnreadable(f"{INDEX} names {file}, which is not a safetensors file")
            if file not in self.repository.files:
                raise ModelUnreadable(f"{file} is missing, and {INDEX} names it", "download the rest of the model")
        return {name: (file,) for name, file in files.items()}


class _Counted:
    """A source that tells how much is read of it."""

    def __init__(self, source: ByteSource, count: Callable[[int], None]) -> None:
        self._source = source
        self._count = count

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, start: int, stop: int) -> bytes:
        self._count(stop - start)
        return self._source.read(start, stop)


def _element(info: TensorInfo) -> np.dtype[Any]:
    """The numpy type of a tensor's elements, bytes for packed ones; raises UnknownFormat where there is none."""
    if info.packed:
        return DTYPES["U8"]
    if info.dtype not in DTYPES:
        raise UnknownFormat(f"{info.name} has elements of type {info.dtype}, which we can't decode")
    return DTYPES[info.dtype]


def find_weight_files(files: frozenset[str]) -> list[str]:
    """The files that make up a model without an index: safetensors ones, or else the parts of a GGUF.

    Raises ModelUnreadable when there is none or one is missing, InvalidRequest when there are several GGUFs.
    """
    weights = sorted(file for file in files if file.endswith(".safetensors"))
    if "model.safetensors" in weights:
        return ["model.safetensors"]
    if not weights:
        if ggufs := sorted(file for file in files if file.endswith(".gguf")):
            return _find_gguf(ggufs)
        if pickles := sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))):
            raise ModelUnreadable(
                f"the model has only {pickles[0]}: a pickle, which can run code when it is opened, so we do not",
                "use a safetensors version of the model, or convert it",
            )
        raise ModelUnreadable(
            "there is no safetensors or GGUF file in the model", "give the folder that holds the weights"
        )
    # Mistral's repositories hold a second copy of the weights under this name
    shards = [file for file in weights if not file.startswith("consolidated")] or weights
    numbered = [match for file in shards if (match := re.search(r"-(\d{1,9})-of-(\d{1,9})\.safetensors$", file))]
    if len(shards) > 1 and numbered:  # a single shard may be all that the user asked for
        count, found = int(numbered[0][2]), {int(match[1]) for match in numbered}
        if missing := next((number for number in range(1, count + 1) if number not in found), None):
            raise ModelUnreadable(f"shard {missing} of {count} is missing", "download the rest of the model")
    return shards


def _find_gguf(files: list[str]) -> list[str]:
    """The parts of the only model among these GGUF files."""
    # the projector of a vision model, and the statistics that a quantisation was made with, lie beside a model
    beside = re.compile(r".*mmproj.*|(.*[-._])?imatrix(_unsloth)?[.]gguf")
    models = [file for file in files if not beside.fullmatch(file.rpartition("/")[2].lower())] or files
    sets = list(dict.fromkeys(tuple(list_parts(file)) for file in models))
    if len(sets) > 1:
        firsts = [parts[0] for parts in sets]
        listing = ", ".join(firsts[:20]) + (f" and {len(firsts) - 20} more" if len(firsts) > 20 else "")
        raise InvalidRequest(
            f"there are {len(firsts)} GGUF models: {listing}",
            f"name one of them behind the folder or the Hub id: .../{firsts[0]}",
        )
    if missing := next((part for part in sets[0] if part not in files), None):
        raise ModelUnreadable(f"{missing} is missing", "download the rest of the model")
    return list(sets[0])
