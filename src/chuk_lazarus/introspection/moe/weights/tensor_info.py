"""The place of a tensor in a file, its dtype and shape, and the checks that both containers have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import ModelUnreadable, UnknownFormat

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_NAME = 1024  # characters of a tensor's name; the longest published names have about 150

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
"""Dtypes that no quantised weight has."""

INTEGER_DTYPES = frozenset({"I32", "I16", "I8", "U64", "U32", "U16", "U8"})
"""Dtypes of quantised weights, and also of masks and tables."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's dtype, shape and place; `start` and `stop` are byte offsets in `file`.

    `shape` counts elements. `packed` tells that several elements share bytes, so that only whole rows can be read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int
    packed: bool = False

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def check_name(name: str, file: str) -> None:
    """Raise UnknownFormat for a tensor's name that is too long or not printable.

    Names are printed, matched with patterns and written into other files. All names that are read are checked here.
    """
    if len(name) > MAX_NAME:
        raise UnknownFormat(f"{file}: a tensor's name has {len(name):,} characters: {name}")
    if not name.isprintable():
        raise UnknownFormat(f"{file}: a tensor's name has characters that can't be printed: {name}")


def check_apart(tensors: Iterable[TensorInfo], file: str) -> None:
    """Raise ModelUnreadable where two tensors of a file overlap."""
    in_order = sorted((info for info in tensors if info.nbytes), key=lambda info: info.start)
    for before, after in pairwise(in_order):
        if after.start < before.stop:
            raise ModelUnreadable(f"{file}: {before.name} and {after.name} overlap: the header is broken")
