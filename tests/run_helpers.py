"""What tests of trained runs and of checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tetdeploy.data import ImageSet


def toy_images(count: int, seed: int, shape: tuple[int, int, int]) -> ImageSet:
    """Noise around three brightnesses: a toy learns it, but not at once."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    pixels = (60 + 60 * labels[:, None, None, None] + rng.integers(-55, 56, (count, *shape))).astype(np.uint8)
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    return ImageSet("toy", "train", pixels, labels, ("dark", "middle", "bright"), mean, std)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without how long they took."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in ("seconds", "images_per_s")} for r in records]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    wanted = other.state_dict()
    return all(torch.equal(value, wanted[name]) for name, value in one.state_dict().items())


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Within it no file can be larger, as on a disk that is full. Skips the test on a system that has no such limit."""
    resource = pytest.importorskip("resource", reason="no limits on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Bomb:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))
