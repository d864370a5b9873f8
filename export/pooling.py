"""Pooling as PyTorch does it, which ONNX describes otherwise or not at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from tetdeploy.folding import layer_name

from .onnx_tracer import module_name

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

    Raises:
        ValueError: so much padding would count in an average.
    """
    for node in model.graph:
        if node.op_type in ("MaxPool", "AveragePool") and node.attributes.get_int("ceil_mode"):
            _close(node)


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
    if pool.attributes.get_int("count_include_pad") and (needed > end).any():
        if begin.any() or end.any():
            raise ValueError(
                f"{module_name(pool)!r} averages in windows of ceil_mode of which ONNX has no count: set its ceil_mode "
                "or count_include_pad to False"
            )
        pool.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    pool.attributes["pads"] = ir.AttrInt64s("pads", [*begin.tolist(), *needed.tolist()])
    pool.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)
