"""One stored tensor, of however many parts and slices it consists: opened, and decoded by rows."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelUnreadable, MoEError, UnknownFormat
from .checkpoint import Checkpoint, TensorInfo
from .codecs import NOT_DECODED, SAME_PART, Part, Stored, recognise
from .layouts import Parts

BIAS = "bias"

Infos = Mapping[str, TensorInfo]
"""The tensors of the files that hold one matrix, or a slice of it, by their parts' usual names."""


def find_slices(checkpoint: Checkpoint, parts: Parts) -> list[Infos]:
    """The tensors that hold a matrix, one group for each slice of it; biases and input scales are left out.

    Raises ModelUnreadable where the parts are not all cut into as many slices, or the slices are not alike.
    """
    slices = {
        SAME_PART.get(part, part): checkpoint.slices(name) for part, name in parts.items() if part not in NOT_DECODED
    }
    if not slices:
        raise ModelUnreadable(f"{next(iter(parts.values()))} is there without its weight", "download it again")
    if len({len(infos) for infos in slices.values()}) > 1:
        raise ModelUnreadable(f"{next(iter(parts.values()))} has parts that are not cut into as many slices")
    found: list[Infos] = [dict(zip(slices, infos, strict=True)) for infos in zip(*slices.values(), strict=True)]
    if any(outline(infos) != outline(found[0]) for infos in found):
        raise ModelUnreadable(f"the slices of {next(iter(parts.values()))} are not alike", "download it again")
    return found


def outline(infos: Infos) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """What a matrix is recognised by; the text that bitsandbytes adds is as long as its numbers are."""
    return {part: (info.dtype, None if "quant_state" in part else info.shape) for part, info in infos.items()}


def open_stored(checkpoint: Checkpoint, parts: Parts, quantization: Mapping[str, Any]) -> tuple[Infos, Stored]:
    """The tensors that one stored tensor, or the first slice of it, consists of, and how they are decoded.

    Raises UnknownFormat or ModelUnreadable, naming the first of the parts.
    """
    part, name = next(iter(parts.items()))
    own = quantization.get(name.removesuffix(f".{part}"))  # MLX says by module what is quantised in another way
    infos = find_slices(checkpoint, parts)[0]
    described = {part: Part(info.dtype, info.shape, partial(checkpoint.whole, info)) for part, info in infos.items()}
    try:
        # what such an entry leaves out is not what the others have: no mode means affine
        return infos, recognise(
            described, {**quantization, "mode": "affine", **own} if isinstance(own, dict) else quantization
        )
    except MoEError as error:
        raise type(error)(f"{name}: {error.message}", error.hint) from None


def read_rows(
    checkpoint: Checkpoint,
    infos: Infos,
    stored: Stored,
    rows: int,
    start: int,
    stop: int,
    index: int = 0,
) -> NDArray[np.float32]:
    """Decoded rows [start, stop) of matrix `index` of a stored tensor whose matrices have so many rows each."""
    raw = {}
    found = find_rows(infos, stored, rows, start, stop, index)
    for (part, span), (info, low, high, leading) in zip(stored.rows_per_row.items(), found, strict=True):
        if high is None:
            raw[part] = checkpoint.whole(info)
        else:
            read = checkpoint.rows(info, low, high, leading)
            raw[part] = read[0] if span is None else read
    return stored.decode(raw, start, stop)


def find_rows(
    infos: Infos, stored: Stored, rows: int, start: int, stop: int, index: int
) -> Iterator[tuple[TensorInfo, int, int | None, int]]:
    """For each part of a stored tensor, where rows [start, stop) of matrix `index` lie in it: the first row, the one
    after the last, with so many leading axes seen as one; None for all of the tensor."""
    leading = len(stored.shape) - 2
    for part, span in stored.rows_per_row.items():
        info = infos[part]
        if span is None:
            own = leading and info.shape[:1] == stored.shape[:1]
            yield (info, index, index + 1, 1) if own else (info, 0, None, 1)
            continue
        if not leading and rows < stored.shape[0] and rows % span:
            raise UnknownFormat(f"{info.name}: blocks of {span} rows reach over two experts")
        first = index * -(-rows // span)
        yield info, int(first + start // span), int(first + -(-stop // span)), leading + 1
