"""How near membranes lie to the threshold, of millions of neuron-steps, in little memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PER_OCTAVE = 16  # a median is within 1/32 of an octave, about 2 %
_LOWEST, _HIGHEST = -30, 10  # octaves: 1e-9 .. 1e3 of v_th; what lies outside counts as the ends


def margins(current: Tensor, spikes: Tensor, tau: float, v_th: float) -> Tensor:
    """|h - v_th| / v_th for every neuron-step, `[T, ...]`, h being the membrane before the reset (Eq. 1) from u = 0.

    Args:
        current, spikes: what went into the neurons and came out, `[T, ...]`.
    """
    return (membranes(current, spikes, tau) - v_th).abs_() / v_th


def membranes(current: Tensor, spikes: Tensor, tau: float, u: Tensor | None = None) -> Tensor:
    """h before the reset (Eq. 1) of every neuron-step, `[T, ...]`, from `u`, by default 0.

    Args:
        current, spikes: what went into the neurons, and the spikes that reset them, `[T, ...]`.
    """
    h = torch.empty_like(current)
    u = torch.zeros_like(current[0]) if u is None else u
    for t in range(len(current)):
        h[t] = tau * u + current[t]
        u = h[t] - h[t] * spikes[t]  # Eq. 3
    return h


class Margins:
    """A logarithmic histogram of margins by layer; `arrays` and `restore` as in `Tally`.

    Attributes:
        counts: `[layers, bins]`.
        largest: exactly, `[layers]`.
    """

    def __init__(self, num_layers: int) -> None:
        self.counts = np.zeros((num_layers, (_HIGHEST - _LOWEST) * _PER_OCTAVE), np.int64)
        self.largest = np.zeros(num_layers)

    def add(self, layer: int, values: Tensor) -> None:
        """Add margins of one layer, of any shape."""
        if values.numel() == 0:
            return
        num_bins = self.counts.shape[1]
        bins = ((values.float().log2() - _LOWEST) * _PER_OCTAVE).clamp_(0, num_bins - 1).to(torch.int64)
        self.counts[layer] += torch.bincount(bins.flatten(), minlength=num_bins).cpu().numpy()
        self.largest[layer] = max(self.largest[layer], float(values.max()))

    def of(self, layer: int | None = None) -> dict[str, float | int | None]:
        """`count`, `median` (within 2 %) and `max` of a layer, or of all; null where there are none."""
        counts = self.counts.sum(0) if layer is None else self.counts[layer]
        count = int(counts.sum())
        if count == 0:
            return {"count": 0, "median": None, "max": None}
        middle = int(np.searchsorted(np.cumsum(counts), (count + 1) // 2))
        median = 2.0 ** (_LOWEST + (middle + 0.5) / _PER_OCTAVE) if middle else 0.0  # u = v_th, to the last bit
        largest = float(self.largest.max() if layer is None else self.largest[layer])
        return {"count": count, "median": min(median, largest), "max": largest}

    def histogram(self) -> list[int]:
        """Counts by octave over all layers: entry k holds margins of 2^(k - 30) to 2^(k - 29)."""
        octaves = self.counts.sum(0).reshape(-1, _PER_OCTAVE).sum(1)
        return [int(count) for count in octaves]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"counts": self.counts, "largest": self.largest}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.counts, self.largest = arrays["counts"].copy(), arrays["largest"].copy()
