"""How one matrix is kept: a closed set of codes, each with its text in an overlay's config.

`bf16`; `3bit:128`, levels with a scale for each 128 weights (1, 1.6 and 2 to 8 bits), or for each `row`, or one for the
`matrix`; `2trellis`, a trellis with a scale for each row (1 to 4 bits); `rank8:3bit:128`, factors in levels;
`rank8:3bit:128+2bit:128`, factors and the rest, which may be a trellis.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bf16 import Bf16Code
from .bits import GROUPS, BitsCode
from .code import PartLayout, Parts, Shape, code_bytes, inner
from .low_rank import FactorsCode, SumCode
from .trellis import TrellisCode

MatrixCode = Bf16Code | BitsCode | TrellisCode | FactorsCode | SumCode

_BITS = re.compile(rf"(1|1\.6|[2-8])bit:({'|'.join(GROUPS.values())})")
_TRELLIS = re.compile(r"([1-4])trellis")
_FACTORS = re.compile(r"rank(\d{1,6}):(.*)")


@dataclass(frozen=True, slots=True)
class BankShape:
    """The neurons of a bank, and how many of each expert's are deltas from one of these.

    `axis` of a matrix [out, in] is that of the neurons: 0 for gate and up, 1 for down.
    """

    size: int
    matched: int
    axis: int

    def cut(self, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """The shapes of the bank, of an expert's deltas and of its unshared neurons."""
        of_bank, of_deltas, of_others = (
            (count, shape[1]) if self.axis == 0 else (shape[0], count)
            for count in (self.size, self.matched, shape[self.axis] - self.matched)
        )
        return of_bank, of_deltas, of_others

    def index(self, experts: int) -> PartLayout:
        """Which neurons of the bank those of the experts refer to, [experts, matched], in the smallest integer type."""
        dtype = "U8" if self.size <= 2**8 else "U16" if self.size <= 2**16 else "U32"
        return PartLayout(dtype, (experts, self.matched))

    def split(self, matrix: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """An expert's neurons that are deltas, and its unshared ones."""
        deltas, others = np.split(matrix, [self.matched], axis=self.axis)
        return np.ascontiguousarray(deltas), np.ascontiguousarray(others)

    def split_moments(self, moments: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The second moments [in, in] of neurons that are deltas, and of unshared ones, if neurons are inputs."""
        return moments[: self.matched, : self.matched], moments[self.matched :, self.matched :]


@dataclass(frozen=True, slots=True)
class RoleCodes:
    """The codes of one projection of a layer: that of its base, and that of each expert's delta from the stored base.

    Without a base, `delta` is the code of the experts themselves. With a `bank`, the base holds its neurons, `delta`
    the neurons of an expert that refer to it, and `rest` the unshared ones, None if there are none. `unbiased` says
    that the deltas are coded without bias; decoding does not depend on it.
    """

    base: MatrixCode | None
    delta: MatrixCode
    rest: MatrixCode | None = None
    bank: BankShape | None = None
    unbiased: bool = False

    def sides(self, shape: Shape) -> dict[str, tuple[MatrixCode, Shape]]:
        """The codes of "base", "delta" and "rest" of a projection of that shape, and the shapes of their matrices."""
        shapes = self.bank.cut(shape) if self.bank else (shape, shape, (0, 0))
        codes = {"base": self.base, "delta": self.delta, "rest": self.rest}
        return {side: (code, of_side) for (side, code), of_side in zip(codes.items(), shapes, strict=True) if code}

    def nbytes(self, shape: Shape, experts: int) -> int:
        """Bytes of base and deltas of a projection whose matrices have that shape."""
        return sum(
            (1 if side == "base" else experts) * code_bytes(code, of_side)
            for side, (code, of_side) in self.sides(shape).items()
        )

    def layout(self, shape: Shape, experts: int) -> dict[str, PartLayout]:
        """All parts, "base.*", "delta.*" and "rest.*"; those of the experts have these for their first axis."""
        return {
            f"{side}.{name}": part if side == "base" else PartLayout(part.dtype, (experts, *part.shape))
            for side, (code, of_side) in self.sides(shape).items()
            for name, part in code.layout(of_side).items()
        }

    def join(self, parts: Parts, shape: Shape, base: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """An expert [out, in] from its parts, "delta.*" and "rest.*", and the stored base of its deltas."""
        sides = self.sides(shape)
        code, of_delta = sides["delta"]
        matrix = code.decode(inner(parts, "delta"), of_delta)
        if base is not None:
            matrix += base
        if self.bank and "rest" in sides:
            code, of_rest = sides["rest"]
            matrix = np.concatenate([matrix, code.decode(inner(parts, "rest"), of_rest)], axis=self.bank.axis)
        return matrix


def index_layout(codes: Mapping[str, RoleCodes], experts: int) -> PartLayout | None:
    """The index of a layer's bank; None where it has none."""
    return next((each.bank.index(experts) for each in codes.values() if each.bank), None)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix among a projection's parts, or a stack of one for each expert.

    `part` is what the names of its parts begin with ("delta.factors.left"), `code` its code, which is bits, a trellis
    or bf16, and `shape` (out, in) its shape there; left factors are transposed.
    """

    part: str
    code: Bf16Code | BitsCode | TrellisCode
    shape: Shape
    experts: int | None


def list_matrices(codes: RoleCodes, shape: Shape, experts: int) -> dict[str, StoredMatrix]:
    """The matrices of a projection of that shape by what they are: "base", "delta", "left", "right" and "rest".

    A matrix that is not there is left out; the delta is what is coded beside its factors. Raises ValueError for a base
    or a rest in factors.
    """
    matrices: dict[str, StoredMatrix] = {}
    sides = codes.sides(shape)
    for side in ("base", "rest"):
        if side in sides:
            code, of_side = sides[side]
            if not isinstance(code, Bf16Code | BitsCode | TrellisCode):
                raise ValueError(f"a {side} can't be in the code {code}")
            matrices[side] = StoredMatrix(side, code, of_side, None if side == "base" else experts)
    (delta, of_delta), factors = sides["delta"], "delta"
    if isinstance(delta, SumCode):
        matrices["delta"] = StoredMatrix("delta.rest", delta.rest, of_delta, experts)
        delta, factors = delta.factors, "delta.factors"
    if not isinstance(delta, FactorsCode):
        matrices["delta"] = StoredMatrix("delta", delta, of_delta, experts)
    elif delta.rank:
        matrices["left"] = StoredMatrix(f"{factors}.left", delta.bits, (delta.rank, of_delta[0]), experts)
        matrices["right"] = StoredMatrix(f"{factors}.right", delta.bits, (delta.rank, of_delta[1]), experts)
    return matrices


LayerCodes = Mapping[str, RoleCodes]
"""Role -> codes, for one layer."""


def parse_code(text: str) -> MatrixCode:
    """The code that a text in an overlay's config names; raises ValueError for any other text."""
    if text == str(Bf16Code()):
        return Bf16Code()
    factors, plus, rest = text.partition("+")
    if match := _FACTORS.fullmatch(factors):
        code = FactorsCode(int(match[1]), _parse_bits(match[2]))
        return SumCode(code, _parse_rest(rest)) if plus else code
    return _parse_rest(text)


def _parse_rest(text: str) -> BitsCode | TrellisCode:
    match = _TRELLIS.fullmatch(text)
    return TrellisCode(int(match[1])) if match else _parse_bits(text)


def _parse_bits(text: str) -> BitsCode:
    match = _BITS.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a code")
    return BitsCode(
        3 if match[1] == "1.6" else 2 ** int(match[1]), next(group for group in GROUPS if GROUPS[group] == match[2])
    )
