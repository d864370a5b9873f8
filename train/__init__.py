"""Training: losses, schedules, the loop."""

from .config import TrainConfig
from .loop import TrainResult, train
from .losses import mse_loss, sdt_loss, tet_loss, total_loss
from .validation import evaluate

__all__ = ["TrainConfig", "TrainResult", "evaluate", "mse_loss", "sdt_loss", "tet_loss", "total_loss", "train"]
