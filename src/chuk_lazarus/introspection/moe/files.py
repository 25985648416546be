"""Files that are whole or not there.

There are three writers, for three kinds of files. `write_file` writes a result where the user wants it: it follows
links, keeps permissions, and writes into pipes. `write_whole` writes what the cache keeps, which may be lost. The
writer of model folders (`overlays.checkpoint.folder`) refuses links, and syncs each file to disk before it is named.
"""

import os
import tempfile
import zlib
from pathlib import Path

from .errors import ModelUnreadable


def as_path(given: str | Path) -> Path:
    """The path that is meant: in a text, ~ at the beginning is the home folder. A Path is taken as it is.

    A Path may come from "./~x", of which it has kept "~x".
    """
    return Path(os.path.expanduser(given)) if isinstance(given, str) else given


def write_file(path: Path, data: bytes) -> None:
    """Write a result whole or not at all, with the permissions of the file that it replaces; raises OSError.

    A link is followed. A pipe or a device stays what it is, and gets the bytes.
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
        raise ModelUnreadable(f"the cache folder {given or '~/.cache'} is nobody's", "set LAZARUS_CACHE") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, its folder too if need be; raises OSError."""
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
    """Write a text whole or not at all, behind its checksum; raises OSError."""
    data = text.encode()
    write_whole(path, b"%08x\n%b" % (zlib.crc32(data), data))


def read_checked(path: Path) -> str:
    """What `write_checked` wrote; raises OSError, or ValueError where somebody else has changed it."""
    checksum, _, data = path.read_bytes().partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(data):
        raise ValueError(f"{path} is damaged")
    return data.decode()
