"""A folded network as an exported program, without tracing it once more.

torch.export makes a program of a changed graph by tracing it anew, and torch.onnx traces that again to take operations
apart that ONNX has not: together half the time of an export. A graph of the operations below needs neither. ONNX has
each of them, or others that they are written as, and what one writes over, nothing else sees. So the graph is the
program already, but that a program takes its parameters as inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from tetdeploy.folding import LAYERS, parameter, shares_memory

aten = torch.ops.aten
_TRANSLATED = {
    torch.ops.tetdeploy.lif.default, torch.ops.tetdeploy.int8_conv.default,
    operator.getitem, operator.mul, aten.sym_size.int,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.matmul.default,
    aten.einsum.default, aten.bmm.default, aten.layer_norm.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.abs.default,
    aten.exp.default, aten.sqrt.default, aten.pow.Tensor_Scalar, aten.maximum.default, aten.minimum.default,
    aten.gt.Scalar, aten.ge.Scalar, aten.where.self, aten.clamp.default,
    aten.relu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.gelu.default, aten.silu.default,
    aten.sigmoid.default, aten.tanh.default, aten.softmax.int,
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool2d.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.flip.default,
    aten.expand.default, aten.repeat.default, aten.clone.default, aten.contiguous.default, aten.zeros_like.default,
    aten.pad.default, aten.roll.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.cat.default, aten.stack.default,
}  # fmt: skip
_VIEWS = {
    aten.reshape.default, aten.reshape_as.default, aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
_OTHER_NAMES = {
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.clip.default: aten.clamp.default,
}
_IN_PLACE = {  # which write over their first argument
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
}
_WRITTEN_OTHERWISE = {
    *_VIEWS, *_OTHER_NAMES, *_IN_PLACE, aten.view.default, aten.expand_as.default, aten.mT.default,
    aten.movedim.int, aten.movedim.intlist, aten.chunk.default, aten.to.dtype, aten.rsub.Scalar,
}  # fmt: skip
_OF_OWN_MEMORY = {  # which give memory that nothing else sees; einsum may give its input's, whatever its schema says
    *LAYERS, torch.ops.tetdeploy.int8_conv.default, aten.matmul.default,
    *_IN_PLACE.values(), aten.sub.Tensor, aten.div.Tensor,
}  # fmt: skip
_ADAPTIVE_POOLINGS = {
    aten.adaptive_avg_pool1d.default: [-1],
    aten.adaptive_avg_pool2d.default: [-1, -2],
    aten.adaptive_avg_pool3d.default: [-1, -2, -3],
}
_ASSERTION = aten._assert_tensor_metadata.default


class _Decomposed(ExportedProgram):
    """A program that torch.onnx need not take apart."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def as_program(folded: fx.GraphModule, traced: ExportedProgram) -> ExportedProgram | None:
    """The program that torch.onnx translates, or None where the network has other operations.

    Args:
        folded: made from the trace, and changed here.
        traced: what it was made from; it knows the range of each axis.
    """
    graph = folded.graph
    rewrite_global_pooling(graph)
    inputs = graph.find_nodes(op="placeholder")
    axes = _open_axes(inputs)
    if not all(_is_known(node, axes) for node in graph.nodes):
        return None
    sizes = _sizes(graph, axes, behind=inputs[-1])
    for node in list(graph.nodes):
        _write_otherwise(node, sizes)
    graph.eliminate_dead_code()
    state = {str(node.target): parameter(folded, node) for node in graph.find_nodes(op="get_attr")}
    parameters = _lift(graph, state, inputs[0].meta["val"].fake_mode)
    results: Any = graph.output_node().args[0]
    specs = [InputSpec(InputKind.BUFFER, _named(node), name, True) for name, node in parameters.items()]
    specs += [InputSpec(InputKind.USER_INPUT, _named(node), None) for node in inputs]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _named(node), None) for node in results]
    signature = ExportGraphSignature(specs, outputs)
    return _Decomposed(
        folded, graph, signature, state, traced.range_constraints, traced.module_call_graph, verifiers=traced.verifiers
    )


def rewrite_global_pooling(graph: fx.Graph) -> None:
    """PyTorch would keep how images lie in memory by reading their means through a table, which hides the steps."""
    for node in graph.nodes:
        axes = _ADAPTIVE_POOLINGS.get(node.target)
        if axes is not None and set(node.args[1]) == {1}:
            _write(node, aten.mean.dim, node.args[0], axes, True)


def _named(node: fx.Node) -> TensorArgument:
    return TensorArgument(node.name)


def _open_axes(inputs: Iterable[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """The axes of the inputs that may have any size, batch and time, by the symbol of that size."""
    shapes = ((node, axis, size) for node in inputs for axis, size in enumerate(node.meta["val"].shape))
    return {str(size): (node, axis) for node, axis, size in shapes if isinstance(size, torch.SymInt)}


def _is_known(node: fx.Node, axes: Mapping[str, Any]) -> bool:
    if node.op != "call_function" or node.target in _TRANSLATED or node.target is _ASSERTION:
        return True
    if node.target not in _WRITTEN_OTHERWISE or node.kwargs:
        return False
    if node.target in _IN_PLACE:
        values = (x.meta["val"] for x in (node, *node.all_input_nodes))  # in place, none is promoted
        types = {getattr(value, "dtype", None) for value in values}  # a size has none
        return len(types) == 1 and _is_alone(node.args[0])
    if node.target in _VIEWS:
        return _unknown(node.meta["val"].shape, axes) <= 1
    if node.target is aten.expand_as.default:
        return _unknown(node.meta["val"].shape, axes) == 0
    if node.target is aten.chunk.default:
        return isinstance(_size_of_chunks(node), int)
    return node.target not in (aten.to.dtype, aten.rsub.Scalar) or len(node.args) == 2


def _is_alone(x: Any) -> bool:
    """Whether nothing else reads the memory of `x`: what is written over it may as well be written elsewhere."""
    while shares_memory(x) and len(x.users) == 1:
        x = x.args[0]
    return x.target in _OF_OWN_MEMORY and len(x.users) == 1


def _unknown(shape: Iterable[Any], axes: Mapping[str, Any]) -> int:
    """How many sizes are neither numbers nor those of an open axis."""
    return sum(not isinstance(size, int) and str(size) not in axes for size in shape)


def _size_of_chunks(node: fx.Node) -> Any:
    arguments: tuple[Any, ...] = (*node.args, 0)
    x, chunks, axis, *_ = arguments
    return -(-x.meta["val"].shape[axis] // chunks)


def _sizes(graph: fx.Graph, axes: Mapping[str, tuple[fx.Node, int]], behind: fx.Node) -> dict[str, fx.Node]:
    """Nodes that have the sizes of these axes, right behind the last of the inputs."""
    asked = graph.find_nodes(op="call_function", target=aten.sym_size.int)
    own = {str(node.meta["val"]): node for node in asked if node.args[0].op == "placeholder"}
    sizes = {}
    for symbol, (x, axis) in reversed(list(axes.items())):
        sizes[symbol] = own.get(symbol) or graph.call_function(aten.sym_size.int, (x, axis))
        sizes[symbol].meta.setdefault("val", x.meta["val"].shape[axis])
        behind.append(sizes[symbol])
    return sizes


def _write_otherwise(node: fx.Node, sizes: Mapping[str, fx.Node]) -> None:
    """A node as torch.onnx would write it, in place."""
    arguments: tuple[Any, ...] = node.args
    x, *others = arguments or (None,)
    if node.op == "call_module" or node.target is _ASSERTION:
        node.graph.erase_node(node)  # what was assured as it was traced
    elif node.target is aten.to.dtype:
        _write(node, aten._to_copy.default, x, dtype=others[0])
    elif node.target is aten.mT.default:
        _write(node, aten.transpose.int, x, -2, -1)
    elif node.target in _OTHER_NAMES:
        node.target = _OTHER_NAMES[node.target]
    elif node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]
    elif node.target in (aten.movedim.int, aten.movedim.intlist):
        order = torch.empty(*range(x.meta["val"].ndim)).movedim(*others).shape  # the size of each axis is its number
        _write(node, aten.permute.default, x, [*order])
    elif node.target is aten.expand_as.default:
        _write(node, aten.expand.default, x, _shape(node, sizes))
    elif node.target is aten.chunk.default:
        _write(node, aten.split.Tensor, x, _size_of_chunks(node), *others[1:])
    elif node.target is aten.rsub.Scalar:
        _write(node, aten.sub.Tensor, *others, x)
    elif node.target is aten.view.default:
        _write(node, aten.view.default, _contiguous(node, x), *others)
    elif node.target in _VIEWS:
        _write(node, aten.view.default, _contiguous(node, x), _shape(node, sizes))


def _shape(node: fx.Node, sizes: Mapping[str, fx.Node]) -> list[Any]:
    """The result's: numbers, sizes of open axes, and -1 for what is neither."""
    return [size if isinstance(size, int) else sizes.get(str(size), -1) for size in node.meta["val"].shape]


def _write(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


def _contiguous(node: fx.Node, x: fx.Node) -> fx.Node:
    """A copy of `x`, whose axes lie in memory as `view` needs them; no ONNX graph keeps it."""
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    copy.meta["val"] = x.meta["val"].contiguous()
    return copy


def _lift(graph: fx.Graph, state: Mapping[str, Tensor], mode: Any) -> dict[str, fx.Node]:
    """Let a graph take its parameters as inputs, which are returned by name; `mode` makes fake tensors."""
    inputs = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        for number, (name, value) in enumerate(state.items()):
            inputs[name] = graph.placeholder(f"parameter_{number}")
            inputs[name].meta["val"] = mode.from_tensor(value, static_shapes=True)
    for node in graph.find_nodes(op="get_attr"):
        node.replace_all_uses_with(inputs[str(node.target)])
        graph.erase_node(node)
    return inputs
