"""Whether an export computes what PyTorch computes, on the images of its check.

Spikes are discontinuous: one unit in the last place of a current flips a spike whose h is near v_th. Parity is
therefore a rate, the neuron-steps that differ over all neuron-steps, with the top-1 agreement and the logit error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tetdeploy.batches import images_with_spikes, parts
from tetdeploy.engine import Engine
from tetdeploy.engine_stream import Stream
from tetdeploy.networks import Classifier
from tetdeploy.traced_network import Runnable, TracedNetwork

from .causality import InFloat64
from .comparison import Comparison
from .counters import spikes_overlay
from .margins import membranes
from .progress import Progress, ticker
from .recorder import compare_torch, run_torch
from .reference import NUM_REFERENCE, Answers

MAX_MISMATCH = 100e-6
MIN_AGREEMENT = 0.999
MAX_LOGIT_ERROR = 1e-4  # of the largest logit, layer by layer
AMPLIFICATION = 4.0  # of PyTorch's own rounding: the engine rounds as often, and independently
_BATCH = 25
_NUM_LOCAL, _NUM_ROUNDING, _NUM_MOVED = 100, 20, 3
_PART_OF_ROUNDING = 5  # images whose spikes are all in memory


class ParityError(ValueError):
    """The exported graph does not compute what PyTorch computes."""


@dataclass(frozen=True)
class Parity:
    """How far the engine is from PyTorch on the same images.

    Attributes:
        T: steps compared; by causality this covers every smaller T.
        top1_agreement: images whose predicted class is the same, or tied, a fraction, after all T steps.
        top1_agreement_by_step: the same after 1..T steps.
        spike_mismatch_rate: differing neuron-steps over all neuron-steps.
        local_mismatch_rate: the same where every layer of PyTorch reads the engine's spikes, on some 100 images; that
            of the worst layer, as one wrong layer is little of a whole network. (One or two spikes make no rate.)
        max_abs_logit_error: the largest difference of a per-step logit.
        local_logit_error: the same layer by layer, as a fraction of the largest logit.
        amplified: measured only where the gate would fail without it, on up to 20 of the images that differ most: how
            many of their neuron-steps differ between engine and PyTorch, and between PyTorch and itself, in float64 and
            with every weight moved by up to one unit in the last place (the largest of four such comparisons, or of
            those up to the first that shows that all is rounding).
        at_threshold: measured only where `amplified` does not show that all is rounding, on the same images: every
            neuron that fires on one side alone, both reading and reset by the engine's spikes, is nearer to its
            threshold than PyTorch, rounding otherwise, moves membranes near it in its layer, times AMPLIFICATION. So
            rounding began all differences, though few neurons are so near.
        silent: layers of which no neuron fired in the graph: what stands behind them was compared at 0 only.
    """

    num_images: int
    T: int
    top1_agreement: float
    top1_agreement_by_step: tuple[float, ...]
    spike_mismatch_rate: float
    local_mismatch_rate: float
    max_abs_logit_error: float
    local_logit_error: float
    amplified: tuple[float, float] | None = None
    at_threshold: bool = False
    silent: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """More neuron-steps differ, or fewer images agree, than in an export whose network does not amplify."""
        return self.spike_mismatch_rate > MAX_MISMATCH or self.top1_agreement < MIN_AGREEMENT

    @property
    def is_rounding(self) -> bool:
        """PyTorch differs from itself by as much, or all differences begin within its rounding of the threshold: the
        network amplifies rounding, and the export is right."""
        as_itself = self.amplified is not None and 0 < self.amplified[0] <= AMPLIFICATION * self.amplified[1]
        return as_itself or self.at_threshold

    @property
    def is_local(self) -> bool:
        """Each layer by itself computes what PyTorch's does."""
        return self.local_mismatch_rate <= MAX_MISMATCH and self.local_logit_error <= MAX_LOGIT_ERROR

    def check(self, what: str) -> None:
        """The gate: at most 100 in a million neuron-steps differ locally; and over the whole network as well, with
        99.9 % of the classes the same, unless the network amplifies rounding.

        Raises:
            ParityError: it does not hold.
        """
        if self.is_local and (not self.differs or self.is_rounding):
            return
        raise ParityError(
            f"{what} does not compute what PyTorch computes: {self.spike_mismatch_rate * 1e6:,.0f} of a million "
            f"neuron-steps differ (at most {MAX_MISMATCH * 1e6:.0f}), {self.local_mismatch_rate * 1e6:,.0f} in the "
            f"worst layer by itself, top-1 agreement {self.top1_agreement:.2%} (at least {MIN_AGREEMENT:.1%}) on "
            f"{self.num_images} images at T={self.T}, largest logit error {self.max_abs_logit_error:.1e}, layer by "
            f"layer {self.local_logit_error:.1e} of the largest logit (at most {MAX_LOGIT_ERROR:.0e})"
            + ("" if self.amplified is None else f"; PyTorch rounded otherwise: {self.amplified[1] * 1e6:,.0f}")
            + "; nothing was written"
        )


def compare(
    classifier: Runnable,
    engine: Engine,
    x: NDArray[Any],
    T: int,
    *,
    from_random_state: bool = False,
    answers: Answers | None = None,
    progress: Progress | None = None,
    what: str = "comparing with PyTorch",
) -> Parity:
    """Run `x` through PyTorch and the engine and compare every spike and logit.

    Args:
        from_random_state: start both from the same random membranes in [0, v_th) instead of zero (T must then be what
            one call of the graph runs).
        answers: is given PyTorch's for the first images, as many as a reference has.
        progress: called with (what, done, all), done from 0 on, of the images and, where it has to be measured, of
            PyTorch's own rounding.
        what: the comparison is called in this.
    """
    neurons = engine.metadata["neurons"]
    names = [neuron["name"] for neuron in neurons]
    sums = Comparison(classifier, engine, T)
    by_image: list[NDArray[np.int64]] = []
    fired = np.zeros(len(names), np.bool_)
    for part in parts(len(x), min(_BATCH, images_with_spikes(neurons, T)), ticker(progress, what, len(x))):
        state = _membranes(neurons, range(len(x))[part]) if from_random_state else None
        taken = answers if answers is not None and answers.num_images < NUM_REFERENCE else None
        differing, firing = _compare_batch(sums, engine, x[part], state, taken, local=part.start < _NUM_LOCAL)
        by_image.append(differing)
        fired |= firing
    silent = tuple(name for name, once in zip(names, fired, strict=True) if not once)
    parity = replace(_parity(sums, T), silent=silent)
    # One step from random membranes may leave two classes near a tie: there the gate does not look at classes.
    if not (replace(parity, top1_agreement=1.0) if from_random_state else parity).differs:
        return parity
    images = np.concatenate(by_image)
    worst_images = np.argsort(-images, kind="stable")[:_NUM_ROUNDING]
    worst, state = x[worst_images], _membranes(neurons, worst_images) if from_random_state else None
    there = float(images[worst_images].mean() / (sums.whole.sizes.sum() * T))
    enough, others = there / AMPLIFICATION or math.inf, RoundedOtherwise(classifier)
    tick = ticker(progress, f"{what}: rounding", len(worst) * (1 + len(others)))
    parity = replace(parity, amplified=(there, _rounding(classifier, worst, T, state, enough, others, tick)))
    if parity.is_rounding or not parity.is_local:
        return parity
    tick = ticker(progress, f"{what}: membranes", len(worst))
    return replace(parity, at_threshold=_is_at_threshold(classifier, engine, worst, T, state, others, tick))


def _membranes(neurons: Sequence[Mapping[str, Any]], images: Iterable[int]) -> list[NDArray[Any]]:
    """Random membranes in [0, v_th) of each layer, `[N, *shape]`; those of an image are always the same."""
    generators = [np.random.default_rng(int(image)) for image in images]
    return [
        np.stack([generator.random(layer["shape"], np.float32) for generator in generators]) * np.float32(layer["v_th"])
        for layer in neurons
    ]


def _compare_batch(
    sums: Comparison,
    engine: Engine,
    x: NDArray[Any],
    state: Sequence[NDArray[Any]] | None,
    answers: Answers | None,
    *,
    local: bool,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Run a batch through both sides. Its spikes are gone when this returns.

    Args:
        answers: is given PyTorch's.
        local: compare each layer by itself, too.

    Returns:
        The neuron-steps that differ by image, `[N]`, and which layers fired in the graph, `[layers]`.
    """
    per_step, spikes = _run_engine(engine, x, sums.T, state)
    counts: list[NDArray[np.int64]] = []
    watch = None if answers is None else partial(_count, counts)
    expected, differing = sums.add(x, per_step, spikes, state, watch=watch)
    if answers is not None:
        answers.add(expected, counts)
    if local and differing.any():
        sums.add_local(x, per_step, spikes, state)
    elif local:  # each layer of PyTorch has read the engine's spikes already
        sums.count_local(per_step, expected, np.zeros((len(spikes), sums.T, len(x)), np.int64))
    return differing, np.array([layer.any() for layer in spikes])


def _count(
    counts: list[NDArray[np.int64]], layer: int, current: Tensor, own: Tensor, different: Tensor, *_: float
) -> None:
    """Note how many neurons of a layer fire in PyTorch, `[T, N]`; see `Watch`."""
    counts.append(own.reshape(*own.shape[:2], -1).sum(2).cpu().numpy().astype(np.int64))


def compare_folded(reduced: TracedNetwork, engine: Engine, x: NDArray[Any], T: int) -> Parity:
    """The folded network in float32, of which int8 and fp16 are made, beside the classifier, which stands for the
    engine: both in PyTorch."""
    sums = Comparison(TracedNetwork(reduced.tracer), engine, T)
    for part in parts(len(x), min(_BATCH, images_with_spikes(engine.metadata["neurons"], T))):
        per_step, spikes = run_torch(reduced.classifier, x[part], T)
        sums.add(x[part], per_step, spikes)
        sums.add_local(x[part], per_step, spikes)
    return _parity(sums, T)


def _parity(sums: Comparison, T: int) -> Parity:
    agreement = tuple(sums.logits.top1_agreement(t) for t in range(1, T + 1))
    local = sums.local.layer_rates(T)[sums.local.differing.sum(1) > 2]  # one or two spikes make no rate
    return Parity(
        num_images=sums.logits.num_images,
        T=T,
        top1_agreement=agreement[-1],
        top1_agreement_by_step=agreement,
        spike_mismatch_rate=sums.whole.rate(T),
        local_mismatch_rate=float(local.max(initial=0.0)),
        max_abs_logit_error=sums.logits.max_abs_logit_error(T),
        local_logit_error=sums.local_error,
    )


def _rounding(
    classifier: Runnable,
    x: NDArray[Any],
    T: int,
    state: Sequence[NDArray[Any]] | None,
    enough: float,
    others: RoundedOtherwise,
    tick: Callable[[int], None] | None,
) -> float:
    """How much PyTorch differs from itself where it rounds otherwise: with weights one ulp away, and in float64.

    Args:
        enough: a rate with which nothing else is tried.
        others: of the classifier.
        tick: called with the number of images done, of all networks; those that are not tried count as done.
    """
    tick = tick or (lambda _: None)
    given = [
        (x[part], None if state is None else [layer[part] for layer in state])
        for part in parts(len(x), _PART_OF_ROUNDING)
    ]
    expected = []
    for images, u in given:
        expected.append([layer.astype(np.uint8) for layer in run_torch(classifier, images, T, u)[1]])
        tick(len(images))
    size = sum(layer.size for spikes in expected for layer in spikes)
    largest = 0.0
    for tried, (other, context) in enumerate(others, 1):
        differing = 0
        for (images, u), spikes in zip(given, expected, strict=True):
            with context:
                differing += int(compare_torch(other, images, T, spikes, u)[1].sum())
            tick(len(images))
        largest = max(largest, differing / size)
        if largest >= enough:
            tick(len(x) * (len(others) - tried))
            break
    return largest


def _is_at_threshold(
    classifier: Runnable,
    engine: Engine,
    x: NDArray[Any],
    T: int,
    state: Sequence[NDArray[Any]] | None,
    others: RoundedOtherwise,
    tick: Callable[[int], None] | None,
) -> bool:
    """Whether neurons fire on one side alone, both reading and reset by the engine's spikes, and each is nearer to its
    threshold than membranes near it move in its layer where PyTorch rounds otherwise, times AMPLIFICATION.

    Args: see `_rounding`; here each image is ticked once.
    """
    num_layers = len(engine.metadata["neurons"])
    differ, farthest, moved = np.zeros(num_layers, np.bool_), np.zeros(num_layers), np.zeros(num_layers)
    for part in parts(len(x), 1, tick):
        image, u = x[part], None if state is None else [layer[part] for layer in state]
        _, spikes = _run_engine(engine, image, T, u)
        own = _layers_alone(classifier, image, T, spikes, u)
        for layer, (_, _, distances) in enumerate(own):
            differ[layer] |= distances.numel() > 0
            farthest[layer] = max([farthest[layer], *distances.tolist()])
        if not any(distances.numel() for *_, distances in own):
            continue
        for other, context in others:
            with context:
                otherwise = _layers_alone(other, image, T, spikes, u)
            for layer, ((h, near, _), (other_h, *_)) in enumerate(zip(own, otherwise, strict=True)):
                moved[layer] = max(moved[layer], float(((other_h - h).abs() * near).max()))
    return bool(differ.any() and (farthest < AMPLIFICATION * moved)[differ].all())


def _layers_alone(
    classifier: Runnable,
    x: NDArray[Any],
    T: int,
    spikes: Sequence[NDArray[Any]],
    state: Sequence[NDArray[Any]] | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer, reading given spikes and reset by its own of these, the membranes before the reset, `[T, N, ...]`,
    which are within v_th of the threshold, and how far from it those are that would not fire as given."""
    found = []

    def note(layer: int, current: Tensor, own: Tensor, different: Tensor, tau: float, v_th: float) -> None:
        start = None if state is None else torch.from_numpy(state[layer]).to(current)
        given = torch.where(different, 1 - own, own)
        h = membranes(current, given, tau, start)
        distance = (h - v_th).abs()
        found.append((h, distance < v_th, distance[(h > v_th) != given.bool()]))

    compare_torch(classifier, x, T, spikes, state, replacing=True, watch=note)
    return found


class RoundedOtherwise:
    """The network with every weight moved by up to one unit in the last place, three times, and in float64, which takes
    longest; and in which context each runs. Each is made when an iteration first comes to it, and kept: it may have
    been traced."""

    def __init__(self, classifier: Runnable) -> None:
        self._classifier = classifier
        self._has_float64 = isinstance(classifier, Classifier)  # an int8 network has no form in float64
        self._made: list[tuple[Runnable, AbstractContextManager[Any]]] = []
        self._to_come = self._make()

    def __len__(self) -> int:
        return _NUM_MOVED + self._has_float64

    def __iter__(self) -> Iterator[tuple[Runnable, AbstractContextManager[Any]]]:
        yield from list(self._made)
        for other in self._to_come:
            self._made.append(other)
            yield other

    def _make(self) -> Iterator[tuple[Runnable, AbstractContextManager[Any]]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(_NUM_MOVED):
            moved = copy.deepcopy(self._classifier)
            for parameter in moved.parameters():
                ulps = torch.rand(parameter.shape, generator=generator).to(parameter) * 2 - 1
                parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps * ulps)
            yield moved, nullcontext()
        if self._has_float64:
            yield copy.deepcopy(self._classifier).double(), InFloat64()  # type: ignore[no-untyped-call]


def _run_engine(
    engine: Engine, x: NDArray[Any], T: int, state: Sequence[NDArray[Any]] | None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Per-step logits `[N, T, K]` and every layer's spikes, as the graph computes them: see `run_torch`."""
    names = [neuron["name"] for neuron in engine.metadata["neurons"]]
    overlay, spikes = spikes_overlay(names), [f"spikes.{name}" for name in names]
    if state is None:
        result, outputs = engine.run_with(overlay, x, T)
        return result.per_step, [outputs[name] for name in spikes]
    stream = Stream(engine, len(x), engine.overlaid(overlay)[0])
    stream.state = {f"u.{name}": u for name, u in zip(names, state, strict=True)}
    outputs = stream.call(x[:, :T] if engine.encoding == "frames" else x, spikes)
    return outputs["per_step"], [outputs[name] for name in spikes]
