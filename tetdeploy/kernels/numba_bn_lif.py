"""BN, the residual sum and the LIF sequence in one pass over memory each way, on a CPU, compiled by numba.

What `triton_bn_lif` is on a GPU, with the same functions: the currents never exist in memory, `forward` reads what the
convolution wrote and writes spikes, and `backward` computes currents and membranes again, bit for bit. Statistics,
currents and membranes are float32 whatever the tensors' type. Sums are taken in an order that follows from the shape
alone, not from the number of threads. The kernels, and how they go through memory: `numba_kernels`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tetdeploy.kernels import numba_kernels as kernels
from tetdeploy.kernels.numba_kernels import Array, memory, threads

_BLOCK = 1024  # numbers; of T = 8 steps a block's membranes take 32 kB, and stay in the innermost cache
_SLABS = 64  # of a sum at most, which are as many threads as can share it


def serves(y: Tensor, T: int) -> bool:
    """Whether the kernels take what a convolution wrote: float32 or bfloat16 `[N, C, H, W]`, channels-last."""
    return y.dtype in (torch.float32, torch.bfloat16) and y.is_contiguous(memory_format=torch.channels_last)


def statistics(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float,
    eps: float,
) -> Tensor:
    """Mean, 1 / standard deviation, weight and bias of each channel of `y [N, C, H, W]`: `[4, C]`, float32.

    The running statistics, float32, are moved in place by `momentum`, the variance without its bias.
    """
    numbers, C = _step(y), y.shape[1]
    sums = _sums(numbers.size, C, 2)
    with threads():
        kernels.statistics(numbers, sums)
        mean, squares = kernels.merged(sums, numbers.size, C)
    n = numbers.size // C
    mean_, variance = torch.from_numpy(mean).float(), torch.from_numpy(squares / max(n - 1, 1)).float()
    running_mean.lerp_(mean_, momentum)
    running_var.lerp_(variance, momentum)
    deviations = torch.from_numpy(1 / np.sqrt(squares / n + eps)).float()
    return torch.stack([mean_, deviations, weight.detach(), bias.detach()])


def forward(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    spikes: Tensor,
    tau: float,
    v_th: float,
) -> None:
    """Spikes `[T, N, C, H, W]` of y `[T N, C, H, W]`, or of `[N, C, H, W]` at each step; residual like the spikes."""
    T, length = len(spikes), _length(y.shape[1])
    sequences = _sequences(y, norm, residual, residual_norm, spikes)
    with threads():
        kernels.bn_lif(
            *sequences, _step(spikes.flatten(0, 1)).reshape(T, -1), length, np.float32(tau), np.float32(v_th)
        )


def backward(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    grad_spikes: Tensor,
    tau: float,
    v_th: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """dL/dI, like y, and `[3, C]`: its sum, its sum times y normalised, its sum times the residual normalised.

    The last is undefined without a BN of the residual.
    """
    T, C = len(grad_spikes), y.shape[1]
    incoming = _step(grad_spikes.flatten(0, 1)).reshape(T, -1)
    sums = _sums(incoming.shape[1], C, 3)
    grad_current = torch.empty_like(y)
    sequences = _sequences(y, norm, residual, residual_norm, grad_spikes)
    parameters = (np.float32(tau), np.float32(v_th), np.float32(gamma))
    with threads():
        kernels.bn_lif_backward(*sequences, incoming, _steps(grad_current, grad_spikes), sums, *parameters)
        total = torch.from_numpy(kernels.folded(sums, C)).float()
    total[1] *= norm[1]
    if residual_norm is not None:
        total[2] *= residual_norm[1]
    return grad_current, total


def norm_backward(g: Tensor, y: Tensor, norm: Tensor, sum_g: Tensor, sum_gx: Tensor, *, into: Tensor) -> None:
    """dL/dy through the statistics as well, from g = dL/dI; `into` may be g."""
    length, positions = _length(y.shape[1]), y.numel() // y.shape[1]
    scale = norm[1] * norm[2]
    factors = torch.stack([scale, scale * sum_g / positions, scale * norm[1] * sum_gx / positions])
    with threads():
        kernels.bn_backward(_step(g), _step(y), _lanes(norm, length), _tiled(factors, length), _step(into), length)


def _length(C: int) -> int:
    """Numbers of a block: whole positions."""
    return C * max(1, _BLOCK // C)


def _sums(numbers: int, C: int, kinds: int) -> Array:
    """For the sums of each lane of each slab: `[slabs, kinds, length]`."""
    length = _length(C)
    return np.empty((min(_SLABS, -(-numbers // length)), kinds, length), np.float32)


def _step(y: Tensor) -> Array:
    """`[N, C, H, W]` as it lies in memory, `[N H W C]`."""
    return memory(y.permute(0, 2, 3, 1).view(-1))


def _steps(y: Tensor, sequence: Tensor) -> Array:
    """The same, `[T, M]`, or `[1, M]` where y is one current for all steps of the sequence."""
    return _step(y).reshape(1 if y.numel() < sequence.numel() else len(sequence), -1)


def _sequences(
    y: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, like: Tensor
) -> tuple[Array, Array, Array, Array]:
    """What the kernels compute the current of: without rows, but with the same types, where there is no such thing."""
    length = _length(y.shape[1])
    y_, lanes = _steps(y, like), _lanes(norm, length)
    residual_ = y_[:0] if residual is None else _steps(residual, like)
    return y_, lanes, residual_, lanes[:0] if residual_norm is None else _lanes(residual_norm, length)


def _lanes(norm: Tensor, length: int) -> Array:
    """Mean, scale and bias of each number of a block, `[3, length]`."""
    return _tiled(torch.stack([norm[0], norm[1] * norm[2], norm[3]]), length)


def _tiled(vectors: Tensor, length: int) -> Array:
    return memory(vectors.repeat(1, length // vectors.shape[1]))
