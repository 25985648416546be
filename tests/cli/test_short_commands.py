"""Commands as people type them: short names, models without -m, words that are nearly right, options given twice."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from chuk_lazarus.cli.app import app, run
from chuk_lazarus.cli.moe_expert import COMMANDS
from processor_time import of_children

LONG = ["introspect", "moe-expert"]
ROOT: Any = typer.main.get_command(app)

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture, arguments: list[str], code: int = 0) -> str:
    """What a run prints on stdout, or its line on stderr."""
    capsys.readouterr()
    assert run(arguments) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


@pytest.mark.parametrize(("name", "short"), [row[:2] for row in COMMANDS])
def test_a_short_name_is_the_same_command(name: str, short: str) -> None:
    long, alias = ROOT.commands["introspect"].commands["moe-expert"].commands[name], ROOT.commands[short]
    assert alias.callback.__wrapped__ is long.callback.__wrapped__
    assert alias.short_help == long.short_help
    assert [(param.name, param.opts, param.help) for param in alias.params] == [
        (param.name, param.opts, param.help) for param in long.params
    ]


def examples() -> Iterator[list[str]]:
    """The commands in the help of the short names."""
    for _, short, *_ in COMMANDS:
        lines = re.findall("^ *lazarus (.*)$", ROOT.commands[short].help, re.MULTILINE)
        assert lines
        for line in lines:
            yield shlex.split(line)


@pytest.mark.parametrize("words", list(examples()), ids=" ".join)
def test_the_help_of_a_short_name_has_examples_with_it(words: list[str]) -> None:
    context = ROOT.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=True)
    assert words[0] in ROOT.commands
    assert not {"-m", "-c", "-a"} & set(words)
    assert context.args == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze", "demo:native"],
        ["analyze", "--json", "demo:native"],
        ["analyze", "-m", "demo:native"],
        [*LONG, "moe-type-analyze", "demo:native"],
    ],
    ids=" ".join,
)
def test_a_model_needs_no_name(capsys: Capture, arguments: list[str]) -> None:
    wanted = json.loads(printed(capsys, [*LONG, "moe-type-analyze", "-m", "demo:native", "--json"]))
    found = json.loads(printed(capsys, list(dict.fromkeys([*arguments, "--json"]))))
    assert found.keys() == wanted.keys()
    assert [found[key] for key in ("model", "type", "layers")] == [wanted[key] for key in ("model", "type", "layers")]


@pytest.mark.parametrize(
    "arguments",
    ["A B C", "A -c B -c C", "-m A B C", "-m A -c B C", "A -c B C", "-c B -c C A"],
)
def test_several_models_are_compared(capsys: Capture, arguments: str) -> None:
    names = {"A": "demo:native", "B": "demo:upcycled", "C": "demo:permuted"}
    words = [names.get(word, word) for word in arguments.split()]
    models = json.loads(printed(capsys, ["compare", *words, "--experts", "2", "--json"]))["models"]
    assert [model["model"] for model in models] == list(names.values())


def test_a_page_names_the_command_as_it_was_given(capsys: Capture, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    printed(capsys, ["compare", "demo:native", "-c", "demo:upcycled", "demo:permuted", "--html", str(page)])
    assert "lazarus compare demo:native demo:permuted -c demo:upcycled" in page.read_text("utf-8").replace(
        "--compare", "-c"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze"], "Missing argument 'MODEL', or option '--model / -m' (see lazarus analyze --help)"),
        (
            ["compare", "demo:native"],
            "Missing argument 'OTHER', or option '--compare / -c' (see lazarus compare --help)",
        ),
        (["analyze", "a", "b"], "Got unexpected extra argument(s) (b) (see lazarus analyze --help)"),
        (["analyze", "a", "-m", "b"], "Got unexpected extra argument (a) (see lazarus analyze --help)"),
        (
            ["analyze", "-m", "a", "-m", "b"],
            "Invalid value for '--model' / '-m': it is given 2 times, and takes one value (see lazarus analyze --help)",
        ),
        (
            ["layout", "a", "--layers", "0", "--layers", "1", "--layers=2"],
            "Invalid value for '--layers': it is given 3 times, and takes one value (see lazarus layout --help)",
        ),
    ],
)
def test_too_few_words_and_too_many(capsys: Capture, arguments: list[str], message: str) -> None:
    assert printed(capsys, arguments, 2) == f"lazarus: {message}\n"


@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "a\0b"])
def test_every_option_refuses_a_wrong_value_in_plain_words(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, command in ROOT.commands.items():
        for param in getattr(command, "params", []):
            if param.param_type_name == "option" and not param.is_flag and param.name != "model":
                line = printed(capsys, [name, f"{max(param.opts, key=len)}={value}"], 2)  # no model is given
                assert not re.search("Value error|Input should|parse|integer,", line), line


@pytest.mark.parametrize(
    ("arguments", "problem"),  # as Typer has it from 0.29 on, and before
    [
        (["layout", "--context", "x"], "'--context': ('x' is not a whole number|'x' is not a valid integer)"),
        (["layout", "--context", "0"], "'--context': (it must be at least 1|0 is not in the range x>=1)"),
        (["verify", "--tolerance", "x"], "'--tolerance': ('x' is not a number|'x' is not a valid float)"),
        (["shrink", "--format", "mlxx"], "'--format': 'mlxx' is not one of 'auto', 'overlay', 'mlx'"),
    ],
)
def test_a_wrong_value_is_quoted(capsys: Capture, arguments: list[str], problem: str) -> None:
    line = f"lazarus: Invalid value for {problem} \\(see lazarus {arguments[0]} --help\\)\n"
    assert re.fullmatch(line, printed(capsys, arguments, 2))


@pytest.mark.parametrize("arguments", [["check", "demo:native", "--experts", ""], ["compute", "--memory", ""]])
def test_an_empty_value_is_none(capsys: Capture, arguments: list[str]) -> None:
    assert "''" in printed(capsys, [*arguments, "demo:native"], 2)


def test_a_flag_may_stand_twice(capsys: Capture) -> None:
    assert printed(capsys, ["layout", "demo:native", "--json", "--json"]).startswith("{")


@pytest.mark.parametrize("level", [[], ["introspect"], LONG], ids=["lazarus", "introspect", "moe-expert"])
@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("analyse", "lazarus analyze"),
        ("Verify", "lazarus verify"),
        ("surveys", "lazarus survey"),
        ("moe-type-analyse", "lazarus introspect moe-expert moe-type-analyze"),
        ("overlay-compres", "lazarus introspect moe-expert moe-overlay-compress"),
        ("compress", "lazarus introspect moe-expert moe-overlay-compress"),
        ("introspekt", "lazarus introspect"),
        ("version", "lazarus --version"),
        ("help", "lazarus --help"),
        ("demo:native", "lazarus analyze demo:native"),
        ("./model", "lazarus analyze ./model"),
        ("org/name@main", "lazarus analyze org/name@main"),
        ("model.gguf", "lazarus analyze model.gguf"),
    ],
)
def test_a_word_that_is_no_command(capsys: Capture, level: list[str], word: str, meant: str) -> None:
    assert printed(capsys, [*level, word], 2) == f"lazarus: there is no command {word!r} (did you mean: {meant})\n"


def test_a_word_that_is_like_no_command(capsys: Capture) -> None:
    assert printed(capsys, ["nonsense"], 2) == "lazarus: there is no command 'nonsense' (see lazarus --help)\n"


def test_an_option_that_is_nearly_right(capsys: Capture) -> None:
    line = printed(capsys, ["analyze", "demo:native", "--layrs", "0"], 2)
    assert line == "lazarus: No such option: --layrs (did you mean --layers? see lazarus analyze --help)\n"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--error", "--max-error"), ("--ratio", "--target-ratio"), ("--verbos", "--verbose"), ("--layr", "--layers")],
)
def test_an_option_is_found_by_its_end_or_its_likeness(capsys: Capture, word: str, meant: str) -> None:
    assert f"(did you mean {meant}? see" in printed(capsys, ["shrink", "demo:native", word, "1"], 2)


@pytest.mark.parametrize("word", ["--base", "--budget", "--quantise", "-x"])
def test_what_is_like_no_option_gets_no_guess(capsys: Capture, word: str) -> None:
    line = printed(capsys, ["shrink", "demo:native", word, "1"], 2)
    assert line == f"lazarus: No such option: {word} (see lazarus shrink --help)\n"


@pytest.mark.parametrize("level", [[], ["analyze"], ["introspect"], LONG, [*LONG, "moe-type-analyze"]], ids=" ".join)
def test_h_is_help(capsys: Capture, level: list[str]) -> None:
    assert printed(capsys, [*level, "-h"]) == printed(capsys, [*level, "--help"])


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "chuk_lazarus"]
    before = of_children()
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: lazarus ")
    assert of_children() - before < 0.3
