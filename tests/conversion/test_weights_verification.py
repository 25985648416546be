"""Conversions that are sound, and those that are not: each fault planted in every layout family, found and named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import conversions
from checkpoints_in_memory import TABLE
from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import InvalidRequest, MoEWeightsService, MoEWeightsVerification, UnknownFormat
from chuk_lazarus.introspection.moe.views.page import to_page
from conversions import FAMILIES, FAULTS, GATED, HARMLESS, Layer, make_layer
from hub_server import HubServer
from places import DEMO, FIXTURES
from sampling import in_turn, sampled

VERIFY = ["introspect", "moe-expert", "moe-weights-verify"]
Array = NDArray[np.float32]
Capture = pytest.CaptureFixture[str]


def two_layers(family: str, **how: Any) -> list[Layer]:
    layers = [make_layer(seed, **how) for seed in (0, 1)]
    return [replace(x, matrices={role: x.matrices[role] for role in conversions.roles_of(family)}) for x in layers]


def original_of(folder: Path, family: str, layers: list[Layer]) -> Path:
    return conversions.write_plain(folder, "ungated" if family == "ungated" else "gate_up_down", layers)


def verify(model: Path, against: Path, **how: Any) -> MoEWeightsVerification:
    return MoEWeightsService.verify(str(model), str(against), **how)


def kinds(report: MoEWeightsVerification) -> set[str]:
    return {fault.fault for fault in report.faults}


PLANTED = [(family, name) for family in FAMILIES for name in FAULTS if family != "ungated" or name not in GATED]


@pytest.mark.parametrize(
    ("family", "name"), sampled(PLANTED, [case for case in in_turn(list(FAMILIES), list(FAULTS)) if case in PLANTED])
)
def test_a_fault_is_found_and_named(tmp_path: Path, family: str, name: str) -> None:
    kind, change, (role, expert) = FAULTS[name]
    layers = two_layers(family)
    original = original_of(tmp_path / "original", family, layers)
    model = conversions.convert(tmp_path / "model", family, [layers[0], change(layers[1])])
    report = verify(model, original)
    assert not report.passed
    assert kinds(report) == {kind}
    assert {fault.layer for fault in report.faults} == {1}
    assert any(fault.role in (role, None) and fault.expert in (expert, None) for fault in report.faults)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_among_experts_that_are_alike(tmp_path: Path, name: str) -> None:
    kind, change, _ = FAULTS[name]
    layers = two_layers("mlx", spread=0.2)
    original = original_of(tmp_path / "original", "mlx", layers)
    assert kinds(verify(conversions.write_mlx(tmp_path / "model", [layers[0], change(layers[1])]), original)) == {kind}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_a_note(tmp_path: Path, family: str, name: str) -> None:
    layers = two_layers(family)
    original = original_of(tmp_path / "original", family, layers)
    model = conversions.convert(tmp_path / "model", family, [layers[0], HARMLESS[name](layers[1])])
    report = verify(model, original)
    assert report.passed
    assert [note for note in report.notes if "harmless" in note]
    assert max(p.ratio or 0 for layer in report.layers for p in layer.projections.values()) < 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_conversion_passes(tmp_path: Path, family: str) -> None:
    layers = two_layers(family)
    report = verify(
        conversions.convert(tmp_path / "model", family, layers), original_of(tmp_path / "original", family, layers)
    )
    assert report.passed
    assert report.notes == ()
    assert [layer.layer for layer in report.layers] == [0, 1]
    assert all(layer.router_error == pytest.approx(0, abs=0.002) for layer in report.layers)


def test_experts_that_are_the_same_in_the_original_may_be_so(tmp_path: Path) -> None:
    layers = [conversions.repeat_first(layer) for layer in two_layers("mlx")]
    original = original_of(tmp_path / "original", "mlx", layers)
    assert verify(conversions.write_mlx(tmp_path / "model", layers), original).passed
    assert verify(conversions.write_plain(tmp_path / "plain", "halves", layers), original).passed


# ---------------------------------------------------------------------------------------------------------------------
# By the libraries' own writers


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4", "F16", "BF16"])
def test_what_the_gguf_package_encodes_passes(tmp_path: Path, kind: str) -> None:
    layers = two_layers("gguf")
    report = verify(
        conversions.write_gguf(tmp_path / "model.gguf", layers, kind), original_of(tmp_path / "o", "gguf", layers)
    )
    assert report.passed
    assert max(p.ratio or 0 for layer in report.layers for p in layer.projections.values()) < 1.1


MLX = [(2, 32, "affine"), (3, 64, "affine"), (4, 64, "affine"), (6, 32, "affine"), (8, 64, "affine")]


@pytest.mark.parametrize("model", ["native", "upcycled"])
@pytest.mark.parametrize(("bits", "group", "mode"), [*MLX, (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")])
def test_what_mlx_lm_quantises_passes(tmp_path: Path, model: str, bits: int, group: int, mode: str) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    quantised, config = quantize_model(*load_model(DEMO / model), group, bits, mode=mode)
    save_model(tmp_path, quantised)
    save_config(config, tmp_path / "config.json")
    report = verify(tmp_path, DEMO / model, layers="all")
    assert report.passed
    assert all(len(layer.experts) == 8 and layer.router_error for layer in report.layers)
    ratios = [p.ratio or 0 for layer in report.layers for p in layer.projections.values()]
    assert 0.85 < min(ratios) <= max(ratios) < 1.15


SAME = [  # the same weights as two libraries save them
    ("qwen3_moe", "qwen3_moe_fused"),
    ("mixtral_fused", "mixtral"),
    ("deepseek_v3_sharded", "deepseek_v3_fused"),
    ("gpt_oss", "gpt_oss"),
    ("granitemoe", "granitemoe_fused"),
]


@pytest.mark.parametrize(("model", "original"), SAME)
def test_what_transformers_saves_in_another_form_passes(model: str, original: str) -> None:
    report = verify(FIXTURES / model, FIXTURES / original)
    assert report.passed, report.faults


def rescale(layer: Layer, inputs: Array, neurons: Array) -> Layer:
    """A layer with factors for the inputs of experts and router, and for its neurons in ups and downs."""
    return Layer(
        {
            "gate": layer.matrices["gate"] * inputs,
            "up": layer.matrices["up"] * inputs * neurons[:, None],
            "down": layer.matrices["down"] / neurons,
        },
        layer.router * inputs,
    )


@pytest.mark.parametrize("taken_back", [True, False])
def test_factors_as_awq_leaves_them_are_harmless_where_the_norm_takes_them_back(
    tmp_path: Path, taken_back: bool
) -> None:
    rng = np.random.default_rng(0)
    inputs, neurons = (np.exp(rng.normal(0, 0.5, size)).astype(np.float32) for size in (64, 96))
    norm = conversions.round_bf16(rng.normal(1, 0.1, 64))
    layers = two_layers("gate_up_down")
    models = []
    for name, one, factors in (("o", layers, None), ("m", [rescale(x, inputs, neurons) for x in layers], inputs)):
        tensors = conversions.mlx_tensors(one) if factors is not None else conversions.plain_tensors("mlx", one)
        for number in (0, 1):
            own = norm if factors is None or not taken_back else norm / factors
            tensors[f"model.layers.{number}.post_attention_layernorm.weight"] = own.astype(ml_dtypes.bfloat16)
        config = conversions.mlx_config() if factors is not None else {}
        models.append(conversions.write_tensors(tmp_path / name, tensors, "mlx", one, **config))
    report = verify(models[1], models[0])
    assert report.passed == taken_back
    assert kinds(report) == (set() if taken_back else {"scale", "router"})
    assert [note for note in report.notes if "harmless" in note] or not taken_back


# ---------------------------------------------------------------------------------------------------------------------
# What is not there, and what was left


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[Layer]]:
    layers = two_layers("gate_up_down")
    return original_of(tmp_path / "original", "gate_up_down", layers), layers


def without(tensors: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: array for name, array in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("part", "layer", "role", "expert"),
    [
        (".layers.1.mlp.experts", 1, None, None),
        (".layers.1.mlp.experts.3.up_proj", 1, "up", 3),
        (".layers.1.mlp.experts.3.", 1, None, 3),
        (".layers.0.mlp.experts.0.", 0, None, 0),
        (".layers.1.mlp.experts.7.", 1, None, 7),
        ("gate_proj", 0, "gate", None),
        (".down_proj", 0, "down", None),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, made: tuple[Path, list[Layer]], part: str, layer: int, role: str | None, expert: int | None
) -> None:
    original, layers = made
    tensors = without(conversions.plain_tensors("gate_up_down", layers), part)
    report = verify(conversions.write_tensors(tmp_path / "model", tensors, "gate_up_down", layers), original)
    found = {(fault.fault, fault.layer, fault.role, fault.expert) for fault in report.faults}
    assert ("missing", layer, role, expert) in found
    assert kinds(report) == {"missing"}


@pytest.mark.parametrize("family", ["halves", "turns", "transposed", "mlx", "gguf", "flattened", "fused"])
def test_a_stack_that_lacks_experts_lacks_these(tmp_path: Path, made: tuple[Path, list[Layer]], family: str) -> None:
    original, layers = made
    cut = [replace(x, matrices={role: m[:6] for role, m in x.matrices.items()}) for x in layers]
    if family in ("flattened", "gguf"):
        cut = [replace(x, router=layer.router[:6]) for x, layer in zip(cut, layers, strict=True)]
    report = verify(conversions.convert(tmp_path / "model", family, cut), original)
    lacking = {(f.layer, f.expert) for f in report.faults if f.fault == "missing"}
    assert lacking >= {(0, 7), (1, 7)}
    assert kinds(report) <= {"missing", "router"}


def quantised(layers: list[Layer]) -> dict[str, Any]:
    """Experts one by one as compressed-tensors packs them in four bits."""
    tensors: dict[str, Any] = {}
    for name, array in conversions.plain_tensors("gate_up_down", layers).items():
        if "experts" not in name:
            tensors[name] = array
            continue
        values = array.astype(np.float32).reshape(len(array), -1, 32)
        scales = np.abs(values).max(axis=2, keepdims=True) / np.float32(7.5)
        codes = (np.clip(np.rint(values / scales), -8, 7) + 8).astype(np.uint32).reshape(len(array), -1, 8)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_packed"] = (codes << np.arange(0, 32, 4, dtype=np.uint32)).sum(2).astype(np.int32)
        tensors[f"{stem}.weight_scale"] = scales[:, :, 0].astype(ml_dtypes.bfloat16)
        tensors[f"{stem}.weight_shape"] = np.array(array.shape, np.int32)
    return tensors


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        "ignore": ["lm_head"],
    }
}


def mix(layers: list[Layer], kept: str) -> dict[str, Any]:
    """Quantised tensors, but those whose names have `kept` in them."""
    plain = conversions.plain_tensors("gate_up_down", layers)
    return {n: a for n, a in quantised(layers).items() if kept not in n} | {n: a for n, a in plain.items() if kept in n}


@pytest.mark.parametrize(
    ("kept", "layer", "role", "expert"),
    [
        ("layers.1.mlp.experts.3.", 1, None, 3),
        ("layers.1.mlp.experts.", 1, None, None),
        ("layers.0.mlp.experts.2.up_proj", 0, "up", 2),
        ("down_proj", 0, "down", None),
        ("experts.", 1, None, None),
    ],
)
def test_experts_that_were_left_unquantised_are_named(
    tmp_path: Path, made: tuple[Path, list[Layer]], kept: str, layer: int, role: str | None, expert: int | None
) -> None:
    original, layers = made
    model = conversions.write_tensors(tmp_path / "model", mix(layers, kept), "gate_up_down", layers, **COMPRESSED)
    report = verify(model, original)
    found = {(fault.fault, fault.layer, fault.role, fault.expert) for fault in report.faults}
    assert ("unquantised", layer, role, expert) in found
    assert kinds(report) == {"unquantised"}


def test_all_quantised_is_sound(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    model = conversions.write_tensors(tmp_path / "model", quantised(layers), "gate_up_down", layers, **COMPRESSED)
    assert verify(model, original).passed


def test_layers_that_the_config_leaves_out_are_a_note(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    config = json.loads(json.dumps(COMPRESSED))
    config["quantization_config"]["ignore"] += ["re:.*layers\\.1\\.mlp\\.experts.*"]
    model = conversions.write_tensors(tmp_path / "model", mix(layers, "layers.1."), "gate_up_down", layers, **config)
    report = verify(model, original)
    assert report.passed
    assert report.notes == ("the config says that experts of layers 1 were not quantised",)


def test_a_stack_that_was_left_unquantised_is_named(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    plain = conversions.plain_tensors("mlx", layers)
    tensors = {n: a for n, a in conversions.mlx_tensors(layers).items() if "1.mlp.switch_mlp.up" not in n}
    tensors |= {n: a for n, a in plain.items() if "1.mlp.switch_mlp.up" in n}
    model = conversions.write_tensors(tmp_path / "model", tensors, "mlx", layers, **conversions.mlx_config())
    assert [(f.fault, f.layer, f.role, f.expert) for f in verify(model, original).faults] == [
        ("unquantised", 1, "up", None)
    ]


def test_a_scale_that_is_not_there_is_named(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    tensors = without(quantised(layers), "layers.1.mlp.experts.7.up_proj.weight_scale")
    model = conversions.write_tensors(tmp_path / "model", tensors, "gate_up_down", layers, **COMPRESSED)
    (fault,) = verify(model, original).faults
    assert (fault.fault, fault.layer, fault.role, fault.expert) == ("missing", 1, "up", 7)
    assert fault.detail == "its weight_scale is missing"


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("family", ["gate_up_down", "w1_w3_w2", "mlx", "halves", "fused"])
@pytest.mark.parametrize("where", ["layers.", "layers.1."])
def test_a_transposed_shape_is_named(tmp_path: Path, made: tuple[Path, list[Layer]], family: str, where: str) -> None:
    original, layers = made
    down = TABLE[FAMILIES[family]].tensors[-1].leaf
    tensors = {
        name: np.ascontiguousarray(np.swapaxes(array, -1, -2)) if where in name and f".{down}" in name else array
        for name, array in conversions.plain_tensors(family, layers).items()
    }
    report = verify(conversions.write_tensors(tmp_path / "model", tensors, family, layers), original)
    assert kinds(report) == {"transposed"}
    assert {(fault.role, fault.expert) for fault in report.faults} == {("down", None)}


def test_another_size_is_told(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, _ = made
    other = two_layers("gate_up_down", neurons=128)
    report = verify(conversions.write_plain(tmp_path / "model", "mlx", other), original)
    assert "error" in kinds(report)
    assert "[128, 64], but the original's is [96, 64]" in report.faults[0].detail


def test_layers_beyond_the_originals_are_told(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    report = verify(conversions.write_plain(tmp_path / "model", "w1_w3_w2", [*layers, layers[0]]), original)
    assert [(f.fault, f.layer, f.detail) for f in report.faults] == [
        ("error", 2, "the original has no experts in this layer")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is read, and what is shown


def test_two_models_on_the_hub_are_read_by_ranges(tmp_path: Path, hub: HubServer, cache: Path) -> None:
    layers = [make_layer(seed, experts=32, neurons=96, hidden=128) for seed in range(6)]
    original = conversions.write_plain(tmp_path / "original", "gate_up_down", layers)
    model = conversions.write_mlx(tmp_path / "model", layers)
    hub.add("org/original", original)
    hub.add("org/model", model)
    report = MoEWeightsService.verify("org/model", "org/original", experts=4)
    assert report.passed
    assert [layer.layer for layer in report.layers] == [0, 2, 5]
    assert [len(layer.experts) for layer in report.layers] == [4, 4, 4]
    whole = sum(file.stat().st_size for folder in (original, model) for file in folder.iterdir())
    assert 0 < report.cost.bytes_fetched < 0.25 * whole


def test_all_layers_are_all_experts(tmp_path: Path) -> None:
    layers = [make_layer(seed, experts=16) for seed in (0, 1)]
    original = conversions.write_plain(tmp_path / "original", "gate_up_down", layers)
    model = conversions.write_mlx(tmp_path / "model", layers)
    assert {layer.experts for layer in verify(model, original, layers="all").layers} == {tuple(range(16))}
    assert {len(layer.experts) for layer in verify(model, original).layers} == {8}
    assert {layer.experts for layer in verify(model, original, layers="1", experts=2).layers} == {(0, 15)}


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"the tolerance is 0\.5"):
        MoEWeightsService.verify("demo:native", "demo:native", tolerance=0.5)
    with pytest.raises(InvalidRequest, match="the number of experts must be at least 1"):
        MoEWeightsService.verify("demo:native", "demo:native", experts=0)


def test_an_unknown_format_is_no_fault(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    tensors = {n: a.view(np.uint8) if "experts" in n else a for n, a in quantised(layers).items()}
    model = conversions.write_tensors(tmp_path / "model", tensors, "gate_up_down", layers, **COMPRESSED)
    with pytest.raises(UnknownFormat):
        verify(model, original)


def test_the_command_exits_with_1_where_there_is_a_fault(
    tmp_path: Path, made: tuple[Path, list[Layer]], capsys: Capture
) -> None:
    original, layers = made
    sound = conversions.write_mlx(tmp_path / "sound", layers)
    broken = conversions.write_mlx(tmp_path / "broken", [layers[0], conversions.exchange(layers[1])])
    assert run([*VERIFY, "-m", str(sound), "--against", str(original)]) == 0
    assert "PASSED" in capsys.readouterr().out
    page, file = tmp_path / "page.html", tmp_path / "report.json"
    assert run([*VERIFY, "-m", str(broken), "-a", str(original), "--html", str(page), "-o", str(file)]) == 1
    screen = capsys.readouterr().out
    assert "FAILED" in screen
    assert "exchanged" in screen
    assert max(map(len, screen.splitlines())) <= 80
    report = MoEWeightsVerification.model_validate_json(file.read_text())
    assert report.schema_ == "moe-weights-verification/1"
    assert not report.passed
    assert "gate and up are swapped" in page.read_text()
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_page_of_a_model_of_which_nothing_could_be_compared(tmp_path: Path, made: tuple[Path, list[Layer]]) -> None:
    original, layers = made
    tensors = without(conversions.plain_tensors("gate_up_down", layers), "down_proj")
    report = verify(conversions.write_tensors(tmp_path / "model", tensors, "gate_up_down", layers), original)
    assert report.layers == ()
    assert "it is missing in every layer" in to_page(report)
