"""BN, the residual sum and the LIF sequence in one pass over memory each way, on a CPU, compiled by numba.

What `triton_bn_lif` is on a GPU, with the same functions: the currents never exist in memory, `_forward` reads what the
convolution wrote and writes spikes, and `_backward` computes currents and membranes again, bit for bit. Statistics,
currents and membranes are float32 whatever the tensors' type.

Tensors lie channels-last, the layout in which convolutions are the fastest on a CPU, so that one step is
`[positions, C]` in memory. It is taken in blocks of whole positions, of some thousand numbers, which stay in the
innermost cache from operation to operation; a channel's numbers are repeated to a block's length. Sums are taken over
slabs of blocks and then over the slabs, in an order that no number of threads changes.

Each loop of a kernel writes to one array or two and reads few: only then does the compiler see that they do not overlap
and takes 8 or 16 numbers at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from tetdeploy.numba_lif import Array, compiled, memory, store, threads, value

_BLOCK = 1024  # numbers; with T = 8 a block's membranes take 32 kB
_SLABS = 64  # at most, as many as sums are added up from: a number of its own for each thread that comes


def _inline(function: Any) -> Any:
    return njit(function, inline="always")


def _serial(function: Any) -> Any:
    return compiled(function, parallel=False)


@_inline
def _affine(y: Array, norm: Array, into: Array) -> None:
    """BN of a block: `norm` holds mean, scale and bias of each of its numbers."""
    mean, scale, bias = norm[0], norm[1], norm[2]
    for i in range(len(into)):
        into[i] = (value(y[i]) - mean[i]) * scale[i] + bias[i]


@_inline
def _add_affine(y: Array, norm: Array, into: Array) -> None:
    mean, scale, bias = norm[0], norm[1], norm[2]
    for i in range(len(into)):
        into[i] += (value(y[i]) - mean[i]) * scale[i] + bias[i]


@_inline
def _add(y: Array, into: Array) -> None:
    for i in range(len(into)):
        into[i] += value(y[i])


@_inline
def _add_products(g: Array, y: Array, norm: Array, into: Array) -> None:
    """g times y normalised, but for the factor 1 / standard deviation, which is one for a channel."""
    mean = norm[0]
    for i in range(len(g)):
        into[i] += g[i] * (value(y[i]) - mean[i])


@compiled
def _statistics(y: Array, length: int, slab: int, sums: Array) -> None:
    """Mean and sum of squared deviations, `[slabs, 2, length]`, of each lane of a slab's blocks, by Welford."""
    M = len(y)
    blocks = (M + length - 1) // length
    for s in prange(len(sums)):
        mean, squares = sums[s, 0], sums[s, 1]
        for i in range(length):
            mean[i] = np.float32(0)
            squares[i] = np.float32(0)
        for block in range(s * slab, min((s + 1) * slab, blocks)):
            first, part = block * length, np.float32(1) / np.float32(block - s * slab + 1)
            part_of_y = y[first : first + length]
            for i in range(len(part_of_y)):
                x = value(part_of_y[i])
                delta = x - mean[i]
                mean[i] += delta * part
                squares[i] += delta * (x - mean[i])


@_serial
def _merged(sums: Array, M: int, slab: int, C: int) -> Array:
    """Mean and sum of squared deviations of each channel, `[2, C]` in float64 (Chan, Golub and LeVeque, Am. Stat.
    1983)."""
    slabs, _, length = sums.shape
    blocks = (M + length - 1) // length
    merged = np.zeros((2, C), np.float64)
    mean, squares = merged[0], merged[1]
    for squared in range(2):
        for s in range(slabs):
            for lane in range(0, length, C):
                n = min(slab, blocks - s * slab)
                if s == slabs - 1 and (blocks - 1) * length + lane >= M:
                    n -= 1  # the last block ends before this lane
                means, deviations = sums[s, 0, lane : lane + C], sums[s, 1, lane : lane + C]
                for c in range(C):
                    if squared:
                        squares[c] += deviations[c] + n * (means[c] - mean[c]) ** 2
                    else:
                        mean[c] += n * means[c]
        if not squared:
            mean /= M // C
    return merged


@_serial
def _folded(sums: Array, C: int) -> Array:
    """Sums over slabs and lanes: `[slabs, k, length]` to `[k, C]`, added up in float64."""
    slabs, k, length = sums.shape
    total = np.zeros((k, C), np.float64)
    for s in range(slabs):
        for j in range(k):
            for lane in range(0, length, C):
                for c in range(C):
                    total[j, c] += sums[s, j, lane + c]
    return total


@compiled
def _forward(
    y: Array, norm: Array, residual: Array, residual_norm: Array, spikes: Array, length: int, tau: Any, v_th: Any
) -> None:
    """Eqs. 1-3 of BN and residual, `[T, M]`; y may be `[1, M]`, and the residual and its norm have no rows."""
    T, M = spikes.shape
    one, zero = np.float32(1), np.float32(0)
    repeated, has_residual, has_norm = len(y) == 1, len(residual) > 0, len(residual_norm) > 0
    for block in prange((M + length - 1) // length):
        first = block * length
        last = min(first + length, M)
        count = last - first
        u, current = np.zeros(count, np.float32), np.empty(count, np.float32)
        for t in range(T):
            _affine(y[0 if repeated else t, first:last], norm, current)
            if has_norm:
                _add_affine(residual[t, first:last], residual_norm, current)
            elif has_residual:
                _add(residual[t, first:last], current)
            into = spikes[t, first:last]
            for i in range(count):
                h = tau * u[i] + current[i]
                s = one if h > v_th else zero
                into[i] = store(s, into)
                u[i] = h - h * s


@compiled
def _backward(
    y: Array,
    norm: Array,
    residual: Array,
    residual_norm: Array,
    grad_spikes: Array,
    grad_current: Array,
    sums: Array,
    length: int,
    slab: int,
    tau: Any,
    v_th: Any,
    gamma: Any,
) -> None:
    """Writes g = dL/dI, summed over the steps where y is `[1, M]`, and for each slab and lane, `[slabs, 3, length]`,
    the sums of g, of g times y less its mean, and of g times the residual less its own."""
    T, M = grad_spikes.shape
    one, zero = np.float32(1), np.float32(0)
    height = one / (gamma * gamma)
    repeated, has_residual, has_norm = len(y) == 1, len(residual) > 0, len(residual_norm) > 0
    blocks = (M + length - 1) // length
    for s in prange(len(sums)):
        sums[s] = zero
        sum_g, sum_gx, sum_gx_other = sums[s, 0], sums[s, 1], sums[s, 2]
        for block in range(s * slab, min((s + 1) * slab, blocks)):
            first = block * length
            last = min(first + length, M)
            count = last - first
            hs, g, u = np.empty((T, count), np.float32), np.zeros(count, np.float32), np.zeros(count, np.float32)
            total = np.zeros(count, np.float32)
            for t in range(T):
                current = hs[t]
                _affine(y[0 if repeated else t, first:last], norm, current)
                if has_norm:
                    _add_affine(residual[t, first:last], residual_norm, current)
                elif has_residual:
                    _add(residual[t, first:last], current)
                for i in range(count):
                    h = tau * u[i] + current[i]
                    current[i] = h
                    u[i] = h - h * (one if h > v_th else zero)
            for t in range(T - 1, -1, -1):
                h_t, incoming = hs[t], grad_spikes[t, first:last]
                for i in range(count):
                    h = h_t[i]
                    kept = zero if h > v_th else one
                    surrogate = max(zero, gamma - abs(h - v_th)) * height
                    g[i] = g[i] * kept + (value(incoming[i]) - g[i] * h) * surrogate
                if has_norm:
                    _add_products(g, residual[t, first:last], residual_norm, sum_gx_other)
                if repeated:
                    for i in range(count):
                        total[i] += g[i]
                        g[i] *= tau
                else:
                    _add_products(g, y[t, first:last], norm, sum_gx)
                    into = grad_current[t, first:last]
                    for i in range(count):
                        into[i] = store(g[i], into)
                    for i in range(count):
                        sum_g[i] += g[i]
                        g[i] *= tau
            if repeated:
                _add_products(total, y[0, first:last], norm, sum_gx)
                into = grad_current[0, first:last]
                for i in range(count):
                    into[i] = store(total[i], into)
                    sum_g[i] += total[i]


@compiled
def _norm_backward(g: Array, y: Array, norm: Array, factors: Array, grad_y: Array, length: int) -> None:
    """scale (g - mean g) - (y - mean) factor, with scale, scale mean g and factor in `factors`; g may be `grad_y`."""
    M = len(y)
    for block in prange((M + length - 1) // length):
        first, last = block * length, min((block + 1) * length, M)
        g_, y_, into, gradient = g[first:last], y[first:last], grad_y[first:last], np.empty(last - first, np.float32)
        mean, scale, scaled_mean, factor = norm[0], factors[0], factors[1], factors[2]
        for i in range(len(gradient)):
            gradient[i] = value(g_[i]) * scale[i] - scaled_mean[i]
        for i in range(len(gradient)):
            gradient[i] -= (value(y_[i]) - mean[i]) * factor[i]
        for i in range(len(gradient)):
            into[i] = store(gradient[i], into)


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
    length = _length(C)
    slab, slabs = _slabs(numbers.size, length)
    sums = np.empty((slabs, 2, length), np.float32)
    with threads():
        _statistics(numbers, length, slab, sums)
        mean, squares = _merged(sums, numbers.size, slab, C)
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
        _forward(*sequences, _step(spikes.flatten(0, 1)).reshape(T, -1), length, np.float32(tau), np.float32(v_th))


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
    length = _length(C)
    incoming = _step(grad_spikes.flatten(0, 1)).reshape(T, -1)
    slab, slabs = _slabs(incoming.shape[1], length)
    sums = np.empty((slabs, 3, length), np.float32)
    grad_current = torch.empty_like(y)
    sequences = _sequences(y, norm, residual, residual_norm, grad_spikes)
    parameters = (np.float32(tau), np.float32(v_th), np.float32(gamma))
    with threads():
        _backward(*sequences, incoming, _steps(grad_current, grad_spikes), sums, length, slab, *parameters)
        folded = _folded(sums, C)
    lanes = torch.from_numpy(folded).float()
    lanes[1] *= norm[1]
    if residual_norm is not None:
        lanes[2] *= residual_norm[1]
    return grad_current, lanes


def norm_backward(g: Tensor, y: Tensor, norm: Tensor, sum_g: Tensor, sum_gx: Tensor, *, into: Tensor) -> None:
    """dL/dy through the statistics as well, from g = dL/dI; `into` may be g."""
    length, positions = _length(y.shape[1]), y.numel() // y.shape[1]
    scale = norm[1] * norm[2]
    factors = torch.stack([scale, scale * sum_g / positions, scale * norm[1] * sum_gx / positions])
    with threads():
        _norm_backward(_step(g), _step(y), _lanes(norm, length), _tiled(factors, length), _step(into), length)


def _length(C: int) -> int:
    """Numbers of a block: whole positions."""
    return C * max(1, _BLOCK // C)


def _slabs(numbers: int, length: int) -> tuple[int, int]:
    """Blocks of a slab, and how many slabs there are."""
    blocks = -(-numbers // length)
    slab = -(-blocks // _SLABS)
    return slab, -(-blocks // slab)


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
