"""The ANN twin of a network: ReLU in place of its neurons, no time; the baseline for accuracy and energy.

It is made of the network itself, so whatever architecture has these neurons has a twin, with the same parameters under
the same names: a twin's weights load into the network, and the other way round.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tetdeploy.layers import DirectEncoding
from tetdeploy.neurons import LIF


class SingleStep(DirectEncoding):
    """Direct encoding in a network without time: images `[N, C, H, W]` to `[1, N, ...]`, T being 1."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """The first layers' output.

        Frames `[T, N, C, H, W]` are taken one by one, as images that know nothing of each other.

        Raises:
            ValueError: images with another T than 1, or what `DirectEncoding` refuses.
        """
        if x.dim() == 4 and T is not None and T != 1:
            raise ValueError(f"an ANN has no time and would give the same answer {T} times; use T=1, got T={T}")
        return super().forward(x, 1 if x.dim() == 4 else T)


class TwinReLU(nn.ReLU):
    """ReLU in a neuron's place, with what a network's own code may ask of the neuron."""

    def __init__(self, neuron: LIF) -> None:
        super().__init__()
        self.tau, self.v_th, self.gamma = neuron.tau, neuron.v_th, neuron.gamma

    def with_state(self, current: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ReLU of `[1, N, ...]`, and the membranes `[N, ...]` as they were: it has none to charge."""
        return self(current), torch.zeros_like(current[0]) if u is None else u


def ann_twin(network: nn.Module) -> nn.Module:
    """A copy of a spiking network with ReLU in place of every LIF and IF.

    Everything else stays: weights, BN, pooling, and the sums of residual blocks (SEW's too, so its values may grow).

    Args:
        network: built of the neurons of `tetdeploy.neurons`; left as it was.

    Returns:
        Maps images `[N, C, H, W]` (T is 1 or left out) to logits `[1, N, K]`. Its state dict has the network's keys.

    Raises:
        ValueError: the network has no neurons, so it has no twin.
    """
    if not has_neurons(network):
        raise ValueError(f"{type(network).__name__} has no LIF or IF neurons to replace; it is no spiking network")
    twin = copy.deepcopy(network)
    for path, module in list(twin.named_modules(remove_duplicate=False)):
        if isinstance(module, LIF):
            twin.set_submodule(path, TwinReLU(module))
        elif type(module) is DirectEncoding:
            module.__class__ = SingleStep  # the same layers under the same names
    return twin


def has_neurons(network: nn.Module) -> bool:
    """Whether anything in a network spikes."""
    return any(isinstance(module, LIF) for module in network.modules())
