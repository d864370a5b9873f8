"""Which operations a lowered graph does: its convolutions, linear layers and products of activations, as the operation
count needs them, and what else it adds and multiplies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from tetdeploy.energy import Layer
from tetdeploy.names import numbered

from .binary_values import BinaryValues
from .neuron_steps import Neurons, network_node
from .onnx_tracer import is_of_network, module_name
from .step_order import BATCH, StepOrder, sizes
from .values import constant, made_by

_UNCOUNTED = {"ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "MatMul", "Gemm", "Conv"}
_KIND_NAMES = {"ConvTranspose": "conv_transpose", "BatchNormalization": "batch_norm"}


class Layers:
    """The layers of a lowered graph: `layers`, `read`, by name the value that each reads (both factors of a product),
    `uncounted` by name, and what else is added or multiplied, `other_ops`: by kind (see `tetdeploy.energy.OTHER_OPS`)
    and module, per image and step. `batch_first` names layers that read `[N, T, ...]` or `[N * T, ...]`, for which
    `T_or_input` is the graph's T, or where it is open the input `[N, T, ...]`.

    Args:
        T: steps of the graph, None where they are dynamic.
        frames: the input changes from step to step.
        encoder: nodes of a step graph that depend on the image alone.
    """

    def __init__(
        self,
        graph: ir.Graph,
        neurons: Iterable[Neurons],
        T: int | None,
        *,
        frames: bool,
        encoder: Iterable[ir.Node] = (),
    ) -> None:
        self._T = T
        self._image_rank = len(graph.inputs[0].shape or ()) if graph.inputs else 0
        self.T_or_input: int | str = T or ("x" if frames else "steps")
        self.batch_first: set[str] = set()
        self.read: dict[str, tuple[ir.Value, ...]] = {}
        self.layers: list[Layer] = []
        self.uncounted: list[str] = []
        self.other_ops: dict[str, Counter[str]] = {
            kind: Counter() for kind in ("bias_adds", "residual_adds", "batch_norm_macs")
        }
        # What changes from step to step, or holds the steps as an axis; they may be merged into the batch.
        self._timed = {value for value in graph.inputs if frames and value.name == "x"}
        spikes = [layer.spikes for layer in neurons]
        self._timed.update(spikes)
        self._counted: set[ir.Node] = set()
        self._binary = BinaryValues(spikes)
        self._after_neurons = set(spikes)
        self._order = StepOrder(spikes, T)
        names: Counter[str] = Counter()
        functions = Counter(module_name(node) for node in graph if node.op_type in _UNCOUNTED)  # numbered after modules
        encodes = set(encoder)
        for node in graph:
            self._propagate(node)
            self._count_other(node)
            if node.op_type not in _UNCOUNTED:
                continue
            name = numbered(module, names) if (module := module_name(node)) else numbered(_kind_name(node), functions)
            layer = self._layer(node, name, node in encodes)
            if layer is None:
                self.uncounted.append(name)
                continue
            self.layers.append(layer)
            read = node.inputs[:2] if layer.product else [_before_padding(node)[0]]
            self.read[name] = tuple(value for value in read if value is not None)

    def _propagate(self, node: ir.Node) -> None:
        """What is a whole number, holds T steps, or lies behind neurons, follows from a node's inputs."""
        if self._begins_steps(node) or self._repeats_image(node) or any(value in self._timed for value in node.inputs):
            self._timed.update(node.outputs)
        if any(value in self._after_neurons for value in node.inputs):
            self._after_neurons.update(node.outputs)
        self._binary.propagate(node)
        self._order.propagate(node)

    def _begins_steps(self, node: ir.Node) -> bool:
        """Whether what a node puts out has T steps as its first axis, or, where T is open, anywhere. An axis may be as
        long by chance, as that of T tokens: no layer adds an axis, and steps make T values of one."""
        value = node.outputs[0]
        if value.shape is None or len(value.shape) < 2:
            return False
        if self._T is None:
            symbols = [dim.free_symbols() for dim in value.shape if not isinstance(dim, int)]
            return any("T" in of_one or len(of_one) > 1 for of_one in symbols)  # the batch is the only other symbol
        if value.shape[0] != self._T or node.op_type in _UNCOUNTED:
            return False
        read = [sizes(given) for given in node.inputs if given is not None and not _is_constant(given)]
        after = sizes(value)
        if after is None or None in read:
            return True
        return math.prod(after) >= self._T * max((math.prod(axes) for axes in read if axes is not None), default=0)

    def _repeats_image(self, node: ir.Node) -> bool:
        """Whether a node of an unrolled graph repeats what it reads of the batch for T steps: to `[T * N, ...]`, or
        along another axis, as to `[N, T, ...]` or `[N, C, T, ...]`, which is not to be mistaken for the image's."""
        if node.op_type not in ("Expand", "Tile", "Concat") or self._T in (None, 1) or node.inputs[0] is None:
            return False
        if node.op_type == "Concat" and len(set(node.inputs)) > 1:
            return False
        before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
        if not before or not after or len(before) != len(after) or before[0] % BATCH:
            return False
        longer = [axis for axis, size in enumerate(before) if after[axis] != size]
        if len(longer) != 1 or (longer != [0] and len(after) == self._image_rank):
            return False
        return after[longer[0]] == before[longer[0]] * self._T

    def _count_other(self, lowered: ir.Node) -> None:
        node = network_node(lowered)
        kind = _other_kind(node)
        if kind is None or node in self._counted:
            return
        self._counted.add(node)
        timed = lowered.outputs[0] in self._timed
        name, ops = module_name(node) or _kind_name(node), self._repeats(node.outputs[0], None, timed=timed)
        if ops is not None:
            self.other_ops[kind][name] += ops
        elif (of_kind := f"{name} ({kind})") not in self.uncounted:  # a module may be called at each step
            self.uncounted.append(of_kind)

    def _layer(self, node: ir.Node, name: str, encodes: bool) -> Layer | None:
        (value, pads), weight = _before_padding(node), node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in ("Conv", "MatMul", "Gemm") or value is None or weight is None or value.shape is None:
            return None
        shape = _parameter_shape(weight)
        if shape is None:
            return self._product(name, value, weight) if node.op_type == "MatMul" else None
        from_input = value not in self._after_neurons
        positions = self._repeats(value, 1 if node.op_type == "Conv" else -1, timed=value in self._timed)
        if positions is None or not (from_input or self._finds_steps(name, value)):
            return None
        once = from_input and (encodes or (value not in self._timed and self._T != 1))
        flags: dict[str, Any] = {
            "from_input": from_input,
            "binary": self._binary.is_binary(value),
            "positions": positions,
            "once": once,
            "precision": _precision(weight),
        }
        if node.op_type != "Conv":
            if len(shape) != 2:
                return None
            transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            features, outputs = reversed(shape) if transposed else shape
            return Layer(name, (features,), outputs, **flags)
        input_shape = tuple(dim for dim in value.shape[1:] if isinstance(dim, int))
        if len(input_shape) != len(shape) - 1:
            return None  # steps that are open lie behind the channels
        return _convolution(node, name, input_shape, pads, shape, flags)

    def _product(self, name: str, left: ir.Value, right: ir.Value) -> Layer | None:
        """A product `[..., M, K] @ [..., K, N]` of two values behind neurons, as of queries and keys."""
        axes, of_right = sizes(left), sizes(right)
        if axes is None or of_right is None or axes[:-2] != of_right[:-2]:
            return None
        positions = self._repeats(left, -2, timed=left in self._timed)
        if positions is None or not all(self._finds_steps(name, factor) for factor in (left, right)):
            return None
        return Layer(
            name,
            (math.prod(axes[-2:]) * of_right[-1],),
            1,
            binary=any(self._binary.is_binary(factor) for factor in (left, right)),
            positions=positions,
            precision="fp16" if left.dtype == ir.DataType.FLOAT16 else "fp32",
            product=True,
        )

    def _finds_steps(self, name: str, value: ir.Value) -> bool:
        """Whether the steps of what a layer reads can be told apart, to which spikes must lead."""
        left = self._order.left_of_steps(value)
        if left == BATCH:
            self.batch_first.add(name)
        return left in (1, BATCH)

    def _repeats(self, value: ir.Value, channel_axis: int | None, *, timed: bool) -> int | None:
        """The product of a value's axes up to `channel_axis`, for one image in one step: how often a layer is applied
        (to every token, say), or how many values there are; None if that is unknown. `timed`: it holds all T steps."""
        if value.shape is None:
            return None
        count = 1
        for dim in value.shape[:channel_axis]:
            one = dim if isinstance(dim, int) else dim.evaluate(dict.fromkeys(dim.free_symbols(), 1))
            if not isinstance(one, int):
                return None
            count *= one
        repeats, rest = divmod(count, (self._T or 1) if timed else 1)
        return repeats if rest == 0 else None


def _kind_name(node: ir.Node) -> str:
    """What an operation that the network's own forward calls as a function goes by."""
    if node.op_type in ("MatMul", "Gemm"):
        return "matmul" if _parameter_shape(node.inputs[1]) is None else "linear"
    return _KIND_NAMES.get(node.op_type, node.op_type.lower())


def _other_kind(node: ir.Node) -> str | None:
    """Which of `OTHER_OPS` a node is."""
    if node.op_type == "BatchNormalization":
        return "batch_norm_macs"
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        return "bias_adds" if len(node.inputs) > 2 and _is_parameter(node.inputs[2]) else None
    # The neurons' own arithmetic stems from no module of the network.
    if node.op_type not in ("Add", "Sub") or not is_of_network(node) or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    if not any(_is_constant(value) for value in node.inputs):
        return "residual_adds"
    return "bias_adds" if node.op_type == "Add" and any(_is_parameter(value) for value in node.inputs) else None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _is_parameter(value: ir.Value | None) -> bool:
    """Whether a value is a constant that is not zero: the exporter gives every convolution a bias, if only of zeros."""
    if (dequantised := made_by(value, "DequantizeLinear")) is not None:
        return _is_parameter(dequantised.inputs[0])
    array = constant(value)
    return array is not None and bool(array.any())


def _precision(weight: ir.Value) -> str:
    if made_by(weight, "DequantizeLinear") is not None:
        return "int8"
    return "fp16" if weight.dtype == ir.DataType.FLOAT16 else "fp32"


def _parameter_shape(weight: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant, of one in 8 bits, or of a matrix transposed, as linear layers have it in a graph that is
    not optimised; None for what is computed."""
    if (transposed := made_by(weight, "Transpose")) is not None:
        shape = _parameter_shape(transposed.inputs[0])
        return shape[::-1] if shape is not None and len(shape) == 2 else None
    if (dequantised := made_by(weight, "DequantizeLinear")) is not None:
        return _parameter_shape(dequantised.inputs[0])
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    return None if tensor is None else tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def _before_padding(node: ir.Node) -> tuple[ir.Value | None, list[int]]:
    """What a layer reads, without the zeros that an operation before it puts round that, which do not count; and the
    padding of both, as ONNX lists it, of a convolution."""
    value = node.inputs[0]
    axes = len(value.shape or ()) - 2 if value is not None else 0
    pads = list(node.attributes.get_ints("pads", [0] * (2 * axes)))
    if node.op_type != "Conv":
        return value, pads
    before = value
    while (same := made_by(before, "Cast", "DequantizeLinear", "QuantizeLinear")) is not None:  # which keep zeros
        before = same.inputs[0]
    padding = made_by(before, "Pad")
    added = None if padding is None else _zeros_round(padding)
    if padding is None or added is None or any(added[:2] + added[axes + 2 : axes + 4]):
        return value, pads
    more = added[2 : axes + 2] + added[axes + 4 :]
    return padding.inputs[0], [own + zeros for own, zeros in zip(pads, more, strict=True)]


def _zeros_round(node: ir.Node) -> list[int] | None:
    """How many zeros a Pad puts before and behind each axis; None if it does anything else."""
    amounts, number, axes = ([*node.inputs[1:], None, None, None])[:3]
    pads, filled = constant(amounts), constant(number)
    if node.attributes.get_string("mode", "constant") != "constant" or pads is None or axes is not None:
        return None
    if (number is not None and (filled is None or filled.any())) or (pads < 0).any():
        return None
    return [int(amount) for amount in pads]


def _convolution(
    node: ir.Node,
    name: str,
    input_shape: tuple[int, ...],
    pads: list[int],
    weight_shape: tuple[int, ...],
    flags: dict[str, Any],
) -> Layer | None:
    kernel = weight_shape[2:]
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    one = [1] * len(kernel)
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
