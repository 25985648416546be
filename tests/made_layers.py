"""Layers of experts that are made of noise, with a history that is known, and what may be done to them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Matrices = dict[str, NDArray[np.float32]]  # role -> [experts, neurons, inputs]
Change = Callable[[np.random.Generator, Matrices], Matrices]
EXPERTS, NEURONS, HIDDEN = 8, 128, 64
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}


def native(rng: np.random.Generator, experts: int = EXPERTS, neurons: int = NEURONS, hidden: int = HIDDEN) -> Matrices:
    return {role: rng.standard_normal((experts, neurons, hidden), np.float32) for role in SHORT}


def copies(rng: np.random.Generator) -> Matrices:
    """Of one base, with deltas of 0.35 of its size."""
    base = native(rng, 1)
    return {role: m + 0.35 * rng.standard_normal((EXPERTS, *m.shape[1:]), np.float32) for role, m in base.items()}


def write(folder: Path, found: Matrices, layers: int = 1) -> str:
    tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{SHORT[role]}.weight": np.ascontiguousarray(
            neurons.T if role == "down" else neurons
        )
        for layer in range(layers)
        for role, matrix in found.items()
        for expert, neurons in enumerate(matrix)
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return str(folder)


def shuffle(rng: np.random.Generator, found: Matrices) -> Matrices:
    orders = np.stack([rng.permutation(len(expert)) for expert in found["up"]])[:, :, None]
    return {role: np.take_along_axis(matrix, orders, axis=1) for role, matrix in found.items()}


def rescale(rng: np.random.Generator, found: Matrices) -> Matrices:
    scale = np.exp(rng.normal(0, 1, (*found["up"].shape[:2], 1))).astype(np.float32)
    return {**found, "up": found["up"] * scale, "down": found["down"] / scale}


def flip(rng: np.random.Generator, found: Matrices) -> Matrices:
    sign = rng.choice(np.float32([-1, 1]), (*found["up"].shape[:2], 1))
    return {**found, "up": found["up"] * sign, "down": found["down"] * sign}


def scale_one_column(rng: np.random.Generator, found: Matrices) -> Matrices:
    scale = np.ones(found["up"].shape[2], np.float32)
    scale[5] = 30
    return {**found, "gate": found["gate"] * scale, "up": found["up"] * scale}


def scale_columns(rng: np.random.Generator, found: Matrices) -> Matrices:
    scale = np.exp(rng.normal(0, 1, found["up"].shape[2])).astype(np.float32)
    return {**found, "gate": found["gate"] * scale, "up": found["up"] * scale}


def reorder_experts(rng: np.random.Generator, found: Matrices) -> Matrices:
    order = rng.permutation(len(found["up"]))
    return {role: matrix[order] for role, matrix in found.items()}


def repeat_one(rng: np.random.Generator, found: Matrices) -> Matrices:
    return {role: np.concatenate([matrix, matrix[2:3]]) for role, matrix in found.items()}


def add_unrelated(rng: np.random.Generator, found: Matrices) -> Matrices:
    return {role: np.concatenate([matrix, native(rng, 1)[role]]) for role, matrix in found.items()}
