"""What fits, from headers alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from chuk_lazarus.cli.app import app, run
from chuk_lazarus.introspection.moe import MoECompressionService, MoELayoutService
from chuk_lazarus.introspection.moe.overlays.codes.affine import AffineCode
from chuk_lazarus.introspection.moe.overlays.fit import GAUSSIAN_ERRORS, expected_error, plan_fit, smallest_machine
from chuk_lazarus.introspection.moe.weights.repositories.find import DEMO_FOLDER
from hub_server import HubServer

LAYOUT = ["introspect", "moe-expert", "moe-layout", "-m", "demo:native"]
OLMOE = {"parameters": 6_400_000_000, "stored_bytes": 12_800_000_000, "other_bytes": 1_000_000_000}


@pytest.mark.parametrize("bits", GAUSSIAN_ERRORS)
def test_the_errors_are_those_of_our_codes(bits: float) -> None:
    code = AffineCode(int(bits), 64 if bits == 2.5 else 128)
    matrix = np.random.default_rng(1).normal(size=(512, 1024)).astype(np.float32)
    lost = np.square(code.decode(code.encode(matrix), (512, 1024)) - matrix).sum() / np.square(matrix).sum()
    assert lost == pytest.approx(GAUSSIAN_ERRORS[bits], rel=0.03)
    assert expected_error(bits) == pytest.approx(np.sqrt(GAUSSIAN_ERRORS[bits]))


def test_more_bytes_err_less() -> None:
    plans = [plan_fit(size * 10**9, **OLMOE, cache_bytes_per_token=None) for size in range(3, 13)]
    errors = [plan.weight_error for plan in plans if plan.weight_error is not None]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert all(
        plan.bound is not None and plan.weight_error is not None and plan.bound < plan.weight_error for plan in plans
    )


def test_the_sums() -> None:
    plan = plan_fit("4GB", **OLMOE, cache_bytes_per_token=100_000, context=10_000)
    assert plan.rest_bytes == 1_000_000_000 * 8.5 / 16
    assert plan.bits_per_weight == pytest.approx(8 * (4e9 - 531_250_000) / 6.4e9)
    assert (plan.cache_bytes, plan.memory_bytes) == (10**9, 5 * 10**9)
    assert plan.machine_bytes == 8 * 10**9
    assert plan.download_bytes == 13_800_000_000
    kept = plan_fit("4GB", **OLMOE, cache_bytes_per_token=None, rest_bits=None)
    assert kept.rest_bytes == 10**9
    assert kept.cache_bytes is None


def test_too_little_says_the_least() -> None:
    plan = plan_fit("2GB", **OLMOE, cache_bytes_per_token=None)
    assert not plan.fits
    assert plan.bits_per_weight is plan.weight_error is plan.memory_bytes is None
    assert plan_fit(plan.least_bytes + 1, **OLMOE, cache_bytes_per_token=None).fits


@pytest.mark.parametrize(("gigabytes", "machine"), [(1, 8), (6, 8), (6.1, 16), (300, 512), (400, None)])
def test_machines(gigabytes: float, machine: int | None) -> None:
    assert smallest_machine(int(gigabytes * 1e9)) == (machine and machine * 10**9)


def test_a_folder_that_fits_is_as_planned(tmp_path: Path) -> None:
    size = 330_000
    plan = MoELayoutService.describe("demo:native", fit=size).fit
    report = MoECompressionService.compress("demo:native", tmp_path / "out", fit=size, format="mlx")
    assert plan is not None
    assert plan.bits_per_weight is not None
    texts = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert plan.bits_per_weight - 8 * (texts + 12_000) / 393_216 < report.bits_per_weight < plan.bits_per_weight


def test_an_estimate_measures_what_the_headers_expect() -> None:
    planned = MoELayoutService.describe("demo:native", fit=300_000).fit
    measured = MoECompressionService.estimate("demo:native", fit=300_000)
    assert (measured.format, measured.fit and measured.fit.measured) == ("mlx", True)
    assert planned is not None
    assert planned.weight_error == pytest.approx(measured.weight_error, rel=0.3)
    assert MoECompressionService.estimate("demo:upcycled", fit=300_000).format == "overlay"


def test_headers_alone_are_read_from_the_hub(hub: HubServer) -> None:
    hub.add("org/native", DEMO_FOLDER / "native")
    layout = MoELayoutService.describe("org/native", fit="300kB")
    assert layout.fit is not None
    assert layout.fit.fits
    assert layout.cost.bytes_read < 20_000  # of 920,000


def test_the_screen() -> None:
    done = CliRunner().invoke(app, [*LAYOUT, "--fit", "300kB"], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert re.search(r"yes, with 4.6\d bits per expert weight in 300.0 kB", " ".join(done.output.split()))
    done = CliRunner().invoke(app, [*LAYOUT, "--fit", "100kB"], env={"COLUMNS": "100"})
    assert "no: quantised for MLX, it takes" in done.output
    done = CliRunner().invoke(app, [*LAYOUT, "--fit", "1GB", "--json"])
    assert json.loads(done.output)["fit"]["bits_per_weight"] == 16


@pytest.mark.parametrize("options", [["--fit", "much"], ["--fit", "1GB", "--rest-bits", "1"]])
def test_what_can_t_be(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run([*LAYOUT, *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
