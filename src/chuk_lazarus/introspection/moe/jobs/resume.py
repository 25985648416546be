"""Work on many layers: progress over all of them, and results that are kept until the end.

An interrupted job continues where it stopped. Its results are in the cache folder, in one folder per job, which is
deleted when the job is done.
"""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from chuk_lazarus import __version__

from ..files import cache_folder, read_checked, write_checked
from ..progress import Progress
from ..weights.checkpoint import Checkpoint
from ..weights.expert_layer import ExpertLayer
from ..weights.fingerprint import fingerprint

LEFT = 30 * 24 * 3600  # seconds after which an interrupted job is taken as abandoned

Result = TypeVar("Result")


class ResumableLayers:
    """One job over several layers, identified by what it does (`job`, JSON) and by the state of the model's files."""

    def __init__(
        self, checkpoint: Checkpoint, job: Sequence[Any], layers: Sequence[ExpertLayer], progress: Progress
    ) -> None:
        self._progress, self._layers = progress, layers
        self._total, self._done = sum(layer.stored_bytes for layer in layers), 0
        self._under_way: dict[int, int] = {}  # bytes of each layer that is not done
        known = [__version__, job, [layer.number for layer in layers], fingerprint(checkpoint)]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        self._folder = cache_folder() / "sweeps" / digest[:32]

    def each(self, kind: TypeAdapter[Result], measure: Callable[[ExpertLayer, Progress], Result]) -> list[Result]:
        """The result of `measure` for each layer, or that of an earlier run of the same job.

        `kind` is the type of a result; it writes and reads the kept ones.
        """

        def measure_all(due: Sequence[ExpertLayer], watched: Sequence[Progress]) -> Iterator[tuple[int, Result]]:
            for place, layer in enumerate(due):
                yield place, measure(layer, watched[place])

        return self.all(kind, measure_all)

    def all(
        self,
        kind: TypeAdapter[Result],
        measure: Callable[[Sequence[ExpertLayer], Sequence[Progress]], Iterable[tuple[int, Result]]],
    ) -> list[Result]:
        """Like `each`, but `measure` is called once, for all layers without a result of an earlier run.

        It gets these layers and the progress of each, and yields, in any order, the place of a layer among them and its
        result.
        """
        results = {layer.number: kept for layer in self._layers if (kept := self._read_kept(kind, layer)) is not None}
        self._done += sum(layer.stored_bytes for layer in self._layers if layer.number in results)
        self._tell()
        due = [layer for layer in self._layers if layer.number not in results]
        for place, result in measure(due, [self._watch(layer) for layer in due]):
            layer = due[place]
            results[layer.number] = result
            if self._is_kept:
                with contextlib.suppress(OSError):  # with a full disk the job can't be resumed, but it can finish
                    write_checked(self._path(layer), kind.dump_json(result).decode())
            self._under_way.pop(layer.number, None)
            self._done += layer.stored_bytes
            self._tell()
        return [results[layer.number] for layer in self._layers]

    def end(self) -> None:
        """Delete the kept results, because the job is done; also those of other jobs that are a month old."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in self._folder.parent.iterdir():
                is_ours = re.fullmatch("[0-9a-f]{32}", folder.name)
                if is_ours and folder.stat().st_mtime < time.time() - LEFT:
                    shutil.rmtree(folder, ignore_errors=True)

    def file_of(self, layer: ExpertLayer) -> Path:
        """The path of a file that the job may keep for a layer; it is deleted with the results."""
        return self._folder / f"{layer.number}.data"

    @property
    def _is_kept(self) -> bool:
        """Whether results are kept: a single layer is soon measured again."""
        return len(self._layers) > 1

    def _read_kept(self, kind: TypeAdapter[Result], layer: ExpertLayer) -> Result | None:
        if self._is_kept:
            with contextlib.suppress(OSError, ValueError):
                return kind.validate_json(read_checked(self._path(layer)))
        return None

    def _path(self, layer: ExpertLayer) -> Path:
        return self._folder / f"{layer.number}.json"

    def _tell(self) -> None:
        if self._is_kept:
            self._progress("all layers", self._done + sum(self._under_way.values()), self._total)

    def _watch(self, layer: ExpertLayer) -> Progress:
        """Progress of a layer that moves that of all layers, too."""

        def report(what: str, done: int, total: int) -> None:
            self._progress(what, done, total)
            if total and what.endswith(f"layer {layer.number}"):
                self._under_way[layer.number] = layer.stored_bytes * done // total
                self._tell()

        return report
