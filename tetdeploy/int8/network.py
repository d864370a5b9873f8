"""The network that an int8 graph computes, in PyTorch."""

from __future__ import annotations

from torch import fx

from tetdeploy.int8.quantisation import Scales, quantise
from tetdeploy.traced_network import TracedNetwork
from tetdeploy.tracing import Tracer


class Int8Network(TracedNetwork):
    """The network with its spiking convolutions in 8 bits, in PyTorch: bit for bit what an int8 graph computes.

    It has the classifier's own parameters, folded (Eq. 6) and quantised at each call, and gradients for them; BN takes
    its running statistics and dropout is off, in training as well.

    Args: see `TracedNetwork`; `scales` are those of the convolutions that compute in 8 bits.
    """

    def __init__(self, tracer: Tracer, scales: Scales) -> None:
        super().__init__(tracer)
        self._scales = scales

    def trace(self, T: int) -> fx.GraphModule:
        module = self.tracer.folded(T, trainable=True)
        quantise(module, self._scales, trainable=True)
        return module
