"""Which values of a graph can only be 0 or 1: those that are whole numbers, as spikes and their sums are, of 1 at most.

A layer whose input can only be 0 or 1 adds; any other multiplies. What follows from a node's inputs is kept here; a
value that nothing is known of counts as not binary, so that the exact energy never comes out too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from .values import constant, made_by

# Operations that only hand values on, copy or drop them, or put zeros beside them.
_VIEWS = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand", "Slice", "Gather", "Split", "Tile",
    "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Cast", "CastLike", "DepthToSpace", "SpaceToDepth", "Relu",
    "Abs", "Ceil", "Floor", "Round",
}  # fmt: skip
_OF_ALL: dict[str, Callable[[Iterable[float]], float]] = {
    "Concat": max,
    "Max": max,
    "Min": min,
    "Add": sum,
    "Sum": sum,
    "Mul": math.prod,
    "Sign": lambda _: 1.0,
}


class BinaryValues:
    """Which values of a graph are binary, by the largest that each can be of those that are whole numbers from 0.

    Args:
        spikes: values that are 0 or 1.
    """

    def __init__(self, spikes: Iterable[ir.Value]) -> None:
        self._largest: dict[ir.Value, float] = dict.fromkeys(spikes, 1.0)

    def is_binary(self, value: ir.Value | None) -> bool:
        """Whether a value can only be 0 or 1."""
        largest = self._largest_of(value)
        return largest is not None and largest <= 1

    def _largest_of(self, value: ir.Value | None) -> float | None:
        """The largest value possible; None where the values may be negative or fractions."""
        if value in self._largest:
            return self._largest[value]
        array = constant(value)
        return None if array is None else _largest_constant(array)

    def propagate(self, node: ir.Node) -> None:
        """What follows for the outputs of a node whose inputs are known already."""
        largest = self._follows(node)
        if largest is not None:
            for output in node.outputs:
                self._largest.setdefault(output, largest)

    def _follows(self, node: ir.Node) -> float | None:
        kind, inputs = node.op_type, node.inputs
        if node.outputs[0].dtype == ir.DataType.BOOL:
            return 1.0
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return self._largest_of(inputs[0]) if _keeps_values(node) else None
        if kind in _VIEWS or _copies_values(node):
            return self._largest_of(inputs[0])
        if kind == "Where":
            return self._of_all(max, inputs[1:3])
        if kind in _OF_ALL:
            return self._of_all(_OF_ALL[kind], inputs)
        if kind == "Clip":
            return self._clipped(*inputs)
        if kind == "Sub":
            return self._complement(*inputs) or self._either(*inputs)
        return None

    def _of_all(self, combine: Callable[[Iterable[float]], float], values: Iterable[ir.Value | None]) -> float | None:
        largest = [self._largest_of(value) for value in values]
        known = [number for number in largest if number is not None]
        return combine(known) if len(known) == len(largest) else None

    def _clipped(
        self, value: ir.Value | None, low: ir.Value | None = None, high: ir.Value | None = None
    ) -> float | None:
        """Whole numbers, cut off from 0 to a whole number: a sum of spikes becomes their OR."""
        if low is not None and self._largest_of(low) != 0:
            return None
        return self._largest_of(value) if high is None else self._of_all(min, (value, high))

    def _complement(self, one: ir.Value | None, spikes: ir.Value | None) -> float | None:
        """1 - s: with a product it makes AND NOT of spikes."""
        return 1.0 if _is_one(one) and self.is_binary(spikes) else None

    def _either(self, total: ir.Value | None, both: ir.Value | None) -> float | None:
        """a + b - a b: OR of spikes a and b."""
        added, product = made_by(total, "Add"), made_by(both, "Mul")
        if added is None or product is None or set(added.inputs) != set(product.inputs):
            return None
        return 1.0 if all(map(self.is_binary, added.inputs)) else None


def _keeps_values(node: ir.Node) -> bool:
    """Whether a quantisation has scale 1 and zero point 0, as that of spikes."""
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return _is_one(node.inputs[1]) and (zero is None or not zero.any())


def _is_one(value: ir.Value | None) -> bool:
    """Whether a value is constant and 1, perhaps of another type first."""
    if (cast := made_by(value, "Cast", "CastLike")) is not None:
        return _is_one(cast.inputs[0])
    array = constant(value)
    return array is not None and bool((array == 1).all())


def _copies_values(node: ir.Node) -> bool:
    """Whether a node repeats values that are there, or puts values of them or zeros beside them."""
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type != "Pad":
        return False
    if node.attributes.get_string("mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    padding = constant(node.inputs[2])
    return padding is not None and not padding.any()


def _largest_constant(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> float | None:
    if array.dtype.kind not in "biuf" or array.size == 0:
        return None
    numbers = array.astype(np.float64)
    whole = np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers == np.floor(numbers)).all()
    return float(numbers.max()) if whole else None
