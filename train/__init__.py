"""Training: losses, schedules, the loop."""

from .losses import mse_loss, sdt_loss, tet_loss, total_loss

__all__ = ["mse_loss", "sdt_loss", "tet_loss", "total_loss"]
