"""This machine: its processor, the cores at hand, and how busy it is."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from pathlib import Path, PurePosixPath

_CGROUP, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CORES = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Logical cores that this process may run on, or as many as a CPU quota is worth, if fewer: of its container or its
    systemd unit."""
    cores = len(_affinity())
    for folder, files in product(_control_groups(), (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):
        with suppress(OSError, ValueError):  # there is none; or it is "max"
            quota, period = (int(word) for file in files for word in (folder / file).read_text().split())
            if quota > 0 and period > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


def _control_groups() -> Iterator[Path]:
    """Folders of the control groups of this process and of those round them, by version 2 and version 1. A container
    sees its own in the place of the outermost, and may be told a path that it does not see."""
    own = {"": "", "cpu": ""}
    with suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    for controller in ("", "cpu"):
        group = PurePosixPath(own[controller])
        yield from (_CGROUP / controller / part for part in (group, *group.parents))


def default_threads() -> int | None:
    """Threads where none are asked for; None, which leaves it to a runtime, where this process may use all cores:
    runtimes know how many there are, but not how many are left to them. One a physical core, as they choose."""
    threads = usable_cores()
    if threads >= (os.cpu_count() or 1):
        return None
    with suppress(OSError):  # only Linux says which logical cores are of one physical one
        siblings = {(_CORES / f"cpu{core}/topology/thread_siblings_list").read_text() for core in _affinity()}
        threads = min(threads, len(siblings))
    return threads


def _affinity() -> set[int]:
    """The logical cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def load_average() -> float | None:
    """How many processes ran or waited to, on the average of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_model(cpuinfo: Iterable[str]) -> str:
    """The processor's name by /proc/cpuinfo, or else by Python."""
    fields = _fields(cpuinfo)
    return fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()


def emulates_bf16(cpuinfo: Iterable[str]) -> bool:
    """Whether this is an x86 processor without instructions that multiply bf16, by /proc/cpuinfo; False where that does
    not say."""
    flags = _fields(cpuinfo).get("flags", "").split()
    return bool(flags) and not any(f"{unit}_bf16" in flags for unit in ("amx", "avx512"))


def _fields(cpuinfo: Iterable[str]) -> Mapping[str, str]:
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in cpuinfo) if colon}


def read_cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo, where there is one."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
