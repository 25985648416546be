"""Models on the Hub, end to end over a loopback Hub: what is fetched, what is kept, and what happens when it breaks.

The oracle is the same checkpoint analysed from its folder; the judge of laziness is the server's own log.
"""

import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from chuk_lazarus.cli.app import run
from chuk_lazarus.introspection.moe import (
    InvalidRequest,
    ModelUnreadable,
    MoECompressionService,
    MoETypeAnalysis,
    MoETypeService,
)
from chuk_lazarus.introspection.moe.weights.repositories import hub as hub_module
from chuk_lazarus.introspection.moe.weights.repositories.find import find_repository
from chuk_lazarus.introspection.moe.weights.repositories.hub import READ_AHEAD
from chuk_lazarus.introspection.moe.weights.repositories.range_cache import RangeCache, merge
from hub_server import HubServer, Request
from places import FIXTURES
from processor_time import HANGS
from sampling import examples, keep

LAYERS, EXPERTS, WIDE, HIDDEN = 3, 4, 192, 384
LAYER_BYTES = EXPERTS * 3 * WIDE * HIDDEN * 2
TOKEN = "hf_theRightSecret"
COMMAND = ("-m", "chuk_lazarus.cli")
QUICK = """
from chuk_lazarus import cli
from chuk_lazarus.introspection.moe.weights.repositories import hub
hub.RETRY_DELAYS = (0.01,) * 5
cli.main()
"""
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "RETRY_DELAYS", (0.01,) * 5)


def make(folder: Path, seed: int, sharded: bool = False) -> Path:
    """Write a Mixtral of three layers in float16, with one shard per layer if asked for."""
    random = np.random.default_rng(seed)

    def tensor(*shape: int) -> np.ndarray[Any, np.dtype[np.float16]]:
        return random.standard_normal(shape, np.float32).astype(np.float16)

    shards: list[dict[str, Any]] = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        base = {name: tensor(WIDE, HIDDEN) for name in ("w1", "w3")} | {"w2": tensor(HIDDEN, WIDE)}
        shard = {
            f"{prefix}.self_attn.q_proj.weight": tensor(HIDDEN, HIDDEN),
            f"{prefix}.block_sparse_moe.gate.weight": tensor(EXPERTS, HIDDEN),
        }
        for expert, (name, matrix) in itertools.product(range(EXPERTS), base.items()):
            noise = tensor(*matrix.shape) * np.float16(0.3 * layer + 0.1)
            shard[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix + noise
        shards.append(shard)
    folder.mkdir(parents=True)
    config = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        save_file({name: value for shard in shards for name, value in shard.items()}, folder / "model.safetensors")
        return folder
    names: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{LAYERS:05}.safetensors"
        save_file(shard, folder / file)
        names |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 8 MB in one file."""
    return make(tmp_path_factory.mktemp("made") / "model", 1)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a file per layer."""
    return make(tmp_path_factory.mktemp("sharded") / "model", 2, sharded=True)


def publish(hub: HubServer, folder: Path, **how: Any) -> str:
    """Put a folder on the Hub under a name no other test has; returns the name."""
    name = f"tests/model-{next(_numbers)}"
    hub.add(name, folder, **how)
    return name


def analyze(model: str | Path, layer: int | None = None) -> MoETypeAnalysis:
    """One analysis, with all objects fresh."""
    return MoETypeService.analyze(str(model), layer=layer)


def figures(report: MoETypeAnalysis | str) -> dict[str, Any]:
    """What a report, or its JSON, says of the weights, wherever they came from."""
    found = json.loads(report if isinstance(report, str) else report.model_dump_json())
    return {key: value for key, value in found.items() if key not in ("model", "revision", "cost")}


@cached
def local(model: Path, layer: int | None = None) -> dict[str, Any]:
    """What an analysis of a folder says of the weights."""
    return figures(analyze(model, layer))


def weight_requests(hub: HubServer) -> list[Request]:
    """The requests, of whatever method, for a file of weights."""
    return [request for request in hub.requests if request.file.endswith(".safetensors")]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user who has told the Hub's client nothing about what to print."""
    silent = ("HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    return {key: value for key, value in os.environ.items() if key not in silent} | changes


def arguments(model: str, *more: str) -> list[str]:
    return ["introspect", "moe-expert", "moe-type-analyze", "-m", model, "--json", *more]


def start(command: tuple[str, str], words: list[str], changes: dict[str, str]) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    pipe, line = subprocess.PIPE, [sys.executable, "-W", "error", *command, *words]
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment(**changes))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    return process.returncode, out, err


def cli(model: str, *more: str, **changes: str) -> tuple[int, str, str]:
    return finish(start(COMMAND, arguments(model, *more), changes))


def quick_cli(model: str, **changes: str) -> tuple[int, str, str]:
    """The command line with short waits between its attempts."""
    return finish(start(("-c", QUICK), arguments(model), changes))


def check_refusal(code: int, out: str, err: str, *words: str, expected: int = 3) -> None:
    """One line of JSON on stderr, nothing on stdout, and no URL or token in sight."""
    assert code == expected, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    error = json.loads(err)["error"]
    assert error["code"] == expected
    text = f"{error['message']} {error['hint']}"
    assert "://" not in text
    assert "hf_" not in text
    assert "127.0.0.1" not in text
    for word in words:
        assert word in text


def check_refused(model: str, *words: str, layer: int | None = None) -> None:
    """The service raises ModelUnreadable, and the command line ends with 3 and a line that has these words."""
    with pytest.raises(ModelUnreadable):
        analyze(model, layer)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(arguments(model, *(() if layer is None else ("--layer", str(layer)))))
    check_refusal(code, out.getvalue(), err.getvalue(), *words)


def segments(cache: Path) -> list[Path]:
    """The files that hold cached ranges."""
    return sorted(path for path in (cache / "ranges").rglob("*") if path.is_file())


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in segments(cache))


def check_clean(cache: Path) -> None:
    """Nothing is half-written."""
    assert [path for path in cache.rglob("*") if ".part" in path.name] == []


# What is fetched


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_cold_analysis_fetches_one_layer(hub: HubServer, cache: Path, made: Path, layer: int) -> None:
    name = publish(hub, made)
    report = analyze(name, layer)
    assert figures(report) == figures(analyze(made, layer))
    assert report.revision == hub.add(name, made)
    assert report.cost.bytes_fetched == hub.body_bytes() <= LAYER_BYTES * 1.01 + READ_AHEAD


def test_shards_of_other_layers_are_not_touched(hub: HubServer, cache: Path, sharded: Path) -> None:
    name = publish(hub, sharded)
    assert figures(analyze(name, 0)) == local(sharded, 0)
    assert {request.file for request in weight_requests(hub)} == {"model-00001-of-00003.safetensors"}
    hub.clear_requests()
    assert figures(analyze(name, 2)) == local(sharded, 2)
    assert {request.file for request in weight_requests(hub)} == {"model-00003-of-00003.safetensors"}
    assert hub.body_bytes() <= LAYER_BYTES * 1.01 + READ_AHEAD


def test_the_last_layer_alone_needs_no_more_than_the_header_of_the_first(
    hub: HubServer, cache: Path, sharded: Path
) -> None:
    name = publish(hub, sharded)
    report = analyze(name, 2)
    assert figures(report) == local(sharded, 2)
    assert "model-00002-of-00003.safetensors" not in {request.file for request in weight_requests(hub)}
    assert hub.body_bytes() == report.cost.bytes_fetched
    assert hub.body_bytes() <= LAYER_BYTES * 1.01 + 2 * READ_AHEAD


@pytest.mark.parametrize("fixture", ["mixtral", "deepseek_v3_sharded", "gpt_oss_mxfp4", "qwen3_moe_fused"])
def test_every_kind_of_checkpoint_reads_as_it_does_locally(hub: HubServer, cache: Path, fixture: str) -> None:
    name = publish(hub, FIXTURES / fixture)
    cold, warm = analyze(name), analyze(name)
    assert figures(cold) == figures(warm) == figures(analyze(FIXTURES / fixture))
    assert cold.cost.bytes_read == warm.cost.bytes_read
    assert warm.cost.bytes_fetched == 0


@pytest.mark.long
def test_a_warm_analysis_makes_no_request_for_weights(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    cold = analyze(name, 1)
    hub.clear_requests()
    warm = analyze(name, 1)
    assert figures(warm) == figures(cold)
    assert warm.cost.bytes_fetched == 0
    code, out, err = cli(name, "--layer", "1")
    assert (code, err) == (0, "")
    assert figures(out) == figures(cold)
    assert weight_requests(hub) == []


def test_another_layer_fetches_only_itself(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    analyze(name, 0)
    hub.clear_requests()
    report = analyze(name, 2)
    assert figures(report) == local(made, 2)
    assert report.cost.bytes_fetched == hub.body_bytes()
    assert LAYER_BYTES <= hub.body_bytes() <= LAYER_BYTES * 1.01


def test_many_small_requests_give_the_same_numbers(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHUNK", 50_000)
    report = analyze(publish(hub, made), 1)
    assert figures(report) == local(made, 1)
    assert report.cost.bytes_fetched == hub.body_bytes() <= LAYER_BYTES * 1.01 + READ_AHEAD


def test_the_command_line_prints_nothing_but_the_report(hub: HubServer, cache: Path, made: Path) -> None:
    code, out, err = cli(publish(hub, made))
    assert (code, err) == (0, "")
    assert figures(out) == local(made)


def test_progress_counts_the_bytes_up_to_their_total(hub: HubServer, cache: Path, made: Path) -> None:
    told: list[tuple[str, int, int]] = []
    MoETypeService.analyze(publish(hub, made), layer=0, progress=lambda *what: told.append(what))
    downloads = [(done, total) for what, done, total in told if what == "downloading"]
    assert downloads == sorted(downloads)
    assert downloads[-1][0] == downloads[-1][1] <= hub.body_bytes()


# Which revision, and who may read it


def test_an_older_commit_is_read(hub: HubServer, cache: Path, made: Path, sharded: Path) -> None:
    name = publish(hub, made, commit="a" * 40)
    hub.add(name, sharded, commit="b" * 40)
    old, new = analyze(f"{name}@{'a' * 40}", 1), analyze(name, 1)
    assert (old.revision, new.revision) == ("a" * 40, "b" * 40)
    assert figures(old) == local(made, 1)
    assert figures(new) == local(sharded, 1)


def test_a_new_commit_on_main_is_noticed(hub: HubServer, cache: Path, made: Path, sharded: Path) -> None:
    name = publish(hub, made)
    assert figures(analyze(name)) == local(made)
    hub.add(name, sharded, commit="c" * 40)
    assert analyze(name).revision == "c" * 40
    assert figures(analyze(name)) == local(sharded)


def test_the_same_file_in_another_repository_is_not_fetched_again(hub: HubServer, cache: Path, made: Path) -> None:
    analyze(publish(hub, made))
    hub.clear_requests()
    analyze(publish(hub, made))
    assert hub.body_bytes() == 0


@pytest.mark.parametrize(
    "address",
    [
        "{}/",
        "https://huggingface.co/{}",
        "hf.co/{}/",
        "hf://{}",
        "https://huggingface.co/{}/tree/main",
        "https://huggingface.co/{}/blob/main/config.json?download=true",
        "https://huggingface.co/{}/commits/main",
        "huggingface.co/{}/discussions/3",
    ],
)
def test_addresses_of_the_hub(hub: HubServer, cache: Path, made: Path, address: str) -> None:
    name = publish(hub, made)
    assert figures(analyze(address.format(name))) == local(made)


def test_the_name_of_a_cache_folder_is_its_model(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    assert figures(analyze(f"models--{name.replace('/', '--')}")) == local(made)


def test_a_cache_folder_is_a_model(tmp_path: Path, made: Path) -> None:
    folder = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (folder / "snapshots" / commit).mkdir(parents=True)
    check_refused(str(folder), "no safetensors")  # the newest, which is empty
    for file in made.iterdir():
        shutil.copy(file, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert figures(analyze(str(folder))) == local(made)
    shutil.rmtree(folder / "refs")
    os.utime(folder / "snapshots" / ("b" * 40), (0, 0))
    assert figures(analyze(str(folder))) == local(made)
    shutil.rmtree(folder / "snapshots")
    (folder / "snapshots").mkdir()
    check_refused(str(folder), "hf download org/name")


@pytest.mark.parametrize("address", ["{}@refs%2Fpr%2F7", "https://huggingface.co/{}/tree/refs%2Fpr%2F7"])
def test_a_revision_in_an_address_is_decoded(hub: HubServer, cache: Path, made: Path, address: str) -> None:
    with pytest.raises(ModelUnreadable, match="refs/pr/7"):
        analyze(address.format(publish(hub, made)))


def test_an_unknown_revision_is_named(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    check_refused(f"{name}@no-such-branch", name, "no-such-branch")


def test_an_unknown_repository_is_named(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused("tests/never-published", "tests/never-published")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_refused("tests/never-published", "tests/never-published")


@pytest.mark.parametrize("name", ["a--b/c", "tests/a..b", "tests/name.git", "tests/" + "n" * 200, "-x/y"])
def test_a_name_that_is_none_is_refused_without_a_request(hub: HubServer, cache: Path, name: str) -> None:
    check_refused(name, name)
    assert hub.requests == []


def test_a_private_repository_needs_the_right_token(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = publish(hub, made, token=TOKEN)
    check_refused(name, name, "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_someOtherSecret")
    check_refused(name, name, "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert figures(analyze(name)) == local(made)
    assert any(request.authorization for request in hub.requests)
    assert any(request.server == "cdn" for request in hub.requests)
    assert hub.leaks == []


def test_a_gated_repository_says_so(hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = publish(hub, made, gated=True, token=TOKEN)
    check_refused(name, name, "gated")
    monkeypatch.setenv("HF_TOKEN", "hf_someOtherSecret")
    check_refused(name, name, "gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert figures(analyze(name)) == local(made)


# What the Hub's client has downloaded before


def test_a_downloaded_snapshot_is_used(hub: HubServer, cache: Path, sharded: Path) -> None:
    name = publish(hub, sharded)
    snapshot_download(name)
    hub.clear_requests()
    report = analyze(name, 1)
    assert figures(report) == local(sharded, 1)
    assert report.cost.bytes_fetched == 0
    assert weight_requests(hub) == []


def test_a_single_downloaded_shard_is_used(hub: HubServer, cache: Path, sharded: Path) -> None:
    name = publish(hub, sharded)
    hf_hub_download(name, "model-00001-of-00003.safetensors")
    hub.clear_requests()
    assert figures(analyze(name, 0)) == local(sharded, 0)
    assert weight_requests(hub) == []
    assert figures(analyze(name, 1)) == local(sharded, 1)
    assert {request.file for request in weight_requests(hub)} == {"model-00002-of-00003.safetensors"}


@pytest.mark.parametrize("as_link", [True, False], ids=["link", "file"])
@pytest.mark.parametrize("content", [b"", b'{"model_type": "mix', b"\0" * 90], ids=["empty", "half", "zeros"])
def test_a_broken_config_is_fetched_again(
    hub: HubServer, cache: Path, made: Path, sharded: Path, content: bytes, as_link: bool
) -> None:
    """As a machine leaves it that has lost its power; caches are made of links, where the system has them."""
    name = publish(hub, sharded)
    for filename in ("config.json", "model.safetensors.index.json"):
        path = Path(hf_hub_download(name, filename))
        if not as_link:
            path.unlink()
        path.write_bytes(content)
    assert figures(analyze(name, 1)) == local(sharded, 1)
    hub.clear_requests()
    assert figures(analyze(name, 1)) == local(sharded, 1)
    assert [request for request in hub.requests if request.file.endswith(".json")] == []


def test_a_config_that_is_broken_on_the_hub_is_fetched_once(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    broken = make(tmp_path / "broken", 3)
    (broken / "config.json").write_text("{")
    name = publish(hub, broken)
    for _ in range(2):
        hub.clear_requests()
        with pytest.raises(ModelUnreadable, match=r"config\.json"):
            analyze(name)
        assert [request.method for request in hub.requests if request.file == "config.json"] == ["HEAD", "GET"]


def test_a_broken_config_without_a_network(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    analyze(name)
    path = Path(hf_hub_download(name, "config.json"))
    path.write_bytes(path.read_bytes()[:20])
    check_refusal(*cli(name, HF_HUB_OFFLINE="1"), name, "HF_HUB_OFFLINE")
    assert figures(analyze(name)) == local(made)


@pytest.mark.parametrize("extra", keep([None, 0], 0))
def test_json_that_is_too_long_is_not_fetched(hub: HubServer, cache: Path, tmp_path: Path, extra: int | None) -> None:
    """With and without a length in the answer."""
    large = make(tmp_path / "large", 4)
    with (large / "config.json").open("ab") as file:
        file.truncate(200_000_000)
    name = publish(hub, large)
    if extra is not None:
        hub.fail(**CONFIG, extra=extra)
    with pytest.raises(ModelUnreadable, match="longer than 100,000,000 bytes"):
        analyze(name)
    assert hub.body_bytes("config.json") < (30_000_000 if extra is None else 150_000_000)
    assert list(Path(os.environ["HF_HOME"]).rglob("*.incomplete")) == []


# Without a network


@pytest.mark.long
def test_offline_after_a_warm_up(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    warm = analyze(name, 1)
    hub.clear_requests()
    code, out, err = cli(name, "--layer", "1", HF_HUB_OFFLINE="1")
    assert (code, err) == (0, "")
    assert figures(out) == figures(warm)
    assert json.loads(out)["revision"] == warm.revision
    check_refusal(*cli(name, "--layer", "2", HF_HUB_OFFLINE="1"), name, "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_offline_from_a_downloaded_snapshot(hub: HubServer, cache: Path, sharded: Path) -> None:
    name = publish(hub, sharded)
    snapshot_download(name)
    code, out, err = cli(name, "--layer", "2", HF_HUB_OFFLINE="1")
    assert (code, err) == (0, "")
    assert figures(out) == local(sharded, 2)


def test_offline_and_never_seen(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    check_refusal(*cli(name, HF_HUB_OFFLINE="1"), name, "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_nobody_listens_at_the_endpoint(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check_refusal(*quick_cli("tests/unreachable", HF_ENDPOINT=endpoint), "tests/unreachable", "HF_ENDPOINT")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SSL_CERT_FILE", "/nonexistent", ["can't start", "No such file"]),
        pytest.param("SSL_CERT_FILE", __file__, ["can't start"], marks=pytest.mark.long),
        pytest.param(
            "ALL_PROXY", "socks5://name:secret@127.0.0.1:9", ["can't start", "socksio"], marks=pytest.mark.long
        ),
        pytest.param(
            "https_proxy", "gopher://name:secret@127.0.0.1:9", ["can't start", "proxy"], marks=pytest.mark.long
        ),
        pytest.param("HTTPS_PROXY", "http://[::1", ["can't start", "proxy"], marks=pytest.mark.long),
        ("HF_HUB_ETAG_TIMEOUT", "abc", ["can't start", "not a number"]),
    ],
)
def test_settings_that_the_client_cannot_start_with(
    hub: HubServer, cache: Path, made: Path, variable: str, value: str, words: list[str]
) -> None:
    code, out, err = cli(publish(hub, made), **{variable: value})
    check_refusal(code, out, err, variable, *words)
    assert "secret" not in err
    assert hub.requests == []


@pytest.mark.long
def test_a_model_that_is_here_needs_no_certificates(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    warm = analyze(name, 0)
    code, out, err = cli(name, "--layer", "0", SSL_CERT_FILE="/nonexistent")
    assert (code, err) == (0, "")
    assert figures(out) == figures(warm)


@pytest.mark.long
def test_a_model_that_is_here_outlives_the_hub(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    warm = analyze(name, 0)
    for where in ("api", "resolve", "body"):
        hub.fail(where=where, method=None, cut_after=0, times=None)
    assert figures(analyze(name, 0)) == figures(warm)
    check_refused(name, name, layer=1)


# Faults that pass

WEIGHTS = {"path": ".safetensors"}
CONFIG = {"path": "/config.json", "where": "resolve"}
MODEL_INFO = {"where": "api"}


def for_a_layer(request: Request) -> bool:
    """Whether this is a request for weights, not for the header at the start of the file."""
    return request.range is not None and not request.range.startswith("bytes=0-")


PASSING: dict[str, dict[str, Any]] = {
    "429 with Retry-After": {**WEIGHTS, "status": 429, "retry_after": "0", "times": 2},
    "429": {**WEIGHTS, "status": 429, "times": 2},
    "408": {**WEIGHTS, "status": 408, "times": 2},
    "500": {**WEIGHTS, "status": 500, "times": 2},
    "502": {**WEIGHTS, "status": 502, "times": 2},
    "503": {**WEIGHTS, "status": 503, "times": 2},
    "504": {**WEIGHTS, "status": 504, "times": 2},
    "503 for a layer": {**WEIGHTS, "status": 503, "times": 2, "when": for_a_layer},
    "Retry-After that is a date": {**WEIGHTS, "status": 503, "retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    "cut before the body": {**WEIGHTS, "cut_after": 0, "times": 2},
    "cut in the header": {**WEIGHTS, "cut_after": 5},
    "cut again and again": {**WEIGHTS, "cut_after": 400_000, "times": 4, "when": for_a_layer},
    "short body": {**WEIGHTS, "short_body": 300_000, "when": for_a_layer},
    "less than was asked for": {**WEIGHTS, "truncate": 300_000, "times": 2, "when": for_a_layer},
    "empty answer": {**WEIGHTS, "truncate": 0, "times": 2},
    "more than was asked for": {**WEIGHTS, "extra": 1},
    "more than was asked for, for a layer": {**WEIGHTS, "extra": 300_000, "times": 2, "when": for_a_layer},
    "no length": {**WEIGHTS, "extra": 0, "times": 2},
    "wrong Content-Range": {**WEIGHTS, "content_range": "bytes 7-{end}/{size}"},
    "Content-Range of another file": {**WEIGHTS, "content_range": "bytes {start}-{end}/12345", "when": for_a_layer},
    "senseless Content-Range": {**WEIGHTS, "content_range": "pages 1-2", "times": 2},
    "ignored range": {**WEIGHTS, "ignore_range": True, "times": None},
    "ignored range and a cut": {**WEIGHTS, "ignore_range": True, "cut_after": 3_000_000, "when": for_a_layer},
    "an error page that claims to be fine": {**WEIGHTS, "status": 200},
    "expired URL": {**WEIGHTS, "expire": True},
    "expired URL for a layer": {**WEIGHTS, "expire": True, "when": for_a_layer},
    "redirect fails": {**WEIGHTS, "where": "resolve", "status": 502, "times": 2},
    "redirect is cut": {**WEIGHTS, "where": "resolve", "cut_after": 0},
    "HEAD fails": {**WEIGHTS, "where": "resolve", "method": "HEAD", "status": 503, "times": 2},
    "HEAD is told to wait": {**WEIGHTS, "where": "resolve", "method": "HEAD", "status": 429, "retry_after": "0"},
    "HEAD is cut": {**WEIGHTS, "where": "resolve", "method": "HEAD", "cut_after": 0},
    "model_info is told to wait": {**MODEL_INFO, "status": 429, "retry_after": "0", "times": 2},
    "model_info fails": {**MODEL_INFO, "status": 502, "times": 2},
    "model_info is cut": {**MODEL_INFO, "cut_after": 10, "times": 2},
    "model_info is short": {**MODEL_INFO, "short_body": 10, "times": 2},
    "model_info is no JSON": {**MODEL_INFO, "truncate": 10},
    "model_info is an error page": {**MODEL_INFO, "status": 200},
    "config fails": {**CONFIG, "status": 503},
    "config is cut": {**CONFIG, "cut_after": 5},
    "config is short": {**CONFIG, "short_body": 5},
    "config is truncated": {**CONFIG, "truncate": 5},
    "more than config": {**CONFIG, "extra": 1},
    "HEAD of config fails": {**CONFIG, "method": "HEAD", "status": 503},
    "HEAD of config is cut": {**CONFIG, "method": "HEAD", "cut_after": 0},
}


@pytest.mark.parametrize("fields", keep(PASSING.values(), *list(PASSING.values())[::2]), ids=PASSING)
def test_a_passing_fault_does_not_change_the_numbers(
    hub: HubServer, cache: Path, made: Path, fields: dict[str, Any]
) -> None:
    name = publish(hub, made)
    fault = hub.fail(**fields)
    report = analyze(name, 1)
    assert figures(report) == local(made, 1)
    assert fault.hits >= (fault.times or 1), "the fault was never met"
    check_clean(cache)
    hub.faults.clear()
    hub.clear_requests()
    assert figures(analyze(name, 1)) == figures(report)
    assert hub.body_bytes() == 0


@pytest.mark.parametrize("break_off", ["cut_after", "short_body", "truncate"])
def test_a_broken_download_goes_on_where_it_broke(hub: HubServer, cache: Path, made: Path, break_off: str) -> None:
    name = publish(hub, made)
    fault = hub.fail(**WEIGHTS, when=for_a_layer, **{break_off: LAYER_BYTES * 3 // 4})
    report = analyze(name, 1)
    assert fault.hits == 1
    assert figures(report) == local(made, 1)
    assert hub.body_bytes() < LAYER_BYTES * 1.3 + READ_AHEAD
    assert report.cost.bytes_fetched <= hub.body_bytes()


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7),
        (429, {"RateLimit": '"resolver";r=0;t=55', "RateLimit-Policy": '"fixed window";"resolver";q=3000;w=300'}, 55),
        (429, {"RateLimit": '"resolver";r=0;t=4', "Retry-After": "9"}, 9),
        (429, {"RateLimit": '"resolver";r=0;t=86400'}, 300),
        (429, {"RateLimit": "soon"}, 0.01),
        (503, {"RateLimit": '"resolver";r=2999;t=200'}, 0.01),
    ],
)
def test_the_hub_is_waited_for_as_long_as_it_says(
    hub: HubServer,
    cache: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: dict[str, str],
    seconds: float,
) -> None:
    waits: list[float] = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait()
            waits.append(timeout)
            return False

    monkeypatch.setattr("threading.Event", Impatient)
    hub.fail(**WEIGHTS, status=status, headers=headers)
    analyze(publish(hub, made))
    assert waits == [seconds]


# Faults that stay

STAYING: dict[str, dict[str, Any]] = {
    "500": {**WEIGHTS, "status": 500},
    "404": {**WEIGHTS, "where": "resolve", "status": 404},
    "416": {**WEIGHTS, "status": 416},
    "403": {**WEIGHTS, "status": 403},
    "401": {**WEIGHTS, "where": "resolve", "status": 401},
    "wrong Content-Range": {**WEIGHTS, "content_range": "bytes 7-{end}/{size}"},
    "cut": {**WEIGHTS, "cut_after": 0},
    "cut for a layer": {**WEIGHTS, "cut_after": 0, "when": for_a_layer},
    "500 for a layer": {**WEIGHTS, "status": 500, "when": for_a_layer},
    "empty answer": {**WEIGHTS, "truncate": 0},
    "more than was asked for": {**WEIGHTS, "extra": 1, "when": for_a_layer},
    "an error page that claims to be fine": {**WEIGHTS, "status": 200},
    "redirect without a target": {**WEIGHTS, "where": "resolve", "method": None, "status": 302},
    "redirect in circles": {**WEIGHTS, "where": "resolve", "status": 302, "headers": {"Location": "?again"}},
    "HEAD fails": {**WEIGHTS, "where": "resolve", "method": "HEAD", "status": 500},
    "HEAD says nothing": {**WEIGHTS, "where": "resolve", "method": "HEAD", "status": 204},
    "model_info fails": {**MODEL_INFO, "status": 500},
    "model_info is cut": {**MODEL_INFO, "cut_after": 10},
    "model_info is no JSON": {**MODEL_INFO, "truncate": 10},
    "model_info is an error page": {**MODEL_INFO, "status": 200},
    "config is cut": {**CONFIG, "cut_after": 5},
    "config is truncated": {**CONFIG, "truncate": 5},
    "config fails": {**CONFIG, "status": 500},
}


@pytest.mark.parametrize("fields", keep(STAYING.values(), *list(STAYING.values())[::2]), ids=STAYING)
def test_a_lasting_fault_ends_in_one_line(hub: HubServer, cache: Path, made: Path, fields: dict[str, Any]) -> None:
    name = publish(hub, made)
    fault = hub.fail(**fields, times=None)
    check_refused(name, layer=1)
    assert fault.hits
    check_clean(cache)
    hub.faults.clear()
    assert figures(analyze(name, 1)) == local(made, 1)


def test_what_has_no_end_is_not_read_to_it(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    fault = hub.fail(**WEIGHTS, extra=10**9, when=for_a_layer, times=None)
    with pytest.raises(ModelUnreadable, match="a wrong number of bytes"):
        analyze(name, 1)
    assert fault.hits == len(hub_module.RETRY_DELAYS) + 1
    assert hub.body_bytes() < fault.hits * 30_000_000  # what sockets hold, and no more


def test_a_big_file_is_not_taken_from_a_server_that_ignores_ranges(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "SMALL", 1000)
    name = publish(hub, made)
    hub.fail(**WEIGHTS, ignore_range=True, times=None)
    check_refused(name, name, "Range")
    check_clean(cache)
    hub.faults.clear()
    assert figures(analyze(name)) == local(made)


def test_a_lasting_fault_ends_a_process_with_one_line(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    hub.fail(**WEIGHTS, status=500, times=None)
    check_refusal(*quick_cli(name), name, "500")


@pytest.mark.long
def test_what_the_client_retries_itself_prints_nothing(hub: HubServer, cache: Path, made: Path) -> None:
    fault = hub.fail(**CONFIG | {"method": "HEAD", "status": 503, "times": 2})
    code, out, err = cli(publish(hub, made))
    assert fault.hits == 2
    assert (code, err) == (0, "")
    assert figures(out) == local(made)


# The cache


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("chunk", keep([hub_module.CHUNK, 40_000], hub_module.CHUNK))
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_ranges_are_fetched_again(
    hub: HubServer,
    cache: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    chunk: int,
) -> None:
    monkeypatch.setattr(hub_module, "CHUNK", chunk)
    name = publish(hub, made)
    first = analyze(name, 1)
    assert segments(cache)
    for path in segments(cache):
        damage(path)
    hub.clear_requests()
    assert figures(analyze(name, 1)) == figures(first)
    assert hub.body_bytes() > 0
    hub.clear_requests()
    assert figures(analyze(name, 1)) == figures(first)
    assert hub.body_bytes() == 0


def test_a_damaged_range_read_by_many_threads(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "CHUNK", 100_000)
    name, truth = publish(hub, made), (made / "model.safetensors").read_bytes()
    spans = [(low, low + 60_000) for low in range(0, 1_000_000, 20_000)]
    find_repository(name).prefetch({"model.safetensors": spans}, lambda *_: None)
    assert len(segments(cache)) == 11
    for _ in range(5):
        for path in segments(cache):
            flip(path)
        file = find_repository(name).open("model.safetensors")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(file.read, *zip(*spans, strict=True)))
        assert found == [truth[low:high] for low, high in spans]


def test_damaged_notes_are_not_believed(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    first = analyze(name, 1)
    notes = [*cache.rglob("*.json")]
    assert notes
    for content in ("", "[]", '{"size": "1", "etag": 3, "commit": 1, "files": 2}', "\0", '{"size": 10, '):
        for note in notes:
            note.write_text(content)
        assert figures(analyze(name, 1)) == figures(first)


def test_the_cache_keeps_to_its_limit(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZARUS_CACHE_LIMIT", "4MB")
    folders = [make(tmp_path / str(seed), seed) for seed in (11, 12, 13)]
    names = [publish(hub, folder) for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        report = analyze(name, 1)
        assert figures(report) == figures(analyze(folder, 1))
        assert cached_bytes(cache) <= max(4_000_000, report.cost.bytes_fetched)
    assert analyze(names[-1], 1).cost.bytes_fetched == 0, "the last model is to stay"
    assert analyze(names[0], 1).cost.bytes_fetched > 0, "the first model is to go"


def test_what_is_not_of_the_cache_stays(cache: Path) -> None:
    """Its folder may have been somebody's before."""
    names = ["ranges/photos/a.jpg", "ranges/photos/1-2.jpg", "ranges/photos/.part-1.jpg", "photos/.part-abcdefgh"]
    for name in names:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
        os.utime(cache / name, (0, 0))
    RangeCache(cache, 0).write("key", 0, b"bytes")
    RangeCache(cache, 0).trim()
    assert {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()} == set(names)


def test_a_job_larger_than_the_limit_ends_well(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZARUS_CACHE_LIMIT", "0")
    name = publish(hub, made)
    report = MoETypeService.analyze(name, layers="all")
    assert figures(report) == figures(MoETypeService.analyze(str(made), layers="all"))
    # each layer's neurons are also compared with one expert of the next, which was not kept
    assert report.cost.bytes_fetched == hub.body_bytes() <= 1.13 * (made / "model.safetensors").stat().st_size
    assert cached_bytes(cache) <= LAYER_BYTES * 1.26 + READ_AHEAD  # a layer stays, experts of its neighbours, no more


@pytest.mark.parametrize("limit", ["much", "-1GB", "20 parsecs", "1e9", "GB", "nan"])
def test_a_limit_that_is_no_size_is_an_invalid_request(
    hub: HubServer, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("LAZARUS_CACHE_LIMIT", limit)
    name = publish(hub, made)
    with pytest.raises(InvalidRequest, match="LAZARUS_CACHE_LIMIT"):
        analyze(name)
    err = io.StringIO()
    with redirect_stderr(err):
        code = run(arguments(name))
    check_refusal(code, "", err.getvalue(), "LAZARUS_CACHE_LIMIT", expected=2)


@pytest.mark.long
def test_two_processes_fill_the_cache_at_once(hub: HubServer, cache: Path, made: Path) -> None:
    name = publish(hub, made)
    hub.fail(**WEIGHTS, stall=0.2, times=4)
    processes = [
        start(COMMAND, arguments(name, "--layer", "1"), {"LAZARUS_CACHE_LIMIT": limit}) for limit in ("1GB", "0")
    ]
    for code, out, err in [finish(process) for process in processes]:
        assert (code, err) == (0, "")
        assert figures(out) == local(made, 1)
    check_clean(cache)
    assert figures(analyze(name, 1)) == local(made, 1)


@pytest.mark.parametrize("variable", keep(["LAZARUS_CACHE", "HF_HUB_CACHE"], "LAZARUS_CACHE"))
def test_a_cache_that_cannot_be_written(hub: HubServer, cache: Path, made: Path, tmp_path: Path, variable: str) -> None:
    (tmp_path / "file").touch()
    check_refusal(*cli(publish(hub, made), **{variable: str(tmp_path / "file" / "below")}), "cache")


def test_a_cache_of_a_user_that_does_not_exist(hub: HubServer, cache: Path, made: Path) -> None:
    check_refusal(*cli(publish(hub, made), LAZARUS_CACHE="~nobody-of-that-name/cache"), "LAZARUS_CACHE")


# The cache against a plain model: a byte string, and which of its bytes were written

SIZE = 60
RANGES = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=8)
SPANS = RANGES.map(lambda ranges: [(min(pair), max(pair)) for pair in ranges])
WRITES = SPANS.map(lambda ranges: [(start, stop) for start, stop in ranges if start < stop])
DATA = bytes(range(100, 100 + SIZE))


def places(ranges: list[tuple[int, int]]) -> set[int]:
    return {place for start, stop in ranges for place in range(start, stop)}


def as_ranges(wanted: set[int]) -> list[tuple[int, int]]:
    """The maximal runs of a set of numbers."""
    starts = sorted(place for place in wanted if place - 1 not in wanted)
    stops = sorted(place + 1 for place in wanted if place + 1 not in wanted)
    return list(zip(starts, stops, strict=True))


@given(RANGES, st.integers(0, 10))
def test_merge_covers_the_ranges_and_gaps_up_to_its_limit(ranges: list[tuple[int, int]], gap: int) -> None:
    covered = places(ranges)
    holes = as_ranges(set(range(min(covered, default=0), max(covered, default=0))) - covered)
    bridged = places([(low, high) for low, high in holes if high - low <= gap])
    assert merge(ranges, gap) == as_ranges(covered | bridged)


@settings(max_examples=examples(60), deadline=None)
@given(WRITES, WRITES, SPANS, st.booleans())
def test_the_cache_has_what_was_written_and_misses_the_rest(
    writes: list[tuple[int, int]], others: list[tuple[int, int]], wanted: list[tuple[int, int]], reopen: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = RangeCache(Path(folder), 10**6)
        for start, stop in writes:
            cache.write("key", start, DATA[start:stop])
        for start, stop in others:
            cache.write("other", start, bytes(stop - start))
        if reopen:
            cache = RangeCache(Path(folder), 10**6)
        here = places(writes)
        assert cache.missing("key", wanted) == as_ranges(places(wanted) - here)
        for start, stop in wanted:
            expected = DATA[start:stop] if places([(start, stop)]) <= here else None
            assert cache.read("key", start, stop) == expected


@settings(max_examples=examples(60), deadline=None)
@given(WRITES, st.sets(st.integers(0, 7)), SPANS, st.integers(0, 200))
def test_the_cache_never_returns_wrong_bytes(
    writes: list[tuple[int, int]], damaged: set[int], wanted: list[tuple[int, int]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = RangeCache(Path(folder), limit)
        for start, stop in writes:
            writer.write("key", start, DATA[start:stop])
        for place, path in enumerate(sorted(Path(folder).rglob("*-*-*"))):
            if place in damaged:
                flip(path)
        reader = RangeCache(Path(folder), limit)
        reader.trim()
        assert cached_bytes(Path(folder)) <= limit
        for start, stop in wanted:
            data = None
            for _ in range(len(writes) + 1):  # each round finds one damaged range at least
                for low, high in reader.missing("key", [(start, stop)]):
                    reader.write("key", low, DATA[low:high])
                data = data if data is not None else reader.read("key", start, stop)
            assert data == DATA[start:stop]


def test_a_model_on_the_hub_is_compressed(hub: HubServer, cache: Path, made: Path, tmp_path: Path) -> None:
    name = publish(hub, made)
    ranks = {"gate": 2, "up": 3, "down": 4}
    report = MoECompressionService.compress(name, tmp_path / "remote", ranks=ranks)
    MoECompressionService.compress(str(made), tmp_path / "local", ranks=ranks)
    assert report.revision is not None
    config = json.loads((tmp_path / "remote/config.json").read_text())
    assert config["overlay_config"]["source"] == name
    assert config["overlay_config"]["revision"] == report.revision
    for file in sorted((tmp_path / "local").glob("*.safetensors")):
        assert (tmp_path / "remote" / file.name).read_bytes() == file.read_bytes()
    assert report.cost.bytes_fetched == hub.body_bytes() <= (made / "model.safetensors").stat().st_size
