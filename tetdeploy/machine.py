"""This machine: its processor, the cores at hand, and how busy it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """How many processes ran or waited to, on the average of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_model(cpuinfo: Iterable[str]) -> str:
    """The processor's name by /proc/cpuinfo, or else by Python."""
    fields: Mapping[str, str] = {
        key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in cpuinfo) if colon
    }
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()


def read_cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo, where there is one."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
