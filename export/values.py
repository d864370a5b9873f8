"""Values of an ONNX graph: what makes them, and what they hold."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

# What copies or moves values, or leaves some out.
HAND_ON = ("Unsqueeze", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity", "MaxPool", "Slice")

# What makes float32 of its own, behind which 8 bits are none.
_ENDS = ("Add", "Cast", "Conv", "ConvTranspose", "Gemm", "Greater", "Less", "MatMul", "Scan")


def made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes a value, if it is of one of these kinds."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type in kinds else None


def producer_of(value: ir.Value) -> ir.Node:
    producer = value.producer()
    assert producer is not None
    return producer


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node of which none is left out."""
    return [value for value in node.inputs if value is not None]


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """What a value holds in any call; None of one that is computed, or an input."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def from_8_bits(value: ir.Value | None) -> bool:
    """Whether what was dequantised, or bytes (spikes) times something, reaches it with no layer, neurons, cast or sum
    of two between."""
    node = None if value is None else value.producer()
    if node is None or node.op_type in _ENDS:
        return False
    scaled = node.op_type == "Mul" and any(map(_of_bytes, node.inputs))
    return scaled or node.op_type == "DequantizeLinear" or any(map(from_8_bits, node.inputs))


def _of_bytes(value: ir.Value | None) -> bool:
    cast = made_by(value, "Cast")
    return cast is not None and inputs_of(cast)[0].dtype == ir.DataType.UINT8
