"""Write what the documents take from the program itself: docs/cli.md, docs/schema, and the screens and the figure.

    python tools/reference.py

The command line comes from the Typer app, the schemas from the result models, and a screen, in any page, from the
command in its first line.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer

from chuk_lazarus.cli.app import app
from chuk_lazarus.cli.moe_expert import COMMANDS
from chuk_lazarus.cli.positional import WORD
from chuk_lazarus.introspection.moe import reports

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CLI = DOCS / "cli.md"
SCHEMAS = DOCS / "schema"
FIGURE = DOCS / "permuted.svg"
FIGURE_COMMAND = "lazarus introspect moe-expert moe-type-analyze -m demo:permuted"
SHORT = {name: short for name, short, *_ in COMMANDS}
RENEW = "run: python tools/reference.py"

SCREEN = re.compile(r"^    \$ (lazarus .+)\n((?:(?:    .*)?\n)*?)(?=\n*(?:\S|\Z))", re.MULTILINE)

INTRODUCTION = """# The command line

Every command and option. This page is made by `python tools/reference.py` from the program, and a test holds it
against it. `--help` behind any command says the same.

    lazarus --version
    lazarus introspect moe-expert --help

A model is a folder, a `.safetensors` or `.gguf` file, a Hub id (`org/name`, `org/name@revision`,
`org/name/file.gguf`), or an embedded one: `demo:lora`, `demo:upcycled`, `demo:native`, `demo:permuted`, and their dense
`demo:parent`. `MODEL#STACK` reads another stack of layers, such as `#encoder`. Layers are `0,5,10`, `0-23/6` (every
sixth), or `all`. Sizes are written like `500MB` or `2GB`.

Results go to stdout, and progress, hints and errors to stderr. The exit codes are in [json.md](json.md), the figures in
[concepts.md](concepts.md).

What the environment says:

| variable | what |
|---|---|
| `LAZARUS_CACHE` | where bytes from the Hub and unfinished work are kept, `~/.cache/chuk-lazarus` if not set |
| `LAZARUS_CACHE_LIMIT` | how much is kept, `20GB` if not set |
| `LAZARUS_DEVICE` | `gpu` or `cpu`: where products and decoding are done; if not set, a GPU on Apple Silicon only |
| `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` | as the Hub's own client takes them |
| `COLUMNS`, `NO_COLOR` | the width of tables, and no colours |

Each command has a long name, below `lazarus introspect moe-expert`, and a short one, below `lazarus`: they are the
same. A model stands behind either, or behind `-m`. [`lazarus cache`](#cache) tells what is kept on this machine.

| command | short | what |
|---|---|---|
"""


@cache
def program() -> Any:
    """The `lazarus` command."""
    return typer.main.get_command(app)


def commands() -> dict[str, Any]:
    """The commands of `lazarus introspect moe-expert`, by name."""
    found: dict[str, Any] = program().commands["introspect"].commands["moe-expert"].commands
    return found


def cli() -> str:
    rows = [
        f"| [`{name}`](#{name}) | `{SHORT[name]}` | {cell(command.get_short_help_str(200))} |"
        for name, command in commands().items()
    ]
    sections = [
        section(name, command, [f"lazarus introspect moe-expert {name}", f"lazarus {SHORT[name]}"])
        for name, command in commands().items()
    ]
    kept = section("cache", program().commands["cache"], ["lazarus cache"])
    return "\n".join([INTRODUCTION + "\n".join(rows) + "\n", *sections, kept])


def section(name: str, command: Any, calls: list[str]) -> str:
    """A command: what it does, its usage under each of its names, its options, its examples."""
    text, _, examples = command.help.partition("\b\n")
    arguments = [param for param in command.params if not is_option(param)]
    required = [param for param in command.params if is_option(param) and param.required]
    usage = [*map(placeholder, arguments), *(f"{param.opts[-1]} {placeholder(param)}" for param in required)]
    lines = [
        f"## {name}\n",
        re.sub(r"\s*\n\n\s*", "\n\n", text.strip()),
        "\n" + "\n".join(f"    {' '.join([call, *usage, '[OPTIONS]'])}" for call in calls) + "\n",
        "| option | default | what |\n|---|---|---|",
        *(row(param) for param in [*arguments, *required]),
        *(row(param) for param in command.params if is_option(param) and not param.required),
    ]
    if examples:
        lines.append("\nFor example:\n")
        lines += [f"    {line.strip()}" for line in examples.splitlines()[1:]]
    return "\n".join(lines) + "\n"


def row(param: Any) -> str:
    names = f"`{placeholder(param)}`"
    if is_option(param):
        *short, last = sorted(param.opts, key=len)
        value = "" if param.is_flag else f" {placeholder(param)}"
        names = ", ".join(f"`{name}`" for name in [*short, f"{last}{value}"])
    is_required = param.required or param.name.endswith(WORD)
    default = "required" if is_required else "" if param.default in (None, False) else f"`{param.default}`"
    return f"| {cell(names)} | {default} | {cell(param.help)} |"


def is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def placeholder(param: Any) -> str:
    """What stands for its value, or its values."""
    value = str(param.metavar or param.name.rpartition("_")[2].upper())
    return value if param.nargs != -1 or value.endswith("...") else f"{value}..."


def cell(text: str) -> str:
    """Text in a table."""
    return text.replace("|", r"\|")


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of each kind of result, by its name and version, such as "moe-type-analysis/1"."""
    found: dict[str, dict[str, Any]] = {}
    for model in vars(reports).values():
        if isinstance(model, type) and issubclass(model, reports.Report) and "schema_" in model.model_fields:
            name = model.model_fields["schema_"].default
            schema = model.model_json_schema(mode="serialization")
            loosen(schema)
            found[name] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": name}
    return found


def loosen(schema: Any) -> None:
    """Say what the contract says: every key is always there, and a reader must put up with new ones."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema["required"] = list(schema["properties"])
            schema.pop("additionalProperties", None)
            for key in schema["properties"].values():
                key.pop("title", None)  # the key again, in capitals
        for inner in schema.values():
            loosen(inner)
    elif isinstance(schema, list):
        for inner in schema:
            loosen(inner)


def schema_files() -> dict[Path, str]:
    return {
        SCHEMAS / f"{name.replace('/', '-')}.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas().items()
    }


def run(command: str) -> str:
    """What a command line prints, on 80 columns."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "chuk_lazarus.cli", *shlex.split(command)[1:]],
        capture_output=True,
        encoding="utf-8",
        env=kept | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    return done.stdout


def screens(text: str) -> Iterator[tuple[str, str]]:
    """The commands whose output a page shows, and that output."""
    for match in SCREEN.finditer(text):
        yield match[1], re.sub(r"^    ", "", match[2], flags=re.MULTILINE)


def renew_screens(text: str) -> str:
    """A page with the outputs of now."""

    def shown(match: re.Match[str]) -> str:
        lines = run(match[1]).rstrip().split("\n")
        return "\n".join([f"    $ {match[1]}", *(f"    {line}".rstrip() for line in lines)]) + "\n"

    return SCREEN.sub(shown, text)


def figure() -> str:
    """The figure in README.md."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"{FIGURE_COMMAND} --plot {folder}/figure.svg")
        return Path(folder, "figure.svg").read_text(encoding="utf-8")


if __name__ == "__main__":
    CLI.write_text(cli(), encoding="utf-8")
    SCHEMAS.mkdir(exist_ok=True)
    for path in set(SCHEMAS.iterdir()) - schema_files().keys():
        path.unlink()
    for path, text in schema_files().items():
        path.write_text(text, encoding="utf-8")
    FIGURE.write_text(figure(), encoding="utf-8")
    for page in PAGES:
        page.write_text(renew_screens(page.read_text(encoding="utf-8")), encoding="utf-8")
