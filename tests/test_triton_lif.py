"""The Triton kernels against the plain PyTorch operations: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_helpers import device, kernel_calls, run_compiled, run_interpreted

from tetdeploy import kernels
from tetdeploy.export.recorder import NeuronRecorder
from tetdeploy.neurons import IF, LIF, lif

__all__ = ["device"]

HALF = [torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "expanded", "gaps", "steps_apart"]


def currents(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf `[T, ...]` with currents so strong that a good part of the neurons fires."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.3
    x = x.to(device=device, dtype=dtype)
    if layout == "channels_last":  # as a convolution in that format gives them
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    elif layout == "expanded":  # as direct encoding repeats one image
        x = x[:1].expand(shape)
    elif layout == "gaps":
        x = torch.stack([x, -x], dim=-1)[..., 0]
    elif layout == "steps_apart":
        x = torch.stack([x, -x], dim=1)[:, 0]
    return x.detach().requires_grad_()


def outcome(current: Tensor, u: Tensor | None, at: str, *, by_kernels: bool, **options: float) -> list[Tensor]:
    """Spikes, the last membrane, the gradients of current and u; by the kernels, or by PyTorch's own operations."""
    with pytest.MonkeyPatch.context() as patch:
        if not by_kernels:
            patch.setattr(kernels, "by_triton", lambda x: None)
            patch.setattr(kernels, "by_numba", lambda x: None)
        spikes, u_last = lif(current, u, **options)
        g = torch.Generator().manual_seed(2)
        arriving = [torch.randn(output.shape, generator=g).to(output) for output in (spikes, u_last)]
        chosen = {"spikes": slice(0, 1), "u_last": slice(1, 2), "both": slice(None)}[at]
        given = [current] if u is None else [current, u]
        gradients = torch.autograd.grad([spikes, u_last][chosen], given, arriving[chosen])
    return [spikes.detach(), u_last.detach(), *gradients]


def compare(current: Tensor, u: Tensor | None = None, at: str = "both", **options: float) -> Tensor:
    """The same bits forward, gradients to the precision of their dtype; gives the spikes."""
    with kernel_calls() as calls:
        got = outcome(current, u, at, by_kernels=True, **options)
    assert [name for name, _ in calls] == ["forward", "backward"]
    wanted = outcome(current, u, at, by_kernels=False, **options)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    for g, w in zip(got[2:], wanted[2:], strict=True):
        assert g.dtype == w.dtype
        eps = torch.finfo(g.dtype).eps
        scale = w.abs().max().item() if w.numel() else 0.0
        torch.testing.assert_close(g, w, rtol=4 * eps, atol=4e-7 * max(scale, 1.0))
    return got[0]


# ------------------------------------------------------------------------------------------- the comparisons


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 9, 16, 17, 33, 64])
def test_any_number_of_steps(T: int, device: str) -> None:
    u = torch.linspace(-1, 1, 37, device=device).requires_grad_()
    spikes = compare(currents((T, 37), "contiguous", torch.float32, device), u, tau=0.7)
    assert 0.1 < spikes.mean().item() < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_format_and_dtype(layout: str, dtype: torch.dtype, device: str) -> None:
    current = currents((4, 2, 3, 5, 7), layout, dtype, device)
    spikes = compare(current)
    assert spikes.dtype == dtype and 0.1 < spikes.float().mean().item() < 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 0), (5, 1, 1, 1), (3, 1025), (2, 3, 4099)])
def test_any_shape(shape: tuple[int, ...], device: str) -> None:
    compare(currents(shape, "contiguous", torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("at", ["spikes", "u_last", "both"])
@pytest.mark.parametrize("with_u", [False, True])
@pytest.mark.parametrize("T", [5, 20])
def test_gradients_that_are_missing_are_zero(T: int, at: str, with_u: bool, device: str) -> None:
    u = torch.randn(3, 11, device=device).requires_grad_() if with_u else None
    compare(currents((T, 3, 11), "contiguous", torch.float32, device), u, at, tau=0.3, v_th=0.7, gamma=1.6)


@pytest.mark.gpu
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 20),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, *HALF]),
    tau=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 1.0),
    v_th=st.floats(0.05, 4.0),
    gamma=st.floats(0.2, 5.0),
    with_u=st.booleans(),
    at=st.sampled_from(["spikes", "u_last", "both"]),
)
def test_any_case(
    device: str,
    T: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tau: float,
    v_th: float,
    gamma: float,
    with_u: bool,
    at: str,
) -> None:
    u = torch.full(shape, 0.5, device=device).requires_grad_() if with_u else None
    compare(currents((T, *shape), "contiguous", dtype, device), u, at, tau=tau, v_th=v_th, gamma=gamma)


@pytest.mark.gpu
def test_membranes_and_gradients_that_are_one_number_repeated_or_have_gaps(device: str) -> None:
    current = currents((4, 3, 5), "contiguous", torch.float32, device)
    for u in (torch.full((1, 1), 0.5, device=device).expand(3, 5), torch.rand(5, 3, 2, device=device)[..., 0].T):
        assert not u.is_contiguous()
        compare(current, u.detach().requires_grad_())
    spikes, u_last = lif(current)
    ones = torch.ones_like(spikes), torch.ones_like(u_last)
    wanted = torch.autograd.grad([spikes, u_last], current, ones, retain_graph=True)
    got = torch.autograd.grad(spikes.sum() + u_last.sum(), current)  # expanded from one number
    assert torch.equal(got[0], wanted[0]) and got[0].isfinite().all()


@pytest.mark.gpu
def test_a_neuron_fires_strictly_above_the_threshold(device: str) -> None:
    spikes, u = lif(torch.tensor([1.0, 0.5, 0.5 + 2**-23], device=device))  # 1.0 | 0.5 + 0.5 | ... just above 1.0
    assert spikes.tolist() == [0.0, 0.0, 1.0] and u.item() == 0.0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
def test_values_that_are_not_numbers_pass_as_in_pytorch(device: str) -> None:
    current = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]] * 3, device=device).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        got = [lif(current)[0], *torch.autograd.grad(lif(current)[0].sum(), current)]
        patch.setattr(kernels, "by_triton", lambda x: None)
        patch.setattr(kernels, "by_numba", lambda x: None)
        wanted = [lif(current)[0], *torch.autograd.grad(lif(current)[0].sum(), current)]
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
    assert got[1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("grad_mode", [True, False])
def test_channels_last_stays_so_and_nothing_is_copied(grad_mode: bool, device: str) -> None:
    current = currents((4, 2, 3, 5, 7), "channels_last", torch.float32, device)
    with torch.set_grad_enabled(grad_mode), kernel_calls() as calls:
        spikes, u_last = lif(current)
    assert spikes.stride() == current.stride() and u_last.stride() == current.stride()[1:]
    assert calls[0][1][0].data_ptr() == current.data_ptr() and calls[0][1][2].data_ptr() == spikes.data_ptr()
    if grad_mode:
        (gradient,) = torch.autograd.grad(spikes, current, torch.ones(spikes.shape, device=device))
        assert gradient.stride() == current.stride()


@pytest.mark.gpu
def test_steps_of_one_image_are_one_in_memory(device: str) -> None:
    current = currents((4, 2, 3), "expanded", torch.float32, device)
    with kernel_calls() as calls:
        lif(current)
    assert calls[0][1][0].stride(0) == 0 and calls[0][1][0].data_ptr() == current.data_ptr()


@pytest.mark.gpu
def test_only_the_current_is_kept_and_no_membrane_is_written_that_no_one_asked_for(device: str) -> None:
    current, kept = currents((4, 6), "contiguous", torch.float32, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), kernel_calls() as calls:
        spikes = LIF()(current)
        spikes.sum().backward()
    assert [x.data_ptr() for x in kept] == [current.data_ptr()]
    (_, forward), (_, backward) = calls
    assert forward[3] is None and backward[5] is None  # u_last, grad_u
    with torch.no_grad(), kernel_calls() as calls:
        LIF()(current)
    assert calls[0][1][3] is None


@pytest.mark.gpu
def test_the_layer_carries_its_membranes_from_launch_to_launch(device: str) -> None:
    """Though no one asked for the last of them."""
    current = currents((33, 37), "contiguous", torch.float32, device)
    wanted, got = lif(current, tau=0.7)[0], LIF(tau=0.7)(current)
    assert torch.equal(got, wanted)
    gradients = [torch.autograd.grad(spikes.sum(), current)[0] for spikes in (got, wanted)]
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_mode", [True, False])
def test_a_recorder_sees_the_neurons(grad_mode: bool, device: str) -> None:
    """That of the export's check; on a GPU it would miss what does not go through the operator."""
    current = currents((4, 6), "contiguous", torch.float32, device)
    with torch.set_grad_enabled(grad_mode), NeuronRecorder() as recorder:  # type: ignore[no-untyped-call]
        spikes = LIF()(current)
    assert [torch.equal(found, spikes) for found in recorder.spikes] == [True]


@pytest.mark.gpu
def test_pieces_with_state_are_the_whole(device: str) -> None:
    current, layer = currents((12, 3, 5), "contiguous", torch.float32, device), IF(v_th=1.5)
    whole, u_whole = layer.with_state(current)
    first, u = layer.with_state(current[:5])
    second, u = layer.with_state(current[5:], u)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(u, u_whole)
    (wanted,) = torch.autograd.grad(whole.sum() + u_whole.sum(), current)
    (got,) = torch.autograd.grad(first.sum() + second.sum() + u.sum(), current)
    assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_a_second_derivative_is_refused(device: str) -> None:
    current = torch.rand(3, 2, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad((lif(2 * current)[0] * current).sum(), current, create_graph=True)
    with pytest.raises(RuntimeError, match="LIF neurons have no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_float64_is_left_to_pytorch(device: str) -> None:
    with kernel_calls() as calls:
        _, u = lif(torch.full((2, 3), 0.1, dtype=torch.float64, device=device), tau=0.3)
    assert not calls and u.tolist() == [0.3 * 0.1 + 0.1] * 3


# ---------------------------------------------------------------------------------------------- without a GPU


def test_in_tritons_interpreter() -> None:
    run_interpreted(__file__)


COMPILE = """
from triton_helpers import ptx_for_h100
from tetdeploy.kernels import triton_lif

STATE = ("u", "u_last", "grad_u_last", "grad_u")
types = dict.fromkeys(STATE, "*fp32") | dict.fromkeys(("tau", "v_th", "gamma", "height"), "fp32")
types |= dict.fromkeys(("M", "stride", "stride_grad"), "i32")
for kernel in (triton_lif._forward, triton_lif._backward):
    for T, block in ((4, 1024), (16, 512 if kernel is triton_lif._backward else 1024)):
        for dtype, state, one in (("bf16", 0, 0), ("bf16", 1, 0), ("fp16", 0, 0), ("fp32", 0, 0), ("fp32", 1, 1)):
            constants = {"T": T, "BLOCK": block} | ({} if state else dict.fromkeys(STATE)) | ({"M": 1} if one else {})
            ptx = ptx_for_h100(kernel, dtype, types, constants)
            assert "mul.rn.f32" in ptx
            print(kernel.__name__, T, dtype, one or "ld.global.v" in ptx)
"""


def test_the_kernels_compile_for_an_h100_without_fused_multiply_adds() -> None:
    """What the interpreter does not see: types, tuples in loops, contraction; Triton compiles without a GPU."""
    lines = run_compiled(COMPILE)
    assert len(lines) == 20 and not any(line.endswith("False") for line in lines), lines  # several values a load


def test_on_a_cpu_spikes_are_contiguous_whatever_the_currents_are() -> None:
    """Convolutions of images with one channel may answer in channels-last, and networks call view on spikes."""
    current = currents((4, 2, 3, 5, 7), "channels_last", torch.float32, "cpu")
    spikes, u_last = lif(current)
    assert not current.is_contiguous() and spikes.is_contiguous() and u_last.is_contiguous()


ON_A_CPU = """
import sys, torch, warnings
from tetdeploy import kernels
from tetdeploy.neurons import LIF
LIF()(torch.ones(2, 3))
print("tetdeploy.kernels.triton_lif" in sys.modules)
sys.modules["triton"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kernels.triton_kernels() is None and kernels.triton_kernels() is None
(warning,) = caught
print(warning.message)
"""


def test_cpu_tensors_do_not_load_the_kernels_and_without_triton_that_is_said_once() -> None:
    done = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True, check=True)
    loaded, said = done.stdout.splitlines()
    assert loaded == "False"
    assert "Triton is not installed: LIF neurons run on the GPU by plain PyTorch operations" in said


WITHOUT_A_COMPILER = """
import torch, triton, warnings
from types import SimpleNamespace
from tetdeploy import kernels

class Driver:
    @property
    def utils(self):
        raise RuntimeError("Failed to find C compiler.")

triton.runtime.driver.set_active(Driver())
on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert kernels.by_triton(on_gpu) is None and kernels.by_triton(on_gpu) is None
(warning,) = caught
print(warning.message)
Driver.utils = None
kernels._triton_launches.cache_clear()
print(kernels.by_triton(on_gpu).__name__)
"""


def test_where_triton_cannot_build_its_launcher_plain_operations_run_and_that_is_said_once() -> None:
    said, found = run_compiled(WITHOUT_A_COMPILER)
    assert "Triton cannot launch kernels (Failed to find C compiler.): LIF neurons run on the GPU by plain" in said
    assert "it needs the driver, a C compiler and Python's headers" in said and found == "tetdeploy.kernels.triton_lif"
