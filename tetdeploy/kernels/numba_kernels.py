"""What numba compiles for the CPU: LIF (`numba_lif`), and BN, residual sum and LIF together (`numba_bn_lif`).

All in one file: numba keeps what it compiled on disk, and knows it to be old by the file of the kernel alone, not by
those of the functions that the kernel calls.

A block of neurons is taken through all T steps while it lies in the cache; blocks go to different threads, which meet
once a call, not once an operation. Nothing is contracted into fused multiply-adds.

bfloat16, which numpy and numba do not know, is read and written as the 16 bits that it is, and is float32 in between.

Behind a BN each loop writes to one array or two and reads few: only then does the compiler see that they do not overlap
and takes 8 or 16 numbers at once. A sequence of such a layer is `[T, positions x C]`, channels-last, in blocks of
`length` numbers, which are whole positions; `norm` repeats a channel's numbers to that length. Sums are taken over
`slabs`, runs of blocks, lane by lane, and then over slabs and lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock  # which torch needs, too
from llvmlite import ir
from numba import extending, njit, prange, types
from numba.misc.appdirs import AppDirs
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2048  # neurons of the plain LIF; with T = 8 a block's membranes take 64 kB

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


# Where pip put it: pip would leave kernels behind that lay beside it, and Python import their folder as the package.
_INSTALLED = not {"site-packages", "dist-packages"}.isdisjoint(Path(__file__).parts)


@contextmanager
def _out_of_the_package() -> Iterator[None]:
    """Within it numba keeps what it compiles of an installed package in the user's cache, unless NUMBA_CACHE_DIR names
    a folder.

    Raises:
        RuntimeError: the user has no home, as in a container with any user's number, so that `~` stays a name.
    """
    config: Any = numba.config
    named = config.CACHE_DIR
    if _INSTALLED and not named:
        folder = AppDirs(appname="numba", appauthor=False).user_cache_dir  # numba's own
        if not Path(folder).is_absolute():
            raise RuntimeError("no home")
        config.CACHE_DIR = folder
    try:
        yield
    finally:
        config.CACHE_DIR = named


def compiled(function: Any, **options: Any) -> Any:
    """Compiled at the first call, and kept on disk for the next process where a folder for that can be written."""
    options = {"parallel": True, "nogil": True} | options
    try:
        with _out_of_the_package():
            return _kept_in_turn(njit(function, cache=True, **options))
    except RuntimeError:  # "no locator available": no folder to write to; or no home
        return njit(function, **options)


def _kept_in_turn(kernel: Any) -> Any:
    """Let one process at a time read or keep a compiled kernel; where the disk lets it do neither, do without.

    numba reads the index of a kernel's files, takes the next free name, and writes index and file, without a lock: of
    two processes that compile it for two dtypes at once both take one name, and then one dtype has the other's machine
    code, for good. Where there are no locks, as on some network file systems, it stays so.
    """
    cache: Any = getattr(kernel, "_cache", None)  # private; no kernel has it where NUMBA_DISABLE_JIT is set
    if cache is not None:
        lock = Path(cache.cache_path) / "tetdeploy.lock"
        cache.load_overload = _in_turn(cache.load_overload, lock)
        cache.save_overload = _in_turn(_whole_or_not(cache.save_overload, cache), lock)
    return kernel


def _in_turn(access: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @wraps(access)
    def locked(*arguments: Any) -> Any:
        with ExitStack() as held:
            with suppress(OSError, NotImplementedError):
                held.enter_context(FileLock(file, timeout=60, fallback_to_soft=False))
            with suppress(OSError):  # of a full disk, or of files of another user
                return access(*arguments)  # a kernel that is there, else None

    return locked


def _whole_or_not(save: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    """numba writes the index before the machine code that it names, in whose place may lie that of an older kernel:
    where that could not be written, the index goes."""

    @wraps(save)
    def saved(*arguments: Any) -> Any:
        try:
            return save(*arguments)
        except BaseException:
            with suppress(OSError):
                Path(cache._cache_file._index_path).unlink()
            raise

    return saved


def _intrinsic(function: Any) -> Any:
    return extending.intrinsic(function)


def memory(tensor: Tensor) -> Array:
    """The memory of a tensor on the CPU for the kernels: bfloat16 as uint16."""
    bits = tensor.detach()
    array: Array = (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy()
    return array


def _serial(function: Any) -> Any:
    return compiled(function, parallel=False)


def _inline(function: Any) -> Any:
    return njit(function, inline="always")


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
def lif(current: Array, u: Array, spikes: Array, tau: Any, v_th: Any) -> None:
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
def lif_backward(
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


@_inline
def _current(
    y: Array, norm: Array, residual: Array, residual_norm: Array, t: int, first: int, last: int, current: Array
) -> None:
    """BN of a block in a step, plus the residual: nothing, a tensor, or a tensor with a BN of its own."""
    y_, mean, scale, bias = y[0 if len(y) == 1 else t, first:last], norm[0], norm[1], norm[2]
    for i in range(len(current)):
        current[i] = (value(y_[i]) - mean[i]) * scale[i] + bias[i]
    if len(residual_norm) > 0:
        other, mean, scale, bias = residual[t, first:last], residual_norm[0], residual_norm[1], residual_norm[2]
        for i in range(len(current)):
            current[i] += (value(other[i]) - mean[i]) * scale[i] + bias[i]
    elif len(residual) > 0:
        other = residual[t, first:last]
        for i in range(len(current)):
            current[i] += value(other[i])


@_inline
def _add_products(g: Array, y: Array, norm: Array, total: Array) -> None:
    """g times y less its mean."""
    mean = norm[0]
    for i in range(len(g)):
        total[i] += g[i] * (value(y[i]) - mean[i])


@compiled
def statistics(y: Array, sums: Array) -> None:
    """Mean and sum of squared deviations of each lane of a slab, `[slabs, 2, length]`, by Welford's recurrence."""
    slabs, _, length = sums.shape
    blocks = (len(y) + length - 1) // length
    for s in prange(slabs):
        mean, squares = sums[s, 0], sums[s, 1]
        for i in range(length):
            mean[i] = np.float32(0)
            squares[i] = np.float32(0)
        start = s * blocks // slabs
        for block in range(start, (s + 1) * blocks // slabs):
            part = np.float32(1) / np.float32(block - start + 1)
            y_ = y[block * length : (block + 1) * length]
            for i in range(len(y_)):
                x = value(y_[i])
                delta = x - mean[i]
                mean[i] += delta * part
                squares[i] += delta * (x - mean[i])


@_serial
def merged(sums: Array, M: int, C: int) -> Array:
    """Mean and sum of squared deviations of each channel, `[2, C]` in float64 (Chan, Golub and LeVeque, Am. Stat.
    1983), of what `statistics` found in M numbers."""
    slabs, _, length = sums.shape
    blocks = (M + length - 1) // length
    found = np.zeros((2, C), np.float64)
    mean, squares = found[0], found[1]
    for squared in range(2):
        for s in range(slabs):
            for lane in range(0, length, C):
                n = (s + 1) * blocks // slabs - s * blocks // slabs
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
    return found


@_serial
def folded(sums: Array, C: int) -> Array:
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
def bn_lif(
    y: Array, norm: Array, residual: Array, residual_norm: Array, spikes: Array, length: int, tau: Any, v_th: Any
) -> None:
    """Eqs. 1-3 of BN and residual, `[T, M]`; y may be `[1, M]`; without a residual or its norm these have no rows."""
    T, M = spikes.shape
    one, zero = np.float32(1), np.float32(0)
    for block in prange((M + length - 1) // length):
        first = block * length
        last = min(first + length, M)
        count = last - first
        u, current = np.zeros(count, np.float32), np.empty(count, np.float32)
        for t in range(T):
            _current(y, norm, residual, residual_norm, t, first, last, current)
            into = spikes[t, first:last]
            for i in range(count):
                h = tau * u[i] + current[i]
                s = one if h > v_th else zero
                into[i] = store(s, into)
                u[i] = h - h * s


@compiled
def bn_lif_backward(
    y: Array,
    norm: Array,
    residual: Array,
    residual_norm: Array,
    grad_spikes: Array,
    grad_current: Array,
    sums: Array,
    tau: Any,
    v_th: Any,
    gamma: Any,
) -> None:
    """Writes g = dL/dI, summed over the steps where y is `[1, M]`, and of each lane of a slab, `sums [slabs, 3,
    length]`, the sums of g, of g times y less its mean, and of g times the residual less its own."""
    T, M = grad_spikes.shape
    slabs, _, length = sums.shape
    one, zero = np.float32(1), np.float32(0)
    height = one / (gamma * gamma)
    repeated = len(y) == 1
    blocks = (M + length - 1) // length
    for s in prange(slabs):
        sums[s] = zero
        sum_g, sum_gx, sum_gx_other = sums[s, 0], sums[s, 1], sums[s, 2]
        for block in range(s * blocks // slabs, (s + 1) * blocks // slabs):
            first = block * length
            last = min(first + length, M)
            count = last - first
            hs, u = np.empty((T, count), np.float32), np.zeros(count, np.float32)
            g, total = np.zeros(count, np.float32), np.zeros(count, np.float32)
            for t in range(T):
                h_t = hs[t]
                _current(y, norm, residual, residual_norm, t, first, last, h_t)
                for i in range(count):
                    h = tau * u[i] + h_t[i]
                    h_t[i] = h
                    u[i] = h - h * (one if h > v_th else zero)
            for t in range(T - 1, -1, -1):
                h_t, incoming = hs[t], grad_spikes[t, first:last]
                for i in range(count):
                    h = h_t[i]
                    kept = zero if h > v_th else one
                    surrogate = max(zero, gamma - abs(h - v_th)) * height
                    g[i] = g[i] * kept + (value(incoming[i]) - g[i] * h) * surrogate
                if len(residual_norm) > 0:
                    _add_products(g, residual[t, first:last], residual_norm, sum_gx_other)
                if not repeated:
                    _add_products(g, y[t, first:last], norm, sum_gx)
                    into = grad_current[t, first:last]
                    for i in range(count):
                        into[i] = store(g[i], into)
                for i in range(count):
                    total[i] += g[i]
                    g[i] *= tau
            if repeated:
                _add_products(total, y[0, first:last], norm, sum_gx)
                into = grad_current[0, first:last]
                for i in range(count):
                    into[i] = store(total[i], into)
            for i in range(count):
                sum_g[i] += total[i]


@compiled
def bn_backward(g: Array, y: Array, norm: Array, factors: Array, grad_y: Array, length: int) -> None:
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
