"""What an installation brings: which libraries where, and what commands say of those that are missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
APPLE = {"sys_platform": "darwin", "platform_machine": "arm64"}
INTEL_MAC = {"sys_platform": "darwin", "platform_machine": "x86_64"}
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}

# as where nothing of an extra is installed
WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from chuk_lazarus.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def wanted(requirements: list[str], platform: dict[str, str]) -> set[str]:
    """The packages that these requirements ask for on a platform."""
    parsed = map(Requirement, requirements)
    return {one.name for one in parsed if not one.marker or one.marker.evaluate(platform)}


@pytest.mark.parametrize(
    ("platform", "plain", "extra"),
    [
        (APPLE, True, True),
        (LINUX, False, True),
        (LINUX | {"platform_machine": "aarch64"}, False, True),
        (INTEL_MAC, False, False),
    ],
    ids=["Apple Silicon", "Linux", "Linux on ARM", "Intel Mac"],
)
def test_mlx_comes_by_itself_on_apple_silicon_only(platform: dict[str, str], plain: bool, extra: bool) -> None:
    mlx = {"mlx", "mlx-lm"}
    assert wanted(PROJECT["dependencies"], platform) & mlx == (mlx if plain else set())
    assert wanted(PROJECT["optional-dependencies"]["mlx"], platform) == (mlx if extra else set())


def test_every_python_that_is_tested_is_named() -> None:
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")}
    pythons = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("PYTHONS ?= "))
    assert set(pythons.removeprefix("PYTHONS ?= ").split()) == {name for name in named if "." in name}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A text.\n")
    return str(path)


COMPRESS = ["moe-overlay-compress", "-m", "demo:native", "-O", "new", "--bits", "2.25"]


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("mlx", ["moe-overlay-eval", "-m", "demo:native", "--overlay", "x", "--text", "TEXT"], "MLX and mlx-lm are"),
        ("mlx", [*COMPRESS, "--calibrate", "TEXT"], "MLX and mlx-lm are"),
        ("mlx_lm", [*COMPRESS, "--calibrate", "TEXT"], "MLX and mlx-lm are"),
        ("distributed", ["moe-type-analyze", "-m", "demo:native", "--dask", "tcp://127.0.0.1:1"], "dask is"),
        ("numba", [*COMPRESS, "--trellis"], "numba, which encodes trellises, is"),
    ],
    ids=["moe-overlay-eval", "--calibrate", "--calibrate without mlx-lm", "--dask", "--trellis"],
)
def test_what_needs_an_extra_says_in_one_line_how_to_get_it(
    missing: str, arguments: list[str], message: str, text: str, tmp_path: Path
) -> None:
    extra = {"mlx": "mlx", "mlx_lm": "mlx", "distributed": "dask", "numba": "trellis"}[missing]
    words = [text if word == "TEXT" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, "introspect", "moe-expert", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'lazarus: {message} not installed (run: pip install "chuk-lazarus[{extra}]")\n'
    assert not (tmp_path / "new").exists()


def test_what_needs_mlx_says_so_in_python() -> None:
    code = (
        "import sys; sys.modules['mlx'] = None\n"
        "import chuk_lazarus.introspection.moe as moe\n"
        "for name in ('load_overlay', 'overlay_classes', 'OverlayMoE'):\n"
        "    try: getattr(moe, name)\n"
        "    except moe.InvalidRequest as error: print(isinstance(error, ImportError), error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'True run: pip install "chuk-lazarus[mlx]"\n' * 3


def test_an_analysis_needs_no_extra(tmp_path: Path) -> None:
    arguments = ["introspect", "moe-expert", "moe-type-analyze", "-m", "demo:upcycled", "--html", "page.html"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "mlx,mlx_lm,transformers,distributed,dask,numba", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "UPCYCLED" in done.stdout
    assert "<svg" in (tmp_path / "page.html").read_text("utf-8")
