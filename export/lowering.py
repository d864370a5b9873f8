"""What a `tetdeploy::LIF` node becomes: the arithmetic of Eqs. 1-3 in standard ONNX operators, by layout.

Unrolled and step graphs spell every step out; the dynamic graph has one `Scan` a layer. All compute, per step::

    h = tau u + I        Mul, Add                (1)
    s = h > v_th         Greater, Cast           (2)
    u = h - h s          ThresholdedRelu, Sub    (3), h (1 - s) without a use of s

in this order of operations and in float32, as PyTorch's kernel does, so that equal currents give equal spikes.

For ONNX Runtime on a CPU (`for_cpu`) the same bits come from fewer passes over memory, on the negated h::

    n = tau r - I                          Mul, Sub
    s = n < -v_th                          Less, Cast; for float32 spikes HardSigmoid, steep enough to be a step
    r = n if n >= -v_th else 0             ThresholdedRelu, whose n > alpha is n >= -v_th one float below -v_th

and where every current comes from 8 bits, the steps are scaled instead of leaking: with m(t) = n(t) / tau^t and tau a
power of two, m = r - I / tau^t costs no multiplication, as the currents' own scales take the factor.

No graph holds a membrane: it starts at zero, or is an input, and where it is an input it is an output as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .graph import LIF_DOMAIN, module_name

_Scaled = Callable[[float], ir.Value]
_FLOAT = ir.TensorType(ir.DataType.FLOAT)
_BYTE = ir.TensorType(ir.DataType.UINT8)
_HAND_ON = ("Unsqueeze", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity", "MaxPool", "Slice")
_STANDS_FOR = "tetdeploy.stands_for"
_VIEWS = ("Unsqueeze", "Expand", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity")


@dataclass(frozen=True)
class Neurons:
    """One neuron layer of a lowered graph: `shape` is one image's membrane, `spikes` the value `[T * N, *shape]` (of a
    `Scan` `[T, N, *shape]`), float32 or uint8."""

    name: str
    tau: float
    v_th: float
    shape: tuple[int, ...]
    spikes: ir.Value


@dataclass(frozen=True)
class Encoder:
    """The current of the constant image, which a step graph takes back in: `name [N, *shape]`."""

    name: str
    shape: tuple[int, ...]


def lower(
    model: ir.Model, *, T: int | None, with_state: bool, byte_spikes: bool = False, for_cpu: bool = False
) -> list[Neurons]:
    """Replace every LIF node of `model`, in place.

    Args:
        T: steps to unroll; None makes a `Scan` over the steps that the input brings.
        with_state: every membrane becomes an input `u.<name> [N, ...]` and an output `u_next.<name> [N, ...]`.
        byte_spikes: spikes are uint8 up to the QuantizeLinear nodes that read them, which go away.
        for_cpu: the arithmetic that is fastest in ONNX Runtime on a CPU, with the same result.

    Returns:
        The neuron layers in the order in which they fire.

    Raises:
        ValueError: a layer starts from a membrane of the network's own.
    """
    assert T is not None or not with_state
    neurons = []
    names: Counter[str] = Counter()
    merged: dict[ir.Value, ir.Value] = {}
    by_step: dict[ir.Value, list[ir.Value]] = {}
    for node in [node for node in model.graph if node.domain == LIF_DOMAIN]:
        layer = _describe(node, names)
        build = _Builder(model.graph, node, _BYTE if byte_spikes else _FLOAT, merged, by_step)
        if T is None:
            spikes = _scan(build, node, layer, for_cpu)
        elif for_cpu and T > 1 and not with_state:
            spikes = _unroll_for_cpu(build, node, layer, T)
        else:
            spikes = _unroll(build, node, layer, T, with_state)
        spikes.name, spikes.type, spikes.shape = f"spikes.{layer.name}", build.spikes, node.outputs[0].shape
        if T is None:
            node.outputs[0].replace_all_uses_with(build.as_float(spikes))
        else:
            _connect(build, node.outputs[0], spikes, layer)
        model.graph.remove(node, safe=True)
        neurons.append(replace(layer, spikes=spikes))
    if byte_spikes:
        _pass_bytes(model.graph, [layer.spikes for layer in neurons])
    _remove_unused(model, [layer.spikes for layer in neurons])
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


def network_node(node: ir.Node) -> ir.Node:
    """The node of the network that `node` stands for: a sum is taken anew on merged or single steps, perhaps often."""
    of: ir.Node = node.meta.get(_STANDS_FOR, node)
    return of


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
    """The steps one by one, each a part of the batch of T x N that the layers before and behind compute: no axis comes
    or goes between two convolutions, so that a runtime can keep its own memory layout from one to the next."""
    graph = build.graph
    currents = build.split(node.inputs[0], T)
    u: ir.Value | None = None
    if with_state:
        batch = graph.inputs[0].shape[0]  # type: ignore[index]
        u = given = _float_value(f"u.{layer.name}", (batch, *layer.shape))
        graph.inputs.append(given)
    spikes = []
    for t, current in enumerate(currents):
        fired, u = build.step(current, u, layer, reset=with_state or t + 1 < T)
        spikes.append(fired)
    if with_state:
        assert u is not None
        u.name, u.shape, u.type = f"u_next.{layer.name}", given.shape, _FLOAT
        graph.outputs.append(u)
    return build("Concat", *spikes, axis=0) if T > 1 else spikes[0]


def _unroll_for_cpu(build: _Builder, node: ir.Node, layer: Neurons, T: int) -> ir.Value:
    """The same without state, on n = -h."""
    currents, scalable = build.currents(node.inputs[0], T)
    mantissa, exponent = math.frexp(layer.tau)  # of a power of two 0.5, of tau = 0 nothing
    scaled = scalable and mantissa == 0.5 and T * (1 - exponent) < 64
    spikes = []
    r: ir.Value | None = None
    for t, current in enumerate(currents):
        factor = layer.tau**-t if scaled else 1.0
        inner = replace(layer, tau=1.0, v_th=layer.v_th * factor) if scaled else layer
        fired, r = build.negated_step(current(factor), r, inner, reset=t + 1 < T)
        spikes.append(fired)
    return build("Concat", *spikes, axis=0)


def _connect(build: _Builder, sequence: ir.Value, spikes: ir.Value, layer: Neurons) -> None:
    """Let the readers of `sequence [T, N, ...]` read `spikes`, which become `[T * N, ...]`: directly where they would
    merge T and N themselves. What nobody reads in the end is swept away."""
    assert sequence.shape is not None
    T, N = sequence.shape[0], sequence.shape[1]
    spikes.shape = ir.Shape([T * N, *layer.shape])
    apart = build.reshape(spikes, [T, N, *layer.shape])
    numbers = build.as_float(apart)
    sequence.replace_all_uses_with(numbers)
    build.merged[numbers] = build.as_float(spikes)
    build.by_step[numbers] = _inputs(_producer(spikes)) if T != 1 else [spikes]
    for use in list(numbers.uses()):
        if use.node.op_type == "Reshape" and _merges(use.node, numbers):
            use.node.outputs[0].replace_all_uses_with(build.merged[numbers])


def _merges(reshape: ir.Node, sequence: ir.Value) -> bool:
    """Whether a Reshape makes `[T * N, ...]` of `[T, N, ...]`."""
    after, before = reshape.outputs[0].shape, sequence.shape
    return after is not None and before is not None and len(before) > 2 and after[1:] == before[2:]


def _scan(build: _Builder, node: ir.Node, layer: Neurons, for_cpu: bool) -> ir.Value:
    """One `Scan` over the steps; its body is one step of the layer."""
    current = node.inputs[0]
    step_shape = build("Slice", build("Shape", current), build.ints([1]), build.ints([2**31]), build.ints([0]))
    zeros = build("ConstantOfShape", step_shape, value=ir.tensor(np.zeros(1, np.float32)))
    dims = [None] * (len(layer.shape) + 1)
    u_in, current_t = _float_value("", dims), _float_value("", dims)
    body = ir.Graph([u_in, current_t], [], nodes=[], opset_imports=build.graph.opset_imports, name=f"lif.{layer.name}")
    inner = _Builder(body, None, build.spikes, {}, {})
    fired, u_out = (inner.negated_step if for_cpu else inner.step)(current_t, u_in, layer, reset=True)
    assert u_out is not None
    for value, kind in ((u_out, _FLOAT), (fired, build.spikes)):
        value.type, value.shape = kind, ir.Shape(dims)
    body.outputs.extend([u_out, fired])
    for k, value in enumerate([*body.inputs, *(output for inside in body for output in inside.outputs)]):
        value.name = f"{layer.name}.step.{k}"  # a body must not shadow names of the graph round it
    _, spikes = build.many("Scan", [zeros, current], 2, num_scan_inputs=1, body=body)
    return spikes


def _pass_bytes(graph: ir.Graph, spikes: list[ir.Value]) -> None:
    """Take out every QuantizeLinear of spikes: what read it reads the neurons' bytes, through copies of the views."""
    bytes_of: dict[ir.Value, ir.Value] = {}
    for node in graph:
        if node.op_type == "Reshape" and node.inputs[0] in spikes:
            spikes = [*spikes, node.outputs[0]]
        elif node.op_type == "Cast" and node.inputs[0] in spikes:
            bytes_of[node.outputs[0]] = node.inputs[0]
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


def _remove_unused(model: ir.Model, spikes: list[ir.Value]) -> None:
    """Sweep, but keep all `spikes`, which are counted and checked also where neurons alone read them, step by step."""
    model.graph.outputs.extend(spikes)
    common.RemoveUnusedNodesPass()(model)
    for _ in spikes:
        model.graph.outputs.pop()


class _Builder:
    """Writes nodes before `anchor`, or at the end of the graph; spikes are of the type `spikes`.

    Of values `[T, N, ...]` `merged` holds what is there as `[T * N, ...]`, and `by_step` the neurons' spikes of each
    step, `[N, ...]`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        anchor: ir.Node | None,
        spikes: ir.TensorType,
        merged: dict[ir.Value, ir.Value],
        by_step: dict[ir.Value, list[ir.Value]],
    ) -> None:
        self.graph, self.anchor, self.spikes, self.merged, self.by_step = graph, anchor, spikes, merged, by_step

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

    def byte(self, value: int) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value, np.uint8)))

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        """`value` with other axes, all but one of known length."""
        reshaped = self("Reshape", value, self.ints([dim if isinstance(dim, int) else -1 for dim in shape]))
        reshaped.type, reshaped.shape = value.type, ir.Shape(shape)
        return reshaped

    def as_float(self, spikes: ir.Value) -> ir.Value:
        if self.spikes == _FLOAT:
            return spikes
        numbers = self("Cast", spikes, to=int(ir.DataType.FLOAT))
        numbers.type, numbers.shape = _FLOAT, spikes.shape
        return numbers

    def split(self, current: ir.Value | None, T: int) -> list[ir.Value]:
        """The T steps of `current [T, N, ...]`, each `[N, ...]`; a current that repeats one step is not copied."""
        assert current is not None
        repeated = _repeated(current)
        if repeated is not None:
            return [self.merge(repeated)] * T
        whole = self.merge(current)
        return [whole] if T == 1 else self.many("Split", [whole], T, axis=0, num_outputs=T)

    def currents(self, current: ir.Value | None, T: int) -> tuple[list[_Scaled], bool]:
        """The T steps of `current [T, N, ...]`, each a function that writes it times a factor; and whether the factor
        is free, as it goes into scales: of currents that come from 8 bits, spikes and sums of these."""
        assert current is not None
        if current in self.by_step and self.spikes == _BYTE:
            one, none = self.number(1.0), self.byte(0)
            return [partial(self._dequantised, spikes, one, none) for spikes in self.by_step[current]], True
        producer = current.producer()
        if producer is not None and producer.op_type == "Add" and _all_like(current, producer.inputs):
            parts = [self.currents(part, T) for part in producer.inputs]
            if all(scalable for _, scalable in parts):
                pairs = zip(*(steps for steps, _ in parts), strict=True)
                return [partial(self._sum, producer, *pair) for pair in pairs], True
        before = self.merge(current).producer() if _repeated(current) is None else None
        if before is not None and before.op_type == "DequantizeLinear":
            quantised, scale, zero = _inputs(before)
            steps = self.many("Split", [quantised], T, axis=0, num_outputs=T)
            return [partial(self._dequantised, step, scale, zero) for step in steps], True
        return [partial(self._times, step) for step in self.split(current, T)], False

    def _dequantised(self, value: ir.Value, scale: ir.Value, zero: ir.Value, factor: float) -> ir.Value:
        if factor != 1.0:
            tensor = ir.convenience.get_const_tensor(scale)
            assert tensor is not None
            scale = self.number(float(tensor.numpy()) * factor)
        return self("DequantizeLinear", value, scale, zero)

    def _sum(self, of: ir.Node, one: _Scaled, other: _Scaled, factor: float) -> ir.Value:
        total = self("Add", one(factor), other(factor))
        _producer(total).meta[_STANDS_FOR] = of
        return total

    def _times(self, value: ir.Value, factor: float) -> ir.Value:
        return value if factor == 1.0 else self("Mul", value, self.number(factor))

    def merge(self, value: ir.Value) -> ir.Value:
        """`value [T, N, ...]` as `[T * N, ...]`, from before it was taken apart; sums are taken there as well."""
        if value not in self.merged:
            self.merged[value] = self._merge(value)
        return self.merged[value]

    def _merge(self, value: ir.Value) -> ir.Value:
        assert value.shape is not None
        producer = value.producer()
        if producer is not None and producer.op_type in ("Reshape", "Unsqueeze"):
            before = producer.inputs[0]
            if before is not None and before.shape is not None and before.shape[1:] == value.shape[2:]:
                return before
        if producer is not None and producer.op_type == "Add" and _all_like(value, producer.inputs):
            total = self("Add", *(self.merge(part) for part in producer.inputs if part is not None))
            _producer(total).meta[_STANDS_FOR] = producer
            total.type, total.shape = value.type, ir.Shape([value.shape[0] * value.shape[1], *value.shape[2:]])
            return total
        return self.reshape(value, [value.shape[0] * value.shape[1], *value.shape[2:]])

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

    def negated_step(
        self, current: ir.Value, r: ir.Value | None, layer: Neurons, *, reset: bool
    ) -> tuple[ir.Value, ir.Value | None]:
        """The same on n = -h and r = -u; the first step, which has no r, begins with h = I."""
        v_th = float(np.float32(layer.v_th))
        if r is None:
            fired = self.fire(current, v_th, negated=False)
            return fired, self("Sub", self("ThresholdedRelu", current, alpha=v_th), current) if reset else None
        leaked = r if layer.tau == 1.0 else self("Mul", r, self.number(layer.tau))
        n = self("Sub", leaked, current)
        below = float(np.nextafter(np.float32(-v_th), np.float32(-np.inf)))
        return self.fire(n, v_th, negated=True), self("ThresholdedRelu", n, alpha=below) if reset else None

    def fire(self, h: ir.Value, v_th: float, *, negated: bool) -> ir.Value:
        """h > v_th; of a negated h, h < -v_th. As float32 it is one HardSigmoid, min(1, max(0, alpha h + beta)): with
        alpha = 1 / ulp(v_th), a power of two, the least h above v_th gives 1 and v_th itself 0, both exactly."""
        if self.spikes == _FLOAT and abs(math.frexp(v_th)[1]) < 64:
            alpha = 1 / float(np.spacing(np.float32(v_th)))
            return self("HardSigmoid", h, alpha=-alpha if negated else alpha, beta=-alpha * v_th)
        fires = self("Less", h, self.number(-v_th)) if negated else self("Greater", h, self.number(v_th))
        return self("Cast", fires, to=int(self.spikes.dtype))


def _repeated(current: ir.Value) -> ir.Value | None:
    """The one step `[1, N, ...]` that `current [T, N, ...]` repeats, if it does."""
    producer = current.producer()
    if producer is None or producer.op_type != "Expand" or current.shape is None:
        return None
    source = producer.inputs[0]
    same = source is not None and source.shape is not None and source.shape == ir.Shape([1, *current.shape[1:]])
    return source if same else None


def _producer(value: ir.Value) -> ir.Node:
    producer = value.producer()
    assert producer is not None
    return producer


def _inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node of which none is left out."""
    return [value for value in node.inputs if value is not None]


def _all_like(value: ir.Value, parts: Sequence[ir.Value | None]) -> bool:
    return all(part is not None and part.shape == value.shape for part in parts)


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
