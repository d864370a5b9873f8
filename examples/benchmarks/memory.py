"""Training memory against T: our neurons and a plain autograd loop, with and without recomputation.

    \b
    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --model resnet19 --width 1 --batch-size 128 --device cuda --json memory.json

What is counted is what forward and backward add at their peak to a process that holds the network, its gradients and
the batch: on a GPU by PyTorch's own counters, on a CPU as resident memory (`ru_maxrss`). Every number comes from a
process of its own, since a peak never goes down again. On a CPU it goes by what is in use, not by the holes that glibc
leaves in its heap: tensors come from the system one by one and go back to it (`MALLOC_MMAP_THRESHOLD_`), which takes
time that training with `tetdeploy train` does not spend. The images are random: memory does not depend on them. The
time is that of one forward and backward pass, the fastest of `--repeats`.

`loop` is LIF as one would write it with autograd: PyTorch keeps several tensors of every step, ours keeps one. With
`recompute` (`tetdeploy train --recompute`) only what goes into each block is kept, see `train/recompute.py`. A case
that lacks memory, or whose process the system kills for lack of it, has no numbers, and the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, Numbers, json_option, torch_device_option
from tetdeploy.storage.files import write_json

sys.path.insert(0, str(Path(__file__).parent))

NEURONS = ("ours", "loop")
LACKS_MEMORY = "the memory does not suffice"  # as `CleanErrors` says it, whose text the other process gives


def in_own_process(case: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process; where memory lacks, its row with None for the numbers, and the reason.

    This process imports no torch: a child's `ru_maxrss` begins at its parent's size.

    Raises:
        click.ClickException: it fails for another reason.
    """
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    # fixed, or glibc raises it up to 32 MB, and the same case differs by 30 % from one run to the next
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        of = {name: case[name] for name in ("T", "neurons", "recompute")}
        said = result.stderr.strip().splitlines() if result.returncode > 0 else []  # what is killed says nothing of it
        reason = said[-1].removeprefix("Error: ") if said else f"its process ended with {result.returncode}"
        killed = result.returncode == -signal.SIGKILL  # as a system without memory ends it
        if killed or reason.startswith(LACKS_MEMORY):
            return {**of, "peak_mb": None, "seconds": None, "lacks_memory": reason}
        raise click.ClickException(f"{', '.join(f'{name}={value}' for name, value in of.items())}: {reason}")
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
    from peers import loop_twin

    from tetdeploy.networks import NetworkConfig, build_network
    from tetdeploy.train import total_loss
    from tetdeploy.train.device import autocast, device_name, pick_device, place
    from tetdeploy.train.recompute import recompute_blocks

    torch.manual_seed(0)
    on = pick_device(device)
    config = NetworkConfig(model, num_classes=10, in_channels=3, image_size=(image_size, image_size), width=width)
    network = build_network(config)
    network = (loop_twin(network) if neurons == "loop" else network).train()
    place(network, on, channels_last=on.type == "cuda")  # as training has it there, or cuDNN would copy
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


def value(rows: Sequence[dict[str, Any]], T: int, neurons: str, recompute: bool, key: str) -> Any:
    """A number of a case; None where memory lacked."""
    (row,) = [r for r in rows if (r["T"], r["neurons"], r["recompute"]) == (T, neurons, recompute)]
    return row[key]


def table(steps: Sequence[int], rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("T", justify="right")
    for neurons, recompute in product(NEURONS, (False, True)):
        shown.add_column(f"{neurons}\n{'recompute' if recompute else ''}\nMB", justify="right")
        shown.add_column("\n\ns", justify="right", style="dim")
    for T in steps:
        cells = [str(T)]
        for neurons, recompute in product(NEURONS, (False, True)):
            peak, seconds = (value(rows, T, neurons, recompute, key) for key in ("peak_mb", "seconds"))
            cells += ["no memory", ""] if peak is None else [f"{peak:,.0f}", f"{seconds:.3f}"]
        shown.add_row(*cells)
    return shown


def growth(steps: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What one more step costs, and the ratios at the largest T that was measured in all four ways."""
    lacking = {row["T"] for row in rows if row["peak_mb"] is None}
    whole = [T for T in steps if T not in lacking]
    if not whole:
        return ["at every T a case lacks memory: nothing to compare; take a smaller --batch-size"]
    first, last = min(whole), max(whole)
    peak = {(n, r): value(rows, last, n, r, "peak_mb") for n, r in product(NEURONS, (False, True))}
    if not all(peak.values()):
        return ["too little memory to compare; take a larger --batch-size"]
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


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--model", default="resnet19", show_default=True, help="A network of tetdeploy.")
@click.option("--width", default=0.25, type=ABOVE_0, show_default=True, help="Factor on its channels.")
@click.option("--image-size", default=32, type=AT_LEAST_1, show_default=True)
@click.option("--batch-size", default=32, type=AT_LEAST_1, show_default=True)
@click.option("--T", "T", default="1,2,4,8", type=Numbers(), show_default=True)
@torch_device_option
@click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16", "fp16"]), show_default=True)
@click.option("--repeats", default=2, type=AT_LEAST_1, show_default=True)
@click.option("--measure", "case", hidden=True)  # one case, in the process started for it
@json_option
def main(T: tuple[int, ...], case: str | None, json_path: Path | None, **options: Any) -> None:
    if case is not None:
        print(json.dumps(measure(**json.loads(case))))
        return
    console, errors = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    cases = list(product(T, NEURONS, (False, True)))
    rows: list[dict[str, Any]] = []
    for steps, neurons, recompute in track(
        cases, "measuring", console=errors, transient=True, disable=not errors.is_terminal
    ):
        rows.append(in_own_process(options | {"T": steps, "neurons": neurons, "recompute": recompute}))
        if json_path is not None:  # a run that is cut leaves what it has measured
            write_json(json_path, {"settings": options | {"T": T}, "rows": rows})
    device = next((row["device"] for row in rows if "device" in row), options["device"])
    console.print(
        f"{options['model']} width {options['width']:g}, batch {options['batch_size']} of {options['image_size']}x"
        f"{options['image_size']}, {device}: MB at the peak of forward and backward, seconds a pass"
    )
    console.print(table(T, rows))
    for line in growth(T, rows):
        console.print(line)
    if json_path is not None:
        console.print(str(json_path))


if __name__ == "__main__":
    main()
