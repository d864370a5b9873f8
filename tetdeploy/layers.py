"""Layers round the neurons: torch layers over time, tdBN, direct encoding.

Inside a network time is axis 0: `[T, N, C, H, W]`. Torch's layers know a batch but no time, so T and N are merged for
them; only neurons (and tdBN's statistics) look across time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OverTime(nn.Sequential):
    """Torch layers applied to every step: `[T, N, ...]` -> `[T, N, ...]`, as one batch of T x N.

    A convolution in it runs once on the merged batch, not T times.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class tdBN(nn.BatchNorm2d):
    """Threshold-dependent batch normalisation (Zheng et al., AAAI 2021): statistics over time and batch together.

    Takes `[T, N, C, H, W]`, or `[T * N, C, H, W]` inside `OverTime`. The affine weight starts at `alpha * v_th`, so that
    currents start with a standard deviation in proportion to the threshold. In inference it folds into the convolution
    before it (Eq. 6).
    """

    def __init__(self, num_features: int, *, v_th: float = 1.0, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(num_features, **options)
        if self.affine:
            nn.init.constant_(self.weight, alpha * v_th)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return super().forward(x)


class DirectEncoding(nn.Sequential):
    """The layers before the first neurons: images `[N, C, H, W]` or frames `[T, N, C, H, W]` to currents `[T, N, ...]`.

    Direct encoding shows the same image at each of the T steps, so its current is computed once and repeated (a view).
    """

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Currents of the first neurons.

        Raises:
            ValueError: images without T, frames with another T than theirs, or neither images nor frames.
        """
        if x.dim() == 5:
            if T is not None and T != x.shape[0]:
                raise ValueError(f"frames [T, N, C, H, W] hold T={x.shape[0]} steps, but T={T} was asked for")
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if x.dim() != 4:
            raise ValueError(f"input must be images [N, C, H, W] or frames [T, N, C, H, W], got shape {list(x.shape)}")
        if T is None:
            raise ValueError("images [N, C, H, W] need a number of time steps: net(images, T=4)")
        torch._check(T >= 1, lambda: f"T must be at least 1, got {T}")
        current: Tensor = super().forward(x)
        return current.unsqueeze(0).expand(T, *current.shape)
