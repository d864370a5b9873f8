"""Keeping what is slow to decode, so that the second run starts at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tetdeploy.storage.arrays import opened_npz, write_npz
from tetdeploy.storage.files import cache_folder

Arrays = dict[str, NDArray[Any]]

_FORMAT = "5"  # raise it when decoding or what is kept changes, so that older files are made anew


class Cache:
    """What is made of some files, for as long as these are as they were.

    One file for each name and `root`, in `$XDG_CACHE_HOME/tetdeploy` or `~/.cache/tetdeploy`; it holds a fingerprint
    of the sources' paths, sizes and times: those of change as well, since files that change places keep the others.

    Args:
        root: the folder the sources lie in.
        sources: the files all of it is made of, all below `root`.
    """

    def __init__(self, root: Path, sources: Iterable[Path | str]) -> None:
        self._ending = f"-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"
        self._fingerprint = _fingerprint(root, sources)

    def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What `make` returns, from the cache if that has it. A file that is damaged or belongs to other sources is
        made anew; where the cache cannot be written the result is returned all the same.

        Args:
            name: begins the file's name; readable.
            make: makes the arrays; not called when the cache has them.
        """
        path = cache_folder() / (name + self._ending)
        with suppress(OSError, ValueError, KeyError), path.open("rb") as source, opened_npz(source, path.name) as file:
            if str(file["fingerprint"]) == self._fingerprint:
                return {key: file[key] for key in file if key != "fingerprint"}
        arrays = make()
        with suppress(OSError):
            write_npz(path, {"fingerprint": self._fingerprint, **arrays})
        return arrays


def readable(root: Path) -> str:
    """A folder's name, as it begins the name of a file: one of 255 bytes would leave no room for the rest."""
    return os.fsencode(root.resolve().name)[:100].decode(errors="ignore")


def _fingerprint(root: Path, sources: Iterable[Path | str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    above = str(root / "x")[:-1]
    for path in sources:  # as texts: `relative_to` and `Path.stat` take 3 times as long, a second for 100,000 files
        digest.update(os.fsencode(str(path).removeprefix(above)))
        with suppress(OSError):  # `make` reports what cannot be read, with the others that cannot
            stat = os.stat(path)  # noqa: PTH116
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0".encode())
    return digest.hexdigest()
