"""The engine: runs, streams, threads, and one clear message for whatever is wrong."""

from __future__ import annotations

import base64
import copy
import dataclasses
import importlib.metadata
import json
import re
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_helpers import digits, engine, exported, frames, unchecked
from onnx import TensorProto, helper
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from torch import Tensor, nn

from tetdeploy.early_exit import Exit, certainty
from tetdeploy.energy import layers_of
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig
from tetdeploy.inspection import inspect
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.neurons import LIF
from tetdeploy.storage.model_file import check_metadata
from tetdeploy.system.extras import MissingExtraError
from tetdeploy.system.machine import default_threads

Array = np.ndarray[Any, Any]


def images(count: int, start: int = 0) -> Array:
    return digits().images[start : start + count]


# ------------------------------------------------------------------------------------------------ run


@pytest.mark.parametrize(("layout", "options", "default"), [
    ("unrolled", {"T": 4}, 4),
    ("dynamic", {}, 4),  # the T of the training
    ("dynamic", {"trained_T": 6}, 6),
    ("step", {}, 4),
    ("unrolled", {"T": 3, "with_state": True}, 3),
])  # fmt: skip
def test_T_defaults_to_that_of_the_export(layout: str, options: dict[str, Any], default: int) -> None:
    runner = engine(layout, **options)
    steps = {"unrolled": default, "dynamic": "any", "step": 1}[layout]
    assert repr(runner) == f"Engine('{runner.path}', {layout}, T={steps}, fp32, device='cpu')"
    result = runner.run(images(3))
    assert result.per_step.shape == (3, default, 10)
    assert result.logits.shape == (3, 10)
    assert result.logits.dtype == result.per_step.dtype == np.float32
    np.testing.assert_array_equal(result.per_step, runner.run(images(3), default).per_step)
    np.testing.assert_allclose(result.logits, result.per_step.mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encoding", ["direct", "frames"])
@pytest.mark.parametrize(("layout", "options", "calls_in_parts", "calls_of_all"), [
    ("unrolled", {"T": 4}, [(3, 4), (2, 4), (2, 4)], [(7, 4)]),
    ("unrolled", {"T": 4, "with_state": True}, [(2, 4), (2, 4), (2, 4), (1, 4)], [(7, 4)]),
    ("dynamic", {}, [(4, 3), (3, 3)], [(7, 3)]),
    ("step", {}, [(4, 1)] * 3 + [(3, 1)] * 3, [(7, 1)] * 3),
], ids=str)  # fmt: skip
def test_a_large_batch_runs_in_parts(
    layout: str,
    options: dict[str, Any],
    calls_in_parts: list[tuple[int, int]],
    calls_of_all: list[tuple[int, int]],
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = engine(layout, encoding=encoding, **options)
    x = images(7) if encoding == "direct" else frames(7, 4)
    whole, counts = runner.count(x, 3)
    steps = engine("step", encoding=encoding).count(x, 3)[1]
    assert {name: c.shape for name, c in counts.items()} == {name: c.shape for name, c in steps.items()}
    assert all(c.shape[:2] == (3, 7) for c in steps.values())
    largest = max(int(np.prod(layer["shape"])) for layer in runner.metadata["neurons"])
    monkeypatch.setattr("tetdeploy.engine.IN_CACHE", largest * 12)  # of 4, 4 + 2 (state), 3, and 1 + 2 steps
    calls = list[tuple[int, int]]()
    session = runner.overlaid(runner.counting_overlay)[0]
    monkeypatch.setattr(runner, "overlaid", lambda overlay, *, native: (_Spy(session, calls), list(counts)))
    parts, their_counts = runner.count(x, 3)
    assert calls == calls_in_parts
    np.testing.assert_allclose(parts.per_step, whole.per_step, atol=1e-6)
    for name, count in counts.items():
        np.testing.assert_array_equal(their_counts[name], count)
    calls.clear()
    monkeypatch.setattr(runner, "device", "cuda")  # a GPU wants it whole
    runner.count(x, 3)
    assert calls == calls_of_all


def test_early_exit_of_a_large_batch_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine("step")
    exit = Exit(float(np.median(certainty(runner.run(images(40), 1).logits, "confidence"))))
    whole = runner.run(images(40), 4, exit=exit)
    assert len(set(whole.steps.tolist())) > 1
    largest = max(int(np.prod(layer["shape"])) for layer in runner.metadata["neurons"])
    monkeypatch.setattr("tetdeploy.engine.IN_CACHE", largest * 3 * 7)
    calls = list[tuple[int, int]]()
    monkeypatch.setattr(runner, "_session", _Spy(runner._session, calls))
    parts = runner.run(images(40), 4, exit=exit)
    assert max(n for n, _ in calls) == 7 and len(calls) > 6  # parts of 7, 7, 7, 7, 6 and 6 images, which grow smaller
    np.testing.assert_array_equal(parts.steps, whole.steps)
    np.testing.assert_allclose(parts.per_step, whole.per_step, atol=1e-6)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-6)


class Narrow(nn.Module):
    """Its last convolution reads one pixel."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encode = DirectEncoding(nn.Conv2d(1, 4, 8))
            self.lif, self.last = LIF(v_th=0.1), OverTime(nn.Conv2d(4, 10, 1))

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.last(self.lif(self.encode(x, T))).flatten(2)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_parts_of_one_image_count_as_others(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = unchecked(Narrow(), tmp_path / "m.onnx", ExportConfig(layout=layout, T=3))  # type: ignore[arg-type]
    _, whole = runner.count(images(3), 3)
    monkeypatch.setattr("tetdeploy.engine.IN_CACHE", 4 * 3 * 2)
    _, parts = runner.count(images(3), 3)
    assert whole["active.last.0"].shape == (3, 3, 1, 1) and whole["fired.lif"].any()
    for name, count in whole.items():
        np.testing.assert_array_equal(parts[name], count)
    layouts = ("step", ExportConfig(layout="step")), (layout, ExportConfig(layout=layout, T=1))  # type: ignore[arg-type]
    for name, config in layouts:
        _, single = unchecked(Narrow(), tmp_path / f"{name}-1.onnx", config).count(images(1), 1)
        assert single["active.last.0"].shape == (1, 1, 1, 1) and single["fired.lif"].shape == (1, 1)


class _Spy:
    """A session that notes the images and the steps of each call."""

    def __init__(self, session: Any, calls: list[tuple[int, int]]) -> None:
        self.session, self.calls = session, calls

    def run(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        answers: list[Array] = self.session.run(names, feed)
        self.calls.append(answers[names.index("per_step")].shape[:2])
        return answers


@pytest.mark.parametrize(("layout", "options"), [
    ("unrolled", {"T": 4}),
    ("dynamic", {}),
    ("step", {}),
    ("unrolled", {"T": 3, "with_state": True}),
])  # fmt: skip
def test_frames_run_to_their_end_by_default(layout: str, options: dict[str, Any]) -> None:
    runner = engine(layout, encoding="frames", **options)
    x = frames(3, 4)
    whole = runner.run(x).per_step
    assert whole.shape == (3, 4, 10)
    for T in (1, 2, 3):  # fewer steps than there are frames, and fewer frames than the graph has steps
        np.testing.assert_allclose(runner.run(x, T).per_step, whole[:, :T], rtol=0, atol=1e-6)
        np.testing.assert_allclose(runner.run(x[:, :T]).per_step, whole[:, :T], rtol=0, atol=1e-6)
    later = x.copy()
    later[:, 2:] = 0
    np.testing.assert_allclose(runner.run(later).per_step[:, :2], whole[:, :2], rtol=0, atol=1e-6)
    assert not np.allclose(runner.run(later).per_step[:, 2:], whole[:, 2:])


def test_attributes_say_what_the_model_is() -> None:
    runner = engine("unrolled", T=4)
    assert (runner.layout, runner.T, runner.encoding, runner.with_state) == ("unrolled", 4, "direct", False)
    assert runner.input_shape == (1, 8, 8) and runner.input_dtype == np.uint8
    assert runner.class_names == digits().class_names
    assert runner.path == exported("unrolled", T=4)
    assert engine("dynamic").T is None
    assert engine("step").with_state and engine("step").T == 1


def test_input_may_lie_in_memory_any_way_and_is_left_alone() -> None:
    runner, x = engine("dynamic"), images(4)
    reversed_ = np.asfortranarray(x[::-1])
    kept = reversed_.copy()
    np.testing.assert_allclose(runner.run(reversed_).logits, runner.run(x).logits[::-1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(reversed_, kept)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(runner.run(read_only).logits, runner.run(x).logits)


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine("dynamic").run(images(1)).logits = np.zeros(1)  # type: ignore[misc]


@pytest.mark.parametrize(("layout", "options"), [("dynamic", {}), ("step", {}), ("unrolled", {"T": 4})])
def test_threads_may_share_an_engine(layout: str, options: dict[str, Any]) -> None:
    runner = Engine(exported(layout, **options), threads=1)
    batches = [images(k % 3 + 1, 5 * k) for k in range(24)]
    alone = [runner.count(x, 4) for x in batches]
    fresh = Engine(exported(layout, **options), threads=1)  # its counting session is made under contention
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: fresh.count(x, 4), batches))
        runs = list(pool.map(lambda x: fresh.run(x, 4), batches))
    for (one, counts), (other, other_counts), run in zip(alone, together, runs, strict=True):
        np.testing.assert_array_equal(one.per_step, other.per_step)
        np.testing.assert_array_equal(one.per_step, run.per_step)
        for name, value in counts.items():
            np.testing.assert_array_equal(value, other_counts[name])


@pytest.mark.parametrize("threads", [1, 2, None])
def test_any_number_of_threads_gives_the_same_answer(threads: int | None) -> None:
    runner = Engine(exported("dynamic"), threads=threads)
    assert runner._session.get_session_options().intra_op_num_threads == (threads or default_threads() or 0)
    np.testing.assert_allclose(runner.run(images(5), 4).logits, engine("dynamic").run(images(5), 4).logits, atol=1e-6)


def test_threads_leave_the_cores_to_others_between_calls() -> None:
    """ONNX Runtime's own would take a core for some 50 ms after each; counted is time on the processor."""
    runner = Engine(exported("dynamic"), threads=2)
    taken = []
    for _ in range(3):  # what else this process has to do is seldom
        runner.run(images(64), 4)
        before = time.process_time()
        time.sleep(0.1)
        taken.append(time.process_time() - before)
    assert min(taken) < 0.02


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("make", "match"), [
    (lambda x: x[0], r"dynamic\.onnx takes input of shape \[N, 1, 8, 8\], got \[1, 8, 8\]"),
    (lambda x: x[..., :7], r"takes input of shape \[N, 1, 8, 8\], got \[2, 1, 8, 7\]"),
    (lambda x: x.transpose(0, 2, 3, 1), r"got \[2, 8, 8, 1\]"),
    (lambda x: x[:, None], r"got \[2, 1, 1, 8, 8\]"),
    (lambda x: np.float32(3), r"got \[\]"),
    (lambda x: x[:0], r"the input is empty: \[0, 1, 8, 8\]; .* takes \[N, 1, 8, 8\] with N of at least 1"),
    (lambda x: np.ma.masked_less(x, 3), r"the input is a masked array, .* give x\.filled\(0\)"),
    (lambda x: x.astype(np.float32), "takes uint8 pixels 0..255 .* got float32; .* --no-normalize"),
    (lambda x: x.astype(np.int64), "takes uint8 pixels 0..255 and normalises them itself, got int64"),
    (lambda x: x.tolist(), "takes uint8 pixels 0..255 and normalises them itself, got int64"),
])  # fmt: skip
def test_refused_input(make: Callable[[Array], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine("dynamic").run(make(images(2)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1.1e30])
def test_refused_values(value: float) -> None:
    x = np.zeros((2, 1, 8, 8), np.float32)
    x[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="the input holds NaN or infinite values"):
        engine("unrolled", T=4, normalize=False).run(x)
    with pytest.raises(ValueError, match=r"takes float32 input .* got float64; convert it with .astype\('float32'\)"):
        engine("unrolled", T=4, normalize=False).run(np.zeros((2, 1, 8, 8)))


@pytest.mark.parametrize(("layout", "options", "make", "T", "match"), [
    ("dynamic", {}, images, 0, "T must be at least 1, got 0"),
    ("unrolled", {"T": 4}, images, -2, "T must be at least 1, got -2"),
    ("step", {}, images, 0, "T must be at least 1, got 0"),
    ("step", {}, images, 1025, r"T must be at most 1024 for images, got 1025; .* with engine\.stream\(\)"),
    ("unrolled", {"T": 4}, images, 1025, "T must be at most 1024 for images, got 1025"),
    ("unrolled", {"T": 4}, images, 5,
     r"unrolled\.onnx is unrolled to T=4 and cannot run T=5; export again with --T 5, or with --layout dynamic"),
    ("dynamic", {"encoding": "frames"}, lambda n: frames(n, 3), 4, "T=4 steps need as many frames, got 3"),
    ("unrolled", {"T": 4, "encoding": "frames"}, lambda n: frames(n, 9), None, "unrolled to T=4 and cannot run T=9"),
    ("dynamic", {"encoding": "frames"}, lambda n: frames(n, 3)[:, :0], None,
     r"the input is empty: .* takes \[N, T, 1, 8, 8\] with N and T of at least 1"),
    ("dynamic", {"encoding": "frames"}, images, 1, r"takes input of shape \[N, T, 1, 8, 8\], got \[2, 1, 8, 8\]"),
])  # fmt: skip
def test_refused_T(
    layout: str, options: dict[str, Any], make: Callable[[int], Array], T: int | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        engine(layout, **options).run(make(2), T)


@pytest.mark.parametrize("T", [2.0, "3", True, np.array([2, 3])])
@pytest.mark.parametrize(("layout", "options"), [
    ("unrolled", {"T": 4}),
    ("unrolled", {"T": 3, "with_state": True}),
    ("dynamic", {}),
    ("step", {}),
])  # fmt: skip
def test_T_is_a_whole_number(layout: str, options: dict[str, Any], T: Any) -> None:
    runner = engine(layout, **options)
    with pytest.raises(ValueError, match=f"T must be a whole number, got {re.escape(repr(T))}"):
        runner.run(images(2), T)
    np.testing.assert_array_equal(runner.run(images(2), np.uint8(2)).per_step, runner.run(images(2), 2).per_step)  # type: ignore[arg-type]


def foreign(path: Path, metadata: str | None = None) -> Path:
    """An ONNX model that we did not write."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if metadata is not None:
        helper.set_model_props(model, {"tetdeploy": metadata})
    onnx.save(model, path)
    return path


def test_counters_of_layers_that_the_metadata_do_not_name(tmp_path: Path) -> None:
    model = engine("dynamic").path.read_bytes()
    at = model.rindex(b'"readout.2", "input_shape"') + 1
    (tmp_path / "m.onnx").write_bytes(model[:at] + b"s" + model[at + 1 :])
    damaged = Engine(tmp_path / "m.onnx")
    with pytest.raises(
        ValueError, match=r"damaged metadata: it names no layer of active\.readout\.2; export the model"
    ):
        damaged.overlaid(damaged.counting_overlay)


def test_layers_that_the_counters_do_not_count() -> None:
    damaged = Engine(engine("dynamic").path)
    first, *others = damaged.metadata["layers"]
    damaged.metadata["layers"] = [first | {"from_input": False}, *others]  # what is read from images is not counted
    with pytest.raises(ValueError, match=r"damaged metadata: counting_overlay lacks active\.encode\.0; export"):
        damaged.count(images(2), 2)


def test_counters_of_a_graph_that_was_optimised(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "m.onnx"), 3
    onnxruntime.InferenceSession(exported("dynamic"), options, providers=["CPUExecutionProvider"])
    optimised = Engine(tmp_path / "m.onnx")
    np.testing.assert_array_equal(optimised.run(images(2)).logits, engine("dynamic").run(images(2)).logits)
    with pytest.raises(ValueError, match=r"m\.onnx answers, but its spikes cannot be counted: the graph lacks what"):
        optimised.count(images(2))


@pytest.mark.parametrize("overlay", ["", "x"])
def test_counters_that_are_lost(overlay: str) -> None:
    damaged = Engine(engine("dynamic").path)
    damaged.metadata["counting_overlay"] = overlay
    with pytest.raises(ValueError, match=r"\.onnx has damaged metadata: counting_overlay holds nothing; export the"):
        damaged.count(digits().images[:1], 1)


def test_what_may_be_null_in_the_metadata_may_be_missing(tmp_path: Path) -> None:
    model = engine("dynamic").path.read_bytes()
    (tmp_path / "m.onnx").write_bytes(
        model.replace(b'"T": null', b'"t": null').replace(b'"normalization"', b'"n0rmalization"')
    )
    x = digits().images[:3]
    changed = Engine(tmp_path / "m.onnx", threads=1)
    np.testing.assert_array_equal(changed.run(x, 3).per_step, engine("dynamic").run(x, 3).per_step)
    assert (changed.metadata["T"], changed.metadata["normalization"]) == (None, None)


@pytest.mark.parametrize(
    "place", ["fires", "reset", "created", "neurons.tau", "neurons.v_th", "layers.outputs", "layers.pads"]
)
def test_what_the_metadata_must_have(place: str) -> None:
    metadata = copy.deepcopy(engine("dynamic").metadata)
    part, _, name = place.rpartition(".")
    del (metadata[part][0] if part else metadata)[name]
    with pytest.raises(ValueError, match=rf"m\.onnx has damaged metadata \(.*{name} is missing\); export the model"):
        check_metadata(metadata, Path("m.onnx"))


@pytest.mark.parametrize(
    "name", ["kernel", "strides", "dilations", "pads", "from_input", "binary", "positions", "once"]
)
def test_what_a_layer_of_the_metadata_is(name: str) -> None:
    metadata = copy.deepcopy(engine("dynamic").metadata)
    metadata["layers"][0][name] = "x"
    with pytest.raises(ValueError, match=rf"damaged metadata \(layers\[0\]\.{name} must be .*, got 'x'\)"):
        check_metadata(metadata, Path("m.onnx"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"input": {"shape": [1, 8, 8], "dtype": "dynamic"}}, "input.dtype must be uint8 or float32, got 'dynamic'"),
        ({"other_ops": {"bias_adds": None}}, "other_ops.bias_adds must be an object, got None"),
        ({"other_ops": {"bias_adds": {"conv": None}}}, "other_ops.bias_adds.conv must be a whole number of at least 0"),
        ({"source": {"data": "mine"}}, "source.data must be an object, got 'mine'"),
        ({"source": {"training": {"T": [0]}}}, "source.training.T must be a whole number of at least 1"),
        ({"input_shape": [8]}, "input_shape, kernel, strides, pads and dilations differ in their axes"),
        ({"strides": [1]}, "input_shape, kernel, strides, pads and dilations differ in their axes"),
        ({"depth": 1}, ".*unexpected keyword argument 'depth'"),
    ],
)
def test_metadata_that_no_reader_could_use(changes: dict[str, Any], fault: str) -> None:
    metadata = copy.deepcopy(engine("dynamic").metadata)
    (metadata if changes.keys() <= metadata.keys() else metadata["layers"][1]).update(changes)
    with pytest.raises(ValueError, match=rf"^m\.onnx has damaged metadata \(.*{fault}.*\); export the model again$"):
        check_metadata(metadata, Path("m.onnx"))


def test_what_is_null_of_a_layer_is_as_if_it_were_not_said() -> None:
    metadata = copy.deepcopy(engine("dynamic").metadata)
    metadata["layers"][-1] |= dict.fromkeys(("kernel", "strides", "dilations", "positions"))
    assert layers_of(check_metadata(metadata, Path("m.onnx"))) == layers_of(engine("dynamic").metadata)


def test_refused_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other\.onnx is an ONNX model, but not one that tetdeploy exported"):
        Engine(foreign(tmp_path / "other.onnx"))
    for metadata, wrong in (
        ("{", "Expecting property name"),
        ("[1]", "it must be an object"),
        ("{}", "format is missing"),
        ('{"format": 2, "layout": "step", "encoding": "direct", "T": "1"}', "T must be a whole number of at least 1"),
        ('{"format": 2, "layout": "step", "encoding": "direct", "T": 1}', "trained_T is missing"),
    ):
        with pytest.raises(ValueError, match=rf"has damaged metadata \({wrong}.*\); export the model again"):
            Engine(foreign(tmp_path / "damaged.onnx", metadata))
    (tmp_path / "text.onnx").write_bytes(foreign(tmp_path / "m.onnx", "{}" * 9).read_bytes().replace(b"{}{", b"{\xff{"))
    with pytest.raises(ValueError, match=r"text\.onnx has damaged metadata \('utf-8' codec can't decode"):
        Engine(tmp_path / "text.onnx")
    for known, remedy in ((1, "export the model again"), (3, "update tetdeploy")):
        with pytest.raises(ValueError, match=f"has metadata of format {known}; this tetdeploy reads 2: {remedy}$"):
            Engine(foreign(tmp_path / "other.onnx", json.dumps({"format": known})))
    with pytest.raises(ValueError, match=r"a folder, not an \.onnx file; name a model in it, such as .*damaged\.onnx$"):
        Engine(tmp_path)
    (tmp_path / "seeds" / "seed-0").mkdir(parents=True)
    (tmp_path / "seeds" / "seed-0" / "m.onnx").touch()
    with pytest.raises(ValueError, match=r"name a model in it, such as .*seeds/seed-0/m\.onnx$"):
        Engine(tmp_path / "seeds")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder, not an \.onnx file; write a model with: tetdeploy export$"):
        Engine(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no model at .*absent\.onnx; write one with: tetdeploy export"):
        Engine(tmp_path / "absent.onnx")
    for name, content in (("text.onnx", b"these are just words\n" * 20), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be loaded: not an ONNX model, or a damaged one"):
            Engine(tmp_path / name)
    (tmp_path / "graph.nir").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"graph\.nir is a NIR graph, not an \.onnx file; write one with: tetdeploy"):
        Engine(tmp_path / "graph.nir")


def test_weights_in_another_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runtimes would take them from the working directory, whatever model they belong to."""
    onnx.save(onnx.load(exported("dynamic")), tmp_path / "m.onnx", save_as_external_data=True, location="w")
    monkeypatch.chdir(tmp_path)
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match=r"^m\.onnx keeps weights in another file \(external data\), as no export"):
            Engine("m.onnx", runtime=runtime)
    usual = b"\n\x08location\x12\x01w"
    whole = Path("m.onnx").read_bytes()
    assert usual in whole
    # the value before the key; a number and a length that are longer than need be
    for other in (b"\x12\x01w\n\x08location", b"\x8a\x80\x00\x88\x00location\x12\x01w"):
        Path("turned.onnx").write_bytes(whole.replace(usual, other))
        with pytest.raises(ValueError, match=r"^turned\.onnx keeps weights in another file"):
            Engine("turned.onnx")
    onnx.save(onnx.load("m.onnx"), "joined.onnx")  # what the message says
    assert Engine("joined.onnx").run(images(2), 2).logits.shape == (2, 10)
    overlaid = copy.copy(engine("dynamic"))
    overlaid.__dict__.pop("counting_overlay", None)  # which is kept
    overlaid.metadata = overlaid.metadata | {"counting_overlay": base64.b64encode(Path("m.onnx").read_bytes()).decode()}
    with pytest.raises(ValueError, match=r"\.onnx keeps weights in another file"):
        overlaid.count(images(2), 2)


def test_bytes_are_refused_in_a_line() -> None:
    """ONNX Runtime takes the bytes of a model, too: the message does not repeat them."""
    model = exported("dynamic").read_bytes()
    message = rf"^model must be the path of an \.onnx file, got {len(model):,} bytes; write them to a file$"
    for given in (model, bytearray(model), memoryview(model)):
        with pytest.raises(ValueError, match=message):
            Engine(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [Engine, inspect])
def test_a_pointer_of_git_lfs(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    message = r"m\.onnx is a pointer of Git LFS in place of the model; fetch the file with: git lfs pull$"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "m.onnx")


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_graph_whose_batch_was_fixed_runs_image_by_image(layout: str, runtime: str, tmp_path: Path) -> None:
    free = engine(layout, **({"T": 3} if layout == "unrolled" else {}))
    model = onnx.load(free.path)
    make_dim_param_fixed(model.graph, "batch", 1)
    onnx.save(model, tmp_path / "m.onnx")
    fixed = Engine(tmp_path / "m.onnx", runtime=runtime)
    assert (fixed.max_batch, free.max_batch) == (1, None)
    np.testing.assert_allclose(fixed.run(images(3), 3).logits, free.run(images(3), 3).logits, atol=1e-5)
    assert set(fixed.count(images(3), 3)[1]) == set(free.count(images(3), 3)[1])


def test_early_exit_is_refused_where_the_batch_was_fixed_above_one(tmp_path: Path) -> None:
    model = onnx.load(exported("step"))
    make_dim_param_fixed(model.graph, "batch", 3)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(
        ValueError, match=r"takes 3 images in a call and no other .*; take the exported file, whose batch"
    ):
        Engine(tmp_path / "m.onnx").run(images(3), 3, exit=Exit(0.9))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model_is_refused(part: float, tmp_path: Path) -> None:
    content = exported("dynamic").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"cut\.onnx (cannot be loaded|is an ONNX model, but not one)") as caught:
        Engine(tmp_path / "cut.onnx")
    assert "\n" not in str(caught.value)


def test_refused_devices_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("dynamic")
    with pytest.raises(ValueError, match="unknown device 'tpu'; choose one of cpu, cuda, tensorrt"):
        Engine(path, device="tpu")
    with pytest.raises(ValueError, match=r"unknown device \['cpu'\]; choose one of cpu, cuda, tensorrt"):
        Engine(path, device=["cpu"])  # type: ignore[arg-type]
    for threads in (0, 10_000):
        with pytest.raises(ValueError, match=rf"threads must be 1 to \d+, got {threads}"):
            Engine(path, threads=threads)
    with pytest.raises(ValueError, match="threads must be a whole number, got '2'"):
        Engine(path, threads="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must be the path of an \.onnx file, got None"):
        Engine(None)  # type: ignore[arg-type]
    (checkpoint := tmp_path / "a checkpoint.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"is a checkpoint, not an \.onnx file; .* tetdeploy export '.*\.safetensors'$"
    ):
        Engine(checkpoint)
    flags: list[dict[str, Any]] = [{"native": value} for value in ("no", 1, 2.0)]
    for given in (*flags, {"cuda_graphs": "no"}):
        with pytest.raises(
            ValueError, match=r"(native|cuda_graphs) must be True or False(, or None)?, got ('no'|1|2.0)"
        ):
            Engine(path, **given)
    model = engine("dynamic")
    with pytest.raises(ValueError, match="native must be True or False, got 'no'"):
        model.run_with(model.counting_overlay, digits().images[:1], 1, native="no")  # type: ignore[arg-type]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for device, provider in (("cuda", "CUDA"), ("tensorrt", "Tensorrt")):
        with pytest.raises(ValueError, match=rf"device '{device}' needs ONNX Runtime's {provider}.*tetdeploy\[gpu\]"):
            Engine(path, device=device)


def test_a_provider_that_does_not_start_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself goes on with the CPU and a line in the log when a CUDA library is missing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = onnxruntime.InferenceSession

    def falls_back(model: bytes, options: Any, providers: list[tuple[str, Any]], enable_fallback: int) -> Any:
        assert [name for name, _ in providers] == ["CUDAExecutionProvider"]
        return session(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(ValueError, match="could not start CUDAExecutionProvider and would have used CPUExecutionProv"):
        Engine(exported("dynamic"), device="cuda")


def test_both_onnxruntime_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(ValueError, match=r"onnxruntime and onnxruntime-gpu are both installed .* pip uninstall -y"):
        Engine(exported("dynamic"))


def test_a_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("dynamic")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for device, extra in (("cpu", "cpu"), ("cuda", "gpu")):
        with pytest.raises(MissingExtraError, match=rf"pip install 'tetdeploy\[{extra}\]'"):
            Engine(model, device=device)


@pytest.mark.parametrize(
    ("error", "line"),
    [(RuntimeError("\nbad allocation\nand a page of detail"), "bad allocation"), (MemoryError(), "MemoryError")],
    ids=["a page", "nothing"],
)
def test_what_fails_gives_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("dynamic")
    runner = Engine(path)
    monkeypatch.setattr(runner, "_session", Mock(run=Mock(side_effect=error)))
    with pytest.raises(ValueError, match=rf"ONNX Runtime failed on x of shape \[2, 1, 8, 8\]: {line}$"):
        runner.run(images(2))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Mock(side_effect=error))
    for read in (Engine, inspect):
        with pytest.raises(
            ValueError, match=rf"not an ONNX model, or a damaged one; export or copy it again \({line}\)$"
        ):
            read(path)


def test_a_model_that_memory_does_not_hold_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("dynamic")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Mock(side_effect=RuntimeError("std::bad_alloc")))
    for read in (Engine, inspect):
        with pytest.raises(MemoryError, match=rf"^{path} cannot be loaded: std::bad_alloc$"):
            read(path)


@pytest.mark.parametrize(("layout", "options"), [("unrolled", {"T": 4}), ("dynamic", {}), ("step", {})])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_give_no_answer(layout: str, options: dict[str, Any], value: float, tmp_path: Path) -> None:
    proto = onnx.load(exported(layout, **options))
    (weight,) = (w for w in proto.graph.initializer if w.name.endswith("readout.2.weight"))
    damaged = onnx.numpy_helper.to_array(weight).copy()
    damaged[3, 5] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(damaged, weight.name))
    onnx.save(proto, tmp_path / "m.onnx")
    runner = Engine(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"m\.onnx gives NaN or infinite logits: .* export the model again"):
        runner.run(images(2))
    if layout == "step":
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            runner.run(images(2), exit=Exit(0.5))
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            runner.stream(2).push(images(2))


@pytest.mark.parametrize(
    ("layout", "change", "fault"),
    [
        ("unrolled", {"T": 8}, r"per_step should be \[N, 8, 10\], the graph gives \[N, 4, 10\]"),
        (
            "unrolled",
            {"layout": "dynamic", "T": None},
            r"per_step should be \[N, T, 10\], the graph gives \[N, 4, 10\]",
        ),
        ("dynamic", {"class_names": ["cat", "dog"]}, r"logits should be \[N, 2\], the graph gives \[N, 10\]"),
        ("dynamic", {"states": [{"input": "u.a", "output": "u_next.a", "shape": [3]}]}, r"u_next\.a .* gives none"),
    ],
)
def test_a_graph_that_is_not_what_its_metadata_say(
    layout: str, change: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    proto = onnx.load(exported(layout, **{"T": 4} if layout == "unrolled" else {}))
    (entry,) = proto.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | change)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=f"{fault}; the file was changed, export"):
        Engine(tmp_path / "m.onnx")


@pytest.mark.parametrize("in_cache", [1, 10**9])
def test_an_image_out_of_range_does_not_take_the_answers_of_others(
    in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetdeploy.engine.IN_CACHE", in_cache)
    monkeypatch.setattr("tetdeploy.engine.LARGEST", 3.1e38)  # one that a network of great weights cannot take
    runner = engine("unrolled", T=4, normalize=False)
    x = np.zeros((2, 1, 8, 8), np.float32)
    x[1] = 3e38
    result = runner.run(x)
    assert np.isfinite(result.logits[0]).all() and not np.isfinite(result.logits[1]).any()
    with pytest.raises(ValueError, match="the input far out of range"):
        runner.run(x[1:])


class _DarkImagesFail:
    """A session whose logits of black images are NaN."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def run(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        outputs: list[Array] = self.session.run(names, feed)
        outputs[names.index("per_step")][~feed["x"].any((1, 2, 3))] = np.nan
        return outputs


@pytest.mark.parametrize("in_cache", [1, 10**9])
@pytest.mark.parametrize("exit", [None, Exit(0.01)])
def test_an_image_without_an_answer_leaves_others_theirs_step_by_step(
    exit: Exit | None, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetdeploy.engine.IN_CACHE", in_cache)
    runner, x = engine("step"), images(3).copy()
    wanted = runner.run(x, 4, exit=exit)
    monkeypatch.setattr(runner, "_session", _DarkImagesFail(runner._session))
    x[1] = 0
    result = runner.run(x, 4, exit=exit)
    assert np.isnan(result.logits[1]).all() and result.steps[1] == 4
    np.testing.assert_allclose(result.logits[[0, 2]], wanted.logits[[0, 2]], atol=1e-6)
    with pytest.raises(ValueError, match="the input far out of range"):
        runner.run(x[1:2], 4, exit=exit)


def test_a_run_step_by_step_holds_the_state_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, states, held = engine("step"), list[weakref.ref[Array]](), list[int]()
    call = runner.call

    def watched(*arguments: Any, **options: Any) -> dict[str, Array]:
        outputs = call(*arguments, **options)
        states.append(weakref.ref(outputs["u_next.lif1"]))
        held.append(sum(state() is not None for state in states))
        return outputs

    monkeypatch.setattr(runner, "call", watched)
    runner.run(images(2), 5)
    assert held == [1, 2, 2, 2, 2]  # what the call read, and what it wrote


# ------------------------------------------------------------------------------------------------ streams


def test_reset_starts_anew() -> None:
    stream = engine("step").stream(batch=2)
    first = [stream.push(images(2) if t == 0 else None) for t in range(3)]
    stream.reset()
    assert stream.t == 0
    assert all(not u.any() for u in stream.state.values())
    with pytest.raises(ValueError, match="there is none"):  # the last image is forgotten too
        stream.push()
    again = [stream.push(images(2) if t == 0 else None) for t in range(3)]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.step_logits, other.step_logits)
        assert one.t == other.t
    assert not np.array_equal(first[0].step_logits, first[2].step_logits)
    np.testing.assert_allclose(first[2].logits, np.mean([step.step_logits for step in first], 0), rtol=0, atol=1e-6)


def test_an_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Engine(exported("step"), threads=1)
    encoded, call = list[bool](), runner.call

    def recorded(feed: dict[str, Array], *arguments: Any, **options: Any) -> dict[str, Array]:
        encoded.append(bool(feed["encode"][0]))
        return call(feed, *arguments, **options)

    monkeypatch.setattr(runner, "call", recorded)
    runner.run(images(2), 3)
    assert encoded == [True, False, False]


def test_a_new_image_in_a_running_stream_meets_the_membranes_of_the_last() -> None:
    stream, fresh = engine("step").stream(), engine("step").stream()
    stream.push(images(1))
    switched = stream.push(images(1, 9)).step_logits
    assert not np.array_equal(switched, fresh.push(images(1, 9)).step_logits)
    x = np.stack([images(1)[0], images(1, 9)[0]])[None]
    as_frames = engine("dynamic", encoding="frames").run(x).per_step
    np.testing.assert_allclose(switched, as_frames[:, 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"encoding": "frames"}], ids=["direct", "frames"])
def test_state_may_be_saved_and_put_back(options: dict[str, Any]) -> None:
    x = frames(3, 6) if options else np.repeat(images(3)[:, None], 6, 1)
    stream = engine("step", **options).stream(batch=3)
    for t in range(3):
        stream.push(x[:, t])
    saved = {name: u.copy() for name, u in stream.state.items()}
    assert set(saved) == {"u.lif1", "u.lif2", "u.lif3"} and all(u.any() for u in saved.values())
    went_on = [stream.push(x[:, t]).step_logits for t in range(3, 6)]
    other = engine("step", **options).stream(batch=3)
    other.state = saved
    for u in saved.values():
        u[:] = 7.0  # what was put back is the stream's own
    for t, wanted in zip(range(3, 6), went_on, strict=True):
        np.testing.assert_array_equal(other.push(x[:, t]).step_logits, wanted)


def test_what_is_written_into_a_state_is_not_the_streams() -> None:
    stream = engine("step").stream()
    for u in stream.state.values():
        u[:] = np.nan
    assert all((u == 0).all() for u in stream.state.values())


def test_a_saved_state_does_not_change_as_the_stream_goes_on() -> None:
    stream = engine("step").stream()
    stream.push(images(1))
    saved = stream.state
    kept = {name: u.copy() for name, u in saved.items()}
    stream.push()
    assert any(not np.array_equal(stream.state[name], u) for name, u in kept.items())
    for name, u in kept.items():
        np.testing.assert_array_equal(saved[name], u)


def test_refused_states() -> None:
    stream = engine("step").stream(batch=2)
    good = stream.state
    with pytest.raises(ValueError, match=r"the state must hold u\.lif1, u\.lif2, u\.lif3; got u\.lif1"):
        stream.state = {"u.lif1": good["u.lif1"]}
    with pytest.raises(ValueError, match=r"u\.lif2 must be float32 \[2, 16, 8, 8\], got float32 \[1, 16, 8, 8\]"):
        stream.state = good | {"u.lif2": good["u.lif2"][:1]}
    with pytest.raises(ValueError, match=r"u\.lif3 must be float32 .*, got float64"):
        stream.state = good | {"u.lif3": good["u.lif3"].astype(float)}
    for value in (np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"the state is damaged: u\.lif2 holds NaN or infinite values"):
            stream.state = good | {"u.lif2": good["u.lif2"] + np.float32(value)}
    for state, got in ((None, "NoneType"), (5, "int"), ([*good], "list")):
        with pytest.raises(ValueError, match=rf"the state must hold u\.lif1, u\.lif2, u\.lif3 by name; got {got}"):
            stream.state = state  # type: ignore[assignment]
    for u in (None, 5, good["u.lif1"].tolist()):
        with pytest.raises(ValueError, match=r"u\.lif1 must be float32 \[2, 8, 8, 8\], got (object|int64|float64) "):
            stream.state = good | {"u.lif1": u}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"u\.lif1 is a masked array"):
        stream.state = good | {"u.lif1": np.ma.masked_less(good["u.lif1"], 0)}
    with pytest.raises(ValueError, match="; got 1, 2"):
        stream.state = {1: good["u.lif1"], 2: good["u.lif2"]}  # type: ignore[dict-item]
    assert all(not u.any() for u in stream.state.values())


def test_the_callers_buffer_may_be_filled_anew() -> None:
    whole = engine("step").run(images(1), 4).per_step
    buffer = images(1).copy()
    stream = engine("step").stream()
    stream.push(buffer)
    buffer[:] = 255
    for t in range(1, 4):
        np.testing.assert_array_equal(stream.push().step_logits, whole[:, t])
    chunks = engine("unrolled", T=3, with_state=True)
    buffer[:] = images(1)
    stream = chunks.stream()
    stream.push(buffer)
    buffer[:] = 255
    np.testing.assert_array_equal(stream.push(None).step_logits, chunks.run(images(1), 6).per_step[:, 5])


def test_a_refused_push_leaves_the_stream_as_it_was() -> None:
    x = images(2)
    whole = engine("step").run(x, 2).per_step
    stream = engine("step").stream(batch=2)
    stream.push(x)
    for bad, match in (
        (x[:1], "this stream has a batch of 2, got 1"),
        (x.astype(np.float32), "got float32"),
        (x[:, :, :4], r"takes input of shape \[N, 1, 8, 8\]"),
        (x[:0], "empty"),
    ):
        with pytest.raises(ValueError, match=match):
            stream.push(bad)
    assert stream.t == 1
    np.testing.assert_array_equal(stream.push().step_logits, whole[:, 1])


def test_refused_streams() -> None:
    for layout, options in (("unrolled", {"T": 4}), ("dynamic", {})):
        with pytest.raises(ValueError, match="gives no LIF state out, so it cannot stream; export with --layout step"):
            engine(layout, **options).stream()
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        engine("step").stream(batch=0)
    for batch in (2.0, True, None):
        with pytest.raises(ValueError, match=f"batch must be a whole number, got {batch}"):
            engine("step").stream(batch=batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repeats the last image of a directly encoded stream; there is none"):
        engine("step").stream().push(None)
    frame_stream = engine("step", encoding="frames").stream()
    frame_stream.push(frames(1, 1)[:, 0])
    with pytest.raises(ValueError, match="a model of frames takes a new one at each step"):
        frame_stream.push(None)
    with pytest.raises(ValueError, match="the input is a masked array"):
        frame_stream.push(np.ma.masked_less(frames(1, 1)[:, 0], 3))
    for bad in (frames(1, 1), np.uint8(3)):
        with pytest.raises(ValueError, match=r"push one frame at a time, of shape \[N, 1, 8, 8\]; got"):
            frame_stream.push(bad)
    chunks = engine("unrolled", T=3, with_state=True, encoding="frames").stream()
    with pytest.raises(ValueError, match="push a chunk of exactly T=3 frames, got 2"):
        chunks.push(frames(1, 2))
