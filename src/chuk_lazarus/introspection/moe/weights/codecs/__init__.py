"""Storage formats: the parts that a stored tensor consists of -> float32.

A format is one module with a `recognise` function, which is told which parts there are (dtype and shape, by the part's
own name: "weight", "scales", ...) and answers None or how to decode them. A codec never sees a tensor's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import UnknownFormat

SAME_PART = {
    "scale": "weight_scale",
    "scale_inv": "weight_scale_inv",
    "scale_2": "weight_scale_2",
    "qscale_weight": "weight_scale",
}
"""What some publishers call a part -> its usual name."""

NOT_DECODED = frozenset({"bias", "input_scale", "input_global_scale", "activation_scale", "qscale_act"})
"""Parts that are no part of the matrix: the bias, and what scales the inputs."""


class Decode(Protocol):
    """The stored rows of each part that cover decoded rows [start, stop) -> these rows, float32 [rows, columns].

    A row's number is counted within its expert.
    """

    def __call__(self, parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]: ...


def _unread() -> NDArray[Any]:
    raise UnknownFormat("stored in a format that needs its values to be recognised")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a stored tensor consists of; `load` reads it whole, and is for tiny ones only."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]] = field(default=_unread, compare=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor is stored.

    `shape` is that of the decoded tensor, [..., rows, columns]; `transposed` says that its rows are inputs where those
    of a plain weight are outputs, as in GPTQ. `rows_per_row` has the parts that decoding needs: how many decoded rows
    one of the part's rows covers (a fraction where a row takes several of them), or None for a part that every
    window needs whole. Leading axes, such as the experts', are the same in all parts; a whole part may lack them.
    """

    codec: str
    shape: tuple[int, ...]
    rows_per_row: Mapping[str, int | Fraction | None]
    decode: Decode
    transposed: bool = False

    @property
    def granule(self) -> int:
        """How many decoded rows share one row of some part."""
        return max([1, *(int(span) for span in self.rows_per_row.values() if span is not None)])

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the same tensor stored as plain numbers."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored:
    """How the tensor that consists of `parts` is stored; raises UnknownFormat when no codec knows.

    Parts go by their usual names (`SAME_PART`), without those that are not decoded. `quantization` is what the config
    says about the quantisation of this tensor, {} when nothing.
    """
    from . import awq, bitsandbytes, fp8, gguf, gptq, mlx, mxfp4, mxfp8, nvfp4, pack_quantized, plain

    recognisers: tuple[Callable[[Mapping[str, Part], Mapping[str, Any]], Stored | None], ...] = (
        plain.recognise,
        mxfp8.recognise,
        fp8.recognise,
        mxfp4.recognise,
        nvfp4.recognise,
        mlx.recognise,
        pack_quantized.recognise,
        gptq.recognise,
        awq.recognise,
        bitsandbytes.recognise,
        gguf.recognise,
    )
    for recognise_one in recognisers:
        if stored := recognise_one(parts, quantization):
            return stored
    listing = ", ".join(f"{name} ({part.dtype})" for name, part in sorted(parts.items()))
    method = quantization.get("quant_method")
    raise UnknownFormat(
        f"stored in a format we can't decode: {listing}" + (f", quant_method {method}" if method else ""),
        "docs/families.md lists the formats that we read",
    )
