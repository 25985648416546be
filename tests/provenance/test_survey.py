"""Surveys: many models in one table, each in a process of its own, kept as they come and taken up again."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    InvalidRequest,
    MoEError,
    MoELayoutService,
    MoESurveyPlan,
    MoESurveyService,
    MoETypeService,
    MoETypeSurvey,
    SurveyRequest,
    SurveyRow,
    memory_limit,
)
from chuk_lazarus.introspection.moe.jobs.resources import thread_limit
from chuk_lazarus.introspection.moe.provenance.classifier import CALIBRATION
from hub_server import HubServer
from places import DEMO, FIXTURES, ROOT
from processor_time import HANGS
from sampling import keep
from terminals import run_on_terminal

SURVEY = ["introspect", "moe-expert", "moe-type-survey"]
PROGRAM = [sys.executable, "-m", "chuk_lazarus.cli", *SURVEY]
KNOWN = ROOT / "experiments/known_models"

Capture = pytest.CaptureFixture[str]


def ask(*models: str | SurveyRequest, **options: Any) -> MoETypeSurvey:
    return MoESurveyService.survey(models, **options)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_cost(row: SurveyRow) -> dict[str, Any]:
    found = row.model_dump(mode="json")
    if found["answer"]:
        del found["answer"]["cost"]
    return found


def show(report: Any, width: int) -> str:
    console = Console(width=width, file=StringIO())
    console.print(report)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def refused(capsys: Capture, arguments: Sequence[str], *words: str) -> None:
    """Check that these arguments are a usage error, said in one line with these words."""
    assert run([*SURVEY, *arguments]) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1), line
    assert line[:-1].isprintable()
    assert [word for word in words if word not in line] == [], line


# What the rows say


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that can't be analysed, each in its own way."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "garbage.safetensors").write_bytes(b"\xff" * 100)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def surveyed(folder: Path) -> tuple[MoETypeSurvey, Path]:
    """A list of all sorts, and the file of its rows."""
    (folder / "list.txt").write_text(
        f"""\
# comments, a blank line and a model that is there twice

demo:native
  demo:upcycled   parent=demo:parent layers=0, 1   # looked for in its parent
demo:permuted experts=all
{FIXTURES}/gpt_oss_mxfp4\texperts=2
demo:native
{folder}/garbage.safetensors
{folder}/empty
{folder}/missing
{FIXTURES}/dense_llama
demo:native layers=7
"""
    )
    return ask(str(folder / "list.txt"), jobs=3, file=folder / "rows.jsonl"), folder / "rows.jsonl"


def test_an_answer_is_that_of_the_analysis(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    asked: list[dict[str, Any]] = [
        {"model": "demo:native"},
        {"model": "demo:upcycled", "parent": "demo:parent", "layers": "0, 1"},
        {"model": "demo:permuted", "experts": None},
        {"model": f"{FIXTURES}/gpt_oss_mxfp4", "experts": 2},
    ]
    for row, options in zip(surveyed[0].rows, asked, strict=False):
        analysis = MoETypeService.analyze(**options)
        answer = row.answer
        assert answer
        assert row.error is None
        same = ("model", "family", "model_type", "storage", "experts", "type", "confidence", "kind", "rank_ratio")
        for figure in (*same, "rank_projection", "cosine", "overlay_ratio", "compressible", "notes"):
            assert getattr(answer, figure) == getattr(analysis, figure), figure
        assert answer.layers == tuple(layer.layer for layer in analysis.layers)
        assert answer.cost.bytes_read == analysis.cost.bytes_read
        for figure in ("kept", "close", "chance"):
            over_layers = [getattr(layer.lineage, figure) for layer in analysis.layers]
            assert getattr(answer, figure) == pytest.approx(sum(over_layers) / len(over_layers))
    assert [row.answer.parent_kept for row in surveyed[0].rows[:4] if row.answer] == [None, 1.0, None, None]


def test_an_error_is_that_of_the_analysis(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    failed = surveyed[0].rows[4:]
    assert len(failed) == 5
    for row in failed:
        with pytest.raises(MoEError) as caught:
            MoETypeService.analyze(row.request.model, layers=row.request.layers)
        assert row.error
        assert (row.error.code, row.error.message) == (caught.value.exit_code, caught.value.message)
        assert row.error.hint == caught.value.hint
    assert [row.error.code for row in failed if row.error] == [3, 3, 3, 4, 2]


def test_a_row_says_what_was_asked(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    requests = [row.request for row in surveyed[0].rows]
    assert requests[1] == SurveyRequest(model="demo:upcycled", parent="demo:parent", layers="0, 1", experts=8)
    assert [request.experts for request in requests] == [8, 8, None, 2, 8, 8, 8, 8, 8]
    assert len(set(requests)) == len(requests) == 9


def test_every_row_is_a_line_of_the_file(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    report, file = surveyed
    lines = lines_of(file)
    assert {line["schema"] for line in lines} == {"moe-type-survey-row/1"}
    read = [SurveyRow.model_validate(line) for line in lines]
    assert sorted(map(str, read)) == sorted(map(str, report.rows))


def test_the_report_goes_through_json(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    text = surveyed[0].model_dump_json()
    assert json.loads(text)["schema"] == "moe-type-survey/1"
    assert MoETypeSurvey.model_validate_json(text) == surveyed[0]


@pytest.mark.parametrize("width", [40, 60, 70, 80, 100, 160, 200])
def test_a_model_is_a_line_at_any_width(surveyed: tuple[MoETypeSurvey, Path], width: int) -> None:
    """With what there is room for, and the rest named below."""
    report = surveyed[0]
    table = show(report, width)
    assert max(map(len, table.splitlines())) <= width
    for row in report.rows:
        if row.answer:
            name = row.request.model[-8:]
            (line,) = (line for line in table.splitlines() if name in line and row.answer.type in line)
            assert width < 70 or f" {row.answer.shared:.0%}".replace("%", " %") in line
            assert width < 160 or row.answer.storage in line.split()
            assert width < 100 or "…" not in line or row.request.model not in line
        if row.error:
            assert "".join(row.error.message.split()) in "".join(table.split())
    assert "9 models: 2 UPCYCLED" in table
    assert "5 failed" in table
    for heading in ("Storage", "Overlay", "Time"):
        assert heading in table  # as a column, or as one that there was no room for


def test_a_long_name_keeps_its_end(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    row = surveyed[0].rows[0]
    long = f"/data/{'models/' * 20}the-model-itself"
    rows = [row.model_copy(update={"request": SurveyRequest(model=model)}) for model in ("demo:native", long)]
    lines = show(MoETypeSurvey(rows=tuple(rows)), 100).splitlines()
    (line,) = (line for line in lines if " NATIVE " in line and "demo" not in line)
    assert line.strip().startswith("…")
    assert "models/the-model-itself " in line
    assert " 91% " in line


def test_a_model_of_the_cache_is_shown_by_its_id(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    row = surveyed[0].rows[0]
    cached = row.model_copy(update={"request": SurveyRequest(model="/x/hub/models--org--name--with--dashes")})
    assert " org/name--with--dashes " in show(MoETypeSurvey(rows=(cached,)), 80)


def test_a_wide_table_has_a_line_a_model(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    lines = show(surveyed[0], 200).splitlines()
    (native,) = (line for line in lines if line.strip().startswith("demo:native") and "NATIVE" in line)
    (shuffled,) = (line for line in lines if line.strip().startswith("demo:permuted"))
    assert "w1_w3_w2" in native
    assert "shuffled copies" in shuffled
    assert f"{CALIBRATION.probability(100):.0%}" in shuffled  # by all of its neurons


def test_the_summary_counts_types(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    lines = [line.split() for line in show(surveyed[0].summary(), 80).splitlines()]
    counts = {words[0]: int(words[1]) for words in lines if words and words[0].isupper()}
    found = [row.answer.type for row in surveyed[0].rows if row.answer]
    assert counts == {origin: found.count(origin) for origin in found}


def test_a_survey_of_failures_alone_has_a_table(surveyed: tuple[MoETypeSurvey, Path]) -> None:
    report = MoETypeSurvey(rows=tuple(row for row in surveyed[0].rows if row.request.model.endswith("missing")))
    assert "1 model: 1 failed" in show(report, 80)
    assert show(report.summary(), 80)


# The command


def test_the_command_prints_the_table_or_json(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = [*SURVEY, "demo:native", "demo:upcycled", "-o", str(file)]
    assert run([*arguments, "--jobs", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = MoETypeSurvey.model_validate_json(out)
    assert [row.request.model for row in report.rows] == ["demo:native", "demo:upcycled"]
    kept = file.read_bytes()
    assert run([*arguments, "-v"]) == 0  # both answers are in the file, so nobody is asked again
    out, err = capsys.readouterr()
    assert "MOE TYPE SURVEY" in out
    assert "By type" in out
    assert err == ""
    assert file.read_bytes() == kept


def test_the_command_says_what_failed(capsys: Capture, folder: Path) -> None:
    assert run([*SURVEY, str(folder / "missing"), "-v"]) == 1
    out, err = capsys.readouterr()
    assert "no such folder" in out
    assert err == f"{folder / 'missing'}: no such folder or file\n"


@pytest.mark.long
def test_a_quick_survey_gives_the_quick_verdicts(tmp_path: Path) -> None:
    """And passes over what lists say of parents and experts; its rows are not those of full analyses."""
    names = ["demo:upcycled", "demo:permuted", "demo:native"]
    (tmp_path / "list.txt").write_text("\n".join(f"{name} experts=all" for name in names))
    file = tmp_path / "rows.jsonl"
    full = ask("demo:upcycled", file=file)
    found = ask(str(tmp_path / "list.txt"), budget="1MB", file=file)
    for name, row in zip(names, found.rows, strict=True):
        one = MoETypeService.quick(name, budget="1MB")
        assert row.answer
        assert row.answer.type == one.type
        assert (row.answer.close, row.answer.reach, row.answer.confidence) == (one.close, one.reach, one.confidence)
        assert row.answer.layers == tuple(layer.layer for layer in one.layers)
        assert (row.answer.rank_ratio, row.answer.compressible) == (None, None)
        assert row.request == SurveyRequest(model=name, budget=10**6)
    assert [line["answer"]["type"] for line in lines_of(file)] == ["UPCYCLED", "UPCYCLED", "UPCYCLED", "NATIVE"]
    assert ask("demo:upcycled", file=file).rows == full.rows
    assert "Rank" not in show(found, 200)
    assert "100 %" in show(found, 80)
    both = MoETypeSurvey(rows=(*full.rows, *found.rows))
    assert "Rank" in show(both, 200)
    assert show(both.summary(), 80).count("100 %") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quick", "--layer", "1"],
        ["--budget", "1MB"],
        ["--plan", "--jobs", "2"],
        ["--memory", "1GB", "--dask", "tcp://head:8786"],
    ],
)
def test_options_that_do_not_go_together(capsys: Capture, arguments: list[str]) -> None:
    assert run([*SURVEY, "demo:native", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_processes_share_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told its part, and no less than an analysis needs; here they end without an answer."""
    asked: list[list[Any]] = []
    start = subprocess.Popen

    def note(command: Sequence[str], *words: Any, **options: Any) -> Any:
        asked.append(json.loads(command[-1]))
        return start([sys.executable, "-I", "-S", "-c", ""], *words, **options)

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    with memory_limit("3GB"):
        ask("demo:native", "demo:upcycled", "demo:permuted", "demo:parent", jobs=3)
        ask("demo:native", "demo:upcycled", jobs=3)
        ask("demo:native", jobs=40)
    with memory_limit("256MB"):
        ask("demo:native", "demo:upcycled", jobs=2)
    three, two, one, little = [10**9, 2], [3 * 10**9 // 2, 4], [3 * 10**9, 8], [256 * 10**6, 4]
    assert [words[2:4] for words in asked] == [*[three] * 4, *[two] * 2, one, *[little] * 2]


def test_options_hold_where_the_list_says_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text(
        '[[model]]\nid = "demo:native"\n[[model]]\nid = "demo:native"\nlayers = 1\nexperts = 3\norigin = "native"\n'
    )
    report = ask(str(tmp_path / "list.toml"), layer=0, experts=2, jobs=2)
    assert [row.answer.layers for row in report.rows if row.answer] == [(0,), (1,)]
    assert [row.request.experts for row in report.rows] == [2, 3]
    assert [row.stated for row in report.rows] == [None, "native"]
    assert "Stated" in show(report, 200)


@pytest.mark.long
def test_requests_can_be_given_in_python() -> None:
    (row,) = ask(SurveyRequest(model="demo:upcycled", parent="demo:parent", experts=None)).rows
    assert row.answer
    assert row.answer.parent_kept == 1.0
    assert row.request.experts is None


@pytest.mark.parametrize(
    "options", [{"jobs": 0}, {"experts": 0}, {"layer": 1, "layers": "all"}, {"layer": -1}, {"layers": "x"}], ids=str
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        ask("demo:native", **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no model"]),
        ("# demo:native\n\n   # nothing\n", ["no model"]),
        ("demo:native\n\ndemo:upcycled parents=demo:parent", ["list.txt, line 3", "parents", "parent, layers"]),
        ("demo:native layers=x", ["line 1", "'x'"]),
        ("demo:native layers=", ["line 1"]),
        ("demo:native experts=0", ["line 1", "'0'"]),
        ("demo:native experts=two", ["line 1", "'two'"]),
        ("demo:native parent=", ["line 1", "parent"]),
        (b"\xff\xfe\x00", ["list.txt", "not a list"]),
    ],
)
def test_text_lists_that_cannot_be(capsys: Capture, tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    list_file = tmp_path / "list.txt"
    list_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, [str(list_file)], *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["[[model]]"]),
        ("model = 3", ["[[model]]"]),
        ("model = [1]", ["[[model]]"]),
        ("model = []", ["no model"]),
        ("[[model]", ["list.toml"]),
        ("x = " + "[" * 100_000, ["list.toml"]),
        ('[[model]]\nid = "a/b"\n[[model]]\nname = "x"', ["model 2", "id"]),
        ("[[model]]\nid = 3", ["model 1", "id"]),
        ('[[model]]\nid = " "', ["model 1", "id"]),
        ('[[model]]\nid = "a/b"\nparent = ["c/d"]', ["model 1", "parent"]),
        ('[[model]]\nid = "a/b"\nlayers = [1]', ["model 1", "[1]"]),
        ('[[model]]\nid = "a/b"\nexperts = true', ["model 1", "True"]),
    ],
)
def test_toml_lists_that_cannot_be(capsys: Capture, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "list.toml").write_text(text)
    refused(capsys, [str(tmp_path / "list.toml")], *words)


@pytest.mark.parametrize(
    "line", ["n" * 200_000, f"demo:native parent={'n' * 5000}", f"demo:native layers={','.join('1' * 3000)}"]
)
def test_what_is_too_long_for_a_request_is_named(capsys: Capture, tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"demo:upcycled\n{line}\n")
    refused(capsys, [str(tmp_path / "list.txt")], "list.txt, line 2", "longer than 4096 characters")


def test_the_longest_request_is_a_row() -> None:
    (row,) = ask(SurveyRequest(model="😀" * 4096, parent="😀" * 4096, layers=",".join("1" * 2048)), jobs=2).rows
    assert row.error
    assert row.error.code == 3


@pytest.mark.parametrize("name", ["missing.txt", "missing.toml", "n" * 300 + ".txt"])
def test_lists_that_are_not_there(capsys: Capture, tmp_path: Path, name: str) -> None:
    refused(capsys, [str(tmp_path / name)], name)


@pytest.mark.parametrize("arguments", [[], ["demo:native", "--jobs", "0"], ["demo:native", "--experts", "0"]], ids=str)
def test_usage(capsys: Capture, arguments: list[str]) -> None:
    refused(capsys, arguments)


@pytest.mark.parametrize("place", ["", ".", "nowhere/x.jsonl"])
def test_a_file_that_cannot_be_written(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["demo:native", "-o", place], "can't write")
    with pytest.raises(InvalidRequest):
        ask("demo:native", file=place or ".")
    assert os.listdir(tmp_path) == []


@pytest.mark.long
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line(capsys: Capture) -> None:
    refused(capsys, ["demo:native", "-o", "/dev/full"], "space")


def test_windows_made_the_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbforg/a layers=all\r\norg/b\r\n")
    plan = MoESurveyService.plan([str(tmp_path / "list.txt")])
    assert [(one.request.model, one.request.layers) for one in plan.models] == [("org/a", "all"), ("org/b", None)]


# The plan


def test_the_plan_is_what_the_files_take(tmp_path: Path) -> None:
    layouts = [MoELayoutService.describe(model) for model in ("demo:native", str(FIXTURES / "gpt_oss_mxfp4"))]
    with (tmp_path / "list.toml").open("w") as file:
        for layout in layouts:
            intermediate, hidden = layout.layers[0].shapes["gate"]
            shape = f"layers = {len(layout.moe_layers)}, experts = {layout.experts}"
            shape += f", hidden = {hidden}, intermediate = {intermediate}"
            file.write(f'[[model]]\nid = "{layout.model}"\nstorage = "{layout.storage}"\nshape = {{ {shape} }}\n')
        file.write('[[model]]\nid = "org/unknown"\nstorage = "f4"\nshape = { layers = 1 }\n')
    plan = MoESurveyService.plan([str(tmp_path / "list.toml")])
    assert [one.source for one in plan.models] == ["list", "list", None]
    assert [one.layer_bytes for one in plan.models] == [*(layout.layers[0].stored_bytes for layout in layouts), None]
    assert [one.stored_bytes for one in plan.models] == [*(layout.stored_bytes for layout in layouts), None]
    assert plan.layer_bytes == sum(layout.layers[0].stored_bytes for layout in layouts)
    assert [one.error.code for one in plan.models if one.error] == [3]
    by_headers = MoESurveyService.plan([layout.model for layout in layouts])
    for one, other in zip(plan.models, by_headers.models, strict=False):
        same = {"source": "headers", "analysis_bytes": other.analysis_bytes}
        assert one.model_copy(update=same) == other
        assert one.analysis_bytes == pytest.approx(other.analysis_bytes, rel=0.4)  # a list knows no parts of experts


MODELS = ["demo:native", "demo:upcycled", f"{FIXTURES}/gpt_oss_mxfp4", f"{FIXTURES}/nemotron_h"]


PLANS: list[dict[str, Any]] = [{}, {"layers": "all"}, {"layer": 1}, {"budget": "100KB"}]


@pytest.mark.parametrize("options", keep(PLANS, {"layer": 1}, {"budget": "100KB"}), ids=str)
def test_the_plan_by_headers_is_what_is_read(options: dict[str, Any]) -> None:
    """But for headers, and what is left of a budget."""
    models = MODELS[:2] if "layer" in options else MODELS
    planned, done = MoESurveyService.plan(models, **options), ask(*models, jobs=2, **options)
    for one, row in zip(planned.models, done.rows, strict=True):
        layout = MoELayoutService.describe(row.request.model)
        assert row.answer
        assert one.analysis_bytes
        assert one.stored_bytes == layout.stored_bytes
        assert one.layer_bytes == layout.layers[0].stored_bytes
        over = row.answer.cost.bytes_read - one.analysis_bytes
        assert (-one.analysis_bytes / 2 if "budget" in options else 0) <= over < 40_000
        assert one.request == row.request
    assert planned.analysis_bytes == sum(one.analysis_bytes or 0 for one in planned.models)


def test_a_plan_reads_no_weight(tmp_path: Path) -> None:
    """These can't be read: they are no numbers."""
    file = Path(copy_demo(tmp_path / "model"), "model.safetensors")
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert ask(str(tmp_path / "model")).rows[0].error
    (one,) = MoESurveyService.plan([str(tmp_path / "model")]).models
    assert one.analysis_bytes == MoESurveyService.plan(["demo:native"]).analysis_bytes


def test_a_plan_of_a_model_on_the_hub(hub: HubServer) -> None:
    hub.add("tests/planned", DEMO / "native")
    (one,) = MoESurveyService.plan(["tests/planned"]).models
    here = MoESurveyService.plan(["demo:native"]).models[0]
    assert one.source == "headers"
    assert one.analysis_bytes == here.analysis_bytes
    assert one.seconds
    assert here.seconds
    assert one.seconds > here.seconds  # it has to be fetched


def test_a_plan_guesses_the_time(tmp_path: Path) -> None:
    """Within a factor of two of the core-seconds in docs/scale.md."""
    shapes = [("bf16", 64, 1024, 2048), ("mxfp4", 32, 2880, 2880), ("fp8", 256, 2048, 7168), ("bf16", 8, 14336, 4096)]
    for (storage, experts, intermediate, hidden), measured in zip(shapes, [2.4, 15.7, 54, 88], strict=True):
        shape = f"layers = 1, experts = {experts}, intermediate = {intermediate}, hidden = {hidden}"
        text = f'[[model]]\nid = "{tmp_path}"\nstorage = "{storage}"\nshape = {{ {shape} }}\n'
        (tmp_path / "list.toml").write_text(text)
        with thread_limit(1):
            assert measured / 2 < MoESurveyService.plan([str(tmp_path / "list.toml")]).seconds < 2 * measured


def test_the_command_plans_anything(capsys: Capture, folder: Path) -> None:
    assert run([*SURVEY, "demo:native", str(folder / "empty"), "--plan", "--layers", "all"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "786.4 kB" in out
    assert "Failed" in out


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": "9" * 400},
        {"experts": "9" * 400},
        {"hidden": -1},
        {"intermediate": 0},
        {"layers": 2**40 + 1},
        {"hidden": "inf"},
        {"hidden": "nan"},
        {"layers": '"two"'},
    ],
    ids=lambda shape: str(shape)[:24],
)
def test_a_shape_that_cannot_be_is_none(capsys: Capture, tmp_path: Path, shape: dict[str, Any]) -> None:
    sizes = {"layers": 2, "experts": 4, "hidden": 8, "intermediate": 16}
    tables = (", ".join(f"{name} = {size}" for name, size in (sizes | given).items()) for given in (shape, {}))
    text = "\n".join(f'[[model]]\nid = "org/{len(one)}"\nstorage = "f32"\nshape = {{ {one} }}' for one in tables)
    (tmp_path / "list.toml").write_text(text)
    plan = MoESurveyService.plan([str(tmp_path / "list.toml")])
    assert [one.stored_bytes for one in plan.models] == [None, 2 * 4 * 3 * 8 * 16 * 4]
    assert run([*SURVEY, str(tmp_path / "list.toml"), "--plan"]) == 1
    assert "12.3 kB" in capsys.readouterr().out


def test_the_largest_shape_is_shown(tmp_path: Path) -> None:
    sizes = ", ".join(f"{name} = {2**40}" for name in ("layers", "experts", "hidden", "intermediate"))
    (tmp_path / "list.toml").write_text(f'[[model]]\nid = "a/b"\nstorage = "fp8"\nshape = {{ {sizes} }}\n')
    assert show(MoESurveyService.plan([str(tmp_path / "list.toml")]), 80)


def test_the_plan_of_the_known_models(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("costs", KNOWN / "costs.py")
    assert spec
    assert spec.loader
    costs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "costs", costs)
    spec.loader.exec_module(costs)
    assert (
        run([*SURVEY, str(KNOWN / "models.toml"), "--plan", "--json"]) == 1
    )  # no shape of two, and no such models here
    plan = MoESurveyPlan.model_validate_json(capsys.readouterr().out)
    for one, model in zip(plan.models, costs.load_models(), strict=True):
        cost = costs.find_cost(model)
        assert (one.request.model, one.stated) == (model.id, model.origin)
        assert one.request.parent == (None if model.parent_needs else model.parent)
        assert one.layer_bytes == (cost.one_layer if cost else None)
        assert one.stored_bytes == (cost.all_layers if cost else None)
    assert max(map(len, show(plan, 80).splitlines())) <= 80


# Taking up where it was


def copy_demo(folder: Path, name: str = "native") -> str:
    shutil.copytree(DEMO / name, folder)
    return str(folder)


def test_what_has_an_answer_is_not_analysed_again(tmp_path: Path) -> None:
    model, file = copy_demo(tmp_path / "model"), tmp_path / "rows.jsonl"
    first = ask(model, file=file)
    shutil.rmtree(model)
    kept = file.read_bytes()
    asked: list[SurveyRow] = []
    assert ask(model, file=file, finished=asked.append) == first
    assert asked == []
    assert file.read_bytes() == kept
    again = ask(model, layers="1", file=file, finished=asked.append)  # another question
    assert asked == list(again.rows)
    assert again.rows[0].error


def test_a_failure_is_tried_again(tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "rows.jsonl"
    assert ask(str(model), file=file).rows[0].error
    assert ask(str(model), file=file).rows[0].error
    assert len(lines_of(file)) == 1  # it has failed in the same way
    copy_demo(model)
    report = ask(str(model), file=file)
    assert report.rows[0].answer
    assert [bool(line["answer"]) for line in lines_of(file)] == [False, True]
    assert ask(str(model), file=file) == report
    assert len(lines_of(file)) == 2


@pytest.fixture(scope="module")
def two_lines(surveyed: tuple[MoETypeSurvey, Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Those of an answer, which the survey above has, and of a failure."""
    file = tmp_path_factory.mktemp("two") / "rows.jsonl"
    answers = (line for line in surveyed[1].read_bytes().splitlines(keepends=True) if json.loads(line)["answer"])
    file.write_bytes(next(line for line in answers if json.loads(line)["request"]["model"] == "demo:native"))
    ask("demo:native", "/no/such/modèl", file=file)
    return file.read_bytes().splitlines(keepends=True)


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, two_lines: list[bytes]) -> None:
    file = tmp_path / "rows.jsonl"
    for end in range(len(two_lines[1])):
        file.write_bytes(two_lines[0] + two_lines[1][:end])
        assert ask("demo:native", file=file).rows[0].answer
        assert file.read_bytes() == two_lines[0], end


def test_a_model_whose_line_was_cut_off_is_analysed_again(tmp_path: Path, two_lines: list[bytes]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(two_lines[0][: len(two_lines[0]) // 2])
    (row,) = ask("demo:native", file=file).rows
    assert without_cost(row) == without_cost(SurveyRow.model_validate_json(two_lines[0]))
    assert len(lines_of(file)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b"\n",
        b"{}\n",
        b'{"model": 1',
        b'{"schema": "moe-type-analysis/1"}\n',
        b"\x89PNG\r\n\x1a\n\x00",
        b'{"schema": "moe-type-survey-row/1"}\n',
    ],
)
def test_the_file_of_something_else_is_refused_and_kept(capsys: Capture, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    refused(capsys, ["demo:native", "-o", str(file)], "not a row of a survey")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("answer.model", "x\x1b[31my"),
        ("answer.kind", "\x1b]0;title\x07"),
        ("answer.storage", "bf16\r"),
        ("answer.family", "\u202efamily"),
        ("answer.notes", ["a\nnote"]),
        ("request.model", "\x9b31m"),
        ("stated", "\x1b"),
        ("answer.kept", float("nan")),
        ("answer.kept", float("inf")),
        ("answer.overlay_ratio", 1e300),
        ("answer.cost.bytes_read", 10**400),
        ("answer.experts", -(10**30)),
        ("answer.layers", [10**400]),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_rows_that_we_would_not_write_are_refused(
    capsys: Capture, tmp_path: Path, two_lines: list[bytes], place: str, value: object
) -> None:
    row = json.loads(two_lines[0])
    *outer, last = place.split(".")
    inner = row
    for key in outer:
        inner = inner[key]
    inner[last] = value
    content = two_lines[1] + json.dumps(row).encode() + b"\n" + two_lines[1]
    (tmp_path / "rows.jsonl").write_bytes(content)
    refused(capsys, ["demo:native", "--json", "-o", str(tmp_path / "rows.jsonl")], "line 2", "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_bytes() == content


@pytest.mark.long
def test_an_odd_config_does_not_spoil_the_file(tmp_path: Path) -> None:
    model, file = Path(copy_demo(tmp_path / "model")), tmp_path / "rows.jsonl"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "x\x1b[31m", "hidden_act": "\x07"}))
    first = ask(str(model), file=file)
    assert ask(str(model), file=file) == first


def test_a_broken_line_before_others_is_refused(tmp_path: Path, two_lines: list[bytes]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(two_lines[0][:100] + b"\n" + two_lines[1])
    with pytest.raises(InvalidRequest):
        ask("demo:native", file=file)
    assert file.read_bytes() == two_lines[0][:100] + b"\n" + two_lines[1]


# Killed and interrupted


@pytest.fixture
def slow(hub: HubServer) -> str:
    """A model on a Hub that does not answer."""
    hub.add("tests/slow", DEMO / "native")
    hub.fail(path="/api/models/tests/slow*", where="api", stall=600.0, times=None)
    return "tests/slow"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """A survey in a process of its own, whose first answer is in rows.jsonl; killed at last."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> "subprocess.Popen[str]":
        file = tmp_path / "rows.jsonl"
        process = subprocess.Popen(
            [*PROGRAM, *arguments, "-o", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_for(lambda: (file.exists() and file.read_bytes().endswith(b"\n")) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(process: "subprocess.Popen[str]") -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def asks_the_hub(hub: HubServer) -> Callable[[], object]:
    return lambda: [request for request in hub.requests if "tests/slow" in request.path]


@pytest.mark.long
def test_interrupted(hub: HubServer, slow: str, start: Callable[..., Any], tmp_path: Path) -> None:
    """As a terminal does it: all processes of the group get the signal."""
    process = start("demo:native", slow, "--jobs", "1")
    wait_for(asks_the_hub(hub))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert (process.returncode, out, err) == (130, "", "lazarus: interrupted\n")
    assert [line["answer"]["type"] for line in lines_of(tmp_path / "rows.jsonl")] == ["NATIVE"]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed(hub: HubServer, slow: str, start: Callable[..., Any], tmp_path: Path) -> None:
    """Its processes end with it, and the same command goes on."""
    file = tmp_path / "rows.jsonl"
    process = start("demo:native", slow, "demo:upcycled")
    wait_for(asks_the_hub(hub))
    workers = children(process)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=HANGS)
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    kept = file.read_bytes()
    hub.faults.clear()
    report = ask("demo:native", slow, "demo:upcycled", file=file)
    assert [row.answer.type for row in report.rows if row.answer] == ["NATIVE", "NATIVE", "UPCYCLED"]
    assert file.read_bytes().startswith(kept)
    assert len(lines_of(file)) == 3


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_model_that_takes_its_process_down_costs_its_own_answer(
    hub: HubServer, slow: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    """As when the system has no memory left."""
    process = start("demo:native", slow, "demo:upcycled", "--json")
    wait_for(asks_the_hub(hub))
    (worker,) = children(process)
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    rows = MoETypeSurvey.model_validate_json(out).rows
    assert [bool(row.answer) for row in rows] == [True, False, True]
    assert rows[1].error
    assert rows[1].error.code == 128 + signal.SIGKILL
    assert "signal 9" in rows[1].error.message


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to end by")
def test_a_process_that_is_killed_while_it_writes_its_row_has_none(
    tmp_path: Path, two_lines: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "row").write_bytes(two_lines[0][:200])
    end = f"import os; os.write(1, open({str(tmp_path / 'row')!r}, 'rb').read()); os.kill(os.getpid(), 9)"
    monkeypatch.setattr("chuk_lazarus.introspection.moe.provenance.survey.WORKER", (sys.executable, "-c", end))
    (row,) = ask("demo:native").rows
    assert row.answer is None
    assert row.error
    assert row.error.code == 128 + signal.SIGKILL


@pytest.mark.long
def test_an_end_by_the_caller_leaves_no_process(hub: HubServer, slow: str, tmp_path: Path) -> None:
    """Whatever a callback raises comes out, and what is under way ends at once."""

    class Enough(Exception):
        pass

    def stop(row: SurveyRow) -> None:
        raise Enough

    with pytest.raises(Enough):
        ask("demo:native", slow, jobs=2, file=tmp_path / "rows.jsonl", finished=stop)
    assert len(lines_of(tmp_path / "rows.jsonl")) == 1


# The Hub


@pytest.mark.long
def test_models_on_the_hub(hub: HubServer, cache: Path) -> None:
    commit = hub.add("tests/surveyed", DEMO / "upcycled")
    report = ask("tests/surveyed", "tests/not-there", "tests/surveyed@main", jobs=2)
    there, missing, _ = report.rows
    assert there.answer
    assert there.answer.revision == commit
    assert there.answer.type == "UPCYCLED"
    assert there.answer.cost.bytes_fetched > 0
    assert str(commit)[:12] in show(report, 200)
    assert missing.error
    assert missing.error.code == 3
    assert "tests/not-there" in missing.error.message


# Names from strangers


HOSTILE = ["a[/]b [red]c", "x\x1b[31my\nz\u202e", "-m a=b; exit #"]


@pytest.mark.long
def test_hostile_names(tmp_path: Path, capsys: Capture) -> None:
    """A folder with any name is analysed, shown without harm, and known again."""
    file = tmp_path / "rows.jsonl"
    real = [copy_demo(tmp_path / name) for name in HOSTILE]
    models = [*real, f"{tmp_path}/\udcff", "nul\x00"]
    assert ask(*models, jobs=2, file=file).rows[0].answer
    assert all(line.isprintable() for line in file.read_text().splitlines())
    for model in real:
        shutil.rmtree(model)
    assert run([*SURVEY, *models[:-1], "-o", str(file)]) == 1
    out, _ = capsys.readouterr()
    assert all(line.isprintable() for line in out.splitlines())
    assert f"{len(real) + 1} models: {len(real)} NATIVE, 1 failed" in out
    assert "[red]c" in "".join(out.split())


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no terminals to make here")
def test_progress_is_for_terminals(tmp_path: Path) -> None:
    model = copy_demo(tmp_path / "a[/]b")
    code, out, shown = run_on_terminal([*PROGRAM, model, "--json"], 200)
    assert code == 0
    assert json.loads(out)["rows"][0]["answer"]
    assert b"1/1 " in shown
    assert b"layer 0" in shown


def test_code_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_demo(tmp_path / "model")
    for name in ("json", "numpy", "chuk_lazarus", "pydantic"):
        (tmp_path / f"{name}.py").write_text("open('was here', 'w')")
    monkeypatch.chdir(tmp_path)
    assert ask("model").rows[0].answer
    assert not Path("was here").exists()
