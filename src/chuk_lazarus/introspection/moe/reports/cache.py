"""What is kept on this machine."""

from typing import Literal

from pydantic import Field

from .report import Report


class CachePart(Report):
    """One folder of the cache: `what` it holds, and its numbers of files and bytes."""

    folder: str
    what: str
    files: int
    bytes: int


class MoECache(Report):
    """The cache: its folder, its limit and its size, and whether it has just been deleted.

    `limit` applies only to the bytes of models.
    """

    schema_: Literal["moe-cache/1"] = Field(default="moe-cache/1", alias="schema")
    folder: str
    limit: int
    bytes: int
    parts: tuple[CachePart, ...]
    cleared: bool
