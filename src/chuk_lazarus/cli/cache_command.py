"""`lazarus cache`: what is kept on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer

from .command import JSON, Run, command

if TYPE_CHECKING:
    from chuk_lazarus.introspection.moe import MoECache


@command(JSON)
def cache(
    run: Run,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
) -> "MoECache":
    """Show where data from the Hub and unfinished work are stored, and how much there is.

    \b
    Examples:
      lazarus cache
      lazarus cache --clear
    """
    from chuk_lazarus.introspection.moe import MoECacheService

    return MoECacheService.clear() if clear else MoECacheService.describe()
