"""`tetdeploy serve` in a process of its own, at free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest

PATIENCE = 60
OF_OTHERS = {"WEB_CONCURRENCY": "auto", "PROMETHEUS_MULTIPROC_DIR": "/nonexistent"}  # what other servers read
needs_serve = pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs the extra serve")


@dataclass
class Server:
    process: subprocess.Popen[str]
    http: str
    grpc: str

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a POST."""
        request = urllib.request.Request(f"http://{self.http}/v2/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where nothing was counted yet."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=PATIENCE) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            found = [s.value for f in families for s in f.samples if s.name == name and s.labels == labels]
        return found[0] if found else 0.0


def start(*arguments: str) -> Server:
    command = [sys.executable, "-m", "tetdeploy", "serve", "--http-port", "0", "--grpc-port", "0", "--threads", "1"]
    environment = os.environ | OF_OTHERS
    return started(subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment))


def started(process: subprocess.Popen[str], patience: float = 2 * PATIENCE) -> Server:
    """What a process serves once it is ready; it is killed unless that is so in time."""
    assert process.stdout is not None
    late = threading.Timer(patience, process.kill)
    late.start()
    try:
        for line in process.stdout:
            if line.startswith("ready: "):
                words = line.split()
                return Server(process, words[1].removeprefix("http://"), words[3])
        raise AssertionError(f"the server ended with {process.wait()}")
    finally:
        late.cancel()


def stop(server: Server) -> int:
    """End a server as an init system does; its exit code."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(PATIENCE)
    assert server.process.stdout is not None
    server.process.stdout.close()
    return code
