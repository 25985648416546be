"""What keeps a figure from being misread: noise, samples, groups, where rates come from, and the older rule."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoETypeAnalysis, MoETypeService
from made_layers import Matrices, copies, native, shuffle, write

Capture = pytest.CaptureFixture[str]
NOISE = "look like random numbers"
ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]


def shown(report: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report)
    return " ".join(capture.get().split())


def analyse(folder: Path, found: Matrices) -> MoETypeAnalysis:
    return MoETypeService.analyze(write(folder / "model", found))


MADE: dict[str, Callable[[np.random.Generator], Matrices]] = {
    "untrained": native,
    "untrained, uniform": lambda rng: {
        role: rng.uniform(-1, 1, (8, 96, 64)).astype(np.float32) for role in native(rng)
    },
    "copies": copies,
    "shuffled copies": lambda rng: shuffle(rng, copies(rng)),
}


@pytest.mark.parametrize("name", MADE)
def test_noise_is_called_noise(name: str, tmp_path: Path) -> None:
    report = analyse(tmp_path, MADE[name](np.random.default_rng(1)))
    is_noise = name.startswith("untrained")
    assert any(NOISE in note for note in report.notes) == is_noise
    assert (NOISE in str(report)) == is_noise
    quick = MoETypeService.quick(report.model)
    assert any(NOISE in note for note in quick.notes) == is_noise


def test_noise_is_no_caveat_of_copies(tmp_path: Path) -> None:
    """As where a layer of noise stands beside one of copies, which decides."""
    report = analyse(tmp_path, native(np.random.default_rng(1)))
    assert NOISE in str(report)
    assert NOISE not in str(report.model_copy(update={"type": "UPCYCLED", "kind": "copies"}))


@pytest.mark.parametrize("model", ["demo:native", "demo:upcycled", "demo:permuted"])
def test_what_was_trained_is_not(model: str) -> None:
    report = MoETypeService.analyze(model, layers="all")
    assert NOISE not in " ".join(report.notes) + str(report)
    assert NOISE not in " ".join(MoETypeService.quick(model).notes)


@pytest.mark.parametrize(("experts", "said"), [(3, "spectra of 3 of 8"), (None, "spectra of all 8")])
def test_it_says_how_many_experts_were_looked_at(experts: int | None, said: str) -> None:
    text = shown(MoETypeService.analyze("demo:native", experts=experts))
    assert f"neurons from all 8 experts; {said} " in text


def in_groups(rng: np.random.Generator, groups: int) -> Matrices:
    """Experts of which those with numbers that are `groups` apart are copies."""
    bases = native(rng, groups)
    return {
        role: np.stack([base[i % groups] for i in range(24)])
        + 0.35 * rng.standard_normal((24, *base.shape[1:]), np.float32)
        for role, base in bases.items()
    }


def test_groups_are_named(tmp_path: Path, capsys: Capture) -> None:
    report = analyse(tmp_path, in_groups(np.random.default_rng(2), 12))
    assert len(report.layers[0].lineage.sharing.groups) == 12
    text = shown(report)
    assert "layer 0, 12 groups: experts 0, 12 | 1, 13 | 2, 14" in text
    assert "and 4 more groups" in text
    assert "11, 23" in shown(report.details())


@pytest.mark.parametrize("model", ["demo:native", "demo:upcycled"])
def test_one_group_or_none_needs_no_line(model: str) -> None:
    assert "Groups" not in shown(MoETypeService.analyze(model))


def test_the_older_rule_is_for_those_who_ask(capsys: Capture) -> None:
    assert run([*ANALYZE, "-m", "demo:permuted"]) == 0
    out = capsys.readouterr().out
    assert "NATIVE" not in out
    assert run([*ANALYZE, "-m", "demo:permuted", "-v"]) == 0
    out = capsys.readouterr().out
    assert "an older rule, by rank and cosine, says NATIVE" in " ".join(out.split())
    assert run(["introspect", "moe-expert", "moe-type-compare", "-m", "demo:permuted", "-c", "demo:upcycled"]) == 0
    assert "NATIVE" not in capsys.readouterr().out
    assert MoETypeService.analyze("demo:permuted").documented_rule.type == "NATIVE"  # as in the JSON


@pytest.mark.parametrize(
    "command",
    [
        [*ANALYZE, "-m", "demo:native"],
        [*ANALYZE, "-m", "demo:native", "--quick"],
        ["introspect", "moe-expert", "moe-type-compare", "-m", "demo:native", "-c", "demo:upcycled"],
        ["introspect", "moe-expert", "moe-type-survey", "demo:native"],
    ],
    ids=["analyze", "quick", "compare", "survey"],
)
def test_where_a_percentage_stands_it_says_on_what_it_was_measured(command: list[str], capsys: Capture) -> None:
    assert run(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+%", out)
    assert "measured on tiny models" in out
