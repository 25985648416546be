"""The one way out: data to stdout, progress, hints and errors to stderr."""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

DAY = 24 * 3600  # seconds


def check_writable(path: Path | None) -> Path | None:
    """Refuse a place for results that can't be written, before the work that they would cost.

    Temporary files that a killed run has left there a day ago or earlier are deleted.
    """
    if path is not None:
        place = Path(os.path.realpath(path))
        try:
            place.exists()  # raises for a name that is too long
            problem = "it is a folder" if not path.name or place.is_dir() else ""
            parent = place.parent if path.is_symlink() else path.parent  # as it was given, where it was
            problem = problem or ("" if place.parent.is_dir() else f"there is no folder {_quote(parent)}")
            beside = path if path.exists() and not path.is_file() else place.parent  # a pipe or a device is kept
            problem = problem or ("" if os.access(beside, os.W_OK) else os.strerror(errno.EACCES))
        except OSError as error:
            problem = str(error.strerror)
        if problem:
            raise typer.BadParameter(f"can't write {_quote(path)}: {problem}")
        _clear_left(place.parent)
    return path


def _quote(path: Path) -> str:
    """A path for a message: as it is, but for what is no printable character."""
    from chuk_lazarus.introspection.moe.errors import printable

    return f"'{printable(str(path))}'"


def _clear_left(folder: Path) -> None:
    for left in folder.glob(".lazarus-" + "[a-z0-9_]" * 8):
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - DAY:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def check_drawable(path: Path | None) -> Path | None:
    """Refuse a place for a figure that can't be written, or whose name does not end as one of ours."""
    if path is not None:
        from chuk_lazarus.introspection.moe.views.figures.style import ENDINGS

        if path.suffix.lower() not in ENDINGS:
            raise typer.BadParameter(f"{_quote(path)} does not end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    return check_writable(path)


def show(
    report: "BaseModel", as_json: bool, output: Path | None, more: Sequence[Any] = (), instead: str | None = None
) -> None:
    """Print a report on stdout, as JSON, or as its table with `more` below or a text `instead`, and write its JSON to
    `output` if given."""
    text = format_json(report.model_dump(mode="json"))
    if output:
        write(output, text + "\n")
    if as_json:
        sys.stdout.write(text + "\n")
    elif instead is not None:
        sys.stdout.write(instead)
    else:
        from rich.console import Console

        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(report, *more, sep="\n", crop=False)  # commands are whole, however long
        sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def format_json(value: Any, indent: str = "") -> str:
    """JSON with a key a line, and lists of plain values on a line of their own."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = (f"{json.dumps(key, ensure_ascii=False)}: {format_json(entry, inner)}" for key, entry in value.items())
        return "{\n" + inner + f",\n{inner}".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + inner + f",\n{inner}".join(format_json(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def write(path: Path, text: str, option: str = "--output") -> None:
    """Write a file as `files.write_file` does; `option` is the one that named it."""
    from chuk_lazarus.introspection.moe.files import write_file

    try:
        write_file(path, text.encode())
    except OSError as error:
        raise typer.BadParameter(f"can't write {_quote(path)}: {error.strerror}", param_hint=option) from None


def print_hint(text: str) -> None:
    """A remark for the person at the terminal."""
    sys.stderr.write(text + "\n")


def print_error(code: int, message: str, hint: str, as_json: bool) -> None:
    """One line on stderr: plain text, or {"error": {"code", "message", "hint"}}."""
    from chuk_lazarus.introspection.moe.errors import printable

    message = printable(" ".join(line.strip() for line in message.splitlines()))
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
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, visible=done < total)

        yield report
