"""What commands print, and how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tetdeploy.report.numbers import three_digits
from tetdeploy.system.standard_output import StandardOutput, VisibleConsole
from tetdeploy.wording import quoted

# As wide as COLUMNS says, or the terminal; rich alone would take the width of stderr for a pipe.
console = StandardOutput(width=get_terminal_size(fallback=(120, 24)).columns)


def say_next(*words: object) -> None:
    """The command that goes on with a result, quoted for a shell."""
    console.print(f"next: {command_line(*words)}")


def command_line(*words: object) -> str:
    """`tetdeploy` with these words, and the --data-dir that was typed for this command, quoted for a shell; paths that
    begin with a dash are no options."""
    words += () if words[0] in _WITHOUT_DATA else _typed_data_dir()
    return quoted("tetdeploy", *(_undashed(word) if isinstance(word, Path) else word for word in words))


_WITHOUT_DATA = ("build", "report")  # of the commands that are named as the next


def _typed_data_dir() -> tuple[object, ...]:
    ctx = click.get_current_context(silent=True)
    if ctx is None or ctx.get_parameter_source("data_dir") is not click.core.ParameterSource.COMMANDLINE:
        return ()
    return "--data-dir", ctx.params["data_dir"]


def _undashed(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


class _Rate(ProgressColumn):
    """`9.3 images/s`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def render(self, task: Task) -> Text:
        shown = task.speed and task.fields.get("rate", True)
        return Text(f"{three_digits(task.speed)} {self.what}/s" if shown else "")


def progress_bar(rate_of: str = "") -> Progress:
    """A progress bar on stderr; silent where that is no terminal.

    Args:
        rate_of: what the tasks count, to show how many a second; not of a task with `rate=False`.
    """
    stderr = VisibleConsole(stderr=True)
    shown = sys.stderr is not None and sys.stderr.isatty()  # None: closed, as a daemon's may be
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    rate = (_Rate(rate_of),) if rate_of else ()
    return Progress(*columns, *rate, console=stderr, disable=not shown, transient=True)


@contextmanager
def image_bar(what: str, num_images: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of images; what it gives takes the number of those newly done."""
    with progress_bar("images") as bar:
        task = bar.add_task(what, total=num_images)
        yield lambda done: bar.advance(task, done)


def print_notes(notes: Iterable[str]) -> None:
    """What stands below a table."""
    for note in notes:
        console.print(note, style="dim")
