"""`tetdeploy serve`."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, FiniteRange, device_option, runtime_option, threads_option
from tetdeploy.cli.terminal import console
from tetdeploy.storage.files import is_utf8
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import counted

if TYPE_CHECKING:
    from tetdeploy.engine import Engine


class Megabytes(FiniteRange):
    """Megabytes on the command line, whole bytes in the program: one at least."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = super().convert(value, param, ctx) * 1e6
        if not 1 <= size < math.inf:
            self.fail(f"{value} MB is no size; give a number from 0.000001, which is one byte.", param, ctx)
        return round(size)


@click.command(
    epilog="""\b
Examples:
  tetdeploy serve runs/r19/model-step.onnx                 http://127.0.0.1:8080/v2/models/model-step/infer
  tetdeploy serve digits=a/model-step.onnx clothes=b/model-T4.onnx --threads 1
  tetdeploy serve model-step.onnx --host :: --max-batch 32 --max-wait-ms 5
  curl http://127.0.0.1:8080/metrics
"""
)
@click.argument("models", metavar="[NAME=]MODEL...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on; :: is all of them.")
@click.option("--http-port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option("--grpc-port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="0 is any free one.")
@click.option("--max-batch", default=64, show_default=True, type=AT_LEAST_1, help="Images of one call.")
@click.option(
    "--max-wait-ms",
    default=0.0,
    show_default=True,
    type=FiniteRange(min=0),
    help="How long a request waits for others while no call is running; requests that arrive during a call share the "
    "next.",
)
@click.option("--queue", default=256, show_default=True, type=AT_LEAST_1, help="Requests that may wait for a model.")
@click.option(
    "--max-request-mb",
    "max_request",
    default=64.0,
    show_default=True,
    type=Megabytes(min=0, min_open=True, max=2000),
    help="Largest size of a request.",
)
@click.option(
    "--max-json-mb",
    "max_json",
    default=8.0,
    show_default=True,
    type=Megabytes(min=0, min_open=True, max=2000),
    help="Largest size of a request's JSON; images may be raw bytes, which take less memory.",
)
@click.option(
    "--max-total-mb",
    "max_total",
    type=Megabytes(min=0, min_open=True),
    help="Largest total size of the requests being read or answered. [default: 4 times --max-request-mb]",
)
@click.option("--max-T", "max_T", default=64, show_default=True, type=AT_LEAST_1, help="Steps of a request.")
@click.option(
    "--sequence-timeout",
    default=60.0,
    show_default=True,
    type=ABOVE_0,
    help="A sequence ends this many seconds after its last answer.",
)
@click.option(
    "--max-sequences",
    default=4096,
    show_default=True,
    type=AT_LEAST_1,
    help="Most sequences of a model that may be open at once.",
)
@click.option(
    "--max-state-mb",
    "max_state",
    type=Megabytes(min=0, min_open=True),
    default=500.0,
    show_default=True,
    help="Largest size of the LIF state of a model's open sequences; if it allows fewer, fewer may be open.",
)
@device_option
@runtime_option
@threads_option
def serve(
    models: tuple[str, ...],
    host: str,
    http_port: int,
    grpc_port: int,
    max_batch: int,
    max_wait_ms: float,
    queue: int,
    max_request: int,
    max_json: int,
    max_total: int | None,
    max_T: int,
    sequence_timeout: float,
    max_sequences: int,
    max_state: int,
    device: str,
    runtime: str,
    threads: int | None,
) -> None:
    """Serve exported models over HTTP and gRPC: the Open Inference Protocol v2.

    MODEL is an .onnx file, or an .engine of tetdeploy build. It is served under its file name without the extension, or
    under NAME. Requests that arrive together share a call of the engine. There is no authentication: beyond this
    machine, put it behind something that has it. On Ctrl-C, SIGTERM or SIGHUP the requests already taken are finished;
    the exit code is 1 if some could not be answered in time. Needs no torch.
    """
    from tetdeploy.engine import open_engine
    from tetdeploy.system.machine import default_threads

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    paths = _by_name(models)
    engines: dict[str, Engine] = {}
    count = threads or default_threads()
    cores = "all cores" if count is None else counted(count, "thread")
    ready = False

    def announce(http: str, rpc: str) -> None:
        nonlocal ready
        ready = True
        for name, engine in engines.items():
            url = f"http://{http}/v2/models/{quote(name, safe='')}/infer"
            place = cores if engine.device == "cpu" else engine.device
            console.print(f"{name}   {engine.path}   layout {engine.layout}   {place}   {url}")
            if engine.lacks_native:
                console.print(f"{name} is slower than it could be: {engine.lacks_native}", style="yellow")
        console.print(f"ready: http://{http}   grpc {rpc}   metrics http://{http}/metrics   Ctrl-C stops")

    try:
        server = import_extra("tetdeploy.serve.server", "serve")
        from tetdeploy.serve.bodies import Sizes
        from tetdeploy.serve.models import Bounds
        from tetdeploy.serve.scheduler import Limits

        address = server.Address(host.removeprefix("[").removesuffix("]"), http_port, grpc_port)  # [::1], as in a URL
        sizes = Sizes(max_request, max_json, max_total or 4 * max_request)
        for name, path in paths.items():
            engines[name] = open_engine(path, device=device, threads=threads, runtime=runtime)
        serving = server.serve(
            engines,
            address,
            Limits(max_batch, max_wait_ms / 1000, queue),
            Bounds(max_T, sequence_timeout, max_sequences, max_state),
            sizes=sizes,
            threads=threads,
            announce=announce,
        )
        cut_off = asyncio.run(serving)
    except KeyboardInterrupt:
        if ready:
            raise
        with suppress(SystemExit):  # rich's, as below
            console.print("stopped before it was ready")  # no failure, as any other stop
        return
    if cut_off:
        raise click.ClickException(f"stopped, but {cut_off} of the requests taken could not be answered in time")
    with suppress(SystemExit):  # rich's, where the reader has left, as of `| tee log`, which the same Ctrl-C ends
        console.print("stopped; all requests taken were answered")


def _by_name(models: tuple[str, ...]) -> dict[str, str]:
    """The models' paths, by what requests call them.

    Raises:
        ValueError: two have one name, or one is empty, holds a `/`, or is no UTF-8.
    """
    paths: dict[str, str] = {}
    for model in models:
        name, given, path = model.partition("=")
        if not given or Path(model).exists():
            name, path = Path(model).stem, model
        elif not name:
            raise ValueError(f"there is no name before the = of {model!r}; give NAME=MODEL, or MODEL alone")
        if "/" in name:
            raise ValueError(f"{name!r} is no name for a model, since a URL holds it; choose one without '/'")
        if not is_utf8(name):
            raise ValueError(f"{name!r} is no name for a model, since a URL holds UTF-8; give it another: NAME={path}")
        if name in paths:
            raise ValueError(f"two models are called {name}; give one another name: NAME={path}")
        paths[name] = path
    return paths
