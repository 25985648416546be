"""What an analysis looks like: as a page, as a figure file, in a terminal and in a notebook."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from html import unescape
from io import BytesIO, TextIOWrapper
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import html5lib
import numpy as np
import pytest
from rich.console import Console

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeComparison, MoETypeService
from chuk_lazarus.introspection.moe.views import page
from chuk_lazarus.introspection.moe.views.figures import provenance
from chuk_lazarus.introspection.moe.views.page import to_page
from chuk_lazarus.introspection.moe.views.terminal import LayerDrawing
from places import DEMO, FIXTURES
from processor_time import HANGS
from sampling import in_turn, keep, sampled

MOE = ["introspect", "moe-expert"]
ANALYZE = [*MOE, "moe-type-analyze"]
COMPARE = [*MOE, "moe-type-compare"]
ESTIMATE = [*MOE, "moe-overlay-estimate"]
HOSTILE = "</script>\"'><!--<b>&amp;$\\frac{$x"  # a path of two parts, for it has a slash

Report = MoETypeAnalysis | MoETypeComparison
Capture = pytest.CaptureFixture[str]


def _many_layers() -> MoETypeAnalysis:
    report = MoETypeService.analyze("demo:native")
    layers = tuple(report.layers[0].model_copy(update={"layer": number}) for number in range(40))
    return report.model_copy(update={"layers": layers, "moe_layers": tuple(range(40))})


REPORTS: dict[str, Callable[[], Report]] = {
    "one layer": lambda: MoETypeService.analyze("demo:native"),
    "all layers": lambda: MoETypeService.analyze("demo:upcycled", layers="all", variance=(0.5, 0.999)),
    "parent": lambda: MoETypeService.analyze("demo:permuted", parent="demo:parent", experts=3),
    "undetermined, no gate": lambda: MoETypeService.analyze(str(FIXTURES / "nemotron_h")),
    "comparison": lambda: MoETypeService.compare("demo:native", "demo:upcycled"),
    "a long name": lambda: _many_layers().model_copy(update={"model": "organisation/" + "name" * 60}),
    "the same twice": lambda: MoETypeService.compare("demo:native", "demo:native", layers="all"),
}
report_of = cache(lambda name: REPORTS[name]())
page_of = cache(lambda name: to_page(report_of(name)))
tree_of = cache(lambda name: parse(page_of(name)))
OTHERS = [name for name in REPORTS if name not in ("a long name", "the same twice")]
each_report = pytest.mark.parametrize("name", keep(REPORTS, *OTHERS))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages with empty pictures, which cost little time."""
    monkeypatch.setattr(provenance, "finish", lambda figure: figure)
    monkeypatch.setattr(page, "to_svg", lambda figure, themed: '<svg xmlns="http://www.w3.org/2000/svg"></svg>')


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose name is made to break out of whatever it is put in."""
    shutil.copytree(DEMO / "native", tmp_path / HOSTILE)
    monkeypatch.chdir(tmp_path)
    return HOSTILE


def parse(text: str) -> ElementTree.Element:
    """The page as a browser would build it; any error in the markup fails the test."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def words(element: ElementTree.Element | None) -> str:
    """What an element says, blanks as one."""
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def all_words(page: ElementTree.Element) -> str:
    """What a reader reads: neither style nor data nor pictures."""
    unread = {id(part) for tag in ("style", "script", "{http://www.w3.org/2000/svg}svg") for part in page.iter(tag)}

    def read(element: ElementTree.Element) -> str:
        if id(element) in unread:
            return " "
        return (element.text or "") + "".join(read(one) + " " + (one.tail or "") for one in element)

    return " ".join(read(page).split())


def rows(table: ElementTree.Element) -> list[list[str]]:
    return [[words(cell) for cell in row] for row in table.iter("tr")]


def table_of(page: ElementTree.Element, caption: str, number: int = 0) -> list[list[str]]:
    return [rows(table) for table in page.iter("table") if caption in words(table.find("caption"))][number]


def data_of(page: ElementTree.Element) -> Any:
    (script,) = page.iter("script")
    assert script.attrib == {"type": "application/json", "id": "report"}
    return json.loads(script.text or "")


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def analyses(report: Report) -> tuple[MoETypeAnalysis, ...]:
    return report.models if isinstance(report, MoETypeComparison) else (report,)


# The page as such


@each_report
def test_the_page_is_sound_html(name: str) -> None:
    page = tree_of(name)
    assert page.get("lang") == "en"
    assert all(model.model in words(page.find(".//title")) for model in analyses(report_of(name)))
    levels = [int(one.tag[1]) for one in page.iter() if re.fullmatch("h[1-6]", str(one.tag))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [one.get("id") for one in page.iter() if one.get("id")]
    assert len(ids) == len(set(ids))


@each_report
def test_nothing_is_from_elsewhere(name: str) -> None:
    text = page_of(name)
    page = tree_of(name)
    for element in page.iter():
        for attribute, value in element.attrib.items():
            plain = str(attribute).rpartition("}")[2].lower()
            assert not plain.startswith("on"), "a script"
            if plain in {"src", "srcset", "href", "poster", "data", "action", "background", "cite"}:
                assert value.startswith(("#", "data:image/png;base64,")), f"{element.tag} {attribute} {value[:80]}"
            assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", value))
    for tag in ("link", "base", "iframe", "object", "embed", "form"):
        assert page.find(f".//{tag}") is None
    styles = " ".join(style.text or "" for style in page.iter("style"))
    assert "@import" not in styles
    assert "url(" not in styles
    assert set(re.findall(r"\w+://[^\s\"'<]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


@each_report
def test_tables_and_figures_are_for_everybody(name: str) -> None:
    page = tree_of(name)
    parents = {child: parent for parent in page.iter() for child in parent}
    tables = list(page.iter("table"))
    assert tables
    for table in tables:
        assert words(table.find("caption"))
        assert {head.get("scope") for head in table.iterfind("thead//th")} == {"col"}
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in table.iterfind("tbody/tr"))
        assert len({len(row) for row in rows(table)}) == 1
    figures = list(page.iter("figure"))
    assert figures
    for figure in figures:
        panels, caption = figure
        assert (panels.get("role"), caption.tag) == ("img", "figcaption")
        assert words(caption) == " ".join(panels.get("aria-label", "").split())
        assert 1 <= len(list(panels.iter("{http://www.w3.org/2000/svg}svg"))) <= 3
    assert len(re.findall(r"\d+\.\d+|\d+ of \d+", words(figures[0][1]))) >= 2
    for wide in tables:
        box = parents[wide]
        assert (box.get("role"), box.get("tabindex")) == ("region", "0")
        assert "scroll" in box.get("class", "").split()
        assert box.get("aria-label")


# What comes first


def positions(found: ElementTree.Element, *wanted: Callable[[ElementTree.Element], bool]) -> list[int]:
    """Where the first element of each kind stands."""
    elements = list(found.iter())
    return [next(place for place, one in enumerate(elements) if kind(one)) for kind in wanted]


@each_report
def test_verdict_and_deciding_figure_come_first(name: str) -> None:
    found = tree_of(name)
    places = positions(
        found,
        lambda one: "verdict" in one.get("class", "").split(),
        lambda one: one.tag == "figure",
        lambda one: one.tag in ("h2", "table", "dl"),
    )
    assert places == sorted(places)
    first = next(found.iter("{http://www.w3.org/2000/svg}svg"))
    assert "Neurons shared" in " ".join("".join(first.itertext()).split())


def test_what_can_be_saved_stands_beside_each_verdict() -> None:
    found = [one for one in parse(page_of("comparison")).iter() if "verdict" in one.get("class", "").split()]
    saved = [words(part) for one in found for part in one.iter("p") if part.get("class") == "saving"]
    assert [text.partition(":")[0] for text in saved] == [
        "Not by a shared base",
        "Yes",
    ]
    assert all("of the neurons shared" in words(one) for one in found)


@pytest.mark.parametrize(
    ("name", "caveat"),
    [("one layer", "re-initialised"), ("all layers", "duplicating its experts"), ("parent", "")],
)
def test_the_caveat_stands_beside_the_verdict(name: str, caveat: str) -> None:
    (verdict,) = (one for one in tree_of(name).iter() if "verdict" in one.get("class", "").split())
    beside = [words(one) for one in verdict.iter("p") if one.get("class") == "caveat"]
    assert len(beside) == bool(caveat)
    assert caveat in " ".join(beside)


def with_blocks(what: str) -> MoETypeAnalysis:
    """A native model whose first layer shows bright squares."""
    report = report_of("one layer")
    assert isinstance(report, MoETypeAnalysis)
    layer = report.layers[0]
    same = np.arange(8) // 2 == np.arange(8)[:, None] // 2
    values = tuple(map(tuple, np.where(same, 0.9, 0.0).tolist()))
    similarity, sharing, update = layer.similarity, layer.lineage.sharing, {}
    match what:
        case "pairs":
            sharing = sharing.model_copy(update={"pairs": values})
        case "twins":
            sharing = sharing.model_copy(update={"twins": ((0, 1), (2, 3))})
            similarity = similarity.model_copy(update={"cosine": values})
        case "cosines":
            similarity = similarity.model_copy(update={"cosine": values})
        case "layer":
            update = {"type": "UPCYCLED"}
    lineage = layer.lineage.model_copy(update={"sharing": sharing})
    changed = layer.model_copy(update={"lineage": lineage, "similarity": similarity, **update})
    return report.model_copy(update={"layers": (changed,)})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", ""),
        ("pairs", "share more neurons than independent experts do (up to 90 %)"),
        ("twins", "copies of each other: layer 0: experts 0-1 | 2-3"),
        ("cosines", "similar weights (a cosine of up to 0.90)"),
        ("layer", "Not every layer alone has this verdict: layer 0 UPCYCLED"),
    ],
)
def test_a_page_does_not_contradict_itself(what: str, said: str, undrawn: None) -> None:
    """Whatever the figure shows bright, or a layer says otherwise, is explained beside NATIVE."""
    found = parse(to_page(with_blocks(what)))
    (caveat,) = (words(one) for one in found.iter("p") if one.get("class") == "caveat")
    everything = ("share more neurons", "copies of each other", "similar weights", "Not every layer")
    assert said in caveat
    assert sum(part in caveat for part in everything) == bool(said)


# What it says


@each_report
def test_it_says_what_the_report_says(name: str) -> None:
    page = tree_of(name)
    text = all_words(page)
    for model in analyses(report_of(name)):
        assert model.model in text
        assert model.type in text
        if model.type != "UNDETERMINED":
            assert f"{100 * model.confidence:.0f} % confidence, as measured on tiny models" in text
        assert f"{model.cosine:.3f}" in text
        assert f"{100 * model.rank_ratio:.1f} %" in text
        assert f"{sum(layer.lineage.sharing.neurons for layer in model.layers):,} neurons searched" in text
        assert "documented rule says" not in text
        assert all(note in text for note in model.notes)
        assert model.cost.describe() in text
        if model.parent:
            assert f"have a match in {model.parent}" in text


@each_report
def test_every_layer_and_every_expert_has_its_row(name: str) -> None:
    page = tree_of(name)
    details = list(page.iter("details"))
    for place, model in enumerate(analyses(report_of(name))):
        heading, *by_layer = table_of(page, "The layers of", place)
        for layer, row in zip(model.layers, by_layer, strict=True):
            found = dict(zip(heading, row, strict=True))
            assert (found["Layer"], found["Type"]) == (str(layer.layer), layer.type)
            assert found["Shared"] == f"{100 * layer.lineage.sharing.shared:.1f} %"
            assert found["Cosine"].startswith(f"{layer.cosine.mean:.3f}")
            for role in ("gate", "up", "down"):
                assert (role in found) == (role in layer.projections)
        heading, *by_role = table_of(page, "The ranks of", place)
        wanted_ranks = [
            (f"{role}, layer {layer.layer}", *(f"{rank:.1f}" for rank in one.rank.values()))
            for layer in model.layers
            for role, one in layer.projections.items()
        ]
        assert [(row[0], *row[2:-5]) for row in by_role] == wanted_ranks
        wanted_bits = [
            (f"{one.bits_saved:.1f}", f"{one.bound:.1f}")
            for layer in model.layers
            for one in layer.projections.values()
            if one.bits_saved is not None and one.bound is not None
        ]
        assert [(row[-2], row[-1]) for row in by_role] == [
            (row[0].replace("-0.0", "0.0"), row[1]) for row in wanted_bits
        ]
        for layer in model.layers:
            shown = details.pop(0)
            assert words(shown.find("summary")) == f"{model.model}, layer {layer.layer}"
            heading, *by_expert = rows(next(shown.iter("table")))
            assert heading == ["Expert", *layer.projections]
            columns = [one.expert_ranks["0.95"] for one in layer.projections.values()]
            numbers = [f"#{expert}" for expert in layer.lineage.experts]
            wanted = [[number, *map(str, row)] for number, *row in zip(numbers, *columns, strict=True)]
            assert by_expert[: len(wanted)] == wanted
            assert by_expert[-2][1:] == [f"{np.mean(column):.1f}" for column in columns]
            assert by_expert[-1][1:] == [f"{np.std(column):.1f}" for column in columns]
    assert details == []


@each_report
def test_the_json_inside_is_the_report(name: str) -> None:
    report = report_of(name)
    data = data_of(tree_of(name))
    assert data == report.model_dump(mode="json")
    assert list(data) == list(report.model_dump(mode="json"))
    assert type(report).model_validate(data) == report


def test_several_layers_have_a_figure_of_their_own() -> None:
    one, many = (len(list(tree_of(name).iter("figure"))) for name in ("one layer", "all layers"))
    assert many == one + 1


@pytest.mark.long
def test_what_is_shown_depends_on_the_verdict(undrawn: None) -> None:
    native = report_of("one layer")
    assert isinstance(native, MoETypeAnalysis)
    pages = {
        kind: all_words(parse(to_page(native.model_copy(update={"type": kind}))))
        for kind in ("UPCYCLED", "NATIVE", "UNDETERMINED")
    }
    assert "was upcycled" in pages["UPCYCLED"]
    assert "was trained natively" in pages["NATIVE"]
    assert "confidence" not in pages["UNDETERMINED"].partition("Evidence")[0]
    assert {kind for kind, text in pages.items() if "--thorough" in text} == {"UNDETERMINED"}
    pays = all_words(parse(to_page(native.model_copy(update={"compressible": True}))))
    assert "moe-overlay-verify" in pays
    assert "moe-overlay-verify" not in pages["NATIVE"]


def next_commands(page: ElementTree.Element) -> list[list[str]]:
    return [shlex.split(words(code)) for item in page.iter("li") for code in item.iter("code")]


@pytest.mark.parametrize("name", ["one layer", "all layers", "parent", "comparison"])
def test_what_to_do_next_can_be_done(name: str, capsys: Capture) -> None:
    commands = next_commands(tree_of(name))
    assert commands
    for program, *arguments in commands:
        assert program == "lazarus"
        assert run([*arguments, "--json"]) == 0, arguments
        assert json.loads(capsys.readouterr().out)["model"] in {model.model for model in analyses(report_of(name))}


OTHER_LAYERS = [(2, "0,1"), (4, "0,1,2,3"), (5, "0,1,2,4"), (61, "0,20,40,60")]


@pytest.mark.parametrize(("layers", "wanted"), sampled(OTHER_LAYERS, [(2, "0,1"), (61, "0,20,40,60")]))
def test_other_layers_are_proposed_evenly(layers: int, wanted: str, undrawn: None) -> None:
    report = report_of("one layer").model_copy(update={"moe_layers": tuple(range(layers))})
    proposed = [command for command in next_commands(parse(to_page(report))) if "--layers" in command]
    assert [command[-1] for command in proposed] == [wanted]


# Names that would break out


@pytest.mark.long
def test_a_name_is_text_and_nothing_else(hostile: str) -> None:
    for report in (MoETypeService.analyze(hostile), MoETypeService.compare(hostile, "demo:upcycled")):
        page = parse(to_page(report, shlex.join(["lazarus", "-m", hostile])))
        assert data_of(page) == report.model_dump(mode="json")
        assert page.find(".//b") is None
        assert hostile in words(page.find(".//h1")) or hostile in words(page.find(".//h3"))
        assert hostile in words(page.find(".//title"))
        assert all(command[command.index("-m") + 1] in (hostile, "demo:upcycled") for command in next_commands(page))
        assert shlex.split(words(list(page.iter("code"))[-2])) == ["lazarus", "-m", hostile]


@pytest.mark.long
def test_no_field_of_a_report_is_markup() -> None:
    report = report_of("parent")
    texts = ("model", "revision", "family", "model_type", "storage", "parent", "kind")
    poisoned = report.model_copy(
        update={name: f"{name} {HOSTILE}" for name in texts} | {"notes": (f"notes {HOSTILE}",)}
    )
    page = parse(to_page(poisoned, f"command {HOSTILE}"))
    text = all_words(page)
    for name in (*texts, "notes", "command"):
        assert f"{name} {HOSTILE}" in text
    assert page.find(".//b") is None
    assert data_of(page) == poisoned.model_dump(mode="json")


def test_control_characters_of_the_command_are_escaped(undrawn: None) -> None:
    text = to_page(report_of("one layer"), "lazarus -m 'a\x1b[31m\x00\udcff'")
    assert "a\\x1b[31m\\x00\\udcff" in unescape(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", text)


# --html


@pytest.mark.parametrize(
    "arguments",
    [
        [*ANALYZE, "-m", "demo:native", "--layers", "all"],
        pytest.param([*COMPARE, "-m", "demo:native", "-c", "demo:upcycled"], marks=pytest.mark.long),
    ],
    ids=["analyze", "compare"],
)
def test_html_has_the_same_json_as_json(arguments: list[str], tmp_path: Path, capsys: Capture, undrawn: None) -> None:
    file = tmp_path / "page.html"
    file.write_text("what was here before")
    assert run([*arguments, "--html", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    page = parse(file.read_text(encoding="utf-8"))
    assert err == ""
    assert data_of(page) == json.loads(out)
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    made_by = words(list(page.iter("code"))[-2])
    assert shlex.split(made_by) == ["lazarus", *arguments]  # without --html and --json, which say where results go
    assert run(arguments) == 0
    table = capsys.readouterr().out
    assert run([*arguments, "--html", str(file)]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.long
def test_the_same_analysis_gives_the_same_page() -> None:
    first, second = (to_page(MoETypeService.analyze("demo:native", layers="all")) for _ in range(2))
    plain = [re.sub(r'in \d+\.\d s|"seconds": [\d.e-]+', "", text) for text in (first, second)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    ("command", "option", "places"),
    [
        ([*ANALYZE, "-m", "no/model"], "--html", ["", ".", "folder", "folder/", "nowhere/x", "file/x", "n" * 300]),
        ([*COMPARE, "-m", "no/model", "-c", "no/model"], "--html", ["folder"]),
        ([*ANALYZE, "-m", "no/model"], "--plot", ["", ".", "f.png", "nowhere/x.svg", "file/x.pdf", "n" * 300 + ".png"]),
        ([*COMPARE, "-m", "no/model", "-c", "no/model"], "--plot", ["f.png"]),
        ([*ESTIMATE, "-m", "no/model"], "--plot", ["f.png"]),
    ],
)
def test_where_nothing_can_be_written(
    command: list[str],
    option: str,
    places: list[str],
    as_json: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Before the work: the model, which is not there, is not even looked for."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "f.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        assert run([*command, option, place, *as_json]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert option in err
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_failed_analysis_leaves_the_old_file(option: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "old.svg"
    file.write_text("kept")
    assert run([*ANALYZE, "-m", str(FIXTURES / "dense_llama"), option, str(file)]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert file.read_text() == "kept"
    assert [one.name for one in tmp_path.iterdir()] == ["old.svg"]


# --plot


DRAWN = {
    "moe-type-analyze": [*ANALYZE, "-m", "demo:upcycled", "--layers", "all"],
    "moe-type-compare": [*COMPARE, "-m", "demo:native", "-c", "demo:upcycled"],
    "moe-overlay-estimate": [*ESTIMATE, "-m", "demo:native"],
}
STARTS = {".SVG": b"<", ".png": b"\x89PNG", ".pdf": b"%PDF-"}


@pytest.mark.parametrize(
    ("name", "ending"),
    sampled(product(DRAWN, STARTS), in_turn(list(DRAWN), list(STARTS)), lambda name, ending: f"{name}-{ending}"),
)
def test_plot(name: str, ending: str, tmp_path: Path, capsys: Capture) -> None:
    command, start = DRAWN[name], STARTS[ending]
    file = tmp_path / f"figure{ending}"
    assert run([*command, "--plot", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == ""
    assert file.read_bytes().startswith(start)
    assert [one.name for one in tmp_path.iterdir()] == [file.name]
    if ending == ".SVG":
        assert shlex.join(["lazarus", *command]) not in said_in(file)
        assert run([*command, "--plot", str(file), "--caption", "--json"]) == 0
        assert shlex.join(["lazarus", *command]) in said_in(file)


def said_in(svg: Path) -> str:
    return " ".join("".join(ElementTree.fromstring(svg.read_text("utf-8")).itertext()).split())


def test_a_caption_needs_a_figure(capsys: Capture) -> None:
    assert run([*ANALYZE, "-m", "no/model", "--caption"]) == 2
    assert "--plot" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["figure", "figure.jpg", ".png", "figure.png.txt"])
def test_a_figure_is_png_svg_or_pdf(place: str, tmp_path: Path, capsys: Capture) -> None:
    """The name is looked at before the model, which is not there."""
    assert run([*ANALYZE, "-m", str(tmp_path / "no model"), "--plot", str(tmp_path / place)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(ending in err for ending in (".png", ".svg", ".pdf"))
    assert list(tmp_path.iterdir()) == []


# --visualize


def draw(report: Report, width: int, encoding: str = "utf-8") -> list[str]:
    """The drawing of the first layer, without colour."""
    file = BytesIO()
    console = Console(file=TextIOWrapper(file, encoding=encoding), width=width)
    console.print(LayerDrawing(analyses(report)[0].layers[0]))
    console.file.flush()
    return file.getvalue().decode(encoding).splitlines()


@pytest.mark.sample
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
@each_report
def test_a_drawing_fits_its_terminal(name: str, width: int, encoding: str) -> None:
    lines = draw(report_of(name), width, encoding)
    assert max(map(len, lines)) <= width
    assert "\x1b" not in "".join(lines)
    text = " ".join(lines)
    for role, projection in analyses(report_of(name))[0].layers[0].projections.items():
        assert f"{role} {projection.rank['0.95']:.0f} ({100 * projection.rank_ratio:.0f} %)" in text


@each_report
def test_cosines_are_drawn_as_numbers(name: str) -> None:
    similarity = analyses(report_of(name))[0].layers[0].similarity
    lines = draw(report_of(name), 80)
    start = next(place for place, line in enumerate(lines) if line.startswith("COSINES"))
    heading, *found = [[int(cell) for cell in line.split()] for line in lines[start + 1 : -1]]
    assert heading == list(similarity.experts)
    assert [row[0] for row in found] == list(similarity.experts)
    assert np.abs(np.array(found)[:, 1:] - 100 * np.array(similarity.cosine)).max() <= 0.5


@pytest.mark.parametrize(("encoding", "shades"), [("utf-8", " ░▒▓█"), ("ascii", " .:+#")])
@pytest.mark.parametrize(("width", "experts"), [(80, 64), (40, 32)])
def test_many_experts_are_drawn_in_shades(encoding: str, shades: str, width: int, experts: int) -> None:
    report = report_of("one layer")
    layer = report.layers[0]
    cosine = np.clip(1 - np.abs(np.subtract.outer(np.arange(64), np.arange(64))) / 10, -1, 1).round(4)
    similarity = layer.similarity.model_copy(update={"experts": tuple(range(64)), "cosine": tuple(map(tuple, cosine))})
    changed = report.model_copy(update={"layers": (layer.model_copy(update={"similarity": similarity}),)})
    lines = draw(changed, width, encoding)
    start = next(place for place, line in enumerate(lines) if line.startswith("COSINES"))
    drawn = [re.fullmatch(r" *(\d+) (.*)", line) for line in lines[start:]]
    found = {int(row[1]): row[2].ljust(experts) for row in drawn if row}
    assert len(found) == experts
    numbers = sorted(found)
    for row in numbers:
        for place, column in enumerate(numbers):
            level = shades.index(found[row][place])
            assert level / 5 <= max(0, cosine[row, column]) + 1e-9
            assert cosine[row, column] < (level + 1) / 5 or level == 4
    assert all(shade in " ".join(lines[start:]) for shade in shades)


def test_a_drawn_curve_falls_as_the_singular_values_do() -> None:
    """In ASCII a column has one dot, so that the curve can be read back."""
    report = report_of("one layer")
    lines = draw(report, 60, "ascii")
    axes = [place for place, line in enumerate(lines) if re.match(r" *\+", line)]
    roles = [role for line in lines for role in re.findall(r"(gate|up|down) \d", line)]
    seen = []
    for axis in axes:
        for corner in (found.start() for found in re.finditer(r"\+", lines[axis])):
            width = re.match(r"\+[-^]+", lines[axis][corner:]).end()
            panel = [line.ljust(60)[corner + 1 : corner + width] for line in lines[axis - 8 : axis]]
            projection = report.layers[0].projections[roles[len(seen)]]
            columns = [min(row for row in range(8) if panel[row][column] == "*") for column in range(width - 1)]
            assert columns == sorted(columns)
            top = float(re.search(r"[\d.]+(?=\|)", lines[axis - 8][: corner + 1])[0])
            heights = np.interp(
                np.linspace(0, 1, width - 1), np.linspace(0, 1, len(projection.decay)), projection.decay
            )
            assert np.abs(np.array(columns) - (1 - heights / top) * 7).max() < 3
            mark = lines[axis][corner:].index("^") - 1
            assert mark == round(projection.rank_ratio * (width - 2))
            seen.append(projection)
    assert seen == list(report.layers[0].projections.values())


def test_visualize(capsys: Capture) -> None:
    arguments = [*ANALYZE, "-m", "demo:upcycled", "--layers", "1"]
    assert run(arguments) == 0
    table = capsys.readouterr().out
    assert run([*arguments, "--visualize"]) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith(table)
    assert "LAYER 1" in drawn[len(table) :]
    assert "\x1b" not in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    assert run([*arguments, "--visualize", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["layer"] == 1


# In a notebook


@pytest.mark.parametrize("name", keep(REPORTS, "undetermined, no gate", "comparison"))
def test_a_notebook_shows_a_part_of_the_page(name: str) -> None:
    text = report_of(name)._repr_html_()
    fragment = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parseFragment(text)
    tags = {str(element.tag) for element in fragment.iter()}
    assert not tags & {"html", "head", "body", "title", "main", "script", "h1", "h2"}
    assert {"table", "figure", "{http://www.w3.org/2000/svg}svg"} <= tags
    shown = all_words(fragment)
    for model in analyses(report_of(name)):
        assert model.model in shown
        assert model.type in shown
    styles = " ".join(style.text or "" for style in fragment.iter("style"))
    assert not re.search(r"\b(body|html|root|page)\b", styles), "it would restyle the notebook"


def test_reports_without_a_page_are_shown_as_before() -> None:
    from chuk_lazarus.introspection.moe import MoECompressionService

    assert MoECompressionService.compute("demo:native")._repr_html_().startswith("<pre")


def test_without_matplotlib_there_are_no_figures() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"  # what Python does for a module that can't be had
        "from chuk_lazarus.introspection.moe import MoETypeService\n"
        "print(MoETypeService.analyze('demo:native')._repr_html_())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == ""
    assert "<svg" not in done.stdout
    assert "NATIVE" in done.stdout
    assert "need matplotlib" in done.stdout


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# Shows the page in frames of the widths asked for, and says of each how far it is wider than its frame, and which texts
# have too little contrast with what is behind them (WCAG 2.2, 1.4.3; alpha is blended, pictures are left out).
LOOK = """
<!DOCTYPE html><body><pre id="found"></pre><script>
const page = PAGE, found = {};
const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
const rgba = color => {
  context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].map(one => one / 255);
};
const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
const light = color => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) =>
  sum + share * (color[i] <= 0.04045 ? color[i] / 12.92 : ((color[i] + 0.055) / 1.055) ** 2.4), 0);
const look = frame => {
  const inside = frame.contentDocument, view = frame.contentWindow, faint = [];
  inside.querySelectorAll("details").forEach(one => one.open = true);
  const behind = element => element
    ? over(rgba(view.getComputedStyle(element).backgroundColor), behind(element.parentElement))
    : [1, 1, 1, 1];
  for (const element of inside.body.querySelectorAll("*:not(svg, svg *, script, style)")) {
    if (![...element.childNodes].some(one => one.nodeType === 3 && one.data.trim())) continue;
    const ground = behind(element), ink = over(rgba(view.getComputedStyle(element).color), ground);
    const [low, high] = [light(ground), light(ink)].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) faint.push(element.textContent.trim().slice(0, 40));
  }
  return {
    over: inside.documentElement.scrollWidth - frame.clientWidth, faint,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    background: view.getComputedStyle(inside.body).backgroundColor,
    pictures: [...inside.querySelectorAll("svg")].map(one => one.getBoundingClientRect().height > 100),
    boxes: [...inside.querySelectorAll(".scroll")].map(one => one.getBoundingClientRect().right <= frame.clientWidth),
  };
};
for (const width of [320, 390, 1280]) {
  const frame = Object.assign(document.createElement("iframe"), {srcdoc: page, height: 900});
  frame.style = `width: ${width}px; border: 0`;
  frame.onload = () => {
    found[width] = look(frame);
    document.getElementById("found").textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script></body>
"""


@pytest.mark.real
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@each_report
def test_the_page_in_a_browser(name: str, dark: bool, tmp_path: Path) -> None:
    """On a phone and on a desk, by day and by night: nothing runs over the edge, and every text can be read."""
    page = json.dumps(page_of(name)).replace("<", "\\u003c")
    (tmp_path / "look.html").write_text(LOOK.replace("PAGE", page, 1), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", profile, *(["--force-dark-mode"] if dark else [])]
    done = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "look.html").as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=HANGS,
        check=True,
    )
    written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert written
    found = json.loads(unescape(written[1]))
    assert set(found) == {"320", "390", "1280"}
    for width, seen in found.items():
        assert seen["over"] <= 0, f"{width} px: {seen['over']} px too wide"
        assert seen["faint"] == []
        assert seen["dark"] == dark
        assert seen["pictures"]
        assert all(seen["pictures"])
        assert all(seen["boxes"])
    assert (sum(map(int, re.findall(r"\d+", found["390"]["background"])[:3])) < 384) == dark
