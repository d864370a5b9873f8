"""Finds what is element-wise in a graph that ONNX Runtime has optimised, and makes one node of each connected region.

No path leaves a region and comes back to it: all its nodes have equally many other nodes on the longest path that leads
to them. `Split`, `DequantizeLinear` and the `Cast` of spikes that are summed belong to no region; each that reads them
does their work itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native import DOMAIN
from tetdeploy.native.graphs import Kind, attribute, constants_of, leading_to, put_nodes, reads, scalar, steps_input
from tetdeploy.native.layout import keep_blocked, keep_last
from tetdeploy.native.programs import Op, Program
from tetdeploy.native.scans import NeuronStep, marked
from tetdeploy.native.wholes import COMPARISONS, WholeNumbers

FLOAT, UINT8, INT8, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL
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


def fuse(model: onnx.ModelProto, kinds: Mapping[str, Kind], neuron_steps: Sequence[NeuronStep] = ()) -> int:
    """Put nodes `Elementwise` in place of the element-wise regions of `model`.

    Args:
        kinds: of the graph's tensors.
        neuron_steps: what `take_out_scans` took out.

    Returns: how many there are.

    Raises:
        UnfusableError: the neurons of a loop cannot be put in again.
    """
    kinds = dict(kinds)
    # A region that nobody reads has no program.
    put_nodes(model.graph, leading_to(model.graph.output, model.graph.node))
    graph = _Graph(model.graph, kinds, neuron_steps)
    for keep in (keep_blocked, partial(keep_last, neuron_steps=neuron_steps)):
        elementwise = {k for k in range(len(graph.nodes)) if k in graph.region or graph.inline[k]}
        if keep(model.graph, kinds, elementwise, graph.numbers.keys() | graph.sizes.keys()):
            graph = _Graph(model.graph, kinds, neuron_steps)
    return graph.fuse()


class _Graph:
    """A graph whose nodes are known by their place in it."""

    def __init__(self, graph: onnx.GraphProto, kinds: Mapping[str, Kind], neuron_steps: Sequence[NeuronStep]) -> None:
        self.graph, self.kinds, self.nodes = graph, kinds, list(graph.node)
        self.producer = {name: k for k, node in enumerate(self.nodes) for name in node.output}
        constants = constants_of(graph)
        self.numbers = {name: value for name, t in constants.items() if (value := scalar(t)) is not None}
        self.sizes = {
            name: numpy_helper.to_array(t).tolist() for name, t in constants.items() if t.data_type == TensorProto.INT64
        }
        self.read_by = defaultdict[str, list[onnx.NodeProto]](list)
        for node in self.nodes:
            for name in reads(node):
                self.read_by[name].append(node)
        self.wholes = WholeNumbers(graph, neuron_steps)
        self.inline = [self._is_inline(node) for node in self.nodes]
        self.joins = defaultdict[str, list[int]](list)  # the Concats that a value is part of
        self.region: dict[int, int] = {}
        level, readers = self._levels(), defaultdict[str, list[int]](list)
        for k in self.region:
            node = self.nodes[k]
            tensors = [name for name in node.input if name not in self.numbers]
            near = [self.producer.get(self._before_inline(name), -1) for name in tensors]
            for j in (*near, *(j for name in tensors for j in readers[name])):
                if j in self.region and level[j] == level[k]:
                    self.region[self._first(k)] = self._first(j)
            for name in tensors:
                readers[name].append(k)
            for name in node.input if node.op_type == "Concat" else ():
                self.joins[name].append(k)
        self.region = {k: self._first(k) for k in self.region}
        self.neurons = {}
        for k, node in enumerate(self.nodes if neuron_steps else ()):
            mark = self.numbers.get(node.input[1]) if node.op_type == "Greater" else None
            neurons = marked(mark, neuron_steps)
            if neurons is not None:
                self.neurons[k] = neurons
                check_neuron_step(neurons)
        if len(self.neurons) != len(neuron_steps):
            raise UnfusableError("a loop was lost")
        self.steps = steps_input(graph)

    def _levels(self) -> list[int]:
        """How many nodes outside regions are on the longest path that leads to each node, or, if only members on one
        level read it, to these. Makes a region of each member."""
        level = list[int]()
        for k, node in enumerate(self.nodes):
            if not self.inline[k] and self._is_member(node):
                self.region[k] = k
            before = [self.producer[name] for name in reads(node) if name in self.producer]
            level.append(max((level[j] for j in before), default=0) + (k not in self.region and not self.inline[k]))
        place = {id(node): k for k, node in enumerate(self.nodes)}
        given = {output.name for output in self.graph.output}
        for k in reversed(self.region):
            (made,) = self.nodes[k].output
            read_by = [place[id(node)] for node in self.read_by[made]]
            levels = {level[j] for j in read_by}
            if len(levels) == 1 and made not in given and all(j in self.region for j in read_by):
                level[k] = levels.pop()
        return level

    def _before_inline(self, name: str) -> str:
        while (node := self.inline_producer(name)) is not None:
            name = node.input[0]
        return name

    def _first(self, k: int) -> int:
        while self.region[k] != k:
            k = self.region[k]
        return k

    def fuse(self) -> int:
        """Rewrite the graph. Returns how many nodes `Elementwise` it has."""
        while True:
            members = defaultdict[int, list[int]](list)
            for k, first in self.region.items():
                members[first].append(k)
            self.region = {k: first for k, first in self.region.items() if len(members[first]) > 1}
            try:
                writers = [_Writer(self, first, of) for first, of in members.items() if len(of) > 1]
                outside = self._read_outside(writers)
                made = [writer.node(outside) for writer in writers]
            except UnfusableError as error:
                if any(self.region.get(k) == error.args[0] for k in self.neurons):
                    raise
                self.region = {k: first for k, first in self.region.items() if first != error.args[0]}
                continue
            if not self.neurons.keys() <= self.region.keys():
                raise UnfusableError("a loop stands alone")
            kept = [node for k, node in enumerate(self.nodes) if k not in self.region]
            put_nodes(self.graph, leading_to(self.graph.output, [*kept, *made]))
            known = {value.name for value in (*self.graph.value_info, *self.graph.output)}
            for name in (name for node in made for name in node.output if name not in known):
                self.graph.value_info.append(helper.make_tensor_value_info(name, self.kinds[name].type, None))
            return len(made)

    def region_of(self, name: str) -> int | None:
        """The region that makes a value."""
        return self.region.get(self.producer.get(name, -1))

    def inline_producer(self, name: str) -> onnx.NodeProto | None:
        k = self.producer.get(name)
        return self.nodes[k] if k is not None and self.inline[k] else None

    def repeated(self, name: str) -> str | None:
        """The tensor `[N, ...]` that `name [T * N, ...]` repeats for each step, if it does."""
        shape = self.kinds[name].shape
        for op in ("Reshape", "Expand", "Unsqueeze"):
            node = self.nodes[self.producer[name]] if name in self.producer else None
            if node is None or node.op_type != op:
                return None
            name = node.input[0]
        return name if name in self.kinds and self.kinds[name].shape[1:] == shape[1:] else None

    def _is_inline(self, node: onnx.NodeProto) -> bool:
        if node.domain or not all(self._has_axes(name) for name in (node.input[0], *node.output)):
            return False
        if node.op_type == "Split":
            sizes = self.sizes.get(node.input[1]) if len(node.input) > 1 else attribute(node, "split", [1])
            length = self.kinds[node.input[0]].shape[0]
            even = not isinstance(length, int) or length % len(node.output) == 0
            return attribute(node, "axis", 0) == 0 and sizes is not None and len(set(sizes)) == 1 and even
        if node.op_type == "Cast":  # of spikes to be summed: bytes take a fourth of the memory
            types = (self.kinds[node.input[0]].type, self.kinds[node.output[0]].type)
            return types == (UINT8, FLOAT) and self._is_summed(node)
        return (
            node.op_type == "DequantizeLinear"
            and all(name in self.numbers for name in node.input[1:])
            and self.kinds[node.input[0]].type in (UINT8, INT8)
            and self.kinds[node.output[0]].type == FLOAT
        )

    def _is_summed(self, node: onnx.NodeProto) -> bool:
        """Whether another node makes what `node` reads, and only sums read what it makes."""
        readers = self.read_by[node.output[0]]
        made = node.input[0] in self.producer and node.output[0] not in {o.name for o in self.graph.output}
        return made and bool(readers) and all(r.op_type == "Add" and self._is_member(r) for r in readers)

    def _is_member(self, node: onnx.NodeProto) -> bool:
        """Whether a node works element by element, on types that `elementwise.c` knows."""
        tensors = [name for name in node.input if name not in self.numbers]
        if node.domain or not tensors or not all(self._has_axes(name) for name in (*tensors, *node.output)):
            return False
        if len({self._image(name) for name in (*tensors, *node.output)}) > 1:
            return False  # something is repeated along an axis
        types = {self.kinds[name].type for name in tensors}
        if node.op_type == "Cast":
            to, whole = attribute(node, "to", 0), self.wholes.of(node.input[0])
            if types == {FLOAT}:
                return to == UINT8 and whole is not None and whole.unit == 1  # others would lose their fraction
            return types <= {BOOL, UINT8} and to in (FLOAT, UINT8)
        if node.op_type == "Concat":
            rank = len(self.kinds[tensors[0]].shape)
            return tensors == list(node.input) and attribute(node, "axis", 0) in (0, -rank) and types <= {FLOAT, UINT8}
        return types == {FLOAT} and node.op_type in (*BINARY, *UNARY)

    def _has_axes(self, name: str) -> bool:
        shape = self.kinds[name].shape if name in self.kinds else ()
        return 0 < len(shape) <= 8 and all(isinstance(dim, int) for dim in shape[1:])

    def _image(self, name: str) -> tuple[object, ...]:
        """What two values must have in common; how long their first axes are is seen in the call."""
        shape = self.kinds[name].shape
        return (shape[0] == 1, *shape[1:])

    def _read_outside(self, writers: list[_Writer]) -> set[str]:
        """What regions read of one another, and all others of them."""
        needed = [output.name for output in self.graph.output]
        needed += [name for writer in writers for name in writer.reads]
        for k, node in enumerate(self.nodes):
            if k not in self.region and not self.inline[k]:
                needed += reads(node)
        found = set[str]()
        while needed:
            name = needed.pop()
            if name not in found:
                found.add(name)
                producer = self.inline_producer(name)
                needed += producer.input if producer is not None else []
        return found


class _Writer:
    """Writes the program of one region.

    Attributes:
        merged: whether it has neurons of a `Scan`, and so works on tensors `[T * N, ...]`.
        reads: the tensors that it reads.
        parts: in how many steps each tensor comes that it makes or that leads to one that it reads.
    """

    def __init__(self, graph: _Graph, region: int, members: list[int]) -> None:
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
        found = _solve(lengths, same, sums, self.region)
        if len({length / found[name] for name, length in lengths.items() if isinstance(length, int)}) > 1:
            raise UnfusableError(self.region)  # a step is not as long as the other
        return found


def _solve(
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
