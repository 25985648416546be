"""What enters the experts' projections while a model reads a text: the second moments of each expert's inputs.

The model runs once, on all windows of the text side by side. Each decoder layer takes them a few at a time, and its
weights are read when it is reached and let go when it is done: memory holds one layer, and one hidden vector for each
token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from ...errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from ...jobs.model import evenly_spaced
from ..moments import LayerMoments, mean_squares
from .evaluate import _tokenize
from .load import check_files

CONTEXT, WINDOWS = 512, 32  # tokens of a window, and how many windows of a text are taken
BATCH = 4  # windows that a layer takes at a time
_DECODER_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)")


Sizes = tuple[int, int, int]
"""Experts, hidden size and intermediate size of a layer."""


def read_windows(folder: Path, text: Path) -> NDArray[np.int32]:
    """Tokens [windows, length] of the text in a file, as the model in the folder reads it.

    At most WINDOWS windows of CONTEXT tokens, evenly spaced; of a shorter text one. Raises InvalidRequest for a file
    that can't be read or is empty.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"can't read {text}: {error}", "give a text file in UTF-8") from None
    _, tokens = _tokenize(folder, content, None)
    if not tokens:
        raise InvalidRequest(f"{text} is empty", "give a text like those that the model will read")
    length = min(CONTEXT, len(tokens))
    windows = np.array(tokens[: len(tokens) // length * length], np.int32).reshape(-1, length)
    return windows[list(evenly_spaced(len(windows), WINDOWS))]


class _Sums:
    """Sums of squares [experts, n] of what enters the experts' linear layers, and the numbers of tokens [experts].

    They are formed by a product, since sums in no certain order would give other codes when a stopped run goes on.
    """

    def __init__(self, linear: Module) -> None:
        self.squares = mx.zeros((linear.num_experts, linear.input_dims))
        self.counts = mx.zeros((linear.num_experts,))
        _extend(linear, self._record)

    def _record(self, call: Callable[..., mx.array], x: mx.array, indices: mx.array, *args: Any, **options: Any) -> Any:
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        experts = mx.arange(len(self.counts))[:, None]
        is_theirs = (indices.reshape(1, -1) == experts).astype(mx.float32)
        self.squares = self.squares + is_theirs @ mx.square(rows.astype(mx.float32))
        self.counts = self.counts + is_theirs.sum(axis=1)
        return call(x, indices, *args, **options)

    def mean_squares(self, what: str) -> NDArray[np.float32]:
        """See `moments.mean_squares`; raises ModelUnreadable where a sum is not finite."""
        squares = np.array(self.squares)
        if not np.isfinite(squares).all():
            raise ModelUnreadable(f"{what}: what enters the experts is not finite", "its weights are broken")
        return mean_squares(squares, np.array(self.counts))


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The sums of one layer: of the inputs of gate and up, and of those of down."""

    inputs: _Sums
    neurons: _Sums


def _extend(module: Module, call: Callable[..., Any]) -> None:
    """Let a module call `call` with its own call and the arguments; all else of it stays."""
    kind = type(module)

    class Extended(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return call(super().__call__, *args, **options)

    module.__class__ = Extended


def gather_moments(
    folder: Path, windows: NDArray[np.int32], layers: Mapping[int, Sizes], done: Callable[[int], None]
) -> dict[int, LayerMoments]:
    """The moments of the experts in `layers` while mlx-lm's model in `folder` reads `windows` [count, length].

    `layers` have their sizes, by number, and `done` is told the number of each decoder layer that is done. Raises ModelUnreadable where mlx-lm can't load or run
    the model, UnknownFormat where a layer has no gated experts there.
    """
    check_files(folder)
    try:
        model, config = load_model(folder, lazy=True)
        if mx.default_device() == mx.cpu:  # where gather_mm takes float32 only
            model.set_dtype(mx.float32)
        recorded = _record_layers(model, layers, str(config.get("model_type")), done)
        model(mx.array(windows))
    except MoEError:
        raise
    except Exception as error:  # mlx-lm may raise anything, as in load_overlay
        reason = " ".join(str(error).split())[:300]
        raise ModelUnreadable(f"mlx-lm can't run it: {reason or type(error).__name__}") from error
    return {
        number: LayerMoments(
            sums.inputs.mean_squares(f"layer {number}"), sums.neurons.mean_squares(f"layer {number}, in the experts")
        )
        for number, sums in recorded.items()
    }


def _record_layers(
    model: Module, layers: Mapping[int, Sizes], model_type: str, done: Callable[[int], None]
) -> Mapping[int, _Recorded]:
    """Let decoder layers run batch by batch, and those in `layers` record what enters their experts.

    Those after the last of these are left as they are: as MLX is lazy, they never run.
    """
    modules = dict(model.named_modules())  # type: ignore[no-untyped-call]
    recorded: dict[int, _Recorded] = {}
    for path, module in modules.items():
        match = _DECODER_LAYER.fullmatch(path)
        if not match or int(match[1]) > max(layers):
            continue
        number = int(match[1])
        blocks = [each for _, each in module.named_modules() if isinstance(each, SwitchGLU)]
        if number in layers and len(blocks) == 1 and _sizes(blocks[0]) == layers[number]:
            recorded[number] = _Recorded(_Sums(blocks[0].gate_proj), _Sums(blocks[0].down_proj))
        _stream(module, number, recorded.get(number), done)
    if missing := sorted(set(layers) - set(recorded)):
        raise UnknownFormat(f"mlx-lm's {model_type} has no block of such experts in layer {missing[0]}")
    return recorded


def _sizes(block: SwitchGLU) -> Sizes:
    gate = block.gate_proj
    return gate.num_experts, gate.input_dims, gate.output_dims


def _stream(layer: Module, number: int, recorded: _Recorded | None, done: Callable[[int], None]) -> None:
    """Let a decoder layer take BATCH windows at a time, and let its weights go when all are done."""

    def run(call: Callable[..., Any], x: mx.array, *args: Any, **options: Any) -> Any:
        count, parts = len(x), []
        for start in range(0, count, BATCH):
            stop = start + BATCH

            def take(value: Any, start: int = start, stop: int = stop) -> Any:
                # what has the windows for its first axis, as hidden states have, and masks have not
                has_windows = isinstance(value, mx.array) and value.ndim > 2 and len(value) == count
                return value[start:stop] if has_windows else value

            parts.append(call(x[start:stop], *tree_map(take, args), **tree_map(take, options)))
            mx.eval(parts[-1])
            if recorded:
                mx.eval(recorded.inputs.squares, recorded.inputs.counts)
                mx.eval(recorded.neurons.squares, recorded.neurons.counts)
        layer.clear()
        mx.clear_cache()
        done(number)
        return tree_map(_join, parts[0], *parts[1:]) if len(parts) > 1 else parts[0]

    _extend(layer, run)


def _join(first: Any, *rest: Any) -> Any:
    return mx.concatenate([first, *rest]) if isinstance(first, mx.array) else first
