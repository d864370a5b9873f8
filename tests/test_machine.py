"""How many cores a process may use, and what follows from that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from export_helpers import exported

from tetdeploy import Engine, __main__
from tetdeploy.system import machine
from tetdeploy.system.signals import handled


def group(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int = 8) -> None:
    """A machine with so many cores and control groups."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", folder)
    monkeypatch.setattr(machine, "_OWN_GROUPS", folder / "own")
    monkeypatch.setattr(machine, "_CORES", folder)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)


def version_1(quota: str, period: str, group: str = "cpu") -> dict[str, str]:
    return {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "cores", "usable"),
    [
        ({}, 8, 8),
        ({}, 3, 3),
        ({"cpu.max": "200000 100000\n"}, 8, 2),
        ({"cpu.max": "150000 100000\n"}, 8, 2),
        ({"cpu.max": "10000 100000\n"}, 8, 1),
        ({"cpu.max": "400000 100000\n"}, 3, 3),
        ({"cpu.max": "max 100000\n"}, 8, 8),
        ({"cpu.max": "garbage\n"}, 8, 8),
        (version_1("250000\n", "100000\n"), 8, 3),
        (version_1("-1\n", "100000\n"), 8, 8),
        ({"cpu/cpu.cfs_quota_us": "250000\n"}, 8, 8),
        ({"own": "0::/a.slice/b\n", "a.slice/b/cpu.max": "200000 100000\n", "b/cpu.max": "100000 100000\n"}, 8, 2),
        ({"own": "0::/a.slice/b\n", "a.slice/b/cpu.max": "max 100000\n", "a.slice/cpu.max": "300000 100000\n"}, 8, 3),
        ({"own": "0::/..\n4:cpu,cpuacct:/docker/a\n", **version_1("250000\n", "100000\n")}, 8, 3),
        (version_1("200000", "100000", "cpu/a") | {"own": "4:cpu,cpuacct:/a\n1:name=x:/b\n", "b/cpu.max": "1 1"}, 8, 2),
    ],
)
def test_a_quota_counts_where_it_is_less_than_the_affinity(
    files: dict[str, str], cores: int, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path, monkeypatch, files, cores)
    assert machine.usable_cores() == usable
    assert machine.default_threads() == (usable if usable < 8 else None)


@pytest.mark.parametrize(
    ("quota", "cores", "threads"), [("max", 8, None), ("max", 7, 4), ("max", 3, 2), ("600000", 8, 4), ("300000", 8, 3)]
)
def test_threads_are_no_more_than_physical_cores(
    quota: str, cores: int, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which this machine has four, with two logical ones each: 0 and 1, 2 and 3, ..."""
    for core in range(8):
        topology = tmp_path / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{core // 2 * 2}-{core // 2 * 2 + 1}\n")
    group(tmp_path, monkeypatch, {"cpu.max": f"{quota} 100000\n"}, cores)
    assert machine.default_threads() == threads


@pytest.mark.parametrize(("quota", "asked", "threads"), [("200000", None, 2), ("200000", 4, 4), ("max", None, 0)])
def test_an_engine_heeds_a_quota(
    quota: str, asked: int | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path, monkeypatch, {"cpu.max": f"{quota} 100000"})
    options = Engine(exported("step"), threads=asked)._session.get_session_options()
    assert options.intra_op_num_threads == threads  # 0: ONNX Runtime's own choice


@pytest.mark.parametrize(("own", "threads"), [(None, "2"), ("", "2"), ("5", "5")])
def test_commands_heed_a_quota(own: str | None, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path, monkeypatch, {"cpu.max": "200000 100000"})
    monkeypatch.setenv("GOMP_SPINCOUNT", "30")
    monkeypatch.setenv("OMP_NUM_THREADS", own or "")
    if own is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    said: list[Any] = []
    monkeypatch.setattr("tetdeploy.cli.main", lambda **options: said.append(os.environ["OMP_NUM_THREADS"]))
    with handled(signal.default_int_handler, signal.SIGINT):  # which it leaves as the process should end with it
        __main__.main()
    assert said == [threads]


@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, "1000"),
        ({"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}, "1000"),
        ({"GOMP_SPINCOUNT": "30"}, "30"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_waiting_threads_of_commands_sleep_soon_unless_told_otherwise(own: dict[str, str], spins: str | None) -> None:
    environment = {"OMP_NUM_THREADS": "2", **own}
    __main__._settle_openmp(environment)
    assert environment.get("GOMP_SPINCOUNT") == spins
