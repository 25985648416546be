"""Overlays of a model, without writing one: ranks are chosen, experts verified, and the whole model estimated."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..errors import InvalidRequest, name_model, printable
from ..jobs.measure import RoleMeasure, measure_layer
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.resume import ResumableLayers
from ..numerics.alignment import align
from ..numerics.bank import bank_variances, may_share, rate_sharing, share_neurons
from ..numerics.forward import ACTIVATIONS, GATED_ACTIVATIONS
from ..numerics.rates import Rate, align_grams
from ..progress import Progress
from ..reports import LayerVerification, MoEOverlay, MoEOverlayVerification
from ..text import format_ranges
from ..weights.expert_layer import ExpertLayer
from ..weights.experts import Experts
from ..weights.repositories.local import Folder
from .alignment import align_layer
from .allocation import RankRule, check_ranks
from .alternatives import Alternative, Factored, compare_alternatives
from .bit_budget import BitRule, fit_bits
from .checkpoint.card import card_table
from .checkpoint.format import Ranks, codes_to_json
from .checkpoint.writer import coded_folder_bytes
from .codes import LayerCodes
from .curves import LayerCurves, layer_curves
from .fidelity import (
    ROUNDING_BITS,
    FidelityCheck,
    check_coded_layer,
    check_layer,
    draw_inputs,
    measure_coded_layer,
)
from .ladder import list_variances
from .layer import (
    bank_notes,
    coded_bytes,
    coded_layer_overlay,
    layer_overlay,
    layer_verification,
    longest_verification,
    projection_codes,
    ranked_bytes,
    total_bytes,
)
from .moments import Calibration, ExpertMoments, LayerInputs
from .trials import RoleTrial, spread_trials, try_layer

VERIFIED = 3  # layers of a written overlay that are verified
TOLERANCE = 0.05
INPUTS = 256


def compute(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    rule: RankRule | BitRule,
    experts: int | None,
    calibrate: Path | None,
    progress: Progress,
) -> MoEOverlay:
    """The ranks or codes that the rule chooses, what they keep and the bytes that they take."""
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        curves: dict[int, LayerCurves] = {}
        job.calibrate(calibrate, rule)
        codes: dict[int, LayerCodes] = {}
        if isinstance(rule, BitRule):
            codes = job.choose_codes(rule)
            errors = job.measure_codes(codes)
            of_layers = [codes[opened.number] for opened in job.layers]
            parts = coded_bytes(job.layers, of_layers)
            results = [coded_layer_overlay(*each) for each in zip(job.layers, of_layers, errors, strict=True)]
        else:
            curves = job.measure_all(rule, experts)
            chosen = rule.choose(curves)
            parts = ranked_bytes(job.layers, [chosen[opened.number] for opened in job.layers])
            results = [layer_overlay(opened, curves[opened.number], chosen[opened.number]) for opened in job.layers]
        job.end()
        original, stored, overlay = total_bytes(results)
        return MoEOverlay(
            **job.opened.identity(),
            rule=job.describe(rule),
            layers=tuple(results),
            original_bytes=original,
            stored_bytes=stored,
            overlay_bytes=overlay,
            ratio=original / overlay,
            ratio_vs_stored=stored / overlay,
            bits_per_weight=16 * overlay / original,
            bytes_by_part=parts,
            notes=(*job.notes(curves), *bank_notes(codes)),
            cost=job.opened.cost(),
        )


def verify(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    rule: RankRule | BitRule,
    experts: int | None,
    tolerance: float,
    inputs: int,
    seed: int,
    calibrate: Path | None,
    progress: Progress,
) -> MoEOverlayVerification:
    """The errors of experts that are rebuilt from an overlay, and whether the worst is within the tolerance.

    Raises InvalidRequest for a tolerance that is negative or not finite, and for experts of an unknown activation.
    """
    if not 0 <= tolerance < inf:
        raise InvalidRequest(f"the tolerance is {tolerance:g}", "give 0 or more, such as 0.05")
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        job.check_activation()
        curves: dict[int, LayerCurves] = {}
        job.calibrate(calibrate, rule)
        if isinstance(rule, BitRule):
            results = job.verify_codes(job.choose_codes(rule), inputs, seed, rounding_bits_beside(rule))
        else:
            chosen, curves = job.choose_ranks(rule, experts)
            results = job.verify_all(chosen, inputs, seed)
        job.end()
        notes = job.notes(curves)
        if any(verified.norm() is None for verified in job.layers):
            notes.append("no norm before the experts was found: the inputs have unit scale")
        return MoEOverlayVerification(
            **job.opened.identity(),
            passed=all(result.output_error.max <= tolerance for result in results),
            tolerance=tolerance,
            rule=job.describe(rule),
            activation=job.opened.experts.activation,
            inputs=inputs,
            seed=seed,
            layers=tuple(results),
            notes=tuple(notes),
            cost=job.opened.cost(),
        )


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """What an estimate measures of one layer: curves, alternatives at the same bytes, by role the saving of sharing and
    the `list_variances` of the aligned experts, and trials."""

    curves: LayerCurves
    alternatives: tuple[Alternative, ...]
    factored: tuple[Factored, ...]
    rates: dict[str, Rate]
    variances: dict[str, tuple[tuple[float, float], ...]]
    trials: dict[str, RoleTrial]


class OverlayJob:
    """An opened model, and the passes over its chosen layers: measuring, comparing, verifying.

    Results of a pass are kept until `end` is called, so that an interrupted run continues where it stopped.
    """

    def __init__(
        self,
        model: str,
        layer: int | None,
        layers: Sequence[int] | str | None,
        progress: Progress,
        samples: int | None = None,
        experts: Experts | None = None,
    ) -> None:
        self.opened = OpenedModel(model, layer, layers, samples=samples, purpose="share", experts=experts)
        self.layers = self.opened.layers
        self.progress = progress
        self.calibration: Calibration | None = None
        self._gathering: ResumableLayers | None = None
        self._passes: list[ResumableLayers] = []

    def end(self) -> None:
        """Delete the results that were kept for an interrupted run."""
        for resumable in self._passes:
            resumable.end()

    def resumable(self, *work: Any) -> ResumableLayers:
        """A resumable pass over the layers; `work` (JSON) distinguishes it from others."""
        key = [*work, self.opened.name]
        self._passes.append(ResumableLayers(self.opened.experts.checkpoint, key, self.layers, self.progress))
        return self._passes[-1]

    def resumable_codes(self, *work: Any) -> ResumableLayers:
        """Like `resumable`, for work that depends on the calibration."""
        return self.resumable(*work, *([self.calibration.digest] if self.calibration else []))

    def calibrate(self, text: Path | None, rule: RankRule | BitRule) -> None:
        """Measure errors of codes by the inputs that the experts get while the model reads a text, if there is one.

        Raises InvalidRequest for a rule of ranks, a text that can't be read, a model that is not on this machine, and
        LibraryMissing if MLX is not installed; see also `gather_inputs`.
        """
        if text is None:
            return
        if not isinstance(rule, BitRule):
            raise InvalidRequest("ranks can't be calibrated", "leave out the text, or ask for codes")
        if rule.trellis:
            raise InvalidRequest("trellises can't be calibrated", "give either the text or trellis")
        repository = self.opened.experts.checkpoint.repository
        if not isinstance(repository, Folder):
            name = self.opened.name
            raise InvalidRequest(f"{name} is not on this machine", f"run: hf download {name}, and give its folder")
        folder = repository.path
        from .runtime.calibrate import gather_inputs, read_windows

        self.check_activation()
        windows = read_windows(folder, text)
        digest = hashlib.sha256(windows.tobytes()).hexdigest()[:16]
        gathering = self.resumable("inputs", digest)

        def gather(due: Sequence[ExpertLayer], watched: Sequence[Progress]) -> Iterator[tuple[int, int]]:
            places = {layer.number: place for place, layer in enumerate(due)}

            def keep(number: int, inputs: LayerInputs) -> None:
                place = places[number]
                try:
                    inputs.write(gathering.file_of(due[place]))
                except OSError as error:
                    reason = f"can't save the inputs of the experts: {error.strerror}"
                    raise InvalidRequest(reason, "set LAZARUS_CACHE to a folder with room") from None
                size = due[place].stored_bytes
                watched[place](f"calibrating layer {number}", size, size)

            if due:
                sizes = {layer.number: (layer.count, layer.sizes["H"], layer.sizes["I"]) for layer in due}
                gather_inputs(folder, windows, sizes, keep)
            yield from ((place, len(windows)) for place in places.values())

        gathering.all(TypeAdapter(int), gather)
        self.calibration = Calibration(windows.size, digest)
        self._gathering = gathering

    def moments_of(self, layer: ExpertLayer) -> ExpertMoments | None:
        """The moments by which the errors of a layer's codes are measured, if any."""
        if self._gathering is None:
            return None
        inputs = LayerInputs.read(self._gathering.file_of(layer))
        return ExpertMoments(layer, inputs, str(self.opened.experts.activation))

    def describe(self, rule: RankRule | BitRule) -> str:
        """The rule in words, with the calibration."""
        return f"{rule}; {self.calibration}" if self.calibration else str(rule)

    def describe_folder(self, rule: BitRule, overlaid: Sequence[int]) -> dict[str, str]:
        """The origin of a coded model as its folder states it: source, rule, and the options that verify it."""
        layers = format_ranges(overlaid)
        calibrated = " --calibrate TEXT" if self.calibration else ""
        return {
            "source": printable(self.opened.name),
            "rule": f"{self.describe(rule)}; layers {layers}",
            "options": f"--layers {layers.replace(' ', '')} {rule.options}{calibrated}",
        }

    def choose_ranks(self, rule: RankRule, experts: int | None) -> tuple[dict[int, Ranks], dict[int, LayerCurves]]:
        """The ranks of every layer by the rule, and the curves that were measured for it.

        Nothing is measured where all ranks are given. `experts` is the number of experts whose spectra are taken, None
        for all.
        """
        if all(rule.given.keys() >= set(layer.roles) for layer in self.layers):
            chosen = {layer.number: {role: rule.given[role] for role in layer.roles} for layer in self.layers}
            for layer in self.layers:
                check_ranks(layer.number, chosen[layer.number], {role: layer.shape(role) for role in layer.roles})
            return chosen, {}
        curves = self.measure_all(rule, experts)
        return rule.choose(curves), curves

    def measure_all(self, rule: RankRule, experts: int | None) -> dict[int, LayerCurves]:
        """The curves of each layer, from the spectra of `experts` experts, None for all."""

        def measure(layer: ExpertLayer, progress: Progress) -> LayerCurves:
            return layer_curves(self._measure_roles(layer, experts, progress), layer.count, rule.energy)

        results = self.resumable("measure", rule.energy, experts).each(TypeAdapter(LayerCurves), measure)
        return {layer.number: curves for layer, curves in zip(self.layers, results, strict=True)}

    def compare_all(self, energy: float, experts: int | None) -> "dict[int, LayerComparison]":
        """What an estimate needs of each layer."""

        def compare(layer: ExpertLayer, progress: Progress) -> LayerComparison:
            measures = self._measure_roles(layer, experts, progress, keep_vectors=True)
            alternatives, factored = compare_alternatives(layer, measures, self.opened.resources, progress)
            vectors = {role: measure.vectors for role, measure in measures.items() if measure.vectors is not None}
            grams = {role: measure.gram for role, measure in measures.items()}
            with self.opened.resources.worker_threads(layer) as pool:
                alignment = align(vectors, run=pool.map)
                shared = share_neurons(vectors, alignment) if may_share(vectors, pool.map) else alignment
            rates = rate_sharing(grams, vectors, alignment, shared)
            variances = {role: list_variances(gram) for role, gram in align_grams(grams, vectors, alignment).items()}
            if shared.bank:
                variances = {role: bank_variances(vectors[role], shared) for role in variances}
            return LayerComparison(
                layer_curves(measures, layer.count, energy),
                alternatives,
                factored,
                rates,
                variances,
                try_layer(layer, shared, self.opened.resources),
            )

        results = self.resumable("compare", energy, experts).each(TypeAdapter(LayerComparison), compare)
        return {layer.number: compared for layer, compared in zip(self.layers, results, strict=True)}

    def verify_all(self, chosen: Mapping[int, Ranks], inputs: int, seed: int) -> list[LayerVerification]:
        """The errors that an overlay of these ranks makes in each layer."""

        def verify(layer: ExpertLayer, progress: Progress) -> LayerVerification:
            ranks, check = chosen[layer.number], self.fidelity_check(layer, inputs, seed)
            fidelity = check_layer(layer, ranks, check, self.opened.resources, progress)
            return layer_verification(layer.number, ranks, fidelity)

        by_layer = {str(number): ranks for number, ranks in chosen.items()}
        return self.resumable("verify", by_layer, inputs, seed).each(TypeAdapter(LayerVerification), verify)

    def try_all(self) -> dict[int, dict[str, RoleTrial]]:
        """The trials of every layer, from a few experts of each."""

        def try_one(layer: ExpertLayer, progress: Progress) -> dict[str, RoleTrial]:
            layer.prefetch(progress)
            resources = self.opened.resources
            return try_layer(layer, align_layer(layer, resources, with_bank=True), resources)

        trials = self.resumable("trial").each(TypeAdapter(dict[str, RoleTrial]), try_one)
        return {layer.number: trial for layer, trial in zip(self.layers, trials, strict=True)}

    def has_bases(self) -> bool:
        """Whether a base pays for any projection of any layer."""
        return any(trial.has_base for trials in self.try_all().values() for trial in trials.values())

    def choose_codes(self, rule: BitRule, overlaid: Sequence[int] | None = None) -> dict[int, LayerCodes]:
        """The codes of every layer by the rule, from trials of a few experts of each.

        A rule of a folder's size counts the layers that are `overlaid` in that folder, all MoE layers for None.
        """
        by_layer = self.try_all()
        return self.count_bits(rule, by_layer, overlaid).choose(by_layer)

    def count_bits(
        self, rule: BitRule, trials: Mapping[int, Mapping[str, RoleTrial]], overlaid: Sequence[int] | None = None
    ) -> BitRule:
        """The rule; if it is the size of a folder, converted to the bits per weight that this leaves for the experts.

        A layer that was not tried is assumed to be like the nearest that was.
        """
        if rule.fit is None:
            return rule
        experts = self.opened.experts
        numbers = tuple(overlaid or experts.layers)
        words = self.describe_folder(rule, numbers)

        def folder_bytes(codes: Mapping[int, LayerCodes]) -> int:
            card = card_table([longest_verification(number, codes[number]) for number in self.verified_layers(numbers)])
            resources = self.opened.resources
            return coded_folder_bytes(experts, codes, resources=resources, progress=self.progress, card=card, **words)

        spread = spread_trials(trials, [experts.layer(number) for number in numbers])
        return BitRule(fit_bits(rule.fit, spread, folder_bytes, rule.trellis), trellis=rule.trellis)

    def verified_layers(self, overlaid: Sequence[int]) -> list[int]:
        """Which layers of a written overlay are verified."""
        places = evenly_spaced(len(overlaid), VERIFIED) if self.knows_activation else ()
        return [overlaid[place] for place in places]

    def measure_codes(self, chosen: Mapping[int, LayerCodes]) -> list[float]:
        """The weight error that codes make in each layer."""

        def measure(layer: ExpertLayer, progress: Progress) -> float:
            codes, moments = chosen[layer.number], self.moments_of(layer)
            return measure_coded_layer(layer, codes, self.opened.resources, progress, moments)

        return list(self.resumable_codes("code", _codes_key(chosen)).each(TypeAdapter(float), measure))

    def verify_codes(
        self, chosen: Mapping[int, LayerCodes], inputs: int, seed: int, rounding_bits: Sequence[int]
    ) -> list[LayerVerification]:
        """The errors that an overlay in these codes makes in each layer."""

        def verify(layer: ExpertLayer, progress: Progress) -> LayerVerification:
            codes, check = chosen[layer.number], self.fidelity_check(layer, inputs, seed, rounding_bits)
            fidelity = check_coded_layer(layer, codes, check, self.opened.resources, progress, self.moments_of(layer))
            return layer_verification(layer.number, {}, fidelity, projection_codes(codes))

        key = _codes_key(chosen)
        work = self.resumable_codes("verify", key, inputs, seed, rounding_bits)
        return work.each(TypeAdapter(LayerVerification), verify)

    def fidelity_check(
        self,
        layer: ExpertLayer,
        inputs: int,
        seed: int,
        rounding_bits: Sequence[int] = ROUNDING_BITS,
        of_experts: Sequence[int] | None = None,
    ) -> FidelityCheck:
        """The check of a layer's rebuilt experts, or of some, against the originals, on `inputs` random inputs."""
        experts = self.opened.experts
        drawn_inputs = draw_inputs(
            layer,
            inputs,
            seed,
            top_k=experts.top_k,
            scoring=experts.scoring,
            normalise=experts.model_config.normalises_routing_weights,
        )
        return FidelityCheck(layer, drawn_inputs, experts.activation, rounding_bits, of_experts)

    @property
    def knows_activation(self) -> bool:
        """Whether we can compute the experts' activation, and therefore run them."""
        activation = self.opened.experts.activation
        return activation in ACTIVATIONS or activation in GATED_ACTIVATIONS

    def check_activation(self) -> None:
        """Raises InvalidRequest where the experts' activation is not known."""
        if not self.knows_activation:
            activation = self.opened.experts.activation
            raise InvalidRequest(f"the experts' activation {activation} is not known", "it can't be verified")

    def notes(self, curves: Mapping[int, LayerCurves]) -> list[str]:
        """Notes for the report: those on the model, and that experts were sampled."""
        samples = {(layer.sampled, layer.experts) for layer in curves.values() if layer.sampled < layer.experts}
        return self.opened.experts.notes + [
            f"errors and ranks are estimated from {sampled} of {count} experts" for sampled, count in sorted(samples)
        ]

    def _measure_roles(
        self, layer: ExpertLayer, experts: int | None, progress: Progress, keep_vectors: bool = False
    ) -> dict[str, RoleMeasure]:
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        chosen = evenly_spaced(layer.count, experts)
        return measure_layer(layer, chosen, self.opened.resources, progress, keep_vectors=keep_vectors)


def rounding_bits_beside(rule: RankRule | BitRule) -> tuple[int, ...]:
    """The bits of the plain quantisations that are compared beside an overlay: the usual ones, and the rule's."""
    own = rule.as_good_as if isinstance(rule, BitRule) else None
    return ROUNDING_BITS if own is None or own in ROUNDING_BITS else (*ROUNDING_BITS, own)


def _codes_key(chosen: Mapping[int, LayerCodes]) -> dict[str, Any]:
    """Codes as JSON, which distinguishes a pass with them from others."""
    return {str(number): codes_to_json(codes) for number, codes in chosen.items()}
