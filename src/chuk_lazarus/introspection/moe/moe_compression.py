"""What would an overlay save, and what would it cost? `MoECompressionService` computes, verifies and estimates it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from . import views  # noqa: F401  which registers how reports are shown
from .files import as_path
from .overlays import analysis, compression, estimate, exporting
from .overlays.analysis import INPUTS, TOLERANCE
from .overlays.bit_budget import OverlayOptions, overlay_rule
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


class MoECompressionService:
    """Computes, verifies and estimates overlays: `expert ≈ base + left @ right`, or base and delta in few bits.

    `options` say how ranks are chosen, the same in each method (see `RankOptions`): `ranks` gives them by role; else
    `max_error` (relative Frobenius error of the experts) or `target_ratio` (bytes) spread them over projections and
    layers where they buy the most; else each is the mean rank at `energy` (0.95) of the deltas. Codes are chosen by
    `bits` for each weight of the experts, everything counted, by the bytes of the whole folder, `fit`, or as those of
    the fewest bytes that are `as_good_as` plain quantisation at so many bits; `coded` makes `max_error` and
    `target_ratio` choose codes, and means `as_good_as` 4 alone; with `trellis` these are trellises, which need numba to
    be made (see `OverlayOptions`). All but `estimate` also take `calibrate`, a text file: the model reads it in MLX,
    and errors of codes count as its experts' inputs do. `model`, `layer`, `layers` and `progress` are as in
    MoETypeService. All raise a child of MoEError.

    >>> MoECompressionService.compute("demo:upcycled", target_ratio=2).layers[0].ranks
    {'gate': 23, 'up': 23, 'down': 24}
    """

    @staticmethod
    def compute(
        model: str,
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = None,
        calibrate: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlay:
        """The ranks or codes that an overlay of some layers needs, what it keeps and what it takes.

        `experts` says of how many spectra are taken, None for all.
        """
        rule, text = overlay_rule(**options), _as_path(calibrate)
        return analysis.compute(model, layer, layers, rule, experts, text, progress or no_progress)

    @staticmethod
    def verify(
        model: str,
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = None,
        tolerance: float = TOLERANCE,
        inputs: int = INPUTS,
        seed: int = 0,
        calibrate: str | Path | None = None,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayVerification:
        """Rebuild the experts from base and factors, or codes, as stored, and compare weights and outputs with the
        originals.

        The outputs are those of the whole expert function, on `inputs` seeded Gaussian vectors of the scale that the
        layer's norm gives. Passes when the worst expert's relative output error is within `tolerance`.
        """
        rule, text = overlay_rule(**options), _as_path(calibrate)
        progress = progress or no_progress
        return analysis.verify(model, layer, layers, rule, experts, tolerance, inputs, seed, text, progress)

    @staticmethod
    def estimate(
        model: str,
        *,
        layers: Sequence[int] | str | None = None,
        samples: int = 3,
        experts: int | None = 8,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayEstimate:
        """The whole model as an overlay, and what plain quantisation and plain SVDs do with the same bytes.

        `layers` are measured, or `samples` evenly spaced ones; the others' ranks are interpolated, and labelled so; in
        codes a layer is taken to be as the nearest that was measured. Ranks are spread over the measured layers.
        """
        return estimate.estimate(model, layers, samples, overlay_rule(**options), experts, progress or no_progress)

    @staticmethod
    def compress(
        model: str,
        folder: str | Path,
        *,
        layers: Sequence[int] | str = "all",
        experts: int | None = None,
        force: bool = False,
        calibrate: str | Path | None = None,
        format: compression.Format = "auto",
        rest_bits: int | str = REST_BITS,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayCompression:
        """Write the model with its experts as overlays into `folder`, a complete checkpoint.

        By the `format` "auto", codes for experts that share nothing make it a plain quantised checkpoint, "mlx", that
        mlx-lm itself loads: each projection of each layer has the width that errs least at this size, and all else
        `rest_bits`, or "keep" for bf16. It needs MLX and mlx-lm.

        All MoE layers are overlaid unless `layers` says which; up to three of them are verified while they are written,
        for the model card. The same call goes on where a stopped one was. `force` replaces a folder that is there.
        """
        rule, target, text = overlay_rule(**options), as_path(folder), _as_path(calibrate)
        bits = parse_rest_bits(rest_bits)
        progress = progress or no_progress
        return compression.compress(model, target, layers, rule, experts, force, text, format, bits, progress)

    @staticmethod
    def export(
        overlay: str | Path,
        folder: str | Path,
        *,
        format: exporting.ExportFormat = "standard",
        rest_bits: int | str | None = None,
        force: bool = False,
        progress: Progress | None = None,
        **options: Unpack[OverlayOptions],
    ) -> MoEOverlayExport:
        """Write the overlay checkpoint in `overlay` in another `format` into `folder`.

        "standard" is a bfloat16 checkpoint of the original family. In the others experts have few bits, by default as
        good as plain quantisation at 4 bits (see `options`), and any model is taken in the place of an overlay: "mlx"
        is a plain quantised checkpoint that mlx-lm itself loads, "compressed-tensors" one for vLLM and transformers,
        both with a few layers verified. "gguf-recipe" writes a file for `llama-quantize --tensor-type-file`, and
        `commands` of the report are those that make the GGUF with it. All else has `rest_bits`, 8 where nothing else is
        said, or is kept with "keep", and always in compressed-tensors.
        """
        return exporting.export(overlay, as_path(folder), format, rest_bits, force, progress or no_progress, **options)

    @staticmethod
    def evaluate(
        model: str,
        overlay: str | Path,
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
        windows, `tokens` how many tokens at most. Raises LibraryMissing where MLX is not installed, and InvalidRequest
        where the two are not of the same model.
        """
        from .overlays.runtime.evaluate import evaluate_overlay

        return evaluate_overlay(model, as_path(overlay), as_path(text), context, tokens, progress or no_progress)


def _as_path(text: str | Path | None) -> Path | None:
    return None if text is None else as_path(text)
