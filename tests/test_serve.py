"""`tetdeploy serve` in a process of its own, asked by stock clients and by clients that do everything wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import numpy as np
import onnx
import pytest
from client_helpers import triton_client
from command_helpers import printed, refused
from export_helpers import digits, engine, exported, folder, frames
from serve_helpers import PATIENCE, Server, start, started, stop

from tetdeploy.cli.serve import Megabytes, _by_name
from tetdeploy.serve.requests import InvalidRequestError, Parameters, numbers, tensor

pytest.importorskip("uvicorn", reason="needs the extra serve")
http = triton_client("http")
rpc = triton_client("grpc")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.01)


def named_after_folders() -> Path:
    """A model whose classes have the names of folders, which are no UTF-8."""
    graph = onnx.load(exported("dynamic"))
    metadata = json.loads(graph.metadata_props[0].value)
    names = [os.fsdecode(b"caf" + bytes([0xE0 + k])) for k in range(10)]
    graph.metadata_props[0].value = json.dumps(metadata | {"class_names": names})
    path = folder() / "folders.onnx"
    onnx.save(graph, path)
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    models = {
        "step": exported("step"),
        "frames": exported("step", encoding="frames"),
        "dynamic": exported("dynamic"),
        "float": exported("step", normalize=False),
        "folders": named_after_folders(),
    }
    sizes = "--max-request-mb", "1", "--max-json-mb", "0.8"
    running = start(*(f"{name}={path}" for name, path in models.items()), *sizes, "--max-batch", "8")
    yield running
    assert stop(running) == 0


def images(count: int, offset: int = 0) -> np.ndarray[Any, Any]:
    return digits().images[offset : offset + count]


def asked(kind: Any, x: np.ndarray[Any, Any], **options: Any) -> list[Any]:
    datatype = {"uint8": "UINT8", "float32": "FP32"}[x.dtype.name]
    given = kind.InferInput("x", list(x.shape), datatype)
    given.set_data_from_numpy(x, **options)
    return [given]


def field(answer: Any, name: str) -> Any:
    """A field of the response that a stock client got."""
    got = answer.get_response()
    return got[name] if isinstance(got, dict) else getattr(got, name)


@pytest.fixture(params=["http", "http-json", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    """`infer(model, x, **options)` by a stock client."""
    kind = rpc if request.param == "grpc" else http
    options = {"binary_data": False} if request.param == "http-json" else {}
    with kind.InferenceServerClient(server.grpc if kind is rpc else server.http) as made:

        def infer(model: str, x: np.ndarray[Any, Any] | None, **keywords: Any) -> Any:
            return made.infer(model, [] if x is None else asked(kind, x, **options), **keywords)

        yield infer


@pytest.mark.parametrize(("model", "layout"), [("step", "step"), ("dynamic", "dynamic")])
def test_stock_clients_get_the_engines_answers(client: Any, model: str, layout: str) -> None:
    x = images(5)
    expected = engine(layout).run(x, 3)
    answer = client(model, x, request_id="7", parameters={"T": 3})
    assert field(answer, "id") == "7"
    np.testing.assert_allclose(answer.as_numpy("per_step"), expected.per_step, atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("logits"), expected.logits, atol=1e-5)
    assert answer.as_numpy("steps").tolist() == [3] * 5
    names = engine(layout).class_names
    assert [name.decode() for name in answer.as_numpy("class")] == [names[k] for k in expected.logits.argmax(1)]


def test_class_names_that_are_no_utf8_are_answered(client: Any) -> None:
    answer = client("folders", images(8))
    classes = answer.as_numpy("logits").argmax(1)
    assert [name.decode() for name in answer.as_numpy("class")] == [rf"caf\udce{k}" for k in classes]


def test_frames_of_an_event_camera(client: Any) -> None:
    x = frames(2, 4)
    expected = engine("step", encoding="frames").run(x)
    np.testing.assert_allclose(client("frames", x).as_numpy("per_step"), expected.per_step, atol=1e-5)


def test_images_stop_early(client: Any) -> None:
    from tetdeploy.early_exit import Exit

    x = images(8)
    full = engine("step").run(x, 6)
    p = np.exp(full.per_step[:, 0]) / np.exp(full.per_step[:, 0]).sum(1, keepdims=True)
    threshold = float(np.median(p.max(1)))
    expected = engine("step").run(x, 6, exit=Exit(threshold))
    assert len(set(expected.steps.tolist())) > 1
    answer = client("step", x, parameters={"T": 6, "early_exit": threshold})
    assert answer.as_numpy("steps").tolist() == expected.steps.tolist()
    np.testing.assert_allclose(answer.as_numpy("logits"), expected.logits, atol=1e-5)


def test_a_sequence_goes_on_where_it_was(client: Any) -> None:
    x = frames(2, 6)
    expected = engine("step", encoding="frames").run(x)
    first = [client("frames", x[k : k + 1, :2], sequence_id=k + 1, sequence_start=True) for k in range(2)]
    second = [client("frames", x[k : k + 1, 2:], sequence_id=k + 1, sequence_end=True) for k in range(2)]
    for k in range(2):
        steps = np.concatenate([part[k].as_numpy("per_step") for part in (first, second)], axis=1)
        np.testing.assert_allclose(steps[0], expected.per_step[k], atol=1e-5)
        np.testing.assert_allclose(second[k].as_numpy("logits")[0], expected.logits[k], atol=1e-5)
        assert second[k].as_numpy("steps").tolist() == [6]


def test_an_image_is_shown_again_without_being_sent(server: Server) -> None:
    x = images(1)
    expected = engine("step").run(x, 5)
    with rpc.InferenceServerClient(server.grpc) as client:
        client.infer("step", asked(rpc, x), sequence_id="mine", sequence_start=True)
        answer = client.infer("step", [], sequence_id="mine", sequence_end=True, parameters={"T": 4})
    np.testing.assert_allclose(answer.as_numpy("per_step"), expected.per_step[:, 1:], atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("logits"), expected.logits, atol=1e-5)


def test_a_sequence_does_not_go_on_where_an_output_is_unknown(server: Server) -> None:
    x = images(1)
    with rpc.InferenceServerClient(server.grpc) as client:
        client.infer("step", asked(rpc, x), sequence_id="once", sequence_start=True)
        with pytest.raises(rpc.InferenceServerException, match=r"step has no output 'probs'"):
            client.infer("step", [], sequence_id="once", outputs=[rpc.InferRequestedOutput("probs")])
        answer = client.infer("step", [], sequence_id="once", sequence_end=True)
    assert answer.as_numpy("steps").tolist() == [2]


@pytest.mark.parametrize(("kind", "address"), [(http, "http"), (rpc, "grpc")], ids=["http", "grpc"])
def test_an_output_is_asked_for_once(server: Server, kind: Any, address: str) -> None:
    twice = [kind.InferRequestedOutput("per_step")] * 2
    with (
        kind.InferenceServerClient(getattr(server, address)) as client,
        pytest.raises(kind.InferenceServerException, match="an output of step is asked for twice"),
    ):
        client.infer("step", asked(kind, images(1)), outputs=twice)


@pytest.mark.parametrize(("kind", "address"), [(http, "http"), (rpc, "grpc")], ids=["http", "grpc"])
def test_an_output_is_its_tensor_and_not_its_largest_classes(server: Server, kind: Any, address: str) -> None:
    """The extension `classification` would have been answered with logits."""
    with (
        kind.InferenceServerClient(getattr(server, address)) as client,
        pytest.raises(kind.InferenceServerException, match="unknown parameter 'classification' of the output logits"),
    ):
        client.infer("step", asked(kind, images(1)), outputs=[kind.InferRequestedOutput("logits", class_count=2)])


def test_many_clients_share_calls_and_none_gets_anothers_answer(server: Server) -> None:
    before = server.metric("tetdeploy_batch_images_count", model="dynamic")
    x = images(48)
    expected = {T: engine("dynamic").run(x, T).logits for T in (2, 3)}

    def ask(k: int) -> Any:
        with http.InferenceServerClient(server.http) as client:
            answer = client.infer("dynamic", asked(http, x[k : k + 1]), parameters={"T": 2 + k % 2})
        return answer.as_numpy("logits")[0]

    with ThreadPoolExecutor(16) as pool:
        for k, logits in enumerate(pool.map(ask, range(len(x)))):
            np.testing.assert_allclose(logits, expected[2 + k % 2][k], atol=1e-5)
    calls = server.metric("tetdeploy_batch_images_count", model="dynamic") - before
    assert 6 <= calls < len(x)


def test_metadata_and_health(server: Server) -> None:
    with http.InferenceServerClient(server.http) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("step")
        assert client.get_server_metadata()["name"] == "tetdeploy"
        described = client.get_model_metadata("frames")
    with urllib.request.urlopen(f"http://{server.http}/v2/models", timeout=PATIENCE) as answer:
        assert json.load(answer) == {"models": ["step", "frames", "dynamic", "float", "folders"]}
    assert described["inputs"] == [{"name": "x", "datatype": "UINT8", "shape": [-1, -1, 1, 8, 8]}]
    assert [(o["name"], o["shape"]) for o in described["outputs"]] == [
        ("logits", [-1, 10]),
        ("per_step", [-1, -1, 10]),
        ("steps", [-1]),
        ("class", [-1]),
    ]
    with rpc.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("step")
        assert [o.name for o in client.get_model_metadata("step").outputs] == ["logits", "per_step", "steps", "class"]


def test_metrics(server: Server) -> None:
    names = ("tetdeploy_request_seconds_count", "tetdeploy_image_steps_sum", "tetdeploy_estimated_energy_joules_total")
    before = [server.metric(name, model="step") for name in names]
    with http.InferenceServerClient(server.http) as client:
        client.infer("step", asked(http, images(3)), parameters={"T": 5})
    requests, steps, energy = (server.metric(name, model="step") - was for name, was in zip(names, before, strict=True))
    assert (requests, steps) == (1, 15)
    assert energy > 0
    assert server.metric("tetdeploy_queue_requests", model="step") == 0
    with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=PATIENCE) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")


def test_a_model_has_version_1_and_no_other(client: Any, server: Server) -> None:
    answer = client("step", images(1), model_version="1")
    np.testing.assert_allclose(answer.as_numpy("logits"), engine("step").run(images(1)).logits, atol=1e-5)
    assert field(answer, "model_version") == "1"
    with pytest.raises(Exception, match="step has the version 1 only, got '2'"):
        client("step", images(1), model_version="2")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_metadata_and_readiness_are_of_version_1(server: Server, kind: str) -> None:
    module, address = (http, server.http) if kind == "http" else (rpc, server.grpc)
    with module.InferenceServerClient(address) as client:
        described = client.get_model_metadata("step", "1")
        assert list(described["versions"] if kind == "http" else described.versions) == ["1"]
        assert client.is_model_ready("step", "1")
        with pytest.raises(module.InferenceServerException, match="version 1 only, got '01'"):
            client.get_model_metadata("step", "01")
        if kind == "http":
            assert not client.is_model_ready("step", "2")  # this client takes any refusal for an answer
        else:
            with pytest.raises(module.InferenceServerException, match="version 1 only, got '2'"):
                client.is_model_ready("step", "2")


def test_a_model_that_is_unknown_is_so_in_any_version(client: Any, server: Server) -> None:
    asks: list[Callable[[Any], Any]] = [
        lambda stub: stub.get_model_metadata("nobody", "2"),
        lambda stub: stub.is_model_ready("nobody", "2"),
    ]
    with rpc.InferenceServerClient(server.grpc) as stub:
        for ask in asks:
            with pytest.raises(rpc.InferenceServerException, match="nobody does not exist") as refused:
                ask(stub)
            assert "NOT_FOUND" in str(refused.value.status())
    with pytest.raises(Exception, match="nobody does not exist"):
        client("nobody", images(1), model_version="2")


def test_pages_that_there_are_not(server: Server) -> None:
    refused = server.metric("tetdeploy_refused_total", model="step", status="400")
    assert server.post("repository/models/step/unload", b"")[0] == 400
    assert server.metric("tetdeploy_refused_total", model="step", status="400") == refused  # nothing was asked of it
    assert server.post("models/step", b"")[0] == 405
    status, answer = server.post("nowhere", b"")
    assert status == 404 and "Not Found: POST /v2/nowhere; there are the endpoints of the Open Infer" in answer["error"]


def body(**changes: Any) -> bytes:
    """A good request as JSON, but for `changes` to its input or, with `parameters`, to these."""
    given = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": images(1).tolist()}
    parameters = changes.pop("parameters", {})
    return json.dumps({"inputs": [given | changes], "parameters": parameters}).encode()


WRONG: list[tuple[str, bytes, int, str]] = [
    ("step", b"garbage", 400, "malformed"),
    ("step", b"{}", 400, "Field required at inputs"),
    ("step", body(name="y"), 400, "takes one input, x; got y"),
    ("step", body(datatype="FP32"), 400, "takes x as UINT8, got 'FP32'"),
    ("step", body(shape=[1, 1, 8, 9]), 400, "has 72 values, got 64"),
    ("step", body(shape=[1, -1, 8, 8]), 400, "no size may be negative"),
    ("step", body(shape=[1, 2**31, 8, 8]), 400, "or more than 2147483647"),
    ("step", body(shape=[10**18] * 1000), 400, "x has a shape of 1000 axes; there may be 8"),
    ("step", body(shape=[2, 1, 8, 4]), 400, "got data nested as [1, 1, 8, 8], whose rows are others"),
    ("step", body(shape=[2, 1, 8, 4], data=[0] * 64), 400, r"takes input of shape [N, 1, 8, 8], got [2, 1, 8, 4]"),
    ("step", body(data=[[1, 2], [3]]), 400, "nested unevenly"),
    ("step", body(data=[0.5] * 64), 400, "must be numbers of uint8"),
    ("step", body(data=[256] * 64), 400, "must lie in 0..255"),
    ("step", body(data=["1"] * 64), 400, "must be numbers, got str"),
    ("step", body(data=[[1] * 32, [True] * 32]), 400, "must be numbers, got bool, int"),
    ("step", body(data=[[1], 2]), 400, "nested unevenly"),
    ("float", body(datatype="FP32", data=[float("nan")] * 64), 400, "NaN or infinite"),
    ("float", body(datatype="FP32", data=[3e38] * 64), 400, "some beyond +-1e+30"),
    ("step", body(parameters={"T": 0}), 400, "T must be at least 1"),
    ("step", body(parameters={"T": 65}), 400, "T must lie in 1..64"),
    ("step", body(parameters={"T": "4"}), 400, "T must be an integer"),
    ("step", body(parameters={"steps": 4}), 400, "unknown parameter 'steps'"),
    ("step", body(parameters={"early_exit": "0.9"}), 400, "a threshold in 0..1, got '0.9'"),
    ("step", body(parameters={"early_exit": 2}), 400, "a threshold in 0..1"),
    ("step", body(parameters={"early_exit": 10**400}), 400, "a threshold in 0..1"),
    ("step", body(parameters={"early_exit": True}), 400, "had no threshold when the server started: it takes"),
    ("dynamic", body(parameters={"early_exit": 0.9}), 400, "--layout step"),
    ("dynamic", body(parameters={"sequence_id": 1, "sequence_start": True}), 400, "--layout step"),
    ("step", body(parameters={"sequence_id": 77}), 404, "sequence 77 is not open"),
    ("step", body(parameters={"sequence_id": "a" * 257, "sequence_start": True}), 400, "a string of at most 256"),
    ("step", body(parameters={"sequence_start": True}), 400, "need a sequence_id"),
    ("step", body(shape=[9, 1, 8, 8], data=images(9).tolist()), 400, "at most 8 images"),
    ("step", b'{"inputs": [' + b",".join([b"{}"] * 150_000) + b"]}", 400, "Field required at inputs.0.name"),
    ("step", body(shape=[""] * 150_000), 400, "should be a valid integer at inputs.0.shape.0"),
    ("step", body(shape=[True, 1, 8, 8]), 400, "should be a valid integer at inputs.0.shape.0"),
    ("step", b'{"inputs": [], "outputs": [' + b",".join([b"{}"] * 150_000) + b"]}", 400, "at outputs.0.name"),
    ("step", body(parameters={str(k): [] for k in range(60_000)}), 400, "unknown parameter '0'"),
    ("nobody", body(), 404, "nobody does not exist"),
    ("step", b" " * 1_000_001, 413, "at most 1,000,000 bytes"),
    ("step", b" " * 800_001, 413, "at most 800,000 bytes of numbers one by one"),
    ("step", body(parameters={"binary_data_output": "yes"}), 400, "binary_data_output must be true or false"),
    ("step", b'{"inputs": [], "outputs": [%s]}' % b",".join([b'{"name": ""}'] * 17), 400, "at most 16 items"),
]


@pytest.mark.parametrize(("model", "wrong", "status", "message"), WRONG, ids=[case[3] for case in WRONG])
def test_what_is_wrong_with_a_request_is_said(
    server: Server, model: str, wrong: bytes, status: int, message: str
) -> None:
    got, answer = server.post(f"models/{model}/infer", wrong, **{"Content-Type": "application/json"})
    assert (got, set(answer)) == (status, {"error"})
    assert message in answer["error"]
    assert "Traceback" not in answer["error"]


def test_what_is_wrong_a_hundred_thousand_times_takes_no_longer_to_say(server: Server) -> None:
    """A megabyte of bad entries would have stopped the server for half a minute."""
    wrong = b'{"inputs": [' + b",".join([b"{}"] * 150_000) + b"]}"
    start = time.monotonic()
    for _ in range(3):
        assert server.post("models/step/infer", wrong)[0] == 400
    assert time.monotonic() - start < 6  # 4 s each before, on a machine that was busy otherwise


def test_a_request_that_offers_to_upgrade_keeps_its_body(server: Server) -> None:
    """As Java's client does, and curl --http2. A body that comes later is no request of its own."""
    host, port = server.http.split(":")
    sent = body()
    head = (
        f"POST /v2/models/step/infer HTTP/1.1\r\nHost: {server.http}\r\nContent-Length: {len(sent)}\r\n"
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
    ).encode()
    for parts in ([head + sent], [head, sent]):
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(0.1)
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_binary_requests_that_do_not_fit_their_header(server: Server) -> None:
    def post(size: int | str, sent: bytes, length: int | str | None = None) -> tuple[int, str]:
        given = {"name": "x", "shape": [1, 1, 8, 8], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [given]}).encode()
        header = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
        status, answer = server.post("models/step/infer", head + sent, **header)
        return status, answer.get("error", "")

    assert post(64, bytes(64)) == (200, "")
    assert post(64, bytes(63)) == (400, "input x has binary_data_size 64, but 63 bytes follow")
    assert post("64", bytes(64)) == (400, "input x has binary_data_size '64', but 64 bytes follow")
    assert post(60, bytes(60))[1] == "x of shape [1, 1, 8, 8] has 64 values, got 60"
    assert post(64, bytes(70)) == (400, "6 bytes follow the JSON that belong to no input")
    assert post(64, bytes(64), length=10**6)[0] == 400
    assert post(64, bytes(64), length="9" * 5000)[0] == 400


def test_a_refusal_repeats_no_more_of_a_request_than_a_header_holds(server: Server) -> None:
    with rpc.InferenceServerClient(server.grpc) as client, pytest.raises(rpc.InferenceServerException) as refused:
        client.infer("step", asked(rpc, images(1)), parameters={"\N{ALEMBIC}" * 20_000: 1})
    assert "INVALID_ARGUMENT" in str(refused.value.status()) and "unknown parameter" in refused.value.message()
    status, answer = server.post("models/step/infer", body(parameters={"T": "A" * 20_000}))
    assert status == 400 and len(answer["error"]) == 600


def test_binary_outputs_of_a_request_are_also_those_that_it_names(server: Server) -> None:
    sent = json.loads(body(parameters={"binary_data_output": True}))
    sent["outputs"] = [{"name": "logits"}, {"name": "steps", "parameters": {"binary_data": False}}]
    request = urllib.request.Request(f"http://{server.http}/v2/models/step/infer", json.dumps(sent).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        length, got = int(answer.headers["Inference-Header-Content-Length"]), answer.read()
    logits, steps = json.loads(got[:length])["outputs"]
    assert "data" not in logits and steps["data"] == [engine("step").metadata["trained_T"]]
    expected = engine("step").run(images(1)).logits
    np.testing.assert_allclose(np.frombuffer(got[length:], np.float32).reshape(1, 10), expected, atol=1e-5)


def test_calls_whose_deadline_passes_are_counted() -> None:
    running = start(f"step={exported('step')}", "--max-wait-ms", "60000")
    try:
        left = {"model": "step", "status": "499"}
        request = grpc_request()
        request.inputs.add(name="x", datatype="UINT8", shape=[1, 1, 8, 8])
        request.raw_input_contents.append(bytes(64))
        with rpc.grpc.insecure_channel(running.grpc) as channel:
            infer, seconds, waits = rpc.service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer, 0.5, False
            while not waits:  # the deadline may pass before the server has read the request
                call = infer.future(request, timeout=seconds)
                while not (waits or call.done()):
                    waits = running.metric("tetdeploy_queue_requests", model="step") == 1
                seconds *= 4
            assert call.exception(PATIENCE).code() is rpc.grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: running.metric("tetdeploy_refused_total", **left) >= 1)
        assert running.metric("tetdeploy_queue_requests", model="step") == 0
        host, port = running.http.split(":")
        passed = running.metric("tetdeploy_refused_total", **left)
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as web:
            head = f"POST /v2/models/step/infer HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body())}\r\n\r\n"
            web.sendall(head.encode() + body())
            wait_until(lambda: running.metric("tetdeploy_queue_requests", model="step") == 1)
        wait_until(lambda: running.metric("tetdeploy_refused_total", **left) == passed + 1)
        assert running.metric("tetdeploy_queue_requests", model="step") == 0
        assert running.metric("tetdeploy_request_seconds_count", model="step") == 0
    finally:
        assert stop(running) == 0


def test_refusals_over_grpc_have_their_codes(server: Server) -> None:
    def code(model: str, x: Any, **keywords: Any) -> str:
        with rpc.InferenceServerClient(server.grpc) as client, pytest.raises(rpc.InferenceServerException) as refused:
            client.infer(model, asked(rpc, x), **keywords)
        return str(refused.value.status()).removeprefix("StatusCode.")

    def counts() -> list[float]:
        labels = [("unknown", "404"), ("step", "404"), ("step", "400"), ("float", "400"), ("unknown", "413")]
        return [server.metric("tetdeploy_refused_total", model=model, status=status) for model, status in labels]

    before = counts()
    assert code("nobody", images(1)) == "NOT_FOUND"
    assert code("step", images(1), sequence_id=78) == "NOT_FOUND"
    assert code("step", images(1)[..., :4]) == "INVALID_ARGUMENT"
    assert code("float", np.full((1, 1, 8, 8), np.nan, np.float32)) == "INVALID_ARGUMENT"
    assert code("step", images(1), parameters={"T": 0}) == "INVALID_ARGUMENT"
    assert code("step", np.zeros((16_000, 1, 8, 8), np.uint8)) == "RESOURCE_EXHAUSTED"  # by gRPC, which counts nothing
    request = grpc_request()
    request.inputs.add().contents.uint_contents.extend([7] * 800_000)
    assert grpc_refusal(server, request)[0] == "RESOURCE_EXHAUSTED"
    np.testing.assert_array_equal(np.subtract(counts(), before), [1, 1, 2, 1, 1])


def grpc_request() -> Any:
    return rpc.service_pb2.ModelInferRequest(model_name="step")


def grpc_answer(server: Server, request: Any, call: str = "ModelInfer") -> Any:
    with rpc.grpc.insecure_channel(server.grpc) as channel:
        return getattr(rpc.service_pb2_grpc.GRPCInferenceServiceStub(channel), call)(request, timeout=PATIENCE)


def grpc_refusal(server: Server, request: Any, call: str = "ModelInfer") -> tuple[str, str]:
    with pytest.raises(rpc.grpc.RpcError) as refused:
        grpc_answer(server, request, call)
    return refused.value.code().name, refused.value.details()


# Text, an integer and a float in the field of Triton's double; text in that of its unsigned integer.
@pytest.mark.parametrize("sent", [b"\x22\x03abc", b"\x20\x05", b"\x25\x00\x00\x00\x00", b"\x2a\x03abc"])
def test_a_parameter_of_no_known_type_is_refused(server: Server, sent: bytes) -> None:
    """No error of the server's own, and no nonsense number."""
    request = grpc_request()
    request.parameters["T"].ParseFromString(sent)
    code, message = grpc_refusal(server, request)
    assert code == "INVALID_ARGUMENT" and "parameter T has no value of a type that is known here" in message


def test_unsigned_parameters(server: Server) -> None:
    """Ids from 2^63 on fit nothing else."""
    request = grpc_request()
    request.inputs.add(name="x", datatype="UINT8", shape=[1, 1, 8, 8])
    request.raw_input_contents.append(bytes(64))
    request.parameters["sequence_id"].uint64_param = 2**64 - 1
    request.parameters["sequence_start"].bool_param = request.parameters["sequence_end"].bool_param = True
    request.parameters["T"].uint64_param = 3
    logits = grpc_answer(server, request).outputs[0]
    assert logits.shape == [1, 10] and logits.parameters["binary_data_size"].int64_param == 40
    request.parameters["priority"].uint64_param = 1
    code, message = grpc_refusal(server, request)
    assert code == "INVALID_ARGUMENT" and "unknown parameter 'priority'" in message


def test_a_message_names_no_more_outputs_than_there_may_be(server: Server) -> None:
    request = grpc_request()
    for _ in range(17):
        request.outputs.add()
    code, message = grpc_refusal(server, request)
    assert code == "INVALID_ARGUMENT" and "may name 16 outputs, got 17" in message


@pytest.mark.parametrize("call", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_models_are_not_loaded_over_grpc(server: Server, call: str) -> None:
    request = getattr(rpc.service_pb2, f"{call}Request")(model_name="step")
    code, message = grpc_refusal(server, request, call)
    assert code == "INVALID_ARGUMENT" and "neither loaded nor unloaded" in message


@pytest.mark.parametrize("call", ["ModelConfig", "ModelStatistics", "RepositoryIndex"])
def test_what_is_not_offered_over_grpc_is_unimplemented(server: Server, call: str) -> None:
    """Triton's service has more calls than the protocol."""
    request = getattr(rpc.service_pb2, f"{call}Request")()
    assert grpc_refusal(server, request, call)[0] == "UNIMPLEMENTED"


def test_the_standard_probe_of_grpc(server: Server) -> None:
    """A `HealthCheckRequest` has one field, `string service = 1`; the answer `ServingStatus status = 1`."""
    with rpc.grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert [call(service, timeout=PATIENCE) for service in (b"", b"\x0a\x04step")] == [b"\x08\x01"] * 2
        with pytest.raises(rpc.grpc.RpcError) as refused:
            call(b"\x0a\x06nobody", timeout=PATIENCE)
        assert refused.value.code().name == "NOT_FOUND"


def test_numbers_one_by_one_are_bounded_over_grpc(server: Server) -> None:
    request = grpc_request()
    x = request.inputs.add(name="x", datatype="UINT8", shape=[1, 1, 8, 8])
    x.contents.uint_contents.extend([7] * 64)
    assert grpc_answer(server, request).outputs[0].shape == [1, 10]
    x.contents.uint_contents.extend([7] * 800_000)
    code, message = grpc_refusal(server, request)
    assert code == "RESOURCE_EXHAUSTED" and "at most 800,000 bytes of numbers one by one" in message
    request = grpc_request()
    request.inputs.add(name="x", datatype="UINT8", shape=[1] * 800_000)
    request.raw_input_contents.append(bytes(64))
    code, message = grpc_refusal(server, request)
    assert code == "RESOURCE_EXHAUSTED" and "at most 800,000 bytes of numbers one by one" in message


def test_raw_bytes_are_not_numbers_one_by_one(server: Server) -> None:
    x = np.zeros((14_000, 1, 8, 8), np.uint8)  # 0.9 MB
    with http.InferenceServerClient(server.http) as web, rpc.InferenceServerClient(server.grpc) as client:
        for kind, asking in ((http, web), (rpc, client)):
            with pytest.raises(kind.InferenceServerException, match="at most 8 images"):
                asking.infer("step", asked(kind, x))


def test_a_message_of_many_fields_is_refused_before_it_is_parsed(server: Server) -> None:
    """Half a million empty inputs in 0.9 MB."""
    with rpc.grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for sent, said in (
            (b"\x2a\x00" * 450_000, "a message may have 96 fields"),
            (b"no message", "is no ModelInferRequest"),
        ):
            with pytest.raises(rpc.grpc.RpcError) as refused:
                call(b"\x0a\x04step" + sent, timeout=PATIENCE)
            assert refused.value.code().name == "INVALID_ARGUMENT" and said in refused.value.details()


def test_a_sequence_ends_once(client: Any) -> None:
    client("step", images(1), sequence_id=9, sequence_start=True, sequence_end=True)
    with pytest.raises(Exception, match="sequence 9 is not open"):
        client("step", images(1), sequence_id=9, sequence_end=True)


def test_clients_that_leave_do_no_harm(server: Server) -> None:
    host, port = server.http.split(":")
    head = f"POST /v2/models/step/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for sent in (
        head.encode(),  # half a header
        (head + "Content-Length: 1000\r\n\r\n{").encode(),  # half a body
        (head + f"Content-Length: {len(body())}\r\n\r\n").encode() + body(),  # all of it, and no ear for the answer
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ):
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(sent)
    assert server.post("models/step/infer", body())[0] == 200


def test_full_queues_refuse_and_sigterm_finishes_what_was_taken() -> None:
    running = start(f"step={exported('step')}", "--max-wait-ms", "60000", "--max-batch", "8", "--queue", "3")
    expected = engine("step").run(images(3)).logits
    answers: dict[int, Any] = {}

    def ask(k: int) -> None:
        with http.InferenceServerClient(running.http, network_timeout=PATIENCE) as client:
            answers[k] = client.infer("step", asked(http, images(1, k))).as_numpy("logits")[0]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(3)]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: running.metric("tetdeploy_queue_requests", model="step") == 3)
        status, answer = running.post("models/step/infer", body())
        assert (status, "the queue holds 3" in answer["error"]) == (503, True)
        with (
            rpc.InferenceServerClient(running.grpc) as client,
            pytest.raises(rpc.InferenceServerException, match="the queue holds 3") as refused,
        ):
            client.infer("step", asked(rpc, images(1)))
        assert "RESOURCE_EXHAUSTED" in str(refused.value.status())
        assert not answers
    finally:
        code = stop(running)
    for thread in threads:
        thread.join(PATIENCE)
    assert code == 0
    np.testing.assert_allclose([answers[k] for k in range(3)], expected, atol=1e-5)


# Leaves once it is told that all know, rather than after a time in which a machine may have been busy otherwise.
LEAVING = """
import asyncio, sys
from types import SimpleNamespace
from tetdeploy.cli import main
from tetdeploy.serve import server
async def sleep(seconds):
    await (asyncio.to_thread(sys.stdin.readline) if seconds == server.LEAVING_SECONDS else asyncio.sleep(seconds))
server.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
main(sys.argv[1:])
"""


def test_clients_are_told_of_the_stop_before_connections_close() -> None:
    """A client tries another server after a 503 or UNAVAILABLE, and not after a reset or CANCELLED."""
    command = [sys.executable, "-c", LEAVING, "serve", f"step={exported('step')}", "--http-port", "0"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = started(subprocess.Popen([*command, "--grpc-port", "0", "--threads", "1"], **pipes))
    outcomes: list[str] = []

    def ask_on(kind: Any, address: str) -> None:
        with kind.InferenceServerClient(address) as client:
            while True:
                try:
                    client.infer("step", asked(kind, images(1)))
                except kind.InferenceServerException as error:
                    return outcomes.append(str(error.status()))
                except OSError as error:
                    return outcomes.append(f"{error}")

    clients = [(http, running.http), (rpc, running.grpc)] * 8
    threads = [threading.Thread(target=ask_on, args=client) for client in clients]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: running.metric("tetdeploy_request_seconds_count", model="step") > 100)
        running.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        with running.process.stdin as all_were_told:
            all_were_told.write("\n")
        code = stop(running)
    assert code == 0
    assert sorted(outcomes) == ["503"] * 8 + ["StatusCode.UNAVAILABLE"] * 8


PROGRAM = """
import sys, time
from tetdeploy.cli import main
from tetdeploy.engine import Engine
from tetdeploy.serve import server
server.GRACE_SECONDS, server.CALL_SECONDS, seconds = map(float, sys.argv[1:4])
ran = Engine.run
def run(*given, **options):
    print("running", flush=True)
    sys.stdin.readline() if seconds < 0 else time.sleep(seconds)
    return ran(*given, **options)
Engine.run = run
main(sys.argv[4:])
"""


def start_slow(*options: str, grace: float = 1, call: float = 1, seconds: float = 0) -> Server:
    """A server of so little grace, whose calls take so long, and may do so for `call` after the grace; of less than no
    `seconds`, until a line comes to its standard input."""
    command = [sys.executable, "-c", PROGRAM, *map(str, (grace, call, seconds)), "serve", f"step={exported('step')}"]
    command += ["--http-port", "0", "--grpc-port", "0", "--threads", "1", *options]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return started(subprocess.Popen(command, **pipes, text=True))


def sending(running: Server, sent: bytes, length: int) -> socket.socket:
    """A connection on which the first bytes of a body of such a length were sent."""
    host, port = running.http.split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    head = f"POST /v2/models/step/infer HTTP/1.1\r\nHost: m\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def wait_for_call(running: Server) -> None:
    assert running.process.stdout is not None and running.process.stdout.readline() == "running\n"


def test_what_the_grace_does_not_suffice_for_is_told_so() -> None:
    running = start_slow(call=60, seconds=-1)
    with sending(running, body(), len(body())) as client:
        wait_for_call(running)
        running.process.send_signal(signal.SIGTERM)
        with client.makefile() as told:
            answer = told.read()
    _, log = running.process.communicate("\n", timeout=2 * PATIENCE)
    assert answer.startswith("HTTP/1.1 503") and "could not finish this in time" in answer
    assert running.process.returncode == 1
    assert "stopped, but 1 of the requests taken could not be answered in time" in log and "Traceback" not in log


@pytest.mark.parametrize("stays", [True, False], ids=["its client waits", "its client has left"])
def test_a_call_that_never_ends_does_not_keep_the_server(stays: bool) -> None:
    running = start_slow(call=0.2, seconds=600)
    try:
        with sending(running, body(), len(body())) as client:
            wait_for_call(running)
            if not stays:
                client.close()
            running.process.send_signal(signal.SIGTERM)
            if stays:
                assert client.recv(65_536).startswith(b"HTTP/1.1 503")
            _, log = running.process.communicate(timeout=PATIENCE)
    finally:
        running.process.kill()
    assert running.process.returncode == 1
    assert f"stopped in the middle of a call of step; {int(stays)} of the requests taken could not be answered" in log


def test_a_body_that_is_half_sent_does_not_keep_the_server() -> None:
    running = start_slow(grace=600)
    with sending(running, b"{", 9) as half:
        running.post("models/step/infer", body())  # by now the half of a body has come
        running.process.send_signal(signal.SIGTERM)
        with half.makefile() as told:
            answer = told.read()
    _, log = running.process.communicate(timeout=PATIENCE)
    assert answer.startswith("HTTP/1.1 503") and "connection: close" in answer
    assert (running.process.returncode, log) == (0, "")


def test_an_answer_that_is_not_read_to_its_end_is_cut_off() -> None:
    running = start_slow("--max-T", "600")
    host, port = running.http.split(":")
    sent = body(shape=[64, 1, 8, 8], data=images(64).ravel().tolist(), parameters={"T": 600})
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(f"POST /v2/models/step/infer HTTP/1.1\r\nHost: m\r\nContent-Length: {len(sent)}\r\n\r\n".encode())
        slow.sendall(sent)
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        running.process.send_signal(signal.SIGTERM)
        _, log = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 1
    assert "stopped, but 1 of the requests taken could not be answered in time" in log


DEAF = """
import os, signal, sys
import grpc
from tritonclient.grpc import service_pb2
options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]
channel = grpc.insecure_channel(sys.argv[1], options=options)
grpc.channel_ready_future(channel).result()
request = service_pb2.ModelInferRequest(model_name="step", raw_input_contents=[bytes(64 * 64)])
request.inputs.add(name="x", datatype="UINT8", shape=[64, 1, 8, 8])
request.parameters["T"].int64_param = 600
call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
answer = call.future(request.SerializeToString())
print("sent", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_an_answer_that_is_not_read_over_grpc_is_cut_off() -> None:
    running = start_slow("--max-T", "600")
    with subprocess.Popen([sys.executable, "-c", DEAF, running.grpc], stdout=subprocess.PIPE, text=True) as deaf:
        try:
            wait_until(lambda: running.metric("tetdeploy_request_seconds_count", model="step") == 1)
            running.process.send_signal(signal.SIGTERM)
            _, log = running.process.communicate(timeout=PATIENCE)
        finally:
            deaf.kill()
    assert running.process.returncode == 1
    assert "stopped, but 1 of the requests taken could not be answered in time" in log


def test_half_bodies_leave_memory_for_no_more_than_the_budget() -> None:
    running = start(f"step={exported('step')}", "--max-request-mb", "1", "--max-total-mb", "1.2")
    host, port = running.http.split(":")
    large = np.zeros((14_000, 1, 8, 8), np.uint8)  # 0.9 MB, and more images than a batch

    def refusal(ask: Callable[[], Any]) -> str:
        with pytest.raises(Exception) as refused:  # noqa: PT011  of two clients, each with classes of its own
            ask()
        return f"{refused.value}"

    try:
        with (
            http.InferenceServerClient(running.http) as web,
            rpc.InferenceServerClient(running.grpc) as client,
            socket.create_connection((host, int(port)), timeout=PATIENCE) as half,
        ):
            asks = [lambda: web.infer("step", asked(http, large)), lambda: client.infer("step", asked(rpc, large))]
            assert all("at most 64 images" in refusal(ask) for ask in asks)
            half.sendall(
                b"POST /v2/models/step/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 900000\r\n\r\n" + bytes(899_999)
            )
            # By gRPC, whose requests come whole: one over HTTP could have the half one refused in its place.
            wait_until(lambda: "may hold 1,200,000 bytes and hold 899,999 already" in refusal(asks[1]))
            assert "RESOURCE_EXHAUSTED" in refusal(asks[1])
            assert "may hold 1,200,000 bytes and hold" in refusal(asks[0])
            assert len(client.infer("step", asked(rpc, images(1))).as_numpy("logits")) == 1  # there is room for this
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as rest:
                rest.sendall(
                    b"POST /v2/models/step/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 400000\r\n\r\n" + bytes(300_000)
                )
                wait_until(lambda: "hold 1,199,999 already" in refusal(asks[1]))
                assert client.is_server_live() and client.is_model_ready("step")  # probes need no room
            half.close()
            wait_until(lambda: "at most 64 images" in refusal(asks[1]))
    finally:
        assert stop(running) == 0


def test_idle_sequences_end() -> None:
    running = start(f"step={exported('step')}", "--sequence-timeout", "0.2", "--queue", "1")
    try:
        start_one = {"sequence_id": 1, "sequence_start": True}
        assert running.post("models/step/infer", body(parameters=start_one))[0] == 200
        wait_until(lambda: not running.metric("tetdeploy_open_sequences", model="step"))
        status, answer = running.post("models/step/infer", body(parameters={"sequence_id": 1}))
        assert (status, "idle for more than 0.2 s" in answer["error"]) == (404, True)
        status, answer = running.post("models/step/infer", body(parameters={**start_one, "T": 2}))
        assert (status, "at most 1 steps" in answer["error"]) == (400, True)
    finally:
        assert stop(running) == 0


def test_ctrl_c_once_more_ends_the_server_at_once() -> None:
    running = start_slow(grace=30, seconds=600)
    host, port = running.http.split(":")
    with sending(running, body(), len(body())):
        wait_for_call(running)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(host, int(port)))
        for number in (signal.SIGTERM, signal.SIGHUP):  # once more, and still what was taken is finished
            running.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.3)
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 130


def accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


def test_only_this_machine_is_served_by_default(server: Server) -> None:
    assert server.http.startswith("127.0.0.1:") and server.grpc.startswith("127.0.0.1:")


@pytest.mark.parametrize("which", ["http", "grpc"])
def test_a_port_in_use_is_said(server: Server, which: str) -> None:
    port = getattr(server, which).rpartition(":")[2]
    other = "grpc" if which == "http" else "http"
    command = [sys.executable, "-m", "tetdeploy", "serve", str(exported("step")), f"--{which}-port", port]
    done = subprocess.run([*command, f"--{other}-port", "0"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr
    assert f"; choose another --{which}-port or --host" in done.stderr


def test_a_total_below_one_request_is_refused() -> None:
    output = refused("serve", exported("step"), "--max-total-mb", "10")
    assert "raise --max-total-mb or lower --max-request-mb" in output


@pytest.mark.parametrize("option", ["--max-request-mb", "--max-total-mb"])
@pytest.mark.parametrize("size", ["inf", "nan", "1e-7", "0", "-1", "1e303"])
def test_a_size_that_is_none_is_refused(option: str, size: str) -> None:
    output = refused("serve", "m.onnx", option, size, code=2)
    assert f"Invalid value for '{option}': " in output
    refusals = (f"{size} MB is no size; give a number from 0.000001", "is not in the range x>0", "range 0<x<=2000")
    refusals += (f"{size} is no number to calculate with",)
    assert any(refusal in output for refusal in refusals)


def test_sizes_are_whole_bytes() -> None:
    assert Megabytes().convert("4.35", None, None) == 4_350_000
    assert Megabytes(max=2000).convert("0.000001", None, None) == 1
    assert type(Megabytes().convert("1.5", None, None)) is int


def test_an_unknown_runtime_is_refused() -> None:
    output = refused("serve", exported("step"), "--runtime", "abacus")
    assert "Error: unknown runtime 'abacus'; choose one of onnxruntime, openvino" in output


def test_two_models_of_one_name_are_refused() -> None:
    assert "two models are called step" in refused("serve", exported("step"), f"step={exported('dynamic')}")


def test_a_path_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    for path in ("lr=0.1/step.onnx", "a=b.onnx"):
        Path(path).touch()
    given = ("digits=lr=0.1/step.onnx", "lr=0.1/step.onnx", "a=b.onnx", "y.onnx")
    assert _by_name(given) == {
        "digits": "lr=0.1/step.onnx",
        "step": "lr=0.1/step.onnx",
        "a=b": "a=b.onnx",
        "y": "y.onnx",
    }


def test_a_name_that_no_url_reaches_is_refused() -> None:
    assert "'a/b' is no name for a model" in refused("serve", f"a/b={exported('step')}")


def test_a_name_that_is_empty_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"there is no name before the = of '=x.onnx'; give NAME=MODEL, or MODEL alone"
    ):
        _by_name(("=x.onnx",))


def test_a_file_whose_name_is_no_utf8_is_served_by_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = os.fsdecode(b"caf\xe9.onnx")
    message = r"'caf\\udce9' is no name for a model, since a URL holds UTF-8; give it another: NAME="
    for named in (file, f"{Path(file).stem}=x.onnx"):
        with pytest.raises(ValueError, match=message):
            _by_name((named,))
    assert _by_name((f"cafe={file}",)) == {"cafe": file}


def test_the_url_that_is_announced_is_one_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*arguments: Any, announce: Callable[[str, str], None], **options: Any) -> None:
        announce("127.0.0.1:1", "127.0.0.1:2")

    monkeypatch.setattr("tetdeploy.serve.server.serve", serve)
    assert "http://127.0.0.1:1/v2/models/a%20b%3Fc/infer" in printed("serve", f"a b?c={exported('step')}")


@pytest.mark.parametrize(
    ("asked", "left", "said"),
    [("1", 2, "   1 thread   "), (None, 2, "   2 threads   "), (None, None, "   all cores   ")],
)
def test_the_threads_are_announced(
    asked: str | None, left: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*arguments: Any, announce: Callable[[str, str], None], **options: Any) -> None:
        announce("127.0.0.1:1", "127.0.0.1:2")

    monkeypatch.setattr("tetdeploy.serve.server.serve", serve)
    monkeypatch.setattr("tetdeploy.system.machine.default_threads", lambda: left)
    options = [] if asked is None else ["--threads", asked]
    assert said in printed("serve", exported("step"), *options)


def test_an_address_of_ipv6_is_one_to_ask() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    running = start(f"step={exported('step')}", "--host", "::1")
    try:
        assert running.http.startswith("[::1]:") and running.grpc.startswith("[::1]:")
        assert json.loads(urllib.request.urlopen(f"http://{running.http}/v2/health/ready", timeout=PATIENCE).read())
        with rpc.InferenceServerClient(running.grpc) as client:
            assert client.infer("step", asked(rpc, images(1))).as_numpy("logits").shape == (1, 10)
    finally:
        assert stop(running) == 0


def test_a_stop_is_graceful_though_nobody_reads_of_it() -> None:
    """As of `tetdeploy serve MODEL | tee log`, of which Ctrl-C ends `tee` first: the exit code was 1."""
    running = start(f"step={exported('step')}")
    assert running.process.stdout is not None
    running.process.stdout.close()
    assert stop(running) == 0


def test_a_stop_while_models_are_loaded_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tetdeploy.engine.open_engine", load)
    assert printed("serve", exported("step")) == "stopped before it was ready\n"


def test_says_what_makes_it_slower_than_it_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*arguments: Any, announce: Callable[[str, str], None], **options: Any) -> None:
        announce("127.0.0.1:1", "127.0.0.1:2")

    monkeypatch.setitem(
        sys.modules, "tetdeploy.serve.server", SimpleNamespace(serve=serve, Address=lambda *given: given)
    )
    monkeypatch.setenv("TETDEPLOY_NATIVE", "0")
    small = printed("serve", f"small={exported('step')}")
    assert "ready: " in small and "slower" not in small
    monkeypatch.setattr("tetdeploy.runtimes.sessions.NATIVE_FROM", 1)
    large = printed("serve", f"large={exported('step')}")
    assert "large is slower than it could be: the native operator is switched off by TETDEPLOY_NATIVE=0" in large


def test_every_option_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    from tetdeploy.serve.bodies import Sizes
    from tetdeploy.serve.models import Bounds
    from tetdeploy.serve.scheduler import Limits
    from tetdeploy.serve.server import Address

    opened, serve = Mock(), AsyncMock(return_value=0)
    monkeypatch.setattr("tetdeploy.engine.open_engine", opened)
    monkeypatch.setattr("tetdeploy.serve.server.serve", serve)
    command = (
        "serve m.onnx --host [::1] --http-port 1 --grpc-port 2 --max-batch 3 --max-wait-ms 4 --queue 5 "
        "--max-request-mb 6 --max-json-mb 7 --max-total-mb 8 --max-T 9 --sequence-timeout 10 --max-sequences 11 "
        "--max-state-mb 12 --device cuda --runtime openvino --threads 13"
    )
    printed(*command.split())
    opened.assert_called_once_with("m.onnx", device="cuda", threads=13, runtime="openvino")
    engines, *given = serve.call_args.args
    assert engines == {"m": opened.return_value}
    assert given == [Address("::1", 1, 2), Limits(3, 0.004, 5), Bounds(9, 10, 11, 12_000_000)]
    assert serve.call_args.kwargs["sizes"] == Sizes(6_000_000, 7_000_000, 8_000_000)
    assert serve.call_args.kwargs["threads"] == 13
    printed("serve", "m.onnx")
    assert serve.call_args.args[2] == Limits()


@pytest.mark.slow
def test_the_load_script_measures_and_gets_right_answers_only(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "serve_load.py"
    options = ["--clients", "1,4", "--seconds", "1", "--threads", "1", "--json", str(tmp_path / "load.json")]
    command = [sys.executable, str(script), str(exported("step")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [row["clients"] for row in rows] == [1, 4]
    assert all(set(row["outcomes"]) == {"right"} and row["images_per_s"] > 0 for row in rows)
    assert 1 <= rows[1]["mean_batch"] <= 4


def test_parameters_of_a_sequence() -> None:
    assert Parameters.parse({"sequence_id": 0, "T": 3}) == Parameters(T=3)
    assert Parameters.parse({"sequence_id": "a", "sequence_end": True}).sequence_id == "a"
    assert Parameters.parse({"early_exit": 0.5}).early_exit == 0.5
    with pytest.raises(ValueError, match="early_exit is for whole requests"):
        Parameters.parse({"sequence_id": 1, "early_exit": True})


def test_raw_tensors_are_not_copied() -> None:
    raw = bytes(range(64))
    made = tensor("x", "UINT8", [1, 1, 8, 8], memoryview(raw), np.dtype(np.uint8))
    assert np.shares_memory(made, np.frombuffer(raw, np.uint8))


def test_a_long_string_among_numbers_takes_no_memory() -> None:
    data = ["a" * 5_000, *[""] * 4_999]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match="must be numbers, got str"):
            numbers("x", data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000  # numpy's own would be 100 MB


def test_numbers_are_read_whose_nesting_has_axes_merged_or_split() -> None:
    x = np.arange(64, dtype=np.uint8).reshape(2, 4, 8)
    for shape in ((2, 4, 8), (64,), (1, 64), (8, 8), (2, 1, 2, 2, 8)):
        data = x.reshape(shape).tolist()
        np.testing.assert_array_equal(tensor("x", "UINT8", [2, 4, 8], numbers("x", data), x.dtype), x)


def test_numbers_whose_nesting_is_of_another_order_are_refused() -> None:
    """Of images with the channels last the values would come to stand in other places."""
    x = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 8, 8\] got data nested as \[2, 8, 8, 3\], whose rows are oth"):
        tensor("x", "UINT8", [2, 3, 8, 8], numbers("x", x.tolist()), x.dtype)
    assert tensor("x", "UINT8", [0, 3, 8, 8], numbers("x", [[]]), x.dtype).shape == (0, 3, 8, 8)
