"""Ctrl-C between two batches, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tetdeploy.signals import handled


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C instead of raising KeyboardInterrupt in the middle of an update.

    The second one raises. SIGTERM, which a cluster's scheduler and `torchrun` send before they kill, sets it too.
    """
    interrupt = threading.Event()

    def record(number: int, frame: FrameType | None) -> None:
        interrupt.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(record, signal.SIGINT, signal.SIGTERM):
        yield interrupt
