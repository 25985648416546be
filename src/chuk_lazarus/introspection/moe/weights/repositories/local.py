"""Models in folders on this machine."""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import ModelUnreadable
from ...progress import Progress
from .source import CONFIG, QUANTIZATION_FILES, Range, list_parts


class LocalFile:
    """A file on this machine; raises ModelUnreadable where it is not a regular file or can't be opened.

    It is read by `pread` rather than mapped, since the pages of a mapped file stay in the process's resident memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
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

    A folder may come from a stranger and contain links. A link is followed if it leads into the folder, or into the
    blobs of a Hub cache, whose snapshots consist of links. Weights may also be links to other weights, since people
    share large files.
    """

    revision = None
    bytes_fetched = 0

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        self.name, self.folder = str(self.path), Path(os.path.realpath(self.path))
        self._named = path  # the user chose this path, which may therefore be any link
        try:
            names = {entry.name for entry in self.path.iterdir() if not entry.is_dir()}
        except OSError as error:
            raise ModelUnreadable(f"{self.path}: {error.strerror}") from None
        beside = {CONFIG, *QUANTIZATION_FILES, *list_parts(path.name)}
        self.files = frozenset(names if path.is_dir() else {path.name} | (names & beside))

    def open(self, filename: str) -> LocalFile:
        """A file of the folder; raises ModelUnreadable where it can't be read or is a link that is not followed."""
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
        """Does nothing, since the bytes are on this machine."""
