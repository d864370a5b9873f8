"""An exported model under OpenVINO, called as `Engine` and `Stream` call ONNX Runtime. Needs numpy and openvino."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.system.extras import import_extra

Array = NDArray[Any]
# What makes a sum or an average behind it one of float32, or of spikes; and shapes, which are no currents.
_ENDS = {"Add", "Convolution", "Greater", "GroupConvolution", "Less", "MatMul", "Maximum", "ShapeOf", "TensorIterator"}
_FIRES = {"Greater", "Less", "TensorIterator"}  # the last holds neurons over time
# What spikes go through, copied, moved, or written as other numbers.
_HAND_ON = {
    "Concat", "Convert", "MaxPool", "Multiply", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Subtract",
    "Transpose", "Unsqueeze",
}  # fmt: skip


class OpenVINOSession:
    """A compiled model on the CPU. Each thread has an inference request of its own, and they take turns.

    OpenVINO may choose bfloat16 or float16 for a float32 graph where the processor has them, and even without asking;
    both would change spikes, so it is held to float32.

    Args:
        model: bytes of the ONNX file, and of an overlay behind them.
        threads: of one operation; None leaves it to OpenVINO (all cores).
        name: of the model, for errors.

    Raises:
        ValueError: OpenVINO cannot read or compile it, or may compute it wrongly.
        MissingExtraError: openvino is not installed.
    """

    def __init__(self, model: bytes, threads: int | None, name: str) -> None:
        core = _core()
        self._name, self._local = name, threading.local()
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            read = core.read_model(model)
        except RuntimeError as error:
            fault = (
                "it has an operation that OpenVINO has not; run it with ONNX Runtime, for which --target cpu exports"
                if "FrontEnd API failed" in str(error)  # it could read the file
                else "not an ONNX model, a damaged one, or one that was exported for another runtime, then export "
                "again with --target openvino"
            )
            raise ValueError(f"OpenVINO cannot load {name}: {fault} ({_reason(error)})") from error
        operations = list(_operations(read))
        in_8_bits = any(node.get_type_name() == "FakeQuantize" for node in operations)
        if wrong := next(filter(None, (_wrong(node, in_8_bits) for node in operations)), None):
            raise ValueError(
                f"OpenVINO may compute {name} wrongly, as it has {wrong}: export it again with --target openvino, "
                "which writes this otherwise, or run it with ONNX Runtime"
            )
        try:
            self._compiled = core.compile_model(read, "CPU", options)
        except RuntimeError as error:
            raise ValueError(
                f"OpenVINO cannot compile {name}: --target openvino writes otherwise what is known to fail; if it was "
                f"exported so, run it with ONNX Runtime, for which --target cpu exports ({_reason(error)})"
            ) from error
        # One that is made of another, as by a padding of nothing, has both names once it is compiled.
        self._outputs = [output.any_name for output in read.outputs]
        self._metadata = dict(read.get_rt_info("framework").value) if read.has_rt_info("framework") else {}

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        """The outputs `names` of one call.

        Raises:
            ValueError: OpenVINO failed.
        """
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        try:
            outputs = self._local.request.infer(feed, share_inputs=True)
        except RuntimeError as error:
            shape = list(feed["x"].shape)
            raise ValueError(f"OpenVINO failed in {self._name} on x of shape {shape}: {_reason(error)}") from error
        return [np.asarray(outputs[name]) for name in names]

    def get_outputs(self) -> list[SimpleNamespace]:
        """The outputs, each with its `name` and its `shape`, in which None is any size."""
        return [
            SimpleNamespace(name=name, shape=[d.get_length() if d.is_static else None for d in o.partial_shape])
            for name, o in zip(self._outputs, self._compiled.outputs, strict=True)
        ]

    def get_modelmeta(self) -> SimpleNamespace:
        """What the ONNX file says of itself, as `custom_metadata_map`."""
        return SimpleNamespace(custom_metadata_map=self._metadata)


@cache
def _core() -> Any:
    """One for the whole process. OpenVINO's CPU plugin gives the thread a signal stack and, when the last model of a
    core goes, puts back what was there before: of two cores that may be the other's, freed, and the next signal
    (Ctrl-C) ends the process with a segmentation fault."""
    # OpenVINO would tell Google Analytics that it was imported, and keep an identifier in the home folder. It has no
    # switch for that but a file there; without this package it does neither.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_extra("openvino", "openvino").Core()


def _operations(model: Any) -> Iterator[Any]:
    """Of a model, and of the encoder that a step graph runs once for an image."""
    for node in model.get_ops():
        yield node
        if node.get_type_name() == "If":
            for branch in range(2):
                yield from _operations(node.get_function(branch))


def _wrong(node: Any, in_8_bits: bool) -> str | None:
    """What OpenVINO 2026.4 computes wrongly, if `node` is such a thing; `tetdeploy.export.openvino` has the reasons.

    Args:
        in_8_bits: the model has layers whose outputs are rounded to 8 bits.
    """
    if node.get_type_name() in ("ReduceSum", "ReduceMean"):
        value = node.input_value(0)
        three = value.get_partial_shape().rank == 3
        return "a sum of bytes with three axes" if in_8_bits and three and _is_bytes(value) else None
    if node.get_type_name() == "AvgPool" and _is_current(node.input_value(0)):
        return "an average of 8-bit currents"
    if node.get_type_name() == "Add":
        a, b = node.input_values()
        if (_is_current(a) and _is_spikes(b)) or (_is_current(b) and _is_spikes(a)):
            return "a sum of 8-bit currents and spikes"
        if any(_gives_few(value) and not _is_constant(other) for value, other in permutations((a, b))):
            return "a sum with a small convolution of one channel"
    if node.get_type_name() != "Convolution":
        return None
    given, kernel = node.get_attributes(), list(node.get_input_partial_shape(1))[2:]
    padded = any([*given["pads_begin"], *given["pads_end"]])
    if padded and max(given["strides"]) > 1 and all(size == 1 for size in kernel):
        return "a 1x1 convolution with a stride and padding"
    return None


def _gives_few(value: Any) -> bool:
    """Whether it is made of one channel by a convolution, with or without a bias, for nothing else: some 112 numbers in
    a call are the most that a sum left out."""
    node = value.get_node()
    readers = [reader.get_node().get_type_name() for reader in value.get_target_inputs()]
    if len(readers) - readers.count("ShapeOf") > 1:
        return False
    if node.get_type_name() == "Add":
        return any(_gives_few(a) and _is_constant(b) for a, b in permutations(node.input_values()))
    if node.get_type_name() != "Convolution":
        return False
    channels, *kernel = list(node.get_input_partial_shape(1))[1:]
    sizes = list(value.get_partial_shape())[1:]
    few = all(size.is_static for size in sizes) and prod(size.get_length() for size in sizes) < 256
    return few and channels == 1 and any(size != 1 for size in kernel)


def _is_constant(value: Any) -> bool:
    """Whether it is the same in any call, as a bias is, in 8 bits or not, which gets the axes of a layer's output."""
    node, inputs = value.get_node(), value.get_node().input_values()
    if node.get_type_name() in ("Constant", "ShapeOf"):
        return True
    return node.get_type_name() not in _ENDS and bool(inputs) and all(map(_is_constant, inputs))


def _is_current(value: Any) -> bool:
    """Whether it is made of 8 bits that a convolution's output was rounded to."""
    node = value.get_node()
    if node.get_type_name() == "FakeQuantize":
        return True
    return node.get_type_name() not in _ENDS and any(map(_is_current, node.input_values()))


def _is_bytes(value: Any) -> bool:
    """Whether it is made of bytes times a scale, and not cast to true and false since."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind in _ENDS or value.get_element_type().get_type_name() == "boolean":
        return False
    scaled = kind == "Multiply" and any(map(_is_unscaled, node.input_values()))
    return scaled or any(map(_is_bytes, node.input_values()))


def _is_unscaled(value: Any) -> bool:
    """Whether it is bytes as float32, or their distance from a zero."""
    node = value.get_node()
    if node.get_type_name() == "Subtract":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in ("u8", "i8")


def _is_spikes(value: Any) -> bool:
    """Whether it is what neurons fire, not their membranes, and no sum."""
    node = value.get_node()
    kind = node.get_type_name()
    return kind in _FIRES or (kind in _HAND_ON and _is_spikes(node.input_value(0)))


def _reason(error: RuntimeError) -> str:
    """The line of OpenVINO's report that says what is wrong, and not where in its sources."""
    lines = [type(error).__name__, *(line.strip() for line in str(error).splitlines() if line.strip())]
    found = [line for line in lines if line.startswith("Unsupported")] or [line for line in lines if line[:3] == "-- "]
    return (found or lines[-1:])[0].removeprefix("-- ")
