"""MXFP6: E2M3 or E3M2 elements in groups of 32 inputs with an E8M0 scale each.

Four elements lie in three bytes, as one stream from the lowest bit on, with the sign in the highest bit of an element
(OCP Microscaling Formats v1.0, sections 5.3.2 and 5.4.1). A scale is 2^(byte - 127), where 255 is NaN. Publishers store
it as

- `weight_packed` uint8 [..., rows, columns * 3 / 4] and `weight_scale` [..., rows, columns / 32], in E2M3:
  compressed-tensors, `mxfp6-pack-quantized` (compressors/mxfp6/helpers.py);
- `weight` of the same bytes, in what the config says, `fp6_e2m3` or `fp6_e3m2`: Quark (Pack_fp6 in
  quark/torch/utils/pack.py).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...errors import UnknownFormat
from .bits import unpack_bytes
from .codec import CONFIG_HINT, Element, Grid, Part, Stored
from .quark import weight_scheme
from .small_floats import E8M0, is_grid, scale_groups, widen

GROUP = 32
GROUP_BYTES = 24
KINDS = {"fp6_e2m3": ml_dtypes.float6_e2m3fn, "fp6_e3m2": ml_dtypes.float6_e3m2fn}
PARTS = ("weight_packed", "weight_scale")


def recognise(parts: Mapping[str, Part], quantization: Mapping[str, Any]) -> Stored | None:
    """Takes bytes beside one exponent for 24 of them."""
    packed = next((name for name in ("weight_packed", "weight") if parts.keys() == {name, "weight_scale"}), None)
    if packed is None or parts[packed].dtype != "U8" or parts["weight_scale"].dtype not in ("U8", "F8_E8M0"):
        return None
    if len(parts[packed].shape) < 2:
        return None
    *rows, width = parts[packed].shape
    if not width or width % GROUP_BYTES or not is_grid(parts["weight_scale"].shape, (*rows, width // GROUP_BYTES)):
        return None
    kind = "fp6_e2m3"
    if packed == "weight":
        stated = weight_scheme(quantization).get("dtype")
        if not isinstance(stated, str) or stated not in KINDS:
            raise UnknownFormat(
                "MXFP6, but config.json does not say whether its elements are E2M3 or E3M2", CONFIG_HINT
            )
        kind = stated
    decoder = partial(decode, packed=packed, kind=kind)
    element: Element = "e2m3" if kind == "fp6_e2m3" else "e3m2"
    shape = (*rows, width // GROUP_BYTES * GROUP)
    grid = Grid(element, (1, GROUP), scale="e8m0")
    return Stored("mxfp6", shape, {packed: 1, "weight_scale": 1}, decoder, grid=grid)


def decode(parts: Mapping[str, NDArray[Any]], start: int, stop: int, *, packed: str, kind: str) -> NDArray[np.float32]:
    """Bytes [rows, groups * 24] and exponents [rows, groups] -> float32 [rows, groups * 32]."""
    count = parts[packed].shape[-1] // 3 * 4
    codes = unpack_bytes(np.ascontiguousarray(parts[packed]), 6, count)
    values: NDArray[np.float32] = _VALUES[kind][codes]
    scale_groups(values, widen(parts["weight_scale"], E8M0), GROUP)
    return values


_VALUES = {name: np.arange(64, dtype=np.uint8).view(kind).astype(np.float32) for name, kind in KINDS.items()}
