"""Where the steps lie in values behind neurons: a network may compute on `[T, N, ...]`, on `[N, T, ...]`, or on either
with the two axes merged.

In the order of memory a value is `[left, T, right]`, whatever its axes are. Neurons fire with nothing left of T. A
Reshape does not change what is left of it, a Transpose does, and others keep it where they keep the axes up to T's.
Some of the steps may be taken out along the first axis, and put together again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

BATCH, _OPEN_T = 2**31 - 1, 2**61 - 1  # primes that stand for the batch and a T left open: no other axis is so long
_SIZES = {"T": _OPEN_T, "batch": BATCH}
_UNKNOWN = 2**89 - 1  # a prime, too, for an axis of unknown size
_SOME_STEPS = 0  # in place of what lies left of T
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_TAKE = ("Gather", "Slice", "Split")
_MOVE = (*_TAKE, "Concat", "Expand", "Tile", "Transpose")


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
        """The number of values left of the steps of one that spikes lead to; 0 if some of the steps are not there, None
        if it is unknown."""
        return self._left.get(value)

    def propagate(self, node: ir.Node) -> None:
        """What follows for the outputs of a node whose inputs are known already."""
        timed = [value for value in node.inputs if value is not None and value in self._left]
        if not timed or node.op_type == "Shape":
            return
        orders = {self._follows(node, value) for value in timed}
        if len(orders) > 1:
            orders.discard(_SOME_STEPS)  # which all steps read
        left = orders.pop() if len(orders) == 1 else None
        for output in node.outputs:
            self._left.setdefault(output, left)

    def _follows(self, node: ir.Node, value: ir.Value) -> int | None:
        left = self._left[value]
        if self._T == 1:
            return 1
        if left is None or node.op_type in _VIEWS:
            return left
        moves = node.op_type in _MOVE
        before, after = (sizes(of, partly=moves) for of in (value, node.outputs[0]))
        if before is None or after is None:  # as of a part of a layer, in a graph that is not optimised
            return None if moves else left
        if left == _SOME_STEPS:
            joined = node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (0, -len(after))
            return 1 if joined and after[0] % self._T == 0 else left
        axis = self._axis(before, left)
        if axis is None:
            return None
        if node.op_type == "Transpose":
            default = range(len(before) - 1, -1, -1)
            perm = list(node.attributes.get_ints("perm", default))
            within = left // math.prod(before[:axis])
            return within * math.prod(before[k] for k in perm[: perm.index(axis)])
        if node.op_type == "ScatterND" and axis and before[1:] == after[1:]:  # parts along the first axis
            return left // before[0] * after[0]
        others = len(after) > len(before)  # other axes: there is one in front, be it as long
        if node.op_type == "Gather":  # by a number or a table
            others = len(after) != len(before) and node.attributes.get_int("axis", 0) % len(before) <= axis
        if after[: axis + 1] == before[: axis + 1] and not others:
            return left
        if node.op_type in _TAKE and self._is_in_front(node, axis, before, after):
            return left // math.prod(before[:axis]) * math.prod(after[: axis - len(before)])
        return _SOME_STEPS if left == 1 and node.op_type in _TAKE else None

    def _is_in_front(self, node: ir.Node, axis: int, before: Sequence[int], after: Sequence[int]) -> bool:
        """Whether parts are taken along axes left of that of the steps alone, as queries of `[3, T, N, ...]`."""
        by_number = node.op_type == "Gather" and node.attributes.get_int("axis", 0) % len(before) >= axis
        return not by_number and _UNKNOWN not in after and after[axis - len(before) :] == before[axis:]

    def _axis(self, shape: Sequence[int], left: int) -> int | None:
        """The axis that holds all steps, perhaps among others."""
        for axis, size in enumerate(shape):
            before = math.prod(shape[:axis])
            if before <= left < before * size:
                return axis if left % before == 0 and before * size % (left * self._T) == 0 else None
        return None


def sizes(value: ir.Value, *, partly: bool = False) -> list[int] | None:
    """A value's axes with BATCH for the batch; None if one is unknown, but if `partly` it is _UNKNOWN there."""
    if value.shape is None:
        return None
    found = [dim if isinstance(dim, int) else _size(dim) for dim in value.shape]
    return found if partly or _UNKNOWN not in found else None


def _size(dim: ir.SymbolicDim) -> int:
    size = dim.evaluate({name: size for name, size in _SIZES.items() if name in dim.free_symbols()})
    return size if isinstance(size, int) else _UNKNOWN
