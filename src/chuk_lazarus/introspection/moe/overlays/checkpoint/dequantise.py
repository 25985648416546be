"""Quantised tensors of a checkpoint, decoded to bfloat16 while they are written."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from ...errors import MoEError, UnknownFormat
from ...jobs.measure import WINDOW
from ...terms import OVERLAY_CONFIG
from ...weights.checkpoint import Checkpoint, TensorInfo
from ...weights.codecs import PRE_QUANT_SCALE, Part, Stored, recognise
from ...weights.model_config import ModelConfig, name_dtype
from ...weights.stored import BIAS, Infos, group_quantised, is_runtime_scale, module_of, open_stored, read_rows
from ...weights.tensor_info import INTEGER_DTYPES, PLAIN_DTYPES
from ..quantisation import BF16
from .folder import ShardFile, TensorWriter, bf16_tensor, copy_tensor
from .model_file import forget_model_file


def dequantise(checkpoint: Checkpoint, names: Sequence[str]) -> list[TensorWriter]:
    """Writers of these tensors, which decode the quantised ones among them to bf16.

    Where the config has no quantisation settings, plain tensors are copied whatever their names are, and so are
    integers that are no weight. Scales of activations and of the key/value cache are left out. Raises UnknownFormat
    where a tensor can't be decoded, or one that we don't know belongs to a quantised weight.
    """
    config = checkpoint.model_config
    quantization = config.quantization()
    infos = {name: checkpoint.info(name) for name in names}
    groups = {
        plain_name: parts
        for plain_name, parts in group_quantised(names).items()
        if quantization
        or PRE_QUANT_SCALE in parts
        or any(infos[name].dtype not in PLAIN_DTYPES for name in parts.values())
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
    decoded = {writer.tensor.name for writer in writers}
    left = []
    for name in infos.keys() - used:
        module = _find_module(name, decoded)
        if is_runtime_scale(name) and (module or quantization):
            continue
        if module and not name.endswith(BIAS):
            raise UnknownFormat(f"{name}: we don't know how it changes the quantised weight of {module}")
        left.append(name)
    rounded = _rounded_dtypes([infos[name] for name in left])
    for name in left:
        info = infos[name]
        if info.dtype in rounded and info.shape:
            writers.append(_decode_tensor(checkpoint, name, *_open_alone(info, {}), info.shape))
        else:
            writers.append(copy_tensor(checkpoint, info))
    return sorted(writers, key=lambda writer: writer.tensor.name)


def dequantised_config(config: ModelConfig) -> dict[str, Any]:
    """The config of a model whose weights are written in bf16, without what an overlay adds to it."""
    values = name_dtype(forget_model_file(config.without_quantization()), "bfloat16")
    values.pop(OVERLAY_CONFIG, None)
    return values


def _rounded_dtypes(infos: Sequence[TensorInfo]) -> set[str]:
    """The dtypes of plain numbers that become bf16: the one that most bytes have, and F16.

    A model whose weights are F32 becomes bf16, and so do the norms of one that was quantised from F16. A few F32
    numbers among others, such as a router's bias, are kept in F32 on purpose.
    """
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default="BF16")
    return ({most} | {"F16"}) & {"F16", "F32", "F64"}


def _find_module(name: str, decoded: Collection[str]) -> str | None:
    """The module of a decoded weight that a tensor belongs to by its name, None for a tensor of its own.

    "q_proj.svdquant_lora_a" belongs to "q_proj.weight", and "experts.down_proj_bias" to "experts.down_proj".
    """
    for match in re.finditer(r"[._]", name):
        stem = name[: match.start()]
        if stem in decoded or (match[0] == "." and f"{stem}.weight" in decoded):
            return stem
    return None


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
        raise UnknownFormat(f"{name} is quantised, but it is not a matrix: {list(stored.shape)}")
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
