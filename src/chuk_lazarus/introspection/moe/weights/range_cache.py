"""A bounded cache on disk of byte ranges of remote files.

One folder per file version, one file per fetched range, named "start-stop-crc32". Several processes may share it: a
range is written to a temporary name and then renamed, and one whose checksum is wrong counts as not there. No cache
library fits: those for HTTP keep no partial answers, and diskcache unpickles what it finds.
"""

import contextlib
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ..errors import InvalidRequest, ModelUnreadable
from .source import Range

DEFAULT_LIMIT = "20GB"
STALE = 24 * 3600  # seconds after which a temporary file is nobody's any more

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_folder() -> Path:
    """$LAZARUS_CACHE, or chuk-lazarus in the user's cache folder."""
    if own := os.environ.get("LAZARUS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chuk-lazarus"


def cache_limit() -> int:
    """$LAZARUS_CACHE_LIMIT in bytes, such as 500MB or 20GB."""
    text = os.environ.get("LAZARUS_CACHE_LIMIT") or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise InvalidRequest(f"LAZARUS_CACHE_LIMIT is {text!r}, which is no size", "write it like 500MB or 20GB")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a file that is in the cache."""

    start: int
    stop: int
    path: Path


class RangeCache:
    """Byte ranges of files, found by a key that names a file's version.

    `limit` bytes are kept, the least recently used ranges go first; what this object has written or read stays, so that
    a job larger than the limit still ends.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "ranges"
        self.limit = limit
        self._segments: dict[str, list[Segment]] = {}
        self._used: set[Path] = set()
        self._lock = Lock()

    def missing(self, key: str, ranges: Iterable[Range]) -> list[Range]:
        """What of the ranges is not in the cache, in order and without overlaps."""
        gaps: list[Range] = []
        segments = self._of(key)
        for start, stop in merge(ranges):
            for segment in segments:
                if segment.stop <= start or segment.start >= stop:
                    continue
                if segment.start > start:
                    gaps.append((start, segment.start))
                start = max(start, segment.stop)
            if start < stop:
                gaps.append((start, stop))
        return gaps

    def read(self, key: str, start: int, stop: int) -> bytes | None:
        """The bytes [start, stop), or None where one of them is not in the cache."""
        parts = []
        for segment in self._of(key):
            if segment.start <= start < segment.stop:
                end = min(stop, segment.stop)
                data = self._read_segment(key, segment, start - segment.start, end - segment.start)
                if data is None:
                    return None
                parts.append(data)
                start = end
                if start == stop:
                    return parts[0] if len(parts) == 1 else b"".join(parts)
        return b"" if start == stop else None

    def write(self, key: str, start: int, data: bytes) -> None:
        """Keep `data` as the bytes from `start` on; raises ModelUnreadable when the disk does not take it."""
        folder = self.folder / key
        path = folder / f"{start}-{start + len(data)}-{zlib.crc32(data):08x}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ModelUnreadable(
                f"can't write to the cache {self.folder}: {error.strerror}", "set LAZARUS_CACHE to a folder with room"
            ) from None
        segments = self._of(key)
        with self._lock:
            segments.append(Segment(start, start + len(data), path))
            segments.sort(key=lambda segment: (segment.start, segment.stop))
            self._used.add(path)

    def trim(self) -> None:
        """Delete the least recently used ranges beyond the limit, and temporary files that were left behind."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                status = path.stat()
                if not path.name.startswith(".part-"):
                    found.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - STALE:
                    path.unlink()
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                excess -= size

    def _of(self, key: str) -> list[Segment]:
        with self._lock:
            if key not in self._segments:
                folder = self.folder / key
                names = os.listdir(folder) if folder.is_dir() else []
                matches = [
                    match for name in names if (match := re.fullmatch(r"(\d{1,18})-(\d{1,18})-[0-9a-f]{8}", name))
                ]
                segments = [Segment(int(match[1]), int(match[2]), folder / match[0]) for match in matches]
                self._segments[key] = sorted(segments, key=lambda segment: (segment.start, segment.stop))
            return self._segments[key]

    def _read_segment(self, key: str, segment: Segment, start: int, stop: int) -> bytes | None:
        try:
            with open(segment.path, "rb") as file:
                if segment.path not in self._used:
                    data = file.read()
                    if len(data) != segment.stop - segment.start or not segment.path.name.endswith(
                        f"{zlib.crc32(data):08x}"
                    ):
                        raise ValueError
                    os.utime(segment.path)
                    self._used.add(segment.path)
                    return data[start:stop]
                file.seek(start)
                return file.read(stop - start)
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                segment.path.unlink()
            with self._lock:
                self._segments[key] = [other for other in self._segments[key] if other.path != segment.path]
            return None


def merge(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The ranges in order, those that overlap, touch or lie at most `gap` apart made one."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
