"""`saccades:NAME`: an image set as an event camera would see it, moved before the camera as for N-MNIST.

N-MNIST (Orchard et al. 2015) was recorded by moving a camera along a triangle, in three saccades, before each image. A
pixel of such a camera reports that its log intensity rose (ON) or fell (OFF) by a threshold since its last event. Here
both are computed: no noise, no download, the same events on every machine.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tetdeploy.batches import parts

from .events import Binning, Framing
from .frames import NUM_MEASURED, FrameSet, count_statistics
from .images import ImageSet

STEPS_PER_SACCADE = 10
NUM_STEPS = 3 * STEPS_PER_SACCADE

_CORNERS = np.array([(-1.0, -1.0), (0.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])  # x, y in eighths of the image's size
_THRESHOLD = 0.25  # of the natural logarithm of the intensity: a contrast of 28 %
_DARK = 0.1  # added to intensities 0..1: a black pixel's logarithm is finite, and noise in the dark makes no events
_CHUNK = 64  # images at a time: what they need fits the processor's cache


def saccade_set(images: ImageSet, train: ImageSet, name: str, binning: Binning) -> FrameSet:
    """Turn an image set into frames of events.

    Args:
        images: the set to turn.
        train: its training split, of which the first 1,000 images decide mean and std.
        name: what `load_data` was given.
        binning: the number of frames, and whether each has the same time or about the same number of events (a frame
            ends only between two of the 30 steps of the movement).

    Returns:
        Frames uint8 [N, T, 2, H, W] of the images' size. An image without contrast has no events.

    Raises:
        ValueError: T is above 30.
    """
    if binning.T > NUM_STEPS:
        raise ValueError(f"{name} moves in {NUM_STEPS} steps, too few for T={binning.T}; choose a smaller T")
    mean, std = count_statistics(saccade_frames(train.images[:NUM_MEASURED], binning))
    frames = saccade_frames(images.images, binning)
    framing = Framing(binning.by, images.image_shape[1:])
    return FrameSet(name, images.split, frames, images.labels, images.class_names, mean, std, framing)


def saccade_frames(images: NDArray[np.uint8], binning: Binning) -> NDArray[np.uint8]:
    """Frames uint8 [N, T, 2, H, W] of images uint8 [N, C, H, W]: OFF and ON events of each pixel.

    None exceeds 135: from black to white are 9.6 thresholds, so a pixel has at most 9 events before its polarity turns,
    and 30 steps hold at most 15 runs of each polarity.
    """
    frames = np.zeros((len(images), binning.T, 2, *images.shape[2:]), np.uint8)
    for part in parts(len(images), _CHUNK):
        counts, totals = saccade_events(images[part]), frames[part]
        for step, bins in enumerate(_bins(counts, binning)):
            totals[np.arange(len(bins)), bins] += counts[step]
    return frames


def saccade_events(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Events of each step of the movement, [30, N, 2, H, W]: how often each pixel's log intensity fell and rose.

    With L(t) the log intensity in units of the threshold and R what it was at the pixel's last event, a step gives
    n = trunc(L(t) - R) events and R += n; their sign is their polarity.

    Args:
        images: uint8 [N, C, H, W]; of three channels the luma is seen.
    """
    log = _log_intensity(images)
    path = saccade_path(*images.shape[2:])
    pad = int(np.ceil(np.abs(path).max())) + 1
    padded = np.pad(log, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    seen = _shifted(padded, path[0], pad)
    events = np.zeros((NUM_STEPS, len(images), 2, *images.shape[2:]), np.uint8)
    for step, offset in enumerate(path[1:]):
        change = np.trunc(_shifted(padded, offset, pad) - seen)
        seen += change
        np.maximum(-change, 0, out=events[step, :, 0], casting="unsafe")
        np.maximum(change, 0, out=events[step, :, 1], casting="unsafe")
    return events


def saccade_path(height: int, width: int) -> NDArray[np.float32]:
    """Where the image stands before the first and after each of the 30 steps: (x, y) in pixels, float32 [31, 2]."""
    along = np.arange(STEPS_PER_SACCADE) / STEPS_PER_SACCADE
    legs = [a + along[:, None] * (b - a) for a, b in pairwise(_CORNERS)]
    path = np.concatenate([*legs, _CORNERS[-1:]]) * (width / 8, height / 8)
    # Multiples of 1/64 pixel, like those of 1/64 threshold below, make every product exact in float32: the events
    # do not depend on the machine's rounding.
    return (np.rint(path * 64) / 64).astype(np.float32)


def _log_intensity(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The logarithm of the intensity in units of the threshold, [N, H, W], a multiple of 1/64."""
    if images.shape[1] == 3:
        red, green, blue = images.transpose(1, 0, 2, 3).astype(np.int32)
        grey = (299 * red + 587 * green + 114 * blue + 500) // 1000  # luma of ITU-R BT.601
    elif images.shape[1] == 1:
        grey = images[:, 0].astype(np.int32)
    else:
        raise ValueError(f"saccades need images of 1 or 3 channels, got {images.shape[1]}")
    table = np.log(np.arange(256) / 255 + _DARK) / _THRESHOLD
    levels: NDArray[np.float32] = (np.rint(table * 64) / 64).astype(np.float32)[grey]
    return levels


def _shifted(padded: NDArray[np.float32], offset: NDArray[np.float32], pad: int) -> NDArray[np.float32]:
    """Padded images moved right and down by `offset` (x, y), interpolated linearly, without the padding."""
    height, width = padded.shape[1] - 2 * pad, padded.shape[2] - 2 * pad
    x, y = pad - offset
    left, top = int(np.floor(x)), int(np.floor(y))
    across, down = np.float32(x - left), np.float32(y - top)
    rows = padded[:, top : top + height + 1]
    rows = rows[:, :-1] + down * (rows[:, 1:] - rows[:, :-1])
    columns = rows[:, :, left : left + width + 1]
    moved: NDArray[np.float32] = columns[:, :, :-1] + across * (columns[:, :, 1:] - columns[:, :, :-1])
    return moved


def _bins(counts: NDArray[np.uint8], binning: Binning) -> NDArray[np.int64]:
    """The frame of each step and image, [30, N], ascending."""
    if binning.by == "time":
        steps = np.arange(NUM_STEPS) * binning.T // NUM_STEPS
        return np.repeat(steps[:, None], counts.shape[1], axis=1)
    by_step = counts.sum((2, 3, 4), dtype=np.int64)
    before = np.cumsum(by_step, axis=0) - by_step
    bins: NDArray[np.int64] = before * binning.T // np.maximum(by_step.sum(0), 1)
    bins[bins == binning.T] = binning.T - 1  # of steps after the last event, which hold none
    return bins
