"""One layer of a model and of its conversion, side by side: the same expert's matrices of both, and their errors."""

from dataclasses import dataclass, field
from math import inf

import numpy as np

from ..jobs.measure import refuse_not_finite
from ..numerics.deviation import deviation
from ..numerics.neurons import Array
from ..weights.codecs import Grid
from ..weights.expert_layer import ExpertLayer, ExpertTensor
from .format_error import ARITHMETIC, format_error

CORNER = 64  # neurons and inputs of an expert by which experts are distinguished

Matrices = dict[str, Array]  # by role, [out, in]


@dataclass(frozen=True, slots=True)
class RoleError:
    """The error of a converted matrix, and the error that its format should cause: relative Frobenius errors.

    The error is infinite if the matrix is not finite. `original` and `converted` are corners of both.
    """

    error: float
    expected: float
    original: Array = field(repr=False)
    converted: Array = field(repr=False)


@dataclass(frozen=True, slots=True)
class LayerPair:
    """A layer of the original and the same layer of its conversion; each expert is read separately.

    The error of an expert may be `tolerance` times the expected error of its format, which is at least that of
    arithmetic in bfloat16. In the coarsest formats it may only go half of the way from the expected error to 1, the
    error of zeros.
    """

    original: ExpertLayer
    converted: ExpertLayer
    tolerance: float
    _alone: dict[int, ExpertLayer] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.original.number

    @property
    def roles(self) -> tuple[str, ...]:
        return self.original.roles

    def alone(self, expert: int) -> ExpertLayer:
        """The converted layer that holds this expert."""
        if expert not in self._alone:
            self._alone[expert] = self.converted.alone(expert)
        return self._alone[expert]

    def place(self, expert: int) -> int:
        """The number of an expert in the layer that `alone` gives."""
        return expert if self.converted.layout.is_single else 0

    def read_converted(self, expert: int) -> Matrices:
        """The matrices of a converted expert, which may be anything."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.alone(expert).matrices(self.place(expert))

    def compare(self, expert: int, source: int) -> dict[str, RoleError]:
        """The errors of a converted expert by role, as against expert `source` of the original.

        Raises ModelUnreadable where the latter is not finite.
        """
        errors: dict[str, RoleError] = {}
        for roles in self._roles_together(expert):
            original = _read(self.original, source, roles)
            with np.errstate(over="ignore", invalid="ignore"):
                converted = _read(self.alone(expert), self.place(expert), roles)
            for role, matrix in original.items():
                error = deviation(converted[role], matrix)
                if error == inf and not np.isfinite(matrix).all():
                    refuse_not_finite(self.original, source, role)
                corners = (values[:CORNER, :CORNER].copy() for values in (matrix, converted[role]))
                errors[role] = RoleError(error, self.expected(expert, role, matrix), *corners)
        return errors

    def _roles_together(self, expert: int) -> list[set[str]]:
        """The roles that have to be read together, because a stored tensor of either model holds them."""
        together: list[set[str]] = []
        for tensor in (*self.original.tensors, *self.alone(expert).tensors):
            roles = set(tensor.spec.roles)
            joined = [group for group in together if group & roles]
            together = [group for group in together if not group & roles] + [roles.union(*joined)]
        return together

    def expected(self, expert: int, role: str, matrix: Array) -> float:
        """The error that an original matrix should have in the format of a converted expert."""
        tensor = tensor_of(self.alone(expert), role)
        grid = tensor.stored.grid or Grid("int", (1, 32), max(1, int(bits_per_weight(tensor))), has_zero=True)
        return format_error(matrix.T if tensor.is_turned(role) else matrix, grid)

    def allowed(self, expected: float) -> float:
        """The largest error that a matrix may have."""
        expected = max(expected, ARITHMETIC / 2)
        return min(self.tolerance * expected, max(expected, (1 + expected) / 2))

    def corners(self, layer: ExpertLayer, expert: int) -> Matrices:
        """By role, some neurons of an expert by some of their inputs, as far as a few stored rows have them."""
        found: Matrices = {}
        for tensor in layer.tensors:
            for window in tensor.neurons(min(CORNER, layer.sizes["I"])):
                for piece in tensor.read([expert], *window):
                    found[piece.role] = piece.values[0][:CORNER, :CORNER]
        return found


def _read(layer: ExpertLayer, expert: int, roles: set[str]) -> Matrices:
    """An expert's matrices of some roles."""
    return {
        role: matrix
        for tensor in layer.tensors
        if roles.issuperset(tensor.spec.roles)
        for role, matrix in tensor.matrices(expert).items()
    }


def tensor_of(layer: ExpertLayer, role: str) -> ExpertTensor:
    """The stored tensor that holds a role."""
    return next(tensor for tensor in layer.tensors if role in tensor.spec.roles)


def bits_per_weight(tensor: ExpertTensor) -> float:
    """What the file spends on a weight of a stored tensor."""
    layer = tensor.layer
    weights = sum(np.prod(layer.shape(role)) for role in tensor.spec.roles) * max(1, layer.sizes["E"])
    return float(8 * sum(info.nbytes for info in tensor.infos()) / weights)
