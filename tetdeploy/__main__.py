"""`tetdeploy` and `python -m tetdeploy`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line. It takes a moment to import, which Ctrl-C ends as it ends a command: with a line and 130."""
    try:
        from tetdeploy.cli import main as command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command_line(prog_name="tetdeploy")


if __name__ == "__main__":
    main()
