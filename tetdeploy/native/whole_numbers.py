"""Finds values that are whole numbers, as spikes and sums of spikes are: what is computed with them can be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from tetdeploy.native.graphs import attribute, attributes_of, constants_of, scalar
from tetdeploy.native.scans import NeuronStep, marked

COMPARISONS = ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")
HOLD_BYTES = (TensorProto.FLOAT, TensorProto.UINT8)
SAME_VALUES = ("Identity", "MaxPool", "NhwcMaxPool", "Reshape", "Split", "Transpose")


@dataclass(frozen=True)
class Whole:
    """What a value is: whole numbers from 0 to `most`, at most 255, times `unit`, a power of two."""

    most: int
    unit: float = 1.0


class WholeNumbers:
    """Knows which values of a graph are whole numbers, times a unit.

    Args:
        neuron_steps: what `take_out_scans` took out.
    """

    def __init__(self, graph: onnx.GraphProto, neuron_steps: Sequence[NeuronStep]) -> None:
        given = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        self.constants = constants_of(graph)
        self.producer = {name: node for node in graph.node for name in node.output}
        self._neuron_steps = neuron_steps
        self._known = {name: Whole(255) for name, element in given.items() if element == TensorProto.UINT8}
        for node in graph.node:  # each behind what it reads
            found = self._find(node) if node.domain in ("", "com.microsoft") else None
            if found is not None and found.most <= 255:
                values = node.output if node.op_type == "Split" else node.output[:1]  # a MaxPool may give places, too
                self._known |= dict.fromkeys(values, found)

    def source(self, name: str) -> str:
        """The value that `name` is another name for."""
        while (node := self.producer.get(name)) is not None and node.op_type == "Identity":
            name = node.input[0]
        return name

    def of(self, name: str) -> Whole | None:
        """What `name` is; None of what may be something else."""
        return self._known.get(name)

    def _find(self, node: onnx.NodeProto) -> Whole | None:
        if node.op_type in ("Concat", "Add"):
            parts = [self.of(name) for name in node.input]
            wholes = [part for part in parts if part is not None]
            if len(wholes) < len(parts) or len({whole.unit for whole in wholes}) > 1:
                return None
            most = [whole.most for whole in wholes]
            return Whole(max(most) if node.op_type == "Concat" else sum(most), wholes[0].unit)
        if node.op_type in SAME_VALUES:
            return self.of(node.input[0])
        if node.op_type == "AveragePool":
            whole, count = self.of(node.input[0]), _averaged(node)
            return Whole(whole.most * count, whole.unit / count) if whole is not None and count is not None else None
        if node.op_type == "Cast":
            comparison = self.producer.get(node.input[0])
            if comparison is not None and self._fires(comparison):
                return Whole(1)
            return self.of(node.input[0]) if attribute(node, "to", None) in HOLD_BYTES else None
        return Whole(1) if threshold(node) is not None else None

    def _fires(self, comparison: onnx.NodeProto) -> bool:
        """Whether a comparison, or the neurons that it stands for, gives 0 or 1."""
        if comparison.op_type not in COMPARISONS:
            return False
        mark = scalar(self.constants[comparison.input[1]]) if comparison.input[1] in self.constants else None
        neurons = marked(mark, self._neuron_steps)
        if neurons is None:
            return True
        made = {name: node for node in neurons.nodes for name in node.output}
        spikes = made.get(neurons.spikes)
        if spikes is None or spikes.op_type != "Cast":
            return spikes is not None and threshold(spikes) is not None
        compared = made.get(spikes.input[0])
        return compared is not None and compared.op_type in COMPARISONS


def _averaged(pool: onnx.NodeProto) -> int | None:
    """Of how many values each is the mean, if that is exact: of a power of two, none of them padding."""
    attributes = attributes_of(pool)
    count = math.prod(attributes["kernel_shape"])
    plain = (
        not any(attributes.get("pads", [0]))
        and not attributes.get("ceil_mode", 0)
        and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        and set(attributes.get("dilations", [1])) == {1}
    )
    return count if plain and count & (count - 1) == 0 else None


def threshold(node: onnx.NodeProto) -> np.float32 | None:
    """What a `HardSigmoid` compares with that is so steep that it gives 0 or 1 of every number: 1 of those above,
    with a negative slope of those below; None of any other node."""
    if node.op_type != "HardSigmoid":
        return None
    slope, offset = (np.float32(attribute(node, name, default)) for name, default in (("alpha", 0.2), ("beta", 0.5)))
    if abs(np.frexp(slope)[0]) != 0.5:  # times a power of two is exact
        return None
    zero = -offset / slope
    beyond = np.nextafter(zero, np.copysign(np.float32(np.inf), slope))
    return np.float32(zero) if slope * beyond + offset >= 1 and slope * zero + offset == 0 else None
