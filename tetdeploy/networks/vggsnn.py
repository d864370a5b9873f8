"""VGGSNN of the TET paper for DVS-CIFAR10: eight conv3x3-tdBN-LIF in pairs, each pair halving the image.

Channels 64, 128 | 256, 256 | 512, 512 | 512, 512, then one linear layer, which integrates with no neurons behind it.
A pair halves the image by 2x2 average pooling of its spikes or, strided, by stride 2 in its second convolution.
Average pooling makes spikes quarters: the layer behind it multiplies, which the exact energy bills; without pooling
every layer behind the first only adds.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.arguments import check_flag
from tetdeploy.fused_bn import FiringSequential, fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import check_image_size, conv_bn, scaled
from tetdeploy.neurons import LIF


class VGGSNN(nn.Module):
    """Maps images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to logits `[T, N, num_classes]`.

    The convolutions have a bias in front of BN, where it changes nothing: the authors' have, and so theirs import.

    Args:
        strided: stride 2 in the second convolution of each pair instead of average pooling behind it.
        width: scales every channel count; 1.0 is the paper's network (48x48 pixels, 2 polarities).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        strided: bool = False,
        width: float = 1.0,
        tau: float = 0.5,
        v_th: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        check_flag("strided", strided)
        check_image_size("vggsnn-strided" if strided else "vggsnn", image_size, minimum=8 if strided else 16)
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        channels = scaled((64, 128, 256, 256, 512, 512, 512, 512), width)
        self.encode = DirectEncoding(*conv_bn(in_channels, channels[0], 3, bias=True, v_th=v_th))
        self.lif1 = LIF(**neuron)
        layers: list[nn.Module] = []
        for k in range(1, len(channels)):
            halves = k % 2 == 1
            stride = 2 if strided and halves else 1
            conv = conv_bn(channels[k - 1], channels[k], 3, stride=stride, bias=True, v_th=v_th)
            layers += [OverTime(*conv), LIF(**neuron)]
            if halves and not strided:
                layers.append(OverTime(nn.AvgPool2d(2)))
        self.layers = FiringSequential(*layers)
        rows, columns = (_last_side(size, up=strided) for size in image_size)
        self.readout = OverTime(nn.Flatten(), nn.Linear(channels[-1] * rows * columns, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as the authors' start; BN hides the scale, but not from Adam's steps
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.layers(fire_encoded(self.lif1, self.encode, x, T)))
        return logits


def _last_side(size: int, *, up: bool) -> int:
    """A side after all four halvings: a padded convolution of stride 2 rounds up, pooling rounds down."""
    for _ in range(4):
        size = (size + up) // 2
    return size
