"""A model written as an overlay checkpoint.

It streams: no more than the base of one layer and the experts that the worker threads are busy with are in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidRequest, UnknownFormat
from ...jobs.measure import mean_experts
from ...jobs.resources import Resources
from ...numerics.low_rank import rebuild
from ...progress import Progress
from ...text import format_ranges
from ...weights.expert_layer import ExpertLayer
from ...weights.experts import Experts
from ...weights.fingerprint import fingerprint
from ...weights.stored import BIAS
from ...weights.tensor_info import PLAIN_DTYPES
from ..fidelity import MATRICES, ExpertErrors, FidelityCheck, split_delta
from ..quantisation import BF16
from .beside import small_files
from .card import CARD, write_card
from .folder import PLAN, Shard, ShardFile, Tensor, as_json, bf16, check_folder, copied, grouped, write_model
from .format import VERSION


def write_overlay(
    experts: Experts,
    ranks: Mapping[int, Mapping[str, int]],
    folder: Path,
    *,
    force: bool = False,
    resources: Resources,
    progress: Progress,
    source: str = "",
    rule: str = "",
    checks: Mapping[int, FidelityCheck] | None = None,
    card: Callable[[], str] = str,
) -> None:
    """Write the model into `folder` with the routed experts of every layer in `ranks` (layer -> role -> rank) as an
    overlay, everything else as it is.

    The same call goes on with what a stopped one left in `<folder>.partial`. `force` replaces a folder that is there
    already, once the new one is whole, and gives up what another call left. `source` is what the model is called in
    the new folder's config and card, `rule` how the ranks were chosen. `checks` compare layers while they are written,
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
    source = source or checkpoint.repository.name
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
                partial(_fill_layer, layer, own, prefix, (checks or {}).get(layer.number), resources, progress),
            )
            for layer, own, (prefix, _) in overlaid
        ),
    ]
    config = checkpoint.config
    if all(info.dtype in PLAIN_DTYPES for info in others):
        config = checkpoint.model_config.without_quantization()
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
            **small_files(checkpoint.repository),
            CARD: lambda: write_card(facts, layers, before, after, card()).encode(),
        },
        {
            "writes": "overlay",
            "rule": rule,
            "ranks": facts["layers"],
            "checksum": _checksum(facts["layers"]),
            "version": VERSION,
            **fingerprint(checkpoint),
        },
        checkpoint.repository.folder,
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
    check_folder(folder, checkpoint.repository.folder, force, everything - replaced + bases)


def planned_ranks(experts: Experts, folder: Path, rule: str) -> dict[int, dict[str, int]] | None:
    """The ranks by this rule of a stopped `write_overlay` of the same model into `folder`, or None without one."""
    try:
        place = Path(os.path.realpath(folder))
        plan = json.loads((place.with_name(f"{place.name}.partial") / PLAN).read_bytes())
        ours = plan["checksum"] == _checksum(plan["ranks"]) and plan["rule"] == rule
        if ours and plan.items() >= {"version": VERSION, **fingerprint(experts.checkpoint)}.items():
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
    check: FidelityCheck | None,
    resources: Resources,
    progress: Progress,
    shard: ShardFile,
) -> None:
    """Write base and factors of one layer: two passes over its experts, a few of them in memory.

    What has been written is compared with the originals where there is a check for it, while they are at hand.
    """
    layer.prefetch(progress)
    bases: dict[str, NDArray[np.float32]] = {}

    def write(expert: int) -> ExpertErrors | None:
        exact, rebuilt = layer.matrices(expert), {}
        for role, base in bases.items():
            matrix = exact[role].copy() if check else exact.pop(role)
            factors = split_delta(layer.number, role, matrix, base, ranks[role])
            for part, factor in (("left", factors.left), ("right", factors.right)):
                data = factor.astype(BF16).tobytes()
                shard.write(f"{prefix}.overlay.{role}.{part}", data, expert * len(data))
            if check:
                rebuilt[role] = rebuild(base, factors)
        return check.compare(expert, exact, rebuilt) if check else None

    with resources.worker_threads(layer, matrices=MATRICES if check else len(layer.roles) + 2) as pool:
        for tensor in layer.tensors:
            for role, mean in mean_experts(tensor, pool).items():
                base = mean.astype(BF16)
                shard.write(f"{prefix}.overlay.{role}.base", base.tobytes())
                bases[role] = base.astype(np.float32)  # the deltas are those from the base that is stored
            del mean
        for comparison in pool.map(write, range(layer.count)):
            if check and comparison:
                check.add(comparison)
