"""Commands, run in this process."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result

from tetdeploy.cli import main


def invoke(*arguments: object, command: click.Command = main) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments)])


def printed(*arguments: object, code: int = 0, command: click.Command = main) -> str:
    """What a command prints that must succeed, or end with `code`."""
    result = invoke(*arguments, command=command)
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result.output


def refused(*arguments: object, code: int = 1, command: click.Command = main) -> str:
    """The message of a command that must fail: one error, on stderr, and no traceback."""
    result = invoke(*arguments, command=command)
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert result.output.count("Error: ") == result.stderr.count("Error: ") == 1, result.output
    return result.output
