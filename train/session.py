"""What a run trains, on what and with what: everything that stays the same from step to step."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import tetdeploy

from .config import TrainConfig
from .device import device_name, pick_device, pick_precision
from .losses import sdt_loss, total_loss
from .optimizer import build_optimizer
from .schedule import derive_seed, learning_rate
from .state import Best
from .validation import Loss

if TYPE_CHECKING:
    from tetdeploy.data import LabelledSet
    from tetdeploy.networks import Classifier


@dataclass(frozen=True)
class Images:
    """A set on the device: uint8 images [N, C, H, W] or frames [N, T, C, H, W], and int64 [N]."""

    x: Tensor
    y: Tensor

    @classmethod
    def on(cls, device: torch.device, data: LabelledSet) -> Images:
        return cls(torch.tensor(data.x, device=device), torch.tensor(data.labels, device=device))


@dataclass(frozen=True)
class Session:
    """All of a run that stays the same from step to step."""

    classifier: Classifier
    config: TrainConfig
    train: Images
    val: Images | None
    device: torch.device
    precision: str
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    out: Path

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, len(self.train.x))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train.x) // self.batch_size  # the odd rest is left out

    def rate(self, step: int) -> float:
        """The learning rate of a global step."""
        steps = self.steps_per_epoch
        warmup = round(self.config.warmup_epochs * steps)
        return learning_rate(step, peak=self.config.lr, total_steps=self.config.epochs * steps, warmup_steps=warmup)

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch's images; drawn on the CPU, so that a GPU takes them in the same."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", epoch))
        return torch.randperm(len(self.train.x), generator=generator).to(self.device)


def check_data(data: LabelledSet, classifier: Classifier, T: int) -> None:
    """Refuse inputs and labels the classifier cannot take: kind, shape, dtype, none at all, labels out of range.

    Raises:
        ValueError: with what it got and what it wants.
    """
    if data.encoding != classifier.encoding:
        raise ValueError(f"{data.name} has {data.encoding} input; the network was made for {classifier.encoding} input")
    if tuple(data.image_shape) != tuple(classifier.image_shape):
        raise ValueError(
            f"{data.name} has images of shape {data.image_shape}; the network wants {classifier.image_shape}"
        )
    if data.x.dtype != np.uint8:
        raise ValueError(f"{data.name} has {data.x.dtype} images; training wants uint8 from 0 to 255")
    if data.encoding == "frames" and data.x.shape[1] < T:
        raise ValueError(f"{data.name} has {data.x.shape[1]} frames a recording, too few for T={T}; lower --T")
    if len(data.labels) == 0:
        raise ValueError(f"{data.name} has no {data.split} images to train or validate on; change val_fraction")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= len(classifier.class_names):
        raise ValueError(
            f"{data.name} has labels from {low} to {high}; "
            f"the network has {len(classifier.class_names)} classes, counted from 0"
        )


def prepare(
    classifier: Classifier, train_set: LabelledSet, val_set: LabelledSet | None, config: TrainConfig, out: Path
) -> Session:
    """Move everything to the device and build what trains it."""
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    classifier.to(device)
    return Session(
        classifier=classifier,
        config=config,
        train=Images.on(device, train_set),
        val=None if val_set is None else Images.on(device, val_set),
        device=device,
        precision=precision,
        loss=_training_loss(config),
        optimizer=build_optimizer(classifier.network, config),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        generator=torch.Generator(device),
        out=out,
    )


def headline(session: Session) -> str:
    """One line: the data, the network, the loss and the device."""
    config, classifier = session.config, session.classifier
    millions = sum(p.numel() for p in classifier.network.parameters()) / 1e6
    held_out = 0 if session.val is None else len(session.val.x)
    loss = f"TET lambda {config.lam:g}" if config.loss == "tet" else "SDT"
    return (
        f"{classifier.data}  {len(session.train.x):,} train  {held_out:,} validation   "
        f"{classifier.config.model} {millions:.3g} M parameters   {loss}   "
        f"{session.precision} on {device_name(session.device)}"
    )


def provenance(session: Session, best: Best) -> dict[str, Any]:
    """What a checkpoint says about where it comes from."""
    return {
        "versions": {
            "tetdeploy": tetdeploy.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(session.device),
        "precision": session.precision,
        "epoch": best.epoch,
        "val_accuracy": best.val_accuracy,
        "seed": session.config.seed,
    }


def _training_loss(config: TrainConfig) -> Loss:
    if config.loss == "sdt":
        return lambda logits, labels: sdt_loss(logits, labels, label_smoothing=config.label_smoothing)
    return lambda logits, labels: total_loss(
        logits, labels, lam=config.lam, phi=config.phi, label_smoothing=config.label_smoothing
    )
