"""tdBN over the ranks of a group: the mean and variance of the global batch, on CPUs as on GPUs.

PyTorch's SyncBatchNorm refuses the CPU. Each rank r has n_r values a channel with mean m_r and variance v_r; over all

    m = sum_r n_r m_r / n        v = sum_r n_r (v_r + (m_r - m)^2) / n        n = sum_r n_r

(Chan, Golub and LeVeque, Am. Stat. 1983), and backward, with the sums over the values of all ranks,

    dL/dx = w / sqrt(v + eps) * (g - sum(g) / n - xhat sum(g xhat) / n)

One gather forward and one sum backward; what is kept for backward is what plain BN keeps.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tetdeploy.layers import tdBN


def over_ranks(classifier: nn.Module, *, find_unused: bool) -> nn.Module:
    """What a training step calls in place of the classifier: its gradients are means over all ranks.

    The classifier's BN are synchronised, in place; buffers need no other exchange.

    Args:
        find_unused: a step may leave parameters out, and so leaves them as they are. Each step then looks for them, and
            PyTorch warns, once a process, if the first leaves out none.
    """
    synchronise_bn(classifier)
    options = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # before torch 2.13
    return DistributedDataParallel(
        classifier,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        **{buffers: False},  # type: ignore[arg-type]
    )


def synchronise_bn(network: nn.Module) -> None:
    """Let every BN of a network take its statistics over all ranks in training, in place.

    Inference, the state dict and copies of the network stay as they are.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Synchronised):
            kind: Any = type(module)
            module.__class__ = _synchronised(kind)


class _Synchronised(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if x.dim() == 5 and isinstance(self, tdBN):
            steps: Tensor = self.forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return steps
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        y: Tensor
        y, mean, var, count = _GroupNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        if self.track_running_stats:
            self._count(mean, var * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _count(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the running statistics as BN does: by momentum, or to the plain mean where that is None."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


@cache
def _synchronised(kind: Any) -> Any:
    return type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})


class _GroupNorm(torch.autograd.Function):
    """x [N, C, ...] normalised over all ranks; also the mean, the biased variance and the count, float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, _but_channels(x), correction=0)
        count = mean.new_full((1,), x.numel() / x.shape[1])  # no list, whose copy would wait for the GPU
        own = torch.cat([mean, var, count])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        y = functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.dim() - 2)]
        g = grad.to(mean.dtype)
        normalised = (x - mean.view(shape)) * scale.view(shape)
        own = torch.stack([g.sum(_but_channels(x)), (g * normalised).sum(_but_channels(x))])
        sums = own / total
        dist.all_reduce(sums)
        slope = scale if weight is None else scale * weight
        grad_x = (g - sums[0].view(shape) - normalised * sums[1].view(shape)) * slope.view(shape)
        grad_bias, grad_weight = (None, None) if weight is None else own
        return grad_x, grad_weight, grad_bias, None  # autograd rounds them to the types of what they are of


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
