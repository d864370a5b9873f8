"""The LIF sequence on a GPU as one pass over memory each way, in Triton.

The same arithmetic as `tetdeploy.neurons` writes with torch operations, in the same order and with no contraction into
fused multiply-adds (`enable_fp_fusion=False`), so that spikes and membranes have the same bits. A neuron's membrane
stays in a float32 register through all steps, whatever the tensors' type; backward integrates it again from the
current. Tensors come as `[T, M]`, the M neurons in the order in which they lie in memory, whatever their format.

The kernels unroll their steps and backward keeps every membrane in a register: longer sequences go in pieces.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 16  # in one launch
BLOCK = 1024  # neurons of a program, 8 a thread: 16 bytes of bfloat16; backward takes half where they have many steps

NOT_FUSED: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


def jit(function: Any) -> Any:
    """`triton.jit`, for mypy, which knows no types of it."""
    return triton.jit(function)


@jit
def values(pointer: tl.tensor, i: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """In float32; zeros from None."""
    if pointer is not None:
        return tl.load(pointer + i, mask=inside, other=0.0).to(tl.float32)
    return tl.full(i.shape, 0.0, tl.float32)


@jit
def integrate(u: tl.tensor, current: tl.tensor, tau: tl.tensor) -> tl.tensor:
    """h(t), Eq. 1."""
    return u * tau + current


@jit
def fire(h: tl.tensor, v_th: tl.tensor) -> tl.tensor:
    """s(t), Eq. 2, as a number."""
    return (h > v_th).to(tl.float32)


@jit
def step_backward(
    h: tl.tensor, g: tl.tensor, grad_spikes: tl.tensor, v_th: tl.tensor, gamma: tl.tensor, height: tl.tensor
) -> tl.tensor:
    """dL/dh(t) from g = dL/du(t) and dL/ds(t): g (1 - s) + (dL/ds - g h) ds/dh. `height` is 1 / gamma^2."""
    surrogate = tl.maximum(gamma - tl.abs(h - v_th), 0.0, propagate_nan=tl.PropagateNan.ALL) * height
    return g - g * fire(h, v_th) + (grad_spikes - g * h) * surrogate


@jit
def _forward(
    current: tl.tensor,
    u: tl.tensor,
    spikes: tl.tensor,
    u_last: tl.tensor,
    M: tl.tensor,
    stride: tl.tensor,
    tau: tl.tensor,
    v_th: tl.tensor,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    membrane = values(u, i, inside)
    for _ in tl.static_range(T):
        h = integrate(membrane, values(current, i, inside), tau)
        s = fire(h, v_th)
        if spikes is not None:
            tl.store(spikes + i, s.to(spikes.dtype.element_ty), mask=inside)
            spikes += M
        membrane = h - h * s  # Eq. 3
        current += stride  # a pointer moves by steps: T x M may exceed 32 bits
    if u_last is not None:
        tl.store(u_last + i, membrane, mask=inside)


@jit
def _backward(
    current: tl.tensor,
    u: tl.tensor,
    grad_spikes: tl.tensor,
    grad_u_last: tl.tensor,
    grad_current: tl.tensor,
    grad_u: tl.tensor,
    M: tl.tensor,
    stride: tl.tensor,
    stride_grad: tl.tensor,
    tau: tl.tensor,
    v_th: tl.tensor,
    gamma: tl.tensor,
    height: tl.tensor,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    membrane = values(u, i, inside)
    hs: tl.tuple = ()
    for _ in tl.static_range(T):
        h = integrate(membrane, values(current, i, inside), tau)
        membrane = h - h * fire(h, v_th)
        hs = hs + (h,)  # noqa: RUF005 - Triton knows no unpacking
        current += stride
    g = values(grad_u_last, i, inside)  # dL/du(t)
    for _ in tl.static_range(T - 1):  # to the last step
        grad_current += M
        if grad_spikes is not None:
            grad_spikes += stride_grad
    for k in tl.static_range(T):
        incoming = values(grad_spikes, i, inside)
        if grad_spikes is not None:
            grad_spikes -= stride_grad
        g = step_backward(hs[T - 1 - k], g, incoming, v_th, gamma, height)
        tl.store(grad_current + i, g.to(grad_current.dtype.element_ty), mask=inside)  # dL/dh(t) = dL/dI(t)
        grad_current -= M
        g = g * tau  # Eq. 1: dL/du(t-1) = tau dL/dh(t)
    if grad_u is not None:
        tl.store(grad_u + i, g, mask=inside)


def forward(
    current: Tensor, u: Tensor | None, spikes: Tensor | None, u_last: Tensor | None, tau: float, v_th: float
) -> None:
    """Eqs. 1-3. `current [T, M]` (its steps may be one and the same); writes `spikes [T, M]` and `u_last [M]`.

    `u [M]` is where it starts, zero when None. What is None is not written.
    """
    current = _rows(current)
    pieces = _pieces(len(current))
    carried = u_last if u_last is not None or len(pieces) == 1 else _membranes_like(current)
    with torch.cuda.device_of(current):
        for first, last in pieces:
            written = None if spikes is None else spikes[first:last]
            _launch_forward(current[first:last], u, written, carried, tau, v_th)
            u = carried


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
    """Writes `grad_current [T, M]` and, unless it is None, `grad_u [M]`; what comes in as None is zero."""
    current = _rows(current)
    grad_spikes = None if grad_spikes is None else _rows(grad_spikes)
    pieces = _pieces(len(current))
    carried = grad_u if grad_u is not None or len(pieces) == 1 else _membranes_like(current)
    with torch.cuda.device_of(current):
        starts = [u]  # the membranes before each piece, integrated without writing spikes
        for first, last in pieces[:-1]:
            starts.append(_membranes_like(current))
            _launch_forward(current[first:last], starts[-2], None, starts[-1], tau, v_th)
        for (first, last), start in zip(reversed(pieces), reversed(starts), strict=True):
            incoming = None if grad_spikes is None else grad_spikes[first:last]
            into = grad_current[first:last]
            _launch_backward(current[first:last], start, incoming, grad_u_last, into, carried, tau, v_th, gamma)
            grad_u_last = carried


def _launch_forward(
    current: Tensor, u: Tensor | None, spikes: Tensor | None, u_last: Tensor | None, tau: float, v_th: float
) -> None:
    T, M = current.shape
    _forward[(triton.cdiv(M, BLOCK),)](
        current, u, spikes, u_last, M, current.stride(0), tau, v_th, T=T, BLOCK=BLOCK, **NOT_FUSED
    )


def _launch_backward(
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
    T, M = current.shape
    block = BLOCK if T <= STEPS // 2 else BLOCK // 2
    tensors = (current, u, grad_spikes, grad_u_last, grad_current, grad_u)
    strides = (current.stride(0), 0 if grad_spikes is None else grad_spikes.stride(0))
    _backward[(triton.cdiv(M, block),)](
        *tensors, M, *strides, tau, v_th, gamma, 1.0 / gamma**2, T=T, BLOCK=block, **NOT_FUSED
    )


def _membranes_like(current: Tensor) -> Tensor:
    return current.new_empty(current.shape[1], dtype=torch.float32)


def _pieces(T: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, T, STEPS), T]))


def _rows(sequence: Tensor) -> Tensor:
    """`[T, M]` whose neurons lie side by side; steps may lie apart, or be one and the same."""
    return sequence if sequence.stride(1) == 1 or sequence.shape[1] == 1 else sequence.contiguous()
