"""What our neurons are compared with, with the same equations: a plain autograd loop, and SpikingJelly's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import click
import torch
from torch import Tensor, nn

from tetdeploy.neurons import LIF


class Spike(torch.autograd.Function):
    """Theta(h - v_th), Eq. 2, with the triangle of Eq. 5 (gamma = 1) for its derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v_th: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.v_th = v_th
        return (h > v_th).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return grads[0] * (1 - (h - ctx.v_th).abs()).clamp_min(0), None


class LoopLIF(LIF):
    """LIF as one writes it first: a Python loop, autograd does the rest."""

    def forward(self, current: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(current[0]), []
        for current_t in current:
            h = self.tau * u + current_t
            s: Tensor = Spike.apply(h, self.v_th)
            u = h * (1 - s)
            spikes.append(s)
        return torch.stack(spikes)


def loop_twin(network: nn.Module) -> nn.Module:
    """The network with `LoopLIF` in place of our neurons."""
    return _replaced(network, lambda ours: LoopLIF(tau=ours.tau, v_th=ours.v_th, gamma=ours.gamma))


@cache  # `reset` is part of what is timed
def spikingjelly() -> Any:
    """Its `activation_based` with the modules that benchmarks use, imported without the warnings of that.

    Raises:
        ClickException: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from spikingjelly import activation_based
            from spikingjelly.activation_based import functional, layer, neuron, surrogate  # noqa: F401
    except ModuleNotFoundError as error:
        raise click.ClickException(f"SpikingJelly cannot be imported ({error}): pip install spikingjelly") from error
    return activation_based


def spikingjelly_neuron(ours: LIF) -> nn.Module:
    """Its neuron for one of ours, over all steps at once."""
    theirs = spikingjelly()
    options = {"v_threshold": ours.v_th, "v_reset": 0.0, "detach_reset": False, "step_mode": "m"}
    options["surrogate_function"] = theirs.surrogate.PiecewiseQuadratic(alpha=1 / ours.gamma)
    if ours.tau == 1:
        node: nn.Module = theirs.neuron.IFNode(**options)
    else:  # our tau is the factor that stays of the membrane, theirs a time constant
        node = theirs.neuron.LIFNode(**options, tau=1 / (1 - ours.tau), decay_input=False)
    return node


def with_spikingjelly(network: nn.Module) -> nn.Module:
    """The network with its neurons in place of ours."""
    return _replaced(network, spikingjelly_neuron)


def _replaced(network: nn.Module, neuron: Callable[[LIF], nn.Module]) -> nn.Module:
    for path, module in list(network.named_modules()):
        if isinstance(module, LIF):
            network.set_submodule(path, neuron(module))
    return network


def reset(network: nn.Module) -> None:
    """Set its membranes to 0, which it keeps from call to call."""
    spikingjelly().functional.reset_net(network)
