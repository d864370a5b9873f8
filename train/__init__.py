"""Training: losses, schedules, stages, the loop, several seeds."""

from .config import How, TrainConfig
from .loop import TrainResult, train
from .losses import distillation_loss, mse_loss, sdt_loss, tet_loss, total_loss
from .seeds import SeedsResult, train_seeds
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
