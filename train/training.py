"""`train`: checks, begins a run or goes on with one, and has `loop` run its epochs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tetdeploy.arguments import check_flag, check_type
from tetdeploy.checkpoint import read_metadata
from tetdeploy.data import LabelledSet
from tetdeploy.networks import Classifier, check_classifier, code_sha256, warn_of_other_code
from tetdeploy.storage.files import lacks_temporary_folder
from tetdeploy.storage.run_folder import CHECKPOINT_NAME, CONFIG_NAME, STATE_NAME, without_latest
from tetdeploy.tracing import callers_autocast_off

from .board import check_board
from .config import How, TrainConfig
from .loop import run_epochs, save, save_shards
from .optimizer import trainable
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
from .session import Session, Task, check_data, check_sets, check_together, prepare
from .state import Best, TrainState, is_finished, restore_state


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
    runs: Path | str | None = None,
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
            cannot be read, the loss is not finite, a batch changes the shapes of the state dict, or weights were made
            within `torch.inference_mode`; there is nothing to restart from, it is damaged, or a tensor is larger than a
            shard; the training step has no CUDA graph; the checkpoint of a finished run is damaged.
        MissingExtraError: the package tensorboard is wanted and not installed.
        OSError: something cannot be written; earlier files are as they were.
    """
    start, out, how = time.perf_counter(), without_latest(Path(out)), how or How()
    runs = None if runs is None else Path(runs)
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
        with ranks.first():
            _check(task, how)
            if board:
                check_board(out)
            settings, restart = _settings(task, how, init, restart_from, resume=resume, runs=None if finished else runs)
        with _explained(task, how), torch.inference_mode(False), torch.enable_grad(), callers_autocast_off():
            session = prepare(task, settings=settings, resume=resume, workers=workers, how=how)
            if how.shard_bytes is not None:
                check_shards(session, how.shard_bytes)
            if before_writing is not None:
                before_writing()
            state = _begin(session, restart, resume=resume, runs=runs)
            finished = run_epochs(session, state, progress, board)
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


def _settings(
    task: Task,
    how: How,
    init: Path | str | Mapping[str, str] | None,
    restart_from: Path | str | None,
    *,
    resume: bool,
    runs: Path | None,
) -> tuple[dict[str, Any], Restart | None]:
    """What the run's files say of it, and what it restarts from, if it does; refused where these do not fit `out`."""
    settings = run_settings(task.classifier, task.train_set, task.val_set, task.config)
    if current_ranks().writes:
        check_run(task.out, settings, resume=resume)
        if runs is not None:
            check_latest(task.out, runs)
    restart = None if restart_from is None else find_restart(restart_from)
    if restart is not None:
        check_restart(restart, settings)
    settings |= _origin(task, init, restart, resume=resume)
    settings["how"] = asdict(how)
    if restart is not None:
        settings["restarted"] = restart_origin(restart)
    return settings, restart


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
        save(session, state)
    else:  # a full disk or a kill may have come between state and shards
        save_shards(session, state)
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
