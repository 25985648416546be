"""The command tree `lazarus > introspect > moe-expert`, and how it ends: errors become one line and an exit code."""

import os
import sys
from typing import Annotated

import typer

from . import moe_expert

app = typer.Typer(
    name="lazarus",
    help="Look inside models without running them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
introspect = typer.Typer(help="What the weights of a model say.", no_args_is_help=True, rich_markup_mode=None)
introspect.add_typer(moe_expert.app, name="moe-expert")
app.add_typer(introspect, name="introspect")


def _print_version(wanted: bool) -> None:
    if wanted:
        from chuk_lazarus import __version__

        typer.echo(f"lazarus {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Look inside models without running them."""


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 a check failed, 2 usage, 3 the model can't be read, 4 not an MoE or an unknown format, 130 interrupted.
    """
    from .output import print_error

    as_json = "--json" in arguments
    try:
        code = app(args=arguments, prog_name="lazarus", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 2
        print_error(2, error.format_message(), "try --help", as_json)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # the reader, such as `head`, has gone; keep Python from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from chuk_lazarus.introspection.moe import MoEError

        if not isinstance(error, MoEError):
            raise
        print_error(error.exit_code, error.message, error.hint, as_json)
        return error.exit_code
    if code == 130:
        print_error(130, "interrupted", "", as_json)
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
