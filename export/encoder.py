"""The encoder of a step graph: what depends on the image alone need not be computed at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .neuron_steps import float_value

_LAYERS = ("Conv", "Gemm", "MatMul")
_VIEWS = ("Unsqueeze", "Expand", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity")


@dataclass(frozen=True)
class Encoder:
    """The current of the constant image, which a step graph takes back in: `name [N, *shape]`."""

    name: str
    shape: tuple[int, ...]


def find_encoder(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of a step graph that compute from the image's values and nothing else, without those at their end that
    only view, or whose result does not have the batch as its first axis; with the shapes that they compute from each
    other. None where others read these shapes as well. A view that some of them read, and others too, is copied in the
    graph for the others."""
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    from_image, from_others = {graph.inputs[0]}, set(graph.inputs[1:])
    nodes = []
    for node in graph:
        values = {value for value in node.inputs if value is not None}
        if values & from_others:
            from_others.update(node.outputs)
        elif values & from_image and node.op_type not in ("Shape", "Size"):
            from_image.update(node.outputs)
            nodes.append(node)
    nodes = _without_loose_ends(nodes, batch)
    for node in reversed(nodes):
        if node.op_type in _VIEWS and not all(_is_per_image(value, batch) for value in _leaving(node, nodes)):
            _copy_outside(graph, node, nodes)
    nodes = _without_loose_ends(nodes, batch)
    shapes = _between(graph, nodes)
    if any(_leaves(value, [*nodes, *shapes]) for node in shapes for value in node.outputs):
        return []
    return [node for node in graph if node in nodes or node in shapes]


def is_one_layer(nodes: list[ir.Node]) -> bool:
    """Whether an encoder has one layer at most. A GPU computes that in about the time in which it would hand the
    current on from the step before, and a graph without an `If` can be recorded as a CUDA graph."""
    return sum(node.op_type in _LAYERS for node in nodes) <= 1


def split_encoder(model: ir.Model, inside: list[ir.Node]) -> list[Encoder]:
    """Put the encoder, the nodes `inside`, behind an `If`: a constant image is encoded once, not at every step.

    The graph gains an input `encode [1]` (bool) and, for every current so computed, an input `encoded.<k> [N, ...]` and
    an output `encoded_next.<k> [N, ...]`: the current of this image where `encode` holds, else what came in.

    Returns:
        The encoded currents; none where nothing depends on the image alone with the batch as first axis.
    """
    graph = model.graph
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    results = [value for node in inside for value in node.outputs if _leaves(value, inside)]
    if not results:
        return []
    encode = ir.Value(name="encode", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    encoders = [Encoder(f"{k}", _fixed(value)) for k, value in enumerate(results)]
    given = [float_value(f"encoded.{e.name}", (batch, *e.shape)) for e in encoders]
    chosen = _insert_if(graph, inside, results, encode, given)
    for value, encoder in zip(chosen, encoders, strict=True):
        value.name, value.shape = f"encoded_next.{encoder.name}", ir.Shape([batch, *encoder.shape])
    graph.inputs.extend([encode, *given])
    graph.outputs.extend(chosen)
    graph.sort()  # what reads the encoder first may stand before what it was computed from last
    return encoders


def _between(graph: ir.Graph, nodes: list[ir.Node]) -> list[ir.Node]:
    """The other nodes that read from some of `nodes` and that some of `nodes` read from, over any number of nodes."""
    behind, before = set(nodes), set(nodes)
    for node in graph:
        if any(value is not None and value.producer() in behind for value in node.inputs):
            behind.add(node)
    for node in reversed(graph):
        if any(use.node in before for value in node.outputs for use in value.uses()):
            before.add(node)
    return [node for node in graph if node in behind and node in before and node not in nodes]


def _without_loose_ends(nodes: list[ir.Node], batch: Any) -> list[ir.Node]:
    while dropped := [node for node in nodes if _is_loose_end(node, nodes, batch)]:
        nodes = [node for node in nodes if node not in dropped]
    return nodes


def _is_loose_end(node: ir.Node, nodes: list[ir.Node], batch: Any) -> bool:
    if node.op_type in _VIEWS:
        return not any(use.node in nodes for use in node.outputs[0].uses())
    return not all(_is_per_image(value, batch) for value in _leaving(node, nodes))


def _copy_outside(graph: ir.Graph, view: ir.Node, nodes: list[ir.Node]) -> None:
    """Let all but `nodes` read a copy of `view`, so that what it views leaves them in its place."""
    copy = ir.node(view.op_type, view.inputs, view.attributes)
    copy.outputs[0].type, copy.outputs[0].shape = view.outputs[0].type, view.outputs[0].shape
    graph.insert_after(view, copy)
    for use in list(view.outputs[0].uses()):
        if use.node not in nodes:
            use.node.replace_input_with(use.idx, copy.outputs[0])


def _is_per_image(value: ir.Value, batch: Any) -> bool:
    """Whether `value` is float32 `[N, ...]` with all but N fixed."""
    shape = value.shape
    if shape is None or len(shape) < 2 or value.dtype != ir.DataType.FLOAT:
        return False
    return shape[0] == batch and all(isinstance(dim, int) for dim in shape[1:])


def _leaving(node: ir.Node, nodes: list[ir.Node]) -> list[ir.Value]:
    return [value for value in node.outputs if _leaves(value, nodes)]


def _leaves(value: ir.Value, nodes: list[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _insert_if(
    graph: ir.Graph, nodes: list[ir.Node], results: list[ir.Value], condition: ir.Value, given: list[ir.Value]
) -> list[ir.Value]:
    """`nodes` move into the then-branch of an `If`; the else-branch hands `given` through. Returns the If's outputs."""
    kept = [ir.node("Identity", [value]) for value in given]
    for node, result in zip(kept, results, strict=True):
        # Unnamed values get a name of their own graph's choice, which the graph round it may have.
        node.outputs[0].name = f"{node.inputs[0].name}.kept"  # type: ignore[union-attr]
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    other = ir.Graph([], [node.outputs[0] for node in kept], nodes=kept, opset_imports=graph.opset_imports, name="keep")
    conditional = ir.node("If", [condition], num_outputs=len(results))
    graph.insert_after(nodes[-1], conditional)
    for output, result in zip(conditional.outputs, results, strict=True):
        output.type, output.shape = result.type, result.shape
        assert not result.is_graph_output()  # neurons reach all of these
        for use in list(result.uses()):
            if use.node not in nodes:  # within the encoder a result may be read on
                use.node.replace_input_with(use.idx, output)
    graph.remove(nodes)
    then = ir.Graph([], results, nodes=nodes, opset_imports=graph.opset_imports, name="encode")
    conditional.attributes["then_branch"] = ir.AttrGraph("then_branch", then)
    conditional.attributes["else_branch"] = ir.AttrGraph("else_branch", other)
    return list(conditional.outputs)


def _fixed(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape[1:])  # type: ignore[arg-type]
