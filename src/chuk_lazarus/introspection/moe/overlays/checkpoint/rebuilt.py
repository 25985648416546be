"""An overlay checkpoint read as the standard checkpoint that it stands for: experts are rebuilt when they are read.

So an overlay can be exported, tried or analysed like a standard checkpoint. Only the bases of one layer are kept in
memory and, for each thread, its last expert.
"""

import hashlib
import threading
from bisect import bisect
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...progress import Progress
from ...terms import OVERLAY_CONFIG
from ...weights.checkpoint import Checkpoint
from ...weights.expert_layer import stored_rows
from ...weights.fingerprint import fingerprint
from ...weights.layouts import Layout, StoredTensor
from ...weights.repositories.source import CONFIG, INDEX, ByteSource, Range
from ..quantisation import BF16
from .export import expert_tensors, plain_layout, stored_name
from .folder import Shard, encode_json
from .model_file import forget_model_file
from .reader import OverlayCheckpoint

Bases = dict[str, NDArray[np.float32]]


def rebuilt_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The standard checkpoint that a checkpoint stands for: itself, unless it is an overlay.

    Raises ModelUnreadable or UnknownFormat for an overlay that is broken.
    """
    if OVERLAY_CONFIG not in checkpoint.config:
        return checkpoint
    return Checkpoint(RebuiltRepository(OverlayCheckpoint(checkpoint)))


class RebuiltRepository:
    """The files of the standard checkpoint: those of the overlay with all else, and one for the experts of each layer.

    The names of the latter change when the overlay does.
    """

    def __init__(self, overlay: OverlayCheckpoint) -> None:
        self._overlay, self._layout = overlay, plain_layout(overlay)
        self._repository = overlay.checkpoint.repository
        self.name, self.folder = self._repository.name, self._repository.folder
        self.revision = self._repository.revision
        digest = hashlib.sha256(encode_json(fingerprint(overlay.checkpoint))).hexdigest()[:16]
        self._layers = {f"rebuilt-{digest}-{layer:05d}.safetensors": layer for layer in overlay.layers}
        self._bases: tuple[int, Bases] = (-1, {})
        self._lock = threading.Lock()
        self._texts = self._make_texts()
        weights = {file for file in self._repository.files if file.endswith(".safetensors")}
        others = self._repository.files - weights - {CONFIG, INDEX}
        self.files = frozenset(others | self._rest_files | self._texts.keys() | self._layers.keys())

    @property
    def bytes_fetched(self) -> int:
        """The number of bytes that came over the network so far."""
        return self._repository.bytes_fetched

    def open(self, filename: str) -> ByteSource:
        """A file, whether it is there or made when it is read."""
        if filename in self._layers:
            return _RebuiltLayer(self._overlay, self._layers[filename], self._layout, self)
        if filename in self._texts:
            return _Bytes(self._texts[filename])
        return self._repository.open(filename)

    def list_files(self) -> frozenset[str]:
        """The files, those in subfolders included."""
        return self._repository.list_files()

    def may_copy(self, filename: str) -> bool:
        """As that of the overlay's repository; what is made here holds nothing private."""
        return filename in self._layers or self._repository.may_copy(filename)

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        """Fetch the wanted ranges, or the overlays of layers whose experts are wanted."""
        for file in wanted.keys() & self._layers.keys():
            self._overlay.prefetch(self._layers[file], progress)
        self._repository.prefetch({file: wanted[file] for file in wanted.keys() - self._layers.keys()}, progress)

    def bases(self, layer: int) -> Bases:
        """The bases of a layer by role; those of one layer are kept."""
        with self._lock:
            if self._bases[0] != layer:
                self._bases = (layer, {role: self._overlay.base(layer, role) for role in self._overlay.roles(layer)})
            return self._bases[1]

    @property
    def _rest_files(self) -> set[str]:
        checkpoint = self._overlay.checkpoint
        return {checkpoint.info(name).file for name in checkpoint.names if name not in self._overlay.names}

    def _make_texts(self) -> dict[str, bytes]:
        """The config and the index of the standard checkpoint."""
        overlay = self._overlay
        checkpoint = overlay.checkpoint
        places = {name: checkpoint.info(name).file for name in checkpoint.names if name not in overlay.names}
        for file, layer in self._layers.items():
            places |= dict.fromkeys((tensor.name for tensor in expert_tensors(overlay, layer, self._layout)), file)
        config = forget_model_file(checkpoint.config)
        del config[OVERLAY_CONFIG]
        index = {INDEX: encode_json({"weight_map": places})}
        return {**index, CONFIG: encode_json(config)} if config else index


class _RebuiltLayer:
    """A file with the experts of one layer, which are rebuilt when they are read; several threads may read it."""

    def __init__(self, overlay: OverlayCheckpoint, layer: int, layout: Layout, repository: RebuiltRepository) -> None:
        self._overlay, self._layer, self._repository = overlay, layer, repository
        shard = Shard(expert_tensors(overlay, layer, layout), lambda file: None)
        self._header = shard.header
        self.size = len(self._header) + shard.nbytes
        slots = []
        for spec in layout.tensors:
            nbytes = 2 * sum(prod(overlay.shape(layer, role)) for role in spec.roles)
            for expert in range(overlay.count(layer)):
                start = shard.offsets[stored_name(overlay, layer, spec, expert)]
                slots.append((start + (expert * nbytes if spec.axes.stacked else 0), spec, expert))
        self._slots = sorted(slots, key=lambda slot: slot[0])
        self._starts = [start for start, _, _ in self._slots]
        self._last = threading.local()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); raises ModelUnreadable where an expert is not finite."""
        parts = [self._header[start:stop]]
        place = max(start, len(self._header))
        while place < stop:
            number = bisect(self._starts, place) - 1
            first, spec, expert = self._slots[number]
            data = self._expert(number, spec, expert)
            parts.append(data[place - first : stop - first])
            place = first + len(data)
        return parts[1] if len(parts) == 2 and not parts[0] else b"".join(parts)

    def _expert(self, number: int, spec: StoredTensor, expert: int) -> bytes:
        """What one expert has in a stored tensor; each thread keeps the last one, which it reads part by part."""
        if getattr(self._last, "number", None) != number:
            bases = self._repository.bases(self._layer)
            matrices = {
                role: self._overlay.rebuild(bases[role], self._layer, role, expert).astype(BF16) for role in spec.roles
            }
            self._last.number, self._last.data = number, stored_rows(spec, matrices).tobytes()
        data: bytes = self._last.data
        return data


class _Bytes:
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""
        return self._data[start:stop]
