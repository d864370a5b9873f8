"""Neurons: membranes by hand, a naive autograd loop in float64, what is kept, compile and export, refusals."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tetdeploy import kernels, neurons
from tetdeploy.layers import OverTime
from tetdeploy.neurons import IF, LIF, lif

# torch.export copies its own tree specifications in a way that it deprecates itself
exports = pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning")


class Spike(torch.autograd.Function):
    """Theta(h - v_th) with the triangle of Eq. 5 as its derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, v_th: float, gamma: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.v_th, ctx.gamma = v_th, gamma
        return (h > v_th).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        return grads[0] * (ctx.gamma - (h - ctx.v_th).abs()).clamp(min=0) / ctx.gamma**2, None, None


def naive(
    current: Tensor, u: Tensor | None = None, *, tau: float = 0.5, v_th: float = 1.0, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Eqs. 1-3 as they stand, one step after the other; autograd does the rest."""
    membrane = torch.zeros_like(current[0]) if u is None else u
    spikes = []
    for current_t in current:
        h = tau * membrane + current_t
        spikes.append(Spike.apply(h, v_th, gamma))
        membrane = h * (1 - spikes[-1])
    return torch.stack(spikes), membrane


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """The compiled kernels, or the torch operations that stand in where they do not serve."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "operations":
            patch.setattr(kernels, "by_numba", lambda x: None)
        else:
            assert kernels.by_numba(torch.zeros(1)) is not None
        yield


both_kernels = pytest.mark.parametrize("name", ["numba", "operations"])


@pytest.fixture(params=["numba", "operations"])
def _either_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernel(request.param):
        yield


by_either_kernel = pytest.mark.usefixtures("_either_kernel")


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- by hand -----------------------------------------------------------------------------------------------------


@by_either_kernel
def test_membranes_worked_out_by_hand() -> None:
    #  h = 0.75 | 0.375 + 0.75 = 1.125, fires | 0 + 0.5 | 0.25 + 0.5 = 0.75
    current = column(0.75, 0.75, 0.5, 0.5)
    steps = [lif(current[: t + 1]) for t in range(4)]
    assert [u.item() for _, u in steps] == [0.75, 0.0, 0.5, 0.75]
    assert steps[-1][0].tolist() == [0.0, 1.0, 0.0, 0.0]


@by_either_kernel
def test_a_neuron_fires_strictly_above_the_threshold() -> None:
    above = math.nextafter(1.0, 2.0)
    spikes, u = lif(column(1.0, 0.5, above - 0.5))  # 1.0 | 0.5 + 0.5 = 1.0 | 0.5 + ... just above 1.0
    assert spikes.tolist() == [0.0, 0.0, 1.0]
    assert u.item() == 0.0


@by_either_kernel
def test_reset_is_to_zero_whatever_was_above_the_threshold() -> None:
    spikes, u = lif(column(100.0, 0.25))
    assert (spikes.tolist(), u.item()) == ([1.0, 0.0], 0.25)


@by_either_kernel
def test_negative_membranes_leak_and_are_not_clipped() -> None:
    spikes, u = lif(column(-4.0, 0.0, 2.0))  # -4 | -2 | -1 + 2 = 1
    assert (spikes.tolist(), u.item()) == ([0.0, 0.0, 0.0], 1.0)


@by_either_kernel
def test_threshold_and_leak_are_those_given() -> None:
    spikes, u = lif(column(0.25, 0.25, 0.25), tau=0.75, v_th=0.5)  # 0.25 | 0.4375 | 0.578..., fires
    assert (spikes.tolist(), u.item()) == ([0.0, 0.0, 1.0], 0.0)


@by_either_kernel
def test_gradient_worked_out_by_hand() -> None:
    """T = 2, h = (0.75, 1.125), s = (0, 1). Triangles: 1 - 0.25 = 0.75 and 1 - 0.125 = 0.875.

    L = s(2): dL/dh(2) = 0.875. u(1) = h(1) (1 - s(1)), so du(1)/dh(1) = 1 - h(1) 0.75 = 0.4375 (the reset counts);
    dL/dh(1) = 0.875 tau 0.4375.
    """
    current = column(0.75, 0.75).requires_grad_()
    lif(current)[0][1].backward()
    assert current.grad is not None
    assert current.grad.tolist() == [0.875 * 0.5 * 0.4375, 0.875]


@by_either_kernel
def test_gradient_of_a_neuron_at_the_threshold_that_did_not_fire() -> None:
    """T = 2, h = (1, 0.75), s = (0, 0), gamma = 2. Triangles: 2 / 4 = 0.5 and 1.75 / 4 = 0.4375.

    L = s(2): dL/dh(2) = 0.4375; du(1)/dh(1) = 1 - h(1) 0.5 = 0.5.
    """
    current = column(1.0, 0.25).requires_grad_()
    lif(current, gamma=2.0)[0][1].backward()
    assert current.grad is not None
    assert current.grad.tolist() == [0.4375 * 0.5 * 0.5, 0.4375]


@by_either_kernel
def test_if_neurons_do_not_leak() -> None:
    current = torch.full((4, 3), 0.375)
    assert IF()(current)[:, 0].tolist() == [0.0, 0.0, 1.0, 0.0]  # 0.375 | 0.75 | 1.125, fires | 0.375
    assert LIF()(current).sum() == 0.0  # never above 0.75
    assert isinstance(IF(), LIF) and (IF().tau, IF().v_th, IF().gamma) == (1, 1, 1)
    assert (IF(v_th=2.0).v_th, IF(gamma=0.5).gamma) == (2, 0.5)


# --- a naive autograd loop ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    T: int
    shape: tuple[int, ...]
    layout: str
    tau: float
    v_th: float
    gamma: float
    with_u: bool
    gradient_at: str
    seed: int

    @property
    def options(self) -> dict[str, float]:
        return {"tau": self.tau, "v_th": self.v_th, "gamma": self.gamma}

    def draw(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A leaf that `seen` makes the current of, u, and the gradients that arrive at spikes and u_last."""
        g = torch.Generator().manual_seed(self.seed)
        like = {"generator": g, "dtype": torch.float64}
        steps = 1 if self.layout == "expanded" else self.T
        leaf = self.v_th * (2 * torch.randn(steps, *self.shape, **like) + 0.5)
        u = self.v_th * torch.randn(self.shape, **like) if self.with_u else None
        return leaf, u, torch.randn(self.T, *self.shape, **like), torch.randn(self.shape, **like)

    def seen(self, leaf: Tensor) -> Tensor:
        """The current as the neurons get it: `[T, ...]`."""
        if self.layout == "expanded":  # as direct encoding gives it: one image at every step
            return leaf.expand(self.T, *self.shape)
        if self.layout == "transposed":  # the last axis first in memory
            return leaf.movedim(0, -1).contiguous().movedim(-1, 0)
        if self.layout == "strided":
            return torch.stack([leaf, -leaf], dim=-1)[..., 0]
        return leaf


cases = st.builds(
    Case,
    T=st.integers(1, 8),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    layout=st.sampled_from(["contiguous", "expanded", "transposed", "strided"]),
    tau=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 1.0),
    v_th=st.sampled_from([1.0]) | st.floats(0.05, 10.0),
    gamma=st.sampled_from([1.0]) | st.floats(0.2, 5.0),
    with_u=st.booleans(),
    gradient_at=st.sampled_from(["spikes", "u_last", "both"]),
    seed=st.integers(0, 2**31),
)


def run(
    neuron: Callable[..., tuple[Tensor, Tensor]], case: Case
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Outputs of `neuron`, and the gradients of the leaf under the current and of u."""
    leaf, u, at_spikes, at_u_last = case.draw()
    leaf.requires_grad_()
    if u is not None:
        u.requires_grad_()
    spikes, u_last = neuron(case.seen(leaf), u, **case.options)
    objective = torch.zeros((), dtype=torch.float64)
    if case.gradient_at in ("spikes", "both"):
        objective = objective + (spikes * at_spikes).sum()
    if case.gradient_at in ("u_last", "both"):
        objective = objective + (u_last * at_u_last).sum()
    objective.backward()
    return (spikes.detach(), u_last.detach()), (leaf.grad, None if u is None else u.grad)


def assert_gradients_equal(got: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> None:
    """To 1e-12 of the largest gradient: a product over steps amplifies and cancels, as the naive loop's own does."""
    scale = max((w.abs().max().item() for w in wanted if w is not None and w.numel()), default=0.0)
    for g, w in zip(got, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12 * max(scale, 1.0))


@both_kernels
@settings(max_examples=200)
@given(case=cases)
def test_equal_to_a_naive_autograd_loop(name: str, case: Case) -> None:
    with kernel(name):
        (spikes, u_last), gradients = run(lif, case)
    (naive_spikes, naive_u_last), naive_gradients = run(naive, case)
    assert torch.equal(spikes, naive_spikes)
    assert torch.equal(u_last, naive_u_last)
    assert_gradients_equal(gradients, naive_gradients)


@both_kernels
def test_the_layer_has_the_gradient_of_its_own_settings(name: str) -> None:
    """Called as networks call it, without a membrane."""
    case = Case(5, (3, 4), "contiguous", 0.25, 0.9, 1.5, False, "spikes", 1)
    with kernel(name):
        (spikes, _), gradients = run(lambda current, u, **options: (LIF(**options)(current), current[0]), case)
    (naive_spikes, _), naive_gradients = run(naive, case)
    assert torch.equal(spikes, naive_spikes) and spikes.any()
    assert_gradients_equal(gradients, naive_gradients)


def test_the_property_is_not_empty() -> None:
    """The cases above do fire, reset and have gradients through the reset."""
    case = Case(6, (4, 4), "contiguous", 0.5, 1.0, 1.0, True, "u_last", 0)
    (spikes, _), (gradient, of_u) = run(lif, case)
    assert 0.2 < spikes.mean().item() < 0.8
    assert gradient is not None and of_u is not None
    fired = spikes[-1] > 0  # u_last is 0 there: only the surrogate through the reset carries a gradient
    assert gradient[-1][fired].count_nonzero() > 0


@settings(max_examples=30)
@given(cut=st.lists(st.integers(1, 8), max_size=3, unique=True).map(sorted), seed=st.integers(0, 2**31))
def test_a_sequence_in_pieces_with_state_is_the_whole(cut: list[int], seed: int) -> None:
    case = Case(9, (3, 5), "contiguous", 0.7, 1.0, 2.0, True, "both", seed)

    def in_pieces(current: Tensor, u: Tensor | None, **options: float) -> tuple[Tensor, Tensor]:
        layer, spikes = LIF(**options), []
        for part in current.tensor_split(cut):
            s, u = layer.with_state(part, u)
            spikes.append(s)
        assert u is not None
        return torch.cat(spikes), u

    (spikes, u_last), gradients = run(lif, case)
    (in_pieces_spikes, in_pieces_u), in_pieces_gradients = run(in_pieces, case)
    assert torch.equal(in_pieces_spikes, spikes)
    assert torch.equal(in_pieces_u, u_last)
    assert_gradients_equal(in_pieces_gradients, gradients)


@both_kernels
@pytest.mark.parametrize("chunk", [1, 7, 24, None])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_more_neurons_than_one_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, layout: str, name: str
) -> None:
    shape = (4, 6) if chunk else (3, neurons._CHUNK // 2)
    if chunk:
        monkeypatch.setattr(neurons, "_CHUNK", chunk)
    assert chunk == 24 or math.prod(shape) > neurons._CHUNK
    case = Case(3, shape, layout, 0.5, 1.0, 1.0, True, "both", 0)
    with kernel(name):
        outputs, gradients = run(lif, case)
    naive_outputs, naive_gradients = run(naive, case)
    assert all(map(torch.equal, outputs, naive_outputs))
    assert_gradients_equal(gradients, naive_gradients)


def test_both_kernels_give_the_same_bits_in_float32() -> None:
    current, u = torch.randn(5, 3, 70, 41), torch.rand(3, 70, 41)
    results = []
    for name in ("numba", "operations"):
        with kernel(name):
            results.append(lif(current, u, tau=0.3, v_th=0.7))
    assert all(map(torch.equal, *results))
    assert 0.1 < results[0][0].mean() < 0.9


def test_gradient_is_that_of_the_stand_in_whose_slope_is_the_triangle() -> None:
    """Over one step the spike's gradient is autograd's of S, the smooth step whose derivative Eq. 5 is."""
    v_th, gamma = 0.8, 0.6
    h = torch.linspace(-1, 3, 401, dtype=torch.float64).requires_grad_()
    z = ((h - v_th) / gamma).clamp(-1, 1)
    stand_in = 0.5 + z - z * z.abs() / 2
    assert (stand_in[0].item(), stand_in[-1].item()) == (0.0, 1.0)  # a whole step: the triangle's area is 1
    (wanted,) = torch.autograd.grad(stand_in.sum(), h)
    (got,) = torch.autograd.grad(lif(h[None], v_th=v_th, gamma=gamma)[0].sum(), h)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_gradcheck_where_no_membrane_is_near_the_threshold() -> None:
    """There the surrogate is zero and u_last really is differentiable: finite differences must agree."""
    current = column(0.3, 5.0, 0.2, -0.4, 0.3)[:, None] * column(1.0, -1.0, 0.5)
    inputs = (current.requires_grad_(), column(0.1, 0.2, -0.3).requires_grad_())
    assert lif(*inputs)[0].sum() > 0
    assert torch.autograd.gradcheck(lambda c, u: lif(c, u, gamma=1e-3)[1], inputs)


# --- dtypes ------------------------------------------------------------------------------------------------------


@by_either_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_currents_have_float32_membranes(dtype: torch.dtype) -> None:
    """The membrane is that of a float32 loop; a membrane in the currents' own precision would flip spikes."""
    current = (2 * torch.randn(6, 20_000)).to(dtype).requires_grad_()
    reference = current.detach().float().requires_grad_()
    spikes, u_last = lif(current)
    naive_spikes, naive_u = naive(reference)
    assert (spikes.dtype, u_last.dtype) == (dtype, torch.float32)
    assert torch.equal(spikes.float(), naive_spikes)
    assert torch.equal(u_last, naive_u)
    in_half = naive(current.detach())[0]
    assert not torch.equal(in_half, spikes.detach())
    at_spikes = torch.randn(6, 20_000).to(dtype)
    (spikes * at_spikes).sum().backward()
    (naive_spikes * at_spikes.float()).sum().backward()
    assert current.grad is not None and reference.grad is not None
    torch.testing.assert_close(current.grad, reference.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_spikes_are_those_of_a_float32_loop_on_the_bf16_currents() -> None:
    linear, layer, x = nn.Linear(20, 30), LIF(), torch.randn(5 * 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        current = 3 * linear(x).unflatten(0, (5, 8))
        spikes, u_last = layer.with_state(current)
    assert (current.dtype, spikes.dtype, u_last.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    naive_spikes, naive_u = naive(current.float())
    assert torch.equal(spikes.float(), naive_spikes) and naive_spikes.sum() > 0
    assert torch.equal(u_last, naive_u)
    parameters = tuple(linear.parameters())
    got = torch.autograd.grad(spikes.float().square().sum() + u_last.sum(), parameters, retain_graph=True)
    wanted = torch.autograd.grad(naive_spikes.square().sum() + naive_u.sum(), parameters)
    for g, w in zip(got, wanted, strict=True):
        assert w.abs().max() > 0
        torch.testing.assert_close(g, w, rtol=0.02, atol=0.02 * w.abs().max().item())  # gradients pass through bf16


def test_a_given_membrane_takes_the_membranes_dtype() -> None:
    u = torch.full((2,), 0.25, dtype=torch.float16, requires_grad=True)
    current = torch.full((1, 2), 0.5, dtype=torch.bfloat16)
    _, u_last = lif(current, u)
    assert u_last.tolist() == [0.625, 0.625] and u_last.dtype == torch.float32
    u_last.sum().backward()
    assert u.grad is not None
    by_hand = 0.5 * (1 - 0.625 * 0.625)  # tau (1 - h ds/dh), at |h - v_th| = 0.375
    assert (u.grad.dtype, u.grad.tolist()) == (torch.float16, [by_hand, by_hand])
    finer = torch.full((2,), 0.25 + 2**-12)  # than the currents' own
    assert lif(current, finer)[1].tolist() == [0.625 + 2**-13] * 2


@by_either_kernel
def test_the_operator_takes_a_membrane_of_another_dtype() -> None:
    """As it gets one in a network that was traced in float32 and then turned to float64."""
    current, u = torch.randn(5, 40, dtype=torch.float64).requires_grad_(), torch.rand(40)
    results = []
    for start in (u, u.double()):
        spikes, u_last = torch.ops.tetdeploy.lif(current, start, 0.3, 0.7, 1.5)
        (gradient,) = torch.autograd.grad(spikes.sum() + u_last.sum(), current)
        results.append((spikes, u_last, gradient))
    assert all(map(torch.equal, *results))


# --- what is kept for backward -----------------------------------------------------------------------------------


def saved_by(neuron: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        neuron()
    return saved


def test_one_tensor_of_the_size_of_the_input_is_kept_the_input_itself() -> None:
    current = torch.randn(6, 4, 3).requires_grad_()
    (kept,) = saved_by(lambda: LIF()(current))
    assert kept.untyped_storage().data_ptr() == current.untyped_storage().data_ptr()
    assert len(saved_by(lambda: naive(current))) > 6  # the hook does see what a loop keeps


def test_with_a_given_membrane_that_is_kept_beside_it() -> None:
    current, u = torch.randn(6, 4, 3).requires_grad_(), torch.randn(4, 3)
    assert [list(kept.shape) for kept in saved_by(lambda: lif(current, u))] == [[6, 4, 3], [4, 3]]


def test_of_a_repeated_current_only_one_step_is_kept() -> None:
    current = torch.randn(4, 3).requires_grad_()
    (kept,) = saved_by(lambda: LIF()(current.expand(6, 4, 3)))
    assert kept.untyped_storage().nbytes() == current.untyped_storage().nbytes()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_nothing(mode: Callable[[], Any]) -> None:
    current = torch.randn(6, 4, 3, requires_grad=True)
    with mode():
        assert saved_by(lambda: LIF()(current)) == []
        assert not LIF()(current).requires_grad
    assert saved_by(lambda: LIF()(current.detach())) == []


def test_inputs_are_left_as_they_were() -> None:
    current, u = torch.randn(6, 4).requires_grad_(), torch.randn(4).requires_grad_()
    before = current.detach().clone(), u.detach().clone()
    spikes, u_last = lif(current, u)
    (spikes.sum() + u_last.sum()).backward()
    assert torch.equal(current, before[0]) and torch.equal(u, before[1])


# --- compile and export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("with_u", [False, True])
def test_compiled_equals_eager(backend: str, with_u: bool) -> None:
    torch._dynamo.reset()
    case = Case(4, (3, 5), "contiguous", 0.25, 0.9, 1.5, with_u, "both", 1)
    outputs, gradients = run(lif, case)
    compiled_outputs, compiled_gradients = run(torch.compile(lif, backend=backend, fullgraph=True), case)
    assert all(map(torch.equal, compiled_outputs, outputs))
    assert_gradients_equal(compiled_gradients, gradients)


def test_compiled_for_any_T_and_batch() -> None:
    torch._dynamo.reset()
    layer = LIF()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T, N in ((4, 3), (2, 3), (7, 5)):
        current = torch.randn(T, N, 6)
        assert torch.equal(compiled(current), layer(current))


def test_compiled_with_other_parameters() -> None:
    """Which torch.compile then leaves open."""
    torch._dynamo.reset()
    compiled, current = torch.compile(lif, backend="eager", fullgraph=True), torch.randn(4, 6)
    for tau in (0.5, 0.25, 0.75):
        assert torch.equal(compiled(current, tau=tau)[0], lif(current, tau=tau)[0])


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = LIF(tau=0.25, v_th=0.75)

    def forward(self, current: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        spikes, u_last = self.lif.with_state(2 * current, u)
        return spikes, u_last + 1


@exports
@pytest.mark.parametrize("with_u", [False, True])
def test_exported_it_is_one_node_and_equals_eager(with_u: bool) -> None:
    inputs = (torch.randn(4, 3, 5), torch.randn(3, 5))[: 1 + with_u]
    batch, time = torch.export.Dim("batch"), torch.export.Dim("T")
    shapes = ({0: time, 1: batch}, {0: batch})[: 1 + with_u]
    network = Stateful()
    program = torch.export.export(network, inputs, dynamic_shapes=shapes)
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.tetdeploy.lif.default]
    assert len(nodes) == 1
    assert nodes[0].args[2:] == (0.25, 0.75, 1.0)
    others = (torch.randn(6, 2, 5), torch.randn(2, 5))[: 1 + with_u]
    for arguments in (inputs, others):
        assert all(map(torch.equal, program.module()(*arguments), network(*arguments)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the checker itself
def test_torchs_own_checks_of_the_operator() -> None:
    """Schema, fake tensors and autograd registration, by torch.library's own checker."""
    for current in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(1, 4).expand(3, 4)):
        current = current.detach().requires_grad_()
        for u in (None, torch.randn(4, requires_grad=True)):
            torch.library.opcheck(torch.ops.tetdeploy.lif.default, (current, u, 0.5, 1.0, 1.0))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused() -> None:
    current = torch.rand(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad((lif(2 * current)[0] * current).sum(), current, create_graph=True)
    with pytest.raises(RuntimeError, match=r"LIF neurons have no second derivative: the surrogate \(Eq\. 5\)"):
        gradient.sum().backward()


def test_a_second_derivative_by_u_is_refused() -> None:
    u = torch.rand(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(lif(torch.rand(3, 2), u)[1].square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), u)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_forward_mode_derivative_is_refused() -> None:
    def of_current(current: Tensor) -> Tensor:
        return lif(current)[0]

    def of_u(u: Tensor) -> Tensor:
        return lif(torch.ones(3, 2), u)[1]

    for function, x in ((of_current, torch.rand(3, 2)), (of_u, torch.rand(2))):
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative; use backward\(\)"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, r"tau must be in \[0, 1\]; it is the leak factor per step, not a time constant; got -0\.1"),
        ({"tau": 2.0}, r"tau must be in \[0, 1\].* got 2\.0"),
        ({"tau": math.nan}, r"tau must be in \[0, 1\].* got nan"),
        ({"v_th": 0.0}, r"v_th must be above 0 and finite; got 0\.0"),
        ({"v_th": math.inf}, "v_th must be above 0 and finite; got inf"),
        ({"gamma": 0.0}, r"gamma must be from 1e-18 to 1e18; .* got 0\.0"),
        ({"gamma": 1e-23}, "gamma must be from 1e-18 to 1e18; .* got 1e-23"),  # whose square float32 takes for 0
        ({"gamma": 1.1e18}, r"gamma must be from 1e-18 to 1e18; .* got 1\.1e\+18"),
        ({"gamma": math.nan}, "gamma must be from 1e-18 to 1e18; .* got nan"),
        ({"tau": "0.5"}, "tau must be a number, got '0.5'"),
        ({"tau": torch.tensor([0.5, 0.6])}, r"tau must be a number, got tensor\(\[0.5"),
        ({"v_th": np.True_}, "v_th must be a number, got (np.)?True"),
        ({"v_th": np.str_("1")}, "v_th must be a number, got "),
        ({"v_th": True}, "v_th must be a number, got True"),
        ({"gamma": None}, "gamma must be a number, got None"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    for neuron in (lambda: LIF(**options), lambda: lif(torch.zeros(2, 3), **options)):
        with pytest.raises(ValueError, match=message):
            neuron()


@pytest.mark.parametrize(("name", "value"), [("tau", 0.0), ("tau", 1.0), ("gamma", 1e-18), ("gamma", 1e18)])
def test_parameters_at_the_ends_of_their_range_are_taken(name: str, value: float) -> None:
    assert getattr(LIF(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [("tau", 2.0), ("v_th", -1.0), ("gamma", 0.0), ("tau", "0.5")])
def test_parameters_that_are_set_out_of_range_later_are_refused(name: str, value: Any) -> None:
    neurons = LIF()
    setattr(neurons, name, value)
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {value!r}"):
        neurons(torch.ones(1, 2))


@pytest.mark.parametrize("name", ["tau", "v_th", "gamma"])
def test_parameters_that_could_not_learn_are_refused(name: str) -> None:
    learned: dict[str, Any] = {name: nn.Parameter(torch.tensor(0.5))}
    computed: dict[str, Any] = {name: torch.sigmoid(learned[name])}
    with pytest.raises(ValueError, match=rf"^{name} must be a number, got a Parameter: the gradient does not reach it"):
        LIF(**learned)
    with pytest.raises(ValueError, match=rf"^{name} must .*, got a Tensor: .* float\({name}\), made once in __init__"):
        lif(torch.ones(1, 2), **computed)
    LIF(**{name: torch.tensor(0.5)})  # a number, too
    neurons = LIF()
    for later in (learned, computed):  # as a subclass does in __init__ or in its forward
        setattr(neurons, name, later[name])
        with pytest.raises(ValueError, match=rf"^{name} must be a number, got a .*: the gradient does not reach it"):
            neurons(torch.ones(1, 2))
        with pytest.raises(ValueError, match=rf"^{name} must be a number, got a .*: the gradient does not reach it"):
            torch.export.export(neurons, (torch.ones(1, 2),))
        delattr(neurons, name)
    setattr(neurons, name, torch.tensor(0.5))
    assert torch.export.export(neurons, (torch.ones(1, 2),)).module()(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_currents_without_steps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"current must be \[T, \.\.\.\] with T of at least 1, got shape \["):
        lif(torch.zeros(shape))


def test_integer_currents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"current must be floating point, got torch\.uint8; convert it with \.float"):
        LIF()(torch.zeros(2, 3, dtype=torch.uint8))
    for name, arguments in {"current": (np.zeros((2, 3)),), "u": (torch.zeros(2, 3), np.zeros(3))}.items():
        with pytest.raises(ValueError, match=rf"{name} must be of type Tensor, got ndarray; pass torch\.from_numpy"):
            LIF().with_state(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (2, 3)])
def test_a_membrane_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"u must have the shape of one step, \[3\], got \["):
        lif(torch.zeros(2, 3), torch.zeros(shape))


def test_a_membrane_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="u lies on meta and current on cpu; move one of them"):
        lif(torch.zeros(2, 3), torch.zeros(3, device="meta"))


def test_settings_are_shown() -> None:
    assert repr(LIF(tau=0.25, gamma=2.0)) == "LIF(tau=0.25, v_th=1.0, gamma=2.0)"


# --- other frameworks' neurons, as docs/training.md says -----------------------------------------------------------


def currents_for_peers() -> Tensor:
    return 0.4 + torch.randn((60, 500), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fires_alike(ours: LIF, theirs: Tensor) -> None:
    spikes = ours(currents_for_peers())
    assert 0.01 < spikes.mean() < 0.6
    assert torch.equal(spikes, theirs)


@pytest.mark.peer
@pytest.mark.parametrize("v_th", [0.4, 1.0])
@pytest.mark.parametrize("tau", [1.25, 1.5, 2.0, 3.0])
def test_spikingjelly_s_neurons_are_these_of_another_tau(tau: float, v_th: float) -> None:
    peer = pytest.importorskip("spikingjelly.activation_based.neuron", reason="needs spikingjelly 2.0")
    x = currents_for_peers()
    assert peer.LIFNode().tau == 2.0 and peer.LIFNode().decay_input  # the defaults that the page speaks of
    decayed = peer.LIFNode(tau=tau, v_threshold=v_th, step_mode="m")(x)
    fires_alike(LIF(tau=1 - 1 / tau, v_th=tau * v_th), decayed)
    whole = peer.LIFNode(tau=tau, decay_input=False, v_threshold=v_th, step_mode="m")(x)
    fires_alike(LIF(tau=1 - 1 / tau, v_th=v_th), whole)
    fires_alike(IF(v_th=v_th), peer.IFNode(v_threshold=v_th, step_mode="m")(x))
    soft = peer.LIFNode(tau=tau, decay_input=False, v_threshold=v_th, v_reset=None, step_mode="m")(x)
    assert not torch.equal(LIF(tau=1 - 1 / tau, v_th=v_th)(x), soft)


@pytest.mark.peer
@pytest.mark.parametrize("decay_input", [True, False])
def test_spikingjelly_s_trained_tau_is_a_number_here(decay_input: bool) -> None:
    peer = pytest.importorskip("spikingjelly.activation_based.neuron", reason="needs spikingjelly 2.0")
    node = peer.ParametricLIFNode(init_tau=2.7, v_threshold=0.8, decay_input=decay_input, step_mode="m").double()
    s = float(node.w.detach().sigmoid())
    fires_alike(LIF(tau=1 - s, v_th=0.8 / s if decay_input else 0.8), node(currents_for_peers()).detach())


def test_whole_numbers_without_memory_are_a_sum_of_layers() -> None:
    x, D = 2 * currents_for_peers(), 4
    integers = sum(LIF(tau=0.0, v_th=k - 0.5)(x) for k in range(1, D + 1))
    assert torch.equal(integers, x.clip(0, D).round()) and integers.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.peer
@pytest.mark.parametrize(("beta", "v_th"), [(0.5, 1.0), (0.9, 0.7)])
def test_snntorch_s_leaky_of_a_reset_to_zero_is_this_neuron(beta: float, v_th: float) -> None:
    peer = pytest.importorskip("snntorch", reason="needs snntorch")
    spikes = {}
    for reset in ("zero", "subtract"):
        neuron = peer.Leaky(beta=beta, threshold=v_th, reset_mechanism=reset)
        membrane, fired = neuron.reset_mem(), []
        for current in currents_for_peers():
            spike, membrane = neuron(current, membrane)
            fired.append(spike)
        spikes[reset] = torch.stack(fired)
    fires_alike(LIF(tau=beta, v_th=v_th), spikes["zero"])
    assert not torch.equal(spikes["zero"], spikes["subtract"])


@pytest.mark.peer
@pytest.mark.parametrize("theta", [0.7, 1.3])
def test_snntorch_s_learned_threshold_is_a_learned_scale(theta: float) -> None:
    peer = pytest.importorskip("snntorch", reason="needs snntorch")
    neuron = peer.Leaky(beta=0.5, threshold=theta, learn_threshold=True, reset_mechanism="zero")
    membrane, fired = neuron.reset_mem(), []
    for current in currents_for_peers():
        spike, membrane = neuron(current, membrane)
        fired.append(spike)
    g = nn.Parameter(1 / neuron.threshold.detach())
    spikes = LIF(tau=0.5, v_th=1.0)(currents_for_peers() * g)
    assert 0.01 < spikes.mean() < 0.6 and torch.equal(spikes, torch.stack(fired))
    spikes.sum().backward()
    assert g.grad is not None and g.grad != 0


def in_norse(cell: Any, currents: Tensor) -> Tensor:
    state, fired = None, []
    for current in currents:
        spikes, state = cell(current, state)
        fired.append(spikes.detach())
    return torch.stack(fired)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # of its imports
@pytest.mark.parametrize(
    ("tau_mem_inv", "v_th", "v_leak", "dt"),
    [(300.0, 0.3, 0.0, 1e-3), (500.0, 0.2, -0.1, 1e-3), (100.0, -49.7, -50.0, 2e-3), (1000.0, 0.5, 0.0, 1e-3)],
)
def test_norse_s_neurons_are_these_of_another_threshold(
    tau_mem_inv: float, v_th: float, v_leak: float, dt: float
) -> None:
    peer = pytest.importorskip("norse.torch", reason="needs norse")
    default = peer.LIFBoxCell()
    k = float(default.dt * default.p.tau_mem_inv)
    assert (1 - k, float(default.p.v_th - default.p.v_leak) / k) == pytest.approx((0.9, 10.0))
    parameters = {"tau_mem_inv": tau_mem_inv, "v_th": v_th, "v_leak": v_leak, "v_reset": v_leak}
    p = {name: torch.tensor(value, dtype=torch.float64) for name, value in parameters.items()}
    cell = peer.LIFBoxCell(peer.LIFBoxParameters(**p), dt=dt)
    k = float(cell.dt * cell.p.tau_mem_inv)
    ours = LIF(tau=1 - k, v_th=float(cell.p.v_th - cell.p.v_leak) / k)
    fires_alike(ours, in_norse(cell, currents_for_peers()))
    at_once = peer.LIFCell(peer.LIFParameters(**p, tau_syn_inv=torch.tensor(1 / dt, dtype=torch.float64)), dt=dt)
    fires_alike(ours, in_norse(at_once, currents_for_peers()))
    assert not torch.equal(
        ours(currents_for_peers()), in_norse(peer.LIFCell(peer.LIFParameters(**p), dt=dt), currents_for_peers())
    )
    cell = peer.IAFCell(peer.IAFParameters(v_th=torch.tensor(0.8), v_reset=torch.tensor(-0.2)))
    fires_alike(IF(v_th=float(cell.p.v_th - cell.p.v_reset)), in_norse(cell, currents_for_peers()))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tau_mem", [1.5, 3.0, 20.0])
def test_sinabs_s_neurons_of_a_hard_reset_are_these_of_another_threshold(tau_mem: float) -> None:
    peer = pytest.importorskip("sinabs.layers", reason="needs sinabs")
    activation = importlib.import_module("sinabs.activation")
    hard = {"spike_fn": activation.SingleSpike, "reset_fn": activation.MembraneReset()}
    v_th, a = 0.25, float(torch.exp(torch.tensor(-1 / tau_mem, dtype=torch.float64)))

    def theirs(kind: str, **options: Any) -> Tensor:
        layer = getattr(peer, kind)(spike_threshold=torch.tensor(v_th), **options).double()
        x = currents_for_peers().T.unsqueeze(-1)  # [N, T, 1]
        fired: Tensor = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if "Squeeze" in kind else layer(x)
        return fired.detach().squeeze(-1).T

    for squeeze, steps in (("", {}), ("Squeeze", {"num_timesteps": 60})):
        options = {"tau_mem": tau_mem, **steps}
        fires_alike(LIF(tau=a, v_th=v_th / (1 - a)), theirs(f"LIF{squeeze}", **options, **hard))
        fires_alike(LIF(tau=a, v_th=v_th), theirs(f"LIF{squeeze}", **options, **hard, norm_input=False))
        fires_alike(IF(v_th=v_th), theirs(f"IAF{squeeze}", **steps, **hard))
    assert not torch.equal(IF(v_th=v_th)(currents_for_peers()), theirs("IAF"))


@pytest.mark.peer
def test_spikingjelly_s_weights_go_into_the_same_layers() -> None:
    layer = pytest.importorskip("spikingjelly.activation_based.layer", reason="needs spikingjelly 2.0")
    peer = pytest.importorskip("spikingjelly.activation_based.neuron", reason="needs spikingjelly 2.0")
    torch.manual_seed(0)
    theirs = nn.Sequential(
        layer.Conv2d(1, 4, 3, step_mode="m"),
        layer.BatchNorm2d(4, step_mode="m"),
        peer.LIFNode(step_mode="m"),
        layer.Flatten(step_mode="m"),
        layer.Linear(144, 10, step_mode="m"),
    ).double()
    nn.init.normal_(theirs[1].weight, 2.0)
    convolution = OverTime(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    ours = nn.Sequential(convolution, LIF(tau=0.5, v_th=2.0), nn.Flatten(2), nn.Linear(144, 10)).double()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(6, 3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
