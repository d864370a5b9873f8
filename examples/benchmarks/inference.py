"""One call of an exported network on a CPU: this engine in float32 and int8 against others, and what convolutions take.

    \b
    pip install spikingjelly openvino
    python examples/benchmarks/inference.py [--model resnet19] [--batch 1,8] [--threads 2] [--json inference.json]

The weights are not trained, but BN takes its statistics from the images, so that spikes are about as frequent as in a
trained network (the rate is printed; without AMX calls may take longer the more there are). Every side has a process of
its own (`turns`). They take turns, each with two calls to warm up and five that count, and the table shows medians. `as
fp32` counts of how many images of the last batch a side's class is that of this engine in float32 (8 bits flip spikes,
and an untrained network amplifies that). `peak` is the largest resident set of a side's process, `opened` how long it
took until a model was ready. What convolutions take is the sum over their kernels in ONNX Runtime's own profile of
that graph, in runs of their own; all kernels, and the whole run, are compared with those of the same run. The sides
with "ORT's own" run the same files without the native operator (`Engine(native=False)`); where the processor has AMX,
another has native operators, but makes no use of it.

SpikingJelly runs the same modules with its neurons in place of ours, torch.compile the same network. OpenVINO reads
ONNX files exported for it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tetdeploy import Engine, native
from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, STEPS, Numbers, data_dir_option, json_option
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.networks import Classifier
from tetdeploy.storage.files import write_json
from tetdeploy.system.machine import usable_cores

sys.path.insert(0, str(Path(__file__).parent))
from peers import reset, with_spikingjelly
from subject import convolution_share, untrained
from turns import Answer, Worker

Call = Callable[[Any], Any]  # of images, to logits [N, K]
OTHERS = ("SpikingJelly", "torch.compile", "OpenVINO fp32", "OpenVINO int8")
BASE = "int8"
EXACT = "fp32"  # whose classes the others' are compared with
OWN, NO_AMX = ", ORT's own", ", no AMX"
PROFILED = 40  # runs
WARM_UP, CALLS = 2, 5  # of a side's turn; ONNX Runtime still takes new memory in the second


def spikingjelly(classifier: Classifier, T: int) -> Call:
    theirs = with_spikingjelly(classifier)

    def call(x: Any) -> Any:
        reset(theirs)
        return theirs(torch.from_numpy(x), T).mean(0)

    return call


def compiled(classifier: Classifier, T: int) -> Call:
    network: nn.Module = torch.compile(classifier, dynamic=False)  # type: ignore[assignment]
    return lambda x: network(torch.from_numpy(x), T).mean(0)


def openvino(model: Path, threads: int) -> Call:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(str(model), "CPU", options)
    return lambda x: request(x)["logits"]


def make(side: str, folder: Path, T: int, threads: int) -> Call:
    """What a side calls with images."""
    if side in ("SpikingJelly", "torch.compile"):
        torch.set_num_threads(threads)
        classifier = torch.load(folder / "classifier.pt", weights_only=False)
        return spikingjelly(classifier, T) if side == "SpikingJelly" else compiled(classifier, T)
    if side.startswith("OpenVINO"):
        return openvino(folder / f"{side}.onnx", threads)
    if side.endswith(NO_AMX):  # in this process, the side's own
        mock.patch.object(native, "has_tiles", return_value=False).start()
    file = folder / f"{side.removesuffix(OWN).removesuffix(NO_AMX)}.onnx"
    engine = Engine(file, threads=threads, native=False if side.endswith(OWN) else None)
    return lambda x: engine.run(x, engine.T or T).logits


def open_side(side: str, folder: Path, T: int, threads: int) -> Answer:
    """What answers a number of images with {"opened_s", "ms": of each call, "classes", "peak_mb"}."""
    start = time.perf_counter()
    call, images = make(side, folder, T, threads), np.load(folder / "images.npy")
    opened = time.perf_counter() - start

    @torch.inference_mode()
    def answer(size: int) -> dict[str, Any]:
        x, taken = np.ascontiguousarray(images[:size]), []
        for _ in range(WARM_UP + CALLS):
            start = time.perf_counter()
            logits = call(x)
            taken.append(1e3 * (time.perf_counter() - start))
        classes = np.asarray(logits).argmax(1).tolist()
        return {"opened_s": opened, "ms": taken[WARM_UP:], "classes": classes, "peak_mb": peak_mb()}

    return answer


def peak_mb() -> float:
    """The largest resident set of this process so far; `getrusage` would begin with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measure(sides: list[str], sizes: tuple[int, ...], turns: int, folder: Path, T: int, threads: int) -> dict[str, Any]:
    """By side: seconds to open, median milliseconds by batch, classes of the last one, peak MB; and why it failed."""
    workers = {side: Worker(open_side, side, folder, T, threads) for side in sides}
    found: dict[str, Any] = {side: {"median_ms": {}} for side in sides}
    for size in sizes:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(-1, turns):
            for side, worker in workers.items():
                answer = worker.ask(size)
                if answer is not None:
                    found[side] |= {key: answer[key] for key in ("opened_s", "classes", "peak_mb")}
                    times[side] += answer["ms"] if turn >= 0 else []
        for side in sides:
            found[side]["median_ms"][size] = statistics.median(times[side]) if times[side] else None
    for side, worker in workers.items():
        worker.end()
        if worker.failed:
            found[side]["failed"] = worker.failed
    return found


def export_all(classifier: Classifier, images: Any, T: int, folder: Path) -> dict[str, float]:
    """Write `<side>.onnx` for the engine's and OpenVINO's sides. Returns the seconds of each export."""
    np.save(folder / "images.npy", images)
    torch.save(classifier, folder / "classifier.pt")
    seconds = {}
    for side, options in EXPORTS.items():
        start = time.perf_counter()
        config = ExportConfig(**{"T": T, "trained_T": T, **options})  # type: ignore[arg-type]
        given = (images[:64], None)
        export_model(classifier, folder / f"{side}.onnx", config, images[:4], num_check=0, calibration=given)
        seconds[side] = time.perf_counter() - start
    return seconds


EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "fp32 dynamic": {"layout": "dynamic"},
    "int8 dynamic": {"layout": "dynamic", "precision": "int8"},
    "int8 T=8": {"T": 8, "precision": "int8"},
    "OpenVINO fp32": {"target": "openvino"},
    "OpenVINO int8": {"target": "openvino", "precision": "int8"},
}


@click.command(cls=CleanErrors, help=__doc__)
@click.option("--model", default="resnet19", show_default=True)
@click.option("--width", default=1.0, type=ABOVE_0, show_default=True)
@click.option("--T", "T", default=4, type=STEPS, show_default=True)
@click.option("--batch", "sizes", default="1,8", type=Numbers(), show_default=True)
@click.option("--threads", default=usable_cores(), type=AT_LEAST_1, show_default=True)
@click.option("--turns", default=4, show_default=True, type=AT_LEAST_1, help=f"Of each side, {CALLS} calls each.")
@click.option("--without", multiple=True, type=click.Choice(OTHERS), help="Leave one of the others out.")
@data_dir_option
@json_option
def main(
    model: str,
    width: float,
    T: int,
    sizes: tuple[int, ...],
    threads: int,
    turns: int,
    without: tuple[str, ...],
    data_dir: Path,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    classifier, images = untrained(model, width, data_dir, T)
    results: dict[str, Any] = {"model": model, "width": width, "T": T, "threads": threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["export_s"] = export_all(classifier, images, T, folder)
        results["firing_rate"] = firing_rate(Engine(folder / "fp32.onnx", threads=threads), images[:32])
        own = [f"{side}{OWN}" for side in ("fp32", "int8", "int8 dynamic")]
        own += [f"fp32{NO_AMX}"] if native.has_tiles() else []
        sides = [side for side in dict.fromkeys([*EXPORTS, *own, *OTHERS]) if side not in without]
        results["sides"] = measure(sides, sizes, turns, folder, T, threads)
        results["profile"] = {  # its own cost, some microseconds a kernel, counts at batch 1
            side: {
                size: convolution_share(folder / f"{side}.onnx", images[:size], threads, runs=PROFILED)
                for size in sizes
            }
            for side in ("fp32", "int8")
        }
    if json_path is not None:
        write_json(json_path, results)
    show(results, sizes)


def firing_rate(engine: Engine, x: Any) -> float:
    _, counts = engine.count(x)
    neurons = {n["name"]: int(np.prod(n["shape"])) for n in engine.metadata["neurons"]}
    fired = sum(float(counts[f"fired.{name}"].sum()) for name in neurons)
    return fired / (sum(neurons.values()) * len(x) * (engine.T or 1))


def times_base(ms: float | None, base: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f}" if base is None else f"{ms:.1f}  {ms / base:.2f}x"


def same_classes(side: str, found: dict[str, Any], exact: dict[str, Any]) -> str:
    """Of how many images of the last batch the class is that of float32; at another T it may be another."""
    if "classes" not in found or "classes" not in exact or "T=" in side:
        return "-"
    pairs = list(zip(found["classes"], exact["classes"], strict=True))
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def show(results: dict[str, Any], sizes: tuple[int, ...]) -> None:
    console = Console(width=120)
    title = f"{results['model']} x {results['width']:g}, T={results['T']}, {results['threads']} threads"
    console.print(f"{title}, firing rate {results['firing_rate']:.3f}; median ms, and times that of {BASE}")
    table = Table()
    for header in ("", *(f"batch {size}" for size in sizes), f"as {EXACT}", "opened", "exported", "peak"):
        table.add_column(header, justify="right" if header else "left")
    base = results["sides"][BASE]["median_ms"]
    for side, found in results["sides"].items():
        cells = [times_base(found["median_ms"][size], base[size]) for size in sizes]
        exported = results["export_s"].get(side)
        seconds = "" if exported is None else f"{exported:.1f} s"
        cells.append(same_classes(side, found, results["sides"][EXACT]))
        opened = f"{found['opened_s']:.2f} s" if "opened_s" in found else "-"
        table.add_row(side, *cells, opened, seconds, f"{found.get('peak_mb', 0):,.0f} MB")
    console.print(table)
    for side, found in results["sides"].items():
        if "failed" in found:
            console.print(f"{side}: {found['failed']}", markup=False)
    for side, by_size in results["profile"].items():
        for size, share in by_size.items():
            console.print(
                f"{side} batch {size}: convolutions {share['convolutions']:.1f} ms; all kernels of the same run "
                f"{share['kernels']:.2f} times that, the whole run {share['run']:.2f} times"
            )


if __name__ == "__main__":
    main()
