"""The runner of TensorRT engines: against ONNX Runtime on a stand-in for the GPU, and on a GPU where there is one."""

from __future__ import annotations

import gc
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_helpers import printed, refused
from export_helpers import digits, engine, exported, frames, layouts
from gpu_stand_in import VERSION, Cuda, TensorRT
from PIL import Image

from tetdeploy.early_exit import Exit, certainty, load_exit
from tetdeploy.engine import Engine, open_engine
from tetdeploy.measured import engine_provenance
from tetdeploy.runtimes import tensorrt_engine
from tetdeploy.runtimes.manifest import manifest_path
from tetdeploy.runtimes.nvidia import NoGpuError, choose_package, gpu_architecture, gpu_runtime
from tetdeploy.runtimes.tensorrt_engine import TensorRTEngine, check_target
from tetdeploy.streams import StreamPool


def write_engine(path: Path, layout: str, options: dict[str, Any], **other: Any) -> Path:
    """An "engine" for the stand-in: the graph itself, and a manifest in which `other` is different."""
    plan = exported(layout, **options).read_bytes()
    path.write_bytes(plan)
    manifest = {
        "format": 1,
        "package": "tensorrt-rtx",
        "version": VERSION,
        "gpu_architectures": ["8.6", "8.9"],
        "graph": "model.onnx",
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "batch": [1, 4, 8],
        "T": [1, 3, 6] if layout == "dynamic" else None,
        "metadata": engine(layout, **options).metadata,
    }
    manifest_path(path).write_text(json.dumps(manifest | other))
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The stand-in in the place of CUDA and TensorRT."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed (extra rtx)")
    made = Cuda()
    monkeypatch.setattr(tensorrt_engine, "gpu_runtime", lambda purpose: made)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda package: TensorRT(made))
    return made


def inputs(of: Engine, count: int, T: int) -> np.ndarray[Any, Any]:
    if of.encoding == "frames":
        return frames(count, T)
    images = digits().images[:count]
    return images if of.input_dtype == np.uint8 else (images.astype(np.float32) / 255 - 0.3) / 0.4


@layouts
def test_it_computes_what_onnx_runtime_computes(
    layout: str, options: dict[str, Any], cuda: Cuda, tmp_path: Path
) -> None:
    onnx, trt = engine(layout, **options), TensorRTEngine(write_engine(tmp_path / "m.engine", layout, options))
    for count, T in ((5, 3), (1, 2), (8, 3)):
        x = inputs(onnx, count, 3)
        wanted, got = onnx.run(x, T), trt.run(x, T)
        np.testing.assert_array_equal(got.per_step, wanted.per_step)
        np.testing.assert_array_equal(got.logits, wanted.logits)


@pytest.mark.parametrize("options", [{}, {"encoding": "frames"}], ids=["images", "frames"])
def test_a_stream_keeps_its_state_on_the_gpu(options: dict[str, Any], cuda: Cuda, tmp_path: Path) -> None:
    onnx, trt = engine("step", **options), TensorRTEngine(write_engine(tmp_path / "m.engine", "step", options))
    cuda.device = 1
    wanted, got = onnx.stream(2), trt.stream(2)
    x = inputs(onnx, 2, 6)
    steps = [x[:, t] for t in range(6)] if options else [x, None, None, x, None, None]
    for shown in steps:
        before, cuda.device = dict(cuda.copied), 1
        a, b = wanted.push(shown), got.push(shown)
        np.testing.assert_array_equal(b.step_logits, a.step_logits)
        np.testing.assert_array_equal(b.logits, a.logits)
        moved = {way: cuda.copied[way] - before[way] for way in before}
        assert moved["down"] == b.step_logits.nbytes
        assert moved["up"] == 2 * 64 * (shown is not None) + (not options)  # an image, and whether to encode it
    for name, u in wanted.state.items():
        np.testing.assert_array_equal(got.state[name], u)


def test_state_is_saved_and_put_back(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {"encoding": "frames"}))
    x = frames(1, 4)
    first = trt.stream()
    first.push(x[:, 0])
    kept = first.state
    assert all(isinstance(u, np.ndarray) and u.any() for u in kept.values())
    wanted = first.push(x[:, 1])
    other = trt.stream()
    other.state = kept
    np.testing.assert_array_equal(other.push(x[:, 1]).step_logits, wanted.step_logits)


@pytest.mark.usefixtures("collects_its_own")
def test_gpu_memory_is_given_back(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {}))
    stream = trt.stream(3)
    for _ in range(4):
        stream.push(digits().images[:3])
    states = len(trt.metadata["states"]) + len(trt.metadata["encoded"])
    gc.collect()
    assert len(cuda.memory) == states + 1  # and the image
    del stream
    gc.collect()
    assert not cuda.memory and cuda.num_streams == 1
    del trt
    gc.collect()
    assert not cuda.num_streams


@pytest.mark.usefixtures("collects_its_own")
def test_memory_is_given_back_before_its_stream(cuda: Cuda) -> None:
    gpu = tensorrt_engine.Gpu(cuda)
    arrays = [gpu.zeros((2, 3))]
    arrays.append(arrays)  # type: ignore[arg-type]  # a cycle, as an error makes that is kept by the frame it names
    del gpu, arrays
    gc.collect()
    assert not cuda.memory and not cuda.num_streams


def test_threads_share_an_engine(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {}))
    images = digits().images
    wanted = [engine("step").run(images[k : k + 4], 3).per_step for k in range(0, 32, 4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda k: trt.run(images[k : k + 4], 3).per_step, range(0, 32, 4)))
    np.testing.assert_array_equal(got, wanted)


def test_it_says_what_it_is(cuda: Cuda, tmp_path: Path) -> None:
    trt = open_engine(write_engine(tmp_path / "m.engine", "dynamic", {}), device="tensorrt")
    assert isinstance(trt, TensorRTEngine)
    assert (trt.device, trt.layout, trt.T, trt.input_shape) == ("tensorrt", "dynamic", None, (1, 8, 8))
    assert trt.class_names == engine("dynamic").class_names
    for architecture in trt.manifest["gpu_architectures"]:
        check_target(trt.manifest, "m.engine", TensorRT(cuda), architecture)  # without an error
    assert trt.sha256 == trt.manifest["engine_sha256"]
    assert trt.run(digits().images[:2]).per_step.shape == (2, 4, 10)  # the training's T
    assert engine_provenance(trt)["versions"]["tensorrt-rtx"] == VERSION


def test_what_it_was_not_built_for_is_refused(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "dynamic", {}))
    images = digits().images
    with pytest.raises(ValueError, match=r"m\.engine was built for 1 to 8 images, got 9; build again with --batch"):
        trt.run(images[:9])
    with pytest.raises(ValueError, match="built for 1 to 6 steps, got 7; build again with --T"):
        trt.run(images[:1], 7)
    with pytest.raises(ValueError, match=r"cannot count spikes or operations; they are those of model\.onnx"):
        trt.count(images[:1], 2)
    with pytest.raises(ValueError, match="gives no LIF state out"):
        trt.stream()
    with pytest.raises(ValueError, match="takes uint8"):
        trt.run(images[:1].astype(np.float32))


def test_what_has_smaller_batches_is_refused_at_once(cuda: Cuda, tmp_path: Path) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {}, batch=[4, 4, 8]))
    images = digits().images[:4]
    again = r"which may be one; build again with --batch 1:4:8$"
    with pytest.raises(ValueError, match=rf"^m\.engine was built for 4 to 8 images in .* and early exit .*{again}"):
        trt.run(images, 3, exit=Exit(0.5))
    with pytest.raises(ValueError, match=rf"and a pool calls it with those streams that push, {again}"):
        StreamPool(trt)
    with pytest.raises(ValueError, match="built for 4 to 8 images, got 3; build again with --batch"):
        trt.run(images[:3], 3)
    stream = trt.stream(4)
    steps = [stream.push(images if t == 0 else None).step_logits for t in range(3)]
    np.testing.assert_array_equal(np.stack(steps, 1), trt.run(images, 3).per_step)


def test_early_exit_moves_state_when_half_of_the_batch_is_certain(cuda: Cuda, tmp_path: Path) -> None:
    onnx, trt = engine("step"), TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {}))
    images = digits().images[:8]
    exit = Exit(float(np.median(certainty(onnx.run(images, 2).logits, "confidence"))), min_T=2)
    wanted, before = onnx.run(images, 6, exit=exit), cuda.copied["down"]
    got = trt.run(images, 6, exit=exit)
    np.testing.assert_array_equal(got.steps, wanted.steps)
    np.testing.assert_array_equal(got.per_step, wanted.per_step)
    np.testing.assert_array_equal(got.logits, wanted.logits)
    carried = trt.metadata["states"] + trt.metadata["encoded"]
    state = 4 * sum(int(np.prod(s["shape"])) for s in carried) + images[0].nbytes
    batch, down, moves = 8, 0, 0
    for t in range(1, wanted.steps.max() + 1):
        down += batch * 4 * 10  # logits
        left = int((wanted.steps > t).sum())
        if 0 < left <= batch / 2:
            batch, down, moves = left, down + batch * state, moves + 1
    assert moves and cuda.copied["down"] - before == down


def test_a_pool_computes_what_onnx_runtime_computes(cuda: Cuda, tmp_path: Path) -> None:
    pool = StreamPool(TensorRTEngine(write_engine(tmp_path / "m.engine", "step", {})))
    images = digits().images[:8]
    ids = [pool.open() for _ in images]
    answers = pool.push(dict(zip(ids, images, strict=True)))
    np.testing.assert_array_equal([answers[id].logits for id in ids], engine("step").run(images, 1).logits)


def test_a_failing_gpu_is_an_error(cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = TensorRTEngine(write_engine(tmp_path / "m.engine", "unrolled", {"T": 3}))
    monkeypatch.setattr(cuda, "cudaMallocAsync", lambda size, stream: (2, None))
    with pytest.raises(ValueError, match=r"^CUDA failed: error 2$"):
        trt.run(digits().images[:1])
    monkeypatch.undo()
    monkeypatch.setattr(trt._session._context, "execute_async_v3", lambda stream: False)
    with pytest.raises(ValueError, match=r"^TensorRT: m\.engine failed$"):
        trt.run(digits().images[:1])


def test_an_engine_that_cannot_be_loaded_or_finds_no_memory_is_refused(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_engine(tmp_path / "m.engine", "unrolled", {"T": 3})
    loaded = SimpleNamespace(create_execution_context=lambda: None)
    for found, message in ((None, r"TensorRT 1\.2\.3 cannot load m\.engine; build"), (loaded, "too little GPU memory")):
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan, found=found: found)
        monkeypatch.setattr(TensorRT, "Runtime", lambda self, log, runtime=runtime: runtime)
        with pytest.raises(ValueError, match=message):
            TensorRTEngine(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"version": "0.9"}, r"m\.engine was built by tensorrt-rtx 0\.9, and 1\.2\.3 is installed; .*==0\.9$"),
        ({"version": "2.0"}, r"built by tensorrt-rtx 2\.0, and 1\.2\.3 is installed"),
        (
            {"version": "0.9", "package": "tensorrt"},
            r"built by tensorrt 0\.9, .*pip install tensorrt==0\.9 --extra-index-url https://pypi\.nvidia\.com$",
        ),
        ({"gpu_architectures": ["8.9"]}, r"built for GPU architecture 8\.9, and this GPU is 8\.6; .*--gpu-arch 8\.6"),
        ({"engine_sha256": "0"}, r"is not the engine that m\.engine\.json describes; build it again"),
        ({"format": 2}, r"m\.engine\.json is a manifest of format 2"),
        ({"metadata": {"format": 1}}, r"m\.engine\.json has metadata of format 1; .*: export the model again"),
        ({"package": "other"}, r"m\.engine\.json is damaged; build it again"),
        ({"package": ["tensorrt"]}, r"m\.engine\.json is damaged; build it again"),
        ({"batch": 5}, r"m\.engine\.json is damaged; build it again"),
        ({"batch": [1, 2]}, r"m\.engine\.json is damaged; build it again"),
    ],
    ids=[
        "version",
        "later version",
        "version of NVIDIA's",
        "architecture",
        "another engine",
        "format",
        "format of the model",
        "package",
        "package that is a list",
        "batch that is a number",
        "batch of two",
    ],
)
def test_an_engine_for_something_else_is_refused(
    other: dict[str, Any], message: str, cuda: Cuda, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TensorRTEngine(write_engine(tmp_path / "m.engine", "unrolled", {"T": 3}, **other))


@pytest.mark.parametrize(
    ("architecture", "package", "remedy"),
    [
        ((9, 0), "tensorrt-rtx", r"TensorRT-RTX cannot build for GPU architecture '9\.0'; .*--package tensorrt$"),
        ((10, 3), "tensorrt-rtx", r"TensorRT-RTX cannot build for GPU architecture '10\.3'; .*--package tensorrt$"),
        ((7, 5), "tensorrt-rtx", r"TensorRT-RTX cannot build .* '7\.5', where it has no .*--package tensorrt$"),
        ((7, 0), "tensorrt-rtx", r"it can for 8\.0, 8\.6, 8\.9, 12\.0, 12\.1\.$"),
        ((12, 0), "tensorrt-rtx", r"build it again: tetdeploy build MODEL\.onnx --gpu-arch 12\.0$"),
        ((9, 0), "tensorrt", r"build it again: tetdeploy build MODEL\.onnx --gpu-arch 9\.0$"),
    ],
)
def test_another_gpu_is_told_what_builds_for_it(
    architecture: tuple[int, int],
    package: str,
    remedy: str,
    cuda: Cuda,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Cuda(architecture=architecture)
    monkeypatch.setattr(tensorrt_engine, "gpu_runtime", lambda purpose: other)
    with pytest.raises(ValueError, match=rf"^m\.engine was built for GPU architecture 8\.6, 8\.9, and this .*{remedy}"):
        TensorRTEngine(write_engine(tmp_path / "m.engine", "unrolled", {"T": 3}, package=package))


def test_an_engine_needs_its_manifest(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "m.engine", "unrolled", {"T": 3})
    for text in ("{", "{}", "[]", '{"format": 1}'):
        manifest_path(path).write_text(text)
        with pytest.raises(ValueError, match=r"m\.engine\.json is damaged"):
            TensorRTEngine(path)
    manifest_path(path).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*m\.engine\.json; build it again"):
        TensorRTEngine(path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*other\.engine;"):
        TensorRTEngine(tmp_path / "other.engine")
    (tmp_path / "other.engine").mkdir()
    manifest_path(tmp_path / "other.engine").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"there is no .*other\.engine;"):
        TensorRTEngine(tmp_path / "other.engine")


def test_without_a_driver_nothing_of_tensorrt_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(package: str) -> None:
        raise AssertionError("TensorRT was imported")

    def no_driver(purpose: str) -> None:
        raise NoGpuError(f"{purpose} needs a driver")

    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", touched)
    monkeypatch.setattr(tensorrt_engine, "gpu_runtime", no_driver)
    path = write_engine(tmp_path / "m.engine", "unrolled", {"T": 3})
    with pytest.raises(NoGpuError, match=r"^running m\.engine needs a driver$"):
        TensorRTEngine(path)


def test_the_device_is_named(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "m.engine", "unrolled", {"T": 3})
    with pytest.raises(ValueError, match="runs on an NVIDIA GPU only, got device 'cpu'; choose device tensorrt"):
        open_engine(path)
    for none, got in ((None, "None"), (b"x", "1 bytes")):
        with pytest.raises(ValueError, match=f"model must be the path of an .onnx or .engine file, got {got}"):
            open_engine(none)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a TensorRT engine; here the \.onnx file"):
        Engine(path)


def test_predict_runs_an_engine(cuda: Cuda, tmp_path: Path) -> None:
    Image.fromarray(digits().images[0, 0]).save(tmp_path / "digit.png")
    path = write_engine(tmp_path / "m.engine", "unrolled", {"T": 3})
    arguments = ["predict", path, tmp_path / "digit.png", "--device", "tensorrt"]
    assert "T=3" in printed(*arguments)
    output = refused(*arguments[:-2])
    assert output.startswith("Error: ") and "choose device tensorrt" in output


@pytest.fixture(scope="module")
def gpu_package() -> str:
    """The TensorRT package that can build for the GPU at hand."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed (extra tensorrt or rtx)")
    try:
        architecture = gpu_architecture(gpu_runtime("this test"))
    except NoGpuError as error:
        pytest.skip(str(error))
    if architecture in ("7.5", "9.0", "10.0", "10.3"):
        pytest.importorskip("tensorrt", reason=f"GPU architecture {architecture} needs the package tensorrt")
        return "tensorrt"
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    return choose_package()


@pytest.mark.gpu
@layouts
def test_on_a_gpu_it_agrees_with_onnx_runtime(
    layout: str, options: dict[str, Any], gpu_package: str, tmp_path: Path
) -> None:
    from tetdeploy.export.tensorrt import BuildConfig, build_engine

    onnx = engine(layout, **options)
    config = BuildConfig(package=gpu_package, batch=(1, 16, 60))
    trt = TensorRTEngine(build_engine(onnx.path, tmp_path / "m.engine", config).path)
    x = inputs(onnx, 60, 3)
    wanted, got = onnx.run(x, 3), trt.run(x, 3)
    # Sums in another order may flip a spike here and there, and with it a logit; most are equal up to rounding.
    assert (got.logits.argmax(-1) == wanted.logits.argmax(-1)).mean() >= 0.98
    assert np.median(np.abs(got.per_step - wanted.per_step)) < 1e-4
    np.testing.assert_allclose(got.logits, got.per_step.mean(1), atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_a_stream_is_a_run(gpu_package: str, tmp_path: Path) -> None:
    from tetdeploy.export.tensorrt import BuildConfig, build_engine

    path = build_engine(exported("step"), tmp_path / "m.engine", BuildConfig(package=gpu_package, batch=(4, 4, 4))).path
    trt, images = TensorRTEngine(path), digits().images[:4]
    stream = trt.stream(4)
    steps = [stream.push(images if t == 0 else None).step_logits for t in range(5)]
    np.testing.assert_array_equal(np.stack(steps, 1), trt.run(images, 5).per_step)
    assert all(u.any() for u in stream.state.values())


def test_an_engine_has_the_threshold_of_the_graph_it_was_built_from(cuda: Cuda, tmp_path: Path) -> None:
    graph, options = tmp_path / "m.onnx", {"graph": "m.onnx"}
    graph.write_bytes(exported("step").read_bytes())
    with pytest.raises(
        FileNotFoundError, match=r"no early-exit threshold at .*m.exit.json; run: .* calibrate .*m.onnx"
    ):
        load_exit(write_engine(tmp_path / "m-b8.engine", "step", {}, **options))
    sha256 = hashlib.sha256(graph.read_bytes()).hexdigest()
    content = {"threshold": 0.5, "criterion": "margin", "min_T": 1, "T": 4, "model_sha256": sha256}
    (tmp_path / "m.exit.json").write_text(json.dumps(content))
    path = write_engine(tmp_path / "m-b8.engine", "step", {}, **options, graph_sha256=sha256)
    assert load_exit(path) == load_exit(graph) == Exit(0.5, "margin")
    x = digits().images[:8]
    wanted, got = engine("step").run(x, 4, exit=load_exit(graph)), TensorRTEngine(path).run(x, 4, exit=load_exit(path))
    np.testing.assert_array_equal(got.steps, wanted.steps)
    np.testing.assert_allclose(got.logits, wanted.logits, atol=1e-6)
    with pytest.raises(ValueError, match=r"found for T=4 and says nothing of T=3; run: .* calibrate .*m.onnx --T 3"):
        load_exit(path, 3)
    for other in ({"graph_sha256": "0" * 64}, {}):  # of another graph; by a version that did not say of which
        with pytest.raises(ValueError, match=r"m.exit.json holds the threshold of another model than .*m-b8.engine"):
            load_exit(write_engine(path, "step", {}, **options, **other))
