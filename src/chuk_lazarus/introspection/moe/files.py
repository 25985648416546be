"""Files that are either complete or absent.

There are three writers, for three kinds of files. `write_file` writes a result where the user wants it: it follows
links, keeps permissions, and writes into pipes. `write_whole` writes cache files, which may be lost. The writer of
model folders (`overlays.checkpoint.folder`) refuses links, and syncs each file to disk before it gets its final name.
"""

import os
import tempfile
import zlib
from pathlib import Path

from .errors import ModelUnreadable


def as_path(given: str | Path) -> Path:
    """The path that is meant: in a string, ~ at the beginning is the home folder. A Path object is taken as it is.

    A Path object made from "./~x" contains only "~x".
    """
    return Path(os.path.expanduser(given)) if isinstance(given, str) else given


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has files of a tokenizer, without which no program runs it on a text."""
    return any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.tiktoken"))


def write_file(path: Path, data: bytes) -> None:
    """Write a result completely or not at all, with the permissions of the file that it replaces; raises OSError.

    Links are followed. A pipe or a device is kept and written to.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    place = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(prefix=".lazarus-", dir=place.parent) as folder:
        part = Path(folder, "result")
        part.write_bytes(data)
        if place.exists():
            part.chmod(place.stat().st_mode & 0o777)
        os.replace(part, place)


def cache_folder() -> Path:
    """$LAZARUS_CACHE, or chuk-lazarus in the user's cache folder."""
    given = os.environ.get("LAZARUS_CACHE")
    try:
        return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "chuk-lazarus")).expanduser()
    except RuntimeError:
        raise ModelUnreadable(
            f"the cache folder {given or '~/.cache'} has no owner: no such user", "set LAZARUS_CACHE"
        ) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, and create its folder if need be; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_checked(path: Path, text: str) -> None:
    """Write a text completely or not at all, after its checksum; raises OSError."""
    data = text.encode()
    write_whole(path, b"%08x\n%b" % (zlib.crc32(data), data))


def read_checked(path: Path) -> str:
    """Read what `write_checked` wrote; raises OSError, or ValueError if the file was changed since."""
    checksum, _, data = path.read_bytes().partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(data):
        raise ValueError(f"{path} is damaged")
    return data.decode()
