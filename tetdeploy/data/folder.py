"""`folder:PATH`: PATH/train/<class>/* and PATH/test/<class>/*."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tetdeploy.class_names import other_form
from tetdeploy.wording import shorten

from .cache import Arrays, Cache, readable
from .decoding import SUFFIXES, ImageFile, decode_images
from .images import ImageSet, channel_statistics, mixed_order
from .labelled import Split

ClassFiles = dict[str, list[str]]


def load_folder(root: Path | str, split: Split) -> ImageSet:
    """Read png, jpeg, webp and bmp images from class folders.

    Classes are the folders' names, sorted. All images, of both splits, must have one size; they become RGB unless all
    are greyscale. Mean and std are those of the training images. The order is fixed and mixed over the classes.
    A warning says if test images are training images, too.
    Names that begin with a dot are ignored, and Windows's Thumbs.db and desktop.ini.

    Args:
        root: the folder that has `train` and `test`, each with the same class folders.
        split: "train" or "test".

    Raises:
        OSError: a folder is missing or cannot be read.
        ValueError: a class folder is empty or lacks its twin, a file is no image or unreadable, sizes differ. All such
            files are counted, and the first ones named.
        MissingExtraError: Pillow is not installed.
    """
    root = Path(root).expanduser()
    train, test = (class_files(root / part) for part in ("train", "test"))
    refuse_different_classes(root, train, test)
    paths, labels = in_mixed_order(train, test)

    def decode() -> Arrays:
        # both splits at once: whether there are one or three channels depends on all images
        files = [ImageFile(path, Path(path).read_bytes) for path in paths]
        images = decode_images(files, text=f"decoding {root.name}")
        mean_std = np.array(channel_statistics(images[:num_train]))
        return {"images": images, "mean_std": mean_std, "copies": _copies(images[:num_train], images[num_train:])}

    num_train = sum(map(len, train.values()))
    kept = Cache(root, paths).get(f"folder-{readable(root)}", decode)
    images, (mean, std) = kept["images"], map(tuple, kept["mean_std"].tolist())
    if split == "test" and len(kept["copies"]):
        _warn_of_copies(root, paths[num_train:], kept["copies"])
    images, labels = one_part(split, num_train, images, labels)
    return ImageSet(f"folder:{root}", split, images, labels, tuple(train), mean, std)


def _copies(train: NDArray[np.uint8], test: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Which test images are training images, too."""
    known = {hash(image.tobytes()) for image in train}
    return np.array([index for index, image in enumerate(test) if hash(image.tobytes()) in known], np.int64)


def _warn_of_copies(root: Path, test: list[str], copies: NDArray[np.int64]) -> None:
    warnings.warn(
        f"{len(copies):,} of the {len(test):,} test images of {root} are training images too, pixel for pixel: "
        f"{shorten([test[index] for index in copies])}; accuracies on these say nothing of new images",
        RuntimeWarning,
        stacklevel=3,
    )


def one_part(
    split: Split, num_train: int, x: NDArray[np.uint8], labels: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Those of a split, where the training's come first. A copy of the test split, so that the other one, the larger
    as a rule, does not stay in memory."""
    if split == "train":
        return x[:num_train], labels[:num_train]
    return x[num_train:].copy(), labels[num_train:]


def class_files(folder: Path, *, suffixes: tuple[str, ...] = SUFFIXES, kind: str = "images") -> ClassFiles:
    """The files of each class folder in `folder`, both sorted; see `class_file_names`. Texts: a Path takes 20 times as
    long to make."""
    names = class_file_names(folder, suffixes=suffixes, kind=kind)
    places = {name: f"{folder / name}{os.sep}" for name in names}
    return {name: [places[name] + file for file in files] for name, files in names.items()}


def class_file_names(
    folder: Path, *, suffixes: tuple[str, ...] = SUFFIXES, kind: str = "images"
) -> dict[str, list[str]]:
    """The names of the files in each class folder of `folder`, both sorted.

    Looks at no file by itself: a million are listed in seconds.

    Args:
        folder: has the class folders.
        suffixes: what the files may end in, in lower case.
        kind: what errors call the files.

    Raises:
        OSError: `folder` is missing or cannot be read.
        ValueError: there are no class folders, files lie outside them, one is empty, a link to nothing, or holds what
            is of another kind.
    """
    classes = {name: _visible(folder / name) for name in class_folders(folder, suffixes=suffixes, kind=kind)}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise ValueError(f"{len(empty)} class folders in {folder} are empty: {shorten(empty)}; fill or remove them")
    foreign = [
        str(folder / name / file.name)
        for name, files in classes.items()
        for file in files
        if not file.name.lower().endswith(suffixes) or file.is_dir()
    ]
    if foreign:
        raise ValueError(
            f"{len(foreign)} entries of the class folders in {folder} are no {'/'.join(suffixes)} {kind}: "
            f"{shorten(foreign)}; convert or remove them"
        )
    return {name: [file.name for file in files] for name, files in classes.items()}


def class_folders(folder: Path, *, suffixes: tuple[str, ...] = SUFFIXES, kind: str = "images") -> list[str]:
    """The names of the class folders in `folder`, sorted; the arguments and errors are those of `class_file_names`."""
    formats = [suffix[1:] for suffix in suffixes]
    wanted = f"{folder}/<class>/ with {', '.join(formats[:-1])} or {formats[-1]} {kind}"
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; wanted {wanted}")
    entries = _visible(folder)
    stray = [e.path for e in entries if e.name.lower().endswith(suffixes) and not e.is_dir()]
    if stray:
        raise ValueError(
            f"{len(stray)} {kind} in {folder} lie outside a class folder: {shorten(stray)}; move them into one"
        )
    broken = [e.path for e in entries if e.is_symlink() and not Path(e.path).exists()]
    if broken:  # a class on a disk that is not mounted would be missing without a word
        raise ValueError(
            f"{len(broken)} links in {folder} lead to nothing: {shorten(broken)}; put it there again or remove them"
        )
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise ValueError(f"{folder} has no class folders; wanted {wanted}")
    return classes


def is_hidden(name: str) -> bool:
    """Whether it begins with a dot, or is what Windows's Explorer leaves in folders."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What is not hidden, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)


def refuse_different_classes(root: Path, train: Iterable[str], test: Iterable[str], *, test_name: str = "test") -> None:
    """Raise ValueError, with their names, if `train` and `test` have other classes."""
    only_train, only_test = (sorted(set(a) - set(b)) for a, b in ((train, test), (test, train)))
    if only_train or only_test:
        found = (("train", only_train), (test_name, only_test))
        parts = [f"{len(names)} only in {part}: {shorten(names)}" for part, names in found if names]
        raise ValueError(
            f"the classes in {root}/train and {root}/{test_name} differ ({'; '.join(parts)})"
            f"{other_form(only_train, only_test)}; give both the same"
        )


def in_mixed_order(train: ClassFiles, test: ClassFiles) -> tuple[list[str], NDArray[np.int64]]:
    """Paths and labels [N] of the training, then of the test images, each part in a mixed order."""
    paths: list[str] = []
    labels: list[int] = []
    for classes in (train, test):
        pairs = [(path, label) for label, files in enumerate(classes.values()) for path in files]
        for index in mixed_order(len(pairs)):
            paths.append(pairs[index][0])
            labels.append(pairs[index][1])
    return paths, np.array(labels, np.int64)
