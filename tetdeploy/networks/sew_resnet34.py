"""SEW-ResNet-34 for ImageNet (Fang et al., NeurIPS 2021): IF neurons, and residual blocks that add spikes to spikes.

In a spike-element-wise block the neurons fire before the sum, in the shortcut as well::

    out = IF(BN(conv(IF(BN(conv(x)))))) + x          (or + IF(BN(conv1x1(x))) where the shape changes)

so a block that never fires is an exact identity. The sum is a small integer and no longer binary: the convolution
behind it multiplies, which the exact energy bills. Stem, stages and readout are those of Spiking-ResNet-34.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.fused_bn import FiringSequential, fire, fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import check_image_size, conv_bn, residual_stages, scaled
from tetdeploy.neurons import IF


class SEWBlock(nn.Module):
    """Whole numbers `[T, N, in_channels, H, W]` -> whole numbers `[T, N, channels, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, v_th: float, gamma: float) -> None:
        super().__init__()
        self.layer1 = OverTime(*conv_bn(in_channels, channels, 3, stride=stride, v_th=v_th))
        self.if1 = IF(v_th=v_th, gamma=gamma)
        self.layer2 = OverTime(*conv_bn(channels, channels, 3, v_th=v_th))
        self.if2 = IF(v_th=v_th, gamma=gamma)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            layer = OverTime(*conv_bn(in_channels, channels, 1, stride=stride, v_th=v_th))
            self.shortcut = FiringSequential(layer, IF(v_th=v_th, gamma=gamma))

    def forward(self, x: Tensor) -> Tensor:
        spikes = fire(self.if2, self.layer2, fire(self.if1, self.layer1, x))  # if2(layer2(if1(layer1(x))))
        total: Tensor = spikes + self.shortcut(x)
        return total


class SEWResNet34(nn.Module):
    """Maps images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to logits `[T, N, num_classes]`.

    `width` scales every channel count; 1.0 is the paper's network, with 21.8 M parameters at 1,000 classes. `tau` is
    there because every network takes it and plays no part: IF neurons do not leak, whatever it is.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        width: float = 1.0,
        tau: float = 1.0,
        v_th: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        check_image_size("sew-resnet34", image_size, minimum=32)
        neuron = {"v_th": v_th, "gamma": gamma}
        stages = scaled((64, 128, 256, 512), width)
        self.encode = DirectEncoding(*conv_bn(in_channels, stages[0], 7, stride=2, v_th=v_th))
        self.if1 = IF(**neuron)
        self.pool = OverTime(nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks = residual_stages(SEWBlock, stages[0], stages, (3, 4, 6, 3), **neuron)
        self.readout = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stages[-1], num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.pool(fire_encoded(self.if1, self.encode, x, T))
        logits: Tensor = self.readout(self.blocks(spikes))
        return logits
