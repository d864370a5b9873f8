"""Leaves tensors between two convolutions in the layout that these want.

ONNX Runtime's float32 convolutions work on blocks of channels (NCHWc), its integer ones with channels last. Where it
does not know the operators in between it puts `ReorderOutput` and `ReorderInput`, or `Transpose`, round them.
Element-wise ones do not mind the order of elements.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native import TO_FIRST, TO_LAST, last_name
from tetdeploy.native.graphs import Kind, attribute, constants_of, copied, leading_to, put_nodes, reading, scalar, turns
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.whole_numbers import Whole, WholeNumbers

EXACT = 2**24  # whole numbers up to this have no rounding in float32
NCHWC = "com.microsoft.nchwc"


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
        if node.domain == NCHWC and node.op_type == "ReorderOutput" and _same_shape(kinds, node):
            blocked[node.output[0]] = node.input[0]
        elif node.domain == NCHWC and node.op_type == "ReorderInput" and node.input[0] in blocked:
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
                nodes.append(helper.make_node("ReorderOutput", [name], [plain], domain=NCHWC, channels=channels))
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
    states: Iterable[tuple[str, str]] = (),
) -> bool:
    """Let the nodes `elementwise` work with channels last where what they read can come so and where that saves
    `Transpose`s: before integer convolutions, before the mean over an image, and before sums that count spikes.
    Arguments and result as of `keep_blocked`.

    Args:
        neuron_steps: what `take_out_scans` took out.
        states: inputs and the outputs that become them in the next call. Of those that gain by it both get channels
            last, and names that `last_name` gives.
    """
    turned = [pair for pair in states if all(len(kinds[name].shape) == 4 for name in pair)]
    plain = set[str]()
    while True:
        writer = _ToLast(graph, kinds, elementwise, numbers, neuron_steps, turned, plain)
        for k, node in enumerate(graph.node):
            writer.take(k, node)
        outputs = writer.finish()
        nodes = leading_to(outputs, reading(writer.instead, writer.nodes))
        stuck = {name for node in nodes if node.op_type == "Transpose" for name in (*node.input, *node.output)}
        staying = [(read, made) for read, made in turned if not {read, last_name(made)} & stuck]
        twice = writer.computed_twice(nodes)
        if len(staying) == len(turned) and twice <= plain:
            break
        turned, plain = staying, plain | twice
    if twice or not writer.saves(nodes):
        return False
    axes = writer.new_axes.items()
    graph.initializer.extend(numpy_helper.from_array(np.array(moved), name) for name, moved in axes)
    inputs = [writer.value(last_name(v.name)) if v.name in dict(turned) else v for v in graph.input]
    for values, new in ((graph.input, inputs), (graph.output, outputs)):
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in new]
        del values[:]
        values.extend(copies)
    put_nodes(graph, nodes)
    return True


def turn_bytes(graph: onnx.GraphProto) -> None:
    """Transpose bytes where numbers are transposed that come from bytes, and are quantised to the same again, as ONNX
    Runtime leaves them behind its integer convolutions."""
    producer = {name: node for node in graph.node for name in node.output}
    nodes, constants = list(graph.node), constants_of(graph)
    numbers = {name for name, t in constants.items() if scalar(t) is not None}
    for k, node in enumerate(nodes):
        if node.op_type != "QuantizeLinear" or len(node.input) != 3 or not numbers.issuperset(node.input[1:]):
            continue
        turn = producer.get(node.input[0])
        before = producer.get(turn.input[0]) if turn is not None and turn.op_type == "Transpose" else None
        if turn and before and before.op_type == "DequantizeLinear" and before.input[1:] == node.input[1:]:
            nodes[k] = copied(turn)
            nodes[k].input[0], nodes[k].output[0] = before.input[0], node.output[0]
    put_nodes(graph, leading_to(graph.output, nodes))


class _ToLast:
    """A graph is written anew, with what can come with channels last beside what it was.

    Args:
        plain: what sums and means read as it was.

    Attributes:
        instead: what the nodes are to read in place of others.
        new_axes: constants that they name: axes, which are others with channels last.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        kinds: MutableMapping[str, Kind],
        elementwise: Container[int],
        numbers: Container[str],
        neuron_steps: Sequence[NeuronStep],
        states: Sequence[tuple[str, str]],
        plain: Container[str],
    ) -> None:
        self.graph, self.kinds, self.elementwise, self.numbers = graph, kinds, elementwise, numbers
        self.wholes = WholeNumbers(graph, neuron_steps)
        self.given = {output.name for output in graph.output}
        int64s = (t for t in graph.initializer if t.data_type == TensorProto.INT64)
        self.axes = {t.name: numpy_helper.to_array(t).tolist() for t in int64s}
        self.nodes: list[onnx.NodeProto] = []
        self.instead: dict[str, str] = {}
        self.new_axes: dict[str, list[int]] = {}
        self.last: dict[str, str] = {}  # by the name of the tensor in usual order
        self.computed: dict[str, str] = {}  # of `last` what is computed here
        self.means = set[str]()  # of which a `Transpose` costs nothing
        self._states, self._plain = states, plain
        for name, _ in states:
            self._name_last(name)
            self.nodes.append(helper.make_node("Transpose", [self.last[name]], [name], perm=TO_FIRST))

    def take(self, k: int, node: onnx.NodeProto) -> None:
        tensors = [name for name in node.input if name not in self.numbers]
        if turns(node, TO_LAST) and node.input[0] in self.last and node.output[0] not in self.given:
            self.instead[node.output[0]] = self.last[node.input[0]]
            return
        self.nodes.append(node)
        if node.op_type in ("ReduceMean", "ReduceSum"):
            if node.input[0] in self.last and node.input[0] not in self._plain:
                self._reduce(node)
        elif node.output[0] not in self.kinds or len(self.kinds[node.output[0]].shape) != 4:
            return
        elif turns(node, TO_FIRST):
            self.last[node.output[0]] = node.input[0]
        elif node.domain == NCHWC and node.op_type == "ReorderOutput" and _same_shape(self.kinds, node):
            self._turn(node, channels=self.kinds[node.output[0]].shape[1], channels_last=1)
        elif k in self.elementwise and tensors and all(name in self.last for name in tensors):
            self._turn(node)
            self.computed |= {name: self.last[name] for name in node.output}

    def finish(self) -> list[onnx.ValueInfoProto]:
        """What the graph gives, when all nodes have been taken."""
        turned = [made for _, made in self._states]
        for made in turned:
            if made not in self.computed:
                self._name_last(made)
                self.nodes.append(helper.make_node("Transpose", [made], [self.last[made]], perm=TO_LAST))
        return [self.value(self.last[v.name]) if v.name in turned else v for v in self.graph.output]

    def value(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.kinds[name].type, self.kinds[name].shape)

    def saves(self, nodes: Sequence[onnx.NodeProto]) -> bool:
        """Whether `nodes` have fewer `Transpose`s than the graph."""
        before, after = (
            sum(node.op_type == "Transpose" and node.input[0] not in self.means for node in each)
            for each in (self.graph.node, nodes)
        )
        return bool(after < before)

    def computed_twice(self, nodes: Iterable[onnx.NodeProto]) -> set[str]:
        """What `nodes` compute in both layouts, by the names in usual order."""
        made = {name for node in nodes for name in node.output}
        return {name for name, twin in self.computed.items() if name in made and twin in made}

    def _reduce(self, node: onnx.NodeProto) -> None:
        """Write a mean or a sum, which was written as it is, as one of what has its channels last, if it can be."""
        read = node.input[0]
        reduced = sorted(axis % 4 for axis in self.axes.get(node.input[-1], []))
        if reduced and _is_exact(self.kinds[read], reduced, self.wholes.of(read)):
            self.nodes[-1:] = made_of_it = _reduced(node, self.last[read], reduced)
            if made_of_it != [node]:
                self.new_axes[_axes_name(node)] = [TO_LAST.index(axis) for axis in reduced]
            if node.op_type == "ReduceMean":
                self.means.update(made_of_it[0].output)

    def _turn(self, node: onnx.NodeProto, **attributes: Any) -> None:
        """Write the node on tensors with channels last, too."""
        read = [self.last.get(name, name) for name in node.input]
        for name in node.output:
            self._name_last(name)
        outputs = [self.last[name] for name in node.output]
        twin = helper.make_node(node.op_type, read, outputs, domain=node.domain, **attributes)
        twin.attribute.extend(a for a in node.attribute if a.name not in attributes)
        self.nodes.append(twin)

    def _name_last(self, name: str) -> None:
        kind, self.last[name] = self.kinds[name], last_name(name)
        self.kinds[self.last[name]] = replace(kind, shape=tuple(kind.shape[axis] for axis in TO_LAST))


def _reduced(node: onnx.NodeProto, last: str, axes: Sequence[int]) -> list[onnx.NodeProto]:
    """A mean over an image, or a sum that leaves its axes in their order, of what lies with channels last as `last`;
    the node itself if it is neither."""
    read, keeps = [last, _axes_name(node)], attribute(node, "keepdims", 1)
    if node.op_type == "ReduceMean" and keeps and axes == [2, 3]:
        mean = helper.make_node("ReduceMean", read, [last_name(node.output[0])])
        return [mean, helper.make_node("Transpose", mean.output, node.output, perm=TO_FIRST)]
    left = [TO_LAST.index(axis) for axis in range(4) if axis not in axes]
    if node.op_type == "ReduceSum" and not keeps and left == sorted(left):
        return [helper.make_node("ReduceSum", read, node.output, keepdims=0)]
    return [node]


def _axes_name(node: onnx.NodeProto) -> str:
    return last_name(f"{node.output[0]}.axes")


def _is_exact(kind: Kind, axes: Sequence[int], whole: Whole | None) -> bool:
    """Whether the order of a sum of such numbers over these axes plays no part in float32."""
    sizes = [kind.shape[axis] for axis in axes]
    if whole is None or not all(isinstance(size, int) for size in sizes):
        return False
    return whole.most * math.prod(sizes) < EXACT  # type: ignore[arg-type]
