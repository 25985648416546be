"""The whole model as an overlay, or quantised for mlx-lm, estimated from some of its layers."""

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import numpy as np

from ..errors import name_model
from ..jobs.layout import header_facts
from ..progress import Progress
from ..reports import FitPlan, MoEOverlayEstimate
from .allocation import RankRule
from .alternatives import sum_alternatives
from .analysis import OverlayJob
from .bit_budget import USUAL_BITS, BitRule
from .fit import plan_fit
from .ladder import advise, bits_as_good, draw_ladder
from .layer import coded_layer_estimate, interpolate_saved, layer_estimate, total_bytes
from .stock import estimate_widths
from .trials import predict_error, spread_trials


def estimate(
    model: str,
    layers: Sequence[int] | str | None,
    samples: int,
    rule: RankRule | BitRule,
    experts: int | None,
    progress: Progress,
) -> MoEOverlayEstimate:
    """The whole model as an overlay, estimated from some measured layers, and its alternatives at the same bytes."""
    with name_model(model):
        job = OverlayJob(model, None, layers, progress, samples)
        energy = rule.energy if isinstance(rule, RankRule) else RankRule({}).energy
        compared = job.compare_all(energy, experts)
        curves, rates, trials = (
            {number: getattr(layer, name) for number, layer in compared.items()}
            for name in ("curves", "rates", "trials")
        )
        opened = job.opened
        all_layers = [opened.experts.layer(number) for number in opened.experts.layers]
        shares = any(trial.has_base for roles in trials.values() for trial in roles.values())
        plan: FitPlan | None = None
        kind: Literal["overlay", "mlx"] = "overlay"
        if isinstance(rule, BitRule) and not rule.trellis and not shares:
            kind = "mlx"
            results = estimate_widths(job, rule, all_layers, rates)
        elif isinstance(rule, BitRule):
            spread = spread_trials(trials, all_layers)
            codes = job.count_bits(rule, trials).choose(spread)
            results = [
                coded_layer_estimate(layer, codes[n], predict_error(spread[n], codes[n]), rates)
                for layer in all_layers
                for n in (layer.number,)
            ]
        else:
            chosen = rule.choose(curves)
            results = [layer_estimate(layer, curves, chosen, rates) for layer in all_layers]
        job.end()
        original, stored, overlay = total_bytes(results)
        same_bytes = sum_alternatives([layer.alternatives for layer in compared.values()])
        ladder = draw_ladder(
            trials,
            [layer.factored for layer in compared.values()],
            {number: layer.variances for number, layer in compared.items()},
            original // 2,
        )
        error = sqrt(float(np.mean([result.weight_error**2 for result in results])))
        if isinstance(rule, BitRule) and rule.fit is not None:
            plan = plan_fit(rule.fit, **header_facts(opened.experts)).model_copy(
                update={"weight_error": error, "bits_per_weight": 16 * overlay / original, "measured": True}
            )
        usual_error = next(row.quantisation for row in same_bytes if row.bits == USUAL_BITS)
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
            weight_error=error,
            format=kind,
            fit=plan,
            bits_saved=interpolate_saved(results),
            same_bytes=same_bytes,
            ladder=ladder,
            advice=advise(ladder, usual_error, 16 * stored / original, bits_as_good(trials)),
            notes=tuple(job.notes(curves)),
            cost=opened.cost(),
        )
