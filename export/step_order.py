"""Where the steps lie in values behind neurons: a network may compute on `[T, N, ...]`, on `[N, T, ...]`, or on either
with the two axes merged.

In the order of memory a value is `[left, T, right]`, whatever its axes are. Neurons fire with nothing left of T. Only a
Transpose changes what is left of it; a Reshape does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

BATCH, _OPEN_T = 2**31 - 1, 2**61 - 1  # primes that stand for the batch and a T left open: no other axis is so long
_SIZES = {"T": _OPEN_T, "batch": BATCH}
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


class StepOrder:
    """How many values lie left of the steps: 1 in `[T, N, ...]`, BATCH in `[N, T, ...]`.

    Args:
        spikes: values `[T, N, ...]` or `[T * N, ...]`.
        T: steps of the graph, None where they are dynamic.
    """

    def __init__(self, spikes: Iterable[ir.Value], T: int | None) -> None:
        self._T = T or _OPEN_T
        self._left: dict[ir.Value, int | None] = dict.fromkeys(spikes, 1)

    def left_of_steps(self, value: ir.Value) -> int | None:
        """The number of values left of the steps of one that spikes lead to; None if unknown."""
        return self._left[value]

    def propagate(self, node: ir.Node) -> None:
        """What follows for the outputs of a node whose inputs are known already."""
        timed = [value for value in node.inputs if value in self._left]
        if not timed:
            return
        orders = {self._follows(node, value) for value in timed if value is not None}
        left = orders.pop() if len(orders) == 1 else None
        for output in node.outputs:
            self._left.setdefault(output, left)

    def _follows(self, node: ir.Node, value: ir.Value) -> int | None:
        left = self._left[value]
        if self._T == 1:
            return 1
        if left is None or (left == 1 and node.op_type != "Transpose") or node.op_type in _VIEWS:
            return left
        before, after = sizes(value), sizes(node.outputs[0])
        axis = None if before is None else self._axis(before, left)
        if before is None or after is None or axis is None:
            return None
        if node.op_type == "Transpose":
            default = range(len(before) - 1, -1, -1)
            perm = list(node.attributes.get_ints("perm", default))
            within = left // math.prod(before[:axis])
            return within * math.prod(before[k] for k in perm[: perm.index(axis)])
        return left if after[: axis + 1] == before[: axis + 1] else None

    def _axis(self, shape: Sequence[int], left: int) -> int | None:
        """The axis that holds all steps, perhaps among others."""
        for axis, size in enumerate(shape):
            before = math.prod(shape[:axis])
            if before <= left < before * size:
                return axis if left % before == 0 and before * size % (left * self._T) == 0 else None
        return None


def sizes(value: ir.Value) -> list[int] | None:
    """A value's axes with BATCH for the batch; None if they are unknown."""
    if value.shape is None:
        return None
    found = [dim if isinstance(dim, int) else _size(dim) for dim in value.shape]
    return [size for size in found if isinstance(size, int)] if all(isinstance(size, int) for size in found) else None


def _size(dim: ir.SymbolicDim) -> object:
    return dim.evaluate({name: size for name, size in _SIZES.items() if name in dim.free_symbols()})
