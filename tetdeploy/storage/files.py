"""Writing results so that a reader never sees half a file, and reading lines that may be damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tetdeploy.storage.form import json_text, parse_json

MODELS = {".safetensors", ".onnx", ".engine", ".nir"}

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # some file systems


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place when the block ends without an error.

    An error leaves an earlier file at `path` as it was and removes the temporary one; a power cut leaves the earlier or
    the new one, whole. Missing parent folders are made; without a file they go again. Of a symlink the file is written
    that it points at.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full, or `path` is a device or the like; the
            message names `path`.
    """
    path = _regular(path)
    with made_folder(path.parent, of=path):
        temporary = _hidden(path)
        with _making(path):
            temporary.touch(exist_ok=False)  # not by tempfile, whose files and folders are private
        try:
            with _filling(path):
                yield temporary
                _sync(temporary)
                temporary.replace(path)
        except IsADirectoryError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another name") from error
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must not be there; it takes that name when the block ends without
    an error, and goes otherwise. Missing parent folders are made; without a folder they go again.

    Raises:
        OSError: the folder cannot be made or written, the disk is full, or `path` is there by now; the message names
            `path`.
    """
    path = Path(path)
    with made_folder(path.parent, of=path):
        temporary = _hidden(path)
        with _making(path):
            temporary.mkdir()
        try:
            with _filling(path):
                yield temporary
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _sync(file)
            with _making(path):
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Within it there is an empty folder among the system's temporary ones.

    Raises:
        OSError: it, or a file in it, cannot be written; the message says where, and what to do.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise OSError(
            f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder with room"
        ) from error


def lacks_temporary_folder(error: OSError) -> bool:
    """Whether it is Python's, for want of any temporary folder, of which PyTorch also asks where it needs none."""
    return error.errno == errno.ENOENT and "usable temporary directory" in str(error)


@contextmanager
def made_folder(path: Path | str, *, new: bool = False, of: Path | None = None) -> Iterator[None]:
    """Within it there is a folder `path`; it and parents that were missing go again where they end empty.

    Args:
        of: what is written there, which errors name in place of `path`.

    Raises:
        FileExistsError: `path` is there and was to be `new`, or is no folder.
        OSError: it cannot be made; the message names `path`.
    """
    path = Path(path)
    with _making(of or path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=not new)
    try:
        yield
    finally:
        with suppress(OSError):  # the first that is not empty
            for folder in missing:
                folder.rmdir()


def check_writable(path: Path | str, suffix: str = "", *, begins: bytes = b"", remedy: str) -> None:
    """Whether `atomic_write` could write here now, before the work whose result goes here. Leaves nothing behind.

    Args:
        suffix: of the models that are written, which `path` must have, and a file that it links to; without one, a file
            that is there is no model.
        begins: how what is written begins, and so must a file that is there, unless it is empty.
        remedy: what the error says to do, such as "choose another with --json".

    Raises:
        OSError: it could not, or would write over something else; the message names `path`.
    """
    if str(path) == "-" or _is_output(Path(path)):
        raise OSError(f"cannot write {path}: a result goes to a file, not to the terminal; {remedy}")
    if suffix and Path(path).suffix != suffix:
        raise OSError(f"cannot write {path}: its name must end in {suffix}; {remedy}")
    path = _regular(path, remedy)
    if path.is_dir():
        raise OSError(f"cannot write {path}: {os.strerror(errno.EISDIR)}; {remedy}")
    is_other = path.suffix != suffix if suffix else path.suffix in MODELS
    if path.is_file() and (is_other or not _begins(path, begins)):
        raise OSError(f"cannot write {path}: it is there, and something else; {remedy}, or remove it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    probe = folder / _hidden(path).name
    with _making(path, remedy):
        probe.touch(exist_ok=False)
        probe.unlink()


def _is_output(path: Path) -> bool:
    """Whether it is where standard output or error goes; a file would lose all that is told."""
    for number in (1, 2):
        with suppress(OSError):  # it is not there, or closed
            if os.path.samestat(path.stat(), os.fstat(number)):
                return True
    return False


def _begins(file: Path, begins: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(begins)) in (begins, b"")


def _regular(path: Path | str, remedy: str = "choose another name") -> Path:
    """Where a file of this name is to be put.

    Raises:
        OSError: what is there is neither a file nor a folder: a device or a pipe, whose place a file is not to take; or
            the name is too long, or a link leads to itself.
    """
    path = Path(path)
    with _making(path, remedy):
        is_other = path.exists() and not (path.is_file() or path.is_dir())
    if is_other:
        raise OSError(f"cannot write {path}: it is a device or a pipe; {remedy}")
    target = Path(os.path.realpath(path)) if path.is_symlink() else path  # of a loop Python 3.11's resolve() raises
    if target.is_symlink():
        raise OSError(f"cannot write {path}: it is a link that leads to itself; {remedy}")
    return target


def cache_folder() -> Path:
    """Where what can be made anew is kept: `$XDG_CACHE_HOME/tetdeploy` or `~/.cache/tetdeploy`."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification says to ignore a relative path
    return (configured if configured.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "tetdeploy"  # noqa: PTH111


def is_utf8(path: Path | str) -> bool:
    """Whether a path is UTF-8, as libraries want it that take text; Python itself opens any."""
    return not any("\udc80" <= character <= "\udcff" for character in str(path))  # bytes that are none


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; null stands for NaN and infinities."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def read_json_lines(path: Path | str, check: Callable[[Any], object]) -> list[Any]:
    """The JSON of each line of a file, but for empty ones.

    Args:
        check: raises a ValueError that says what is wrong with the content of a line.

    Raises:
        ValueError: a line is no JSON or fails `check`; the message names it.
        OSError: the file cannot be read.
    """
    contents = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            contents.append(parse_json(line))
            check(contents[-1])
        except ValueError as error:
            reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path} is damaged in line {number}: {reason}; remove that line to do without") from error
    return contents


def lfs_pointer(start: bytes, what: str) -> str:
    """What a file is that Git LFS has not fetched, and what to do; "" if `start`, its first 64 bytes or more, is not
    that of such a file. `what` should be in its place, such as "weights"."""
    is_one = start.startswith(b"version https://git-lfs")
    return f"a pointer of Git LFS in place of the {what}; fetch the file with: git lfs pull" if is_one else ""


@contextmanager
def _making(path: Path, remedy: str = "choose another output folder") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else remedy
        raise type(error)(f"cannot write {path}: {error.strerror}; {remedy}") from error


def _hidden(path: Path) -> Path:
    """A name beside `path` for what is made there, which nothing else has; no longer than a long one."""
    name = path.name if len(os.fsencode(path.name)) < 100 else path.name[:-14]
    return path.parent / f".{name}.{secrets.token_hex(4)}.tmp"


@contextmanager
def _filling(path: Path) -> Iterator[None]:
    """A full disk, which the system reports without a name, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    """Have the disk take a file's content, before its name: a power cut in between would leave a file without any."""
    with path.open("rb+") as file:  # Windows syncs only what may be written
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
