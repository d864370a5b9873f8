"""SIGHUP, which the end of a terminal's session sends, is treated as SIGTERM where nobody else treats it. A second
Ctrl-C ends what hears none."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tetdeploy.system.signals import deferred_interrupt, handled, second_ctrl_c_ends, terminations

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")


def test_sighup_interrupts_as_sigterm_does_within_others_too() -> None:
    with handled(signal.SIG_DFL, signal.SIGHUP, signal.SIGTERM):
        with handled(lambda *_: pytest.fail("not handled"), *terminations()), deferred_interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_sighup_that_is_ignored_or_means_something_else_is_left_alone() -> None:
    seen = []
    with handled(signal.SIG_IGN, signal.SIGHUP, signal.SIGTERM), deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
    with handled(lambda *_: seen.append("reload"), signal.SIGHUP), deferred_interrupt() as other:
        signal.raise_signal(signal.SIGHUP)
    assert seen == ["reload"] and not interrupt.is_set() and not other.is_set()


COMPUTING = """
import hashlib, signal
from tetdeploy.system.signals import handled, second_ctrl_c_ends
with handled(lambda *_: None, signal.SIGINT), second_ctrl_c_ends():
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # in C, for minutes, while Python calls no handler
"""


def test_the_second_ctrl_c_ends_what_hears_none() -> None:
    with subprocess.Popen([sys.executable, "-c", COMPUTING], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "computing\n"
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_one_ctrl_c_ends_nothing_and_the_watch_is_over_afterwards() -> None:
    seen: list[int] = []
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGHUP]
    for _ in range(2):
        with handled(lambda number, _: seen.append(number), *set(numbers)), second_ctrl_c_ends():
            for number in numbers:
                signal.raise_signal(number)
    assert seen == numbers * 2 and signal.set_wakeup_fd(-1) == -1
