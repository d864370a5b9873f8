"""scikit-learn's embedded digits: 1,797 real hand-written digits, 8x8, no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.system.extras import import_extra

from .images import ImageSet, stratified
from .labelled import Split

MEAN = (0.3058,)
STD = (0.3764,)


def load_digits(split: Split) -> ImageSet:
    """The digits 0 to 9, uint8 [N, 1, 8, 8]: 80 % for training, 20 % for testing, class by class, always the same.

    The grey levels 0..16 of the source become rint(level * 255 / 16), which rint(value * 16 / 255) takes back.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    levels, labels = _source()
    images = np.rint(levels * 255 / 16).astype(np.uint8)[:, None]
    train, test = stratified(labels, fraction=0.2)
    chosen = train if split == "train" else test
    return ImageSet("digits", split, images[chosen], labels[chosen], tuple("0123456789"), MEAN, STD)


def _source() -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Grey levels `[N, 8, 8]` and labels, from scikit-learn's file: importing scikit-learn takes ten times as long as
    reading it, and is left to a release that has it elsewhere."""
    found = find_spec("sklearn")
    for package in found.submodule_search_locations or () if found else ():
        file = Path(package, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    source = import_extra("sklearn.datasets", "digits").load_digits()
    return source.images, source.target.astype(np.int64)
