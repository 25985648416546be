"""Explains the error of a converted expert. Each check guesses one thing that the conversion may have done; the first
guess that leaves no more error than the format explains is reported. Pure arrays.

Matrices are by role, [out, in]; gate and up have neurons as rows, down as columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from ..numerics.deviation import deviation
from ..numerics.neurons import Array, unit_rows
from ..reports import FaultKind

LINES = 256  # rows or columns whose products are compared, to detect a rotation
ROTATED = 0.5  # the least correlation of products that only a rotation leaves
CLEARLY = 0.7  # an explanation may leave at most this share of the error
TURNS = 4  # rounds of fitting scales of rows and of columns
MOSTLY = 0.6  # the largest error that scales may leave if large blocks are explained
UNLIKE = 0.5  # a rotated matrix has a smaller cosine with the original
BLOCKS = ((128, 128), (1, 128), (1, 64), (1, 32), (1, 16), (128, 1), (64, 1), (32, 1), (16, 1))  # that share a scale
BLOCK_ROWS = 1024  # rows that are matched at a time

Matrices = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Finding:
    """What explains the error of some roles of one expert.

    A `harmless` finding does not change what the model computes. `error` by role is what remains unexplained.
    """

    roles: tuple[str, ...]
    kind: FaultKind
    detail: str
    error: Mapping[str, float]
    harmless: bool = False


Guess = Callable[[Matrices, Matrices, Sequence[str], Mapping[str, float]], Iterator[Finding]]


def diagnose(
    original: Matrices,
    converted: Matrices,
    bad: Sequence[str],
    allowed: Mapping[str, float],
    inputs: Array | None = None,
) -> list[Finding]:
    """What explains that the errors of the roles in `bad` are too large; each of these is in exactly one finding.

    `inputs` [hidden] is what the norm before the experts was divided by, None if it was not changed.
    """
    findings: list[Finding] = []
    left = list(bad)
    allowed = {
        role: min(limit, CLEARLY * deviation(converted[role], original[role])) if role in bad else limit
        for role, limit in allowed.items()
    }
    guesses: tuple[Guess, ...] = (
        _empty, _exchanged, _transposed, _interleaved, partial(_rescaled, inputs=inputs), _scaled, _reordered, _shifted,
        _rotated,
    )  # fmt: skip
    for guess in guesses:
        for finding in guess(original, converted, left, allowed):
            findings.append(finding)
            left = [role for role in left if role not in finding.roles]
        if not left:
            return findings
    for role in left:
        error = deviation(converted[role], original[role])
        cosine = _cosine(converted[role], original[role])
        findings.append(
            Finding((role,), "error", f"{_say_error(error)}; its cosine is {round(cosine, 2) + 0.0:.2f}", {role: error})
        )
    return findings


def _say_error(error: float) -> str:
    return "it is not finite" if error == inf else f"its error is {100 * error:.3g} %"


def _empty(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Zeros, a constant, or NaN and infinity, in the whole matrix or in some rows or columns."""
    for role in bad:
        matrix, exact = converted[role], original[role]
        broken = ~np.isfinite(matrix)
        if broken.any():
            share = float(broken.mean())
            detail = "NaN or infinity" + ("" if share == 1 else f" in {100 * share:.3g} % of its values")
            yield Finding((role,), "empty", detail, {role: inf})
            continue
        if matrix.min() == matrix.max():
            value = float(matrix[0, 0])
            yield Finding((role,), "empty", "all zeros" if value == 0 else f"all {value:.4g}", {role: 1.0})
            continue
        for axis, name in ((1, "rows"), (0, "columns")):
            gone = np.logical_and(~matrix.any(axis=axis), exact.any(axis=axis)).reshape(-1)
            if gone.any():
                kept = np.flatnonzero(~gone)
                error = deviation(np.take(matrix, kept, 1 - axis), np.take(exact, kept, 1 - axis))
                if error <= allowed[role]:
                    detail = f"{int(gone.sum())} of {len(gone)} {name} are all zeros"
                    yield Finding((role,), "empty", detail, {role: error})
                    break


def _exchanged(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Another role's matrix of the same expert."""
    holds: dict[str, tuple[str, float]] = {}
    for role in bad:
        for other in original:
            if other == role:
                continue
            for matrix in (original[other], original[other].T):
                if matrix.shape == converted[role].shape:
                    error = deviation(converted[role], matrix)
                    if error <= allowed[role]:
                        holds.setdefault(role, (other, error))
    for role, (other, error) in holds.items():
        if holds.get(other, ("", 0.0))[0] == role:
            if role == next(name for name in original if name in (role, other)):
                errors = {role: error, other: holds[other][1]}
                yield Finding((role, other), "exchanged", f"{role} and {other} are swapped", errors)
        else:
            yield Finding((role,), "exchanged", f"it holds the original's {other}", {role: error})


def _transposed(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Inputs and outputs swapped, with the shape swapped too or not."""
    for role in bad:
        exact = original[role]
        error = deviation(converted[role], np.ascontiguousarray(exact.T).reshape(exact.shape))
        if error <= allowed[role]:
            is_square = exact.shape[0] == exact.shape[1]
            detail = "its inputs and outputs are swapped" + ("" if is_square else ", although its shape is right")
            yield Finding((role,), "transposed", detail, {role: error})


def _interleaved(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Gate and up rows stored as two halves but read as interleaved, or the other way round."""
    if not {"gate", "up"} <= set(bad):
        return
    gate, up = original["gate"], original["up"]
    size = len(gate)
    for pair, order in (((gate, up), "gate first"), ((up, gate), "up first")):
        in_turns, in_halves = np.stack(pair, axis=1).reshape(2 * size, -1), np.concatenate(pair)
        for rows, detail in (
            (
                (in_turns[:size], in_turns[size:]),
                f"gate and up rows are stored interleaved, {order}, and are read as two halves",
            ),
            (
                (in_halves[::2], in_halves[1::2]),
                f"gate and up rows are stored as two halves, {order}, and are read as interleaved",
            ),
        ):
            errors = {role: deviation(converted[role], part) for role, part in zip(("gate", "up"), rows, strict=True)}
            if all(errors[role] <= allowed[role] for role in errors):
                yield Finding(("gate", "up"), "interleaved", detail, errors)
                return


def _rescaled(
    original: Matrices,
    converted: Matrices,
    bad: Sequence[str],
    allowed: Mapping[str, float],
    inputs: Array | None = None,
) -> Iterator[Finding]:
    """Scales that cancel out, as AWQ leaves them: those of the inputs in the norm before the experts, those of a
    neuron's up row in its down column."""
    if set(original) != {"gate", "up", "down"} or not all(np.isfinite(matrix).all() for matrix in converted.values()):
        return
    factors = np.float32(1) if inputs is None else inputs
    gate, up = original["gate"] * factors, original["up"] * factors
    energy = np.einsum("ij,ij->i", up, up)
    neurons = np.divide(np.einsum("ij,ij->i", converted["up"], up), energy, out=np.ones_like(energy), where=energy > 0)
    if not neurons.all():
        return
    wanted = {"gate": gate, "up": neurons[:, None] * up, "down": original["down"] / neurons}
    errors = {role: deviation(converted[role], matrix) for role, matrix in wanted.items()}
    if all(errors[role] <= allowed[role] for role in errors):
        what = (
            "its neurons are scaled, and the scales cancel out"
            if inputs is None
            else "its inputs are scaled, and the norm undoes it"
        )
        yield Finding(tuple(errors), "scale", what, errors, harmless=True)


def _scaled(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """A scale of the matrix, its rows, its columns, or blocks of these."""
    for role in bad:
        exact, matrix = original[role], converted[role]
        shape = exact.shape
        names = {shape: "it", (1, shape[1]): "each row", (shape[0], 1): "each column"}
        blocks = [
            block
            for block in BLOCKS
            if all(a % b == 0 and (a > b or b == 1) for a, b in zip(shape, block, strict=True))
        ]
        for block in (*names, *blocks):
            factors, error, share = _fit_factors(matrix, exact, block)
            if error <= allowed[role] or (share <= allowed[role] and error < MOSTLY):
                where = names.get(block, f"each {block[0]} x {block[1]}")
                yield Finding((role,), "scale", f"{where} is {_say_factors(factors)} what it should be", {role: error})
                break
        else:
            if (error := _error_of_rows_and_columns(matrix, exact)) <= allowed[role]:
                yield Finding((role,), "scale", "its rows and its columns are scaled", {role: error})


def _error_of_rows_and_columns(matrix: Array, exact: Array) -> float:
    """The error that remains if each row and each column has its own scale, fitted alternately."""
    scaled = exact
    for turn in range(2 * TURNS):
        axis = 1 - turn % 2
        with np.errstate(over="ignore", invalid="ignore"):
            product, energy = ((values * scaled).sum(axis=axis, keepdims=True) for values in (matrix, scaled))
        scaled = scaled * np.divide(product, energy, out=np.zeros_like(product), where=energy > 0)
    return deviation(matrix, scaled)


def _fit_factors(matrix: Array, exact: Array, block: tuple[int, int]) -> tuple[NDArray[np.float64], float, float]:
    """The scale of each block of a matrix, [rows / height, columns / width], and two errors: after dividing the matrix
    by the scales, and after multiplying the exact matrix by them, where large blocks count more."""
    with np.errstate(over="ignore", invalid="ignore"):
        product, energy = _block_sums(matrix * exact, block), _block_sums(exact * exact, block)
        own = _block_sums(matrix * matrix, block)
    factors = np.divide(product, energy, out=np.zeros_like(product), where=energy > 0)
    undo = np.divide(product, own, out=np.zeros_like(product), where=own > 0)
    left = max(0.0, float((energy - undo * product).sum()))  # |undo * matrix - exact|^2, undo being the best there is
    rest = max(0.0, float((own - factors * product).sum()))  # |matrix - factors * exact|^2
    whole, scaled = float(energy.sum()), float(own.sum())
    if not (0 < whole < inf and 0 < scaled < inf):
        return factors, inf, inf
    return factors, sqrt(left / whole), sqrt(rest / scaled)


def _block_sums(values: Array, block: tuple[int, int]) -> NDArray[np.float64]:
    height, width = block
    grouped = values.reshape(values.shape[0] // height, height, values.shape[1] // width, width)
    return np.asarray(grouped.sum(axis=(1, 3), dtype=np.float64))


def _say_factors(factors: NDArray[np.float64]) -> str:
    low, high = f"{factors.min():.3g}", f"{factors.max():.3g}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _shifted(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """A constant in each group of inputs, as wrong zero points leave."""
    for role in bad:
        difference = converted[role] - original[role]
        for width in (16, 32, 64, 128, difference.shape[1]):
            if difference.shape[1] % width:
                continue
            grouped = difference.reshape(len(difference), -1, width)
            rest = (grouped - grouped.mean(axis=2, keepdims=True)).reshape(difference.shape)
            error = float(np.linalg.norm(rest) / np.linalg.norm(original[role]))
            if error <= allowed[role]:
                detail = f"each group of {width} inputs in a row is off by a constant, as with wrong zero points"
                yield Finding((role,), "error", detail, {role: error})
                break


def _reordered(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Neurons, or inputs and outputs of the expert, in a different order; harmless if all roles have the same order of
    neurons."""
    orders: dict[str, NDArray[np.intp]] = {}
    errors: dict[str, float] = {}
    for role in bad:
        axis = 1 if role == "down" else 0
        found = _match_lines(converted[role], original[role], axis)
        error = deviation(converted[role], np.take(original[role], found, axis))
        if error <= allowed[role]:
            orders[role], errors[role] = found, error
    if orders:
        first = next(iter(orders.values()))
        is_shared = len(orders) == len(original) and all((order == first).all() for order in orders.values())
        if is_shared:
            yield Finding(tuple(orders), "reordered", "its neurons are in a different order", errors, harmless=True)
        else:
            others = " and ".join(role for role in original if role not in orders) or "the others"
            for role in orders:
                detail = f"its neurons are in a different order from those of {others}"
                yield Finding((role,), "reordered", detail, {role: errors[role]})
    for role in bad:
        if role in orders:
            continue
        axis = 0 if role == "down" else 1
        found = _match_lines(converted[role], original[role], axis)
        error = deviation(converted[role], np.take(original[role], found, axis))
        if error <= allowed[role]:
            which = "outputs" if role == "down" else "inputs"
            yield Finding((role,), "reordered", f"its {which} are in a different order", {role: error})


def _match_lines(matrix: Array, exact: Array, axis: int) -> NDArray[np.intp]:
    """For each row or column of a matrix, the exact one's that is nearest by cosine."""
    lines, pool = (unit_rows(np.ascontiguousarray(values if axis == 0 else values.T)) for values in (matrix, exact))
    steps = range(0, len(lines), BLOCK_ROWS)
    return np.concatenate([(lines[start : start + BLOCK_ROWS] @ pool.T).argmax(axis=1) for start in steps])


def _rotated(
    original: Matrices, converted: Matrices, bad: Sequence[str], allowed: Mapping[str, float]
) -> Iterator[Finding]:
    """Rows (or columns) whose products with each other are the original's: a rotation of their inputs does not change
    these."""
    for role in bad:
        matrix, exact = converted[role], original[role]
        if abs(_cosine(matrix, exact)) > UNLIKE:
            continue
        for turned, side in ((False, "inputs"), (True, "outputs")):
            likeness = _product_likeness(matrix.T if turned else matrix, exact.T if turned else exact)
            if likeness >= ROTATED:
                lines = "columns" if turned else "rows"
                detail = (
                    f"its {side} are rotated: products of its {lines} correlate with the original's by {likeness:.2f}"
                )
                yield Finding((role,), "rotated", detail, {role: 0.0})
                break


def _product_likeness(matrix: Array, exact: Array) -> float:
    """The correlation of the products of different rows, of some rows."""
    places = np.linspace(0, len(matrix) - 1, min(LINES, len(matrix))).round().astype(np.intp)
    off = np.triu_indices(len(places), 1)
    left, right = ((rows @ rows.T)[off] for rows in (unit_rows(matrix[places]), unit_rows(exact[places])))
    if len(left) < 3 or not left.std() or not right.std():
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _cosine(matrix: Array, exact: Array) -> float:
    """The cosine of two matrices as vectors; 0 where one is zero or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = float(np.vdot(matrix, exact))
        lengths = float(np.linalg.norm(matrix)) * float(np.linalg.norm(exact))
    return product / lengths if 0 < lengths < inf and np.isfinite(product) else 0.0
