"""What was measured of several seeds as one: the mean of each number."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any


def mean_of(values: Sequence[Any]) -> Any:
    """What several results have at one place of their JSON as one.

    Returns:
        What is the same in all. Of different numbers the mean; of objects that of each key that all have, and of
        lists of objects with a T or a name, as rows and layers are, that of each that all have. Else None.
    """
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(isinstance(value, dict) for value in values):
        return {key: mean_of([value[key] for value in values]) for key in first if all(key in v for v in values)}
    if all(isinstance(value, list) for value in values):
        found = [{_key(item): item for item in value} for value in values]
        return [mean_of([items[key] for items in found]) for key in found[0] if all(key in items for items in found)]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return fmean(values)
    return None


def _key(item: Any) -> str:
    """By what an item of a list is found in the lists of the others."""
    return str(item.get("T", item.get("name"))) if isinstance(item, dict) else str(item)
