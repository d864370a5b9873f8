"""ResNet-19 of the TET paper: stem 64, stages 128 x3, 256 x3, 512 x2, then two linear layers with LIF between.

A residual block is conv-tdBN-LIF-conv-tdBN, plus the identity or conv1x1-tdBN, then LIF.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.fused_bn import fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import (
    ResidualBlock,
    check_image_size,
    conv_bn,
    firing_linear,
    residual_stages,
    scaled,
)
from tetdeploy.neurons import LIF


class ResNet19(nn.Module):
    """Maps images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to logits `[T, N, num_classes]`.

    `width` scales every channel count and the 256 units of the first linear layer; 1.0 is the paper's network.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        width: float = 1.0,
        tau: float = 0.5,
        v_th: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        check_image_size("resnet19", image_size, minimum=4)
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        stem, *stages, hidden = scaled((64, 128, 256, 512, 256), width)
        self.encode = DirectEncoding(*conv_bn(in_channels, stem, 3, v_th=v_th))
        self.lif1 = LIF(**neuron)
        self.blocks = residual_stages(ResidualBlock, stem, stages, (3, 3, 2), **neuron)
        self.fc1 = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), firing_linear(stages[-1], hidden, v_th=v_th))
        self.lif2 = LIF(**neuron)
        self.fc2 = OverTime(nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.blocks(fire_encoded(self.lif1, self.encode, x, T))
        logits: Tensor = self.fc2(self.lif2(self.fc1(spikes)))
        return logits
