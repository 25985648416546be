"""Folders and files of any name that a file system takes: as what is written, and as what is read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER
from sampling import keep
from terminals import without_steps

Capture = pytest.CaptureFixture[str]

RANKS = ["--gate-rank", "4", "--up-rank", "4", "--down-rank", "4"]
NAMES = [
    b"a b",
    b" two  spaces",
    b"-x",
    b"a#b",
    b"50%s",
    b"quo'te\"",
    "üñ日本".encode(),
    b"[bold]x[",
    b"[ab]",
    b"*",
    b"?",
    b"{a}",
    b"new\nline",
    b"tab\t",
    b"\x1b[31mred",
    b"not utf-8 \xff\xfe",
    b"long " + "é".encode() * 125,
    b"x" * 255,
    b"$HOME",
    b"back\\slash",
    b"x.partial",
    b"x.safetensors",
]


def shown(path: bytes) -> str:
    """How a terminal is to show a path: as it is, but for what is no printable character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(path))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")


def call(capsys: Capture, command: str, *arguments: str | bytes, code: int = 0) -> str:
    """What a command prints, on stderr where it fails."""
    capsys.readouterr()
    words = [os.fsdecode(word) for word in arguments]
    found = run(["introspect", "moe-expert", command, *words])
    out, err = capsys.readouterr()
    assert (found, "Traceback" in err) == (code, False), err
    assert without_steps(err).count("\n") == bool(code)
    return err if code else out


@pytest.mark.parametrize("name", keep(NAMES, b"-x", b"not utf-8 \xff\xfe"))
def test_folders_of_any_name(name: bytes, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("mlx.core")
    text = tmp_path / "text.txt"
    text.write_text("a text")
    places = [os.path.join(os.fsencode(tmp_path), folder) for folder in (b"overlays", b"exports")]
    overlay, rebuilt = (os.path.join(place, name) for place in places)
    for place in places:
        os.mkdir(place)
    wrote = call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", overlay, *RANKS)
    assert shown(overlay) in wrote
    assert shown(overlay) in call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", overlay, *RANKS, code=2)
    command = ("moe-overlay-eval", "-m", "demo:upcycled", "--overlay", overlay, "--text", str(text))
    assert shown(overlay) in call(capsys, *command)
    wrote = call(capsys, "moe-overlay-export", overlay, "-O", rebuilt)
    assert shown(overlay) in wrote
    assert shown(rebuilt) in wrote
    assert [os.listdir(place) for place in places] == [[name], [name]]
    for command in (("moe-type-analyze", "-m", rebuilt), ("moe-layout", "-m", rebuilt)):
        assert shown(rebuilt) in call(capsys, *command)
    call(capsys, "moe-overlay-eval", "-m", rebuilt, "--overlay", overlay, "--text", str(text))
    again = ("--bits", "4", "--calibrate", str(text))
    call(capsys, "moe-overlay-compress", "-m", rebuilt, "-O", os.path.join(places[0], b"again"), *again)


@pytest.mark.parametrize("name", keep(NAMES, b"[bold]x[", b"not utf-8 \xff\xfe"))
def test_files_of_any_name(name: bytes, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the current folder, in front of which ./ keeps a dash from being an option."""
    monkeypatch.chdir(tmp_path)
    for command in ("moe-type-analyze", "moe-overlay-estimate"):
        call(capsys, command, "-m", "demo:upcycled", "-o", b"./" + name)
        assert json.loads(Path(os.fsdecode(name)).read_text())["model"] == "demo:upcycled"
        assert os.listdir(b".") == [name]
    said = call(capsys, "moe-type-analyze", "-m", "demo:upcycled", "-o", os.path.join(name, b"x"), code=2)
    assert f"there is no folder '{shown(name)}'" in said


@pytest.mark.parametrize("name", keep([b"not utf-8 \xff", b"[red]", b"a#b"], b"not utf-8 \xff"))
def test_models_of_any_name_on_a_page_and_in_a_figure(name: bytes, tmp_path: Path, capsys: Capture) -> None:
    model = os.path.join(os.fsencode(tmp_path), name)
    shutil.copytree(DEMO_FOLDER / "upcycled", os.fsdecode(model))
    page, figure = tmp_path / "page.html", tmp_path / "figure.svg"
    call(capsys, "moe-type-analyze", "-m", model, "--html", str(page), "--plot", str(figure))
    assert shown(model) in page.read_text("utf-8")
    assert figure.exists()
    call(capsys, "moe-type-survey", model, "-o", str(tmp_path / "rows.jsonl"))
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["answer"]["type"] == "UPCYCLED"


def test_a_pattern_does_not_load_another_folder(tmp_path: Path, capsys: Capture) -> None:
    """mlx-lm takes a folder's name for a pattern: [ab] would be the folder a."""
    pytest.importorskip("mlx.core")
    text = tmp_path / "text.txt"
    text.write_text("a text")
    for folder, model in (("a", "native"), ("[ab]", "upcycled")):
        shutil.copytree(DEMO_FOLDER / model, tmp_path / folder)
    report = json.loads(
        call(
            capsys,
            "moe-overlay-eval",
            "-m",
            "demo:upcycled",
            "--overlay",
            str(tmp_path / "[ab]"),
            "--text",
            str(text),
            "--json",
        )
    )
    assert report["kl"]["mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ending", ["/", "//", "/."])
def test_a_slash_behind_a_folder(ending: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "overlay"
    wrote = call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", f"{folder}{ending}", *RANKS)
    assert f"{folder}\n" in wrote
    assert [path.name for path in tmp_path.iterdir()] == ["overlay"]


def test_a_tilde_is_the_home_folder_only_where_a_shell_takes_it_for_that(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that begins with ./ has no home, and so has that of a user who is not there."""
    pytest.importorskip("mlx.core")
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (here / "~t").write_text("a text")
    call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", "./~", *RANKS)
    call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", "~nobody-of-that-name", *RANKS)
    call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "--folder=~/overlay", *RANKS)
    call(capsys, "moe-overlay-export", "./~", "-O", "./~root")
    call(capsys, "moe-overlay-eval", "-m", "./~root", "--overlay", "./~", "--text", "./~t")
    call(capsys, "moe-overlay-compute", "-m", "./~root", "--bits", "3", "--calibrate", "./~t")
    assert {path.name for path in here.iterdir()} == {"~", "~nobody-of-that-name", "~root", "~t"}
    assert [path.name for path in home.iterdir()] == ["overlay"]
    MoECompressionService.export("~/overlay", "~/export")
    assert {path.name for path in home.iterdir()} == {"overlay", "export"}


def test_an_empty_folder_that_is_there_is_kept(tmp_path: Path, capsys: Capture) -> None:
    said = call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", str(tmp_path), *RANKS, code=2)
    assert f"{tmp_path} already exists" in said
    assert not [*tmp_path.iterdir()]


def test_a_parent_that_is_a_link(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    folder, result = tmp_path / "link/overlay", tmp_path / "link/result.json"
    wrote = call(capsys, "moe-overlay-compress", "-m", "demo:upcycled", "-O", str(folder), *RANKS, "-o", str(result))
    assert str(folder) in wrote
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"overlay", "result.json"}
    assert json.loads(result.read_text())["folder"] == str(folder)
