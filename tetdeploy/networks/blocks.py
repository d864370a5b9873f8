"""What the network files share: a convolution with its tdBN, the residual block, residual stages, widths and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional

from tetdeploy.fused_bn import fire, fire_sum
from tetdeploy.layers import OverTime, tdBN
from tetdeploy.neurons import LIF

RATE_RMS = 0.23  # over channels, of the firing rates that an image has behind tdBN at the start of training


def conv_bn(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, bias: bool = False, v_th: float = 1.0
) -> tuple[nn.Conv2d, tdBN]:
    """A convolution, padded by half its kernel, and the tdBN behind it: `[N, C, H, W]` -> `[N, channels, H/s, W/s]`."""
    kind = _SubsampledConv if kernel == 1 and stride > 1 and in_channels < 16 else nn.Conv2d
    conv = kind(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return conv, tdBN(channels, v_th=v_th)


class _SubsampledConv(nn.Conv2d):
    """A 1x1 convolution with a stride, which in training on a CPU takes the pixels first that it reads.

    oneDNN's backward pass of the whole writes beyond its workspace where fewer channels come in than a vector has
    numbers and activations lie channels-last: https://github.com/uxlfoundation/oneDNN/issues/6035
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        rows, columns = self.stride
        return functional.conv2d(x[..., ::rows, ::columns], self.weight, self.bias)


def firing_linear(in_features: int, features: int, *, v_th: float) -> nn.Linear:
    """A linear layer in front of neurons, without a BN between: its weights start so that the neurons fire.

    Their currents start with a standard deviation of v_th, as tdBN gives it, where the input is firing rates of
    `RATE_RMS`. By PyTorch's own initialisation it would be 0.13: then no neuron fires, the surrogate gradient (Eq. 5)
    is close to its zero as well, and hardly any gradient reaches what lies in front.
    """
    linear = nn.Linear(in_features, features)
    nn.init.normal_(linear.weight, std=v_th / (RATE_RMS * in_features**0.5))
    return linear


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Channel counts times `width`, rounded, at least one."""
    return [max(1, round(count * width)) for count in channels]


def check_image_size(model: str, image_size: tuple[int, int], *, minimum: int) -> None:
    """Refuse images of which nothing is left behind the network's strides and pools.

    Raises:
        ValueError: a side is shorter than `minimum` pixels.
    """
    if min(image_size) < minimum:
        raise ValueError(
            f"{model} needs images of at least {minimum}x{minimum} pixels, got {image_size[0]}x{image_size[1]}"
        )


class ResidualBlock(nn.Module):
    """conv3x3-tdBN-LIF-conv3x3-tdBN, plus the identity or conv1x1-tdBN where the shape changes, then LIF.

    Spikes `[T, N, in_channels, H, W]` -> spikes `[T, N, channels, H / stride, W / stride]`.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, tau: float, v_th: float, gamma: float) -> None:
        super().__init__()
        self.layer1 = OverTime(*conv_bn(in_channels, channels, 3, stride=stride, v_th=v_th))
        self.lif1 = LIF(tau=tau, v_th=v_th, gamma=gamma)
        self.layer2 = OverTime(*conv_bn(channels, channels, 3, v_th=v_th))
        self.lif2 = LIF(tau=tau, v_th=v_th, gamma=gamma)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = OverTime(*conv_bn(in_channels, channels, 1, stride=stride, v_th=v_th))

    def forward(self, x: Tensor) -> Tensor:
        spikes = fire(self.lif1, self.layer1, x)  # lif1(layer1(x))
        return fire_sum(self.lif2, self.layer2, spikes, self.shortcut, x)  # lif2(layer2(spikes) + shortcut(x))


def residual_stages(
    block: Callable[..., nn.Module],
    in_channels: int,
    channels: Sequence[int],
    num_blocks: Sequence[int],
    **neuron: float,
) -> nn.Sequential:
    """Stages of `num_blocks[k]` blocks with `channels[k]` each; every stage but the first halves the image.

    Args:
        block: called with (in_channels, channels, stride=..., **neuron).
    """
    blocks = []
    for stage, (out_channels, count) in enumerate(zip(channels, num_blocks, strict=True)):
        for k in range(count):
            stride = 2 if k == 0 and stage > 0 else 1
            blocks.append(block(in_channels, out_channels, stride=stride, **neuron))
            in_channels = out_channels
    return nn.Sequential(*blocks)
