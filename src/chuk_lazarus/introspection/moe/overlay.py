"""The overlay: every expert as one base, shared by all, plus a low-rank delta of its own."""

from collections.abc import Mapping

BYTES_PER_NUMBER = 2


def overlay_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, float], experts: int) -> int:
    """Bytes of base and factors for matrices of these shapes and ranks, by role, at two bytes a number."""
    numbers = sum(m * n + experts * ranks[role] * (m + n) for role, (m, n) in shapes.items())
    return round(BYTES_PER_NUMBER * numbers)


def original_bytes(shapes: Mapping[str, tuple[int, int]], experts: int) -> int:
    """Bytes of the experts themselves at two bytes a weight."""
    return BYTES_PER_NUMBER * experts * sum(m * n for m, n in shapes.values())
