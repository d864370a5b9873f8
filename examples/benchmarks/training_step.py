"""A whole training step of a small VGG on 28x28 images at T = 4: ours against SpikingJelly, and where the time goes.

    pip install spikingjelly
    python examples/benchmarks/training_step.py [--threads 2] [--json step.json]

The same architecture, weights' shapes, loss, optimiser and surrogate on both sides (SpikingJelly's torch backend,
multi-step mode, `LIFNode(tau=2.0, decay_input=False, v_reset=0., detach_reset=False, PiecewiseQuadratic(alpha=1.))`).
The sides take turns in one process; the table shows medians and their ratio.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import torch
from peers import reset, spikingjelly, spikingjelly_neuron
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import json_option
from tetdeploy.files import write_json
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.neurons import LIF
from tetdeploy.train.losses import total_loss

T, BATCH = 4, 64
CHANNELS = (1, 32, "pool", 64, 64, "pool", 128)


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        pool: list[nn.Module] = []
        before = 1
        for entry in CHANNELS[1:]:
            if isinstance(entry, str):
                pool = [nn.AvgPool2d(2)]
                continue
            block = [*pool, nn.Conv2d(before, entry, 3, padding=1, bias=False), tdBN(entry)]
            layers += [DirectEncoding(*block) if before == 1 else OverTime(*block), LIF()]
            before, pool = entry, []
        self.encode, self.body = layers[0], nn.Sequential(*layers[1:])
        self.readout = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.readout(self.body(self.encode(x, T)))
        return logits


def spikingjelly_network() -> nn.Module:
    theirs = spikingjelly()
    layer = theirs.layer
    layers: list[nn.Module] = []
    before = 1
    for entry in CHANNELS[1:]:
        if isinstance(entry, str):
            layers.append(layer.AvgPool2d(2))
            continue
        layers += [layer.Conv2d(before, entry, 3, padding=1, bias=False), layer.BatchNorm2d(entry)]
        layers.append(spikingjelly_neuron(LIF()))
        before = entry
    layers += [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(before, 10)]
    network = nn.Sequential(*layers)
    theirs.functional.set_step_mode(network, "m")

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            reset(self.network)
            logits: Tensor = self.network(x.unsqueeze(0).repeat(T, 1, 1, 1, 1))
            return logits

    return Theirs()


class Step:
    """One training step of a network on fixed random images."""

    def __init__(self, network: nn.Module) -> None:
        torch.manual_seed(0)
        self.network = network.train()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        self.images, self.labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def __call__(self) -> float:
        start = time.perf_counter()
        loss = total_loss(self.network(self.images), self.labels, lam=0.05, phi=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def where_it_goes(step: Step) -> dict[str, float]:
    """Shares of the operators' own time in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    groups = {"convolution": 0.0, "normalisation": 0.0, "neurons": 0.0, "rest": 0.0}
    for event in profile.key_averages():
        name = event.key
        group = next(
            (g for g, words in _GROUPS.items() if any(word in name for word in words)),
            "rest",
        )
        groups[group] += event.self_cpu_time_total
    total = sum(groups.values())
    return {group: share / total for group, share in groups.items()}


_GROUPS = {"convolution": ("convolution", "conv2d", "mkldnn"), "normalisation": ("batch_norm",), "neurons": ("lif",)}


@click.command(cls=CleanErrors)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--repeats", default=20, show_default=True)
@json_option
def main(threads: int, repeats: int, json_path: Path | None) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sides = {"tetdeploy": Step(Ours()), "SpikingJelly": Step(spikingjelly_network())}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(-3, repeats):  # three rounds to warm up
        for side, step in sides.items():
            seconds = step()
            if repeat >= 0:
                times[side].append(seconds)
    medians = {side: statistics.median(values) for side, values in times.items()}
    ratio = medians["SpikingJelly"] / medians["tetdeploy"]
    shares = where_it_goes(sides["tetdeploy"])
    table = Table(
        title=f"training step, small VGG, 28x28, T={T}, batch {BATCH}, {threads} threads, median of {repeats}"
    )
    for column in (*medians, "speed-up", *(f"{group} (ours)" for group in shares)):
        table.add_column(column, justify="right")
    table.add_row(
        *(f"{m * 1e3:.1f} ms" for m in medians.values()), f"{ratio:.2f}x", *(f"{s:.0%}" for s in shares.values())
    )
    Console(width=150).print(table)
    if json_path is not None:
        write_json(json_path, {"threads": threads, "seconds": medians, "speed_up": ratio, "shares": shares})


if __name__ == "__main__":
    main()
