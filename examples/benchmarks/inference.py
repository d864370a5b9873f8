"""One call of an exported network on a CPU: this engine in float32 and int8 against others, and what convolutions take.

    pip install spikingjelly openvino
    python examples/benchmarks/inference.py [--model resnet19] [--batch 1,8] [--threads 2] [--json inference.json]

The weights are not trained: time does not depend on them. BN takes its statistics from the images, so that spikes are
about as frequent as in a trained network (the rate is printed). Sides take turns in one process; the table shows
medians. `convolutions` is the sum over convolution kernels in ONNX Runtime's own profile of that graph, taken in the
same process; the ratio is the whole of that profile to it.

SpikingJelly runs the same modules with its neurons in place of ours, torch.compile the same network. OpenVINO reads the
ONNX files of the two engines.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tetdeploy import Engine
from tetdeploy.data import load_data
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.files import write_json
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.neurons import LIF

Call = Callable[[Any], Any]
OTHERS = ("SpikingJelly", "torch.compile", "OpenVINO fp32", "OpenVINO int8")


def untrained(model: str, width: float, data_dir: Path, T: int) -> tuple[Classifier, Any]:
    """A network whose BN statistics are those of CIFAR-10 images, and the images."""
    data = load_data("cifar10", "test", data_dir=data_dir)
    config = NetworkConfig(model, num_classes=10, in_channels=3, image_size=(32, 32), width=width)
    torch.manual_seed(0)
    classifier = Classifier(
        build_network(config), config=config, mean=data.mean, std=data.std, class_names=data.class_names, data="cifar10"
    )
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches below
    with torch.no_grad():
        for start in range(0, 96, 32):
            classifier.train()(torch.from_numpy(data.x[start : start + 32]), T)
    return classifier.eval(), data.x[:512]


def spikingjelly(classifier: Classifier, T: int) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from spikingjelly.activation_based import functional, neuron
    theirs = copy.deepcopy(classifier)
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if isinstance(child, LIF):
                node = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, v_threshold=child.v_th, step_mode="m")
                setattr(module, name, node)

    def call(x: Any) -> Any:
        functional.reset_net(theirs)
        return theirs(torch.from_numpy(x), T)

    return call


def compiled(classifier: Classifier, T: int) -> Call:
    network: nn.Module = torch.compile(classifier)  # type: ignore[assignment]
    return lambda x: network(torch.from_numpy(x), T)


def openvino(model: Path, threads: int) -> Call:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(str(model), "CPU", options)
    return lambda x: request(x)


def convolution_share(model: Path, x: Any, threads: int) -> dict[str, float]:
    """Milliseconds of ONNX Runtime's kernels in one run (of ten, the median), and of its convolutions among them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = threads, True, 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for _ in range(13):
            session.run(["per_step"], {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
    runs: list[dict[str, float]] = []
    for event in events:
        if event.get("name") == "model_run":
            runs.append({"all": 0.0, "convolutions": 0.0})
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(kernels) // len(runs)
    for k, run in enumerate(runs):
        for event in kernels[k * per_run : (k + 1) * per_run]:
            milliseconds = event["dur"] / 1e3
            run["all"] += milliseconds
            run["convolutions"] += milliseconds * ("Conv" in event["args"]["op_name"])
    return {key: statistics.median(run[key] for run in runs[3:]) for key in ("all", "convolutions")}


def alternate(sides: Mapping[str, Call], x: Any, repeats: int) -> dict[str, float]:
    """Median milliseconds of each side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    with torch.inference_mode():
        for repeat in range(-2, repeats):
            for side, call in sides.items():
                start = time.perf_counter()
                call(x)
                if repeat >= 0:
                    times[side].append(1e3 * (time.perf_counter() - start))
    return {side: statistics.median(values) for side, values in times.items()}


@click.command()
@click.option("--model", default="resnet19", show_default=True)
@click.option("--width", default=1.0, show_default=True)
@click.option("--T", "T", default=4, show_default=True)
@click.option("--batch", default="1,8", show_default=True)
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--repeats", default=20, show_default=True)
@click.option("--without", multiple=True, type=click.Choice(OTHERS), help="Leave one of the others out.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=Path("data"), envvar="TETDEPLOY_DATA")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: str,
    width: float,
    T: int,
    batch: str,
    threads: int,
    repeats: int,
    without: tuple[str, ...],
    data_dir: Path,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    classifier, images = untrained(model, width, data_dir, T)
    results: dict[str, Any] = {"model": model, "width": width, "T": T, "threads": threads, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for precision in ("fp32", "int8"):
            start = time.perf_counter()
            config = ExportConfig(T=T, trained_T=T, precision=precision)  # type: ignore[arg-type]
            files[precision] = Path(folder) / config.file_name
            given = (images[:64], None)
            export_model(classifier, files[precision], config, images[:4], num_check=0, calibration=given)
            results[f"export_{precision}_s"] = time.perf_counter() - start
        engines = {name: Engine(file, threads=threads) for name, file in files.items()}
        results["firing_rate"] = firing_rate(engines["fp32"], images[:32])
        sides: dict[str, Call] = {f"engine {name}": engine.run for name, engine in engines.items()}
        makers: dict[str, Callable[[], Call]] = {
            "SpikingJelly": lambda: spikingjelly(classifier, T),
            "torch.compile": lambda: compiled(classifier, T),
            "OpenVINO fp32": lambda: openvino(files["fp32"], threads),
            "OpenVINO int8": lambda: openvino(files["int8"], threads),
        }
        sides |= {name: make() for name, make in makers.items() if name not in without}
        for size in map(int, batch.split(",")):
            x = np.ascontiguousarray(images[:size])
            row: dict[str, Any] = {"batch": size, "median_ms": alternate(sides, x, repeats)}
            row["profile"] = {name: convolution_share(file, x, threads) for name, file in files.items()}
            results["rows"].append(row)
    show(results)
    if json_path is not None:
        write_json(json_path, results)


def firing_rate(engine: Engine, x: Any) -> float:
    _, counts = engine.count(x)
    neurons = {n["name"]: int(np.prod(n["shape"])) for n in engine.metadata["neurons"]}
    fired = sum(float(counts[f"fired.{name}"].sum()) for name in neurons)
    return fired / (sum(neurons.values()) * len(x) * (engine.T or 1))


def show(results: dict[str, Any]) -> None:
    console = Console(width=130)
    title = f"{results['model']} x {results['width']:g}, T={results['T']}, {results['threads']} threads"
    console.print(f"{title}, firing rate {results['firing_rate']:.3f}; median ms, and times the engine's in int8")
    sides = results["rows"][0]["median_ms"]
    table = Table()
    for header in ("batch", *sides, "fp32 / convolutions", "int8 / convolutions"):
        table.add_column(header, justify="right")
    for row in results["rows"]:
        best = row["median_ms"]["engine int8"]
        cells = [f"{ms:.1f}  {ms / best:.2f}x" for ms in row["median_ms"].values()]
        shares = [f"{p['all'] / p['convolutions']:.2f}x of {p['convolutions']:.1f}" for p in row["profile"].values()]
        table.add_row(str(row["batch"]), *cells, *shares)
    console.print(table)


if __name__ == "__main__":
    main()
