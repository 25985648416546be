"""Whether the router of a converted layer belongs to its experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import MoEError
from ..numerics.deviation import deviation
from ..numerics.neurons import Array, unit_rows
from .faults import Fault
from .format_error import ARITHMETIC, format_error
from .pair import LayerPair


@dataclass(frozen=True, slots=True)
class RouterCheck:
    """The relative error of a router's weight, None where either model has none that we find; and what is wrong."""

    error: float | None
    faults: tuple[Fault, ...] = ()


def check_router(pair: LayerPair, order: Sequence[int]) -> RouterCheck:
    """Compare the routers of a layer whose expert e is expert `order[e]` of the original."""
    try:
        exact, found = pair.original.router_weight(), pair.converted.router_weight()
    except MoEError as error:
        return RouterCheck(None, (Fault(pair.number, "router", f"it can't be read: {error.message}"),))
    if exact is None:
        return RouterCheck(None)
    if found is None:
        return RouterCheck(None, (Fault(pair.number, "router", "it is missing"),))
    (weight, grid), original = found, exact[0]
    if weight.shape != original.shape:
        detail = f"its shape is {list(weight.shape)}, but the original's is {list(original.shape)}"
        return RouterCheck(None, (Fault(pair.number, "router", detail),))
    allowed = pair.allowed(format_error(original, grid) if grid else 0.0)
    lost = deviation(weight, original[list(order)])
    if lost > allowed and (factors := norm_factors(pair)) is not None:
        lost = deviation(weight, original[list(order)] * factors)
    details = [] if lost <= allowed else [_explain(weight, original, allowed, lost)]
    vectors = pair.converted.router_vectors()
    for name, vector in pair.original.router_vectors().items():
        details += filter(None, [_compare_vectors(name, vectors.get(name), vector, order)])
    return RouterCheck(lost if np.isfinite(lost) else None, tuple(Fault(pair.number, "router", d) for d in details))


def norm_factors(pair: LayerPair) -> Array | None:
    """By what the norm before the experts and the router was divided, [hidden]; None where it is as it was."""
    here, there = pair.converted.norm(), pair.original.norm()
    if here is None or there is None or here.shape != there.shape or not here.all():
        return None
    factors = there / here
    return None if np.abs(factors - 1).max() <= ARITHMETIC else factors


def rows_agree(pair: LayerPair, order: Sequence[int]) -> bool:
    """Whether the router's rows are those of the original in the given order."""
    check = check_router(pair, order)
    return check.error is not None and not check.faults


def _explain(weight: Array, exact: Array, allowed: float, error: float) -> str:
    if not np.isfinite(weight).all():
        return "its weight is not finite"
    if not weight.any():
        return "its weight is all zeros"
    nearest = nearest_rows(weight, exact)
    if len(set(nearest.tolist())) == len(nearest) and deviation(weight, exact[nearest]) <= allowed:
        return "its rows are in a different order from the experts"
    factor = float(np.vdot(weight, exact)) / float(np.vdot(exact, exact))
    if factor and deviation(weight / np.float32(factor), exact) <= allowed:
        return f"its weight is {factor:.4g} times the original's"
    return f"the error of its weight is {100 * error:.3g} %"


def _compare_vectors(name: str, vector: Array | None, exact: Array, order: Sequence[int]) -> str | None:
    what = "its score correction bias" if name == "correction" else "its bias"
    if vector is None:
        return f"{what} is missing"
    if vector.shape != exact.shape or len(exact) != len(order):
        return None if vector.shape == exact.shape else f"{what} has {len(vector)} values, not {len(exact)}"
    wanted = exact[list(order)]
    if not np.isfinite(vector).all() or np.abs(vector - wanted).max() > ARITHMETIC * np.abs(exact).max():
        return f"{what} differs from the original's"
    if (vector != wanted).any() and (np.sort(vector) == np.sort(exact)).all():
        return f"{what} is in a different order from the experts"
    return None


def nearest_rows(weight: Array, exact: Array) -> NDArray[np.intp]:
    """For each row of a router [experts, inputs], the row of the exact one that is nearest by cosine."""
    return np.asarray((unit_rows(weight) @ unit_rows(exact).T).argmax(axis=1))
