"""The command line. The only part that knows train, export and the engine at once; it imports them lazily."""

from __future__ import annotations

import click

from tetdeploy import __version__
from tetdeploy.cli.bench import bench
from tetdeploy.cli.build import build
from tetdeploy.cli.calibrate import calibrate
from tetdeploy.cli.early_exit import early_exit
from tetdeploy.cli.errors import CleanGroup
from tetdeploy.cli.evaluate import evaluate
from tetdeploy.cli.export import export
from tetdeploy.cli.import_ import import_
from tetdeploy.cli.inspect import inspect
from tetdeploy.cli.landscape import landscape
from tetdeploy.cli.predict import predict
from tetdeploy.cli.quickstart import quickstart
from tetdeploy.cli.report import report
from tetdeploy.cli.serve import serve
from tetdeploy.cli.sweep import sweep
from tetdeploy.cli.train import train
from tetdeploy.cli.validate import validate

__all__ = ["main"]


@click.group(
    cls=CleanGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0, 1 an error, 2 wrong usage, 3 a failed gate of validate, 130 Ctrl-C (0 for serve). A file is "
    "written whole or not at all. Tables are as wide as the terminal, or as the variable COLUMNS says; what does not "
    "fit continues below.",
)
@click.version_option(__version__, prog_name="tetdeploy")
def main() -> None:
    """Spiking neural networks from training with TET to a served engine.

    \b
    tetdeploy quickstart                 all of it on small real images, in about a minute
    tetdeploy train                      train a network (by default on the digits)
    tetdeploy export --T 6 --fold-bn     write the newest run as ONNX
    tetdeploy sweep                      accuracy, energy and latency at each T
    tetdeploy bench                      latency and throughput by batch, threads and T
    tetdeploy validate                   does it compute what PyTorch computes, here? a gate for CI
    tetdeploy calibrate [MODEL]          when an answer is certain enough to stop: early exit's threshold
    tetdeploy early-exit [MODEL]         what stopping early keeps and saves
    tetdeploy serve MODEL...             answer requests over HTTP and gRPC: the Open Inference Protocol
    tetdeploy report [RUN...]            one HTML page: curves, accuracy, energy, layers, hashes
    tetdeploy build [MODEL]              a TensorRT engine of it, for NVIDIA GPUs
    tetdeploy inspect FILE               what a checkpoint or a model is, layer by layer
    tetdeploy predict MODEL IMAGE...     classify image files
    tetdeploy evaluate [RUN...]          accuracy of trained weights at each T, in PyTorch; ANN twins too
    tetdeploy landscape [RUN...]         both losses round trained weights
    tetdeploy import FILE --arch ...     a checkpoint of the TET authors
    """


for command in (
    quickstart, train, export, sweep, bench, validate, calibrate, early_exit, serve, report, build, inspect, predict,
    evaluate, landscape, import_,
):  # fmt: skip
    main.add_command(command)
