"""A matrix in few bits per weight: evenly spaced levels around zero, and a scale for each group of a row.

A weight is scale * (level - (levels - 1) / 2), with a level from 0 to levels - 1. Two levels keep only the sign, three
are ternary. Level and scale of a group are chosen together, for the smallest squared error: several scales are tried,
the levels of the best one are kept, and for these levels the best scale has a closed form (Lloyd, 1982). Scales are
then rounded to bytes, and the levels are computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .code import PartLayout, Parts, Shape, check_finite
from .packing import bits_of, pack_levels, packed_bytes, unpack_levels
from .scales import GREATEST, decode_scales, encode_scales

LEVELS = (2, 3, 4, 8, 16, 32, 64, 128, 256)
ROW, MATRIX = 0, -1  # in place of a number of weights: all of a row, of the matrix
GROUPS = {64: "64", 128: "128", ROW: "row", MATRIX: "matrix"}
BLOCK = 1 << 16  # weights that are coded at a time: what a core's cache holds
MLX_BITS = {7: 8}  # MLX has no seven bits
MLX_GROUP = 32  # the shortest of MLX's groups
MLX_GROUPS = (128, 64)  # of which the first that fits serves for whole rows

# Scales that are tried, by levels. The best scale of a group follows from its root mean square r and its peak p: on
# Gaussian numbers log2(scale / r) is about slope * log2(p / r) + offset, give or take the spread.
TRIES: dict[int, tuple[float, float, float]] = {
    3: (0.03, 0.24, 0.08),
    4: (0.099, -0.167, 0.089),
    8: (0.416, -1.393, 0.101),
    16: (0.826, -2.832, 0.078),
    32: (0.975, -3.970, 0.048),
    64: (0.993, -4.970, 0.035),
    128: (0.996, -5.971, 0.030),
    256: (0.998, -6.972, 0.027),
}
LEAST_ENERGY, GREATEST_ENERGY = 1e-12, 1e24  # of a matrix whose numbers are coded as they are
FEW = 0.1  # the share of the groups up to which the peaks are not worth a try
ALIKE = np.float32(1 + 1e-6)
REFITS, LONGEST = 8, 128  # of the scale of more numbers than these
ROOM = 2.0  # times the largest scale is the unit, where what is left of a matrix grows by its feedback
SPREAD = 0.7  # of the two tries on either side, in spreads


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix as `mx.quantized_matmul` takes it: `weight` uint32 [..., out, words], a dense stream of `bits`, and
    float32 `scales` and `biases` [..., out, groups] for groups of `group_size`.

    A weight is scale * element + bias. The columns may be padded to whole groups, whose inputs must be zero.
    """

    weight: NDArray[np.uint32]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]
    group_size: int
    bits: int

    @property
    def columns(self) -> int:
        """The number of columns, those that pad them included."""
        return int(self.scales.shape[-1]) * self.group_size


@dataclass(frozen=True, slots=True)
class BitsCode:
    """Levels and scales: parts `levels` uint8 [out, bytes of a row], `scales` uint8 [out, groups] and `unit` float32.

    `group` weights of a row have a scale, or a whole ROW, or the MATRIX, whose `scales` are [1, 1]; the last group of a
    row may be shorter.
    """

    levels: int
    group: int = 128

    def __post_init__(self) -> None:
        if self.levels not in LEVELS or self.group not in GROUPS:
            raise ValueError(f"there is no code of {self.levels} levels in groups of {self.group}")

    def __str__(self) -> str:
        return f"{'1.6' if self.levels == 3 else bits_of(self.levels)}bit:{GROUPS[self.group]}"

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        rows, columns = shape
        return {
            "levels": PartLayout("U8", (rows, packed_bytes(self.levels, columns))),
            "scales": PartLayout("U8", self._scales_shape(rows, columns)),
            "unit": PartLayout("F32", ()),
        }

    def encode(
        self, matrix: NDArray[np.float32], *, unbiased: bool = False, moments: NDArray[np.float32] | None = None
    ) -> dict[str, NDArray[Any]]:
        exponent, energy = 0, float(np.vdot(matrix, matrix))
        if not LEAST_ENERGY < energy < GREATEST_ENERGY:  # a peak of about one keeps squares within float32
            exponent = int(np.frexp(check_finite(matrix))[1])
            matrix = np.ldexp(matrix, -exponent)
            energy = float(np.vdot(matrix, matrix))
        rows, columns = matrix.shape
        scales = np.zeros(self._scales_shape(rows, columns), np.float32)
        with_peaks = True
        viewed = self._view(matrix)
        for at, groups, block in self._blocks(viewed):
            scales[at, groups], share = _fit(block, self.levels, with_peaks)
            with_peaks = with_peaks and share > FEW
        rounding = 0.5 if self.levels >= 64 else 0.0
        codes, unit = encode_scales(scales, rounding)
        levels = np.empty((rows, columns), np.uint8)
        product = 0.0
        if moments is not None:
            unit *= ROOM
            steps = self._round_with_feedback(matrix, moments, codes, rounding, unit)
            levels[:] = steps + np.float32((self.levels - 1) / 2)
            if unbiased:
                scales = decode_scales(codes, np.asarray(unit, np.float32))
                decoded = steps * np.repeat(scales, self._span(columns), axis=1)[:, :columns]
                measured = matrix @ moments
                energy, product = float(np.vdot(measured, matrix)), float(np.vdot(measured, decoded))
        else:
            scales = decode_scales(codes, np.asarray(unit, np.float32))
            flat = self._view(levels)
            for at, groups, block in self._blocks(viewed):
                steps = _round(block, scales[at, groups], self.levels)
                if unbiased:
                    product += float(np.vdot(np.vecdot(block, steps), scales[at, groups]))
                steps += np.float32((self.levels - 1) / 2)
                start = groups.start * self._span(viewed.shape[1])
                flat[at, start : start + steps[0].size] = steps.reshape(len(steps), -1)
        if product > 0:
            unit *= energy / product
        unit = min(np.ldexp(unit, exponent), GREATEST / max(1.0, self.levels / 2))
        return {"levels": pack_levels(levels, self.levels), "scales": codes, "unit": np.asarray(unit, np.float32)}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        rows, columns = shape
        scales = decode_scales(parts["scales"], parts["unit"])
        values = unpack_levels(parts["levels"], self.levels, columns).astype(np.float32)
        values -= np.float32((self.levels - 1) / 2)
        span = self._span(columns)
        whole = columns // span * span
        grouped = values[:, :whole].reshape(rows, whole // span, span)
        if whole == columns:
            grouped *= scales[:, :, None]
            return values
        values[:, :whole] = (grouped * scales[:, : grouped.shape[1], None]).reshape(rows, whole)
        values[:, whole:] *= scales[:, -1:]
        return values

    def affine_settings(self, columns: int) -> tuple[int, int]:
        """The group size and the bits of MLX's affine form of matrices with that many columns."""
        bits = bits_of(self.levels)
        groups = MLX_GROUPS if self.group in (ROW, MATRIX) else (self.group, MLX_GROUP)
        return next((group for group in groups if columns % group == 0), MLX_GROUP), MLX_BITS.get(bits, bits)

    def as_affine(self, parts: Parts, shape: Shape) -> Affine:
        """MLX's affine form of the parts, which may be stacked: [...] before their own axes."""
        columns = shape[1]
        group, bits = self.affine_settings(columns)
        scales = decode_scales(parts["scales"], parts["unit"])
        if self.group == MATRIX:
            scales = np.repeat(scales, shape[0], axis=-2)
        if group != self.group:
            times = -(-self._span(columns) // group)
            scales = np.repeat(scales, times, axis=-1)[..., : -(-columns // group)]
        data = parts["levels"]
        if self.levels != 1 << bits:
            data = pack_levels(unpack_levels(data, self.levels, columns), 1 << bits)
        padded = scales.shape[-1] * group * bits // 8
        if missing := padded - data.shape[-1]:
            data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, missing)])
        biases = scales * np.float32((1 - self.levels) / 2)
        return Affine(np.ascontiguousarray(data).view("<u4"), scales, biases, group, bits)

    def _round_with_feedback(
        self,
        matrix: NDArray[np.float32],
        moments: NDArray[np.float32],
        codes: NDArray[np.uint8],
        rounding: float,
        unit: float,
    ) -> NDArray[np.float32]:
        """Like `_round`, column by column: later columns compensate for the error of each, as far as inputs are
        correlated.

        The bytes of the scales, `codes`, are set group by group, from what is left of the matrix at that point. This is
        GPTQ (Frantar and others, 2023), which is Babai's nearest plane: with U the upper Cholesky factor of the inverse
        moments, the error of column j moves column k by U[j, k] / U[j, j].
        """
        upper = _inverse_factor(moments)
        weights = moments.diagonal()
        left = matrix.copy()
        steps = np.empty_like(matrix)
        columns = matrix.shape[1]
        span = self._span(columns)
        for place, start in enumerate(range(0, columns, span)):
            stop = min(columns, start + span)
            own = (weights[start:stop] / weights[start:stop].mean(dtype=np.float64)).astype(np.float32)
            if self.group == MATRIX:
                scales, _ = _fit(left.reshape(1, 1, -1), self.levels, True, np.tile(own, len(left)))
            else:
                scales, _ = _fit(left[:, None, start:stop], self.levels, True, own)
            codes[:, place : place + 1], _ = encode_scales(scales, rounding, unit)
            scales = decode_scales(codes[:, place : place + 1], np.asarray(unit, np.float32))
            scales = np.broadcast_to(scales, (len(left), 1))
            errors = np.empty((len(matrix), stop - start), np.float32)
            for column in range(start, stop):
                steps[:, column] = _round(left[:, column, None, None], scales, self.levels)[:, 0, 0]
                error = (left[:, column] - steps[:, column] * scales[:, 0]) / upper[column, column]
                errors[:, column - start] = error
                left[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
            left[:, stop:] -= errors @ upper[start:stop, stop:]
        return steps

    def _span(self, columns: int) -> int:
        """How many weights of a row have one scale."""
        return max(1, columns) if self.group in (ROW, MATRIX) else self.group

    def _scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (1, 1) if self.group == MATRIX else (rows, -(-columns // self._span(columns)))

    def _view(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array as it is coded: of one row, where the matrix has one scale."""
        return array.reshape(1, -1) if self.group == MATRIX else array

    def _blocks(self, matrix: NDArray[np.float32]) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """The matrix block by block: the rows, the groups, and float32 [rows, groups, n]."""
        rows, columns = matrix.shape
        span = self._span(columns)
        whole = columns // span
        for first, last, length in ((0, whole, span), (whole, whole + 1, columns % span)):
            start, stop = first * span, first * span + (last - first) * length
            step = max(1, BLOCK // max(1, stop - start))
            for row in range(0, rows if start < stop else 0, step):
                block = matrix[row : row + step, start:stop]
                yield slice(row, row + step), slice(first, last), block.reshape(len(block), last - first, length)


def _weigh(block: NDArray[np.float32], weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """[rows, groups, n] times the weights [groups, n]; without any, the block itself."""
    return block if weights is None else block * weights


def _fit(
    block: NDArray[np.float32], levels: int, with_peaks: bool, weights: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], float]:
    """The scale of each group with the least squared error: [rows, groups, n] -> [rows, groups].

    `weights` [groups, n] are what the errors count, on average 1 in each group.

    With `with_peaks` the scale that puts the highest level on the peak is tried, too. Returns as well for what share of
    the groups that one is the best: it is for numbers that are levels already, and for many levels.
    """
    if levels == 2:
        mean: NDArray[np.float32] = _weigh(np.abs(block), weights).mean(axis=-1)
        return mean * np.float32(2.0), 0.0
    weighted = _weigh(block, weights)
    rms = np.sqrt(np.vecdot(weighted, block) / np.float32(block.shape[-1]))
    peak = np.abs(block).max(axis=-1)
    top = np.float32((levels - 1) / 2)
    slope, offset, spread = (np.float32(number) for number in TRIES[levels])
    best: NDArray[np.float32] = np.zeros_like(rms)
    gain = np.zeros_like(rms)
    share = 0.0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        usual = rms * np.exp2(slope * np.log2(peak / rms) + offset)
        shift = np.exp2(np.float32(SPREAD) * spread)
        tries = [usual] if levels >= 16 and with_peaks else [usual / shift, usual * shift]
        for place, scale in enumerate([peak / top, *tries] if with_peaks else tries):
            steps = _round(block, scale, levels)
            product, square = np.vecdot(weighted, steps), np.vecdot(_weigh(steps, weights), steps)
            fitted = np.where(square > 0, product / square, np.float32(0.0))
            # by fitted * product the squared error falls; of equals the first one is exact where that is possible
            better = fitted * product > gain * ALIKE
            gain = np.where(better, fitted * product, gain)
            best = np.where(better, fitted, best)
            share = 1.0 if with_peaks and not place else share - share * float(better.mean())
        # peaks say less of many numbers: levels and scale are fitted to each other in turns
        for _ in range(REFITS if block.shape[-1] > LONGEST else 0):
            steps = _round(block, best, levels)
            product, square = np.vecdot(weighted, steps), np.vecdot(_weigh(steps, weights), steps)
            fitted = np.where(square > 0, product / square, np.float32(0.0))
            best = np.where(fitted * product > gain * ALIKE, fitted, best)
            gain = np.maximum(gain, fitted * product)
    return best, share


def _round(block: NDArray[np.float32], scales: NDArray[np.float32], levels: int) -> NDArray[np.float32]:
    """The nearest levels, as multiples of the scales, from -(levels - 1) / 2 on; [rows, groups, n], as the block."""
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1.0) / scales, np.float32(0.0))
    steps: NDArray[np.float32] = block * inverse[:, :, None]
    half = np.float32(levels // 2)
    if levels % 2:
        np.rint(steps, out=steps)
        np.clip(steps, -half, half, out=steps)
        return steps
    np.floor(steps, out=steps)
    np.clip(steps, -half, half - 1, out=steps)
    steps += np.float32(0.5)
    return steps


def _inverse_factor(moments: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangular U with Uᵀ U = the inverse of the moments."""
    # the reversed moments' lower factor L gives it: U is the inverse of L, turned around
    lower = np.linalg.cholesky(moments[::-1, ::-1].astype(np.float64))
    return np.asarray(np.linalg.inv(lower)[::-1, ::-1], np.float32)
