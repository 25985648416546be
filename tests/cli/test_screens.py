"""Every screen at three widths of the terminal: nothing is wider, nothing is cut off, and no word is broken."""

import re
from collections.abc import Callable
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from chuk_lazarus.cli.app import command_tree, run
from chuk_lazarus.introspection.moe import (
    MoECacheService,
    MoECompressionService,
    MoELayoutService,
    MoESurveyService,
    MoETypeAnalysis,
    MoETypeComparison,
    MoETypeService,
    MoEWeightsService,
)
from chuk_lazarus.introspection.moe.views.tables.grid import WORDS, draw_table, wrap
from made_layers import copies, native, write
from places import FIXTURES

LONG = "an-organisation-with-a-name/Some-Mixture-235B-A22B-Instruct-2507-FP8"
WIDTHS = pytest.mark.parametrize("width", [70, 100, 140])

Capture = pytest.CaptureFixture[str]


def _repeat(report: MoETypeAnalysis) -> MoETypeAnalysis:
    """As of a model of many layers with a long name."""
    layers = tuple(report.layers[0].model_copy(update={"layer": number}) for number in range(12))
    return report.model_copy(update={"model": LONG, "layers": layers, "moe_layers": tuple(range(12))})


def _sparse(folder: Path) -> str:
    rng = np.random.default_rng(0)
    return write(folder / "sparse", native(rng, experts=256, neurons=8, hidden=16))


def _deep(folder: Path) -> str:
    return write(folder / "deep", copies(np.random.default_rng(0)), layers=5)


compress, types = MoECompressionService, MoETypeService
REPORTS: dict[str, Callable[[Path], Any]] = {
    "analysis": lambda _: types.analyze("demo:upcycled"),
    "parent": lambda _: types.analyze("demo:permuted", parent="demo:parent", layers="all"),
    "many layers": lambda _: _repeat(types.analyze("demo:native")),
    "many experts": lambda folder: types.analyze(_sparse(folder)),
    "quick": lambda _: types.quick("demo:permuted"),
    "comparison": lambda _: MoETypeComparison(
        models=(
            *(types.analyze(f"demo:{name}") for name in ("native", "upcycled", "permuted")),
            _repeat(types.analyze("demo:upcycled")),
        )
    ),
    "layout": lambda _: MoELayoutService.describe("demo:native", fit="300KB"),
    "mixed layout": lambda _: MoELayoutService.describe(str(FIXTURES / "mlx_qwen3_moe_mixed"), layers="all"),
    "survey": lambda _: MoESurveyService.survey(["demo:native", "demo:permuted", str(FIXTURES / "dense_llama")]),
    "plan": lambda _: MoESurveyService.plan(["demo:native", "demo:upcycled", str(FIXTURES / "dense_llama")]),
    "overlay": lambda _: compress.compute("demo:upcycled", layers="all"),
    "coded overlay": lambda _: compress.compute("demo:upcycled", bits=2.25),
    "verification": lambda _: compress.verify("demo:upcycled"),
    "coded verification": lambda _: compress.verify("demo:upcycled", bits=2.25),
    "estimate": lambda _: compress.estimate("demo:upcycled"),
    "coded estimate": lambda folder: compress.estimate(_deep(folder), bits=3, layers="0,4"),
    "written": lambda folder: compress.compress("demo:upcycled", folder / "small", bits=2.25),
    "export": lambda folder: compress.export("demo:native", folder / "mlx", format="mlx", bits=3),
    "check": lambda _: MoEWeightsService.verify("demo:upcycled", "demo:native"),
    "cache": lambda _: MoECacheService.describe(),
}


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Each report is made once."""
    return cache(lambda name: REPORTS[name](tmp_path_factory.mktemp(name.replace(" ", "-"))))


def show(report: Any, width: int) -> list[str]:
    console = Console(width=width, highlight=False, file=StringIO())
    more = [report.details()] if hasattr(report, "details") else []
    console.print(report, *more, sep="\n", crop=False)
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@WIDTHS
@pytest.mark.parametrize("name", REPORTS)
def test_a_screen_fits_its_terminal(name: str, width: int, report_of: Callable[[str], Any]) -> None:
    lines = show(report_of(name), width)
    assert len(lines) > 2
    commands = lines.index("Next:") if "Next:" in lines else len(lines)  # which are whole, however long
    for line in lines[:commands]:
        assert len(line) <= width
        assert "…" not in line.strip()[1:]  # the name of a model in a table of many keeps its end
        assert not re.match(r"\s+[%±]|\s+[kMGT]?B\b", line), "a unit without its number"
    text = "\n".join(lines)
    if "Verdict" not in text:  # words that a narrow column would break
        assert not re.search(r"\b(NATIV|UPCYCLE|UNDETERMINE|measure|Cosin|Laye|Quantis)\b", text)


@WIDTHS
def test_a_survey_has_a_line_for_each_model(width: int, report_of: Callable[[str], Any]) -> None:
    survey = report_of("survey")
    first = survey.rows[0]
    named = first.model_copy(update={"request": first.request.model_copy(update={"model": LONG[:60]})})
    lines = show(survey.model_copy(update={"rows": (named, *survey.rows)}), width)
    assert sum(bool(re.search(r" (NATIVE|UPCYCLED) +\d+% ", line)) for line in lines) == 3
    assert (f" {LONG[:60]} " in "\n".join(lines)) == (width >= 100)
    assert max(map(len, lines)) <= width


@WIDTHS
def test_the_help_of_each_command_fits_its_terminal(
    width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ["", *command_tree().commands]:
        assert run([*([name] if name else []), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        examples = "    lazarus "  # which are whole
        assert max(len(line) for line in lines if not line.startswith(examples)) <= width, name


def test_columns_make_room_in_their_order() -> None:
    headings = ["Layer", "First", "Second", "Third"]
    table = draw_table(headings, [["0", "1" * 10, "2" * 10, "3" * 10]], leave=("Third", "First"))
    for width, shown in ((60, "123"), (36, "12"), (25, "2")):
        lines = show(table, width)
        assert [digit for digit in "123" if digit * 10 in "\n".join(lines)] == list(shown)
        assert ("No room for" in "\n".join(lines)) == (len(shown) < 3)
        assert max(map(len, lines)) <= width


def test_a_table_that_is_still_too_wide_goes_on_below() -> None:
    lines = show(draw_table(["Layer", "First", "Second"], [["7", "1" * 10, "2" * 10]]), 25)
    (first,) = (line for line in lines if "1" * 10 in line)
    (second,) = (line for line in lines if "2" * 10 in line)
    assert first != second
    assert first.split()[0] == second.split()[0] == "7"


def test_words_wrap_and_numbers_do_not() -> None:
    lines = show(draw_table(["A", "Kind"], [["12.5 %", "copies that were shuffled"]], {"Kind": WORDS}), 20)
    assert [line.split() for line in lines[3:] if line] == [["12.5", "%", "copies"], ["that", "were"], ["shuffled"]]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("97 % of 98.3 kB", 9, ["97 % of", "98.3 kB"]),
        ("it is 0.97 ± 0.02", 12, ["it is", "0.97 ± 0.02"]),
        ("a an-organisation/Some-Model", 16, ["a an-", "organisation/", "Some-Model"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("two\n  lines", 9, ["two", "  lines"]),
        ("#12 40, #13 42", 8, ["#12 40,", "#13 42"]),
    ],
)
def test_lines_end_between_words(text: str, width: int, lines: list[str]) -> None:
    assert wrap(Text(text), width).plain.split("\n") == lines
