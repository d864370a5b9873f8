"""Names and messages: many in one line, a layer that is called again, data that are a file, what an error says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

V = TypeVar("V")


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def numbered(name: str, seen: Counter[str]) -> str:
    """A name, from its second time on with a number: `conv#2`. `seen` is how often each was there; counted on."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def is_npz(data: str) -> bool:
    """Whether a data set's name is a `.npz` file: one set of images or frames, which is as it is."""
    return data.lower().endswith(".npz")


def section(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """What has a name that begins with `prefix`, by the rest of it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def first_line(error: BaseException) -> str:
    """What an error says, in a line; of one without text, as MemoryError often is, its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
