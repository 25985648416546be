"""Broken networks, stopped processes, odd numbers: short runs of faults/, and each defect that long ones found."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import ModelUnreadable, MoECompressionService, MoEError, MoETypeService
from chuk_lazarus.introspection.moe.jobs.resources import Resources, thread_limit
from chuk_lazarus.introspection.moe.weights.repositories import hub as hub_module
from chuk_lazarus.introspection.moe.weights.repositories import range_cache
from chuk_lazarus.introspection.moe.weights.repositories.range_cache import RangeCache
from hostile.faults import kills
from hostile.fuzz.cases import deadline
from hub_server import HubServer
from places import DEMO, TESTS
from processor_time import HANGS
from sampling import in_turn, keep, sampled

EXPERT = ["introspect", "moe-expert"]
ANALYZE = [*EXPERT, "moe-type-analyze"]

Matrix = NDArray[Any]


def figures(report: Any) -> dict[str, Any]:
    """A report without what tells a Hub's model from a local one."""
    return {
        key: value for key, value in report.model_dump(mode="json").items() if key not in ("model", "revision", "cost")
    }


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Broken networks


@pytest.mark.long
def test_random_sequences_of_faults() -> None:
    """In a process of its own, which shortens all waits; the same as by hand, with fewer runs."""
    command = [sys.executable, str(TESTS / "hostile/faults/network.py"), "--runs", "16", "--seed", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == []
    assert found["runs that met a fault"] >= 6


@pytest.fixture
def published(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A model on the Hub, and little patience."""
    monkeypatch.setattr(hub_module, "RETRY_DELAYS", (0.01,) * 3)
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    name = f"faults/{abs(hash(request.node.name))}"
    hub.add(name, DEMO / "native")
    return name


def test_a_hub_that_does_not_answer(hub: HubServer, published: str) -> None:
    hub.fail(where="api", stall=600.0, times=2)
    assert MoETypeService.analyze(published).type == "NATIVE"
    hub.fail(where="api", stall=600.0, times=None)
    with pytest.raises(ModelUnreadable, match="can't reach the Hub"):
        MoETypeService.analyze(published + "@other")


def test_a_server_that_sends_a_byte_a_time_is_given_up(hub: HubServer, published: str) -> None:
    hub.fail(path=".safetensors", truncate=1, times=None)
    with pytest.raises(ModelUnreadable, match="a wrong number of bytes"):
        MoETypeService.analyze(published)
    assert len(hub.requests) < 100


def test_no_address_in_an_error_of_the_client(hub: HubServer, published: str) -> None:
    hub.fail(path="/config.json", where="resolve", method="HEAD", status=200, times=None)
    with pytest.raises(ModelUnreadable) as caught:
        MoETypeService.analyze(published)
    assert "://" not in str(caught.value)
    assert "not the Hub" in str(caught.value)


def test_a_file_that_came_empty_is_not_kept(hub: HubServer, published: str) -> None:
    """The Hub's client believes a server that says so, and keeps it."""
    fault = hub.fail(path="/config.json", where="resolve", method="HEAD", truncate=0, times=2)
    assert MoETypeService.analyze(published).model_type == "mixtral"
    assert fault.hits == 2
    hub.add("faults/empty", DEMO / "upcycled")
    hub.fail(path="/config.json", where="resolve", method="HEAD", truncate=0, times=None)
    with pytest.raises(ModelUnreadable, match=r"config\.json"):
        MoETypeService.analyze("faults/empty")
    hub.faults.clear()
    assert MoETypeService.analyze("faults/empty").type == "UPCYCLED"


def test_a_failure_does_not_disturb_another_download_of_the_process(hub: HubServer, published: str) -> None:
    hub.add("faults/broken", DEMO / "upcycled")
    hub.fail(path="broken/model.safetensors", status=500, times=None)
    hub.fail(path=".safetensors", stall=0.1, times=None)

    def fail(_: int) -> str:
        with pytest.raises(MoEError) as caught:
            MoETypeService.analyze("faults/broken")
        return caught.value.message

    with ThreadPoolExecutor(2) as pool:
        failures = pool.map(fail, range(6))
        report = MoETypeService.analyze(published, layers="all")
        assert all("500" in message for message in failures)
    assert figures(report) == figures(MoETypeService.analyze("demo:native", layers="all"))


def test_a_warning_of_the_client_is_not_shown(hub: HubServer, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns of a disk with little room, in lines of its own."""
    usage = shutil.disk_usage(DEMO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MoETypeService.analyze(published).type == "NATIVE"


# Stopped processes


@pytest.mark.long
def test_stopped_at_random(tmp_path: Path) -> None:
    """As by hand, of one command, with fewer layers."""
    random = Random(5)
    with kills.bench(layers=3, repeats=1) as bench:
        for name, number in [("compress", "SIGTERM"), ("compress", "SIGKILL")]:
            kill = bench.run(name, number, random.uniform(0.3, 0.9), tmp_path / f"{name}-{number}")
            assert (kill.kind, kill.detail) == ("right", "")


BUSY = r"""
import os, signal, sys, threading, time
from chuk_lazarus.introspection.moe.numerics import spectra
def never(matrix):
    os.write(1, b"busy\n")
    time.sleep(600)
spectra.symmetric_eigenvalues = never
sys.argv[1:] = ["introspect", "moe-expert", "moe-type-analyze", "-m", "demo:native", *sys.argv[1:]]
from chuk_lazarus.cli import main
main()
"""
TURNED = """
import os, sys, time
from chuk_lazarus.introspection.moe import MoETypeService
def turn(*arguments, **options):
    try:
        os.kill(os.getpid(), int(number))
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("as C++ does with an exception that it does not expect") from None
MoETypeService.analyze = turn
number = sys.argv.pop()
sys.argv[1:] = ["introspect", "moe-expert", "moe-type-analyze", "-m", "demo:native"]
from chuk_lazarus.cli import main
main()
"""
LOADING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Finder())
from chuk_lazarus.cli import main
main()
"""


@pytest.mark.parametrize(
    ("signals", "options"), [(["SIGINT"], ["--json"]), (["SIGTERM"], []), (["SIGINT", "SIGINT"], [])]
)
def test_threads_that_are_busy_do_not_keep_an_interruption_waiting(signals: list[str], options: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        busy = process.stdout.readline()
        for name in signals:
            process.send_signal(getattr(signal, name))
        try:
            _, err = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    assert busy == "busy\n"
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert (json.loads(err)["error"]["message"] if options else err) == (
        "interrupted" if options else "lazarus: interrupted\n"
    )


@pytest.mark.parametrize("program", [LOADING, TURNED], ids=["loading", "turned into another exception"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_libraries(number: int, program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lazarus: interrupted\n")


def make_old(path: Path, days: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half")
    os.utime(path, (time.time() - days * 24 * 3600,) * 2)
    return path


def test_what_a_kill_leaves_in_the_cache_goes_a_day_later(hub: HubServer, published: str, cache: Path) -> None:
    folders = [cache / "ranges/other", cache / "files", cache / "refs"]
    old = [make_old(folder / ".part-abcdefgh", 1.1) for folder in folders]
    young = [make_old(folder / ".part-ijklmnop", 0.9) for folder in folders]
    MoETypeService.analyze(published)
    assert [path.exists() for path in old] == [False] * 3
    assert [path.exists() for path in young] == [True] * 3
    assert range_cache.STALE == 24 * 3600


def test_what_a_kill_leaves_beside_a_result_goes_a_day_later(tmp_path: Path) -> None:
    old, folder = make_old(tmp_path / ".lazarus-ab12_def", 1.1), tmp_path / ".lazarus-ghij3456"
    make_old(folder / "figure", 1.1)
    os.utime(folder, (0, 0))
    kept = [make_old(tmp_path / ".lazarus-klmn7890", 0.9), make_old(tmp_path / ".lazarus-notes", 9)]
    with redirect_stdout(io.StringIO()):
        assert run([*ANALYZE, "-m", "demo:native", "-o", str(tmp_path / "results.json")]) == 0
    assert not old.exists()
    assert not folder.exists()
    assert all(path.exists() for path in kept)


@pytest.mark.long
def test_a_result_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    results = [tmp_path / name for name in ("results.json", "page.html", "figure.svg")]
    for path in results:
        path.touch(0o600)
    json_file, page, figure = map(str, results)
    with redirect_stdout(io.StringIO()):
        assert run([*ANALYZE, "-m", "demo:native", "-o", json_file, "--html", page, "--plot", figure]) == 0
    assert all(path.stat().st_size for path in results)
    assert {path.stat().st_mode & 0o777 for path in results} == {0o600}


def test_a_link_to_a_place_in_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.json").symlink_to("missing/results.json")
    with redirect_stderr(io.StringIO()) as err:
        assert run([*ANALYZE, "-m", "demo:native", "-o", "link.json"]) == 2
    assert f"there is no folder '{tmp_path}/missing'" in err.getvalue()


def test_standard_output_may_be_named(tmp_path: Path) -> None:
    """Where it is a pipe, whose name the system makes up."""
    command = [sys.executable, "-m", "chuk_lazarus.cli", *ANALYZE, "-m", "demo:native", "--json"]
    done = subprocess.run([*command, "-o", "/dev/stdout"], capture_output=True, text=True, check=True)
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:]


def test_a_range_that_another_process_deletes_is_fetched_again(hub: HubServer, published: str, cache: Path) -> None:
    """One that keeps to a limit of nothing, say."""

    def trim(what: str, done: int, total: int) -> None:
        if what == "downloading" and done == total:
            RangeCache(cache, 0).trim()

    report = MoETypeService.analyze(published, layers="all", progress=trim)
    assert figures(report) == figures(MoETypeService.analyze("demo:native", layers="all"))


# A stranger's files


def evaluate(folder: Path) -> None:
    """Run the model and the overlay in a folder, in which `pair` has put them."""
    pytest.importorskip("mlx_lm")
    with deadline():
        MoECompressionService.evaluate(str(folder / "model"), folder / "overlay", folder / "text", context=4)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    shutil.copytree(DEMO / "native", tmp_path / "model")
    MoECompressionService.compress(str(tmp_path / "model"), tmp_path / "overlay", ranks={"gate": 1, "up": 1, "down": 1})
    (tmp_path / "text").write_text("some words")
    return tmp_path


def test_a_tokenizer_with_code_of_its_own_is_refused(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though somebody at the terminal would say yes to running it."""
    model = pair / "model"
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    (model / "evil.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('it-ran').touch()\nclass Evil: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelUnreadable, match="tokenizer"):
        evaluate(pair)
    assert not (model / "it-ran").exists()


def test_a_tokenizer_that_fails_on_the_text(pair: Path) -> None:
    """Though it knows the words that mlx-lm tries when it is loaded."""
    words = {"type": "WordLevel", "vocab": {"a": 0, ",": 1, "b": 2}, "unk_token": "[UNK]"}
    tokenizer = {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": words}
    (pair / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    (pair / "model/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelUnreadable, match=r"tokenizer in .*UNK"):
        evaluate(pair)


@pytest.mark.parametrize("place", ["model", "overlay"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer.json", "link"),
        ("additional_chat_templates/own.jinja", "link"),
        ("tokenizer.json", "pipe"),
        ("model-x.safetensors", "pipe"),
    ],
)
def test_what_mlx_lm_would_read_is_of_the_model(pair: Path, place: str, name: str, kind: str) -> None:
    path = pair / place / name
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ModelUnreadable, match=f"{name} is not a regular file"):
        evaluate(pair)


@pytest.mark.parametrize("place", ["model", "overlay"])
def test_a_model_whose_loss_is_not_a_number(pair: Path, place: str) -> None:
    """Of the large tensors, one that is not looked at to see whether the two are of one model."""
    spoilt = 0
    for file in (pair / place).glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("lm_head.weight")]:
            tensors[name] = np.full_like(tensors[name], np.nan)
            spoilt += 1
        save_file(tensors, file, {"format": "pt"})
    assert spoilt == 1
    with pytest.raises(ModelUnreadable, match=f"{place}: its loss on this text is nan"):
        evaluate(pair)


# Numbers

WIDE, HIDDEN, EXPERTS = 64, 72, 4
SHAPES = {"w1": (WIDE, HIDDEN), "w3": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE)}
ROLES = {"gate": "w1", "up": "w3", "down": "w2"}
COMMANDS = {
    "layout": ["moe-layout", "-m", "{model}"],
    "analyze": ["moe-type-analyze", "-m", "{model}", "--experts", "all"],
    "analyze all": ["moe-type-analyze", "-m", "{model}", "--layers", "all"],
    "quick": ["moe-type-analyze", "-m", "{model}", "--quick"],
    "compute": ["moe-overlay-compute", "-m", "{model}"],
    "compute to an error": ["moe-overlay-compute", "-m", "{model}", "--max-error", "0.1"],
    "verify": ["moe-overlay-verify", "-m", "{model}", "--tolerance", "1e30"],
    "estimate": ["moe-overlay-estimate", "-m", "{model}"],
    "compress": ["moe-overlay-compress", "-m", "{model}", "-O", "{model}-overlay", "--energy", "0.9"],
    "export": ["moe-overlay-export", "{model}-overlay", "-O", "{model}-rebuilt"],
}
READERS = [name for name in COMMANDS if name not in ("layout", "export")]
OVERLAYS = [name for name in READERS if name not in ("analyze", "quick")]

Make = Callable[[int, str, Matrix], Matrix]


def write(folder: Path, make: Make, experts: int = EXPERTS, shapes: dict[str, tuple[int, int]] = SHAPES) -> str:
    """A Mixtral of one layer, each matrix what `make` makes of expert, name and Gaussian numbers."""
    rng = np.random.default_rng(0)
    prefix = "model.layers.0.block_sparse_moe"
    tensors = {
        f"{prefix}.experts.{e}.{name}.weight": np.ascontiguousarray(
            make(e, name, rng.standard_normal(shape, np.float32))
        )
        for e in range(experts)
        for name, shape in shapes.items()
    }
    tensors[f"{prefix}.gate.weight"] = rng.standard_normal((experts, shapes["w1"][1]), np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": experts, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def call(command: str, model: str) -> tuple[int, Any]:
    """Exit code, and the JSON on stdout, or the error; the tables must come without a crash, too."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    words = [*EXPERT, *(word.format(model=model) for word in COMMANDS[command])]
    with redirect_stdout(io.StringIO()) as table, redirect_stderr(io.StringIO()):
        shown = run(words)
    assert " nan" not in table.getvalue()
    assert " inf" not in table.getvalue()
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run([*words, "--json", *(["--force"] if "-O" in words else [])])
    assert shown == code
    assert err.getvalue().count("\n") == (code > 1)
    return code, json.loads(out.getvalue() or err.getvalue(), parse_constant=refuse)


EQUAL = {
    name: np.random.default_rng(seed).standard_normal(shape, np.float32)
    for seed, (name, shape) in enumerate(SHAPES.items())
}
ODD: dict[str, tuple[Make, int, str]] = {
    "two identical experts": (lambda e, name, x: EQUAL[name], 2, "UNDETERMINED"),
    "all zero": (lambda e, name, x: np.zeros_like(x), 4, "UNDETERMINED"),
    "a dead expert": (lambda e, name, x: x * np.float32(e != 1), 4, "NATIVE"),
    "a dead role": (lambda e, name, x: x * np.float32(name != "w1"), 4, "UNDETERMINED"),
    "denormals in float32": (lambda e, name, x: x * np.float32(1e-40), 4, "NATIVE"),
    "denormals in float16": (lambda e, name, x: (x * np.float32(1e-6)).astype(np.float16), 4, "NATIVE"),
    "denormals in bfloat16": (lambda e, name, x: (x * np.float32(1e-38)).astype(ml_dtypes.bfloat16), 4, "NATIVE"),
    "the largest of float16": (lambda e, name, x: (np.sign(x) * 65504).astype(np.float16), 4, "NATIVE"),
    "rank one": (lambda e, name, x: x[:, :1] @ x[:1, :], 4, ""),
    "scales far apart": (lambda e, name, x: EQUAL[name] * np.float32(10.0 ** (3 * e)), 4, "UPCYCLED"),
    "opposite signs": (lambda e, name, x: EQUAL[name] * np.float32((-1) ** e), 4, ""),
    "another storage of a role": (lambda e, name, x: x.astype(np.float16) if name == "w2" else x, 4, "NATIVE"),
}
NARROW = {
    "one neuron": {"w1": (1, HIDDEN), "w3": (1, HIDDEN), "w2": (HIDDEN, 1)},
    "one input": {"w1": (WIDE, 1), "w3": (WIDE, 1), "w2": (1, WIDE)},
    "one number": {"w1": (1, 1), "w3": (1, 1), "w2": (1, 1)},
}


@pytest.mark.parametrize(
    "odd",
    keep(
        ODD,
        "all zero",
        "a dead role",
        "denormals in float32",
        "the largest of float16",
    ),
)
def test_odd_numbers_give_defined_results(tmp_path: Path, odd: str) -> None:
    """Of every command: JSON without NaN or infinity, a table, no warning of numpy."""
    make, experts, origin = ODD[odd]
    model = write(tmp_path / "m", make, experts)
    found = {command: call(command, model) for command in COMMANDS}
    assert [command for command, (code, _) in found.items() if code] == []
    assert found["analyze"][1]["type"] == origin or not origin
    assert found["quick"][1]["type"] == origin or not origin


@pytest.mark.parametrize("narrow", keep(NARROW, "one number"))
def test_matrices_of_one_row_or_column(tmp_path: Path, narrow: str) -> None:
    model = write(tmp_path / "m", lambda e, name, x: x, 3, NARROW[narrow])
    found = {command: call(command, model) for command in COMMANDS}
    assert [command for command, (code, _) in found.items() if code] == []
    assert found["analyze"][1]["type"] == found["quick"][1]["type"] == "UNDETERMINED"


def test_all_zero_experts_lose_nothing(tmp_path: Path) -> None:
    model = write(tmp_path / "m", ODD["all zero"][0])
    projections = call("analyze", model)[1]["layers"][0]["projections"]
    assert {(p["rank"]["0.95"], p["delta_energy"]) for p in projections.values()} == {(0.0, 0.0)}
    assert call("verify", model)[1]["layers"][0]["output_error"] == {"mean": 0.0, "max": 0.0}
    same = call("estimate", model)[1]["same_bytes"]
    assert {row[way] for row in same for way in ("quantisation", "overlay", "svd")} <= {0.0, None}


NOT_FINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "overflow": "overflow"}


@pytest.mark.parametrize(
    ("role", "value"),
    sampled(
        product(ROLES, NOT_FINITE),
        in_turn(list(ROLES), list(NOT_FINITE)),
        lambda role, value: f"{role}-{value}",
    ),
)
def test_what_is_not_finite_is_named(tmp_path: Path, role: str, value: Any) -> None:
    """By layer, expert and role, whoever reads it; `--quick` does not read down."""
    value = NOT_FINITE[value]

    def spoil(expert: int, name: str, x: Matrix) -> Matrix:
        if (expert, name) == (2, ROLES[role]):
            if value == "overflow":  # what a cast to float16 makes of a large weight
                with np.errstate(over="ignore"):
                    return np.where(x == x.max(), np.float32(70_000), x).astype(np.float16)
            x[3, 5] = value
        return x.astype(np.float16)

    model = write(tmp_path / "m", spoil)
    for command in READERS:
        code, found = call(command, model)
        if (command, role) == ("quick", "down"):
            assert code == 0
            continue
        assert code == 3, command
        assert "layer 0, expert 2" in found["error"]["message"]
        assert role in found["error"]["message"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_lies_beside_the_experts_and_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    """The router of a layer whose outputs are mixed, and the neighbour that a layer's neurons are compared with."""
    model = Path(write(tmp_path / "m", lambda e, name, x: x))
    tensors = load_file(model / "model.safetensors")
    tensors |= {name.replace("layers.0", "layers.1"): values for name, values in tensors.items()}
    (model / "config.json").write_text((model / "config.json").read_text().replace('layers": 1', 'layers": 2'))
    prefix = "model.layers.{}.block_sparse_moe.{}.weight"
    for name, command, words in (
        (prefix.format(0, "gate"), "verify", "layer 0: the router holds"),
        (prefix.format(0, "gate"), "compress", "layer 0: the router holds"),
        (prefix.format(1, "experts.0.w1"), "analyze all", "layer 1, expert 0: the gate projection holds"),
    ):
        spoilt = tensors[name].copy()
        spoilt[1, 2] = value
        save_file(tensors | {name: spoilt}, model / "model.safetensors")
        code, found = call(command, str(model))
        assert (code, words in found["error"]["message"]) == (3, True), found


@pytest.mark.parametrize("experts", [0, 1])
def test_too_few_experts_are_refused(tmp_path: Path, experts: int) -> None:
    model = write(tmp_path / "m", lambda e, name, x: x, experts)
    codes = {command: call(command, model)[0] for command in READERS}
    assert set(codes.values()) == {4}


def test_experts_that_are_not_stored_alike_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m", lambda e, name, x: x.astype(np.float16) if e == 1 else x)
    for command in READERS:
        code, found = call(command, model)
        assert code == 3
        assert "experts.1." in found["error"]["message"]
        assert "f16" in found["error"]["message"]


def test_weights_near_the_end_of_float32_are_refused(tmp_path: Path) -> None:
    """Their deltas would be infinite."""
    model = write(tmp_path / "m", lambda e, name, x: np.sign(x) * np.float32(3e38))
    for command in READERS:
        code, found = call(command, model)
        if command != "quick":
            assert code == 3, command
            assert "too large" in found["error"]["message"]


def test_ranks_that_are_given_meet_the_end_of_float32_too(tmp_path: Path) -> None:
    model = write(tmp_path / "m", lambda e, name, x: np.sign(x) * np.float32(3e38))
    ranks = ["--gate-rank", "1", "--up-rank", "1", "--down-rank", "1"]
    with redirect_stderr(io.StringIO()) as err:
        code = run([*EXPERT, "moe-overlay-compress", "-m", model, "-O", f"{model}-overlay", *ranks])
    assert code == 3
    assert err.getvalue().count("\n") == 1
    assert "layer 0" in err.getvalue()


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for place, inner in enumerate(value) for k, v in flat(inner, f"{name}.{place}").items()}
    return {name: value}


@pytest.mark.parametrize("threads", keep([2, 3, 8], 3))
def test_results_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Equal for a layer that fits one window a thread; else what sums of products give may differ by a rounding, the
    mean cosines and what sharing saves, and nothing else."""

    def analyze(count: int) -> dict[str, Any]:
        with thread_limit(count):
            return flat(figures(MoETypeService.analyze("demo:upcycled", layers="all")))

    assert analyze(threads) == analyze(1)
    monkeypatch.setattr(Resources, "window_weights", 50_000)
    one, many = analyze(1), analyze(threads)
    assert one.keys() == many.keys()
    unequal = {name for name in one if one[name] != many[name]}
    of_products = ("cosine", "bits_saved", "bound", "aligned_delta_energy", "documented_rule.confidence")
    assert all(any(figure in name for figure in of_products) for name in unequal)
    off = {name: abs(one[name] - many[name]) for name in unequal}
    assert {name: by for name, by in off.items() if by > (1e-5 if name.endswith(("saved", "bound")) else 1e-6)} == {}


@pytest.mark.long
@pytest.mark.parametrize("variables", [{"OMP_NUM_THREADS": "2"}, {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}])
def test_results_do_not_depend_on_the_threads_of_libraries(variables: dict[str, str]) -> None:
    def analyze(**environment: str) -> Any:
        command = [sys.executable, "-m", "chuk_lazarus.cli", *ANALYZE, "-m", "demo:upcycled", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
        return {key: value for key, value in json.loads(done.stdout).items() if key != "cost"}

    assert analyze(**variables) == analyze(OMP_NUM_THREADS="1")
