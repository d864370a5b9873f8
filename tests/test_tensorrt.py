"""TensorRT engines are built by TensorRT-RTX, which needs no GPU; that they run is for test_tensorrt_engine.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command_helpers import printed, refused
from export_helpers import classifier, digits, engine, exported, folder, frames, int8_exported, layouts
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed, make_input_shape_fixed
from torch import Tensor, nn

from tetdeploy.export import ExportConfig, export_model, tensorrt
from tetdeploy.export.tensorrt import BuildConfig, Built, build_engine
from tetdeploy.export.tensorrt_graph import prepare
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.neurons import LIF
from tetdeploy.runtimes import nvidia
from tetdeploy.runtimes.nvidia import NoGpuError, target_architectures

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")

RTX = BuildConfig(package="tensorrt-rtx")


@cache
def feed(model: Path, count: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """Real digits, T=3 and membranes for every input of a graph."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray[Any, Any]] = {}
    for value in session.get_inputs():
        shape = [{"batch": count, "T": 3}[dim] if isinstance(dim, str) else dim for dim in value.shape]
        values[value.name] = (rng.random(shape) * 1.5).astype(np.float32)
    if values["x"].ndim == 5:
        values["x"] = frames(count, 3)
    elif session.get_inputs()[0].type == "tensor(uint8)":
        values["x"] = digits().images[:count]
    if "encode" in values:
        values["encode"] = np.array([True])
    if "steps" in values:
        values["steps"] = np.zeros((count, 3), np.uint8)
    return values


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TARGET = "tensorrt-rtx"


@cache
def built_once(layout: str, **options: Any) -> Built:
    name = "-".join([layout, *(f"{k}-{v}" for k, v in sorted(options.items()))])
    return build_engine(exported(layout, target=TARGET, **options), folder() / f"{name}.engine", RTX)


def reads(built: Built, *operators: str) -> list[str]:
    """The precisions that the kernels with one of these operators read."""
    layers = [layer for layer in built.manifest["layers"] if set(operators) & layer["operators"].keys()]
    return [precision for layer in layers for precision in layer["inputs"]]


@layouts
def test_every_layout_builds(layout: str, options: dict[str, Any]) -> None:
    model, built = exported(layout, target=TARGET, **options), built_once(layout, **options)
    manifest = json.loads(built.path.with_name(f"{built.path.name}.json").read_bytes())
    assert manifest == json.loads(json.dumps(built.manifest))
    assert built.path.stat().st_size == manifest["engine_bytes"] > 10_000
    assert manifest["engine_sha256"] == hashlib.sha256(built.path.read_bytes()).hexdigest()
    assert manifest["graph_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert manifest["metadata"] == engine(layout, target=TARGET, **options).metadata
    assert (manifest["package"], manifest["version"]) == ("tensorrt-rtx", trt.__version__)
    assert manifest["gpu_architectures"] == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert manifest["T"] == ([1, 4, 16] if layout == "dynamic" else None)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    assert sorted(tensor["name"] for tensor in manifest["tensors"]) == sorted(wanted)
    kinds = {"tensor(uint8)": "uint8", "tensor(float)": "float", "tensor(bool)": "bool"}
    for value in session.get_inputs():
        tensor = next(tensor for tensor in manifest["tensors"] if tensor["name"] == value.name)
        assert tensor["dtype"] == kinds[value.type]
        assert tensor["shape"] == [-1 if isinstance(dim, str) else dim for dim in value.shape]


@layouts
def test_the_report_tells_of_every_neuron_layer(layout: str, options: dict[str, Any]) -> None:
    built = built_once(layout, **options)
    layers = built.manifest["layers"]
    assert {name for layer in layers for name in layer["neurons"]} == {"lif1", "lif2", "lif3"}
    sizes = {"Int32", "Int64"}  # which of them depends on what the process has built before
    assert set(reads(built, "Conv", "Gemm", "MatMul")) <= {"Float", *sizes}
    done = sum((Counter(layer["operators"]) for layer in layers), Counter())
    assert done["Conv"] == 3
    if layout == "unrolled" and not options.get("with_state"):
        fused = [layer for layer in layers if layer["neurons"]]
        assert sum(layer["operators"].get("Greater", 0) for layer in fused) >= 9
        assert len(fused) < 9  # steps of a neuron layer share kernels


@pytest.mark.parametrize(("layout", "target"), [("unrolled", TARGET), ("dynamic", "cpu"), ("step", "cpu")])
def test_a_graph_that_is_not_folded_builds(layout: str, target: str, tmp_path: Path) -> None:
    model = exported(layout, target=target, fold_bn=False)
    assert build_engine(model, tmp_path / "m.engine", RTX).manifest["metadata"]["fold_bn"] is False


@pytest.mark.parametrize(
    ("layout", "options"),
    [("unrolled", {"T": 3}), ("dynamic", {}), ("step", {"encoding": "frames"})],
    ids=lambda value: str(value),
)
def test_float16_comes_from_the_graph(layout: str, options: dict[str, Any]) -> None:
    built = built_once(layout, precision="fp16", **options)
    assert reads(built, "Conv") == ["Float", "Half", "Half"]
    assert set(reads(built, "Gemm", "MatMul")) <= {"Float", "Int64"}


INT8: list[tuple[str, dict[str, Any]]] = [
    ("unrolled", {}),
    ("unrolled", {"with_state": True}),
    ("dynamic", {}),
    ("step", {}),
    ("step", {"encoding": "frames"}),
]


@pytest.mark.parametrize(("layout", "options"), INT8, ids=lambda value: str(value))
def test_int8_convolutions_stay_int8(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    built = build_engine(int8_exported(layout, target=TARGET, **options), tmp_path / "m.engine", RTX)
    types = [layer["inputs"] for layer in built.manifest["layers"] if layer["type"] == "correlation"]
    assert types.count(["Int8"]) == 2 and len(types) == 3  # the first reads the image
    assert {name for layer in built.manifest["layers"] for name in layer["neurons"]} == {"lif1", "lif2", "lif3"}


def _narrow(graph: onnx.ModelProto) -> None:
    """A quarter of the range that currents have, so that they are clipped at both ends."""
    scales = {node.input[1] for node in graph.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in graph.graph.initializer:
        if tensor.name in scales and (value := onnx.numpy_helper.to_array(tensor)) != 1:  # that of spikes
            tensor.CopyFrom(onnx.numpy_helper.from_array(value / np.float32(4), tensor.name))


@pytest.mark.parametrize(("layout", "options"), INT8, ids=lambda value: str(value))
def test_what_is_prepared_of_int8_computes_the_same(layout: str, options: dict[str, Any]) -> None:
    prepared_computes_the_same(int8_exported(layout, target=TARGET, **options))


class Separable(nn.Module):
    """A depthwise convolution, and a pointwise one of its current."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), LIF(v_th=0.3)
        self.separable = OverTime(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), tdBN(8))
        self.lif2, self.readout = LIF(v_th=0.3), OverTime(nn.Flatten(), nn.Linear(8 * 8 * 8, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.separable(self.lif1(self.encode(x, T)))))
        return logits


def test_a_convolution_of_the_current_of_another_one_in_int8(tmp_path: Path) -> None:
    images = digits().images[:40]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = classifier(Separable())
    config = ExportConfig(T=3, trained_T=3, precision="int8", target=TARGET)
    model = export_model(network, tmp_path / "m.onnx", config, images, num_check=40, calibration=(images, None)).path
    prepared_computes_the_same(model)
    built = build_engine(model, config=RTX)
    assert built.path.exists() and "Int8" in reads(built, "Conv")


def prepared_computes_the_same(model: Path) -> None:
    given = onnx.load(model)
    _narrow(given)
    plain_bytes = given.SerializeToString()
    graph = prepare(given)
    onnx.checker.check_model(graph, full_check=True)
    used = {name for node in graph.graph.node for name in node.input}
    types = {tensor.data_type for tensor in graph.graph.initializer if tensor.name in used}
    assert onnx.TensorProto.INT8 in types and not types & {onnx.TensorProto.UINT8, onnx.TensorProto.INT32}
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # both then sum in float32
    before, after = (
        ort.InferenceSession(bytes_, plain, providers=["CPUExecutionProvider"]).run(None, feed(model))
        for bytes_ in (plain_bytes, graph.SerializeToString())
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@layouts
def test_what_is_prepared_computes_the_same(layout: str, options: dict[str, Any]) -> None:
    model = exported(layout, **options)
    graph = prepare(onnx.load(model))
    onnx.checker.check_model(graph, full_check=True)
    before = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed(model))
    after = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed(model))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    readers = {node.op_type for node in graph.graph.node if "x" in node.input}
    assert readers == ({"Cast"} if "normalize" not in options else readers)
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)


def test_float32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = []
    run = tensorrt._Build.run

    def spied(self: Any, refused: str) -> bytes:
        flags.append(self._config.get_flag(trt.BuilderFlag.TF32))
        return run(self, refused)

    monkeypatch.setattr(tensorrt._Build, "run", spied)
    build_engine(exported("unrolled", T=3), tmp_path / "m.engine", RTX)
    assert flags == [False]


def test_ranges_and_limits_reach_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reports: list[str] = []
    limits = []
    run = tensorrt._Build.run

    def spied(self: Any, refused: str) -> bytes:
        limits.append(self._config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))
        plan = run(self, refused)
        reports.append(self.report)
        return plan

    monkeypatch.setattr(tensorrt._Build, "run", spied)
    config = BuildConfig("tensorrt-rtx", batch=(2, 3, 5), T=(1, 7, 9), workspace_mb=64)
    build_engine(exported("dynamic"), tmp_path / "m.engine", config)
    assert limits == [64 << 20]
    assert "MinShape: [2,1,8,8], OptShape: [3,1,8,8], MaxShape: [5,1,8,8]" in reports[0]
    assert "MinShape: [2,1], OptShape: [3,7], MaxShape: [5,9]" in reports[0]


@pytest.mark.parametrize("alone", [False, True])
def test_a_batch_that_was_fixed_is_the_engines_whatever_was_asked_for(alone: bool, tmp_path: Path) -> None:
    model = onnx.load(exported("step"))
    if alone:  # of the states it is free
        make_input_shape_fixed(model.graph, "x", [3, 1, 8, 8])
    else:
        make_dim_param_fixed(model.graph, "batch", 3)
    onnx.save(model, tmp_path / "m.onnx")
    assert build_engine(tmp_path / "m.onnx", config=RTX).manifest["batch"] == (3, 3, 3)


@pytest.mark.parametrize(("trained_T", "most"), [(4, 16), (8, 16), (9, 18)])
def test_t_may_be_16_or_twice_that_of_the_training(trained_T: int, most: int) -> None:
    metadata = {"layout": "dynamic", "trained_T": trained_T}
    assert tensorrt._steps(None, metadata, Path("m.onnx")) == (1, trained_T, most)


def test_architectures_are_those_asked_for(tmp_path: Path) -> None:
    config = BuildConfig("tensorrt-rtx", gpu_architectures=("12.0", "8.9"))
    built = build_engine(exported("step"), tmp_path / "a.engine", config)
    assert built.manifest["gpu_architectures"] == ["8.9", "12.0"]
    assert names_in(tmp_path) == ["a.engine", "a.engine.json"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_turing_is_refused_for_the_readout(precision: str, tmp_path: Path) -> None:
    model = exported("unrolled", T=3, target=TARGET, precision=precision)
    turing = BuildConfig(TARGET, gpu_architectures=("7.5",))
    with pytest.raises(ValueError, match=r"'7\.5', where it has no float32 matrix products, and a readout is one; it"):
        build_engine(model, tmp_path / "m.engine", turing)
    # TensorRT refuses it still, and in a process of its own: it would choose other kernels in the builds that follow.
    code = """
import sys
from tetdeploy.export import tensorrt
from tetdeploy.export.tensorrt import BuildConfig, build_engine
tensorrt.target_architectures = lambda *_: ["7.5"]
build_engine(sys.argv[1], sys.argv[2], BuildConfig("tensorrt-rtx", gpu_architectures=("7.5",)))
"""
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "m.engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert re.search(r"\nValueError: tensorrt-rtx .* cannot build .*: .*Turing.*FP32 GEMM", done.stderr), done.stderr
    assert not names_in(tmp_path)


@pytest.mark.parametrize("name", ["7.5", "9.0", "10.0"])
def test_these_cards_are_for_the_other_package(name: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot build .* '{name}'.* The package tensorrt can.*--extra-index-url"):
        target_architectures(trt, "tensorrt-rtx", ("8.9", name))


@pytest.mark.parametrize("name", ["6.1", "", "ada", "8.9a"])
def test_other_cards_are_for_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"it can for 8\.0, 8\.6, 8\.9, 12\.0, 12\.1\.$"):
        target_architectures(trt, "tensorrt-rtx", (name,))


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX in the place of TensorRT, and a GPU of architecture 9.0: the code's other path, not the library."""
    for module in (nvidia, tensorrt):
        monkeypatch.setattr(module, "gpu_runtime", lambda purpose: SimpleNamespace())
    monkeypatch.setattr(nvidia, "gpu_architecture", lambda cuda: "9.0")
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda package: trt)


def test_tensorrt_builds_for_the_gpu_at_hand(with_gpu: None, tmp_path: Path) -> None:
    built = build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt"))
    assert (built.manifest["package"], built.manifest["gpu_architectures"]) == ("tensorrt", ["9.0"])
    with pytest.raises(ValueError, match=r"for the GPU at hand, here 9\.0, not for 8\.9; .*--package tensorrt-rtx"):
        build_engine(exported("step"), tmp_path / "n.engine", BuildConfig("tensorrt", gpu_architectures=("8.9",)))
    with pytest.raises(ValueError, match=r"for the GPU at hand, here 9\.0, not for 9\.0, 8\.9; "):
        target_architectures(trt, "tensorrt", ("9.0", "8.9"))


def test_a_timing_cache_is_kept_where_there_is_one(with_gpu: None, tmp_path: Path) -> None:
    timings = tmp_path / "timings.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX's, which stands in here
        for _ in range(2):  # made, then read
            build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt", timing_cache=timings))
            assert timings.stat().st_size > 0
    with pytest.raises(ValueError, match="TensorRT-RTX has no timing cache"):
        build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt-rtx", timing_cache=timings))


@pytest.mark.parametrize("refused", [{"create_timing_cache": None}, {"set_timing_cache": False}], ids=str)
def test_a_timing_cache_that_tensorrt_does_not_take_stays_as_it_was(
    refused: dict[str, Any], with_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = tmp_path / "timings.bin"
    timings.write_bytes(b"of another card")
    for name, answer in refused.items():  # TensorRT-RTX, which stands in here, takes anything
        monkeypatch.setattr(trt.IBuilderConfig, name, lambda *_, answer=answer, **__: answer)
    with pytest.raises(ValueError, match=r"timings\.bin is no timing cache of this version of TensorRT and this GPU; "):
        build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt", timing_cache=timings))
    assert names_in(tmp_path) == ["timings.bin"] and timings.read_bytes() == b"of another card"


def test_tensorrt_without_a_driver_is_refused_before_it_is_touched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_driver(purpose: str) -> None:
        raise NoGpuError(f"{purpose} needs a driver")

    def touched(package: str) -> None:
        raise AssertionError("TensorRT was imported")

    monkeypatch.setattr(tensorrt, "gpu_runtime", no_driver)
    monkeypatch.setattr(tensorrt, "import_tensorrt", touched)
    with pytest.raises(NoGpuError, match=r"^building with TensorRT \(not with TensorRT-RTX\) needs a driver$"):
        build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt"))


def test_a_full_disk_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"an earlier engine")
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        build_engine(exported("step"), path, RTX)
    assert caught.value.filename == str(path)
    said = f"Error: {path}: No space left on device; make room, or write elsewhere\n"
    assert refused("build", exported("step"), "-o", path) == said
    assert names_in(tmp_path) == ["m.engine"]
    assert path.read_bytes() == b"an earlier engine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_a_build_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    seen = []

    def interrupt(phase: str, done: int, total: int) -> None:
        seen.append((phase, done, total))
        if len(seen) == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        build_engine(exported("step"), tmp_path / "m.engine", RTX, progress=interrupt)
    assert seen and all(1 <= done <= total for _, done, total in seen)
    assert signal.getsignal(number) is before
    assert not names_in(tmp_path)


def test_ctrl_c_while_tensorrt_writes_its_log_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def observers(*arguments: Any) -> tuple[Any, Any]:
        log, monitor = observed(*arguments)

        class Interrupted(type(log)):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                messages.append(message)
                if len(messages) == 1:
                    signal.raise_signal(signal.SIGINT)

        return Interrupted(), monitor

    observed, messages = tensorrt._observers, list[str]()
    monkeypatch.setattr(tensorrt, "_observers", observers)
    with pytest.raises(KeyboardInterrupt):
        build_engine(exported("step"), tmp_path / "m.engine", RTX)
    assert messages and not names_in(tmp_path)


def test_progress_is_that_of_the_whole_build() -> None:
    seen = []
    _, monitor = tensorrt._observers(trt, lambda *done: seen.append(done))
    monitor.phase_start("Building", None, 6)
    monitor.phase_start("Timing kernels", "Building", 90)
    assert monitor.step_complete("Timing kernels", 0) and monitor.step_complete("Building", 2)
    assert seen == [("Building", 3, 6)]
    monitor.stopped = True
    assert not monitor.step_complete("Building", 3)  # which ends the build there


def test_a_refused_node_is_named_with_the_reason_behind_the_refusal() -> None:
    said = "In function importScan:\nAssertion failed: no such input\nIn node 7"
    error = SimpleNamespace(node_operator=lambda: "Scan", node_name=lambda: "lif1", desc=lambda: said)
    assert tensorrt._reason(error) == "Scan lif1: In function importScan: Assertion failed: no such input"


def test_a_graph_that_tensorrt_cannot_parse_is_refused(tmp_path: Path) -> None:
    graph = onnx.load(exported("unrolled", T=3))
    next(node for node in graph.graph.node if node.op_type == "MaxPool").op_type = "Unknown"
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"^tensorrt-rtx .* cannot build m\.onnx: Unknown node_max_pool2d: "):
        build_engine(tmp_path / "m.onnx", config=RTX)
    assert names_in(tmp_path) == ["m.onnx"]


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        build_engine(tmp_path / "no.onnx", config=RTX)
    for damaged in (b"not a model", b""):
        (tmp_path / "m.onnx").write_bytes(damaged)
        with pytest.raises(ValueError, match="not an ONNX model, or a damaged one; export or copy it again"):
            build_engine(tmp_path / "m.onnx", config=RTX)
    graph = onnx.load(exported("unrolled", T=3))
    graph.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ValueError, match=r"^the graph keeps .* in another file, as no export of tetdeploy does"):
        build_engine(tmp_path / "m.onnx", config=RTX)
    graph = onnx.load(exported("step"))
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not one that tetdeploy exported"):
        build_engine(tmp_path / "other.onnx", config=RTX)
    with pytest.raises(ValueError, match=r"^an engine's file name ends in \.engine, got m\.onnx$"):
        build_engine(exported("step"), tmp_path / "m.onnx", RTX)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is step: only a dynamic graph has a free T"):
        build_engine(exported("step"), tmp_path / "m.engine", BuildConfig("tensorrt-rtx", T=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"batch must be MIN:OPT:MAX .*, got \(0, 1, 2\)"):
        BuildConfig(batch=(0, 1, 2))
    with pytest.raises(ValueError, match=r"T must be .*, got \(3, 2, 4\)"):
        BuildConfig(T=(3, 2, 4))
    with pytest.raises(ValueError, match=r"workspace_mb must lie in 1\.\.2147483647, got 0"):
        BuildConfig(workspace_mb=0)
    for batch in (5, (1, 2)):
        with pytest.raises(ValueError, match=r"batch must be three whole numbers \(MIN, OPT, MAX\), got"):
            BuildConfig(batch=batch)  # type: ignore[arg-type]
    for options in ({"batch": (1.5, 2, 3)}, {"T": (1, 2, "3")}, {"workspace_mb": "4"}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))} must be a whole number, got"):
            BuildConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"batch": (1, 1, 2**31)}, {"T": (1, 1, 10**20)}, {"workspace_mb": 2**31}],
    ids=lambda options: next(iter(options)),
)
def test_numbers_that_tensorrt_cannot_hold(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(options))} must .*2147483647, got \d+$"):
        BuildConfig(**options)


def test_the_command_builds_and_reports(tmp_path: Path) -> None:
    arguments = ["build", exported("dynamic"), "-o", tmp_path / "m.engine", "--package", "tensorrt-rtx"]
    options = ["--batch", "4", "--T", "1:3:5", "--gpu-arch", "8.6, 8.9", "--json", tmp_path / "b.json", "-v"]
    output = printed(*arguments, *options)
    assert f"tensorrt-rtx {trt.__version__} for GPU architecture 8.6, 8.9   batch 4:4:4   T 1:3:5" in output
    assert "lif3" in output and "kernels by the precision they write" in output
    written = json.loads((tmp_path / "b.json").read_text())
    assert (written["batch"], written["T"]) == ([4, 4, 4], [1, 3, 5])
    assert written["engine"] == str(tmp_path / "m.engine") and "metadata" not in written


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--batch", "1:2"], 2, "'1:2' is neither MIN:OPT:MAX nor a number"),
        (["--batch", "3:2:1"], 2, "1 <= MIN <= OPT <= MAX must hold"),
        (["--gpu-arch", "9.0"], 1, "The package tensorrt can"),
        (["--package", "trt"], 2, "'trt' is not one of"),
    ],
)
def test_the_command_refuses_in_one_line(options: list[str], code: int, message: str, tmp_path: Path) -> None:
    arguments = ["build", exported("step"), "-o", tmp_path / "m.engine", "--package", "tensorrt-rtx"]
    assert message in refused(*arguments, *options, code=code)
    assert not names_in(tmp_path)


def test_int8_of_another_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was exported for cpu.*--target tensorrt-rtx"):
        build_engine(int8_exported("unrolled"), tmp_path / "m.engine", RTX)
    assert not names_in(tmp_path)


@pytest.mark.parametrize(("place", "other"), [(1, np.float32(0.5)), (2, np.uint8(128))], ids=["scale", "zero"])
def test_int8_of_others_is_refused(place: int, other: np.generic, tmp_path: Path) -> None:
    graph = onnx.load(int8_exported("unrolled", target=TARGET))
    read = {node.input[0] for node in graph.graph.node if node.op_type == "Conv"}
    spikes = next(n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.output[0] in read)
    spikes.input[place] = "other"  # a tensor of its own: others may read the one that it has
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(other), "other"))
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"^uint8 spikes, .* of their own, .*tetdeploy export --precision int8"):
        build_engine(tmp_path / "m.onnx", config=RTX)
    assert names_in(tmp_path) == ["m.onnx"]
