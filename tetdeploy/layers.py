"""Layers round the neurons: torch layers over time, tdBN, direct encoding.

Inside a network time is axis 0: `[T, N, C, H, W]`. Torch's layers know a batch but no time, so T and N are merged for
them; only neurons (and tdBN's statistics) look across time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from tetdeploy.arguments import check_number

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Layer(nn.Sequential):
    """Torch layers in a row, which `fused_bn` may compute together with the neurons behind them."""

    recomputes = False

    def within(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run(x)`, which computes these layers and more. `train.recompute`, whose layers say so by `recomputes`, keeps
        less of it for backward."""
        return run(x)


class OverTime(Layer):
    """Torch layers applied to every step: `[T, N, ...]` -> `[T, N, ...]`, as one batch of T x N.

    A convolution in it runs once on the merged batch, not T times.
    """

    def forward(self, x: Tensor) -> Tensor:
        if _only_flatten(self, x.dim() - 1):
            return _flattened(x, self)  # torch.export cannot trace a merge and a split with no operation between
        y = super().forward(x.flatten(0, 1))  # type: ignore[no-untyped-call]
        return _split_time(y, x)


class tdBN(nn.BatchNorm2d):
    """Threshold-dependent batch normalisation (Zheng et al., AAAI 2021): statistics over time and batch together.

    Takes `[T, N, C, H, W]`, or `[T * N, C, H, W]` inside `OverTime`. The affine weight starts at `alpha * v_th`, so
    that currents start with a standard deviation in proportion to the threshold. In inference it folds into the
    convolution before it (Eq. 6).

    Raises:
        ValueError: `v_th` is not a finite number above 0, or `alpha` is not a finite number of at least 0.
    """

    def __init__(self, num_features: int, *, v_th: float = 1.0, alpha: float = 1.0, **options: Any) -> None:
        if not 0.0 < check_number("v_th", v_th) < math.inf:
            raise ValueError(f"v_th must be above 0 and finite; got {v_th}")
        if not 0.0 <= check_number("alpha", alpha) < math.inf:
            raise ValueError(f"alpha must be at least 0 and finite; got {alpha}")
        super().__init__(num_features, **options)
        if self.affine:
            nn.init.constant_(self.weight, alpha * v_th)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return _split_time(super().forward(x.flatten(0, 1)), x)
        return super().forward(x)


class DirectEncoding(Layer):
    """The layers before the first neurons: images `[N, C, H, W]` or frames `[T, N, C, H, W]` to currents `[T, N, ...]`.

    Direct encoding shows the same image at each of the T steps, so its current is computed once and repeated (a view).
    """

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        """Currents of the first neurons.

        Raises:
            ValueError: images without T or with one that is not whole, frames with another T than theirs, or neither
                images nor frames.
        """
        if x.dim() == 5:
            if T is not None and x.shape[0] != T:
                raise ValueError(f"frames [T, N, C, H, W] hold T={x.shape[0]} steps, but T={T} was asked for")
            merged = x.flatten(0, 1)
            frames = super().forward(merged)  # type: ignore[no-untyped-call]
            return x if frames is merged else _split_time(frames, x)  # torch.export cannot trace a split of the input
        if x.dim() != 4:
            raise ValueError(f"input must be images [N, C, H, W] or frames [T, N, C, H, W], got shape {list(x.shape)}")
        if T is None:
            raise ValueError("images [N, C, H, W] need a number of time steps: net(images, T=4)")
        # Where the exporter leaves T open it is no int; where torch.compile does, nobody may ask for its attributes.
        if isinstance(T, bool) or not (isinstance(T, int) or hasattr(T, "__index__")):  # type: ignore[unreachable]
            raise ValueError(f"T must be a whole number, got {T!r}")
        if isinstance(T, int) and T < 1:
            raise ValueError(f"T must be at least 1, got {T}")
        current: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return current.unsqueeze(0).expand(T, *current.shape)


def _flattened(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """What layers that flatten or do nothing make of `[T, N, ...]`, axis 1 being axis 0 to them."""
    for layer in layers:
        if type(layer) is nn.Flatten:
            x = x.flatten(*(axis + (axis >= 0) for axis in (layer.start_dim, layer.end_dim)))
    return x


def _only_flatten(layers: Iterable[nn.Module], ndim: int) -> bool:
    """Whether layers only flatten axes of single images, of a batch with so many axes, or do nothing."""
    for layer in layers:
        if _does_nothing(layer):
            continue
        if type(layer) is not nn.Flatten or has_hooks(layer):
            return False
        start, end = (axis if axis >= 0 else ndim + axis for axis in (layer.start_dim, layer.end_dim))
        if start <= 0:
            return False
        ndim -= end - start
    return True


def _does_nothing(layer: nn.Module) -> bool:
    """Whether it returns what it gets: dropout in inference. A class of the user's own may do more."""
    return (type(layer) is nn.Identity or (type(layer) in _DROPOUT and not layer.training)) and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of it, or gradients through it, call something else as well."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _split_time(y: Tensor, x: Tensor) -> Tensor:
    """`[T * N, ...]` as `[T, N, ...]`, T and N being those of `x`."""
    split: Tensor = y.unflatten(0, x.shape[:2])
    return split
