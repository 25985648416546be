"""Stop commands at random moments: `python tests/hostile/faults/kills.py --kills 240 --seed 1`.

Each time a command is started, sent SIGINT, SIGTERM or SIGKILL after a random part of the time that it takes, and then
run again. The moment, command and signal come from the seed. What has its final name must be whole at any time, the
second run must end with the results of an undisturbed one, and nothing temporary may be left; what a SIGKILL leaves in
a cache or beside a result goes with the first run a day later.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from hub_server import HubServer  # noqa: E402  found by the line above
from processor_time import HANGS  # noqa: E402  found by the line above

PROGRAM = [sys.executable, "-c", "from chuk_lazarus.cli import main; main()", "introspect", "moe-expert"]
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
INTERRUPTED, PYTHON_INTERRUPTED, PYTHON_TERMINATED = 130, -signal.SIGINT, -signal.SIGTERM
SOON = 1.0  # seconds in which a command that is interrupted ends
DAY = 24 * 3600
LEFT_FOR_A_DAY = (".part-", ".lazarus-")  # names of temporary files that a later run removes
UNEQUAL = ("model", "revision", "cost", "folder", "seconds", "overlay")

# {model}, {hub}, {overlay} and {place} are filled in; what a command writes has names of its own in {place}
COMMANDS: dict[str, str] = {
    "analyze": "moe-type-analyze -m {model} --layers all -o {place}/results.json --json",
    "analyze, drawn": "moe-type-analyze -m {model} --html {place}/page.html --plot {place}/figure.svg --json",
    "analyze, from the Hub": "moe-type-analyze -m {hub} --layers all -o {place}/results.json --json",
    "survey": "moe-type-survey {model} demo:native demo:upcycled --jobs 2 -o {place}/rows.jsonl --json",
    "compute": "moe-overlay-compute -m {model} --layers all --target-ratio 2 -o {place}/results.json --json",
    "compress": "moe-overlay-compress -m {model} -O {place}/written --target-ratio 2 --json",
    "compress, in codes": "moe-overlay-compress -m {model} -O {place}/written --bits 3 --json",
    "compress, for mlx-lm": "moe-overlay-compress -m {model} -O {place}/written --bits 4 --format mlx --json",
    "export": "moe-overlay-export {overlay} -O {place}/written --json",
}


def write_model(folder: Path, layers: int, experts: int = 8, inner: int = 256, hidden: int = 384) -> Path:
    """A Mixtral whose layers take some hundredths of a second each."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner))):
                tensors[f"{prefix}.experts.{expert}.{name}.weight"] = rng.standard_normal(shape).astype(np.float16)
        tensors[f"{prefix}.gate.weight"] = rng.standard_normal((experts, hidden)).astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mixtral", "num_hidden_layers": layers, "num_local_experts": experts, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Kill:
    """What came of a command that was stopped, and of the next run: kind is "right", or what is wrong.

    `stopped` says how the first run ended, `waited` how many seconds after the signal.
    """

    kind: str
    detail: str = ""
    stopped: str = ""
    waited: float = 0.0
    left_for_a_day: int = 0


class Bench:
    """The models, and what undisturbed runs of the commands give."""

    def __init__(self, hub: HubServer, root: Path, layers: int, repeats: int) -> None:
        self.hub, self.root, self.repeats = hub, root, repeats
        self.model, self.overlay = write_model(root / "model", layers), root / "overlay"
        self.hub.add("faults/killed", self.model)
        self.hub.fail(path=".safetensors", stall=0.2, times=None)  # so that some are stopped while they download
        self._truth: dict[str, tuple[dict[str, Any], float]] = {}

    def truth(self, name: str) -> tuple[dict[str, Any], float]:
        """What an undisturbed run prints and writes, and how many seconds the fastest takes."""
        if name not in self._truth:
            if name == "export" and not self.overlay.exists():
                self._succeed("compress", self.root / "first")
                (self.root / "first/written").rename(self.overlay)
            found, seconds = [], []
            for number in range(self.repeats):
                place = self.root / f"undisturbed-{number}"
                began = time.monotonic()
                found.append(self._succeed(name, place))
                seconds.append(time.monotonic() - began)
                shutil.rmtree(place)
            if any(one != found[0] for one in found):
                raise RuntimeError(f"undisturbed runs of {name} differ")
            self._truth[name] = found[0], min(seconds)
        return self._truth[name]

    def _succeed(self, name: str, place: Path) -> dict[str, Any]:
        place.mkdir()
        process = self.start(name, place)
        out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name}: {process.returncode} {err}")
        return {"out": plain(json.loads(out)), **results(place)}

    def start(self, name: str, place: Path) -> "subprocess.Popen[str]":
        """The command, in a session of its own, with the caches in `place`."""
        filled = COMMANDS[name].format(model=self.model, hub="faults/killed", overlay=self.overlay, place=place)
        environment = {"LAZARUS_CACHE": str(place / "cache"), "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*PROGRAM, *filled.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )

    def run(self, name: str, number: str, share: float, place: Path) -> Kill:
        """Stop a command after a share of its time, and run it again."""
        place.mkdir()
        try:
            return self._run(name, number, share, place)
        finally:
            shutil.rmtree(place)

    def _run(self, name: str, number: str, share: float, place: Path) -> Kill:
        truth, seconds = self.truth(name)
        process = self.start(name, place)
        time.sleep(share * seconds)
        sent = time.monotonic()
        with suppress(ProcessLookupError):
            process.send_signal(SIGNALS[number])
        out, err = process.communicate(timeout=HANGS)
        waited, code = time.monotonic() - sent, process.returncode
        kill = Kill("right", "", how_it_ended(code), waited)

        def wrong(kind: str, detail: object = "") -> Kill:
            kill.kind, kill.detail = kind, str(detail)
            return kill

        if code == INTERRUPTED and (out or err.count("\n") != 1 or json.loads(err)["error"]["code"] != INTERRUPTED):
            return wrong("not one line", f"{out}{err}")
        allowed = {0, INTERRUPTED, -SIGNALS[number]} if number != "SIGKILL" else {0, -signal.SIGKILL}
        if code not in allowed:
            return wrong("wrong exit code", f"{code} {err}")
        if code in (PYTHON_INTERRUPTED, PYTHON_TERMINATED) and "chuk_lazarus/" in err:
            return wrong("not caught", err)
        if code == 0 and err:
            return wrong("not silent", err)
        if problem := wait_for_children(process.pid):
            return wrong("processes left", problem)
        for what, content in results(place).items():
            if content != truth.get(what) and not (what == "rows.jsonl" and is_beginning(content, truth[what])):
                return wrong("half-written", f"{what}: {str(content)[:300]}")
        if code == INTERRUPTED and (left := temporary(place / "cache")):
            return wrong("left over by an interruption", left)
        if "written" in truth and (place / "written").exists():
            shutil.rmtree(place / "written")  # it was done, and says so when it is asked for again
        again = self.start(name, place)
        out, err = again.communicate(timeout=HANGS)
        if again.returncode or err:
            return wrong("not taken up", f"{again.returncode} {err}")
        found = {"out": plain(json.loads(out)), **results(place)}
        if found != truth:
            return wrong("another result", [key for key in truth if found.get(key) != truth[key]])
        if problem := broken_cache(place / "cache"):
            return wrong("broken cache", problem)
        left = [*temporary(place), *place.glob("cache/sweeps/*")]
        kill.left_for_a_day = len(left)
        if [path for path in left if not path.name.startswith(LEFT_FOR_A_DAY) or number != "SIGKILL"]:
            return wrong("left over", left)
        return kill


def how_it_ended(code: int) -> str:
    """In words, for the figures."""
    words = {0: "done before", INTERRUPTED: "interrupted", PYTHON_INTERRUPTED: "before Python had started"}
    words |= {PYTHON_TERMINATED: "before Python had started", -signal.SIGKILL: "killed"}
    return words.get(code, str(code))


def plain(value: Any) -> Any:
    """A result without names, places and costs."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in UNEQUAL}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def results(place: Path) -> dict[str, Any]:
    """What lies in a place under its final name: JSON without costs, of a folder its files."""
    found: dict[str, Any] = {}
    for path in place.iterdir():
        if path.name == "results.json":
            found[path.name] = plain(json.loads(path.read_bytes()))
        elif path.name == "rows.jsonl":
            whole = path.read_bytes().split(b"\n")[:-1]  # a last line that is not whole is dropped by the next run
            found[path.name] = sorted((plain(json.loads(line)) for line in whole), key=str)
        elif path.name == "written":
            found[path.name] = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "README.md"}
            found[path.name].pop("config.json")  # names the place of the model
        elif path.suffix in (".html", ".svg"):
            found[path.name] = "whole" if path.read_text().rstrip().endswith(("</html>", "</svg>")) else "cut"
    return found


def is_beginning(rows: list[Any], all_rows: list[Any]) -> bool:
    """Whether each row of a survey is one of those of the whole."""
    return all(row in all_rows for row in rows)


def temporary(place: Path) -> list[Path]:
    """What should not outlast the work: temporary files and unfinished folders."""
    names = (*LEFT_FOR_A_DAY, ".tmp", ".partial", ".replaced", ".incomplete")
    found = [path for path in place.rglob("*") if path.name.startswith(names[:2]) or path.suffix in names[2:]]
    return [path for path in found if "sweeps" not in path.parts]


def broken_cache(cache: Path) -> list[Path]:
    """Ranges that are not what their name says."""
    ranges = (path for path in cache.glob("ranges/*/*") if not path.name.startswith(".part-"))
    return [path for path in ranges if not path.name.endswith(f"-{zlib.crc32(path.read_bytes()):08x}")]


def wait_for_children(session: int) -> list[int]:
    """The processes that a stopped command leaves behind for more than a minute; [] where /proc does not tell."""
    end = time.monotonic() + 60
    while found := [pid for pid in processes() if session_of(pid) == session]:
        if time.monotonic() > end:
            return found
        time.sleep(0.02)
    return []


def processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").glob("[0-9]*"))


def session_of(pid: int) -> int | None:
    try:
        state, _, _, session = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[:4]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(session)


@contextmanager
def bench(layers: int = 8, repeats: int = 2) -> Iterator[Bench]:
    """A bench with a Hub of its own, a model of so many layers, and so many undisturbed runs of each command."""
    with tempfile.TemporaryDirectory(prefix="lazarus-kills-") as place, HubServer() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_VERBOSITY": "critical",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        with patch.dict(os.environ, environment):
            yield Bench(hub, Path(os.path.realpath(place)), layers, repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn by")
    parser.add_argument("--command", choices=COMMANDS, help="this command only")
    parser.add_argument("--results", type=Path, help="a JSON file to add the figures to")
    arguments = parser.parse_args()
    random, started = Random(arguments.seed), time.monotonic()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    waits: dict[str, list[float]] = defaultdict(list)
    failed, left = [], 0
    with bench() as place:
        for number in range(arguments.kills):
            name = arguments.command or list(COMMANDS)[number % len(COMMANDS)]
            signal_name = list(SIGNALS)[number // len(COMMANDS) % len(SIGNALS)]
            share = random.uniform(0, 1.05)
            kill = place.run(name, signal_name, share, place.root / f"kill-{number}")
            counts[f"{name}, {signal_name}"][kill.stopped] += 1
            if kill.stopped == "interrupted":
                waits[signal_name].append(kill.waited)
                if kill.waited > SOON and kill.kind == "right":
                    kill.kind, kill.detail = "late", f"{kill.waited:.2f} s"
            left += kill.left_for_a_day
            if kill.kind != "right":
                failed.append(f"{number}: {name}, {signal_name} at {share:.0%}: {kill.kind}")
                print(f"{failed[-1]}: {kill.detail[-1500:]}", file=sys.stderr, flush=True)
        seconds = {name: round(place.truth(name)[1], 2) for name in COMMANDS if arguments.command in (None, name)}
    command = f"python tests/hostile/faults/kills.py --kills {arguments.kills} --seed {arguments.seed}"
    figures = {
        "command": command,
        "python": platform.python_version(),
        "kills": arguments.kills,
        "undisturbed seconds": seconds,
        "stopped": {name: dict(sorted(found.items())) for name, found in sorted(counts.items())},
        "seconds from signal to end": {
            name: {"median": round(float(np.median(found)), 2), "most": round(max(found), 2)}
            for name, found in waits.items()
        },
        "temporary files left for a day": left,
        "failed": failed,
        "seconds": round(time.monotonic() - started),
    }
    return report(figures, arguments.results)


if __name__ == "__main__":
    sys.exit(main())
