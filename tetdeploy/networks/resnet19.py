"""ResNet-19 of the TET paper: stem 64, stages 128 x3, 256 x3, 512 x2, then two linear layers with LIF between.

A residual block is conv-tdBN-LIF-conv-tdBN, plus the identity or conv1x1-tdBN, then LIF.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.neurons import LIF


class ResidualBlock(nn.Module):
    """Spikes `[T, N, in_channels, H, W]` -> spikes `[T, N, channels, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, v_th: float, tau: float, gamma: float) -> None:
        super().__init__()
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        self.layer1 = OverTime(
            nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False), tdBN(channels, v_th=v_th)
        )
        self.lif1 = LIF(**neuron)
        self.layer2 = OverTime(nn.Conv2d(channels, channels, 3, padding=1, bias=False), tdBN(channels, v_th=v_th))
        self.lif2 = LIF(**neuron)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = OverTime(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), tdBN(channels, v_th=v_th)
            )

    def forward(self, x: Tensor) -> Tensor:
        current = self.layer2(self.lif1(self.layer1(x))) + self.shortcut(x)
        spikes: Tensor = self.lif2(current)
        return spikes


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
        if min(image_size) < 4:
            raise ValueError(f"resnet19 needs images of at least 4x4 pixels, got {image_size[0]}x{image_size[1]}")
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        stem, *stages, hidden = (max(1, round(channels * width)) for channels in (64, 128, 256, 512, 256))
        self.encode = DirectEncoding(nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), tdBN(stem, v_th=v_th))
        self.lif1 = LIF(**neuron)
        blocks: list[nn.Module] = []
        channels = stem
        for stage, (out_channels, num_blocks) in enumerate(zip(stages, (3, 3, 2), strict=True)):
            for block in range(num_blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                blocks.append(ResidualBlock(channels, out_channels, stride=stride, **neuron))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.fc1 = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, hidden))
        self.lif2 = LIF(**neuron)
        self.fc2 = OverTime(nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.blocks(self.lif1(self.encode(x, T)))
        logits: Tensor = self.fc2(self.lif2(self.fc1(spikes)))
        return logits
