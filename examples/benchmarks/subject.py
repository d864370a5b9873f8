"""What benchmarks measure: a network of no training, its images, and what convolutions take in its graph."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import onnxruntime as ort
import torch
from torch import nn

from tetdeploy import native
from tetdeploy.data import LabelledSet, load_data
from tetdeploy.native.fusing import fuse_model
from tetdeploy.networks import Classifier, NetworkConfig, build_network, import_network


class NoImagesError(click.ClickException):
    """The images that a benchmark needs are not to be had: nothing was measured."""

    exit_code = 2


def load_images(name: str, data_dir: Path) -> LabelledSet:
    """A data set's test images.

    Raises:
        NoImagesError: there are none; says where they were looked for and what to do.
    """
    try:
        return load_data(name, "test", data_dir=data_dir)
    except OSError as error:
        raise NoImagesError(str(error)) from error


WARM_UP = 3  # runs


def untrained(model: str, width: float, data_dir: Path, T: int) -> tuple[Classifier, Any]:
    """A network whose BN statistics are those of CIFAR-10 images, and the images.

    Raises:
        NoImagesError: they are not to be had.
    """
    data = load_images("cifar10", data_dir)
    config = NetworkConfig(model, num_classes=10, in_channels=3, image_size=(32, 32), width=width)
    torch.manual_seed(0)
    network = import_network(config) if config.is_own else build_network(config)
    classifier = Classifier(
        network, config=config, mean=data.mean, std=data.std, class_names=data.class_names, data="cifar10"
    )
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches below
    with torch.no_grad():
        for start in range(0, 96, 32):
            classifier.train()(torch.from_numpy(data.x[start : start + 32]), T)
    return classifier.eval(), data.x[:512]


def convolution_share(model: Path, x: Any, threads: int, *, runs: int = 10, own: bool = False) -> dict[str, float]:
    """Medians over runs: milliseconds of the convolutions, how many times that all kernels of the same run took, and
    how many times that the whole run.

    Args:
        own: ONNX Runtime's own operators.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = threads, True, 3
    graph = None if own or native.missing() else fuse_model(model.read_bytes())
    if graph is not None:
        native.use(ort, options)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(graph or str(model), options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + runs):
            session.run(["per_step"], {"x": x})
        events = json.loads(Path(session.end_profiling()).read_text())
    taken = [event["dur"] for event in events if event.get("name") == "model_run"]
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(kernels) // len(taken)
    found: dict[str, list[float]] = {"convolutions": [], "kernels": [], "run": []}
    for k in range(WARM_UP, len(taken)):
        its = kernels[k * per_run : (k + 1) * per_run]
        words = ("Conv", "Additions", "Lookups")
        convolutions = sum(e["dur"] for e in its if any(word in e["args"]["op_name"] for word in words))
        found["convolutions"].append(convolutions / 1e3)
        found["kernels"].append(sum(e["dur"] for e in its) / convolutions)
        found["run"].append(taken[k] / convolutions)
    return {key: statistics.median(values) for key, values in found.items()}
