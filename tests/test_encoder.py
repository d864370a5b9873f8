"""What of a step graph depends on the image alone, in graphs of a few nodes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from tetdeploy.export.encoder import find_encoder, is_one_layer

FLOAT = ir.DataType.FLOAT


class Steps:
    """A step graph of an image and a membrane, both `[batch, 8]`, node by node."""

    def __init__(self) -> None:
        kind = ir.TensorType(FLOAT)
        self.image, self.u = (ir.Value(name=name, shape=ir.Shape(("batch", 8)), type=kind) for name in ("x", "u"))
        self.graph = ir.Graph([self.image, self.u], [], nodes=[], opset_imports={"": 20})

    def add(self, op: str, *given: ir.Value, shape: Any = ("batch", 8), dtype: ir.DataType = FLOAT) -> ir.Value:
        node = ir.node(op, given)
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(shape), dtype
        self.graph.append(node)
        return node.outputs[0]

    def fire(self, current: ir.Value) -> None:
        self.graph.outputs.append(self.add("Add", current, self.u))

    def encoder(self) -> list[str]:
        return [node.op_type for node in find_encoder(self.graph)]


def test_layers_up_to_the_first_membrane_are_the_encoder() -> None:
    steps = Steps()
    steps.fire(steps.add("Relu", steps.add("Gemm", steps.image)))
    assert steps.encoder() == ["Gemm", "Relu"]


def test_what_asks_for_the_size_of_the_batch_alone_is_not_encoded() -> None:
    steps = Steps()
    size = steps.add("Shape", steps.image, shape=(2,), dtype=ir.DataType.INT64)
    steps.fire(steps.add("Gemm", steps.image))
    steps.fire(steps.add("ConstantOfShape", size))
    assert steps.encoder() == ["Gemm"]


def test_views_at_the_end_are_taken_at_every_step() -> None:
    steps = Steps()
    steps.fire(steps.add("Unsqueeze", steps.add("Reshape", steps.add("Gemm", steps.add("Flatten", steps.image)))))
    assert steps.encoder() == ["Flatten", "Gemm"]


def test_a_view_that_a_layer_reads_and_others_too_is_taken_twice() -> None:
    steps = Steps()
    view = steps.add("Unsqueeze", steps.add("Gemm", steps.image), shape=(1, "batch", 8))
    steps.fire(steps.add("Gemm", steps.add("Squeeze", view)))
    steps.fire(view)
    assert steps.encoder() == ["Gemm", "Unsqueeze", "Squeeze", "Gemm"]
    of_image, of_view = (output.producer().inputs[0] for output in steps.graph.outputs)  # type: ignore[union-attr]
    assert of_image.producer().op_type == "Gemm"  # type: ignore[union-attr]
    assert of_view is not view and of_view.shape == view.shape  # type: ignore[union-attr]
    assert of_view.producer().op_type == "Unsqueeze"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        ("ReduceMax", (1, 8), FLOAT),
        ("Greater", ("batch", 8), ir.DataType.BOOL),
        ("Range", ("batch",), FLOAT),
        ("Relu", ("batch", "T"), FLOAT),
    ],
    ids=["over the batch", "bool", "no axis but the batch", "an open axis"],
)
def test_what_is_no_current_of_each_image_is_not_encoded(op: str, shape: Any, dtype: ir.DataType) -> None:
    steps = Steps()
    steps.fire(steps.add(op, steps.image, shape=shape, dtype=dtype))
    assert steps.encoder() == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_shapes_between_layers_belong_to_the_encoder_unless_others_read_them(elsewhere: bool) -> None:
    steps = Steps()
    first = steps.add("Gemm", steps.image)
    shape = steps.add("Shape", first, shape=(2,), dtype=ir.DataType.INT64)
    steps.fire(steps.add("Relu", steps.add("Reshape", first, shape)))
    if elsewhere:
        steps.fire(steps.add("Expand", steps.u, shape))
    assert steps.encoder() == ([] if elsewhere else ["Gemm", "Shape", "Reshape", "Relu"])


def test_two_layers_are_more_than_one() -> None:
    steps = Steps()
    steps.fire(steps.add("Relu", steps.add("Gemm", steps.image)))
    assert is_one_layer(find_encoder(steps.graph))
    steps = Steps()
    steps.fire(steps.add("Gemm", steps.add("Gemm", steps.image)))
    assert not is_one_layer(find_encoder(steps.graph))
