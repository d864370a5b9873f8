"""Convolutions step by step in a graph for a CPU: where they are, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import classifier, digits
from torch import Tensor, nn

from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, by_step, export_model
from tetdeploy.export.counters import spikes_overlay
from tetdeploy.export.model import build_graph
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import ResidualBlock
from tetdeploy.neurons import LIF

T = 4


class Wide(nn.Module):
    """Few channels: a convolution puts out more than it has weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            neuron = {"tau": 0.5, "v_th": 1.0, "gamma": 1.0}
            self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
            self.lif = LIF()
            self.blocks = nn.Sequential(self.block(4, 4, 1, neuron), self.block(4, 6, 2, neuron))
            self.pooled = OverTime(nn.MaxPool2d(2), nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
            self.lif3 = LIF()
            self.readout = OverTime(nn.Flatten(), nn.Linear(24, 10))

    @staticmethod
    def block(inside: int, outside: int, stride: int, neuron: dict[str, float]) -> ResidualBlock:
        return ResidualBlock(inside, outside, stride=stride, **neuron)

    def forward(self, x: Tensor, T: int) -> Tensor:
        logits: Tensor = self.readout(self.lif3(self.pooled(self.blocks(self.lif(self.encode(x, T))))))
        return logits


class Averaged(Wide):
    """One convolution reads averages, which are no spikes, and so does another."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled[0] = nn.AvgPool2d(2)


def convolutions(engine: Engine) -> list[int]:
    """How often the graph has each convolution: by its weights, whose order is that of the layers."""
    nodes = onnx.load_from_string(engine._bytes).graph.node
    return list(Counter(node.input[1] for node in nodes if node.op_type == "Conv").values())


def built(network: nn.Module, path: Path, **options: Any) -> Engine:
    made = build_graph(classifier(network), replace(ExportConfig(T=T), **options))
    path.write_bytes(ir.to_proto(made.model).SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return Engine(path, threads=1)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("network", [Wide, Averaged])
def test_all_but_speed_is_as_for_all_steps_together(network: type[nn.Module], with_state: bool, tmp_path: Path) -> None:
    apart = built(network(), tmp_path / "apart.onnx", with_state=with_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_step, "_MIN_OUTPUTS", float("inf"))
        whole = built(network(), tmp_path / "whole.onnx", with_state=with_state)
    assert convolutions(whole) == [1] * 7
    assert convolutions(apart) == [1, T, T, 1, 1, 1, T]
    x = digits().images[:5]
    overlay = spikes_overlay([layer["name"] for layer in whole.metadata["neurons"]])
    for ask in (lambda e: e.run_with(overlay, x, T), lambda e: e.count(x, T)):
        expected, values = ask(whole)
        result, found = ask(apart)
        np.testing.assert_allclose(result.per_step, expected.per_step, rtol=0, atol=1e-5)
        assert found.keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            assert value.any(), name
    np.testing.assert_array_equal(apart.run(x, T).per_step, apart.count(x, T)[0].per_step)
    for key in ("layers", "uncounted", "other_ops", "counting_overlay"):
        assert apart.metadata[key] == whole.metadata[key]


@pytest.mark.parametrize(
    ("least", "expected"), [(0.25, [1, T, T, T, T, T, T]), (0.5, [1, T, T, 1, 1, 1, T]), (1.0, [1, T, T, 1, 1, 1, 1])]
)
def test_many_weights_are_read_once(
    least: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 256, 256, 96, 96, 96 and 24 values by 144, 144, 216, 324, 24 and 36 weights; a shortcut goes with its sum."""
    monkeypatch.setattr(by_step, "_MIN_OUTPUTS", least)
    assert convolutions(built(Wide(), tmp_path / "m.onnx")) == expected


class Chunks(Wide):
    """A network's own Split, of channels: it is none into steps, though it may make as many parts."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = OverTime(Halves(), nn.MaxPool2d(2), nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return first.maximum(second)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_split_of_the_network_itself_stays_one(steps: int, tmp_path: Path) -> None:
    network = classifier(Chunks())
    made = export_model(network, tmp_path / "m.onnx", ExportConfig(T=steps), digits().images[:40])
    assert made.parity is not None and made.parity.local_mismatch_rate == 0.0
    splits = [node for node in onnx.load(made.path).graph.node if node.op_type == "Split"]
    assert [len(node.output) for node in splits].count(2) >= 1


def test_other_graphs_stay_whole(tmp_path: Path) -> None:
    for k, options in enumerate(
        ({"target": "openvino"}, {"T": 1}, {"layout": "step"}, {"layout": "dynamic"}, {"target": "cuda"})
    ):
        assert set(convolutions(built(Wide(), tmp_path / f"{k}.onnx", **options))) == {1}


def test_a_graph_without_such_values_has_no_overlay_for_them(tmp_path: Path) -> None:
    assert built(Wide(), tmp_path / "whole.onnx", target="openvino").metadata["joined_overlay"] == ""
    apart = built(Wide(), tmp_path / "apart.onnx").metadata["joined_overlay"]
    assert apart
