"""Words for messages: many names in one line, a number with its noun, what an error says, text of unknown origin."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def quoted(*words: object) -> str:
    """Words as they are typed into a shell; on Windows into cmd or PowerShell."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if sys.platform == "win32" else shlex.join(texts)


def in_one_line(error: BaseException) -> str:
    """All that an error says, in a line; of one without text its type."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error says, in a line; of one without text, as MemoryError often is, its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# C0 but for tab and newline, DEL and C1, which terminals obey, and what turns the direction of the text around it.
_UNSEEN = dict.fromkeys([*{*range(32), *range(0x7F, 0xA0)} - {9, 10}, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def visible(text: str) -> str:
    """Text that may come from a foreign file, for a terminal: without the characters that would steer it."""
    return text.translate(_UNSEEN)
