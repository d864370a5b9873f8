"""A model repository in a real Triton: the binary of the package nvidia-pytriton, whose one backend is Python's.

That takes the place of ONNX Runtime's: it serves our engine, and feeds the graph of streams. Configurations, batches
and the order of sequences are Triton's own; the state it only hands out for a stream's first request.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_helpers import triton_client
from export_helpers import digits, engine, exported, frames

http = triton_client("http")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="needs nvidia-pytriton, for its Triton"),
]
PATIENCE = 120
ROOT = Path(__file__).parents[1]

BACKEND = """
import json
import sys
from pathlib import Path

sys.path += SYS_PATH  # Triton starts a bare interpreter

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb

from tetdeploy import Engine


# Arrays go by DLPack: the backend was built for NumPy 1, and takes an array of NumPy 2 for an empty one.
def tensor(request, name):
    return np.from_dlpack(pb.get_input_tensor_by_name(request, name)).copy()


def made(name, value):
    return pb.Tensor.from_dlpack(name, np.ascontiguousarray(value))


class TritonPythonModel:
    def initialize(self, arguments):
        config = json.loads(arguments["model_config"])
        self.folder = Path(arguments["model_repository"]) / arguments["model_version"]
        self.inputs = [value["name"] for value in config["input"]]
        self.outputs = [value["name"] for value in config["output"]]
        self.states = config.get("sequence_batching", {}).get("state", [])
        self.kept = {}
        if self.states:
            self.session = ort.InferenceSession(self.folder / "model.onnx", providers=["CPUExecutionProvider"])
        else:
            self.engine = Engine(self.folder / "model.onnx", threads=1)

    def execute(self, requests):
        feed = {name: np.concatenate([tensor(request, name) for request in requests]) for name in self.inputs}
        outputs = self.step(feed, requests) if self.states else self.run(**feed)
        with (self.folder / "batches.txt").open("a") as file:
            print(len(feed["x"]), file=file)
        ends = np.cumsum([len(tensor(request, "x")) for request in requests])[:-1]
        parts = {name: np.split(outputs[name], ends) for name in self.outputs}
        return [
            pb.InferenceResponse([made(name, parts[name][k]) for name in self.outputs]) for k in range(len(requests))
        ]

    def run(self, x, steps=None):
        result = self.engine.run(x, None if steps is None else steps.shape[1])
        return {"logits": result.logits, "per_step": result.per_step}

    def step(self, feed, requests):
        ids = [request.correlation_id() for request in requests]
        for id, request in zip(ids, requests):
            if request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                self.kept[id] = {s["input_name"]: tensor(request, s["input_name"]) for s in self.states}
        for state in self.states:
            feed[state["input_name"]] = np.concatenate([self.kept[id][state["input_name"]] for id in ids])
        names = self.outputs + [state["output_name"] for state in self.states]
        outputs = dict(zip(names, self.session.run(names, feed)))
        for k, id in enumerate(ids):
            self.kept[id] = {s["input_name"]: outputs[s["output_name"]][k : k + 1] for s in self.states}
        return outputs
"""


def for_python(model: Path) -> None:
    """Put the Python backend in the place of ONNX Runtime's, and change nothing else."""
    config = model / "config.pbtxt"
    text = config.read_text()
    platform = 'platform: "onnxruntime_onnx"'
    assert platform in text
    config.write_text(text.replace(platform, 'backend: "python"'))
    paths = [str(ROOT), *(path for path in sys.path if path)]
    (model / "1" / "model.py").write_text(BACKEND.replace("SYS_PATH", repr(paths)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a running Triton, and its model repository."""
    from tetdeploy.export.repository import add_to_repository

    folder = tmp_path_factory.mktemp("triton")
    repository = folder / "models"
    for name, encoding in (("digits", "direct"), ("events", "frames")):
        models = [exported(layout, encoding=encoding) for layout in ("dynamic", "step")]
        for added in add_to_repository(repository, models, name):
            for_python(added.path)
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backends = Path(shutil.copytree(package / "tritonserver" / "backends", folder / "backends"))
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")  # Python's backend runs the models in this interpreter's version
    libraries = [package.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "OMP_NUM_THREADS": "1",
    }
    port = free_port()
    command = [package / "tritonserver" / "bin" / "tritonserver", f"--model-repository={repository}"]
    options = [f"--backend-directory={backends}", "--http-address=127.0.0.1", f"--http-port={port}"]
    options += ["--allow-grpc=false", "--allow-metrics=false", "--exit-timeout-secs=5"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([*map(str, command), *options], stdout=log, stderr=log, env=environment)
    try:
        address = f"127.0.0.1:{port}"
        assert ready(process, address), (folder / "log.txt").read_text()[-5000:]
        yield address, repository
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(process: subprocess.Popen[bytes], address: str) -> bool:
    end = time.monotonic() + PATIENCE
    with http.InferenceServerClient(address) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                if client.is_server_ready():
                    return True
            except OSError:
                pass
            time.sleep(0.2)
    return False


def ask(address: str, model: str, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """One request, of a client of its own."""
    given = [http.InferInput(name, list(value.shape), "UINT8") for name, value in inputs.items()]
    for made, value in zip(given, inputs.values(), strict=True):
        made.set_data_from_numpy(np.ascontiguousarray(value))
    with http.InferenceServerClient(address, network_timeout=PATIENCE, connection_timeout=PATIENCE) as client:
        wanted = [http.InferRequestedOutput(name, binary_data=True) for name in ("logits", "per_step")]
        answer = client.infer(model, given, outputs=wanted, **options)
        return {name: answer.as_numpy(name) for name in ("logits", "per_step")}


def batches(repository: Path, model: str) -> list[int]:
    return [int(line) for line in (repository / model / "1" / "batches.txt").read_text().split()]


def test_concurrent_requests_share_calls_and_get_the_engines_answers(triton: tuple[str, Path]) -> None:
    address, repository = triton
    x = digits().images[:40]
    expected = {T: engine("dynamic").run(x, T) for T in (2, 3)}

    def one(k: int) -> dict[str, Any]:
        return ask(address, "digits", {"x": x[k : k + 1], "steps": np.zeros((1, 2 + k % 2), np.uint8)})

    with ThreadPoolExecutor(20) as pool:
        for k, answer in enumerate(pool.map(one, range(len(x)))):
            for name in ("logits", "per_step"):
                np.testing.assert_allclose(answer[name][0], getattr(expected[2 + k % 2], name)[k], atol=1e-5)
    sizes = batches(repository, "digits")
    assert sum(sizes) == len(x) and len(sizes) < len(x)


def test_frames_are_answered_in_one_request(triton: tuple[str, Path]) -> None:
    x = frames(3, 5)
    answer = ask(triton[0], "events", {"x": x})
    np.testing.assert_allclose(answer["logits"], engine("dynamic", encoding="frames").run(x).logits, atol=1e-5)


@pytest.mark.parametrize(("model", "encoding"), [("digits-stream", "direct"), ("events-stream", "frames")])
def test_interleaved_streams_get_the_engines_answers(triton: tuple[str, Path], model: str, encoding: str) -> None:
    address, repository = triton
    T, count = 4, 20
    x = frames(count, T)
    if encoding == "direct":
        x[1::2] = x[1::2, :1]  # every other stream is shown one image again and again
        streams = [engine("step").stream() for _ in range(count)]
        expected = [[stream.push(frame[None]).logits[0] for frame in x[k]] for k, stream in enumerate(streams)]
    else:
        per_step = engine("step", encoding="frames").run(x).per_step
        expected = [[per_step[k, : t + 1].mean(0) for t in range(T)] for k in range(count)]

    def one(k: int, t: int) -> Any:
        options = {"sequence_id": k + 1, "sequence_start": t == 0, "sequence_end": t == T - 1}
        return ask(address, model, {"x": x[k : k + 1, t]}, **options)["logits"][0]

    with ThreadPoolExecutor(count) as pool:
        for t in range(T):
            for k, logits in enumerate(pool.map(one, range(count), [t] * count)):
                np.testing.assert_allclose(logits, expected[k][t], atol=1e-5)
    sizes = batches(repository, model)
    assert sum(sizes) == count * T and len(sizes) < count * T
