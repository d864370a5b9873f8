"""Fine-tuning with the convolutions of spikes in 8 bits (`qat`): the network trains as the int8 export computes it.

The scales of the input currents are found on training images before the first step, as the export finds them, and
stay. Weights and BN's affine parameters train; BN's running statistics are constants, as in inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tetdeploy.data import LabelledSet
from tetdeploy.int8.calibration import Calibration, calibrate
from tetdeploy.int8.network import Int8Network
from tetdeploy.int8.quantisation import Int8Error, Scales
from tetdeploy.networks import Classifier, run_network
from tetdeploy.storage.run_folder import CONFIG_NAME
from tetdeploy.tracing import Tracer

from .runs import read_run_config

NUM_CALIBRATION = 512
_BATCH = 64


def check_qat(classifier: Classifier) -> None:
    """Refuse networks without spikes.

    Raises:
        ValueError: an ANN twin, or a network with smooth spikes.
    """
    if not classifier.config.is_spiking:
        kind = "an ANN twin" if classifier.config.ann else "a network with smooth spikes"
        raise ValueError(f"qat fine-tunes convolutions that read spikes, and {kind} has none; leave out --qat")


def find_scales(classifier: Classifier, train_set: LabelledSet, T: int) -> Calibration:
    """The scales to train with, from the last training images, on the classifier's device.

    Raises:
        Int8Error: there are too few images, no convolution of the network can run in int8, or one cannot.
    """
    frames = classifier.encoding == "frames"
    x = train_set.x[-NUM_CALIBRATION:]
    x = np.ascontiguousarray(x[:, :T] if frames else x)

    def answers(scales: Scales) -> NDArray[np.float32]:
        return _per_step(Int8Network(tracer, scales, frozen=True), x, T)

    classifier.eval()
    labels = train_set.labels[-NUM_CALIBRATION:]
    tracer = _tracer(classifier)
    try:
        return calibrate(tracer, x, labels, T, answers)
    except Int8Error as error:
        raise Int8Error(f"{error}; leave out --qat") from error


def int8_network(classifier: Classifier, scales: Scales) -> Int8Network:
    """The classifier as it is trained and validated: of pixels, its spiking convolutions in 8 bits."""
    return Int8Network(_tracer(classifier), scales)


def _tracer(classifier: Classifier) -> Tracer:
    return Tracer(classifier, encoding=classifier.encoding, uint8=True)


def read_scales(out: Path) -> Calibration:
    """The scales that the run in `out` was begun with.

    Raises:
        ValueError: its settings do not hold them.
    """
    try:
        return Calibration.from_dict(read_run_config(out)["int8"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{out / CONFIG_NAME} lacks the scales of --qat; start the run again with --init") from error


@torch.no_grad()
def _per_step(network: Int8Network, x: NDArray[Any], T: int) -> NDArray[np.float32]:
    """Per-step logits `[N, T, K]` of `x` `[N, ...]`."""
    parts = torch.from_numpy(x).to(network.mean.device).split(_BATCH)
    logits = [run_network(network, part, T).transpose(0, 1) for part in parts]
    found: NDArray[np.float32] = torch.cat(logits).cpu().numpy()
    return found
