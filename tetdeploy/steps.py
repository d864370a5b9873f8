"""Numbers of time steps: as they are typed, and that of a training."""

from __future__ import annotations

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


def trained_T(metadata: Mapping[str, Any]) -> int:
    """Steps of the training that a checkpoint's metadata tell of; 4 where they do not, as of an imported one."""
    return int(metadata["training"].get("T") or 4)
