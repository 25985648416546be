"""Models in folders on this machine."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import ModelUnreadable
from ...progress import Progress
from .source import CONFIG, PICKLES, QUANTIZATION_FILES, Range, list_parts

DEPTH = 3  # of subfolders
MOST_FILES = 10_000  # a model has far fewer; a folder of somebody's whole work may have more
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".npz", *PICKLES)  # a subfolder's are another model
PIPELINE = "model_index.json"  # of diffusers, whose models are parts of one
CACHED, SNAPSHOTS = "models--", "snapshots"  # of the Hub's cache: models--org--name/snapshots/COMMIT
LEVELS = 2  # of folders with folders of models, such as publisher/model


def find_models(folder: Path) -> tuple[Path, ...]:
    """The models below a folder that is not a model itself, ordered by name; () for a model and an empty folder.

    A model is a folder with a config or weights of its own, or one of the Hub's cache. Hidden folders are skipped.
    """
    return () if _is_model(folder) else tuple(_walk(folder, LEVELS))


def _walk(folder: Path, levels: int) -> Iterator[Path]:
    try:
        below = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    except OSError:  # a folder that others keep to themselves
        return
    for path in below:
        if _is_model(path):
            yield path
        elif levels > 1:
            yield from _walk(path, levels - 1)


def _is_model(folder: Path) -> bool:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return False
    own = any(name in (CONFIG, PIPELINE) or name.endswith((*WEIGHTS, ".index.json")) for name in names)
    return own or (os.path.basename(os.path.realpath(folder)).startswith(CACHED) and SNAPSHOTS in names)


class LocalFile:
    """A file on this machine; raises ModelUnreadable where it is not a regular file or can't be opened.

    It is read by `pread` rather than mapped, since the pages of a mapped file stay in the process's resident memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a link may lead to a device, which opening may set to work
                raise ModelUnreadable(f"{path} is not a regular file")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a pipe must not block
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise ModelUnreadable(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ModelUnreadable(f"{path} is not a regular file")
        self.size = status.st_size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); raises ModelUnreadable where the file ends before. Several threads may call it."""
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
    """The files in a local folder, or a single file there with its other parts and the configs beside it.

    Links are followed for reading, since people keep weights in caches, stores and on other disks; `may_copy` tells
    whether what a link leads to may be copied into another folder. `name` is what users call it, by itself its path.
    """

    revision = None
    bytes_fetched = 0

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path if path.is_dir() else path.parent
        self.name, self.folder = name or str(self.path), Path(os.path.realpath(self.path))
        self._named = path  # the user chose this path, which may therefore be any link
        try:
            names = {entry.name for entry in self.path.iterdir() if not entry.is_dir()}
        except OSError as error:
            raise ModelUnreadable(f"{self.path}: {error.strerror}") from None
        beside = {CONFIG, *QUANTIZATION_FILES, *list_parts(path.name)}
        self.files = frozenset(names if path.is_dir() else {path.name} | (names & beside))

    def open(self, filename: str) -> LocalFile:
        """A file of the folder; raises ModelUnreadable where it can't be read."""
        return LocalFile(self.path / filename)

    def may_copy(self, filename: str) -> bool:
        """Whether a file may be copied into a folder that somebody may publish.

        A folder may come from a stranger, and a link in it lead to a private file. Its target must lie in the folder or
        among the blobs of a cache, or else have the same ending, as files in stores and on other disks have.
        """
        path = self.path / filename
        if path == self._named or not path.is_symlink():
            return True
        target = Path(os.path.realpath(path))
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        is_alike = bool(path.suffix) and target.suffix == path.suffix and not target.name.startswith(".")
        return is_blob or is_alike or target.is_relative_to(os.path.realpath(self.path))

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Does nothing, since the bytes are on this machine."""

    def list_files(self) -> frozenset[str]:
        """The files, and those in subfolders, such as "1_Pooling/config.json", that are not weights.

        Neither links to folders nor hidden folders are entered. For a single file, just `files`.
        """
        if not self.path.is_dir() or self._named != self.path:
            return self.files
        names = set(self.files)
        for root, folders, files in os.walk(self.path):
            below = Path(root).relative_to(self.path)
            depth = len(below.parts)
            folders[:] = [name for name in folders if depth < DEPTH and not name.startswith(".")]
            if depth:
                names.update((below / name).as_posix() for name in files if not name.endswith(WEIGHTS))
            if len(names) > MOST_FILES:
                break
        return frozenset(names)
