"""What an overlay and an export take over from a quantised model, and what they refuse to take over unread."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.introspection.moe import ModelUnreadable, MoECompressionService, MoETypeService, UnknownFormat
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER

Tensors = dict[str, NDArray[Any]]
RANKS = {"gate": 64, "up": 64, "down": 64}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
O_PROJ = "model.layers.0.self_attn.o_proj"
HADAMARD = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*w2$"], "location": "input"}]}}}
OF_HEADS = {"config_groups": {"R2": {"type": "hadamard", "apply": [{"targets": ["re:.*v_proj$", "re:.*o_proj$"]}]}}}


def demo() -> tuple[Tensors, dict[str, Any]]:
    folder = DEMO_FOLDER / "upcycled"
    return dict(load_file(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None) -> str:
    folder.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def quantise(tensors: Tensors, module: str) -> Tensors:
    """The tensors with one matrix in FP8, and a scale for it."""
    matrix = tensors[f"{module}.weight"].astype(np.float32)
    scale = np.float32(np.abs(matrix).max() / 448)
    parts = {"weight": (matrix / scale).astype(ml_dtypes.float8_e4m3fn), "weight_scale": np.asarray(scale)}
    return {**tensors, **{f"{module}.{part}": value for part, value in parts.items()}}


def export(folder: Path, model: str) -> tuple[Tensors, dict[str, Any] | None]:
    """What is left of a model after it was made an overlay and a standard checkpoint again."""
    MoECompressionService.compress(model, folder / "overlay", ranks=RANKS)
    MoECompressionService.export(folder / "overlay", folder / "export")
    found = {
        name: value for file in (folder / "export").glob("*.safetensors") for name, value in load_file(file).items()
    }
    config = folder / "export/config.json"
    return found, json.loads(config.read_text()) if config.exists() else None


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("transform_config", HADAMARD),
        ("rotation_config", {"algorithm": "spinquant", "r1": False, "r2": False, "r3": False, "r4": True}),
        ("spinquant_config", {"R1": True}),
        ("rotation_config", {"algorithm": "quarot"}),
        ("algo_config", [{"name": "awq"}, {"name": "rotation", "r1": True, "r2": True, "r3": False, "r4": False}]),
        ("algo_config", [{"name": "rotation", "random": False, "scaling_layers": []}]),
    ],
)
@pytest.mark.parametrize("place", [(), ("quantization_config",)])
def test_rotated_weights_are_refused(
    tmp_path: Path, key: str, settings: dict[str, Any], place: tuple[str, ...]
) -> None:
    tensors, config = demo()
    part = config
    for name in place:
        part = part.setdefault(name, {"quant_method": "compressed-tensors"})
    part[key] = settings
    with pytest.raises(UnknownFormat, match=f"under {key} that weights are stored rotated"):
        MoETypeService.analyze(write(tmp_path / "model", tensors, config))


QUAROT = {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}


@pytest.mark.parametrize(
    "said", [{"optional": {"quarot": QUAROT}}, {"metadata": {"quarot": {"max_tp_size": 4}}}, {"is_rot_used": True}]
)
@pytest.mark.parametrize("stated", [{}, {"quantization_config": {"quant_method": "ascend"}}])
def test_rotated_weights_are_refused_where_modelslim_s_file_tells_of_them(
    tmp_path: Path, said: dict[str, Any], stated: dict[str, Any]
) -> None:
    tensors, config = demo()
    model = write(tmp_path / "model", tensors, config | stated)
    description = {"model_quant_type": "W8A8_DYNAMIC", f"{O_PROJ}.weight": "W8A8_DYNAMIC", "version": "1.0.0"} | said
    (Path(model) / "quant_model_description.json").write_text(json.dumps(description))
    with pytest.raises(UnknownFormat, match="under quarot that weights are stored rotated"):
        MoETypeService.analyze(model)


def test_what_described_quantised_weights_is_not_copied(tmp_path: Path) -> None:
    tensors, config = demo()
    model = Path(write(tmp_path / "model", tensors, config))
    names = ["quant_model_description.json", "quant_model_description_w8a8.json", "quantization_config.json"]
    for name in names:
        (model / name).write_text(json.dumps({"model_quant_type": "W8A8", "metadata": {}, "version": "1.0.0"}))
    _, exported = export(tmp_path, str(model))
    assert exported is not None
    assert exported.keys() <= config.keys()
    assert not any((tmp_path / "export" / name).exists() for name in names)


@pytest.mark.parametrize("settings", [{}, {"algorithm": "spinquant", "r1": False, "r4": False}])
def test_an_empty_rotation_is_none(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors, config = demo()
    model = write(tmp_path / "model", tensors, {**config, "rotation_config": settings})
    assert MoETypeService.analyze(model).type == "UPCYCLED"
    export(tmp_path, model)


@pytest.mark.parametrize(
    ("key", "settings"), [("transform_config", OF_HEADS), ("rotation_config", {"r1": False, "r2": True, "r4": False})]
)
def test_rotated_heads_leave_the_experts_readable(tmp_path: Path, key: str, settings: dict[str, Any]) -> None:
    """But a copy without that config would be another model."""
    tensors, config = demo()
    model = write(tmp_path / "model", tensors, {**config, key: settings})
    assert MoETypeService.analyze(model).type == "UPCYCLED"
    with pytest.raises(UnknownFormat, match=f"under {key} that weights are stored rotated"):
        MoECompressionService.compress(model, tmp_path / "overlay", ranks=RANKS)
    assert not (tmp_path / "overlay").exists()


def test_an_unknown_tensor_of_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    """SVDQuant in ModelOpt's form adds a product: the weight alone is another matrix."""
    tensors, config = demo()
    tensors = quantise(tensors, O_PROJ) | {f"{O_PROJ}.svdquant_lora_a": np.full((2, 64), 2, ml_dtypes.bfloat16)}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    with pytest.raises(UnknownFormat, match=r"o_proj\.svdquant_lora_a: we don't know how it changes"):
        export(tmp_path, model)
    assert not (tmp_path / "export").exists()


FACTORS = np.exp2(np.arange(64) % 7 - 3).astype(ml_dtypes.bfloat16)


def divide_inputs(tensors: Tensors, module: str) -> Tensors:
    """As AWQ in ModelOpt's form has them: the module's inputs are multiplied, and its weight is divided, by factors."""
    weight = tensors[f"{module}.weight"]
    factors = np.resize(FACTORS, weight.shape[1])
    divided = (weight.astype(np.float32) / factors.astype(np.float32)).astype(weight.dtype)
    return {**tensors, f"{module}.weight": divided, f"{module}.pre_quant_scale": factors}


@pytest.mark.parametrize("is_quantised", [True, False])
def test_factors_of_inputs_are_multiplied_into_an_export(tmp_path: Path, is_quantised: bool) -> None:
    plain, config = demo()
    tensors = divide_inputs(plain, O_PROJ)
    tensors = quantise(tensors, O_PROJ) if is_quantised else tensors
    settings = {"quantization_config": FP8} if is_quantised else {}
    found, _ = export(tmp_path, write(tmp_path / "model", tensors, {**config, **settings}))
    assert set(found) == set(plain)
    close = {"rtol": 0.1, "atol": 1e-3} if is_quantised else {"rtol": 0}
    wanted = plain[f"{O_PROJ}.weight"].astype(np.float32)
    np.testing.assert_allclose(found[f"{O_PROJ}.weight"].astype(np.float32), wanted, **close)


def test_factors_of_experts_inputs_are_multiplied_into_an_overlay(tmp_path: Path) -> None:
    plain, config = demo()
    tensors = plain
    for expert in range(8):
        for role in ("w1", "w2", "w3"):
            tensors = divide_inputs(tensors, f"model.layers.0.block_sparse_moe.experts.{expert}.{role}")
    model = write(tmp_path / "model", tensors, config)
    found, _ = export(tmp_path, model)
    expected, _ = export(tmp_path / "plain", write(tmp_path / "plain/model", plain, config))
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("shape", "factors", "said"),
    [
        ((64, 64), np.ones(63), r"o_proj\.weight: .*not one factor per input, of which there are 64"),
        ((64, 64), np.ones(64, np.int32), r"o_proj\.weight: its pre_quant_scale is I32"),
        ((2, 64, 64), np.ones((2, 64)), r"o_proj\.weight: .*no layout says which axis of the stack these are"),
    ],
)
def test_factors_that_can_not_be_those_of_inputs_are_refused(
    tmp_path: Path, shape: tuple[int, ...], factors: NDArray[Any], said: str
) -> None:
    tensors, config = demo()
    floats = factors if factors.dtype == np.int32 else factors.astype(ml_dtypes.bfloat16)
    weight = np.ones(shape, ml_dtypes.bfloat16)
    tensors = {**tensors, f"{O_PROJ}.weight": weight, f"{O_PROJ}.pre_quant_scale": floats}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    with pytest.raises(UnknownFormat, match=said):
        export(tmp_path, model)
    assert not (tmp_path / "export").exists()


def test_an_expert_without_the_factors_that_others_have_is_named(tmp_path: Path) -> None:
    tensors, config = demo()
    experts = "model.layers.0.block_sparse_moe.experts"
    for expert in (0, 1, 2, 4, 5, 6, 7):
        tensors = divide_inputs(tensors, f"{experts}.{expert}.w2")
    model = write(tmp_path / "model", tensors, config)
    with pytest.raises(ModelUnreadable, match=r"expert 3 lacks the pre_quant_scale that belongs to .*3\.w2\.weight"):
        MoETypeService.analyze(model)


def test_an_expert_that_was_left_unquantised_has_no_factors(tmp_path: Path) -> None:
    plain, config = demo()
    tensors, module = plain, "model.layers.0.block_sparse_moe.experts.{}.w2"
    for expert in (0, 1, 2, 4, 5, 6, 7):
        tensors = quantise(divide_inputs(tensors, module.format(expert)), module.format(expert))
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    layer = Experts.open(model).layer(0)
    for expert in range(8):
        wanted = plain[f"{module.format(expert)}.weight"].astype(np.float32)
        found = layer.matrices(expert)["down"]
        np.testing.assert_allclose(found, wanted, rtol=0 if expert == 3 else 0.1, atol=0 if expert == 3 else 2e-3)


def test_a_refusal_names_the_weight_and_not_a_part_of_it(tmp_path: Path) -> None:
    tensors, config = demo()
    for expert in range(8):
        module = f"model.layers.0.block_sparse_moe.experts.{expert}.w2"
        tensors = quantise(tensors, module)
        tensors |= {f"{module}.{part}": np.asarray(0.02, np.float32) for part in ("a_scale", "input_scale")}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    with pytest.raises(UnknownFormat, match=r"experts\.0\.w2\.weight: stored in a format"):
        MoETypeService.analyze(model)


QUARK = {"quant_method": "quark", "quant_mode": "eager_mode"}


@pytest.mark.parametrize("level", ["", ".0"])
def test_quarks_own_names_of_scales_are_read(tmp_path: Path, level: str) -> None:
    """Within a model, Quark's scales belong to quantisers; some checkpoints have these names."""
    plain, config = demo()
    modules = [O_PROJ, *(f"model.layers.0.block_sparse_moe.experts.{expert}.w2" for expert in range(8))]
    tensors = plain
    for module in modules:
        tensors = quantise(tensors, module)
        tensors[f"{module}.weight_quantizer{level}.scale"] = tensors.pop(f"{module}.weight_scale")
        for what in ("input", "output"):
            tensors[f"{module}.{what}_quantizer{level}.scale"] = np.asarray(0.02, np.float32)
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": QUARK})
    assert MoETypeService.analyze(model).type == "UPCYCLED"
    found, exported = export(tmp_path, model)
    assert set(found) == set(plain)
    assert exported is not None
    assert "quantization_config" not in exported
    for module in (O_PROJ, modules[1]):
        wanted = plain[f"{module}.weight"].astype(np.float32)
        np.testing.assert_allclose(found[f"{module}.weight"].astype(np.float32), wanted, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("is_quantised", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        f"{O_PROJ}.input_scale",
        f"{O_PROJ}.output_scale",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.v_scale",
        "model.layers.0.self_attn.kv_scale",
        "model.layers.0.self_attn.q_proj.q_scale",
        "model.layers.0.self_attn.k_proj.output_quantizer.scale",
        "model.layers.0.self_attn.k_proj.kv_cache_scale",
        "model.layers.0.self_attn.v_proj.kv_cache_offset",
    ],
)
def test_scales_of_activations_go_with_the_settings(tmp_path: Path, name: str, is_quantised: bool) -> None:
    """Whether or not anything but experts is quantised."""
    plain, config = demo()
    tensors = quantise(plain, O_PROJ) if is_quantised else plain
    tensors = {**tensors, name: np.asarray(0.02, np.float32)}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    found, exported = export(tmp_path, model)
    assert set(found) == set(plain)
    assert exported is not None
    assert "quantization_config" not in exported
    assert np.allclose(
        found[f"{O_PROJ}.weight"].astype(np.float32), plain[f"{O_PROJ}.weight"].astype(np.float32), 0.1, 1e-3
    )


def test_a_neighbour_with_a_longer_name_is_kept(tmp_path: Path) -> None:
    tensors, config = demo()
    tensors = quantise(tensors, O_PROJ) | {f"{O_PROJ}_norm.weight": np.ones(64, ml_dtypes.bfloat16)}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    assert f"{O_PROJ}_norm.weight" in export(tmp_path, model)[0]


def test_settings_of_modules_that_are_gone_go_too(tmp_path: Path) -> None:
    tensors, config = demo()
    experts, kept = "model.layers.0.block_sparse_moe.experts.0.w1", "model.layers.0.self_attn.o_proj"
    settings = {
        "group_size": 32,
        "bits": 4,
        experts: {"group_size": 32, "bits": 8},
        kept: {"group_size": 32, "bits": 8},
    }
    tensors = {**tensors, "model.extra.weight": np.ones((4, 4), np.uint32)}  # so that something is still quantised
    model = write(tmp_path / "model", tensors, {**config, "quantization": settings})
    MoECompressionService.compress(model, tmp_path / "overlay", ranks=RANKS)
    found = json.loads((tmp_path / "overlay/config.json").read_text())["quantization"]
    assert found == {"group_size": 32, "bits": 4, kept: {"group_size": 32, "bits": 8}}


def half(tensors: Tensors) -> Tensors:
    return {name: value.astype(np.float16) for name, value in tensors.items()}


def single(tensors: Tensors) -> Tensors:
    return {name: value.astype(np.float32) for name, value in tensors.items()}


@pytest.mark.parametrize("change", [half, single])
def test_an_export_is_of_one_dtype_which_its_config_names(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors, config = demo()
    names = {"dtype": "float16", "torch_dtype": "float16"}
    model = write(tmp_path / "model", change(tensors), {**config, **names, "text_config": names})
    found, exported = export(tmp_path, model)
    assert {str(value.dtype) for value in found.values()} == {"bfloat16"}
    assert exported is not None
    assert exported["torch_dtype"] == exported["dtype"] == exported["text_config"]["dtype"] == "bfloat16"


def test_a_few_numbers_are_kept_in_float32_among_bf16(tmp_path: Path) -> None:
    tensors, config = demo()
    bias = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    model = write(tmp_path / "model", {**tensors, bias: np.linspace(0, 1, 8, dtype=np.float32)}, config)
    found, _ = export(tmp_path, model)
    assert np.array_equal(found[bias], np.linspace(0, 1, 8, dtype=np.float32))


def test_no_config_is_invented(tmp_path: Path) -> None:
    _, exported = export(tmp_path, write(tmp_path / "model", demo()[0], None))
    assert exported is None


def test_files_in_subfolders_are_kept(tmp_path: Path) -> None:
    tensors, config = demo()
    model = Path(write(tmp_path / "model", tensors, config))
    kept = {
        "additional_chat_templates/tool_use.jinja": "{{ m }}",
        "1_Pooling/config.json": "{}",
        "encoding/encoding_x.py": "# code\n",
        "tokenizer.model.v3": "vocabulary",
    }
    left = {".git/config.json": "{}", "original/model.safetensors": "", "figures/loss.png": ""}
    for name, content in (kept | left).items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    export(tmp_path, str(model))
    for folder in (tmp_path / "overlay", tmp_path / "export"):
        assert {name: (folder / name).read_text() for name in kept} == kept
        assert not any((folder / name).exists() for name in left)


@pytest.mark.parametrize("options", [{"ranks": RANKS}, {"bits": 4, "format": "mlx"}])
def test_files_that_are_not_copied_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER / "native", model)
    (model / "images").mkdir()
    for name in ("training_args.bin", "images/logo.png", "chat_template.jinja", ".gitattributes", "README.md"):
        (model / name).write_text("x")
    report = MoECompressionService.compress(str(model), tmp_path / "out", **options)
    assert "not copied: images/logo.png, training_args.bin" in report.notes
    assert (tmp_path / "out/chat_template.jinja").is_file()


def test_files_that_an_export_leaves_out_are_named(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    MoECompressionService.compress("demo:native", overlay, ranks=RANKS)
    (overlay / "training_args.bin").write_text("x")
    report = MoECompressionService.export(overlay, tmp_path / "out")
    assert report.notes == ("not copied: training_args.bin",)
    assert not (tmp_path / "out/training_args.bin").exists()


@pytest.mark.parametrize("kind", ["mlx", "compressed-tensors"])
def test_an_expert_that_is_not_finite_is_named(tmp_path: Path, kind: Any) -> None:
    """Widths are chosen by some rows of some experts: what is broken elsewhere is seen when it is coded."""
    tensors, config = demo()
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"][1, 0] = np.nan
    model = write(tmp_path / "model", tensors, config)
    with pytest.raises(ModelUnreadable, match="layer 1: down of expert 3: the matrix holds NaN"):
        MoECompressionService.export(model, tmp_path / "out", format=kind)
