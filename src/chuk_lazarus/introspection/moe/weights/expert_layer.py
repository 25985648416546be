"""The experts of one layer as matrices in canonical form, read only when asked for.

Canonical form: `y = W x`, float32; gate and up are [intermediate, hidden], down is [hidden, intermediate]. Biases are
never part of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable, UnknownFormat
from ..progress import Progress
from ..terms import ROLES
from .checkpoint import Checkpoint, TensorInfo
from .codecs import Stored
from .layouts import Layout, LayoutMatch, Parts, StoredTensor, split_name
from .repositories.source import Range
from .stored import BIAS, Infos, find_rows, find_slices, open_stored, outline, read_rows

MATRIX_WINDOW = 4_000_000  # weights of one expert decoded at a time
MAX_EXPERTS = 4096  # of a layer: twice as many as any published; products of all pairs of them are taken
MAX_SIDE = 2**17  # of a matrix: twice as long as any published; hundreds of rows are compared with all others


@dataclass(frozen=True, slots=True)
class Piece:
    """The same cut-out of one role's matrix in several experts.

    `values` is float32 [experts, rows, columns]; `index` says where in the canonical matrix it belongs.
    """

    role: str
    index: tuple[slice, slice]
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Router:
    """A router's weight [experts, hidden], its bias and what corrects its choice, [experts] each, where it has them."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    correction: NDArray[np.float32] | None


class DoesNotFit(UnknownFormat):
    """The stored shapes are not those of the layout."""


class ExpertLayer:
    """The routed experts of one MoE layer.

    `expected` says how many there should be, by who says so (None where it does not); `tensors` are the stored tensors,
    each of which holds one role or two.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        match: LayoutMatch,
        number: int,
        expected: Mapping[str, int | None],
        quantization: Mapping[str, Any],
        one_plus_norm: bool = False,
    ) -> None:
        self.number = number
        self._one_plus_norm = one_plus_norm
        self.expected = {source: count for source, count in expected.items() if count is not None}
        self._checkpoint = checkpoint
        self._match = match
        self._quantization = quantization

    @property
    def layout(self) -> Layout:
        return self._match.layout

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of experts E, the intermediate size I and the hidden size H."""
        shapes = {tensor.spec.role: tensor.plain_shape for tensor in self.tensors}
        experts = None if self.layout.is_stacked else len(self.tensors[0].parts)  # 1 in a dense layer
        if self.layout.is_flattened:
            experts = next(reversed(self.expected.values()), None)  # the router's, if there is one
        sizes = self.layout.solve(shapes, experts)
        if sizes is None:
            listing = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
            raise DoesNotFit(f"layer {self.number}: expert tensors {listing} do not fit layout {self.layout.name}")
        if sizes["E"] > MAX_EXPERTS or max(sizes["I"], sizes["H"]) > MAX_SIDE:
            raise UnknownFormat(
                f"layer {self.number} has {sizes['E']} experts of {sizes['I']} x {sizes['H']}",
                f"we read up to {MAX_EXPERTS} experts of up to {MAX_SIDE} x {MAX_SIDE}",
            )
        for source, count in self.expected.items():
            if sizes["E"] != count:
                raise ModelUnreadable(
                    f"layer {self.number} has {sizes['E']} experts, and {source} says {count}",
                    "the checkpoint is incomplete, or this is said of another model",
                )
        return sizes

    @property
    def count(self) -> int:
        return self.sizes["E"]

    @property
    def roles(self) -> tuple[str, ...]:
        found = {role for tensor in self.layout.tensors for role in tensor.roles}
        return tuple(role for role in ROLES if role in found)

    def shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrix."""
        hidden, intermediate = self.sizes["H"], self.sizes["I"]
        return (hidden, intermediate) if role == "down" else (intermediate, hidden)

    @cached_property
    def tensors(self) -> tuple["ExpertTensor", ...]:
        """The stored tensors; raises ModelUnreadable, naming it, when an expert or a role is missing."""
        found = self._match.layers[self.number]
        for tensor in self.layout.tensors:
            if tensor.role not in found:
                raise ModelUnreadable(
                    f"layer {self.number} lacks its {tensor.role} projections ({tensor.leaf})",
                    "the checkpoint is incomplete: download it again",
                )
        if self.layout.is_single:
            return tuple(ExpertTensor(self, tensor, [found[tensor.role][None]]) for tensor in self.layout.tensors)
        numbers = {expert for experts in found.values() for expert in experts if expert is not None}
        everyone = range(max(max(numbers) + 1 - len(self.left_out), *self.expected.values(), 0))
        for role, experts in found.items():
            missing = next((expert for expert in everyone if expert not in experts), None)
            if missing is not None:
                raise ModelUnreadable(
                    f"layer {self.number} lacks the {role} projection of expert {missing}",
                    "the checkpoint is incomplete: download it again",
                )
        return tuple(
            ExpertTensor(self, tensor, [found[tensor.role][expert] for expert in everyone])
            for tensor in self.layout.tensors
        )

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """The experts beyond those that the config counts, where they are of another kind: identity experts, which have
        no down projection, or those of another modality, which have another size."""
        found = self._match.layers[self.number]
        count, down = self.expected.get(self._checkpoint.config_file, 0), found.get("down", {})
        others = sorted({e for experts in found.values() for e in experts if e is not None and e >= count > 0})
        if (
            not others
            or 0 not in down
            or any(e in down and self._shapes(down[e]) == self._shapes(down[0]) for e in others)
        ):
            return ()
        return tuple(others)

    def _shapes(self, parts: Parts) -> set[tuple[int, ...]]:
        return {self._checkpoint.info(name).shape for name in parts.values()}

    @property
    def storage(self) -> str:
        """The storage format, or formats, of the matrices."""
        return "+".join(dict.fromkeys(tensor.stored.codec for tensor in self.tensors))

    @property
    def parameters(self) -> int:
        """How many weights the routed experts have."""
        return self.count * sum(prod(self.shape(role)) for role in self.roles)

    @property
    def stored_bytes(self) -> int:
        """What the routed experts' matrices occupy in the files, scales included and biases not."""
        return sum(info.nbytes for tensor in self.tensors for info in tensor.infos())

    @property
    def is_at_hand(self) -> bool:
        """Whether the headers that describe the layer have been read already."""
        found = self._match.layers[self.number]
        parts = (parts for experts in found.values() for parts in experts.values())
        return all(self._checkpoint.is_at_hand(name) for each in parts for name in each.values())

    def prefetch(self, progress: Progress, ranges: Iterable[tuple[str, Range]] | None = None) -> None:
        """Bring all the layer's experts, or the given byte ranges of files, near in few, long reads."""
        if ranges is None:
            ranges = ((info.file, (info.start, info.stop)) for tensor in self.tensors for info in tensor.infos())
        self._checkpoint.prefetch(ranges, progress)

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """All matrices of one expert by role, float32 in canonical form."""
        return {role: matrix for tensor in self.tensors for role, matrix in tensor.matrices(expert).items()}

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role, float32 [out]; {} where the experts have none."""
        return {role: bias for tensor in self.tensors for role, bias in tensor.biases(expert).items()}

    def router(self) -> Router | None:
        """The router of the layer; None where none is known."""
        parts = self._beside("router")
        weight = self.vectors(parts.get("weight"))
        if weight is None or weight.shape != (self.count, self.sizes["H"]):
            return None
        correction = self.vectors(next(iter(self._beside("correction").values()), None))
        found = (self.vectors(parts.get("bias")), correction)
        bias, correction = (one if one is None else one.reshape(-1) for one in found)
        if any(one is not None and len(one) != self.count for one in (bias, correction)):
            return None
        return Router(weight, bias, correction)

    def norm(self) -> NDArray[np.float32] | None:
        """What the norm before the experts multiplies by, [hidden]; None where no such norm is known."""
        weight = self.vectors(self._beside("norm").get("weight"))
        if weight is None or weight.shape != (self.sizes["H"],):
            return None
        return weight + np.float32(1.0) if self._one_plus_norm else weight

    def _beside(self, what: str) -> Parts:
        return self._match.beside.get(self.number, {}).get(what, {})

    def vectors(self, name: str | None) -> NDArray[np.float32] | None:
        """A small tensor beside the experts, whole, as float32; None where there is none, or not of plain numbers."""
        if name is None:
            return None
        info = self._checkpoint.info(name)
        if info.dtype not in ("BF16", "F16", "F32", "F64") or not info.shape or not info.nbytes:
            return None
        return self._checkpoint.rows(info, 0, info.shape[0]).astype(np.float32)

    def open_tensor(self, parts: Sequence[Parts]) -> list[tuple[list[Infos], Stored]]:
        """The slices of a stored tensor for each of its parts, and how they are decoded."""
        _, first = open_stored(self._checkpoint, parts[0], self._quantization)
        slices = find_slices(self._checkpoint, parts[0])
        opened, alike = [(slices, first)], outline(slices[0])
        for own in parts[1:]:
            slices = find_slices(self._checkpoint, own)
            if all(outline(infos) == alike for infos in slices):
                opened.append((slices, first))  # which spares reading what would be needed to recognise it
                continue
            _, stored = open_stored(self._checkpoint, own, self._quantization)
            if stored.shape != first.shape or stored.codec != first.codec:
                name = next(iter(slices[0].values())).name
                one, other = (f"{each.codec} {list(each.plain_shape)}" for each in (stored, first))
                raise ModelUnreadable(f"{name} is {one}, and the first expert's is {other}: they must be stored alike")
            opened.append((slices, stored))
        return opened

    def read_rows(
        self, infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
    ) -> NDArray[np.float32]:
        return read_rows(self._checkpoint, infos, stored, rows, start, stop, index)


class ExpertTensor:
    """One stored tensor of a layer, for all experts.

    `parts` has one entry per expert, or a single one where one tensor holds them all.
    """

    def __init__(self, layer: ExpertLayer, spec: StoredTensor, parts: Sequence[Parts]) -> None:
        self.layer = layer
        self.spec = spec
        self.parts = parts

    @cached_property
    def _opened(self) -> list[tuple[list[Infos], Stored]]:
        opened = self.layer.open_tensor(self.parts)
        if len({len(slices) for slices, _ in opened}) > 1 or (len(opened[0][0]) > 1 and len(self.spec.roles) > 1):
            name = next(iter(self.parts[0].values()))
            raise UnknownFormat(f"{name} is cut into {len(opened[0][0])} slices in a way that we don't know")
        if self.spec.axes.flattened and opened[0][1].transposed:
            raise UnknownFormat(f"{next(iter(self.parts[0].values()))}: {opened[0][1].codec} of several experts in one")
        return opened

    @cached_property
    def _readable(self) -> list[tuple[list[Infos], Stored]]:
        """The opened tensors; raises UnknownFormat where a block of scales may reach over gate and up, or not, because
        they were fused once they had scales of their own."""
        slices, stored = self._opened[0]
        halved = self.spec.axes.groups[0] == ("2", "I") and not stored.transposed
        half, rest = divmod(stored.shape[-2], 2)
        grids = [part for part in stored.rows_per_row if part != "weight" and len(slices[0][part].shape) > 1]
        for part in grids if halved and not rest else ():
            span = stored.rows_per_row[part]
            if span and span == int(span) and half % span and 2 * -(-half // span) == -(-2 * half // span):
                name = slices[0][part].name
                raise UnknownFormat(f"{name}: a block of {span} rows may reach over gate and up, or end between them")
        return self._opened

    @property
    def stored(self) -> Stored:
        """How it is stored, a slice of it where it is cut; the shape includes the experts' axis if they are stacked."""
        return self._opened[0][1]

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """The shape that it has as plain numbers, its slices put together."""
        shape, count = self.stored.plain_shape, len(self._opened[0][0])
        axes = [*[()] * len(shape), *self.spec.axes.groups][2:]  # those before the last two are not cut
        return tuple(length * (count if "I" in group else 1) for length, group in zip(shape, axes, strict=True))

    def infos(self) -> Iterator[TensorInfo]:
        """Every tensor of the files that it consists of."""
        return (info for slices, _ in self._opened for infos in slices for info in infos.values())

    @property
    def place(self) -> tuple[str, str]:
        """Its layer, such as "model.layers.3", and the name there of a plain weight, with {expert} for the number."""
        layer, name = split_name(next(iter(self.parts[0].values())))
        template = max((one for one in self.spec.names if name.startswith(one)), key=len)
        return layer, f"{template}.weight" if name.startswith(f"{template}.") else template

    @property
    def rows(self) -> int:
        """The number of stored rows per expert."""
        return self._length(self._groups[0])

    @property
    def columns(self) -> int:
        return self._length(self._groups[1])

    @property
    def _groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the rows and the columns are that decoding gives."""
        first, second = self.spec.axes.groups
        return (second, first) if self.stored.transposed else (first, second)

    def _length(self, group: tuple[str, ...]) -> int:
        return prod(2 if letter == "2" else self.layer.sizes[letter] for letter in group)

    def windows(self, values: int, experts: int | None = None) -> list[Range]:
        """Runs of stored rows that cover an expert, each with at most about `values` numbers over all, or so many,
        experts."""
        step = values // ((experts or self.layer.count) * self.columns)
        block = self.stored.granule
        # whole blocks of rows that share a scale where they fit; else each piece of one reads the scale again
        step = step // block * block if step >= block else max(step, min(8, block))
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def matrices(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of one expert that this tensor holds, by role, float32 in canonical form."""
        result = {role: np.empty(self.layer.shape(role), np.float32) for role in self.spec.roles}
        for window in self.windows(MATRIX_WINDOW, 1):
            for piece in self.read([expert], *window):
                result[piece.role][piece.index] = piece.values[0]
        return result

    def biases(self, expert: int) -> dict[str, NDArray[np.float32]]:
        """The bias vectors of one expert by role: laid out along the stored outputs, gates and ups as in the matrix."""
        stacked = self.spec.axes.stacked
        name = self.parts[0 if stacked else expert].get(BIAS)
        values = self.layer.vectors(name)
        if values is None:
            return {}
        roles = self.spec.roles
        length = sum(self.layer.shape(role)[0] for role in roles)
        wanted = (self.layer.count, length) if stacked else (length,)
        if values.shape != wanted:
            raise ModelUnreadable(f"{name} is {list(values.shape)}, expected {list(wanted)}")
        values = values[expert] if stacked else values
        if len(roles) == 1:
            return {roles[0]: values}
        turns = ("I", "2") in self.spec.axes.groups
        size = len(values) // 2
        return {
            role: values[half::2] if turns else values[half * size : (half + 1) * size]
            for half, role in enumerate(roles)
        }

    def read(self, experts: Sequence[int], start: int, stop: int) -> list[Piece]:
        """Stored rows [start, stop) of the given experts, decoded and cut by role."""
        values = np.empty((len(experts), stop - start, self.columns), np.float32)
        for place, expert in enumerate(experts):
            values[place] = self._read_expert(expert, start, stop)
        return list(self._cut(values, start))

    def _read_expert(self, expert: int, start: int, stop: int) -> NDArray[np.float32]:
        """Stored rows [start, stop) of one expert; slices are cut along its intermediate axis."""
        stacked = self.spec.axes.stacked
        slices, stored = self._readable[0 if stacked else expert]
        read = partial(self.layer.read_rows, index=expert if stacked else 0)
        if len(slices) == 1:
            return read(slices[0], stored, self.rows, start, stop)
        if "I" in self._groups[1]:
            return np.concatenate([read(infos, stored, self.rows, start, stop) for infos in slices], axis=1)
        rows = self.rows // len(slices)
        ranges = [(max(0, start - i * rows), min(rows, stop - i * rows)) for i in range(len(slices))]
        return np.concatenate(
            [read(infos, stored, rows, *own) for infos, own in zip(slices, ranges, strict=True) if own[0] < own[1]]
        )

    def byte_ranges(self, expert: int, start: int, stop: int) -> Iterator[tuple[str, Range]]:
        """The byte ranges, each with its file's name, that stored rows [start, stop) of an expert are read from."""
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
        """Whether a neuron's vector is a stored row, and not a column."""
        return "I" in self._groups[0]

    def neurons(self, count: int) -> list[Range]:
        """The stored rows that hold the first `count` neurons of an expert; where neurons are columns, as many rows as
        hold no more than the same share of every neuron."""
        rows, first, size = self.rows, self._groups[0], self.layer.sizes["I"]
        if first == ("2", "I"):
            return [(0, count), (size, size + count)]
        if first == ("I", "2"):
            return [(0, 2 * count)]
        return [(0, max(1, rows * count // size))]

    def _cut(self, values: NDArray[np.float32], start: int) -> Iterator[Piece]:
        """Cut stored rows, from `start` on, into the pieces of each role, in canonical orientation."""
        first, second = self._groups
        size, stop, everything = self.layer.sizes["I"], start + values.shape[1], slice(None)
        for half, role in enumerate(self.spec.roles):
            rows, columns = slice(start, stop), everything
            if first == ("2", "I"):
                low, high = max(start, half * size), min(stop, (half + 1) * size)
                if low >= high:
                    continue
                cut, rows = values[:, low - start : high - start], slice(low - half * size, high - half * size)
            elif first == ("I", "2"):
                # a window may start or end between a gate and its up
                low, high = -(-(start - half) // 2), -(-(stop - half) // 2)
                cut, rows = values[:, 2 * low + half - start :: 2], slice(low, high)
            elif second == ("2", "I"):
                cut = values[:, :, half * size : (half + 1) * size]
            elif second == ("I", "2"):
                cut = values[:, :, half::2]
            else:
                cut = values
            out = "H" if role == "down" else "I"
            yield (
                Piece(role, (rows, columns), cut)
                if out in first
                else Piece(role, (columns, rows), cut.transpose(0, 2, 1))
            )


def stored_rows(spec: StoredTensor, matrices: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The rows [rows, columns] that a stored tensor has for one expert, from its matrices by role: undoes `_cut`."""
    first, second = spec.axes.groups
    axis = 0 if "I" in first else 1
    turned = [matrices[role] if ("H" if role == "down" else "I") in first else matrices[role].T for role in spec.roles]
    if len(turned) == 1:
        return turned[0]
    if ("2", "I") in (first, second):
        return np.concatenate(turned, axis)
    rows, columns = turned[0].shape
    return np.stack(turned, axis + 1).reshape((2 * rows, columns) if axis == 0 else (rows, 2 * columns))
