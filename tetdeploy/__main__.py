"""`tetdeploy` and `python -m tetdeploy`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import MutableMapping


def main() -> None:
    """The command line. It takes a moment to import, which Ctrl-C ends as it ends a command: with a line and 130. So
    does one more that comes as a command ends. After the command's last word Ctrl-C ends the process in silence, as by
    its signal: it would interrupt what libraries do as Python exits, which then shows their tracebacks."""
    try:
        _settle_openmp(os.environ)
        from tetdeploy.cli import main as command_line

        command_line(prog_name="tetdeploy")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _settle_openmp(environment: MutableMapping[str, str]) -> None:
    """What OpenMP reads when it is loaded, where the user leaves it open."""
    from tetdeploy.system.machine import default_threads

    if not environment.get("OMP_NUM_THREADS") and (threads := default_threads()) is not None:
        environment["OMP_NUM_THREADS"] = str(threads)  # which PyTorch and BLAS would not find out
    if not environment.get("OMP_WAIT_POLICY") and not environment.get("GOMP_SPINCOUNT"):
        # Turns of a loop in which a thread waits before it sleeps. libgomp's own number, where it does not know itself
        # short of cores, is milliseconds' worth, in which a thread that has nothing to do keeps others from their core.
        environment["GOMP_SPINCOUNT"] = "1000"


if __name__ == "__main__":
    main()
