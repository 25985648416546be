"""Second moments of the inputs of the experts' projections, which weight the errors of codes.

The squared error of an expert's output on its inputs x is that of the weights, E, in the metric of their second moments
H: the trace of E H Eᵀ (Frantar and others, 2023, for H from a text).
"""

import io
import threading
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable
from ..files import write_whole
from ..jobs.model import evenly_spaced
from ..numerics.forward import run_gates
from ..weights.expert_layer import ExpertLayer

OTHERS = 128  # tokens of the layer that each expert gets in addition to its own
DAMPING = 0.01  # of the mean over all columns, which each column is given: another text may use what this one does not


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """The inputs of the experts of a layer while a model reads a text.

    `x` are bfloat16 inputs [tokens, hidden], and `experts` int32 [tokens, k] those that each token is routed to.
    """

    x: NDArray[np.generic]
    experts: NDArray[np.int32]

    def of_expert(self, expert: int) -> NDArray[np.float32]:
        """The inputs of one expert [n, hidden], plus a few of all tokens, for experts that got none."""
        is_theirs = (self.experts == expert).any(axis=1)
        is_theirs[list(evenly_spaced(len(self.x), OTHERS))] = True
        return np.asarray(self.x[is_theirs], np.float32)

    def write(self, path: Path) -> None:
        """Write a file that `read` reads; raises OSError."""
        file = io.BytesIO()
        np.savez(file, x=self.x.view(np.uint16), experts=self.experts)
        write_whole(path, file.getvalue())

    @classmethod
    def read(cls, path: Path) -> "LayerInputs":
        """What `write` wrote; raises OSError."""
        with np.load(path) as arrays:
            return cls(arrays["x"].view(ml_dtypes.bfloat16), arrays["experts"])


class ExpertMoments:
    """The second moments of what enters the projections of a layer's experts; several threads may ask for them."""

    def __init__(self, layer: ExpertLayer, inputs: LayerInputs, activation: str) -> None:
        self._layer, self._inputs, self._activation = layer, inputs, activation
        self._last = threading.local()  # gate and up follow each other, and have the same inputs

    def of(self, role: str, expert: int) -> NDArray[np.float32]:
        """The second moments [in, in] of what enters one matrix; neurons are in the expert's own order.

        Raises ModelUnreadable where they are not finite.
        """
        key = role == "down", expert
        if getattr(self._last, "key", None) != key:
            x = self._inputs.of_expert(expert)
            if role == "down":
                matrices, biases = self._layer.matrices(expert), self._layer.biases(expert)
                with np.errstate(over="ignore", invalid="ignore"):
                    x = run_gates(x, matrices, biases, self._activation)
                if not np.isfinite(x).all():
                    where = f"layer {self._layer.number}, expert {expert}"
                    raise ModelUnreadable(
                        f"{where}: its activations are too large for float32", "it can't be calibrated"
                    )
            self._last.key, self._last.moments = key, second_moments(x)
        moments: NDArray[np.float32] = self._last.moments
        return moments


def second_moments(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of x xᵀ over the rows of `x` [n, d], with DAMPING on its diagonal: [d, d], positive definite."""
    scaled = x / np.float32(np.abs(x).max(initial=0.0) or 1.0)
    moments = np.asarray(scaled.T @ scaled / np.float32(len(x)), np.float32)
    mean = moments.trace() / np.float32(len(moments))
    np.fill_diagonal(moments, moments.diagonal() + np.float32(DAMPING) * (mean or np.float32(1.0)))
    return moments


def permute_moments(role: str, moments: NDArray[np.float32], permutation: NDArray[np.intp]) -> NDArray[np.float32]:
    """Those of a matrix whose neurons are in another order, see `permute`."""
    return moments[np.ix_(permutation, permutation)] if role == "down" else moments


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text of a calibration: its number of `tokens`, and their `digest`."""

    tokens: int
    digest: str

    def __str__(self) -> str:
        return f"calibrated on {self.tokens} tokens ({self.digest})"
