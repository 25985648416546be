"""Checkpoints of the layout table's rows, made in memory, with every read noted."""

import json
import re
import struct
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from inspect import getfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chuk_lazarus.introspection.moe.progress import Progress
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.layouts import Layout, load_table
from chuk_lazarus.introspection.moe.weights.repositories.source import Range

Array = NDArray[Any]
Matrices = dict[str, NDArray[np.float32]]  # role -> [experts, out, in]
TABLE = {layout.name: layout for layout in load_table()}
DTYPES = {"<f4": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "|u1": "U8", "<u4": "U32", "<i4": "I32"}


@dataclass
class Noted:
    """A file that notes what is read of it."""

    name: str
    size: int
    get: Callable[[int, int], bytes]
    reads: list[tuple[str, int, int]]

    def read(self, start: int, stop: int) -> bytes:
        self.reads.append((self.name, start, stop))
        return self.get(start, stop)


@dataclass
class Memory:
    """A repository of files in memory."""

    contents: dict[str, bytes]
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    revision: str | None = None
    bytes_fetched: int = 0

    @property
    def files(self) -> frozenset[str]:
        return frozenset(self.contents)

    def open(self, filename: str) -> Noted:
        data = self.contents[filename]
        self.reads.append((filename, 0, 0))
        return Noted(filename, len(data), lambda start, stop: data[start:stop], self.reads)

    def prefetch(self, wanted: Mapping[str, Sequence[Range]], progress: Progress) -> None:
        pass


def load_folder(folder: Path) -> Memory:
    return Memory({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"})


def safetensors(tensors: Mapping[str, Array]) -> bytes:
    entries, data = {}, b""
    for name, array in tensors.items():
        dtype = DTYPES[array.dtype.name if array.dtype.name in DTYPES else array.dtype.str]
        start, data = len(data), data + array.tobytes()
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(data)]}
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def make(tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> Memory:
    contents = {"model.safetensors": safetensors(tensors)}
    return Memory(contents | ({} if config is None else {"config.json": json.dumps(config).encode()}))


def open_made(tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> Experts:
    return Experts(Checkpoint(make(tensors, config)))


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def random_experts(experts: int, intermediate: int, hidden: int, seed: int = 0) -> Matrices:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    return {role: rng.standard_normal((experts, *shape)).astype(np.float32) for role, shape in shapes.items()}


def store(axes: str, role: str, matrices: Matrices) -> Array:
    """The tensor with the given axes, all experts in front where it has no E."""
    first, _, second = role.partition("_")
    named = "2EIH" if second else {"gate": "EIH", "up": "EIH", "down": "EHI"}[role]
    array = np.stack([matrices[first], matrices[second]]) if second else matrices[role]
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", axes)]
    if "E" not in axes:
        groups.insert(0, ["E"])
    sizes = dict(zip(named, array.shape, strict=True))
    array = array.transpose([named.index(letter) for group in groups for letter in group])
    return np.ascontiguousarray(array.reshape([prod(sizes[letter] for letter in group) for group in groups]))


@cache
def axes_of_rows() -> dict[str, dict[str, str]]:
    """The axis strings of each row, by role, from the table's text: not as our own parser understands them."""
    table = tomllib.loads(Path(getfile(Layout)).with_name("layouts.toml").read_text())["layout"]
    return {entry["name"]: {t["role"]: t["axes"] for t in entry["tensors"]} for entry in table}


def row_axes(row: Layout) -> dict[str, str]:
    return axes_of_rows()[row.name]


def roles_of(row: Layout) -> set[str]:
    return {role for tensor in row.tensors for role in tensor.roles}


def some_type(row: Layout) -> str:
    return min(row.model_types, default="mystery")


def as_stored(row: Layout, matrices: Matrices, prefix: str = "model.layers.0.", block: int = 0) -> dict[str, Array]:
    """The tensors of one layer, named and laid out as the row says; `block` picks among its names."""
    tensors: dict[str, Array] = {}
    for tensor in row.tensors:
        array = store(row_axes(row)[tensor.role], tensor.role, matrices)
        name = prefix + tensor.names[block % len(tensor.names)]
        suffix = ".weight" if "{expert}" in name or name.endswith(("_linear", "fc1", "fc2")) else ""
        if "{expert}" in name:
            tensors |= {name.replace("{expert}", str(i)) + suffix: each for i, each in enumerate(array)}
        else:
            tensors[name + suffix] = array
    experts, hidden, _ = matrices["down"].shape
    routers = (
        ("mlp.router.layer", "ffn.router.layer", "block_sparse_moe.gate") if row.is_flattened or row.routed_only else ()
    )
    return tensors | {f"{prefix}{router}.weight": np.zeros((experts, hidden), "<f4") for router in routers}
