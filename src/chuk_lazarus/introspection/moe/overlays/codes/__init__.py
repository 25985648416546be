"""How one matrix is kept: a closed set of codes, each with its text in an overlay's config.

`bf16`; `3bit:128`, levels with a scale for each 128 weights (1, 1.6 and 2 to 8 bits); `rank8:3bit:128`, factors in such
a code; `rank8:3bit:128+2bit:128`, factors and the rest.
"""

import re

from .bf16 import Bf16Code
from .bits import BitsCode
from .low_rank import FactorsCode, SumCode

MatrixCode = Bf16Code | BitsCode | FactorsCode | SumCode

_BITS = re.compile(r"(1|1\.6|[2-8])bit:(64|128)")
_FACTORS = re.compile(r"rank(\d{1,6}):(.*)")


def parse_code(text: str) -> MatrixCode:
    """The code that a text in an overlay's config names; raises ValueError for any other text."""
    if text == str(Bf16Code()):
        return Bf16Code()
    factors, plus, rest = text.partition("+")
    if match := _FACTORS.fullmatch(factors):
        code = FactorsCode(int(match[1]), _parse_bits(match[2]))
        return SumCode(code, _parse_bits(rest)) if plus else code
    return _parse_bits(text)


def _parse_bits(text: str) -> BitsCode:
    match = _BITS.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no code")
    return BitsCode(3 if match[1] == "1.6" else 2 ** int(match[1]), int(match[2]))
