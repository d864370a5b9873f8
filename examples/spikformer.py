"""Spikformer, a spiking transformer (Zhou et al., ICLR 2023), through the whole path. From this folder:

    tetdeploy train --model spikformer:spikformer_2_64 --out runs/spikformer
    tetdeploy export runs/spikformer --model spikformer:spikformer_2_64 --layout dynamic --fold-bn
    tetdeploy sweep runs/spikformer/model-dynamic.onnx --T 1:8 --layers

`spikformer_4_384` is the paper's network for CIFAR-10 (9.3 M parameters): `--data cifar10 --device cuda`.

Images become tokens by convolutions; in each block tokens attend to one another, then pass two layers of their own.
Queries, keys and values are spikes, so that attention needs no softmax, and the sweep counts in its products the pairs
of spikes that meet. The layers of tokens are 1x1 convolutions, which `--precision int8` computes in 8 bits, unlike
linear layers. From the paper differ tdBN in place of BN, and neurons whose currents are not halved, as in TET.
"""

from __future__ import annotations

from torch import Tensor, nn

from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.neurons import LIF


def conv_lif(inputs: int, outputs: int, kernel: int, *, pool: bool = False) -> nn.Sequential:
    layer = OverTime(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), tdBN(outputs))
    return nn.Sequential(layer, LIF(), *([OverTime(nn.MaxPool2d(3, stride=2, padding=1))] if pool else []))


class SelfAttention(nn.Module):
    """Of spikes or sums of some `[T, N, C, H, W]`, each pixel a token."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (conv_lif(channels, channels, 1) for _ in range(4))
        self.attended = LIF(v_th=0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._by_heads(layer(x)) for layer in (self.query, self.key, self.value))
        # Whole numbers, whichever product is first; this order takes less where tokens are more than a head's channels.
        mixed = q @ (k.mT @ v) * 0.125
        spikes: Tensor = self.project(self.attended(mixed.mT.reshape(x.shape)))
        return spikes

    def _by_heads(self, spikes: Tensor) -> Tensor:
        """`[T, N, heads, tokens, channels of a head]`."""
        return spikes.flatten(3).unflatten(2, (self.heads, -1)).mT


class Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(channels, heads)
        self.mlp = nn.Sequential(conv_lif(channels, 4 * channels, 1), conv_lif(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        mixed: Tensor = x + self.mlp(x)
        return mixed


class Spikformer(nn.Module):
    """Images `[N, C, H, W]` to logits `[T, N, K]`; tokens are `H / 4 * W / 4`."""

    def __init__(self, num_classes: int, in_channels: int, *, channels: int, heads: int, depth: int) -> None:
        super().__init__()
        first = channels // 8
        self.encode = DirectEncoding(nn.Conv2d(in_channels, first, 3, padding=1, bias=False), tdBN(first))
        self.fire = LIF()
        self.tokens = nn.Sequential(
            conv_lif(first, 2 * first, 3),
            conv_lif(2 * first, 4 * first, 3, pool=True),
            conv_lif(4 * first, channels, 3, pool=True),
        )
        self.position = conv_lif(channels, channels, 3)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(depth)))
        self.readout = OverTime(nn.Linear(channels, num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        tokens = self.tokens(self.fire(self.encode(x, T)))
        tokens = self.blocks(tokens + self.position(tokens))
        logits: Tensor = self.readout(tokens.mean((-2, -1)))
        return logits


def spikformer_2_64(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Two blocks of 64 channels, for the digits."""
    return Spikformer(num_classes, in_channels, channels=64, heads=4, depth=2)


def spikformer_4_384(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Four blocks of 384 channels, the paper's for CIFAR."""
    return Spikformer(num_classes, in_channels, channels=384, heads=12, depth=4)
