"""The HTTP endpoints, called without a server and, as kserve allows, in a process without tritonclient."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

if importlib.util.find_spec("kserve") is None:
    pytest.skip("needs the extra serve", allow_module_level=True)

CALL = """
import asyncio, json
from types import SimpleNamespace
from prometheus_client import CollectorRegistry
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.rest import application

def call(plane, method, path, body=b"", when_answered=lambda: None):
    "Status, headers and JSON of the answer; a body that is received once."
    coming, sent = [{"type": "http.request", "body": body}], []
    async def receive():
        if not coming:
            await asyncio.Event().wait()
        return coming.pop()
    async def send(message):
        when_answered()
        sent.append(message)
    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(application(plane, Metrics(CollectorRegistry()))(scope, receive, send))
    start, answer = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(answer["body"])
"""


def run(script: str) -> tuple[Any, str]:
    """The JSON that a script prints last, and what it logs."""
    done = subprocess.run([sys.executable, "-c", CALL + script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_another_method_is_refused_with_those_that_are_allowed() -> None:
    (status, headers, answer), _ = run('print(json.dumps(call(None, "POST", "/v2/models/m")))')
    assert (status, answer) == (405, {"error": "Method Not Allowed"})
    assert set(headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_bug_is_logged_once_and_clients_are_told_nothing_of_it() -> None:
    (status, _, answer), log = run('print(json.dumps(call(None, "POST", "/v2/models/m/infer", b"{}")))')
    assert (status, answer) == (500, {"error": "internal error"})
    assert log.count("Traceback") == 1 and "'NoneType' object has no attribute 'running'" in log


def test_a_body_is_not_copied_and_a_refusal_does_not_keep_it() -> None:
    (status, answer, held), _ = run(
        """
import sys
from kserve.errors import InvalidInput

class Plane:
    def running(self, name, version):
        async def predict(request):
            raise InvalidInput("the same" if request is body else "a copy")
        return SimpleNamespace(predict=predict)

    def decode_inference_request(self, given, headers, name):
        return given

body, held = bytearray(100), []
alone = sys.getrefcount(body)
status, _, answer = call(Plane(), "POST", "/v2/models/m/infer", body, lambda: held.append(sys.getrefcount(body)))
print(json.dumps([status, answer, held[0] - alone]))
"""
    )
    assert (status, answer) == (400, {"error": "the same"})
    assert held == 1  # `call` itself


LEAVES = """
import tetdeploy.serve.rest
from tetdeploy.serve.bodies import BodyLimit, Budget

class Plane:
    def running(self, name, version):
        return SimpleNamespace(predict=self.predict)

    def decode_inference_request(self, given, headers, name):
        return given

    async def predict(self, request):
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

began, ended, sent, budget = asyncio.Event(), [], [], Budget(100)

async def scenario(cancel):
    app = BodyLimit(application(Plane(), Metrics(registry)), 100, budget)
    coming = asyncio.Queue()
    coming.put_nowait({"type": "http.request", "body": b"{}"})
    async def send(message):
        sent.append(message)
    scope = {"type": "http", "method": "POST", "path": "/v2/models/m/infer", "headers": [], "query_string": b""}
    call = asyncio.create_task(app(scope, coming.get, send))
    await began.wait()
    if cancel:
        call.cancel()
    else:
        coming.put_nowait({"type": "http.disconnect"})
    await asyncio.wait([call], timeout=30)
    return "cancelled" if call.cancelled() else sent[0]["status"]

registry = CollectorRegistry()
"""


def test_a_client_that_leaves_is_not_worked_for() -> None:
    (status, ended, held, refused), log = run(
        LEAVES
        + """
status = asyncio.run(scenario(cancel=False))
refused = registry.get_sample_value("tetdeploy_refused_total", {"model": "unknown", "status": "499"})
print(json.dumps([status, ended, budget.held, refused]))
"""
    )
    assert (status, ended, held, refused) == (499, ["cancelled"], 0, 1)
    assert "Traceback" not in log


def test_the_energy_of_a_step_is_found_on_the_servers_threads() -> None:
    options, _ = run(
        """
from tetdeploy.serve import models
said = []
models.Engine = lambda path, **options: said.append(options)
def nothing(engine): raise ValueError
models.load_reference = nothing
models.step_energy_pj(SimpleNamespace(device="cpu", path="m.onnx", runtime="onnxruntime"), 3)
print(json.dumps(said))
"""
    )
    assert options == [{"runtime": "onnxruntime", "threads": 3, "native": False}]
