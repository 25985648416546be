"""What would an overlay save, and what would it cost? `MoECompressionService` computes, verifies and estimates it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack, cast

from . import views  # noqa: F401  which registers how reports are shown
from .arguments import (
    ExpertCount,
    Layers,
    ModelName,
    byte_size,
    expert_count,
    layer_number,
    layer_numbers,
    model_name,
    path,
    real_number,
    whole_number,
)
from .errors import InvalidRequest
from .overlays import analysis, compression, estimate, exporting
from .overlays.allocation import RankRule
from .overlays.analysis import INPUTS, TOLERANCE
from .overlays.bit_budget import BitRule, OverlayOptions, overlay_rule
from .overlays.fit import REST_BITS, parse_rest_bits
from .progress import Progress, no_progress
from .reports import (
    MoEOverlay,
    MoEOverlayCompression,
    MoEOverlayEstimate,
    MoEOverlayEvaluation,
    MoEOverlayExport,
    MoEOverlayVerification,
)
from .terms import ROLES


class MoECompressionService:
    """Computes, verifies, estimates and writes overlays: `expert ≈ base + left @ right`, or base and delta in few bits.

    `options` choose the ranks or the codes, in the same way in each method (see `RankOptions` and `OverlayOptions`).

    Ranks: `ranks` gives them by role. Otherwise `max_error` (relative Frobenius error of the experts) or `target_ratio`
    (of bytes) spreads rank over projections and layers to where it lowers the error most. Without any of these, each
    rank is the mean rank at `energy` (0.95) of the deltas.

    Codes: `bits` is the budget per weight of the experts, everything counted, and `fit` the size of the whole folder in
    bytes. `as_good_as` takes the fewest bytes that match the error of plain quantisation at that many bits. `coded`
    makes `max_error` and `target_ratio` choose codes, and alone means `as_good_as` 4. `trellis` uses trellis codes;
    encoding these needs numba.

    All methods but `estimate` also take `calibrate`, a text file: the model reads it in MLX, and errors of codes are
    then weighted by the inputs that its experts get. `model`, `layer`, `layers` and `progress` are as in
    MoETypeService. All methods raise a child of MoEError.

    >>> overlay = MoECompressionService.compute("demo:upcycled", bits=2.25)
    >>> overlay.bits_per_weight <= 2.25, overlay.layers[0].codes["gate"].base is not None
    (True, True)
    """

    @staticmethod
    def compute(
        model: ModelName,
        *,
        layer: int | None = None,
        layers: Layers | None = None,
        experts: ExpertCount = None,
        calibrate: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlay:
        """Choose the ranks or codes of an overlay of some layers; returns its error and its size.

        `experts` is the number of experts whose spectra are computed, "all" for all.
        """
        rule, text = _rule(options), _as_path(calibrate)
        return analysis.compute(
            model_name(model),
            layer_number(layer),
            layer_numbers(layers),
            rule,
            expert_count(experts),
            text,
            progress or no_progress,
        )

    @staticmethod
    def verify(
        model: ModelName,
        *,
        layer: int | None = None,
        layers: Layers | None = None,
        experts: ExpertCount = None,
        tolerance: float = TOLERANCE,
        inputs: int = INPUTS,
        seed: int = 0,
        calibrate: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayVerification:
        """Rebuild the experts from base and factors, or from codes, as stored; compare weights and outputs with the
        originals.

        The outputs are those of the whole expert function, on `inputs` seeded Gaussian vectors of the scale that the
        layer's norm gives. Passes if the worst expert's relative output error is within `tolerance`.
        """
        return analysis.verify(
            model_name(model),
            layer_number(layer),
            layer_numbers(layers),
            _rule(options),
            expert_count(experts),
            real_number(tolerance, "the tolerance"),
            whole_number(inputs, "the number of inputs", least=1),
            whole_number(seed, "the seed", least=0),
            _as_path(calibrate),
            progress or no_progress,
        )

    @staticmethod
    def estimate(
        model: ModelName,
        *,
        layers: Layers | None = None,
        samples: int = 3,
        experts: ExpertCount = 8,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayEstimate:
        """Estimate an overlay of the whole model, and compare it with plain quantisation and plain SVDs at the same
        bytes.

        `layers` are measured, or else `samples` evenly spaced ones. The ranks of the other layers are interpolated, and
        marked so; their codes are taken from the nearest measured layer. Ranks are spread over the measured layers.
        """
        return estimate.estimate(
            model_name(model),
            layer_numbers(layers),
            whole_number(samples, "the number of samples", least=1),
            _rule(options),
            expert_count(experts),
            progress or no_progress,
        )

    @staticmethod
    def compress(
        model: ModelName,
        folder: str | Path,
        *,
        layers: Layers = "all",
        experts: ExpertCount = None,
        force: bool = False,
        calibrate: str | Path | None = None,
        format: compression.Format = "auto",
        rest_bits: int | str = REST_BITS,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayCompression:
        """Write the model with its experts as overlays into `folder`, a complete checkpoint.

        With the `format` "auto", a model whose experts share nothing becomes a plain quantised checkpoint ("mlx"), if
        codes are asked for. mlx-lm loads it without this package. Each projection of each layer gets the width with the
        smallest error at this size, and everything else gets `rest_bits`, or stays in bf16 with "keep". This format
        needs MLX and mlx-lm.

        All MoE layers are overlaid unless `layers` selects some. Up to three of them are verified while they are
        written, for the model card. After an interruption, the same call continues where it stopped. `force` replaces
        an existing folder.
        """
        numbers = layer_numbers(layers)
        return compression.compress(
            model_name(model),
            path(folder, "the folder"),
            "all" if numbers is None else numbers,
            _rule(options),
            expert_count(experts),
            force,
            _as_path(calibrate),
            format,
            parse_rest_bits(rest_bits),
            progress or no_progress,
        )

    @staticmethod
    def export(
        overlay: ModelName,
        folder: str | Path,
        *,
        format: exporting.ExportFormat = "standard",
        rest_bits: int | str | None = None,
        force: bool = False,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayExport:
        """Write the overlay checkpoint in `overlay` in another `format` into `folder`.

        "standard" is a bfloat16 checkpoint of the original family. The other formats also take any model instead of an
        overlay, and quantise its experts, by default as well as plain quantisation at 4 bits (see `options`). "mlx" is
        a plain quantised checkpoint for mlx-lm, "compressed-tensors" one for vLLM and transformers; a few layers of
        both are verified. "gguf-recipe" writes a file for `llama-quantize --tensor-type-file`; the report's `commands`
        make the GGUF with it. All else gets `rest_bits`, by default 8, or stays as it is with "keep"; in
        compressed-tensors it always stays.
        """
        return exporting.export(
            model_name(overlay, "the overlay"),
            path(folder, "the folder"),
            format,
            rest_bits,
            force,
            progress or no_progress,
            **_check(options),
        )

    @staticmethod
    def evaluate(
        model: ModelName,
        overlay: ModelName,
        text: str | Path,
        *,
        context: int = 512,
        tokens: int | None = None,
        progress: Progress | None = None,
    ) -> MoEOverlayEvaluation:
        """Run a model and its overlay in MLX on the text in a file: loss, perplexity, speed and memory of both, and the
        KL divergence of the overlay from the original.

        `overlay` may also be the folder of another checkpoint of the same model that mlx-lm loads: exported, quantised,
        trained further. The model must be on this machine, whose memory must hold both. `context` is the length of the
        windows in tokens, `tokens` the most tokens that are read. Raises LibraryMissing if MLX is not installed, and
        InvalidRequest if the two are different models.
        """
        from .overlays.runtime.evaluate import evaluate_overlay

        return evaluate_overlay(
            model_name(model),
            path(overlay, "the overlay"),
            path(text, "the text"),
            whole_number(context, "the context", least=1),
            None if tokens is None else whole_number(tokens, "the number of tokens", least=1),
            progress or no_progress,
        )


def _as_path(text: str | Path | None) -> Path | None:
    return None if text is None else path(text, "the text")


NUMBERS = {
    "energy": "the energy to keep",
    "max_error": "the maximum error",
    "target_ratio": "the ratio",
    "bits": "the bits per weight",
}


def _rule(options: OverlayOptions) -> RankRule | BitRule:
    return overlay_rule(**_check(options))


def _check(options: OverlayOptions) -> OverlayOptions:
    """The options, each checked to be a number of its kind."""
    checked: dict[str, Any] = dict(options)
    for name in options.keys() & NUMBERS.keys():
        if checked[name] is not None or name == "energy":
            checked[name] = real_number(checked[name], NUMBERS[name])
    if checked.get("fit") is not None:
        checked["fit"] = byte_size(checked["fit"], "the size of the folder")
    if checked.get("as_good_as") is not None:
        checked["as_good_as"] = whole_number(checked["as_good_as"], "the width to be as good as")
    if (ranks := checked.get("ranks")) is not None:
        if not isinstance(ranks, Mapping) or not set(ranks) <= set(ROLES):
            raise InvalidRequest("ranks must be a dict of roles", 'give them like {"gate": 4, "up": 4, "down": 8}')
        checked["ranks"] = {role: whole_number(rank, f"the {role} rank") for role, rank in ranks.items()}
    return cast(OverlayOptions, checked)
