"""An overlay checkpoint turned into a standard one of its original family."""

from functools import partial
from math import prod
from pathlib import Path
from threading import BoundedSemaphore

from ...errors import ModelUnreadable
from ...jobs.resources import Resources
from ...progress import Progress
from ...weights.expert_layer import stored_rows
from ...weights.fingerprint import fingerprint
from ...weights.layouts import Layout, load_table
from ..quantisation import BF16
from .beside import small_files
from .dequantise import decoded
from .folder import Shard, ShardFile, Tensor, as_json, bf16, grouped, write_model
from .format import VERSION
from .reader import OverlayCheckpoint, read_overlay


def export_overlay(
    folder: Path, target: Path, *, force: bool = False, resources: Resources, progress: Progress
) -> None:
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
        *grouped(decoded(checkpoint, names), checkpoint, progress),
        *(
            Shard(
                _expert_tensors(overlay, layer, layout),
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
    config = checkpoint.model_config.without_quantization()
    del config["overlay_config"]
    write_model(
        target,
        shards,
        as_json(config),
        small_files(checkpoint.repository),
        {"writes": "export", "version": VERSION, **fingerprint(checkpoint)},
        checkpoint.repository.folder,
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


def _fill_experts(
    overlay: OverlayCheckpoint, layer: int, layout: Layout, resources: Resources, progress: Progress, shard: ShardFile
) -> None:
    """Write the rebuilt experts of one layer."""
    overlay.prefetch(layer, progress)
    bases = {role: overlay.base(layer, role) for role in overlay.ranks[layer]}
    at_work = BoundedSemaphore(max(1, resources.matrix_memory // (4 * bases["down"].nbytes)))

    def put_together(expert: int) -> None:
        for spec in layout.tensors:
            with at_work:
                matrices = {role: overlay.rebuilt(bases[role], layer, role, expert).astype(BF16) for role in spec.roles}
                data = stored_rows(spec, matrices).tobytes()
                name = f"{overlay.prefix(layer)}.{overlay.template(spec.role)}".replace("{expert}", str(expert))
                shard.write(name, data, expert * len(data) if spec.axes.stacked else 0)

    with resources.worker_threads() as pool:
        for _ in pool.map(put_together, range(overlay.count(layer))):
            pass
