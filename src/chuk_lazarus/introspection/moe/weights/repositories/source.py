"""Where bytes come from: the files of a model, read by byte ranges."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ...progress import Progress

Range = tuple[int, int]
"""Half-open range of byte offsets in a file."""

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What ModelOpt, AutoGPTQ and AutoAWQ say of the quantisation where config.json says nothing."""

MAX_PARTS = 1000  # of a split GGUF file


def list_parts(file: str) -> list[str]:
    """The names of all parts of the GGUF file that `file` is a part of; itself alone where it is not split."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file)
    if not match or not 0 < int(match[2]) <= MAX_PARTS:
        return [file]
    return [f"{match[1]}-{number:05}-of-{match[2]}.gguf" for number in range(1, int(match[2]) + 1)]


def is_inside(file: str) -> bool:
    """Whether the name of a file, as others list it, is that of one in the model, or below it."""
    return not (file.startswith("/") or "\\" in file or ".." in file.split("/")) and file.isprintable()


class ByteSource(Protocol):
    """One file, read by byte ranges."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


class Repository(Protocol):
    """The files of one model.

    `name` is what it is called: its id on the Hub, or where it lies on this machine; `folder` is that place with all
    links followed, None for what is elsewhere.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def files(self) -> frozenset[str]: ...

    @property
    def bytes_fetched(self) -> int:
        """How many bytes have come over a network so far."""
        ...

    def open(self, filename: str) -> ByteSource: ...

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Bring the wanted ranges of each file near, so that reading them is quick."""
