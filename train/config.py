"""What a run trains with, saved in its config.json: what decides its weights, and how they are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from tetdeploy.arguments import check_choice, check_flags, check_number, check_whole
from tetdeploy.steps import MAX_T
from tetdeploy.wording import counted

from .augment import AUGMENTATIONS, RESIZED_CROP
from .device import check_device
from .stages import MAX_FACTOR, Stage, TimeRange, parse_random_T, parse_tit

OPTIMIZERS = ("adamw", "sgd")
LOSSES = ("tet", "sdt")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# name: (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "T": (1, math.inf, True),
    "epochs": (1, math.inf, True),
    "batch_size": (1, 2**63 - 1, True),
    "lr": (0.0, MAX_FACTOR, False),
    "weight_decay": (0.0, math.inf, True),
    "warmup_epochs": (0, math.inf, True),
    "label_smoothing": (0.0, 1.0, True),
    "clip": (0.0, math.inf, True),
    "lam": (0.0, 1.0, True),
    "phi": (-math.inf, math.inf, True),
    "seed": (0, 2**63 - 1, True),
    "val_fraction": (0.0, 0.9, True),
    "switch_to_tet": (0, math.inf, True),
    "ema": (0.0, 0.9999999, True),
    "distill_alpha": (0.0, math.inf, False),
    "distill_tau": (0.0, MAX_FACTOR, False),
    "cutout": (0, math.inf, True),
}
_WHOLE = ("T", "epochs", "batch_size", "seed", "switch_to_tet", "cutout")
_TEXTS = ("tit", "random_T", "distill")
CHOICES = {
    "optimizer": OPTIMIZERS,
    "loss": LOSSES,
    "augment": (*AUGMENTATIONS, RESIZED_CROP),
    "precision": PRECISIONS,
}


@dataclass(frozen=True, kw_only=True)
class How:
    """How a run is computed and carried, with no effect on its results; a continued run keeps it by default.

    Attributes:
        cuda_graphs: replay the training step as CUDA graphs, see `cuda_graphs`.
        recompute: compute blocks once more in the backward pass, for less memory, see `recompute`.
        shards_mb: after every epoch, also write to `out/shards` the weights alone, in files of at most so many MB (of
            10^6 bytes), see `restart`; None does not.

    Raises:
        ValueError: a flag is neither True nor False, the size is no number above 0, or a graph would record
            blocks that recompute.
    """

    cuda_graphs: bool = False
    recompute: bool = False
    shards_mb: float | None = None

    def __post_init__(self) -> None:
        check_flags(self)
        if self.shards_mb is not None:
            object.__setattr__(self, "shards_mb", check_number("shards_mb", self.shards_mb))
            if not 0 < self.shards_mb * 1e6 < math.inf:
                raise ValueError(f"shards_mb is {self.shards_mb}; it is the size of a file in MB and must be above 0")
        if self.recompute and self.cuda_graphs:
            raise ValueError(
                "--recompute does not go with --cuda-graphs, which record a pass; pass --no-recompute or "
                "--no-cuda-graphs"
            )

    @property
    def shard_bytes(self) -> int | None:
        """`shards_mb` in bytes."""
        return None if self.shards_mb is None else int(self.shards_mb * 1e6)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights a run ends with, beside the network and the data.

    The defaults train the digits. Checks itself: a value out of range raises `ValueError` with the range.

    Attributes:
        T: time steps of every training and validation pass; with `tit` those of its last stage, whatever is given here.
        epochs: passes over the training images; with `tit` the sum of its stages, whatever is given here.
        tit: stages of time inheritance training, such as "2:300,6:50", see `stages.parse_tit`; "" is one stage of T
            and epochs. Each stage has its own warm-up, cosine and fresh optimizer state, and goes on with the last
            weights of the one before.
        batch_size: images per step; an incomplete last batch of an epoch is left out (each epoch leaves out different
            images).
        lr: peak learning rate, after the warm-up.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        weight_decay: on the weights of convolutions and linear layers only, not on BN and biases.
        warmup_epochs: length of each stage's linear warm-up in epochs, a fraction allowed; then a cosine to 0.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        clip: largest norm of the whole gradient; 0 switches clipping off.
        loss: "tet" (Eq. 13, with lam and phi) or "sdt" (Eq. 7; lam and phi play no part).
        switch_to_tet: with loss "sdt", the number of epochs after which "tet" takes over (Figure 3); 0 is never. The
            schedule of the learning rate and the optimizer go on, and the best epoch of all is kept.
        lam: weight of the MSE term (Eq. 13), in [0, 1].
        phi: target of the MSE term (Eq. 12); the paper takes v_th.
        seed: with the step it determines every random number.
        val_fraction: share of the training images held out for validation; 0 holds out none.
        augment: "none", "shift", "crop", "crop-flip", "autoaugment" (after crop and flip) or "flip-roll", see
            `augment.AUGMENTATIONS`; or of ImageNet "resized-crop", see `disk_images.DiskImages`.
        cutout: side in pixels of the square that `augment.cutout` blanks, below the longer side of the images; 0 is
            off.
        ema: decay of the moving average of the weights that is validated and kept, see `averaging.update_average`;
            0 is off.
        random_T: "1:6" draws the number of steps anew at each training step, see `objective.prefix_mean`; "" is off.
            Validation runs at T.
        distill: checkpoint or run folder of an ANN twin to learn from, see `losses.distillation_loss`; "" is off.
        distill_alpha: weight of that loss, above 0.
        distill_tau: its temperature, above 0.
        qat: fine-tune with the convolutions of spikes in 8 bits, see `qat`; in float32, with BN's running statistics as
            they are and without dropout.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:1".
        precision: autocast in "bf16" or "fp16" (with gradient scaling), or "fp32"; "auto" is fp32 on a CPU, on a GPU
            bf16, or fp16 where it has no bf16. Losses, BN statistics and weights stay float32 in all.
    """

    T: int = 4
    epochs: int = 30
    tit: str = ""
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.0
    clip: float = 0.0
    loss: str = "tet"
    switch_to_tet: int = 0
    lam: float = 0.05
    phi: float = 1.0
    seed: int = 0
    val_fraction: float = 0.1
    augment: str = "none"
    cutout: int = 0
    ema: float = 0.0
    random_T: str = ""
    distill: str = ""
    distill_alpha: float = 1.0
    distill_tau: float = 3.0
    qat: bool = False
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_flags(self)
        for name in _RANGES:
            self._check_number(name)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_device(self.device)
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a text in quotes")
        if self.tit:
            # What is saved says what is run; the exporter reads T.
            object.__setattr__(self, "T", self.stages[-1].T)
            object.__setattr__(self, "epochs", sum(stage.epochs for stage in self.stages))
        self._check_together()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, at least one."""
        return parse_tit(self.tit, lr=self.lr) if self.tit else (Stage(1, self.T, self.epochs, self.lr, 0),)

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch, counted from 0 over the whole run."""
        return next(stage for stage in reversed(self.stages) if stage.first_epoch <= epoch)

    @cached_property
    def time_range(self) -> TimeRange | None:
        """What `random_T` says; None when it is off."""
        return parse_random_T(self.random_T) if self.random_T else None

    @property
    def longest_T(self) -> int:
        """The most time steps that any pass of the run has."""
        return max(self.time_range.high if self.time_range else 1, *(stage.T for stage in self.stages), self.T)

    @property
    def estimates_bn(self) -> bool:
        """Whether the BN statistics gathered in training do not fit what is validated, and are estimated anew."""
        return (self.ema > 0 or bool(self.random_T)) and not self.qat

    def loss_at(self, epoch: int) -> str:
        """ "tet" or "sdt": what an epoch, counted from 0, minimises."""
        return "tet" if self.switch_to_tet and epoch >= self.switch_to_tet else self.loss

    def _check_together(self) -> None:
        """Settings that are each right and do not go together."""
        if self.longest_T > MAX_T:
            raise ValueError(f"T is {self.longest_T}; it must be at most {MAX_T}")
        shortest = min(stage.epochs for stage in self.stages)
        if self.warmup_epochs >= shortest and self.warmup_epochs > 0:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs} of {counted(shortest, 'epoch')}; the warm-up must be "
                "the shorter; give more epochs, or --warmup-epochs 0"
            )
        if self.switch_to_tet and self.loss != "sdt":
            raise ValueError(f"switch_to_tet goes with loss sdt, got loss {self.loss}: there is nothing to switch from")
        if self.switch_to_tet >= self.epochs:
            raise ValueError(
                f"switch_to_tet is {self.switch_to_tet} of {counted(self.epochs, 'epoch')}; "
                "it must come before the last"
            )
        if self.qat and self.precision not in ("auto", "fp32"):
            raise ValueError(f"qat computes whole numbers in float32; use precision fp32, got {self.precision}")
        if self.time_range and self.tit:
            raise ValueError("random_T and tit both decide the time steps of training; choose one of them")

    def _check_number(self, name: str) -> None:
        value = (check_whole if name in _WHOLE else check_number)(name, getattr(self, name))
        object.__setattr__(self, name, value)
        low, high, inclusive = _RANGES[name]
        if not (math.isfinite(value) and low <= value <= high) or (value == low and not inclusive):
            bound = f"at least {low}" if inclusive else f"above {low}"
            limit = f"at most {high}" if math.isfinite(high) else "finite"
            raise ValueError(f"{name} is {value}; it must be {f'{bound} and {limit}' if math.isfinite(low) else limit}")
