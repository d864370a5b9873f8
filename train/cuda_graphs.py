"""CUDA graphs of the training step (`--cuda-graphs`): forward, loss and backward recorded once, then replayed.

Launching some hundreds of kernels from Python takes longer than a small batch takes on the card; a graph is one launch.
What a step computes depends on the numbers of time steps it counts, on its loss and on the batch's shape, so that each
combination has a graph of its own, recorded when it first comes up: the next stage of time inheritance training has
another. All graphs share one pool of memory, as no two of them run at once, and one set of gradients. Clipping, the
optimizer's update and the moving average stay outside, where the learning rate may change.

Never run yet on a GPU: see docs/gpu.md.
"""

from __future__ import annotations

import gc
import pickle
import random
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tetdeploy.wording import first_line

from .config import TrainConfig
from .ranks import Ranks

# Passes before the recording: kernels are chosen, tuned and compiled in them, which no recording may do.
WARM_UP = 3

Compute = Callable[[Tensor, Tensor], Tensor]


def check_graphs(config: TrainConfig, device: torch.device, precision: str, ranks: Ranks) -> None:
    """Refuse what has no graph.

    Raises:
        ValueError: no GPU, fp16's gradient scaling, `qat`, or several processes.
    """
    reasons = {
        f"the run is on {device.type}, and only an NVIDIA GPU has them": device.type != "cuda",
        "fp16 scales gradients by what earlier steps gave; use --precision bf16 or fp32": precision == "fp16",
        "--qat trains another network": config.qat,
        f"{ranks.size} processes exchange gradients within the step": ranks.size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"no CUDA graph of this training step: {reason}; or pass --no-cuda-graphs")


@dataclass(frozen=True)
class Recorded:
    """A graph, where it reads its batch and where it leaves its numbers and gradients.

    Attributes:
        gradients: one for each parameter; None where what was recorded does not use the parameter.
    """

    graph: torch.cuda.CUDAGraph
    x: Tensor
    labels: Tensor
    numbers: Tensor
    gradients: list[Tensor | None]

    def replay(self, x: Tensor, labels: Tensor) -> Tensor:
        self.x.copy_(x)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.numbers


class StepGraphs:
    """The graphs of a run's training steps.

    Args:
        network: whose parameters get the gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._parameters = [*network.parameters()]
        self._gradients: dict[Tensor, Tensor] = {}
        self._graphs: dict[Hashable, Recorded] = {}
        self._pool: Any = None

    def __call__(self, key: Hashable, compute: Compute, x: Tensor, labels: Tensor) -> Tensor:
        """What `compute(x, labels)` returns, and its gradients in the parameters' `.grad`, in place of older ones.

        As without a graph, a parameter that it does not use has none, so that the optimizer leaves it alone: a network
        may have BN layers of their own for each time step.

        Args:
            key: everything that decides what `compute` does, beside the shapes of `x` and `labels`.
            compute: forward and backward; returns numbers that are read before the next call.

        Raises:
            ValueError: it cannot be recorded, because it waits for the GPU for instance, or must not be, because it
                draws random numbers on the CPU. Those of the GPU go on as if nothing had been recorded; memory that the
                recording took stays taken until the process ends.
            torch.OutOfMemoryError: memory does not suffice.
        """
        key = (key, x.shape, x.dtype, labels.shape)
        if key not in self._graphs:
            with torch.cuda.device(x.device):
                self._graphs[key] = self._record(compute, x.clone(), labels.clone())
        recorded = self._graphs[key]
        self._set_gradients(recorded.gradients)
        return recorded.replay(x, labels)

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _shared_gradients(self) -> list[Tensor | None]:
        """Of each parameter that has a gradient now, the one of the first graph that used it: all graphs' is one."""
        return [None if p.grad is None else self._gradients.setdefault(p, p.grad) for p in self._parameters]

    def _record(self, compute: Compute, x: Tensor, labels: Tensor) -> Recorded:
        generator, buffers = torch.cuda.default_generators[torch.cuda.current_device()], [*self._network.buffers()]
        drawn, whole = generator.get_state(), generator.clone_state()
        before = [buffer.clone() for buffer in buffers]  # BN counts the warm-up too
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        drawn_here = _drawn_here()
        self._network.zero_grad(set_to_none=True)  # to see which parameters are used
        with torch.cuda.stream(stream):  # not that of the process, whose gradients' order a recording may not touch
            for _ in range(WARM_UP):
                compute(x, labels)
            self._set_gradients(gradients := self._shared_gradients())
            used = [gradient for gradient in gradients if gradient is not None]
            torch._foreach_zero_(used)
        torch.cuda.current_stream().wait_stream(stream)
        if _drawn_here() != drawn_here:
            generator.set_state(drawn)
            raise ValueError(
                "the network draws random numbers on the CPU, which a CUDA graph would not draw anew at each step; "
                "draw them on the GPU, or pass --no-cuda-graphs"
            )
        gc.collect()  # what the warm-up left in cycles of frames belongs to its stream
        graph, self._pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        outside = torch.cuda.current_stream()
        try:
            # Of this thread alone: another may be pinning memory for the next batches.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                torch._foreach_zero_(used)
                numbers = compute(x, labels)
        except RuntimeError as error:
            # The end of a broken recording raises an error of its own, and does so before it leaves the stream. Before
            # PyTorch 2.13, whose generators have a state for each recording, theirs stays in it as well, and refuses to
            # draw (https://github.com/pytorch/pytorch/pull/171265).
            torch.cuda.set_stream(outside)
            generator.graphsafe_set_state(whole)
            cause = error.__context__ or error
            traceback.clear_frames(cause.__traceback__)  # its gradients' nodes, which keep the stream of the recording
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise ValueError(
                f"the training step cannot be recorded as a CUDA graph ({first_line(cause)}); pass --no-cuda-graphs"
            ) from cause
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        generator.set_state(drawn)
        return Recorded(graph, x, labels, numbers, gradients)


def _drawn_here() -> bytes:
    """The state of the generators that a replay leaves alone: PyTorch's on the CPU, NumPy's and Python's."""
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))
