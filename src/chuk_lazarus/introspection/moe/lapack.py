"""LAPACK's eigenvalues of a symmetric float32 matrix, called so that threads work side by side.

numpy's solver lets threads run and is slower, in float32 as in float64, and scipy's `eigh` holds Python's lock while
it works. So the routine that scipy ships for Cython code is called directly.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_lapack


def symmetric_eigenvalues(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The eigenvalues of a symmetric matrix [n, n], smallest first (LAPACK `ssyevd`, jobz N).

    Raises numpy.linalg.LinAlgError when they do not converge.
    """
    order = len(matrix)
    scratch = np.array(matrix, np.float32, order="F")
    values = np.empty(order, np.float32)
    # jobz N needs 2n + 1 floats and one integer; with room for 64 columns the reduction works in blocks
    work, integers, info = np.empty(max(1, 64 * order), np.float32), np.empty(1, np.int32), ctypes.c_int()
    sizes = [ctypes.byref(ctypes.c_int(size)) for size in (order, order, work.size, integers.size)]
    arrays = [array.ctypes.data for array in (scratch, values, work, integers)]
    _ssyevd()(
        b"N",
        b"L",
        sizes[0],
        arrays[0],
        sizes[1],
        arrays[1],
        arrays[2],
        sizes[2],
        arrays[3],
        sizes[3],
        ctypes.byref(info),
    )
    if info.value:
        raise np.linalg.LinAlgError(f"ssyevd ended with {info.value}")
    return values


@cache
def _ssyevd() -> Callable[..., None]:
    """The routine's address out of scipy's Cython interface; a ctypes call sets Python's lock free."""
    capsule = cython_lapack.__pyx_capi__["ssyevd"]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)(address)
