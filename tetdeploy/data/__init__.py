"""Image and event sets by name. Imports numpy only; what a set needs beyond it is imported when it is loaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetdeploy.arguments import check_path, check_type
from tetdeploy.names import is_npz

from .cifar import load_cifar10, load_cifar100
from .digits import load_digits
from .event_sets import load_dvs_cifar10, load_event_folder, load_n_mnist
from .events import Binning, Framing, Recording, read_recording, to_frames
from .fashion_mnist import load_fashion_mnist
from .folder import load_folder
from .frames import FrameSet, load_frames, load_npz
from .image_files import ImageFiles, read_crop
from .imagenet import is_imagenet, load_imagenet
from .images import ImageSet, save_npz, split_validation, stratified
from .labelled import ENCODINGS, Encoding, LabelledSet, Split
from .saccades import saccade_set

__all__ = [
    "DATA_NAMES",
    "ENCODINGS",
    "Binning",
    "Encoding",
    "FrameSet",
    "Framing",
    "ImageFiles",
    "ImageSet",
    "LabelledSet",
    "Recording",
    "Split",
    "check_recorded",
    "holds_out_others",
    "is_copy",
    "is_imagenet",
    "is_known",
    "is_own_file",
    "load_data",
    "load_frames",
    "load_parts",
    "read_crop",
    "read_recording",
    "remedy_of_others",
    "same_data",
    "save_npz",
    "split_validation",
    "to_frames",
    "warn_of_other_framing",
]

_IMAGE_SETS: dict[str, Callable[[Split, Path], ImageSet]] = {
    "digits": lambda split, data_dir: load_digits(split),
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
}
_EVENT_SETS: dict[str, Callable[[Split, Path, Binning], FrameSet]] = {
    "n-mnist": load_n_mnist,
    "dvs-cifar10": load_dvs_cifar10,
}

DATA_NAMES = (*_IMAGE_SETS, "imagenet", *_EVENT_SETS)
_CHOICES = f"{', '.join(DATA_NAMES)}, imagenet:PATH, folder:PATH, events:PATH, saccades:NAME or a path ending in .npz"

_BY_TIME = "by-time:"
_EVENTS = "events:"
_SACCADES = "saccades:"
_OF_PATHS = ("folder:", "imagenet:", _EVENTS)  # what stands before a path


def load_data(
    name: str, split: Split, *, data_dir: Path | str | None = None, T: int = 10, trained: Framing | None = None
) -> LabelledSet:
    """Load an image set or an event set.

    Args:
        name: of images: "digits", "fashion-mnist", "cifar10", "cifar100", "imagenet" or "imagenet:PATH" (see
            `load_imagenet`), "folder:PATH" (PATH/train/<class>/* and PATH/test/<class>/*). Of events: "n-mnist",
            "dvs-cifar10", "events:PATH" (as folder:PATH, with recordings), "saccades:NAME" (the image set NAME, moved
            before an event camera); each frame has the same number of events, or with "by-time:" in front of the name
            the same time. Or a path that ends in ".npz", of images or frames (one set: both splits read all of it).
        split: "train" or "test".
        data_dir: where data sets are looked for, and downloaded to when missing; by default the folder that the
            environment variable TETDEPLOY_DATA names, else "data".
        T: frames that a recording is cut into. Images and a `.npz` are as they are.
        trained: how what a network was trained on was framed: its sensor is that of "events:PATH", too, where the
            recordings do not say theirs and it holds their events. How they are cut is as `name` says.

    Returns:
        An `ImageSet`, `ImageFiles` for ImageNet, which stays on disk, or a `FrameSet` for events; the order of its
        entries is always the same. For all but `.npz` it is mixed over the classes, so that the first n are a fair
        sample.

    Raises:
        ValueError: unknown name or split, or the data are damaged or do not fit together.
        OSError: files are missing or unreadable, or a download failed.
        MissingExtraError: a package that this set needs is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    check_type("name", name, str, f"choose {_CHOICES}")
    if data_dir is None:
        data_dir = os.environ.get("TETDEPLOY_DATA") or "data"
    check_path("data_dir", data_dir, "a folder")
    data_dir = Path(data_dir).expanduser()
    plain = name.removeprefix(_BY_TIME)
    binning = Binning(T, "count" if plain == name else "time")
    if plain in _EVENT_SETS:
        return replace(_EVENT_SETS[plain](split, data_dir, binning), name=name)
    if plain.startswith(_EVENTS):
        return replace(load_event_folder(plain.removeprefix(_EVENTS), split, binning, trained), name=name)
    if plain.startswith(_SACCADES):
        return _load_saccades(name, plain.removeprefix(_SACCADES), split, data_dir, binning)
    if plain != name:
        raise ValueError(f"{name!r}: only events are cut into frames; give an event set, or leave out {_BY_TIME}")
    return _load_images(name, split, data_dir)


def is_known(name: str) -> bool:
    """Whether `load_data` takes a set of this name; others were made in Python."""
    return name in DATA_NAMES or is_imagenet(name) or is_npz(name) or ":" in name


def warn_of_other_framing(data: LabelledSet, trained: Framing | None, network: str) -> None:
    """Warn if recordings are framed otherwise than those that `network` was trained on, as far as that is known."""
    own = data.framing
    if own is None or trained is None:
        return
    if own.sensor != trained.sensor or (own.by != trained.by and data.x.shape[1] > 1):  # one frame has all events
        warnings.warn(
            f"{data.name} holds {own}; {network} was trained on {trained}: its accuracy may be another one",
            RuntimeWarning,
            stacklevel=3,
        )


def load_parts(
    name: str, *, data_dir: Path, T: int = 10, fraction: float, trained: Framing | None = None
) -> tuple[LabelledSet, LabelledSet | None]:
    """The training images of a set in two parts: those that a run trains on, and those it holds out for validation.

    What comes after the training asks here too, with the run's own `val_fraction`: a threshold or a check on images
    that were trained on looks better than it is.

    Args:
        fraction: share held out, see `split_validation`; 0 for none.

    Raises: as `load_data` and `split_validation`.
    """
    data = load_data(name, "train", data_dir=data_dir, T=T, trained=trained)
    return split_validation(data, fraction=fraction) if fraction else (data, None)


def holds_out_others(name: str, val: LabelledSet, known: Mapping[str, Any]) -> bool:
    """Whether a run held out other images than `val`, and so may have trained on some of these.

    Which images are held out follows from their order: CIFAR has another one in torchvision's files than in zips, and a
    folder where a file was renamed.

    Args:
        name: the data set that `val` is the validation part of, by the run's own fraction.
        known: the run's settings of the data. False where they do not tell: of another data set, of recordings that
            are cut by another rule, or without a fingerprint.
    """
    wanted, own = known.get("fingerprint"), str(known.get("name", ""))
    comparable = same_data(name, own) and name.startswith(_BY_TIME) == own.startswith(_BY_TIME)
    return wanted is not None and comparable and val.fingerprint != wanted


def remedy_of_others(name: str) -> str:
    """What to do about images that are not those of the training, by the name of the data set."""
    if _is_path(name):
        return "take the file or folder as it was then"
    return "name the folder it was trained from (CIFAR's zips have another order than torchvision's files), --data-dir"


def check_recorded(name: str, source: Path | str, *, other: str = ", or name other data with --data") -> None:
    """Refuse data that `source`, a run or a model, was trained on and names by a path where nothing is.

    Args:
        other: than to have it there, what may be done.

    Raises:
        FileNotFoundError: nothing is there.
    """
    _, path = _parts(name)
    if not _is_path(name) or path.exists():
        return
    if path.is_absolute():
        raise FileNotFoundError(f"{source} was trained on {name}, which is not there; put it there again{other}")
    raise FileNotFoundError(
        f"{source} was trained on {name}, a path relative to where the training was started, and it is not here; "
        f"run this there{other}"
    )


def same_data(name: str, other: str) -> bool:
    """Whether two names stand for one data set, whatever its images' size, the frames that recordings are cut into, and
    the way a path is written."""
    return _place(name) == _place(other)


def is_copy(name: str, *, T: int, fraction: float, known: Mapping[str, Any]) -> bool:
    """Whether a set that its path names was trained on under another one: what a run held out of it, or without a
    `fraction` all of it, has the fingerprint that is `known` of the training's data.

    Args:
        T: frames that the training cut a recording into.

    Raises: as `load_data`.
    """
    if not _is_path(name) or "fingerprint" not in known:
        return False
    data = load_data(name, "train", data_dir=Path(), T=T, trained=Framing.of(known))
    held_out = stratified(data.labels, fraction=fraction)[1] if fraction else slice(None)
    return len(data.labels[held_out]) > 0 and data.select(held_out).fingerprint == known["fingerprint"]


def is_own_file(name: str, own: str) -> bool:
    """Whether `name` is the very `.npz` that a training on `own` was given: one set, which has no test part."""
    return is_npz(name) and same_data(name, own)


def _place(name: str) -> tuple[str, str]:
    kind, path = _parts(name)
    return kind, os.path.realpath(path)


def _is_path(name: str) -> bool:
    """Whether a set lies where its name says, whatever --data-dir is."""
    kind, _ = _parts(name)
    return is_npz(name) or kind.removeprefix(_SACCADES) in _OF_PATHS


def _parts(name: str) -> tuple[str, Path]:
    """What kind of set it is, and what follows: a path, which may have colons too, or the name of a set."""
    plain = name.removeprefix(_BY_TIME)
    plain = re.sub(r"@\d+$", "", plain) if plain.startswith("imagenet") else plain
    saccades = _SACCADES if plain.startswith(_SACCADES) else ""
    kind = next((saccades + kind for kind in _OF_PATHS if plain.startswith(saccades + kind)), saccades)
    return kind, Path(plain.removeprefix(kind)).expanduser()


def _load_images(name: str, split: Split, data_dir: Path) -> LabelledSet:
    if name in _IMAGE_SETS:
        return _IMAGE_SETS[name](split, data_dir)
    if is_imagenet(name):
        return load_imagenet(name, split, data_dir=data_dir)
    if name.startswith("folder:"):
        return load_folder(name.removeprefix("folder:"), split)
    if is_npz(name):
        return load_npz(Path(name).expanduser(), split)
    hint = f" (for the folder of that name: folder:{name})" if name and Path(name).is_dir() else ""
    raise ValueError(f"unknown data set {name!r}{hint}; choose {_CHOICES}")


def _load_saccades(name: str, images: str, split: Split, data_dir: Path, binning: Binning) -> FrameSet:
    sets = {part: _load_images(images, part, data_dir) for part in dict.fromkeys((split, "train"))}
    chosen, train = sets[split], sets["train"]
    if not isinstance(chosen, ImageSet) or not isinstance(train, ImageSet):
        reason = "stays on disk" if isinstance(chosen, ImageFiles) else "holds frames already"
        raise ValueError(f"{name!r}: {images} {reason}; saccades turn images into frames, in memory")
    return saccade_set(chosen, train, name, binning)
