"""The network that an int8 graph computes, in PyTorch."""

from __future__ import annotations

from torch import fx

from tetdeploy.networks import Classifier
from tetdeploy.quantisation import Scales, quantise
from tetdeploy.traced_network import TracedNetwork
from tetdeploy.tracing import Encoding, folded_module


class Int8Network(TracedNetwork):
    """The network with its spiking convolutions in 8 bits, in PyTorch: bit for bit what an int8 graph computes.

    It has the classifier's own parameters, folded (Eq. 6) and quantised at each call, and gradients for them; BN takes
    its running statistics and dropout is off, in training as well.

    Args: see `TracedNetwork`; `scales` are those of the convolutions that compute in 8 bits.
    """

    def __init__(self, classifier: Classifier, scales: Scales, *, encoding: Encoding, uint8: bool) -> None:
        super().__init__(classifier, encoding=encoding, uint8=uint8)
        self._scales = scales

    def trace(self, T: int) -> fx.GraphModule:
        module = folded_module(self.classifier, T=T, encoding=self.encoding, uint8=self.uint8, trainable=True)
        quantise(module, self._scales, trainable=True)
        return module
