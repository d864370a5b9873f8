"""Layers: tdBN's statistics by hand, layers over time against a loop, an image encoded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetdeploy.layers import DirectEncoding, OverTime, tdBN


def shifted(T: int = 3, N: int = 4) -> Tensor:
    """`[T, N, 2, 5, 6]` whose mean and scale change with time, so that statistics of one step are wrong for another."""
    steps = torch.arange(T, dtype=torch.float64).view(T, 1, 1, 1, 1)
    return (1 + steps) * torch.randn(T, N, 2, 5, 6, dtype=torch.float64) + 2 * steps


# --- tdBN --------------------------------------------------------------------------------------------------------


def test_statistics_go_over_time_and_batch_together() -> None:
    x, bn = shifted(), tdBN(2, v_th=0.5, alpha=1.5, momentum=0.1).double()
    y = bn(x)
    for c in range(2):
        values = x[:, :, c].reshape(-1)
        count, mean = values.numel(), values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / count
        wanted = 0.75 * (x[:, :, c] - mean) / (variance + 1e-5).sqrt()
        torch.testing.assert_close(y[:, :, c], wanted, rtol=1e-12, atol=1e-12)
        assert bn.running_mean is not None and bn.running_var is not None
        torch.testing.assert_close(bn.running_mean[c], 0.1 * mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(bn.running_var[c], 0.9 + 0.1 * variance * count / (count - 1), rtol=1e-12, atol=0)


def test_statistics_are_not_those_of_each_step() -> None:
    x = shifted()
    of_each_step = torch.stack([tdBN(2).double()(x[t]) for t in range(len(x))])
    assert (tdBN(2).double()(x) - of_each_step).abs().max() > 0.5


def test_currents_start_with_a_deviation_in_proportion_to_the_threshold() -> None:
    y = tdBN(2, v_th=0.5, alpha=3.0)(shifted().float())
    torch.testing.assert_close(y.std(dim=(0, 1, 3, 4)), torch.tensor([1.5, 1.5]), rtol=0.01, atol=0)
    torch.testing.assert_close(y.mean(dim=(0, 1, 3, 4)), torch.zeros(2), rtol=0, atol=1e-5)


def test_inside_over_time_it_is_the_same_layer() -> None:
    x = shifted()
    torch.testing.assert_close(OverTime(tdBN(2).double())(x), tdBN(2).double()(x), rtol=0, atol=0)


def test_in_inference_it_uses_the_running_statistics() -> None:
    bn = tdBN(2).double()
    bn(shifted())
    x = shifted(T=2, N=1)
    assert bn.running_mean is not None and bn.running_var is not None
    mean, variance = (s.view(2, 1, 1).clone() for s in (bn.running_mean, bn.running_var))
    torch.testing.assert_close(bn.eval()(x), (x - mean) / (variance + 1e-5).sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bn.running_mean.view(2, 1, 1), mean, rtol=0, atol=0)


def test_options_of_batch_normalisation_pass_through() -> None:
    bn = tdBN(2, v_th=0.5, affine=False, eps=0.25)
    assert bn.weight is None and bn.eps == 0.25
    assert torch.isfinite(bn(shifted().float())).all()


@pytest.mark.parametrize("value", [-1, 0, float("nan"), float("inf"), "1"])
def test_a_threshold_or_scale_that_is_none_is_refused(value: Any) -> None:
    said = f"[;,] got '?{value}"
    with pytest.raises(ValueError, match=f"v_th must be (above 0 and finite|a number){said}"):
        tdBN(4, v_th=value)
    if value == 0:  # as for a residual branch that begins with nothing
        assert not tdBN(4, alpha=0).weight.any()
    else:
        with pytest.raises(ValueError, match=f"alpha must be (at least 0 and finite|a number){said}"):
            tdBN(4, alpha=value)


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2, 2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        tdBN(2)(torch.zeros(shape))


class Doubling(nn.Identity):
    """Of the user's own: no identity."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class DoublingFlatten(nn.Flatten):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def doubled(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


# --- over time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(2, 3, 3, stride=2, padding=1),),
        (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * 2 * 3, 7)),
        (nn.AdaptiveAvgPool2d(1),),
        (nn.Identity(),),
        (nn.Flatten(),),
        (nn.Flatten(-2), nn.Identity(), nn.Flatten(1, 2)),
        (Doubling(),),
        (DoublingFlatten(),),
        (nn.Identity(), doubled(nn.Flatten())),
    ],
    ids=["convolution", "readout", "pooling", "identity", "flatten", "flatten in two", "own", "own flatten", "hooked"],
)
def test_over_time_equals_a_loop_over_steps(layers: tuple[nn.Module, ...]) -> None:
    x = shifted(T=5)
    over_time = OverTime(*layers).double()
    in_a_loop = []
    for x_t in x:
        for layer in layers:
            x_t = layer(x_t)
        in_a_loop.append(x_t)
    torch.testing.assert_close(over_time(x), torch.stack(in_a_loop), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layers", [[nn.Flatten()], [nn.Flatten(-3), nn.Identity()], [nn.Flatten(1, 2), nn.Flatten(-2)]], ids=str
)
def test_layers_that_only_flatten_are_traced_for_any_T(layers: list[nn.Module]) -> None:
    layer, (T, N) = OverTime(*layers), (torch.export.Dim(name) for name in "TN")
    program = torch.export.export(layer, (torch.randn(3, 2, 2, 4, 4),), dynamic_shapes=({0: T, 1: N},))
    x = torch.randn(5, 3, 2, 4, 4)
    assert torch.equal(program.module()(x), x.flatten(2))


@pytest.mark.parametrize("layers", [[nn.Flatten(0)], [nn.Flatten(-4)], [nn.Flatten(), nn.Flatten(-2)]], ids=str)
def test_steps_and_images_are_not_flattened(layers: list[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match="unflatten"):
        OverTime(*layers)(shifted(T=5))


def test_over_time_runs_its_layers_once() -> None:
    convolution = nn.Conv2d(2, 3, 3).double()
    sizes = calls_of(convolution)
    assert OverTime(convolution)(shifted(T=5, N=4)).shape == (5, 4, 3, 3, 4)
    assert sizes == [20]


@pytest.mark.parametrize("dropout", [nn.Dropout(), nn.Dropout2d()], ids=["values", "channels"])
def test_dropout_over_time_is_none_in_inference(dropout: nn.Module) -> None:
    x, over_time = shifted(), OverTime(dropout)
    assert (over_time(x) == 0).any()
    assert over_time.eval()(x) is x
    dropout.train()  # as Monte Carlo dropout does
    assert (over_time(x) == 0).any()


def test_a_batch_of_none_passes() -> None:
    assert OverTime(nn.Conv2d(2, 3, 3)).double()(shifted(T=3, N=0)).shape == (3, 0, 3, 3, 4)


# --- direct encoding ---------------------------------------------------------------------------------------------


def calls_of(module: nn.Module) -> list[int]:
    """The batch sizes that `module` is called with from now on."""
    sizes: list[int] = []
    module.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    return sizes


def test_it_is_compiled_for_any_T() -> None:
    torch._dynamo.reset()
    layer = DirectEncoding(nn.Conv2d(1, 2, 3))
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), torch.rand(2, 1, 4, 4)
    for T in (1, 2, 3):
        assert torch.equal(compiled(x, T), layer(x, T))


def encoder() -> tuple[DirectEncoding, nn.Conv2d]:
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    return DirectEncoding(convolution, tdBN(3)).double(), convolution


@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_encoded_once_and_equals_its_frames(training: bool) -> None:
    encode, convolution = encoder()
    encode(shifted()[0], 1)  # running statistics
    encode.train(training)
    x, at_current = shifted()[0], torch.randn(6, 4, 3, 5, 6, dtype=torch.float64)
    sizes, gradients, currents = calls_of(convolution), [], []
    for shown in (x, x.expand(6, *x.shape)):
        shown = shown.clone().requires_grad_()
        current = encode(shown, 6)
        of_x, *of_parameters = torch.autograd.grad((current * at_current).sum(), (shown, *encode.parameters()))
        gradients.append([of_x if shown.dim() == 4 else of_x.sum(0), *of_parameters])
        currents.append(current)
    assert sizes == [4, 6 * 4]  # once for the image, at each of 6 steps for frames
    torch.testing.assert_close(currents[0], currents[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    assert all(g.abs().max() > 1e-3 for g in gradients[0][1:])


def test_the_repeated_current_takes_the_memory_of_one_step() -> None:
    current = encoder()[0](shifted()[0], 6)
    assert current.untyped_storage().nbytes() == current[0].numel() * current.element_size()


def test_frames_are_encoded_each_and_their_T_may_be_left_out() -> None:
    encode, frames = encoder()[0].eval(), shifted(T=3)
    in_a_loop = torch.stack([encode(frame, 1)[0] for frame in frames])
    torch.testing.assert_close(encode(frames), in_a_loop, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encode(frames, 3), in_a_loop, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [2, 4])
def test_frames_with_another_T_are_refused(T: int) -> None:
    with pytest.raises(ValueError, match=rf"frames \[T, N, C, H, W\] hold T=3 steps, but T={T} was asked for"):
        encoder()[0](shifted(T=3), T)


@pytest.mark.parametrize("layer", [nn.Flatten(), nn.Identity(), nn.Dropout().eval()])
def test_hooks_before_layers_that_only_flatten_are_called(layer: nn.Module) -> None:
    x = torch.ones(2, 3, 4)
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    assert torch.equal(OverTime(layer)(x), 2 * x)


@pytest.mark.parametrize("layer", [nn.Flatten(), nn.Identity(), nn.Dropout().eval()])
@pytest.mark.parametrize("when", ["full_backward", "full_backward_pre"])
def test_hooks_on_gradients_of_layers_that_only_flatten_are_called(layer: nn.Module, when: str) -> None:
    called: list[bool] = []
    hook = getattr(layer, f"register_{when}_hook")(lambda *_: called.append(True))
    OverTime(layer)(torch.ones(2, 3, 4, requires_grad=True)).sum().backward()
    hook.remove()
    assert called == [True]


def test_images_without_T_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\] need a number of time steps: net\(images, T=4\)"):
        encoder()[0](shifted()[0])


@pytest.mark.parametrize("T", [0, -2])
def test_no_steps_are_refused(T: int) -> None:
    with pytest.raises(ValueError, match=f"T must be at least 1, got {T}"):
        encoder()[0](shifted()[0], T)


@pytest.mark.parametrize("T", [1.5, "2", True])
def test_steps_that_are_not_whole_are_refused(T: Any) -> None:
    with pytest.raises(ValueError, match=f"T must be a whole number, got {T!r}"):
        encoder()[0](shifted()[0], T)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 2, 3, 2, 5, 6)])
def test_neither_images_nor_frames_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input must be images .* or frames .*, got shape \["):
        encoder()[0](torch.zeros(shape), 3)
