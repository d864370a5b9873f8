"""The operation counts of a graph, beside what PyTorch's layers read: the energy of a network rests on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tetdeploy.energy import Layer, Operations, layers_of
from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier

from .counters import spikes_overlay
from .recorder import compare_torch, torch_logits

_ROUNDED = 1e-3  # of operations on currents, of which some are 0 on one side alone
_CONVOLVE = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class CountError(ValueError):
    """An exported graph counts other operations than PyTorch's layers do."""


@dataclass
class _Read:
    """What calls of one layer read: operations if every input counts, those of nonzero inputs, and whether all were 0
    or 1."""

    dense: float = 0.0
    active: float = 0.0
    binary: bool = True

    def add(self, layer: nn.Module, x: Tensor) -> None:
        self.dense += _operations(layer, torch.ones_like(x))
        self.active += _operations(layer, (x != 0).to(x.dtype))
        self.binary = self.binary and bool(((x == 0) | (x == 1)).all())


def audit(classifier: Classifier, engine: Engine, x: NDArray[Any], T: int) -> None:
    """Compare every convolution and linear layer that is a module of its own, with zeros for padding; PyTorch's read
    the engine's spikes. In int8 and fp16 currents may round to 0: what is active is compared of spikes alone.

    Args:
        x: some images or frames.

    Raises:
        CountError: a layer's operations differ.
    """
    operations = Operations(layers_of(engine.metadata))
    neurons = [layer["name"] for layer in engine.metadata["neurons"]]
    outputs = engine.run_with(engine.counting_overlay + spikes_overlay(neurons), x, T)[1]
    operations.add(outputs, len(x), T)
    with _reading(classifier) as once:
        torch_logits(classifier, x[:, :1] if engine.encoding == "frames" else x, 1)
    with _reading(classifier) as read:
        compare_torch(classifier, x, T, [outputs[f"spikes.{name}"] for name in neurons], replacing=True)
    modules: dict[str, list[Layer]] = defaultdict(list)
    for layer in operations.layers:
        modules[layer.name.partition("#")[0]].append(layer)
    for name, layers in modules.items():
        if name not in read:
            continue
        if all(_pads(classifier.network.get_submodule(name)) in (None, layer.pads) for layer in layers):
            dense = sum(layer.dense_ops() for layer in layers) * len(x)
            _compare(name, "in a step if every input counts", dense, once[name].dense, 0.0)
        if any(layer.from_input for layer in layers):
            continue
        active = float(sum(operations.counts[layer.name].sum() for layer in layers))
        binary = all(layer.binary for layer in layers)
        if not binary and engine.metadata["precision"] != "fp32":
            continue
        _compare(name, f"in {T} steps of inputs that are not 0", active, read[name].active, 0.0 if binary else _ROUNDED)
        if binary and not read[name].binary:
            raise CountError(_message(name, "which is said to read spikes alone, reads other numbers"))


@contextmanager
def _reading(classifier: Classifier) -> Iterator[dict[str, _Read]]:
    """Within it, what each layer reads is summed up, by the module's name."""
    found: dict[str, _Read] = defaultdict(_Read)
    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=name: found[name].add(module, *given[:1]))
        for name, module in classifier.network.named_modules()
        if type(module) is nn.Linear or (type(module) in _CONVOLVE and module.padding_mode == "zeros")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _operations(layer: nn.Module, x: Tensor) -> float:
    """Inputs times the outputs that they reach: all inputs of a group reach as many, so that a kernel of ones over
    their sum counts."""
    if isinstance(layer, nn.Linear):
        return float(x.sum(dtype=torch.float64)) * layer.out_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    summed = x.sum(1, keepdim=True)
    ones = summed.new_ones(1, 1, *layer.kernel_size)
    reached = _CONVOLVE[type(layer)](summed, ones, None, layer.stride, layer.padding, layer.dilation)
    return float(reached.sum(dtype=torch.float64)) * (layer.out_channels // layer.groups)


def _pads(layer: nn.Module) -> tuple[tuple[int, int], ...] | None:
    """A layer's own padding. A graph's may be larger: zeros that the network puts round its input before."""
    padding = getattr(layer, "padding", None)
    return tuple((pad, pad) for pad in padding) if isinstance(padding, tuple) else None


def _compare(name: str, what: str, counted: float, expected: float, tolerance: float) -> None:
    if not np.isclose(counted, expected, rtol=tolerance, atol=0):
        raise CountError(_message(name, f"operations {what}: the graph counts {counted:,.0f}, PyTorch {expected:,.0f}"))


def _message(name: str, what: str) -> str:
    return (
        f"layer {name!r}, {what}; energies would be wrong, and nothing was written. This is a fault of tetdeploy: "
        "please report it, with the network. --check 0 leaves the checks out"
    )
