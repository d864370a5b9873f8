"""What nodes for `convolution.c` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from tetdeploy.native import DOMAIN

LEAST_CHANNELS = 16  # with fewer a tile is so empty that vector registers are as fast


def can_convolve(attributes: Mapping[str, Any], weights: onnx.TensorProto) -> bool:
    """Whether `convolution.c` computes a convolution with such attributes and weights `[O, C, ...]`."""
    return (
        attributes.get("group", 1) == 1
        and set(attributes.get("dilations", [1])) == {1}
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and len(weights.dims) == 4
        and weights.dims[1] >= LEAST_CHANNELS
    )


def native_convolution(
    op: str, read: Sequence[str], y: str, weights: onnx.TensorProto, attributes: Mapping[str, Any], **others: Any
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
