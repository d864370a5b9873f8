"""How fast and how large LIF neurons train on this machine: ours against a plain autograd loop.

    python examples/benchmarks/neurons.py [--threads 2] [--json neurons.json]

Forward and backward of one layer over T steps. The two sides take turns in one process, so that a slow moment of the
machine hits both; the table shows medians and their ratio. "kept" is what autograd holds between forward and backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tetdeploy.files import write_json
from tetdeploy.neurons import lif

SHAPES = {
    "first layer of VGGSNN, 28x28": (4, 32, 64, 28, 28),
    "middle of ResNet-19, 16x16": (4, 16, 256, 16, 16),
    "linear layer": (8, 128, 512),
}


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


def seconds(run: Callable[[Tensor], Tensor], current: Tensor, gradient: Tensor) -> float:
    current.grad = None
    start = time.perf_counter()
    run(current).backward(gradient)
    return time.perf_counter() - start


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--repeats", default=25, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(threads: int, repeats: int, json_path: Path | None) -> None:
    torch.set_num_threads(threads)
    table = Table(title=f"LIF forward + backward, float32, {threads} threads, median of {repeats}")
    for column in ("layer", "[T, N, ...]", "loop", "tetdeploy", "speed-up", "kept, loop", "kept, tetdeploy"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    rows = []
    for name, shape in SHAPES.items():
        current, gradient = torch.randn(shape, requires_grad=True), torch.randn(shape)
        times: dict[str, list[float]] = {"loop": [], "ours": []}
        for repeat in range(-3, repeats):  # three rounds to warm up
            for side, run in (("loop", loop), ("ours", ours)):
                t = seconds(run, current, gradient)
                if repeat >= 0:
                    times[side].append(t)
        medians = {side: statistics.median(values) for side, values in times.items()}
        kept = {"loop": kept_bytes(loop, current), "ours": kept_bytes(ours, current)}
        ratio = medians["loop"] / medians["ours"]
        rows.append({"layer": name, "shape": shape, "seconds": medians, "speed_up": ratio, "kept_bytes": kept})
        table.add_row(
            name,
            str(list(shape)),
            *(f"{medians[side] * 1e3:.2f} ms" for side in ("loop", "ours")),
            f"{ratio:.2f}x",
            *(f"{kept[side] / 2**20:.1f} MiB" for side in ("loop", "ours")),
        )
    Console(width=130).print(table)
    mean = statistics.geometric_mean([float(row["speed_up"]) for row in rows])  # type: ignore[arg-type]
    print(f"geometric mean of the speed-ups: {mean:.2f}x")
    if json_path is not None:
        write_json(json_path, {"threads": threads, "repeats": repeats, "rows": rows, "geometric_mean": mean})


if __name__ == "__main__":
    main()
