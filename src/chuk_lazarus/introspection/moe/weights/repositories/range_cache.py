"""A bounded cache on disk for byte ranges of remote files.

It has a folder for each version of a file, and in it a file for each fetched range, named "start-stop-crc32". Several
processes may share it: a range is written under a temporary name and then renamed, and a range with a wrong checksum
counts as missing. We found no library that fits: caches for HTTP keep no partial answers, and diskcache unpickles the
files that it finds.
"""

import contextlib
import os
import re
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ...errors import ModelUnreadable
from ...files import write_whole
from ...text import parse_size
from .source import Range

DEFAULT_LIMIT = "20GB"
STALE = 24 * 3600  # seconds after which we take a temporary file for abandoned

_RANGE = re.compile(r"(\d{1,18})-(\d{1,18})-[0-9a-f]{8}")
_TEMPORARY = re.compile(r"\.part-[a-z0-9_]{8}")


def cache_limit() -> int:
    """The bytes in $LAZARUS_CACHE_LIMIT, such as 500MB or 20GB; raises InvalidRequest for anything else."""
    return parse_size(os.environ.get("LAZARUS_CACHE_LIMIT") or DEFAULT_LIMIT, "LAZARUS_CACHE_LIMIT")


@dataclass(frozen=True, slots=True)
class Segment:
    """A cached range of a file."""

    start: int
    stop: int
    path: Path


class RangeCache:
    """Byte ranges of files, found by a key that stands for one version of a file.

    `trim` keeps `limit` bytes and deletes the least recently used ranges. It keeps the ranges that this object wrote or
    read since `begin` in any case, so that a job that needs more than the limit can finish.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "ranges"
        self.limit = limit
        self._segments: dict[str, list[Segment]] = {}
        self._used: set[Path] = set()
        self._lock = Lock()
        self._checking = Lock()

    def begin(self) -> None:
        """Begin a job; the ranges of the previous job may be deleted from now on."""
        with self._lock:
            self._used = set()

    def missing(self, key: str, ranges: Iterable[Range]) -> list[Range]:
        """The parts of the ranges that are not in the cache, in order and without overlaps."""
        gaps: list[Range] = []
        segments = self._segments_of(key)
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
        """The bytes [start, stop), or None where some are not in the cache; drops the damaged ranges among them."""
        parts: list[bytes] = []
        end = start
        is_whole = True
        for segment in self._segments_of(key):
            if segment.start < stop and segment.stop > end:
                next_end = min(stop, segment.stop)
                data = self._read_segment(key, segment, max(0, end - segment.start), next_end - segment.start)
                is_whole = is_whole and data is not None and segment.start <= end
                parts.append(data or b"")
                end = next_end
        return b"".join(parts) if is_whole and end >= stop else None

    def write(self, key: str, start: int, data: bytes) -> None:
        """Keep `data` as the bytes from `start` on; raises ModelUnreadable where it can't be written."""
        path = self.folder / key / f"{start}-{start + len(data)}-{zlib.crc32(data):08x}"
        try:
            write_whole(path, data)
        except OSError as error:
            raise ModelUnreadable(
                f"can't write to the cache {self.folder}: {error.strerror}", "set LAZARUS_CACHE to a folder with room"
            ) from None
        self._segments_of(key)
        with self._lock:  # the list is replaced and not changed, since another thread may be reading it
            kept = [segment for segment in self._segments[key] if segment.path != path]
            self._segments[key] = _in_order([*kept, Segment(start, start + len(data), path)])
            self._used.add(path)

    def trim(self) -> None:
        """Delete the least recently used ranges beyond the limit, and abandoned temporary files.

        Files with other names than ours stay, since the folder may have been used for something else before.
        """
        ranges, cache = [], self.folder.parent
        for path in [*self.folder.glob("*/*"), *cache.glob("files/.part-*"), *cache.glob("refs/.part-*")]:
            with contextlib.suppress(OSError):  # another process may have deleted it
                status = path.stat()
                if _RANGE.fullmatch(path.name):
                    ranges.append((status.st_mtime, status.st_size, path))
                elif _TEMPORARY.fullmatch(path.name) and status.st_mtime < time.time() - STALE:
                    path.unlink()
        excess = sum(size for _, size, _ in ranges) - self.limit
        for _, size, path in sorted(ranges):
            if excess <= 0:
                break
            if path not in self._used:
                with contextlib.suppress(OSError):
                    path.unlink()
                excess -= size

    def _segments_of(self, key: str) -> list[Segment]:
        """The cached ranges of a file in order."""
        with self._lock:
            if key not in self._segments:
                folder = self.folder / key
                names: list[str] = []
                with contextlib.suppress(OSError):
                    names = os.listdir(folder)
                matches = [match for name in names if (match := _RANGE.fullmatch(name))]
                segments = [Segment(int(match[1]), int(match[2]), folder / match[0]) for match in matches]
                self._segments[key] = _in_order(segments)
            return self._segments[key]

    def _read_segment(self, key: str, segment: Segment, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of a range, whose checksum is tested at its first use; a damaged range is dropped."""
        if segment.path not in self._used:
            with self._checking:  # or a thread could drop a range that another one has just written again
                if segment.path not in self._used:
                    return self._check_segment(key, segment, start, stop)
        try:
            with open(segment.path, "rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError:
            data = b""
        if len(data) == stop - start:
            return data
        self._drop(key, segment)
        return None

    def _check_segment(self, key: str, segment: Segment, start: int, stop: int) -> bytes | None:
        """As `_read_segment`, with a test of the checksum."""
        try:
            data = segment.path.read_bytes()
        except OSError:
            data = b""
        if len(data) != segment.stop - segment.start or not segment.path.name.endswith(f"-{zlib.crc32(data):08x}"):
            self._drop(key, segment)
            return None
        with contextlib.suppress(OSError):
            os.utime(segment.path)
        self._used.add(segment.path)
        return data[start:stop]

    def _drop(self, key: str, segment: Segment) -> None:
        with self._lock:
            self._segments[key] = [kept for kept in self._segments[key] if kept.path != segment.path]
            self._used.discard(segment.path)
        with contextlib.suppress(OSError):
            segment.path.unlink()


def _in_order(segments: Iterable[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: (segment.start, segment.stop))


def merge(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The ranges in order, where those that overlap, touch or lie at most `gap` bytes apart are one range."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
