"""The endpoints, called without a server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2

from tetdeploy.serve import models, rpc, rpc_messages
from tetdeploy.serve.bodies import BodyLimit, Budget, Sizes
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.protocol import Models
from tetdeploy.serve.requests import InferRequest, InvalidRequestError
from tetdeploy.serve.rest import application
from tetdeploy.serve.rpc import Inferences
from tetdeploy.serve.scheduler import StoppingError

SIZES = Sizes(10_000, 10_000, 10_000)
INFER = "/v2/models/m/infer"


def scope(method: str, path: str, **headers: str) -> dict[str, Any]:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": sent, "query_string": b""}


def call(
    models: Any,
    method: str,
    path: str,
    body: bytes | bytearray = b"",
    when_answered: Callable[[], None] = lambda: None,
    **headers: str,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of the answer to a body that is received once."""
    coming, sent = [{"type": "http.request", "body": body}], []

    async def receive() -> Any:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop()

    async def send(message: Any) -> None:
        when_answered()
        sent.append(message)

    app = application(models, Metrics(CollectorRegistry()), SIZES)
    asyncio.run(app(scope(method, path, **headers), receive, send))
    start, answer = sent
    told = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], told, json.loads(answer["body"])


def served(predict: Callable[[InferRequest], Any]) -> Any:
    """Models of which each answers so."""
    return SimpleNamespace(running=lambda name, version: SimpleNamespace(name=name, predict=predict))


def test_another_method_is_refused_with_those_that_are_allowed() -> None:
    status, headers, answer = call(None, "POST", "/v2/models/m")
    assert status == 405 and answer["error"].startswith("Method Not Allowed: POST /v2/models/m; ")
    assert set(headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["/v2/", "/v2/models/m/", "/v2/health/ready/"])
def test_nobody_is_sent_to_another_address(path: str) -> None:
    status, headers, answer = call(None, "GET", path, host="m")
    assert (status, "location" in headers) == (404, False)
    assert answer["error"].startswith(f"Not Found: GET {path}; ")


def test_a_model_begins_with_no_answers() -> None:
    registry = CollectorRegistry()
    Metrics(registry).watch(SimpleNamespace(name="m", sequences=None, scheduler=SimpleNamespace(waiting=0)))  # type: ignore[arg-type]
    assert registry.get_sample_value("tetdeploy_request_seconds_count", {"model": "m"}) == 0


def test_a_model_that_stops_is_not_ready_and_neither_is_its_server() -> None:
    known: list[Any] = [SimpleNamespace(name="a", ready=True), SimpleNamespace(name="b", ready=False)]
    both = Models(known)
    assert call(both, "GET", "/v2/health/ready")[::2] == (503, {"ready": False})
    assert call(both, "GET", "/v2/models/a/ready")[::2] == (200, {"name": "a", "ready": True})
    assert call(both, "GET", "/v2/models/b/ready")[::2] == (503, {"name": "b", "ready": False})
    assert [rpc._health(both, name) for name in ("", "a", "b")] == [b"\x08\x02", b"\x08\x01", b"\x08\x02"]
    probes = rpc._probes(both)
    assert not probes["ServerReady"](None).ready
    assert [probes["ModelReady"](service_pb2.ModelReadyRequest(name=name)).ready for name in "ab"] == [True, False]


def test_a_server_that_stops_lets_its_connections_go() -> None:
    def running(name: str, version: str) -> None:
        raise StoppingError("the server is shutting down")

    status, headers, _ = call(SimpleNamespace(running=running), "POST", INFER, b"{}")
    assert (status, headers["connection"]) == (503, "close")


def test_a_bug_is_logged_once_and_clients_are_told_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    status, _, answer = call(None, "POST", INFER, b"{}")
    assert (status, answer) == (500, {"error": "internal error"})
    assert caplog.text.count("Traceback") == 1 and "'NoneType' object has no attribute 'running'" in caplog.text


def test_a_body_is_not_copied_and_a_refusal_does_not_keep_it() -> None:
    given = {"name": "x", "shape": [100], "datatype": "UINT8", "parameters": {"binary_data_size": 100}}
    head = json.dumps({"inputs": [given]}).encode()
    body, held = bytearray(head + bytes(100)), []

    async def predict(request: InferRequest) -> None:
        [x] = request.inputs
        raise InvalidRequestError("the same" if isinstance(x.data, memoryview) and x.data.obj is body else "a copy")

    alone = sys.getrefcount(body)

    def count() -> None:
        held.append(sys.getrefcount(body))

    length = str(len(head))
    status, _, answer = call(served(predict), "POST", INFER, body, count, inference_header_content_length=length)
    assert (status, answer) == (400, {"error": "the same"})
    assert held[0] - alone == 1  # `call` itself


def test_a_path_is_an_inferences_whatever_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[str, int]] = []
    monkeypatch.setattr(Metrics, "refuse", lambda self, model, status: refused.append((model, status)))
    for path in (INFER, "/v2/models/m/ready", "/v2/repository/models/m/load"):
        call(None, "POST", path, b"{}", host="[")
    assert refused == [("m", 500)]


def test_a_message_that_is_refused_over_grpc_is_kept_by_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC keeps what `abort` raises until the garbage collector comes by."""
    held: list[int] = []

    class AbortedError(Exception):
        pass

    async def abort(code: Any, text: str) -> None:
        raise AbortedError(text)

    async def scenario() -> AbortedError:
        inferences = Inferences(Models([]), Metrics(CollectorRegistry()), SIZES, Budget(10_000))
        sent = [service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[bytes(100)]).SerializeToString()]
        parsed: list[Any] = []

        def parse(*given: Any) -> Any:
            message = rpc_messages.parse(*given)
            parsed.append(message)
            return message

        monkeypatch.setattr(rpc, "parse", parse)
        held.append(sys.getrefcount(sent[0]))  # of an entry, since a local variable counts by where it is read
        try:
            await inferences.answer(sent[0], SimpleNamespace(abort=abort))
        except AbortedError as error:
            held.append(sys.getrefcount(sent[0]))
            alone = [service_pb2.ModelInferRequest()]
            held.append(sys.getrefcount(parsed[0]) - sys.getrefcount(alone[0]))
            return error
        raise AssertionError

    assert "m does not exist" in str(asyncio.run(scenario()))
    assert held[0] == held[1] and held[2] == 0


def test_a_message_that_there_is_no_room_for_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rpc, "parse", None)

    async def abort(code: Any, text: str) -> None:
        said.append(f"{code} {text}")

    inferences = Inferences(Models([]), Metrics(CollectorRegistry()), SIZES, Budget(100))
    asyncio.run(inferences.answer(bytes(101), SimpleNamespace(abort=abort)))
    assert "RESOURCE_EXHAUSTED all requests together may hold 100 bytes" in said[0]


def test_a_client_that_leaves_is_not_worked_for(caplog: pytest.LogCaptureFixture) -> None:
    registry, budget = CollectorRegistry(), Budget(100)
    ended: list[str] = []
    sent: list[Any] = []

    async def scenario() -> None:
        began = asyncio.Event()

        async def predict(request: InferRequest) -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        async def send(message: Any) -> None:
            sent.append(message)

        app = BodyLimit(application(served(predict), Metrics(registry), SIZES), 100, budget)
        coming: asyncio.Queue[Any] = asyncio.Queue()
        coming.put_nowait({"type": "http.request", "body": b'{"inputs": []}'})
        answering = asyncio.create_task(app(scope("POST", INFER), coming.get, send))
        await began.wait()
        coming.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(answering, 60)

    asyncio.run(scenario())
    assert (sent[0]["status"], ended, budget.held) == (499, ["cancelled"], 0)
    assert registry.get_sample_value("tetdeploy_refused_total", {"model": "unknown", "status": "499"}) == 1
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("stopping", "counted"), [(False, 1), (True, None)])
def test_a_call_over_grpc_that_the_server_cuts_off_is_no_client_that_left(stopping: bool, counted: int | None) -> None:
    registry = CollectorRegistry()

    async def scenario() -> None:
        began = asyncio.Event()

        async def predict(request: InferRequest) -> None:
            began.set()
            await asyncio.Event().wait()

        inferences = Inferences(served(predict), Metrics(registry), SIZES, Budget(100))
        message = service_pb2.ModelInferRequest(model_name="m").SerializeToString()
        answering = asyncio.create_task(inferences.answer(message, None))
        await asyncio.wait_for(began.wait(), 60)
        inferences.stopping = stopping
        answering.cancel()
        await asyncio.wait([answering])
        assert answering.cancelled()

    asyncio.run(scenario())
    assert registry.get_sample_value("tetdeploy_refused_total", {"model": "unknown", "status": "499"}) == counted


def test_the_energy_of_a_step_is_found_on_the_servers_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def nothing(engine: Any) -> None:
        raise ValueError

    monkeypatch.setattr(models, "Engine", lambda path, **options: said.append(options))
    monkeypatch.setattr(models, "load_reference", nothing)
    engine: Any = SimpleNamespace(device="cpu", path="m.onnx", runtime="onnxruntime")
    models.step_energy_pj(engine, 3)
    assert said == [{"runtime": "onnxruntime", "threads": 3, "native": False}]
