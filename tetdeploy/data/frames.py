"""A set of labelled frame sequences in memory, and its `.npz` form: an input of its own at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tetdeploy.names import is_npz

from .events import Framing
from .images import histograms, image_set, read_arrays, refuse_channels_last, usable_labels, usable_names
from .labelled import Encoding, LabelledSet, Split

NUM_MEASURED = 1000  # recordings that decide a set's std; the order is mixed, so that they are a fair sample


@dataclass(frozen=True, eq=False)
class FrameSet(LabelledSet):
    """Labelled sequences of T frames, as recordings of an event camera become.

    Attributes:
        name: what `load_data` was given: "dvs-cifar10", "saccades:digits", ...
        split: "train" or "test".
        frames: uint8 [N, T, C, H, W]; of a recording C = 2 and frames count events: OFF in channel 0, ON in channel 1.
        labels: int64 [N], 0..K-1.
        class_names: K distinct names; label k means class_names[k].
        mean: per channel, of frames / 255; 0 for counts, so that a pixel without events is 0 to the network as well.
        std: per channel, of frames / 255; greater than 0.
        framing: how recordings became these frames; None where that is not known, as of a `.npz`.

    Raises:
        ValueError: the parts do not fit each other.
    """

    encoding: ClassVar[Encoding] = "frames"
    _array: ClassVar[str] = "frames"
    _items: ClassVar[str] = "recordings"

    name: str
    split: Split
    frames: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    framing: Framing | None = None

    def __post_init__(self) -> None:
        self._check("[N, T, C, H, W]")


def count_statistics(frames: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that bring event counts to a sensible scale: 0, and the root mean square of frames / 255.

    Most pixels see no event. With a mean of 0 these stay 0; the second moment of what the network sees is 1.

    Args:
        frames: uint8 [N, T, C, H, W] of the training split; the first 1,000 decide.

    Returns:
        C means and C standard deviations; 1/255, one event, for a channel that has none.
    """
    measured = frames[:NUM_MEASURED].reshape(-1, *frames.shape[2:])
    rms = np.sqrt(histograms(measured) @ np.arange(256) ** 2 / measured[:, 0].size) / 255
    return (0.0,) * frames.shape[2], tuple(float(value) or 1 / 255 for value in rms)


def load_frames(path: Path | str) -> tuple[NDArray[Any], NDArray[np.int64], tuple[str, ...]]:
    """Read a `.npz` of frames: `images` uint8 or float32 [N, T, C, H, W], `labels` integers [N] and, if it has them,
    `class_names` strings [K].

    Returns:
        The frames, the labels and the names, by default "0" to the highest label.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: it is no `.npz`, is damaged, lacks an array, or an array has a wrong dtype or shape.
    """
    if not is_npz(str(path)):
        raise ValueError(f"frames come from a .npz with images [N, T, C, H, W] and labels [N]; got {str(path)!r}")
    arrays = read_arrays(Path(path))
    frames, labels = _checked(path, arrays, "uint8", "float32")
    return frames, labels, usable_names(path, arrays, labels)


def load_npz(path: Path | str, split: Split) -> LabelledSet:
    """Read a `.npz` with `images`, `labels` and, if it has them, `class_names`.

    The file is one set: both splits read all of it. Its order is kept. Mean and std are those of its images; of frames
    the mean is 0.

    Args:
        path: `images` uint8 [N, C, H, W], or [N, H, W] for one channel, or frames [N, T, C, H, W]; `labels` integers
            [N], 0..K-1; `class_names` strings [K], by default "0" to the highest label.
        split: the name the set carries.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: it is not a `.npz`, is damaged, lacks an array, or an array has a wrong dtype, shape or value.
    """
    arrays = read_arrays(Path(path))
    if arrays["images"].ndim != 5:
        return image_set(path, split, arrays)
    frames, labels = _checked(path, arrays, "uint8")
    mean, std = count_statistics(frames)
    return FrameSet(str(path), split, frames, labels, usable_names(path, arrays, labels), mean, std)


def _checked(
    path: Path | str, arrays: Mapping[str, NDArray[Any]], *dtypes: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    frames, kinds = arrays["images"], " or ".join(dtypes)
    got, wanted = f"{path}: images are {frames.dtype} {list(frames.shape)}", f"frames, {kinds} [N, T, C, H, W]"
    if frames.ndim != 5 or frames.dtype not in dtypes:
        raise ValueError(f"{got}; wanted {wanted}")
    if 0 in frames.shape:
        raise ValueError(f"{got}, which holds no pixel; wanted {wanted} with one sequence or more")
    refuse_channels_last(frames.shape, got, wanted)
    labels = usable_labels(path, arrays["labels"])
    if len(labels) != len(frames):
        raise ValueError(f"{path}: {len(frames)} sequences and {len(labels)} labels; every sequence needs one")
    return np.ascontiguousarray(frames), labels
