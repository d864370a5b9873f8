"""Puts the operators of this package into a graph when its model is opened: all passes, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from tetdeploy import native
from tetdeploy.native.counts import put_counts
from tetdeploy.native.graphs import Kind, name_apart, without_weights
from tetdeploy.native.int8_convolutions import best_way, put_int8_convolutions
from tetdeploy.native.layout import turn_bytes
from tetdeploy.native.region_programs import UnfusableError
from tetdeploy.native.regions import fuse
from tetdeploy.native.scans import take_out_scans
from tetdeploy.native.spike_convolutions import compared, mark_spike_convolutions, put_spike_convolutions
from tetdeploy.native.whole_numbers import WholeNumbers
from tetdeploy.storage.files import temporary_folder

_ELEMENT_TYPES = {
    "float": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}


def fuse_model(model: bytes, states: Sequence[tuple[str, str]] = ()) -> bytes | None:
    """`model` as ONNX Runtime optimises it, with nodes of `native.library()` for its element-wise regions and, where
    the processor has what they need, its convolutions of spikes and of int8; None of one without.

    Args:
        states: its inputs and outputs that may get channels last and other names (`native.last_name`), in pairs.

    Raises:
        OSError: no temporary file can be written.
        Exception: ONNX Runtime's own.
    """
    try:
        return _fuse(model, states, take_out=b"Scan" in model)
    except UnfusableError:  # neurons between which more than sums depends on T
        return _fuse(model, states, take_out=False)


def _fuse(model: bytes, states: Sequence[tuple[str, str]], *, take_out: bool) -> bytes | None:
    tiles, proto = native.has_tiles(), onnx.ModelProto.FromString(model)
    neuron_steps = take_out_scans(proto) if take_out else []
    marked = mark_spike_convolutions(proto.graph, neuron_steps, tiles=tiles)
    if neuron_steps or marked:
        model = proto.SerializeToString()
    if marked:
        neuron_steps = [compared(neurons) for neurons in neuron_steps]
    options = _options()
    with temporary_folder() as folder:
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    name_apart(optimised.graph)
    kinds = _kinds(optimised)
    native_nodes = put_spike_convolutions(optimised.graph, marked, kinds, tiles=tiles)
    if (way := best_way()) is not None:
        wholes, images = WholeNumbers(optimised.graph, neuron_steps), 1 if states else 2  # a step in a call, or several
        native_nodes += put_int8_convolutions(optimised.graph, wholes, way, kinds, images)
    turn_bytes(optimised.graph)
    put_counts(optimised.graph, kinds, neuron_steps)
    native_nodes += fuse(optimised, kinds, neuron_steps, states)
    if not native_nodes:
        return None
    optimised.opset_import.append(helper.make_opsetid(native.DOMAIN, 1))
    made: bytes = optimised.SerializeToString()
    return made


def _kinds(model: onnx.ModelProto) -> dict[str, Kind]:
    """Type and shape of every tensor, as ONNX Runtime infers them."""
    light = without_weights(model, 2**14)
    there = {value.name for value in (*light.graph.initializer, *light.graph.input)}
    weights = {t.name: t for t in model.graph.initializer if t.name not in there}
    for name, t in weights.items():
        light.graph.input.append(helper.make_tensor_value_info(name, t.data_type, t.dims))
    given = {value.name for value in light.graph.output}
    names = dict.fromkeys(name for node in light.graph.node for name in node.output if name and name not in given)
    light.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = _options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(light.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = {}
    for value in (*session.get_inputs(), *session.get_outputs()):
        element = value.type.removeprefix("tensor(").removesuffix(")")
        if element in _ELEMENT_TYPES and value.name not in weights:
            found[value.name] = Kind(_ELEMENT_TYPES[element], tuple(value.shape))
    return found


def _options() -> Any:
    """Of a session that computes nothing."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
