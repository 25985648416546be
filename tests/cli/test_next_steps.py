"""What a screen says may come next: commands to paste, which are right."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from chuk_lazarus.cli.app import run
from chuk_lazarus.cli.next_steps import next_steps
from chuk_lazarus.introspection.moe import Experts, MoECompressionService
from conversions import Layer, write_gguf
from places import DEMO

Capture = pytest.CaptureFixture[str]


def steps(capsys: Capture, *words: str) -> dict[str, list[str]]:
    """The commands that follow the result of a command, by what they do."""
    capsys.readouterr()
    assert run(list(words)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Next, ")]
    pairs = (line.removeprefix("Next, ").split(": ", 1) for line in lines)
    return {what: shlex.split(command) for what, command in pairs}


def test_from_a_model_to_one_that_is_smaller(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is run as it is printed."""
    monkeypatch.chdir(tmp_path)
    found = steps(capsys, "layout", "demo:upcycled")
    for expected in ("see how it was trained", "see what can be saved", "write it"):
        assert list(found) == [expected]
        assert found[expected][0] == "lazarus"
        found = steps(capsys, *found[expected][1:])
    assert list(found) == ["see what it costs, on any text"]  # the demo has no tokenizer: nothing runs it on a prompt
    assert steps(capsys, *found["see what it costs, on any text"][1:]) == {}


def test_a_rule_is_handed_on(capsys: Capture) -> None:
    for command in ("estimate", "compute"):
        found = steps(capsys, command, "demo:upcycled", "--bits", "2.5", "--trellis")
        assert found["write it"] == [
            "lazarus",
            "shrink",
            "demo:upcycled",
            "--bits",
            "2.5",
            "--trellis",
            "-O",
            "./smaller",
        ]


def test_what_has_a_tokenizer_can_be_run(capsys: Capture, tmp_path: Path) -> None:
    """What is for mlx-lm needs no code of ours."""
    for name, trust in (("native", []), ("upcycled", ["--trust-remote-code"])):
        model, target = tmp_path / name, str(tmp_path / f"small {name}")
        shutil.copytree(DEMO / name, model)
        (model / "tokenizer.json").write_text("{}")
        found = steps(capsys, "shrink", str(model), "--bits", "4", "-O", target)
        assert found["run it"] == ["mlx_lm.generate", "--model", target, *trust, "--prompt", "The history of "]


def test_nothing_is_proposed_that_can_not_be_written(capsys: Capture, tmp_path: Path) -> None:
    """Neither an overlay of a GGUF file, nor a smaller copy where the advice knows none."""
    layer = Experts.open("demo:upcycled").layer(0)
    found = [layer.matrices(expert) for expert in range(layer.count)]
    matrices = {role: np.stack([expert[role] for expert in found]) for role in found[0]}
    made = Layer(matrices, np.ones((layer.count, matrices["gate"].shape[2]), np.float32))
    assert steps(capsys, "estimate", str(write_gguf(tmp_path / "a.gguf", [made]))) == {}
    assert steps(capsys, "compute", str(tmp_path / "a.gguf"), "--bits", "2.5") == {}
    report = MoECompressionService.estimate("demo:upcycled", samples=1)
    assert next_steps(report, "estimate", {})
    for advice in ("nothing: everything is worse", "smallest error: codes on a base at 2 bits per weight"):
        assert next_steps(report.model_copy(update={"advice": advice}), "estimate", {}) == []


@pytest.mark.parametrize("command", ["layout", "analyze"])
@pytest.mark.parametrize("option", ["-q", "--json"])
def test_the_quiet_and_programs_get_none(capsys: Capture, command: str, option: str) -> None:
    assert steps(capsys, command, "demo:native", option) == {}
