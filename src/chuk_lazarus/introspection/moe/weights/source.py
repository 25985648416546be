"""Where bytes come from: a file of a local folder here, a file on the Hub in `hub.py`."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import ModelUnreadable

Range = tuple[int, int]
"""Half-open range of byte offsets in a file."""

Progress = Callable[[str, int, int], None]
"""Told of work as it goes on: (what, done, total)."""


def unwatched(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What ModelOpt, AutoGPTQ and AutoAWQ say of the quantisation where config.json says nothing."""

MAX_PARTS = 1000  # of a split GGUF file
DEMO_MODELS = ("upcycled", "native", "permuted", "parent")
DEMO_FOLDER = Path(__file__).parents[3] / "demo"


def list_parts(file: str) -> list[str]:
    """The names of all parts of the GGUF file that `file` is a part of; itself alone where it is not split."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file)
    if not match or not 0 < int(match[2]) <= MAX_PARTS:
        return [file]
    return [f"{match[1]}-{number:05}-of-{match[2]}.gguf" for number in range(1, int(match[2]) + 1)]


class ByteSource(Protocol):
    """One file, read by byte ranges."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


class Repository(Protocol):
    """The files of one model."""

    @property
    def revision(self) -> str | None: ...

    @property
    def files(self) -> frozenset[str]: ...

    @property
    def bytes_fetched(self) -> int:
        """How many bytes have come over a network so far."""
        ...

    def open(self, filename: str) -> ByteSource: ...

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Bring the wanted ranges of each file near, so that reading them is quick."""


class LocalFile:
    """A file on this machine.

    Read with `pread` and not mapped: the pages of a mapped file stay in the process's resident memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise ModelUnreadable(f"{path}: {error.strerror}") from None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); safe to call from several threads. Raises ModelUnreadable when the file ends
        early."""
        parts: list[bytes] = []
        while start < stop:
            try:
                part = os.pread(self._descriptor, stop - start, start)
            except OSError as error:
                raise ModelUnreadable(f"{self.path}: {error.strerror}") from None
            if not part:
                raise ModelUnreadable(f"{self.path} ends at byte {start}, {stop - start} bytes too early")
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Folder:
    """The files of a local folder, or a single file of it with its other parts and the configs beside it."""

    revision = None
    bytes_fetched = 0

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        try:
            names = {entry.name for entry in self.path.iterdir() if not entry.is_dir()}
        except OSError as error:
            raise ModelUnreadable(f"{self.path}: {error.strerror}") from None
        beside = {"config.json", *QUANTIZATION_FILES, *list_parts(path.name)}
        self.files = frozenset(names if path.is_dir() else {path.name} | (names & beside))

    def open(self, filename: str) -> LocalFile:
        return LocalFile(self.path / filename)

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Nothing to do: the bytes are here."""


def find_repository(model: str) -> Repository:
    """The repository that the user means by `model`.

    `demo:NAME` is an embedded model; then an existing folder or file; then a Hub id, `org/name` or `org/name@revision`,
    or a GGUF file of it, `org/name/path/file.gguf`. Raises ModelUnreadable when it is none of these.
    """
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name not in DEMO_MODELS:
            known = ", ".join(f"demo:{known}" for known in DEMO_MODELS)
            raise ModelUnreadable(f"there is no embedded model {model}", f"there are {known}")
        return Folder(DEMO_FOLDER / name)
    path = Path(model)
    try:
        path = path.expanduser()
        found = bool(model) and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, nobody's home, a NUL
        found = False
    if found:
        return Folder(path.parent if path.name.endswith(".safetensors.index.json") else path)
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([^@]+\.gguf))?(?:@([\w./-]+))?", model)
    if match and not match[1].endswith((".safetensors", ".gguf")):
        from .hub import HubRepository

        return HubRepository(match[1], match[3], match[2])
    raise ModelUnreadable(
        f"{model}: no such folder or file" if model else "no model was given",
        "give a folder, a .safetensors or .gguf file, a Hub id such as org/name, or demo:upcycled",
    )
