"""Finds what is element-wise in a graph that ONNX Runtime has optimised, and makes one node of each connected region.

No path leaves a region and comes back to it: all its nodes have equally many other nodes on the longest path that leads
to them. `Split`, `DequantizeLinear` and the `Cast` of spikes that are summed belong to no region; each that reads them
does their work itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import onnx
from onnx import TensorProto, helper, numpy_helper

from tetdeploy.native.graphs import Kind, attribute, constants_of, leading_to, put_nodes, reads, scalar, steps_input
from tetdeploy.native.layout import keep_blocked, keep_last
from tetdeploy.native.region_programs import BINARY, UNARY, RegionWriter, UnfusableError, check_neuron_step
from tetdeploy.native.scans import NeuronStep, marked
from tetdeploy.native.whole_numbers import WholeNumbers

FLOAT, UINT8, INT8, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL


def fuse(
    model: onnx.ModelProto,
    kinds: Mapping[str, Kind],
    neuron_steps: Sequence[NeuronStep] = (),
    states: Sequence[tuple[str, str]] = (),
) -> int:
    """Put nodes `Elementwise` in place of the element-wise regions of `model`.

    Args:
        kinds: of the graph's tensors.
        neuron_steps: what `take_out_scans` took out.
        states: see `keep_last`.

    Returns: how many there are.

    Raises:
        UnfusableError: the neurons of a loop cannot be put in again.
    """
    kinds = dict(kinds)
    # A region that nobody reads has no program.
    put_nodes(model.graph, leading_to(model.graph.output, model.graph.node))
    graph = Regions(model.graph, kinds, neuron_steps)
    for keep in (keep_blocked, partial(keep_last, neuron_steps=neuron_steps, states=states)):
        elementwise = {k for k in range(len(graph.nodes)) if k in graph.region or graph.inline[k]}
        if keep(model.graph, kinds, elementwise, graph.numbers.keys() | graph.sizes.keys()):
            graph = Regions(model.graph, kinds, neuron_steps)
    return graph.fuse()


class Regions:
    """A graph whose nodes are known by their place in it, and its regions.

    Attributes:
        kinds: of the tensors.
        producer: the node that makes a tensor.
        numbers: constants of one number.
        sizes: constants of whole numbers, such as lengths.
        steps: the input that has the steps.
        region: that each node belongs to, by the place of its first; none of those outside.
        joins: the `Concat`s that a tensor is part of.
        neurons: that the nodes stand for which `take_out_scans` left.
    """

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
        self.joins = defaultdict[str, list[int]](list)
        self.region: dict[int, int] = {}
        self._connect()
        self.neurons = self._find_neurons(neuron_steps)
        self.steps = steps_input(graph)

    def _connect(self) -> None:
        """Join the regions of members that read of one another, or what the others read, on one level."""
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

    def _find_neurons(self, neuron_steps: Sequence[NeuronStep]) -> dict[int, NeuronStep]:
        """The nodes that stand for neurons which `take_out_scans` took out.

        Raises:
            UnfusableError: some are not there any more, or no program can be written for them.
        """
        found = {}
        for k, node in enumerate(self.nodes if neuron_steps else ()):
            mark = self.numbers.get(node.input[1]) if node.op_type == "Greater" else None
            neurons = marked(mark, neuron_steps)
            if neurons is not None:
                found[k] = neurons
                check_neuron_step(neurons)
        if len(found) != len(neuron_steps):
            raise UnfusableError("a loop was lost")
        return found

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
            fused = {first: of for first, of in members.items() if len(of) > 1 or first in self.neurons}
            self.region = {k: first for k, first in self.region.items() if first in fused}
            try:
                writers = [RegionWriter(self, first, of) for first, of in fused.items()]
                outside = self._read_outside(writers)
                made = [writer.node(outside) for writer in writers]
            except UnfusableError as error:
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
        """The node outside all regions that makes a value, if those that read it do its work."""
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

    def _read_outside(self, writers: list[RegionWriter]) -> set[str]:
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
