"""Smooth spikes: Sigmoid(k x) in place of the Heaviside function, for the paper's Table 2.

With them the gradient is that of the loss itself, by plain autograd, and no surrogate takes part: what SDT and TET
reach there, they reach without a mismatch of loss and gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tetdeploy.arguments import check_number
from tetdeploy.neurons import LIF, membrane_dtype


class SmoothLIF(LIF):
    """LIF neurons that fire smoothly, u(0) = 0. Maps currents `[T, ...]` to values `[T, ...]` between 0 and 1.

    For t = 1..T::

        h(t) = tau u(t-1) + I(t)            (1)
        a(t) = Sigmoid(k (h(t) - v_th))     (2), with a sigmoid in place of Theta
        u(t) = h(t) (1 - a(t))              (3)

    Args:
        k: steepness, above 0; the paper takes 1, 10 and 20. For k to infinity a(t) is a spike.
        tau, v_th: see `LIF`. There is no gamma: nothing stands in for a derivative.

    Raises:
        ValueError: a parameter is out of its range.
    """

    def __init__(self, *, k: float, tau: float = 0.5, v_th: float = 1.0) -> None:
        super().__init__(tau=tau, v_th=v_th)
        if not 0.0 < check_number("k", k) < math.inf:
            raise ValueError(f"k must be above 0 and finite; got {k}")
        self.k = float(k)

    def forward(self, current: Tensor) -> Tensor:
        return self.with_state(current)[0]

    def with_state(self, current: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values `[T, ...]` and the last membrane `[...]`, starting from `u`."""
        dtype = membrane_dtype(current.dtype)
        u = torch.zeros(current.shape[1:], dtype=dtype, device=current.device) if u is None else u.to(dtype)
        values = []
        for current_t in current:
            h = self.tau * u + current_t
            a = torch.sigmoid(self.k * (h - self.v_th))
            u = h * (1.0 - a)
            values.append(a)
        return torch.stack(values).to(current.dtype), u

    def extra_repr(self) -> str:
        return f"k={self.k}, tau={self.tau}, v_th={self.v_th}"


def steepness(network: nn.Module) -> set[float]:
    """The k of a network's smooth spikes, all that there are, and 0 for neurons that fire 0 or 1."""
    neurons = [module for module in network.modules() if isinstance(module, LIF)]
    return {neuron.k if isinstance(neuron, SmoothLIF) else 0.0 for neuron in neurons}
