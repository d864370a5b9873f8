"""Several gloo processes on this machine, for what one process cannot show."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.distributed import TCPStore

from tetdeploy.train.ranks import process_group

_SECONDS = 300


def on_ranks(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in `size` processes of one group; what one raises is raised here, and so is that they do
    not end: where ranks disagree about what to exchange, they wait for each other."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # holds its port until they have ended
    processes = multiprocessing.spawn(_one, (size, store.port, work, arguments), nprocs=size, join=False)  # type: ignore[no-untyped-call]
    end = time.monotonic() + _SECONDS
    while not processes.join(timeout=1.0):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise AssertionError(f"the ranks have not ended after {_SECONDS} s")


def _one(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is there already, as under torchrun
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()  # or a collection by chance might free what holds the group
    with process_group():
        group = weakref.ref(distributed.group.WORLD)
        work(*arguments)
    assert group() is None, "the group outlives its end; its threads may abort the process when Python ends"


def save(folder: Path, rank: int, **values: Any) -> None:
    torch.save(values, folder / f"rank-{rank}.pt")


def load(folder: Path, rank: int) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(folder / f"rank-{rank}.pt", weights_only=True)
    return values
