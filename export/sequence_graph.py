"""The step graph as Triton runs it, which keeps what one request of a sequence writes for the sequence's next one.

Every input and output has the batch as its first axis, since the batch is made of whoever happens to wait, and every
state starts at zero. So the graph has, beside the membranes::

    sequence.t       [N, 1]        steps so far                                  becomes t + 1
    sequence.mean    [N, K]        the mean of their logits                      moves by (this step's - mean) / (t + 1)
    sequence.shown   [N, C, H, W]  the image of the step before, if not frames   becomes x

`logits` is the mean since the sequence began, as a `Stream` of the engine has it, up to rounding. A sum would not do:
TensorRT has no float64, and in float32 its mean is wrong by a hundredth after a million steps. The mean that moves is
exact to some 1e-5 then; from 2^24 steps on, where t + 1 = t, it forgets what is longer ago than that.

What a step graph is told by `encode`, this one finds out: the image's first layer is computed when a sequence of the
batch begins (t = 0) or shows another image (x != shown), and otherwise taken from `encoded.<k>`. A graph for a GPU has
neither `encode` nor `shown`.
"""

from __future__ import annotations

import json
from typing import Any

import onnx
from onnx import TensorProto, helper

from tetdeploy.storage.model_file import METADATA_KEY


def sequence_graph(step: onnx.ModelProto, metadata: dict[str, Any]) -> onnx.ModelProto:
    """A step graph with all of its state inside the batch. Its metadata have the layout `sequence`, and all states.

    Args:
        step: an exported graph of the step layout; stays as it is.
        metadata: of that graph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(step)
    graph = model.graph
    states = [*metadata["states"], *metadata["encoded"], *_mean(graph, len(metadata["class_names"]))]
    if metadata["encoded"]:
        states.append(_encode_what_is_new(graph, metadata["input"]["shape"]))
    described = metadata | {"layout": "sequence", "states": states, "encoded": []}
    helper.set_model_props(model, {METADATA_KEY: json.dumps(described)})
    onnx.checker.check_model(model, full_check=True)
    return model


def _mean(graph: onnx.GraphProto, K: int) -> list[dict[str, Any]]:
    """`logits` becomes the mean over the sequence; returns the states that this takes."""
    of_step = "sequence.step_logits"
    for node in graph.node:
        node.output[:] = [of_step if name == "logits" else name for name in node.output]
    t, mean = _state(graph, "sequence.t", [1]), _state(graph, "sequence.mean", [K])
    graph.node.extend(
        [
            helper.make_node("Constant", [], ["sequence.one"], value_float=1.0),
            helper.make_node("Add", [t["input"], "sequence.one"], [t["output"]]),
            helper.make_node("Sub", [of_step, mean["input"]], ["sequence.new"]),
            helper.make_node("Div", ["sequence.new", t["output"]], ["sequence.moves"]),
            helper.make_node("Add", [mean["input"], "sequence.moves"], [mean["output"]]),
            helper.make_node("Identity", [mean["output"]], ["logits"]),
        ]
    )
    return [t, mean]


def _encode_what_is_new(graph: onnx.GraphProto, image: list[int]) -> dict[str, Any]:
    """`encode` is computed, and no input any more; returns the state that this takes."""
    graph.input.remove(next(value for value in graph.input if value.name == "encode"))
    shown = _state(graph, "sequence.shown", image)
    same, all_same, least_t, kept, half = (f"sequence.{n}" for n in ("same", "all_same", "least_t", "kept", "half"))
    nodes = [
        helper.make_node("Cast", ["x"], [shown["output"]], to=TensorProto.FLOAT),
        helper.make_node("Equal", [shown["output"], shown["input"]], [f"{same}.bool"]),
        helper.make_node("Cast", [f"{same}.bool"], [same], to=TensorProto.FLOAT),
        helper.make_node("ReduceMin", [same], [all_same], keepdims=0),  # over pixels and sequences
        helper.make_node("ReduceMin", ["sequence.t"], [least_t], keepdims=0),
        helper.make_node("Mul", [all_same, least_t], [kept]),
        helper.make_node("Constant", [], [half], value_float=0.5),
        helper.make_node("Less", [kept, half], ["encode"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    return shown


def _state(graph: onnx.GraphProto, name: str, shape: list[int]) -> dict[str, Any]:
    dims = [graph.input[0].type.tensor_type.shape.dim[0].dim_param, *shape]
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    graph.output.append(helper.make_tensor_value_info(f"{name}_next", TensorProto.FLOAT, dims))
    return {"input": name, "output": f"{name}_next", "shape": shape}
