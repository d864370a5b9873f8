"""The names in a run's folder, which run and which export are the newest, and which weights a path names. Needs no
torch."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from pathlib import Path

from tetdeploy.arguments import check_path
from tetdeploy.storage.files import sha256_of
from tetdeploy.storage.form import COUNT, LOOSE_NUMBER, NUMBER, STEP, parse_json
from tetdeploy.storage.model_file import models_in
from tetdeploy.storage.shards import INDEX_NAME, holds_shards

CHECKPOINT_NAME = "checkpoint.safetensors"
STATE_NAME = "last.safetensors"
CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
SHARDS_NAME = "shards"
SUMMARY_NAME = "summary.json"  # of several seeds
LATEST_NAME = "latest"
POSITION = {  # what the state says of where its run stands, see `storage.form`
    "epoch!": COUNT,
    "step!": COUNT,
    "seconds!": NUMBER,
    "best": {"epoch!": STEP, "stage!": STEP, "val_accuracy": LOOSE_NUMBER, "val_loss": LOOSE_NUMBER},
    "precision!": str,
    "scaler!": {},
}

# Of JSON objects that commands read again: a run's settings, a summary of seeds, an index of shards, a manifest.
_READ_AGAIN = ({"network", "training"}, {"recipe", "mean_val_accuracy"}, {"weight_map"}, {"graph_sha256", "metadata"})


def is_read_again(file: Path) -> bool:
    """Whether a JSON file holds what commands need, rather than a result: something of a run, of shards or of an
    engine, or a model's threshold."""
    file = Path(os.path.realpath(file))
    if file.suffix == ".jsonl" or file.name.endswith(".exit.json"):
        return True
    try:
        content = parse_json(file.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and "kind" not in content and any(keys <= content.keys() for keys in _READ_AGAIN)


def newest_run(runs: Path) -> Path:
    """The `latest_run`, or, while that has no checkpoint, the newest one in `runs` that has, with a warning.

    Raises:
        FileNotFoundError: see `latest_run`.
    """
    latest = latest_run(runs)
    if _has_weights(latest) or (other := _newest_trained(runs)) is None:
        return latest
    text = f"{latest}, the newest run, has no {CHECKPOINT_NAME}; taking {other}, the newest that has one"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return other


def latest_run(runs: Path) -> Path:
    """The run folder that `runs/latest` points at: a symlink, or a text file where symlinks are not to be had. Or
    `runs/latest` itself, where a copy that followed the symlink, as scp's and zip's do, made a folder of it.

    Raises:
        FileNotFoundError: nothing was trained there, or the newest run is gone.
    """
    latest = runs / LATEST_NAME
    if latest.is_symlink():
        target = latest.readlink()
    elif latest.is_file():
        target = Path(os.fsdecode(latest.read_bytes().strip()))
    elif (latest / CONFIG_NAME).is_file() or _has_weights(latest):
        return latest
    else:
        if run := next(runs.glob(f"*/{CONFIG_NAME}"), None):
            fault = "is a folder without a run" if latest.is_dir() else "is missing"
            raise FileNotFoundError(f"{latest} {fault}; name a run folder, such as {run.parent}")
        raise FileNotFoundError(f"no run in {runs}: train one first (tetdeploy train), or name a run folder")
    up = ".." in target.parts and runs.absolute() != Path(os.path.realpath(runs))  # from where a link points
    run = Path(os.path.normpath((os.path.realpath(runs) if up else runs) / target))
    if not target.name or not run.is_dir():
        fault = f"points at {run}, which is gone" if target.name else "is empty"
        raise FileNotFoundError(f"{latest} {fault}; name another run folder{_such(_newest_trained(runs))}")
    return run


def _has_weights(run: Path) -> bool:
    """Whether a run, or one of several seeds, has a checkpoint."""
    return any((folder / CHECKPOINT_NAME).exists() for folder in (run, *seed_runs(run)))


def _newest_trained(runs: Path) -> Path | None:
    """Of the runs in a folder, those of several seeds too, the one with the newest checkpoint."""
    names = (CHECKPOINT_NAME, f"seed-*/{CHECKPOINT_NAME}")
    files = (file for folder in _folders(runs) for name in names for file in folder.glob(name))
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def without_latest(path: Path) -> Path:
    """`path` with the run itself in place of a link `latest`, which may point at another one before the work is done.

    Raises:
        FileNotFoundError: see `latest_run`.
    """
    link = next((link for link in (path, *path.parents) if link.name == LATEST_NAME and link.is_symlink()), None)
    return path if link is None else latest_run(link.parent) / path.relative_to(link)


def _such(run: Path | None) -> str:
    return "" if run is None else f", such as {run}"


def _folders(runs: Path) -> list[Path]:
    # latest is one of the others, and what is made to take its place is there for a moment
    found = (folder for folder in runs.glob("*") if not folder.is_symlink())
    return [folder for folder in found if not folder.name.startswith(f".{LATEST_NAME}.")]


def newest_export(runs: Path) -> Path:
    """The newest exported model of any run in the folder, of a run of one of several seeds too, and of the
    `latest_run`, which may lie elsewhere.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = _folders(runs)
    with suppress(FileNotFoundError):
        folders.append(latest_run(runs))
    models = [model for folder in folders for model in models_in(folder)]
    if not models:
        raise FileNotFoundError(f"no exported model in {runs}/; write one with: tetdeploy export, or name the file")
    return max(models, key=lambda path: path.stat().st_mtime)


def seed_runs(folder: Path) -> list[Path]:
    """The run folders in a folder of several seeds, as `tetdeploy train --seeds` writes it; none in any other."""
    runs = [config.parent for config in folder.glob(f"seed-*/{CONFIG_NAME}")]
    return sorted(runs, key=lambda run: (len(run.name), run.name))


def seeds_folder(run: Path) -> Path:
    """The folder of several seeds that a run is one of; of any other run itself."""
    several = (run.parent / CONFIG_NAME).is_file() and run in seed_runs(run.parent)
    return run.parent if several else run


def weights_file(path: Path | str) -> Path:
    """A folder of shards, `path` itself or the latest in it (RUN/shards), or the `checkpoint_file` that `path` names.

    Raises:
        FileNotFoundError: see `checkpoint_file` and `latest_run`.
        ValueError: `path` is none.
    """
    check_path("path", path, "a checkpoint or a run folder")
    path = without_latest(Path(path))  # what is made of the weights goes beside them
    held = (path / CHECKPOINT_NAME).exists()  # shards beside a checkpoint would be a choice
    return (None if held else newest_shards(path)) or checkpoint_file(path)


def newest_shards(path: Path | str) -> Path | None:
    """A folder of shards: `path` itself, or the latest of those in it (`epoch-00031-step-000000`); None without any.

    Some of their files may be missing, as of a copy that was cut: reading them says so, and no earlier ones are taken.
    """
    path = Path(path)
    if holds_shards(path):
        return path
    return max(filter(holds_shards, path.glob("epoch-*")), key=lambda folder: folder.name, default=None)


def checkpoint_file(path: Path | str) -> Path:
    """The checkpoint that `path` names: a file itself, or the best weights of a run folder.

    Raises:
        FileNotFoundError: there is no such path, or the folder has no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint (.safetensors), a run folder or shards")
    if not path.is_dir():
        return path
    file = path / CHECKPOINT_NAME
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no {CHECKPOINT_NAME}; {_why_none(path)}")
    return file


def _why_none(folder: Path) -> str:
    """Why a folder has no checkpoint, and what to name instead."""
    if (folder / STATE_NAME).exists():
        other, metrics = _newest_trained(folder.parent), folder / METRICS_NAME
        if metrics.is_file() and metrics.stat().st_size:
            fault = "it is gone: put it back, go on with --resume if epochs are left to train"
        else:
            fault = "its first epoch is not finished: go on with --resume"
        return f"{fault}, or name another run{_such(other)}"
    if seeds := seed_runs(folder):
        finished = [run for run in seeds if (run / CHECKPOINT_NAME).exists()]
        one = f"name one, such as {finished[0]}" if finished else "none has finished an epoch yet"
        return f"it holds the runs of several seeds: {one}"
    if newest_shards(folder / SHARDS_NAME) is not None:
        return f"its last weights are in shards: name {folder / SHARDS_NAME}"
    if (folder / CONFIG_NAME).is_file():
        other = _newest_trained(folder.parent)
        return f"it has a run's settings, and no weights: name another run{_such(other)}"
    return "it is not a run folder"


def other_checkpoint(folder: Path, checkpoint_sha256: str | None) -> str | None:
    """The SHA-256 of the best weights in a run folder if they are others than what was made of the run says of itself;
    None if they are the same, or either is not known."""
    file = folder / CHECKPOINT_NAME
    if not checkpoint_sha256 or not file.is_file():
        return None
    found = sha256_of(file)
    return None if found == checkpoint_sha256 else found


def weights_sha256(file: Path) -> str:
    """Of a checkpoint, or of the index of a folder of shards, which has the checksum of each."""
    return sha256_of(file / INDEX_NAME if file.is_dir() else file)
