"""The LIF sequence on a CPU as one pass over memory, compiled by numba.

The same arithmetic as `tetdeploy.neurons` writes with torch operations, in the same order and with no contraction into
fused multiply-adds, so that spikes and membranes have the same bits. A block of neurons is taken through all T steps
while it lies in the cache; blocks go to different threads, which meet once a call, not once an operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

_BLOCK = 2048  # neurons; with T = 8 a block's membranes take 64 kB

Array = NDArray[Any]


_lock = Lock()  # numba's fallback thread pool ends the process if two threads of ours enter it at once


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it the kernels may run, with as many threads as torch uses, at most as many as there are cores."""
    with _lock:
        available: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009 - set at run time, unknown to its types
        numba.set_num_threads(max(1, min(count, available)))
        if torch.get_num_threads() != count:  # numba's first call starts OpenMP with all cores, for torch as well
            torch.set_num_threads(count)
        yield


def _compiled(function: Any) -> Any:
    """Compiled at the first call, and kept on disk for the next process where a folder for that can be written."""
    try:
        return njit(function, parallel=True, nogil=True, cache=True)
    except RuntimeError:  # "no locator available": neither the package's folder nor the user's cache is writable
        return njit(function, parallel=True, nogil=True)


@_compiled
def forward(current: Array, u: Array, spikes: Array, tau: Any, v_th: Any) -> None:
    """Eqs. 1-3. `current [T or 1, M]` (one row serves every step); writes `spikes [T, M]`; `u [M]` goes in and out."""
    T, M = spikes.shape
    one, zero = current.dtype.type(1), current.dtype.type(0)
    repeats = current.shape[0] == 1
    for block in prange((M + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, M)
        for t in range(T):
            row = 0 if repeats else t
            for i in range(first, last):
                h = tau * u[i] + current[row, i]
                s = one if h > v_th else zero
                spikes[t, i] = s
                u[i] = h - h * s


@_compiled
def backward(
    current: Array, u: Array, grad_spikes: Array, grad_u: Array, grad_current: Array, tau: Any, v_th: Any, gamma: Any
) -> None:
    """Writes `grad_current [T, M]`. `u [M]` is where forward started; `grad_u [M]` goes in as dL/du(T), out as of u(0).

    `grad_spikes` may have no rows: then no gradient comes in through the spikes.
    """
    T, M = grad_current.shape
    one, zero = current.dtype.type(1), current.dtype.type(0)
    height = one / (gamma * gamma)
    repeats, through_spikes = current.shape[0] == 1, grad_spikes.shape[0] > 0
    for block in prange((M + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        count = min(_BLOCK, M - first)
        hs = np.empty((T, count), current.dtype)
        membrane = u[first : first + count].copy()
        g = grad_u[first : first + count].copy()
        for t in range(T):
            row = 0 if repeats else t
            for i in range(count):
                h = tau * membrane[i] + current[row, first + i]
                hs[t, i] = h
                membrane[i] = h - h * (one if h > v_th else zero)
        for t in range(T - 1, -1, -1):
            for i in range(count):
                h = hs[t, i]
                kept = zero if h > v_th else one
                surrogate = max(zero, gamma - abs(h - v_th)) * height
                incoming = grad_spikes[t, first + i] if through_spikes else zero
                dh = g[i] * kept + (incoming - g[i] * h) * surrogate
                grad_current[t, first + i] = dh
                g[i] = tau * dh
        grad_u[first : first + count] = g
