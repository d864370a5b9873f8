"""Whether a label means the same class to the data as to the model, and class names where only UTF-8 goes."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from tetdeploy.names import is_npz


def check_classes(
    model: str, own_names: tuple[str, ...], data: str, names: tuple[str, ...], *, known: bool = True
) -> None:
    """Refuse, with ValueError, data to which a label means another class than to the model. A .npz, or a set that is
    not `known` but was made in Python, need not name its classes, which are numbered then, nor have them all. Folders
    named by numbers are classes in the order of texts, 10 before 2: to these, numbers mean others."""
    if names == own_names:
        return
    alike = all(other == own for other, own in zip(names, own_names, strict=False))
    numbered = _are_numbers(names) or _are_numbers(own_names)
    if (is_npz(data) or not known) and (
        names == own_names[: len(names)] or (numbered and (alike or not set(names) & set(own_names)))
    ):
        return
    pairs = enumerate(zip(names, own_names, strict=False))
    first = next(
        (f"; label {k} means {other} to it, and {own} to {model}" for k, (other, own) in pairs if other != own), ""
    )
    own, others = (
        f"{len(n)} class{'es' * (len(n) != 1)} ({', '.join(map(str, n[:3]))}{', ...' * (len(n) > 3)})"
        for n in (own_names, names)
    )
    raise ValueError(
        f"the labels of {data} do not match the model's: it has {others}, {model} knows {own}{first}"
        f"{other_form(set(names) - set(own_names), set(own_names) - set(names))}; is this the data it was trained on?"
    )


def other_form(names: Iterable[str], others: Iterable[str]) -> str:
    """What to say of names that look alike and differ: é is one character, or two, as in archives of macOS."""
    own, theirs = ({unicodedata.normalize("NFC", str(name)) for name in kept} for kept in (names, others))
    return ", some in their Unicode form alone, NFC or NFD" if own & theirs else ""


def as_utf8(name: str) -> str:
    """A name where only UTF-8 goes. Bytes of a folder's name that are none stand as JSON files have them, `caf\\udce9`:
    with one sign for all of them two classes might have one name."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _are_numbers(names: tuple[str, ...]) -> bool:
    return names == tuple(str(k) for k in range(len(names)))
