"""ONNX Runtime on an NVIDIA GPU: options of its providers, and sessions that leave state there between calls."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.storage.files import cache_folder

Array = NDArray[Any]


def prepare() -> None:
    """Forbid TF32, and find the CUDA libraries that pip installed.

    TF32 rounds float32 currents to 10 bits of mantissa and so changes spikes. TensorRT's provider has no option against
    it, and CUDA's, `use_tf32=0`, is given up without a word where cuDNN finds no other kernel for a convolution. This
    variable of the environment is for NVIDIA's libraries themselves; one that is set already stays.
    """
    import onnxruntime

    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    with redirect_stdout(sys.stderr):  # it prints what it lacks
        onnxruntime.preload_dlls()


def provider_options(provider: str, model_sha256: str, precision: str = "fp32") -> dict[str, str]:
    """Options of an ONNX Runtime provider for one model. What they do is from ONNX Runtime's documentation, source and
    issues; on a GPU none was tried here.

    CUDA: cuDNN chooses a convolution's kernel whenever the batch size changes, which here it does a lot. The default,
    EXHAUSTIVE, is its dearer estimate and with cuDNN 8 a race of all kernels; where others measured both, HEURISTIC was
    as fast afterwards and took a fraction of the time at a new size (https://github.com/PaddlePaddle/PaddleX/pull/5057;
    what the names stand for: https://github.com/microsoft/onnxruntime/issues/22705). `use_tf32=0` leaves out what
    needs tensor cores, float16 as well: what an fp16 graph keeps in float32 is left to `prepare`.

    TensorRT: the provider builds an engine when a batch size or T lies outside the range of those it has seen, for that
    range and the new one, and afterwards finds it in the user's cache. ONNX Runtime names these files by the graph's
    nodes and not by its weights, so each model has a folder of its own:
    https://github.com/microsoft/onnxruntime/issues/6455. A range of our own (`trt_profile_min_shapes` and its kin) is
    not given: a call beyond it fails instead of building an engine; and it must name every tensor with a free axis at
    which a part for TensorRT begins, or the model does not load. Which these are beside the graph's inputs only a GPU
    shows: where TensorRT leaves an operator to CUDA, the `If` of a step graph perhaps, they lie inside the graph.

    Raises:
        OSError: the cache cannot be written.
    """
    if provider == "CUDAExecutionProvider":
        exact = {} if precision == "fp16" else {"use_tf32": "0"}
        return exact | {"cudnn_conv_algo_search": "HEURISTIC"}
    if provider != "TensorrtExecutionProvider":
        return {}
    timings = cache_folder() / "tensorrt"
    engines = timings / model_sha256
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"TensorRT's engines cannot be kept in {engines}: {error.strerror}; set XDG_CACHE_HOME to a folder that "
            "can be written"
        ) from error
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(timings),
    }


class DeviceArray:
    """An array in a device's memory; `np.asarray` copies it to the host."""

    def __init__(self, value: Any) -> None:
        self.value = value  # an OrtValue

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.value.numpy(), dtype)


class DeviceZeros(DeviceArray):
    """float32 zeros of some shape, at the beginning of a longer array of them, whose memory nothing writes."""

    def __init__(self, value: Any, shape: tuple[int, ...]) -> None:
        super().__init__(value)
        self._shape = shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.zeros(self._shape, np.float32 if dtype is None else dtype)


class BoundSession:
    """An ONNX Runtime session with I/O binding, called as `Engine` and `Stream` call a plain one. Threads may share it.

    Args:
        session: the `InferenceSession`.
        device: as ONNX Runtime calls it: `cuda`, or `cpu`.
        kept: outputs that stay on the device, to be fed to the next call.
    """

    def __init__(self, session: Any, device: str, kept: Iterable[str]) -> None:
        self._session, self._device, self._kept = session, device, frozenset(kept)
        self._zeros: DeviceArray | None = None
        self._lock = threading.Lock()
        self.get_outputs = session.get_outputs

    def put(self, array: Array) -> DeviceArray:
        """A contiguous array on the device, to be fed to many calls."""
        return self._on_device(np.ascontiguousarray(array))

    def zeros(self, shape: Sequence[int]) -> DeviceZeros:
        """float32 zeros on the device: all that were ever asked for share the memory of the longest."""
        size = math.prod(shape)
        with self._lock:
            if self._zeros is None or self._zeros.shape[0] < size:
                self._zeros = self._on_device(np.zeros(size, np.float32))
            return DeviceZeros(self._zeros.value, tuple(shape))

    def run(self, names: Sequence[str], feed: Mapping[str, Array | DeviceArray]) -> list[Array | DeviceArray]:
        """The outputs `names` of one call, on the device what is kept there."""
        binding = self._session.io_binding()
        # An array that is bound must live until the call is done: the binding does not own it.
        from_host = {n: np.ascontiguousarray(v) for n, v in feed.items() if not isinstance(v, DeviceArray)}
        for name, array in from_host.items():
            binding.bind_cpu_input(name, array)
        for name, value in feed.items():
            if isinstance(value, DeviceZeros):
                binding.bind_input(name, self._device, 0, np.float32, value.shape, value.value.data_ptr())
            elif isinstance(value, DeviceArray):
                binding.bind_ortvalue_input(name, value.value)
        for name in names:
            binding.bind_output(name, self._device if name in self._kept else "cpu")
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values = zip(names, binding.get_outputs(), strict=True)
        return [DeviceArray(value) if name in self._kept else value.numpy() for name, value in values]

    def _on_device(self, array: Array) -> DeviceArray:
        from onnxruntime import OrtValue

        return DeviceArray(OrtValue.ortvalue_from_numpy(array, self._device, 0))
