"""Two checkpoints of one model on the same text: the divergence against float64, and what may be compared."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import InvalidRequest, ModelUnreadable, MoECompressionService, MoEOverlayEvaluation
from places import DEMO
from sampling import examples

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    import mlx.nn as nn
    from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_config, save_model

    from chuk_lazarus.introspection.moe.overlays.runtime import evaluate as runtime
    from chuk_lazarus.introspection.moe.overlays.runtime.evaluate import Loaded, compare

Array = NDArray[np.float64]
NATIVE = DEMO / "native"
EVAL = ["introspect", "moe-expert", "moe-overlay-eval"]
TEXT = Path(__file__).read_text()


def perturbed(folder: Path, scale: float, source: Path = NATIVE) -> Path:
    """The model with noise on every matrix, as much as `scale` of its deviation; as training it further would."""
    shutil.copytree(source, folder)
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.random.seed(1)
    for name, array in tensors.items():
        if array.ndim == 2:
            tensors[name] = array + (scale * array.std() * mx.random.normal(array.shape)).astype(array.dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def quantised(folder: Path, bits: int, source: Path = NATIVE) -> Path:
    """As mlx_lm.convert -q writes it."""
    model, config = quantize_model(*load_model(source), 64, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def text_of(folder: Path, length: int) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT[:length])
    return path


def probabilities(folder: Path, tokens: NDArray[Any], context: int) -> list[Array]:
    """By window, the logarithms of the next token's probabilities [length, vocabulary], in float64."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    logits = [
        np.array(model(mx.array(tokens[None, start : min(start + context, len(tokens) - 1)]))).astype(np.float64)[0]
        for start in range(0, len(tokens) - 1, context)
    ]
    return [each - np.log(np.exp(each).sum(axis=1, keepdims=True)) for each in logits]


def standard_error(windows: list[Array]) -> Any:
    """Of the mean of what the windows hold: by the windows' sums, or by the values of a single window."""
    clusters = windows if len(windows) > 1 else [np.array([value]) for value in windows[0]]
    values = np.concatenate(windows)
    if len(clusters) < 2:
        return None
    residuals = [sum(float(value) - values.mean() for value in cluster) for cluster in clusters]
    count = len(clusters)
    error = np.sqrt(count / (count - 1) * sum(each**2 for each in residuals)) / len(values)
    return pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("length", "context"), [(700, 64), (641, 64), (70, 64), (40, 64), (2, 64), (300, 1)], ids=str)
def test_divergence_and_its_error_are_those_of_the_definition(length: int, context: int, tmp_path: Path) -> None:
    other, text = perturbed(tmp_path / "other", 0.1), text_of(tmp_path, length)
    report = MoECompressionService.evaluate("demo:native", other, text, context=context)
    tokens = np.frombuffer(text.read_bytes(), np.uint8).astype(np.int64)
    logs = [probabilities(folder, tokens, context) for folder in (NATIVE, other)]
    divergences = [(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(*logs, strict=True)]
    assert report.kl.mean == pytest.approx(np.concatenate(divergences).mean(), rel=1e-4)
    assert report.kl.mean > 0.005
    assert report.kl.stderr == standard_error(divergences)
    differences, place = [], 1
    for p, q in zip(*logs, strict=True):
        wanted = tokens[place : place + len(p)]
        differences.append((p - q)[np.arange(len(p)), wanted])
        place += len(p)
    assert report.loss_difference == pytest.approx(np.concatenate(differences).mean(), abs=1e-5)
    assert report.loss_difference_stderr == standard_error(differences)
    assert (report.is_overlay, report.original_result.tokens) == (False, length - 1)
    assert MoEOverlayEvaluation.model_validate_json(report.model_dump_json()) == report


def test_a_model_does_not_depart_from_itself(tmp_path: Path) -> None:
    shutil.copytree(NATIVE, tmp_path / "copy")
    report = MoECompressionService.evaluate("demo:native", tmp_path / "copy", text_of(tmp_path, 300), context=64)
    assert (report.kl.mean, report.kl.stderr) == (0.0, 0.0)
    assert (report.loss_difference, report.loss_difference_stderr) == (0.0, 0.0)


def test_an_overlay_and_its_export_depart_as_far(tmp_path: Path) -> None:
    text = text_of(tmp_path, 1000)
    written = MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", bits=2.25)
    MoECompressionService.export(tmp_path / "overlay", tmp_path / "export")
    folders = {name: tmp_path / name for name in ("overlay", "export")}
    found = {
        name: MoECompressionService.evaluate("demo:upcycled", folder, text, context=64)
        for name, folder in folders.items()
    }
    assert found["overlay"].kl.mean == pytest.approx(found["export"].kl.mean, rel=0.05)
    assert 0.001 < found["overlay"].kl.mean < 0.05
    assert [found[name].is_overlay for name in folders] == [True, False]
    assert [found[name].overlay_result.bits_per_weight for name in folders] == [written.bits_per_weight, 16.0]
    pair = MoECompressionService.evaluate(str(folders["export"]), folders["overlay"], text, context=64)
    assert 0 < pair.kl.mean < 0.02 * found["overlay"].kl.mean  # the export is in bfloat16


def test_a_low_rank_overlay_says_its_bits(tmp_path: Path) -> None:
    ranks = {"gate": 2, "up": 3, "down": 4}
    written = MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", ranks=ranks)
    report = MoECompressionService.evaluate("demo:upcycled", tmp_path / "overlay", text_of(tmp_path, 50))
    assert report.overlay_result.bits_per_weight == written.bits_per_weight


def test_plain_quantisation_departs_the_less_the_more_bits_it_has(tmp_path: Path) -> None:
    text, found = text_of(tmp_path, 600), {}
    for bits in (2, 4, 8):
        folder = quantised(tmp_path / f"{bits}bit", bits)
        found[bits] = MoECompressionService.evaluate("demo:native", folder, text, context=64)
        assert found[bits].overlay_result.bits_per_weight == bits + 0.5  # scale and bias for each 64
        assert found[bits].overlay_result.parameter_bytes < found[bits].original_result.parameter_bytes
    assert found[2].kl.mean > 4 * found[4].kl.mean > 16 * found[8].kl.mean > 0
    model, _ = load_model(tmp_path / "4bit")
    model.set_dtype(mx.float32)
    save_model(tmp_path / "plain", dequantize_model(model))
    (tmp_path / "plain/config.json").write_bytes((NATIVE / "config.json").read_bytes())
    plain = MoECompressionService.evaluate("demo:native", tmp_path / "plain", text, context=64)
    assert plain.kl.mean == pytest.approx(found[4].kl.mean, rel=1e-3)
    pair = MoECompressionService.evaluate(str(tmp_path / "4bit"), tmp_path / "plain", text, context=64)
    assert abs(pair.kl.mean) < 1e-5


def test_progress_is_told_in_bytes_of_the_text(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    MoECompressionService.evaluate(
        "demo:native",
        NATIVE,
        text_of(tmp_path, 900),
        context=20,
        tokens=501,
        progress=lambda *words: told.append(words),
    )
    assert {(what, total) for what, _, total in told} == {("predicting the text", 501)}
    done = [each for _, each, _ in told]
    assert done == sorted(done)
    assert len(done) == 4  # 25 windows, 8 at once
    assert done[-1] == 501


# Bounds


def table(logs: Array) -> nn.Embedding:
    """A model whose next token depends on the last one alone."""
    model = nn.Embedding(*logs.shape)
    model.weight = mx.array(logs.astype(np.float32))
    return model


def compared(*models: nn.Module, tokens: Any = (0, 1, 2, 3, 0), **options: Any) -> runtime.Comparison:
    original, other = (Loaded(name, model, 1) for name, model in zip(("first", "second"), models, strict=True))
    return compare(original, other, tokens, 2, **options)


@settings(max_examples=examples(40), deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 30), st.integers(2, 300))
def test_divergence_of_any_two_distributions(seed: int, scale: float, vocabulary: int) -> None:
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((2, vocabulary, vocabulary)).astype(np.float32).astype(np.float64)
    p, q = (each - np.logaddexp.reduce(each, axis=1, keepdims=True) for each in logits)
    tokens = rng.integers(0, vocabulary, 7)
    expected = (np.exp(p) * (p - q)).sum(axis=1)[tokens[:-1]].mean()
    found = compared(*map(table, logits), tokens=tokens).kl.mean
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * (1 + scale))
    assert found > -1e-5


def test_how_much_is_taken_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    models = [table(rng.standard_normal((9, 9))) for _ in range(2)]
    tokens = rng.integers(0, 9, 60)
    whole = compared(*models, tokens=tokens)
    monkeypatch.setattr(runtime, "LOGITS", 25)  # two tokens of nine
    for batch in (1, 3, 100):
        parts = compared(*models, tokens=tokens, batch=batch)
        assert parts.kl.mean == pytest.approx(whole.kl.mean, rel=1e-6)
        assert parts.kl.stderr == pytest.approx(whole.kl.stderr, rel=1e-6)
        assert parts.other.loss == pytest.approx(whole.other.loss, rel=1e-6)


def test_a_token_that_the_original_rules_out_counts_nothing() -> None:
    logs = np.zeros((5, 5))
    logs[:, 4] = -np.inf
    other = np.zeros((5, 5))
    assert compared(table(logs), table(logs)).kl.mean == 0.0
    assert compared(table(logs), table(other)).kl.mean == pytest.approx(np.log(5 / 4))
    with pytest.raises(ModelUnreadable, match="second gives a token probability 0 where first does not"):
        compared(table(other), table(logs))


def test_vocabularies_of_two_sizes() -> None:
    models = nn.Embedding(5, 5), nn.Embedding(5, 6)
    with pytest.raises(InvalidRequest, match="first and second have different vocabularies: 5 and 6"):
        compared(*models)


# What is not compared


def spoil(folder: Path) -> None:
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors["lm_head.weight"] = mx.full(tensors["lm_head.weight"].shape, np.nan, mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def write_tokenizer(folder: Path, letters: str, first: int = 0) -> None:
    """One that takes letters for tokens, numbered in this order."""
    vocabulary = {letter: first + number for number, letter in enumerate(["[UNK]", *letters])}
    splits = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "pre_tokenizer": splits, "model": model}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (shutil.rmtree, 3, "no such folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), 3, "other"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), 3, "other"),
        (lambda folder: edit_config(folder, model_type="olmoe"), 2, "its model_type is olmoe, not mixtral"),
        (lambda folder: edit_config(folder, model_type="\x1b[2J"), 2, "not the same model"),
        (lambda folder: edit_config(folder, vocab_size=300), 2, "its vocab_size is 300, not 256"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), 3, "mlx-lm can't run it"),
        (spoil, 3, "its loss on this text is nan"),
        (lambda folder: write_tokenizer(folder, "abc"), 2, "differently"),
    ],
)
def test_what_can_not_be_compared_is_one_line(
    change: Callable[[Path], Any], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(NATIVE, tmp_path / "other")
    change(tmp_path / "other")
    words = ["--overlay", str(tmp_path / "other"), "--text", str(text_of(tmp_path, 100))]
    assert run([*EVAL, "-m", "demo:native", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert text in err


def test_tokens_are_what_both_tokenizers_make_of_the_text(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, letters in zip(folders, ("abcd", "abcdef", "badc"), strict=True):
        shutil.copytree(NATIVE, folder)
        write_tokenizer(folder, letters)
    text = tmp_path / "text"
    text.write_text("abcdabcddcba")
    report = MoECompressionService.evaluate(str(folders[0]), folders[1], text)
    assert (report.tokens_from, report.original_result.tokens) == ("tokenizer", 11)
    with pytest.raises(InvalidRequest, match="differently"):
        MoECompressionService.evaluate(str(folders[0]), folders[2], text)
    assert MoECompressionService.evaluate(str(folders[0]), NATIVE, text).kl.mean == 0.0  # has none of its own


def test_tokens_that_the_model_has_not_got(tmp_path: Path) -> None:
    shutil.copytree(NATIVE, tmp_path / "model")
    write_tokenizer(tmp_path / "model", "abcd", first=253)
    (tmp_path / "text").write_text("abcd")
    with pytest.raises(ModelUnreadable, match="gives token 257, but its vocabulary has 256"):
        MoECompressionService.evaluate(str(tmp_path / "model"), NATIVE, tmp_path / "text")


def test_weights_that_mlx_lm_would_load_beside_the_models_are_refused(tmp_path: Path) -> None:
    """mlx-lm takes every file called model*.safetensors, whatever the index says: that would be another model."""
    model = tmp_path / "model"
    shutil.copytree(DEMO / "upcycled", model)
    (tmp_path / "text.txt").write_text("the same model twice")
    shutil.copy(DEMO / "native/model.safetensors", model / "model-old.safetensors")
    with pytest.raises(ModelUnreadable, match=r"model-old\.safetensors is not one of the model's files"):
        MoECompressionService.evaluate(str(model), DEMO / "upcycled", tmp_path / "text.txt")
