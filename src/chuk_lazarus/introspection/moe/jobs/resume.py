"""Going over many layers: progress over all of them, and what is done is kept until the end.

A job that was interrupted goes on where it was. What it keeps lies in the cache folder, in a folder for each job, and
goes when the job is done.
"""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .... import __version__
from ..files import cache_folder, read_checked, write_checked
from ..progress import Progress
from ..weights.checkpoint import Checkpoint
from ..weights.expert_layer import ExpertLayer
from ..weights.repositories.local import Folder

LEFT = 30 * 24 * 3600  # seconds after which nobody comes back to an interrupted job

Found = TypeVar("Found")


class ResumableLayers:
    """One job over several layers, known by what it does (`job`, JSON) and by the state of the model's files."""

    def __init__(
        self, checkpoint: Checkpoint, job: Sequence[Any], layers: Sequence[ExpertLayer], progress: Progress
    ) -> None:
        self._progress, self._many = progress, len(layers) > 1
        self._total, self._done = sum(layer.stored_bytes for layer in layers), 0
        self._under_way: dict[int, int] = {}  # bytes of each layer that is not done
        known = [__version__, job, [layer.number for layer in layers], describe_state(checkpoint)]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        self._folder = cache_folder() / "sweeps" / digest[:32]

    def layer(
        self,
        layer: ExpertLayer,
        find: Callable[[Progress], Found],
        write: Callable[[Found], str],
        read: Callable[[str], Found],
    ) -> Found:
        """What `find` finds of a layer, unless an earlier run of the same job has found it.

        `write` makes text of it, and `read` the thing of the text, or raises ValueError.
        """
        found = self._recall(layer, read)
        if found is None:
            found = find(self._watch(layer))
            self._keep(layer, write(found))
        self._end(layer)
        return found

    def layers(
        self,
        layers: Sequence[ExpertLayer],
        find: Callable[[Sequence[ExpertLayer], Sequence[Progress]], Iterable[tuple[int, Found]]],
        write: Callable[[Found], str],
        read: Callable[[str], Found],
    ) -> list[Found]:
        """What is found of each layer: `find` is asked for those that no earlier run of the same job has found.

        It gets these layers and the progress of each, and gives, in any order, the place of a layer among them and what
        it has found. `write` and `read` are as for `layer`.
        """
        known = {one.number: found for one in layers if (found := self._recall(one, read)) is not None}
        self._done += sum(one.stored_bytes for one in layers if one.number in known)
        self._tell()
        due = [one for one in layers if one.number not in known]
        for place, found in find(due, [self._watch(one) for one in due]):
            one = due[place]
            self._keep(one, write(found))
            known[one.number] = found
            self._end(one)
        return [known[one.number] for one in layers]

    def end(self) -> None:
        """Forget what was kept: the job is done. What others have left for a month goes, too."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in self._folder.parent.iterdir():
                is_ours = re.fullmatch("[0-9a-f]{32}", folder.name)
                if is_ours and folder.stat().st_mtime < time.time() - LEFT:
                    shutil.rmtree(folder, ignore_errors=True)

    def _recall(self, layer: ExpertLayer, read: Callable[[str], Found]) -> Found | None:
        if self._many:
            with contextlib.suppress(OSError, ValueError):
                return read(read_checked(self._place(layer)))
        return None

    def _keep(self, layer: ExpertLayer, text: str) -> None:
        if self._many:
            with contextlib.suppress(OSError):  # a full disk costs the way back, and nothing else
                write_checked(self._place(layer), text)

    def _end(self, layer: ExpertLayer) -> None:
        self._under_way.pop(layer.number, None)
        self._done += layer.stored_bytes
        self._tell()

    def _place(self, layer: ExpertLayer) -> Path:
        return self._folder / f"{layer.number}.json"

    def _tell(self) -> None:
        if self._many:
            self._progress("all layers", self._done + sum(self._under_way.values()), self._total)

    def _watch(self, layer: ExpertLayer) -> Progress:
        """Progress of a layer that moves that of all layers, too."""

        def report(what: str, done: int, total: int) -> None:
            self._progress(what, done, total)
            if total and what.endswith(f"layer {layer.number}"):
                self._under_way[layer.number] = layer.stored_bytes * done // total
                self._tell()

        return report


def describe_state(checkpoint: Checkpoint) -> list[Any]:
    """What tells this state of a model from any other: a commit on the Hub, or the files' sizes and times here."""
    repository = checkpoint.repository
    if not isinstance(repository, Folder):
        return [getattr(repository, "name", ""), repository.revision, sorted(repository.files)]
    place = Path(repository.path).resolve()
    state: dict[str, list[int]] = {}
    for name in sorted(repository.files):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            found = (place / name).stat()
            state[name] = [found.st_size, found.st_mtime_ns]
    return [str(place), state]
