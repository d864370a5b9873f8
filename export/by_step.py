"""Layers on the images of one step, where that is faster than on those of all T steps together.

An unrolled graph splits the currents of T x N images into steps and joins their spikes again for the next layer, which
passes over memory twice. A convolution of each step by itself needs neither, but reads its weights T times: it pays
where there is more to put out than there are weights to read. ResNet-19 at batch 8 gains 2 % so, in its first stage;
all of its convolutions step by step would lose at batch 1 what they gain at batch 8.

The engine counts and compares values of all T x N images. Those that the graph then no longer has are joined in an
overlay (see `counters`), which the engine adds whenever it adds another.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common

from .neuron_steps import Neurons, makes_steps

_PER_IMAGE = ("Conv", "MaxPool", "AveragePool", "Add")
# Values put out for each weight from which on a convolution goes step by step: measured, see the top of this file.
_MIN_OUTPUTS = 0.5


def take_apart(model: ir.Model, neurons: Iterable[Neurons], read: Iterable[ir.Value]) -> bytes:
    """Let layers between neurons run step by step where it pays, in place.

    Args:
        model: an unrolled graph, lowered.
        neurons: its neurons, whose spikes are compared.
        read: values `[T * N, ...]` that are counted.

    Returns:
        The overlay with the spikes and the values of `read` that the graph no longer has; without any it is empty.
    """
    spikes = [layer.spikes for layer in neurons]
    parts = _Parts(model.graph, spikes)
    for node in list(model.graph):
        steps = parts.of(node.inputs[0]) if makes_steps(node) else None
        if steps is not None:
            for whole, step in zip(node.outputs, steps, strict=True):
                whole.replace_all_uses_with(step)
    joined = {value: parts.of(value, shared=True) for value in dict.fromkeys([*spikes, *read])}
    common.RemoveUnusedNodesPass()(model)
    graph = onnx.GraphProto()
    for value, steps in joined.items():
        producer = value.producer()
        if producer is not None and producer.graph is None and steps is not None:
            graph.node.append(helper.make_node("Concat", [str(step.name) for step in steps], [str(value.name)], axis=0))
    return bytes(onnx.ModelProto(graph=graph).SerializeToString()) if graph.node else b""


class _Parts:
    """The steps of values `[T * N, ...]`, computed one by one."""

    def __init__(self, graph: ir.Graph, spikes: Iterable[ir.Value]) -> None:
        self._graph = graph
        self._known: dict[ir.Value, list[ir.Value]] = {}
        for value in spikes:
            producer = value.producer()
            if producer is not None and producer.op_type == "Concat":  # with T = 1 there is nothing to join
                self._known[value] = [step for step in producer.inputs if step is not None]

    def of(self, value: ir.Value | None, *, shared: bool = False) -> list[ir.Value] | None:
        """The steps of `value`, each `[N, ...]`; None where it is to be computed for all steps together, as it is where
        others than the asker read it (and it is not the spikes of neurons)."""
        if value in self._known:
            return self._known[value]
        producer = None if value is None else value.producer()
        if value is None or producer is None:
            return None
        if producer.op_type not in _PER_IMAGE or not (shared or _is_read_once(value)) or not _pays(producer):
            return None
        count = 2 if producer.op_type == "Add" else 1
        steps = [self.of(given) for given in producer.inputs[:count]]
        if any(given is None for given in steps):
            return None
        self._known[value] = [
            self._one(producer, [*given, *producer.inputs[count:]])
            for given in zip(*(one for one in steps if one is not None), strict=True)
        ]
        return self._known[value]

    def _one(self, of: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
        node = ir.Node("", of.op_type, inputs, of.attributes.values())
        self._graph.insert_before(of, node)
        whole, batch = of.outputs[0], self._graph.inputs[0].shape[0]  # type: ignore[index]
        assert whole.shape is not None
        node.outputs[0].type, node.outputs[0].shape = whole.type, ir.Shape([batch, *whole.shape[1:]])
        return node.outputs[0]


def _is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _pays(node: ir.Node) -> bool:
    put_out = node.outputs[0].shape
    if put_out is None or not all(isinstance(dim, int) for dim in put_out[1:]):
        return False
    if node.op_type == "Add":
        return all(given is not None and given.shape and given.shape[1:] == put_out[1:] for given in node.inputs)
    if node.op_type != "Conv":
        return True
    weight = node.inputs[1]
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    outputs = np.prod([int(dim) for dim in put_out[1:]])  # type: ignore[arg-type]
    return tensor is not None and bool(outputs >= _MIN_OUTPUTS * tensor.size)
