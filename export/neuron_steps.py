"""One step of neurons (Eqs. 1-3) in standard ONNX operators, and the currents of each step.

Per step::

    h = tau u + I        Mul, Add                (1)
    s = h > v_th         Greater, Cast           (2)
    u = h - h s          ThresholdedRelu, Sub    (3), h (1 - s) without a use of s

in this order of operations and in float32, as PyTorch's kernel does, so that equal currents give equal spikes.

For ONNX Runtime on a CPU the same bits come from fewer passes over memory, on the negated h::

    n = tau r - I                          Mul, Sub
    s = n < -v_th                          Less, Cast; for float32 spikes HardSigmoid, steep enough to be a step
    r = n if n >= -v_th else 0             ThresholdedRelu, whose n > alpha is n >= -v_th one float below -v_th

and where every current comes from 8 bits, the steps are scaled instead of leaking: with m(t) = n(t) / tau^t and tau a
power of two, m = r - I / tau^t costs no multiplication, as the currents' own scales take the factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .values import constant, inputs_of, made_by, producer_of

FLOAT = ir.TensorType(ir.DataType.FLOAT)
BYTE = ir.TensorType(ir.DataType.UINT8)
_STANDS_FOR = "tetdeploy.stands_for"


@dataclass(frozen=True)
class Neurons:
    """One neuron layer of a lowered graph: `shape` is one image's membrane, `spikes` the value `[T * N, *shape]` (of a
    `Scan` `[T, N, *shape]`), float32 or uint8."""

    name: str
    tau: float
    v_th: float
    shape: tuple[int, ...]
    spikes: ir.Value


@dataclass(frozen=True)
class Forms:
    """In which forms values `[T, N, ...]` of a graph are there: `merged` as `[T * N, ...]`, and `by_step` the neurons'
    spikes of each step, `[N, ...]`; and what is known of `currents`, which several layers may read: a sum along a path
    of residuals is part of all behind it."""

    merged: dict[ir.Value, ir.Value] = field(default_factory=dict)
    by_step: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    currents: dict[ir.Value, tuple[list[Scaled], bool]] = field(default_factory=dict)


class Scaled:
    """One step `[N, ...]` of a current, times a factor: written once for each factor, before the first that reads it.

    Args:
        write: what writes it.
    """

    def __init__(self, write: Callable[[StepBuilder, float], ir.Value]) -> None:
        self._write = write
        self._written: dict[float, ir.Value] = {}

    def __call__(self, build: StepBuilder, factor: float) -> ir.Value:
        if factor not in self._written:
            self._written[factor] = self._write(build, factor)
        return self._written[factor]


class StepBuilder:
    """Writes nodes before `anchor`, or at the end of the graph; spikes are of the type `spikes`.

    `forms` are shared by all layers of a graph.
    """

    def __init__(
        self,
        graph: ir.Graph,
        anchor: ir.Node | None,
        spikes: ir.TensorType,
        forms: Forms,
    ) -> None:
        self.graph, self.anchor, self.spikes, self.forms = graph, anchor, spikes, forms

    def many(self, op: str, inputs: list[ir.Value | None], count: int, /, **attributes: object) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, num_outputs=count)  # type: ignore[arg-type]
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        return list(node.outputs)

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        return self.many(op, list(inputs), 1, **attributes)[0]

    def ints(self, numbers: list[int]) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(numbers, np.int64)))

    def number(self, value: float) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value, np.float32)))

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        """`value` with other axes, all but one of known length."""
        reshaped = self("Reshape", value, self.ints([dim if isinstance(dim, int) else -1 for dim in shape]))
        reshaped.type, reshaped.shape = value.type, ir.Shape(shape)
        return reshaped

    def as_float(self, spikes: ir.Value) -> ir.Value:
        if self.spikes == FLOAT:
            return spikes
        numbers = self("Cast", spikes, to=int(ir.DataType.FLOAT))
        numbers.type, numbers.shape = FLOAT, spikes.shape
        return numbers

    def split(self, current: ir.Value | None, T: int) -> list[ir.Value]:
        """The T steps of `current [T, N, ...]`, each `[N, ...]`; a current that repeats one step is not copied."""
        assert current is not None
        repeated = _repeated(current)
        if repeated is not None:
            return [self.merge(repeated)] * T
        whole = self.merge(current)
        if T == 1:
            return [whole]
        return self.many("Split", [whole], T, axis=0, num_outputs=T)

    def currents(self, current: ir.Value | None, T: int) -> tuple[list[Scaled], bool]:
        """The T steps of `current [T, N, ...]`, each to be written times a factor; and whether the factor is free, as
        it goes into scales: of currents that come from 8 bits, spikes and sums of these."""
        assert current is not None
        if current not in self.forms.currents:
            self.forms.currents[current] = self._currents(current, T)
        return self.forms.currents[current]

    def _currents(self, current: ir.Value, T: int) -> tuple[list[Scaled], bool]:
        if current in self.forms.by_step and self.spikes == BYTE:
            one, none = self.number(1.0), self("Constant", value=ir.tensor(np.array(0, np.uint8)))
            return [_dequantised(spikes, one, none) for spikes in self.forms.by_step[current]], True
        total = made_by(current, "Add")
        if total is not None and _all_like(current, total.inputs):
            parts = [self.currents(part, T) for part in total.inputs]
            if all(scalable for _, scalable in parts):
                pairs = zip(*(steps for steps, _ in parts), strict=True)
                return [_sum(total, one, other) for one, other in pairs], True
        before = made_by(self.merge(current), "DequantizeLinear") if _repeated(current) is None else None
        if before is not None:
            quantised, scale, zero = inputs_of(before)
            steps = self.many("Split", [quantised], T, axis=0, num_outputs=T)
            return [_dequantised(step, scale, zero) for step in steps], True
        return [_unscaled(step) for step in self.split(current, T)], False

    def merge(self, value: ir.Value) -> ir.Value:
        """`value [T, N, ...]` as `[T * N, ...]`, from before it was taken apart; sums are taken there as well."""
        if value not in self.forms.merged:
            self.forms.merged[value] = self._merge(value)
        return self.forms.merged[value]

    def _merge(self, value: ir.Value) -> ir.Value:
        assert value.shape is not None
        view = made_by(value, "Reshape", "Unsqueeze")
        if view is not None:
            before = view.inputs[0]
            if before is not None and before.shape is not None and before.shape[1:] == value.shape[2:]:
                return before
        of = made_by(value, "Add")
        if of is not None and _all_like(value, of.inputs):
            total = self("Add", *map(self.merge, inputs_of(of)))
            producer_of(total).meta[_STANDS_FOR] = of
            total.type, total.shape = value.type, ir.Shape([value.shape[0] * value.shape[1], *value.shape[2:]])
            return total
        return self.reshape(value, [value.shape[0] * value.shape[1], *value.shape[2:]])

    def step(
        self, current: ir.Value, u: ir.Value | None, layer: Neurons, *, reset: bool
    ) -> tuple[ir.Value, ir.Value | None]:
        """Eqs. 1-3 for one step: spikes, and the membrane after the reset if the caller wants it."""
        h = current
        if u is not None:
            leaked = u if layer.tau == 1.0 else self("Mul", u, self.number(layer.tau))
            h = self("Add", leaked, current)
        fired = self("Cast", self("Greater", h, self.number(layer.v_th)), to=int(self.spikes.dtype))
        return fired, self("Sub", h, self("ThresholdedRelu", h, alpha=layer.v_th)) if reset else None

    def negated_step(
        self, current: ir.Value, r: ir.Value | None, layer: Neurons, *, reset: bool
    ) -> tuple[ir.Value, ir.Value | None]:
        """The same on n = -h and r = -u; the first step, which has no r, begins with h = I."""
        v_th = float(np.float32(layer.v_th))
        if r is None:
            fired = self.fire(current, v_th, negated=False)
            return fired, self("Sub", self("ThresholdedRelu", current, alpha=v_th), current) if reset else None
        leaked = r if layer.tau == 1.0 else self("Mul", r, self.number(layer.tau))
        n = self("Sub", leaked, current)
        below = float(np.nextafter(np.float32(-v_th), np.float32(-np.inf)))
        return self.fire(n, v_th, negated=True), self("ThresholdedRelu", n, alpha=below) if reset else None

    def fire(self, h: ir.Value, v_th: float, *, negated: bool) -> ir.Value:
        """h > v_th; of a negated h, h < -v_th. As float32 it is one HardSigmoid, min(1, max(0, alpha h + beta)): with
        alpha = 1 / ulp(v_th), a power of two, the least h above v_th gives 1 and v_th itself 0, both exactly."""
        if self.spikes == FLOAT and abs(math.frexp(v_th)[1]) < 64:
            alpha = 1 / float(np.spacing(np.float32(v_th)))
            return self("HardSigmoid", h, alpha=-alpha if negated else alpha, beta=-alpha * v_th)
        fires = self("Less", h, self.number(-v_th)) if negated else self("Greater", h, self.number(v_th))
        return self("Cast", fires, to=int(self.spikes.dtype))


def network_node(node: ir.Node) -> ir.Node:
    """The node of the network that `node` stands for: a sum is taken anew on merged or single steps, perhaps often."""
    of: ir.Node = node.meta.get(_STANDS_FOR, node)
    return of


def _dequantised(value: ir.Value, scale: ir.Value, zero: ir.Value) -> Scaled:
    def write(build: StepBuilder, factor: float) -> ir.Value:
        if factor == 1.0:
            return build("DequantizeLinear", value, scale, zero)
        array = constant(scale)
        assert array is not None
        return build("DequantizeLinear", value, build.number(float(array) * factor), zero)

    return Scaled(write)


def _sum(of: ir.Node, one: Scaled, other: Scaled) -> Scaled:
    def write(build: StepBuilder, factor: float) -> ir.Value:
        total = build("Add", one(build, factor), other(build, factor))
        producer_of(total).meta[_STANDS_FOR] = of
        return total

    return Scaled(write)


def _unscaled(value: ir.Value) -> Scaled:
    def write(_: StepBuilder, factor: float) -> ir.Value:
        assert factor == 1.0
        return value

    return Scaled(write)


def _repeated(current: ir.Value) -> ir.Value | None:
    """The one step `[1, N, ...]` that `current [T, N, ...]` repeats, if it does."""
    expand = made_by(current, "Expand")
    if expand is None or current.shape is None:
        return None
    source = expand.inputs[0]
    same = source is not None and source.shape is not None and source.shape == ir.Shape([1, *current.shape[1:]])
    return source if same else None


def _all_like(value: ir.Value, parts: Sequence[ir.Value | None]) -> bool:
    return all(part is not None and part.shape == value.shape for part in parts)


def float_value(name: str, shape: tuple[object, ...] | list[None]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=FLOAT)  # type: ignore[arg-type]
