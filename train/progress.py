"""What a run shows while it trains: a bar on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich import progress as rich_progress

from tetdeploy.system.standard_output import StandardOutput

from .config import TrainConfig

INTERVAL = 0.5  # seconds between two looks at the losses: each makes a GPU wait
RECENT = 5  # epochs whose pace gives the remaining time; not the first, which also compiles, once there is another


class Progress:
    """Bar, lines or silence; a context manager round the whole run.

    Args:
        config: the epochs and each one's T are shown.
        steps_per_epoch: for the bar and the remaining time.
        steps_done: where a resumed run goes on.
        show: True for a bar, False for silence, None for a bar on a terminal and lines elsewhere.
    """

    def __init__(self, config: TrainConfig, *, steps_per_epoch: int, steps_done: int, show: bool | None) -> None:
        self.console = StandardOutput(quiet=show is False, force_terminal=True if show else None)
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._last = time.perf_counter()
        self._began = (self._last, self._work(steps_done))
        self._recent = deque([self._began], maxlen=RECENT + 1)  # when what was done
        self._val = ""
        self._bar: rich_progress.Progress | None = None
        if self.console.is_terminal and not self.console.quiet:
            columns = ("{task.description}", rich_progress.BarColumn(24), "{task.fields[status]}")
            self._bar = rich_progress.Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=steps_per_epoch, status="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line of its own."""
        self.console.print(line)

    def due(self) -> bool:
        """Whether it is time for another look; at most once an INTERVAL."""
        now = time.perf_counter()
        if now - self._last < INTERVAL:
            return False
        self._last = now
        return True

    def step(self, *, epoch: int, step: int, loss: float, accuracy: float, images_per_s: float) -> None:
        """Show where the running epoch stands.

        Args:
            epoch: its number, from 1.
            step: its finished steps.
            loss: their mean.
            accuracy: of the training images so far, a fraction.
            images_per_s: training speed.
        """
        if self._bar is not None:
            text = self._status(loss, accuracy, images_per_s, (epoch - 1) * self._steps_per_epoch + step)
            self._bar.update(self._task, description=self._head(epoch), completed=step, status=text)

    def epoch(self, record: dict[str, Any]) -> None:
        """Show a finished epoch, given its line of metrics.jsonl."""
        if record["val_accuracy"] is not None:
            self._val = f"  val {record['val_accuracy']:.1%}"
        loss, accuracy, speed = record["train_loss"], record["train_accuracy"], record["images_per_s"]
        self.step(epoch=record["epoch"], step=self._steps_per_epoch, loss=loss, accuracy=accuracy, images_per_s=speed)
        if self._bar is None:
            text = self._status(loss, accuracy, speed, record["epoch"] * self._steps_per_epoch)
            self.say(f"{self._head(record['epoch'])}  {text}")
        self._recent.append((time.perf_counter(), self._work(record["epoch"] * self._steps_per_epoch)))

    def _head(self, epoch: int) -> str:
        T = self._config.random_T or self._config.stage(epoch - 1).T
        return f"epoch {epoch}/{self._config.epochs}  T={T}"

    def _work(self, steps: int) -> int:
        """Time steps until a training step: in a later stage, with a larger T, each takes longer."""
        per_epoch, stages = self._steps_per_epoch, self._config.stages
        done = (min(max(steps - s.first_epoch * per_epoch, 0), s.epochs * per_epoch) for s in stages)
        return sum(stage.T * count for stage, count in zip(stages, done, strict=True))

    def _status(self, loss: float, accuracy: float, images_per_s: float, steps_done: int) -> str:
        """The numbers; `steps_done` of the whole run gives the remaining time at the recent epochs' pace."""
        now, end = self._work(steps_done), self._work(self._config.epochs * self._steps_per_epoch)
        past_first = self._recent[0] == self._began and len(self._recent) > 1 and self._recent[1][1] < now
        since, before = self._recent[1 if past_first else 0]
        eta = (time.perf_counter() - since) / max(1, now - before) * (end - now)
        return f"loss {loss:.3f}  train {accuracy:.1%}{self._val}  {images_per_s:,.0f} img/s  eta {_clock(eta)}"


def _clock(seconds: float) -> str:
    """04:10, or 1:04:10 from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
