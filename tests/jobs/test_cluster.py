"""Analyses and surveys on a scheduler and three workers in processes: what they give, and what goes wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from pydantic import BaseModel
from safetensors.numpy import save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    InvalidRequest,
    ModelUnreadable,
    MoEError,
    MoESurveyService,
    MoETypeService,
    SurveyRequest,
    SurveyRow,
)
from chuk_lazarus.introspection.moe.jobs import cluster
from chuk_lazarus.introspection.moe.jobs.cluster import ClusterUnusable, Task, connect
from chuk_lazarus.introspection.moe.progress import Progress
from hub_server import Fault, HubServer
from places import FIXTURES
from processor_time import HANGS

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 6, 8, 32, 64
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 4
ANALYZE = ["introspect", "moe-expert", "moe-type-analyze"]
SURVEY = ["introspect", "moe-expert", "moe-type-survey"]
WORKER = r"worker tcp://127\.0\.0\.1:\d+"

Capture = pytest.CaptureFixture[str]


class Machines:
    """A scheduler and its workers; `client` is ours, to look at them."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder, self.environ = folder, {**os.environ, **environ}
        self.workers: list[subprocess.Popen[bytes]] = []
        folder.mkdir(exist_ok=True)
        file = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        wait_for(lambda: file.exists() and file.read_text().endswith("}"))
        self.address = json.loads(file.read_text())["address"]
        self.client = Client(self.address, set_as_default=False)

    def start(self, wanted: int, environ: Mapping[str, str] = {}, *python: str, threads: int = 2) -> None:
        """Have so many workers, each with a cache of its own."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for number in range(wanted - len(self.workers)):
            cache = self.folder / f"cache-{number}-{time.monotonic_ns()}"
            options = ("--no-nanny", "--nthreads", str(threads), "--memory-limit", "2GB", "--host", "127.0.0.1")
            environ = {**environ, "LAZARUS_CACHE": str(cache)}
            self.workers.append(self._start("worker", self.address, *options, environ=environ, python=python))
        wait_for(lambda: len(self.client.scheduler_info(n_workers=-1)["workers"]) == wanted)

    def busy(self) -> list[str]:
        """The workers that have something to do."""
        return [worker for worker, tasks in self.client.processing().items() if tasks]

    def kill(self, address: str) -> None:
        """End a worker at once."""
        os.kill(self.client.run(os.getpid, workers=[address])[address], signal.SIGKILL)

    def close(self) -> None:
        self.client.close()
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(
        self,
        *arguments: str,
        environ: Mapping[str, str] = {},
        python: tuple[str, ...] = (),
    ) -> subprocess.Popen[bytes]:
        program = [sys.executable, *python, "-m", "dask", *arguments, "--no-dashboard"]
        with (self.folder / f"{arguments[0]}.log").open("ab") as log:
            return subprocess.Popen(program, cwd=self.folder, env={**self.environ, **environ}, stdout=log, stderr=log)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("machines"), {})
    yield machines
    machines.close()


@pytest.fixture
def machines(started: Machines) -> Machines:
    """A scheduler with three workers, those that are lost replaced."""
    started.start(3)
    return started


@pytest.fixture
def others(tmp_path: Path) -> Iterator[Machines]:
    """A scheduler without workers, which gives up a task that has cost one."""
    machines = Machines(tmp_path / "others", {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"})
    yield machines
    machines.close()


def write_model(folder: Path, broken: int | None = None, seed: int = 0) -> str:
    """Mixtral's names, with a dense feed-forward beside the experts in each layer."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}
    dense = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    tensors = {}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            for expert in range(EXPERTS):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                tensors[key] = rng.standard_normal(shape).astype(np.float32)
            tensors[f"model.layers.{layer}.mlp.{dense[name]}.weight"] = rng.standard_normal(shape).astype(np.float32)
        if layer == broken:
            tensors[key][3, 5] = np.nan
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": LAYERS}))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "model")


def result(report: BaseModel) -> dict[str, Any]:
    found = report.model_dump(mode="json")
    del (found["answer"] or {} if "answer" in found else found)["cost"]
    return found


# The same as on one machine


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "all"},
        {"layers": "0,3,5", "experts": None, "variance": [0.5, 0.999]},
        {"layers": [2, 1], "parent": True},
        {"layers": "0-1", "thorough": True},
        {"layer": 4},
        {},
    ],
    ids=str,
)
def test_an_analysis_is_that_of_one_machine(machines: Machines, model: str, options: dict[str, Any]) -> None:
    if "parent" in options:
        options = {**options, "parent": model}
    here = MoETypeService.analyze(model, **options)
    there = MoETypeService.analyze(model, **options, dask=machines.address)
    assert result(there) == result(here)
    assert there.cost.bytes_read >= here.cost.bytes_read
    assert there.cost.bytes_fetched == 0


def test_embedded_models_work_anywhere(machines: Machines) -> None:
    options: dict[str, Any] = {"parent": "demo:parent", "layers": "all"}
    there = MoETypeService.analyze("demo:permuted", **options, dask=machines.address)
    assert result(there) == result(MoETypeService.analyze("demo:permuted", **options))


def test_workers_read_the_commit_that_was_opened(machines: Machines, hub: HubServer, cache: Path, model: str) -> None:
    commit = hub.add("tests/pinned", Path(model))
    there = MoETypeService.analyze("tests/pinned", layers="all", dask=machines.address)
    here = MoETypeService.analyze("tests/pinned", layers="all")
    assert result(there) == result(here)
    assert there.revision == commit
    assert there.cost.bytes_fetched > LAYERS * LAYER_BYTES
    asked = {request.path for request in hub.requests if request.path.startswith("/api/")}
    assert any(path.endswith(commit) for path in asked)


def test_progress_reaches_the_whole(machines: Machines, model: str) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    MoETypeService.analyze(
        model,
        layers="all",
        dask=machines.address,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert {total for _, total in seen["all layers"]} == {LAYERS * LAYER_BYTES}
    assert len(seen["all layers"]) >= LAYERS
    assert {f"layer {number}" for number in range(LAYERS)} <= seen.keys()
    for steps in seen.values():
        assert steps[-1][0] == steps[-1][1] > 0


def test_a_survey_is_that_of_one_machine(
    machines: Machines, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    broken = write_model(tmp_path / "broken", broken=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text(
        f"""\
demo:upcycled parent=demo:parent layers=0,1
{model} experts=2 parent={model}
broken
{broken} layers=all
{FIXTURES}/gpt_oss_mxfp4 experts=all
/no/such/model
{FIXTURES}/dense_llama
demo:native layers=7
"""
    )
    finished: list[SurveyRow] = []
    there = MoESurveyService.survey(["list.txt"], dask=machines.address, file=file, finished=finished.append)
    assert len(there.rows) == len(finished) == 8
    for row in there.rows:
        request = row.request.model_dump(exclude={"budget"})
        if row.answer:
            answer = MoETypeService.analyze(**request)
            for figure in ("model", "type", "confidence", "rank_ratio", "cosine", "overlay_ratio", "notes"):
                assert getattr(row.answer, figure) == getattr(answer, figure), figure
        else:
            with pytest.raises(MoEError) as caught:
                MoETypeService.analyze(**request)
            assert row.error
            assert (row.error.code, row.error.message) == (caught.value.exit_code, caught.value.message)
            assert row.error.hint == caught.value.hint
    assert [row.error.code if row.error else 0 for row in there.rows] == [0, 0, 0, 3, 0, 3, 4, 2]
    lines = [SurveyRow.model_validate_json(line) for line in file.read_text().splitlines()]
    assert sorted(map(str, lines)) == sorted(map(str, finished)) == sorted(map(str, there.rows))
    again: list[SurveyRow] = []
    MoESurveyService.survey(["list.txt"], dask=machines.address, file=file, finished=again.append)
    assert sorted(str(row.request) for row in again) == sorted(str(row.request) for row in finished if row.error)


@pytest.mark.long
def test_a_quick_survey_is_that_of_one_machine(machines: Machines) -> None:
    names = ["demo:upcycled", "demo:native", "demo:permuted"]
    here, there = (MoESurveyService.survey(names, budget="1MB", dask=where) for where in (None, machines.address))
    for one, other in zip(here.rows, there.rows, strict=True):
        assert one.answer
        assert other.answer
        assert one.answer.model_dump(exclude={"cost"}) == other.answer.model_dump(exclude={"cost"})


def test_the_commands(machines: Machines, model: str, capsys: Capture, tmp_path: Path) -> None:
    assert run([*ANALYZE, "-m", model, "--layers", "all", "--json", "--dask", machines.address]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        json.loads(out)["layers"] == json.loads(MoETypeService.analyze(model, layers="all").model_dump_json())["layers"]
    )
    assert run([*SURVEY, "demo:native", str(tmp_path / "none"), "--dask", machines.address]) == 1
    out, err = capsys.readouterr()
    assert "2 models: 1 NATIVE, 1 failed" in out
    assert err == ""


# How workers work


def test_a_worker_takes_one_task_with_its_threads_and_memory(machines: Machines) -> None:
    def look(progress: object) -> tuple[int, int, int]:
        from chuk_lazarus.introspection.moe.jobs.resources import Resources

        os.environ["RUNNING"] = str(int(os.environ.get("RUNNING", 0)) + 1)
        time.sleep(0.01)
        running = int(os.environ["RUNNING"])
        os.environ["RUNNING"] = str(running - 1)
        resources = Resources.current()
        return running, resources.threads, resources.matrix_memory

    with connect(machines.address) as workers:
        assert workers
        found = [answer for _, answer in workers.run([Task("a look", look, (), ())] * 30)]
    assert found == [(1, 2, 600_000_000)] * 30  # half of 60 % of 2 GB


def test_what_is_given_up_ends(machines: Machines) -> None:
    def tell(progress: Progress) -> None:
        while True:
            progress("work", 1, 2)

    seen: list[int] = []
    with connect(machines.address) as workers:
        assert workers
        with pytest.raises(ZeroDivisionError):
            list(workers.run([Task("a task", tell, (), ())] * 9, lambda number, *step: seen.append(1 // number)))
    wait_for(lambda: not any(machines.client.run(lambda dask_worker: len(dask_worker.state.tasks)).values()))


def test_a_task_that_fails_is_tried_again(machines: Machines, tmp_path: Path) -> None:
    def fail_first(path: str, progress: object) -> str:
        if not os.path.exists(path):
            os.mkdir(path)
            raise OSError("the storage is busy")
        return path

    def fail_always(progress: object) -> str:
        raise ZeroDivisionError("a bug")

    tasks = [Task("a task", fail_first, (str(tmp_path / name),), ()) for name in "ab"]
    with connect(machines.address) as workers:
        assert workers
        assert sorted(workers.run(tasks), key=str) == [(0, str(tmp_path / "a")), (1, str(tmp_path / "b"))]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            list(workers.run([Task("a task", fail_always, (), ())]))


# Lost and interrupted


def on_the_hub(hub: HubServer, folder: Path, name: str) -> Fault:
    """A model that no cache has, whose first reader, after ourselves, waits for an answer that does not come."""
    hub.add(name, Path(write_model(folder / "model", seed=sum(name.encode()))))
    return hub.fail(path=f"{name}/model.safetensors", stall=600.0, skip=1)


@pytest.mark.usefixtures("cache")
def test_the_tasks_of_a_lost_worker_are_repeated(machines: Machines, hub: HubServer, tmp_path: Path) -> None:
    fault = on_the_hub(hub, tmp_path, "tests/lost")
    killed: list[str] = []

    def kill(what: str, done: int, total: int) -> None:
        if what == "all layers" and done >= (LAYERS - 2) * LAYER_BYTES and not killed:
            wait_for(lambda: fault.hits and len(machines.busy()) == 1)
            killed.extend(machines.busy())
            machines.kill(killed[0])

    there = MoETypeService.analyze("tests/lost", layers="all", dask=machines.address, progress=kill)
    assert len(killed) == 1
    assert result(there) == result(MoETypeService.analyze("tests/lost", layers="all"))


@pytest.mark.long
def test_an_interrupted_analysis_cancels_its_tasks_and_goes_on_where_it_was(
    machines: Machines, hub: HubServer, tmp_path: Path, cache: Path
) -> None:
    fault = on_the_hub(hub, tmp_path, "tests/interrupted")
    command = [*ANALYZE, "-m", "tests/interrupted", "--layers", "all", "--dask", machines.address]
    with subprocess.Popen(
        [sys.executable, "-m", "chuk_lazarus.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: process.poll() is not None or (fault.hits and len(machines.busy()) == 1))
        wait_for(lambda: process.poll() is not None or list(cache.glob("sweeps/*/*.json")))
        (stuck,) = machines.busy()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS)
    assert (process.returncode, out, err) == (130, b"", b"lazarus: interrupted\n")
    wait_for(lambda: not machines.busy())
    machines.kill(stuck)
    kept = len(list(cache.glob("sweeps/*/*.json")))
    assert 0 < kept < LAYERS
    machines.start(3)
    seen: list[str] = []
    there = MoETypeService.analyze(
        "tests/interrupted",
        layers="all",
        dask=machines.address,
        progress=lambda what, done, total: seen.append(what),
    )
    assert len({what for what in seen if what.startswith("layer ")}) == LAYERS - kept
    assert result(there) == result(MoETypeService.analyze("tests/interrupted", layers="all"))
    assert not list(cache.glob("sweeps/*"))


def test_a_model_that_takes_workers_down_costs_its_own_answer(others: Machines) -> None:
    def end(progress: object) -> None:
        os._exit(1)

    others.start(1)
    with connect(others.address) as workers:
        assert workers
        ((number, found),) = workers.run([Task("org/large", end, (), ())])
    assert number == 0
    assert isinstance(found, ClusterUnusable)
    assert re.match(r"org/large: 1 workers died on it, the last one was tcp://127\.0\.0\.1:\d+", found.message)


@pytest.mark.long
def test_a_model_that_takes_workers_down_costs_no_other_answer(others: Machines, tmp_path: Path) -> None:
    """Though workers have threads for several, and a scheduler that counts all that a lost one held."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.addaudithook(lambda what, told: os._exit(1) if what == 'open' and 'deadly' in str(told[0]) else None)\n"
    )
    others.start(3, {"PYTHONPATH": str(tmp_path)}, threads=4)
    harmless = [SurveyRequest(model="demo:native", experts=number) for number in range(2, 9)]
    deadly = write_model(tmp_path / "deadly")
    there = MoESurveyService.survey([*harmless[:3], deadly, *harmless[3:]], dask=others.address)
    assert [place for place, row in enumerate(there.rows) if not row.answer] == [3]
    lost = there.rows[3].error
    assert lost
    assert "1 workers died on it" in lost.message
    here = MoESurveyService.survey(harmless)
    assert [row.answer and row.answer.type for row in here.rows] == ["NATIVE"] * 7
    for one, other in zip([*there.rows[:3], *there.rows[4:]], here.rows, strict=True):
        assert result(one) == result(other)


@pytest.mark.long
def test_workers_that_come_later_take_part(others: Machines) -> None:
    def wait(path: str, progress: object) -> str:
        while not os.path.exists(path):
            time.sleep(0.05)
        return str(os.getpid())

    others.start(1)
    gate = others.folder / "gate"
    with connect(others.address) as workers, ThreadPoolExecutor(1) as pool:
        assert workers
        answers = pool.submit(list, workers.run([Task("a task", wait, (str(gate),), ())] * 4))
        wait_for(lambda: len(others.busy()) == 1)
        others.start(2)
        wait_for(lambda: len(others.busy()) == 2)
        gate.touch()
        assert len({found for _, found in answers.result()}) == 2


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 5])
def test_a_lost_scheduler_is_said(others: Machines, count: int) -> None:
    def tell(progress: Progress) -> None:
        while True:  # until the worker notices
            progress("work", 1, 2)
            time.sleep(0.1)

    others.start(1)
    with connect(others.address) as workers:
        assert workers
        answers = workers.run([Task("a task", tell, (), ())] * count, lambda *step: others.scheduler.kill())
        with pytest.raises(ClusterUnusable, match=f"^the scheduler at {others.address} was lost"):
            next(answers)


# What can't be


def test_an_error_of_the_model_comes_back_as_it_is(machines: Machines, tmp_path: Path, capsys: Capture) -> None:
    model = write_model(tmp_path / "model", broken=2)
    errors = []
    for options in ({}, {"dask": machines.address}):
        with pytest.raises(ModelUnreadable) as caught:
            MoETypeService.analyze(model, layers="2,4", **options)
        errors.append((caught.value.message, caught.value.hint, caught.value.exit_code))
    assert errors[0] == errors[1]
    assert "layer 2" in errors[0][0]
    assert run([*ANALYZE, "-m", model, "--layers", "2,4", "--dask", machines.address, "--json"]) == 3
    assert json.loads(capsys.readouterr().err)["error"]["message"] == errors[0][0]
    for wrong, code in (([model, "--layers", "9,10"], 2), ([f"{FIXTURES}/dense_llama", "--layers", "all"], 4)):
        assert run([*ANALYZE, "-m", *wrong, "--dask", machines.address]) == code


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs a path that is another in each process")
def test_a_worker_that_does_not_see_the_model_is_named(
    machines: Machines, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model).parent)
    with pytest.raises(ModelUnreadable, match=rf"^{WORKER} does not see /proc/self/cwd/model") as caught:
        MoETypeService.analyze("/proc/self/cwd/model", layers="all", dask=machines.address)
    assert "same path" in caught.value.hint
    (row,) = MoESurveyService.survey(["/proc/self/cwd/model"], dask=machines.address).rows
    assert row.error
    assert re.fullmatch(rf"{WORKER} does not see /proc/self/cwd/model", row.error.message)
    assert row.error.code == 3
    other = machines.folder / "model"
    write_model(other)
    (other / "config.json").write_text("{}")
    with pytest.raises(ModelUnreadable, match=rf"^{WORKER} sees other files in /proc/self/cwd/model than this machine"):
        MoETypeService.analyze("/proc/self/cwd/model", layers="all", dask=machines.address)


@pytest.mark.parametrize("address", ["", "nonsense", "http://127.0.0.1:8787", "tcp://", "/tmp/scheduler.json", "a:b"])
def test_what_is_no_address(capsys: Capture, address: str) -> None:
    for command in ([*ANALYZE, "-m", "demo:native"], [*SURVEY, "demo:native"]):
        assert run([*command, "--dask", address]) == 2
        assert "tcp://host:8786" in capsys.readouterr().err
    with pytest.raises(InvalidRequest):
        MoETypeService.analyze("demo:native", dask=address)


@pytest.mark.parametrize("is_there", [False, True], ids=["closed", "silent"])
def test_a_scheduler_that_does_not_answer(capsys: Capture, monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_there:
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert run([*ANALYZE, "-m", "demo:native", "--dask", address]) == 3
    out, line = capsys.readouterr()
    assert (out, line) == ("", f"lazarus: no dask scheduler answers at {address} (start one with: dask scheduler)\n")


@pytest.mark.parametrize("options", [["--quick"], ["--memory", "1GB"]], ids=" ".join)
def test_options_that_do_not_go_together(capsys: Capture, options: list[str]) -> None:
    assert run([*ANALYZE, "-m", "demo:native", "--dask", "127.0.0.1:1", *options]) == 2
    assert options[0].removeprefix("--") in capsys.readouterr().err


def test_jobs_are_for_one_machine(capsys: Capture) -> None:
    assert run([*SURVEY, "demo:native", "--dask", "127.0.0.1:1", "--jobs", "2"]) == 2
    assert "jobs" in capsys.readouterr().err


@pytest.mark.long
def test_workers_that_cannot_do_the_work(others: Machines, tmp_path: Path, capsys: Capture) -> None:
    """None, then one with another version of the package, then one without it."""

    def refused() -> str:
        assert run([*ANALYZE, "-m", "demo:native", "--dask", others.address]) == 3
        out, line = capsys.readouterr()
        assert (out, line.count("\n")) == ("", 1), line
        return line

    assert "has no workers" in refused()
    dist_info = tmp_path / "old/chuk_lazarus-0.0.1.dist-info"
    dist_info.mkdir(parents=True)
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: chuk-lazarus\nVersion: 0.0.1\n")
    others.start(1, {"PYTHONPATH": str(tmp_path / "old")})
    assert re.search(rf"{WORKER} has chuk-lazarus 0\.0\.1, but this machine has \d", refused())
    others.workers[0].kill()
    others.workers[0].wait()
    wait_for(lambda: not others.client.scheduler_info()["workers"])
    packages = tmp_path / "packages"
    packages.mkdir()
    for found in Path(np.__file__).parents[1].iterdir():
        if found.suffix != ".pth" and "chuk_lazarus" not in found.name:
            (packages / found.name).symlink_to(found)
    others.start(1, {"PYTHONPATH": str(packages)}, "-S")
    assert re.search(rf"{WORKER} has no chuk-lazarus \(install chuk-lazarus \d", refused())
