"""The scales of the input currents of convolutions in 8 bits, found on images of the training set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tetdeploy.int8.quantisation import CurrentScale, Int8Error, Scales, spiking_convolutions
from tetdeploy.tracing import Tracer

MIN_IMAGES = 32
_BATCH = 32
_BINS = 4096
_LARGEST = 1e30  # of a current; float32 must hold the range of the bins


@dataclass(frozen=True)
class Calibration:
    """The scales of the input currents, and how they were found.

    Attributes:
        method: of `METHODS`, the one with the higher accuracy on the calibration images.
        num_images: calibration images, of the training set.
        accuracy: of each method on them.
        scales: by convolution.
        fine_tuned: the network was trained at these scales (`tetdeploy train --qat`).
    """

    method: str
    num_images: int
    accuracy: dict[str, float]
    scales: dict[str, CurrentScale]
    fine_tuned: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """What `to_dict` gave; KeyError or TypeError for anything else."""
        if not isinstance(values["scales"], Mapping):
            raise TypeError(f"scales are {type(values['scales']).__name__}")
        scales = {name: CurrentScale(**scale) for name, scale in values["scales"].items()}
        return cls(**{**values, "scales": scales})


def calibrate(
    tracer: Tracer,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    T: int,
    answers: Callable[[Scales], NDArray[np.float32]],
    tick: Callable[[int], None] | None = None,
) -> Calibration:
    """Find the scales of the input currents on calibration images.

    Args:
        tracer: of the network in float32.
        x: input as the graph takes it, `[N, ...]`.
        labels: `[N]`; without them the accuracy is the agreement with the network in float32.
        T: steps to run.
        answers: the per-step logits `[N, T, K]` on `x` of the network in 8 bits at some scales, whose accuracy counts.
        tick: called with the number of images done.

    Raises:
        Int8Error: there are too few images; and see `record_currents`.
    """
    if len(x) < MIN_IMAGES:
        raise Int8Error(
            f"calibration takes at least {MIN_IMAGES} images of the training set, got {len(x)} (another --data may "
            "have more)"
        )
    x = x[:, :T] if tracer.encoding == "frames" else x
    inputs = torch.tensor(x, device=tracer.classifier.mean.device)  # the network may write over them
    histograms, full = record_currents(tracer.folded(T), inputs.split(_BATCH), tick)
    expected = full.cpu().numpy()
    candidates = {name: {layer: scale(h) for layer, h in histograms.items()} for name, scale in METHODS.items()}
    truth = expected.argmax(1) if labels is None else labels
    quality = {}
    for name, scales in candidates.items():
        logits = answers(scales).mean(1)
        quality[name] = float((logits.argmax(1) == truth).mean()), -float(np.abs(logits - expected).mean())
    best = max(quality, key=lambda name: quality[name])
    return Calibration(best, len(x), {name: accuracy for name, (accuracy, _) in quality.items()}, candidates[best])


@dataclass
class CurrentHistogram:
    """The output currents of a layer over the calibration images, in bins whose range doubles where they leave it."""

    counts: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0

    def add(self, current: Tensor) -> None:
        """Add currents of any shape; they must be finite."""
        low, high = (float(v) for v in current.aminmax())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if self.counts is None:
            reach = max(self.highest - self.lowest, 1e-6) / 4
            self.low, self.high = self.lowest - reach, self.highest + reach
            self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self._widen()
        for part in current.float().flatten().split(2**24):  # `histc` counts in float32
            self.counts += torch.histc(part, _BINS, self.low, self.high).double().cpu()

    def _widen(self) -> None:
        """Double the range, towards where currents lie outside, until it holds them: two bins become one."""
        assert self.counts is not None
        while self.lowest < self.low or self.highest > self.high:
            width, nothing = self.high - self.low, torch.zeros(_BINS // 2, dtype=torch.float64)
            pairs = self.counts.view(-1, 2).sum(1)
            if self.lowest < self.low:
                self.low, self.counts = self.low - width, torch.cat([nothing, pairs])
            else:
                self.high, self.counts = self.high + width, torch.cat([pairs, nothing])

    def percentile(self, percent: float) -> CurrentScale:
        """The scale that covers all but (100 - percent) / 2 per cent of the currents at either end."""
        assert self.counts is not None
        share = self.counts.cumsum(0) / self.counts.sum()
        edges = np.linspace(self.low, self.high, _BINS + 1)
        rest = (100 - percent) / 200
        low = edges[int((share <= rest).sum())]
        high = edges[int((share < 1 - rest).sum()) + 1]
        return CurrentScale.covering(max(low, self.lowest), min(high, self.highest))

    def least_squares(self) -> CurrentScale:
        """The scale with the least mean squared error of the rounded and clipped currents."""
        assert self.counts is not None
        centres = np.linspace(self.low, self.high, _BINS, endpoint=False) + (self.high - self.low) / (2 * _BINS)
        weights = self.counts.numpy()
        candidates = [CurrentScale.covering(self.lowest, self.highest)]
        candidates += [self.percentile(100 - rest) for rest in np.geomspace(1e-4, 2, 40)]
        return min(candidates, key=lambda scale: _squared_error(scale, centres, weights))


def _squared_error(scale: CurrentScale, values: NDArray[Any], weights: NDArray[Any]) -> float:
    rounded = np.clip(np.round(values / scale.scale), -scale.zero, 255 - scale.zero) * scale.scale
    return float(((rounded - values) ** 2 * weights).sum())


METHODS: dict[str, Callable[[CurrentHistogram], CurrentScale]] = {
    "mse": lambda histogram: histogram.least_squares(),
    "percentile": lambda histogram: histogram.percentile(99.99),
}


@torch.no_grad()
def record_currents(
    graph_module: fx.GraphModule, batches: Iterable[Tensor], tick: Callable[[int], None] | None
) -> tuple[dict[str, CurrentHistogram], Tensor]:
    """Run a folded network on batches of calibration images and gather what its spiking convolutions put out.

    Returns:
        The currents by convolution, over all its calls, and the network's mean logits `[N, K]`.

    Raises:
        Int8Error: it has none, or its currents are not finite.
    """
    nodes = spiking_convolutions(graph_module)
    if not nodes:
        raise Int8Error(
            "no convolution of the network is seen to read spikes or sums of spikes alone, with weights of its own and "
            "padding alike on both sides, so none can run in int8"
        )
    recorder = _Recorder(graph_module, nodes)
    logits = []
    for batch in batches:
        logits.append(recorder.run(batch)[0])
        if tick:
            tick(len(batch))
    return recorder.histograms, torch.cat(logits)


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, nodes: Mapping[fx.Node, str]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # a refusal is about the network, not about its trace
        self._nodes = nodes
        self.histograms = {name: CurrentHistogram() for name in nodes.values()}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            low, high = (float(v) for v in result.aminmax())
            largest = max(-low, high)
            if not largest <= _LARGEST:
                raise Int8Error(
                    f"{self._nodes[n]} puts out currents up to {largest:.3g}, at most {_LARGEST:g} can be held"
                )
            self.histograms[self._nodes[n]].add(result)
        return result
