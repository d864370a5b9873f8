"""A run's folder: what it was started with, who trains in it, and which run is the newest."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tetdeploy.checkpoint import Checkpoint, data_settings
from tetdeploy.data import LabelledSet, remedy_of_others
from tetdeploy.networks import Classifier
from tetdeploy.storage.files import made_folder, write_json
from tetdeploy.storage.form import COUNT, NUMBER, as_json, check_form, parse_json
from tetdeploy.storage.provenance import ORIGIN, PARENT
from tetdeploy.storage.run_folder import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    LATEST_NAME,
    METRICS_NAME,
    STATE_NAME,
    SUMMARY_NAME,
    weights_file,
    weights_sha256,
)

from .config import TrainConfig
from .ranks import current_ranks

LOCK_NAME = ".lock"

# What is checked nowhere else; `TrainConfig` checks itself.
_CONFIG = {
    "network!": ORIGIN["network"],
    "data!": {"name": str},
    "training!": {},
    "init": PARENT,
    "code_sha256": str,
    "how": {"cuda_graphs": bool, "recompute": bool, "shards_mb": NUMBER},
    "seeds": [COUNT],
}

_OTHER_TEACHER = "the teacher has other weights than the one it learned from: name that one with --distill"


def run_settings(
    classifier: Classifier, train_set: LabelledSet, val_set: LabelledSet | None, config: TrainConfig
) -> dict[str, Any]:
    """What goes into config.json: {"network", "data", "training"}; a resumed run must have the same.

    Raises:
        FileNotFoundError: there is no teacher where `config.distill` says.
    """
    images = {
        "train_images": len(train_set),
        "val_images": 0 if val_set is None else len(val_set),
        "fingerprint": (train_set if val_set is None else val_set).fingerprint,
    }
    settings = {
        "network": asdict(classifier.config),
        "data": data_settings(classifier) | images,
        "training": asdict(config) | _teacher(config.distill),
    }
    plain: dict[str, Any] = as_json(settings)
    return plain


def _teacher(distill: str) -> dict[str, str]:
    """Where the teacher itself lies, as runs/latest will be another, and which weights it has. Models that are exported
    say so too, so the place is told without that of the working folder."""
    if not distill:
        return {}
    return {"distill": _place(distill), "distill_sha256": weights_sha256(teacher_file(distill))}


def teacher_file(distill: str) -> Path:
    """The weights of the teacher that `config.distill` names.

    Raises:
        FileNotFoundError: there are none.
    """
    try:
        return weights_file(distill)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--distill: {error}") from error


def weights_origin(init: Path | str | Checkpoint) -> dict[str, str]:
    """What a run's files say of the weights that it began with (`--init`): where they lie, and which ones they are.

    Raises:
        FileNotFoundError: there are none.
    """
    if isinstance(init, Checkpoint):
        return {"path": _place(init.path), "checkpoint_sha256": init.sha256}
    return {"path": _place(init), "checkpoint_sha256": weights_sha256(weights_file(init))}


def _place(path: Path | str) -> str:
    place, here = Path(path).resolve(), Path.cwd()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)


@contextmanager
def only_trainer(out: Path, *, resume: bool) -> Iterator[None]:
    """Within it no other process trains in `out`, which is made unless a run in it is to be resumed.

    The rank that writes holds a lock of the operating system on `out/.lock`: it ends with the process, however that
    ends, and the file goes with it unless the process was killed. Without locks, as on some network file systems, a
    warning says so.

    Raises:
        ValueError: another process trains there.
        OSError: the folder cannot be made, or the file in it not opened.
    """
    ranks = current_ranks()
    with ExitStack() as held:
        with ranks.first():
            if ranks.writes and (out.is_dir() or not resume):
                held.enter_context(made_folder(out))
                held.enter_context(_locked(out))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    file = out / LOCK_NAME
    # no lock that is a file alone: it would stay after a kill
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{out} is being trained{_holder(file)}; wait until that has ended, or choose another --out"
        ) from None
    except OSError as error:
        if error.filename is not None:  # it cannot be opened, and so another process may well hold its lock
            raise OSError(
                f"cannot lock {file}: {error.strerror}; make its folder writable, or train anew with another --out"
            ) from error
        warnings.warn(
            f"{file} cannot be locked ({error.strerror}): see to it that no other process trains there",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        if lock.is_locked:
            with suppress(OSError):  # as on Windows, where nobody writes to a locked file
                file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            with suppress(OSError):
                _sweep(out)
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:  # the file goes before the lock, or it might be that of the next to lock it
                file.unlink()
        lock.release()


def _sweep(out: Path) -> None:
    """Remove what writes of this run that were killed have left: each is as large as what was written."""
    names = (CHECKPOINT_NAME, STATE_NAME, CONFIG_NAME, METRICS_NAME, SUMMARY_NAME)
    for pattern in (*(f".{name}.*.tmp" for name in names), ".tmp??????"):  # the last is what safetensors writes first
        for left in out.glob(pattern):
            left.unlink()


def _holder(lock: Path) -> str:
    """By whom, if the file says so: it is empty for a moment, and Windows lets nobody read it."""
    try:
        return f" by {text}" if (text := lock.read_text(encoding="utf-8")) else ""
    except OSError:
        return ""


def is_begun(out: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return (out / STATE_NAME).is_file() and (out / CONFIG_NAME).is_file()


def check_run(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse to write over a run, or to go on with one under other settings.

    Raises:
        ValueError: `out` holds a run and `resume` is false; or `resume` is true and `out` holds none, or one that was
            started with other settings (each difference is named).
    """
    if not resume:
        refuse_held(out)
        return
    if not is_begun(out):
        missing = [name for name in (CONFIG_NAME, STATE_NAME) if not (out / name).is_file()]
        has_weights = (out / CHECKPOINT_NAME).is_file()
        remedy = f"continue with --restart-from {out} in another --out" if has_weights else "train without --resume"
        raise ValueError(f"nothing to resume in {out}: it has no {' and '.join(missing)}; {remedy}")
    check_settings(out, settings)


def refuse_held(out: Path) -> None:
    """Refuse to write over a run, with ValueError."""
    held = [name for name in (CONFIG_NAME, CHECKPOINT_NAME) if (out / name).exists()]
    if held:
        raise ValueError(f"{out} already holds a run ({', '.join(held)}); choose another --out, or --resume it")


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        FileNotFoundError: `out` holds no run.
        ValueError: it was started with other settings; each difference is named.
    """
    started = read_run_config(out)
    # where it came from, what was measured: no settings
    for name in ("recipe", "int8", "init", "code_sha256", "restarted", "how"):
        started.pop(name, None)
    if different := run_differences(started, settings):
        fits = all(started["network"].get(name) == settings["network"].get(name) for name in ("model", "width"))
        fits = fits and "seeds" not in settings and (out / CHECKPOINT_NAME).is_file()
        further = f", from these weights with --init {out} and its other options" if fits else ""
        raise ValueError(
            f"{out} was started with other settings: {'; '.join(different)}; resume with the old ones, or start a new "
            f"run in another --out{further}"
        )


def read_run_config(out: Path) -> dict[str, Any]:
    """A run's config.json: {"network", "data", "training"}, and "how": what else it runs with, of no effect on results.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON of that form.
    """
    file = out / CONFIG_NAME
    if not out.exists():
        raise FileNotFoundError(f"{out} does not exist; name a run folder, or train without --resume")
    if not file.is_file():
        remedy = "; start from its weights with --init" if (out / CHECKPOINT_NAME).is_file() else ""
        raise FileNotFoundError(f"{out} is not a run folder: it has no {CONFIG_NAME}{remedy}")
    remedy = "mend it by hand, or train anew in another --out"
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; {remedy}") from error
    try:
        check_form(settings, _CONFIG)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {remedy}") from error
    return dict(settings)


def write_run_config(out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Write config.json; of a resumed run only "how" it runs, where its data and its teacher lie, and how many seeds of
    several there are may have changed.

    Raises:
        OSError: it cannot be written.
    """
    before = read_run_config(out) if resume else None
    changing = settings.keys() & {"data", "training", "how", "seeds"}
    now = dict(settings) if before is None else before | {name: settings[name] for name in changing}
    if now != before:
        write_json(out / CONFIG_NAME, now)


@contextmanager
def new_run_folder(runs: Path, name: str) -> Iterator[Path]:
    """Make `runs/name`, or the first of `runs/name-2`, `runs/name-3`, ... that is not there: whoever else looks for one
    takes the next. It goes again if it ends empty.

    Raises:
        OSError: it cannot be made.
    """
    folder, number = runs / name, 1
    with ExitStack() as made:
        while True:
            try:
                made.enter_context(made_folder(folder, new=True))
                break
            except FileExistsError:
                number += 1
                folder = runs / f"{name}-{number}"
        yield folder


def check_latest(out: Path, runs: Path) -> None:
    """Refuse to train in `runs`, before anything is written, where `mark_latest` would find a folder in its way.

    Raises:
        OSError: `runs/latest` is a folder, as a copy makes one that follows the link, and another one than `out`.
    """
    latest = runs / LATEST_NAME
    in_runs = _seen_from(runs, out.absolute()).parent == Path()
    if in_runs and _is_folder(latest) and not _is_latest(out, latest):
        raise OSError(
            f"{latest} is a folder, where a link to the newest run is to be: rename or remove it, or train with "
            "another --runs"
        )


def _is_folder(latest: Path) -> bool:
    return latest.is_dir() and not latest.is_symlink()


def _is_latest(out: Path, latest: Path) -> bool:
    """Whether a run, or one of several seeds, lies in a folder `latest` itself."""
    return _is_folder(latest) and out.resolve().is_relative_to(latest.resolve())


def mark_latest(out: Path, runs: Path) -> None:
    """Let `runs/latest` point at `out`, unless that is a folder of this name: a symlink, or, on Windows and where there
    are no symlinks, a text file with the path, relative unless `out` is on another drive of Windows. Where that cannot
    be written, a warning says so of a run that lies elsewhere.

    Raises:
        OSError: it cannot be written, and the run lies in `runs`, of which later commands take the latest.
    """
    target, latest = _seen_from(runs, out.absolute()), runs / LATEST_NAME
    if _is_latest(out, latest):
        return
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".latest.", dir=runs) as folder:
            link = Path(folder) / LATEST_NAME
            try:
                _link(link, target)
            except (OSError, NotImplementedError):
                link.write_bytes(os.fsencode(f"{target.as_posix()}\n"))
            link.replace(latest)
    except OSError as error:
        text = f"{latest} cannot be written ({error.strerror})"
        if target.parent == Path():
            raise OSError(f"{text}: remove it, or train with another --runs") from error
        text += ": name the run in later commands, or train with another --runs"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _link(link: Path, target: Path) -> None:
    if sys.platform == "win32":
        raise NotImplementedError("Windows puts no link in the place of another that leads to a folder")
    link.symlink_to(target, target_is_directory=True)


def _seen_from(runs: Path, out: Path) -> Path:
    """Where `out` is from where `runs`, which may be a symlink, really lies."""
    out = Path(os.path.realpath(out.parent), out.name)
    try:
        return Path(os.path.relpath(out, os.path.realpath(runs)))
    except ValueError:  # it is on another drive of Windows
        return out


def run_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`differences` of a run's settings, or, where there are none, of the images and the teacher themselves.

    The same images may lie elsewhere, and so may the teacher. What has no fingerprint is no other.
    """
    data, training = ([dict(settings.get(name, {})) for settings in (old, new)] for name in ("data", "training"))
    if all(part.get("distill") for part in training):
        training = [part | {"distill": ""} for part in training]
    images = [part.pop("fingerprint", None) for part in data]
    if None not in images:
        data = [part | {"name": ""} for part in data]
    teachers = [part.pop("distill_sha256", None) for part in training]
    found = differences(*({**s, "data": d, "training": t} for s, d, t in zip((old, new), data, training, strict=True)))
    other_images = (
        "the images are others or in another order, and some it was trained on might be held out now: "
        f"{remedy_of_others(str(new.get('data', {}).get('name', '')))}"
    )
    others = {other_images: images, _OTHER_TEACHER: teachers}
    return found or [text for text, (before, now) in others.items() if None not in (before, now) and before != now]


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
