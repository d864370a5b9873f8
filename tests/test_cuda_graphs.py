"""Calls recorded as CUDA graphs: on the CPU's memory, where nothing is recorded but all else is done, the answers are
those of plain sessions and no recorded call could have met an address of another; on a GPU where there is one."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from command_helpers import refused
from export_helpers import digits, engine, exported, inputs, pooled
from gpu_stand_in import BoundSessions, gpu_build

from tetdeploy.early_exit import Exit
from tetdeploy.engine import Engine
from tetdeploy.runtimes import cuda_graphs
from tetdeploy.runtimes.cuda_graphs import GraphSession
from tetdeploy.streams import StreamPool

Array = np.ndarray[Any, Any]
STEP: dict[str, Any] = {"target": "cuda"}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("step", STEP),
    ("step", STEP | {"encoding": "frames"}),
    ("step", STEP | {"normalize": False}),
    ("unrolled", {"T": 3}),
    ("unrolled", {"T": 3, "encoding": "frames"}),
    ("unrolled", {"T": 3, "with_state": True}),
    ("unrolled", {"T": 3, "with_state": True, "encoding": "frames"}),
]
layouts = pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=str)
streaming = pytest.mark.parametrize(("layout", "options"), [*LAYOUTS[:3], *LAYOUTS[5:]], ids=str)


class GraphSessions(BoundSessions):
    """Makes calls as on a GPU, to the CPU's memory."""

    def first(self) -> tuple[Any, dict[str, Any]]:
        session, metadata = super().first()
        return GraphSession(session._session, "cpu", {s["input"]: s["output"] for s in metadata["states"]}), metadata


class Recorder:
    """Stands before ONNX Runtime's session and knows what a recording would hold on to.

    Attributes:
        bound: by the recording's number its binding, whose arrays are never others.
        unrecorded: bindings of calls that were not to be recorded.
        threads: that made calls.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.bound: dict[str, Any] = {}
        self.unrecorded: list[Any] = []
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> Any:
        self.threads.add(threading.get_ident())
        number = options.get_run_config_entry("gpu_graph_id")
        if number == "-1":
            self.unrecorded.append(binding)
            return self.session.run_with_iobinding(binding, options)
        where = [(value.data_ptr(), value.shape()) for value in binding.get_outputs()]
        assert self.bound.setdefault(number, (binding, where)) == (binding, where)
        return self.session.run_with_iobinding(binding, options)


def make(layout: str, options: dict[str, Any]) -> tuple[Engine, Recorder]:
    with patch("tetdeploy.engine.Sessions", GraphSessions):
        made = Engine(exported(layout, **options), threads=1, native=False)
    recorder = made._session._session = Recorder(made._session._session)
    return made, recorder


# ------------------------------------------------------------------------------------------------ on the CPU


@layouts
def test_runs_are_the_same(layout: str, options: dict[str, Any]) -> None:
    plain, (other, recorder) = engine(layout, **options), make(layout, options)
    assert type(other._session) is GraphSession
    x = inputs(plain, 6, 3)
    for count, T in ((5, 3), (1, 2), (5, 1), (5, 3)):
        np.testing.assert_array_equal(other.run(x[:count], T).per_step, plain.run(x[:count], T).per_step)
    recorded = len(recorder.bound)
    assert recorded == (5 if layout == "step" else 2)  # from u = 0 and two ways of 5 images, one of them of 1 image
    x[:] = x[::-1].copy()  # the same object with another content
    np.testing.assert_array_equal(other.run(x[:5], 3).per_step, plain.run(x[:5], 3).per_step)
    assert len(recorder.bound) == recorded and len(recorder.threads) == 1


@streaming
def test_interleaved_streams_are_the_same(
    layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    update = cuda_graphs._update

    def watched(value: Any, array: Any, name: str) -> None:
        sent.append(name)
        update(value, array, name)

    monkeypatch.setattr(cuda_graphs, "_update", watched)
    plain, (other, recorder) = engine(layout, **options), make(layout, options)
    x = inputs(plain, 8, 15)
    starts = (0, 2, 5)
    wanted, got = ([of.stream(2) for _ in starts] for of in (plain, other))
    for t in range(5):
        for k, start in enumerate(starts):
            part = x[start : start + 2]
            if plain.encoding == "frames":
                part = part[:, t] if layout == "step" else part[:, 3 * t : 3 * t + 3]
            shown = part if plain.encoding == "frames" or t in (0, 3) else None
            one, other_one = wanted[k].push(shown), got[k].push(shown)
            np.testing.assert_array_equal(other_one.logits, one.logits)
            np.testing.assert_array_equal(other_one.step_logits, one.step_logits)
            for name, u in wanted[k].state.items():
                assert u.any()
                np.testing.assert_array_equal(got[k].state[name], u)
    assert len(recorder.bound) == 3 * len(starts)
    assert sent.count("x") == len(starts) * (5 if plain.encoding == "frames" else 2)  # not what is shown again
    saved = wanted[0].state
    for stream in (wanted[1], got[1]):
        stream.reset()
        stream.state = saved
    np.testing.assert_array_equal(got[1].push(part).step_logits, wanted[1].push(part).step_logits)


def test_arrays_are_used_again_when_a_stream_has_ended() -> None:
    other, recorder = make("step", STEP)
    x = digits().images[:4]
    gc.freeze()  # what was there before is not looked through three times
    for k in range(3):
        streams = [other.stream(4) for _ in range(2)]
        for t in range(3):
            for stream in streams:
                stream.push(x if t == 0 else None)
        if k == 0:
            recorded = set(recorder.bound)
        streams.clear()
        del stream
        gc.collect()
    gc.unfreeze()
    assert recorded == set(recorder.bound) and len(recorded) == 2 * 3


def test_beyond_so_many_arrays_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_SLOTS", 2)
    plain, (other, recorder) = engine("step", **STEP), make("step", STEP)
    x = digits().images[:4]
    for count in (4, 3, 2, 1, 4, 3, 2, 2):
        np.testing.assert_array_equal(other.run(x[:count], 3).per_step, plain.run(x[:count], 3).per_step)
    assert set(recorder.bound) == {str(number) for number in range(1, 7)} and len(recorder.unrecorded) == 4 * 3


def test_one_membrane_of_zeros_among_others_does_not_reset_them() -> None:
    plain, (other, _) = engine("step", **STEP), make("step", STEP)
    feed: dict[str, Any] = {"x": digits().images[:2]}
    for state in plain.metadata["states"]:
        feed[state["input"]] = np.full((2, *state["shape"]), 0.9, np.float32)
    first = plain.metadata["states"][0]["input"]
    (wanted,) = plain._session.run(["per_step"], feed | {first: np.zeros_like(feed[first])})
    (got,) = other._session.run(["per_step"], feed | {first: other._session.zeros(feed[first].shape)})
    np.testing.assert_array_equal(got, wanted)


def test_a_call_that_failed_may_be_made_again() -> None:
    """What a call reads it does not write, so that the stream is where it was."""
    other, _ = make("step", STEP)
    x, stream = digits().images[:2], other.stream(2)
    wanted = engine("step", **STEP).run(x, 3).per_step
    stream.push(x)
    with (
        patch.object(other, "check_finite", side_effect=ValueError("no finite logits")),
        pytest.raises(ValueError, match="no finite"),
    ):
        stream.push()
    for t in (1, 2):
        np.testing.assert_array_equal(stream.push().step_logits, wanted[:, t])


def test_pools_early_exit_and_threads() -> None:
    plain, (other, recorder) = engine("step", **STEP), make("step", STEP)
    x = digits().images[:40]
    other.device = "cuda"  # as far as `Engine` knows: images leave when half of the batch is certain
    wanted, got = (of.run(x, 4, exit=Exit(0.3)) for of in (plain, other))
    assert len(set(wanted.steps.tolist())) > 1
    np.testing.assert_array_equal(got.steps, wanted.steps)
    np.testing.assert_array_equal(got.per_step, wanted.per_step)
    np.testing.assert_array_equal(pooled(other, x, 3), plain.run(x, 3).per_step)
    alone = [plain.run(x[k : k + 4], 3).per_step for k in range(0, 40, 4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda k: other.run(x[k : k + 4], 3).per_step, range(0, 40, 4)))
    np.testing.assert_array_equal(together, alone)
    assert len(recorder.threads) == 1


def test_a_membrane_that_was_overwritten_is_not_read() -> None:
    other, _ = make("step", STEP)
    stream = other.stream(2)
    stream.push(digits().images[:2])
    copied = copy.copy(stream)
    stream.push()
    stream.push()  # writes where the copy would read
    with pytest.raises(ValueError, match=r"^a membrane that the call after the next has overwritten"):
        copied.push()


def test_an_engine_that_is_dropped_goes_at_once() -> None:
    """Not when Python next looks for cycles: on a card other engines want its memory."""
    other, _ = make("step", STEP)
    other.run(digits().images[:2], 3)
    session = weakref.ref(other._session)
    gc.disable()
    try:
        del other
        assert session() is None
    finally:
        gc.enable()


def test_a_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other, _ = make("step", STEP)
    other.run(digits().images[:2], 3)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ValueError, match=r"an engine on a GPU does not go on in a forked process"):
        other.run(digits().images[:2], 3)
    with pytest.raises(ValueError, match=r"does not go on in a forked process"):
        other.stream()


def test_a_push_of_new_and_old_images_is_one_call() -> None:
    plain, (other, _) = engine("step"), make("step", STEP)
    images, pools = digits().images, [StreamPool(of) for of in (plain, other)]
    answers = []
    for pool in pools:
        one, two = pool.open(), pool.open()
        pool.push({one: images[0]})
        with patch.object(pool.engine, "call", wraps=pool.engine.call) as calls:
            given = pool.push({one: None, two: images[1]})
        answers.append([given[one].step_logits, given[two].step_logits])
        assert calls.call_count == (2 if pool.engine is plain else 1)
    np.testing.assert_allclose(answers[1], answers[0], rtol=0, atol=2e-5)


def test_counting_goes_without() -> None:
    plain, (other, recorder) = engine("step", **STEP), make("step", STEP)
    x = digits().images[:4]
    counts, wanted = other.count(x, 3)[1], plain.count(x, 3)[1]
    assert counts.keys() == wanted.keys() and counts and not recorder.bound
    for name, value in counts.items():
        np.testing.assert_array_equal(value, wanted[name])


def test_a_membrane_of_another_shape_is_refused() -> None:
    other, _ = make("step", STEP)
    stream = other.stream()
    stream.push(digits().images[:1])
    stream._u["u.lif1"] = np.zeros((1, 8, 4, 16), np.float32)  # as many numbers
    with pytest.raises(ValueError, match=r"^u.lif1 must be of shape \[1, 8, 8, 8\], got \[1, 8, 4, 16\]$"):
        stream.push()


# ------------------------------------------------------------------------------------------------ what is asked for


def test_what_onnx_runtime_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [exported("step", **STEP), exported("step", precision="fp16", **STEP)]
    asked = gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    exact = {"use_tf32": "0"}
    for model, wanted in zip(models, (exact, {}), strict=True):
        asked.clear()
        runner = Engine(model, device="cuda", cuda_graphs=True)
        assert runner.cuda_graphs and isinstance(runner._session, GraphSession)
        options = {"cudnn_conv_algo_search": "HEURISTIC"} | wanted
        assert asked[1:] == [({"CUDAExecutionProvider": options | {"enable_cuda_graph": "1"}}, 0)]
        runner.overlaid(runner.counting_overlay)
        assert asked[2:] == [({"CUDAExecutionProvider": options}, 0)]


@pytest.mark.parametrize(
    ("layout", "options", "match"),
    [
        ("dynamic", {}, r"a dynamic graph has a Scan, which cannot be recorded; export with --layout step"),
        ("step", {}, r"this step graph has an If .*; one exported with --target cuda has none, if"),
    ],
)
def test_graphs_with_control_flow_are_refused(
    layout: str, options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exported(layout, **options)
    gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    with pytest.raises(ValueError, match=rf"^{model.name} cannot run with CUDA graphs: {match}"):
        Engine(model, device="cuda", cuda_graphs=True)


@pytest.mark.parametrize(
    ("device", "runtime"), [("cpu", "onnxruntime"), ("cpu", "openvino"), ("tensorrt", "onnxruntime")]
)
def test_other_devices_are_refused(device: str, runtime: str) -> None:
    with pytest.raises(
        ValueError, match=f"^cuda_graphs is for ONNX Runtime on device cuda, not {runtime} on {device}$"
    ):
        Engine(exported("step"), device=device, runtime=runtime, cuda_graphs=True)


def test_bench_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    output = refused("bench", exported("step"), "--cuda-graphs")
    assert output == "Error: cuda_graphs is for ONNX Runtime on device cuda, not onnxruntime on cpu\n"


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "options"), [*LAYOUTS, ("step", STEP | {"precision": "fp16"})], ids=str)
def test_on_a_gpu_the_answers_are_those_without_graphs(layout: str, options: dict[str, Any]) -> None:
    try:
        plain = Engine(exported(layout, **options), device="cuda")
    except ValueError as error:
        pytest.skip(str(error))
    other = Engine(exported(layout, **options), device="cuda", cuda_graphs=True)
    x = inputs(plain, 6, 3)
    for count, T in ((5, 3), (1, 2), (5, 1), (5, 3)):
        wanted, got = plain.run(x[:count], T).per_step, other.run(x[:count], T).per_step
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
