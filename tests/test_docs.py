"""What the documents say is so: commands parse, links lead somewhere, code runs, screens and schemas are of now."""

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

import reference
from chuk_lazarus.cli.app import app, run

ROOT = reference.ROOT
SOURCE = ROOT / "src/chuk_lazarus"
WRITTEN = [*sorted(ROOT.glob("*.md")), *reference.PAGES[1:], *sorted(ROOT.glob("experiments/*/README.md"))]
GUIDES = [path for path in reference.PAGES if path != reference.CLI]
MARKDOWN = MarkdownIt("commonmark").enable("table")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
TIME = re.compile(r"\d+\.\d s\b")

Capture = pytest.CaptureFixture[str]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tokens(path: Path) -> Iterator[Token]:
    """The blocks of a page, and what stands within a line of it."""
    for token in MARKDOWN.parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or []


# Commands


def command_lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Every command of ours in a page, and whether it is a whole one: in a line of code it is, within a sentence it may
    be cut."""
    for token in tokens(path):
        if token.type in ("code_block", "fence"):
            for line in token.content.replace("\\\n", " ").splitlines():
                line = re.sub(r"^\$ |\s#\s.*|\s\[OPTIONS\]", "", line.strip())
                line = re.sub(r"^(?:[A-Z_]+=\S* )+", "", line)
                if line.startswith("lazarus "):
                    yield line, True
        elif token.type == "code_inline":
            first, _, rest = token.content.replace(" …", "").partition(" ")
            if first == "lazarus" and rest:
                yield f"lazarus {rest}", False
            elif first in reference.commands() and rest:
                yield f"lazarus introspect moe-expert {first} {rest}", False


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parse(line: str) -> None:
    """Parse a command line, and run nothing."""
    words = shlex.split(re.split(r"\s[|>&]", line)[0])[1:]
    command = program()
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]  # KeyError: no such command
    with contextlib.suppress(typer.Exit):  # of --help and --version
        command.make_context("lazarus", words).close()


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_every_command_line_parses(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, whole in command_lines(path):
        try:
            parse(line)
        except (KeyError, typer.TyperException) as error:
            is_cut = type(error).__name__ == "NoArgsIsHelpError" or str(error).startswith("Missing ")
            if whole or not is_cut:
                pytest.fail(f"{line}\n{error!r} {getattr(error, 'message', '')}")


@pytest.mark.parametrize(
    "line",
    [
        "lazarus introspect moe-expert moe-typo -m demo:native",
        "lazarus introspect moe-expert moe-type-analyze -m demo:native --no-such-option",
        "lazarus introspect moe-expert moe-type-analyze --layers all",
        "lazarus introspect moe-expert moe-overlay-compute -m demo:native --gate-rank many",
    ],
)
def test_a_wrong_command_line_does_not_parse(line: str, capsys: Capture) -> None:
    with pytest.raises((KeyError, typer.TyperException)):
        parse(line)


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_every_option_that_is_named_exists(path: Path) -> None:
    known = {"--help", "--version", "--trust-remote-code"}  # the last one is mlx-lm's
    known |= {option for command in reference.commands().values() for param in command.params for option in param.opts}
    found = {word.split("=")[0] for token in tokens(path) if token.type == "code_inline" for word in [token.content]}
    named = {word.split()[0] for word in found if word.startswith("--")}
    assert not named - known


# Links, tables and code


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    blocks = MARKDOWN.parse(path.read_text(encoding="utf-8"))
    return {
        slug("".join(part.content for part in inline.children or []))
        for heading, inline in pairwise(blocks)
        if heading.type == "heading_open"
    }


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for token in tokens(path):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{target} is not there"
        assert there.resolve().is_relative_to(ROOT), f"{target} leads out of the repository"
        assert not anchor or anchor in anchors(there), f"{file or path.name} has no heading {anchor}"


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_every_row_of_a_table_has_its_columns(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    tables = [token.map for token in tokens(path) if token.type == "table_open" and token.map]
    for first, last in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[first:last] if line.strip()}
        assert len(columns) == 1, lines[first]
    inside = {number for first, last in tables for number in range(first, last)}
    code = [token.map for token in tokens(path) if token.type in ("fence", "code_block") and token.map]
    inside |= {number for first, last in code for number in range(first, last)}
    assert not [line for number, line in enumerate(lines) if line.startswith("|") and number not in inside]


def python_blocks() -> list[Any]:
    """All blocks of Python in README.md and the guides; each must run by itself."""
    return [
        pytest.param(token.content, id=f"{name(path)}:{token.map[0] + 1 if token.map else 0}")
        for path in GUIDES
        for token in tokens(path)
        if token.type == "fence" and token.info == "python"
    ]


@pytest.mark.parametrize("code", python_blocks())
def test_every_block_of_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<document>", "exec"), {"__name__": "__document__"})


def test_a_row_of_the_table_is_quoted_as_it_is() -> None:
    fences = [token for path in GUIDES for token in tokens(path) if token.type == "fence"]
    quoted = [token.content for token in fences if token.info == "toml"]
    table = (ROOT / "src/chuk_lazarus/introspection/moe/weights/layouts.toml").read_text("utf-8")
    assert quoted
    assert [text for text in quoted if text not in table] == []


# What the program says of itself


def same_text(before: str, after: str) -> bool:
    """The same words, and the same numbers but for the last digit: another BLAS rounds otherwise."""
    before, after = (TIME.sub("0.0 s", text) for text in (before, after))
    if NUMBER.sub("#", before).split() != NUMBER.sub("#", after).split():
        return False
    numbers = [[float(x.replace(",", "")) for x in NUMBER.findall(text)] for text in (before, after)]
    return bool(numbers[1] == pytest.approx(numbers[0], rel=0.02, abs=0.11))


SCREENS = [(path, *screen) for path in reference.PAGES for screen in reference.screens(path.read_text("utf-8"))]


@pytest.mark.parametrize(("path", "command", "shown"), SCREENS, ids=[f"{name(x[0])}: {x[1]}" for x in SCREENS])
def test_a_screen_shows_what_the_command_prints(path: Path, command: str, shown: str) -> None:
    assert same_text(shown, reference.run(command)), reference.RENEW


def test_readme_shows_a_screen() -> None:
    assert [path for path, *_ in SCREENS if path.name == "README.md"]


@pytest.mark.long
def test_the_figure_is_that_of_its_command() -> None:
    def text(svg: str) -> str:
        return " ".join(part for node in ElementTree.fromstring(svg).iter() if (part := (node.text or "").strip()))

    assert same_text(text(reference.FIGURE.read_text("utf-8")), text(reference.figure())), reference.RENEW


def test_the_command_lines_page_is_up_to_date() -> None:
    assert reference.CLI.read_text("utf-8") == reference.cli(), reference.RENEW


def test_the_page_has_every_variable_of_ours() -> None:
    named = {name for file in SOURCE.rglob("*.py") for name in re.findall(r"LAZARUS_[A-Z_]+", file.read_text("utf-8"))}
    assert named
    assert not [name for name in named if f"`{name}`" not in reference.CLI.read_text("utf-8")]


def test_the_layout_of_the_code_has_every_file() -> None:
    plan = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Layout of the code")[2]
    moe = SOURCE / "introspection/moe"
    packages = [
        moe,
        *(
            moe / package
            for package in ("weights", "jobs", "provenance", "overlays", "conversion", "views", "numerics")
        ),
    ]
    files = [file for package in packages for file in package.iterdir() if file.is_file()]
    assert not [file.name for file in files if file.name != "__init__.py" and f" {file.name}" not in plan]


@pytest.mark.parametrize("command", reference.commands())
def test_the_page_has_all_that_help_says(command: str, capsys: Capture) -> None:
    assert run(["introspect", "moe-expert", command, "--help"]) == 0
    words = capsys.readouterr().out
    page = reference.CLI.read_text("utf-8").partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", words, re.MULTILINE)) - {"--help"}
    assert options
    assert options == set(re.findall(r"`(--[\w-]+)", "\n".join(re.findall(r"^\| `.*?` \|", page, re.MULTILINE))))
    assert "".join(re.findall(r"lazarus .*", words.partition("Example")[2])) in "".join(re.findall("lazarus .*", page))


# The JSON schemas


def test_the_schemas_are_up_to_date() -> None:
    stored = {path: path.read_text("utf-8") for path in reference.SCHEMAS.iterdir()}
    assert stored == reference.schema_files(), reference.RENEW


def check(result: dict[str, Any]) -> None:
    """Hold a result against the schema that it names, as it lies in docs/schema."""
    file = reference.SCHEMAS / f"{result['schema'].replace('/', '-')}.json"
    schema = json.loads(file.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(result)


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay checkpoint of a demo model."""
    folder = tmp_path_factory.mktemp("compressed") / "overlay"
    arguments = ["moe-overlay-compress", "-m", "demo:upcycled", "-O", str(folder), "--target-ratio", "3", "--quiet"]
    assert run(["introspect", "moe-expert", *arguments]) == 0
    return folder


DENSE_AND_ALL = ["-m", "demo:permuted", "--parent", "demo:parent", "--layers", "all", "--variance", "0.5,0.999"]
RESULTS = {
    "moe-layout/1": ["moe-layout", "-m", "demo:native"],
    "moe-cache/1": ["cache"],
    "moe-type-analysis/1": ["moe-type-analyze", "-m", "demo:native"],
    "moe-type-analysis/1, with a parent": ["moe-type-analyze", *DENSE_AND_ALL],
    "moe-type-analysis/1, no gate": ["moe-type-analyze", "-m", str(ROOT / "tests/fixtures/nemotron_h")],
    "moe-type-quick/1": ["moe-type-analyze", "-m", "demo:native", "--quick"],
    "moe-type-comparison/1": ["moe-type-compare", "-m", "demo:native", "-c", "demo:upcycled"],
    "moe-weights-verification/1": ["moe-weights-verify", "-m", "demo:native", "--against", "demo:native"],
    "moe-overlay/1": ["moe-overlay-compute", "-m", "demo:upcycled", "--max-error", "0.05"],
    "moe-overlay-verification/1": ["moe-overlay-verify", "-m", "demo:upcycled"],
    "moe-overlay-estimate/1": ["moe-overlay-estimate", "-m", "demo:native", "--samples", "1"],
    "moe-overlay-compression/1": ["moe-overlay-compress", "-m", "demo:native", "-O", "new", "--gate-rank", "2"],
    "moe-overlay-export/1": ["moe-overlay-export", "OVERLAY", "-O", "new"],
    "moe-type-survey/1": ["moe-type-survey", "demo:native"],
    "moe-survey-plan/1": ["moe-type-survey", "demo:native", "--plan"],
}


@pytest.mark.parametrize("what", RESULTS)
def test_a_result_fits_its_schema(
    what: str, overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(overlay) if word == "OVERLAY" else word for word in RESULTS[what]]
    level = [] if what == "moe-cache/1" else ["introspect", "moe-expert"]
    assert run([*level, *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == what.partition(",")[0]
    check(result)


def test_an_evaluation_fits_its_schema(overlay: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("mlx_lm")
    text = tmp_path / "text.txt"
    text.write_text("A mixture of experts, and its overlay.\n" * 20)
    arguments = ["-m", "demo:upcycled", "--overlay", str(overlay), "--text", str(text), "--context", "64", "--json"]
    assert run(["introspect", "moe-expert", "moe-overlay-eval", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "moe-overlay-evaluation/1"
    check(result)


def test_the_rows_of_a_survey_fit_their_schema(tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.jsonl"
    assert run(["introspect", "moe-expert", "moe-type-survey", "demo:native", "no-such-folder", "-o", str(rows)]) == 1
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert [bool(row["answer"]) for row in found] == [True, False]
    for row in found:
        check(row)


def test_every_schema_has_been_tried() -> None:
    tried = {what.partition(",")[0] for what in RESULTS} | {"moe-overlay-evaluation/1", "moe-type-survey-row/1"}
    assert tried == reference.schemas().keys()


def test_a_result_that_lacks_a_key_does_not_fit(capsys: Capture) -> None:
    assert run(["introspect", "moe-expert", "moe-layout", "-m", "demo:native", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    del result["cost"]["seconds"]
    with pytest.raises(jsonschema.ValidationError, match="seconds"):
        check(result)


@pytest.mark.parametrize("schema", reference.schemas())
def test_every_key_is_explained(schema: str) -> None:
    def keys(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from node.get("properties", {})
            for inner in node.values():
                yield from keys(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from keys(inner)

    explained = {token.content for token in tokens(reference.DOCS / "json.md") if token.type == "code_inline"}
    assert not set(keys(reference.schemas()[schema])) - explained
