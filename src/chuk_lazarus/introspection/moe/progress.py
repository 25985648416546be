"""Progress of a job: the function that is called, and a counter."""

from collections.abc import Callable
from threading import Lock

Progress = Callable[[str, int, int], None]
"""A function that is called during the work, with (what, done, total)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignores progress."""


class Counter:
    """Adds up what several threads have done, and reports it.

    `total` is what is reported at the end, usually in bytes. What is added may be counted in other units, each worth
    `scale` of those.
    """

    def __init__(self, progress: Progress, what: str, total: int, scale: float = 1.0) -> None:
        self._progress, self._what, self._total, self._scale = progress, what, total, scale
        self._lock, self._done = Lock(), 0

    def add(self, count: int) -> None:
        """Count this much more as done."""
        with self._lock:
            self._done += count
            self._progress(self._what, min(self._total, round(self._done * self._scale)), self._total)
