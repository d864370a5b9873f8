"""What the passes have in common: what a graph's tensors are, and copies of its nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class Kind:
    """Element type (in ONNX's numbering) and shape of a tensor; a dimension that is not fixed is None or has a name."""

    type: int
    shape: tuple[int | str | None, ...]


def without_weights(model: onnx.ModelProto, largest: int) -> onnx.ModelProto:
    """A copy with constants of `largest` elements at most, to infer shapes from."""
    light, graph = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import), model.graph
    light.graph.name = graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(light.graph, field).extend(getattr(graph, field))
    light.graph.initializer.extend(t for t in graph.initializer if math.prod(t.dims) <= largest)
    return light


def leading_to(outputs: Iterable[onnx.ValueInfoProto], nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Those of `nodes` that lead to `outputs`, each behind what it reads.

    Raises:
        ValueError: two of them make one value.
    """
    made = dict[str, int]()
    for k, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in made:
                raise ValueError(f"two nodes make {name}")
            made[name] = k
    order, seen = list[int](), set[int]()
    stack = [(made[output.name], False) for output in reversed(list(outputs)) if output.name in made]
    while stack:
        k, done = stack.pop()
        if done:
            order.append(k)
        elif k not in seen:
            seen.add(k)
            stack.append((k, True))
            stack += [(made[name], False) for name in reads(nodes[k]) if name in made]
    return [nodes[k] for k in order]


def put_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Let `graph` have these nodes, and of its constants those that they read or that are outputs."""
    copies = [copied(node) for node in nodes]  # they may belong to the graph
    del graph.node[:]
    graph.node.extend(copies)
    read = {name for node in copies for name in reads(node)} | {output.name for output in graph.output}
    for k in reversed(range(len(graph.initializer))):
        if graph.initializer[k].name not in read:
            del graph.initializer[k]


def reading(instead: Mapping[str, str], nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Copies of the nodes that read other tensors instead."""
    copies = [copied(node) for node in nodes]
    for node in copies:
        node.input[:] = [instead.get(name, name) for name in node.input]
    return copies


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    return onnx.NodeProto.FromString(node.SerializeToString())  # type: ignore[no-any-return]


def turns(node: onnx.NodeProto, perm: tuple[int, ...]) -> bool:
    """Whether it is the `Transpose` that orders axes so."""
    return node.op_type == "Transpose" and attribute(node, "perm", None) == list(perm)


def is_test(node: onnx.NodeProto) -> bool:
    """Whether it tells which numbers are not zero."""
    return node.op_type == "Cast" and attribute(node, "to", None) == onnx.TensorProto.BOOL


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initializers by name, but for those that an input may hide."""
    given = {value.name for value in graph.input}
    return {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}


def reads(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, and its subgraphs from outside them."""
    return [*filter(None, node.input), *(name for inner in _subgraphs(node) for name in _from_outside(inner))]


def name_apart(graph: onnx.GraphProto, renamed: Mapping[str, str] | None = None, outside: Iterable[str] = ()) -> None:
    """Rename what a subgraph makes by the name of a value outside it, as ONNX Runtime's optimised graphs may have it.

    Args:
        graph: or, with the names that values outside had and have now, a subgraph.
    """
    made = _made(graph)
    renamed = dict(renamed or {})
    renamed |= {name: f"{renamed.get(name, name)}:{graph.name}" for name in made.intersection(outside)}
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
        for inner in _subgraphs(node):
            name_apart(inner, renamed, {*outside, *made})


def _from_outside(graph: onnx.GraphProto) -> list[str]:
    made = _made(graph)
    read = (*(name for node in graph.node for name in reads(node)), *(value.name for value in graph.output))
    return [name for name in read if name not in made]


def _made(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph gives to values."""
    given = (value.name for value in (*graph.input, *graph.initializer))
    return {*given, *(name for node in graph.node for name in node.output if name)}


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def scalar(tensor: onnx.TensorProto) -> np.generic | None:
    """The number of a tensor that holds one, and has one axis at most."""
    if len(tensor.dims) > 1 or any(dim != 1 for dim in tensor.dims):
        return None
    return numpy_helper.to_array(tensor).reshape(-1)[0]  # type: ignore[no-any-return]


def steps_input(graph: onnx.GraphProto) -> str:
    """The input that has the steps: `steps [N, T]`, or frames `x [N, T, ...]`."""
    return "steps" if any(value.name == "steps" for value in graph.input) else "x"
