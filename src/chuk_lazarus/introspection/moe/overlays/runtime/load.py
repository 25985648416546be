"""An overlay checkpoint as a model of mlx-lm's, its experts left as base and factors."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import _get_classes, load_model

from ...errors import ModelUnreadable, MoEError, UnknownFormat, name_model
from ...weights.checkpoint import Checkpoint
from ...weights.repositories.local import Folder
from .modules import ROLES, OverlayGLU, Ranks

VERSION = 1

_OVERLAY = re.compile(r"(?P<prefix>.*\.(?P<layer>\d+))\.overlay\.(?P<role>gate|up|down)\.(?P<part>base|left|right)")
_LAYER = re.compile(r"(?P<root>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<rest>\..*)")
_ROUTED = re.compile(r"\.experts\.\d+\.|\.experts\.(?:gate_up_proj|down_proj)")


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
        layers = check_folder(folder)
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


def check_folder(folder: Path) -> dict[int, Ranks]:
    """The ranks of each overlaid layer, once the folder's files are known to be sound."""
    check_files(folder)
    checkpoint = Checkpoint(Folder(folder))
    layers = _read_ranks(checkpoint.config.get("overlay_config"))
    files = {checkpoint.info(name).file for name in checkpoint.names}
    if stray := sorted({path.name for path in folder.glob("model*.safetensors")} - files):
        raise ModelUnreadable(f"{stray[0]} is not in the index", "it may be of an older overlay: remove it")
    return layers


def check_files(folder: Path) -> None:
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
