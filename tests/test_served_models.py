"""A served model without a transport: what its engine bounds, and how long its sequences live."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import shutil
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import digits, exported, frames

from tetdeploy.agreement import load_reference, reference_path
from tetdeploy.early_exit import Exit, exit_path
from tetdeploy.engine import Array, Engine
from tetdeploy.serve import models
from tetdeploy.serve.models import _NUM_MEASURED, Bounds, ServedModel, step_energy_pj
from tetdeploy.serve.scheduler import CallFailedError, Limits
from tetdeploy.serve.sequences import UnknownSequenceError
from tetdeploy.storage.files import sha256_of
from tetdeploy.streams import StreamPool
from tetdeploy.sweep import sweep

PATIENCE = 60


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 2 * PATIENCE))


class UpToFour(Engine):
    """Takes up to 4 images in a call, as a TensorRT engine that was built for these."""

    max_batch = 4

    def check_input(self, x: Array) -> Array:
        x = super().check_input(x)
        if len(x) > 4:
            raise ValueError(f"built for 1 to 4 images, got {len(x)}")
        return x


def test_requests_that_come_together_are_no_more_than_the_engine_takes() -> None:
    async def scenario() -> None:
        calls: list[int] = []
        engine = UpToFour(exported("step"), threads=1)
        model = ServedModel(
            "m", engine, Limits(64, 0.01), Bounds(64, 60, 9), on_call=lambda steps: calls.append(len(steps))
        )
        x = digits().images[:6]
        answers = await asyncio.gather(*(model.infer(x[k : k + 2]) for k in (0, 2, 4)))
        assert calls == [4, 2]
        got = np.concatenate([answer.logits for answer in answers])
        np.testing.assert_allclose(got, np.concatenate([engine.run(x[:4]).logits, engine.run(x[4:]).logits]), atol=1e-5)
        with pytest.raises(ValueError, match="1 to 4 images, got 5"):
            await model.infer(x[:5])
        await model.scheduler.drain()

    run(scenario())


class FailsOnce(Engine):
    """Runs out of memory in its first call."""

    failed = False

    def call(self, *arguments: Any, **options: Any) -> dict[str, Array]:
        if not self.failed:
            self.failed = True
            raise ValueError("out of memory")
        return super().call(*arguments, **options)


def test_steps_of_a_lost_sequence_were_not_taken() -> None:
    async def scenario() -> None:
        taken: list[int] = []
        engine = FailsOnce(exported("step"), threads=1)
        model = ServedModel("m", engine, Limits(), Bounds(64, 60, 9), on_call=lambda steps: taken.append(len(steps)))
        x = digits().images[:1]
        with pytest.raises(CallFailedError, match="out of memory"):
            await asyncio.gather(model.push("s", x, start=True, T=3))
        with pytest.raises(UnknownSequenceError):
            await model.push("s", x)
        await model.push("s", x, start=True)
        await model.scheduler.drain()
        assert sum(taken) == 1

    run(scenario())


@pytest.mark.parametrize(("layout", "options", "T"), [("step", {}, 4), ("unrolled", {"T": 3}, 3)])
def test_a_steps_energy_is_its_share_of_a_sweeps(layout: str, options: dict[str, Any], T: int) -> None:
    """As docs/serving.md has it: of the first 32 images, at the T of the training, or an unrolled graph's own."""
    engine = Engine(exported(layout, **options), threads=1)
    reference = load_reference(engine)
    (row,) = sweep(engine, reference.x[:32], reference.labels[:32], (T,), num_timed=1).rows
    assert step_energy_pj(engine, 1) == pytest.approx(row.energy_pj / T, rel=1e-6)
    document = " ".join((Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8").split())
    assert f"over the first {_NUM_MEASURED} reference images beside the model" in document


def test_the_energy_counted_is_that_of_all_images_steps_in_joules() -> None:
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    metrics = pytest.importorskip("tetdeploy.serve.metrics").Metrics(registry)
    metrics.on_call("m", 2e6)(np.array([3, 5]))
    found = registry.get_sample_value("tetdeploy_estimated_energy_joules_total", {"model": "m"})
    assert found == pytest.approx((3 + 5) * 2e-6)


def test_without_an_energy_there_is_no_metric_of_it() -> None:
    registry = pytest.importorskip("prometheus_client").CollectorRegistry()
    metrics = pytest.importorskip("tetdeploy.serve.metrics").Metrics(registry)
    metrics.on_call("m", None)(np.array([3, 5]))
    assert registry.get_sample_value("tetdeploy_batch_images_sum", {"model": "m"}) == 2
    assert registry.get_sample_value("tetdeploy_image_steps_sum", {"model": "m"}) == 8
    assert registry.get_sample_value("tetdeploy_estimated_energy_joules_total", {"model": "m"}) is None


def test_a_reference_that_cannot_be_used_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, foreign = (
        Engine(shutil.copy(exported("step"), tmp_path / "m.onnx"), threads=1),
        exported("step", encoding="frames"),
    )
    caplog.clear()
    assert step_energy_pj(engine, 1) is None
    assert not caplog.messages
    path = reference_path(engine.path)
    path.mkdir()
    assert step_energy_pj(engine, 1) is None
    path.rmdir()
    path.write_bytes(b"damaged")
    assert step_energy_pj(engine, 1) is None
    shutil.copy(reference_path(foreign), path)
    assert step_energy_pj(engine, 1) is None
    assert [said.startswith(f"the energy of {engine.path} is not counted: ") for said in caplog.messages] == [True] * 3
    assert "m.onnx takes input of shape" in caplog.messages[2]


def test_requests_of_other_shapes_share_no_call() -> None:
    async def scenario() -> None:
        engine = Engine(exported("step", encoding="frames"), threads=1)
        model = ServedModel("m", engine, Limits(64, 0.05), Bounds(64, 60, 9))
        x = frames(2, 3)
        sent = x, x[:, :2]
        answers = await asyncio.gather(*(model.infer(one, T=2) for one in sent))
        for one, answer in zip(sent, answers, strict=True):
            np.testing.assert_allclose(answer.logits, engine.run(one, 2).logits, atol=1e-5)
        await model.scheduler.drain()

    run(scenario())


class Held(Engine):
    """Answers once it is let go."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.called, self.let_go = threading.Event(), threading.Event()

    def call(self, *arguments: Any, **options: Any) -> dict[str, Array]:
        self.called.set()
        assert self.let_go.wait(PATIENCE)
        return super().call(*arguments, **options)


def test_the_state_of_all_sequences_is_bounded() -> None:
    engine = Engine(exported("step"), threads=1)
    one = StreamPool(engine).stream_nbytes
    assert one == sum(4 * math.prod(s["shape"]) for s in (*engine.metadata["states"], *engine.metadata["encoded"])) + (
        64 + 8 * len(engine.class_names) + 8  # the image, the sum of the logits, t
    )
    for most, size, limit in ((9, 3 * one, 3), (2, 3 * one, 2), (9, 1, 1)):
        model = ServedModel("m", engine, Limits(), Bounds(64, 60, most, size))
        assert model.sequences is not None and model.sequences.limit == limit


def test_a_T_that_the_server_would_refuse_is_said_when_it_starts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(exported("step"), threads=1)
    ServedModel("m", engine, Limits(), Bounds(engine.trained_T, 60, 9))
    assert not caplog.messages
    ServedModel("m", engine, Limits(), Bounds(engine.trained_T - 1, 60, 9))
    (said,) = caplog.messages
    assert said.startswith(f"m takes {engine.trained_T} steps unless a request says T")
    caplog.clear()
    monkeypatch.setattr(models, "_calibrated", lambda engine: (Exit(0.5, "confidence", 1), 7))
    ServedModel("m", engine, Limits(), Bounds(6, 60, 9))
    assert caplog.messages == [
        "m, asked for early exit, takes 7 steps unless a request says T, and --max-T 6 refuses that"
    ]


@pytest.mark.parametrize(
    ("layout", "max_T", "T", "told"),
    [
        ("step", 64, 65, "1..64, got 65; --max-T lets a server run more, and a sequence takes more"),
        ("step", 64, 1025, "1..64, got 1025; a sequence takes more"),
        ("step", 2000, 1025, "1..1024, got 1025; a sequence takes more"),
        ("unrolled", 64, 65, None),
        ("dynamic", 2000, 1025, "1..1024, got 1025; a sequence of a model of layout step takes more"),
    ],
)
def test_more_steps_than_a_server_runs_have_a_remedy_of_the_server(
    layout: str, max_T: int, T: int, told: str | None
) -> None:
    """Not the engine's `engine.stream()`, which it has not."""
    message = f"^T must lie in {re.escape(told)} in several requests$" if told else "unrolled to T=.*; export again"

    async def scenario() -> None:
        model = ServedModel("m", Engine(exported(layout), threads=1), Limits(), Bounds(max_T, 60, 9))
        with pytest.raises(ValueError, match=message):
            await model.infer(digits().images[:1], T=T)
        await model.scheduler.drain()

    run(scenario())


def test_a_sequence_is_idle_from_its_answer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        loop, passed = asyncio.get_running_loop(), 0
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + passed)
        engine = Held(exported("step"), threads=1)
        model = ServedModel("m", engine, Limits(), Bounds(64, 10, 9))
        push = asyncio.create_task(model.push("s", digits().images[:1], start=True))
        assert await asyncio.to_thread(engine.called.wait, PATIENCE)
        passed += 11  # longer than a sequence may idle
        engine.let_go.set()
        await push
        await model.expire()
        assert model.sequences is not None and len(model.sequences) == 1
        passed += 11
        await model.expire()
        assert len(model.sequences) == 0
        await model.scheduler.drain()

    run(scenario())


def write_rule(model: Path, threshold: float, T: int) -> None:
    rule = {"threshold": threshold, "criterion": "confidence", "min_T": 1, "T": T, "model_sha256": sha256_of(model)}
    exit_path(model).write_text(json.dumps(rule))


def test_the_threshold_is_that_of_the_model_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        path = tmp_path / "m.onnx"
        shutil.copy(exported("step"), path)
        write_rule(path, 0.0, T=4)
        model = ServedModel("m", Engine(path, threads=1), Limits(), Bounds(64, 60, 9))
        shutil.copy(exported("step", normalize=False), path)
        write_rule(path, 1.0, T=2)
        x = digits().images[:2]
        assert (await model.infer(x, T=6, early_exit=True)).steps.tolist() == [1, 1]
        with pytest.raises(ValueError, match="threshold of m was found for T=4 and says nothing of T=3"):  # no path
            await model.infer(x, T=3, early_exit=True)
        assert (await model.infer(x, early_exit=True)).steps.tolist() == [1, 1]
        assert model._rule is not None
        model._rule = dataclasses.replace(model._rule[0], threshold=1.0), 9
        for T in (9, 2):  # the calibration's T, not the training's
            model._rule = model._rule[0], T
            assert (await model.infer(x, early_exit=True)).per_step.shape[1] == T
        assert (await model.infer(x)).per_step.shape[1] == model.engine.trained_T == 4
        late = ServedModel("m", model.engine, Limits(), Bounds(64, 60, 9))  # in memory is still the first
        assert "of another model" in caplog.text
        with pytest.raises(ValueError, match="m had no threshold when the server started: it takes tetdeploy"):
            await late.infer(x, early_exit=True)
        await late.scheduler.drain()
        await model.scheduler.drain()

    run(scenario())
