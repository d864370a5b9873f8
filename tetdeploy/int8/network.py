"""The network that an int8 graph computes, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tetdeploy.folding import parameter
from tetdeploy.int8.quantisation import Int8Error, Scales, convolutions_with_scales, quantise
from tetdeploy.traced_network import TracedNetwork
from tetdeploy.tracing import Tracer

_FLOAT32 = 1e-5  # of the largest sum: what float32's own rounding may add


class Int8Network(TracedNetwork):
    """The network with its spiking convolutions in 8 bits, in PyTorch: bit for bit what an int8 graph computes.

    It has the classifier's own parameters, folded (Eq. 6) and quantised at each call, and gradients for them; BN takes
    its running statistics and dropout is off, in training as well.

    Args: see `TracedNetwork`, and
        scales: of the convolutions that compute in 8 bits.
        frozen: parameters are folded and quantised at the first call with a T, to the same bits, without gradients;
            they must stay as they are then.
    """

    def __init__(self, tracer: Tracer, scales: Scales, *, frozen: bool = False) -> None:
        super().__init__(tracer)
        self._scales, self._frozen = scales, frozen

    def trace(self, T: int) -> fx.GraphModule:
        module = self.tracer.folded(T, trainable=not self._frozen)
        quantise(module, self._scales, trainable=not self._frozen)
        return module.requires_grad_(not self._frozen)

    @torch.no_grad()
    def check_layers(self, x: Tensor, T: int) -> None:
        """Compare each layer in 8 bits with the folded one in float32, on the spikes it reads when `x [N, ...]` is run.

        Raises:
            Int8Error: one of them differs by more than the rounding of its weights, its bias and its current.
        """
        plain, quantised = self.tracer.folded(T), self.tracer.folded(T)
        quantise(quantised, self._scales)
        _LayerComparison(quantised, plain, self._scales).run(x)


class _LayerComparison(fx.Interpreter):
    """Runs a network with int8 layers, and each of these in float32 as well.

    Args: `plain` is the network before `quantise`.
    """

    def __init__(self, graph_module: fx.GraphModule, plain: fx.GraphModule, scales: Scales) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # a refusal is about the network, not about its trace
        self._plain = plain
        nodes = [node for node in graph_module.graph.nodes if node.target is torch.ops.tetdeploy.int8_conv.default]
        self._layers = dict(zip(nodes, convolutions_with_scales(plain, scales).items(), strict=True))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._layers:
            node, name = self._layers[n]
            self._compare(name, node, result, *self.fetch_args_kwargs_from_env(n)[0])
        return result

    def _compare(
        self, name: str, node: Any, current: Tensor, spikes: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any
    ) -> None:
        _, scale, zero, *_, groups = rest
        w, b = (given and parameter(self._plain, given) for given in (*node.args, None)[1:3])
        exact = node.target(spikes, w, b, *node.args[3:])
        read = node.target(spikes, torch.ones_like(w[:groups]), None, *node.args[3:])  # how many spikes, in each group
        reach = w.abs().flatten(1).sum(1) + (0 if b is None else b.abs())
        channels = [-1, *[1] * (weight.dim() - 2)]
        # The bias rounds as a weight does.
        limit = (read.repeat_interleave(len(w) // groups, dim=1) + 1) * weight_scale.view(channels)
        limit = (limit + scale) / 2 + _FLOAT32 * reach.view(channels)
        excess = (current - exact.clamp(-zero * scale, (255 - zero) * scale)).abs() - limit
        if not float(excess.max()) <= 0:
            raise Int8Error(
                f"the currents of {name} in int8 differ from those in float32 by {float(excess.max()):.3g} more than "
                "rounding can make; nothing was written: use --precision fp32"
            )
