"""PyTorch and the engine side by side on a test set: which spikes differ, and how near their membranes lay to v_th.

A spike that differs makes others differ behind it, at whatever membrane. So margins are told apart: those of *all*
differing neuron-steps; and the *local* ones, where each layer of PyTorch reads the engine's spikes and only the first
step counts at which a neuron differs. Only the latter must lie at v_th, within rounding. *Every* neuron-step of some
images stands beside them for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tetdeploy.batches import images_with_spikes
from tetdeploy.engine import Engine, Result
from tetdeploy.names import section
from tetdeploy.networks import Classifier, run_network
from tetdeploy.resumable import join
from tetdeploy.sweep import median_ms, running_class

from .comparison import Comparison
from .counters import spikes_overlay
from .margins import Margins, margins

_NUM_EVERY = 32  # images whose every neuron-step goes into the margins


class SideBySide:
    """The comparison of a checkpoint and its export, batch by batch; `arrays` and `restore` as in `Tally`.

    Attributes:
        batch_size: as many images as fit with all their spikes.
        sums: the comparison.
        correct: right answers of PyTorch and of the engine on the same images by step, `[2, T]`.
        fired: spikes of PyTorch and of the engine, `[2, layers, T]`.
        differing, local, every: margins.
    """

    def __init__(self, classifier: Classifier, engine: Engine, T: int) -> None:
        self.classifier, self.engine, self.T = classifier.eval(), engine, T
        self.names = [n["name"] for n in engine.metadata["neurons"]]
        self._overlay = engine.counting_overlay + spikes_overlay(self.names)
        self.sums = Comparison(classifier, engine, T)
        self.correct = np.zeros((2, T), np.int64)
        self.fired = np.zeros((2, len(self.names), T), np.int64)
        self.differing, self.local, self.every = (Margins(len(self.names)) for _ in range(3))
        self.batch_size = images_with_spikes(engine.metadata["neurons"], T)

    @property
    def num_images(self) -> int:
        """Images compared so far."""
        return self.sums.logits.num_images

    def add(self, x: NDArray[Any], labels: NDArray[np.int64]) -> tuple[Result, dict[str, NDArray[Any]]]:
        """Run a batch through both. Returns what `Engine.count` does."""
        result, outputs = self.engine.run_with(self._overlay, x, self.T)
        spikes = [outputs.pop(f"spikes.{name}") for name in self.names]
        expected, differing = self.sums.add(x, result.per_step, spikes, watch=self._watch)
        for side, logits in enumerate((expected, result.per_step)):
            self.correct[side] += (running_class(logits) == labels[:, None]).sum(0)
        self.fired[1] += [np.count_nonzero(layer.reshape(self.T, -1), axis=1) for layer in spikes]
        self._add_local(x, result.per_step, spikes, expected, differing > 0)
        return result, outputs

    def _add_local(
        self,
        x: NDArray[Any],
        per_step: NDArray[Any],
        spikes: list[NDArray[Any]],
        expected: NDArray[Any],
        some: NDArray[np.bool_],
    ) -> None:
        """Each layer by itself. Only `some` images are run: where no spike differs, each layer of PyTorch has read the
        engine's spikes already."""
        if not some.all():
            nothing = np.zeros((len(spikes), self.T, int((~some).sum())), np.int64)
            self.sums.count_local(per_step[~some], expected[~some], nothing)
            x, per_step, spikes = x[some], per_step[some], [layer[:, some] for layer in spikes]
        if len(x):
            self.sums.add_local(x, per_step, spikes, watch=self._watch_local)

    def _watch(self, layer: int, current: Tensor, spikes: Tensor, different: Tensor, tau: float, v_th: float) -> None:
        self.fired[0, layer] += spikes.reshape(self.T, -1).sum(1).to(torch.int64).cpu().numpy()
        if self.num_images < _NUM_EVERY:
            self.every.add(layer, margins(current, spikes, tau, v_th))
        if different.any():
            margin, where = _of_differing(current, spikes, different, tau, v_th)
            self.differing.add(layer, margin[where])

    def _watch_local(
        self, layer: int, current: Tensor, spikes: Tensor, different: Tensor, tau: float, v_th: float
    ) -> None:
        if different.any():
            margin, where = _of_differing(current, spikes, different, tau, v_th)
            first = where & (where.cumsum(0) == 1)  # its membrane is another one from there on
            self.local.add(layer, margin[first])

    def row(self, t: int) -> dict[str, Any]:
        """What a row of the result says."""
        logits = self.sums.logits
        return {
            "top1_agreement": logits.top1_agreement(t),
            "spike_mismatch_rate": self.sums.whole.rate(t),
            "max_abs_logit_error": logits.max_abs_logit_error(t),
            "local_mismatch_rate": self.sums.local.rate(t),
            "torch_accuracy": float(self.correct[0, t - 1] / self.num_images),
            "engine_accuracy": float(self.correct[1, t - 1] / self.num_images),
        }

    def neuron(self, layer: int) -> dict[str, Any]:
        """What a layer of neurons says, over all steps."""
        neuron_steps = self.sums.whole.sizes[layer] * self.T * self.num_images
        return {
            "spike_mismatch_rate": float(self.sums.whole.layer_rates(self.T)[layer]),
            "local_mismatch_rate": float(self.sums.local.layer_rates(self.T)[layer]),
            "torch_firing_rate": float(self.fired[0, layer].sum() / neuron_steps),
            "engine_firing_rate": float(self.fired[1, layer].sum() / neuron_steps),
            "margin": {name: found.of(layer) for name, found in self._margins().items()},
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "with": "checkpoint",
            "num_images": self.num_images,
            "T": self.T,
            "local_logit_error": self.sums.local_error,
            "margin": {name: found.of() | {"octaves": found.histogram()} for name, found in self._margins().items()},
        }

    def _margins(self) -> dict[str, Margins]:
        return {"differing": self.differing, "local": self.local, "every": self.every}

    def _parts(self) -> dict[str, Any]:
        parts = {"logits": self.sums.logits, "whole": self.sums.whole, "part": self.sums.local}
        return parts | {f"margin-{name}": found for name, found in self._margins().items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        own = {"correct": self.correct, "both_fired": self.fired, "local_error": np.array(self.sums.local_error)}
        return own | join(self._parts())

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.correct, self.fired = arrays["correct"].copy(), arrays["both_fired"].copy()
        self.sums.local_error = float(arrays["local_error"])
        for name, part in self._parts().items():
            part.restore(section(arrays, f"{name}/"))


def _of_differing(current: Tensor, spikes: Tensor, different: Tensor, tau: float, v_th: float) -> tuple[Tensor, Tensor]:
    """Margins of the neurons that differ at some step, and at which steps they do, both `[T, neurons]`."""
    T = len(spikes)
    where = different.reshape(T, -1)
    some = where.any(0).nonzero().flatten()
    some_current = torch.stack([step.flatten()[some] for step in current])  # no copy of a current that is a view
    return margins(some_current, spikes.reshape(T, -1)[:, some], tau, v_th), where[:, some]


@torch.no_grad()
def torch_latency(classifier: Classifier, x: NDArray[Any], steps: tuple[int, ...]) -> dict[int, float]:
    """Median milliseconds of PyTorch for one image, by T; they take turns, ten times at most, after one to warm up."""
    return median_ms(lambda image, t: run_network(classifier, torch.tensor(image), t), x, steps, repeats=10, warm_up=1)
