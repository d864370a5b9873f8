"""How fast and how large LIF neurons train on this machine: ours against a plain autograd loop, and SpikingJelly's.

    \b
    python examples/benchmarks/neurons.py [--threads 2] [--json neurons.json]
    python examples/benchmarks/neurons.py --device cuda        # also: pip install spikingjelly

Forward and backward of one layer over T steps. Each side has a process of its own (`turns`), and they take turns, so
that a slow moment of the machine hits each; the table shows medians and the loop's over ours. "kept" is what autograd
holds between forward and backward. On a GPU time is that of the kernels, which wait in the queue until all are there,
so that no side pays for Python, in float32 and bfloat16, contiguous and channels-last, and every implementation of
SpikingJelly's neurons takes part (`SJ_LIF_CUDA_IMPLEMENTATION`, which it reads when it is imported), with our
equations; one that does not run says why. *Never run on a GPU by the authors yet.*
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import AT_LEAST_1, json_option
from tetdeploy.neurons import LIF
from tetdeploy.storage.files import write_json

sys.path.insert(0, str(Path(__file__).parent))
from peers import LoopLIF, reset, spikingjelly_neuron
from turns import Answer, Worker

TURNS = 5
WAIT = 20_000_000  # cycles, 10 ms or more: all kernels of forward and backward are in the queue by then
SPIKINGJELLY = ("SpikingJelly torch", "SpikingJelly triton", "SpikingJelly cuda")
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


def spikingjelly(implementation: str) -> Callable[[Tensor], Tensor]:
    os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = implementation
    node = spikingjelly_neuron(LIF())

    def run(current: Tensor) -> Tensor:
        reset(node)
        spikes: Tensor = node(current)
        return spikes

    return run


def seconds(run: Callable[[Tensor], Tensor], current: Tensor, gradient: Tensor) -> float:
    current.grad = None
    if not current.is_cuda:
        start = time.perf_counter()
        run(current).backward(gradient)
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT)
    before.record()
    run(current).backward(gradient)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


@dataclass(frozen=True)
class Case:
    """A layer's current, as dtype and memory format go through it."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.layer}, {self.dtype}" + ", channels-last" * self.channels_last

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """The current and the gradient of its spikes."""
        torch.manual_seed(0)
        current = torch.randn(self.shape, device=device).to(getattr(torch, self.dtype))
        if self.channels_last:
            merged = current.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            current = merged.unflatten(0, self.shape[:2])
        return current.requires_grad_(), torch.empty_like(current).normal_()


def cases(device: str) -> Iterator[Case]:
    for layer, shape in (SHAPES if device == "cpu" else GPU_SHAPES).items():
        for dtype in ("float32",) if device == "cpu" else ("float32", "bfloat16"):
            for channels_last in (False, True) if device == "cuda" and len(shape) == 5 else (False,):
                yield Case(layer, shape, dtype, channels_last)


def open_side(side: str, device: str, threads: int) -> Answer:
    """What answers a case and a number of calls with {"seconds" of each, "kept_bytes"}."""
    torch.set_num_threads(threads)
    own = {"loop": LoopLIF(), "ours": LIF()}
    run = own[side] if side in own else spikingjelly(side.split()[1])
    ready: tuple[Case, Tensor, Tensor] | None = None

    def answer(request: tuple[Case, int]) -> dict[str, Any]:
        nonlocal ready
        case, calls = request
        if ready is None or ready[0] != case:
            ready = (case, *case.tensors(device))
            seconds(run, *ready[1:])
        seconds(run, *ready[1:])
        return {"seconds": [seconds(run, *ready[1:]) for _ in range(calls)], "kept_bytes": kept_bytes(run, ready[1])}

    return answer


def measure(
    case: Case, device: str, threads: int, workers: dict[str, Worker], never: dict[str, str], repeats: int
) -> dict[str, dict[str, Any]]:
    """Of each side that runs {"seconds", "kept_bytes"}; the first turn warms up.

    `never` has the sides that have answered nothing yet, and why they failed last, if they did: one that fails so again
    leaves `workers`, since to open it for every case takes seconds each; so does one that hangs.
    """
    found: dict[str, dict[str, Any]] = {}
    able = list(workers)
    for turn in range(TURNS + 1):
        for side in tuple(able):
            answer = workers[side].ask((case, -(-repeats // TURNS)))
            if answer is None:
                worker = workers.pop(side)
                reason = worker.failed
                if side in ("loop", "ours"):
                    raise click.ClickException(f"{side} does not run on {case}: {reason}")
                print(f"{side} does not run on {case}: {reason}")
                able.remove(side)
                found.pop(side, None)
                if not worker.hung and never.get(side) != reason:
                    workers[side] = Worker(open_side, side, device, threads)  # for the next case
                if side in never:
                    never[side] = reason
                continue
            never.pop(side, None)
            if turn:
                found.setdefault(side, {"seconds": []})["seconds"] += answer["seconds"]
                found[side]["kept_bytes"] = answer["kept_bytes"]
    return {side: {**values, "seconds": statistics.median(values["seconds"])} for side, values in found.items()}


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), type=AT_LEAST_1, show_default=True)
@click.option("--repeats", default=25, type=AT_LEAST_1, show_default=True)
@json_option
def main(device: str, threads: int, repeats: int, json_path: Path | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch sees no GPU here; leave out --device cuda")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"
    sides = ("loop", "ours", *(SPIKINGJELLY if device == "cuda" else ()))
    workers = {side: Worker(open_side, side, device, threads) for side in sides}
    table = Table(title=f"LIF forward + backward, {where}, median of {repeats}")
    for column in ("layer", "[T, N, ...]", *sides, "speed-up", "kept, loop", "kept, ours"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"device": where, "threads": threads, "repeats": repeats, "rows": rows}
    never = dict.fromkeys(sides, "")
    for case in cases(device):
        found = measure(case, device, threads, workers, never, repeats)
        took = {side: values["seconds"] for side, values in found.items()}
        kept = {side: found[side]["kept_bytes"] for side in ("loop", "ours")}
        ratio = took["loop"] / took["ours"]
        rows.append({"layer": str(case), "shape": case.shape, "seconds": took, "speed_up": ratio, "kept_bytes": kept})
        table.add_row(
            str(case),
            str([*case.shape]),
            *(f"{took[side] * 1e3:.2f} ms" if side in took else "-" for side in sides),
            f"{ratio:.2f}x",
            *(f"{kept[side] / 2**20:.1f} MiB" for side in ("loop", "ours")),
        )
        summary["geometric_mean"] = statistics.geometric_mean([row["speed_up"] for row in rows])
        if json_path is not None:  # a run that is cut leaves what it has measured
            write_json(json_path, summary)
    for worker in workers.values():
        worker.end()
    Console(width=130 if device == "cpu" else 200).print(table)
    print(f"geometric mean of the speed-ups: {summary['geometric_mean']:.2f}x over the loop")
    for side in sides:
        if side not in ("loop", "ours") and (both := [row["seconds"] for row in rows if side in row["seconds"]]):
            ratio = statistics.geometric_mean([took[side] / took["ours"] for took in both])
            print(f"                                  {ratio:.2f}x over {side}, in {len(both)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
