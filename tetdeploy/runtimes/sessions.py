"""Opens a model file by the runtime and on the device that were asked for, and never on another instead.

What is opened is a session, whose `run` the engine calls; on a device with a memory of its own also `put` and `zeros`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Mapping
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

from tetdeploy import native
from tetdeploy.arguments import check_choice, check_whole
from tetdeploy.runtimes.cuda_graphs import PROVIDER_OPTIONS as GRAPH_OPTIONS
from tetdeploy.runtimes.cuda_graphs import GraphSession, why_not
from tetdeploy.runtimes.native_session import NativeSession
from tetdeploy.runtimes.onnxruntime_gpu import BoundSession, prepare, provider_options
from tetdeploy.runtimes.openvino_session import OpenVINOSession
from tetdeploy.storage.model_file import (
    METADATA_KEY,
    load_fault,
    parse_metadata,
    read_model,
    session_metadata,
    state_outputs,
)
from tetdeploy.system.extras import import_extra
from tetdeploy.system.machine import default_threads
from tetdeploy.wording import first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
RUNTIMES = {"onnxruntime": "cpu", "openvino": "openvino"}  # packages, each with the extra that brings it
MOST_THREADS = max(64, os.cpu_count() or 1)  # ONNX Runtime starts them for minutes, and cannot be interrupted then
_GPU_FAILURE = re.compile(r"CU\w+ failure \d+: [^;\n]+|Please install TensorRT libraries")  # not of the model
NATIVE_FROM = 20_000  # neurons; in smaller networks what lies between convolutions takes no time to speak of


class Sessions:
    """The sessions of one model file: of its graph, and of what overlays make of that. Args and errors: see `Engine`.

    Attributes:
        sha256: of the file.
    """

    def __init__(self, path: Path, *, device: str, runtime: str, threads: int | None, cuda_graphs: bool) -> None:
        check_runtime(runtime, device)
        if cuda_graphs and (device, runtime) != ("cuda", "onnxruntime"):
            raise ValueError(f"cuda_graphs is for ONNX Runtime on device cuda, not {runtime} on {device}")
        self._providers = _providers(device) if runtime == "onnxruntime" else []
        if threads is not None and not 1 <= check_whole("threads", threads) <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, got {threads}")
        self._path, self._device, self._runtime = path, device, runtime
        self._threads = default_threads() if threads is None else threads
        self._model = read_model(path)
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        self._metadata: dict[str, Any] = {}
        self._precision = "fp32"
        self._cuda_graphs = cuda_graphs

    def first(self) -> tuple[Any, dict[str, Any]]:
        """The session of the graph itself, and the metadata in the file; by these all later sessions are opened."""
        session = self._start(self._model)
        self._metadata = parse_metadata(session_metadata(session, self._path).get(METADATA_KEY), self._path)
        if self._cuda_graphs and (reason := why_not(self._metadata)):
            raise ValueError(f"{self._path.name} cannot run with CUDA graphs: {reason}")
        if self._cuda_graphs or (self._device == "cuda" and self._metadata["precision"] == "fp16"):
            self._precision = self._metadata["precision"]
            session = self._start(self._model, graphs=self._cuda_graphs)  # anew: what it takes is only known now
        if self._cuda_graphs:
            states = {state["input"]: state["output"] for state in self._metadata["states"]}
            return GraphSession(session, "cuda", states), self._metadata
        return self.bind(session), self._metadata

    def first_native(self, wanted: bool | None) -> NativeSession | None:
        """The session of the graph itself with native operators; None if they are not wanted, or have nothing to do.

        Raises:
            ValueError: they are, and cannot be had; or TETDEPLOY_NATIVE, unless `wanted` is False, is neither 0 nor 1.
        """
        if wanted and (self._device, self._runtime) != ("cpu", "onnxruntime"):
            raise ValueError(f"native is for ONNX Runtime on a CPU, not {self._runtime} on {self._device}")
        if wanted is False:
            return None
        reason = native.missing()
        if not (wanted or gains_from_native(self._metadata, self._device, self._runtime)):
            return None
        if reason is not None:
            if wanted:
                raise ValueError(reason)
            return None
        return self._start_native(self._model, wanted=bool(wanted))

    def overlaid(self, overlay: bytes, *, native: bool) -> Any:
        """A session of what `overlay` makes of the graph, if `native` with native operators where there are such.

        Raises:
            ValueError: the graph lacks what the overlay reads.
        """
        model = self._model + overlay
        fused = self._start_native(model, wanted=False) if native else None
        try:
            return self.bind(fused or self._start(model))
        except ValueError as error:  # though the graph itself could be opened
            reason = first_line(error.__cause__ or error)
            raise ValueError(
                f"{self._path} answers, but its spikes cannot be counted: the graph lacks what an export counts, as "
                f"after an optimiser that merges layers; count those of the exported file ({reason})"
            ) from error

    def bind(self, session: Any) -> Any:
        """On a GPU, the session whose state outputs stay there."""
        return session if self._device == "cpu" else BoundSession(session, "cuda", state_outputs(self._metadata))

    def _start(self, model: bytes, *, fused: bool = False, graphs: bool = False) -> Any:
        if self._runtime == "openvino":
            return OpenVINOSession(model, self._threads, self._path.name)
        ort = import_extra("onnxruntime", "cpu")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # That threads wait for the next call before they sleep; by default they take a core each for some 50 ms.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        if fused:
            native.use(ort, options)
        providers = [(name, provider_options(name, self.sha256, self._precision)) for name in self._providers]
        if graphs:
            providers = [(name, given | GRAPH_OPTIONS) for name, given in providers]
        try:  # with its fallback a call that fails on the GPU would be made on the CPU, and all later ones
            session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's own exception classes are private
            other = f"{self._device} cannot be used: check driver and libraries, or choose device='cpu'"
            if self._device != "cpu" and (reason := _GPU_FAILURE.search(str(error))):
                if "out of memory" in reason[0]:
                    raise MemoryError(f"{self._path} cannot be loaded: {reason[0].strip()}") from error
                raise ValueError(f"{other} ({reason[0].strip()})") from error
            raise load_fault(self._path, error, f"; or {other}" if self._device != "cpu" else "") from error
        session._model_bytes = None  # it would keep the file's bytes, to start anew with other providers
        started = session.get_providers()
        if missing := [name for name in self._providers if name not in started]:
            libraries = (
                "the TensorRT 10 libraries"
                if missing[0].startswith("Tensorrt")
                else "the CUDA libraries, which pip install 'tetdeploy[gpu]' brings"
            )
            raise ValueError(
                f"ONNX Runtime could not start {missing[0]} and would have used {started[0]}; check the driver and "
                f"{libraries}, or choose device='cpu'"
            )
        return session

    def _start_native(self, model: bytes, *, wanted: bool) -> NativeSession | None:
        """A session with native operators; None where they have nothing to do, or fail without being `wanted`.

        Raises:
            ValueError: they fail, and are `wanted`.
        """
        try:
            from tetdeploy.native.fusing import fuse_model  # with the package onnx, which only this needs

            states = [(state["input"], state["output"]) for state in self._metadata["states"]]
            fused = fuse_model(model, states)
            return None if fused is None else NativeSession(self._start(fused, fused=True), states)
        except Exception as error:  # whatever it is, ONNX Runtime's own operators remain
            if wanted:
                raise ValueError(f"{self._path} cannot run natively: {error}") from error
            warnings.warn(
                f"{self._path} runs on ONNX Runtime's own operators alone: {error}", RuntimeWarning, stacklevel=4
            )
            return None


def gains_from_native(metadata: Mapping[str, Any], device: str, runtime: str) -> bool:
    """Whether native operators save time: on a CPU under ONNX Runtime, in a network that is not small."""
    neurons = sum(math.prod(layer["shape"]) for layer in metadata["neurons"])
    return (device, runtime) == ("cpu", "onnxruntime") and neurons >= NATIVE_FROM


def check_runtime(runtime: str, device: str) -> None:
    """Refuse a runtime that there is not, or not on this device, with ValueError."""
    check_choice("runtime", runtime, RUNTIMES)
    if runtime == "openvino" and device != "cpu":
        raise ValueError(f"runtime openvino runs on the CPU only, got device {device!r}; choose runtime onnxruntime")


def _providers(device: str) -> list[str]:
    """ONNX Runtime's execution providers for a device, if it can be asked for them."""
    check_choice("device", device, PROVIDERS)
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(both) == 2:
        raise ValueError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tetdeploy[cpu]' or 'tetdeploy[gpu]'"
        )
    ort = import_extra("onnxruntime", "cpu" if device == "cpu" else "gpu")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise ValueError(
            f"device {device!r} needs ONNX Runtime's {PROVIDERS[device]}, which this installation lacks: "
            "pip uninstall -y onnxruntime, then pip install 'tetdeploy[gpu]'"
        )
    if device != "cpu":
        prepare()
    if device == "tensorrt":
        return [PROVIDERS["tensorrt"], PROVIDERS["cuda"]]  # what TensorRT cannot do
    return [PROVIDERS[device]]


def _installed(distribution: str) -> bool:
    try:
        distributions.version(distribution)
    except distributions.PackageNotFoundError:
        return False
    return True
