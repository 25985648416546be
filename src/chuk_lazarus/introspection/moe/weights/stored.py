"""A stored tensor, which may consist of several parts and slices: opened, and decoded by rows."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable, MoEError, UnknownFormat
from .checkpoint import Checkpoint, TensorInfo
from .codecs import NOT_DECODED, PARTS, SAME_PART, Part, Stored, recognise
from .layouts import Parts

BIAS = "bias"
_QUANTISED = re.compile(rf"(?P<stem>.+?)[._](?P<part>{'|'.join(map(re.escape, sorted(PARTS)))})")
_RUNTIME_SCALE = re.compile(
    r"(?:.+[._])?(?:(?:input|output|activation|act|[qkv]|kv|prob|k?v?_?cache)(?:_quantizer(?:[.]\d)?)?[._](?:global_)?"
    r"(?:scale|zero_point|offset)(?:_2)?"
    r"|(?:input|output)_amax|qscale_act)"
)
_WEIGHTS = ("weight", "weight_packed", "qweight", "blocks")
T = TypeVar("T")

Infos = Mapping[str, TensorInfo]
"""The tensors in the files that make up one stored tensor, or a slice of it, by the usual names of its parts."""


def find_slices(checkpoint: Checkpoint, parts: Parts) -> list[Infos]:
    """The tensors that make up a stored tensor, one group for each slice, without biases and scales of activations.

    Raises ModelUnreadable where the parts are cut into different numbers of slices, or the slices are not alike.
    """
    slices = {
        SAME_PART.get(part, part): checkpoint.slices(name)
        for part, name in parts.items()
        if part not in NOT_DECODED and not is_runtime_scale(part)
    }
    if not slices:
        raise ModelUnreadable(f"{weight_of(parts)} is missing, although its other parts are there", "download it again")
    if len({len(infos) for infos in slices.values()}) > 1:
        raise ModelUnreadable(f"the parts of {weight_of(parts)} have different numbers of slices")
    groups: list[Infos] = [dict(zip(slices, infos, strict=True)) for infos in zip(*slices.values(), strict=True)]
    if any(outline(infos) != outline(groups[0]) for infos in groups):
        raise ModelUnreadable(f"the slices of {weight_of(parts)} differ in dtype or shape", "download it again")
    return groups


def weight_of(parts: Mapping[str, T]) -> T:
    """Of the parts of a stored tensor, the one that holds the weights; the first one where none is named so."""
    return next((parts[part] for part in _WEIGHTS if part in parts), next(iter(parts.values())))


def outline(infos: Infos) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """The dtype and shape of each part; tensors of equal outlines are stored alike.

    The quant_state of bitsandbytes is a text, and its length says nothing.
    """
    return {part: (info.dtype, None if "quant_state" in part else info.shape) for part, info in infos.items()}


def module_of(parts: Parts) -> str:
    """The name of the module that a stored tensor belongs to, as the config's quantisation settings may have it."""
    part, name = next(iter(parts.items()))
    if name.endswith(f".{part}"):
        return name.removesuffix(f".{part}")
    endings = (f"_{part}", f"_{part.removeprefix('weight_')}")  # of a bare parameter's parts
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def open_stored(
    checkpoint: Checkpoint, parts: Parts, quantization: Mapping[str, Any], inputs_first: bool | None = None
) -> tuple[Infos, Stored]:
    """The tensors that make up a stored tensor, or its first slice, and how they are decoded.

    `quantization` are the settings that hold for its module; `inputs_first` is as in `multiply_inputs`. Raises
    UnknownFormat or ModelUnreadable, naming the tensor with the weights.
    """
    infos = find_slices(checkpoint, parts)[0]
    described = {part: Part(info.dtype, info.shape, partial(checkpoint.whole, info)) for part, info in infos.items()}
    try:
        return infos, recognise(described, quantization, inputs_first)
    except MoEError as error:
        raise type(error)(f"{weight_of(parts)}: {error.message}", error.hint) from None


def read_rows(
    checkpoint: Checkpoint,
    infos: Infos,
    stored: Stored,
    rows: int,
    start: int,
    stop: int,
    index: int = 0,
) -> NDArray[np.float32]:
    """Decoded rows [start, stop), float32, of matrix `index` in a stored tensor; each matrix has `rows` rows."""
    raw = {}
    places = find_rows(infos, stored, rows, start, stop, index)
    for (part, span), (info, low, high, leading) in zip(stored.rows_per_row.items(), places, strict=True):
        if high is None:
            raw[part] = checkpoint.whole(info)
        else:
            values = checkpoint.rows(info, low, high, leading)
            raw[part] = values[0] if span is None else values
    return stored.decode(raw, start, stop)


def find_rows(
    infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
) -> Iterator[tuple[TensorInfo, int, int | None, int]]:
    """The rows of each part that decoding rows [start, stop) of matrix `index` takes.

    Yields, in the order of `rows_per_row`, the part's tensor, its first row, the row after its last one, and the number
    of leading axes that are taken as one; instead of the row after the last one, None for the whole tensor. Raises
    UnknownFormat where a part's row belongs to two experts.
    """
    leading = len(stored.shape) - 2
    for part, span in stored.rows_per_row.items():
        info = infos[part]
        if span is None:
            has_entry_per_matrix = leading and info.shape[:1] == stored.shape[:1]
            yield (info, index, index + 1, 1) if has_entry_per_matrix else (info, 0, None, 1)
            continue
        if not leading and rows < stored.shape[0] and rows % span:
            raise UnknownFormat(f"{info.name}: blocks of {span} rows span two experts")
        first = index * -(-rows // span)
        is_flat = leading and info.shape[:-1] == (prod(stored.shape[:-1]),) and info.shape != stored.shape[:-1]
        axes = 1 if is_flat else leading + 1  # the rows of all matrices may lie below each other
        yield info, int(first + start // span), int(first + -(-stop // span)), axes


def is_runtime_scale(name: str) -> bool:
    """Whether a tensor, or a part of one, has the name of a scale of activations or of the key/value cache.

    These go with the quantisation settings: a plain model has none.
    """
    return _RUNTIME_SCALE.fullmatch(name) is not None


def group_quantised(names: Iterable[str]) -> dict[str, Parts]:
    """The groups of tensors that a storage format makes out of one weight, by the plain name of this weight."""
    known = set(names)
    groups: dict[str, Parts] = {}
    for name in sorted(known):
        if not (match := _QUANTISED.fullmatch(name)):
            continue
        stem, part = match["stem"], match["part"]
        as_module = name[len(stem)] == "." and stem not in known
        group = groups.setdefault(f"{stem}.weight" if as_module else stem, {})
        group[part] = name
        if (weight := f"{stem}.weight" if as_module else stem) in known:
            group["weight"] = weight
    return {plain: parts for plain, parts in groups.items() if parts.keys() & set(_WEIGHTS)}
