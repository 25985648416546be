"""Matrices in trellises in MLX: their bits stay in memory, and the part that a product needs is decoded for it.

These are plain MLX operations, which run on CPUs, CUDA and Metal alike. A decoded matrix is an intermediate result, and
never larger than AT_ONCE weights.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from ..codes import StoredMatrix
from ..codes.code import Parts
from ..codes.scales import GRID
from ..codes.trellis import RUN, STATES, TrellisCode, codebook, windows

AT_ONCE = 1 << 24  # weights that are decoded at a time
FEW = 64  # rows up to which each has the matrix of its expert decoded, without asking which experts are alike


class TrellisMatrix(Module):
    """A matrix in a trellis, or one for each expert: `stream` uint8 [bytes], `scales` uint8 [out] and `grid` [256],
    the scales that the bytes stand for.

    Beside the stored parts this is all that it keeps in memory. It is frozen, as a QuantizedLinear is.
    """

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert isinstance(matrix.code, TrellisCode)
        self._code, self._shape = matrix.code, matrix.shape
        stack = () if matrix.experts is None else (matrix.experts,)
        self.stream = mx.zeros((*stack, matrix.code.stream_bytes(matrix.shape)), mx.uint8)
        self.scales = mx.zeros((*stack, matrix.shape[0]), mx.uint8)
        self.grid = mx.zeros((*stack, len(GRID)))
        self.freeze()

    def decode(self, expert: mx.array | int | None = None, first: int = 0, stop: int | None = None) -> mx.array:
        """Rows `first` to `stop` of the matrix, float32 [rows, in], or of those of experts [...]: [..., rows, in].

        `first` is a multiple of RUN.
        """
        (rows, columns), bits = self._shape, self._code.bits
        stop = rows if stop is None else stop
        stream, scales, grid = self.stream, self.scales, self.grid
        runs = -(-(stop - first) * columns // RUN)
        start = first * columns * bits // 8
        stream, scales = stream[..., start : start + runs * bits + 2], scales[..., first:stop]
        if expert is not None:
            stream, scales, grid = stream[expert], scales[expert], grid[expert]
        stack = stream.shape[:-1]
        places, shifts = windows(bits)
        data = stream.astype(mx.uint32)
        words = data[..., :-2] | (data[..., 1:-1] << 8) | (data[..., 2:] << 16)
        words = mx.take(words.reshape(*stack, runs, bits), mx.array(places), axis=-1)
        states = mx.bitwise_and(mx.right_shift(words, mx.array(shifts, mx.uint32)), STATES - 1)
        values = mx.take(mx.array(codebook(bits)), states)
        values = values.reshape(*stack, runs * RUN)[..., : (stop - first) * columns]
        scales = mx.take_along_axis(grid, scales.astype(mx.uint32), axis=-1)
        return values.reshape(*stack, stop - first, columns) * scales[..., None]

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes [..., in] -> [..., out], for a single matrix."""
        return self._by_rows(1, lambda first, stop: x @ self.decode(None, first, stop).T.astype(x.dtype))

    def gather(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        """Shapes as in OverlayLinear, for a matrix for each expert.

        Few rows each get the matrix of their own expert; of many it is asked whose they are, and each expert's are
        multiplied together.
        """
        if indices.size <= FEW:

            def multiply(first: int, stop: int) -> mx.array:
                return x @ self.decode(indices, first, stop).swapaxes(-1, -2).astype(x.dtype)

            return self._by_rows(indices.size, multiply)
        leading = mx.broadcast_shapes(x.shape[:-2], indices.shape)
        x = mx.broadcast_to(x, (*leading, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
        experts = mx.broadcast_to(indices, leading).flatten()
        order = None if sorted_indices else mx.argsort(experts)
        if order is not None:
            x, experts = x[order], experts[order]
        products = []
        for expert, first, stop in _runs(np.array(experts)):
            products.append(self._multiply(x[first:stop], expert))
            mx.eval(products[-1])  # what was decoded for it is free again
        y = mx.concatenate(products)
        y = y if order is None else y[mx.argsort(order)]
        return y.reshape(*leading, *y.shape[-2:])

    def _multiply(self, x: mx.array, expert: int) -> mx.array:
        return self._by_rows(1, lambda first, stop: x @ self.decode(expert, first, stop).T.astype(x.dtype))

    def _by_rows(self, matrices: int, multiply: Callable[[int, int], mx.array]) -> mx.array:
        """The product with that many matrices, decoding a limited number of their rows at a time."""
        rows, columns = self._shape
        step = max(1, AT_ONCE // (RUN * columns * max(1, matrices))) * RUN
        products = [multiply(first, min(rows, first + step)) for first in range(0, rows, step)]
        return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)


def trellis_arrays(matrix: StoredMatrix, parts: Parts) -> dict[str, mx.array]:
    """The parameters of a TrellisMatrix, from its parts on disk, which are stacked where there are experts."""
    assert isinstance(matrix.code, TrellisCode)
    stream = parts["stream"]
    missing = matrix.code.stream_bytes(matrix.shape) - stream.shape[-1]
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    grid = (parts["unit"].astype(np.float64)[..., None] * GRID).astype(np.float32)
    return {"stream": mx.array(stream), "scales": mx.array(parts["scales"]), "grid": mx.array(grid)}


def _runs(experts: NDArray[np.uint32]) -> list[tuple[int, int, int]]:
    """Where each expert's rows are among those that are sorted: (expert, first, stop)."""
    found, firsts = np.unique(experts, return_index=True)
    stops = [*firsts[1:], experts.size]
    return [(int(expert), int(first), int(stop)) for expert, first, stop in zip(found, firsts, stops, strict=True)]
