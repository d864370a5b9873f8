"""What arguments and the fields of configurations must be, for errors that name them. Needs no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def check_flags(config: Any) -> None:
    """Refuse what is neither True nor False in the fields of a dataclass annotated `bool`: a text such as "no" is true.
    NumPy's own are refused too, for JSON does not hold them.

    Raises:
        ValueError: it is so.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (bool, "bool") and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be True or False, got {value!r}")
