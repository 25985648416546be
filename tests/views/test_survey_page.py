"""A survey as pages, and as rows for pipes: what is in them, and that a folder is whole or not there."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import html5lib
import pytest
from markdown_it import MarkdownIt

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    InvalidRequest,
    MoESurveyPlan,
    MoESurveyService,
    MoETypeAnalysis,
    MoETypeService,
    MoETypeSurvey,
    SurveyRequest,
    SurveyRow,
)
from chuk_lazarus.introspection.moe.text import format_csv, format_markdown, format_seconds
from chuk_lazarus.introspection.moe.views.survey_page import to_survey_page
from places import DEMO, FIXTURES

SVG = "{http://www.w3.org/2000/svg}"
SURVEY = ["introspect", "moe-expert", "moe-type-survey"]
NAMES = ["demo:native", "demo:upcycled", f"{FIXTURES}/dense_llama"]
HOSTILE = '<script>alert("1")</script>|`[x](y)_{{ 7 * 7 }}'

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MoETypeSurvey]:
    """The folder of a survey of two models and one that failed; beside it, the file of its rows."""
    folder = tmp_path_factory.mktemp("pages") / "survey"
    file = folder.with_name("rows.jsonl")
    return folder, MoESurveyService.survey(NAMES, jobs=2, file=file, html=folder, command="lazarus survey <names>")


@pytest.fixture
def rows(written: tuple[Path, MoETypeSurvey], tmp_path: Path) -> Path:
    """A file with the rows of that survey."""
    return Path(shutil.copy(written[0].with_name("rows.jsonl"), tmp_path))


def parse(text: str) -> Any:
    """The page as a tree; raises for HTML that a browser would have to repair."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def text_of(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The page


def test_the_index_has_a_row_and_a_figure_for_each_model(written: tuple[Path, MoETypeSurvey]) -> None:
    page = parse((written[0] / "index.html").read_text("utf-8"))
    headings = [text_of(cell) for cell in page.findall(".//thead//th")]
    assert headings[:2] == ["Model", "Verdict"]
    rows = [dict(zip(headings, map(text_of, row), strict=False)) for row in page.findall(".//tbody/tr")]
    assert [(row["Model"], row["Verdict"]) for row in rows] == [
        ("demo:native", "NATIVE"),
        ("demo:upcycled", "UPCYCLED"),
        (NAMES[2], "failed"),
    ]
    assert rows[1]["Kind"] == "copies"
    assert rows[1]["Shared"] == "100 %"
    assert (rows[1]["Experts"], rows[1]["Storage"], rows[1]["Weights"]) == ("8", "bf16", "393 k")
    assert rows[1]["Bits saved"] == "2.1"
    (_, _, error) = page.findall(".//tbody/tr")[2]
    assert "no routed experts" in text_of(error)
    assert int(error.get("colspan")) == len(headings) - 2
    figures = page.findall(".//figure")
    assert [text_of(figure.find("figcaption")).split()[0] for figure in figures] == NAMES
    svg = figures[1].find(f"{SVG}svg")
    assert svg.get("aria-label") == "shared 100 %, strongly 100 %"
    assert [bar.get("width") for bar in svg.findall(f"{SVG}rect[@class='bar']")] == ["220.0", "220.0"]
    assert text_of(page.find(".//h1")) == "3 models: 1 UPCYCLED, 1 NATIVE, 1 failed"


def test_the_index_has_its_json_and_its_command(written: tuple[Path, MoETypeSurvey]) -> None:
    text = (written[0] / "index.html").read_text("utf-8")
    data = parse(text).find(".//script[@id='report']").text
    assert MoETypeSurvey.model_validate_json(data) == written[1]
    assert "lazarus survey &lt;names&gt;" in text


def test_links_lead_to_pages_of_the_analyses(written: tuple[Path, MoETypeSurvey]) -> None:
    folder, report = written
    links = [link.get("href") for link in parse((folder / "index.html").read_text("utf-8")).findall(".//tbody//a")]
    assert len(links) == 2
    for link, row in zip(links, report.rows, strict=False):
        page = (folder / link).read_text("utf-8")
        analysis = MoETypeAnalysis.model_validate_json((folder / link).with_suffix(".json").read_bytes())
        assert row.answer
        assert analysis.cost == row.answer.cost
        same = MoETypeService.analyze(row.request.model)
        assert analysis.model_copy(update={"cost": same.cost}) == same
        assert f"{row.request.model}: {row.answer.type}" in page
    assert len(names_in(folder)) == 1 + 2 * 2


def test_nothing_is_fetched(written: tuple[Path, MoETypeSurvey]) -> None:
    text = (written[0] / "index.html").read_text("utf-8")
    page = parse(text)
    for element in page.iter():
        if isinstance(element.tag, str):
            assert element.tag not in ("link", "img", "iframe", "object")
            assert not element.get("src")
            assert (element.get("href") or "models/").startswith("models/")
    assert not re.search(r"url\(|@import|https?:", text)


def test_values_sort_as_numbers(written: tuple[Path, MoETypeSurvey]) -> None:
    page = parse((written[0] / "index.html").read_text("utf-8"))
    values = [[cell.get("data-value") for cell in row] for row in page.findall(".//tbody/tr")]
    answer = written[1].rows[0].answer
    assert answer
    assert float(values[0][2]) == answer.confidence
    assert values[2] == [NAMES[2].lower(), "failed", ""]


def test_names_are_text(written: tuple[Path, MoETypeSurvey]) -> None:
    row = written[1].rows[0]
    odd = row.model_copy(update={"request": SurveyRequest(model=HOSTILE), "stated": HOSTILE})
    survey = MoETypeSurvey(rows=(odd,))
    page = parse(to_survey_page(survey, {}, HOSTILE))
    assert text_of(page.find(".//tbody/tr/th")) == HOSTILE
    assert len(page.findall(".//script")) == 2
    assert [text_of(cell) for cell in page.findall(".//thead/tr/th")].count("Stated") == 1
    cells = MarkdownIt("commonmark").enable("table").render(survey.to_markdown())
    assert text_of(parse(f"<!DOCTYPE html><title>x</title>{cells}").find(".//td")) == HOSTILE


# The folder


def test_the_folder_is_written_again_from_what_it_has(tmp_path: Path) -> None:
    """A survey that goes on has the pages of those that were analysed before."""
    folder, file = tmp_path / "pages", tmp_path / "rows.jsonl"
    model = shutil.copytree(DEMO / "native", tmp_path / "model")
    first = MoESurveyService.survey([str(model)], file=file, html=folder)
    shutil.rmtree(model)
    again = MoESurveyService.survey([str(model), "demo:upcycled"], file=file, html=folder)
    assert again.rows[0] == first.rows[0]
    links = parse((folder / "index.html").read_text("utf-8")).findall(".//tbody//a")
    assert [(folder / link.get("href")).is_file() for link in links] == [True, True]
    assert sorted(os.listdir(tmp_path)) == ["pages", "rows.jsonl"]


def test_an_interrupted_survey_goes_on_with_its_analyses(tmp_path: Path) -> None:
    folder, file = tmp_path / "pages", tmp_path / "rows.jsonl"

    class Enough(Exception):
        pass

    def stop(_: object) -> None:
        raise Enough

    with pytest.raises(Enough):
        MoESurveyService.survey(["demo:native", "demo:upcycled"], file=file, html=folder, finished=stop)
    assert not folder.exists()
    done = [json.loads(line)["request"]["model"] for line in file.read_text().splitlines()]
    assert done == ["demo:native"]
    asked: list[str] = []
    names = ["demo:native", "demo:upcycled"]
    MoESurveyService.survey(names, file=file, html=folder, finished=lambda row: asked.append(row.request.model))
    assert asked == ["demo:upcycled"]
    assert len(parse((folder / "index.html").read_text("utf-8")).findall(".//tbody//a")) == 2
    assert sorted(os.listdir(tmp_path)) == ["pages", "rows.jsonl"]


def test_a_model_without_a_full_analysis_has_a_page_of_what_is_known(tmp_path: Path, capsys: Capture) -> None:
    """As after a quick survey."""
    folder = tmp_path / "pages"
    arguments = [*SURVEY, "demo:permuted", f"{FIXTURES}/dense_llama", "--quick", "--budget", "1MB"]
    assert run([*arguments, "--html", str(folder), "-q", "--json"]) == 1
    survey = MoETypeSurvey.model_validate_json(capsys.readouterr().out)
    index = parse((folder / "index.html").read_text("utf-8"))
    (link,) = (link.get("href") for link in index.findall(".//tbody//a"))
    assert names_in(folder) == ["index.html", link]
    page, answer = parse((folder / link).read_text("utf-8")), survey.rows[0].answer
    assert answer
    text = text_of(page.find(".//main"))
    assert text_of(page.find(".//h1")) == "demo:permuted"
    assert f"UPCYCLED {100 * answer.confidence:.0f} % confidence, as measured on tiny models" in text
    assert f"{100 * (answer.shared or 0):.1f} % of an expert's neurons have a close match in another expert" in text
    assert "In the parts that were read" in text
    assert "lazarus introspect moe-expert moe-type-analyze -m demo:permuted" in text
    assert SurveyRow.model_validate_json(page.find(".//script[@id='report']").text) == survey.rows[0]


def test_an_answer_of_an_earlier_survey_has_a_page_of_what_is_known(rows: Path, tmp_path: Path) -> None:
    MoESurveyService.survey(["demo:native"], file=rows, html=tmp_path / "pages")
    (link,) = parse((tmp_path / "pages/index.html").read_text("utf-8")).findall(".//tbody//a")
    text = text_of(parse((tmp_path / "pages" / link.get("href")).read_text("utf-8")))
    assert "Not by a shared base" in text
    assert "in the parts that were read" not in text


def test_every_page_leads_back_to_the_table(written: tuple[Path, MoETypeSurvey]) -> None:
    pages = list((written[0] / "models").glob("*.html"))
    assert len(pages) == 2
    for path in pages:
        (back,) = parse(path.read_text("utf-8")).findall(".//a")
        assert (path.parent / back.get("href")).resolve() == written[0] / "index.html"


def test_the_command_stands_on_the_index(tmp_path: Path, capsys: Capture) -> None:
    assert run([*SURVEY, "demo:native", "--quick", "--budget", "1MB", "--html", str(tmp_path / "pages"), "-q"]) == 0
    assert "NATIVE" in capsys.readouterr().out
    text = (tmp_path / "pages/index.html").read_text("utf-8")
    assert "lazarus introspect moe-expert moe-type-survey demo:native --quick --budget 1MB</code>" in text


@pytest.mark.parametrize("name", ["mine", "site", "file", "link", "nowhere/pages", ""])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "site/models").mkdir(parents=True)
    (tmp_path / "site/index.html").write_text("<title>mine</title>")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    before = names_in(tmp_path)
    with pytest.raises(InvalidRequest, match="can't write"):
        MoESurveyService.survey(["demo:native"], html=tmp_path / name)
    assert names_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="nothing here refuses to be written")
def test_a_partial_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pages.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="partial"):
        MoESurveyService.survey(["demo:native"], html=tmp_path / "pages")
    assert os.listdir(tmp_path / "elsewhere") == []


# Rows for pipes


def test_csv_has_the_figures_as_they_are(written: tuple[Path, MoETypeSurvey], rows: Path, capsys: Capture) -> None:
    assert run([*SURVEY, *NAMES, "-o", str(rows), "--format", "csv", "-v"]) == 1
    out, _ = capsys.readouterr()
    report = written[1]
    for read, row, record in zip(csv.DictReader(io.StringIO(out)), report.rows, report.records(), strict=True):
        assert read["model"] == row.request.model
        assert read.keys() == record.keys()
        if row.answer:
            assert (read["type"], float(read["confidence"])) == (row.answer.type, row.answer.confidence)
            assert (int(read["parameters"]), read["kind"]) == (row.answer.parameters, row.answer.kind or "")
        else:
            assert read["type"] == ""
            assert "no routed experts" in read["error"]


def test_markdown_is_a_table(rows: Path, capsys: Capture) -> None:
    assert run([*SURVEY, *NAMES, "-o", str(rows), "--format", "markdown"]) == 1
    out, _ = capsys.readouterr()
    page = parse(f"<!DOCTYPE html><title>x</title>{MarkdownIt('commonmark').enable('table').render(out)}")
    headings = [text_of(cell) for cell in page.findall(".//th")]
    shown = [dict(zip(headings, map(text_of, row), strict=True)) for row in page.findall(".//tbody/tr")]
    assert [row["Model"] for row in shown] == NAMES
    assert [row["Type"] for row in shown] == ["NATIVE", "UPCYCLED", "failed"]
    assert shown[1]["Shared"] == "100 %"


def test_json_is_that_of_the_option(capsys: Capture) -> None:
    assert run([*SURVEY, "demo:native", "--plan", "--json"]) == 0
    once = capsys.readouterr().out
    for words in (["--format", "json"], ["--format=json"]):
        assert run([*SURVEY, "demo:native", "--plan", *words]) == 0
        assert capsys.readouterr().out == once
    assert MoESurveyPlan.model_validate_json(once)
    assert run([*SURVEY, "nothing.txt", "--format", "json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == 2
    assert run([*SURVEY, "demo:native", "--json", "--format", "csv"]) == 2
    assert run([*SURVEY, "demo:native", "--format", "xml"]) == 2


def test_a_plan_has_rows_too(capsys: Capture) -> None:
    assert run([*SURVEY, *NAMES, "--plan", "--format", "markdown"]) == 1
    out, _ = capsys.readouterr()
    assert "| demo:native | 393.2 kB | 786.4 kB | 589.8 kB | 1.0 s |" in out
    plan = MoESurveyService.plan(NAMES)
    assert [record["analysis_bytes"] for record in plan.records()] == [one.analysis_bytes for one in plan.models]


def test_rows_go_into_a_frame(written: tuple[Path, MoETypeSurvey]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(MoETypeSurvey(rows=written[1].rows[:2]).records())
    assert list(frame["type"]) == ["NATIVE", "UPCYCLED"]
    assert frame["confidence"].dtype.kind == "f"


def test_cells_stay_cells() -> None:
    rows = [{"a": 'x,"y"\n', "b": None}, {"a": 0.1, "b": True}]
    assert list(csv.reader(io.StringIO(format_csv(rows)))) == [["a", "b"], ['x,"y"\n', ""], ["0.1", "True"]]
    assert format_csv([]) == "\n"
    assert format_markdown(["A", "N"], [["a|b", "1"]], {"A"}) == "| A | N |\n| --- | ---: |\n| a\\|b | 1 |\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (1.04, "1.0 s"),
        (59, "59 s"),
        (90, "1.5 min"),
        (3599, "60 min"),
        (7200, "2.0 h"),
        (3e6, "35 days"),
    ],
)
def test_times_have_their_largest_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
