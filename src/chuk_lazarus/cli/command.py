"""What all commands have in common: a command returns its report, and this shows it.

`command` turns a function that returns a report into one for Typer. It adds the options that commands share, puts a
group of options in the place of one parameter, lets some options stand without their names, shows progress, and prints
or writes the report and what it cost. `Command` is the class of such a command for Typer.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import update_wrapper
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand

from .next_steps import next_steps
from .options import Json, Memory, Output, Quiet, Verbose
from .output import print_hint, progress_bar, show
from .positional import Positional, both, place

if TYPE_CHECKING:
    from pydantic import BaseModel

Note = TypeVar("Note")

# options that do not change the result
NOT_OF_THE_RESULT = {
    "html",
    "plot",
    "caption",
    "visualize",
    "memory",
    "dask",
    "as_json",
    "table_format",
    "output",
    "quiet",
    "verbose",
}


def _shared(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


MEMORY = _shared("memory", Memory, None)
JSON = _shared("as_json", Json, False)
OUTPUT = _shared("output", Output, None)
QUIET = _shared("quiet", Quiet, False)
VERBOSE = _shared("verbose", Verbose, False)


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Options that belong together: `build` has them as its parameters, and makes the command's argument of them."""

    build: Callable[..., Any]


class Command(TyperCommand):
    """A command some of whose options may stand without their names, and none but a list may be given twice."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Parse the arguments; raises a usage error."""
        if context.resilient_parsing:  # for completion
            return super().parse_args(context, args)
        _, _, order = self.make_parser(context).parse_args(args=list(args))
        counts: Counter[Any] = Counter(order)
        for param, times in counts.items():
            if times > 1 and not (getattr(param, "is_flag", False) or getattr(param, "multiple", False)):
                raise typer.BadParameter(f"it is given {times} times, and takes one value", context, param)
        rest = super().parse_args(context, args)
        place(context)
        return rest


@dataclass(frozen=True, slots=True)
class Run:
    """How a command runs; `progress` is for a service to report to, None where nobody watches."""

    context: typer.Context
    progress: Any

    @property
    def given(self) -> set[str]:
        """The names of the parameters that stand on the command line."""
        names = [str(option.name) for option in self.context.command.params]
        sources = {name: self.context.get_parameter_source(name) for name in names}
        return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}

    @property
    def command_line(self) -> str:
        """The command that gives such a result, without the options that say where it goes."""
        words, given = self.context.command_path.split(), self.given
        for param in self.context.command.params:
            name = str(param.name)
            if name in given - NOT_OF_THE_RESULT:
                value = self.context.params[name]
                for one in value if isinstance(value, list | tuple) else [value]:
                    words += [param.opts[-1]] if param.param_type_name == "option" else []
                    words += [] if one is True else [str(one)]
        return shlex.join(words)


@dataclass(frozen=True, slots=True)
class Result:
    """A report with what is shown below its table, with hints for the verbose, and the exit code.

    `text` is what is printed in the place of the table, None for the table itself.
    """

    report: "BaseModel"
    more: Sequence[Any] = ()
    hints: Sequence[str] = field(default=())
    exit_code: int = 0
    text: str | None = None


def command(
    *shared: Parameter,
) -> Callable[[Callable[..., "BaseModel | Result"]], Callable[..., None]]:
    """Make a command of a function `(run, options...) -> report`; the options in `shared` are added to its own.

    `--verbose` comes last where a command has it; a function that declares it itself also receives it.
    """

    def decorate(function: Callable[..., "BaseModel | Result"]) -> Callable[..., None]:
        _, *options = signature(function).parameters.values()
        groups = {parameter.name: group for parameter in options if (group := _note(parameter, OptionGroup))}
        parameters = [Parameter("typer_context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for parameter in options:
            if group := groups.get(parameter.name):
                parameters += signature(group.build).parameters.values()
            elif note := _note(parameter, Positional):
                parameters += both(parameter, note)
            else:
                parameters += [parameter]
        parameters = [
            parameter.replace(kind=Parameter.KEYWORD_ONLY)
            for parameter in sorted([*parameters, *shared], key=lambda parameter: parameter.name == "verbose")
        ]

        def run_command(typer_context: typer.Context, **values: Any) -> None:
            for name, group in groups.items():
                values[name] = group.build(
                    **{option: values.pop(option) for option in signature(group.build).parameters}
                )
            arguments = {parameter.name: values[parameter.name] for parameter in options}
            watched = progress_bar(values["quiet"]) if "quiet" in values else nullcontext()
            with watched as progress:
                returned = function(Run(typer_context, progress), **arguments)
            result = returned if isinstance(returned, Result) else Result(returned, hints=_costs(returned))
            output = None if "output" in arguments else values.get("output")
            show(result.report, values["as_json"], output, result.more, result.text)
            for hint in result.hints if values.get("verbose") else ():
                print_hint(hint)
            if not (values["as_json"] or values.get("quiet") or result.text is not None):
                run = Run(typer_context, None)
                given = {name: value for name, value in typer_context.params.items() if name in run.given}
                for step in next_steps(result.report, function.__name__, given):
                    print_hint(step)
            if result.exit_code:
                raise typer.Exit(result.exit_code)

        update_wrapper(run_command, function)
        run_command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # which Typer reads
        run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run_command

    return decorate


def _note(parameter: Parameter, kind: type[Note]) -> Note | None:
    """What an annotation says beside the type."""
    return next((note for note in get_args(parameter.annotation) if isinstance(note, kind)), None)


def _costs(report: "BaseModel") -> list[str]:
    cost = getattr(report, "cost", None)
    return [cost.describe()] if cost else []
