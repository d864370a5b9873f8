"""What neurons become, in graphs of a few nodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tetdeploy.export.lowering import lower
from tetdeploy.export.neuron_steps import BYTE, FLOAT
from tetdeploy.export.onnx_tracer import LIF_DOMAIN
from tetdeploy.export.values import producer_of


def lowered(tau: float, T: int, behind: str = "Relu") -> list[ir.Node]:
    """The nodes of a graph whose neurons get currents from 8 bits, `[T, batch, 8]`, and whose spikes are quantised
    behind another operation, for a CPU."""
    x, currents = ir.Value(name="x", shape=ir.Shape(("batch", 8)), type=FLOAT), ir.Value(name="currents", type=BYTE)
    scale, zero = ir.node("Constant", [], {"value_float": 0.1}), ir.node("Constant", [], {"value_int": 0})
    numbers = ir.node("DequantizeLinear", [currents, scale.outputs[0], zero.outputs[0]])
    apart = ir.node("Reshape", [numbers.outputs[0]])
    lif = ir.node("LIF", apart.outputs, {"tau": tau, "v_th": 1.0}, domain=LIF_DOMAIN, num_outputs=2)
    moved = ir.node(behind, lif.outputs[:1])
    quantised = ir.node("QuantizeLinear", [moved.outputs[0], scale.outputs[0], zero.outputs[0]])
    read = ir.node("DequantizeLinear", [quantised.outputs[0], scale.outputs[0], zero.outputs[0]])
    numbers.outputs[0].shape = ir.Shape((ir.SymbolicDim("batch") * T, 8))
    apart.outputs[0].shape = lif.outputs[0].shape = ir.Shape((T, "batch", 8))
    nodes = [scale, zero, numbers, apart, lif, moved, quantised, read]
    graph = ir.Graph([x, currents], read.outputs, nodes=nodes, opset_imports={"": 20, LIF_DOMAIN: 1})
    lower(ir.Model(graph, ir_version=10), T=T, with_state=False, byte_spikes=True, for_cpu=True)
    return list(graph)


@pytest.mark.parametrize(
    ("tau", "T", "scaled"),
    [(0.5, 60, True), (0.5, 200, False), (1 / 64, 8, True), (1 / 64, 30, False), (0.3, 2, False)],
)
def test_steps_are_scaled_in_place_of_a_leak_where_float32_holds_the_scales(tau: float, T: int, scaled: bool) -> None:
    nodes = lowered(tau, T)
    assert any(node.op_type == "Mul" for node in nodes) != scaled
    tensors = [node.attributes["value"].as_tensor() for node in nodes if "value" in node.attributes]
    assert all(np.isfinite(tensor.numpy()).all() for tensor in tensors)


@pytest.mark.parametrize(
    "behind", ["Unsqueeze", "Reshape", "Squeeze", "Flatten", "Transpose", "Identity", "MaxPool", "Slice"]
)
def test_bytes_go_through_what_keeps_spikes(behind: str) -> None:
    assert "QuantizeLinear" not in [node.op_type for node in lowered(0.5, 3, behind)]


def test_bytes_do_not_go_through_arithmetic() -> None:
    assert "QuantizeLinear" in [node.op_type for node in lowered(0.5, 3, "Neg")]


def along_residuals(taus: list[float], T: int) -> ir.Model:
    """A graph for a CPU: neurons that leak by `taus[k]` read the sum of the first k + 1 of the currents
    `currents.<k> [T * batch, 8]`, 8 bits less 1 times 0.5. Its outputs are all their spikes `[T, batch, 8]`."""
    scale = ir.node("Constant", [], {"value_float": 0.5}).outputs[0]
    zero = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.uint8))}).outputs[0]
    sizes = ir.node("Constant", [], {"value_ints": [T, -1, 8]}).outputs[0]
    merged, apart = ir.Shape((ir.SymbolicDim("batch") * T, 8)), ir.Shape((T, "batch", 8))
    made = [scale, zero, sizes]

    def put(op: str, *inputs: ir.Value, shape: ir.Shape = apart, **options: Any) -> ir.Value:
        made.append(ir.node(op, inputs, **options).outputs[0])
        made[-1].shape = shape
        return made[-1]

    given = [ir.Value(name=f"currents.{k}", shape=merged, type=BYTE) for k in range(len(taus))]
    total, spikes = None, []
    for current, tau in zip(given, taus, strict=True):
        one = put("Reshape", put("DequantizeLinear", current, scale, zero, shape=merged), sizes)
        total = one if total is None else put("Add", total, one)
        attributes = {"tau": tau, "v_th": 1.0}
        fired = put("LIF", total, attributes=attributes, domain=LIF_DOMAIN, num_outputs=2)
        spikes.append(put("Relu", fired))
        spikes[-1].type = FLOAT
    x = ir.Value(name="x", shape=ir.Shape(("batch", 8)), type=FLOAT)
    nodes = [producer_of(value) for value in made]
    graph = ir.Graph([x, *given], spikes, nodes=nodes, opset_imports={"": 20, LIF_DOMAIN: 1})
    model = ir.Model(graph, ir_version=10)
    lower(model, T=T, with_state=False, byte_spikes=True, for_cpu=True)
    return model


def test_neurons_along_residuals_share_what_they_sum() -> None:
    for layers in (3, 9):
        count = Counter(node.op_type for node in along_residuals([0.5] * layers, T=4).graph)
        assert (count["Add"], count["DequantizeLinear"], count["Split"]) == (4 * (layers - 1), 4 * layers, layers)


def fired(currents: NDArray[np.float32], tau: float) -> NDArray[np.float32]:
    """Eqs. 1-3 from u = 0 at v_th = 1: currents `[T, ...]` to spikes."""
    u, spikes = np.zeros_like(currents[0]), []
    for current in currents:
        h = tau * u + current
        spikes.append(h > 1)
        u = np.where(h > 1, 0, h)
    return np.stack(spikes).astype(np.float32)


def test_neurons_that_leak_otherwise_read_the_same_sums() -> None:
    taus, T = [0.5, 0.25, 0.5, 0.3, 1.0, 0.0], 4
    currents = np.random.default_rng(0).integers(5, size=(6, T * 2, 8), dtype=np.uint8)
    session = ort.InferenceSession(ir.to_proto(along_residuals(taus, T)).SerializeToString())
    feed = {f"currents.{k}": given for k, given in enumerate(currents)} | {"x": np.zeros((2, 8), np.float32)}
    sums = np.cumsum(0.5 * currents.astype(np.float32) - 0.5, 0).reshape(-1, T, 2, 8)
    expected = [fired(total, tau) for total, tau in zip(sums, taus, strict=True)]
    assert all(0.1 < spikes.mean() < 0.9 for spikes in expected)
    for spikes, given in zip(session.run(None, feed), expected, strict=True):
        np.testing.assert_array_equal(spikes, given)
