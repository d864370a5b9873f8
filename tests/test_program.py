"""A folded network becomes the program that torch.onnx translates, or is traced once more: the graph is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from export_helpers import classifier, digits, unchecked
from torch import Tensor, nn
from zoo_helpers import MODELS, for_export

from tetdeploy.data import Encoding
from tetdeploy.export import ExportConfig, onnx_tracer, program
from tetdeploy.export.onnx_tracer import OnnxTracer
from tetdeploy.int8.quantisation import CurrentScale, Scales, quantise, spiking_convolutions
from tetdeploy.layers import OverTime
from tetdeploy.neurons import LIF
from tetdeploy.tracing import Tracer


class _Everything(nn.Module):
    """Every operation that needs no second trace, as blocks of networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.pooled = OverTime(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AvgPool2d(2))
        self.same = OverTime(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.line, self.space = nn.Conv1d(8, 8, 1), nn.Conv3d(8, 8, 1)
        self.pool1, self.pool3 = nn.MaxPool1d(2, 1), nn.MaxPool3d(1)
        self.tokens = nn.Linear(8, 8)
        self.readout = nn.Linear(8, 10)
        self.lif = nn.ModuleList(LIF(v_th=v_th) for v_th in (1.0, 0.5, 0.75, 0.5, 0.75))

    def forward(self, x: Tensor, T: int) -> Tensor:
        x = self.encode(x)
        x = torch.stack([x, 0.5 * x.repeat(1, 1, 1, 1)]).sum(0)
        s = self.lif[0](x.unsqueeze(0).expand(T, *x.shape))  # [T, N, 4, 8, 8]
        s = self.lif[1](self.pooled(s))  # [T, N, 8, 2, 2]
        s = self.lif[2](self.same(s) + s)
        early, late = s.split(4, 2)
        s = torch.cat([s[:, :, :4], late.flip(3), early], 2)[:, :, 4:].flatten(3).clone()  # [T, N, 8, 4]
        channels = self.pool1(self.line(s.flatten(0, 1))).mean(2).view(T, -1, 8)
        cells = self.pool3(self.space(s.reshape(T * s.shape[1], 8, 1, 2, 2))).amax((2, 3, 4)).unflatten(0, s.shape[:2])
        tokens = self.tokens(s.mT).permute(0, 1, 3, 2)  # [T, N, 8, 4]
        tokens = tokens + s @ (tokens.mT @ s).softmax(3)
        s = self.lif[3](tokens + (channels * 0.5 - cells / 2).unsqueeze(3))
        mean = nn.functional.adaptive_avg_pool2d(s.unflatten(3, (2, 2)).flatten(0, 1), 1).flatten(1)
        larger = nn.functional.interpolate(mean.unflatten(1, (2, 2, 2)), scale_factor=2.0).unbind(3)[0]  # [TN, 2, 4]
        s = s.select(3, 0).to(torch.float32) + larger.flatten(1).unflatten(0, s.shape[:2])
        s = self.lif[4](s.unsqueeze(3).squeeze(3))
        return self.readout(s.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class _Elsewhere(nn.Module):
    """The others of them, as networks of one's own have them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.wide = OverTime(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
        self.norm, self.drop, self.readout = nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(64, 10)
        self.lif = nn.ModuleList(LIF(v_th=v_th) for v_th in (0.5, 0.25, 0.5))

    def forward(self, x: Tensor, T: int) -> Tensor:
        s = self.lif[0](0.75 * self.encode(x).expand(T, -1, -1, -1, -1))  # [T, N, 4, 8, 8]
        a, b = self.wide(s).chunk(2, 2)
        a = self.drop(a.sigmoid() + b.tanh() * nn.functional.gelu(a) - nn.functional.silu(b).neg())
        b = nn.functional.leaky_relu(b).abs().sqrt() + nn.functional.hardtanh(b).exp() ** 2
        b = torch.maximum(a, b.clamp(0.0, 1.0)).minimum(b.clip(max=2.0))
        residual = a * b
        residual += s
        residual *= torch.where(s > 0, s, s.flip(3)) + (s >= 0.5) * s
        s = self.lif[1](nn.functional.relu_(residual - 0.1))
        x = nn.functional.pixel_unshuffle(nn.functional.pixel_shuffle(s.flatten(0, 1), 2), 2).view_as(s)
        x = torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], 2).flatten(3).reshape_as(s)
        early, late = (1 - x).roll(1, 4).split([1, 3], 2)
        x = torch.cat([late.swapaxes(3, 4), early.expand_as(late).movedim((3, 4), (4, 3))], 2)[:, :, 1:5].contiguous()
        x = self.norm(x.swapdims(3, 4).movedim(2, 2))
        large = nn.functional.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="bilinear")
        x = torch.einsum("tnchw,tncwk->tnchk", x, large[:, :, :8, :8].unflatten(0, s.shape[:2]))
        x = torch.bmm(x.flatten(0, 2), s.flatten(0, 2)).unflatten(0, s.shape[:3])
        return self.readout(self.lif[2](x)[:, :, 0].flatten(2))  # type: ignore[no-any-return]


class _Awkward(nn.Module):
    """Parameters of like names, of no axis, used twice, and of another type than what they meet; frames."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.Module(), nn.Module()
        self.a.b_c = nn.Parameter(torch.rand(4, 1, 1))
        self.a_b.c = nn.Parameter(torch.rand(4, 1, 1))
        self.x = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("levels", torch.arange(4, dtype=torch.uint8).view(4, 1, 1), persistent=False)
        self.conv = OverTime(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.lif, self.readout = LIF(), nn.Linear(256, 10)

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        frames = x if T is None else x.expand(T, *x.shape)
        current = self.conv(frames) * self.a.b_c + self.a_b.c * self.x.flatten() + self.levels * self.a.b_c
        s = self.lif(current)[..., ::2].mT
        return self.readout(s.reshape(*s.shape[:2], 128).repeat(1, 1, 2))  # type: ignore[no-any-return]


class _Swapped(nn.Module):
    """One operation that is not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.readout = LIF(), nn.Linear(64, 10)

    def forward(self, x: Tensor, T: int) -> Tensor:
        return self.readout(self.lif(x.expand(T, *x.shape)).cumsum(4).flatten(2))  # type: ignore[no-any-return]


class _Between(nn.Module):
    """Something of one's own between a layer, which gives a view, and the neurons: of `(current, spikes, T)`."""

    def __init__(self, between: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.encode, self.conv = nn.Conv2d(1, 4, 3, padding=1), OverTime(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.lif, self.readout, self.between = nn.ModuleList([LIF(v_th=0.3), LIF()]), nn.Linear(256, 10), between

    def forward(self, x: Tensor, T: int) -> Tensor:
        s = self.lif[0](self.encode(x).expand(T, -1, -1, -1, -1))
        return self.readout(self.lif[1](self.between(self.conv(s), s, T)).flatten(2))  # type: ignore[no-any-return]


def _content(model: ir.Model) -> list[Any]:
    """All that a runtime reads of a graph, but for the names of its values."""

    def value(of: ir.Value | None) -> Any:
        if of is None:
            return None
        constant = None if of.const_value is None else of.const_value.numpy().tolist()
        return of.producer() and nodes.index(of.producer()), str(of.shape), of.dtype, constant

    nodes = list(model.graph)
    return [
        (
            node.op_type,
            onnx_tracer.is_of_network(node) and onnx_tracer.module_name(node),
            [*map(value, node.inputs)],
            [*map(value, node.outputs)],
            sorted((key, str(attribute.value)) for key, attribute in node.attributes.items()),
        )
        for node in nodes
    ]


def _scales(tracer: Tracer, T: int | None, step: bool) -> Scales:
    return {name: CurrentScale(0.02, 100) for name in spiking_convolutions(tracer.folded(T, step=step)).values()}


@pytest.mark.parametrize(
    ("network", "precision", "T", "step"),
    [
        (_Everything, "fp32", None, False),
        (_Everything, "int8", 3, False),
        (_Everything, "fp16", 1, True),
        (_Elsewhere, "fp32", None, False),
        (_Awkward, "fp32", 2, False),
    ],
)
def test_the_graph_is_that_of_a_network_traced_once_more(
    network: type[nn.Module], precision: str, T: int | None, step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding: Encoding = "frames" if network is _Awkward else "direct"
    tracer = Tracer(classifier(network()), encoding=encoding, uint8=True)
    int8 = _scales(tracer, T, step) if precision == "int8" else None

    def graph() -> list[Any]:
        half = precision == "fp16"
        return _content(OnnxTracer(tracer, fold_bn=True, half=half).graph(T, step=step, int8=int8)[0])

    with monkeypatch.context() as patch:
        patch.setattr(onnx_tracer, "_exported_again", lambda *_: pytest.fail("traced once more"))
        once = graph()
    monkeypatch.setattr(onnx_tracer, "as_program", lambda *_: None)
    assert graph() == once
    assert "Conv" in {node[0] for node in once}


def test_rules_that_are_tried_where_they_fit_leave_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer(classifier(_Everything()), encoding="direct", uint8=True)
    fitting = _content(OnnxTracer(tracer, fold_bn=True).graph(3, step=False)[0])
    monkeypatch.setattr(onnx_tracer, "_where_it_fits", lambda rule: rule)
    assert _content(OnnxTracer(tracer, fold_bn=True).graph(3, step=False)[0]) == fitting


def test_those_networks_have_every_operation() -> None:
    found = set()
    for network, T in ((_Everything(), 3), (_Everything(), None), (_Elsewhere(), 3)):
        tracer = Tracer(classifier(network), encoding="direct", uint8=True)
        folded = tracer.folded(T)
        scales = dict(list(_scales(tracer, T, step=False).items())[:1])
        quantise(folded, scales)
        found |= {node.target for node in folded.graph.nodes}
    assert found >= program._TRANSLATED | program._WRITTEN_OTHERWISE


@pytest.mark.parametrize("model", MODELS)
def test_built_in_networks_are_traced_once(model: str) -> None:
    tracer = Tracer(for_export(model), encoding="direct", uint8=True)
    assert program.as_program(tracer.folded(2), tracer.program(2)) is not None


def test_a_network_with_other_operations_is_left_as_it_is() -> None:
    tracer = Tracer(classifier(_Swapped()), encoding="direct", uint8=True)
    folded = tracer.folded(2)
    before = str(folded.graph)
    assert program.as_program(folded, tracer.program(2)) is None
    assert str(folded.graph) == before


def _seen_by_a_view(current: Tensor, spikes: Tensor, T: int) -> Tensor:
    other = current.flatten(3)
    current += spikes
    current *= 1.5
    return current + other.unflatten(3, (8, 8))


def _dropped(current: Tensor, spikes: Tensor, T: int) -> Tensor:
    return nn.functional.dropout(current, training=False).relu_() + current


ONE_VALUE = torch.__version__ >= "2.14"  # before, the trace has what dropout reads beside what it gives


@pytest.mark.parametrize(
    ("config", "between", "written_elsewhere"),
    [
        (ExportConfig(T=3), lambda x, s, T: x.add_(s).mul_(1.5), True),
        (ExportConfig(T=3), lambda x, s, T: x.transpose(3, 4).add_(s)[:, :, :4].relu_(), True),
        (ExportConfig(T=3), lambda x, s, T: x.chunk(2, 2)[0].add_(s[:, :, :2]).repeat(1, 1, 2, 1, 1) + x, False),
        (ExportConfig(T=3), _seen_by_a_view, False),
        (ExportConfig(T=3), lambda x, s, T: x.add_(s.double()).mul_(1.5), False),
        (ExportConfig(T=3), _dropped, ONE_VALUE),
        (ExportConfig(T=3, fold_bn=False), _dropped, ONE_VALUE),
        (ExportConfig(layout="dynamic"), lambda x, s, T: x.mul_(T), False),
    ],
    ids=["alone", "views", "part", "seen", "type", "dropout", "dropout-no-fold", "by-T"],
)
def test_what_is_written_over_is_written_elsewhere_only_if_nothing_else_sees_it_nor_types_differ(
    config: ExportConfig,
    between: Callable[[Tensor, Tensor, int], Tensor],
    written_elsewhere: bool,
    tmp_path: Path,
) -> None:
    net, x = classifier(_Between(between)), digits().images[:9]
    tracer = Tracer(net, encoding="direct", uint8=True)
    once = program.as_program(tracer.folded(config.steps), tracer.program(config.steps))
    assert (once is not None) == written_elsewhere
    with torch.no_grad():
        expected = net(torch.from_numpy(x), 3).transpose(0, 1)
    engine = unchecked(net, tmp_path / "m.onnx", config)
    torch.testing.assert_close(torch.from_numpy(engine.run(x, 3).per_step), expected)


def test_a_bound_that_is_a_number_of_steps_is_refused_beside_a_fraction(tmp_path: Path) -> None:
    net = _Between(lambda x, s, T: x.clamp(-0.5, T))
    with pytest.raises(ValueError, match="cannot export an operation of the network"):
        unchecked(net, tmp_path / "m.onnx", ExportConfig(layout="dynamic"))
