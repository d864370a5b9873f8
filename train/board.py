"""TensorBoard: the numbers of metrics.jsonl as curves, in the run's folder `tensorboard`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tetdeploy.storage.files import is_utf8
from tetdeploy.system.extras import import_extra

FOLDER = "tensorboard"
Board = Callable[[dict[str, Any]], None]  # takes a line of metrics.jsonl


def check_board(out: Path) -> None:
    """Refuse what `tensorboard` cannot do.

    Raises:
        OSError: `out` is no path that TensorBoard takes.
        MissingExtraError: the package tensorboard is not installed.
    """
    if not is_utf8(out):
        raise OSError(
            f"cannot write {out}: TensorBoard takes no path that is not UTF-8; choose another --out, or leave out "
            "--tensorboard"
        )
    import_extra("tensorboard", "tensorboard")


def goes_on(out: Path) -> bool:
    """Whether an earlier part of the run in `out` wrote curves, so that they go on; where the package is missing they
    do not, and a warning says so."""
    if not (out / FOLDER).is_dir():
        return False
    there = importlib.util.find_spec("tensorboard") is not None
    if not there:
        text = f"{out / FOLDER}: the curves end here, as the package tensorboard is not installed"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return there


@contextmanager
def tensorboard(out: Path, *, epochs_done: int) -> Iterator[Board]:
    """Yield what writes a finished epoch's numbers; the epoch is the step of every curve.

    Args:
        out: run folder.
        epochs_done: where a resumed run goes on; what an earlier session wrote of later epochs is hidden.
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
