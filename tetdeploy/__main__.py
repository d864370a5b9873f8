"""`tetdeploy` and `python -m tetdeploy`."""

from __future__ import annotations

import os
import sys

from tetdeploy.machine import default_threads


def main() -> None:
    """The command line. It takes a moment to import, which Ctrl-C ends as it ends a command: with a line and 130."""
    if (threads := default_threads()) is not None:  # which PyTorch, numba and BLAS would not find out
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        from tetdeploy.cli import main as command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command_line(prog_name="tetdeploy")


if __name__ == "__main__":
    main()
