"""How well and how fast a model predicts a text, as it was and as an overlay."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.losses import cross_entropy
from mlx.utils import tree_reduce
from mlx_lm.utils import load_model

from ...errors import InvalidRequest, ModelUnreadable, MoEError, name_model, printable
from ...reports import Evaluation, MoEOverlayEvaluation, TokensFrom
from ...weights.checkpoint import Checkpoint
from ...weights.repositories.find import find_repository
from ...weights.repositories.local import Folder
from .load import check_files, check_folder, load_overlay


def evaluate(model: Module, tokens: Any, context: int, *, batch: int = 8) -> Evaluation:
    """Predict each of `tokens` but the first, once, in windows of `context` tokens that do not overlap.

    `tokens` [n] is a list or an array of integers. `model` is any of mlx-lm's, overlaid or not: tokens [batch, length]
    -> logits [batch, length, vocabulary]; it gets `batch` windows at once. Raises InvalidRequest for fewer than two
    tokens, ModelUnreadable where the loss is not finite.
    """
    ids = mx.array(tokens)
    if ids.ndim != 1 or ids.size < 2 or not mx.issubdtype(ids.dtype, mx.integer):
        raise InvalidRequest("there is nothing to predict", "give at least two tokens, as whole numbers in one row")
    if context < 1 or batch < 1:
        raise InvalidRequest("context and batch must be at least 1")
    count = ids.size - 1
    whole = count // context
    batches = [(row * context, min(batch, whole - row), context) for row in range(0, whole, batch)]
    if count % context:
        batches.append((whole * context, 1, count % context))
    total, started = 0.0, time.perf_counter()
    for start, rows, length in batches:
        stop = start + rows * length
        logits = model(ids[start:stop].reshape(rows, length)).astype(mx.float32)
        targets = ids[start + 1 : stop + 1].reshape(rows, length)
        total += float(cross_entropy(logits, targets, reduction="sum"))
    seconds = time.perf_counter() - started
    loss = total / count
    if not math.isfinite(loss):
        raise ModelUnreadable(f"its loss on this text is {loss}", "its weights are broken, or too large to be run")
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(700.0, loss)),
        tokens=count,
        context=context,
        seconds=seconds,
        tokens_per_second=count / seconds,
        parameter_bytes=_parameter_bytes(model),
    )


def evaluate_overlay(model: str, overlay: str, text: str, context: int, limit: int | None) -> MoEOverlayEvaluation:
    """Evaluate a model and its overlay on the text in the file `text`; both models must be on this machine.

    `context` is the length of the windows, `limit` the number of tokens at most. Raises InvalidRequest where the file
    can't be read, or the overlay is another model's; see `evaluate_pair`.
    """
    try:
        content = Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"can't read {text}: {error}", "give a text file in UTF-8") from None
    repository = find_repository(model)
    if not isinstance(repository, Folder):
        raise InvalidRequest(f"{model} is not on this machine", f"run: hf download {model}, and give its folder")
    overlay_folder = Path(overlay).expanduser()
    tokens_from, original, overlaid = evaluate_pair(repository.path, overlay_folder, content, context, limit)
    difference = overlaid.loss - original.loss
    return MoEOverlayEvaluation(
        model=printable(model),
        overlay=printable(overlay),
        text=printable(text),
        tokens_from=tokens_from,
        original_result=original,
        overlay_result=overlaid,
        loss_difference=difference,
        perplexity_ratio=math.exp(min(700.0, difference)),
    )


def evaluate_pair(
    original: Path, overlay: Path, text: str, context: int, limit: int | None
) -> tuple[TokensFrom, Evaluation, Evaluation]:
    """Predict the same text with a model and with its overlay, one after the other.

    Returns what turned the text into tokens ("tokenizer", or "bytes" for a model of 256 tokens without one) and both
    evaluations, which take the first `limit` tokens. On a CPU both run in float32, which MLX's expert products need
    there; `parameter_bytes` is nevertheless that of the stored numbers. Raises ModelUnreadable where mlx-lm can't load
    or run a model.
    """
    _check_pair(original, overlay)
    tokens_from, tokens = _tokenize(original, text, limit)

    def run(folder: Path, load: Callable[[Path], tuple[Module, Any]]) -> Evaluation:
        with name_model(str(folder)):
            try:
                model, _ = load(folder)
                size = _parameter_bytes(model)
                if mx.default_device() == mx.cpu:
                    model.set_dtype(mx.float32)
                return evaluate(model, tokens, context).model_copy(update={"parameter_bytes": size})
            except MoEError:
                raise
            except Exception as error:  # mlx-lm may raise anything, as in load_overlay
                reason = " ".join(str(error).split())[:300]
                raise ModelUnreadable(f"mlx-lm can't run it: {reason or type(error).__name__}") from error

    plain = run(original, load_model)
    mx.clear_cache()
    return tokens_from, plain, run(overlay, load_overlay)


def _check_pair(original: Path, overlay: Path) -> None:
    """Raise InvalidRequest for an overlay of another model: the smallest tensors that both have must be equal."""
    check_files(original)
    check_folder(overlay)
    plain, overlaid = (Checkpoint(Folder(folder)) for folder in (original, overlay))
    common = set(plain.names) & set(overlaid.names)
    smallest = sorted((overlaid.info(name) for name in common), key=lambda info: (info.nbytes, info.name))[:8]
    for copy in smallest:
        source = plain.info(copy.name)
        is_alike = (source.dtype, source.shape) == (copy.dtype, copy.shape)
        if not is_alike or [*plain.chunks(copy.name, 2**20)] != [*overlaid.chunks(copy.name, 2**20)]:
            raise InvalidRequest(f"{overlay} is no overlay of {original}: {copy.name} differs")
    if not smallest:
        raise InvalidRequest(f"{overlay} is no overlay of {original}: they have no tensor in common")


def _parameter_bytes(model: Module) -> int:
    return int(tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0))  # type: ignore[no-untyped-call]


def _tokenize(folder: Path, text: str, limit: int | None) -> tuple[TokensFrom, list[int]]:
    """What turns the text into tokens, the model's tokenizer or bytes, and the first `limit` tokens."""
    names = {path.name for path in folder.iterdir()}
    if names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}:
        from mlx_lm.utils import load_tokenizer

        try:
            tokenizer = load_tokenizer(folder, {"trust_remote_code": False})  # type: ignore[no-untyped-call]
            return "tokenizer", list(tokenizer.encode(text))[:limit]
        except Exception as error:  # transformers may raise anything for files that it does not expect
            reason = " ".join(str(error).split())
            raise ModelUnreadable(f"the tokenizer in {folder} can't be used: {reason}") from None
    vocabulary = Checkpoint(Folder(folder)).config.get("vocab_size")
    if vocabulary != 256:
        raise ModelUnreadable(f"{folder} has no tokenizer", "put the model's tokenizer files beside its weights")
    return "bytes", list(text.encode())[:limit]
