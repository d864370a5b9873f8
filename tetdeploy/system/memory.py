"""Memory of large arrays on a CPU, which are made anew at each step."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@contextmanager
def reused_memory() -> Iterator[None]:
    """Within it memory that is freed stays with the process, which takes it again at the next step.

    The GNU C library gives blocks above 32 MB back at once, so that each activation of that size comes as new pages,
    which the system clears: a fifth of a training step in float32, and of the check of an export. Nothing happens with
    another C library.
    """
    mallopt, trim = (getattr(_c_library(), name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    try:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        yield
    finally:  # to where the library's own adjustment ends, which the first call has switched off for good
        mallopt(_M_MMAP_MAX, 65_536)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        trim(0)


def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
