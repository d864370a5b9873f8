"""Many images a batch at a time. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tetdeploy.arguments import check_count

_SPIKE_BYTES = 2e8


def parts(count: int, size: int, tick: Callable[[int], None] | None = None) -> Iterator[slice]:
    """Slices of at most `size`, one after another, that cover `count` images.

    Args:
        tick: called with the number of images of each part when that is done.

    Raises:
        ValueError: `size` is no whole number, or 0 or less.
    """
    size = check_count("the size of a batch", size)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop)
        if tick:
            tick(stop - start)


def images_with_spikes(neurons: Sequence[Mapping[str, Any]], T: int) -> int:
    """Images of a batch all of whose spikes over T steps are kept: as many as 200 MB of float32 hold, 1 at least.

    Args:
        neurons: the layers, as in a model's metadata.
    """
    spikes = T * sum(math.prod(layer["shape"]) for layer in neurons)
    return max(1, int(_SPIKE_BYTES // (4 * max(spikes, 1))))
