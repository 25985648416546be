"""What an installation brings: which libraries where, and what commands say of those that are missing."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

from chuk_lazarus import __version__
from chuk_lazarus.cli.app import app, run
from chuk_lazarus.cli.moe_expert import DOCUMENTATION
from chuk_lazarus.cli.version import EXTRAS

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
    arguments = ["introspect", "moe-expert", "moe-type-analyze", "-q", "-m", "demo:upcycled", "--html", "page.html"]
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


def test_the_version_names_what_is_installed_and_what_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["--version"]) == 0
    first, python, *libraries = capsys.readouterr().out.splitlines()
    assert first == f"lazarus {__version__}"
    assert python.startswith("Python 3.")
    assert {line.split()[0] for line in libraries} >= {"huggingface_hub", *EXTRAS}
    monkeypatch.setitem(EXTRAS, "no-such-library", "none")
    assert run(["--version"]) == 0
    assert 'no-such-library is not installed: pip install "chuk-lazarus[none]"\n' in capsys.readouterr().out


def test_each_extra_that_is_missing_can_be_installed() -> None:
    for library, extra in EXTRAS.items():
        assert library in {Requirement(one).name for one in PROJECT["optional-dependencies"][extra]}


# What a repository on the web needs

TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml"))


def test_the_citation_is_of_now() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["title"], citation["version"]) == (PROJECT["name"], __version__)
    assert (citation["license"], citation["repository-code"]) == (PROJECT["license"], PROJECT["urls"]["Repository"])
    assert [{"name": author["name"]} for author in citation["authors"]] == PROJECT["authors"]


def test_every_address_of_the_project_is_the_same() -> None:
    home = PROJECT["urls"]["Repository"]
    assert all(address.startswith(home) for address in PROJECT["urls"].values())
    assert f"git clone {home} " in (ROOT / "README.md").read_text("utf-8")
    assert DOCUMENTATION.endswith(PROJECT["urls"]["Documentation"])  # as --help names it


def test_there_are_templates_for_a_wrong_verdict_and_an_unread_model() -> None:
    assert [path.stem for path in TEMPLATES] == ["unread_model", "wrong_verdict"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_an_issue_template_asks_for_what_the_program_prints(path: Path) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    fields = {part["id"]: part["attributes"] for part in form["body"]}
    assert len(fields) == len(form["body"])
    program: Any = typer.main.get_command(app)
    lines = re.findall(r"lazarus [^.\n]+", "\n".join(field["description"] for field in fields.values()))
    assert "lazarus --version" in lines
    for line in set(lines) - {"lazarus --version"}:
        _, name, *words = shlex.split(line)
        program.commands[name].make_context(name, words).close()
    assert len(set(lines)) > 1
