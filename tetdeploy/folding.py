"""Folding batch normalisation into the layer before it (Eq. 6).

In inference BN is an affine map per channel, so that with running mean mu, running standard deviation
alpha = sqrt(var + eps) and affine parameters gamma, beta::

    W' = W gamma / alpha        b' = beta + (b - mu) gamma / alpha        (6)

Folding works on the traced graph, not on the modules: there it sees what really feeds what, whatever the modules are
called and however often one is used. A convolution that feeds two different BNs becomes two convolutions.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tetdeploy.arguments import check_flag
from tetdeploy.names import numbered

aten = torch.ops.aten

_BATCH_NORM = aten.batch_norm.default
_PARAMETERS = "tetdeploy_parameters"  # in a folded layer's `meta`
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
LAYERS = (*CONVOLUTIONS, aten.linear.default)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
# Operations that may stand between a layer and its BN: these keep the order of the values, or repeat all of them.
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
)
_ORDERED_VIEWS = VIEWS[:-2]  # what copies may be there to be written over
MOVES = (  # these change the order of the axes
    aten.transpose.int,
    aten.permute.default,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.mT.default,
)
DROPOUT = (  # (input, p, train)
    aten.dropout.default, aten.feature_dropout.default, aten.dropout_.default, aten.feature_dropout_.default,
)  # fmt: skip


class FoldingError(ValueError):
    """A BN layer cannot be folded; the message names it and says why."""


def fold_batchnorm(program: torch.export.ExportedProgram, *, trainable: bool = False) -> fx.GraphModule:
    """Fold every BN of an exported network into the convolution, transposed or not, or linear layer before it (Eq. 6).

    The arithmetic of folding is float64. Shared layers are copied where their BNs differ.

    Args:
        program: `torch.export.export(net.eval(), ...)`, any shapes, dynamic ones included.
        trainable: the module reads the parameters of the traced network itself and folds them at each call, so that
            gradients reach them. BN's running statistics are constants to it.

    Returns:
        A module that maps the same input to the same output with no BN in it. `program` is left as it was.

    Raises:
        FoldingError: a BN is in training mode, has no convolution or linear layer straight before it (views and moved
            axes aside), or normalises another axis than the channels of that layer.
    """
    check_flag("trainable", trainable)
    graph_module = program.module() if trainable else copy.deepcopy(program.module())
    assert isinstance(graph_module, fx.GraphModule)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and "batch_norm" in str(node.target) and node.target is not _BATCH_NORM:
            raise FoldingError(
                f"cannot fold BN {module_path(node)!r}: the program is decomposed already ({node.target}); "
                "fold before run_decompositions()"
            )
        if node.op == "call_function" and node.target is _BATCH_NORM:
            _fold(graph_module, node, trainable)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def count_batchnorm(graph: fx.Graph) -> int:
    """How many BN operations a graph has."""
    return sum(node.op == "call_function" and node.target is _BATCH_NORM for node in graph.nodes)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that a traced node stems from, or the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else node.name


def layer_name(node: fx.Node, names: Counter[str]) -> str:
    """The network's own name of the layer that a traced node is; `names` are those before it, see `numbered`."""
    return numbered(module_path(node).removeprefix("classifier.").removeprefix("network."), names)


def parameter_names(layer: fx.Node) -> tuple[str, ...]:
    """What a layer's weight and bias are read from, and the BN that was folded into them: alike in all calls of one."""
    return layer.meta.get(_PARAMETERS) or _targets(layer.args[1:3])


def _targets(given: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(node.target) for node in given if isinstance(node, fx.Node))


def parameter(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter or buffer that a `get_attr` node reads, detached."""
    value: Any = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def is_parameter(node: Any) -> bool:
    """Whether a node of a traced graph reads a parameter or buffer, or one that is folded at each call."""
    return node.op == "get_attr" or (node.target is operator.getitem and node.args[0].target is fold)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    transposed_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Eq. 6 in float64: the new weight `[C', ...]` and bias `[C']`, in the dtype of `weight`.

    Args:
        transposed_groups: of a transposed convolution, whose weight is `[C, C' / groups, ...]`; None of other layers.
    """
    scale = torch.rsqrt(variance.double() + eps)
    scale = scale if gamma is None else scale * gamma.double()
    new_bias = -mean.double() if bias is None else bias.double() - mean.double()
    new_bias = new_bias * scale if beta is None else new_bias * scale + beta.double()
    kernel = [1] * (weight.dim() - 2)
    if transposed_groups is None:
        new_weight = weight.double() * scale.view(-1, 1, *kernel)
    else:
        of_groups = weight.double().unflatten(0, (transposed_groups, -1))  # [groups, C / groups, C' / groups, ...]
        new_weight = (of_groups * scale.view(transposed_groups, 1, -1, *kernel)).flatten(0, 1)
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def _fold(graph_module: fx.GraphModule, bn: fx.Node, trainable: bool) -> None:
    name = module_path(bn)
    if bn.args[5]:
        raise FoldingError(
            f"cannot fold BN {name!r}: it is in training mode, so its statistics change with every batch; "
            "call net.eval() first (and track running statistics in training)"
        )
    layer = _layer_before(bn, name)
    parts = [layer.args[1], layer.args[2] if len(layer.args) > 2 else None, *bn.args[1:5]]
    for part in parts:
        _refuse_computed(part, bn)
    graph = graph_module.graph
    with graph.inserting_before(layer):
        make = _folded_at_each_call if trainable else _folded_once
        parameters = make(graph_module, parts, [bn.args[7], _transposed_groups(layer)], bn)
        folded = graph.create_node("call_function", layer.target, (layer.args[0], *parameters, *layer.args[3:]))
    folded.meta = layer.meta | {_PARAMETERS: (*parameter_names(layer), *_targets(bn.args[1:5]))}
    _replace_on_the_way(bn, layer, folded)


def _layer_before(bn: fx.Node, name: str) -> fx.Node:
    """The convolution or linear layer whose channels `bn` normalises."""
    before: Any = bn.args[0]
    node, channels = before, _axes(before)[1]
    while node.target in (*VIEWS, *MOVES) or (node.target in DROPOUT and not node.args[2]):  # no dropout in inference
        channels = _channels_before(node, channels)
        node = node.args[0]
    if node.target not in (*LAYERS, *_TRANSPOSED):
        raise FoldingError(
            f"cannot fold BN {name!r}: what comes before it is {_kind(node)}, not a convolution or linear layer; move "
            "the BN behind one"
        )
    axis = node.meta["val"].dim() + 1 - node.args[1].meta["val"].dim()  # before those of a kernel
    if _axes(node)[axis : axis + 1] != [channels]:  # a linear layer whose weight is a vector has none
        raise FoldingError(
            f"cannot fold BN {name!r}: it normalises axis 1 of its input {_shape(before)}, which is not seen to be the "
            f"channels of {module_path(node)!r}, axis {axis} of {_shape(node)}; move them there"
        )
    layer: fx.Node = node
    return layer


def _kind(node: Any) -> str:
    """What a refusal calls an operation."""
    if node.target is operator.getitem:  # of what it returns
        node = node.args[0]
    if node.op == "placeholder":
        return "the input"
    if str(node.target) == "tetdeploy.lif.default":
        return f"the neuron layer {module_path(node)!r}"
    return f"{node.target} ({module_path(node)})"


def _axes(node: fx.Node) -> list[tuple[str, str]]:
    """Of each axis the size, and the number of values from one place on it to the next. A view that keeps the order of
    the values keeps an axis where it keeps both. As text, so that an open size is equal to itself alone."""
    shape = node.meta["val"].shape
    return [(str(size), str(math.prod(shape[k + 1 :]))) for k, size in enumerate(shape)]


def _channels_before(node: Any, channels: Any) -> Any:
    """The channels, as in `_axes`, in what `node` reads, given those in its result; None where they are no axis."""
    if node.target not in (*MOVES, aten.expand.default):
        return channels
    before, after = _axes(node.args[0]), _axes(node)
    if channels not in after:
        return None
    axis = after.index(channels)
    if node.target in MOVES:
        axes = torch.empty(*range(len(before)), device="meta")  # the size of each is its number
        return before[node.target(axes, *node.args[1:]).shape[axis]]
    return channels if before[axis - len(after) :] == after[axis:] else None


def _shape(node: fx.Node) -> str:
    return str(list(node.meta["val"].shape))


def _folded_once(graph_module: fx.GraphModule, parts: list[Any], rest: list[Any], bn: fx.Node) -> list[fx.Node]:
    """New weight and bias as parameters of the module: `fold` of tensors and the rest."""
    tensors: list[Any] = [None if part is None else parameter(graph_module, part) for part in parts]
    values = fold(*tensors, *rest)
    owner = f"folded_{bn.name}"
    folded = {key: nn.Parameter(value, False) for key, value in zip(("weight", "bias"), values, strict=True)}
    graph_module.add_submodule(owner, nn.ParameterDict(folded))
    nodes = [graph_module.graph.get_attr(f"{owner}.{key}") for key in folded]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value  # read where a second BN follows
    return nodes


def _folded_at_each_call(graph_module: fx.GraphModule, parts: list[Any], rest: list[Any], bn: fx.Node) -> list[fx.Node]:
    """New weight and bias as the graph computes them."""
    graph = graph_module.graph
    pair = graph.call_function(fold, (*parts, *rest))
    nodes = [graph.call_function(operator.getitem, (pair, k)) for k in range(2)]
    for node, like in zip(nodes, (parts[0], bn.args[3]), strict=True):
        node.meta["val"] = like.meta["val"]
    return nodes


def _transposed_groups(layer: fx.Node) -> Any:
    """The groups of a transposed convolution; None of other layers."""
    if layer.target not in _TRANSPOSED:
        return None
    return layer.args[6] if len(layer.args) > 6 else 1  # (input, weight, bias, stride, padding, output_padding, groups


def _refuse_computed(argument: Any, bn: fx.Node) -> None:
    """Refuse what is no parameter or buffer among what `bn`, or the layer before it, reads."""
    if argument is None or is_parameter(argument):
        return
    raise FoldingError(
        f"cannot fold BN {module_path(bn)!r}: {argument} ({module_path(argument)}) is computed in the network, not "
        f"a parameter of it; {remedy_of_computed(argument)}"
    )


def remedy_of_computed(weight: fx.Node) -> str:
    """What to do about a weight that the network computes, in a refusal of it."""
    if "parametrizations" in module_path(weight).split("."):
        return "remove the parametrization first"
    return "put a plain layer with the weight that is computed now in its place first"


def _replace_on_the_way(bn: fx.Node, layer: fx.Node, folded: fx.Node) -> None:
    """Let what read `bn` read `folded` through copies of the views and moves that lay between layer and BN, but where
    views alone ended in the shape they began with: time split off and merged again."""
    views: list[fx.Node] = []
    before: Any = bn.args[0]
    node = before
    while node is not layer:
        views.append(node)
        node = node.args[0]
    moved = any(view.target in MOVES for view in views)
    back_in_shape = not moved and _shape(before) == _shape(layer)
    chain = [folded]
    for view in [] if back_in_shape else reversed(views):
        with bn.graph.inserting_before(bn):
            copied = bn.graph.node_copy(view, lambda n, _v=view: chain[-1] if n is _v.args[0] else n)  # type: ignore[misc]
        chain.append(copied)
    if moved:  # BN gave memory in this order, and what reads it may view and write it so
        with bn.graph.inserting_before(bn):
            order: Any = {"memory_format": _memory_format(before.meta["val"])}
            chain.append(bn.graph.call_function(aten.clone.default, (chain[-1],), order))
        chain[-1].meta = dict(bn.meta)  # read where a second BN follows
    bn.replace_all_uses_with(chain[-1])
    bn.graph.erase_node(bn)
    for node in (*views, layer):
        if not node.users:  # fx would keep a dropout, which may draw random numbers, and the layer that it reads
            node.graph.erase_node(node)
    if len(chain) > 1 and not moved:
        _skip_views(chain)


def _memory_format(value: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return last if last is not None and value.is_contiguous(memory_format=last) else torch.contiguous_format


def _skip_views(chain: list[fx.Node]) -> None:
    """Where views of a chain's end lead back to the shape of one in the chain, let their readers read that: with no BN
    between merging time and splitting it off, torch.export cannot trace the graph once more."""
    if _is_overwritten(chain[-1]):  # a chain that copies, as clone does, has other memory before that
        return
    for view in list(chain[-1].users):
        if view.target not in _ORDERED_VIEWS:
            continue
        before = next((node for node in chain if _shape(node) == _shape(view)), None)
        if before is not None:
            view.replace_all_uses_with(before)
            # Views may read what is expanded now, which they refuse; a reshape copies it.
            for other in view.graph.find_nodes(op="call_function", target=aten.view.default):
                if not _is_overwritten(other):
                    other.target = aten.reshape.default


def _is_overwritten(value: fx.Node) -> bool:
    """Whether an operation in place has the value, or a view or a part of it, as an input."""
    return any(overwritten(user) or (shares_memory(user) and _is_overwritten(user)) for user in value.users)


def overwritten(node: fx.Node) -> list[fx.Node]:
    """What an operation in place writes over; none of any other."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs
    over = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in tree_leaves(over) if isinstance(value, fx.Node)]


def shares_memory(node: fx.Node) -> bool:
    """Whether what an operation returns may be the memory of its input."""
    if node.target is operator.getitem:  # of what unbind or chunk returns
        return True
    return isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns)
