"""What the exporter says of a graph's layers: binary or not, computed once or not; and what else the graph adds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_helpers import classifier, convsnn, digits, engine, shared_traces, unchecked
from onnx import TensorProto, helper
from torch import Tensor, nn

from tetdeploy.energy import Layer, layers_of, other_ops
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, counters, export_model, operations
from tetdeploy.export.audit import CountError, _operations, _Read, audit
from tetdeploy.export.binary_values import BinaryValues
from tetdeploy.export.config import Layout
from tetdeploy.export.counters import counting_overlay
from tetdeploy.export.model import build_graph
from tetdeploy.export.neuron_steps import Neurons
from tetdeploy.export.operations import Layers
from tetdeploy.export.step_order import BATCH, StepOrder
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import Classifier
from tetdeploy.networks.blocks import ResidualBlock
from tetdeploy.networks.sew_resnet34 import SEWBlock
from tetdeploy.neurons import IF, LIF

# ------------------------------------------------------------------------------------------- binary or not

HALF = 0.5


def padded(spikes: Tensor, mode: str) -> Tensor:
    """What a padding puts to the left and on top, and the rest without its right and lowest values."""
    return nn.functional.pad(spikes.flatten(0, 1), (1, 0, 1, 0), mode)[..., :-1, :-1].reshape(spikes.shape)


def twice_as_large(spikes: Tensor, mode: str) -> Tensor:
    """The upper left quarter of it."""
    large = nn.functional.interpolate(spikes.flatten(0, 1), scale_factor=2, mode=mode)
    return large[..., :8, :8].reshape(spikes.shape)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda a, b: a,
    "dropout": lambda a, b: nn.functional.dropout(a, training=False),
    "views": lambda a, b: a.transpose(2, 3).flip(2).reshape(a.shape),
    "max_pool": lambda a, b: nn.functional.max_pool2d(a.flatten(0, 1), 3, 1, 1).unflatten(0, a.shape[:2]),
    "zero_pad": lambda a, b: nn.functional.pad(a, (1, 0))[..., :-1],
    "reflect": lambda a, b: padded(a, "reflect"),
    "replicate": lambda a, b: padded(a, "replicate"),
    "circular": lambda a, b: padded(a, "circular"),
    "upsample": lambda a, b: twice_as_large(a, "nearest"),
    "concat": lambda a, b: torch.cat([a[..., :4], b[..., 4:]], -1),
    "both": lambda a, b: a * b,
    "first_only": lambda a, b: (1 - a) * b,
    "either": lambda a, b: (a + b).clamp(0, 1),
    "sum_less_product": lambda a, b: a + b - b * a,
    "maximum": lambda a, b: torch.maximum(a, b),
    "where": lambda a, b: torch.where(a > HALF, b, torch.zeros_like(b)),
    "compared": lambda a, b: (a * 0.3 + b > HALF).float(),
    "mask": lambda a, b: a * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
}
NOT_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "scaled": lambda a, b: a * 0.7,
    "average_pool": lambda a, b: nn.functional.avg_pool2d(a.flatten(0, 1), 3, 1, 1).unflatten(0, a.shape[:2]),
    "concat_of_a_sum": lambda a, b: torch.cat([a[..., :4], (a + b)[..., 4:]], -1),
    "clip_at_two": lambda a, b: (a + b + a).clamp(0, 2),
    "clip_of_fractions": lambda a, b: (a * 0.7 + b).clamp(0, 1),
    "clip_from_half": lambda a, b: a.clamp(HALF, 1.0),
    "upsample_bilinear": lambda a, b: twice_as_large(a, "bilinear"),
    "pad_with_half": lambda a, b: nn.functional.pad(a, (1, 0), value=HALF)[..., :-1],
    "negative": lambda a, b: a * -1,
    "where_half": lambda a, b: torch.where(a > HALF, b, torch.full_like(b, HALF)),
    "sum_less_another_product": lambda a, b: a + b - a * (1 - b),
    "sum_of_sums_less_product": lambda a, b: (a + a) + b - (a + a) * b,
    "one_minus_twice": lambda a, b: 2 - a,
}
HEADS = BINARY | NOT_BINARY


class Heads(nn.Module):
    """A linear layer behind every function of two layers' spikes, `[T, N, 1, 8, 8]` each."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.encode = DirectEncoding(nn.Conv2d(1, 1, 3, padding=1), tdBN(1, v_th=0.7))
            self.layer2 = OverTime(nn.Conv2d(1, 1, 3, padding=1), tdBN(1, v_th=0.7))
            self.heads = nn.ModuleDict({name: nn.Linear(8, 2) for name in HEADS})
            self.readout = nn.Linear(len(HEADS) * 16, 10)
        self.lif1, self.lif2 = LIF(v_th=0.5), LIF(v_th=0.5)

    def forward(self, x: Tensor, T: int) -> Tensor:
        a = self.lif1(self.encode(x, T))
        b = self.lif2(self.layer2(a))
        read = [self.heads[name](function(a, b)).flatten(2) for name, function in HEADS.items()]
        return self.readout(torch.cat(read, -1))


@cache
def heads() -> Classifier:
    return classifier(Heads())


@pytest.mark.parametrize("fold_bn", [True, False])
def test_which_inputs_are_binary(fold_bn: bool, tmp_path: Path) -> None:
    net, x = heads(), digits().images[:40]
    with shared_traces():
        runner = unchecked(net, tmp_path / "m.onnx", ExportConfig(T=3, fold_bn=fold_bn))
    said = {layer.name.removeprefix("heads."): layer.binary for layer in layers_of(runner.metadata)}
    seen: dict[str, bool] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: bool(((inputs[0] == 0) | (inputs[0] == 1)).all())})

    hooks = [net.network.heads[name].register_forward_hook(watch(name)) for name in HEADS]
    with torch.no_grad():
        net(torch.from_numpy(x), 3)
    for hook in hooks:
        hook.remove()
    assert seen == {name: name in BINARY for name in HEADS}
    assert {name: said[name] for name in HEADS} == seen
    assert runner.metadata["uncounted"] == []


def test_what_operations_make_of_spikes_and_of_their_sums() -> None:
    def constant(*numbers: float) -> ir.Value:
        return ir.Value(name=str(numbers), const_value=ir.tensor(np.array(numbers, np.float32)))

    zero, one, half, unknown = constant(0), constant(1), constant(0.5), ir.Value(name="unknown")
    s = ir.Value(name="s")
    known, add = BinaryValues([s]), ir.node("Add", [s, s])
    assert known.is_binary(constant(0, 1)) and not known.is_binary(constant(0, 2)) and not known.is_binary(constant())
    known.propagate(add)
    (total,) = add.outputs  # 0, 1 or 2
    stay = ("Relu", "Abs", "MaxPool", "ReduceMax", "ReduceMin", "Transpose")
    change = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "CumSum", "Neg", "Softmax")
    binary: list[tuple[str, list[ir.Value | None]]] = [
        *((kind, [s]) for kind in (*stay, "Pad")),
        ("Sign", [total]),
        *[("Max", [s, s]), ("Min", [total, s]), ("Mul", [s, s]), ("Mul", [s, constant(0, 1)]), ("Sub", [one, s])],
        *[("Clip", [total, zero, one]), ("QuantizeLinear", [s, one, zero])],
    ]
    other: list[tuple[str, list[ir.Value | None]]] = [
        *((kind, [total]) for kind in stay),
        *((kind, [s]) for kind in change),
        ("Sign", [unknown]),
        *[("Max", [s, total]), ("Max", [s, half]), ("Sum", [s, s]), ("Div", [s, total])],
        *[("Concat", [s, total]), ("Concat", [s, unknown]), ("Where", [None, s, total]), ("Where", [None, total, s])],
        *[("Mul", [total, s]), ("Mul", [s, constant(0, 2)]), ("Mul", [s, constant(-1)])],
        *[("Sub", [one, total]), ("Sub", [s, one]), ("Sub", [constant(1, 2), s])],
        *[("Clip", [total, zero]), ("Clip", [s, half, one]), ("Clip", [unknown, zero, one])],
        *[("QuantizeLinear", [s, half]), ("QuantizeLinear", [s, one, one]), ("Pad", [s, None, half])],
    ]
    modes = {("Pad", mode): True for mode in ("reflect", "edge", "wrap")}
    modes |= {("Resize", "nearest"): True, ("Resize", "linear"): False, ("Resize", "cubic"): False}
    cases = [(ir.node(kind, inputs), True) for kind, inputs in binary]
    cases += [(ir.node(kind, inputs), False) for kind, inputs in other]
    cases += [(ir.node(kind, [s], {"mode": mode}), wanted) for (kind, mode), wanted in modes.items()]
    for node, wanted in cases:
        known.propagate(node)
        assert known.is_binary(node.outputs[0]) == wanted, node


# ------------------------------------------------------------------------------------------- once or at every step


@pytest.mark.parametrize("options", [
    {"layout": "unrolled", "T": 4},
    {"layout": "unrolled", "T": 3, "with_state": True},
    {"layout": "dynamic"},
    {"layout": "step"},
    {"layout": "unrolled", "T": 4, "encoding": "frames"},
    {"layout": "dynamic", "encoding": "frames"},
    {"layout": "step", "encoding": "frames"},
])  # fmt: skip
def test_only_a_constant_images_first_layer_is_computed_once(options: dict[str, Any]) -> None:
    layers = layers_of(engine(**options).metadata)
    assert [layer.once for layer in layers] == [options.get("encoding") != "frames", False, False, False]


class TwoFirstLayers(nn.Module):
    """Two linear layers before the first neurons, behind a view whose shape has the batch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.readout = nn.Linear(64, 9, bias=False), nn.Linear(9, 8), nn.Linear(8, 10)
        self.lif = LIF(v_th=0.1)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.second(self.first(x.flatten(1)))
        return self.readout(self.lif(current.unsqueeze(0).expand(T, *current.shape)))


@pytest.mark.parametrize("fold_bn", [True, False])
def test_all_layers_before_the_neurons_are_computed_once(fold_bn: bool, tmp_path: Path) -> None:
    config = ExportConfig(layout="dynamic", fold_bn=fold_bn)
    runner = unchecked(TwoFirstLayers(), tmp_path / "m.onnx", config)
    layers = layers_of(runner.metadata)
    assert [(layer.from_input, layer.once) for layer in layers] == [(True, True), (True, True), (False, False)]
    assert runner.metadata["uncounted"] == []
    assert runner.metadata["other_ops"]["bias_adds"] == {"second": 8, "readout": 10}


class EncodesEveryStep(nn.Module):
    """The image is repeated before the first layer, which so runs at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.readout, self.lif = OverTime(nn.Conv2d(1, 2, 3)), nn.Linear(72, 10), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.lif(self.encode(x.unsqueeze(0).expand(T, *x.shape))).flatten(2))


@pytest.mark.parametrize(("layout", "once"), [("unrolled", False), ("dynamic", False), ("step", True)])
def test_a_first_layer_that_runs_at_every_step_says_so(layout: str, once: bool, tmp_path: Path) -> None:
    """The step layout puts whatever depends on the image alone behind its `encode` input: there it is once."""
    config = ExportConfig(layout=layout, T=3)  # type: ignore[arg-type]
    first, _ = layers_of(unchecked(EncodesEveryStep(), tmp_path / "m.onnx", config).metadata)
    assert (first.name, first.from_input, first.once) == ("encode.0", True, once)


REPEATED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "to_steps_first": lambda x, T: x.repeat(T, 1, 1, 1),
    "to_batch_first": lambda x, T: x.unsqueeze(1).repeat(1, T, 1, 1, 1).flatten(0, 1),  # as the authors do
    "by_a_view": lambda x, T: x.unsqueeze(1).expand(-1, T, -1, -1, -1).flatten(0, 1),
    "flat": lambda x, T: x.flatten(1).unsqueeze(1).repeat(1, T, 1),
    "flat_by_a_view": lambda x, T: x.flatten(1).unsqueeze(1).expand(-1, T, -1),
    "by_concat": lambda x, T: torch.cat([x] * T),
}


class RepeatsTheImage(nn.Module):
    """The image is repeated within the batch, before each of the first layers."""

    def __init__(self, *repeated: str) -> None:
        super().__init__()
        first = {name: nn.Linear(64, 72) if "flat" in name else nn.Conv2d(1, 2, 3) for name in repeated}
        self.first, self.readout, self.lif = nn.ModuleDict(first), nn.Linear(72 * len(first), 10), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        currents = []
        for name, layer in self.first.items():
            current = layer(REPEATED[name](x, T))
            if "flat" in name:
                current = current.transpose(0, 1)
            elif name in ("to_batch_first", "by_a_view"):
                current = current.unflatten(0, (x.shape[0], T)).transpose(0, 1)
            else:
                current = current.unflatten(0, (T, x.shape[0]))
            currents.append(current.flatten(2))
        return self.readout(self.lif(torch.cat(currents, -1)))


@pytest.mark.parametrize("options", [{"T": 3}, {"T": 3, "with_state": True}, {"layout": "step"}, {"layout": "dynamic"}])
def test_an_image_repeated_within_the_batch_counts_once_a_step(options: dict[str, Any], tmp_path: Path) -> None:
    names = [name for name in REPEATED if (name, options) != ("by_concat", {"layout": "dynamic"})]
    metadata = unchecked(RepeatsTheImage(*names), tmp_path / "m.onnx", ExportConfig(**options)).metadata
    once = options.get("layout") == "step"
    found = {layer.name: (layer.positions, layer.once) for layer in layers_of(metadata)}
    assert found == {f"first.{name}": (1, once) for name in names} | {"readout": (1, False)}
    assert metadata["other_ops"]["bias_adds"] == {f"first.{name}": 72 for name in names} | {"readout": 10}
    assert metadata["uncounted"] == []


class BehindChannels(nn.Module):
    """Three-dimensional convolutions, of which none goes from one step to another, on `[N, C, T, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv3d(c, 2, (1, 3, 3), padding=(0, 1, 1)) for c in (1, 2))
        self.readout, self.lif = nn.Linear(128, 10), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.first(x.unsqueeze(2).expand(-1, -1, T, -1, -1)).permute(2, 0, 1, 3, 4))
        spikes = self.lif(self.second(spikes.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4))
        return self.readout(spikes.flatten(2))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_layers_whose_steps_lie_behind_the_channels_are_named(layout: Layout, tmp_path: Path) -> None:
    metadata = unchecked(BehindChannels(), tmp_path / "m.onnx", ExportConfig(T=3, layout=layout)).metadata
    uncounted = [] if layout == "step" else ["first", "second"]
    assert metadata["uncounted"] == uncounted
    assert {layer["name"] for layer in metadata["layers"]} == {"first", "second", "readout"} - {*uncounted}
    assert metadata["other_ops"]["bias_adds"] == {"first": 128, "second": 128, "readout": 10}


class AsManyAsSteps(nn.Module):
    """Three channels of one, and three parts of the image side by side in the batch: no repetition over three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.colours, self.parts = nn.Conv2d(3, 2, 3), nn.Conv2d(1, 2, 3)
        self.readout, self.lif = nn.Linear(108, 10), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        parts = self.parts(torch.cat([x[..., k : k + 3] for k in (0, 2, 4)])).unflatten(0, (3, -1)).transpose(0, 1)
        current = torch.cat([self.colours(x.repeat(1, 3, 1, 1)).flatten(1), parts.flatten(1)], 1)
        return self.readout(self.lif(current.expand(T, *current.shape)))


def test_copies_that_are_no_steps_are_all_counted(tmp_path: Path) -> None:
    metadata = unchecked(AsManyAsSteps(), tmp_path / "m.onnx", ExportConfig(T=3)).metadata
    found = {layer.name: (layer.input_shape, layer.positions, layer.once) for layer in layers_of(metadata)}
    assert found == {
        "colours": ((3, 8, 8), 1, True),
        "parts": ((1, 8, 3), 3, True),
        "readout": ((108,), 1, False),
    }


class Tokens(nn.Module):
    """As many tokens as steps, which a linear layer reads as `[tokens, N, features]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.readout, self.lif = nn.Linear(16, 16), nn.Linear(64, 10), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.embed(x.reshape(-1, 4, 16).transpose(0, 1)).transpose(0, 1)
        return self.readout(self.lif(current.expand(T, *current.shape)).flatten(2))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_as_many_tokens_as_steps_are_no_steps(layout: Layout, tmp_path: Path) -> None:
    metadata = unchecked(Tokens(), tmp_path / "m.onnx", ExportConfig(T=4, layout=layout)).metadata
    assert [(layer.name, layer.positions) for layer in layers_of(metadata)] == [("embed", 4), ("readout", 1)]
    assert metadata["other_ops"]["bias_adds"] == {"embed": 64, "readout": 10}


# ------------------------------------------------------------------------------------------- beside PyTorch's layers


class Means(nn.Module):
    """A readout of means of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3)), LIF(v_th=0.3)
        self.readout = OverTime(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif(self.encode(x, T)))
        return logits


class Gated(Means):
    """One neuron an image, whose spike lets the others through."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        gate = self.lif(0.8 * spikes.mean((2, 3, 4)))
        logits: Tensor = self.readout(spikes * gate[..., None, None, None])
        return logits


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_one_neuron_an_image_is_counted_by_image_and_step(layout: Layout, tmp_path: Path) -> None:
    config = ExportConfig(T=3, layout=layout)
    export_model(classifier(Gated()), tmp_path / "m.onnx", config, digits().images[:20], num_check=20)
    gate = Engine(tmp_path / "m.onnx").count(digits().x[:20], 3)[1]["fired.lif#2"]
    assert gate.shape == (3, 20) and 0 < gate.mean() < 1


class Unusual(nn.Module):
    """Layers whose calls and inputs are not what modules say: one under two names, one that two BN
    follow, one called by keyword, zeros round the input of one without padding, one that pads with what it reads,
    currents that one side has at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), LIF(v_th=0.3)
        self.first = self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.forked, self.left, self.right = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.circular = nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular")
        self.padded = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding="valid"))
        self.gate, self.gated, self.readout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(256, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        merged = spikes.flatten(0, 1)
        forked = self.forked(merged)
        current = self.left(forked) + self.right(forked).relu() + self.first(input=merged)
        current = current + self.padded(merged) + self.circular(merged)
        spikes = self.lif(current.view_as(spikes))
        gates = torch.sigmoid(300 * self.gate(spikes))  # ONNX Runtime's is 0 where PyTorch's is 1e-8
        spikes = self.lif(self.again(spikes.flatten(0, 1)).view_as(spikes) + self.gated(gates))
        return self.readout(spikes.flatten(2))


def test_what_a_graph_counts_otherwise_with_reason_is_written(tmp_path: Path) -> None:
    export_model(classifier(Unusual()), tmp_path / "m.onnx", ExportConfig(), digits().images[:20], num_check=20)


class ZerosAround(nn.Module):
    """Zeros round the image and round spikes that are no convolution's own padding; a cut on one side, and ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(1, 4, 3, padding=1)), LIF(v_th=0.3)
        self.conv = OverTime(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3), tdBN(4))
        self.cropped = OverTime(nn.ZeroPad2d((-1, 1, 0, 0)), nn.Conv2d(4, 4, 3), tdBN(4))
        self.ones = OverTime(nn.ConstantPad2d(1, 1.0), nn.Conv2d(4, 4, 3), tdBN(4))
        self.readout = nn.LazyLinear(10)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        for layer in (self.conv, self.cropped, self.ones):
            spikes = self.lif(layer(spikes))
        logits: Tensor = self.readout(spikes.flatten(2))
        return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"fold_bn": False}, {"layout": "dynamic"}, {"precision": "int8"}, {"precision": "fp16", "target": "cuda"}],
)
def test_zeros_that_a_network_puts_round_values_do_not_count(options: dict[str, Any], tmp_path: Path) -> None:
    net, x = ZerosAround(), digits().images[:40]
    net(torch.zeros(1, 1, 8, 8), 1)  # sizes the readout
    config = ExportConfig(T=2, **options)
    calibration = (x, None) if config.precision == "int8" else None
    export_model(classifier(net), tmp_path / "m.onnx", config, x, num_check=20, calibration=calibration)
    engine = Engine(tmp_path / "m.onnx")
    shapes = {layer.name: (layer.input_shape, layer.pads, layer.dense_ops()) for layer in layers_of(engine.metadata)}
    # A kernel of three meets each value of an axis three times, but the outermost behind a single zero two times.
    assert shapes["encode.1"] == ((1, 8, 8), ((3, 2), (1, 2)), 4 * 24 * 23)
    assert shapes["conv.1"] == ((4, 11, 9), ((1, 1), (1, 1)), 16 * 31 * 25)
    assert shapes["cropped.1"][:2] == ((4, 11, 9), ((0, 0), (0, 0)))
    assert shapes["ones.1"][:2] == ((4, 11, 9), ((0, 0), (0, 0)))
    counts = engine.count(x, 2)[1]
    assert counts["active.conv.1"].shape == (2, 40, 11, 9) and counts["active.conv.1"].sum() > 0


def test_counts_are_compared_where_each_layer_reads_the_engine_s_spikes() -> None:
    other = copy.deepcopy(convsnn())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    audit(other, engine("unrolled", T=4), digits().x[:4], 4)


def test_inputs_that_may_round_to_zero_may_count_or_not() -> None:
    read = _Read()
    read.add(nn.Linear(4, 2), torch.tensor([[-1.0, 1e-4, 1e-9, 0.0]]))
    assert (read.dense, read.active, read.binary) == (4 * 2, (2 * 2, 3 * 2), False)
    # 9 positions of 6 channels, each of 9 taps on 2 channels.
    assert _operations(nn.Conv2d(4, 6, 3, groups=2), torch.ones(1, 4, 5, 5)) == 9 * 6 * 9 * 2


@cache
def means() -> Classifier:
    return classifier(Means())


def refused(folder: Path, match: str, net: Classifier | None = None) -> None:
    with shared_traces(), pytest.raises(CountError, match=match):
        export_model(net or convsnn(), folder / "m.onnx", ExportConfig(), digits().images[:20], num_check=20)
    assert list(folder.iterdir()) == []


def test_a_graph_that_says_another_size_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = operations._convolution
    monkeypatch.setattr(operations, "_convolution", lambda *args: replace(convolution(*args), outputs=1))  # type: ignore[type-var]
    refused(
        tmp_path, r"layer '.*', operations in a step if every input counts: the graph counts .*, PyTorch .*; energies"
    )


def test_a_graph_that_counts_twice_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_inputs = counters._count_inputs

    def twice(graph: onnx.GraphProto, layer: Layer, read: list[str], T: int | str | None) -> None:
        graph.node.append(helper.make_node("Add", [read[0], read[0]], [f"{layer.name}.twice"]))
        count_inputs(graph, replace(layer, binary=True), [f"{layer.name}.twice"], T)

    monkeypatch.setattr(counters, "_count_inputs", twice)
    refused(tmp_path, r"operations in 4 steps of inputs that are not 0: the graph counts .*, PyTorch")


def test_a_graph_that_counts_too_many_currents_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_inputs = counters._count_inputs

    def one_percent_more(graph: onnx.GraphProto, layer: Layer, read: list[str], T: int | str | None) -> None:
        count_inputs(graph, layer, read, T)
        if layer.name == "readout.2":  # which reads means
            graph.node[-1].output[0] = "right"
            graph.initializer.append(helper.make_tensor("factor", TensorProto.FLOAT, [], [1.01]))
            graph.node.append(helper.make_node("Mul", ["right", "factor"], [layer.counter]))

    monkeypatch.setattr(counters, "_count_inputs", one_percent_more)
    refused(tmp_path, r"'readout.2', operations in 4 steps of inputs that are not 0: the graph", means())


def test_a_graph_that_takes_means_for_spikes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layers._layer
    monkeypatch.setattr(Layers, "_layer", lambda *args: replace(layer(*args), binary=True))  # type: ignore[type-var]
    monkeypatch.setattr(counters, "_count_inputs", partial(_count_any_inputs, counters._count_inputs))
    refused(tmp_path, r"layer 'readout.2', which is said to read spikes alone, reads other", means())


def after(order: StepOrder, op: str, given: list[ir.Value], *shape: Any, **attributes: Any) -> ir.Value:
    node = ir.node(op, given, attributes)
    node.outputs[0].shape = ir.Shape(shape)
    order.propagate(node)
    return node.outputs[0]


def test_where_the_steps_are_lost_and_found() -> None:
    spikes = ir.Value(shape=ir.Shape((3, "batch", 8)), type=ir.TensorType(ir.DataType.FLOAT))
    order = StepOrder([spikes], 3)
    repeated = after(order, "Tile", [spikes], 6, "batch", 8)
    mixed = after(order, "Add", [spikes, after(order, "Slice", [repeated], 3, "batch", 8)], 3, "batch", 8)
    assert order.left_of_steps(repeated) is None
    assert order.left_of_steps(mixed) is None
    steps = [after(order, "Slice", [spikes], 1, "batch", 8) for _ in range(3)]
    assert order.left_of_steps(after(order, "Concat", steps[:2], 2, "batch", 8, axis=0)) == 0  # some of them
    assert order.left_of_steps(after(order, "Concat", steps, 3, "batch", 8, axis=0)) == 1
    first = after(order, "Expand", steps[:1], 3, "batch", 8)
    assert order.left_of_steps(after(order, "Concat", [first, first], 3, "batch", 16, axis=2)) == 0
    assert order.left_of_steps(after(order, "Concat", steps, 3, "batch", 8, axis=-3)) == 1
    assert order.left_of_steps(after(order, "Add", [spikes, steps[0]], 3, "batch", 8)) == 1


def test_where_the_steps_are_kept_and_moved() -> None:
    spikes, flat = (ir.Value(shape=ir.Shape((3, "batch", *features))) for features in ((8,), ()))
    order = StepOrder([spikes, flat], 3)
    unsqueezed = after(order, "Unsqueeze", [spikes], 1, 3, "batch", 8)
    assert order.left_of_steps(unsqueezed) == 1
    assert order.left_of_steps(after(order, "Squeeze", [unsqueezed], 3, "batch", 8)) == 1
    assert order.left_of_steps(after(order, "Reshape", [spikes], "3*batch", 8)) == 1
    assert order.left_of_steps(after(order, "Flatten", [spikes], "3*batch", 8)) == 1
    assert order.left_of_steps(after(order, "Transpose", [flat], "batch", 3)) == BATCH  # without perm, in reverse


def test_what_is_gathered_along_the_steps_or_to_axes_of_unknown_size() -> None:
    spikes = ir.Value(shape=ir.Shape((3, "batch", 8)))
    order, some = StepOrder([spikes], 3), ir.SymbolicDim(None)
    cut = after(order, "Gather", [spikes], 3, "batch", 2, some, axis=2)
    assert order.left_of_steps(cut) == 1
    assert order.left_of_steps(after(order, "Transpose", [cut], 3, "batch", some, 2, perm=[0, 1, 3, 2])) == 1
    swapped = after(order, "Transpose", [cut], "batch", 3, 2, some, perm=[1, 0, 2, 3])
    assert order.left_of_steps(swapped) == BATCH
    assert order.left_of_steps(after(order, "Gather", [swapped], some, 3, 2, some, axis=0)) is None  # some images
    behind = after(order, "Transpose", [cut], some, 3, "batch", 2, perm=[3, 0, 1, 2])
    assert order.left_of_steps(behind) not in (0, 1, BATCH)
    assert order.left_of_steps(after(order, "Transpose", [behind], 3, "batch", 2, some, perm=[1, 2, 3, 0])) == 1
    for taken in ((some, "batch", 8), (3, 2, "batch", 8), (3, some, "batch", 8)):
        of_steps = after(order, "Gather", [spikes], *taken, axis=0)
        assert order.left_of_steps(of_steps) == 0, taken
        assert order.left_of_steps(after(order, "Concat", [of_steps] * 2, some, *taken[1:], axis=0)) == 0
    squares = ir.Value(shape=ir.Shape((3, 3, "batch")))
    order = StepOrder([squares], 3)
    assert order.left_of_steps(after(order, "Gather", [squares], 3, "batch", axis=0)) == 0  # of one step
    assert order.left_of_steps(after(order, "Gather", [squares], 3, "batch", axis=-3)) == 0
    assert order.left_of_steps(after(order, "Gather", [squares], 3, "batch", axis=1)) == 1


def test_queries_that_were_in_front_of_the_steps_with_keys_and_values_have_them() -> None:
    """As of one linear layer for all three, and no mistaking as many steps for them."""
    spikes = ir.Value(shape=ir.Shape((3, "batch", 16, 3, 8)))
    order = StepOrder([spikes], 3)
    joined = after(order, "Transpose", [spikes], 3, 3, "batch", 16, 8, perm=[3, 0, 1, 2, 4])
    assert order.left_of_steps(joined) == 3
    assert order.left_of_steps(after(order, "Split", [joined], 1, 3, "batch", 16, 8)) == 1
    assert order.left_of_steps(after(order, "Gather", [joined], 3, "batch", 16, 8, axis=0)) == 1
    assert order.left_of_steps(after(order, "Gather", [joined], 3, "batch", 16, 8, axis=1)) is None
    assert order.left_of_steps(after(order, "Split", [joined], 3, 1, "batch", 16, 8)) is None


@pytest.mark.parametrize("op", ["Gather", "Slice", "Split", "Concat", "Expand", "Tile", "Transpose", "Relu"])
def test_what_moves_values_to_an_unknown_shape_loses_the_steps(op: str) -> None:
    spikes = ir.Value(shape=ir.Shape((3, "batch", 8)))
    order, node = StepOrder([spikes], 3), ir.node(op, [spikes])
    order.propagate(node)
    assert order.left_of_steps(node.outputs[0]) == (1 if op == "Relu" else None)


class TwoStreams(nn.Module):
    """A layer that two streams share, side by side before the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3)), LIF(v_th=0.3)
        self.shared, self.readout = nn.Linear(6, 6), nn.Linear(144, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        return self.readout(self.lif(self.shared(torch.stack([spikes, 1 - spikes])).sum(0)).flatten(2))


def test_a_graph_that_counts_in_other_steps_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over all steps is right."""
    monkeypatch.setattr(StepOrder, "left_of_steps", lambda *args: 1)
    match = r"layer 'shared', operations in 1 step of inputs that are not 0: the graph counts .*, PyTorch"
    refused(tmp_path, match, classifier(TwoStreams()))


def _count_any_inputs(count_inputs: Any, graph: onnx.GraphProto, layer: Layer, *args: Any) -> None:
    count_inputs(graph, replace(layer, binary=False), *args)


# ------------------------------------------------------------------------------------------- what else is added


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_biases_are_counted_for_every_output(layout: str) -> None:
    """ConvSNN at width 0.25 on 8x8 pixels: 8 and 16 channels, pooling, 16 channels, pooling, ten classes."""
    metadata = engine(layout, **({"T": 4} if layout == "unrolled" else {})).metadata
    assert metadata["other_ops"] == {
        "bias_adds": {"encode.0": 8 * 64, "layer2.0": 16 * 64, "layer3.1": 16 * 16, "readout.2": 10},
        "residual_adds": {},
        "batch_norm_macs": {},
    }
    neurons = 8 * 64 + 16 * 64 + 16 * 16
    assert other_ops(metadata) == {
        "bias_adds": neurons + 10,
        "residual_adds": 0,
        "batch_norm_macs": 0,
        "neuron_ops": 5 * neurons,
    }


class Residuals(nn.Module):
    """Blocks as ResNet-19's on 8x8 pixels: 8 channels twice, and 16 at 4x4; then means of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1, self.lif2 = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1), tdBN(4)), LIF(), LIF()
        shapes = [(4, 8, 1), (8, 8, 1), (8, 16, 2)]
        neuron = {"tau": 0.5, "v_th": 1.0, "gamma": 1.0}
        self.blocks = nn.Sequential(*(ResidualBlock(c, out, stride=stride, **neuron) for c, out, stride in shapes))
        self.fc1 = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12))
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.fc2(self.lif2(self.fc1(self.blocks(self.lif1(self.encode(x, T))))))


@pytest.mark.parametrize("options", [{"layout": "dynamic"}, {"T": 3, "with_state": True}])
def test_residual_sums_are_counted(options: dict[str, Any], tmp_path: Path) -> None:
    metadata = unchecked(Residuals(), tmp_path / "m.onnx", ExportConfig(**options)).metadata
    sums = {"blocks.0": 8 * 64, "blocks.1": 8 * 64, "blocks.2": 16 * 16}
    assert metadata["other_ops"]["residual_adds"] == sums
    assert metadata["other_ops"]["batch_norm_macs"] == {}
    convolutions = {f"{block}.layer{n}.0": size for block, size in sums.items() for n in (1, 2)}
    shortcuts = {f"{block}.shortcut.0": sums[block] for block in ("blocks.0", "blocks.2")}
    others = {"encode.0": 4 * 64, "fc1.2": 12, "fc2": 10}
    assert metadata["other_ops"]["bias_adds"] == convolutions | shortcuts | others
    binary = {layer.name: layer.binary for layer in layers_of(metadata)}
    assert [name for name, alone in binary.items() if not alone] == ["encode.0", "fc1.2"]  # the image, and means


class Sums(nn.Module):
    """SEW blocks, whose sums are of spikes, and a linear layer without bias on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.if1 = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1, bias=False), tdBN(4)), IF()
        self.blocks = nn.Sequential(*(SEWBlock(4, 4, stride=1, v_th=1.0, gamma=1.0) for _ in range(2)))
        self.tokens, self.readout = nn.Linear(8, 3, bias=False), nn.Linear(4 * 8 * 3, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.tokens(self.blocks(self.if1(self.encode(x, T)))).flatten(2))


@pytest.mark.parametrize("fold_bn", [True, False])
def test_sums_of_spikes_biases_and_batch_norms(fold_bn: bool, tmp_path: Path) -> None:
    metadata = unchecked(Sums(), tmp_path / "m.onnx", ExportConfig(T=4, fold_bn=fold_bn)).metadata
    convolutions = ["encode", *(f"blocks.{k}.layer{n}" for k in (0, 1) for n in (1, 2))]
    size = 4 * 64
    assert metadata["other_ops"] == {
        "bias_adds": {f"{name}.0": size for name in convolutions if fold_bn} | {"readout": 10},
        "residual_adds": {"blocks.0": size, "blocks.1": size},
        "batch_norm_macs": {} if fold_bn else {f"{name}.1": size for name in convolutions},
    }
    assert other_ops(metadata)["neuron_ops"] == 5 * size * 4  # IF does not leak
    binary = {layer.name: layer.binary for layer in layers_of(metadata)}
    assert binary["blocks.0.layer1.0"] and binary["blocks.0.layer2.0"] and binary["blocks.1.layer2.0"]
    assert not binary["blocks.1.layer1.0"] and not binary["tokens"]  # they read sums of spikes
    assert metadata["uncounted"] == []


class Differences(nn.Module):
    """A difference in each step, and sums over two steps, of which there is none in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.left, self.right = LIF(v_th=0.3), nn.Linear(64, 10, bias=False), nn.Linear(64, 10, bias=False)
        self.later = Later()

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(x.flatten(1).expand(T, -1, -1))
        return self.later(self.left(spikes) - self.right(spikes))


class Later(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[1:] + x[:-1]])


def test_differences_are_counted_and_sums_of_some_steps_are_named(tmp_path: Path) -> None:
    metadata = unchecked(Differences(), tmp_path / "m.onnx", ExportConfig(T=3)).metadata
    assert [*metadata["other_ops"]["residual_adds"].values()] == [10]
    assert metadata["uncounted"] == ["later (residual_adds)"]


class EachStep(nn.Module):
    """A convolution that is called for each step by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), LIF(v_th=0.3)
        self.each, self.readout = nn.Conv2d(4, 2, 3, padding=1), nn.Linear(128, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        return self.readout(self.lif(torch.stack([self.each(spikes[t]) for t in range(T)])).flatten(2))


def test_what_is_uncounted_of_each_step_is_named_once(tmp_path: Path) -> None:
    metadata = unchecked(EachStep(), tmp_path / "m.onnx", ExportConfig(T=3)).metadata
    assert metadata["uncounted"] == ["each (bias_adds)", "each", "each#2", "each#3"]


class CalledTwice(nn.Module):
    """A linear layer of 16,384 weights at two places: the optimiser leaves the Transpose of each."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.layer, self.readout = LIF(v_th=0.3), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(torch.cat([x, 1 - x], 1).flatten(1).expand(T, -1, -1))
        return self.readout(self.lif(self.layer(self.lif(self.layer(spikes)))))


def test_a_large_layer_at_two_places_is_counted_where_bn_is_not_folded(tmp_path: Path) -> None:
    metadata = unchecked(CalledTwice(), tmp_path / "m.onnx", ExportConfig(T=3, fold_bn=False)).metadata
    assert [layer["name"] for layer in metadata["layers"]] == ["layer", "layer#2", "readout"]
    assert metadata["uncounted"] == []


class FromNeuronsToNeurons(nn.Module):
    """The second neurons alone read the first, step by step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.between = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.lif1, self.lif2, self.lif3 = LIF(v_th=0.2), LIF(v_th=0.9), LIF(v_th=0.3)
        self.readout = nn.Linear(512, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x)
        spikes = self.lif2(self.lif1(current.unsqueeze(0).expand(T, *current.shape)))
        spikes = self.lif3(self.between(spikes.flatten(0, 1)).unflatten(0, (T, -1)))
        logits: Tensor = self.readout(spikes.flatten(2))
        return logits


def test_neurons_that_neurons_alone_read_are_counted(tmp_path: Path) -> None:
    """In int8 neurons read single steps, and nobody the spikes of all."""
    config = ExportConfig(T=3, trained_T=3, precision="int8")
    graph, *_ = build_graph(classifier(FromNeuronsToNeurons()), config, calibration=(digits().images[:32], None))
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(graph.model).SerializeToString())
    counts = Engine(tmp_path / "m.onnx", threads=1).count(digits().images[:8], 3)[1]
    assert counts["fired.lif1"].any()


# ------------------------------------------------------------------------------------------- exact sums


@pytest.mark.parametrize("size", [2**24, 2**24 + 3])
def test_sums_of_spikes_are_exact_beyond_float32(size: int) -> None:
    """float32 has no 2^24 + 3. The graph hands its input on as spikes, and the overlay counts them."""
    spikes = ir.Value(name="spikes.big", shape=ir.Shape([1, 1, size]), type=ir.TensorType(ir.DataType.FLOAT))
    layers = Layers(ir.Graph([], [], nodes=[]), [], 1, frames=False)
    overlay = counting_overlay(layers, [Neurons("big", 0.5, 1.0, (size,), spikes)])
    shape = [1, 1, None]
    given, handed = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "spikes.big"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["spikes.big"])], "g", [given], [handed])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    session = onnxruntime.InferenceSession(model.SerializeToString() + overlay, providers=["CPUExecutionProvider"])
    (fired,) = session.run(["fired.big"], {"x": np.ones((1, 1, size), np.float32)})
    assert fired.tolist() == [[size]]
