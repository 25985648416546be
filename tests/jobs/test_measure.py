"""Figures of a layer against their literal definitions, on experts whose structure is planted."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import Experts, InvalidRequest, MoETypeAnalysis, MoETypeService, memory_limit
from chuk_lazarus.introspection.moe.jobs.measure import mean_expert, measure_layer
from chuk_lazarus.introspection.moe.jobs.model import OpenedModel, evenly_spaced
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.progress import no_progress
from sampling import keep

Weights = dict[str, NDArray[np.float32]]
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def write(folder: Path, experts: Weights) -> str:
    """A float32 Mixtral layer whose matrices, by role, are [experts, out, in]."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{e}.{NAMES[role]}.weight": np.ascontiguousarray(matrix)
        for role, stack in experts.items()
        for e, matrix in enumerate(stack)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 1}))
    return str(folder)


def random_experts(count: int = 6, intermediate: int = 24, hidden: int = 40, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    return {role: rng.standard_normal((count, *shape)).astype(np.float32) for role, shape in shapes.items()}


def analyze(tmp_path: Path, experts: Weights, count: int | None = None) -> MoETypeAnalysis:
    return MoETypeService.analyze(write(tmp_path / "model", experts), experts=count)


def literal_figures(stack: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Mean cosine, its std, mean 95 % rank and delta energy, by their definitions in float64."""
    flat = stack.reshape(len(stack), -1).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(stack), 1)]
    deltas = stack.astype(np.float64) - stack.astype(np.float64).mean(axis=0)
    ranks = []
    for delta in deltas:
        energies = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
        ranks.append(int(np.argmax(energies >= 0.95 * energies[-1])) + 1)
    shares = (deltas**2).sum(axis=(1, 2)) / (stack.astype(np.float64) ** 2).sum(axis=(1, 2))
    return cosines.mean(), cosines.std(), float(np.mean(ranks)), float(shares.mean())


@pytest.mark.parametrize(("intermediate", "hidden"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("window", [50, 32_000_000])
@pytest.mark.parametrize("kept", [0, 140_000_000])
def test_figures_equal_their_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intermediate: int, hidden: int, window: int, kept: int
) -> None:
    """Whatever the size of the windows, and whether or not matrices are kept between the passes."""
    monkeypatch.setattr(Resources, "window_weights", window)
    monkeypatch.setattr(Resources, "kept_weights", kept)
    experts = random_experts(6, intermediate, hidden)
    experts["gate"] += 2 * random_experts(1, intermediate, hidden, seed=9)["gate"]
    layer = analyze(tmp_path, experts).layers[0]
    for role, stack in experts.items():
        cosine, spread, rank, share = literal_figures(stack)
        projection = layer.projections[role]
        assert getattr(layer.cosine, role) == pytest.approx(cosine, abs=1e-6)
        assert projection.rank["0.95"] == rank
        assert projection.delta_energy == pytest.approx(share, rel=1e-5)
        assert projection.shape == stack.shape[1:]
        if role == "down":
            assert (layer.cosine.mean, layer.cosine.std) == pytest.approx((cosine, spread), abs=1e-6)


@pytest.mark.parametrize("count", keep([2, 3, 6, 7, 60, 301], 2, 3, 6, 7, 60))
def test_identical_experts_have_rank_zero(tmp_path: Path, count: int) -> None:
    """In float32 the mean of identical experts may be off by some bits, and those have full rank."""
    one = random_experts(1)
    report = analyze(tmp_path, {role: np.repeat(stack, count, axis=0) for role, stack in one.items()})
    for projection in report.layers[0].projections.values():
        assert projection.rank == {"0.90": 0.0, "0.95": 0.0, "0.99": 0.0}
        assert projection.delta_energy == 0.0
    assert report.cosine == pytest.approx(1.0)
    assert report.type == ("UPCYCLED" if count > 2 else "UNDETERMINED")  # two may have been averaged
    assert (report.documented_rule.type, report.documented_rule.confidence) == ("UPCYCLED", 1.0)
    assert report.overlay_ratio == pytest.approx(count)
    assert report.compressible


def test_the_mean_is_as_good_as_one_in_float64() -> None:
    """Up to the end of float32, where sums of several experts are beyond it."""
    values = np.random.default_rng(0).random((100, 30, 40), np.float32)
    for scale in (1.0, 3e38, 1e-40):
        scaled = (values * scale).astype(np.float32)
        np.testing.assert_allclose(mean_expert(scaled), scaled.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_a_planted_low_rank_delta_is_upcycled(tmp_path: Path) -> None:
    base, rng = random_experts(1, 64, 96), np.random.default_rng(1)
    experts = {}
    for role, stack in base.items():
        _, rows, columns = stack.shape
        deltas = rng.standard_normal((4, rows, 2)) @ rng.standard_normal((4, 2, columns))
        # deltas that sum to zero, so that the base is the mean
        experts[role] = (stack + 0.1 * np.concatenate([deltas, -deltas])).astype(np.float32)
    report = analyze(tmp_path, experts)
    assert report.layers[0].projections["gate"].rank["0.99"] == 2
    assert report.cosine > 0.9
    assert (report.type, report.compressible) == ("UPCYCLED", True)
    assert (report.documented_rule.type, report.documented_rule.confidence) == ("UPCYCLED", 1.0)


def test_independent_experts_are_native(tmp_path: Path) -> None:
    report = analyze(tmp_path, random_experts(8, 64, 96))
    assert (report.type, report.compressible) == ("NATIVE", False)
    assert report.cosine == pytest.approx(0.0, abs=0.02)
    assert report.layers[0].projections["gate"].noise_rank_ratio == pytest.approx(1.0, abs=0.03)
    assert report.layers[0].projections["gate"].delta_energy == pytest.approx(7 / 8, abs=0.01)


def test_the_order_and_the_scale_of_experts_change_nothing(tmp_path: Path) -> None:
    experts = random_experts(6)
    for role in experts:
        experts[role] += 3 * random_experts(1, seed=5)[role]
    plain = analyze(tmp_path, experts)
    turned = analyze(tmp_path, {role: 4 * stack[::-1] for role, stack in experts.items()})
    ignored = {"model": True, "cost": True}
    left, right = plain.model_dump(exclude=ignored), turned.model_dump(exclude=ignored)
    assert left["layers"][0]["projections"]["up"]["rank"] == right["layers"][0]["projections"]["up"]["rank"]
    assert left["cosine"] == pytest.approx(right["cosine"], abs=1e-6)
    assert left["confidence"] == pytest.approx(right["confidence"], abs=1e-6)


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(8, None, range(8)), (4, 8, range(4)), (64, 8, (0, 9, 18, 27, 36, 45, 54, 63)), (5, 1, (0,)), (10, 3, (0, 4, 9))],
)
def test_chosen_experts_are_evenly_spaced(count: int, wanted: int | None, chosen: tuple[int, ...]) -> None:
    assert evenly_spaced(count, wanted) == tuple(chosen)


def test_only_the_chosen_experts_have_spectra_and_all_have_a_say_in_the_base(tmp_path: Path) -> None:
    experts = random_experts(9)
    layer = Experts.open(write(tmp_path / "model", experts)).layer(0)
    few = measure_layer(layer, evenly_spaced(9, 3), Resources.current(), no_progress)["gate"]
    full = measure_layer(layer, evenly_spaced(9, None), Resources.current(), no_progress)["gate"]
    assert few.chosen == (0, 4, 8)
    for place, expert in enumerate(few.chosen):
        np.testing.assert_array_equal(few.spectra[place], full.spectra[expert])
    np.testing.assert_array_equal(few.gram, full.gram)


def test_the_same_input_gives_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resources, "window_weights", 1000)
    path = write(tmp_path / "model", random_experts(12))
    reports = [MoETypeService.analyze(path).model_dump(exclude={"cost": {"seconds"}}) for _ in range(4)]
    assert all(report == reports[0] for report in reports)


def test_every_blas_keeps_to_one_thread_in_the_first_layer_too() -> None:
    """In a fresh process: a library that is loaded later than the limit is set escapes it."""
    code = """
import chuk_lazarus.introspection.moe.numerics.spectra as spectra
from chuk_lazarus.introspection.moe import MoETypeService
from threadpoolctl import threadpool_info
plain, seen = spectra.symmetric_eigenvalues, set()
def watched(matrix):
    seen.update((pool["filepath"], pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas")
    return plain(matrix)
spectra.symmetric_eigenvalues = watched
MoETypeService.analyze("demo:native")
print(sorted({threads for _, threads in seen}), len(seen) > 0)
"""
    several = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | several
    )
    assert done.stdout == "[1] True\n"


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """The windows hold fewer rows of more experts."""
    many = random_experts(64, 64, 512)
    layer = Experts.open(write(tmp_path / "model", many)).layer(0)
    for tensor in layer.tensors:
        for budget in (100_000, 1_000_000):
            windows = tensor.windows(budget)
            assert all((high - low) * tensor.columns * 64 <= budget for low, high in windows)


@pytest.mark.parametrize(("size", "share"), [(None, 1.0), ("4GB", 2.0), (1_000_000_000, 0.5)])
def test_the_memory_limit_holds_within_its_context(size: int | str | None, share: float) -> None:
    def figures() -> list[int]:
        resources = Resources.current()
        return [resources.window_weights, resources.kept_weights, resources.matrix_memory]

    before = figures()
    with memory_limit(size):
        assert figures() == [share * figure for figure in before]
    assert figures() == before


def test_a_job_keeps_the_limits_of_where_it_was_started() -> None:
    """Threads do not inherit a limit, so a job hands its own down to them."""
    with memory_limit("1GB"):
        resources = Resources.current()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: resources.memory).result() == 1_000_000_000
    with memory_limit("1GB"), ThreadPoolExecutor(1) as pool:
        opened = OpenedModel("demo:native", None, None, purpose="measure")
        assert pool.submit(lambda: opened.resources.memory).result() == 1_000_000_000


@pytest.mark.parametrize("size", ["1kB", 0, "much", "-1GB"])
def test_too_little_memory_is_refused(size: int | str) -> None:
    with pytest.raises(InvalidRequest, match="memory"), memory_limit(size):
        pass


@pytest.mark.parametrize("size", ["256MB", "8GB"])
def test_results_do_not_depend_on_the_memory(size: str) -> None:
    def result() -> dict[str, Any]:
        return MoETypeService.analyze("demo:upcycled", layers="all").model_dump(exclude={"cost"})

    plain = result()
    with memory_limit(size):
        assert result() == plain
