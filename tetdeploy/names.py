"""Names of many things: the first ones in a message, and those of layers that are called more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def numbered(name: str, seen: Counter[str]) -> str:
    """A name, from its second time on with a number: `conv#2`. `seen` is how often each was there; counted on."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"
