"""The cache, as a table."""

from typing import TYPE_CHECKING

from ...reports import MoECache
from ...text import format_bytes
from ..words import count_noun
from .grid import Fact, draw_facts, stack

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_cache(cache: MoECache) -> "RenderableType":
    """Where the cache is, and what each part of it holds, or held."""
    facts: list[Fact] = [
        ("Folder", f"{cache.folder} (LAZARUS_CACHE)"),
        ("Limit", f"{format_bytes(cache.limit)} of models (LAZARUS_CACHE_LIMIT)"),
        ("Deleted" if cache.cleared else "Holds", format_bytes(cache.bytes)),
    ]
    facts += [
        (f"  {part.folder}", f"{format_bytes(part.bytes)} in {count_noun(part.files, 'file')}: {part.what}")
        for part in cache.parts
        if part.files
    ]
    return stack("CACHE", draw_facts(facts, ["what the Hub's own client has downloaded is not here: see hf cache ls"]))
