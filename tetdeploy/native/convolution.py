"""What nodes for `convolution.c` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from tetdeploy import native

LEAST_CHANNELS = 16  # with fewer a tile is so empty that vector registers are as fast
MOST_ADDED, LEAST_ADDED, LEAST_BYTES = 2, 32, 32  # inputs, channels and registers of which additions are the faster way


def can_convolve(attributes: Mapping[str, Any], weights: onnx.TensorProto) -> bool:
    """Whether `convolution.c` computes a convolution with such attributes and weights `[O, C, ...]`."""
    return (
        attributes.get("group", 1) == 1
        and set(attributes.get("dilations", [1])) == {1}
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and len(weights.dims) == 4
        and weights.dims[1] >= LEAST_CHANNELS
    )


def has_additions() -> bool:
    """Whether the processor adds weights faster than ONNX Runtime multiplies them in float32."""
    return native.vector_bytes() >= LEAST_BYTES


def can_add(most: int, weights: onnx.TensorProto) -> bool:
    """Whether there, of inputs that are `most` at most, additions of weights `[O, C, ...]` are the faster way."""
    return most <= MOST_ADDED and min(weights.dims[:2]) >= LEAST_ADDED


def native_convolution(
    op: str, read: Sequence[str], y: str, weights: onnx.TensorProto, attributes: Mapping[str, Any], **others: Any
) -> onnx.NodeProto:
    """The node of `convolution.c` for a convolution with such weights `[O, C, ...]` and attributes."""
    return helper.make_node(
        op,
        read,
        [y],
        domain=native.DOMAIN,
        channels=weights.dims[1],
        kernel_shape=weights.dims[2:],
        strides=attributes.get("strides", [1, 1]),
        pads=attributes.get("pads", [0, 0, 0, 0]),
        **others,
    )
