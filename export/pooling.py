"""Pooling as PyTorch does it, which ONNX describes otherwise or not at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from tetdeploy.folding import layer_name

from .neuron_steps import FLOAT, Forms, StepBuilder

aten = torch.ops.aten
_AVERAGES = (aten.avg_pool2d.default, aten.avg_pool3d.default)
_DIVISOR = 6  # among their arguments


def refuse_divisors(graph: fx.Graph) -> None:
    """Refuse an average with a divisor of its own, which torch.onnx leaves out without a word.

    Raises:
        ValueError: a layer has one.
    """
    for node in graph.nodes:
        if node.target in _AVERAGES and (divisor := (*node.args, *[None] * 7)[_DIVISOR]) is not None:
            raise ValueError(
                f"{layer_name(node, Counter())!r} averages with divisor_override={divisor}, which ONNX has not: leave "
                f"it out and multiply the average by the size of the window over {divisor}"
            )


def close_windows(model: ir.Model) -> None:
    """PyTorch leaves out a window of ceil_mode that would begin behind the values, in the padding or past it; ONNX's
    shapes have it. Such a pool gets padding up to its last window, and ceil_mode goes.

    Where the padding of an average counts, it becomes values: what such a window has beyond its padding does not count,
    and OpenVINO counts it.
    """
    for node in list(model.graph):
        if node.op_type in ("MaxPool", "AveragePool") and node.attributes.get_int("ceil_mode"):
            if node.attributes.get_int("count_include_pad"):
                _pad(model.graph, node)
            _close(node)


def _pad(graph: ir.Graph, pool: ir.Node) -> None:
    """Put the padding of an average that counts it into what it reads."""
    value, pads = pool.inputs[0], list(pool.attributes.get_ints("pads", ()))
    pool.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    if not any(pads):
        return
    assert value is not None and value.shape is not None
    axes = len(pads) // 2
    before, after = ([0] * (len(value.shape) - axes) + part for part in (pads[:axes], pads[axes:]))
    build = StepBuilder(graph, pool, FLOAT, Forms())
    padded = build("Pad", value, build.ints(before + after))
    padded.type = value.type
    padded.shape = ir.Shape(
        [dim + sum(more) if any(more) else dim for dim, *more in zip(value.shape, before, after, strict=True)]
    )
    pool.replace_input_with(0, padded)
    pool.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))


def _close(pool: ir.Node) -> None:
    kernel = np.array(pool.attributes.get_ints("kernel_shape", ()))
    axes = len(kernel)
    stride, dilation = (np.array(pool.attributes.get_ints(name, [1] * axes)) for name in ("strides", "dilations"))
    begin, end = np.array(pool.attributes.get_ints("pads", [0] * 2 * axes)).reshape(2, axes)
    reach = dilation * (kernel - 1) + 1
    size, windows = reach - begin - end, np.ones(axes, np.int64)  # one window, where the number of steps is open
    shapes = (value.shape[-axes:] for value in (pool.inputs[0], pool.outputs[0]))  # type: ignore[union-attr,index]
    for axis, (before, after) in enumerate(zip(*shapes, strict=True)):
        if isinstance(before, int) and isinstance(after, int):
            size[axis], windows[axis] = before, after
        elif stride[axis] > 1:
            return
    if (windows == -((size + begin + end - reach) // -stride) + 1).all():
        return
    needed = np.maximum((windows - 1) * stride + reach - size - begin, 0)
    pool.attributes["pads"] = ir.AttrInt64s("pads", [*begin.tolist(), *needed.tolist()])
    pool.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
