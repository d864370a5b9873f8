"""What the load script of the server does where there is nothing to measure; `test_serve.py` lets it measure."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
import threading
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import click
import numpy as np
import pytest
from command_helpers import printed
from export_helpers import digits, engine, exported
from serve_helpers import needs_serve

pytest.importorskip("prometheus_client", reason="needs the extra serve")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / "serve_load.py"
    spec = importlib.util.spec_from_file_location("serve_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_of_no_call(script: ModuleType) -> None:
    server = SimpleNamespace(address="127.0.0.1:1", metric=lambda name: 0.0, max_wait_ms=2.0)
    x = digits().images[:2]
    row = script.measure(server, engine("step"), x, np.zeros((2, 10)), 1, 0.05)
    assert (row["max_wait_ms"], row["mean_batch"], row["images_per_s"], row["share"]) == (2, 0, 0, 0)
    assert "right" not in row["outcomes"]


def test_the_result_is_written_where_an_earlier_one_lies(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "Server", lambda model, threads, wait: nullcontext(SimpleNamespace(max_wait_ms=wait)))
    monkeypatch.setattr(script, "measure", lambda server, *given: {"clients": given[3], "wait": server.max_wait_ms})
    monkeypatch.setattr(script, "show", lambda rows: None)
    for clients in (["1,2"], ["4,8", "--against-wait-ms", "2"]):
        options = ["--clients", *clients, "--json", str(tmp_path / "load.json")]
        printed(exported("step"), *options, command=script.main)
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [(row["clients"], row["wait"]) for row in rows] == [(4, 0), (4, 2), (8, 0), (8, 2)]


def test_an_interrupt_before_the_server_is_ready_ends_it(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    process = MagicMock()
    process.stdout.__iter__.side_effect = KeyboardInterrupt
    monkeypatch.setattr(script, "subprocess", MagicMock(Popen=lambda *_, **__: process))
    with pytest.raises(KeyboardInterrupt):
        script.Server(Path("m.onnx"), None)
    process.kill.assert_called_once()
    process.communicate.assert_called_once()


@pytest.mark.parametrize("reset", [True, False])
def test_a_server_that_cuts_the_large_body(script: ModuleType, reset: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def cut() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            if reset:  # lingering for no time resets it
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        server = threading.Thread(target=cut)
        server.start()
        with socket.create_connection(listener.getsockname()) as connection:
            assert script._answer_to_1_gb(connection, b"POST / HTTP/1.1\r\nContent-Length: ").startswith("cut, ")
        server.join(10)


def test_a_large_body_without_an_answer(script: ModuleType) -> None:
    silent = SimpleNamespace(sendall=lambda sent: None, recv=lambda size: b"")
    assert script._answer_to_1_gb(silent, b"") == "closed without an answer"


@needs_serve
def test_a_server_that_does_not_start(script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.ClickException, match="the server ended with exit code 1 before it was ready"):
        script.Server(tmp_path / "nothing.onnx", 1)
    assert "nothing.onnx" in capfd.readouterr().err
