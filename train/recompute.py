"""Activation checkpointing: less memory for more time (`--recompute`).

Training keeps what every layer computed until backward has used it: memory grows with depth times T. A network whose
blocks recompute keeps only what goes into each block, and computes a block once more when backward reaches it: one more
forward pass in all, for the memory of one block. (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.)

A block is whatever lies between two neuron layers of an `nn.Sequential`: a residual block, or conv-BN-LIF. A network
that names its layers one by one has no such chain: then each convolution with its BN is a block, and with the neurons
behind it where these are fused with the BN.

torch's checkpoint runs BN twice and would let it count every batch twice
(https://github.com/pytorch/pytorch/issues/96136); here the second pass leaves the running statistics alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tetdeploy.fused_bn import FiringSequential, fire_each
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.neurons import LIF

_NEURONS = (LIF, nn.ReLU)  # an ANN twin has ReLU where the network has neurons


class _RecomputedSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return _in_blocks(self, _each, x)


class _RecomputedFiring(FiringSequential):
    def forward(self, x: Tensor) -> Tensor:
        return _in_blocks(self, fire_each, x)


class _RecomputedOverTime(OverTime):
    recomputes = True

    def within(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _checkpointed(run, [self], x)

    def forward(self, x: Tensor) -> Tensor:
        return self.within(super().forward, x)


class _RecomputedEncoding(DirectEncoding):
    recomputes = True

    def within(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of images one step serves all T: there is little to save."""
        return _checkpointed(run, [self], x) if x.dim() == 5 else run(x)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        return self.within(partial(super().forward, T=T), x)


_RECOMPUTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: _RecomputedSequential,
    FiringSequential: _RecomputedFiring,
    OverTime: _RecomputedOverTime,
    DirectEncoding: _RecomputedEncoding,
}


def recompute_blocks(network: nn.Module) -> list[str]:
    """Make a network's blocks recompute their insides in backward, in place.

    Loss, gradients and BN's running statistics are those of the plain network, on a CPU bit for bit (where a residual
    sum of two layers outside of any `nn.Sequential` is fused in the plain one, to rounding); the state dict and
    inference stay as they are.

    Args:
        network: built of `nn.Sequential`, `OverTime` and `DirectEncoding`; other modules are entered and left alone.

    Returns:
        The names of the modules that recompute now.

    Raises:
        ValueError: there is none.
    """
    modules = dict(_outermost(network, ""))
    for module in modules.values():
        module.__class__ = _RECOMPUTED.get(type(module), type(module))
    if not modules:
        raise ValueError(
            f"{type(network).__name__} has nothing to recompute: no nn.Sequential, OverTime or DirectEncoding with BN "
            "or neurons in it; train it without --recompute"
        )
    return list(modules)


def _outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are to recompute, with their names; what lies inside one of them belongs to its blocks."""
    known = type(module) in (*_RECOMPUTED, *_RECOMPUTED.values())
    if known and _holds(module, (_BatchNorm, *_NEURONS)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}".lstrip("."))


def _blocks(layers: nn.Sequential) -> Iterator[list[nn.Module]]:
    """The layers in runs, each of which ends with neurons."""
    block: list[nn.Module] = []
    for layer in layers:
        block.append(layer)
        if _holds(layer, _NEURONS):
            yield block
            block = []
    if block:
        yield block


def _in_blocks(layers: nn.Sequential, run: Callable[[list[nn.Module], Tensor], Tensor], x: Tensor) -> Tensor:
    for block in _blocks(layers):
        x = _checkpointed(partial(run, block), block, x)
    return x


def _each(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _checkpointed(run: Callable[[Tensor], Tensor], block: list[nn.Module], x: Tensor) -> Tensor:
    """Apply a block's layers, which is what `run` does; in training keep only `x` for backward."""
    if not torch.is_grad_enabled() or not any(layer.training for layer in block):
        return run(x)  # inference and export
    norms = [module for layer in block for module in layer.modules() if isinstance(module, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(norms)

    y: Tensor = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
    return y


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Within it these BN count into copies: switched off, they would keep two tensors less than in the first pass."""
    counted = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, counted, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, counted, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def _holds(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(inner, kinds) for inner in module.modules())
