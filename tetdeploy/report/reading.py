"""The files of a report: run folders as `tetdeploy train` writes them, results of one exported model as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdeploy.checkpoint import read_metadata
from tetdeploy.inspection import count_parameters
from tetdeploy.report.forms import RESULT, RUN, SUMMARY
from tetdeploy.storage.files import MODELS
from tetdeploy.storage.form import check_form, parse_json
from tetdeploy.storage.metrics import read_metrics
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, CONFIG_NAME, SUMMARY_NAME

# What a file is follows from its "kind", and in a run folder from its name, MODEL.<kind>.json.
KINDS = ("early-exit", "sweep", "validate")
WANTED = f"; give JSON of {', '.join(KINDS)} or bench"


@dataclass(frozen=True)
class Run:
    """A run folder of one training.

    Attributes:
        network, data, training: of its config.json.
        metrics: one record an epoch.
        checkpoint: the metadata of its best weights; {} without any.
        restarted: after so many epochs, which another run trained (`--restart-from`); None if it was not.
        parameters: how many its best weights have; None without any.
    """

    folder: Path
    network: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    checkpoint: dict[str, Any]
    restarted: int | None = None
    parameters: int | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the epoch whose weights were kept; without the checkpoint, of the one that training keeps."""
        if not self.checkpoint:
            return self._chosen()
        epoch = self.checkpoint.get("provenance", {}).get("epoch")
        return next((record for record in self.metrics if record["epoch"] == epoch), None)

    @property
    def is_unfinished(self) -> bool:
        """Whether some of its epochs are still to come."""
        return bool(self.metrics) and self.metrics[-1]["epoch"] < (self.training.get("epochs") or 0)

    def _chosen(self) -> dict[str, Any] | None:
        """As `tetdeploy.train.state.Best` has it."""
        own = [record for record in self.metrics if record["epoch"] > (self.restarted or 0)]
        last = [record for record in own if record.get("stage") == own[-1].get("stage")]
        validated = [record for record in last if record.get("val_accuracy") is not None]
        loss = "val_tet_loss" if self.training.get("switch_to_tet") else "val_loss"
        if not validated:
            return last[-1] if last else None
        return max(validated, key=lambda record: (record["val_accuracy"], -_or_inf(record.get(loss))))


def _or_inf(loss: float | None) -> float:
    """A loss that was NaN, for which null stands, is worse than any."""
    return math.inf if loss is None else loss


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
    _check(folder / CONFIG_NAME, config, RUN)
    checkpoint = folder / CHECKPOINT_NAME
    metadata, parameters = {}, None
    if checkpoint.is_file():
        metadata, parameters = read_metadata(checkpoint), count_parameters(checkpoint)
    parts = (config["network"], config["data"], config["training"])
    restarted = (config.get("restarted") or {}).get("epoch")
    return Run(folder, *parts, tuple(read_metrics(folder)), metadata, restarted, parameters)


def read_summary(folder: Path) -> dict[str, Any]:
    """What a folder of several seeds says of them; {} if it says nothing.

    Raises:
        ValueError: its summary.json is damaged.
    """
    file = folder / SUMMARY_NAME
    if not file.is_file():
        return {}
    summary = json_object(file, remedy="; remove it to do without")
    _check(file, summary, SUMMARY)
    return summary


def result_files(folder: Path) -> dict[str, list[Path]]:
    """The results in a run folder, by the exported model that they are of."""
    files: dict[str, list[Path]] = {}
    found = [file for kind in KINDS for file in folder.glob(f"[!.]*.{kind}.json")]  # macOS writes `._` beside files
    for file in sorted(found, key=lambda file: (model_stem(file), file.name)):
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
    content = json_object(file, remedy=WANTED)
    is_plain_sweep = "kind" not in content and {"model", "data", "num_samples", "rows"} <= content.keys()
    kind = "sweep" if is_plain_sweep else content.get("kind")
    if kind not in KINDS:
        what = f"its kind is {kind!r}" if kind else 'it has no "kind"'
        raise ValueError(f"{file} is not a result that a report can show: {what}{WANTED}")
    try:
        check_form(content, RESULT)
        return _normalised(content) | {"kind": kind}
    except ValueError as error:
        article = "an" if kind == "early-exit" else "a"
        fault = f"does not have the form of {article} {kind}: {error}"
        raise ValueError(f"{file} {fault}; run tetdeploy {kind} again") from error


def readable(read: Callable[[Path], dict[str, Any]], file: Path, notes: list[str]) -> dict[str, Any] | None:
    """What `read` makes of a file that was found in a run folder; None where it is damaged, as a note says then."""
    try:
        return read(file)
    except ValueError as error:
        notes.append(f"Left out until it is measured again: {str(error).removesuffix(WANTED)}.")
        return None


def json_object(file: Path, *, remedy: str = "") -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: it holds no JSON, or no object; `remedy` says what to do.
    """
    if file.suffix in MODELS:
        raise ValueError(
            f"{file} is a model, not a result; give its run folder, or the JSON of tetdeploy sweep, bench or validate"
        )
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}{remedy}") from error
    if not isinstance(content, dict):
        what = {type(None): "null", int: "an integer"}.get(type(content), f"a {type(content).__name__}")
        raise ValueError(f"{file} holds {what}, not an object{remedy}")
    return content


def _check(file: Path, content: Any, form: Any) -> None:
    try:
        check_form(content, form)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _normalised(content: dict[str, Any]) -> dict[str, Any]:
    """Rows ordered by T, and accuracies by class beside their T."""
    rows = content["rows"]
    if not rows or len({row["T"] for row in rows}) < len(rows):
        raise ValueError("it needs rows, each with a T of its own")
    classes = content.get("by_class") or []
    if any(len(entry["accuracy"]) != len(rows) for entry in classes):
        raise ValueError("by_class needs an accuracy for each row")
    if (early := content.get("early_exit")) and not sum(entry["num_images"] for entry in early["by_steps"]) > 0:
        raise ValueError("early_exit.by_steps needs images")
    steps = [row["T"] for row in rows]
    by_class = [
        entry | {"rows": [{"T": T, "accuracy": a} for T, a in zip(steps, entry["accuracy"], strict=True)]}
        for entry in classes
    ]
    return content | {"rows": sorted(rows, key=lambda row: int(row["T"])), "by_class": by_class}
