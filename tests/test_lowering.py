"""What neurons become, in graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tetdeploy.export.lowering import lower
from tetdeploy.export.neuron_steps import BYTE, FLOAT
from tetdeploy.export.onnx_tracer import LIF_DOMAIN


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
