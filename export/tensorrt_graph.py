"""What TensorRT needs our graphs to be, and what its log says that it made of them.

TensorRT knows uint8 only as the type of an input that is cast at once. Our graphs of frames transpose their uint8 input
first, and the step graph casts it inside an `If`; so `prepare` puts a cast to float32 (exact for uint8) right behind
each such input. Nothing but views stands between an input and its cast, so no result changes. It also gives every node
a name of its own, which bodies of `Scan` need not have, so that TensorRT's account of its kernels can be read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper


def prepare(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as TensorRT takes it; see the top of this file. Changes `graph`."""
    for value in graph.graph.input:
        if value.name == "steps" or value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue  # only the shape of `steps` is read
        name = f"{value.name}.float"
        for node in _all_nodes(graph.graph):
            node.input[:] = [name if read == value.name else read for read in node.input]
        graph.graph.node.insert(0, helper.make_node("Cast", [value.name], [name], name=name, to=TensorProto.FLOAT))
    names: Counter[str] = Counter()
    for subgraph in _graphs(graph.graph):
        del subgraph.value_info[:]  # of what now is float32
        for node in subgraph.node:
            spikes = [output for output in node.output if output.startswith("spikes.")]
            prefix = f"{subgraph.name}/" if subgraph.name.startswith("lif.") else ""
            name = spikes[0] if spikes else prefix + (node.name or node.op_type)
            names[name] += 1
            node.name = name if names[name] == 1 else f"{name}#{names[name]}"
    return graph


def layers_of(report: str, graph: onnx.ModelProto) -> list[dict[str, Any]]:
    """What TensorRT made of a prepared graph, from its log: by kernel its name and type, the precisions it reads and
    writes, which ONNX operators it does, and for which neurons. What does none (loop counters, jumps, copies) is left
    out."""
    operators = {node.name: node.op_type for node in _all_nodes(graph.graph)}
    layers = []
    for name, kind, inputs, outputs, done in _LAYER.findall(report):
        named = dict.fromkeys(re.findall(r"\[ONNX Layer: ([^\]]+)\]", done))
        nodes = [node for node in named if node in operators]
        if nodes and _precisions(outputs):
            neurons = [re.fullmatch(r"spikes\.(.+)|lif\.(.+)/.*", node) for node in nodes]
            layers.append(
                {
                    "name": name,
                    "type": kind,
                    "inputs": _precisions(inputs),
                    "outputs": _precisions(outputs),
                    "operators": Counter(operators[node] for node in nodes),
                    "neurons": sorted({match[1] or match[2] for match in neurons if match}),
                }
            )
    return layers


_LAYER = re.compile(
    r"^Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: .*?, Outputs: \[(.*?)\], TacticName: .*?"
    r"Metadata: (.*)$",
    re.MULTILINE,
)


def _precisions(tensors: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"Datatype: (\w+)", tensors)))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node
