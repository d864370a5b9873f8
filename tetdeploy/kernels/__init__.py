"""The compiled kernels of neurons, and which of them serve a tensor: Triton's on a GPU, numba's on a CPU.

|     | LIF          | BN, the residual sum and LIF |                                                |
| --- | ------------ | ---------------------------- | ---------------------------------------------- |
| GPU | `triton_lif` | `triton_bn_lif`              |                                                |
| CPU | `numba_lif`  | `numba_bn_lif`               | the functions they compile are `numba_kernels` |

`tetdeploy.neurons` has the equations in torch operations, whose results these have, and `tetdeploy.fused_bn` the layers
that are fused.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from tetdeploy.wording import first_line

_forked = False  # from a process with numba's kernels
_PLAIN = "LIF neurons run on the GPU by plain PyTorch operations, with the same results but slower and with more memory"


class LIFKernels(Protocol):
    """The LIF sequence `[T, M]`, the neurons in the order in which they lie in memory. What comes in as None is zero,
    what goes out as None is not wanted (numba's always write it)."""

    def forward(
        self, current: Tensor, u: Tensor | None, spikes: Tensor, u_last: Tensor | None, tau: float, v_th: float
    ) -> None: ...

    def backward(
        self,
        current: Tensor,
        u: Tensor | None,
        grad_spikes: Tensor | None,
        grad_u_last: Tensor | None,
        grad_current: Tensor,
        grad_u: Tensor | None,
        tau: float,
        v_th: float,
        gamma: float,
    ) -> None: ...


class BNLIFKernels(Protocol):
    """BN of `[N, C, H, W]`, a residual, and the LIF sequence of both."""

    def serves(self, y: Tensor, T: int) -> bool: ...

    def statistics(
        self,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        *,
        momentum: float,
        eps: float,
    ) -> Tensor: ...

    def forward(
        self,
        y: Tensor,
        norm: Tensor,
        residual: Tensor | None,
        residual_norm: Tensor | None,
        spikes: Tensor,
        tau: float,
        v_th: float,
    ) -> None: ...

    def backward(
        self,
        y: Tensor,
        norm: Tensor,
        residual: Tensor | None,
        residual_norm: Tensor | None,
        grad_spikes: Tensor,
        tau: float,
        v_th: float,
        gamma: float,
    ) -> tuple[Tensor, Tensor]: ...

    def norm_backward(
        self, g: Tensor, y: Tensor, norm: Tensor, sum_g: Tensor, sum_gx: Tensor, *, into: Tensor
    ) -> None: ...


def for_lif(x: Tensor) -> LIFKernels | None:
    """What runs the LIF sequence of currents like `x`; None: torch operations do."""
    return by_triton(x) or by_numba(x)


def for_bn_lif(x: Tensor) -> BNLIFKernels | None:
    """What runs BN, residual sum and LIF of tensors like `x`; None: the modules do."""
    if by_triton(x):
        from tetdeploy.kernels import triton_bn_lif

        return triton_bn_lif
    if by_numba(x) and type(x) in (Tensor, nn.Parameter):  # others may have no memory
        from tetdeploy.kernels import numba_bn_lif

        return numba_bn_lif
    return None


def by_triton(x: Tensor) -> LIFKernels | None:
    """Triton's, where they serve: float32 and half precision on a GPU, with Triton installed and able to launch."""
    if not x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    compiled = triton_kernels()
    return compiled if compiled is not None and _triton_launches() else None


def by_numba(x: Tensor) -> LIFKernels | None:
    """numba's, where they serve: see `numba_for`."""
    return numba_for(x.dtype) if x.device.type == "cpu" else None


def numba_for(dtype: torch.dtype) -> LIFKernels | None:
    """numba's, where they serve: float32, float64 and bfloat16, with numba installed, but not in a process that was
    forked from one with numba's kernels: OpenMP, which they run by, would end it."""
    if _forked or dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return None
    return _numba_kernels()


@cache
def triton_kernels() -> LIFKernels | None:
    """None without Triton, which is said once."""
    try:
        from tetdeploy.kernels import triton_lif
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        warnings.warn(
            f"Triton is not installed: {_PLAIN}; pip install triton (on Windows: triton-windows)", stacklevel=2
        )
        return None
    return triton_lif


@cache
def _triton_launches() -> bool:
    """Before its first launch Triton builds what launches, in C; where it cannot, as in a slim container, that is said
    once."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018 - builds it
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        warnings.warn(
            f"Triton cannot launch kernels ({first_line(error)}): {_PLAIN}; it needs the driver, a C compiler and "
            "Python's headers (on Debian and Ubuntu gcc and python3-dev)",
            stacklevel=2,
        )
        return False
    return True


@cache
def _numba_kernels() -> LIFKernels | None:
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return None  # the same results by torch operations, slower
    except ImportError as error:  # it refuses versions of NumPy that it does not know
        warnings.warn(f"neurons run by plain PyTorch operations, slower: numba says {error}", stacklevel=2)
        return None
    from tetdeploy.kernels import numba_lif

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)
    return numba_lif


def _note_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)  # torch's own use of OpenMP would wait for threads that are not there
