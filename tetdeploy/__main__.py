"""`tetdeploy` and `python -m tetdeploy`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """The command line. It takes a moment to import, which Ctrl-C ends as it ends a command: with a line and 130. After
    the command's last word Ctrl-C, as the second of two, ends the process in silence: it would interrupt what libraries
    do as Python exits, which then shows their tracebacks."""
    try:
        from tetdeploy.machine import default_threads

        if not os.environ.get("OMP_NUM_THREADS") and (threads := default_threads()) is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # which PyTorch and BLAS would not find out
        from tetdeploy.cli import main as command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        command_line(prog_name="tetdeploy")
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
