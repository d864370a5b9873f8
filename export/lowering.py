"""What a `tetdeploy::LIF` node becomes: the arithmetic of Eqs. 1-3 in standard ONNX operators, by layout.

Unrolled and step graphs spell every step out; the dynamic graph has one `Scan` a layer. All compute, per step::

    h = tau u + I        Mul, Add                (1)
    s = h > v_th         Greater, Cast           (2)
    u = h - h s          ThresholdedRelu, Sub    (3), h (1 - s) without a use of s

in this order of operations and in float32, as PyTorch's kernel does, so that equal currents give equal spikes.
No graph holds a membrane: it starts at zero, or is an input, and where it is an input it is an output as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import LIF_DOMAIN, module_name

_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_BYTE = ir.TensorType(ir.DataType.UINT8)
_HAND_ON = ("Unsqueeze", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity", "MaxPool", "Slice")
_VIEWS = ("Unsqueeze", "Expand", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity")


@dataclass(frozen=True)
class Neurons:
    """One neuron layer of a lowered graph: `shape` is one image's membrane, `spikes` the value `[T, N, *shape]`."""

    name: str
    tau: float
    v_th: float
    shape: tuple[int, ...]
    spikes: ir.Value

    def values(self) -> list[ir.Value]:
        """The spikes, and those in one byte where the graph has them."""
        producer = self.spikes.producer()
        byte = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        return [self.spikes] if byte is None or byte.dtype != ir.DataType.UINT8 else [self.spikes, byte]


@dataclass(frozen=True)
class Encoder:
    """The current of the constant image, which a step graph takes back in: `name [N, *shape]`."""

    name: str
    shape: tuple[int, ...]


def lower(model: ir.Model, *, T: int | None, with_state: bool, byte_spikes: bool = False) -> list[Neurons]:
    """Replace every LIF node of `model`, in place.

    Args:
        T: steps to unroll; None makes a `Scan` over the steps that the input brings.
        with_state: every membrane becomes an input `u.<name> [N, ...]` and an output `u_next.<name> [N, ...]`.
        byte_spikes: spikes are uint8 up to the QuantizeLinear nodes that read them, which go away.

    Returns:
        The neuron layers in the order in which they fire.

    Raises:
        ValueError: a layer starts from a membrane of the network's own.
    """
    assert T is not None or not with_state
    neurons = []
    names: Counter[str] = Counter()
    for node in [node for node in model.graph if node.domain == LIF_DOMAIN]:
        layer, build = _describe(node, names), _Builder(model.graph, node, _BYTE if byte_spikes else _FLOAT)
        spikes = _scan(build, node, layer) if T is None else _unroll(build, node, layer, T, with_state)
        if byte_spikes:
            spikes.type, spikes.shape = _BYTE, node.outputs[0].shape
            spikes = build("Cast", spikes, to=int(ir.DataType.FLOAT))
        spikes.name, spikes.type, spikes.shape = f"spikes.{layer.name}", _FLOAT, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(spikes)
        model.graph.remove(node, safe=True)
        neurons.append(Neurons(layer.name, layer.tau, layer.v_th, layer.shape, spikes))
    if byte_spikes:
        _pass_bytes(model.graph, neurons)
    model.opset_imports.pop(LIF_DOMAIN, None)
    return neurons


def split_encoder(model: ir.Model) -> list[Encoder]:
    """Put what depends on the image alone behind an `If`, so that a constant image is encoded once, not at every step.

    The graph gains an input `encode [1]` (bool) and, for every current so computed, an input `encoded.<k> [N, ...]` and
    an output `encoded_next.<k> [N, ...]`: the current of this image where `encode` holds, else what came in.

    Returns:
        The encoded currents; none where nothing depends on the image alone with the batch as first axis.
    """
    graph = model.graph
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    inside = _image_only(graph, batch)
    results = [value for node in inside for value in node.outputs if _leaves(value, inside)]
    if not results:
        return []
    encode = ir.Value(name="encode", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    encoders = [Encoder(f"{k}", _fixed(value)) for k, value in enumerate(results)]
    given = [_float_value(f"encoded.{e.name}", (batch, *e.shape)) for e in encoders]
    chosen = _insert_if(graph, inside, results, encode, given)
    for value, encoder in zip(chosen, encoders, strict=True):
        value.name, value.shape = f"encoded_next.{encoder.name}", ir.Shape([batch, *encoder.shape])
    graph.inputs.extend([encode, *given])
    graph.outputs.extend(chosen)
    return encoders


def _describe(node: ir.Node, names: Counter[str]) -> Neurons:
    name = module_name(node) or "lif"
    names[name] += 1
    name = name if names[name] == 1 else f"{name}#{names[name]}"  # one module called at two places
    current = node.inputs[0]
    assert current is not None and current.shape is not None
    shape = tuple(int(dim) for dim in current.shape[2:])  # type: ignore[arg-type]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        raise ValueError(
            f"neurons {name!r} start from a membrane u that the network gives; an exported graph starts all at u = 0 "
            "(streams hand the membranes on from outside): leave u out"
        )
    return Neurons(name, node.attributes["tau"].as_float(), node.attributes["v_th"].as_float(), shape, node.outputs[0])


def _unroll(build: _Builder, node: ir.Node, layer: Neurons, T: int, with_state: bool) -> ir.Value:
    graph = build.graph
    currents = build.split(node.inputs[0], T)
    u: ir.Value | None = None
    if with_state:
        batch = graph.inputs[0].shape[0]  # type: ignore[index]
        given = _float_value(f"u.{layer.name}", (batch, *layer.shape))
        graph.inputs.append(given)
        u = build("Unsqueeze", given, build.ints([0]))
    spikes = []
    for t, current in enumerate(currents):
        fired, u = build.step(current, u, layer, reset=with_state or t + 1 < T)
        spikes.append(fired)
    if with_state:
        assert u is not None
        last = build("Squeeze", u, build.ints([0]))
        last.name, last.shape, last.type = f"u_next.{layer.name}", given.shape, _FLOAT
        graph.outputs.append(last)
    return build("Concat", *spikes, axis=0) if T > 1 else spikes[0]


def _scan(build: _Builder, node: ir.Node, layer: Neurons) -> ir.Value:
    """One `Scan` over the steps; its body is one step of the layer."""
    current = node.inputs[0]
    step_shape = build("Slice", build("Shape", current), build.ints([1]), build.ints([2**31]), build.ints([0]))
    zeros = build("ConstantOfShape", step_shape, value=ir.tensor(np.zeros(1, np.float32)))
    dims = [None] * (len(layer.shape) + 1)
    u_in, current_t = _float_value("", dims), _float_value("", dims)
    body = ir.Graph([u_in, current_t], [], nodes=[], opset_imports=build.graph.opset_imports, name=f"lif.{layer.name}")
    inner = _Builder(body, None, build.spikes)
    fired, u_out = inner.step(current_t, u_in, layer, reset=True)
    assert u_out is not None
    for value, kind in ((u_out, _FLOAT), (fired, build.spikes)):
        value.type, value.shape = kind, ir.Shape(dims)
    body.outputs.extend([u_out, fired])
    for k, value in enumerate([*body.inputs, *(output for inside in body for output in inside.outputs)]):
        value.name = f"{layer.name}.step.{k}"  # a body must not shadow names of the graph round it
    _, spikes = build.many("Scan", [zeros, current], 2, num_scan_inputs=1, body=body)
    return spikes


def _pass_bytes(graph: ir.Graph, neurons: list[Neurons]) -> None:
    """Take out every QuantizeLinear of spikes: what read it reads the neurons' bytes, through copies of the views."""
    bytes_of: dict[ir.Value, ir.Value] = {}
    for layer in neurons:
        cast = layer.spikes.producer()
        assert cast is not None and cast.inputs[0] is not None
        bytes_of[layer.spikes] = cast.inputs[0]
    views = []
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source not in bytes_of:
            continue
        if node.op_type in _HAND_ON:
            copied = ir.Node("", node.op_type, [bytes_of[source], *node.inputs[1:]], node.attributes.values())
            copied.outputs[0].type, copied.outputs[0].shape = _BYTE, node.outputs[0].shape
            copied.metadata_props.update(node.metadata_props)
            graph.insert_after(node, copied)
            bytes_of[node.outputs[0]] = copied.outputs[0]
            views += [node, copied]
        elif node.op_type == "QuantizeLinear":
            node.outputs[0].replace_all_uses_with(bytes_of[source])
            graph.remove(node, safe=True)
    for node in reversed(views):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


class _Builder:
    """Writes nodes before `anchor`, or at the end of the graph; spikes are of the type `spikes`."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node | None, spikes: ir.TensorType) -> None:
        self.graph, self.anchor, self.spikes = graph, anchor, spikes

    def many(self, op: str, inputs: list[ir.Value | None], count: int, /, **attributes: object) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, num_outputs=count)  # type: ignore[arg-type]
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return list(node.outputs)

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        return self.many(op, list(inputs), 1, **attributes)[0]

    def ints(self, numbers: list[int]) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(numbers, np.int64)))

    def number(self, value: float) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value, np.float32)))

    def split(self, current: ir.Value | None, T: int) -> list[ir.Value]:
        """The T steps of `current [T, ...]`, each `[1, ...]`; a current that repeats one step is not copied."""
        assert current is not None
        producer = current.producer()
        if producer is not None and producer.op_type == "Expand" and current.shape is not None:
            source = producer.inputs[0]
            if source is not None and source.shape is not None and source.shape == ir.Shape([1, *current.shape[1:]]):
                return [source] * T
        return [current] if T == 1 else self.many("Split", [current], T, axis=0, num_outputs=T)

    def step(
        self, current: ir.Value, u: ir.Value | None, layer: Neurons, *, reset: bool
    ) -> tuple[ir.Value, ir.Value | None]:
        """Eqs. 1-3 for one step: spikes, and the membrane after the reset if the caller wants it."""
        h = current
        if u is not None:
            leaked = u if layer.tau == 1.0 else self("Mul", u, self.number(layer.tau))
            h = self("Add", leaked, current)
        fired = self("Cast", self("Greater", h, self.number(layer.v_th)), to=int(self.spikes.dtype))
        return fired, self("Sub", h, self("ThresholdedRelu", h, alpha=layer.v_th)) if reset else None


def _image_only(graph: ir.Graph, batch: Any) -> list[ir.Node]:
    """Nodes that compute from the image's values and nothing else, without those at their end that only view, or whose
    result does not have the batch as its first axis."""
    image, others = graph.inputs[0], set(graph.inputs[1:])
    from_image, from_others = {image}, set(others)
    nodes = []
    for node in graph:
        values = {value for value in node.inputs if value is not None}
        if values & from_others:
            from_others.update(node.outputs)
        elif values & from_image and node.op_type not in ("Shape", "Size"):
            from_image.update(node.outputs)
            nodes.append(node)
    while dropped := [node for node in nodes if _is_loose_end(node, nodes, batch)]:
        nodes = [node for node in nodes if node not in dropped]
    return nodes


def _is_loose_end(node: ir.Node, nodes: list[ir.Node], batch: Any) -> bool:
    results = [value for value in node.outputs if _leaves(value, nodes)]
    if node.op_type in _VIEWS:
        return not any(use.node in nodes for use in node.outputs[0].uses())
    return not all(_is_per_image(value, batch) for value in results)


def _is_per_image(value: ir.Value, batch: Any) -> bool:
    """Whether `value` is float32 `[N, ...]` with all but N fixed."""
    shape = value.shape
    if shape is None or len(shape) < 2 or value.dtype != ir.DataType.FLOAT:
        return False
    return shape[0] == batch and all(isinstance(dim, int) for dim in shape[1:])


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
        result.replace_all_uses_with(output)
    graph.remove(nodes)
    then = ir.Graph([], results, nodes=nodes, opset_imports=graph.opset_imports, name="encode")
    conditional.attributes["then_branch"] = ir.AttrGraph("then_branch", then)
    conditional.attributes["else_branch"] = ir.AttrGraph("else_branch", other)
    return list(conditional.outputs)


def _float_value(name: str, shape: tuple[object, ...] | list[None]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=_FLOAT)  # type: ignore[arg-type]


def _fixed(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(dim) for dim in value.shape[1:])  # type: ignore[arg-type]
