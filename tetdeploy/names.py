"""What a name says: a layer that is called again, data that are a file, a network of one's own, a loss, a section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")


def numbered(name: str, seen: Counter[str]) -> str:
    """A name, from its second time on with a number: `conv#2`. `seen` is how often each was there; counted on."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def is_npz(data: str) -> bool:
    """Whether a data set's name is a `.npz` file: one set of images or frames, which is as it is."""
    return data.lower().endswith(".npz")


def is_own_model(model: str) -> bool:
    """Whether a network's name is `package.module:function`, code of the user's own."""
    return ":" in model


def has_regulariser(loss: str) -> bool:
    """Whether the loss of this name has the MSE term, lambda and phi (Eq. 12): each but SDT's cross-entropy (Eq. 7)."""
    return loss != "sdt"


def section(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """What has a name that begins with `prefix`, by the rest of it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
