"""The native int8 convolution gives the bits of ONNX Runtime's, and replaces only those that it can compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export_helpers import digits, exported, int8_exported
from onnx import TensorProto, helper, numpy_helper

from tetdeploy import native
from tetdeploy.engine import Engine
from tetdeploy.native.fusing import fuse_model
from tetdeploy.native.int8_convolutions import put_int8_convolutions

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
needs_amx = pytest.mark.skipif(
    native.missing() is not None or not native.has_tiles(), reason="this processor, or its system, has no AMX"
)
BOTH = pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_amx)], ids=["plain", "tiles"])
Array = np.ndarray[Any, Any]


def convolution(
    channels: tuple[int, int] = (64, 32),
    kernel: tuple[int, int] = (3, 3),
    *,
    zero: int = 96,
    scale: float = 0.2,
    without: tuple[str, ...] = (),
    change: dict[str, Array] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """A `QLinearConv` as ONNX Runtime's optimiser leaves it, [N, H, W, C] -> [N, H', W', O]."""
    rng = np.random.default_rng(0)
    inputs, outputs = channels
    spread = np.sqrt(inputs * np.prod(kernel))
    constants: dict[str, Array] = {
        "x_scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w": rng.integers(-127, 128, (outputs, inputs, *kernel), np.int8),
        "w_scale": rng.uniform(0.5, 1.5, outputs).astype(np.float32) * np.float32(scale / spread),
        "w_zero": np.int8(0),
        "y_scale": np.float32(0.7),
        "y_zero": np.uint8(zero),
        "bias": (rng.uniform(-100, 100, outputs) * spread).astype(np.int32),
    } | (change or {})  # type: ignore[assignment]
    attributes = {"channels_last": 1, "strides": [1, 1], "pads": [1, 1, 1, 1]} | attributes
    read = ["x", *(name for name in constants if name not in without)]
    node = helper.make_node("QLinearConv", read, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", "H", "W", "C"])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read],
    )
    opsets = [helper.make_opsetid(domain, 1) for domain in ("com.microsoft", "ai.tetdeploy")]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *opsets], ir_version=10)


def session(model: onnx.ModelProto, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    native.use(ort, options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def replaced(model: onnx.ModelProto, *, tiles: bool) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    assert put_int8_convolutions(copy.graph, tiles=tiles) == 1
    assert [node.op_type for node in copy.graph.node] == ["Int8Convolution"]
    return copy


def spikes(*shape: int, most: int = 3) -> Array:
    """Sums of spikes. Bytes above 64 would overflow in ONNX Runtime's kernels for processors without VNNI."""
    return np.random.default_rng(1).integers(0, most + 1, shape).astype(np.uint8)


@BOTH
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "strides", "pads"),
    [
        ((4, 32, 32), (128, 128), (3, 3), [1, 1], [1, 1, 1, 1]),
        ((2, 8, 8), (512, 512), (3, 3), [1, 1], [1, 1, 1, 1]),
        ((2, 5, 31), (64, 40), (3, 3), [1, 1], [1, 1, 1, 1]),
        ((2, 9, 60), (64, 32), (3, 3), [2, 2], [1, 1, 1, 1]),
        ((3, 16, 16), (128, 256), (3, 3), [2, 2], [1, 1, 1, 1]),
        ((3, 16, 16), (128, 256), (1, 1), [2, 2], [0, 0, 0, 0]),
        ((1, 1, 1), (64, 32), (3, 3), [1, 1], [1, 1, 1, 1]),
        ((5, 1, 7), (40, 10), (1, 3), [1, 1], [0, 1, 0, 1]),
        ((2, 9, 5), (65, 33), (5, 3), [1, 2], [2, 0, 1, 1]),
        ((2, 9, 11), (100, 48), (3, 5), [3, 2], [0, 0, 2, 3]),
        ((1, 13, 6), (32, 1), (2, 2), [4, 3], [3, 2, 0, 0]),
        ((2, 7, 7), (64, 70), (7, 7), [1, 1], [0, 0, 0, 0]),
        ((2, 6, 6), (64, 31), (3, 3), [1, 1], [0, 0, 3, 3]),
        ((2, 6, 6), (64, 17), (3, 3), [2, 2], [4, 4, 0, 0]),
        ((2, 6, 6), (64, 32), (1, 1), [1, 1], [1, 1, 1, 1]),
        ((2, 2, 6), (35, 9), (4, 3), [1, 2], [10, 7, 11, 9]),
    ],
    ids=str,
)
def test_has_the_bits_of_onnx_runtime(
    shape: tuple[int, int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    strides: list[int],
    pads: list[int],
    threads: int,
    tiles: bool,
) -> None:
    model = convolution(channels, kernel, strides=strides, pads=pads)
    x = spikes(*shape, channels[0])
    expected = session(model).run(None, {"x": x})[0]
    assert len(np.unique(expected)) > min(10, expected.size // 2)
    np.testing.assert_array_equal(session(replaced(model, tiles=tiles), threads).run(None, {"x": x})[0], expected)


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_has_the_bits_of_onnx_runtime_in_any_geometry(seed: int, tiles: bool) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        kernel, strides = tuple(rng.integers(1, 6, 2)), rng.integers(1, 5, 2)
        pads = rng.integers(0, np.tile(kernel, 2) + rng.integers(0, 3))  # some as wide as the kernel
        size = [int(rng.integers(max(1, k - p - q), 20)) for k, p, q in zip(kernel, pads[:2], pads[2:], strict=True)]
        channels = int(rng.integers(32, 150)), int(rng.integers(1, 80))
        model = convolution(channels, kernel, strides=strides.tolist(), pads=[int(p) for p in pads])
        x = spikes(int(rng.integers(1, 6)), *size, channels[0])
        expected = session(model).run(None, {"x": x})[0]
        np.testing.assert_array_equal(session(replaced(model, tiles=tiles)).run(None, {"x": x})[0], expected)


@BOTH
@pytest.mark.parametrize(("zero", "scale"), [(0, 0.2), (255, 0.2), (128, 1e-12), (128, 1e12), (7, 50)])
def test_limits_and_rounding(zero: int, scale: float, tiles: bool) -> None:
    model, x = convolution(zero=zero, scale=scale), spikes(2, 5, 5, 64)
    expected = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(replaced(model, tiles=tiles)).run(None, {"x": x})[0], expected)


@BOTH
def test_a_half_is_rounded_to_even(tiles: bool) -> None:
    weights = np.zeros((32, 64, 1, 1), np.int8)
    weights[:, 0, 0, 0] = 1
    numbers = {"w": weights, "w_scale": np.full(32, 0.5, np.float32), "y_scale": np.float32(1)}
    model = convolution(
        (64, 32), (1, 1), pads=[0] * 4, zero=0, change=numbers | {"bias": np.arange(32, dtype=np.int32)}
    )
    x = spikes(1, 4, 4, 64)
    y = session(replaced(model, tiles=tiles)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, np.rint((x[..., :1] + np.arange(32)) * 0.5))


@BOTH
def test_one_scale_for_all_channels(tiles: bool) -> None:
    model, x = convolution(change={"w_scale": np.float32(0.003)}), spikes(2, 5, 5, 64)
    expected = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(replaced(model, tiles=tiles)).run(None, {"x": x})[0], expected)


@BOTH
def test_batches_of_any_size_and_none(tiles: bool) -> None:
    """One session sees them in turn: nothing of a call stays."""
    plain, other = session(convolution()), session(replaced(convolution(), tiles=tiles))
    for n, h, w in ((3, 9, 9), (1, 4, 17), (0, 5, 5), (8, 12, 3)):
        x = spikes(n, h, w, 64)
        expected = plain.run(None, {"x": x})[0]
        np.testing.assert_array_equal(other.run(None, {"x": x})[0], expected)


@BOTH
def test_weights_in_common_are_put_in_order_once(tiles: bool) -> None:
    model = convolution((64, 64), zero=0)
    again = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    again.input[0], again.output[0] = "y", "z"
    model.graph.node.append(again)
    model.graph.output[0].name = "z"
    fused = onnx.ModelProto.FromString(model.SerializeToString())
    assert put_int8_convolutions(fused.graph, tiles=tiles) == 2
    names = [tensor.name for tensor in fused.graph.initializer]
    assert len(names) == len(set(names)) and names.count("w.tiles") == 1
    x = spikes(2, 9, 9, 64)
    np.testing.assert_array_equal(*(session(each).run(None, {"x": x})[0] for each in (fused, model)))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(convolution((15, 32)), id="few-channels"),
        pytest.param(convolution(change={"x_zero": np.uint8(1)}), id="zero-point"),  # type: ignore[dict-item]
        pytest.param(convolution(change={"w_zero": np.int8(3)}), id="weights-zero-point"),  # type: ignore[dict-item]
        pytest.param(convolution(change={"w": np.zeros((32, 64, 3, 3), np.uint8)}), id="uint8-weights"),
        pytest.param(convolution(dilations=[2, 2]), id="dilated"),
        pytest.param(convolution(group=2), id="groups"),
        pytest.param(convolution(auto_pad="SAME_UPPER"), id="auto-pad"),
        pytest.param(convolution(channels_last=0), id="channels-first"),
        pytest.param(convolution(without=("bias",)), id="no-bias"),
    ],
)
def test_others_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert put_int8_convolutions(model.graph) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strides": [0, 1]}, "a size in an attribute is out of range"),
        ({"strides": [1]}, "an attribute has the wrong length"),
        ({"pads": [-1, 0, 0, 0]}, "a size in an attribute is out of range"),
        ({"zero_point": 256}, "the zero point is no byte"),
    ],
)
def test_a_damaged_node_is_refused(change: dict[str, Any], says: str) -> None:
    model = replaced(convolution(), tiles=False)
    node = model.graph.node[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} | change
    node.CopyFrom(helper.make_node(node.op_type, node.input, node.output, domain=node.domain, **attributes))
    with pytest.raises(Exception, match=f"ai.tetdeploy::Int8Convolution: {says}"):
        session(model)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 4, 4, 65), "the input has other channels than the weights"), ((1, 4, 64), "rank|axes")],
)
def test_a_wrong_input_is_refused(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(Exception, match=says):
        session(replaced(convolution(), tiles=False)).run(None, {"x": spikes(*shape)})


def test_an_input_smaller_than_the_kernel_is_refused() -> None:
    model = replaced(convolution(kernel=(5, 5), pads=[0, 0, 0, 0]), tiles=False)
    with pytest.raises(Exception, match="the input is smaller than the kernel"):
        session(model).run(None, {"x": spikes(1, 4, 9, 64)})


@pytest.mark.skipif(native.missing() is None and native.has_tiles(), reason="this processor has AMX")
def test_tiles_are_refused_without_amx() -> None:
    with pytest.raises(Exception, match="this processor has no AMX"):
        session(replaced(convolution(), tiles=True))


@BOTH
@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_network_has_the_same_logits(layout: str, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = int8_exported(layout)
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    plain = Engine(path, native=True).run(digits().images, 3).per_step
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    monkeypatch.setattr("tetdeploy.native.convolution.LEAST_CHANNELS", 1)
    found = list[int]()

    def use(graph: onnx.GraphProto) -> int:
        found.append(put_int8_convolutions(graph, tiles=tiles))
        return found[-1]

    monkeypatch.setattr("tetdeploy.native.fusing.put_int8_convolutions", use)
    np.testing.assert_array_equal(Engine(path, native=True).run(digits().images, 3).per_step, plain)
    assert found[0] > 0


@needs_amx
def test_float32_networks_have_no_tiles() -> None:
    made = fuse_model(exported("unrolled", T=3).read_bytes())
    assert made is not None
    assert "Int8Convolution" not in {node.op_type for node in onnx.ModelProto.FromString(made).graph.node}
