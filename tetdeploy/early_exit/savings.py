"""What early exit keeps and saves against T steps for every image, measured. Needs no torch.

Every batch runs three times: on the counting graph, which gives the operations of each image and step, and then, timed,
with all T steps and with early exit, which take turns in being first. An image's energy is that of the steps it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_count
from tetdeploy.batches import parts
from tetdeploy.bench import machine
from tetdeploy.early_exit import Exit
from tetdeploy.early_exit.threshold import Paired
from tetdeploy.energy import Operations
from tetdeploy.engine import Engine, Result
from tetdeploy.measured import engine_provenance, images_provenance
from tetdeploy.sweep import Tally, check_images
from tetdeploy.system.machine import load_average

Array = NDArray[Any]


class Savings:
    """Sums over the images of a test set.

    Args:
        exit: the rule.
        T: the most steps.

    Attributes:
        seconds: of all calls, by `fixed` and `early`.
    """

    def __init__(self, engine: Engine, exit: Exit, T: int) -> None:
        self.engine, self.exit, self.T = engine, exit, T
        self.tally = Tally(engine, T)
        self.seconds = {"fixed": 0.0, "early": 0.0}
        self._load = load_average()
        self._steps: list[NDArray[np.int64]] = []
        self._right: list[NDArray[np.bool_]] = []  # [2, N]: after T steps, and by early exit
        self._operations = {t: Operations(self.tally.operations.layers) for t in range(1, T + 1)}

    def add(self, x: Array, labels: NDArray[np.int64]) -> None:
        """Run a batch."""
        results = self._timed(x)
        _, counts = self.engine.count(x, self.T)
        self.tally.add(results["fixed"].per_step, counts, labels)
        steps = results["early"].steps
        for t in np.unique(steps):
            active = {name: value[:t, steps == t] for name, value in counts.items()}
            self._operations[int(t)].add(active, int((steps == t).sum()), int(t))
        self._steps.append(steps)
        self._right.append(np.stack([results[way].logits.argmax(-1) == labels for way in ("fixed", "early")]))

    def _timed(self, x: Array) -> dict[str, Result]:
        """Both ways, of which the first batch, run once more before, warms up."""
        ways = {"fixed": None, "early": self.exit}
        order = list(ways) if len(self._steps) % 2 else list(ways)[::-1]
        if not self._steps:
            for way in order:
                self.engine.run(x, self.T, exit=ways[way])
        results = {}
        for way in order:
            start = time.perf_counter()
            results[way] = self.engine.run(x, self.T, exit=ways[way])
            self.seconds[way] += time.perf_counter() - start
        return results

    def to_dict(self, data: str, batch_size: int) -> dict[str, Any]:
        """The result as JSON; `data`: what the images were."""
        rows = [asdict(self.tally.row(t, 0.0)) for t in range(1, self.T + 1)]
        for row in rows:
            del row["latency_ms"]  # not measured here
        return {
            "kind": "early-exit",
            "model": str(self.engine.path),
            "data": data,
            "num_samples": sum(map(len, self._steps)),
            "rows": rows,
            "early_exit": self._early() | {"batch_size": batch_size, "load": self._load},
            "machine": machine(self.engine),
            "ann": self.tally.operations.ann(),
            "constants": self.tally.constants.to_dict(),
        } | engine_provenance(self.engine)

    def _early(self) -> dict[str, Any]:
        """The rule, what it keeps and what it saves."""
        fixed, early = np.concatenate(self._right, axis=1)
        steps = np.concatenate(self._steps)
        paired = Paired(len(steps), int((fixed & ~early).sum()), int((~fixed & early).sum()))
        by_steps = [self._of(t, early[steps == t]) for t in range(1, self.T + 1)]
        fixed_cost = self.tally.operations.at(self.T).to_dict()
        return {
            **asdict(self.exit),
            "T": self.T,
            "accuracy": float(early.mean()),
            "fixed_accuracy": float(fixed.mean()),
            **paired.to_dict(),
            "mean_T": float(steps.mean()),
            "by_steps": by_steps,
            "cost": {key: _mean(by_steps, key) for key in fixed_cost},
            "fixed_cost": fixed_cost,
            "seconds": self.seconds["early"],
            "fixed_seconds": self.seconds["fixed"],
            "speedup": self.seconds["fixed"] / self.seconds["early"],
        }

    def _of(self, t: int, right: NDArray[np.bool_]) -> dict[str, Any]:
        """The images that took t steps; operations and energies are per image."""
        found = {"T": t, "num_images": len(right), "accuracy": float(right.mean()) if len(right) else None}
        return found | (self._operations[t].at(t).to_dict() if len(right) else {})


def _mean(by_steps: list[dict[str, Any]], key: str) -> float:
    """The mean over all images of what is given by their number of steps."""
    some = [entry for entry in by_steps if entry["num_images"]]
    total = sum(entry["num_images"] * entry[key] for entry in some)
    return float(total / sum(entry["num_images"] for entry in some))


def measure(
    engine: Engine,
    x: Array,
    labels: NDArray[np.int64],
    exit: Exit,
    T: int,
    *,
    data: str = "",
    batch_size: int = 64,
    tick: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure early exit against T steps on labelled images.

    Args:
        x: images `[N, C, H, W]`, or frames `[N, T, C, H, W]`.
        labels: `[N]`.
        exit: the rule.
        data: the name that the result carries.
        tick: called with the number of images done.

    Returns:
        JSON: `rows`, a fixed T each; `early_exit`, the rule with its accuracy, steps, operations, energy and time.

    Raises:
        ValueError: labels do not fit the images or the model's classes; the layout is not step; `batch_size` is no
            whole number, or below 1; see also `Engine.run`.
    """
    check_images(engine, x, labels, T)
    T, batch_size = check_count("T", T), check_count("batch_size", batch_size)
    savings = Savings(engine, exit, T)
    for part in parts(len(x), batch_size, tick):
        savings.add(x[part], labels[part])
    return savings.to_dict(data, batch_size) | images_provenance(engine, data, x, labels)
