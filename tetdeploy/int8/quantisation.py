"""Convolutions in 8-bit integers, with exact spikes.

A spike is 0 or 1 and loses nothing at scale 1, and neither does a sum of spikes, as a residual one. Weights take a
scale for each output channel, the output current one scale and zero point for the layer::

    W_q = round(W / s_w),  |W_q| <= 127        b_q = round(b / s_w), 32 bits
    a   = sum W_q s + b_q                      exact: whole numbers
    I_q = clip(round(a s_w / s_I) + z, 0, 255)
    I   = s_I (I_q - z)                        what the neurons integrate, in float32

so that only weights, biases and input currents round. `int8_conv` computes this in PyTorch bit for bit as ONNX Runtime
does: an int8 graph is checked against it. `fake_quantised_conv` computes it too, from weights in float32, and has
gradients to fine-tune them: those of the convolution without rounding (straight-through), zero where I_q is clipped.

The first layer, which reads the image, and the linear layers stay in floating point.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tetdeploy.arguments import check_flag
from tetdeploy.folding import (
    CONVOLUTIONS,
    MOVES,
    VIEWS,
    is_parameter,
    layer_name,
    module_path,
    overwritten,
    parameter,
    parameter_names,
    shares_memory,
)

aten = torch.ops.aten
_EXACT = 2**24  # whole numbers up to here are exact in float32
_LARGEST_BIAS = 2.0**30  # leaves room in 32 bits for the sums
_IN_CACHE = 2**18  # values; 1 MB, and as much while they are whole numbers


@dataclass(frozen=True)
class CurrentScale:
    """How a layer's output current rounds: I = scale (I_q - zero), I_q in 0..255."""

    scale: float
    zero: int

    @classmethod
    def covering(cls, low: float, high: float) -> CurrentScale:
        """The scale whose 256 values reach from low to high; 0 is one of them. It has 16 binary digits, so that a value
        is exact in float32, whether computed as s_I (I_q - z) or, as OpenVINO may do it, as s_I I_q - s_I z."""
        low, high = min(low, 0.0), max(high, 0.0)
        mantissa, exponent = math.frexp(max((high - low) / 255, 1e-8))
        scale = math.ldexp(math.ceil(mantissa * 2**16), exponent - 16)
        return cls(scale, int(np.clip(round(-low / scale), 0, 255)))


Scales = Mapping[str, CurrentScale]  # by the name of the convolution, see `spiking_convolutions`


def scales_sha256(scales: Scales) -> str:
    """What tells scales from others."""
    listed = sorted((name, current.scale, current.zero) for name, current in scales.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@torch.library.custom_op("tetdeploy::int8_conv", mutates_args=())
def int8_conv(
    spikes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    scale: float,
    zero: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The current of a quantised convolution, float32 [N, C', H', W'].

    Args:
        spikes: whole numbers, float32 [N, C, H, W].
        weight: int8 [C', C / groups, *kernel].
        weight_scale: float32 [C'].
        bias: int32 [C'].
        scale, zero: see `CurrentScale`.
    """
    sums = _sums(spikes, weight, stride, padding, dilation, groups)
    step = _scalar(scale, sums.device)
    factor = weight_scale / step
    for part in _in_cache(sums):
        _round(part, factor, bias).clamp_(-zero, 255 - zero).mul_(step)
    return sums


def _sums(spikes: Tensor, weight: Tensor, *places: Any) -> Tensor:
    """sum W_q s, to the last roundings of some kernels."""
    return _CONV[weight.dim() - 2](spikes.float(), weight.float(), None, *places)


def _scalar(value: float, device: torch.device) -> Tensor:
    """A float32 number on a device, filled in there: a copy from the host would make a GPU's step wait. (A Python float
    as divisor is not the same: on a GPU PyTorch multiplies by its reciprocal.)"""
    return torch.full((), value, dtype=torch.float32, device=device)


def _in_cache(values: Tensor) -> tuple[Tensor, ...]:
    """Values `[N, ...]` in the parts in which several operations, one after another, take least time: on a CPU so many
    images as stay in its caches."""
    if values.device.type != "cpu":
        return (values,)
    parts: tuple[Tensor, ...] = values.split(max(1, _IN_CACHE // max(1, values[:1].numel())))
    return parts


def _round(sums: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """I_q - z before it is clipped, float32, in place of `sums`; `factor` is s_w / s_I."""
    channels = _channels(sums.dim(), 1)
    # Every partial sum is a whole number below 2^24, which float32 holds exactly, in any order of summation; but some
    # kernels (Winograd's) multiply by fractions and miss a whole number by a little.
    whole = sums.copy_(sums.round_().to(torch.int32).add_(bias.view(channels)))
    return whole.mul_(factor.view(channels)).round_()


def _channels(dims: int, axis: int) -> list[int]:
    """The shape of a value for each channel, where channels are that axis."""
    return [-1 if k == axis else 1 for k in range(dims)]


@int8_conv.register_fake
def _(
    spikes: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, scale: float, zero: int, *places: Any
) -> Tensor:
    return _sums(spikes, weight, *places)


_CONV: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class _FakeQuantised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spikes: Tensor, weight: Tensor, bias: Tensor | None, scale: float, zero: int, *places: Any
    ) -> Tensor:
        quantised = _quantised(weight, bias)
        held, weight_scale, shift = quantised.values()
        rounded = _sums(spikes, held, *places)
        step = _scalar(scale, rounded.device)
        factor = weight_scale / step
        for part in _in_cache(rounded):
            _round(part, factor, shift)
        clipped = rounded.clamp(-zero, 255 - zero)
        ctx.save_for_backward(spikes, held, weight_scale, rounded == clipped)
        ctx.places = places
        return clipped.mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spikes, weight, weight_scale, inside = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.places
        held = weight.float() * weight_scale.view(_channels(weight.dim(), 0))
        grads = aten.convolution_backward(
            grad * inside, spikes, held, [len(held)], stride, padding, dilation, False, [0] * len(stride), groups,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return (*grads, *[None] * (2 + len(ctx.places)))


def fake_quantised_conv(
    spikes: Tensor, weight: Tensor, bias: Tensor | None, scale: float, zero: int, *places: Any
) -> Tensor:
    """`int8_conv` of weights and biases that are quantised here, with gradients for them and for the spikes.

    Args:
        spikes: whole numbers, float32 [N, C, H, W].
        weight: float32 [C', C / groups, *kernel].
        bias: float32 [C'].
        scale, zero: see `CurrentScale`.
        places: stride, padding, dilation and groups.
    """
    return _FakeQuantised.apply(spikes, weight, bias, scale, zero, *places)  # type: ignore[no-any-return, no-untyped-call]


class Int8Error(ValueError):
    """A network has nothing that could run in int8, a layer that cannot, or too few images to calibrate. What to do
    instead the caller knows."""


def quantise(graph_module: fx.GraphModule, scales: Scales, *, trainable: bool = False) -> list[str]:
    """Let the convolutions named in `scales` compute in 8 bits, in place. The network must be folded.

    Args:
        trainable: weights are quantised at each call, with gradients (`fake_quantised_conv`), not once and for all.

    Returns:
        Their names, in the order in which they run.

    Raises:
        Int8Error: one of them has sums too large for exact arithmetic.
    """
    check_flag("trainable", trainable)
    chosen = convolutions_with_scales(graph_module, scales)
    for node, name in chosen.items():
        _check_sums(name, node)
        replacement = _fake_quantised if trainable else _quantised_once
        with graph_module.graph.inserting_before(node):
            new = replacement(graph_module, node, scales[name])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return list(chosen.values())


def convolutions_with_scales(graph_module: fx.GraphModule, scales: Scales) -> dict[fx.Node, str]:
    """The convolutions that compute in 8 bits, in the order in which they run, with names."""
    return {node: name for node, name in spiking_convolutions(graph_module).items() if name in scales}


def spiking_convolutions(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """The convolutions that read spikes, or sums of some, and nothing else, in the order in which they run, with names.

    That is the name of the module, whichever call it is: a network's own loop over the steps calls it once a step. With
    other parameters (another BN behind it, or several convolutions in one module's code) it is numbered: `conv#2`.

    Not among them: those whose weights the network computes (parametrizations), or whose own padding differs by side.
    """
    found: dict[fx.Node, str] = {}
    names: dict[tuple[str, ...], str] = {}
    counted: Counter[str] = Counter()
    largest = _largest_inputs(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.target not in CONVOLUTIONS:
            continue
        own = (module_path(node), *parameter_names(node))
        if own not in names:
            names[own] = layer_name(node, counted)
        most = largest.get(node)
        exact = most == 1 or (most is not None and most * _largest_weights(node) < _EXACT)
        if exact and _has_parameters(node) and _padding(node) is not None:
            found[node] = names[own]
    return found


def _has_parameters(convolution: fx.Node) -> bool:
    return all(given is None or is_parameter(given) for given in convolution.args[1:3])


def _padding(convolution: fx.Node) -> list[int] | None:
    """A convolution's padding along each axis, also that of the name "same"; None if it is not alike on both sides."""
    _, weight, _, _, padding, dilation, _ = _arguments(convolution)
    kernel = list(weight.meta["val"].shape[2:])
    if padding == "valid":
        return [0] * len(kernel)
    if padding != "same":
        return _numbers(padding, len(kernel), 0)
    both = [d * (k - 1) for d, k in zip(_numbers(dilation, len(kernel), 1), kernel, strict=True)]
    return None if any(pads % 2 for pads in both) else [pads // 2 for pads in both]


def _arguments(convolution: fx.Node) -> list[Any]:
    """Input, weight, bias, stride, padding, dilation, groups; None for what the call leaves out."""
    return [*convolution.args, *[None] * (7 - len(convolution.args))]


def _places(convolution: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """A convolution's stride, padding, dilation and groups."""
    _, weight, _, stride, _, dilation, groups = _arguments(convolution)
    dims = weight.meta["val"].dim() - 2
    padding = _padding(convolution)
    assert padding is not None
    return _numbers(stride, dims, 1), padding, _numbers(dilation, dims, 1), groups or 1


def _check_sums(name: str, convolution: fx.Node) -> None:
    if (largest := _largest_weights(convolution)) >= _EXACT:
        raise Int8Error(f"{name} sums {largest // 127:,} weights, too many for exact 8-bit arithmetic")


def _largest_weights(convolution: fx.Node) -> int:
    """What the weights of an output may add up to."""
    return 127 * int(_arguments(convolution)[1].meta["val"].shape[1:].numel())


def _quantised_once(graph_module: fx.GraphModule, node: fx.Node, current: CurrentScale) -> fx.Node:
    spikes, weight, bias = _arguments(node)[:3]
    quantised = _quantised(parameter(graph_module, weight), None if bias is None else parameter(graph_module, bias))
    owner, holder = f"int8_{node.name}", nn.Module()
    for key, value in quantised.items():
        holder.register_buffer(key, value)
    graph_module.add_submodule(owner, holder)
    tensors = [graph_module.graph.get_attr(f"{owner}.{key}") for key in quantised]
    given = (spikes, *tensors, current.scale, current.zero, *_places(node))
    return graph_module.graph.call_function(torch.ops.tetdeploy.int8_conv.default, given)


def _fake_quantised(graph_module: fx.GraphModule, node: fx.Node, current: CurrentScale) -> fx.Node:
    given = (*_arguments(node)[:3], current.scale, current.zero, *_places(node))
    return graph_module.graph.call_function(fake_quantised_conv, given)


def _quantised(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """`weight` int8 with a scale for each output channel, symmetric; `bias` int32 at the same scales."""
    shift = weight.new_zeros(len(weight)) if bias is None else bias
    # Next to a bias that 32 bits cannot hold at the weights' own scale (a channel of zeros), the weights are nothing.
    largest = torch.maximum(weight.abs().flatten(1).amax(1) / 127, shift.abs() / _LARGEST_BIAS)
    scale = largest.clamp_min(1e-12).float()
    per_channel = scale.view(_channels(weight.dim(), 0))
    return {
        "weight": torch.round(weight / per_channel).to(torch.int8),
        "weight_scale": scale,
        "bias": torch.round(shift.double() / scale.double()).to(torch.int32),
    }


def _numbers(value: Any, dims: int, default: int) -> list[int]:
    """`[2]` is short for the same number along each axis, as a trace may have it (of 2 it has `[2, 2]`)."""
    numbers = [default] if value is None else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


_LARGEST_SUM = 127  # fits every target's bytes, and two times a weight fit 16 bits
_OF_TWO: dict[Any, Callable[[list[int]], int]] = {
    aten.add.Tensor: sum, aten.add_.Tensor: sum, aten.mul.Tensor: math.prod, aten.mul_.Tensor: math.prod,
    aten.maximum.default: max, aten.max.other: max, aten.minimum.default: min, aten.min.other: min,
}  # fmt: skip
_OF_LIST: dict[Any, Callable[[list[int]], int]] = {aten.cat.default: max, aten.stack.default: max}
_PARTS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_CLAMPS = (aten.clamp.default, aten.clamp_.default)
_MAXIMA = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
_HAND_ON = {
    *VIEWS, *MOVES, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.squeeze.dims,
    aten.flip.default, aten.roll.default, aten.repeat.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, *_MAXIMA,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
}  # fmt: skip


def _hands_on(node: fx.Node) -> bool:
    """Whether an operation only copies values, moves them, leaves some out, or puts zeros beside them."""
    if node.target is aten.pad.default:
        return not any(node.args[3:])  # the value, which is 0 without one, and which other modes than "constant" refuse
    if node.target is aten.to.dtype:
        return node.args[1] is torch.float32  # what a convolution in 8 bits reads
    if node.target is operator.getitem:
        parts: Any = node.args[0]
        return parts.target in _PARTS or (parts.target in _MAXIMA and bool(node.args[1] == 0))  # 1 is where they lie
    return node.target in _HAND_ON or node.target in _PARTS


def _largest_inputs(graph: fx.Graph) -> dict[fx.Node, int]:
    """By convolution, the largest that what it reads can be, where that is seen to be whole numbers from 0 to
    `_LARGEST_SUM`: spikes, and sums and products of spikes. Spikes may be written over before it reads them, or later.
    """
    largest: dict[fx.Node, int] = {}
    memory: dict[fx.Node, fx.Node] = {}  # the first of the values that may lie in the same
    read: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in CONVOLUTIONS and node.args[0] in largest:
            read[node] = largest[node.args[0]]
        found, over = _largest_of(node, largest), overwritten(node)
        memory[node] = memory[over[0] if over else node.args[0]] if shares_memory(node) else node
        lost = {memory[value] for value in over}
        largest = {value: most for value, most in largest.items() if memory[value] not in lost}
        if found is not None and found <= _LARGEST_SUM:
            largest[node] = found
    return read


def _largest_of(node: fx.Node, largest: Mapping[fx.Node, int]) -> int | None:
    """What follows for a value from those before it."""
    if node.target is operator.getitem:
        fired: Any = node.args[0]
        if fired.target is torch.ops.tetdeploy.lif.default:
            return 1 if node.args[1] == 0 else None
    if _is_boolean(node):  # a comparison of spikes, and of nothing else
        return 1 if all(value in largest for value in node.all_input_nodes) else None
    if _hands_on(node):
        return largest.get(node.args[0])  # type: ignore[arg-type]
    if node.target in _CLAMPS and not node.kwargs:
        return _clamped(largest.get(node.args[0]), *node.args[1:])  # type: ignore[arg-type]
    if node.target is aten.sub.Tensor and _is_either(node, largest):
        return 1
    if node.target is aten.rsub.Scalar:  # 1 - s: with a product it makes AND NOT of spikes
        is_one = node.args[1:] == (1,) and not node.kwargs
        return 1 if is_one and largest.get(node.args[0], 2) <= 1 else None  # type: ignore[arg-type]
    parts: Any = node.args if node.target in _OF_TWO else node.args[0] if node.target in _OF_LIST else ()
    known = [part if isinstance(part, int) else largest.get(part, -1) for part in parts]  # sum([a, b]) is 0 + a + b
    if not parts or min(known) < 0 or "alpha" in node.kwargs:  # of a sum
        return None
    return (_OF_TWO | _OF_LIST)[node.target](known)


def _is_boolean(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _clamped(most: int | None, low: Any = None, high: Any = None) -> int | None:
    """Whole numbers from 0 to `most`, cut off at a whole number: a sum of spikes becomes their OR."""
    if most is None or low not in (None, 0):
        return None
    if high is None:
        return most
    return min(most, int(high)) if isinstance(high, int | float) and high >= 0 and float(high).is_integer() else None


def _is_either(node: fx.Node, largest: Mapping[fx.Node, int]) -> bool:
    """Whether it is a + b - a b: OR of spikes a and b."""
    operands: Any = node.args
    total, both = operands
    if node.kwargs or total not in largest or both not in largest:  # a sum or product that was not written over
        return False
    is_pair = total.target is aten.add.Tensor and both.target is aten.mul.Tensor and {*total.args} == {*both.args}
    return is_pair and all(largest.get(spikes) == 1 for spikes in total.args)
