"""The native operator gives the bits of ONNX Runtime's own operators, and is refused where it cannot be."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from export_helpers import (
    LAYOUTS,
    SideBySide,
    digits,
    exported,
    frames,
    int8_exported,
    keep_ort_convolutions,
    needs_emulator,
    needs_torch_2_13,
    run_emulated,
    shared_traces,
    unchecked,
)
from gpu_stand_in import gpu_build
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from zoo_helpers import for_export, graph_of

from tetdeploy import native
from tetdeploy.early_exit import Exit
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.model import build_graph
from tetdeploy.int8.calibration import Calibration
from tetdeploy.native.convolution import has_additions
from tetdeploy.native.fusing import fuse_model
from tetdeploy.native.graphs import Kind, name_apart, reads
from tetdeploy.native.layout import keep_last, turn_bytes
from tetdeploy.native.programs import MAX_REGISTERS, Op, Program
from tetdeploy.native.region_programs import UnfusableError, check_neuron_step
from tetdeploy.native.scans import NeuronStep
from tetdeploy.neurons import LIF
from tetdeploy.runtimes.sessions import gains_from_native
from tetdeploy.streams import StreamPool

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
FLOAT, UINT8, INT8, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL
Array = np.ndarray[Any, Any]
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 1 + 2**-23, 1e-42, 3e38, np.inf, -np.inf, np.nan], np.float32)


def floats(*shape: int, seed: int = 0) -> Array:
    """Numbers round the thresholds, and all that are special."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    places = np.random.default_rng(seed + 1).integers(0, values.size, min(values.size, 4 * len(SPECIAL)))
    values.reshape(-1)[places] = np.resize(SPECIAL, len(places))
    return values


def graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[int | str]]],
    outputs: dict[str, int],
    constants: dict[str, Array] | None = None,
) -> bytes:
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.tetdeploy", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()


def run(model: bytes, feed: dict[str, Array], threads: int = 2, *, joined: bool = False) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if joined:
        native.use(ort, options)
    result: list[Array] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feed)
    return result


def joined(model: bytes, states: Sequence[tuple[str, str]] = ()) -> tuple[bytes, list[str]]:
    """The model with native operators, and the operators that it has then."""
    made = fuse_model(model, states)
    assert made is not None
    return made, [node.op_type for node in onnx.ModelProto.FromString(made).graph.node]


def assert_same(model: bytes, feed: dict[str, Array]) -> list[str]:
    """Both give the same bits, with one thread and with several. Returns the operators of the joined graph."""
    made, operators = joined(model)
    for threads in (1, 3):
        for plain, other in zip(run(model, feed, threads), run(made, feed, threads, joined=True), strict=True):
            assert plain.dtype == other.dtype and plain.shape == other.shape
            np.testing.assert_array_equal(plain, other)  # nan equals nan; -0 is told from 0 below
            np.testing.assert_array_equal(np.signbit(plain[plain == 0]), np.signbit(other[other == 0]))
    return operators


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"])
@pytest.mark.parametrize("number", [None, "left", "right"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 129, 33, 5)], ids=str)
def test_operators_of_two(op: str, number: str | None, shape: tuple[int, ...]) -> None:
    compares = op in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    operands = {None: ["a", "b"], "left": ["k", "a"], "right": ["a", "k"]}[number]
    nodes = [helper.make_node(op, operands, ["c"])]
    nodes += [helper.make_node("Cast", ["c"], ["d"], to=FLOAT)] if compares else []
    nodes.append(helper.make_node("ThresholdedRelu", ["d" if compares else "c"], ["y"], alpha=0.25))
    declared = {name: (FLOAT, ["N", *shape[1:]]) for name in ("a", "b") if name in operands}
    model = graph(nodes, declared, {"y": FLOAT}, {"k": np.array(0.5, np.float32)} if number else None)
    feed = {name: floats(*shape, seed=ord(name)) for name in declared}
    assert assert_same(model, feed) == ["Elementwise"]


@pytest.mark.parametrize("alpha", [0.2, 8388608.0, -8388608.0])
def test_operators_of_one(alpha: float) -> None:
    nodes = [
        helper.make_node("HardSigmoid", ["x"], ["a"], alpha=alpha, beta=-alpha),
        helper.make_node("ThresholdedRelu", ["x"], ["b"]),  # alpha is 1
        helper.make_node("Sub", ["b", "a"], ["y"]),
    ]
    model = graph(nodes, {"x": (FLOAT, ["N", 700])}, {"y": FLOAT})
    assert assert_same(model, {"x": floats(5, 700)}) == ["Elementwise"]


@pytest.mark.parametrize(("kind", "dtype"), [(INT8, np.int8), (UINT8, np.uint8)])
def test_bytes_become_currents_and_spikes_bytes(kind: int, dtype: type[np.generic]) -> None:
    """As in a lowered graph: a part of the batch for each step, a scale for each, spikes joined as bytes."""
    nodes = [helper.make_node("Split", ["q"], ["q0", "q1"], axis=0, num_outputs=2)]
    for t in range(2):
        nodes += [
            helper.make_node("DequantizeLinear", [f"q{t}", f"scale{t}", "zero"], [f"i{t}"]),
            helper.make_node("Sub", ["i0" if t == 0 else "r0", f"i{t}"], [f"n{t}"]),
            helper.make_node("ThresholdedRelu", [f"n{t}"], [f"r{t}"], alpha=-1.5),
            helper.make_node("Less", [f"n{t}", "v_th"], [f"fires{t}"]),
            helper.make_node("Cast", [f"fires{t}"], [f"s{t}"], to=UINT8),
        ]
    nodes.append(helper.make_node("Concat", ["s0", "s1"], ["y"], axis=0))
    constants = {
        "scale0": np.array(0.037, np.float32),
        "scale1": np.array(0.074, np.float32),
        "zero": np.array(3, dtype),
        "v_th": np.array(-1.5, np.float32),
    }
    model = graph(nodes, {"q": (kind, ["2N", 3, 11, 11])}, {"y": UINT8, "r1": FLOAT, "fires0": BOOL}, constants)
    q = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, (6, 3, 11, 11)).astype(dtype)
    assert assert_same(model, {"q": q}) == ["Elementwise"]


def test_a_region_does_not_reach_round_what_lies_between() -> None:
    """a -> Softmax -> c, and a -> c: one node for a and c would have to run before the Softmax and behind it."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a0"]),
        helper.make_node("Sub", ["a0", "x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["c0"]),
        helper.make_node("Mul", ["c0", "k"], ["y"]),
    ]
    model = graph(nodes, {"x": (FLOAT, ["N", 40])}, {"y": FLOAT}, {"k": np.array(0.3, np.float32)})
    operators = assert_same(model, {"x": floats(9, 40)})
    assert operators == ["Elementwise", "Softmax", "Elementwise"]


def test_what_is_repeated_along_an_axis_is_left_alone() -> None:
    nodes = [
        helper.make_node("Add", ["x", "bias"], ["a"]),
        helper.make_node("Mul", ["a", "gate"], ["b"]),
        helper.make_node("Mul", ["b", "k"], ["c"]),
        helper.make_node("Sub", ["c", "b"], ["y"]),
    ]
    constants = {"bias": floats(4, 1, 1), "k": np.array([0.5], np.float32)}
    model = graph(nodes, {"x": (FLOAT, ["N", 4, 6, 6]), "gate": (FLOAT, ["N", 4, 1, 1])}, {"y": FLOAT}, constants)
    operators = assert_same(model, {"x": floats(3, 4, 6, 6), "gate": floats(3, 4, 1, 1, seed=5)})
    assert sorted(operators) == ["Add", "Elementwise", "Mul"]


def test_values_that_subgraphs_read_are_given_out() -> None:
    inner = [helper.make_node("Identity", ["b"], ["then"])], [helper.make_node("Identity", ["a"], ["else"])]
    branches = {
        name: helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(nodes[0].output[0], FLOAT, None)])
        for name, nodes in zip(("then_branch", "else_branch"), inner, strict=True)
    }
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a"]),
        helper.make_node("Sub", ["a", "x"], ["b"]),
        helper.make_node("If", ["which"], ["y"], **branches),
    ]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (FLOAT, ["N", 4]), "which": (BOOL, [])}
    model = graph(nodes, inputs, {"y": FLOAT}, {"k": np.array(3, np.float32)})
    for which in (True, False):
        assert assert_same(model, {"x": floats(3, 4), "which": np.array(which)}) == ["Elementwise", "If"]


def test_subgraphs_have_names_of_their_own() -> None:
    """The branch calls a value as the graph calls a later one, and reads by that name again in a branch of its own."""
    names = ("deep", "then", "else")
    (deep, then, other) = (helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    identities = [helper.make_node("Identity", [read], [name]) for read, name in zip("bbx", names, strict=True)]
    deeper = helper.make_graph(identities[:1], "deeper", [], [deep])
    keep = helper.make_graph(identities[1:2], "keep", [], [then])
    inner = [
        helper.make_node("Mul", ["x", "k"], ["b"]),
        helper.make_node("Clip", ["x", "", "k"], ["top", ""]),
        helper.make_node("If", ["which"], ["made"]),
    ]
    inner[2].attribute.extend(
        helper.make_attribute(name, of) for name, of in (("then_branch", deeper), ("else_branch", keep))
    )
    branch = helper.make_graph(inner, "branch", [], [helper.make_tensor_value_info("made", FLOAT, None)])
    plain = helper.make_graph(identities[2:], "plain", [], [other])
    nodes = [
        helper.make_node("If", ["which"], ["a", ""], then_branch=branch, else_branch=plain),
        helper.make_node("Sub", ["a", "x"], ["b"]),
        helper.make_node("Mul", ["b", "k"], ["y"]),
    ]
    made = helper.make_graph(nodes, "g", [], [])
    assert set(reads(nodes[0])) == {"which", "x", "k"}
    name_apart(made)
    outer, (within,) = made.node[0], [a.g for a in made.node[0].attribute if a.name == "then_branch"]
    assert [node.output[0] for node in (*within.node, *made.node)] == [
        *("b:branch", "top", "made"),
        *("a", "b", "y"),
    ]
    assert list(within.node[1].input) == ["x", "", "k"]  # what is left out has no name
    assert [set(reads(node)) for node in (outer, *within.node)] == [
        {"which", "x", "k"},
        {"x", "k"},
        {"x", "k"},
        {"which", "b:branch"},
    ]


@pytest.mark.parametrize("model", ["convsnn", "resnet19"])
def test_step_graphs_whose_batch_norms_are_not_folded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_ort_convolutions(monkeypatch)
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_of(model, ExportConfig(layout="step", fold_bn=False)))
    x = np.random.default_rng(0).integers(256, size=(5, *for_export(model).image_shape), dtype=np.uint8)
    assert_same_answers(path, x, [3])
    assert_same_counts(path, x, 3)


@pytest.mark.parametrize("twice", ["b", "a"])
def test_a_part_of_a_part_is_as_long_as_its_sisters(twice: str) -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], axis=0, num_outputs=2),
        helper.make_node("Split", [twice], ["c", "d", "e"], axis=0, num_outputs=3),
        helper.make_node("Less", ["d", "k"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["y"], to=FLOAT),
    ]
    model = graph(nodes, {"x": (FLOAT, [12, 5])}, {"y": FLOAT}, {"k": np.array(0.1, np.float32)})
    assert "Elementwise" in assert_same(model, {"x": floats(12, 5)})


@pytest.mark.parametrize("pieces", [("x", "x", "z"), ("x", "x")])
def test_parts_that_differ_in_length_are_left_alone(pieces: tuple[str, ...]) -> None:
    """Joined here, or cut so by a Split of seven into four and three."""
    nodes = [helper.make_node("Concat", pieces, ["a"], axis=0)]
    nodes += [helper.make_node("Split", ["z"], ["b", "c"], axis=0, num_outputs=2)]
    nodes += [
        helper.make_node(op, [name, "k"], [f"{name}.{op}"]) for name in ("a", "b", "c") for op in ("Mul", "Greater")
    ]
    nodes += [helper.make_node("Cast", [f"{name}.Greater"], [f"{name}.y"], to=FLOAT) for name in ("a", "b", "c")]
    outputs = {f"{name}.{out}": FLOAT for name in ("a", "b", "c") for out in ("Mul", "y")}
    model = graph(nodes, {"x": (FLOAT, [2, 3]), "z": (FLOAT, [7, 3])}, outputs, {"k": np.array(0.5, np.float32)})
    assert_same(model, {"x": floats(2, 3), "z": floats(7, 3)})


@pytest.mark.parametrize("length", ["N", "M"])
def test_parts_that_may_differ_in_length_are_left_alone(length: str) -> None:
    nodes = [helper.make_node("Mul", [name, "k"], [f"{name}0"]) for name in "ab"]
    nodes += [helper.make_node("ThresholdedRelu", [f"{name}0"], [f"{name}1"], alpha=0.5) for name in "ab"]
    nodes.append(helper.make_node("Concat", ["a1", "b1"], ["y"], axis=0))
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"a": (FLOAT, ["N", 5]), "b": (FLOAT, [length, 5])}
    model = graph(nodes, inputs, {"y": FLOAT}, {"k": np.array(2.0, np.float32)})
    if length == "M":
        assert fuse_model(model) is None
    else:
        assert assert_same(model, {"a": floats(3, 5), "b": floats(3, 5, seed=2)}) == ["Elementwise"]


def test_parts_of_wholes_that_are_added_are_as_long() -> None:
    nodes = [helper.make_node("Mul", [name, "k"], [f"{name}0"]) for name in "ab"]
    nodes += [helper.make_node("Concat", [f"{name}0", f"{name}0"], [f"{name}1"], axis=0) for name in "ab"]
    nodes.append(helper.make_node("Add", ["a1", "b1"], ["y"]))
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"a": (FLOAT, ["N", 5]), "b": (FLOAT, ["M", 5])}
    model = graph(nodes, inputs, {"y": FLOAT}, {"k": np.array(2.0, np.float32)})
    assert assert_same(model, {"a": floats(3, 5), "b": floats(3, 5, seed=2)}) == ["Elementwise"]


def test_the_sizes_of_an_old_split_count() -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], axis=0, split=[2, 4]),
        helper.make_node("Mul", ["b", "k"], ["c"]),
        helper.make_node("Sub", ["c", "b"], ["y"]),
    ]
    declared = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", [6, 3]), ("y", [4, 3]))]
    k = numpy_helper.from_array(np.array(0.5, np.float32), "k")
    old = helper.make_graph(nodes, "test", declared[:1], declared[1:], [k])
    model = helper.make_model(old, opset_imports=[helper.make_opsetid("", 12)], ir_version=8).SerializeToString()
    assert_same(model, {"x": floats(6, 3)})


def test_a_number_that_a_caller_may_change_is_none() -> None:
    nodes = [helper.make_node("Mul", ["x", "k"], ["a"]), helper.make_node("Sub", ["a", "x"], ["y"])]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (FLOAT, ["N", 4]), "k": (FLOAT, [1])}
    model = graph(nodes, inputs, {"y": FLOAT}, {"k": np.array([0.5], np.float32)})
    assert fuse_model(model) is None  # k is a tensor that is repeated


def test_an_output_that_is_a_constant_stays_one() -> None:
    nodes = [helper.make_node("Mul", ["x", "half"], ["half x"]), helper.make_node("Add", ["half x", "half"], ["y"])]
    constants = {"half": np.array(0.5, np.float32), "k": np.arange(3, dtype=np.float32)}
    model = graph(nodes, {"x": (FLOAT, ["N", 5])}, {"y": FLOAT, "k": FLOAT}, constants)
    assert assert_same(model, {"x": floats(3, 5)}) == ["Elementwise"]


def test_a_network_of_twice_the_depth_takes_twice_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[onnx.NodeProto] = []

    def count(node: onnx.NodeProto) -> list[str]:
        looked_at.append(node)
        return reads(node)

    monkeypatch.setattr("tetdeploy.native.regions.reads", count)
    work = []
    for depth in (20, 40):
        nodes, before = list[onnx.NodeProto](), "x"
        for k in range(depth):
            nodes += [
                helper.make_node("Greater", [before, "k"], [f"fires{k}"]),
                helper.make_node("Cast", [f"fires{k}"], [f"spikes{k}"], to=UINT8),
                helper.make_node("MaxPool", [f"spikes{k}"], [f"pooled{k}"], kernel_shape=[1, 1]),
                helper.make_node("Cast", [f"pooled{k}"], [f"current{k}"], to=FLOAT),
                helper.make_node("Add", [f"current{k}", before], [f"sum{k}"]),
            ]
            before = f"sum{k}"
        looked_at.clear()
        joined(graph(nodes, {"x": (FLOAT, ["N", 2, 5, 5])}, {before: FLOAT}, {"k": np.array(0.5, np.float32)}))
        work.append(len(looked_at))
    assert work[1] < 2.5 * work[0]


@pytest.mark.parametrize("kind", [FLOAT, UINT8, INT8])
@pytest.mark.parametrize("also", ["", "leaked", "n", "spikes", "kept", "u", "first", "begun"])
def test_a_step_of_neurons_in_one_pass(also: str, kind: int) -> None:
    """Two steps, whatever else reads what is between their operations."""
    nodes = [helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["current"])] if kind != FLOAT else []
    current = "current" if nodes else "x"
    nodes += [
        helper.make_node("Greater", [current, "k"], ["fires0"]),
        helper.make_node("Cast", ["fires0"], ["y0"], to=UINT8),
        helper.make_node("ThresholdedRelu", [current], ["first"], alpha=0.5),
        helper.make_node("Sub", ["first", current], ["begun"]),
        helper.make_node("Mul", ["begun", "k"], ["leaked"]),
        helper.make_node("Sub", ["leaked", current], ["n"]),
        helper.make_node("Less", ["n", "v_th"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["y"], to=UINT8),
        helper.make_node("Cast", ["fires"], ["spikes"], to=FLOAT),
        helper.make_node("ThresholdedRelu", ["n"], ["kept"], alpha=-0.5),
        helper.make_node("Mul", ["kept", "k"], ["u"]),
        helper.make_node("Add", ["u", also or "x2"], ["z"]),
    ]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (kind, ["N", 700]), "x2": (FLOAT, ["N", 700])}
    dtype = {FLOAT: np.float32, UINT8: np.uint8, INT8: np.int8}[kind]
    constants = {"k": np.array(0.5, np.float32), "v_th": np.array(-0.5, np.float32)}
    constants |= {"scale": np.array(0.01, np.float32), "zero": np.array(7, dtype)} if kind != FLOAT else {}  # type: ignore[dict-item]
    if also:
        del inputs["x2"]
    model = graph(nodes, inputs, {"y0": UINT8, "y": UINT8, "z": FLOAT}, constants)
    x = floats(5, 700) if kind == FLOAT else np.random.default_rng(0).integers(0, 128, (5, 700)).astype(dtype)
    assert set(assert_same(model, {"x": x} | ({} if also else {"x2": floats(5, 700, seed=3)}))) == {"Elementwise"}


def firing(layer: str, currents: Sequence[str], v_th: float, to: int = UINT8) -> list[onnx.NodeProto]:
    """Neurons as a graph without `Scan` has them, negated from the second step on; their spikes are `<layer>.s<t>`."""
    nodes, u = [], ""
    for t, current in enumerate(currents):
        h, held, op = (f"{layer}.h{t}", f"{layer}.held{t}", "Less") if t else (current, f"{layer}.held0", "Greater")
        nodes += [helper.make_node("Sub", [u, current], [h])] if t else []
        nodes += [
            helper.make_node("Constant", [], [f"{layer}.v_th{t}"], value_float=-v_th if t else v_th),
            helper.make_node(op, [h, f"{layer}.v_th{t}"], [f"{layer}.fires{t}"]),
            helper.make_node("Cast", [f"{layer}.fires{t}"], [f"{layer}.s{t}"], to=to),
            helper.make_node("ThresholdedRelu", [h], [held], alpha=-v_th if t else v_th),
        ]
        nodes += [helper.make_node("Sub", [held, h], [f"{layer}.begun"])] if t == 0 else []
        u = f"{layer}.u{t}"
        nodes.append(helper.make_node("Mul", [held if t else f"{layer}.begun", "leak"], [u]))
    return nodes


@pytest.mark.parametrize("T", [3, 70])  # in vector registers, and too many for these
@pytest.mark.parametrize("kinds", [
    (FLOAT,), (UINT8,), (INT8,), (FLOAT, FLOAT), (FLOAT, UINT8), (UINT8, FLOAT), (UINT8, UINT8),
    (UINT8, INT8), (FLOAT, FLOAT, FLOAT),
])  # fmt: skip
@pytest.mark.parametrize("to", [UINT8, FLOAT])
def test_neurons_on_a_current_or_a_sum_of_some(kinds: tuple[int, ...], T: int, to: int) -> None:
    dtypes = {FLOAT: np.float32, UINT8: np.uint8, INT8: np.int8}
    constants: dict[str, Array] = {"leak": np.array(0.7, np.float32), "scale": np.array(0.01, np.float32)}
    nodes, sums, feed = [], [""] * T, {}
    for j, kind in enumerate(kinds):
        parts = [f"x{j}.{t}" for t in range(T)]
        nodes.append(helper.make_node("Split", [f"x{j}"], parts, axis=0, num_outputs=T))
        for t, part in enumerate(parts if kind != FLOAT else []):
            constants[f"zero{j}"] = np.array(-20 if kind == INT8 else 40, dtypes[kind])
            parts[t] = f"i{j}.{t}"
            nodes.append(helper.make_node("DequantizeLinear", [part, "scale", f"zero{j}"], [parts[t]]))
        for t, part in enumerate(parts):
            nodes += [helper.make_node("Add", [sums[t], part], [f"sum{j}.{t}"])] if j else []
            sums[t] = f"sum{j}.{t}" if j else part
        whole = np.random.default_rng(j).integers(-128 if kind == INT8 else 0, 128, (5 * T, 350))
        feed[f"x{j}"] = floats(5 * T, 350, seed=j) if kind == FLOAT else whole.astype(dtypes[kind])
    nodes += firing("n", sums, 0.5, to)
    nodes.append(helper.make_node("Concat", [f"n.s{t}" for t in range(T)], ["y"], axis=0))
    model = graph(nodes, {f"x{j}": (kind, [5 * T, 350]) for j, kind in enumerate(kinds)}, {"y": to}, constants)
    assert assert_same(model, feed) == ["Elementwise"]
    assert 0.05 < run(model, feed)[0].mean() < 0.7


@pytest.mark.parametrize("by_turns", [False, True])
def test_two_layers_of_neurons_on_one_current(by_turns: bool) -> None:
    nodes = [helper.make_node("Split", ["x"], ["x0", "x1", "x2"], axis=0, num_outputs=3)]
    layers = [firing(layer, ["x0", "x1", "x2"], v_th) for layer, v_th in (("a", 0.5), ("b", 0.8))]
    nodes += itertools.chain.from_iterable(zip(*layers, strict=True) if by_turns else layers)
    names = [f"{layer}.s{t}" for t in range(3) for layer in "ab"]
    if not by_turns:
        names.sort()
    nodes.append(helper.make_node("Concat", names, ["y"], axis=0))
    model = graph(nodes, {"x": (FLOAT, [15, 350])}, {"y": UINT8}, {"leak": np.array(0.7, np.float32)})
    assert assert_same(model, {"x": floats(15, 350)}) == ["Elementwise"]


def test_what_a_region_alone_reads_belongs_to_it() -> None:
    """As the leak of a membrane that is an input: it is there before the current is."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["current"], kernel_shape=[1, 1]),
        helper.make_node("Mul", ["u", "k"], ["u0"]),
        helper.make_node("Sub", ["u0", "x"], ["leaked"]),
        helper.make_node("Add", ["leaked", "current"], ["y"]),
    ]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {name: (FLOAT, ["N", 2, 5, 5]) for name in ("x", "u")}
    model = graph(nodes, inputs, {"y": FLOAT}, {"k": np.array(0.5, np.float32)})
    assert assert_same(model, {"x": floats(3, 2, 5, 5), "u": floats(3, 2, 5, 5, seed=7)}) == ["MaxPool", "Elementwise"]
    outside = [*nodes, helper.make_node("MaxPool", ["u0"], ["z"], kernel_shape=[1, 1])]
    model = graph(outside, inputs, {"y": FLOAT, "z": FLOAT}, {"k": np.array(0.5, np.float32)})
    operators = assert_same(model, {"x": floats(3, 2, 5, 5), "u": floats(3, 2, 5, 5, seed=7)})
    assert sorted(operators) == ["Elementwise", "MaxPool", "MaxPool", "Mul"]


def test_numbers_lose_their_fraction_as_bytes() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["bytes"], to=UINT8),
        helper.make_node("Cast", ["bytes"], ["whole"], to=FLOAT),
        helper.make_node("Mul", ["whole", "k"], ["y0"]),
        helper.make_node("Sub", ["y0", "x"], ["y"]),
    ]
    model = graph(nodes, {"x": (FLOAT, ["N", 2, 5, 5])}, {"y": FLOAT}, {"k": np.array(3.3, np.float32)})
    assert "Elementwise" in assert_same(model, {"x": np.abs(floats(3, 2, 5, 5))})


def test_averages_of_spikes_lose_their_fraction_as_bytes() -> None:
    nodes = [
        helper.make_node("Greater", ["x", "k"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=FLOAT),
        helper.make_node("AveragePool", ["spikes"], ["average"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Cast", ["average"], ["bytes"], to=UINT8),
        helper.make_node("Cast", ["bytes"], ["whole"], to=FLOAT),
        helper.make_node("Mul", ["whole", "k"], ["y"]),
    ]
    model = graph(nodes, {"x": (FLOAT, ["N", 2, 4, 4])}, {"y": FLOAT}, {"k": np.array(0.3, np.float32)})
    assert "Elementwise" in assert_same(model, {"x": floats(3, 2, 4, 4)})


def test_images_turned_with_their_blocks_that_are_as_wide_as_deep() -> None:
    """ONNX Runtime writes a convolution's blocks with channels last, of the shape that they had."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["b", "k"], ["c"]),
        helper.make_node("Sub", ["c", "b"], ["y"]),
    ]
    x, w = (np.random.default_rng(0).normal(size=(n, 16, s, s)).astype(np.float32) for n, s in ((2, 16), (16, 3)))
    model = graph(nodes, {"x": (FLOAT, ["N", 16, 16, 16])}, {"y": FLOAT}, {"w": w, "k": np.array(0.7, np.float32)})
    assert "Elementwise" in assert_same(model, {"x": x})


def test_what_nobody_reads_is_left_out() -> None:
    nodes = [helper.make_node("Mul", ["x", "k"], ["a"]), helper.make_node("Sub", ["a", "x"], ["y"])]
    nodes += [helper.make_node("Relu", ["x"], ["b"]), helper.make_node("Sub", ["b", "x"], ["c"])]
    nodes.append(helper.make_node("Add", ["c", "b"], ["unread"]))
    model = graph(nodes, {"x": (FLOAT, ["N", 4])}, {"y": FLOAT}, {"k": np.array(0.5, np.float32)})
    assert assert_same(model, {"x": floats(3, 4)}) == ["Elementwise"]


def test_a_graph_with_nothing_to_join_stays() -> None:
    model = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, ["N", 4])}, {"y": FLOAT})
    assert fuse_model(model) is None


# --------------------------------------------------------------------------------------------------------- networks


def assert_same_counts(path: Path, x: Array, T: int) -> None:
    plain, fast = (Engine(path, threads=2, native=native).count(x, T) for native in (False, True))
    np.testing.assert_array_equal(plain[0].per_step, fast[0].per_step)
    assert plain[1].keys() == fast[1].keys()
    for name, counts in plain[1].items():
        np.testing.assert_array_equal(counts, fast[1][name])


def assert_same_answers(path: Path, x: Array, steps: list[int]) -> None:
    plain, fast = Engine(path, threads=2, native=False), Engine(path, threads=2, native=True)
    assert fast.native and not plain.native
    for count, T in itertools.product((1, 5), steps):
        np.testing.assert_array_equal(plain.run(x[:count], T).per_step, fast.run(x[:count], T).per_step)
    if plain.with_state:
        one, other = plain.stream(3), fast.stream(3)
        for _ in range(3):
            chunk = x[:3] if plain.encoding == "direct" else x[:3, : plain.chunk_T]
            chunk = chunk[:, 0] if plain.layout == "step" and plain.encoding == "frames" else chunk
            np.testing.assert_array_equal(one.push(chunk).logits, other.push(chunk).logits)
        assert one.state.keys() == other.state.keys()
        for name in one.state:
            np.testing.assert_array_equal(one.state[name], other.state[name])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same_bits(
    layout: str, options: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "int8":
        path = int8_exported(layout, **{k: v for k, v in options.items() if k != "T"})
    else:
        keep_ort_convolutions(monkeypatch)
        path = exported(layout, **options)
    x = digits().images if options.get("encoding") != "frames" else frames(8, 3)
    if not options.get("normalize", True):
        x = (x / 16).astype(np.float32)
    assert_same_answers(path, x, [1, 3])
    assert_same_counts(path, x[:5], 3)


class Mixed(nn.Module):
    """Between two layers of neurons stands what depends on T: each step reads the sum of those before."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encode, self.readout = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(384, 10)
        self.lif1, self.lif2 = LIF(v_th=0.4), LIF(v_th=0.7)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x)
        spikes = self.lif1(current.unsqueeze(0).expand(T, *current.shape))
        logits: Tensor = self.readout(self.lif2(spikes.cumsum(0) * 0.5).flatten(2))
        return logits


class OnceForAll(Mixed):
    """A current that all steps share is added to those of each, and they to it."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x)
        spikes = self.lif1(current.unsqueeze(0).expand(T, *current.shape))
        shared, own = current.unsqueeze(0), spikes * 0.5
        logits: Tensor = self.readout((self.lif2(own + shared) + self.lif2(shared + own)).flatten(2))
        return logits


class Grey(Mixed):
    """The first neurons read a grey image once for each of their channels."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif1(x.unsqueeze(0).expand(T, -1, 6, -1, -1))
        logits: Tensor = self.readout(self.lif2(spikes * 0.8).flatten(2))
        return logits


class Doubled(Mixed):
    """The second neurons take two steps in each."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x)
        spikes = self.lif1(current.unsqueeze(0).expand(T, *current.shape))
        twice = spikes.unsqueeze(1).expand(T, 2, *spikes.shape[1:]).flatten(0, 1)
        logits: Tensor = self.readout(self.lif2(twice * 0.4).unflatten(0, (T, 2))[:, 1].flatten(2))
        return logits


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
@needs_torch_2_13
def test_networks_of_ones_own(layout: str, tmp_path: Path) -> None:
    network = SideBySide(Mixed, OnceForAll, Grey, Doubled)
    unchecked(network, tmp_path / "m.onnx", ExportConfig(layout=layout, T=4))  # type: ignore[arg-type]
    assert_same_answers(tmp_path / "m.onnx", digits().images, [4])


class OneBehindTheOther(Mixed):
    """A convolution reads the spikes of two layers of neurons, one batch behind the other, as of two views."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.between = nn.Conv2d(6, 6, 3, padding=1)
        self.lif3 = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x).unsqueeze(0).repeat(T, 1, 1, 1, 1)
        both = torch.cat([lif(current).flatten(0, 1) for lif in (self.lif1, self.lif2)])
        one, other = self.between(both).unflatten(0, (2, T, -1))
        logits: Tensor = self.readout(self.lif3(one - other).flatten(2))
        return logits


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_neurons_that_are_joined_along_the_batch(layout: Any, tmp_path: Path) -> None:
    unchecked(OneBehindTheOther(), tmp_path / "m.onnx", ExportConfig(layout=layout, T=4))
    assert_same_answers(tmp_path / "m.onnx", digits().images, [4])


def residual_images() -> Array:
    return np.random.default_rng(0).integers(256, size=(32, *for_export("resnet19").image_shape), dtype=np.uint8)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_residual_networks_have_no_other_passes_over_memory(
    layout: Any, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between convolutions of ResNet-19 stand native operators, and nothing that reorders or copies."""
    keep_ort_convolutions(monkeypatch)
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_of("resnet19", ExportConfig(layout, T=3, target=target)))
    assert_same_answers(path, residual_images(), [3])
    _, operators = joined(path.read_bytes())
    assert not {"Scan", "Split", "Mul", "Add", "HardSigmoid", "ThresholdedRelu"} & set(operators)
    assert operators.count("ReorderInput") <= 2 or layout == "step"  # a state has the usual order


@pytest.fixture(scope="module")
def scales() -> Calibration:
    """Of the currents of ResNet-19, for all layouts."""
    config = ExportConfig(T=3, trained_T=3, precision="int8")
    with shared_traces():
        *_, found = build_graph(for_export("resnet19"), config, calibration=(residual_images(), None))
    assert found is not None
    return found


@pytest.mark.parametrize(("layout", "most", "shapes"), [("unrolled", 2, 0), ("dynamic", 3, 1), ("step", 3, 0)])
def test_int8_residual_networks_stay_with_channels_last(
    layout: Any, most: int, shapes: int, scales: Calibration, tmp_path: Path
) -> None:
    """What is left turns the first spikes of a dynamic or step graph, the mean of each channel, and the logits, and
    puts together the shape that a dynamic graph's logits take."""
    path, x = tmp_path / "m.onnx", residual_images()
    config = ExportConfig(layout, T=3, trained_T=3, precision="int8")
    with shared_traces():
        graph, *_ = build_graph(for_export("resnet19"), config, calibration=scales)
    path.write_bytes(ir.to_proto(graph.model).SerializeToString())
    assert_same_answers(path, x, [3])
    _, operators = joined(path.read_bytes(), states_of(path))
    others = {"Cast", "Split", "DequantizeLinear", "QuantizeLinear"}
    assert operators.count("Transpose") <= most and not others & set(operators)
    assert operators.count("Concat") == shapes


def states_of(path: Path) -> list[tuple[str, str]]:
    return [(state["input"], state["output"]) for state in Engine(path, native=False).metadata["states"]]


@pytest.mark.skipif(native.missing() is not None or not has_additions(), reason="this processor, or its system, cannot")
def test_states_with_channels_last_have_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever states go: from step to step, in a pool, out of one engine and into the other."""
    path, x = tmp_path / "m.onnx", residual_images()
    path.write_bytes(graph_of("resnet19", ExportConfig("step", T=3)))
    engine = Engine(path, native=True)
    monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", lambda model, states: fuse_model(model))
    usual = Engine(path, native=True)
    assert usual.states_last == frozenset() and len(engine.states_last) > len(engine.metadata["states"]) / 2
    _, operators = joined(path.read_bytes(), states_of(path))
    assert operators.count("Transpose") < joined(path.read_bytes())[1].count("Transpose") / 2

    exit = Exit(0.6)
    one, other = (each.run(x, 3, exit=exit) for each in (engine, usual))
    np.testing.assert_array_equal(one.per_step, other.per_step)
    assert len(np.unique(one.steps)) > 1
    for mine, theirs in ((engine, usual), (usual, engine)):
        first, second = mine.stream(3), theirs.stream(3)
        first.push(x[:3])
        second.push(x[3:6])
        second.state = first.state
        assert all(
            u.shape == (3, *s["shape"]) for u, s in zip(second.state.values(), engine.metadata["states"], strict=True)
        )
        np.testing.assert_array_equal(first.push(x[:3]).step_logits, second.push(x[:3]).step_logits)
        for name, u in first.state.items():
            np.testing.assert_array_equal(u, second.state[name])
    pools = [StreamPool(each, max_batch=4) for each in (engine, usual)]
    for pool in pools:
        ids = [pool.open() for _ in range(20)]  # more than there are rows at first
        pool.push(dict(zip(ids, x, strict=False)))
        pool.close(ids[2])
        ids.append(pool.open(pools[0].state(ids[4])))
    pushed = [pool.push(dict.fromkeys((5, 20, 21, 1))) for pool in pools]
    for id, result in pushed[0].items():
        np.testing.assert_array_equal(result.logits, pushed[1][id].logits)
    np.testing.assert_array_equal(pushed[0][21].logits, pushed[0][5].logits)


class Nested(Mixed):
    """Neurons that have others within, named as what has its channels last might be."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.between = nn.Conv2d(6, 6, 3, padding=1)
            self.lif1.last = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x)
        spikes = self.lif1(current.unsqueeze(0).expand(T, *current.shape))
        spikes = self.lif1.last(self.between(spikes.flatten(0, 1)).unflatten(0, (T, -1)))
        spikes = self.lif2(self.between(spikes.flatten(0, 1)).unflatten(0, (T, -1)))
        logits: Tensor = self.readout(spikes.flatten(2))
        return logits


def test_neurons_of_any_name_keep_their_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAST_CHANNELS", "LEAST_ADDED"):
        monkeypatch.setattr(f"tetdeploy.native.convolution.{name}", 1)
    unchecked(Nested(), tmp_path / "m.onnx", ExportConfig("step", T=4))
    assert {"u.lif1", "u.lif1.last"} < {name for name, _ in states_of(tmp_path / "m.onnx")}
    plain, fast = (Engine(tmp_path / "m.onnx", native=native).run(digits().images, 3) for native in (False, True))
    np.testing.assert_allclose(plain.logits, fast.logits, rtol=1e-4, atol=1e-5)


def quantised_again(scale: str, zero: str, **constants: Array) -> list[str]:
    """The operators that `turn_bytes` leaves of bytes that become numbers, are turned and become bytes."""
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 3, 1, 2]),
        helper.make_node("QuantizeLinear", ["b", scale, zero], ["y"]),
    ]
    constants = {"s": np.array(0.3, np.float32), "z": np.array(7, np.uint8)} | constants
    model = graph(nodes, {"x": (UINT8, ["N", 4, 5, 4])}, {"y": UINT8}, constants)
    made = onnx.ModelProto.FromString(model)
    turn_bytes(made.graph)
    x = np.arange(160, dtype=np.uint8).reshape(2, 4, 5, 4)
    np.testing.assert_array_equal(run(model, {"x": x})[0], run(made.SerializeToString(), {"x": x})[0])
    return [node.op_type for node in made.graph.node]


def test_bytes_are_turned_as_bytes() -> None:
    assert quantised_again("s", "z") == ["Transpose"]


@pytest.mark.parametrize(
    ("scale", "zero", "constants"),
    [
        ("t", "z", {"t": np.array(0.4, np.float32)}),
        ("s", "w", {"w": np.array(9, np.uint8)}),
        ("s", "z", {"s": np.array([0.3, 0.1, 0.2, 0.4], np.float32), "z": np.zeros(4, np.uint8)}),  # of another axis
    ],
    ids=["scale", "zero-point", "scales-of-channels"],
)
def test_bytes_that_change_are_not(scale: str, zero: str, constants: dict[str, Array]) -> None:
    assert quantised_again(scale, zero, **constants) == ["DequantizeLinear", "Transpose", "QuantizeLinear"]


def channels_last(
    nodes: list[onnx.NodeProto], element: int = UINT8, image: tuple[int, int] = (5, 7)
) -> tuple[list[str], bytes, bytes]:
    """The operators after `keep_last` of nodes that make `y` of `x [N, H, W, 3]`, and the graphs before and after."""
    declared: dict[str, tuple[int, Sequence[int | str]]] = {"x": (element, ["N", *image, 3])}
    constants = {"k": np.array(0.5, np.float32), "image": np.array([2, 3]), "channels": np.array([1])}
    constants |= {"all": np.array([-1, 1, 2]), "rows": np.array([2])}
    last_of = {name for node in nodes for name in node.output} - {name for node in nodes for name in node.input}
    before = graph(nodes, declared, dict.fromkeys(sorted(last_of), FLOAT), constants)
    model = onnx.ModelProto.FromString(before)
    first = {UINT8: Kind(UINT8, (None, 3, *image)), FLOAT: Kind(FLOAT, (None, 3, *image))}
    kinds = {"x": Kind(element, (None, *image, 3))}
    for node in nodes:
        kind = UINT8 if node.op_type == "Transpose" and element == UINT8 else FLOAT
        kinds |= dict.fromkeys(node.output, first[kind])
    elementwise = {k for k, node in enumerate(nodes) if node.op_type not in ("Transpose", "ReduceMean", "ReduceSum")}
    kept = keep_last(model.graph, kinds, elementwise, {"k"})
    after = model.SerializeToString()
    assert kept or after == before
    return [node.op_type for node in model.graph.node], before, after


TURN = helper.make_node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2])
BACK = helper.make_node("Transpose", ["b"], ["y"], perm=[0, 2, 3, 1])
CAST = helper.make_node("Cast", ["a"], ["b"], to=FLOAT)
MEAN = helper.make_node("ReduceMean", ["b", "image"], ["y"])
HALF = helper.make_node("Mul", ["a", "k"], ["b"])


def test_a_mean_over_an_image_of_bytes_needs_no_transpose() -> None:
    operators, before, after = channels_last([TURN, CAST, MEAN])
    assert operators == ["Cast", "ReduceMean", "Transpose"]  # of one number a channel
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(run(before, {"x": x})[0], run(after, {"x": x})[0])


def summed(axes: str, *, keepdims: int = 0) -> onnx.NodeProto:
    return helper.make_node("ReduceSum", ["b", axes], ["y"], keepdims=keepdims)


@pytest.mark.parametrize("axes", ["channels", "image", "all"])
def test_sums_that_count_need_no_transpose(axes: str) -> None:
    operators, before, after = channels_last([TURN, CAST, summed(axes)])
    assert operators == ["Cast", "ReduceSum"]
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    counted = run(before, {"x": x})[0]
    np.testing.assert_array_equal(counted, run(after, {"x": x})[0])
    assert counted.sum() == x.sum()


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        pytest.param([TURN, CAST, summed("rows")], {}, id="channels-and-columns-are-left"),
        pytest.param([TURN, CAST, summed("all", keepdims=1)], {}, id="axes-of-a-sum-stay"),
        pytest.param([TURN, CAST, summed("k")], {}, id="axes-unknown"),
        pytest.param([TURN, HALF, summed("all")], {"element": FLOAT}, id="sum-of-floats"),
        pytest.param([TURN, CAST, summed("all")], {"image": (200, 200)}, id="sum-too-large"),
        pytest.param([TURN, HALF, MEAN], {"element": FLOAT}, id="floats"),  # the order of a sum has its bits
        pytest.param([TURN, CAST, MEAN], {"image": (300, 300)}, id="large"),
        pytest.param([TURN, CAST, helper.make_node("ReduceMean", ["b", "k"], ["y"])], {}, id="other-axes"),
        pytest.param([TURN, CAST, helper.make_node("ReduceMean", ["b", "image"], ["y"], keepdims=0)], {}, id="no-axes"),
        pytest.param([TURN, CAST, MEAN, helper.make_node("Add", ["b", "k"], ["z"])], {}, id="needed-in-both-orders"),
        pytest.param([TURN, HALF, BACK], {"element": FLOAT}, id="output"),
    ],
)
def test_a_transpose_stays(nodes: list[onnx.NodeProto], options: dict[str, Any]) -> None:
    operators, before, after = channels_last(nodes, **options)
    assert operators == [node.op_type for node in nodes] and before == after


def test_tensors_of_unknown_rank_stay() -> None:
    nodes = [helper.make_node("ReorderOutput", ["x"], ["a"], domain="com.microsoft.nchwc", channels=16), HALF]
    model = onnx.ModelProto.FromString(graph(nodes, {"x": (FLOAT, ["N", 16, 5, 5])}, {"b": FLOAT}))
    assert not keep_last(model.graph, {name: Kind(FLOAT, ()) for name in "xab"}, {1}, {"k"})


def test_spikes_that_are_summed_later_go_there_as_bytes() -> None:
    """A convolution reads them, too: they are not written a second time, as float32."""
    nodes = [
        helper.make_node("Greater", ["x", "k"], ["fires"]),
        helper.make_node("Cast", ["fires"], ["spikes"], to=UINT8),
        helper.make_node("MaxPool", ["spikes"], ["pooled"], kernel_shape=[1, 1]),  # as a convolution of bytes
        helper.make_node("Cast", ["pooled"], ["current"], to=FLOAT),
        helper.make_node("Cast", ["spikes"], ["skipped"], to=FLOAT),
        helper.make_node("Add", ["current", "skipped"], ["sum"]),
        helper.make_node("Greater", ["sum", "k"], ["fires2"]),
        helper.make_node("Cast", ["fires2"], ["y"], to=UINT8),
    ]
    model = graph(nodes, {"x": (FLOAT, ["N", 2, 5, 5])}, {"y": UINT8}, {"k": np.array(0.5, np.float32)})
    assert assert_same(model, {"x": floats(3, 2, 5, 5)}) == ["Elementwise", "MaxPool", "Elementwise"]
    made, _ = joined(model)
    skips = onnx.ModelProto.FromString(made).graph.node[-1]
    ports = next(a.ints for a in skips.attribute if a.name == "input_ports")
    assert list(ports) == [UINT8, 1, UINT8, 1]


@pytest.mark.parametrize("nodes", [
    [helper.make_node("Sqrt", ["x"], ["y"])],
    [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)],
    [helper.make_node("Add", ["x", "from outside"], ["y"])],
    [helper.make_node("Add", ["x", "u"], ["z"])],
])  # fmt: skip
def test_neurons_that_no_program_knows_are_refused(nodes: list[onnx.NodeProto]) -> None:
    with pytest.raises(UnfusableError, match="neurons"):
        check_neuron_step(NeuronStep(tuple(nodes), {}, u="u", x="x", next_u="x", spikes="y"))


def test_sessions_may_be_shared_by_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine, x = Engine(exported("dynamic"), native=True), digits().images
    wanted = [engine.run(x[k : k + 3], 1 + k % 4).per_step for k in range(24)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda k: engine.run(x[k : k + 3], 1 + k % 4).per_step, range(24)))
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@needs_emulator
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell", "max"])
def test_older_processors_take_other_code_with_the_same_bits(processor: str, tmp_path: Path) -> None:
    """Emulated: Nehalem has no AVX, Haswell AVX2, the last one what the emulator knows."""
    np.save(tmp_path / "x.npy", digits().images[:4])
    code = """
import sys
import numpy as np
from tetdeploy import Engine
path, x = sys.argv[1], np.load(sys.argv[2])
for native in (False, True):
    np.save(f"{sys.argv[2]}.{native}.npy", Engine(path, native=native, threads=1).run(x).per_step)
"""
    x = tmp_path / "x.npy"
    run_emulated(processor, "-c", code, int8_exported("unrolled"), x)
    np.testing.assert_array_equal(np.load(f"{x}.True.npy"), np.load(f"{x}.False.npy"))


# --------------------------------------------------------------------------------------------------------- choices


def test_small_networks_take_the_time_for_it_only_when_asked() -> None:
    assert not Engine(exported("step")).native
    assert Engine(exported("step"), native=True).native


def test_large_networks_have_it_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.runtimes.sessions.NATIVE_FROM", 1)
    assert Engine(exported("step")).native
    monkeypatch.setattr("tetdeploy.native.missing", lambda: "not compiled")
    assert not Engine(exported("step")).native
    with pytest.raises(ValueError, match="not compiled"):
        Engine(exported("step"), native=True)


@pytest.mark.parametrize(("system", "why"), [("linux", "with a C compiler"), ("win32", "not compile on Windows")])
def test_why_there_is_no_library(system: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(sys, "platform", system)
    assert why in str(native.missing())


def test_where_there_is_nothing_to_do_the_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", lambda model, states: None)
    assert not Engine(exported("step"), native=True).native


def test_only_what_runs_on_a_cpu_and_is_large_gains_from_it() -> None:
    large, small = ({"neurons": [{"shape": [2, 50, 100]}, {"shape": [n]}]} for n in (10_000, 9_999))
    assert gains_from_native(large, "cpu", "onnxruntime") and not gains_from_native(small, "cpu", "onnxruntime")
    assert not gains_from_native(large, "cuda", "onnxruntime") and not gains_from_native(large, "cpu", "openvino")


def test_the_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETDEPLOY_NATIVE", "maybe")
    for wanted in (None, True):  # whether or not the network is large enough for it
        with pytest.raises(ValueError, match=r"TETDEPLOY_NATIVE is 'maybe'; it must be 0, .* or 1"):
            Engine(exported("step"), native=wanted)
    assert not Engine(exported("step"), native=False).native
    for on in ("1", ""):
        monkeypatch.setenv("TETDEPLOY_NATIVE", on)
        assert Engine(exported("step"), native=True).native
    monkeypatch.setenv("TETDEPLOY_NATIVE", "0")
    with pytest.raises(ValueError, match="switched off by TETDEPLOY_NATIVE=0"):
        Engine(exported("step"), native=True)


def test_refused_where_onnxruntime_does_not_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_build(monkeypatch, ["CUDAExecutionProvider"])
    with pytest.raises(ValueError, match="native is for ONNX Runtime on a CPU, not onnxruntime on cuda"):
        Engine(exported("step"), device="cuda", native=True)
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="native is for ONNX Runtime on a CPU, not openvino on cpu"):
        Engine(exported("unrolled", T=3), runtime="openvino", native=True)


def test_what_goes_wrong_leaves_the_engine_as_it_would_be_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.runtimes.sessions.NATIVE_FROM", 1)

    def fail(*_: object) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", fail)
    with pytest.warns(RuntimeWarning, match=r"step.*runs on ONNX Runtime's own operators alone: no space left"):
        engine = Engine(exported("step"))
    assert not engine.native and engine.run(digits().images[:2], 2).logits.shape == (2, 10)
    with pytest.raises(ValueError, match="cannot run natively: no space left"):
        Engine(exported("step"), native=True)


def test_counting_is_native_and_other_overlays_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[bytes | None]()

    def fuse(model: bytes, *states: Any) -> bytes | None:
        made.append(fuse_model(model, *states))
        return made[-1]

    monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", fuse)
    engine, x = Engine(exported("dynamic"), native=True), digits().images[:4]
    engine.run_with(engine.counting_overlay, x, 3)
    assert len(made) == 1
    engine.count(x, 3)
    engine.count(x, 3)
    assert len(made) == 2 and None not in made


@pytest.mark.parametrize("export", [exported, int8_exported])
def test_spikes_are_read_natively(export: Any) -> None:
    engine, x, overlay = Engine(export("dynamic"), native=False), digits().images[:4], spikes_overlay(["lif1", "lif3"])
    expected, wanted = engine.run_with(overlay, x, 3)
    result, spikes = engine.run_with(overlay, x, 3, native=True)  # it would warn of what it cannot do
    np.testing.assert_allclose(result.per_step, expected.per_step, rtol=0, atol=1e-5)
    assert wanted.keys() == spikes.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(spikes[name], value)


def test_counting_that_goes_wrong_natively_is_left_to_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, x = Engine(exported("dynamic"), native=True), digits().images[:4]
    monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", Mock(side_effect=OSError("no space left")))
    with pytest.warns(RuntimeWarning, match=r"dynamic.*runs on ONNX Runtime's own operators alone: no space left"):
        counts = engine.count(x, 3)[1]
    for name, value in Engine(exported("dynamic"), native=False).count(x, 3)[1].items():
        np.testing.assert_array_equal(value, counts[name])


# -------------------------------------------------------------------------------------------------------- programs


def test_a_register_is_free_when_nobody_reads_its_value_any_more() -> None:
    program = Program()
    value = program.add(Op.LOAD, 0)
    for k in range(300):
        value = program.add(Op.ADD_K, value, k=program.immediate(float(k % 3)))
    program.stores = [(value, 0, 0)]
    code = program.encode()
    assert max(code[1::5]) < 2 and len(program.immediates) == 3


@pytest.mark.parametrize("backwards", [False, True])
def test_the_steps_of_a_neuron_need_no_more_registers_than_one(backwards: bool) -> None:
    """Whatever the order of the outputs: spikes, on which nothing depends, and currents, on which spikes do."""
    program, u = Program(), None
    for t in range(100):
        current = program.add(Op.ADD, program.add(Op.LOAD, 0, t), program.add(Op.LOAD, 1, t))
        u = current if u is None else program.add(Op.ADD, u, current)
        spikes = program.add(Op.GREATER_K, u, k=program.immediate(1.0))
        u = program.add(Op.SUB, u, program.add(Op.THRESHOLDED_RELU, u, k=program.immediate(1.0)))
        program.stores += [(current, 0, t), (spikes, 1, t)]
    if backwards:
        program.stores.reverse()
    code = program.encode()
    assert max(d for op, d in zip(code[::5], code[1::5], strict=True) if op != Op.STORE) < 4


def test_what_no_output_needs_is_left_out() -> None:
    program = Program()
    value = program.add(Op.LOAD, 0)
    program.add(Op.ADD_K, value, k=program.immediate(1.0))
    program.stores = [(value, 0, 0)]
    assert program.encode()[::5] == [Op.LOAD, Op.STORE]


def test_too_many_values_at_once_are_refused() -> None:
    program = Program()
    values = [program.add(Op.LOAD, 0, part) for part in range(MAX_REGISTERS)]
    total = values[0]
    for value in values[1:]:
        total = program.add(Op.ADD, total, value)
    program.stores = [(program.add(Op.MUL, value, total), 0, part) for part, value in enumerate(values)]
    with pytest.raises(ValueError, match=f"{MAX_REGISTERS + 1} values at once"):
        program.encode()


def test_states_that_become_one_another_are_refused() -> None:
    program = Program()
    first, second = program.state(), program.state()
    program.stores = [(program.add(Op.ADD, first, second), 0, 0)]
    assert program.encode()
    program.kept[second] = first
    with pytest.raises(ValueError, match="a state becomes another one"):
        program.encode()


def test_a_long_chain_is_one_node() -> None:
    names = ["x", *(f"a{k}" for k in range(1, 1500)), "y"]
    adds = [helper.make_node("Add", [one, "x"], [other]) for one, other in itertools.pairwise(names)]
    model = graph(adds, {"x": (FLOAT, ["N", 4])}, {"y": FLOAT})
    made = fuse_model(model)
    assert made is not None and len(onnx.ModelProto.FromString(made).graph.node) == 1
    feed = {"x": floats(2, 4)}
    np.testing.assert_array_equal(run(model, feed)[0], run(made, feed, joined=True)[0])


def test_more_steps_than_registers_leave_the_region_to_onnxruntime() -> None:
    """Sums that all wait for the last step."""
    T = 300
    pieces = [f"x{t}" for t in range(T)]
    nodes = [helper.make_node("Split", ["x"], pieces, axis=0, num_outputs=T)]
    nodes += [helper.make_node("Add", [f"x{t}", f"x{T - 1 - t}"], [f"a{t}"]) for t in range(T)]
    nodes.append(helper.make_node("Concat", [f"a{t}" for t in range(T)], ["y"], axis=0))
    model = graph(nodes, {"x": (FLOAT, ["TN", 4])}, {"y": FLOAT})
    made = fuse_model(model)
    feed = {"x": floats(2 * T, 4)}
    if made is not None:
        np.testing.assert_array_equal(run(model, feed)[0], run(made, feed, joined=True)[0])


def elementwise(given: int = FLOAT, outputs: Sequence[str] = ("y",), **changes: Any) -> bytes:
    """A program that adds 1, damaged by `changes`, in a graph that says that it gives `given`."""
    attributes: dict[str, Any] = {
        "program": [Op.LOAD, 0, 0, 0, 0, Op.ADD_K, 0, 0, 0, 0, Op.STORE, 0, 0, 0, 0],
        "immediates": [1.0],
        "input_ports": [FLOAT, 1],
        "output_ports": [FLOAT, 1],
        "states": -1,
    } | changes
    node = helper.make_node("Elementwise", ["x"], outputs, domain="ai.tetdeploy", **attributes)
    return graph([node], {"x": (FLOAT, ["N", 3])}, {"y": given})


def test_the_program_that_is_damaged_below_runs() -> None:
    x = floats(2, 3)
    np.testing.assert_array_equal(run(elementwise(), {"x": x}, joined=True)[0], x + 1)


@pytest.mark.parametrize(("changes", "match"), [
    ({"program": [Op.LOAD, 0, 1, 0, 0]}, "damaged"),  # another input
    ({"program": [Op.LOAD, 0, 0, 1, 0]}, "damaged"),  # another part
    ({"program": [Op.LOAD, MAX_REGISTERS, 0, 0, 0]}, "damaged"),  # another register
    ({"program": [Op.LOAD, -1, 0, 0, 0]}, "damaged"),
    ({"program": [Op.STORE, 1, 0, 0, 0]}, "damaged"),  # another output
    ({"program": [Op.STORE, 0, 0, 1, 0]}, "damaged"),
    ({"program": [Op.ADD, 0, 0, 999, 0]}, "damaged"),
    ({"program": [Op.ADD_K, 0, 0, 0, 2]}, "damaged"),  # another immediate
    ({"program": [23, 0, 0, 0, 0]}, "damaged"),  # another operation
    ({"program": [0, 0, 0]}, "wrong length"),
    ({"input_ports": [FLOAT, 0]}, "no parts"),
    ({"output_ports": [FLOAT, 2**62]}, "no parts"),
    ({"input_ports": [TensorProto.DOUBLE, 1]}, "not supported"),
    ({"input_ports": [FLOAT, 1, FLOAT, 1]}, "another number of inputs"),
    ({"output_ports": [FLOAT, 1, FLOAT, 1]}, "another number of outputs"),
    ({"states": 1}, "another number of inputs"),
])  # fmt: skip
def test_damaged_programs_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(Exception, match=match):
        run(elementwise(**changes), {"x": floats(2, 3)}, joined=True)


def fires_first(u: int, current: int, part: int) -> list[tuple[int, ...]]:
    """Instructions: neurons of threshold 0.5 with the current of a register fire, and their membranes, negated, are in
    another; register 9 is free."""
    spikes = [(Op.GREATER_K, 9, current, 0, 0), (Op.STORE, 0, 9, part, 0)]
    return [*spikes, (Op.THRESHOLDED_RELU, u, current, 0, 0), (Op.SUB, u, u, current, 0)]


def fires_next(u: int, before: int, current: int, part: int) -> list[tuple[int, ...]]:
    spikes = [(Op.SUB, u, before, current, 0), (Op.LESS_K, 9, u, 0, 1), (Op.STORE, 0, 9, part, 0)]
    return [*spikes, (Op.THRESHOLDED_RELU, u, u, 0, 1)]


LOADS = [(Op.LOAD, part, 0, part, 0) for part in range(3)]


@pytest.mark.parametrize("program", [
    [*LOADS, *fires_first(3, 0, 0), *fires_next(3, 3, 1, 1), *fires_next(3, 3, 2, 2)],  # as it should be
    [*LOADS, *fires_first(3, 0, 0), *fires_first(4, 1, 1), *fires_next(4, 3, 2, 2)],  # membranes from before others
    [*LOADS, *fires_first(3, 0, 0), (Op.LOAD, 3, 0, 1, 0), *fires_next(3, 3, 2, 1)],  # a tensor for membranes
    [*LOADS, *fires_first(1, 0, 0), *fires_first(3, 1, 1)],  # membranes for a current
    [(Op.DEQUANTIZE, 0, 0, 0, 2), *fires_first(1, 0, 0)],  # a float32 tensor that is dequantised
])  # fmt: skip
def test_programs_that_look_like_a_chain_of_neurons(program: list[tuple[int, ...]]) -> None:
    x = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    numbers = np.array([0.5, -0.5, 0.25, 3.0], np.float32)
    node = helper.make_node(
        "Elementwise", ["x"], ["y"], domain="ai.tetdeploy", program=[n for step in program for n in step],
        immediates=numbers, input_ports=[FLOAT, 3], output_ports=[UINT8, 3], states=-1,
    )  # fmt: skip
    given = run(graph([node], {"x": (FLOAT, ["N", 3])}, {"y": UINT8}), {"x": x}, joined=True)[0].reshape(3, 200, 3)
    registers, parts = dict[int, Array](), x.reshape(3, 200, 3)
    for op, d, a, b, k in program:
        value = registers.get(a)
        if op == Op.STORE:
            np.testing.assert_array_equal(given[b], value)
        elif op == Op.LOAD:
            registers[d] = parts[b]
        elif op == Op.DEQUANTIZE:
            registers[d] = (parts[b] - numbers[k]) * numbers[k + 1]
        elif op == Op.SUB:
            registers[d] = registers[a] - registers[b]
        elif op == Op.THRESHOLDED_RELU:
            registers[d] = np.where(value > numbers[k], value, np.float32(0))
        else:
            registers[d] = value > numbers[k] if op == Op.GREATER_K else value < numbers[k]


def running_sum(states: int = 1) -> bytes:
    """x summed over the steps, and a constant current at each: what lasts is the first register."""
    program = Program()
    state = program.state()
    total = program.add(Op.ADD, program.add(Op.ADD, state, program.add(Op.LOAD, 0)), program.add(Op.LOAD, 1))
    program.stores = [(total, 0, 0)]
    program.kept[state] = total
    node = helper.make_node(
        "Elementwise", ["x", "once", "steps"], ["y"], domain="ai.tetdeploy", states=states, program=program.encode(),
        immediates=program.immediates, input_ports=[FLOAT, 0, FLOAT, -1], output_ports=[FLOAT, 0],
    )  # fmt: skip
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {
        "x": (FLOAT, ["TN", 700]), "once": (FLOAT, ["N", 700]), "steps": (UINT8, ["N", "T"]),
    }  # fmt: skip
    return graph([node], inputs, {"y": FLOAT})


@pytest.mark.parametrize(("N", "T"), [(1, 1), (3, 4), (40, 7)])
def test_a_program_that_runs_once_for_each_step(N: int, T: int) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (T, N, 700)).astype(np.float32)
    once = np.random.default_rng(1).integers(-9, 9, (N, 700)).astype(np.float32)
    feed = {"x": x.reshape(T * N, 700), "once": once, "steps": np.zeros((N, T), np.uint8)}
    for threads in (1, 3):
        y = run(running_sum(), feed, threads, joined=True)[0]
        np.testing.assert_array_equal(y.reshape(T, N, 700), np.cumsum(x + once, axis=0))


def test_steps_that_do_not_fit_are_refused() -> None:
    feed = {"x": floats(6, 700), "once": floats(3, 700), "steps": np.zeros((3, 4), np.uint8)}
    with pytest.raises(Exception, match="cut into its steps"):
        run(running_sum(), feed, joined=True)
    with pytest.raises(Exception, match="different shapes"):
        run(running_sum(), feed | {"steps": np.zeros((3, 3), np.uint8)}, joined=True)
    with pytest.raises(Exception, match="there is no step"):
        run(running_sum(), feed | {"steps": np.zeros((3, 0), np.uint8)}, joined=True)
    with pytest.raises(Exception, match="too many steps"):
        run(running_sum(), feed | {"steps": np.empty((0, 2**62), np.uint8)}, joined=True)
    with pytest.raises(Exception, match="too many states"):
        run(running_sum(states=MAX_REGISTERS + 1), feed, joined=True)


def test_a_part_before_the_first_is_refused_where_a_program_runs_for_each_step() -> None:
    program = [Op.DEQUANTIZE, 1, 0, -1, 0, Op.SUB, 2, 0, 1, 0, Op.LESS_K, 1, 2, 0, 0, Op.STORE, 0, 1, 0, 0]
    node = helper.make_node(
        "Elementwise", ["x", "steps"], ["y"], domain="ai.tetdeploy", states=1, program=program,
        immediates=[0.0, 1.0], input_ports=[UINT8, 0], output_ports=[UINT8, 0],
    )  # fmt: skip
    model = graph([node], {"x": (UINT8, ["TN", 8]), "steps": (UINT8, ["N", "T"])}, {"y": UINT8})
    with pytest.raises(Exception, match="damaged"):
        run(model, {"x": np.zeros((4, 8), np.uint8), "steps": np.zeros((2, 2), np.uint8)}, joined=True)


def test_tensors_that_do_not_fit_are_refused_in_the_call() -> None:
    with pytest.raises(Exception, match="cut into its steps"):
        run(elementwise(input_ports=[FLOAT, 3]), {"x": floats(2, 3)}, joined=True)
    for given in (UINT8, TensorProto.STRING):
        with pytest.raises(Exception, match="another type"):
            run(elementwise(given), {"x": floats(400, 3)}, joined=True)
    with pytest.raises(Exception, match="no name"):
        run(elementwise(outputs=["y", ""], output_ports=[FLOAT, 1, FLOAT, 1]), {"x": floats(2, 3)}, joined=True)
    node = helper.make_node(
        "Elementwise", ["x", "z"], ["y"], domain="ai.tetdeploy", states=-1, immediates=[0.0],
        program=[Op.LOAD, 0, 0, 0, 0, Op.LOAD, 1, 1, 0, 0, Op.ADD, 0, 0, 1, 0, Op.STORE, 0, 0, 0, 0],
        input_ports=[FLOAT, 1, FLOAT, 1], output_ports=[FLOAT, 1],
    )  # fmt: skip
    model = graph([node], {"x": (FLOAT, ["N", 3]), "z": (FLOAT, ["M", 3])}, {"y": FLOAT})
    with pytest.raises(Exception, match="different shapes"):
        run(model, {"x": floats(2, 3), "z": floats(3, 3)}, joined=True)


@pytest.mark.skipif(not has_additions() or not shutil.which("cc"), reason="this processor, or its system, cannot")
@pytest.mark.parametrize("source", ["chains", "lookups", "tiles"])
def test_compiles_for_the_processor_alone(source: str, tmp_path: Path) -> None:
    """As with CFLAGS=-march=native, which functions for several processors must bear."""
    file = Path(native.__file__).with_name(f"{source}.c")
    compiled = subprocess.run(
        ["cc", "-march=native", "-O1", "-fPIC", "-c", str(file), "-o", str(tmp_path / "made.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stderr


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations"])
def test_fast_mathematics_of_CFLAGS_stay_out(flag: str, tmp_path: Path) -> None:
    """They would change bits, and as options of the linker, before GCC 13, have the process flush numbers near 0."""
    (made := tmp_path / "made.o").touch()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (library,) = project["tool"]["setuptools"]["ext-modules"]

    def said(*arguments: str) -> str:
        done = subprocess.run(["cc", flag, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    compiling = [*library["extra-compile-args"], "-dM", "-E", "-x", "c", "/dev/null"]
    assert "__FAST_MATH__" not in said(*compiling) and "__ASSOCIATIVE_MATH__" not in said(*compiling)
    assert "crtfastmath" not in said("-shared", str(made), *library["extra-link-args"], "-###")


def test_a_library_of_another_version_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"_library.* was compiled from another version: install tetdeploy again"):
        native._ask("of_a_later_version")
