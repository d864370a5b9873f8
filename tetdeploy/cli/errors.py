"""What users can cause becomes one line and an exit code, never a traceback. So does Ctrl-C."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import click

from tetdeploy.cli.characters import replace_lacking_characters
from tetdeploy.storage.files import lacks_temporary_folder
from tetdeploy.storage.provenance import version
from tetdeploy.system.extras import MissingExtraError
from tetdeploy.system.signals import handled, lost_interrupts_raised_again, terminations
from tetdeploy.wording import first_line, visible

# PyTorch's of a CPU, of a tensor beyond any memory, and of a GPU; cuBLAS's and cuDNN's, which take memory of their own
_OUT_OF_MEMORY = ("can't allocate memory", "Storage size calculation over", "out of memory", "_STATUS_ALLOC_FAILED")
_OTHER_GPU = "no kernel image is available"  # CUDA's
_OF_PATHS = ("Symlink loop", "Could not determine home directory")  # RuntimeErrors of pathlib, the first until 3.12
_SAME_SECONDS = 5  # in which a second signal is no other
_ROOM = "make room, or write elsewhere"
_REMEDIES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EISDIR: "name a file"}
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


class CleanErrors(click.Command):
    """A command that reports ValueError, OSError, MissingExtraError, memory that does not suffice, a GPU that PyTorch
    was not built for and, with PYTHONWARNINGS=error, warnings as `Error: ...` with exit code 1, and Ctrl-C, SIGTERM or
    SIGHUP, where it does not do so itself, with exit code 130: files are written whole or not at all."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        replace_lacking_characters()
        warnings.formatwarning = _one_line
        # Without a home to write to it says so in two lines, though its plots are the same.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        with _terminations_like_ctrl_c(), lost_interrupts_raised_again():
            return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            with _visible_errors():
                return super().make_context(*args, **kwargs)
        except OSError as error:  # `--help` and `--version` print here
            if error.errno == errno.EPIPE:  # of a reader that left, which click ends in silence
                raise
            _drop_unwritten()
            raise click.ClickException(_describe(error, "standard output")) from error

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_expand_home(argument) for argument in args])

    def invoke(self, ctx: click.Context) -> Any:
        with _visible_errors():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            _check_current_folder()
            return super().invoke(ctx)
        except (ValueError, MissingExtraError, Warning) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            _drop_unwritten()
            raise click.ClickException(_describe(error)) from error
        except (MemoryError, RuntimeError) as error:
            if any(text in str(error) for text in _OF_PATHS):
                raise click.ClickException(f"{str(error).rstrip('.')}; give another path") from error
            if _OTHER_GPU in str(error):
                raise click.ClickException(
                    f"this PyTorch was not built for this GPU ({first_line(error)}): install a PyTorch that was, see "
                    "https://pytorch.org/get-started, or take --device cpu"
                ) from error
            if not lacks_memory(error):
                raise
            reason = str(error).partition("\n")[0] or "out of memory"
            raise click.ClickException(
                f"the memory does not suffice ({reason}); take fewer images at once, a smaller T or a smaller network"
            ) from error
        except KeyboardInterrupt:
            click.echo("interrupted; no file is left half written", err=True)
            ctx.exit(INTERRUPTED)


class CleanGroup(CleanErrors, click.Group):
    """The same of all commands in a group, whose own text lists them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        pass


class Recorded(click.Command):
    """A command whose files say which version wrote them: that with which it began, whatever a `git pull` brings while
    it runs. `--help` does not come here."""

    def invoke(self, ctx: click.Context) -> Any:
        version()  # which is kept
        return super().invoke(ctx)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory that does not suffice is what an error says."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def _visible_errors() -> Iterator[None]:
    """What click prints of an error, of a wrong argument too, does not steer the terminal."""
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = visible(error.message)  # which newer versions of click type as final
        raise


@contextmanager
def _terminations_like_ctrl_c() -> Iterator[None]:
    """Schedulers and container engines send SIGTERM before they kill, a terminal SIGHUP as it ends: what is half
    written goes, what was done stays. One soon after another is the same one: a shell sends SIGHUP, and so does the
    system, or SIGTERM."""
    last = -math.inf

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SAME_SECONDS:
            last = now
            raise KeyboardInterrupt

    others = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    with nullcontext() if others else handled(interrupt, *terminations()):
        yield


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a command's user needs it, without the line of code that gave it."""
    return f"Warning: {visible(str(message))}\n"


def _expand_home(argument: str) -> str:
    """`--out=~/runs`, `-o~/runs` and `name=~/model.onnx`, whose `~` shells leave: a folder of that name is a trap."""
    option, tilde, rest = argument.partition("~")
    if not re.fullmatch(r"-\w|[^/]+=", option):
        return argument
    return option + os.path.expanduser(tilde + rest)  # noqa: PTH111  # pathlib refuses a user that is not there


def _check_current_folder() -> None:
    """Where it was deleted, libraries fail without a name, or end the process as oneMKL does."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise FileNotFoundError("the current folder is gone; go to another one (cd)") from error


def _drop_unwritten() -> None:
    """What a full standard output did not take, Python would write again as it exits, and end with code 120."""
    try:
        if sys.stdout is not None:  # closed, as a daemon's may be
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: OSError, unnamed: str | None = None) -> str:
    """An OSError of ours says it all; the system's own names the file, or it is `unnamed`, and the reason."""
    if lacks_temporary_folder(error):
        return f"cannot write a temporary file: {error.strerror}; set TMPDIR to a folder with room"
    name = unnamed if error.filename is None else error.filename
    if error.errno is None or name is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno)
    return f"{name}: {error.strerror}" + (f"; {remedy}" if remedy else "")
