"""Weights in the form and order in which C wants them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LARGEST = 127 * 65536 + 127 * 256 + 127  # of three digits
ROW, MOST_ADDITIONS, MOST_ROWS = 256, 255, 128  # as in `additions.c`
GROUP, CHUNK, OUTPUTS, SOME, MOST_GROUPS = 5, 64, 16, 8, 47  # as in `lookups.c`: GROUP is CHANNELS there


def whole_weights(weights: Array) -> tuple[Array, Array]:
    """Weights as whole numbers, from -LARGEST to LARGEST.

    The scale of a channel is a power of two where that loses nothing: of weights such as k / 64 float32 has the exact
    sum, and a membrane that ends just at the threshold must end there here, too.

    Args:
        weights: float32 `[O, ...]`, finite.

    Returns:
        int32 `[O, ...]`; float32 `[O]`, the scale that they are to be multiplied with.
    """
    axes = tuple(range(1, weights.ndim))
    scales = np.maximum(np.abs(weights).max(axis=axes, keepdims=True) / np.float32(LARGEST), np.finfo(np.float32).tiny)
    powers = np.ldexp(np.float32(1), np.frexp(scales)[1])
    on_grid = (np.rint(weights / powers) == weights / powers).all(axis=axes, keepdims=True)
    scales = np.where(on_grid, powers, scales)
    return np.rint(weights / scales.astype(np.float64)).clip(-LARGEST, LARGEST).astype(np.int32), scales.reshape(-1)


def digits_of(whole: Array) -> Array:
    """int8 `[3, ...]`: the digits of `whole`, each from -128 to 127, which is (d0 * 256 + d1) * 256 + d2."""
    low = (whole + 128 & 255) - 128
    middle = ((whole - low >> 8) + 128 & 255) - 128
    high = (whole - low >> 8) - middle >> 8
    return np.stack([high, middle, low]).astype(np.int8)


def tiles_of(digits: Array) -> Array:
    """Weights in the order in which `tiles.c` multiplies them.

    Args:
        digits: int8 `[digits, O, C, kernel height, kernel width]`.

    Returns: `[blocks, digits, chunks, kernel height, kernel width, 2, 16, 16, 4]`.
    """
    (outputs, inputs), kernel = digits.shape[1:3], digits.shape[3:]
    whole = np.pad(digits, [(0, 0), (0, -outputs % 32), (0, -inputs % 64), (0, 0), (0, 0)])
    apart = whole.reshape(len(digits), -1, 2, 16, whole.shape[2] // 64, 16, 4, *kernel)
    return np.ascontiguousarray(apart.transpose(1, 0, 4, 7, 8, 2, 5, 3, 6))


def rows_of(whole: Array, most: int) -> Array:
    """Weights in the order in which `additions.c` adds them.

    Args:
        whole: int32 `[O, C, kernel height, kernel width]`, of 24 bits, or int16, of 8.
        most: what an input is at most.

    Returns: `[blocks, chunks, kernel height, kernel width, 1 + rows, width]`.
    """
    (outputs, inputs), kernel = whole.shape[:2], whole.shape[2:]
    width = ROW // whole.itemsize
    rows = min(MOST_ADDITIONS // most, MOST_ROWS, inputs)
    filled = np.pad(whole, [(0, -outputs % width), (0, -inputs % rows), (0, 0), (0, 0)])
    apart = filled.reshape(-1, width, filled.shape[1] // rows, rows, *kernel).transpose(0, 2, 4, 5, 3, 1)
    return np.concatenate([apart.sum(4, dtype=whole.dtype, keepdims=True), apart], 4)


def groups_of(digits: Array) -> Array:
    """Weights in the order in which `lookups.c` makes tables of them.

    Args:
        digits: int8 `[O, C, kernel height, kernel width]`.

    Returns: `[blocks, 2, groups, kernel height, kernel width, 8, 5]`.
    """
    apart = _in_groups(np.pad(digits, [(0, -len(digits) % OUTPUTS), (0, 0), (0, 0), (0, 0)]))
    apart = apart.reshape(-1, OUTPUTS // SOME, SOME, *apart.shape[1:]).transpose(0, 1, 3, 5, 6, 2, 4)
    return np.ascontiguousarray(np.roll(apart, -1, -1))


def runs_together(digits: Array) -> int:
    """How many runs of groups and taps, one after the other, have sums within int16, whichever inputs are 1.

    Args:
        digits: int8 `[O, C, kernel height, kernel width]`.
    """
    apart = _in_groups(digits)
    positive = apart.clip(0).sum(2, dtype=np.int16)
    largest = np.stack([positive, positive - apart.sum(2, dtype=np.int16)]).reshape(2 * len(digits), -1)
    steps = largest.shape[1]
    runs = math.ceil(steps / MOST_GROUPS)
    by_run = np.add.reduceat(largest, [run * steps // runs for run in range(runs)], axis=1, dtype=np.int32)
    return next(
        together
        for together in range(runs, 0, -1)
        if together == 1 or np.add.reduceat(by_run, range(0, runs, together), axis=1).max() < 2**15
    )


def _in_groups(digits: Array) -> Array:
    """`[O, groups, 5, kernel height, kernel width]`: of each 64 input channels five, and five, and at last four."""
    (outputs, inputs), kernel = digits.shape[:2], digits.shape[2:]
    whole, rest = divmod(inputs, CHUNK)
    each = math.ceil(CHUNK / GROUP)
    filled = np.pad(digits, [(0, 0), (0, -inputs % CHUNK), (0, 0), (0, 0)]).reshape(outputs, -1, CHUNK, *kernel)
    filled = np.pad(filled, [(0, 0), (0, 0), (0, each * GROUP - CHUNK), (0, 0), (0, 0)])
    groups = whole * each + math.ceil(rest / GROUP)
    return filled.reshape(outputs, -1, GROUP, *kernel)[:, :groups]
