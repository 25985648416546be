"""Nearest neurons: for the neurons of some experts, which neuron of another matrix is nearest. Pure arrays.

A neuron is a gate row, an up row and a down column.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SHORT, LONG = 1e-12, 1e18  # lengths between which squares lose nothing in float32


@dataclass(frozen=True, slots=True)
class Nearest:
    """The nearest neurons by one role's vectors, each array [queries, experts].

    `neuron` is the expert's neuron nearest to the query, `cosine` its cosine, and `runner_up` that of the second
    nearest. `in_place` is the cosine with the neuron at the query's own position, and `mean` and `deviation` are those
    of the cosines with all neurons of the expert.
    """

    neuron: NDArray[np.int32]
    cosine: Array
    runner_up: Array
    in_place: Array
    mean: Array
    deviation: Array


def draw_neurons(experts: int, neurons: int, queries: int | None, seed: int = 0) -> NDArray[np.intp]:
    """Which neurons of each expert to look for in the others, [experts, n]: all for None."""
    per_expert = neurons if queries is None else min(neurons, -(-queries // experts))
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.choice(neurons, per_expert, replace=False)) for _ in range(experts)])


def as_neurons(role: str, matrix: Array) -> Array:
    """A role's matrix with a row for each neuron: rows of gate and up, columns of down."""
    return matrix.T if role == "down" else matrix


def find_nearest(queries: Array, positions: NDArray[np.intp], neurons: Array) -> Nearest:
    """For queries [n, d] from `positions` [n] of their experts, the nearest of `neurons` [m, d]; arrays are [n, 1].

    Cosines are taken after the mean direction of the queries is subtracted: what all neurons share would make them
    alike. Lengths do not matter. A neuron of zeros, as from padding or pruning, has no direction: its cosines are 0.
    """
    asked, pool = unit_rows(queries), unit_rows(neurons)
    center = asked.sum(axis=0) / max(1, np.count_nonzero(asked.any(axis=1)))
    cosines = _centered(asked, center) @ _centered(pool, center).T
    nearest = cosines.argmax(axis=1)[:, None]
    in_place = np.take_along_axis(cosines, np.minimum(positions, len(neurons) - 1)[:, None], axis=1)
    mean, deviation = cosines.mean(axis=1, keepdims=True), cosines.std(axis=1, keepdims=True)
    best = np.take_along_axis(cosines, nearest, axis=1)
    np.put_along_axis(cosines, nearest, -1.0, axis=1)
    return Nearest(nearest.astype(np.int32), best, cosines.max(axis=1, keepdims=True), in_place, mean, deviation)


def join(columns: Sequence[Nearest]) -> Nearest:
    """Results for some experts each as one for all of them."""
    return Nearest(*(np.hstack([getattr(column, name) for column in columns]) for name in Nearest.__slots__))


def _centered(rows: Array, center: Array) -> Array:
    """Directions of unit rows as seen from the center, where zeros stay zeros; overwrites the rows."""
    empty = _lengths(rows) == 0
    rows -= center
    rows[empty] = 0
    rows /= _or_one(_lengths(rows))
    return rows


def unit_rows(rows: Array) -> Array:
    """Rows of length 1, whatever their scale; zeros stay zeros."""
    with np.errstate(over="ignore"):
        lengths = _lengths(rows)
    if not (lengths.min(initial=np.inf) > SHORT and lengths.max(initial=0.0) < LONG):
        rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        lengths = _lengths(rows)
    return np.asarray(rows / _or_one(lengths))


def _lengths(rows: Array) -> Array:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))


def _or_one(lengths: Array) -> Array:
    """Lengths to divide rows by, [n, 1]."""
    return np.where(lengths > 0, lengths, np.float32(1))[:, None]
