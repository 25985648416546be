"""The `lazarus` command. It starts here, so that Ctrl-C ends it in one line even while its libraries are loaded."""

import os
import sys

from .interrupt import INTERRUPTED, give_up, handle_interrupts, is_interrupted


def main() -> None:
    """Run the command line and exit with its code.

    Ctrl-C and SIGTERM end it in order; where that takes too long, because threads are busy with a large matrix, or on a
    second one, at once. What is being written is then left as a kill leaves it: never under its final name.
    """
    handle_interrupts()
    try:
        from .app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        give_up()
    except BaseException:
        if is_interrupted():
            give_up()
        raise
    if code == INTERRUPTED:
        os._exit(code)  # it has been said; nothing is waited for any more
    sys.exit(code)
