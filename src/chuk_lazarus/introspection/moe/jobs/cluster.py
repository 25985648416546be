"""Many machines: tasks for the workers of a dask.distributed scheduler.

A task is pure, so dask may give it to another worker if one is lost. A worker runs one task at a time, with all its
threads and within its memory limit, so the task that was running when a worker was lost may be the cause. No other
module uses dask.
"""

import logging
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

from ..errors import InvalidRequest, LibraryMissing, ModelUnreadable, MoEError
from ..progress import Progress
from ..weights.experts import split_model
from ..weights.fingerprint import file_sizes
from .resources import LEAST_MEMORY, memory_limit, thread_limit

if TYPE_CHECKING:
    from distributed import Client, Future

PATIENCE = 10  # seconds in which a scheduler must answer
RETRIES = 2  # of a task that failed for another reason than an error of the model
SHARE = 60  # % of a worker's memory: dask begins to act on a worker that takes more
PAUSE = 0.2  # seconds between two reports of a worker on the same work
LOOK = 5.0  # seconds between two looks for new workers
PACKAGES = ("chuk-lazarus", "distributed")  # their versions must be the same on all machines
LOGGERS = ("distributed", "distributed.client")

_turn = Lock()

Outcome = TypeVar("Outcome")
Watch = Callable[[int, str, int, int], None]
"""Progress of several tasks: (number of the task, what, done, total)."""


class ClusterUnusable(MoEError):
    """The scheduler can't be reached or was lost, or its workers can't do our work."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where each worker finds a model: an absolute path, a Hub id or an embedded model.

    `sizes` are the bytes of the files at the path, which a worker must find there too; None if it is not a path.
    """

    name: str
    sizes: dict[str, int] | None

    def check(self, worker: str) -> None:
        """Raise ModelUnreadable if a worker does not see these files."""
        if self.sizes is not None:
            path = split_model(self.name)[0]
            sizes, hint = file_sizes(path), "workers must see a model at the same path, or read it from the Hub"
            if sizes is None:
                raise ModelUnreadable(f"worker {worker} does not see {path}", hint)
            if sizes != self.sizes:
                raise ModelUnreadable(f"worker {worker} sees other files in {path} than this machine", hint)


def locate(model: str, revision: str | None = None) -> Place:
    """The place of `model`, at a commit where one is given."""
    name, stack = split_model(model)
    behind = "" if stack is None else f"#{stack}"
    if revision:
        return Place(f"{name.partition('@')[0]}@{revision}{behind}", None)
    path = os.path.abspath(os.path.expanduser(name))
    sizes = None if name.startswith("demo:") else file_sizes(path)
    return Place(model if sizes is None else path + behind, sizes)


@dataclass(frozen=True, slots=True)
class Task(Generic[Outcome]):
    """A task for a worker: `function(*arguments, progress)`, on models that it must see at `places`.

    `what` names the task in messages. The function is sent by its name, so it must be at the top level of a module.
    """

    what: str
    function: Callable[..., Outcome]
    arguments: tuple[Any, ...]
    places: tuple[Place, ...]


class Cluster:
    """The workers of a scheduler, from `connect`."""

    def __init__(self, client: "Client", address: str) -> None:
        self._client = client
        self._address = address

    def run(
        self, tasks: Sequence[Task[Outcome]], watch: Watch | None = None
    ) -> Iterator[tuple[int, Outcome | MoEError]]:
        """Yield each task's number with its result, or with the error of the model, as they arrive.

        A task is repeated if its worker is lost or it fails in another way; after it has cost too many workers, its
        result is a ClusterUnusable. Raises ClusterUnusable if the scheduler is lost, and what a task raises every time.
        """
        news: SimpleQueue[tuple[int, Future] | list[Any]] = SimpleQueue()
        shown: dict[int, dict[str, int]] = {number: {} for number in range(len(tasks))}
        topic = self._client.id if watch else None  # which the scheduler forgets with the client
        if topic:
            self._client.subscribe_topic(topic, lambda event: news.put(event[1]))
        due, busy, looked = deque(range(len(tasks))), dict[int, str | None](), -inf
        while shown:
            if due and time.monotonic() > looked + LOOK:
                for worker in self._find_idle(busy)[: len(due)]:
                    number = due.popleft()
                    busy[number] = worker
                    future = self._start(tasks[number], number, topic, worker)
                    future.add_done_callback(lambda done, number=number: news.put((number, done)))
                    del future  # a result goes when it has been taken
                looked = time.monotonic()
            try:
                event = news.get(timeout=LOOK if due else None)
            except Empty:
                continue
            match event:
                case (int(number), future):
                    del busy[number]
                    looked = -inf
                    result = self._take(future, tasks[number].what)
                    for what, total in shown.pop(number).items():
                        if watch:
                            watch(number, what, total, total)
                    yield number, result
                case [number, what, done, total] if watch and number in shown:
                    shown[number][what] = total
                    watch(number, what, done, total)

    def _find_idle(self, busy: Mapping[int, str | None]) -> list[str | None]:
        """The workers without a task; None stands for a worker that may still join, if no task is running."""
        try:
            there = self._client.nthreads()
        except OSError:
            raise self._lost() from None
        return [worker for worker in there if worker not in busy.values()] or ([] if busy else [None])

    def _start(self, task: Task[Outcome], number: int, topic: str | None, worker: str | None) -> "Future":
        """Have a task done by a worker, or by another if that is lost."""
        return self._client.submit(
            _work,
            task,
            number,
            topic,
            pure=False,
            retries=RETRIES,
            key=f"lazarus-{uuid4().hex}",
            workers=worker and [worker],
            allow_other_workers=worker is not None,
        )

    def _lost(self) -> ClusterUnusable:
        return ClusterUnusable(f"the scheduler at {self._address} was lost", "start it and try again")

    def _take(self, future: "Future", what: str) -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            return future.result()
        except KilledWorker as error:
            last = getattr(error.last_worker, "address", "unknown")
            return ClusterUnusable(
                f"{what}: {error.allowed_failures + 1} workers died on it, the last one was {last}",
                "see its log; it may have run out of memory",
            )
        except CancelledError:
            raise self._lost() from None


@contextmanager
def connect(address: str | None) -> Iterator[Cluster | None]:
    """The workers of the scheduler at `address`, such as "tcp://host:8786"; None for None.

    Tasks that are unfinished at the end are cancelled. Raises InvalidRequest for an invalid address, LibraryMissing
    without dask, and ClusterUnusable if no scheduler answers, it has no workers, or versions differ.
    """
    if address is None:
        yield None
        return
    if not re.fullmatch(r"((tcp|tls|ws|wss)://)?[^\s/]+:\d{1,5}/?|inproc://\S+", address):
        raise InvalidRequest(f"{address!r} is not the address of a scheduler", "write it like tcp://host:8786")
    try:
        from distributed import Client
        from distributed.utils import LoopRunner
    except ImportError:
        raise LibraryMissing.of("dask", "dask is not installed") from None
    runner, client = LoopRunner(), None
    with _quiet():
        runner.start()
        try:
            _find_scheduler(runner.loop, address)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of versions that differ: those that matter are checked below
                client = Client(address, loop=runner.loop, timeout=PATIENCE, set_as_default=False)
            _check_versions(client)
            yield Cluster(client, address)
        finally:
            if client:
                with suppress(TimeoutError):
                    client.close(timeout=0.5)  # a scheduler that does not answer will notice that we left
            runner.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep dask's log lines from coming between ours."""
    levels = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _find_scheduler(loop: Any, address: str) -> None:
    """Check that a scheduler with workers answers: a client would wait forever for an address that does not reply."""
    from distributed import Security, rpc, sync

    async def identify() -> Any:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as scheduler:
            return await scheduler.identity()

    try:
        workers = sync(loop, identify, callback_timeout=PATIENCE)["workers"]
    except Exception:  # depends on what answers there, if anything does
        raise ClusterUnusable(f"no dask scheduler answers at {address}", "start one with: dask scheduler") from None
    if not workers:
        raise ClusterUnusable(f"the scheduler at {address} has no workers", f"start some with: dask worker {address}")


def _check_versions(client: "Client") -> None:
    versions = client.get_versions(packages=PACKAGES)
    others = {"the scheduler": versions["scheduler"]}
    others |= {f"worker {address}": packages for address, packages in versions["workers"].items()}
    for package in PACKAGES:
        ours = versions["client"]["packages"][package]
        for who, machine in others.items():
            if (theirs := machine["packages"].get(package)) != ours:
                has = f"{package} {theirs}, but this machine has {ours}" if theirs else f"no {package}"
                raise ClusterUnusable(f"{who} has {has}", f"install {package} {ours} there")


def _work(task: Task[Outcome], number: int, topic: str | None) -> Outcome | MoEError:
    """Do a task, on a worker."""
    from distributed import CancelledError, get_worker

    worker = get_worker()
    key = worker.get_current_task()
    limit, last = worker.memory_manager.memory_limit, dict[str, float]()

    def report(what: str, done: int, total: int) -> None:
        known = worker.state.tasks.get(key)
        if known is None or known.state == "cancelled":
            raise CancelledError  # a thread can't be stopped from outside
        now = time.monotonic()
        if topic and (done >= total or now - last.get(what, 0.0) > PAUSE):
            last[what] = now
            worker.log_event(topic, [number, what, done, total])

    memory = max(LEAST_MEMORY, limit * SHARE // 100) if limit else None
    with _turn, thread_limit(worker.state.nthreads), memory_limit(memory):
        try:
            for place in task.places:
                place.check(worker.address)
            progress: Progress = report
            return task.function(*task.arguments, progress)
        except MoEError as error:
            return error
