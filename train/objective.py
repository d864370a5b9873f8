"""What a training step minimises: the loss of its epoch, over random numbers of steps, with or without a teacher."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tetdeploy.checkpoint import Checkpoint, load, read_checkpoint
from tetdeploy.names import is_own_model
from tetdeploy.networks import Classifier, NetworkConfig, drawn_as_trained, import_network, run_network

from .config import TrainConfig
from .losses import distillation_loss, sdt_loss, tet_loss, total_loss
from .schedule import derive_seed
from .validation import Loss


def epoch_loss(config: TrainConfig, epoch: int) -> Loss:
    """The loss of an epoch, counted from 0: Eq. 7 or Eq. 13, with the configuration's lam, phi and label smoothing."""
    losses: dict[str, Loss] = {
        "sdt": partial(sdt_loss, label_smoothing=config.label_smoothing),
        "tet": partial(total_loss, lam=config.lam, phi=config.phi, label_smoothing=config.label_smoothing),
    }
    return losses[config.loss_at(epoch)]


def validation_losses(config: TrainConfig, epoch: int) -> dict[str, Loss]:
    """What is logged of held-out images: the epoch's own loss, and L_SDT (Eq. 7) and L_TET (Eq. 9) as they are."""
    return {"val_loss": epoch_loss(config, epoch), "val_sdt_loss": sdt_loss, "val_tet_loss": tet_loss}


def draw_lengths(config: TrainConfig, epoch: int, step: int) -> tuple[int, ...]:
    """The numbers of steps that a training step counts: its stage's T, or those drawn by `random_T`.

    Args:
        epoch: from 0.
        step: of the whole run, from 0; with the seed it decides what is drawn.
    """
    if config.time_range is None:
        return (config.stage(epoch).T,)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "T", step))
    low, high, draws = config.time_range.low, config.time_range.high, config.time_range.draws
    return tuple(torch.randint(low, high + 1, (draws,), generator=generator).tolist())


def prefix_mean(loss: Loss, logits: Tensor, labels: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Random time steps: 1/s sum_j L(O(1..T_j), y) over the s lengths T_j that were drawn, from one run at the largest.

    LIF neurons are causal: what a network computes in its first T_j steps does not depend on how many follow, so that
    the first T_j logits of the longest run are those of a run of T_j steps. BN alone couples the steps: while training
    it normalises with the statistics of the whole batch, here of max_j T_j steps for every T_j. That is what inference
    does as well, where one set of statistics serves every T; it is estimated anew for validation, from runs whose T
    are drawn as in training. (Mixed time-step training, Du et al., Temporal Flexibility in Spiking Neural Networks,
    ICLR 2025, which draws a T for each part of a network and sums s runs; here one T a draw for the whole network, and
    the sum divided by s, so that a learning rate means the same for any s.)

    Args:
        loss: of logits [T_j, N, K] and labels [N].
        logits: [max_j T_j, N, K].
        labels: [N].
        lengths: T_j, at least one.
    """
    return torch.stack([loss(logits[:T], labels) for T in lengths]).mean()


@dataclass(frozen=True)
class Teacher:
    """An ANN twin to learn from, with the weight and the temperature of its loss (`losses.distillation_loss`).

    It teaches every step that is run: with random T those of the longest run. Having no time, it sees an image once,
    and of a recording all events in one frame, as it was trained (at T=1).
    """

    classifier: Classifier
    alpha: float
    tau_kd: float

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """alpha times the distillation loss of logits [T, N, K] for a batch [N, C, H, W] or [N, T, C, H, W]."""
        with torch.no_grad():
            if x.dim() == 5:
                x = x.sum(1, keepdim=True).clamp_(max=255).to(x.dtype)
            targets = run_network(self.classifier, x, 1)[0]
        return self.alpha * distillation_loss(logits, targets, tau_kd=self.tau_kd)


def load_teacher(config: TrainConfig, student: Classifier, *, sha256: str) -> Teacher | None:
    """The teacher of `config.distill`, in eval mode on the CPU; None if there is none.

    Args:
        sha256: of its weights, as the run's files say it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it has other weights; it is no ANN twin, one for other images or classes, or one of the user's own
            code which the student is not.

    A warning says where it was trained on recordings of another sensor.
    """
    if not config.distill:
        return None
    checkpoint = read_checkpoint(config.distill)
    if checkpoint.sha256 != sha256:
        raise ValueError(
            f"the teacher {config.distill} was replaced while it was read (it is still being trained): start again, "
            "best when its training has ended"
        )
    classifier = load(checkpoint, network=_own_network(checkpoint, student))
    if not classifier.config.ann:
        raise ValueError(f"the teacher {config.distill} is no ANN: train one with --ann and give its run to --distill")
    for name in ("image_shape", "class_names"):
        theirs, ours = getattr(classifier, name), getattr(student, name)
        if theirs != ours:
            raise ValueError(
                f"the teacher {config.distill} was trained on other data: its {name} is {theirs}, not {ours}"
            )
    ours, theirs = student.framing, classifier.framing
    if ours is not None and theirs is not None and ours.sensor != theirs.sensor:  # how they are cut is not seen
        text = f"{student.data} holds {ours}; the teacher {config.distill} was trained on {theirs}: it may teach worse"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return Teacher(classifier.requires_grad_(False), config.distill_alpha, config.distill_tau)


def _own_network(teacher: Checkpoint, student: Classifier) -> nn.Module | None:
    """A network of the teacher's checkpoint if that is the user's own, who has named its function for the student."""
    theirs = teacher.metadata["network"]
    if not is_own_model(str(theirs["model"])):
        return None
    if theirs["model"] != student.config.model:
        raise ValueError(
            f"the teacher {teacher.path} is a network of your own, {theirs['model']}, and the student is "
            f"{student.config.model}: no file can have code imported, so teach with the student's --model or a "
            "built-in network"
        )
    with drawn_as_trained(teacher.metadata["training"]):
        return import_network(NetworkConfig(**theirs))
