"""Quantised tensors of a checkpoint, decoded to bfloat16 while they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from ...errors import MoEError, UnknownFormat
from ...jobs.measure import WINDOW
from ...weights.checkpoint import Checkpoint, TensorInfo
from ...weights.codecs import NOT_DECODED, Part, Stored, recognise
from ...weights.layouts import group_quantised
from ...weights.stored import BIAS, Infos, module_of, open_stored, read_rows
from ...weights.tensor_info import INTEGER_DTYPES, PLAIN_DTYPES
from ..quantisation import BF16
from .folder import Item, ShardFile, bf16, copied


def decoded(checkpoint: Checkpoint, names: Sequence[str]) -> list[Item]:
    """These tensors, the quantised ones among them decoded to bf16; raises UnknownFormat where that can't be done.

    Where the config has no quantisation settings, plain tensors are copied whatever their names are, and so are
    integers that are no weight.
    """
    config = checkpoint.model_config
    quantization = config.quantization()
    infos = {name: checkpoint.info(name) for name in names}
    groups = {
        plain: own
        for plain, own in group_quantised(names).items()
        if quantization or any(infos[name].dtype not in PLAIN_DTYPES for name in own.values())
    }
    used = {name for own in groups.values() for name in own.values()}
    items = [
        _decoded_item(checkpoint, plain, *open_stored(checkpoint, own, config.quantization(module_of(own))))
        for plain, own in groups.items()
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
