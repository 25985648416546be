"""A model written as an overlay checkpoint.

The model is streamed: memory holds the base of one layer, and the experts that the worker threads are busy with.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidRequest, UnknownFormat
from ...jobs.measure import mean_experts
from ...jobs.resources import Resources
from ...numerics.alignment import Alignment
from ...numerics.low_rank import rebuild
from ...progress import Progress
from ...terms import OVERLAY_CONFIG
from ...text import format_ranges
from ...weights.expert_layer import ExpertLayer
from ...weights.experts import Experts, refuse_rotated
from ...weights.stored import BIAS, is_runtime_scale
from ...weights.tensor_info import DTYPES, PLAIN_DTYPES
from ..coded_layer import CodedLayer, find_alignment
from ..codes import LayerCodes
from ..codes.low_rank import FactorsCode, SumCode
from ..coding import split_delta
from ..fidelity import MATRICES_COMPARED, ExpertErrors, FidelityCheck
from ..moments import ExpertMoments
from ..quantisation import BF16
from .auxiliary import read_auxiliary_files
from .biases import permuted_biases
from .card import CARD, write_card
from .folder import (
    Contents,
    Shard,
    ShardFile,
    Tensor,
    TensorWriter,
    bf16_tensor,
    check_folder,
    copy_tensor,
    encode_json,
    group_into_shards,
    write_model,
)
from .format import (
    CODED_VERSION,
    VERSION,
    CodedExperts,
    OverlayConfig,
    Ranks,
    index_name,
    parse_codes,
    part_shapes,
    tensor_name,
)
from .model_file import CONTENT, MODEL_FILE, name_model_file
from .plan import make_plan, planned_layers


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

    The same call continues with what an interrupted one left in `<folder>.partial`. `force` replaces an existing folder
    once the new one is whole, and deletes the unfinished work of another call. `source` is what the model is called in
    the new folder's config and card, `rule` how the ranks were chosen. `checks`, by layer, compare the experts while
    they are written, but not those of layers that an interrupted call has written; `card` is called at the end for
    further text of the card. `progress` reports bytes written.

    Raises InvalidRequest for ranks that do not fit the model, a folder that must not be written or a disk without room,
    ModelUnreadable where the model is broken.
    """
    layers = [_check_ranks(experts, number, ranks[number]) for number in sorted(ranks)]
    layer_ranks = {layer.number: {role: ranks[layer.number][role] for role in layer.roles} for layer in layers}

    def make_shard(layer: ExpertLayer, prefix: str) -> Shard:
        of_layer, check = layer_ranks[layer.number], (checks or {}).get(layer.number)
        return Shard(
            _overlay_tensors(layer, of_layer, prefix),
            partial(_fill_layer, layer, of_layer, prefix, check, resources, progress),
        )

    overlay = partial(_overlay_config, experts, source, rule, version=VERSION, layers=layer_ranks)
    first, of_first = (layers[0], layer_ranks[layers[0].number]) if layers else (None, {})
    options = " ".join(
        [f"--layer {first.number}" if first else "", *(f"--{role}-rank {rank}" for role, rank in of_first.items())]
    )
    contents, plan = _compose(experts, layers, overlay, make_shard, {}, progress=progress, card=card, options=options)
    write_model(folder, contents, plan, experts.checkpoint.repository.folder, force, progress)


def write_coded_overlay(
    experts: Experts,
    codes: Mapping[int, LayerCodes],
    folder: Path,
    *,
    force: bool = False,
    resources: Resources,
    progress: Progress,
    source: str = "",
    rule: str = "",
    checks: Mapping[int, FidelityCheck] | None = None,
    card: Callable[[], str] = str,
    options: str = "",
    moments: Callable[[ExpertLayer], ExpertMoments | None] = lambda layer: None,
) -> None:
    """As `write_overlay`, with the layers in `codes` (layer -> role -> codes) as version 2 keeps them.

    The neurons of layers with a base are brought into its order, those of the experts' biases with them. `options` are
    those of the command by which the card says that the experts can be verified. `moments` gives those of a layer by
    which errors are measured.
    """
    contents, plan = _compose_coded(
        experts, codes, resources, progress, source, rule, checks or {}, card, options, moments
    )
    write_model(folder, contents, plan, experts.checkpoint.repository.folder, force, progress)


def coded_folder_bytes(
    experts: Experts,
    codes: Mapping[int, LayerCodes],
    *,
    resources: Resources,
    progress: Progress,
    source: str = "",
    rule: str = "",
    card: str = "",
    options: str = "",
) -> int:
    """Bytes of all files of the folder that `write_coded_overlay` writes, where its card has the further text `card`.

    Raises UnknownFormat for a model whose other tensors can't be copied.
    """
    check_copyable(experts)
    contents, _ = _compose_coded(experts, codes, resources, progress, source, rule, {}, lambda: card, options)
    return contents.nbytes


def _compose_coded(
    experts: Experts,
    codes: Mapping[int, LayerCodes],
    resources: Resources,
    progress: Progress,
    source: str,
    rule: str,
    checks: Mapping[int, FidelityCheck],
    card: Callable[[], str],
    options: str,
    moments: Callable[[ExpertLayer], ExpertMoments | None] = lambda layer: None,
) -> tuple[Contents, dict[str, Any]]:
    """The contents of the folder of `write_coded_overlay`, and its plan."""
    layers = [_check_codes(experts, number, codes[number]) for number in sorted(codes)]
    coded = {
        layer.number: CodedExperts(
            layer.count, layer.sizes["H"], layer.sizes["I"], {role: codes[layer.number][role] for role in layer.roles}
        )
        for layer in layers
    }

    @cache
    def alignment_of(layer: ExpertLayer) -> Alignment:
        return find_alignment(layer, codes[layer.number], resources)

    biases = {
        writer.tensor.name: writer
        for layer in layers
        for writer in permuted_biases(layer, partial(alignment_of, layer))
    }

    def make_shard(layer: ExpertLayer, prefix: str) -> Shard:
        # an alignment is kept only where it is needed twice
        find = partial(alignment_of if layer.biases(0) else alignment_of.__wrapped__, layer)
        check = checks.get(layer.number)
        return Shard(
            _coded_tensors(coded[layer.number], prefix),
            partial(
                _fill_coded,
                layer,
                coded[layer.number],
                prefix,
                find,
                moments,
                check,
                resources,
                progress,
            ),
        )

    overlay = partial(_overlay_config, experts, source, rule, version=CODED_VERSION, coded=coded)
    return _compose(experts, layers, overlay, make_shard, biases, progress=progress, card=card, options=options)


def _compose(
    experts: Experts,
    layers: Sequence[ExpertLayer],
    make_overlay: Callable[[dict[str, str]], OverlayConfig],
    make_shard: Callable[[ExpertLayer, str], Shard],
    writers: Mapping[str, TensorWriter],
    *,
    progress: Progress,
    card: Callable[[], str],
    options: str,
) -> tuple[Contents, dict[str, Any]]:
    """The contents of the folder of a model with overlaid layers, and the plan that tells this work from any other.

    `make_shard` gives the shard of a layer and its prefix; `writers` replace those that copy a tensor, by its name.
    """
    checkpoint = experts.checkpoint
    if OVERLAY_CONFIG in checkpoint.config:
        raise InvalidRequest("the model is an overlay already", "give the model that it was made from")
    if not layers:
        raise InvalidRequest("no ranks are given for any layer", f"the MoE layers are {format_ranges(experts.layers)}")
    files = read_auxiliary_files(checkpoint)
    prefixes, names = zip(*(_split_names(layer) for layer in layers), strict=True)
    if len({str(by_role) for by_role in names}) > 1:
        raise UnknownFormat("the layers name their experts' tensors differently")
    copied = [checkpoint.info(name) for name in sorted(set(checkpoint.names) - _replaced_names(layers))]
    model_config = checkpoint.model_config
    if all(info.dtype in PLAIN_DTYPES for info in copied):
        config = model_config.without_quantization()
        if model_config.quantization():
            copied = [info for info in copied if not is_runtime_scale(info.name)]
    else:
        config = model_config.without_modules([info.name for info in copied])
    copies = [writers.get(info.name) or copy_tensor(checkpoint, info) for info in copied]
    shards = [
        *group_into_shards(copies, checkpoint, progress),
        *(make_shard(layer, prefix) for layer, prefix in zip(layers, prefixes, strict=True)),
    ]
    overlay = make_overlay(names[0])
    overlay_json = overlay.to_json()
    before = checkpoint.count_bytes(checkpoint.names)
    after = sum(shard.nbytes for shard in shards)
    contents = Contents(
        shards,
        encode_json({**name_model_file(config), OVERLAY_CONFIG: overlay_json}),
        {
            **files,
            MODEL_FILE: CONTENT,
            CARD: lambda: write_card(overlay, layers, before, after, options, card()).encode(),
        },
    )
    plan = make_plan(
        checkpoint, writes="overlay", rule=overlay.rule, version=overlay.version, layers=overlay_json["layers"]
    )
    return contents, plan


def _overlay_config(experts: Experts, source: str, rule: str, names: dict[str, str], **layers: Any) -> OverlayConfig:
    repository = experts.checkpoint.repository
    return OverlayConfig(
        source=source or repository.name,
        revision=repository.revision,
        family=experts.family,
        names=names,
        rule=rule,
        **layers,
    )


def check_target(experts: Experts, folder: Path, layers: Iterable[int], force: bool, bits: float | None = None) -> None:
    """Check, before any work, that an overlay of these layers can be written into the folder.

    Raises InvalidRequest for a folder that must not be written, or a disk without room for an overlay of rank 0, or of
    about `bits` bits per weight, and UnknownFormat for a model whose other tensors can't be copied.
    """
    check_copyable(experts)
    checkpoint = experts.checkpoint
    opened = [experts.layer(number) for number in layers]
    replaced = checkpoint.count_bytes(_replaced_names(opened))
    if bits is None:
        least = sum(BF16.itemsize * prod(layer.shape(role)) for layer in opened for role in layer.roles)
    else:
        least = int(0.9 * bits / 8 * sum(layer.parameters for layer in opened))
    model_bytes = checkpoint.count_bytes(checkpoint.names)
    check_folder(folder, checkpoint.repository.folder, force, model_bytes - replaced + least)


def check_copyable(experts: Experts) -> None:
    """Raise UnknownFormat for a model whose other tensors can't be copied."""
    checkpoint = experts.checkpoint
    if checkpoint.is_gguf or checkpoint.is_split:
        what = "a GGUF" if checkpoint.is_gguf else "split over files for tensor parallelism"
        raise UnknownFormat(
            f"the model is {what}: an overlay of it can't be written", "use a plain safetensors version of it"
        )
    if rotation := checkpoint.model_config.rotation():
        raise refuse_rotated(rotation)


def planned_ranks(experts: Experts, folder: Path, rule: str) -> dict[int, Ranks] | None:
    """The ranks, by layer, that a stopped `write_overlay` of the same model and rule left in the plan for `folder`.

    None where there is no such plan.
    """
    planned = planned_layers(experts.checkpoint, folder, rule, VERSION)
    return None if planned is None else {int(layer): ranks for layer, ranks in planned.items()}


def planned_codes(experts: Experts, folder: Path, rule: str) -> dict[int, LayerCodes] | None:
    """As `planned_ranks`, of `write_coded_overlay`."""
    planned = planned_layers(experts.checkpoint, folder, rule, CODED_VERSION)
    return None if planned is None else {int(layer): parse_codes(facts) for layer, facts in planned.items()}


def _check_roles(experts: Experts, number: int, roles: Iterable[str], what: str) -> ExpertLayer:
    """The layer with this number; raises InvalidRequest where these are not its roles."""
    if number not in experts.layers:
        raise InvalidRequest(
            f"layer {number} is not an MoE layer", f"the MoE layers are {format_ranges(experts.layers)}"
        )
    layer = experts.layer(number)
    if set(roles) != set(layer.roles):
        wanted, given = (", ".join(sorted(names)) or "nothing" for names in (layer.roles, roles))
        raise InvalidRequest(f"layer {number} needs {what} for {wanted}, but they are given for {given}")
    return layer


def _check_codes(experts: Experts, number: int, codes: LayerCodes) -> ExpertLayer:
    """The layer with this number; raises InvalidRequest where these codes do not fit it."""
    layer = _check_roles(experts, number, codes, "codes")
    for role, of_role in codes.items():
        if of_role.base is None and isinstance(of_role.delta, FactorsCode):
            raise InvalidRequest(f"layer {number}: {role} has factors but no base")
        for code, shape in of_role.sides(layer.shape(role)).values():
            factors = code.factors if isinstance(code, SumCode) else code
            if isinstance(factors, FactorsCode) and factors.rank > min(shape):
                raise InvalidRequest(f"layer {number}: {role} can't have rank {factors.rank}")
    return layer


def _check_ranks(experts: Experts, number: int, ranks: Mapping[str, int]) -> ExpertLayer:
    """The layer with this number; raises InvalidRequest where these ranks do not fit it."""
    layer = _check_roles(experts, number, ranks, "ranks")
    for role, rank in ranks.items():
        greatest = min(layer.shape(role))
        if not isinstance(rank, int) or not 0 <= rank <= greatest:
            raise InvalidRequest(f"layer {number}: {role} can't have rank {rank}", f"give 0 to {greatest}")
    return layer


def _replaced_names(layers: Iterable[ExpertLayer]) -> set[str]:
    """The names of all tensors that hold the layers' matrices, the scales of their inputs included."""
    tensors = (tensor for layer in layers for tensor in layer.tensors)
    return {name for tensor in tensors for parts in tensor.parts for part, name in parts.items() if part != BIAS}


def expert_names(layers: Iterable[ExpertLayer]) -> set[str]:
    """The names of all tensors that belong to the layers' experts, their biases included."""
    return {name for layer in layers for tensor in layer.tensors for parts in tensor.parts for name in parts.values()}


def _split_names(layer: ExpertLayer) -> tuple[str, dict[str, str]]:
    """The layer's prefix, and what a plain checkpoint calls its stored tensors below that, by their role."""
    places = {tensor.spec.role: tensor.place for tensor in layer.tensors}
    return next(iter(places.values()))[0], {role: name for role, (_, name) in places.items()}


def _overlay_tensors(layer: ExpertLayer, ranks: Mapping[str, int], prefix: str) -> tuple[Tensor, ...]:
    """The tensors of one layer's overlay."""
    return tuple(
        bf16_tensor(tensor_name(prefix, role, part), shape)
        for role, rank in ranks.items()
        for part, shape in part_shapes(layer.shape(role), layer.count, rank).items()
    )


def _fill_layer(
    layer: ExpertLayer,
    ranks: Mapping[str, int],
    prefix: str,
    check: FidelityCheck | None,
    resources: Resources,
    progress: Progress,
    shard: ShardFile,
) -> None:
    """Write base and factors of one layer, in two passes over its experts, of which a few are in memory at a time.

    Where there is a check, it compares the experts as written with the originals, while these are in memory.
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
                shard.write(tensor_name(prefix, role, part), data, expert * len(data))
            if check:
                rebuilt[role] = rebuild(base, factors)
        return check.compare(expert, exact, rebuilt) if check else None

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED if check else len(layer.roles) + 2) as pool:
        for tensor in layer.tensors:
            for role, mean in mean_experts(tensor, pool).items():
                base = mean.astype(BF16)
                shard.write(tensor_name(prefix, role, "base"), base.tobytes())
                bases[role] = base.astype(np.float32)  # deltas are taken from the base as it is stored
            del mean
        for errors in pool.map(write, range(layer.count)):
            if check and errors:
                check.add(errors)


def _coded_tensors(coded: CodedExperts, prefix: str) -> tuple[Tensor, ...]:
    """The tensors of one coded layer."""
    parts = {tensor_name(prefix, role, name): part for role in coded.codes for name, part in coded.layout(role).items()}
    if coded.index:
        parts[index_name(prefix)] = coded.index
    return tuple(Tensor(name, part.dtype, part.shape, part.nbytes) for name, part in parts.items())


def _fill_coded(
    layer: ExpertLayer,
    coded: CodedExperts,
    prefix: str,
    find: Callable[[], Alignment],
    moments: Callable[[ExpertLayer], ExpertMoments | None],
    check: FidelityCheck | None,
    resources: Resources,
    progress: Progress,
    shard: ShardFile,
) -> None:
    """Write the codes of one layer, in two passes over its experts, one where no role has a base.

    `find` gives the order of the neurons. Where there is a check, it compares as `_fill_layer` does.
    """
    layer.prefetch(progress)
    alignment = find()
    coder = CodedLayer(layer, coded.codes, alignment, moments(layer))
    if coded.index and alignment.bank:
        index = alignment.bank.index.astype(DTYPES[coded.index.dtype])
        shard.write(index_name(prefix), index.tobytes())

    def write(expert: int) -> ExpertErrors | None:
        exact, rebuilt = layer.matrices(expert), {}
        for role, matrix in exact.items():
            parts = coder.code(expert, role, matrix)
            if check:
                rebuilt[role] = coder.decode(expert, role, parts)
            for name, array in parts.items():
                data = array.tobytes()
                shard.write(tensor_name(prefix, role, name), data, expert * len(data))
        return check.compare(expert, exact, rebuilt) if check else None

    with resources.worker_threads(layer, matrices=MATRICES_COMPARED + coder.matrices_held) as pool:
        for role, parts in coder.code_bases(pool).items():
            for name, array in parts.items():
                shard.write(tensor_name(prefix, role, f"base.{name}"), array.tobytes())
        for errors in pool.map(write, range(layer.count)):
            if check and errors:
                check.add(errors)
