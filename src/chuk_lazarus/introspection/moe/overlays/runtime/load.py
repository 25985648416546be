"""An overlay checkpoint as a model of mlx-lm's, its experts left as base and deltas."""

import glob
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import _get_classes, load_model
from numpy.typing import NDArray

from ...errors import ModelUnreadable, MoEError, UnknownFormat, name_model
from ...terms import ROLES
from ...weights.checkpoint import Checkpoint
from ...weights.repositories.local import Folder
from ...weights.tensor_info import DTYPES
from ..checkpoint import model_file
from ..checkpoint.format import (
    INDEX,
    READ,
    CodedExperts,
    OverlayConfig,
    OverlayConfigError,
    Ranks,
    check_index,
    parse_tensor_name,
)
from ..codes import BankShape, list_matrices
from ..codes.bits import BitsCode
from ..codes.code import inner
from ..codes.trellis import TrellisCode
from .modules import CodedGLU, OverlayGLU, affine_arrays
from .trellis import trellis_arrays

Layers = Mapping[int, Ranks | CodedExperts]
"""What overlay_config says of each layer: ranks by role, or sizes and codes."""

# modules of mlx-lm whose blocks do no more with their experts' outputs y than (y * weights).sum(axis=-2)
ADDING_UP = frozenset({"deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})

_LAYER = re.compile(r"(?P<root>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<rest>\..*)")
_ROUTED = re.compile(r"\.experts\.\d+\.|\.experts\.(?:gate_up_proj|down_proj)")


def load_overlay(folder: str | Path) -> tuple[Module, dict[str, Any]]:
    """The mlx-lm model of an overlay checkpoint, with its experts as base and deltas, and its config.

    Codes stay in few bits, in MLX's affine form, whose scales are float32 on a CPU and bfloat16 elsewhere, or as the
    streams of trellises. The model's class is derived from mlx-lm's own, so all code for mlx-lm's models accepts it.
    Every parameter must be in the folder, and every tensor there must belong to a parameter, except those that mlx-lm
    itself drops. Raises ModelUnreadable for a folder that is broken or not an overlay, UnknownFormat for a family that
    mlx-lm has no class for, or whose experts in mlx-lm are not a SwitchGLU.
    """
    folder = Path(folder)
    with name_model(str(folder)):
        if not folder.is_dir():
            raise ModelUnreadable("there is no such folder", "give the folder of an overlay checkpoint")
        layers = check_folder(folder)
        try:
            # without the file that is for mlx-lm's own programs: nothing in the folder is executed
            own = {model_file.KEY: None} if _config(folder).get(model_file.KEY) == model_file.MODEL_FILE else None
            with plain_name(folder) as path:
                return load_model(
                    path, model_config=own, get_model_classes=lambda config: _overlay_classes(config, layers)
                )
        except MoEError:
            raise
        except Exception as error:  # mlx-lm may raise anything for a config or weights that it does not expect
            reason = " ".join(str(error).split())[:300]
            raise ModelUnreadable(
                f"mlx-lm can't load it: {reason or type(error).__name__}",
                "the overlay is incomplete, or mlx-lm does not read this config",
            ) from error


@contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """A path of the folder that mlx-lm takes as it is: its own, or else that of a link to it, in a temporary folder.

    mlx-lm looks for weights by a pattern, of which the folder's name would be a part, and MLX opens UTF-8 names only.
    """
    name = str(folder)
    if glob.escape(name) == name and name.isprintable():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lazarus-") as place:
        link = Path(place, "model")
        link.symlink_to(folder.absolute())
        yield link


def overlay_classes(folder: str | Path) -> tuple[type[Module], type]:
    """The classes of an overlay checkpoint's model and of its arguments, which mlx-lm's programs import from the
    folder.

    Raises as `load_overlay` does, except for errors that only the weights show.
    """
    folder = Path(folder)
    with name_model(str(folder)):
        return _overlay_classes(_config(folder), check_folder(folder))


def _config(folder: Path) -> dict[str, Any]:
    return dict(Checkpoint(Folder(folder)).config)


def check_folder(folder: Path) -> Layers:
    """Check that the folder's files are sound; returns the ranks, or the sizes and codes, of each overlaid layer."""
    check_files(folder)
    return _read_layers(Checkpoint(Folder(folder)).config)


def check_files(folder: Path) -> None:
    """Raise ModelUnreadable for pipes, devices and broken links that mlx-lm or transformers may read, and for stray
    weights: mlx-lm would load each file of this name, whatever the index says."""
    repository, templates = Folder(folder), folder / "additional_chat_templates"
    paths = [*([templates] if templates.is_symlink() else []), *templates.glob("*.jinja")]
    for name in sorted(repository.files | {str(path.relative_to(folder)) for path in paths}):
        repository.open(name)
    checkpoint = Checkpoint(repository)
    files = {checkpoint.info(name).file for name in checkpoint.names}
    if stray := sorted({path.name for path in folder.glob("model*.safetensors")} - files):
        raise ModelUnreadable(
            f"{stray[0]} is not one of the model's files, but mlx-lm would load it too",
            "it may be left from an older version or overlay: remove it",
        )


def _read_layers(config: Mapping[str, Any]) -> Layers:
    """The ranks, or the sizes and codes, of each overlaid layer, from the model's config."""
    try:
        overlay = OverlayConfig.read(config, lambda family: ROLES)
        return {**overlay.layers, **overlay.coded}
    except OverlayConfigError as error:
        raise _explain(error) from None


def _explain(error: OverlayConfigError) -> MoEError:
    """What is wrong with overlay_config, in words for somebody who wants to run the model."""
    match error.problem:
        case "missing":
            return ModelUnreadable(
                "config.json has no overlay_config", "this is not an overlay: load it with mlx-lm itself"
            )
        case "version":
            return UnknownFormat(f"this overlay has version {error.value}, but we read only versions {READ}")
        case "roles":
            return UnknownFormat(
                f"layer {int(error.value)} has projections other than gate, up and down",
                "only gated experts run in MLX so far",
            )
        case "code":
            return ModelUnreadable(f"overlay_config: the sizes or codes of layer {int(error.value)} are not valid")
        case _:
            return ModelUnreadable("overlay_config lists no layers with their ranks")


def _overlay_classes(config: dict[str, Any], layers: Layers) -> tuple[type[Module], type]:
    """A model class that overlays the given layers, derived from mlx-lm's for the config, and its arguments' class."""
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
            """Give the tensors mlx-lm's names and forms; the family's own rules hold for all but overlaid experts."""
            weights = _add_stand_ins(weights, layers)
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            return _name_overlays(weights, self._paths, layers, str(model_type))

    return OverlayModel, arguments


def _overlay_experts(model: Module, layers: Layers) -> dict[int, str]:
    """Put an OverlayGLU or a CodedGLU in the place of each given layer's SwitchGLU; returns their paths, by layer.

    A layer without a SwitchGLU, or with several, is left as it is.
    """
    blocks: dict[int, list[tuple[str, SwitchGLU]]] = {}
    modules: dict[str, Module] = dict(model.named_modules())  # type: ignore[no-untyped-call]
    for path, module in modules.items():
        if isinstance(module, SwitchGLU) and (match := _LAYER.fullmatch(path)):
            blocks.setdefault(int(match["layer"]), []).append((path, module))
    chosen = {layer: blocks[layer][0] for layer in layers if len(blocks.get(layer, ())) == 1}
    replaced = [(path, _overlay_block(block, layers[layer])) for layer, (path, block) in chosen.items()]
    for path, block in replaced:
        caller = modules[path.rpartition(".")[0]]
        block.are_added_up = type(caller).__module__.rpartition(".")[2] in ADDING_UP
    model.update_modules(tree_unflatten(replaced))
    return {layer: path for layer, (path, _) in chosen.items()}


def _overlay_block(block: SwitchGLU, layer: Ranks | CodedExperts) -> Module:
    """The module that takes the block's place."""
    gate = block.gate_proj
    sizes = gate.input_dims, gate.output_dims, gate.num_experts
    if isinstance(layer, CodedExperts):
        return CodedGLU(*sizes, layer.codes, block.activation, "bias" in gate)
    return OverlayGLU(*sizes, layer, block.activation, "bias" in gate)


def _add_stand_ins(weights: Mapping[str, mx.array], layers: Iterable[int]) -> dict[str, mx.array]:
    """The weights, with stand-ins for the overlaid layers' experts if some layers are not overlaid.

    Several of mlx-lm's sanitize methods stack the experts of all layers or of none, by what they find in layer 0. So
    where a layer has plain experts, the overlaid layers borrow its tensors. They are dropped afterwards, and as MLX is
    lazy, they are never read.
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


def _name_overlays(
    weights: Mapping[str, mx.array], paths: Mapping[int, str], layers: Layers, model_type: str
) -> dict[str, mx.array]:
    """The weights with base and deltas under the names of their modules, and without stand-ins.

    Raises UnknownFormat for an overlay of a layer that is not among `paths`.
    """
    stand_ins = {
        f"{path}.{role}_proj.{part}"
        for path in paths.values()
        for role in ROLES
        for part in ("weight", "scales", "biases")
    }
    named: dict[str, mx.array] = {}
    coded: dict[tuple[int, str], dict[str, mx.array]] = {}
    indices: dict[int, mx.array] = {}
    for name, array in weights.items():
        if tensor := parse_tensor_name(name):
            if tensor.layer not in paths:
                raise UnknownFormat(f"mlx-lm's {model_type} has no block of gated experts at {tensor.prefix}")
            if tensor.part == INDEX:
                indices[tensor.layer] = array
                continue
            if isinstance(layers[tensor.layer], CodedExperts):
                coded.setdefault((tensor.layer, tensor.role), {})[tensor.part] = array
                continue
            name = f"{paths[tensor.layer]}.{tensor.role}_proj.{tensor.part}"
        if name not in stand_ins:
            named[name] = array
    for (number, role), parts in coded.items():
        layer = layers[number]
        assert isinstance(layer, CodedExperts)
        arrays = _as_modules(layer, role, parts)
        if bank := layer.codes[role].bank:
            index = np.array(indices.get(number, mx.zeros(0)))
            if layer.index is None or index.shape != layer.index.shape or index.dtype != DTYPES[layer.index.dtype]:
                raise ModelUnreadable(f"layer {number} has no index of its bank, or one of the wrong shape")
            if problem := check_index(index, bank.size):
                raise ModelUnreadable(f"the index of the bank of layer {number}: {problem}")
            arrays["places"] = mx.array(_places(index, bank, layer.intermediate))
        named |= {f"{paths[number]}.{role}_proj.{name}": array for name, array in arrays.items()}
    return named


def _places(index: NDArray[np.integer], bank: BankShape, neurons: int) -> NDArray[np.uint32]:
    """The `places` of a CodedLinear whose base is that bank, from the index [experts, matched] on disk."""
    if not bank.axis:
        return np.pad(index.astype(np.uint32), [(0, 0), (0, neurons - bank.matched)], constant_values=bank.size)
    places = np.full((len(index), bank.size), neurons, np.uint32)
    np.put_along_axis(places, index.astype(np.intp), np.arange(bank.matched, dtype=np.uint32)[None], axis=1)
    return places


def _as_modules(layer: CodedExperts, role: str, parts: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The parameters of a CodedLinear, from the parts of a role on disk.

    Raises ModelUnreadable where these are not those that the config tells.
    """
    expected = {name: part.shape for name, part in layer.layout(role).items()}
    if {name: array.shape for name, array in parts.items()} != expected:
        raise ModelUnreadable(f"the parts of a {role} projection do not have the shapes that overlay_config gives")
    arrays: dict[str, mx.array] = {}
    for name, matrix in list_matrices(layer.codes[role], layer.shape(role), layer.experts).items():
        own = inner(parts, matrix.part)
        if isinstance(matrix.code, TrellisCode):
            trellis = trellis_arrays(matrix, {part: np.array(array) for part, array in own.items()})
            arrays |= {f"{name}.{part}": array for part, array in trellis.items()}
            continue
        if not isinstance(matrix.code, BitsCode):
            arrays[f"{name}.matrix"] = own["values"]
            continue
        affine = affine_arrays(matrix.code, {part: np.array(array) for part, array in own.items()}, matrix.shape)
        arrays |= {f"{name}.{part}": array for part, array in affine.items()}
    return arrays
