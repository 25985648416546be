"""The safetensors container: 8 bytes with the header's length, a JSON header, then the tensors' bytes.

Tensors are row-major and little-endian (https://github.com/huggingface/safetensors#format).
"""

import json
from collections import Counter
from math import prod
from typing import Any

from ..errors import ModelUnreadable
from .repositories.source import LFS, ByteSource, refuse_pointer
from .tensor_info import DTYPES, MAX_HEADER, TensorInfo, check_apart, check_name

PACKED = frozenset({"F4"})
"""Dtypes of which several elements share a byte."""

MAX_AXES = 64  # the limit of numpy and torch
MAX_DEPTH = 100  # levels of JSON; the interpreter's stack lets us read more levels than we can write


def read_header(file: str, source: ByteSource) -> dict[str, TensorInfo]:
    """The tensors of a file by name; raises ModelUnreadable for a header that is broken or does not fit the file."""
    if source.size < 8:
        raise ModelUnreadable(f"{file} is {source.size} bytes long: not a safetensors file", "download it again")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > source.size - 8:
        refuse_pointer(file, source.read(0, min(source.size, len(LFS))))
        hint = "it is truncated or not a safetensors file: download it again"
        raise ModelUnreadable(f"{file} announces a header of {length:,} bytes, but has only {source.size:,}", hint)
    if length > MAX_HEADER:
        raise ModelUnreadable(f"{file} announces a header of {length:,} bytes; {MAX_HEADER:,} is the limit")
    entries = parse_json_object(source.read(8, 8 + length), f"the header of {file}")
    entries.pop("__metadata__", None)
    return parse_entries(entries, file, 8 + length, source.size)


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises ModelUnreadable, which names `what`, for anything else, for duplicate keys, and for values that are nested
    deeper than MAX_DEPTH.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name!r} appears twice")
        return result

    refuse_pointer(what, data)
    try:
        value = json.loads(data, object_pairs_hook=unique)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:200]
        raise ModelUnreadable(f"{what} is not valid JSON: {reason}", "download it again") from None
    if not isinstance(value, dict):
        raise ModelUnreadable(f"{what} is not a JSON object", "download it again")
    return value


def _check_depth(value: Any) -> None:
    """Raise RecursionError for objects and lists that are nested deeper than MAX_DEPTH."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        contents = (container.values() if isinstance(container, dict) else container for container in level)
        level = [item for items in contents for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise RecursionError


def parse_entries(entries: dict[str, Any], file: str, data_start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header, whose data begins at `data_start` in a file of `size` bytes.

    Raises ModelUnreadable where an offset is outside of the file or does not fit the shape, or two tensors overlap;
    UnknownFormat for an odd name.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        check_name(name, file)
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ModelUnreadable(f"{file}: the header's entry for {name} lacks its dtype, shape or offsets") from None
        if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ModelUnreadable(f"{file}: the header's entry for {name} has an invalid dtype, shape or offset")
        if len(shape) > MAX_AXES:
            raise ModelUnreadable(f"{file}: {name} has {len(shape):,} axes; {MAX_AXES} is the limit")
        if not start <= stop <= size - data_start:
            raise ModelUnreadable(
                f"{file}: {name} ends at byte {data_start + stop:,}, but the file ends at {size:,}",
                "the file is truncated or broken: download it again",
            )
        if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != stop - start:
            raise ModelUnreadable(
                f"{file}: {name} is {dtype} {list(shape)}, which does not take {stop - start:,} bytes"
            )
        tensors[name] = TensorInfo(
            name, dtype, shape, file, data_start + start, data_start + stop, packed=dtype in PACKED
        )
    check_apart(tensors.values(), file)
    return tensors
