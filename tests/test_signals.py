"""SIGHUP, which the end of a terminal's session sends, is treated as SIGTERM where nobody else treats it."""

from __future__ import annotations

import signal

import pytest

from tetdeploy.system.signals import deferred_interrupt, handled, terminations

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
