"""Puts int8 convolutions of this package (`convolution.c`) in place of ONNX Runtime's where the processor has AMX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native import DOMAIN
from tetdeploy.native.loops import constants_of, put_nodes

Array = np.ndarray[Any, Any]
LEAST_CHANNELS = 16  # with fewer a tile is so empty that vector registers are as fast


def use_tiles(graph: onnx.GraphProto, *, tiles: bool = True) -> int:
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
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    fits = (
        attributes.get("channels_last") == 1
        and fits_tiles(attributes, weights)
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
    return native_convolution("Convolution", read, node.output[0], weights, attributes, **own), made


def fits_tiles(attributes: Mapping[str, Any], weights: onnx.TensorProto) -> bool:
    """Whether `convolution.c` computes a convolution with such attributes and weights `[O, C, ...]`."""
    return (
        attributes.get("group", 1) == 1
        and set(attributes.get("dilations", [1])) == {1}
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and len(weights.dims) == 4
        and weights.dims[1] >= LEAST_CHANNELS
    )


def native_convolution(
    op: str, read: Sequence[str], y: str, weights: onnx.TensorProto, attributes: Mapping[str, Any], **others: int
) -> onnx.NodeProto:
    """The node of `convolution.c` for a convolution with such weights `[O, C, ...]` and attributes."""
    return helper.make_node(
        op,
        read,
        [y],
        domain=DOMAIN,
        channels=weights.dims[1],
        kernel_shape=weights.dims[2:],
        strides=attributes.get("strides", [1, 1]),
        pads=attributes.get("pads", [0, 0, 0, 0]),
        **others,
    )


def tiles_of(digits: Array) -> Array:
    """Weights in the order in which `convolution.c` multiplies them.

    Args:
        digits: int8 `[digits, O, C, kernel height, kernel width]`.

    Returns: `[blocks, digits, chunks, kernel height, kernel width, 2, 16, 16, 4]`.
    """
    (outputs, inputs), kernel = digits.shape[1:3], digits.shape[3:]
    whole = np.pad(digits, [(0, 0), (0, -outputs % 32), (0, -inputs % 64), (0, 0), (0, 0)])
    apart = whole.reshape(len(digits), -1, 2, 16, whole.shape[2] // 64, 16, 4, *kernel)
    return np.ascontiguousarray(apart.transpose(1, 0, 4, 7, 8, 2, 5, 3, 6))
