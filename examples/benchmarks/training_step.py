"""A training step of ResNet-19: ours against the plain loop, SpikingJelly 2.0 and the ANN twin, and the floor.

    \b
    pip install spikingjelly
    python examples/benchmarks/training_step.py --json step.json                         one card, bf16, T=4, batch 256
    python examples/benchmarks/training_step.py --device cpu --batch 16 --steps 2        on a CPU, fp32

Every side trains the same layers (the ANN twin with ReLU for neurons, on T times the images) on fixed random images,
with TET's loss and SGD, each in a process of its own on the same device: SpikingJelly chooses its kernels at import
(`SJ_LIF_CUDA_IMPLEMENTATION`), and a side that fails says why and takes nothing with it. The sides take turns; times
are medians, on a card of CUDA events round a step. `gradient` is the norm of the first step's gradients, from the same
weights: in fp32 a side with another one than ours is left out of the ratios (not the ANN, which is another network). In
16 bits the loop rounds membranes, so that spikes flip; our kernels and SpikingJelly's in Triton keep membranes in
float32, and theirs fire at the threshold, too. There a ratio only says by how much the norm differs, and `--precision
fp32` shows that the networks are the same. Memory is what PyTorch had allocated at most once cuDNN had tried its
algorithms; of graphs, whose memory stays theirs between replays, what it had reserved, which is more; on a CPU what the
process had at most. Ratios take the fastest of a kind, for memory the loop that needs least.

    \b
    loop             LIF as a loop of PyTorch operations over T, contiguous (peers.py)
    loop NHWC        the same, channels-last
    NCHW             our neurons with BN fused into them, contiguous
    unfused          our neurons, BN by PyTorch, channels-last (on a CPU contiguous, which is faster there)
    tetdeploy        what `tetdeploy train` does: channels-last weights; on a CPU, memory that is freed is kept
    tetdeploy malloc the same, on a CPU, with memory as the C library treats it, which all other sides have
    tetdeploy graphs the same, forward and backward as a CUDA graph (`--cuda-graphs`)
    SJ ...           LIFNode(tau=2.0, decay_input=False, v_reset=0., detach_reset=False, PiecewiseQuadratic(alpha=1.))
    ANN              the layout of `tetdeploy train --ann`, BN and ReLU by PyTorch, not fused
    ANN graphs       the same, as a CUDA graph

The floor is what floor.py measures: the convolutions by themselves, plus what the rest must read and write.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, STEPS, json_option
from tetdeploy.networks import NetworkConfig, ann_twin, build_network
from tetdeploy.neurons import LIF
from tetdeploy.storage.files import write_json
from tetdeploy.system.memory import reused_memory
from tetdeploy.train import TrainConfig, total_loss
from tetdeploy.train.cuda_graphs import StepGraphs, check_graphs
from tetdeploy.train.device import autocast, device_name, pick_device, pick_precision, place
from tetdeploy.train.optimizer import build_optimizer
from tetdeploy.train.ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))
from floor import floor, timed
from memory import peak_bytes
from peers import loop_twin, reset, with_spikingjelly
from turns import LIMIT_S, Answer, Worker

MALLOC = "tetdeploy malloc"
SIDES = ("loop", "loop NHWC", "NCHW", "unfused", "tetdeploy", MALLOC, "tetdeploy graphs")
SIDES += tuple(f"SJ {backend} {layout}" for backend in ("torch", "triton", "cuda") for layout in ("NCHW", "NHWC"))
SIDES += ("ANN", "ANN graphs")
FLOOR = "floor"
KINDS = {
    "convolutions": ("conv",),
    "neurons, and what is fused into them": ("lif", "spike", "_ongpu"),
    "BN": ("batch_norm", "batchnorm"),
    "copies, casts": ("copy_", "_to_copy", "contiguous", "clone"),
    "optimiser": ("optimizer", "_fused_sgd"),
}
REST = "rest"
SAME_GRADIENT = 0.05  # of its norm: rounding flips spikes
PROFILED = 3  # steps: reading what the profiler saw takes longer than they do


@dataclass(frozen=True)
class Case:
    """What is measured, the same for every side."""

    model: str
    width: float
    size: int
    T: int
    batch: int
    device: str
    precision: str
    steps: int

    def config(self) -> NetworkConfig:
        return NetworkConfig(self.model, 10, 3, (self.size, self.size), width=self.width)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return build_network(self.config())


class Step:
    """One training step of a side on fixed random images."""

    def __init__(self, side: str, case: Case) -> None:
        self.device = pick_device(case.device)
        if side == MALLOC and self.device.type != "cpu":
            raise ValueError(f"{side} is for a CPU")
        self.precision = pick_precision(case.precision, self.device)
        self.T, batch = (1, case.batch * case.T) if side.startswith("ANN") else (case.T, case.batch)
        network = variant(side, case.network(), self.device)
        contiguous = side == "loop" or side.endswith("NCHW")
        if self.device.type != "cuda":
            contiguous = contiguous or side.startswith(("unfused", "ANN"))
        place(network, self.device, channels_last=not contiguous)
        self.network, self.reset = network.train(), resetting(side)
        config = TrainConfig(optimizer="sgd", lr=0.01, weight_decay=5e-4)
        self.optimizer = build_optimizer(network, config, scaled=False)
        self.graphs = None
        if side.endswith("graphs"):
            check_graphs(config, self.device, self.precision, Ranks())
            self.graphs = StepGraphs(network)
        torch.manual_seed(1)
        self.x = torch.randn(batch, 3, case.size, case.size).to(self.device)
        self.y = torch.randint(10, (batch,)).to(self.device)
        self.first_gradient: float | None = None

    def __call__(self) -> None:
        if self.graphs is None:
            self.optimizer.zero_grad(set_to_none=True)
            self.compute(self.x, self.y)
        else:
            self.graphs("step", self.compute, self.x, self.y)
        if self.first_gradient is None:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.first_gradient = float(nn.utils.get_total_norm(gradients))
        self.optimizer.step()

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        self.reset(self.network)
        with autocast(self.device, self.precision):
            logits = self.network(x, self.T)
        loss = total_loss(logits, y)
        loss.backward()
        return loss.detach()


def variant(side: str, network: nn.Module, device: torch.device) -> nn.Module:
    """A side's network.

    Raises:
        ValueError: the side needs a GPU.
    """
    if side.startswith("loop"):
        return loop_twin(network)
    if side.startswith("ANN"):
        return ann_twin(network)
    if side == "unfused":
        for module in network.modules():
            if isinstance(module, LIF):
                module.register_forward_hook(lambda *_: None)  # neurons with hooks run by themselves
    if not side.startswith("SJ"):
        return network
    if device.type != "cuda" and "torch" not in side:
        raise ValueError(f"{side} needs a GPU")
    return with_spikingjelly(network)


def resetting(side: str) -> Callable[[nn.Module], None]:
    return reset if side.startswith("SJ") else lambda network: None


# --- a side's process


def open_side(side: str, case: Case, threads: int | None) -> Answer:
    """What answers "turn", "profile" and "floor"."""
    if side.startswith("SJ"):
        os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = side.split()[1]
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # as in training
    step = Step(side, case)
    as_in_training = reused_memory if side == "tetdeploy" and step.device.type == "cpu" else nullcontext

    def answer(request: str) -> dict[str, Any]:
        with as_in_training():
            return {"turn": turn, "profile": profile, FLOOR: floor}[request](step, case)

    return answer


def turn(step: Step, case: Case) -> dict[str, Any]:
    """Milliseconds of each step, after two that do not count, MB at the peak; the norm of the very first gradients."""
    step()
    step()
    if step.device.type == "cuda":
        torch.cuda.synchronize(step.device)
        torch.cuda.empty_cache()  # of what cuDNN tried
        torch.cuda.reset_peak_memory_stats(step.device)
    taken = timed(step, case.steps, step.device)
    peak = peak_bytes(step.device) if step.graphs is None else torch.cuda.max_memory_reserved(step.device)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()  # for the other processes
    return {"ms": taken, "peak_mb": peak / 1e6, "first_gradient": step.first_gradient}


def profile(step: Step, case: Case) -> dict[str, float]:
    """Milliseconds of a step by kind of operator: of kernels on a GPU, of operators' own time on a CPU."""
    on_gpu = step.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    steps = min(case.steps, PROFILED)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(step.device)
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
            found[kind_of(event)] += own / 1e3 / steps
        elif not event.is_user_annotation:
            found["kernels"] += event.device_time_total / 1e3 / steps
    kernels = found.pop("kernels", 0.0)
    if on_gpu:  # such as those of a graph, which no operator launches
        found[REST] += max(kernels - found.total(), 0.0)
    return {kind: found[kind] for kind in (*KINDS, REST)}


def kind_of(event: Any) -> str:
    """The kind of the innermost operator round an event that has one."""
    while event is not None:
        name = event.name.lower()
        for kind, words in KINDS.items():
            if any(word in name for word in words):
                return kind
        event = event.cpu_parent
    return REST


# --- the processes' turns, and the result


def measure(
    sides: list[str],
    case: Case,
    turns: int,
    threads: int | None,
    keep: Callable[[dict[str, Any]], None],
    limit_s: float = LIMIT_S,
) -> None:
    """The "floor", and "sides", each with "median_ms", "peak_mb", "first_gradient", "turns" and "profile_ms" (or
    "not_profiled"), or with "failed".

    `keep` gets what is known so far after each answer, which a call that is cut leaves. "turns" counts those that it is
    of; with 0 it is of the turn that warms up, until there is another.
    """
    workers = {side: Worker(open_side, side, case, threads, limit_s=limit_s) for side in sides}
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    found: dict[str, Any] = {}
    for number in range(turns + 1):
        for side, worker in workers.items():
            answer = worker.ask("turn")
            if number <= 1:  # the first turn warms up
                taken[side].clear()
            if answer is not None:
                taken[side].append(answer)
            found[side] = {"failed": worker.failed} if worker.failed else medians(taken[side]) | {"turns": number}
            keep({"sides": found})
    floor_worker = Worker(open_side, "tetdeploy", case, threads, limit_s=limit_s)
    of_floor = {"floor": floor_worker.ask(FLOOR) or {"failed": floor_worker.failed}}
    floor_worker.end()
    for side, worker in workers.items():
        profiled = worker.ask("profile")
        if "failed" not in found[side]:  # a profiler that may not run there takes no times with it
            found[side] |= {"not_profiled": worker.failed} if worker.failed else {"profile_ms": profiled}
        worker.end()
        keep({"sides": found} | of_floor)


def medians(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Of a side's turns."""
    steps = [ms for answer in answers for ms in answer["ms"]]
    return {
        "median_ms": statistics.median(steps),
        "peak_mb": max(answer["peak_mb"] for answer in answers),
        "first_gradient": answers[0]["first_gradient"],
    }


def other_gradients(found: dict[str, Any]) -> dict[str, float]:
    """The sides whose first gradients have another norm than ours, and by what share of it: infinite where the norm is.

    The ANN, which is another network, need only have a finite one.
    """
    norms = {name: side["first_gradient"] for name, side in found.items() if "first_gradient" in side}
    ours = norms.get("tetdeploy", math.nan)
    shares = {
        name: 0.0 if name.startswith("ANN") or norm == ours else abs(norm - ours) / (ours or 1.0)
        for name, norm in norms.items()
    }
    shares |= {name: math.inf for name, norm in norms.items() if not math.isfinite(norm)}
    return {name: share for name, share in shares.items() if share > SAME_GRADIENT}


def left_out(found: dict[str, Any], precision: str) -> dict[str, str]:
    """The sides that ratios leave out, as they do not compute what we compute, and why."""
    others = other_gradients(found)
    reasons = {name: "its gradients are not finite" for name, share in others.items() if share == math.inf}
    if precision == "fp32":
        reasons = {name: _differs(share) for name, share in others.items()} | reasons
    return reasons


def _differs(share: float) -> str:
    return f"its gradient's norm differs from ours by {100 * share:.0f} %"


def ratios(found: dict[str, Any], precision: str) -> list[tuple[str, float, str, bool, str]]:
    """What is to be reached: its name, the number, the wish, whether it holds, whose gradients are others.

    Without a side there is no number.
    """
    others, out = other_gradients(found), left_out(found, precision)
    counted = {name: side for name, side in found.items() if name not in out and "failed" not in side}

    def least(begins: str, key: str = "median_ms") -> str | None:
        sides = (name for name in counted if name.startswith(begins) and name != MALLOC)
        return min(sides, key=lambda name: float(counted[name][key]), default=None)

    loop, small_loop, theirs, ann = least("loop"), least("loop", "peak_mb"), least("SJ"), least("ANN")
    rows: list[tuple[str, float, str, bool, str]] = []
    for ours, how in ((least("tetdeploy"), ""), (MALLOC, ", with malloc as it is")):
        for title, one, other, key, wanted, at_least in (
            ("plain loop / ours", loop, ours, "median_ms", 1.5, True),
            ("SpikingJelly's best / ours", theirs, ours, "median_ms", 1.3, True),
            ("ours / ANN twin, whose BN and ReLU are not fused", ours, ann, "median_ms", 1.15, False),
            ("memory, ours / plain loop", ours, small_loop, "peak_mb", 0.6, False),
        ):
            if one in counted and other in counted:
                value = counted[one][key] / counted[other][key]
                sign = "at least" if at_least else "at most"
                holds = value >= wanted if at_least else value <= wanted
                remarks = [f"{side}: {_differs(others[side])}" for side in (one, other) if side in others]
                rows.append((title + how, value, f"{sign} {wanted}", holds, ", ".join(remarks)))
    return rows


def show(results: dict[str, Any]) -> None:
    console = Console(width=150, highlight=False)
    case, on_card = results["case"], results["card"] != "cpu"
    console.print(
        f"{case['model']} x {case['width']:g}, {case['size']}x{case['size']}, T={case['T']}, batch {case['batch']}, "
        f"{results['precision']} on {results['card']}, PyTorch {torch.__version__}"
    )
    table = Table()
    for header in ("", "ms a step", "images/s", "gradient", "peak MB", *KINDS, REST):
        table.add_column(header, justify="right" if header else "left")
    for side, found in results["sides"].items():
        if "failed" in found:
            continue
        shares = found.get("profile_ms")
        speed = 1e3 * case["batch"] / found["median_ms"]
        cells = (
            f"{found['median_ms']:.2f}",
            f"{speed:,.0f}",
            f"{found['first_gradient']:.3g}",
            f"{found['peak_mb']:,.0f}",
        )
        table.add_row(side, *cells, *(f"{shares[kind]:.2f}" if shares else "" for kind in (*KINDS, REST)))
    console.print(table)
    for side, found in results["sides"].items():
        if "failed" in found:
            console.print(f"{side} left out: {found['failed']}", markup=False)
        elif "not_profiled" in found:
            console.print(f"{side} not profiled: {found['not_profiled']}", markup=False)
    for side, reason in left_out(results["sides"], results["precision"]).items():
        console.print(f"{side} is left out below: {reason}")
    floor = results["floor"]
    if "failed" in floor:
        console.print(f"no floor: {floor['failed']}", markup=False)
    else:
        convolutions = (
            f"{floor['convolutions_ms']:.2f} ms ({floor['tflop']:.3g} TFLOP at {floor['tflop_per_s']:.3g} TFLOP/s)"
        )
        if on_card:
            convolutions += (
                f", {floor['gb']:.3g} GB at 3 TB/s {floor['memory_ms']:.2f} ms: floor {floor['floor_ms']:.2f} ms"
            )
        console.print(f"convolutions {convolutions}")
    for name, value, wish, holds, remark in ratios(results["sides"], results["precision"]):
        wanted = f", wanted {wish}: {'reached' if holds else 'NOT reached'}" if on_card else ""
        console.print(f"{name}: {value:.2f}{wanted}{f' ({remark})' if remark else ''}")


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--model", default="resnet19", show_default=True)
@click.option("--width", default=1.0, type=ABOVE_0, show_default=True)
@click.option("--size", default=32, type=AT_LEAST_1, show_default=True, help="Side of the images.")
@click.option("--T", "T", default=4, type=STEPS, show_default=True)
@click.option("--batch", default=256, type=AT_LEAST_1, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option(
    "--precision",
    default="auto",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    show_default=True,
    help="As of `tetdeploy train`: bf16, on a CPU fp32.",
)
@click.option("--turns", default=5, type=AT_LEAST_1, show_default=True, help="Of each side.")
@click.option("--steps", default=10, type=AT_LEAST_1, show_default=True, help="In a turn.")
@click.option("--side", "sides", multiple=True, type=click.Choice(SIDES), help="These alone. [default: all]")
@click.option("--threads", type=AT_LEAST_1, help="On a CPU.")
@click.option(
    "--limit",
    "limit_s",
    default=LIMIT_S,
    type=ABOVE_0,
    show_default=True,
    help="Seconds that an answer of a side may take; a side that hangs is left out.",
)
@json_option
def main(
    model: str,
    width: float,
    size: int,
    T: int,
    batch: int,
    device: str,
    precision: str,
    turns: int,
    steps: int,
    sides: tuple[str, ...],
    threads: int | None,
    limit_s: float,
    json_path: Path | None,
) -> None:
    found = pick_device(device)
    chosen = pick_precision(precision, found)
    case = Case(model, width, size, T, batch, device, chosen, steps)
    case.config()  # refuses a model that no side could build
    results = {"case": vars(case), "card": device_name(found), "precision": chosen, "torch": torch.__version__}

    def keep(measured: dict[str, Any]) -> None:
        results.update(measured)
        results["reached"] = ratios(results["sides"], chosen) if found.type == "cuda" else []
        if json_path is not None:
            write_json(json_path, results)

    measure(list(sides or SIDES), case, turns, threads, keep, limit_s)
    show(results)


if __name__ == "__main__":
    main()
