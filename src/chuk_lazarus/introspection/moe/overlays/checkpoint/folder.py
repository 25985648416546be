"""A model's folder, written so that it is whole or not there.

It is made in `<folder>.partial`, shard by shard, and gets its name when it is whole. The plan of the shards comes from
headers alone, so a run that was stopped goes on where it was, and ends with the very same bytes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from ...errors import InvalidRequest, printable
from ...progress import Counter, Progress
from ...weights.checkpoint import Checkpoint, TensorInfo
from ...weights.repositories.source import CONFIG, INDEX, Range

PLAN = "plan.json"
TEMPORARY = ".tmp"

SHARD = 5_000_000_000  # bytes of copied tensors in one file
CHUNK = 16 * 2**20  # bytes copied at a time


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that is written by itself: `ranges` are the bytes, by file, that `write` will read."""

    tensor: Tensor
    ranges: tuple[tuple[str, Range], ...]
    write: Callable[["ShardFile"], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the model: `fill` writes its tensors."""

    tensors: tuple[Tensor, ...]
    fill: Callable[["ShardFile"], None]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def header(self) -> bytes:
        """What stands before the tensors' bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses a file
        for tensor, stop in self._placed:
            offsets = [stop - tensor.nbytes, stop]
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def offsets(self) -> dict[str, int]:
        """Where in the file each tensor begins."""
        start = len(self.header)
        return {tensor.name: start + stop - tensor.nbytes for tensor, stop in self._placed}

    @property
    def _placed(self) -> list[tuple[Tensor, int]]:
        """The tensors and where each ends; wide elements come first, so that all are aligned as readers like it."""
        ordered = sorted(self.tensors, key=lambda t: (-(t.nbytes // max(1, prod(t.shape))), t.name))
        return list(zip(ordered, accumulate(tensor.nbytes for tensor in ordered), strict=True))


class ShardFile:
    """A shard while it is written, from several threads, at any place."""

    def __init__(self, descriptor: int, shard: Shard, written: Counter) -> None:
        self._descriptor = descriptor
        self._written = written
        self._offsets = shard.offsets
        header = shard.header
        os.ftruncate(descriptor, len(header) + shard.nbytes)
        self._write(header, 0)

    def write(self, name: str, data: bytes, offset: int = 0) -> None:
        """Write bytes of a tensor from its byte `offset` on."""
        self._write(data, self._offsets[name] + offset)
        self._written.add(len(data))

    def _write(self, data: bytes, start: int) -> None:
        left = memoryview(data)
        while left:
            count = os.pwrite(self._descriptor, left, start)
            left, start = left[count:], start + count


def bf16(name: str, shape: tuple[int, ...]) -> Tensor:
    """A bfloat16 tensor of that shape."""
    return Tensor(name, "BF16", shape, 2 * prod(shape))


def copied(checkpoint: Checkpoint, info: TensorInfo) -> Item:
    """A tensor that is taken over byte for byte."""

    def write(shard: ShardFile) -> None:
        offset = 0
        for chunk in checkpoint.chunks(info.name, CHUNK):
            shard.write(info.name, chunk, offset)
            offset += len(chunk)

    tensor = Tensor(info.name, info.dtype, info.shape, info.nbytes)
    return Item(tensor, ((info.file, (info.start, info.stop)),), write)


def grouped(items: Iterable[Item], checkpoint: Checkpoint, progress: Progress) -> Iterator[Shard]:
    """Shards of at most SHARD bytes, unless a single tensor is larger, in the order given."""

    def fill(group: Sequence[Item], shard: ShardFile) -> None:
        checkpoint.prefetch((span for item in group for span in item.ranges), progress)
        for item in group:
            item.write(shard)

    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + item.tensor.nbytes > SHARD:
            yield Shard(tuple(other.tensor for other in group), partial(fill, group))
            group, size = [], 0
        group.append(item)
        size += item.tensor.nbytes
    if group:
        yield Shard(tuple(other.tensor for other in group), partial(fill, group))


def check_folder(target: Path, source: Path | None, force: bool, least: int) -> None:
    """Refuse a folder that `write_model` would refuse, and a disk that has not got `least` bytes free."""
    folder, unfinished, _ = _places(target, source)
    with _explaining(unfinished):
        _check_free(folder, force)
        _check_own(unfinished)
        _check_room(unfinished, least)
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InvalidRequest(f"can't write into {parent}", "choose a folder elsewhere")


def _places(target: Path, source: Path | None) -> tuple[Path, Path, Path]:
    """The folder, that of unfinished work, and that of what is replaced; raises InvalidRequest near the model's own."""
    try:
        folder = Path(os.path.realpath(os.path.expanduser(target)))
        unfinished, replaced = (folder.with_name(f"{folder.name}.{ending}") for ending in ("partial", "replaced"))
    except ValueError:  # the root, or a NUL
        raise InvalidRequest(f"{target} can't be a model's folder", "choose another name") from None
    for path in (folder, unfinished, replaced):
        if source and (path == source or path in source.parents or source in path.parents):
            raise InvalidRequest(f"{path} would lie in or over the model's own folder", "choose a folder elsewhere")
    return folder, unfinished, replaced


def _check_free(folder: Path, force: bool) -> None:
    if folder.exists() and not (force and folder.is_dir()):
        hint = "choose another name" + (", or force its replacement" if folder.is_dir() else "")
        raise InvalidRequest(f"{folder} is there already", hint)


def _check_own(unfinished: Path) -> None:
    """Refuse a folder of unfinished work that is a link, or holds what we never put there: a link, a pipe, a folder.

    Somebody may have prepared it, so that we write or delete elsewhere, or take what is elsewhere into the model.
    """
    hint = "remove it, or choose another name"
    if unfinished.is_symlink():
        raise InvalidRequest(f"{unfinished} is a link, and should be a folder of unfinished work", hint)
    with suppress(FileNotFoundError):
        for path in unfinished.iterdir():
            if path.is_symlink() or not path.is_file():
                raise InvalidRequest(f"{path} is no regular file, and so not of unfinished work", hint)


def write_model(
    target: Path,
    shards: Sequence[Shard],
    config: bytes,
    files: Mapping[str, bytes | Callable[[], bytes]],
    plan: Mapping[str, Any],
    source: Path | None,
    force: bool,
    progress: Progress,
) -> None:
    """Write shards, their index, the other files and at last the config into `target`, by way of `<target>.partial`.

    A function among `files` is asked when all shards are there. `plan` tells this work from any other; `source` is the
    model's own folder, which is never touched.
    """
    folder, unfinished, replaced = _places(target, source)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors}
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    files = {INDEX: as_json(index), **files, CONFIG: config}
    known = sum(len(data) for data in files.values() if isinstance(data, bytes))
    written = Counter(progress, f"writing {printable(folder.name)}", total)
    with _explaining(unfinished):
        _check_free(folder, force)
        _check_own(unfinished)
        _check_room(unfinished, sum(len(shard.header) for shard in shards) + total + known)
        with _claimed(unfinished, plan, config, force) as descriptor:
            for name, shard in zip(names, shards, strict=True):
                path = unfinished / name
                if path.exists() and path.stat().st_size == len(shard.header) + shard.nbytes:
                    written.add(shard.nbytes)
                    continue
                with _whole(path) as file:
                    shard.fill(ShardFile(file, shard, written))
                os.fsync(descriptor)
            for name, data in files.items():
                _write_whole(unfinished / name, data if isinstance(data, bytes) else data())
            for entry in unfinished.iterdir():
                if entry.name not in {PLAN, *names, *files}:
                    entry.unlink()
            (unfinished / PLAN).unlink()
            os.fsync(descriptor)
            if force and folder.exists():
                _remove(replaced)  # left by a run that was stopped between the next three lines
                folder.rename(replaced)
            unfinished.rename(folder)
            if force:
                _remove(replaced)
            _sync_folder(folder.parent)


@contextmanager
def _claimed(unfinished: Path, plan: Mapping[str, Any], config: bytes, force: bool) -> Iterator[int]:
    """The folder of unfinished work, made or gone on with, for this process alone; gives its descriptor.

    Raises InvalidRequest when other work is in it, or another process.
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
        except BlockingIOError:
            raise InvalidRequest(f"another process is writing {unfinished}", "wait for it to end") from None
        except OSError:
            pass  # a file system without locks
        there = {entry.name for entry in unfinished.iterdir()}
        wanted, found = as_json(plan), _read(unfinished / PLAN)
        is_new = there <= {PLAN + TEMPORARY}
        is_whole = found is None and _read(unfinished / CONFIG) == config  # it only lacked its name
        if not is_new and not is_whole and found != wanted:
            if not force:
                raise InvalidRequest(
                    f"{unfinished} holds unfinished work of another model, other ranks or a model that has changed",
                    "finish that, delete the folder, or force its replacement",
                )
            for name in sorted(there, key=lambda name: name == PLAN):  # the plan last: it is true until then
                _remove(unfinished / name)
        if found != wanted:
            _write_whole(unfinished / PLAN, wanted)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _whole(path: Path) -> Iterator[int]:
    """A file to write, which gets its name when it is whole and safe on disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)  # never written into: it may have another name, too
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _write_whole(path: Path, data: bytes) -> None:
    with _whole(path) as file:
        left = memoryview(data)
        while left:
            left = left[os.write(file, left) :]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(unfinished: Path, needed: int) -> None:
    """Raises InvalidRequest when the disk has not got `needed` bytes, what is there already counted in."""
    with suppress(FileNotFoundError):
        states = [entry.stat() for entry in os.scandir(unfinished)]
        needed -= sum(min(state.st_size, 512 * state.st_blocks) for state in states)
    disk = next(folder for folder in unfinished.parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise InvalidRequest(
            f"{unfinished.parent} needs {needed:,} bytes of room, and {free:,} are free",
            "make room, or choose a folder on another disk",
        )


@contextmanager
def _explaining(unfinished: Path) -> Iterator[None]:
    """Turn the system's errors into one line; those of reading the model are in words already."""
    try:
        yield
    except OSError as error:
        hint = f"what is done stays in {unfinished}: the same command goes on there"
        raise InvalidRequest(
            f"can't write {error.filename or unfinished}: {error.strerror or error}",
            hint if os.path.isdir(unfinished) else "choose a folder elsewhere",
        ) from None


def as_json(value: Any) -> bytes:
    """The value as the text of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()
