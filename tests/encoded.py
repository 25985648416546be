"""What a test's encoder returns: one matrix in some storage format."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """A matrix as it is stored.

    `parts`: a part's name as on disk, after the module's name and a dot -> its safetensors dtype and its array; one of
    dtype F4, whose shape in a file counts elements, is an array of bytes with half as many columns. `values` are what
    they mean, [out, in]. `quantization` is the config's quantization_config, or "quantization" for MLX.
    """

    parts: dict[str, tuple[str, NDArray[Any]]]
    values: NDArray[np.float32]
    quantization: dict[str, Any]
