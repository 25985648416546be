"""What mlx-lm's own model of a checkpoint calls its tensors, and which of its modules are quantised."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes
from numpy.typing import NDArray

from ...errors import UnknownFormat
from ..codes.affine import AFFINE_GROUPS, AffineCode

ROLE_MODULES = {
    SwitchGLU: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    SwitchMLP: {"up": "fc1", "down": "fc2"},
}
DTYPES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.float16: "F16"}
ROUTER_GROUP = 64

_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\..*")


@dataclass(frozen=True, slots=True)
class StockTensor:
    """A tensor that is not part of an expert, under mlx-lm's name; `load` reads it, once, as float32 or as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], NDArray[Any]]


class StockNames:
    """mlx-lm's model of a config, without weights.

    `paths` are the modules of the routed experts' projections, by layer and role; `left_out` are parts of the
    checkpoint that the model's class drops, such as "visual". Raises UnknownFormat where mlx-lm has no class for
    the model type, or another class of experts.
    """

    def __init__(self, config: Mapping[str, Any], layers: Mapping[int, Sequence[str]]) -> None:
        self.model_type = str(config.get("model_type"))
        try:
            model_class, arguments = _get_classes(dict(config))
            self._model: Module = model_class(arguments.from_dict(dict(config)))
        except Exception as error:  # mlx-lm may raise anything for a config that it does not expect
            reason = " ".join(str(error).split())[:200]
            raise UnknownFormat(
                f"mlx-lm has no model for this {self.model_type}: {reason or type(error).__name__}",
                "update mlx-lm, or choose another --format",
            ) from None
        self.left_out: tuple[str, ...] = ()
        self.paths = {(layer, role): path for layer, roles in layers.items() for role, path in self._find(layer, roles)}

    def _find(self, layer: int, roles: Sequence[str]) -> Iterable[tuple[str, str]]:
        named: dict[str, Module] = dict(self._model.named_modules())  # type: ignore[no-untyped-call]
        for path, module in named.items():
            match = _LAYER.fullmatch(path)
            if match and int(match["layer"]) == layer and type(module) in ROLE_MODULES:
                names = ROLE_MODULES[type(module)]
                if set(names) == set(roles):
                    return [(role, f"{path}.{name}") for role, name in names.items()]
        raise UnknownFormat(
            f"mlx-lm's {self.model_type} has no block for these experts in layer {layer}",
            "choose another --format",
        )

    def rest(self, folder: Path) -> list[StockTensor]:
        """The tensors in the safetensors files of a folder, which has no experts, under mlx-lm's names.

        Nothing is read until a tensor's `load` is called. `left_out` then says which parts the model's class drops.
        """
        arrays: dict[str, mx.array] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            arrays.update(mx.load(str(path)))  # type: ignore[arg-type]
        try:
            named: dict[str, mx.array] = self._model.sanitize(arrays) if hasattr(self._model, "sanitize") else arrays
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:200]
            raise UnknownFormat(
                f"mlx-lm can't name the tensors of this {self.model_type}: {reason or type(error).__name__}",
                "choose another --format",
            ) from None
        named = dict(named)
        kept = {id(array) for array in named.values()}
        parts = {name: _part_of(name) for name in arrays}
        whole = {parts[name] for name, array in arrays.items() if id(array) in kept}
        self.left_out = tuple(dict.fromkeys(part for part in parts.values() if part not in whole))
        shapes = {name: (DTYPES.get(array.dtype, ""), tuple(array.shape)) for name, array in named.items()}

        def load(name: str) -> NDArray[Any]:
            array = named.pop(name)  # which lets its memory go once it is written
            if array.dtype == mx.bfloat16:
                return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
            return np.array(array)

        return [
            StockTensor(name, dtype or "F32", shape, lambda name=name: load(name))  # type: ignore[misc]
            for name, (dtype, shape) in shapes.items()
        ]

    def rest_codes(self, tensors: Iterable[StockTensor], bits: int | None) -> dict[str, AffineCode]:
        """How modules other than routed experts are quantised, by path: as mlx-lm does it, to `bits`; None for not.

        Modules for which the model's class wants other settings get these, and routers stay as they are.
        """
        if bits is None:
            return {}
        modules: dict[str, Module] = dict(self._model.named_modules())  # type: ignore[no-untyped-call]
        experts = set(self.paths.values())
        blocks = {path.rsplit(".", 2)[0]: modules[path].num_experts for path in experts}
        predicate = getattr(self._model, "quant_predicate", None)
        codes = {}
        for tensor in tensors:
            path, _, part = tensor.name.rpartition(".")
            module = modules.get(path)
            is_router = tensor.shape[:1] == (blocks.get(path.rpartition(".")[0]),)  # few bytes that decide much
            if part != "weight" or path in experts or is_router or not hasattr(module, "to_quantized"):
                continue
            wanted = True if predicate is None else predicate(path, module)
            settings = wanted if isinstance(wanted, dict) else {}
            group = settings.get("group_size", ROUTER_GROUP)
            groups = [each for each in (group, *reversed(AFFINE_GROUPS)) if tensor.shape[-1] % each == 0]
            if wanted and groups and settings.get("mode", "affine") == "affine":
                codes[path] = AffineCode(settings.get("bits", bits), groups[0])
        return codes

    def check(self, codes: Mapping[str, AffineCode], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UnknownFormat where tensors of these shapes, by name, are not just those that the model wants.

        `codes` are those of all quantised modules.
        """
        quantize(
            self._model,
            class_predicate=lambda path, module: (
                {"bits": codes[path].bits, "group_size": codes[path].group} if path in codes else False
            ),
        )
        parameters: dict[str, mx.array] = tree_flatten(self._model.parameters(), destination={})  # type: ignore[no-untyped-call,assignment]
        wanted = {name: tuple(array.shape) for name, array in parameters.items()}
        for name in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(name) != shapes.get(name):
                had, has = (str(list(each[name])) if name in each else "absent" for each in (shapes, wanted))
                raise UnknownFormat(
                    f"mlx-lm's {self.model_type} expects {name} to be {has}, but it would be {had}",
                    "choose another --format",
                )


def _part_of(name: str) -> str:
    """The part of a model that a tensor belongs to by its name, such as "model.layers", "lm_head" or "visual"."""
    pieces = name.split(".")
    return ".".join(pieces[: 2 if pieces[0] in ("model", "language_model") and len(pieces) > 2 else 1])
