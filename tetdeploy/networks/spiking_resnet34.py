"""Spiking-ResNet-34 for ImageNet: ResNet-34 with tdBN, and LIF neurons wherever it has a ReLU.

Stem conv7x7 stride 2, LIF, max pooling 3x3 stride 2; stages 64 x3, 128 x4, 256 x6, 512 x3; global average pooling and
one linear layer, which integrates with no neurons behind it. The layers and the residual block are those of He et al.,
CVPR 2016; tdBN and the place of the neurons (the last one of a block behind its sum) those of Zheng et al., AAAI 2021.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.fused_bn import fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import ResidualBlock, check_image_size, conv_bn, residual_stages, scaled
from tetdeploy.neurons import LIF


class SpikingResNet34(nn.Module):
    """Maps images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to logits `[T, N, num_classes]`.

    `width` scales every channel count; 1.0 is the paper's network, with 21.8 M parameters at 1,000 classes. Max pooling
    comes after the first neurons: the largest of binary spikes is a spike, so that the layer behind it only adds.
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
        check_image_size("spiking-resnet34", image_size, minimum=32)
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        stages = scaled((64, 128, 256, 512), width)
        self.encode = DirectEncoding(*conv_bn(in_channels, stages[0], 7, stride=2, v_th=v_th))
        self.lif1 = LIF(**neuron)
        self.pool = OverTime(nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks = residual_stages(ResidualBlock, stages[0], stages, (3, 4, 6, 3), **neuron)
        self.readout = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stages[-1], num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.pool(fire_encoded(self.lif1, self.encode, x, T))
        logits: Tensor = self.readout(self.blocks(spikes))
        return logits
