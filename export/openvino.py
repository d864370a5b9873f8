"""What OpenVINO computes wrongly, or cannot compile, written otherwise.

It moves an average of currents in 8 bits in front of their scale and rounds it to 8 bits. So it moves a sum, as with
the spikes of a shortcut: a spike and no current become more than 1 by a rounding, and fire. It does neither past a Max.
And of what a 1x1 convolution with a stride does not read it computes nothing in the layers before, without regard to
its padding; a kernel of three, two of them zero, is no 1x1.

A sum or an average of bytes with three axes, as of currents [N, C, L], it computes wrongly as well where layers are in
8 bits, and one with four axes rightly.

With one thread, a convolution of one channel that gives few numbers in a call is left out of the sum that reads it; not
where the sum reads a Max of it.

It cannot compile a transposition between two reshapings of any number of images, as of a network that computes images
first and steps second, or channels last: it takes it for a shuffling of channels, though not with a Max behind it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .neuron_steps import FLOAT, Forms, StepBuilder
from .values import HAND_ON, constant, from_8_bits, made_by


def write_for_openvino(model: ir.Model, *, int8: bool) -> None:
    """Change a described graph, in place; its answers stay.

    Args:
        int8: it has currents in 8 bits.
    """
    nodes = [(graph, node) for graph in model.graphs() for node in graph]
    narrow = [(graph, conv) for graph, conv in nodes if _skips_padding(conv)]
    widened = set[ir.Node]()
    for graph, node in nodes:
        if (node.op_type == "AveragePool" and int8) or _reshapes_transposed(node):
            _keep_in_place(graph, node, 0)
        if int8 and _sums_three_axes(node):
            _give_a_fourth(graph, node)
        if node.op_type == "Add":
            for k, value in enumerate(node.inputs):
                if _is_current(value) or _reads_one_channel(value):
                    _keep_in_place(graph, node, k)
    for graph, conv in narrow:
        dequantised = made_by(conv.inputs[1], "DequantizeLinear")
        if dequantised is None:
            _put_zeros(graph, conv, 1)
        elif dequantised not in widened:  # calls of one module share it
            widened.add(dequantised)
            dequantised.outputs[0].shape = None
            _put_zeros(graph, dequantised, 0)
        _read_widened(conv)


def _reshapes_transposed(node: ir.Node) -> bool:
    """Whether it reshapes what was reshaped and had axes exchanged then."""
    transposed = made_by(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    return transposed is not None and made_by(transposed.inputs[0], "Reshape") is not None


def _is_current(value: ir.Value | None) -> bool:
    """Whether it is a whole layer's, in 8 bits. One step of several is what a neuron adds to its membrane, and stays as
    it is: a Max would have all of them written in float32."""
    while (moved := made_by(value, *HAND_ON)) is not None:
        value = moved.inputs[0]
    return made_by(value, "DequantizeLinear") is not None


def _reads_one_channel(value: ir.Value | None) -> bool:
    """Whether it is what a convolution of one channel gives, and to nothing else: OpenVINO joins it and the sum."""
    conv = made_by(value, "Conv")
    if conv is None or len(conv.outputs[0].uses()) > 1 or conv.attributes.get_int("group", 1) > 1:
        return False
    shape = _weight(conv).shape.numpy()  # type: ignore[union-attr]
    return shape[1] == 1 and max(shape[2:]) > 1


def _sums_three_axes(node: ir.Node) -> bool:
    """Whether it is a sum or an average of what was 8 bits, with three axes."""
    value = node.inputs[0] if node.op_type in ("GlobalAveragePool", "ReduceMean", "ReduceSum") else None
    return value is not None and value.shape is not None and len(value.shape) == 3 and from_8_bits(value)


def _give_a_fourth(graph: ir.Graph, node: ir.Node) -> None:
    """Put another in its place that reads one axis more, behind the others, which is taken off again."""
    value, summed = node.inputs[0], node.outputs[0]
    axes, keeps = [2], True  # what is global pools the last
    if node.op_type != "GlobalAveragePool":
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [0, 1, 2] if given is None else [int(axis) % 3 for axis in given]
        keeps = bool(node.attributes.get_int("keepdims", 1))
    build = StepBuilder(graph, node, FLOAT, Forms())
    wide = build("Unsqueeze", value, build.ints([3]))
    kind = "ReduceSum" if node.op_type == "ReduceSum" else "ReduceMean"
    apart = build(kind, wide, build.ints(axes), keepdims=1)
    _name(node, wide=wide, apart=apart)
    narrow = build("Squeeze", apart, build.ints([3] if keeps else [*axes, 3]))
    ir.convenience.replace_nodes_and_values(graph, node, [node], [], [summed], [narrow])


def _keep_in_place(graph: ir.Graph, node: ir.Node, k: int) -> None:
    """Put a Max that changes nothing before its k-th input."""
    value = node.inputs[k]
    assert value is not None and value.dtype is not None
    build, kind = StepBuilder(graph, node, FLOAT, Forms()), value.dtype.numpy()
    lowest = build("Constant", value=ir.tensor(np.array(0 if kind == np.uint8 else np.finfo(kind).min, kind)))
    kept = build("Max", value, lowest)
    _name(node, **{f"lowest{k}": lowest, f"kept{k}": kept})
    node.replace_input_with(k, kept)


def _skips_padding(conv: ir.Node) -> bool:
    """Whether it is a 1x1 convolution with stride and padding."""
    if conv.op_type != "Conv":
        return False
    stride, pads = (conv.attributes.get_ints(name, ()) for name in ("strides", "pads"))
    return max(stride, default=1) > 1 and any(pads) and all(size == 1 for size in _weight(conv).shape[2:])  # type: ignore[index]


def _read_widened(conv: ir.Node) -> None:
    """A convolution whose kernel got a zero on either side, along its first axis."""
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
