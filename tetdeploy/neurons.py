"""Leaky integrate-and-fire neurons (Eqs. 1-3) with the triangle surrogate gradient (Eq. 5).

Over T steps, with the membrane potential u(0) = 0 unless one is given, and t = 1..T::

    h(t) = tau u(t-1) + I(t)            (1)  integrate: the membrane before the reset
    s(t) = Theta(h(t) - v_th)           (2)  fire, strictly above the threshold
    u(t) = h(t) (1 - s(t))              (3)  hard reset to zero
    ds/dh = max(0, gamma - |h - v_th|) / gamma^2   (5)  in place of Theta's derivative

Equations: Deng et al., Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting, ICLR 2022.

The whole sequence is one operator, `torch.ops.tetdeploy.lif`. It shows up as one node in `torch.compile` and
`torch.export` (which is what the exporter lowers), its backward goes through the reset as well, and all it keeps for
backward is its own input, the currents and a u that was given: the membranes are integrated again there, bit for bit as
in forward.

Below stand the equations in torch operations, the reference, which runs anywhere. In their place run, with the same
bits, numba on a CPU and Triton on a GPU, each in one pass over memory (`tetdeploy.kernels`). On a GPU neurons are taken
in the order in which they lie in memory, and the spikes lie in that order: channels-last stays channels-last. On a CPU
spikes are contiguous: there a convolution's format may be chance, and networks call `view` on spikes. (Behind a BN that
is fused with the neurons, see `fused_bn`, they lie as what the convolution wrote.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tetdeploy import kernels
from tetdeploy.arguments import check_number, check_type

# Neurons are independent, so that on a CPU a slice of them is taken through all T steps while it lies in the cache:
# one pass over memory instead of one for each operation and step.
_CHUNK = 1 << 17


def membrane_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype membranes are kept in for currents of `dtype`: a half-precision membrane would flip spikes."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.library.custom_op("tetdeploy::lif", mutates_args=())
def _lif(current: Tensor, u: Tensor | None, tau: float, v_th: float, gamma: float) -> tuple[Tensor, Tensor]:
    spikes, u_last = _empty_sequence(current), _empty_step(current)
    order = _memory_order(current)
    current_, spikes_, u_last_ = _flat(current, order), _flat(spikes, order), _flat_step(u_last, order)
    u_ = None if u is None else _flat_step(u, order)
    if compiled := kernels.for_lif(current):
        compiled.forward(current_, u_, spikes_, u_last_, tau, v_th)
        return spikes, u_last
    for part in _parts(u_last_):
        membrane = _start(u_last_[part], u_, part)
        fired = torch.empty_like(membrane)
        for t in range(len(current_)):
            membrane.mul_(tau).add_(current_[t, part])
            torch.gt(membrane, v_th, out=fired)
            spikes_[t, part] = fired
            torch.addcmul(membrane, membrane, fired, value=-1, out=membrane)  # h - h s: h (1 - s) in one pass
    return spikes, u_last


@torch.library.custom_op("tetdeploy::lif_backward", mutates_args=())
def _lif_backward(
    current: Tensor,
    u: Tensor | None,
    grad_spikes: Tensor | None,
    grad_u_last: Tensor | None,
    tau: float,
    v_th: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    grad_current, grad_u = _empty_sequence(current), _empty_step(current)
    order = _memory_order(current)
    current_, grad_current_, grad_u_ = _flat(current, order), _flat(grad_current, order), _flat_step(grad_u, order)
    u_ = None if u is None else _flat_step(u, order)
    grad_spikes_ = None if grad_spikes is None else _flat(grad_spikes, order)
    grad_u_last_ = None if grad_u_last is None else _flat_step(grad_u_last, order)
    if compiled := kernels.for_lif(current):
        compiled.backward(current_, u_, grad_spikes_, grad_u_last_, grad_current_, grad_u_, tau, v_th, gamma)
        return grad_current, grad_u
    for part in _parts(grad_u_):
        h = _membranes(current_[:, part], u_, part, tau, v_th)
        g = _start(grad_u_[part], grad_u_last_, part)  # dL/du(t)
        for t in reversed(range(len(h))):
            _step_backward(h[t], g, None if grad_spikes_ is None else grad_spikes_[t, part], v_th, gamma)
            grad_current_[t, part] = g  # dL/dh(t) = dL/dI(t)
            g.mul_(tau)  # Eq. 1: dL/du(t-1) = tau dL/dh(t)
    return grad_current, grad_u


def _membranes(current: Tensor, u: Tensor | None, part: slice, tau: float, v_th: float) -> Tensor:
    """h(t) for a slice of the neurons, `[T, neurons]`, by the very operations of forward."""
    h = torch.empty(current.shape, dtype=membrane_dtype(current.dtype), device=current.device)
    membrane = _start(torch.empty_like(h[0]), u, part)
    fired = torch.empty_like(membrane)
    for h_t, current_t in zip(h, current, strict=True):
        torch.add(membrane.mul_(tau), current_t, out=h_t)
        torch.gt(h_t, v_th, out=fired)
        torch.addcmul(h_t, h_t, fired, value=-1, out=membrane)
    return h


def _step_backward(h: Tensor, g: Tensor, grad_spikes: Tensor | None, v_th: float, gamma: float) -> None:
    """Turn `g` from dL/du(t) into dL/dh(t), in place: g (1 - s) + (dL/ds - g h) ds/dh. Overwrites `h`."""
    into_spike = torch.mul(g, h).neg_()  # Eq. 3 by s
    if grad_spikes is not None:
        into_spike.add_(grad_spikes)
    g.sub_(g * (h > v_th))  # Eq. 3 by h
    surrogate = h.sub_(v_th).abs_().neg_().add_(gamma).clamp_min_(0.0)
    g.addcmul_(into_spike, surrogate, value=1.0 / gamma**2)


def _start(into: Tensor, given: Tensor | None, part: slice = slice(None)) -> Tensor:
    """`into`, filled from the slice `part` of `given`, or with zeros."""
    return into.zero_() if given is None else into.copy_(given[part])


def _parts(neurons: Tensor) -> Iterator[slice]:
    step = _CHUNK if neurons.device.type == "cpu" else max(neurons.numel(), 1)
    return (slice(i, i + step) for i in range(0, neurons.numel(), step))


def _memory_order(current: Tensor) -> list[int]:
    """The axes of one step, from the outermost in memory to the innermost; as they are where a step has gaps."""
    shape, strides = current.shape[1:], current.stride()[1:]
    if not current.is_cuda and kernels.by_triton(current) is None:
        return list(range(len(shape)))
    order = sorted(range(len(shape)), key=lambda axis: strides[axis], reverse=True)
    side_by_side = 1
    for axis in reversed(order):
        if strides[axis] != side_by_side and shape[axis] != 1:
            return list(range(len(shape)))
        side_by_side *= shape[axis]
    return order


def _flat(sequence: Tensor, order: list[int]) -> Tensor:
    """`[T, M]`, the neurons in that order; a copy only where they do not lie in it."""
    return sequence.permute(0, *(1 + axis for axis in order)).reshape(len(sequence), -1)


def _flat_step(step: Tensor, order: list[int]) -> Tensor:
    """`[M]` in the same order, side by side: a gradient may arrive as one number repeated."""
    return step.permute(order).reshape(-1).contiguous()


def _empty_sequence(current: Tensor) -> Tensor:
    """Uninitialised, like `current` in shape, dtype and memory format; its steps follow each other without gaps."""
    strides = (math.prod(current.shape[1:]), *_strides(current))
    return torch.empty_strided(current.shape, strides, dtype=current.dtype, device=current.device)


def _empty_step(current: Tensor) -> Tensor:
    """The same for one step's membranes."""
    dtype = membrane_dtype(current.dtype)
    return torch.empty_strided(current.shape[1:], _strides(current), dtype=dtype, device=current.device)


def _strides(current: Tensor) -> list[int]:
    strides, side_by_side = [1] * (current.dim() - 1), 1
    for axis in reversed(_memory_order(current)):
        strides[axis] = side_by_side
        side_by_side *= current.shape[1 + axis]
    return strides


@_lif.register_fake
@_lif_backward.register_fake
def _(current: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_sequence(current), _empty_step(current)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    current, u, ctx.tau, ctx.v_th, ctx.gamma = inputs
    ctx.set_materialize_grads(False)  # an unused u_last would bring a tensor of zeros
    ctx.save_for_backward(current, u)


def _gradients(ctx: Any, grad_spikes: Tensor | None, grad_u_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_spikes is None and grad_u_last is None:
        return None, None, None, None, None
    current, u = ctx.saved_tensors
    grads = torch.ops.tetdeploy.lif_backward(current, u, grad_spikes, grad_u_last, ctx.tau, ctx.v_th, ctx.gamma)
    return grads[0], None if u is None else grads[1], None, None, None


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("LIF neurons have no second derivative: the surrogate (Eq. 5) stands in for the first one only")


_lif.register_autograd(_gradients, setup_context=_keep)
_lif_backward.register_autograd(_refuse)


class _OnGpu(torch.autograd.Function):
    """The operator on a GPU, where no trace is to hold it and no recorder watches for it.

    A registered operator costs several microseconds a call more, and must write the last membranes, which are hardly
    ever wanted: in bfloat16 a fifth of forward's traffic at T = 4.
    """

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, u: Tensor | None, tau: float, v_th: float, gamma: float, wants_u: bool
    ) -> tuple[Tensor, Tensor | None]:
        _keep(ctx, (current, u, tau, v_th, gamma), None)
        order = _memory_order(current)
        spikes, u_last = _empty_sequence(current), _empty_step(current) if wants_u else None
        steps = [None if step is None else _flat_step(step, order) for step in (u, u_last)]
        compiled = kernels.by_triton(current)
        assert compiled is not None
        compiled.forward(_flat(current, order), steps[0], _flat(spikes, order), steps[1], tau, v_th)
        return spikes, u_last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or grads == (None, None):  # the operator refuses a second derivative
            return *_gradients(ctx, *grads), None
        current, u = ctx.saved_tensors
        order = _memory_order(current)
        grad_current, grad_u = _empty_sequence(current), _empty_step(current) if ctx.needs_input_grad[1] else None
        at_spikes = None if grads[0] is None else _flat(grads[0], order)
        steps = [None if step is None else _flat_step(step, order) for step in (u, grads[1], grad_u)]
        compiled = kernels.by_triton(current)
        assert compiled is not None
        compiled.backward(
            *(_flat(current, order), steps[0], at_spikes, steps[1], _flat(grad_current, order), steps[2]),
            *(ctx.tau, ctx.v_th, ctx.gamma),
        )
        return grad_current, grad_u, None, None, None, None


def lif(
    current: Tensor, u: Tensor | None = None, *, tau: float = 0.5, v_th: float = 1.0, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Run LIF neurons over a whole sequence (Eqs. 1-3); the gradient uses the triangle surrogate (Eq. 5).

    Nothing is detached: the gradient flows through the reset and through time. For backward `current` is kept, and
    `u` where it is given; in inference nothing is. With half-precision currents (autocast) the membrane is kept in
    float32.

    Args:
        current: pre-synaptic input I, `[T, ...]`, any floating dtype; time is axis 0, everything else are neurons.
        u: membrane potential to start from, `[...]`, in units of `current`; zero when None.
        tau: leak factor per step, in [0, 1]. (SpikingJelly's time constant is 1 / (1 - tau), with decay_input=False.)
        v_th: firing threshold, above 0. A neuron fires when h > v_th, strictly.
        gamma: half-width of the surrogate triangle round v_th, from 1e-18 to 1e18: float32 must hold its square.

    No gradient reaches tau, v_th and gamma: they are numbers. (docs/training.md has neurons that learn their tau.)

    Returns:
        The spikes, 0 or 1, `[T, ...]` in the dtype of `current`, and the last membrane potential (after the reset),
        `[...]`, in float32 for half-precision currents and in the dtype of `current` otherwise.

    Raises:
        ValueError: T is 0, `current` is no tensor or not floating point, `u` has another shape or device than one step,
            or a parameter is no number, out of its range or wants a gradient.
        RuntimeError: a second derivative, or forward-mode differentiation, is asked for.
    """
    _check_parameters(tau, v_th, gamma)
    spikes, u_last = _checked_lif(current, u, tau, v_th, gamma, wants_u=True)
    assert u_last is not None
    return spikes, u_last


def _checked_lif(
    current: Tensor, u: Tensor | None, tau: float, v_th: float, gamma: float, *, wants_u: bool
) -> tuple[Tensor, Tensor | None]:
    """`lif`; the last membrane may be None where it is not wanted."""
    check_type("current", current, Tensor, "pass torch.from_numpy(current)")
    if current.dim() == 0 or current.shape[0] == 0:
        raise ValueError(f"current must be [T, ...] with T of at least 1, got shape {list(current.shape)}")
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, got {current.dtype}; convert it with .float()")
    if u is not None:
        check_type("u", u, Tensor, "pass torch.from_numpy(u)")
        if u.shape != current.shape[1:]:
            raise ValueError(f"u must have the shape of one step, {list(current.shape[1:])}, got {list(u.shape)}")
        if u.device != current.device:
            raise ValueError(f"u lies on {u.device} and current on {current.device}; move one of them")
        u = u.to(membrane_dtype(current.dtype))
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(current, u)
        if kernels.by_triton(current) and not is_in_torch_dispatch_mode():
            gpu: tuple[Tensor, Tensor | None] = _OnGpu.apply(current, u, tau, v_th, gamma, wants_u)  # type: ignore[no-untyped-call]
            return gpu
    spikes, u_last = torch.ops.tetdeploy.lif(current, u, tau, v_th, gamma)
    return spikes, u_last


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, u(0) = 0 (Eqs. 1-5). Maps currents `[T, ...]` to spikes `[T, ...]`.

    Args and errors: see `lif`. A parameter that is out of its range or wants a gradient raises ValueError; for one that
    is set later, this happens when the neurons are called.
    """

    def __init__(self, *, tau: float = 0.5, v_th: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        _check_parameters(tau, v_th, gamma)
        self.tau, self.v_th, self.gamma = float(tau), float(v_th), float(gamma)

    def forward(self, current: Tensor) -> Tensor:
        self.check()
        return _checked_lif(current, None, self.tau, self.v_th, self.gamma, wants_u=False)[0]

    def check(self) -> None:
        """Refuse, with ValueError, a tau, v_th or gamma that was set later to what it must not be."""
        given: tuple[Any, ...] = self.tau, self.v_th, self.gamma
        wants_gradient = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        if wants_gradient or not torch.compiler.is_compiling():  # where a tensor has no number to compare
            _check_parameters(*given)

    def with_state(self, current: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spikes `[T, ...]` and the last membrane `[...]`, starting from `u`: for long sequences in pieces."""
        return lif(current, u, tau=self.tau, v_th=self.v_th, gamma=self.gamma)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, v_th={self.v_th}, gamma={self.gamma}"


class IF(LIF):
    """Integrate-and-fire neurons: LIF without a leak (tau = 1), as SEW-ResNet uses them."""

    def __init__(self, *, v_th: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__(tau=1.0, v_th=v_th, gamma=gamma)


def _check_parameters(tau: float, v_th: float, gamma: float) -> None:
    given: dict[str, Any] = {"tau": tau, "v_th": v_th, "gamma": gamma}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must be a number, got a {type(value).__name__}: the gradient does not reach it, so it could "
                f"not be learned; pass float({name}), made once in __init__"
            )
        check_number(name, value)
    _require(0.0 <= tau <= 1.0, "tau", tau, "in [0, 1]; it is the leak factor per step, not a time constant")
    _require(0.0 < v_th < float("inf"), "v_th", v_th, "above 0 and finite")
    _require(1e-18 <= gamma <= 1e18, "gamma", gamma, "from 1e-18 to 1e18; in float32 nothing is left of other squares")


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """torch gives a custom operator a forward-mode derivative of zero, silently."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("LIF neurons have no forward-mode derivative; use backward() or torch.autograd.grad")


def _require(holds: bool, name: str, value: float, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {value}")
