"""BN, the residual sum and the LIF sequence in one pass over memory each way, in Triton.

Apart they read and write the currents several times. Here the currents never exist in memory: `_forward` reads what
the convolution wrote and writes spikes, and `_backward` computes currents and membranes again, bit for bit (no
contraction into fused multiply-adds). Statistics, currents and membranes are float32 whatever the tensors' type.

One step of a tensor lies in memory as `[outer, C, inner]`: channels-last is inner = 1, contiguous is inner = H W. A
program takes a tile of positions by channels, position p being (p // inner, p % inner), and sums over its positions
in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetdeploy.kernels.triton_lif import NOT_FUSED, STEPS, fire, integrate, jit, step_backward, values

MAX_POSITIONS = 2**30  # of all steps: positions are counted in 32 bits, offsets in 64
_PROGRAMS, _MAX_SLABS = 1024, 512  # of a kernel that sums; of one channel's positions


@jit
def _offsets(p: tl.tensor, c: tl.tensor, C: tl.tensor, inner: tl.tensor) -> tl.tensor:
    return ((p // inner).to(tl.int64) * C * inner + p % inner)[:, None] + (c.to(tl.int64) * inner)[None, :]


@jit
def _tile_of_program(C: tl.tensor, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tuple:
    """Channels and positions of a program of `_grid_of_tiles`."""
    program, blocks = tl.program_id(0), tl.cdiv(C, CHANNELS)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return c, program // blocks * POSITIONS + tl.arange(0, POSITIONS)


@jit
def _affine(y: tl.tensor, norm: tl.tuple) -> tl.tensor:
    return (y - norm[0]) * (norm[1] * norm[2]) + norm[3]


@jit
def _normalised(y: tl.tensor, norm: tl.tuple) -> tl.tensor:
    return (y - norm[0]) * norm[1]


@jit
def _channels_of(norm: tl.tensor, c: tl.tensor, C: tl.tensor) -> tl.tuple:
    """Mean, 1 / standard deviation, weight and bias of a tile's channels, `[1, CHANNELS]` each, from `[4, C]`."""
    i, inside = c[None, :], (c < C)[None, :]
    return (
        values(norm, i, inside),
        values(norm + C, i, inside),
        values(norm + 2 * C, i, inside),
        values(norm + 3 * C, i, inside),
    )


@jit
def _norms_of(norm: tl.tensor, residual_norm: tl.tensor, c: tl.tensor, C: tl.tensor) -> tl.tuple:
    """Those of the BN and of the residual's; where that is None, twice the former: Triton 3.6 returns no None."""
    own = _channels_of(norm, c, C)
    other = own
    if residual_norm is not None:
        other = _channels_of(residual_norm, c, C)
    return own, other


@jit
def _current(
    y: tl.tensor,
    own: tl.tuple,
    residual: tl.tensor,
    residual_norm: tl.tensor,
    other: tl.tuple,
    i: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """BN, plus the residual: nothing, a tensor, or a tensor with a BN of its own, whose channels are `other`."""
    current = _affine(values(y, i, inside), own)
    if residual_norm is not None:
        current += _affine(values(residual, i, inside), other)
    elif residual is not None:
        current += values(residual, i, inside)
    return current


@jit
def _statistics(
    y: tl.tensor,
    partial: tl.tensor,
    positions: tl.tensor,
    C: tl.tensor,
    inner: tl.tensor,
    slab: tl.tensor,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Count, mean and sum of squared deviations of a slab of positions, by Welford's recurrence in each lane."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * slab
    mean = tl.full([POSITIONS, CHANNELS], 0.0, tl.float32)
    squares, count, steps = mean, mean, 0.0
    for start in range(0, slab, POSITIONS):
        p = first + start + tl.arange(0, POSITIONS)
        inside = (p < positions)[:, None] & (c < C)[None, :]
        x = values(y, _offsets(p, c, C, inner), inside)
        steps += 1.0
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / steps)  # one division for all: this pass should wait for memory alone
        squares += delta * (x - mean)
        count += inside.to(tl.float32)
    n = tl.sum(count, 0)
    m = tl.sum(count * mean, 0) / tl.maximum(n, 1.0)
    deviation = mean - m[None, :]
    into = partial + tl.program_id(1) * 3 * C + c
    tl.store(into, n, mask=c < C)
    tl.store(into + C, m, mask=c < C)
    tl.store(into + 2 * C, tl.sum(squares + count * deviation * deviation, 0), mask=c < C)


@jit
def _merge(
    partial: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    norm: tl.tensor,
    C: tl.tensor,
    slabs: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    SLABS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """All slabs' statistics in one (Chan, Golub and LeVeque, Am. Stat. 1983); moves the running ones, as BN does."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    s = tl.arange(0, SLABS)
    known = c < C
    inside = (s < slabs)[:, None] & known[None, :]
    i = s[:, None] * 3 * C + c[None, :]
    count, means = values(partial, i, inside), values(partial + C, i, inside)
    n = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(count * means, 0) / n
    deviation = means - mean[None, :]
    squares = tl.sum(values(partial + 2 * C, i, inside) + count * deviation * deviation, 0)
    old_mean, old_var = values(running_mean, c, known), values(running_var, c, known)
    tl.store(running_mean + c, momentum * mean + (1.0 - momentum) * old_mean, mask=known)
    tl.store(running_var + c, momentum * (squares / tl.maximum(n - 1.0, 1.0)) + (1.0 - momentum) * old_var, mask=known)
    tl.store(norm + c, mean, mask=known)
    tl.store(norm + C + c, 1.0 / tl.sqrt_rn(squares / n + eps), mask=known)
    tl.store(norm + 2 * C + c, values(weight, c, known), mask=known)
    tl.store(norm + 3 * C + c, values(bias, c, known), mask=known)


@jit
def _forward(
    y: tl.tensor,
    norm: tl.tensor,
    residual: tl.tensor,
    residual_norm: tl.tensor,
    spikes: tl.tensor,
    positions: tl.tensor,
    C: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    step: tl.tensor,
    tau: tl.tensor,
    v_th: tl.tensor,
    T: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Eqs. 1-3 of BN and residual. From step to step is `step` in memory, in y `stride`: 0 where one serves all."""
    c, p = _tile_of_program(C, POSITIONS, CHANNELS)
    inside = (p < positions)[:, None] & (c < C)[None, :]
    i = _offsets(p, c, C, inner)
    own, other = _norms_of(norm, residual_norm, c, C)
    membrane = tl.full([POSITIONS, CHANNELS], 0.0, tl.float32)
    for _ in tl.static_range(T):
        h = integrate(membrane, _current(y, own, residual, residual_norm, other, i, inside), tau)
        s = fire(h, v_th)
        tl.store(spikes + i, s.to(spikes.dtype.element_ty), mask=inside)
        membrane = h - h * s
        y += stride
        spikes += step
        if residual is not None:
            residual += step


@jit
def _backward(
    y: tl.tensor,
    norm: tl.tensor,
    residual: tl.tensor,
    residual_norm: tl.tensor,
    grad_spikes: tl.tensor,
    grad_current: tl.tensor,
    partial: tl.tensor,
    positions: tl.tensor,
    C: tl.tensor,
    inner: tl.tensor,
    stride: tl.tensor,
    step: tl.tensor,
    slab: tl.tensor,
    tau: tl.tensor,
    v_th: tl.tensor,
    gamma: tl.tensor,
    height: tl.tensor,
    T: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REPEATED: tl.constexpr,
) -> None:
    """Writes g = dL/dI, summed over the steps where they are REPEATED, and per slab and channel sum g, sum g xhat and
    the latter for the residual's BN."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    own, other = _norms_of(norm, residual_norm, c, C)
    zero = tl.full([POSITIONS, CHANNELS], 0.0, tl.float32)
    sum_g, sum_gx, sum_gx_other = zero, zero, zero
    for start in range(0, slab, POSITIONS):
        p = tl.program_id(1) * slab + start + tl.arange(0, POSITIONS)
        inside = (p < positions)[:, None] & (c < C)[None, :]
        i = _offsets(p, c, C, inner)
        y_t, residual_t, grad_spikes_t, grad_current_t = y, residual, grad_spikes, grad_current
        membrane = zero
        hs: tl.tuple = ()
        for _ in tl.static_range(T):
            h = integrate(membrane, _current(y_t, own, residual_t, residual_norm, other, i, inside), tau)
            membrane = h - h * fire(h, v_th)
            hs = hs + (h,)  # noqa: RUF005 - Triton knows no unpacking
            y_t += stride
            grad_spikes_t += step
            grad_current_t += step
            if residual is not None:
                residual_t += step
        g, total = zero, zero
        for k in tl.static_range(T):
            y_t -= stride
            grad_spikes_t -= step
            grad_current_t -= step
            g = step_backward(hs[T - 1 - k], g, values(grad_spikes_t, i, inside), v_th, gamma, height)
            total += g
            if not REPEATED:
                tl.store(grad_current_t + i, g.to(grad_current.dtype.element_ty), mask=inside)
                sum_gx += g * _normalised(values(y_t, i, inside), own)
            if residual_norm is not None:
                residual_t -= step
                sum_gx_other += g * _normalised(values(residual_t, i, inside), other)
            g = g * tau
        sum_g += total
        if REPEATED:
            tl.store(grad_current + i, total.to(grad_current.dtype.element_ty), mask=inside)
            sum_gx += total * _normalised(values(y, i, inside), own)
    into = partial + tl.program_id(1) * 3 * C + c
    tl.store(into, tl.sum(sum_g, 0), mask=c < C)
    tl.store(into + C, tl.sum(sum_gx, 0), mask=c < C)
    if residual_norm is not None:
        tl.store(into + 2 * C, tl.sum(sum_gx_other, 0), mask=c < C)


@jit
def _norm_backward(
    g: tl.tensor,
    y: tl.tensor,
    norm: tl.tensor,
    sum_g: tl.tensor,
    sum_gx: tl.tensor,
    grad_y: tl.tensor,
    positions: tl.tensor,
    C: tl.tensor,
    inner: tl.tensor,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """w / sigma (g - mean(g) - xhat mean(g xhat)), the means over all positions; may be written over g."""
    c, p = _tile_of_program(C, POSITIONS, CHANNELS)
    inside = (p < positions)[:, None] & (c < C)[None, :]
    i = _offsets(p, c, C, inner)
    own = _channels_of(norm, c, C)
    mean_g = values(sum_g, c, c < C)[None, :] / positions
    mean_gx = values(sum_gx, c, c < C)[None, :] / positions
    gradient = values(g, i, inside) - mean_g - _normalised(values(y, i, inside), own) * mean_gx
    tl.store(grad_y + i, (own[1] * own[2] * gradient).to(grad_y.dtype.element_ty), mask=inside)


def serves(y: Tensor, T: int) -> bool:
    """Whether the kernels take what a convolution wrote, `[N, C, H, W]`, and so many steps."""
    return T <= STEPS and y.numel() // max(y.shape[1], 1) < MAX_POSITIONS


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
    layout = _layout(y)
    positions, C = y.numel() // y.shape[1], y.shape[1]
    tile = _tile(layout, 1024)
    slab, slabs = _slabs(positions, C, tile)
    partial = y.new_empty((slabs, 3, C), dtype=torch.float32)
    norm = y.new_empty((4, C), dtype=torch.float32)
    vectors = (weight, bias, running_mean, running_var, norm)
    with torch.cuda.device_of(y):
        _statistics[_grid_of_slabs(slabs, C, tile)](y, partial, positions, *layout, slab, **tile, **NOT_FUSED)
        _merge[(triton.cdiv(C, 8),)](
            partial, *vectors, C, slabs, momentum, eps, SLABS=triton.next_power_of_2(slabs), CHANNELS=8, **NOT_FUSED
        )
    return norm


def forward(
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    spikes: Tensor,
    tau: float,
    v_th: float,
) -> None:
    """Spikes `[T, N, C, H, W]` of y `[T N, C, H, W]`, or of `[N, C, H, W]` at each step; residual like the spikes.

    All lie in memory as y does.
    """
    layout, T = _layout(y), len(spikes)
    tile = _tile(layout, 1024)
    positions, stride, step = _steps(y, spikes)
    with torch.cuda.device_of(y):
        _forward[_grid_of_tiles(positions, y.shape[1], tile)](
            *(y, norm, residual, residual_norm, spikes, positions, *layout, stride, step),
            *(tau, v_th),
            T=T,
            **tile,
            **NOT_FUSED,
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
    layout, T = _layout(y), len(grad_spikes)
    tile = _tile(layout, _backward_size(T, residual_norm is not None))
    positions, stride, step = _steps(y, grad_spikes)
    C = y.shape[1]
    slab, slabs = _slabs(positions, C, tile)
    partial = y.new_empty((slabs, 3, C), dtype=torch.float32)
    grad_current = torch.empty_like(y)
    tensors = (y, norm, residual, residual_norm, grad_spikes, grad_current, partial)
    with torch.cuda.device_of(y):
        _backward[_grid_of_slabs(slabs, C, tile)](
            *(*tensors, positions, *layout, stride, step, slab, tau, v_th, gamma, 1.0 / gamma**2),
            T=T,
            REPEATED=stride == 0,
            **tile,
            **NOT_FUSED,
        )
    return grad_current, partial.sum(0)


def norm_backward(g: Tensor, y: Tensor, norm: Tensor, sum_g: Tensor, sum_gx: Tensor, *, into: Tensor) -> None:
    """dL/dy through the statistics as well, from g = dL/dI; `into` may be g."""
    layout = _layout(y)
    tile = _tile(layout, 1024)
    positions = y.numel() // y.shape[1]
    with torch.cuda.device_of(y):
        _norm_backward[_grid_of_tiles(positions, y.shape[1], tile)](
            g, y, norm, sum_g, sum_gx, into, positions, *layout, **tile, **NOT_FUSED
        )


def _layout(y: Tensor) -> tuple[int, int]:
    """C and inner of dense `[N, C, H, W]`."""
    last = y.is_contiguous(memory_format=torch.channels_last)
    assert last or y.is_contiguous()
    return y.shape[1], 1 if last else y.shape[2] * y.shape[3]


def _tile(layout: tuple[int, int], size: int) -> dict[str, Any]:
    """Positions by channels of a program: as many channels as lie side by side, up to 64."""
    C, inner = layout
    channels = min(64, triton.next_power_of_2(C)) if inner == 1 else 1
    return {"POSITIONS": size // channels, "CHANNELS": channels}


def _backward_size(T: int, has_residual_norm: bool) -> int:
    """Positions times channels of a program of `_backward`: as many as its registers suffice for.

    Each thread keeps T membranes of each position and what was loaded ahead. At T > 8 ptxas spilled up to 560 bytes a
    thread of 512 (4 a thread), and with a residual's BN 160 of 256.
    """
    if T <= 8:
        return 1024 if T <= 4 else 512
    return 128 if has_residual_norm else 256


def _grid_of_tiles(positions: int, C: int, tile: dict[str, Any]) -> tuple[int]:
    """All tiles on one axis, side by side in C: CUDA's other two end at 65,535, its first at 2^31 - 1."""
    return (triton.cdiv(C, tile["CHANNELS"]) * triton.cdiv(positions, tile["POSITIONS"]),)


def _grid_of_slabs(slabs: int, C: int, tile: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(C, tile["CHANNELS"]), slabs  # of which there are `_MAX_SLABS` at most


def _slabs(positions: int, C: int, tile: dict[str, Any]) -> tuple[int, int]:
    """Positions that one program sums over, and how many programs a channel has: the same on every GPU."""
    wanted = min(_MAX_SLABS, max(1, _PROGRAMS // triton.cdiv(C, tile["CHANNELS"])))
    slab = triton.cdiv(triton.cdiv(positions, wanted), tile["POSITIONS"]) * tile["POSITIONS"]
    return slab, triton.cdiv(positions, slab)


def _steps(y: Tensor, sequence: Tensor) -> tuple[int, int, int]:
    """Positions of a step, and what lies from step to step in y (0: it is one current for all) and in the others."""
    step = sequence.numel() // len(sequence)
    return step // y.shape[1], 0 if y.numel() < sequence.numel() else step, step
