"""The training loop.

Batches come from the session, whether the images live on the device or on disk (`batches`). Every random number
follows from (seed, epoch) or (seed, global step), so that a resumed run draws what an uninterrupted one would have:
bit for bit the same weights on a CPU.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetdeploy.arguments import check_flag, check_type
from tetdeploy.checkpoint import read_metadata, save_checkpoint
from tetdeploy.data import LabelledSet
from tetdeploy.networks import Classifier, check_classifier, code_sha256, run_network, warn_of_other_code
from tetdeploy.storage.files import lacks_temporary_folder
from tetdeploy.storage.metrics import metrics_line, read_metrics, write_metrics
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, CONFIG_NAME, STATE_NAME, without_latest
from tetdeploy.system.memory import reused_memory
from tetdeploy.system.signals import deferred_interrupt
from tetdeploy.wording import counted, shorten

from .averaging import kept_classifier, lagging_bn, update_average
from .board import check_board, goes_on, tensorboard
from .config import How, TrainConfig
from .device import autocast, tuned_convolutions
from .objective import draw_lengths, epoch_loss, prefix_mean, validation_losses
from .optimizer import trainable
from .progress import Progress
from .ranks import current_ranks
from .restart import (
    Restart,
    check_restart,
    check_shards,
    find_restart,
    has_shards,
    remove_shards,
    restart_origin,
    restart_state,
    write_restart,
)
from .runs import (
    check_latest,
    check_run,
    is_begun,
    mark_latest,
    only_trainer,
    read_run_config,
    run_settings,
    weights_origin,
    write_run_config,
)
from .schedule import derive_seed
from .session import Session, Task, check_data, check_sets, check_together, headline, prepare, provenance
from .state import Best, TrainState, is_finished, restore_state, save_state
from .validation import Loss, count_correct, measure, noting_silence


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: the run folder.
        epochs: finished epochs.
        best: the epoch in the checkpoint, with its validation accuracy and loss; None before the first is finished.
        interrupted: Ctrl-C ended it; `--resume` goes on.
        seconds: this session's time.
    """

    out: Path
    epochs: int
    best: Best | None
    interrupted: bool
    seconds: float

    @property
    def checkpoint(self) -> Path:
        """The best weights; there is no such file before the first epoch is finished."""
        return self.out / CHECKPOINT_NAME


def train(
    classifier: Classifier,
    train_set: LabelledSet,
    val_set: LabelledSet | None,
    config: TrainConfig,
    out: Path | str,
    *,
    resume: bool = False,
    runs: Path | None = None,
    progress: bool | None = None,
    board: bool = False,
    workers: int | None = None,
    how: How | None = None,
    init: Path | str | Mapping[str, str] | None = None,
    restart_from: Path | str | None = None,
    before_writing: Callable[[], object] | None = None,
) -> TrainResult:
    """Train a classifier and keep the run in a folder: checkpoint, training state, metrics and settings.

    `classifier` is trained in place and ends with the last epoch's weights, in eval mode and on the training device.
    The best epoch's are in `out/checkpoint.safetensors`: with several stages, those of the best epoch of the last
    stage; with `ema`, the averaged ones. Ctrl-C ends the run after the current batch and saves it.

    Args:
        classifier: network and input normalisation. When resuming, a fresh one: its weights are overwritten.
        train_set: trained on.
        val_set: decides which epoch is best; None keeps the last epoch.
        config: how to train; `qat` starts from a classifier that is trained.
        out: run folder, made if it is not there.
        resume: continue the run in `out`, which must have the same settings, except for the place of a teacher.
        runs: folder whose `latest` is to point at this run, if any.
        progress: True for a bar, False for silence, None for a bar on a terminal and a line an epoch elsewhere.
        board: write TensorBoard curves to `out/tensorboard` as well; a run that has some goes on with them.
        workers: processes that read images which stay on disk, by default as many as there are cores; 0 reads in this
            process. With them a script needs `if __name__ == "__main__":`, as always with multiprocessing.
        how: with CUDA graphs, with less memory, with shards; a run may be continued differently from how it began.
        init: where the weights of `classifier` come from, for the run's files to name: a checkpoint, run or shards, or
            what `runs.weights_origin` says of them; they are not loaded here.
        restart_from: continue, in `out`, which holds no run, from shards or from a checkpoint; the settings must be
            those of their run, except for device, precision and the place of a teacher.
        before_writing: called once everything is checked and on the device, before the first file is written.

    Returns:
        Where the run ended.

    Raises:
        ValueError: data or settings do not fit the classifier, `out` holds a run or, with `resume`, one with other
            settings, another process trains there, the device is not there, its memory does not suffice, an image
            cannot be read, the loss is not finite, or a batch changes the shapes of the state dict; there is nothing to
            restart from, it is damaged, or a tensor is larger than a shard; the training step has no CUDA graph; the
            checkpoint of a finished run is damaged.
        MissingExtraError: the package tensorboard is wanted and not installed.
        OSError: something cannot be written; earlier files are as they were.
    """
    start, out, how = time.perf_counter(), without_latest(Path(out)), how or How()
    check_type("config", config, TrainConfig)
    check_type("how", how, How)
    for name, flag in (("resume", resume), ("board", board)):
        check_flag(name, flag)
    check_flag("progress", progress, or_none=True)
    task = Task(classifier, train_set, val_set, config, out)
    if resume and restart_from is not None:
        raise ValueError("resume goes on with the run in out and restart_from begins another; choose one of them")
    if init is not None and (resume or restart_from is not None):
        raise ValueError("init names what a new run begins with; leave it out with resume and restart_from")
    ranks = current_ranks()
    with ranks.first():
        finished = resume and is_finished(out / STATE_NAME, config.epochs)
        finished = finished and (how.shard_bytes is None or has_shards(out, config.epochs, how.shard_bytes))
    finished = ranks.agreed(finished)
    with nullcontext() if finished else only_trainer(out, resume=resume):  # it may lie where nobody can write
        restart = None
        with ranks.first():
            _check(task, how)
            if board:
                check_board(out)
            settings = run_settings(classifier, train_set, val_set, config)
            if ranks.writes:
                check_run(out, settings, resume=resume)
                if runs is not None and not finished:
                    check_latest(out, runs)
            if restart_from is not None:
                restart = find_restart(restart_from)
                check_restart(restart, settings)
            settings |= _origin(task, init, restart, resume=resume)
        settings["how"] = asdict(how)
        if restart is not None:
            settings["restarted"] = restart_origin(restart)
        with _explained(task, how):
            session = prepare(task, settings=settings, resume=resume, workers=workers, how=how)
            if how.shard_bytes is not None:
                check_shards(session, how.shard_bytes)
            if before_writing is not None:
                before_writing()
            state = _begin(session, restart, resume=resume, runs=runs)
            finished = _run(session, state, progress, board)
    classifier.eval()
    return TrainResult(out, state.epoch, state.best, not finished, time.perf_counter() - start)


def _check(task: Task, how: How) -> None:
    """Refuse what does not fit together, as far as no device is needed to know it."""
    config = task.config
    check_classifier(task.classifier)
    check_sets(task.train_set, task.val_set)
    for data in (task.train_set, task.val_set):
        if data is not None:
            check_data(data, task.classifier, config.longest_T)
    check_together(task.classifier, task.train_set, config)
    if how.recompute and config.qat:
        raise ValueError("--recompute does not go with --qat, which trains one traced graph; choose one of them")
    current_ranks().check_batch(config.batch_size, len(task.train_set))


def _origin(
    task: Task, init: Path | str | Mapping[str, str] | None, restart: Restart | None, *, resume: bool
) -> dict[str, Any]:
    """What the run's files say of the weights that it began with, as `weights_origin` names them, or, of a run that
    goes on, as it named them; and of the code of the user's own network."""
    if resume or restart is not None:
        before: Mapping[str, Any] = read_run_config(task.out) if restart is None else restart.settings["provenance"]
        parent = before.get("init")
        if current_ranks().writes:
            trained = task.out if restart is None else restart.path
            warn_of_other_code(task.classifier.config, before.get("code_sha256"), trained)
    else:
        parent = init if init is None or isinstance(init, Mapping) else weights_origin(init)
    found = {"init": parent, "code_sha256": code_sha256(task.classifier.config)}
    if resume:
        found["restarted"] = before.get("restarted")
    return {name: value for name, value in found.items() if value}


@contextmanager
def _explained(task: Task, how: How) -> Iterator[None]:
    """Within it, a full disk, too little memory, batches too small for BN and a state that outlives its batch are
    errors that say what to do."""
    config, network = task.config, task.classifier.config
    own = f" --model {network.model}" if network.is_own else ""
    try:
        yield
    except OSError as error:
        says_all = error.errno is None or lacks_temporary_folder(error)
        of_seeds = (task.out.parent / CONFIG_NAME).is_file()  # of whom others may be trained
        if says_all or not (is_begun(task.out) or of_seeds):
            raise
        raise OSError(
            f"{error.filename or task.out}: {error.strerror}; what was written before is as it was: "
            f"go on with --resume{own}"
        ) from error
    except torch.OutOfMemoryError as error:
        graphs = " --no-cuda-graphs" if how.cuda_graphs else ""
        less = "" if how.recompute or config.qat else f"go on with --recompute{graphs}, or "
        raise ValueError(
            f"out of GPU memory at batch_size {config.batch_size}, T={config.longest_T}, precision {config.precision}; "
            f"{less}train anew with a lower --batch-size or --T"
        ) from error
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):  # PyTorch's
            raise
        raise ValueError(
            f"{network.model} goes on with what it computed of the batch before, as neurons do that are not reset: "
            "reset them where its forward begins, or take tetdeploy's LIF"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # PyTorch's
            raise
        raise ValueError(f"no statistics for BN: {error}; raise --batch-size, or --T, or take larger images") from error


def _begin(session: Session, restart: Restart | None, *, resume: bool, runs: Path | None) -> TrainState:
    """The state of the run to go on with, or of a new one, which is written before anything is computed; unless it is
    finished, it is the newest of `runs` from here on."""
    if resume:
        network, optimizer = session.classifier.network, session.optimizer
        state = restore_state(session.out / STATE_NAME, network, optimizer, session.scaler, session.device)
        if state.epoch < session.config.epochs:
            state.best = _kept_best(session, state.best)
        else:
            _check_checkpoint(session)
    elif restart is not None:
        state = restart_state(restart, session)
    else:
        weights = trainable(session.classifier.network) if session.config.ema else {}
        average = {name: weight.clone() for name, weight in weights.items()}
        state = TrainState.start(session.steps_per_epoch, session.device, average)
        if session.ranks.writes and session.how.shard_bytes is not None:
            remove_shards(session)
    if not resume:
        _save(session, state)
    else:  # a full disk or a kill may have come between state and shards
        _save_shards(session, state)
    if session.ranks.writes and state.epoch < session.config.epochs:  # of one that is finished nothing is written
        write_run_config(session.out, session.settings, resume=resume)
        if runs is not None:
            mark_latest(session.out, runs)
    return state


def _kept_best(session: Session, best: Best | None) -> Best | None:
    """The best epoch of an unfinished run, or None if the checkpoint does not hold it: the next one takes its place."""
    file = session.out / CHECKPOINT_NAME
    if best is None:
        return None
    if not file.is_file():
        if session.ranks.writes:
            text = f"{file} is gone, and so is epoch {best.epoch}, the best: the best of those that follow is kept"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None
    # killed between checkpoint and state, it holds the epoch that is now run again
    return best if read_metadata(file)["provenance"].get("epoch") == best.epoch else None


def _check_checkpoint(session: Session) -> None:
    """Of a finished run, whose result names it: ValueError if it is damaged, a warning if it is gone."""
    file = session.out / CHECKPOINT_NAME
    if file.is_file():
        read_metadata(file)
    elif session.ranks.writes:
        warnings.warn(
            f"{file} is gone: the run is finished, and must be trained anew for it", RuntimeWarning, stacklevel=2
        )


def _save(session: Session, state: TrainState) -> None:
    if session.ranks.writes:
        save_state(session.out / STATE_NAME, state, session.classifier.network, session.optimizer, session.scaler)
    _save_shards(session, state)


def _save_shards(session: Session, state: TrainState) -> None:
    if session.ranks.writes and session.how.shard_bytes is not None:
        write_restart(session, state, session.how.shard_bytes)


def _run(session: Session, state: TrainState, show: bool | None, board: bool) -> bool:
    """Train to the end and return True, or to a Ctrl-C and return False with the state saved."""
    config, steps = session.config, session.steps_per_epoch
    lines = [metrics_line(record) for record in read_metrics(session.out, epochs=state.epoch)]
    done = state.epoch * steps + state.step
    writes = session.ranks.writes
    board = writes and (board or goes_on(session.out))
    curves = tensorboard(session.out, epochs_done=state.epoch) if board else nullcontext(lambda record: None)
    bar = Progress(config, steps_per_epoch=steps, steps_done=done, show=show if writes else False)
    cuda = [session.device] if session.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        tuned_convolutions(),
        nullcontext() if cuda else reused_memory(),
        deferred_interrupt() as interrupt,
        closing(session.reader),
        curves as draw,
        bar,
    ):
        bar.say(headline(session))
        for line in filter(None, [*session.remarks, lagging_bn(session)] if done == 0 else []):
            bar.say(line)
        if state.precision not in ("", session.precision):
            bar.say(f"computed in {state.precision} until now, which `precision auto` does not choose on this device")
        state.precision = session.precision
        while state.epoch < config.epochs:
            trained = _train_steps(session, state, bar, interrupt)
            finished = _finish_epoch(session, state, interrupt) if trained else None
            if finished is None:
                _save(session, state)
                session.ranks.any(False)  # a rank that ends before the first has saved would have it killed by torchrun
                return False
            kept, record, silent = finished
            lines.append(metrics_line(record))  # each once: to make all of them anew takes longer with every epoch
            _keep(session, state, kept, record, lines)
            bar.epoch(record)
            draw(record)
            if silent:
                bar.say(_said_of_silence(session, silent, state.epoch))
    return True


def _silent(session: Session, state: TrainState, kept: Classifier) -> AbstractContextManager[list[str]]:
    """The layers of which no neuron fires in a validation, see `noting_silence`: of a network of one's own, after a
    tenth of the epochs and at the end. None where a process sees a part of the images, or with --qat."""
    epochs, network = session.config.epochs, session.classifier.config
    asked = state.epoch + 1 in (math.ceil(epochs / 10), epochs) and network.is_own and not network.ann
    return (
        noting_silence(kept) if asked and session.ranks.size == 1 and session.calibration is None else nullcontext([])
    )


def _said_of_silence(session: Session, layers: Sequence[str], epochs: int) -> str:
    """Such a layer learns nothing where no membrane comes within gamma of the threshold: the gradient is 0 there."""
    return (
        f"no neuron of {shorten(layers)} fired on {counted(session.held_out, 'held-out image')} after epoch {epochs}; "
        "if it stays so: a larger gamma or a lower v_th, or BN in front of these neurons"
    )


def _finish_epoch(
    session: Session, state: TrainState, interrupt: Event
) -> tuple[Classifier, dict[str, Any], list[str]] | None:
    """Validate a trained epoch: the classifier to keep, the line of metrics.jsonl and the `_silent` layers; or None
    after a Ctrl-C."""
    stage = session.config.stage(state.epoch)
    loss, accuracy = _running_means(session, state)
    start = time.perf_counter()
    kept = kept_classifier(session, state)
    with _silent(session, state, kept) as silent:
        val = _validate(session, state, kept, interrupt)
    if session.ranks.any(interrupt.is_set()):
        return None
    _check_finite(session, state, val["val_loss"])
    metrics = {
        "epoch": state.epoch + 1,
        "stage": stage.number,
        "T": stage.T,
        "loss": session.config.loss_at(state.epoch),
        "lr": session.rate((state.epoch + 1) * session.steps_per_epoch - 1),
        "train_loss": loss,
        "train_accuracy": accuracy,
        **val,
        "images_per_s": round(_speed(session, state), 1),
        "seconds": round(state.seconds + time.perf_counter() - start, 3),
    }
    return kept, metrics, silent


def _train_steps(session: Session, state: TrainState, bar: Progress, interrupt: Event) -> bool:
    """Train to the end of the epoch and return True, or to a Ctrl-C on any rank and return False."""
    if state.step == 0 and state.epoch == session.config.stage(state.epoch).first_epoch:
        session.optimizer.state.clear()  # moments of another T mislead the first steps of a stage
    session.classifier.train()
    start, trained = time.perf_counter() - state.seconds, True
    shapes, first = _shapes(session), state.step
    for x, labels in session.batches(state.epoch, first_step=first):
        trained = not session.ranks.any(interrupt.is_set())
        if not trained:
            break
        _train_step(session, state, x, labels)
        if state.step == first:
            _refuse_reshaped(session, shapes)
        state.step += 1
        if bar.due():
            loss, accuracy = _running_means(session, state)
            state.seconds = time.perf_counter() - start
            speed = _speed(session, state)
            bar.step(epoch=state.epoch + 1, step=state.step, loss=loss, accuracy=accuracy, images_per_s=speed)
    _running_means(session, state)  # nothing that is not finite is ever saved; on a GPU this also waits for the steps
    state.seconds = time.perf_counter() - start
    return trained


def _shapes(session: Session) -> dict[str, list[int]]:
    held = session.classifier.network.state_dict()
    return {name: list(value.shape) for name, value in held.items() if isinstance(value, Tensor)}


def _refuse_reshaped(session: Session, before: Mapping[str, list[int]]) -> None:
    """Refuse a network whose state dict has other shapes once it has run: no new network takes such a checkpoint."""
    after = _shapes(session)
    changed = [f"{name} {shape}, not {before.get(name)}" for name, shape in after.items() if shape != before.get(name)]
    if changed:
        raise ValueError(
            f"{session.classifier.config.model} keeps in its state dict what a batch has left, so that its checkpoint "
            f"would not fit a new network: {shorten(changed)} as before; take tetdeploy's LIF in place of neurons that "
            "do so, as those of sinabs, or register the buffer with persistent=False"
        )


def _train_step(session: Session, state: TrainState, x: Tensor, labels: Tensor) -> None:
    """One update on a batch. Waits for nothing on a GPU (but for fp16's gradient scaling)."""
    config, optimizer, scaler = session.config, session.optimizer, session.scaler
    step = state.epoch * session.steps_per_epoch + state.step
    lengths = tuple(sorted(draw_lengths(config, state.epoch, step)))
    draws = "network" if session.ranks.rank == 0 else f"network of rank {session.ranks.rank}"
    torch.manual_seed(derive_seed(config.seed, draws, step))  # dropout and whatever else a network draws
    for group in optimizer.param_groups:
        group["lr"] = session.rate(step)
    compute = partial(_gradients, session, epoch_loss(config, state.epoch), lengths)
    if session.graphs is None:
        optimizer.zero_grad(set_to_none=True)
        numbers = compute(x, labels)
    else:
        numbers = session.graphs((lengths, config.loss_at(state.epoch)), compute, x, labels)
    if config.clip > 0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(session.classifier.network.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    if state.average:
        update_average(state.average, session.classifier.network, decay=config.ema, step=step)
    state.losses[state.step], state.correct[state.step] = session.ranks.sum(numbers)


def _gradients(session: Session, loss_of: Loss, lengths: tuple[int, ...], x: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward: adds to the parameters' gradients. Returns the loss and how many images are right, [2]."""
    with autocast(session.device, session.precision):
        logits = run_network(session.model, x, max(lengths))
        taught = 0.0 if session.teacher is None else session.teacher.loss(logits, x)
    loss = prefix_mean(loss_of, logits, labels, lengths) + taught
    session.scaler.scale(loss).backward()
    return torch.stack([loss.detach() / session.ranks.size, count_correct(logits.detach(), labels)])


def _validate(session: Session, state: TrainState, kept: Classifier, interrupt: Event) -> dict[str, float | None]:
    """The losses and the accuracy on the held-out images at the stage's T; None for each where there are none."""
    losses, ranks = validation_losses(session.config, state.epoch), session.ranks
    found = session.val and measure(
        session.as_deployed(kept),
        session.val.in_order(max(session.config.batch_size, 128)),
        T=session.config.stage(state.epoch).T,
        losses=losses,
        precision=session.precision,
        # Ranks cannot stop apart: one would wait for the others' numbers.
        stop=interrupt.is_set if ranks.size == 1 else lambda: False,
        ranks=ranks,
    )
    values: Mapping[str, float] = found or {}
    return {name: values.get(name) for name in losses} | {"val_accuracy": values.get("accuracy")}


def _keep(
    session: Session, state: TrainState, kept: Classifier, record: Mapping[str, Any], lines: Sequence[str]
) -> None:
    """Write an epoch down: metrics, the checkpoint if it is the best so far, and last what --resume starts from.

    In this order: a kill in between leaves an older state, which runs the epoch again and writes the same; on a GPU,
    where it may end otherwise by rounding, what it then keeps is still this epoch.
    """
    writes = session.ranks.writes
    if writes:
        write_metrics(session.out, lines)
        if not (session.out / CONFIG_NAME).is_file():  # the folder was moved or removed; the new one is a run, too
            write_run_config(session.out, session.settings, resume=False)
    val_loss = record["val_tet_loss" if session.config.switch_to_tet else "val_loss"]
    this = Best(record["epoch"], record["val_accuracy"], val_loss, record["stage"])
    if state.best is None or state.best.is_beaten_by(this):
        state.best = this
        if writes:
            about = {
                "training": session.settings["training"],
                "provenance": provenance(session, this.epoch, this.val_accuracy),
                "fingerprint": session.settings["data"]["fingerprint"],
            }
            int8 = None if session.calibration is None else session.calibration.to_dict()
            save_checkpoint(session.out / CHECKPOINT_NAME, kept, **about, int8=int8)
    state.next_epoch()
    _save(session, state)


def _running_means(session: Session, state: TrainState) -> tuple[float, float]:
    """Mean loss and accuracy of the running epoch's finished steps.

    Raises:
        ValueError: a loss is not finite.
    """
    _check_finite(session, state, None)
    losses, correct = state.losses[: state.step], state.correct[: state.step]
    if state.step == 0:
        return 0.0, 0.0
    return losses.double().mean().item(), correct.sum().item() / (state.step * session.batch_size)


def _check_finite(session: Session, state: TrainState, val_loss: float | None) -> None:
    """Stop a run whose loss is NaN or infinite: every later step would be lost too."""
    bad = (~state.losses[: state.step].isfinite()).nonzero().flatten().tolist()
    if not bad and (val_loss is None or np.isfinite(val_loss)):
        return
    step = state.epoch * session.steps_per_epoch + (bad[0] if bad else state.step - 1)
    where, value = ("loss", state.losses[bad[0]].item()) if bad else ("validation loss after the epoch", val_loss)
    raise ValueError(
        f"the {where} is {value} at step {step} (epoch {state.epoch + 1}, lr {session.rate(step):.3g}); "
        f"lower --lr{'' if session.precision == 'fp32' else ', use --precision fp32'} or switch on --clip 1, in a new "
        "run, as --resume would come to this again. The files of the finished epochs are as they were"
    )


def _speed(session: Session, state: TrainState) -> float:
    return state.step * session.batch_size / max(state.seconds, 1e-9)
