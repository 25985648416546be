"""The command tree, and how it ends: errors become one line and an exit code.

Each command of `lazarus introspect moe-expert` also has a short name, right below `lazarus`.
"""

import contextlib
import io
import os
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import moe_expert
from .cache_command import cache as show_cache
from .command import Command
from .interrupt import INTERRUPTED
from .output import print_error
from .suggest import command_meant, option_meant

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

LEAST_WIDTH, GREATEST_WIDTH = 20, 10_000  # columns of a terminal

ABOUT = """See how a Mixture-of-Experts model was trained, and how much smaller it can be made.

\b
Example:
  lazarus analyze demo:native"""

app = typer.Typer(
    name="lazarus",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=moe_expert.DOCUMENTATION,
)
moe_expert.add_short_names(app)
app.command("cache", cls=Command, short_help="Show or clear what is stored on this machine.")(show_cache)
introspect = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
introspect.add_typer(moe_expert.app, name="moe-expert", short_help="Mixture-of-Experts checkpoints.")
app.add_typer(
    introspect,
    name="introspect",
    help=f"What the weights of a model say.\n\n{moe_expert.EXAMPLE}",
    short_help="The same commands under their long names.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .version import describe_version

        typer.echo(describe_version())
        raise typer.Exit


@app.callback(help=ABOUT)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and what is installed.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Take the options that come before any command."""


@cache
def command_tree() -> Any:
    """The command that all others are below; to make it takes as long as a small analysis."""
    return typer.main.get_command(app)


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 a check failed, 2 usage, 3 the model can't be read, 4 not an MoE or an unknown format, 130 interrupted.
    """
    as_json = "--json" in arguments or "--format json" in " ".join(arguments).replace("--format=json", "--format json")
    _check_width()
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # the client's log lines would come between our own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ± gets a ?
    try:
        code = command_tree()(args=arguments, prog_name="lazarus", standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.TyperException as error:
        return _end_usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as error:
        # typer turns a reader that has gone, such as `head`, into a failure
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _end_output(error.__context__, as_json)
    except OSError as error:
        return _end_output(error, as_json)
    except Exception as error:
        from chuk_lazarus.introspection.moe import MoEError

        if not isinstance(error, MoEError):
            raise
        print_error(error.exit_code, error.message, error.hint, as_json)
        return error.exit_code
    if code == INTERRUPTED:
        print_error(code, "interrupted", "", as_json)
    return int(code)


def _check_width() -> None:
    """Have no width below LEAST_WIDTH believed: containers and pipes say 0, and no table fits into a few columns."""
    width = os.environ.get("COLUMNS", "")
    if not (width.isdecimal() and LEAST_WIDTH <= int(width[:9]) <= GREATEST_WIDTH):
        os.environ.pop("COLUMNS", None)
        with contextlib.suppress(OSError, ValueError):  # no terminal
            if sys.__stdout__ and os.get_terminal_size(sys.__stdout__.fileno()).columns < LEAST_WIDTH:
                os.environ["COLUMNS"] = "80"


def _end_usage(error: typer.TyperException, as_json: bool) -> int:
    from pydantic import ValidationError

    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())
        return 2
    if isinstance(error.__cause__, ValidationError):  # by which Typer refuses values
        error.message = _explain_value(error.__cause__.errors()[0])
    context = getattr(error, "ctx", None)
    message = re.sub(r"( \(Possible options: .*\)|\. Did you mean .*\?)$", "", error.format_message())
    hint = f"see {context.command_path} --help" if context else "see --help"
    if context and (unknown := re.fullmatch(r"No such command '(.*?)'\.?", message)):
        message = f"there is no command {unknown[1]!r}"
        hint = f"did you mean: {meant}" if (meant := command_meant(unknown[1], context.find_root().command)) else hint
    elif context and (unknown := re.fullmatch(r"No such option:? '?(-\S+?)'?", message)):
        options = [name for param in context.command.params for name in param.opts if name.startswith("--")]
        if meant := option_meant(unknown[1], options):
            hint = f"did you mean {meant}? {hint}"
    print_error(2, message.removesuffix("."), hint, as_json)
    return 2


def _explain_value(fault: "ErrorDetails") -> str:
    """What is wrong with the value of an option, which pydantic tells in a programmer's words."""
    if fault["type"] == "greater_than_equal":
        return f"it must be at least {fault['ctx']['ge']}"
    if fault["type"].startswith("int_"):
        return f"{fault['input']!r} is not a whole number"
    if fault["type"].startswith("float_"):
        return f"{fault['input']!r} is not a number"
    return fault["msg"].removeprefix("Value error, ")


def _end_output(error: OSError, as_json: bool) -> int:
    """End when stdout takes no more: done if the reader has gone, else a failure. An error of a file names it."""
    if error.filename:
        print_error(3, f"{error.filename}: {error.strerror}", "", as_json)
        return 3
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # so that Python does not complain again at exit
    if isinstance(error, BrokenPipeError):
        return 0
    print_error(3, f"can't write the output: {error.strerror}", "", as_json)
    return 3
