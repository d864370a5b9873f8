"""Takes the `Scan` out of a dynamic graph, so that ONNX Runtime optimises what is round it as in an unrolled graph.

Neurons become a comparison with a number of their own on the merged steps `[T * N, ...]`: element-wise, as neurons are,
so that the optimiser keeps its memory layout across it. In the optimised graph `regions` finds the numbers again, and
runs the neurons in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from tetdeploy.native.graphs import (
    attribute,
    attributes_of,
    leading_to,
    put_nodes,
    reads,
    scalar,
    steps_input,
    without_weights,
)

_TIME = "[T, N]"
_FIRST_MARK = 2**21  # no threshold is as high, and float32 tells it from the numbers that follow


@dataclass(frozen=True)
class NeuronStep:
    """One step of a layer's neurons: `nodes` make of the membrane `u` and the current `x` the membrane `next_u` and the
    `spikes`, with the `numbers` that they name."""

    nodes: tuple[onnx.NodeProto, ...]
    numbers: dict[str, np.generic]
    u: str
    x: str
    next_u: str
    spikes: str


def take_out_scans(model: onnx.ModelProto) -> list[NeuronStep]:
    """Replace each `Scan` of `model` by a comparison with a number of its own, of which `marked` tells the neurons.

    One that begins with a membrane of the caller's, gives one back, or runs over other steps than the model's, stays.
    """
    writer = _Merged(model)
    for node in model.graph.node:
        writer.take(node)
    put_nodes(model.graph, leading_to(model.graph.output, writer.nodes))
    return writer.neuron_steps


def marked(number: np.generic | None, neuron_steps: Sequence[NeuronStep]) -> NeuronStep | None:
    """The neurons for which a comparison with `number` stands, if it does."""
    if number is None or not _FIRST_MARK <= float(number) < _FIRST_MARK + len(neuron_steps):
        return None
    return neuron_steps[int(number) - _FIRST_MARK]


class _Merged:
    """A graph is written anew, and what is `[T, N, ...]` between neurons and convolutions becomes `[T * N, ...]`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = shape_inference.infer_shapes(without_weights(model, 64)).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds = ((value.name, value.type.tensor_type) for value in values)
        self.kinds = {name: kind for name, kind in kinds if kind.elem_type}  # outputs of an overlay may say no type
        self.time = (*reversed(self._dims(steps_input(model.graph))[:2]),)  # T and N
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.read = {name for node in model.graph.node for name in reads(node)} | {v.name for v in model.graph.output}
        self.graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.neuron_steps: list[NeuronStep] = []
        self.merged: dict[str, str] = {}

    def take(self, node: onnx.NodeProto) -> None:
        neurons = _neuron_step(node) if node.op_type == "Scan" else None
        zeros = self.producer.get(node.input[0]) if neurons is not None else None
        if (
            neurons is not None
            and zeros is not None
            and _is_zeros(zeros)
            and node.output[0] not in self.read
            and self._dims(node.input[1])[:2] == self.time
            and all(isinstance(dim, int) and dim > 0 for dim in self._dims(node.input[1])[2:])
        ):
            self._compare(node, neurons)
        elif (
            node.op_type == "Reshape" and node.input[0] in self.merged and self._is_view(node.output[0], node.input[0])
        ):
            self.nodes.append(helper.make_node("Identity", [self.merged[node.input[0]]], node.output))
        else:
            self.nodes.append(node)
            if node.op_type in ("Add", "Cast") and any(name in self.merged for name in node.input):
                self._merge(node.output[0])

    def _compare(self, scan: onnx.NodeProto, neurons: NeuronStep) -> None:
        current, spikes = scan.input[1], scan.output[1]
        fires, mark = f"{spikes}.fires", f"{spikes}.mark"
        number = np.array(_FIRST_MARK + len(self.neuron_steps), np.float32)
        self.graph.initializer.append(numpy_helper.from_array(number, mark))
        self.merged[spikes] = f"{spikes}.merged"
        self.nodes += [
            helper.make_node("Greater", [self._merge(current), mark], [fires]),
            helper.make_node("Cast", [fires], [self.merged[spikes]], to=self.kinds[spikes].elem_type),
            helper.make_node("Concat", [self._time(), f"{spikes}.dims"], [f"{spikes}.shape"], axis=0),
            helper.make_node("Reshape", [self.merged[spikes], f"{spikes}.shape"], [spikes], allowzero=1),
        ]  # the last two for who reads [T, N, ...]
        dims = np.array(self._dims(current)[2:], np.int64)
        self.graph.initializer.append(numpy_helper.from_array(dims, f"{spikes}.dims"))
        self.neuron_steps.append(neurons)

    def _time(self) -> str:
        """What holds T and N."""
        if not self.neuron_steps:
            turned = numpy_helper.from_array(np.array([1, 0], np.int64), f"{_TIME}.turned")
            self.graph.initializer.append(turned)
            shape = [f"{_TIME}.shape"]
            self.nodes.append(helper.make_node("Shape", [steps_input(self.graph)], shape, start=0, end=2))
            self.nodes.append(helper.make_node("Gather", [*shape, turned.name], [_TIME]))
        return _TIME

    def _merge(self, name: str) -> str:
        """The value `[T * N, ...]` that has the elements of `name [T, N, ...]`."""
        if name not in self.merged:
            node = self.producer.get(name)
            if node is not None and node.op_type == "Reshape" and self._is_view(node.input[0], name):
                self.merged[name] = node.input[0]
            elif node is not None and node.op_type in ("Add", "Cast") and self._all_like(name, node.input):
                copied = helper.make_node(node.op_type, [self._merge(part) for part in node.input], [f"{name}.merged"])
                copied.attribute.extend(node.attribute)
                self.nodes.append(copied)
                self.merged[name] = copied.output[0]
            else:
                shape = numpy_helper.from_array(np.array([-1, *self._dims(name)[2:]], np.int64), f"{name}.merge")
                self.graph.initializer.append(shape)
                self.nodes.append(helper.make_node("Reshape", [name, shape.name], [f"{name}.merged"]))
                self.merged[name] = f"{name}.merged"
        return self.merged[name]

    def _is_view(self, merged: str, name: str) -> bool:
        """Whether one is the other with its first two axes merged."""
        return len(self._dims(merged)) > 1 and self._dims(merged)[1:] == self._dims(name)[2:]

    def _all_like(self, name: str, parts: Iterable[str]) -> bool:
        return len(self._dims(name)) > 2 and all(self._dims(part) == self._dims(name) for part in parts)

    def _dims(self, name: str) -> tuple[int | str, ...]:
        kind = self.kinds.get(name)
        return () if kind is None else tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)


def _neuron_step(scan: onnx.NodeProto) -> NeuronStep | None:
    """The body of a `Scan` over one current, from the first step to the last, with one membrane."""
    attributes = attributes_of(scan)
    if set(attributes) != {"body", "num_scan_inputs"} or attributes["num_scan_inputs"] != 1 or len(scan.input) != 2:
        return None
    body = attributes["body"]
    if len(body.output) != 2:
        return None
    constants = [*body.initializer]
    for node in body.node:
        if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
            constants.append(onnx.TensorProto.FromString(value.SerializeToString()))
            constants[-1].name = node.output[0]
    numbers = {t.name: number for t in constants if (number := scalar(t)) is not None}
    nodes = tuple(node for node in body.node if node.op_type != "Constant")
    return NeuronStep(nodes, numbers, *(value.name for value in (*body.input, *body.output)))


def _is_zeros(node: onnx.NodeProto) -> bool:
    value = attribute(node, "value", None)
    return node.op_type == "ConstantOfShape" and (value is None or not numpy_helper.to_array(value).any())
