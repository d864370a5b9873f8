"""The LIF sequence on a CPU as one pass over memory, compiled by numba.

The same arithmetic as `tetdeploy.neurons` writes with torch operations, in the same order and with no contraction into
fused multiply-adds, so that spikes and membranes have the same bits. A block of neurons is taken through all T steps
while it lies in the cache; blocks go to different threads, which meet once a call, not once an operation.

bfloat16, which numpy and numba do not know, is read and written as the 16 bits that it is, and is float32 in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import extending, njit, prange, types
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_BLOCK = 2048  # neurons; with T = 8 a block's membranes take 64 kB

Array = NDArray[Any]


_lock = Lock()  # numba's fallback thread pool ends the process if two threads of ours enter it at once


@contextmanager
def threads() -> Iterator[None]:
    """Within it the kernels may run, with as many threads as torch uses, at most as many as there are cores."""
    count = torch.get_num_threads()
    with _lock:
        available: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 - set at run time, unknown to its types
        numba.set_num_threads(max(1, min(count, available)))
        if torch.get_num_threads() != count:  # numba's first call starts OpenMP with all cores, for torch as well
            torch.set_num_threads(count)
        yield


def compiled(function: Any, **options: Any) -> Any:
    """Compiled at the first call, and kept on disk for the next process where a folder for that can be written."""
    options = {"parallel": True, "nogil": True} | options
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # "no locator available": neither the package's folder nor the user's cache is writable
        return njit(function, **options)


def _intrinsic(function: Any) -> Any:
    return extending.intrinsic(function)


def memory(tensor: Tensor) -> Array:
    """The memory of a tensor on the CPU for the kernels: bfloat16 as uint16."""
    bits = tensor.detach()
    array: Array = (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy()
    return array


@_intrinsic
def value(_: Any, stored: Any) -> Any:
    """What is stored: bfloat16's bits as float32, anything else as it is."""
    if stored != types.uint16:
        return stored(stored), lambda _context, _builder, _signature, arguments: arguments[0]

    def widened(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(stored), widened


@_intrinsic
def store(_: Any, number: Any, into: Any) -> Any:
    """`number` as the array `into` keeps it: float32 as bfloat16's bits, the nearest or of two the even one."""
    if into.dtype != types.uint16:
        return number(number, into), lambda _context, _builder, _signature, arguments: arguments[0]

    def narrowed(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        i32, x = ir.IntType(32), arguments[0]
        bits = builder.bitcast(x, i32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF))), ir.Constant(i32, 16))
        not_a_number = builder.fcmp_unordered("uno", x, x)
        return builder.trunc(builder.select(not_a_number, ir.Constant(i32, 0x7FC0), nearest), ir.IntType(16))

    return types.uint16(number, into), narrowed


@compiled
def _forward(current: Array, u: Array, spikes: Array, tau: Any, v_th: Any) -> None:
    """`current [T or 1, M]` (one row serves every step); writes `spikes [T, M]`; `u [M]` goes in and out."""
    T, M = spikes.shape
    one, zero = u.dtype.type(1), u.dtype.type(0)
    repeats = current.shape[0] == 1
    for block in prange((M + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, M)
        for t in range(T):
            row = 0 if repeats else t
            for i in range(first, last):
                h = tau * u[i] + value(current[row, i])
                s = one if h > v_th else zero
                spikes[t, i] = store(s, spikes)
                u[i] = h - h * s


@compiled
def _backward(
    current: Array, u: Array, grad_spikes: Array, grad_u: Array, grad_current: Array, tau: Any, v_th: Any, gamma: Any
) -> None:
    """Writes `grad_current [T, M]`. `u [M]` is where forward started; `grad_u [M]` goes in as dL/du(T), out as of u(0).

    `grad_spikes` may have no rows: then no gradient comes in through the spikes.
    """
    T, M = grad_current.shape
    one, zero = u.dtype.type(1), u.dtype.type(0)
    height = one / (gamma * gamma)
    repeats, through_spikes = current.shape[0] == 1, grad_spikes.shape[0] > 0
    for block in prange((M + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        count = min(_BLOCK, M - first)
        hs = np.empty((T, count), u.dtype)
        membrane = u[first : first + count].copy()
        g = grad_u[first : first + count].copy()
        for t in range(T):
            row = 0 if repeats else t
            for i in range(count):
                h = tau * membrane[i] + value(current[row, first + i])
                hs[t, i] = h
                membrane[i] = h - h * (one if h > v_th else zero)
        for t in range(T - 1, -1, -1):
            for i in range(count):
                h = hs[t, i]
                kept = zero if h > v_th else one
                surrogate = max(zero, gamma - abs(h - v_th)) * height
                incoming = value(grad_spikes[t, first + i]) if through_spikes else zero
                dh = g[i] * kept + (incoming - g[i] * h) * surrogate
                grad_current[t, first + i] = store(dh, grad_current)
                g[i] = tau * dh
        grad_u[first : first + count] = g


def forward(current: Tensor, u: Tensor | None, spikes: Tensor, u_last: Tensor, tau: float, v_th: float) -> None:
    """Eqs. 1-3. `current [T, M]` (its steps may be one and the same); writes `spikes [T, M]` and `u_last [M]`.

    `u [M]` is where it starts, zero when None.
    """
    u_last.zero_() if u is None else u_last.copy_(u)
    number = memory(u_last).dtype.type
    with threads():
        _forward(_rows(current), memory(u_last), memory(spikes), number(tau), number(v_th))


def backward(
    current: Tensor,
    u: Tensor | None,
    grad_spikes: Tensor | None,
    grad_u_last: Tensor | None,
    grad_current: Tensor,
    grad_u: Tensor,
    tau: float,
    v_th: float,
    gamma: float,
) -> None:
    """Writes `grad_current [T, M]` and `grad_u [M]`; what comes in as None is zero."""
    grad_u.zero_() if grad_u_last is None else grad_u.copy_(grad_u_last)
    start = torch.zeros_like(grad_u) if u is None else u.to(grad_u.dtype)
    incoming = current[:0] if grad_spikes is None else grad_spikes
    number = memory(grad_u).dtype.type
    arrays = (_rows(current), memory(start), memory(incoming.contiguous()), memory(grad_u), memory(grad_current))
    with threads():
        _backward(*arrays, number(tau), number(v_th), number(gamma))


def _rows(current: Tensor) -> Array:
    """`[T, M]`, or `[1, M]` where all steps are the same (direct encoding's repeated current)."""
    return memory((current[:1] if current.stride(0) == 0 else current).contiguous())
