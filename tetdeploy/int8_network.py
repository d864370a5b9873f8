"""The network that an int8 graph computes, in PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from tetdeploy.networks import Classifier
from tetdeploy.quantisation import Scales, quantise
from tetdeploy.tracing import Encoding, folded_module


class Int8Network(nn.Module):
    """The network with its spiking convolutions in 8 bits, in PyTorch: bit for bit what an int8 graph computes.

    Called like a `Classifier`: images `[N, C, H, W]` and T, or frames `[T, N, C, H, W]`, to logits `[T, N, K]`. It has
    the classifier's own parameters, folded (Eq. 6) and quantised at each call, and gradients for them; BN takes its
    running statistics and dropout is off, in training as well.

    Args:
        classifier: put into inference mode by the first call with a T. Its device stays what it is by then.
        scales: of the convolutions that compute in 8 bits.
        encoding: `direct` or `frames`.
        uint8: the input is pixels, which are normalised; otherwise float32 that is normalised already.
    """

    def __init__(self, classifier: Classifier, scales: Scales, *, encoding: Encoding, uint8: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self._scales, self._encoding, self._uint8 = scales, encoding, uint8
        self._by_T: dict[int, fx.GraphModule] = {}

    @property
    def mean(self) -> Tensor:
        return self.classifier.mean

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classifier.class_names

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Network:
        """A copy with weights of its own."""
        classifier = copy.deepcopy(self.classifier, memo)
        return Int8Network(classifier, self._scales, encoding=self._encoding, uint8=self._uint8)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        frames = self._encoding == "frames"
        module = self._at(len(x) if frames else T or 1)
        logits: Tensor = module(x.transpose(0, 1) if frames else x)[1]
        return logits.transpose(0, 1)

    def _at(self, T: int) -> fx.GraphModule:
        if T not in self._by_T:
            # The check's recorder is for what runs, not for what is traced; and what is traced may be trained later.
            with _disable_current_modes(), torch.inference_mode(False):
                module = folded_module(self.classifier, T=T, encoding=self._encoding, uint8=self._uint8, trainable=True)
                quantise(module, self._scales, trainable=True)
            self._by_T[T] = module
        return self._by_T[T]
