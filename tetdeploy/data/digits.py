"""scikit-learn's embedded digits: 1,797 real hand-written digits, 8x8, no download."""

from __future__ import annotations

import numpy as np

from tetdeploy.extras import import_extra

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
    source = import_extra("sklearn.datasets", "digits").load_digits()
    images = np.rint(source.images * 255 / 16).astype(np.uint8)[:, None]
    labels = source.target.astype(np.int64)
    train, test = stratified(labels, fraction=0.2, seed=0)
    chosen = train if split == "train" else test
    return ImageSet("digits", split, images[chosen], labels[chosen], tuple("0123456789"), MEAN, STD)
