"""A program on a terminal of its own."""

import os
import subprocess
from collections.abc import Sequence


def run_on_terminal(command: Sequence[str], columns: int) -> tuple[int, bytes, bytes]:
    """The exit code of a command, its stdout, which is a pipe, and what its stderr shows on a terminal."""
    shown, terminal = os.openpty()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns)},
    ) as process:
        os.close(terminal)
        chunks = []
        while True:
            try:
                chunk = os.read(shown, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        out = process.communicate()[0]
    os.close(shown)
    return process.returncode, out, b"".join(chunks)


def without_steps(err: str) -> str:
    """What stands on stderr but for the next steps, which follow a result."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("Next, "))
