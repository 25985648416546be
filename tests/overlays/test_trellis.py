"""Trellises: against a decoder that reads bit by bit, all paths of tiny cases, bounds in closed form, and MLX."""

import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app
from chuk_lazarus.introspection.moe import MoECompressionService
from chuk_lazarus.introspection.moe.errors import InvalidRequest
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import read_overlay
from chuk_lazarus.introspection.moe.overlays.codes import StoredMatrix, parse_code
from chuk_lazarus.introspection.moe.overlays.codes import trellis as trellis_module
from chuk_lazarus.introspection.moe.overlays.codes.bits import BitsCode
from chuk_lazarus.introspection.moe.overlays.codes.code import code_bytes
from chuk_lazarus.introspection.moe.overlays.codes.low_rank import FactorsCode, SumCode
from chuk_lazarus.introspection.moe.overlays.codes.trellis import STATES, WIDTHS, TrellisCode, codebook
from chuk_lazarus.introspection.moe.overlays.trials import TRELLIS_ERRORS
from chuk_lazarus.introspection.moe.weights.experts import Experts
from sampling import examples, sampled

Array = NDArray[np.float32]
Parts = dict[str, NDArray[Any]]
every_width = pytest.mark.parametrize("bits", WIDTHS)
shapes = st.tuples(st.integers(1, 20), st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 128, 130])))


def gaussian(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def coded(bits: int, matrix: Array) -> Array:
    shape = matrix.shape[0], matrix.shape[1]
    return TrellisCode(bits).decode(TrellisCode(bits).encode(matrix), shape)


def random_parts(bits: int, shape: tuple[int, int], seed: int = 0) -> Parts:
    random = np.random.default_rng(seed)
    layout = TrellisCode(bits).layout(shape)
    parts: Parts = {
        name: random.integers(0, 256, part.shape, np.uint8) for name, part in layout.items() if part.dtype == "U8"
    }
    return parts | {"unit": np.asarray(0.37, np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# Another decoder, weight by weight, from what docs/overlay-format.md says


def decode_slowly(bits: int, parts: Parts, rows: int, columns: int) -> Array:
    multiplier = {1: 2191, 2: 1033, 3: 1543, 4: 2813}[bits]
    stream = "".join(f"{int(byte):08b}"[::-1] for byte in parts["stream"])
    result = np.empty((rows, columns), np.float32)
    for row in range(rows):
        k = int(parts["scales"][row])
        scale = np.float32(float(parts["unit"]) * 2 ** ((k - 255) / 16) if k else 0.0)
        for column in range(columns):
            start = (row * columns + column) * bits
            state = int(stream[start : start + 12][::-1], 2)
            rank = multiplier * (state ^ (state // 64)) % 4096
            result[row, column] = np.float32(NormalDist().inv_cdf((rank + 0.5) / 4096)) * scale
    return result


@every_width
@pytest.mark.parametrize("shape", [(3, 300), (17, 64), (8, 1), (1, 7), (1, 1), (9, 65)])
def test_random_bytes_decode_as_the_format_says(bits: int, shape: tuple[int, int]) -> None:
    parts = random_parts(bits, shape)
    found = TrellisCode(bits).decode(parts, shape)
    assert (found == decode_slowly(bits, parts, *shape)).all()
    assert np.isfinite(found).all()


@every_width
def test_blocks_do_not_matter_to_decoding(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts(bits, (50, 33))
    whole = TrellisCode(bits).decode(parts, (50, 33))
    monkeypatch.setattr(trellis_module, "BLOCK", 300)
    assert (TrellisCode(bits).decode(parts, (50, 33)) == whole).all()


@every_width
def test_values_are_the_quantiles_of_a_gaussian(bits: int) -> None:
    """All of them, each once, symmetric; and the error of each bit of a file depends on the last bits of no library."""
    values = np.sort(codebook(bits))
    assert len(np.unique(values)) == STATES
    np.testing.assert_array_equal(values, -values[::-1])
    exact = np.array([NormalDist().cdf(float(value)) for value in values]) * STATES
    np.testing.assert_allclose(exact, np.arange(STATES) + 0.5, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The best path


@pytest.mark.parametrize(("bits", "states", "count"), [(1, 8, 7), (1, 16, 6), (2, 16, 4), (2, 64, 3), (3, 64, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_no_path_is_better(bits: int, states: int, count: int, seed: int) -> None:
    """Of all first states and all bits after it."""
    viterbi = pytest.importorskip("chuk_lazarus.introspection.moe.overlays.codes.viterbi")
    table, numbers = gaussian(states, seed=seed), gaussian(count, seed=seed + 100)
    found = viterbi.best_states(numbers, table, bits)
    least = np.inf
    for first in range(states):
        for steps in product(range(1 << bits), repeat=count - 1):
            path = [first]
            for newest in steps:
                path.append((path[-1] >> bits) + newest * (states >> bits))
            least = min(least, float(((table[path] - numbers) ** 2).sum()))
    assert float(((table[found] - numbers) ** 2).sum()) == pytest.approx(least, rel=1e-5)
    assert all(new % (states >> bits) == old >> bits for old, new in pairwise(found))


@every_width
def test_pieces_of_a_long_path_join(bits: int) -> None:
    """The whole path is one of the trellis, and numbers at the seams err as others do."""
    viterbi = pytest.importorskip("chuk_lazarus.introspection.moe.overlays.codes.viterbi")
    numbers, values = gaussian(5 * viterbi.PIECE + 3), codebook(bits)
    states = viterbi.best_states(numbers, values, bits).astype(int)
    assert (states[1:] % (STATES >> bits) == states[:-1] >> bits).all()
    errors = (values[states] - numbers) ** 2
    seams = np.concatenate([errors[n * viterbi.PIECE - 20 : n * viterbi.PIECE + 20] for n in range(1, 6)])
    assert seams.mean() < 1.6 * errors.mean()


# Of numbers of a Gaussian, what levels of as many bits lose (Max 1960)
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@every_width
def test_gaussian_numbers_lose_little_more_than_any_code_must(bits: int) -> None:
    """At least 4**-bits (Shannon), and at most a third of the bits further from there than levels are."""
    matrix = gaussian(16, 1024)
    found = coded(bits, matrix)
    product, square, energy = (np.vdot(*pair) for pair in ((matrix, found), (found, found), (matrix, matrix)))
    error = 1 - product**2 / (square * energy)
    bound = 0.25**bits
    assert bound < error < bound * 1.2
    assert np.log2(error / bound) < 0.45 * np.log2(LLOYD_MAX[bits] / bound)
    assert error == pytest.approx(TRELLIS_ERRORS[bits] * LLOYD_MAX[bits], rel=0.1)
    assert product == pytest.approx(energy, rel=1e-4)  # unbiased


# ---------------------------------------------------------------------------------------------------------------------
# What any code keeps


@every_width
@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
@settings(max_examples=examples(15), deadline=None)
def test_any_shape_is_coded_in_the_bytes_of_the_layout(
    bits: int, shape: tuple[int, int], seed: int, power: int
) -> None:
    matrix, code = gaussian(*shape, seed=seed) ** power, TrellisCode(bits)
    parts, layout = code.encode(matrix), code.layout(shape)
    assert {name: part.shape for name, part in parts.items()} == {name: part.shape for name, part in layout.items()}
    assert code_bytes(code, shape) == sum(part.nbytes for part in parts.values())
    assert code_bytes(code, shape) <= shape[0] * shape[1] * bits / 8 + shape[0] + 4 + 3
    found = code.decode(parts, shape)
    assert (found == decode_slowly(bits, parts, *shape)).all()
    assert np.vdot(matrix, found) == pytest.approx(np.vdot(matrix, matrix), rel=1e-3)


@every_width
def test_zeros_stay_zeros(bits: int) -> None:
    matrix = gaussian(6, 200)
    matrix[2] = 0
    assert not coded(bits, matrix)[2].any()
    assert not coded(bits, np.zeros((5, 7), np.float32)).any()
    assert coded(bits, np.zeros((1, 1), np.float32)).shape == (1, 1)


@every_width
def test_constant_rows_are_nearly_kept(bits: int) -> None:
    matrix = np.repeat(np.array([[3.0], [-0.25]], np.float32), 300, axis=1)
    found = coded(bits, matrix)
    assert ((found - matrix) ** 2).sum() < 0.5 * 0.25 ** (bits - 1) * (matrix**2).sum()


@every_width
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_scale_does_not_matter(bits: int, scale: float) -> None:
    exponent, matrix = round(np.log2(scale)), gaussian(8, 200)
    found = coded(bits, np.ldexp(matrix, exponent))
    np.testing.assert_allclose(np.ldexp(found, -exponent), coded(bits, matrix), rtol=1e-5)


@every_width
def test_the_largest_and_the_least_numbers_stay_finite(bits: int) -> None:
    info = np.finfo(np.float32)
    for peak in (info.max, info.tiny, info.smallest_subnormal):
        assert np.isfinite(coded(bits, np.sign(gaussian(4, 130)) * peak)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = gaussian(5, 130)
    matrix[3, 128] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        TrellisCode(2).encode(matrix)


@every_width
def test_a_matrix_is_not_changed(bits: int) -> None:
    matrix = gaussian(6, 200)
    TrellisCode(bits).encode(matrix)
    assert (matrix == gaussian(6, 200)).all()


@every_width
def test_a_code_is_read_from_its_text(bits: int) -> None:
    assert parse_code(f"{bits}trellis") == TrellisCode(bits)
    both = SumCode(FactorsCode(3, BitsCode(8)), TrellisCode(bits))
    assert parse_code(str(both)) == both
    assert str(both) == f"rank3:3bit:128+{bits}trellis"


@pytest.mark.parametrize(
    "text", ["0trellis", "5trellis", "2trellis:128", "trellis", "rank3:2trellis", "2trellis+2bit:64"]
)
def test_other_texts_are_no_codes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a code"):
        parse_code(text)


def test_other_widths_are_no_codes() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        TrellisCode(5)


# ---------------------------------------------------------------------------------------------------------------------
# In MLX


@every_width
@pytest.mark.parametrize("shape", [(20, 64), (5, 7), (16, 33)])
@pytest.mark.parametrize("at_once", [1 << 24, 64])
def test_mlx_decodes_and_multiplies_by_the_same_matrices(
    bits: int, shape: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few rows and of many, whole or by rows, for a stack of experts and for one matrix."""
    mx = pytest.importorskip("mlx.core")
    from chuk_lazarus.introspection.moe.overlays.runtime import trellis

    monkeypatch.setattr(trellis, "AT_ONCE", at_once)
    code, experts, random = TrellisCode(bits), 5, np.random.default_rng(0)
    each = [random_parts(bits, shape, seed) for seed in range(experts)]
    matrices = np.stack([code.decode(parts, shape) for parts in each])
    stored = StoredMatrix("delta", code, shape, experts)
    module = trellis.TrellisMatrix(stored)
    module.update(trellis.trellis_arrays(stored, {name: np.stack([one[name] for one in each]) for name in each[0]}))
    assert (np.array(module.decode()) == matrices).all()
    assert (np.array(module.decode(mx.array([3, 1, 3]))) == matrices[[3, 1, 3]]).all()
    for leading in ((12,), (trellis.FEW + 9,), (2, 3, 4), (4, 9, 3)):
        indices = random.integers(0, experts, leading)
        x = random.standard_normal((*leading[:-1], 1, 1, shape[1]) if len(leading) > 1 else (*leading, 1, shape[1]))
        found = module.gather(mx.array(x.astype(np.float32)), mx.array(indices), False)
        expected = x @ matrices[indices].swapaxes(-1, -2)
        assert found.shape == expected.shape
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-4)
    single = StoredMatrix("base", code, shape, None)
    base = trellis.TrellisMatrix(single)
    base.update(trellis.trellis_arrays(single, each[0]))
    x = random.standard_normal((3, 2, shape[1])).astype(np.float32)
    np.testing.assert_allclose(np.array(base(mx.array(x))), x @ matrices[0].T, rtol=1e-4, atol=1e-4)


def test_what_stays_in_memory_is_what_is_on_disk() -> None:
    pytest.importorskip("mlx.core")
    from chuk_lazarus.introspection.moe.overlays.runtime import trellis

    module = trellis.TrellisMatrix(StoredMatrix("delta", TrellisCode(2), (256, 512), 8))
    size = sum(array.nbytes for array in (module.stream, module.scales, module.grid))
    assert size < 8 * (code_bytes(TrellisCode(2), (256, 512)) + 1100)


# ---------------------------------------------------------------------------------------------------------------------
# As users ask for it


@pytest.mark.parametrize(("demo", "bits"), sampled([("upcycled", 2.7), ("native", 2.2)], [("upcycled", 2.7)]))
def test_trellises_err_less_than_levels_of_the_same_size(demo: str, bits: float, tmp_path: Path) -> None:
    model = f"demo:{demo}"
    levels, trellis = (
        MoECompressionService.verify(model, layers="all", bits=bits, trellis=trellis, tolerance=9)
        for trellis in (False, True)
    )
    for ours, theirs in zip(trellis.layers, levels.layers, strict=True):
        assert ours.output_error.mean < 0.9 * theirs.output_error.mean
    written = MoECompressionService.compress(model, tmp_path / "overlay", bits=bits, trellis=True)
    assert bits * 0.98 < written.bits_per_weight <= bits
    assert "trellis" in written.codes[0]["up"].delta
    experts, overlay = Experts.open(model), read_overlay(tmp_path / "overlay")
    computed = MoECompressionService.compute(model, layers="all", bits=bits, trellis=True)
    exact = [experts.layer(0).matrices(expert) for expert in range(8)]
    found = [overlay.expert(0, expert) for expert in range(8)]
    lost = sum(((f[role] - e[role]) ** 2).sum() for e, f in zip(exact, found, strict=True) for role in e)
    energy = sum((e[role] ** 2).sum() for e in exact for role in e)
    assert computed.layers[0].weight_error == pytest.approx(np.sqrt(lost / energy), rel=1e-4)


def test_above_four_bits_levels_go_on() -> None:
    by_levels, by_trellis = (
        MoECompressionService.compute("demo:native", bits=6.3, trellis=trellis).layers for trellis in (False, True)
    )
    assert by_levels == by_trellis


def test_the_command_line_says_what_it_wants() -> None:
    start = ["introspect", "moe-expert", "moe-overlay-compute", "-m", "demo:native"]
    run = CliRunner().invoke(app, [*start, "--bits", "2.2", "--trellis"])
    assert run.exit_code == 0, run.output
    assert "trellis" in run.output
    with pytest.raises(InvalidRequest, match="need codes"):
        MoECompressionService.compute("demo:native", trellis=True)
    by_ratio = MoECompressionService.compute("demo:native", target_ratio=5, coded=True, trellis=True)
    assert by_ratio.layers == MoECompressionService.compute("demo:native", bits=3.2, trellis=True).layers


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe.overlays.codes.trellis import TrellisCode
import numpy as np
parts = {"stream": np.zeros(12, np.uint8), "scales": np.ones(4, np.uint8), "unit": np.asarray(1, np.float32)}
assert TrellisCode(2).decode(parts, (4, 10)).shape == (4, 10)
sys.exit(run(["introspect", "moe-expert", "moe-overlay-compress", "-m", "demo:native", "--bits", "2", *sys.argv[1:]]))
"""


def test_without_a_compiler_it_is_one_line(tmp_path: Path) -> None:
    """Decoding needs none, and nothing is left behind."""
    command = [sys.executable, "-c", WITHOUT_NUMBA, "--trellis", "-O", str(tmp_path / "overlay")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "chuk-lazarus[trellis]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
