"""Peers that look at text: GPTQ, REAP and HC-SMoE. They see 32,768 tokens that the model was trained on."""

from collections.abc import Iterator
from functools import cache, partial
from itertools import product

import numpy as np
from candidate import Array, Candidate, Layers, Rebuilt, by_role
from models import Bench, run_expert
from peers import prune
from scipy.cluster.hierarchy import fcluster, linkage
from storage import PRECISIONS

DAMPING = 0.01
CODES = ((2, 1.0), (3, 1.6), (4, 2.0), (8, 3.0), (16, 4.0))


def gptq(bench: Bench) -> Iterator[Candidate]:
    """GPTQ: weights are rounded column by column, and what is lost is made up for in the columns that follow.

    Evenly spaced levels around zero and scales by least squares, a byte for each group, as our codes have them.
    """
    moments = cache(lambda: [second_moments(bench, place) for place in range(len(bench.layers))])

    def rebuild(levels: int, group: int) -> Rebuilt:
        result: Layers = []
        for layer, of_layer in zip(bench.layers, moments(), strict=True):
            result.append(
                {
                    role: round_by_columns(matrices, of_layer["down" if role == "down" else "in"], levels, group)
                    for role, matrices in layer.items()
                }
            )
        return Rebuilt(result)

    for (levels, bits), group in product(CODES, (64, 128)):
        sizes = [
            (matrices.size, bits + 8 / min(group, matrices.shape[2]))
            for layer in bench.layers
            for matrices in layer.values()
        ]
        total = sum(size * each for size, each in sizes) / sum(size for size, _ in sizes)
        yield Candidate("", f"{levels} levels, groups of {group}", total, partial(rebuild, levels, group))


def second_moments(bench: Bench, place: int) -> dict[str, np.ndarray]:
    """For each expert the second moments of what its gate and up ("in") and its down see, [experts, n, n]."""
    layer, routed = bench.layers[place], bench.routed[place]
    found: dict[str, list[np.ndarray]] = {"in": [], "down": []}
    for expert in range(len(layer["gate"])):
        inputs = routed.inputs[(routed.chosen == expert).any(1)]
        inner, _ = run_expert(layer, expert, inputs)
        for name, seen in (("in", inputs), ("down", inner)):
            found[name].append((seen.T @ seen / max(1, len(seen))).astype(np.float64))
    result = {}
    for name, each in found.items():
        stacked = np.stack(each)
        pooled = stacked.mean(0)
        few = 0.1 * (np.trace(stacked, axis1=1, axis2=2) == 0)[:, None, None] + 0.05
        result[name] = stacked + few * pooled
    return result


def round_by_columns(matrices: Array, moments: np.ndarray, levels: int, group: int) -> Array:
    """GPTQ of all experts of a role at once, [experts, out, in]."""
    size = matrices.shape[2]
    diagonal = np.trace(moments, axis1=1, axis2=2) / size
    damped = moments + DAMPING * diagonal[:, None, None] * np.eye(size)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), 1, 2)
    left = matrices.astype(np.float64).copy()
    result = np.empty_like(left)
    scale = np.zeros(left.shape[:2])
    for column in range(size):
        if column % group == 0:
            scale = fit_scale(left[:, :, column : column + group], levels)
        coded = to_levels(left[:, :, column], scale, levels)
        result[:, :, column] = coded
        lost = (left[:, :, column] - coded) / upper[:, None, column, column]
        left[:, :, column + 1 :] -= lost[:, :, None] * upper[:, None, column, column + 1 :]
    return result.astype(np.float32)


def to_levels(values: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    top = (levels - 1) / 2
    steps = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    return scale * np.clip(np.rint(steps + top) - top, -top, top)


def fit_scale(block: np.ndarray, levels: int) -> np.ndarray:
    """The scale of least squares of each row, in steps of 1/16 octave as a byte would have them."""
    rms = np.sqrt(np.square(block).mean(-1))
    best, least = np.zeros_like(rms), np.full_like(rms, np.inf)
    for factor in np.exp2(np.arange(-64, 24) / 16):
        scale = np.exp2(np.rint(16 * np.log2(np.maximum(rms, 1e-30) * factor)) / 16)
        lost = np.square(block - to_levels(block, np.broadcast_to(scale[..., None], block.shape), levels)).sum(-1)
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return best


def reap(bench: Bench) -> Iterator[Candidate]:
    """REAP: experts are ranked by the mean, over their tokens, of the router's share times the norm of the output."""
    scores = []
    for layer, routed in zip(bench.layers, bench.routed, strict=True):
        score = np.zeros(len(layer["gate"]), np.float32)
        for expert in range(len(score)):
            token, slot = np.nonzero(routed.chosen == expert)
            _, output = run_expert(layer, expert, routed.inputs[token])
            if len(token):
                score[expert] = (routed.shares[token, slot] * np.linalg.norm(output, axis=1)).mean()
        scores.append(score)
    yield from prune(bench, "pruned", scores)


def hc_smoe(bench: Bench) -> Iterator[Candidate]:
    """HC-SMoE: experts are clustered by their mean outputs, hierarchically by average linkage, and merged by how often
    they are chosen."""
    trees, loads = [], []
    for layer, routed in zip(bench.layers, bench.routed, strict=True):
        some = routed.inputs[:: max(1, len(routed.inputs) // 2048)]
        means = np.stack([run_expert(layer, expert, some)[1].mean(0) for expert in range(len(layer["gate"]))])
        trees.append(linkage(means, "average"))
        loads.append(np.bincount(routed.chosen.ravel(), minlength=len(means)) + 1.0)
    experts = len(loads[0])

    def rebuild(count: int, precision) -> Rebuilt:
        result: Layers = []
        for layer, tree, load in zip(bench.layers, trees, loads, strict=True):
            cluster = fcluster(tree, count, "maxclust")
            weights = np.where(cluster[:, None] == cluster[None], load[None], 0.0)
            weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
            result.append({role: np.tensordot(weights, matrices, 1) for role, matrices in layer.items()})
        return Rebuilt(by_role(result, lambda _, matrices: precision.store(matrices)))

    for precision, count in product(PRECISIONS, range(1, experts + 1)):
        bits = precision.bits * count / experts
        yield Candidate(precision.name, f"{count} of {experts}", bits, lambda c=count, p=precision: rebuild(c, p))
