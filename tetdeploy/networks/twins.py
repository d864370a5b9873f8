"""The twins of a network: copies with something else in the place of its neurons.

They are made of the network itself, so whatever architecture has these neurons has them, with the same parameters under
the same names: a twin's weights load into the network, and the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from tetdeploy.layers import DirectEncoding
from tetdeploy.networks.ann import SingleStep, TwinReLU
from tetdeploy.networks.classifier import Classifier
from tetdeploy.networks.smooth_spike import SmoothLIF
from tetdeploy.neurons import LIF

N = TypeVar("N", bound=nn.Module)


def ann_twin(network: N) -> N:
    """A copy of a spiking network with ReLU in place of every LIF and IF.

    Everything else stays: weights, BN, pooling, and the sums of residual blocks (SEW's too, so its values may grow).

    Args:
        network: built of the neurons of `tetdeploy.neurons`, or a `Classifier`, whose twin's configuration says that it
            is one; left as it was.

    Returns:
        Maps images `[N, C, H, W]` (T is 1 or left out) to logits `[1, N, K]`. Its state dict has the network's keys.

    Raises:
        ValueError: the network has no neurons, so it has no twin; or some of a class that computes or learns something
            of its own.
    """
    twin = _replaced(network, TwinReLU)
    for module in twin.modules():
        if type(module) is DirectEncoding:
            module.__class__ = SingleStep  # the same layers under the same names
    return _told(twin, ann=True, smooth_spike=0.0)


def smooth_twin(network: N, *, k: float) -> N:
    """A copy of a spiking network with `SmoothLIF` in place of every LIF and IF; all else stays, state dict included.

    Args:
        network: built of the neurons of `tetdeploy.neurons`, or a `Classifier`, whose twin's configuration says k; left
            as it was.
        k: steepness of the sigmoid, above 0.

    Raises:
        ValueError: the network has no neurons, or some of a class that computes or learns something of its own, or k
            is out of its range.
    """
    twin = _replaced(network, lambda neuron: SmoothLIF(k=k, tau=neuron.tau, v_th=neuron.v_th))
    return _told(twin, smooth_spike=float(k))


def _replaced(network: N, replacement: Callable[[LIF], nn.Module]) -> N:
    twin = copy.deepcopy(network)
    neurons = [module for module in twin.modules() if isinstance(module, LIF)]
    if not neurons:
        raise ValueError(f"{type(network).__name__} has no LIF or IF neurons to replace; it is no spiking network")
    if own := [neuron for neuron in neurons if computes_other(neuron)]:
        raise ValueError(
            f"{type(own[0]).__name__} computes or learns something of its own, which would be left out where ReLU or "
            "smooth spikes take the place of neurons: build the network with LIF and IF for that, or put what is added "
            "into a layer of its own, before or behind them"
        )
    for neuron in neurons:
        # The object itself becomes another, since a network may also call it from a list that PyTorch does not know.
        other = replacement(neuron).train(neuron.training)
        neuron.__class__ = type(other)  # type: ignore[assignment]
        vars(neuron).update(vars(other))
    return twin


def computes_other(neuron: LIF) -> bool:
    """Whether it is more than LIF or `SmoothLIF` with the settings that its class may choose."""
    kind = type(neuron)
    known = (kind.forward, kind.with_state) in [
        (LIF.forward, LIF.with_state),
        (SmoothLIF.forward, SmoothLIF.with_state),
    ]
    return not known or any(True for _ in neuron.children()) or bool(neuron.state_dict())


def _told(twin: N, **said: bool | float) -> N:
    """The twin; of a `Classifier` the configuration, which a checkpoint keeps, says what has become of it."""
    if isinstance(twin, Classifier):
        twin.config = replace(twin.config, **said)  # type: ignore[arg-type]
    return twin
