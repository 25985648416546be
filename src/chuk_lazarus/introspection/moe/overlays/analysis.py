"""Overlays of a model, without writing one: ranks are chosen, experts verified, and the whole model estimated."""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ..errors import InvalidRequest, name_model
from ..jobs.measure import RoleMeasure, measure_layer
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.resume import ResumableLayers
from ..numerics.alignment import align
from ..numerics.forward import ACTIVATIONS, GATED_ACTIVATIONS
from ..numerics.rates import Rate, sharing_rates
from ..progress import Progress
from ..reports import LayerVerification, MoEOverlay, MoEOverlayEstimate, MoEOverlayVerification
from ..weights.expert_layer import ExpertLayer
from .alignment import align_layer
from .allocation import RankRule, check_ranks
from .alternatives import Alternative, advise, compare_alternatives, sum_alternatives
from .bit_budget import BitRule, RoleTrial, try_layer
from .checkpoint.format import Ranks, codes_to_json
from .codes import LayerCodes
from .curves import LayerCurves, layer_curves
from .fidelity import FidelityCheck, check_coded_layer, check_layer, draw_inputs, measure_coded_layer
from .layer import (
    coded_bytes,
    coded_layer_overlay,
    interpolate_saved,
    layer_estimate,
    layer_overlay,
    layer_verification,
    ranked_bytes,
    total_bytes,
)

TOLERANCE = 0.05
INPUTS = 256


def compute(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    rule: RankRule | BitRule,
    experts: int | None,
    progress: Progress,
) -> MoEOverlay:
    """The ranks or codes that the rule chooses, what they keep and the bytes that they take."""
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        curves: dict[int, LayerCurves] = {}
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
            rule=str(rule),
            layers=tuple(results),
            original_bytes=original,
            stored_bytes=stored,
            overlay_bytes=overlay,
            ratio=original / overlay,
            ratio_vs_stored=stored / overlay,
            bits_per_weight=16 * overlay / original,
            bytes_by_part=parts,
            notes=tuple(job.notes(curves)),
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
    progress: Progress,
) -> MoEOverlayVerification:
    """The errors of experts that are rebuilt from an overlay, and whether the worst is within the tolerance.

    Raises InvalidRequest for a tolerance that is negative or not finite, and for experts of an unknown activation.
    """
    if not 0 <= tolerance < inf:
        raise InvalidRequest(f"the tolerance is {tolerance:g}", "give a number from 0 on, such as 0.05")
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        job.check_activation()
        curves: dict[int, LayerCurves] = {}
        if isinstance(rule, BitRule):
            results = job.verify_codes(job.choose_codes(rule), inputs, seed)
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
            rule=str(rule),
            activation=job.opened.experts.activation,
            inputs=inputs,
            seed=seed,
            layers=tuple(results),
            notes=tuple(notes),
            cost=job.opened.cost(),
        )


def estimate(
    model: str,
    layers: Sequence[int] | str | None,
    samples: int,
    rule: RankRule,
    experts: int | None,
    progress: Progress,
) -> MoEOverlayEstimate:
    """The whole model as an overlay, estimated from some measured layers, and its alternatives at the same bytes."""
    with name_model(model):
        job = OverlayJob(model, None, layers, progress, samples)
        curves, alternatives, rates = job.compare_all(rule, experts)
        job.end()
        chosen, opened = rule.choose(curves), job.opened
        results = [layer_estimate(opened.experts.layer(n), curves, chosen, rates) for n in opened.experts.layers]
        original, stored, overlay = total_bytes(results)
        same_bytes = sum_alternatives(alternatives)
        return MoEOverlayEstimate(
            **opened.identity(),
            rule=str(rule),
            moe_layers=opened.experts.layers,
            layers_measured=tuple(sorted(curves)),
            layers=tuple(results),
            original_bytes=original,
            stored_bytes=stored,
            overlay_bytes=overlay,
            ratio=original / overlay,
            ratio_vs_stored=stored / overlay,
            weight_error=sqrt(float(np.mean([result.weight_error**2 for result in results]))),
            bits_saved=interpolate_saved(results),
            same_bytes=same_bytes,
            advice=advise(same_bytes, stored / original),
            notes=tuple(job.notes(curves)),
            cost=opened.cost(),
        )


class OverlayJob:
    """An opened model, and the passes over its chosen layers: measuring, comparing, verifying.

    Results of a pass are kept, so that a run that was stopped goes on where it was, until `end` is called.
    """

    def __init__(
        self,
        model: str,
        layer: int | None,
        layers: Sequence[int] | str | None,
        progress: Progress,
        samples: int | None = None,
    ) -> None:
        self.opened = OpenedModel(model, layer, layers, samples=samples, purpose="share")
        self.layers = self.opened.layers
        self.progress = progress
        self._passes: list[ResumableLayers] = []

    def end(self) -> None:
        """Delete the results that were kept for a stopped run."""
        for resumable in self._passes:
            resumable.end()

    def resumable(self, *work: Any) -> ResumableLayers:
        """A resumable pass over the layers; `work` (JSON) tells it from any other."""
        key = [*work, self.opened.name]
        self._passes.append(ResumableLayers(self.opened.experts.checkpoint, key, self.layers, self.progress))
        return self._passes[-1]

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

    def compare_all(
        self, rule: RankRule, experts: int | None
    ) -> tuple[dict[int, LayerCurves], list[tuple[Alternative, ...]], dict[int, dict[str, Rate]]]:
        """The curves of each layer, its alternatives at the same bytes, and what sharing saves of each role."""
        Compared = tuple[LayerCurves, tuple[Alternative, ...], dict[str, Rate]]

        def compare(layer: ExpertLayer, progress: Progress) -> Compared:
            measures = self._measure_roles(layer, experts, progress, keep_vectors=True)
            alternatives = compare_alternatives(layer, measures, self.opened.resources, progress)
            return layer_curves(measures, layer.count, rule.energy), alternatives, self._measure_rates(layer, measures)

        results = self.resumable("compare", rule.energy, experts).each(TypeAdapter(Compared), compare)
        numbers = [layer.number for layer in self.layers]
        curves, alternatives, rates = zip(*results, strict=True)
        return (
            dict(zip(numbers, curves, strict=True)),
            list(alternatives),
            dict(zip(numbers, rates, strict=True)),
        )

    def verify_all(self, chosen: Mapping[int, Ranks], inputs: int, seed: int) -> list[LayerVerification]:
        """The errors that an overlay of these ranks makes in each layer."""

        def verify(layer: ExpertLayer, progress: Progress) -> LayerVerification:
            ranks, check = chosen[layer.number], self.fidelity_check(layer, inputs, seed)
            fidelity = check_layer(layer, ranks, check, self.opened.resources, progress)
            return layer_verification(layer.number, ranks, fidelity)

        by_layer = {str(number): ranks for number, ranks in chosen.items()}
        return self.resumable("verify", by_layer, inputs, seed).each(TypeAdapter(LayerVerification), verify)

    def choose_codes(self, rule: BitRule) -> dict[int, LayerCodes]:
        """The codes of every layer by the rule, from trials of a few experts of each."""

        def try_one(layer: ExpertLayer, progress: Progress) -> dict[str, RoleTrial]:
            layer.prefetch(progress)
            resources = self.opened.resources
            return try_layer(layer, align_layer(layer, resources), resources)

        trials = self.resumable("trial").each(TypeAdapter(dict[str, RoleTrial]), try_one)
        return rule.choose({layer.number: trial for layer, trial in zip(self.layers, trials, strict=True)})

    def measure_codes(self, chosen: Mapping[int, LayerCodes]) -> list[float]:
        """The weight error that codes make in each layer."""

        def measure(layer: ExpertLayer, progress: Progress) -> float:
            return measure_coded_layer(layer, chosen[layer.number], self.opened.resources, progress)

        return list(self.resumable("code", _codes_key(chosen)).each(TypeAdapter(float), measure))

    def verify_codes(self, chosen: Mapping[int, LayerCodes], inputs: int, seed: int) -> list[LayerVerification]:
        """The errors that an overlay in these codes makes in each layer."""

        def verify(layer: ExpertLayer, progress: Progress) -> LayerVerification:
            codes, check = chosen[layer.number], self.fidelity_check(layer, inputs, seed)
            fidelity = check_coded_layer(layer, codes, check, self.opened.resources, progress)
            return layer_verification(layer.number, {}, fidelity, codes)

        key = _codes_key(chosen)
        return self.resumable("verify", key, inputs, seed).each(TypeAdapter(LayerVerification), verify)

    def fidelity_check(self, layer: ExpertLayer, inputs: int, seed: int) -> FidelityCheck:
        """The check of a layer's rebuilt experts against the originals, on `inputs` random inputs."""
        experts = self.opened.experts
        drawn_inputs = draw_inputs(
            layer,
            inputs,
            seed,
            top_k=experts.top_k,
            scoring=experts.scoring,
            normalise=experts.model_config.normalises_routing_weights,
        )
        return FidelityCheck(layer, drawn_inputs, experts.activation)

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

    def _measure_rates(self, layer: ExpertLayer, measures: Mapping[str, RoleMeasure]) -> dict[str, Rate]:
        """What sharing saves of each role, after the experts' neurons were brought into one order."""
        vectors = {role: measure.vectors for role, measure in measures.items() if measure.vectors is not None}
        grams = {role: measure.gram for role, measure in measures.items()}
        with self.opened.resources.worker_threads(layer) as pool:
            return sharing_rates(grams, vectors, align(vectors, run=pool.map))

    def _measure_roles(
        self, layer: ExpertLayer, experts: int | None, progress: Progress, keep_vectors: bool = False
    ) -> dict[str, RoleMeasure]:
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        chosen = evenly_spaced(layer.count, experts)
        return measure_layer(layer, chosen, self.opened.resources, progress, keep_vectors=keep_vectors)


def _codes_key(chosen: Mapping[int, LayerCodes]) -> dict[str, Any]:
    """Codes as JSON, which tells a pass with them from any other."""
    return {str(number): codes_to_json(codes) for number, codes in chosen.items()}
