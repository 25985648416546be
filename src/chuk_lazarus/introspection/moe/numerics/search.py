"""Where the neurons of experts are found in one other set of neurons, as a dense feed-forward. Pure arrays.

Found means what it means in `pairs`: all roles have one and the same neuron for their nearest, clearly nearer than the
second nearest. Each side is prepared separately, so what does not change a layer's function may differ between
the two: the order of neurons, their lengths, the scales of columns, and a sign that up and down have in common.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .neurons import Array
from .pairs import BLOCK, LEAD, SIGNED, agreement_chance, nearest_of_all_roles, prepare_neurons


@dataclass(frozen=True, slots=True)
class Found:
    """Where queries are found, each array [queries].

    `neuron` is -1 where a query is not found, `cosine` the mean over roles of the cosine with the nearest, and
    `is_flipped` whether up and down have the other sign there. `chance` is the share to be expected if the roles'
    matches had nothing to do with each other.
    """

    neuron: NDArray[np.int32]
    cosine: Array
    is_flipped: NDArray[np.bool_]
    chance: float


def find_neurons(
    queries: Mapping[str, Array],
    neurons: Mapping[str, Array],
    run: Callable[[Callable[[int], "_Block"], Iterable[int]], Iterable["_Block"]] = map,
) -> Found:
    """Where `queries` [n, inputs] by role are found among `neurons` [m, inputs] by role.

    The former are from `prepare_queries`, the latter from `prepare_role`. `run` maps a function over blocks of queries.
    """
    roles = list(queries)
    is_gated = "gate" in roles and len(roles) > 1
    signed = [role for role in SIGNED if is_gated and role in roles]
    signs = (1, -1) if len(signed) > 1 else (0,)
    count, pool = len(queries[roles[0]]), len(neurons[roles[0]])
    step = max(1, min(BLOCK // pool, -(-count // 8)))

    def find(start: int) -> _Block:
        cosines = {role: queries[role][start : start + step] @ neurons[role].T for role in roles}
        match = nearest_of_all_roles(cosines, is_gated)
        rows, near = np.arange(len(match.neuron)), np.maximum(match.neuron, 0)
        total = sum((cosines[role][rows, near] for role in signed), np.float32(0))
        is_found = (match.neuron >= 0) & (match.lead >= LEAD)
        nearest = np.array(
            [[_nearest(cosines[role], sign if role in signed else 1) for role in roles] for sign in signs]
        )
        is_near = np.all([matrix.any(axis=1) for matrix in cosines.values()], axis=0)
        found = np.where(is_found, match.neuron, -1).astype(np.int32)
        return _Block(found, match.cosine, is_found & (np.asarray(total) < 0), nearest, np.asarray(is_near))

    blocks = list(run(find, range(0, count, step)))
    nearest = np.concatenate([block.nearest for block in blocks], axis=2)
    is_near = np.concatenate([block.is_near for block in blocks])
    return Found(
        np.concatenate([block.neuron for block in blocks]),
        np.concatenate([block.cosine for block in blocks]),
        np.concatenate([block.is_flipped for block in blocks]),
        # where nothing is near to anything, nothing is proved
        min(1.0, sum(agreement_chance(of_sign, is_near, pool) for of_sign in nearest)) if is_near.any() else 1.0,
    )


def _nearest(cosines: Array, sign: int) -> NDArray[np.intp]:
    """The neuron that each query finds by one role with this sign, or with either sign for 0."""
    return np.asarray((np.abs(cosines) if sign == 0 else sign * cosines).argmax(axis=1))


@dataclass(frozen=True, slots=True)
class _Block:
    """As `Found`, of some queries.

    `nearest` [signs, roles, queries] are the neurons that each role finds by itself, for each sign that up and down may
    have, and `is_near` says whether there are any.
    """

    neuron: NDArray[np.int32]
    cosine: Array
    is_flipped: NDArray[np.bool_]
    nearest: NDArray[np.intp]
    is_near: NDArray[np.bool_]


def prepare_queries(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Vectors [n, inputs] by role as directions that can be compared; of equal roles only the first."""
    return {role: matrix[0] for role, matrix in prepare_neurons({r: m[None] for r, m in vectors.items()}).items()}


def prepare_role(vectors: Array) -> Array:
    """The vectors [n, inputs] of one role as directions that can be compared."""
    return np.asarray(prepare_neurons({"": vectors[None]})[""][0])


def searching_order(number: int, layers: Sequence[int]) -> list[int]:
    """The numbers of `layers` in searching order: `number`, then its neighbours outwards."""
    return sorted(layers, key=lambda layer: (abs(layer - number), layer))
