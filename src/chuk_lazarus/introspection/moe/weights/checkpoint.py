"""A checkpoint: its tensors, the files that they are in, and their rows.

Two containers are read, safetensors and GGUF; in both, tensors are row-major and little-endian. The header of a
safetensors file is read when one of its tensors is first looked up.
"""

import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, ModelUnreadable, UnknownFormat
from ..progress import Progress
from . import gguf
from .model_config import ModelConfig
from .repositories.source import CONFIG, INDEX, PICKLES, ByteSource, Range, Repository, is_inside, list_parts
from .safetensors_header import parse_json_object, read_header
from .tensor_info import DTYPES, MAX_HEADER, TensorInfo, check_name

__all__ = ["DTYPES", "INDEX", "Checkpoint", "TensorInfo", "find_weight_files"]

_LORA = re.compile(r"(?P<stem>.+?)[.]lora_[aAbB](?:[.].+)?")
_RANK = re.compile(r"-TP-\d+\.safetensors$")  # one file for each rank of tensor parallelism, as in Grok-2


class Checkpoint:
    """The tensors of a model, read row by row.

    `names` are all its tensors. `model_config` is its config, and `config_file` the file that this was read from:
    config.json, or a GGUF file, whose metadata are put into the keys of a config.json. `bytes_read` counts the bytes
    read from the repository, and `notes` are sentences for the user on files that are missing or were not read.

    Raises ModelUnreadable for a broken index, header or config, InvalidRequest where the repository holds several
    models, UnknownFormat where it holds an adapter.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.bytes_read = 0
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._sources: dict[str, ByteSource] = {}
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._stated_bytes: int | None = None
        files = [] if INDEX in repository.files else find_weight_files(repository.files)
        self.config_file = CONFIG
        if files and files[0].endswith(".gguf"):
            self.config_file = files[0]
            values, self._headers = gguf.read_model({file: self._source(file) for file in files})
            self.model_config = ModelConfig(values)
        else:
            self.model_config = ModelConfig.read(repository.files, self._json)
        self._files = self._read_headers(files) if files else self._read_index()
        if files and (
            beside := sorted(file for file in repository.files - set(files) if _is_weights_like(file, files))
        ):
            self.notes.append(f"{_list_few(beside)} beside {files[0]} was not read")
        self.names = tuple(self._files)
        if not self.names:
            raise ModelUnreadable("the model's files hold no tensors", "download it again")
        if self._is_adapter():
            raise UnknownFormat(
                "this is a LoRA adapter: it holds changes to a model's weights, not the weights",
                "give the merged model, or the one that the adapter is for",
            )

    @property
    def config(self) -> Mapping[str, Any]:
        """The whole config as one JSON object."""
        return self.model_config.values

    @property
    def files(self) -> set[str]:
        """The files that hold its tensors."""
        return {file for files in self._files.values() for file in files}

    @property
    def is_gguf(self) -> bool:
        return self.config_file.endswith(".gguf")

    @property
    def is_split(self) -> bool:
        """Whether a tensor is cut into slices, each in another file."""
        return any(len(files) > 1 for files in self._files.values())

    def info(self, name: str) -> TensorInfo:
        """The place of a tensor, or of its first slice; reads the header of its file if it is not read yet."""
        return self._find(name, self._files[name][0])

    def slices(self, name: str) -> tuple[TensorInfo, ...]:
        """The places of the slices that a tensor is cut into; nearly always there is only one."""
        return tuple(self._find(name, file) for file in self._files[name])

    def _find(self, name: str, file: str) -> TensorInfo:
        try:
            return self.header(file)[name]
        except KeyError:
            raise ModelUnreadable(
                f"{INDEX} says that {name} is in {file}, but it is not", "download it again"
            ) from None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all tensors, by the headers if all are read, or else by the index; None where neither tells."""
        if all(map(self.is_at_hand, self.names)):
            return self.count_bytes(self.names)
        return self._stated_bytes

    def count_bytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors, by their headers."""
        return sum(info.nbytes for name in names for info in self.slices(name))

    def is_at_hand(self, name: str) -> bool:
        """Whether the header that describes the tensor is read already."""
        return self._files[name][0] in self._headers

    def header(self, file: str) -> dict[str, TensorInfo]:
        """The tensors of one file; raises ModelUnreadable where it is missing."""
        if file not in self._headers:
            if file not in self.repository.files:
                raise ModelUnreadable(f"{file} is missing, although {INDEX} lists it", "download the rest of the model")
            self._headers[file] = read_header(file, self._source(file))
        return self._headers[file]

    def rows(self, info: TensorInfo, start: int, stop: int, leading: int = 1) -> NDArray[Any]:
        """Rows [start, stop) of a tensor, counted over its first `leading` axes taken as one.

        The dtype is the stored one; elements that share bytes come as these bytes, uint8 [rows, bytes]. Raises
        ModelUnreadable where the tensor has fewer rows, UnknownFormat for a dtype that numpy lacks.
        """
        dtype = _element(info)
        low, high = self.row_range(info, start, stop, leading)
        if high > info.stop:
            raise ModelUnreadable(f"{info.name} has too few rows for the other tensors of its expert")
        data = np.frombuffer(self._source(info.file).read(low, high), dtype)
        return data.reshape(stop - start, -1) if info.packed else data.reshape(stop - start, *info.shape[leading:])

    def whole(self, info: TensorInfo) -> NDArray[Any]:
        """A whole tensor in its stored dtype; meant for small ones."""
        data = self._source(info.file).read(info.start, info.stop)
        return np.frombuffer(data, _element(info)).reshape(-1 if info.packed else info.shape)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The stored bytes of a tensor of any dtype, at most `size` at a time."""
        info = self.info(name)
        source = self._source(info.file)
        for start in range(info.start, info.stop, size):
            yield source.read(start, min(start + size, info.stop))

    @staticmethod
    def row_range(info: TensorInfo, start: int, stop: int, leading: int = 1) -> Range:
        """The byte offsets of a tensor's rows [start, stop) in its file."""
        row_bytes = info.nbytes // max(1, prod(info.shape[:leading]))
        return info.start + start * row_bytes, info.start + stop * row_bytes

    def prefetch(self, ranges: Iterable[tuple[str, Range]], progress: Progress) -> None:
        """Fetch byte ranges, each given with its file's name, so that reading them needs no network."""
        wanted: dict[str, list[Range]] = {}
        for file, byte_range in ranges:
            wanted.setdefault(file, []).append(byte_range)
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

    def _is_adapter(self) -> bool:
        """Whether the checkpoint has LoRA factors without the weight that they change.

        A model that has both may be published with an adapter in the same file.
        """
        match = next((match for name in self.names if ".lora_" in name and (match := _LORA.fullmatch(name))), None)
        if match is None:
            return False
        module = match["stem"]
        return module not in self._files and not any(
            name.startswith(f"{module}.") and ".lora_" not in name and not name.endswith(".bias") for name in self.names
        )

    def _read_headers(self, files: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The file that each tensor is in, by name; or the files with its slices, one for each tensor parallel rank."""
        files_of: dict[str, tuple[str, ...]] = {}
        for file in files:
            for name in self.header(file):
                if name in files_of and not (_RANK.search(file) and _RANK.search(files_of[name][0])):
                    raise ModelUnreadable(
                        f"{name} is in both {files_of[name][0]} and {file}",
                        "give one of the files, or one copy of the model",
                    )
                files_of[name] = (*files_of.get(name, ()), file)
        return files_of

    def _read_index(self) -> dict[str, tuple[str, ...]]:
        """The file that each tensor is in, as the index says, whose names are checked."""
        index = self._json(INDEX)
        files, metadata = index.get("weight_map"), index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        self._stated_bytes = total if type(total) is int and total > 0 else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ModelUnreadable(f"{INDEX} has no weight_map of names to files")
        for name in files:
            check_name(name, INDEX)
        for file in set(files.values()):
            if not is_inside(file):
                raise ModelUnreadable(f"{INDEX} lists a file outside the model: {file}", "do not trust this model")
            if not file.endswith(".safetensors"):
                raise ModelUnreadable(f"{INDEX} lists {file}, which is not a safetensors file")
        self._note_files(set(files.values()))
        return {name: (file,) for name, file in files.items()}

    def _note_files(self, named: Collection[str]) -> None:
        """Check the files that an index names against those that are there.

        Some may be missing: what is asked for may be in the others. Raises ModelUnreadable where all are.
        """
        present = {file for file in self.repository.files if file.endswith(".safetensors")}
        missing, others = sorted(set(named) - present), sorted(present - set(named))
        if missing and not present & set(named):
            if others:
                raise ModelUnreadable(
                    f"{INDEX} is stale: it lists {missing[0]}, which is missing, but not {others[0]}, which is there",
                    "download the index again, or remove it",
                )
            raise ModelUnreadable(
                f"{missing[0]} is missing, although {INDEX} lists it", "download the rest of the model"
            )
        if missing:
            count = len(set(named))
            self.notes.append(
                f"{len(missing)} of {count} files are missing, such as {missing[0]}: their layers can't be read"
            )
        if others:
            self.notes.append(f"{_list_few(others)} beside the files of {INDEX} was not read")


class _Counted:
    """A source that reports the number of bytes of each read."""

    def __init__(self, source: ByteSource, count: Callable[[int], None]) -> None:
        self._source = source
        self._count = count

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, start: int, stop: int) -> bytes:
        self._count(stop - start)
        return self._source.read(start, stop)


def _is_weights_like(file: str, read: Sequence[str]) -> bool:
    """Whether a file in the same folder may hold weights in the container of those that were read."""
    return "/" not in file and file.endswith(".safetensors") and read[0].endswith(".safetensors")


def _list_few(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _element(info: TensorInfo) -> np.dtype[Any]:
    """The numpy dtype of a tensor's elements, uint8 for packed ones; raises UnknownFormat where numpy has none."""
    if info.packed:
        return DTYPES["U8"]
    if info.dtype not in DTYPES:
        raise UnknownFormat(f"{info.name} has elements of type {info.dtype}, which we can't decode")
    return DTYPES[info.dtype]


def find_weight_files(files: frozenset[str]) -> list[str]:
    """The files that make up a model without an index: its safetensors files, or else the parts of a GGUF model.

    Raises ModelUnreadable when there are none or one is missing, InvalidRequest when there are several GGUF models.
    """
    weights = sorted(file for file in files if file.endswith(".safetensors"))
    if "model.safetensors" in weights:
        return ["model.safetensors"]
    if not weights:
        if ggufs := sorted(file for file in files if file.endswith(".gguf")):
            return _find_gguf(ggufs)
        if pickles := sorted(file for file in files if file.endswith(PICKLES)):
            raise ModelUnreadable(
                f"the model has only {pickles[0]}: a pickle, which can run code when opened, so we don't read it",
                "use a safetensors version of the model, or convert it",
            )
        raise ModelUnreadable(
            "there is no safetensors or GGUF file in the model", "give the folder that holds the weights"
        )
    # in Mistral's repositories, files of this name are a second copy of the weights
    shards = [file for file in weights if not file.startswith("consolidated")] or weights
    numbered = [match for file in shards if (match := re.search(r"-(\d{1,9})-of-(\d{1,9})\.safetensors$", file))]
    if len(shards) > 1 and numbered:  # the user may have asked for a single shard
        count, present = int(numbered[0][2]), {int(match[1]) for match in numbered}
        if missing := next((number for number in range(1, count + 1) if number not in present), None):
            raise ModelUnreadable(f"shard {missing} of {count} is missing", "download the rest of the model")
    return shards


def _find_gguf(files: list[str]) -> list[str]:
    """The parts of the one model among these GGUF files."""
    # a model may come with the projector of its vision part, and with the statistics that guided its quantisation
    beside = re.compile(r".*mmproj.*|(.*[-._])?imatrix(_unsloth)?[.]gguf")
    models = [file for file in files if not beside.fullmatch(file.rpartition("/")[2].lower())] or files
    sets = list(dict.fromkeys(tuple(list_parts(file)) for file in models))
    if len(sets) > 1:
        firsts = [parts[0] for parts in sets]
        listing = ", ".join(firsts[:20]) + (f" and {len(firsts) - 20} more" if len(firsts) > 20 else "")
        raise InvalidRequest(
            f"there are {len(firsts)} GGUF models: {listing}",
            f"add the name of one to the folder or the Hub id: .../{firsts[0]}",
        )
    if missing := next((part for part in sets[0] if part not in files), None):
        raise ModelUnreadable(f"{missing} is missing", "download the rest of the model")
    return list(sets[0])
