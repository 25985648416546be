"""How alike matrices are."""

import numpy as np
from numpy.typing import NDArray


def pairwise_cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of every pair of vectors, [pairs], from their Gram matrix [vectors, vectors].

    A zero vector has cosine 0 with everything.
    """
    norms = np.sqrt(np.diag(gram))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = gram * inverse[:, None] * inverse[None, :]
    return np.clip(cosines[np.triu_indices(len(gram), 1)], -1.0, 1.0)
