"""Break the network while commands run: `python tests/hostile/faults/network.py --runs 2000 --seed 1`.

Each run draws a command, a state of the caches, who may read the model, and a few faults of Hub, CDN, name service or
disk, all from the seed and its number alone; `--replay NUMBER` shows one run again. It must end with the numbers of a
local run, or with one line and exit code 3, and with the numbers where all faults pass within the retries; the same
command without the faults must then succeed. Nowhere may the token be seen.

`--pairs` lets two processes fill the same cache at once, `--disks` fills real disks up (a small tmpfs; needs root).
"""

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save_file

TESTS = Path(__file__).parents[2]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from figures import report  # noqa: E402  found by the line above
from hub_server import HubServer, Request  # noqa: E402  found by the line above
from processor_time import HANGS  # noqa: E402  found by the line above

LAYERS, EXPERTS, WIDE, HIDDEN = 3, 4, 96, 128
TOKEN, WRONG_TOKEN = "hf_theRightSecretOfThisRun", "hf_aSecretThatOpensNothing"
UNREADABLE = 3
RANKS = ("--gate-rank", "2", "--up-rank", "3", "--down-rank", "4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "layout": ("moe-layout",),
    "analyze": ("moe-type-analyze", "--layer", "1"),
    "analyze all": ("moe-type-analyze", "--layers", "all"),
    "quick": ("moe-type-analyze", "--quick"),
    "compute": ("moe-overlay-compute", "--layers", "0,2", "--target-ratio", "2"),
    "compress": ("moe-overlay-compress", *RANKS),
    "survey": ("moe-type-survey", "--jobs", "2"),
}
UNEQUAL = ("model", "revision", "cost", "folder", "seconds")  # what tells a Hub's model from a local one

RETRIES = 5  # which docs/reliability.md promises
TRANSIENT = (408, 429, 500, 502, 503, 504)
STATUSES = (200, 204, 401, 403, 404, 408, 409, 410, 416, 429, 500, 501, 502, 503, 504, 520)
RETRY_AFTER = (None, None, "0", "1", "3600", "-1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")
CONTENT_RANGES = ("bytes 7-{end}/{size}", "bytes {start}-{end}/12345", "pages 1-2", "", "bytes */{size}")

OK = ("right", "refused")


def write_model(folder: Path, seed: int, sharded: bool) -> Path:
    """A Mixtral of three layers in float16, in one file or with a file per layer."""
    random = np.random.default_rng(seed)
    shards: list[dict[str, Any]] = []
    for layer, prefix in ((layer, f"model.layers.{layer}") for layer in range(LAYERS)):
        shapes = {"w1": (WIDE, HIDDEN), "w3": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE)}
        base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
        shard = {f"{prefix}.block_sparse_moe.gate.weight": random.standard_normal((EXPERTS, HIDDEN))}
        for expert, (name, matrix) in itertools.product(range(EXPERTS), base.items()):
            noise = random.standard_normal(matrix.shape) * (0.3 * layer + 0.1)
            shard[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix + noise
        shards.append({name: values.astype(np.float16) for name, values in shard.items()})
    folder.mkdir(parents=True)
    config = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_hidden_layers": LAYERS, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        save_file({name: values for shard in shards for name, values in shard.items()}, folder / "model.safetensors")
        return folder
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{LAYERS:05}.safetensors"
        save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def hasten() -> None:
    """Shorten every wait, ours and those of the Hub's client; in this process, for good."""
    from huggingface_hub.utils import _http

    from chuk_lazarus.introspection.moe.weights.repositories import hub

    class Hasty:
        """The module `time`, but nobody sleeps."""

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        @staticmethod
        def sleep(seconds: float) -> None:
            return

    _http.time = Hasty()  # type: ignore[attr-defined]
    hub.RETRY_DELAYS, hub.LONGEST_WAIT, hub.TIMEOUT = (0.001,) * 5, 0.01, 0.4
    hub.READ_AHEAD = 20_000


def hasty_worker() -> None:
    """What a survey starts for each model, without the waits."""
    hasten()
    from chuk_lazarus.introspection.moe.provenance.survey import work

    work()


# One run


@dataclass
class Outcome:
    """How a run ended: one of OK, or what is wrong with it."""

    kind: str
    detail: str = ""
    met: int = 0  # requests that a fault was given to


@dataclass
class Run:
    """What is tried: drawn from a seed and a number, and nothing else."""

    command: str
    sharded: bool
    access: str  # public, private, gated, refused
    cache: str  # cold, warm, damaged
    chunk: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    new_commit: int | None = None  # after how many requests main moves on
    largest_file: int | None = None  # bytes that any file may have, as on a disk that is full
    names: str = "quick"  # how names are looked up: quick, slow, failing

    def passes(self) -> bool:
        """Whether all that is wrong passes within the retries, whatever request it meets."""
        times = [fault["times"] for fault in self.faults] + [2 * (self.names == "failing")]
        stays = self.access == "refused" or self.largest_file is not None or None in times
        return not stays and sum(times) <= RETRIES and all(map(is_transient, self.faults))


def draw(random: Random, command: str | None = None) -> Run:
    """A run; the more runs, the more of them are unlike any other."""
    weights = {name: 1 if name == "survey" else 6 for name in COMMANDS}
    run = Run(
        command=command or random.choices(list(weights), list(weights.values()))[0],
        sharded=random.random() < 0.5,
        access=random.choices(("public", "private", "gated", "refused"), (6, 6, 2, 1))[0],
        cache=random.choices(("cold", "warm", "damaged"), (6, 2, 2))[0],
        chunk=random.choice((30_000, 200_000, 16 * 2**20)),
    )
    run.faults = [draw_fault(random) for _ in range(random.choice((0, 1, 1, 2, 2, 3, 4)))]
    if random.random() < 0.1:
        run.new_commit = random.randrange(12)
    if random.random() < 0.1:
        run.largest_file = random.choice((0, 50, 2000, 20_000, 100_000, 300_000))
    run.names = random.choices(("quick", "slow", "failing"), (8, 1, 1))[0]
    return run


def draw_fault(random: Random) -> dict[str, Any]:
    """The fields of a `Fault`; a "stranger" among its headers stands for another server."""
    place = random.choice(("body", "body", "body", "redirect", "head", "api", "config", "index"))
    fields: dict[str, Any] = {
        "body": {"path": ".safetensors"},
        "redirect": {"path": ".safetensors", "where": "resolve"},
        "head": {"path": ".safetensors", "where": "resolve", "method": "HEAD"},
        "api": {"where": "api"},
        "config": {"path": "/config.json", "where": "resolve", "method": random.choice(("GET", "HEAD"))},
        "index": {"path": "index.json", "where": "resolve", "method": random.choice(("GET", "HEAD"))},
    }[place]
    fields |= {"times": random.choice((1, 1, 2, 3, 5, None)), "skip": random.choice((0, 0, 0, 1, 2, 4))}
    kind = random.choice(
        ("status", "status", "cut", "short", "truncate", "extra", "range", "whole", "expire", "stall", "stranger")
    )
    size = random.choice((0, 1, 10, 1000, 50_000, 200_000))
    if kind == "status":
        status = random.choice(STATUSES)
        return fields | {"status": status, "retry_after": random.choice(RETRY_AFTER)}
    if kind == "stall":
        slow = random.random() < 0.7 or place not in ("body", "api")
        return fields | ({"stall": 0.03} if slow else {"stall": 1.5, "times": random.choice((1, 2))})
    if kind == "stranger":
        target = random.choice(("localhost", "127.0.0.1", "itself"))
        return fields | {"status": random.choice((301, 302, 303, 307, 308)), "headers": {"Location": target}}
    broken = {
        "cut": {"cut_after": size},
        "short": {"short_body": size},
        "truncate": {"truncate": size},
        "extra": {"extra": size},
        "range": {"content_range": random.choice(CONTENT_RANGES)},
        "whole": {"ignore_range": True},
        "expire": {"expire": True},
    }
    return fields | broken[kind]


def is_transient(fields: Mapping[str, Any]) -> bool:
    """Whether a fault is one that may pass; a wrong length of JSON that its HEAD states, too, is believed."""
    believed = "truncate" in fields and fields.get("method") == "HEAD"
    return fields.get("status", TRANSIENT[0]) in TRANSIENT and not believed


class Bench:
    """Where runs take place: two models, here and on a loopback Hub, and what commands say of them locally."""

    def __init__(self, hub: HubServer, root: Path) -> None:
        self.hub, self.root = hub, root
        self.folders = {
            (sharded, new): write_model(
                root / f"{'sharded' if sharded else 'single'}-{new}", 10 * sharded + new, sharded
            )
            for sharded in (False, True)
            for new in (False, True)
        }
        self._truth: dict[tuple[str, bool, bool], tuple[Any, dict[str, bytes]]] = {}
        self._number = itertools.count()
        hasten()

    def truth(self, command: str, sharded: bool, new: bool) -> tuple[Any, dict[str, bytes]]:
        """What a local run says, and what it writes."""
        key = command, sharded, new
        if key not in self._truth:
            place = self.root / "local"
            place.mkdir()
            with patch.dict(os.environ, {"LAZARUS_CACHE": str(place / "cache")}):
                code, out, err = self.call(command, str(self.folders[sharded, new]), place)
            if code or err:
                raise RuntimeError(f"{command} on a local model: {code} {err}")
            self._truth[key] = plain(json.loads(out)), written(place / "overlay")
            shutil.rmtree(place)
        return self._truth[key]

    def call(self, command: str, model: str, place: Path, *more: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command in this process."""
        from chuk_lazarus.cli.app import run

        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = run([*words(command, model, place), *more])
        return code, out.getvalue(), err.getvalue()

    def run(self, run: Run, trace: Callable[[str], None] = lambda line: None) -> Outcome:
        """Do it, and judge what came of it."""
        number = next(self._number)
        name, place = f"faults/model-{number}", self.root / f"run-{number}"
        place.mkdir()
        try:
            return self._run(run, name, place, trace)
        finally:
            self.hub.faults.clear()
            self.hub.clear_requests()
            shutil.rmtree(place)

    def _run(self, run: Run, name: str, place: Path, trace: Callable[[str], None]) -> Outcome:
        hub = self.hub
        secret = {"public": {}, "private": {"token": TOKEN}, "gated": {"token": TOKEN, "gated": True}}
        how: dict[str, Any] = secret.get(run.access, {"token": TOKEN})
        commits = {hub.add(name, self.folders[run.sharded, False], **how): False}
        environment = {
            "LAZARUS_CACHE": str(place / "cache"),
            "HF_TOKEN": WRONG_TOKEN if run.access == "refused" else TOKEN,
        }
        with patch.dict(os.environ, environment), patched("hub.CHUNK", run.chunk):
            if run.cache != "cold":
                self.call("analyze", name, place)
            if run.cache == "damaged":
                random = Random(f"{run}")
                damage(place / "cache", random, ("keep", "flip", "cut", "empty", "longer", "delete", "garbage"))
                files = downloads(name) / random.choice(("blobs", "snapshots"))  # the latter are links to the former
                damage(files, random, ("keep", "cut", "empty", "longer", "delete", "garbage"))  # JSON would be believed
            hub.clear_requests()
            for fields in run.faults:
                hub.fail(**self._placed(fields))
            if run.new_commit is not None:
                new = "c" * 40
                commits[new] = True

                def move_on(request: Request) -> bool:
                    hub.add(name, self.folders[run.sharded, True], commit=new, **how)
                    return False

                hub.fail(when=move_on, method=None, where="resolve", skip=0)
                for fault in hub.faults[-1:]:
                    fault.when = after(run.new_commit, move_on)
            with file_limit(run.largest_file), lookups(run.names):
                code, out, err = self.call(run.command, name, place)
            trace(f"{code}\n{out[:2000]}\n{err}")
            for one in hub.requests:
                trace(f"{one.server} {one.method} {one.path[-40:]} {one.range}: {one.status}, {one.bytes_sent} bytes")
            verdict = self._judge(run, commits, code, out, err, place)
            verdict.met = sum(fault.hits for fault in hub.faults)
            if verdict.kind not in OK:
                return verdict
            if run.passes() and verdict.kind != "right":
                return Outcome("gave up", verdict.detail)
            if problem := self._look_around(name, place, out + err, run.cache == "damaged"):
                return problem
            hub.faults.clear()
            again = ("--force",) if run.command == "compress" else ()
            code, out, err = self.call(run.command, name, place, *again)
            after_all = self._judge(run, commits, code, out, err, place)
            wanted = "refused" if run.access == "refused" else "right"
            if after_all.kind != wanted:
                return Outcome("not recovered", f"{code} {err} {after_all.detail}")
            if [*place.glob("*.partial")]:
                return Outcome("left over", str([*place.iterdir()]))
        return self._look_around(name, place, out + err, run.cache == "damaged") or verdict

    def _placed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with the address of the stranger that they send us to."""
        if location := fields.get("headers", {}).get("Location"):
            stranger = self.hub.cdn_url.replace("localhost", location) + "/stranger"
            return {**fields, "headers": {"Location": "?again" if location == "itself" else stranger}}
        return dict(fields)

    def _judge(self, run: Run, commits: Mapping[str, bool], code: int, out: str, err: str, place: Path) -> Outcome:
        if run.command == "survey":
            return self._judge_survey(run, commits, code, out, err)
        if code == 0:
            if err:
                return Outcome("noise", err)
            try:
                found = json.loads(out, parse_constant=refuse_constant)
            except ValueError as error:
                return Outcome("no JSON", f"{error}: {out[:300]}")
            figures, files = self.truth(run.command, run.sharded, commits[found["revision"]])
            if plain(found) != figures:
                return Outcome("wrong numbers", out)
            if run.command == "compress" and written(place / "overlay") != files:
                return Outcome("wrong files", str(written(place / "overlay").keys()))
            return Outcome("right")
        if out:
            return Outcome("output of a failure", out)
        return check_line(code, err, run)

    def _judge_survey(self, run: Run, commits: Mapping[str, bool], code: int, out: str, err: str) -> Outcome:
        if err or code not in (0, 1):
            return Outcome("noise", f"{code} {err}")
        (row,) = json.loads(out, parse_constant=refuse_constant)["rows"]
        if bool(row["error"]) != bool(code):
            return Outcome("wrong exit code", out)
        if code == 0:
            (wanted,) = self.truth("survey", run.sharded, commits[row["answer"]["revision"]])[0]["rows"]
            same = plain(row)["answer"] == wanted["answer"]
            return Outcome("right") if same else Outcome("wrong numbers", out)
        return check_line(row["error"]["code"], json.dumps({"error": row["error"]}) + "\n", run)

    def _look_around(self, name: str, place: Path, said: str, damaged: bool) -> Outcome | None:
        """Whether a token went where it must not, or anything half-written lies about."""
        if self.hub.leaks:
            return Outcome("token leaked", str(self.hub.leaks[0]))
        if "hf_" in said:
            return Outcome("token said", said)
        for path in (path for folder in (place, downloads(name)) for path in folder.rglob("*") if path.is_file()):
            if has_token(path):
                return Outcome("token kept", str(path))
            if path.name.startswith((".part-", ".lazarus-")) or path.suffix in (".tmp", ".incomplete"):
                return Outcome("left over", str(path))
            is_range = path.parent.parent.name == "ranges" and not damaged
            if is_range and not path.name.endswith(f"-{zlib.crc32(path.read_bytes()):08x}"):
                return Outcome("broken cache", str(path))
        return None


def words(command: str, model: str, place: Path) -> list[str]:
    """The command line."""
    name, *options = COMMANDS[command]
    where = ["-O", str(place / "overlay")] if command == "compress" else []
    return [
        "introspect",
        "moe-expert",
        name,
        *([] if command == "survey" else ["-m"]),
        model,
        *options,
        *where,
        "--json",
    ]


def check_line(code: int, err: str, run: Run) -> Outcome:
    """One line of JSON that says what is the matter, and no address or secret."""
    lines = err.splitlines()
    if len(lines) != 1 or not lines[0].isprintable():
        return Outcome("not one line", err)
    error = json.loads(lines[0])["error"]
    text = f"{error['message']} {error['hint']}"
    if any(word in text for word in ("://", "127.0.0.1", "localhost", "Signature", "hf_", "Traceback")):
        return Outcome("says too much", text)
    full = (
        run.largest_file is not None
        and run.command == "compress"
        and ("can't write" in text or "bytes, but only" in text)
    )
    if error["code"] != code or code != (2 if full and code == 2 else UNREADABLE):
        return Outcome("wrong exit code", f"{code} {text}")
    return Outcome("refused", text)


def plain(value: Any) -> Any:
    """A result without what tells a Hub's model from a local one."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in UNEQUAL}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def written(folder: Path) -> dict[str, bytes]:
    """The weights in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def has_token(path: Path) -> bool:
    """Whether a file has one of our secrets in it."""
    data = path.read_bytes()
    return TOKEN.encode() in data or WRONG_TOKEN.encode() in data


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def after(count: int, act: Callable[[Request], bool]) -> Callable[[Request], bool]:
    """Act at the request of that number, once."""
    seen = itertools.count()
    return lambda request: next(seen) == count and act(request)


def downloads(name: str) -> Path:
    """Where the Hub's client keeps a model."""
    return Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"


def damage(cache: Path, random: Random, ways: Sequence[str]) -> None:
    """Change, cut, lengthen or delete some of the cache's files."""
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        what = random.choice(ways)
        data = bytearray(path.read_bytes())
        if what == "flip" and data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif what == "cut":
            data = data[: len(data) // 2]
        elif what == "empty":
            data.clear()
        elif what == "longer":
            data += b"more"
        elif what == "garbage":
            data[:] = random.randbytes(len(data))
        path.unlink()
        if what != "delete":
            path.write_bytes(data)


@contextmanager
def patched(what: str, value: Any) -> Iterator[None]:
    """A constant of a module of the weights with another value."""
    with patch(f"chuk_lazarus.introspection.moe.weights.repositories.{what}", value):
        yield


@contextmanager
def lookups(how: str) -> Iterator[None]:
    """A name service that takes longer than a server may, or that fails twice; no connection is open at first."""
    from huggingface_hub.utils import close_session

    look_up, calls = socket.getaddrinfo, itertools.count()

    def suffer(*arguments: Any, **options: Any) -> Any:
        if how == "slow":
            time.sleep(0.5)
        elif next(calls) < 2:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(*arguments, **options)

    if how == "quick":
        yield
        return
    close_session()
    with patch("socket.getaddrinfo", suffer):
        yield


@contextmanager
def file_limit(size: int | None) -> Iterator[None]:
    """No file may become larger, and writing ends as on a full disk."""
    if size is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# Processes of their own


def start(words: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    """A command in a process of its own, without the waits."""
    code = "from hostile.faults.network import hasten; hasten(); from chuk_lazarus.cli import main; main()"
    own = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *words], stdout=pipe, stderr=pipe, text=True, env=own
    )


def run_pair(bench: Bench, random: Random, number: int) -> Outcome:
    """Two processes that fill the same cache at once, while the network breaks and one of them trims all the time."""
    name, place = f"faults/pair-{number}", bench.root / f"pair-{number}"
    place.mkdir()
    bench.hub.add(name, bench.folders[False, False])
    commands = [random.choice(("analyze", "analyze all", "quick", "compute")) for _ in range(2)]
    for _ in range(random.randrange(3)):
        fields = draw_fault(random)
        if fields["times"] and not fields.get("status"):  # what passes
            bench.hub.fail(**fields)
    try:
        processes = [
            start(words(command, name, place), LAZARUS_CACHE=str(place / "cache"), LAZARUS_CACHE_LIMIT=limit)
            for command, limit in zip(commands, random.choice((("0", "1GB"), ("0", "0"), ("1GB", "1GB"))), strict=True)
        ]
        for command, process in zip(commands, processes, strict=True):
            out, err = process.communicate(timeout=HANGS)
            run = Run(command, False, "public", "cold", 0)
            verdict = bench._judge(
                run, {json.loads(out)["revision"]: False} if out else {}, process.returncode, out, err, place
            )
            if verdict.kind not in OK:
                return Outcome(verdict.kind, f"{command}: {verdict.detail}")
        return bench._look_around(name, place, "", False) or verdict
    finally:
        bench.hub.faults.clear()
        bench.hub.clear_requests()
        shutil.rmtree(place)


def run_full_disk(bench: Bench, random: Random, number: int) -> Outcome:
    """A disk that is really full: a tmpfs of a few pages for all caches and results."""
    name, place = f"faults/disk-{number}", bench.root / f"disk-{number}"
    place.mkdir()
    bench.hub.add(name, bench.folders[False, False])
    command = random.choice([command for command in COMMANDS if command != "survey"])
    size = random.choice((8192, 16_384, 65_536, 131_072, 500_000, 1_500_000))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        environment = {"LAZARUS_CACHE": str(place / "cache"), "HF_HOME": str(place / "hf")}
        process = start(words(command, name, place), **environment)
        out, err = process.communicate(timeout=HANGS)
        run = Run(command, False, "public", "cold", 0, largest_file=size)
        revision = json.loads(out)["revision"] if out else ""
        verdict = bench._judge(run, {revision: False}, process.returncode, out, err, place)
        if verdict.kind not in OK:
            return Outcome(verdict.kind, f"{command} on {size} bytes: {verdict.detail}")
        return bench._look_around(name, place, out + err, False) or verdict
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
        bench.hub.clear_requests()


# By hand


@contextmanager
def bench() -> Iterator[Bench]:
    """A bench with a Hub and caches of its own."""
    with tempfile.TemporaryDirectory(prefix="lazarus-faults-") as place, HubServer() as hub:
        root = Path(os.path.realpath(place))
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "hf"),
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_VERBOSITY": "critical",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "LAZARUS_CACHE": str(root / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TESTS),
        }
        with hasty_surveys():
            yield Bench(hub, root)


@contextmanager
def hasty_surveys() -> Iterator[None]:
    """Surveys whose processes do not wait either."""
    from chuk_lazarus.introspection.moe.provenance import survey

    start = "from hostile.faults.network import hasty_worker; hasty_worker()"
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); {start}"
    with patch.object(survey, "WORKER", (sys.executable, "-P", "-c", code)):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=0, help="how many sequences of faults")
    parser.add_argument("--pairs", type=int, default=0, help="how many pairs of processes")
    parser.add_argument("--disks", type=int, default=0, help="how many disks to fill")
    parser.add_argument("--seed", type=int, default=0, help="what all is drawn by")
    parser.add_argument("--command", choices=COMMANDS, help="this command only")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="show one run")
    parser.add_argument("--results", type=Path, help="a JSON file to add the figures to")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: Counter[str] = Counter()
    failed: list[str] = []
    slowest, met, started = (0.0, ""), [0, 0], time.monotonic()

    def note(kind: str, name: str, outcome: Outcome, seconds: float) -> None:
        nonlocal slowest
        met[0], met[1] = met[0] + bool(outcome.met), met[1] + outcome.met
        counts[kind][outcome.kind] += 1
        slowest = max(slowest, (seconds, name))
        if outcome.kind == "refused":
            refusals[" ".join(word for word in outcome.detail.split() if "/" not in word)] += 1
        if outcome.kind not in OK:
            failed.append(f"{name}: {outcome.kind}")
            print(f"{name}: {outcome.kind}: {outcome.detail[-1500:]}", file=sys.stderr, flush=True)

    with bench() as place:
        numbers = range(arguments.runs) if arguments.replay is None else [arguments.replay]
        for number in numbers:
            run = draw(Random(f"{arguments.seed}/{number}"), arguments.command)
            began = time.monotonic()
            outcome = place.run(run, *([print] if arguments.replay is not None else []))
            note(run.command, f"run {number} ({run.command})", outcome, time.monotonic() - began)
            if arguments.replay is not None:
                print(run, outcome, sep="\n")
        for kind, count, act in (
            ("two processes", arguments.pairs, run_pair),
            ("full disk", arguments.disks, run_full_disk),
        ):
            for number in range(count):
                began = time.monotonic()
                outcome = act(place, Random(f"{arguments.seed}/{kind}/{number}"), number)
                note(kind, f"{kind} {number}", outcome, time.monotonic() - began)
        failed += [f"token in {path}" for path in place.root.rglob("*") if path.is_file() and has_token(path)]
    given = ((name, getattr(arguments, name)) for name in ("runs", "pairs", "disks", "seed"))
    asked = [f"--{name} {count}" for name, count in given if count]
    figures = {
        "command": " ".join(["python tests/hostile/faults/network.py", *asked]),
        "python": platform.python_version(),
        "runs": sum(sum(found.values()) for found in counts.values()),
        "outcomes": {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())},
        "runs that met a fault": met[0],
        "faults met": met[1],
        "refusals": dict(refusals.most_common()),
        "failed": failed,
        "slowest": {"seconds": round(slowest[0], 1), "run": slowest[1]},
        "seconds": round(time.monotonic() - started),
    }
    return report(figures, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
