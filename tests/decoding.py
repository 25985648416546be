"""What the tests of codecs share: decoding as a reader asks for it, and what the bits of a small float mean."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.weights.codecs import Stored

Array = NDArray[Any]


def decode(stored: Stored, parts: Mapping[str, Array], start: int = 0, stop: int | None = None) -> Array:
    """Decoded rows [start, stop) from the rows of each part that cover them, as a reader asks for them."""
    stop = stored.shape[-2] if stop is None else stop
    cut = {
        part: parts[part] if span is None else parts[part][int(start // span) : int(-(-stop // span))]
        for part, span in stored.rows_per_row.items()
    }
    return stored.decode(cut, start, stop)


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def float_of(code: int, exponent_bits: int, mantissa_bits: int, *, has_infinity: bool) -> float:
    """A small float's value from its bits; E4M3 has no infinity and only one NaN for each sign."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        if has_infinity:
            return math.nan if mantissa else sign * math.inf
        if mantissa == (1 << mantissa_bits) - 1:
            return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


FP8 = {
    "F8_E4M3": [float_of(code, 4, 3, has_infinity=False) for code in range(256)],
    "F8_E5M2": [float_of(code, 5, 2, has_infinity=True) for code in range(256)],
}
