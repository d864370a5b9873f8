"""A terminal or pipe that lacks a character of ours, such as µ in ASCII, gets one that is like it, not a traceback."""

from __future__ import annotations

import codecs
import io
import sys

_LIKE = {"µ": "u", "±": "+-", "×": "x", "–": "-", "…": "...", "λ": "lambda"}


def replace_lacking_characters() -> None:
    """From now on stdout writes what is like a character that its encoding lacks, or `?`."""
    codecs.register_error("tetdeploy.like", _like)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="tetdeploy.like")


def _like(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_LIKE.get(character, "?") for character in error.object[error.start : error.end]), error.end
