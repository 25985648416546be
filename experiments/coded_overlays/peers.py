"""Peers that need no data: plain codes, deltas from a base, shared factors, and fewer experts.

Each is a function of a model's bench that yields candidates. What was simplified is in README.md. "4 bits" variants
store whatever a paper stores in bf16 by rounding to nearest in groups of 64, so that such methods reach few bits.
"""

import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import product

import numpy as np
from candidate import Array, Candidate, Layers, Rebuilt, by_role, hidden_last, mean_bits
from learned import fit_bases
from models import Bench
from scipy.optimize import linear_sum_assignment
from storage import (
    BF16,
    PRECISIONS,
    Precision,
    as_bf16,
    keep_largest,
    lloyd_bits,
    lloyd_max,
    place_bits,
    round_bits,
    round_to_nearest,
    signs,
)

LADDER = np.unique(np.round(np.geomspace(0.01, 1, 60), 3))  # shares of a matrix's rank or weights

# ---------------------------------------------------------------------------------------------------------------------
# Plain codes


def rtn(bench: Bench) -> Iterator[Candidate]:
    """Round to nearest, groups of 64: what `mx.quantize` does."""
    for bits in (1, 2, 3, 4):
        change = partial(round_to_nearest, bits=bits)
        yield plain(bench, f"{bits} bits, groups of 64", round_bits(bits), change)


def lloyd(bench: Bench) -> Iterator[Candidate]:
    """Lloyd and Max's levels with scales by least squares, unbiased."""
    for count, group in product((2, 3, 4, 8, 16), (64, 128)):
        yield plain(
            bench,
            f"{count} levels, groups of {group}",
            lloyd_bits(count, group),
            partial(lloyd_max, count=count, group=group),
        )


def plain(bench: Bench, setting: str, bits: float, change) -> Candidate:
    return Candidate("", setting, bits, lambda: Rebuilt(by_role(bench.layers, lambda _, matrices: change(matrices))))


VETO = 10 ** (-9 / 10)  # MINT: no tensor below 9 dB


def mint(bench: Bench) -> Iterator[Candidate]:
    """MINT: for each layer and projection the bits and the group size, by a knapsack over the measured errors."""
    options = list(product((2, 3, 4, 5, 6, 8), (32, 64, 128)))
    units = [(place, role) for place, layer in enumerate(bench.layers) for role in layer]
    weights = np.array([bench.layers[place][role].size for place, role in units], float)
    errors = np.array(
        [
            [
                float(np.square(bench.layers[place][role] - round_to_nearest(bench.layers[place][role], *option)).sum())
                / float(np.square(bench.layers[place][role]).sum())
                for option in options
            ]
            for place, role in units
        ]
    )
    costs = np.array([round_bits(*option) for option in options])
    for is_vetoed in (True, False):
        allowed = np.where(is_vetoed & (errors > VETO), np.inf, errors)
        picks = set()
        for price in np.geomspace(1e-6, 10, 400):  # the hull of the knapsack, which Lagrange's multiplier walks along
            picks.add(tuple(np.argmin(allowed + price * costs, axis=1)))
        for pick in picks:
            chosen = {unit: options[number] for unit, number in zip(units, pick, strict=True)}
            bits = float(weights @ costs[list(pick)] / weights.sum())
            variant = "with its veto" if is_vetoed else "without its veto"
            setting = ", ".join(f"{place}.{role} {b}:{g}" for (place, role), (b, g) in chosen.items())
            yield Candidate(variant, setting, bits, partial(_mixed, bench, chosen))


def _mixed(bench: Bench, chosen) -> Rebuilt:
    return Rebuilt(
        [
            {role: round_to_nearest(matrices, *chosen[place, role]) for role, matrices in layer.items()}
            for place, layer in enumerate(bench.layers)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Deltas from the mean expert, taken in place


def _deltas(bench: Bench, base: Precision, setting: str, bits, code) -> Candidate:
    """The base at a precision, and what `code` makes of the deltas from the stored base; `bits` is of a delta."""

    def change(_: str, matrices: Array) -> Array:
        stored = base.store(matrices.mean(0, keepdims=True))
        return stored + code(matrices - stored)

    total = mean_bits(bench.layers, lambda _, shape: base.bits / shape[0] + bits(shape))
    return Candidate(f"base {base.name}", setting, total, lambda: Rebuilt(by_role(bench.layers, change)))


def bitdelta(bench: Bench) -> Iterator[Candidate]:
    """BitDelta: the signs of the delta and one scale; more rounds code what is left."""

    def code(delta: Array, rounds: int) -> Array:
        result = np.zeros_like(delta)
        for _ in range(rounds):
            result = result + signs(delta - result)
        return result

    for base, rounds in product(PRECISIONS, (1, 2, 3, 4)):
        yield _deltas(bench, base, f"{rounds} bit", partial(_sign_bits, rounds=rounds), partial(code, rounds=rounds))


def dqrelo(bench: Bench) -> Iterator[Candidate]:
    """D-QRELO: the signs of the delta, and factors of what they leave; scale and factors are fitted in turns."""

    def code(delta: Array, share: float, precision: Precision) -> Array:
        factors = np.zeros_like(delta)
        for _ in range(3):
            coded = signs(delta)
            sign = np.sign(coded)
            coded = sign * as_bf16(((delta - factors) * sign).mean((-2, -1), keepdims=True))
            factors = _low_rank(delta - coded, share, precision)
        return coded + factors

    for base, share in product(PRECISIONS, LADDER):
        yield _deltas(
            bench,
            base,
            f"sign + rank {share:.1%}",
            lambda shape, share=share, base=base: _sign_bits(shape) + _rank_bits(shape, share, base),
            partial(code, share=share, precision=base),
        )


def ders(bench: Bench) -> Iterator[Candidate]:
    """DeRS: the base in bf16, and of each delta the largest weights, or all in few bits."""
    for base in PRECISIONS:
        yield _deltas(bench, base, "quantised, 1 bit", _sign_bits, signs)
        for bits in (2, 3, 4):
            code, cost = partial(round_to_nearest, bits=bits), round_bits(bits)
            yield _deltas(bench, base, f"quantised, {bits} bits", lambda _, cost=cost: cost, code)
    for base, share in product(PRECISIONS, LADDER):
        code, cost = partial(_sparse, share=share, precision=base), _sparse_bits(share, base)
        candidate = _deltas(bench, base, f"sparse, {share:.1%} kept", lambda _, cost=cost: cost, code)
        yield Candidate(f"sparse, {candidate.variant}", candidate.setting, candidate.bits, candidate.rebuild)


def _sign_bits(shape: tuple[int, ...], rounds: int = 1) -> float:
    return rounds * (1 + 16 / math.prod(shape[1:]))


def _sparse(matrices: Array, share: float, precision: Precision) -> Array:
    """The largest weights of each matrix, as they are stored one after another."""
    kept = keep_largest(matrices, share)
    if precision is BF16:
        return as_bf16(kept)
    result = np.zeros_like(kept)
    for index in np.ndindex(kept.shape[:-2]):
        mask = kept[index] != 0
        result[index][mask] = precision.store(kept[index][mask][None])[0]
    return result


def _sparse_bits(share: float, precision: Precision) -> float:
    return share * precision.bits + place_bits(share)


def delta_come(bench: Bench) -> Iterator[Candidate]:
    """Delta-CoMe: singular vectors of the delta, the first ones in 8 bits, the next in 3, the others in 2.

    Coded here by Lloyd and Max's levels, since rounding to nearest at 2 bits is far worse.
    """

    def widths(rank: int) -> list[tuple[int, int]]:
        first, second = -(-rank // 16), rank // 2
        return [(256, first), (8, max(0, min(rank - first, second))), (4, max(0, rank - first - second))]

    def bits(shape: tuple[int, ...], share: float) -> float:
        ways = widths(_rank(shape, share))
        cost = sum(count * (8.125 if levels == 256 else lloyd_bits(levels, 64)) for levels, count in ways)
        return cost * sum(shape[1:]) / math.prod(shape[1:])

    def code(delta: Array, share: float) -> Array:
        left, right = _factors(delta)
        result, start = np.zeros_like(delta), 0
        for levels, count in widths(_rank(delta.shape, share)):
            if count:
                parts = [part[..., start : start + count, :] for part in (np.swapaxes(left, -1, -2), right)]
                if levels == 256:
                    stored = [round_to_nearest(part, 8, 256) for part in parts]
                else:
                    stored = [lloyd_max(part, levels, 64) for part in parts]
                result = result + np.swapaxes(stored[0], -1, -2) @ stored[1]
                start += count
        return result

    for base, share in product(PRECISIONS, LADDER):
        cost = partial(bits, share=share)
        yield _deltas(bench, base, f"rank {share:.1%} in 8, 3, 2 bits", cost, partial(code, share=share))


def d2moe(bench: Bench) -> Iterator[Candidate]:
    """D2-MoE without data: the plain mean, and factors of the deltas by plain SVD."""
    for precision, share in product(PRECISIONS, LADDER):
        code = partial(_low_rank, share=share, precision=precision)
        cost = partial(_rank_bits, share=share, precision=precision)
        yield _deltas(bench, precision, f"rank {share:.1%}", cost, code)


def _rank(shape: tuple[int, ...], share: float) -> int:
    return max(1, round(share * min(shape[-2:])))


def _rank_bits(shape: tuple[int, ...], share: float, precision: Precision) -> float:
    return _rank(shape, share) * sum(shape[-2:]) * precision.bits / math.prod(shape[-2:])


def _factors(matrices: Array) -> tuple[Array, Array]:
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    root = np.sqrt(values)
    return left * root[..., None, :], root[..., None] * right


def _low_rank(matrices: Array, share: float, precision: Precision) -> Array:
    rank = _rank(matrices.shape, share)
    left, right = _factors(matrices)
    left, right = np.swapaxes(left, -1, -2)[..., :rank, :], right[..., :rank, :]
    return np.swapaxes(precision.store(left), -1, -2) @ precision.store(right)


# ---------------------------------------------------------------------------------------------------------------------
# ResMoE: a barycentre of permuted experts


def resmoe(bench: Bench) -> Iterator[Candidate]:
    """ResMoE: the base is the barycentre of the experts as sets of neurons; of the residuals the largest weights, or
    factors."""
    orders = cache(lambda: [find_orders(layer) for layer in bench.layers])

    def rebuild(base: Precision, code) -> Rebuilt:
        result: Layers = []
        for layer, order in zip(bench.layers, orders(), strict=True):
            result.append({})
            for role, matrices in layer.items():
                rows = hidden_last(role, matrices)
                permuted = np.take_along_axis(rows, order[:, :, None], axis=1)
                stored = base.store(permuted.mean(0, keepdims=True))
                coded = stored + code(permuted - stored)
                back = np.take_along_axis(coded, np.argsort(order, axis=1)[:, :, None], axis=1)
                result[-1][role] = hidden_last(role, back)
        return Rebuilt(result)

    def sparse_cost(_: tuple[int, ...], share: float, precision: Precision) -> float:
        return _sparse_bits(share, precision)

    def with_base(_: str, shape: tuple[int, ...], cost, share: float, precision: Precision) -> float:
        return precision.bits / shape[0] + cost(shape, share, precision)

    for precision, share in product(PRECISIONS, LADDER):
        for name, code, cost in (("pruned", _sparse, sparse_cost), ("SVD", _low_rank, _rank_bits)):
            bits = mean_bits(bench.layers, partial(with_base, cost=cost, share=share, precision=precision))
            setting = f"{share:.1%} kept" if name == "pruned" else f"rank {share:.1%}"
            change = partial(rebuild, precision, partial(code, share=share, precision=precision))
            yield Candidate(f"{name}, {precision.name}", setting, bits, change)


def find_orders(layer: dict[str, Array], rounds: int = 5) -> np.ndarray:
    """For each expert the order of its neurons in which it is nearest to the barycentre, [experts, neurons]."""
    neurons = np.concatenate([hidden_last(role, matrices) for role, matrices in layer.items()], axis=-1)
    count = neurons.shape[1]
    orders = np.tile(np.arange(count), (len(neurons), 1))
    base = neurons[0]
    for _ in range(rounds):
        orders = np.stack([linear_sum_assignment(-(base @ expert.T))[1] for expert in neurons])
        base = np.take_along_axis(neurons, orders[:, :, None], axis=1).mean(0)
    return orders


# ---------------------------------------------------------------------------------------------------------------------
# Shared factors


SIDES = ("hidden", "neurons")  # along which the shared factor runs


def _lay(role: str, side: str, matrices: Array) -> Array:
    """The matrices with the side of the shared factor last, and back."""
    return matrices if (role == "down") == (side == "neurons") else np.swapaxes(matrices, -1, -2)


def molae(bench: Bench) -> Iterator[Candidate]:
    """MoLAE: all experts of a role project into one latent space, found by the SVD of all of them together."""

    def change(role: str, matrices: Array, side: str, share: float, precision: Precision) -> Array:
        rows = _lay(role, side, matrices)
        rank = max(1, round(share * rows.shape[-1]))
        basis = np.linalg.svd(rows.reshape(-1, rows.shape[-1]), full_matrices=False)[2][:rank]
        return _lay(role, side, precision.store(rows @ basis.T) @ precision.store(basis))

    def bits(role: str, shape: tuple[int, ...], side: str, share: float, precision: Precision) -> float:
        own, shared = _sides(role, side, shape)
        rank = max(1, round(share * shared))
        return precision.bits * rank * (shape[0] * own + shared) / math.prod(shape)

    for precision, side, share in product(PRECISIONS, SIDES, LADDER):
        options = {"side": side, "share": share, "precision": precision}
        taken = mean_bits(bench.layers, partial(bits, **options))
        rebuild = partial(_change_roles, bench, partial(change, **options))
        yield Candidate(f"{precision.name}, {side}", f"rank {share:.1%}", taken, rebuild)


def _change_roles(bench: Bench, change) -> Rebuilt:
    return Rebuilt(by_role(bench.layers, change))


def _sides(role: str, side: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The lengths of an expert's own factor and of the shared one, from [experts, out, in]."""
    rows, columns = shape[1:]
    return (rows, columns) if (role == "down") == (side == "neurons") else (columns, rows)


def mobe(bench: Bench) -> Iterator[Candidate]:
    """MoBE: each expert is its own factor times a nonlinear mix of a few shared bases, trained to convergence."""
    yield from _learned(bench, low_rank=False)


def slbf(bench: Bench) -> Iterator[Candidate]:
    """SLBF: as MoBE, with bases of low rank."""
    yield from _learned(bench, low_rank=True)


def _learned(bench: Bench, low_rank: bool) -> Iterator[Candidate]:
    experts, rows, columns = bench.layers[0]["gate"].shape
    bases = experts // (2 if low_rank else 4)

    def bits(role: str, shape: tuple[int, ...], side: str, rank: int, inner: int | None, precision: Precision) -> float:
        own, shared = _sides(role, side, shape)
        of_bases = bases * (rank * shared if inner is None else inner * (rank + shared))
        return (precision.bits * (experts * own * rank + of_bases) + 16 * experts * bases) / math.prod(shape)

    def change(role: str, matrices: Array, side: str, rank: int, inner: int | None, precision: Precision) -> Array:
        return _lay(role, side, fit_bases(_lay(role, side, matrices), rank, bases, inner, precision.store))

    for precision, side, rank in product(PRECISIONS, SIDES, range(2, min(rows, columns) + 1)):
        options = {"side": side, "rank": rank, "inner": rank // 2 if low_rank else None, "precision": precision}
        taken = mean_bits(bench.layers, partial(bits, **options))
        rebuild = partial(_change_roles, bench, partial(change, **options))
        yield Candidate(f"{precision.name}, {bases} bases, {side}", f"rank {rank}", taken, rebuild)


# ---------------------------------------------------------------------------------------------------------------------
# Fewer experts


def aimer(bench: Bench) -> Iterator[Candidate]:
    """AIMER: experts are ranked by the mean of their absolute weights over the root of the mean square."""
    scores = []
    for layer in bench.layers:
        flat = np.concatenate([matrices.reshape(len(matrices), -1) for matrices in layer.values()], axis=1)
        scores.append(np.abs(flat).mean(1) / np.sqrt(np.square(flat).mean(1)))
    yield from prune(bench, "low kept", [-score for score in scores])
    yield from prune(bench, "high kept", scores)


def prune(bench: Bench, name: str, scores: list[Array]) -> Iterator[Candidate]:
    """The experts of the highest scores, at either precision; the router chooses among them."""
    experts = len(scores[0])
    for precision, count in product(PRECISIONS, range(bench.top_k, experts + 1)):
        kept = [np.argsort(np.argsort(-score)) < count for score in scores]

        def rebuild(kept=kept, precision=precision) -> Rebuilt:
            return Rebuilt(by_role(bench.layers, lambda _, matrices: precision.store(matrices)), kept)

        label = f"{name}, {precision.name}"
        yield Candidate(label, f"{count} of {experts}", precision.bits * count / experts, rebuild)
