"""The overlay at work, in MLX: experts that stay base and factors, in mlx-lm's models or in a block to train.

An overlaid projection computes `W x = base x + left (right x)`. No expert's matrix is ever put together: the base
product is computed once for a token and serves all the experts that it is routed to.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.losses import cross_entropy
from mlx.utils import tree_reduce, tree_unflatten
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU
from mlx_lm.utils import _get_classes, load_model

from .errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat, name_model
from .reports import Evaluation, TokensFrom
from .weights.checkpoint import Checkpoint
from .weights.repositories.local import Folder

VERSION = 1
ROLES = ("gate", "up", "down")
SORT_FROM = 64  # rows from which on sorting them by expert pays; mlx-lm's own number

Ranks = Mapping[str, int]
"""Role -> rank."""

_OVERLAY = re.compile(r"(?P<prefix>.*\.(?P<layer>\d+))\.overlay\.(?P<role>gate|up|down)\.(?P<part>base|left|right)")
_LAYER = re.compile(r"(?P<root>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<rest>\..*)")
_ROUTED = re.compile(r"\.experts\.\d+\.|\.experts\.(?:gate_up_proj|down_proj)")


class OverlayLinear(Module):
    """A linear layer per expert, as base and low-rank factors: in place of mlx-lm's SwitchLinear.

    Parameters: `base` [out, in], `left` [experts, out, rank], `right` [experts, rank, in] and, if asked for, `bias`
    [experts, out]. A new layer's `right` is zero, so that all its experts equal the base; the columns of `left` are
    random, of about unit length. The rank may be 0.
    """

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, rank: int, bias: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        scale = math.sqrt(1 / input_dims)
        self.base = mx.random.uniform(-scale, scale, (output_dims, input_dims))
        self.left = mx.random.normal((num_experts, output_dims, rank), scale=math.sqrt(1 / output_dims))
        self.right = mx.zeros((num_experts, rank, input_dims))
        if bias:
            self.bias = mx.zeros((num_experts, output_dims))

    @property
    def input_dims(self) -> int:
        return self.base.shape[1]

    @property
    def output_dims(self) -> int:
        return self.base.shape[0]

    @property
    def num_experts(self) -> int:
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    def shared(self, x: mx.array) -> mx.array:
        """What all experts have in common: [..., in] -> [..., out]."""
        return (x @ self.base.T).astype(x.dtype)

    def own(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """What each expert adds, its bias included; shapes as in a call."""
        y = x
        if self.rank:
            plain = mx.default_device() == mx.cpu  # where gather_mm knows only float32
            for factor in (self.right, self.left):
                y, factor = (y.astype(mx.float32), factor.astype(mx.float32)) if plain else (y, factor)
                y = mx.gather_mm(y, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
        else:  # the gradient of a product over nothing crashes MLX 0.32
            leading = mx.broadcast_shapes(x.shape[:-2], indices.shape)
            y = mx.zeros((*leading, x.shape[-2], self.output_dims), x.dtype)
        if "bias" in self:
            y = y + mx.expand_dims(self.bias[indices], -2)
        return y.astype(x.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Apply expert `indices[...]` to `x[...]`: as SwitchLinear does.

        `x` is [..., rows, in], `indices` [...], and the axes before the last two broadcast: [batch, length, 1, 1, in]
        with [batch, length, top_k] gives [batch, length, top_k, 1, out]. `sorted_indices` promises that the indices,
        on one axis, ascend. The result has the dtype of `x`.
        """
        return self.shared(x) + self.own(x, indices, sorted_indices)


class OverlayGLU(Module):
    """The gated experts of one layer, overlaid: in place of mlx-lm's SwitchGLU.

    `ranks` are by role, or one for all three. Many rows are sorted by expert, as SwitchGLU does; the base products of
    gate and up are computed before that, once for a token.
    """

    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_experts: int,
        ranks: Ranks | int,
        activation: Callable[[mx.array, mx.array], mx.array] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        by_role = dict.fromkeys(ROLES, ranks) if isinstance(ranks, int) else ranks
        self.gate_proj = OverlayLinear(input_dims, hidden_dims, num_experts, by_role["gate"], bias)
        self.up_proj = OverlayLinear(input_dims, hidden_dims, num_experts, by_role["up"], bias)
        self.down_proj = OverlayLinear(hidden_dims, input_dims, num_experts, by_role["down"], bias)
        # not `activation or`: a module without parameters is falsy
        self.activation = SwiGLU() if activation is None else activation  # type: ignore[no-untyped-call]

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply each token's experts: [..., hidden] and [..., top_k] -> [..., top_k, hidden]."""
        indices = mx.stop_gradient(indices)
        if indices.size < SORT_FROM:
            x = mx.expand_dims(x, (-2, -3))
            hidden = self.activation(self.up_proj(x, indices), self.gate_proj(x, indices))
            return self.down_proj(hidden, indices).squeeze(-2)
        experts = indices.flatten()
        order = mx.argsort(experts)
        experts, tokens = experts[order], order // indices.shape[-1]
        x = x.reshape(-1, 1, x.shape[-1])
        rows = x[tokens]
        up, gate = (
            linear.shared(x)[tokens] + linear.own(rows, experts, True) for linear in (self.up_proj, self.gate_proj)
        )
        y = self.down_proj(self.activation(up, gate), experts, sorted_indices=True)
        return mx.unflatten(y[mx.argsort(order)], 0, indices.shape).squeeze(-2)


class OverlayMoE(Module):
    """A mixture-of-experts block that is an overlay from the start, to be trained.

    A router, the softmax over the logits of each token's `top_k` experts, and SwiGLU experts that share a base; each
    has factors of its own in gate, up and down. With `freeze_base` only router and factors train.
    """

    def __init__(
        self, hidden: int, intermediate: int, experts: int, top_k: int, rank: int, *, freeze_base: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not 1 <= top_k <= experts:
            raise ValueError(f"top {top_k} of {experts} experts")
        self.top_k = top_k
        self.router = Linear(hidden, experts, bias=False)
        self.experts = OverlayGLU(hidden, intermediate, experts, rank)
        if freeze_base:
            self.freeze(keys="base")

    @classmethod
    def from_dense(
        cls,
        gate: mx.array,
        up: mx.array,
        down: mx.array,
        experts: int,
        top_k: int,
        rank: int,
        *,
        freeze_base: bool = False,
    ) -> "OverlayMoE":
        """The block that starts as a dense feed-forward: `gate` and `up` [intermediate, hidden], `down` [hidden,
        intermediate].

        The base is a copy of the dense matrices, and as every `right` is zero, so is every expert.
        """
        block = cls(gate.shape[1], gate.shape[0], experts, top_k, rank, freeze_base=freeze_base)
        block.set_dtype(gate.dtype)
        for role, matrix in zip(ROLES, (gate, up, down), strict=True):
            linear = block.experts[f"{role}_proj"]
            if matrix.shape != linear.base.shape:
                raise ValueError(f"{role} is {list(matrix.shape)}, and gate and up call for {list(linear.base.shape)}")
            linear.base = mx.array(matrix)
        return block

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token and their weights: [..., hidden] -> twice [..., top_k]."""
        logits = self.router(x)
        indices = mx.stop_gradient(mx.argpartition(-logits, kth=self.top_k - 1, axis=-1)[..., : self.top_k])
        return indices, mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True)

    def __call__(self, x: mx.array) -> mx.array:
        """Shape in and out: [..., hidden]."""
        indices, weights = self.route(x)
        return (self.experts(x, indices) * weights[..., None]).sum(axis=-2)


def evaluate(model: Module, tokens: Any, context: int, *, batch: int = 8) -> Evaluation:
    """Predict each of `tokens` but the first, once, in windows of `context` tokens that do not overlap.

    `tokens` [count] is a list or an array of whole numbers. `model` is any of mlx-lm's, overlaid or not: tokens [batch,
    length] -> logits [batch, length, vocabulary]; `batch` is how many windows go through it at once. Raises
    ModelUnreadable where the loss is not finite.
    """
    ids = mx.array(tokens)
    if ids.ndim != 1 or ids.size < 2 or not mx.issubdtype(ids.dtype, mx.integer):
        raise InvalidRequest("there is nothing to predict", "give at least two tokens, as whole numbers in one row")
    if context < 1 or batch < 1:
        raise InvalidRequest("context and batch must be at least 1")
    count = ids.size - 1
    whole = count // context
    spans = [(row * context, min(batch, whole - row), context) for row in range(0, whole, batch)]
    if count % context:
        spans.append((whole * context, 1, count % context))
    total, started = 0.0, time.perf_counter()
    for start, rows, length in spans:
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


def load_overlay(folder: str | Path) -> tuple[Module, dict[str, Any]]:
    """The mlx-lm model of an overlay checkpoint, its experts left as base and factors, and its config.

    The model is of a class derived from mlx-lm's own, so that all that takes such a model takes this one. Every
    parameter must be in the folder, and every tensor there must find its place, but for what mlx-lm itself drops.
    Raises ModelUnreadable for a folder that is no overlay or is broken, UnknownFormat for a family that mlx-lm has
    no class for, or no experts of the kind that we replace.
    """
    folder = Path(folder)
    with name_model(str(folder)):
        if not folder.is_dir():
            raise ModelUnreadable("there is no such folder", "give the folder of an overlay checkpoint")
        layers = _check_folder(folder)
        try:
            return load_model(folder, get_model_classes=lambda config: _overlay_classes(config, layers))
        except MoEError:
            raise
        except Exception as error:  # mlx-lm may fail in any way on a config or weights that are not as it expects
            reason = " ".join(str(error).split())[:300]
            raise ModelUnreadable(
                f"mlx-lm can't load it: {reason or type(error).__name__}",
                "the overlay is incomplete, or mlx-lm does not read this config",
            ) from error


def _check_folder(folder: Path) -> dict[int, Ranks]:
    """The ranks of each overlaid layer, once the folder's files are known to be sound."""
    _check_files(folder)
    checkpoint = Checkpoint(Folder(folder))
    layers = _read_ranks(checkpoint.config.get("overlay_config"))
    files = {checkpoint.info(name).file for name in checkpoint.names}
    if stray := sorted({path.name for path in folder.glob("model*.safetensors")} - files):
        raise ModelUnreadable(f"{stray[0]} is not in the index", "it may be of an older overlay: remove it")
    return layers


def _check_files(folder: Path) -> None:
    """Refuse links out of the folder, pipes and devices among all that mlx-lm and transformers may read there."""
    files, templates = Folder(folder), folder / "additional_chat_templates"
    inside = [*([templates] if templates.is_symlink() else []), *templates.glob("*.jinja")]
    for name in sorted(files.files | {str(path.relative_to(folder)) for path in inside}):
        files.open(name)


def _read_ranks(found: Any) -> dict[int, Ranks]:
    """The ranks of each layer from config.json's `overlay_config`."""
    if not isinstance(found, dict):
        raise ModelUnreadable("config.json has no overlay_config", "this is no overlay: load it with mlx-lm itself")
    if found.get("version") != VERSION:
        raise UnknownFormat(f"overlay version {found.get('version')} is not known", f"we read version {VERSION}")
    layers = found.get("layers")
    try:
        ranks: dict[int, Ranks] = {int(layer): dict(by_role) for layer, by_role in layers.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        ranks = {}
    if not ranks or not all(type(rank) is int and rank >= 0 for each in ranks.values() for rank in each.values()):
        raise ModelUnreadable("overlay_config lists no layers with their ranks")
    if ungated := [layer for layer, each in ranks.items() if each.keys() != set(ROLES)]:
        raise UnknownFormat(
            f"layer {ungated[0]} has not just gate, up and down", "only gated experts run in MLX so far"
        )
    return ranks


def _overlay_classes(config: dict[str, Any], layers: Mapping[int, Ranks]) -> tuple[type[Module], type]:
    """mlx-lm's model class for the config, derived so that it overlays the given layers, and its arguments' class."""
    model_type = config.get("model_type")
    try:
        model_class, arguments = _get_classes(config)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        raise UnknownFormat(
            f"mlx-lm has no model class for model_type {model_type}", "update mlx-lm, or report the model type"
        ) from None

    class OverlayModel(model_class):  # type: ignore[misc, valid-type]
        """The family's model with its experts overlaid."""

        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self._paths = _overlay_experts(self, layers)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Give the tensors mlx-lm's names and forms, by the family's own rules for all but the experts."""
            weights = _add_stand_ins(weights, layers)
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            return _name_overlays(weights, self._paths, str(model_type))

    return OverlayModel, arguments


def _overlay_experts(model: Module, layers: Mapping[int, Ranks]) -> dict[int, str]:
    """Put OverlayGLU in the place of the given layers' SwitchGLU; returns where they are, by layer."""
    found: dict[int, list[tuple[str, SwitchGLU]]] = {}
    for path, module in model.named_modules():  # type: ignore[no-untyped-call]
        if isinstance(module, SwitchGLU) and (match := _LAYER.fullmatch(path)):
            found.setdefault(int(match["layer"]), []).append((path, module))
    chosen = {layer: found[layer][0] for layer in layers if len(found.get(layer, ())) == 1}
    replaced = [
        (
            path,
            OverlayGLU(
                old.gate_proj.input_dims,
                old.gate_proj.output_dims,
                old.gate_proj.num_experts,
                layers[layer],
                old.activation,
                "bias" in old.gate_proj,
            ),
        )
        for layer, (path, old) in chosen.items()
    ]
    model.update_modules(tree_unflatten(replaced))
    return {layer: path for layer, (path, _) in chosen.items()}


def _add_stand_ins(weights: Mapping[str, mx.array], layers: Iterable[int]) -> dict[str, mx.array]:
    """The weights, with experts for the overlaid layers, too, if some layers are not overlaid.

    Several sanitize methods look at layer 0 alone to see whether there is anything to stack. Where there is, the
    overlaid layers borrow another's tensors; these are dropped again, and as MLX is lazy, never read for that.
    """
    overlaid = set(layers)
    matches = [match for name in weights if (match := _LAYER.fullmatch(name)) and _ROUTED.search(match["rest"])]
    lenders = sorted({int(match["layer"]) for match in matches} - overlaid)
    borrowed = {
        f"{match['root']}{layer}{match['rest']}": weights[match[0]]
        for match in matches
        if lenders and int(match["layer"]) == lenders[0]
        for layer in overlaid
    }
    return borrowed | dict(weights)


def _name_overlays(weights: Mapping[str, mx.array], paths: Mapping[int, str], model_type: str) -> dict[str, mx.array]:
    """The weights with base and factors under the names of their modules, and without stand-ins."""
    stand_ins = {
        f"{path}.{role}_proj.{part}"
        for path in paths.values()
        for role in ROLES
        for part in ("weight", "scales", "biases")
    }
    result = {}
    for name, array in weights.items():
        if match := _OVERLAY.fullmatch(name):
            if int(match["layer"]) not in paths:
                raise UnknownFormat(f"mlx-lm's {model_type} has no block of gated experts at {match['prefix']}")
            name = f"{paths[int(match['layer'])]}.{match['role']}_proj.{match['part']}"
        if name not in stand_ins:
            result[name] = array
    return result


def evaluate_pair(
    original: Path, overlay: Path, text: str, context: int, limit: int | None
) -> tuple[TokensFrom, Evaluation, Evaluation]:
    """Predict the same text with a model and with its overlay, one after the other.

    Returns what turned the text into tokens ("tokenizer", or "bytes" for a model of 256 tokens without one) and both
    evaluations; of the tokens, the first `limit`. On a CPU both run in float32, as MLX's expert products there need it;
    `parameter_bytes` is that of the stored numbers all the same. Raises ModelUnreadable where mlx-lm can't load them.
    """
    _check_pair(original, overlay)
    kind, tokens = _tokenize(original, text, limit)

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
            except Exception as error:  # see load_overlay
                reason = " ".join(str(error).split())[:300]
                raise ModelUnreadable(f"mlx-lm can't run it: {reason or type(error).__name__}") from error

    plain = run(original, load_model)
    mx.clear_cache()
    return kind, plain, run(overlay, load_overlay)


def _check_pair(original: Path, overlay: Path) -> None:
    """Refuse an overlay of another model: what both have as it was must be the same; the smallest tensors tell."""
    _check_files(original)
    _check_folder(overlay)
    plain, overlaid = (Checkpoint(Folder(folder)) for folder in (original, overlay))
    common = set(plain.names) & set(overlaid.names)
    smallest = sorted((overlaid.info(name) for name in common), key=lambda info: (info.nbytes, info.name))[:8]
    for theirs in smallest:
        ours = plain.info(theirs.name)
        same = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not same or [*plain.chunks(theirs.name, 2**20)] != [*overlaid.chunks(theirs.name, 2**20)]:
            raise InvalidRequest(f"{overlay} is no overlay of {original}: {theirs.name} differs")
    if not smallest:
        raise InvalidRequest(f"{overlay} is no overlay of {original}: they have no tensor in common")


def _parameter_bytes(model: Module) -> int:
    return int(tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0))  # type: ignore[no-untyped-call]


def _tokenize(folder: Path, text: str, limit: int | None) -> tuple[TokensFrom, list[int]]:
    names = {path.name for path in folder.iterdir()}
    if names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}:
        from mlx_lm.utils import load_tokenizer

        try:
            tokenizer = load_tokenizer(folder, {"trust_remote_code": False})  # type: ignore[no-untyped-call]
            return "tokenizer", list(tokenizer.encode(text))[:limit]
        except Exception as error:  # whatever it stumbles upon in a stranger's files
            said = " ".join(str(error).split())
            raise ModelUnreadable(f"the tokenizer in {folder} can't be used: {said}") from None
    vocabulary = Checkpoint(Folder(folder)).config.get("vocab_size")
    if vocabulary != 256:
        raise ModelUnreadable(f"{folder} has no tokenizer", "put the model's tokenizer files beside its weights")
    return "bytes", list(text.encode())[:limit]
