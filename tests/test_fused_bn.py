"""BN, residual and neurons as one function against the modules: on a CPU, on a GPU, and in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_helpers import INTERPRETED, gpu_device, run_compiled, run_interpreted

from tetdeploy import fused_bn, kernels
from tetdeploy.fused_bn import bn_lif, fire, fire_encoded
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import NETWORKS, NetworkConfig, ann_twin, build_network, smooth_twin
from tetdeploy.networks.blocks import ResidualBlock, conv_bn
from tetdeploy.neurons import IF, LIF
from tetdeploy.train.averaging import estimating_bn
from tetdeploy.train.recompute import recompute_blocks

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose tensors go through the kernels: numba's on a CPU, Triton's on a GPU or interpreted."""
    if request.param == "gpu":
        return gpu_device(monkeypatch)
    pytest.importorskip("numba")
    return "cpu"


def kernels_of(device: str) -> Any:
    return pytest.importorskip(f"tetdeploy.kernels.{'numba' if by_numba(device) else 'triton'}_bn_lif")


def by_numba(device: str) -> bool:
    return device == "cpu" and not INTERPRETED


def served(device: str, memory_format: torch.memory_format) -> bool:
    """On a CPU channels-last alone is fused."""
    return not by_numba(device) or memory_format == torch.channels_last


@contextmanager
def by_modules() -> Iterator[None]:
    """Within it every module is called as it is, and neurons run by PyTorch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "by_triton", lambda x: None)
        patch.setattr(kernels, "by_numba", lambda x: None)
        yield


@contextmanager
def counted() -> Iterator[list[str]]:
    """What the fused function launches."""
    calls: list[str] = []

    def recorded(module: Any, name: str) -> Any:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for compiled in ("numba_bn_lif", "triton_bn_lif"):
            with suppress(ImportError):
                module = import_module(f"tetdeploy.kernels.{compiled}")
                for name in ("statistics", "forward", "backward", "norm_backward"):
                    patch.setattr(module, name, recorded(module, name))
        yield calls


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(C: int, **options: Any) -> tdBN:
    """A BN with parameters of its own in each channel, after some batches."""
    bn = tdBN(C, **options)
    with torch.no_grad():
        bn.weight.copy_(1 + 0.3 * draw(C, seed=3))
        bn.bias.copy_(0.4 + 0.3 * draw(C, seed=4))
        assert bn.running_mean is not None and bn.num_batches_tracked is not None
        bn.running_mean.copy_(draw(C, seed=5))
        bn.num_batches_tracked.fill_(3)
    return bn


def close(got: Tensor, wanted: Tensor, eps: float) -> None:
    """To `eps` of the largest value: sums over a batch cancel."""
    torch.testing.assert_close(got.float(), wanted.float(), rtol=eps, atol=eps * max(wanted.abs().max().item(), 1e-3))


def outcome(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Spikes, gradients of the input and of all parameters, and the buffers after it."""
    module, x = copy.deepcopy(module), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    spikes = call(module, x)
    arriving = draw(*spikes.shape, seed=2).to(spikes)
    spikes.backward(arriving)
    assert x.grad is not None
    result = {"spikes": spikes.detach(), "x": x.grad}
    result |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(result) == 2 + len([*module.parameters()])
    return result | dict(module.named_buffers())


def compare(
    module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor, *, launches: int, eps: float = 2e-5
) -> None:
    """The fused function against the modules."""
    with by_modules():
        wanted = outcome(module, call, x)
    with counted() as calls:
        got = outcome(module, call, x)
    assert calls.count("forward") == calls.count("backward") == launches
    assert got.keys() == wanted.keys()
    assert torch.equal(got["spikes"], wanted["spikes"])
    assert 0.05 < got["spikes"].float().mean().item() < 0.95
    for name in wanted.keys() - {"spikes"}:
        close(got[name], wanted[name], eps)


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`[T, N, C, H, W]` whose merged batch has the memory format."""
    return x.flatten(0, 1).contiguous(memory_format=memory_format).unflatten(0, x.shape[:2])


# ------------------------------------------------------------------------------------------- the comparisons


@pytest.mark.parametrize(
    ("channels", "stride", "memory_format"),
    [*((6, 1, memory_format) for memory_format in FORMATS), (9, 1, torch.channels_last), (6, 2, torch.channels_last)],
)
def test_a_residual_block(channels: int, stride: int, memory_format: torch.memory_format, device: str) -> None:
    block = ResidualBlock(6, channels, stride=stride, tau=0.5, v_th=1.0, gamma=1.0)
    for name, bn in block.named_modules():
        if isinstance(bn, tdBN):
            nn.init.constant_(bn.bias, 0.3 if name.startswith("layer") else -0.1)
    block.to(device=device, memory_format=memory_format)
    x = in_format((draw(3, 2, 6, 5, 7).to(device) > 0.3).float(), memory_format)
    fused = served(device, memory_format)
    compare(block, lambda block, x: block(x), x, launches=2 * fused)
    with counted() as calls:
        spikes = block(x)
    assert calls.count("statistics") == fused * (2 if channels == 6 and stride == 1 else 3)
    assert spikes.flatten(0, 1).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("T", [1, 2, 5, 16])
def test_direct_encoding_sums_the_gradient_over_its_steps(
    T: int, memory_format: torch.memory_format, device: str
) -> None:
    stem = nn.ModuleList([DirectEncoding(*conv_bn(2, 5, 3)), IF(v_th=1.5)]).to(device)
    nn.init.constant_(stem[0][1].bias, 0.3)
    stem.to(memory_format=memory_format)
    x = draw(3, 2, 6, 7).to(device).contiguous(memory_format=memory_format)
    compare(stem, lambda stem, x: fire_encoded(stem[1], stem[0], x, T), x, launches=served(device, memory_format))


@pytest.mark.parametrize(("T", "message"), [(0, "at least 1, got 0"), (True, "a whole number, got True")])
def test_steps_that_are_no_count_are_refused(T: int, message: str) -> None:
    network = build_network(NetworkConfig("convsnn", 3, 1, (8, 8), width=0.1)).train()
    with pytest.raises(ValueError, match=f"T must be {message}"):
        network(draw(2, 1, 8, 8), T)


def test_frames_through_direct_encoding(device: str) -> None:
    stem = nn.ModuleList([DirectEncoding(*conv_bn(2, 5, 3)), LIF()]).to(device)
    nn.init.constant_(stem[0][1].bias, 0.5)
    stem.to(memory_format=torch.channels_last)
    x = draw(4, 3, 2, 6, 7).to(device)
    compare(stem, lambda stem, x: fire_encoded(stem[1], stem[0], x), x, launches=1)
    with pytest.raises(ValueError, match="hold T=4 steps, but T=3 was asked for"):
        fire_encoded(stem[1], stem[0], x, T=3)


class Behind(nn.Module):
    """`bn_lif` as a module: y, and the residual made of it."""

    def __init__(self, C: int, T: int, residual: str, **options: Any) -> None:
        super().__init__()
        self.T, self.residual = T, residual
        self.bn, self.lif = norm_of(C, **options), LIF(tau=0.6, v_th=0.8, gamma=1.3)
        if residual == "bn":
            self.residual_bn = norm_of(C, **options)

    def forward(self, y: Tensor) -> Tensor:
        residual = {"none": None, "identity": 0.5 * y, "bn": -y.square()}[self.residual]
        other = self.residual_bn if self.residual == "bn" else None
        return bn_lif(y, self.bn, self.lif, T=self.T, residual=residual, residual_bn=other)


@pytest.mark.parametrize("residual", ["none", "identity", "bn"])
@pytest.mark.parametrize(
    ("T", "shape", "memory_format"),
    [
        (4, (4, 3, 4, 5), torch.contiguous_format),
        (4, (4, 3, 4, 5), torch.channels_last),
        (2, (4, 66, 2, 2), torch.channels_last),
        (9, (18, 4, 1, 1), torch.contiguous_format),
        (16, (16, 1, 3, 3), torch.channels_last),
    ],
)
def test_more_tiles_and_slabs_than_one(
    T: int,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    residual: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = kernels_of(device)
    if by_numba(device):
        monkeypatch.setattr(kernels, "_BLOCK", 2 * shape[1])
        monkeypatch.setattr(kernels, "_SLABS", 3)
    else:
        monkeypatch.setattr(kernels, "_tile", lambda layout, size: tile_of(layout))
        monkeypatch.setattr(kernels, "_PROGRAMS", 6)
    y = draw(*shape).to(device).contiguous(memory_format=memory_format)
    fused = served(device, memory_format) or y.is_contiguous(memory_format=torch.channels_last)
    compare(Behind(shape[1], T, residual).to(device), lambda module, y: module(y), y, launches=fused)


def test_a_current_at_the_threshold_does_not_fire(device: str) -> None:
    module = Behind(3, 2, "none").to(device)
    with torch.no_grad():
        module.bn.weight.zero_()
        module.bn.bias.fill_(module.lif.v_th)
    y = draw(4, 3, 4, 4).to(device, memory_format=torch.channels_last)
    compare(module, lambda module, y: module(y), y, launches=1)


def test_slabs_and_lanes_are_merged_in_float64_by_their_counts() -> None:
    kernels = pytest.importorskip("tetdeploy.kernels.numba_kernels")
    means = draw(3, 4).numpy()
    means[1] += 1000
    y = means.repeat(2, axis=0).ravel()[:-1].astype(np.float64)  # two blocks a slab, and a last lane of one value less
    mean, squares = kernels.merged(np.stack([means, 0 * means], 1), len(y), 1)
    np.testing.assert_allclose([mean[0], squares[0]], [y.mean(), len(y) * y.var()], rtol=1e-12)
    wanted = means.astype(np.float64).reshape(3, 2, 2).sum((0, 1))
    np.testing.assert_allclose(kernels.folded(means[:, None], 2)[0], wanted, rtol=1e-12)


FULL = (1024, 128, 32, 32)  # stage 1 of ResNet-19 at batch 256 and T = 4


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", FORMATS)
def test_at_full_size_the_last_image_is_computed_as_well(memory_format: torch.memory_format, device: str) -> None:
    """Elementwise in PyTorch from the same statistics and sums, which at this size no order of adding gives again."""
    if not served(device, memory_format):
        pytest.skip("channels-last alone is fused on a CPU")
    kernels = kernels_of(device)
    images = 128 if by_numba(device) else FULL[0]  # whose indices have 64 bits
    y = torch.empty(images, *FULL[1:], device=device, memory_format=memory_format).normal_()
    grad_spikes = torch.randn_like(y).unflatten(0, (4, -1))
    bn, spikes = norm_of(FULL[1]).to(device), torch.empty_like(y).unflatten(0, (4, -1))
    vectors = (bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var)
    norm = kernels.statistics(y, *vectors, momentum=0.1, eps=bn.eps)
    kernels.forward(y, norm, None, None, spikes, 0.5, 1.0)
    g, sums = kernels.backward(y, norm, None, None, grad_spikes, 0.5, 1.0, 1.0)
    grad_y = torch.empty_like(y)
    kernels.norm_backward(g, y, norm, sums[0], sums[1], into=grad_y)

    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    torch.testing.assert_close(norm[0], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm[1], (var + bn.eps).rsqrt(), rtol=1e-5, atol=0)
    of_channels = [vector[:, None, None] for vector in (*norm, sums[0], sums[1])]
    m, inverse, weight, bias, sum_g, sum_gx = of_channels
    last = y.unflatten(0, (4, -1))[:, -1]
    current = ((last - m) * (inverse * weight) + bias).requires_grad_()
    with by_modules():
        wanted = LIF(tau=0.5, v_th=1.0, gamma=1.0)(current)
        (wanted_g,) = torch.autograd.grad(wanted, current, grad_spikes[:, -1])
    assert torch.equal(spikes[:, -1], wanted)
    close(g.unflatten(0, (4, -1))[:, -1], wanted_g, 1e-6)
    count = y.numel() // FULL[1]
    wanted_y = inverse * weight * (wanted_g - sum_g / count - (last - m) * inverse * sum_gx / count)
    close(grad_y.unflatten(0, (4, -1))[:, -1], wanted_y, 1e-5)


def tile_of(layout: tuple[int, int]) -> dict[str, int]:
    return (
        {"POSITIONS": 8, "CHANNELS": 64 if layout[0] > 32 else 2}
        if layout[1] == 1
        else {"POSITIONS": 16, "CHANNELS": 1}
    )


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"momentum": 0.0}])
def test_running_statistics_are_moved_as_bn_moves_them(options: dict[str, Any], device: str) -> None:
    def twice(module: nn.Module, y: Tensor) -> Tensor:
        module(3 * y.detach() + 1)
        spikes: Tensor = module(y)
        return spikes

    module = Behind(3, 4, "bn", **options).to(device)
    with by_modules():
        wanted = outcome(module, twice, draw(8, 3, 5, 5).to(device, memory_format=torch.channels_last))
    got = outcome(module, twice, draw(8, 3, 5, 5).to(device, memory_format=torch.channels_last))
    assert torch.equal(got["spikes"], wanted["spikes"])
    close(got["x"], wanted["x"], 2e-5)
    for name in ("bn.running_mean", "bn.running_var", "residual_bn.running_var", "bn.num_batches_tracked"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-6)
    assert got["bn.num_batches_tracked"] == 5
    before = module.state_dict()["bn.running_var"]
    assert torch.equal(got["bn.running_var"], before) == (options["momentum"] == 0.0)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_statistics_do_not_cancel_far_from_zero(memory_format: torch.memory_format, device: str) -> None:
    if not served(device, memory_format):
        pytest.skip("channels-last alone is fused on a CPU")
    y = 0.1 * draw(32, 3, 9, 9) + torch.tensor([1000.0, -3000.0, 0.0])[:, None, None]
    y[0, :, 0, 0] += 50.0  # the first value is no guide either
    exact = y.double()
    y = y.to(device).contiguous(memory_format=memory_format)
    bn = tdBN(3).to(device)
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    norm = kernels_of(device).statistics(y, *vectors, momentum=1.0, eps=1e-9).double().cpu()
    var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(norm[0], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm[1], (var + 1e-9).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", ["none", "identity", "bn"])
def test_half_precision_is_float32_between_reading_and_writing(residual: str, dtype: torch.dtype, device: str) -> None:
    """Spikes are those of the modules in float32 on the same values; gradients are rounded once or twice."""
    if by_numba(device) and dtype == torch.float16:
        pytest.skip("float16 has no kernels on a CPU")
    module = Behind(3, 4, residual).to(device)
    y = draw(8, 3, 5, 5).to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    other = {"none": None, "identity": (y > 0).to(dtype), "bn": draw(8, 3, 5, 5, seed=7).to(y)}[residual]
    residual_bn = module.residual_bn if residual == "bn" else None

    def run(dtype: torch.dtype) -> list[Tensor]:
        norms = copy.deepcopy((module.bn, residual_bn))
        given = [t.detach().to(dtype).requires_grad_() for t in (y, other) if t is not None]
        spikes = bn_lif(given[0], norms[0], module.lif, T=4, residual=[*given, None][1], residual_bn=norms[1])
        return [spikes.detach(), *torch.autograd.grad(spikes, given, draw(*spikes.shape, seed=2).to(y).to(spikes))]

    with by_modules():
        wanted = run(torch.float32)
    got = run(dtype)
    assert {t.dtype for t in got} == {dtype}
    assert torch.equal(got[0].float(), wanted[0])
    for g, w in zip(got[1:], wanted[1:], strict=True):
        close(g, w, 2 * torch.finfo(dtype).eps)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.integers(1, 6),
    N=st.integers(1, 3),
    C=st.integers(1, 5),
    H=st.integers(1, 4),
    W=st.integers(3, 4),  # of two values a channel all gradients cancel
    last=st.booleans(),
    residual=st.sampled_from(["none", "identity", "bn"]),
)
def test_any_shape(T: int, N: int, C: int, H: int, W: int, last: bool, residual: str, device: str) -> None:
    y = draw(T * N, C, H, W).to(device).contiguous(memory_format=FORMATS[last or by_numba(device)])
    module = Behind(C, T, residual).to(device)
    with by_modules():
        wanted = outcome(module, lambda module, y: module(y), y)
    with counted() as calls:
        got = outcome(module, lambda module, y: module(y), y)
    assert calls.count("forward") == calls.count("backward") == 1
    assert torch.equal(got["spikes"], wanted["spikes"])
    for name in wanted:
        close(got[name], wanted[name], 1e-4)  # of a handful of values the variance may be small


@pytest.mark.parametrize("residual", ["none", "identity", "bn"])
def test_more_channels_than_a_block_and_more_steps_than_a_gpu_takes(residual: str) -> None:
    pytest.importorskip("numba")
    for T, C in ((2, 1500), (20, 7)):
        y = draw(2 * T, C, 2, 3).contiguous(memory_format=torch.channels_last)
        compare(Behind(C, T, residual), lambda module, y: module(y), y, launches=1)


def test_no_number_of_threads_changes_a_bit() -> None:
    pytest.importorskip("numba")
    module, y = Behind(5, 4, "bn"), draw(32, 5, 40, 40).contiguous(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outcome(module, lambda module, y: module(y), y))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("with_bn", [False, True])
def test_a_repeated_current_with_a_residual_goes_through_the_modules(with_bn: bool, device: str) -> None:
    y, residual = (draw(3, 4, 2, 5, seed=s).to(device, memory_format=torch.channels_last) for s in (1, 2))
    module = Behind(4, 3, "bn").to(device)
    other = module.residual_bn if with_bn else None
    spikes = []
    for context in (by_modules, nullcontext):
        bn, residual_bn = copy.deepcopy((module.bn, other))
        with context():
            spikes.append(bn_lif(y, bn, module.lif, T=3, residual=residual, residual_bn=residual_bn, repeated=True))
    assert torch.equal(*spikes) and 0 < spikes[0].mean() < 1


def test_a_residual_of_another_shape_or_dtype_goes_through_the_modules(device: str) -> None:
    y, residual = (draw(12, 4, 5, 5, seed=s).to(device, memory_format=torch.channels_last) for s in (1, 2))
    module = Behind(4, 3, "none").to(device)
    for other in (residual[:, :, :1, :1], residual.half(), residual.double()):
        wanted = module.lif((copy.deepcopy(module.bn)(y) + other).unflatten(0, (3, 4)))
        got = bn_lif(y, copy.deepcopy(module.bn), module.lif, T=3, residual=other)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_the_function_by_itself_calls_the_modules_wherever_the_kernels_do_not_serve(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, module = draw(4, 3, 5, 5).to(device, memory_format=torch.channels_last), Behind(3, 2, "none").to(device)

    def launches(y: Tensor = y, bn: tdBN = module.bn, lif: nn.Module = module.lif) -> int:
        with counted() as calls:
            bn_lif(y, copy.deepcopy(bn), lif, T=2)
        return calls.count("forward")

    assert launches() == 1
    assert launches(lif=type("Own", (LIF,), {})()) == 0
    learned = LIF()
    learned.v_th = nn.Parameter(torch.tensor(1.0))  # type: ignore[assignment]
    with pytest.raises(ValueError, match="v_th must be a number, got a Parameter: the gradient does not reach it"):
        launches(lif=learned)
    learned = LIF()
    learned.v_th = -1.0
    with pytest.raises(ValueError, match="v_th must be above 0 and finite; got -1"):
        launches(lif=learned)
    assert launches(y.bfloat16(), copy.deepcopy(module.bn).bfloat16()) == 0
    with pytest.raises(ValueError, match="expected 4D input"):
        launches(y[..., 0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert launches() == 0


@pytest.mark.parametrize("module", [ResidualBlock(3, 4, stride=2, tau=0.5, v_th=1.0, gamma=1.0), Behind(3, 4, "bn")])
def test_training_compiles_into_one_graph(module: nn.Module) -> None:
    torch._dynamo.reset()
    module, x = copy.deepcopy(module).to(memory_format=torch.channels_last), draw(8, 3, 5, 5)
    x = x.unflatten(0, (4, 2)) if isinstance(module, ResidualBlock) else x.to(memory_format=torch.channels_last)
    with by_modules():
        wanted = copy.deepcopy(module)(x)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), wanted)


def test_bn_is_estimated_anew_by_the_kernels(device: str) -> None:
    """As `ema` and `random_T` do it, with all but BN in inference."""
    block = ResidualBlock(3, 4, stride=2, tau=0.5, v_th=1.0, gamma=1.0).to(device, memory_format=torch.channels_last)
    plain, passes = copy.deepcopy(block), [draw(2, 2, 3, 4, 4, seed=seed).to(device) for seed in (1, 2)]
    with by_modules(), estimating_bn(plain):
        wanted = [plain(x) for x in passes]
    with counted() as calls, estimating_bn(block):
        assert all(map(torch.equal, [block(x) for x in passes], wanted))
    assert calls.count("forward") == 4
    for name, value in plain.state_dict().items():
        close(block.state_dict()[name], value, 1e-5)


def test_a_frozen_bn_of_the_residual_keeps_its_statistics(device: str) -> None:
    module, y = Behind(3, 4, "bn").to(device), draw(8, 3, 5, 5).to(device, memory_format=torch.channels_last)
    module.residual_bn.eval()
    before = copy.deepcopy(module.residual_bn.state_dict())
    with by_modules():
        wanted = copy.deepcopy(module)(y)
    assert torch.equal(module(y), wanted)
    assert all(torch.equal(value, before[name]) for name, value in module.residual_bn.state_dict().items())


def test_tensors_without_memory_go_through_the_modules() -> None:
    block = ResidualBlock(3, 3, stride=1, tau=0.5, v_th=1.0, gamma=1.0).to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True), counted() as calls:
        assert block(torch.empty(2, 2, 3, 4, 4)).shape == (2, 2, 3, 4, 4)
    assert not calls


def with_residual(module: nn.Module, y: Tensor, *, residual: Tensor) -> Tensor:
    return bn_lif(y, module.bn, module.lif, T=4, residual=residual)


def test_a_residual_in_another_memory_format_or_with_gaps(device: str) -> None:
    plain = draw(8, 3, 5, 5, seed=9).to(device)
    last = plain.contiguous(memory_format=torch.channels_last)
    gaps = draw(8, 3, 5, 5, 2)[..., 0]
    for y, residual in (
        (last, draw(8, 3, 5, 5)),
        (last, gaps),
        *([] if by_numba(device) else [(plain, last), (plain, gaps)]),
    ):
        module = Behind(3, 4, "none").to(device)
        run = partial(with_residual, residual=residual.to(device))
        compare(module, run, y, launches=1)


def test_an_expanded_gradient_and_a_gradient_of_no_one(device: str) -> None:
    module, y = (
        Behind(3, 4, "none").to(device),
        draw(8, 3, 5, 5).to(device, memory_format=torch.channels_last).requires_grad_(),
    )
    (got,) = torch.autograd.grad(module(y).sum(), y)
    with by_modules():
        (wanted,) = torch.autograd.grad(module(y).sum(), y)
    close(got, wanted, 1e-5)
    with torch.no_grad():
        assert not module(y).requires_grad


def test_two_runs_have_the_same_bits(device: str) -> None:
    module, y = Behind(3, 4, "bn").to(device), draw(32, 3, 9, 9).to(device, memory_format=torch.channels_last)
    first, second = (outcome(module, lambda module, y: module(y), y) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_do_not_share_their_gradients(device: str) -> None:
    """Both BN of a block have the same gradient of the bias; in place on one must not change the other."""
    module = Behind(3, 4, "bn").to(device)
    module(draw(8, 3, 5, 5).to(device, memory_format=torch.channels_last)).sum().backward()
    grads = [p.grad for p in module.parameters()]
    assert all(g is not None for g in grads)
    before = [g.clone() for g in grads if g is not None]
    assert grads[0] is not None
    grads[1].zero_()  # type: ignore[union-attr]
    assert all(torch.equal(g, b) for g, b in zip(grads[2:], before[2:], strict=True) if g is not None)


def test_kept_for_backward_are_the_convolutions_output_and_the_residual(device: str) -> None:
    block = ResidualBlock(6, 6, stride=1, tau=0.5, v_th=1.0, gamma=1.0)
    block.to(device=device, memory_format=torch.channels_last)
    x, kept = in_format((draw(4, 3, 6, 5, 7).to(device) > 0.3).float(), torch.channels_last), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        block(x)
    full = [t for t in kept.values() if t.numel() == x.numel()]
    assert len(full) == 4  # x, y of layer 1, spikes, y of layer 2
    assert sum(t.numel() for t in kept.values() if t.numel() not in (x.numel(), 6 * 6 * 9)) <= 2 * 4 * 6


RECOMPUTED = [("convsnn", 4, 3), *([] if INTERPRETED else [("vggsnn-strided", 8, 8), ("resnet19", 4, 17)])]


@pytest.mark.parametrize(("model", "side", "launches"), RECOMPUTED)
def test_recomputing_blocks_gives_the_same_bits_and_counts_a_batch_once(
    model: str, side: int, launches: int, device: str
) -> None:
    network = build_network(NetworkConfig(model, 3, 2, (side, side), width=0.03)).train()
    network.to(device=device, memory_format=torch.channels_last)
    frugal = copy.deepcopy(network)
    recompute_blocks(frugal)
    x = draw(4, 2, side, side).to(device)
    plain = outcome(network, lambda network, x: network(x, 2), x)
    with counted() as calls:
        again = outcome(frugal, lambda network, x: network(x, 2), x)
    assert calls.count("backward") == launches and calls.count("forward") > launches
    assert all(torch.equal(plain[name], again[name]) for name in plain)


WHOLE = {  # side of the images, fused layers: all that have a BN, steps in the interpreter, which is slow
    "resnet19": (4, 17, 1),
    "convsnn": (4, 3, 2),
    "vggsnn": (16, 8, 1),
    "vggsnn-strided": (8, 8, 2),
    "spiking-resnet34": (32, 33, 1),
    "sew-resnet34": (32, 36, 1),
}
# in the interpreter two without a residual sum, which `test_a_residual_block` has
MODELS = ("convsnn", "vggsnn-strided") if INTERPRETED else tuple(NETWORKS)


def test_every_network_is_tested() -> None:
    assert set(WHOLE) == set(NETWORKS)


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_network_trains_the_same(model: str, device: str) -> None:
    """Loss curve and state of some steps, from the same weights."""
    side, launches, steps = WHOLE[model]
    taken = 2 if device == "cuda" else steps

    def trained() -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        network = build_network(NetworkConfig(model, 3, 2, (side, side), width=0.03)).train()
        network.to(device=device, memory_format=torch.channels_last)  # fewer programs: the interpreter is slow
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        losses = []
        for k in range(taken):
            loss = network(draw(4, 2, side, side, seed=k).to(device), 2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, network.state_dict()

    with by_modules():
        wanted = trained()
    with counted() as calls:
        got = trained()
    assert calls.count("forward") == taken * launches
    assert got[0] == pytest.approx(wanted[0], rel=1e-4)
    assert list(got[1]) == list(wanted[1])
    for name in wanted[1]:
        close(got[1][name], wanted[1][name], 1e-4)


# -------------------------------------------------------------------------------- where the modules are called


def test_the_modules_are_called_wherever_the_kernels_do_not_serve(device: str) -> None:
    x = (draw(4, 3, 6, 5, 7).to(device) > 0.3).float()
    block = ResidualBlock(6, 6, stride=1, tau=0.5, v_th=1.0, gamma=1.0)
    block.to(device=device, memory_format=torch.channels_last)

    def launches(change: Callable[[ResidualBlock], Any], x: Tensor = x) -> int:
        changed = copy.deepcopy(block)
        changed = change(changed) or changed
        with counted() as calls:
            changed(x)
        return calls.count("forward")

    assert launches(lambda block: None) == 2
    assert launches(lambda block: block.eval()) == 0
    assert launches(lambda block: block.double(), x.double()) == 0
    assert launches(ann_twin) == 0
    assert launches(lambda block: smooth_twin(block, k=10.0)) == 0
    assert launches(lambda block: None, x[:1].expand(17, *x.shape[1:])) == (2 if by_numba(device) else 0)
    assert launches(lambda block: setattr(block, "lif1", nn.Identity())) == 1
    assert launches(lambda block: setattr(block.layer2[1], "__class__", type("Other", (tdBN,), {}))) == 1
    assert launches(lambda block: block.layer1[1].eval() and None) == 1
    assert launches(lambda block: setattr(block.layer1[1], "track_running_stats", False)) == 1

    assert launches(lambda block: setattr(block, "shortcut", type("Other", (nn.Identity,), {})())) == 1

    def hooked(block: ResidualBlock) -> None:
        block.lif1.register_forward_hook(lambda *_: None)
        block.shortcut.register_forward_hook(lambda *_: None)

    assert launches(hooked) == 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("path", ["lif1", "layer1", "layer1.1"])
def test_hooks_of_neurons_layers_and_bn_are_called(path: str, kind: str) -> None:
    block = ResidualBlock(3, 3, stride=1, tau=0.5, v_th=1.0, gamma=1.0).to(memory_format=torch.channels_last)
    called: list[str] = []
    getattr(block.get_submodule(path), f"register_{kind}_hook")(lambda *_: called.append(kind))
    block((draw(2, 2, 3, 4, 4) > 0).float().requires_grad_()).sum().backward()
    assert called == [kind]


def test_neurons_behind_no_layers() -> None:
    x = draw(3, 2, 4)
    assert torch.equal(fire(LIF(), OverTime(), x), LIF()(x))


def test_a_batch_of_one_value_a_channel_is_refused_as_by_bn(device: str) -> None:
    layer, lif = OverTime(*conv_bn(2, 3, 1)).to(device), LIF()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fire(lif, layer, torch.ones(1, 1, 2, 1, 1, device=device))


def test_without_numba_or_channels_last_the_modules_are_called_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    block = ResidualBlock(3, 3, stride=1, tau=0.5, v_th=1.0, gamma=1.0)
    last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    x = (draw(2, 2, 3, 4, 4) > 0).float()
    wanted = copy.deepcopy(block)
    wanted = wanted.lif2(wanted.layer2(wanted.lif1(wanted.layer1(x))) + x)
    monkeypatch.setattr(fused_bn, "_BNLIF", None)
    assert torch.equal(block(x), wanted)
    monkeypatch.setattr(kernels, "numba_for", lambda dtype: None)
    assert torch.equal(last(x), wanted)


# ---------------------------------------------------------------------------------------------- without a GPU


def test_in_tritons_interpreter() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton below 3.7 reads bounds of loops as NumPy no longer lets it")
    run_interpreted(__file__)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_cuda_takes_every_grid_at_full_size(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first axis ends at 2^31 - 1, the others at 65,535."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tetdeploy.kernels import triton_bn_lif as kernels

    grids: dict[str, tuple[int, ...]] = {}

    class Launched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids[self.name] = grid
            return lambda *_, **__: None

    names = ("_statistics", "_merge", "_forward", "_backward", "_norm_backward")
    for name in names:
        monkeypatch.setattr(kernels, name, Launched(name))
    y = torch.empty(FULL, device="meta", memory_format=memory_format)
    sequence, vector = torch.empty_like(y).unflatten(0, (4, -1)), torch.empty(FULL[1], device="meta")
    norm = kernels.statistics(y, vector, vector, vector, vector, momentum=0.1, eps=1e-5)
    kernels.forward(y, norm, None, None, sequence, 0.5, 1.0)
    g, sums = kernels.backward(y, norm, None, None, sequence, 0.5, 1.0, 1.0)
    kernels.norm_backward(g, y, norm, sums[0], sums[1], into=g)
    assert [*grids] == [*names]
    for grid in grids.values():
        assert grid[0] < 2**31 and all(axis <= 65_535 for axis in grid[1:])
    assert grids["_norm_backward"] == (1024 * 1024 * 128 // 1024,)


def test_positions_of_all_steps_are_counted_in_32_bits() -> None:
    kernels = pytest.importorskip("tetdeploy.kernels.triton_bn_lif", reason="Triton is not installed")
    y = torch.empty(2**10, 1, 2**10, 2**10, device="meta")
    assert not kernels.serves(y, 1)
    assert kernels.serves(y[1:], 16) and not kernels.serves(y[1:], 17)


BUILD = """
from triton_helpers import ptx_for_h100
from tetdeploy.kernels import triton_bn_lif as kernels

FLOATS = ("partial", "weight", "bias", "running_mean", "running_var", "norm", "residual_norm", "sum_g", "sum_gx")
types = dict.fromkeys(("positions", "C", "inner", "slab", "slabs", "stride", "step"), "i32")
types |= dict.fromkeys(("momentum", "eps", "tau", "v_th", "gamma", "height"), "fp32") | dict.fromkeys(FLOATS, "*fp32")
last, planes = {"inner": 1, "CHANNELS": 64}, {"CHANNELS": 1}
plain, identity = ("residual", "residual_norm"), ("residual_norm",)

def build(kernel, dtype, constants, size=1024):
    return ptx_for_h100(kernel, dtype, types, {"POSITIONS": size // constants["CHANNELS"]} | constants)

def backward(dtype, layout, T, absent, repeated=False):
    constants = layout | {"T": T, "REPEATED": repeated} | dict.fromkeys(absent)
    return build(kernels._backward, dtype, constants, kernels._backward_size(T, "residual_norm" not in absent))
"""

COMPILE = """
def wide(ptx):
    return "ld.global.v" in ptx or ".v4.b32" in ptx or ".v2.b32" in ptx

build(kernels._merge, "fp32", {"SLABS": 512, "CHANNELS": 8})
for layout in (last, planes):
    for dtype in ("bf16", "fp32"):
        print(wide(build(kernels._statistics, dtype, layout)))
        print(wide(build(kernels._norm_backward, dtype, layout)))
    for T, absent in ((4, ()), (4, plain), (16, identity)):
        print(wide(build(kernels._forward, "bf16", layout | {"T": T} | dict.fromkeys(absent))))
        print(wide(backward("bf16", layout, T, absent)) or T > 8)
    ones = layout | dict.fromkeys(("C", "positions", "stride", "step", "slab", "slabs"), 1)  # 1 becomes a constant
    for kernel in (kernels._statistics, kernels._forward, kernels._norm_backward):
        build(kernel, "bf16", ones | {"T": 4} | dict.fromkeys(identity))
    backward("bf16", ones, 4, identity)
    backward("bf16", layout, 16, plain, repeated=True)
"""


def test_the_kernels_compile_for_an_h100_without_fused_multiply_adds() -> None:
    """What the interpreter does not see; Triton compiles without a GPU."""
    lines = run_compiled(BUILD + COMPILE)
    assert len(lines) == 20 and "False" not in lines, lines  # several values a load


@pytest.mark.slow  # 5 s of ptxas
def test_registers_suffice_for_most_steps_with_bn_on_the_residual() -> None:
    run_compiled(BUILD + 'backward("bf16", last, 16, ())')


LAUNCH = """
import torch
from triton_helpers import launch_nothing
from tetdeploy.kernels import triton_bn_lif, triton_lif

launched = launch_nothing()
y = torch.randn(4 * 2, 6, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
bn, spikes = torch.nn.BatchNorm2d(6), torch.empty_like(y).unflatten(0, (4, 2))
vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
norm = triton_bn_lif.statistics(y, *vectors, momentum=bn.momentum, eps=bn.eps)
triton_bn_lif.forward(y, norm, y, norm, spikes, 0.5, 1.0)
g, sums = triton_bn_lif.backward(y, norm, None, None, spikes, 0.5, 1.0, 1.0)
triton_bn_lif.norm_backward(g, y, norm, sums[0], sums[1], into=g)
current = torch.randn(17, 5)
triton_lif.forward(current, None, current, None, 0.5, 1.0)
triton_lif.backward(current, None, current, None, current, torch.empty(5), 0.5, 1.0, 1.0)
print(*[name for name, grid in launched], sep="\\n")
"""


def test_the_kernels_take_the_arguments_that_they_are_launched_with() -> None:
    """Triton's own binding and compilation of them for an H100; without it the interpreter would take any option."""
    names = ["_statistics", "_merge", "_forward", "_backward", "_norm_backward"]
    pieces = ["_forward", "_forward", "_forward", "_backward", "_backward"]  # 16 steps and one; the first once more
    assert run_compiled(LAUNCH) == names + pieces
