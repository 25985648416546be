"""The interface of a repository: the files of a model, which are read by byte ranges."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ...errors import ModelUnreadable
from ...progress import Progress

Range = tuple[int, int]
"""Half-open range of byte offsets in a file."""

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".distcp", ".pdparams")  # of PyTorch and Paddle
MODELSLIM = "quant_model_description.json"
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", MODELSLIM)
"""The files of ModelOpt, AutoGPTQ, AutoAWQ and ModelSlim with the quantisation settings that config.json may lack."""

MAX_PARTS = 1000  # the largest number of parts in the name of a split GGUF file


LFS = b"version https://git-lfs"
"""How a Git LFS pointer begins, a text of three lines in the place of a large file."""


def refuse_pointer(file: str, data: bytes) -> None:
    """Raise ModelUnreadable where `data`, the first bytes of a file, are those of a Git LFS pointer."""
    if data.startswith(LFS):
        raise ModelUnreadable(
            f"{file} is a Git LFS pointer, not the real file",
            "run git lfs pull in the model's folder, or get the model with: hf download",
        )


def list_parts(file: str) -> list[str]:
    """The names of all parts of the GGUF model that `file` is a part of; `file` alone where it is not split."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file)
    if not match or not 0 < int(match[2]) <= MAX_PARTS:
        return [file]
    return [f"{match[1]}-{number:05}-of-{match[2]}.gguf" for number in range(1, int(match[2]) + 1)]


def is_inside(file: str) -> bool:
    """Whether a file's name, as an index or the Hub lists it, stays within the model's folder."""
    return not (file.startswith("/") or "\\" in file or ".." in file.split("/")) and file.isprintable()


class ByteSource(Protocol):
    """A file that is read by byte ranges."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


class Repository(Protocol):
    """The files of one model.

    `name` is the model's id on the Hub, or its path on this machine. `folder` is this path with all links resolved,
    None for a model on the Hub; `revision` is the commit on the Hub, None for a model on this machine.
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
        """The number of bytes that came over the network so far."""
        ...

    def open(self, filename: str) -> ByteSource: ...

    def list_files(self) -> frozenset[str]:
        """The files, those in subfolders included."""
        ...

    def may_copy(self, filename: str) -> bool:
        """Whether a file may be copied into another folder: no link that leads to somebody's private file."""
        ...

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Fetch the wanted ranges of each file, so that reading them needs no network."""
