"""Jobs over several layers: interrupted anywhere, they go on, and give what an undisturbed run gives."""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import MoECompressionService, MoETypeService
from sampling import in_turn, sampled

LAYERS, EXPERTS = 4, 4
JOBS: dict[str, Callable[..., BaseModel]] = {
    "analyze": lambda model, progress=None: MoETypeService.analyze(model, layers="all", progress=progress),
    "parent": lambda model, progress=None: MoETypeService.analyze(model, layers="all", parent=model, progress=progress),
    "compute": lambda model, progress=None: MoECompressionService.compute(
        model, layers="all", target_ratio=2, progress=progress
    ),
    "verify": lambda model, progress=None: MoECompressionService.verify(model, layers="all", progress=progress),
    "estimate": lambda model, progress=None: MoECompressionService.estimate(model, layers="all", progress=progress),
}


class Interrupted(Exception):
    pass


def write_model(folder: Path, seed: int = 0) -> str:
    """Mixtral's names, with a dense feed-forward beside the experts in each layer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, shape in (("w1", (32, 16)), ("w3", (32, 16)), ("w2", (16, 32))):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("gate", (32, 16)), ("up", (32, 16)), ("down", (16, 32))):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = rng.standard_normal(shape).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mixtral", "num_hidden_layers": 4, "hidden_act": "silu"}')
    return str(folder)


def result(report: BaseModel) -> dict[str, Any]:
    return {key: value for key, value in report.model_dump(mode="json").items() if key != "cost"}


def bytes_read(report: BaseModel) -> int:
    return int(report.model_dump()["cost"]["bytes_read"])


def stop_after(layers: int) -> Callable[[str, int, int], None]:
    """Progress that ends the job once so many layers are done and the next one is begun."""
    done: set[int] = set()

    def report(what: str, now: int, total: int) -> None:
        if what == "all layers" and now % (total // LAYERS) == 0:
            done.add(now)
        elif what.endswith(f"layer {layers}") and len(done) >= layers:
            raise Interrupted

    return report


@pytest.mark.sample
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("job", list(JOBS))
def test_an_interrupted_job_goes_on_where_it_was(tmp_path: Path, cache: Path, job: str, layers: int) -> None:
    model = write_model(tmp_path / "model")
    undisturbed = JOBS[job](model)
    with pytest.raises(Interrupted):
        JOBS[job](model, stop_after(layers))
    kept = list((cache / "sweeps").glob("*/*.json"))
    assert len(kept) == layers
    resumed = JOBS[job](model)
    assert result(resumed) == result(undisturbed)
    assert bytes_read(resumed) < bytes_read(undisturbed)
    assert not list((cache / "sweeps").iterdir())


def test_what_was_kept_of_another_state_of_the_model_is_not_used(tmp_path: Path, cache: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(Interrupted):
        JOBS["analyze"](model, stop_after(3))
    write_model(tmp_path / "model", seed=1)
    changed = JOBS["analyze"](model)
    assert result(changed) == result(JOBS["analyze"](write_model(tmp_path / "model", seed=1)))


DAMAGES = ["", "{", "[]", '{"layer": 0}', "\x00"]


@pytest.mark.parametrize(("job", "damage"), sampled(product(JOBS, DAMAGES), in_turn(list(JOBS), DAMAGES)))
def test_damaged_results_are_found_again(tmp_path: Path, cache: Path, job: str, damage: str) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(Interrupted):
        JOBS[job](model, stop_after(3))
    for file in (cache / "sweeps").glob("*/*.json"):
        file.write_text(damage)
    resumed = JOBS[job](model)
    assert result(resumed) == result(JOBS[job](model))


def test_other_options_are_another_job(tmp_path: Path, cache: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(Interrupted):
        MoETypeService.analyze(model, layers="all", experts=2, progress=stop_after(3))
    assert MoETypeService.analyze(model, layers="all", experts=3).layers[0].lineage.experts == (0, 2, 3)


def test_only_our_own_is_forgotten(tmp_path: Path, cache: Path) -> None:
    """The cache folder may have been somebody's before."""
    for name in ("letters", "0" * 32):
        (cache / "sweeps" / name).mkdir(parents=True)
        os.utime(cache / "sweeps" / name, (0, 0))
    MoETypeService.analyze(write_model(tmp_path / "model"), layers="all")
    assert [path.name for path in (cache / "sweeps").iterdir()] == ["letters"]


def test_a_single_layer_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    model = write_model(tmp_path / "model")
    seen: list[str] = []
    MoETypeService.analyze(model, progress=lambda what, done, total: seen.append(what))
    assert set(seen) == {"layer 0"}
    assert not (cache / "sweeps").exists()


def test_progress_over_all_layers_only_grows_and_ends_at_the_whole(tmp_path: Path, cache: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(what: str, done: int, total: int) -> None:
        if what == "all layers":
            seen.append((done, total))

    MoETypeService.analyze(write_model(tmp_path / "model"), layers="all", progress=watch)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == 4 * 4 * 3 * 32 * 16 * 4


def test_a_cache_that_cannot_be_written_costs_the_way_back_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAZARUS_CACHE", str(tmp_path / "file"))
    assert len(MoETypeService.analyze(write_model(tmp_path / "model"), layers="all").layers) == LAYERS
