"""What a `tetdeploy::LIF` node becomes in each layout: steps of neurons in standard ONNX operators.

Unrolled and step graphs spell every step out; the dynamic graph has one `Scan` a layer. `neuron_steps` has the step.
No graph holds a membrane: it starts at zero, or is an input, and where it is an input it is an output as well.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from tetdeploy.names import numbered

from .causality import misplaced
from .neuron_steps import BYTE, FLOAT, Forms, Neurons, StepBuilder, float_value
from .onnx_tracer import LIF_DOMAIN, module_name
from .values import HAND_ON, inputs_of, made_by, producer_of


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
        ValueError: a layer starts from a membrane of the network's own, or gets other than `[T, N, ...]`.
    """
    assert T is not None or not with_state
    neurons = []
    names: Counter[str] = Counter()
    forms = Forms()
    for node in [node for node in model.graph if node.domain == LIF_DOMAIN]:
        layer = _describe(node, names, model.graph.inputs[0])
        build = StepBuilder(model.graph, node, BYTE if byte_spikes else FLOAT, forms)
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
    _remove_views(model.graph, forms)
    model.graph.sort()  # a sum may have been written where neurons behind others read it
    _remove_unused(model, [layer.spikes for layer in neurons])
    model.opset_imports.pop(LIF_DOMAIN, None)
    return neurons


def _describe(node: ir.Node, names: Counter[str], x: ir.Value) -> Neurons:
    name = numbered(module_name(node) or "lif", names)  # one module may be called at two places
    current = node.inputs[0]
    assert current is not None and current.shape is not None
    assert x.shape is not None
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise ValueError(
            f"the network reads the last membrane of neurons {name!r}, of which an exported graph gives spikes alone: "
            "leave it out of what it computes"
        )
    shape = tuple(dim for dim in current.shape[2:] if isinstance(dim, int))
    if len(shape) != len(current.shape) - 2 or current.shape[1] != x.shape[0]:
        raise ValueError(misplaced(name, current.shape))
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        raise ValueError(
            f"neurons {name!r} start from a membrane u that the network gives; an exported graph starts all at u = 0 "
            "(streams hand the membranes on from outside): leave u out"
        )
    return Neurons(name, node.attributes["tau"].as_float(), node.attributes["v_th"].as_float(), shape, node.outputs[0])


def _unroll(build: StepBuilder, node: ir.Node, layer: Neurons, T: int, with_state: bool) -> ir.Value:
    """The steps one by one, each a part of the batch of T x N that the layers before and behind compute: no axis comes
    or goes between two convolutions, so that a runtime can keep its own memory layout from one to the next."""
    graph = build.graph
    currents = build.split(node.inputs[0], T)
    u: ir.Value | None = None
    if with_state:
        batch = graph.inputs[0].shape[0]  # type: ignore[index]
        u = given = float_value(f"u.{layer.name}", (batch, *layer.shape))
        graph.inputs.append(given)
    spikes = []
    for t, current in enumerate(currents):
        fired, u = build.step(current, u, layer, reset=with_state or t + 1 < T)
        spikes.append(fired)
    if with_state:
        assert u is not None
        u.name, u.shape, u.type = f"u_next.{layer.name}", given.shape, FLOAT
        graph.outputs.append(u)
    return build("Concat", *spikes, axis=0) if T > 1 else spikes[0]


def _unroll_for_cpu(build: StepBuilder, node: ir.Node, layer: Neurons, T: int) -> ir.Value:
    """The same without state, on n = -h."""
    currents, scalable = build.currents(node.inputs[0], T)
    mantissa, exponent = math.frexp(layer.tau)  # of a power of two 0.5, of tau = 0 nothing
    scaled = scalable and mantissa == 0.5 and T * (1 - exponent) < 64
    spikes = []
    r: ir.Value | None = None
    for t, current in enumerate(currents):
        factor = layer.tau**-t if scaled else 1.0
        inner = replace(layer, tau=1.0, v_th=layer.v_th * factor) if scaled else layer
        fired, r = build.negated_step(current(build, factor), r, inner, reset=t + 1 < T)
        spikes.append(fired)
    return build("Concat", *spikes, axis=0)


def _connect(build: StepBuilder, sequence: ir.Value, spikes: ir.Value, layer: Neurons) -> None:
    """Let the readers of `sequence [T, N, ...]` read `spikes`, which become `[T * N, ...]`: directly where they would
    merge T and N themselves. What nobody reads in the end is swept away."""
    assert sequence.shape is not None
    T, N = sequence.shape[0], sequence.shape[1]
    spikes.shape = ir.Shape([T * N, *layer.shape])
    apart = build.reshape(spikes, [T, N, *layer.shape])
    numbers = build.as_float(apart)
    sequence.replace_all_uses_with(numbers)
    build.forms.merged[numbers] = build.as_float(spikes)
    build.forms.by_step[numbers] = inputs_of(producer_of(spikes)) if T != 1 else [spikes]
    for use in list(numbers.uses()):
        if use.node.op_type == "Reshape" and _merges(use.node, numbers):
            use.node.outputs[0].replace_all_uses_with(build.forms.merged[numbers])


def _merges(reshape: ir.Node, sequence: ir.Value) -> bool:
    """Whether a Reshape makes `[T * N, ...]` of `[T, N, ...]`."""
    after, before = reshape.outputs[0].shape, sequence.shape
    return after is not None and before is not None and len(before) > 2 and after[1:] == before[2:]


def _scan(build: StepBuilder, node: ir.Node, layer: Neurons, for_cpu: bool) -> ir.Value:
    """One `Scan` over the steps; its body is one step of the layer."""
    current = node.inputs[0]
    step_shape = build("Slice", build("Shape", current), build.ints([1]), build.ints([2**31]), build.ints([0]))
    zeros = build("ConstantOfShape", step_shape, value=ir.tensor(np.zeros(1, np.float32)))
    dims = [None] * (len(layer.shape) + 1)
    u_in, current_t = float_value("", dims), float_value("", dims)
    body = ir.Graph([u_in, current_t], [], nodes=[], opset_imports=build.graph.opset_imports, name=f"lif.{layer.name}")
    inner = StepBuilder(body, None, build.spikes, Forms())
    fired, u_out = (inner.negated_step if for_cpu else inner.step)(current_t, u_in, layer, reset=True)
    assert u_out is not None
    for value, kind in ((u_out, FLOAT), (fired, build.spikes)):
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
        if node.op_type in HAND_ON:
            copied = ir.Node("", node.op_type, [bytes_of[source], *node.inputs[1:]], node.attributes.values())
            copied.outputs[0].type, copied.outputs[0].shape = BYTE, node.outputs[0].shape
            graph.insert_after(node, copied)
            bytes_of[node.outputs[0]] = copied.outputs[0]
            views += [node, copied]
        elif node.op_type == "QuantizeLinear":
            node.outputs[0].replace_all_uses_with(bytes_of[source])
            graph.remove(node, safe=True)
    for node in reversed(views):
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


def _remove_views(graph: ir.Graph, forms: Forms) -> None:
    """Take out every Reshape that changes nothing, and let sums between layers be of `[T * N, ...]`, as layers are."""
    for node in list(graph):
        before, after = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or before is None or before.shape is None or after.shape is None:
            continue
        if not all(isinstance(dim, int) and dim > 0 for dim in after.shape[1:]):
            continue  # the first axis is known by what is left for it
        if len(before.shape) == len(after.shape) and before.shape[1:] == after.shape[1:]:
            source = before
        elif _merges(node, before) and made_by(before, "Add", "Reshape") is not None:
            source = StepBuilder(graph, node, FLOAT, forms).merge(before)
        else:
            continue
        if not after.is_graph_output():
            after.replace_all_uses_with(source)


def _remove_unused(model: ir.Model, spikes: list[ir.Value]) -> None:
    """Sweep, but keep all `spikes`, which are counted and checked also where neurons alone read them, step by step."""
    model.graph.outputs.extend(spikes)
    common.RemoveUnusedNodesPass()(model)
    for _ in spikes:
        model.graph.outputs.pop()
