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


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


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


def section(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """What has a name that begins with `prefix`, by the rest of it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def first_line(error: BaseException) -> str:
    """What an error says, in a line; of one without text, as MemoryError often is, its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_classes(
    model: str, own_names: tuple[str, ...], data: str, names: tuple[str, ...], *, known: bool = True
) -> None:
    """Refuse data to which a label means another class than to the model. A .npz, or a set that is not `known` but was
    made in Python, need not name its classes, which are numbered then, nor have them all.

    Raises:
        ValueError: it is so.
    """
    if names == own_names:
        return
    if (is_npz(data) or not known) and (
        names == own_names[: len(names)]
        or _are_numbers(names)
        or (_are_numbers(own_names) and not set(names) & set(own_names))
    ):
        return
    pairs = enumerate(zip(names, own_names, strict=False))
    first = next(
        (f"; label {k} means {other} to it, and {own} to {model}" for k, (other, own) in pairs if other != own), ""
    )
    own, others = (f"{len(n)} classes ({', '.join(n[:3])}{', ...' * (len(n) > 3)})" for n in (own_names, names))
    raise ValueError(
        f"the labels of {data} do not match the model's: it has {others}, {model} knows {own}{first}; "
        "is this the data it was trained on?"
    )


def _are_numbers(names: tuple[str, ...]) -> bool:
    return names == tuple(str(k) for k in range(len(names)))
