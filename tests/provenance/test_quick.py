"""Verdicts from a part of the experts: what is read, what it says, and what it costs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import MoELayoutService, MoEQuickAnalysis, MoETypeService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, MoEError
from chuk_lazarus.introspection.moe.jobs.parts import read_part, roles_to_read
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.numerics.neurons import as_neurons
from chuk_lazarus.introspection.moe.provenance.classifier import classify_quickly
from chuk_lazarus.introspection.moe.provenance.part import spaced_pairs
from chuk_lazarus.introspection.moe.views.words import explain_quick
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.local import LocalFile
from hub_server import HubServer
from places import FIXTURES

FOLDERS = sorted(path.parent for path in FIXTURES.glob("**/config.json") if "zoo" not in path.parts)
HIDDEN, NEURONS, EXPERTS, LAYERS = 256, 128, 20, 4
EXPERT_BYTES = 3 * HIDDEN * NEURONS * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bfloat16 experts in Mixtral's names, whose layers are shuffled copies."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    tensors = {}
    for layer in range(LAYERS):
        base = {name: rng.standard_normal((NEURONS, HIDDEN)) for name in ("w1", "w3", "w2")}
        for expert in range(EXPERTS):
            order = rng.permutation(NEURONS)
            for name, matrix in base.items():
                values = matrix[order].T if name == "w2" else matrix[order]
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mixtral", "num_hidden_layers": 4}')
    return str(folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(FIXTURES)))
def test_a_part_is_a_part_of_the_matrices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout and format, read from nothing but the ranges that are named."""
    try:
        experts = Experts.open(str(folder))
        layer = experts.layer(experts.layers[0])
        whole = layer.matrices(layer.count - 1)
    except MoEError:
        return  # what can't be read is tested elsewhere
    roles, tensors = roles_to_read(layer)
    count = max(1, layer.sizes["I"] // 3)
    named = [one for t in tensors for w in t.neurons(count) for one in t.byte_ranges(layer.count - 1, *w)]
    asked: list[tuple[str, tuple[int, int]]] = []
    read = LocalFile.read

    def watch(self: LocalFile, start: int, stop: int) -> bytes:
        asked.append((self.path.name, (start, stop)))
        return read(self, start, stop)

    monkeypatch.setattr(LocalFile, "read", watch)
    part = read_part(tensors, roles, layer.count - 1, count)
    for file, (start, stop) in asked:
        assert any(file == name and low <= start <= stop <= high for name, (low, high) in named)
    for role in roles:
        neurons, found = as_neurons(role, whole[role]), part[role]
        expected = neurons[:count] if len(found) == count else neurons
        np.testing.assert_array_equal(found, expected[:, : found.shape[1]])
        assert found.size >= count * neurons.shape[1] // 2


@pytest.mark.parametrize("budget", [800_000, 1_500_000, "3MB", 10**9])
def test_no_more_is_read_than_the_budget_allows(large: str, budget: int | str) -> None:
    report = MoETypeService.quick(large, budget=budget)
    assert report.weight_bytes <= report.budget
    assert report.share == report.weight_bytes / (LAYERS * EXPERTS * EXPERT_BYTES)
    assert len(report.layers) == 3
    assert all(len(layer.experts) == 16 for layer in report.layers)
    assert report.type == "UPCYCLED"
    assert report.kind == "shuffled copies or slices"


@pytest.mark.parametrize("layers", [None, "1", "0,3"])
def test_reach_is_what_is_found_of_shuffled_copies(large: str, layers: str | None) -> None:
    report = MoETypeService.quick(large, layers=layers, budget=900_000)
    assert 0.1 < report.reach < 0.5
    for layer in report.layers:
        assert layer.reach == layer.part
        assert report.weight_bytes / len(report.layers) == 16 * 2 * HIDDEN * 2 * round(layer.part * NEURONS)
    looked = sum(layer.neurons for layer in report.layers)
    for figure in ("reach", "close", "shared", "strong"):
        mean = sum(getattr(layer, figure) * layer.neurons for layer in report.layers) / looked
        assert getattr(report, figure) == pytest.approx(mean)
    assert report.shared == pytest.approx(report.reach, abs=0.06)


def test_a_budget_that_is_too_small(large: str) -> None:
    with pytest.raises(InvalidRequest, match="budget is too small") as error:
        MoETypeService.quick(large, budget="10KB")
    assert MoETypeService.quick(large, budget=error.value.hint.split()[1] + "MB").type == "UPCYCLED"
    with pytest.raises(InvalidRequest, match="not a size"):
        MoETypeService.quick(large, budget="much")


def test_over_the_network_only_the_parts_come(hub: HubServer, cache: Path, large: str) -> None:
    hub.add("org/large", Path(large))
    local = MoETypeService.quick(large, budget=900_000)
    hub.clear_requests()
    remote = MoETypeService.quick("org/large", budget=900_000)
    drop = {"model", "revision", "cost"}
    assert remote.model_dump(exclude=drop) == local.model_dump(exclude=drop)
    ranged = [request for request in hub.requests if request.range and request.server == "cdn"]
    assert sum(request.bytes_sent for request in ranged) <= 100_000 + 2 * remote.weight_bytes  # header; small gaps
    hub.clear_requests()
    MoETypeService.quick("org/large", budget=900_000)
    assert not [request for request in hub.requests if request.range]


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("copy-hot-1300", "UPCYCLED"),
        ("shuffle-noise-1300", "UPCYCLED"),
        ("drop50-apart-1300", "UPCYCLED"),
        ("slice-shuffle-drop50-400", "UPCYCLED"),
        ("native-2300", "NATIVE"),
    ],
)
def test_trained_models_of_known_history(name: str, origin: str) -> None:
    assert MoETypeService.quick(str(FIXTURES / "zoo" / name)).type == origin


@dataclass(frozen=True)
class Part:
    shared: float = 0.0
    strong: float = 0.0
    reach: float = 1.0
    neurons: int = 1024
    twins: tuple[tuple[int, ...], ...] = ()
    roles: int = 2
    breadth: float = 1.0
    base_breadth: float = 1.0
    delta_energy: float = 0.5
    experts: tuple[int, ...] = tuple(range(16))
    inputs: int = 64
    chance: float = 0.01


PAIRS = tuple((expert, expert + 1) for expert in range(0, 16, 2))


@pytest.mark.parametrize(
    ("part", "origin"),
    [
        (Part(0.9, 0.9), "UPCYCLED"),
        (Part(0.9), "UPCYCLED"),
        (Part(0.15), "UPCYCLED"),
        (Part(0.1499), "UNDETERMINED"),
        (Part(0.15, reach=0.5), "UPCYCLED"),
        (Part(0.15, reach=0.499), "UNDETERMINED"),
        (Part(0.9, roles=1), "UNDETERMINED"),  # one role agrees with itself
        (Part(0.01, 0.01, reach=0.1), "UPCYCLED"),
        (Part(0.01, 0.0099, reach=0.05), "UNDETERMINED"),
        (Part(0.01, 0.01, neurons=399), "UNDETERMINED"),  # three neurons
        (Part(0.01, 0.01, neurons=400), "UPCYCLED"),  # four
        (Part(0.0999), "NATIVE"),
        (Part(0.1), "UNDETERMINED"),
        (Part(0.0499, reach=0.5), "NATIVE"),
        (Part(0.05, reach=0.5), "UNDETERMINED"),
        (Part(0.0, 0.005), "UNDETERMINED"),
        (Part(reach=0.078), "UNDETERMINED"),  # copies might show 15.97 neurons
        (Part(reach=0.079), "NATIVE"),
        (Part(neurons=79), "UNDETERMINED"),
        (Part(neurons=0), "UNDETERMINED"),
        (Part(twins=(tuple(range(16)),), neurons=0), "UPCYCLED"),  # all experts are identical
        (Part(twins=PAIRS), "UNDETERMINED"),
        (Part(twins=PAIRS[:1]), "NATIVE"),
        (Part(0.9, 0.9, breadth=0.49), "UNDETERMINED"),  # one base and deltas of few directions
        (Part(0.9, 0.9, breadth=0.49, delta_energy=0.04), "UPCYCLED"),
        (Part(0.9, breadth=0.79), "UNDETERMINED"),
        (Part(0.9, 0.9, inputs=63), "UNDETERMINED"),
        (Part(chance=1.0), "UNDETERMINED"),  # zeros, or all orthogonal
    ],
)
def test_the_quick_rule(part: Part, origin: str) -> None:
    assert classify_quickly([part]).origin == origin


def test_layers_count_by_their_neurons_in_the_quick_rule() -> None:
    many = Part(0.0, neurons=3000)
    assert classify_quickly([many, Part(0.9, 0.9, neurons=10)]).origin == "NATIVE"
    assert classify_quickly([many, Part(0.9, 0.9, neurons=3000)]).origin == "UPCYCLED"
    assert classify_quickly([many, Part(twins=(tuple(range(16)),), neurons=0)]).origin == "NATIVE"


@pytest.mark.parametrize(("count", "wanted"), [(8, 16), (16, 16), (17, 16), (24, 16), (64, 16), (256, 16), (20, 8)])
def test_experts_are_chosen_as_neighbours(count: int, wanted: int) -> None:
    chosen = spaced_pairs(count, wanted)
    assert len(set(chosen)) == len(chosen) == min(count, wanted)
    assert (min(chosen), max(chosen) < count) == (0, True)
    if count >= 2 * wanted:
        assert max(chosen) > count * (1 - 3 / wanted)
        assert all(second == first + 1 for first, second in zip(chosen[::2], chosen[1::2], strict=True))


def test_command_line(capsys: pytest.CaptureFixture[str], large: str) -> None:
    command = ["introspect", "moe-expert", "moe-type-analyze", "-m", large, "--quick"]
    assert run([*command, "--budget", "1MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moe-type-quick/1"
    assert MoEQuickAnalysis.model_validate(found).model_dump(mode="json") == found
    assert run([*command, "--layers", "0,1"]) == 0
    table = capsys.readouterr().out
    assert "UPCYCLED" in table
    assert "without --quick" in table
    for wrong in (["--parent", "demo:parent"], ["--thorough"], ["--layer", "0"], ["--budget", "x"]):
        assert run([*command, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "1MB"],
        ["--quick", "--experts", "3"],
        ["--quick", "--variance", "0.5"],
        ["--quick", "--layer", "0"],
        ["--quick", "--dask", "tcp://head:8786"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run(["introspect", "moe-expert", "moe-type-analyze", "-m", "demo:native", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_the_layout_tells_what_each_mode_reads(large: str) -> None:
    layout = MoELayoutService.describe(large)
    assert layout.quick_bytes == MoETypeService.quick(large).weight_bytes == 3 * 16 * EXPERT_BYTES * 2 // 3
    assert layout.analysis_bytes - layout.further_bytes == EXPERTS * EXPERT_BYTES
    assert layout.stored_bytes == LAYERS * EXPERTS * EXPERT_BYTES


@pytest.mark.parametrize(
    ("experts", "budget", "chosen"),
    [(16, "900KB", 4), (16, "1200KB", 4), (16, "2MB", 8), (16, "4MB", 16), (6, "900KB", 3)],
)
def test_of_stored_columns_enough_inputs_are_read(tmp_path: Path, experts: int, budget: str, chosen: int) -> None:
    """All neurons, by some of their inputs: by few of them unrelated neurons would be close, too."""
    rng, tensors = np.random.default_rng(1), {}
    for layer in range(3):
        for name, columns in (("gate_up_proj", 512), ("down_proj", 256)):
            stack = rng.standard_normal((experts, 256, columns)).astype(ml_dtypes.bfloat16)
            tensors[f"model.layers.{layer}.mlp.experts.{name}"] = stack
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 3}')
    found = MoETypeService.quick(str(tmp_path), budget=budget)
    assert found.type == "NATIVE"
    assert {len(layer.experts) for layer in found.layers} == {chosen}
    assert found.weight_bytes <= found.budget
    for layer in found.layers:
        assert layer.inputs >= 64
        assert layer.part == layer.inputs / 256
        assert layer.reach == 1.0
    narrow = MoETypeService.quick(str(tmp_path), budget="500KB")
    assert narrow.type == "UNDETERMINED"
    assert narrow.layers[0].inputs < 64
    assert any("inputs" in note for note in narrow.notes)


def test_a_budget_for_all_layers_is_named(large: str) -> None:
    """What the hint says is enough is enough."""
    with pytest.raises(InvalidRequest) as error:
        MoETypeService.quick(large, layers="all", budget=1000)
    least = re.search(r"allow (\d+) MB", error.value.hint)
    assert least
    assert len(MoETypeService.quick(large, layers="all", budget=f"{least[1]}MB").layers) == LAYERS


def test_the_budget_for_a_native_verdict_is_named(tmp_path: Path) -> None:
    rng, tensors = np.random.default_rng(1), {}
    for expert in range(8):
        for name in ("w1", "w3", "w2"):
            shape = (256, 4096) if name == "w2" else (4096, 256)
            key = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            tensors[key] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_hidden_layers": 1}')
    found = MoETypeService.quick(str(tmp_path), budget="500KB")
    assert found.type == "UNDETERMINED"
    enough = re.search(r"--budget (\S+) would be enough", explain_quick(found))
    assert enough
    assert MoETypeService.quick(str(tmp_path), budget=enough[1]).type == "NATIVE"


def test_memory_bounds_what_is_read(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget: so many float32 numbers of 16 experts' gates and ups, twice."""
    monkeypatch.setattr(Resources, "matrix_memory", 2 * 4 * 16 * 2 * HIDDEN * 30)
    assert MoETypeService.quick(large, budget="1GB").layers[0].part == 30 / NEURONS


def test_ungated_experts_are_told_by_up_and_down(tmp_path: Path) -> None:
    def make(copies: bool) -> str:
        rng = np.random.default_rng(1)
        tensors: dict[str, NDArray[np.float32]] = {}
        base = {"up": rng.standard_normal((64, 80)), "down": rng.standard_normal((80, 64))}
        for expert in range(8):
            order = rng.permutation(64)
            for role, matrix in base.items():
                own = matrix if copies else rng.standard_normal(matrix.shape)
                cut = own[:, order] if role == "down" else own[order]
                tensors[f"backbone.layers.0.mixer.experts.{expert}.{role}_proj.weight"] = cut.astype(np.float32)
        folder = tmp_path / str(copies)
        folder.mkdir()
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "nemotron_h", "n_routed_experts": 8}')
        return str(folder)

    assert MoETypeService.quick(make(True)).type == "UPCYCLED"
    assert MoETypeService.quick(make(False)).type == "NATIVE"
