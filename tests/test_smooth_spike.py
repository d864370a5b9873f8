"""Smooth spikes: the equations by hand, true gradients, the twin, and no export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tetdeploy.export import ExportConfig, export_model
from tetdeploy.networks import Classifier, NetworkConfig, build_network, smooth_twin
from tetdeploy.networks.smooth_spike import SmoothLIF
from tetdeploy.neurons import LIF


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def test_two_steps_by_hand() -> None:
    neurons = SmoothLIF(k=4.0, tau=0.25, v_th=0.75)
    values, u = neurons.with_state(torch.tensor([[1.25], [0.5]], dtype=torch.float64))
    a1 = sigmoid(4 * 0.5)
    h2 = 0.25 * 1.25 * (1 - a1) + 0.5
    a2 = sigmoid(4 * (h2 - 0.75))
    assert values.flatten().tolist() == pytest.approx([a1, a2])
    assert u.item() == pytest.approx(h2 * (1 - a2))


def test_gradients_are_those_of_the_function_itself() -> None:
    current = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SmoothLIF(k=3.0).with_state, (current, u))


def test_a_steep_sigmoid_is_the_heaviside_function() -> None:
    current = torch.randn(4, 100, dtype=torch.float64)
    assert torch.allclose(SmoothLIF(k=1e6, v_th=0.6)(current), LIF(v_th=0.6)(current))


def test_half_precision_currents_keep_their_dtype_and_a_float32_membrane() -> None:
    values, u = SmoothLIF(k=1.0).with_state(torch.randn(2, 3).bfloat16())
    assert (values.dtype, u.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("model", ["convsnn", "sew-resnet34"])
def test_the_twin_has_the_networks_parameters_and_neurons(model: str) -> None:
    config = NetworkConfig(model, 10, 1, (32, 32), width=0.1, tau=0.25, v_th=0.5)
    network = build_network(config)
    twin = build_network(NetworkConfig(**(vars(config) | {"smooth_spike": 10.0})))
    assert twin.state_dict().keys() == network.state_dict().keys()
    old = [m for m in network.modules() if isinstance(m, LIF)]
    new = [m for m in twin.modules() if isinstance(m, SmoothLIF)]
    assert [(m.tau, m.v_th, m.k) for m in new] == [(m.tau, m.v_th, 10.0) for m in old] and new
    assert not any(isinstance(m, SmoothLIF) for m in network.modules())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k must be above 0 and finite; got 0\.0"):
        SmoothLIF(k=0.0)
    with pytest.raises(ValueError, match="k must be a number, got '1'"):
        SmoothLIF(k="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no LIF or IF neurons to replace"):
        smooth_twin(nn.Linear(2, 2), k=1.0)
    with pytest.raises(ValueError, match=r"smooth_spike must be 0 \(off\) or a k above 0, got -1"):
        NetworkConfig("convsnn", 10, 1, (8, 8), smooth_spike=-1)
    with pytest.raises(ValueError, match="ann and smooth_spike exclude each other"):
        NetworkConfig("convsnn", 10, 1, (8, 8), ann=True, smooth_spike=1.0)
    config = NetworkConfig("convsnn", 2, 1, (8, 8), width=0.1, smooth_spike=20.0)
    classifier = Classifier(build_network(config), config=config, mean=(0.5,), std=(0.5,), class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"trained with smooth spikes, Sigmoid\(20 x\).*without --smooth-spike"):
        export_model(classifier, tmp_path / "m.onnx", ExportConfig(), np.zeros((4, 1, 8, 8), np.uint8))
    assert not any(tmp_path.iterdir())
