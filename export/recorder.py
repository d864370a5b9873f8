"""Watching PyTorch's neurons fire: their spikes kept, or compared with others at once and not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy.batches import parts
from tetdeploy.networks import Classifier, run_network
from tetdeploy.traced_network import Runnable

_BATCH = 32


class NeuronRecorder(TorchDispatchMode):
    """Within it, every LIF operator's spikes and last membrane are kept, in the order in which the layers fire.

    Args:
        state: membranes `[N, ...]` to start from instead, in the same order.
    """

    def __init__(self, state: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = state
        self.num_layers = 0
        self.spikes: list[Tensor] = []
        self.state: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.tetdeploy.lif.default:
            return func(*args, **(kwargs or {}))
        current, u, tau, v_th, gamma = args
        if self.given is not None:
            u = self.given[self.num_layers]
        spikes, u_last = func(current, u, tau, v_th, gamma)
        read = self.fired(current, spikes, u_last, tau, v_th)
        self.num_layers += 1
        return read, u_last

    def fired(self, current: Tensor, spikes: Tensor, u_last: Tensor, tau: float, v_th: float) -> Tensor:
        """Take note of a layer's spikes; what is returned the next layers read, and may write over."""
        self.spikes.append(spikes.clone())
        self.state.append(u_last.clone())
        return spikes


Watch = Callable[[int, Tensor, Tensor, Tensor, float, float], None]


class SpikeComparison(NeuronRecorder):
    """Within it, every LIF operator's spikes are compared with `others` (`[T, N, ...]` by layer), and not kept.

    Args:
        state: as for `NeuronRecorder`.
        replacing: the next layers read the others in place of the network's own spikes.
        watch: called with (layer, current, spikes, where they differ, tau, v_th), all tensors `[T, N, ...]`.

    Attributes:
        differing: the number of neurons that differ, `[T, N]` by layer.
    """

    def __init__(
        self,
        others: Sequence[NDArray[Any]],
        state: Sequence[Tensor] | None,
        *,
        replacing: bool,
        watch: Watch | None,
    ) -> None:
        super().__init__(state)
        self.others, self.replacing, self.watch = others, replacing, watch
        self.differing: list[NDArray[np.int64]] = []

    def fired(self, current: Tensor, spikes: Tensor, u_last: Tensor, tau: float, v_th: float) -> Tensor:
        layer = self.num_layers
        other = torch.from_numpy(self.others[layer]).to(spikes).view_as(spikes)
        different = spikes != other
        by_image = different.reshape(spikes.shape[:2].numel(), -1).cpu().numpy()
        counts = [np.count_nonzero(row) for row in by_image]  # 20 times as fast as PyTorch sums up bools
        self.differing.append(np.array(counts, np.int64).reshape(spikes.shape[:2]))
        if self.watch is not None:
            self.watch(layer, current, spikes, different, tau, v_th)
        return other.clone() if self.replacing else spikes  # networks may write over what they read


@torch.no_grad()
def run_torch(
    classifier: Runnable, x: NDArray[Any], T: int, state: Sequence[NDArray[Any]] | None = None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Per-step logits `[N, T, K]` and every layer's spikes `[T, N, ...]`, as PyTorch computes them.

    Args:
        state: membranes to start from, by layer.
    """
    with NeuronRecorder(_on(classifier, state)) as recorder:
        logits = _logits(classifier, x, T)
    return logits, [spikes.cpu().numpy() for spikes in recorder.spikes]


@torch.no_grad()
def torch_logits(
    classifier: Classifier, x: NDArray[Any], T: int, tick: Callable[[int], None] | None = None
) -> NDArray[Any]:
    """Per-step logits `[N, T, K]`, as PyTorch computes them, a batch at a time; `tick` is called with its images."""
    return np.concatenate([_logits(classifier, x[part], T) for part in parts(len(x), _BATCH, tick)])


@torch.no_grad()
def compare_torch(
    classifier: Runnable,
    x: NDArray[Any],
    T: int,
    others: Sequence[NDArray[Any]],
    state: Sequence[NDArray[Any]] | None = None,
    *,
    replacing: bool = False,
    watch: Watch | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Per-step logits `[N, T, K]` and how many neurons fire otherwise than in `others`, `[layers, T, N]`.

    Args: see `SpikeComparison`.
    """
    with SpikeComparison(others, _on(classifier, state), replacing=replacing, watch=watch) as comparison:
        logits = _logits(classifier, x, T)
    return logits, np.stack(comparison.differing)


def _logits(classifier: Runnable, x: NDArray[Any], T: int) -> NDArray[Any]:
    inputs = torch.tensor(x, device=classifier.mean.device)  # the network may write over them
    inputs = inputs if x.dtype == np.uint8 else inputs.to(classifier.mean.dtype)
    return run_network(classifier, inputs, T).transpose(0, 1).cpu().numpy()


def _on(classifier: Runnable, state: Sequence[NDArray[Any]] | None) -> list[Tensor] | None:
    """Membranes as the classifier's tensors."""
    device, dtype = classifier.mean.device, classifier.mean.dtype
    return None if state is None else [torch.from_numpy(u).to(device, dtype) for u in state]
