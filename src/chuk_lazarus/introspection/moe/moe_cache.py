"""What is kept on this machine? `MoECacheService` lists it and deletes it."""

from . import views  # noqa: F401  which registers how reports are shown
from .jobs.cache import describe_cache
from .reports import MoECache


class MoECacheService:
    """Lists and deletes what is cached: bytes of models on the Hub, and unfinished work."""

    @staticmethod
    def describe() -> MoECache:
        """Where the cache is and what it holds. Raises a child of MoEError."""
        return describe_cache()

    @staticmethod
    def clear() -> MoECache:
        """Delete everything in the cache; returns what was deleted. Raises a child of MoEError."""
        return describe_cache(clear=True)
