"""Storage formats: the parts that a stored tensor consists of -> float32.

A format is one module with a `NAME` and a `recognise` function, which is told which parts there are (dtype and shape,
by the part's own name: "weight", "scales", ...) and answers None or how to decode them. A codec never sees a tensor's
name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import UnknownFormat


class Decode(Protocol):
    """The stored rows of each part that cover a run of decoded rows -> these rows, float32 [rows, columns].

    `offset` is how many decoded rows the first stored row of a part has before the run begins.
    """

    def __call__(self, parts: Mapping[str, NDArray[Any]], offset: int = 0) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a stored tensor consists of."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor is stored.

    `shape` is that of the decoded tensor; `rows_per_row` says, for each part that decoding needs, how many decoded rows
    (the axis before the last) one of its rows covers. `decode` takes, for each of them, the rows that cover a run of
    decoded rows, and gives these rows, float32 [rows, columns].
    """

    codec: str
    shape: tuple[int, ...]
    rows_per_row: Mapping[str, int]
    decode: Decode


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored:
    """How the tensor that consists of `parts` is stored; raises UnknownFormat when no codec knows.

    `quantization` is the config's `quantization_config`, {} without one.
    """
    from . import fp8, mxfp4, plain

    for recognise_one in (plain.recognise, fp8.recognise, mxfp4.recognise):
        if stored := recognise_one(parts, quantization):
            return stored
    listing = ", ".join(f"{name} ({part.dtype})" for name, part in sorted(parts.items()))
    method = quantization.get("quant_method")
    raise UnknownFormat(
        f"stored in a format we can't decode: {listing}" + (f", quant_method {method}" if method else ""),
        "we read bf16, f16, f32, FP8 in blocks and MXFP4",
    )
