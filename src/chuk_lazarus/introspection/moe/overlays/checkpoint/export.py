"""An overlay checkpoint turned into a standard one of its original family."""

from functools import partial
from math import prod
from pathlib import Path
from threading import BoundedSemaphore

from ...errors import ModelUnreadable
from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.expert_layer import stored_rows
from ...weights.experts import refuse_rotated
from ...weights.fingerprint import fingerprint
from ...weights.layouts import Layout, StoredTensor, load_table
from ..quantisation import BF16
from .auxiliary import read_auxiliary_files
from .dequantise import dequantise, dequantised_config
from .folder import Contents, Shard, ShardFile, Tensor, bf16_tensor, encode_json, group_into_shards, write_model
from .reader import OverlayCheckpoint, read_overlay


def export_overlay(
    folder: Path, target: Path, *, force: bool = False, resources: Resources, progress: Progress
) -> None:
    """Write the overlay checkpoint in `folder` as a plain one of its original family, bf16, into `target`.

    Experts become base + delta under their original names and axes. All else that is quantised (the experts of
    layers that are not overlaid, the attention of an FP8 model) is decoded to bf16, too, so that no quantization_config
    is needed. Resumes, replaces and raises as `write_overlay` does; raises UnknownFormat where a quantised tensor can't
    be decoded.
    """
    overlay = read_overlay(folder)
    checkpoint = overlay.checkpoint
    if rotation := checkpoint.model_config.rotation():
        raise refuse_rotated(rotation)
    layout = plain_layout(overlay)
    files = read_auxiliary_files(checkpoint)
    names = sorted(set(checkpoint.names) - overlay.names)
    writers = dequantise(checkpoint, names)
    shards = [
        *group_into_shards(writers, checkpoint, progress),
        *(
            Shard(
                expert_tensors(overlay, layer, layout),
                partial(_fill_experts, overlay, layer, layout, resources, progress),
            )
            for layer in overlay.layers
        ),
    ]
    written: set[str] = set()
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in written:
            raise ModelUnreadable(f"overlay_config: two tensors would be called {tensor.name}", "make it again")
        written.add(tensor.name)
    config = dequantised_config(checkpoint.model_config)
    write_model(
        target,
        Contents(shards, encode_json(config) if config else None, files),  # the model may have had no config.json
        {"writes": "export", "version": overlay.overlay_config.version, **fingerprint(checkpoint)},
        checkpoint.repository.folder,
        force,
        progress,
    )


def plain_layout(overlay: OverlayCheckpoint) -> Layout:
    """The layout in which loaders expect the experts of an overlay as plain numbers."""
    rows = {row.name: row for row in load_table()}
    return rows[rows[overlay.family].plain or overlay.family]


def stored_name(overlay: OverlayCheckpoint, layer: int, spec: StoredTensor, expert: int) -> str:
    """What a plain checkpoint calls the stored tensor that has an expert; raises ModelUnreadable for unknown names."""
    name = f"{overlay.prefix(layer)}.{overlay.template(spec.role)}"
    if not spec.axes.stacked and "{expert}" not in name:
        raise ModelUnreadable(f"overlay_config: {name} has no placeholder for the expert's number")
    return name.replace("{expert}", str(expert))


def expert_tensors(overlay: OverlayCheckpoint, layer: int, layout: Layout) -> tuple[Tensor, ...]:
    """The experts' tensors of one layer in a plain checkpoint."""
    hidden, intermediate = overlay.shape(layer, "down")
    sizes = {"2": 2, "E": overlay.count(layer), "I": intermediate, "H": hidden}
    tensors = []
    for spec in layout.tensors:
        shape = tuple(prod(sizes[letter] for letter in group) for group in spec.axes.groups)
        if not spec.axes.stacked:
            names = (stored_name(overlay, layer, spec, expert) for expert in range(sizes["E"]))
            tensors += [bf16_tensor(name, shape) for name in names]
        elif spec.axes.flattened:
            tensors.append(bf16_tensor(stored_name(overlay, layer, spec, 0), (sizes["E"] * shape[0], shape[1])))
        else:
            tensors.append(bf16_tensor(stored_name(overlay, layer, spec, 0), (sizes["E"], *shape)))
    return tuple(tensors)


def _fill_experts(
    overlay: OverlayCheckpoint, layer: int, layout: Layout, resources: Resources, progress: Progress, shard: ShardFile
) -> None:
    """Write the rebuilt experts of one layer."""
    overlay.prefetch(layer, progress)
    bases = {role: overlay.base(layer, role) for role in overlay.roles(layer)}
    slots = BoundedSemaphore(max(1, resources.matrix_memory // (4 * bases["down"].nbytes)))

    def write_expert(expert: int) -> None:
        for spec in layout.tensors:
            with slots:
                matrices = {role: overlay.rebuild(bases[role], layer, role, expert).astype(BF16) for role in spec.roles}
                data = stored_rows(spec, matrices).tobytes()
                name = stored_name(overlay, layer, spec, expert)
                shard.write(name, data, expert * len(data) if spec.axes.stacked else 0)

    with resources.worker_threads() as pool:
        for _ in pool.map(write_expert, range(overlay.count(layer))):
            pass
