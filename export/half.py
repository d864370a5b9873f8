"""Layers in float16: what they read, their weights and what they put out; neurons stay in float32.

Layers between neurons compute in float16::

    I = fp32( fp16( sum fp16(W) s + fp16(b) ) )     convolutions
    I = fp32( fp16( sum fp16(W) s ) ) + b           linear layers: a matrix product and its bias would round twice

Spikes, and small sums of them, lose nothing, so that weights, biases and currents round, each once: float16 keeps 11
bits. Membranes, thresholds and residual sums stay in float32, and so do the first layer, which reads the image, and the
readout; docs/precision.md has the measurements behind that.

A processor without float16 arithmetic computes such a layer in float32. ONNX Runtime's CPU provider then casts float32
to float16 and back, and leaves out each such pair: currents stay float32, and so does what a layer reads, be it the
average of 9 spikes or the current of a layer before it. A graph is checked against a `HalfNetwork` that does so too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from tetdeploy.folding import LAYERS, layer_name, parameter
from tetdeploy.traced_network import TracedNetwork
from tetdeploy.tracing import Tracer

aten = torch.ops.aten
_LARGEST = torch.finfo(torch.float16).max
_ROUNDING = 2.0**-10  # of the sum of absolute values; a weight or bias rounds by half of it
_STEP = 2.0**-24  # between the smallest numbers of float16
Place = Literal["first", "inner", "readout"]


class HalfError(ValueError):
    """A layer cannot compute in float16."""


@dataclass(frozen=True)
class PlacedLayer:
    """A convolution or linear layer of a traced network: `first` has no neurons before it, `readout` none behind."""

    name: str
    place: Place
    node: fx.Node


def placed_layers(graph_module: fx.GraphModule) -> list[PlacedLayer]:
    """The layers whose weights are parameters, in the order in which they run."""
    nodes = list(graph_module.graph.nodes)
    behind: set[fx.Node] = set()
    for node in nodes:
        if _is_neurons(node) or any(given in behind for given in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(_is_neurons(user) or user in before for user in node.users):
            before.add(node)
    layers, names = [], Counter[str]()
    for node in nodes:
        if node.target not in LAYERS or any(given is not None and given.op != "get_attr" for given in node.args[1:3]):
            continue
        place: Place = "first" if node not in behind else "inner" if node in before else "readout"
        layers.append(PlacedLayer(layer_name(node, names), place, node))
    return layers


def halve(graph_module: fx.GraphModule, layers: Iterable[PlacedLayer] | None = None) -> dict[fx.Node, PlacedLayer]:
    """Let layers compute in float16, in place; by default those between neurons. The network must be folded.

    Returns:
        The layers, by the node that has their current.

    Raises:
        HalfError: there are none, or a weight or a current may be too large for float16.
    """
    if layers is None:
        layers = [layer for layer in placed_layers(graph_module) if layer.place == "inner"]
        if not layers:
            raise HalfError(
                "no linear layer and no convolution, but for transposed ones, lies between neurons, so none can run in "
                "float16; use fp32"
            )
    currents = {_halve_layer(graph_module, layer): layer for layer in layers}
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return currents


def _halve_layer(graph_module: fx.GraphModule, layer: PlacedLayer) -> fx.Node:
    graph, node = graph_module.graph, layer.node
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(node):
        inputs = [graph.call_function(aten.to.dtype, (x, torch.float16))]
        inputs += [graph.get_attr(name) for name in _half_parameters(graph_module, layer)]
    for new, old in zip(inputs[1:], (weight, bias), strict=False):
        new.meta = dict(old.meta)  # type: ignore[union-attr]
    linear = node.target is aten.linear.default
    node.args = (*inputs[:2], None if linear or bias is None else inputs[2], *node.args[3:])
    with graph.inserting_after(node):
        current = graph.call_function(aten.to.dtype, (node, torch.float32))
    node.replace_all_uses_with(current, delete_user_cb=lambda user: user is not current)
    current.meta = dict(node.meta)
    inputs[0].meta = node.meta | {"val": x.meta["val"].half()}
    node.meta = node.meta | {"val": node.meta["val"].half()}
    if not linear or bias is None:
        return current
    with graph.inserting_after(current):
        total = graph.call_function(aten.add.Tensor, (current, bias))
    current.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    total.meta = dict(node.meta)
    return total


def _half_parameters(graph_module: fx.GraphModule, layer: PlacedLayer) -> list[str]:
    """The names of a layer's weight and, if it has one, bias in float16.

    Raises:
        HalfError: see `halve`.
    """
    holder, owner = nn.Module(), f"half_{layer.node.name}"
    reach: Any = 0.0
    names = []
    for key, given in zip(("weight", "bias"), layer.node.args[1:3], strict=False):
        if given is None:
            continue
        value = parameter(graph_module, given)  # type: ignore[arg-type]
        reach = reach + (value.abs().flatten(1).sum(1) if key == "weight" else value.abs())
        holder.register_buffer(key, value.to(torch.float16))
        names.append(f"{owner}.{key}")
    if float(reach.max()) > _LARGEST:
        raise HalfError(
            f"the currents of {layer.name} may reach {float(reach.max()):g} and float16 ends at {_LARGEST:g}; "
            "use --precision fp32"
        )
    graph_module.add_submodule(owner, holder)
    return names


def _is_neurons(node: fx.Node) -> bool:
    return node.target is torch.ops.tetdeploy.lif.default


class HalfNetwork(TracedNetwork):
    """The network with layers in float16, in PyTorch; their sums are float32.

    Args: see `TracedNetwork`, and
        places: of the layers in float16.
        round_activations: what the layers read and put out is rounded too, as a GPU does and ONNX Runtime on a CPU
            does not.

    Raises:
        HalfError: when it is called, if what a layer reads or puts out is too large for float16.
    """

    def __init__(
        self, tracer: Tracer, *, places: tuple[Place, ...] = ("inner",), round_activations: bool = False
    ) -> None:
        super().__init__(tracer)
        self._places, self._round_activations = places, round_activations

    def trace(self, T: int) -> Callable[[Tensor], Any]:
        module = self.tracer.folded(T)
        halve(module, self._layers(module))
        return _RoundingInterpreter(module, self._round_activations).run

    def _layers(self, module: fx.GraphModule) -> list[PlacedLayer]:
        return [layer for layer in placed_layers(module) if layer.place in self._places]

    @torch.no_grad()
    def check_layers(self, x: Tensor, T: int) -> None:
        """Compare each layer in float16 with the folded one in float32, on what it reads when `x [N, ...]` is run.

        Raises:
            HalfError: one of them differs by more than the rounding of its weights and its bias.
        """
        plain, halved = self.tracer.folded(T), self.tracer.folded(T)
        _LayerComparison(halved, halve(halved, self._layers(halved)), plain).run(x)


class _RoundingInterpreter(fx.Interpreter):
    """Runs a network whose float16 layers compute in float32."""

    def __init__(self, graph_module: fx.GraphModule, round_activations: bool) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # a refusal is about the network, not about its trace
        self._dtype = torch.float16 if round_activations else torch.float32

    def run_node(self, n: fx.Node) -> Any:
        if n.target is aten.to.dtype and n.args[1] == torch.float16:
            read = self.fetch_args_kwargs_from_env(n)[0][0]
            return _in_reach(read.to(self._dtype), n)
        if n.target in LAYERS:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if args[1].dtype == torch.float16:
                floats = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
                return _in_reach(n.target(*floats, **kwargs).to(self._dtype), n)
        return super().run_node(n)


class _LayerComparison(_RoundingInterpreter):
    """Runs a network with float16 layers, and each of these in float32 as well.

    Args:
        currents: what `halve` returned.
        plain: the network before that.
    """

    def __init__(
        self, graph_module: fx.GraphModule, currents: dict[fx.Node, PlacedLayer], plain: fx.GraphModule
    ) -> None:
        super().__init__(graph_module, round_activations=False)
        self._currents, self._plain = currents, plain
        self._nodes = {layer.name: layer.node for layer in placed_layers(plain)}
        self._read: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is aten.to.dtype and n.args[1] == torch.float16:
            self._read[n] = result
        if n in self._currents:
            layer = self._currents[n]
            self._compare(layer.name, self._read.pop(layer.node.args[0]), result)  # type: ignore[arg-type]
        return result

    def _compare(self, name: str, x: Tensor, current: Tensor) -> None:
        node: Any = self._nodes[name]
        given = [x, *(given and parameter(self._plain, given) for given in node.args[1:3])]
        exact = node.target(*given, *node.args[3:])
        reach = node.target(*(value if value is None else value.abs() for value in given), *node.args[3:])
        weight = given[1]
        others = [d for d in range(exact.dim()) if d != exact.dim() + 1 - weight.dim()]  # all axes but the channels'
        error, limit = (current - exact).abs().amax(others), _ROUNDING * reach.amax(others)
        # Weights far below the layer's largest, as of channels that never fire, round by a fixed step.
        limit = (limit + _STEP * (weight[0].numel() * x.abs().max() + 1)).clamp(max=limit.max())
        if not bool((error <= limit).all()):
            if (weight.half() - weight).abs().sum() > _ROUNDING / 2 * weight.abs().sum():
                raise HalfError(
                    f"the weights of {name}, {float(weight.abs().max()):.3g} at most, are too small for float16, whose "
                    f"smallest numbers are {_STEP:.3g} apart; nothing was written: use --precision fp32"
                )
            k = int((error - limit).argmax())
            raise HalfError(
                f"the currents of {name} in float16 differ from those in float32 by {float(error[k]):.3g} in channel "
                f"{k}, where rounding makes {float(limit[k]):.3g} at most; nothing was written: use --precision fp32"
            )


def _in_reach(value: Tensor, node: fx.Node) -> Tensor:
    """A value that a GPU keeps in float16, however it is kept here."""
    largest = float(value.abs().max())
    if largest > _LARGEST:
        raise HalfError(
            f"{layer_name(node, Counter())} reads or puts out {largest:g} and float16 ends at {_LARGEST:g}; "
            "use --precision fp32"
        )
    return value
