"""What is exported: weights, what they say of the training, and real images of its data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.checkpoint import Checkpoint, trained_on
from tetdeploy.class_names import check_classes
from tetdeploy.data import (
    Encoding,
    Framing,
    LabelledSet,
    holds_out_others,
    load_frames,
    load_parts,
    remedy_of_others,
    same_data,
    warn_of_other_framing,
)
from tetdeploy.int8.calibration import Calibration
from tetdeploy.names import is_npz
from tetdeploy.steps import trained_T
from tetdeploy.storage.provenance import own_fraction

Labelled = tuple[NDArray[Any], NDArray[np.int64]]  # images [N, C, H, W] or frames [N, T, C, H, W], and labels [N]


@dataclass(frozen=True)
class Trained:
    """What is known of a checkpoint or a folder of shards without its tensors, see `Checkpoint`."""

    file: Path
    metadata: Mapping[str, Any]
    sha256: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Trained:
        return cls(checkpoint.file, checkpoint.metadata, checkpoint.sha256)

    @property
    def T(self) -> int:
        """Steps of the training; 4 where that is not known, as of an imported checkpoint."""
        return trained_T(self.metadata)

    @property
    def encoding(self) -> Encoding:
        """Of the training's data."""
        encoding: Encoding = self.metadata["data"]["encoding"]
        return encoding

    @property
    def source(self) -> dict[str, Any]:
        """What a model made of it says of its origin."""
        sections = {name: self.metadata[name] for name in ("network", "data", "training", "provenance")}
        return {"checkpoint_sha256": self.sha256} | sections

    @property
    def scales(self) -> Calibration | None:
        """Those that a run of `train --qat` was fine-tuned at; None for any other.

        Raises:
            ValueError: they cannot be read.
        """
        if "int8" not in self.metadata:
            return None
        try:
            return Calibration.from_dict(self.metadata["int8"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.file}: its int8 metadata cannot be read; the file was changed") from error

    def images(
        self, data: str | None, data_dir: Path, encoding: Encoding, *, num_check: int, num_calibration: int
    ) -> tuple[Labelled, Labelled | None]:
        """Real images to check with, and to calibrate on others of the training part, where there are enough.

        Args:
            data: a data set's name, or a `.npz`; None is the training's. Never its test set.
            encoding: of the export.
            num_calibration: 0 for none.

        Raises:
            ValueError: no data are named, here or by the training; they are images and the export takes recordings, or
                the other way round; its classes are other ones; and what `load_parts` and `load_frames` raise.
            OSError: see `load_parts`.
        """
        own, own_names = str(self.metadata["data"]["name"]), tuple(self.metadata["data"]["class_names"])
        name = data or trained_on(self.metadata, self.file)
        if encoding == "frames" and is_npz(name):
            x, labels, names = load_frames(name)
            check_classes("the network", own_names, name, names)
            return (x, labels), _last(x, labels, num_calibration)
        fraction = own_fraction(self.metadata) if same_data(name, own) else 0.0
        trained = Framing.of(self.metadata["data"])
        train, val = load_parts(name, data_dir=data_dir, T=self.T, fraction=fraction, trained=trained)
        warn_of_other_framing(train, trained, "the network")
        if train.encoding != encoding:
            raise ValueError(self._other_encoding(train, encoding))
        check_classes("the network", own_names, name, train.class_names)
        if val is not None and holds_out_others(name, val, self.metadata["data"]):
            warnings.warn(
                f"{name}: the training held out other images than are found here, so that the check is on some it was "
                f"trained on; {remedy_of_others(name)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return check_images(train, val, num_check), _last(train.x, train.labels, num_calibration)

    def _other_encoding(self, data: LabelledSet, encoding: Encoding) -> str:
        """What to say of data that an export of this encoding cannot be checked on."""
        wanted, held = "images", "recordings"
        if encoding == "frames":
            wanted, held = "recordings (an event set, or a .npz of frames)", "images"
        other = "leave out --encoding" if data.encoding == self.encoding else f"take --encoding {data.encoding}"
        return f"--encoding {encoding} needs {wanted}, and {data.name} has {held}: name others with --data, or {other}"


def check_images(train: LabelledSet, val: LabelledSet | None, count: int) -> Labelled:
    """Up to `count` images and their labels: those held out for validation first, then the others."""
    if val is None:
        return train.x[:count], train.labels[:count]
    others = max(count - len(val), 0)
    x = np.concatenate([val.x[:count], train.x[:others]])
    return x, np.concatenate([val.labels[:count], train.labels[:others]])


def _last(x: NDArray[Any], labels: NDArray[np.int64], count: int) -> Labelled | None:
    return (x[-count:], labels[-count:]) if count else None
