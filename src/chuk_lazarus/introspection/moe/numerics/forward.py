"""What an expert and a router compute, on float32 arrays whose rows are the inputs."""

from collections.abc import Callable, Mapping
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

Array = NDArray[np.float32]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), np.float32)


def gelu(x: Array) -> Array:
    """The exact GELU, by the error function."""
    return np.asarray(0.5 * x * (1.0 + erf(x / sqrt(2.0))), np.float32)


def gelu_tanh(x: Array) -> Array:
    """The usual approximation of GELU by tanh."""
    return np.asarray(0.5 * x * (1.0 + np.tanh(sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))), np.float32)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.square(np.maximum(x, 0.0)),
}


GATED_ACTIVATIONS = ("swiglu_oai", "gelu_up_plus_one")
"""What `glu` computes besides an activation of the gate times up."""


def glu(gate: Array, up: Array, activation: str) -> Array:
    """act(gate) * up, for gate and up [n, intermediate].

    "swiglu_oai" is that of GPT-OSS: with both clamped at 7, (up + 1) * gate * sigmoid(1.702 gate);
    "gelu_up_plus_one" that of Moondream 3: gelu(gate) * (up + 1).
    """
    if activation == "gelu_up_plus_one":
        return gelu(gate) * (up + np.float32(1.0))
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return (up + 1.0) * gate * sigmoid(1.702 * gate)
    return ACTIVATIONS[activation](gate) * up


def run_expert(x: Array, matrices: Mapping[str, Array], biases: Mapping[str, Array], activation: str) -> Array:
    """The outputs [n, hidden] of one expert for inputs [n, hidden].

    `matrices` [out, in] and `biases` [out] are by role. Without a gate, the activation is applied to the up projection.
    """

    inner = run_gates(x, matrices, biases, activation)
    return _project("down", inner, matrices, biases)


def run_gates(x: Array, matrices: Mapping[str, Array], biases: Mapping[str, Array], activation: str) -> Array:
    """What enters the down projection [n, intermediate]; see `run_expert`."""
    up = _project("up", x, matrices, biases)
    return (
        glu(_project("gate", x, matrices, biases), up, activation)
        if "gate" in matrices
        else ACTIVATIONS[activation](up)
    )


def _project(role: str, x: Array, matrices: Mapping[str, Array], biases: Mapping[str, Array]) -> Array:
    return x @ matrices[role].T + biases.get(role, np.float32(0.0))


def route(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    correction: Array | None = None,
    *,
    top_k: int,
    scoring: str,
    normalise: bool,
) -> Array:
    """The routing weights [n, experts] of inputs [n, hidden]; in each row, all but `top_k` are 0.

    `weight` is [experts, hidden], `bias` and `correction` are [experts]; `scoring` is "softmax" or "sigmoid". The
    experts with the largest scores plus correction are chosen. Their routing weights are the scores without it, divided
    by their sum if `normalise`.
    """
    logits = x @ weight.T + (bias if bias is not None else np.float32(0.0))
    if scoring == "sigmoid":
        scores = sigmoid(logits)
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    corrected = scores if correction is None else scores + correction
    chosen = np.argsort(-corrected, axis=1, kind="stable")[:, :top_k]
    weights = np.zeros_like(scores)
    np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, axis=1), axis=1)
    return weights / weights.sum(axis=1, keepdims=True) if normalise else weights
