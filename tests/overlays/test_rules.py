"""The rules by which codes are chosen: bits, the size of a folder, an error, as good as plain quantisation."""

import os
from functools import cache
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.jobs.resources import Resources
from chuk_lazarus.introspection.moe.overlays.alignment import align_layer
from chuk_lazarus.introspection.moe.overlays.bit_budget import BitRule, fit_bits, overlay_rule
from chuk_lazarus.introspection.moe.overlays.codes import LayerCodes, RoleCodes
from chuk_lazarus.introspection.moe.overlays.codes.bits import BitsCode
from chuk_lazarus.introspection.moe.overlays.quantisation import round_to_bits
from chuk_lazarus.introspection.moe.overlays.trials import PLAIN_BITS, TRIED, RoleTrial, predict_error, try_layer
from chuk_lazarus.introspection.moe.weights.experts import Experts
from sampling import examples, sampled

Trials = dict[int, dict[str, RoleTrial]]
DEMOS = ("upcycled", "native", "permuted", "lora")


@cache
def trials(demo: str) -> Trials:
    resources, experts = Resources.current(), Experts.open(f"demo:{demo}")
    layers = [experts.layer(number) for number in experts.layers]
    return {layer.number: try_layer(layer, align_layer(layer, resources), resources) for layer in layers}


def bits_of(found: Trials, codes: dict[int, LayerCodes]) -> float:
    each = [(codes[number][role], trial) for number, roles in found.items() for role, trial in roles.items()]
    size = sum(code.nbytes(trial.shape, trial.experts) for code, trial in each)
    return 8 * size / sum(trial.experts * prod(trial.shape) for _, trial in each)


def errors_of(found: Trials, codes: dict[int, LayerCodes]) -> list[float]:
    return [predict_error(roles, codes[number]) for number, roles in found.items()]


def folder_size(folder: Path) -> int:
    return sum(os.stat(path).st_size for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is tried of a layer


def test_a_trial_knows_the_errors_of_whole_matrices() -> None:
    """The native's gate has 128 rows: all of them are tried, of two experts."""
    layer = Experts.open("demo:native").layer(0)
    found = trials("native")[0]["gate"]
    matrices = [layer.matrices(expert)["gate"] for expert in (0, layer.count - 1)]
    energy = sum((matrix**2).sum() for matrix in matrices)
    for bits in PLAIN_BITS:
        lost = sum(((round_to_bits(matrix, bits) - matrix) ** 2).sum() for matrix in matrices)
        assert found.rounding_errors[bits] == pytest.approx(lost / energy, rel=1e-4)
    for levels in TRIED:
        code = found.rung(levels)
        decoded = [code.decode(code.encode(matrix, unbiased=True), found.shape) for matrix in matrices]
        lost = sum(((rebuilt - matrix) ** 2).sum() for rebuilt, matrix in zip(decoded, matrices, strict=True))
        assert found.error(RoleCodes(None, code)) == pytest.approx(found.plain_errors[levels], rel=1e-9)
        assert found.error(RoleCodes(None, code)) == pytest.approx(lost / energy, rel=1e-4)
    assert found.energy == pytest.approx(energy * layer.count / 2, rel=1e-5)


@pytest.mark.parametrize("demo", DEMOS)
def test_between_tried_codes_errors_fall(demo: str) -> None:
    for roles in trials(demo).values():
        for trial in roles.values():
            codes = [BitsCode(levels, group) for levels in (2, 3, 4, 8, 16, 32, 64, 128, 256) for group in (128, 64)]
            errors = [trial.error(RoleCodes(None, code)) for code in codes]
            assert errors == sorted(errors, reverse=True)
            assert 0 < errors[-1] < errors[0] < 1


@pytest.mark.sample
@pytest.mark.parametrize("demo", DEMOS)
@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_the_predicted_error_is_that_which_is_measured(demo: str, bits: float) -> None:
    predicted = errors_of(trials(demo), BitRule(bits).choose(trials(demo)))
    measured = MoECompressionService.compute(f"demo:{demo}", layers="all", bits=bits)
    for guess, layer in zip(predicted, measured.layers, strict=True):
        assert guess == pytest.approx(layer.weight_error, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Choices, by trials


@given(st.floats(1.4, 8.0), st.sampled_from(DEMOS))
@settings(max_examples=examples(40), deadline=None)
def test_the_bits_are_met_within_half_a_per_cent(bits: float, demo: str) -> None:
    found = trials(demo)
    assert 0.995 * bits <= bits_of(found, BitRule(bits).choose(found)) <= bits


@given(st.floats(1.2, 8.0), st.floats(0.3, 3.0), st.sampled_from(DEMOS))
@settings(max_examples=examples(40), deadline=None)
def test_more_bits_never_err_more(bits: float, more: float, demo: str) -> None:
    """In all: what is left over may go to one projection or to another, and moves a layer's error a little."""
    found = trials(demo)
    errors = [errors_of(found, BitRule(min(8.0, b)).choose(found)) for b in (bits, bits + more)]
    assert np.linalg.norm(errors[1]) <= np.linalg.norm(errors[0])


@given(st.floats(0.01, 0.9), st.sampled_from(DEMOS))
@settings(max_examples=examples(40), deadline=None)
def test_an_error_is_met_in_each_layer_by_the_fewest_bits(error: float, demo: str) -> None:
    found = trials(demo)
    codes = BitRule(max_error=error).choose(found)
    assert max(errors_of(found, codes)) <= error
    looser = BitRule(max_error=min(0.99, 1.3 * error)).choose(found)
    assert bits_of(found, looser) <= bits_of(found, codes)
    for number, roles in found.items():  # and alone as among others
        assert BitRule(max_error=error).choose({number: roles}) == {number: codes[number]}


@given(st.floats(0.02, 0.5), st.sampled_from([demo for demo in DEMOS if demo != "lora"]))  # no factors by this rule
@settings(max_examples=examples(20), deadline=None)
def test_codes_of_fewer_bits_err_more_than_was_allowed(error: float, demo: str) -> None:
    """A tenth fewer than an error needs, of one layer, for which the bits are spent as well as they can be."""
    for number, roles in trials(demo).items():
        found = {number: roles}
        bits = bits_of(found, BitRule(max_error=error).choose(found))
        least = bits_of(found, BitRule(max_error=0.99).choose(found))
        if 0.9 * bits > least:
            assert errors_of(found, BitRule(0.9 * bits).choose(found))[0] > 0.9 * error


@pytest.mark.parametrize("demo", DEMOS)
def test_as_good_as_more_bits_takes_more(demo: str) -> None:
    found = trials(demo)
    sizes = [bits_of(found, BitRule(as_good_as=bits).choose(found)) for bits in (2, 3, 4, 5, 6)]
    assert sizes == sorted(sizes)
    # up to 5 bits less than plain quantisation takes, with two bf16 numbers for each 64 weights
    assert all(size < bits + 0.5 for size, bits in zip(sizes[:4], (2, 3, 4, 5), strict=True))


@given(st.integers(2000, 10**7), st.integers(0, 5000), st.integers(0, 40))
@settings(max_examples=examples(25), deadline=None)
def test_a_folder_is_filled_and_never_overfilled(size: int, other: int, per_text: int) -> None:
    """With files whose length depends on the codes."""
    found = trials("upcycled")

    def folder_bytes(codes: dict[int, LayerCodes] | Any) -> int:
        words = sum(len(str(role.delta)) for roles in codes.values() for role in roles.values())
        return other + per_text * words // 8 + round(bits_of(found, codes) * 393_216 / 8)

    try:
        bits = fit_bits(size, found, folder_bytes)
    except InvalidRequest as error:
        least = int(str(error).split("least takes ")[1].rstrip(")").replace(",", ""))
        assert size < least
        assert folder_bytes(BitRule(fit_bits(least, found, folder_bytes)).choose(found)) <= least
        return
    taken = folder_bytes(BitRule(bits).choose(found))
    assert taken <= size
    assert bits == 8 or size < 65_000 + other or taken > 0.99 * size


# ---------------------------------------------------------------------------------------------------------------------
# The demo models, whole


@pytest.mark.sample
@pytest.mark.parametrize("demo", DEMOS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_outputs_are_as_good_as_those_of_plain_quantisation(demo: str, bits: int) -> None:
    report = MoECompressionService.verify(f"demo:{demo}", layers="all", as_good_as=bits, tolerance=1)
    for layer in report.layers:
        assert layer.rounding_error.keys() == {"8", "4", str(bits)}
        assert layer.output_error.mean <= layer.rounding_error[str(bits)]
        if demo == "native":  # a delta has at least one bit, which is more than copies need for few bits
            assert layer.output_error.mean > 0.6 * layer.rounding_error[str(bits)]


@pytest.mark.sample
@pytest.mark.parametrize("demo", DEMOS)
@pytest.mark.parametrize("error", [0.02, 0.1, 0.3])
def test_weights_err_no_more_than_was_asked(demo: str, error: float) -> None:
    report = MoECompressionService.compute(f"demo:{demo}", layers="all", max_error=error, coded=True)
    assert all(layer.codes for layer in report.layers)
    assert max(layer.weight_error for layer in report.layers) <= error
    ranked = MoECompressionService.compute(f"demo:{demo}", layers="all", max_error=error)
    assert not any(layer.codes for layer in ranked.layers)
    assert report.overlay_bytes < ranked.overlay_bytes


@pytest.mark.parametrize(
    ("demo", "size"),
    sampled([("upcycled", 330_000), ("native", "0.41MB"), ("permuted", 250_000)], [("native", "0.41MB")]),
)
def test_a_folder_has_the_size_that_it_is_to_have(demo: str, size: int | str, tmp_path: Path) -> None:
    wanted = size if isinstance(size, int) else 410_000
    written = MoECompressionService.compress(f"demo:{demo}", tmp_path / "overlay", fit=size, format="overlay")
    assert 0.995 * wanted <= folder_size(tmp_path / "overlay") <= wanted
    assert written.rule == f"a folder of at most {wanted:,} bytes"
    computed = MoECompressionService.compute(f"demo:{demo}", layers="all", fit=size)
    assert {layer.layer: layer.codes for layer in computed.layers} == written.codes
    estimated = MoECompressionService.estimate(f"demo:{demo}", layers="all", fit=size)
    assert estimated.format == ("mlx" if demo == "native" else "overlay")
    if estimated.format == "overlay":
        assert [layer.codes for layer in estimated.layers] == [layer.codes for layer in computed.layers]
    assert f"--fit {wanted}" in (tmp_path / "overlay/README.md").read_text()


def test_a_folder_with_a_layer_that_is_left_as_it_is(tmp_path: Path) -> None:
    """It takes what it takes, and the other layer gets what is left."""
    MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", layers=[1], fit="0.7MB")
    assert 0.995 * 700_000 <= folder_size(tmp_path / "overlay") <= 700_000
    with pytest.raises(InvalidRequest, match=r"the least takes 5\d\d,\d\d\d"):
        MoECompressionService.compress("demo:upcycled", tmp_path / "other", layers=[1], fit="0.4MB")


def test_one_layer_gets_the_bits_that_a_size_leaves_for_all() -> None:
    of_all = MoECompressionService.compute("demo:upcycled", layers="all", fit=330_000)
    of_one = MoECompressionService.compute("demo:upcycled", layer=1, fit=330_000)
    assert of_one.bits_per_weight == pytest.approx(of_all.bits_per_weight, rel=0.01)


def test_what_does_not_fit_says_what_the_least_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", fit=100_000)
    least = int(str(raised.value).split("least takes ")[1].rstrip(")").replace(",", ""))
    assert not (tmp_path / "overlay").exists()
    MoECompressionService.compress("demo:upcycled", tmp_path / "overlay", fit=least)
    assert 0.99 * least < folder_size(tmp_path / "overlay") <= least


def test_deltas_of_low_rank_are_as_good_in_half_the_bits() -> None:
    """Experts that are a dense layer and an adapter of rank 4 each: factors, where codes without them take 2.4 bits."""
    report = MoECompressionService.compute("demo:lora", layers="all", as_good_as=4)
    assert report.bits_per_weight < 1.5
    assert all(codes.delta.startswith("rank") for layer in report.layers for codes in layer.codes.values())


def test_coded_alone_is_as_good_as_four_bits() -> None:
    assert overlay_rule(coded=True) == overlay_rule(as_good_as=4) == BitRule(as_good_as=4)
    assert overlay_rule(coded=True, bits=2) == overlay_rule(bits=2) == BitRule(2)
    assert overlay_rule(coded=True, target_ratio=8) == BitRule(2)
    assert overlay_rule(fit="24GB") == BitRule(fit=24 * 10**9)


@pytest.mark.sample
@pytest.mark.parametrize("command", ["moe-overlay-compute", "moe-overlay-verify", "moe-overlay-estimate"])
@pytest.mark.parametrize(
    "options",
    ["--bits 2.5", "--fit 400kB", "--as-good-as 4", "--coded", "--max-error 0.1 --coded", "--target-ratio 6 --coded"],
)
def test_commands_take_the_same_rules(command: str, options: str) -> None:
    extra = ["--tolerance", "1"] if command == "moe-overlay-verify" else []
    words = ["introspect", "moe-expert", command, "-m", "demo:native", "--layers", "0", *options.split(), *extra]
    result = CliRunner().invoke(app, [*words, "-q"])
    assert result.exit_code == 0, result.output
    assert "Codes" in result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 2, "fit": "1GB"}, "both bits and the size of a folder are given"),
        ({"fit": 1000, "as_good_as": 4}, "both the size of a folder and a width to be as good as are given"),
        ({"as_good_as": 4, "max_error": 0.1}, "both a width to be as good as and a maximum error are given"),
        ({"as_good_as": 4, "target_ratio": 4}, "a ratio are given"),
        ({"coded": True, "max_error": 0.1, "target_ratio": 4}, "both a maximum error and a ratio"),
        ({"coded": True, "ranks": {"gate": 1}}, "both codes and ranks"),
        ({"coded": True, "target_ratio": 1.5}, r"can't have a ratio of 1.5 \(give 2 or more\)"),
        ({"fit": "big"}, "the size of the folder is 'big', which is not a size"),
        ({"fit": 0}, "a folder can't have 0 bytes"),
        ({"as_good_as": 7}, "give 2, 3, 4, 5, 6 or 8"),
        ({"max_error": 1.5, "coded": True}, "the maximum error is 1.5"),
        (
            {"max_error": 1e-5, "coded": True},
            r"no (codes|widths) are within a weight error of 1e-05 \(the smallest error is",
        ),
        ({"fit": 10}, "a folder of 10 bytes is out of reach"),
    ],
)
def test_rules_that_cannot_be(options: dict[str, Any], text: str) -> None:
    for service in (MoECompressionService.compute, MoECompressionService.estimate):
        with pytest.raises(InvalidRequest, match=text) as raised:
            service("demo:native", **options)
        assert "\n" not in str(raised.value)


def test_no_codes_of_a_byte_are_as_good_as_eight_bits_in_shorter_groups() -> None:
    with pytest.raises(InvalidRequest, match="layer 0: no codes are as good as plain quantisation at 8 bits"):
        MoECompressionService.compute("demo:native", as_good_as=8)


def test_what_is_nothing_needs_nothing() -> None:
    """Experts of zeros: no error can be divided by their energy."""
    none = dict.fromkeys(TRIED, 0.0)
    found = {0: {"up": RoleTrial((64, 64), 4, 0.0, none, none, dict.fromkeys(PLAIN_BITS, 0.0), 0.0)}}
    for rule in (BitRule(2), BitRule(max_error=0.1), BitRule(as_good_as=4)):
        codes = rule.choose(found)
        assert predict_error(found[0], codes[0]) == 0
        assert not np.isnan(sqrt(bits_of(found, codes)))
