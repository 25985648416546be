"""Where bytes come from: a file of a local folder here, a file on the Hub in `hub.py`."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import ModelUnreadable
from ..progress import Progress

Range = tuple[int, int]
"""Half-open range of byte offsets in a file."""

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


def is_inside(file: str) -> bool:
    """Whether the name of a file, as others list it, is that of one in the model, or below it."""
    return not (file.startswith("/") or "\\" in file or ".." in file.split("/")) and file.isprintable()


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
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not keep us waiting
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise ModelUnreadable(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ModelUnreadable(f"{path} is not a regular file")
        self.size = status.st_size

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
    """The files of a local folder, or a single file of it with its other parts and the configs beside it.

    A folder may come from a stranger, with links in it. They are followed within the folder and into the blobs of a Hub
    cache, whose snapshots are such links; weights may also be links to other weights, as people share large files.
    """

    revision = None
    bytes_fetched = 0

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        self._named = path  # by the user, who may name what he likes
        try:
            names = {entry.name for entry in self.path.iterdir() if not entry.is_dir()}
        except OSError as error:
            raise ModelUnreadable(f"{self.path}: {error.strerror}") from None
        beside = {"config.json", *QUANTIZATION_FILES, *list_parts(path.name)}
        self.files = frozenset(names if path.is_dir() else {path.name} | (names & beside))

    def open(self, filename: str) -> LocalFile:
        """Raises ModelUnreadable for what is no file, can't be read, or is a link that is not followed."""
        path = self.path / filename
        if path != self._named and path.is_symlink() and not self._is_followed(path):
            raise ModelUnreadable(
                f"{path} is a link out of the model's folder, to {os.path.realpath(path)}",
                "put the file itself there if you trust the model",
            )
        return LocalFile(path)

    def _is_followed(self, link: Path) -> bool:
        target = Path(os.path.realpath(link))
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        is_weights = link.suffix in (".safetensors", ".gguf") and link.suffix == target.suffix
        return is_blob or is_weights or target.is_relative_to(os.path.realpath(self.path))

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
