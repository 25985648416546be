"""What is kept on this machine? `MoECacheService` tells, and deletes it."""

from . import views  # noqa: F401  which registers how reports are shown
from .jobs.cache import describe_cache
from .reports import MoECache


class MoECacheService:
    """Tells what has been kept of models on the Hub, and of unfinished work."""

    @staticmethod
    def describe() -> MoECache:
        """Where the cache is and what it holds. Raises a child of MoEError."""
        return describe_cache()

    @staticmethod
    def clear() -> MoECache:
        """Delete all that the cache holds; returns what that was. Raises a child of MoEError."""
        return describe_cache(clear=True)
