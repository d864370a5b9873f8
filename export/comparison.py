"""PyTorch and the engine on the same images, summed up: for the export's gate and for a whole test set side by side.

A deep network may multiply one flipped spike to thousands in later layers. So a second rate tells the export's own
error from what the network makes of it: the *local* one, where each layer of PyTorch reads the engine's spikes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.agreement import LogitAgreement
from tetdeploy.engine import Engine
from tetdeploy.traced_network import Runnable

from .recorder import Watch, compare_torch


class SpikeDifference:
    """Neurons that fire on one side alone, summed over many images; `arrays` and `restore` as in `Tally`.

    Args:
        sizes: neurons by layer.

    Attributes:
        differing: neuron-steps that differ, `[layers, T]`.
    """

    def __init__(self, sizes: Sequence[int], T: int) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.num_images = 0
        self.differing = np.zeros((len(sizes), T), np.int64)

    def add(self, differing: NDArray[np.int64]) -> None:
        """Add a batch, `[layers, T, N]`."""
        self.num_images += differing.shape[2]
        self.differing += differing.sum(2)

    def rate(self, t: int) -> float:
        """Differing neuron-steps over all neuron-steps of the first `t` steps."""
        return float(self.differing[:, :t].sum() / max(self.sizes.sum() * t * self.num_images, 1))

    def layer_rates(self, t: int) -> NDArray[np.float64]:
        """The same by layer, `[layers]`."""
        rates: NDArray[np.float64] = self.differing[:, :t].sum(1) / np.maximum(self.sizes * t * self.num_images, 1)
        return rates

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"num_images": np.array(self.num_images), "differing": self.differing}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.num_images, self.differing = int(arrays["num_images"]), arrays["differing"].copy()


class Comparison:
    """What PyTorch and the engine make of the same images.

    Attributes:
        logits: classes and logits.
        whole, local: neuron-steps that differ, in the whole network and in each layer by itself.
        local_error: the largest difference of a logit where PyTorch's last layer reads the engine's spikes, as a
            fraction of the largest logit.
    """

    def __init__(self, classifier: Runnable, engine: Engine, T: int) -> None:
        self.classifier, self.T = classifier, T
        sizes = [int(np.prod(n["shape"])) for n in engine.metadata["neurons"]]
        self.logits = LogitAgreement(T)
        self.whole, self.local = SpikeDifference(sizes, T), SpikeDifference(sizes, T)
        self.local_error = 0.0

    def add(
        self,
        x: NDArray[Any],
        per_step: NDArray[Any],
        spikes: Sequence[NDArray[Any]],
        state: Sequence[NDArray[Any]] | None = None,
        *,
        watch: Watch | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Run a batch through PyTorch beside the engine's `per_step [N, T, K]` and `spikes [T, N, ...]` by layer.

        Returns:
            PyTorch's logits `[N, T, K]` and the neuron-steps that differ by image, `[N]`.
        """
        expected, differing = compare_torch(self.classifier, x, self.T, spikes, state, watch=watch)
        self.logits.add(per_step, expected)
        self.whole.add(differing)
        return expected, differing.sum((0, 1))

    def add_local(
        self,
        x: NDArray[Any],
        per_step: NDArray[Any],
        spikes: Sequence[NDArray[Any]],
        state: Sequence[NDArray[Any]] | None = None,
        *,
        watch: Watch | None = None,
    ) -> None:
        """The same of each layer by itself, which reads the engine's spikes: `local` and `local_error`."""
        found = compare_torch(self.classifier, x, self.T, spikes, state, replacing=True, watch=watch)
        self.count_local(per_step, *found)

    def count_local(self, per_step: NDArray[Any], expected: NDArray[Any], differing: NDArray[np.int64]) -> None:
        """Add what each layer by itself made of images: PyTorch's logits `[N, T, K]`, neurons that differ
        `[layers, T, N]`."""
        self.local.add(differing)
        error = np.abs(per_step - expected).max() / max(np.abs(expected).max(), 1e-12)
        self.local_error = max(self.local_error, float(error))
