"""From spikes to operations to picojoules. Needs no torch.

One operation is one input value that reaches one output value of a convolution or linear layer; at borders and with
strides a value reaches fewer outputs, and the count is exact. Of a product of two activations (attention) it is a pair
of values that are multiplied. What an operation costs depends on its input:

- **accumulate** (AC): the input is a spike, so its weight is just added. Only spikes that fired count.
- **multiply-accumulate** (MAC): the input is not binary. In the first layer, which sees the image, every value counts,
  zero or not; further in (behind average pooling, say) only nonzero values do.

The literature bills them differently; `CONVENTIONS` names the three that are computed, each per image. Additions of
biases and residuals and the neurons' own arithmetic are in none of them: `neuron_ops` and the export's `other_ops`
count those apart. `docs/energy.md` has the formulas, an audit by hand, and how other tools count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.picojoules import EnergyConstants, energy_constants

_MOST_POSITIONS = 2**28  # of a layer, or of an axis times its kernel: as many numbers are in memory at once
CONVENTIONS = {
    "paper": "the first layer multiplies, at every step; all others only add (TET, and most papers)",
    "exact": "every layer whose input is not binary multiplies, so that average pooling counts",
    "once": "as paper, but a first layer that sees the same image at every step multiplies once: no more is needed",
}
OTHER_OPS = {
    "bias_adds": "an addition for every output of a layer with a bias",
    "residual_adds": "an addition for every value of a sum of two branches",
    "batch_norm_macs": "a multiplication and an addition, for BN that is not folded",
    "neuron_ops": "h = tau u + I, h > v_th, u = h - h s for every neuron",
}


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear layer or a product of activations, as the operation count sees it.

    Attributes:
        input_shape: one image's input, `(C, *spatial)`, or `(features,)` for a linear layer. A product of matrices
            `[M, K] @ [K, N]` reads `(M K N,)` pairs, of which those count whose numbers are both not zero.
        outputs: output channels that one input value reaches at one position (output channels / groups).
        kernel, strides, pads, dilations: of a convolution, per spatial axis; `pads` is (begin, end) per axis.
        from_input: no neurons lie between the network's input and this layer: the paper's first layer.
        binary: the layer's input is spikes, 0 or 1; of a product, that of one factor is.
        positions: how often the layer is applied to one image in one step, as a linear layer is to tokens.
        once: the layer has to be computed once for an image, not at every step: direct encoding's first layer. (A step
            graph for a GPU computes it at every step all the same.)
        precision: of its arithmetic, `fp32`, `fp16` or `int8`; it decides what an operation costs.
        product: it multiplies two activations, as attention does, and has no weights.
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
    once: bool = False
    precision: str = "fp32"
    product: bool = False

    def __post_init__(self) -> None:
        axes = {len(values) for values in (self.kernel, self.strides, self.pads, self.dilations)}
        if axes != {len(self.kernel)} or len(self.input_shape) != 1 + len(self.kernel):
            raise ValueError(f"{self.name}: input_shape, kernel, strides, pads and dilations differ in their axes")
        axes_reach = (
            (size + sum(pads)) * kernel
            for size, pads, kernel in zip(self.input_shape[1:], self.pads, self.kernel, strict=True)
        )
        if max(self.positions * math.prod(self.input_shape[1:]), *axes_reach, 0) > _MOST_POSITIONS:
            raise ValueError(f"{self.name}: its sizes claim more than {_MOST_POSITIONS:,} positions")

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Layer:
        """The inverse of `to_dict`, from JSON (whose tuples are lists)."""
        given = {k: v for k, v in value.items() if v is not None}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        fields["pads"] = tuple((int(begin), int(end)) for begin, end in value["pads"])
        return Layer(**fields)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: `product` only where it is true, since older readers do not know it."""
        return {key: value for key, value in asdict(self).items() if key != "product" or value}

    @property
    def counter(self) -> str:
        """The output of the counting graph with this layer's nonzero inputs, `[T, N, *counter_axes]`."""
        return f"active.{self.name}"

    @property
    def counter_axes(self) -> tuple[int, ...]:
        """Positions, if they are several, and the spatial axes."""
        return (*((self.positions,) if self.positions > 1 else ()), *self.input_shape[1:])

    @property
    def num_inputs(self) -> int:
        """Values that the layer reads for one image in one step."""
        return self.positions * math.prod(self.input_shape)

    @property
    def num_weights(self) -> int:
        return 0 if self.product else self.input_shape[0] * self.outputs * math.prod(self.kernel)

    def fan_out(self) -> NDArray[np.int64]:
        """How many outputs an input value reaches, by its position: `[*spatial]`, a scalar for a linear layer."""
        axes = zip(self.input_shape[1:], self.kernel, self.strides, self.pads, self.dilations, strict=True)
        fan_out = np.array(self.outputs, dtype=np.int64)
        for axis in axes:
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


def uncounted_layers(names: Iterable[str]) -> list[str]:
    """Of the metadata's `uncounted` the layers that the energies lack; other operations (`OTHER_OPS`) are in none."""
    return [name for name in names if not name.endswith(tuple(f" ({kind})" for kind in OTHER_OPS))]


def layers_of(metadata: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The layers of an exported model."""
    return tuple(Layer.from_dict(layer) for layer in metadata["layers"])


def input_kind(layer: Mapping[str, Any]) -> str:
    """What a layer reads: `Layer.to_dict`, or a layer of a result's JSON, which may lack what is so by default."""
    if layer.get("from_input"):
        return "image"
    if layer.get("product"):
        return "pairs of spikes" if layer.get("binary", True) else "pairs"
    return "spikes" if layer.get("binary", True) else "analogue"


@dataclass
class Operations:
    """Operations summed over images, by layer and step: `counts[layer][t]` for step t + 1, `active` their inputs.

    Attributes:
        constants: one's own; by default those for each layer's precision.
        chunk: steps of one call of the graph, after which layers that are computed once are computed again; None if
            one call does.
    """

    layers: tuple[Layer, ...]
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    active: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    num_images: int = 0
    constants: EnergyConstants | None = None
    chunk: int | None = None

    def add(self, active: Mapping[str, NDArray[Any]], num_images: int, T: int) -> None:
        """Add a batch: `active[layer.counter]` holds nonzero inputs, `[T, N, *counter_axes]`."""
        self.num_images += num_images
        for layer in self.layers:
            if layer.from_input:
                ops = np.full(T, float(layer.dense_ops() * num_images))
                inputs = np.full(T, float(layer.num_inputs * num_images))
            else:
                spatial = layer.fan_out()
                values = active[layer.counter].astype(np.float64).reshape(T, -1, *spatial.shape)
                ops = (values * spatial).reshape(T, -1).sum(1)
                inputs = values.reshape(T, -1).sum(1)
            self.counts[layer.name] = self.counts.get(layer.name, 0.0) + ops
            self.active[layer.name] = self.active.get(layer.name, 0.0) + inputs

    def at(self, T: int) -> OperationCount:
        """Operations per image for the first T steps, of all layers."""
        return sum((self.of(layer, T) for layer in self.layers), start=OperationCount())

    def of(self, layer: Layer, T: int) -> OperationCount:
        """Operations per image of one layer in the first T steps."""
        ops = float(self.counts[layer.name][:T].sum()) / self.num_images
        price = self.price(layer)
        if not layer.from_input:
            return OperationCount.billed(price, ac_ops=ops, analogue_ac_ops=0.0 if layer.binary else ops)
        needed = float(self.counts[layer.name][: T : self.chunk or T].sum()) / self.num_images
        return OperationCount.billed(price, mac_ops=ops, repeated_mac_ops=ops - needed if layer.once else 0.0)

    def price(self, layer: Layer) -> EnergyConstants:
        """What the operations of a layer cost."""
        return self.constants.of(layer.precision) if self.constants else energy_constants(layer.precision)

    def input_rate(self, layer: Layer, T: int) -> float:
        """The share of a layer's inputs that counted in the first T steps; 1 where every value does."""
        return float(self.active[layer.name][:T].sum()) / (layer.num_inputs * self.num_images * T)

    def by_layer(self, steps: Sequence[int]) -> list[dict[str, Any]]:
        """Every layer at every T of `steps`, as JSON."""
        return [self._layer_dict(layer, steps) for layer in self.layers]

    def ann(self) -> dict[str, float]:
        """The ANN twin: every layer once, every input multiplied, per image (or frame)."""
        mac_ops = sum(layer.dense_ops() for layer in self.layers)
        energy_pj = sum(layer.dense_ops() * self.price(layer).mac_pj for layer in self.layers)
        return {"mac_ops": mac_ops, "energy_pj": energy_pj}

    def _layer_dict(self, layer: Layer, steps: Sequence[int]) -> dict[str, Any]:
        rows = [{"T": T} | self.of(layer, T).to_dict() | {"input_rate": self.input_rate(layer, T)} for T in steps]
        return {
            "name": layer.name,
            "from_input": layer.from_input,
            "binary": layer.binary,
            "once": layer.once,
            "fan_out": float(layer.fan_out().mean()),
            "precision": layer.precision,
            "weights": layer.num_weights,
            "dense_ops": layer.dense_ops(),
            "rows": rows,
        } | ({"product": True} if layer.product else {})


@dataclass(frozen=True)
class OperationCount:
    """Operations per image, split as in the paper, and what they cost by each of the `CONVENTIONS`, in pJ an image.

    Attributes:
        analogue_ac_ops: those of `ac_ops` whose inputs are not binary.
        repeated_mac_ops: those of `mac_ops` that only repeat the first step's.
        energy_pj, energy_exact_pj, energy_once_pj: `paper`, `exact`, `once`.
    """

    ac_ops: float = 0.0
    mac_ops: float = 0.0
    analogue_ac_ops: float = 0.0
    repeated_mac_ops: float = 0.0
    energy_pj: float = 0.0
    energy_exact_pj: float = 0.0
    energy_once_pj: float = 0.0

    @classmethod
    def billed(
        cls,
        price: EnergyConstants,
        *,
        ac_ops: float = 0.0,
        mac_ops: float = 0.0,
        analogue_ac_ops: float = 0.0,
        repeated_mac_ops: float = 0.0,
    ) -> OperationCount:
        """Operations at one price."""
        paper = ac_ops * price.ac_pj + mac_ops * price.mac_pj
        exact = (ac_ops - analogue_ac_ops) * price.ac_pj + (mac_ops + analogue_ac_ops) * price.mac_pj
        once = ac_ops * price.ac_pj + (mac_ops - repeated_mac_ops) * price.mac_pj
        return cls(ac_ops, mac_ops, analogue_ac_ops, repeated_mac_ops, paper, exact, once)

    def __add__(self, other: OperationCount) -> OperationCount:
        return OperationCount(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, float]:
        """The two counts and the three bills, as JSON."""
        names = ("ac_ops", "mac_ops", "energy_pj", "energy_exact_pj", "energy_once_pj")
        return {name: getattr(self, name) for name in names}


def other_ops(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Operations of `OTHER_OPS` for one image in one step."""
    counted = {kind: sum(by_name.values()) for kind, by_name in metadata["other_ops"].items()}
    return counted | {"neuron_ops": sum(sum(_of_neurons(layer)) for layer in metadata["neurons"])}


def other_ops_pj(metadata: Mapping[str, Any], constants: EnergyConstants) -> dict[str, float]:
    """What `other_ops` cost, per image and step. A comparison costs as much as an addition; a multiplication what a
    multiply-accumulate costs beyond its addition."""
    price = {"bias_adds": constants.ac_pj, "residual_adds": constants.ac_pj, "batch_norm_macs": constants.mac_pj}
    bill = {kind: ops * price[kind] for kind, ops in other_ops(metadata).items() if kind in price}
    multiplied, added = (sum(column) for column in zip(*map(_of_neurons, metadata["neurons"]), strict=True))
    return bill | {"neuron_ops": multiplied * (constants.mac_pj - constants.ac_pj) + added * constants.ac_pj}


def _of_neurons(layer: Mapping[str, Any]) -> tuple[int, int]:
    """Multiplications, and additions with comparisons, of a layer of neurons in one step of Eqs. 1-3."""
    size = math.prod(layer["shape"])
    leaks = layer["tau"] != 1.0
    return size * (leaks + 1), size * 3
