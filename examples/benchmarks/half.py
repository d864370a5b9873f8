"""What float16 does to the spikes: which layers may round, and whether membranes may.

    \b
    tetdeploy train --out runs/digits
    python examples/benchmarks/half.py --run runs/digits --data digits --limit 359
    python examples/benchmarks/half.py --width 0.25                          ResNet-19 on CIFAR-10 images, untrained

Each row is the network with some of it in float16, against the same network in float32 on the same test images, both in
PyTorch: how many in a million neuron-steps differ, over the whole network and in the worst layer by itself (each layer
reads the float32 network's spikes), and how many images keep their class. Without --run, BN statistics come from the
images, so that spikes are about as frequent as in a trained network; only its spikes mean something, not its classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from subject import load_images, untrained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy import load
from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, STEPS, data_dir_option
from tetdeploy.export.half import HalfNetwork, Place
from tetdeploy.export.recorder import compare_torch, run_torch
from tetdeploy.tracing import Tracer

BATCH = 32
VARIANTS: dict[str, tuple[tuple[Place, ...], bool]] = {
    "inner layers": (("inner",), False),
    "inner layers, membranes": (("inner",), True),
    "inner layers, first": (("first", "inner"), False),
    "inner layers, readout": (("inner", "readout"), False),
    "all layers": (("first", "inner", "readout"), False),
    "all layers, membranes": (("first", "inner", "readout"), True),
}


class HalfMembranes(TorchDispatchMode):
    """Within it, neurons keep u and h in float16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.tetdeploy.lif.default:
            return func(*args, **(kwargs or {}))
        current, _, tau, v_th, _ = args
        u, spikes = torch.zeros_like(current[0], dtype=torch.float16), []
        for step in current.to(torch.float16):
            h: Tensor = u * tau + step
            spikes.append((h > v_th).to(current.dtype))
            u = torch.where(h > v_th, 0, h)
        return torch.stack(spikes), u.to(current.dtype)


def measure(classifier: Any, x: Any, T: int, places: tuple[Place, ...], membranes: bool) -> tuple[float, float, float]:
    """Parts in a million that differ, over all layers and in the worst one by itself; images that keep their class."""
    half = HalfNetwork(Tracer(classifier, encoding="direct", uint8=True), places=places, round_activations=True)
    whole, local, sizes, same = 0, 0, 0, 0
    for start in range(0, len(x), BATCH):
        part = x[start : start + BATCH]
        logits, expected = run_torch(classifier, part, T)
        with HalfMembranes() if membranes else nullcontext():  # type: ignore[no-untyped-call]
            got, differing = compare_torch(half, part, T, expected)  # type: ignore[arg-type]
            alone = compare_torch(half, part, T, expected, replacing=True)[1]  # type: ignore[arg-type]
        whole, local = whole + differing.sum((1, 2)), local + alone.sum((1, 2))
        sizes = sizes + np.array([spikes.size for spikes in expected])
        same += int((got.mean(1).argmax(1) == logits.mean(1).argmax(1)).sum())
    return float(np.sum(whole) / np.sum(sizes)) * 1e6, float(np.max(local / sizes)) * 1e6, same / len(x)


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--run", type=click.Path(path_type=Path), help="A run folder. [default: ResNet-19, untrained]")
@click.option("--data", default="cifar10", show_default=True, help="The run's data; their test set is used.")
@click.option("--width", default=0.25, type=ABOVE_0, show_default=True, help="Of ResNet-19.")
@click.option("--T", "T", default=4, type=STEPS, show_default=True)
@click.option("--limit", default=256, type=AT_LEAST_1, show_default=True, help="Images.")
@data_dir_option
def main(run: Path | None, data: str, width: float, T: int, limit: int, data_dir: Path) -> None:
    if run is None:
        classifier, x = untrained("resnet19", width, data_dir, T)
        name = f"ResNet-19 x {width:g}, untrained"
    else:
        classifier, x = load(run).eval(), load_images(data, data_dir).x
        name = str(run)
    x = x[:limit]
    table = Table(title=f"{name}, T={T}, {len(x)} images of {data}: against float32")
    for header in ("in float16", "ppm of neuron-steps", "ppm in the worst layer by itself", "same class"):
        table.add_column(header, justify="left" if header == "in float16" else "right")
    for what, (places, membranes) in VARIANTS.items():
        whole, local, same = measure(classifier, x, T, places, membranes)
        table.add_row(what, f"{whole:,.1f}", f"{local:,.1f}", f"{same:.2%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
