"""Exports: the graph's boundary, the numbers against PyTorch, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from export_helpers import (
    LinearTokens,
    SideBySide,
    classifier,
    convsnn,
    digits,
    engine,
    exported,
    frames,
    int8_exported,
    needs_torch_2_13,
    shared_traces,
    unchecked,
)
from onnxscript import rewriter
from torch import Tensor, nn

from tetdeploy import folding
from tetdeploy.agreement import reference_path
from tetdeploy.cli.export import print_exported
from tetdeploy.data import load_parts
from tetdeploy.engine import Engine
from tetdeploy.export import (
    ExportConfig,
    Exported,
    ParityError,
    causality,
    description,
    export_model,
    gate,
    model,
    neuron_steps,
    onnx_tracer,
    recorder,
)
from tetdeploy.export.causality import check_steps
from tetdeploy.export.config import GPU_TARGETS, Precision
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.model import _as_input
from tetdeploy.export.parity import compare
from tetdeploy.export.trained import Trained
from tetdeploy.folding import FoldingError
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.neurons import IF, LIF, lif
from tetdeploy.storage.provenance import version
from tetdeploy.tracing import Tracer, quiet, reason

Options = dict[str, Any]

LAYERS = ("lif1", "lif2", "lif3")
CASES: dict[str, tuple[str, Options]] = {
    "unrolled": ("unrolled", {"T": 4}),
    "unrolled one step": ("unrolled", {"T": 1}),
    "dynamic": ("dynamic", {}),
    "step": ("step", {}),
    "state": ("unrolled", {"T": 4, "with_state": True}),
    "frames unrolled": ("unrolled", {"T": 4, "encoding": "frames"}),
    "frames unrolled one step": ("unrolled", {"T": 1, "encoding": "frames"}),
    "frames dynamic": ("dynamic", {"encoding": "frames"}),
    "frames step": ("step", {"encoding": "frames"}),
    "frames state": ("unrolled", {"T": 4, "with_state": True, "encoding": "frames"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Options]:
    return CASES[request.param]


def pytorch(
    x: np.ndarray[Any, Any], T: int, net: Classifier | None = None
) -> tuple[np.ndarray[Any, Any], list[Tensor]]:
    """Per-step logits `[N, T, K]`, and the spikes `[T, N, ...]` of every LIF module, by hooks."""
    net = net or convsnn()
    spikes: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, o: spikes.append(o)) for m in net.modules() if isinstance(m, LIF)]
    with torch.no_grad():
        tensor = torch.from_numpy(x)
        logits = net(tensor[:, :T].transpose(0, 1)) if x.ndim == 5 else net(tensor, T)
    for hook in hooks:
        hook.remove()
    return logits.transpose(0, 1).numpy(), spikes


def inputs(options: Options, count: int, T: int = 9) -> np.ndarray[Any, Any]:
    return frames(count, T) if options.get("encoding") == "frames" else digits().images[:count]


def steps(layout: str, options: Options) -> list[int]:
    return list(range(1, options["T"] + 1)) if layout == "unrolled" and "with_state" not in options else [1, 2, 5, 9]


def test_the_network_under_test_is_a_hard_case() -> None:
    _, spikes = pytorch(digits().images[:200], 6)
    assert len(spikes) == 3
    assert all(0.02 < s.mean() < 0.7 for s in spikes)
    assert all(len(s.mean((1, 2, 3, 4)).unique()) > 1 for s in spikes)  # activity is not the same at every step
    norms = [m for m in convsnn().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3
    for norm in norms:
        assert norm.running_mean is not None and norm.running_mean.abs().max() > 0.05
        assert norm.running_var is not None and (norm.running_var - 1).abs().max() > 0.05
        assert (norm.weight - 1).abs().max() > 0.1 and norm.bias.abs().max() > 0.05


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("count", [1, 7])
def test_logits_and_spikes_are_those_of_pytorch(case: tuple[str, Options], count: int) -> None:
    layout, options = case
    x = inputs(options, count)
    for T in steps(layout, options):
        expected, expected_spikes = pytorch(x, T)
        result, spikes = engine(layout, **options).run_with(spikes_overlay(LAYERS), x, T)
        for name, wanted in zip(LAYERS, expected_spikes, strict=True):
            got = spikes[f"spikes.{name}"].reshape(wanted.shape)
            assert set(np.unique(got)) <= {0.0, 1.0}
            assert np.mean(got != wanted.numpy()) <= 1e-4
        assert result.per_step.shape == (count, T, 10)
        np.testing.assert_allclose(result.per_step, expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(result.logits, expected.mean(1), rtol=0, atol=2e-5)
        plain = engine(layout, **options).run(x, T)
        np.testing.assert_array_equal(plain.per_step, result.per_step)


@pytest.mark.parametrize("encoding", ["direct", "frames"])
def test_layouts_agree(encoding: str) -> None:
    options = {"encoding": encoding} if encoding == "frames" else {}
    x = inputs(options, 20)
    whole = engine("dynamic", **options).run(x, 9).per_step
    for layout, more, T in (("unrolled", {"T": 4}, 4), ("step", {}, 9), ("unrolled", {"T": 4, "with_state": True}, 9)):
        part = engine(layout, **options, **more).run(x, T).per_step
        np.testing.assert_allclose(part, whole[:, :T], rtol=0, atol=1e-6)


def test_any_T_is_the_cumulative_result_of_a_longer_run() -> None:
    x = digits().images[:9]
    long = engine("dynamic").run(x, 9).per_step
    for T in range(1, 9):
        np.testing.assert_allclose(engine("dynamic").run(x, T).logits, long[:, :T].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_graph_that_is_not_folded_computes_the_same(layout: str) -> None:
    options: Options = {"T": 4} if layout == "unrolled" else {}
    x = digits().images[:20]
    unfolded = engine(layout, fold_bn=False, **options)
    np.testing.assert_allclose(unfolded.run(x, 4).per_step, pytorch(x, 4)[0], rtol=0, atol=2e-5)
    kinds = {node.op_type for node in every_node(onnx.load(unfolded.path).graph)}
    assert "BatchNormalization" in kinds
    assert unfolded.metadata["fold_bn"] is False
    names = [layer["name"] for layer in unfolded.metadata["layers"]]
    assert names == [layer["name"] for layer in engine(layout, **options).metadata["layers"]]


def test_without_normalisation_the_graph_takes_what_the_network_takes() -> None:
    images = digits().images[:20]
    plain = engine("unrolled", T=4, normalize=False)
    assert plain.input_dtype == np.float32 and plain.metadata["normalization"] is None
    x = convsnn().normalize(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(plain.run(x).per_step, pytorch(images, 4)[0], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="takes float32 input that is normalised already, got uint8"):
        plain.run(images)


# ------------------------------------------------------------------------------------------------ state


def test_two_runs_give_the_same_bits(case: tuple[str, Options]) -> None:
    layout, options = case
    x, other, T = inputs(options, 7), inputs(options, 60)[20:27], steps(layout, options)[-1]
    first = engine(layout, **options).run(x, T).per_step
    between = engine(layout, **options).run(other, T).per_step
    assert not np.array_equal(first, between)
    np.testing.assert_array_equal(engine(layout, **options).run(x, T).per_step, first)


@pytest.mark.parametrize("options", [{}, {"encoding": "frames"}], ids=["direct", "frames"])
def test_a_stream_of_steps_is_a_run(options: Options) -> None:
    x = inputs(options, 7)
    whole = engine("step", **options).run(x, 9)
    stream = engine("step", **options).stream(batch=7)
    for t in range(9):
        result = stream.push(x[:, t]) if options else stream.push(x if t == 0 else None)
        assert result.t == t + 1
        np.testing.assert_array_equal(result.step_logits, whole.per_step[:, t])
        np.testing.assert_allclose(result.logits, whole.per_step[:, : t + 1].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"encoding": "frames"}], ids=["direct", "frames"])
def test_chunks_with_state_are_one_long_run(options: Options) -> None:
    x = inputs(options, 7, 12)
    long = pytorch(x, 12)[0]
    chunks = engine("unrolled", T=4, with_state=True, **options)
    np.testing.assert_allclose(chunks.run(x, 12).per_step, long, rtol=0, atol=2e-5)
    stream = chunks.stream(batch=7)
    for t in (4, 8, 12):
        result = stream.push(x[:, t - 4 : t]) if options else stream.push(x if t == 4 else None)
        assert result.t == t
        np.testing.assert_allclose(result.step_logits, long[:, t - 1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(result.logits, long[:, :t].mean(1), rtol=0, atol=2e-5)


def test_interleaved_streams_do_not_touch_each_other() -> None:
    sequences = [digits().images[k : k + 1] for k in (0, 30)]
    alone = [engine("step").run(x, 5).per_step for x in sequences]
    streams = [engine("step").stream() for _ in sequences]
    for t in range(5):
        for stream, x, whole in zip(streams, sequences, alone, strict=True):
            np.testing.assert_array_equal(stream.push(x if t == 0 else None).step_logits, whole[:, t])


def test_a_step_graph_does_not_encode_the_same_image_again() -> None:
    graph = onnx.load(exported("step")).graph
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    assert [n.op_type for n in branches["then_branch"].node].count("Conv") == 1
    assert [n.op_type for n in branches["else_branch"].node] == ["Identity"]
    outer = [node for node in graph.node if node.op_type in ("Conv", "Cast", "Div")]
    assert len([node for node in outer if node.op_type == "Conv"]) == 2
    assert all("x" not in node.input for node in outer)

    session = onnxruntime.InferenceSession(exported("step"), providers=["CPUExecutionProvider"])
    feed = {
        i.name: np.zeros([2, *i.shape[1:]], np.float32) for i in session.get_inputs() if i.name not in ("x", "encode")
    }
    one, other = digits().images[:2], digits().images[40:42]

    def call(x: np.ndarray[Any, Any], encode: bool, encoded: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        now = feed | {"x": x, "encode": np.array([encode]), "encoded.0": encoded}
        return session.run(["per_step", "u_next.lif1", "encoded_next.0"], now)

    first = call(one, True, feed["encoded.0"])
    assert np.abs(first[2]).max() > 0.1
    for got, wanted in zip(call(other, False, first[2]), first, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(call(other, True, first[2])[1], first[1])


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_a_step_graph_for_a_gpu_has_no_control_flow(target: str) -> None:
    """It encodes the image at every step, which is billed once as elsewhere."""
    graph, plain, made = onnx.load(exported("step", target=target)).graph, engine("step"), engine("step", target=target)
    assert not {"If", "Scan", "Loop", "Shape"} & {node.op_type for node in every_node(graph)}
    assert made.metadata["encoded"] == [] and "encode" not in {value.name for value in graph.input}
    for key in ("layers", "other_ops", "uncounted"):
        assert made.metadata[key] == plain.metadata[key]
    x = digits().images[:20]
    (result, counts), (wanted, wanted_counts) = (of.count(x, 4) for of in (made, plain))
    np.testing.assert_allclose(result.per_step, wanted.per_step, rtol=0, atol=2e-5)
    assert counts.keys() == wanted_counts.keys()
    stream = made.stream(20)
    steps = [stream.push(x if t == 0 else None).step_logits for t in range(4)]
    np.testing.assert_array_equal(np.stack(steps, 1), result.per_step)


def test_an_unrolled_graph_encodes_the_image_once() -> None:
    nodes = onnx.load(exported("unrolled", T=4)).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Conv") == 3  # the first of a batch of N, the others of T x N
    assert kinds.count("Split") == 2  # the first layer's current is one for all steps


# ------------------------------------------------------------------------------------------------ the file


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)


def signature(values: Any) -> dict[str, tuple[str, list[int | str]]]:
    return {
        v.name: (
            onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower(),
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    }


def test_the_graph_is_plain_onnx(case: tuple[str, Options]) -> None:
    layout, options = case
    proto = onnx.load(exported(layout, **options))
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 10
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert not proto.functions
    nodes = list(every_node(proto.graph))
    assert {node.domain for node in nodes} == {""}
    assert "BatchNormalization" not in {node.op_type for node in nodes}
    assert ("Scan" in {node.op_type for node in nodes}) == (layout == "dynamic")


def test_inputs_and_outputs(case: tuple[str, Options]) -> None:
    layout, options = case
    graph = onnx.load(exported(layout, **options)).graph
    frames_, T = options.get("encoding") == "frames", options.get("T")
    time: int | str = {"unrolled": T, "dynamic": "T", "step": 1}[layout]  # type: ignore[dict-item]
    wanted: dict[str, Any] = {"x": ("uint8", ["batch", *([time] if frames_ and layout != "step" else []), 1, 8, 8])}
    if layout == "dynamic" and not frames_:
        wanted["steps"] = ("uint8", ["batch", "T"])
    shapes = {"lif1": [8, 8, 8], "lif2": [16, 8, 8], "lif3": [16, 4, 4]}
    has_state = layout == "step" or "with_state" in options
    states = {f"u.{name}": ("float", ["batch", *shape]) for name, shape in shapes.items() if has_state}
    encoded: dict[str, Any] = {}
    if layout == "step" and not frames_:
        encoded = {"encoded.0": ("float", ["batch", 8, 8, 8])}
        wanted["encode"] = ("bool", [1])
    assert signature(graph.input) == wanted | states | encoded
    outputs = {"logits": ("float", ["batch", 10]), "per_step": ("float", ["batch", time, 10])}
    outputs |= {name.replace("u.", "u_next."): value for name, value in states.items()}
    outputs |= {name.replace("encoded.", "encoded_next."): value for name, value in encoded.items()}
    assert signature(graph.output) == outputs


@pytest.mark.parametrize("name", ["unrolled", "unrolled one step", "frames unrolled", "frames unrolled one step"])
def test_both_outputs_of_the_graph_fit_together(name: str) -> None:
    layout, options = CASES[name]
    session = onnxruntime.InferenceSession(exported(layout, **options), providers=["CPUExecutionProvider"])
    logits, per_step = session.run(["logits", "per_step"], {"x": inputs(options, 5, options["T"])})
    np.testing.assert_allclose(logits, per_step.mean(1), rtol=0, atol=1e-6)


def test_metadata_carry_all_that_serving_needs(case: tuple[str, Options]) -> None:
    layout, options = case
    proto = onnx.load(exported(layout, **options))
    assert [p.key for p in proto.metadata_props] == ["tetdeploy"]
    value = json.loads(proto.metadata_props[0].value)
    data = digits()
    assert value["layout"] == layout
    assert value["T"] == {"unrolled": options.get("T"), "dynamic": None, "step": 1}[layout]
    assert value["trained_T"] == 4
    assert value["encoding"] == options.get("encoding", "direct")
    assert value["input"] == {"shape": [1, 8, 8], "dtype": "uint8"}
    assert value["normalization"]["scale"] == 255
    np.testing.assert_allclose(value["normalization"]["mean"], data.mean, rtol=1e-6)
    np.testing.assert_allclose(value["normalization"]["std"], data.std, rtol=1e-6)
    assert value["class_names"] == list(data.class_names)
    assert value["fires"] == "u > v_th" and value["reset"] == "hard, to 0"
    shapes = [[8, 8, 8], [16, 8, 8], [16, 4, 4]]
    assert value["neurons"] == [
        {"name": name, "tau": 0.5, "v_th": 1.0, "shape": shape} for name, shape in zip(LAYERS, shapes, strict=True)
    ]
    assert [layer["name"] for layer in value["layers"]] == ["encode.0", "layer2.0", "layer3.1", "readout.2"]
    assert [layer["from_input"] for layer in value["layers"]] == [True, False, False, False]
    assert [layer["binary"] for layer in value["layers"]] == [False, True, True, True]
    assert value["uncounted"] == []
    assert value["versions"]["tetdeploy"] == version()
    assert value["versions"]["torch"] == torch.__version__ and value["versions"]["onnx"] == onnx.__version__


def test_nothing_of_this_machine_is_in_the_file(case: tuple[str, Options]) -> None:
    layout, options = case
    path = exported(layout, **options)
    here = {str(Path.home()), str(Path.cwd()), str(path.parent), str(Path(torch.__file__).parents[1])}
    named = [h for h in here if len(h) > 3] + [platform.node()] * (len(platform.node()) > 8)  # or a word of the file's
    for traced in ("pkg.torch", "site-packages", ".py", "stack_trace", "Traceback", *named):
        assert traced.encode() not in path.read_bytes(), traced


def test_versions_are_known_with_the_gpu_build_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert description.versions()["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize("name", ["unrolled", "dynamic", "frames unrolled", "frames step"])
def test_the_reference_is_what_pytorch_computes(name: str) -> None:
    layout, options = CASES[name]
    T = 4
    with np.load(reference_path(exported(layout, **options))) as arrays:
        reference = dict(arrays)
    x = inputs(options, 60)
    np.testing.assert_array_equal(reference["x"], x)
    expected, spikes = pytorch(x, T)
    np.testing.assert_allclose(reference["per_step"], expected, rtol=0, atol=2e-5)
    counts = np.stack([s.flatten(2).sum(-1).T.numpy() for s in spikes], axis=-1)
    assert reference["spike_counts"].shape == (60, T, 3)
    assert np.abs(reference["spike_counts"] - counts).sum() <= 1e-4 * counts.sum()
    assert reference["neurons"].tolist() == list(LAYERS)
    if options.get("encoding") == "frames":
        assert "labels" not in reference
    else:
        np.testing.assert_array_equal(reference["labels"], digits().labels[:60])


class WritesOver(nn.Module):
    """Sums and products in place of spikes, as SEW's blocks may be written; the first are halved once read. And its
    input is doubled in place."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encode, self.readout = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1)), nn.Linear(8, 10)
            self.convs = nn.ModuleList(OverTime(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3))
        self.lif = LIF(v_th=0.2)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        x *= 2
        first = self.lif(self.encode(x, T))
        current = self.convs[0](first)
        first *= 0.5
        second = self.lif(current)
        third = self.lif(self.convs[1](second))
        third += second
        fourth = self.lif(self.convs[2](third))
        fourth.flatten(0, 1).mul_(third.flatten(0, 1))
        logits: Tensor = self.readout((fourth + first).mean((-2, -1)))
        return logits


@cache
def writes_over() -> Classifier:
    return classifier(WritesOver())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_input_and_spikes_that_the_network_writes_over(precision: Precision, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
    before, config = x.copy(), ExportConfig("step", normalize=False, precision=precision)
    given = {"calibration": (x, None)} if precision == "int8" else {}
    with shared_traces():
        written = export_model(writes_over(), tmp_path / "m.onnx", config, x, **given)
    assert written.parity is not None and written.parity.is_local
    np.testing.assert_array_equal(x, before)
    engine = Engine(written.path)
    _, counts = engine.count(x, T=4)
    with np.load(reference_path(written.path)) as reference:
        fired = reference["spike_counts"].sum((0, 1))
    found = [counts[f"fired.{layer['name']}"].sum() for layer in engine.metadata["neurons"]]
    np.testing.assert_allclose(
        found, fired, rtol=0.0, atol=8
    )  # of 81,920 neuron-steps, as many as the check lets through
    assert all(fired)
    if precision == "int8":
        assert [layer["precision"] for layer in engine.metadata["layers"]] == ["fp32", "int8", "int8", "int8", "fp32"]


def export_convsnn(*arguments: Any, **options: Any) -> Exported:
    with shared_traces():
        return export_model(convsnn(), *arguments, **options)


def test_the_reference_holds_256_images(tmp_path: Path) -> None:
    ticks: list[tuple[str, int, int]] = []
    images = digits().images[:300]
    made = export_convsnn(
        tmp_path / "m.onnx", ExportConfig(T=4), images, num_check=270, progress=lambda *a: ticks.append(a)
    )
    with np.load(tmp_path / "m.reference.npz") as reference:
        np.testing.assert_array_equal(reference["x"], images[:256])
    assert made.parity is not None and made.parity.num_images == 270
    assert ticks[0] == ("checking against PyTorch", 0, 270) and ticks[-1] == ("checking against PyTorch", 270, 270)
    assert made.num_folded == 3 and made.num_neurons == 3
    assert made.size_bytes == (tmp_path / "m.onnx").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.reference.npz"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images PyTorch runs at once for a reference, call by call."""
    ran: list[int] = []

    def run_torch(classifier: Any, x: Any, T: int) -> Any:
        ran.append(len(x))
        return recorder.run_torch(classifier, x, T)

    monkeypatch.setattr("tetdeploy.export.reference.run_torch", run_torch)
    return ran


@pytest.mark.parametrize(
    "config",
    [
        ExportConfig(T=4),
        ExportConfig(T=4, with_state=True),
        ExportConfig("dynamic", trained_T=4),
        ExportConfig("step", trained_T=4),
    ],
    ids=["unrolled", "with-state", "dynamic", "step"],
)
def test_the_reference_takes_what_the_check_computed_and_runs_the_other_images(
    config: ExportConfig, ran: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tetdeploy.export.parity._BATCH", 20)
    answers = {}
    for num_check in (60, 30, 0):
        ran.clear()
        export_convsnn(tmp_path / "m.onnx", config, digits().images[:60], num_check=num_check)
        assert sum(ran) == 60 - num_check
        with np.load(tmp_path / "m.reference.npz") as reference:
            answers[num_check] = reference["per_step"], reference["spike_counts"]
    for per_step, counts in answers.values():
        np.testing.assert_allclose(per_step, answers[0][0], rtol=0, atol=2e-5)
        assert np.abs(counts - answers[0][1]).sum() <= 1e-4 * answers[0][1].sum()


def test_the_reference_runs_as_many_images_at_once_as_their_spikes_allow(
    ran: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_convsnn(tmp_path / "m.onnx", ExportConfig(T=3), digits().images[:40], num_check=0)
    neurons = Engine(tmp_path / "m.onnx").metadata["neurons"]
    monkeypatch.setattr("tetdeploy.batches._SPIKE_BYTES", 15.5 * 4 * 3 * sum(int(np.prod(n["shape"])) for n in neurons))
    export_convsnn(tmp_path / "m.onnx", ExportConfig(T=3), digits().images[:40], num_check=0)
    assert ran == [32, 8, 15, 15, 10]


def test_the_check_may_be_left_out_and_the_path_be_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xe9") / "m.onnx"
    made = export_convsnn(path, ExportConfig(T=4), digits().images[:5], num_check=0)
    assert made.parity is None and made.from_state is None
    assert made.size_bytes == path.stat().st_size
    assert json.loads(json.dumps(made.to_dict()))["path"] == str(path)


def test_parity_is_reported_and_covers_a_state(tmp_path: Path) -> None:
    made = export_convsnn(tmp_path / "m.onnx", ExportConfig("step", trained_T=3), digits().images[:60])
    assert made.parity is not None and made.from_state is not None
    assert made.parity.T == 5  # two steps beyond the training's
    assert made.parity.spike_mismatch_rate <= 1e-4 and made.parity.top1_agreement >= 0.999
    assert len(made.parity.top1_agreement_by_step) == 5
    assert made.parity.max_abs_logit_error < 1e-4  # 0 where PyTorch and ONNX Runtime add in the same order
    assert made.from_state.num_images == 60 and made.from_state.spike_mismatch_rate <= 1e-4


def test_the_check_opens_one_overlay_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            others = [other for session in sessions if (other := session()) is not None]
            assert all(other._model_bytes is None for other in others)
            alive.append(len(others))
            sessions.append(weakref.ref(self))
            super().__init__(*args, **options)

    sessions, alive = list[weakref.ref[Any]](), list[int]()
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    export_convsnn(tmp_path / "m.onnx", ExportConfig(T=4), digits().images[:5])
    assert alive == [0, 1, 1]  # the graph itself, its spikes, and its counts


def test_a_graph_of_any_T_is_compared_at_one_step_at_the_trainings_and_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, steps = gate.compare, []

    def recorded(*arguments: Any, **options: Any) -> Any:
        steps.append(arguments[3])
        return compare(*arguments, **options)

    monkeypatch.setattr(gate, "compare", recorded)
    export_convsnn(tmp_path / "m.onnx", ExportConfig("dynamic", trained_T=4), digits().images[:60])
    assert sorted(steps) == [1, 4, 6]


# ------------------------------------------------------------------------------------------------ the parity gate


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[Path]:
    """A path with an earlier export; afterwards it must lie there as it was, and nothing else."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier model")
    reference_path(path).write_bytes(b"earlier reference")
    yield path
    assert path.read_bytes() == b"earlier model"
    assert reference_path(path).read_bytes() == b"earlier reference"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_graph_with_another_threshold_is_not_written(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fire = neuron_steps.StepBuilder.fire
    monkeypatch.setattr(
        neuron_steps.StepBuilder, "fire", lambda self, h, v_th, **options: fire(self, h, v_th * 1.02, **options)
    )
    with pytest.raises(ParityError, match=r"unrolled graph does not compute .* of a million .* nothing was written"):
        export_convsnn(earlier, ExportConfig(T=4), digits().images[:60])


@pytest.mark.parametrize(("precision", "target"), [("int8", "cpu"), ("fp16", "cuda")])
def test_a_reduced_graph_of_wrongly_folded_bn_is_not_written(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, target: Any
) -> None:
    """What computes such a graph's answers in PyTorch is folded as well, and agrees with it."""
    x, config, fold = digits().images, ExportConfig(precision=precision, target=target), folding.fold
    monkeypatch.setattr(folding, "fold", lambda *given: fold(*given[:6], 3.0, *given[7:]))  # another eps
    match = r"with BN folded, a layer does not compute what it did: .* nothing was written"
    with shared_traces(onnx=False), pytest.raises(ParityError, match=match):
        export_model(convsnn(), earlier, config, x[:60], calibration=(x[:32], None))


def test_a_graph_with_other_weights_is_not_written(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = model.build_graph

    def build_of_other_weights(*args: Any, **options: Any) -> Any:
        graph, expected, scales = build(*args, **options)
        other = copy.deepcopy(expected)
        with torch.no_grad():
            other.network.readout[2].weight.neg_()  # spikes stay the same
        return graph, other, scales

    monkeypatch.setattr(model, "build_graph", build_of_other_weights)
    with pytest.raises(ParityError, match=r" 0 of a million neuron-steps differ .* top-1 agreement"):
        export_convsnn(earlier, ExportConfig(T=4), digits().images[:60])


def test_an_unrolled_graph_that_ignores_its_state_is_not_written(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = neuron_steps.StepBuilder.step

    def first_step_from_zero(self: Any, current: Any, u: Any, *args: Any, **options: Any) -> Any:
        given = u is not None and u.producer() is None
        return step(self, current, None if given else u, *args, **options)

    monkeypatch.setattr(neuron_steps.StepBuilder, "step", first_step_from_zero)
    with pytest.raises(ParityError, match=r"unrolled graph does not compute .* at T=8"):
        export_convsnn(earlier, ExportConfig(T=4, with_state=True), digits().images[:60])


@pytest.mark.parametrize("encoding", ["direct", "frames"])
def test_an_unrolled_graph_that_gives_out_another_state_is_not_written(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, encoding: Any
) -> None:
    step, steps = neuron_steps.StepBuilder.step, itertools.count()

    def last_membrane_halved(self: Any, *args: Any, reset: bool) -> Any:
        fired, u = step(self, *args, reset=reset)
        return fired, self("Mul", u, self.number(0.5)) if next(steps) % 4 == 3 else u

    monkeypatch.setattr(neuron_steps.StepBuilder, "step", last_membrane_halved)
    config = ExportConfig(T=4, with_state=True, encoding=encoding)
    x = digits().images[:60] if encoding == "direct" else frames(60, 4)
    with pytest.raises(ParityError, match=r"unrolled graph does not compute .* at T=8"):
        export_convsnn(earlier, config, x)


# ------------------------------------------------------------------------------------------------ networks of one's own


class Small(nn.Module):
    """Images in, two neuron layers; the pieces between may be changed by those who inherit."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encode = nn.Conv2d(1, 4, 3, padding=1)
            self.layer2 = nn.Linear(256, 32)
            self.readout = nn.Linear(32, 10)
        self.lif = LIF(v_th=0.3)

    def current(self, x: Tensor, T: int) -> Tensor:
        return self.encode(x).unsqueeze(0).expand(T, -1, -1, -1, -1)

    def between(self, spikes: Tensor) -> Tensor:
        return spikes

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.between(self.lif(self.current(x, T)))
        return self.after(self.readout(self.lif(self.layer2(spikes.flatten(2)) * 2)))


class Odd(nn.Module):
    """Grouped, dilated and strided convolutions, average pooling, functional neurons, one module at two places."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 3, padding="same"), tdBN(8, v_th=0.6))
            self.grouped = OverTime(nn.Conv2d(8, 16, 3, groups=4, padding=2, dilation=2, bias=False), tdBN(16))
            self.strided = OverTime(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(16, 16, (3, 2), stride=(2, 1)), tdBN(16))
            self.side = nn.Conv2d(16, 16, 1, stride=(2, 1), padding=(0, 1))
            self.pooled = OverTime(nn.AvgPool2d(2, padding=1), nn.Conv2d(16, 8, 2), nn.BatchNorm2d(8))
            self.readout = nn.LazyLinear(10)
        self.shared = LIF(tau=0.75, v_th=0.6)
        self.integrate = IF(v_th=0.8)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.shared(self.encode(x, T))
        spikes, _ = lif(self.grouped(spikes), tau=0.3, v_th=0.9)
        spikes = self.shared(self.strided(spikes)) + spikes[:, :, :, ::2]  # not binary any more
        spikes = self.integrate(self.pooled(spikes))
        return self.readout(spikes.flatten(2)).float()


class Tokens(nn.Module):
    """Rows of the image as tokens: linear layers on tokens, a convolution along them, BN over features."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.embed, self.mix = nn.Linear(8, 16), nn.Conv1d(16, 16, 3, padding=1, groups=2)
            self.norm, self.mlp, self.readout = nn.BatchNorm1d(16), nn.Linear(16, 12), nn.Linear(12, 10)
        self.lif1, self.lif2, self.lif3 = LIF(v_th=0.3), LIF(tau=0.2), LIF(v_th=0.2)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.embed(x.squeeze(1))
        spikes = self.lif1(current.unsqueeze(0).expand(T, *current.shape))
        mixed = self.norm(self.mix(spikes.flatten(0, 1).transpose(1, 2))).transpose(1, 2)
        spikes = self.lif3(self.mlp(self.lif2(mixed.unflatten(0, spikes.shape[:2]))))
        return self.readout(spikes).mean(2)


@pytest.mark.parametrize(("layout", "network", "names", "layers", "num_folded"), [
    *(
        (
            layout,
            Odd,
            ["shared", "lif", "shared#2", "integrate"],
            ["encode.0", "grouped.0", "strided.1", "pooled.1", "readout"],
            4,
        )
        for layout in ("unrolled", "dynamic", "step")
    ),
    ("dynamic", Tokens, ["lif1", "lif2", "lif3"], ["embed", "mix", "mlp", "readout"], 1),  # T and batch are open
])  # fmt: skip
def test_unusual_networks(
    layout: str, network: type[nn.Module], names: list[str], layers: list[str], num_folded: int, tmp_path: Path
) -> None:
    net = classifier(network())
    x = digits().images[:40]
    config = ExportConfig(layout=layout, T=5)  # type: ignore[arg-type]
    made = export_model(net, tmp_path / "m.onnx", config, x)
    runner = Engine(made.path, threads=1)
    assert [n["name"] for n in runner.metadata["neurons"]] == names
    assert [layer["name"] for layer in runner.metadata["layers"]] == layers
    assert made.num_folded == num_folded and made.uncounted == ()
    for count, T in itertools.product((1, 7), (2, 5)):
        result, spikes = runner.run_with(spikes_overlay(names), x[:count], T)
        np.testing.assert_allclose(result.per_step, pytorch(x[:count], T, net)[0], rtol=0, atol=2e-5)
        assert all(0.01 < s.mean() < 0.9 for s in spikes.values())
    if layout == "step":
        assert len(runner.metadata["encoded"]) == 1


class AddedTimeAxis(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return (self.encode(x).unsqueeze(0) * 1.5).expand(T, -1, -1, -1, -1)


class BroadcastCurrent(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return self.encode(x).amax((2, 3), keepdim=True).unsqueeze(0).expand(T, -1, -1, 8, 8)


class AsksForFloat32(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(x.float().to(torch.float32), T)


class Resized(Small):
    """The size of a convolution's result, which the graph reads from it, decides what follows."""

    def current(self, x: Tensor, T: int) -> Tensor:
        smaller = nn.functional.max_pool2d(self.encode(x), 2)
        return nn.functional.interpolate(smaller, (8, 8)).expand(T, -1, -1, -1, -1)


class Flattened(Small):
    """One Reshape of a layer's result takes T and N apart and merges all other axes."""

    def between(self, spikes: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(spikes.flatten(0, 1), 3, 1, 1)
        return self.lif(pooled.reshape(*spikes.shape[:2], 256))


class TakesTheImageTwice(Small):
    """The image reaches the second neurons as well as the first, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.skip, self.head = nn.Linear(64, 32), nn.Linear(64, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.current(x, T)).flatten(2)
        logits: Tensor = self.readout(self.lif(self.layer2(spikes) + self.skip(x.flatten(1)).expand(T, -1, -1)))
        return logits + self.head(x.flatten(1))


class ShortcutOfTheCurrent(nn.Module):
    """The image's current drives neurons, and a shortcut round them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1))
            self.layer, self.shortcut = (OverTime(nn.Conv2d(8, 16, k, padding=k // 2, stride=2)) for k in (3, 1))
            self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))
        self.lif1, self.lif2 = LIF(v_th=0.3), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x, T)
        return self.readout(self.lif2(self.layer(self.lif1(current)) + self.shortcut(current)))


class JoinedToTheCurrent(nn.Module):
    """As in a dense block, a layer in front of neurons reads the current of an image, which joins a later one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 3, padding=1))
            self.first, self.second = OverTime(nn.Conv2d(8, 8, 1)), OverTime(nn.Conv2d(8, 8, 3, padding=1))
            self.readout = OverTime(nn.Flatten(), nn.Linear(1024, 10))
        self.lif1, self.lif2 = LIF(v_th=0.3), LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.encode(x, T)
        return self.readout(self.lif2(torch.cat([current, self.second(self.lif1(self.first(current)))], 2)))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
@pytest.mark.parametrize(
    ("network", "encoded", "targets"),
    [
        (partial(SideBySide, AddedTimeAxis, BroadcastCurrent, AsksForFloat32, Resized, Flattened), 5, ["cpu"]),
        (TakesTheImageTwice, 3, ["cpu", "cuda"]),  # on a GPU, too, it is more than one layer
        (ShortcutOfTheCurrent, 2, ["cpu"]),
        (JoinedToTheCurrent, 2, ["cpu", "cuda"]),
    ],
    ids=["currents in other shapes", "behind neurons", "by neurons and layers", "by a layer in front of neurons"],
)
def test_what_is_read_of_an_image(
    network: Callable[[], nn.Module], encoded: int, targets: list[Any], layout: Any, tmp_path: Path
) -> None:
    net, x = classifier(network()), digits().images[:40]
    for target in targets:
        with shared_traces():
            made = export_model(net, tmp_path / "m.onnx", ExportConfig(layout, target=target), x)
        runner = Engine(made.path, threads=1)
        np.testing.assert_allclose(runner.run(x, 4).per_step, pytorch(x, 4, net)[0], rtol=0, atol=2e-5)
        assert len(runner.metadata["encoded"]) == (encoded if layout == "step" else 0)


class Bare(nn.Module):
    """Pixels are currents."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.readout = nn.Linear(64, 10)
        self.lif = LIF(tau=0.5, v_th=1.0)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.lif(x.flatten(1).unsqueeze(0).expand(T, -1, -1)))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_neurons_at_the_threshold_do_not_fire(layout: str, tmp_path: Path) -> None:
    """Eqs. 1-3 by hand, on numbers that are exact: v_th itself does not fire, the reset is to zero, u(0) is zero."""
    x = np.resize(np.array([1.0, 1.5, 0.75, 0.5, -1.0, 0.625], np.float32), (6, 1, 8, 8))
    config = ExportConfig(layout=layout, T=6, normalize=False)  # type: ignore[arg-type]
    made = export_model(classifier(Bare()), tmp_path / "m.onnx", config, x)
    _, spikes = Engine(made.path).run_with(spikes_overlay(["lif"]), x, 6)
    by_pixel = spikes["spikes.lif"][:, 0, :6].T.astype(int).tolist()
    assert by_pixel[0] == [0, 1, 0, 1, 0, 1]  # h = 1, 1.5, then anew from 0
    assert by_pixel[1] == [1, 1, 1, 1, 1, 1]
    assert by_pixel[2] == [0, 1, 0, 1, 0, 1]  # h = 0.75, 1.125
    assert by_pixel[3] == [0, 0, 0, 0, 0, 0]  # h = 0.5, 0.75, 0.875, ... below 1
    assert by_pixel[4] == [0, 0, 0, 0, 0, 0]
    assert by_pixel[5] == [0, 0, 1, 0, 0, 1]  # h = 0.625, 0.9375, 1.09375


def test_flipped_images_may_be_normalised_before_the_graph() -> None:
    flipped = digits().images[:3, :, ::-1]
    given = [_as_input(convsnn(), ExportConfig(normalize=False), x) for x in (flipped, flipped.copy())]
    np.testing.assert_array_equal(*given)


class Transposed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.up = OverTime(nn.ConvTranspose2d(4, 4, 3, padding=1))

    def between(self, spikes: Tensor) -> Tensor:
        return self.up(spikes)


def test_layers_that_are_not_counted_are_named(tmp_path: Path) -> None:
    made = export_model(classifier(Transposed()), tmp_path / "m.onnx", ExportConfig(), digits().images[:40])
    assert made.uncounted == ("up.0",)
    runner = Engine(made.path)
    assert runner.metadata["uncounted"] == ["up.0"]
    assert [layer["name"] for layer in runner.metadata["layers"]] == ["encode", "layer2", "readout"]


class ShortWindows(Small):
    """Pools whose last window would begin in the padding, or past the values."""

    def __init__(self) -> None:
        super().__init__()
        pools = [nn.MaxPool2d(2, 2, 1, ceil_mode=True), nn.AvgPool2d(1, 2, ceil_mode=True)]
        pools += [nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=counted) for counted in (False, True)]
        pools += [nn.AvgPool2d((3, 1), (2, 2), (1, 0), ceil_mode=True, count_include_pad=False)]
        self.pools = nn.ModuleList(OverTime(pool) for pool in pools)
        self.frame_by_frame = nn.MaxPool3d((1, 2, 2), padding=(0, 1, 1), ceil_mode=True)

    def between(self, spikes: Tensor) -> Tensor:
        odd = spikes[:, :, :, :7, :7]
        small = sum(pool(odd) for pool in self.pools)
        small = small + self.frame_by_frame(odd.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4)
        return torch.cat([small, small, small, small], 2)


def test_windows_of_ceil_mode_are_pytorchs(tmp_path: Path) -> None:
    config = ExportConfig(layout="dynamic", T=3)  # in it an axis of the three-dimensional pool is open
    made = export_model(classifier(ShortWindows()), tmp_path / "m.onnx", config, digits().images[:40])
    pools = [n for n in onnx.load(made.path).graph.node if n.op_type.endswith("Pool")]
    assert len(pools) == 6


def test_errors_do_not_name_files_that_are_gone(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "serialised", lambda *given: b"")  # a model without a graph
    with shared_traces():
        with pytest.raises(ValueError, match=r"^torch\.onnx wrote a layer .*: (?!.*\.tmp)"):
            export_model(convsnn(), earlier, ExportConfig(T=4), digits().images[:40])
        monkeypatch.setattr(model, "_check_form", lambda *given: None)
        with pytest.raises(ValueError, match=r"^the graph that was to be written cannot be loaded"):
            export_model(convsnn(), earlier, ExportConfig(T=4), digits().images[:40])


def test_a_graph_larger_than_protocol_buffers_is_not_written(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.export.description._MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"^the graph takes 0\.\d\d GB, and an ONNX file can be read up to 0\.00 GB"):
        export_model(convsnn(), earlier, ExportConfig(T=4), digits().images[:40])


def test_symbols_of_which_one_begins_another_keep_apart() -> None:
    frames = ir.Value(shape=ir.Shape(("s7", "s77", 8)))
    merged = ir.node("Flatten", [frames])
    merged.outputs[0].shape = ir.Shape(("s7*s77", 8))
    graph = ir.Graph([frames], [merged.outputs[0]] * 2, nodes=[merged], opset_imports={"": 20})
    onnx_tracer._name_boundary(ir.Model(graph, ir_version=10), None, "frames")
    assert frames.shape == ir.Shape(("batch", "T", 8))
    assert merged.outputs[0].shape == ir.Shape(("batch*T", 8))


# ------------------------------------------------------------------------------------------------ refusals


class MeanOverTime(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes - spikes.mean(0)


class DropsOut(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return nn.functional.dropout(spikes, 0.5)


class CountsCalls(Small):
    calls = 0

    def between(self, spikes: Tensor) -> Tensor:
        self.calls += 1
        return spikes * self.calls


class ResetsSoftly(Small):
    class Soft(LIF):
        def forward(self, current: Tensor) -> Tensor:
            u, fired = torch.zeros_like(current[0]), []
            for step in current:
                u = self.tau * u + step
                fired.append((u > self.v_th).to(u.dtype))
                u = u - self.v_th * fired[-1]
            return torch.stack(fired)

    def __init__(self) -> None:
        super().__init__()
        self.soft = self.Soft()

    def between(self, spikes: Tensor) -> Tensor:
        return self.soft(spikes * 0.8)


class HidesWhatNeuronsRead(Small):
    """Neurons too far from the threshold to tell read a current that mixes time and is written over after that."""

    def between(self, spikes: Tensor) -> Tensor:
        current = (spikes - spikes.mean(0)) * 0.1
        fired: Tensor = self.lif(current)
        current.zero_()
        return spikes + fired


class RunningSum(Small):
    def after(self, logits: Tensor) -> Tensor:
        return logits.cumsum(0)


class KeptOutside(Small):
    """What it carries on lies in no module; and what it keeps cannot be compared."""

    answers: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def after(self, logits: Tensor) -> Tensor:
        self.answers.append(logits)
        return logits + len(self.answers)


class DependsOnT(Small):
    def after(self, logits: Tensor) -> Tensor:
        return logits / len(logits)


class LateEcho(Small):
    """Five steps back: only a check as long as the graph sees it."""

    def between(self, spikes: Tensor) -> Tensor:
        return torch.cat([spikes[:5], spikes[5:] * spikes[:-5]]) if len(spikes) > 5 else spikes


class OneStepAtATime(Small):
    def forward(self, x: Tensor, T: int) -> Tensor:
        u, logits = None, []
        for _ in range(T):
            spikes, u = lif(self.encode(x).unsqueeze(0), u, v_th=0.3)
            logits.append(self.readout(self.lif(self.layer2(spikes.flatten(2)))))
        return torch.cat(logits)


class FiresOnce(Small):
    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.encode(x).unsqueeze(0)).expand(T, -1, -1, -1, -1)
        return self.readout(self.lif(self.layer2(spikes.flatten(2)) * 2))


class FiresLater(Small):
    """Neurons of its own, which no spike makes fire within the steps that are compared."""

    def between(self, spikes: Tensor) -> Tensor:
        u, fired = torch.zeros_like(spikes[0]), []
        for s in spikes:
            u = u + 0.01 * s
            fired.append((u > 0.5).to(s.dtype))
            u = u * (1 - fired[-1])
        return spikes + torch.stack(fired)


class FiresLaterBesideANumber(FiresLater):
    """One-hot vectors of a class make a Python number, which is no condition."""

    def after(self, logits: Tensor) -> Tensor:
        return logits + 0.01 * nn.functional.one_hot(logits.argmax(-1), 10)


class FiresLaterBesideInfinities(FiresLater):
    def between(self, spikes: Tensor) -> Tensor:
        return super().between(spikes).exp().log1p()


class StartsElsewhere(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return lif(spikes, torch.full_like(spikes[0], 0.2), v_th=0.6)[0]


class Unused(Small):
    def between(self, spikes: Tensor) -> Tensor:
        self.lif(spikes * 0.5)
        return spikes


class NoNeurons(Small):
    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.layer2(self.current(x, T).flatten(2)))


class AllUnused(NoNeurons):
    def forward(self, x: Tensor, T: int) -> Tensor:
        self.lif(self.current(x, T))
        return super().forward(x, T)


class NeuronsOfItsOwn(NoNeurons):
    """Neurons of another library keep membranes: that none are ours is the reason to name, not that they mix time."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.current(x, T)
        u, spikes = torch.zeros_like(current[0]), []
        for i in current:
            u = 0.5 * u + i
            spikes.append((u > 1).to(u.dtype))
            u = u - spikes[-1]
        return self.readout(self.layer2(torch.stack(spikes).flatten(2)))


class OnlyTheMean(Small):
    def after(self, logits: Tensor) -> Tensor:
        return logits.mean(0)


class Exotic(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(spikes * 0.01)


class LooksAtTheData(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes * 2 if spikes.sum() > -1e9 else spikes


class BrightOnAverage(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes * 2 if spikes.mean() > 0.1 else spikes


class BusyForThreeSteps(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes * 2 if spikes[:3].sum() > spikes[3:].sum() else spikes


class Brightest(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(x / x.abs().max(), T)


class BatchStatistics(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(nn.functional.batch_norm(x, None, None, training=True), T)


class Rolled(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes.roll(1, 1)


class Centred(Small):
    def after(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True)


class NearlyAlone(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes + 1e-5 * spikes.mean(1, keepdim=True)


class Fails(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return spikes @ torch.ones(3, 3, dtype=spikes.dtype)


class BehindPooling(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OverTime(nn.AvgPool2d(1), nn.BatchNorm2d(4))

    def between(self, spikes: Tensor) -> Tensor:
        return self.norm(spikes)


class WithoutRunningStatistics(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OverTime(nn.BatchNorm2d(4, track_running_stats=False))

    def between(self, spikes: Tensor) -> Tensor:
        return self.norm(spikes)


class NormalisesTheImage(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(1)

    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(self.first(x), T)


class BehindItsOwnPadding(NormalisesTheImage):
    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(nn.functional.pad(x[..., 1:], (1, 0)), T)


def pooled_by(pool: nn.Module) -> type[nn.Module]:
    class Pooled(Small):
        def __init__(self) -> None:
            super().__init__()
            self.pool = OverTime(pool, nn.Upsample((8, 8)))

        def between(self, spikes: Tensor) -> Tensor:
            return self.pool(spikes)

    return Pooled


@pytest.mark.parametrize(("network", "error", "match"), [
    (pooled_by(nn.AvgPool2d(2, divisor_override=2)), ValueError, r"'pool\.0' averages with divisor_override=2"),
    (pooled_by(nn.AdaptiveMaxPool2d(3)), ValueError, r"cannot export 'pool\.0': .*adaptive_max_pool2d.*x\.amax"),
    (MeanOverTime, ValueError, "mixes time outside its neurons: its answer at step 1 of T=6 differs.* to the next$"),
    (DropsOut, ValueError, r"draws random numbers in inference, .* training=self\.training to F\.dropout"),
    (CountsCalls, ValueError, r"mixes time .* changed what is kept in network \(CountsCalls of test_export\)$"),
    (ResetsSoftly, ValueError, r"mixes time .* to the next; neurons .* own may, as by a soft reset: soft \(Soft\)$"),
    (HidesWhatNeuronsRead, ValueError, "mixes time outside its neurons: its answer at step 1 of T=6 differs"),
    (RunningSum, ValueError, "mixes time outside its neurons: its answer at step 2 of T=6 differs"),
    (KeptOutside, ValueError, "mixes time outside its neurons: its answer at step 1 of T=6 differs.* to the next$"),
    (DependsOnT, ValueError, "mixes time outside its neurons"),
    (BusyForThreeSteps, ValueError, r"mixes time outside .*; perhaps because its .* makes a Python number"),
    (BrightOnAverage, ValueError, r"mixes the images .*; perhaps because its .* makes a Python number"),
    (LateEcho, ValueError, "mixes time outside its neurons: its answer at step 6 of T=6 differs"),
    (FiresLater, ValueError, "mixes time outside its neurons: its answer at step 6 of T=6 differs"),
    (FiresLaterBesideANumber, ValueError, "mixes time outside its neurons: its answer at step 6 of T=6 differs"),
    (FiresLaterBesideInfinities, ValueError, "mixes time outside its neurons: its answer at step 6 of T=6 differs"),
    (OneStepAtATime, ValueError, r"runs its neurons 12 times for T=6 and 2 times for .* in one call; where .* recu"),
    (FiresOnce, ValueError, r"for T=6 and 2 images neurons 'lif' get currents \[1, 2, 4, 8, 8\], but axis 0 must be"),
    (StartsElsewhere, ValueError, r"neurons 'lif#2' start from a membrane u .* leave u out"),
    (Unused, ValueError, r"runs 3 neuron layers, but only 2 .* take out those"),
    (NoNeurons, ValueError, r"no LIF or IF of tetdeploy\.neurons, so .* put them in place of its own neurons"),
    (AllUnused, ValueError, "no LIF or IF of the network reaches its logits; take out those"),
    (NeuronsOfItsOwn, ValueError, r"no LIF or IF of tetdeploy\.neurons"),
    (OnlyTheMean, ValueError, r"must give logits \[T, N, K\], here \[6, 2, 10\], got \[2, 10\]"),
    (Exotic, ValueError, "torch.onnx cannot export an operation of the network: .*linalg_matrix_exp"),
    (Brightest, ValueError, r"mixes the images of a batch: the currents of neurons 'lif' for an .* axis 1 of \[T, N"),
    (BatchStatistics, ValueError, "mixes the images of a batch: the currents of neurons 'lif'"),
    (WithoutRunningStatistics, ValueError, r"steps: BN without running statistics \(norm\.0\) takes .* keep its"),
    (Rolled, ValueError, "mixes the images of a batch: the currents of neurons 'lif'"),
    (NearlyAlone, ValueError, "mixes the images of a batch: the currents of neurons 'lif'"),
    (Centred, ValueError, "mixes the images of a batch: the logits for an image by itself differ"),
    (LooksAtTheData, ValueError, r"cannot trace the network: its forward makes a Python number of .* as torch\.where$"),
    (Fails, ValueError, r"the network fails at T=6 on input \[2, 1, 8, 8\], and must run at any T, .* images: \w"),
    (NormalisesTheImage, FoldingError, "cannot fold BN 'first': what comes before it is the input, not"),
    (BehindItsOwnPadding, FoldingError, r"what comes before it is aten\.pad\.default \(network\), not"),
    (BehindPooling, FoldingError, r"cannot fold BN 'norm\.1': .*\(norm\.0\).* without folding \(--no-fold-bn\)$"),
])  # fmt: skip
def test_refused_networks(
    network: type[nn.Module], error: type[Exception], match: str, earlier: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = classifier(network()) if network not in (Fails, OnlyTheMean) else untested(network())
    with pytest.raises(error, match=match):
        export_model(net, earlier, ExportConfig(T=4), digits().images[:40])
    assert capfd.readouterr() == ("", "")  # the message alone


def test_int8_is_told_that_folding_can_be_left_out_in_float32(tmp_path: Path) -> None:
    net, x = classifier(BehindPooling()), digits().images[:40]
    with pytest.raises(FoldingError, match=r"without folding \(--precision fp32 --no-fold-bn\)$"):
        export_model(net, tmp_path / "m.onnx", ExportConfig(T=2, precision="int8"), x, calibration=(x, None))


@pytest.mark.parametrize("count", [1, 2])
def test_images_with_the_same_extremes_tell_a_network_that_mixes_them(count: int) -> None:
    same = torch.from_numpy(digits().images[:1]).repeat(count, 1, 1, 1)
    for x in (same, same / 255.0):
        with pytest.raises(ValueError, match="mixes the images of a batch"):
            check_steps(untested(Brightest()), x, "direct")


class Silent(Small):
    """Its middle layer `quiet` never fires: its currents add up to 0.2 at most."""

    def __init__(self, behind: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.quiet, self.behind = LIF(), behind

    def between(self, spikes: Tensor) -> Tensor:
        return self.behind(self.quiet(spikes * 0.1))


class HardlyFires(Silent):
    """`quiet` gets currents of 0.3 in images that make the first layer fire more than `least` times a step."""

    def __init__(self, quiet: LIF, least: int, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__(behind)
        self.quiet, self.least = quiet, least

    def between(self, spikes: Tensor) -> Tensor:
        fires = spikes.sum((2, 3, 4), keepdim=True) > self.least
        return self.behind(self.quiet(fires.expand(spikes.shape) * spikes.new_tensor(0.3)))


MIXES_TIME = "mixes time outside its neurons: its answer at step {} of T=4 differs"
MIXES_IMAGES = "mixes the images of a batch: the currents of neurons 'lif'"


@pytest.mark.parametrize(
    ("network", "behind", "match"),
    [
        (Silent, lambda y: y * (1 + y.mean(0)), MIXES_TIME.format(1)),
        (Silent, lambda y: y.cumsum(0), MIXES_TIME.format(4)),
        (Silent, lambda y: y.roll(1, 1), MIXES_IMAGES),
        (partial(HardlyFires, IF(), -1), lambda y: y.cumsum(0), MIXES_TIME.format(4)),
        (partial(HardlyFires, LIF(v_th=0.2), 20), lambda y: y + y * (y.sum(1, keepdim=True) - y), MIXES_IMAGES),
    ],
    ids=["time", "later time", "images", "time, at the last step alone", "images, of the brighter alone"],
)
def test_what_stands_behind_neurons_that_hardly_fire_is_checked(
    network: Callable[..., nn.Module], behind: Callable[[Tensor], Tensor], match: str
) -> None:
    x = torch.from_numpy(digits().images[:2])
    assert check_steps(untested(network(lambda y: y)), x, "direct") == 3
    with pytest.raises(ValueError, match=match):
        check_steps(untested(network(behind)), x, "direct")


def test_no_run_of_the_check_keeps_what_an_earlier_one_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All currents and spikes of T steps are the most that an export keeps of a large network."""
    original, runs, kept = causality._recorded, list[weakref.ref[Any]](), list[int]()

    def recorded(*args: Any, **options: Any) -> Any:
        kept.append(sum((run := of_all()) is not None and len(run.spikes[0]) > 1 for of_all in runs))
        run, logits = original(*args, **options)
        assert all(spikes.dtype == torch.bool for spikes in run.spikes)
        runs.append(weakref.ref(run))
        return run, logits

    monkeypatch.setattr(causality, "_recorded", recorded)
    check_steps(untested(Silent()), torch.from_numpy(digits().images[:2]), "direct")
    assert kept == [0, *[1] * 6, 0, *[1] * 4, 0, 1]  # steps and images alone; with random spikes; with large numbers


class RefusesLargeNumbers(Small):
    def between(self, spikes: Tensor) -> Tensor:
        if spikes.abs().max() > 1:
            raise RuntimeError("these are no spikes")
        return spikes


class RoundsOtherwise(Small):
    """One step by itself may be rounded otherwise than as one of several; a sine of large numbers shows it."""

    def between(self, spikes: Tensor) -> Tensor:
        return (spikes**3 * (1 + 2**-52 * (len(spikes) == 1))).sin()


@pytest.mark.parametrize("network", [RefusesLargeNumbers, RoundsOtherwise])
def test_what_large_numbers_do_to_a_network_is_no_mixing_of_time(network: type[nn.Module]) -> None:
    assert check_steps(untested(network()), torch.from_numpy(digits().images[:2]), "direct") == 2


def test_an_export_names_layers_that_no_checked_image_makes_fire(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ExportConfig("step")
    written = export_model(untested(Silent()), tmp_path / "m.onnx", config, digits().images[:20], num_check=20)
    assert written.to_dict()["silent"] == ["quiet", "lif#2"]
    print_exported(written, config)
    said = " ".join(capsys.readouterr().out.split())
    assert "no neuron of quiet, lif#2 fired on the 20 checked images: what reads them was compared at 0 only;" in said
    assert written.parity is not None
    fires = dataclasses.replace(written.parity, silent=())
    for others in ({"parity": fires}, {"from_state": fires}, {"parity": None, "from_state": None}):
        assert dataclasses.replace(written, **others).silent == []
    assert dataclasses.replace(written, from_state=None).silent == ["quiet", "lif#2"]
    many = dataclasses.replace(written.parity, silent=tuple(f"lif{k}" for k in range(156)))
    print_exported(dataclasses.replace(written, parity=many, from_state=None), config)
    said = " ".join(capsys.readouterr().out.split())
    assert "no neuron of lif0, lif1, lif2, lif3, lif4 and 151 more fired on the 20 checked images" in said


def test_a_layer_that_fires_in_one_batch_alone_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Small()
    network.encode.bias = None
    written = unchecked(network, tmp_path / "m.onnx", ExportConfig("step"))
    monkeypatch.setattr("tetdeploy.export.parity._BATCH", 1)
    for grey in (0, 1):
        x = digits().images[:2].copy()
        x[grey] = 76  # about 0, normalised
        assert "lif" in compare(untested(network), written, x[[grey]], 1).silent
        assert "lif" not in compare(untested(network), written, x, 1).silent


class AtTheThreshold(Small):
    """Currents at the threshold, which rounding takes above it for an image by itself; and a residual sum in place."""

    def between(self, spikes: Tensor) -> Tensor:
        rounding = 1 + 2.0**-52 * (spikes.shape[1] == 1)
        inner = self.lif(torch.full_like(spikes, 0.3) * rounding)
        inner += spikes
        return inner


def test_rounding_at_the_threshold_is_no_mixing() -> None:
    x = torch.from_numpy(digits().images[:2])
    assert check_steps(untested(AtTheThreshold()), x, "direct", T=5) == 3  # at steps 1, 3 and 5 the membrane is 0


def written_in(x: Tensor, y: Tensor) -> Tensor:
    y[torch.arange(len(x))] = x
    return y


class Kernel:
    """Weights that are neither parameters nor buffers."""

    weight = torch.full((1, 1, 3, 3), 1 / 9)

    def blur(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight[:], padding=1)

    def frame(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., torch.tensor([0, 7])] = self.weight[0, 0, 0, :2]
        return x


class Prepares(Small):
    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare

    def current(self, x: Tensor, T: int) -> Tensor:
        return super().current(self.prepare(x), T)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: written_in(x, torch.zeros(x.shape)),
        lambda x: x @ torch.eye(8),
        lambda x: nn.functional.conv2d(x, torch.full((1, 1, 3, 3), 1 / 9), padding=1),
        lambda x: written_in(x, torch.tensor(np.zeros(x.shape).tolist())),
        lambda x: x @ torch.from_numpy(np.eye(8, dtype=np.float32)),
        Kernel().blur,
        Kernel().frame,
    ],
    ids=["zeros", "eye", "full", "tensor", "numpy", "kept", "kept-written"],
)
def test_networks_may_make_tensors_of_the_default_dtype(prepare: Callable[[Tensor], Tensor]) -> None:
    assert check_steps(untested(Prepares(prepare)), torch.from_numpy(digits().images[:2]), "direct") == 2
    assert torch.get_default_dtype() == torch.float32


def untested(network: nn.Module) -> Classifier:
    data = digits()
    return Classifier(
        network, config=convsnn().config, mean=data.mean, std=data.std, class_names=data.class_names
    ).eval()


class CountsSteps(Small):
    def current(self, x: Tensor, T: int) -> Tensor:
        return torch.stack([self.encode(x) for _ in range(T)])


@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"precision": "fp16", "target": "cuda"}])
@pytest.mark.parametrize(("name", "value"), [
    ("readout.2.weight", torch.nan),
    ("layer2.0.weight", torch.nan),
    ("layer2.0.weight", -torch.inf),
    ("layer2.1.running_var", torch.nan),
    ("layer2.1.running_mean", torch.inf),
])  # fmt: skip
def test_weights_that_are_not_finite_are_named(name: str, value: float, options: Options, earlier: Path) -> None:
    net = copy.deepcopy(convsnn())
    net.network.state_dict()[name].view(-1)[0] = value
    match = rf"^NaN or infinite values in {name}: the training diverged, .* train again with a lower --lr or --clip 1"
    with pytest.raises(ValueError, match=match):
        export_model(net, earlier, ExportConfig(T=4, **options), digits().images[:40])


class DividesByZero(Small):
    """Its masks are infinite, as those of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor(torch.inf))
        self.frozen = nn.Parameter(torch.tensor(-torch.inf), requires_grad=False)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return super().forward(x, T) / (1 / self.mask)


def test_a_network_that_gives_nan_is_refused(earlier: Path) -> None:
    with pytest.raises(ValueError, match="the network gives NaN or infinite logits, though its weights are finite"):
        export_model(classifier(DividesByZero()), earlier, ExportConfig(T=4), digits().images[:40])


def test_dynamic_names_the_way_out_for_a_network_that_counts_its_steps(earlier: Path) -> None:
    net = classifier(CountsSteps())
    match = r"cannot be traced with the number of steps left open.* --layout unrolled\. The reason: it loops over its"
    with pytest.raises(ValueError, match=match):
        export_model(net, earlier, ExportConfig("dynamic"), digits().images[:40])


class OfFrames(Small):
    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode, self.layer2 = encode, nn.Linear(64, 32)

    def current(self, x: Tensor, T: int) -> Tensor:
        return self.encode(x)

    def forward(self, x: Tensor, T: int = 0) -> Tensor:
        return super().forward(x, T)


class AsksForTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] < 100 else x * 2


class Clamped(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return (spikes * 2).clamp(0, 1.5).clamp_(max=1).clamp_(0.5, 2).clip(-1, 2.5)


def test_a_clamp_may_have_a_whole_number_and_a_fraction(tmp_path: Path) -> None:
    net, x = classifier(Clamped()), digits().images[:40]
    for fold_bn in (True, False):
        with shared_traces():
            assert export_model(net, tmp_path / "m.onnx", ExportConfig(T=4, fold_bn=fold_bn), x).parity


class Positioned(Small):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.drop = nn.Parameter(torch.full((4, 8, 8), 0.25)), nn.Dropout()

    def between(self, spikes: Tensor) -> Tensor:
        return spikes + self.drop(self.positions[None])


def test_a_module_may_be_called_on_a_view_of_a_parameter(tmp_path: Path) -> None:
    net = classifier(Positioned())
    assert net.get_parameter("network.positions").requires_grad
    assert export_model(net, tmp_path / "m.onnx", ExportConfig(layout="step"), digits().images[:40]).parity


class ReadsTheLastMembrane(Small):
    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes, u = self.lif.with_state(self.current(x, T))
        return self.readout(self.lif(self.layer2(spikes.flatten(2)))) + 0 * u.mean()


class EachImage(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return torch.stack([image * 2 for image in spikes.unbind(1)], 1)


class InBfloat16(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return (spikes.bfloat16() * 1.5).float()


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (ReadsTheLastMembrane, "reads the last membrane of neurons 'lif', .*: leave it out"),
        (EachImage, r"it loops over its images, or counts them by len\(x\), .*; x.shape\[0\] does not"),
        (InBfloat16, "computes in bfloat16, as under torch.autocast, .*; compute in float32"),
    ],
)
@pytest.mark.parametrize("layout", ["dynamic", "step"])
def test_what_no_graph_can_hold_is_named(network: type[Small], match: str, layout: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        export_model(classifier(network()), tmp_path / "m.onnx", ExportConfig(layout=layout), digits().images[:40])
    assert not list(tmp_path.iterdir())


class Volumes(Small):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 1, 3, padding=1, bias=False)

    def between(self, spikes: Tensor) -> Tensor:
        return self.volume(spikes.flatten(0, 1).unsqueeze(1)).squeeze(1).unflatten(0, spikes.shape[:2])


@pytest.mark.parametrize("fold_bn", [True, False])
def test_a_convolution_over_volumes_needs_no_bias(fold_bn: bool, tmp_path: Path) -> None:
    exported = export_model(
        classifier(Volumes()), tmp_path / "m.onnx", ExportConfig(T=4, fold_bn=fold_bn), digits().images[:40]
    )
    assert exported.parity
    convolutions = [
        node for node in onnx.load(exported.path).graph.node if node.op_type == "Conv" and "volume" in node.input[1]
    ]
    assert [len(node.input) for node in convolutions] == [2]


@pytest.mark.parametrize("T", [4, None])
def test_frames_may_go_to_neurons_as_they_are(T: int | None) -> None:
    net = untested(OfFrames(DirectEncoding(nn.Identity())))
    assert Tracer(net, encoding="frames", uint8=True).program(T)


def test_only_a_guard_of_torchs_is_explained() -> None:
    assert reason(ValueError("no min(a) here")) == "no min(a) here"


def test_torch_logs_as_before_once_it_has_traced(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch")
    with caplog.at_level(17, "torch"):
        with quiet():
            assert logger.level == logging.CRITICAL
        assert logger.level == 17


@pytest.mark.skipif(
    not hasattr(torch.fx.config, "do_not_emit_stack_traces"), reason="this PyTorch notes them whatever it is told"
)
def test_a_trace_does_not_note_where_its_nodes_are_made_and_torch_does_so_again_after_it() -> None:
    nodes = Tracer(convsnn(), encoding="direct", uint8=True).program(1).graph.nodes
    assert len(nodes) > 9 and not any("in forward" in (node.stack_trace or "") for node in nodes)
    assert not torch.fx.config.do_not_emit_stack_traces


@pytest.mark.parametrize("T", [4, None])
def test_what_cannot_be_traced_at_any_T_is_told_torchs_reason(T: int | None) -> None:
    net = untested(OfFrames(AsksForTheBatch()))
    with pytest.raises(ValueError, match=r"^torch\.export cannot trace the network: Not all values of batch"):
        Tracer(net, encoding="frames", uint8=True).program(T)


class CentredFrames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class KeepsFrames(nn.Module):
    """What it was shown last is kept in float32, and written through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.last = [torch.zeros(1, 8, 8)]

    def forward(self, x: Tensor) -> Tensor:
        last = self.last[0].clone()
        self.last[0][:] = x[-1, 0]
        return x + last


class AddsUpFrames(nn.Module):
    """Only of large numbers do four frames add up to so much."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.cumsum(0) < 100)


@pytest.mark.parametrize("encode", [CentredFrames, KeepsFrames, AddsUpFrames])
def test_frames_that_become_other_currents_beside_others_are_refused(encode: type[nn.Module]) -> None:
    kept = r"; this run changed what is kept in encode \(KeepsFrames of test_export\)" if encode is KeepsFrames else ""
    with pytest.raises(ValueError, match=rf"mixes time outside its neurons: .* from one step to the next{kept}$"):
        check_steps(untested(OfFrames(encode())), torch.from_numpy(frames(2, 4)), "frames")


def test_a_network_that_mixes_frames_is_refused_even_with_one_frame_each(earlier: Path) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convsnn().network

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            return self.inner(x, T).cumsum(0)

    with pytest.raises(ValueError, match="mixes time outside its neurons"):
        export_model(untested(Mixing()), earlier, ExportConfig(T=1, encoding="frames"), frames(20, 1))


class OneByOne(nn.Module):
    """Each layer wrapped by itself, as SpikingJelly's networks are written."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.encode, self.norm0 = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1)), norm(4)
            self.conv, self.norm1 = OverTime(nn.Conv2d(4, 8, 3, padding=1)), norm(8)
            self.linear, self.readout = OverTime(nn.Linear(128, 32)), OverTime(nn.Linear(32, 10))
        self.pool, self.flatten, self.dropout = (
            OverTime(nn.MaxPool2d(2)),
            OverTime(nn.Flatten()),
            OverTime(nn.Dropout()),
        )
        self.lif = LIF(v_th=0.3)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif(self.norm0(self.encode(x, T)))
        spikes = self.dropout(self.lif(self.pool(self.norm1(self.conv(spikes)))))
        return self.readout(self.dropout(self.lif(self.linear(self.flatten(spikes)))))


def batch_norm_over_time(channels: int) -> nn.Module:
    return OverTime(nn.BatchNorm2d(channels))


@pytest.mark.parametrize(  # both norms make the same traced graph
    ("norm", "layout"), [(tdBN, "unrolled"), (batch_norm_over_time, "dynamic"), (tdBN, "step")]
)
def test_layers_may_be_wrapped_one_by_one(norm: Callable[[int], nn.Module], layout: str, tmp_path: Path) -> None:
    net, x = classifier(OneByOne(norm)), digits().images[:40]
    made = export_model(net, tmp_path / "m.onnx", ExportConfig(layout=layout), x)  # type: ignore[arg-type]
    assert made.num_folded == 2 and made.uncounted == ()
    np.testing.assert_allclose(Engine(made.path).run(x, 4).per_step, pytorch(x, 4, net)[0], rtol=0, atol=2e-5)


@cache
def linear_tokens() -> Classifier:
    return classifier(LinearTokens())


@pytest.mark.parametrize(
    ("layout", "precision"), [("unrolled", "fp32"), ("dynamic", "fp32"), ("step", "fp32"), ("unrolled", "int8")]
)
def test_bn_of_tokens_is_folded_into_a_linear_layer(layout: Any, precision: Any, tmp_path: Path) -> None:
    images, config = digits().images, ExportConfig(layout, T=3, trained_T=3, precision=precision)
    with shared_traces():
        made = export_model(linear_tokens(), tmp_path / "m.onnx", config, images[:60], calibration=(images[:64], None))
    assert (made.num_folded, made.silent, made.uncounted) == (3, [], ())
    if precision == "int8":
        assert made.int8 is not None and list(made.int8["scales"]) == ["conv.0"]


class WrittenOverCurrent(OneByOne):
    def __init__(self) -> None:
        super().__init__(tdBN)
        self.norm0.register_forward_hook(lambda *given: given[-1].add_(0.1))


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_a_folded_network_that_cannot_be_traced_again_is_told_the_way_out(layout: str, tmp_path: Path) -> None:
    match = r"torch\.export cannot trace the network once more .*: put .* --no-fold-bn\."
    refused_or_right(WrittenOverCurrent(), match, layout, tmp_path / "m.onnx")


def refused_or_right(network: nn.Module, match: str, layout: str, path: Path) -> None:
    """In one line that `match` begins; but newer versions of torch (2.15) trace more networks."""
    net, x = untested(network), digits().images[:9]
    try:
        export_model(net, path, ExportConfig(layout=layout, T=4), x)  # type: ignore[arg-type]
    except ValueError as error:
        said = str(error)
    else:
        for several in (x[:1], x):
            np.testing.assert_allclose(Engine(path).run(several, 4).per_step, pytorch(several, 4, net)[0], atol=2e-5)
        return
    assert re.match(match, said) and "\n" not in said, said


class CutInTwo(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return torch.cat([spikes.flatten(0, 1)] * 2).relu().chunk(2)[0].view_as(spikes)


class MergedAndSplit(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return nn.functional.dropout(spikes.flatten(0, 1), 0.5, self.training).view_as(spikes)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
@pytest.mark.parametrize(("network", "match"), [
    (CutInTwo, r"it cuts an axis with the batch in it into parts, as chunk\(2\) does; write unflatten.*: Not all"),
    (MergedAndSplit, r"it merges axes with that of the batch and splits them again .* write nn\.Flatten\(2\).*: Not"),
])  # fmt: skip
def test_why_the_batch_cannot_be_left_open(network: type[nn.Module], match: str, layout: str, tmp_path: Path) -> None:
    refused_or_right(network(), rf"torch\.export cannot trace the network: {match}", layout, tmp_path / "m.onnx")


@pytest.mark.parametrize(("fold_bn", "T"), [(True, None), (False, 4)])
def test_errors_of_the_optimiser_are_told(fold_bn: bool, T: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        failed = RuntimeError("a pass failed")
        failed.__cause__ = TypeError("no ndim")
        raise RuntimeError("not optimised") from failed

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fails)
    monkeypatch.setattr(onnx_tracer, "fold_constants", fails)
    way_out = "; use --layout unrolled" if T is None else ""
    match = rf"^the network's ONNX graph cannot be optimised: a pass failed: no ndim{way_out}$"
    config = ExportConfig("dynamic" if T is None else "unrolled", T=T or 3, fold_bn=fold_bn)
    with shared_traces(), pytest.raises(ValueError, match=match):
        model.build_graph(convsnn(), config)


class CutsTwice(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return torch.cat([spikes[..., 4:], spikes[..., :4]], -1)


class RealAndImaginary(Small):
    def between(self, spikes: Tensor) -> Tensor:
        return (torch.fft.fft(spikes) * torch.fft.fft(spikes.flip(-1))).real


@pytest.mark.parametrize(("network", "tried"), [(CutsTwice, False), (RealAndImaginary, True)])
def test_slices_are_looked_through_in_pairs_only_where_that_can_find_any(
    network: type[nn.Module], tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rewriter._DEFAULT_REWRITE_RULES
    during, optimize = [], torch.onnx.ONNXProgram.optimize

    def watched(program: torch.onnx.ONNXProgram) -> None:
        during.append({rule.name for rule in rewriter._DEFAULT_REWRITE_RULES})
        optimize(program)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", watched)
    model.build_graph(untested(network()), ExportConfig(T=3))
    assert during and all(("SlicesSplit" in names) == tried for names in during)
    assert all(names >= {rule.name for rule in known} - {"SlicesSplit"} for names in during)
    assert rewriter._DEFAULT_REWRITE_RULES is known


class Patches(nn.Module):
    """Patches of the image as tokens `[T, N, 16, 8]`, which those who inherit may arrange for the second neurons."""

    def __init__(self, seed: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encode = DirectEncoding(nn.Conv2d(1, 8, 2, stride=2))
            self.mix, self.readout = nn.Linear(8, 8), nn.Linear(8, 10)
        self.lif1, self.block = LIF(v_th=0.3), nn.Sequential(LIF(v_th=0.1))

    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens

    def back(self, spikes: Tensor, tokens: Tensor) -> Tensor:
        return spikes.reshape(tokens.shape)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        tokens = self.lif1(self.encode(x, T)).flatten(3).transpose(2, 3)
        return self.readout(self.back(self.block(self.mix(self.arranged(tokens))), tokens)).mean(2)


class AllMerged(Patches):
    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 2)


class MergedWithTheBatch(Patches):
    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, 2)


class BatchFirst(Patches):
    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(0, 1)

    def back(self, spikes: Tensor, tokens: Tensor) -> Tensor:
        return spikes.transpose(0, 1)


class TwoTokensFirst(Patches):
    """As many tokens as the check of the steps has images: an image by itself tells them apart."""

    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens[:, :, :2].transpose(1, 2)

    def back(self, spikes: Tensor, tokens: Tensor) -> Tensor:
        return spikes.transpose(1, 2)


class MergedBetweenNeurons(Patches):
    def arranged(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 2).relu().reshape(tokens.shape)


@pytest.mark.parametrize(("network", "shape", "layout"), [
    (AllMerged, r"\[32, 8\]", "unrolled"),
    (MergedWithTheBatch, r"\[1, 32, 8\]", "dynamic"),
    (BatchFirst, r"\[2, 1, 16, 8\]", "step"),
    (TwoTokensFirst, r"\[1, 2, 1, 8\]", "step"),
])  # fmt: skip
def test_neurons_without_an_axis_for_the_batch_are_named(
    network: type[nn.Module], shape: str, layout: str, earlier: Path
) -> None:
    config = ExportConfig(layout=layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"neurons 'block.0' get currents {shape}.*tokens or windows an axis"):
        export_model(classifier(network()), earlier, config, digits().images[:9], num_check=0)


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_tokens_may_be_merged_elsewhere(layout: str, tmp_path: Path) -> None:
    net, x = classifier(SideBySide(Patches, MergedBetweenNeurons)), digits().images[:40]
    made = export_model(net, tmp_path / "m.onnx", ExportConfig(layout=layout), x)  # type: ignore[arg-type]
    assert [n["shape"] for n in Engine(made.path).metadata["neurons"]] == [[8, 4, 4], [16, 8]] * 2
    assert made.parity is not None and made.parity.top1_agreement == 1


@pytest.mark.parametrize(("options", "match"), [
    ({"layout": "rolled"}, "unknown layout 'rolled'; choose one of unrolled, dynamic, step"),
    ({"encoding": "rate"}, "unknown encoding 'rate'; choose one of direct, frames"),
    ({"T": 0}, "T must be at least 1, got 0"),
    ({"T": 1025}, "T must be at most 1024, got 1025"),
    ({"T": 2.5}, r"T must be a whole number, got 2\.5"),
    ({"T": True}, "T must be a whole number, got True"),
    ({"trained_T": -1}, "trained_T must be at least 1, got -1"),
    ({"fold_bn": "no"}, "fold_bn must be True or False, got 'no'"),
    ({"with_state": np.True_}, f"with_state must be True or False, got {np.True_!r}"),
    ({"normalize": 0}, "normalize must be True or False, got 0"),
    ({"layout": "step", "with_state": True}, "goes with --layout unrolled; a step graph always has its state"),
    ({"layout": "dynamic", "with_state": True}, "--with-state goes with --layout unrolled; a dynamic graph runs any T"),
])  # fmt: skip
def test_refused_options(options: Options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ExportConfig(**options)


@pytest.mark.parametrize(("options", "make", "match"), [
    ({}, lambda x: x[:0], r"images must be \[N, C, H, W\] and some, got \[0, 1, 8, 8\]"),
    ({}, torch.from_numpy, "images must be a NumPy array, got Tensor"),
    ({}, lambda x: x[0], r"images must be \[N, C, H, W\]"),
    ({"encoding": "frames"}, lambda x: x, r"images must be \[N, T, C, H, W\]"),
    ({}, lambda x: x[..., :7], r"the network takes images \(1, 8, 8\), got \(1, 8, 7\)"),
    ({}, lambda x: x.astype(np.float32), "images must be uint8, got float32"),
    ({"normalize": False}, lambda x: x.astype(np.float64), "finite float32 .* got float64$"),
    ({"normalize": False}, lambda x: x.astype(np.float32) * np.nan, "got float32 with NaN or infinite values"),
    ({"encoding": "frames", "T": 5}, lambda x: frames(9, 4), "T=5 steps are checked on as many frames, got 4"),
])  # fmt: skip
def test_refused_images(options: Options, make: Any, match: str, earlier: Path) -> None:
    with pytest.raises(ValueError, match=match):
        export_model(convsnn(), earlier, ExportConfig(**options), make(digits().images[:9]))


@pytest.mark.parametrize(("make", "match"), [
    (lambda y: y[:8], "every image needs a label: 9 images, 8 labels"),
    (lambda y: y + 50, r"labels run from \d+ to \d+, but the network has 10 classes"),
    (lambda y: -y - 1, r"labels run from -\d+ to -\d+, but the network has 10 classes"),
    (lambda y: y.astype(np.float64), r"labels must be a NumPy array of whole numbers \[N\].*, got float64 \[9\]"),
    (lambda y: np.eye(10, dtype=np.int64)[y], r"labels must be .* whole numbers \[N\].*, got int64 \[9, 10\]"),
    (lambda y: y.tolist(), r"labels must be a NumPy array .*, got list$"),
])  # fmt: skip
def test_refused_labels(make: Any, match: str, earlier: Path) -> None:
    images, labels = digits().images[:9], make(digits().labels[:9])
    with pytest.raises(ValueError, match=match):
        export_model(convsnn(), earlier, ExportConfig(), images, labels=labels)


def test_a_bare_network_and_one_in_float64_are_refused(earlier: Path) -> None:
    with pytest.raises(ValueError, match="classifier must be a Classifier, got ConvSNN; a network becomes one"):
        export_model(convsnn().network, earlier, ExportConfig(), digits().images[:9])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"must be in float32, .* got {dtype}; call classifier\.float\(\)"):
            export_model(copy.deepcopy(convsnn()).to(dtype), earlier, ExportConfig(), digits().images[:9])
        other = copy.deepcopy(convsnn())
        other.network.to(dtype)
        with pytest.raises(ValueError, match=rf"must be in float32, .* got {dtype}; call classifier\.float\(\)"):
            export_model(other, earlier, ExportConfig(), digits().images[:9])
    with pytest.raises(ValueError, match="config must be of type ExportConfig, got dict"):
        export_model(convsnn(), earlier, {}, digits().images[:9])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^source\.data must be an object, got 'mine'$"):
        export_model(convsnn(), earlier, ExportConfig(), digits().images[:9], source={"data": "mine"})


class PartlyInFloat64(Small):
    def __init__(self) -> None:
        super().__init__()
        self.layer2.double()

    def forward(self, x: Tensor, T: int) -> Tensor:
        spikes = self.lif(self.current(x, T))
        return self.readout(self.lif(self.layer2(spikes.flatten(2).double())).float())


def test_neurons_in_float64_are_refused(earlier: Path) -> None:
    with pytest.raises(ValueError, match=r"it has parameters in torch\.float64, call classifier\.float\(\)"):
        export_model(classifier(PartlyInFloat64()), earlier, ExportConfig(T=4), digits().images[:9])


def test_refused_calibration_and_counts(earlier: Path) -> None:
    images, labels = digits().images[:9], digits().labels[:9] + 50
    with pytest.raises(ValueError, match=r"labels run from \d+ to \d+, but the network has 10 classes"):
        export_model(convsnn(), earlier, ExportConfig(precision="int8"), images, calibration=(images, labels))
    for count, wanted in ((-1, "0 or more, got -1"), (True, "a whole number, got True"), (2.5, "a whole number")):
        with pytest.raises(ValueError, match=f"num_check must be {wanted}"):
            export_model(convsnn(), earlier, ExportConfig(), images, num_check=count)  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "match"), [
    ({"ann": True}, r"is an ANN twin: it has no neurons .* train without --ann to export"),
    ({"smooth_spike": 20.0}, r"trained with smooth spikes, Sigmoid\(20 x\)"),
])  # fmt: skip
def test_networks_without_spikes_are_refused(changes: dict[str, Any], match: str, earlier: Path) -> None:
    config = NetworkConfig("convsnn", 10, 1, (8, 8), width=0.1, **changes)
    names = tuple("0123456789")
    classifier = Classifier(build_network(config), config=config, mean=(0.5,), std=(0.5,), class_names=names)
    with pytest.raises(ValueError, match=match):
        export_model(classifier, earlier, ExportConfig(), digits().images[:9])


def test_images_of_ones_own_are_not_split(tmp_path: Path) -> None:
    """They are no training set; one of a class has no part to hold out."""
    data = tmp_path / "mine.npz"
    np.savez(data, images=digits().images[:2], labels=np.arange(2))
    known = {"name": "digits", "class_names": list("0123456789")}
    trained = Trained(tmp_path, {"data": known, "training": {"val_fraction": 0.1}}, "")
    (x, labels), _ = trained.images(str(data), tmp_path, "direct", num_check=9, num_calibration=0)
    np.testing.assert_array_equal(x, digits().images[:2])
    assert labels.tolist() == [0, 1]


def test_images_to_check_and_to_calibrate_on_keep_their_labels(tmp_path: Path) -> None:
    data, pixels = tmp_path / "mine.npz", np.arange(100, dtype=np.uint8)
    np.savez(data, images=np.tile(pixels[:, None, None], (1, 8, 8)), labels=pixels % 10)
    known = {"name": str(data), "class_names": list("0123456789")}
    trained = Trained(tmp_path, {"data": known, "training": {"val_fraction": 0.2}}, "")
    checked, others = trained.images(None, tmp_path, "direct", num_check=30, num_calibration=40)
    train, val = load_parts(str(data), data_dir=tmp_path, fraction=0.2)
    assert val is not None and others is not None
    np.testing.assert_array_equal(checked[0], np.concatenate([val.x[:], train.x[:10]]))  # held out first
    np.testing.assert_array_equal(others[0], train.x[-40:])
    for x, labels in (checked, others):
        np.testing.assert_array_equal(x[:, 0, 0, 0] % 10, labels)


def test_frames_may_be_fewer_than_the_training_had(tmp_path: Path) -> None:
    x = frames(20, 2)
    made = export_convsnn(tmp_path / "m.onnx", ExportConfig("dynamic", encoding="frames"), x)
    assert made.parity is not None and made.parity.T == 2
    with np.load(reference_path(made.path)) as reference:
        assert reference["per_step"].shape == (20, 2, 10) and reference["spike_counts"].shape == (20, 2, 3)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*m\.onnx: .*; choose another output folder"):
        export_convsnn(tmp_path / "file" / "m.onnx", ExportConfig(T=4), digits().images[:9])
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match=r"cannot write .*: Permission denied; choose another output folder"):
        export_convsnn(tmp_path / "m.onnx", ExportConfig(T=4), digits().images[:9])
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [partial(torch.autocast, "cpu", torch.bfloat16), torch.no_grad, torch.inference_mode])
def test_a_callers_modes_are_not_in_the_graph(mode: Callable[[], AbstractContextManager[Any]], tmp_path: Path) -> None:
    config, images = ExportConfig(T=2), digits().images[:9]
    export_model(classifier(Small()), tmp_path / "alone.onnx", config, images)
    with mode():
        export_model(classifier(Small()), tmp_path / "within.onnx", config, images)
    one, other = (Engine(tmp_path / f"{name}.onnx").run(images).per_step for name in ("alone", "within"))
    np.testing.assert_array_equal(one, other)


def test_pytorch_answers_in_float32_on_a_gpu_too(tmp_path: Path) -> None:
    """In TF32, convolutions' default there, 994 of a million neuron-steps of this network differ, and it is refused."""
    cudnn: Any = torch.backends.cudnn
    allowed, seen = cudnn.allow_tf32, list[bool]()

    def note(*_: Any) -> None:  # torch.export itself turns "ieee" into "none", which is not TF32 either
        seen.append(cudnn.allow_tf32 or cudnn.conv.fp32_precision == "tf32")

    try:
        cudnn.allow_tf32 = True
        export_convsnn(tmp_path / "m.onnx", ExportConfig(T=4), digits().images[:9], progress=note)
        assert seen and not any(seen) and cudnn.allow_tf32 and cudnn.conv.fp32_precision == "tf32"
    finally:
        cudnn.allow_tf32 = allowed


def test_the_same_network_again_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"

    def export(**options: Any) -> bytes:
        export_model(convsnn(), path, ExportConfig("step", **options), digits().images[:9])
        return path.read_bytes()

    with shared_traces():
        export()
    proto = onnx.load(path)
    (entry,) = proto.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"created": "2026-01-02T03:04:05+00:00"})
    onnx.save(proto, path)
    earlier = path.read_bytes()
    assert export() == earlier  # of another trace
    with shared_traces():
        assert b"2026-01-02T03:04:05" not in export(fold_bn=False)
        path.write_bytes(earlier[:-1])
        assert b"2026-01-02T03:04:05" not in export()


def test_file_names() -> None:
    names = [
        ExportConfig(T=6).file_name,
        ExportConfig(T=6, with_state=True).file_name,
        ExportConfig("dynamic").file_name,
        ExportConfig("step").file_name,
    ]
    assert names == ["model-T6.onnx", "model-T6-state.onnx", "model-dynamic.onnx", "model-step.onnx"]
    assert reference_path(Path("runs/x/model-T6.onnx")) == Path("runs/x/model-T6.reference.npz")
    assert dataclasses.replace(ExportConfig(), layout="dynamic").steps is None


class OnlyNeurons(nn.Module):
    """Layers with neurons of different (tau, v_th) side by side, each on the five pixels that are its own."""

    def __init__(self, parameters: list[tuple[float, float]]) -> None:
        super().__init__()
        self.lif = nn.ModuleList(LIF(tau=tau, v_th=v_th) for tau, v_th in parameters)
        self.readout = nn.Linear(5 * len(parameters), 10)

    def spikes(self, frames: Tensor) -> list[Tensor]:
        pixels = frames.flatten(2)
        return [lif(pixels[..., 5 * k : 5 * k + 5]) for k, lif in enumerate(self.lif)]

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(torch.cat(self.spikes(x if T is None else x.expand(T, *x.shape)), -1))
        return logits


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_neurons_fire_as_pytorchs_do_next_to_the_threshold(layout: str, tmp_path: Path) -> None:
    """Currents from a few floats below v_th to a few above, and what fires at a later step."""
    T, rng = 6, np.random.default_rng(0)
    parameters = [*itertools.product((0.5, 0.3, 1.0), (1.0, 0.7, 3e-5, 3e25))]
    x = np.zeros((200, T, 1, 8, 8), np.float32)
    for k, (tau, v_th) in enumerate(parameters):
        near = np.float32(v_th) + np.arange(-3, 4) * np.spacing(np.float32(v_th))
        currents = np.concatenate([near, near * (1 - tau), [0, v_th / 2, -v_th, 5 * v_th]]).astype(np.float32)
        x.reshape(200, T, 64)[..., 5 * k : 5 * k + 5] = rng.choice(currents, (200, T, 5))
    network = OnlyNeurons(parameters)
    config = ExportConfig(layout, T=T, encoding="frames", normalize=False)  # type: ignore[arg-type]
    names = [f"lif.{k}" for k in range(len(parameters))]
    _, found = unchecked(network, tmp_path / "m.onnx", config).run_with(spikes_overlay(names), x, T)
    wanted = network.spikes(torch.from_numpy(x).transpose(0, 1))
    for name, spikes, (tau, v_th) in zip(names, wanted, parameters, strict=True):
        assert 0.1 < spikes.mean() < 0.9
        np.testing.assert_array_equal(found[f"spikes.{name}"], spikes.numpy(), err_msg=f"{tau=}, {v_th=}")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_the_arithmetic_for_a_cpu_gives_the_bits_of_the_plain_one(layout: str, precision: str) -> None:
    make = int8_exported if precision == "int8" else exported
    options = {"T": 3} if (layout, precision) == ("unrolled", "fp32") else {}
    x = digits().images[:40]
    answers = [Engine(make(layout, target=target, **options), threads=1).run(x, 3) for target in ("cpu", "openvino")]
    np.testing.assert_array_equal(answers[0].per_step, answers[1].per_step)


class Sums(nn.Module):
    """Sums of currents and spikes: two neuron layers and a convolution read one, neurons one of repeated steps, and
    neurons alone the spikes of one."""

    def __init__(self, tau: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.conv, self.down = (OverTime(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2))
        self.lif, self.lif2 = LIF(tau=tau, v_th=0.3), LIF(tau=tau, v_th=0.2)
        self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        a = self.lif(self.one(x).expand(T, -1, -1, -1, -1) + self.other(x).expand(T, -1, -1, -1, -1))
        total = self.conv(a) + a
        b = self.lif2(self.lif2(total) + a)
        logits: torch.Tensor = self.readout(self.lif(total) + b + self.lif2(self.down(total)))
        return logits


@cache
def sums(tau: float) -> Classifier:
    return classifier(Sums(tau))


@pytest.mark.parametrize(("tau", "precision"), [(0.0, "fp32"), (0.3, "fp32"), (0.5, "fp32"), (0.5, "int8")])
def test_sums_before_neurons_for_a_cpu(tau: float, precision: str, tmp_path: Path) -> None:
    """They fire as PyTorch's, and each sum of the network is counted once a step, however often the graph takes it."""
    images, labels = digits().images[:40], digits().labels[:40]
    bills = []
    for target in ("cpu", "openvino"):
        config = ExportConfig(T=3, trained_T=3, precision=precision, target=target)  # type: ignore[arg-type]
        with shared_traces():
            made = export_model(
                sums(tau), tmp_path / "m.onnx", config, images, num_check=40, calibration=(images, labels)
            )
        assert made.parity is not None and made.parity.spike_mismatch_rate == 0.0
        metadata = Engine(made.path, threads=1).metadata
        assert sum(metadata["other_ops"]["residual_adds"].values()) == 5 * 256
        bills.append([metadata[name] for name in ("layers", "other_ops", "uncounted")])
    assert bills[0] == bills[1]


@pytest.mark.parametrize("layout", ["unrolled", "dynamic"])
def test_layers_read_sums_without_a_reshape(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with shared_traces():
        unchecked(sums(0.5), path, ExportConfig(layout, T=3, target="openvino"))  # type: ignore[arg-type]
    nodes = onnx.load(path).graph.node
    producer = {name: node for node in nodes for name in node.output}
    read = [producer[node.input[0]].op_type for node in nodes if node.op_type == "Conv" and node.input[0] in producer]
    assert "Add" in read


class ReadTwice(nn.Module):
    """A sum of spikes that a convolution reads, and then neurons themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.skip = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.between, self.readout = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(384, 10)
        self.lif1, self.lif2, self.lif3, self.lif4 = LIF(v_th=0.4), LIF(v_th=0.3), LIF(v_th=0.7), LIF(v_th=0.5)

    def forward(self, x: Tensor, T: int) -> Tensor:
        one, other = (layer(x).unsqueeze(0).repeat(T, 1, 1, 1, 1) for layer in (self.encode, self.skip))
        total = self.lif1(one) + self.lif2(other)
        current = self.between(total.flatten(0, 1)).unflatten(0, (T, -1))
        logits: Tensor = self.readout((self.lif3(total) + self.lif4(current)).flatten(2))
        return logits


def test_nodes_stand_behind_what_they_read(tmp_path: Path) -> None:
    unchecked(ReadTwice(), tmp_path / "m.onnx", ExportConfig(T=3))
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


class SumOfTurned(nn.Module):
    """A sum whose first two axes, which become one, are the channels and the steps: the batch is not behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lif = OverTime(nn.Conv2d(1, 4, 3, padding=1)), LIF(tau=0.5, v_th=0.3)
        self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        spikes = self.lif(self.conv(x.expand(T, -1, -1, -1, -1))).permute(2, 0, 1, 3, 4)
        total = (spikes + spikes).flatten(0, 1).relu().unflatten(0, spikes.shape[:2])
        logits: torch.Tensor = self.readout(total.permute(1, 2, 0, 3, 4))
        return logits


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
@needs_torch_2_13
def test_sums_of_turned_spikes(layout: str, tmp_path: Path) -> None:
    config = ExportConfig(layout, T=3, trained_T=3)  # type: ignore[arg-type]
    made = export_model(classifier(SumOfTurned()), tmp_path / "m.onnx", config, digits().images[:40], num_check=40)
    assert made.parity is not None and made.parity.spike_mismatch_rate == 0.0


class TwoAlike(nn.Module):
    """Two layers of equal neurons that read one current, as the two branches of a block that begins with neurons."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.main, self.down = (nn.Conv2d(size, 4, 3, padding=1) for size in (1, 4, 4))
        self.lif, self.lif_main, self.lif_down = LIF(v_th=0.3), LIF(), LIF()
        self.readout = OverTime(nn.Flatten(), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        current = 3 * OverTime(self.main)(self.lif(self.encode(x).expand(T, -1, -1, -1, -1)))
        branches = self.lif_main(current) + OverTime(self.down)(self.lif_down(current))
        logits: torch.Tensor = self.readout(branches)
        return logits


@pytest.mark.parametrize("fold_bn", [True, False])
@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_layers_of_equal_neurons_may_read_one_current(layout: str, fold_bn: bool, tmp_path: Path) -> None:
    config = ExportConfig(layout, T=3, trained_T=3, fold_bn=fold_bn)  # type: ignore[arg-type]
    made = export_model(classifier(TwoAlike()), tmp_path / "m.onnx", config, digits().images[:40], num_check=40)
    assert made.parity is not None and made.parity.spike_mismatch_rate == 0.0
    neurons = Engine(made.path, threads=1).metadata["neurons"]
    assert [neuron["name"] for neuron in neurons] == ["lif", "lif_main", "lif_down"]
