"""A TensorRT engine that `tetdeploy build` made, on an NVIDIA GPU. Needs numpy, cuda-bindings and TensorRT only.

The membranes stay in GPU memory from one step to the next: what one call of the engine writes, the next one reads.
"""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.engine import Array, Engine, Result
from tetdeploy.runtimes.manifest import AGAIN, manifest_path, read_manifest
from tetdeploy.runtimes.nvidia import (
    NVIDIA_INDEX,
    checked,
    gpu_architecture,
    gpu_runtime,
    import_tensorrt,
    why_not_rtx,
)
from tetdeploy.storage.model_file import state_outputs
from tetdeploy.system.extras import import_extra


class TensorRTEngine(Engine):
    """A TensorRT engine with the methods of an `Engine`: `run` and `stream`. It cannot count operations.

    Args:
        path: the `.engine` file; its manifest, `<path>.json`, lies beside it.

    Attributes:
        manifest: what `tetdeploy build` said of it; its entry `metadata` is that of the exported model.
        Those of `Engine`; `device` and `runtime` are `tensorrt`.

    Raises:
        ValueError: the file and its manifest do not belong together; the engine is for another GPU or library.
        NoGpuError: there is no driver or no GPU.
        OSError: a file cannot be read.
        MissingExtraError: TensorRT or cuda-bindings is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.device, self.runtime = Path(path), "tensorrt", "tensorrt"
        self.manifest = read_manifest(self.path)
        plan = self.path.read_bytes()
        self.sha256 = hashlib.sha256(plan).hexdigest()
        if self.sha256 != self.manifest["engine_sha256"]:
            raise ValueError(f"{self.path} is not the engine that {manifest_path(self.path).name} describes; {AGAIN}")
        self._take(self.manifest["metadata"])
        self.min_batch, _, self.max_batch = self.manifest["batch"]
        # Before any object of TensorRT is made: without a driver that ends the process.
        cuda = gpu_runtime(f"running {self.path.name}")
        trt = import_tensorrt(self.manifest["package"])
        check_target(self.manifest, self.path.name, trt, gpu_architecture(cuda))
        self._session = Session(trt, Gpu(cuda), plan, state_outputs(self.metadata), self.path.name)

    @property
    def runtime_version(self) -> dict[str, str]:
        return {self.manifest["package"]: self.manifest["version"]}  # no other version would run it

    def check_input(self, x: Array) -> Array:
        x = super().check_input(x)
        self._check_range("batch", len(x), "images")
        return x

    def check_T(self, T: int | None, x: Array) -> int:
        T = super().check_T(T, x)
        if self.layout == "dynamic":
            self._check_range("T", T, "steps")
        return T

    def run_with(
        self, overlay: bytes, x: Array, T: int | None = None, *, native: bool = False
    ) -> tuple[Result, dict[str, Array]]:
        raise ValueError(
            f"{self.path.name} is a TensorRT engine, which cannot count spikes or operations; they are those of "
            f"{self.manifest['graph']}, which can"
        )

    def _check_range(self, name: str, count: int, what: str) -> None:
        least, _, most = self.manifest[name]
        if not least <= count <= most:
            raise ValueError(
                f"{self.path.name} was built for {least} to {most} {what}, got {count}; build again with --{name}"
            )


def check_target(manifest: Mapping[str, Any], name: str, trt: Any, architecture: str) -> None:
    """Refuse an engine that this TensorRT or this GPU cannot run.

    Raises:
        ValueError: it was built by another version, or for other GPU architectures.
    """
    package, built, version = manifest["package"], manifest["version"], trt.__version__
    if built != version:
        index = f" {NVIDIA_INDEX}" if package == "tensorrt" else ""
        raise ValueError(
            f"{name} was built by {package} {built}, and {version} is installed; {AGAIN}, or "
            f"pip install {package}=={built}{index}"
        )
    if architecture not in manifest["gpu_architectures"]:
        reason = why_not_rtx(trt, architecture) if package == "tensorrt-rtx" else None
        raise ValueError(
            f"{name} was built for GPU architecture {', '.join(manifest['gpu_architectures'])}, and this GPU is "
            f"{architecture}; {reason or f'{AGAIN} --gpu-arch {architecture}'}"
        )


class Gpu:
    """Memory of the first GPU, and the CUDA stream in whose order everything happens to it.

    Args:
        cuda: `cuda.bindings.runtime`.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        # Freed memory is kept for the next call, not given back to the driver at each synchronisation.
        most = import_extra("cuda.bindings.driver", "rtx").cuuint64_t(2**64 - 1)
        pool = checked(cuda, cuda.cudaDeviceGetDefaultMemPool(0))
        checked(cuda, cuda.cudaMemPoolSetAttribute(pool, cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold, most))
        self.stream = checked(cuda, cuda.cudaStreamCreate())
        weakref.finalize(self, cuda.cudaStreamDestroy, self.stream)

    def empty(self, shape: Iterable[int], dtype: np.dtype[Any]) -> GpuArray:
        return GpuArray(self, tuple(shape), dtype)

    def put(self, array: Array) -> GpuArray:
        """A copy of a contiguous array."""
        copy = self.empty(array.shape, array.dtype)
        copy.source = array
        self._copy(copy.address, array.ctypes.data, array.nbytes, self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        return copy

    def zeros(self, shape: Iterable[int]) -> GpuArray:
        """float32 zeros, which the GPU writes by itself."""
        made = self.empty(shape, np.dtype(np.float32))
        checked(self.cuda, self.cuda.cudaMemsetAsync(made.address, 0, made.nbytes, self.stream))
        return made

    def get(self, array: GpuArray) -> NDArray[Any]:
        """An array of the host, complete when this returns."""
        copy = np.empty(array.shape, array.dtype)
        self._copy(copy.ctypes.data, array.address, copy.nbytes, self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        checked(self.cuda, self.cuda.cudaStreamSynchronize(self.stream))
        return copy

    def free(self, address: int) -> None:
        self.cuda.cudaFreeAsync(address, self.stream)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        checked(self.cuda, self.cuda.cudaMemcpyAsync(to, source, size, kind, self.stream))


class GpuArray:
    """An array in GPU memory, which goes when it goes; `np.asarray` copies it to the host."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.gpu, self.shape, self.dtype = gpu, shape, dtype
        self.source: Array | None = None  # of a copy that may still be under way
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.address: int = checked(gpu.cuda, gpu.cuda.cudaMallocAsync(self.nbytes, gpu.stream))
        weakref.finalize(self, gpu.free, self.address)  # which keeps the stream for as long as there are arrays

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.gpu.get(self), dtype)


class Session:
    """An engine's execution context, called as `Engine` and `Stream` call ONNX Runtime. Threads take turns.

    Args:
        trt: the module of the TensorRT package.
        kept: outputs that stay on the GPU, to be fed to the next call.
        name: of the engine, for errors.
    """

    def __init__(self, trt: Any, gpu: Gpu, plan: bytes, kept: Iterable[str], name: str) -> None:
        self._gpu, self._kept, self._name, self._lock = gpu, frozenset(kept), name, threading.Lock()
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ValueError(f"TensorRT {trt.__version__} cannot load {name}; {AGAIN}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ValueError(f"{name} finds too little GPU memory; {AGAIN} with a smaller --batch")
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        self._dtypes = {n: np.dtype(trt.nptype(self._engine.get_tensor_dtype(n))) for n in names}
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]

    def run(self, names: list[str], feed: Mapping[str, Array | GpuArray]) -> list[Array | GpuArray]:
        """The outputs `names` of one call, on the GPU what is kept there.

        Raises:
            ValueError: TensorRT or CUDA failed.
        """
        with self._lock:
            checked(self._gpu.cuda, self._gpu.cuda.cudaSetDevice(0))  # each thread has a device of its own choice
            inputs = {name: self._on_gpu(name, feed[name]) for name in self._inputs}
            for name, value in inputs.items():
                self._demand(self._context.set_input_shape(name, value.shape), f"takes no {name} {value.shape}")
            outputs = {n: self._gpu.empty(self._context.get_tensor_shape(n), self._dtypes[n]) for n in self._outputs}
            for name, value in (inputs | outputs).items():
                self._demand(self._context.set_tensor_address(name, value.address), f"has no tensor {name}")
            self._demand(self._context.execute_async_v3(int(self._gpu.stream)), "failed")
            results = [outputs[n] if n in self._kept else self._gpu.get(outputs[n]) for n in names]
            checked(self._gpu.cuda, self._gpu.cuda.cudaStreamSynchronize(self._gpu.stream))
            return results

    def put(self, array: Array) -> GpuArray:
        """A copy on the GPU, to be fed to many calls."""
        with self._lock:
            checked(self._gpu.cuda, self._gpu.cuda.cudaSetDevice(0))
            return self._gpu.put(np.ascontiguousarray(array))

    def zeros(self, shape: Sequence[int]) -> GpuArray:
        """float32 zeros on the GPU."""
        with self._lock:
            checked(self._gpu.cuda, self._gpu.cuda.cudaSetDevice(0))
            return self._gpu.zeros(shape)

    def _on_gpu(self, name: str, value: Array | GpuArray) -> GpuArray:
        if isinstance(value, GpuArray):
            return value
        return self._gpu.put(np.ascontiguousarray(value, self._dtypes[name]))

    def _demand(self, done: bool, what: str) -> None:
        if not done:
            raise ValueError(f"TensorRT: {self._name} {what}")
