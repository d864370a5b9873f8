"""All of a run that changes from step to step, and the file --resume reads it from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetdeploy.checkpoint import check_keys
from tetdeploy.names import section
from tetdeploy.storage.form import check_form
from tetdeploy.storage.run_folder import POSITION
from tetdeploy.storage.tensor_file import FORMAT, read_content, read_tensors, write_tensors

from .optimizer import load_optimizer_tensors, optimizer_tensors, trainable


@dataclass(frozen=True)
class Best:
    """The epoch whose weights are in the checkpoint. Without a validation set, the last one and None. `val_loss` is one
    that all epochs have: that of the training, or where that changes (`switch_to_tet`) L_TET.

    Of several stages of time inheritance training only the last counts, as soon as it has an epoch: accuracies at
    different T do not compare, and the T of the last is the one that was trained for.
    """

    epoch: int
    val_accuracy: float | None
    val_loss: float | None
    stage: int = 1

    def is_beaten_by(self, other: Best) -> bool:
        """A later stage, or higher validation accuracy, at equal accuracy lower loss; without validation always."""
        if other.stage != self.stage:
            return other.stage > self.stage
        if other.val_accuracy is None or other.val_loss is None or self.val_accuracy is None or self.val_loss is None:
            return True
        return (other.val_accuracy, -other.val_loss) > (self.val_accuracy, -self.val_loss)


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        epoch: finished epochs, and so the index of the running one.
        step: finished steps of the running epoch.
        losses: of the running epoch's finished steps, in [steps per epoch], float32, on the device; so are `correct`,
            the rightly classified images of each step, int64. They stay there until someone looks: no step waits.
        average: moving average of the parameters, by name; empty without `ema`.
        seconds: spent on the running epoch's steps.
        best: the best epoch so far.
        precision: in which the last step was computed, "" before the first.
    """

    epoch: int
    step: int
    losses: Tensor
    correct: Tensor
    average: dict[str, Tensor]
    seconds: float
    best: Best | None
    precision: str

    @classmethod
    def start(cls, steps_per_epoch: int, device: torch.device, average: dict[str, Tensor]) -> TrainState:
        losses = torch.zeros(steps_per_epoch, device=device)
        correct = torch.zeros(steps_per_epoch, dtype=torch.int64, device=device)
        return cls(0, 0, losses, correct, average, seconds=0.0, best=None, precision="")

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """All tensors of the run but the optimizer's: the network's, their averages, the running epoch's numbers."""
        tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        return tensors | {"epoch.losses": self.losses, "epoch.correct": self.correct}

    def next_epoch(self) -> None:
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0


def save_state(
    path: Path, state: TrainState, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Write everything `restore_state` needs, atomically. Random numbers need nothing: they follow from the step.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    tensors = state.weights(network)
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer, network).items()}
    position = {
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "best": None if state.best is None else asdict(state.best),
        "precision": state.precision,
        "scaler": scaler.state_dict(),
    }
    write_tensors(path, tensors, {"format": FORMAT, "resume": position})


def is_finished(path: Path, epochs: int) -> bool:
    """Whether `save_state` wrote this file after so many epochs; False where there is none.

    Raises:
        ValueError: the file is damaged, or no state of a run.
    """
    return path.is_file() and bool(_read_position(path)["epoch"] >= epochs)


def restore_state(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device
) -> TrainState:
    """Bring network, optimizer and scaler back to where `save_state` found them, in place; return the rest.

    Raises:
        ValueError: the file is damaged, no state of a run, or one of another network.
    """
    position, tensors = _read_position(path), read_tensors(path)
    weights, average = section(tensors, "network."), section(tensors, "average.")
    check_keys(weights, network.state_dict(), path)
    if average:
        check_keys(average, trainable(network), path)
    network.load_state_dict(weights)
    try:
        load_optimizer_tensors(optimizer, network, section(tensors, "optimizer."))
        if position["scaler"]:  # of another precision there is none
            scaler.load_state_dict(position["scaler"])
        best = None if position["best"] is None else Best(**position["best"])
        losses, correct = tensors["epoch.losses"].to(device), tensors["epoch.correct"].to(device)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    epoch, step, seconds, precision = (position[key] for key in ("epoch", "step", "seconds", "precision"))
    return TrainState(epoch, step, losses, correct, like_weights(average, network), seconds, best, precision)


def _read_position(path: Path) -> dict[str, Any]:
    """Where the run stood, and the optimizer's scaler.

    Raises:
        ValueError: the file is damaged, or no state of a run.
    """
    position = read_content(path).get("resume")
    if position is None:
        raise ValueError(f"{path} is a checkpoint, not the state of a run; it cannot be resumed, only used with --init")
    try:
        check_form(position, POSITION)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return dict(position)


def like_weights(average: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Averaged weights on the device and in the memory layout of the weights themselves: a file knows neither."""
    weights = dict(network.named_parameters())
    return {name: torch.empty_like(weights[name]).copy_(value) for name, value in average.items()}
