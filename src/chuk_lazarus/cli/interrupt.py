"""What Ctrl-C and SIGTERM do: they end the command in one line, in order where that is quick, and else at once."""

import os
import signal
import sys
from threading import Timer

INTERRUPTED = 130
GRACE = 0.7  # seconds to end in order


def handle_interrupts() -> None:
    """Let Ctrl-C and SIGTERM interrupt the command at any moment."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def is_interrupted() -> bool:
    """Whether one of the signals has come: a library may have made another exception of it."""
    return signal.getsignal(signal.SIGINT) is give_up


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, give_up)
    sys.unraisablehook = lambda _: None  # where Python ignores exceptions, it would tell of this one
    timer = Timer(GRACE, give_up)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def give_up(*_: object) -> None:
    """End now; this imports nothing and waits for no lock, since anything may be under way."""
    line = "lazarus: interrupted"
    if "--json" in sys.argv:
        line = '{"error": {"code": 130, "message": "interrupted", "hint": ""}}'
    shown = "\x1b[?25h\n" if os.isatty(2) else ""  # progress bars hide the cursor
    os.write(2, f"{shown}{line}\n".encode())
    os._exit(INTERRUPTED)
