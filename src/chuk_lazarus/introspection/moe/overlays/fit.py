"""Does a model fit into a number of bytes, and at what error? From headers alone, before weights are read."""

from bisect import bisect_left

import numpy as np

from ..errors import InvalidRequest
from ..reports import FitPlan
from ..text import parse_size
from .codes.affine import AFFINE_BITS

# relative squared errors of our affine codes on Gaussian weights, by bits per weight with their scales
# (tests/overlays/test_fit.py measures them again)
GAUSSIAN_ERRORS = {2.25: 0.1152, 2.5: 0.1066, 3.25: 0.0337, 4.25: 0.00884, 5.25: 0.00222, 6.25: 0.00055, 8.25: 3.5e-5}
SCALE_BITS = 0.5  # per weight of the rest, in groups of 64
MACHINES = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # memories that are sold, in GB
USABLE = 0.75  # the share of its memory that MLX may take on a Mac by default
CONTEXT = 8192
REST_BITS = 8
KEEP = "keep"


def plan_fit(
    size: int | str,
    *,
    parameters: int,
    stored_bytes: int,
    other_bytes: int | None,
    cache_bytes_per_token: int | None,
    context: int = CONTEXT,
    rest_bits: int | None = 8,
) -> FitPlan:
    """How a model with that many expert `parameters` fits into `size` bytes, quantised for mlx-lm.

    `stored_bytes` are those of its experts' files. `other_bytes` are those of everything else, assumed to have 16 bits
    per weight; None counts as nothing. The error is that of Gaussian weights.
    """
    wanted = parse_size(size, "the size of the folder") if isinstance(size, str) else size
    rest = other_bytes or 0
    if rest_bits is not None:
        rest = int(rest * (rest_bits + SCALE_BITS) / 16)
    bits = 8 * (wanted - rest) / parameters
    fits = bits >= min(GAUSSIAN_ERRORS)
    bits = min(bits, 16.0)
    weights = int(bits / 8 * parameters) + rest
    cache = None if cache_bytes_per_token is None else cache_bytes_per_token * context
    memory = weights + (cache or 0)
    return FitPlan(
        size=wanted,
        fits=fits,
        bits_per_weight=bits if fits else None,
        weight_error=expected_error(bits) if fits else None,
        bound=2.0**-bits if fits else None,
        least_bytes=int(min(GAUSSIAN_ERRORS) / 8 * parameters) + rest,
        rest_bits=rest_bits,
        rest_bytes=rest if other_bytes is not None else None,
        context=context,
        cache_bytes=cache,
        memory_bytes=memory if fits else None,
        machine_bytes=smallest_machine(memory) if fits else None,
        download_bytes=stored_bytes + (other_bytes or 0),
    )


def expected_error(bits: float) -> float:
    """The relative weight error at that many bits per weight, if the weights are Gaussian.

    Between the widths it falls geometrically, like that of a mix of two, or faster.
    """
    errors = np.log2(list(GAUSSIAN_ERRORS.values()))
    squared = 2.0 ** float(np.interp(bits, list(GAUSSIAN_ERRORS), errors))
    return float(squared**0.5)


def smallest_machine(memory: int) -> int | None:
    """The smallest memory, in bytes, of a Mac that may use that many for MLX; None if no Mac may."""
    place = bisect_left(MACHINES, memory / USABLE / 1e9)
    return MACHINES[place] * 10**9 if place < len(MACHINES) else None


def parse_rest_bits(value: int | str) -> int | None:
    """The bits of everything but routed experts, None to keep it; raises InvalidRequest for anything else."""
    if value == KEEP:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value not in AFFINE_BITS:
        raise InvalidRequest(
            f"the rest can't have {value!r} bits", f"give {', '.join(map(str, AFFINE_BITS))} or {KEEP}"
        )
    return int(value)
