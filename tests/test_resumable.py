"""A pass over a data set that ends early: what is kept of it, and when."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tetdeploy.resumable import Partial, finish
from tetdeploy.storage.arrays import write_npz
from tetdeploy.system.signals import handled


class Images:
    """A pass over images one by one, the last of which may fail half done."""

    def __init__(self, number: int, error: type[BaseException] | None = None) -> None:
        self.x, self.done, self.total, self.error = range(number), 0, np.zeros(1), error

    def advance(self) -> int:
        self.total += 1
        if self.error and self.done == len(self.x) - 1:
            raise self.error
        self.done += 1
        return 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"done": np.array(self.done), "total": self.total}


@pytest.mark.parametrize(("error", "seconds"), [(KeyboardInterrupt, 1), (MemoryError, 30)])
def test_what_a_half_done_batch_left_is_not_kept(
    error: type[BaseException], seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Ctrl-C what was done before is; of any other error what was done when 20 seconds had passed."""
    clock = iter(range(0, 1000, seconds))
    monkeypatch.setattr("tetdeploy.resumable.time", SimpleNamespace(monotonic=lambda: next(clock)))
    partial = Partial(tmp_path / "p.npz", {})
    with pytest.raises(error):
        finish(Images(2, error), partial, lambda count: None)  # type: ignore[arg-type]
    kept = partial.load()
    assert kept is not None and (kept["done"], kept["total"]) == (1, 1)


def test_ctrl_c_before_anything_is_done_leaves_no_file(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p.npz", {})
    with pytest.raises(KeyboardInterrupt):
        finish(Images(1, KeyboardInterrupt), partial, lambda count: None)  # type: ignore[arg-type]
    assert partial.load() is None


def test_a_second_ctrl_c_does_not_lose_what_the_first_one_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_interrupted(path: Path, arrays: Mapping[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        write_npz(path, arrays)

    monkeypatch.setattr("tetdeploy.resumable.write_npz", write_interrupted)
    partial = Partial(tmp_path / "p.npz", {})
    with handled(signal.default_int_handler, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        finish(Images(2, KeyboardInterrupt), partial, lambda count: None)  # type: ignore[arg-type]
    kept = partial.load()
    assert kept is not None and kept["done"] == 1


def test_it_is_kept_every_20_seconds_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, kept = Images(10), list[int]()
    monkeypatch.setattr("tetdeploy.resumable.time", SimpleNamespace(monotonic=lambda: 7.0 * images.done))
    monkeypatch.setattr(Partial, "save", lambda partial, arrays: kept.append(int(arrays["done"])))
    finish(images, Partial(tmp_path / "p.npz", {}), lambda count: None)  # type: ignore[arg-type]
    assert kept == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"T": 6, "data": "digits"}, "T: 4 -> 6"),
        ({"T": 4, "data": "cifar10"}, "data: digits -> cifar10"),
        ({"T": 4}, "data: digits -> None"),
    ],
)
def test_other_settings_are_not_gone_on_with(settings: dict[str, Any], change: str, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    assert Partial(path, settings).load() is None
    Partial(path, {"T": 4, "data": "digits"}).save({})
    with pytest.raises(ValueError, match=rf"other settings \({change}\); go on with those, or pass --restart"):
        Partial(path, settings).load()
