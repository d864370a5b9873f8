"""Element-wise arithmetic of a graph in few passes over memory and convolutions of spikes, for ONNX Runtime on a CPU.

ONNX Runtime runs one operator after the other, and between two of them a tensor goes through memory. What stands
between two convolutions of a spiking network (scales of the currents, residual sums, leak, threshold and reset of
every step) is one operator here, in C, with the same bits, and others are its convolutions: of spikes where the
processor has AVX2 or AMX, of int8 where it has AMX. Model files do not know of them: they are put in when a model
is loaded, into the graph that ONNX Runtime has optimised for the machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetdeploy.native.graphs import Kind

DOMAIN = "ai.tetdeploy"
_ELEMENT_TYPES = {"float": 1, "uint8": 2, "int8": 3, "bool": 9}  # in ONNX's numbering


def library() -> Path | None:
    """The compiled operators; None where they could not be compiled at installation."""
    found = importlib.util.find_spec("tetdeploy.native._operators")
    return Path(found.origin) if found is not None and found.origin else None


def missing() -> str | None:
    """Why there is no native operator here, and what to do; None if there is.

    Raises:
        ValueError: TETDEPLOY_NATIVE is neither 0 nor 1.
    """
    switch = os.environ.get("TETDEPLOY_NATIVE") or "1"
    if switch not in ("0", "1"):
        raise ValueError(
            f"TETDEPLOY_NATIVE is {switch!r}; it must be 0, which switches the native operator off, or 1, as when unset"
        )
    if switch == "0":
        return "the native operator is switched off by TETDEPLOY_NATIVE=0"
    if library() is None:
        return "the native operator was not compiled: install a C compiler (GCC or Clang), then tetdeploy again"
    if importlib.util.find_spec("onnx") is None:
        return "the native operator needs the package onnx: pip install onnx"
    return None


def has_tiles() -> bool:
    """Whether the processor and the system let this process multiply int8 in tiles (AMX)."""
    return bool(_ask("has_tiles"))


def vector_bytes() -> int:
    """How long the vector registers are that additions of spikes may use: 64 with AVX-512, 32 with AVX2, or 16."""
    return _ask("vector_bytes")


def _ask(what: str) -> int:
    path = library()
    return int(ctypes.CDLL(str(path))[what]()) if path is not None else 0


def fuse_model(model: bytes) -> bytes | None:
    """`model` as ONNX Runtime optimises it, with nodes of `library()` for its element-wise regions and, where
    the processor has what they need, its convolutions of spikes and of int8; None of one without.

    Raises:
        OSError: no temporary file can be written.
        Exception: ONNX Runtime's own.
    """
    from tetdeploy.native.region_programs import UnfusableError

    try:
        return _fuse(model, take_out=b"Scan" in model)
    except UnfusableError:  # neurons between which more than sums depends on T
        return _fuse(model, take_out=False)


def use(ort: Any, options: Any) -> None:
    """Let a session with `options` open what `fuse_model` made."""
    options.register_custom_ops_library(str(library()))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # all is done


def _fuse(model: bytes, *, take_out: bool) -> bytes | None:
    import onnx
    import onnxruntime as ort

    from tetdeploy.native.regions import fuse
    from tetdeploy.native.scans import take_out_scans
    from tetdeploy.native.spikes import compared, mark_convolutions, put_convolutions
    from tetdeploy.native.tiles import use_tiles

    tiles, proto = has_tiles(), onnx.ModelProto.FromString(model)
    neuron_steps = take_out_scans(proto) if take_out else []
    marked = mark_convolutions(proto.graph, neuron_steps, tiles=tiles)
    if neuron_steps or marked:
        model = proto.SerializeToString()
    if marked:
        neuron_steps = [compared(neurons) for neurons in neuron_steps]
    options = _options(ort)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    kinds = _kinds(ort, onnx, optimised)
    native_nodes = put_convolutions(optimised.graph, marked, kinds, tiles=tiles)
    native_nodes += fuse(optimised, kinds, neuron_steps)
    if tiles:
        native_nodes += use_tiles(optimised.graph)
    if not native_nodes:
        return None
    optimised.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    made: bytes = optimised.SerializeToString()
    return made


def _kinds(ort: Any, onnx: Any, model: Any) -> dict[str, Kind]:
    """Type and shape of every tensor, as ONNX Runtime infers them."""
    from tetdeploy.native.graphs import Kind, without_weights

    light = without_weights(model, 2**14)
    there = {value.name for value in (*light.graph.initializer, *light.graph.input)}
    weights = {t.name: t for t in model.graph.initializer if t.name not in there}
    for name, t in weights.items():
        light.graph.input.append(onnx.helper.make_tensor_value_info(name, t.data_type, t.dims))
    given = {value.name for value in light.graph.output}
    names = dict.fromkeys(name for node in light.graph.node for name in node.output if name and name not in given)
    light.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = _options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(light.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = {}
    for value in (*session.get_inputs(), *session.get_outputs()):
        element = value.type.removeprefix("tensor(").removesuffix(")")
        if element in _ELEMENT_TYPES and value.name not in weights:
            found[value.name] = Kind(_ELEMENT_TYPES[element], tuple(value.shape))
    return found


def _options(ort: Any) -> Any:
    """Of a session that computes nothing."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
