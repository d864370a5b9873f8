"""The files of a report: run folders as `tetdeploy train` writes them, results of one exported model as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdeploy.checkpoint import CHECKPOINT_NAME, read_metadata

CONFIG_NAME, METRICS_NAME, SUMMARY_NAME = "config.json", "metrics.jsonl", "summary.json"

# What a file is follows from its "kind", and in a run folder from its name, MODEL.<kind>.json.
KINDS = ("sweep", "validate")

_ROW_NUMBERS = (
    "accuracy", "firing_rate", "ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "energy_once_pj", "ann_ratio",
    "latency_ms", "top1_agreement", "spike_mismatch_rate", "max_abs_logit_error",
    "local_mismatch_rate", "spike_count_error", "torch_accuracy", "torch_latency_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run folder of one training.

    Attributes:
        network, data, training: of its config.json.
        metrics: one record an epoch.
        checkpoint: the metadata of its best weights; {} without any.
    """

    folder: Path
    network: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    checkpoint: dict[str, Any]

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the epoch whose weights were kept."""
        epoch = self.checkpoint.get("provenance", {}).get("epoch")
        return next((record for record in self.metrics if record["epoch"] == epoch), None)


def read_run(folder: Path) -> Run:
    """A run folder.

    Raises:
        ValueError: it is none, or a file in it is damaged.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has no {CONFIG_NAME}; give a folder that tetdeploy train wrote, "
            "or the JSON file of a sweep"
        )
    config = json_object(folder / CONFIG_NAME)
    network, data, training = (config.get(name) for name in ("network", "data", "training"))
    if not isinstance(network, dict) or not isinstance(data, dict) or not isinstance(training, dict):
        raise ValueError(f"{folder / CONFIG_NAME} must hold the objects network, data and training; it was changed")
    checkpoint = folder / CHECKPOINT_NAME
    metadata = read_metadata(checkpoint) if checkpoint.is_file() else {}
    return Run(folder, network, data, training, _read_metrics(folder / METRICS_NAME), metadata)


def result_files(folder: Path) -> dict[str, list[Path]]:
    """The results in a run folder, by the exported model that they are of."""
    files: dict[str, list[Path]] = {}
    for file in sorted(file for kind in KINDS for file in folder.glob(f"*.{kind}.json")):
        files.setdefault(model_stem(file), []).append(file)
    return files


def model_stem(file: Path) -> str:
    """`model-T6` of model-T6.sweep.json."""
    stem = file.name.removesuffix(".json")
    return next((stem.removesuffix(f".{kind}") for kind in KINDS if stem.endswith(f".{kind}")), stem)


def read_result(file: Path) -> dict[str, Any]:
    """A result file: its rows by T, and `by_class` by T as well, as `layers` and `neurons` are.

    Raises:
        ValueError: it is not JSON, of a kind that is not known, or not in the form of that kind.
    """
    content = json_object(file)
    is_old_sweep = "kind" not in content and {"model", "data", "num_samples", "rows"} <= content.keys()
    kind = "sweep" if is_old_sweep else content.get("kind")
    if kind not in KINDS:
        what = f"its kind is {kind!r}" if kind else 'it has no "kind"'
        raise ValueError(f"{file} is not a result that a report can show: {what}; give JSON of {' or '.join(KINDS)}")
    try:
        return _normalised(content) | {"kind": kind}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} does not have the form of a {kind}: {error!r}; run tetdeploy {kind} again") from error


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: it holds no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a result: it holds a {type(content).__name__}, not an object")
    return content


def _read_metrics(file: Path) -> tuple[dict[str, Any], ...]:
    if not file.is_file():
        return ()
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not all(isinstance(line, dict) and isinstance(line.get("epoch"), int) for line in lines):
        raise ValueError(f'{file} is damaged: every line must be an object with an "epoch"')
    return tuple(lines)


def _normalised(content: dict[str, Any]) -> dict[str, Any]:
    """Rows ordered by T, their numbers checked."""
    given = content["rows"]
    rows = [_row(row) for row in given]
    if not rows or len({row["T"] for row in rows}) < len(rows):
        raise ValueError("it needs rows, each with a T of its own")
    parts = {
        part: [entry | {"name": str(entry["name"]), "rows": [_row(r) for r in entry["rows"]]} for entry in found]
        for part in ("layers", "neurons")
        if (found := content.get(part))
    }
    if classes := content.get("by_class"):
        parts["by_class"] = [
            {"name": str(entry["name"]), "num_samples": int(entry["num_samples"])}
            | {"rows": [{"T": r["T"], "accuracy": a} for r, a in zip(rows, entry["accuracy"], strict=True)]}
            for entry in classes
        ]
    named = {"model": str(content["model"]), "data": str(content["data"]), "num_samples": int(content["num_samples"])}
    return content | parts | named | {"rows": sorted(rows, key=lambda row: int(row["T"]))}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: float(row[key]) for key in _ROW_NUMBERS if row.get(key) is not None}
    return row | numbers | {"T": int(row["T"])}
