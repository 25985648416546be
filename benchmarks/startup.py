"""How long a command takes before it does anything: to print its help, and to open the first weight file.

    python benchmarks/startup.py [--repeat N] [--output FILE]

Seconds from the start of the interpreter's first line, by the process itself, until a hook on its audit events sees a
weight file being opened; help is timed from outside. Modules have been compiled before, as after a user's first call.
"""

import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from measuring import CLOCKS, Figures, apart, benchmark

COMMANDS = {
    "moe-layout": (),
    "moe-type-analyze": (),
    "moe-type-analyze --quick": ("--quick",),
    "moe-overlay-compute": (),
    "moe-overlay-verify": (),
    "moe-overlay-estimate": (),
}


def first_open(arguments: list[str]) -> Figures:
    """Seconds until the command opens a weight file; it goes on to its end, in silence."""
    found: list[tuple[float, float]] = []

    def hook(event: str, details: tuple[object, ...]) -> None:
        if event == "open" and not found and str(details[0]).endswith((".safetensors", ".gguf")):
            found.append((time.perf_counter() - started, time.process_time()))

    started = time.perf_counter()
    sys.addaudithook(hook)
    from chuk_lazarus.cli.app import run

    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        run(arguments)
        sys.stdout = kept
    return {"seconds": found[0][0], "cpu_seconds": found[0][1]}


def show_help() -> Figures:
    """Seconds of `lazarus --help`, a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    started, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "chuk_lazarus.cli", "--help"],
        stdout=subprocess.DEVNULL,
        check=True,
        env=environment,
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}


if __name__ == "__main__":
    with benchmark(__doc__) as (options, figures):
        os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(dir=options.folder)
        rounds = []
        for _ in range(options.repeat + 1):
            one = {"lazarus --help": show_help()}
            for name, more in COMMANDS.items():
                arguments = ["introspect", "moe-expert", name.split()[0], "-m", "demo:native", *more]
                one[name] = apart("startup.first_open", arguments=arguments)
            rounds.append(one)
        del rounds[0]  # it compiled the modules
        for clock in CLOCKS:
            figures[clock] = {name: median(one[name][clock] for one in rounds) for name in rounds[0]}
