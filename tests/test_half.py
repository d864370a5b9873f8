"""Layers in float16: which, what rounds, and that the graph computes what PyTorch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import classifier, convsnn, digits, frames
from torch import Tensor, nn

from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, export_model, half
from tetdeploy.export.half import HalfError, HalfNetwork, halve, placed_layers
from tetdeploy.export.model import Exported
from tetdeploy.export.parity import ParityError
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.neurons import LIF
from tetdeploy.tracing import Tracer
from tetdeploy.validate import sweep


def export(path: Path, layout: str = "unrolled", network: Any = None, **options: Any) -> Exported:
    config = ExportConfig(layout=layout, T=3, trained_T=3, precision="fp16", target="cuda", **options)  # type: ignore[arg-type]
    images = digits().images[:90] if config.encoding == "direct" else frames(60, 5)
    return export_model(network or convsnn(), path, config, images, num_check=90)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("unrolled", {}), ("dynamic", {}), ("step", {}), ("unrolled", {"with_state": True, "encoding": "frames"})],
)
def test_every_layout_computes_what_pytorch_computes(tmp_path: Path, layout: str, options: dict[str, Any]) -> None:
    exported = export(tmp_path / "m.onnx", layout, **options)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    metadata = Engine(exported.path).metadata
    assert (metadata["precision"], metadata["target"]) == ("fp16", "cuda")
    assert [layer["precision"] for layer in metadata["layers"]] == ["fp32", "fp16", "fp16", "fp32"]


def test_weights_halve_and_operations_stay_and_cost_less(tmp_path: Path) -> None:
    exported = export(tmp_path / "m.onnx")
    graph = onnx.load(exported.path).graph
    halves = [weight for weight in graph.initializer if weight.data_type == onnx.TensorProto.FLOAT16]
    assert sorted(len(weight.dims) for weight in halves) == [1, 1, 4, 4]
    engine = Engine(exported.path, threads=1)
    measured = sweep(engine, digits().images[:40], digits().labels[:40], (3,), num_timed=1)
    row, layers = measured.rows[0], measured.details["layers"]
    bill = sum(
        layer["rows"][0]["ac_ops"] * {"fp16": 0.4, "fp32": 0.9}[layer["precision"]]
        + layer["rows"][0]["mac_ops"] * 4.6 * (layer["precision"] == "fp32")
        for layer in layers
    )
    assert row.energy_pj == pytest.approx(bill) and row.ac_ops > 0


def test_the_gate_sees_a_network_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "placed_layers", lambda module: [])
    monkeypatch.setattr("tetdeploy.export.graph.halve", lambda module: halve(module, placed_layers(module)[1:3]))
    with pytest.raises(ParityError, match="does not compute what PyTorch computes"):
        export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_rounding_the_currents_is_one_rounding_more() -> None:
    x = torch.from_numpy(digits().images[:40])
    plain = convsnn()(x, 3)
    tracer = Tracer(convsnn(), encoding="direct", uint8=True)
    made = [HalfNetwork(tracer, round_currents=rounds) for rounds in (False, True)]
    kept, rounded = (network(x, 3) for network in made)
    assert not torch.equal(kept, plain) and not torch.equal(kept, rounded)
    assert np.mean((rounded.mean(0).argmax(-1) == plain.mean(0).argmax(-1)).numpy()) > 0.9


class Linear(nn.Module):
    """A linear layer between neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.lif1 = DirectEncoding(nn.Conv2d(1, 4, 3)), LIF()
        self.hidden, self.lif2 = OverTime(nn.Flatten(), nn.Linear(4 * 36, 32)), LIF()
        self.readout = OverTime(nn.Linear(32, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.lif2(self.hidden(self.lif1(self.encode(x, T)))))
        return logits


def test_a_linear_layer_between_neurons(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = classifier(Linear())
    module = Tracer(network, encoding="direct", uint8=True).folded(2)
    assert [(layer.name, layer.place) for layer in placed_layers(module)] == [
        ("encode.0", "first"), ("hidden.1", "inner"), ("readout.0", "readout"),
    ]  # fmt: skip
    exported = export(tmp_path / "m.onnx", network=network)
    assert exported.parity is not None and exported.parity.spike_mismatch_rate <= 1e-4
    assert [layer["precision"] for layer in Engine(exported.path).metadata["layers"]] == ["fp32", "fp16", "fp32"]


def test_what_float16_cannot_hold_or_has_no_layer_for() -> None:
    torch.manual_seed(3)
    network = classifier(Linear())
    with torch.no_grad():
        network.network.hidden[1].weight[0] = 1000.0
    with pytest.raises(HalfError, match=r"currents of hidden\.1 may reach 1\.44e\+05 and float16 ends at 65504"):
        halve(Tracer(network, encoding="direct", uint8=True).folded(2))
    with pytest.raises(HalfError, match="no layer of the network lies between neurons"):
        halve(torch.fx.symbolic_trace(nn.Linear(2, 2)))
