"""A matrix in one to four bits per weight, by a trellis: each weight is decoded from its own bits and those before it.

A state is a window of twelve bits over one stream for the whole matrix, which advances by the bits of one weight. A
weight is scale * value(state). As windows overlap, neighbours can't have any two values, but there are 4096 values
where a number of two bits has four, and the best path through them is searched for (Viterbi, 1967). So errors come near
the smallest that this many bits allow (Marcellin and Fischer 1990; Tseng et al. 2024, QTIP). Every state can be read
separately, so decoding is a table look-up.

The values are the quantiles of a Gaussian in a scattered order: value(s) is the one at (r + 1/2) / 4096, where r is m
(s xor (s >> 6)) mod 4096 with an odd multiplier m for each width.
"""

import functools
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import LibraryMissing
from .code import PartLayout, Parts, Shape, check_finite
from .packing import pack_levels, packed_bytes
from .scales import GREATEST, decode_scales, encode_scales

STATE_BITS = 12
STATES = 1 << STATE_BITS
WIDTHS = (1, 2, 3, 4)
MULTIPLIERS = {1: 2191, 2: 1033, 3: 1543, 4: 2813}
SCALES = {1: 0.9, 2: 1.02, 3: 1.07, 4: 1.1}  # of rows, over their root mean squares, for the least error
RUN = 8  # weights that take whole bytes
BLOCK = 1 << 20  # weights that are decoded at a time


@functools.cache
def codebook(bits: int) -> NDArray[np.float32]:
    """The value of each state, float32 [STATES]."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((rank + 0.5) / STATES) for rank in range(STATES)], np.float32)
    states = np.arange(STATES)
    values: NDArray[np.float32] = quantiles[MULTIPLIERS[bits] * (states ^ states >> STATE_BITS // 2) % STATES]
    values.flags.writeable = False
    return values


def windows(bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Where the windows of eight weights begin in the bytes that are theirs: the byte, and the bit in it."""
    start = np.arange(RUN, dtype=np.uint8) * np.uint8(bits)
    return start >> np.uint8(3), start & np.uint8(7)


def check_encoder() -> None:
    """Raise LibraryMissing if numba, which encodes trellises, is not installed; decoding does not need it."""
    try:
        from . import viterbi  # noqa: F401
    except ImportError:
        raise LibraryMissing.of("trellis", "numba, which encodes trellises, is not installed") from None


@dataclass(frozen=True, slots=True)
class TrellisCode:
    """A trellis with that many bits per weight: parts `stream` uint8 [bytes], `scales` uint8 [out] and `unit`
    float32."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"there is no trellis of {self.bits} bits")

    def __str__(self) -> str:
        return f"{self.bits}trellis"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        rows, columns = shape
        before = STATE_BITS // self.bits - 1  # the first window's numbers before that of the first weight
        return {
            "stream": PartLayout("U8", (packed_bytes(1 << self.bits, rows * columns + before),)),
            "scales": PartLayout("U8", (rows,)),
            "unit": PartLayout("F32", ()),
        }

    def encode(
        self,
        matrix: NDArray[np.float32],
        *,
        unbiased: bool = False,
        moments: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """See `Code`; a trellis is always made unbiased, and never by moments. Raises LibraryMissing without numba."""
        check_encoder()
        from .viterbi import best_states

        exponent = int(np.frexp(check_finite(matrix))[1])
        matrix = np.ldexp(matrix, -exponent)  # squares stay within float32
        energy = float(np.vdot(matrix, matrix))
        rms = np.sqrt(np.vecdot(matrix, matrix) / np.float32(matrix.shape[1]))
        codes, unit = encode_scales(rms * np.float32(SCALES[self.bits]), rounding=0.0)
        scales = decode_scales(codes, np.asarray(unit, np.float32))[:, None]
        with np.errstate(divide="ignore"):
            inverse = np.where(scales > 0, np.float32(1.0) / scales, np.float32(0.0))
        states = best_states((matrix * inverse).ravel(), codebook(self.bits), self.bits)
        values = codebook(self.bits)[states].reshape(matrix.shape)
        values *= scales
        product = float(np.vdot(matrix, values))
        if product > 0:
            unit *= energy / product
        unit = min(float(np.ldexp(unit, exponent)), GREATEST / float(codebook(self.bits).max()))
        return {"stream": self._pack(states), "scales": codes, "unit": np.asarray(unit, np.float32)}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        rows, columns = shape
        scales = decode_scales(parts["scales"], parts["unit"])
        stream = np.pad(parts["stream"], (0, self.stream_bytes(shape) - parts["stream"].size))
        places, shifts = windows(self.bits)
        values = np.empty((rows, columns), np.float32)
        step = max(1, BLOCK // (RUN * columns)) * RUN  # rows that begin with a whole byte
        for row in range(0, rows, step):
            block = values[row : row + step]
            first, runs = row * columns * self.bits // 8, -(-block.size // RUN)
            data = stream[first : first + runs * self.bits + 2].astype(np.uint32)
            words = data[:-2] | data[1:-1] << 8 | data[2:] << 16
            states = words.reshape(runs, self.bits)[:, places] >> shifts & (STATES - 1)
            block[:] = codebook(self.bits)[states].ravel()[: block.size].reshape(block.shape)
            block *= scales[row : row + step, None]
        return values

    def stream_bytes(self, shape: Shape) -> int:
        """Bytes of a stream that is padded so that windows are read by whole rows, RUN of them, and three bytes."""
        rows, columns = shape
        return -(-rows // RUN) * columns * self.bits + 2

    def _pack(self, states: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """The stream in which each state's window begins `bits` after that of the one before."""
        before = int(states[0]) >> np.arange(0, STATE_BITS - self.bits, self.bits) & ((1 << self.bits) - 1)
        newest = states >> np.uint16(STATE_BITS - self.bits)
        return pack_levels(np.concatenate([before, newest]).astype(np.uint8), 1 << self.bits)
