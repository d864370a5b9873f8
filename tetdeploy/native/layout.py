"""Leaves float32 tensors in ONNX Runtime's blocked layout (NCHWc) between two convolutions.

ONNX Runtime's optimiser puts a `ReorderOutput` behind a convolution and a `ReorderInput` before the next one where it
does not know the operators in between. Element-wise ones do not mind the order of elements.
"""

from __future__ import annotations

from collections.abc import Container, MutableMapping
from typing import TYPE_CHECKING

import onnx
from onnx import helper

from tetdeploy.native.loops import leading_to, put_nodes

if TYPE_CHECKING:
    from tetdeploy.native.regions import Kind

DOMAIN = "com.microsoft.nchwc"


def keep_blocked(
    graph: onnx.GraphProto, kinds: MutableMapping[str, Kind], elementwise: Container[int], numbers: Container[str]
) -> bool:
    """Let the nodes `elementwise` (by their places) work on blocked tensors where all they read comes from such.

    Args:
        kinds: of the graph's tensors; those of new ones are added.
        numbers: constants that fit any layout.

    Returns: whether there are any. If not, the graph is as it was.
    """
    blocked: dict[str, str] = {}  # by the name of the tensor in usual order
    instead: dict[str, str] = {}
    nodes = list[onnx.NodeProto]()
    moved = False
    for k, node in enumerate(graph.node):
        tensors = [name for name in node.input if name not in numbers]
        if node.domain == DOMAIN and node.op_type == "ReorderOutput" and _same_shape(kinds, node):
            blocked[node.output[0]] = node.input[0]
        elif node.domain == DOMAIN and node.op_type == "ReorderInput" and node.input[0] in blocked:
            instead[node.output[0]] = blocked[node.input[0]]
        elif k in elementwise and tensors and all(name in blocked for name in tensors):
            moved = True
            copied = onnx.NodeProto.FromString(node.SerializeToString())
            copied.input[:] = [blocked.get(name, name) for name in node.input]
            copied.output[:] = [f"{name}.blocked" for name in node.output]
            nodes.append(copied)
            for plain, name in zip(node.output, copied.output, strict=True):
                blocked[plain], kinds[name] = name, kinds[plain]
                channels = kinds[plain].shape[1]
                nodes.append(helper.make_node("ReorderOutput", [name], [plain], domain=DOMAIN, channels=channels))
            continue
        nodes.append(node)
    for node in (nodes := [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]):
        node.input[:] = [instead.get(name, name) for name in node.input]
    nodes = leading_to(graph.output, nodes)
    if not moved or any(
        n.op_type == "ReorderOutput" and kinds[n.input[0]].type != onnx.TensorProto.FLOAT for n in nodes
    ):
        return False  # bytes cannot be put in order again
    put_nodes(graph, nodes)
    return True


def _same_shape(kinds: MutableMapping[str, Kind], reorder: onnx.NodeProto) -> bool:
    """Whether no channel was added to fill a block, and channels are the second axis."""
    last = any(a.i for a in reorder.attribute if a.name == "channels_last")
    read, written = reorder.input[0], reorder.output[0]
    return not last and read in kinds and written in kinds and kinds[read].shape[1:] == kinds[written].shape[1:]
