"""A folded network as an exported program, without tracing it once more.

torch.export makes a program of a changed graph by tracing it anew, and torch.onnx traces that again to take operations
apart that ONNX has not: together half the time of an export. A graph of the operations below needs neither. ONNX has
each of them, and none writes over values, so that the graph is the program already, but that a program takes its
parameters as inputs.
"""

from __future__ import annotations

import math
import operator
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

from tetdeploy.folding import parameter

aten = torch.ops.aten
_TRANSLATED = {
    torch.ops.tetdeploy.lif.default, torch.ops.tetdeploy.int8_conv.default,
    operator.getitem, operator.mul, aten.sym_size.int,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.matmul.default,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.relu.default, aten.softmax.int,
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool2d.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.flip.default,
    aten.expand.default, aten.repeat.default, aten.clone.default, aten.pad.default, aten.upsample_nearest2d.vec,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.unbind.int, aten.cat.default, aten.stack.default,
}  # fmt: skip
_VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
_WRITTEN_OTHERWISE = {*_VIEWS, aten.to.dtype, aten.mT.default, aten.adaptive_avg_pool2d.default}
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
    if not all(map(_is_known, graph.nodes)):
        return None
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if isinstance(size := node.meta.get("val"), torch.SymInt):
            sizes.setdefault(str(size), node)
        _write_otherwise(node, sizes)
    graph.eliminate_dead_code()
    state, parameters = _lift(folded)
    given = [node for node in graph.find_nodes(op="placeholder") if node not in parameters]
    results: Any = graph.output_node().args[0]
    specs = [
        InputSpec(InputKind.BUFFER, _named(node), name, True) for name, node in zip(state, parameters, strict=True)
    ]
    specs += [InputSpec(InputKind.USER_INPUT, _named(node), None) for node in given]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _named(node), None) for node in results]
    signature = ExportGraphSignature(specs, outputs)
    return _Decomposed(
        folded, graph, signature, state, traced.range_constraints, traced.module_call_graph, verifiers=traced.verifiers
    )


def _named(node: fx.Node) -> TensorArgument:
    return TensorArgument(node.name)


def _is_known(node: fx.Node) -> bool:
    if node.target is aten.to.dtype and len(node.args) > 2:
        return False
    if node.target is aten.adaptive_avg_pool2d.default and node.args[1] != [1, 1]:
        return False
    return (
        node.op != "call_function"
        or node.target in _TRANSLATED
        or node.target is _ASSERTION
        or (node.target in _WRITTEN_OTHERWISE and not node.kwargs)
    )


def _write_otherwise(node: fx.Node, sizes: dict[str, fx.Node]) -> None:
    """A node as torch.onnx would write it, in place; `sizes` are those computed before it."""
    x = next(iter(node.args), None)
    if node.op == "call_module" or node.target is _ASSERTION:
        node.graph.erase_node(node)  # what was assured as it was traced
    elif node.target is aten.to.dtype:
        _write(node, aten._to_copy.default, x, dtype=node.args[1])
    elif node.target is aten.mT.default:
        _write(node, aten.transpose.int, x, -2, -1)
    elif node.target is aten.adaptive_avg_pool2d.default:
        _write(node, aten.mean.dim, x, [-1, -2], True)
    elif node.target in _VIEWS:
        _write(node, aten.view.default, _contiguous(node, x), _shape(node, sizes))


def _write(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


def _shape(node: fx.Node, sizes: dict[str, fx.Node]) -> list[Any]:
    """What `view` takes for the same as any of the views: numbers, nodes that have some, and one -1."""
    x: Any = node.args[0]
    given: Any = node.args[1:]
    shape = x.meta["val"].shape
    if node.target in (aten.view.default, aten.reshape.default):
        return list(given[0])
    if node.target is aten.unflatten.int:
        axis = given[0] % len(shape)
        first, middle, last = axis, list(given[1]), axis + 1
    else:
        start, end = given + (0, -1)[len(given) :]  # as flatten has them
        first, last = start % len(shape), end % len(shape) + 1
        merged = math.prod(shape[first:last])
        middle = [merged if isinstance(merged, int) else -1]
    with node.graph.inserting_before(node):
        before, behind = ([_size(x, axis, sizes) for axis in part] for part in (range(first), range(last, len(shape))))
    return [*before, *middle, *behind]


def _contiguous(node: fx.Node, x: Any) -> fx.Node:
    """A copy of `x`, whose axes lie in memory as `view` needs them; no ONNX graph keeps it."""
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    copy.meta["val"] = x.meta["val"].contiguous()
    return copy


def _size(x: fx.Node, axis: int, sizes: dict[str, fx.Node]) -> Any:
    """The size of an axis, or a node that has it."""
    size = x.meta["val"].shape[axis]
    if isinstance(size, torch.SymInt) and str(size) not in sizes:
        sizes[str(size)] = x.graph.call_function(aten.sym_size.int, (x, axis))
        sizes[str(size)].meta["val"] = size
    return sizes.get(str(size), size)


def _lift(module: fx.GraphModule) -> tuple[dict[str, Tensor], list[fx.Node]]:
    """Let the graph take its parameters as inputs: these by name, and those in the same order."""
    graph = module.graph
    read = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    state = {name: parameter(module, node) for name, node in read.items()}
    mode = next(node.meta["val"].fake_mode for node in graph.find_nodes(op="placeholder"))
    inputs = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        for name, value in state.items():
            inputs[name] = graph.placeholder(name.replace(".", "_"))
            inputs[name].meta["val"] = mode.from_tensor(value, static_shapes=True)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        node.replace_all_uses_with(inputs[str(node.target)])
        graph.erase_node(node)
    return state, list(inputs.values())
