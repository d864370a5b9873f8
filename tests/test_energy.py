"""Operations against loops over every weight and position, and against PyTorch's own spikes; then the bills."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import classifier, convsnn, digits, engine, frames
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tetdeploy.energy import Layer, OperationCount, Operations, axis_fan_out
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import Classifier
from tetdeploy.neurons import LIF
from tetdeploy.picojoules import CONSTANTS

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


@settings(max_examples=60, deadline=None)
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


@settings(deadline=None)
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
    operations = Operations((layer,))
    operations.add({"active.fc": np.array([[2.0, 3.0], [0.0, 5.0]])}, 2, 2)  # [T, N]
    assert operations.counts["fc"].tolist() == [15.0, 15.0]


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
    assert (CONSTANTS["fp32"].ac_pj, CONSTANTS["fp32"].mac_pj) == (0.9, 4.6)
    assert two.energy_pj == pytest.approx(36 * 0.9 + 80 * 4.6)
    assert two.energy_exact_pj == pytest.approx(25 * 0.9 + (80 + 11) * 4.6)
    assert OperationCount(10.0, 2.0, 0.0).energy_pj == OperationCount(10.0, 2.0, 0.0).energy_exact_pj


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


def torch_operations(net: Classifier, x: Array, T: int) -> dict[str, Array]:
    """Operations `[T]` by layer, from each layer's input and torch's own convolution with ones for weights."""
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
            found[name] = ops.double().reshape(T, -1).sum(1).numpy()

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


class Rows(nn.Module):
    """The rows of the image as tokens, merged with the batch or not."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(12)
            self.embed, self.mlp, self.readout = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(40, 10)
        self.lif, self.merged = LIF(v_th=0.3), merged

    def forward(self, x: Tensor, T: int) -> Tensor:
        rows = x.squeeze(1)
        current = self.embed(rows.flatten(0, 1)).unflatten(0, (-1, 8)) if self.merged else self.embed(rows)
        spikes = self.lif(current.unsqueeze(0).expand(T, *current.shape))
        mixed = self.mlp(spikes.flatten(0, 2)).view(T, -1, 8, 5) if self.merged else self.mlp(spikes)
        return self.readout(self.lif(mixed * 3).flatten(2))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_on_tokens_counts_every_token(layout: str, merged: bool, tmp_path: Path) -> None:
    net, x, T = classifier(Rows(merged)), digits().images[:40], 8  # as many steps as tokens: not to be mistaken
    made = export_model(net, tmp_path / "m.onnx", ExportConfig(layout=layout, T=T), x)  # type: ignore[arg-type]
    assert made.uncounted == ()
    operations = counted(Engine(made.path, threads=1), x[:11], T)
    np.testing.assert_array_equal(operations.counts["embed"], np.full(T, 11 * 8 * 8 * 6))
    spikes: list[Tensor] = []
    hook = net.network.lif.register_forward_hook(lambda m, i, o: spikes.append(o))  # type: ignore[operator, union-attr]
    with torch.no_grad():
        net(torch.from_numpy(x[:11]), T)
    hook.remove()
    np.testing.assert_array_equal(operations.counts["mlp"], spikes[0].flatten(1).sum(1).numpy() * 5)
    np.testing.assert_array_equal(operations.counts["readout"], spikes[1].flatten(1).sum(1).numpy() * 10)
