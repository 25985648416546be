"""`lazarus cache`: what is kept, how much, and that clearing it deletes our files and no others."""

import json
from pathlib import Path

import pytest

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import ModelUnreadable, MoECacheService

Capture = pytest.CaptureFixture[str]

KEY = "0123456789abcdef" * 2
OURS = {
    f"ranges/{KEY}/0-4096-89abcdef": 4096,
    f"ranges/{KEY}/.part-abcd_123": 10,
    f"files/{KEY}.json": 100,
    f"refs/{KEY}.json": 200,
    f"sweeps/{KEY}/12.json": 300,
    f"sweeps/{KEY}/12.data": 1000,
}
OTHERS = ["notes.txt", "ranges/readme", f"ranges/{KEY}x/0-1-89abcdef", f"sweeps/{KEY}/mine.json", "models/a.gguf"]


@pytest.fixture
def filled(cache: Path) -> Path:
    for name, size in {**OURS, **dict.fromkeys(OTHERS, 7)}.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(bytes(size))
    return cache


def left(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_kept(filled: Path) -> None:
    report = MoECacheService.describe()
    assert (report.folder, report.bytes, report.cleared) == (str(filled), sum(OURS.values()), False)
    assert {part.folder: (part.files, part.bytes) for part in report.parts} == {
        "ranges": (2, 4106),
        "files": (1, 100),
        "refs": (1, 200),
        "sweeps": (2, 1300),
    }
    assert left(filled) == {*OURS, *OTHERS}


def test_clearing_deletes_our_files_only(filled: Path) -> None:
    report = MoECacheService.clear()
    assert (report.bytes, report.cleared) == (sum(OURS.values()), True)
    assert left(filled) == set(OTHERS)
    assert not (filled / "files").exists()
    assert MoECacheService.describe().bytes == 0


def test_a_link_is_deleted_and_not_followed(cache: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    (cache / "files").mkdir(parents=True)
    (cache / "files" / f"{KEY}.json").symlink_to(kept)
    MoECacheService.clear()
    assert kept.read_text() == "mine"
    assert not (cache / "files").exists()


def test_no_cache_is_an_empty_one(cache: Path) -> None:
    assert (MoECacheService.clear().bytes, cache.exists()) == (0, False)


def test_what_cannot_be_deleted_is_said(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ModelUnreadable, match=r"can't delete .*: Permission denied"):
        MoECacheService.clear()


def test_the_command(filled: Path, capsys: Capture) -> None:
    assert run(["cache"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Holds 5.7 kB" in shown
    assert "1.3 kB in 2 files: unfinished work" in shown
    assert run(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cleared"]
    assert left(filled) == set(OTHERS)
