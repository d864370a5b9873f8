"""Recordings of event cameras: reading, checking and cutting them into frames.

tonic reads the cameras' formats; `.npz` needs numpy only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_whole
from tetdeploy.storage.arrays import opened_npz
from tetdeploy.system.extras import MissingExtraError, import_extra
from tetdeploy.wording import in_one_line, shorten

from .decoding import in_threads, refuse_failed

FRAME_SIZE = 48  # pixels; sensors with more are brought to it, as in the paper
LARGEST_SENSOR = 16_384  # pixels a line, more than any event camera has; a damaged event reaches further

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Binning:
    """How a recording is cut into frames.

    Attributes:
        T: frames, one for each time step.
        by: "count" gives each frame the same number of events (to one), "time" the same time.
    """

    T: int
    by: Literal["count", "time"] = "count"

    def __post_init__(self) -> None:
        if check_whole("T", self.T) < 1:
            raise ValueError(f"recordings are cut into T of at least 1 frames, got {self.T}")
        if self.by not in ("count", "time"):
            raise ValueError(f"recordings are cut by {self.by!r}; choose count or time")


@dataclass(frozen=True)
class Framing:
    """What turned the recordings of a data set into frames, besides T; a network must see others framed alike.

    Attributes:
        by: see `Binning`.
        sensor: height and width of the camera, which are brought to those of the frames.
    """

    by: Literal["count", "time"]
    sensor: Size

    def __post_init__(self) -> None:
        if min(self.sensor) < 1:
            raise ValueError(f"a sensor has a height and a width of at least 1, got {self.sensor}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Framing | None:
        """That of the settings of a training's data; None for images, frames of a `.npz`, and in older files.

        Raises:
            ValueError: it is not as `to_dict` gives it.
        """
        if (said := settings.get("framing")) is None:
            return None
        try:
            height, width = said["sensor"]
            return cls(Binning(1, said["by"]).by, (operator.index(height), operator.index(width)))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"framing of the data is {said!r}; wanted by, count or time, and sensor, [H, W]") from None

    def to_dict(self) -> dict[str, Any]:
        return {"by": self.by, "sensor": list(self.sensor)}

    def __str__(self) -> str:
        kind = {"count": "equal counts", "time": "equal time"}[self.by]
        return f"frames of {kind}, of a sensor of {self.sensor[1]}x{self.sensor[0]} pixels (width x height)"


@dataclass(frozen=True, eq=False)
class Recording:
    """The events of one recording, in the order of their times.

    Attributes:
        t: times [n], integers (microseconds, as a rule) or floating, ascending and 0 or more.
        x, y: pixels, integers [n]; row 0 is the upper one.
        p: polarities [n]: 0 or -1 (or False) is OFF, 1 (or True) is ON.
        sensor: height and width of the camera, or None where the file does not say.

    Raises:
        ValueError: no event; arrays that do not fit; times that are negative or not ascending; pixels outside the
            sensor, or beyond any (`LARGEST_SENSOR`); other polarities.
    """

    t: NDArray[Any]
    x: NDArray[Any]
    y: NDArray[Any]
    p: NDArray[Any]
    sensor: Size | None = None

    def __post_init__(self) -> None:
        sizes = {len(array) if array.ndim == 1 else -1 for array in (self.t, self.x, self.y, self.p)}
        if len(sizes) != 1 or -1 in sizes:
            shapes = ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in "txyp")
            raise ValueError(f"its arrays have the shapes {shapes}; wanted [n], all of one length")
        if sizes == {0}:
            raise ValueError("it holds no event")
        self._check_times()
        for name in "xy":
            if getattr(self, name).dtype.kind not in "iu":
                raise ValueError(f"{name} is {getattr(self, name).dtype}; wanted integers, pixels counted from 0")
            if getattr(self, name).min() < 0:
                raise ValueError(f"it has an event at {name}={getattr(self, name).min()}; pixels are counted from 0")
            if self.sensor is None and getattr(self, name).max() >= LARGEST_SENSOR:
                raise ValueError(
                    f"it has an event at {name}={getattr(self, name).max()}, and no camera has {LARGEST_SENSOR:,} "
                    "pixels a line; take damaged events out"
                )
        if self.sensor is not None:
            self.check_inside(self.sensor)
        if self.p.dtype.kind not in "biuf":
            raise ValueError(f"its polarities are {self.p.dtype}; wanted 0 (OFF) and 1 (ON), or -1 and 1")
        on = self.p == 1
        if not (on | (self.p == 0)).all() and not (on | (self.p == -1)).all():
            raise ValueError(
                f"its polarities run from {self.p.min()} to {self.p.max()}; wanted 0 (OFF) and 1 (ON), or -1 and 1"
            )

    def _check_times(self) -> None:
        if self.t.dtype.kind not in "iuf":
            raise ValueError(f"its times are {self.t.dtype}; wanted numbers, such as microseconds")
        lost = np.flatnonzero(~np.isfinite(self.t))
        if len(lost):
            raise ValueError(f"event {lost[0]} is at {self.t[lost[0]]}; wanted times, such as microseconds")
        if self.t.min() < 0:
            raise ValueError(f"it has a negative time, {self.t.min()}; times start at 0 or later")
        back = np.flatnonzero(self.t[1:] < self.t[:-1])
        if len(back):
            i = int(back[0])
            raise ValueError(
                f"its times are not sorted: event {i + 1} is at {self.t[i + 1]}, after {self.t[i]}; "
                "sort all arrays by t, or, where the camera's clock began anew, add what it had reached to later times"
            )

    def check_inside(self, sensor: Size) -> None:
        """Refuse events outside a sensor of this height and width, with ValueError."""
        height, width = self.extent
        if height > sensor[0] or width > sensor[1]:
            raise ValueError(
                f"it reaches the pixel x={width - 1}, y={height - 1}, "
                f"outside the sensor of {sensor[1]}x{sensor[0]} pixels (width x height)"
            )

    @property
    def extent(self) -> Size:
        """Height and width of the smallest sensor that holds every event."""
        return int(self.y.max()) + 1, int(self.x.max()) + 1


def to_frames(recording: Recording, binning: Binning, sensor: Size) -> NDArray[np.uint8]:
    """Count the events of each polarity and pixel in each of T parts of a recording.

    A sensor of more than 48 rows or columns is brought to 48 of them: each cell counts the events on its area, those
    of a pixel that it shares with a neighbour in part. An even picture stays even, as it would not if 128 pixels fell
    into 48 bins of 2 or 3; a lone event on a corner of four cells is lost in the rounding.

    Args:
        recording: its events.
        binning: how many frames, of the same time or the same number of events.
        sensor: height and width of the camera.

    Returns:
        uint8 [T, 2, H, W], OFF before ON, clipped at 255; H and W are those of the sensor, or 48.

    Raises:
        ValueError: an event lies outside the sensor.
    """
    recording.check_inside(sensor)
    (height, width), (rows, columns) = sensor, frame_size(sensor)
    vertical, horizontal = _shares(height, rows), _shares(width, columns).T
    frames = np.empty((binning.T, 2, rows, columns), np.uint8)
    ends = np.searchsorted(_bins(recording.t, binning), np.arange(binning.T + 1))
    for frame, (start, end) in zip(frames, pairwise(ends), strict=True):  # one by one: a large sensor's take 15 MB each
        x, y, p = (array[start:end] for array in (recording.x, recording.y, recording.p))
        pixels = ((p > 0) * height + y.astype(np.int64)) * width + x.astype(np.int64)
        counts: NDArray[Any] = np.bincount(pixels, minlength=2 * height * width).reshape(2, height, width)
        if (rows, columns) != sensor:
            counts = np.rint(vertical @ counts @ horizontal / (rows * columns))
        frame[:] = np.minimum(counts, 255)
    return frames


def frame_size(sensor: Size) -> Size:
    """Height and width of the frames of a sensor."""
    return min(sensor[0], FRAME_SIZE), min(sensor[1], FRAME_SIZE)


def _bins(t: NDArray[Any], binning: Binning) -> NDArray[np.int64]:
    """The frame of each event, [n]."""
    if binning.by == "count":
        return np.arange(len(t)) * binning.T // len(t)
    elapsed = t - t[0]
    if elapsed[-1] == 0:
        return np.zeros(len(t), np.int64)
    bins: NDArray[np.int64] = (elapsed.astype(np.float64) * binning.T / float(elapsed[-1])).astype(np.int64)
    return np.minimum(bins, binning.T - 1)  # the last event ends the last frame


def _shares(pixels: int, cells: int) -> NDArray[np.float64]:
    """How many parts, of `cells`, of each pixel lie in each of `cells` equal cells of a line: [cells, pixels]. As whole
    numbers, so that their sums, and halves of an event, are exact on every machine."""
    edges = np.arange(cells + 1)[:, None] * pixels
    pixel = np.arange(pixels) * cells
    overlap = np.minimum(edges[1:], pixel + cells) - np.maximum(edges[:-1], pixel)
    return overlap.clip(0).astype(np.float64)


def decode_recordings(paths: Sequence[Path], binning: Binning, sensor: Size, *, text: str) -> NDArray[np.uint8]:
    """Read recordings and cut them into frames, in threads.

    Args:
        paths: one or more files that end in a key of `READERS`.
        binning: how each is cut.
        sensor: height and width of the camera.
        text: what the progress bar says.

    Returns:
        uint8 [N, T, 2, H, W], see `to_frames`.

    Raises:
        ValueError: some files cannot be read or hold events that cannot be (all are counted, the first ones named).
        MissingExtraError: tonic is needed and not installed.
    """
    frames = np.zeros((len(paths), binning.T, 2, *frame_size(sensor)), np.uint8)

    def decode(index: int, recording: Recording) -> None:
        frames[index] = to_frames(recording, binning, sensor)

    _read_all(paths, decode, text)
    return frames


def measure_sensor(paths: Sequence[Path], *, text: str) -> tuple[Size, bool]:
    """Height and width of the camera that the files say, and whether one does; if none of them does, the smallest
    sensor that holds every event of all of them.

    Raises: as `decode_recordings`.
        ValueError: they come from sensors of different sizes.
    """
    said: dict[int, Size] = {}
    reached: dict[int, Size] = {}

    def measure(index: int, recording: Recording) -> None:
        reached[index] = recording.extent
        if recording.sensor is not None:
            said[index] = recording.sensor

    _read_all(paths, measure, text)
    sizes = sorted(set(said.values()))
    if len(sizes) > 1:
        examples = [f"{w}x{h} in {next(paths[i] for i in sorted(said) if said[i] == (h, w))}" for h, w in sizes]
        raise ValueError(f"the recordings come from sensors of {len(sizes)} sizes: {shorten(examples)}; wanted one")
    if sizes:
        return sizes[0], True
    return (max(height for height, _ in reached.values()), max(width for _, width in reached.values())), False


def _read_all(paths: Sequence[Path], use: Callable[[int, Recording], None], text: str) -> None:
    """Read every file and hand it on with its index; then refuse, all at once, those that cannot be used."""
    if any(path.suffix.lower() != ".npz" for path in paths):
        import_extra("tonic", "events")

    def read(index: int) -> str | None:
        try:
            use(index, read_recording(paths[index]))
        except MissingExtraError:
            raise
        except Exception as error:  # tonic and its readers raise whatever they like for damaged files
            return f"{paths[index]} ({in_one_line(error)})"
        return None

    refuse_failed(in_threads(read, len(paths), text), f"{len(paths)} recordings cannot be used")


def read_recording(path: Path) -> Recording:
    """The events of a file that ends in `.npz`, `.aedat4` or `.bin`.

    Raises:
        OSError: it cannot be opened.
        ValueError: it ends otherwise, is damaged or holds no events that can be. (Readers of `.aedat4` and `.bin` raise
            other errors, too.)
        MissingExtraError: `.aedat4` and `.bin` need tonic.
    """
    if path.suffix.lower() not in READERS:
        raise ValueError(f"recordings end in {', '.join(READERS)}")
    return READERS[path.suffix.lower()](path)


def read_npz(path: Path) -> Recording:
    """`.npz` with the arrays t, x, y and p, and `sensor_size` (width, height) where the camera is to be checked."""
    with path.open("rb") as source, opened_npz(source, "it") as file:
        found = ", ".join(file) or "nothing"
        arrays = {name: file[name] for name in (*"txyp", "sensor_size") if name in file}
    if missing := [name for name in "txyp" if name not in arrays]:
        raise ValueError(f"it holds {found} but not {', '.join(missing)}")
    size = arrays.pop("sensor_size", None)
    if size is not None and not _is_size(size):
        raise ValueError(
            f"its sensor_size is {size.tolist()}; wanted two whole numbers from 1 to {LARGEST_SENSOR:,}, width and "
            "height"
        )
    return Recording(**arrays, sensor=None if size is None else (int(size[1]), int(size[0])))


def _is_size(size: NDArray[Any]) -> bool:
    if size.shape != (2,) or size.dtype.kind not in "iuf":
        return False
    return all(1 <= pixels <= LARGEST_SENSOR and pixels % 1 == 0 for pixels in size.tolist())  # NaN is neither


def read_aedat4(path: Path) -> Recording:
    """`.aedat4`, as iniVation's cameras and DVS-CIFAR10 have it."""
    _check_description(path)
    try:
        streams = import_extra("aedat", "events").Decoder(str(path)).id_to_stream()
        cameras = [streams[number] for number in sorted(streams) if streams[number]["type"] == "events"]
        if not cameras:
            raise ValueError("it has no stream of events")
        events = import_extra("tonic", "events").io.read_aedat4(str(path))  # the first of these streams
    except ValueError as error:
        if "concatenate" not in str(error):
            raise
        raise ValueError("it holds no event") from None
    except RuntimeError as error:
        raise ValueError(f"it is damaged, or cut short: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Rust's, which is no Exception
            raise
        raise ValueError(f"it is damaged: {error}") from error
    t, x, y, p = (events[name].copy() for name in ("t", "x", "y", "on"))
    return Recording(t, x, y, p, (int(cameras[0]["height"]), int(cameras[0]["width"])))


def _check_description(path: Path) -> None:
    """Refuse an `.aedat4` whose text on its streams is no UTF-8, with ValueError: of that aedat ends the process."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(18)[14:], "little")
        header = file.read(min(length, path.stat().st_size))
    try:
        header[header.find(b"<dv") : header.rfind(b">") + 1].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is damaged: the text on its streams is no UTF-8: {error.reason}") from error


def read_bin(path: Path) -> Recording:
    """N-MNIST's `.bin`: five bytes an event, of a sensor of 34x34 pixels."""
    tonic = import_extra("tonic", "events")
    if path.stat().st_size % 5:
        raise ValueError(f"it has {path.stat().st_size} bytes, which are no events of 5 bytes each: it is cut short")
    width, height, _ = tonic.datasets.NMNIST.sensor_size
    events = tonic.io.read_mnist_file(str(path), dtype=tonic.datasets.NMNIST.dtype)
    return Recording(events["t"], events["x"], events["y"], events["p"], (height, width))


READERS: dict[str, Callable[[Path], Recording]] = {".npz": read_npz, ".aedat4": read_aedat4, ".bin": read_bin}
