"""Operations against loops over every weight and position, and against PyTorch's own spikes; then the bills."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import (
    SideBySide,
    classifier,
    convsnn,
    digits,
    engine,
    frames,
    needs_torch_2_13,
    shared_traces,
    unchecked,
)
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tetdeploy.energy import (
    Layer,
    Operations,
    axis_fan_out,
    layers_of,
    other_ops,
    other_ops_pj,
    uncounted_layers,
)
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.export.config import Layout
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.model import build_graph
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import Classifier
from tetdeploy.neurons import LIF
from tetdeploy.picojoules import CONSTANTS, EnergyConstants, energy_constants

Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------------------------------- fan-out by brute force


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int], int]:
    """One axis of a convolution: size, kernel, stride, pads, dilation."""
    size, kernel, stride, dilation = (draw(st.integers(1, top)) for top in (7, 4, 3, 3))
    pads = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    assume(size + sum(pads) >= dilation * (kernel - 1) + 1)
    return size, kernel, stride, pads, dilation


def taps(size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int) -> list[tuple[int, int]]:
    """(input position, output position) of every multiplication with a real input, along one axis."""
    found = []
    start = 0
    while start + dilation * (kernel - 1) < size + sum(pads):
        for k in range(kernel):
            position = start + k * dilation - pads[0]
            if 0 <= position < size:
                found.append((position, start // stride))
        start += stride
    return found


@given(axes())
def test_axis_fan_out_counts_every_tap(axis: tuple[int, int, int, tuple[int, int], int]) -> None:
    counted = np.zeros(axis[0], int)
    for position, _ in taps(*axis):
        counted[position] += 1
    assert axis_fan_out(*axis).tolist() == counted.tolist()


def test_axis_fan_out_by_hand() -> None:
    assert axis_fan_out(4, 3, 1, (1, 1), 1).tolist() == [2, 3, 3, 2]
    assert axis_fan_out(5, 3, 2, (0, 0), 1).tolist() == [1, 1, 2, 1, 1]
    assert axis_fan_out(5, 2, 3, (0, 0), 1).tolist() == [1, 1, 0, 1, 1]  # a stride beyond the kernel skips inputs
    assert axis_fan_out(5, 3, 1, (0, 0), 2).tolist() == [1, 0, 1, 0, 1]


@settings(max_examples=60)
@given(st.data(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_a_convolutions_operations_are_those_of_a_loop(
    data: st.DataObject, dims: int, groups: int, in_per_group: int, out_per_group: int, seed: int
) -> None:
    shape_axes = [data.draw(axes()) for _ in range(dims)]
    size, kernel, strides, pads, dilations = (tuple(part) for part in zip(*shape_axes, strict=True))
    rng = np.random.default_rng(seed)
    spikes = rng.random((3, 2, groups * in_per_group, *size)) < 0.4  # [T, N, C, *spatial]
    layer = Layer("conv", spikes.shape[2:], out_per_group, kernel, strides, pads, dilations)
    expected = np.zeros(3)
    dense = 0
    for group, c_in, _c_out in itertools.product(range(groups), range(in_per_group), range(out_per_group)):
        for hits in itertools.product(*(taps(*axis) for axis in shape_axes)):
            position = tuple(hit[0] for hit in hits)
            expected += spikes[(slice(None), slice(None), group * in_per_group + c_in, *position)].sum(1)
            dense += 1
    operations = Operations((layer,))
    operations.add({"active.conv": spikes.sum(2).astype(np.float32)}, 2, 3)
    np.testing.assert_array_equal(operations.counts["conv"], expected)
    assert layer.dense_ops() == dense


@given(st.integers(1, 2), st.integers(1, 2), st.data())
def test_the_output_size_is_torchs(groups: int, dims: int, data: st.DataObject) -> None:
    """With ones for inputs and weights, torch's own sum of outputs is the number of operations."""
    shape_axes = [data.draw(axes()) for _ in range(dims)]
    size, kernel, strides, pads, dilations = (tuple(part) for part in zip(*shape_axes, strict=True))
    layer = Layer("conv", (2 * groups, *size), 3, kernel, strides, pads, dilations)
    x = nn.functional.pad(torch.ones(1, 2 * groups, *size), [p for pair in reversed(pads) for p in pair])
    weight = torch.ones(3 * groups, 2, *kernel)
    convolve = nn.functional.conv1d if dims == 1 else nn.functional.conv2d
    assert layer.dense_ops() == int(convolve(x, weight, None, strides, 0, dilations, groups).sum())


def test_a_linear_layers_operations() -> None:
    layer = Layer("fc", (5,), 3)
    assert layer.fan_out() == 3 and layer.dense_ops() == 15
    tokens = Layer("fc", (5,), 3, positions=4)
    assert tokens.dense_ops() == 60
    assert Layer("fc", (5,), 3, positions=2).counter_axes == (2,)
    operations = Operations((layer,))
    operations.add({"active.fc": np.array([[2.0, 3.0], [0.0, 5.0]])}, 2, 2)  # [T, N]
    assert operations.counts["fc"].tolist() == [15.0, 15.0]
    of_tokens = Operations((tokens,))
    of_tokens.add({"active.fc": np.array([[[1.0, 0.0, 4.0, 3.0]]])}, 1, 1)  # [T, N, positions]
    assert of_tokens.counts["fc"].tolist() == [24.0] and of_tokens.input_rate(tokens, 1) == 8 / 20


def test_sums_are_exact_where_float32_is_not() -> None:
    layer = Layer("fc", (2**25,), 1)
    operations = Operations((layer,))
    operations.add({"active.fc": np.array([[2.0**24, 1.0]], np.float32)}, 2, 1)
    assert operations.counts["fc"].tolist() == [2.0**24 + 1] and operations.input_rate(layer, 1) == (2**24 + 1) / 2**26


@pytest.mark.parametrize(("size", "kernel", "pad"), [(10**9, 3, 1), (5, 10**9, 0), (5, 3, 2**60), (2**15, 3, 1)])
def test_a_layer_that_claims_more_than_memory_holds_is_refused(size: int, kernel: int, pad: int) -> None:
    with pytest.raises(ValueError, match=r"^conv: its sizes claim more than 268,435,456 positions$"):
        Layer("conv", (4, size, size), 6, (kernel, 3), (1, 1), ((pad, pad), (1, 1)), (1, 1))
    with pytest.raises(ValueError, match=r"^fc: its sizes claim"):
        Layer("fc", (5,), 3, positions=2**62)


def test_layers_survive_json() -> None:
    layer = Layer("a.b", (4, 8, 9), 6, (3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), from_input=True, binary=False)
    for one in (layer, Layer("fc", (5,), 3, positions=7)):
        assert Layer.from_dict(json.loads(json.dumps(one.to_dict()))) == one


# ------------------------------------------------------------------------------------------------ the bills


def test_the_two_bills_by_hand() -> None:
    layers = (
        Layer("first", (4,), 10, from_input=True, binary=False),
        Layer("spikes", (6,), 5),
        Layer("pooled", (7,), 2, binary=False),
    )
    operations = Operations(layers)
    operations.add({"active.spikes": np.array([[1.0], [3.0]]), "active.pooled": np.array([[4.0], [0.0]])}, 1, 2)
    operations.add({"active.spikes": np.array([[5.0], [1.0]]), "active.pooled": np.array([[0.0], [7.0]])}, 1, 2)
    one, two = operations.at(1), operations.at(2)
    # Two images: the first layer does 40 a step whatever the image, the others what fired.
    assert (one.mac_ops, one.ac_ops, one.analogue_ac_ops) == (40.0, (5 * 6 + 2 * 4) / 2, 2 * 4 / 2)
    assert (two.mac_ops, two.ac_ops, two.analogue_ac_ops) == (80.0, (5 * 10 + 2 * 11) / 2, 2 * 11 / 2)
    assert (operations.input_rate(layers[1], 1), operations.input_rate(layers[1], 2)) == (6 / (6 * 2), 10 / (6 * 2 * 2))
    assert (CONSTANTS["fp32"].ac_pj, CONSTANTS["fp32"].mac_pj) == (0.9, 4.6)
    assert two.energy_pj == pytest.approx(36 * 0.9 + 80 * 4.6)
    assert two.energy_exact_pj == pytest.approx(25 * 0.9 + (80 + 11) * 4.6)
    assert two.energy_once_pj == two.energy_pj  # no layer is computed once


def test_a_first_layer_reads_every_pixel_at_every_step() -> None:
    first = Layer("first", (4,), 10, from_input=True, binary=False)
    operations = Operations((first,))
    operations.add({}, 3, 2)
    assert operations.input_rate(first, 1) == operations.input_rate(first, 2) == 1


def test_each_layer_is_billed_at_its_own_precision() -> None:
    operations = Operations((Layer("exact", (6,), 5), Layer("rounded", (7,), 2, precision="int8")))
    operations.add({"active.exact": np.array([[4.0]]), "active.rounded": np.array([[3.0]])}, 1, 1)
    assert operations.at(1).energy_pj == pytest.approx(4 * 5 * 0.9 + 3 * 2 * 0.1)
    assert operations.ann()["energy_pj"] == pytest.approx(6 * 5 * 4.6 + 7 * 2 * 0.3)


def test_of_one_constant_that_is_given_the_other_stays_each_layers_own() -> None:
    layers = (Layer("first", (6,), 5, from_input=True), Layer("rounded", (7,), 2, binary=False, precision="int8"))
    operations = Operations(layers, constants=energy_constants("int8", ac_pj=0.2))
    operations.add({"active.rounded": np.array([[3.0]])}, 1, 1)
    assert operations.at(1).energy_pj == pytest.approx(30 * 4.6 + 6 * 0.2)
    assert operations.at(1).energy_exact_pj == pytest.approx(30 * 4.6 + 6 * 0.3)
    assert operations.ann()["energy_pj"] == pytest.approx(30 * 4.6 + 14 * 0.3)
    given = dataclasses.replace(operations, constants=energy_constants("int8", ac_pj=0.2, mac_pj=0.3))
    assert given.at(1).energy_pj == pytest.approx(30 * 0.3 + 6 * 0.2)


def two_layers(once: bool = True, **options: Any) -> Operations:
    """Five steps of two images: a first layer of 40 operations a step, and one where 1, 2, 3, 4, 5 spikes reach 6."""
    first = Layer("first", (4,), 10, from_input=True, binary=False, once=once)
    operations = Operations((first, Layer("second", (7,), 6)), **options)
    operations.add({"active.second": np.arange(1.0, 6.0)[:, None].repeat(2, axis=1)}, 2, 5)
    return operations


def test_the_third_bill_pays_for_what_the_engine_computes() -> None:
    spikes = 6 * (1 + 2 + 3 + 4 + 5)
    assert two_layers().at(5).energy_once_pj == pytest.approx(spikes * 0.9 + 40 * 4.6)
    assert two_layers(once=False).at(5).energy_once_pj == pytest.approx(spikes * 0.9 + 5 * 40 * 4.6)
    # A graph with state runs two steps a call, and the first layer in each of the three calls.
    assert two_layers(chunk=2).at(5).energy_once_pj == pytest.approx(spikes * 0.9 + 3 * 40 * 4.6)
    assert two_layers(chunk=2).at(2).energy_once_pj == pytest.approx(6 * 3 * 0.9 + 40 * 4.6)


def test_layers_add_up_and_the_twin_multiplies_every_input_once() -> None:
    operations = two_layers(constants=EnergyConstants(2.0, 3.0, "ours"))
    first, second = operations.by_layer((1, 5))
    assert [row["T"] for row in first["rows"]] == [1, 5]
    assert first["rows"][1] == {
        "T": 5,
        "ac_ops": 0,
        "mac_ops": 200,
        "energy_pj": 600,
        "energy_exact_pj": 600,
        "energy_once_pj": 120,
        "input_rate": 1,
    }
    assert (second["rows"][0]["ac_ops"], second["rows"][0]["energy_pj"]) == (6, 12)
    assert second["rows"][1]["input_rate"] == pytest.approx((1 + 2 + 3 + 4 + 5) / (5 * 7))
    assert (first["fan_out"], second["weights"], second["dense_ops"]) == (10, 42, 42)
    assert operations.ann() == {"mac_ops": 82, "energy_pj": 246}
    assert operations.at(5).energy_pj == first["rows"][1]["energy_pj"] + second["rows"][1]["energy_pj"]


def test_what_is_said_of_a_convolution() -> None:
    conv = Layer("conv", (2, 4), 3, (3,), (1,), ((1, 1),), (1,))  # a tap falls outside at either end
    operations = Operations((conv,))
    operations.add({"active.conv": np.array([[[1.0, 0.0, 2.0, 0.0]]])}, 1, 1)
    (said,) = operations.by_layer((1,))
    assert (said["fan_out"], said["weights"], said["dense_ops"]) == (3 * (2 + 3 + 3 + 2) / 4, 2 * 3 * 3, 2 * 3 * 10)
    assert (said["rows"][0]["ac_ops"], said["rows"][0]["input_rate"]) == (6 * 1 + 9 * 2, 3 / 8)
    assert operations.ann() == {"mac_ops": 60, "energy_pj": pytest.approx(60 * 4.6)}


def test_what_no_bill_includes() -> None:
    metadata = {
        "neurons": [{"tau": 0.5, "shape": [3, 4]}, {"tau": 1.0, "shape": [10]}],
        "other_ops": {"bias_adds": {"a": 7, "b": 8}, "residual_adds": {"c": 20}, "batch_norm_macs": {"d": 5}},
    }
    counted = {"bias_adds": 15, "residual_adds": 20, "batch_norm_macs": 5, "neuron_ops": 12 * 5 + 10 * 4}
    assert other_ops(metadata) == counted
    # LIF: tau u and h s multiply; + I, > v_th and h - h s add. IF has no tau u.
    assert other_ops_pj(metadata, EnergyConstants(1.0, 10.0, "ours")) == {
        "bias_adds": 15,
        "residual_adds": 20,
        "batch_norm_macs": 50,
        "neuron_ops": 12 * (2 * 9 + 3) + 10 * (9 + 3),
    }


def test_only_layers_are_missing_in_the_energies() -> None:
    named = ["conv_transpose", "mix(2)", "mix(2) (residual_adds)", "bn (batch_norm_macs)", "conv (bias_adds)"]
    assert uncounted_layers(named) == ["conv_transpose", "mix(2)"]


# ------------------------------------------------------------------------------------------------ the constants


def test_the_constants_of_a_precision_and_of_ones_own() -> None:
    assert energy_constants() is CONSTANTS["fp32"]
    assert "ISSCC 2014" in CONSTANTS["fp32"].source and "ISSCC 2014" in CONSTANTS["int8"].source
    int8 = energy_constants("int8")
    assert (int8.ac_pj, int8.mac_pj) == (0.1, pytest.approx(0.2 + 0.1))
    half = energy_constants("int8", ac_pj=0.03)
    assert (half.ac_pj, half.mac_pj) == (0.03, 0.3)
    assert half.source.startswith("given: ac_pj 0.03; the other by precision: M. Horowitz")
    assert energy_constants(ac_pj=1, mac_pj=1).mac_pj == 1  # as of a processor that multiplies in any case
    assert energy_constants(mac_pj=1e12).mac_pj == 1e12
    assert json.dumps(energy_constants(ac_pj=np.float32(0.5), mac_pj=2).ac_pj) == "0.5"  # of any kind of number
    assert energy_constants("fp4", ac_pj=1, mac_pj=2) == EnergyConstants(1, 2, "given: ac_pj 1, mac_pj 2")


@pytest.mark.parametrize(("precision", "own", "match"), [
    ("fp4", {}, "no cited energies for precision 'fp4', only for fp32, fp16, int8; give your own with --ac-pj"),
    ("fp4", {"ac_pj": 1.0}, "no cited energies for precision 'fp4'"),
    ("fp32", {"ac_pj": 0.0}, "ac_pj must be a positive number of picojoules, at most a joule, got 0"),
    ("fp32", {"mac_pj": -1.0}, "mac_pj must be a positive number of picojoules, at most a joule, got -1"),
    ("fp32", {"mac_pj": 1e300}, "mac_pj must be a positive number of picojoules, at most a joule, got 1e"),
    ("fp32", {"mac_pj": float("nan")}, "mac_pj must be a positive number of picojoules, at most a joule, got nan"),
    ("fp32", {"ac_pj": "1", "mac_pj": "2"}, "ac_pj must be a number, got '1'"),
    ("fp32", {"ac_pj": 5.0}, "contains an accumulate, so mac_pj must be at least ac_pj=5.0; got 4.6"),
    ("int8", {"ac_pj": 0.5}, "mac_pj must be at least ac_pj=0.5; got 0.3; give mac_pj as well"),
    ("int8", {"mac_pj": 0.5}, "mac_pj must be at least ac_pj=0.9; got 0.5"),  # of its layers of float32
])  # fmt: skip
def test_constants_that_cannot_be(precision: str, own: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        energy_constants(precision, **own)


# ---------------------------------------------------------------------------------------- against PyTorch's spikes


class Analogue(nn.Module):
    """Average pooling, sums of spikes, strides, groups, dilation: layers whose input is not binary."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1, bias=False), tdBN(8, v_th=0.6))
            self.strided = OverTime(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), tdBN(8, v_th=0.6))
            self.dilated = OverTime(nn.AvgPool2d(2, 1), nn.Conv2d(8, 4, 2, dilation=2, padding=(0, 1)), tdBN(4))
            self.summed = OverTime(nn.Conv2d(8, 4, 1, stride=2), tdBN(4))
            self.masked = OverTime(nn.MaxPool2d(2, 1, padding=1), nn.ZeroPad2d((1, 0, 0, 0)), nn.Conv2d(4, 4, 2))
            self.readout = nn.Linear(12 + 24, 10)
        self.lif = LIF(v_th=0.6)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        a = self.lif(self.encode(x, T))
        b = self.lif(self.strided(a))
        c = self.lif(self.dilated(b))
        d = self.lif(self.summed(b + b * a[..., ::2, ::2]))
        return self.readout(torch.cat([c.flatten(2), self.masked(d).flatten(2)], dim=2))


def torch_operations(net: Classifier, x: Array, T: int, batch_first: Sequence[str] = ()) -> dict[str, Array]:
    """Operations `[T]` by layer, from each layer's input and torch's own convolution with ones for weights.

    Args:
        batch_first: layers that read `[N * T, ...]` or `[N, T, ...]`.
    """
    found: dict[str, Array] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            (value,) = inputs
            active = (value != 0).float()
            if isinstance(module, nn.Linear):
                ops = active.sum(-1) * module.out_features
            else:
                assert isinstance(module, nn.Conv2d)
                ones, geometry = torch.ones_like(module.weight), (module.stride, module.padding, module.dilation)
                ops = nn.functional.conv2d(active, ones, None, *geometry, module.groups)
            by_step = ops.reshape(len(x), T, -1).transpose(0, 1) if name in batch_first else ops
            found[name] = by_step.double().reshape(T, -1).sum(1).numpy()

        return hook

    layers = {
        name: m
        for name, m in net.network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and not name.startswith("encode")
    }
    hooks = [m.register_forward_hook(count(name)) for name, m in layers.items()]
    with torch.no_grad():
        tensor = torch.from_numpy(x)
        net(tensor[:, :T].transpose(0, 1)) if x.ndim == 5 else net(tensor, T)
    for hook in hooks:
        hook.remove()
    return found


def counted(runner: Engine, x: Array, T: int) -> Operations:
    operations = Operations(tuple(Layer.from_dict(layer) for layer in runner.metadata["layers"]))
    half = len(x) // 2
    for part in (x[:half], x[half:]):  # two batches of different sizes
        operations.add(runner.count(part, T)[1], len(part), T)
    return operations


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("unrolled", {"T": 4}),
    ("dynamic", {}),
    ("step", {}),
    ("unrolled", {"T": 3, "with_state": True}),
    ("step", {"encoding": "frames"}),
    ("unrolled", {"T": 4, "encoding": "frames"}),
]


@pytest.mark.parametrize(("layout", "options"), COUNTED)
def test_counts_are_those_of_pytorchs_spikes(layout: str, options: dict[str, Any]) -> None:
    x = frames(31, 4) if options.get("encoding") == "frames" else digits().images[:31]
    operations = counted(engine(layout, **options), x, 4)
    expected = torch_operations(convsnn(), x, 4)
    assert set(expected) == {"layer2.0", "layer3.1", "readout.2"}
    for name, ops in expected.items():
        assert ops.min() > 0
        np.testing.assert_array_equal(operations.counts[name], ops)
    # The first layer: 8 channels out, 3x3 taps at 8x8 positions less those that fall outside, at every step.
    np.testing.assert_array_equal(operations.counts["encode.0"], np.full(4, 31 * 8 * 22 * 22))
    for T in range(1, 5):
        count = operations.at(T)
        assert count.mac_ops == T * 8 * 22 * 22
        assert count.ac_ops == pytest.approx(sum(ops[:T].sum() for ops in expected.values()) / 31, rel=1e-12)
        assert count.analogue_ac_ops == 0


@pytest.mark.parametrize(
    ("layout", "fold_bn"), [("unrolled", True), ("unrolled", False), ("dynamic", True), ("step", True)]
)
def test_counts_with_inputs_that_are_not_binary(layout: str, fold_bn: bool, tmp_path: Path) -> None:
    net, x, T = classifier(Analogue()), digits().images[:40], 5
    config = ExportConfig(layout=layout, T=T, fold_bn=fold_bn)  # type: ignore[arg-type]
    made = export_model(net, tmp_path / "m.onnx", config, x)
    runner = Engine(made.path, threads=1)
    layers = {layer["name"]: layer for layer in runner.metadata["layers"]}
    assert {name: layer["binary"] for name, layer in layers.items()} == {
        "encode.0": False,
        "strided.0": True,
        "dilated.1": False,
        "summed.0": False,
        "masked.2": True,
        "readout": False,
    }
    operations, expected = counted(runner, x[:21], T), torch_operations(net, x[:21], T)
    assert set(expected) == set(layers) - {"encode.0"}
    for name, ops in expected.items():
        assert ops.min() > 0
        np.testing.assert_array_equal(operations.counts[name], ops, err_msg=name)
    analogue = sum(expected[name].sum() for name in ("dilated.1", "summed.0", "readout")) / 21
    assert operations.at(T).analogue_ac_ops == pytest.approx(analogue, rel=1e-12)


@pytest.mark.parametrize(("layout", "options"), COUNTED)
def test_counting_changes_no_answer_and_counts_spikes(layout: str, options: dict[str, Any]) -> None:
    x = frames(9, 4) if options.get("encoding") == "frames" else digits().images[:9]
    runner = engine(layout, **options)
    result, counts = runner.count(x, 4)
    np.testing.assert_array_equal(result.per_step, runner.run(x, 4).per_step)
    spikes: list[Tensor] = []
    neurons = [m for m in convsnn().modules() if isinstance(m, LIF)]
    hooks = [m.register_forward_hook(lambda m, i, o: spikes.append(o)) for m in neurons]
    with torch.no_grad():
        tensor = torch.from_numpy(x)
        convsnn()(tensor.transpose(0, 1)) if x.ndim == 5 else convsnn()(tensor, 4)
    for hook in hooks:
        hook.remove()
    for name, fired in zip(("lif1", "lif2", "lif3"), spikes, strict=True):
        np.testing.assert_array_equal(counts[f"fired.{name}"], fired.flatten(2).sum(-1).numpy())
    layers = ("layer2.0", "layer3.1", "readout.2")
    assert set(counts) == {f"active.{name}" for name in layers} | {f"fired.lif{k}" for k in (1, 2, 3)}


class BatchFirst(nn.Module):
    """Layers run on `[N, T, ...]`, or on `[N * T, ...]` as in the authors' code; neurons on `[T, N, ...]`."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(13)
            first = nn.Conv2d(1, 4, 3, padding=1)
            self.encode = OverTime(first) if encoding == "frames" else DirectEncoding(first)
            self.summed, self.strided = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2)
            self.tokens, self.hidden, self.readout = nn.Linear(9, 4), nn.Linear(24, 12), nn.Linear(12, 10)
        self.lif = LIF(v_th=0.2)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        swapped = self.lif(self.encode(x) if T is None else self.encode(x, T)).transpose(0, 1)
        steps, merged = swapped.shape[:2], swapped.flatten(0, 1)
        merged = self.strided(merged + self.summed(merged).relu())
        spikes = self.lif(merged.unflatten(0, steps).transpose(0, 1))
        spikes = self.lif(self.tokens(spikes.flatten(3).transpose(0, 1)).transpose(0, 1))
        hidden = self.hidden(spikes.flatten(2).transpose(0, 1).flatten(0, 1))
        logits: Tensor = self.readout(self.lif(hidden.unflatten(0, steps).transpose(0, 1)))
        return logits


@pytest.mark.parametrize(("layout", "options"), COUNTED)
def test_layers_that_run_batch_first_count_each_step(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    encoding = options.get("encoding", "direct")
    x = frames(31, 4) if encoding == "frames" else digits().images[:31]
    data, config = digits(), convsnn().config
    net = Classifier(
        BatchFirst(encoding), config=config, mean=data.mean, std=data.std, class_names=data.class_names
    ).eval()
    graph, *_ = build_graph(net, ExportConfig(layout=layout, **options))  # type: ignore[arg-type]
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    assert graph.description["uncounted"] == []
    expected = torch_operations(net, x, 4, batch_first=("summed", "strided", "tokens", "hidden"))
    assert set(expected) == {"summed", "strided", "tokens", "hidden", "readout"}
    for native in (False, True):
        operations = counted(Engine(path, threads=1, native=native), x, 4)
        for name, ops in expected.items():
            assert len({*ops}) > 1  # the steps can be told apart
            np.testing.assert_array_equal(operations.counts[name], ops, err_msg=name)


class TokensFirst(nn.Module):
    """A layer on `[tokens * T * N, ...]`, and one for which the order is undone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 10)
        self.lif = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.embed(x.squeeze(1))
        spikes = self.lif(current.unsqueeze(0).expand(T, *current.shape)).permute(2, 0, 1, 3)
        mixed = self.mlp(spikes.flatten(0, 2)).unflatten(0, spikes.shape[:3])
        return self.head(mixed.relu().permute(1, 2, 0, 3)).mean(2)


@pytest.mark.parametrize(("layout", "uncounted"), [("unrolled", ["mlp"]), ("dynamic", ["mlp"]), ("step", [])])
def test_a_layer_with_more_than_the_batch_before_its_steps_is_named(
    layout: str, uncounted: list[str], tmp_path: Path
) -> None:
    config = ExportConfig(layout=layout, T=4)  # type: ignore[arg-type]
    metadata = unchecked(TokensFirst(), tmp_path / "m.onnx", config).metadata
    assert metadata["uncounted"] == uncounted
    assert {layer["name"] for layer in metadata["layers"]} == {"embed", "mlp", "head"} - set(uncounted)


def written_in_parts(a: Tensor) -> Tensor:
    made = torch.zeros_like(a)
    made[:, :, 1:] = a[:, :, :1]
    made[:, :, :1, ::2] = 1 - a[:, :, 1:, 1::2]
    made[..., 0] = a[..., 3]
    return made


def written_at_a_step(a: Tensor) -> Tensor:
    made = a.clone()
    made[:1] = 1 - a[:1]
    return made


def patches(a: Tensor) -> Tensor:
    """Those of 2x2 pixels, as tokens."""
    return nn.functional.unfold(a.flatten(0, 1), 2, stride=2).mT.unflatten(0, a.shape[:2])


def pooled(a: Tensor, axes: int) -> Tensor:
    """The mean of each column, of images that lie channels last."""
    images = a.permute(0, 1, 4, 2, 3).flatten(0, 1)
    pool = getattr(nn.functional, f"adaptive_avg_pool{axes}d")
    means = pool({1: images.flatten(2), 2: images, 3: images.unsqueeze(2)}[axes], 1)
    return means.flatten(1).unflatten(0, a.shape[:2])[:, :, None, None]


Reading = Callable[[Tensor], Tensor]
# What a layer reads of spikes `[T, N, ...]`, and what is read of what it gives; by whether its steps can be told apart.
FOLLOWED: dict[str, tuple[Reading, Reading]] = {
    "two_in_a_step": (lambda a: torch.stack([a, 1 - a], 1), lambda y: y.sum(1)),
    "interleaved": (lambda a: a.repeat_interleave(2, 0), lambda y: y.unflatten(0, (-1, 2)).sum(1)),
    "late": (lambda a: torch.cat([torch.zeros_like(a[:1]), a[:-1]]), lambda y: y),
    "step_by_step": (lambda a: torch.stack([step.flip(2) for step in a]), lambda y: y),
    "written": (written_in_parts, lambda y: y),
    "written_at_a_step": (written_at_a_step, lambda y: y),
    "written_batch_first": (lambda a: written_in_parts(a.transpose(0, 1)), lambda y: y.transpose(0, 1)),
    "averaged": (lambda a: torch.stack([a, a.flip(2)], 2).mean(2), lambda y: y),
    "pooled_1d": (partial(pooled, axes=1), lambda y: y),
    "pooled_2d": (partial(pooled, axes=2), lambda y: y),
    "pooled_3d": (partial(pooled, axes=3), lambda y: y),
    "patches": (lambda a: patches(a), lambda y: y.unflatten(2, (2, 8))),
    "patches_batch_first": (lambda a: patches(a.transpose(0, 1)), lambda y: y.transpose(0, 1).unflatten(2, (2, 8))),
}
NOT_FOLLOWED: dict[str, tuple[Reading, Reading]] = {
    "two_streams": (lambda a: torch.stack([a, 1 - a]), lambda y: y.sum(0)),
    "tiled": (lambda a: a.repeat(2, 1, 1, 1, 1), lambda y: y.unflatten(0, (2, -1)).sum(0)),
    "expanded": (lambda a: a.expand(2, *a.shape), lambda y: y.sum(0)),
    "as_many_streams_as_steps": (lambda a: a.expand(3, *a.shape), lambda y: y.sum(0)),
    "one_step": (lambda a: a[0], lambda y: y),
    "step_by_step_batch_first": (lambda a: torch.stack([step.flip(2) for step in a], 1), lambda y: y.transpose(0, 1)),
}


FIXED_T = ("late", "step_by_step", "step_by_step_batch_first")  # torch.export cannot leave T open in these


class Joined(nn.Module):
    """A linear layer with each way to put spikes together before it."""

    def __init__(self, ways: dict[str, tuple[Reading, Reading]]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(15)
            self.first = nn.Conv2d(1, 2, 3, padding=1)
            self.layers = nn.ModuleDict({name: nn.Linear(8, 4, bias=False) for name in ways})
            self.readout = nn.Linear(64, 10)
        self.lif, self.ways = LIF(v_th=0.3), ways

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.first(x).expand(T, -1, -1, -1, -1))
        read = [after(self.layers[name](before(spikes))) for name, (before, after) in self.ways.items()]
        return self.readout(self.lif(torch.stack(torch.broadcast_tensors(*read)).sum(0)).flatten(2))


@cache
def joined(*names: str) -> Classifier:
    return classifier(Joined({name: (FOLLOWED | NOT_FOLLOWED)[name] for name in names}))


@pytest.mark.parametrize(("layout", "fold_bn"), [("unrolled", True), ("unrolled", False), ("dynamic", True)])
@needs_torch_2_13
def test_steps_are_told_apart_or_their_layer_is_named(layout: Layout, fold_bn: bool, tmp_path: Path) -> None:
    """A network is causal, so that its operations in T steps are those of the same network at this T."""
    ways = FOLLOWED | NOT_FOLLOWED
    if layout == "dynamic":
        ways = {name: way for name, way in ways.items() if name not in FIXED_T}
    net, x = joined(*ways), digits().images[:9]
    with shared_traces():
        runner = unchecked(net, tmp_path / "m.onnx", ExportConfig(layout=layout, T=3, fold_bn=fold_bn))
    assert set(runner.metadata["uncounted"]) == {f"layers.{name}" for name in ways.keys() & NOT_FOLLOWED}
    operations = counted(runner, x, 3)
    for T in (1, 2, 3):
        expected = torch_operations(net, x, T)
        for name in (f"layers.{name}" for name in ways.keys() & FOLLOWED):
            assert operations.counts[name][:T].sum() == expected[name].sum(), (name, T)


class TokensBehindSteps(nn.Module):
    """A layer on `[N, T * tokens, C]`, and one for which the order is undone."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(14)
            self.embed, self.mlp, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 10)
        self.lif = LIF(v_th=0.2)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.embed(x.squeeze(1))
        spikes = self.lif(current.unsqueeze(0).expand(T, *current.shape)).permute(0, 2, 1, 3)
        mixed = self.mlp(spikes.flatten(0, 1).transpose(0, 1)).transpose(0, 1).unflatten(0, (-1, 8))
        return self.head(mixed.permute(0, 2, 1, 3).relu()).mean(2)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
@needs_torch_2_13
def test_a_layer_that_has_steps_and_tokens_in_one_axis_counts_each_step(layout: str, tmp_path: Path) -> None:
    net, x = classifier(TokensBehindSteps()), digits().images[:9]
    graph, *_ = build_graph(net, ExportConfig(layout=layout, T=4))  # type: ignore[arg-type]
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    assert graph.description["uncounted"] == []
    operations = counted(Engine(path, threads=1), x, 4)
    expected = torch_operations(net, x, 4, batch_first=("mlp",))
    for name in ("mlp", "head"):
        np.testing.assert_array_equal(operations.counts[name], expected[name], err_msg=name)


class Rows(nn.Module):
    """The rows of the image as tokens, merged with the batch or not."""

    def __init__(self, seed: int, merged: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.mlp, self.readout = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(40, 10)
        self.lif, self.merged = LIF(v_th=0.3), merged

    def forward(self, x: Tensor, T: int) -> Tensor:
        rows = x.squeeze(1)
        current = self.embed(rows.flatten(0, 1)).unflatten(0, (-1, 8)) if self.merged else self.embed(rows)
        spikes = self.lif(current.unsqueeze(0).expand(T, *current.shape))
        mixed = self.mlp(spikes.flatten(0, 2)).view(T, -1, 8, 5) if self.merged else self.mlp(spikes)
        return self.readout(self.lif(mixed * 3).flatten(2))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_layer_on_tokens_counts_every_token(layout: str, tmp_path: Path) -> None:
    both = SideBySide(partial(Rows, merged=False), partial(Rows, merged=True))
    net, x, T = classifier(both), digits().images[:40], 8  # as many steps as tokens: not to be mistaken
    made = export_model(net, tmp_path / "m.onnx", ExportConfig(layout=layout, T=T), x)  # type: ignore[arg-type]
    assert made.uncounted == ()
    counts = counted(Engine(made.path, threads=1), x[:11], T).counts
    for k, network in enumerate(both.networks):
        spikes: list[Tensor] = []
        hook = network.lif.register_forward_hook(lambda m, i, o, spikes=spikes: spikes.append(o))
        with torch.no_grad():
            net(torch.from_numpy(x[:11]), T)
        hook.remove()
        np.testing.assert_array_equal(counts[f"networks.{k}.embed"], np.full(T, 11 * 8 * 8 * 6))
        np.testing.assert_array_equal(counts[f"networks.{k}.mlp"], spikes[0].flatten(1).sum(1).numpy() * 5)
        np.testing.assert_array_equal(counts[f"networks.{k}.readout"], spikes[1].flatten(1).sum(1).numpy() * 10)


class Unshuffled(nn.Module):
    """A convolution of spikes behind pixel_unshuffle."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(17)
            self.conv, self.readout = nn.Conv2d(4, 3, 3), nn.Linear(12, 10)
        self.lif = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(x.expand(T, *x.shape))
        parts = nn.functional.pixel_unshuffle(spikes.flatten(0, 1), 2)
        return self.readout(self.lif(self.conv(parts).unflatten(0, spikes.shape[:2])).flatten(2))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_spikes_unshuffled_are_counted(layout: str, tmp_path: Path) -> None:
    net, x, T = classifier(Unshuffled()), digits().images[:9], 4
    runner = unchecked(net.network, tmp_path / "m.onnx", ExportConfig(layout=layout, T=T))  # type: ignore[arg-type]
    assert runner.metadata["uncounted"] == []
    counts, expected = counted(runner, x, T).counts, torch_operations(net, x, T)
    for name in ("conv", "readout"):
        np.testing.assert_array_equal(counts[name], expected[name], err_msg=name)


class ShownBehindTheBatch(nn.Module):
    """Shows the image at each step as features, or as tokens, that are told apart again."""

    def __init__(self, repeated: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.repeated, self.encode, self.readout = repeated, nn.Linear(64, 32), nn.Linear(32, 10)
        self.lif = LIF(v_th=0.1)

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif(self.encode(self.repeated(x.flatten(1), T)).transpose(0, 1)))
        return logits


@pytest.mark.parametrize("repeated", [
    lambda x, T: x.repeat(1, T).view(-1, T, 64), lambda x, T: x.unsqueeze(1).repeat(1, T, 1),
])  # fmt: skip
def test_an_image_shown_behind_the_batch_counts_once_a_step(
    repeated: Callable[[Tensor, int], Tensor], tmp_path: Path
) -> None:
    x, T = digits().images[:9], 4
    runner = unchecked(ShownBehindTheBatch(repeated), tmp_path / "m.onnx", ExportConfig(T=T))
    assert runner.metadata["uncounted"] == []
    np.testing.assert_array_equal(counted(runner, x, T).counts["encode"], np.full(T, 9 * 64 * 32))


class AsFunctions(nn.Module):
    """Layers that forward calls as functions, two of them before a module that is named as they are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(18)
            self.kernel, self.other = nn.Parameter(torch.randn(1, 1, 3, 3)), nn.Parameter(torch.randn(1, 1, 3, 3))
            self.weight, self.conv = nn.Parameter(torch.randn(10, 64)), nn.Conv2d(1, 1, 3, padding=1)
        self.lif = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = nn.functional.conv2d(x, self.kernel, padding=1)
        spikes = self.lif(current.expand(T, *current.shape))
        current = nn.functional.conv2d(spikes.flatten(0, 1), self.other, padding=1)
        spikes = self.lif(self.conv(current).unflatten(0, spikes.shape[:2]) + spikes)
        return nn.functional.linear((spikes @ spikes.mT).flatten(2), self.weight)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_layers_that_are_functions_are_called_alike_in_every_layout(layout: str, tmp_path: Path) -> None:
    metadata = unchecked(AsFunctions(), tmp_path / "m.onnx", ExportConfig(layout=layout, T=4)).metadata  # type: ignore[arg-type]
    assert [layer["name"] for layer in metadata["layers"]] == ["conv#2", "conv#3", "conv", "matmul", "linear"]
    assert {name for kind in metadata["other_ops"].values() for name in kind} == {"conv", "add"}


# ------------------------------------------------------------------------ brute force, through the exported graph


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution along one or two axes of spikes `[4, 5, 6]` (or `[4, 5]`), or a linear layer on the last axis."""

    dims: int
    groups: int
    per_group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]

    def module(self) -> nn.Module:
        if self.dims == 0:
            return nn.Linear(6, self.per_group)
        pad, convolution = ((nn.ConstantPad1d, nn.Conv1d), (nn.ConstantPad2d, nn.Conv2d))[self.dims - 1]
        padding = tuple(side for pair in reversed(self.pads) for side in pair)
        options = {"stride": self.strides, "dilation": self.dilations, "groups": self.groups}
        made = convolution(4, self.per_group * self.groups, self.kernel, **options)  # type: ignore[arg-type]
        return OverTime(pad(padding, 0.0), made)

    def count(self, spikes: Array) -> Array:
        """Operations by step, one output after another: spikes `[T, N, 4, ...]` -> `[T]`."""
        ops = np.zeros(len(spikes), np.int64)
        if self.dims == 0:
            return ops + spikes.reshape(len(spikes), -1).sum(1) * self.per_group
        reach = [
            range(0, size + sum(pads) - dilation * (kernel - 1), stride)
            for size, pads, dilation, kernel, stride in zip(
                spikes.shape[3:], self.pads, self.dilations, self.kernel, self.strides, strict=True
            )
        ]
        channels = 4 // self.groups
        for output, start in itertools.product(range(self.per_group * self.groups), itertools.product(*reach)):
            group = output // self.per_group
            for channel, tap in itertools.product(range(channels), itertools.product(*map(range, self.kernel))):
                place = [
                    begin + k * dilation - pads[0]
                    for begin, k, dilation, pads in zip(start, tap, self.dilations, self.pads, strict=True)
                ]
                if all(0 <= one < size for one, size in zip(place, spikes.shape[3:], strict=True)):
                    ops += spikes[(slice(None), slice(None), group * channels + channel, *place)].sum(1)
        return ops


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    dims = draw(st.integers(0, 2))
    sizes = (5, 6)[2 - dims :]
    pads = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in sizes]
    dilations = [draw(st.integers(1, 2)) for _ in sizes]
    kernel = [
        draw(st.integers(1, (size + sum(pad) - 1) // dilation + 1).filter(lambda k: k <= 4))
        for size, pad, dilation in zip(sizes, pads, dilations, strict=True)
    ]
    strides = [draw(st.integers(1, 3)) for _ in sizes]
    return Geometry(
        dims,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(1, 2)),
        *(tuple(part) for part in (kernel, strides, pads, dilations)),  # type: ignore[arg-type]
    )


class Branches(nn.Module):
    """Layers side by side that all read the same spikes."""

    def __init__(self, layers: Sequence[Geometry]) -> None:
        super().__init__()
        self.geometries, self.lif = tuple(layers), LIF(v_th=0.4)
        self.encode = DirectEncoding(nn.Conv2d(1, 4, (4, 3), bias=False), tdBN(4))
        self.branches = nn.ModuleList(layer.module() for layer in layers)
        with torch.no_grad():
            width = self.features(torch.zeros(1, 1, 4, 5, 6)).shape[-1]
        self.readout = nn.Linear(width, 10)

    def features(self, spikes: Tensor) -> Tensor:
        read = (
            branch(spikes[..., 0, :] if layer.dims == 1 else spikes)
            for branch, layer in zip(self.branches, self.geometries, strict=True)
        )
        return torch.cat([value.flatten(2) for value in read], -1)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.features(self.lif(self.encode(x, T))))


@settings(
    max_examples=3,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an export each: shrinking would take minutes
)
@given(st.lists(geometries(), min_size=6, max_size=8), st.sampled_from([("unrolled", 3), ("dynamic", 3), ("step", 1)]))
def test_any_layer_counts_what_a_loop_counts(layers: list[Geometry], layout: tuple[str, int]) -> None:
    x, T = digits().images[:6], 3
    with tempfile.TemporaryDirectory() as folder:
        config = ExportConfig(layout=layout[0], T=layout[1])  # type: ignore[arg-type]
        runner = unchecked(Branches(layers), Path(folder) / "m.onnx", config)
    spikes = runner.run_with(spikes_overlay(["lif"]), x, T)[1]["spikes.lif"].astype(np.int64)
    assert spikes.shape == (T, 6, 4, 5, 6) and 0.02 < spikes.mean() < 0.98
    operations = Operations(layers_of(runner.metadata))
    operations.add(runner.count(x, T)[1], len(x), T)
    names = [name for name in operations.counts if name.startswith("branches")]
    assert len(names) == len(layers) and runner.metadata["uncounted"] == []
    for name, layer in zip(names, layers, strict=True):
        seen = spikes[..., 0, :] if layer.dims == 1 else spikes
        np.testing.assert_array_equal(operations.counts[name], layer.count(seen), err_msg=f"{name}: {layer}")


# ------------------------------------------------------------------------------------------------ against peers


class FixedT(nn.Module):
    """A classifier as others call it, with the images alone."""

    def __init__(self, inner: Classifier, T: int) -> None:
        super().__init__()
        self.inner, self.T = inner, T

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.T)


@cache
def compared() -> list[tuple[Classifier, Engine]]:
    """Two networks and their graphs: one of binary inputs behind the first layer, one of others too."""
    net = classifier(Analogue())
    with tempfile.TemporaryDirectory() as folder:
        made = export_model(net, Path(folder) / "m.onnx", ExportConfig(T=4), digits().images[:40])
        return [(convsnn(), engine("unrolled", T=4)), (net, Engine(made.path, threads=1))]


@pytest.mark.peer
def test_spikingjelly_counts_the_same_where_inputs_are_binary() -> None:
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="needs spikingjelly 2.0")
    x, T = digits().images[:31], 4
    for model, runner in compared():
        theirs = counters.SynOpCounter()
        with torch.no_grad(), counters.DispatchCounterMode([theirs]):
            model(torch.from_numpy(x), T)
        by_scope = {scope: sum(ops.values()) for scope, ops in theirs.get_counts().items()}
        operations = counted(runner, x, T)
        for layer in operations.layers:
            ours = operations.counts[layer.name].sum()
            assert ours > 0
            # It counts nothing where any input is neither 0 nor 1; we bill those apart.
            assert by_scope[f"Classifier.network.{layer.name}"] == (ours if layer.binary else 0), layer.name


@pytest.mark.peer
def test_neurobench_counts_the_same() -> None:
    """Effective ACs are ours of binary inputs; effective MACs those of the others, the first layer counted once."""
    metrics = pytest.importorskip("neurobench.metrics.workload", reason="needs neurobench")
    models = pytest.importorskip("neurobench.models.torch_model", reason="needs neurobench")
    x, T = digits().images[:8], 4  # few: it sums in float32, which rounds beyond 2^24
    for model, runner in compared():
        wrapped = models.TorchModel(FixedT(model, T))
        wrapped.register_hooks()
        with torch.no_grad():
            wrapped(torch.from_numpy(x))
        theirs = metrics.SynapticOperations()(wrapped, None, (torch.from_numpy(x), None))
        wrapped.cleanup_hooks()
        ours = counted(runner, x, T).at(T)
        assert theirs["Effective_ACs"] == ours.ac_ops - ours.analogue_ac_ops > 0
        assert theirs["Effective_MACs"] == ours.mac_ops - ours.repeated_mac_ops + ours.analogue_ac_ops > 0


# ------------------------------------------------------------------------------------------------ the documentation


def test_the_audits_of_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "energy.md"
    given = {"engine": engine("unrolled", T=4), "images": digits().images[:30], "labels": digits().labels[:30]}
    result = doctest.testfile(str(page), module_relative=False, globs=given, encoding="utf-8")
    assert result.attempted > 10 and result.failed == 0


@pytest.mark.parametrize("precision", CONSTANTS)
def test_the_constants_of_the_documentation(precision: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "energy.md").read_text(encoding="utf-8")
    constants = CONSTANTS[precision]
    assert f"| `{precision}` | {constants.ac_pj} pJ | {constants.mac_pj} pJ |" in page
