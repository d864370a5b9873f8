"""Several gloo processes on this machine, for what one process cannot show."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tetdeploy.train.ranks import process_group


def on_ranks(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in `size` processes of one group; what one raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_one, (size, port, work, arguments), nprocs=size)  # type: ignore[no-untyped-call]


def _one(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with process_group():
        work(*arguments)


def save(folder: Path, rank: int, **values: Any) -> None:
    torch.save(values, folder / f"rank-{rank}.pt")


def load(folder: Path, rank: int) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(folder / f"rank-{rank}.pt", weights_only=True)
    return values
