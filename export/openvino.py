"""What OpenVINO computes wrongly, written so that it computes it right.

It moves an average of currents in 8 bits in front of their scale and rounds it to 8 bits, though not past a Max. And of
what a 1x1 convolution with a stride does not read it computes nothing in the layers before, without regard to its
padding; a kernel of three, two of them zero, is no 1x1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .neuron_steps import FLOAT, Forms, StepBuilder
from .values import made_by


def write_for_openvino(model: ir.Model, *, int8: bool) -> None:
    """Change a described graph, in place; its answers stay.

    Args:
        int8: it has currents in 8 bits.
    """
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type == "AveragePool" and int8:
                _keep_in_place(graph, node)
            elif node.op_type == "Conv" and _skips_padding(node):
                _widen(graph, node)


def _keep_in_place(graph: ir.Graph, pool: ir.Node) -> None:
    """Put a Max that changes nothing before an average."""
    build = StepBuilder(graph, pool, FLOAT, Forms())
    lowest = build.number(float(np.finfo(np.float32).min))
    currents = build("Max", pool.inputs[0], lowest)
    _name(pool, lowest=lowest, currents=currents)
    pool.replace_input_with(0, currents)


def _skips_padding(conv: ir.Node) -> bool:
    """Whether it is a 1x1 convolution with stride and padding."""
    stride, pads = (conv.attributes.get_ints(name, ()) for name in ("strides", "pads"))
    return max(stride, default=1) > 1 and any(pads) and all(size == 1 for size in _weight(conv).shape[2:])  # type: ignore[index]


def _widen(graph: ir.Graph, conv: ir.Node) -> None:
    """Put a zero on either side of the kernel, along its first axis."""
    weight = _weight(conv)
    dequantised = made_by(weight, "DequantizeLinear")
    if dequantised is not None:
        weight.shape = None
        _put_zeros(graph, dequantised, 0)
    else:
        _put_zeros(graph, conv, 1)
    pads, axes = list(conv.attributes.get_ints("pads", ())), len(conv.attributes.get_ints("pads", ())) // 2
    reach = conv.attributes.get_ints("dilations", [1])[0]
    pads[0], pads[axes] = pads[0] + reach, pads[axes] + reach
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [3] + [1] * (axes - 1))


def _put_zeros(graph: ir.Graph, node: ir.Node, k: int) -> None:
    """Of a Concat and not a Pad, which ONNX Runtime would take for one of the images."""
    weight = node.inputs[k]
    assert weight is not None and weight.shape is not None and weight.dtype is not None
    build = StepBuilder(graph, node, FLOAT, Forms())
    zeros = build("Constant", value=ir.tensor(np.zeros(weight.shape.numpy(), weight.dtype.numpy())))
    widened = build("Concat", zeros, weight, zeros, axis=2)
    _name(node, zeros=zeros, widened=widened)
    node.replace_input_with(k, widened)


def _weight(conv: ir.Node) -> ir.Value:
    weight = conv.inputs[1]
    assert weight is not None and weight.shape is not None
    return weight


def _name(node: ir.Node, **values: ir.Value) -> None:
    """Unnamed values get a name of their own graph's choice, which the graph round it may have."""
    for name, value in values.items():
        value.name = f"{node.outputs[0].name}.{name}"
