"""What is kept on this machine."""

from typing import Literal

from pydantic import Field

from .report import Report


class CachePart(Report):
    """One folder of the cache: `what` is kept there, in so many files and bytes."""

    folder: str
    what: str
    files: int
    bytes: int


class MoECache(Report):
    """The cache: where it is, how much it may and does hold, and whether that has just been deleted.

    `limit` counts the bytes of models only.
    """

    schema_: Literal["moe-cache/1"] = Field(default="moe-cache/1", alias="schema")
    folder: str
    limit: int
    bytes: int
    parts: tuple[CachePart, ...]
    cleared: bool
