"""A terminal or pipe that lacks a character of ours, such as µ in ASCII, gets one that is like it, not a traceback."""

from __future__ import annotations

import codecs
import io
import sys

_LIKE = {"µ": "u", "±": "+-", "×": "x", "–": "-", "…": "...", "λ": "lambda"}


def replace_lacking_characters() -> None:
    """From now on stdout writes what is like a character that its encoding lacks, or `?`; bytes of paths stay."""
    codecs.register_error("tetdeploy.like", _like)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="tetdeploy.like")


def _like(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    like = "".join(c if "\udc80" <= c <= "\udcff" else _LIKE.get(c, "?") for c in lacking)
    return like.encode("ascii", "surrogateescape"), error.end
