"""Arrays by name in a `.npz`, which may be damaged."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

from tetdeploy.storage.files import atomic_write, lfs_pointer

# Of a zip archive, and of the header of an array, which NumPy parses as Python.
_OF_DAMAGE = (OSError, RuntimeError, EOFError, BadZipFile, zlib.error, ValueError, TypeError, SyntaxError, TokenError)


def write_npz(path: Path | str, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name as a `.npz`, atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # to a name np.savez would add a suffix
        np.savez(file, **arrays)


def read_npz(path: Path | str) -> dict[str, NDArray[Any]]:
    """All arrays of a `.npz`.

    Raises:
        ValueError: it is none, is damaged, or holds Python objects.
        OSError: it cannot be opened.
    """
    with Path(path).open("rb") as handle, opened_npz(handle, str(path)) as file:
        return dict(file)


@contextmanager
def opened_npz(handle: BinaryIO, name: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Yield the arrays of an open `.npz`, each read as it is asked for; errors call it `name`.

    Raises:
        ValueError: it is none, is damaged, or holds Python objects; what is taken is no array.
        OSError: it is a pointer of Git LFS.
    """
    if pointer := lfs_pointer(handle.read(64), "arrays"):
        raise OSError(f"{name} is {pointer}")
    try:
        if not is_zipfile(handle):
            raise ValueError("it is no .npz, or is cut short")
        handle.seek(0)
        with np.load(handle, allow_pickle=False) as file:
            yield _Arrays(file)
    except _HoldsObjectsError as error:
        raise ValueError(f"in {name}, {error}") from error
    except _OF_DAMAGE as error:
        raise ValueError(f"{name} is damaged: {str(error) or 'it ends too early'}") from error


class _HoldsObjectsError(ValueError):
    """An array of a `.npz` has the dtype object, which NumPy would unpickle."""


class _Arrays(Mapping[str, "NDArray[Any]"]):
    """Those of a `.npz`, and whatever else lies beside them, of which NumPy gives the bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            value = self._file[name]
        except MemoryError as error:
            claimed, size = self._sizes(name)
            if claimed <= size:
                raise
            raise ValueError(f"{name} claims {claimed:,} bytes, of which at most {size:,} are there") from error
        except ValueError as error:
            if not str(error).startswith("Object arrays"):
                raise
            raise _HoldsObjectsError(
                f"{name} holds Python objects, which are not read, because unpickling can run code: give numbers, or "
                "names as astype('U')"
            ) from error
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is no array")
        return value

    def _sizes(self, name: str) -> tuple[int, int]:
        """The bytes of an array by its header, and those that the file has for both."""
        archive: ZipFile = self._file.zip
        member = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
        with archive.open(member) as file:
            short = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if short else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        return math.prod(shape) * dtype.itemsize, member.file_size

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
