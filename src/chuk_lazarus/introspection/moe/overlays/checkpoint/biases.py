"""Experts' biases that follow their neurons into another order."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ...numerics.alignment import Alignment
from ...weights.checkpoint import TensorInfo
from ...weights.expert_layer import ExpertLayer, ExpertTensor
from ...weights.stored import BIAS
from .folder import CHUNK, ShardFile, Tensor, TensorWriter


def permuted_biases(layer: ExpertLayer, find: Callable[[], Alignment]) -> Iterator[TensorWriter]:
    """The writers of the biases of gate and up; `find` gives the order of the neurons when they write.

    A bias of down has a number for each hidden channel, and stays as it is. Raises ModelUnreadable for biases of a
    shape that does not fit the layer.
    """
    for tensor in layer.tensors:
        if "down" in tensor.spec.roles:
            continue
        for expert, parts in enumerate(tensor.parts):
            if BIAS in parts:
                tensor.biases(expert)
                info = layer.info(parts[BIAS])
                write = partial(_write_bias, tensor, info, expert, find)
                yield TensorWriter(
                    Tensor(info.name, info.dtype, info.shape, info.nbytes),
                    ((info.file, (info.start, info.stop)),),
                    write,
                )


def _write_bias(
    tensor: ExpertTensor, info: TensorInfo, expert: int, find: Callable[[], Alignment], shard: ShardFile
) -> None:
    """Write the biases in one tensor, those of all experts or of a single one, with their neurons in order."""
    permutations = find().permutations
    if not tensor.spec.axes.stacked:
        permutations = permutations[expert : expert + 1]
    data = b"".join(tensor.layer.chunks(info, CHUNK))
    count, neurons = permutations.shape
    in_turns = ("I", "2") in tensor.spec.axes.groups
    roles = len(tensor.spec.roles)
    numbers = np.frombuffer(data, np.dtype((np.void, info.nbytes // (count * neurons * roles))))
    if in_turns:
        ordered = np.take_along_axis(numbers.reshape(count, neurons, roles), permutations[:, :, None], axis=1)
    else:
        ordered = np.take_along_axis(numbers.reshape(count, roles, neurons), permutations[:, None], axis=2)
    shard.write(info.name, ordered.tobytes())
