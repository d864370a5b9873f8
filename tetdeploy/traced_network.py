"""A classifier that runs from its trace: what an export changes in the trace, it computes in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tetdeploy.arguments import check_count
from tetdeploy.networks import Classifier
from tetdeploy.tracing import Tracer


class TracedNetwork(nn.Module):
    """The network with BN folded (Eq. 6). Called like a `Classifier`: images `[N, C, H, W]` and T, or frames
    `[T, N, C, H, W]`, to logits `[T, N, K]`.

    Args:
        tracer: of the classifier, which is traced at each T it is called with, and put into inference mode by that.
            Its device stays what it is.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.classifier, self.encoding = tracer.classifier, tracer.encoding
        self.tracer = tracer
        self._by_T: dict[int, Callable[[Tensor], Any]] = {}

    def trace(self, T: int) -> Callable[[Tensor], Any]:
        """What maps `x [N, ...]` to the mean and the per-step logits `[N, T, K]`."""
        return self.tracer.folded(T)

    @property
    def mean(self) -> Tensor:
        return self.classifier.mean

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with weights of its own, traced anew."""
        made = copy.copy(self)
        classifier = copy.deepcopy(self.classifier, memo)
        made._modules = {"classifier": classifier}
        made.tracer = Tracer(classifier, encoding=self.encoding, uint8=self.tracer.uint8)
        made._by_T = {}
        return made

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        frames = self.encoding == "frames"
        steps = len(x) if frames else check_count("T", T)
        if steps not in self._by_T:
            # The check's recorder is for what runs, not for what is traced; and what is traced may be trained later.
            with _disable_current_modes(), torch.inference_mode(False):
                self._by_T[steps] = self.trace(steps)
        logits: Tensor = self._by_T[steps](x.transpose(0, 1) if frames else x)[1]
        return logits.transpose(0, 1)


Runnable = Classifier | TracedNetwork  # both are called alike and have a `mean`
