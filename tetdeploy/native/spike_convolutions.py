"""Puts the exact convolutions of this package (`convolution.c`) in place of ONNX Runtime's float32 ones on spikes.

An input that is spikes, or sums of some, is whole numbers that fit into a byte. So where the graph shows that it is, a
weight can be a whole number, too, of 24 bits: all products and sums are exact, in tiles (AMX) or by additions, and what
differs from float32 is the weight, by half an ulp of the largest one of its channel at most.

While ONNX Runtime optimises the graph a `ConvInteger` stands in for each: it knows that one, and lets it be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy import native
from tetdeploy.native import TO_FIRST, TO_LAST
from tetdeploy.native.convolution import can_add, can_convolve, has_additions, native_convolution
from tetdeploy.native.graphs import Kind, attribute, attributes_of, copied, is_test, leading_to, put_nodes, reading
from tetdeploy.native.packing import digits_of, rows_of, tiles_of, whole_weights
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.whole_numbers import Whole, WholeNumbers, threshold

MOST = 2**31 // (128 * 257)  # inputs of 1 that may add up: two digits of each stay within int32
POOLS = (("MaxPool", ""), ("QLinearAveragePool", "com.microsoft"))


@dataclass(frozen=True)
class Marked:
    """Of convolutions taken out: what their input is, float32 weights `[O, C, kernel height, kernel width]` and biases
    `[O]`."""

    whole: Whole
    weights: onnx.TensorProto
    biases: onnx.TensorProto | None


def mark_spike_convolutions(
    graph: onnx.GraphProto, neuron_steps: Sequence[NeuronStep], *, tiles: bool
) -> dict[str, Marked]:
    """Replace each float32 `Conv` that is to be one of this package by a `ConvInteger`.

    It has spikes, or sums of some, for input, at least 16 channels of them, one group, no dilation, and no
    `BatchNormalization` or `Cast` behind it, which the optimiser would join with it.

    Args:
        neuron_steps: what `take_out_scans` took out.
        tiles: for tiles; otherwise for additions, which take at least 32 channels and sums of two spikes at most.

    Returns: those taken out, by the weights of what stands in for them.
    """
    if not tiles and not has_additions():
        return {}
    wholes, marked = WholeNumbers(graph, neuron_steps), dict[str, Marked]()
    spikes = _Bytes(wholes)
    joined = {name for node in graph.node if node.op_type in ("BatchNormalization", "Cast") for name in node.input}
    nodes, others = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for node in graph.node:
        y = node.output[0]
        taken = _take(node, wholes, tiles) if node.op_type == "Conv" and y not in joined else None
        if taken is None:
            others.append(node)
            continue
        stand_in = " ".join([*node.input[1:], str(taken.whole)])
        if stand_in not in marked:  # an input, so that of constant spikes nothing is computed with it
            graph.input.append(helper.make_tensor_value_info(stand_in, TensorProto.INT8, taken.weights.dims))
            marked[stand_in] = taken
        sums = helper.make_node("ConvInteger", [spikes.of(node.input[0]), stand_in], [f"{y}.sums"])
        sums.attribute.extend(node.attribute)
        nodes += [sums, helper.make_node("Cast", sums.output, [y], to=TensorProto.FLOAT)]
    if marked:
        graph.initializer.extend(spikes.numbers)
        floats = spikes.as_floats()
        for node in others:
            nodes += reading(spikes.made if is_test(node) else floats, [node])
        put_nodes(graph, leading_to(graph.output, [*nodes, *spikes.nodes]))
    return marked


class _Bytes:
    """Writes `nodes` that make bytes of spikes in float32, and `numbers` for them.

    Attributes:
        made: the names of the bytes, by that of the value; zero where it is.
    """

    def __init__(self, wholes: WholeNumbers) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.numbers: list[onnx.TensorProto] = []
        self._wholes = wholes
        self.made: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The bytes of a value."""
        name = self._wholes.source(name)
        if name not in self.made:
            self.made[name] = f"{name}.bytes"
            self._write(name, self._wholes.producer[name])
        return self.made[name]

    def _write(self, name: str, node: onnx.NodeProto) -> None:
        made, v_th = self.made[name], threshold(node)
        if node.op_type in ("Concat", "MaxPool", "Reshape"):
            read = [self.of(part) for part in (node.input if node.op_type == "Concat" else node.input[:1])]
            twin = helper.make_node(node.op_type, [*read, *node.input[len(read) :]], [made])
            twin.attribute.extend(node.attribute)
            self.nodes.append(twin)
        elif node.op_type == "AveragePool":
            self._sum_up(name, node)
        elif v_th is not None:
            self.nodes += _comparison(node, self._number(f"{name}.v_th", v_th), made, TensorProto.UINT8)
        else:
            whole = self._wholes.of(name)
            assert whole is not None
            if whole.unit != 1:
                units = self._number(f"{name}.units", np.float32(1 / whole.unit))
                self.nodes.append(helper.make_node("Mul", [name, units], [name := f"{name}.whole"]))
            self.nodes.append(helper.make_node("Cast", [name], [made], to=TensorProto.UINT8))

    def _sum_up(self, name: str, pool: onnx.NodeProto) -> None:
        """The sums of which `pool` gives the means: its outputs quantised with a scale of 1 / count."""
        sizes: dict[str, Any] = {a.name: list(a.ints) for a in pool.attribute if a.name in ("kernel_shape", "strides")}
        one, zero = self._number(f"{name}.one", np.float32(1)), self._number(f"{name}.zero", np.uint8(0))
        share = self._number(f"{name}.share", np.float32(1 / math.prod(sizes["kernel_shape"])))
        inputs = [self.of(pool.input[0]), one, zero, share, zero]
        made = helper.make_node("QLinearAveragePool", inputs, [self.made[name]], domain="com.microsoft", **sizes)
        self.nodes.append(made)

    def _number(self, name: str, number: np.generic) -> str:
        self.numbers.append(numpy_helper.from_array(np.array(number), name))
        return name

    def as_floats(self) -> dict[str, str]:
        """What others read instead of the values: bytes take a fourth of the memory."""
        wholes = {name: self._wholes.of(name) for name in self.made}
        floats = {name: f"{name}.floats" for name, whole in wholes.items() if whole is not None and whole.unit == 1}
        self.nodes += [
            helper.make_node("Cast", [self.made[name]], [cast], to=TensorProto.FLOAT) for name, cast in floats.items()
        ]
        return floats


def compared(neurons: NeuronStep) -> NeuronStep:
    """The neurons with a comparison, which is less work, where they have a `HardSigmoid` that gives 0 or 1."""
    nodes, numbers = list[onnx.NodeProto](), dict(neurons.numbers)
    for node in neurons.nodes:
        v_th = threshold(node)
        if v_th is None:
            nodes.append(node)
            continue
        y = node.output[0]
        numbers[f"{y}.v_th"] = v_th
        nodes += _comparison(node, f"{y}.v_th", y, TensorProto.FLOAT)
    return replace(neurons, nodes=tuple(nodes), numbers=numbers)


def _comparison(step: onnx.NodeProto, v_th: str, y: str, element: int) -> list[onnx.NodeProto]:
    """What gives the same as a steep `HardSigmoid`, but 0 of a membrane that is no number."""
    fires = "Greater" if attribute(step, "alpha", 0.2) > 0 else "Less"
    return [
        helper.make_node(fires, [step.input[0], v_th], [f"{y}.fires"]),
        helper.make_node("Cast", [f"{y}.fires"], [y], to=element),
    ]


def _take(node: onnx.NodeProto, wholes: WholeNumbers, tiles: bool) -> Marked | None:
    weights, *biases = (wholes.constants.get(name) for name in node.input[1:])
    attributes = attributes_of(node)
    if (
        weights is None
        or None in biases
        or weights.data_type != TensorProto.FLOAT
        or not can_convolve(attributes, weights)
    ):
        return None
    whole, numbers = wholes.of(node.input[0]), numpy_helper.to_array(weights)
    if whole is None or whole.most * numbers[0].size > MOST or not np.isfinite(numbers).all():
        return None
    if not tiles and not can_add(whole.most, weights):
        return None
    return Marked(whole, weights, biases[0] if biases else None)


def put_spike_convolutions(
    graph: onnx.GraphProto, marked: Mapping[str, Marked], kinds: MutableMapping[str, Kind], *, tiles: bool
) -> int:
    """Put convolutions of this package, with `Transpose`s round them, where `mark_spike_convolutions` left its marks.

    Args:
        kinds: of the graph's tensors; those of new ones are added.
        tiles: `SpikeConvolution`s, which need AMX; otherwise `SpikeAdditions`.

    Returns: how many there are.
    """
    writer = _LastWriter(marked, kinds, tiles)
    computed = {node.output[0]: node for node in graph.node if _stands_in(node, marked)}
    read = {node.input[0] for node in computed.values()}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in computed:
            writer.convolve(computed[node.input[0]], node.output[0])
        elif node.output[0] in read and (node.op_type, node.domain) in POOLS:
            writer.pool(node)
        else:
            writer.nodes.append(node)
    if marked:
        given = [value for value in graph.input if value.name not in marked]
        del graph.input[:]
        graph.input.extend(given)
        graph.initializer.extend(writer.constants)
        put_nodes(graph, leading_to(graph.output, writer.nodes))
    return len(computed)


def _stands_in(node: onnx.NodeProto, marked: Mapping[str, Marked]) -> bool:
    return node.op_type == "ConvInteger" and node.input[1] in marked


class _LastWriter:
    """Writes `nodes` that work with channels last, and `constants` for them."""

    def __init__(self, marked: Mapping[str, Marked], kinds: MutableMapping[str, Kind], tiles: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._marked, self._kinds, self._tiles = marked, kinds, tiles
        self._vector_bytes = native.vector_bytes()
        self._turned: set[str] = set()
        self._packed: dict[str, list[str]] = {}

    def convolve(self, stand_in: onnx.NodeProto, y: str) -> None:
        x, weights = stand_in.input
        convolution, attributes = self._marked[weights], attributes_of(stand_in)
        if weights not in self._packed:
            constants = _constants(convolution, weights, self._tiles)
            self.constants += constants
            self._packed[weights] = [tensor.name for tensor in constants]
        read, turned = [self._last(x), *self._packed[weights]], f"{y}.turned"
        op, own = "SpikeConvolution", dict[str, int]()
        if not self._tiles:
            op, own = "SpikeAdditions", {"most": convolution.whole.most, "vector_bytes": self._vector_bytes}
        self._put(native_convolution(op, read, turned, convolution.weights, attributes, **own), y)

    def pool(self, node: onnx.NodeProto) -> None:
        made = copied(node)
        made.input[0], made.output[0] = self._last(node.input[0]), f"{node.output[0]}.turned"
        del made.attribute[:]
        made.attribute.extend(a for a in node.attribute if a.name not in ("storage_order", "channels_last"))
        if node.op_type == "MaxPool":
            made.op_type, made.domain = "NhwcMaxPool", "com.microsoft"
        else:
            made.attribute.append(helper.make_attribute("channels_last", 1))
        self._put(made, node.output[0])

    def _last(self, x: str) -> str:
        if x not in self._turned:
            self._turned.add(x)
            self.nodes.append(helper.make_node("Transpose", [x], [f"{x}.turned"], perm=TO_LAST))
            self._turn_kind(x, f"{x}.turned")
        return f"{x}.turned"

    def _put(self, node: onnx.NodeProto, y: str) -> None:
        self._turned.add(y)
        self.nodes += [node, helper.make_node("Transpose", node.output, [y], perm=TO_FIRST)]
        self._turn_kind(y, node.output[0])

    def _turn_kind(self, name: str, turned: str) -> None:
        kind = self._kinds.get(name)  # of a constant there is none, and not every shape is known
        if kind is not None and len(kind.shape) == len(TO_LAST):
            self._kinds[turned] = replace(kind, shape=tuple(kind.shape[axis] for axis in TO_LAST))


def _constants(convolution: Marked, name: str, tiles: bool) -> list[onnx.TensorProto]:
    """Weights as the operator wants them, scales and biases."""
    whole, scales = whole_weights(numpy_helper.to_array(convolution.weights))
    biases = np.zeros(len(scales), np.float32)
    if convolution.biases is not None:
        biases[:] = numpy_helper.to_array(convolution.biases)
    packed = tiles_of(digits_of(whole)) if tiles else rows_of(whole, convolution.whole.most)
    arrays = {"packed": packed, "scales": scales * np.float32(convolution.whole.unit), "biases": biases}
    return [numpy_helper.from_array(array, f"{name}.{what}") for what, array in arrays.items()]
