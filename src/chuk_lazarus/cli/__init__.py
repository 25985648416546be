"""The `lazarus` command. It starts here, so that Ctrl-C ends it in one line even while its libraries are loaded."""

import os
import signal
import sys
from threading import Timer

INTERRUPTED = 130
GRACE = 0.7  # seconds to end in order


def main() -> None:
    """Run the command line and exit with its code.

    Ctrl-C and SIGTERM end it in order; where that takes too long, because threads are busy with a large matrix, or on a
    second one, at once. What is being written is then left as a kill leaves it: never under its final name.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        from .app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        _give_up()
    except BaseException:
        is_interrupted = signal.getsignal(signal.SIGINT) is _give_up
        if is_interrupted:  # a library has made something else of it
            _give_up()
        raise
    if code == INTERRUPTED:
        os._exit(code)  # has been said; nothing is waited for any more
    sys.exit(code)


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _give_up)
    sys.unraisablehook = lambda _: None  # where Python ignores exceptions, it would tell of this one
    timer = Timer(GRACE, _give_up)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _give_up(*_: object) -> None:
    """End now; imports nothing and waits for no lock, since anything may be under way."""
    line = "lazarus: interrupted"
    if "--json" in sys.argv:
        line = '{"error": {"code": 130, "message": "interrupted", "hint": ""}}'
    shown = "\x1b[?25h\n" if os.isatty(2) else ""  # progress bars hide the cursor
    os.write(2, f"{shown}{line}\n".encode())
    os._exit(INTERRUPTED)
