"""A pass over a data set that ends early: what is kept of it, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tetdeploy.resumable import Partial, finish


class Half:
    """A pass over two images, the second of which fails half done."""

    def __init__(self, error: type[BaseException]) -> None:
        self.x, self.done, self.total, self.error = range(2), 0, np.zeros(1), error

    def advance(self) -> int:
        self.total += 1
        if self.done:
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
        finish(Half(error), partial, lambda count: None)  # type: ignore[arg-type]
    kept = partial.load()
    assert kept is not None and (kept["done"], kept["total"]) == (1, 1)
