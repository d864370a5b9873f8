"""Puts int8 convolutions of this package (`tiles.c`) in place of ONNX Runtime's where the processor has AMX."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tetdeploy.native.convolution import can_convolve, native_convolution
from tetdeploy.native.graphs import attributes_of, constants_of, put_nodes
from tetdeploy.native.packing import tiles_of


def put_int8_convolutions(graph: onnx.GraphProto, *, tiles: bool = True) -> int:
    """Replace each `QLinearConv` of ONNX Runtime's that works on bytes with channels last, has one group, no dilation,
    an input and weights around zero, and at least 16 input channels.

    Args:
        tiles: multiply with AMX; otherwise in plain C, which is slow.

    Returns: how many there are.
    """
    constants = constants_of(graph)
    nodes, put_in_order = list(graph.node), dict[str, onnx.TensorProto]()  # once, however many have weights in common
    replaced = 0
    for k, node in enumerate(nodes):
        convolution = _convolution(node, constants, tiles)
        if convolution is not None:
            nodes[k], made = convolution
            put_in_order |= {tensor.name: tensor for tensor in made}
            replaced += 1
    if replaced:
        graph.initializer.extend(put_in_order.values())
        put_nodes(graph, nodes)
    return replaced


def _convolution(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], tiles: bool
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]] | None:
    """The node in place of `node`, and constants of its own."""
    if node.domain != "com.microsoft" or node.op_type != "QLinearConv" or len(node.input) != 9:
        return None  # without a bias
    if not all(name in constants for name in node.input[1:]):
        return None
    x, *others, bias = node.input
    x_scale, x_zero, weights, w_scale, w_zero, y_scale, y_zero = (constants[name] for name in others)
    attributes = attributes_of(node)
    fits = (
        attributes.get("channels_last") == 1
        and can_convolve(attributes, weights)
        and weights.data_type == TensorProto.INT8
        and x_zero.data_type == y_zero.data_type == TensorProto.UINT8
        and not numpy_helper.to_array(x_zero).any()
        and not numpy_helper.to_array(w_zero).any()
    )
    if not fits:
        return None
    channel = numpy_helper.to_array(x_scale) * numpy_helper.to_array(w_scale) / numpy_helper.to_array(y_scale)
    made = [
        numpy_helper.from_array(tiles_of(numpy_helper.to_array(weights)[None]), f"{weights.name}.tiles"),
        numpy_helper.from_array(
            np.broadcast_to(channel.astype(np.float32), weights.dims[0]).copy(), f"{node.output[0]}.scales"
        ),
    ]
    read = [x, *(tensor.name for tensor in made), bias]
    own = {"zero_point": int(numpy_helper.to_array(y_zero).item()), "plain": int(not tiles)}
    return native_convolution("Int8Convolution", read, node.output[0], weights, attributes, **own), made
