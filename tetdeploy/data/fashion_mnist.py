"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .download import download_torchvision
from .images import ImageSet
from .labelled import Split

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN = (0.2860,)
STD = (0.3530,)

COUNTS: dict[Split, int] = {"train": 60_000, "test": 10_000}

_PREFIX = {"train": "train", "test": "t10k"}
# MNIST's files have the same names; these are its first labels
_MNIST_LABELS = {"train": [5, 0, 4, 1, 9, 2, 1, 3], "test": [7, 2, 1, 0, 4, 1, 4, 9]}


def load_fashion_mnist(split: Split, data_dir: Path) -> ImageSet:
    """Fashion-MNIST, uint8 [N, 1, 28, 28], from the idx files under `data_dir`, or else downloaded into it.

    The files (`train-images-idx3-ubyte` and so on, each plain or `.gz`) are looked for in `FashionMNIST/raw`
    (torchvision's layout), in `fashion-mnist` (Debian's package dataset-fashion-mnist, with /usr/share/datasets as
    `data_dir`) and in `data_dir` itself.

    Raises:
        OSError: nothing was found and the download failed.
        ValueError: a file is damaged, is MNIST's, or holds images of another number or size.
        MissingExtraError: a download is needed and torchvision is not installed.
    """
    folders = [data_dir / "FashionMNIST" / "raw", data_dir / "fashion-mnist", data_dir]
    files = _find(folders, split)
    if files is None:
        looked_for = [
            f"{folder}/{_PREFIX[split]}-images-idx3-ubyte[.gz] and -labels-idx1-ubyte[.gz]" for folder in folders
        ]
        download_torchvision("fashion-mnist", "FashionMNIST", "FashionMNIST", data_dir, looked_for=looked_for)
        files = _find(folders, split)
        assert files is not None, "torchvision's layout is the first one looked for"
    images, labels = read_idx(files[0], ndim=3), read_idx(files[1], ndim=1)
    if labels[:8].tolist() == _MNIST_LABELS[split]:
        raise ValueError(
            f"{files[1]} holds the labels of MNIST, not of Fashion-MNIST; name another folder with --data-dir"
        )
    if images.shape != (COUNTS[split], 28, 28):
        count, height, width = images.shape
        raise ValueError(
            f"{files[0]}: {count:,} images of {width}x{height}, but fashion-mnist has {COUNTS[split]:,} of 28x28 in "
            f"{split}; name another folder with --data-dir, or for a set of your own use folder:PATH or a .npz"
        )
    return ImageSet("fashion-mnist", split, images[:, None], labels.astype(np.int64), CLASS_NAMES, MEAN, STD)


def _find(folders: list[Path], split: Split) -> tuple[Path, Path] | None:
    for folder in folders:
        found = []
        for kind in ("images-idx3", "labels-idx1"):
            plain = folder / f"{_PREFIX[split]}-{kind}-ubyte"
            found += [path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()][:1]
        if len(found) == 2:
            return found[0], found[1]
    return None


def read_idx(path: Path, *, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, plain or `.gz`: 0, 0, 8, ndim, then ndim big-endian int32 sizes, then the bytes.

    torchvision reads only plain files, from its own folder, and needs torch.

    Raises:
        ValueError: it is cut short or is not such a file.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to download the set again") from error
    start = 4 + 4 * ndim
    shape = np.frombuffer(data[4:start].ljust(4 * ndim, b"\0"), ">i4").tolist()
    if data[:4] != bytes((0, 0, 8, ndim)) or min(shape) < 0 or len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path} is no idx file of {ndim} dimensions or is cut short ({len(data)} bytes); "
            "remove it to download the set again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
