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
from ...weights.stored import BIAS, Infos, group_quantised, module_of, open_stored, read_rows
from ...weights.tensor_info import INTEGER_DTYPES, PLAIN_DTYPES
from ..quantisation import BF16
from .folder import ShardFile, TensorWriter, bf16_tensor, copy_tensor


def dequantise(checkpoint: Checkpoint, names: Sequence[str]) -> list[TensorWriter]:
    """Writers of these tensors, which decode the quantised ones among them to bf16.

    Where the config has no quantisation settings, plain tensors are copied whatever their names are, and so are
    integers that are no weight. Raises UnknownFormat where a tensor can't be decoded.
    """
    config = checkpoint.model_config
    quantization = config.quantization()
    infos = {name: checkpoint.info(name) for name in names}
    groups = {
        plain_name: parts
        for plain_name, parts in group_quantised(names).items()
        if quantization or any(infos[name].dtype not in PLAIN_DTYPES for name in parts.values())
    }
    used = {name for parts in groups.values() for name in parts.values()}
    writers = [
        _decode_tensor(checkpoint, plain_name, *open_stored(checkpoint, parts, config.quantization(module_of(parts))))
        for plain_name, parts in groups.items()
    ]
    for name, info in infos.items():
        is_table = not quantization and info.dtype in INTEGER_DTYPES and not name.endswith(".weight")
        if name not in used and info.dtype not in PLAIN_DTYPES and not is_table:
            writers.append(_decode_tensor(checkpoint, name, *_open_alone(info, quantization), info.shape))
            used.add(name)
    modules = [writer.tensor.name.removesuffix(".weight") for writer in writers]
    used |= {f"{module}{separator}{part}" for module in modules for separator in "._" for part in NOT_DECODED - {BIAS}}
    writers += [copy_tensor(checkpoint, info) for name, info in infos.items() if name not in used]
    return sorted(writers, key=lambda writer: writer.tensor.name)


def _open_alone(info: TensorInfo, quantization: Mapping[str, Any]) -> tuple[Infos, Stored]:
    """As `open_stored`, for a tensor without scales; a vector is taken for one row."""
    matrix = info if len(info.shape) > 1 else replace(info, shape=(1, prod(info.shape)))
    try:
        return {"weight": matrix}, recognise({"weight": Part(matrix.dtype, matrix.shape)}, quantization)
    except MoEError as error:
        raise type(error)(f"{info.name}: {error.message}", error.hint) from None


def _decode_tensor(
    checkpoint: Checkpoint, name: str, infos: Infos, stored: Stored, shape: tuple[int, ...] | None = None
) -> TensorWriter:
    """The writer of a tensor that is decoded to bf16; it has its own shape where `shape` is None."""
    if len(stored.shape) < 2:
        raise UnknownFormat(f"{name} is quantised, and no matrix: {list(stored.shape)}")
    *leading, rows, columns = stored.shape
    plain_shape = (*leading, columns, rows) if _is_transposed(infos, stored) else stored.shape
    ranges = tuple((info.file, (info.start, info.stop)) for info in infos.values())
    write = partial(_write_decoded, checkpoint, infos, stored, name)
    return TensorWriter(bf16_tensor(name, plain_shape if shape is None else shape), ranges, write)


def _is_transposed(infos: Infos, stored: Stored) -> bool:
    """Whether the plain form has its last two axes the other way round, as that of GPT-OSS's blocks has."""
    return stored.transposed or "blocks" in infos


def _write_decoded(checkpoint: Checkpoint, infos: Infos, stored: Stored, name: str, shard: ShardFile) -> None:
    """Decode and write a tensor: a few rows at a time, or a whole matrix where it must be transposed."""
    *leading, rows, columns = stored.shape
    if not prod(stored.shape):
        return
    granule = stored.granule
    is_transposed = _is_transposed(infos, stored)
    step = rows if is_transposed else max(1, WINDOW // max(1, columns * granule)) * granule
    offset = 0
    for index in range(prod(leading)):
        for start in range(0, rows, step):
            values = read_rows(checkpoint, infos, stored, rows, start, min(start + step, rows), index)
            data = (values.T if is_transposed else values).astype(BF16).tobytes()
            shard.write(name, data, offset)
            offset += len(data)
