"""The overlay services, against literal computation, planted structure and MLX LM's own layers."""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    Experts,
    InvalidRequest,
    MoECompressionService,
    MoEOverlay,
    MoEOverlayEstimate,
    MoEOverlayVerification,
    NotMoE,
)
from chuk_lazarus.introspection.moe.numerics.forward import route, run_expert
from chuk_lazarus.introspection.moe.numerics.low_rank import Factors, factorise, rebuild
from chuk_lazarus.introspection.moe.overlays import analysis, coding
from chuk_lazarus.introspection.moe.overlays.checkpoint import writer as overlay_checkpoint
from chuk_lazarus.introspection.moe.overlays.quantisation import as_stored
from mlx_lm_recipes import RECIPES
from places import FIXTURES
from sampling import keep
from terminals import without_steps

NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
Weights = dict[str, NDArray[np.float32]]
ALL_99 = [word for role in NAMES for word in (f"--{role}-rank", "99")]
COMMAND = ["introspect", "moe-expert"]


def planted(rank: int, layers: int = 1, experts: int = 6, scale: float = 0.1) -> list[Weights]:
    """Layers whose experts are a base plus a delta of that rank, the deltas summing to zero over the experts."""
    rng = np.random.default_rng(rank)
    found = []
    for _ in range(layers):
        weights: Weights = {}
        for role, (rows, columns) in {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}.items():
            left = rng.standard_normal((experts // 2, rows, rank))
            deltas = left @ rng.standard_normal((experts // 2, rank, columns))
            base = rng.standard_normal((rows, columns))
            weights[role] = (base + scale * np.concatenate([deltas, -deltas])).astype(np.float32)
        found.append(weights)
    return found


def write(folder: Path, layers: list[Weights]) -> str:
    folder.mkdir()
    tensors: Weights = {}
    for number, weights in enumerate(layers):
        prefix = f"model.layers.{number}"
        for role, stack in weights.items():
            for e, matrix in enumerate(stack):
                tensors[f"{prefix}.block_sparse_moe.experts.{e}.{NAMES[role]}.weight"] = np.ascontiguousarray(matrix)
        hidden = weights["gate"].shape[2]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = np.full(hidden, 0.5, np.float32)
        router = np.random.default_rng(number).standard_normal((len(weights["gate"]), hidden)).astype(np.float32)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mixtral", "num_hidden_layers": len(layers), "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# Compute


@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_rank_is_found_and_kept(tmp_path: Path, rank: int) -> None:
    model = write(tmp_path / "m", planted(rank))
    report = MoECompressionService.compute(model, energy=0.9999)
    (layer,) = report.layers
    assert layer.ranks == {"gate": rank, "up": rank, "down": rank}
    assert layer.weight_error < 1e-3
    assert layer.overlay_bytes == 2 * (3 * 32 * 48 + 6 * 3 * rank * (32 + 48))
    assert report.ratio == report.original_bytes / report.overlay_bytes
    assert report.ratio_vs_stored == pytest.approx(2 * report.ratio)  # the file holds float32


def test_given_ranks_stand_and_the_others_follow_the_rule(tmp_path: Path) -> None:
    model = write(tmp_path / "m", planted(3))
    (layer,) = MoECompressionService.compute(model, ranks={"up": 0, "down": 32}, energy=0.9999).layers
    assert layer.ranks == {"gate": 3, "up": 0, "down": 32}
    assert layer.energy_kept["up"] == 0.0
    assert layer.energy_kept["down"] == pytest.approx(1.0)


@pytest.mark.parametrize("max_error", [0.02, 0.1, 0.3])
def test_the_promised_error_is_the_one_measured_and_within_the_bound(tmp_path: Path, max_error: float) -> None:
    layers = planted(32, layers=2)
    model = write(tmp_path / "m", layers)
    report = MoECompressionService.compute(model, layers="all", max_error=max_error)
    lost = kept = 0.0
    for result, weights in zip(report.layers, layers, strict=True):
        here, all_here = 0.0, 0.0
        for role, stack in weights.items():
            base = stack.mean(axis=0)
            for matrix in stack:
                here += float(np.sum((rebuild(base, factorise(matrix - base, result.ranks[role])) - matrix) ** 2))
                all_here += float(np.sum(matrix**2))
        assert result.weight_error == pytest.approx(np.sqrt(here / all_here), rel=1e-3)
        lost, kept = lost + here, kept + all_here
    assert np.sqrt(lost / kept) <= max_error


@pytest.mark.parametrize("ratio", keep([1.5, 2.0, 4.0], 2.0))
def test_a_ratio_is_reached_with_less_error_than_uniform_ranks(tmp_path: Path, ratio: float) -> None:
    layers = planted(32, layers=2)
    layers[1] = {role: 3 * stack for role, stack in layers[1].items()}
    model = write(tmp_path / "m", layers)
    spread = MoECompressionService.compute(model, layers="all", target_ratio=ratio)
    assert spread.ratio >= ratio
    uniform = max(
        (MoECompressionService.compute(model, layers="all", ranks=dict.fromkeys(NAMES, rank)) for rank in range(33)),
        key=lambda report: report.overlay_bytes if report.overlay_bytes <= spread.original_bytes / ratio else -1,
    )

    def squared(report: MoEOverlay) -> float:
        energies = [sum(float(np.sum(stack**2)) for stack in weights.values()) for weights in layers]
        return sum(e * layer.weight_error**2 for e, layer in zip(energies, report.layers, strict=True))

    assert squared(spread) <= squared(uniform) * (1 + 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": {"gate": 33}},
        {"ranks": {"gate": 1}, "max_error": 0.1},
        {"max_error": 0.1, "target_ratio": 2.0},
        {"max_error": 0.0},
        {"max_error": 1.5},
        {"target_ratio": -1.0},
        {"target_ratio": 7.0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"experts": 0},
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    model = write(tmp_path / "m", planted(2))
    with pytest.raises(InvalidRequest):
        MoECompressionService.compute(model, **options)


def test_a_dense_model_is_refused() -> None:
    for service in (MoECompressionService.compute, MoECompressionService.verify, MoECompressionService.estimate):
        with pytest.raises(NotMoE):
            service(str(FIXTURES / "dense_llama"))


# Verify


def test_verification_equals_its_definition(tmp_path: Path) -> None:
    weights = planted(32)[0]
    model = write(tmp_path / "m", [weights])
    ranks = {"gate": 5, "up": 0, "down": 9}
    report = MoECompressionService.verify(model, ranks=ranks, inputs=40, seed=3)
    x = 0.5 * np.random.default_rng(3).standard_normal((40, 48)).astype(np.float32)
    outputs = []
    for expert in range(6):
        exact = {role: stack[expert] for role, stack in weights.items()}
        rebuilt = {}
        for role, matrix in exact.items():
            base = as_stored(weights[role].astype(np.float64).mean(axis=0).astype(np.float32))
            factors = factorise(matrix - base, ranks[role])
            rebuilt[role] = rebuild(base, Factors(as_stored(factors.left), as_stored(factors.right)))
        outputs.append([silu_glu(x, found) for found in (exact, rebuilt)])
    errors = [np.linalg.norm(got - wanted) / np.linalg.norm(wanted) for wanted, got in outputs]
    (layer,) = report.layers
    assert layer.output_error.mean == pytest.approx(np.mean(errors), rel=1e-4)
    assert layer.output_error.max == pytest.approx(max(errors), rel=1e-4)
    assert layer.worst_expert == int(np.argmax(errors))
    assert layer.weight_error["up"].max >= layer.weight_error["up"].mean > 0
    assert layer.mixed_output_error is not None
    assert 0 < layer.mixed_output_error <= layer.output_error.max


def silu_glu(x: NDArray[np.float32], matrices: Weights) -> NDArray[np.float64]:
    gate = x.astype(np.float64) @ matrices["gate"].T
    return (gate / (1 + np.exp(-gate)) * (x @ matrices["up"].T)) @ matrices["down"].T


@pytest.mark.parametrize(("tolerance", "passed"), [(0.0, False), (0.001, False), (0.05, True)])
def test_the_tolerance_decides(tmp_path: Path, tolerance: float, passed: bool) -> None:
    model = write(tmp_path / "m", planted(2))
    report = MoECompressionService.verify(model, energy=0.9999, tolerance=tolerance)
    assert report.passed is passed
    assert report.layers[0].output_error.max < 0.05


def test_full_rank_leaves_no_more_than_rounding() -> None:
    for name in ("mixtral", "gpt_oss", "gpt_oss_mxfp4", "llama4_text", "dbrx", "granitemoe", "deepseek_v3_fp8"):
        report = MoECompressionService.verify(str(FIXTURES / name), energy=1.0)
        assert report.passed, name
        assert report.layers[0].mixed_output_error is not None, name
        assert not report.notes, name


BLOCKS = {
    "mixtral": lambda layer: layer.block_sparse_moe,
    "olmoe": lambda layer: layer.mlp,
    "qwen3_moe": lambda layer: layer.mlp,
    "gpt_oss_mxfp4": lambda layer: layer.mlp,
    "granitemoe": lambda layer: layer.block_sparse_moe,
    "minimax_m2": lambda layer: layer.block_sparse_moe,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_layer_computes_what_mlx_lm_computes(name: str) -> None:
    """Router, experts, biases and activation together, against the block of MLX LM's own model."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlx.core as mx
        from mlx_lm.utils import load_model

        config = dict(RECIPES[name].config) if name in RECIPES else {}
        model, _ = load_model(FIXTURES / name, strict=False, model_config=config)
    experts = Experts.open(str(FIXTURES / name))
    number = experts.layers[0]
    layer = experts.layer(number)
    x = np.random.default_rng(0).standard_normal((12, layer.sizes["H"])).astype(np.float32)
    block = BLOCKS[name](model.model.layers[number])
    block.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    wanted = np.array(block(mx.array(x)[None])[0].astype(mx.float32))
    router = layer.router()
    assert router is not None
    normalise = experts.config.get("norm_topk_prob", True) is not False
    shares = route(
        x,
        router.weight,
        router.bias,
        router.correction,
        top_k=experts.top_k,
        scoring=experts.scoring,
        normalise=normalise,
    )
    got = sum(
        shares[:, e, None] * run_expert(x, layer.matrices(e), layer.biases(e), experts.activation)
        for e in range(layer.count)
    )
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


# Estimate


def test_all_layers_measured_are_what_compute_says(tmp_path: Path) -> None:
    model = write(tmp_path / "m", planted(5, layers=3))
    exact = MoECompressionService.estimate(model, layers="all", experts=None)
    computed = MoECompressionService.compute(model, layers="all")
    assert exact.overlay_bytes == computed.overlay_bytes
    assert exact.stored_bytes == computed.stored_bytes
    assert [layer.ranks for layer in exact.layers] == [layer.ranks for layer in computed.layers]
    assert all(layer.measured for layer in exact.layers)


def test_other_layers_are_interpolated_and_labelled(tmp_path: Path) -> None:
    layers = [planted(rank)[0] for rank in (2, 9, 6)]
    report = MoECompressionService.estimate(write(tmp_path / "m", layers), samples=2, energy=0.9999)
    assert report.layers_measured == (0, 2)
    assert [layer.measured for layer in report.layers] == [True, False, True]
    assert [layer.ranks["gate"] for layer in report.layers] == [2, 4, 6]
    assert report.moe_layers == (0, 1, 2)
    assert report.overlay_bytes == sum(layer.overlay_bytes for layer in report.layers)


def test_a_stored_format_is_not_mistaken_for_two_bytes_a_weight() -> None:
    report = MoECompressionService.estimate(str(FIXTURES / "gpt_oss_mxfp4"))
    assert report.stored_bytes < report.original_bytes / 3
    assert report.ratio_vs_stored == pytest.approx(report.stored_bytes / report.overlay_bytes)
    assert "overlay" not in report.advice.partition(";")[0]


def test_errors_at_the_same_bytes_are_those_of_the_three_ways(tmp_path: Path) -> None:
    """On independent experts quantisation must win; on copies with a small delta, the overlay where bits are few."""
    rng = np.random.default_rng(0)
    native = [{role: rng.standard_normal(stack.shape).astype(np.float32) for role, stack in planted(1)[0].items()}]
    report = MoECompressionService.estimate(write(tmp_path / "native", native))
    assert [row.bits for row in report.same_bytes] == [8, 4, 3]
    assert all(row.overlay is None or row.quantisation < row.overlay for row in report.same_bytes)
    assert all(row.quantisation < row.svd for row in report.same_bytes)
    assert report.advice.startswith("smallest error: plain codes at 1.5 to 8 bits per weight")
    upcycled = MoECompressionService.estimate(write(tmp_path / "upcycled", planted(1, scale=0.05)))
    assert "a low-rank overlay at 4 to 8 bits per weight" in upcycled.advice  # deltas of rank 1
    best = upcycled.same_bytes[0]
    assert best.overlay is not None
    assert best.overlay < best.svd


# Compress, export, evaluate


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_compressed_model_is_exported_and_runs_as_its_export(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text()[:1500])
    report = MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", target_ratio=3)
    assert report.ranks.keys() == {0, 1}
    assert report.bytes_after < report.bytes_before
    config = json.loads((tmp_path / "overlay/config.json").read_text())
    assert config["overlay_config"]["layers"] == {str(layer): own for layer, own in report.ranks.items()}
    assert "worst expert" in (tmp_path / "overlay/README.md").read_text()
    export = MoECompressionService.export(tmp_path / "overlay", tmp_path / "export")
    assert export.layers == (0, 1)
    ranks = report.ranks[0]
    rebuilt = MoECompressionService.verify("demo:upcycled", ranks=ranks).layers[0].weight_error
    exported, original = (Experts.open(str(m)).layer(0) for m in (tmp_path / "export", "demo:upcycled"))
    for role in ranks:
        errors = [
            np.linalg.norm(exported.matrices(e)[role] - original.matrices(e)[role])
            / np.linalg.norm(original.matrices(e)[role])
            for e in range(8)
        ]
        assert np.mean(errors) == pytest.approx(rebuilt[role].mean, rel=0.02)
    pair = [
        MoECompressionService.evaluate(str(model), tmp_path / "overlay", text, context=64)
        for model in (tmp_path / "export", "demo:upcycled")
    ]
    assert pair[0].loss_difference == pytest.approx(0.0, abs=2e-3)
    assert pair[0].overlay_result.loss == pair[1].overlay_result.loss
    assert pair[1].overlay_result.parameter_bytes < pair[1].original_result.parameter_bytes
    assert pair[1].tokens_from == "bytes"
    assert 1.0 < pair[1].original_result.loss < 4.0


@pytest.mark.long
def test_a_killed_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    words = [
        *COMMAND,
        "moe-overlay-compress",
        "-m",
        write(tmp_path / "m", planted(16, layers=6)),
        "--target-ratio",
        "2",
    ]
    assert run([*words, "-O", str(tmp_path / "whole"), "-q"]) == 0
    rng, kills = random.Random(5), 0
    for _ in range(40):
        command = [sys.executable, "-m", "chuk_lazarus.cli", *words, "-O", str(tmp_path / "killed"), "-q"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=rng.uniform(0.3, 0.8))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if (tmp_path / "killed").exists():  # the kill came when all was done
            break
        if kills == 5:
            assert run([*words, "-O", str(tmp_path / "killed"), "-q"]) == 0
            break
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_is_written_is_verified_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures of `verify`, without reading the experts again, and after a stop, too."""
    model = write(tmp_path / "m", planted(16, layers=4))
    ranks = {"gate": 3, "up": 4, "down": 5}
    wanted = MoECompressionService.verify(model, layers=[0, 2, 3], ranks=ranks)
    whole = MoECompressionService.compress(model, tmp_path / "whole", ranks=ranks)
    assert whole.verification == wanted.layers
    experts = Experts.open(model)
    stored = sum(experts.layer(number).stored_bytes for number in experts.layers)
    others = sum(experts.checkpoint.info(name).nbytes for name in experts.checkpoint.names) - stored
    assert whole.cost.bytes_read <= 2 * stored + others + 20_000  # and headers
    stop(model, tmp_path / "again", monkeypatch, after=60, ranks=ranks)
    assert len(list((tmp_path / "again.partial").glob("*.safetensors"))) == 4  # what is copied, and three layers
    stopped = MoECompressionService.compress(model, tmp_path / "again", ranks=ranks)
    assert stopped.verification == wanted.layers
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_ranks_once_chosen_stand_for_the_rest_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run does not measure again."""
    model, folder = write(tmp_path / "m", planted(4, layers=2)), tmp_path / "overlay"
    whole = MoECompressionService.compress(model, tmp_path / "whole", max_error=0.05)
    stop(model, folder, monkeypatch, max_error=0.05)
    assert not folder.exists()
    monkeypatch.setattr(analysis, "measure_layer", lambda *words: pytest.fail("it measures again"))
    resumed = MoECompressionService.compress(model, folder, max_error=0.05)
    assert resumed.ranks == whole.ranks
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["moe-overlay-compress", "-m", "demo:native", "-O", "{there}"], 2, "already exists"),
        (["moe-overlay-compress", "-m", "demo:native", "-O", "{file}/x"], 2, "x"),
        (["moe-overlay-compress", "-m", str(FIXTURES / "dense_llama"), "-O", "{new}"], 4, "Mixture"),
        (["moe-overlay-compress", "-m", "demo:native", "-O", "{new}", "--up-rank", "99"], 2, "99"),
        (["moe-overlay-compress", "-m", "demo:native", "-O", "{new}", "--layers", "9"], 2, "0-1"),
        (["moe-overlay-compress", "-m", "demo:native", "-O", "{new}", *ALL_99], 2, "99"),
        (["moe-overlay-verify", "-m", "demo:native", *ALL_99], 2, "99"),
        (["moe-overlay-export", "{there}", "-O", "{new}"], 3, "there"),
        (["moe-overlay-eval", "-m", "demo:native", "--overlay", "{there}", "--text", "{file}"], 3, "there"),
        (["moe-overlay-eval", "-m", "demo:native", "--overlay", "{new}", "--text", "{new}"], 2, "new"),
        (["moe-overlay-eval", "-m", "nobody/nothing", "--overlay", "{new}", "--text", "{file}"], 3, "nobody"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else None,
)
def test_what_can_not_be_written_or_run_is_one_line(
    arguments: list[str], code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("some words to predict")
    places = {name: str(tmp_path / name) for name in ("there", "file", "new")}
    assert run([*COMMAND, *(argument.format(**places) for argument in arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert word in err
    assert not (tmp_path / "new").exists()


def stop(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 0, **options: Any) -> None:
    """Begin to compress, and stop once the plan and the factors of so many matrices are written."""
    count = itertools.count()

    def split(*words: Any) -> Factors:
        if next(count) >= after:
            raise KeyboardInterrupt
        return coding.split_delta(*words)

    with monkeypatch.context() as patched:
        patched.setattr(overlay_checkpoint, "split_delta", split)
        with pytest.raises(KeyboardInterrupt):
            MoECompressionService.compress(model, folder, **options)


def test_the_plan_of_another_model_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = write(tmp_path / "one", planted(2)), write(tmp_path / "other", planted(32))
    stop(one, tmp_path / "overlay", monkeypatch, max_error=0.05)
    with pytest.raises(InvalidRequest):
        MoECompressionService.compress(other, tmp_path / "overlay", max_error=0.05)
    forced = MoECompressionService.compress(other, tmp_path / "overlay", max_error=0.05, force=True)
    assert forced.ranks[0] == MoECompressionService.compute(other, max_error=0.05).layers[0].ranks


def test_a_target_that_can_not_be_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "m", planted(2))
    monkeypatch.setattr(analysis, "measure_layer", lambda *words: pytest.fail("it measures first"))
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for folder in ("there", "m/inside", "file/x"):
        with pytest.raises(InvalidRequest):
            MoECompressionService.compress(model, tmp_path / folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(InvalidRequest, match="room"):
        MoECompressionService.compress(model, tmp_path / "new")


def test_given_ranks_need_no_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "measure_layer", lambda *words: pytest.fail("it measures"))
    ranks = {"gate": 1, "up": 2, "down": 3}
    report = MoECompressionService.compress(write(tmp_path / "m", planted(2)), tmp_path / "overlay", ranks=ranks)
    assert report.ranks == {0: ranks}


def test_a_bad_overlay_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    good = MoECompressionService.compress(
        write(tmp_path / "m", planted(2)), tmp_path / "good", ranks=dict.fromkeys(NAMES, 2)
    )
    assert not good.notes
    for name, rank, word in (("rough", 0, "output error"), ("larger", 64, "not smaller")):
        report = MoECompressionService.compress("demo:native", tmp_path / name, ranks=dict.fromkeys(NAMES, rank))
        assert any(word in note for note in report.notes), report.notes


def test_nothing_larger_is_written_unless_it_is_forced(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"not be smaller: 786\.4 kB before"):
        MoECompressionService.compress("demo:native", tmp_path / "larger")
    assert not any(tmp_path.iterdir())
    assert MoECompressionService.compress("demo:native", tmp_path / "forced", force=True).ratio < 1
    with pytest.raises(InvalidRequest, match="not be smaller"):  # rows are too short for a scale
        MoECompressionService.compress(str(FIXTURES / "mixtral"), tmp_path / "larger", fit="1GB", format="mlx")


def test_sampled_experts_are_said_to_be_a_sample(tmp_path: Path) -> None:
    model = write(tmp_path / "m", planted(2))
    assert not MoECompressionService.compute(model, max_error=0.05).notes
    assert "3 of 6 experts" in MoECompressionService.compute(model, max_error=0.05, experts=3).notes[0]


def test_an_overlay_of_another_model_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", ranks=dict.fromkeys(NAMES, 1))
    (tmp_path / "text").write_text("def words(): pass")
    words = ["--overlay", str(tmp_path / "overlay"), "--text", str(tmp_path / "text")]
    assert run([*COMMAND, "moe-overlay-eval", "-m", "demo:native", *words]) == 2
    assert "not an overlay of" in capsys.readouterr().err
    for command in (["moe-type-analyze"], ["moe-overlay-verify"], ["moe-overlay-compress", "-O", str(tmp_path / "x")]):
        assert run([*COMMAND, *command, "-m", str(tmp_path / "overlay")]) == 4
        assert "is an overlay" in capsys.readouterr().err


@pytest.mark.parametrize("stored", [-1.0, -0.5, 0.0])
def test_norms_that_multiply_by_one_plus_weight(tmp_path: Path, stored: float) -> None:
    """Qwen3-Next's do; the same experts behind a norm that multiplies by the same have the same errors."""
    weights = planted(32)[0]
    folders = [write(tmp_path / name, [weights]) for name in ("plain", "plus")]
    for folder, model_type, value in zip(folders, ("mixtral", "qwen3_next"), (stored + 1, stored), strict=True):
        path = Path(folder)
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.0.post_attention_layernorm.weight"] = np.full(48, value, np.float32)
        save_file(tensors, path / "model.safetensors")
        config = {"model_type": model_type, "num_hidden_layers": 1, "num_experts_per_tok": 2}
        (path / "config.json").write_text(json.dumps(config))
    reports = [MoECompressionService.verify(folder, ranks=dict.fromkeys(NAMES, 3)) for folder in folders]
    assert reports[0].layers == reports[1].layers
    assert reports[0].layers[0].output_error.max > 0.1, "not even where the norm's weight is 0"


# Contract and command line

KEYS: dict[str, tuple[str, set[str], set[str]]] = {
    "moe-overlay-compute": (
        "moe-overlay/1",
        {"layers"},
        {"layer", "ranks", "energy_kept", "original_bytes", "stored_bytes", "overlay_bytes", "ratio"},
    ),
    "moe-overlay-verify": (
        "moe-overlay-verification/1",
        {"passed", "tolerance", "layers"},
        {"layer", "ranks", "weight_error", "output_error"},
    ),
    "moe-overlay-estimate": (
        "moe-overlay-estimate/1",
        {
            "moe_layers",
            "layers_measured",
            "original_bytes",
            "stored_bytes",
            "overlay_bytes",
            "ratio",
            "ratio_vs_stored",
        },
        {"layer", "measured"},
    ),
}


@pytest.mark.parametrize("command", KEYS)
def test_json_keeps_the_contract(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    schema, keys, layer_keys = KEYS[command]
    assert run([*COMMAND, command, "-m", "demo:upcycled", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == schema
    assert keys <= found.keys()
    assert layer_keys <= found["layers"][0].keys()
    for model in (MoEOverlay, MoEOverlayVerification, MoEOverlayEstimate):
        if model.model_fields["schema_"].default == schema:
            assert json.loads(model.model_validate(found).model_dump_json()) == found


@pytest.mark.parametrize("command", KEYS)
@pytest.mark.parametrize("columns", ["80", "60"])
def test_tables_fit(command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run([*COMMAND, command, "-m", "demo:upcycled", "--layers", "all"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert max(map(len, lines)) <= int(columns)
    assert not any("…" in line for line in lines)


def test_a_failed_verification_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "moe-overlay-verify", "-m", "demo:native"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["moe-overlay-compute", "-m", "demo:native", "--gate-rank", "65"], 2, "65"),
        (["moe-overlay-compute", "-m", "demo:native", "--gate-rank", "-1"], 2, "--gate-rank"),
        (["moe-overlay-compute", "-m", "demo:native", "--max-error", "x"], 2, "--max-error"),
        (["moe-overlay-verify", "-m", "demo:native", "--tolerance", "-1"], 2, "tolerance"),
        (["moe-overlay-verify", "-m", "demo:native", "--tolerance", "nan"], 2, "tolerance"),
        (["moe-overlay-estimate", "-m", "demo:native", "--samples", "0"], 2, "--samples"),
        (["moe-overlay-estimate", "-m", str(FIXTURES / "dense_llama")], 4, "Mixture"),
        (["moe-overlay-verify", "-m", "demo:native", "--layer", "9"], 2, "0-1"),
    ],
    ids=lambda value: " ".join(value[:4:3]) if isinstance(value, list) else None,
)
def test_wrong_words_are_one_line(
    arguments: list[str], code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*COMMAND, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert word in err


def test_without_mlx_all_but_running_works(tmp_path: Path) -> None:
    """MLX has no wheels for some platforms."""
    code = f"""
import sys
for name in ("mlx", "mlx.core", "mlx_lm"):
    sys.modules[name] = None
from chuk_lazarus.cli.app import run
prefix = ["introspect", "moe-expert"]
assert run([*prefix, "moe-type-analyze", "-m", {str(FIXTURES / "gpt_oss_mxfp4")!r}]) == 0
assert run([*prefix, "moe-overlay-estimate", "-m", "demo:native"]) == 0
assert run([*prefix, "moe-overlay-compress", "-m", "demo:native", "-O", {str(tmp_path / "overlay")!r}, "--force"]) == 0
overlay = ["--overlay", {str(tmp_path / "overlay")!r}]
assert run([*prefix, "moe-overlay-eval", "-m", "demo:native", *overlay, "--text", __file__]) == 2
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert without_steps(done.stderr).count("\n") == 1
    assert "MLX" in done.stderr
