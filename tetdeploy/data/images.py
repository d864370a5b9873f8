"""A set of labelled images in memory, and its `.npz` form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_path, check_type
from tetdeploy.batches import parts
from tetdeploy.storage.arrays import opened_npz, write_npz

from .labelled import Encoding, LabelledSet, Split

S = TypeVar("S", bound=LabelledSet)

_MAX_CLASSES = 100_000  # without names: a label beyond is a mistake, and names up to it would fill the memory
_LAYOUTS = "uint8 [N, C, H, W] (or [N, H, W] for one channel)"


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledSet):
    """Labelled 8-bit images.

    Attributes:
        name: what `load_data` was given: "digits", "folder:photos", ...
        split: "train" or "test".
        images: uint8 [N, C, H, W], 0..255.
        labels: int64 [N], 0..K-1.
        class_names: K distinct names; label k means class_names[k].
        mean: per channel, of images / 255, in the training split.
        std: per channel, of images / 255, in the training split; greater than 0.

    Raises:
        ValueError: the parts do not fit each other.
    """

    encoding: ClassVar[Encoding] = "direct"
    _array: ClassVar[str] = "images"
    _items: ClassVar[str] = "images"

    name: str
    split: Split
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        self._check("[N, C, H, W]")


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images / 255 for each channel.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        C means and C standard deviations; a standard deviation is at least 1/255 (one grey level), so that a
        constant channel can be divided by it.
    """
    levels = np.arange(256) / 255
    mean, std = [], []
    for histogram in histograms(images):
        share = histogram / histogram.sum()
        mean.append(float(share @ levels))
        std.append(max(float(np.sqrt(share @ (levels - mean[-1]) ** 2)), 1 / 255))
    return tuple(mean), tuple(std)


def histograms(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many pixels of each channel of images [N, C, H, W] have each level, [C, 256]: for exact statistics without a
    float copy of the images."""
    at_once = max(2**15 // images[0, 0].size, 1)  # bincount makes 8 bytes of each pixel, which stay in the cache so
    found = np.zeros((images.shape[1], 256), np.int64)
    for part in parts(len(images), at_once):
        for channel, pixels in enumerate(images[part].swapaxes(0, 1)):
            found[channel] += np.bincount(pixels.ravel(), minlength=256)
    return found


def stratified(labels: NDArray[np.int64], *, fraction: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split 0..N-1 so that each class gives `fraction` of its members, rounded, to the second part.

    A class of two or more members keeps at least one on each side; a class of one stays in the first part.

    Args:
        labels: int64 [N].
        fraction: share of the second part, between 0 and 1, both excluded.

    Returns:
        Indices of the first and of the second part, each ascending; on every machine the same.
    """
    # numpy promises that RandomState's stream never changes; default_rng's may with numpy's version
    rng = np.random.RandomState(0)
    second = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    for members in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        members = rng.permutation(members)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        second[members[:count]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)


def mixed_order(count: int) -> NDArray[np.intp]:
    """A fixed permutation of 0..count-1, for sources sorted by class: their first n images become a fair sample."""
    return np.random.RandomState(0).permutation(count)


def split_validation(data: S, *, fraction: float) -> tuple[S, S]:
    """Split a set into a part to train on and a part to validate on, class by class.

    Each class gives `fraction` of its images (or recordings), rounded, to validation; a class of two or more keeps at
    least one on each side, and a class of one stays in training. Both parts keep the order, the mean and the std of
    `data`.

    Args:
        data: the set to split.
        fraction: share of the validation part, between 0 and 1, both excluded.

    Returns:
        The training part and the validation part; on every machine the same.

    Raises:
        ValueError: `fraction` is out of range, or no class has the two images a split needs.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction is {fraction}; wanted a number between 0 and 1, such as 0.1")
    train, validation = stratified(data.labels, fraction=fraction)
    if not len(validation):
        raise ValueError(
            f"{data.name} {data.split}: no class has two images, so none can go to validation; add images, "
            "or train without validation (--val-fraction 0)"
        )
    return data.select(train), data.select(validation)


def save_npz(data: LabelledSet, path: Path | str) -> None:
    """Write `images`, `labels` and `class_names` to a `.npz` that `load_data` reads, also on a host without torch.

    The images of a `FrameSet` are its frames, uint8 [N, T, C, H, W].

    Raises:
        OSError: the file cannot be written; an earlier one is left as it was.
        ValueError: `data` is no set; `path` does not end in `.npz`, so `load_data` would not know what it is.
    """
    check_type("data", data, LabelledSet, "pass save_npz(data, path)")
    check_path("path", path, "a .npz file")
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"cannot save images as {path}: the name must end in .npz")
    write_npz(path, {"images": data.x, "labels": data.labels, "class_names": data.class_names})


def image_set(path: Path | str, split: Split, arrays: Mapping[str, NDArray[Any]]) -> ImageSet:
    """The set that the arrays of a `.npz` make: `images` uint8 [N, C, H, W] or [N, H, W], see `load_npz`."""
    images = _usable_images(path, arrays["images"])
    labels = usable_labels(path, arrays["labels"])
    mean, std = channel_statistics(images)
    return ImageSet(str(path), split, images, labels, usable_names(path, arrays, labels), mean, std)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; give the path of a .npz with the arrays images and labels")
    how = "write it with numpy.savez(path, images=..., labels=...)"
    try:
        with path.open("rb") as source, opened_npz(source, str(path)) as file:
            found = ", ".join(file) or "nothing"
            arrays = {name: file[name] for name in ("images", "labels", "class_names") if name in file}
    except ValueError as error:
        raise ValueError(f"{error}; {how}") from error
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise ValueError(f"{path} holds {found} but not {' and '.join(missing)}; {how}")
    return arrays


def _usable_images(path: Path | str, images: NDArray[Any]) -> NDArray[np.uint8]:
    got = f"{path}: images are {images.dtype} {list(images.shape)}"
    if np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{got}; wanted {_LAYOUTS}: if they run from 0 to 1, multiply by 255 and cast to uint8")
    if images.dtype != np.uint8:
        raise ValueError(f"{got}; wanted {_LAYOUTS}: scale to 0..255 and cast to uint8")
    if images.ndim not in (3, 4):
        raise ValueError(f"{got}; wanted {_LAYOUTS}")
    if images.ndim == 4:
        refuse_channels_last(images.shape, got, _LAYOUTS)
    if 0 in images.shape:
        raise ValueError(f"{got}, which holds no pixel; wanted {_LAYOUTS} with one image or more")
    return np.ascontiguousarray(images if images.ndim == 4 else images[:, None])


def refuse_channels_last(shape: tuple[int, ...], got: str, wanted: str) -> None:
    """Raise ValueError where the last three axes are H, W, C rather than C, H, W: 1 to 4 at the end, as few as channels
    are, and more of both others, where images of that width would be narrow and have more than 4 channels."""
    if 1 <= shape[-1] <= 4 < min(shape[-3:-1]):
        *others, height, width, channels = range(len(shape))
        axes = ", ".join(map(str, (*others, channels, height, width)))
        raise ValueError(
            f"{got}, with the channels last; wanted {wanted}: use images.transpose({axes}), or if they really are so "
            "narrow, swap H and W"
        )


def usable_labels(path: Path | str, labels: NDArray[Any]) -> NDArray[np.int64]:
    got = f"{path}: labels are {labels.dtype} {list(labels.shape)}; wanted integers [N], one class number an image"
    if labels.ndim == 2:
        if 1 in labels.shape:
            raise ValueError(f"{got}: give labels.ravel()")
        if ((labels != 0).sum(1) == 1).all():  # one-hot
            raise ValueError(f"{got}: give labels.argmax(1)")
        raise ValueError(f"{got}; some rows have none or several, which no command trains")
    if labels.dtype.kind in "US":
        raise ValueError(f"{got}: np.unique(labels, return_inverse=True) gives the names, sorted, and the numbers")
    if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
        raise ValueError(f"{got}; these are no class numbers, and there is no regression")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f"{got}: cast them with labels.astype('int64')")
    if labels.size and (highest := int(labels.max())) > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: the highest label is {highest}; number the classes from 0")
    return labels.astype(np.int64)


def usable_names(path: Path | str, arrays: Mapping[str, NDArray[Any]], labels: NDArray[np.int64]) -> tuple[str, ...]:
    """The `class_names` of a `.npz`, by default "0" to the highest label."""
    if "class_names" not in arrays:
        highest = int(labels.max(initial=0))
        if highest >= _MAX_CLASSES:
            raise ValueError(
                f"{path}: the highest label is {highest}, which would make as many classes; "
                "number the classes from 0, or name them in class_names"
            )
        return tuple(str(k) for k in range(highest + 1))
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise ValueError(f"{path}: class_names are {names.dtype} {list(names.shape)}; wanted strings [K], one a class")
    return tuple(str(name) for name in names)
