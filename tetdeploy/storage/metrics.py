"""metrics.jsonl, in which a training keeps a line for each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from tetdeploy.storage.files import atomic_write, read_json_lines
from tetdeploy.storage.form import FRACTION, LOOSE_NUMBER, STEP, check_form, json_text
from tetdeploy.storage.run_folder import METRICS_NAME

_EPOCH = {
    "epoch!": STEP,
    "loss": str,
    "lr": LOOSE_NUMBER,
    "seconds": LOOSE_NUMBER,
    "train_loss": LOOSE_NUMBER,
    "train_accuracy": FRACTION,
    "val_loss": LOOSE_NUMBER,
    "val_accuracy": FRACTION,
}


def read_metrics(run: Path, *, epochs: float = inf) -> list[dict[str, Any]]:
    """The records of a run's first `epochs` epochs; none where it has no metrics.

    Raises:
        ValueError: a line is damaged.
    """
    file = run / METRICS_NAME
    records = read_json_lines(file, partial(check_form, form=_EPOCH)) if file.is_file() else []
    return [record for record in records if record["epoch"] <= epochs]


def metrics_line(record: Mapping[str, Any]) -> str:
    """The line of an epoch, for `write_metrics`."""
    return json_text(dict(record)) + "\n"


def write_metrics(run: Path, lines: Iterable[str]) -> None:
    """Write the lines of all epochs. Whole and atomically: an appended line could be cut by a full disk."""
    with atomic_write(run / METRICS_NAME) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
