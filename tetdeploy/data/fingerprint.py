"""What tells the images or frames of a set from others of their number and name."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.batches import parts


def images_sha256(x: NDArray[Any], labels: NDArray[np.int64] | None) -> str:
    """What tells images or frames, in their order, from others of that name and number: a hash of the labels, if there
    are any, and of `x [N, ...]`; of image files on disk, which are too many to read for this, of their names."""
    listing = getattr(x, "listing", None)
    digest = hashlib.sha256(f"{x.dtype} {x.shape}".encode() if listing is None else b"")
    if labels is not None:
        digest.update(labels.astype(np.int64).tobytes())
    batches = (np.ascontiguousarray(x[part]).data for part in parts(len(x), 1024)) if listing is None else listing()
    for batch in batches:
        digest.update(batch)
    return digest.hexdigest()
