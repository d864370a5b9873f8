"""Sets of recordings: N-MNIST, DVS-CIFAR10, and `events:PATH` for class folders of event files."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tetdeploy.system.extras import import_extra

from .cache import Arrays, Cache, readable
from .cifar import CIFAR10
from .download import download
from .events import READERS, Binning, Framing, Size, decode_recordings, frame_size, measure_sensor
from .folder import class_files, in_mixed_order, one_part, refuse_different_classes
from .frames import NUM_MEASURED, FrameSet, count_statistics
from .images import mixed_order
from .labelled import Split

COUNTS: dict[str, dict[Split, int]] = {
    "n-mnist": {"train": 60_000, "test": 10_000},
    "dvs-cifar10": {"train": 9_000, "test": 1_000},
}

_DIGITS = tuple("0123456789")


def load_event_folder(root: Path | str, split: Split, binning: Binning, trained: Framing | None = None) -> FrameSet:
    """Read PATH/train/<class>/* and PATH/test/<class>/*: `.npz` (t, x, y, p), `.aedat4` and N-MNIST's `.bin`.

    Classes are the folders' names, sorted. All recordings must come from sensors of one size: a `.npz` says it in
    `sensor_size` (width, height). If no file says it, it is that of `trained`, or, without that or where events lie
    outside it, the smallest sensor that holds every event; if that is scaled, a warning says so. The order is
    fixed and mixed over the classes. Hidden files are ignored, as in `load_folder`.

    Returns:
        Frames uint8 [N, T, 2, H, W], H and W at most 48, see `to_frames`.

    Raises:
        OSError: a folder is missing or cannot be read.
        ValueError: a class folder is empty or lacks its twin, or files cannot be used: damaged, empty, times negative
            or not ascending, pixels outside the sensor. All such files are counted, and the first ones named.
        MissingExtraError: there are `.aedat4` or `.bin` files and tonic is not installed.
    """
    root = Path(root).expanduser()
    train, test = (class_files(root / part, suffixes=tuple(READERS), kind="recordings") for part in ("train", "test"))
    refuse_different_classes(root, train, test)
    paths, labels = in_mixed_order(train, test)
    cache = Cache(root, paths)
    sensor = _sensor(root, paths, cache, trained)  # of both splits: they share one

    def decode() -> Arrays:
        return {"frames": decode_recordings(list(map(Path, paths)), binning, sensor, text=root.name)}

    key = f"events-{readable(root)}-{_suffix(binning)}-{sensor[1]}x{sensor[0]}"
    frames = cache.get(key, decode)["frames"]
    num_train = sum(map(len, train.values()))
    mean, std = count_statistics(frames[:num_train])
    frames, labels = one_part(split, num_train, frames, labels)
    framing = Framing(binning.by, sensor)
    return FrameSet(f"events:{root}", split, frames, labels, tuple(train), mean, std, framing)


def _sensor(root: Path, paths: list[str], cache: Cache, trained: Framing | None) -> Size:
    def measure() -> Arrays:
        size, is_said = measure_sensor(list(map(Path, paths)), text=f"measuring {root.name}")
        return {"sensor": np.array(size), "is_said": np.array(is_said)}

    measured = cache.get(f"sensor-{readable(root)}", measure)
    height, width = map(int, measured["sensor"])
    if measured["is_said"]:
        return height, width
    if trained is not None and height <= trained.sensor[0] and width <= trained.sensor[1]:
        return trained.sensor
    if (cells := frame_size((height, width))) != (height, width):
        warnings.warn(
            f"no recording of {root.name} says the size of its sensor: the {width}x{height} pixels (width x height) "
            f"that events reach are scaled to {cells[1]}x{cells[0]}, and another folder of the same camera may be "
            "scaled otherwise; write sensor_size (width, height) into one recording, or into all",
            RuntimeWarning,
            stacklevel=2,
        )
    return height, width


def load_n_mnist(split: Split, data_dir: Path, binning: Binning) -> FrameSet:
    """N-MNIST (Orchard et al. 2015), frames uint8 [N, T, 2, 34, 34], found in `NMNIST` or downloaded by tonic.

    `data_dir/NMNIST` has tonic's layout: `Train/<digit>/*.bin` and `Test/<digit>/*.bin`.

    Raises:
        OSError: nothing was found and the download failed.
        ValueError: files are missing or cannot be used.
        MissingExtraError: tonic is not installed.
    """
    tonic = import_extra("tonic", "events")
    folder = data_dir / "NMNIST"
    found: dict[Split, list[Path]] = {}
    parts: dict[Split, Path] = {"train": folder / "Train", "test": folder / "Test"}
    for part, place in parts.items():
        if not any(place.glob("*/[!.]*.bin")):
            make = partial(tonic.datasets.NMNIST, train=part == "train")
            download("n-mnist", make, "NMNIST", data_dir, looked_for=[f"{place}/<digit>/*.bin"])
        found[part] = sorted(place.glob("[0-9]/[!.]*.bin"))
    width, height, _ = tonic.datasets.NMNIST.sensor_size
    return _frame_set("n-mnist", split, folder, found, _DIGITS, (height, width), binning)


def load_dvs_cifar10(split: Split, data_dir: Path, binning: Binning) -> FrameSet:
    """DVS-CIFAR10 (Li et al. 2017), frames uint8 [N, T, 2, 48, 48], found in `CIFAR10DVS` or downloaded by tonic.

    `data_dir/CIFAR10DVS` has tonic's layout: `<class>/*.aedat4`, numbered. The set has no test split of its own: as is
    usual, the first 900 recordings of each class are for training and the last 100 for testing.

    Raises:
        OSError: nothing was found and the download failed.
        ValueError: files are missing or cannot be used.
        MissingExtraError: tonic is not installed.
    """
    tonic = import_extra("tonic", "events")
    folder = data_dir / "CIFAR10DVS"
    if not any(folder.glob("*/[!.]*.aedat4")):
        looked_for = [f"{folder}/<class>/*.aedat4"]
        download("dvs-cifar10", tonic.datasets.CIFAR10DVS, "CIFAR10DVS", data_dir, looked_for=looked_for)
    found: dict[Split, list[Path]] = {"train": [], "test": []}
    for name in CIFAR10.class_names:
        paths = sorted((folder / name).glob("[!.]*.aedat4"), key=lambda path: (_number(path), path.name))
        num_train = len(paths) * 9 // 10
        found["train"] += paths[:num_train]
        found["test"] += paths[num_train:]
    width, height, _ = tonic.datasets.CIFAR10DVS.sensor_size
    return _frame_set("dvs-cifar10", split, folder, found, CIFAR10.class_names, (height, width), binning)


def _frame_set(
    name: str,
    split: Split,
    root: Path,
    found: dict[Split, list[Path]],
    class_names: tuple[str, ...],
    sensor: Size,
    binning: Binning,
) -> FrameSet:
    for part, paths in found.items():
        if len(paths) != COUNTS[name][part]:
            raise ValueError(
                f"{root}: {len(paths):,} recordings, but {name} has {COUNTS[name][part]:,} in {part}; "
                "remove the folder to download it again, or use events:PATH for a set of your own"
            )
    mixed: dict[Split, list[Path]] = {p: [paths[i] for i in mixed_order(len(paths))] for p, paths in found.items()}

    def decode(paths: list[Path]) -> NDArray[np.uint8]:
        return decode_recordings(paths, binning, sensor, text=f"{name} {split}")

    key = f"{name}-{split}-{_suffix(binning)}"
    frames = Cache(root, mixed[split]).get(key, lambda: {"frames": decode(mixed[split])})["frames"]
    measured = mixed["train"][:NUM_MEASURED]

    def measure() -> Arrays:
        return {"statistics": np.array(count_statistics(frames if split == "train" else decode(measured)))}

    statistics = Cache(root, measured).get(f"{name}-statistics-{_suffix(binning)}", measure)["statistics"]
    mean, std = map(tuple, statistics.tolist())
    labels = np.array([class_names.index(path.parent.name) for path in mixed[split]], np.int64)
    return FrameSet(name, split, frames, labels, class_names, mean, std, Framing(binning.by, sensor))


def _suffix(binning: Binning) -> str:
    return f"T{binning.T}-{binning.by}"


def _number(path: Path) -> int:
    """The last number in a file's name: 10 of cifar10_cat_10.aedat4."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0
