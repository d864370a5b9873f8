"""The native int8 convolution gives the bits of ONNX Runtime's, and replaces only those that it can compute."""

from __future__ import annotations

import threading
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
from tetdeploy.native.graphs import Kind, attributes_of
from tetdeploy.native.int8_convolutions import Way, best_way, put_int8_convolutions
from tetdeploy.native.packing import runs_together
from tetdeploy.native.whole_numbers import Whole, WholeNumbers

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
Array = np.ndarray[Any, Any]
OPERATORS: dict[Way, str] = {
    "plain": "Int8Convolution",
    "tiles": "Int8Convolution",
    "additions": "Int8Additions",
    "lookups": "Int8Lookups",
}


class Few(WholeNumbers):
    """Inputs are sums of three spikes at most; spikes, of lookups."""

    most = 3

    def of(self, name: str) -> Whole:
        return Whole(self.most)


@pytest.fixture(params=["plain", "tiles", "lookups", "either", 16, 32, 64])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """How convolutions are computed: by lookups that always may give way to additions, or never; by additions in vector
    registers of so many bytes; of any inputs and channels."""
    if request.param == "tiles" and not native.has_tiles():
        pytest.skip("this processor, or its system, has no AMX")
    if request.param in ("lookups", "either"):
        if not native.has_lookups():
            pytest.skip("this processor, or its system, cannot")
        monkeypatch.setattr(Few, "most", 1)
        monkeypatch.setattr("tetdeploy.native.convolution.LEAST_ADDED", 1)
        least_sparse = 0 if request.param == "either" else 2**31
        for name, limit in (("TAPS", 0), ("OUTPUTS", 0), ("SPARSE", least_sparse)):
            monkeypatch.setattr(f"tetdeploy.native.int8_convolutions.LEAST_{name}", limit)
        return "lookups"
    if isinstance(request.param, str):
        return request.param  # type: ignore[return-value]
    if request.param > native.vector_bytes():
        pytest.skip("this processor, or its system, cannot")
    monkeypatch.setattr(native, "vector_bytes", lambda: request.param)
    for name, limit in (("convolution.MOST_ADDED", 255), ("convolution.LEAST_ADDED", 1)):
        monkeypatch.setattr(f"tetdeploy.native.{name}", limit)
    monkeypatch.setattr("tetdeploy.native.int8_convolutions.LEAST_WEIGHTS", 1)
    return "additions"


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


def replaced(model: onnx.ModelProto, way: Way) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    assert put_int8_convolutions(copy.graph, Few(copy.graph, []), way, {}) == 1
    assert [node.op_type for node in copy.graph.node] == [OPERATORS[way]]
    return copy


def spikes(*shape: int) -> Array:
    """Sums of spikes. Bytes above 64 would overflow in ONNX Runtime's kernels for processors without VNNI."""
    return np.random.default_rng(1).integers(0, Few.most + 1, shape).astype(np.uint8)


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
    way: Way,
) -> None:
    model = convolution(channels, kernel, strides=strides, pads=pads)
    x = spikes(*shape, channels[0])
    expected = session(model).run(None, {"x": x})[0]
    assert len(np.unique(expected)) > min(10, expected.size // 2)
    np.testing.assert_array_equal(session(replaced(model, way), threads).run(None, {"x": x})[0], expected)


@pytest.mark.parametrize("seed", range(4))
def test_has_the_bits_of_onnx_runtime_in_any_geometry(seed: int, way: Way) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(12):
        kernel, strides = tuple(rng.integers(1, 6, 2)), rng.integers(1, 5, 2)
        pads = rng.integers(0, np.tile(kernel, 2) + rng.integers(0, 3))  # some as wide as the kernel
        size = [int(rng.integers(max(1, k - p - q), 20)) for k, p, q in zip(kernel, pads[:2], pads[2:], strict=True)]
        channels = int(rng.integers(32, 150)), int(rng.integers(1, 80))
        model = convolution(channels, kernel, strides=strides.tolist(), pads=[int(p) for p in pads])
        x = spikes(int(rng.integers(1, 6)), *size, channels[0])
        expected = session(model).run(None, {"x": x})[0]
        np.testing.assert_array_equal(session(replaced(model, way)).run(None, {"x": x})[0], expected)


@pytest.mark.parametrize(("zero", "scale"), [(0, 0.2), (255, 0.2), (128, 1e-12), (128, 1e12), (7, 50)])
def test_limits_and_rounding(zero: int, scale: float, way: Way) -> None:
    model, x = convolution(zero=zero, scale=scale), spikes(2, 5, 5, 64)
    expected = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(replaced(model, way)).run(None, {"x": x})[0], expected)


def test_a_half_is_rounded_to_even(way: Way) -> None:
    weights = np.zeros((32, 64, 1, 1), np.int8)
    weights[:, 0, 0, 0] = 1
    numbers = {"w": weights, "w_scale": np.full(32, 0.5, np.float32), "y_scale": np.float32(1)}
    model = convolution(
        (64, 32), (1, 1), pads=[0] * 4, zero=0, change=numbers | {"bias": np.arange(32, dtype=np.int32)}
    )
    x = spikes(1, 4, 4, 64)
    y = session(replaced(model, way)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, np.rint((x[..., :1] + np.arange(32)) * 0.5))


@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("x", [1, 3, [1, 0, 0], [3, 0, 1, 2]], ids=str)
def test_the_largest_sums(weight: int, x: int | list[int], way: Way) -> None:
    """Of more inputs than fit into the sums of fewer bits that additions begin with."""
    numbers = {"w": np.full((33, 300, 3, 3), weight, np.int8), "bias": np.zeros(33, np.int32), "y_scale": np.float32(1)}
    numbers["w_scale"] = np.full(33, 2.0**-13, np.float32)
    model = convolution((300, 33), pads=[0] * 4, zero=128, change=numbers)
    inputs = np.resize(np.array(x).clip(None, Few.most).astype(np.uint8), (2, 7, 5, 300))
    windows = np.lib.stride_tricks.sliding_window_view(inputs.astype(np.int64), (3, 3), (1, 2))
    expected = (np.rint(windows.sum((3, 4, 5)) * weight * 2.0**-13) + 128).clip(0, 255)
    y = session(replaced(model, way)).run(None, {"x": inputs})[0]
    np.testing.assert_array_equal(y, np.broadcast_to(expected[..., None], y.shape))


def test_one_scale_for_all_channels(way: Way) -> None:
    model, x = convolution(change={"w_scale": np.float32(0.003)}), spikes(2, 5, 5, 64)
    expected = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(replaced(model, way)).run(None, {"x": x})[0], expected)


def test_batches_of_any_size_and_none(way: Way) -> None:
    """One session sees them in turn: nothing of a call stays."""
    plain, other = session(convolution()), session(replaced(convolution(), way))
    for n, h, w in ((3, 9, 9), (1, 4, 17), (0, 5, 5), (8, 12, 3)):
        x = spikes(n, h, w, 64)
        expected = plain.run(None, {"x": x})[0]
        np.testing.assert_array_equal(other.run(None, {"x": x})[0], expected)


def test_threads_with_small_stacks(way: Way) -> None:
    x, made = spikes(2, 40, 40, 64), list[Array]()
    plain, other = session(convolution()), session(replaced(convolution(), way), threads=1)
    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: made.append(other.run(None, {"x": x})[0]))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    np.testing.assert_array_equal(made[0], plain.run(None, {"x": x})[0])


def test_weights_in_common_are_put_in_order_once(way: Way) -> None:
    model = convolution((64, 64), zero=0)
    again = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    again.output[0] = "z"
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.UINT8, None))
    fused = onnx.ModelProto.FromString(model.SerializeToString())
    assert put_int8_convolutions(fused.graph, Few(fused.graph, []), way, {}) == 2
    names = [tensor.name for tensor in fused.graph.initializer]
    assert len(names) == len(set(names)) == 4 and "w" not in names
    x = spikes(2, 9, 9, 64)
    np.testing.assert_array_equal(*(session(each).run(None, {"x": x})[1] for each in (fused, model)))


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
    assert put_int8_convolutions(model.graph, Few(model.graph, []), "tiles", {}) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("outputs", "inputs", "most", "added"),
    [
        (64, 32, 1, True),
        (32, 64, 2, True),
        (48, 48, 1, True),
        (32, 32, 1, False),
        (31, 96, 1, False),
        (96, 31, 1, False),
        (64, 64, 3, False),
        (64, 64, 0, False),
    ],
)
def test_additions_where_they_are_the_faster_way(outputs: int, inputs: int, most: int, added: bool) -> None:
    graph = convolution((inputs, outputs)).graph
    assert put_int8_convolutions(graph, Inputs(graph, most), "additions", {}) == added


class Inputs(WholeNumbers):
    """Of `x` it is known that it is `most` at most, if that is not 0."""

    def __init__(self, graph: onnx.GraphProto, most: int) -> None:
        super().__init__(graph, [])
        self._most = most

    def of(self, name: str) -> Whole | None:
        return Whole(self._most) if name == "x" and self._most else None


@pytest.mark.parametrize(
    ("kernel", "size", "images", "most", "looked_up"),
    [
        ((3, 3), (16, 8), 1, 1, True),
        ((3, 3), (8, 8), 2, 1, True),
        ((1, 2), (16, 8), 1, 1, True),
        ((3, 3), (16, 7), 1, 1, False),
        ((3, 3), (8, 8), 1, 1, False),
        ((1, 1), (32, 32), 2, 1, False),
        ((3, 3), (16, 8), 1, 2, False),
        ((3, 3), (16, 8), 1, 0, False),
        ((3, 3), (128, None), 2, 1, False),
        ((3, 3), None, 2, 1, False),
    ],
)
def test_lookups_where_they_are_the_faster_way(
    kernel: tuple[int, int], size: tuple[int | None, ...] | None, images: int, most: int, looked_up: bool
) -> None:
    graph = convolution(kernel=kernel).graph
    kinds = {} if size is None else {"y": Kind(TensorProto.UINT8, ("N", *size, 32))}
    assert put_int8_convolutions(graph, Inputs(graph, most), "lookups", kinds, images) == looked_up


@pytest.mark.parametrize(("layout", "images"), [("unrolled", 2), ("dynamic", 2), ("step", 1)])
def test_a_call_of_several_steps_has_several_images(layout: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()

    def put(graph: Any, wholes: Any, way: Way, kinds: dict[str, Kind], images: int) -> int:
        given.append(images)
        return 0

    monkeypatch.setattr("tetdeploy.native.fusing.best_way", lambda: "lookups")
    monkeypatch.setattr("tetdeploy.native.fusing.put_int8_convolutions", put)
    Engine(int8_exported(layout), native=True)
    assert given == [images]


@pytest.mark.parametrize(
    ("weight", "together", "of_both_signs"),
    [(127, 1, 2), (86, 1, 3), (-86, 1, 3), (85, 2, 4), (-85, 2, 4), (35, 4, 5), (34, 5, 5), (-34, 5, 5), (0, 5, 5)],
)
def test_as_many_runs_add_up_as_stay_within_int16(weight: int, together: int, of_both_signs: int) -> None:
    """960 inputs are five runs of 192."""
    digits = np.full((2, 960, 1, 1), weight, np.int8)
    digits[1] = 1
    assert runs_together(digits) == together
    digits[0, ::2] *= -1  # the sum of all would be 0, but not that of any
    assert runs_together(digits) == of_both_signs


@pytest.mark.parametrize("way", ["lookups"], indirect=True)
@pytest.mark.parametrize(("inputs", "kernel"), [(695, (1, 1)), (90, (3, 3)), (330, (1, 2))])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("beyond", [0, 1])
def test_sums_at_the_limit_of_int16(inputs: int, kernel: tuple[int, int], sign: int, beyond: int, way: Way) -> None:
    """Two runs add up to it, or to 1 more."""
    taps, channel = kernel[0] * kernel[1], np.arange(inputs)
    groups = channel // 64 * 13 + channel % 64 // 5
    steps = (groups[:, None] * taps + np.arange(taps)).reshape(inputs, *kernel)
    count = (int(groups[-1]) + 1) * taps
    early = steps < 2 * count // -(-count // 47)
    joined = np.flatnonzero(early)
    each, more = divmod(2**15 - 1 + beyond, len(joined))
    digits = np.full((17, inputs, *kernel), sign * 20, np.int8)
    digits[16].flat[joined] = sign * (each + (np.arange(len(joined)) < more))
    assert runs_together(digits) == (1 if beyond else 2)
    change = {"w": digits, "w_scale": np.full(17, 2.0**-9, np.float32), "bias": np.zeros(17, np.int32)}
    change |= {"y_scale": np.float32(1)}
    made = session(replaced(convolution((inputs, 17), kernel, pads=[0] * 4, zero=128, change=change), way))
    for fire in (np.ones_like(early), early):
        x = fire.transpose(1, 2, 0)[None].astype(np.uint8)
        expected = (np.rint((digits * fire.astype(np.int64)).sum((1, 2, 3)) * 2.0**-9) + 128).clip(0, 255)
        np.testing.assert_array_equal(made.run(None, {"x": x})[0].reshape(-1), expected)


@pytest.mark.parametrize("way", ["lookups"], indirect=True)
def test_grains_of_the_most_tiles(way: Way) -> None:
    model, x = convolution((16, 128), (1, 2), pads=[0, 1, 0, 0]), spikes(12, 40, 40, 16)
    expected = session(model).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session(replaced(model, way)).run(None, {"x": x})[0], expected)


@pytest.mark.parametrize("way", ["either"], indirect=True)
@pytest.mark.parametrize(
    ("shape", "channels", "attributes"),
    [
        ((4, 32, 32), (128, 128), {}),
        ((2, 8, 8), (512, 512), {}),
        ((3, 16, 16), (128, 256), {"strides": [2, 2]}),
        ((1, 1, 1), (300, 33), {}),
        ((2, 0, 3), (64, 32), {"pads": [2, 2, 2, 2]}),
    ],
    ids=str,
)
def test_one_session_looks_up_and_adds(
    shape: tuple[int, int, int], channels: tuple[int, int], attributes: dict[str, list[int]], way: Way
) -> None:
    model = convolution(channels, **attributes)
    plain, made = session(model), session(replaced(model, way))
    rng = np.random.default_rng(2)
    for rate in (0.5, 0.02, 0.0, 1.0, 0.1, 0.3):
        x = (rng.random((*shape, channels[0])) < rate).astype(np.uint8)
        np.testing.assert_array_equal(made.run(None, {"x": x})[0], plain.run(None, {"x": x})[0])


@pytest.mark.parametrize("way", ["either"], indirect=True)
@pytest.mark.parametrize(
    ("channels", "shape", "rate", "silent", "adds"),
    [
        (127, (8, 32, 32), 0.02, "", True),
        (127, (8, 32, 32), 0.1, "", True),
        (127, (8, 32, 32), 0.25, "", False),
        (127, (8, 32, 32), 0.5, "", False),
        (127, (8, 32, 32), 0.99, "", True),
        (127, (8, 32, 32), 0.3, "first image", False),
        (127, (8, 32, 32), 0.3, "all but the last image", True),
        (508, (4, 8, 8), 0.15, "", True),
        (508, (4, 8, 8), 0.4, "", False),
        (192, (8, 16, 16), 0.5, "first 64 channels", False),
        (192, (8, 16, 16), 0.3, "all but the last 64 channels", True),
        (64, (8, 32, 32), 0.02, "", False),
    ],
)
def test_where_few_neurons_fire_their_weights_are_added(
    channels: int, shape: tuple[int, int, int], rate: float, silent: str, adds: bool, way: Way
) -> None:
    """Inputs of 2 tell: lookups take them for 1, additions that are to expect them add weights twice."""
    plain = convolution((channels, channels))
    model = replaced(plain, way)
    change_attributes(model.graph.node[0], {"most": 2})  # of so many channels the lists are as many as with 1
    x = (np.random.default_rng(3).random((*shape, channels)) < rate).astype(np.uint8)
    parts = {"first image": x[:1], "all but the last image": x[:-1]}
    parts |= {"first 64 channels": x[..., :64], "all but the last 64 channels": x[..., :-64]}
    if silent:
        parts[silent][:] = 0
    once, twice = (session(plain).run(None, {"x": times * x})[0] for times in (1, 2))
    assert not np.array_equal(once, twice)
    np.testing.assert_array_equal(session(model).run(None, {"x": 2 * x})[0], twice if adds else once)


@pytest.mark.parametrize(
    ("outputs", "inputs", "vector_bytes", "both"),
    [(128, 64, 64, True), (64, 128, 32, True), (64, 64, 64, False), (16, 512, 64, False)],
)
def test_lookups_give_way_to_additions_where_these_may_be_faster(
    outputs: int, inputs: int, vector_bytes: int, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "vector_bytes", lambda: vector_bytes)
    graph, kinds = convolution((inputs, outputs)).graph, {"y": Kind(TensorProto.UINT8, ("N", 32, 32, outputs))}
    assert put_int8_convolutions(graph, Inputs(graph, 1), "lookups", kinds) == 1
    assert attributes_of(graph.node[0])["vector_bytes"] == (vector_bytes if both else 0)


@pytest.mark.parametrize("way", ["either"], indirect=True)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vector_bytes": 128}, "this processor has shorter vector registers"),
        ({"vector_bytes": 64, "most": 0}, "the largest input is no byte"),
    ],
)
def test_additions_that_lookups_cannot_give_way_to_are_refused(change: dict[str, int], says: str, way: Way) -> None:
    refuses(change, says, way, OPERATORS["additions"])


@pytest.mark.parametrize("way", ["additions", "lookups"])
@pytest.mark.parametrize(("most", "stays"), [(64 * 9 - 1, True), (64 * 9, False)])
def test_sums_that_may_leave_int32_stay(way: Way, most: int, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.native.int8_convolutions.MOST", most)
    graph, kinds = convolution((64, 64)).graph, {"y": Kind(TensorProto.UINT8, ("N", 32, 32, 64))}
    assert put_int8_convolutions(graph, Inputs(graph, 1), way, kinds) == (not stays)


@pytest.mark.parametrize(
    ("tiles", "lookups", "vector_bytes", "vnni", "way"),
    [
        (True, False, 64, True, "tiles"),
        (False, True, 64, True, "lookups"),
        (False, False, 64, True, None),
        (False, False, 64, False, "additions"),
        (False, False, 32, False, "additions"),
        (False, False, 16, False, None),
    ],
)
def test_the_way_of_a_processor(
    tiles: bool, lookups: bool, vector_bytes: int, vnni: bool, way: Way | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"has_tiles": tiles, "has_fast_lookups": lookups, "vector_bytes": vector_bytes, "has_vnni": vnni}
    for name, found in known.items():
        monkeypatch.setattr(native, name, lambda found=found: found)
    assert best_way() == way


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strides": [0, 1]}, "a size in an attribute is out of range"),
        ({"strides": [1]}, "an attribute has the wrong length"),
        ({"pads": [-1, 0, 0, 0]}, "a size in an attribute is out of range"),
        ({"zero_point": 256}, "the zero point is no byte"),
    ],
)
def test_a_damaged_node_is_refused(change: dict[str, Any], says: str, way: Way) -> None:
    refuses(change, says, way)


@pytest.mark.parametrize("way", ["lookups"], indirect=True)
def test_lookups_of_no_run_are_refused(way: Way) -> None:
    refuses({"together": 0}, "no run adds up", way)


def refuses(change: dict[str, Any], says: str, way: Way, operator: str = "") -> None:
    """The operator that says it is that of `way` if no other is named."""
    model = replaced(convolution(), way)
    change_attributes(model.graph.node[0], change)
    with pytest.raises(Exception, match=f"ai.tetdeploy::{operator or OPERATORS[way]}: {says}"):
        session(model)


def change_attributes(node: onnx.NodeProto, change: dict[str, Any]) -> None:
    attributes = attributes_of(node) | change
    node.CopyFrom(helper.make_node(node.op_type, node.input, node.output, domain=node.domain, **attributes))


@pytest.mark.parametrize(
    ("shape", "says"),
    [((1, 4, 4, 65), "the input has other channels than the weights"), ((1, 4, 64), "rank|axes")],
)
def test_a_wrong_input_is_refused(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(Exception, match=says):
        session(replaced(convolution(), "plain")).run(None, {"x": spikes(*shape)})


def test_an_input_smaller_than_the_kernel_is_refused() -> None:
    model = replaced(convolution(kernel=(5, 5), pads=[0, 0, 0, 0]), "plain")
    with pytest.raises(Exception, match="the input is smaller than the kernel"):
        session(model).run(None, {"x": spikes(1, 4, 9, 64)})


@pytest.mark.skipif(native.missing() is None and native.has_tiles(), reason="this processor has AMX")
def test_tiles_are_refused_without_amx() -> None:
    with pytest.raises(Exception, match="this processor, or its system, has no AMX"):
        session(replaced(convolution(), "tiles"))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_network_has_the_same_logits(layout: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = int8_exported(layout), list[list[str]]()
    monkeypatch.setattr("tetdeploy.native.convolution.LEAST_CHANNELS", 1)

    def fuse_with(chosen: Way | None) -> Array:
        def fuse(model: bytes, *states: Any) -> bytes | None:
            made = fuse_model(model, *states)
            found.append([node.op_type for node in onnx.ModelProto.FromString(made or b"").graph.node])
            return made

        monkeypatch.setattr("tetdeploy.native.fusing.best_way", lambda: chosen)
        monkeypatch.setattr("tetdeploy.native.fusing.fuse_model", fuse)
        return Engine(path, native=True).run(digits().images, 3).per_step

    np.testing.assert_array_equal(fuse_with(way), fuse_with(None))
    ours, plain = found
    assert ours.count(OPERATORS[way]) == plain.count("QLinearConv") > 0 == ours.count("QLinearConv")


def test_float32_networks_have_none() -> None:
    made = fuse_model(exported("unrolled", T=3).read_bytes())
    assert made is not None
    assert not {*OPERATORS.values()} & {node.op_type for node in onnx.ModelProto.FromString(made).graph.node}
