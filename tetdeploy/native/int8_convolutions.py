"""Puts int8 convolutions of this package in place of ONNX Runtime's: in tiles (`tiles.c`) where the processor has AMX,
of spikes by lookups (`lookups.c`) where it is AMD's with AVX-512, and by additions (`additions.c`) where it has AVX2,
but no instructions that multiply int8 (VNNI). Lookups give way to additions in calls in which few neurons fire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tetdeploy import native
from tetdeploy.native.convolution import can_add, can_convolve, has_additions, native_convolution
from tetdeploy.native.graphs import Kind, attributes_of, put_nodes
from tetdeploy.native.packing import groups_of, rows_of, runs_together, tiles_of
from tetdeploy.native.whole_numbers import WholeNumbers

Way = Literal["tiles", "plain", "additions", "lookups"]
MOST = 2**31 // 128  # inputs of 1 that may add up within int32
LEAST_WEIGHTS = 2048  # of a tap, of which additions are the faster way
LEAST_TAPS = 2  # of lookups, and outputs that a channel has in a call:
LEAST_OUTPUTS = 128
LEAST_SPARSE = 8192  # weights of a tap, of which lookups may give way to additions


def best_way() -> Way | None:
    """How this processor computes int8 convolutions faster than ONNX Runtime does; None if it does not."""
    if native.has_tiles():
        return "tiles"
    if native.has_fast_lookups():
        return "lookups"
    return "additions" if has_additions() and not native.has_vnni() else None


def put_int8_convolutions(
    graph: onnx.GraphProto, wholes: WholeNumbers, way: Way, kinds: Mapping[str, Kind], images: int = 1
) -> int:
    """Replace each `QLinearConv` of ONNX Runtime's that works on bytes with channels last, has one group, no dilation,
    an input and weights around zero, and at least 16 input channels.

    Args:
        wholes: of `graph`.
        way: in tiles, or in plain C, which is slow; or additions, of which inputs must be spikes or sums of few, and
            weights enough; or lookups, of which inputs must be spikes, and outputs enough.
        kinds: of the graph's tensors.
        images: in a small call; those of several steps are several.

    Returns: how many there are.
    """
    nodes, put_in_order = list(graph.node), dict[str, onnx.TensorProto]()  # once, however many have weights in common
    replaced = 0
    for k, node in enumerate(nodes):
        convolution = _convolution(node, wholes, way, images * _pixels(kinds.get(node.output[0])))
        if convolution is not None:
            nodes[k], made = convolution
            put_in_order |= {tensor.name: tensor for tensor in made}
            replaced += 1
    if replaced:
        graph.initializer.extend(put_in_order.values())
        put_nodes(graph, nodes)
    return replaced


def _pixels(kind: Kind | None) -> int:
    """Of an image `[N, H, W, C]`; 0 if its size is not fixed."""
    sizes = [size for size in kind.shape[1:3] if isinstance(size, int)] if kind is not None else []
    return math.prod(sizes) if len(sizes) == 2 else 0


def _convolution(
    node: onnx.NodeProto, wholes: WholeNumbers, way: Way, outputs: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]] | None:
    """The node in place of `node`, which has so many outputs in a channel, and constants of its own."""
    if node.domain != "com.microsoft" or node.op_type != "QLinearConv" or len(node.input) != 9:
        return None  # without a bias
    if not all(name in wholes.constants for name in node.input[1:]):
        return None
    x, *others, bias = node.input
    x_scale, x_zero, weights, w_scale, w_zero, y_scale, y_zero = (wholes.constants[name] for name in others)
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
    digits = numpy_helper.to_array(weights)
    own = {"zero_point": int(numpy_helper.to_array(y_zero).item())}
    whole = wholes.of(x)
    most = whole.most if whole is not None and whole.most * digits[0].size <= MOST else MOST
    if way == "additions":
        if not can_add(most, weights) or math.prod(weights.dims[:2]) < LEAST_WEIGHTS:
            return None
        op, packed, order = "Int8Additions", rows_of(digits.astype(np.int16), most), f"rows{most}"
        own |= {"most": most, "vector_bytes": native.vector_bytes()}
    elif way == "lookups":
        if most > 1 or digits[0, 0].size < LEAST_TAPS or outputs < LEAST_OUTPUTS:
            return None
        op, packed, order = "Int8Lookups", groups_of(digits), "groups"
        adds = can_add(most, weights) and math.prod(weights.dims[:2]) >= LEAST_SPARSE
        own |= {"together": runs_together(digits), "most": 1, "vector_bytes": native.vector_bytes() if adds else 0}
    else:
        op, packed, order = "Int8Convolution", tiles_of(digits[None]), "tiles"
        own |= {"plain": int(way == "plain")}
    scales = numpy_helper.to_array(x_scale) * numpy_helper.to_array(w_scale) / numpy_helper.to_array(y_scale)
    made = [
        numpy_helper.from_array(packed, f"{weights.name}.{order}"),
        numpy_helper.from_array(
            np.broadcast_to(scales.astype(np.float32), len(digits)).copy(), f"{node.output[0]}.scales"
        ),
    ]
    read = [x, *(tensor.name for tensor in made), bias]
    return native_convolution(op, read, node.output[0], weights, attributes, **own), made
