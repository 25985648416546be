"""How were all these MoEs trained? `MoESurveyService` asks it of many models, and keeps every answer as it comes.

Each model is analysed in a process of its own, or by a worker on another machine: one that is too large for the memory,
or that crashes, costs its own answer only, and an interrupted survey ends at once.
"""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from io import FileIO
from math import fsum, prod
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from . import views  # noqa: F401  which registers how reports are shown
from .errors import InvalidRequest, MoEError, printable
from .jobs.cluster import Cluster, Task, connect, locate
from .jobs.measure import DEFAULT_EXPERTS
from .jobs.resources import LEAST_MEMORY, cores, memory, memory_limit, thread_limit
from .moe_type import MoETypeService
from .progress import Progress
from .reports import (
    MoEQuickAnalysis,
    MoESurveyPlan,
    MoETypeAnalysis,
    MoETypeSurvey,
    PlannedModel,
    SurveyAnswer,
    SurveyError,
    SurveyRequest,
    SurveyRow,
)
from .text import parse_size
from .weights.experts import parse_layers

LISTS = (".txt", ".toml")
OPTIONS = ("parent", "layers", "experts")
BITS = {"f32": 32, "bf16": 16, "f16": 16, "fp8": 8 + 32 / 128**2, "mxfp4": 4 + 8 / 32}  # of a weight and its scale
MAX_WORDS = 4096  # characters of a name or of a list of layers; the request is an argument of a process
MAX_SIZE = 2**40  # of anything in the shape of a model
MAX_NUMBER = 2**63  # in a row
LINE_START = b'{"schema": "moe-type-survey-row/1"'
# -P: a file in the current folder, which may be a stranger's, must not be imported in a library's place
WORKER = (sys.executable, "-P", "-c", f"from {__name__} import work; work()")
PROGRESS_PAUSE = 0.1  # seconds between two words of a process on the same work

Finished = Callable[[SurveyRow], None]


class MoESurveyService:
    """Tells of many models how they were trained.

    >>> [row.answer.type for row in MoESurveyService.survey(["demo:native", "demo:upcycled"]).rows]
    ['NATIVE', 'UPCYCLED']
    """

    @staticmethod
    def survey(
        models: Iterable[str | SurveyRequest],
        *,
        layer: int | None = None,
        layers: Sequence[int] | str | None = None,
        experts: int | None = DEFAULT_EXPERTS,
        budget: int | str | None = None,
        jobs: int = 1,
        dask: str | None = None,
        file: str | Path | None = None,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> MoETypeSurvey:
        """Analyse many models; a model that can't be analysed is a row with its error.

        `models` are models as for `MoETypeService.analyze`, requests, or lists: names of .txt files with a model a
        line, or of .toml files with a [[model]] table each. `layer`, `layers` and `experts` hold for every model whose
        list does not say otherwise. With a `budget` of bytes ("64MB") all analyses are quick ones, which know neither
        parents nor numbers of experts: what lists say of those is passed over. `jobs` models are analysed side by side,
        sharing cores and memory, or as many as the dask.distributed scheduler at the address `dask` has workers. `file`
        gets each row, as a line of JSON, when it is there; a model
        for which it already has an answer to the same request is not analysed again. `progress` is told (what, done,
        total), and `finished` each new row. Raises InvalidRequest for a list, an option or a file that can't be used,
        and ClusterUnusable for a scheduler.
        """
        if jobs < 1:
            raise InvalidRequest("the number of jobs must be at least 1")
        if jobs > 1 and dask:
            raise InvalidRequest("both jobs and dask are given", "give one of the two")
        size = parse_size(budget, "the budget") if isinstance(budget, str) else budget
        entries = _read_entries(models, _spell_layers(layer, layers), experts, size)
        rows: dict[SurveyRequest, SurveyRow] = _take_up(Path(file)) if file else {}
        due = [entry for entry in entries if not ((row := rows.get(entry.shown)) and row.answer)]
        with connect(dask) as cluster, _open(Path(file) if file else None) as lines:

            def finish(row: SurveyRow) -> None:
                if rows.get(row.request) != row:  # a failure that has not changed need not be said again
                    _append(lines, row)
                rows[row.request] = row
                if finished:
                    finished(row)

            if cluster:
                _analyze_on(cluster, due, progress, finish)
            else:
                _analyze_apart(due, jobs, progress, finish)
        return MoETypeSurvey(
            rows=tuple(rows[entry.shown].model_copy(update={"stated": entry.stated}) for entry in entries)
        )

    @staticmethod
    def plan(models: Iterable[str | SurveyRequest]) -> MoESurveyPlan:
        """What a survey would cost, by the shapes that .toml lists give; opens nothing but the lists.

        A shape is `storage` and `shape = { layers, experts, hidden, intermediate }`, with `gated = false` where an
        expert has two matrices. Raises InvalidRequest.
        """
        entries = _read_entries(models, None, DEFAULT_EXPERTS, None)
        return MoESurveyPlan(
            models=tuple(
                PlannedModel(
                    request=entry.shown,
                    stated=entry.stated,
                    layer_bytes=entry.layer_bytes,
                    stored_bytes=entry.stored_bytes,
                )
                for entry in entries
            ),
            layer_bytes=sum(entry.layer_bytes or 0 for entry in entries),
            stored_bytes=sum(entry.stored_bytes or 0 for entry in entries),
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a list; `shown` is its request as reports and files name it."""

    request: SurveyRequest
    stated: str | None = None
    layer_bytes: int | None = None
    stored_bytes: int | None = None

    @property
    def shown(self) -> SurveyRequest:
        named = {"model": self.request.model, "parent": self.request.parent}
        return self.request.model_copy(update={key: name and printable(name) for key, name in named.items()})


def _spell_layers(layer: int | None, layers: Sequence[int] | str | None) -> str | None:
    """The wanted layers in the words of the command line."""
    if layer is not None and layers is not None:
        raise InvalidRequest("both layer and layers are given", "give one of the two")
    if layers is None:
        return None if layer is None else str(layer)
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def _read_entries(
    models: Iterable[str | SurveyRequest], layers: str | None, experts: int | None, budget: int | None
) -> tuple[Entry, ...]:
    """All models that are given or listed, each request once; raises InvalidRequest."""
    usual = {"layers": layers, "experts": "all" if experts is None else experts}
    found: dict[SurveyRequest, Entry] = {}
    for model in [models] if isinstance(models, str) else models:
        if isinstance(model, SurveyRequest):
            count = "all" if model.experts is None else model.experts
            entries = [_entry(model.model, {**model.model_dump(), "id": model.model, "experts": count})]
        elif model.endswith(LISTS) and not os.path.isdir(model):
            entries = [_entry(where, usual | options) for where, options in _read_list(model)]
        else:
            entries = [_entry(model, usual | {"id": model})]
        for entry in entries:
            if budget is not None:
                quick = SurveyRequest(model=entry.request.model, layers=entry.request.layers, budget=budget)
                entry = replace(entry, request=quick)
            found.setdefault(entry.request, entry)
    if not found:
        raise InvalidRequest("no model is given or listed", "give a model, or a list with a model a line")
    return tuple(found.values())


def _read_list(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a list says of its models, each with where it says so."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text).get("model") if path.endswith(".toml") else None
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", "give a list of models, or a model") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise InvalidRequest(f"{path} is no list of models: {error}") from None
    if not path.endswith(".toml"):
        for number, line in enumerate(text.split("\n"), 1):
            if line := re.sub(r"(^|\s)#.*", "", line).strip():
                model, *options = re.split(r"\s+(?=\w+=)", line)
                pairs = (option.partition("=")[::2] for option in options)
                where = f"{path}, line {number}"
                yield where, {"id": model, **{_check_option(where, key): value for key, value in pairs}}
    elif isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        for number, table in enumerate(tables, 1):
            yield f"{path}, model {number}", table
    else:
        raise InvalidRequest(f"{path} has no [[model]] tables")


def _check_option(where: str, name: str) -> str:
    if name not in OPTIONS:
        raise InvalidRequest(f"{where}: there is no option {name}", f"there are {', '.join(OPTIONS)}")
    return name


def _entry(where: str, options: Mapping[str, Any]) -> Entry:
    """A model by what its list says; raises InvalidRequest, naming the place, for what can't be."""
    model, parent = options.get("id"), options.get("parent")
    for name, value in (("id", model), *([("parent", parent)] if parent is not None else [])):
        if not (isinstance(value, str) and value.strip()):
            raise InvalidRequest(f"{where}: {name} is not the name of a model")
    layers, experts, stated = options.get("layers"), options.get("experts"), options.get("origin")
    layers = None if layers is None else str(layers)
    for name, value in (("id", model), ("parent", parent), ("layers", layers)):
        if value and len(value) > MAX_WORDS:
            raise InvalidRequest(f"{where}: {name} is longer than {MAX_WORDS} characters")
    try:
        if layers not in (None, "all"):
            parse_layers(layers)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}", error.hint) from None
    if not re.fullmatch(r"all|0*[1-9]\d{0,8}", str(experts)):
        raise InvalidRequest(f"{where}: {experts!r} is neither a number of experts from 1 on nor 'all'")
    request = SurveyRequest(
        model=str(model),
        parent=None if options.get("parent_needs") else parent,  # it is known that this parent can't be read
        layers=layers,
        experts=None if experts == "all" else int(str(experts)),
    )
    return Entry(request, printable(stated) if isinstance(stated, str) else None, *_bytes_by_shape(options))


def _bytes_by_shape(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The bytes of one layer's routed experts, and of all layers', where a list gives their shape."""
    try:
        sizes = [int(options["shape"][name]) for name in ("layers", "experts", "hidden", "intermediate")]
        if not all(0 < size <= MAX_SIZE for size in sizes):
            return None, None
        layer = round(prod(sizes[1:]) * (3 if options.get("gated", True) else 2) * BITS[options["storage"]] / 8)
        return layer, layer * sizes[0]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None, None


def _take_up(path: Path) -> dict[SurveyRequest, SurveyRow]:
    """The rows that a file already has; of several of the same request, the last.

    A last line that is not whole, of a survey that was killed while writing it, is cut off. Raises InvalidRequest for a
    file that has anything else in it.
    """
    rows, number = {}, 0
    try:
        data = path.read_bytes() if path.is_file() else b""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate([*lines, rest], 1):
            if number <= len(lines):
                row = SurveyRow.model_validate_json(line)
                _check_plain(row.model_dump())
                rows[row.request] = row
            elif line[: len(LINE_START)] != LINE_START[: len(line)]:
                raise ValueError("not the beginning of a row")
        if rest:
            os.truncate(path, len(data) - len(rest))
    except OSError as error:
        raise InvalidRequest(f"can't go on with {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise InvalidRequest(f"line {number} of {str(path)!r} is not of a survey", "give another file") from None
    return rows


def _check_plain(value: Any) -> None:
    """Raise ValueError where a string can't be shown, or a number is larger than any that we write."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_plain(inner)
    elif not (value.isprintable() if isinstance(value, str) else abs(value or 0) <= MAX_NUMBER):
        raise ValueError("not of a survey")


def _open(path: Path | None) -> FileIO:
    """The file to append to, unbuffered; raises InvalidRequest."""
    try:
        return FileIO(path or os.devnull, "ab")
    except OSError as error:
        raise InvalidRequest(f"can't write {str(path)!r}: {error.strerror}") from None


def _append(file: FileIO, row: SurveyRow) -> None:
    line = (json.dumps(row.model_dump(mode="json"), ensure_ascii=False) + "\n").encode()
    try:
        while line:  # a disk that is nearly full takes a part
            line = line[file.write(line) or 0 :]
    except OSError as error:
        raise InvalidRequest(f"can't write {str(file.name)!r}: {error.strerror}") from None


def _analyze_apart(entries: Sequence[Entry], jobs: int, progress: Progress | None, finish: Finished) -> None:
    """Analyse the models in processes, so many side by side, and hand over each row as it comes.

    Rows are handed over by the threads that wait for them, one at a time: an interruption ends the main thread's work,
    and never theirs.
    """
    running: set[subprocess.Popen[bytes]] = set()
    stopped, lock = Event(), Lock()
    jobs = max(1, min(jobs, len(entries)))
    limits = max(LEAST_MEMORY, memory() // jobs), max(1, cores() // jobs)

    def analyze(number: int, entry: Entry) -> None:
        label = f"{number}/{len(entries)} {entry.shown.model}"
        asked = json.dumps([entry.request.model_dump(), bool(progress), *limits])
        row, shown, pipe = None, {}, subprocess.PIPE
        # a group of its own: Ctrl-C is for this process alone, which then ends the others
        with subprocess.Popen([*WORKER, asked], stdin=pipe, stdout=pipe, process_group=0) as process:
            running.add(process)
            if stopped.is_set():
                process.kill()
            for line in process.stdout or ():
                if not line.endswith(b"\n"):
                    break  # it was killed while writing it
                match json.loads(line):
                    case [what, done, total] if progress:
                        shown[what] = total
                        progress(f"{label}: {what}", done, total)
                    case found:
                        row = SurveyRow.model_validate(found)
        running.discard(process)
        for what, total in shown.items():
            if progress:
                progress(f"{label}: {what}", total, total)
        with lock:
            if row or not stopped.is_set():
                finish((row or _fallen(entry.shown, process.returncode)).model_copy(update={"stated": entry.stated}))

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(analyze, *numbered) for numbered in enumerate(entries, 1)]):
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stopped.set()
        for process in tuple(running):
            process.kill()
        pool.shutdown()


def _analyze_on(cluster: Cluster, entries: Sequence[Entry], progress: Progress | None, finish: Finished) -> None:
    """Let the workers analyse the models, and hand over each row as it comes."""
    tasks = []
    for entry in entries:
        model, parent = locate(entry.request.model), entry.request.parent and locate(entry.request.parent)
        there = entry.request.model_copy(update={"model": model.name, "parent": parent and parent.name})
        tasks.append(Task(entry.shown.model, analyze_there, (there,), (model, *([parent] if parent else []))))

    def watch(place: int, what: str, done: int, total: int) -> None:
        if progress:
            progress(f"{place + 1}/{len(entries)} {entries[place].shown.model}: {what}", done, total)

    for place, found in cluster.run(tasks, watch if progress else None):
        entry = entries[place]
        if isinstance(found, MoEError):
            found = _failed(entry.shown, found)
        answer = found.answer and found.answer.model_copy(update={"model": entry.shown.model})
        finish(found.model_copy(update={"request": entry.shown, "stated": entry.stated, "answer": answer}))


def analyze_there(request: SurveyRequest, progress: Progress) -> SurveyRow:
    """The row of a model whose place is that on this machine, a worker."""
    return _analyze(Entry(request), progress)


def _failed(request: SurveyRequest, error: MoEError) -> SurveyRow:
    said = SurveyError(code=error.exit_code, message=error.message, hint=error.hint)
    return SurveyRow(request=request, stated=None, answer=None, error=said)


def _fallen(request: SurveyRequest, code: int) -> SurveyRow:
    """The row of a model whose process has ended without one."""
    how = f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"ended with code {code}"
    said = f"{request.model}: its process {how}"
    error = SurveyError(code=128 - code if code < 0 else code, message=said, hint="")
    return SurveyRow(request=request, stated=None, answer=None, error=error)


def work() -> None:
    """Analyse one model, in a process of its own that ends with the one that started it.

    The request comes as an argument; progress and the row go to stdout, a line of JSON each.
    """
    request, watched, bytes_allowed, threads = json.loads(sys.argv[1])
    Thread(target=_end_with_parent, daemon=True).start()
    out, lock, last = os.dup(1), Lock(), dict[str, float]()
    os.dup2(2, 1)  # nobody else writes between the lines

    def send(value: Any) -> None:
        with open(out, "w", encoding="ascii", closefd=False) as file:
            file.write(json.dumps(value) + "\n")

    def report(what: str, done: int, total: int) -> None:
        with lock:
            now = time.monotonic()
            if done >= total or now - last.get(what, 0.0) > PROGRESS_PAUSE:
                last[what] = now
                send([what, done, total])

    with memory_limit(bytes_allowed), thread_limit(threads):
        send(_analyze(Entry(SurveyRequest(**request)), report if watched else None).model_dump(mode="json"))


def _end_with_parent() -> None:
    """Wait until stdin is closed, as it is when the parent has ended in whatever way."""
    os.read(0, 1)
    os._exit(1)


def _analyze(entry: Entry, progress: Progress | None) -> SurveyRow:
    """A model's row, whatever happens."""
    request, answer, error = entry.request, None, None
    try:
        if request.budget is None:
            answer = _shorten(
                MoETypeService.analyze(
                    request.model,
                    layers=request.layers,
                    experts=request.experts,
                    parent=request.parent,
                    progress=progress,
                )
            )
        else:
            answer = _shorten_quick(
                MoETypeService.quick(request.model, layers=request.layers, budget=request.budget, progress=progress)
            )
    except MoEError as known:
        return _failed(entry.shown, known)
    except Exception as unknown:
        said = printable(f"{entry.shown.model}: {type(unknown).__name__}: {unknown}")
        error = SurveyError(code=1, message=said, hint="please report it")
    return SurveyRow(request=entry.shown, stated=None, answer=answer, error=error)


def _shorten(analysis: MoETypeAnalysis) -> SurveyAnswer:
    parents = [layer.lineage.parent.kept for layer in analysis.layers if layer.lineage.parent]
    return SurveyAnswer(
        **_shared(analysis),
        **{figure: analysis.mean_over_layers(figure) for figure in ("kept", "close", "chance")},
        layers=tuple(layer.layer for layer in analysis.layers),
        parent_kept=sum(parents) / len(parents) if parents else None,
    )


def _shorten_quick(analysis: MoEQuickAnalysis) -> SurveyAnswer:
    neurons = [layer.neurons for layer in analysis.layers]
    return SurveyAnswer(
        **_shared(analysis),
        kept=fsum(layer.kept * layer.neurons for layer in analysis.layers) / sum(neurons),
        chance=fsum(layer.chance * layer.neurons for layer in analysis.layers) / sum(neurons),
        layers=tuple(layer.layer for layer in analysis.layers),
    )


def _shared(analysis: MoETypeAnalysis | MoEQuickAnalysis) -> dict[str, Any]:
    """The fields that go into a row as they are."""
    names = SurveyAnswer.model_fields.keys() & type(analysis).model_fields.keys() - {"layers"}
    return {name: getattr(analysis, name) for name in names}
