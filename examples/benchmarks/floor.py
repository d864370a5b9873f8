"""The floor of a training step, for training_step.py.

It is the time of the convolutions by themselves on this device (each shape forward and backward, channels-last),
plus, on a card, what BN, residual sum and neurons must read and write at 3 TB/s if they are fused: of each
convolution's output, in 16 bits, forward the statistics (1 pass) and the spikes (2: read, write), backward the sums (3:
currents, spikes' gradients, membranes' gradients written) and the currents' gradients (3); a residual that is added is
read twice.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy.networks.blocks import ResidualBlock
from tetdeploy.train.device import autocast

if TYPE_CHECKING:
    from training_step import Case, Step

PASSES, PASSES_OF_A_RESIDUAL, BANDWIDTH = 9, 2, 3e12


def timed(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each call, on a card between CUDA events."""
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(count):
            call()
            ends.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


class Convolutions(TorchDispatchMode):
    """Sees the shapes of all convolutions: input, weight, stride, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding = args[:5]
            self.seen[tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding)] += 1
        return func(*args, **(kwargs or {}))


def floor(step: Step, case: Case) -> dict[str, float]:
    """Milliseconds that convolutions take by themselves, what they compute, and the bytes of all the rest."""
    residuals: list[int] = []
    for module in step.network.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda block, x, y: residuals.append(y.numel()))
    with torch.no_grad(), autocast(step.device, step.precision), Convolutions() as convolutions:
        step.network(step.x, step.T)
    milliseconds = operations = elements = 0.0
    for (shape, weight, stride, padding), count in convolutions.seen.items():
        ms, macs, outputs = convolution(shape, weight, stride, padding, step)
        milliseconds += count * ms
        operations += count * 2 * macs * (2 if shape[1] == 3 else 3)  # images need no gradient
        elements += count * outputs * (case.T if shape[0] == case.batch else 1)  # the encoded image is read T times
    moved = 2 * (PASSES * elements + PASSES_OF_A_RESIDUAL * sum(residuals))
    found = {
        "convolutions_ms": milliseconds,
        "tflop": operations / 1e12,
        "tflop_per_s": operations / 1e9 / milliseconds,
        "gb": moved / 1e9,
    }
    if step.device.type == "cuda":
        found["memory_ms"] = 1e3 * moved / BANDWIDTH
        found["floor_ms"] = milliseconds + found["memory_ms"]
    return found


def convolution(
    shape: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], step: Step
) -> tuple[float, float, int]:
    """Milliseconds of one convolution forward and backward, its multiply-accumulates forward, its outputs."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(step.precision, torch.float32)
    options: dict[str, Any] = {"device": step.device, "dtype": dtype}
    x, w = (torch.randn(s, **options).to(memory_format=torch.channels_last) for s in (shape, weight))
    x.requires_grad_(shape[1] != 3)
    w.requires_grad_()
    gradient = torch.randn_like(functional.conv2d(x, w, stride=stride, padding=padding))

    def both_ways() -> None:
        x.grad = w.grad = None
        functional.conv2d(x, w, stride=stride, padding=padding).backward(gradient)

    timed(both_ways, 3, step.device)
    taken = statistics.median(timed(both_ways, 10, step.device))
    return taken, gradient.numel() * w[0].numel(), gradient.numel()
