"""An overlay checkpoint, whose tensors are read when they are asked for."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat
from ...numerics.low_rank import Factors, rebuild
from ...progress import Progress
from ...terms import ROLES
from ...text import format_ranges
from ...weights.checkpoint import Checkpoint, TensorInfo
from ...weights.expert_layer import MAX_EXPERTS, MAX_SIDE
from ...weights.layouts import load_table
from ...weights.repositories.local import Folder
from ..codes.code import inner
from ..quantisation import BF16
from .format import (
    AXES,
    READ,
    CodedExperts,
    OverlayConfig,
    OverlayConfigError,
    check_index,
    index_name,
    parse_tensor_name,
    part_shapes,
    tensor_name,
)


class OverlayCheckpoint:
    """An overlay checkpoint: base and deltas by layer, role and expert.

    `config` is the model's config.json, `overlay_config` what it says of the overlay. `family` is the row of the layout
    table that the experts came from, `layers` are the overlaid layers, `ranks` their ranks by role, or `coded` their
    sizes and codes, and `names` the names of the overlay's tensors. Raises ModelUnreadable where a tensor is missing or
    not of the shape that the config tells, UnknownFormat for a version that is not known.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        try:
            self.overlay_config = OverlayConfig.read(self.config, _roles_of)
        except OverlayConfigError as error:
            raise _explain(error) from None
        self.family = self.overlay_config.family
        self.ranks = self.overlay_config.layers
        self.coded = self.overlay_config.coded
        self.layers = self.overlay_config.numbers
        tensors = {name: tensor for name in checkpoint.names if (tensor := parse_tensor_name(name))}
        self.names = frozenset(tensors)
        self._indices: dict[int, NDArray[np.intp]] = {}
        self._prefixes = {tensor.layer: tensor.prefix for tensor in tensors.values()}
        if len({tensor.prefix for tensor in tensors.values()}) > len(self._prefixes):
            raise ModelUnreadable("tensors of the same layer have different prefixes")
        if self._prefixes.keys() != set(self.layers):
            layer = min(self._prefixes.keys() ^ set(self.layers))
            where = "its tensors are missing" if layer in self.layers else "overlay_config does not list it"
            raise ModelUnreadable(f"layer {layer} is only partly in the overlay: {where}", "make the overlay again")
        for layer, ranks in self.ranks.items():
            self._check(layer, ranks)
        for layer, coded in self.coded.items():
            self._check_coded(layer, coded)

    def roles(self, layer: int) -> tuple[str, ...]:
        """The roles of an overlaid layer's experts."""
        return tuple(self.coded[layer].codes if layer in self.coded else self.ranks.get(layer, ()))

    def shape(self, layer: int, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrices."""
        if layer in self.coded and role in self.coded[layer].codes:
            return self.coded[layer].shape(role)
        out, inner = self._info(layer, role, "base").shape
        return out, inner

    def count(self, layer: int) -> int:
        """The number of experts."""
        if layer in self.coded:
            return self.coded[layer].experts
        return self._info(layer, "down", "left").shape[0]

    def base(self, layer: int, role: str) -> NDArray[np.float32]:
        """The base [out, in], as stored, or the neurons of a bank; zeros where a coded layer has none."""
        if layer in self.coded:
            shape = self.shape(layer, role)
            code, of_base = self.coded[layer].codes[role].sides(shape).get("base", (None, shape))
            parts = inner(self._parts(layer, role), "base") if code else {}
            with np.errstate(over="ignore", invalid="ignore"):  # `rebuild` refuses what is not finite
                return code.decode(parts, of_base) if code else np.zeros(shape, np.float32)
        return self._rows(layer, role, "base", 0, self.shape(layer, role)[0])

    def factors(self, layer: int, role: str, expert: int) -> Factors:
        """The low-rank delta of one expert, as stored; raises InvalidRequest for an expert that is not there, and for a
        layer that is coded."""
        if layer in self.coded:
            raise InvalidRequest(f"layer {layer} is coded and has no factors", "use delta() instead")
        (out, inner), rank = self.shape(layer, role), self.ranks[layer][role]
        self._check_expert(layer, expert)
        return Factors(
            self._rows(layer, role, "left", expert * out, (expert + 1) * out).reshape(out, rank),
            self._rows(layer, role, "right", expert * rank, (expert + 1) * rank).reshape(rank, inner),
        )

    def delta(self, layer: int, role: str, expert: int) -> NDArray[np.float32]:
        """What one expert adds to the base, [out, in], as stored; its neurons that refer to no bank as they are.

        Raises InvalidRequest for an expert that is not there.
        """
        if layer not in self.coded:
            factors = self.factors(layer, role, expert)
            return factors.left @ factors.right
        self._check_expert(layer, expert)
        return self._join(layer, role, expert, None)

    def index(self, layer: int) -> NDArray[np.intp] | None:
        """Which neurons of the bank the first neurons of each expert refer to, [experts, matched]; None without a bank.

        Raises ModelUnreadable for a neuron that is not there, or is there twice for an expert.
        """
        coded = self.coded.get(layer)
        if coded is None or coded.index is None:
            return None
        if layer not in self._indices:
            bank = next(each.bank for each in coded.codes.values() if each.bank)
            info = self._index_info(layer)
            index = np.asarray(self.checkpoint.whole(info)).astype(np.intp)
            if problem := check_index(index, bank.size):
                raise ModelUnreadable(f"{info.name}: {problem}", "the overlay is broken: make it again")
            self._indices[layer] = index
        return self._indices[layer]

    def expert(self, layer: int, expert: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of one expert by role, base + delta, in canonical form."""
        roles = self.roles(layer) or ("down",)  # `base` refuses an unknown layer
        return {role: self.rebuild(self.base(layer, role), layer, role, expert) for role in roles}

    def rebuild(self, base: NDArray[np.float32], layer: int, role: str, expert: int) -> NDArray[np.float32]:
        """`base` + delta of one expert; raises ModelUnreadable where that is not finite in bfloat16."""
        with np.errstate(over="ignore", invalid="ignore"):
            if layer in self.coded:
                self._check_expert(layer, expert)
                matrix = self._join(layer, role, expert, base)
            else:
                matrix = rebuild(base, self.factors(layer, role, expert))
            is_finite = np.isfinite(matrix.astype(BF16)).all()
        if not is_finite:
            raise ModelUnreadable(
                f"layer {layer}, expert {expert}: the {role} projection holds NaN, infinity or numbers too large for "
                "bf16",
                "the overlay is broken: make it again",
            )
        return matrix

    def prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with, such as "model.layers.3"."""
        return self._prefixes[layer]

    def prefetch(self, layer: int, progress: Progress) -> None:
        """Bring the layer's overlay near in few, long reads."""
        infos = [self._info(layer, role, part) for role in self.roles(layer) for part in self._part_names(layer, role)]
        self.checkpoint.prefetch(((info.file, (info.start, info.stop)) for info in infos), progress)

    def template(self, role: str) -> str:
        """What a plain checkpoint calls a stored tensor, by its role there, below the layer's prefix.

        Raises ModelUnreadable where the config does not say it.
        """
        name = self.overlay_config.names.get(role)
        if not name:
            raise ModelUnreadable(f"overlay_config does not name the {role} projections")
        return name

    def _check_expert(self, layer: int, expert: int) -> None:
        if not 0 <= expert < self.count(layer):
            raise InvalidRequest(f"layer {layer} has no expert {expert}", f"there are 0 to {self.count(layer) - 1}")

    def _check_coded(self, layer: int, coded: CodedExperts) -> None:
        """As `_check`, for a layer in codes."""
        if coded.experts > MAX_EXPERTS or max(coded.hidden, coded.intermediate) > MAX_SIDE:
            raise UnknownFormat(
                f"layer {layer} has {coded.experts} experts of {coded.intermediate} x {coded.hidden}",
                f"we read up to {MAX_EXPERTS} experts of up to {MAX_SIDE} x {MAX_SIDE}",
            )
        expected = [
            (self._info(layer, role, part), layout)
            for role in coded.codes
            for part, layout in coded.layout(role).items()
        ]
        if coded.index:
            expected.append((self._index_info(layer), coded.index))
        for info, layout in expected:
            if (info.dtype, info.shape) != (layout.dtype, layout.shape):
                found, wanted = (
                    f"{dtype} {list(shape)}"
                    for dtype, shape in ((info.dtype, info.shape), (layout.dtype, layout.shape))
                )
                raise ModelUnreadable(f"{info.name} is {found}, not {wanted}")

    def _part_names(self, layer: int, role: str) -> Iterable[str]:
        return self.coded[layer].layout(role) if layer in self.coded else AXES

    def _join(self, layer: int, role: str, expert: int, base: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """One expert's matrix, from the base or the bank, or without it."""
        codes = self.coded[layer].codes[role]
        index = self.index(layer)
        if base is not None and codes.bank and index is not None:
            base = base.take(index[expert], axis=codes.bank.axis)
        return codes.join(self._parts(layer, role, expert), self.shape(layer, role), base)

    def _parts(self, layer: int, role: str, expert: int | None = None) -> dict[str, NDArray[Any]]:
        """The parts of a role's base, or those of one expert."""
        parts = {}
        for name, layout in self.coded[layer].layout(role).items():
            if name.startswith("base.") == (expert is None):
                info = self._info(layer, role, name)
                if not info.nbytes:
                    data = np.zeros(layout.shape[expert is not None :], np.uint8)
                elif expert is None:
                    data = self.checkpoint.whole(info)
                else:
                    data = self.checkpoint.rows(info, expert, expert + 1)[0]
                parts[name] = np.asarray(data)
        return parts

    def _check(self, layer: int, ranks: Mapping[str, int]) -> None:
        """Raise ModelUnreadable or UnknownFormat where the layer's tensors do not have the shapes they should."""
        count, (hidden, intermediate) = self.count(layer), self.shape(layer, "down")
        if not hidden * intermediate * count:
            raise ModelUnreadable(f"layer {layer} of the overlay has {count} experts of {intermediate} x {hidden}")
        if count > MAX_EXPERTS:  # at rank 0 the factors take no bytes, so any number may be there
            raise UnknownFormat(f"layer {layer} has {count} experts", f"we read up to {MAX_EXPERTS}")
        for role, rank in ranks.items():
            matrix_shape = (hidden, intermediate) if role == "down" else (intermediate, hidden)
            for part, shape in part_shapes(matrix_shape, count, rank).items():
                info = self._info(layer, role, part)
                if (info.dtype, info.shape) != ("BF16", shape):
                    raise ModelUnreadable(f"{info.name} is {info.dtype} {list(info.shape)}, not BF16 {list(shape)}")

    def _info(self, layer: int, role: str, part: str) -> TensorInfo:
        if role not in self.roles(layer):
            raise InvalidRequest(
                f"layer {layer} has no {role} overlay", f"the overlaid layers are {format_ranges(self.layers)}"
            )
        name = tensor_name(self._prefixes[layer], role, part)
        if name not in self.names:
            raise ModelUnreadable(f"{name} is missing", "make the overlay again")
        info = self.checkpoint.info(name)
        if part in AXES and len(info.shape) != AXES[part]:
            raise ModelUnreadable(f"{name} has {len(info.shape)} axes")
        return info

    def _index_info(self, layer: int) -> TensorInfo:
        name = index_name(self._prefixes[layer])
        if name not in self.names:
            raise ModelUnreadable(f"{name} is missing", "make the overlay again")
        return self.checkpoint.info(name)

    def _rows(self, layer: int, role: str, part: str, start: int, stop: int) -> NDArray[np.float32]:
        info = self._info(layer, role, part)
        if not info.nbytes:
            return np.zeros((stop - start, info.shape[-1]), np.float32)
        return self.checkpoint.rows(info, start, stop, len(info.shape) - 1).astype(np.float32)


def _roles_of(family: Any) -> tuple[str, ...]:
    """The roles of an expert in a family of the layout table; raises ModelUnreadable for any other family."""
    layout = next((layout for layout in load_table() if layout.name == family), None)
    if layout is None:
        raise ModelUnreadable(f"overlay_config names the family {family}, which is not in our table")
    stored_roles = {role for tensor in layout.tensors for role in tensor.roles}
    return tuple(role for role in ROLES if role in stored_roles)


def _explain(error: OverlayConfigError) -> MoEError:
    """What is wrong with overlay_config, in words for somebody who wants to rebuild the experts."""
    match error.problem:
        case "missing":
            return ModelUnreadable("config.json has no overlay_config: this is not an overlay checkpoint")
        case "version":
            return UnknownFormat(f"this overlay has version {error.value}, but we read only versions {READ}")
        case "no layers":
            return ModelUnreadable("overlay_config lists no layers with their ranks")
        case "code":
            return ModelUnreadable(f"overlay_config: the sizes or codes of layer {error.value} are not valid")
        case "rank":
            return ModelUnreadable(f"overlay_config: a rank of layer {error.value} is not valid")
        case _:
            roles = ", ".join(error.roles)
            return ModelUnreadable(f"overlay_config: layer {error.value} lacks a rank for each of {roles}")


def read_overlay(folder: Path) -> OverlayCheckpoint:
    """The overlay checkpoint in `folder`; raises ModelUnreadable where it is none or broken."""
    if not os.path.isdir(folder):
        raise ModelUnreadable(
            f"{folder}: no such folder",
            "give the folder of an overlay; for any other model, give a format that is not standard",
        )
    return OverlayCheckpoint(Checkpoint(Folder(folder)))
