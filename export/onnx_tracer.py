"""A traced network as an ONNX graph in which every neuron layer is still one node, `tetdeploy::LIF`.

What T is decides how the trace is taken: a number for the unrolled layout, one for the step layout, a dimension of the
input for the dynamic layout. What a LIF node becomes is `lowering`'s business.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import rewriter, values
from onnxscript.optimizer import fold_constants
from torch import fx

from tetdeploy.data import Encoding
from tetdeploy.folding import count_batchnorm, layer_name
from tetdeploy.int8.quantisation import Scales, quantise
from tetdeploy.tracing import Tracer, quiet, reason
from tetdeploy.wording import first_line

from .half import halve
from .int8 import set_scales, translate_int8_conv
from .program import as_program, rewrite_global_pooling

aten = torch.ops.aten
OPSET, IR_VERSION, LIF_DOMAIN = 20, 10, "tetdeploy"
_SCOPES = "pkg.torch.onnx.name_scopes"
_RULES = "_DEFAULT_REWRITE_RULES"


class OnnxTracer:
    """ONNX graphs of a classifier in inference, with LIF nodes and a dynamic batch. Each trace is taken once, whatever
    the scales of int8: those go into a copy.

    Args:
        tracer: of the classifier. The graphs take images `[N, C, H, W]` or frames `[N, T, C, H, W]`, as it says.
        fold_bn: fold BN first (Eq. 6).
        half: the layers between neurons compute in float16.
    """

    def __init__(self, tracer: Tracer, *, fold_bn: bool, half: bool = False) -> None:
        self.tracer, self._fold_bn, self._half = tracer, fold_bn, half
        self._programs: dict[tuple[Any, ...], tuple[torch.onnx.ONNXProgram, list[str]]] = {}

    def graph(self, T: int | None, *, step: bool, int8: Scales | None = None) -> tuple[ir.Model, int]:
        """A graph of its own, optimised, and how many BN were folded.

        Args:
            T: number of steps; None makes it a dimension of the input (`steps [N, T]`, or the frames' own).
            step: the step layout (T is 1): frames come one at a time, `[N, C, H, W]`.
            int8: scales of the convolutions that compute in 8 bits.

        Raises:
            ValueError: the network cannot be traced, or not with T left open; FoldingError from folding.
        """
        key = (T, step, *(int8 or ()))
        if key not in self._programs:
            self._programs[key] = self._trace(T, step, int8 or {})
        traced, rounded = self._programs[key]
        program = torch.onnx.ONNXProgram(traced.model.clone(), traced.exported_program)
        set_scales(program.model, [(int8 or {})[name] for name in rounded])
        self._optimise(program, T)
        program.model.ir_version = IR_VERSION
        _name_boundary(program.model, T, self.tracer.encoding)
        _complete_shapes(program.model.graph)
        num_folded = count_batchnorm(self.tracer.program(T, step=step).graph) if self._fold_bn else 0
        return program.model, num_folded

    def _trace(self, T: int | None, step: bool, int8: Scales) -> tuple[torch.onnx.ONNXProgram, list[str]]:
        """The trace, not optimised, and by which of the scales each convolution in 8 bits rounds."""
        tracer, rounded = self.tracer, []
        program = tracer.program(T, step=step)
        if self._fold_bn:
            folded = tracer.folded(T, step=step)
            with torch.no_grad(), quiet():
                rounded = quantise(folded, int8)
                if self._half:
                    halve(folded)
                program = as_program(folded, program) or _exported_again(folded, *tracer.example(T, step))
        return _to_onnx(program), rounded

    def _optimise(self, program: torch.onnx.ONNXProgram, T: int | None) -> None:
        try:
            with torch.no_grad(), quiet():
                if self._fold_bn:
                    _tell_apart(program.model.graph)
                    with _fewer_rules(program.model.graph):
                        program.optimize()
                else:  # TensorRT wants constants; the optimiser would fold BN as well
                    fold_constants(program.model, onnx_shape_inference=True)
        except Exception as error:  # the optimiser's own, of what it cannot read in a graph
            if T is None:
                self.tracer.program(3)  # if it cannot be traced with so many either, it says why
            way_out = "; use --layout unrolled" if T is None else ""
            causes = ": ".join(map(first_line, _causes(error)[-2:]))
            raise ValueError(f"the network's ONNX graph cannot be optimised: {causes}{way_out}") from error


@contextmanager
def _fewer_rules(graph: ir.Graph) -> Iterator[None]:
    """Let the optimiser try each of its rules on nodes of the one operation that it is for, and leave out the rule that
    makes a Split of two slices without steps, where no two such read the same: `x[a:b]` has steps.

    It tries some fifty rules on each node, and that rule goes through all nodes each time, which is more than half of
    the time that a transformer with some thousands takes. onnxscript has no option for either; where its table of rules
    is not found, all are tried.
    """
    rules = getattr(rewriter, _RULES, None)
    if rules is None:
        yield
        return
    sliced = Counter(node.inputs[0] for node in graph if node.op_type == "Slice" and len(node.inputs) < 5)
    in_pairs = max(sliced.values(), default=0) > 1
    setattr(rewriter, _RULES, tuple(_where_it_fits(rule) for rule in rules if rule.name != "SlicesSplit" or in_pairs))
    try:
        yield
    finally:
        setattr(rewriter, _RULES, rules)


def _where_it_fits(rule: Any) -> Any:
    """The rule, asked of nodes of the operation that its pattern ends with and of no others, which it cannot match. Of
    onnxscript's own each would keep the graph that it was asked of last, with all weights."""
    pattern, fitting = getattr(rule, "_target_pattern", None), copy.copy(rule)
    if pattern is None:
        return rule
    last, *_ = pattern.output_nodes
    if hasattr(rule, "_matcher"):
        fitting._matcher = copy.copy(rule._matcher)
    asked = fitting.try_rewrite

    def try_rewrite(model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        return asked(model, graph, node, **options) if last.op.matches(node.op_type) else None

    fitting.try_rewrite = try_rewrite
    return fitting


def _tell_apart(graph: ir.Graph) -> None:
    """Number the LIF nodes: of two layers that read the same current, the optimiser would make one."""
    for number, node in enumerate(node for node in graph if node.domain == LIF_DOMAIN):
        node.attributes["number"] = ir.AttrInt64("number", number)


def _exported_again(folded: fx.GraphModule, inputs: Any, shapes: Any) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(folded, inputs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds
        raise ValueError(
            "torch.export cannot trace the network once more as it is exported: put each BN right behind its "
            "convolution or linear layer, in one OverTime, or take another --layout, --precision or --no-fold-bn. The "
            f"reason: {reason(error)}"
        ) from error


def _to_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    _make_bounds_alike(program.graph)
    _rewrite_unbiased_conv3d(program.graph)
    rewrite_global_pooling(program.graph)
    try:
        with torch.no_grad(), quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                custom_translation_table={
                    torch.ops.tetdeploy.lif.default: _translate_lif,
                    torch.ops.tetdeploy.int8_conv.default: translate_int8_conv,
                },
                verbose=False,
            )
    except Exception as error:  # of the exporter's own kinds, some of them private
        raise ValueError(_why_not_onnx(error, program.graph)) from error
    assert exported is not None
    return exported


_CLAMPS = (aten.clamp.default, aten.clamp_.default, aten.clip.default, aten.clip_.default)


def _make_bounds_alike(graph: fx.Graph) -> None:
    """Of a whole number and a fraction, as in `clamp(x, -1, 1.5)`, torch.onnx knows no clamp."""
    for node in graph.nodes:
        x, *bounds = node.args or (None,)
        if node.target in _CLAMPS and any(isinstance(bound, float) for bound in bounds):
            node.args = (x, *(float(bound) if isinstance(bound, int) else bound for bound in bounds))


def _rewrite_unbiased_conv3d(graph: fx.Graph) -> None:
    """torch.onnx gives a conv3d without a bias one of the wrong shape; the same convolution by its general name not."""
    defaults: tuple[Any, ...] = (None, None, None, [1] * 3, [0] * 3, [1] * 3, 1)
    for node in graph.nodes:
        if node.target is aten.conv3d.default:
            given = (*node.args, *defaults[len(node.args) :])
            if given[2] is None:
                node.target, node.args = aten.convolution.default, (*given[:6], False, [0] * 3, given[6])


def _why_not_onnx(error: BaseException, graph: fx.Graph) -> str:
    """Which layer torch.onnx cannot translate, and its reason."""
    causes = _causes(error)
    found = re.search(r"translating node %(\w+)", "\n".join(map(str, causes)))
    named = [layer_name(node, Counter()) for node in graph.nodes if found and node.name == found[1]]
    layer = repr(named[0]) if named and named[0] != "network" else "an operation of the network"
    way_out = ""
    if found and "adaptive_max_pool" in found[1]:
        way_out = "; for one value a channel write x.amax((2, 3)), or choose sizes that divide those of its input"
    return f"torch.onnx cannot export {layer}: {first_line(causes[-1])}{way_out}"


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def is_of_network(node: ir.Node) -> bool:
    """Whether a node stems from the network, and not from the lowering of its neurons."""
    return _SCOPES in node.metadata_props


def module_name(node: ir.Node) -> str:
    """The network's own name of the module that a node stems from: `blocks.0.lif1`."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return path.removeprefix("classifier").removeprefix(".").removeprefix("network").removeprefix(".")


def _name_boundary(model: ir.Model, T: int | None, encoding: Encoding) -> None:
    """Inputs `x` and `steps`, outputs `logits [batch, K]` and `per_step [batch, T, K]`."""
    graph = model.graph
    for value, name in zip(graph.inputs, ("x", "steps"), strict=False):
        value.name = name
    for value, name in zip(graph.outputs, ("logits", "per_step"), strict=True):
        value.name = name
    x = graph.inputs[0]
    names = {str(x.shape[0]): "batch"}  # type: ignore[index]
    if T is None:
        names[str((x if encoding == "frames" else graph.inputs[1]).shape[1])] = "T"  # type: ignore[index]
    symbol = re.compile(rf"\b({'|'.join(names)})\b")  # by itself, or in the length of merged axes
    inner = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *inner):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    dim if isinstance(dim, int) or dim.value is None else symbol.sub(lambda m: names[m[0]], dim.value)
                    for dim in value.shape
                ]
            )


def _complete_shapes(graph: ir.Graph) -> None:
    """Work out the one axis that a Reshape to `[-1, ...]`, or a Transpose behind it, may leave open, as in
    pixel_unshuffle: ONNX's own inference multiplies no symbols."""
    for node in graph:
        if node.op_type not in ("Reshape", "Transpose") or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or before.is_static() or before.has_unknown_dim() or after is None:
            continue
        known = [dim for axis, dim in enumerate(after) if not after.is_unknown_dim(axis)]
        if len(known) == len(after) - 1:
            size: Any = math.prod(before) / math.prod(known)  # of symbols, perhaps a number
            axes = [size.evaluate({}) if after.is_unknown_dim(axis) else dim for axis, dim in enumerate(after)]
            node.outputs[0].shape = ir.Shape(axes)


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
