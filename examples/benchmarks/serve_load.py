"""Load and faults of `tetdeploy serve`: throughput and latency beside the engine's own, a soak, bad clients.

    \b
    pip install 'tetdeploy[cpu,serve,train]'
    python examples/benchmarks/serve_load.py --convsnn [--against-wait-ms 2] [--json load.json]
    python examples/benchmarks/serve_load.py MODEL --soak 10
    python examples/benchmarks/serve_load.py MODEL --faults

MODEL is any export, and needs `[cpu,serve]` only; `--convsnn` makes one of `convsnn` at full width for CIFAR-10 images
(untrained), of which a call takes some 10 ms, as of a network one would serve.

Clients send one image of the model's reference images each, as a binary tensor over HTTP, and the next one as soon as
the answer is there; every answer is compared with the engine's. They are coroutines of one process that write requests
made before, so that they take little of the cores that they share with the server. `share` is the server's throughput
over that of the bare engine, in a process without a server and with all cores, at the mean batch that the server
reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tetdeploy import Engine
from tetdeploy.agreement import load_reference
from tetdeploy.cli.errors import CleanErrors
from tetdeploy.cli.options import ABOVE_0, AT_LEAST_1, Numbers, data_dir_option, json_option
from tetdeploy.storage.files import write_json

DATATYPES = {"uint8": "UINT8", "float32": "FP32"}
console = Console(highlight=False, width=120)


class Server:
    """`tetdeploy serve` of one model, called m, in a process of its own."""

    def __init__(self, model: Path, threads: int | None, max_wait_ms: float = 0.0) -> None:
        self.max_wait_ms = max_wait_ms
        command = [sys.executable, "-m", "tetdeploy", "serve", f"m={model}", "--http-port", "0", "--grpc-port", "0"]
        command += ["--max-wait-ms", str(max_wait_ms), *([] if threads is None else ["--threads", str(threads)])]
        self.process = subprocess.Popen([*command, "--queue", "1024"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        try:
            ready = next((line for line in self.process.stdout if line.startswith("ready: ")), None)
        except BaseException:  # Ctrl-C and SIGTERM, too
            self.process.kill()
            self.process.communicate()
            raise
        if ready is None:
            self.process.communicate()  # closes the pipe
            ended = f"the server ended with exit code {self.process.returncode} before it was ready"
            raise click.ClickException(f"{ended}; its reason is above")
        self.address = ready.split()[1].removeprefix("http://")

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://{self.address}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        """End it if it still runs."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


class Load:
    """Clients that ask one image after the other, and compare each answer with the engine's.

    Attributes:
        seconds: of each right answer.
        outcomes: how often an answer was right, wrong, or which error.
    """

    def __init__(self, address: str, x: Any, expected: Any) -> None:
        self.host, _, self.port = address.rpartition(":")
        self.requests = [request(image[None]) for image in x]
        self.expected = expected
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self._ended = False

    async def _ask(self, first: int) -> None:
        k, connection = first, None
        while not self._ended:
            k = (k + 1) % len(self.requests)
            started = time.perf_counter()
            try:
                if connection is not None and connection[0].at_eof():  # closed while it was idle
                    connection[1].close()
                    connection = None
                connection = connection or await asyncio.open_connection(self.host, self.port)
                async with asyncio.timeout(120):
                    status, logits, goes_on = await self._exchange(*connection, self.requests[k])
            except (OSError, EOFError, ValueError, TimeoutError) as error:  # of a server that is gone
                self.outcomes[type(error).__name__] += 1
                if connection is not None:
                    connection[1].close()
                connection = None
                await asyncio.sleep(0.05)
                continue
            if not goes_on:
                connection[1].close()
                connection = None
            if status != 200:
                self.outcomes[f"HTTP {status}"] += 1
                await asyncio.sleep(0.05)
                continue
            self.seconds.append(time.perf_counter() - started)
            self.outcomes["right" if np.allclose(logits, self.expected[k], atol=1e-4) else "WRONG"] += 1

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> tuple[int, Any, bool]:
        """Status and logits of a request, and whether the server keeps the connection."""
        writer.write(request)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        status = int(first.split()[1])
        logits = np.frombuffer(answer[int(headers[LENGTH]) :], np.float32) if status == 200 else None
        return status, logits, headers.get("connection") != "close"

    async def _run(self, clients: int, during: Callable[[], None]) -> float:
        asking = [asyncio.create_task(self._ask(7 * k)) for k in range(clients)]
        started = time.perf_counter()
        await asyncio.to_thread(during)
        took = time.perf_counter() - started
        self._ended = True
        for task in asking:
            task.cancel()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        if bugs := [end for end in ends if isinstance(end, Exception)]:
            raise AssertionError("a client failed") from bugs[0]
        return took

    def run(self, clients: int, during: Callable[[], None]) -> float:
        """Ask with so many clients while `during` runs; gives the seconds it took."""
        return asyncio.run(self._run(clients, during))


LENGTH = "inference-header-content-length"


def request(x: Any) -> bytes:
    """A request as it goes over the wire: one input and one output, both as binary tensors."""
    given = {"name": "x", "shape": list(x.shape), "datatype": DATATYPES[x.dtype.name]}
    given["parameters"] = {"binary_data_size": x.nbytes}
    wanted = {"name": "logits", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
    lines = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\n{LENGTH}: {len(head)}\r\n"
    return f"{lines}Content-Length: {len(head) + x.nbytes}\r\n\r\n".encode() + head + x.tobytes()


def engine_rate(engine: Engine, x: Any, batch: int, seconds: float) -> float:
    """Images per second of the bare engine: the median of its calls."""
    part, times = x[:batch], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        engine.run(part)
        times.append(time.perf_counter() - started)
    return len(part) / statistics.median(times)


def measure(server: Server, engine: Engine, x: Any, expected: Any, clients: int, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    images, calls = (server.metric(f"tetdeploy_batch_images_{what}") for what in ("sum", "count"))
    load = Load(server.address, x, expected)
    took = load.run(clients, lambda: time.sleep(seconds))
    images = server.metric("tetdeploy_batch_images_sum") - images
    batch = images / max(1, server.metric("tetdeploy_batch_images_count") - calls)  # 0 if no call ran
    p50, p95, p99 = (1e3 * float(q) for q in np.quantile(load.seconds or [np.nan], (0.5, 0.95, 0.99)))
    rate, alone = load.outcomes["right"] / took, engine_rate(engine, x, max(1, round(batch)), seconds / 4)
    row = {"clients": clients, "max_wait_ms": server.max_wait_ms, "images_per_s": rate}
    row |= {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "mean_batch": batch}
    return row | {"engine_images_per_s": alone, "share": rate / alone, "outcomes": dict(load.outcomes)}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    names = ("clients", "wait ms", "images/s", "p50 ms", "p95 ms", "p99 ms", "batch", "engine/s", "share", "outcomes")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [f"{row[name]:.4g}" for name in row if name not in ("clients", "outcomes")]
        table.add_row(str(row["clients"]), *numbers, str(row["outcomes"]))
    console.print(table)


def soak(server: Server, x: Any, expected: Any, minutes: float) -> dict[str, Any]:
    """16 clients for so long, and the server's memory meanwhile, in MB."""
    memory: list[float] = []

    def watch() -> None:
        for _ in range(20):
            time.sleep(minutes * 60 / 20)
            memory.append(server.metric("process_resident_memory_bytes") / 1e6)
            console.print(f"{len(memory) * 5} %   {memory[-1]:.1f} MB")

    load = Load(server.address, x, expected)
    load.run(16, watch)
    return {"minutes": minutes, "resident_mb": memory, "outcomes": dict(load.outcomes)}


def misbehave(address: str) -> None:
    """Half headers, half bodies, garbage, and 1 GB announced and sent, on connections that are then cut."""
    host, port = address.split(":")
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\nContent-Length: "
    for sent in (head, head + b"1000\r\n\r\n{", head + b"7\r\n\r\ngarbage", b"\x16\x03\x01\x02\x00\x01"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    with socket.create_connection((host, int(port))) as connection:
        console.print(f"1 GB body: {_answer_to_1_gb(connection, head)}")


def _answer_to_1_gb(connection: socket.socket, head: bytes) -> str:
    """The first line of the answer, or that there was none: the server may cut such a connection."""
    try:
        connection.sendall(head + b"1000000000\r\n\r\n")
        for _ in range(1000):
            connection.sendall(bytes(1_000_000))
        answer = connection.recv(100)
    except OSError as error:
        return f"cut, {type(error).__name__}"
    return answer.splitlines()[0].decode() if answer else "closed without an answer"


def half_bodies(server: Server) -> float:
    """By how many MB the server's memory grows while 15 clients have sent 60 MB each of bodies that never end."""
    host, port = server.address.split(":")
    before = server.metric("process_resident_memory_bytes")
    with contextlib.ExitStack() as connections:
        for _ in range(15):
            connection = connections.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 64000000\r\n\r\n")
            for _ in range(60):
                connection.sendall(bytes(1_000_000))
        time.sleep(1)
        return (server.metric("process_resident_memory_bytes") - before) / 1e6


def faults(model: Path, threads: int | None, x: Any, expected: Any) -> dict[str, Any]:
    """Good clients beside bad ones; then a graceful stop under load; then a kill, and the answers after the restart."""
    found: dict[str, Any] = {}
    with Server(model, threads) as server:
        before = server.metric("process_resident_memory_bytes")
        load = Load(server.address, x, expected)
        load.run(16, lambda: misbehave(server.address))
        growth = (server.metric("process_resident_memory_bytes") - before) / 1e6
        found["beside bad clients"] = dict(load.outcomes) | {"growth_mb": growth}
        found["15 half bodies of 60 MB"] = {"growth_mb": half_bodies(server)}
        load = Load(server.address, x, expected)
        load.run(16, lambda: _end_soon(server.process.terminate))
        found["graceful stop"] = dict(load.outcomes) | {"exit_code": server.process.wait()}
    with Server(model, threads) as server:
        load = Load(server.address, x, expected)
        load.run(16, lambda: _end_soon(server.process.kill))
        found["killed"] = dict(load.outcomes)
    with Server(model, threads) as server:
        load = Load(server.address, x, expected)
        load.run(16, lambda: time.sleep(2))
    return found | {"restarted": dict(load.outcomes)}


def _end_soon(end: Callable[[], None]) -> None:
    """End a server under load, and let its clients see that it is gone."""
    time.sleep(2)
    end()
    time.sleep(2)


@click.command(cls=CleanErrors, help=__doc__)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--convsnn", "make", is_flag=True, help="Make a model in place of MODEL.")
@data_dir_option
@click.option("--clients", default="1,16,64,256", type=Numbers(), show_default=True)
@click.option("--seconds", default=10.0, type=ABOVE_0, show_default=True, help="Of each number of clients.")
@click.option("--threads", type=AT_LEAST_1, help="Threads of the engine. [default: as serve]")
@click.option(
    "--against-wait-ms", "wait", type=ABOVE_0, help="Measure a server with this --max-wait-ms, too, taking turns."
)
@click.option("--soak", "minutes", type=ABOVE_0, help="Watch the server's memory for so many minutes instead.")
@click.option("--faults", "with_faults", is_flag=True, help="Misbehave, stop, kill and restart instead.")
@json_option
def main(
    model: Path | None,
    make: bool,
    data_dir: Path,
    clients: tuple[int, ...],
    seconds: float,
    threads: int | None,
    wait: float | None,
    minutes: float | None,
    with_faults: bool,
    json_path: Path | None,
) -> None:
    if (model is None) != make:
        raise click.UsageError("name a MODEL, or let --convsnn make one")
    with tempfile.TemporaryDirectory() as folder:
        model = model or convsnn(Path(folder), data_dir)
        engine = Engine(model, threads=threads)
        x = load_reference(engine).x
        expected = engine.run(x).logits
        if with_faults:
            found: Any = faults(model, threads, x, expected)
            console.print(found)
        else:
            with contextlib.ExitStack() as stack:
                waits = (0.0,) if wait is None else (0.0, wait)
                servers = [stack.enter_context(Server(model, threads, max_wait_ms)) for max_wait_ms in waits]
                if minutes is not None:
                    found = soak(servers[0], x, expected, minutes)
                    console.print(found)
                else:
                    sides = [(count, server) for count in clients for server in servers]
                    found = {"rows": [measure(server, engine, x, expected, count, seconds) for count, server in sides]}
                    show(found["rows"])
    if json_path is not None:
        write_json(json_path, found)


def convsnn(folder: Path, data_dir: Path) -> Path:
    """An export of a network as large as one would serve on a CPU."""
    from subject import untrained  # beside this file

    from tetdeploy.export import ExportConfig, export_model

    classifier, images = untrained("convsnn", 1.0, data_dir, T=4)
    config = ExportConfig(layout="step", trained_T=4)
    return export_model(classifier, folder / "convsnn.onnx", config, images[:256], num_check=0).path


if __name__ == "__main__":
    main()
