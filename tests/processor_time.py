"""Seconds of processor time, which other programs on the same machine do not lengthen; all limits of time are of it."""

import os
import subprocess
from pathlib import Path

HANGS = 300.0
"""Seconds on the clock after which what is waited for is taken to hang: not a limit of time, but an end to waiting."""


def of_children() -> float:
    """What all processes that this one has started used, with theirs; those that still run do not count."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def of_process(number: int) -> float:
    """What a process has used so far, without those that it has started; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return 0.0
    ps = subprocess.run(["ps", "-o", "time=", "-p", str(number)], capture_output=True, text=True, check=False)
    seconds = 0.0
    for part in ps.stdout.strip().split(":") if ps.stdout.strip() else ():  # hours, minutes, seconds
        seconds = 60 * seconds + float(part)
    return seconds
