"""Unsigned integers of 1 to 8 bits, packed into 32-bit words as one dense stream, lowest bit first.

Value i of a row lies in the bits [i * bits, (i + 1) * bits) of this row, counted from the lowest bit of its first word.
Where the width does not divide 32, some values lie in two words.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unpack(words: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
    """uint32 [..., words] -> the first `count` values of each row, uint8 [..., count]."""
    return unpack_bytes(np.ascontiguousarray(words, "<u4").view(np.uint8)[..., : -(-count * bits // 8)], bits, count)


def unpack_bytes(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The bytes of such a stream, uint8 [..., ceil(count * bits / 8)], in place of its words; as `unpack`."""
    if bits == 8:
        return data
    if bits == 4:
        pairs = data.astype("<u2")
        pairs |= pairs << 4
        pairs &= 0x0F0F
        return pairs.view(np.uint8)[..., :count]
    if bits == 2:
        fours = data.astype("<u4")
        fours |= fours << 6  # bits 2 and 3 go to the second byte, 4 and 5 to the lower half of the third
        fours |= fours << 12
        fours &= 0x03030303
        return fours.view(np.uint8)[..., :count]
    if bits == 1:
        return np.unpackbits(data, axis=-1, count=count, bitorder="little")
    return _unpack_eights(data, bits, count)


def unpack_rows(words: NDArray[np.uint32], bits: int, first: int, count: int) -> NDArray[np.uint8]:
    """uint32 [words, columns], each column a stream -> uint8 [count, columns]: `count` values from bit `first` on."""
    result = np.empty((count, words.shape[1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    period = 1 if 32 % bits == 0 else bits  # the number of words after which values lie at the same bits again
    values_per_period = period * 32 // bits
    for offset in range(min(values_per_period, count)):
        word, shift = divmod(first + offset * bits, 32)
        rows = len(range(offset, count, values_per_period))
        value = words[word::period][:rows] >> np.uint32(shift)
        if shift + bits > 32:
            value |= words[word + 1 :: period][:rows] << np.uint32(32 - shift)
        value &= mask
        result[offset::values_per_period] = value
    return result


def _unpack_eights(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """uint8 [..., bytes] -> uint8 [..., count]: eight values of n bits lie in n bytes."""
    eights = -(-count // 8)
    if missing := eights * bits - data.shape[-1]:
        data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, missing)])
    grouped = data.reshape(*data.shape[:-1], eights, bits)
    result: NDArray[Any] = np.empty((*grouped.shape[:-1], 8), np.uint8)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        value = grouped[..., byte] >> shift
        if shift + bits > 8:
            value |= grouped[..., byte + 1] << (8 - shift)
        np.bitwise_and(value, (1 << bits) - 1, out=result[..., place])
    return result.reshape(*data.shape[:-1], eights * 8)[..., :count]
