"""Many images a batch at a time. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def parts(count: int, size: int, tick: Callable[[int], None] | None = None) -> Iterator[slice]:
    """Slices of at most `size`, one after another, that cover `count` images.

    Args:
        tick: called with the number of images of each part when that is done.

    Raises:
        ValueError: `size` is 0 or less.
    """
    if size < 1:
        raise ValueError(f"a batch must have at least 1 image, got {size}")
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop)
        if tick:
            tick(stop - start)
