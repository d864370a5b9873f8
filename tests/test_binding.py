"""I/O binding: bound to the CPU it computes what the plain path computes; on a GPU where there is one.

Of the providers for GPUs only what is asked of ONNX Runtime is tested without a GPU.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import onnxruntime
import pytest
from export_helpers import digits, engine, exported, frames, inputs, layouts, pooled
from gpu_stand_in import BoundSessions, gpu_build
from onnxruntime import OrtValue

from tetdeploy.early_exit import Exit, certainty
from tetdeploy.engine import Engine
from tetdeploy.engine_stream import Stream
from tetdeploy.runtimes.onnxruntime_gpu import BoundSession, DeviceArray, DeviceZeros, provider_options

Array = np.ndarray[Any, Any]


def make(layout: str, options: dict[str, Any]) -> Engine:
    with patch("tetdeploy.engine.Sessions", BoundSessions):
        return Engine(exported(layout, **options), threads=1)


# ------------------------------------------------------------------------------------------------ bound to the CPU


@layouts
def test_runs_and_counts_are_the_same(layout: str, options: dict[str, Any]) -> None:
    plain, other = engine(layout, **options), make(layout, options)
    assert isinstance(other._session, BoundSession) and not isinstance(plain._session, BoundSession)
    for count, T in ((5, 3), (1, 2)):
        x = inputs(plain, count, 3)
        np.testing.assert_array_equal(other.run(x, T).per_step, plain.run(x, T).per_step)
        (result, counts), (wanted, wanted_counts) = other.count(x, T), plain.count(x, T)
        np.testing.assert_array_equal(result.per_step, wanted.per_step)
        assert counts.keys() == wanted_counts.keys() and counts
        for name, value in counts.items():
            np.testing.assert_array_equal(value, wanted_counts[name])


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("step", {}),
        ("step", {"encoding": "frames"}),
        ("unrolled", {"T": 3, "with_state": True}),
        ("unrolled", {"T": 3, "with_state": True, "encoding": "frames"}),
    ],
    ids=str,
)
def test_streams_are_the_same(layout: str, options: dict[str, Any]) -> None:
    plain, other = engine(layout, **options).stream(2), make(layout, options).stream(2)
    x = frames(2, 15) if options.get("encoding") else digits().images[:4]
    for t in range(5):
        shown = (x[:, 3 * t : 3 * t + 3] if layout == "unrolled" else x[:, t]) if options.get("encoding") else None
        if not options.get("encoding") and t in (0, 3):
            shown = x[t // 3 : t // 3 + 2]
        wanted, got = plain.push(shown), other.push(shown)
        np.testing.assert_array_equal(got.logits, wanted.logits)
        np.testing.assert_array_equal(got.step_logits, wanted.step_logits)
    for name, u in plain.state.items():
        assert u.any()
        np.testing.assert_array_equal(other.state[name], u)
    saved = plain.state
    plain.reset()
    other.reset()
    plain.state = other.state = saved
    first = x[:, :3] if layout == "unrolled" else x[:, 0]
    again = first if options.get("encoding") else x[:2]
    np.testing.assert_array_equal(other.push(again).step_logits, plain.push(again).step_logits)


def test_state_and_image_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on only the flag `encode` comes from the host, and only the logits go there."""
    runner = make("step", {})
    stream = runner.stream(2)
    stream.push(digits().images[:2])
    fed: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    run = runner._session.run

    def watched(names: list[str], feed: dict[str, Any]) -> list[Any]:
        fed.append(feed)
        outputs: list[Any] = run(names, feed)
        given.append(dict(zip(names, outputs, strict=True)))
        return outputs

    monkeypatch.setattr(runner._session, "run", watched)
    for _ in range(3):
        stream.push()
    for feed, outputs in zip(fed, given, strict=True):
        assert {name for name, value in feed.items() if not isinstance(value, DeviceArray)} == {"encode"}
        assert {name for name, value in outputs.items() if not isinstance(value, DeviceArray)} == {"per_step"}
    assert fed[0]["x"] is fed[2]["x"]
    for state in (*runner.metadata["states"], *runner.metadata["encoded"]):
        assert fed[1][state["input"]] is given[0][state["output"]]


def test_zeros_go_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a second run only the image and the flag `encode` come from the host."""
    runner, images = make("step", {}), digits().images
    put, run = OrtValue.ortvalue_from_numpy, runner._session.run
    sent: list[int] = []

    def counted(array: Array, *where: Any) -> Any:
        sent.append(array.nbytes)
        return put(array, *where)

    def watched(names: list[str], feed: dict[str, Any]) -> list[Any]:
        sent.extend(value.nbytes for value in feed.values() if not isinstance(value, DeviceArray))
        outputs: list[Any] = run(names, feed)
        return outputs

    monkeypatch.setattr(OrtValue, "ortvalue_from_numpy", counted)
    monkeypatch.setattr(runner._session, "run", watched)
    runner.run(images[:4], 2)
    largest = max(np.prod(state["shape"]) for state in runner.metadata["states"])
    assert sum(sent) >= 4 * 4 * largest
    for count in (4, 3, 4):
        sent.clear()
        got = runner.run(images[:count], 2).per_step
        assert sent == [images[:count].nbytes, 1, 1]
        np.testing.assert_array_equal(got, engine("step").run(images[:count], 2).per_step)


def test_zeros_share_the_memory_of_the_longest_and_stay_zero() -> None:
    runner, images = make("step", {}), digits().images
    streams = [runner.stream(batch) for batch in (2, 7, 7, 3)]
    for stream in streams:
        for _ in range(2):  # at first, and after a reset
            assert all(u.shape[0] == stream.batch and not u.any() for u in stream.state.values())
            wanted = engine("step").run(images[: stream.batch], 1).per_step[:, 0]
            np.testing.assert_array_equal(stream.push(images[: stream.batch]).step_logits, wanted)
            stream.reset()
    zeros = [u for stream in streams for u in (*stream._u.values(), *stream._kept.values())]
    assert all(isinstance(u, DeviceZeros) for u in zeros)
    assert len({u.value.data_ptr() for u in zeros}) == 1


def test_the_callers_buffer_may_be_filled_anew() -> None:
    buffer = digits().images[:1].copy()
    whole = engine("step").run(buffer, 3).per_step
    stream = make("step", {}).stream()
    stream.push(buffer)
    buffer[:] = 255
    gc.collect()
    for t in (1, 2):
        np.testing.assert_array_equal(stream.push().step_logits, whole[:, t])


def test_pools_and_early_exit_work_on_a_bound_session() -> None:
    plain, other, x = engine("step"), make("step", {}), digits().images[:40]
    wanted, got = (of.run(x, 4, exit=Exit(0.3)) for of in (plain, other))
    assert len(set(wanted.steps.tolist())) > 1
    np.testing.assert_array_equal(got.steps, wanted.steps)
    np.testing.assert_array_equal(got.per_step, wanted.per_step)
    np.testing.assert_array_equal(pooled(other, x, 3), plain.run(x, 3).per_step)


@pytest.mark.parametrize("encoding", ["direct", "frames"])
@pytest.mark.parametrize("min_T", [1, 2])
def test_on_a_device_certain_images_stay_until_they_are_half(
    encoding: str, min_T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are those of the CPU, where each leaves at once, and the batch has few sizes."""
    options = {"encoding": encoding}
    plain, other = engine("step", **options), make("step", options)
    other.device = "cuda"  # as far as `Engine` knows
    x, T = inputs(plain, 40, 8), 8
    sizes: list[int] = []
    call = Stream.call

    def recorded(stream: Stream, *arguments: Any, **options: Any) -> dict[str, Array]:
        sizes.append(stream.batch)
        return call(stream, *arguments, **options)

    monkeypatch.setattr(Stream, "call", recorded)
    confidence = certainty(np.cumsum(plain.run(x, T).per_step, 1) / np.arange(1, T + 1)[:, None], "confidence")
    lazy = 0
    for quantile in (0.0, 0.2, 0.5, 0.7, 0.8, 0.9, 1.0):
        exit = Exit(float(np.quantile(confidence, quantile)), min_T=min_T)
        sizes.clear()
        wanted, on_cpu = plain.run(x, T, exit=exit), len(set(sizes))
        sizes.clear()
        got = other.run(x, T, exit=exit)
        np.testing.assert_array_equal(got.steps, wanted.steps)
        np.testing.assert_array_equal(got.per_step, wanted.per_step)
        np.testing.assert_array_equal(got.logits, wanted.logits)
        moved = [(before, after) for before, after in pairwise(sizes) if before != after]
        assert all(2 * after <= before for before, after in moved)
        left = [int((wanted.steps >= t).sum()) for t in range(1, len(sizes) + 1)]
        assert all(still <= size < 2 * still for still, size in zip(left, sizes, strict=True))
        lazy += on_cpu > len(moved) + 1
    assert lazy  # on the CPU there were more sizes


def test_threads_share_a_bound_engine() -> None:
    runner, images = make("step", {}), digits().images
    wanted = [engine("step").run(images[k : k + 4], 3).per_step for k in range(0, 32, 4)]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda k: runner.run(images[k : k + 4], 3).per_step, range(0, 32, 4)))
    np.testing.assert_array_equal(got, wanted)


def test_a_bound_call_that_fails_gives_one_line() -> None:
    runner = make("step", {})
    stream = runner.stream()
    stream.push(digits().images[:1])
    stream._u["u.lif1"] = np.zeros((1, 3, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"^ONNX Runtime failed on x of shape \[1, 1, 8, 8\]: .*lif1.*$") as caught:
        stream.push()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ providers


def test_cuda_computes_in_full_float32(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = exported("step")
    asked = gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    loaded = Mock(side_effect=lambda: print("Failed to load libcudnn.so.9"))
    monkeypatch.setattr(onnxruntime, "preload_dlls", loaded)
    runner = Engine(model, device="cuda")
    loaded.assert_called_once_with()  # the CUDA libraries that pip installed
    assert isinstance(runner._session, BoundSession)
    assert asked == [({"CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}, 0)]
    assert capsys.readouterr() == ("", "Failed to load libcudnn.so.9\n")  # stdout is the commands' own
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    os.environ["NVIDIA_TF32_OVERRIDE"] = "1"
    Engine(model, device="cuda")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def test_cuda_may_use_tensor_cores_for_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("step", precision="fp16", target="cuda")
    asked = gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    runner = Engine(model, device="cuda")
    assert isinstance(runner._session, BoundSession)
    assert asked[-1] == ({"CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC"}}, 0)
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    runner.overlaid(runner.counting_overlay)
    assert len(asked) == 3 and "use_tf32" not in asked[-1][0]["CUDAExecutionProvider"]


def test_tensorrt_caches_by_model_and_leaves_the_rest_to_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = [exported("step"), exported("step", normalize=False)]
    asked = gpu_build(monkeypatch, ["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    for model in models:
        runner = Engine(model, device="tensorrt")
        options, fallback = asked[-1]
        assert list(options) == ["TensorrtExecutionProvider", "CUDAExecutionProvider"] and fallback == 0
        engines = tmp_path / "tetdeploy" / "tensorrt" / runner.sha256
        assert options["TensorrtExecutionProvider"] == {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(engines.parent),
        }
        assert engines.is_dir()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be kept in .*/file/tetdeploy/tensorrt/abc: .*; set XDG_CACHE_HOME"):
        provider_options("TensorrtExecutionProvider", "abc")


@pytest.mark.parametrize(
    ("device", "started", "match"),
    [
        (
            "cuda",
            [],
            "could not start CUDAExecutionProvider and would have used CPUExecutionProvider; .* CUDA libraries, "
            "which pip install",
        ),
        (
            "tensorrt",
            ["CUDAExecutionProvider"],
            "could not start TensorrtExecutionProvider and would have used CUDAExecutionProvider; .* TensorRT 10 lib",
        ),
    ],
)
def test_a_provider_whose_libraries_fail_is_refused(
    device: str, started: list[str], match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = exported("step")
    gpu_build(monkeypatch, started)
    with pytest.raises(ValueError, match=match):
        Engine(model, device=device)


def test_a_gpu_without_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("step")
    gpu_build(monkeypatch, [])
    full = Mock(side_effect=RuntimeError("cuda_call.cc:154 CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", full)
    with pytest.raises(MemoryError, match=r"\.onnx cannot be loaded: CUDA failure 2: out of memory$"):
        Engine(model, device="cuda")


@pytest.mark.parametrize(
    ("device", "said", "match"),
    [
        (
            "cuda",
            "/onnxruntime_src/cuda_call.cc:154 CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError] CUDA failure "
            "35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; expr=cudaSetDevice(0);",
            r"^cuda cannot be used: check driver .*device='cpu' "
            r"\(CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version\)$",
        ),
        (
            "tensorrt",
            "/onnxruntime_src/onnxruntime_pybind_state.cc:729 Please install TensorRT libraries as mentioned in the "
            "GPU requirements page, make sure they're in the PATH, and that your GPU is supported.",
            r"^tensorrt cannot be used: check driver .*device='cpu' \(Please install TensorRT libraries\)$",
        ),
        ("cuda", "Unknown fault\nand more", r"cannot be loaded: .* or cuda cannot be used: .* \(Unknown fault\)$"),
    ],
)
def test_a_gpu_that_fails_is_not_blamed_on_the_model(
    device: str, said: str, match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = exported("step")
    gpu_build(monkeypatch, [])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(ValueError, match=match):
        Engine(model, device=device)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture(params=["cuda", "tensorrt"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A device of ONNX Runtime that starts here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        Engine(exported("step"), device=request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.mark.gpu
@layouts
def test_on_a_gpu_it_agrees_with_the_cpu(layout: str, options: dict[str, Any], device: str) -> None:
    cpu, gpu = engine(layout, **options), Engine(exported(layout, **options), device=device)
    x = inputs(cpu, 60, 3)
    wanted, got = cpu.run(x, 3), gpu.run(x, 3)
    # Sums in another order may flip a spike here and there, and with it a logit; most are equal up to rounding.
    assert (got.logits.argmax(-1) == wanted.logits.argmax(-1)).mean() >= 0.98
    assert np.median(np.abs(got.per_step - wanted.per_step)) < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_a_stream_is_a_run_and_its_state_stays_there(device: str) -> None:
    gpu, x = Engine(exported("step"), device=device), digits().images[:4]
    stream = gpu.stream(4)
    for zeros in (*stream._u.values(), *stream._kept.values()):
        assert isinstance(zeros, DeviceZeros) and zeros.value.device_name().lower() == "cuda"
    steps = [stream.push(x if t == 0 else None).step_logits for t in range(5)]
    np.testing.assert_array_equal(np.stack(steps, 1), gpu.run(x, 5).per_step)
    for kept in (*stream._u.values(), *stream._kept.values(), stream._image):
        assert isinstance(kept, DeviceArray) and kept.value.device_name().lower() == "cuda"
    assert all(u.any() for u in stream.state.values())


@pytest.mark.gpu
def test_on_a_gpu_images_leave_when_they_are_certain(device: str) -> None:
    gpu, x = Engine(exported("step"), device=device), digits().images[:60]
    whole = gpu.run(x, 5)
    confidence = certainty(np.cumsum(whole.per_step, 1) / np.arange(1, 6)[:, None], "confidence")
    exit = Exit(float(np.median(confidence)))
    early = gpu.run(x, 5, exit=exit)
    certain = confidence[:, :-1] > exit.threshold
    wanted = np.where(certain.any(1), certain.argmax(1) + 1, 5)
    assert len(set(wanted.tolist())) > 1
    # Another batch size may have other kernels, which round otherwise.
    assert (early.steps == wanted).mean() >= 0.95
    np.testing.assert_array_equal(np.isnan(early.per_step[..., 0]), np.arange(1, 6) > early.steps[:, None])
    assert np.nanmedian(np.abs(early.per_step - whole.per_step)) < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_tensorrt_finds_its_engines_again(device: str, tmp_path: Path) -> None:
    if device != "tensorrt":
        pytest.skip("only TensorRT builds engines")
    x = digits().images[:4]
    wanted = Engine(exported("dynamic"), device=device).run(x, 3).per_step
    built = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}
    assert built
    np.testing.assert_array_equal(Engine(exported("dynamic"), device=device).run(x, 3).per_step, wanted)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")} == built
