"""Whether gates and ups lie in halves or in turns: by the model type, or else by the weights, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from chuk_lazarus.introspection.moe import MoELayoutService
from chuk_lazarus.introspection.moe.errors import UnknownFormat
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.gate_up_order import weigh_orders

Matrices = dict[str, NDArray[np.float32]]
Reorder = Callable[[Matrices], Matrices]

NAMES = [("gate_up_proj", "down_proj"), ("w13_weight", "w2_weight")]


def fuse(first: NDArray[np.float32], second: NDArray[np.float32], order: str) -> NDArray[np.float32]:
    if order == "halves":
        return np.concatenate([first, second])
    return np.stack([first, second], 1).reshape(-1, first.shape[1])


def write_fused(
    folder: Path,
    order: str,
    *,
    model: str = "demo:native",
    names: tuple[str, str] = NAMES[0],
    model_type: str | None = None,
    transposed: bool = False,
    change: Reorder = lambda matrices: matrices,
) -> str:
    """A model's experts with gate and up in one tensor, in the given order."""
    experts, tensors = Experts.open(model), {}
    for number in experts.layers:
        layer = experts.layer(number)
        all_matrices = [change(layer.matrices(expert)) for expert in range(layer.count)]
        stacks = (
            np.stack([fuse(matrices["gate"], matrices["up"], order) for matrices in all_matrices]),
            np.stack([matrices["down"] for matrices in all_matrices]),
        )
        for name, stack in zip(names, stacks, strict=True):
            tensors[f"model.layers.{number}.mlp.experts.{name}"] = np.ascontiguousarray(
                stack.swapaxes(1, 2) if transposed else stack
            )
    save_file(tensors, folder / "model.safetensors")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "num_hidden_layers": 2}))
    return str(folder)


def assert_same_experts(model: str, original: str = "demo:native") -> None:
    read, truth = Experts.open(model).layer(1), Experts.open(original).layer(1)
    for role, matrix in truth.matrices(5).items():
        np.testing.assert_array_equal(read.matrices(5)[role], matrix)


@pytest.mark.parametrize("model_type", [None, "a_type_of_2027"])
@pytest.mark.parametrize(("names", "transposed"), [(NAMES[0], False), (NAMES[0], True), (NAMES[1], False)])
@pytest.mark.parametrize("order", ["halves", "turns"])
def test_trained_weights_tell_the_order(
    tmp_path: Path, order: str, names: tuple[str, str], transposed: bool, model_type: str | None
) -> None:
    model = write_fused(tmp_path, order, names=names, transposed=transposed, model_type=model_type)
    assert_same_experts(model)
    layout = MoELayoutService.describe(model)
    assert (layout.order, layout.order_by) == (order, "norms")
    assert any(note.startswith(f"gate and up rows are in {order}") for note in layout.notes)


@pytest.mark.parametrize("order", ["halves", "turns"])
def test_names_of_another_family_under_a_listed_type(tmp_path: Path, order: str) -> None:
    """vLLM's own parameters have Inkling's names, in halves."""
    model = write_fused(tmp_path, order, names=NAMES[1], model_type="qwen3_moe")
    assert_same_experts(model)
    assert Experts.open(model).order_by == "norms"


def test_a_listed_type_decides_without_reading_a_weight(tmp_path: Path) -> None:
    model = write_fused(tmp_path, "halves", model_type="qwen3_moe")
    experts = Experts.open(model)
    assert (experts.order, experts.order_by, experts.notes) == ("halves", "model_type", [])
    whole = (tmp_path / "model.safetensors").stat().st_size
    assert experts.checkpoint.bytes_read < whole / 20


def test_experts_apart_leave_nothing_open() -> None:
    layout = MoELayoutService.describe("demo:native")
    assert layout.order is layout.order_by is None


def untrained(matrices: Matrices) -> Matrices:
    """Noise of the same shapes."""
    rng = np.random.default_rng(int(1e6 * abs(matrices["up"][0, 0])))
    return {role: rng.normal(size=matrix.shape).astype(np.float32) for role, matrix in matrices.items()}


def exchanged(matrices: Matrices) -> Matrices:
    """Ups where gates are expected, with norms that nothing ties to those of downs."""
    rng = np.random.default_rng(7)
    shuffled = matrices["gate"][rng.permutation(len(matrices["gate"]))]
    return {"gate": matrices["up"], "up": shuffled, "down": matrices["down"]}


@pytest.mark.parametrize("change", [untrained, exchanged])
@pytest.mark.parametrize("order", ["halves", "turns"])
def test_weights_that_do_not_tell_are_refused(tmp_path: Path, order: str, change: Reorder) -> None:
    model = write_fused(tmp_path, order, change=change)
    with pytest.raises(UnknownFormat, match="may be in halves or in turns: model_type is not given, and the weights"):
        Experts.open(model)


def test_noise_shows_no_order() -> None:
    """In 1,000 layers of noise, where the same base is behind all experts, no order is found."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        base = {role: rng.normal(size=shape) for role, shape in (("gate", (48, 8)), ("up", (48, 8)), ("down", (8, 48)))}
        experts = [
            {role: (matrix + 0.1 * rng.normal(size=matrix.shape)).astype(np.float32) for role, matrix in base.items()}
            for _ in range(4)
        ]
        assert weigh_orders(experts, "halves").order is None


def test_numbers_that_are_none_show_no_order() -> None:
    matrices = {role: np.full((16, 16), np.nan, np.float32) for role in ("gate", "up", "down")}
    assert weigh_orders([matrices], "turns").order is None


@pytest.mark.real
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_every_layer_of_a_dense_model_tells_the_order(model: str, request: pytest.FixtureRequest) -> None:
    layers = Experts.open(str(request.getfixturevalue(model)), "dense")
    for number in layers.layers:
        matrices = layers.layer(number).matrices(0)
        assert weigh_orders([matrices], "halves").order == "halves"
        gate, up = matrices["gate"], matrices["up"]
        rows = fuse(gate, up, "turns")
        read_as_halves = {"gate": rows[: len(gate)], "up": rows[len(gate) :], "down": matrices["down"]}
        assert weigh_orders([read_as_halves], "halves").order == "turns"
