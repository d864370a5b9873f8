"""From spikes to operations to picojoules. Needs no torch.

One operation is one input value that reaches one output value of a convolution or linear layer; at borders and with
strides a value reaches fewer outputs, and the count is exact. What an operation costs depends on its input:

- **accumulate** (AC): the input is a spike, so its weight is just added. Only spikes that fired count.
- **multiply-accumulate** (MAC): the input is not binary. In the first layer, which sees the image, every value counts,
  zero or not; further in (behind average pooling, say) only nonzero values do.

Two bills, both per image:

- `energy_pj`, the paper's: the first layer multiplies, at every step; all other layers only add.
- `energy_exact_pj`: every layer whose input is not binary multiplies.

Energies are for 32-bit float operations in 45 nm CMOS: 0.9 pJ an addition, 4.6 pJ a multiply-accumulate
(Horowitz, ISSCC 2014; Rathi & Roy, 2020, whom the TET paper follows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

AC_PJ = 0.9
MAC_PJ = 4.6


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, as the operation count sees it.

    Attributes:
        input_shape: one image's input, `(C, *spatial)`, or `(features,)` for a linear layer.
        outputs: output channels that one input value reaches at one position (output channels / groups).
        kernel, strides, pads, dilations: of a convolution, per spatial axis; `pads` is (begin, end) per axis.
        from_input: no neurons lie between the network's input and this layer: the paper's first layer.
        binary: the layer's input is spikes, 0 or 1.
        positions: how often the layer is applied to one image in one step, as a linear layer is to tokens.
    """

    name: str
    input_shape: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilations: tuple[int, ...] = ()
    from_input: bool = False
    binary: bool = True
    positions: int = 1

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Layer:
        """The inverse of `to_dict`, from JSON (whose tuples are lists)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        fields["pads"] = tuple((int(begin), int(end)) for begin, end in value["pads"])
        return Layer(**fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def counter(self) -> str:
        """The output of the counting graph with this layer's nonzero inputs, `[T, N, *positions, *spatial]`."""
        return f"active.{self.name}"

    def fan_out(self) -> NDArray[np.int64]:
        """How many outputs an input value reaches, by its position: `[*spatial]`, a scalar for a linear layer."""
        axes = zip(self.input_shape[1:], self.kernel, self.strides, self.pads, self.dilations, strict=True)
        fan_out = np.array(self.outputs, dtype=np.int64)
        for axis in axes if self.kernel else ():
            fan_out = np.multiply.outer(fan_out, axis_fan_out(*axis))
        return fan_out

    def dense_ops(self) -> int:
        """Operations for one image and one step if every input counts."""
        return int(self.positions * self.input_shape[0] * self.fan_out().sum())


def axis_fan_out(size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int) -> NDArray[np.int64]:
    """Along one axis, how many output positions each of the `size` input positions reaches: `[size]`."""
    num_outputs = (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
    taps = np.arange(num_outputs)[:, None] * stride - pads[0] + np.arange(kernel) * dilation
    return np.bincount(taps[(taps >= 0) & (taps < size)], minlength=size).astype(np.int64)


@dataclass
class Operations:
    """Operations summed over images, by layer and step; `counts[layer][t]` for step t + 1."""

    layers: tuple[Layer, ...]
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    num_images: int = 0

    def add(self, active: Mapping[str, NDArray[Any]], num_images: int, T: int) -> None:
        """Add a batch: `active[layer.counter]` holds nonzero inputs, `[T, N, *positions, *spatial]`."""
        self.num_images += num_images
        for layer in self.layers:
            if layer.from_input:
                ops = np.full(T, float(layer.dense_ops() * num_images))
            else:
                spatial = layer.fan_out()
                values = active[layer.counter].astype(np.float64)
                ops = (values.reshape(T, -1, *spatial.shape) * spatial).reshape(T, -1).sum(1)
            self.counts[layer.name] = self.counts.get(layer.name, 0.0) + ops

    def at(self, T: int) -> OperationCount:
        """Operations per image for the first T steps."""
        count = OperationCount(0.0, 0.0, 0.0)
        for layer in self.layers:
            ops = float(self.counts[layer.name][:T].sum()) / self.num_images
            count = count.plus(layer, ops)
        return count


@dataclass(frozen=True)
class OperationCount:
    """Operations per image, split as in the paper; the inputs of `analogue_ac_ops` of the `ac_ops` are not binary."""

    ac_ops: float
    mac_ops: float
    analogue_ac_ops: float

    def plus(self, layer: Layer, ops: float) -> OperationCount:
        if layer.from_input:
            return OperationCount(self.ac_ops, self.mac_ops + ops, self.analogue_ac_ops)
        return OperationCount(self.ac_ops + ops, self.mac_ops, self.analogue_ac_ops + (0.0 if layer.binary else ops))

    @property
    def energy_pj(self) -> float:
        """The paper's bill, in pJ an image."""
        return self.ac_ops * AC_PJ + self.mac_ops * MAC_PJ

    @property
    def energy_exact_pj(self) -> float:
        """Every layer with a non-binary input multiplies, in pJ an image."""
        return (self.ac_ops - self.analogue_ac_ops) * AC_PJ + (self.mac_ops + self.analogue_ac_ops) * MAC_PJ
