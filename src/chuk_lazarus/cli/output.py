"""The one way out: data to stdout, progress, hints and errors to stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel


def show(report: "BaseModel", as_json: bool, output: Path | None) -> None:
    """Print a report on stdout, as JSON or as its table, and write its JSON to `output` if given."""
    text = report.model_dump_json(indent=2)
    if output:
        write(output, text + "\n")
    if as_json:
        sys.stdout.write(text + "\n")
    else:
        from rich.console import Console

        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(report)
        sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then renamed."""
    from chuk_lazarus.introspection.moe import InvalidRequest

    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidRequest(f"can't write {path}: {error.strerror}", "give another file to -o") from None


def print_hint(text: str) -> None:
    """A remark for the person at the terminal."""
    sys.stderr.write(text + "\n")


def print_error(code: int, message: str, hint: str, as_json: bool) -> None:
    """One line on stderr: plain text, or {"error": {"code", "message", "hint"}}."""
    message = " ".join(message.split())
    if as_json:
        line = json.dumps({"error": {"code": code, "message": message, "hint": hint}}, ensure_ascii=False)
    else:
        line = f"lazarus: {message}" + (f" ({hint})" if hint else "")
    sys.stderr.write(line + "\n")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A function for services to report progress to: a bar per task on stderr, in a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, visible=done < total)

        yield report
