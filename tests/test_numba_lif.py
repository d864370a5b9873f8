"""The compiled kernels leave torch's number of threads as it was, and know bfloat16 as torch does."""

from __future__ import annotations

import errno
import importlib.util
import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tetdeploy import kernels

SCRIPT = """
import multiprocessing, torch, warnings
from tetdeploy import kernels
from tetdeploy.neurons import lif

lif(torch.ones(2, 3))
print(torch.get_num_threads(), flush=True)

warnings.simplefilter("ignore")  # Python's own, of a fork beside threads
x = torch.linspace(0, 2, 500_000).expand(4, 500_000).contiguous()  # more than one thread would take

def spikes(k):
    return lif(x)[0].numpy()

torch.set_num_threads(2)
expected = spikes(0)
assert kernels.by_numba(x) is not None
with multiprocessing.get_context("fork").Pool(1) as pool:
    (found,) = pool.map_async(spikes, [0]).get(60)
assert (found == expected).all() and kernels.by_numba(x) is not None
"""


@pytest.fixture(scope="module")
def process() -> subprocess.CompletedProcess[str]:
    """Calls the kernels for the first time, and forks."""
    pytest.importorskip("numba")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no second thread to start")
def test_the_first_call_does_not_raise_torchs_number_of_threads(process: subprocess.CompletedProcess[str]) -> None:
    assert process.stdout.split() == ["1"], process.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_without_numba(process: subprocess.CompletedProcess[str]) -> None:
    assert process.returncode == 0, process.stderr


def test_two_processes_keep_a_kernel_for_two_dtypes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two threads here, each of which has read the index before the other writes it, unless they take turns."""
    numba = pytest.importorskip("numba")
    caching = pytest.importorskip("numba.core.caching")
    from tetdeploy.kernels import numba_kernels

    def twice(x: Any) -> Any:
        return x + x

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    numbers = np.float32(1.5), np.float64(1.5)
    kernels = [numba_kernels.compiled(twice, parallel=False) for _ in numbers]
    for kernel, number in zip(kernels, numbers, strict=True):
        kernel(number)
        kernel._cache.flush()  # a folder as it was before either was kept
    load, both = caching.IndexDataCacheFile._load_index, threading.Barrier(2)

    def loaded(self: Any) -> Any:
        index = load(self)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return index

    def keep(kernel: Any) -> None:
        ((arguments, made),) = kernel.overloads.items()
        kernel._cache.save_overload(arguments, made)

    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(caching.IndexDataCacheFile, "_load_index", loaded)
        list(pool.map(keep, kernels))
    kept = numba_kernels.compiled(twice, parallel=False)
    assert [kept(number) for number in numbers] == [3, 3]
    assert sum(kept.stats.cache_hits.values()) == 2


@pytest.mark.parametrize(
    ("installed", "named", "folder"),
    [(True, "", "user/numba"), (True, "named", "named"), (False, "", "code"), (False, "named", "named")],
)
def test_kernels_of_an_installed_package_are_not_kept_in_it(
    installed: bool, named: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once pip had removed the package, Python would import what is left of its folder."""
    numba_kernels = pytest.importorskip("tetdeploy.kernels.numba_kernels")
    import numba

    monkeypatch.setattr(numba_kernels, "_INSTALLED", installed)
    setting = str(tmp_path / named) if named else ""
    monkeypatch.setattr(numba.config, "CACHE_DIR", setting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    code = tmp_path / "code" / "twice.py"
    code.parent.mkdir()
    code.write_text("def twice(number):\n    return 2 * number\n")
    kernel = numba_kernels.compiled(runpy.run_path(str(code))["twice"], parallel=False)
    assert kernel(3) == 6
    assert Path(kernel._cache.cache_path).is_relative_to(tmp_path / folder)
    assert {part.relative_to(tmp_path).parts[0] for part in tmp_path.rglob("*.nbi")} == {folder.split("/")[0]}
    assert setting == numba.config.CACHE_DIR


def test_without_a_home_kernels_of_an_installed_package_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with any user's number; a folder named `~` would lie in the current one."""
    numba_kernels = pytest.importorskip("tetdeploy.kernels.numba_kernels")
    monkeypatch.setattr(numba_kernels, "_INSTALLED", True)
    monkeypatch.setattr(numba_kernels.numba.config, "CACHE_DIR", "")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))
    monkeypatch.chdir(tmp_path)
    assert numba_kernels.compiled(lambda number: 2 * number, parallel=False)(3) == 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_a_kernel_is_kept_where_nothing_can_be_locked(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from tetdeploy.kernels import numba_kernels

    lock = Mock(side_effect=error)
    monkeypatch.setattr(numba_kernels, "FileLock", lock)
    cache = SimpleNamespace(cache_path="folder", load_overload=lambda *sought: sought, save_overload=abs)
    kernel = numba_kernels._kept_in_turn(SimpleNamespace(_cache=cache))
    assert kernel._cache.load_overload("signature", "context") == ("signature", "context")
    lock.assert_called_once_with(Path("folder", "tetdeploy.lock"), timeout=60, fallback_to_soft=False)
    assert numba_kernels._kept_in_turn(abs) is abs  # what is not compiled has no such cache


@pytest.mark.parametrize("name", ["load_overload", "save_overload"])
def test_a_kernel_runs_where_the_disk_is_full_or_the_files_are_anothers(name: str, tmp_path: Path) -> None:
    numba_kernels = pytest.importorskip("tetdeploy.kernels.numba_kernels")
    access = Mock(side_effect=OSError)
    file = SimpleNamespace(_index_path=tmp_path / "none.nbi")
    cache = SimpleNamespace(cache_path=tmp_path, load_overload=access, save_overload=access, _cache_file=file)
    numba_kernels._kept_in_turn(SimpleNamespace(_cache=cache))
    assert getattr(cache, name)("signature", "context") is None  # to numba: there is none, compile it
    access.assert_called_once_with("signature", "context")


def test_what_could_not_be_kept_leaves_no_older_kernel_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the disk is full once numba has written the index, which names the file of the kernel before."""
    pytest.importorskip("tetdeploy.kernels.numba_kernels")
    from numba.core.caching import IndexDataCacheFile

    def answer(number: int) -> int:
        """Of the kernel in the file, as a new process reads it, after it was changed to that number."""
        code = f"compiled\ndef f():\n    return {number}\nf = compiled(f, parallel=False)"
        (tmp_path / "kernel.py").write_text(f"from tetdeploy.kernels.numba_kernels import {code}")
        spec = importlib.util.spec_from_file_location("kernel", tmp_path / "kernel.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found: int = module.f()
        return found

    assert answer(1) == 1
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        assert answer(22) == 22
    assert answer(22) == 22


def test_a_numba_that_refuses_this_numpy_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    kernels._numba_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain PyTorch operations, slower: numba says Numba needs NumPy"):
            assert kernels.numba_for(torch.float32) is None
    finally:
        kernels._numba_kernels.cache_clear()


def test_bfloat16_is_read_and_written_as_torch_does() -> None:
    compiled, numba = pytest.importorskip("tetdeploy.kernels.numba_kernels"), pytest.importorskip("numba")
    store, value, memory = compiled.store, compiled.value, compiled.memory

    @numba.njit
    def written(numbers, into):  # type: ignore[no-untyped-def]
        for i in range(len(numbers)):
            into[i] = store(numbers[i], into)

    @numba.njit
    def read(numbers, into):  # type: ignore[no-untyped-def]
        for i in range(len(numbers)):
            into[i] = value(numbers[i])

    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = torch.arange(0, 2**16, 7) * 2**16 + 2**15
    numbers = torch.cat([bits, ties, ties + 1, ties - 1]).to(torch.int32).view(torch.float32)
    got = torch.empty(len(numbers), dtype=torch.bfloat16)
    written(memory(numbers), memory(got))
    wanted = numbers.bfloat16()
    known = ~wanted.isnan()
    assert torch.equal(got[known].view(torch.int16), wanted[known].view(torch.int16))
    assert got[~known].isnan().all() and 100 < (~known).sum() < len(numbers) / 10

    back = torch.empty(len(numbers))
    read(memory(wanted), memory(back))
    assert torch.equal(back[known], wanted[known].float()) and back[~known].isnan().all()
