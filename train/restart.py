"""Going on elsewhere from weights alone (`--restart-from`), and the shards they are carried in (`--shards-mb`).

`--resume` needs the whole state of a run. What is carried here is that state without the optimizer's moments: the last
weights with BN's statistics as training left them (not those of the best epoch), their moving average if there is one,
where in which epoch they are from, the settings, how the run ran (`config.How`), and the metrics so far. The
restarted run goes on at that step of the schedule, with the images that step would have had, and with fresh moments.

It chooses its best epoch among its own: the best weights of the earlier part are not carried.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tetdeploy.checkpoint import check_keys, read_checkpoint, read_metadata, refuse_one_shard
from tetdeploy.names import section
from tetdeploy.storage.metrics import metrics_line, read_metrics, write_metrics
from tetdeploy.storage.run_folder import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    SHARDS_NAME,
    checkpoint_file,
    newest_shards,
)
from tetdeploy.storage.shards import check_limit, is_complete, read_shards, write_shards
from tetdeploy.storage.tensor_file import FORMAT

from .optimizer import trainable
from .runs import read_run_config, run_differences
from .session import Session, provenance
from .state import TrainState, like_weights

# What a machine decides: where devices are, and what they are good at.
_OF_THE_MACHINE = ("device", "precision")

_LONGEST = 9_999_999.999  # seconds of an epoch


@dataclass(frozen=True)
class Restart:
    """Weights to go on from.

    Attributes:
        path: a folder of shards, or a checkpoint.
        settings: of the run they are from, as `runs.run_settings` gives them, and "provenance".
        epoch: finished epochs, and so the index of the epoch to go on with.
        step: its finished steps; 0 for a checkpoint, which is of an epoch's end.
        seconds: spent on these steps; 0 of shards of an earlier version, which do not say it.
        how: how that run ran, as `config.How` says it; empty if not known.
    """

    path: Path
    settings: dict[str, Any]
    epoch: int
    step: int
    seconds: float
    how: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Named as in the run's state: `network.*`, and of shards `average.*` and `epoch.*`.

        Raises:
            ValueError: they are damaged; what was found is gone, or the checkpoint is another one.
        """
        with suppress(FileNotFoundError):
            if self.path.is_dir():
                return read_shards(self.path)
            checkpoint = read_checkpoint(self.path)
            if checkpoint.metadata["provenance"] == self.settings["provenance"]:
                return {f"network.{name}": tensor for name, tensor in checkpoint.tensors.items()}
        raise ValueError(
            f"{self.path} was replaced while it was read (its run goes on): start again, best when that has ended"
        )


def find_restart(path: Path | str) -> Restart:
    """What to go on from: a folder of shards, a checkpoint, or a run: the later of its shards and its checkpoint.

    Raises:
        FileNotFoundError: there is no such path, or nothing of the kind in it.
        ValueError: it is damaged, no checkpoint, or of a run in 8 bits.
    """
    path = Path(path)
    shards = newest_shards(path) or newest_shards(path / SHARDS_NAME)
    if shards is None:
        return _read(checkpoint_file(path))
    found = [shards]
    if (checkpoint := path / CHECKPOINT_NAME).is_file():  # of a run that went on without shards
        found.append(checkpoint)
    return max(map(_read, found), key=lambda restart: restart.epoch)  # shards where that is the same: steps may follow


def _read(path: Path) -> Restart:
    content = read_metadata(path)
    refuse_one_shard(path, content)
    if "int8" in content or content["training"].get("qat"):
        raise ValueError(f"{path} was fine-tuned in 8 bits (--qat); start that again with --init")
    position = content.get("restart") or {"epoch": content["provenance"].get("epoch"), "step": 0}
    if not isinstance(position["epoch"], int):
        raise ValueError(f"{path} does not say which epoch it is of; use it with --init")
    epoch, step, seconds = position["epoch"], position["step"], position.get("seconds", 0.0)
    return Restart(path, content, epoch, step, seconds, content.get("how") or _how_beside(path))


def _how_beside(checkpoint: Path) -> dict[str, Any]:
    """Of a checkpoint: from the config.json of its run, if that came along."""
    beside = not checkpoint.is_dir() and (checkpoint.parent / CONFIG_NAME).is_file()
    how: dict[str, Any] = read_run_config(checkpoint.parent).get("how", {}) if beside else {}
    return how


def check_restart(restart: Restart, settings: Mapping[str, Any]) -> None:
    """Refuse to go on under other settings than those of the device, or with a run that is finished.

    Raises:
        ValueError: each difference is named.
    """
    old, new = (_compared(of) for of in (restart.settings, settings))
    new["data"] = {name: value for name, value in new["data"].items() if name in old["data"]}  # fewer in a checkpoint
    if different := run_differences(old, new):
        raise ValueError(
            f"{restart.path} is of a run with other settings: {'; '.join(different)}; "
            "go on with the old ones, or start a new run from these weights with --init"
        )
    if restart.epoch >= new["training"]["epochs"]:
        raise ValueError(
            f"{restart.path} is of the last of {restart.epoch} epochs: nothing is left to train; "
            "start a new run from it with --init"
        )


def _compared(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings without those that a machine decides."""
    sections = {name: dict(settings[name]) for name in ("network", "data", "training")}
    for name in _OF_THE_MACHINE:
        sections["training"].pop(name, None)
    return sections


def restart_state(restart: Restart, session: Session) -> TrainState:
    """Put the weights into the network, write the earlier metrics into the new run, and say where it stands.

    Raises:
        ValueError: the weights are damaged or do not fit the network.
        OSError: the metrics cannot be written.
    """
    tensors, network = restart.tensors(), session.classifier.network
    weights = section(tensors, "network.")
    check_keys(weights, network.state_dict(), restart.path)
    network.load_state_dict(weights)
    average = {}
    if session.config.ema:  # a checkpoint's weights are averages already
        average = like_weights(section(tensors, "average.") or trainable(network), network)
    state = TrainState.start(session.steps_per_epoch, session.device, average)
    state.epoch, state.step, state.seconds = restart.epoch, restart.step, restart.seconds
    if restart.step:
        state.losses.copy_(tensors["epoch.losses"])
        state.correct.copy_(tensors["epoch.correct"])
    folder = restart.path if restart.path.is_dir() else restart.path.parent
    if session.ranks.writes:  # even if there are none: a beginning that was killed may have left those of another run
        write_metrics(session.out, map(metrics_line, read_metrics(folder, epochs=restart.epoch)))
    return state


def remove_shards(session: Session) -> None:
    """Those of a beginning that was killed, which the new run would take for its own first ones."""
    shutil.rmtree(session.out / SHARDS_NAME, ignore_errors=True)


def restart_origin(restart: Restart) -> dict[str, Any]:
    """What the new run's config.json says of its beginning."""
    return {"epoch": restart.epoch, "step": restart.step, "provenance": restart.settings["provenance"]}


def check_shards(session: Session, limit: int) -> None:
    """Whether the weights fit shards of at most `limit` bytes, before anything is written.

    Raises:
        ValueError: a tensor is larger than that.
    """
    state = TrainState.start(session.steps_per_epoch, session.device, {})  # averages are as large as their weights
    last = _content(session, session.config.epochs, session.steps_per_epoch, _LONGEST)  # with the most digits
    check_limit(state.weights(session.classifier.network), last, limit=limit)


def has_shards(out: Path, epochs: int, limit: int) -> bool:
    """Whether the shards of the end of so many epochs are there, all of them, in files of at most `limit` bytes."""
    return is_complete(_folder(out, epochs, 0), limit)


def write_restart(session: Session, state: TrainState, limit: int) -> None:
    """Write `out/shards/epoch-00012-step-000000`, in files of at most `limit` bytes; then remove what lay beside it.

    Shards of the same step that are no larger are left as they are: a state that is saved twice is the same.

    Raises:
        ValueError: a tensor is larger than that.
        OSError: it cannot be written.
    """
    folder, metrics = _folder(session.out, state.epoch, state.step), session.out / METRICS_NAME
    if is_complete(folder, limit):
        return
    shutil.rmtree(folder, ignore_errors=True)
    content = _content(session, state.epoch, state.step, state.seconds)
    beside = [metrics] if metrics.is_file() else []
    write_shards(folder, state.weights(session.classifier.network), content, limit=limit, beside=beside)
    for pattern in ("epoch-*", ".epoch-*.tmp"):  # the latter of writes that were killed
        for other in folder.parent.glob(pattern):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _folder(out: Path, epoch: int, step: int) -> Path:
    return out / SHARDS_NAME / f"epoch-{epoch:05d}-step-{step:06d}"


def _content(session: Session, epoch: int, step: int, seconds: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **{name: session.settings[name] for name in ("network", "data", "training", "how")},
        "provenance": provenance(session, epoch, None),
        "restart": {"epoch": epoch, "step": step, "seconds": round(seconds, 3)},
    }
