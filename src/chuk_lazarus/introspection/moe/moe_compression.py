"""What would an overlay save, and what would it cost? `MoECompressionService` computes, verifies and estimates it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from . import views  # noqa: F401  which registers how reports are shown
from .errors import InvalidRequest, NotMoE, name_model, printable
from .fidelity import (
    Alternative,
    LayerFidelity,
    Trial,
    check_layer,
    compare_alternatives,
    draw_inputs,
    energy_left,
    overlay_choices,
)
from .jobs.measure import RoleMeasure, evenly_spaced, measure_layer
from .jobs.resume import ResumableLayers
from .numerics.forward import ACTIVATIONS
from .numerics.low_rank import original_bytes, overlay_bytes
from .numerics.spectra import mean_rank
from .overlay import Choice, spread_rank
from .progress import Progress, no_progress
from .reports import (
    Cost,
    ErrorSpread,
    LayerEstimate,
    LayerOverlay,
    LayerVerification,
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
    SameBytes,
)
from .text import format_ranges
from .weights.checkpoint import Checkpoint
from .weights.expert_layer import ExpertLayer
from .weights.experts import Experts
from .weights.repositories.find import find_repository
from .weights.repositories.local import Folder

Ranks = dict[str, int]
TOLERANCE = 0.05
INPUTS = 256


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks are chosen: at most one of `max_error` and `target_ratio`, else the mean rank at `energy` of the
    deltas.

    `given` ranks, by role, stand whatever the rule says of the others.
    """

    given: Mapping[str, int]
    energy: float = 0.95
    max_error: float | None = None
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None and self.target_ratio is not None:
            raise InvalidRequest("both a greatest error and a ratio are given", "give one of the two")
        if self.given and (self.max_error is not None or self.target_ratio is not None):
            raise InvalidRequest("ranks are given together with a greatest error or a ratio", "give one of the two")
        if not 0 < self.energy <= 1:
            raise InvalidRequest(f"the energy to keep is {self.energy:g}", "give a share above 0 and at most 1")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidRequest(f"the greatest error is {self.max_error:g}", "give a share between 0 and 1")
        if self.target_ratio is not None and not 0 < self.target_ratio < inf:
            raise InvalidRequest(f"the ratio is {self.target_ratio:g}", "give a number above 0, such as 4")

    def __str__(self) -> str:
        if self.max_error is not None:
            return f"relative weight error of the experts at most {self.max_error:g}, fewest bytes"
        if self.target_ratio is not None:
            return f"ratio {self.target_ratio:g}, least weight error"
        given = ", ".join(f"{role} {rank}" for role, rank in self.given.items())
        rest = "" if len(self.given) == 3 else f"mean rank at {100 * self.energy:g} % of the delta energy"
        return " else ".join(part for part in (f"given: {given}" if given else "", rest) if part)

    def choose(self, layers: Mapping[int, "_Measured"]) -> dict[int, Ranks]:
        """Ranks for every layer. Raises InvalidRequest for what can't be: a rank above the greatest, a ratio out of
        reach."""
        if self.max_error is not None or self.target_ratio is not None:
            return self._spread(layers)
        chosen = {}
        for number, measured in layers.items():
            chosen[number] = {role: self.given.get(role, natural) for role, natural in measured.natural.items()}
            _check_ranks(number, chosen[number], measured.shapes)
        return chosen

    def _spread(self, layers: Mapping[int, "_Measured"]) -> dict[int, Ranks]:
        choices = {(number, role): c for number, found in layers.items() for role, c in found.choices.items()}
        if self.max_error is not None:
            energy = sum(found.energy for found in layers.values())
            ranks = spread_rank(choices, energy_left=self.max_error**2 * energy)
        else:
            assert self.target_ratio is not None
            original = sum(original_bytes(found.shapes, found.experts) for found in layers.values())
            base = sum(found.bytes_at(dict.fromkeys(found.shapes, 0)) for found in layers.values())
            budget = original / self.target_ratio - base
            if budget < 0:
                raise InvalidRequest(
                    f"a ratio of {self.target_ratio:g} is out of reach", f"the base alone gives {original / base:.1f}"
                )
            ranks = spread_rank(choices, budget=budget)
        return {number: {role: ranks[number, role] for role in found.shapes} for number, found in layers.items()}


def _check_ranks(number: int, ranks: Ranks, shapes: Mapping[str, tuple[int, int]]) -> None:
    for role, rank in ranks.items():
        greatest = min(shapes[role])
        if not 0 <= rank <= greatest:
            raise InvalidRequest(f"layer {number}: {role} rank {rank}", f"give one from 0 to {greatest}")


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the choice of ranks needs of a layer; its `sampled` experts stand for all.

    `natural` are the mean ranks at the rule's energy; `energy` is that of all experts.
    """

    shapes: Mapping[str, tuple[int, int]]
    natural: Mapping[str, int]
    choices: Mapping[str, Choice]
    energy: float
    experts: int
    sampled: int

    def dump(self) -> str:
        """As JSON, whose numbers come back as they were."""
        choices = {role: [choice.spectrum.tolist(), choice.cost] for role, choice in self.choices.items()}
        rest = {name: getattr(self, name) for name in ("shapes", "natural", "energy", "experts", "sampled")}
        return json.dumps({**rest, "choices": choices})

    @classmethod
    def load(cls, text: str) -> "_Measured":
        """What `dump` gave; raises ValueError for anything else."""
        try:
            found = json.loads(text)
            shapes = {role: (int(out), int(inner)) for role, (out, inner) in found.pop("shapes").items()}
            choices = {role: Choice(np.array(values), cost) for role, (values, cost) in found.pop("choices").items()}
            return cls(shapes=shapes, choices=choices, **found)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not what was kept") from error

    def bytes_at(self, ranks: Mapping[str, float]) -> int:
        return overlay_bytes(self.shapes, ranks, self.experts)

    def error_at(self, ranks: Mapping[str, int]) -> float:
        """The relative Frobenius error of the experts that the spectra promise."""
        return sqrt(max(0.0, energy_left(self.choices, ranks)) / self.energy) if self.energy else 0.0


class MoECompressionService:
    """Computes, verifies and estimates overlays: `expert ≈ base + left @ right`.

    >>> MoECompressionService.compute("demo:upcycled", target_ratio=2).layers[0].ranks
    {'gate': 23, 'up': 23, 'down': 24}
    """

    @staticmethod
    def compute(
        model: str,
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        ranks: Mapping[str, int] | None = None,
        energy: float = 0.95,
        max_error: float | None = None,
        target_ratio: float | None = None,
        experts: int | None = None,
        progress: Progress | None = None,
    ) -> MoEOverlay:
        """The ranks that an overlay of some layers needs, what it keeps and what it takes.

        `ranks` gives them by role; else `max_error` (relative Frobenius error of the experts) or `target_ratio` (bytes)
        spread them over projections and layers where they buy the most; else each is the mean rank at `energy` of the
        deltas. `experts` says of how many spectra are taken, None for all. `model`, `layer`, `layers` and `progress` as
        in MoETypeService. Raises a child of MoEError.
        """
        rule = RankRule(ranks or {}, energy, max_error, target_ratio)
        with name_model(model):
            job = _Job(model, layer, layers, progress)
            measured = job.measure_all(rule, experts)
            chosen = rule.choose(measured)
            job.end()
            results = [_layer_overlay(one, measured[one.number], chosen[one.number]) for one in job.layers]
            original, stored, overlay = _total_bytes(results)
            return MoEOverlay(
                **job.identity(),
                rule=str(rule),
                layers=tuple(results),
                original_bytes=original,
                stored_bytes=stored,
                overlay_bytes=overlay,
                ratio=original / overlay,
                ratio_vs_stored=stored / overlay,
                notes=tuple(job.notes(measured)),
                cost=job.cost(),
            )

    @staticmethod
    def verify(
        model: str,
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        ranks: Mapping[str, int] | None = None,
        energy: float = 0.95,
        max_error: float | None = None,
        target_ratio: float | None = None,
        experts: int | None = None,
        tolerance: float = TOLERANCE,
        inputs: int = INPUTS,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> MoEOverlayVerification:
        """Rebuild the experts from base and factors as stored (bfloat16), and compare weights and outputs with the
        originals.

        Ranks as in `compute`. The outputs are those of the whole expert function, on `inputs` seeded Gaussian vectors
        of the scale that the layer's norm gives. Passes when the worst expert's relative output error is within
        `tolerance`.
        """
        rule = RankRule(ranks or {}, energy, max_error, target_ratio)
        if not 0 <= tolerance < inf:
            raise InvalidRequest(f"the tolerance is {tolerance:g}", "give a number from 0 on, such as 0.05")
        with name_model(model):
            job = _Job(model, layer, layers, progress)
            job.check_activation()
            chosen, measured = job.choose_ranks(rule, experts)
            results = job.verify_all(chosen, inputs, seed)
            job.end()
            notes = job.notes(measured)
            if any(one.norm() is None for one in job.layers):
                notes.append("no norm before the experts was found: the inputs have unit scale")
            return MoEOverlayVerification(
                **job.identity(),
                passed=all(result.output_error.max <= tolerance for result in results),
                tolerance=tolerance,
                rule=str(rule),
                activation=job.experts.activation,
                inputs=inputs,
                seed=seed,
                layers=tuple(results),
                notes=tuple(notes),
                cost=job.cost(),
            )

    @staticmethod
    def estimate(
        model: str,
        *,
        layers: Sequence[int] | str | None = None,
        samples: int = 3,
        ranks: Mapping[str, int] | None = None,
        energy: float = 0.95,
        max_error: float | None = None,
        target_ratio: float | None = None,
        experts: int | None = 8,
        progress: Progress | None = None,
    ) -> MoEOverlayEstimate:
        """The whole model as an overlay, and what plain quantisation and plain SVDs do with the same bytes.

        `layers` are measured, or `samples` evenly spaced ones; the others' ranks are interpolated, and labelled so.
        Ranks as in `compute`, spread over the measured layers.
        """
        rule = RankRule(ranks or {}, energy, max_error, target_ratio)
        with name_model(model):
            job = _Job(model, None, layers, progress, samples)
            measured, alternatives = job.compare_all(rule, experts)
            job.end()
            chosen = rule.choose(measured)
            results = [_layer_estimate(job.experts.layer(n), measured, chosen) for n in job.experts.layers]
            original, stored, overlay = _total_bytes(results)
            same = _same_bytes(alternatives)
            error = sqrt(float(np.mean([result.weight_error**2 for result in results])))
            return MoEOverlayEstimate(
                **job.identity(),
                rule=str(rule),
                moe_layers=job.experts.layers,
                layers_measured=tuple(sorted(measured)),
                layers=tuple(results),
                original_bytes=original,
                stored_bytes=stored,
                overlay_bytes=overlay,
                ratio=original / overlay,
                ratio_vs_stored=stored / overlay,
                weight_error=error,
                same_bytes=same,
                advice=_advice(same, stored / original),
                notes=tuple(job.notes(measured)),
                cost=job.cost(),
            )

    @staticmethod
    def compress(
        model: str,
        folder: str | Path,
        *,
        layers: Sequence[int] | str = "all",
        ranks: Mapping[str, int] | None = None,
        energy: float = 0.95,
        max_error: float | None = None,
        target_ratio: float | None = None,
        experts: int | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> MoEOverlayCompression:
        """Write the model with its experts as overlays into `folder`, a complete checkpoint.

        Ranks as in `compute`, over all MoE layers unless `layers` says which; up to three of them are verified while
        they are written, for the model card. The same call goes on where a stopped one was. `force` replaces a folder
        that is there.
        """
        from .overlay_checkpoint import check_target, planned_ranks, read_overlay, write_overlay

        rule, target = RankRule(ranks or {}, energy, max_error, target_ratio), Path(folder).expanduser()
        with name_model(model):
            job = _Job(model, None, layers, progress)
            numbers = [one.number for one in job.layers]
            check_target(job.experts, target, numbers, force)
            text = f"{rule}; {experts or 'all'} experts of layers {format_ranges(numbers)}"
            chosen = planned_ranks(job.experts, target, text)
            measured: dict[int, _Measured] = {}
            if chosen is None:
                chosen, measured = job.choose_ranks(rule, experts)
            else:
                job.sweep("measure", rule.energy, experts)  # so that what was kept of it goes at the end
            tried = [job.layers[place] for place in evenly_spaced(len(job.layers), 3) if job.knows_activation]
            trials = {layer.number: job.trial(layer, INPUTS, 0) for layer in tried}
            verified: list[LayerVerification] = []

            def verify() -> str:
                for layer in tried:
                    ranks, trial = chosen[layer.number], trials[layer.number]
                    # one that a stopped run has written is not compared yet
                    found = trial.result() if trial.is_complete else check_layer(layer, ranks, trial, job.progress)
                    verified.append(_layer_verification(layer.number, ranks, found))
                return _card_table(verified)

            write_overlay(
                job.experts,
                chosen,
                target,
                force=force,
                progress=job.progress,
                source=printable(model),
                rule=text,
                trials=trials,
                card=verify,
            )
            job.end()
            before, after = (
                sum(checkpoint.info(name).nbytes for name in checkpoint.names)
                for checkpoint in (job.experts.checkpoint, read_overlay(target).checkpoint)
            )
            return MoEOverlayCompression(
                **job.identity(),
                folder=printable(str(target)),
                rule=str(rule),
                ranks=chosen,
                bytes_before=before,
                bytes_after=after,
                ratio=before / after,
                verification=tuple(verified),
                notes=(*job.notes(measured), *_compression_notes(verified, before, after)),
                cost=job.cost(),
            )

    @staticmethod
    def export(
        overlay: str | Path, folder: str | Path, *, force: bool = False, progress: Progress | None = None
    ) -> MoEOverlayExport:
        """Rebuild a standard bfloat16 checkpoint of the original family from the overlay checkpoint in `overlay`."""
        from .overlay_checkpoint import export_overlay, read_overlay

        started, source, target = time.perf_counter(), Path(overlay).expanduser(), Path(folder).expanduser()
        with name_model(str(overlay)):
            found = read_overlay(source)
            export_overlay(source, target, force=force, progress=progress or no_progress)
            written = Checkpoint(Folder(target))
            return MoEOverlayExport(
                overlay=printable(str(overlay)),
                folder=printable(str(target)),
                family=found.family,
                layers=found.layers,
                bytes=sum(written.info(name).nbytes for name in written.names),
                seconds=time.perf_counter() - started,
            )

    @staticmethod
    def evaluate(
        model: str, overlay: str | Path, text: str | Path, *, context: int = 512, tokens: int | None = None
    ) -> MoEOverlayEvaluation:
        """Run a model and its overlay in MLX on the text in a file: loss, perplexity, speed and memory of both.

        The model must be on this machine. `context` is the length of the windows, `tokens` how many tokens at most.
        Raises InvalidRequest where MLX is not installed.
        """
        try:
            from .runtime import evaluate_pair
        except ImportError:
            raise InvalidRequest("MLX and mlx-lm are not installed", "they exist for Apple Silicon and Linux") from None
        try:
            words = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"can't read {text}: {error}", "give a text file in UTF-8") from None
        repository = find_repository(model)
        if not isinstance(repository, Folder):
            raise InvalidRequest(f"{model} is not on this machine", f"run: hf download {model}, and give its folder")
        kind, plain, overlaid = evaluate_pair(repository.path, Path(overlay).expanduser(), words, context, tokens)
        difference = overlaid.loss - plain.loss
        return MoEOverlayEvaluation(
            model=printable(model),
            overlay=printable(str(overlay)),
            text=printable(str(text)),
            tokens_from=kind,
            original_result=plain,
            overlay_result=overlaid,
            loss_difference=difference,
            perplexity_ratio=exp(min(700.0, difference)),
        )


class _Job:
    """A model and the layers of it that are worked on."""

    def __init__(
        self,
        model: str,
        layer: int | None,
        layers: Sequence[int] | str | None,
        progress: Progress | None,
        samples: int | None = None,
    ) -> None:
        self._model = model
        self._started = time.perf_counter()
        self.progress: Progress = progress or no_progress
        self._sweeps: list[ResumableLayers] = []
        self.experts = Experts.open(model)
        if samples is not None and layers is None:
            places = evenly_spaced(len(self.experts.layers), samples)
            layers = [self.experts.layers[place] for place in places]
        self.layers = [self.experts.layer(number) for number in self.experts.choose_layers(layer, layers)]
        for one in self.layers:
            if one.count < 2:
                raise NotMoE(f"layer {one.number} has a single expert: there is nothing to share")

    def end(self) -> None:
        """Forget what was kept for an interruption."""
        for sweep in self._sweeps:
            sweep.end()

    def sweep(self, *job: Any) -> ResumableLayers:
        """A new one over the layers, for work that `job` (JSON) describes."""
        self._sweeps.append(ResumableLayers(self.experts.checkpoint, [*job, self._model], self.layers, self.progress))
        return self._sweeps[-1]

    def measure_all(self, rule: RankRule, experts: int | None) -> dict[int, _Measured]:
        """What the rule needs of each layer, from so many experts' spectra, None for all."""
        sweep = self.sweep("measure", rule.energy, experts)

        def find(layer: ExpertLayer) -> Callable[[Progress], _Measured]:
            return lambda watched: self.summarise(layer, self.measure_roles(layer, experts, watched), rule)

        return {one.number: sweep.layer(one, find(one), _Measured.dump, _Measured.load) for one in self.layers}

    def compare_all(
        self, rule: RankRule, experts: int | None
    ) -> tuple[dict[int, _Measured], list[tuple[Alternative, ...]]]:
        """What the rule needs of each layer, and what else its bytes would buy."""
        sweep = self.sweep("compare", rule.energy, experts)

        def find(layer: ExpertLayer) -> Callable[[Progress], tuple[_Measured, tuple[Alternative, ...]]]:
            def compare(watched: Progress) -> tuple[_Measured, tuple[Alternative, ...]]:
                roles = self.measure_roles(layer, experts, watched)
                return self.summarise(layer, roles, rule), tuple(compare_alternatives(layer, roles, watched))

            return compare

        found = [sweep.layer(one, find(one), _dump_comparison, _load_comparison) for one in self.layers]
        measured = {one.number: summary for one, (summary, _) in zip(self.layers, found, strict=True)}
        return measured, [alternatives for _, alternatives in found]

    def verify_all(self, chosen: Mapping[int, Ranks], inputs: int, seed: int) -> list[LayerVerification]:
        """What an overlay of these ranks does to each layer."""
        sweep = self.sweep("verify", {str(number): ranks for number, ranks in chosen.items()}, inputs, seed)

        def find(layer: ExpertLayer) -> Callable[[Progress], LayerVerification]:
            return lambda watched: self.verify(layer, chosen[layer.number], inputs, seed, watched)

        write, read = LayerVerification.model_dump_json, LayerVerification.model_validate_json
        return [sweep.layer(one, find(one), write, read) for one in self.layers]

    @staticmethod
    def measure_roles(layer: ExpertLayer, experts: int | None, progress: Progress) -> dict[str, RoleMeasure]:
        if experts is not None and experts < 1:
            raise InvalidRequest("the number of experts must be at least 1", "give a number, or 'all'")
        return measure_layer(layer, evenly_spaced(layer.count, experts), progress)

    def choose_ranks(self, rule: RankRule, experts: int | None) -> tuple[dict[int, Ranks], dict[int, _Measured]]:
        """Ranks by the rule for every layer, and what was measured for it: nothing where all ranks are given."""
        if all(rule.given.keys() >= set(one.roles) for one in self.layers):
            chosen = {one.number: {role: rule.given[role] for role in one.roles} for one in self.layers}
            for one in self.layers:
                _check_ranks(one.number, chosen[one.number], {role: one.shape(role) for role in one.roles})
            return chosen, {}
        measured = self.measure_all(rule, experts)
        return rule.choose(measured), measured

    @staticmethod
    def summarise(layer: ExpertLayer, roles: Mapping[str, RoleMeasure], rule: RankRule) -> _Measured:
        """The little of a layer's figures that is kept while other layers are measured."""
        return _Measured(
            {role: measure.shape for role, measure in roles.items()},
            {role: round(mean_rank(measure.spectra, rule.energy)) for role, measure in roles.items()},
            overlay_choices(roles, layer.count),
            sum(float(np.trace(measure.gram)) for measure in roles.values()),
            layer.count,
            len(next(iter(roles.values())).chosen),
        )

    def notes(self, measured: Mapping[int, _Measured]) -> list[str]:
        """What the reader should know."""
        sampled = {(found.sampled, found.experts) for found in measured.values() if found.sampled < found.experts}
        return self.experts.notes + [
            f"errors and ranks are estimated from {few} of {all_of_them} experts"
            for few, all_of_them in sorted(sampled)
        ]

    @property
    def knows_activation(self) -> bool:
        """Whether the experts can be run here."""
        return self.experts.activation in ACTIVATIONS or self.experts.activation == "swiglu_oai"

    def check_activation(self) -> None:
        """Raises InvalidRequest where the experts' activation is not known."""
        if not self.knows_activation:
            raise InvalidRequest(
                f"the experts' activation {self.experts.activation} is not known", "it can't be verified"
            )

    def verify(self, layer: ExpertLayer, ranks: Ranks, inputs: int, seed: int, progress: Progress) -> LayerVerification:
        """What an overlay of these ranks does to a layer."""
        self.check_activation()
        found = check_layer(layer, ranks, self.trial(layer, inputs, seed), progress)
        return _layer_verification(layer.number, ranks, found)

    def trial(self, layer: ExpertLayer, inputs: int, seed: int) -> Trial:
        """What compares a layer's rebuilt experts with the originals, on so many seeded inputs."""
        drawn = draw_inputs(
            layer,
            inputs,
            seed,
            top_k=self.experts.top_k,
            scoring=self.experts.scoring,
            normalise=self.experts.config.get("norm_topk_prob", True) is not False,
        )
        return Trial(layer, drawn, self.experts.activation)

    def identity(self) -> dict[str, Any]:
        """The fields of a report that say what it is about."""
        return {
            "model": printable(self._model),
            "revision": self.experts.checkpoint.repository.revision,
            "family": self.experts.family,
            "model_type": self.experts.model_type,
            "storage": ", ".join(dict.fromkeys(layer.storage for layer in self.layers)),
            "experts": self.layers[0].count,
        }

    def cost(self) -> Cost:
        return Cost(
            bytes_read=self.experts.checkpoint.bytes_read,
            bytes_fetched=self.experts.checkpoint.repository.bytes_fetched,
            seconds=time.perf_counter() - self._started,
        )


def _dump_comparison(found: tuple[_Measured, Sequence[Alternative]]) -> str:
    return json.dumps([found[0].dump(), [asdict(one) for one in found[1]]])


def _load_comparison(text: str) -> tuple[_Measured, tuple[Alternative, ...]]:
    try:
        measured, alternatives = json.loads(text)
        return _Measured.load(measured), tuple(Alternative(**one) for one in alternatives)
    except TypeError as error:
        raise ValueError("not what was kept") from error


def _total_bytes(layers: Sequence[LayerOverlay] | Sequence[LayerEstimate]) -> tuple[int, int, int]:
    """Bytes at two a weight, as stored and as overlay, over the layers."""
    return (
        sum(layer.original_bytes for layer in layers),
        sum(layer.stored_bytes for layer in layers),
        sum(layer.overlay_bytes for layer in layers),
    )


def _layer_overlay(layer: ExpertLayer, measured: _Measured, ranks: Ranks) -> LayerOverlay:
    totals = {role: float(choice.spectrum.sum()) for role, choice in measured.choices.items()}
    kept = {role: float(choice.spectrum[: ranks[role]].sum()) for role, choice in measured.choices.items()}
    original, overlay = original_bytes(measured.shapes, layer.count), measured.bytes_at(ranks)
    return LayerOverlay(
        layer=layer.number,
        ranks=ranks,
        max_ranks={role: min(shape) for role, shape in measured.shapes.items()},
        energy_kept={role: kept[role] / total if total else 1.0 for role, total in totals.items()},
        weight_error=measured.error_at(ranks),
        original_bytes=original,
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay,
        ratio=original / overlay,
    )


def _layer_verification(number: int, ranks: Ranks, found: LayerFidelity) -> LayerVerification:
    def spread(errors: Sequence[float]) -> ErrorSpread:
        return ErrorSpread(mean=float(np.mean(errors)), max=max(errors))

    return LayerVerification(
        layer=number,
        ranks=ranks,
        weight_error={role: spread(errors) for role, errors in found.weight_errors.items()},
        output_error=spread(found.output_errors),
        worst_expert=int(np.argmax(found.output_errors)),
        mixed_output_error=found.mixed_error,
        rounding_error={str(bits): error for bits, error in found.rounding_errors.items()},
    )


def _compression_notes(verified: Sequence[LayerVerification], before: int, after: int) -> list[str]:
    notes = []
    if after >= before:
        notes.append("the overlay is no smaller than the model: its ranks are too high for these experts")
    worst = max((one.output_error.max for one in verified), default=0.0)
    if worst > TOLERANCE:
        notes.append(f"the worst verified expert's output error is {100 * worst:.1f} %")
    if not verified:
        notes.append("the experts' activation is not known: nothing was verified")
    return notes


def _card_table(layers: Sequence[LayerVerification]) -> str:
    """Markdown for the model card."""
    rows = [
        f"| {one.layer} | {100 * one.output_error.mean:.1f} % | {100 * one.output_error.max:.1f} % |" for one in layers
    ]
    if not rows:
        return "Nothing was verified: the experts' activation is not known."
    return "\n".join(
        [
            "Relative error of the experts' outputs (whole expert function, seeded inputs, factors as stored):",
            "",
            "| layer | mean over experts | worst expert |",
            "|---|---|---|",
            *rows,
        ]
    )


def _layer_estimate(
    layer: ExpertLayer, measured: Mapping[int, _Measured], chosen: Mapping[int, Ranks]
) -> LayerEstimate:
    """A measured layer as it is; of another, ranks and squared error on the line between its measured neighbours."""
    numbers = sorted(measured)
    shapes = {role: layer.shape(role) for role in layer.roles}

    def between(values: Sequence[float]) -> float:
        return float(np.interp(layer.number, numbers, values))

    ranks = {
        role: min(min(shape), round(between([chosen[number][role] for number in numbers])))
        for role, shape in shapes.items()
    }
    return LayerEstimate(
        layer=layer.number,
        measured=layer.number in measured,
        ranks=ranks,
        weight_error=sqrt(between([measured[number].error_at(chosen[number]) ** 2 for number in numbers])),
        original_bytes=original_bytes(shapes, layer.count),
        stored_bytes=layer.stored_bytes,
        overlay_bytes=overlay_bytes(shapes, ranks, layer.count),
    )


def _same_bytes(layers: Sequence[Sequence[Alternative]]) -> tuple[SameBytes, ...]:
    """Over the measured layers: bytes in all, errors as root mean squares."""

    def mean(errors: Sequence[float | None]) -> float | None:
        found = [error for error in errors if error is not None]
        return sqrt(sum(error**2 for error in found) / len(found)) if len(found) == len(errors) else None

    rows = []
    for same in zip(*layers, strict=True):
        quantisation, svd = mean([one.quantisation for one in same]), mean([one.svd for one in same])
        assert quantisation is not None
        assert svd is not None
        rows.append(
            SameBytes(
                bits=same[0].bits,
                bytes=sum(one.bytes for one in same),
                quantisation=quantisation,
                overlay=mean([one.overlay for one in same]),
                svd=svd,
            )
        )
    return tuple(rows)


def _advice(same: Sequence[SameBytes], stored_share: float) -> str:
    """What pays, by the measured errors: the overlay, quantisation, or neither.

    Only sizes below that of the file count, and only errors that are not much above those of plain 4-bit rounding.
    """
    usable = 1.2 * next(row.quantisation for row in same if row.bits == 4)
    for row in same:
        if (row.bits + 0.5) / 16 >= stored_share:
            continue
        overlay = inf if row.overlay is None else row.overlay
        if min(overlay, row.quantisation) > usable:
            break
        other = "does not even fit its base" if row.overlay is None else f"errs by {100 * overlay:.1f} %"
        if overlay < row.quantisation:
            return (
                f"the overlay: at {row.bits}-bit size its weight error is {100 * overlay:.1f} %, "
                f"and plain quantisation errs by {100 * row.quantisation:.1f} %"
            )
        return (
            f"quantisation: at {row.bits}-bit size its weight error is {100 * row.quantisation:.1f} %, "
            f"and an overlay {other}"
        )
    return "nothing: at fewer bytes than the file's, overlay and quantisation both err by more than 4-bit rounding does"
