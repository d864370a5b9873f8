"""Choosing the scales of an int8 graph, and the PyTorch network that it is checked against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier

from .graph import Encoding, folded_module
from .int8 import METHODS, CurrentScale, quantise, record_currents

Scales = Mapping[str, CurrentScale]
_BATCH = 32
MIN_IMAGES = 32


@dataclass(frozen=True)
class Calibration:
    """The scales of the input currents, and how they were found.

    Attributes:
        method: of `int8.METHODS`, the one with the higher accuracy on the calibration images.
        num_images: calibration images, of the training set.
        accuracy: of each method on them.
        scales: by convolution.
    """

    method: str
    num_images: int
    accuracy: dict[str, float]
    scales: dict[str, CurrentScale]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    classifier: Classifier,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    T: int,
    encoding: Encoding,
    make_engine: Callable[[Scales], Engine],
    tick: Callable[[int], None] | None = None,
) -> Calibration:
    """Find the scales of the input currents on calibration images.

    Args:
        x: input as the graph takes it, `[N, ...]`.
        labels: `[N]`; without them the accuracy is the agreement with the network in float32.
        T: steps to run.
        make_engine: makes the int8 engine of some scales, to measure its accuracy.
        tick: called with the number of images done.

    Raises:
        ValueError: there are too few images; Int8Error: see `record_currents`.
    """
    if len(x) < MIN_IMAGES:
        raise ValueError(f"calibration takes at least {MIN_IMAGES} images of the training set, got {len(x)}")
    module = folded_module(classifier, T=T, encoding=encoding, uint8=x.dtype == np.uint8)
    x = x[:, :T] if encoding == "frames" else x
    inputs = torch.from_numpy(x).to(classifier.mean.device)
    histograms, logits = record_currents(module, inputs.split(_BATCH), tick)
    expected = logits.cpu().numpy()
    candidates = {name: {layer: scale(h) for layer, h in histograms.items()} for name, scale in METHODS.items()}
    truth = expected.argmax(1) if labels is None else labels
    quality = {}
    for name, scales in candidates.items():
        answers = _run(make_engine(scales), x, T).mean(1)
        quality[name] = float((answers.argmax(1) == truth).mean()), -float(np.abs(answers - expected).mean())
    best = max(quality, key=lambda name: quality[name])
    return Calibration(best, len(x), {name: accuracy for name, (accuracy, _) in quality.items()}, candidates[best])


def kept_answers(
    full: Engine, int8: Engine, x: NDArray[Any], labels: NDArray[np.int64] | None, T: int
) -> dict[str, Any]:
    """What an int8 engine keeps of the float32 one's answers after 1..T steps.

    Returns:
        `num_images`, `T` (a list), `agreement` of the classes for each T; with labels also `accuracy_fp32` and
        `accuracy_int8`.
    """
    classes = {name: np.cumsum(_run(side, x, T), axis=1).argmax(-1) for name, side in (("fp32", full), ("int8", int8))}
    kept: dict[str, Any] = {"num_images": len(x), "T": list(range(1, T + 1))}
    kept["agreement"] = (classes["fp32"] == classes["int8"]).mean(0).tolist()
    if labels is not None:
        for name, chosen in classes.items():
            kept[f"accuracy_{name}"] = (chosen == labels[: len(x), None]).mean(0).tolist()
    return kept


def _run(engine: Engine, x: NDArray[Any], T: int) -> NDArray[np.float32]:
    """Per-step logits `[N, T, K]`."""
    return np.concatenate([engine.run(x[k : k + _BATCH], T).per_step for k in range(0, len(x), _BATCH)])


class Int8Network(nn.Module):
    """The network with its spiking convolutions in 8 bits, in PyTorch: bit for bit what an int8 graph computes.

    Called like a `Classifier`: images `[N, C, H, W]` and T, or frames `[T, N, C, H, W]`, to logits `[T, N, K]`.
    """

    def __init__(self, classifier: Classifier, scales: Scales, *, encoding: Encoding, uint8: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self._scales, self._encoding, self._uint8 = scales, encoding, uint8
        self._by_T: dict[int, fx.GraphModule] = {}

    @property
    def mean(self) -> Tensor:
        return self.classifier.mean

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classifier.class_names

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Network:
        """A copy whose weights may be moved: they are quantised anew."""
        classifier = copy.deepcopy(self.classifier, memo)
        return Int8Network(classifier, self._scales, encoding=self._encoding, uint8=self._uint8)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        frames = self._encoding == "frames"
        module = self._at(len(x) if frames else T or 1)
        logits: Tensor = module(x.transpose(0, 1) if frames else x)[1]
        return logits.transpose(0, 1)

    def _at(self, T: int) -> fx.GraphModule:
        if T not in self._by_T:
            with _disable_current_modes():  # the check's recorder is for what runs, not for what is traced
                module = folded_module(self.classifier, T=T, encoding=self._encoding, uint8=self._uint8)
                quantise(module, self._scales)
            self._by_T[T] = module
        return self._by_T[T]
