"""int8: the operator against ONNX Runtime bit for bit, exports in all layouts, calibration, refusals."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import command_helpers
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from export_helpers import (
    classifier,
    convsnn,
    digits,
    frames,
    int8_exported,
    needs_emulator,
    run_emulated,
    shared_traces,
)
from export_helpers import exported as fp32_export
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tetdeploy import Engine, tracing
from tetdeploy.cli.export import print_exported
from tetdeploy.export import ExportConfig, Exported, ParityError, export_model
from tetdeploy.export.onnx_tracer import OnnxTracer
from tetdeploy.int8 import calibration as calibrating
from tetdeploy.int8 import network as int8_network
from tetdeploy.int8 import quantisation
from tetdeploy.int8.calibration import METHODS, MIN_IMAGES, CurrentHistogram, _squared_error, calibrate, record_currents
from tetdeploy.int8.network import Int8Network
from tetdeploy.int8.quantisation import (
    CurrentScale,
    Int8Error,
    int8_conv,
    quantise,
    scales_sha256,
    spiking_convolutions,
)
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.neurons import LIF
from tetdeploy.sweep import sweep
from tetdeploy.tracing import Tracer
from tetdeploy.train import TrainConfig, train


def calibration(count: int = 128) -> tuple[Any, Any]:
    return digits().images[-count:], digits().labels[-count:]


class OnDisk:
    """Images that are read as they are sliced, as imagenet's."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, of: slice) -> Any:
        return self.images[of]


def export(path: Path, layout: str = "unrolled", network: Any = None, *, T: int = 5, **options: Any) -> Exported:
    with shared_traces():
        return export_anew(path, layout, network, T=T, **options)


def export_anew(
    path: Path, layout: str = "unrolled", network: Any = None, *, T: int, progress: Any = None, **options: Any
) -> Exported:
    config = ExportConfig(layout=layout, T=T, trained_T=3, precision="int8", **options)  # type: ignore[arg-type]
    images = digits().images[:90] if config.encoding == "direct" else frames(60, 6)
    labels = digits().labels[:90] if config.encoding == "direct" else None
    read, truth = calibration()
    given = (OnDisk(read), truth) if config.encoding == "direct" else (frames(60, 6), None)
    check = {"labels": labels, "num_check": 90, "calibration": given, "progress": progress}
    return export_model(network or convsnn(), path, config, images, **check)  # type: ignore[arg-type]


# --- the operator ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    channels=st.sampled_from([(3, 8, 1), (8, 8, 8), (8, 4, 2)]),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
)
def test_pytorch_and_onnx_runtime_give_the_same_bits(
    seed: int, channels: tuple[int, int, int], kernel: int, stride: int, padding: int
) -> None:
    rng = np.random.default_rng(seed)
    c_in, c_out, groups = channels
    spikes = (rng.random((2, c_in, 6, 7)) < 0.3).astype(np.float32)
    weight = rng.integers(-127, 128, (c_out, c_in // groups, kernel, kernel)).astype(np.int8)
    weight_scale = rng.uniform(1e-3, 2e-2, c_out).astype(np.float32)
    bias = rng.integers(-300, 300, c_out).astype(np.int32)
    scale, zero = float(np.float32(rng.uniform(0.005, 0.05))), int(rng.integers(0, 256))
    place = ([stride] * 2, [padding] * 2, [1, 1], groups)
    ours = int8_conv(*map(torch.from_numpy, (spikes, weight, weight_scale, bias)), scale, zero, *place)
    assert np.array_equal(ours.numpy(), _onnx(spikes, weight, weight_scale, bias, scale, zero, place))


def test_scales_are_divided_before_they_multiply() -> None:
    """Sums that come out one apart if they are multiplied by one scale and then divided by the other."""
    weight_scale, scale = np.float32(1.3e-7), np.float32(0.011)
    sums = np.arange(1, 2**24, dtype=np.float32)
    apart = np.round(sums * (weight_scale / scale)) != np.round(sums * weight_scale / scale)
    bias = sums[apart & (sums * weight_scale < 250 * scale)][:8].astype(np.int32)
    assert len(bias) == 8
    spikes, weight = np.zeros((1, 1, 2, 2), np.float32), np.ones((8, 1, 1, 1), np.int8)
    given = (spikes, weight, np.full(8, weight_scale), bias)
    place = ([1, 1], [0, 0], [1, 1], 1)
    ours = int8_conv(*map(torch.from_numpy, given), float(scale), 0, *place)
    assert np.array_equal(ours.numpy(), _onnx(*given, float(scale), 0, place))


def _onnx(spikes: Any, weight: Any, weight_scale: Any, bias: Any, scale: float, zero: int, place: Any) -> Any:
    """The nodes of `translate_int8_conv`, written down again by hand, in ONNX Runtime."""
    make, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    stride, padding, dilation, groups = place
    attributes = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    nodes = [
        make("DequantizeLinear", ["x", "one", "none"], ["xd"]),
        make("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        make("DequantizeLinear", ["b", "ws"], ["bd"], axis=0),
        make("Conv", ["xd", "wd", "bd"], ["y"], **attributes),
        make("QuantizeLinear", ["y", "step", "zero"], ["yq"]),
        make("DequantizeLinear", ["yq", "step", "zero"], ["out"]),
    ]
    constants = {"one": np.float32(1), "none": np.uint8(0), "w": weight, "ws": weight_scale, "b": bias}
    constants |= {"step": np.float32(scale), "zero": np.uint8(zero)}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "conv",
        [info("x", onnx.TensorProto.UINT8, spikes.shape)],
        [info("out", onnx.TensorProto.FLOAT, None)],
        [array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": spikes.astype(np.uint8)})[0]


# --- exports -----------------------------------------------------------------------------------------------------


@contextmanager
def counted_traces() -> Iterator[Counter[str]]:
    """How often torch.onnx exports within it ("export"), and torch.export traces ("_trace")."""
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch.onnx, "export"), (tracing.Tracer, "_trace")):
            plain = getattr(owner, name)

            def counted(*args: Any, _plain: Any = plain, _name: str = name, **options: Any) -> Any:
                calls[_name] += 1
                return _plain(*args, **options)

            patch.setattr(owner, name, counted)
        yield calls


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`convsnn` in a layout, exported once, by one ONNX trace for both methods of calibration and the graph."""

    @cache
    def made(layout: str) -> Exported:
        with counted_traces() as calls:
            exported = export(tmp_path_factory.mktemp("int8") / "m.onnx", layout)
        assert calls["export"] <= 1  # none where another test has taken it
        return exported

    return made


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_every_layout_computes_what_pytorch_computes(small: Callable[[str], Exported], layout: str) -> None:
    exported = small(layout)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate == 0
    assert exported.int8 is not None and list(exported.int8["scales"]) == ["layer2.0", "layer3.1"]
    kept = exported.int8["kept"]
    assert kept["num_images"] == 90 and kept["agreement"][-1] > 0.9 and len(kept["accuracy_int8"]) == len(kept["T"])
    engine = Engine(exported.path)
    assert engine.metadata["precision"] == "int8" and not exported.uncounted
    adds = {"encode.0": 8 * 64, "layer2.0": 16 * 64, "layer3.1": 16 * 16, "readout.2": 10}
    assert engine.metadata["other_ops"]["bias_adds"] == adds
    result, _ = engine.count(digits().images[:20], 3)
    assert np.array_equal(result.per_step, engine.run(digits().images[:20], 3).per_step)


def test_one_trace_serves_the_calibration_the_graph_and_the_check(tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}
    with counted_traces() as calls:  # others calibrate and are checked at more than one T
        export_anew(tmp_path / "m.onnx", T=3, progress=lambda what, done, total: told.update({what: (done, total)}))
    assert calls == {"export": 1, "_trace": 1}
    assert told == {
        "calibrating": (128, 128),
        "trying scales 1 of 2": (128, 128),
        "trying scales 2 of 2": (128, 128),
        "checking against PyTorch": (90, 90),
        "answers in fp32": (90, 90),
        "answers in int8": (90, 90),
    }


def test_a_trace_with_other_scales_is_a_trace_at_these() -> None:
    """Also where the scales of layers, equal at first, differ, and the optimiser had merged them."""
    alike, unlike = ((CurrentScale(0.02, 100), other) for other in (CurrentScale(0.02, 100), CurrentScale(0.03, 90)))
    by_name = [dict(zip(("layer2.0", "layer3.1"), pair, strict=True)) for pair in (alike, unlike)]
    fresh, used = (OnnxTracer(Tracer(convsnn(), encoding="direct", uint8=True), fold_bn=True) for _ in range(2))
    first = used.graph(None, step=False, int8=by_name[0])[0]
    wanted, got = (each.graph(None, step=False, int8=by_name[1])[0] for each in (fresh, used))
    assert contents(got) == contents(wanted) != contents(first)


def contents(model: ir.Model) -> list[bytes]:
    """A graph's nodes and weights, without notes on where a node stems from."""
    graph = ir.to_proto(model).graph
    for node in graph.node:
        node.ClearField("metadata_props")
    return [part.SerializeToString(deterministic=True) for part in (*graph.node, *graph.initializer)]


def test_frames_and_chunks_with_state(tmp_path: Path) -> None:
    exported = export(tmp_path / "m.onnx", encoding="frames", with_state=True)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate == 0
    assert exported.from_state is not None and exported.from_state.spike_mismatch_rate == 0


def test_spikes_go_from_neurons_to_convolutions_in_bytes(small: Callable[[str], Exported]) -> None:
    graph = onnx.load(small("unrolled").path).graph
    producers = {output: node for node in graph.node for output in node.output}
    weights = {initializer.name: initializer for initializer in graph.initializer}
    integer = [node for node in graph.node if node.op_type == "Conv" and node.input[1] in producers]
    assert len(integer) == 2
    for node in integer:
        weight = producers[node.input[1]]
        assert weight.op_type == "DequantizeLinear" and weights[weight.input[0]].data_type == onnx.TensorProto.INT8
        value = producers[node.input[0]]
        assert value.op_type == "DequantizeLinear"
        chain = []
        while value.op_type != "Concat":
            value = producers[value.input[0]]
            chain.append(value.op_type)
        assert set(chain) <= {"Reshape", "MaxPool", "Concat"}  # nothing is quantised or converted on the way
        assert all(producers[step].op_type == "Cast" for step in value.input)
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == 2  # the currents, not the spikes


def test_smaller_file_and_the_same_operations(small: Callable[[str], Exported]) -> None:
    files = fp32_export("unrolled", T=5, trained_T=3), small("unrolled").path
    assert files[1].stat().st_size < files[0].stat().st_size
    layers = [Engine(file).metadata["layers"] for file in files]
    assert [layer["precision"] for layer in layers[1]] == ["fp32", "int8", "int8", "fp32"]
    assert layers[0] == [layer | {"precision": "fp32"} for layer in layers[1]]
    images, labels = digits().images[:64], digits().labels[:64]
    swept = [sweep(Engine(file), images, labels, (3,), num_timed=1) for file in files]
    assert swept[1].rows[0].ac_ops == pytest.approx(swept[0].rows[0].ac_ops, rel=0.05)  # a few spikes differ
    price = {"fp32": (0.9, 4.6), "int8": (0.1, 0.3)}
    bill = 0.0
    for layer in swept[1].details["layers"]:
        ac_pj, mac_pj = price[layer["precision"]]
        bill += layer["rows"][0]["ac_ops"] * ac_pj + layer["rows"][0]["mac_ops"] * mac_pj
    assert swept[1].rows[0].energy_pj == pytest.approx(bill)


class Residual(nn.Module):
    """A grouped and a 1x3 convolution of spikes; a strided one of a residual sum; one of currents stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), LIF()
        self.a, self.lif2 = OverTime(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)), LIF()
        self.b, self.lif3 = OverTime(nn.Conv2d(8, 8, (1, 3), padding=(0, 1))), LIF()
        self.c, self.d = OverTime(nn.Conv2d(8, 6, 3, stride=2)), OverTime(nn.Conv2d(6, 6, 1))
        self.readout = OverTime(nn.Flatten(), nn.Linear(6 * 9, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif1(self.encode(x, T))
        branch = self.lif3(self.b(self.lif2(self.a(spikes))))
        logits: Tensor = self.readout(self.d(self.c(branch + spikes)))
        return logits


def test_own_network_with_groups_strides_and_a_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    exported = export(tmp_path / "m.onnx", network=classifier(Residual()))
    assert exported.int8 is not None and list(exported.int8["scales"]) == ["a.0", "b.0", "c.0"]
    assert exported.int8["in_float32"] == ["d.0"]
    assert exported.parity is not None and exported.parity.local_mismatch_rate <= 1e-4
    print_exported(exported, ExportConfig(precision="int8"))
    assert "int8: 3 convolutions (1 layer between neurons in float32), scales by" in capsys.readouterr().out


def test_the_gate_sees_a_scale_that_is_two_percent_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's side has another scale than the graph."""
    off = lambda module, scales, **options: quantise(  # noqa: E731
        module, {name: replace(scale, scale=scale.scale * 1.02) for name, scale in scales.items()}, **options
    )
    monkeypatch.setattr(int8_network, "quantise", off)
    with pytest.raises(ParityError, match="does not compute what PyTorch computes"):
        export(tmp_path / "m.onnx", T=3)
    assert not list(tmp_path.iterdir())


quantised, places = quantisation._quantised, quantisation._places


def _without_bias(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return quantised(weight, None)


def _with_one_scale(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Weights and biases are quantised by channel, and read as if they were not."""
    values = quantised(weight, bias)
    scale = values["weight_scale"]
    return values | {"weight_scale": scale.mean().expand_as(scale).clone()}


def _with_weights_of_one_more(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    values = quantised(weight, bias)
    return values | {"weight": (values["weight"].int() + 1).clamp(-127, 127).to(torch.int8)}


def _with_scales_of_nan(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    values = quantised(weight, bias)
    return values | {"weight_scale": torch.full_like(values["weight_scale"], torch.nan)}


def _with_more_padding(convolution: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    stride, _, _, groups = places(convolution)
    return stride, [2, 2], [2, 2], groups


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("_quantised", _without_bias),
        ("_quantised", _with_one_scale),
        ("_quantised", _with_weights_of_one_more),
        ("_quantised", _with_scales_of_nan),
        ("_places", _with_more_padding),
    ],
)
def test_the_gate_sees_a_layer_that_is_another_in_int8(
    function: str, fault: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph and PyTorch are made by the same code, and are wrong alike."""
    monkeypatch.setattr(quantisation, function, fault)
    wrong = pytest.raises(Int8Error, match=r"the currents of layer2\.0 in int8 differ .* use --precision fp32$")
    with shared_traces(onnx=False), wrong:
        export_anew(tmp_path / "m.onnx", T=3)
    assert not list(tmp_path.iterdir())


class Biased(nn.Module):
    """A convolution that never sees a spike, of 32 channels without weights and 32 with some; its biases lie where both
    they and the currents, in steps of 0.1, round by half a step."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 1, 3, padding=1)), LIF(v_th=1e9)
        self.conv, self.lif2 = OverTime(nn.Conv2d(1, 64, 1)), LIF(v_th=0.3)
        self.readout = OverTime(nn.Flatten(), nn.Linear(64 * 64, 10))
        with torch.no_grad():
            k = torch.arange(32)
            halves = 0.1 * (k + 0.5)
            self.conv[0].weight[:32], self.conv[0].bias[:32] = 0.0, halves
            self.conv[0].weight[32:], self.conv[0].bias[32:] = 1.27, halves + 0.003 * (-1) ** k  # in steps of 0.01

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.conv(self.lif1(self.encode(x, T)))))
        return logits


@pytest.mark.parametrize("size", [1, 1000.3, -1])
@pytest.mark.parametrize("zero", [0, 245, 255])
def test_the_gate_lets_a_bias_and_a_current_round_by_half_a_step_each_and_clip(size: float, zero: int) -> None:
    """Of currents up to 3.15, or down to -3.15, 245 leaves ten steps above 0, 255 none there, and 0 none below it."""
    biased = Biased()
    with torch.no_grad():
        for parameter in biased.conv.parameters():
            parameter.mul_(size)
    scales = {"conv.0": CurrentScale(float(np.float32(0.1 * abs(size))), zero)}
    network = Int8Network(Tracer(classifier(biased), encoding="direct", uint8=True), scales)
    network.check_layers(torch.from_numpy(digits().images[:4]), 2)


def test_scales_are_told_apart_by_name_scale_and_zero() -> None:
    every = [{"a": CurrentScale(0.1, 5)}, {"b": CurrentScale(0.1, 5)}, {"a": CurrentScale(0.2, 5)}]
    assert len({scales_sha256(scales) for scales in (*every, {"a": CurrentScale(0.1, 6)}, {})}) == 5


class Leaky(nn.Module):
    """One convolution of spikes, without a bias, whose neurons keep a 64th from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 2, 3, padding=1)), LIF(v_th=0.3)
        self.conv, self.lif2 = OverTime(nn.Conv2d(2, 2, 3, stride=2, bias=False)), LIF(tau=1 / 64, v_th=0.3)
        self.readout = OverTime(nn.Flatten(), nn.Linear(18, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.conv(self.lif1(self.encode(x, T)))))
        return logits


def test_so_many_steps_that_their_scales_would_overflow(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = export(tmp_path / "m.onnx", network=classifier(Leaky()), T=23)  # 64^22 is no float32
    assert made.parity is not None and made.parity.spike_mismatch_rate <= 1e-4


class Odd(Residual):
    """Convolutions of spikes whose padding has a name, that follow a dropout, or whose weights or bias are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.same = OverTime(nn.Conv2d(8, 6, 3, padding="same", dilation=2))
        self.uneven = OverTime(nn.Conv2d(8, 6, (2, 3), padding="same"))
        self.dropped = OverTime(nn.Dropout(), nn.Dropout2d(), nn.Conv2d(8, 6, 1, padding="valid", dilation=2))
        self.computed = OverTime(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 1)))
        self.biased = OverTime(parametrize.register_parametrization(nn.Conv2d(8, 6, 1), "bias", nn.Tanh()))
        self.readout = OverTime(nn.Flatten(), nn.Linear(6 * 64, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif1(self.encode(x, T))
        odd = (self.same, self.uneven, self.dropped, self.computed, self.biased)
        logits: Tensor = self.readout(sum(conv(spikes) for conv in odd))
        return logits


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch pads in a copy
def test_odd_convolutions_and_a_channel_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    network = classifier(Odd())
    with torch.no_grad():
        network.network.same[0].weight[2] = 0.0
        network.network.same[0].bias[2] = 0.7
        network.network.same[0].weight[4] = network.network.same[0].bias[4] = 0.0
    module = Tracer(network, encoding="direct", uint8=True).folded(2)
    assert list(spiking_convolutions(module).values()) == ["same.0", "dropped.2"]
    x = torch.from_numpy(digits().images[:20])
    before, scale = module(x)[0].detach(), CurrentScale.covering(-3, 3)
    monkeypatch.setattr(quantisation, "_EXACT", 127 * 72)
    with pytest.raises(Int8Error, match=r"same\.0 sums 72 weights, too many for exact 8-bit arithmetic$"):
        quantise(module, {"same.0": scale})
    monkeypatch.undo()
    quantise(module, {"same.0": scale, "dropped.2": scale})
    left = {name.split(".")[2] for name, _ in module.named_parameters()}  # in float32
    assert "uneven" in left and not left & {"same", "dropped"}
    after = module(x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.05 * float(before.abs().max()))
    buffers = dict(module.named_buffers())
    (key,) = (name for name, value in buffers.items() if name.endswith(".weight") and value.shape[2:] == (3, 3))
    scale_of_none = float(buffers[f"{key}_scale"][4])  # a channel with neither weights nor bias
    assert scale_of_none > 0 and not buffers[key][4].any() and not buffers[key.removesuffix("weight") + "bias"][4]
    step = buffers[f"{key}_scale"].double()
    held = step * buffers[key.removesuffix("weight") + "bias"]
    assert ((held - network.network.same[0].bias).abs() <= 0.501 * step).all()


# --- calibration -------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6), st.floats(-1.0, 0.0))
def test_currents_are_exact_in_whatever_order_they_are_computed(width: float, share: float) -> None:
    current, every = CurrentScale.covering(share * width, width), np.arange(256, dtype=np.float32)
    scale, zero = np.float32(current.scale), np.float32(current.zero)
    assert float(scale) == current.scale
    np.testing.assert_array_equal(scale * every - scale * zero, scale * (every - zero))


def test_scales_cover_what_they_are_asked_to() -> None:
    hundredth: Any = pytest.approx(0.01, rel=2**-15)  # of 16 binary digits
    assert CurrentScale.covering(0.0, 2.55) == CurrentScale(hundredth, 0)
    assert CurrentScale.covering(0.0, 2.55).scale >= 0.01
    assert CurrentScale.covering(-1.275, 1.275).zero in (127, 128)
    for low, high, zero in ((1.0, 2.55, 0), (-2.55, -1.0, 255)):  # 0 is always one of the values
        assert CurrentScale.covering(low, high) == CurrentScale(hundredth, zero)
    assert CurrentScale.covering(0.0, 0.0) == CurrentScale(pytest.approx(1e-8, rel=2**-15), 0)  # type: ignore[arg-type]
    histogram = CurrentHistogram()
    torch.manual_seed(0)
    for _ in range(4):
        histogram.add(torch.randn(50_000))
    wide, narrow = histogram.percentile(100), histogram.percentile(95)
    assert narrow.scale * 255 == pytest.approx(2 * 1.96, rel=0.02)  # 95 % of a normal distribution
    assert wide == CurrentScale.covering(histogram.lowest, histogram.highest)
    assert METHODS["percentile"](histogram) == histogram.percentile(99.99) != histogram.percentile(99.9)
    assert narrow.scale < histogram.least_squares().scale < wide.scale


def test_more_currents_are_counted_than_float32_counts() -> None:
    histogram = CurrentHistogram()
    histogram.add(torch.zeros(2, 2**23 + 1))
    assert histogram.counts is not None and histogram.counts.sum() == 2**24 + 2


def test_a_percentile_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins of width 1 from -3 to 3, which hold 0, 5, 45, 40, 9 and 1 of 100 currents."""
    monkeypatch.setattr("tetdeploy.int8.calibration._BINS", 6)
    histogram = CurrentHistogram()
    histogram.add(torch.tensor([-2.0] + [-1.5] * 4 + [-0.5] * 45 + [0.5] * 40 + [1.5] * 9 + [2.0]))
    assert histogram.percentile(88) == CurrentScale.covering(-1, 2)  # 6 % at either end
    assert histogram.percentile(90) == histogram.percentile(88)  # of 5 % those are left out that are just as many
    assert histogram.percentile(98) == CurrentScale.covering(-2, 2)  # 1 %: no farther than the currents reach
    histogram.add(torch.tensor([0.5, 2.9]))  # within the bins
    assert histogram.counts is not None and histogram.counts.tolist() == [0, 5, 45, 41, 9, 2]
    histogram.add(torch.tensor([-8.0, 0.5]))  # they become twice as wide, downwards, and end at 3 as before
    assert (histogram.low, histogram.high, histogram.lowest, histogram.highest) == (-9, 3, -8, pytest.approx(2.9))
    assert histogram.counts.tolist() == [1, 0, 0, 5, 87, 11]
    histogram.add(torch.tensor([-20.0, 20.0]))  # two times to either side: from -21 to 3, then to 27
    assert (histogram.low, histogram.high) == (-21, 27) and histogram.counts.tolist() == [1, 1, 103, 0, 0, 1]


def test_small_currents_have_as_many_bins() -> None:
    torch.manual_seed(0)
    currents, found = torch.randn(9_000), []
    for scale in (1.0, 1e-5):
        histogram = CurrentHistogram()
        histogram.add(currents * scale)
        found.append(histogram.percentile(99).scale / scale)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("first", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("method", METHODS)
def test_scales_hardly_depend_on_which_batch_comes_first(first: float, method: str) -> None:
    """Also where the first one is constant, as that of recordings in which nothing moves, or wide."""
    torch.manual_seed(0)
    batches = [torch.full((9_000,), first), *(torch.randn(9_000) * width for width in (0.2, 1, 1, 1.5, 1))]
    found = []
    for order in (batches, batches[::-1], batches[2:] + batches[:2]):
        histogram = CurrentHistogram()
        for batch in order:
            histogram.add(batch)
        assert histogram.counts is not None and int(histogram.counts.sum()) == 54_000
        assert histogram.high - histogram.low < 4 * (histogram.highest - histogram.lowest)
        found.append(METHODS[method](histogram))
    for scale in found:
        assert scale.scale == pytest.approx(found[0].scale, rel=0.05) and abs(scale.zero - found[0].zero) <= 3
        assert 5 < 255 * scale.scale < 14  # of currents from -6.2 to 6.8


def test_currents_that_no_scale_covers_are_refused(tmp_path: Path) -> None:
    for weight in (float("nan"), 1e38):
        network = copy.deepcopy(convsnn())
        with torch.no_grad():
            network.network.layer2[0].weight[1] = weight
        with pytest.raises(
            Int8Error, match=r"^layer2\.0 puts out currents up to (nan|inf|\d\S*e\+3\d), at most 1e\+30 can be held$"
        ):
            calibrate(Tracer(network, encoding="direct", uint8=True), *calibration(40), 2, lambda scales: 1 / 0)


@pytest.mark.parametrize("better", ["mse", "percentile"])
def test_the_method_with_the_more_accurate_mean_logits_is_taken(better: str) -> None:
    tracer, x, labels = Tracer(convsnn(), encoding="direct", uint8=True), digits().images[:40], digits().labels[:40]
    images, given = np.arange(40), []

    def answers(scales: Any) -> Any:
        given.append(scales)
        right = 35 if better == ("mse", "percentile")[len(given) - 1] else 30
        logits = np.zeros((40, 2, 10), np.float32)
        logits[images, 0, np.where(images < right, labels, (labels + 1) % 10)] = 3.0
        logits[images, 1, (labels + 2) % 10] = 1.0  # the last step alone would be wrong
        return logits

    found = calibrate(tracer, x, labels, 2, answers)
    assert (found.method, found.num_images) == (better, 40)
    assert found.accuracy == {name: 35 / 40 if name == better else 30 / 40 for name in ("mse", "percentile")}
    assert found.scales == given[better == "percentile"] != given[better == "mse"]


@pytest.mark.parametrize("encoding", ["direct", "frames"])
@pytest.mark.parametrize("nearer", ["mse", "percentile"])
def test_of_equally_accurate_methods_the_nearer_to_float32_is_taken(nearer: str, encoding: Any) -> None:
    """Without labels the accuracy is the agreement with the network in float32, of frames after the first T."""
    tracer, x = Tracer(convsnn(), encoding=encoding, uint8=True), digits().images[:32]  # no fewer are taken
    x = x if encoding == "direct" else frames(32, 6)
    with torch.no_grad():
        given = torch.from_numpy(x) if encoding == "direct" else torch.from_numpy(x[:, :2]).transpose(0, 1)
        exact = convsnn()(given, 2).transpose(0, 1).numpy()
    factors = iter((1.1, 0.5) if nearer == "mse" else (0.5, 1.1))
    found = calibrate(tracer, x, None, 2, lambda scales: next(factors) * exact)
    assert (found.method, found.accuracy) == (nearer, {"mse": 1.0, "percentile": 1.0})


def test_an_error_is_that_of_the_256_values_of_a_scale() -> None:
    values = np.array([-12.0, -10.0, 0.4, 245.0, 247.0])  # of a scale from -10 to 245
    assert _squared_error(CurrentScale(1.0, 10), values, np.array([1.0, 1, 1, 1, 3])) == pytest.approx(4 + 0.16 + 3 * 4)


def test_least_squares_errs_less_than_any_percentile() -> None:
    histogram = CurrentHistogram()
    torch.manual_seed(0)
    current = torch.cat([torch.randn(100_000), torch.randn(100) * 4])
    histogram.add(current)

    def error(scale: CurrentScale) -> float:
        rounded = (current / scale.scale).round().clamp(-scale.zero, 255 - scale.zero) * scale.scale
        return float(((rounded - current) ** 2).mean())

    best = error(histogram.least_squares())
    for percent in (100, 99.999, 99.99, 99.9, 99, 95):
        assert best <= error(histogram.percentile(percent)) * 1.001, percent  # the histogram has bins of some width
    assert best < error(histogram.percentile(100))


def test_one_current_of_millions_may_be_worth_all_of_the_range() -> None:
    """Less than the percentiles leave out, but an error that weighs more than those of all others together."""
    histogram = CurrentHistogram()
    histogram.add(torch.cat([torch.linspace(0, 1, 3_000_000), torch.tensor([10_000.0])]))
    assert histogram.percentile(100 - 1e-4).scale < 1
    assert histogram.least_squares() == CurrentScale.covering(0, 10_000)


def test_a_bin_errs_as_its_middle_does(monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = CurrentHistogram()
    histogram.add(torch.tensor([-1.0, 3.0]))  # -2..4, as the range reaches a quarter beyond
    errors = Mock(return_value=0.0)
    monkeypatch.setattr(calibrating, "_squared_error", errors)
    histogram.least_squares()
    _, values, weights = errors.call_args.args
    edges = np.linspace(-2, 4, len(weights) + 1)
    np.testing.assert_allclose(values, (edges[1:] + edges[:-1]) / 2)


def test_convolutions_of_spikes_are_found_by_name() -> None:
    torch.manual_seed(3)
    module = Tracer(classifier(Residual()), encoding="direct", uint8=True).folded(2)
    assert list(spiking_convolutions(module).values()) == ["a.0", "b.0", "c.0"]  # not the first, which reads the image


# --- a network's own loop over the steps


class Loop(nn.Module):
    """Calls a convolution of spikes once a step; they begin in step 2, when the neurons have charged up."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), LIF()
        self.conv, self.bn, self.lif2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), LIF(v_th=0.3)
        self.readout = OverTime(nn.Flatten(), nn.Linear(512, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif1(self.encode(x, T))
        current = torch.stack([self.bn(self.conv(spikes[t])) for t in range(len(spikes))])
        logits: Tensor = self.readout(self.lif2(current))
        return logits


@cache
def loop() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Loop()
    made = classifier(network)
    with torch.no_grad():
        normalised = made.normalize(torch.from_numpy(digits().images))
        network.lif1.v_th = 1.01 * float(network.encode(normalised, 1).max())
    return classifier(network)  # BN of what it reads now


def accuracy_of_methods(network: Any, T: int) -> dict[str, float]:
    """In 8 bits after T steps, on the calibration images, by PyTorch; scales are found at 3 steps."""
    tracer, (images, labels) = Tracer(network, encoding="direct", uint8=True), calibration()
    x, found = torch.from_numpy(images), {}
    for name, scale in METHODS.items():
        histograms, _ = record_currents(tracer.folded(3), x.split(32), None)
        scales = {layer: scale(currents) for layer, currents in histograms.items()}
        with torch.no_grad():
            answers = Int8Network(tracer, scales)(x, T).mean(0).argmax(-1).numpy()
        found[name] = float((answers == labels).mean())
    return found


@pytest.mark.parametrize(("layout", "T"), [("unrolled", 2), ("unrolled", 5), ("step", 5)])  # no dynamic one is traced
def test_a_loop_over_the_steps_has_one_scale_at_every_T(layout: str, T: int, tmp_path: Path) -> None:
    exported = export(tmp_path / "m.onnx", layout, loop(), T=T)  # trained at 3
    assert exported.int8 is not None and list(exported.int8["scales"]) == ["conv"]
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    # the methods are judged at the steps of the training
    assert exported.int8["accuracy"] == accuracy_of_methods(loop(), 3) != accuracy_of_methods(loop(), 5)
    images = digits().images[:90]
    with torch.no_grad():
        plain = loop()(torch.from_numpy(images), T).transpose(0, 1).numpy()
    quantised = Engine(exported.path, threads=1).run(images, T).per_step
    for steps in range(1, T + 1):
        agreement = (quantised[:, :steps].mean(1).argmax(1) == plain[:, :steps].mean(1).argmax(1)).mean()
        assert agreement > 0.9, steps


def test_training_in_8_bits_at_another_T_has_the_scales_of_all_calls() -> None:
    """As with `--tit` and `--random-T`: steps that the calibration did not run take no other scale."""
    tracer = Tracer(loop(), encoding="direct", uint8=True)
    images, labels = calibration(64)
    given: list[Any] = []
    found = calibrate(tracer, images, labels, 2, lambda scales: given.append(scales) or np.zeros((64, 2, 10)))  # type: ignore[arg-type,func-returns-value]
    assert list(found.scales) == ["conv"]
    currents = [node for node in tracer.folded(6).graph.nodes if "conv2d" in str(node.target)]
    assert len(currents) == 7  # the first layer's, and six
    for trainable in (False, True):
        module = tracer.folded(6, trainable=trainable)
        assert quantise(module, found.scales, trainable=trainable) == ["conv"] * 6
        used = [node.args for node in module.graph.nodes if found.scales["conv"].scale in node.args]
        assert len(used) == 6 and all(found.scales["conv"].zero in args for args in used)


def test_scales_of_other_layers_quantise_nothing() -> None:
    folded = Tracer(loop(), encoding="direct", uint8=True).folded(2)
    assert quantise(folded, {"readout.1": CurrentScale(0.01, 9)}) == []


class Twice(nn.Module):
    """Two convolutions in one module's code, and one before two BN, both in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), LIF(v_th=0.3)
        self.a, self.b = (nn.Parameter(torch.randn(8, 8, 3, 3) * width) for width in (0.1, 1.0))
        self.shared, self.bn1, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.readout = OverTime(nn.Flatten(), nn.Linear(8 * 36, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        steps = []
        for step in spikes:
            one, other = (nn.functional.conv2d(step, weight) for weight in (self.a, self.b))
            pair = self.bn1(self.shared(step)) - self.bn2(self.shared(step))
            steps.append(one + other + pair[..., 1:-1, 1:-1])
        logits: Tensor = self.readout(torch.stack(steps))
        return logits


@pytest.mark.parametrize("trainable", [False, True])
def test_convolutions_of_other_parameters_have_scales_of_their_own(trainable: bool) -> None:
    torch.manual_seed(0)
    module = Tracer(classifier(Twice()), encoding="direct", uint8=True).folded(3, trainable=trainable)
    names = list(spiking_convolutions(module).values())
    assert names == ["network", "network#2", "shared", "shared#2"] * 3
    x = torch.from_numpy(digits().images[:20])
    before = module(x)[0].detach()
    scales = {name: CurrentScale(0.2 + k / 100, 128) for k, name in enumerate(dict.fromkeys(names))}
    assert quantise(module, scales, trainable=trainable) == names
    after = module(x)[0].detach()  # of calls that leave out strides, padding and groups
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.05 * float(before.abs().max()))


class ReadsTwo(nn.Module):
    """One convolution of spikes and of pooled spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), LIF(v_th=0.3)
        self.conv, self.readout = nn.Conv2d(8, 8, 1), OverTime(nn.Linear(8, 10))

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x, T)).flatten(0, 1)
        pooled = nn.functional.max_pool2d(spikes, 2)
        currents = self.conv(spikes).mean((2, 3)) + self.conv(pooled).mean((2, 3))
        logits: Tensor = self.readout(currents.unflatten(0, (T, -1)))
        return logits


def test_calls_of_one_convolution_have_one_scale_whatever_they_read() -> None:
    module = Tracer(classifier(ReadsTwo()), encoding="direct", uint8=True).folded(3)
    assert list(spiking_convolutions(module).values()) == ["conv", "conv"]


# --- what is spikes


class Volumes(nn.Module):
    """The image as a volume of one layer, pooled in 3-d."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 8, (1, 3, 3))), LIF(v_th=0.3)
        self.pooled = OverTime(nn.MaxPool3d((1, 2, 2)), nn.Conv3d(8, 4, (1, 3, 3)))
        self.readout = OverTime(nn.Flatten(), nn.Linear(4, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.pooled(self.lif(self.encode(x, T))))
        return logits


@pytest.mark.parametrize("pool", [nn.MaxPool3d((1, 2, 2)), nn.AdaptiveMaxPool3d((1, 3, 3))])
def test_a_convolution_behind_3d_pooling_of_spikes_is_quantised(pool: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = Volumes()
    network.pooled[0] = pool
    exported = export(tmp_path / "m.onnx", network=classifier(network))
    assert exported.int8 is not None and list(exported.int8["scales"]) == ["pooled.1"]
    assert exported.parity is not None and exported.parity.local_mismatch_rate <= 1e-4


class Padded(nn.Module):
    """Convolutions of spikes that are padded or repeated, and one of spikes beside halves."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1))
        self.lif1, self.lif2, self.lif3, self.lif4 = (LIF(v_th=0.3) for _ in range(4))
        self.a = OverTime(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
        self.b = OverTime(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, stride=2))
        self.c = OverTime(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3))
        self.d = OverTime(nn.ConstantPad2d(1, 0.5), nn.Conv2d(4, 4, 3))
        self.readout = OverTime(nn.Flatten(), nn.LazyLinear(10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif2(self.a(self.lif1(self.encode(x, T))))
        logits: Tensor = self.readout(self.d(self.lif4(self.c(self.lif3(self.b(spikes))))))
        return logits


def test_padded_and_repeated_spikes_are_spikes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    exported = export(tmp_path / "m.onnx", network=classifier(Padded()))
    assert exported.int8 is not None and list(exported.int8["scales"]) == ["a.0", "b.1", "c.1"]
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    layers = Engine(exported.path).metadata["layers"]
    binary = {layer["name"] for layer in layers if layer["binary"]}
    assert binary >= {layer["name"] for layer in layers if layer["precision"] == "int8"} == {"a.0", "b.1", "c.1"}


MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda s: torch.stack([*s]),
    lambda s: torch.cat(s.chunk(2, dim=2)[::-1], 2).flip(-1),
    lambda s: s.split([1, 2, 1], dim=2)[1].roll((1, -2), (3, 4)),
    lambda s: s.split(3, dim=2)[0].repeat(1, 1, 2, 1, 1),
    lambda s: nn.functional.pixel_unshuffle(nn.functional.pixel_shuffle(s, 2).mT, 2),
    lambda s: nn.functional.channel_shuffle(s.flatten(0, 1), 2).unflatten(0, s.shape[:2]).narrow(2, 1, 2),
    lambda s: s.movedim(3, 4).swapaxes(2, 3).unsqueeze(3).squeeze((3,)),
)


class Moved(nn.Module):
    """Convolutions of spikes that were cut up, put together or moved."""

    def __init__(self, *moves: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), LIF(v_th=0.3)
        self.moves = moves
        self.branches = nn.ModuleList(OverTime(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10)) for _ in moves)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif(self.encode(x, T))
        moved = zip(self.moves, self.branches, strict=True)
        return torch.stack([branch(move(spikes)) for move, branch in moved]).sum(0)


def doubled(s: Tensor, times: int) -> Tensor:
    for _ in range(times):
        s = s + s
    return s


def either(a: Tensor, b: Tensor) -> Tensor:
    return a + b - a * b


SUMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda s: s.split(2, 2)[0] + s[:, :, 2:].roll(1, 3),
    lambda s: (s + s.flip(3)) * s.roll(1, 4),
    lambda s: doubled(s, 6),  # 64
    lambda s: torch.cat(
        [s + s.flip(4), nn.functional.max_pool2d((s + s).flatten(0, 1), 3, 1, 1).unflatten(0, s.shape[:2])], 2
    ),
    lambda s: sum([s, s.roll(1, 4)]),  # type: ignore[return-value]  # from 0
    lambda s: s.clone().add_(s.flip(3)).mul_(s.roll(1, 4)) + 1,
    lambda s: (1 - s) * s.roll(1, 4) + (1.0 - s.flip(3)),
    lambda s: torch.minimum(s + s.flip(3), s + s.roll(1, 4)) + torch.max(s, s.flip(4)),
)
OF_SPIKES: tuple[Callable[[Tensor], Tensor], ...] = (  # OR, AND, XOR
    lambda s: torch.maximum(s, s.roll(1, 4)),
    lambda s: torch.min(s, s.flip(3)),
    lambda s: (s + s.roll(1, 4)).clamp(0, 1),
    lambda s: (s + s.roll(1, 4)).clamp_(max=1.0),
    lambda s: either(s, s.roll(1, 4)),
    lambda s: (s + s.flip(3) > 0).float(),
    lambda s: (s != s.flip(3)).to(s.dtype),
    lambda s: torch.logical_or(s, s.flip(3)) * s.roll(1, 4),
)


@pytest.mark.parametrize(
    ("moves", "target"),
    [(MOVES, "cpu"), (OF_SPIKES, "cpu"), (OF_SPIKES, "openvino"), (SUMS, "cpu"), (SUMS, "openvino")],
)
def test_spikes_that_are_moved_are_spikes_and_their_sums_whole_numbers(
    moves: Sequence[Callable[[Tensor], Tensor]], target: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    exported = export(tmp_path / "m.onnx", network=classifier(Moved(*moves)), T=3, target=target)
    assert exported.int8 is not None
    assert list(exported.int8["scales"]) == [f"branches.{k}.0" for k in range(len(moves))]
    assert exported.parity is not None and exported.parity.is_local
    plain, native = (Engine(exported.path, threads=1, native=native) for native in (False, True))
    layers = [layer for layer in plain.metadata["layers"] if layer["precision"] == "int8"]
    assert [layer["binary"] for layer in layers] == [moves is not SUMS] * len(moves)
    images = digits().images[:20]
    np.testing.assert_allclose(native.run(images, 3).per_step, plain.run(images, 3).per_step, rtol=0.0, atol=1e-5)


class InPlace(nn.Module):
    """Dropout that writes over spikes, if it drops any, and a sum that does once they were read."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1, self.lif2 = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), LIF(v_th=0.3), LIF(v_th=0.3)
        self.drop = OverTime(nn.Dropout2d(0.5, inplace=True), nn.Conv2d(4, 4, 3, padding=1))
        self.conv = OverTime(nn.Conv2d(4, 4, 3, padding=1))
        self.readout = OverTime(nn.Flatten(), nn.Linear(4 * 64, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif2(self.drop(self.lif1(self.encode(x, T))))
        spikes += self.lif1(self.conv(spikes))
        logits: Tensor = self.readout(spikes)
        return logits


def test_spikes_that_are_written_over_later_are_spikes() -> None:
    module = Tracer(classifier(InPlace()), encoding="direct", uint8=True).folded(2)
    assert list(spiking_convolutions(module).values()) == ["drop.1", "conv.0"]


class InFloat64(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.conv.double()

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif2(self.drop(self.lif1(self.encode(x, T))))
        logits: Tensor = self.readout(self.lif1(self.conv(spikes.double()).float()))
        return logits


def test_a_convolution_in_another_type_stays_in_it() -> None:
    module = Tracer(classifier(InFloat64()), encoding="direct", uint8=True).folded(2)
    assert list(spiking_convolutions(module).values()) == ["drop.1"]


class Darker(InPlace):
    """It writes over its input."""

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        return super().forward(x.mul_(0.5), T)


def test_calibration_does_not_write_over_the_images() -> None:
    x = (digits().images[:32] / 16).astype(np.float32)
    before, tracer = x.copy(), Tracer(classifier(Darker()), encoding="direct", uint8=False)
    calibrate(tracer, x, None, 2, lambda scales: np.zeros((32, 2, 10), np.float32))
    np.testing.assert_array_equal(x, before)


def test_sums_too_large_to_be_exact_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Moved(
        *SUMS[:3],
        lambda s: torch.stack([s, doubled(s, 6)])[1],
        lambda s: torch.cat([doubled(s, 6), s], 2),
        lambda s: doubled(1 - s, 5),  # 32
    )
    module = Tracer(classifier(network), encoding="direct", uint8=True).folded(2)
    largest = 64 * 127 * 4 * 9  # of 64 times a spike
    for exact, branches in ((largest, (0, 1, 5)), (largest + 1, (0, 1, 2, 3, 5))):
        monkeypatch.setattr(quantisation, "_EXACT", exact)
        assert list(spiking_convolutions(module).values()) == [f"branches.{k}.0" for k in branches]


def written_over(value: Tensor) -> Tensor:
    """A part of it, in a view."""
    value[:, :, 0].mul_(0.5)
    return value


def overwritten(value: Tensor) -> Tensor:
    """A view of what is written over after that."""
    view = value.mT
    value *= 0.5
    return view


def overwritten_behind_dropout(value: Tensor) -> Tensor:
    """What dropout hands on as it is, in inference, written over."""
    handed_on = nn.functional.dropout(value, 0.5, training=False)
    handed_on *= 0.5
    return value


def given_as_output(value: Tensor) -> Tensor:
    """A view of what another operation writes its result to."""
    view = value.mT
    torch.cat([value.roll(1, 4) * 0.5], out=value)
    return view


def overwritten_in_a_list(value: Tensor) -> Tensor:
    torch._foreach_mul_([value], 0.5)
    return value


def test_what_is_no_longer_spikes_stays_in_float32() -> None:
    network = Moved(
        lambda s: written_over(s + s.roll(1, 4)),
        lambda s: written_over(s.clone()) + s,
        lambda s: written_over(s.clone()),
        lambda s: overwritten(s.clone()),
        lambda s: overwritten_behind_dropout(s.clone()),
        lambda s: given_as_output(s.clone()),
        lambda s: overwritten_in_a_list(s.clone()),
        lambda s: nn.functional.dropout(s + s, 0.5, training=True),
        lambda s: s - s.roll(1, 4),
        lambda s: torch.add(s, s.roll(1, 4), alpha=2),
        lambda s: s + 0.5,
        lambda s: s + -1,
        lambda s: 1 - (s + s.roll(1, 4)),
        lambda s: 2 - s,
        lambda s: torch.rsub(s, 1, alpha=2),
        lambda s: s * 0.5 + s,
        lambda s: doubled(s, 7),  # 128
        lambda s: s.mean(2, keepdim=True),
        lambda s: s.cumsum(0).chunk(2, 2)[0],
        lambda s: torch.stack([s, s * 0.5]).sum(0),
        lambda s: torch.stack([s, s * 0.5])[1],
        lambda s: nn.functional.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2]),
        lambda s: (s + s).clamp(0.5, 1),
        lambda s: (s + s).clamp(max=0.5),
        lambda s: (s + s).clamp(max=-1),
        lambda s: torch.maximum(s, s * 0.5),
        lambda s: (s * 0.5 > s.roll(1, 4)).float(),  # the left is not followed
        lambda s: either(s, s) - either(s + s, s),
        lambda s: torch.sub(s + s, s * s, alpha=2),
        lambda s: (s + s.roll(1, 4)) - s * s.flip(3),
    )
    assert not spiking_convolutions(Tracer(classifier(network), encoding="direct", uint8=True).folded(2))


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, match: str, config: ExportConfig, given: Any, network: Any = None) -> None:
    with shared_traces(), pytest.raises(ValueError, match=match):
        export_model(network or convsnn(), tmp_path / "m.onnx", config, digits().images[:60], calibration=given)
    assert not list(tmp_path.iterdir())


INT8 = ExportConfig(T=3, trained_T=3, precision="int8")


def test_what_int8_needs(tmp_path: Path) -> None:
    refused(tmp_path, "give some as calibration", INT8, None)
    pair = r"calibration must be a pair, \(images, labels\) or \(images, None\), got "
    refused(tmp_path, f"{pair}ndarray$", INT8, calibration()[0])
    refused(tmp_path, f"{pair}tuple$", INT8, calibration()[:1])
    few = r"at least 32 images of the training set, got 31 \(another --data may have more\); use --precision fp32$"
    refused(tmp_path, few, INT8, calibration(31))
    refused(tmp_path, r"takes images \(1, 8, 8\), got \(1, 8, 9\)", INT8, (np.zeros((40, 1, 8, 9), np.uint8), None))
    refused(tmp_path, "40 images, 39 labels", INT8, (digits().images[-40:], digits().labels[-39:]))
    with pytest.raises(ValueError, match="int8 needs BN folded"):
        ExportConfig(precision="int8", fold_bn=False)
    with pytest.raises(ValueError, match="unknown precision 'int4'; choose one of fp32, fp16, int8"):
        ExportConfig(precision="int4")  # type: ignore[arg-type]


def test_a_temporary_folder_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
    full = r"cannot write a temporary file in .+: No space left on device; set TMPDIR to a folder with room"
    with shared_traces(), pytest.raises(OSError, match=full):
        export_model(convsnn(), tmp_path / "m.onnx", INT8, digits().images[:60], calibration=calibration())


@pytest.mark.parametrize(("layout", "runs"), [("dynamic", "any T, which each call says"), ("step", "one step a call")])
@pytest.mark.parametrize("file_format", ["onnx", "triton-repository"])
def test_T_of_a_graph_that_has_none_is_warned_of(layout: str, runs: str, file_format: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"--T has no effect with --layout {layout}, whose graph runs {runs}"):
        command_helpers.refused("export", "absent", "--layout", layout, "--T", "3", "--format", file_format)


def test_calibrate_goes_with_int8() -> None:
    assert "--calibrate goes with --precision int8" in command_helpers.refused("export", "--calibrate", "64", code=2)
    output = command_helpers.refused("export", "--precision", "int8", "--calibrate", MIN_IMAGES - 1, code=2)
    assert f"{MIN_IMAGES - 1} is not in the range x>={MIN_IMAGES}" in output


def test_a_network_without_convolutions_of_spikes_is_refused(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.lif = DirectEncoding(nn.Conv2d(1, 4, 3)), LIF()
            self.readout = OverTime(nn.Flatten(), nn.Linear(4 * 36, 10))

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            logits: Tensor = self.readout(self.lif(self.encode(x, T)))
            return logits

    why = "no convolution of the network is seen to read spikes or sums of spikes alone.* so none can run in int8"
    refused(tmp_path, f"{why}; use --precision fp32$", INT8, calibration(), classifier(Dense()))
    config = TrainConfig(T=2, epochs=1, qat=True, device="cpu", batch_size=64)
    with pytest.raises(Int8Error, match=f"{why}; leave out --qat$"):
        train(classifier(Dense()), digits(), None, config, tmp_path / "run", progress=False)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_processors_without_vnni_compute_the_same(processor: str, tmp_path: Path) -> None:
    """Emulated: Nehalem has no AVX, Haswell AVX2 alone. 8-bit products may saturate there; those with spikes do not."""
    path = int8_exported("unrolled")
    result = tmp_path / "result.json"
    run_emulated(processor, "-m", "tetdeploy", "validate", path, "--json", result)
    row = json.loads(result.read_text())["rows"][-1]
    assert row["T"] == 3 and row["top1_agreement"] == 1.0 and row["spike_count_error"] == 0.0
    assert row["max_abs_logit_error"] < 1e-5
