"""Levels packed into bytes: n bits each, lowest bit first, or five of three levels in a byte."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...weights.codecs.bits import unpack_bytes

TERNARY = 5  # numbers in a byte: 3**5 is 243
_POWERS = 3 ** np.arange(TERNARY)
_TERNARY_BYTES = (np.arange(256)[:, None] // _POWERS % 3).astype(np.uint8)
_MASKS = [  # eight values in a 64-bit word are joined to four, to two, to one: what stays of each pair
    np.uint64(0x00FF00FF00FF00FF),
    np.uint64(0x0000FFFF0000FFFF),
    np.uint64(0x00000000FFFFFFFF),
]


def packed_bytes(levels: int, count: int) -> int:
    """Bytes of a row of `count` levels: five of three in a byte, else the whole bits of each in one stream."""
    return -(-count // TERNARY) if levels == 3 else -(-count * bits_of(levels) // 8)


def bits_of(levels: int) -> int:
    """The whole bits that are needed for that many levels."""
    return (levels - 1).bit_length()


def pack_levels(values: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """uint8 [..., count] -> uint8 [..., `packed_bytes`]."""
    size = packed_bytes(levels, values.shape[-1])
    if levels == 3:
        fives = _padded(values, TERNARY)
        packed = fives[..., TERNARY - 1].copy()
        for place in range(TERNARY - 2, -1, -1):
            packed *= np.uint8(3)
            packed += fives[..., place]
        return packed
    bits = bits_of(levels)
    if bits == 8:
        return values
    if bits == 1:
        return np.packbits(values, axis=-1, bitorder="little")
    eights = _padded(values, 8)
    words = np.ascontiguousarray(eights).view("<u8")[..., 0]
    for stage, mask in enumerate(_MASKS):
        high = words & ~mask
        high >>= np.uint64((8 - bits) << stage)
        high |= words & mask
        words = high
    packed = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(packed.reshape(*values.shape[:-1], eights.shape[-2] * bits)[..., :size])


def unpack_levels(packed: NDArray[np.uint8], levels: int, count: int) -> NDArray[np.uint8]:
    """uint8 [..., `packed_bytes`] -> uint8 [..., count]: the inverse of `pack_levels`."""
    if levels == 3:
        fives: NDArray[Any] = _TERNARY_BYTES[packed]
        return fives.reshape(*packed.shape[:-1], packed.shape[-1] * TERNARY)[..., :count]
    return unpack_bytes(packed, bits_of(levels), count)


def _padded(values: NDArray[np.uint8], run: int) -> NDArray[np.uint8]:
    """[..., count] -> [..., runs, run], with zeros at the end; a copy only where zeros are added."""
    if missing := -values.shape[-1] % run:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return values.reshape(*values.shape[:-1], values.shape[-1] // run, run)
