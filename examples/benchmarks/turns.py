"""Sides of a benchmark, each in a process of its own: what fails says why and takes nothing with it.

A process runs only while it is asked and is stopped (SIGSTOP) in between: threads that wait for one library's next call
would take the cores from another's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

Answer = Callable[[Any], Any]
LIMIT_S = 600.0  # of one answer, which may compile or build engines first


class Worker:
    """A side's process, which starts with the first request.

    Args:
        open_side: a module's function; called in the process, returns what answers requests.
        arguments: for it.
        limit_s: how long an answer may take, seconds; then the side has failed and its process is killed.
    """

    def __init__(self, open_side: Callable[..., Answer], *arguments: Any, limit_s: float = LIMIT_S) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, open_side, arguments), daemon=True)
        self._limit_s = limit_s
        self.failed, self.hung = "", False
        atexit.register(self.kill)

    def ask(self, request: Any) -> Any:
        """The answer; None once the side has failed, `failed` being the reason."""
        if self.failed:
            return None
        if self._process.pid is None:
            self._process.start()
            self._theirs.close()  # so that the end of the process is the end of the connection
        try:
            self._signal(signal.SIGCONT)
            self._connection.send(request)
            if not self._connection.poll(self._limit_s):
                self.failed, self.hung = f"no answer within {self._limit_s:g} s", True
                self.kill()
                return None
            self.failed, answer = self._connection.recv()
            self._signal(signal.SIGSTOP)
        except (EOFError, OSError):
            self._process.join(10)
            self.failed, answer = f"its process ended with {self._process.exitcode}", None
        if self.failed:
            self.end()
        return answer

    def end(self) -> None:
        with suppress(OSError):  # it has ended
            self._signal(signal.SIGCONT)
            self._connection.send(None)
            self._process.join(30)
        self.kill()

    def kill(self) -> None:
        """At once: a process that is stopped takes no other signal, and this one would wait for it when it ends."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def _serve(connection: Connection, open_side: Callable[..., Answer], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who asks ends this
    answer: Answer | None = None
    while (request := connection.recv()) is not None:
        try:
            answer = answer or open_side(*arguments)
            connection.send(("", answer(request)))
        except Exception as error:
            lines = str(error).strip().splitlines()
            connection.send((f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, None))
