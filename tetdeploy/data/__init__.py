"""Image sets by name. Imports numpy only; what a set needs beyond it is imported when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .cifar import load_cifar10, load_cifar100
from .digits import load_digits
from .fashion_mnist import load_fashion_mnist
from .folder import load_folder
from .frames import FrameSet, load_frames
from .images import ImageSet, load_npz, save_npz, split_validation
from .labelled import LabelledSet, Split

__all__ = [
    "DATA_NAMES",
    "FrameSet",
    "ImageSet",
    "LabelledSet",
    "Split",
    "load_data",
    "load_frames",
    "save_npz",
    "split_validation",
]

_LOADERS: dict[str, Callable[[Split, Path], ImageSet]] = {
    "digits": lambda split, data_dir: load_digits(split),
    "fashion-mnist": lambda split, data_dir: load_fashion_mnist(split, data_dir=data_dir),
    "cifar10": lambda split, data_dir: load_cifar10(split, data_dir=data_dir),
    "cifar100": lambda split, data_dir: load_cifar100(split, data_dir=data_dir),
}

DATA_NAMES = tuple(_LOADERS)


def load_data(name: str, split: Split, *, data_dir: Path) -> ImageSet:
    """Load an image set.

    Args:
        name: "digits", "fashion-mnist", "cifar10", "cifar100", "folder:PATH" (PATH/train/<class>/* and
            PATH/test/<class>/*) or a path that ends in ".npz" (one set: both splits read all of it).
        split: "train" or "test".
        data_dir: where Fashion-MNIST and CIFAR are looked for, and downloaded to when missing.

    Returns:
        The set; the order of its images is always the same. For all but `.npz` it is mixed over the classes, so
        that the first n images are a fair sample.

    Raises:
        ValueError: unknown name or split, or the data are damaged or do not fit together.
        OSError: files are missing or unreadable, or a download failed.
        MissingExtraError: a package that this set needs is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    if name in _LOADERS:
        return _LOADERS[name](split, Path(data_dir).expanduser())
    if name.startswith("folder:"):
        return load_folder(name.removeprefix("folder:"), split)
    if name.lower().endswith(".npz"):
        return load_npz(Path(name).expanduser(), split)
    hint = f" (for the folder of that name: folder:{name})" if Path(name).is_dir() else ""
    raise ValueError(
        f"unknown data set {name!r}{hint}; choose {', '.join(DATA_NAMES)}, folder:PATH or a path ending in .npz"
    )
