"""The outputs of a lowered graph that count its operations.

A second graph counts, so that the one that serves is not slowed: ONNX Runtime computes a whole graph even if one cheap
output is asked for. The second is not a second file. Protocol buffers merge when they are concatenated (repeated fields
append), so all that is stored is an *overlay*, a ModelProto with nothing but the counting nodes and their outputs: the
bytes of the model followed by the bytes of the overlay are the counting model. The engine needs no `onnx` for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from tetdeploy.energy import Layer

from .neuron_steps import Neurons
from .operations import Layers
from .values import from_8_bits, made_by

_EXACT = 2**24  # float32 holds whole numbers up to here


def counting_overlay(layers: Layers, neurons: Iterable[Neurons]) -> bytes:
    """The overlay that counts: outputs `active.<layer>`, nonzero inputs summed over channels, and `fired.<neurons>`,
    spikes summed over everything but step and image, `[T, N]`. All are exact: float32 up to 2^24, float64 beyond."""
    graph = onnx.GraphProto()
    for layer in layers.layers:
        if not layer.from_input:
            T_or_input = layers.T_or_input if layer.name in layers.batch_first else None
            names = enumerate(layers.read[layer.name])
            read = [_summable(graph, value, f"{layer.counter}.float32.{k}") for k, value in names]
            _count_inputs(graph, layer, read, T_or_input)
    for layer_ in neurons:
        _count_spikes(graph, layer_)
    return bytes(onnx.ModelProto(graph=graph).SerializeToString())


def spikes_overlay(neurons: Iterable[str]) -> bytes:
    """The overlay that makes every spike an output: `spikes.<neurons>`, `[T * N, ...]` or `[T, N, ...]`."""
    graph = onnx.GraphProto()
    graph.output.extend(helper.make_empty_tensor_value_info(f"spikes.{name}") for name in neurons)
    return bytes(onnx.ModelProto(graph=graph).SerializeToString())


def _summable(graph: onnx.GraphProto, read: ir.Value, name: str) -> str:
    """The name of what a layer reads, or of what counts alike: cast to `name` if it is bytes, or in float16, as counts
    would not fit into 11 bits; 1 where it is not zero if it has three axes and comes from 8 bits, which OpenVINO sums
    wrongly."""
    if read.shape is not None and len(read.shape) == 3 and from_8_bits(read):
        return _nonzero(graph, str(read.name), name)
    if read.dtype not in (ir.DataType.FLOAT16, ir.DataType.UINT8):
        return str(read.name)
    if read.dtype == ir.DataType.FLOAT16 and (cast := made_by(read, "Cast")) is not None:
        assert cast.inputs[0] is not None
        return str(cast.inputs[0].name)
    graph.node.append(helper.make_node("Cast", [str(read.name)], [name], to=TensorProto.FLOAT))
    return name


def _count_inputs(graph: onnx.GraphProto, layer: Layer, read: Sequence[str], batch_first: int | str | None) -> None:
    """`batch_first`: T or the input `[N, T, ...]`, for a layer that reads `[N, T, ...]` or `[N * T, ...]`."""
    name, kind = layer.counter, TensorProto.FLOAT
    summed = name if batch_first is None else f"{name}.batch_first"
    if layer.product:
        kind = TensorProto.FLOAT if math.prod(layer.input_shape) <= _EXACT else TensorProto.DOUBLE
        _sum_pairs(graph, read, kind, summed)
    else:
        value = read[0] if layer.binary else _nonzero(graph, read[0], name)
        _sum(graph, value, [1 if layer.kernel else -1], summed)
    if batch_first is not None:
        _put_steps_first(graph, summed, layer, batch_first)
    graph.output.append(helper.make_tensor_value_info(name, kind, None))


def _sum_pairs(graph: onnx.GraphProto, factors: Sequence[str], kind: int, output: str) -> None:
    """The pairs that `[..., M, K] @ [..., K, N]` multiplies and whose numbers are not zero: each one in a column of the
    first meets all in the row of the second."""
    ones = []
    for name, factor, axis in zip((f"{output}.columns", f"{output}.rows"), factors, (-2, -1), strict=True):
        _sum(graph, _nonzero(graph, factor, name), [axis], f"{name}.sum")
        graph.node.append(helper.make_node("Cast", [f"{name}.sum"], [name], to=kind))
        ones.append(name)
    graph.node.append(helper.make_node("Mul", ones, [f"{output}.pairs"]))
    _sum(graph, f"{output}.pairs", [-1], output)


def _nonzero(graph: onnx.GraphProto, value: str, name: str) -> str:
    """1 where a value is not zero: by casts, which take ONNX Runtime a third of the time of `Abs` and `Sign`."""
    graph.node.append(helper.make_node("Cast", [value], [f"{name}.any"], to=TensorProto.BOOL))
    graph.node.append(helper.make_node("Cast", [f"{name}.any"], [f"{name}.nonzero"], to=TensorProto.FLOAT))
    return f"{name}.nonzero"


def _put_steps_first(graph: onnx.GraphProto, counts: str, layer: Layer, T: int | str) -> None:
    """`counts [N, T, *counter_axes]`, whose axes may be merged, become the layer's counter."""
    known = [-1, T] if isinstance(T, int) else [-1]
    parts = {"first": known, "rest": list(layer.counter_axes)}
    for part, numbers in parts.items():
        graph.initializer.append(helper.make_tensor(f"{counts}.{part}", TensorProto.INT64, [len(numbers)], numbers))
    shape = [f"{counts}.{part}" for part in parts]
    if isinstance(T, str):
        graph.node.append(helper.make_node("Shape", [T], [f"{counts}.T"], start=1, end=2))
        shape.insert(1, f"{counts}.T")
    perm = [1, 0, *range(2, 2 + len(layer.counter_axes))]
    graph.node.append(helper.make_node("Concat", shape, [f"{counts}.shape"], axis=0))
    graph.node.append(helper.make_node("Reshape", [counts, f"{counts}.shape"], [f"{counts}.split"]))
    graph.node.append(helper.make_node("Transpose", [f"{counts}.split"], [layer.counter], perm=perm))


def _count_spikes(graph: onnx.GraphProto, layer: Neurons) -> None:
    name, value, kind = f"fired.{layer.name}", str(layer.spikes.name), TensorProto.FLOAT
    if math.prod(layer.shape) > _EXACT:
        kind = TensorProto.DOUBLE
    if kind == TensorProto.DOUBLE or layer.spikes.dtype != ir.DataType.FLOAT:
        graph.node.append(helper.make_node("Cast", [value], [f"{name}.spikes"], to=kind))
        value = f"{name}.spikes"
    assert layer.spikes.shape is not None
    _sum(graph, value, list(range(len(layer.spikes.shape) - len(layer.shape), len(layer.spikes.shape))), name)
    graph.output.append(helper.make_tensor_value_info(name, kind, None))


def _sum(graph: onnx.GraphProto, value: str, axes: list[int], output: str) -> None:
    graph.initializer.append(helper.make_tensor(f"{output}.axes", TensorProto.INT64, [len(axes)], axes))
    given = [value, f"{output}.axes"]
    # One neuron an image has no axes to sum over.
    graph.node.append(helper.make_node("ReduceSum", given, [output], keepdims=0, noop_with_empty_axes=1))
