"""Bases that experts share, trained on the weights alone: what MoBE and SLBF have in common."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
RATE, MOST, EVERY, ENOUGH = 5e-3, 1000, 100, 2e-3
DAMPING = 1e-5


def fit_bases(rows: Array, rank: int, bases: int, inner: int | None, store: Callable[[Array], Array]) -> Array:
    """The matrices [experts, intermediate, hidden] as left_e @ tanh(sum_j mix_ej basis_j), as they are stored.

    A basis [rank, hidden] is full, or the product of [rank, inner] and [inner, hidden]. Adam trains bases and mix, and
    at each step every left factor is the best one for them, by least squares. Starts at the SVD of all experts
    together, where tanh is nearly linear, and ends when 100 steps win less than 0.2 %.
    """
    rng = np.random.default_rng(0)
    experts = len(rows)
    scale = np.sqrt(np.square(rows).mean())
    wanted = rows / scale
    basis = np.linalg.svd(wanted.reshape(-1, rows.shape[-1]), full_matrices=False)[2][:rank]
    noise = 0.3 * np.abs(basis).mean()
    full = basis + noise * rng.standard_normal((bases, *basis.shape)).astype(np.float32)
    mix = (1 + 0.5 * rng.standard_normal((experts, bases))).astype(np.float32) / bases
    parameters = {"mix": mix}
    if inner is None:
        parameters["basis"] = full.astype(np.float32)
    else:
        left, values, right = np.linalg.svd(full, full_matrices=False)
        root = np.sqrt(values[:, :inner])
        parameters["left"] = (left[:, :, :inner] * root[:, None]).astype(np.float32)
        parameters["right"] = (root[:, :, None] * right[:, :inner]).astype(np.float32)
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    best, best_parameters, last = np.inf, parameters, np.inf
    for step in range(1, MOST + 1):
        loss, gradients = _step(wanted, parameters)
        if loss < best:
            best, best_parameters = loss, {name: value.copy() for name, value in parameters.items()}
        if step % EVERY == 0:
            if best > (1 - ENOUGH) * last:
                break
            last = best
        rate = RATE * (1 - 0.9 * step / MOST)
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            corrected = first[name] / (1 - 0.9**step)
            parameters[name] = parameters[name] - rate * corrected / (np.sqrt(second[name] / (1 - 0.99**step)) + 1e-12)
    stored = {name: value if name == "mix" else store(value) for name, value in best_parameters.items()}
    hidden = np.tanh(_combine(stored))
    return store(_solve(wanted, hidden) * scale) @ hidden


def _combine(parameters: dict[str, Array]) -> Array:
    basis = parameters["left"] @ parameters["right"] if "left" in parameters else parameters["basis"]
    return np.tensordot(parameters["mix"], basis, 1)


def _solve(wanted: Array, hidden: Array) -> Array:
    """The best left factor of each expert, [experts, intermediate, rank]."""
    gram = hidden @ np.swapaxes(hidden, -1, -2)
    gram += (
        DAMPING
        * np.trace(gram, axis1=-2, axis2=-1)[:, None, None]
        / len(gram[0])
        * np.eye(gram.shape[-1], dtype=np.float32)
    )
    return np.swapaxes(np.linalg.solve(gram, hidden @ np.swapaxes(wanted, -1, -2)), -1, -2)


def _step(wanted: Array, parameters: dict[str, Array]) -> tuple[float, dict[str, Array]]:
    """The mean squared error, and its gradients; at the best left factors these have none of their own."""
    hidden = np.tanh(_combine(parameters))
    left = _solve(wanted, hidden)
    residual = left @ hidden - wanted
    inside = np.swapaxes(left, -1, -2) @ residual * (1 - hidden**2) * np.float32(2 / wanted.size)
    basis = parameters["left"] @ parameters["right"] if "left" in parameters else parameters["basis"]
    of_basis = np.tensordot(parameters["mix"].T, inside, 1)
    gradients = {"mix": np.einsum("erh,jrh->ej", inside, basis, optimize=True)}
    if "left" in parameters:
        gradients["left"] = of_basis @ np.swapaxes(parameters["right"], -1, -2)
        gradients["right"] = np.swapaxes(parameters["left"], -1, -2) @ of_basis
    else:
        gradients["basis"] = of_basis
    return float(np.square(residual).mean()), gradients
