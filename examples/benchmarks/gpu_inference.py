"""One call of a network on a GPU: ONNX Runtime's CUDA provider and TensorRT against PyTorch and SpikingJelly.

    \b
    pip uninstall -y onnxruntime                                                      it and onnxruntime-gpu clash
    pip install 'tetdeploy[gpu]' spikingjelly                                         and TensorRT, see docs/tensorrt.md
    python examples/benchmarks/gpu_inference.py --json inference.json                 ResNet-19, T=4, one card
    python examples/benchmarks/gpu_inference.py --graphs graphs --export-only         before, where there is no card
    python examples/benchmarks/gpu_inference.py --device cpu --width 0.125 --batch 1,4       a smoke run

A call takes uint8 images from the host and gives logits to the host; in between everything stays on the card, a step
graph's membranes too. Every side has a process of its own; they take turns, and what is not to be had here is listed
with the reason. `agrees` is the share of images with the class of PyTorch in float32. The weights are not trained (BN
has the statistics of the images): time does not depend on them, but where logits lie close, agreement does. fp32 is
float32 on every side: PyTorch's convolutions, which take TF32 unless told otherwise, may not, as ours never may.

    \b
    eager, compiled     PyTorch's; compiled with CUDA graphs (mode="reduce-overhead")
    SJ ...              the same layers with SpikingJelly's neurons, each of its implementations
    CUDA ...            `Engine(device="cuda")` for each layout; on --device cpu ONNX Runtime's CPU provider
    CUDA graphs ...     the same with `cuda_graphs=True`, for the layouts that can
    TensorRT in ORT ... `Engine(device="tensorrt")`, ONNX Runtime's TensorRT provider
    TensorRT ...        `tetdeploy build`'s engine
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, STEPS, Numbers, data_dir_option, json_option
from tetdeploy.engine import Engine, open_engine
from tetdeploy.export import LAYOUTS, ExportConfig, export_model
from tetdeploy.storage.files import write_json
from tetdeploy.train.device import device_name, pick_device

sys.path.insert(0, str(Path(__file__).parent))
from subject import untrained
from training_step import resetting, variant
from turns import Answer, Worker

Call = Callable[[Any], Any]  # uint8 images [N, C, H, W] to logits [N, K]
BASE = "eager fp32"
HALF = ("fp32", "fp16")
GRAPHS = tuple(" ".join(parts) for parts in product(LAYOUTS, (*HALF, "int8")))
SIDES = (
    *(
        f"{name} {precision}"
        for name in ("eager", "compiled", "SJ torch", "SJ triton", "SJ cuda")
        for precision in HALF
    ),
    *(f"CUDA {graph}" for graph in GRAPHS),
    *(f"CUDA graphs {graph}" for graph in GRAPHS if not graph.startswith("dynamic")),
    *(f"{runtime} {graph}" for runtime in ("TensorRT in ORT", "TensorRT") for graph in GRAPHS),
)


def open_side(side: str, folder: Path, T: int, device: str, largest: int, calls: int) -> Answer:
    """What answers a number of images with {"ms": of each call, "classes"}."""
    images = np.load(folder / "images.npy")
    runtime, *what = side.rsplit(" ", 2 if side.startswith(("CUDA", "TensorRT")) else 1)
    if side.startswith(("CUDA", "TensorRT")):
        call = engine(runtime, *what, folder, T, device, largest)
    else:
        call = in_pytorch(runtime, what[0], folder, T, device)

    def answer(size: int) -> dict[str, Any]:
        x = np.ascontiguousarray(images[:size])
        for _ in range(3):
            logits = call(x)
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            call(x)
            taken.append(1e3 * (time.perf_counter() - start))
        return {"ms": taken, "classes": np.asarray(logits).argmax(-1)}

    return answer


def in_pytorch(runtime: str, precision: str, folder: Path, T: int, device: str) -> Call:
    on = pick_device(device)
    if on.type == "cpu" and (precision == "fp16" or runtime in ("SJ triton", "SJ cuda")):
        raise ValueError(f"{runtime} {precision} is for a GPU")
    if runtime.startswith("SJ"):
        os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = runtime.split()[1]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # of matrix products it is the default
    classifier = torch.load(folder / "classifier.pt", weights_only=False).to(on)
    if precision == "fp16":
        classifier.half()
    if on.type == "cuda":
        classifier.to(memory_format=torch.channels_last)
    network: Any = classifier
    if runtime == "compiled":
        network = torch.compile(classifier, mode="reduce-overhead" if on.type == "cuda" else None, dynamic=False)
    elif runtime.startswith("SJ"):
        network = variant(runtime, classifier, on)
    reset = resetting(runtime)

    @torch.inference_mode()
    def call(x: Any) -> Any:
        reset(network)
        images = torch.from_numpy(x).to(on)
        return network(images, T).float().mean(0).cpu().numpy()

    return call


def engine(runtime: str, layout: str, precision: str, folder: Path, T: int, device: str, largest: int) -> Call:
    """Opens the graph that the runtime needs."""
    if device == "cpu" and runtime != "CUDA":
        raise ValueError(f"{runtime} is for a GPU")
    model = exported(runtime, layout, precision, folder, T, device)
    if runtime == "TensorRT":
        from tetdeploy.export.tensorrt import BuildConfig, build_engine

        steps = (T, T, T) if layout == "dynamic" else None
        model = build_engine(model, config=BuildConfig(batch=(1, largest, largest), T=steps)).path
    opened: Engine
    if runtime == "CUDA graphs":
        opened = Engine(model, device="cuda", cuda_graphs=True)
    else:
        opened = open_engine(model, device="cpu" if device == "cpu" else "cuda" if runtime == "CUDA" else "tensorrt")
    return lambda x: opened.run(x, T).logits


def exported(runtime: str, layout: str, precision: str, folder: Path, T: int, device: str) -> Path:
    """A side's graph, exported unless it lies in the folder already."""
    target = "cpu" if device == "cpu" else "cuda" if runtime.startswith("CUDA") else "tensorrt"
    config = ExportConfig(layout=layout, precision=precision, target=target, T=T, trained_T=T)  # type: ignore[arg-type]
    model = folder / config.file_name
    if not model.exists():
        images = np.load(folder / "images.npy")
        classifier = torch.load(folder / "classifier.pt", weights_only=False)
        export_model(classifier, model, config, images[:4], num_check=0, calibration=(images[:64], None))
    return model


def export_all(sides: list[str], folder: Path, T: int, device: str) -> None:
    for side in sides:
        if side.startswith(("CUDA", "TensorRT")):
            start, parts = time.perf_counter(), side.rsplit(" ", 2)
            try:
                said = exported(parts[0], parts[1], parts[2], folder, T, device).name
            except ValueError as error:
                said = str(error)
            print(f"{side}: {said}   {time.perf_counter() - start:.0f} s", flush=True)


def measure(
    sides: list[str], sizes: tuple[int, ...], turns: int, keep: Callable[[dict[str, Any]], None], *arguments: Any
) -> None:
    """By side {"median_ms": {batch: ms}, "agrees"}; of one that fails "failed", why, beside the medians of smaller
    batches. Sides are opened one after the other.

    `keep` gets what is known so far after each round: a call that is cut leaves that.
    """
    workers = {side: Worker(open_side, side, *arguments) for side in sides}
    taken: dict[str, dict[int, list[float]]] = {side: {} for side in sides}
    classes: dict[str, dict[int, Any]] = {side: {} for side in sides}
    for size in sizes:
        for number in range(turns + 1):
            for side, worker in workers.items():
                answer = worker.ask(size)
                if answer is None:  # nor are the turns before of this size a median
                    taken[side].pop(size, None)
                    continue
                classes[side][size] = answer["classes"]
                if number > 0:  # the first turn warms up
                    taken[side].setdefault(size, []).extend(answer["ms"])
            keep({side: found(worker, taken[side], classes, side) for side, worker in workers.items()})
    for worker in workers.values():
        worker.end()


def found(
    worker: Worker, taken: dict[int, list[float]], classes: dict[str, dict[int, Any]], side: str
) -> dict[str, Any]:
    """A side's result; of one that failed at a batch size, what was measured at smaller ones."""
    known: dict[str, Any] = {"failed": worker.failed} if worker.failed else {}
    if taken:
        known["median_ms"] = {size: statistics.median(ms) for size, ms in taken.items()}
        if (size := max(taken)) in classes.get(BASE, {}):
            known["agrees"] = float((classes[side][size] == classes[BASE][size]).mean())
    return known


def show(results: dict[str, Any], sizes: tuple[int, ...]) -> None:
    console = Console(width=120, highlight=False)
    console.print(
        f"{results['model']} x {results['width']:g}, T={results['T']}, on {results['card']}; median ms of a call "
        f"(images/s at batch {sizes[-1]}); fp32 without TF32 on every side"
    )
    table = Table()
    for header in ("", *(f"batch {size}" for size in sizes), "images/s", "agrees"):
        table.add_column(header, justify="right" if header else "left")
    for side, found in results["sides"].items():
        if not (median := found.get("median_ms")):
            continue
        agrees = f"{found['agrees']:.1%}" if "agrees" in found else ""
        speed = f"{1e3 * sizes[-1] / median[sizes[-1]]:,.0f}" if sizes[-1] in median else ""
        table.add_row(side, *(f"{median[size]:.2f}" if size in median else "" for size in sizes), speed, agrees)
    console.print(table)
    for side, found in results["sides"].items():
        if "failed" in found:
            where = f" at batch {min(set(sizes) - set(median))}" if (median := found.get("median_ms")) else ""
            console.print(f"{side} left out{where}: {found['failed']}", markup=False)
    if results["card"] == "cpu":
        console.print("a smoke run: on a CPU these numbers say nothing about a card")


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--model", default="resnet19", show_default=True)
@click.option("--width", default=1.0, type=ABOVE_0, show_default=True)
@click.option("--T", "T", default=4, type=STEPS, show_default=True)
@click.option("--batch", default="1,256", type=Numbers(), show_default=True, help="Latency, throughput.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--turns", default=3, type=AT_LEAST_1, show_default=True, help="Of each side.")
@click.option("--calls", default=20, type=AT_LEAST_1, show_default=True, help="In a turn.")
@click.option("--side", "begins", multiple=True, help="Sides that begin so alone. [default: all]")
@click.option(
    "--graphs",
    type=click.Path(path_type=Path),
    help="Folder in which weights and exported graphs are left and found again: exporting takes most of the time, and "
    "no GPU (--export-only). [default: a temporary one]",
)
@click.option("--export-only", is_flag=True, help="Write the graphs of the sides to --graphs, and measure nothing.")
@data_dir_option
@json_option
def main(
    model: str,
    width: float,
    T: int,
    batch: tuple[int, ...],
    device: str,
    turns: int,
    calls: int,
    begins: tuple[str, ...],
    graphs: Path | None,
    export_only: bool,
    data_dir: Path,
    json_path: Path | None,
) -> None:
    if export_only and graphs is None:
        raise click.UsageError("--export-only needs --graphs FOLDER, in which the graphs are left")
    if unknown := [name for name in begins if not any(side.startswith(name) for side in SIDES)]:
        raise click.UsageError(f"--side {unknown[0]!r} begins none of {', '.join(SIDES)}")
    sizes = tuple(sorted(batch))
    sides = [side for side in SIDES if side.startswith(begins or "")]
    with tempfile.TemporaryDirectory() as name:
        folder = (graphs or Path(name)) / f"{model}-{width:g}-T{T}"
        card = "" if export_only else device_name(pick_device(device))
        prepare(folder, model, width, data_dir, T)
        if export_only:
            export_all(sides, folder, T, device)
            return
        results: dict[str, Any] = {"model": model, "width": width, "T": T, "card": card, "torch": torch.__version__}

        def keep(measured: dict[str, Any]) -> None:
            results["sides"] = measured
            if json_path is not None:
                write_json(json_path, results)

        measure(sides, sizes, turns, keep, folder, T, device, sizes[-1], calls)
    show(results, sizes)


def prepare(folder: Path, model: str, width: float, data_dir: Path, T: int) -> None:
    """Lay the network and the images into the folder, unless they are there."""
    if (folder / "classifier.pt").exists():
        return
    classifier, images = untrained(model, width, data_dir, T)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    torch.save(classifier, folder / "classifier.pt")


if __name__ == "__main__":
    main()
