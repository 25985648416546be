"""The inputs of a model's experts while it reads a text.

The model runs once, on all windows of the text. Each decoder layer takes a few windows at a time; its weights are read
when it is reached and released when it is done. So memory holds one layer, and one hidden vector per token.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from ...errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from ...jobs.model import evenly_spaced
from ..moments import LayerInputs
from .evaluate import tokenize
from .load import check_files, plain_name

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
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"can't read {text}: {reason}", "give a text file in UTF-8") from None
    _, tokens = tokenize(folder, content)
    if not tokens:
        raise InvalidRequest(f"{text} is empty", "give text like what the model will read in use")
    length = min(CONTEXT, len(tokens))
    windows = np.array(tokens[: len(tokens) // length * length], np.int32).reshape(-1, length)
    return windows[list(evenly_spaced(len(windows), WINDOWS))]


def gather_inputs(
    folder: Path, windows: NDArray[np.int32], layers: Mapping[int, Sizes], keep: Callable[[int, LayerInputs], None]
) -> None:
    """Run mlx-lm's model in `folder` on `windows` [count, length]; `keep` is called with the inputs of each layer's
    experts.

    `layers` have their sizes, by number. Raises ModelUnreadable if mlx-lm can't load or run the model, UnknownFormat if
    a layer has no such gated experts there.
    """
    check_files(folder)
    try:
        with plain_name(folder) as path:
            model, config = load_model(path, lazy=True)
        if mx.default_device() == mx.cpu:  # where gather_mm takes float32 only
            model.set_dtype(mx.float32)
        _watch_layers(model, layers, str(config.get("model_type")), keep)
        model(mx.array(windows))
    except MoEError:
        raise
    except Exception as error:  # mlx-lm may raise anything, as in load_overlay
        reason = " ".join(str(error).split())[:300]
        raise ModelUnreadable(f"mlx-lm can't run it: {reason or type(error).__name__}") from error


class _Watch:
    """Records the inputs of the experts of a block when it is called."""

    def __init__(self, block: SwitchGLU) -> None:
        self.calls: list[tuple[mx.array, mx.array]] = []
        _extend(block, self._note)

    def _note(self, call: Callable[..., mx.array], x: mx.array, indices: mx.array) -> mx.array:
        self.calls.append((x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])))
        return call(x, indices)

    def inputs(self, number: int) -> LayerInputs:
        """All recorded inputs; raises ModelUnreadable if they are not finite."""
        x = [np.array(x.astype(mx.float32)).astype(ml_dtypes.bfloat16) for x, _ in self.calls]
        experts = [np.array(indices.astype(mx.int32)) for _, indices in self.calls]
        if not all(np.isfinite(each.astype(np.float32)).all() for each in x):
            raise ModelUnreadable(f"layer {number}: the inputs of the experts are not finite", "its weights are broken")
        return LayerInputs(np.concatenate(x), np.concatenate(experts))


def _extend(module: Module, call: Callable[..., Any]) -> None:
    """Wrap a module's call in `call`, which gets the original call and the arguments; nothing else changes."""
    kind = type(module)

    class Extended(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return call(super().__call__, *args, **options)

    module.__class__ = Extended


def _watch_layers(
    model: Module, layers: Mapping[int, Sizes], model_type: str, keep: Callable[[int, LayerInputs], None]
) -> None:
    """Run decoder layers batch by batch, and record the inputs of the experts of those in `layers`.

    Layers after the last of these are unchanged: as MLX is lazy, they never run.
    """
    missing = set(layers)
    for path, module in list(model.named_modules()):  # type: ignore[no-untyped-call]
        match = _DECODER_LAYER.fullmatch(path)
        if not match or int(match[1]) > max(layers):
            continue
        number = int(match[1])
        blocks = [each for _, each in module.named_modules() if isinstance(each, SwitchGLU)]
        is_wanted = number in missing and len(blocks) == 1 and _sizes(blocks[0]) == layers[number]
        missing -= {number} if is_wanted else set()
        _stream(module, number, _Watch(blocks[0]) if is_wanted else None, keep)
    if missing:
        raise UnknownFormat(f"mlx-lm's {model_type} has no block of gated experts in layer {min(missing)}")


def _sizes(block: SwitchGLU) -> Sizes:
    gate = block.gate_proj
    return gate.num_experts, gate.input_dims, gate.output_dims


def _stream(layer: Module, number: int, watch: _Watch | None, keep: Callable[[int, LayerInputs], None]) -> None:
    """Run a decoder layer on BATCH windows at a time, and release its weights when all are done."""

    def run(call: Callable[..., Any], x: mx.array, *args: Any, **options: Any) -> Any:
        count, parts = len(x), []
        for start in range(0, count, BATCH):
            stop = start + BATCH

            def take(value: Any, start: int = start, stop: int = stop) -> Any:
                # what has the windows for its first axis, as hidden states have, and masks have not
                has_windows = isinstance(value, mx.array) and value.ndim > 2 and len(value) == count
                return value[start:stop] if has_windows else value

            parts.append(call(x[start:stop], *tree_map(take, args), **tree_map(take, options)))
            mx.eval(parts[-1], watch.calls if watch else [])
        layer.clear()
        mx.clear_cache()
        if watch:
            keep(number, watch.inputs(number))
            watch.calls.clear()
        return tree_map(_join, parts[0], *parts[1:]) if len(parts) > 1 else parts[0]

    _extend(layer, run)


def _join(first: Any, *rest: Any) -> Any:
    return mx.concatenate([first, *rest]) if isinstance(first, mx.array) else first
