"""Weights whose inputs are scaled first, by AWQ or SmoothQuant, as ModelOpt stores them in any of its formats.

`pre_quant_scale` [in] multiplies the inputs of a module before anything else is done to them (`TensorQuantizer.forward`
in modelopt/torch/quantization/nn/modules/tensor_quantizer.py, 0.47), and the stored weight was divided by it. So a
weight is what its format decodes to, times the factor of its input.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnknownFormat
from .codec import Decode, Part, Stored

PRE_QUANT_SCALE = "pre_quant_scale"


class OtherInputs(UnknownFormat):
    """Raised if the factors are not those of the inputs, which may be on another axis."""


def multiply_inputs(stored: Stored, factors: Part, inputs_first: bool | None) -> Stored:
    """The tensor with the factors of its inputs multiplied into what is decoded.

    `factors` are [in], or [experts, in] beside a stack. `inputs_first` says whether a plain form has its inputs on the
    last axis but one; if it is unknown (None), only a single matrix, which is [out, in], is accepted. Raises
    OtherInputs unless there is one factor per input, UnknownFormat if we can't tell what they are.
    """
    if len(stored.shape) < 2:
        raise UnknownFormat(f"its {PRE_QUANT_SCALE} scales inputs, but its weight {list(stored.shape)} is not a matrix")
    *leading, rows, columns = stored.shape
    if factors.dtype not in ("BF16", "F16", "F32", "F64"):
        raise UnknownFormat(f"its {PRE_QUANT_SCALE} is {factors.dtype}, but should be floats")
    if inputs_first is None and leading:
        raise UnknownFormat(
            f"its {PRE_QUANT_SCALE} scales inputs, but no layout says which axis of the stack these are"
        )
    by_row = bool(inputs_first) != stored.transposed
    size = rows if by_row else columns
    of_stack = bool(leading) and factors.shape in ((*leading, size), (*leading, 1, size))
    of_all = factors.shape[-1:] == (size,) and prod(factors.shape) == size and factors.shape[:1] != tuple(leading[:1])
    if not of_stack and not of_all:
        shapes = f"its {PRE_QUANT_SCALE} is {list(factors.shape)} and its weight {list(stored.plain_shape)}"
        raise OtherInputs(f"{shapes}: not one factor per input, of which there are {size}")
    decoder = partial(decode, stored=stored.decode, by_row=by_row)
    return replace(stored, rows_per_row={**stored.rows_per_row, PRE_QUANT_SCALE: None}, decode=decoder)


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, stored: Decode, by_row: bool
) -> NDArray[np.float32]:
    """What `stored` decodes, float32 [rows, columns], times the factors of its columns, or of its rows."""
    values = stored(parts, start, stop)
    factors = parts[PRE_QUANT_SCALE].astype(np.float32).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= factors[start:stop, None] if by_row else factors
    return values
