"""Where the models of a survey come from: folders of models, the Hub's cache, the standard input."""

import io
import shutil
import sys
from pathlib import Path

import pytest

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoELayoutService, MoESurveyService, MoETypeService
from places import DEMO

SURVEY = ["introspect", "moe-expert", "moe-type-survey"]
COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"

Capture = pytest.CaptureFixture[str]


def copy_demo(folder: Path, name: str = "native") -> Path:
    return Path(shutil.copytree(DEMO / name, folder))


def planned(*models: str) -> list[str]:
    return [one.request.model for one in MoESurveyService.plan(models).models]


def type_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with two models, one of them below its publisher, and much that is none."""
    folder = tmp_path / "models"
    copy_demo(folder / "b-native")
    copy_demo(folder / "org" / "upcycled", "upcycled")
    copy_demo(folder / ".hidden")
    copy_demo(folder / "too" / "deep" / "down")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("none")
    (folder / "readme.md").write_text("none")
    return folder


def test_each_model_in_a_folder_is_a_row(models: Path) -> None:
    report = MoESurveyService.survey([str(models)], jobs=2)
    assert [(row.request.model, row.answer and row.answer.type) for row in report.rows] == [
        (str(models / "b-native"), "NATIVE"),
        (str(models / "org/upcycled"), "UPCYCLED"),
    ]


def test_a_list_may_name_a_folder_of_models(models: Path) -> None:
    (models.parent / "list.txt").write_text(f"{models} layers=1\n{models}/b-native\n")
    plan = MoESurveyService.plan([str(models.parent / "list.txt")])
    assert [(Path(one.request.model).name, one.request.layers) for one in plan.models] == [
        ("b-native", "1"),
        ("upcycled", "1"),
        ("b-native", None),
    ]


def test_a_model_with_subfolders_is_a_model(models: Path) -> None:
    copy_demo(models / "b-native" / "original")
    assert planned(str(models / "b-native")) == [str(models / "b-native")]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_models_is_a_row_that_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (one,) = MoESurveyService.plan([str(tmp_path / name)]).models
    assert one.request.model == str(tmp_path / name)
    assert one.error
    assert one.error.code == 3


def test_a_folder_that_leads_to_itself_ends(models: Path) -> None:
    (models / "again").symlink_to(models)
    assert planned(str(models))[0] == str(models / "again/b-native")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The Hub's cache: a model in two snapshots, one without refs, and a data set."""
    hub = tmp_path / "hub"
    model = hub / "models--org--two--parts"
    copy_demo(model / "snapshots" / OLDER, "upcycled")
    copy_demo(model / "snapshots" / COMMIT, "native")
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    copy_demo(hub / "models--org--other" / "snapshots" / OLDER, "upcycled")
    (hub / "datasets--org--data" / "snapshots" / OLDER).mkdir(parents=True)
    (hub / ".locks").mkdir()
    return hub


def test_the_cache_of_the_hub_is_a_folder_of_models(cache: Path) -> None:
    report = MoESurveyService.survey([str(cache)], jobs=2)
    assert [(Path(row.request.model).name, row.answer and row.answer.type) for row in report.rows] == [
        ("models--org--other", "UPCYCLED"),
        ("models--org--two--parts", "NATIVE"),
    ]


def test_a_folder_of_the_cache_is_its_main_snapshot(cache: Path) -> None:
    folder = cache / "models--org--two--parts"
    assert MoETypeService.analyze(str(folder)).type == "NATIVE"
    (folder / "refs/main").write_text(OLDER)
    assert MoETypeService.analyze(str(folder)).type == "UPCYCLED"
    assert MoELayoutService.describe(str(cache / "models--org--other")).model.endswith("other")


@pytest.mark.parametrize("text", ["../../..", "", "0" * 40])
def test_a_ref_that_names_no_snapshot_is_passed_over(cache: Path, text: str) -> None:
    (cache / "models--org--two--parts/refs/main").write_text(text)
    assert MoELayoutService.describe(str(cache / "models--org--two--parts")).experts == 8


def test_an_empty_folder_of_the_cache_is_an_error(cache: Path) -> None:
    shutil.rmtree(cache / "models--org--other" / "snapshots" / OLDER)
    (one, _) = MoESurveyService.plan([str(cache)]).models
    assert one.error


# The standard input


def test_models_come_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    type_in(monkeypatch, b"demo:native   # a comment\r\n\ndemo:upcycled layers=1\n")
    assert run([*SURVEY, "-", "demo:permuted", "--plan", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "model",
        "demo:native",
        "demo:upcycled",
        "demo:permuted",
    ]
    assert err == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no model is given"),
        (b"demo:native layer=1", "the standard input, line 1"),
        (b"\xff\xfe", "the standard input is not a list"),
    ],
)
def test_what_stdin_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys: Capture, data: bytes, words: str) -> None:
    type_in(monkeypatch, data)
    assert run([*SURVEY, "-"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
