"""What arguments and the fields of configurations must be. Needs no torch.

Each function raises ValueError for what it refuses; `name` is what the error calls that.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import fields
from os import PathLike
from typing import Any

import numpy as np


def check_flags(config: Any) -> None:
    """`check_flag` for the fields of a dataclass annotated `bool`."""
    for field in fields(config):
        if field.type in (bool, "bool"):
            check_flag(field.name, getattr(config, field.name))


def check_flag(name: str, value: Any, *, or_none: bool = False) -> None:
    """Refuse what is neither True nor False, nor, with `or_none`, None: a text such as "no" is true. NumPy's own are
    refused too, for JSON does not hold them."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise ValueError(f"{name} must be True or False{', or None' * or_none}, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of the `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_number(name: str, value: Any) -> float:
    """A number, of Python, of NumPy, or a tensor of one, as one of Python."""
    if isinstance(value, int | float) and not isinstance(value, bool):  # so is what torch.compile leaves open
        return value
    if isinstance(value, bool | np.bool_ | str) or np.ndim(value) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_count(name: str, number: Any, most: int | None = None) -> int:
    """A whole number of at least 1, and at most `most` if that is given; see `check_whole`."""
    count = check_whole(name, number)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {count}")
    return count


def check_whole(name: str, number: Any) -> int:
    """A whole number, of Python or NumPy, as one of Python; `2.0` and `True` are none."""
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {number!r}") from None


def check_unmasked(name: str, value: Any) -> None:
    """Refuse a masked array, whose mask would be dropped."""
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask would be lost; give x.filled(0), or another value")


def check_path(name: str, value: Any, what: str) -> None:
    """Refuse what is no path; `what` says of what it must be one."""
    if isinstance(value, bytes | bytearray | memoryview):  # of a model some MB, which no message should repeat
        raise ValueError(f"{name} must be the path of {what}, got {len(value):,} bytes; write them to a file")
    if not isinstance(value, str | PathLike):
        raise ValueError(f"{name} must be the path of {what}, got {value!r}")


def check_type(name: str, value: Any, kind: type, remedy: str = "") -> None:
    """Refuse what is no `kind`; the message ends in `remedy`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}{remedy and '; '}{remedy}")
