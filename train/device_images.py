"""Batches of a small set, which lies on the device and is augmented there; what is drawn for batches of any set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from tetdeploy.data import LabelledSet
from tetdeploy.networks import Classifier

from .augment import AUGMENTATIONS, cutout, same_at_every_step
from .config import TrainConfig
from .device import without_waiting

Batch = tuple[Tensor, Tensor]  # uint8 images [N, C, H, W] or frames [N, T, C, H, W], and labels int64 [N]


@dataclass(frozen=True)
class Draws:
    """The batches that are to come: which images, and what decides how they are augmented.

    Attributes:
        chosen: indices of the images of each batch, int64 [batches, N], on the CPU.
        seeds: one for each batch.
        share: this rank's part of each batch; an image becomes the same whichever rank it falls to.
    """

    chosen: Tensor
    seeds: tuple[int, ...]
    share: slice


class Images(Protocol):
    """The images of one part of the data, for training or for validation."""

    def __len__(self) -> int: ...

    def drawn(self, draws: Draws) -> Iterator[Batch]:
        """Augmented batches. The same draw gives the same pixels, whichever batches came before it."""

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All images once as they are, the last batch with what remains."""


class DeviceImages:
    """A small set: all of it on the device as uint8, where a batch is chosen and augmented as a whole."""

    def __init__(self, data: LabelledSet, classifier: Classifier, config: TrainConfig) -> None:
        device = classifier.mean.device
        self._x = torch.tensor(data.x, device=device)
        self._y = torch.tensor(data.labels, device=device)
        self._augment = config.augment
        self._cutout = config.cutout
        self._blank = (classifier.mean.flatten() * 255).round().to(self._x.dtype)  # 0 to the network, as in the paper
        self._generator = torch.Generator(device)

    def __len__(self) -> int:
        return len(self._x)

    def drawn(self, draws: Draws) -> Iterator[Batch]:
        augment = AUGMENTATIONS[self._augment]
        # to the device at once: a copy for each step would wait for the steps before it
        for chosen, seed in zip(without_waiting(draws.chosen, self._x.device), draws.seeds, strict=True):
            self._generator.manual_seed(seed)
            x = same_at_every_step(augment, self._x[chosen], self._generator)
            if self._cutout:
                x = same_at_every_step(self._blanked, x, self._generator)
            yield x[draws.share], self._y[chosen[draws.share]]  # augmented with what falls to the other ranks

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        yield from zip(self._x.split(batch_size), self._y.split(batch_size), strict=True)

    def _blanked(self, x: Tensor, generator: Generator) -> Tensor:
        return cutout(x, generator, size=self._cutout, fill=self._blank)
