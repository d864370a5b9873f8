"""What is known of several seeds of one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tetdeploy.report.reading import Run, json_object, read_summary
from tetdeploy.storage.run_folder import CONFIG_NAME


def summary_of(folder: Path, runs: Sequence[Run]) -> dict[str, Any]:
    """As summary.json is, of the numbers that each seed's own files have by now: of a seed that was resumed by itself,
    or whose training was killed, summary.json tells what was before, or nothing.

    Args:
        folder: of the seeds.
        runs: theirs, in order.

    Raises:
        ValueError: its summary.json or config.json is damaged.
    """
    told = {entry.get("seed"): entry for entry in read_summary(folder).get("runs") or []}
    entries = []
    for run in runs:
        seed = run.training.get("seed")
        known = told.get(seed, {"interrupted": True}) | {"seed": seed, "run": run.folder.name}
        entries.append(known | _own(run))
    kept = {entry["seed"] for entry in entries}
    entries += [{"seed": seed, "interrupted": True, "begun": False} for seed in _wanted(folder) if seed not in kept]
    finished = _finished(entries)
    accuracies = [entry["val_accuracy"] for entry in finished if entry.get("val_accuracy") is not None]
    return {
        "mean_val_accuracy": fmean(accuracies) if accuracies else None,
        "std_val_accuracy": stdev(accuracies) if len(accuracies) > 1 else None,
        "num_finished": len(accuracies),
        "runs": entries,
    }


def finished_seeds(summary: Mapping[str, Any]) -> list[str]:
    """The names of the folders of those that are finished, by `summary_of`; a mean is of these."""
    return [entry["run"] for entry in _finished(summary["runs"])]


def _finished(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if not entry.get("interrupted")]


def _wanted(folder: Path) -> list[Any]:
    """The seeds that were to be trained; [] where the folder does not say."""
    config = folder / CONFIG_NAME
    return json_object(config).get("seeds") or [] if config.is_file() else []


def _own(run: Run) -> dict[str, Any]:
    """What a run's metrics and checkpoint say; {} before its first epoch is finished."""
    if not run.metrics:
        return {}
    found: dict[str, Any] = {"interrupted": run.is_unfinished}
    if run.best is not None:  # else its line is missing, and summary.json may know it
        found |= {"best_epoch": run.best.get("epoch"), "val_accuracy": run.best.get("val_accuracy")}
    return found
