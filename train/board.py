"""TensorBoard: the numbers of metrics.jsonl as curves, in the run's folder `tensorboard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
Board = Callable[[dict[str, Any]], None]  # takes a line of metrics.jsonl


@contextmanager
def tensorboard(out: Path, *, epochs_done: int) -> Iterator[Board]:
    """Yield what writes a finished epoch's numbers; the epoch is the step of every curve.

    Args:
        out: run folder.
        epochs_done: where a resumed run goes on; what an earlier session wrote of later epochs is hidden.

    The package tensorboard must be installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / FOLDER), purge_step=epochs_done + 1)

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                writer.add_scalar(name, value, record["epoch"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
