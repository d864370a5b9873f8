"""Numbers of time steps: as they are typed, as they are given, and that of a training."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

MAX_T = 1024  # of a training, an export, a run


def parse_steps(text: str) -> tuple[int, ...]:
    """Numbers of steps as they are typed: `6`, `1:6` (both ends), `1,2,4`, or a mix.

    Raises:
        ValueError: it does not parse, or a T is outside 1..1024.
    """
    try:
        ends = [
            (int(first), int(last if colon else first))
            for first, colon, last in (p.partition(":") for p in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"T must be like 6, 1:6 or 1,2,4; got {text!r}") from None
    if any(not 1 <= first <= last <= MAX_T for first, last in ends):
        raise ValueError(f"T must lie in 1..{MAX_T}, from low to high; got {text!r}")
    return tuple(sorted({t for first, last in ends for t in range(first, last + 1)}))


def check_count(name: str, number: Any) -> int:
    """A whole number of at least 1, of Python or NumPy; `name` is what errors call it.

    Raises:
        ValueError: it is something else, `2.0` or `True`, or below 1.
    """
    count = check_whole(name, number)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_whole(name: str, number: Any) -> int:
    """A whole number, of Python or NumPy; `name` is what errors call it.

    Raises:
        ValueError: it is something else, `2.0` or `True`.
    """
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {number!r}") from None


def trained_T(metadata: Mapping[str, Any]) -> int:
    """Steps of the training that a checkpoint's metadata tell of; 4 where they do not, as of an imported one."""
    return int(metadata["training"].get("T", 4))
