"""Writes a model's folder so that it is either complete or absent.

It is made in `<folder>.partial`, shard by shard, and renamed when it is complete. The plan of the shards comes from
headers alone, so an interrupted run continues where it stopped, and ends with the same bytes.

Two other functions write complete files. `files.write_file` writes a single result where the user wants it, so it
follows links and keeps the permissions of the file that it replaces. `files.write_whole` writes cache files, whose loss
does no harm. This module has its own writer because a later run continues with what it finds in `<folder>.partial`, a
name that anybody can guess. A link there could make us write or delete files elsewhere, so links are refused; and a
file with its final name is assumed to be complete even after a power failure, so it is synced to disk first.
"""

import fcntl
import hashlib
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
from typing import Any, TypeVar

from ...errors import InvalidRequest, printable
from ...progress import Counter, Progress
from ...text import format_bytes
from ...weights.checkpoint import Checkpoint, TensorInfo
from ...weights.repositories.source import CONFIG, INDEX, Range

PLAN = "plan.json"
TEMPORARY = ".tmp"
LONGEST_NAME = 255  # bytes of a file's name, on every common file system

SHARD = 5_000_000_000  # bytes of copied tensors in one file
CHUNK = 16 * 2**20  # bytes copied at a time

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written; `dtype` is that of safetensors ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorWriter:
    """A tensor and the function that writes it; `ranges` are the bytes, by file, that the function will read."""

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
        """The bytes before those of the tensors."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
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
        """The tensors, and where each ends; those of wide elements come first, so that every tensor is aligned."""
        ordered = sorted(self.tensors, key=lambda tensor: (-(tensor.nbytes // max(1, prod(tensor.shape))), tensor.name))
        return list(zip(ordered, accumulate(tensor.nbytes for tensor in ordered), strict=True))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a model's folder holds: its shards, the config if there is one, and other files by name.

    A function among `files` is called once all shards are written.
    """

    shards: Sequence[Shard]
    config: bytes | None
    files: Mapping[str, bytes | Callable[[], bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the folder; calls the functions among them."""
        files = (data if isinstance(data, bytes) else data() for data in self.files.values())
        shards = sum(len(shard.header) + shard.nbytes for shard in self.shards)
        return shards + sum(map(len, (self.config or b"", self.index, *files)))

    @property
    def shard_names(self) -> list[str]:
        count = len(self.shards)
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    @property
    def index(self) -> bytes:
        """The content of the file that says which shard has which tensor."""
        placed = zip(self.shard_names, self.shards, strict=True)
        weight_map = {tensor.name: name for name, shard in placed for tensor in shard.tensors}
        total = sum(shard.nbytes for shard in self.shards)
        return encode_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


class ShardFile:
    """A shard while it is written; threads may write its tensors side by side and in any order."""

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
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._descriptor, rest, start)
            rest, start = rest[count:], start + count


def bf16_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A bfloat16 tensor of that shape."""
    return Tensor(name, "BF16", shape, 2 * prod(shape))


def copy_tensor(checkpoint: Checkpoint, info: TensorInfo) -> TensorWriter:
    """The writer of a tensor that is copied byte for byte."""

    def write(shard: ShardFile) -> None:
        offset = 0
        for chunk in checkpoint.chunks(info.name, CHUNK):
            shard.write(info.name, chunk, offset)
            offset += len(chunk)

    tensor = Tensor(info.name, info.dtype, info.shape, info.nbytes)
    return TensorWriter(tensor, ((info.file, (info.start, info.stop)),), write)


def group_into_shards(writers: Iterable[TensorWriter], checkpoint: Checkpoint, progress: Progress) -> Iterator[Shard]:
    """Shards of at most SHARD bytes, unless a single tensor is larger, in the order given."""

    def fill(group: Sequence[TensorWriter], shard: ShardFile) -> None:
        checkpoint.prefetch((file_range for writer in group for file_range in writer.ranges), progress)
        for writer in group:
            writer.write(shard)

    for group in group_by_size(writers, lambda writer: writer.tensor.nbytes):
        yield Shard(tuple(writer.tensor for writer in group), partial(fill, group))


def group_by_size(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items that take at most SHARD bytes together, unless a single one is larger."""
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + nbytes(item) > SHARD:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes(item)
    if group:
        yield group


def check_folder(target: Path, source: Path | None, force: bool, least: int) -> None:
    """Raise InvalidRequest where `write_model` would refuse the folder, or fewer than `least` bytes are free."""
    folder, unfinished, _ = _find_paths(target, source)
    with _explain_errors(unfinished):
        _check_name_is_free(folder, force)
        _check_unfinished(unfinished)
        _check_disk(unfinished, least)
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InvalidRequest(f"can't write into {parent}", "choose a folder elsewhere")


def check_smaller(before: int, after: int) -> None:
    """Raise InvalidRequest if the new model would not be smaller than the old one."""
    if after >= before:
        raise InvalidRequest(
            f"it would not be smaller: {format_bytes(before)} before, {format_bytes(after)} after",
            "ask for fewer bits or lower ranks, or force it",
        )


def _find_paths(target: Path, source: Path | None) -> tuple[Path, Path, Path]:
    """The folder, that of unfinished work, and the one that the old folder is moved to when it is replaced.

    Raises InvalidRequest if one of them would be inside the model's own folder, or contain it.
    """
    try:
        folder = Path(os.path.realpath(target))
        unfinished, replaced = name_unfinished(folder), name_beside(folder, "replaced")
    except ValueError:  # the root, or a NUL
        raise InvalidRequest(f"{target} can't be a model's folder", "choose another name") from None
    for path in (folder, unfinished, replaced):
        if source and (path == source or path in source.parents or source in path.parents):
            raise InvalidRequest(
                f"{path} would be inside the model's own folder, or contain it", "choose a folder elsewhere"
            )
    return folder, unfinished, replaced


def name_unfinished(folder: Path) -> Path:
    """The path of the unfinished work for `folder`; raises ValueError for the root."""
    return name_beside(folder, "partial")


def name_beside(folder: Path, ending: str) -> Path:
    """The folder's name with an ending; a name that is too long for it is shortened, with a digest of the whole
    name."""
    name = folder.name
    if len(whole := os.fsencode(name)) + len(ending) + 1 > LONGEST_NAME:
        digest = hashlib.sha256(whole).hexdigest()[:16]
        name = f"{whole[: LONGEST_NAME - len(digest) - len(ending) - 2].decode(errors='ignore')}-{digest}"
    return folder.with_name(f"{name}.{ending}")


def _check_name_is_free(folder: Path, force: bool) -> None:
    if folder.exists() and not (force and folder.is_dir()):
        hint = "choose another name" + (", or force its replacement" if folder.is_dir() else "")
        raise InvalidRequest(f"{folder} already exists", hint)


def _check_unfinished(unfinished: Path) -> None:
    """Refuse unfinished work that is a link, or contains a link or a pipe: we never write these.

    Somebody may have placed it to make us write or delete files elsewhere, or take them into the model.
    """
    hint = "remove it, or choose another name"
    if unfinished.is_symlink():
        raise InvalidRequest(f"{unfinished} is a link, but should be a folder of unfinished work", hint)
    for path in unfinished.rglob("*"):  # which does not follow links
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InvalidRequest(f"{path} is not a regular file, so it is not unfinished work", hint)


def write_model(
    target: Path,
    contents: Contents,
    plan: Mapping[str, Any],
    source: Path | None,
    force: bool,
    progress: Progress,
) -> None:
    """Write shards, their index, the other files and finally the config into `target`, by way of `<target>.partial`.

    The names of files may include folders, with /. `plan` (JSON) distinguishes this work from others; `source` is the
    model's own folder, which is never changed. Raises InvalidRequest if the folder can't be written.
    """
    folder, unfinished, replaced = _find_paths(target, source)
    names, shards, config = contents.shard_names, contents.shards, contents.config
    total = sum(shard.nbytes for shard in shards)
    files = {INDEX: contents.index, **contents.files, **({CONFIG: config} if config else {})}
    small = sum(len(data) for data in files.values() if isinstance(data, bytes))
    written = Counter(progress, f"writing {printable(folder.name)}", total)
    with _explain_errors(unfinished):
        _check_name_is_free(folder, force)
        _check_unfinished(unfinished)
        _check_disk(unfinished, sum(len(shard.header) for shard in shards) + total + small)
        with _claim_folder(unfinished, plan, config, force) as descriptor:
            for name, shard in zip(names, shards, strict=True):
                path = unfinished / name
                if path.exists() and path.stat().st_size == len(shard.header) + shard.nbytes:
                    written.add(shard.nbytes)
                    continue
                with _open_whole(path) as file:
                    shard.fill(ShardFile(file, shard, written))
                os.fsync(descriptor)
            for name, data in files.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                _write_whole(unfinished / name, data if isinstance(data, bytes) else data())
            wanted = {PLAN, *names, *(name.partition("/")[0] for name in files)}
            for entry in unfinished.iterdir():
                if entry.name not in wanted:
                    remove(entry)
            (unfinished / PLAN).unlink()
            os.fsync(descriptor)
            if force and folder.exists():
                remove(replaced)  # left by a run that was interrupted in one of the next steps
                folder.rename(replaced)
            unfinished.rename(folder)
            if force:
                remove(replaced)
            _sync_folder(folder.parent)


@contextmanager
def _claim_folder(unfinished: Path, plan: Mapping[str, Any], config: bytes | None, force: bool) -> Iterator[int]:
    """Make or take over the folder of unfinished work, locked for this process; yields its descriptor.

    Raises InvalidRequest where it holds other work, or another process has locked it.
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system when the process ends
        except BlockingIOError:
            raise InvalidRequest(f"another process is writing {unfinished}", "wait for it to end") from None
        except OSError:
            pass  # some file systems have no locks
        names = {entry.name for entry in unfinished.iterdir()}
        new_plan, old_plan = encode_json(plan), _read(unfinished / PLAN)
        is_new = names <= {PLAN + TEMPORARY}
        is_whole = old_plan is None and _read(unfinished / CONFIG) == config  # it only lacks its name
        if not is_new and not is_whole and old_plan != new_plan:
            if not force:
                raise InvalidRequest(
                    f"{unfinished} holds unfinished work of another model, other ranks or a model that has changed",
                    "finish that, delete the folder, or force its replacement",
                )
            for name in sorted(names, key=lambda name: name == PLAN):  # the plan goes last: until then it is true
                remove(unfinished / name)
        if old_plan != new_plan:
            _write_whole(unfinished / PLAN, new_plan)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _open_whole(path: Path) -> Iterator[int]:
    """Yield the descriptor of a new file, which gets its name once it is whole and synced to disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)  # not written into, for it may be a hard link to a file elsewhere
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
    with _open_whole(path) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
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


def _check_disk(unfinished: Path, needed: int) -> None:
    """Raise InvalidRequest where the disk lacks room for a model of `needed` bytes, unfinished work included."""
    with suppress(FileNotFoundError):
        statuses = [entry.stat() for entry in os.scandir(unfinished)]
        # a file has its full size from the start, but only the blocks that are written take room
        needed -= sum(min(status.st_size, 512 * status.st_blocks) for status in statuses)
    disk = next(folder for folder in unfinished.parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise InvalidRequest(
            f"{unfinished.parent} needs {needed:,} bytes, but only {free:,} are free",
            "make room, or choose a folder on another disk",
        )


@contextmanager
def _explain_errors(unfinished: Path) -> Iterator[None]:
    """Turn an OSError of writing into InvalidRequest; reading the model raises errors of our own."""
    try:
        yield
    except OSError as error:
        hint = f"the finished part stays in {unfinished}: run the same command again to continue"
        raise InvalidRequest(
            f"can't write {error.filename or unfinished}: {error.strerror or error}",
            hint if os.path.isdir(unfinished) else "choose a folder elsewhere",
        ) from None


def encode_json(value: Any) -> bytes:
    """The content of a JSON file with this value."""
    return (json.dumps(value, indent=2) + "\n").encode()
