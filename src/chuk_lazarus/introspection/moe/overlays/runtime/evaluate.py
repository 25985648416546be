"""How well and how fast models predict a text, and how far an overlay's predictions are from its original's."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_reduce
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from ...errors import InvalidRequest, ModelUnreadable, MoEError, name_model, printable
from ...progress import Counter, Progress, no_progress
from ...reports import Evaluation, MoEOverlayEvaluation, SampleMean, TokensFrom
from ...weights.checkpoint import Checkpoint
from ...weights.experts import Experts
from ...weights.repositories.find import find_repository
from ...weights.repositories.local import Folder
from ..checkpoint.reader import OverlayCheckpoint
from .load import check_files, check_folder, load_overlay, plain_name

BATCH = 8  # windows that a model gets at once
LOGITS = 2**26  # logits that are computed at once, if a window has not more; 256 MiB in float32
TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"})


class Loaded(NamedTuple):
    """A model ready to run; `name` is for messages, `parameter_bytes` what its parameters take as they are stored."""

    name: str
    model: Module
    parameter_bytes: int


class Comparison(NamedTuple):
    """How two models predict the same tokens, the standard error of the difference of their losses, and how far the
    second departs from the first."""

    original: Evaluation
    other: Evaluation
    loss_difference_stderr: float | None
    kl: SampleMean


def evaluate(model: Module, tokens: Any, context: int, *, batch: int = BATCH) -> Evaluation:
    """Predict each of `tokens` but the first, once, in windows of `context` tokens that do not overlap.

    `tokens` [n] is a list or an array of integers. `model` is any of mlx-lm's, overlaid or not: tokens [batch, length]
    -> logits [batch, length, vocabulary]; it gets `batch` windows at once. Raises InvalidRequest for fewer than two
    tokens, ModelUnreadable where the loss is not finite.
    """
    seconds, losses = 0.0, list[NDArray[np.float64]]()
    for inputs, targets in _batches(tokens, context, batch):
        logits, taken = _predict(model, inputs)
        seconds += taken
        losses.append(_score([logits], targets)[0])
    return _summarise(np.concatenate(losses), context, seconds, _parameter_bytes(model))


def compare(
    original: Loaded,
    other: Loaded,
    tokens: Any,
    context: int,
    *,
    batch: int = BATCH,
    progress: Progress = no_progress,
    size: int = 0,
) -> Comparison:
    """Predict the same tokens with two models, in turns; shapes and errors as in `evaluate`.

    The divergence is KL(original || other) of each token's distribution, from logits in float32. `progress` is called
    with how much of `size` is done. Raises InvalidRequest where the vocabularies differ in size.
    """
    pair, scores, seconds = (original, other), list[NDArray[np.float64]](), [0.0, 0.0]
    counter = Counter(progress, "predicting the text", size, size / max(1, len(tokens) - 1))
    for inputs, targets in _batches(tokens, context, batch):
        logits = []
        for place, (name, model, _) in enumerate(pair):
            with _running(name):
                predicted, taken = _predict(model, inputs)
            logits.append(predicted)
            seconds[place] += taken
        if logits[0].shape != logits[1].shape:
            sizes = " and ".join(str(each.shape[-1]) for each in logits)
            raise InvalidRequest(f"{original.name} and {other.name} have different vocabularies: {sizes} tokens")
        scores.append(_score(logits, targets))
        counter.add(targets.size)
    *losses, divergence = np.concatenate(scores, axis=1)
    results = []
    for (name, _, stored), loss, taken in zip(pair, losses, seconds, strict=True):
        with name_model(name):
            results.append(_summarise(loss, context, taken, stored))
    if not np.isfinite(divergence).all():
        raise ModelUnreadable(
            f"the KL is infinite: {other.name} gives a token probability 0 where {original.name} does not"
        )
    difference = _standard_error(losses[1] - losses[0], context)
    kl = SampleMean(mean=float(divergence.mean()), stderr=_standard_error(divergence, context))
    return Comparison(results[0], results[1], difference, kl)


def evaluate_overlay(
    model: str, overlay: Path, text: Path, context: int, limit: int | None, progress: Progress = no_progress
) -> MoEOverlayEvaluation:
    """Evaluate a model, and its overlay or another checkpoint of the same model, on the text in the file `text`.

    Both must be on this machine. `context` is the length of the windows, `limit` the most tokens. Memory must hold both
    models: on a CPU they run in float32, which MLX's expert products need there; `parameter_bytes` is nevertheless that
    of the stored numbers. Raises InvalidRequest if the file can't be read, the overlay is another model's, or the two
    have different model types, vocabularies or tokens; ModelUnreadable if mlx-lm can't load or run one of them.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"can't read {text}: {reason}", "give a text file in UTF-8") from None
    repository = find_repository(model)
    if not isinstance(repository, Folder):
        raise InvalidRequest(f"{model} is not on this machine", f"run: hf download {model}, and give its folder")
    folders = (repository.path, overlay)
    _check_pair(*folders)
    tokens_from, tokens = tokenize(folders[0], content)
    if _has_tokenizer(folders[1]) and tokenize(folders[1], content)[1] != tokens:
        raise InvalidRequest(
            f"{folders[1]} and {folders[0]} tokenise {text} differently", "compare models with the same tokenizer"
        )
    taken = tokens[:limit]
    original, other = (_load(folder) for folder in folders)
    batch = _fit_batch(original, taken, context)
    size = len(content.encode()) * len(taken) // max(1, len(tokens))
    found = compare(original, other, taken, context, batch=batch, progress=progress, size=size)
    results = [
        result.model_copy(update={"bits_per_weight": _bits_per_weight(Checkpoint(Folder(folder)))})
        for result, folder in zip(found[:2], folders, strict=True)
    ]
    difference = results[1].loss - results[0].loss
    return MoEOverlayEvaluation(
        model=printable(model),
        overlay=printable(str(overlay)),
        is_overlay=_is_overlay(Checkpoint(Folder(folders[1]))),
        text=printable(str(text)),
        tokens_from=tokens_from,
        original_result=results[0],
        overlay_result=results[1],
        loss_difference=difference,
        loss_difference_stderr=found.loss_difference_stderr,
        perplexity_ratio=math.exp(min(700.0, difference)),
        kl=found.kl,
    )


@contextmanager
def _running(name: str) -> Iterator[None]:
    """Turn anything that mlx-lm raises inside into a ModelUnreadable of the model with this name."""
    with name_model(name):
        try:
            yield
        except MoEError:
            raise
        except Exception as error:  # mlx-lm may raise anything, as in load_overlay
            reason = " ".join(str(error).split())[:300]
            raise ModelUnreadable(f"mlx-lm can't run it: {reason or type(error).__name__}") from error


def _load(folder: Path) -> Loaded:
    """The model in a folder: an overlay, or anything that mlx-lm loads."""
    with _running(str(folder)):
        is_overlay = _is_overlay(Checkpoint(Folder(folder)))
        with plain_name(folder) as path:
            model, _ = load_overlay(folder) if is_overlay else load_model(path)
        stored = _parameter_bytes(model)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)
            mx.eval(model.parameters())
        return Loaded(str(folder), model, stored)


def _fit_batch(loaded: Loaded, tokens: Sequence[int], context: int) -> int:
    """How many windows the model gets at once, so that their logits are not too large.

    Raises ModelUnreadable for tokens that are not in its vocabulary, which MLX does not notice.
    """
    with _running(loaded.name):
        vocabulary: int = loaded.model(mx.array([[0]])).shape[-1]
        if tokens and max(tokens) >= vocabulary:
            raise ModelUnreadable(f"its tokenizer gives token {max(tokens)}, but its vocabulary has {vocabulary}")
    return max(1, min(BATCH, LOGITS // (context * vocabulary)))


def _batches(tokens: Any, context: int, batch: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Windows of `context` tokens, `batch` at once, and the tokens that follow: twice [windows, length]."""
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
    for start, rows, length in batches:
        stop = start + rows * length
        yield ids[start:stop].reshape(rows, length), ids[start + 1 : stop + 1].reshape(rows, length)


def _predict(model: Module, inputs: mx.array) -> tuple[mx.array, float]:
    """The logits [windows, length, vocabulary], and the seconds that they took."""
    started = time.perf_counter()
    logits: mx.array = model(inputs)
    mx.eval(logits)
    return logits, time.perf_counter() - started


def _score(logits: Sequence[mx.array], targets: mx.array) -> NDArray[np.float64]:
    """By token, the loss of each model; of two models also how far the second departs from the first: KL(first ||
    second). Logits [windows, length, vocabulary] and targets [windows, length] -> [1 or 3, windows * length]."""
    vocabulary = logits[0].shape[-1]
    wanted, rows = targets.reshape(-1, 1), [each.reshape(-1, vocabulary) for each in logits]
    step, found = max(1, LOGITS // vocabulary), list[NDArray[np.float64]]()
    for start in range(0, targets.size, step):
        logs = [_log_softmax(each[start : start + step]) for each in rows]
        scores = [-mx.take_along_axis(each, wanted[start : start + step], axis=-1).squeeze(-1) for each in logs]
        if len(logs) == 2:
            scores.append(_divergence(*logs))
        found.append(np.array(mx.stack(scores)).astype(np.float64))
    return np.concatenate(found, axis=1)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) of distributions [tokens, vocabulary], given as logarithms, in nats: [tokens]."""
    # a token that p rules out counts nothing, whatever q says of it; its logarithm may be -inf
    terms: mx.array = mx.where(mx.exp(p) > 0, mx.exp(p) * (p - q), 0.0)
    return terms.sum(axis=-1)


def _standard_error(values: NDArray[np.float64], context: int) -> float | None:
    """The standard error of the mean of `values` [tokens], with the windows of `context` tokens as a random sample.

    Tokens of one window depend on each other, so windows are the sampling units: m/(m-1) Σ (s - μ n)² / N², for m
    windows with the sum s of n values (Cochran, Sampling Techniques, 1977, chapter 9A). With a single window, its
    tokens are the units; None for one token.
    """
    length = context if values.size > context else 1
    starts = np.arange(0, values.size, length)
    if len(starts) < 2:
        return None
    lengths = np.diff(starts, append=values.size)
    deviations = np.add.reduceat(values, starts) - values.mean() * lengths
    return float(np.sqrt(len(starts) / (len(starts) - 1) * np.square(deviations).sum()) / values.size)


def _summarise(losses: NDArray[np.float64], context: int, seconds: float, parameter_bytes: int) -> Evaluation:
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise ModelUnreadable(f"its loss on this text is {loss}", "its weights are broken, or too large to run")
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(700.0, loss)),
        tokens=losses.size,
        context=context,
        seconds=seconds,
        tokens_per_second=losses.size / seconds,
        parameter_bytes=parameter_bytes,
    )


def _is_overlay(checkpoint: Checkpoint) -> bool:
    return "overlay_config" in checkpoint.config


def _open(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files are sound."""
    with name_model(str(folder)):
        if not folder.is_dir():
            raise ModelUnreadable("there is no such folder", "give the folder of a checkpoint")
        check_files(folder)
        return Checkpoint(Folder(folder))


def _check_pair(original: Path, other: Path) -> None:
    """Raise InvalidRequest if two folders can't be of the same model.

    An overlay's smallest tensors must be equal to the original's, if both have them. Of other checkpoints, only model
    type and vocabulary can be checked.
    """
    first, second = _open(original), _open(other)
    if _is_overlay(second):
        check_folder(other)
        if not _is_overlay(first):
            _check_tensors(original, first, other, second)
    for key in ("model_type", "vocab_size"):
        values = [checkpoint.model_config.language_model().values.get(key) for checkpoint in (first, second)]
        if values[0] != values[1]:
            found, wanted = (printable(str(value)) for value in reversed(values))
            raise InvalidRequest(f"{other} is not the same model as {original}: its {key} is {found}, not {wanted}")


def _check_tensors(original: Path, plain: Checkpoint, overlay: Path, overlaid: Checkpoint) -> None:
    """Raise InvalidRequest for an overlay of another model: the smallest tensors that both have must be equal."""
    common = set(plain.names) & set(overlaid.names)
    smallest = sorted((overlaid.info(name) for name in common), key=lambda info: (info.nbytes, info.name))[:8]
    for copy in smallest:
        source = plain.info(copy.name)
        is_alike = (source.dtype, source.shape) == (copy.dtype, copy.shape)
        if not is_alike or [*plain.chunks(copy.name, 2**20)] != [*overlaid.chunks(copy.name, 2**20)]:
            raise InvalidRequest(f"{overlay} is not an overlay of {original}: {copy.name} differs")
    if not smallest:
        raise InvalidRequest(f"{overlay} is not an overlay of {original}: they have no tensor in common")


def _bits_per_weight(checkpoint: Checkpoint) -> float | None:
    """What is stored of the routed experts, scales and bases included, in bits for each of their weights.

    Of an overlay, these are the overlaid ones. None where they can't be told from other tensors.
    """
    try:
        if _is_overlay(checkpoint):
            overlay = OverlayCheckpoint(checkpoint)
            stored = checkpoint.count_bytes(overlay.names)
            roles = [(layer, role) for layer in overlay.layers for role in overlay.roles(layer)]
            weights = sum(overlay.count(layer) * math.prod(overlay.shape(layer, role)) for layer, role in roles)
        else:
            experts = Experts(checkpoint)
            layers = [experts.layer(number) for number in experts.layers]
            stored, weights = (sum(layer.stored_bytes for layer in layers), sum(layer.parameters for layer in layers))
    except MoEError:
        return None
    return 8 * stored / weights


def _parameter_bytes(model: Module) -> int:
    return int(tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0))  # type: ignore[no-untyped-call]


def _has_tokenizer(folder: Path) -> bool:
    return not TOKENIZER_FILES.isdisjoint(path.name for path in folder.iterdir())


def tokenize(folder: Path, text: str) -> tuple[TokensFrom, list[int]]:
    """What turns the text into tokens, the model's tokenizer or bytes, and the tokens."""
    if _has_tokenizer(folder):
        from mlx_lm.utils import load_tokenizer

        try:
            with plain_name(folder) as path:
                tokenizer = load_tokenizer(path, {"trust_remote_code": False})  # type: ignore[no-untyped-call]
            return "tokenizer", list(tokenizer.encode(text))
        except Exception as error:  # transformers may raise anything for files that it does not expect
            reason = " ".join(str(error).split())
            raise ModelUnreadable(f"the tokenizer in {folder} can't be used: {reason}") from None
    vocabulary = Checkpoint(Folder(folder)).config.get("vocab_size")
    if vocabulary != 256:
        raise ModelUnreadable(f"{folder} has no tokenizer", "put the model's tokenizer files beside its weights")
    return "bytes", list(text.encode())
