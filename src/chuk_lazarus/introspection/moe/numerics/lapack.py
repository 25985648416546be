"""LAPACK's eigenvalues and eigenvectors of a symmetric float32 matrix, called so that threads can run in parallel.

numpy's solver releases the GIL and is slower, in float32 as in float64; scipy's `eigh` holds the GIL while it works. So
the routine that scipy ships for Cython code is called directly.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_lapack

Array = NDArray[np.float32]


def symmetric_eigenvalues(matrix: Array) -> Array:
    """The eigenvalues of a symmetric matrix [n, n], smallest first.

    Raises numpy.linalg.LinAlgError when they do not converge.
    """
    # 2n + 1 floats and one integer are enough; with space for 64 columns the reduction works in blocks
    return _solve(matrix, b"N", max(1, 64 * len(matrix)), 1)[0]


def symmetric_eigenvectors(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, smallest first, and eigenvectors, one a column, of a symmetric matrix [n, n].

    Raises numpy.linalg.LinAlgError when they do not converge.
    """
    order = len(matrix)
    return _solve(matrix, b"V", 1 + 6 * order + 2 * order * order + 64 * order, 3 + 5 * order)


def _solve(matrix: Array, job: bytes, floats: int, integers: int) -> tuple[Array, Array]:
    """LAPACK's `ssyevd` with workspaces of these sizes; for job V it overwrites its input with the eigenvectors."""
    order = len(matrix)
    # LAPACK wants columns, and a symmetric matrix has its rows as columns: a copy without transposing is the quickest
    result, values = np.array(matrix.T, np.float32, order="F"), np.empty(order, np.float32)
    work, integer_work, info = np.empty(floats, np.float32), np.empty(integers, np.int32), ctypes.c_int()
    size, work_size, integer_size = (ctypes.byref(ctypes.c_int(n)) for n in (order, floats, integers))
    _ssyevd()(
        job,
        b"L",
        size,
        result.ctypes.data,
        size,
        values.ctypes.data,
        work.ctypes.data,
        work_size,
        integer_work.ctypes.data,
        integer_size,
        ctypes.byref(info),
    )
    if info.value:
        raise np.linalg.LinAlgError(f"ssyevd ended with {info.value}")
    return values, result


@cache
def _ssyevd() -> Callable[..., None]:
    """The routine's address out of scipy's Cython interface; a ctypes call releases the GIL."""
    capsule = cython_lapack.__pyx_capi__["ssyevd"]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)(address)
