"""The gate: what passes and what does not; the local rate sees an export's own error in a network that amplifies."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import classifier as calibrated
from export_helpers import convsnn, digits
from export_helpers import engine as exported_engine
from torch import Tensor, nn

from tetdeploy.data import load_data
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, Parity, ParityError, gate
from tetdeploy.export.comparison import Comparison
from tetdeploy.export.config import Layout
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.model import build_graph
from tetdeploy.export.parity import RoundedOtherwise, _is_at_threshold, _parity, _rounding, compare
from tetdeploy.export.recorder import compare_torch
from tetdeploy.networks import Classifier, NetworkConfig, ResNet19, build_network
from tetdeploy.neurons import LIF

GOOD = Parity(1000, 4, 1.0, (1.0,) * 4, 0.0, 0.0, 1e-6, 1e-7)


@pytest.mark.parametrize(
    "parity",
    [
        GOOD,
        replace(GOOD, spike_mismatch_rate=100e-6, top1_agreement=0.999),
        replace(GOOD, local_logit_error=1e-4),
        replace(GOOD, spike_mismatch_rate=2e-3, top1_agreement=0.99, amplified=(2e-3, 5e-4)),
        replace(GOOD, spike_mismatch_rate=2e-3, top1_agreement=0.99, amplified=(2e-3, 0.0), at_threshold=True),
    ],
)
def test_the_gate_lets_through(parity: Parity) -> None:
    parity.check("it")


@pytest.mark.parametrize(
    "parity",
    [
        replace(GOOD, spike_mismatch_rate=101e-6),
        replace(GOOD, top1_agreement=0.998),
        replace(GOOD, local_mismatch_rate=101e-6),
        replace(GOOD, local_logit_error=1.1e-4),
        replace(GOOD, spike_mismatch_rate=2e-3, amplified=(2e-3, 4.9e-4)),
        replace(GOOD, spike_mismatch_rate=2e-3, amplified=(2e-3, 1e-3), local_mismatch_rate=101e-6),
        replace(GOOD, top1_agreement=0.9, amplified=(0.0, 0.0)),
        replace(GOOD, spike_mismatch_rate=2e-3, at_threshold=True, local_mismatch_rate=101e-6),
        replace(GOOD, spike_mismatch_rate=2e-3, at_threshold=True, local_logit_error=1.1e-4),
    ],
)
def test_the_gate_refuses(parity: Parity) -> None:
    with pytest.raises(ParityError, match="nothing was written"):
        parity.check("it")


@pytest.mark.parametrize(
    ("layout", "where"),
    [("dynamic", "at T=1"), ("dynamic", "at T=4"), ("dynamic", "graph"), ("step", "from a non-zero state")],
)
def test_each_comparison_of_the_gate_may_refuse(layout: Layout, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(*args: Any, from_random_state: bool = False, **options: Any) -> Parity:
        *_, T = args
        is_bad = from_random_state if layout == "step" else where == {1: "at T=1", 4: "at T=4"}.get(T, "graph")
        return replace(GOOD, T=T, spike_mismatch_rate=1e-3 * is_bad)

    monkeypatch.setattr(gate, "compare", compared)
    engine: Any = SimpleNamespace(runtime="onnxruntime", with_state=layout == "step", chunk_T=1)
    engine.metadata, engine.overlaid = {"neurons": []}, lambda overlay: None
    with pytest.raises(ParityError, match=f"{where} does not compute"):
        gate._check_engine(convsnn(), engine, ExportConfig(layout, trained_T=4), digits().images[:2], None)


def test_the_worst_layer_is_told_and_two_spikes_make_no_rate() -> None:
    engine: Any = SimpleNamespace(metadata={"neurons": [{"shape": [n]} for n in (10, 5, 5)]})
    sums = Comparison(convsnn(), engine, 4)
    sums.logits.add(np.zeros((1, 4, 2)), np.zeros((1, 4, 2)))
    sums.local.add(np.array([[1, 0, 0, 2], [2, 0, 0, 0], [0, 0, 0, 0]])[:, :, None])
    assert _parity(sums, 4).local_mismatch_rate == 3 / (10 * 4)
    sums.local.add(np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])[:, :, None])  # of a second image
    assert _parity(sums, 4).local_mismatch_rate == 3 / (5 * 4 * 2)


def test_the_error_of_the_logits_is_the_largest_as_a_fraction_of_the_largest_logit() -> None:
    engine: Any = SimpleNamespace(metadata={"neurons": [{"shape": [1]}]})
    sums, none = Comparison(convsnn(), engine, 1), np.zeros((1, 1, 1), np.int64)
    for logit, expected in ((2.0, 4.0), (-3.0, -4.0)):
        sums.count_local(np.array([[[logit, 0.0]]]), np.array([[[expected, 0.0]]]), none)
    assert sums.local_error == 0.5


@pytest.fixture(scope="module")
def deep() -> Classifier:
    """A narrow ResNet-19 with statistics of real images and no training: it amplifies every flipped spike."""
    digits = load_data("digits", "train", data_dir=Path())
    config = NetworkConfig("resnet19", 10, 1, (8, 8), width=0.25)
    torch.manual_seed(0)
    network = build_network(config)
    assert isinstance(network, ResNet19)
    nn.init.normal_(network.fc1[2].weight, 0.0, 0.5)  # no BN behind it: it must drive its neurons by itself
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches below
    classifier = Classifier(network, config=config, mean=digits.mean, std=digits.std, class_names=digits.class_names)
    classifier.train()
    with torch.no_grad():
        for _ in range(3):
            classifier(torch.from_numpy(digits.images[:100]), 4)
    return classifier.eval()


@pytest.fixture(scope="module")
def engine(deep: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its export."""
    path = tmp_path_factory.mktemp("parity") / "m.onnx"
    graph, *_ = build_graph(deep, ExportConfig(T=4))
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    return Engine(path)


@pytest.fixture
def changed(deep: Classifier) -> Classifier:
    """A copy, whose weights a test may change."""
    return copy.deepcopy(deep)


def test_the_local_rate_does_not_follow_flipped_spikes_and_sees_a_wrong_layer(
    engine: Engine, changed: Classifier
) -> None:
    x = load_data("digits", "train", data_dir=Path()).images[:50]
    assert compare(changed, engine, x, 4).is_local
    middle = changed.network.blocks[3].layer1[0]
    assert isinstance(middle, nn.Conv2d)
    with torch.no_grad():
        middle.weight[0].mul_(1.5)  # one channel of one layer of PyTorch's network is another now
    parity = compare(changed, engine, x, 4)
    assert parity.local_mismatch_rate > 100e-6
    assert parity.spike_mismatch_rate > 5 * parity.local_mismatch_rate  # all that comes behind follows
    with pytest.raises(ParityError):
        parity.check("it")


def test_rounding_is_measured_only_where_the_gate_would_fail(engine: Engine, changed: Classifier) -> None:
    x = load_data("digits", "train", data_dir=Path()).images[:20]
    with torch.no_grad():
        changed.network.fc2[0].weight.neg_()
    parity = compare(changed, engine, x, 4)
    assert parity.differs
    assert parity.amplified is not None
    assert parity.local_logit_error > 0.1
    assert np.isfinite(parity.max_abs_logit_error)
    with pytest.raises(ParityError):
        parity.check("it")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The images and the membranes of which PyTorch's rounding is measured: two of batches of three."""
    seen: list[Any] = []

    def rounding(classifier: Classifier, x: Any, T: int, state: Any, *_: Any) -> float:
        seen.append((x, state))
        return 0.5

    monkeypatch.setattr("tetdeploy.export.parity._rounding", rounding)
    monkeypatch.setattr("tetdeploy.export.parity._BATCH", 3)
    monkeypatch.setattr("tetdeploy.export.parity._NUM_ROUNDING", 2)
    return seen


def test_layers_are_not_run_by_themselves_where_they_have_read_the_engines_spikes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, engine = digits().images[:8], exported_engine("unrolled", T=3)
    result, outputs = engine.run_with(spikes_overlay(n["name"] for n in engine.metadata["neurons"]), x, 3)
    other = copy.deepcopy(convsnn())
    with torch.no_grad():  # of the same network some processors compute every logit alike, to the last bit
        other.network.readout[-1].bias += 0.01
    alone = Comparison(other, engine, 3)
    alone.add_local(x, result.per_step, [outputs[f"spikes.{n['name']}"] for n in engine.metadata["neurons"]])
    assert not alone.local.differing.any()
    monkeypatch.setattr(Comparison, "add_local", lambda *_: pytest.fail("they were run"))
    parity = compare(other, engine, x, 3)
    assert parity.spike_mismatch_rate == parity.local_mismatch_rate == 0
    assert parity.local_logit_error == alone.local_error > 0


def doubled() -> Classifier:
    """A copy of `convsnn` that fires more."""
    made = copy.deepcopy(convsnn())
    with torch.no_grad():
        next(p for p in made.parameters() if p.dim() == 4).mul_(2)
    return made


def test_rounding_is_measured_on_the_images_that_differ_most(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, engine, other = digits().images[:8], exported_engine("unrolled", T=3), doubled()
    parity = compare(other, engine, x, 3)
    rates = np.array([compare(other, engine, x[k : k + 1], 3).spike_mismatch_rate for k in range(8)])
    worst = np.argsort(-rates, kind="stable")[:2]
    assert worst.max() >= 3  # in a later batch
    np.testing.assert_array_equal(measured[0][0], x[worst])
    assert measured[0][1] is None
    assert parity.amplified == (pytest.approx(rates[worst].mean()), 0.5)
    monkeypatch.setattr("tetdeploy.export.parity._BATCH", 8)
    whole = compare(other, engine, x, 3)
    assert parity.spike_mismatch_rate == whole.spike_mismatch_rate == pytest.approx(rates.mean())
    assert parity.local_mismatch_rate == whole.local_mismatch_rate > 0


def test_rounding_from_random_membranes_is_measured_from_the_same(measured: list[Any]) -> None:
    x, step = digits().images[:8], exported_engine("step")
    assert compare(convsnn(), step, x, 1, from_random_state=True).spike_mismatch_rate == 0
    assert compare(doubled(), step, x, 1, from_random_state=True).amplified is not None
    ((shown, state),) = measured
    chosen = [int(np.flatnonzero((x == image).all((1, 2, 3)))[0]) for image in shown]
    assert len(chosen) == 2 and max(chosen) >= 3  # of a later batch as well
    for k, image in enumerate(chosen):
        generator = np.random.default_rng(image)
        for u, neuron in zip(state, step.metadata["neurons"], strict=True):
            made = generator.random(neuron["shape"], np.float32) * neuron["v_th"]
            np.testing.assert_array_equal(u[k], made)


@pytest.mark.usefixtures("measured")
def test_another_leak_is_seen_at_the_first_step_from_random_membranes_alone() -> None:
    x, step, other = digits().images[:8], exported_engine("step"), copy.deepcopy(convsnn())
    for module in other.modules():
        if isinstance(module, LIF):
            module.tau *= 0.5
    zero, random = (compare(other, step, x, 1, from_random_state=from_random) for from_random in (False, True))
    assert zero.spike_mismatch_rate == 0 and random.spike_mismatch_rate > 100e-6


def test_classes_near_a_tie_from_random_membranes_are_no_reason_to_measure_rounding(measured: list[Any]) -> None:
    x, step, other = digits().images[:8], exported_engine("step"), copy.deepcopy(convsnn())
    with torch.no_grad():
        other.network.get_parameter("readout.2.weight").neg_()
    parity = compare(other, step, x, 1, from_random_state=True)
    assert parity.spike_mismatch_rate == 0 and parity.top1_agreement < 0.999
    assert parity.amplified is None and measured == []


class AtTheThreshold(nn.Module):
    """Every membrane of the first step is v_th: a weight one ulp larger fires, float64 rounds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1000,), 0.5))
        self.lif, self.readout = LIF(v_th=0.5), nn.Linear(1000, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        ones = torch.ones_like(x[None, :, 0, 0, :1]).expand(T, -1, -1)
        logits: Tensor = self.readout(self.lif(ones * self.scale))
        return logits


def rounding(network: Any, *given: Any, tick: Any = None) -> float:
    return _rounding(network, *given, RoundedOtherwise(network), tick)


def test_rounding_is_the_most_that_pytorch_differs_from_itself() -> None:
    x = digits().images[:20]
    assert rounding(convsnn(), x, 4, None, math.inf) < 1e-4
    # Of numbers in -1..1 that many are above 0.5, and so make 1 + eps of 1 + eps u.
    assert rounding(calibrated(AtTheThreshold()), x, 1, None, math.inf) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("from_state", [False, True])
def test_rounding_is_the_same_in_parts(from_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, neurons = digits().images[:8], exported_engine("step").metadata["neurons"]
    generator = np.random.default_rng(0)
    state = [generator.random((8, *n["shape"]), np.float32) * n["v_th"] for n in neurons] if from_state else None

    def differing(part: int) -> list[int]:
        counts: list[int] = []

        def compared(_: Any, *given: Any) -> Any:
            logits, differ = compare_torch(doubled(), *given)
            counts.append(int(differ.sum()))
            return logits, differ

        monkeypatch.setattr("tetdeploy.export.parity._PART_OF_ROUNDING", part)
        monkeypatch.setattr("tetdeploy.export.parity.compare_torch", compared)
        rate = rounding(convsnn(), x, 2, state, 1e-9)
        assert rate == pytest.approx(sum(counts) / (8 * 2 * sum(np.prod(n["shape"]) for n in neurons)))
        return counts

    whole, parts = differing(8), differing(3)
    assert len(parts) == 3 and sum(parts) == pytest.approx(whole[0], rel=1e-3) and whole[0] > 1000


def test_rounding_is_not_measured_further_than_to_show_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def compared(*args: Any) -> Any:
        tried.append(args)
        return compare_torch(*args)

    monkeypatch.setattr("tetdeploy.export.parity.compare_torch", compared)
    x, network = digits().images[:4], calibrated(AtTheThreshold())
    found = [rounding(network, x, 1, None, enough) for enough in (0.1, 0.9)]
    assert found == [pytest.approx(0.25, abs=0.05)] * 2 and len(tried) == 1 + 4


def test_networks_that_round_otherwise_are_made_once_and_only_as_far_as_asked_for() -> None:
    network = calibrated(AtTheThreshold())
    others, weights = RoundedOtherwise(network), network.network.scale.detach()
    first = next(iter(others))
    every = list(others)
    assert every[0] is first and [other for other, _ in others] == [other for other, _ in every]
    moved = [other.network.scale.detach() - weights for other, _ in every]
    assert len(every) == len(others) == 4 and every[3][0].network.scale.dtype == torch.float64
    assert all(0 < float(by.abs().max()) <= 2**-24 for by in moved[:3]) and not torch.equal(moved[0], moved[1])
    assert not moved[3].any()


@pytest.mark.parametrize(("enough", "shown"), [(0.1, [4, 8, 20]), (0.9, [4, 8, 12, 16, 20])])
def test_how_far_the_measurement_of_rounding_is_is_told(enough: float, shown: list[int]) -> None:
    done: list[int] = []
    rounding(calibrated(AtTheThreshold()), digits().images[:4], 1, None, enough, tick=done.append)
    assert np.cumsum(done).tolist() == shown


def test_a_batch_is_as_large_as_its_spikes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    x, engine, done = digits().images[:8], exported_engine("step"), list[int]()
    size = sum(int(np.prod(n["shape"])) for n in engine.metadata["neurons"])
    monkeypatch.setattr("tetdeploy.batches._SPIKE_BYTES", 5.5 * 4 * 3 * size)
    whole = compare(convsnn(), engine, x, 3, progress=lambda _, now, __: done.append(now))
    assert done == [0, 5, 8] and whole.num_images == 8
    done.clear()
    compare(convsnn(), engine, x, 1, from_random_state=True, progress=lambda _, now, __: done.append(now))
    assert done == [0, 8]


def test_a_comparison_has_a_bar_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    x, engine = digits().images[:3], exported_engine("unrolled", T=3)
    monkeypatch.setattr(Parity, "is_rounding", False)
    monkeypatch.setattr(Parity, "is_local", True)
    compare(doubled(), engine, x, 3, progress=lambda *told_of: told.append(told_of), what="it")
    rounding, near = "it: rounding", "it: membranes"
    assert [call for call in told if call[1] == 0] == [("it", 0, 3), (rounding, 0, 15), (near, 0, 3)]
    assert {what: done for what, done, _ in told} == {"it": 3, rounding: 15, near: 3}


class Constant(nn.Module):
    """Four neurons, whose currents are the same at every step; the first is at the threshold, v_th = 0.5, or near."""

    def __init__(self, exact: bool = False, first: float = 0.5, last: float = 0.75) -> None:
        super().__init__()
        current = torch.tensor([first, 0.25, 0.125, last])
        self.current: Tensor
        if exact:
            self.register_buffer("current", current)  # nothing moves it
        else:
            self.current = nn.Parameter(current)
        self.lif, self.readout = LIF(v_th=0.5), nn.Linear(4, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.lif(self.current.expand(T, len(x), -1)))


OWN = [[0, 0, 0, 1], [1, 0, 0, 1]]  # what PyTorch fires, by step


@pytest.mark.parametrize(
    ("fired", "options", "state", "expected"),
    [
        (OWN, {}, None, False),
        ([[1, 0, 0, 1], [0, 0, 0, 1]], {}, None, True),  # reset a step earlier, the first does not fire at the second
        ([[1, 0, 0, 1], [1, 0, 0, 1]], {}, None, True),  # at which its membrane is at the threshold again
        ([[1, 0, 0, 1], [0, 0, 0, 1]], {"exact": True}, None, False),
        ([[0, 1, 0, 1], [1, 0, 0, 1]], {}, None, False),
        ([[1, 1, 0, 1], [0, 0, 0, 1]], {}, None, False),
        ([[0, 1, 0, 1], [1, 0, 0, 1]], {}, [0.0, 0.5, 0.0, 0.0], True),
        ([[1, 0, 0, 1], [0, 0, 0, 1]], {"first": 0.499995}, None, False),
        # That a membrane far away moves more, in a channel that never fires, says nothing of those near the threshold.
        ([[1, 0, 0, 0], [0, 0, 0, 0]], {"first": 0.499995, "last": -100.0}, None, False),
    ],
)
def test_what_rounding_began(
    fired: Any, options: Any, state: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, spikes = calibrated(Constant(**options)), np.array(fired, np.float32)[:, None]
    engine: Any = SimpleNamespace(metadata={"neurons": [{"name": "lif"}]})
    monkeypatch.setattr("tetdeploy.export.parity._run_engine", lambda *args: (None, [spikes]))
    u = None if state is None else [np.array([state, state], np.float32)]
    assert _is_at_threshold(net, engine, digits().images[:2], 2, u, RoundedOtherwise(net), None) is expected


@pytest.mark.parametrize(("other", "expected"), [(OWN, True), ([[0, 1, 0, 1], [1, 0, 0, 1]], False)])
@pytest.mark.parametrize("first", [False, True])
def test_every_image_says_what_rounding_began(
    other: Any, expected: bool, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, engine = [[1, 0, 0, 1], [0, 0, 0, 1]], SimpleNamespace(metadata={"neurons": [{"name": "lif"}]})
    left = [np.array(fired, np.float32)[:, None] for fired in ((other, near) if first else (near, other))]
    monkeypatch.setattr("tetdeploy.export.parity._run_engine", lambda *args: (None, [left.pop(0)]))
    net, images = calibrated(Constant()), digits().images[:2]
    assert _is_at_threshold(net, engine, images, 2, None, RoundedOtherwise(net), None) is expected  # type: ignore[arg-type]


class TwoLayers(nn.Module):
    """One whose first neuron is far enough from the threshold not to fire by rounding, and one that rounds more."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Constant(first=0.499995)
        self.coarse, self.lif = nn.Parameter(torch.full((4,), 300.0)), LIF(v_th=300.0)

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.one(x, T) + self.lif(self.coarse.expand(T, len(x), -1)).sum(-1, keepdim=True)
        return logits


def test_each_layer_is_judged_by_its_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(metadata={"neurons": [{"name": "one"}, {"name": "two"}]})
    spikes = [np.array(fired, np.float32)[:, None] for fired in ([[1, 0, 0, 1], [0, 0, 0, 1]], [[0] * 4, [1] * 4])]
    monkeypatch.setattr("tetdeploy.export.parity._run_engine", lambda *args: (None, spikes))
    net = calibrated(TwoLayers())
    x, others = digits().images[:1], RoundedOtherwise(net)
    assert not _is_at_threshold(net, engine, x, 2, None, others, None)  # type: ignore[arg-type]


def test_where_few_neurons_are_near_the_threshold_it_is_asked_whether_these_began_it(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("tetdeploy.export.parity._is_at_threshold", lambda *args: asked.append(args) or True)
    x, engine = digits().images[:8], exported_engine("unrolled", T=3)
    assert not compare(doubled(), engine, x, 3).at_threshold and asked == []  # PyTorch differs from itself as much
    monkeypatch.setattr("tetdeploy.export.parity._rounding", lambda *args: 0.0)
    assert not compare(doubled(), engine, x, 3).at_threshold and asked == []  # a layer is wrong by itself
    monkeypatch.setattr(Parity, "is_local", True)
    parity = compare(doubled(), engine, x, 3)
    assert parity.at_threshold and parity.is_rounding
    np.testing.assert_array_equal(asked[0][2], measured[0][0])
