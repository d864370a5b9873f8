"""A network of your own through the whole path. From this folder:

    tetdeploy train --model own_network:my_network --out runs/own
    tetdeploy export runs/own --model own_network:my_network --T 6
    tetdeploy sweep runs/own/model-T6.onnx

`--model` is given to `export` again, as to all that takes up the weights (`train --resume`, `evaluate`, `validate
--against`), because no file can have code imported. Everything else is as for the built-in networks: BN folds, the
sweep counts what fired. `--width`, `--tau`, `--v-th` and `--gamma` alone are yours to decide.
What the network must keep to: images [N, C, H, W] with T, or frames [T, N, C, H, W], become logits [T, N, K], only the
neurons carry anything from one step to the next, nothing is computed across the batch (no x / x.max(), no BN without
running statistics: an image's answer must not depend on what is served with it), and the neurons' currents are
[T, N, ...]: tokens or windows have an axis of their own there, and are not merged into the batch.

This one has what the built-in networks lack: grouped and depthwise convolutions, two branches that are joined by
concatenation, a residual sum of spikes, and a neuron with its own leak.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.neurons import IF, LIF


class MyNetwork(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.encode = DirectEncoding(nn.Conv2d(in_channels, 32, 3, padding=1, bias=False), tdBN(32))
        self.lif1 = LIF()
        self.grouped = OverTime(nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), tdBN(32))
        self.lif_grouped = LIF(tau=0.75)
        self.dilated = OverTime(nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32, bias=False), tdBN(32))
        self.lif_dilated = IF()
        self.join = OverTime(nn.MaxPool2d(2), nn.Conv2d(64, 64, 1), tdBN(64))
        self.lif2 = LIF()
        pooled = (image_size[0] // 2) * (image_size[1] // 2)
        self.readout = OverTime(nn.Flatten(), nn.Linear(64 * pooled, num_classes))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        spikes = self.lif1(self.encode(x, T))
        branches = [self.lif_grouped(self.grouped(spikes)), self.lif_dilated(self.dilated(spikes))]
        residual = torch.cat(branches, dim=2) + torch.cat([spikes, spikes], dim=2)  # 0, 1 or 2 spikes: sums stay exact
        logits: Tensor = self.readout(self.lif2(self.join(residual)))
        return logits


def my_network(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """What `--model own_network:my_network` calls."""
    return MyNetwork(num_classes, in_channels, image_size)
