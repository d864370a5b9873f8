"""Convolution, BN and neurons in training, with BN, the residual sum and the LIF sequence as one function.

What is computed is always

    lif(layer(x))        or        lif(layer(x) + shortcut(x'))

with layers that end in a BN. In training the BN are taken out of their layers, and all behind the convolutions is one
pass over memory each way, by Triton on a GPU and by numba on a CPU (`tetdeploy.kernels`): normalising,
adding and integrating apart move several times as much, and that is most of the time beside the convolutions. Wherever
the kernels do not serve, the modules are called as they are: in inference, in torch.export and torch.compile, with BN
over the ranks of a group, with other neurons or other BN, with hooks on the modules, in float64; on a GPU at more than
16 steps; on a CPU in float16 and where a convolution's output does not lie channels-last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdeploy import kernels
from tetdeploy.arguments import check_count
from tetdeploy.kernels import BNLIFKernels
from tetdeploy.layers import DirectEncoding, Layer, OverTime, has_hooks, tdBN
from tetdeploy.neurons import IF, LIF


def fire(lif: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """`lif(layer(x))`: `[T, N, ...]` to spikes `[T, N, C, H, W]`, where `layer` is `OverTime` with a BN at its end."""
    bn = _bn_to_fuse(OverTime, layer, lif, x)
    if bn is None:
        spikes: Tensor = lif(layer(x))
        return spikes
    return _fire_fused(lif, layer, bn, x)


def fire_sum(lif: nn.Module, layer: nn.Module, x: Tensor, shortcut: nn.Module, skipped: Tensor) -> Tensor:
    """`lif(layer(x) + shortcut(skipped))`, `[T, N, C, H, W]`: see `fire`; `shortcut` is another such layer, or
    `nn.Identity`. `x` and `skipped` are `[T, N, ...]`, and both terms must have one shape."""
    each_recomputes = any(isinstance(part, Layer) and part.recomputes for part in (layer, shortcut))
    bn = None if each_recomputes else _bn_to_fuse(OverTime, layer, lif, x)  # they are blocks of their own
    identity = type(shortcut) is nn.Identity and not has_hooks(shortcut)
    residual_bn = None if identity else _bn_to_fuse(OverTime, shortcut, lif, x)
    if bn is None or (residual_bn is None and not identity):
        spikes: Tensor = lif(layer(x) + shortcut(skipped))
        return spikes
    y, residual = _before_bn(layer, x.flatten(0, 1)), skipped.flatten(0, 1)
    if not identity:
        residual = _before_bn(shortcut, residual)
    return bn_lif(y, bn, lif, T=len(x), residual=residual, residual_bn=residual_bn)


def fire_encoded(lif: nn.Module, encode: nn.Module, x: Tensor, T: int | None = None) -> Tensor:
    """`lif(encode(x, T))` for `DirectEncoding`: images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to spikes
    `[T, N, C', H', W']`. The current of an image is computed once and serves all T steps.

    Raises:
        ValueError: images without T, a T that is no number of steps, or that is not the frames'; any other shape.
    """
    bn = _bn_to_fuse(DirectEncoding, encode, lif, x)
    if bn is not None and x.dim() == 5 and T in (None, len(x)):
        return _fire_fused(lif, encode, bn, x)
    if bn is not None and x.dim() == 4 and T is not None:
        return bn_lif(_before_bn(encode, x), bn, lif, T=check_count("T", T), repeated=True)
    spikes: Tensor = lif(encode(x, T))  # which refuses what is neither
    return spikes


def fire_each(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The layers one after the other, `[T, N, ...]` to `[T, N, ...]`; neurons together with the layer in front of them,
    see `fire`."""
    modules = [*layers]
    while modules:
        layer = modules.pop(0)
        x = fire(modules.pop(0), layer, x) if modules and isinstance(modules[0], LIF) else layer(x)
    return x


class FiringSequential(nn.Sequential):
    """`nn.Sequential` of layers and neurons in turn."""

    def forward(self, x: Tensor) -> Tensor:
        return fire_each(self, x)


def bn_lif(
    y: Tensor,
    bn: nn.BatchNorm2d,
    lif: nn.Module,
    *,
    T: int,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm2d | None = None,
    repeated: bool = False,
) -> Tensor:
    """Spikes of neurons behind a BN: lif(bn(y)), lif(bn(y) + residual) or lif(bn(y) + residual_bn(residual)).

    Fused where the kernels serve, else by these modules. The fused current is not rounded to the tensors' type on its
    way, as it is between modules. What is kept for backward is y, the residual, and four numbers a channel.

    Args:
        y: `[T * N, C, H, W]`, T outermost; `[N, C, H, W]` if `repeated`: then it is the same at each of the T steps.
        residual: shaped like y.

    Returns:
        Spikes `[T, N, C, H, W]` in the dtype and the memory format of y.
    """
    spikes: Tensor
    if _kernels_serve(y, bn, lif, residual, residual_bn, T, repeated):
        other = (None, None) if residual_bn is None else (residual_bn.weight, residual_bn.bias)
        spikes = _BNLIF.apply(y, residual, bn.weight, bn.bias, *other, (bn, residual_bn), lif, T, repeated)  # type: ignore[no-untyped-call]
        return spikes
    current = bn(y)
    if residual is not None:
        current = current + (residual if residual_bn is None else residual_bn(residual))
    spikes = lif(current.expand(T, *current.shape) if repeated else current.unflatten(0, (T, len(y) // T)))
    return spikes


class _BNLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d | None],
        lif: LIF,
        T: int,
        repeated: bool,
    ) -> Tensor:
        compiled = kernels.for_bn_lif(y)
        assert compiled is not None
        y = _dense(y)
        residual = None if residual is None else _like(residual, y)
        norm = _statistics(compiled, y, norms[0])
        residual_norm = None if norms[1] is None or residual is None else _statistics(compiled, residual, norms[1])
        shape = (T, *y.shape) if repeated else (T, len(y) // T, *y.shape[1:])
        step = y.numel() if repeated else y.numel() // T
        spikes = torch.empty_strided(shape, (step, *y.stride()), dtype=y.dtype, device=y.device)
        compiled.forward(y, norm, residual, residual_norm, spikes, lif.tau, lif.v_th)
        ctx.save_for_backward(y, residual, norm, residual_norm)
        ctx.lif = (lif.tau, lif.v_th, lif.gamma)
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor | None, ...]:
        y, residual, norm, residual_norm = ctx.saved_tensors
        compiled = kernels.for_bn_lif(y)
        assert compiled is not None
        g, sums = compiled.backward(y, norm, residual, residual_norm, _steps_like(grad_spikes, y), *ctx.lif)
        identity = residual is not None and residual_norm is None
        free = not (identity and ctx.needs_input_grad[1])  # g is not the gradient of a residual as well
        if residual_norm is None:
            grad_y = g if free else torch.empty_like(g)
            compiled.norm_backward(g, y, norm, sums[0], sums[1], into=grad_y)
            return grad_y, g if identity else None, sums[1], sums[0], *[None] * 6
        grad_y = torch.empty_like(g)
        compiled.norm_backward(g, y, norm, sums[0], sums[1], into=grad_y)
        compiled.norm_backward(g, residual, residual_norm, sums[0], sums[2], into=g)
        return grad_y, g, sums[1], sums[0], sums[2], sums[0].clone(), *[None] * 4


def _statistics(compiled: BNLIFKernels, y: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """Of the batch; the running ones are moved as `nn.BatchNorm2d` moves them."""
    assert bn.running_mean is not None and bn.running_var is not None and bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    momentum = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return compiled.statistics(y, *vectors, momentum=momentum, eps=bn.eps)


def _fire_fused(lif: nn.Module, layer: nn.Module, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`lif(layer(x))` of `[T, N, ...]`, where `_bn_to_fuse` found that BN at the layer's end."""
    assert isinstance(layer, Layer)
    return layer.within(lambda x: bn_lif(_before_bn(layer, x.flatten(0, 1)), bn, lif, T=len(x)), x)


def _bn_to_fuse(kind: type[Layer], layer: nn.Module, lif: nn.Module, x: Tensor) -> nn.BatchNorm2d | None:
    """The BN at the end of a layer, if it may be taken out of it."""
    if not isinstance(layer, kind) or not (type(layer) is kind or layer.recomputes):
        return None
    if torch.compiler.is_compiling():  # asked first: torch.compile cannot trace the search for kernels
        return None
    if not (type(lif) in (LIF, IF) and kernels.for_bn_lif(x)):
        return None
    bn = [None, *layer][-1]
    if type(bn) not in (tdBN, nn.BatchNorm2d) or not bn.training:
        return None
    return None if any(map(has_hooks, (lif, layer, bn))) else bn


def _kernels_serve(
    y: Tensor,
    bn: nn.BatchNorm2d,
    lif: nn.Module,
    residual: Tensor | None,
    residual_bn: nn.BatchNorm2d | None,
    T: int,
    repeated: bool,
) -> bool:
    compiled = None if torch.compiler.is_compiling() else kernels.for_bn_lif(y)
    if compiled is None or y.dim() != 4:
        return False
    if type(lif) is not LIF and type(lif) is not IF:
        return False
    lif.check()
    same = residual is None or (residual.dtype == y.dtype and residual.shape == y.shape and not repeated)
    norms = [bn] if residual_bn is None else [bn, residual_bn]
    return same and compiled.serves(y, T) and y.numel() > y.shape[1] and all(map(_may_be_fused, norms))


def _may_be_fused(bn: nn.BatchNorm2d) -> bool:
    """In training, with affine parameters and running statistics in float32."""
    tensors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return bn.training and bn.track_running_stats and all(t is not None and t.dtype == torch.float32 for t in tensors)


def _before_bn(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Sequential)
    for module in [*layer][:-1]:
        x = module(x)
    return x


def _dense(y: Tensor) -> Tensor:
    """`[N, C, H, W]`, channels-last or contiguous as it is, else contiguous."""
    return y if y.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def _like(tensor: Tensor, y: Tensor) -> Tensor:
    """A copy only where it does not lie in memory as y does."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _steps_like(sequence: Tensor, y: Tensor) -> Tensor:
    """The same for `[T, N, C, H, W]`."""
    steps: Tensor = _like(sequence.flatten(0, 1), y).unflatten(0, sequence.shape[:2])
    return steps
