"""A small convolutional SNN for 8x8 to 64x64 images: conv-tdBN-LIF three times, max pooling between, a linear readout.

Max pooling keeps spikes binary, so that every layer behind the first only adds.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.fused_bn import fire, fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks.blocks import check_image_size, conv_bn, scaled
from tetdeploy.neurons import LIF


class ConvSNN(nn.Module):
    """Channels 32, 64, 64 times `width`; the readout integrates with no leak and no firing.

    Maps images `[N, C, H, W]` with T, or frames `[T, N, C, H, W]`, to logits `[T, N, num_classes]`.
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
        check_image_size("convsnn", image_size, minimum=4)
        a, b, c = scaled((32, 64, 64), width)
        neuron = {"tau": tau, "v_th": v_th, "gamma": gamma}
        self.encode = DirectEncoding(*conv_bn(in_channels, a, 3, v_th=v_th))
        self.lif1 = LIF(**neuron)
        self.layer2 = OverTime(*conv_bn(a, b, 3, v_th=v_th))
        self.lif2 = LIF(**neuron)
        self.layer3 = OverTime(nn.MaxPool2d(2), *conv_bn(b, c, 3, v_th=v_th))
        self.lif3 = LIF(**neuron)
        features = c * (image_size[0] // 4) * (image_size[1] // 4)
        self.readout = OverTime(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(features, num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = fire_encoded(self.lif1, self.encode, x, T)  # lif1(encode(x, T))
        spikes = fire(self.lif2, self.layer2, spikes)  # lif2(layer2(spikes))
        spikes = fire(self.lif3, self.layer3, spikes)
        logits: Tensor = self.readout(spikes)
        return logits
