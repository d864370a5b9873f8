"""JSON as it is written, and what it must look like, as far as it is read. Whatever else it holds is left alone.

A form is a type, a tuple of the texts that it may be, `NUMBER`, `AMOUNT`, `FRACTION`, `COUNT`, `STEP`, a list with the
form of every item, or a dict of forms by key, where `"*"` is every key and a key with `!` must be there. What need not
be there may be null.
"""

from __future__ import annotations

import json
import math
from typing import Any

NUMBER, LOOSE_NUMBER = "a finite number", "a number"
COUNT, STEP = "a whole number of at least 0", "a whole number of at least 1"
AMOUNT, FRACTION = "a finite number of at least 0", "a number from 0 to 1"


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON. That has no NaN and no infinities, so null stands for them."""
    return json.dumps(_with_null(value), indent=indent, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> Any:
    """`value` as it will be read from a file: tuples become lists.

    Raises:
        TypeError: it holds what JSON has no form for.
        ValueError: it holds what `parse_json` refuses.
    """
    return parse_json(json_text(value))


def parse_json(text: str | bytes) -> Any:
    """What JSON of a file holds.

    Raises:
        ValueError: it is none, or nested so deeply that Python gives up, or has a whole number beyond 64 bits.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(digits: str) -> int:
    if not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"a whole number is beyond 64 bits: {_shown(value)}")
    return value


def check_form(value: Any, form: Any, where: str = "it") -> None:
    """Compare JSON with a form.

    Raises:
        ValueError: it does not fit; the message names the place, and what it must be.
    """
    if isinstance(form, dict):
        _check_object(value, form, where)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {_shown(value)}")
        for k, item in enumerate(value):
            check_form(item, form[0], f"{where}[{k}]")
    elif not _is(value, form):
        wanted = form.__name__ if isinstance(form, type) else form if isinstance(form, str) else " or ".join(form)
        raise ValueError(f"{where} must be {wanted}, got {_shown(value)}")


def _check_object(value: Any, forms: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_shown(value)}")
    prefix = "" if where == "it" else f"{where}."
    for key, form in forms.items():
        name = key.removesuffix("!")
        if key.endswith("!") and value.get(name) is None:
            raise ValueError(f"{prefix}{name} is missing")
        for found in value if key == "*" else [name]:
            if key == "*" or value.get(found) is not None:
                check_form(value[found], form, f"{prefix}{found}")


def _is(value: Any, form: Any) -> bool:
    if isinstance(form, tuple):
        return value in form
    if isinstance(form, type):
        return isinstance(value, form)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is None and form not in (COUNT, STEP)
    if form in (COUNT, STEP):
        return isinstance(value, int) and value >= (form == STEP)
    if form == FRACTION:
        return 0 <= value <= 1
    return form == LOOSE_NUMBER or (math.isfinite(value) and (value >= 0 or form != AMOUNT))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
