"""What an overlay and an export take over from a quantised model, and what they refuse to take over unread."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.introspection.moe import MoECompressionService, MoETypeService, UnknownFormat
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
    """AWQ in ModelOpt's form scales the inputs: the weight alone is another matrix."""
    tensors, config = demo()
    tensors = quantise(tensors, O_PROJ) | {f"{O_PROJ}.pre_quant_scale": np.full(64, 2, ml_dtypes.bfloat16)}
    model = write(tmp_path / "model", tensors, {**config, "quantization_config": FP8})
    with pytest.raises(UnknownFormat, match=r"o_proj\.pre_quant_scale: we don't know what it does"):
        export(tmp_path, model)
    assert not (tmp_path / "export").exists()


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
