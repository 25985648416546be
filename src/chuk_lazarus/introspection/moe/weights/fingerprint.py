"""What tells one state of a model's files from any other."""

import os
from pathlib import Path
from typing import Any

from ..errors import MoEError
from .checkpoint import INDEX, Checkpoint
from .model_config import CONFIG
from .repositories.local import Folder
from .repositories.source import QUANTIZATION_FILES


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a model is, its revision on the Hub, and its files: here with their sizes in bytes and their times."""
    repository = checkpoint.repository
    names = checkpoint.files | ({CONFIG, INDEX, *QUANTIZATION_FILES} & repository.files)
    folder = repository.folder
    return {
        "source": str(folder or repository.name),
        "revision": repository.revision,
        "files": {name: _describe_file(folder / name) if folder else [] for name in sorted(names)},
    }


def _describe_file(path: Path) -> list[int]:
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:  # a link that leads nowhere
        return []


def file_sizes(path: str) -> dict[str, int] | None:
    """The bytes of a model's weights and configs by name, None where there is nothing at the path; for machines whose
    clocks differ."""
    try:
        if not os.path.exists(path):
            return None
        folder = Folder(Path(path))
        names = (name for name in folder.files if name.endswith((".safetensors", ".gguf", ".json")))
        return {name: (folder.path / name).stat().st_size for name in names}
    except (OSError, MoEError):
        return None
