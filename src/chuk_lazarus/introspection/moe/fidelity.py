"""What an overlay costs in accuracy, on the experts themselves: in their weights, in what they compute, and beside
other ways to spend the same bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from .errors import ModelUnreadable
from .jobs.measure import RoleMeasure, count_experts, mean_experts, subtract_base
from .jobs.resources import worker_threads
from .numerics.forward import route, run_expert
from .numerics.gram import total_energy
from .numerics.low_rank import BYTES_PER_NUMBER, Factors, factorise, rebuild, relative_error
from .numerics.spectra import energy_spectrum
from .overlay import Choice, as_stored, quantised_bytes, round_to_bits, spread_rank
from .progress import Progress
from .weights.expert_layer import ExpertLayer

BITS = (8, 4, 3)
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


@dataclass(frozen=True, slots=True)
class Alternative:
    """The relative weight errors of three ways to spend `bytes`: plain quantisation, an overlay, a plain SVD per
    expert.

    An error is None where not even the smallest such thing fits.
    """

    bits: int
    bytes: int
    quantisation: float
    overlay: float | None
    svd: float


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


class Trial:
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
    ) -> "Comparison":
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
        return Comparison(weights, rounding, wanted, got)

    def add(self, found: "Comparison") -> None:
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
class Comparison:
    """One expert: relative weight errors by role, output errors of plain quantisation by bits, and the outputs, wanted
    and got."""

    weights: dict[str, float]
    rounding: dict[int, float]
    wanted: NDArray[np.float32]
    got: NDArray[np.float32]


def check_layer(layer: ExpertLayer, ranks: Mapping[str, int], trial: Trial, progress: Progress) -> LayerFidelity:
    """Rebuild every expert from base and factors as a file would hold them, and compare with the original."""
    layer.prefetch(progress)
    bases: dict[str, NDArray[np.float32]] = {}
    done = count_experts(progress, f"verifying layer {layer.number}", layer, layer.count)

    def check(expert: int) -> Comparison:
        exact = layer.matrices(expert)
        rebuilt = {}
        for role, matrix in exact.items():
            rebuilt[role] = rebuild(bases[role], split(layer.number, role, matrix.copy(), bases[role], ranks[role]))
        comparison = trial.compare(expert, exact, rebuilt)
        done.add(layer.parameters // layer.count)
        return comparison

    with worker_threads(layer, matrices=MATRICES) as pool:
        for tensor in layer.tensors:
            bases |= {role: as_stored(mean) for role, mean in mean_experts(tensor, pool).items()}
        for comparison in pool.map(check, range(layer.count)):
            trial.add(comparison)
    return trial.result()


def split(layer: int, role: str, matrix: NDArray[np.float32], base: NDArray[np.float32], rank: int) -> Factors:
    """The factors of `matrix - base` as a file holds them; overwrites the matrix."""
    subtract_base(layer, role, matrix, base)
    factors = factorise(matrix, rank)
    return Factors(as_stored(factors.left), as_stored(factors.right))


def overlay_choices(measures: Mapping[str, RoleMeasure], experts: int) -> dict[str, Choice]:
    """What rank buys in each projection of a layer, its sampled experts standing for all."""
    return {
        role: Choice(
            np.sum(measure.spectra, axis=0) * (experts / len(measure.chosen)),
            BYTES_PER_NUMBER * experts * sum(measure.shape),
        )
        for role, measure in measures.items()
    }


def compare_alternatives(
    layer: ExpertLayer, measures: Mapping[str, RoleMeasure], progress: Progress
) -> tuple[Alternative, ...]:
    """Weight errors of plain quantisation, overlay and SVD at the bytes that 8, 4 and 3 bits take; from the sampled
    experts."""
    chosen = next(iter(measures.values())).chosen
    done = count_experts(progress, f"alternatives for layer {layer.number}", layer, len(chosen))

    def probe(expert: int) -> tuple[dict[str, NDArray[np.float64]], dict[int, float], float]:
        matrices = layer.matrices(expert)
        lost = {
            bits: sum(total_energy(round_to_bits(matrix, bits) - matrix) for matrix in matrices.values())
            for bits in BITS
        }
        spectra = {role: energy_spectrum(matrix) for role, matrix in matrices.items()}
        done.add(layer.parameters // layer.count)
        return spectra, lost, sum(total_energy(matrix) for matrix in matrices.values())

    with worker_threads(layer, matrices=8) as pool:
        probes = list(pool.map(probe, chosen))
    energy = sum(found for _, _, found in probes) or 1.0  # of all zeros nothing is lost
    scale = layer.count / len(chosen)
    overlays = overlay_choices(measures, layer.count)
    svds = {
        role: Choice(np.sum([spectra[role] for spectra, _, _ in probes], axis=0) * scale, overlays[role].cost)
        for role in layer.roles
    }
    base = BYTES_PER_NUMBER * sum(prod(measure.shape) for measure in measures.values())
    result = []
    for bits in BITS:
        budget = layer.count * sum(quantised_bytes(layer.shape(role), bits) for role in layer.roles)
        error = {
            name: None
            if room < 0
            else float(np.sqrt(energy_left(choices, spread_rank(choices, budget=room)) / energy / scale))
            for name, choices, room in (("overlay", overlays, budget - base), ("svd", svds, budget))
        }
        quantisation = float(np.sqrt(sum(lost[bits] for _, lost, _ in probes) / energy))
        assert error["svd"] is not None
        result.append(Alternative(bits, budget, quantisation, error["overlay"], error["svd"]))
    return tuple(result)


def energy_left(choices: Mapping[str, Choice], ranks: Mapping[str, int]) -> float:
    """The energy that these ranks leave out."""
    return sum(float(choice.spectrum[ranks[key] :].sum()) for key, choice in choices.items())
