"""Leaky integrate-and-fire neurons (Eqs. 1-3) with the triangle surrogate gradient (Eq. 5).

Over T steps, with the membrane potential u(0) = 0 unless one is given, and t = 1..T::

    h(t) = tau u(t-1) + I(t)            (1)  integrate: the membrane before the reset
    s(t) = Theta(h(t) - v_th)           (2)  fire, strictly above the threshold
    u(t) = h(t) (1 - s(t))              (3)  hard reset to zero
    ds/dh = max(0, gamma - |h - v_th|) / gamma^2   (5)  in place of Theta's derivative

Equations: Deng et al., Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting, ICLR 2022.

The whole sequence is one operator, `torch.ops.tetdeploy.lif`. It shows up as one node in `torch.compile` and
`torch.export` (which is what the exporter lowers), its backward goes through the reset as well, and all it keeps for
backward is its own input: the membranes are integrated again there, bit for bit as in forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# Neurons are independent, so that on a CPU a slice of them is taken through all T steps while it lies in the cache:
# one pass over memory instead of one for each operation and step.
_CHUNK = 1 << 17


def membrane_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype membranes are kept in for currents of `dtype`: a half-precision membrane would flip spikes."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.library.custom_op("tetdeploy::lif", mutates_args=())
def _lif(current: Tensor, u: Tensor | None, tau: float, v_th: float, gamma: float) -> tuple[Tensor, Tensor]:
    spikes, u_last = _lif_outputs(current)
    current_, spikes_, u_ = _flat(current), _flat(spikes), u_last.view(-1)
    if fused := _fused(current):
        _start(u_, u, slice(None))
        number = _number(current)
        with fused.threads(torch.get_num_threads()):
            fused.forward(_rows(current_), u_.numpy(), spikes_.numpy(), number(tau), number(v_th))
        return spikes, u_last
    for part in _parts(u_):
        membrane = _start(u_, u, part)
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
    grad_current, grad_u = _lif_outputs(current)
    current_, grad_current_, grad_u_ = _flat(current), _flat(grad_current), grad_u.view(-1)
    grad_spikes_ = None if grad_spikes is None else _flat(grad_spikes)
    if fused := _fused(current):
        _start(grad_u_, grad_u_last, slice(None))
        start = _start(torch.empty_like(grad_u_), u, slice(None))
        incoming = current_[:0] if grad_spikes_ is None else grad_spikes_
        number = _number(current)
        arrays = (_rows(current_), start.numpy(), _contiguous(incoming), grad_u_.numpy(), grad_current_.numpy())
        with fused.threads(torch.get_num_threads()):
            fused.backward(*arrays, number(tau), number(v_th), number(gamma))
        return grad_current, grad_u
    for part in _parts(grad_u_):
        h = _membranes(current_[:, part], u, part, tau, v_th)
        g = _start(grad_u_, grad_u_last, part)  # dL/du(t)
        for t in reversed(range(len(h))):
            _step_backward(h[t], g, None if grad_spikes_ is None else grad_spikes_[t, part], v_th, gamma)
            grad_current_[t, part] = g  # dL/dh(t) = dL/dI(t)
            g.mul_(tau)  # Eq. 1: dL/du(t-1) = tau dL/dh(t)
    return grad_current, grad_u


def _membranes(current: Tensor, u: Tensor | None, part: slice, tau: float, v_th: float) -> Tensor:
    """h(t) for a slice of the neurons, `[T, neurons]`, by the very operations of forward."""
    h = torch.empty(current.shape, dtype=membrane_dtype(current.dtype), device=current.device)
    membrane = _start(torch.empty_like(h[0]), u, part, whole=False)
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


def _start(into: Tensor, given: Tensor | None, part: slice, *, whole: bool = True) -> Tensor:
    """The slice `part` of `into` (or all of `into`), filled from `given`, or with zeros."""
    view = into[part] if whole else into
    return view.zero_() if given is None else view.copy_(given.reshape(-1)[part])


def _fused(current: Tensor) -> Any:
    """The compiled kernels, where they serve: float32 and float64 on a CPU, with numba installed."""
    if current.device.type != "cpu" or current.dtype not in (torch.float32, torch.float64):
        return None
    try:
        from tetdeploy import fused
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return None  # the same results by torch operations, slower
    return fused


def _number(like: Tensor) -> Any:
    return np.float64 if like.dtype == torch.float64 else np.float32


def _rows(current: Tensor) -> Any:
    """`[T, M]`, or `[1, M]` where all steps are the same (direct encoding's repeated current)."""
    repeats = current.stride(0) == 0
    return _contiguous(current[:1] if repeats else current)


def _contiguous(sequence: Tensor) -> Any:
    return sequence.contiguous().numpy()


def _parts(neurons: Tensor) -> Iterator[slice]:
    step = _CHUNK if neurons.device.type == "cpu" else max(neurons.numel(), 1)
    return (slice(i, i + step) for i in range(0, neurons.numel(), step))


def _flat(sequence: Tensor) -> Tensor:
    return sequence.reshape(sequence.shape[0], -1) if sequence.dim() > 1 else sequence[:, None]


def _lif_outputs(current: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like the sequence and like one step's membrane, uninitialised."""
    sequence = torch.empty(current.shape, dtype=current.dtype, device=current.device)
    return sequence, torch.empty(current.shape[1:], dtype=membrane_dtype(current.dtype), device=current.device)


@_lif.register_fake
def _(current: Tensor, u: Tensor | None, tau: float, v_th: float, gamma: float) -> tuple[Tensor, Tensor]:
    return _lif_outputs(current)


@_lif_backward.register_fake
def _(
    current: Tensor,
    u: Tensor | None,
    grad_spikes: Tensor | None,
    grad_u_last: Tensor | None,
    tau: float,
    v_th: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    return _lif_outputs(current)


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


def lif(
    current: Tensor, u: Tensor | None = None, *, tau: float = 0.5, v_th: float = 1.0, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Run LIF neurons over a whole sequence (Eqs. 1-3); the gradient uses the triangle surrogate (Eq. 5).

    Nothing is detached: the gradient flows through the reset and through time. For backward one tensor is kept,
    `current` itself; in inference nothing is. With half-precision currents (autocast) the membrane is kept in float32.

    Args:
        current: pre-synaptic input I, `[T, ...]`, any floating dtype; time is axis 0, everything else are neurons.
        u: membrane potential to start from, `[...]`, in units of `current`; zero when None.
        tau: leak factor per step, in [0, 1]. (SpikingJelly's time constant is 1 / (1 - tau), with decay_input=False.)
        v_th: firing threshold, above 0. A neuron fires when h > v_th, strictly.
        gamma: half-width of the surrogate triangle round v_th, above 0.

    Returns:
        The spikes, 0 or 1, `[T, ...]` in the dtype of `current`, and the last membrane potential (after the reset),
        `[...]`, in float32 for half-precision currents and in the dtype of `current` otherwise.

    Raises:
        ValueError: T is 0, `current` is not floating point, `u` has another shape or device than one step, or a
            parameter is out of its range.
        RuntimeError: a second derivative, or forward-mode differentiation, is asked for.
    """
    _check_parameters(tau, v_th, gamma)
    if current.dim() == 0 or current.shape[0] == 0:
        raise ValueError(f"current must be [T, ...] with T of at least 1, got shape {list(current.shape)}")
    if not current.is_floating_point():
        raise ValueError(f"current must be floating point, got {current.dtype}; convert it with .float()")
    if u is not None:
        if u.shape != current.shape[1:]:
            raise ValueError(f"u must have the shape of one step, {list(current.shape[1:])}, got {list(u.shape)}")
        if u.device != current.device:
            raise ValueError(f"u lies on {u.device} and current on {current.device}; move one of them")
        u = u.to(membrane_dtype(current.dtype))
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(current, u)
    spikes, u_last = torch.ops.tetdeploy.lif(current, u, tau, v_th, gamma)
    return spikes, u_last


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, u(0) = 0 (Eqs. 1-5). Maps currents `[T, ...]` to spikes `[T, ...]`.

    Args and errors: see `lif`; a parameter out of its range raises ValueError.
    """

    def __init__(self, *, tau: float = 0.5, v_th: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        _check_parameters(tau, v_th, gamma)
        self.tau, self.v_th, self.gamma = float(tau), float(v_th), float(gamma)

    def forward(self, current: Tensor) -> Tensor:
        return self.with_state(current)[0]

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
    _require(0.0 <= tau <= 1.0, "tau", tau, "in [0, 1]; it is the leak factor per step, not a time constant")
    _require(0.0 < v_th < float("inf"), "v_th", v_th, "above 0 and finite")
    _require(0.0 < gamma < float("inf"), "gamma", gamma, "above 0 and finite")


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """torch gives a custom operator a forward-mode derivative of zero, silently."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("LIF neurons have no forward-mode derivative; use backward() or torch.autograd.grad")


def _require(holds: bool, name: str, value: float, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}; got {value}")
