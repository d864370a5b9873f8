"""A run's folder: what it was started with, its metrics, and which run is the newest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdeploy.checkpoint import CHECKPOINT_NAME, LATEST_NAME, STATE_NAME, data_settings
from tetdeploy.files import atomic_write, write_json

from .config import TrainConfig

if TYPE_CHECKING:
    from tetdeploy.data import LabelledSet
    from tetdeploy.networks import Classifier

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"


def run_settings(
    classifier: Classifier, train_set: LabelledSet, val_set: LabelledSet | None, config: TrainConfig
) -> dict[str, Any]:
    """What goes into config.json: {"network", "data", "training"}; a resumed run must have the same."""
    images = {"train_images": len(train_set), "val_images": 0 if val_set is None else len(val_set)}
    settings = {
        "network": asdict(classifier.config),
        "data": data_settings(classifier) | images,
        "training": asdict(config),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return plain


def check_run(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse to write over a run, or to go on with one under other settings.

    Raises:
        ValueError: `out` holds a run and `resume` is false; or `resume` is true and `out` holds none, or one that was
            started with other settings (each difference is named).
    """
    if not resume:
        refuse_held(out)
        return
    if not (out / CONFIG_NAME).is_file() or not (out / STATE_NAME).is_file():
        raise ValueError(
            f"nothing to resume in {out}: it has no {CONFIG_NAME} and {STATE_NAME}; train without --resume"
        )
    check_settings(out, settings)


def refuse_held(out: Path) -> None:
    """Refuse to write over a run.

    Raises:
        ValueError: `out` holds one.
    """
    held = [name for name in (CONFIG_NAME, CHECKPOINT_NAME) if (out / name).exists()]
    if held:
        raise ValueError(f"{out} already holds a run ({', '.join(held)}); choose another --out, or --resume it")


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        FileNotFoundError: `out` holds no run.
        ValueError: it was started with other settings; each difference is named.
    """
    started = completed(read_run_config(out))
    for name in ("recipe", "int8", "restarted", "how"):  # where the run came from, what was measured: no settings
        started.pop(name, None)
    different = differences(started, settings)
    if different:
        raise ValueError(
            f"{out} was started with other settings: {'; '.join(different)}; "
            "resume with the old ones, or start a new run in another --out"
        )


def read_run_config(out: Path) -> dict[str, Any]:
    """A run's config.json: {"network", "data", "training"}, and "how": what else it runs with, of no effect on results.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON of that form.
    """
    file = out / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{out} is not a run folder: it has no {CONFIG_NAME}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold an object, got {type(settings).__name__}")
    return settings


def write_run_config(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Write config.json; of a resumed run only "how" it runs may have changed.

    Raises:
        OSError: it cannot be written.
    """
    before = read_run_config(out) if resume else None
    now = dict(settings) if before is None else before | {"how": settings["how"]}
    if now != before:
        write_json(out / CONFIG_NAME, now)


def unused_run_folder(runs: Path, name: str) -> Path:
    """`runs/name`, or the first of `runs/name-2`, `runs/name-3`, ... that does not exist."""
    folder, number = runs / name, 1
    while folder.exists():
        number += 1
        folder = runs / f"{name}-{number}"
    return folder


def mark_latest(out: Path, runs: Path) -> None:
    """Let `runs/latest` point at `out`: a relative symlink, or a text file with the path where there are no symlinks.

    Raises:
        OSError: `runs` cannot be written.
    """
    target = Path(os.path.relpath(out.absolute(), runs.absolute()))
    latest = runs / LATEST_NAME
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".latest.", dir=runs) as folder:
            link = Path(folder) / LATEST_NAME
            link.symlink_to(target, target_is_directory=True)
            link.replace(latest)
    except (OSError, NotImplementedError):
        with atomic_write(latest) as temporary:
            temporary.write_text(f"{target.as_posix()}\n", encoding="utf-8")


def read_metrics(out: Path, *, epochs: int) -> list[dict[str, Any]]:
    """The metrics of a run's first `epochs` epochs; later lines, of epochs that are to run again, are left out."""
    file = out / METRICS_NAME
    if not file.is_file():
        return []
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [record for record in records if record["epoch"] <= epochs]


def write_metrics(out: Path, records: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl, one line an epoch. Whole and atomically: an appended line could be cut by a full disk."""
    with atomic_write(out / METRICS_NAME) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version started: what it did not know yet has its default, which is off."""
    from tetdeploy.networks import NetworkConfig

    return {
        **settings,
        "data": {"encoding": "direct"} | settings.get("data", {}),
        "network": _defaults(NetworkConfig) | settings.get("network", {}),
        "training": _defaults(TrainConfig) | settings.get("training", {}),
    }


def _defaults(config: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting that differs, nested keys joined by dots."""
    old_values, new_values = _flattened(old), _flattened(new)
    names = old_values | new_values
    return [
        f"{name}: {old_values.get(name, '(none)')} -> {new_values.get(name, '(none)')}"
        for name in names
        if old_values.get(name) != new_values.get(name)
    ]


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
