"""Counts spikes where they lie with channels last, as bytes that a convolution reads.

An overlay (`export/counters.py`) sums them up in float32, with channels first, for which each spike would be turned and
written once more, four times as long.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native import TO_FIRST, TO_LAST
from tetdeploy.native.graphs import Kind, attribute, copied, is_test, leading_to, put_nodes, scalar, turns
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.whole_numbers import Whole, WholeNumbers


def put_counts(graph: onnx.GraphProto, kinds: MutableMapping[str, Kind], neuron_steps: Sequence[NeuronStep]) -> None:
    """Let sums over the channels of spikes, or over all of an image, read the bytes that lie with channels last.

    Args:
        kinds: of the graph's tensors; those of new ones are added.
        neuron_steps: what `take_out_scans` took out.
    """
    writer = _Counts(graph, kinds, neuron_steps)
    for node in graph.node:
        writer.take(node)
    if writer.constants:
        graph.initializer.extend(writer.constants.values())
        put_nodes(graph, leading_to(graph.output, writer.nodes))


class _Counts:
    """A graph is written anew: `nodes`, with the `constants` that they name."""

    def __init__(
        self, graph: onnx.GraphProto, kinds: MutableMapping[str, Kind], neuron_steps: Sequence[NeuronStep]
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._kinds, self._wholes = kinds, WholeNumbers(graph, neuron_steps)
        self._last = {node.input[0]: node.output[0] for node in graph.node if turns(node, TO_LAST)}
        self._last |= {node.output[0]: node.input[0] for node in graph.node if turns(node, TO_FIRST)}
        self._counted: set[str] = set()

    def take(self, node: onnx.NodeProto) -> None:
        axes = self._wholes.constants.get(node.input[-1]) if node.op_type == "ReduceSum" else None
        if axes is None or attribute(node, "keepdims", 1):
            self.nodes.append(node)
            return
        path = self._path(node)
        split = next((made for made in path if made.op_type == "Reshape"), None)
        before = 1 if split is None else 2
        reduced = sorted(axis % (before + 3) - before for axis in numpy_helper.to_array(axes).tolist())
        counts = self._count(path, node) if reduced == [0, 1, 2] or (reduced == [0] and split is None) else None
        if counts is not None and reduced == [0]:
            self._put("Squeeze", [counts, self._axes(3)], node.output[0])
        elif counts is not None:
            self._sum(counts, node, split)
        elif reduced == [0, 1, 2] and split is not None:
            self._sum(self._merged(path[: path.index(split)], split.input[0]), node, split)
        else:
            self.nodes.append(node)

    def _path(self, sum_: onnx.NodeProto) -> list[onnx.NodeProto]:
        """What a sum reads, what that reads, and so on, as long as it has the same numbers, or tells which are zero.
        One may have two axes, of time, in place of the first."""
        path = list[onnx.NodeProto]()
        name = sum_.input[0]
        while name not in self._last and (made := self._wholes.producer.get(name)) is not None:
            splits = made.op_type == "Reshape" and self._splits(made)
            if not (splits and all(of.op_type != "Reshape" for of in path)) and not self._passes(made):
                break
            path.append(made)
            name = made.input[0]
        return path

    def _passes(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "DequantizeLinear":
            numbers = [self._wholes.constants.get(name) for name in node.input[1:]]
            return [t and scalar(t) for t in numbers] in ([1], [1, 0])
        return is_test(node) or (node.op_type == "Cast" and attribute(node, "to", None) == TensorProto.FLOAT)

    def _splits(self, reshape: onnx.NodeProto) -> bool:
        """Whether it makes `[T, N, C, H, W]` of `[T * N, C, H, W]`, as `take_out_scans` writes it."""
        shape, kind = self._wholes.producer.get(reshape.input[1]), self._kinds.get(reshape.input[0])
        if shape is None or shape.op_type != "Concat" or len(shape.input) != 2 or kind is None or len(kind.shape) != 4:
            return False
        dims = self._wholes.constants.get(shape.input[1])
        return dims is not None and tuple(numpy_helper.to_array(dims).tolist()) == kind.shape[1:]

    def _count(self, path: Sequence[onnx.NodeProto], sum_: onnx.NodeProto) -> str | None:
        """How many are not zero over channels, `[T * N, H, W, 1]`; None if the last of `path` reads no bytes that come
        with channels last, or the sum is another number."""
        name = path[-1].input[0] if path else sum_.input[0]
        kind, binary = self._kinds.get(name), self._wholes.of(name) == Whole(1)
        if name not in self._last or kind is None or kind.type != TensorProto.UINT8:
            return None
        read, channels = self._last[name], kind.shape[1]
        made, nonzero = f"{read}.counts", any(map(is_test, path))
        if not isinstance(channels, int) or not (binary or nonzero):
            return None
        if made not in self._counted:
            self._counted.add(made)
            if not binary:
                read = self._put("Cast", [read], f"{made}.any", to=TensorProto.BOOL)
                read = self._put("Cast", [read], f"{made}.ones", to=TensorProto.UINT8)
            ones = self._constant(f"counts.{channels}", np.ones((channels, 1), np.int8))
            sums = self._put("MatMulInteger", [read, ones], f"{made}.int32")
            self._put("Cast", [sums], made, to=TensorProto.FLOAT)
        return made

    def _merged(self, path: Sequence[onnx.NodeProto], read: str) -> str:
        """What `path` makes of `read`."""
        for node in reversed(path):
            twin = copied(node)
            twin.input[0], twin.output[0] = read, f"{node.output[0]}.counted"
            if twin.output[0] not in self._kinds:
                self.nodes.append(twin)
                self._kinds[twin.output[0]] = replace(self._kinds[read], type=attribute(node, "to", TensorProto.FLOAT))
            read = str(twin.output[0])
        return read

    def _sum(self, read: str, sum_: onnx.NodeProto, split: onnx.NodeProto | None) -> None:
        """Put a sum of `read` over all of an image in place of `sum_`, of which `split` made two axes of the first."""
        made = sum_.output[0] if split is None else f"{sum_.output[0]}.counted"
        self._put("ReduceSum", [read, self._axes(1, 2, 3)], made, keepdims=0)
        if split is not None:
            time = self._wholes.producer[split.input[1]].input[0]
            self._put("Reshape", [made, time], sum_.output[0], allowzero=1)

    def _put(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _axes(self, *axes: int) -> str:
        return self._constant("counts.axes." + ".".join(map(str, axes)), np.array(axes, np.int64))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(values, name))
        return name
