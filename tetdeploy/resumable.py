"""A long run over a data set that can be interrupted and gone on with. Needs no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tetdeploy.engine import Engine, Result
from tetdeploy.names import section
from tetdeploy.storage.arrays import read_npz, write_npz
from tetdeploy.storage.form import parse_json
from tetdeploy.sweep import Tally
from tetdeploy.system.signals import uninterrupted

Arrays = Mapping[str, NDArray[Any]]
_SAVE_EVERY = 20.0  # seconds


class Sums(Protocol):
    """Sums over images that can be written down and taken up again."""

    def arrays(self) -> dict[str, NDArray[Any]]: ...

    def restore(self, arrays: Arrays) -> None: ...


class Beside(Sums, Protocol):
    """What runs beside the engine on the first images (PyTorch, say) and gives what `Engine.count` gives."""

    batch_size: int

    def add(self, x: NDArray[Any], labels: NDArray[np.int64]) -> tuple[Result, dict[str, NDArray[Any]]]: ...


def join(parts: Mapping[str, Sums]) -> dict[str, NDArray[Any]]:
    """The arrays of all parts, each behind its part's name."""
    return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.arrays().items()}


class Pass:
    """One pass of a data set through the counting graph.

    Args:
        T: steps to run.
        beside: what also sees the first `num_beside` images.

    Attributes:
        done: images so far.
        tally: their sums.
    """

    def __init__(
        self,
        engine: Engine,
        x: NDArray[Any],
        labels: NDArray[np.int64],
        T: int,
        *,
        batch_size: int,
        beside: Beside | None = None,
        num_beside: int = 0,
    ) -> None:
        self.engine, self.x, self.labels, self.T = engine, x, labels, T
        self.batch_size = batch_size
        self.beside, self.num_beside = beside, min(num_beside, len(x)) if beside else 0
        self.tally = Tally(engine, T)
        self.done = 0

    def advance(self) -> int:
        """Run the next batch; returns its size."""
        if self.beside is not None and self.done < self.num_beside:
            size = min(self.batch_size, self.beside.batch_size, self.num_beside - self.done)
            x, labels = self._next(size)
            result, counts = self.beside.add(x, labels)
        else:
            x, labels = self._next(self.batch_size)
            result, counts = self.engine.count(x, self.T)
        self.tally.add(result.per_step, counts, labels)
        self.done += len(x)
        return len(x)

    def _next(self, size: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        part = slice(self.done, self.done + size)
        return self.x[part], self.labels[part]

    def _parts(self) -> dict[str, Sums]:
        return {"tally": self.tally} | ({"beside": self.beside} if self.beside else {})

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"done": np.array(self.done)} | join(self._parts())

    def restore(self, arrays: Arrays) -> None:
        """The inverse of `arrays`, for the same model, images and T.

        Raises:
            ValueError: there is less.
        """
        try:
            for name, part in self._parts().items():
                part.restore(section(arrays, f"{name}/"))
            self.done = int(arrays["done"])
        except KeyError as error:
            raise ValueError(f"the unfinished run lacks {error}; pass --restart to begin anew") from error


class Partial:
    """The sums of an unfinished run, in a file.

    Args:
        settings: all that decides the result; a file of other settings is not gone on with.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)

    def load(self) -> dict[str, NDArray[Any]] | None:
        """The sums, or None if there is no file.

        Raises:
            ValueError: the file is damaged, or holds a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            arrays = read_npz(self.path)
            settings = parse_json(str(arrays.pop("settings")))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path} holds no unfinished run ({error}); pass --restart to begin anew") from error
        if settings != self.settings:
            names = sorted(settings.keys() | self.settings.keys())
            other = [n for n in names if settings.get(n) != self.settings.get(n)]
            changes = ", ".join(f"{n}: {settings.get(n)} -> {self.settings.get(n)}" for n in other)
            raise ValueError(
                f"{self.path} holds an unfinished run with other settings ({changes}); "
                "go on with those, or pass --restart to begin anew; or, if another process is at it, give this one its "
                "own --json"
            )
        return arrays

    def save(self, arrays: Arrays) -> None:
        write_npz(self.path, {"settings": json.dumps(self.settings), **arrays})

    def remove(self) -> None:
        """Remove the file, unless it is of another run by now."""
        with suppress(ValueError):
            self.load()
            self.path.unlink(missing_ok=True)


def finish(run: Pass, partial: Partial, tick: Callable[[int], None]) -> None:
    """Run all that is left, and keep what is done every 20 seconds, at the end, for what the caller does then may be
    interrupted too, and at Ctrl-C, which goes on to the caller.

    Args:
        tick: called with the number of images done.
    """
    kept = _copied(run)
    due = time.monotonic() + _SAVE_EVERY
    try:
        while run.done < len(run.x):
            tick(run.advance())
            kept = _copied(run)
            if time.monotonic() > due:
                partial.save(kept)
                due = time.monotonic() + _SAVE_EVERY
        partial.save(kept)
    except KeyboardInterrupt:
        if kept["done"]:
            with uninterrupted():  # a second Ctrl-C would lose what the first one keeps
                partial.save(kept)  # not what the interrupted batch may have left half done
        raise


def _copied(run: Pass) -> dict[str, NDArray[Any]]:
    return {name: np.array(value) for name, value in run.arrays().items()}
