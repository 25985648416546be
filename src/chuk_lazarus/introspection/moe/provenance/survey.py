"""A survey: many models, each analysed in its own process, or by a worker on another machine.

A model that is too large for the memory, or that crashes, loses only its own answer, and an interrupted survey ends at
once.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from math import fsum
from pathlib import Path
from statistics import fmean
from threading import Event, Lock, Thread
from typing import Any

from ..errors import InvalidRequest, MoEError, printable
from ..jobs.cluster import Cluster, Task, connect, locate
from ..jobs.resources import Resources, memory_limit, thread_limit
from ..progress import Progress
from ..reports import (
    MoEQuickAnalysis,
    MoETypeAnalysis,
    MoETypeSurvey,
    SurveyAnswer,
    SurveyError,
    SurveyRequest,
    SurveyRow,
)
from ..text import parse_size
from .analysis import analyze, choose_sample
from .quick import analyze_quickly
from .survey_lists import Entry, read_entries, spell_layers
from .survey_rows import append_row, open_rows, read_rows

# -P: a file in the current folder, which somebody else may have put there, must not be imported instead of a library
WORKER = (sys.executable, "-P", "-c", f"from {__name__} import work; work()")
PROGRESS_PAUSE = 0.1  # seconds between two reports of a process on the same work

Finished = Callable[[SurveyRow], None]
Analysed = Callable[[SurveyRow, MoETypeAnalysis], None]
Outcome = tuple[SurveyRow, MoETypeAnalysis | None]  # of a model; an analysis only where all of it is wanted


def survey(
    models: Iterable[str | SurveyRequest],
    layer: int | None,
    layers: Sequence[int] | str | None,
    experts: int | None,
    budget: int | str | None,
    jobs: int,
    dask: str | None,
    file: str | Path | None,
    progress: Progress | None,
    finished: Finished | None,
    analysed: Analysed | None = None,
) -> MoETypeSurvey:
    """A row for each of the models; those that `file` already has an answer to are not analysed again.

    `analysed` is called with each new row whose answer is a full analysis, and with that analysis.
    """
    if jobs < 1:
        raise InvalidRequest("the number of jobs must be at least 1")
    if jobs > 1 and dask:
        raise InvalidRequest("both jobs and dask are given", "give one of the two")
    size = parse_size(budget, "the budget") if isinstance(budget, str) else budget
    entries = read_entries(models, spell_layers(layer, layers), experts, size)
    path = Path(file) if file else None
    rows: dict[SurveyRequest, SurveyRow] = read_rows(path) if path else {}
    due = [entry for entry in entries if not ((row := rows.get(entry.shown)) and row.answer)]
    with connect(dask) as cluster, open_rows(path) as lines:

        def finish(row: SurveyRow, analysis: MoETypeAnalysis | None) -> None:
            if analysed and analysis:
                analysed(row, analysis)
            if rows.get(row.request) != row:  # a failure that has not changed need not be said again
                append_row(lines, row)
            rows[row.request] = row
            if finished:
                finished(row)

        if cluster:
            _analyze_on_cluster(cluster, due, progress, finish, bool(analysed))
        else:
            _analyze_in_processes(due, jobs, progress, finish, bool(analysed))
    return MoETypeSurvey(rows=tuple(rows[entry.shown].model_copy(update={"stated": entry.stated}) for entry in entries))


def _analyze_in_processes(
    entries: Sequence[Entry],
    jobs: int,
    progress: Progress | None,
    finish: Callable[[SurveyRow, MoETypeAnalysis | None], None],
    whole: bool,
) -> None:
    """Analyse the models in processes, `jobs` at a time, and hand over each row when it is done.

    Rows are handed over by the threads that wait for them, one at a time: an interruption stops the main thread, but
    never these.
    """
    running: set[subprocess.Popen[bytes]] = set()
    stopped, lock = Event(), Lock()
    jobs = max(1, min(jobs, len(entries)))
    share = Resources.current().share(jobs)

    def analyze_one(number: int, entry: Entry) -> None:
        label = f"{number}/{len(entries)} {entry.shown.model}"
        asked = json.dumps([entry.request.model_dump(), bool(progress), share.memory, share.threads, whole])
        row, analysis, shown, pipe = None, None, {}, subprocess.PIPE
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
                    case [fields, found]:
                        row = SurveyRow.model_validate(fields)
                        analysis = found and MoETypeAnalysis.model_validate(found)
        running.discard(process)
        for what, total in shown.items():
            if progress:
                progress(f"{label}: {what}", total, total)
        with lock:
            if row or not stopped.is_set():
                row = row or _fallen(entry.shown, process.returncode)
                finish(row.model_copy(update={"stated": entry.stated}), analysis)

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(analyze_one, *numbered) for numbered in enumerate(entries, 1)]):
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stopped.set()
        for process in tuple(running):
            process.kill()
        pool.shutdown()


def _analyze_on_cluster(
    cluster: Cluster,
    entries: Sequence[Entry],
    progress: Progress | None,
    finish: Callable[[SurveyRow, MoETypeAnalysis | None], None],
    whole: bool,
) -> None:
    """Let the workers analyse the models, and hand over each row as it comes."""
    tasks = []
    for entry in entries:
        model, parent = locate(entry.request.model), entry.request.parent and locate(entry.request.parent)
        there = entry.request.model_copy(update={"model": model.name, "parent": parent and parent.name})
        tasks.append(
            Task(entry.shown.model, analyze_model_on_worker, (there, whole), (model, *([parent] if parent else [])))
        )

    def watch(place: int, what: str, done: int, total: int) -> None:
        if progress:
            progress(f"{place + 1}/{len(entries)} {entries[place].shown.model}: {what}", done, total)

    for place, outcome in cluster.run(tasks, watch if progress else None):
        entry = entries[place]
        row, analysis = (_failed(entry.shown, outcome), None) if isinstance(outcome, MoEError) else outcome
        name = {"model": entry.shown.model}
        answer, analysis = (
            row.answer and row.answer.model_copy(update=name),
            analysis and analysis.model_copy(update=name),
        )
        finish(row.model_copy(update={"request": entry.shown, "stated": entry.stated, "answer": answer}), analysis)


def analyze_model_on_worker(request: SurveyRequest, whole: bool, progress: Progress) -> Outcome:
    """The row of a model at this place on the worker and, if requested, its analysis."""
    return _answer(Entry(request), progress, whole)


def explain_failure(error: Exception, request: SurveyRequest) -> SurveyError:
    """Why there is no answer: an error that the user can act on, or a bug of ours."""
    if isinstance(error, MoEError):
        return SurveyError(code=error.exit_code, message=error.message, hint=error.hint)
    message = printable(f"{request.model}: {type(error).__name__}: {error}")
    return SurveyError(code=1, message=message, hint="please report it")


def _failed(request: SurveyRequest, error: Exception) -> SurveyRow:
    return SurveyRow(request=request, stated=None, answer=None, error=explain_failure(error, request))


def _fallen(request: SurveyRequest, code: int) -> SurveyRow:
    """The row of a model whose process ended without one."""
    how = (
        f"was killed by signal {-code}, perhaps because it ran out of memory" if code < 0 else f"ended with code {code}"
    )
    message = f"{request.model}: its process {how}"
    error = SurveyError(code=128 - code if code < 0 else code, message=message, hint="")
    return SurveyRow(request=request, stated=None, answer=None, error=error)


def work() -> None:
    """Analyse one model, in a separate process that ends with its parent.

    The request comes as an argument; progress and the row go to stdout, one line of JSON each.
    """
    request, watched, bytes_allowed, threads, whole = json.loads(sys.argv[1])
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
        row, analysis = _answer(Entry(SurveyRequest(**request)), report if watched else None, whole)
        send([row.model_dump(mode="json"), analysis and analysis.model_dump(mode="json")])


def _end_with_parent() -> None:
    """Wait until stdin is closed, which happens when the parent ends."""
    os.read(0, 1)
    os._exit(1)


def _answer(entry: Entry, progress: Progress | None, whole: bool) -> Outcome:
    """A model's row, with its answer or with the error, and if all is wanted, its analysis."""
    request, analysis = entry.request, None
    try:
        if request.budget is None:
            sample = choose_sample(request.experts)
            analysis = analyze(request.model, None, request.layers, sample, request.parent, progress=progress)
            answer = _shorten(analysis)
        else:
            quick = analyze_quickly(request.model, layers=request.layers, budget=request.budget, progress=progress)
            answer = _shorten_quick(quick)
    except Exception as error:
        return _failed(entry.shown, error), None
    return SurveyRow(request=entry.shown, stated=None, answer=answer, error=None), analysis if whole else None


def _shorten(analysis: MoETypeAnalysis) -> SurveyAnswer:
    parents = [layer.lineage.parent.kept for layer in analysis.layers if layer.lineage.parent]
    return SurveyAnswer(
        **_shared(analysis),
        **{figure: analysis.mean_over_layers(figure) for figure in ("kept", "close", "chance")},
        shared=fmean(layer.lineage.sharing.shared for layer in analysis.layers),
        strong=fmean(layer.lineage.sharing.strong for layer in analysis.layers),
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
