"""Where the server listens, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from export_helpers import exported
from serve_helpers import PATIENCE, started, stop

pytest.importorskip("uvicorn", reason="needs the extra serve")
import grpc
from prometheus_client import CollectorRegistry
from starlette.responses import Response
from uvicorn.server import ServerState

from tetdeploy.engine import Engine
from tetdeploy.serve import rpc, server
from tetdeploy.serve.bodies import LARGE, Budget, Sizes
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.models import Bounds
from tetdeploy.serve.protocol import Models
from tetdeploy.serve.rpc import Inferences, grpc_server
from tetdeploy.serve.scheduler import Limits
from tetdeploy.serve.server import KEEP_ALIVE_SECONDS, Address
from tetdeploy.system.signals import handled


def reached(family: int, address: str, port: int) -> bool:
    with socket.socket(family) as client:
        return client.connect_ex((address, port)) == 0


def test_an_empty_host_is_not_every_interface() -> None:
    """As which sockets take it: `--host "$HOST"` of a variable that is not set."""
    with pytest.raises(ValueError, match=r"--host is empty; name an interface, or :: for all"):
        Address("", 0, 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "v6"), [("::", True), ("0.0.0.0", False), ("localhost", False)])
def test_what_a_host_stands_for(host: str, v6: bool) -> None:
    with server._listening(Address(host, 0, 0)) as listener:
        port = listener.getsockname()[1]
        assert reached(socket.AF_INET, "127.0.0.1", port)
        assert reached(socket.AF_INET6, "::1", port) is v6


def test_without_ipv6_every_interface_is_all_of_ipv4(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with server._listening(Address("::", 0, 0)) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    assert "this machine has no IPv6" in caplog.text


def test_grpc_listens_where_http_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take `localhost` for IPv6 too."""
    asked: list[str] = []

    class Rpc:
        def add_insecure_port(self, where: str) -> int:
            asked.append(where)
            return 7

        async def start(self) -> None:
            pass

    for host in ("127.0.0.1", "::1"):
        assert asyncio.run(server._start_grpc(Rpc(), Address("localhost", 0, 7), host)) == 7  # type: ignore[arg-type]
    assert asked == ["127.0.0.1:7", "[::1]:7"]


@pytest.mark.parametrize(("patient", "cut_off"), [(True, 0), (False, 2)])
def test_calls_that_grpc_cancelled_itself_were_not_cut_off(
    patient: bool, cut_off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their handlers end a moment after the server has stopped."""
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.05)

    class Rpc:
        async def stop(self, grace: float | None) -> None:
            await asyncio.sleep(0 if patient else 0.1)

    inferences: Any = SimpleNamespace(running=2, stopping=False)
    assert asyncio.run(server._stop_grpc(Rpc(), inferences)) == cut_off  # type: ignore[arg-type]
    assert inferences.stopping


def test_answers_wait_for_no_acknowledgement() -> None:
    with server._listening(Address("127.0.0.1", 0, 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        answering, _ = listener.accept()
        with client, answering:
            assert answering.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_connection_that_was_reset_is_let_go_of_at_once() -> None:
    """uvicorn cancels the timer of an idle connection only where its client closes it in order."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response("")(scope, receive, send)

    async def waits_for_the_timer(error: Exception | None) -> bool:
        config = server._http_server(app).config
        protocol = server._H11(config, ServerState(), {})
        protocol.connection_made(Mock(get_extra_info=Mock(return_value=None), is_closing=Mock(return_value=False)))
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        while protocol.timeout_keep_alive_task is None:
            await asyncio.sleep(0)
        timer = protocol.timeout_keep_alive_task
        protocol.connection_lost(error)
        return not timer.cancelled()

    assert not asyncio.run(waits_for_the_timer(None))
    assert not asyncio.run(waits_for_the_timer(ConnectionResetError()))


def test_connections_stay_open_for_as_long_as_is_said() -> None:
    async def app(*given: Any) -> None:
        pass

    assert server._http_server(app).config.timeout_keep_alive == KEEP_ALIVE_SECONDS
    document = " ".join((Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").split())
    assert f"An idle HTTP connection is closed {KEEP_ALIVE_SECONDS} seconds after" in document


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("GET / HTTP/1.1\r\nHost: m\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nHost: m\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
        ("garbage\r\n\r\n", 400),
    ],
    ids=["h2c", "websocket", "malformed"],
)
def test_nothing_is_logged_of_what_any_client_may_send(
    sent: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an upgrade uvicorn would advise to install WebSockets; malformed requests would fill a pipe nobody reads."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Response()(scope, receive, send)

    async def scenario() -> None:
        config = server._http_server(app).config
        config.load()
        protocol: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
        transport = Mock()
        protocol.connection_made(transport)
        protocol.data_received(sent.encode())
        if protocol.tasks:
            await asyncio.wait(protocol.tasks)
        assert transport.write.call_args_list[0].args[0].startswith(f"HTTP/1.1 {status}".encode())

    asyncio.run(scenario())
    assert not caplog.messages


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _headers(**fields: bytes) -> bytes:
    return b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value for name, value in fields.items()
    )


def test_nothing_is_logged_of_what_any_client_may_send_over_grpc(caplog: pytest.LogCaptureFixture) -> None:
    calls = ["inference.GRPCInferenceService/ModelReady", "inference.GRPCInferenceService/ServerLive"]
    calls += ["inference.GRPCInferenceService/ModelInfer", "grpc.health.v1.Health/Check"]

    async def scenario() -> None:
        sizes = Sizes(1000, 1000, 1000)
        models, metrics = Models([]), Metrics(CollectorRegistry())
        running = grpc_server(models, Inferences(models, metrics, sizes, Budget(1000)), sizes)
        port = await server._start_grpc(running, Address("127.0.0.1", 0, 0), "127.0.0.1")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(f"/{call}")(b"\xff\xff", timeout=PATIENCE)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, call
        asked = {":method": b"POST", ":scheme": b"http", ":path": f"/{calls[-1]}".encode(), ":authority": b"m"}
        fields = _headers(**asked, te=b"trailers", x=b"\xff", **{"content-type": b"application/grpc"})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"") + _frame(1, 4, 1, fields))
        writer.write(_frame(0, 1, 1, bytes(5)))
        await reader.readuntil(b"grpc-status\x010")
        writer.close()
        await running.stop(None)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    assert not caplog.messages


def test_probes_are_answered_between_large_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def parse(*_: Any) -> None:
        happened.append("message")
        raise ValueError

    async def scenario() -> None:
        sizes = Sizes(LARGE + 1, 1000, 3 * (LARGE + 1))
        inferences = Inferences(Models([]), Metrics(CollectorRegistry()), sizes, Budget(sizes.max_total))
        context = Mock(abort=AsyncMock())
        calls = [asyncio.create_task(inferences.answer(bytes(LARGE + 1), context)) for _ in range(3)]
        while not all(call.done() for call in calls):
            happened.append("probe")
            await asyncio.sleep(0)

    monkeypatch.setattr(rpc, "parse", parse)
    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    assert happened.count("message") == 3
    assert "message message" not in " ".join(happened)


def test_sequences_that_idle_are_looked_for_once_a_second_at_least() -> None:
    assert [server._expiry_period(timeout) for timeout in (60, 2, 0.001)] == [1, 0.5, 0.01]


def test_a_lack_of_files_is_said_once_a_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        loop, now = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        monkeypatch.setattr(loop, "time", lambda: now)
        loop.set_exception_handler(server._LoopErrors())
        for _ in range(100):
            loop.call_exception_handler(
                {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}
            )
        loop.call_exception_handler({"message": "something else", "exception": ValueError("a bug")})

    asyncio.run(scenario())
    lack, other = caplog.messages
    assert lack.startswith("no connection can be accepted: Too many open files; allow more (ulimit -n")
    assert "something else" in other


def test_nothing_is_said_of_a_closed_listener_that_was_to_accept_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(socket.socket):
        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    tried: list[str] = []
    serving: Any = None

    class Noted(server._LoopErrors):
        def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if not tried:
                loop.call_soon(close)  # which comes before the timer of the next try, however late that is
            tried.append(type(context["exception"]).__name__)
            super().__call__(loop, context)

    def close() -> None:
        serving.close()

    async def scenario() -> None:
        nonlocal serving
        asyncio.get_running_loop().set_exception_handler(Noted())
        listener = Full()
        listener.bind(("127.0.0.1", 0))
        serving = await asyncio.start_server(lambda reader, writer: None, sock=listener, backlog=7)
        with socket.create_connection(listener.getsockname()):
            while "ValueError" not in tried:
                await asyncio.sleep(0.001)

    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.05)
    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    assert caplog.messages and all(said.startswith("no connection can be accepted") for said in caplog.messages)


COMMAND = [sys.executable, "-m", "tetdeploy", "serve", "--http-port", "0", "--grpc-port", "0", "--threads", "1"]


def test_a_server_that_hangs_as_it_starts_fails_its_test() -> None:
    hanging = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with (
        subprocess.Popen(hanging, stdout=subprocess.PIPE, text=True) as process,
        pytest.raises(AssertionError, match="the server ended with -9"),
    ):
        started(process, 0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs ulimit")
def test_more_connections_than_files_fill_no_log() -> None:
    """asyncio would write 2,048 tracebacks a second, and gRPC's C core a line for headers that it cannot read."""
    command = ["bash", "-c", 'ulimit -n 60; exec "$@"', "bash", *COMMAND, f"m={exported('step')}"]
    running = started(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    host, port = running.http.split(":")
    assert running.process.stderr is not None
    unreadable = {"grpc-timeout": b"zz", "content-type": b"application/grpc", ":method": b"POST", ":path": b"/a/B"}
    opened = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    try:
        with socket.create_connection(("127.0.0.1", int(running.grpc.split(":")[1])), timeout=PATIENCE) as caller:
            caller.sendall(opened + _frame(1, 5, 1, _headers(**unreadable, **{":scheme": b"http", ":authority": b"m"})))
            answer, reset = b"", _frame(3, 0, 1, (2).to_bytes(4, "big"))  # all that gRPC 1.67 answers
            while b"grpc-status" not in answer and reset not in answer:  # it may answer in parts
                part = caller.recv(4096)
                assert part
                answer += part
        idle = [socket.create_connection((host, int(port)), timeout=PATIENCE) for _ in range(100)]
        said = running.process.stderr.readline()
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ERROR tetdeploy\.serve\.server: no connection can be", said)
        assert "allow more (ulimit -n, LimitNOFILE=)" in said
        for connection in idle:
            connection.close()
        assert running.post("models/m/infer", b"{}")[0] == 400  # it accepts again
        assert stop(running) == 0
    finally:
        running.process.kill()
    with running.process.stderr as log:
        assert len(log.read()) < 10_000


@pytest.mark.skipif(sys.platform == "win32", reason="where this ends the process")
def test_ctrl_c_while_a_model_is_measured_ends_a_server_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Metrics", lambda: Metrics(CollectorRegistry()))
    monkeypatch.setattr(server, "step_energy_pj", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(server, "_listening", lambda _: pytest.fail("it listens"))
    with pytest.raises(KeyboardInterrupt):
        _serve(announce=print)


@pytest.mark.skipif(sys.platform == "win32", reason="where this ends the process")
def test_ctrl_c_stops_a_server_where_a_loop_handles_no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Metrics", lambda: Metrics(CollectorRegistry()))
    as_on_windows = Mock(side_effect=NotImplementedError)
    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", as_on_windows)
    assert _serve(announce=lambda *_: os.kill(os.getpid(), signal.SIGINT)) == 0


def _serve(announce: Callable[[str, str], None]) -> int:
    engines, sizes = {"m": Engine(exported("step"), threads=1)}, Sizes(1, 1, 1)
    address, bounds = Address("127.0.0.1", 0, 0), Bounds(1, 1, 1)
    # A shell has it ignored in what runs in its background.
    with handled(signal.default_int_handler, signal.SIGINT):
        return asyncio.run(server.serve(engines, address, Limits(), bounds, sizes=sizes, threads=1, announce=announce))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_server_that_cannot_say_where_it_is_ends_in_order() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, str(exported("step"))], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
    said = "Error: standard output: No space left on device; make room, or write elsewhere"
    assert (done.returncode, done.stderr.strip()) == (1, said)
