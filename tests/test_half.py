"""Layers in float16: which, what rounds, and that the graph computes what PyTorch computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from command_helpers import printed
from export_helpers import classifier, convsnn, digits, frames, shared_traces
from torch import Tensor, nn

from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, Exported, export_model, half
from tetdeploy.export.half import HalfError, HalfNetwork, halve, placed_layers
from tetdeploy.export.kept_answers import kept_answers
from tetdeploy.export.model import build_graph
from tetdeploy.export.parity import MAX_MISMATCH, Parity, ParityError, compare
from tetdeploy.export.recorder import compare_torch, run_torch
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks import Classifier
from tetdeploy.neurons import LIF
from tetdeploy.sweep import sweep
from tetdeploy.tracing import Tracer


def export(path: Path, layout: str = "unrolled", network: Any = None, **options: Any) -> Exported:
    config = ExportConfig(layout=layout, T=3, trained_T=3, precision="fp16", target="cuda", **options)  # type: ignore[arg-type]
    images = digits().images[:90] if config.encoding == "direct" else frames(60, 5)
    labels = digits().labels[:90] if config.encoding == "direct" else None
    return export_model(network or convsnn(), path, config, images, labels=labels, num_check=90)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`convsnn` as an export, made once."""

    @cache
    def made(layout: str = "unrolled", **options: Any) -> Exported:
        with shared_traces():
            return export(tmp_path_factory.mktemp("half") / "m.onnx", layout, **options)

    return made


@pytest.mark.parametrize(
    ("layout", "options"),
    [("unrolled", {}), ("dynamic", {}), ("step", {}), ("unrolled", {"with_state": True, "encoding": "frames"})],
)
def test_every_layout_computes_what_pytorch_computes(
    small: Callable[..., Exported], layout: str, options: dict[str, Any]
) -> None:
    exported = small(layout, **options)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    metadata = Engine(exported.path).metadata
    assert (metadata["precision"], metadata["target"]) == ("fp16", "cuda")
    assert [layer["precision"] for layer in metadata["layers"]] == ["fp32", "fp16", "fp16", "fp32"]


@pytest.mark.parametrize(("layout", "options"), [("unrolled", {}), ("step", {}), ("unrolled", {"encoding": "frames"})])
def test_what_is_kept_of_float32_at_every_T(
    small: Callable[..., Exported], layout: str, options: dict[str, Any]
) -> None:
    exported = small(layout, **options)
    assert exported.int8 is None and exported.fp16 is not None
    kept = exported.fp16["kept"]
    images = frames(60, 5) if options else digits().images[:90]
    x = torch.from_numpy(images)
    with torch.no_grad():
        plain = (convsnn()(x.transpose(0, 1)) if options else convsnn()(x, 3)).numpy()
    engine = Engine(exported.path)
    assert kept["num_images"] == len(images) and kept["T"] == [1, 2, 3]
    for k, T in enumerate(kept["T"]):
        mine = engine.run(images, 3).per_step[:, :T].mean(1).argmax(-1)
        theirs = plain[:T].mean(0).argmax(-1)
        assert kept["agreement"][k] == pytest.approx((mine == theirs).mean())
        if options:
            assert "accuracy_fp16" not in kept
        else:
            labels = digits().labels[:90]
            assert kept["accuracy_fp16"][k] == pytest.approx((mine == labels).mean())
            assert kept["accuracy_fp32"][k] == pytest.approx((theirs == labels).mean())


def test_answers_that_differ_are_counted_step_by_step() -> None:
    """Two images, three steps, two classes: the mean over the steps changes its class at step 2 of the second image."""
    full = np.array([[[1, 0], [1, 0], [1, 0]], [[1, 0], [1, 0], [1, 0]]], np.float32)
    reduced = np.array([[[1, 0], [1, 0], [1, 0]], [[1, 0], [0, 3], [1, 0]]], np.float32)
    kept = kept_answers(full, reduced, "fp16", np.array([0, 1, 9]))
    assert kept == {
        "num_images": 2,
        "T": [1, 2, 3],
        "agreement": [1.0, 0.5, 0.5],
        "accuracy_fp32": [0.5, 0.5, 0.5],
        "accuracy_fp16": [0.5, 1.0, 1.0],
    }


def test_the_command_says_what_is_kept(tmp_path: Path) -> None:
    run, written = tmp_path / "run", tmp_path / "exported.json"
    export = ["export", str(run), "--precision", "fp16", "--target", "cuda", "--check", "64", "--json", str(written)]
    for arguments in (["train", "--width", "0.25", "--T", "2", "--epochs", "1", "--out", str(run)], export):
        output = printed(*arguments, "--runs", tmp_path)
    kept = json.loads(written.read_text())["fp16"]["kept"]
    assert kept["num_images"] == 64 and len(kept["agreement"]) == 2
    assert "fp16 on the 64 checked images\n" in output
    shown = [line.split() for line in output.splitlines()]
    for k, T in enumerate(kept["T"]):
        found = (kept[name][k] for name in ("agreement", "accuracy_fp16", "accuracy_fp32"))
        assert [str(T), *(f"{share:.2%}" for share in found)] in shown


def test_without_a_check_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    config = ExportConfig(T=3, trained_T=3, precision="fp16", target="cuda")
    with shared_traces():
        exported = export_model(convsnn(), tmp_path / "m.onnx", config, digits().images[:4], num_check=0)
    assert exported.fp16 == {"kept": None}


def test_weights_halve_and_operations_stay_and_cost_less(small: Callable[..., Exported]) -> None:
    exported = small()
    graph = onnx.load(exported.path).graph
    halves = [weight for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16]
    assert sorted(len(weight.dims) for weight in halves) == [1, 1, 4, 4]
    engine = Engine(exported.path, threads=1)
    measured = sweep(engine, digits().images[:40], digits().labels[:40], (3,), num_timed=1)
    row, layers = measured.rows[0], measured.details["layers"]
    bill = sum(
        layer["rows"][0]["ac_ops"] * {"fp16": 0.4, "fp32": 0.9}[layer["precision"]]
        + layer["rows"][0]["mac_ops"] * 4.6 * (layer["precision"] == "fp32")
        for layer in layers
    )
    assert row.energy_pj == pytest.approx(bill) and row.ac_ops > 0


def test_the_gate_sees_a_network_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "placed_layers", lambda module: [])
    monkeypatch.setattr("tetdeploy.export.onnx_tracer.halve", lambda module: halve(module, placed_layers(module)[1:3]))
    monkeypatch.setattr("tetdeploy.export.parity._NUM_ROUNDING", 4)  # images, each in PyTorch rounded otherwise
    with shared_traces(onnx=False), pytest.raises(ParityError, match="does not compute what PyTorch computes"):
        export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Between(nn.Module):
    """Between neurons an average of 9 spikes and two layers: their inputs would round in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)), LIF()
        self.average = nn.AvgPool2d(3, 1, 1)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.middle = OverTime(self.average, self.conv1, self.bn1, self.conv2, self.bn2)
        self.lif2, self.readout = LIF(), OverTime(nn.Flatten(), nn.Linear(1024, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.middle(self.lif1(self.encode(x, T)))))
        return logits


@cache
def between() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classifier(Between())


@cache
def between_in_half() -> HalfNetwork:
    return HalfNetwork(Tracer(between(), encoding="direct", uint8=True))


def ungated(network: Classifier, file: Path, layout: Any = "unrolled") -> Engine:
    config = ExportConfig(layout=layout, T=3, trained_T=3, precision="fp16", target="cuda")
    file.write_bytes(ir.to_proto(build_graph(network, config)[0].model).SerializeToString())
    return Engine(file, native=False, threads=1)


def beside_pytorch(written: Classifier, file: Path) -> Parity:
    """What the gate sees of `between` where the graph is that of another network."""
    return compare(between_in_half(), ungated(written, file), digits().images[:150], 3)


def test_what_a_layer_reads_rounds_no_more_than_in_onnx_runtime(tmp_path: Path) -> None:
    parity = beside_pytorch(between(), tmp_path / "m.onnx")
    parity.check("it")
    assert parity.spike_mismatch_rate < 5e-6  # where float32 rounds otherwise


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_layer_that_reads_float16_counts_in_float32(layout: str, tmp_path: Path) -> None:
    engine = ungated(between(), tmp_path / "m.onnx", layout)
    counts = engine.count(digits().images[:40], 3)[1]["active.middle.3"]
    assert np.unique(counts).tolist() == [16.0]  # no current of the layer before is 0


def _eps(network: Between) -> None:
    network.bn1.eps = 1e-3


def _bias(network: Between) -> None:
    network.conv2.bias = None


def _divisor(network: Between) -> None:
    network.average.count_include_pad = False


@pytest.mark.parametrize("fault", [_eps, _bias, _divisor])
def test_the_gate_sees_a_fault_behind_an_average_and_two_layers(
    fault: Callable[[Between], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetdeploy.export.parity._rounding", lambda *given: 0.0)  # no matter where a layer is wrong
    broken = copy.deepcopy(between())
    fault(broken.network)  # type: ignore[arg-type]
    parity = beside_pytorch(broken, tmp_path / "m.onnx")
    assert parity.local_mismatch_rate > MAX_MISMATCH
    with pytest.raises(ParityError):
        parity.check("it")


def test_rounding_the_currents_is_one_rounding_more() -> None:
    x = torch.from_numpy(digits().images[:40])
    plain = convsnn()(x, 3)
    tracer = Tracer(convsnn(), encoding="direct", uint8=True)
    made = [HalfNetwork(tracer, round_activations=rounds) for rounds in (False, True)]
    kept, rounded = (network(x, 3) for network in made)
    assert not torch.equal(kept, plain) and not torch.equal(kept, rounded)
    assert np.mean((rounded.mean(0).argmax(-1) == plain.mean(0).argmax(-1)).numpy()) > 0.9


class Linear(nn.Module):
    """A linear layer between neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 4, 3)), LIF()
        self.hidden, self.lif2 = OverTime(nn.Flatten(), nn.Linear(4 * 36, 32)), LIF()
        self.readout = OverTime(nn.Linear(32, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.hidden(self.lif1(self.encode(x, T)))))
        return logits


def test_a_linear_layer_between_neurons(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = classifier(Linear())
    module = Tracer(network, encoding="direct", uint8=True).folded(2)
    assert [(layer.name, layer.place) for layer in placed_layers(module)] == [
        ("encode.0", "first"), ("hidden.1", "inner"), ("readout.0", "readout"),
    ]  # fmt: skip
    exported = export(tmp_path / "m.onnx", network=network)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    assert [layer["precision"] for layer in Engine(exported.path).metadata["layers"]] == ["fp32", "fp16", "fp32"]


class BehindBoth(nn.Module):
    """What a layer reads is a sum of which only the second part comes from neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), LIF()
        self.conv, self.lif2 = OverTime(nn.Conv2d(4, 4, 3, padding=1)), LIF()
        self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        current = self.encode(x, T)
        logits: Tensor = self.readout(self.lif2(self.conv(current + self.lif1(current))))
        return logits


class ComputedWeights(BehindBoth):
    """A convolution whose weights lose their mean at each call."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes, weight = self.lif1(self.encode(x, T)), self.conv[0].weight
        current = nn.functional.conv2d(spikes.flatten(0, 1), weight - weight.mean(), padding=1)
        logits: Tensor = self.readout(self.lif2(self.conv(self.lif2(current.unflatten(0, spikes.shape[:2])))))
        return logits


def test_a_layer_whose_weights_are_computed_stays_in_float32() -> None:
    module = Tracer(classifier(ComputedWeights()), encoding="direct", uint8=True).folded(2)
    assert [layer.name for layer in halve(module).values()] == ["conv.0"]


def test_a_layer_lies_behind_neurons_whichever_part_of_a_sum_does() -> None:
    module = Tracer(classifier(BehindBoth()), encoding="direct", uint8=True).folded(2)
    assert [layer.place for layer in placed_layers(module)] == ["first", "inner", "readout"]


def test_what_float16_cannot_hold_or_has_no_layer_for() -> None:
    torch.manual_seed(3)
    network = classifier(Linear())
    with torch.no_grad():
        network.network.hidden[1].weight[0] = 1000.0
    with pytest.raises(HalfError, match=r"currents of hidden\.1 may reach 144\d\d\d(\.\d+)? and float16 ends at 65504"):
        halve(Tracer(network, encoding="direct", uint8=True).folded(2))
    with torch.no_grad():
        network.network.hidden[1].weight[0] = 0.0
        network.network.hidden[1].weight[0, 0] = 65519.0
        network.network.hidden[1].bias[0] = 0.0
    with pytest.raises(HalfError, match="may reach 65519 and float16 ends at 65504"):
        halve(Tracer(network, encoding="direct", uint8=True).folded(2))
    biased = classifier(BehindBoth())
    with torch.no_grad():
        biased.network.conv[0].weight[0], biased.network.conv[0].bias[0] = 0.0, -6000.0
        biased.network.conv[0].weight[0, 0, 1, 1] = 60000.0
    with pytest.raises(HalfError, match=r"currents of conv\.0 may reach 66000 and float16 ends at 65504"):
        halve(Tracer(biased, encoding="direct", uint8=True).folded(2))
    with pytest.raises(HalfError, match=r"no linear layer and no convolution.* lies between neurons"):
        halve(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_what_float16_cannot_hold_of_a_network_s_currents_is_seen_on_images(tmp_path: Path) -> None:
    network = copy.deepcopy(between())
    with torch.no_grad():
        for layer in (network.network.middle[1], network.network.middle[3]):  # type: ignore[index]
            layer.weight.mul_(300)
    with pytest.raises(HalfError, match=r"middle\.3 reads or puts out .* float16 ends at 65504; use --precision fp32"):
        export(tmp_path / "m.onnx", network=network)


def test_what_a_layer_reads_may_be_too_large_for_float16_where_its_currents_are_not() -> None:
    network = classifier(BehindBoth())
    with torch.no_grad():
        network.network.encode[0].bias.add_(70_000.0)
        network.network.conv[0].weight.mul_(1e-3)
    with pytest.raises(HalfError, match=r"conv\.0 reads or puts out 7\d\d\d\d(\.\d+)? and float16 ends at 65504"):
        check_layers(network)


class Unbiased(nn.Module):
    """A convolution with neither bias nor BN."""

    def __init__(self, padding: int | str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1))
            self.convolve = OverTime(nn.Conv2d(4, 4, 3, padding=padding, bias=False))
            self.lif1, self.lif2 = LIF(v_th=0.3), LIF(v_th=0.3)
            self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.convolve(self.lif1(self.encode(x, T)))))
        return logits


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_convolution_needs_no_bias(padding: int | str, tmp_path: Path) -> None:
    exported = export(tmp_path / "m.onnx", network=classifier(Unbiased(padding)))
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    assert [layer["precision"] for layer in Engine(exported.path).metadata["layers"]] == ["fp32", "fp16", "fp32"]


# --- a layer that computes something else


@cache
def biased(kind: str) -> Classifier:
    """Its biases decide which neurons fire."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Linear() if kind == "linear" else Unbiased(1)
        layer: Any = network.hidden[1] if isinstance(network, Linear) else network.convolve[0]
        layer.bias = nn.Parameter(torch.linspace(-0.8, 1.6, len(layer.weight)))
        return classifier(network)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_with_its_bias_a_layer_fires_as_in_float32(kind: str) -> None:
    x, half_network = digits().images[:60], HalfNetwork(Tracer(biased(kind), encoding="direct", uint8=True))
    expected = run_torch(biased(kind), x, 3)[1]
    differing = compare_torch(half_network, x, 3, expected)[1]
    assert differing.sum() <= 1e-3 * sum(spikes.size for spikes in expected)
    half_network.check_layers(torch.from_numpy(x), 3)


def check_layers(network: Classifier) -> None:
    half_network = HalfNetwork(Tracer(network, encoding="direct", uint8=True))
    half_network.check_layers(torch.from_numpy(digits().images[:2]), 3)


halve_layer = half._halve_layer


def _without_bias(module: torch.fx.GraphModule, layer: half.PlacedLayer) -> torch.fx.Node:
    layer.node.args = (*layer.node.args[:2], None, *layer.node.args[3:])
    return halve_layer(module, layer)


def _with_other_weights(module: torch.fx.GraphModule, layer: half.PlacedLayer, factor: float = 1.004) -> torch.fx.Node:
    current, (x, weight, *rest) = halve_layer(module, layer), layer.node.args
    with module.graph.inserting_before(layer.node):
        layer.node.args = (x, module.graph.call_function(torch.mul, (weight, factor)), *rest)
    return current


@pytest.mark.parametrize("fault", [_without_bias, _with_other_weights])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_gate_sees_a_layer_that_is_another_in_float16(
    kind: str, fault: Callable[..., torch.fx.Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph and PyTorch are made by the same code, and are wrong alike."""
    monkeypatch.setattr(half, "_halve_layer", fault)
    name = "hidden.1" if kind == "linear" else "convolve.0"
    with pytest.raises(HalfError, match=rf"the currents of {name} in float16 differ from those in float32 by"):
        export(tmp_path / "m.onnx", network=biased(kind))
    assert not list(tmp_path.iterdir())


def test_the_gate_sees_what_is_no_number() -> None:
    network = copy.deepcopy(biased("convolution"))
    with torch.no_grad():
        network.network.convolve[0].weight[2, 0, 1, 1] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(HalfError, match=r"currents of convolve\.0 in float16 differ .*, where rounding makes nan at"):
        check_layers(network)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_gate_lets_through_what_rounding_makes_and_no_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no sum cancels a current is its own reach, and weights 0.15 % larger are more than the rounding of each."""
    network = copy.deepcopy(biased(kind))
    layer: Any = network.network.hidden[1] if kind == "linear" else network.network.convolve[0]  # type: ignore[index,union-attr]
    with torch.no_grad():
        layer.weight.abs_()
        layer.bias.zero_()
    check_layers(network)
    monkeypatch.setattr(half, "_halve_layer", partial(_with_other_weights, factor=1.0015))
    with pytest.raises(HalfError, match="differ from those in float32"):
        check_layers(network)


def _without_most_channels(module: torch.fx.GraphModule, layer: half.PlacedLayer, axes: int = 3) -> torch.fx.Node:
    current, (x, weight, *rest) = halve_layer(module, layer), layer.node.args
    first = (torch.arange(4) == 0).view(4, *[1] * axes).half()
    module.register_buffer("first_channel", first)
    with module.graph.inserting_before(layer.node):
        kept = module.graph.call_function(torch.mul, (weight, module.graph.get_attr("first_channel")))
        layer.node.args = (x, kept, *rest)
    return current


def uneven(rest: float) -> Classifier:
    """Its first channel has by far the largest weights, the others `rest` times theirs."""
    network = copy.deepcopy(biased("convolution"))
    layer: Any = network.network.convolve[0]  # type: ignore[index,union-attr]
    with torch.no_grad():
        layer.weight[0].fill_(1000.0)
        for value in (layer.weight, layer.bias):
            value[1:] *= rest
    return network


@pytest.mark.parametrize("rest", [1.0, 3e-6])
def test_the_gate_compares_each_channel_by_itself(rest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to weights that are a few times the smallest numbers of float16."""
    monkeypatch.setattr(half, "_halve_layer", _without_most_channels)
    with pytest.raises(HalfError, match=r"convolve\.0 in float16 differ .* in channel [123], where"):
        check_layers(uneven(rest))


class OfTokens(nn.Module):
    """A linear layer of tokens, `[T, N, L, C]`, whose first channel has by far the largest weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1))
            self.hidden, self.readout = nn.Linear(4, 4), OverTime(nn.Flatten(), nn.Linear(256, 10))
        self.lif1, self.lif2 = LIF(v_th=0.3), LIF(v_th=0.3)
        with torch.no_grad():
            self.hidden.weight[0] = 1000.0

    def forward(self, x: Tensor, T: int) -> Tensor:
        tokens = self.lif1(self.encode(x, T)).flatten(3).mT
        logits: Tensor = self.readout(self.lif2(self.hidden(tokens)))
        return logits


def test_the_gate_compares_each_feature_of_tokens_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    check_layers(classifier(OfTokens()))
    monkeypatch.setattr(half, "_halve_layer", partial(_without_most_channels, axes=1))
    with pytest.raises(HalfError, match=r"hidden in float16 differ .* in channel [123], where"):
        check_layers(classifier(OfTokens()))


def test_channels_that_hardly_count_may_round_to_the_smallest_numbers() -> None:
    check_layers(uneven(1e-6))


def test_weights_that_vanish_in_float16_are_refused(tmp_path: Path) -> None:
    network = copy.deepcopy(biased("convolution"))
    with torch.no_grad():
        for value in (network.network.convolve[0].weight, network.network.convolve[0].bias):  # type: ignore[index,union-attr]
            value.mul_(1e-8)
    network.network.lif2.v_th = 1e-9  # type: ignore[union-attr]
    match = r"^the weights of convolve\.0, \S+e-09 at most, are too small for float16, .* use --precision fp32$"
    with pytest.raises(HalfError, match=match):
        export(tmp_path / "m.onnx", network=network)
