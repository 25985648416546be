"""Experts in a plain quantised checkpoint: each is read, coded, written and compared separately.

Each format knows the names of their tensors, and where in these an expert lies.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable
from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.expert_layer import ExpertLayer
from ..codes.code import HasLayout, PartLayout, Parts, Shape
from ..fidelity import MATRICES_COMPARED, ExpertErrors, FidelityCheck
from ..quantisation import BF16
from .folder import Tensor

MATRICES_HELD = 8  # by a thread that codes one expert


class ExpertCode(HasLayout, Protocol):
    """A way to keep a matrix."""

    def encode(self, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The parts of a matrix [out, in]; raises ValueError where it is not finite."""

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The matrix [out, in] that the parts stand for."""


class Bf16Code:
    """A matrix as it is, in bfloat16."""

    def layout(self, shape: Shape) -> dict[str, PartLayout]:
        """One part, `weight`."""
        return {"weight": PartLayout("BF16", shape)}

    def encode(self, matrix: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The part of a matrix."""
        return {"weight": matrix.astype(BF16)}

    def decode(self, parts: Parts, shape: Shape) -> NDArray[np.float32]:
        """The matrix again."""
        return parts["weight"].astype(np.float32)


def coded_tensors(module: str, shape: tuple[int, ...], code: ExpertCode) -> list[Tensor]:
    """The tensors of a module whose weight has that shape, of which the last two axes are a matrix's."""
    *leading, rows, columns = shape
    count = prod(leading)
    return [
        Tensor(f"{module}.{name}", part.dtype, (*leading, *part.shape), count * part.nbytes)
        for name, part in code.layout((rows, columns)).items()
    ]


def encode(code: ExpertCode, matrix: NDArray[np.float32], name: str) -> dict[str, NDArray[Any]]:
    """The parts of a matrix; raises ModelUnreadable, which says its name, where it is not finite."""
    try:
        return code.encode(matrix)
    except ValueError as error:
        raise ModelUnreadable(f"{name}: {error}", "the checkpoint is broken") from None


def write_experts(
    layer: ExpertLayer,
    codes: Mapping[str, ExpertCode],
    write: Callable[[int, str, str, bytes], None],
    *,
    check: FidelityCheck | None,
    resources: Resources,
    progress: Progress,
) -> None:
    """Write the experts of a layer, each as soon as it is coded, with a code for each role.

    `write` takes the expert, the role, and the name and the bytes of a part. `check` compares the experts that it is
    for with what is written of them.
    """
    layer.prefetch(progress)

    def write_one(expert: int) -> ExpertErrors | None:
        exact, rebuilt = layer.matrices(expert), {}
        is_checked = check is not None and expert in check.experts
        for role, matrix in exact.items():
            parts = encode(codes[role], matrix, f"layer {layer.number}: {role} of expert {expert}")
            for name, part in parts.items():
                write(expert, role, name, part.tobytes())
            if is_checked:
                rebuilt[role] = codes[role].decode(parts, layer.shape(role))
        return check.compare(expert, exact, rebuilt) if check and is_checked else None

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED if check else MATRICES_HELD) as pool:
        for errors in pool.map(write_one, range(layer.count)):
            if check and errors:
                check.add(errors)
