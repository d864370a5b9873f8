"""Which operations a lowered graph does, and the outputs that count them.

A second graph counts, so that the one that serves is not slowed: ONNX Runtime computes a whole graph even if one cheap
output is asked for. The second is not a second file. Protocol buffers merge when they are concatenated (repeated fields
append), so all that is stored is an *overlay*, a ModelProto with nothing but the counting nodes and their outputs: the
bytes of the model followed by the bytes of the overlay are the counting model. The engine needs no `onnx` for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from tetdeploy.energy import Layer

from .graph import module_name
from .lowering import Neurons

# Operations whose output is binary if all of their data inputs are.
_KEEP_BINARY = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand", "Slice", "Gather", "Split",
    "Concat", "MaxPool", "Tile", "Mul", "Cast", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_DATA_INPUTS = {"Concat": None, "Mul": 2}  # how many inputs are data; one where not named
_UNCOUNTED = {"ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "MatMul", "Gemm", "Conv"}


class Layers:
    """The layers of a lowered graph: `layers` by name with the value each one reads, `uncounted` by name.

    Args:
        T: steps of the graph, None where they are dynamic.
    """

    def __init__(self, graph: ir.Graph, neurons: Iterable[Neurons], T: int | None) -> None:
        self._T = T or 1
        self._timed: set[ir.Value] = set()  # what holds T steps, as an axis or merged into the batch
        self.read: dict[str, ir.Value] = {}
        self.layers: list[Layer] = []
        self.uncounted: list[str] = []
        self._binary = {layer.spikes for layer in neurons}
        self._after_neurons = set(self._binary)
        names: Counter[str] = Counter()
        for node in _nodes(graph):
            self._propagate(node)
            if node.op_type not in _UNCOUNTED:
                continue
            name = module_name(node) or str(node.name)
            names[name] += 1
            name = name if names[name] == 1 else f"{name}#{names[name]}"
            layer = self._layer(node, name)
            if layer is None:
                self.uncounted.append(name)
                continue
            value = node.inputs[0]
            assert value is not None
            self.layers.append(layer)
            self.read[name] = value

    def _propagate(self, node: ir.Node) -> None:
        """What is binary, holds T steps, or lies behind neurons, follows from a node's inputs."""
        shape = node.outputs[0].shape
        if any(value in self._timed for value in node.inputs) or (shape and len(shape) > 1 and shape[0] == self._T):
            self._timed.update(node.outputs)
        if any(value in self._after_neurons for value in node.inputs):
            self._after_neurons.update(node.outputs)
        if node.op_type in _KEEP_BINARY or _pads_with_zeros(node):
            data = node.inputs[: _DATA_INPUTS.get(node.op_type, 1)]
            if all(value in self._binary for value in data):
                self._binary.add(node.outputs[0])
                if node.op_type == "Split":
                    self._binary.update(node.outputs)

    def _layer(self, node: ir.Node, name: str) -> Layer | None:
        value, weight = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in ("Conv", "MatMul", "Gemm") or value is None or weight is None or value.shape is None:
            return None
        shape = _parameter_shape(weight)
        if shape is None:
            return None
        from_input = value not in self._after_neurons
        positions = self._positions(value, 1 if node.op_type == "Conv" else -1)
        if positions is None and from_input:
            return None
        flags: dict[str, Any] = {"from_input": from_input, "binary": value in self._binary, "positions": positions or 1}
        if node.op_type != "Conv":
            if len(shape) != 2:
                return None
            transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            features, outputs = reversed(shape) if transposed else shape
            return Layer(name, (features,), outputs, **flags)
        return _convolution(node, name, tuple(int(d) for d in value.shape[1:]), shape, flags)  # type: ignore[arg-type]

    def _positions(self, value: ir.Value, channel_axis: int) -> int | None:
        """How often a layer is applied to one image in one step (to every token, say); None if that is unknown."""
        assert value.shape is not None
        leading = value.shape[:channel_axis]
        count = 1
        for dim in leading:
            one = dim if isinstance(dim, int) else dim.evaluate(dict.fromkeys(dim.free_symbols(), 1))
            if not isinstance(one, int):
                return None
            count *= one
        positions, rest = divmod(count, self._T if value in self._timed else 1)
        return positions if rest == 0 else None


def _parameter_shape(weight: ir.Value) -> tuple[int, ...] | None:
    """The shape of a constant, or of a matrix transposed, as linear layers have it in a graph that is not optimised;
    None for what is computed."""
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        shape = _parameter_shape(producer.inputs[0])
        return shape[::-1] if shape is not None and len(shape) == 2 else None
    tensor = ir.convenience.get_const_tensor(weight)
    return None if tensor is None else tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def _pads_with_zeros(node: ir.Node) -> bool:
    if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "constant":
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    constant = ir.convenience.get_const_tensor(node.inputs[2])
    return constant is not None and not constant.numpy().any()


def _convolution(
    node: ir.Node, name: str, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], flags: dict[str, Any]
) -> Layer | None:
    kernel = weight_shape[2:]
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    one, none = [1] * len(kernel), [0] * (2 * len(kernel))
    pads = list(node.attributes.get_ints("pads", none))
    return Layer(
        name,
        input_shape,
        weight_shape[0] // node.attributes.get_int("group", 1),
        kernel=kernel,
        strides=tuple(node.attributes.get_ints("strides", one)),
        pads=tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)),
        dilations=tuple(node.attributes.get_ints("dilations", one)),
        **flags,
    )


def counting_overlay(layers: Layers, neurons: Iterable[Neurons]) -> bytes:
    """The overlay that counts: outputs `active.<layer>`, nonzero inputs summed over channels, and `fired.<neurons>`,
    spikes summed over everything but step and image, `[T, N]`. All float32, exact below 2^24."""
    nodes: list[onnx.NodeProto] = []
    initializers = []
    outputs = []
    for layer in layers.layers:
        if layer.from_input:
            continue
        value = str(layers.read[layer.name].name)
        if not layer.binary:
            nodes += [
                helper.make_node("Abs", [value], [f"{layer.counter}.abs"]),
                helper.make_node("Sign", [f"{layer.counter}.abs"], [f"{layer.counter}.nonzero"]),
            ]
            value = f"{layer.counter}.nonzero"
        axes = f"{layer.counter}.axes"
        initializers.append(helper.make_tensor(axes, TensorProto.INT64, [1], [1 if layer.kernel else -1]))
        nodes.append(helper.make_node("ReduceSum", [value, axes], [layer.counter], keepdims=0))
        outputs.append(layer.counter)
    for layer_ in neurons:
        name, axes = f"fired.{layer_.name}", f"fired.{layer_.name}.axes"
        dims = list(range(2, 2 + len(layer_.shape)))
        initializers.append(helper.make_tensor(axes, TensorProto.INT64, [len(dims)], dims))
        nodes.append(helper.make_node("ReduceSum", [str(layer_.spikes.name), axes], [name], keepdims=0))
        outputs.append(name)
    return _overlay(nodes, initializers, outputs)


def spikes_overlay(neurons: Iterable[str]) -> bytes:
    """The overlay that makes every spike an output: `spikes.<neurons>`, `[T, N, ...]`."""
    return _overlay([], [], [f"spikes.{name}" for name in neurons])


def _overlay(nodes: list[onnx.NodeProto], initializers: list[TensorProto], outputs: list[str]) -> bytes:
    model = onnx.ModelProto()
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    return bytes(model.SerializeToString())


def _nodes(graph: ir.Graph) -> Iterable[ir.Node]:
    """The graph's nodes, an `If`'s branches (the step layout's encoder) before what follows it."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and node.op_type == "If":
                yield from attribute.as_graph()
        yield node
