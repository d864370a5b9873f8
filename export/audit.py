"""The operation counts of a graph, beside what PyTorch's layers read: the energy of a network rests on them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tetdeploy.energy import Operations, layers_of
from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier
from tetdeploy.wording import counted

from .counters import spikes_overlay
from .recorder import compare_torch

_ROUNDED = 1e-6  # of the largest input: where a current is so small, it may be 0 on one side alone
_CONVOLVE = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class CountError(ValueError):
    """An exported graph counts other operations than PyTorch's layers do."""


@dataclass
class _Read:
    """What a layer read.

    Attributes:
        calls: how often it was called.
        dense: operations of the last call if every input counts.
        active: the fewest and the most operations of nonzero inputs, by how small ones are taken.
        binary: all inputs were 0 or 1.
    """

    calls: int = 0
    dense: float = 0.0
    active: tuple[float, float] = (0.0, 0.0)
    binary: bool = True

    def add(self, layer: nn.Module, x: Tensor) -> None:
        self.calls += 1
        self.dense = _operations(layer, torch.ones_like(x))
        size = x.abs()
        self.active = _operations(layer, size > _ROUNDED * size.max()), _operations(layer, size > 0)
        self.binary = bool(((x == 0) | (x == 1)).all())


def audit(classifier: Classifier, engine: Engine, x: NDArray[Any], T: int) -> None:
    """Compare the operations of every convolution and linear layer, of which PyTorch's read the engine's spikes, in the
    first step and in all.

    Not compared are layers that are no module of their own, or one that is called several times, or whose calls the
    graph has merged; convolutions that pad with other values than zeros; and, in int8 and fp16, how many currents are
    0, since there they may round to it.

    Args:
        x: some images or frames.

    Raises:
        CountError: a layer's operations differ.
    """
    operations = Operations(layers_of(engine.metadata))
    neurons = [layer["name"] for layer in engine.metadata["neurons"]]
    outputs = engine.run_with(engine.counting_overlay + spikes_overlay(neurons), x, T)[1]
    operations.add(outputs, len(x), T)
    spikes = [outputs[f"spikes.{name}"] for name in neurons]
    runs = {steps: _read_in(classifier, engine, x, spikes, steps) for steps in sorted({T, 1}, reverse=True)}
    modules = dict(classifier.network.named_modules(remove_duplicate=False))
    places = Counter(modules.get(layer.name.partition("#")[0]) for layer in operations.layers)
    for layer in operations.layers:
        module = modules.get(layer.name)
        if places[module] > 1 or any(read[module].calls != 1 for read in runs.values()):
            continue
        if _pads(module) == layer.pads:
            dense = float(layer.dense_ops() * len(x))
            _compare(layer.name, "in a step if every input counts", dense, (runs[1][module].dense,) * 2)
        if layer.from_input or not (layer.binary or engine.metadata["precision"] == "fp32"):
            continue
        for steps, read in runs.items():
            what = f"in {counted(steps, 'step')} of inputs that are not 0"
            _compare(layer.name, what, float(operations.counts[layer.name][:steps].sum()), read[module].active)
            if layer.binary and not read[module].binary:
                raise CountError(_message(layer.name, "which is said to read spikes alone, reads other numbers"))


def _read_in(
    classifier: Classifier, engine: Engine, x: NDArray[Any], spikes: list[NDArray[Any]], steps: int
) -> dict[nn.Module | None, _Read]:
    """What each layer reads in the first steps, of the engine's spikes `[T, N, ...]`."""
    with _reading(classifier) as read:
        given = x[:, :steps] if engine.encoding == "frames" else x
        compare_torch(classifier, given, steps, [layer[:steps] for layer in spikes], replacing=True)
    return read


@contextmanager
def _reading(classifier: Classifier) -> Iterator[dict[nn.Module | None, _Read]]:
    """Within it, what each layer reads is noted."""
    found: dict[nn.Module | None, _Read] = defaultdict(_Read)

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[module].add(module, given[0] if given else named["input"])

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in classifier.network.modules()
        if type(module) is nn.Linear or (type(module) in _CONVOLVE and module.padding_mode == "zeros")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _operations(layer: nn.Module, values: Tensor) -> float:
    """Inputs that count times the outputs that they reach. All inputs of a group reach as many, so that a kernel of
    ones over their sum tells."""
    if isinstance(layer, nn.Linear):
        return float(values.sum(dtype=torch.float64)) * layer.out_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    summed = values.sum(1, keepdim=True, dtype=torch.float64)
    ones = summed.new_ones(1, 1, *layer.kernel_size)
    reached = _CONVOLVE[type(layer)](summed, ones, None, layer.stride, layer.padding, layer.dilation)
    return float(reached.sum()) * (layer.out_channels // layer.groups)


def _pads(layer: nn.Module | None) -> tuple[tuple[int, int], ...] | None:
    """A layer's own padding; None if it is given as a text. A graph's may be larger: zeros that the network puts round
    its input before."""
    padding = getattr(layer, "padding", ())
    return None if isinstance(padding, str) else tuple((pad, pad) for pad in padding)


def _compare(name: str, what: str, ops: float, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= ops <= bounds[1]:
        wanted = " to ".join(f"{bound:,.0f}" for bound in dict.fromkeys(bounds))
        raise CountError(_message(name, f"operations {what}: the graph counts {ops:,.0f}, PyTorch {wanted}"))


def _message(name: str, what: str) -> str:
    return (
        f"layer {name!r}, {what}; energies would be wrong, and nothing was written. Please report this, with the "
        "network; --check 0 leaves the checks out"
    )
