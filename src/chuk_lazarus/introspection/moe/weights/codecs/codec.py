"""What a codec is given, and what it answers: a stored tensor's parts, and how they become float32."""

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


class Codec(Protocol):
    """One storage format: a module with this function."""

    def recognise(self, parts: Mapping[str, Part], quantization: Mapping[str, Any], /) -> Stored | None:
        """How the tensor that consists of `parts` is stored; None where it is not in this format."""
