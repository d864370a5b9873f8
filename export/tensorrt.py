"""TensorRT engines from exported graphs, with `tensorrt` (11 or later) or `tensorrt-rtx`: one API serves both.

An engine computes what the graph says: networks are strongly typed, so float16 and int8 come from the ONNX file, and
TF32, which would round float32 currents to 10 bits and so change spikes, is off.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tetdeploy.arguments import check_whole
from tetdeploy.runtimes.manifest import manifest_path
from tetdeploy.runtimes.nvidia import BUILDING, choose_package, gpu_runtime, import_tensorrt, target_architectures
from tetdeploy.storage.files import atomic_write, check_writable, write_json
from tetdeploy.storage.model_file import read_model
from tetdeploy.storage.provenance import written
from tetdeploy.system.signals import handled, second_ctrl_c_ends, terminations

from .progress import Progress
from .reading import parse_graph
from .tensorrt_graph import layers_of, prepare

Range = tuple[int, int, int]
_MOST = 2**31 - 1  # of a dimension, in TensorRT; its calls take no number beyond 64 bits


@dataclass(frozen=True)
class BuildConfig:
    """What engine to build.

    Attributes:
        package: `tensorrt`, `tensorrt-rtx`, or `auto`, the one that is installed.
        batch: least, usual and most images of one call.
        T: least, usual and most steps, for the dynamic layout only; None is 1, the training's T, and twice that or 16.
        gpu_architectures: compute capabilities to build for, such as `8.9`; None is all that TensorRT-RTX can build
            into one engine, and for TensorRT the GPU at hand.
        workspace_mb: most memory for the scratch space of one kernel; None is all that the GPU has.
        timing_cache: file that keeps what TensorRT measured, so that the next build need not; TensorRT-RTX has none.
    """

    package: str = "auto"
    batch: Range = (1, 8, 64)
    T: Range | None = None
    gpu_architectures: tuple[str, ...] | None = None
    workspace_mb: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("T", self.T)):
            if value is not None:
                _check_range(name, value)
        if self.workspace_mb is not None and not 1 <= check_whole("workspace_mb", self.workspace_mb) <= _MOST:
            raise ValueError(f"workspace_mb must lie in 1..{_MOST}, got {self.workspace_mb}")


def _check_range(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != 3:
        raise ValueError(f"{name} must be three whole numbers (MIN, OPT, MAX), got {value!r}")
    least, usual, most = (check_whole(name, number) for number in value)
    if not 1 <= least <= usual <= most:
        raise ValueError(f"{name} must be MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, got {value}")
    if most > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, got {most}")


@dataclass(frozen=True)
class Built:
    """What a build wrote: the engine at `path` and its manifest beside it."""

    path: Path
    manifest: dict[str, Any]


def build_engine(
    model: Path | str,
    path: Path | str | None = None,
    config: BuildConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Built:
    """Build a TensorRT engine from an exported graph, with a manifest, `<path>.json`, beside it.

    Args:
        model: the `.onnx` file.
        path: the engine; `<model without .onnx>.engine` by default.
        progress: called with (phase, done, all) during the build.

    Raises:
        ValueError: the graph is none of ours, the configuration does not fit it, the package or the GPU, or TensorRT
            refuses it or the timing cache. Nothing is written then, and earlier files stay as they were.
        OSError: a file cannot be read or written, a full disk for one.
        MissingExtraError: TensorRT is not installed.
    """
    config = config or BuildConfig()
    model = Path(model)
    path = model.with_suffix(".engine") if path is None else Path(path)
    if path.suffix != ".engine":
        raise ValueError(f"an engine's file name ends in .engine, got {path.name}")
    data = read_model(model)
    graph, metadata = parse_graph(data, model)
    T = _steps(config.T, metadata, model)
    package = choose_package(config.package)
    _check_target(metadata, package, model)
    if package == "tensorrt":
        gpu_runtime(BUILDING)  # before any object of TensorRT is made
    trt = import_tensorrt(package)
    architectures = target_architectures(trt, package, config.gpu_architectures)
    _check_cache(config.timing_cache, package)
    check_writable(path, ".engine", remedy="name another file")
    check_writable(manifest_path(path), remedy="name another file")
    started = time.perf_counter()
    prepared = prepare(graph)
    log, monitor = _observers(trt, progress)
    with _interruptible(monitor):
        build = _Build(trt, prepared, log, monitor)
        build.configure(config, T, architectures if package == "tensorrt-rtx" else ())
        plan = build.run(f"{package} {trt.__version__} cannot build {model.name}")
    manifest = {
        "format": 1,
        "package": package,
        "version": trt.__version__,
        "gpu_architectures": architectures,
        "graph": model.name,
        "graph_sha256": hashlib.sha256(data).hexdigest(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "engine_bytes": len(plan),
        "batch": build.batch,
        "T": T,
        "workspace_mb": config.workspace_mb,
        "tensors": build.tensors,
        "layers": layers_of(build.report, graph),
        "build_seconds": round(time.perf_counter() - started, 3),
        **written(onnx=onnx.__version__),
        "metadata": metadata,
    }
    # Only now: a second Ctrl-C during the build ends the process at once.
    with atomic_write(manifest_path(path)) as manifest_file, atomic_write(path) as engine_file:
        engine_file.write_bytes(plan)
        write_json(manifest_file, manifest)
        if config.timing_cache is not None:
            build.save_timings(config.timing_cache)
    return Built(path, manifest)


class _Build:
    """One build. The parser owns the weights and the network the parser's objects: both live until the engine is
    there, and the parser goes first."""

    def __init__(self, trt: Any, graph: onnx.ModelProto, log: Any, monitor: Any) -> None:
        self._trt, self._log, self._monitor = trt, log, monitor
        self._builder = trt.Builder(self._log)
        self._network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parser = trt.OnnxParser(self._network, self._log)
        self._config = self._builder.create_builder_config()
        self._parsed = self._parser.parse(graph.SerializeToString())

    @property
    def report(self) -> str:
        """TensorRT's account of the kernels."""
        return str(self._log.layers)

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """Inputs and outputs; -1 is a dimension of the call."""
        network = self._network
        inputs = [network.get_input(k) for k in range(network.num_inputs)]
        outputs = [network.get_output(k) for k in range(network.num_outputs)]
        return [
            {"name": t.name, "kind": kind, "dtype": t.dtype.name.lower(), "shape": list(t.shape)}
            for kind, some in (("input", inputs), ("output", outputs))
            for t in some
        ]

    def configure(self, config: BuildConfig, T: Range | None, architectures: tuple[str, ...] | list[str]) -> None:
        trt, settings = self._trt, self._config
        settings.clear_flag(trt.BuilderFlag.TF32)
        settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the log does not tell of the kernels
        settings.progress_monitor = self._monitor
        if config.workspace_mb is not None:
            settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mb << 20)
        if architectures:
            settings.num_compute_capabilities = len(architectures)
            for k, name in enumerate(architectures):
                settings.set_compute_capability(trt.ComputeCapability.__members__[f"SM{name.replace('.', '')}"], k)
        if config.timing_cache is not None:
            kept = config.timing_cache.read_bytes() if config.timing_cache.exists() else b""
            self._timings = settings.create_timing_cache(kept)
            if self._timings is None or not settings.set_timing_cache(self._timings, ignore_mismatch=False):
                raise ValueError(
                    f"{config.timing_cache} is no timing cache of this version of TensorRT and this GPU; delete it, or "
                    "name another file"
                )
        inputs = [self._network.get_input(k) for k in range(self._network.num_inputs)]
        shapes = {value.name: tuple(value.shape) for value in inputs}
        fixed = next(iter(shapes.values()), (-1,))[0]  # free in every export, but it may be fixed afterwards
        self.batch = config.batch if fixed == -1 else (fixed,) * 3
        profile = self._builder.create_optimization_profile()
        for name, shape in shapes.items():
            if -1 in shape:
                profile.set_shape(name, *(_with_free(shape, self.batch[i], T and T[i]) for i in range(3)))
        settings.add_optimization_profile(profile)

    def run(self, refused: str) -> bytes:
        """The engine.

        Raises:
            ValueError: `refused`, and TensorRT's reason.
        """
        plan = self._builder.build_serialized_network(self._network, self._config) if self._parsed else None
        reasons = [_reason(self._parser.get_error(k)) for k in range(self._parser.num_errors)] + self._log.errors
        del self._parser
        if plan is None:
            raise ValueError(f"{refused}: {reasons[0] if reasons else 'it does not say why'}")
        return bytes(plan)

    def save_timings(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(bytes(self._timings.serialize()))


def _reason(error: Any) -> str:
    """Which node the parser refuses, and why: the first line may say only that it does."""
    return f"{error.node_operator()} {error.node_name()}: {' '.join(error.desc().splitlines()[:2])}"


def _observers(trt: Any, progress: Progress | None) -> tuple[Any, Any]:
    """What listens to a build: a log that keeps errors and the account of the kernels, a monitor that can stop it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = message

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if progress is not None and phase_name in self._steps:
                progress(phase_name, step + 1, self._steps[phase_name])
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Log(), Monitor()


@contextmanager
def _interruptible(monitor: Any) -> Iterator[None]:
    """Ctrl-C, SIGTERM or SIGHUP stops the build at its next step, and is raised behind it: an exception in what
    TensorRT calls, the log already while it loads, would be lost. A step may take minutes, so that a second Ctrl-C ends
    the process.

    Raises:
        KeyboardInterrupt: one of them came, whatever else the block raises.
    """

    def stop(*_: object) -> None:
        monitor.stopped = True

    try:
        with handled(stop, signal.SIGINT, *terminations()), second_ctrl_c_ends():
            yield
    finally:
        if monitor.stopped:
            raise KeyboardInterrupt


def _steps(asked: Range | None, metadata: dict[str, Any], path: Path) -> Range | None:
    """The range of T of a dynamic graph; None for the others, which have no free T."""
    if metadata["layout"] != "dynamic":
        if asked is not None:
            raise ValueError(f"{path.name} is {metadata['layout']}: only a dynamic graph has a free T; leave --T out")
        return None
    trained_T = int(metadata["trained_T"])
    return asked or (1, trained_T, max(16, 2 * trained_T))


def _check_target(metadata: dict[str, Any], package: str, path: Path) -> None:
    """Refuse an int8 graph whose quantisation stands where ONNX Runtime wants it, and TensorRT does not."""
    if metadata["precision"] == "int8" and metadata["target"] == "cpu":
        raise ValueError(
            f"{path.name} was exported for cpu, and TensorRT would not compute its convolutions in 8 bits; export it "
            f"again: tetdeploy export --precision int8 --target {package}"
        )


def _check_cache(path: Path | None, package: str) -> None:
    if path is not None and package == "tensorrt-rtx":
        raise ValueError(
            "TensorRT-RTX has no timing cache: it measures nothing at the build, and chooses its kernels where the "
            "engine runs; leave --timing-cache out"
        )


def _with_free(shape: tuple[int, ...], N: int, T: int | None) -> tuple[int, ...]:
    """A shape with its free dimensions set: the batch is the first axis, T the second."""
    free = (N, T)
    return tuple(free[axis] if dim == -1 else dim for axis, dim in enumerate(shape))  # type: ignore[misc]
