"""bitsandbytes: NF4 and FP4, with double quantisation or without, and LLM.int8().

4-bit: the matrix [out, in], flattened, is a stream of codes, two in a byte with the even one in the *high* four bits;
`weight` [n / 2, 1] holds the bytes as U8 or viewed as another type (`bnb_4bit_quant_storage`). A code is an index into
`weight.quant_map` F32 [16]; the entry is multiplied by the `weight.absmax` of its block of codes. With double
quantisation, absmax is U8, an index into `weight.nested_quant_map` F32 [256]; the entry is multiplied by the
`weight.nested_absmax` of its block of absmaxes, and `nested_offset` is added. The offset, the shape and the sizes of
blocks are JSON in `weight.quant_state.bitsandbytes__nf4` or `__fp4` (functional.py, `QuantState`, and
backends/default/ops.py of bitsandbytes 0.50).

8-bit: `weight` is I8 [out, in], `SCB` F32 [out] the largest magnitude of each row: a weight is integer * SCB / 127
(backends/default/ops.py, `int8_vectorwise_dequant`). `weight_format` must be 0, which means rows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ModelUnreadable, UnknownFormat
from .codec import Grid, Part, Stored

STATE = "weight.quant_state.bitsandbytes__"
STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""The dtypes that the bytes may be stored as, and the bytes in an element."""

MAX_STATE = 65_536  # bytes of a quant_state


@dataclass(frozen=True, slots=True)
class _State:
    """The quant_state of a matrix; `nested_block` and `offset` are 0 without double quantisation."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    offset: float


PARTS = (
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    f"{STATE}nf4",
    f"{STATE}fp4",
)


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes `weight` beside `weight.absmax` and `weight.quant_state.bitsandbytes__*`, or I8 beside `SCB`."""
    if parts.keys() - {"weight_format"} == {"weight", "SCB"}:
        return _recognise_int8(parts)
    kinds = [name for name in parts if name.startswith(STATE)]
    if not kinds:
        return None
    kind = kinds[0].removeprefix(STATE)
    if len(kinds) > 1 or kind not in ("nf4", "fp4"):
        raise UnknownFormat(f"bitsandbytes in {' and '.join(name.removeprefix(STATE) for name in kinds)}")
    nested = "weight.nested_absmax" in parts
    names = {"weight", "weight.absmax", "weight.quant_map", kinds[0]}
    names |= {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    if parts.keys() != names:
        odd = ", ".join(sorted(parts.keys() ^ names))
        raise ModelUnreadable(f"bitsandbytes {kind} with missing or unknown parts: {odd}")
    described = parts[kinds[0]]
    if described.dtype != "U8" or not 0 < prod(described.shape) <= MAX_STATE:
        raise ModelUnreadable(f"its quant_state is {described.dtype} {list(described.shape)}")
    state = _read_state(described.load(), nested, kind)
    *leading, _, columns = state.shape
    count, item = prod(state.shape), STORAGE.get(parts["weight"].dtype)
    if item is None:
        raise UnknownFormat(f"bitsandbytes {kind} in elements of type {parts['weight'].dtype}, which we can't decode")
    blocks = -(-count // state.block)
    expected: dict[str, tuple[tuple[str, ...], int]] = {
        "weight": ((parts["weight"].dtype,), -(-count // (2 * item))),
        "weight.absmax": (("U8",) if nested else ("F32", "F16", "BF16"), blocks),
        "weight.quant_map": (("F32",), 16),
    }
    spans: dict[str, int | Fraction | None] = {
        "weight": Fraction(2 * item, columns),
        "weight.absmax": Fraction(state.block, columns),
        "weight.quant_map": None,
        kinds[0]: None,
    }
    if nested:
        expected["weight.nested_absmax"] = (("F32",), -(-blocks // state.nested_block))
        expected["weight.nested_quant_map"] = (("F32",), 256)
        spans["weight.nested_absmax"] = Fraction(state.block * state.nested_block, columns)
        spans["weight.nested_quant_map"] = None
    for name, (dtypes, size) in expected.items():
        part = parts[name]
        if part.dtype not in dtypes or prod(part.shape) != size or part.shape[:1] != (size,):
            raise ModelUnreadable(f"its {name} is {part.dtype} {list(part.shape)}, expected {dtypes[0]} [{size}]")
    if leading:
        raise UnknownFormat(f"bitsandbytes {kind} of {len(state.shape)} axes, which we can't decode")
    grid = Grid("nf4" if kind == "nf4" else "fp4", (1, state.block))
    return Stored(f"bnb-{kind}", state.shape, spans, partial(decode, state=kinds[0], expected=state), grid=grid)


def decode(
    parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, state: str, expected: "_State"
) -> NDArray[np.float32]:
    """The quant map's entries for the codes of rows [start, stop), times the absmax of their blocks.

    `state` is the name of the part with the quant_state, `expected` the first expert's. Raises ModelUnreadable where
    this expert has another shape or other blocks.
    """
    this = _read_state(parts[state], "weight.nested_absmax" in parts, state.removeprefix(STATE))
    shape, block = this.shape, this.block
    if (shape, block, this.nested_block) != (expected.shape, expected.block, expected.nested_block):
        raise ModelUnreadable(f"its quant_state says {list(shape)} in blocks of {block}, unlike that of other experts")
    columns = shape[-1]
    first, last = start * columns, stop * columns
    packed = parts["weight"].reshape(-1)
    per_item = 2 * packed.dtype.itemsize
    data = packed.view(np.uint8)
    # the two values of each byte are one item of 8 bytes, so that decoding is a single look-up
    codebook = parts["weight.quant_map"].astype(np.float32)
    pairs = np.stack([np.repeat(codebook, 16), np.tile(codebook, 16)], axis=1).view(np.uint64).ravel()
    skipped = first - first // per_item * per_item
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[np.float32] = pairs[data].view(np.float32)[skipped : skipped + last - first]
        _scale_blocks(values, _absmax(parts, first // block, this), first % block, block)
    return values.reshape(stop - start, columns)


def _scale_blocks(values: NDArray[np.float32], factors: NDArray[np.float32], skip: int, block: int) -> None:
    """Multiply a stream of values in place by the factors of its blocks; the first block lacks `skip` values."""
    if skip:
        head = min(block - skip, len(values))
        values[:head] *= factors[0]
        values, factors = values[head:], factors[1:]
    whole = len(values) // block
    blocks = values[: whole * block].reshape(whole, block)
    blocks *= factors[:whole, None]
    if len(values) % block:
        values[whole * block :] *= factors[whole]


def _absmax(parts: Mapping[str, NDArray[Any]], first: int, state: _State) -> NDArray[np.float32]:
    """The absmax of each block in `parts`, float32; the first of them is block number `first` of the matrix."""
    stored = parts["weight.absmax"].reshape(-1)
    if not state.nested_block:
        return stored.astype(np.float32)
    factors: NDArray[np.float32] = parts["weight.nested_quant_map"].astype(np.float32)[stored]
    _scale_blocks(factors, parts["weight.nested_absmax"].reshape(-1), first % state.nested_block, state.nested_block)
    factors += np.float32(state.offset)
    return factors


def _read_state(data: NDArray[Any], nested: bool, kind: str) -> _State:
    """The quant_state in the JSON of `data`.

    Raises ModelUnreadable where a value is missing or out of range, or its `quant_type` is another than `kind`.
    """
    try:
        values = json.loads(data.tobytes())
        shape, block = tuple(values["shape"]), values["blocksize"]
        nested_block, offset = (values["nested_blocksize"], values["nested_offset"]) if nested else (0, 0.0)
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else "not a JSON object with a shape"
        raise ModelUnreadable(f"its quant_state can't be read: {reason}", "download it again") from None
    if values.get("quant_type", kind) != kind:
        raise ModelUnreadable(f"its quant_state is called {kind}, but says {str(values['quant_type'])[:100]}")
    if len(shape) < 2 or not all(type(size) is int and 0 < size < 2**40 for size in shape):
        raise ModelUnreadable(f"its quant_state says that the shape is {str(list(shape))[:100]}")
    for name, size in (("blocksize", block), *((("nested_blocksize", nested_block),) if nested else ())):
        if type(size) is not int or not 0 < size < 2**31:
            raise ModelUnreadable(f"its quant_state says that {name} is {str(size)[:100]}")
    if type(offset) not in (int, float) or not abs(offset) <= float(np.finfo(np.float32).max):
        raise ModelUnreadable(f"its quant_state says that nested_offset is {str(offset)[:100]}")
    return _State(shape, block, nested_block, float(offset))


def _recognise_int8(parts: Mapping[str, Part]) -> Stored:
    weight, largest = parts["weight"], parts["SCB"]
    if weight.dtype != "I8" or largest.dtype != "F32" or weight.shape[:-1] != largest.shape or len(weight.shape) < 2:
        raise ModelUnreadable(
            f"its weight is {weight.dtype} {list(weight.shape)} and its SCB {largest.dtype} {list(largest.shape)}"
        )
    if (order := parts.get("weight_format")) and (prod(order.shape) != 1 or order.load().reshape(-1)[0] != 0):
        raise UnknownFormat("LLM.int8() whose weight_format is not row, which we can't decode")
    return Stored("bnb-int8", weight.shape, {"weight": 1, "SCB": 1}, decode_int8, grid=Grid("int", (1, None), 8))


def decode_int8(parts: Mapping[str, NDArray[Any]], start: int, stop: int) -> NDArray[np.float32]:
    """I8 [rows, columns] * SCB [rows] / 127."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = parts["weight"].astype(np.float32)
        values *= (parts["SCB"] / np.float32(127))[:, None]
    return values
