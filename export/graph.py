"""Tracing: a network becomes an ONNX graph in which every neuron layer is still one node, `tetdeploy::LIF`.

What T is decides how the trace is taken: a number for the unrolled layout, one for the step layout, a dimension of the
input for the dynamic layout. What a LIF node becomes is `lowering`'s business.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor, fx, nn

from tetdeploy.folding import FoldingError, count_batchnorm, fold_batchnorm
from tetdeploy.networks import Classifier

from .int8 import CurrentScale, quantise, translate_int8_conv

Encoding = Literal["direct", "frames"]
OPSET, IR_VERSION, LIF_DOMAIN = 20, 10, "tetdeploy"
_SCOPES = "pkg.torch.onnx.name_scopes"


class _Boundary(nn.Module):
    """The network as the outside sees it: batch first, input normalised inside, mean and per-step logits out."""

    def __init__(self, classifier: Classifier, *, T: int | None, encoding: Encoding, step: bool) -> None:
        super().__init__()
        self.classifier, self.T, self.encoding, self.step = classifier, T, encoding, step

    def forward(self, x: Tensor, steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.encoding == "frames":
            frames = x.unsqueeze(0) if self.step else x.transpose(0, 1)
            logits = self.classifier(frames)
        else:
            logits = self.classifier(x, self.T if steps is None else steps.shape[1])
        per_step = logits.transpose(0, 1)
        return per_step.mean(1), per_step


def trace(
    classifier: Classifier,
    *,
    T: int | None,
    encoding: Encoding,
    step: bool,
    uint8: bool,
    fold_bn: bool,
    int8: Mapping[str, CurrentScale] | None = None,
) -> tuple[ir.Model, int]:
    """Trace a classifier in inference into an ONNX graph with LIF nodes and a dynamic batch.

    Args:
        T: number of steps; None makes it a dimension of the input (`steps [N, T]`, or the frames' own).
        encoding: `direct` for images `[N, C, H, W]`, `frames` for `[N, T, C, H, W]`.
        step: the step layout (T is 1): frames come one at a time, `[N, C, H, W]`.
        uint8: the graph takes uint8 pixels and normalises them; otherwise float32 that is normalised already.
        fold_bn: fold BN first (Eq. 6).
        int8: scales of the convolutions that compute in 8 bits.

    Returns:
        The graph, and how many BN were folded.

    Raises:
        ValueError: the network cannot be traced, or not with T left open; FoldingError from folding.
    """
    inputs, shapes = _example(classifier, T, encoding, step, uint8)
    with torch.no_grad(), quiet():
        program = _program(classifier, T, encoding, step, uint8)
        num_folded = count_batchnorm(program.graph) if fold_bn else 0
        if fold_bn:
            folded = _folded(program)
            quantise(folded, int8 or {})
            program = torch.export.export(folded, inputs, dynamic_shapes=shapes)
        model = _to_onnx(program, optimize=fold_bn)  # the optimiser would fold BN as well
    model.ir_version = IR_VERSION
    _name_boundary(model, T, encoding)
    return model, num_folded


def folded_module(classifier: Classifier, *, T: int, encoding: Encoding, uint8: bool) -> fx.GraphModule:
    """The network with BN folded, for PyTorch: `x [N, ...]` to the mean and the per-step logits `[N, T, K]`.

    Raises:
        ValueError: see `trace`.
    """
    with torch.no_grad(), quiet():
        return _folded(_program(classifier, T, encoding, False, uint8))


def _program(
    classifier: Classifier, T: int | None, encoding: Encoding, step: bool, uint8: bool
) -> torch.export.ExportedProgram:
    boundary = _Boundary(classifier, T=T, encoding=encoding, step=step).eval()
    inputs, shapes = _example(classifier, T, encoding, step, uint8)
    try:
        return torch.export.export(boundary, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds for what a network's code may do
        raise ValueError(_why_untraceable(error, T)) from error


def _folded(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program without BN; refusals name modules as the network does, without our boundary round it."""
    try:
        return fold_batchnorm(program)
    except FoldingError as error:
        raise FoldingError(str(error).replace("classifier.network.", "")) from error


def _to_onnx(program: torch.export.ExportedProgram, *, optimize: bool) -> ir.Model:
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=optimize,
            custom_translation_table={
                torch.ops.tetdeploy.lif.default: _translate_lif,
                torch.ops.tetdeploy.int8_conv.default: translate_int8_conv,
            },
            verbose=False,
        )
    except Exception as error:  # of the exporter's own kinds, some of them private
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"torch.onnx cannot export an operation of the network: {_first_line(cause)}") from error
    assert exported is not None
    model: ir.Model = exported.model
    return model


def is_of_network(node: ir.Node) -> bool:
    """Whether a node stems from the network, and not from the lowering of its neurons."""
    return _SCOPES in node.metadata_props


def module_name(node: ir.Node) -> str:
    """The network's own name of the module that a node stems from: `blocks.0.lif1`."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return path.removeprefix("classifier").removeprefix(".").removeprefix("network").removeprefix(".")


def _example(
    classifier: Classifier, T: int | None, encoding: Encoding, step: bool, uint8: bool
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Example inputs (a batch of 2) and which of their dimensions are dynamic."""
    batch, time = torch.export.Dim("batch"), torch.export.Dim("T")
    dtype = torch.uint8 if uint8 else torch.float32
    device = classifier.mean.device
    steps = T or 3
    if encoding == "frames" and not step:
        x = torch.zeros((2, steps, *classifier.image_shape), dtype=dtype, device=device)
        return (x,), ({0: batch, 1: time} if T is None else {0: batch},)
    x = torch.zeros((2, *classifier.image_shape), dtype=dtype, device=device)
    if T is not None:
        return (x,), ({0: batch},)
    return (x, torch.zeros((2, steps), dtype=torch.uint8, device=device)), ({0: batch}, {0: batch, 1: time})


def _why_untraceable(error: Exception, T: int | None) -> str:
    detail = _first_line(error)
    if T is None:
        return (
            "the network cannot be traced with the number of steps left open, which the dynamic layout needs; "
            f"use --layout unrolled. The reason: {detail}"
        )
    return f"torch.export cannot trace the network: {detail}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name_boundary(model: ir.Model, T: int | None, encoding: Encoding) -> None:
    """Inputs `x` and `steps`, outputs `logits [batch, K]` and `per_step [batch, T, K]`."""
    graph = model.graph
    for value, name in zip(graph.inputs, ("x", "steps"), strict=False):
        value.name = name
    for value, name in zip(graph.outputs, ("logits", "per_step"), strict=True):
        value.name = name
    x = graph.inputs[0]
    names = {x.shape[0]: "batch"}  # type: ignore[index]
    if T is None:
        names[(x if encoding == "frames" else graph.inputs[1]).shape[1]] = "T"  # type: ignore[index]
    inner = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *inner):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(dim, dim) for dim in value.shape])


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of its own internals and prints graphs; nothing a user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _lif_schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    return schema(
        "LIF",
        LIF_DOMAIN,
        1,
        doc="LIF neurons over a whole sequence (Eqs. 1-3); an intermediate form, no file holds it.",
        inputs=[
            schema.FormalParameter("current", "F"),
            schema.FormalParameter("u", "F", param_option=schema.FormalParameterOption.Optional),
        ],
        outputs=[schema.FormalParameter("spikes", "F"), schema.FormalParameter("u_last", "F")],
        type_constraints=[("F", ["tensor(float)"], "float32")],
        attributes=[schema.Attribute(name, schema.AttrType.FLOAT, required=True) for name in ("tau", "v_th")],
    )


onnx.defs.register_schema(_lif_schema())
_lif_opset = values.Opset(LIF_DOMAIN, 1)


def _translate_lif(current: Any, u: Any, tau: float, v_th: float, gamma: float) -> Any:
    return _lif_opset.LIF(current, u, tau=tau, v_th=v_th)
