"""What an overlay costs in accuracy, on the experts themselves: in their weights, and in what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable
from ..jobs.measure import count_experts, mean_experts, subtract_base
from ..jobs.resources import Resources
from ..numerics.forward import route, run_expert
from ..numerics.low_rank import Factors, factorise, rebuild, relative_error
from ..progress import Progress
from ..weights.expert_layer import ExpertLayer
from .quantisation import as_stored, round_to_bits

COMPARED = (8, 4)  # the usual quantisations, beside which an output error is shown
MATRICES = 10  # of an expert that a thread has at hand while it compares one


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the experts are tried on: `x` [n, hidden], and the say [n, experts] that the router gives each, if it is
    known."""

    x: NDArray[np.float32]
    shares: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """Relative errors of a layer's experts as an overlay: of their weights by role, of their outputs, and of the mixed
    output.

    One entry per expert; the mixed output, of all experts as the router weighs them, is None where no router is known.
    `rounding_errors` are the mean output errors of the same experts plainly quantised, by bits.
    """

    weight_errors: dict[str, tuple[float, ...]]
    output_errors: tuple[float, ...]
    mixed_error: float | None
    rounding_errors: dict[int, float]


def draw_inputs(layer: ExpertLayer, count: int, seed: int, top_k: int, scoring: str, normalise: bool) -> Inputs:
    """Seeded Gaussian inputs of the scale that the norm before the experts gives them, and how the router shares them
    out; raises ModelUnreadable where that is not finite."""
    x = np.random.default_rng(seed).standard_normal((count, layer.sizes["H"])).astype(np.float32)
    norm = layer.norm()
    if norm is not None and norm.any():
        x *= norm
    router = layer.router()
    if router is None:
        return Inputs(x, None)
    with np.errstate(over="ignore", invalid="ignore"):
        shares = route(
            x,
            router.weight,
            router.bias,
            router.correction,
            top_k=min(top_k, layer.count),
            scoring=scoring,
            normalise=normalise,
        )
    if not np.isfinite(shares).all():
        raise ModelUnreadable(
            f"layer {layer.number}: the router holds NaN, infinity or numbers too large for float32",
            "the checkpoint is broken",
        )
    return Inputs(x, shares)


class FidelityCheck:
    """The rebuilt experts of one layer beside the originals: in what they are, and in what they compute.

    `compare` may be called from several threads; what it gives is added in the order of the experts.
    """

    def __init__(self, layer: ExpertLayer, inputs: Inputs, activation: str) -> None:
        self.layer = layer
        self._inputs, self._activation = inputs, activation
        self._weight_errors: list[dict[str, float]] = []
        self._output_errors: list[float] = []
        self._rounding_errors: list[dict[int, float]] = []
        self._mixed = np.zeros((2, *inputs.x.shape), np.float32)

    def compare(
        self, expert: int, exact: Mapping[str, NDArray[np.float32]], rebuilt: Mapping[str, NDArray[np.float32]]
    ) -> "ExpertErrors":
        """Try one expert on the inputs; raises ModelUnreadable where its outputs are not finite."""
        x, biases = self._inputs.x, self.layer.biases(expert)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted, got = (run_expert(x, matrices, biases, self._activation) for matrices in (exact, rebuilt))
        if not (np.isfinite(wanted).all() and np.isfinite(got).all()):
            raise ModelUnreadable(
                f"layer {self.layer.number}, expert {expert}: its outputs are too large for float32",
                "it can't be verified",
            )

        def run_rounded(bits: int) -> NDArray[np.float32]:
            rounded = {role: round_to_bits(matrix, bits) for role, matrix in exact.items()}
            return run_expert(x, rounded, biases, self._activation)

        rounding = {bits: relative_error(run_rounded(bits), wanted) for bits in COMPARED}
        weights = {role: relative_error(rebuilt[role], matrix) for role, matrix in exact.items()}
        return ExpertErrors(weights, rounding, wanted, got)

    def add(self, found: "ExpertErrors") -> None:
        """Take the next expert's comparison."""
        shares, expert = self._inputs.shares, len(self._output_errors)
        self._weight_errors.append(found.weights)
        self._output_errors.append(relative_error(found.got, found.wanted))
        self._rounding_errors.append(found.rounding)
        if shares is not None:
            self._mixed += shares[:, expert, None] * np.stack([found.wanted, found.got])

    @property
    def is_complete(self) -> bool:
        """Whether every expert has been compared."""
        return len(self._output_errors) == self.layer.count

    def result(self) -> LayerFidelity:
        """The errors of all experts that were added."""
        return LayerFidelity(
            {role: tuple(errors[role] for errors in self._weight_errors) for role in self.layer.roles},
            tuple(self._output_errors),
            None if self._inputs.shares is None else relative_error(self._mixed[1], self._mixed[0]),
            {bits: float(np.mean([errors[bits] for errors in self._rounding_errors])) for bits in COMPARED},
        )


@dataclass(frozen=True, slots=True)
class ExpertErrors:
    """One expert: relative weight errors by role, output errors of plain quantisation by bits, and the outputs, wanted
    and got."""

    weights: dict[str, float]
    rounding: dict[int, float]
    wanted: NDArray[np.float32]
    got: NDArray[np.float32]


def check_layer(
    layer: ExpertLayer, ranks: Mapping[str, int], check: FidelityCheck, resources: Resources, progress: Progress
) -> LayerFidelity:
    """Rebuild every expert from base and factors as a file would hold them, and compare with the original."""
    layer.prefetch(progress)
    bases: dict[str, NDArray[np.float32]] = {}
    done = count_experts(progress, f"verifying layer {layer.number}", layer, layer.count)

    def compare(expert: int) -> ExpertErrors:
        exact = layer.matrices(expert)
        rebuilt = {}
        for role, matrix in exact.items():
            rebuilt[role] = rebuild(
                bases[role], split_delta(layer.number, role, matrix.copy(), bases[role], ranks[role])
            )
        comparison = check.compare(expert, exact, rebuilt)
        done.add(layer.parameters // layer.count)
        return comparison

    with resources.worker_threads(layer, matrices=MATRICES) as pool:
        for tensor in layer.tensors:
            bases |= {role: as_stored(mean) for role, mean in mean_experts(tensor, pool).items()}
        for comparison in pool.map(compare, range(layer.count)):
            check.add(comparison)
    return check.result()


def split_delta(layer: int, role: str, matrix: NDArray[np.float32], base: NDArray[np.float32], rank: int) -> Factors:
    """The factors of `matrix - base` as a file holds them; overwrites the matrix."""
    subtract_base(layer, role, matrix, base)
    factors = factorise(matrix, rank)
    return Factors(as_stored(factors.left), as_stored(factors.right))
