"""The processes that train one network together, as `torchrun` starts them; one alone is the usual case.

Each process (a rank) holds the whole network and takes its share of every global batch. Gradients, tdBN's statistics
and the numbers of metrics.jsonl go over all shares, so that a run ends the same, to float error, however many ranks it
has. Rank 0 alone writes and prints.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import torch
from torch import Tensor
from torch import distributed as dist

from tetdeploy.system.signals import handled, terminations, uninterrupted
from tetdeploy.wording import first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

V = TypeVar("V")

_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # and WORLD_SIZE, which others set as well
# What PyTorch's backends say when another process is gone: gloo as a plain RuntimeError, NCCL as a DistBackendError.
_LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused", "NCCL", "gloo")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is.

    Attributes:
        rank: of this process, from 0.
        size: of all.
        local_rank: of this process on its machine; it takes the GPU of that number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This rank's part of a global batch."""
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def check_batch(self, batch_size: int, num_images: int) -> None:
        """Refuse a global batch, of all images if there are no more, that has no equal shares.

        Raises:
            ValueError: it does not divide.
        """
        images = min(batch_size, num_images)
        if images % self.size:
            raise ValueError(
                f"a batch of {images} images has no {self.size} equal shares, one for each process; "
                f"choose a --batch-size that is a multiple of {self.size}, of at most {num_images}"
            )

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, elementwise, the same bits on each; waits for none on a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Goes over the CPUs, so that no GPU waits."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([int(flag)])).item())

    def agreed(self, value: V) -> V:
        """What rank 0 calls the value: the folder of a new run, for instance."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def first(self) -> Iterator[None]:
        """Each machine's first process goes through the block before its others: it downloads and decodes, they read
        what it kept; and what is wrong for all is said once.

        Raises:
            ConnectionError: the first one failed, or that of another machine.
        """
        if self.local_rank == 0:
            try:
                yield
            except BaseException:
                self.any(True)
                raise
        if self.any(False):
            raise ConnectionError("the first process of a machine failed, and says why")
        if self.local_rank > 0:
            yield


def current_ranks() -> Ranks:
    """The processes of this process's group; `Ranks()` where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    rank = dist.get_rank()
    return Ranks(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Within it, the processes that `torchrun` started are one group: NCCL between GPUs, gloo between CPUs.

    Does nothing where `torchrun` started none, or one alone.

    Raises:
        ConnectionError: another process of the group cannot be reached, or ended before its time.
        ValueError: the environment speaks of several processes, but not as `torchrun` does.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        yield current_ranks()
        return
    if missing := [name for name in _TORCHRUN if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several processes "
            "with torchrun, or one with WORLD_SIZE unset"
        )
    has_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if has_gpu and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    # Imported while there is a group (an optimiser does), this module holds it in the defaults of its functions.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        # PyTorch waits for the others without calling a handler in Python.
        with handled(signal.SIG_DFL, signal.SIGINT, *terminations()):
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            own = _store_of_attempt(store, rank, size)
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", store=own, rank=rank, world_size=size)
    except RuntimeError as error:
        raise ConnectionError(
            f"the processes of this run cannot reach each other ({first_line(error)}); start them again"
        ) from error
    before = sys.exception()
    try:
        yield current_ranks()
    except (RuntimeError, KeyboardInterrupt) as error:
        if not _is_lost(error):
            raise
        raise ConnectionError(
            "another process of this run has ended, and so does this one; what was written is as it was after the last "
            "epoch: go on with --resume"
        ) from error
    finally:
        _end_group(before)


def _store_of_attempt(store: Store, rank: int, size: int) -> Store:
    """The part of a store that these processes alone know, under a name that rank 0 makes up for them.

    `torchrun --max-restarts` keeps its store when it starts its processes again: they would connect to the addresses of
    those that have ended. Each rank asks for the name by one that it makes up itself, which a rank 0 of now alone can
    have answered. The number of restarts would not do for a name: each machine has its own count.

    Raises:
        RuntimeError: another rank has not come within the store's timeout.
    """
    from torch.distributed.distributed_c10d import PrefixStore  # not in every build of PyTorch

    store = PrefixStore("tetdeploy", store)
    name = uuid4().hex
    if rank > 0:
        store.set(f"asked by {rank}", name)
        name = store.get(name).decode()
        store.set(f"{name} known to {rank}", "")
        return PrefixStore(name, store)
    timeout = store.timeout  # type: ignore[attr-defined]
    end = time.monotonic() + timeout.total_seconds()
    for other in range(1, size):
        while not store.check([f"{name} known to {other}"]):
            store.set(store.get(f"asked by {other}").decode(), name)
            if time.monotonic() > end:
                raise dist.DistStoreError(f"process {other} has not come within {timeout}")
            time.sleep(0.02)
    return PrefixStore(name, store)


def _end_group(before: BaseException | None) -> None:
    """End it with all that holds it: if it outlived its end, its threads, holding tensors, might abort an interpreter
    that ends.

    A network whose gradients go over all ranks holds it, and is itself held by the frames of errors: those of the one
    that ends the run, and those that PyTorch met and keeps, in reference cycles, as it imports modules during a run.

    Args:
        before: the error that its maker was handling already, whose frames are not ours.
    """
    error = sys.exception()
    while error is not None and error is not before:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    with uninterrupted():
        gc.collect()  # meanwhile torchrun asks a process to end that is to say, after this, that another one has
        dist.destroy_process_group()


def _is_lost(error: BaseException | None) -> bool:
    """Whether it comes of another process's end. torchrun, too, sees that, and asks this one to end: an interrupt then
    meets the first error on its way here."""
    if isinstance(error, KeyboardInterrupt):
        return _is_lost(error.__context__)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
