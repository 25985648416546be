"""The accuracy of an overlay: the errors of the experts' weights, and of their outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable
from ..jobs.measure import expert_counter, mean_experts
from ..jobs.resources import Resources
from ..numerics.forward import route, run_expert
from ..numerics.gram import total_energy
from ..numerics.low_rank import rebuild, relative_error
from ..progress import Progress
from ..weights.expert_layer import ExpertLayer
from .coded_layer import CodedLayer, find_alignment
from .codes import LayerCodes
from .coding import split_delta
from .moments import ExpertMoments
from .quantisation import as_stored, round_to_bits

ROUNDING_BITS = (8, 4)  # the usual quantisations; their output errors are shown beside the overlay's
MATRICES_COMPARED = 10  # matrices that a thread holds while it compares one expert


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs `x` [n, hidden] of a fidelity check, and the routing weights [n, experts] that the router gives them.

    The routing weights are None where no router is known.
    """

    x: NDArray[np.float32]
    routing_weights: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """Relative errors of a layer's experts as an overlay.

    `weight_errors`, by role, and `output_errors` have one entry for each of `experts`. `mixed_error` is that of the
    layer's output, the experts' outputs summed by their routing weights; it is None where no router is known, or only
    some experts were compared. `rounding_errors` are the mean output errors of the same experts, plainly quantised, by
    bits.
    """

    experts: tuple[int, ...]

    weight_errors: dict[str, tuple[float, ...]]
    output_errors: tuple[float, ...]
    mixed_error: float | None
    rounding_errors: dict[int, float]


def draw_inputs(layer: ExpertLayer, count: int, seed: int, top_k: int, scoring: str, normalise: bool) -> Inputs:
    """`count` Gaussian inputs, random by `seed`, of the scale that the norm before the experts gives them.

    `top_k`, `scoring` and `normalise` are those of the model's router. Raises ModelUnreadable where the routing weights
    are not finite.
    """
    x = np.random.default_rng(seed).standard_normal((count, layer.sizes["H"])).astype(np.float32)
    norm = layer.norm()
    if norm is not None and norm.any():
        x *= norm
    router = layer.router()
    if router is None:
        return Inputs(x, None)
    with np.errstate(over="ignore", invalid="ignore"):
        routing_weights = route(
            x,
            router.weight,
            router.bias,
            router.correction,
            top_k=min(top_k, layer.count),
            scoring=scoring,
            normalise=normalise,
        )
    if not np.isfinite(routing_weights).all():
        raise ModelUnreadable(
            f"layer {layer.number}: the router holds NaN, infinity or numbers too large for float32",
            "the checkpoint is broken",
        )
    return Inputs(x, routing_weights)


class FidelityCheck:
    """Compares the rebuilt experts of one layer with the originals, in their weights and in their outputs.

    `experts` are those that are compared, None for all. The same experts, plainly quantised to each of `rounding_bits`,
    are compared, too. `compare` may be called from several threads; its results are then added in the order of the
    experts.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        inputs: Inputs,
        activation: str,
        rounding_bits: Sequence[int] = ROUNDING_BITS,
        experts: Sequence[int] | None = None,
    ) -> None:
        self.layer = layer
        self.experts = tuple(range(layer.count) if experts is None else experts)
        self._rounding_bits = rounding_bits
        self._inputs, self._activation = inputs, activation
        self._weight_errors: list[dict[str, float]] = []
        self._output_errors: list[float] = []
        self._rounding_errors: list[dict[int, float]] = []
        self._mixed = np.zeros((2, *inputs.x.shape), np.float32)

    def compare(
        self, expert: int, exact: Mapping[str, NDArray[np.float32]], rebuilt: Mapping[str, NDArray[np.float32]]
    ) -> "ExpertErrors":
        """The errors of one expert, from its original and rebuilt matrices [out, in] by role.

        Raises ModelUnreadable where its outputs are not finite.
        """
        x, biases = self._inputs.x, self.layer.biases(expert)
        with np.errstate(over="ignore", invalid="ignore"):
            exact_output, output = (run_expert(x, matrices, biases, self._activation) for matrices in (exact, rebuilt))
        if not (np.isfinite(exact_output).all() and np.isfinite(output).all()):
            raise ModelUnreadable(
                f"layer {self.layer.number}, expert {expert}: its outputs are too large for float32",
                "it can't be verified",
            )

        def run_rounded(bits: int) -> NDArray[np.float32]:
            rounded = {role: round_to_bits(matrix, bits) for role, matrix in exact.items()}
            return run_expert(x, rounded, biases, self._activation)

        rounding = {bits: relative_error(run_rounded(bits), exact_output) for bits in self._rounding_bits}
        weights = {role: relative_error(rebuilt[role], matrix) for role, matrix in exact.items()}
        return ExpertErrors(weights, rounding, exact_output, output)

    def add(self, errors: "ExpertErrors") -> None:
        """Add the errors of the next expert."""
        routing_weights, expert = self._inputs.routing_weights, self.experts[len(self._output_errors)]
        self._weight_errors.append(errors.weights)
        self._output_errors.append(relative_error(errors.output, errors.exact_output))
        self._rounding_errors.append(errors.rounding)
        if routing_weights is not None:
            self._mixed += routing_weights[:, expert, None] * np.stack([errors.exact_output, errors.output])

    @property
    def is_complete(self) -> bool:
        """Whether all experts that are to be compared have been."""
        return len(self._output_errors) == len(self.experts)

    def _mixed_error(self) -> float | None:
        if self._inputs.routing_weights is None or len(self.experts) < self.layer.count:
            return None
        return relative_error(self._mixed[1], self._mixed[0])

    def result(self) -> LayerFidelity:
        """The errors of all experts that have been added."""
        return LayerFidelity(
            self.experts,
            {role: tuple(errors[role] for errors in self._weight_errors) for role in self.layer.roles},
            tuple(self._output_errors),
            self._mixed_error(),
            {bits: float(np.mean([errors[bits] for errors in self._rounding_errors])) for bits in self._rounding_bits},
        )


@dataclass(frozen=True, slots=True)
class ExpertErrors:
    """One expert's relative errors: of its weights by role, and of its outputs when it is plainly quantised, by bits.

    `exact_output` and `output` [n, hidden] are the outputs of the original and of the rebuilt expert.
    """

    weights: dict[str, float]
    rounding: dict[int, float]
    exact_output: NDArray[np.float32]
    output: NDArray[np.float32]


def check_layer(
    layer: ExpertLayer, ranks: Mapping[str, int], check: FidelityCheck, resources: Resources, progress: Progress
) -> LayerFidelity:
    """Rebuild every expert from base and factors as a file would hold them, and compare it with the original.

    `ranks` are by role. Raises ModelUnreadable where a weight or an output is not finite.
    """
    layer.prefetch(progress)
    bases: dict[str, NDArray[np.float32]] = {}
    done = expert_counter(progress, f"verifying layer {layer.number}", layer, layer.count)

    def compare(expert: int) -> ExpertErrors:
        exact = layer.matrices(expert)
        rebuilt = {}
        for role, matrix in exact.items():
            rebuilt[role] = rebuild(
                bases[role], split_delta(layer.number, role, matrix.copy(), bases[role], ranks[role])
            )
        errors = check.compare(expert, exact, rebuilt)
        done.add(layer.parameters // layer.count)
        return errors

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED) as pool:
        for tensor in layer.tensors:
            bases |= {role: as_stored(mean) for role, mean in mean_experts(tensor, pool).items()}
        for errors in pool.map(compare, range(layer.count)):
            check.add(errors)
    return check.result()


def check_coded_layer(
    layer: ExpertLayer,
    codes: LayerCodes,
    check: FidelityCheck,
    resources: Resources,
    progress: Progress,
    moments: ExpertMoments | None = None,
) -> LayerFidelity:
    """As `check_layer`, of a layer in codes."""
    layer.prefetch(progress)
    coder = CodedLayer(layer, codes, find_alignment(layer, codes, resources), moments)
    done = expert_counter(progress, f"verifying layer {layer.number}", layer, layer.count)

    def compare(expert: int) -> ExpertErrors:
        exact = layer.matrices(expert)
        rebuilt = {role: coder.decode(expert, role, coder.code(expert, role, matrix)) for role, matrix in exact.items()}
        errors = check.compare(expert, exact, rebuilt)
        done.add(layer.parameters // layer.count)
        return errors

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED + coder.matrices_held) as pool:
        coder.code_bases(pool)
        for errors in pool.map(compare, range(layer.count)):
            check.add(errors)
    return check.result()


def measure_coded_layer(
    layer: ExpertLayer,
    codes: LayerCodes,
    resources: Resources,
    progress: Progress,
    moments: ExpertMoments | None = None,
) -> float:
    """The relative Frobenius error of a layer's experts in codes, all roles together."""
    layer.prefetch(progress)
    coder = CodedLayer(layer, codes, find_alignment(layer, codes, resources), moments)
    done = expert_counter(progress, f"coding layer {layer.number}", layer, layer.count)

    def measure(expert: int) -> tuple[float, float]:
        energy = lost = 0.0
        for tensor in layer.tensors:
            for role, matrix in tensor.matrices(expert).items():
                rebuilt = coder.decode(expert, role, coder.code(expert, role, matrix))
                energy += total_energy(matrix)
                lost += total_energy(rebuilt - matrix)
        done.add(layer.parameters // layer.count)
        return energy, lost

    with resources.worker_threads(layer, matrices=4 + coder.matrices_held) as pool:
        coder.code_bases(pool)
        energies, losses = zip(*pool.map(measure, range(layer.count)), strict=True)
    return sqrt(sum(losses) / sum(energies)) if sum(energies) else 0.0
