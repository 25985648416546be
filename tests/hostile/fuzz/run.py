"""Fuzz the readers: `python tests/hostile/fuzz/run.py --cases 50000 --seed 1`.

Every case is made from the seed and its number alone: `--replay NUMBER` with the same seed makes it again. Prints how
many cases of each parser had which outcome, the slowest and the largest; exits with 1 where one was not as it must be.
"""

import argparse
import faulthandler
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS))

from figures import report  # noqa: E402  found by the line above
from hub_server import HubServer  # noqa: E402  found by the line above

MEMORY_LIMIT = 8 * 2**30  # of address space, so that a runaway ends in MemoryError
STUCK_AFTER = 600  # seconds after which a case that can't even be interrupted ends the run with its traceback


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn by")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--parser", help="cases of this parser only")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="run one case and show its outcome")
    parser.add_argument(
        "--failures", type=Path, default=TESTS / "hostile/fuzz/failures", help="where failing cases are kept"
    )
    parser.add_argument("--results", type=Path, help="a JSON file to add the figures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lazarus-fuzz-") as place, HubServer() as server:
        root = Path(os.path.realpath(place))
        os.environ |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(root / "hf"),
            "HF_HUB_VERBOSITY": "critical",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "LAZARUS_CACHE": str(root / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        shutil.copytree(TESTS / "fixtures/mixtral", root / "served")
        server.add("fuzz/mixtral", root / "served")
        os.chdir(root)
        return fuzz(arguments, root)


def fuzz(arguments: argparse.Namespace, root: Path) -> int:
    """Run the cases and report."""
    from hostile.fuzz.cases import OK, Bench

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bench = Bench(root, root / "hf", root / "served")
    seeds = [seed for seed in bench.seeds() if arguments.parser in (None, seed.parser)]
    parsers = sorted({seed.parser for seed in seeds})
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest, largest, failed = (0.0, ""), (0, ""), []
    numbers = range(arguments.first, arguments.first + arguments.cases)
    if arguments.replay is not None:
        numbers = range(arguments.replay, arguments.replay + 1)
    started, cpu = time.monotonic(), time.process_time()
    for number in numbers:
        if time.monotonic() - started > arguments.seconds:
            break
        random = Random(f"{arguments.seed}/{number}")
        parser = random.choice(parsers)
        seed = random.choice([seed for seed in seeds if seed.parser == parser])
        (root / "current").write_text(str(number))
        faulthandler.dump_traceback_later(STUCK_AFTER, exit=True)
        case, outcome = bench.run(seed, random)
        faulthandler.cancel_dump_traceback_later()
        name = f"{number}: {seed.parser}, {seed.name}"
        counts[parser][outcome.kind] += 1
        slowest, largest = max(slowest, (outcome.seconds, name)), max(largest, (outcome.memory, name))
        if outcome.kind not in OK:
            failed.append(name)
            keep(arguments.failures / f"{arguments.seed}-{number}", case, name, outcome.kind, outcome.detail)
            print(
                f"{name}: {outcome.kind} ({outcome.seconds:.2f} s, {outcome.memory / 2**20:.0f} MiB)", file=sys.stderr
            )
        if arguments.replay is not None:
            print(name, outcome.kind, outcome.detail, sep="\n")
    figures = {
        "command": f"python tests/hostile/fuzz/run.py --cases {arguments.cases} --seed {arguments.seed}"
        + (f" --first {arguments.first}" if arguments.first else "")
        + (f" --parser {arguments.parser}" if arguments.parser else ""),
        "python": platform.python_version(),
        "cases": sum(sum(found.values()) for found in counts.values()),
        "outcomes": {parser: dict(sorted(found.items())) for parser, found in sorted(counts.items())},
        "slowest": {"cpu_seconds": round(slowest[0], 3), "case": slowest[1]},
        "largest": {"bytes": largest[0], "case": largest[1]},
        "failed": failed,
        "cpu_seconds": round(time.process_time() - cpu),
        "seconds": round(time.monotonic() - started),
    }
    return report(figures, arguments.results)


def keep(folder: Path, case: Any, name: str, kind: str, detail: str) -> None:
    """Write a failing case down: its files, and what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    odd = {}
    for place, content in case.items():
        if isinstance(content, bytes):
            where = folder / "files" / place.replace("/", "__")
            where.write_bytes(content)
        else:
            odd[place] = repr(content)
    (folder / "outcome.json").write_text(
        json.dumps({"case": name, "kind": kind, "detail": detail, "odd": odd}, indent=2)
    )


if __name__ == "__main__":
    sys.exit(main())
