"""Training memory against T: our neurons and a plain autograd loop, with and without recomputation.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --model resnet19 --width 1 --batch-size 128 --device cuda --json memory.json

What is counted is what forward and backward add at their peak to a process that holds the network, its gradients and
the batch: on a GPU by PyTorch's own counters, on a CPU as resident memory (`ru_maxrss`). Every number comes from a
process of its own, since a peak never goes down again; on a CPU it is exact to some 10 MB, so take a batch that fills
hundreds. The images are random: memory does not depend on them. The time is that of one forward and backward pass,
the fastest of `--repeats`.

`loop` is LIF as one would write it with autograd: PyTorch keeps several tensors of every step, ours keeps one. With
`recompute` (`tetdeploy train --recompute`) only what goes into each block is kept, see `train/recompute.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tetdeploy.files import write_json

if TYPE_CHECKING:
    from torch import nn

NEURONS = ("ours", "loop")


def main() -> None:
    options = parse()
    if options.measure is not None:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    console = Console(highlight=False, soft_wrap=True)
    cases = list(product(options.T, NEURONS, (False, True)))
    rows: list[dict[str, Any]] = []
    for T, neurons, recompute in track(cases, "measuring", console=Console(stderr=True), transient=True):
        rows.append(in_own_process(case_of(options, T=T, neurons=neurons, recompute=recompute)))
        if options.json is not None:  # a run that is cut leaves what it has measured
            settings = {name: value for name, value in vars(options).items() if name not in ("json", "measure")}
            write_json(options.json, {"settings": settings, "rows": rows})
    console.print(
        f"{options.model} width {options.width:g}, batch {options.batch_size} of {options.image_size}x"
        f"{options.image_size}, {rows[0]['device']}: MB at the peak of forward and backward, seconds a pass"
    )
    console.print(table(options.T, rows))
    for line in growth(options.T, rows):
        console.print(line)
    if options.json is not None:
        console.print(str(options.json))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet19", help="a network of tetdeploy")
    parser.add_argument("--width", type=float, default=0.25, help="factor on its channels")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--T", type=lambda text: [int(T) for T in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one case, in the process started for it
    return parser.parse_args()


def case_of(options: argparse.Namespace, **case: Any) -> dict[str, Any]:
    """The arguments of `measure`."""
    names = ("model", "width", "image_size", "batch_size", "device", "precision", "repeats")
    return {name: getattr(options, name) for name in names} | case


def in_own_process(case: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process. This one imports no torch: a child's `ru_maxrss` begins at its parent's size."""
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        what = ", ".join(f"{name}={case[name]}" for name in ("T", "neurons", "recompute"))
        raise SystemExit(f"{what}: the process ended with {result.returncode}\n{result.stderr.strip()[-500:]}")
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return row


def measure(
    *,
    model: str,
    width: float,
    image_size: int,
    batch_size: int,
    T: int,
    neurons: str,
    recompute: bool,
    device: str,
    precision: str,
    repeats: int,
) -> dict[str, Any]:
    """Peak memory in MB and seconds of forward and backward."""
    import time

    import torch

    from tetdeploy.networks import NetworkConfig, build_network
    from tetdeploy.train import total_loss
    from tetdeploy.train.device import autocast, device_name, pick_device, place
    from tetdeploy.train.recompute import recompute_blocks

    torch.manual_seed(0)
    on = pick_device(device)
    config = NetworkConfig(model, num_classes=10, in_channels=3, image_size=(image_size, image_size), width=width)
    network = build_network(config)
    network = (loop_twin(network) if neurons == "loop" else network).train()
    place(network, on, channels_last=on.type == "cuda" and neurons == "ours")  # as training has it there
    if recompute:
        recompute_blocks(network)
    x = torch.randn(batch_size, 3, image_size, image_size, device=on)
    y = torch.randint(10, (batch_size,), device=on)

    def step(count: int, steps: int) -> float:
        start = time.perf_counter()
        with autocast(on, precision):
            logits = network(x[:count], steps)
        total_loss(logits, y[:count]).backward()
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        return time.perf_counter() - start

    step(2, 1)  # loads kernels and makes the gradients
    before = resident_bytes(on)
    seconds = [step(batch_size, T) for _ in range(repeats)]
    peak = peak_bytes(on) - before
    numbers = {"peak_mb": round(peak / 1e6, 1), "seconds": round(min(seconds), 4)}
    return {"T": T, "neurons": neurons, "recompute": recompute, "device": device_name(on), **numbers}


def resident_bytes(device: Any) -> int:
    """What the process holds before the measurement: on a GPU allocated, on a CPU its peak until now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return peak_bytes(device)


def peak_bytes(device: Any) -> int:
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def loop_twin(network: nn.Module) -> nn.Module:
    """The network with LIF as a loop of PyTorch operations over the steps, for autograd to go back through."""
    import torch
    from torch import Tensor

    from tetdeploy.neurons import LIF

    class Spike(torch.autograd.Function):
        """Eq. 2, with the triangle of Eq. 5 (gamma = 1) for its derivative."""

        @staticmethod
        def forward(ctx: Any, above: Tensor) -> Tensor:
            ctx.save_for_backward(above)
            spikes: Tensor = (above > 0).to(above.dtype)
            return spikes

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (above,) = ctx.saved_tensors
            surrogate: Tensor = (1 - above.abs()).clamp_min(0)
            return grads[0] * surrogate

    class LoopLIF(LIF):
        def forward(self, current: Tensor) -> Tensor:
            u, spikes = torch.zeros_like(current[0]), []
            for current_t in current:
                h = self.tau * u + current_t
                s: Tensor = Spike.apply(h - self.v_th)
                u = h * (1 - s)
                spikes.append(s)
            return torch.stack(spikes)

    for path, module in list(network.named_modules()):
        if isinstance(module, LIF):
            network.set_submodule(path, LoopLIF(tau=module.tau, v_th=module.v_th, gamma=module.gamma))
    return network


def value(rows: Sequence[dict[str, Any]], T: int, neurons: str, recompute: bool, key: str) -> float:
    (row,) = [r for r in rows if (r["T"], r["neurons"], r["recompute"]) == (T, neurons, recompute)]
    number: float = row[key]
    return number


def table(steps: Sequence[int], rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("T", justify="right")
    for neurons, recompute in product(NEURONS, (False, True)):
        shown.add_column(f"{neurons}\n{'recompute' if recompute else ''}\nMB", justify="right")
        shown.add_column("\n\ns", justify="right", style="dim")
    for T in steps:
        cells = [str(T)]
        for neurons, recompute in product(NEURONS, (False, True)):
            cells.append(f"{value(rows, T, neurons, recompute, 'peak_mb'):,.0f}")
            cells.append(f"{value(rows, T, neurons, recompute, 'seconds'):.3f}")
        shown.add_row(*cells)
    return shown


def growth(steps: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What one more step costs, and the ratios at the largest T."""
    first, last = min(steps), max(steps)
    peak = {(n, r): value(rows, last, n, r, "peak_mb") for n, r in product(NEURONS, (False, True))}
    lines = [
        f"at T={last}: ours {peak['ours', False] / peak['loop', False]:.0%} of the loop's memory; "
        f"recompute {peak['ours', True] / peak['ours', False]:.0%} of ours in "
        f"{value(rows, last, 'ours', True, 'seconds') / value(rows, last, 'ours', False, 'seconds'):.2f}x the time"
    ]
    if last > first:
        costs = []
        for n, r in product(NEURONS, (False, True)):
            cost = (peak[n, r] - value(rows, first, n, r, "peak_mb")) / (last - first)
            costs.append(f"{n}{' recompute' if r else ''} {cost:,.1f}")
        lines.append(f"MB for one more step of T: {', '.join(costs)}")
    return lines


if __name__ == "__main__":
    main()
