"""Accuracy, firing rate, operations, energy and latency of an exported model at each T. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.energy import Layer, Operations
from tetdeploy.engine import Engine

MAX_T = 1024


@dataclass(frozen=True)
class Row:
    """One T of a sweep. Rates and accuracies are fractions; operations and energies are per image.

    Attributes:
        firing_rate: spikes over neuron-steps of the whole network.
        energy_pj, energy_exact_pj: the two bills of `tetdeploy.energy`.
        latency_ms: median time of one image (batch 1) on this machine.
    """

    T: int
    accuracy: float
    firing_rate: float
    ac_ops: float
    mac_ops: float
    energy_pj: float
    energy_exact_pj: float
    latency_ms: float


@dataclass(frozen=True)
class Sweep:
    """The rows, and what they were measured on."""

    model: str
    data: str
    num_samples: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_steps(text: str) -> tuple[int, ...]:
    """Numbers of steps as they are typed: `6`, `1:6` (both ends), `1,2,4`, or a mix.

    Raises:
        ValueError: it does not parse, or a T is outside 1..1024.
    """
    try:
        ends = [
            (int(first), int(last if colon else first))
            for first, colon, last in (p.partition(":") for p in text.split(","))
        ]
    except ValueError:
        raise ValueError(f"T must be like 6, 1:6 or 1,2,4; got {text!r}") from None
    if any(not 1 <= first <= last <= MAX_T for first, last in ends):
        raise ValueError(f"T must lie in 1..{MAX_T}, from low to high; got {text!r}")
    return tuple(sorted({t for first, last in ends for t in range(first, last + 1)}))


class Tally:
    """Sums over the images of a data set, by step; `arrays` and `restore` let a long run go on another day.

    Attributes:
        seen, correct: images, and right answers after each number of steps, by class: `[K]`, `[K, T]`.
        fired: spikes by layer of neurons and step, `[layers, T]`.
        operations: of the convolutions and linear layers.
    """

    def __init__(self, engine: Engine, T: int) -> None:
        num_classes = len(engine.class_names)
        self.T = T
        self.neurons = {n["name"]: int(np.prod(n["shape"])) for n in engine.metadata["neurons"]}
        self.operations = Operations(tuple(Layer.from_dict(layer) for layer in engine.metadata["layers"]))
        self.seen = np.zeros(num_classes, np.int64)
        self.correct = np.zeros((num_classes, T), np.int64)
        self.fired = np.zeros((len(self.neurons), T))

    def add(self, per_step: NDArray[Any], counts: Mapping[str, NDArray[Any]], labels: NDArray[np.int64]) -> None:
        """Add a batch that ran T steps on the counting graph."""
        right = np.cumsum(per_step, axis=1).argmax(-1) == labels[:, None]
        np.add.at(self.correct, labels, right)
        np.add.at(self.seen, labels, 1)
        self.fired += [counts[f"fired.{name}"].astype(np.float64).sum(1) for name in self.neurons]
        self.operations.add(counts, len(labels), self.T)

    def row(self, t: int, latency_ms: float) -> Row:
        """What holds after `t` steps."""
        num_samples = self.seen.sum()
        count = self.operations.at(t)
        return Row(
            T=t,
            accuracy=float(self.correct[:, t - 1].sum() / num_samples),
            firing_rate=float(self.fired[:, :t].sum() / (sum(self.neurons.values()) * num_samples * t)),
            ac_ops=count.ac_ops,
            mac_ops=count.mac_ops,
            energy_pj=count.energy_pj,
            energy_exact_pj=count.energy_exact_pj,
            latency_ms=latency_ms,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, for `np.savez`."""
        counts = {f"ops.{name}": ops for name, ops in self.operations.counts.items()}
        return {"seen": self.seen, "correct": self.correct, "fired": self.fired} | counts

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `arrays`, for the same model and T."""
        self.seen, self.correct, self.fired = (arrays[name].copy() for name in ("seen", "correct", "fired"))
        self.operations.counts = {name[4:]: arrays[name].copy() for name in arrays if name.startswith("ops.")}
        self.operations.num_images = int(self.seen.sum())


def sweep(
    engine: Engine,
    x: NDArray[Any],
    labels: NDArray[np.int64],
    steps: Sequence[int],
    *,
    data: str = "",
    batch_size: int = 64,
    num_timed: int = 30,
    tick: Callable[[int], None] | None = None,
) -> Sweep:
    """Measure a model at every T of `steps`.

    Accuracy, firing rate and operations at all T come from one run at the largest: LIF neurons are causal, so the
    answer after t steps is the mean of the first t per-step logits. Latency comes from runs at that very T, on the
    graph that serves, one image at a time; an unrolled graph always runs all of its steps, at the same cost.

    Args:
        x: images `[N, C, H, W]`, or frames `[N, T, C, H, W]` of which the first T are used.
        labels: `[N]`.
        data: the name that the result carries.
        num_timed: timed calls for each latency.
        tick: called with the number of images done.

    Raises:
        ValueError: labels do not fit the images or the model's classes; see also `Engine.run`.
    """
    _check_labels(engine, x, labels)
    if num_timed < 1 or batch_size < 1:
        raise ValueError(f"batch_size and num_timed must be at least 1, got {batch_size} and {num_timed}")
    T = max(steps)
    engine.check_T(T, engine.check_input(x[:1]))
    tally = Tally(engine, T)
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        result, counts = engine.count(batch, T)
        tally.add(result.per_step, counts, labels[start : start + batch_size])
        if tick:
            tick(len(batch))
    latency = measure_latency(engine, x, steps, num_timed)
    return Sweep(str(engine.path), data, len(x), tuple(tally.row(t, latency[t]) for t in steps))


def measure_latency(engine: Engine, x: NDArray[Any], steps: Sequence[int], num_timed: int) -> dict[int, float]:
    """Median milliseconds for one image by T. The T take turns, so that a slow moment of the machine hits them all."""
    fixed = engine.layout == "unrolled" and not engine.with_state
    timed_steps = [max(steps)] if fixed else list(steps)
    seconds: dict[int, list[float]] = {t: [] for t in timed_steps}
    for repeat in range(-2, num_timed):  # two rounds to warm up
        image = x[repeat % len(x)][None]
        for t in timed_steps:
            start = time.perf_counter()
            engine.run(image, t)
            if repeat >= 0:
                seconds[t].append(time.perf_counter() - start)
    medians = {t: float(np.median(values)) * 1e3 for t, values in seconds.items()}
    return {t: medians[max(steps)] if fixed else medians[t] for t in steps}


def _check_labels(engine: Engine, x: NDArray[Any], labels: NDArray[np.int64]) -> None:
    if len(x) == 0 or len(x) != len(labels):
        raise ValueError(f"every image needs a label: {len(x)} images, {len(labels)} labels")
    num_classes = len(engine.class_names)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but {engine.path.name} has {num_classes} classes; "
            "is this the data it was trained on?"
        )
