"""examples/benchmarks/gpu_*.py: a side that fails says why, the numbers are put together rightly, a smoke run runs."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import operator
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import click
import numpy as np
import pytest
import torch
from command_helpers import printed, refused
from torch import nn

from tetdeploy.cli.options import Numbers
from tetdeploy.neurons import IF, LIF

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


def test_a_side_answers_until_it_fails_and_says_why(module: Any) -> None:
    worker = module("turns").Worker(operator.attrgetter, "real")
    assert [worker.ask(3), worker.ask(2.5)] == [3, 2.5] and worker.failed == ""
    assert worker.ask("text") is None
    assert worker.failed == "AttributeError: 'str' object has no attribute 'real'"
    assert worker.ask(3) is None  # it is not asked again


def test_a_side_that_cannot_be_opened_or_dies_says_so(module: Any) -> None:
    turns = module("turns")
    closed, dying = turns.Worker(operator.attrgetter, 3), turns.Worker(functools.partial, os._exit)
    assert closed.ask(1) is None and closed.failed.startswith("TypeError: attribute name must be a string")
    assert dying.ask(7) is None and dying.failed == "its process ended with 7"


def test_a_side_that_hangs_is_killed_and_has_failed(module: Any) -> None:
    hanging = module("turns").Worker(functools.partial, time.sleep, limit_s=0.5)
    assert hanging.ask(60) is None and hanging.failed == "no answer within 0.5 s"
    assert not hanging._process.is_alive()


def test_the_wishes_take_the_fastest_of_each_kind(module: Any) -> None:
    def side(ms: float, mb: float = 100) -> dict[str, Any]:
        return {"median_ms": ms, "peak_mb": mb, "first_gradient": 2.0}

    ratios = module("training_step").ratios
    sides = {
        "loop": side(30, 200),
        "loop NHWC": side(20, 250),
        "NCHW": side(5),
        "tetdeploy": side(12, 90),
        "tetdeploy graphs": side(10, 130),
        "SJ torch NCHW": side(40),
        "SJ triton NHWC": side(12),
        "SJ triton NCHW": side(1) | {"first_gradient": 3.0},
        "SJ cuda NCHW": {"failed": "why"},
        "ANN": side(8),
    }
    assert ratios(sides, "fp32") == [
        ("plain loop / ours", 2.0, "at least 1.5", True, ""),
        ("SpikingJelly's best / ours", 1.2, "at least 1.3", False, ""),
        ("ours / ANN twin, whose BN and ReLU are not fused", 1.25, "at most 1.15", False, ""),
        ("memory, ours / plain loop", 0.65, "at most 0.6", False, ""),
    ]
    assert ratios({"loop": {"failed": "why"}, "tetdeploy": side(10)}, "fp32") == []
    own = {"tetdeploy malloc": side(15, 80)}
    assert ratios({name: sides[name] for name in ("loop", "tetdeploy")} | own, "fp32") == [
        ("plain loop / ours", 2.5, "at least 1.5", True, ""),
        ("memory, ours / plain loop", 0.45, "at most 0.6", True, ""),
        ("plain loop / ours, with malloc as it is", 2.0, "at least 1.5", True, ""),
        ("memory, ours / plain loop, with malloc as it is", 0.4, "at most 0.6", True, ""),
    ]


def test_in_16_bits_a_ratio_says_that_gradients_differ_and_is_not_left_out(module: Any) -> None:
    def side(ms: float, norm: float) -> dict[str, Any]:
        return {"median_ms": ms, "peak_mb": 100, "first_gradient": norm}

    ratios = module("training_step").ratios
    sides = {"tetdeploy": side(10, 2.0), "loop": side(30, 2.3), "SJ torch NCHW": side(20, 1.95), "ANN": side(8, 9.0)}
    sides |= {"SJ cuda NCHW": side(1, math.nan), "ANN graphs": side(1, math.inf)}
    remark = "loop: its gradient's norm differs from ours by 15 %"
    assert [(row[0], row[1], row[-1]) for row in ratios(sides, "bf16")] == [
        ("plain loop / ours", 3.0, remark),
        ("SpikingJelly's best / ours", 2.0, ""),
        ("ours / ANN twin, whose BN and ReLU are not fused", 1.25, ""),
        ("memory, ours / plain loop", 1.0, remark),
    ]


@pytest.mark.parametrize(("side", "channels_last"), [("loop", False), ("loop NHWC", True)])
def test_the_loop_runs_in_both_layouts(side: str, channels_last: bool, module: Any) -> None:
    training = module("training_step")
    step = training.Step(side, training.Case("convsnn", 0.1, 8, 2, 2, "cpu", "fp32", 1))
    convolution = next(
        layer for layer in step.network.modules() if isinstance(layer, nn.Conv2d) and layer.in_channels > 3
    )
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert any(type(layer).__name__ == "LoopLIF" for layer in step.network.modules())


@pytest.mark.parametrize(("side", "kept"), [("tetdeploy", True), ("tetdeploy malloc", False), ("loop", False)])
def test_memory_is_kept_for_the_side_that_says_so(
    side: str, kept: bool, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, within = module("training_step"), []

    @contextmanager
    def reused_memory() -> Iterator[None]:
        within.append(True)
        yield
        within.pop()

    for name, value in (("benchmark", False), ("allow_tf32", True)):  # which a side sets in its process
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    monkeypatch.setattr(training, "Step", lambda side, case: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(training, "reused_memory", reused_memory)
    monkeypatch.setattr(training, "turn", lambda step, case: bool(within))
    assert training.open_side(side, None, None)("turn") is kept


class Answering:
    """In place of a side's process: a millisecond an image, a failure from some time on, or no profiler."""

    limits: ClassVar[list[float | None]] = []

    def __init__(self, open_side: Any, side: str, *_: Any, **options: Any) -> None:
        self.side, self.failed, self.asked = side, "", 0
        Answering.limits.append(options.get("limit_s"))

    def ask(self, request: Any) -> Any:
        self.asked += 1
        fails_at = {"SJ torch fp32": 2, "SJ triton fp32": 3, "SJ triton bf16": 6}.get(self.side, 100)
        if self.asked >= fails_at or (self.side == "loop" and request == "profile"):
            self.failed = "why"
        if self.failed:
            return None
        whole = {
            "turn": {"ms": [3.0, 5.0], "peak_mb": 7.0, "first_gradient": 2.0},
            "profile": {"BN": 1.0},
            "floor": {"floor_ms": 2.0},
        }
        return whole[request] if request in whole else {"ms": [float(request)], "classes": np.arange(request) % 2}

    def end(self) -> None:
        pass


def test_a_call_that_is_cut_leaves_what_it_knows(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[dict[str, Any]] = []
    training, inference = module("training_step"), module("gpu_inference")
    for benchmark in (training, inference):
        monkeypatch.setattr(benchmark, "Worker", Answering)
    sides = ["tetdeploy", "loop", "SJ torch fp32"]
    Answering.limits.clear()
    training.measure(sides, None, 2, None, lambda found: kept.append(copy.deepcopy(found)), 5.0)
    assert Answering.limits == [5.0] * 4  # of the floor, too
    medians, profile = {"median_ms": 4.0, "peak_mb": 7.0, "first_gradient": 2.0}, {"profile_ms": {"BN": 1.0}}
    assert kept[0] == {"sides": {"tetdeploy": medians | {"turns": 0}}}
    of_one = medians | {"turns": 1}
    assert kept[5] == {"sides": {"tetdeploy": of_one, "loop": of_one, "SJ torch fp32": {"failed": "why"}}}
    assert kept[-1]["sides"]["loop"] == medians | {"turns": 2, "not_profiled": "why"}
    assert kept[-1]["sides"]["tetdeploy"] == medians | {"turns": 2} | profile
    assert kept[9]["floor"] == kept[-1]["floor"] == {"floor_ms": 2.0}  # before a profiler may fail
    kept.clear()
    found = ["eager fp32", "SJ torch fp32", "SJ triton fp32", "SJ triton bf16"]
    inference.measure(found, [1, 4], 2, kept.append)
    of_one = {"median_ms": {1: 1.0}}
    eager, failed = {"eager fp32": of_one | {"agrees": 1.0}}, {"SJ torch fp32": {"failed": "why"}}
    known = of_one | {"agrees": 1.0}
    assert kept[1] == eager | failed | {"SJ triton fp32": known, "SJ triton bf16": known}
    assert kept[-1]["eager fp32"]["median_ms"] == {1: 1.0, 4: 4.0}
    assert kept[-1]["SJ triton fp32"] == {"failed": "why"}  # in the second turn of the smaller batch
    assert kept[-1]["SJ triton bf16"] == known | {"failed": "why"}  # in that of the larger
    results = {"model": "m", "width": 1, "T": 2, "card": "a card", "sides": kept[-1]}
    inference.show(results, (1, 4))
    shown = capsys.readouterr().out
    assert re.search(r"SJ triton bf16 │ +1\.00 │ +│ +│ 100\.0% │", shown)
    assert "SJ triton bf16 left out at batch 4: why" in shown and "SJ triton fp32 left out: why" in shown


def test_a_side_that_only_ever_fails_alike_is_not_opened_again(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    neurons, opened = module("neurons"), []

    class Failing:
        failed, hung = "no kernels", False

        def __init__(self, _: Any, side: str, *others: Any) -> None:
            self.side = side
            opened.append(side)

        def ask(self, request: tuple[Any, int]) -> Any:
            runs = self.side == "ours" or (self.side == "SpikingJelly torch" and request[0].dtype == "float32")
            return {"seconds": [1.0], "kept_bytes": 1} if runs else None

    monkeypatch.setattr(neurons, "Worker", Failing)
    sides = ("ours", "SpikingJelly torch", "SpikingJelly cuda")
    workers, never = {side: Failing(None, side) for side in sides}, dict.fromkeys(sides, "")
    single, half = (neurons.Case("layer", (2, 3), dtype, False) for dtype in ("float32", "bfloat16"))
    for case in (single, half, half, single):
        found = neurons.measure(case, "cpu", 1, workers, never, 1)
        assert list(found) == ["ours", "SpikingJelly torch"][: 1 + (case is single)]
    assert opened == [*sides, sides[2], sides[1], sides[1]] and sorted(workers) == sorted(sides[:2])


def test_pytorch_computes_fp32_without_tf32_and_the_table_says_so(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inference = module("gpu_inference")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    np.save(tmp_path / "images.npy", np.zeros((2, 3), np.uint8))
    torch.save(Repeating(), tmp_path / "classifier.pt")
    inference.open_side("eager fp32", tmp_path, 2, "cpu", 2, 1)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    found = {"median_ms": {1: 2.0}, "agrees": 1.0}
    inference.show({"model": "m", "width": 1, "T": 2, "card": "a card", "sides": {"eager fp32": found}}, [1])
    assert "fp32 without TF32 on every side" in capsys.readouterr().out


class Repeating(nn.Module):
    """In place of a classifier: its images at each step."""

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        return x.float().expand(T, *x.shape)


@pytest.mark.peer
def test_spikingjellys_neurons_have_our_parameters(module: Any) -> None:
    pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
    ours = nn.Sequential(LIF(tau=0.75, v_th=0.8, gamma=1.3), IF(v_th=1.5))
    variant, resetting = module("training_step").variant, module("training_step").resetting
    theirs = variant("SJ torch NCHW", copy.deepcopy(ours), torch.device("cpu"))
    resetting("SJ torch NCHW")(theirs)
    assert not any(isinstance(layer, LIF) for layer in theirs)
    x = torch.rand(8, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outcomes = []
    for network in (ours, theirs):
        spikes = network(2 * x)
        outcomes.append((spikes.detach(), *torch.autograd.grad(spikes.sum(), x)))
    assert 0.05 < outcomes[0][0].mean() < 0.95
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_an_operators_time_goes_to_the_innermost_kind_round_it(module: Any) -> None:
    def event(*names: str) -> Any:
        return functools.reduce(lambda parent, name: SimpleNamespace(name=name, cpu_parent=parent), names, None)

    kind_of = module("training_step").kind_of
    assert kind_of(event("autograd::engine::evaluate_function: ConvolutionBackward0", "aten::sum")) == "convolutions"
    assert kind_of(event("tetdeploy::lif", "aten::mul_")).startswith("neurons")
    assert kind_of(event("aten::conv2d", "aten::clone")) == "copies, casts"
    assert kind_of(event("aten::linear")) == "rest"


def test_a_side_that_the_device_has_not_is_left_out(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = module("training_step")
    case = training.Case("convsnn", 0.1, 8, 2, 2, "cpu", "fp32", 1)
    with pytest.raises(ValueError, match="no CUDA graph of this training step: the run is on cpu"):
        training.Step("tetdeploy graphs", case)
    monkeypatch.setattr(training, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match="tetdeploy malloc is for a CPU"):
        training.Step("tetdeploy malloc", case)
    measured = {"median_ms": 1.0, "peak_mb": 1.0, "first_gradient": 2.0}
    others = {"loop": measured | {"first_gradient": 2.2}, "NCHW": measured | {"first_gradient": 2.05}}
    others |= {"ANN": measured | {"first_gradient": 3.0}, "unfused": measured | {"first_gradient": float("nan")}}
    sides = {"tetdeploy": measured, "tetdeploy graphs": {"failed": "why"}, **others}
    results = {"case": vars(case), "card": "cpu", "precision": "fp32", "sides": sides, "floor": {"failed": "as well"}}
    training.show(results)
    shown = capsys.readouterr().out
    assert "tetdeploy graphs left out: why" in shown and "no floor: as well" in shown
    assert [line for line in shown.splitlines() if "left out below" in line] == [
        "loop is left out below: its gradient's norm differs from ours by 10 %",
        "unfused is left out below: its gradients are not finite",
    ]
    results |= {"precision": "bf16"}
    training.show(results)
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "left out below" in line] == ["unfused"]
    assert "plain loop / ours: 1.00 (loop: its gradient's norm differs from ours by 10 %)" in shown


class InThisProcess:
    """In place of a side's process: opens and asks the side here, as it comes out of the pickle that would be sent."""

    def __init__(self, *given: Any, limit_s: float) -> None:
        self.sent, self.failed = pickle.dumps(given), ""

    def ask(self, request: Any) -> Any:
        return self.answer(request)

    @functools.cached_property
    def answer(self) -> Any:
        open_side, *arguments = pickle.loads(self.sent)
        return open_side(*arguments)

    def end(self) -> None:
        pass


def test_a_smoke_run_of_the_training_step(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("benchmark", False), ("allow_tf32", True)):  # which a side sets in its process
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    training = module("training_step")
    monkeypatch.setattr(training, "Worker", InThisProcess)
    tiny = ["--device", "cpu", "--width", "0.0625", "--size", "8", "--batch", "2", "--turns", "1", "--steps", "1"]
    tiny += ["--model", "convsnn"]
    sides = ["--side", "loop", "--side", "tetdeploy", "--threads", "1"]
    result = tmp_path / "step.json"
    output = printed(*tiny, *sides, "--json", result, command=training.main)
    assert "plain loop / ours: " in output and "wanted" not in output  # that is of a card
    found = json.loads(result.read_text())
    assert found["sides"]["tetdeploy"]["profile_ms"]["convolutions"] > 0
    assert found["sides"]["tetdeploy"]["first_gradient"] == pytest.approx(
        found["sides"]["loop"]["first_gradient"], rel=1e-4
    )
    # 3 convolutions forward and backward at T x N = 8, the first without a gradient for its images
    assert 0 < found["floor"]["tflop"] < 1e-3 and found["reached"] == []
    assert "floor_ms" not in found["floor"]


@pytest.mark.slow
def test_a_smoke_run_of_the_loader(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = module("loader")
    few_images, few_files = (functools.partial(write, count=8) for write in (loader.cifar_sized, loader.write_jpegs))
    monkeypatch.setattr(loader, "cifar_sized", lambda count: few_images())
    monkeypatch.setattr(loader, "write_jpegs", lambda folder, count: few_files(folder))
    tiny = ["--workers", "0", "--steps", "1", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    tiny += ["--width", "0.03125"]
    result = tmp_path / "loader.json"
    printed(*tiny, "--data-dir", tmp_path, "--json", result, command=loader.main)
    rows = json.loads(result.read_text())["rows"]
    assert [row["network"] for row in rows] == ["convsnn x1", "spiking-resnet34 x0.03125"]
    assert all(row["loader_images_per_s"] > 0 < row["step_images_per_s"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--export-only"], "--export-only needs --graphs FOLDER, in which the graphs are left"),
        (["--side", "eager", "--side", "nosuch"], "--side 'nosuch' begins none of eager fp32, "),
    ],
)
def test_what_would_come_to_nothing_is_refused(options: list[str], message: str, module: Any) -> None:
    assert message in refused(*options, "--device", "cpu", code=2, command=module("gpu_inference").main)


@pytest.mark.parametrize("name", ["training_step", "gpu_inference"])
def test_without_a_gpu_there_is_one_line(name: str, module: Any) -> None:
    output = refused("--device", "cuda:99", command=module(name).main)
    assert output.startswith("Error: device cuda:99 is not there") and len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "file", sorted(f.stem for f in BENCHMARKS.glob("*.py") if "@click.command" in f.read_text("utf-8"))
)
def test_numbers_that_make_no_sense_are_refused_at_once(file: str, module: Any) -> None:
    if file == "serve_load":
        pytest.importorskip("prometheus_client", reason="needs tetdeploy[serve]")
    main, ranges = module(file).main, (click.IntRange, click.FloatRange, Numbers)
    options = [
        option for option in main.params if isinstance(option.type, (*ranges, type(click.INT), type(click.FLOAT)))
    ]
    assert options
    for option in options:
        assert isinstance(option.type, ranges), option.name  # or it would be measured with 0
        output = refused(option.opts[0], -1 if option.name == "workers" else 0, code=2, command=main)
        assert re.search("is not in the range|must be at least", output), option.name
        if isinstance(option.type, Numbers):
            refused(option.opts[0], "1,x", code=2, command=main)


def test_a_model_that_no_side_could_build_is_one_line(module: Any) -> None:
    output = refused("--device", "cpu", "--model", "nope", command=module("training_step").main)
    assert output.startswith("Error: unknown model 'nope'; choose one of ")


@pytest.mark.parametrize("command", ["half", "inference", "serve_load --convsnn", "gpu_inference --device cpu"])
def test_without_images_there_is_one_line(command: str, module: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder would be downloaded into, where there is a network
    name, *options = command.split()
    if name == "serve_load":
        pytest.importorskip("prometheus_client", reason="needs tetdeploy[serve]")
    output = refused(*options, "--data-dir", tmp_path / "file", code=2, command=module(name).main)
    assert len(output.splitlines()) == 1 and "name a folder with --data-dir" in output


def test_an_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("no model")
    script = [sys.executable, str(BENCHMARKS / "streams.py"), str(tmp_path / "m.onnx")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
