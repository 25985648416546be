"""Overlays of a model: measured, chosen, verified and estimated."""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ..errors import InvalidRequest, name_model
from ..jobs.measure import RoleMeasure, measure_layer
from ..jobs.model import OpenedModel, evenly_spaced
from ..jobs.resume import ResumableLayers
from ..numerics.forward import ACTIVATIONS
from ..progress import Progress
from ..reports import LayerVerification, MoEOverlay, MoEOverlayEstimate, MoEOverlayVerification
from ..weights.expert_layer import ExpertLayer
from .allocation import RankRule, Ranks, check_ranks
from .alternatives import Alternative, advise, compare_alternatives, sum_alternatives
from .curves import LayerCurves, layer_curves
from .fidelity import FidelityCheck, check_layer, draw_inputs
from .layer import layer_estimate, layer_overlay, layer_verification, total_bytes

TOLERANCE = 0.05
INPUTS = 256


def compute(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    rule: RankRule,
    experts: int | None,
    progress: Progress,
) -> MoEOverlay:
    """The ranks by the rule, what they keep and what they take."""
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        curves = job.measure_all(rule, experts)
        chosen = rule.choose(curves)
        job.end()
        results = [layer_overlay(one, curves[one.number], chosen[one.number]) for one in job.layers]
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
            notes=tuple(job.notes(curves)),
            cost=job.opened.cost(),
        )


def verify(
    model: str,
    layer: int | None,
    layers: Sequence[int] | str | None,
    rule: RankRule,
    experts: int | None,
    tolerance: float,
    inputs: int,
    seed: int,
    progress: Progress,
) -> MoEOverlayVerification:
    """The errors of experts that are rebuilt from an overlay, and whether the worst is within the tolerance."""
    if not 0 <= tolerance < inf:
        raise InvalidRequest(f"the tolerance is {tolerance:g}", "give a number from 0 on, such as 0.05")
    with name_model(model):
        job = OverlayJob(model, layer, layers, progress)
        job.check_activation()
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
    """The whole model as an overlay, from some measured layers, and what else the same bytes buy."""
    with name_model(model):
        job = OverlayJob(model, None, layers, progress, samples)
        curves, alternatives = job.compare_all(rule, experts)
        job.end()
        chosen, opened = rule.choose(curves), job.opened
        results = [layer_estimate(opened.experts.layer(n), curves, chosen) for n in opened.experts.layers]
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
            same_bytes=same_bytes,
            advice=advise(same_bytes, stored / original),
            notes=tuple(job.notes(curves)),
            cost=opened.cost(),
        )


class OverlayJob:
    """A model, and the layers of it that are measured, chosen for and verified."""

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
        """Forget what was kept for an interruption."""
        for resumable in self._passes:
            resumable.end()

    def resumable(self, *job: Any) -> ResumableLayers:
        """A pass over the layers, for work that `job` (JSON) describes."""
        known = [*job, self.opened.name]
        self._passes.append(ResumableLayers(self.opened.experts.checkpoint, known, self.layers, self.progress))
        return self._passes[-1]

    def choose_ranks(self, rule: RankRule, experts: int | None) -> tuple[dict[int, Ranks], dict[int, LayerCurves]]:
        """Ranks by the rule for every layer, and the curves that were measured for it: none where all ranks are
        given."""
        if all(rule.given.keys() >= set(layer.roles) for layer in self.layers):
            chosen = {layer.number: {role: rule.given[role] for role in layer.roles} for layer in self.layers}
            for layer in self.layers:
                check_ranks(layer.number, chosen[layer.number], {role: layer.shape(role) for role in layer.roles})
            return chosen, {}
        curves = self.measure_all(rule, experts)
        return rule.choose(curves), curves

    def measure_all(self, rule: RankRule, experts: int | None) -> dict[int, LayerCurves]:
        """The curves of each layer, from the spectra of `experts` experts, None for all."""

        def measure(layer: ExpertLayer, watched: Progress) -> LayerCurves:
            return layer_curves(self._measure_roles(layer, experts, watched), layer.count, rule.energy)

        results = self.resumable("measure", rule.energy, experts).each(TypeAdapter(LayerCurves), measure)
        return {layer.number: curves for layer, curves in zip(self.layers, results, strict=True)}

    def compare_all(
        self, rule: RankRule, experts: int | None
    ) -> tuple[dict[int, LayerCurves], list[tuple[Alternative, ...]]]:
        """The curves of each layer, and what else its bytes would buy."""

        def compare(layer: ExpertLayer, watched: Progress) -> tuple[LayerCurves, tuple[Alternative, ...]]:
            measures = self._measure_roles(layer, experts, watched)
            alternatives = compare_alternatives(layer, measures, self.opened.resources, watched)
            return layer_curves(measures, layer.count, rule.energy), alternatives

        kind = TypeAdapter(tuple[LayerCurves, tuple[Alternative, ...]])
        results = self.resumable("compare", rule.energy, experts).each(kind, compare)
        curves = {layer.number: curves for layer, (curves, _) in zip(self.layers, results, strict=True)}
        return curves, [alternatives for _, alternatives in results]

    def verify_all(self, chosen: Mapping[int, Ranks], inputs: int, seed: int) -> list[LayerVerification]:
        """What an overlay of these ranks does to each layer."""

        def verify(layer: ExpertLayer, watched: Progress) -> LayerVerification:
            ranks, check = chosen[layer.number], self.fidelity_check(layer, inputs, seed)
            fidelity = check_layer(layer, ranks, check, self.opened.resources, watched)
            return layer_verification(layer.number, ranks, fidelity)

        by_layer = {str(number): ranks for number, ranks in chosen.items()}
        return self.resumable("verify", by_layer, inputs, seed).each(TypeAdapter(LayerVerification), verify)

    def fidelity_check(self, layer: ExpertLayer, inputs: int, seed: int) -> FidelityCheck:
        """What compares a layer's rebuilt experts with the originals, on `inputs` seeded inputs."""
        experts = self.opened.experts
        drawn = draw_inputs(
            layer,
            inputs,
            seed,
            top_k=experts.top_k,
            scoring=experts.scoring,
            normalise=experts.model_config.normalises_routing_weights,
        )
        return FidelityCheck(layer, drawn, experts.activation)

    @property
    def knows_activation(self) -> bool:
        """Whether the experts can be run here."""
        activation = self.opened.experts.activation
        return activation in ACTIVATIONS or activation == "swiglu_oai"

    def check_activation(self) -> None:
        """Raises InvalidRequest where the experts' activation is not known."""
        if not self.knows_activation:
            activation = self.opened.experts.activation
            raise InvalidRequest(f"the experts' activation {activation} is not known", "it can't be verified")

    def notes(self, curves: Mapping[int, LayerCurves]) -> list[str]:
        """What the reader should know."""
        sampled = {(layer.sampled, layer.experts) for layer in curves.values() if layer.sampled < layer.experts}
        return self.opened.experts.notes + [
            f"errors and ranks are estimated from {sample} of {count} experts" for sample, count in sorted(sampled)
        ]

    def _measure_roles(self, layer: ExpertLayer, experts: int | None, progress: Progress) -> dict[str, RoleMeasure]:
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        return measure_layer(layer, evenly_spaced(layer.count, experts), self.opened.resources, progress)
