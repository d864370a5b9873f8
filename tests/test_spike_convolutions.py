"""The native float32 convolutions of spikes are as exact as float32 can be, and replace only those they can compute."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_helpers import digits, exported, keep_ort_convolutions
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from zoo_helpers import for_export, graph_of

from tetdeploy import native
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig
from tetdeploy.native.fusing import fuse_model
from tetdeploy.native.packing import LARGEST, digits_of, whole_weights
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.spike_convolutions import MOST, mark_spike_convolutions
from tetdeploy.native.whole_numbers import Whole, WholeNumbers

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
Array = np.ndarray[Any, Any]
WIDE, STEEP = 40, 2.0**23
WAYS: list[Any] = [16, 32, 64, "tiles"]


@pytest.fixture(params=WAYS)
def spiking_op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operator of convolutions of spikes: in tiles, or by additions in vector registers of so many bytes."""
    if request.param not in ways():
        pytest.skip("this processor, or its system, cannot")
    return use(request.param, monkeypatch)


def ways() -> list[Any]:
    """Those of this machine."""
    return [way for way in WAYS if (native.has_tiles() if way == "tiles" else way <= native.vector_bytes())]


def use(way: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of additions, any sums of spikes and any channels."""
    if way == "tiles":
        return "SpikeConvolution"
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(native, "vector_bytes", lambda: way)
    for name, limit in (("MOST_ADDED", 255), ("LEAST_ADDED", 1), ("LEAST_BYTES", 16)):
        monkeypatch.setattr(f"tetdeploy.native.convolution.{name}", limit)
    return "SpikeAdditions"


def convolution(
    weights: Array, before: Sequence[onnx.NodeProto] = (), *, biases: Array | None = None, **attributes: Any
) -> onnx.ModelProto:
    """`y [N, O, H', W']`, of what is `s` after the nodes `before`, or of spikes where `x [N, C, H, W]` is above 0.5."""
    constants = {"half": np.array(0.5, np.float32), "two": np.array(2, np.float32), "w": weights}
    constants |= {"shape": np.array([-1, weights.shape[1], 6, 6]), "all": np.full(4, True)}
    constants |= {} if biases is None else {"b": biases}
    nodes = [
        *(before or [*spiking("x", "s")]),
        helper.make_node("Conv", ["s", "w", *(["b"] if biases is not None else [])], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", FLOAT, ["N", weights.shape[1] * attributes.get("group", 1), 6, 6])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def spiking(x: str, y: str, threshold: str = "half") -> list[onnx.NodeProto]:
    return [
        helper.make_node("Greater", [x, threshold], [f"{y}.fires"]),
        helper.make_node("Cast", [f"{y}.fires"], [y], to=FLOAT),
    ]


def weights_of(*shape: int, seed: int = 0) -> Array:
    """Of channels that differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-4, 2, (shape[0], 1, 1, 1))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def images(n: int, channels: int, height: int = 6, width: int = 6, *, seed: int = 1) -> Array:
    return np.random.default_rng(seed).random((n, channels, height, width), np.float32)


def run(model: bytes, x: Array, threads: int = 2) -> Array:
    return run_all(model, x, threads)[0]


def run_all(model: bytes, x: Array, threads: int = 2) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    native.use(ort, options)
    y: list[Array] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return y


def fused(model: onnx.ModelProto) -> tuple[bytes, list[str]]:
    made = fuse_model(model.SerializeToString())
    assert made is not None
    return made, [node.op_type for node in onnx.ModelProto.FromString(made).graph.node]


def exact(s: Array, weights: Array, biases: Array, strides: Sequence[int], pads: Sequence[int]) -> Array:
    """The convolution in float64."""
    top, left, bottom, right = pads
    padded = torch.from_numpy(np.pad(s, [(0, 0), (0, 0), (top, bottom), (left, right)]).astype(np.float64))
    w, b = torch.from_numpy(weights.astype(np.float64)), torch.from_numpy(biases.astype(np.float64))
    y: Array = nn.functional.conv2d(padded, w, b, tuple(strides)).numpy()
    return y


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_digits_make_the_weights() -> None:
    weights = weights_of(50, 20, 3, 3)
    weights[3], weights[4], weights[5, :2] = 0.0, 1e-40, 3e38
    whole, scales = whole_weights(weights)
    high, middle, low = digits_of(whole).astype(np.int64)
    np.testing.assert_array_equal((high * 256 + middle) * 256 + low, whole)
    made = whole * scales.astype(np.float64).reshape(-1, 1, 1, 1)
    largest = np.abs(weights.astype(np.float64)).max(axis=(1, 2, 3), keepdims=True)
    error = np.abs(made - weights)
    assert (error <= np.maximum(0.501 * largest / LARGEST, np.finfo(np.float32).tiny)).all()
    assert 0.501 / LARGEST < 2**-23.9  # half an ulp of a float32 between 1 and 2 is 2^-24
    assert (made[3] == 0).all() and len(np.unique(low)) == 256 and (np.abs(high) <= 127).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("channels", "kernel", "strides", "pads"),
    [
        ((64, 32), (3, 3), [1, 1], [1, 1, 1, 1]),
        ((130, 70), (3, 3), [2, 2], [1, 1, 1, 1]),
        ((40, 33), (1, 1), [2, 2], [0, 0, 0, 0]),
        ((16, 5), (5, 2), [1, 3], [2, 0, 1, 4]),
    ],
    ids=str,
)
def test_sums_are_exact(
    channels: tuple[int, int],
    kernel: tuple[int, int],
    strides: list[int],
    pads: list[int],
    threads: int,
    spiking_op: str,
) -> None:
    """But for the last roundings, of the lower digits with the bias and of the sum."""
    inputs, outputs = channels
    weights, biases = weights_of(outputs, inputs, *kernel), weights_of(outputs, 1, 1, 1, seed=2).reshape(-1)
    model, operators = fused(convolution(weights, biases=biases, strides=strides, pads=pads))
    assert operators.count(spiking_op) == 1 and "Conv" not in operators
    whole, scales = whole_weights(weights)
    x, scale, bias = images(3, inputs), scales.astype(np.float64).reshape(-1, 1, 1), biases.reshape(-1, 1, 1)
    sums = exact(x > 0.5, whole, np.zeros(outputs), strides, pads)
    below, expected = sums % 65536 * scale + bias, sums * scale + bias
    y = run(model, x, threads)
    assert (np.abs(y - expected) <= 2.0**-24 * (np.abs(expected) + 1.001 * np.abs(below))).all()
    assert np.abs(expected).min() > 0


def test_is_no_less_exact_than_float32(spiking_op: str) -> None:
    """Against the float32 weights in float64, at the size of ResNet-19's last convolutions."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, (2 / 4608) ** 0.5, (64, 512, 3, 3)).astype(np.float32)
    model = convolution(weights, pads=[1, 1, 1, 1])
    x = images(2, 512)
    expected = exact(x > 0.5, weights, np.zeros(64), [1, 1], [1, 1, 1, 1])
    made, plain = fused(model)[0], model.SerializeToString()
    error, usual = (np.sqrt(np.mean((run(each, x) - expected) ** 2)) for each in (made, plain))
    assert error < usual


def test_whole_numbers_up_to_the_largest_stay_as_they_are() -> None:
    weights = np.array([[LARGEST - 1, 1, -3], [LARGEST, -LARGEST, 0]], np.float32)
    for given in (weights, weights / 64):
        whole, scales = whole_weights(given)
        np.testing.assert_array_equal(whole * scales.astype(np.float64)[:, None], given)


@pytest.mark.parametrize("largest", [1, 3, 127, 32767])
def test_weights_on_a_grid_have_float32s_own_sums(largest: int, spiking_op: str) -> None:
    """Multiples of a power of two: where a membrane ends just at the threshold, it does so here."""
    rng = np.random.default_rng(largest)
    steps = 2.0 ** np.arange(-90, 90, 180 // 33)[:33].reshape(-1, 1, 1, 1)
    weights, biases = rng.integers(-largest, largest + 1, (33, 64, 3, 3)), rng.integers(-largest, largest + 1, 33)
    weights, biases = (weights * steps).astype(np.float32), (biases * steps.ravel()).astype(np.float32)
    weights[32] += np.float32(np.pi)  # off any grid, which is nothing to the others
    x, (made, operators) = images(2, 64), fused(convolution(weights, biases=biases))
    assert spiking_op in operators
    expected = exact(x > 0.5, weights, biases, [1, 1], [0] * 4)
    np.testing.assert_array_equal(run(made, x)[:, :32], expected[:, :32])


def test_the_largest_sums_fit(spiking_op: str) -> None:
    """All weights as large as can be, and as many inputs as are taken."""
    channels = MOST // 9
    weights = np.full((16, channels, 3, 3), 0.7, np.float32)
    weights[8:] = -0.7
    made, operators = fused(convolution(weights))
    assert spiking_op in operators
    y = run(made, np.ones((1, channels, 6, 6), np.float32))
    np.testing.assert_allclose(
        y, exact(np.ones((1, channels, 6, 6)), weights, np.zeros(16), [1, 1], [0] * 4), rtol=1e-7
    )
    digit = np.full((16, channels, 3, 3), -128 * 257 * 0.7 / LARGEST, np.float32)  # both lower digits at their limit
    digit[:, 0, 0, 0] = 0.7
    made, _ = fused(convolution(digit))
    y = run(made, np.ones((1, channels, 6, 6), np.float32))
    np.testing.assert_allclose(y, exact(np.ones((1, channels, 6, 6)), digit, np.zeros(16), [1, 1], [0] * 4), rtol=3e-6)


def additions(**change: Any) -> bytes:
    """A node of `additions.c` alone, `y [N, H', W', 1]` of bytes `x [N, H, W, 1]`."""
    own = {"channels": 1, "kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "most": 1, "vector_bytes": 16}
    constants = {
        "w": np.ones((1, 1, 1, 1, 2, 64), np.int32),
        "scale": np.ones(1, np.float32),
        "b": np.ones(1, np.float32),
    }
    graph = helper.make_graph(
        [helper.make_node("SpikeAdditions", ["x", *constants], ["y"], domain=native.DOMAIN, **own | change)],
        "test",
        [helper.make_tensor_value_info("x", UINT8, ["N", "H", "W", 1])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(native.DOMAIN, 1)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"most": 0}, "the largest input is no byte"),
        ({"most": 256}, "the largest input is no byte"),
        ({"vector_bytes": 128}, "this processor has shorter vector registers"),
        ({"channels": 2}, "its weights are not in the right order"),
        ({"kernel_shape": [1, 1025]}, "the kernel is too large"),
    ],
    ids=str,
)
def test_a_damaged_node_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=f"ai.tetdeploy::SpikeAdditions: {says}"):
        run(additions(**change), np.ones((1, 1, 1, 1), np.uint8))


def test_an_input_whose_lists_no_address_reaches_is_refused() -> None:
    """2^29 images of 2^32 zeros, which have lists of 8 bytes: the size would wrap to 0."""
    model = additions(most=2, strides=[2**16] * 2, pads=[2**16, 2**16, 0, 0])
    with pytest.raises(Exception, match="the input is too large"):
        run(model, np.zeros((2**29, 0, 0, 1), np.uint8))


# ----------------------------------------------------------------------------------------------- what is spikes


def node(op: str, inputs: Sequence[str], output: str = "s", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [output], **attributes)


MEAN = node("AveragePool", ["a"], "m", kernel_shape=[2, 2], strides=[2, 2])
STEP = node("HardSigmoid", ["x"], alpha=STEEP, beta=-STEEP)
AS_SPIKES = {
    "greater": spiking("x", "s"),
    "steep": [STEP],
    "steep-negated": [node("HardSigmoid", ["x"], alpha=-STEEP, beta=-STEEP)],
    "steep-small": [node("HardSigmoid", ["x"], alpha=2.0**26, beta=-(2.0**26) * 0.125)],
    "identity": [*spiking("x", "a"), node("Identity", ["a"])],
    "joined": [*spiking("x", "a"), *spiking("x", "b", "two"), node("Concat", ["a", "b"], axis=0)],
    "sum": [*spiking("x", "a"), *spiking("x", "b", "two"), node("Add", ["a", "b"])],
    "most": [*spiking("x", "a"), node("MaxPool", ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])],
    "mean": [*spiking("x", "a"), node("AveragePool", ["a"], kernel_shape=[2, 2], strides=[2, 2])],
    "mean-of-sums": [
        *spiking("x", "a"),
        node("Add", ["a", "a"], "b"),
        node("AveragePool", ["b"], kernel_shape=[1, 4], strides=[1, 2]),
    ],
    "sum-of-means": [*spiking("x", "a"), MEAN, node("Add", ["m", "m"])],
    "turned-mean": [*spiking("x", "a"), MEAN, node("Transpose", ["m"], perm=[0, 1, 3, 2])],
    "part-of-means": [
        *spiking("x", "a"),
        MEAN,
        node("Concat", ["m", "m"], "b", axis=1),
        helper.make_node("Split", ["b"], ["s", "t"], axis=1, num_outputs=2),
    ],
    "whole-part-of-mean": [
        *spiking("x", "a"),
        node("AveragePool", ["a"], "m", kernel_shape=[1, 2], strides=[1, 2]),
        node("Cast", ["m"], "b", to=UINT8),
        node("Cast", ["b"], to=FLOAT),
    ],
    "reshaped": [*spiking("x", "a"), node("Reshape", ["a", "shape"])],
    "shape-known-in-the-call": [
        *spiking("x", "a"),
        node("Shape", ["x"], "dims"),
        node("Compress", ["dims", "all"], "same", axis=0),
        node("Reshape", ["a", "same"]),
    ],
    "deep": [
        *spiking("x", "i0"),
        *(node("Identity", [f"i{k}"], f"i{k + 1}") for k in range(999)),
        node("Identity", ["i999"]),
    ],
    "bytes": [node("Greater", ["x", "half"], "a"), node("Cast", ["a"], "b", to=UINT8), node("Cast", ["b"], to=FLOAT)],
}
OTHERWISE = {
    "numbers": [node("Identity", ["x"])],
    "scaled": [*spiking("x", "a"), node("Mul", ["a", "half"])],
    "slope": [node("HardSigmoid", ["x"])],
    "not-steep-enough": [node("HardSigmoid", ["x"], alpha=STEEP / 2, beta=-STEEP / 2)],
    "not-steep-enough-there": [node("HardSigmoid", ["x"], alpha=STEEP, beta=-STEEP / 2)],
    "no-power-of-two": [node("HardSigmoid", ["x"], alpha=3 * STEEP, beta=-3 * STEEP)],
    "partly": [*spiking("x", "a"), node("Concat", ["a", "x"], axis=0)],
    "sum-with-numbers": [*spiking("x", "a"), node("Add", ["a", "x"])],
    "mean-of-9": [*spiking("x", "a"), node("AveragePool", ["a"], kernel_shape=[3, 3])],
    "mean-with-padding": [*spiking("x", "a"), node("AveragePool", ["a"], kernel_shape=[2, 2], pads=[1, 1, 0, 0])],
    "mean-over-the-edge": [
        *spiking("x", "a"),
        node("AveragePool", ["a"], kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1),
    ],
    "mean-of-every-other": [*spiking("x", "a"), node("AveragePool", ["a"], kernel_shape=[2, 2], dilations=[2, 2])],
    "mean-with-auto-pad": [
        *spiking("x", "a"),
        node("AveragePool", ["a"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    ],
    "sum-with-means": [
        *spiking("x", "a"),
        node("AveragePool", ["a"], "b", kernel_shape=[1, 2], pads=[0, 0, 0, 0], strides=[1, 1]),
        node("MaxPool", ["a"], "c", kernel_shape=[1, 2], strides=[1, 1]),
        node("Add", ["b", "c"]),
    ],
    "signed-bytes": [*spiking("x", "a"), node("Cast", ["a"], "b", to=TensorProto.INT8), node("Cast", ["b"], to=FLOAT)],
    "places": [
        *spiking("x", "a"),
        helper.make_node("MaxPool", ["a"], ["b", "c"], kernel_shape=[2, 2]),
        node("Cast", ["c"], to=FLOAT),
    ],
    "function": [*spiking("x", "a"), node("Identity", ["a"], domain="own")],
    "too-many": [
        *spiking("x", "a0"),
        *(node("Add", [f"a{k}"] * 2, f"a{k + 1}") for k in range(8)),
        node("Identity", ["a8"]),
    ],
}


DOUBLED = [*spiking("x", "a0"), *(node("Add", [f"a{k}"] * 2, f"a{k + 1}") for k in range(5)), node("Identity", ["a5"])]


@pytest.mark.parametrize("before", [[], AS_SPIKES["mean-of-sums"], DOUBLED], ids=["spikes", "mean-of-sums", "doubled"])
def test_every_way_gives_the_same_bits(before: list[onnx.NodeProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever neighbours an image has."""
    model = convolution(weights_of(70, 130, 3, 3), before, pads=[1, 1, 1, 1])
    x, found = images(9, 130), list[Array]()
    x[:3] += 0.4  # where most neurons fire
    for way in ways():
        with monkeypatch.context() as patch:
            operator = use(way, patch)
            made, operators = fused(model)
        assert operator in operators
        found.append(run(made, x))
        np.testing.assert_array_equal(run(made, x[4:6], 1), found[0][4:6])
        np.testing.assert_array_equal(found[-1], found[0])
    assert len(found) > 1 or native.vector_bytes() == 16
    assert np.ptp(found[0]) > 0


@pytest.mark.parametrize("before", AS_SPIKES.values(), ids=AS_SPIKES)
def test_convolutions_of_spikes_are_replaced(before: list[onnx.NodeProto], spiking_op: str) -> None:
    weights = weights_of(20, WIDE, 3, 3)
    model = convolution(weights, before, pads=[1, 1, 1, 1])
    made, operators = fused(model)
    assert operators.count(spiking_op) == 1 and not {"Conv", "ConvInteger"} & set(operators)
    x = images(4, WIDE) * 6 - 3
    near = np.float32([0.5, 0.125, 1, -1])
    x[0, 0, :4, 0], x[0, 0, :4, 1], x[0, 0, :4, 2] = near, np.nextafter(near, np.float32(9)), np.nextafter(near, -near)
    model.graph.node.pop()
    model.graph.output[0].name = "s"
    s = run(model.SerializeToString(), x)
    expected = exact(s, weights, np.zeros(20), [1, 1], [1, 1, 1, 1])
    inputs = exact(s, np.ones_like(weights), np.zeros(20), [1, 1], [1, 1, 1, 1])
    largest = np.abs(weights).max(axis=(1, 2, 3)).reshape(-1, 1, 1)
    assert (np.abs(run(made, x) - expected) <= 2.0**-24 * (1.01 * inputs * largest + 2 * np.abs(expected))).all()
    assert 0.1 < np.mean(s > 0) < 0.9999


@pytest.mark.parametrize("before", OTHERWISE.values(), ids=OTHERWISE)
def test_what_may_be_other_numbers_stays(before: list[onnx.NodeProto]) -> None:
    graph = convolution(weights_of(20, WIDE, 1, 1), before).graph  # of whose sums none is too large
    unchanged = graph.SerializeToString()
    assert mark_spike_convolutions(graph, [], tiles=True) == {} and graph.SerializeToString() == unchanged


NOT_FINITE = weights_of(20, WIDE, 3, 3)
NOT_FINITE[0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("weights", "attributes"),
    [
        pytest.param(weights_of(20, 15, 3, 3), {}, id="few-channels"),
        pytest.param(weights_of(20, WIDE, 3, 3), {"group": 2}, id="groups"),
        pytest.param(weights_of(20, WIDE, 3, 3), {"dilations": [2, 2]}, id="dilated"),
        pytest.param(weights_of(20, WIDE, 3, 3), {"auto_pad": "SAME_UPPER"}, id="auto-pad"),
        pytest.param(NOT_FINITE, {}, id="nan"),
        pytest.param(weights_of(2, MOST // 9 + 1, 3, 3), {}, id="too-many-inputs"),
    ],
)
def test_other_convolutions_stay(weights: Array, attributes: dict[str, Any]) -> None:
    assert not mark_spike_convolutions(convolution(weights, **attributes).graph, [], tiles=True)


@pytest.mark.parametrize(
    ("outputs", "inputs", "before", "bytes_", "added"),
    [
        (32, 32, [], 64, True),
        (32, 32, [], 32, True),
        (32, 32, AS_SPIKES["sum"], 64, True),
        (31, 32, [], 64, False),
        (32, 31, [], 64, False),
        (32, 32, [], 16, False),
        (32, 32, [*spiking("x", "a"), node("Add", ["a", "a"], "b"), node("Add", ["a", "b"])], 64, False),
    ],
)
def test_additions_where_they_are_the_faster_way(
    outputs: int,
    inputs: int,
    before: list[onnx.NodeProto],
    bytes_: int,
    added: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "vector_bytes", lambda: bytes_)
    graph = convolution(weights_of(outputs, inputs, 3, 3), before).graph
    assert bool(mark_spike_convolutions(graph, [], tiles=False)) is added


def test_weights_that_a_caller_may_change_stay() -> None:
    graph = convolution(weights_of(20, WIDE, 3, 3)).graph
    graph.input.append(helper.make_tensor_value_info("w", FLOAT, [20, WIDE, 3, 3]))
    assert not mark_spike_convolutions(graph, [], tiles=True)


@pytest.mark.parametrize(
    "attributes",
    [{"pads": [1, 1, 1, 1]}, {"strides": [2, 2]}, {"bias": True}, {}],
    ids=["pads", "strides", "bias", "same"],
)
def test_convolutions_may_have_their_weights_in_common(attributes: dict[str, Any], spiking_op: str) -> None:
    """Which are put in order once, if they have their biases in common, too."""
    weights, biases = weights_of(20, WIDE, 3, 3), weights_of(20, 1, 1, 1).reshape(-1)
    model = convolution(weights)
    other = dict(attributes)
    model.graph.node.append(node("Conv", ["s", "w", *(["b"] if other.pop("bias", False) else [])], "z", **other))
    model.graph.initializer.append(numpy_helper.from_array(biases, "b"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    made, operators = fused(model)
    assert operators.count(spiking_op) == 2
    packed = [t for t in onnx.ModelProto.FromString(made).graph.initializer if t.name.endswith(".packed")]
    assert len(packed) == (2 if "bias" in attributes else 1)
    x = images(3, WIDE)
    for y, expected in zip(run_all(made, x), run_all(model.SerializeToString(), x), strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("spiking_op", [16], indirect=True)
def test_weights_in_common_have_the_scale_of_each_input(spiking_op: str) -> None:
    """A convolution of spikes, and the same of means of them."""
    model = convolution(weights_of(20, WIDE, 3, 3))
    model.graph.node.append(node("AveragePool", ["s"], "mean", kernel_shape=[2, 2], strides=[2, 2]))
    model.graph.node.append(node("Conv", ["mean", "w"], "z"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    made, operators = fused(model)
    assert operators.count(spiking_op) == 2
    x = images(3, WIDE)
    for y, expected in zip(run_all(made, x), run_all(model.SerializeToString(), x), strict=True):
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_of_constant_spikes_currents_are_right(spiking_op: str) -> None:
    """They are computed before the first call, while something stands in for the weights."""
    weights = weights_of(20, WIDE, 3, 3)
    model = convolution(weights, [*spiking("x", "a"), *spiking("c", "s")])
    model.graph.node.append(node("Conv", ["a", "w"], "z"))
    model.graph.initializer.append(numpy_helper.from_array(images(3, WIDE), "c"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    made, _ = fused(model)
    assert [value.name for value in onnx.ModelProto.FromString(made).graph.input] == ["x"]
    for y, expected in zip(
        run_all(made, x := images(3, WIDE, seed=2)), run_all(model.SerializeToString(), x), strict=True
    ):
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("to", [TensorProto.FLOAT16, UINT8])
def test_a_cast_behind_is_left_to_the_optimiser(to: int) -> None:
    """It would join it with that of the integers which stand in."""
    model = convolution(weights_of(20, WIDE, 3, 3))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(node("Cast", ["before"], "y", to=to))
    assert not mark_spike_convolutions(model.graph, [], tiles=True)


def test_batchnorm_is_left_to_the_optimiser() -> None:
    """It folds BN into the convolution before."""
    model = convolution(weights_of(20, WIDE, 3, 3))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(node("BatchNormalization", ["before", *["norm"] * 4], "y"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(20, np.float32), "norm"))
    assert not mark_spike_convolutions(model.graph, [], tiles=True)


def neuron_step(*nodes: onnx.NodeProto) -> NeuronStep:
    return NeuronStep(nodes, {"k": np.float32(1)}, "u", "x", "x", "s")


@pytest.mark.parametrize(
    ("neurons", "fires"),
    [
        (neuron_step(STEP), True),
        (neuron_step(*spiking("x", "s", "k")), True),
        (neuron_step(node("HardSigmoid", ["x"])), False),
        (neuron_step(node("Mul", ["x", "k"])), False),
        (neuron_step(node("Mul", ["x", "k"], "a"), node("Cast", ["a"], to=FLOAT)), False),
        (neuron_step(), False),
    ],
)
def test_neurons_taken_out_of_their_loop_are_looked_into(neurons: NeuronStep, fires: bool) -> None:
    """What stands in their place is a comparison, whatever they are."""
    graph = convolution(weights_of(20, WIDE, 3, 3), spiking("x", "s", "mark")).graph
    graph.initializer.append(numpy_helper.from_array(np.array(2**21, np.float32), "mark"))
    assert (WholeNumbers(graph, [neurons]).of("s") == Whole(1)) is fires
    assert bool(mark_spike_convolutions(graph, [neurons], tiles=True)) is fires


def test_who_reads_spikes_besides_gets_them() -> None:
    """And as bytes: what is between convolutions passes over memory once."""
    weights = weights_of(WIDE, WIDE, 3, 3)
    model = convolution(weights, pads=[1, 1, 1, 1])
    model.graph.node[-1].output[0] = "current"
    model.graph.node.extend([node("Add", ["current", "s"], "sum"), *spiking("sum", "y")])
    assert mark_spike_convolutions(model.graph, [], tiles=True)
    readers = [each.op_type for each in model.graph.node if "s" in each.input]
    assert readers == ["Cast"]
    assert [each.op_type for each in model.graph.node if each.output[0] == "sum"] == ["Add"]


def test_who_reads_a_mean_besides_gets_the_mean(spiking_op: str) -> None:
    model = convolution(weights_of(20, WIDE, 3, 3), AS_SPIKES["mean"], pads=[1, 1, 1, 1])
    model.graph.node.append(node("Mul", ["s", "half"], "z"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    made, operators = fused(model)
    assert operators.count(spiking_op) == 1
    y, z = run_all(made, x := images(3, WIDE))
    expected, exactly = run_all(model.SerializeToString(), x)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(z, exactly)
    assert 0 < z.max() <= 0.5


# --------------------------------------------------------------------------------------------------------- networks


ONCE = pytest.mark.parametrize("spiking_op", [32, "tiles"], indirect=True)


@ONCE
@pytest.mark.parametrize(
    ("model", "layout"),
    [*itertools.product(["resnet19", "vggsnn"], ["unrolled", "dynamic", "step"]), ("sew-resnet34", "dynamic")],
)
def test_networks_answer_as_without_tiles(
    model: str, layout: Any, spiking_op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, x = tmp_path / "m.onnx", np.uint8(images(9, *for_export(model).image_shape) * 256)
    path.write_bytes(graph_of(model, ExportConfig(layout, T=3)))
    y = Engine(path, native=True).run(x, 3).per_step
    _, operators = fused(onnx.load(path))
    assert operators.count(spiking_op) > 3
    assert operators.count("Transpose") <= 4 or layout == "step"  # a state has the usual order
    keep_ort_convolutions(monkeypatch)
    expected = Engine(path, native=True).run(x, 3).per_step
    same = np.isclose(y, expected, rtol=0, atol=1e-5).all(axis=(1, 2))
    assert (
        same.sum() >= 8 and np.isfinite(y).all()
    )  # of 9: where ONNX Runtime's sums end an ulp across the threshold an image goes its own way
    assert np.ptp(expected[:, -1], axis=0).min() > 0.01


@ONCE
@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_trained_network_has_the_same_logits(layout: str, spiking_op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(layout, **({} if layout != "unrolled" else {"T": 3}))
    y = Engine(path, native=True).run(digits().images, 3).per_step
    assert spiking_op in fused(onnx.load(path))[1]
    keep_ort_convolutions(monkeypatch)
    np.testing.assert_allclose(y, Engine(path, native=True).run(digits().images, 3).per_step, atol=1e-5)
