"""How a run trains: one frozen dataclass, saved in the run's config.json and in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .augment import AUGMENTATIONS

OPTIMIZERS = ("adamw", "sgd")
LOSSES = ("tet", "sdt")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# name: (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "T": (1, math.inf, True),
    "epochs": (1, math.inf, True),
    "batch_size": (1, math.inf, True),
    "lr": (0.0, math.inf, False),
    "weight_decay": (0.0, math.inf, True),
    "warmup_epochs": (0, math.inf, True),
    "label_smoothing": (0.0, 1.0, True),
    "clip": (0.0, math.inf, True),
    "lam": (0.0, 1.0, True),
    "phi": (-math.inf, math.inf, True),
    "seed": (0, 2**63 - 1, True),
    "val_fraction": (0.0, 0.9, True),
}
_WHOLE = ("T", "epochs", "batch_size", "seed")
_CHOICES = {
    "optimizer": OPTIMIZERS,
    "loss": LOSSES,
    "augment": tuple(AUGMENTATIONS),
    "precision": PRECISIONS,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights a run ends with, beside the network and the data.

    The defaults train the digits. Checks itself: a value out of range raises `ValueError` with the range.

    Attributes:
        T: time steps of every training and validation pass.
        epochs: passes over the training images.
        batch_size: images a step; the odd rest of an epoch is left out (each epoch leaves out other images).
        lr: peak learning rate, after the warm-up.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        weight_decay: on the weights of convolutions and linear layers only, not on BN and biases.
        warmup_epochs: length of the linear warm-up in epochs, a fraction allowed; then a cosine to 0.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        clip: largest norm of the whole gradient; 0 switches clipping off.
        loss: "tet" (Eq. 13, with lam and phi) or "sdt" (Eq. 7; lam and phi play no part).
        lam: weight of the MSE term (Eq. 13), in [0, 1].
        phi: target of the MSE term (Eq. 12); the paper takes v_th.
        seed: with the step it determines every random number.
        val_fraction: share of the training images held out for validation; 0 holds out none.
        augment: "none", "shift", "crop" or "crop-flip", see `augment.AUGMENTATIONS`.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1".
        precision: autocast in "bf16" or "fp16" (with gradient scaling), or "fp32"; "auto" is fp32 on a CPU, on a GPU
            bf16, or fp16 where it has no bf16. Losses, BN statistics and weights stay float32 in all.
    """

    T: int = 4
    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    clip: float = 0.0
    loss: str = "tet"
    lam: float = 0.05
    phi: float = 1.0
    seed: int = 0
    val_fraction: float = 0.1
    augment: str = "none"
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name in _RANGES:
            self._check_number(name)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdecimal():
            raise ValueError(f"unknown device {self.device!r}; choose auto, cpu, cuda or cuda:<number>")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs; the warm-up must be the shorter"
            )

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        low, high, inclusive = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else (int, float)):
            kind = "a whole number" if name in _WHOLE else "a number"
            raise ValueError(f"{name} is {value!r}; it must be {kind}")
        if not (math.isfinite(value) and low <= value <= high) or (value == low and not inclusive):
            bound = f"at least {low}" if inclusive else f"above {low}"
            limit = f"{bound} and at most {high}" if math.isfinite(high) else bound
            raise ValueError(f"{name} is {value}; it must be {limit if math.isfinite(low) else 'finite'}")
