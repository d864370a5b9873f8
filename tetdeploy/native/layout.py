"""Leaves tensors between two convolutions in the layout that these want.

ONNX Runtime's float32 convolutions work on blocks of channels (NCHWc), its integer ones with channels last. Where it
does not know the operators in between it puts `ReorderOutput` and `ReorderInput`, or `Transpose`, round them.
Element-wise ones do not mind the order of elements.
"""

from __future__ import annotations

import math
from collections.abc import Container, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native.graphs import Kind, attribute, copied, leading_to, put_nodes, reading
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.whole_numbers import Whole, WholeNumbers

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # where the channels go
EXACT = 2**24  # whole numbers up to this have no rounding in float32
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
            twin = copied(node)
            twin.input[:] = [blocked.get(name, name) for name in node.input]
            twin.output[:] = [f"{name}.blocked" for name in node.output]
            nodes.append(twin)
            for plain, name in zip(node.output, twin.output, strict=True):
                blocked[plain], kinds[name] = name, kinds[plain]
                channels = kinds[plain].shape[1]
                nodes.append(helper.make_node("ReorderOutput", [name], [plain], domain=DOMAIN, channels=channels))
            continue
        nodes.append(node)
    nodes = leading_to(graph.output, reading(instead, nodes))
    if not moved or any(
        n.op_type == "ReorderOutput" and kinds[n.input[0]].type != onnx.TensorProto.FLOAT for n in nodes
    ):
        return False  # bytes cannot be put in order again
    put_nodes(graph, nodes)
    return True


def _same_shape(kinds: MutableMapping[str, Kind], reorder: onnx.NodeProto) -> bool:
    """Whether no channel was added to fill a block, and channels are the second axis."""
    last = attribute(reorder, "channels_last", 0)
    read, written = reorder.input[0], reorder.output[0]
    return not last and read in kinds and written in kinds and kinds[read].shape[1:] == kinds[written].shape[1:]


def keep_last(
    graph: onnx.GraphProto,
    kinds: MutableMapping[str, Kind],
    elementwise: Container[int],
    numbers: Container[str],
    neuron_steps: Sequence[NeuronStep] = (),
) -> bool:
    """Let the nodes `elementwise` work with channels last where what they read can come so and where that saves
    `Transpose`s: before integer convolutions, before the mean over an image, and before sums that count spikes.
    Arguments and result as of `keep_blocked`.

    Args:
        neuron_steps: what `take_out_scans` took out.
    """
    last: dict[str, str] = {}  # by the name of the tensor in usual order
    instead: dict[str, str] = {}
    computed: dict[str, str] = {}  # of `last` what is computed here
    means = set[str]()  # of which a `Transpose` costs nothing
    axes = {t.name: numpy_helper.to_array(t).tolist() for t in graph.initializer if t.data_type == TensorProto.INT64}
    new_axes: dict[str, list[int]] = {}
    wholes = WholeNumbers(graph, neuron_steps)
    given = {output.name for output in graph.output}
    nodes = list[onnx.NodeProto]()
    for k, node in enumerate(graph.node):
        tensors = [name for name in node.input if name not in numbers]
        if _turns(node, TO_LAST) and node.input[0] in last and node.output[0] not in given:
            instead[node.output[0]] = last[node.input[0]]
            continue
        nodes.append(node)
        if node.op_type in ("ReduceMean", "ReduceSum") and node.input[0] in last:
            reduced = sorted(axis % 4 for axis in axes.get(node.input[-1], []))
            if reduced and _is_exact(kinds[node.input[0]], reduced, wholes.of(node.input[0])):
                nodes[-1:] = made_of_it = _reduced(node, last[node.input[0]], reduced)
                if made_of_it != [node]:
                    new_axes[_axes_name(node)] = [TO_LAST.index(axis) for axis in reduced]
                if node.op_type == "ReduceMean":
                    means.update(made_of_it[0].output)
            continue
        if node.output[0] not in kinds or len(kinds[node.output[0]].shape) != 4:
            continue
        if _turns(node, TO_FIRST):
            last[node.output[0]] = node.input[0]
        elif node.domain == DOMAIN and node.op_type == "ReorderOutput" and _same_shape(kinds, node):
            channels = kinds[node.output[0]].shape[1]
            nodes.append(_twin(node, last, kinds, channels=channels, channels_last=1))
        elif k in elementwise and tensors and all(name in last for name in tensors):
            nodes.append(_twin(node, last, kinds))
            computed |= {name: last[name] for name in node.output}
    nodes = leading_to(graph.output, reading(instead, nodes))
    made = {name for node in nodes for name in node.output}
    before, after = (
        sum(node.op_type == "Transpose" and node.input[0] not in means for node in each) for each in (graph.node, nodes)
    )
    if after >= before or any(name in made and twin in made for name, twin in computed.items()):
        return False
    graph.initializer.extend(numpy_helper.from_array(np.array(moved), name) for name, moved in new_axes.items())
    put_nodes(graph, nodes)
    return True


def _turns(node: onnx.NodeProto, perm: tuple[int, ...]) -> bool:
    return node.op_type == "Transpose" and any(a.name == "perm" and tuple(a.ints) == perm for a in node.attribute)


def _twin(
    node: onnx.NodeProto, last: MutableMapping[str, str], kinds: MutableMapping[str, Kind], **attributes: Any
) -> onnx.NodeProto:
    """The node on tensors with channels last."""
    outputs = [f"{name}.last" for name in node.output]
    twin = helper.make_node(
        node.op_type, [last.get(name, name) for name in node.input], outputs, domain=node.domain, **attributes
    )
    twin.attribute.extend(a for a in node.attribute if a.name not in attributes)
    for name, output in zip(node.output, outputs, strict=True):
        last[name] = output
        kinds[output] = replace(kinds[name], shape=tuple(kinds[name].shape[axis] for axis in TO_LAST))
    return twin


def _reduced(node: onnx.NodeProto, last: str, axes: Sequence[int]) -> list[onnx.NodeProto]:
    """A mean over an image, or a sum that leaves its axes in their order, of what lies with channels last as `last`;
    the node itself if it is neither."""
    read, keeps = [last, _axes_name(node)], attribute(node, "keepdims", 1)
    if node.op_type == "ReduceMean" and keeps and axes == [2, 3]:
        mean = helper.make_node("ReduceMean", read, [f"{node.output[0]}.last"])
        return [mean, helper.make_node("Transpose", mean.output, node.output, perm=TO_FIRST)]
    left = [TO_LAST.index(axis) for axis in range(4) if axis not in axes]
    if node.op_type == "ReduceSum" and not keeps and left == sorted(left):
        return [helper.make_node("ReduceSum", read, node.output, keepdims=0)]
    return [node]


def _axes_name(node: onnx.NodeProto) -> str:
    return f"{node.output[0]}.axes.last"


def _is_exact(kind: Kind, axes: Sequence[int], whole: Whole | None) -> bool:
    """Whether the order of a sum of such numbers over these axes plays no part in float32."""
    sizes = [kind.shape[axis] for axis in axes]
    if whole is None or not all(isinstance(size, int) for size in sizes):
        return False
    return whole.most * math.prod(sizes) < EXACT  # type: ignore[arg-type]
