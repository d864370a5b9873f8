"""What a long call tells of its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # called with (what, done, all)


def ticker(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """What adds up the counts it is called with, one after another, and says so to `progress`; that there is something
    to do, at once."""
    if progress is None:
        return None
    if total > 0:
        progress(what, 0, total)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return advance
