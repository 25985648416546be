"""The interface of a codec: the parts of a stored tensor that it gets, and the decoder that it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import UnknownFormat

SAME_PART = {
    "scale": "weight_scale",
    "scale_inv": "weight_scale_inv",
    "scale_2": "weight_scale_2",
    "scale2": "weight_scale_2",
    "qscale_weight": "weight_scale",
    "weight_quantizer.scale": "weight_scale",
    "weight_quantizer.zero_point": "weight_zero_point",
    "weight_quantizer.0.scale": "weight_scale",
    "weight_quantizer.0.zero_point": "weight_zero_point",
    "weight_quantizer.1.scale": "weight_scale_2",
}
"""Names that some publishers give to a part, and its usual name.

Those of quantisers are what Quark calls the usual ones within a model (export/constants.py of Quark 0.13).
"""

NOT_DECODED = frozenset(
    {
        "bias", "input_scale", "input_scale_2", "input_global_scale", "input_amax", "input_offset", "input_zero_point",
        "activation_scale", "qscale_act", "deq_scale", "quant_bias",
    }
)  # fmt: skip
"""Parts that do not belong to the matrix: the bias, and what scales or shifts the inputs and the outputs."""

CONFIG_HINT = "put the model's config.json beside its weights"


class Decode(Protocol):
    """Decodes the rows [start, stop) of one expert's matrix into float32 [rows, columns].

    `parts` are the stored rows of each part that cover these rows.
    """

    def __call__(self, parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]: ...


def _unread() -> NDArray[Any]:
    raise UnknownFormat("stored in a format that only its values could tell")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that make up a stored tensor; `load` reads it whole, and is meant for tiny ones only."""

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]] = field(default=_unread, compare=False)


Element = Literal[
    "int",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "e4m3",
    "e5m2",
    "e2m3",
    "e3m2",
    "e2m1",
    "nf4",
    "fp4",
    "iq4",
    "ternary",
]
"""What an element is: an integer, a float by its exponent and mantissa, or an entry of a fixed table."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a stored matrix can hold, so that one can tell what storing it costs.

    A number is an element times the scale of its group, which spans `group` rows and columns of the decoded matrix,
    None for all of them. Integers have `bits`; `has_zero` tells that a group has a zero point or a least value, too.
    `scale` says what scales and least values are: numbers of some float type, powers of two ("e8m0"), or eight bits
    below a second scale ("e4m3"); "none" where elements have no scale.
    """

    element: Element
    group: tuple[int | None, int | None] = (None, None)
    bits: int = 0
    has_zero: bool = False
    scale: Literal["none", "float32", "float16", "bfloat16", "e8m0", "e4m3"] = "float32"


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor is stored.

    `shape` is the shape of the decoded tensor, [..., rows, columns]. `transposed` tells that its rows are inputs, as in
    GPTQ, whereas the rows of a plain weight are outputs. `rows_per_row` has the parts that decoding takes, each with
    the number of decoded rows that one of its rows covers (a fraction where a decoded row takes several of them), or
    None for a part that every window takes whole. All parts have the same leading axes, such as the experts'; a whole
    part may lack them. `grid` are the numbers that the format can hold, None where that is not known.
    """

    codec: str
    shape: tuple[int, ...]
    rows_per_row: Mapping[str, int | Fraction | None]
    decode: Decode
    transposed: bool = False
    grid: Grid | None = None

    @property
    def granule(self) -> int:
        """The largest number of decoded rows that share one row of a part."""
        return max([1, *(int(span) for span in self.rows_per_row.values() if span is not None)])

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the same tensor stored as plain numbers."""
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape


class Codec(Protocol):
    """One storage format: a module with this constant and this function.

    `PARTS` names the parts that the format puts beside a weight, or in its place.
    """

    @property
    def PARTS(self) -> tuple[str, ...]: ...

    def recognise(self, parts: Mapping[str, Part], quantization: Mapping[str, Any], /) -> Stored | None:
        """How the tensor that consists of `parts` is stored, or None where it is not in this format."""
