"""How an overlay keeps an expert: its delta from the base, as two bf16 factors."""

import numpy as np
from numpy.typing import NDArray

from ..jobs.measure import subtract_base
from ..numerics.low_rank import Factors, factorise
from .quantisation import as_stored


def split_delta(layer: int, role: str, matrix: NDArray[np.float32], base: NDArray[np.float32], rank: int) -> Factors:
    """The factors of `matrix - base`, both [out, in], as a file holds them; overwrites the matrix.

    Raises ModelUnreadable, naming layer and role, where float32 can't hold the delta.
    """
    subtract_base(layer, role, matrix, base)
    factors = factorise(matrix, rank)
    return Factors(as_stored(factors.left), as_stored(factors.right))
