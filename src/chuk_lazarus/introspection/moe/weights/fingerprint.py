"""A description of a model's files that changes when any of them does."""

import os
from pathlib import Path
from typing import Any

from ..errors import MoEError
from .checkpoint import Checkpoint
from .repositories.local import Folder
from .repositories.source import CONFIG, INDEX, QUANTIZATION_FILES


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model's place, its revision on the Hub, and its files, with sizes in bytes and times where they lie here."""
    repository = checkpoint.repository
    names = checkpoint.files | ({CONFIG, INDEX, *QUANTIZATION_FILES} & repository.files)
    folder = repository.folder
    return {
        "source": str(folder or repository.name),
        "revision": repository.revision,
        "files": {name: _describe_file(folder / name) if folder else [] for name in sorted(names)},
    }


def _describe_file(path: Path) -> list[int]:
    """Size in bytes and time in nanoseconds; [] for a file that is not there."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:  # a link whose target is missing
        return []


def file_sizes(path: str) -> dict[str, int] | None:
    """The sizes in bytes of a model's weights and configs by name; None where `path` can't be read.

    It leaves times out, so that machines whose clocks differ can compare it.
    """
    try:
        if not os.path.exists(path):
            return None
        folder = Folder(Path(path))
        names = (name for name in folder.files if name.endswith((".safetensors", ".gguf", ".json")))
        return {name: (folder.path / name).stat().st_size for name in names}
    except (OSError, MoEError):
        return None
