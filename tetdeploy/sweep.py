"""Accuracy, firing rate, operations, energy and latency of an exported model at each T. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_count
from tetdeploy.batches import parts
from tetdeploy.energy import CONVENTIONS, Operations, layers_of, other_ops, other_ops_pj
from tetdeploy.engine import Engine
from tetdeploy.measured import engine_provenance, images_provenance
from tetdeploy.names import section
from tetdeploy.picojoules import EnergyConstants, energy_constants

NUM_TIMED = 30  # calls for each latency
_MOST_SECONDS = 60  # of timing, after which no round begins but the first three


@dataclass(frozen=True)
class Row:
    """One T of a sweep. Rates and accuracies are fractions; operations and energies are per image.

    Attributes:
        firing_rate: spikes over neuron-steps of the whole network.
        energy_pj, energy_exact_pj, energy_once_pj: the bills of `tetdeploy.energy.CONVENTIONS`: paper, exact, once.
        latency_ms: median time of one image (batch 1) on this machine.
        ann_ratio: the energy of the ANN twin over `energy_pj`; None where that is zero.
    """

    T: int
    accuracy: float
    firing_rate: float
    ac_ops: float
    mac_ops: float
    energy_pj: float
    energy_exact_pj: float
    latency_ms: float
    energy_once_pj: float
    ann_ratio: float | None


@dataclass(frozen=True)
class Sweep:
    """The rows, and what they were measured on.

    Attributes:
        origin: `engine_provenance` of the model and of the measurement, and `images_provenance`.
        details: `Tally.details`: layers, neurons, the ANN twin, other operations, constants, classes.
    """

    model: str
    data: str
    num_samples: int
    rows: tuple[Row, ...]
    origin: dict[str, Any]
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        rows, origin, details = (value.pop(name) for name in ("rows", "origin", "details"))
        return {"kind": "sweep", **value, **origin, "rows": rows, **details}


class Tally:
    """Sums over the images of a data set, by step; `arrays` and `restore` let a long run go on another day.

    Attributes:
        seen, correct: images, and right answers after each number of steps, by class: `[K]`, `[K, T]`.
        fired: spikes by layer of neurons and step, `[layers, T]`.
        operations: of the convolutions and linear layers.

    Args:
        constants: picojoules of an operation; by default those for each layer's precision.

    Raises:
        ValueError: there are none for it.
    """

    def __init__(self, engine: Engine, T: int, constants: EnergyConstants | None = None) -> None:
        num_classes = len(engine.class_names)
        self.T, self.class_names, self.metadata = T, engine.class_names, engine.metadata
        self.neurons = {n["name"]: int(np.prod(n["shape"])) for n in engine.metadata["neurons"]}
        self.constants = constants or energy_constants(engine.precision)
        chunk = engine.T if engine.layout == "unrolled" else None
        self.operations = Operations(layers_of(engine.metadata), constants=constants, chunk=chunk)
        self.seen = np.zeros(num_classes, np.int64)
        self.correct = np.zeros((num_classes, T), np.int64)
        self.fired = np.zeros((len(self.neurons), T))

    def add(self, per_step: NDArray[Any], counts: Mapping[str, NDArray[Any]], labels: NDArray[np.int64]) -> None:
        """Add a batch that ran T steps on the counting graph.

        Raises:
            ValueError: see `check_logits`.
        """
        check_logits(per_step)
        right = running_class(per_step) == labels[:, None]
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
            energy_once_pj=count.energy_once_pj,
            ann_ratio=self.operations.ann()["energy_pj"] / count.energy_pj if count.energy_pj else None,
        )

    def details(self, steps: Sequence[int]) -> dict[str, Any]:
        """What lies behind the rows at every T of `steps`, as JSON: by layer, by layer of neurons, by class; the ANN
        twin; what no row's energy includes; the constants and the conventions."""
        # What is not the layers' computes in float32, whatever they do.
        constants = (self.operations.constants or energy_constants()).of("fp32")
        return {
            "layers": self.operations.by_layer(steps),
            "neurons": [self._neuron_dict(k, name, steps) for k, name in enumerate(self.neurons)],
            "uncounted": list(self.metadata["uncounted"]),
            "ann": self.operations.ann(),
            "other_ops": other_ops(self.metadata),
            "other_ops_pj": other_ops_pj(self.metadata, constants),
            "constants": self.constants.to_dict(),
            "conventions": dict(CONVENTIONS),
            "by_class": [self._class_dict(k, name, steps) for k, name in enumerate(self.class_names)],
        }

    def _neuron_dict(self, k: int, name: str, steps: Sequence[int]) -> dict[str, Any]:
        neurons = self.neurons[name] * self.seen.sum()
        rows = [{"T": t, "firing_rate": float(self.fired[k, :t].sum() / (neurons * t))} for t in steps]
        return {"name": name, "size": self.neurons[name], "rows": rows}

    def _class_dict(self, k: int, name: str, steps: Sequence[int]) -> dict[str, Any]:
        """Accuracies are None for a class without images."""
        seen = int(self.seen[k])
        accuracy = [float(self.correct[k, t - 1] / seen) if seen else None for t in steps]
        return {"name": name, "num_samples": seen, "accuracy": accuracy}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, for `np.savez`."""
        counts = {f"ops.{name}": ops for name, ops in self.operations.counts.items()}
        active = {f"active.{name}": inputs for name, inputs in self.operations.active.items()}
        return {"seen": self.seen, "correct": self.correct, "fired": self.fired} | counts | active

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """The inverse of `arrays`, for the same model and T."""
        copies = {name: array.copy() for name, array in arrays.items()}
        self.seen, self.correct, self.fired = (copies[name] for name in ("seen", "correct", "fired"))
        self.operations.counts, self.operations.active = section(copies, "ops."), section(copies, "active.")
        self.operations.num_images = int(self.seen.sum())


def running_class(per_step: NDArray[Any]) -> NDArray[np.int64]:
    """The predicted class after each number of steps, `[N, T]`: the largest running mean of `per_step [N, T, K]`."""
    classes: NDArray[np.int64] = running_sum(per_step).argmax(-1)
    return classes


def running_sum(per_step: NDArray[Any]) -> NDArray[Any]:
    """The sum after each number of steps, `[N, T, K]`: to the bit that of `np.cumsum`, which takes 4 times as long for
    1,000 classes."""
    sums = per_step.copy()
    for t in range(1, sums.shape[1]):
        sums[:, t] += sums[:, t - 1]
    return sums


def check_logits(per_step: NDArray[Any]) -> None:
    """Refuse to count logits that are no answer. A run of the engine lets them pass as long as other images of the
    call, which may be those of a server's other clients, have answers.

    Args:
        per_step: `[N, T, K]`.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    broken = ~np.isfinite(per_step).all(-1)
    if broken.any():
        images, first = broken.any(1).sum(), broken.any(0).argmax() + 1
        raise ValueError(
            f"{images} of {len(broken)} images run together have NaN or infinite logits, the first at step {first}: no "
            "answer that could be right or wrong; the input is far out of range, or the file damaged, then export the "
            "model again"
        )


def sweep(
    engine: Engine,
    x: NDArray[Any],
    labels: NDArray[np.int64],
    steps: Iterable[int],
    *,
    data: str = "",
    batch_size: int = 64,
    num_timed: int = NUM_TIMED,
    constants: EnergyConstants | None = None,
    tick: Callable[[int], None] | None = None,
    timing: Callable[[int], None] | None = None,
) -> Sweep:
    """Measure a model at every T of `steps`.

    Accuracy, firing rate and operations at all T come from one run at the largest: LIF neurons are causal, so the
    answer after t steps is the mean of the first t per-step logits. Latency comes from runs at that very T, on the
    graph that serves, one image at a time; an unrolled graph always runs all of its steps, at the same cost.

    Args:
        x: images `[N, C, H, W]`, or frames `[N, T, C, H, W]` of which the first T are used.
        labels: `[N]`.
        data: the name that the result carries.
        num_timed: timed calls for each latency; fewer, but at least 3, once the timing has taken a minute.
        constants: picojoules of an operation; by default those for the model's precision.
        tick: called with the number of images done.
        timing: called with the number of timed rounds newly done, of `num_timed` + 2; with 0 as the timing begins.

    Raises:
        ValueError: labels do not fit the images or the model's classes, there is no T, or there are no energies for the
            model's precision; see also `check_logits` and `Engine.run`.
    """
    if num_timed < 1:
        raise ValueError(f"num_timed must be at least 1, got {num_timed}")
    steps = [check_count("T", t) for t in steps]
    if not steps:
        raise ValueError("steps holds no T; give at least one")
    T = max(steps)
    check_images(engine, x, labels, T)
    tally = Tally(engine, T, constants)
    for part in parts(len(x), batch_size, tick):
        result, counts = engine.count(x[part], T)
        tally.add(result.per_step, counts, labels[part])
    return summarise(engine, tally, x, labels, steps, data=data, num_timed=num_timed, timing=timing)


def summarise(
    engine: Engine,
    tally: Tally,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    steps: Sequence[int],
    *,
    data: str = "",
    num_timed: int = NUM_TIMED,
    timing: Callable[[int], None] | None = None,
) -> Sweep:
    """The sweep that the sums over all of `x` make, with latencies measured now. Args: see `sweep`."""
    latency = measure_latency(engine, x, steps, num_timed, timing)
    rows = tuple(tally.row(t, latency[t]) for t in steps)
    origin = engine_provenance(engine) | images_provenance(engine, data, x, labels)
    return Sweep(str(engine.path), data, len(x), rows, origin, tally.details(steps))


def measure_latency(
    engine: Engine,
    x: NDArray[Any],
    steps: Sequence[int],
    num_timed: int,
    timing: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Median milliseconds for one image by T, after two rounds to warm up."""
    timed = [max(steps)] if engine.is_fixed else steps
    medians = median_ms(engine.run, x, timed, repeats=num_timed, warm_up=2, tick=timing)
    return {t: medians[max(steps)] if engine.is_fixed else medians[t] for t in steps}


def median_ms(
    run: Callable[[NDArray[Any], int], Any],
    x: NDArray[Any],
    steps: Sequence[int],
    *,
    repeats: int,
    warm_up: int,
    tick: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Median milliseconds of `run(image, T)` by T. The T take turns, so that a slow moment of the machine hits them
    all.

    Args:
        x: images, of which each round takes the next, `[1, ...]`.
        repeats, warm_up: rounds that count, of slow runs fewer, and those before them that do not.
        tick: called with 0, and with 1 after each round.
    """
    tick = tick or (lambda _: None)
    tick(0)
    seconds: dict[int, list[float]] = {t: [] for t in steps}
    began = time.perf_counter()
    for repeat in range(-warm_up, repeats):
        if repeat >= 3 and time.perf_counter() - began > _MOST_SECONDS:
            break
        image = x[repeat % len(x)][None]
        for t in steps:
            start = time.perf_counter()
            run(image, t)
            if repeat >= 0:
                seconds[t].append(time.perf_counter() - start)
        tick(1)
    return {t: float(np.median(values)) * 1e3 for t, values in seconds.items()}


def check_images(engine: Engine, x: NDArray[Any], labels: NDArray[np.int64], T: int) -> None:
    """Refuse with ValueError, before a long run, labels that do not fit the images or the model's classes, and images
    of which it cannot run T steps; see also `Engine.run`."""
    check_class_numbers(labels, len(x), len(engine.class_names), engine.path.name)
    engine.check_T(T, engine.check_input(x[:1]))


def check_class_numbers(labels: Any, num_images: int, num_classes: int, model: str) -> None:
    """Refuse, with ValueError, labels that do not give each image the number of a class; `model` is what the error
    calls the model."""
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"labels must be a NumPy array of whole numbers [N], one an image, got {got}")
    if num_images == 0 or num_images != len(labels):
        raise ValueError(f"every image needs a label: {num_images} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but {model} has {num_classes} classes; "
            "is this the data it was trained on?"
        )
