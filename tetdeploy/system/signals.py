"""Handlers of signals for as long as a block runs; Ctrl-C between two batches, never inside one, and never lost."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, *numbers: signal.Signals
) -> Iterator[None]:
    """Let these signals call `handler` within it, or do what `signal.SIG_DFL` says. Outside the main thread Python
    delivers none: nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def uninterrupted() -> AbstractContextManager[None]:
    """Let Ctrl-C and what `terminations` names pass unheard: for what is short and has to be done to its end."""
    return handled(lambda *_: None, signal.SIGINT, *terminations())


@contextmanager
def lost_interrupts_raised_again() -> Iterator[None]:
    """Within it, a KeyboardInterrupt that Python lost, and would only print, is raised again a moment later.

    Handlers of signals run before the next instruction in Python. After long work in C that is often the callback of a
    weak reference to what the work freed, or a `__del__`, out of which no exception comes.
    """
    before = sys.unraisablehook
    ended = threading.Event()

    def interrupt() -> None:
        if not ended.wait(0.01):  # by when the callback is over
            _thread.interrupt_main()

    def hook(unraisable: sys.UnraisableHookArgs, /) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, where SIGTERM interrupted
        _thread.start_new_thread(interrupt, ())  # raised in the hook, it would be lost once more

    sys.unraisablehook = hook
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = before


@contextmanager
def second_ctrl_c_ends() -> Iterator[None]:
    """Let the second Ctrl-C end the process with exit code 130, also while foreign code computes and no handler in
    Python is called, as long as it lets other threads run. Other signals may come twice for one reason: a shell sends
    SIGHUP, and so does the system."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals, arrived = socket.socketpair()

    def watch() -> None:
        count = 0
        while number := signals.recv(1):
            count += number[0] == signal.SIGINT
            if count == 2:
                os._exit(130)

    watcher = threading.Thread(target=watch, daemon=True)
    arrived.setblocking(False)
    before = signal.set_wakeup_fd(arrived.fileno())
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        arrived.close()
        watcher.join()
        signals.close()


def terminations() -> tuple[signal.Signals, ...]:
    """SIGTERM and, treated alike, SIGHUP, which a terminal's end sends: not where it is ignored (`nohup`), is handled
    otherwise, or is not there (Windows)."""
    hangup, term = getattr(signal, "SIGHUP", None), signal.getsignal(signal.SIGTERM)
    if hangup is None or signal.getsignal(hangup) not in {signal.SIG_DFL, term} - {signal.SIG_IGN, None}:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, hangup)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C instead of raising KeyboardInterrupt in the middle of an update.

    The second one raises. SIGTERM, which a cluster's scheduler and `torchrun` send before they kill, sets it too, and
    so does SIGHUP, see `terminations`.
    """
    interrupt = threading.Event()

    def record(number: int, frame: FrameType | None) -> None:
        interrupt.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with handled(record, signal.SIGINT, *terminations()):
        yield interrupt
