"""The experts of one layer as matrices in canonical form, read on demand.

In canonical form `y = W x`, float32: gate and up are [intermediate, hidden], down is [hidden, intermediate]. Biases are
not part of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..arguments import whole_number
from ..errors import InvalidRequest, ModelUnreadable, UnknownFormat
from ..progress import Progress
from ..terms import ROLES
from ..text import format_ranges
from .checkpoint import Checkpoint, TensorInfo
from .codecs import PARTS, PRE_QUANT_SCALE, Grid, OtherInputs, Stored, plain
from .codecs.fp8 import UNSCALED
from .layouts import Layout, LayoutMatch, Parts, StoredTensor, split_name
from .model_config import ModelConfig
from .repositories.source import Range
from .stored import BIAS, Infos, find_rows, find_slices, module_of, open_stored, outline, read_rows, weight_of

MATRIX_WINDOW = 4_000_000  # the number of weights of one expert that are decoded at a time
MAX_EXPERTS = 4096  # twice the largest published layer; the cost of an analysis grows with the square of this number
MAX_SIDE = 2**17  # twice the longest side of a published matrix; hundreds of rows are compared with all others


@dataclass(frozen=True, slots=True)
class Piece:
    """The same block of one role's matrix in several experts.

    `values` is float32 [experts, rows, columns]; `index` is the position of the block in the canonical matrix.
    """

    role: str
    index: tuple[slice, slice]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Router:
    """A router's weight [experts, hidden], and its bias and score correction, [experts] each, if it has them."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    correction: NDArray[np.float32] | None


class DoesNotFit(UnknownFormat):
    """Raised if what is stored in a layer does not fit its layout."""


class ShapesDoNotFit(DoesNotFit):
    """Raised if the stored shapes in a layer do not fit its layout; `shapes` are by the layout's roles."""

    layer: int
    layout: Layout
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, layer: int, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> "ShapesDoNotFit":
        """The error for these shapes."""
        listing = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
        error = cls(f"layer {layer}: expert tensors {listing} do not fit layout {layout.name}")
        error.layer, error.layout, error.shapes = layer, layout, dict(shapes)
        return error


class LacksRole(ModelUnreadable):
    """Raised if all layers lack the same roles of an expert."""

    roles: tuple[str, ...]

    @classmethod
    def of(cls, message: str, roles: Sequence[str]) -> "LacksRole":
        """The error for these roles."""
        error = cls(message, "the checkpoint is incomplete: download it again")
        error.roles = tuple(roles)
        return error


class ExpertLayer:
    """The experts of one layer.

    `expected` has the number of experts by the source that states it, such as a config's file name; `tensors` are the
    stored tensors, each of which holds one role or two. If the config states another number of experts than there are,
    and the router has a row for each of these, the router is right, and `remark` is called with a sentence about it. If
    the model may be `damaged`, their number is not checked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        match: LayoutMatch,
        number: int,
        expected: Mapping[str, int | None],
        config: ModelConfig,
        one_plus_norm: bool = False,
        shared_last: bool = False,
        remark: Callable[[str], None] = lambda sentence: None,
        damaged: bool = False,
    ) -> None:
        self.number = number
        self._damaged = damaged
        self._shared_last = shared_last
        self._remark = remark
        self._one_plus_norm = one_plus_norm
        self.expected = {source: count for source, count in expected.items() if count is not None}
        self._checkpoint = checkpoint
        self._match = match
        self._config = config

    def __repr__(self) -> str:
        """For instance "ExpertLayer(0, 8 experts, gate and up 128 x 64)"."""
        sizes = self.sizes
        inner = " and ".join(role for role in self.roles if role != "down")
        return f"ExpertLayer({self.number}, {sizes['E']} experts, {inner} {sizes['I']} x {sizes['H']})"

    def __len__(self) -> int:
        """The number of experts."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, NDArray[np.float32]]]:
        """The matrices of each expert in turn, as `matrices` gives them."""
        return map(self.matrices, range(self.count))

    def __bool__(self) -> bool:
        """Always True, without opening the file."""
        return True

    @property
    def layout(self) -> Layout:
        return self._match.layout

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of experts E, the intermediate size I and the hidden size H.

        Raises DoesNotFit if the shapes are not those of the layout, UnknownFormat if the layer is larger than we read,
        ModelUnreadable if another number of experts is expected.
        """
        shapes = {tensor.spec.role: tensor.plain_shape for tensor in self.tensors}
        experts = None if self.layout.is_stacked else len(self.tensors[0].parts)  # 1 in a dense layer
        if self.layout.is_flattened:
            experts = next(reversed(self.expected.values()), None)  # the last source is the router where there is one
        sizes = self.layout.solve(shapes, experts)
        if sizes is None:
            raise ShapesDoNotFit.of(self.number, self.layout, shapes)
        if sizes["E"] > MAX_EXPERTS or max(sizes["I"], sizes["H"]) > MAX_SIDE:
            raise UnknownFormat(
                f"layer {self.number} has {sizes['E']} experts of {sizes['I']} x {sizes['H']}",
                f"we read up to {MAX_EXPERTS} experts of up to {MAX_SIDE} x {MAX_SIDE}",
            )
        if self._counts_shared(sizes["E"]):
            sizes = {**sizes, "E": sizes["E"] - 1}
        for source, count in {} if self._damaged else self.expected.items():
            if sizes["E"] != count and self._router_rows == sizes["E"]:
                self._remark(
                    f"layer {self.number} has {sizes['E']} experts, as its router says, although {source} says {count}"
                )
            elif sizes["E"] != count:
                raise ModelUnreadable(
                    f"layer {self.number} has {sizes['E']} experts, but {source} says {count}",
                    "the checkpoint is incomplete, or this belongs to another model",
                )
        return sizes

    def _counts_shared(self, stacked: int) -> bool:
        """Whether the number of stacked experts is one more than expected, because of the shared expert."""
        is_fused = self.layout.is_stacked and len(self.layout.tensors[0].roles) == 2
        return self._shared_last and is_fused and set(self.expected.values()) == {stacked - 1}

    @property
    def has_shared_last(self) -> bool:
        """Whether the last expert of each stack is the shared expert."""
        return self._shared_last and self.layout.is_stacked and self.tensors[0].stored.shape[0] == self.count + 1

    @property
    def count(self) -> int:
        return self.sizes["E"]

    def alone(self, expert: int) -> "ExpertLayer":
        """The layer with only this expert, as number 0, whatever the others lack; if one tensor holds all experts, the
        layer itself."""
        if self.layout.is_single:
            return self
        by_role = self._match.layers[self.number]
        own = {role: {0: experts[expert]} for role, experts in by_role.items() if expert in experts}
        match = replace(self._match, layers={self.number: cast(dict[str, dict[int | None, Parts]], own)})
        return ExpertLayer(self._checkpoint, match, self.number, {}, self._config, damaged=True)

    def parts(self) -> dict[str, dict[int | None, Parts]]:
        """The names of the tensors that hold its experts, by the layout's roles and expert, None for all experts."""
        return self._match.layers[self.number]

    @property
    def roles(self) -> tuple[str, ...]:
        present = {role for tensor in self.layout.tensors for role in tensor.roles}
        return tuple(role for role in ROLES if role in present)

    def shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrix."""
        hidden, intermediate = self.sizes["H"], self.sizes["I"]
        return (hidden, intermediate) if role == "down" else (intermediate, hidden)

    @cached_property
    def tensors(self) -> tuple["ExpertTensor", ...]:
        """The stored tensors; raises ModelUnreadable, which names what is missing, if an expert or a role is
        missing."""
        by_role = self._match.layers[self.number]
        for tensor in self.layout.tensors:
            if tensor.role not in by_role:
                raise ModelUnreadable(
                    f"layer {self.number} lacks its {tensor.role} projections ({tensor.leaf})",
                    "the checkpoint is incomplete: download it again",
                )
        if self.layout.is_single:
            return tuple(ExpertTensor(self, tensor, [by_role[tensor.role][None]]) for tensor in self.layout.tensors)
        present = {expert for experts in by_role.values() for expert in experts if expert is not None}
        numbers = range(max(max(present) + 1 - len(self.left_out), *self.expected.values(), 0))
        if len(numbers) > len(present) and self._router_rows == len(present) == max(present) + 1:
            numbers = range(len(present))
        for role, experts in by_role.items():
            missing = next((expert for expert in numbers if expert not in experts), None)
            if missing is not None:
                raise ModelUnreadable(
                    f"layer {self.number} lacks the {role} projection of expert {missing}",
                    "the checkpoint is incomplete: download it again",
                )
        return tuple(
            ExpertTensor(self, tensor, [by_role[tensor.role][expert] for expert in numbers])
            for tensor in self.layout.tensors
        )

    @cached_property
    def _router_rows(self) -> int | None:
        """The number of rows of the layer's router, None if we find none."""
        name = self._beside("router").get("weight")
        return next(iter(self._checkpoint.info(name).shape), None) if name else None

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """The experts of another kind, numbered above those that the config counts.

        These are identity experts, which have no down projection, or experts of another modality, which have another
        size. If an expert above the count is like the first one, the count is wrong, and none is left out.
        """
        by_role = self._match.layers[self.number]
        count, down = self.expected.get(self._checkpoint.config_file, 0), by_role.get("down", {})
        if count <= 0 or 0 not in down:
            return ()
        present = {expert for experts in by_role.values() for expert in experts if expert is not None}
        uncounted = sorted(expert for expert in present if expert >= count)
        if uncounted and len(uncounted) == self._config.layer(self.number).other_expert_count:
            return tuple(uncounted)
        if any(expert in down and self._shapes(down[expert]) == self._shapes(down[0]) for expert in uncounted):
            return ()
        return tuple(uncounted)

    def _shapes(self, parts: Parts) -> set[tuple[int, ...]]:
        return {self._checkpoint.info(name).shape for name in parts.values()}

    @property
    def storage(self) -> str:
        """The names of the matrices' storage formats, joined by +."""
        return "+".join(dict.fromkeys(codec for tensor in self.tensors for codec in tensor.codecs))

    @property
    def parameters(self) -> int:
        """The number of weights in all experts."""
        return self.count * sum(prod(self.shape(role)) for role in self.roles)

    @property
    def stored_bytes(self) -> int:
        """The bytes of all experts' matrices in the files, with their scales and without biases."""
        return sum(info.nbytes for tensor in self.tensors for info in tensor.infos())

    def prefetch(self, progress: Progress, ranges: Iterable[tuple[str, Range]] | None = None) -> None:
        """Fetch all experts of the layer, or the given byte ranges of files, in a few long requests."""
        if ranges is None:
            ranges = ((info.file, (info.start, info.stop)) for tensor in self.tensors for info in tensor.infos())
        self._checkpoint.prefetch(ranges, progress)

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of one expert by role, float32 in canonical form; raises InvalidRequest if there is no such
        expert."""
        expert = self._choose(expert)
        return {role: matrix for tensor in self.tensors for role, matrix in tensor.matrices(expert).items()}

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role, float32 [out]; {} if the experts have none.

        Raises InvalidRequest if there is no such expert.
        """
        expert = self._choose(expert)
        return {role: bias for tensor in self.tensors for role, bias in tensor.biases(expert).items()}

    def _choose(self, expert: int) -> int:
        """The number of an existing expert."""
        hint = f"the experts are {format_ranges(range(self.count))}"
        number = whole_number(expert, "the expert", hint)
        if not 0 <= number < self.count:
            raise InvalidRequest(f"layer {self.number} has no expert {number}", hint)
        return number

    def router(self) -> Router | None:
        """The layer's router; None if we find none whose shapes fit the experts."""
        parts = self._beside("router")
        weight = self.small_tensor(parts.get("weight"))
        if weight is None or weight.shape != (self.count, self.sizes["H"]):
            return None
        correction = self.small_tensor(next(iter(self._beside("correction").values()), None))
        vectors = (self.small_tensor(parts.get("bias")), correction)
        bias, correction = (vector if vector is None else vector.reshape(-1) for vector in vectors)
        if any(vector is not None and len(vector) != self.count for vector in (bias, correction)):
            return None
        return Router(weight, bias, correction)

    def router_weight(self) -> tuple[NDArray[np.float32], Grid | None] | None:
        """The router's weight [rows, inputs] of any shape, and the numbers that its format can hold; None if we find
        none."""
        parts = {part: name for part, name in self._beside("router").items() if part in (*PARTS, "weight")}
        if not parts:
            return None
        infos, stored = open_stored(self._checkpoint, parts, self._config.quantization(module_of(parts)))
        if len(stored.shape) != 2:
            return None
        values = read_rows(self._checkpoint, infos, stored, stored.shape[0], 0, stored.shape[0])
        return values.T if stored.transposed else values, stored.grid

    def router_vectors(self) -> dict[str, NDArray[np.float32]]:
        """The router's bias and score correction, flattened, by these names, if it has them."""
        found = {
            "bias": self.small_tensor(self._beside("router").get("bias")),
            "correction": self.small_tensor(next(iter(self._beside("correction").values()), None)),
        }
        return {name: vector.reshape(-1) for name, vector in found.items() if vector is not None}

    def norm(self) -> NDArray[np.float32] | None:
        """The weights of the norm before the experts, float32 [hidden]; None if we find no such norm."""
        weight = self.small_tensor(self._beside("norm").get("weight"))
        if weight is None or weight.shape != (self.sizes["H"],):
            return None
        return weight + np.float32(1.0) if self._one_plus_norm else weight

    @cached_property
    def factors(self) -> dict[str, NDArray[np.float32]]:
        """The factor of each expert that its stored matrix lacks, float32 [experts] by role; {} if all are 1.

        mlx-vlm's Inkling has the second scales of NVFP4 as one factor of the output of gate, and one of the output of
        down, which includes that of up. Raises ModelUnreadable if one is missing or has another shape.
        """
        scales = {}
        for kind in ("gate_scale", "out_scale"):
            name = self._beside(kind).get("weight")
            scale = self.small_tensor(name)
            if name and (scale is None or scale.shape != (self.count,) or not np.isfinite(scale).all() or 0 in scale):
                raise ModelUnreadable(f"{name} should hold one factor for each of {self.count} experts")
            if scale is not None:
                scales[kind] = scale
        if len(scales) == 1:
            raise ModelUnreadable(
                f"layer {self.number} has {next(iter(scales))}, but lacks the other factors of its experts",
                "the checkpoint is incomplete: download it again",
            )
        if all((scale == 1).all() for scale in scales.values()):
            return {}
        gate, out = scales["gate_scale"], scales["out_scale"]
        return {"gate": gate, "up": gate, "down": out / gate}

    def _beside(self, what: str) -> Parts:
        """The parts of a small tensor beside the layer's experts, such as the router."""
        return self._match.beside.get(self.number, {}).get(what, {})

    def small_tensor(self, name: str | None) -> NDArray[np.float32] | None:
        """A whole small tensor as float32; None if there is none, or it is not stored as plain floats."""
        if name is None:
            return None
        info = self._checkpoint.info(name)
        if info.dtype not in plain.NAMES or not info.shape or not info.nbytes:
            return None
        return plain.decode({"weight": self._checkpoint.rows(info, 0, info.shape[0])}, 0, info.shape[0])

    def info(self, name: str) -> TensorInfo:
        """The position, dtype and shape of a tensor of the layer's checkpoint."""
        return self._checkpoint.info(name)

    def chunks(self, info: TensorInfo, size: int) -> Iterator[bytes]:
        """As `Checkpoint.chunks`, from the layer's checkpoint."""
        return self._checkpoint.chunks(info.name, size)

    def open_tensor(self, parts: Sequence[Parts], inputs_first: bool) -> list[tuple[list[Infos], Stored]]:
        """For each entry of `parts`, the slices of its stored tensor and how they are decoded.

        A quantiser may leave some experts as they were, or give them other bits. `inputs_first` is as in `open_stored`.
        Raises ModelUnreadable if an entry's matrix has another shape or dtype than the first one's, or lacks a part
        that others have.
        """
        try:
            return self._open_parts(parts, inputs_first)
        except UnknownFormat:
            # a part that only one expert lacks is a gap in the checkpoint, not an unknown format
            for expert, entry in enumerate(parts):
                if wider := next((other for other in parts if other.keys() > entry.keys()), None):
                    part, name = min(wider.keys() - entry.keys()), weight_of(entry)
                    raise ModelUnreadable(
                        f"layer {self.number}: expert {expert} lacks the {part} that belongs to {name}",
                        "the checkpoint is incomplete: download it again",
                    ) from None
            raise

    def _open_parts(self, parts: Sequence[Parts], inputs_first: bool) -> list[tuple[list[Infos], Stored]]:
        slices, first = find_slices(self._checkpoint, parts[0]), self._open_stored(parts[0], inputs_first)
        opened, first_outline = [(slices, first)], outline(slices[0])
        for entry in parts[1:]:
            slices = find_slices(self._checkpoint, entry)
            if all(outline(infos) == first_outline for infos in slices):
                opened.append((slices, first))  # to recognise the entry would take reading some of its parts
                continue
            stored = self._open_stored(entry, inputs_first)
            are_alike = stored.shape == first.shape and stored.transposed == first.transposed
            if stored.codec != first.codec and not {*stored.rows_per_row, *first.rows_per_row} - {"weight"}:
                are_alike = False  # no quantiser leaves two formats without scales
            elif stored.codec != first.codec and UNSCALED in (stored.codec, first.codec):
                raise UnknownFormat("FP8 with and without scales")  # `open_tensor` names the gap
            elif stored.codec == first.codec and PRE_QUANT_SCALE in {*stored.rows_per_row} ^ {*first.rows_per_row}:
                raise UnknownFormat("inputs that are scaled only for some experts")  # the same
            if not are_alike:
                name = weight_of(entry)
                this, that = (f"{kind.codec} {list(kind.plain_shape)}" for kind in (stored, first))
                raise ModelUnreadable(
                    f"{name} is {this}, but the first expert's is {that}: all must be stored the same way"
                )
            opened.append((slices, stored))
        return opened

    def _open_stored(self, parts: Parts, inputs_first: bool) -> Stored:
        try:
            return open_stored(self._checkpoint, parts, self._config.quantization(module_of(parts)), inputs_first)[1]
        except OtherInputs as error:
            raise DoesNotFit(error.message, error.hint) from None

    def read_rows(
        self, infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
    ) -> NDArray[np.float32]:
        """As `read_rows` of stored.py, from the layer's checkpoint."""
        return read_rows(self._checkpoint, infos, stored, rows, start, stop, index)


class ExpertTensor:
    """One stored tensor of a layer's layout, for all experts.

    `parts` has one entry per expert, or a single entry if one tensor holds all experts.
    """

    def __init__(self, layer: ExpertLayer, spec: StoredTensor, parts: Sequence[Parts]) -> None:
        self.layer = layer
        self.spec = spec
        self.parts = parts

    @cached_property
    def _opened(self) -> list[tuple[list[Infos], Stored]]:
        inputs_first = _output_axis(self.spec.roles[0]) not in self.spec.axes.groups[0]
        opened, name = self.layer.open_tensor(self.parts, inputs_first), weight_of(self.parts[0])
        if len({len(slices) for slices, _ in opened}) > 1 or (len(opened[0][0]) > 1 and len(self.spec.roles) > 1):
            raise UnknownFormat(f"{name} is cut into {len(opened[0][0])} slices in a way that we don't know")
        if self.spec.axes.flattened and opened[0][1].transposed:
            raise UnknownFormat(f"{name}: {opened[0][1].codec} of several experts in one tensor")
        if self.spec.axes.flattened and inputs_first and PRE_QUANT_SCALE in opened[0][1].rows_per_row:
            raise UnknownFormat(f"{name}: the {PRE_QUANT_SCALE} of several experts in one tensor")
        return opened

    @cached_property
    def _readable(self) -> list[tuple[list[Infos], Stored]]:
        """The opened tensors; raises UnknownFormat if a block of scales may span both gate and up.

        If the two were fused before they were quantised, a block may span both. If they were fused afterwards, the
        blocks of gate end with it. If the number of blocks is the same in both cases, the shapes do not show which.
        """
        half, rest = divmod(self.stored.shape[-2], 2)
        is_halved = self.spec.axes.groups[0] == ("2", "I") and not self.stored.transposed and not rest
        kinds = {id(stored): (slices, stored) for slices, stored in self._opened}
        for slices, stored in kinds.values() if is_halved else ():
            grids = [part for part in stored.rows_per_row if part != "weight" and len(slices[0][part].shape) > 1]
            for part in grids:
                span = stored.rows_per_row[part]
                if span and half % span and 2 * -(-half // span) == -(-2 * half // span):
                    name = slices[0][part].name
                    raise UnknownFormat(
                        f"{name}: a block of {int(span)} rows may span both gate and up, or end between them"
                    )
        return self._opened

    @property
    def stored(self) -> Stored:
        """How the tensor, or each slice of it, is stored; the shape includes the experts' axis if they are stacked."""
        return self._opened[0][1]

    @property
    def codecs(self) -> tuple[str, ...]:
        """The names of the formats of all experts, nearly always one."""
        return tuple(dict.fromkeys(stored.codec for _, stored in self._opened))

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape of the joined slices, stored as plain numbers."""
        shape, count = self.stored.plain_shape, len(self._opened[0][0])
        axes = [*[()] * len(shape), *self.spec.axes.groups][2:]  # axes before the last two are not cut into slices
        return tuple(length * (count if "I" in group else 1) for length, group in zip(shape, axes, strict=True))

    def infos(self) -> Iterator[TensorInfo]:
        """All tensors in the files that the stored tensor consists of."""
        return (info for slices, _ in self._opened for infos in slices for info in infos.values())

    @property
    def place(self) -> tuple[str, str]:
        """The name of its layer, such as "model.layers.3", and the name of its plain weight below the layer.

        The latter has {expert} in place of an expert's number.
        """
        if self.layer.has_shared_last:
            raise UnknownFormat(f"{weight_of(self.parts[0])} also holds the shared expert, and can't be replaced")
        if self.layer.factors:
            raise UnknownFormat(
                f"{weight_of(self.parts[0])} has separate factors for each expert, and can't be replaced"
            )
        layer, name = split_name(weight_of(self.parts[0]))
        template = max((template for template in self.spec.names if name.startswith(template)), key=len)
        return layer, f"{template}.weight" if name.startswith(f"{template}.") else template

    @property
    def rows(self) -> int:
        """The number of stored rows per expert."""
        return self._length(self._groups[0])

    @property
    def columns(self) -> int:
        """The number of stored columns per expert."""
        return self._length(self._groups[1])

    @property
    def _groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The canonical axes that the rows and the columns stand for after decoding."""
        first, second = self.spec.axes.groups
        return (second, first) if self.stored.transposed else (first, second)

    def is_turned(self, role: str) -> bool:
        """Whether a stored row of this role runs along its outputs, instead of its inputs."""
        return _output_axis(role) not in self._groups[0]

    def _length(self, group: tuple[str, ...]) -> int:
        return prod(2 if letter == "2" else self.layer.sizes[letter] for letter in group)

    def windows(self, values: int, experts: int | None = None) -> list[Range]:
        """Consecutive ranges of stored rows that cover an expert.

        Over all experts, or the given number of them, the rows of a range have about `values` numbers at most.
        """
        step = values // ((experts or self.layer.count) * self.columns)
        block = self.stored.granule
        # a range of whole blocks reads each scale once; only a block that is larger than a range is cut
        step = step // block * block if step >= block else max(step, min(8, block))
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """One expert's matrices in this tensor by role, float32 in canonical form."""
        result = {role: np.empty(self.layer.shape(role), np.float32) for role in self.spec.roles}
        for window in self.windows(MATRIX_WINDOW, 1):
            for piece in self.read([expert], *window):
                result[piece.role][piece.index] = piece.values[0]
        return result

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert in this tensor by role, float32 [out]; {} if it has none.

        The biases of gate and up are stored in the same order as the matrices' outputs. Raises ModelUnreadable for
        another shape.
        """
        stacked = self.spec.axes.stacked
        name = self.parts[0 if stacked else expert].get(BIAS)
        values = self.layer.small_tensor(name)
        if values is None:
            return {}
        roles = self.spec.roles
        length = sum(self.layer.shape(role)[0] for role in roles)
        expected = (self.layer.count, length) if stacked else (length,)
        if self.layer.has_shared_last:
            values = values[: self.layer.count]
        if values.shape != expected:
            raise ModelUnreadable(f"{name} is {list(values.shape)}, expected {list(expected)}")
        values = values[expert] if stacked else values
        if len(roles) == 1:
            return {roles[0]: values}
        in_turns = ("I", "2") in self.spec.axes.groups
        size = len(values) // 2
        return {
            role: values[half::2] if in_turns else values[half * size : (half + 1) * size]
            for half, role in enumerate(roles)
        }

    def read(self, experts: Sequence[int], start: int, stop: int) -> list[Piece]:
        """Stored rows [start, stop) of the given experts, decoded and split by role."""
        values = np.empty((len(experts), stop - start, self.columns), np.float32)
        for place, expert in enumerate(experts):
            values[place] = self._read_expert(expert, start, stop)
        pieces = list(self._cut(values, start))
        for piece in pieces if self.layer.factors else ():
            piece.values[:] *= self.layer.factors[piece.role][list(experts), None, None]
        return pieces

    def _read_expert(self, expert: int, start: int, stop: int) -> NDArray[np.float32]:
        """Stored rows [start, stop) of one expert, float32 [rows, columns]."""
        stacked = self.spec.axes.stacked
        slices, stored = self._readable[0 if stacked else expert]
        read = partial(self.layer.read_rows, index=expert if stacked else 0)
        if len(slices) == 1:
            return read(slices[0], stored, self.rows, start, stop)
        # slices are cut along the intermediate axis: they lie side by side, or one below the other
        if "I" in self._groups[1]:
            return np.concatenate([read(infos, stored, self.rows, start, stop) for infos in slices], axis=1)
        rows = self.rows // len(slices)
        ranges = [(max(0, start - i * rows), min(rows, stop - i * rows)) for i in range(len(slices))]
        parts = zip(slices, ranges, strict=True)
        return np.concatenate([read(infos, stored, rows, low, high) for infos, (low, high) in parts if low < high])

    def byte_ranges(self, expert: int, start: int, stop: int) -> Iterator[tuple[str, Range]]:
        """The byte ranges, each with its file's name, that must be read for rows [start, stop) of an expert."""
        stacked = self.spec.axes.stacked
        slices, stored = self._readable[0 if stacked else expert]
        for infos in slices:
            for info, low, high, leading in find_rows(infos, stored, self.rows, start, stop, expert if stacked else 0):
                if len(slices) > 1 or high is None:
                    yield info.file, (info.start, info.stop)
                else:
                    yield info.file, Checkpoint.row_range(info, low, high, leading)

    @property
    def has_neurons_as_rows(self) -> bool:
        """Whether a neuron's weights are a stored row, instead of a column."""
        return "I" in self._groups[0]

    def neurons(self, count: int) -> list[Range]:
        """The ranges of stored rows that hold the first `count` neurons of an expert.

        If neurons are columns, the rows hold the same fraction of the weights of every neuron, or slightly less.
        """
        rows, first, size = self.rows, self._groups[0], self.layer.sizes["I"]
        if first == ("2", "I"):
            return [(0, count), (size, size + count)]
        if first == ("I", "2"):
            return [(0, 2 * count)]
        return [(0, max(1, rows * count // size))]

    def _cut(self, values: NDArray[np.float32], start: int) -> Iterator[Piece]:
        """Split stored rows, of which `start` is the first one, into the pieces of each role, in canonical form."""
        first, second = self._groups
        size, stop = self.layer.sizes["I"], start + values.shape[1]
        for half, role in enumerate(self.spec.roles):
            rows, columns = slice(start, stop), slice(None)
            if first == ("2", "I"):
                low, high = max(start, half * size), min(stop, (half + 1) * size)
                if low >= high:
                    continue
                block, rows = values[:, low - start : high - start], slice(low - half * size, high - half * size)
            elif first == ("I", "2"):
                # the rows may start or end between a gate and its up
                low, high = -(-(start - half) // 2), -(-(stop - half) // 2)
                block, rows = values[:, 2 * low + half - start :: 2], slice(low, high)
            elif second == ("2", "I"):
                block = values[:, :, half * size : (half + 1) * size]
            elif second == ("I", "2"):
                block = values[:, :, half::2]
            else:
                block = values
            if _output_axis(role) in first:
                yield Piece(role, (rows, columns), block)
            else:
                yield Piece(role, (columns, rows), block.transpose(0, 2, 1))


def _output_axis(role: str) -> str:
    """The axis that a role's outputs run along: I, intermediate, or H, hidden."""
    return "H" if role == "down" else "I"


def stored_rows(spec: StoredTensor, matrices: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The rows [rows, columns] of one expert in a stored tensor, from its matrices by role: the inverse of `_cut`."""
    first, second = spec.axes.groups
    axis = 0 if "I" in first else 1
    turned = [matrices[role] if _output_axis(role) in first else matrices[role].T for role in spec.roles]
    if len(turned) == 1:
        return turned[0]
    if ("2", "I") in (first, second):
        return np.concatenate(turned, axis)
    rows, columns = turned[0].shape
    return np.stack(turned, axis + 1).reshape((2 * rows, columns) if axis == 0 else (rows, 2 * columns))
