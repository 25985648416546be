"""Options that may also stand without their names: `lazarus analyze MODEL` beside `lazarus analyze -m MODEL`.

A command has one parameter for such an option, and Typer gets two: an argument, and the option. `place` gives the words
of the arguments to the options that were not given by name.
"""

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


def place(context: Any) -> None:
    """Give the words of a parsed command line to the options that were not given, in order.

    Too few words, and too many, are usage errors.
    """
    values, params = context.params, {param.name: param for param in context.command.params}
    places = [(param, params[name.removesuffix(WORD)]) for name, param in params.items() if name.endswith(WORD)]
    words: list[str] = []
    for argument, _ in places:
        word = values[argument.name]
        words += word if isinstance(word, list | tuple) else [] if word is None else [word]
    for argument, option in places:
        if not values[option.name] and not words:
            context.fail(f"Missing argument '{argument.metavar}', or option '{' / '.join(option.opts)}'")
        if option.multiple:
            values[option.name], words = [*(values[option.name] or []), *words], []
        elif values[option.name] is None:
            values[option.name] = option.process_value(context, words.pop(0))
    if words:
        context.fail(f"Got unexpected extra argument ({' '.join(words)})")
