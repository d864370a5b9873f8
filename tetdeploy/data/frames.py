"""Labelled frame sequences in a `.npz`: input that changes from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import read_arrays, usable_labels


def load_frames(path: Path | str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Read a `.npz` of frames: `images` uint8 or float32 [N, T, C, H, W] and `labels` integers [N].

    Returns:
        The frames and the labels.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: it is no `.npz`, is damaged, lacks an array, or an array has a wrong dtype or shape.
    """
    if not str(path).lower().endswith(".npz"):
        raise ValueError(f"frames come from a .npz with images [N, T, C, H, W] and labels [N]; got {str(path)!r}")
    arrays = read_arrays(Path(path))
    frames = arrays["images"]
    if frames.ndim != 5 or frames.dtype not in (np.uint8, np.float32) or 0 in frames.shape:
        raise ValueError(
            f"{path}: images are {frames.dtype} {list(frames.shape)}; wanted frames, uint8 or float32 [N, T, C, H, W]"
        )
    labels = usable_labels(path, arrays["labels"])
    if len(labels) != len(frames):
        raise ValueError(f"{path}: {len(frames)} sequences and {len(labels)} labels; every sequence needs one")
    return np.ascontiguousarray(frames), labels
