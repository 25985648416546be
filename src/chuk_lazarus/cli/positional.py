"""Options that may also stand without their names: `lazarus analyze MODEL` beside `lazarus analyze -m MODEL`.

A command keeps one parameter for such an option. Typer gets two, the option and an argument before it; `place` gives the
words of the arguments to the options that were not given by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin

import typer

WORD = "_word"  # ends the name of an argument


@dataclass(frozen=True, slots=True)
class Positional:
    """A note in an option's annotation: it may stand without its name. A list takes all words that are left."""

    metavar: str
    help: str


def both(parameter: Parameter, note: Positional) -> list[Parameter]:
    """The parameters in place of one: the argument, and the option, neither of which must be given."""
    is_list = get_origin(get_args(parameter.annotation)[0]) is list
    kind: Any = list[str] if is_list else str
    argument = typer.Argument(metavar=note.metavar, help=note.help, show_default=False)
    word = parameter.replace(name=f"{parameter.name}{WORD}", annotation=Annotated[kind | None, argument], default=None)
    return [word, parameter.replace(default=None)]


def place(context: typer.Context, values: dict[str, Any], notes: Mapping[str, Positional]) -> None:
    """Move the words in `values` to the options that were not given, in order; a usage error for too few or many."""
    words: list[str] = []
    for name in notes:
        word = values.pop(f"{name}{WORD}")
        words += word if isinstance(word, list) else [] if word is None else [word]
    options = {param.name: param for param in context.command.params}
    for name, note in notes.items():
        option: Any = options[name]
        if not values[name] and not words:
            context.fail(f"Missing argument '{note.metavar}', or option '{' / '.join(option.opts)}'")
        if option.multiple:
            values[name], words = [*(values[name] or []), *words], []
        elif values[name] is None:
            values[name] = option.process_value(context, words.pop(0))
    if words:
        context.fail(f"Got unexpected extra argument ({' '.join(words)})")
