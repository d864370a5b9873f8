"""The training step on a GPU: layout, no waiting, CUDA graphs; and without one what can be known of them."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import refused
from run_helpers import toy_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.train import How, TrainConfig, loop, train
from tetdeploy.train.config import PRECISIONS
from tetdeploy.train.cuda_graphs import WARM_UP, Compute, Recorded, StepGraphs, check_graphs
from tetdeploy.train.device import place, tuned_convolutions
from tetdeploy.train.optimizer import build_optimizer, optimizer_tensors
from tetdeploy.train.ranks import Ranks

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")]


TRAIN, VAL = toy_images(85, 1, (3, 8, 8)), toy_images(31, 2, (3, 8, 8))  # the last batch would be odd


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    config = NetworkConfig("resnet19", 3, 3, (8, 8), width=0.125, **options)
    data: dict[str, Any] = {"mean": TRAIN.mean, "std": TRAIN.std, "class_names": TRAIN.class_names, "data": "toy"}
    return Classifier(build_network(config), config=config, **data)


def settings(**changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {"T": 2, "epochs": 3, "batch_size": 16, "optimizer": "sgd", "lr": 0.05, "ema": 0.9}
    return TrainConfig(**(plain | {"augment": "crop-flip", "cutout": 2, "clip": 1.0} | changes))


# --- without a GPU


@pytest.mark.parametrize(
    ("config", "device", "precision", "ranks", "match"),
    [
        ({}, "cpu", "fp32", Ranks(), r"the run is on cpu, and only an NVIDIA GPU has them; or pass --no-cuda-graphs"),
        ({}, "cuda", "fp16", Ranks(), "fp16 scales gradients .* use --precision bf16 or fp32"),
        ({"qat": True}, "cuda", "fp32", Ranks(), "--qat trains another network"),
        ({}, "cuda", "bf16", Ranks(1, 4), "4 processes exchange gradients within the step"),
    ],
)
def test_what_has_no_graph_is_refused(
    config: dict[str, Any], device: str, precision: str, ranks: Ranks, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_graphs(settings(**config), torch.device(device), precision, ranks)
    check_graphs(settings(), torch.device("cuda"), "bf16", Ranks())


def test_the_command_refuses_graphs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = refused("train", "--cuda-graphs", "--device", "cpu")
    assert "Error: no CUDA graph of this training step: the run is on cpu" in output
    assert "--recompute does not go with --cuda-graphs" in refused("train", "--cuda-graphs", "--recompute")


@dataclass(frozen=True)
class Replayed(Recorded):
    """What a graph does, computed: reads its own copy of the batch, and adds to gradients that it first clears."""

    compute: Any

    def replay(self, x: Tensor, labels: Tensor) -> Tensor:
        self.x.copy_(x)
        self.labels.copy_(labels)
        torch._foreach_zero_([gradient for gradient in self.gradients if gradient is not None])
        numbers: Tensor = self.compute(self.x, self.labels)
        return numbers


class StandIn(StepGraphs):
    """Records on a CPU: the first computation of a key is the one that is replayed."""

    def _record(self, compute: Compute, x: Tensor, labels: Tensor) -> Recorded:
        buffers = [*self._network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        self._network.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            compute(x, labels)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        graph: Any = None
        return Replayed(graph, x, labels, labels, self._shared_gradients(), compute)


class Shifted(nn.Module):
    """Shifts the logits of each time step by values of its own, as BN of each step does: a shorter run does not use the
    later ones."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network = network
        self.shifts = nn.ParameterList(torch.zeros(3) for _ in range(steps))

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.network(x, T) + torch.stack([*self.shifts][:T])[:, None]


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({"tit": "1:1,2:2"}, 2),
        ({"loss": "sdt", "switch_to_tet": 1}, 2),
        ({"random_T": "1:2:2", "ema": 0.0, "optimizer": "adamw", "lr": 2e-3}, 3),  # (1, 1), (1, 2), (2, 2)
    ],
)
def test_a_run_with_graphs_is_the_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], graphs: int
) -> None:
    """All but the recording itself: which graph a step takes, gradients that stay where they are."""
    made: list[StandIn] = []

    def make(network: nn.Module) -> StandIn:
        made.append(StandIn(network))
        return made[0]

    monkeypatch.setattr("tetdeploy.train.session.check_graphs", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr("tetdeploy.train.session.StepGraphs", make)
    plain, replayed, config = classifier(), classifier(), settings(device="cpu", **changes)
    for of in (plain, replayed):
        of.network = Shifted(of.network, 2)
    train(plain, TRAIN, VAL, config, tmp_path / "plain", progress=False)
    train(replayed, TRAIN, VAL, config, tmp_path / "graphs", progress=False, how=How(cuda_graphs=True))
    assert len(made[0]._graphs) == graphs
    for name, value in plain.state_dict().items():
        assert torch.equal(value, replayed.state_dict()[name]), name


class Compared(StepGraphs):
    """Steps by graphs, each computed plainly as well, from the same weights: by what share of the plain ones gradients,
    loss and right answers differ."""

    def __init__(self, graphs: StepGraphs) -> None:
        super().__init__(graphs._network)
        self._replay, self.gradients, self.numbers = graphs, list[float](), list[float]()

    def __call__(self, key: Any, compute: Compute, x: Tensor, labels: Tensor) -> Tensor:
        parameters, buffers = [*self._network.parameters()], [*self._network.buffers()]
        before, kept = [b.clone() for b in buffers], [p.grad for p in parameters]
        self._network.zero_grad(set_to_none=True)
        wanted = compute(x, labels).clone()
        plain = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        numbers = self._replay(key, compute, x, labels)
        replayed = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        self.gradients.append(((replayed - plain).norm() / plain.norm()).item())
        self.numbers.append(((numbers - wanted).norm() / wanted.norm()).item())
        return numbers


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p in ("fp32", "bf16")])
@pytest.mark.parametrize("changes", [{}, {"tit": "1:1,2:2"}, {"random_T": "1:3", "ema": 0.0}])
def test_every_step_with_graphs_is_the_step_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, changes: dict[str, Any]
) -> None:
    """Gradients of other images, labels or weights are 0.9 to 1.7 apart, those of other roundings 2e-6 in float32 and
    1e-2 in bfloat16, which move losses by 1e-7. On a GPU, whose kernels may add in another order, a spike that flips is
    allowed in three steps."""
    made: list[Compared] = []

    def make(network: nn.Module) -> Compared:
        made.append(Compared(StepGraphs(network) if device == "cuda" else StandIn(network)))
        return made[0]

    monkeypatch.setattr("tetdeploy.train.session.StepGraphs", make)
    if device == "cpu":
        monkeypatch.setattr("tetdeploy.train.session.check_graphs", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
    config = settings(device=device, precision=precision, **changes)
    train(classifier(), TRAIN, VAL, config, tmp_path, progress=False, how=How(cuda_graphs=True))
    for apart, most in ((made[0].gradients, 0.1), (made[0].numbers, 1e-3)):
        assert len(apart) == 15
        assert apart == [0] * 15 if device == "cpu" else sum(share < most for share in apart) >= 12, apart


def test_nothing_of_a_steps_autograd_graph_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that adds to a parameter's gradient keeps the stream that it was made on: one that lived on from the
    warm-up would break the recording."""
    trained, mean, step, lived = classifier(), loop.prefix_mean, loop._train_step, list[bool]()

    def marks() -> list[dict[str, Any]]:
        """Notes at those nodes, which go with them."""
        made = [p.view_as(p).grad_fn for p in trained.network.parameters()]
        return [of.next_functions[0][0].metadata for of in made if of is not None]

    def marked(*arguments: Any) -> Tensor:
        loss = mean(*arguments)
        for mark in marks():
            mark["of an earlier step"] = True
        lived.append(all(marks()))
        return loss

    def watched(*arguments: Any) -> None:
        assert not any(marks())
        step(*arguments)

    monkeypatch.setattr(loop, "prefix_mean", marked)
    monkeypatch.setattr(loop, "_train_step", watched)
    train(trained, TRAIN, VAL, settings(device="cpu", epochs=1), tmp_path, progress=False)
    assert len(lived) == 5 and all(lived)


class BrokenRecording:
    """`torch.cuda.graph` after an error in it: its end raises another, and leaves the process on its stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        torch.cuda.set_stream("of the recording")  # type: ignore[arg-type]

    def __exit__(self, *_: Any) -> None:
        raise RuntimeError("capture_end: the recording was invalidated")


def recorded_nowhere(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any], Any]:
    """`StepGraphs` without a GPU, up to a broken recording: the streams that are set, the states that generators get
    back, and the stream outside."""
    streams: list[Any] = []
    states: list[Any] = []
    outside = SimpleNamespace(wait_stream=lambda _: None)
    calls: dict[str, Any] = {"get_state": lambda: "before", "clone_state": lambda: "whole"}
    calls |= dict.fromkeys(("set_state", "graphsafe_set_state"), states.append)
    stand_ins: dict[str, Any] = {
        **dict.fromkeys(("graph_pool_handle", "CUDAGraph"), lambda: None),
        "current_device": lambda: 0,
        "default_generators": (SimpleNamespace(**calls),),
        **dict.fromkeys(("Stream", "current_stream"), lambda: outside),
        **dict.fromkeys(("device", "stream"), nullcontext),
        "set_stream": streams.append,
        "graph": BrokenRecording,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return streams, states, outside


@pytest.mark.parametrize(
    ("raised", "seen", "match"),
    [
        (
            RuntimeError("operation not permitted\nCompile with"),
            ValueError,
            r"graph \(operation not permitted\); pass --no-cuda-graphs",
        ),
        (torch.OutOfMemoryError("12 GiB too few"), torch.OutOfMemoryError, "12 GiB too few"),
    ],
)
def test_a_broken_recording_says_what_broke_it(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception], match: str
) -> None:
    streams, states, outside = recorded_nowhere(monkeypatch)
    network, passes, held = nn.Linear(1, 1), iter(range(10)), []

    def compute(x: Tensor, labels: Tensor) -> Tensor:
        loss = network(x)
        if next(passes) == WARM_UP:
            held.append(weakref.ref(loss))
            raise raised
        loss.backward()
        return x

    with pytest.raises(seen, match=match):
        StepGraphs(network)("key", compute, torch.ones(1), torch.ones(1))
    assert streams[-1] is outside and states == ["whole"]
    assert held[0]() is None


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, np.random.rand])
def test_a_step_that_draws_on_the_cpu_is_not_recorded(monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    """Each replay would do what the first draw decided, the layers that it dropped for instance."""
    _, states, _ = recorded_nowhere(monkeypatch)
    network = nn.Linear(1, 1)

    def compute(x: Tensor, labels: Tensor) -> Tensor:
        draw()
        network(x).backward()
        return x

    with pytest.raises(ValueError, match=r"draws random numbers on the CPU.* draw them on the GPU, or pass --no-cuda"):
        StepGraphs(network)("key", compute, torch.ones(1), torch.ones(1))
    assert states == ["before"]


@pytest.mark.parametrize(("model", "last"), [("resnet19", True), ("somebody.networks:make", False)])
def test_the_layout_of_somebody_elses_network_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, last: bool
) -> None:
    """It may call `view` on its activations."""
    seen: list[bool] = []
    monkeypatch.setattr(
        "tetdeploy.train.session.place", lambda network, device, *, channels_last: seen.append(channels_last)
    )
    trained = classifier()
    trained.config = replace(trained.config, model=model)
    train(trained, TRAIN, VAL, settings(device="cpu", epochs=1), tmp_path, progress=False)
    assert seen == [last]


def test_cudnn_chooses_within_a_run_only_and_multiplies_float32_as_such() -> None:
    cudnn: Any = torch.backends.cudnn
    benchmark, allowed = cudnn.benchmark, cudnn.allow_tf32
    try:
        for precision in ("tf32", "ieee"):  # by the newer setting, beside which PyTorch refuses to read the older one
            cudnn.conv.fp32_precision = precision
            with tuned_convolutions():
                assert cudnn.benchmark and cudnn.conv.fp32_precision == "ieee" and not cudnn.allow_tf32
                cudnn.benchmark = not benchmark
            assert (cudnn.benchmark, cudnn.conv.fp32_precision) == (benchmark, precision)
    finally:
        cudnn.allow_tf32 = allowed  # sets the newer ones as well


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_cut_run_goes_on_there_and_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, optimizer: str
) -> None:
    """With the same bits in the same layout; elsewhere without the moments of its updates, which on a GPU are fused."""
    before, after, step = list[dict[str, Tensor]](), list[dict[str, Tensor]](), loop._train_step

    def held(session: Any, state: Any) -> dict[str, Tensor]:
        network = session.classifier.network
        moments = {f"moments.{name}": value for name, value in optimizer_tensors(session.optimizer, network).items()}
        return {name: value.clone() for name, value in (state.weights(network) | moments).items()}

    def layout(x: Tensor) -> list[int]:
        return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]

    def watched(session: Any, state: Any, x: Tensor, labels: Tensor) -> None:
        before.append(held(session, state))
        step(session, state, x, labels)
        after.append(held(session, state))
        if len(after) == 7:  # of 5 an epoch, 3 epochs
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_train_step", watched)
    config = settings(device=device, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 2e-3)
    assert train(classifier(), TRAIN, VAL, config, tmp_path / "cut", progress=False, how=How(shards_mb=1)).interrupted
    shards = shutil.copytree(tmp_path / "cut" / "shards", tmp_path / "shards")
    train(classifier(), TRAIN, VAL, config, tmp_path / "cut", progress=False, resume=True)
    train(classifier(), TRAIN, VAL, config, tmp_path / "second", progress=False, restart_from=shards)
    assert len(after) == 7 + 8 + 8
    weights = {name: value for name, value in after[6].items() if not name.startswith("moments.")}
    for wanted, got in ((after[6], before[7]), (weights, before[15])):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(got[name], value) and layout(got[name]) == layout(value), name


# --- on a GPU


def gpu(test: Any) -> Any:
    for mark in on_gpu:
        test = mark(test)
    return test


class Layouts(TorchDispatchMode):
    """Sees whether the input and the output of each convolution are channels-last. (Hooks would switch fusion off.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            last = torch.channels_last
            self.seen.append((args[0].is_contiguous(memory_format=last), output.is_contiguous(memory_format=last)))
        return output


@gpu
def test_activations_are_channels_last() -> None:
    network = classifier()
    place(network, torch.device("cuda"), channels_last=True)
    with torch.autocast("cuda", torch.bfloat16), Layouts() as layouts:
        network(torch.from_numpy(TRAIN.x[:16]).cuda(), 2)
    inputs, outputs = zip(*layouts.seen, strict=True)
    assert len(outputs) == 20 and all(outputs)
    assert all(inputs[1:])  # of the first, images as they come


@gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_is_fused(optimizer: str) -> None:
    network = classifier().cuda()
    assert build_optimizer(network, settings(optimizer=optimizer), scaled=False).defaults["fused"]


def watching_waits(test: Any) -> Any:
    return pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")(test)


@gpu
@watching_waits
@pytest.mark.parametrize(
    "changes",
    [{}, {"random_T": "1:3"}, {"optimizer": "adamw"}, {"augment": "flip-roll"}, {"augment": "autoaugment"}],
)
def test_no_step_waits_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Every wait of the second epoch's steps is an error; in the first, kernels are loaded."""
    step = loop._train_step

    def watched(session: Any, state: Any, x: Tensor, labels: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if state.epoch == 1 else "default")
        step(session, state, x, labels)
        if state.step == session.steps_per_epoch - 1:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "_train_step", watched)
    monkeypatch.setattr("tetdeploy.train.progress.INTERVAL", 1e9)  # a look at the losses waits, twice a second
    try:
        train(classifier(), TRAIN, VAL, settings(device="cuda", **changes), tmp_path, progress=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@watching_waits
def test_a_wait_would_be_noticed() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_recording_leaves_bn_and_random_numbers_as_they_were() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).cuda()
    x, labels = torch.randn(64, 4, device="cuda"), torch.zeros(64, device="cuda")

    def compute(x: Tensor, labels: Tensor) -> Tensor:
        loss = (network(x).squeeze(1) - labels).square().mean()
        loss.backward()
        return loss.detach()

    torch.manual_seed(0)
    wanted = compute(x, labels).clone()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network[0].reset_running_stats()
    graphs = StepGraphs(network)
    for repeat in (1, 2):
        torch.manual_seed(0)
        torch.testing.assert_close(graphs("key", compute, x, labels), wanted)
        assert network[0].num_batches_tracked.item() == repeat
        for p, gradient in zip(network.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)


WAITING = """
import torch
from tetdeploy.train.cuda_graphs import StepGraphs

network, x = torch.nn.Linear(2, 1).cuda(), torch.ones(3, 2, device="cuda")

def compute(x, labels):
    loss = network(x).mean()
    loss.backward()
    return torch.tensor(loss.item(), device="cuda")

before = torch.cuda.current_stream()
torch.manual_seed(0)
wanted = torch.rand(3, device="cuda")
torch.manual_seed(0)
try:
    StepGraphs(network)("key", compute, x, x)
except ValueError as error:
    print(error)
assert torch.cuda.current_stream() == before
assert torch.equal(torch.rand(3, device="cuda"), wanted)
torch.manual_seed(1)
compute(x, x)
torch.cuda.empty_cache()  # as cuDNN does where it tries its algorithms, and as is done where memory is short
torch.backends.cudnn.benchmark = True
torch.nn.Conv2d(3, 8, 3).cuda()(torch.ones(2, 3, 8, 8, device="cuda")).mean().backward()
torch.cuda.synchronize()
"""


@gpu
def test_a_step_that_waits_cannot_be_recorded() -> None:
    """In a process of its own, as memory stays in the broken recording. Random numbers do not."""
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"cannot be recorded as a CUDA graph \(.*captur.*\); pass --no-cuda-graphs", done.stdout)
