"""The LIF sequence on a CPU as one pass over memory, compiled by numba (`numba_kernels`).

The same arithmetic as `tetdeploy.neurons` writes with torch operations, in the same order, so that spikes and membranes
have the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tetdeploy.kernels import numba_kernels as kernels
from tetdeploy.kernels.numba_kernels import Array, memory, threads


def forward(current: Tensor, u: Tensor | None, spikes: Tensor, u_last: Tensor | None, tau: float, v_th: float) -> None:
    """Eqs. 1-3. `current [T, M]` (its steps may be one and the same); writes `spikes [T, M]` and `u_last [M]`.

    `u [M]` is where it starts, zero when None.
    """
    assert u_last is not None
    u_last.zero_() if u is None else u_last.copy_(u)
    number = memory(u_last).dtype.type
    with threads():
        kernels.lif(_rows(current), memory(u_last), memory(spikes), number(tau), number(v_th))


def backward(
    current: Tensor,
    u: Tensor | None,
    grad_spikes: Tensor | None,
    grad_u_last: Tensor | None,
    grad_current: Tensor,
    grad_u: Tensor | None,
    tau: float,
    v_th: float,
    gamma: float,
) -> None:
    """Writes `grad_current [T, M]` and `grad_u [M]`; what comes in as None is zero."""
    assert grad_u is not None
    grad_u.zero_() if grad_u_last is None else grad_u.copy_(grad_u_last)
    start = torch.zeros_like(grad_u) if u is None else u.to(grad_u.dtype)
    incoming = current[:0] if grad_spikes is None else grad_spikes
    number = memory(grad_u).dtype.type
    arrays = (_rows(current), memory(start), memory(incoming.contiguous()), memory(grad_u), memory(grad_current))
    with threads():
        kernels.lif_backward(*arrays, number(tau), number(v_th), number(gamma))


def _rows(current: Tensor) -> Array:
    """`[T, M]`, or `[1, M]` where all steps are the same (direct encoding's repeated current)."""
    return memory((current[:1] if current.stride(0) == 0 else current).contiguous())
