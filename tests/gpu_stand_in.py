"""A stand-in for CUDA and TensorRT, in host memory and with ONNX Runtime, for machines without a GPU.

It shows that the runner hands the right memory to the right call: a read of memory that was freed is an error, and
every byte that crosses between host and "GPU" is counted. What is copied to the host is there once the stream was
waited for. It says nothing of CUDA or TensorRT themselves.
"""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tetdeploy.runtimes.onnxruntime_gpu import BoundSession
from tetdeploy.runtimes.sessions import Sessions
from tetdeploy.storage.model_file import state_outputs

VERSION = "1.2.3"


class Stream(int):
    """What CUDA calls a stream."""


class Cuda:
    """What the runner uses of `cuda.bindings.runtime`."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold="threshold")
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(
        self, *, driver: int = 13000, count: int = 1, error: int = 0, architecture: tuple[int, int] = (8, 6)
    ) -> None:
        self.driver, self.count, self.error = driver, count, error
        self.architecture = dict(zip(("major", "minor"), architecture, strict=True))
        self.memory: dict[int, Any] = {}
        self.num_streams = 0
        self.copied = {"up": 0, "down": 0}
        self.under_way: list[tuple[int, Any]] = []
        self.device = 0  # that of the thread, which its owner may have changed

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.driver

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.error, None if self.error else self.count

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error}".encode()

    def cudaDeviceGetAttribute(self, name: str, device: int) -> tuple[int, int]:
        return 0, self.architecture[name]

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, SimpleNamespace(name=b"NVIDIA Stand-in 8.6")

    def cudaSetDevice(self, device: int) -> tuple[int]:
        self.device = device
        return (0,)

    def cudaDeviceGetDefaultMemPool(self, device: int) -> tuple[int, str]:
        return 0, "pool"

    def cudaMemPoolSetAttribute(self, pool: str, name: str, value: Any) -> tuple[int]:
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, Stream]:
        self.num_streams += 1
        return 0, Stream(7)

    def cudaStreamDestroy(self, stream: Stream) -> tuple[int]:
        self.num_streams -= 1
        return (0,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[int]:
        for to, buffer in self.under_way:
            ctypes.memmove(to, buffer, len(buffer))
        self.under_way.clear()
        return (0,)

    def cudaMallocAsync(self, size: int, stream: Stream) -> tuple[int, int]:
        assert self.device == 0
        buffer = ctypes.create_string_buffer(size)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return 0, address

    def cudaFreeAsync(self, address: int, stream: Stream) -> tuple[int]:
        if not self.num_streams:
            return (1,)
        del self.memory[address]
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Stream) -> tuple[int]:
        assert len(self.memory[address]) == size
        ctypes.memset(address, value, size)
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: str, stream: Stream) -> tuple[int]:
        assert len(self.memory[to if kind == "up" else source]) == size
        if kind == "up":
            ctypes.memmove(to, source, size)
        else:
            self.under_way.append((to, self.memory[source]))
        self.copied[kind] += size
        return (0,)


class TensorRT:
    """What the runner uses of a TensorRT module; its "engines" are ONNX models."""

    __version__ = VERSION
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    ComputeCapability = enum.Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    def Runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: _Engine(self.cuda, plan))

    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype


class _Engine:
    def __init__(self, cuda: Cuda, plan: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.cuda = cuda
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, k: int) -> str:
        return self.names[k]

    def get_tensor_mode(self, name: str) -> TensorRT.TensorIOMode:
        return TensorRT.TensorIOMode.INPUT if name in self.inputs else TensorRT.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
        return kinds[(self.inputs | self.outputs)[name].type]

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.free: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.inputs[name].shape
        if len(shape) != len(wanted) or any(isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)):
            return False
        self.free |= {w: s for w, s in zip(wanted, shape, strict=True) if isinstance(w, str)}
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.free[dim] if isinstance(dim, str) else dim for dim in self.engine.outputs[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        memory = self.engine.cuda.memory
        feed = {}
        for name, shape in self.shapes.items():
            data = np.frombuffer(memory[self.addresses[name]].raw, self.engine.get_tensor_dtype(name))
            feed[name] = data.reshape(shape)
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
            buffer = memory[self.addresses[name]]
            assert len(buffer) == value.nbytes
            ctypes.memmove(buffer, value.ctypes.data, value.nbytes)
        return True


def gpu_build(monkeypatch: pytest.MonkeyPatch, started: list[str]) -> list[Any]:
    """An onnxruntime with the GPU providers, of which `started` start; gives what sessions are asked for."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    asked: list[Any] = []
    session = ort.InferenceSession
    built_with = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: built_with)

    def on_cpu(model: bytes, options: Any, *, providers: list[Any], enable_fallback: int) -> Any:
        asked.append((dict(providers), enable_fallback))
        made = session(model, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(made, "get_providers", lambda: [*started, "CPUExecutionProvider"])
        return made

    monkeypatch.setattr(ort, "InferenceSession", on_cpu)
    return asked


class BoundSessions(Sessions):
    """Binds state as on a GPU, to the CPU's memory."""

    def bind(self, session: Any) -> BoundSession:
        return BoundSession(session, "cpu", state_outputs(self._metadata))
