"""Training: losses, schedules, stages, the loop, several seeds. The parts:

- What is asked for: `config`; `stages`, its short notation; `schedule`, learning rates and random numbers of each step.
- Data: batches of a small set, held on the device (`device_images`), or of files (`disk_images`); `augment` and
  `autoaugment`.
- A step: `losses`; `objective`, what is minimised; `optimizer`; `cuda_graphs`, `recompute` and `qat`, other ways to
  compute it.
- A run: `training` begins it or goes on with it; `loop`, its epochs and steps, over what stays the same (`session`)
  and what changes (`state`); `runs`, its folder; `restart`, going on from weights alone; `validation`; `averaging`;
  `progress` and `board`, what is shown.
- Several: `ranks`, processes of one run; `synchronised`, their BN; `seeds`, runs of one recipe.
- Beside training: `device`, where and in what precision; `landscape`, losses round trained weights.
"""

from .config import How, TrainConfig
from .losses import distillation_loss, mse_loss, sdt_loss, tet_loss, total_loss
from .seeds import SeedsResult, train_seeds
from .training import TrainResult, train
from .validation import evaluate

__all__ = [
    "How",
    "SeedsResult",
    "TrainConfig",
    "TrainResult",
    "distillation_loss",
    "evaluate",
    "mse_loss",
    "sdt_loss",
    "tet_loss",
    "total_loss",
    "train",
    "train_seeds",
]
