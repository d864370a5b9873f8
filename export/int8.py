"""The convolution in 8-bit integers of `tetdeploy.int8.quantisation`, in ONNX.

Standard QuantizeLinear and DequantizeLinear nodes round a Conv: the form that ONNX Runtime, OpenVINO and TensorRT all
fuse into one integer convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset20

from tetdeploy.int8.quantisation import CurrentScale

from .values import producer_of


def translate_int8_conv(
    spikes: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    scale: float,
    zero: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """The same in ONNX: a Conv between DequantizeLinear and QuantizeLinear nodes."""
    op: Any = opset20
    one, none = op.Constant(value_float=1.0), op.Cast(op.Constant(value_int=0), to=2)
    x = op.DequantizeLinear(op.QuantizeLinear(spikes, one, none), one, none)
    w = op.DequantizeLinear(weight, weight_scale, axis=0)
    b = op.DequantizeLinear(bias, weight_scale, axis=0)
    y = op.Conv(x, w, b, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=groups)
    step, offset = op.Constant(value_float=scale), op.Cast(op.Constant(value_int=zero), to=2)
    return op.DequantizeLinear(op.QuantizeLinear(y, step, offset), step, offset)


def set_scales(model: ir.Model, scales: Sequence[CurrentScale]) -> None:
    """Let the currents of a graph that is not optimised yet round by other scales, in the order of its convolutions."""
    rounding = [node for node in model.graph if node.op_type == "QuantizeLinear" and _source(node).op_type == "Conv"]
    for node, current in zip(rounding, scales, strict=True):
        step, offset = _source(node, 1), _source(_source(node, 2))
        step.attributes["value_float"] = ir.AttrFloat32("value_float", current.scale)
        offset.attributes["value_int"] = ir.AttrInt64("value_int", current.zero)


def _source(node: ir.Node, k: int = 0) -> ir.Node:
    """The node that makes a node's k-th input."""
    value = node.inputs[k]
    assert value is not None
    return producer_of(value)
