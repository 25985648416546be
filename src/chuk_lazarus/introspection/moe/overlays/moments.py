"""Second moments of what enters the experts' projections, by which the errors of columns are weighted.

The squared error of an output is that of the weights, each column times the mean square of its input, where inputs are
uncorrelated.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from ..numerics.alignment import Alignment

PRIOR = 32  # tokens' worth of the layer's mean moments that each expert is given
LEAST = 0.01  # of the mean over all columns, which each column is given

_rows_of_floats = TypeAdapter(list[list[float]])


def _as_rows(value: Any) -> NDArray[np.float32]:
    return np.array(_rows_of_floats.validate_python(value), np.float32)


Rows = Annotated[NDArray[np.float32], PlainValidator(_as_rows), PlainSerializer(lambda array: array.tolist())]
"""A matrix; in JSON it is a list of rows, which are read back exactly."""


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """Mean squares by expert: of the `inputs` [experts, hidden] of gate and up, and of those of down, the `neurons`
    [experts, intermediate] in the expert's own order."""

    inputs: Rows
    neurons: Rows

    def of_role(self, role: str) -> NDArray[np.float32]:
        """The mean squares of what enters a role's matrices: [experts, in]."""
        return self.neurons if role == "down" else self.inputs

    def of_expert(self, role: str, expert: int, alignment: Alignment) -> NDArray[np.float32]:
        """Those of one expert [in], its neurons in the order of the base."""
        moments = self.of_role(role)[expert]
        return moments[alignment.permutations[expert]] if role == "down" else moments

    def of_base(self, role: str, alignment: Alignment) -> NDArray[np.float32]:
        """The mean of all experts' [in], their neurons in order."""
        moments = [self.of_expert(role, expert, alignment) for expert in range(len(self.of_role(role)))]
        return np.asarray(np.mean(moments, axis=0, dtype=np.float64), np.float32)


def mean_squares(sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean squares [experts, n] from sums of squares and the numbers of tokens [experts].

    An expert with few tokens is drawn to the layer's mean, as if PRIOR tokens had been seen of that; an input that is
    always zero still counts a little, since another text may use it.
    """
    total = counts.sum(dtype=np.float64)
    mean = sums.sum(axis=0, dtype=np.float64) / total if total else np.ones(sums.shape[1])
    moments = (sums + PRIOR * mean) / (counts[:, None] + PRIOR)
    return np.asarray(moments + LEAST * moments.mean(axis=1, keepdims=True), np.float32)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The moments of some layers, by number, from so many `tokens`; `digest` tells them from any other tokens."""

    tokens: int
    digest: str
    moments: dict[int, LayerMoments]

    def __str__(self) -> str:
        return f"calibrated on {self.tokens} tokens ({self.digest})"
