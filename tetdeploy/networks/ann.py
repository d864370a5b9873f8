"""What an ANN twin has in the place of neurons and of time: the baseline for accuracy and energy."""

from __future__ import annotations

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


def is_ann_twin(network: nn.Module) -> bool:
    """Whether ReLU has taken the place of neurons."""
    return any(isinstance(module, TwinReLU) for module in network.modules())


def has_neurons(network: nn.Module) -> bool:
    """Whether anything in a network spikes."""
    return any(isinstance(module, LIF) for module in network.modules())
