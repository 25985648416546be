"""Overlays in codes: killed commands, full disks, and folders that somebody has broken, through the command line."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.overlays.checkpoint.writer import write_coded_overlay
from chuk_lazarus.introspection.moe.overlays.codes import RoleCodes, parse_code
from chuk_lazarus.introspection.moe.weights.experts import Experts
from processor_time import HANGS, of_children, of_process

PROGRAM = [sys.executable, "-c", "from chuk_lazarus.cli import main; main()", "introspect", "moe-expert"]
ROLES = ("gate", "up", "down")

Run = subprocess.CompletedProcess[str]


def lazarus(*words: str | Path, before: Callable[[], None] | None = None) -> Run:
    command = [*PROGRAM, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS, preexec_fn=before)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_copies(folder: Path, layers: int = 4, experts: int = 6, inner: int = 192, hidden: int = 256) -> Path:
    """A Mixtral of copies with some noise, whose neurons are shuffled."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        parent = {name: rng.standard_normal((inner, hidden)) for name in ("w1", "w3", "w2")}
        for expert in range(experts):
            order = rng.permutation(inner)
            for name, matrix in parent.items():
                copy = matrix[order] + 0.2 * rng.standard_normal(matrix.shape)
                copy = np.ascontiguousarray(copy.T if name == "w2" else copy)
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = copy.astype(ml_dtypes.bfloat16)
        tensors[f"{prefix}.gate.weight"] = rng.standard_normal((experts, hidden)).astype(ml_dtypes.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mixtral", "num_hidden_layers": layers, "num_local_experts": experts, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Killed


@pytest.mark.long
def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    words = ["moe-overlay-compress", "-m", str(write_copies(tmp_path / "model")), "--bits", "2.25", "-q", "-O"]
    before = of_children()
    assert lazarus(*words, tmp_path / "whole").returncode == 0
    seconds = of_children() - before
    expected, chance, killed, parts = content(tmp_path / "whole"), random.Random(4), 0, set()
    folder, unfinished = tmp_path / "killed", tmp_path / "killed.partial"
    config = json.loads(expected["config.json"])
    assert config["overlay_config"]["layers"]["0"]["codes"]["up"]["base"], "the neurons are aligned to a base"
    while killed < 12 or not folder.exists():
        if folder.exists():
            assert content(folder) == expected, "a folder with the final name is whole"
            shutil.rmtree(folder)
        process = subprocess.Popen([*PROGRAM, *words, str(folder)], stderr=subprocess.PIPE)
        most = chance.uniform(0.2, 1) * seconds if killed < 12 else inf
        while process.poll() is None and of_process(process.pid) < most:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=HANGS)
        assert process.returncode in (0, -signal.SIGKILL)
        killed += process.returncode != 0
        parts.add(len(list(unfinished.glob("*.safetensors"))))
    assert content(folder) == expected
    assert not unfinished.exists()
    assert max(parts) > 0, "some runs were stopped with part of the work done"


# Full disks


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_disk_that_fills_up_leaves_what_can_be_resumed(command: str, tmp_path: Path) -> None:
    words: list[str | Path] = ["moe-overlay-compress", "-m", write_copies(tmp_path / "model", 2), "--bits", "2.25"]
    assert run(["introspect", "moe-expert", *map(str, words), "-O", str(tmp_path / "whole")]) == 0
    if command == "export":
        (tmp_path / "whole").rename(tmp_path / "overlay")
        words = ["moe-overlay-export", tmp_path / "overlay"]
        assert run(["introspect", "moe-expert", *map(str, words), "-O", str(tmp_path / "whole")]) == 0
    least = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors")) - 1
    names = {path.name for path in tmp_path.iterdir()}
    stopped = lazarus(*words, "-O", tmp_path / "folder", before=partial(limit_files, least))
    assert stopped.returncode == 2
    (line,) = stopped.stderr.splitlines()
    assert "can't write" in line
    assert "run the same command again to continue" in line
    assert {path.name for path in tmp_path.iterdir()} == names | {"folder.partial"}
    assert not list((tmp_path / "folder.partial").glob("*.tmp"))
    assert lazarus(*words, "-O", tmp_path / "folder").returncode == 0
    assert content(tmp_path / "folder") == content(tmp_path / "whole")


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(InvalidRequest, match=r"needs [\d,]+ bytes, but only 10,000 are free"):
        MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", bits=2.25)
    assert not list(tmp_path.iterdir())


# Broken folders


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases in bits and in bfloat16, deltas in bits, and as factors with and without the rest."""
    codes = {
        "gate": RoleCodes(parse_code("4bit:128"), parse_code("1.6bit:128")),
        "up": RoleCodes(parse_code("bf16"), parse_code("rank4:4bit:64+1bit:128")),
        "down": RoleCodes(parse_code("5bit:64"), parse_code("rank4:8bit:64")),
    }
    folder = tmp_path_factory.mktemp("coded") / "overlay"
    write_coded_overlay(
        Experts.open("demo:upcycled"),
        dict.fromkeys((0, 1), codes),
        folder,
        resources=Resources.current(),
        progress=lambda what, done, total: None,
    )
    return folder


Tensors = dict[str, NDArray[Any]]


def with_tensor(part: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Tensors, Any], None]:
    def damage(tensors: Tensors, facts: Any) -> None:
        name = f"model.layers.1.overlay.{part}"
        tensors[name] = change(tensors[name]).copy()

    return damage


def without_tensor(part: str) -> Callable[[Tensors, Any], None]:
    return lambda tensors, facts: tensors.__delitem__(f"model.layers.1.overlay.{part}")


def filled(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda array: np.full_like(array, value)


def with_codes(role: str, **codes: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, facts: facts["layers"]["1"]["codes"][role].update(codes)


def with_sizes(**sizes: Any) -> Callable[[Tensors, Any], None]:
    return lambda tensors, facts: facts["layers"]["1"].update(sizes)


def out_of_nothing(tensors: Tensors, facts: Any) -> None:
    """A layer of vast matrices without base and of little rank, whose parts take no room."""
    side = 1 << 17
    facts["layers"]["1"] |= {"experts": 1, "hidden": side, "intermediate": side}
    facts["layers"]["1"]["codes"] = {role: {"base": None, "delta": "rank0:8bit:128"} for role in ROLES}
    for name in [name for name in tensors if ".1.overlay." in name]:
        del tensors[name]
    for role in ROLES:
        for factor in ("left", "right"):
            prefix = f"model.layers.1.overlay.{role}.delta.{factor}"
            tensors[f"{prefix}.levels"] = np.zeros((1, 0, side), np.uint8)
            tensors[f"{prefix}.scales"] = np.zeros((1, 0, side // 128), np.uint8)
            tensors[f"{prefix}.unit"] = np.zeros(1, np.float32)


UNREADABLE, UNKNOWN = 3, 4
BROKEN: dict[str, tuple[Callable[[Tensors, Any], None], int, str]] = {
    "an infinite unit of a delta": (with_tensor("gate.delta.unit", filled(np.inf)), UNREADABLE, "NaN, infinity"),
    "a unit that is no number": (with_tensor("down.delta.left.unit", filled(np.nan)), UNREADABLE, "NaN, infinity"),
    "an infinite unit of a base": (with_tensor("gate.base.unit", filled(np.inf)), UNREADABLE, "NaN, infinity"),
    "a unit near the end of float32": (with_tensor("down.base.unit", filled(3e38)), UNREADABLE, "NaN, infinity"),
    "factors beyond float32": (with_tensor("down.delta.right.unit", filled(3e38)), UNREADABLE, "NaN, infinity"),
    "the unit of a rest": (with_tensor("up.delta.rest.unit", filled(-np.inf)), UNREADABLE, "NaN, infinity"),
    "a base that is not finite": (with_tensor("up.base.values", filled(np.nan)), UNREADABLE, "NaN, infinity"),
    "levels cut off": (with_tensor("gate.delta.levels", lambda a: a[:, :, :-1]), UNREADABLE, "is U8"),
    "an expert less": (with_tensor("gate.delta.scales", lambda a: a[:-1]), UNREADABLE, "is U8"),
    "scales of another type": (with_tensor("gate.base.scales", lambda a: a.astype(np.int8)), UNREADABLE, "is I8"),
    "a unit with an axis": (with_tensor("gate.base.unit", lambda a: a.reshape(1)), UNREADABLE, "is F32"),
    "no base": (without_tensor("up.base.values"), UNREADABLE, "is missing"),
    "no levels": (without_tensor("down.delta.left.levels"), UNREADABLE, "is missing"),
    "version 3": (lambda tensors, facts: facts.update(version=3), UNKNOWN, "has version 3"),
    "a version in words": (lambda tensors, facts: facts.update(version="2"), UNKNOWN, "version 2"),
    "a rank above that of the factors": (with_codes("down", delta="rank5:8bit:64"), UNREADABLE, "left.levels is"),
    "a rank beyond all sides": (with_codes("down", delta="rank999999:8bit:64"), UNREADABLE, "left.levels is"),
    "a rank of many digits": (
        with_codes("down", delta=f"rank{'9' * 10**6}:8bit:64"),
        UNREADABLE,
        "sizes or codes of layer",
    ),
    "a code of many letters": (with_codes("gate", delta="4bit:128" * 10**6), UNREADABLE, "sizes or codes of layer"),
    "many codes in one": (
        with_codes("gate", delta="+".join(["4bit:128"] * 10**5)),
        UNREADABLE,
        "sizes or codes of layer",
    ),
    "a code that is a list": (with_codes("gate", base=["4bit:128"]), UNREADABLE, "sizes or codes of layer"),
    "a base of factors": (with_codes("gate", base="rank4:4bit:64"), UNREADABLE, "sizes or codes of layer"),
    "vast sizes": (with_sizes(hidden=2**31 - 1), UNKNOWN, "experts of 128 x 2147483647"),
    "sizes beyond any": (with_sizes(intermediate=2**63), UNREADABLE, "sizes or codes of layer"),
    "many experts": (with_sizes(experts=2**30), UNKNOWN, "1073741824 experts"),
    "matrices out of nothing": (out_of_nothing, UNREADABLE, "sizes or codes of layer"),
}


@pytest.mark.parametrize(("damage", "code", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_one_line(
    damage: Callable[[Tensors, Any], None],
    code: int,
    text: str,
    overlay: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(overlay, tmp_path / "overlay")
    shards = sorted((tmp_path / "overlay").glob("*.safetensors"))
    tensors = {name: array for shard in shards for name, array in load_file(shard).items()}
    config = json.loads((tmp_path / "overlay/config.json").read_text())
    damage(tensors, config["overlay_config"])
    for shard in shards:
        shard.unlink()
    (tmp_path / "overlay/model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "overlay/model.safetensors")
    (tmp_path / "overlay/config.json").write_text(json.dumps(config))
    words = ["moe-overlay-export", str(tmp_path / "overlay"), "-O", str(tmp_path / "export"), "--json"]
    assert run(["introspect", "moe-expert", *words]) == code
    printed = capfd.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert text in json.loads(line)["error"]["message"]
    assert len(line) < 2000
    assert not (tmp_path / "export").exists()


def test_the_folder_itself_is_sound(overlay: Path, tmp_path: Path) -> None:
    MoECompressionService.export(overlay, tmp_path / "export")


def test_factors_without_a_base_are_not_written(tmp_path: Path) -> None:
    codes = dict.fromkeys(ROLES, RoleCodes(None, parse_code("rank2:4bit:64")))
    with pytest.raises(InvalidRequest, match="factors but no base"):
        write_coded_overlay(
            Experts.open("demo:upcycled"),
            {0: codes},
            tmp_path / "overlay",
            resources=Resources.current(),
            progress=lambda what, done, total: None,
        )
