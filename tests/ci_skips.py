"""In CI a test may be skipped only for what its machine may lack: what it installed itself must be tested.

Without this all is green where the native operators were not compiled or a package of an extra does not import:
hundreds of tests skip, and pytest's exit status is 0.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import pytest

EXPECTED = (  # besides all that the marker `gpu` is for
    r"TETDEPLOY_DATA (names no|does not name a) folder",
    r"this machine has (no IPv6|an NVIDIA driver)$",
    r"this processor, or its system, (cannot|has no AMX)$",
    r"this processor has AMX$",
    r"one core has no second thread to start$",
    r"qemu-x86_64 .*is not installed$",
    r"needs (nvidia-pytriton|norse$|sinabs$|curl$|git$|/dev/full$)",
    r"root (writes into read-only folders|may write anywhere)$",
    r"has no device that is always full$",
    r"finds the processes in /proc$",
    r"another C library keeps its memory as it likes$",
    r"(channels-last alone is fused|float16 has no kernels) on a CPU$",
)
WITHOUT_COMPILER = r"the native operator was not compiled"

_unexpected: list[str] = []


def expected(reason: str, markers: Mapping[str, Any]) -> bool:
    """Whether CI may skip for `reason` a test with these markers."""
    known = EXPECTED if shutil.which("cc") else (*EXPECTED, WITHOUT_COMPILER)
    return "gpu" in markers or any(re.match(one, reason) for one in known)


def _judge(report: pytest.CollectReport | pytest.TestReport, markers: Mapping[str, Any]) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and os.environ.get("TETDEPLOY_CI") == "1":
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not expected(reason, markers):
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _judge(report, {})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _judge(report, report.keywords)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unexpected:
        terminalreporter.section("skipped, but not for want of what a machine of CI may lack", red=True)
        for line in _unexpected:
            terminalreporter.line(line)
