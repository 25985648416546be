"""Overlay checkpoints on disk: a whole model whose routed experts are kept as base and factors, and the way back.

`write_overlay` makes such a folder out of any model that `Experts` reads, `read_overlay` opens one, `export_overlay`
turns it into a checkpoint of the original family again. Both writers stream: they hold no more than the base of one
layer and the experts that the worker threads are busy with.

`model_folder` writes the folders, so that they are whole or not there.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from shlex import quote
from threading import BoundedSemaphore
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest, ModelUnreadable, MoEError, UnknownFormat, printable
from .fidelity import MATRICES, Comparison, Trial, split
from .jobs.measure import WINDOW, mean_experts
from .jobs.resources import matrix_memory, worker_threads
from .model_folder import (
    CONFIG,
    PLAN,
    Item,
    Shard,
    ShardFile,
    Tensor,
    as_json,
    bf16,
    check_folder,
    copied,
    grouped,
    write_model,
)
from .numerics.low_rank import Factors, rebuild
from .progress import Progress
from .terms import ROLES
from .text import format_ranges
from .weights.checkpoint import INDEX, Checkpoint, TensorInfo
from .weights.codecs import NOT_DECODED, Part, Stored, recognise
from .weights.expert_layer import MAX_EXPERTS, ExpertLayer, stored_rows
from .weights.experts import Experts
from .weights.layouts import Layout, group_quantised, load_table
from .weights.model_config import find_quantization, without_quantization
from .weights.repositories.local import Folder
from .weights.repositories.source import QUANTIZATION_FILES, Repository
from .weights.stored import BIAS, Infos, open_stored, read_rows
from .weights.tensor_info import INTEGER_DTYPES, PLAIN_DTYPES

VERSION = 1
CARD = "README.md"

SMALL = 64 * 2**20  # bytes of a file beside the weights that is copied

BF16 = np.dtype(ml_dtypes.bfloat16)

# What loaders want beside the weights: tokenizers, templates, generation settings, a model's own code; and licences.
_WANTED = re.compile(r"[^/]+\.(?:json|jinja|model|txt|tiktoken|py)|(?:LICEN[CS]E|NOTICE)[^/]*")
_UNWANTED = re.compile(r"config\.json|plan\.json|.*\.index\.json|(?:hf_)?quant(?:ize)?_config\.json")
_OVERLAY = re.compile(r"(?P<prefix>.+\.(?P<layer>\d{1,9}))\.overlay\.(?P<role>gate|up|down)\.(?:base|left|right)")


def write_overlay(
    experts: Experts,
    ranks: Mapping[int, Mapping[str, int]],
    folder: Path,
    *,
    force: bool = False,
    progress: Progress,
    source: str = "",
    rule: str = "",
    trials: Mapping[int, Trial] | None = None,
    card: Callable[[], str] = str,
) -> None:
    """Write the model into `folder` with the routed experts of every layer in `ranks` (layer -> role -> rank) as an
    overlay, everything else as it is.

    The same call goes on with what a stopped one left in `<folder>.partial`. `force` replaces a folder that is there
    already, once the new one is whole, and gives up what another call left. `source` is what the model is called in
    the new folder's config and card, `rule` how the ranks were chosen. `trials` compare layers while they are written,
    but not those that a stopped call has written; `card` is asked for further text for the card at the end. `progress`
    is told bytes written.

    Raises InvalidRequest for ranks that do not fit the model, a folder that must not be written, a disk without room;
    ModelUnreadable where the model is broken.
    """
    checkpoint = experts.checkpoint
    if "overlay_config" in checkpoint.config:
        raise InvalidRequest("the model is an overlay already", "give the model that it was made from")
    layers = [_check_ranks(experts, number, ranks[number]) for number in sorted(ranks)]
    if not layers:
        raise InvalidRequest("no layer is given a rank", f"the MoE layers are {format_ranges(experts.layers)}")
    source = source or _name(checkpoint.repository)
    overlaid = [
        (layer, {role: ranks[layer.number][role] for role in layer.roles}, _templates(layer)) for layer in layers
    ]
    if len({str(names) for _, _, (_, names) in overlaid}) > 1:
        raise UnknownFormat("the layers' experts are not all named alike")

    others = [checkpoint.info(name) for name in sorted(set(checkpoint.names) - _replaced(layers))]
    shards = [
        *grouped([copied(checkpoint, info) for info in others], checkpoint, progress),
        *(
            Shard(
                _overlay_tensors(layer, own, prefix),
                partial(_fill_layer, layer, own, prefix, (trials or {}).get(layer.number), progress),
            )
            for layer, own, (prefix, _) in overlaid
        ),
    ]
    config = checkpoint.config
    if all(info.dtype in PLAIN_DTYPES for info in others):
        config = without_quantization(config)
    facts = {
        "version": VERSION,
        "source": source,
        "revision": checkpoint.repository.revision,
        "family": experts.family,
        "dtype": "bfloat16",
        "names": overlaid[0][2][1],
        "rule": rule,
        "layers": {str(layer.number): own for layer, own, _ in overlaid},
    }
    before = sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    after = sum(shard.nbytes for shard in shards)
    write_model(
        folder,
        shards,
        as_json({**config, "overlay_config": facts}),
        {
            **_small_files(checkpoint.repository),
            CARD: lambda: _card(facts, layers, before, after, card()).encode(),
        },
        {
            "writes": "overlay",
            "rule": rule,
            "ranks": facts["layers"],
            "checksum": _checksum(facts["layers"]),
            **_origin(checkpoint),
        },
        _place(checkpoint.repository),
        force,
        progress,
    )


def check_target(experts: Experts, folder: Path, layers: Iterable[int], force: bool) -> None:
    """Refuse, before any work, a folder that must not be written, or a disk without room for even the smallest overlay.

    Raises InvalidRequest, or UnknownFormat for a model whose other tensors can't be copied.
    """
    checkpoint = experts.checkpoint
    if checkpoint.is_gguf or checkpoint.is_split:
        what = "a GGUF" if checkpoint.is_gguf else "split over files for tensor parallelism"
        raise UnknownFormat(
            f"the model is {what}: an overlay of it can't be written", "use a plain safetensors version of it"
        )
    opened = [experts.layer(number) for number in layers]
    replaced = sum(checkpoint.info(name).nbytes for name in _replaced(opened))
    bases = sum(BF16.itemsize * prod(layer.shape(role)) for layer in opened for role in layer.roles)
    everything = sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    check_folder(folder, _place(checkpoint.repository), force, everything - replaced + bases)


def planned_ranks(experts: Experts, folder: Path, rule: str) -> dict[int, dict[str, int]] | None:
    """The ranks by this rule of a stopped `write_overlay` of the same model into `folder`, or None without one."""
    try:
        place = Path(os.path.realpath(folder))
        plan = json.loads((place.with_name(f"{place.name}.partial") / PLAN).read_bytes())
        ours = plan["checksum"] == _checksum(plan["ranks"]) and plan["rule"] == rule
        if ours and plan.items() >= _origin(experts.checkpoint).items():
            return {int(layer): own for layer, own in plan["ranks"].items()}
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        pass  # not what we have written
    return None


def _checksum(ranks: Any) -> str:
    """Tells the ranks of a plan from what somebody else has made of them."""
    return hashlib.sha256(json.dumps(ranks, sort_keys=True).encode()).hexdigest()[:16]


def _check_ranks(experts: Experts, number: int, ranks: Mapping[str, int]) -> ExpertLayer:
    """The layer, if these ranks fit it; raises InvalidRequest."""
    if number not in experts.layers:
        raise InvalidRequest(
            f"layer {number} is not an MoE layer", f"the MoE layers are {format_ranges(experts.layers)}"
        )
    layer = experts.layer(number)
    if ranks.keys() != set(layer.roles):
        wanted, given = (", ".join(sorted(roles)) or "nothing" for roles in (layer.roles, ranks))
        raise InvalidRequest(f"layer {number} needs ranks for {wanted}, and has them for {given}")
    for role, rank in ranks.items():
        most = min(layer.shape(role))
        if not isinstance(rank, int) or not 0 <= rank <= most:
            raise InvalidRequest(f"layer {number}: {role} can't have rank {rank}", f"give 0 to {most}")
    return layer


def _replaced(layers: Iterable[ExpertLayer]) -> set[str]:
    """Every tensor of the files that belongs to the layers' matrices, the scales of their inputs included."""
    tensors = (tensor for layer in layers for tensor in layer.tensors)
    return {name for tensor in tensors for own in tensor.parts for part, name in own.items() if part != BIAS}


def _templates(layer: ExpertLayer) -> tuple[str, dict[str, str]]:
    """The layer's prefix, and what a plain checkpoint calls its stored tensors below that, by their role."""
    places = {tensor.spec.role: tensor.place for tensor in layer.tensors}
    return next(iter(places.values()))[0], {role: name for role, (_, name) in places.items()}


def _overlay_tensors(layer: ExpertLayer, ranks: Mapping[str, int], prefix: str) -> tuple[Tensor, ...]:
    result = []
    for role, rank in ranks.items():
        out, inner = layer.shape(role)
        shapes = {"base": (out, inner), "left": (layer.count, out, rank), "right": (layer.count, rank, inner)}
        result += [bf16(f"{prefix}.overlay.{role}.{part}", shape) for part, shape in shapes.items()]
    return tuple(result)


def _fill_layer(
    layer: ExpertLayer,
    ranks: Mapping[str, int],
    prefix: str,
    trial: Trial | None,
    progress: Progress,
    shard: ShardFile,
) -> None:
    """Write base and factors of one layer: two passes over its experts, a few of them in memory.

    What has been written is compared with the originals where there is a trial for it, while they are at hand.
    """
    layer.prefetch(progress)
    bases: dict[str, NDArray[np.float32]] = {}

    def write(expert: int) -> Comparison | None:
        exact, rebuilt = layer.matrices(expert), {}
        for role, base in bases.items():
            matrix = exact[role].copy() if trial else exact.pop(role)
            factors = split(layer.number, role, matrix, base, ranks[role])
            for part, factor in (("left", factors.left), ("right", factors.right)):
                data = factor.astype(BF16).tobytes()
                shard.write(f"{prefix}.overlay.{role}.{part}", data, expert * len(data))
            if trial:
                rebuilt[role] = rebuild(base, factors)
        return trial.compare(expert, exact, rebuilt) if trial else None

    with worker_threads(layer, matrices=MATRICES if trial else len(layer.roles) + 2) as pool:
        for tensor in layer.tensors:
            for role, mean in mean_experts(tensor, pool).items():
                base = mean.astype(BF16)
                shard.write(f"{prefix}.overlay.{role}.base", base.tobytes())
                bases[role] = base.astype(np.float32)  # the deltas are those from the base that is stored
            del mean
        for comparison in pool.map(write, range(layer.count)):
            if trial and comparison:
                trial.add(comparison)


def _card(facts: Mapping[str, Any], layers: Sequence[ExpertLayer], before: int, after: int, text: str) -> str:
    source = printable(facts["source"])
    shown = _code_span(source)
    ranks = {
        number: " ".join(f"{role} {rank}" for role, rank in own.items()) for number, own in facts["layers"].items()
    }
    by_ranks: dict[str, list[int]] = {}
    for number, own in ranks.items():
        by_ranks.setdefault(own, []).append(int(number))
    first, own = next(iter(facts["layers"].items()))
    options = " ".join(f"--{role}-rank {rank}" for role, rank in own.items())
    lines = [
        f"# Overlay of {shown}",
        "",
        "The routed experts of this model are stored as one base and low-rank factors: expert = base + left @ right.",
        "Everything else is a copy, byte for byte. Loaders that do not know `overlay_config` find no experts here:",
        "export the folder to a standard checkpoint for them.",
        "",
        f"- source: {shown}" + (f", revision {facts['revision']}" if facts["revision"] else ""),
        *(
            f"- ranks of layer{'s' if len(numbers) > 1 else ''} {format_ranges(numbers)}: {own}"
            for own, numbers in by_ranks.items()
        ),
        f"- experts of these layers as they were: {sum(layer.stored_bytes for layer in layers):,} bytes",
        f"- the whole model: {before:,} bytes before, {after:,} after",
        "",
        "What an overlay of these ranks leaves of the source's experts is measured, layer by layer, by",
        "",
        f"    lazarus introspect moe-expert moe-overlay-verify -m {quote(source)} --layer {first} {options}",
    ]
    return "\n".join([*lines, *(["", text.strip()] if text.strip() else []), ""])


def _code_span(text: str) -> str:
    """A line as Markdown that shows it as it is: no link, picture or HTML in it is one."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


class OverlayCheckpoint:
    """An overlay checkpoint: base and factors by layer, role and expert, read when asked for.

    `layers` are the overlaid layers, `ranks` their ranks by role, `family` the row of the layout table that the
    experts came from, `source` and `revision` where they came from, `names` the tensors that are the overlay. Raises
    ModelUnreadable where a tensor is missing or not of the shape that the config tells.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        facts = self.config.get("overlay_config")
        if not isinstance(facts, dict):
            raise ModelUnreadable("config.json has no overlay_config: this is no overlay checkpoint")
        if facts.get("version") != VERSION:
            raise UnknownFormat(f"this overlay is of version {facts.get('version')}, and we read version {VERSION}")
        self.source, self.revision = facts.get("source"), facts.get("revision")
        row = next((layout for layout in load_table() if layout.name == facts.get("family")), None)
        if row is None:
            raise ModelUnreadable(f"overlay_config names the family {facts.get('family')}, which is not in our table")
        self.family = row.name
        self.ranks = _parse_ranks(facts.get("layers"), row)
        self.layers = tuple(self.ranks)
        self._names: Any = facts.get("names")
        found = [match for name in checkpoint.names if (match := _OVERLAY.fullmatch(name))]
        self.names = frozenset(match[0] for match in found)
        self._prefixes = {int(match["layer"]): match["prefix"] for match in found}
        if len({match["prefix"] for match in found}) > len(self._prefixes):
            raise ModelUnreadable("two tensors have the same layer and different names before it")
        if self._prefixes.keys() != self.ranks.keys():
            layer = min(self._prefixes.keys() ^ self.ranks.keys())
            where = "its tensors are missing" if layer in self.ranks else "overlay_config does not list it"
            raise ModelUnreadable(f"layer {layer} is half in the overlay: {where}", "make the overlay again")
        for layer, ranks in self.ranks.items():
            self._check(layer, ranks)

    def shape(self, layer: int, role: str) -> tuple[int, int]:
        """(out, in) of a role's matrices."""
        out, inner = self._info(layer, role, "base").shape
        return out, inner

    def count(self, layer: int) -> int:
        """The number of experts."""
        return self._info(layer, "down", "left").shape[0]

    def base(self, layer: int, role: str) -> NDArray[np.float32]:
        """[out, in], as stored."""
        return self._rows(layer, role, "base", 0, self.shape(layer, role)[0])

    def factors(self, layer: int, role: str, expert: int) -> Factors:
        """The low-rank delta of one expert, as stored."""
        (out, inner), rank = self.shape(layer, role), self.ranks[layer][role]
        if not 0 <= expert < self.count(layer):
            raise InvalidRequest(f"layer {layer} has no expert {expert}", f"there are 0 to {self.count(layer) - 1}")
        return Factors(
            self._rows(layer, role, "left", expert * out, (expert + 1) * out).reshape(out, rank),
            self._rows(layer, role, "right", expert * rank, (expert + 1) * rank).reshape(rank, inner),
        )

    def expert(self, layer: int, expert: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of one expert by role, base + left @ right, in canonical form."""
        roles = self.ranks.get(layer, {"down": 0})  # an unknown layer is refused below
        return {role: self.rebuilt(self.base(layer, role), layer, role, expert) for role in roles}

    def rebuilt(self, base: NDArray[np.float32], layer: int, role: str, expert: int) -> NDArray[np.float32]:
        """`base` + left @ right of one expert; raises ModelUnreadable where that is not finite in bfloat16."""
        factors = self.factors(layer, role, expert)
        with np.errstate(over="ignore", invalid="ignore"):
            matrix = rebuild(base, factors)
            is_finite = np.isfinite(matrix.astype(BF16)).all()
        if not is_finite:
            raise ModelUnreadable(
                f"layer {layer}, expert {expert}: the {role} projection holds NaN, infinity or numbers too large for "
                "bf16",
                "the overlay is broken: make it again",
            )
        return matrix

    def prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with, such as "model.layers.3"."""
        return self._prefixes[layer]

    def prefetch(self, layer: int, progress: Progress) -> None:
        """Bring the layer's overlay near in few, long reads."""
        infos = [self._info(layer, role, part) for role in self.ranks[layer] for part in ("base", "left", "right")]
        self.checkpoint.prefetch(((info.file, (info.start, info.stop)) for info in infos), progress)

    def template(self, role: str) -> str:
        """What a plain checkpoint calls a stored tensor, by its role there, below the layer's prefix."""
        name = self._names.get(role) if isinstance(self._names, dict) else None
        if not isinstance(name, str) or not name:
            raise ModelUnreadable(f"overlay_config does not say what the {role} projections were called")
        return name

    def _check(self, layer: int, ranks: Mapping[str, int]) -> None:
        count, (hidden, intermediate) = self.count(layer), self.shape(layer, "down")
        if not hidden * intermediate * count:
            raise ModelUnreadable(f"layer {layer} of the overlay has {count} experts of {intermediate} x {hidden}")
        if count > MAX_EXPERTS:  # at rank 0, no byte need stand behind such a number
            raise UnknownFormat(f"layer {layer} has {count} experts", f"we read up to {MAX_EXPERTS}")
        for role, rank in ranks.items():
            out, inner = (hidden, intermediate) if role == "down" else (intermediate, hidden)
            expected = {"base": (out, inner), "left": (count, out, rank), "right": (count, rank, inner)}
            for part, shape in expected.items():
                info = self._info(layer, role, part)
                if (info.dtype, info.shape) != ("BF16", shape):
                    raise ModelUnreadable(f"{info.name} is {info.dtype} {list(info.shape)}, not BF16 {list(shape)}")

    def _info(self, layer: int, role: str, part: str) -> TensorInfo:
        if layer not in self.ranks or role not in self.ranks[layer]:
            raise InvalidRequest(
                f"layer {layer} has no {role} overlay", f"the overlaid layers are {format_ranges(self.layers)}"
            )
        name = f"{self._prefixes[layer]}.overlay.{role}.{part}"
        if name not in self.names:
            raise ModelUnreadable(f"{name} is missing", "make the overlay again")
        info = self.checkpoint.info(name)
        if len(info.shape) != (2 if part == "base" else 3):
            raise ModelUnreadable(f"{name} has {len(info.shape)} axes")
        return info

    def _rows(self, layer: int, role: str, part: str, start: int, stop: int) -> NDArray[np.float32]:
        info = self._info(layer, role, part)
        if not info.nbytes:
            return np.zeros((stop - start, info.shape[-1]), np.float32)
        return self.checkpoint.rows(info, start, stop, len(info.shape) - 1).astype(np.float32)


def read_overlay(folder: Path) -> OverlayCheckpoint:
    """The overlay checkpoint in `folder`; raises ModelUnreadable where it is none or broken."""
    if not os.path.isdir(folder):
        raise ModelUnreadable(f"{folder}: no such folder", "give a folder that holds an overlay checkpoint")
    return OverlayCheckpoint(Checkpoint(Folder(folder)))


def _parse_ranks(layers: Any, row: Layout) -> dict[int, dict[str, int]]:
    """layer -> role -> rank out of a config; raises ModelUnreadable."""
    found = {role for tensor in row.tensors for role in tensor.roles}
    roles = [role for role in ROLES if role in found]
    result = {}
    for number, ranks in layers.items() if isinstance(layers, dict) else ():
        if not re.fullmatch(r"\d{1,9}", number) or not isinstance(ranks, dict) or ranks.keys() != set(roles):
            raise ModelUnreadable(f"overlay_config: layer {number} does not have a rank for each of {', '.join(roles)}")
        if not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
            raise ModelUnreadable(f"overlay_config: layer {number} has a rank that is none")
        result[int(number)] = {role: ranks[role] for role in roles}
    if not result:
        raise ModelUnreadable("overlay_config lists no layers with their ranks")
    return dict(sorted(result.items()))


def export_overlay(folder: Path, target: Path, *, force: bool = False, progress: Progress) -> None:
    """Write the overlay checkpoint in `folder` as a plain one of its original family, bf16, into `target`.

    Experts become base + left @ right under their original names and axes. Whatever else is quantised is decoded to
    bf16, too (experts of layers that are no overlay, the attention of an FP8 model), so that no quantization_config is
    needed. Resumes, replaces and raises as `write_overlay` does; UnknownFormat where a quantised tensor can't be
    decoded.
    """
    overlay = read_overlay(folder)
    checkpoint = overlay.checkpoint
    rows = {row.name: row for row in load_table()}
    layout = rows[rows[overlay.family].plain or overlay.family]
    names = sorted(set(checkpoint.names) - overlay.names)
    shards = [
        *grouped(_decoded(checkpoint, names, find_quantization(overlay.config)), checkpoint, progress),
        *(
            Shard(_expert_tensors(overlay, layer, layout), partial(_fill_experts, overlay, layer, layout, progress))
            for layer in overlay.layers
        ),
    ]
    written: set[str] = set()
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in written:
            raise ModelUnreadable(f"overlay_config: two tensors would be called {tensor.name}", "make it again")
        written.add(tensor.name)
    config = without_quantization(overlay.config)
    del config["overlay_config"]
    write_model(
        target,
        shards,
        as_json(config),
        _small_files(checkpoint.repository),
        {"writes": "export", **_origin(checkpoint)},
        _place(checkpoint.repository),
        force,
        progress,
    )


def _expert_tensors(overlay: OverlayCheckpoint, layer: int, layout: Layout) -> tuple[Tensor, ...]:
    """The experts' tensors of one layer in a plain checkpoint."""
    hidden, intermediate = overlay.shape(layer, "down")
    sizes = {"2": 2, "E": overlay.count(layer), "I": intermediate, "H": hidden}
    result = []
    for spec in layout.tensors:
        shape = tuple(prod(sizes[letter] for letter in group) for group in spec.axes.groups)
        name = f"{overlay.prefix(layer)}.{overlay.template(spec.role)}"
        if not spec.axes.stacked:
            if "{expert}" not in name:
                raise ModelUnreadable(f"overlay_config: {name} has no place for the expert's number")
            result += [bf16(name.replace("{expert}", str(expert)), shape) for expert in range(sizes["E"])]
        elif spec.axes.flattened:
            result.append(bf16(name, (sizes["E"] * shape[0], shape[1])))
        else:
            result.append(bf16(name, (sizes["E"], *shape)))
    return tuple(result)


def _fill_experts(overlay: OverlayCheckpoint, layer: int, layout: Layout, progress: Progress, shard: ShardFile) -> None:
    """Write the rebuilt experts of one layer."""
    overlay.prefetch(layer, progress)
    bases = {role: overlay.base(layer, role) for role in overlay.ranks[layer]}
    at_work = BoundedSemaphore(max(1, matrix_memory() // (4 * bases["down"].nbytes)))

    def put_together(expert: int) -> None:
        for spec in layout.tensors:
            with at_work:
                matrices = {role: overlay.rebuilt(bases[role], layer, role, expert).astype(BF16) for role in spec.roles}
                data = stored_rows(spec, matrices).tobytes()
                name = f"{overlay.prefix(layer)}.{overlay.template(spec.role)}".replace("{expert}", str(expert))
                shard.write(name, data, expert * len(data) if spec.axes.stacked else 0)

    with worker_threads() as pool:
        for _ in pool.map(put_together, range(overlay.count(layer))):
            pass


def _decoded(checkpoint: Checkpoint, names: Sequence[str], quantization: Mapping[str, Any]) -> list[Item]:
    """These tensors, the quantised ones among them decoded to bf16; raises UnknownFormat where that can't be done.

    Without a word on `quantization`, plain tensors are what they are, whatever their names, and so are integers that
    are no weight.
    """
    infos = {name: checkpoint.info(name) for name in names}
    groups = {
        plain: own
        for plain, own in group_quantised(names).items()
        if quantization or any(infos[name].dtype not in PLAIN_DTYPES for name in own.values())
    }
    used = {name for own in groups.values() for name in own.values()}
    items = [
        _decoded_item(checkpoint, plain, *open_stored(checkpoint, own, quantization)) for plain, own in groups.items()
    ]
    for name, info in infos.items():
        is_table = not quantization and info.dtype in INTEGER_DTYPES and not name.endswith(".weight")
        if name not in used and info.dtype not in PLAIN_DTYPES and not is_table:
            items.append(_decoded_item(checkpoint, name, *_open_alone(info, quantization), info.shape))
            used.add(name)
    modules = [item.tensor.name.removesuffix(".weight") for item in items]
    used |= {f"{module}{mark}{part}" for module in modules for mark in "._" for part in NOT_DECODED - {BIAS}}
    items += [copied(checkpoint, info) for name, info in infos.items() if name not in used]
    return sorted(items, key=lambda item: item.tensor.name)


def _open_alone(info: TensorInfo, quantization: Mapping[str, Any]) -> tuple[Infos, Stored]:
    """As `open_stored` for a tensor without scales, where a vector is seen as one row."""
    seen = info if len(info.shape) > 1 else replace(info, shape=(1, prod(info.shape)))
    try:
        return {"weight": seen}, recognise({"weight": Part(seen.dtype, seen.shape)}, quantization)
    except MoEError as error:
        raise type(error)(f"{info.name}: {error.message}", error.hint) from None


def _decoded_item(
    checkpoint: Checkpoint, name: str, infos: Infos, stored: Stored, shape: tuple[int, ...] | None = None
) -> Item:
    """A tensor that is decoded to bf16 when it is written; `shape` is that which it then has, its own if None."""
    if len(stored.shape) < 2:
        raise UnknownFormat(f"{name} is quantised, and no matrix: {list(stored.shape)}")
    *leading, rows, columns = stored.shape
    turned = (*leading, columns, rows) if _is_turned(infos, stored) else stored.shape
    ranges = tuple((info.file, (info.start, info.stop)) for info in infos.values())
    write = partial(_write_decoded, checkpoint, infos, stored, name)
    return Item(bf16(name, turned if shape is None else shape), ranges, write)


def _is_turned(infos: Infos, stored: Stored) -> bool:
    """Whether the plain form has its last two axes the other way round: so it is with the blocks of GPT-OSS."""
    return stored.transposed or "blocks" in infos


def _write_decoded(checkpoint: Checkpoint, infos: Infos, stored: Stored, name: str, shard: ShardFile) -> None:
    *leading, rows, columns = stored.shape
    if not prod(stored.shape):
        return
    granule = stored.granule
    turned = _is_turned(infos, stored)
    step = rows if turned else max(1, WINDOW // max(1, columns * granule)) * granule
    offset = 0
    for index in range(prod(leading)):
        for start in range(0, rows, step):
            values = read_rows(checkpoint, infos, stored, rows, start, min(start + step, rows), index)
            data = (values.T if turned else values).astype(BF16).tobytes()
            shard.write(name, data, offset)
            offset += len(data)


def _name(repository: Repository) -> str:
    return str(repository.path if isinstance(repository, Folder) else getattr(repository, "name", ""))


def _place(repository: Repository) -> Path | None:
    """The folder that a local model lies in."""
    return Path(os.path.realpath(repository.path)) if isinstance(repository, Folder) else None


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells this state of the model from any other: where it is, its revision, its files' sizes and times."""
    repository = checkpoint.repository
    place = _place(repository)
    names = {checkpoint.info(name).file for name in checkpoint.names} | (
        {CONFIG, INDEX, *QUANTIZATION_FILES} & repository.files
    )
    return {
        "version": VERSION,
        "source": str(place or _name(repository)),
        "revision": repository.revision,
        "files": {
            name: [repository.open(name).size, *([(place / name).stat().st_mtime_ns] if place else [])]
            for name in sorted(names)
        },
    }


def _small_files(repository: Repository) -> dict[str, bytes]:
    """The files that a loader wants beside config and weights."""
    result = {}
    for name in sorted(repository.files):
        if _WANTED.fullmatch(name) and not _UNWANTED.fullmatch(name):
            file = repository.open(name)
            if file.size <= SMALL:
                result[name] = file.read(0, file.size)
    return result
