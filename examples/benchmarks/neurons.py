"""How fast and how large LIF neurons train on this machine: ours against a plain autograd loop, and SpikingJelly's.

    python examples/benchmarks/neurons.py [--threads 2] [--json neurons.json]
    python examples/benchmarks/neurons.py --device cuda        # also: pip install spikingjelly

Forward and backward of one layer over T steps. All sides take turns in one process, so that a slow moment of the
machine hits each; the table shows medians and the loop's over ours. "kept" is what autograd holds between forward and
backward. On a GPU time is that between CUDA events, in float32 and bfloat16, contiguous and channels-last, and every
backend of SpikingJelly that runs takes part, with our equations; one that does not run says why. *Never run on a GPU
by the authors yet.*
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from peers import reset, spikingjelly_neuron
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import json_option
from tetdeploy.files import write_json
from tetdeploy.neurons import LIF, lif

SHAPES = {
    "first layer of VGGSNN, 28x28": (4, 32, 64, 28, 28),
    "middle of ResNet-19, 16x16": (4, 16, 256, 16, 16),
    "linear layer": (8, 128, 512),
}
GPU_SHAPES = {
    "ResNet-19, first stage, 32x32": (4, 128, 128, 32, 32),
    "ResNet-19, last stage, 8x8": (4, 128, 512, 8, 8),
    "many steps, 16x16": (10, 64, 256, 16, 16),
    "linear layer": (8, 512, 4096),
}

Row = dict[str, float]


class Spike(torch.autograd.Function):
    """Theta(h - 1) with the triangle surrogate of width 1."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return (h > 1).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return grads[0] * (1 - (h - 1).abs()).clamp(min=0)


def loop(current: Tensor) -> Tensor:
    """LIF as one writes it first: a Python loop, autograd does the rest."""
    u = torch.zeros_like(current[0])
    spikes = []
    for current_t in current:
        h = 0.5 * u + current_t
        s = Spike.apply(h)
        u = h * (1 - s)
        spikes.append(s)
    return torch.stack(spikes)


def ours(current: Tensor) -> Tensor:
    return lif(current)[0]


def kept_bytes(run: Callable[[Tensor], Tensor], current: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(current)
    del output
    return sum(kept.values())


def spikingjelly(backend: str) -> Callable[[Tensor], Tensor]:
    node = spikingjelly_neuron(LIF(), backend=backend)

    def run(current: Tensor) -> Tensor:
        reset(node)
        spikes: Tensor = node(current)
        return spikes

    return run


def sides_on(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    sides = {"loop": loop, "ours": ours}
    if device == "cuda":
        for backend in ("torch", "cupy", "triton"):
            try:
                sides[f"spikingjelly {backend}"] = spikingjelly(backend)
            except Exception as error:  # whatever keeps another's package from starting is shown
                print(f"without SpikingJelly's {backend} backend: {error}")
    return sides


def runs(name: str, run: Callable[[Tensor], Tensor], current: Tensor, gradient: Tensor) -> bool:
    """Whether a side takes such tensors; ours and the loop must."""
    if name in ("loop", "ours"):
        return True
    try:
        seconds(run, current, gradient)
    except Exception as error:  # as above
        print(f"{name} does not run in {current.dtype}: {error}")
        return False
    return True


def seconds(run: Callable[[Tensor], Tensor], current: Tensor, gradient: Tensor) -> float:
    current.grad = None
    if not current.is_cuda:
        start = time.perf_counter()
        run(current).backward(gradient)
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run(current).backward(gradient)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def medians(sides: dict[str, Callable[[Tensor], Tensor]], current: Tensor, gradient: Tensor, repeats: int) -> Row:
    """Of each side, in turns, after three rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-3, repeats):
        for name, run in sides.items():
            t = seconds(run, current, gradient)
            if repeat >= 0:
                times[name].append(t)
    return {name: statistics.median(values) for name, values in times.items()}


def cases(device: str) -> Iterator[tuple[str, Tensor]]:
    """Layers, as dtype and memory format go through them."""
    for name, shape in (SHAPES if device == "cpu" else GPU_SHAPES).items():
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            current = torch.randn(shape, device=device).to(dtype)
            yield f"{name}, {str(dtype).removeprefix('torch.')}", current
            if device == "cuda" and len(shape) == 5:
                last = current.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
                yield f"{name}, {str(dtype).removeprefix('torch.')}, channels-last", last


@click.command(cls=CleanErrors)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--repeats", default=25, show_default=True)
@json_option
def main(device: str, threads: int, repeats: int, json_path: Path | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch sees no GPU here; leave out --device cuda")
    torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"
    sides = sides_on(device)
    table = Table(title=f"LIF forward + backward, {where}, median of {repeats}")
    for column in ("layer", "[T, N, ...]", *sides, "speed-up", "kept, loop", "kept, ours"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    rows: list[dict[str, Any]] = []
    for name, current in cases(device):
        gradient = torch.empty_like(current).normal_()
        current.requires_grad_()
        able = {side: run for side, run in sides.items() if runs(side, run, current, gradient)}
        took = medians(able, current, gradient, repeats)
        kept = {"loop": kept_bytes(loop, current), "ours": kept_bytes(ours, current)}
        ratio = took["loop"] / took["ours"]
        rows.append({"layer": name, "shape": [*current.shape], "seconds": took, "speed_up": ratio, "kept_bytes": kept})
        table.add_row(
            name,
            str([*current.shape]),
            *(f"{took[side] * 1e3:.2f} ms" if side in took else "-" for side in sides),
            f"{ratio:.2f}x",
            *(f"{kept[side] / 2**20:.1f} MiB" for side in ("loop", "ours")),
        )
    Console(width=130 if device == "cpu" else 200).print(table)
    summary: dict[str, Any] = {"device": where, "threads": threads, "repeats": repeats, "rows": rows}
    summary["geometric_mean"] = statistics.geometric_mean([row["speed_up"] for row in rows])
    print(f"geometric mean of the speed-ups: {summary['geometric_mean']:.2f}x over the loop")
    for side in sides:
        if side not in ("loop", "ours") and (both := [row["seconds"] for row in rows if side in row["seconds"]]):
            ratio = statistics.geometric_mean([took[side] / took["ours"] for took in both])
            print(f"                                  {ratio:.2f}x over {side}, in {len(both)} of {len(rows)} rows")
    if json_path is not None:
        write_json(json_path, summary)


if __name__ == "__main__":
    main()
