"""What TensorRT needs our graphs to be, and what its log says that it made of them.

TensorRT knows uint8 only as the type of an input that is cast at once, and int8 only around zero. `prepare` changes
types, and no value:

- A cast to float32, exact for uint8, comes right behind each uint8 input. Our graphs of frames transpose theirs first,
  and the step graph casts it inside an `If`.
- Spikes that an int8 graph hands on as uint8 are float32 up to the convolution that reads them, and int8 there.
- A current I = s (clip(round(y / s) + z, 0, 255) - z) is spelled out in float32, s clip(round(y / s), -z, 255 - z), and
  an int32 bias is the float32 number it stands for.

Every node gets a name of its own, which bodies of `Scan` need not have, so that TensorRT's account of its kernels can
be read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.names import numbered

_ZERO = "int8.zero"


def prepare(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as TensorRT takes it; see the top of this file. Changes `graph`."""
    constants = _constants(graph.graph)
    for subgraph in _graphs(graph.graph):
        del subgraph.value_info[:]  # they would say uint8
        _use_int8(subgraph, constants)
    zero, folded = numpy_helper.from_array(np.zeros((), np.int8), _ZERO), _float_biases(graph.graph, constants)
    graph.graph.initializer.extend([zero, *folded])
    for value in graph.graph.input:
        if value.name == "steps" or value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue  # only the shape of `steps` is read
        name = f"{value.name}.float"
        for node in _all_nodes(graph.graph):
            node.input[:] = [name if read == value.name else read for read in node.input]
        graph.graph.node.insert(0, helper.make_node("Cast", [value.name], [name], to=TensorProto.FLOAT))
    _name_nodes(graph.graph)
    return graph


def _name_nodes(graph: onnx.GraphProto) -> None:
    """A name for each node that no other has: `spikes.<neurons>` for what makes their spikes, `lif.<neurons>/...` for
    the rest of a `Scan` body, for what makes the spikes of one step, and for a cast of spikes: TensorRT drops one."""
    names: Counter[str] = Counter()
    for subgraph in _graphs(graph):
        whole = {part: node.output[0] for node in subgraph.node if node.op_type == "Concat" for part in node.input}
        for node in subgraph.node:
            spikes = [output for output in node.output if output.startswith("spikes.")]
            of = [whole[output] for output in node.output if whole.get(output, "").startswith("spikes.")]
            prefix = f"{subgraph.name}/" if subgraph.name.startswith("lif.") else ""
            of += [node.input[0]] if node.op_type == "Cast" and node.input[0].startswith("spikes.") else []
            prefix = f"lif.{of[0].removeprefix('spikes.')}/" if of else prefix
            node.name = numbered(spikes[0] if spikes else prefix + (node.name or node.op_type), names)


def _use_int8(graph: onnx.GraphProto, constants: Mapping[str, NDArray[Any]]) -> None:
    """No uint8 inside `graph`: see the top of this file."""
    makers = {output: node for node in graph.node for output in node.output}
    by_convolutions = {node.input[0] for node in graph.node if node.op_type == "Conv"}
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.UINT8:
            node.attribute[0].i = TensorProto.FLOAT
        if not (node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_uint8(node, constants)):
            nodes.append(node)
        elif node.op_type == "DequantizeLinear":
            source = makers[node.input[0]]
            handed_on = source.op_type != "QuantizeLinear"  # spikes as they are
            given = node.input[0] if handed_on else source.input[0]
            as_they_are = (constants[node.input[1]] == 1).all() and not constants[node.input[2]].any()
            if handed_on and not as_they_are:
                raise ValueError(
                    f"uint8 spikes, {given}, are read with a scale or a zero of their own, as in no export of "
                    "tetdeploy; export again with tetdeploy export --precision int8"
                )
            # A convolution may read a current, too: that of a convolution before it.
            is_of_spikes = as_they_are and node.output[0] in by_convolutions
            nodes.extend(_spikes(given, node) if is_of_spikes else _current(given, node, constants))
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            value.type.tensor_type.elem_type = TensorProto.FLOAT


def _is_uint8(node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    return len(node.input) > 2 and constants[node.input[2]].dtype == np.uint8


def _spikes(given: str, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    quantised, scale = f"{node.output[0]}.int8", node.input[1]
    return [
        helper.make_node("QuantizeLinear", [given, scale, _ZERO], [quantised]),
        helper.make_node("DequantizeLinear", [quantised, scale, _ZERO], node.output),
    ]


def _current(given: str, node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> list[onnx.NodeProto]:
    scale, zero = node.input[1], int(constants[node.input[2]])
    names = ("low", "high", "scaled", "rounded", "clipped")
    low, high, scaled, rounded, clipped = (f"{node.output[0]}.{name}" for name in names)
    return [
        helper.make_node("Constant", [], [low], value_float=float(-zero)),
        helper.make_node("Constant", [], [high], value_float=float(255 - zero)),
        helper.make_node("Div", [given, scale], [scaled]),
        helper.make_node("Round", [scaled], [rounded]),
        helper.make_node("Clip", [rounded, low, high], [clipped]),
        helper.make_node("Mul", [clipped, scale], node.output),
    ]


def _float_biases(graph: onnx.GraphProto, constants: Mapping[str, NDArray[Any]]) -> list[onnx.TensorProto]:
    """Dequantised int32 constants, taken out of `graph`; TensorRT dequantises 8 bits only."""
    dequantised = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    biases = [node for node in dequantised if constants[node.input[0]].dtype == np.int32]
    for node in biases:
        graph.node.remove(node)
    values = [constants[node.input[0]].astype(np.float32) * constants[node.input[1]] for node in biases]
    return [numpy_helper.from_array(value, node.output[0]) for value, node in zip(values, biases, strict=True)]


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    values = {tensor.name: _array(tensor) for inner in _graphs(graph) for tensor in inner.initializer}
    for node in _all_nodes(graph):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = _array(node.attribute[0].t)
    return values


def _array(tensor: onnx.TensorProto) -> NDArray[Any]:
    """A tensor of the graph, which no export has elsewhere.

    Raises:
        ValueError: it lies in another file.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ValueError(f"the graph keeps {tensor.name} in another file, as no export of tetdeploy does; export again")
    return numpy_helper.to_array(tensor)


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
