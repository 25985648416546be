"""The cache on this machine as a whole: what is there, and how it is emptied."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelUnreadable, printable
from ..files import cache_folder
from ..reports import CachePart, MoECache
from ..weights.repositories.range_cache import cache_limit

_TEMPORARY = r"\.part-[a-z0-9_]{8}"


@dataclass(frozen=True, slots=True)
class _Part:
    """A folder in the cache: what is kept there, and how our files are named below it."""

    folder: str
    what: str
    names: str


_PARTS = (
    _Part("ranges", "bytes of models on the Hub", rf"[0-9a-f]{{32}}/(\d+-\d+-[0-9a-f]{{8}}|{_TEMPORARY})"),
    _Part("files", "sizes of files on the Hub", rf"[0-9a-f]{{32}}\.json|{_TEMPORARY}"),
    _Part("refs", "branches of models on the Hub", rf"[0-9a-f]{{32}}\.json|{_TEMPORARY}"),
    _Part("sweeps", "unfinished work", rf"[0-9a-f]{{32}}/(\d+\.(json|data)|{_TEMPORARY})"),
)


def describe_cache(*, clear: bool = False) -> MoECache:
    """What the cache holds; with `clear`, what it held before all that was deleted.

    Files with other names than ours are neither counted nor deleted, since the folder may be used for something else.
    Raises ModelUnreadable where a file can't be deleted.
    """
    folder = cache_folder()
    parts = []
    for part in _PARTS:
        found = list(_own_files(folder / part.folder, part.names))
        parts.append(
            CachePart(folder=part.folder, what=part.what, files=len(found), bytes=sum(size for _, size in found))
        )
        if clear:
            for path, _ in found:
                _delete(path)
            _delete_empty(folder / part.folder)
    return MoECache(
        folder=printable(str(folder)),
        limit=cache_limit(),
        bytes=sum(part.bytes for part in parts),
        parts=tuple(parts),
        cleared=clear,
    )


def _own_files(folder: Path, names: str) -> Iterator[tuple[Path, int]]:
    """Our files below a folder, with their bytes."""
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        if re.fullmatch(names, path.relative_to(folder).as_posix()):
            with suppress(OSError):  # another process may have deleted it
                yield path, path.lstat().st_size


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ModelUnreadable(f"can't delete {path}: {error.strerror}") from None


def _delete_empty(folder: Path) -> None:
    """Delete the folders below that are empty, and this one if it is then."""
    for path in [*folder.glob("*"), folder]:
        with suppress(OSError):  # not empty, or no folder
            path.rmdir()
