"""ImageNet (ILSVRC 2012): folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .folder import class_file_names, class_folders, refuse_different_classes
from .image_files import ImageFiles
from .images import mixed_order
from .labelled import Split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of all who train on it
SIZE = 224


def load_imagenet(name: str, split: Split, *, data_dir: Path) -> ImageFiles:
    """List ImageNet, or whatever lies in such folders. No image is read.

    Classes are the folders' names, sorted, as torchvision counts them. The order is fixed and mixed over the classes.

    Args:
        name: "imagenet" for DATA_DIR/imagenet, "imagenet:PATH" for another folder; "@64" at its end makes the crops
            64 x 64 pixels instead of 224 x 224.
        split: "train", or "test" for the folder val: the true test set has no labels.
        data_dir: where the folder imagenet lies.

    Raises:
        OSError: a folder is missing or cannot be read.
        ValueError: the name does not parse; a class folder is empty or lacks its twin, a file's ending is no image's.
    """
    root, size = _parse(name, data_dir)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: ImageNet is not downloaded; lay train/<wnid>/ and val/<wnid>/ there, or name another "
            "folder, imagenet:PATH, or with --data-dir the one that imagenet lies in"
        )
    part, other = ("train", "val") if split == "train" else ("val", "train")
    classes = class_file_names(root / part)
    pair = (classes, class_folders(root / other))
    refuse_different_classes(root, *(pair if split == "train" else pair[::-1]), test_name="val")
    files = np.array([os.fsencode(f"{folder}/{file}") for folder, members in classes.items() for file in members])
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()]).astype(np.int64)
    order = mixed_order(len(files))
    return ImageFiles(name, split, root / part, files[order], labels[order], tuple(classes), MEAN, STD, size)


def is_imagenet(name: str) -> bool:
    """Whether a set of this name is one of `load_imagenet`: "imagenet", "imagenet@64", "imagenet:PATH"."""
    return name.partition(":")[0].partition("@")[0] == "imagenet"


def _parse(name: str, data_dir: Path) -> tuple[Path, int]:
    """The folder and the size of the crops."""
    place, at, size = name.rpartition("@")
    if not at or not size.isdecimal():
        place, size = name, str(SIZE)
    path = place.removeprefix("imagenet").removeprefix(":")
    return (Path(path).expanduser() if path else data_dir / "imagenet"), int(size)
