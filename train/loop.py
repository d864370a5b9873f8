"""The training loop.

Batches come from the session, whether the images live on the device or on disk (`batches`). Every random number
follows from (seed, epoch) or (seed, global step), so that a resumed run draws what an uninterrupted one would have:
bit for bit the same weights on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetdeploy.checkpoint import save_checkpoint
from tetdeploy.networks import Classifier, run_network
from tetdeploy.storage.metrics import metrics_line, read_metrics, write_metrics
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, CONFIG_NAME, STATE_NAME
from tetdeploy.system.memory import reused_memory
from tetdeploy.system.signals import deferred_interrupt
from tetdeploy.wording import counted, shorten

from .averaging import kept_classifier, lagging_bn, update_average
from .board import goes_on, tensorboard
from .device import autocast, tuned_convolutions
from .objective import draw_lengths, epoch_loss, prefix_mean, validation_losses
from .progress import Progress
from .restart import write_restart
from .runs import write_run_config
from .schedule import derive_seed
from .session import Session, headline, provenance
from .state import Best, TrainState, save_state
from .validation import Loss, count_correct, measure, noting_silence


def run_epochs(session: Session, state: TrainState, show: bool | None, board: bool) -> bool:
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
                save(session, state)
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


def save(session: Session, state: TrainState) -> None:
    """What --resume and --restart-from go on with."""
    if session.ranks.writes:
        save_state(session.out / STATE_NAME, state, session.classifier.network, session.optimizer, session.scaler)
    save_shards(session, state)


def save_shards(session: Session, state: TrainState) -> None:
    if session.ranks.writes and session.how.shard_bytes is not None:
        write_restart(session, state, session.how.shard_bytes)


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
    save(session, state)


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
    told = f"the {where} is {value} at step {step} (epoch {state.epoch + 1}, lr {session.rate(step):.3g})"
    plain = [] if session.precision == "fp32" else ["use --precision fp32"]
    if bad and step == 0:
        remedies = ", or ".join([*plain, "look for what is not finite in the network itself, or too large in --phi"])
        raise ValueError(f"{told}, before any weight was changed: {remedies}")
    raise ValueError(
        f"{told}; {', '.join(['lower --lr', *plain])} or switch on --clip 1, in a new run, as --resume would come to "
        "this again. The files of the finished epochs are as they were"
    )


def _speed(session: Session, state: TrainState) -> float:
    return state.step * session.batch_size / max(state.seconds, 1e-9)
