"""The built-in networks, narrow and lively, for several test files; each is traced once a session for all of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx_ir as ir
import torch
from export_helpers import shared_traces
from torch import nn

from tetdeploy.export import ExportConfig
from tetdeploy.export.model import build_graph
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.neurons import LIF

# (channels, image side) a network is made for, and the smallest side it takes
SIZES = {
    "convsnn": (3, 32, 4),
    "resnet19": (3, 32, 4),
    "vggsnn": (2, 48, 16),
    "vggsnn-strided": (2, 48, 8),
    "spiking-resnet34": (3, 224, 32),
    "sew-resnet34": (3, 224, 32),
}
MODELS = tuple(SIZES)


def config_of(model: str, **options: Any) -> NetworkConfig:
    """A narrow network with 5 classes, for the smallest images it takes unless told otherwise."""
    channels, _, smallest = SIZES[model]
    settings = {"num_classes": 5, "in_channels": channels, "image_size": (smallest, smallest), "width": 0.125}
    return NetworkConfig(model, **(settings | options))


def lively(network: nn.Module, *shape: int) -> nn.Module:
    """The network in eval mode, initialised so that every layer's neurons fire, as they do after training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over all batches
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(8, *shape), 3 if any(isinstance(m, LIF) for m in network.modules()) else 1)
    return network.eval()


def classifier_of(model: str, **options: Any) -> Classifier:
    config = config_of(model, **options)
    network = lively(build_network(config), config.in_channels, *config.image_size)
    channels = config.in_channels
    names = tuple("abcde")
    return Classifier(network, config=config, mean=(0.5,) * channels, std=(0.25,) * channels, class_names=names)


@cache
def for_export(model: str) -> Classifier:
    """Twice as wide, and of 8x8 images where it takes smaller ones: convolutions as ONNX Runtime likes them."""
    side = max(8, SIZES[model][2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classifier_of(model, image_size=(side, side), width=0.25)


@cache
def graph_of(model: str, config: ExportConfig) -> bytes:
    """The graph of `for_export(model)`, which no gate has seen."""
    with shared_traces():
        graph, *_ = build_graph(for_export(model), config)
    made: bytes = ir.to_proto(graph.model).SerializeToString()
    return made
