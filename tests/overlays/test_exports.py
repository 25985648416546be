"""Overlays, and other models, exported for mlx-lm, compressed-tensors and llama-quantize, read by others than us."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app, run
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import UnknownFormat
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.overlays.checkpoint.rebuilt import rebuilt_checkpoint
from chuk_lazarus.introspection.moe.overlays.checkpoint.writer import write_overlay
from chuk_lazarus.introspection.moe.overlays.codes.packed import PackedCode
from chuk_lazarus.introspection.moe.reports import MoEOverlayExport
from chuk_lazarus.introspection.moe.weights.checkpoint import Checkpoint
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER
from chuk_lazarus.introspection.moe.weights.repositories.local import Folder
from encoders_packed import unpack_stream
from hub_server import HubServer
from places import FIXTURES

Tensors = dict[str, NDArray[Any]]
EXPORT = ["introspect", "moe-expert", "moe-overlay-export"]
NATIVE = DEMO_FOLDER / "native"
FAMILIES = [
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "granitemoe",
    "dbrx",
    "deepseek_v3_fp8",
    "llama4",
    "olmoe",
    "mixtral_fused",
]


def export(model: str | Path, target: Path, **options: Any) -> MoEOverlayExport:
    return MoECompressionService.export(model, target, **options)


def stored(folder: Path) -> Tensors:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def logits(folder: Path) -> NDArray[np.float32]:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])))


def relative(other: NDArray[Any], exact: NDArray[Any]) -> float:
    return float(np.linalg.norm(other - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "overlay"
    MoECompressionService.compress("demo:upcycled", folder, bits=4)
    return folder


@pytest.fixture(scope="module")
def standard(overlay: Path) -> Path:
    export(overlay, overlay.with_name("standard"))
    return overlay.with_name("standard")


# ---------------------------------------------------------------------------------------------------------------------
# An overlay as the standard checkpoint that it stands for


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", ["all", "first"])
def test_an_overlay_reads_as_its_export(tmp_path: Path, name: str, layers: str) -> None:
    """Byte for byte where it was overlaid, whatever the layout; one layer of gpt-oss is not: its axes would differ."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / name, source, ignore=shutil.ignore_patterns("*.npz", "origin.json"))
    experts = Experts.open(str(source))
    chosen = experts.layers if layers == "all" else experts.layers[:1]
    ranks = {number: dict.fromkeys(experts.layer(number).roles, 2) for number in chosen}
    write_overlay(experts, ranks, tmp_path / "overlay", resources=Resources.current(), progress=lambda *_: None)
    export(tmp_path / "overlay", tmp_path / "standard")
    ours = rebuilt_checkpoint(Checkpoint(Folder(tmp_path / "overlay")))
    theirs = Checkpoint(Folder(tmp_path / "standard"))
    assert set(ours.names) >= set(theirs.names)  # those of a quantised rest have scales beside them
    rebuilt = [name for name in ours.names if ours.info(name).file.startswith("rebuilt-")]
    assert rebuilt
    for each in rebuilt:
        assert ours.info(each).shape == theirs.info(each).shape
        assert b"".join(ours.chunks(each, 1000)) == b"".join(theirs.chunks(each, 10**9))
    one, other = Experts(ours), Experts(theirs)
    assert (one.family, one.layers) == (other.family, other.layers)
    for number in one.layers:
        for role, matrix in one.layer(number).matrices(1).items():
            np.testing.assert_array_equal(matrix, other.layer(number).matrices(1)[role])


def test_a_changed_overlay_is_another_checkpoint(tmp_path: Path, overlay: Path) -> None:
    shutil.copytree(overlay, tmp_path / "overlay")
    before = rebuilt_checkpoint(Checkpoint(Folder(tmp_path / "overlay"))).files
    file = next(path for path in (tmp_path / "overlay").glob("*.safetensors"))
    file.touch()
    assert rebuilt_checkpoint(Checkpoint(Folder(tmp_path / "overlay"))).files != before


# ---------------------------------------------------------------------------------------------------------------------
# mlx


def test_mlx_lm_loads_an_overlay_that_was_exported(tmp_path: Path, overlay: Path, standard: Path) -> None:
    report = export(overlay, tmp_path / "mlx", format="mlx", fit="1GB", rest_bits="keep")
    assert (report.format, report.family, report.layers) == ("mlx", "w1_w3_w2", (0, 1))
    assert set(report.widths[0].values()) == {"8bit:32"}
    exact, ours = logits(standard), logits(tmp_path / "mlx")
    assert relative(ours, exact) < 0.01
    assert relative(logits(DEMO_FOLDER / "upcycled"), exact) > 0.02  # the overlay is what is exported
    assert max(layer.output_error.max for layer in report.verification) < 0.02
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    assert "overlay_model.py" not in names
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert not {"overlay_config", "model_file"} & config.keys()


def test_a_model_that_is_no_overlay_goes_as_it_is_compressed(tmp_path: Path) -> None:
    export("demo:native", tmp_path / "one", format="mlx", bits=3.2)
    MoECompressionService.compress("demo:native", tmp_path / "two", format="mlx", bits=3.2)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["mlx", "compressed-tensors"])
def test_a_size_is_kept(tmp_path: Path, overlay: Path, kind: str) -> None:
    export(overlay, tmp_path / "fit", format=kind, fit=400_000)
    sizes = [path.stat().st_size for path in (tmp_path / "fit").rglob("*") if path.is_file()]
    assert 0.8 * 400_000 < sum(sizes) <= 400_000


# ---------------------------------------------------------------------------------------------------------------------
# compressed-tensors


def decode(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """What a loader of compressed-tensors makes of a folder: by module, the group that its name is found in."""
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    plain = {name: array for name, array in tensors.items() if ".weight_" not in name}
    for name in tensors:
        module, separator, _ = name.partition(".weight_packed")
        if not separator:
            continue
        groups = settings["config_groups"].values()
        fitting = [
            group
            for group in groups
            if any(re.match(target.removeprefix("re:"), module) for target in group["targets"])
        ]
        assert len(fitting) == 1
        assert module not in settings["ignore"]
        weights = fitting[0]["weights"]
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        integers = unpack_stream(tensors[name], weights["num_bits"], columns) - (1 << (weights["num_bits"] - 1))
        scales = np.repeat(tensors[f"{module}.weight_scale"].astype(np.float32), weights["group_size"], axis=1)
        assert integers.shape == scales.shape == (rows, columns)
        plain[f"{module}.weight"] = integers.astype(np.float32) * scales
    return plain


@pytest.mark.parametrize(("bits", "widths"), [(4.3, 1), (6.5, 2), (8.0, 2), (3.3, 1), (2.9, 2)])
def test_packed_integers_are_those_of_the_config(
    tmp_path: Path, overlay: Path, standard: Path, bits: float, widths: int
) -> None:
    report = export(overlay, tmp_path / "packed", format="compressed-tensors", bits=bits)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    exact, decoded = stored(standard), decode(stored(tmp_path / "packed"), config)
    assert decoded.keys() == exact.keys()
    experts = Experts.open(str(tmp_path / "packed"))
    assert len(config["quantization_config"]["config_groups"]) == widths
    errors: dict[tuple[int, str], list[float]] = {}
    for name, array in decoded.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.weight", name)
        if not match:
            np.testing.assert_array_equal(array.view(np.uint16), exact[name].view(np.uint16))
            is_matrix = array.ndim > 1 and name.endswith(".weight")
            assert is_matrix == (name.removesuffix(".weight") in config["quantization_config"]["ignore"])
            continue
        layer, expert, role = int(match[1]), int(match[2]), {"w1": "gate", "w2": "down", "w3": "up"}[match[3]]
        np.testing.assert_array_equal(experts.layer(layer).matrices(expert)[role], array)
        errors.setdefault((layer, role), []).append(relative(array, exact[name].astype(np.float32)))
    for verified in report.verification:
        for role, error in verified.weight_error.items():
            assert error.mean == pytest.approx(np.mean(errors[verified.layer, role]), rel=1e-4)
    assert report.bytes == sum(array.nbytes for array in stored(tmp_path / "packed").values())
    assert all(len(set(roles.values())) == 1 for roles in report.widths.values())  # vLLM wants one for a layer
    notes = " ".join(report.notes)
    assert ("transformers" in notes) == (widths > 1)
    assert ("need a vLLM" in notes) == (bits < 4)
    sizes = [group["weights"]["group_size"] for group in config["quantization_config"]["config_groups"].values()]
    assert len(set(sizes)) == widths  # else transformers would take the bits of one group for those of another


def test_other_names_above_the_layers_are_found(tmp_path: Path) -> None:
    """vLLM and transformers rename what is above the layers, and the projections."""
    export("demo:native", tmp_path / "packed", format="compressed-tensors")
    groups = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["config_groups"]
    (target,) = groups["group_0"]["targets"]
    found = re.compile(target.removeprefix("re:")).match
    assert found("language_model.model.layers.1.block_sparse_moe.experts.0.gate_proj")
    assert found("layers.0.block_sparse_moe.experts.7.w2")
    assert not found("model.layers.11.block_sparse_moe.experts.0.w1")
    assert not found("model.layers.1.block_sparse_moe.gate")


def test_rows_without_groups_stay_and_are_ignored(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "olmoe", source, ignore=shutil.ignore_patterns("*.npz", "origin.json"))
    report = export(source, tmp_path / "packed", format="compressed-tensors", fit="1GB")
    assert {width for roles in report.widths.values() for width in roles.values()} == {"bf16"}
    assert "quantization_config" not in json.loads((tmp_path / "packed/config.json").read_text())
    assert any("stay in bf16" in note for note in report.notes)
    before, after = Experts.open(str(source)).layer(0), Experts.open(str(tmp_path / "packed")).layer(0)
    for role, matrix in before.matrices(1).items():
        np.testing.assert_allclose(after.matrices(1)[role], matrix, rtol=2**-8)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss", "granitemoe", "dbrx"])
def test_stacked_families_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownFormat, match="one module per matrix of an expert"):
        export(FIXTURES / name, tmp_path / "packed", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: Path) -> None:
    export(overlay, tmp_path / "whole", format="compressed-tensors", bits=6.5)
    calls = 0

    def stop_late(self: PackedCode, matrix: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 90:  # the trials take 54, a layer 24
            raise KeyboardInterrupt
        return encode(self, matrix)

    encode = PackedCode.encode
    with monkeypatch.context() as patch:
        patch.setattr(PackedCode, "encode", stop_late)
        with pytest.raises(KeyboardInterrupt):
            export(overlay, tmp_path / "stopped", format="compressed-tensors", bits=6.5)
    assert (tmp_path / "stopped.partial/model-00002-of-00003.safetensors").is_file()
    assert not (tmp_path / "stopped").exists()
    export(overlay, tmp_path / "stopped", format="compressed-tensors", bits=6.5)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}


# ---------------------------------------------------------------------------------------------------------------------
# gguf-recipe


def make_model(folder: Path, hidden: int, intermediate: int) -> None:
    """A Mixtral whose projections have other tails in other layers."""
    rng = np.random.default_rng(3)
    config = json.loads((NATIVE / "config.json").read_text())
    tensors = dict(load_file(next(NATIVE.glob("*.safetensors"))))
    for name, array in tensors.items():
        if ".experts." in name:
            shape = (hidden, intermediate) if ".w2." in name else (intermediate, hidden)
            heavy = ".1." in name.partition("block")[0] and ".w1." in name
            values = rng.standard_t(4, shape) if heavy else rng.standard_normal(shape)
            tensors[name] = (0.05 * values).astype(array.dtype)
        elif "embed" in name or "head" in name:
            tensors[name] = np.zeros((256, hidden), array.dtype)
        elif "gate" in name:
            tensors[name] = np.zeros((8, hidden), array.dtype)
        elif "norm" in name:
            tensors[name] = np.ones(hidden, array.dtype)
        else:
            tensors[name] = np.zeros((hidden, hidden), array.dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    (folder / "config.json").write_text(json.dumps(config | sizes))


def types_by_tensor(recipe: Path, default: str, blocks: int) -> dict[str, str]:
    """As llama-quantize reads the file: words of regex=TYPE, of which the first that is found in a name decides."""
    rules = [word.split("=") for word in recipe.read_text().split()]
    assert all(len(rule) == 2 and rule[0] == rule[0].lower() for rule in rules)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    stacked = [f"block_sparse_moe.experts.{name}" for name in ("w1", "w2", "w3")]
    plain = [*stacked, "block_sparse_moe.gate", "self_attn.q_proj", "self_attn.o_proj"]
    hf = [f"model.layers.{block}.{name}.weight" for block in range(blocks) for name in plain]
    found = {}
    for name in (*hf, "lm_head.weight", "model.embed_tokens.weight"):
        tensor = names.get_name(name, try_suffixes=(".weight",))
        assert tensor
        found[tensor] = next((kind for pattern, kind in rules if re.search(pattern, tensor)), default)
    return found


@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 512), (64, 96), (64, 256)])
def test_the_gguf_package_knows_names_and_types(tmp_path: Path, hidden: int, intermediate: int) -> None:
    make_model(tmp_path / "model", hidden, intermediate)
    report = export(tmp_path / "model", tmp_path / "types.txt", format="gguf-recipe", bits=5.2)
    types = types_by_tensor(tmp_path / "types.txt", "Q8_0", 2)
    total, roles = 0, {"gate": (hidden, "gate"), "up": (hidden, "up"), "down": (intermediate, "down")}
    for number, widths in report.widths.items():
        assert widths["gate"] == widths["up"]  # converters may join them
        for role, (columns, name) in roles.items():
            assert types[f"blk.{number}.ffn_{name}_exps.weight"] == widths[role]
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[widths[role]]]
            assert columns % block == 0
            total += 8 * hidden * intermediate // block * size
    assert {kind for name, kind in types.items() if "_exps" not in name} == {"Q8_0"}
    assert 5.2 * 0.93 < 8 * total / (6 * 8 * hidden * intermediate) <= 5.2
    rest = (2 * 256 * hidden + 8 * hidden * hidden) // 32 * 34 + 4 * (2 * 8 + 5) * hidden
    assert report.bytes == total + rest
    fused = re.compile(r"blk\.0\.ffn_gate_up_exps\.weight")
    rules = [line.split("=") for line in (tmp_path / "types.txt").read_text().split()]
    assert [kind for pattern, kind in rules if re.search(pattern, "blk.0.ffn_gate_up_exps.weight")] == [
        report.widths[0]["gate"]
    ], fused


def test_errors_of_types_that_the_package_rounds_to_are_its_own(tmp_path: Path) -> None:
    """Blocks of 32, without IQ4_NL: every row of every expert, where ours is of a sample."""
    make_model(tmp_path / "model", 64, 96)
    report = export(tmp_path / "model", tmp_path / "types.txt", format="gguf-recipe", fit="1GB")
    assert {kind for roles in report.widths.values() for kind in roles.values()} == {"Q8_0"}
    kind = gguf.GGMLQuantizationType.Q8_0
    errors = []
    for array in load_file(tmp_path / "model/model.safetensors").values():
        if array.shape in {(64, 96), (96, 64)}:
            exact = array.astype(np.float32)
            errors.append(relative(gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind), exact) ** 2)
    assert report.weight_error == pytest.approx(np.sqrt(np.mean(errors)), rel=0.03)


def test_heavier_tails_get_more_bits(tmp_path: Path) -> None:
    make_model(tmp_path / "model", 256, 256)
    report = export(tmp_path / "model", tmp_path / "types.txt", format="gguf-recipe", bits=4.4)
    bits = {
        place: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[roles["gate"]]] for place, roles in report.widths.items()
    }
    assert bits[1][1] / bits[1][0] > bits[0][1] / bits[0][0]


def test_the_rest_can_be_kept(tmp_path: Path) -> None:
    export("demo:native", tmp_path / "types.txt", format="gguf-recipe", rest_bits="keep")
    types = types_by_tensor(tmp_path / "types.txt", "Q8_0", 2)
    assert {kind for name, kind in types.items() if "_exps" not in name} == {"BF16"}
    assert "BF16" not in {kind for name, kind in types.items() if "_exps" in name}


def test_the_commands_lead_from_the_overlay_to_the_file(tmp_path: Path, overlay: Path, hub: HubServer) -> None:
    target = tmp_path / "my types.txt"
    report = export(overlay, target, format="gguf-recipe", rest_bits=4)
    rebuild, convert, quantise = report.commands
    stem = tmp_path / "my types"
    assert rebuild == f"lazarus introspect moe-expert moe-overlay-export {overlay} -O '{stem}-standard'"
    assert convert == f"python convert_hf_to_gguf.py '{stem}-standard' --outtype bf16 --outfile '{stem}-bf16.gguf'"
    assert quantise == (f"llama-quantize --pure --tensor-type-file '{target}' '{stem}-bf16.gguf' '{stem}.gguf' Q4_K_S")
    hub.add("org/native", NATIVE)
    commands = export("org/native", target, format="gguf-recipe", force=True).commands
    assert commands[0].startswith("hf download org/native --revision")
    assert "-original' --outtype bf16" in commands[1]


def test_a_gguf_file_needs_no_conversion(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_expert_count(4)
    shapes = {"gate_exps": (4, 96, 64), "up_exps": (4, 96, 64), "down_exps": (4, 64, 96), "gate_inp": (4, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.ffn_{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.add_tensor("output.weight", rng.standard_normal((32, 64)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = export(tmp_path / "model.gguf", tmp_path / "types.txt", format="gguf-recipe")
    stem = tmp_path / "types"
    options = f"--pure --tensor-type-file {stem}.txt"
    assert report.commands == (f"llama-quantize {options} {tmp_path}/model.gguf {stem}.gguf Q8_0",)
    assert report.layers == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# What can't be, and what is shown


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "4"], 2, "it takes no widths"),
        (["--rest-bits", "4"], 2, "it takes no widths"),
        (["--format", "compressed-tensors", "--rest-bits", "8"], 2, "only the experts"),
        (["--format", "mlx", "--bits", "1.5"], 2, "out of reach"),
        (["--format", "compressed-tensors", "--bits", "1.5"], 2, "out of reach"),
        (["--format", "gguf-recipe", "--fit", "100kB"], 2, "out of reach"),
        (["--format", "gguf-recipe", "--rest-bits", "7"], 2, "the rest can't have 7 bits"),
        (["--format", "mlx", "--bits", "3", "--fit", "1GB"], 2, "give one of the two"),
        (["--format", "mlx", "--max-error", "2"], 2, "give a share"),
    ],
)
def test_what_can_t_be(
    tmp_path: Path, overlay: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    assert run([*EXPORT, str(overlay), "-O", str(tmp_path / "out"), "-q", *options]) == code
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_overlays_become_standard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*EXPORT, str(NATIVE), "-O", str(tmp_path / "out")]) == 3
    assert "no overlay" in capsys.readouterr().err


def test_a_recipe_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "types.txt"
    target.write_text("mine")
    command = [*EXPORT, "demo:native", "-O", str(target), "--format", "gguf-recipe", "-q"]
    assert run(command) == 2
    assert target.read_text() == "mine"
    assert run([*command[:-4], str(tmp_path), "--format", "gguf-recipe"]) == 2
    assert run([*command[:-4], str(tmp_path / "no/types.txt"), "--format", "gguf-recipe"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert run([*command, "--force"]) == 0
    assert "_exps" in target.read_text()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_leave_nothing(tmp_path: Path, value: float) -> None:
    shutil.copytree(NATIVE, tmp_path / "source")
    file = next((tmp_path / "source").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.7.w1" in name)
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, file)
    for kind in ("mlx", "compressed-tensors", "gguf-recipe"):
        assert run([*EXPORT, str(tmp_path / "source"), "-O", str(tmp_path / "out"), "--format", kind, "-q"]) == 3
        assert not (tmp_path / "out").exists()


def test_the_screen_has_commands_that_can_be_copied(tmp_path: Path) -> None:
    target = tmp_path / "types.txt"
    command = [*EXPORT, "demo:native", "-O", str(target), "--format", "gguf-recipe", "-q"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "60"})
    assert done.exit_code == 0, done.output
    assert any(line.startswith("    llama-quantize") and line.endswith(" Q8_0") for line in done.output.splitlines())
    assert "IQ4_NL" in done.output
