"""What a run trains, on what and with what: everything that stays the same from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tetdeploy.class_names import check_classes
from tetdeploy.data import ImageFiles, LabelledSet, is_known
from tetdeploy.data.frames import NUM_MEASURED
from tetdeploy.data.images import histograms
from tetdeploy.int8.calibration import Calibration
from tetdeploy.names import has_regulariser, is_npz
from tetdeploy.networks import Classifier
from tetdeploy.storage.provenance import written
from tetdeploy.traced_network import Runnable
from tetdeploy.wording import counted, shorten

from .augment import RESIZED_CROP
from .config import How, TrainConfig
from .cuda_graphs import StepGraphs, check_graphs
from .device import device_name, pick_device, pick_precision, place, tuned_convolutions, wants_channels_last
from .device_images import Batch, DeviceImages, Draws, Images
from .disk_images import DiskImages, ImageReader
from .objective import Teacher, load_teacher
from .optimizer import build_optimizer
from .qat import check_qat, find_scales, int8_network, read_scales
from .ranks import Ranks, current_ranks
from .recompute import recompute_blocks
from .schedule import derive_seed, learning_rate
from .synchronised import over_ranks

# Passes that estimate BN anew for weights that BN never saw in training.
BN_BATCHES = 10


@dataclass(frozen=True)
class Task:
    """What a run is asked for: what to train, on what, how, and where to keep it."""

    classifier: Classifier
    train_set: LabelledSet
    val_set: LabelledSet | None
    config: TrainConfig
    out: Path


@dataclass(frozen=True)
class Session:
    """All of a run that stays the same from step to step."""

    classifier: Classifier
    config: TrainConfig
    train: Images
    val: Images | None
    device: torch.device
    precision: str
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    out: Path
    ranks: Ranks
    held_out: int  # validation images of all ranks; `val` holds this rank's
    reader: ImageReader  # of images that stay on disk
    model: nn.Module  # what a training step calls: the classifier, or its gradients go over all ranks
    calibration: Calibration | None  # the scales that `qat` trains at
    graphs: StepGraphs | None  # that replay forward and backward
    settings: dict[str, Any]  # as in config.json
    how: How
    remarks: list[str]  # on the data, to be said before the first step

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.batch_size  # the odd rest is left out

    def rate(self, step: int) -> float:
        """The learning rate of a global step: each stage has its own schedule."""
        steps = self.steps_per_epoch
        stage = self.config.stage(step // steps)
        return learning_rate(
            step - stage.first_epoch * steps,
            peak=stage.lr,
            total_steps=stage.epochs * steps,
            warmup_steps=round(self.config.warmup_epochs * steps),
        )

    def as_deployed(self, kept: Classifier) -> Runnable:
        """What is validated of a classifier to keep: with `qat` the network in 8 bits."""
        return kept if self.calibration is None else int8_network(kept, self.calibration.scales)

    def batches(self, epoch: int, *, first_step: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch's steps from `first_step` on."""
        steps = range(first_step, self.steps_per_epoch)
        return self.train.drawn(self._draws(epoch, steps, order="order", images="augment", seeds=self.steps_per_epoch))

    def bn_batches(self, epoch: int) -> Iterator[Batch]:
        """Up to `BN_BATCHES` batches, drawn and augmented as in training, to estimate BN's statistics on."""
        steps = range(min(BN_BATCHES, self.steps_per_epoch))
        return self.train.drawn(self._draws(epoch, steps, order="bn", images="bn images", seeds=BN_BATCHES))

    def _draws(self, epoch: int, steps: range, *, order: str, images: str, seeds: int) -> Draws:
        """Batches of a shuffled epoch. All follows from (seed, epoch) and the step: nothing of it is to be restored.

        Args:
            order, images: purposes of the seeds, see `derive_seed`: of the epoch's order, and of each augmentation.
            seeds: how many an epoch has.
        """
        seed, size = self.config.seed, self.batch_size
        # drawn on the CPU, so that a GPU takes the images in the same order
        generator = torch.Generator().manual_seed(derive_seed(seed, order, epoch))
        chosen = torch.randperm(len(self.train), generator=generator)[steps.start * size : steps.stop * size]
        step_seeds = tuple(derive_seed(seed, images, epoch * seeds + step) for step in steps)
        return Draws(chosen.view(len(steps), size), step_seeds, self.ranks.share(size))


def check_sets(train_set: LabelledSet, val_set: LabelledSet | None) -> None:
    """Refuse what is no data set, with ValueError."""
    for name, data in {"train_set": train_set, "val_set": val_set}.items():
        if not isinstance(data, LabelledSet) and (data is not None or name == "train_set"):
            raise ValueError(
                f"{name} must be a data set, got {type(data).__name__}; load_data gives one, and ImageSet(...) or "
                "FrameSet(...) makes one of arrays"
            )


def check_data(data: LabelledSet, classifier: Classifier, T: int) -> None:
    """Refuse inputs and labels the classifier cannot take: kind, shape, labels out of range or of other classes.

    Raises:
        ValueError: with what it got and what it wants.
    """
    if data.encoding != classifier.encoding:
        raise ValueError(
            f"{data.name} has {data.encoding} input; the network was made for {classifier.encoding} input, as encoding "
            "of its Classifier says"
        )
    if tuple(data.image_shape) != tuple(classifier.image_shape):
        raise ValueError(
            f"{data.name} has images of shape {data.image_shape}; the network wants {classifier.image_shape}"
        )
    if data.encoding == "frames" and data.x.shape[1] < T:
        raise ValueError(f"{data.name} has {data.x.shape[1]} frames a recording, too few for T={T}; lower --T")
    if (high := data.labels.max()) >= len(classifier.class_names):
        raise ValueError(
            f"{data.name} has labels from {data.labels.min()} to {high}; "
            f"the network has {len(classifier.class_names)} classes, counted from 0"
        )
    check_classes("the network", classifier.class_names, data.name, data.class_names, known=is_known(data.name))


def check_together(classifier: Classifier, data: LabelledSet, config: TrainConfig) -> None:
    """Refuse settings that do not go with the network or with the data that are trained on.

    Raises:
        ValueError: data of one class, an ANN with another T than 1, `qat` of a network without spikes, AutoAugment of
            other than gray and colour images, a cutout of the whole image, an augmentation of images in memory for
            those on disk, or the other way round, or recordings that what comes after the training would cut into other
            frames.
    """
    if len(data.class_names) == 1:
        raise ValueError(
            f"{data.name} has one class, {data.class_names[0]}, and nothing to tell it from (folder:PATH takes "
            "PATH/train/<class>/ and PATH/test/<class>/ of each class)"
        )
    on_disk = isinstance(data, ImageFiles)
    if on_disk and (config.augment not in ("none", RESIZED_CROP) or config.cutout):
        asked = f"augment {config.augment} and cutout {config.cutout}"
        raise ValueError(
            f"{data.name} is cropped as it is read from disk: choose augment none or {RESIZED_CROP} and "
            f"cutout 0, got {asked}"
        )
    if config.augment == RESIZED_CROP and not on_disk:
        raise ValueError(
            f"{RESIZED_CROP} cuts from image files as they are read from disk (imagenet); for "
            f"{data.name} choose another augment"
        )
    if classifier.config.ann and config.longest_T > 1:
        raise ValueError(f"an ANN has no time: train it with T=1 (--ann --T 1), got T={config.longest_T}")
    if config.qat:
        check_qat(classifier)
    if data.encoding == "frames":
        _check_frames(data, config)
    channels, *sides = classifier.image_shape
    if config.cutout >= max(sides):  # smaller ones leave a strip, wherever they are centred
        height, width = sides
        raise ValueError(
            f"cutout {config.cutout} would blank whole images of {data.name}, of {width}x{height} pixels; choose at "
            f"most {max(sides) - 1}, or 0 for none"
        )
    if config.augment == "autoaugment" and (channels not in (1, 3) or classifier.encoding == "frames"):
        raise ValueError(
            f"autoaugment wants images of 1 or 3 channels, got {classifier.encoding} input of {channels}; "
            "choose another augment"
        )


def _check_frames(data: LabelledSet, config: TrainConfig) -> None:
    cut = not is_npz(data.name)  # whose frames are as they are
    if cut and config.longest_T != config.T:
        raise ValueError(
            f"recordings would be cut into {config.longest_T} frames for training and into T={config.T} afterwards; "
            f"train with T={config.longest_T}{' in the last stage' if config.tit else ''}"
        )
    if config.distill and not cut:
        raise ValueError(
            f"{data.name} holds frames, and a teacher without time learns from whole recordings: for distill choose an "
            "event set"
        )


def remarks(data: LabelledSet, config: TrainConfig, *, ann: bool = False) -> list[str]:
    """What to say of the training data before a run: frames that no T reads or whose counts say little, images that are
    all but black or may be frames, and classes without an image."""
    lines = []
    if data.encoding == "direct" and isinstance(data.x, np.ndarray) and data.x.max() <= 1:
        lines.append(f"no pixel of {data.name} is above 1, of 255: were they from 0 to 1? give (255 * x).round()")
    if data.encoding == "direct" and is_npz(data.name) and (channels := data.image_shape[0]) > 4:
        height, width = data.image_shape[1:]
        lines.append(
            f"images of {data.name} have {channels} channels and are shown whole at each step: are these frames? give "
            f"[N, {channels}, 1, {height}, {width}]"
        )
    if data.encoding == "frames" and data.x.shape[1] > config.longest_T:
        read_all = "an ANN has no time to read others" if ann else f"--T {data.x.shape[1]} reads all"
        lines.append(
            f"{data.name} has {data.x.shape[1]} frames a recording, of which T={config.longest_T} reads the first "
            f"{config.longest_T}; {read_all}"
        )
    if data.framing is not None:
        lines += _remarks_on_counts(data, by=data.framing.by)
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    if missing := [name for name, count in zip(data.class_names, counts, strict=True) if not count]:
        from_0 = "; labels are counted from 0" if is_npz(data.name) else ""
        few = f"{len(missing)} of {len(counts)} classes: {shorten(missing)}"
        lines.append(f"{data.name} has no training image of {few}{from_0}")
    return lines


def _remarks_on_counts(data: LabelledSet, *, by: str) -> list[str]:
    lines = []
    measured = data.x[:NUM_MEASURED]
    levels = histograms(measured.reshape(-1, *data.image_shape))[:, 1:]
    off, on = levels.sum(1).tolist()
    if bool(off) != bool(on):
        kind = "ON" if off else "OFF"
        lines.append(f"{len(measured):,} recordings of {data.name} have no {kind} event: were polarities lost?")
    if (full := levels[:, -1].sum() / max(levels.sum(), 1)) > 0.1:
        lines.append(
            f"{full:.0%} of the counts above 0 in {data.name} end at 255, the most that a frame counts: cut recordings "
            "into more frames (--T), or give shorter ones"
        )
    if by == "time" and data.x.shape[1] > 1:
        events = measured.sum((2, 3, 4), dtype=np.int64)
        if crowded := int((events.max(1) > 0.99 * events.sum(1)).sum()):
            lines.append(
                f"{crowded:,} of {len(measured):,} recordings of {data.name} have over 99% of their events in one "
                "frame: is a first or last time wrong, or are times rounded, as seconds since 1970 are in float32? "
                "Frames of equal counts, without by-time:, do not depend on times"
            )
    return lines


def prepare(task: Task, *, settings: dict[str, Any], resume: bool, workers: int | None, how: How) -> Session:
    """Move everything to the device and build what trains it.

    Args:
        settings: what config.json says of the run, but for the scales of `qat`.
        resume: go on with the run in `task.out`, and so at its scales.
    """
    classifier, config, val_set = task.classifier, task.config, task.val_set
    device, ranks = pick_device(config.device), current_ranks()
    precision = "fp32" if config.qat else pick_precision(config.precision, device)
    if how.cuda_graphs:
        check_graphs(config, device, precision, ranks)
    if how.recompute:
        recompute_blocks(classifier.network)
    teacher = load_teacher(config, classifier, sha256=settings["training"].get("distill_sha256", ""))
    _place_all(classifier, teacher, device, precision, fusable=not config.qat and ranks.size == 1)
    trained: Runnable = classifier
    calibration = _find_calibration(task, resume=resume) if config.qat else None
    if calibration is not None:
        trained = int8_network(classifier, calibration.scales)
        settings = settings | {"int8": calibration.to_dict()}
    reader = ImageReader(workers, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return Session(
        classifier=classifier,
        config=config,
        train=_images(task.train_set, reader, task),
        val=None if val_set is None else _images(_share(val_set, ranks), reader, task),
        device=device,
        precision=precision,
        teacher=teacher,
        optimizer=build_optimizer(classifier.network, config, scaled=scaler.is_enabled()),
        scaler=scaler,
        out=task.out,
        ranks=ranks,
        held_out=0 if val_set is None else len(val_set),
        reader=reader,
        model=over_ranks(trained, find_unused=classifier.config.is_own) if ranks.size > 1 else trained,
        calibration=calibration,
        graphs=StepGraphs(classifier) if how.cuda_graphs else None,
        settings=settings,
        how=how,
        remarks=remarks(task.train_set, config, ann=task.classifier.config.ann),
    )


def _place_all(
    classifier: Classifier, teacher: Teacher | None, device: torch.device, precision: str, *, fusable: bool
) -> None:
    """Move the classifier and its teacher to the device; `fusable` is of the classifier, see `wants_channels_last`."""
    for placed in (classifier,) if teacher is None else (teacher.classifier, classifier):
        last = wants_channels_last(placed.config, device, precision, fusable=fusable and placed is classifier)
        place(placed, device, channels_last=last)


def _find_calibration(task: Task, *, resume: bool) -> Calibration:
    """The scales that the run was begun with, or those that a new one is to train at."""
    if resume:
        return read_scales(task.out)
    with tuned_convolutions():
        found = find_scales(task.classifier, task.train_set, task.config.T)
    return current_ranks().agreed(replace(found, fine_tuned=True))


def _images(data: LabelledSet, reader: ImageReader, task: Task) -> Images:
    if isinstance(data, ImageFiles):
        return DiskImages(data, reader, augment=task.config.augment == RESIZED_CROP)
    return DeviceImages(data, task.classifier, task.config)


def _share(data: LabelledSet, ranks: Ranks) -> LabelledSet:
    """This rank's part of a set that is passed over once.

    Raises:
        ValueError: there are fewer images than ranks.
    """
    if len(data.labels) < ranks.size:
        raise ValueError(f"{len(data.labels)} validation images are too few for {ranks.size} processes")
    return data if ranks.size == 1 else data.select(np.arange(ranks.rank, len(data.labels), ranks.size))


def headline(session: Session) -> str:
    """Two lines: the data, the network and the device; the loss, the time steps and the optimisation."""
    config, classifier = session.config, session.classifier
    millions = sum(p.numel() for p in classifier.network.parameters()) / 1e6
    twin = "ANN twin of " if classifier.config.ann else ""
    smooth = f", smooth spikes k={classifier.config.smooth_spike:g}" if classifier.config.smooth_spike else ""
    parent = f", from {session.settings['init']['path']}" if "init" in session.settings else ""
    loss = _loss(session, config.loss)
    if config.switch_to_tet:
        loss += f", after {counted(config.switch_to_tet, 'epoch')} {_loss(session, 'tet')}"
    if session.teacher is not None:
        loss += f", distilled from {config.distill}"
    in_8_bits = f", {counted(len(session.calibration.scales), 'convolution')} in int8" if session.calibration else ""
    steps = f"T={config.random_T or config.T}"
    time = f"TIT {config.tit}" if config.tit else f"{steps}   {counted(config.epochs, 'epoch')}"
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(stage.lr for stage in config.stages))
    cut = f" (all there are, of {config.batch_size})" if session.batch_size < config.batch_size else ""
    several = f"{session.ranks.size} x " if session.ranks.size > 1 else ""
    return (
        f"{classifier.data}  {len(session.train):,} train  {session.held_out:,} validation   "
        f"{twin}{classifier.config.model} {millions:.3g} M parameters{smooth}{parent}   "
        f"{session.precision}{in_8_bits} on {several}{device_name(session.device)}\n"
        f"{loss}   {time}   batch size {session.batch_size}{cut}   {config.optimizer} lr {rates}"
    )


def _loss(session: Session, name: str) -> str:
    """A loss in words. At an ANN's one time step Eqs. 7 and 9 are the same."""
    lam = session.config.lam
    if session.classifier.config.ann:
        return "cross-entropy" + (f", MSE lambda {lam:g}" if has_regulariser(name) and lam else "")
    return name.upper() + (f" lambda {lam:g}" if has_regulariser(name) else "")


def provenance(session: Session, epoch: int, val_accuracy: float | None) -> dict[str, Any]:
    """What weights say about where they come from; `epoch` is the number of finished ones."""
    return written(torch=torch.__version__, numpy=np.__version__) | {
        "device": device_name(session.device),
        "precision": session.precision,
        "epoch": epoch,
        "T": session.config.stage(max(epoch - 1, 0)).T,
        "val_accuracy": val_accuracy,
        "seed": session.config.seed,
        **{name: value for name, value in session.settings.items() if name in ("init", "code_sha256")},
    }
