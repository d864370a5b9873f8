"""Counts of spikes by native graphs are the sums of the overlay, without a pass over the spikes in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_helpers import classifier, digits
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from tetdeploy import Engine, native
from tetdeploy.export.config import ExportConfig
from tetdeploy.export.model import export_model
from tetdeploy.native import fusing
from tetdeploy.native.convolution import has_additions
from tetdeploy.native.counts import put_counts
from tetdeploy.native.fusing import fuse_model
from tetdeploy.neurons import LIF

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
FLOAT, UINT8, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.BOOL
LAYOUTS = [("unrolled", {}), ("unrolled", {"with_state": True}), ("dynamic", {}), ("step", {})]


class EachKind(nn.Module):
    """Convolutions of spikes, of means of them, and of sums of two, and neurons whose spikes are pooled."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.encode = nn.Conv2d(1, 32, 3, padding=1)
            self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))
            self.readout = nn.Linear(32 * 4, 10)
        self.neurons = nn.ModuleList(LIF(v_th=0.2) for _ in range(5))

    def forward(self, x: Tensor, T: int) -> Tensor:
        def layer(k: int, spikes: Tensor) -> Tensor:
            currents: Tensor = self.convs[k](spikes.flatten(0, 1))
            fired: Tensor = self.neurons[k](currents.unflatten(0, spikes.shape[:2]))
            return fired

        first = self.neurons[4](self.encode(x).expand(T, *[-1] * 4))
        means = F.avg_pool2d(layer(0, first).flatten(0, 1), 2).unflatten(0, first.shape[:2])
        second = layer(1, means)
        last = layer(3, layer(2, second) + second)
        return self.readout(F.avg_pool2d(last.flatten(0, 1), 2).flatten(1)).unflatten(0, first.shape[:2])


def nodes_of(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.ModelProto.FromString(model).graph.node)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("layout", "options"), LAYOUTS)
def test_counts_are_the_sums_of_the_overlay(
    precision: Any, layout: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "m.onnx", digits()
    config = ExportConfig(layout=layout, T=3, precision=precision, **options)
    scales = (data.images[:32], data.labels[:32]) if precision == "int8" else None
    export_model(classifier(EachKind()), path, config, data.images[:32], num_check=0, calibration=scales)
    made = list[bytes]()

    def fuse(model: bytes, *states: Any) -> bytes | None:
        fused = fuse_model(model, *states)
        made.extend(filter(None, [fused]))
        return fused

    monkeypatch.setattr(fusing, "fuse_model", fuse)
    engine = Engine(path, native=True)
    result, counts = engine.count(data.images[:9], 3)
    serving, counting = map(nodes_of, made)
    monkeypatch.setattr(fusing, "put_counts", lambda *_: None)
    expected, sums = Engine(path, native=True).count(data.images[:9], 3)

    np.testing.assert_array_equal(result.per_step, expected.per_step)
    assert counts.keys() == sums.keys() and len([name for name in counts if name.startswith("active.convs")]) == 4
    for name, count in sums.items():
        np.testing.assert_array_equal(counts[name], count, strict=True)
        assert len(np.unique(count)) > 1
    if precision == "int8" or native.has_tiles() or has_additions():  # otherwise ONNX Runtime reads spikes in float32
        left = 0 if native.has_tiles() else 1  # means of four, of which others make no bytes
        assert counting["Squeeze"] == 4 - left and counting["ReorderOutput"] == serving["ReorderOutput"] + left
        assert all(counting[op] == serving[op] for op in ("Transpose", "DequantizeLinear"))


class Volumes(nn.Module):
    """Convolutions in three dimensions, behind which ONNX Runtime may turn what tells whether neurons fire."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encode = nn.Conv2d(1, 32, 3, padding=1, stride=2)
            self.deep, self.wide = nn.Conv3d(32, 32, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
            self.flat, self.readout = nn.Conv2d(64, 32, 3, padding=1), nn.Linear(32, 10)
        self.neurons = nn.ModuleList(LIF(v_th=0.2) for _ in range(4))

    def forward(self, x: Tensor, T: int) -> Tensor:
        lif = self.neurons
        spikes = lif[0](self.encode(x).expand(T, *[-1] * 4))
        steps = spikes.shape[:2]
        spikes = lif[1](self.deep(spikes.flatten(0, 1).unsqueeze(2)).squeeze(2).unflatten(0, steps))
        spikes = lif[2](self.wide(spikes.flatten(0, 1).unsqueeze(1)).unflatten(0, steps))
        spikes = lif[3](self.flat(spikes.flatten(2, 3).flatten(0, 1)).unflatten(0, steps))
        logits: Tensor = self.readout(spikes.mean((-1, -2)))
        return logits


def test_neurons_that_stand_alone_are_native_as_well(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", digits()
    config = ExportConfig(layout="dynamic", T=2, trained_T=2, precision="int8")
    scales = (data.images[:32], data.labels[:32])
    export_model(classifier(Volumes()), path, config, data.images[:32], num_check=0, calibration=scales)
    engine = Engine(path, native=True)
    fused = fuse_model(path.read_bytes() + engine.counting_overlay)
    assert fused is not None and nodes_of(fused)["Scan"] == 0
    counts, sums = (of.count(data.images[:9], 2)[1] for of in (engine, Engine(path, native=False)))
    for name, count in sums.items():
        np.testing.assert_array_equal(counts[name], count, strict=True)


# ---------------------------------------------------------------------------------------------------- what is a count


def counted(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Any], x: np.ndarray[Any, Any], kind: int = FLOAT
) -> Counter[str]:
    """The operators of a graph from `x [N, C, H, W]` to `y`, and to what its `Transpose` makes, after `put_counts`; it
    gives what it gave before."""
    outputs = ["y", *(node.output[0] for node in nodes if node.op_type == "Transpose")]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, ["N", *x.shape[1:]])],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    plain = run(model, x)
    put_counts(model.graph, fusing._kinds(model), [])
    for wanted, got in zip(plain, run(model, x), strict=True):
        np.testing.assert_array_equal(wanted, got, strict=True)
    return Counter(node.op_type for node in model.graph.node)


def run(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


node = helper.make_node
SPIKES = [node("Greater", ["x", "one"], ["fires"]), node("Cast", ["fires"], ["b"], to=UINT8)]
LAST = node("Transpose", ["b"], ["last"], perm=[0, 2, 3, 1])
FLOATS = node("Cast", ["b"], ["f"], to=FLOAT)
SUM = node("ReduceSum", ["f", "axes"], ["y"], keepdims=0)
NUMBERS = {"one": np.float32(1), "half": np.float32(0.5), "zero": np.uint8(0), "three": np.uint8(3)}
NORMAL = np.random.default_rng(0).normal(1, 1, (6, 5, 4, 3)).astype(np.float32)
BYTES = np.random.default_rng(0).integers(0, 5, (6, 5, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("axes", [[1], [-3], [1, 2, 3], [3, -2, 1]], ids=str)
def test_sums_over_channels_and_images_are_counts(axes: list[int]) -> None:
    operators = counted([*SPIKES, LAST, FLOATS, SUM], {**NUMBERS, "axes": axes}, NORMAL)
    assert operators["MatMulInteger"] == 1 and operators["Squeeze"] + operators["ReduceSum"] == 1
    assert operators["Cast"] == 2  # to bytes, and of the counts: what is 0 or 1 is asked no more


def not_zero(zero_point: str) -> list[onnx.NodeProto]:
    """A sum of those that are not zero."""
    return [
        node("Identity", ["x"], ["b"]),
        LAST,
        node("DequantizeLinear", ["b", "one", zero_point], ["d"]),
        node("Cast", ["d"], ["any"], to=BOOL),
        node("Cast", ["any"], ["f"], to=FLOAT),
        SUM,
    ]


def test_of_quantised_numbers_those_that_are_not_zero_are_counted() -> None:
    operators = counted(not_zero("zero"), {**NUMBERS, "axes": [1]}, BYTES, UINT8)
    assert operators["MatMulInteger"] == 1 and operators["ReduceSum"] == 0


OTHERS = {
    "a mean": ([*SPIKES, LAST, FLOATS, node("ReduceMean", ["f", "axes"], ["y"], keepdims=0)], NORMAL, [1]),
    "keeps its axes": ([*SPIKES, LAST, FLOATS, node("ReduceSum", ["f", "axes"], ["y"])], NORMAL, [1]),
    "all axes": ([*SPIKES, LAST, FLOATS, node("ReduceSum", ["f", ""], ["y"], keepdims=0)], NORMAL, [1]),
    "images as well": ([*SPIKES, LAST, FLOATS, SUM], NORMAL, [0, 1]),
    "over places": ([*SPIKES, LAST, FLOATS, SUM], NORMAL, [2, 3]),
    "over the width": ([*SPIKES, LAST, FLOATS, SUM], NORMAL, [3]),
    "nothing with channels last": ([*SPIKES, FLOATS, SUM], NORMAL, [1]),
    "turned otherwise": ([*SPIKES, node("Transpose", ["b"], ["z"], perm=[0, 3, 2, 1]), FLOATS, SUM], NORMAL, [1]),
    "sums of spikes": ([node("Identity", ["x"], ["b"]), LAST, FLOATS, SUM], BYTES, [1]),
    "a zero point": (not_zero("three"), BYTES, [1]),
    "a scale": ([*SPIKES, LAST, node("DequantizeLinear", ["b", "half", "zero"], ["f"]), SUM], NORMAL, [1]),
    "another shape": (
        [*SPIKES, LAST, node("Reshape", ["b", "shape"], ["r"]), node("Cast", ["r"], ["f"], to=FLOAT), SUM],
        NORMAL,
        [1],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_another_sum_stays(kind: str) -> None:
    nodes, x, axes = OTHERS[kind]
    element = UINT8 if x is BYTES else FLOAT
    operators = counted(nodes, {**NUMBERS, "axes": axes, "shape": [-1, 4, 5, 3]}, x, element)
    assert operators["MatMulInteger"] == 0 and operators["ReduceSum"] + operators["ReduceMean"] == 1
