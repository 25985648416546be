"""Models whose experts share nothing, quantised for mlx-lm itself and loaded by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app, run
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest, UnknownFormat
from chuk_lazarus.introspection.moe.overlays.codes.affine import AffineCode
from chuk_lazarus.introspection.moe.reports import MoEOverlayCompression
from chuk_lazarus.introspection.moe.weights.experts import Experts
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER
from hub_server import Fault, HubServer
from mlx_lm_recipes import RECIPES
from places import FIXTURES
from sampling import sampled

NATIVE = DEMO_FOLDER / "native"
COMPRESS = ["introspect", "moe-expert", "moe-overlay-compress"]


def compress(model: str, folder: Path, **options: Any) -> MoEOverlayCompression:
    return MoECompressionService.compress(model, folder, **options)


def tensor_bytes(folder: Path) -> int:
    sizes = (path.read_bytes() for path in folder.glob("*.safetensors"))
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in sizes)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parameters(folder: Path) -> dict[str, mx.array]:
    model, _ = load_model(folder)
    found: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})
    return found


def logits(folder: Path) -> np.ndarray[Any, Any]:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])))


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoEOverlayCompression, Path]:
    folder = tmp_path_factory.mktemp("stock") / "three"
    return compress("demo:native", folder, bits=3.2), folder


def test_natives_become_what_mlx_lm_loads(three_bits: tuple[MoEOverlayCompression, Path]) -> None:
    report, folder = three_bits
    assert report.format == "mlx"
    experts = Experts.open("demo:native")
    loaded = parameters(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    for number in experts.layers:
        layer = experts.layer(number)
        for role in layer.roles:
            path = f"model.layers.{number}.block_sparse_moe.switch_mlp.{role}_proj"
            exact = np.stack([layer.matrices(expert)[role] for expert in range(layer.count)])
            parts = (loaded[f"{path}.{name}"] for name in ("weight", "scales", "biases"))
            decoded = np.array(mx.dequantize(*parts, **settings[path]).astype(mx.float32))
            error = np.linalg.norm(decoded - exact) / np.linalg.norm(exact)
            bits, group = settings[path]["bits"], settings[path]["group_size"]
            assert report.codes[number][role].delta == f"{bits}bit:{group}"
            assert error < 0.75 * 2.0 ** -(bits - 1)  # of Gaussian weights about half of this


def test_the_report_is_of_the_files(three_bits: tuple[MoEOverlayCompression, Path]) -> None:
    report, folder = three_bits
    assert report.bytes_after == tensor_bytes(folder)
    experts = Experts.open(str(folder))
    layers = [experts.layer(number) for number in experts.layers]
    stored = sum(layer.stored_bytes for layer in layers)
    assert stored == report.bytes_by_part.deltas + report.bytes_by_part.scales
    assert report.bits_per_weight == pytest.approx(8 * stored / sum(layer.parameters for layer in layers))
    assert 3.0 < report.bits_per_weight <= 3.2
    assert {layer.layer for layer in report.verification} == set(experts.layers)
    assert not list(folder.parent.glob("three.*"))  # neither unfinished work nor the rest


def test_verified_errors_are_those_of_the_files(three_bits: tuple[MoEOverlayCompression, Path]) -> None:
    report, folder = three_bits
    before, after = Experts.open("demo:native").layer(1), Experts.open(str(folder)).layer(1)
    verified = next(layer for layer in report.verification if layer.layer == 1)
    for role in before.roles:
        errors = [
            np.linalg.norm(after.matrices(e)[role] - before.matrices(e)[role])
            / np.linalg.norm(before.matrices(e)[role])
            for e in range(before.count)
        ]
        assert verified.weight_error[role].mean == pytest.approx(np.mean(errors), rel=1e-3)


def test_routers_stay_and_the_rest_has_eight_bits(three_bits: tuple[MoEOverlayCompression, Path]) -> None:
    _, folder = three_bits
    before, after = parameters(NATIVE), parameters(folder)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert mx.array_equal(before[router], after[router])
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    assert settings["model.embed_tokens"]["bits"] == settings["model.layers.0.self_attn.q_proj"]["bits"] == 8


def test_logits_stay_near(tmp_path: Path) -> None:
    compress("demo:native", tmp_path / "eight", bits=8)
    exact, ours = logits(NATIVE), logits(tmp_path / "eight")
    assert np.abs(ours - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize(("bits", "group"), sampled([(3, 64), (4, 64), (4, 32)], [(3, 64)]))
def test_kl_is_less_than_of_mlx_lm_s_own_at_equal_bytes(tmp_path: Path, bits: int, group: int) -> None:
    theirs = tmp_path / "theirs"
    model, config = load_model(NATIVE, lazy=True)
    model, config = quantize_model(model, config, group, bits)
    theirs.mkdir()
    save_model(theirs, model)
    save_config(config, theirs / "config.json")
    ours, texts = tmp_path / "ours", 0
    for _ in range(2):  # the folder has texts, too, whose length follows from the first
        compress("demo:native", ours, fit=tensor_bytes(theirs) + (texts or 30_000), rest_bits=6, force=True)
        texts = folder_bytes(ours) - tensor_bytes(ours) - 100
    assert 0.95 * tensor_bytes(theirs) < tensor_bytes(ours) <= tensor_bytes(theirs)
    text = tmp_path / "text.txt"
    text.write_text("def read(path):\n    return open(path).read()\n\n\nclass Folder:\n    pass\n" * 40)
    kls = [
        MoECompressionService.evaluate("demo:native", folder, text, context=64, tokens=1024).kl.mean
        for folder in (theirs, ours)
    ]
    assert kls[1] < kls[0]


@pytest.mark.parametrize("size", [260_000, 300_000, 391_000])
def test_a_folder_fits(tmp_path: Path, size: int) -> None:
    compress("demo:native", tmp_path / "fit", fit=size)
    assert 0.97 * size < folder_bytes(tmp_path / "fit") <= size


def test_as_good_as_and_max_error(tmp_path: Path) -> None:
    good = compress("demo:native", tmp_path / "good", as_good_as=4)
    within = compress("demo:native", tmp_path / "within", max_error=0.05, coded=True)
    errors = [error.mean for layer in within.verification for error in layer.weight_error.values()]
    assert np.sqrt(np.mean(np.square(errors))) < 0.0525  # measured on a part of the rows
    assert good.bits_per_weight < 4.5  # what plain quantisation in groups of 64 takes


def test_the_rest_can_be_kept(tmp_path: Path) -> None:
    compress("demo:native", tmp_path / "kept", bits=4, rest_bits="keep")
    before, after = parameters(NATIVE), parameters(tmp_path / "kept")
    rest = [name for name in before if "switch_mlp" not in name]
    assert rest
    assert all(mx.array_equal(before[name], after[name]) for name in rest)


def test_experts_that_share_become_an_overlay_unless_they_are_not_to(tmp_path: Path) -> None:
    assert compress("demo:upcycled", tmp_path / "auto", bits=3).format == "overlay"
    assert compress("demo:native", tmp_path / "overlay", bits=3, format="overlay").format == "overlay"
    assert compress("demo:upcycled", tmp_path / "mlx", bits=3, format="mlx").format == "mlx"
    assert Experts.open(str(tmp_path / "mlx")).family == "stacked_gate_up_down"


FAMILIES = [
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "ernie4_5_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "granitemoe",
    "jamba",
    "laguna",
    "lfm2_moe",
    "minimax_m2",
    "minimax_m3_vl",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_that_mlx_lm_loads(tmp_path: Path, name: str) -> None:
    """Rows are too short to be quantised here: the names, stacks and turns are what is tested, exactly."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / name, source, ignore=shutil.ignore_patterns("*.npz", "origin.json"))
    if name in RECIPES:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **RECIPES[name].config}))
    compress(str(source), tmp_path / "mlx", fit="1GB", rest_bits="keep", format="mlx", force=True)
    before, after = logits(source), logits(tmp_path / "mlx")
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_what_mlx_lm_drops_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(NATIVE, source)
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, file)
    with pytest.raises(UnknownFormat, match=r"inv_freq to be absent, but it would be \[8\]"):
        compress(str(source), tmp_path / "out", bits=4, format="mlx")
    report = compress(str(FIXTURES / "minimax_m3_vl"), tmp_path / "kept", fit="1GB", rest_bits="keep", format="mlx")
    parts = "vision_tower, patch_merge_mlp, multi_modal_projector"
    assert f"mlx-lm's model class has no {parts}: left out" in report.notes


def test_from_the_hub_with_cuts(tmp_path: Path, hub: HubServer, three_bits: Any) -> None:
    hub.add("org/native", NATIVE)
    hub.faults += [
        Fault("*.safetensors", cut_after=20_000, times=3, skip=2),
        Fault("*.safetensors", status=503, skip=5),
    ]
    compress("org/native", tmp_path / "hub", bits=3.2)
    for path in three_bits[1].glob("*.safetensors"):
        assert (tmp_path / "hub" / path.name).read_bytes() == path.read_bytes()


def test_from_the_hub_the_same_bytes(tmp_path: Path, hub: HubServer, three_bits: Any) -> None:
    hub.add("org/native", NATIVE)
    compress("org/native", tmp_path / "hub", bits=3.2)
    names = [path.name for path in (three_bits[1]).glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "hub" / name).read_bytes() == (three_bits[1] / name).read_bytes()


def test_a_run_that_was_stopped_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three_bits: tuple[MoEOverlayCompression, Path]
) -> None:
    calls = 0

    def stop_late(self: AffineCode, matrix: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 140:  # trials and the rest take about a hundred
            raise KeyboardInterrupt
        return encode(self, matrix)

    encode = AffineCode.encode
    with monkeypatch.context() as patch:
        patch.setattr(AffineCode, "encode", stop_late)
        with pytest.raises(KeyboardInterrupt):
            compress("demo:native", tmp_path / "stopped", bits=3.2)
    assert (tmp_path / "stopped.partial" / "model-00002-of-00003.safetensors").is_file()
    assert not (tmp_path / "stopped").exists()
    compress("demo:native", tmp_path / "stopped", bits=3.2)
    for path in three_bits[1].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "mlx"], "can't have ranks"),
        (["--format", "mlx", "--bits", "3", "--trellis"], "trellises"),
        (["--format", "mlx", "--bits", "3", "--layers", "0"], "all layers"),
        (["--format", "mlx", "--bits", "1.5"], "out of reach"),
        (["--format", "mlx", "--bits", "3", "--rest-bits", "7"], "the rest can't have"),
        (["--bits", "3", "--rest-bits", "many"], "the rest can't have"),
        (["--format", "mlx", "--fit", "100kB"], "out of reach"),
    ],
)
def test_what_can_t_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert run([*COMPRESS, "-m", "demo:native", "-O", str(tmp_path / "out"), "-q", *options]) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_type_that_mlx_lm_lacks_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(NATIVE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "phimoe_of_2030"}))
    with pytest.raises(UnknownFormat, match="mlx-lm has no model"):
        compress(str(source), tmp_path / "out", bits=3, format="mlx")


def test_weights_that_are_not_finite_leave_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(NATIVE, source)
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.5.w1" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file)
    assert run([*COMPRESS, "-m", str(source), "-O", str(tmp_path / "out"), "--bits", "3", "--format", "mlx"]) == 3
    assert not (tmp_path / "out").exists()


def test_the_screen(tmp_path: Path) -> None:
    command = [*COMPRESS, "-m", "demo:native", "-O", str(tmp_path / "out"), "--bits", "3", "-q"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "MOE QUANTISED FOR MLX" in done.output
    assert "per expert weight" in done.output


def test_without_mlx_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    for name in [name for name in sys.modules if name.startswith("chuk_lazarus.introspection.moe.overlays.runtime")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InvalidRequest, match="MLX and mlx-lm are not installed") as error:
        compress("demo:native", tmp_path / "out", bits=3)
    assert error.value.hint == 'run: pip install "chuk-lazarus[mlx]"'
