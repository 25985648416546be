"""The attention projections of a model, layer by layer, and its token embeddings, read on demand.

In canonical form `y = W x`, float32, as for experts. Biases are not part of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest, MoEError, UnknownFormat
from ..progress import Progress, no_progress
from ..text import format_ranges
from .checkpoint import Checkpoint
from .codecs import Stored
from .expert_layer import MATRIX_WINDOW, MAX_SIDE
from .layouts import (
    AttentionLayout,
    AttentionMatch,
    Parts,
    ProjectionTensor,
    has_feature,
    load_attention_table,
    match_attention,
    match_embeddings,
)
from .repositories.source import Range
from .stored import Infos, find_rows, find_slices, module_of, open_stored, read_rows, weight_of

NOT_FINITE = "is not finite"  # of a projection that is left out


@dataclass(frozen=True, slots=True)
class _Projection:
    """A stored tensor of an attention layer, opened.

    `shape` is that of the joined slices, stored as plain numbers.
    """

    spec: ProjectionTensor
    slices: list[Infos]
    stored: Stored

    @property
    def name(self) -> str:
        return weight_of(self.slices[0]).name

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.stored.plain_shape
        cut = self._cut_axis
        return tuple(length * (len(self.slices) if axis == cut else 1) for axis, length in enumerate(shape))

    @property
    def _cut_axis(self) -> int:
        """The plain axis along which slices are cut: the one that runs over heads."""
        return 0 if self.spec.groups[1] == ("H",) else 1

    def read(self, checkpoint: Checkpoint) -> NDArray[np.float32]:
        """The matrix of all slices, float32 [outputs, inputs]."""
        parts = []
        for infos in self.slices:
            rows, columns = self.stored.shape
            block = self.stored.granule
            step = max(MATRIX_WINDOW // columns // block * block, block)
            matrix = np.empty((rows, columns), np.float32)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                matrix[start:stop] = read_rows(checkpoint, infos, self.stored, rows, start, stop)
            parts.append(matrix.T if self.stored.transposed else matrix)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._cut_axis)
        return np.ascontiguousarray(whole.T if self.spec.is_transposed else whole)

    def ranges(self) -> Iterator[tuple[str, Range]]:
        return ((info.file, (info.start, info.stop)) for infos in self.slices for info in infos.values())


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """How the rows of several roles lie in one matrix: `count` times, one after the other, `lengths` rows of each.

    A role of None is left out.
    """

    roles: tuple[str | None, ...]
    count: int
    lengths: tuple[int, ...]

    def cut(self, matrix: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The matrix of each role, from that of all."""
        repeated = matrix.reshape(self.count, sum(self.lengths), matrix.shape[1])
        found, start = {}, 0
        for role, length in zip(self.roles, self.lengths, strict=True):
            if role is not None:
                found[role] = repeated[:, start : start + length].reshape(-1, matrix.shape[1])
            start += length
        return found


class _DoesNotFit(Exception):
    """Why a layer's tensors do not fit a row of the table."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read of a layer: its tensors, how fused ones are cut, and the heads of q and k in rotary pairs."""

    projections: tuple[_Projection, ...] = ()
    arrangements: Mapping[str, _Arrangement] = field(default_factory=dict)
    rotary_head: int | None = None


class Attention:
    """The attention projections of one stack of layers, such as `Experts.stack`.

    `layers` are the numbers of the layers that have attention under names of the layout table, those for multi-token
    prediction included. Whether the tensors fit is seen when a layer is first read, for that takes the headers of its
    files. `notes` are sentences on what can't be read, and why.

    The roles are q, k, v and o; with latent attention q or q_a and q_b, kv_a, kv_b and o. A layer may lack some.
    """

    def __init__(self, checkpoint: Checkpoint, stack: str) -> None:
        self.checkpoint = checkpoint
        self.stack = stack
        self._config = checkpoint.model_config.stack(stack)
        self._matches = match_attention(checkpoint.names, stack)
        self._plans: dict[int, _Plan] = {}
        self._notes: dict[str, list[int]] = {}
        self.layers = tuple(sorted(number for number, match in self._matches.items() if _has_attention(match)))
        for number in sorted(self._matches.keys() - set(self.layers)):
            other = self._matches[number].other
            what = f", but {_below_layer(other)}" if other else ""
            self._note(number, f"no attention projections with names that we know{what}")
        if not self._matches:
            self._notes[f"there is no stack of layers named {stack or '(no name)'}"] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each reason; reading a layer may add to them."""
        return tuple(
            f"layer{'s' if len(layers) > 1 else ''} {format_ranges(layers)}: {reason}" if layers else reason
            for reason, layers in self._notes.items()
        )

    def matrices(self, layer: int) -> dict[str, NDArray[np.float32]]:
        """The projections of a layer by role, float32 in canonical form.

        q is [heads * size of a head, hidden], k and v [key heads * size, hidden], o [hidden, heads * size]. Roles that
        can't be read, or are not finite, are left out, with a note. Raises InvalidRequest for a layer without
        attention, ModelUnreadable where bytes are missing.
        """
        plan = self._plan(layer)
        found: dict[str, NDArray[np.float32]] = {}
        for projection in plan.projections:
            matrix = projection.read(self.checkpoint)
            arrangement = plan.arrangements.get(projection.spec.role)
            found |= {projection.spec.role: matrix} if arrangement is None else arrangement.cut(matrix)
        if plan.rotary_head is not None:
            for role in found.keys() & {"q", "k"}:
                found[role] = _to_halves(found[role], plan.rotary_head)
        order = ("q", "q_a", "q_b", "k", "v", "kv_a", "kv_b", "o")
        for role in [role for role, matrix in found.items() if not np.isfinite(matrix).all()]:
            del found[role]
            self._note(layer, f"{role} {NOT_FINITE}: left out")
        return {role: found[role] for role in order if role in found}

    def nbytes(self, layer: int) -> int:
        """The bytes in the files that reading a layer takes, scales included."""
        return sum(stop - start for _, (start, stop) in self.byte_ranges(layer))

    def storage(self, layer: int) -> str:
        """The names of the storage formats of a layer's projections, joined by +; "" where none can be read."""
        return "+".join(dict.fromkeys(projection.stored.codec for projection in self._plan(layer).projections))

    def byte_ranges(self, layer: int) -> list[tuple[str, Range]]:
        """The byte ranges, each with its file's name, that reading a layer takes."""
        return [place for projection in self._plan(layer).projections for place in projection.ranges()]

    def prefetch(self, layers: Iterable[int], progress: Progress = no_progress) -> None:
        """Fetch all projections of some layers in a few long requests."""
        self.checkpoint.prefetch([place for layer in layers for place in self.byte_ranges(layer)], progress)

    def _note(self, layer: int, reason: str) -> None:
        layers = self._notes.setdefault(reason, [])
        if layer not in layers:
            layers.append(layer)

    def _plan(self, layer: int) -> _Plan:
        if layer not in self.layers:
            listing = format_ranges(self.layers) or "none"
            raise InvalidRequest(
                f"layer {layer} has no attention that we can read", f"layers with attention: {listing}"
            )
        if layer not in self._plans:
            self._plans[layer] = self._make_plan(layer)
        return self._plans[layer]

    def _make_plan(self, layer: int) -> _Plan:
        """What is read of a layer: of the rows that hold for the model, the one with the most tensors that fits."""
        rows, table = self._matches[layer].rows, load_attention_table()
        model_type = self._config.model_type
        ranked = sorted(
            (row for row, places in rows.items() if _is_more_than_outputs(table[row], places)),
            key=lambda row: (-len(rows[row]), not table[row].model_types, row),
        )
        holding = [row for row in ranked if table[row].holds_for(model_type)]
        others = [row for row in ranked if row not in holding]
        if others and (not holding or len(rows[others[0]]) > len(rows[holding[0]])):
            place = next(place for place in rows[others[0]] if table[others[0]].tensors[place].role != "o")
            name = _below_layer(weight_of(rows[others[0]][place]))
            self._note(
                layer,
                f"the order of q, k and v in {name} is not known for model_type {model_type or '(none)'}: left out",
            )
        # a row that names the model type says how the tensors lie: where none of these fits, no other row may read them
        reasons = []
        for row in [row for row in holding if table[row].model_types] or holding[:1]:
            try:
                return self._open_row(layer, table[row], rows[row], [table[other] for other in others])
            except _DoesNotFit as error:
                reasons.append(str(error))
        for reason in reasons[:1]:
            self._note(layer, f"{reason}: left out")
        return self._open_outputs(layer)

    def _open_outputs(self, layer: int) -> _Plan:
        """The output projection of a layer whose other tensors can't be read, if its name is unambiguous."""
        for row, places in self._matches[layer].rows.items():
            layout = load_attention_table()[row]
            outputs = {place: parts for place, parts in places.items() if layout.tensors[place].role == "o"}
            if outputs and not layout.model_types:
                return self._open_row(layer, layout, outputs, ())
        return _Plan()

    def _open_row(
        self, layer: int, row: AttentionLayout, places: Mapping[int, Parts], others: Sequence[AttentionLayout]
    ) -> _Plan:
        """Open the tensors of a layer as a row says; raises _DoesNotFit where their shapes are others."""
        config = self._config.layer(layer)
        opened: dict[str, _Projection] = {}
        for place in sorted(places):
            spec = row.tensors[place]
            if spec.role not in opened:
                for name in places[place].values():
                    self.checkpoint.slices(name)  # a header that can't be read is not this layer's fault
                try:
                    opened[spec.role] = self._open(spec, places[place])
                except MoEError as error:
                    self._note(layer, f"{_below_layer(error.message)}: left out")
        sizes: dict[str, int] = {}
        for projection in opened.values():
            for group, length in zip(projection.spec.groups, projection.shape, strict=True):
                if len(group) == 1 and sizes.setdefault(group[0], length) != length:
                    listing = ", ".join(f"{role} {list(one.shape)}" for role, one in opened.items())
                    raise _DoesNotFit(f"the shapes {listing} do not fit together")
        heads = config.head_count(layer)
        arrangements = {}
        for role, projection in list(opened.items()):
            outputs = projection.spec.outputs
            if len(outputs) > 1:
                rows = projection.shape[projection.spec.is_transposed]
                arrangements[role] = _arrange(
                    _below_layer(projection.name), outputs, rows, sizes.get("O"), heads, config.head_size
                )
        if (
            "q" in opened
            and "kv_a" not in opened
            and (missing := [role for role in "kv" if role not in _roles(opened)])
        ):
            self._note(layer, f"no {' and '.join(missing)} of its own")
        # a gate beside each query is twice the rows: for a model type that is not listed with one, this is no guess
        if sizes.get("Q", 0) == 2 * sizes.get("O", 0) > 0 and "q" in opened and _may_be_gated(others):
            self._note(layer, f"{_below_layer(opened.pop('q').name)} may hold a gate beside q: left out")
        rotary_head = None
        if row.rotary_pairs or (self.checkpoint.is_gguf and has_feature(config.model_type, "gguf_rotary_pairs")):
            rotary_head = self._rotary_head(layer, opened, heads)
        return _Plan(tuple(opened.values()), arrangements, rotary_head)

    def _rotary_head(self, layer: int, opened: dict[str, _Projection], heads: int | None) -> int | None:
        """The rows of a head of q and k, which lie in rotary pairs; takes both out where they don't fit heads."""
        present = [opened[role] for role in ("q", "k") if role in opened]
        if not present:
            return None
        size, rest = divmod(opened["q"].shape[0], heads) if heads and "q" in opened else (0, 0)
        if not size or rest or size % 2 or any(projection.shape[0] % size for projection in present):
            for role in ("q", "k"):
                opened.pop(role, None)
            self._note(
                layer, f"the order of the rows of q and k depends on the number of heads, which is {heads}: left out"
            )
            return None
        return size

    def _open(self, spec: ProjectionTensor, parts: Parts) -> _Projection:
        """Open one stored tensor; raises UnknownFormat or ModelUnreadable, which names it."""
        settings = self._config.quantization(module_of(parts))
        _, stored = open_stored(self.checkpoint, parts, settings, spec.is_transposed)
        slices = find_slices(self.checkpoint, parts)
        name = weight_of(parts)
        shape = stored.plain_shape
        if len(shape) != 2 or not 0 < min(shape) <= max(shape) * len(slices) <= MAX_SIDE:
            raise UnknownFormat(f"{name} has shape {list(shape)}, which is not a projection")
        if len(slices) > 1 and (spec.is_transposed or max(map(len, spec.groups)) > 1 or "H" not in spec.axes):
            raise UnknownFormat(f"{name} is cut into {len(slices)} slices in a way that we don't know")
        return _Projection(spec, slices, stored)


def _has_attention(match: AttentionMatch) -> bool:
    return any(_is_more_than_outputs(load_attention_table()[row], places) for row, places in match.rows.items())


def _is_more_than_outputs(row: AttentionLayout, places: Iterable[int]) -> bool:
    """Whether there is more than o: a recurrent layer has an out_proj, too."""
    return any(row.tensors[place].role != "o" for place in places)


def _may_be_gated(rows: Iterable[AttentionLayout]) -> bool:
    return any("Z" in tensor.outputs for row in rows for tensor in row.tensors)


def _roles(projections: Mapping[str, _Projection]) -> set[str]:
    """The roles that some tensors hold; a fused one holds several."""
    return {letter.lower() for role in projections.values() for letter in role.spec.outputs} | set(projections)


def _below_layer(text: str) -> str:
    """A text that begins with a tensor's name, without what precedes the number of the layer in it."""
    name, space, rest = text.partition(" ")
    pieces = name.split(".")
    number = next((place for place, piece in enumerate(pieces) if piece.isdigit()), -1)
    return ".".join(pieces[number + 1 :]) + space + rest


def _arrange(
    name: str, outputs: tuple[str, ...], rows: int, queries: int | None, heads: int | None, size: int | None
) -> _Arrangement:
    """How a fused tensor of `rows` rows is cut, for axes such as ("G", "Q", "K", "V").

    `queries` are the inputs of o, which are the rows of q; `size` is that of a head, where the config gives it. Raises
    _DoesNotFit.
    """
    if queries is None:
        raise _DoesNotFit(f"without o, {name} can't be split")
    repeated, letters = (outputs[0], outputs[1:]) if outputs[0] in ("A", "G") else ("", outputs)
    roles = tuple(None if letter == "Z" else letter.lower() for letter in letters)
    if not repeated:
        lengths: tuple[int, ...] = (queries, (rows - queries) // 2, (rows - queries) // 2)
        if rows <= queries or sum(lengths) != rows or (heads and _splits_a_head(queries, lengths[1], heads)):
            raise _DoesNotFit(f"{name} of {rows} rows does not fit o of {queries} columns")
        return _Arrangement(roles, 1, lengths)
    if heads is None:
        raise _DoesNotFit(f"splitting {name} needs the number of heads, which the config does not give")
    head, rest = divmod(queries, heads)
    if rest or not head or (size is not None and size != head):
        raise _DoesNotFit(f"{name}: o of {queries} columns does not fit {heads} heads of {size or 'equal size'}")
    if repeated == "A":
        if rows not in (queries, 2 * queries):  # a config may switch the gate off
            raise _DoesNotFit(f"{name} of {rows} rows does not fit {heads} heads of a query and a gate of {head}")
        return _Arrangement(roles, heads, (head, rows // heads - head))
    groups, rest = divmod(rows - queries, 2 * head)
    if rest or groups < 1 or heads % groups:
        raise _DoesNotFit(f"{name} of {rows} rows does not fit {heads} heads of {head}")
    return _Arrangement(roles, groups, (queries // groups, head, head))


def _splits_a_head(queries: int, keys: int, heads: int) -> bool:
    """Whether that many rows of keys would not be a whole number of heads of the queries' head size."""
    head, rest = divmod(queries, heads)
    return bool(rest or not head or keys % head or heads % (keys // head))


def _to_halves(matrix: NDArray[np.float32], head: int) -> NDArray[np.float32]:
    """The rows of each head, which lie in rotary pairs, in the order of halves: first all firsts, then all seconds."""
    pairs = matrix.reshape(-1, head // 2, 2, matrix.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(matrix.shape)


class Embeddings:
    """The token embeddings of one stack of layers, such as `Experts.stack`; they may lie above it.

    `name` is the tensor's name, `shape` is (vocabulary, hidden), `storage` the storage format. Raises UnknownFormat or
    ModelUnreadable where there are none that can be read.
    """

    def __init__(self, checkpoint: Checkpoint, stack: str) -> None:
        self.checkpoint = checkpoint
        parts = match_embeddings(checkpoint.names, stack)
        if not parts:
            raise UnknownFormat(f"we know no name of the token embeddings of {stack or 'the model'}")
        self.name = weight_of(parts)
        quantization = checkpoint.model_config.stack(stack).quantization(module_of(parts))
        self._infos, self._stored = open_stored(checkpoint, parts, quantization)
        shape = self._stored.shape
        if len(find_slices(checkpoint, parts)) > 1:
            raise UnknownFormat(f"{self.name} is cut into slices in a way that we don't know")
        if len(shape) != 2 or self._stored.transposed or min(shape) < 1 or shape[1] > MAX_SIDE:
            raise UnknownFormat(
                f"{self.name} has shape {list(shape)} as {self._stored.codec}, which is not token embeddings"
            )
        self.shape: tuple[int, int] = (shape[0], shape[1])

    @property
    def storage(self) -> str:
        return self._stored.codec

    @property
    def nbytes(self) -> int:
        """The bytes in the files, scales included."""
        return sum(info.nbytes for info in self._infos.values())

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The embeddings of the tokens from `start` to `stop`, float32 [stop - start, hidden].

        Raises InvalidRequest for tokens that are not in the vocabulary.
        """
        self._check(start, stop)
        if start == stop:
            return np.empty((0, self.shape[1]), np.float32)
        return read_rows(self.checkpoint, self._infos, self._stored, self.shape[0], start, stop)

    def byte_ranges(self, start: int, stop: int) -> list[tuple[str, Range]]:
        """The byte ranges, each with its file's name, that reading these rows takes."""
        self._check(start, stop)
        places = find_rows(self._infos, self._stored, self.shape[0], start, stop, 0)
        return [
            (info.file, (info.start, info.stop) if high is None else Checkpoint.row_range(info, low, high, leading))
            for info, low, high, leading in places
        ]

    def prefetch(self, ranges: Iterable[tuple[int, int]], progress: Progress = no_progress) -> None:
        """Fetch the rows of some ranges of tokens in a few long requests."""
        self.checkpoint.prefetch([place for span in ranges for place in self.byte_ranges(*span)], progress)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.shape[0]:
            raise InvalidRequest(f"tokens {start} to {stop} are not all in a vocabulary of {self.shape[0]:,}")
