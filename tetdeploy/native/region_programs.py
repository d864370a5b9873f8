"""Writes the program of a region: what its nodes do to one step after the other, on registers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from tetdeploy.native import DOMAIN
from tetdeploy.native.graphs import attribute
from tetdeploy.native.programs import Op, Program
from tetdeploy.native.scans import NeuronStep
from tetdeploy.native.whole_numbers import COMPARISONS

if TYPE_CHECKING:
    from tetdeploy.native.regions import Regions

BINARY = {
    "Add": Op.ADD,
    "Sub": Op.SUB,
    "Mul": Op.MUL,
    "Div": Op.DIV,
    "Less": Op.LESS,
    "Greater": Op.GREATER,
    "LessOrEqual": Op.LESS_EQUAL,
    "GreaterOrEqual": Op.GREATER_EQUAL,
}
UNARY = ("ThresholdedRelu", "HardSigmoid")
NUMBER_RIGHT = {op: Op[f"{op.name}_K"] for op in BINARY.values()}
NUMBER_LEFT = {
    Op.ADD: Op.ADD_K,
    Op.SUB: Op.K_SUB,
    Op.MUL: Op.MUL_K,
    Op.DIV: Op.K_DIV,
    Op.LESS: Op.GREATER_K,
    Op.GREATER: Op.LESS_K,
    Op.LESS_EQUAL: Op.GREATER_EQUAL_K,
    Op.GREATER_EQUAL: Op.LESS_EQUAL_K,
}


class UnfusableError(Exception):
    """No program can be written for a region, its argument."""


class RegionWriter:
    """Writes the program of one region of a graph.

    Attributes:
        merged: whether it has neurons of a `Scan`, and so works on tensors `[T * N, ...]`.
        reads: the tensors that it reads.
        parts: in how many steps each tensor comes that it makes or that leads to one that it reads.
    """

    def __init__(self, graph: Regions, region: int, members: list[int]) -> None:
        self.graph, self.region = graph, region
        self.nodes = [graph.nodes[k] for k in members]
        self.merged = any(k in graph.neurons for k in members)
        self.parts = self._count_parts()
        if self.merged and set(self.parts.values()) != {1}:
            raise UnfusableError(region)  # steps of both kinds
        self.reads: list[str] = []
        self._program = Program()
        self._repeated: set[str] = set()
        self._values: dict[tuple[str, int], int] = {}
        for name in (name for node in self.nodes for name in node.output):  # each behind what it is computed from
            for part in range(self.parts[name]):
                self._value(name, part)

    def node(self, outside: set[str]) -> onnx.NodeProto:
        """The node whose outputs are those of the region that are read outside it."""
        outputs = [name for node in self.nodes for name in node.output if name in outside]
        self._program.stores = [
            (self._values[name, part], number, part)
            for number, name in enumerate(outputs)
            for part in range(self.parts[name])
        ]
        try:
            program = self._program.encode()
        except ValueError as error:
            raise UnfusableError(self.region) from error
        return helper.make_node(
            "Elementwise",
            [*self.reads, *([self.graph.steps] if self.merged else [])],
            outputs,
            domain=DOMAIN,
            program=program,
            immediates=[*self._program.immediates, 0.0],
            input_ports=[number for name in self.reads for number in self._port(name)],
            output_ports=[number for name in outputs for number in self._port(name)],
            states=len(self._program.kept) if self.merged else -1,
        )

    def _port(self, name: str) -> tuple[int, int]:
        """Type and parts, as `elementwise.c` numbers them."""
        parts = self.parts.get(name, 1)
        return self.graph.kinds[name].type, parts if not self.merged else -1 if name in self._repeated else 0

    def _value(self, name: str, part: int) -> int:
        key = (name, part)
        if key not in self._values:
            self._values[key] = self._write(name, part)
        return self._values[key]

    def _write(self, name: str, part: int) -> int:
        """The value of one step of a tensor, loaded or computed."""
        place = self._place(name, part)
        if place is not None:
            return self._program.add(Op.LOAD, *place)
        node = self.graph.nodes[self.graph.producer[name]]
        if node.op_type == "DequantizeLinear":
            return self._dequantise(node, part)
        if node.op_type == "Split":
            return self._value(node.input[0], list(node.output).index(name) * self.parts[name] + part)
        if node.op_type == "Concat":
            for piece in node.input:
                if part < self.parts[piece]:
                    return self._value(piece, part)
                part -= self.parts[piece]
        if (neurons := self.graph.neurons.get(self.graph.producer[name])) is not None:
            return self._fire(neurons, self._value(node.input[0], part))
        return _arithmetic(self._program, node, lambda operand: self._value(operand, part), self.graph.numbers)

    def _fire(self, neurons: NeuronStep, current: int) -> int:
        """The spikes of neurons in one step."""
        state = self._program.state()
        values = {neurons.u: state, neurons.x: current}
        for node in neurons.nodes:
            values[node.output[0]] = _arithmetic(self._program, node, values.__getitem__, neurons.numbers)
        self._program.kept[state] = values[neurons.next_u]
        return values[neurons.spikes]

    def _dequantise(self, node: onnx.NodeProto, part: int) -> int:
        scale, zero = (float(self.graph.numbers[name]) if name else 0.0 for name in (*node.input, "")[1:3])
        place = self._place(node.input[0], part)
        if place is not None:
            return self._program.add(Op.DEQUANTIZE, *place, self._program.immediate(zero, scale))
        centred = self._program.add(Op.SUB_K, self._value(node.input[0], part), k=self._program.immediate(zero))
        return self._program.add(Op.MUL_K, centred, k=self._program.immediate(scale))

    def _place(self, name: str, part: int) -> tuple[int, int] | None:
        """The input, and its part, that hold one step of a tensor; None of what is computed here."""
        tensor = self._tensor(name, part)
        if tensor is None:
            return None
        if tensor[0] not in self.reads:
            self.reads.append(tensor[0])
        return self.reads.index(tensor[0]), tensor[1]

    def _tensor(self, name: str, part: int) -> tuple[str, int] | None:
        if self.graph.region_of(name) == self.region:
            return None
        node = self.graph.inline_producer(name)
        if node is None:
            repeated = self.graph.repeated(name) if self.merged else None
            if repeated is not None:
                self._repeated.add(repeated)
                return repeated, part
            join = self._join(name)
            if join is None:
                return name, part
            before = list(join.input).index(name)
            return join.output[0], sum(self.parts[other] for other in join.input[:before]) + part
        if node.op_type == "Split":
            return self._tensor(node.input[0], list(node.output).index(name) * self.parts[name] + part)
        return None

    def _join(self, name: str) -> onnx.NodeProto | None:
        """The Concat through which another region gives a value anyway."""
        region = self.graph.region_of(name)
        joins = (k for k in self.graph.joins[name] if region is not None and self.graph.region.get(k) == region)
        return next((self.graph.nodes[k] for k in joins), None)

    def _count_parts(self) -> dict[str, int]:
        """In how many steps the tensors come that the region makes, reads, or that stand between."""
        same, sums = list[list[str]](), list[tuple[str, list[str]]]()
        names, seen = [name for node in self.nodes for name in (*node.input, *node.output)], set[str]()
        while names:
            name = names.pop()
            if name in seen or name in self.graph.numbers:
                continue
            seen.add(name)
            own = self.graph.region_of(name) == self.region
            node = self.graph.nodes[self.graph.producer[name]] if own else self.graph.inline_producer(name)
            node = node or self._join(name)
            if node is None:
                continue
            tensors = [n for n in node.input if n not in self.graph.numbers and n not in self.graph.sizes]
            if node.op_type == "Split":
                sums.append((tensors[0], list(node.output)))
                same.append(list(node.output))
            elif node.op_type == "Concat":
                sums.append((node.output[0], tensors))
            else:
                same.append([*tensors, *node.output])
            names += [*tensors, *node.output]
        lengths = {name: self.graph.kinds[name].shape[0] for name in seen}
        found = solve_parts(lengths, same, sums, self.region)
        if len({length / found[name] for name, length in lengths.items() if isinstance(length, int)}) > 1:
            raise UnfusableError(self.region)  # a step is not as long as the other
        return found


def solve_parts(
    lengths: Mapping[str, int | str | None], same: list[list[str]], sums: list[tuple[str, list[str]]], region: int
) -> dict[str, int]:
    """Whole numbers, as small as they can be, with `same` names equal and each total in `sums` that of its pieces.

    Args:
        lengths: of each name, which the numbers are to be in proportion to; None of one that is not known.

    Raises:
        UnfusableError: there are none, or others could be as well.
    """
    known, equal = defaultdict[object, list[str]](list), {name: name for name in lengths}
    for name, length in lengths.items():
        known[name if length is None else (length,)].append(name)

    def first(name: str) -> str:
        while equal[name] != name:
            equal[name] = name = equal[equal[name]]
        return name

    for group in (*same, *known.values()):
        for name in group:
            equal[first(name)] = first(group[0])
    found, zero = {first(next(iter(lengths))): Fraction(1)}, Fraction(0)
    totals = dict.fromkeys((first(total), *sorted(map(first, pieces))) for total, pieces in sums)
    while (news := len(found)) < len(set(map(first, lengths))):
        for total, *pieces in totals:
            unknown = {name for name in (total, *pieces) if name not in found}
            for name in unknown if len(unknown) == 1 else ():
                rest = sum((found.get(piece, zero) for piece in pieces), -found.get(total, zero))
                times = (total == name) - pieces.count(name)
                if times and rest / times > 0:
                    found[name] = rest / times
        if len(found) == news:
            raise UnfusableError(region)  # how long one is beside the others is seen in the call
    if any(found[total] != sum(found[piece] for piece in pieces) for total, *pieces in totals):
        raise UnfusableError(region)
    least = Fraction(
        math.gcd(*(number.numerator for number in found.values())),
        math.lcm(*(number.denominator for number in found.values())),
    )
    return {name: int(found[first(name)] / least) for name in lengths}


def _arithmetic(
    program: Program, node: onnx.NodeProto, operand: Callable[[str], int], numbers: Mapping[str, np.generic]
) -> int:
    """The value of a node on values that its operands have."""
    if node.op_type in BINARY:
        op, (left, right) = BINARY[node.op_type], node.input
        if left in numbers:
            return program.add(NUMBER_LEFT[op], operand(right), k=program.immediate(float(numbers[left])))
        if right in numbers:
            return program.add(NUMBER_RIGHT[op], operand(left), k=program.immediate(float(numbers[right])))
        return program.add(op, operand(left), operand(right))
    value = operand(node.input[0])
    if node.op_type == "ThresholdedRelu":
        return program.add(Op.THRESHOLDED_RELU, value, k=program.immediate(attribute(node, "alpha", 1.0)))
    if node.op_type == "HardSigmoid":
        slope = program.immediate(attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5))
        return program.add(Op.HARD_SIGMOID, value, k=slope)
    assert node.op_type == "Cast"  # of 0 and 1, or of bytes
    return value


def check_neuron_step(neurons: NeuronStep) -> None:
    """Refuse neurons of which `_arithmetic` does not know an operator.

    Raises:
        UnfusableError: there is one.
    """
    made = {neurons.u: "", neurons.x: "", **dict.fromkeys(neurons.numbers, "")}  # by which operator
    for node in neurons.nodes:
        casts_spikes = node.op_type == "Cast" and made.get(node.input[0]) in COMPARISONS
        if not (casts_spikes or node.op_type in (*BINARY, *UNARY)) or not made.keys() >= set(node.input):
            raise UnfusableError(f"neurons with {node.op_type}")
        made[node.output[0]] = node.op_type
    if not made.keys() >= {neurons.next_u, neurons.spikes}:
        raise UnfusableError("neurons that give something else")
