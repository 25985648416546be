"""How one matrix is kept: a closed set of codes, each with its text in an overlay's config.

`bf16`; `3bit:128`, levels with a scale for each 128 weights (1, 1.6 and 2 to 8 bits); `2trellis`, a trellis with a
scale for each row (1 to 4 bits); `rank8:3bit:128`, factors in levels; `rank8:3bit:128+2bit:128`, factors and the rest,
which may be a trellis.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .bf16 import Bf16Code
from .bits import BitsCode
from .code import PartLayout, Shape, code_bytes
from .low_rank import FactorsCode, SumCode
from .trellis import TrellisCode

MatrixCode = Bf16Code | BitsCode | TrellisCode | FactorsCode | SumCode

_BITS = re.compile(r"(1|1\.6|[2-8])bit:(64|128)")
_TRELLIS = re.compile(r"([1-4])trellis")
_FACTORS = re.compile(r"rank(\d{1,6}):(.*)")


@dataclass(frozen=True, slots=True)
class RoleCodes:
    """How a projection of a layer is kept: the code of its base, and that of each expert's delta from the stored base.

    Without a base, `delta` is the code of the experts themselves.
    """

    base: MatrixCode | None
    delta: MatrixCode

    def base_bytes(self, shape: Shape) -> int:
        """Bytes of the base, 0 where there is none."""
        return code_bytes(self.base, shape) if self.base else 0

    def nbytes(self, shape: Shape, experts: int) -> int:
        """Bytes of base and deltas of a projection whose matrices have that shape."""
        return self.base_bytes(shape) + experts * code_bytes(self.delta, shape)

    def layout(self, shape: Shape, experts: int) -> dict[str, PartLayout]:
        """All parts, "base.*" and "delta.*"; those of the deltas have the experts for their first axis."""
        base = self.base.layout(shape) if self.base else {}
        return {f"base.{name}": part for name, part in base.items()} | {
            f"delta.{name}": PartLayout(part.dtype, (experts, *part.shape))
            for name, part in self.delta.layout(shape).items()
        }


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
    """The matrices of a projection of that shape by what they are: "base", "delta", "left" and "right".

    A matrix that is not there is left out; the delta is what is coded beside its factors.
    """
    matrices = {}
    if codes.base is not None:
        if not isinstance(codes.base, Bf16Code | BitsCode | TrellisCode):
            raise ValueError(f"a base in the code {codes.base}")
        matrices["base"] = StoredMatrix("base", codes.base, shape, None)
    delta, factors = codes.delta, "delta"
    if isinstance(delta, SumCode):
        matrices["delta"] = StoredMatrix("delta.rest", delta.rest, shape, experts)
        delta, factors = delta.factors, "delta.factors"
    if not isinstance(delta, FactorsCode):
        matrices["delta"] = StoredMatrix("delta", delta, shape, experts)
    elif delta.rank:
        matrices["left"] = StoredMatrix(f"{factors}.left", delta.bits, (delta.rank, shape[0]), experts)
        matrices["right"] = StoredMatrix(f"{factors}.right", delta.bits, (delta.rank, shape[1]), experts)
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
        raise ValueError(f"{text!r} is no code")
    return BitsCode(3 if match[1] == "1.6" else 2 ** int(match[1]), int(match[2]))
