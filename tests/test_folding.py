"""Folding: equal to the unfolded network in float64, no BN left, and what cannot be folded is named with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tetdeploy.folding import FoldingError, count_batchnorm, fold_batchnorm
from tetdeploy.int8.quantisation import quantise
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import NetworkConfig, build_network
from tetdeploy.neurons import LIF

# torch.export copies its own tree specifications in a way that it deprecates itself
pytestmark = pytest.mark.filterwarnings(r"ignore:.*LeafSpec.*is deprecated:FutureWarning")

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)


def settled(network: nn.Module) -> nn.Module:
    """The network in inference and float64, its BN as after training: no statistic or parameter left at its default."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.25, 4.0)
            if module.affine:
                nn.init.normal_(module.weight, 0.8, 0.5)  # some below zero
                nn.init.normal_(module.bias, 0.5)
    return network.double().eval()


def traced(network: nn.Module, *inputs: Tensor, dynamic: Any = None) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(network, inputs, dynamic_shapes=dynamic)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def count(graph: fx.Graph, *targets: Any) -> int:
    return sum(node.target in targets for node in graph.nodes)


def assert_folds(network: nn.Module, *inputs: Tensor, batchnorms: int) -> fx.GraphModule:
    program = traced(network, *inputs)
    assert count_batchnorm(program.graph) == batchnorms
    folded = fold_batchnorm(program)
    assert count_batchnorm(folded.graph) == 0
    assert not any(name.endswith("running_mean") for name in folded.state_dict())  # nor kept beside the graph
    folded.graph.lint()
    torch.testing.assert_close(folded(*inputs), network(*inputs), rtol=1e-10, atol=1e-10)
    return folded


# --- one layer and its BN ----------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm1d, (2, 4, 7)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d, (2, 4, 5, 7)),
    "conv3d": (lambda bias: nn.Conv3d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm3d, (2, 4, 3, 5, 7)),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (5, 4)),
    "groups": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 7)),
    "depthwise": (lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias), lambda _: nn.BatchNorm2d(8), (2, 4, 5, 7)),
    "strides": (lambda bias: nn.Conv2d(4, 6, 3, (2, 3), (1, 0), (1, 2), bias=bias), nn.BatchNorm2d, (2, 4, 9, 9)),
    "same": (lambda bias: nn.Conv2d(4, 6, 3, padding="same", bias=bias), nn.BatchNorm2d, (2, 4, 5, 7)),
    "circular": (
        lambda bias: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=bias),
        nn.BatchNorm2d,
        (2, 4, 5, 7),
    ),
    "transposed 1d": (lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (2, 4, 7)),
    "transposed 2d": (
        lambda bias: nn.ConvTranspose2d(4, 6, 2, 3, output_padding=1, bias=bias),  # pixels that no input reaches
        nn.BatchNorm2d,
        (2, 4, 5, 7),
    ),
    "transposed 3d": (lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (2, 4, 3, 5, 7)),
    "transposed groups": (
        lambda bias: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, bias=bias),
        nn.BatchNorm2d,
        (2, 4, 5, 7),
    ),
    "one channel": (lambda bias: nn.Conv2d(4, 1, 3, bias=bias), lambda _: nn.BatchNorm2d(1), (2, 4, 5, 7)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_and_its_bn_become_one_layer(kind: str, bias: bool) -> None:
    layer, bn, shape = LAYERS[kind]
    assert_folds(settled(nn.Sequential(layer(bias), bn(6))), randn(*shape), batchnorms=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_bn_without_affine_parameters(kind: str, bias: bool) -> None:
    layer, bn, shape = LAYERS[kind]
    assert_folds(settled(nn.Sequential(layer(bias), bn(6, affine=False, eps=0.3))), randn(*shape), batchnorms=1)


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable must be True or False, got 'no'"):
        fold_batchnorm(None, trainable="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trainable must be True or False, got 1"):
        quantise(None, {}, trainable=1)  # type: ignore[arg-type]


def test_equation_6_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, eps=0.5)).double().eval()
    linear, bn = network
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, -3.0]]))
        for parameter, value in ((linear.bias, 5), (bn.weight, 6), (bn.bias, 7), (bn.running_mean, 1)):
            parameter.fill_(value)
        bn.running_var.fill_(3.5)
    folded = fold_batchnorm(traced(network, randn(3, 2)))
    values = {name.rpartition(".")[2]: value.tolist() for name, value in folded.named_parameters()}
    assert not any(value.requires_grad for value in folded.parameters())
    assert values == {
        "weight": [[6.0, -9.0]],
        "bias": [7 + (5 - 1) * 6 / 2],
    }  # W gamma/alpha, beta + (b-mu) gamma/alpha


def test_float32_networks_are_folded_in_float64_and_stay_float32() -> None:
    network = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).float()
    folded = fold_batchnorm(traced(network, torch.randn(2, 4, 5, 5)))
    exact = fold_batchnorm(traced(copy.deepcopy(network).double(), randn(2, 4, 5, 5)))
    for got, wanted in zip(folded.parameters(), exact.parameters(), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.float(), rtol=1e-7, atol=0)  # one rounding, at the end


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_folded_at_each_call_gradients_are_those_of_the_network(kind: Any, bias: bool) -> None:
    """Two BN in a row, so that the second folds into what the first one's folding computes."""
    layer = kind(2, 4, 3, groups=2, bias=bias)
    network = settled(nn.Sequential(layer, nn.BatchNorm2d(4, eps=0.3), nn.BatchNorm2d(4)))
    x = randn(3, 2, 5, 5)
    folded = fold_batchnorm(traced(network, x), trainable=True)
    assert count_batchnorm(folded.graph) == 0
    parameters = dict(network.named_parameters())
    wanted = torch.autograd.grad(network(x).square().sum(), [*parameters.values()])
    torch.testing.assert_close(folded(x), network(x), rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(folded(x).square().sum(), [folded.get_parameter(name) for name in parameters])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


# --- over time ---------------------------------------------------------------------------------------------------


class OwnTime(nn.Module):
    """Convolution and BN apart, with the reshaping that code over time is full of in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), tdBN(4)

    def forward(self, x: Tensor) -> Tensor:
        current = self.conv(x.flatten(0, 1))
        current = current.reshape(x.shape[0], x.shape[1], *current.shape[1:])
        return self.bn(current.contiguous())


class RepeatedBefore(nn.Module):
    """The current of an image repeated over time, and BN only then."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bn = DirectEncoding(nn.Conv2d(2, 4, 3)), tdBN(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.encode(x, 3))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (OwnTime, (3, 2, 2, 6, 6)),
        (RepeatedBefore, (2, 2, 6, 6)),
        (lambda: OverTime(nn.Conv2d(2, 4, 3), tdBN(4)), (3, 2, 2, 6, 6)),
        (lambda: OverTime(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4)), (3, 2, 2, 2, 2)),
        (lambda: Merged(nn.Identity(), lambda merged: merged.relu().unflatten(0, (3, -1))), (2, 2, 6, 6)),
        (lambda: Merged(nn.Identity(), lambda merged: merged.unflatten(0, (-1, 3)).transpose(0, 1)), (2, 2, 6, 6)),
    ],
    ids=["own reshaping", "repeated image", "OverTime", "linear", "merged, then an activation", "split otherwise"],
)
def test_time_between_a_layer_and_its_bn(network: Any, shape: tuple[int, ...]) -> None:
    folded = assert_folds(settled(network()), randn(*shape), batchnorms=1)
    assert count(folded.graph, *CONVOLUTIONS, aten.linear.default) == 1  # the layer is not left beside its fold


# --- behind moved axes -------------------------------------------------------------------------------------------

Way = Callable[[nn.Module, nn.Module, Tensor], Tensor]


class Tokens(nn.Module):
    """A linear layer of tokens `[T, N, L, C]` and a BN of its channels; L may be C."""

    def __init__(self, way: Way, *, bias: bool = True, bn: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.way, self.linear, self.bn = way, nn.Linear(3, 4, bias=bias), bn(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.linear, self.bn, x)


WAYS: dict[str, Way] = {
    "time merged first": lambda linear, bn, x: bn(linear(x.flatten(0, 1)).mT).mT.reshape(*x.shape[:3], -1).contiguous(),
    "time merged between": lambda linear, bn, x: bn(linear(x).flatten(0, 1).mT).mT.reshape(*x.shape[:3], -1),
    "time merged at the BN": lambda linear, bn, x: OverTime(bn)(OverTime(linear)(x).mT).mT,
    "not moved back": lambda linear, bn, x: OverTime(bn)(OverTime(linear)(x).mT),
    "transpose": lambda linear, bn, x: bn(linear(x[0]).transpose(-1, -2)).transpose(1, 2),
    "permute": lambda linear, bn, x: bn(linear(x[0]).permute(0, -1, 1)).permute(0, 2, 1),
    "movedim": lambda linear, bn, x: bn(linear(x[0]).movedim(-1, 1)).movedim(1, -1),
    "swapaxes": lambda linear, bn, x: bn(linear(x[0]).swapaxes(1, 2)).swapaxes(1, 2),
    "in two moves": lambda linear, bn, x: bn(linear(x[0]).permute(2, 0, 1).transpose(0, 1)).mT,
    "there and back": lambda linear, bn, x: bn(linear(x[0, :, 0]).mT.mT),
    "tokens merged": lambda linear, bn, x: bn(linear(x).permute(3, 0, 1, 2).flatten(1).unsqueeze(0)),
    "by heads": lambda linear, bn, x: bn(linear(x[0]).unflatten(-1, (2, 2)).flatten(2).mT),
    "repeated": lambda linear, bn, x: bn(linear(x[0, 0]).mT.expand(5, -1, -1)),
}


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("way", WAYS)
def test_channels_are_followed_where_axes_are_moved(way: str, tokens: int) -> None:
    folded = assert_folds(settled(Tokens(WAYS[way], bias=tokens == 4)), randn(3, 2, tokens, 3), batchnorms=1)
    assert count(folded.graph, aten.linear.default) == 1


@pytest.mark.parametrize("between", [lambda y: y, lambda y: y.mT.mT, lambda y: y.mT.contiguous().mT])
def test_two_bn_behind_moved_axes(between: Callable[[Tensor], Tensor]) -> None:
    network = Tokens(lambda linear, bn, x: bn(between(bn(linear(x[0]).mT))))
    assert_folds(settled(network), randn(3, 2, 4, 3), batchnorms=2)


def test_a_result_read_before_its_channels_are_moved() -> None:
    def way(linear: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
        current = linear(x[0])
        return bn(current.mT) * current.relu()

    folded = assert_folds(settled(Tokens(way)), randn(3, 2, 4, 3), batchnorms=1)
    assert count(folded.graph, aten.linear.default) == 2


def test_channels_of_convolutions_may_be_moved_there_and_back() -> None:
    network = Permuted(lambda y: y.permute(0, 2, 3, 1).clone().movedim(3, 1), nn.BatchNorm2d(4))
    assert_folds(settled(network), randn(2, 2, 4, 4), batchnorms=1)


def test_channels_last_may_be_viewed() -> None:
    network = Tokens(lambda linear, bn, x: bn(linear(x).movedim(-1, 1)).movedim(1, -1).view(-1, 4), bn=nn.BatchNorm2d)
    assert_folds(settled(network), randn(3, 2, 4, 3), batchnorms=1)


def test_what_is_written_over_behind_moved_axes_is_what_bn_gave() -> None:
    def way(linear: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
        merged = bn(linear(x[0]).mT)
        merged.reshape(len(merged), -1).add_(1)  # a view of what BN gives, but not of what the moves give
        merged.mT.flatten(0, 1).add_(2)  # the other way round
        return merged

    with torch.no_grad():
        assert_folds(settled(Tokens(way)), randn(3, 2, 4, 3), batchnorms=1)


# --- shared layers and branches ----------------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution called twice; `bn2` may be no BN."""

    def __init__(self, bn2: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3), bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x)).relu()))


class TwoReaders(nn.Module):
    """One result of one convolution read by a BN and by what `other` is."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), other

    def forward(self, x: Tensor) -> Tensor:
        current = self.conv(x)
        return self.bn(current) * self.other(current)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_used_in_two_places_with_two_bns(bias: bool) -> None:
    folded = assert_folds(settled(Shared(nn.BatchNorm2d(3), bias=bias)), randn(2, 3, 6, 6), batchnorms=2)
    weights = [node.args[1] for node in folded.graph.nodes if node.target in CONVOLUTIONS]
    assert len(set(weights)) == 2


def test_a_convolution_with_bn_in_only_one_of_its_two_places() -> None:
    folded = assert_folds(settled(Shared(nn.Identity())), randn(2, 3, 6, 6), batchnorms=1)
    assert {"conv.weight", "conv.bias"} <= {str(node.target) for node in folded.graph.nodes if node.op == "get_attr"}


def test_one_bn_used_in_two_places() -> None:
    network = Shared(nn.Identity())
    network.bn2 = network.bn1
    assert_folds(settled(network), randn(2, 3, 6, 6), batchnorms=2)


@pytest.mark.parametrize(("other", "batchnorms"), [(nn.BatchNorm2d(4), 2), (nn.ReLU(), 1)])
def test_a_result_with_two_readers(other: nn.Module, batchnorms: int) -> None:
    folded = assert_folds(settled(TwoReaders(other)), randn(2, 3, 6, 6), batchnorms=batchnorms)
    assert count(folded.graph, *CONVOLUTIONS) == 2


def test_two_bns_in_a_row() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    folded = assert_folds(settled(network), randn(2, 3, 6, 6), batchnorms=2)
    assert count(folded.graph, *CONVOLUTIONS) == 1


class Residual(nn.Module):
    """A block with a downsample branch."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, 1, 1),
            nn.BatchNorm2d(4),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, 2, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.main(x) + self.shortcut(x)).relu()


def test_downsample_branches() -> None:
    folded = assert_folds(settled(Residual()), randn(2, 3, 7, 7), batchnorms=3)
    assert count(folded.graph, *CONVOLUTIONS) == 3


# --- whole networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "batchnorms"), [("convsnn", 3), ("resnet19", 20)])
@pytest.mark.parametrize("form", ["images", "frames"])
def test_whole_networks(model: str, batchnorms: int, form: str) -> None:
    config = NetworkConfig(model, 5, 2, (8, 8), width=0.1)
    network = settled(build_network(config))
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)  # a fresh linear layer does not reach the threshold
    inputs = (randn(4, 3, 2, 8, 8),) if form == "frames" else (randn(3, 2, 8, 8), 4)
    rates = spike_rates(network, *inputs)
    assert all(rate > 0 for rate in rates), rates
    assert_folds(network, *inputs, batchnorms=batchnorms)


def spike_rates(network: nn.Module, *inputs: Any) -> list[float]:
    rates: list[float] = []
    layers = [module for module in network.modules() if isinstance(module, LIF)]
    hooks = [m.register_forward_hook(lambda _m, _i, spikes: rates.append(spikes.mean().item())) for m in layers]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return rates


def test_the_batch_stays_dynamic() -> None:
    network = settled(build_network(NetworkConfig("convsnn", 5, 2, (8, 8), width=0.1)))
    batch, time = torch.export.Dim("batch"), torch.export.Dim("T")
    program = traced(network, randn(4, 3, 2, 8, 8), dynamic=({0: time, 1: batch},))
    folded = fold_batchnorm(program)
    assert count_batchnorm(folded.graph) == 0
    for T, N in ((4, 3), (2, 7), (6, 1)):
        x = randn(T, N, 2, 8, 8)
        torch.testing.assert_close(folded(x), network(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "network",
    [
        lambda: OverTime(nn.Conv2d(2, 4, 3), tdBN(4)),
        lambda: nn.Sequential(OverTime(nn.Conv2d(2, 4, 3)), tdBN(4)),
        lambda: nn.Sequential(OverTime(nn.Conv2d(2, 4, 3)), OverTime(nn.BatchNorm2d(4)), OverTime(nn.MaxPool2d(2))),
        lambda: Permuted(lambda y: y.movedim(-1, 2), OverTime(nn.BatchNorm2d(4)), OverTime(nn.Linear(6, 4))),
    ],
    ids=["together", "tdBN by itself", "each by itself", "moved between"],
)
def test_the_result_can_be_exported_again_with_a_dynamic_batch(network: Any) -> None:
    network = settled(network())
    batch = torch.export.Dim("batch")
    program = traced(network, randn(3, 2, 2, 6, 6), dynamic=({1: batch},))
    again = traced(fold_batchnorm(program), randn(3, 2, 2, 6, 6), dynamic=({1: batch},)).module()
    x = randn(3, 5, 2, 6, 6)
    torch.testing.assert_close(again(x), network(x), rtol=1e-10, atol=1e-10)


class WritesOver(nn.Module):
    """Values behind a BN that are written over, and read as they were before."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.write = write
        self.encode, self.bn = DirectEncoding(nn.Conv2d(2, 4, 3)), tdBN(4)
        self.conv, self.bn2 = OverTime(nn.Conv2d(4, 4, 1)), OverTime(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        current = self.bn(self.encode(x, 3))
        self.write(current)
        return self.bn2(self.conv(current)) * current


@pytest.mark.parametrize(
    "write",
    [
        lambda current: current.add_(1),
        lambda current: current[0].add_(1),
        lambda current: current.unbind(0)[2].mul_(3),
        lambda current: current.permute(0, 1, 3, 4, 2)[1:].zero_(),
    ],
    ids=["all", "a step", "one of the steps", "some steps"],
)
def test_what_is_written_over_is_still_a_value_of_its_own(write: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():  # in which parts may be written to
        assert_folds(settled(WritesOver(write)), randn(2, 2, 6, 6), batchnorms=2)


class Merged(nn.Module):
    """Time merged before BN and split off behind it, where the result is written over."""

    def __init__(self, between: Callable[[Tensor], Tensor], write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.between, self.write = between, write
        self.encode, self.bn = DirectEncoding(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.bn(self.between(self.encode(x, 3)).flatten(0, 1))
        written = self.write(merged)
        return written * merged.unflatten(0, (3, -1))


@pytest.mark.parametrize("between", [nn.Identity(), torch.clone, nn.Dropout()], ids=["nothing", "a copy", "dropout"])
@pytest.mark.parametrize(
    "write",
    [
        lambda merged: merged.add_(1).unflatten(0, (3, -1)),
        lambda merged: merged.unflatten(0, (3, -1)).add_(1),
    ],
    ids=["merged", "split off"],
)
def test_what_is_written_through_one_view_is_read_through_another(
    between: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]
) -> None:
    with torch.no_grad():
        assert_folds(settled(Merged(between, write)), randn(2, 2, 6, 6), batchnorms=1)


def test_a_view_of_what_was_split_off_may_merge_time_again() -> None:
    def merged_again(merged: Tensor) -> Tensor:
        return merged.unflatten(0, (3, -1)).permute(0, 1, 3, 4, 2).view(6, 16, 4).view(3, 2, 4, 4, 4)

    assert_folds(settled(Merged(nn.Identity(), merged_again)), randn(2, 2, 6, 6), batchnorms=1)


def test_what_is_written_through_a_view_is_not_written_into_a_copy() -> None:
    """Where folding leaves no view it is an error, not a copy that nobody reads."""

    def write(merged: Tensor) -> Tensor:
        kept = merged.unflatten(0, (3, -1)).transpose(0, 1).sigmoid()  # in the order in memory of what it reads
        kept.transpose(0, 1).view(6, 4, 16).add_(1)
        return kept.transpose(0, 1)

    with torch.no_grad(), pytest.raises(RuntimeError, match="view size is not compatible"):
        assert_folds(settled(Merged(nn.Identity(), write)), randn(2, 2, 6, 6), batchnorms=1)


def test_the_original_is_untouched() -> None:
    network = settled(Shared(nn.Identity()))  # one use of the convolution keeps its own weights
    x, before = randn(2, 3, 6, 6), copy.deepcopy(network.state_dict())
    program = traced(network, x)
    text, wanted = str(program), network(x)
    folded = fold_batchnorm(program)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.fill_(9.0)
    assert str(program) == text
    assert count_batchnorm(program.graph) == 1
    torch.testing.assert_close(program.module()(x), wanted, rtol=0, atol=0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_network_without_bn_is_left_as_it_is() -> None:
    folded = assert_folds(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).double(), randn(2, 2, 6, 6), batchnorms=0)
    assert count(folded.graph, *CONVOLUTIONS) == 1


@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Sequential(nn.Dropout2d(0.3), nn.Dropout(0.3))],
    ids=["values", "channels", "both"],
)
def test_dropout_between_a_layer_and_its_bn_is_none_in_inference(dropout: nn.Module) -> None:
    network = settled(nn.Sequential(nn.Conv2d(2, 4, 3), dropout, nn.BatchNorm2d(4)))
    folded = assert_folds(network, randn(2, 2, 6, 6), batchnorms=1)
    assert count(folded.graph, *CONVOLUTIONS) == 1  # int8 would look for the other one in the ONNX graph


# --- refusals ----------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def named(**modules: nn.Module) -> nn.Sequential:
    network = nn.Sequential()
    for name, module in modules.items():
        network.add_module(name, module)
    return network


class Permuted(nn.Module):
    def __init__(self, rearrange: Any, bn: nn.Module, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.rearrange = layer or nn.Conv2d(2, 4, 3, padding=1), bn, rearrange

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.rearrange(self.conv(x)))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3))


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Gram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, x)


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "before everything": (
        named(first=nn.BatchNorm2d(2), conv=nn.Conv2d(2, 4, 3)),
        (2, 2, 4, 4),
        r"BN 'first': what comes before it is the input",
    ),
    "after an activation": (
        named(conv=nn.Conv2d(2, 4, 3), act=nn.ReLU(), late=nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'late': what comes before it is aten\.relu\.default \(act\), not a convolution or linear layer; move",
    ),
    "after dropout that is always on": (
        Permuted(lambda y: nn.functional.dropout(y, 0.3, training=True), nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': what comes before it is aten\.dropout\.default",
    ),
    "after neurons": (
        named(conv=OverTime(nn.Conv2d(2, 4, 3)), lif=LIF(), late=tdBN(4)),
        (3, 2, 2, 4, 4),
        r"BN 'late': what comes before it is the neuron layer 'lif', not",
    ),
    "after a sum": (
        Permuted(lambda y: y + 1, nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': what comes before it is aten\.add\.Tensor",
    ),
    "after a part": (
        Permuted(lambda y: y.chunk(2, 2)[0], nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': what comes before it is aten\.chunk\.default \(",
    ),
    "after pooling of a BN": (
        named(conv=nn.Conv2d(2, 4, 3), bn=nn.BatchNorm2d(4), pool=nn.MaxPool2d(2), again=nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'again': what comes before it is aten\.max_pool2d\.default \(pool\)",
    ),
    "channels permuted": (
        Permuted(lambda y: y.permute(0, 3, 1, 2), nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': it normalises axis 1 of its input \[2, 4, 4, 4\], which is not .* of 'conv', axis 1 of",
    ),
    "channels moved, and tokens in their place": (
        Permuted(lambda y: y.mT.unflatten(1, (2, 2)).flatten(1, 2).mT, nn.BatchNorm1d(4), nn.Linear(2, 4)),
        (2, 4, 2),
        r"BN 'bn': it normalises axis 1 of its input \[2, 4, 4\], which is not .* of 'conv', axis 2 of \[2, 4, 4\]",
    ),
    "channels moved, then merged with images": (
        Permuted(lambda y: y.transpose(0, 1).flatten(1), nn.BatchNorm1d(12), nn.Linear(2, 4)),
        (3, 2, 2),
        r"BN 'bn': it normalises axis 1 of its input \[2, 12\], which is not .* of 'conv', axis 2 of",
    ),
    "a channel repeated, then moved": (
        Permuted(lambda y: y.expand(2, 3, 4).mT, nn.BatchNorm1d(4), nn.Linear(2, 1)),
        (2, 3, 2),
        r"BN 'bn': it normalises axis 1 of its input \[2, 4, 3\], which is not .* of 'conv', axis 2 of",
    ),
    "a layer whose weight is a vector": (
        Permuted(lambda y: y.unsqueeze(0), nn.BatchNorm1d(4), Vector()),
        (4, 2),
        r"BN 'bn': it normalises axis 1 of its input \[1, 4\], which is not seen to be the channels of 'conv'",
    ),
    "channels and rows merged": (
        Permuted(lambda y: y.flatten(1, 2), nn.BatchNorm1d(16)),
        (2, 2, 4, 4),
        r"BN 'bn': it normalises axis 1 of its input \[2, 16, 4\], which is not .* of 'conv', axis 1 of",
    ),
    "channels into the batch": (
        Permuted(lambda y: y.reshape(-1, 2, 4, 4), nn.BatchNorm2d(2)),
        (2, 2, 4, 4),
        r"BN 'bn': it normalises axis 1 of its input \[4, 2, 4, 4\], which is not .* of 'conv', axis 1 of",
    ),
    "channels repeated": (
        Permuted(lambda y: y.unsqueeze(-1).expand(2, 4, 4).flatten(0, 1), nn.BatchNorm1d(4), nn.Linear(2, 4)),
        (2, 2),
        r"BN 'bn': it normalises axis 1 of its input \[8, 4\], which is not .* of 'conv', axis 1 of",
    ),
    "channels repeated, after a copy in their order": (
        Permuted(lambda y: y.clone().unsqueeze(-1).expand(2, 4, 4).flatten(0, 1), nn.BatchNorm1d(4), nn.Linear(2, 4)),
        (2, 2),
        r"BN 'bn': it normalises axis 1 of its input \[8, 4\], which is not .* of 'conv', axis 1 of",
    ),
    "one channel only": (
        Permuted(lambda y: y.flatten(1), nn.BatchNorm1d(4), nn.Conv2d(2, 1, 1)),
        (2, 2, 1, 4),
        r"BN 'bn': it normalises axis 1 of its input \[2, 4\], which is not seen to be the channels of 'conv'",
    ),
    "linear over another axis": (
        named(linear=nn.Linear(5, 4), bn=nn.BatchNorm1d(4)),
        (2, 4, 5),
        r"BN 'bn': it normalises axis 1 of its input \[2, 4, 4\], which is not seen to be the channels of 'linear'",
    ),
    "weights that are computed": (
        named(conv=weight_normed(), bn=nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': \w+ \(conv\.parametrizations.*\) is computed in the network, not a parameter of it; remove the para",
    ),
    "weights that are the input": (
        named(gram=Gram(), bn=nn.BatchNorm1d(4)),
        (4, 4),
        r"BN 'bn': (\w+) \(\1\) is computed in the network, not a parameter of it; put a plain layer with the weight",
    ),
    "weights that the layer's own forward computes": (
        named(conv=Standardised(2, 4, 3), bn=nn.BatchNorm2d(4)),
        (2, 2, 4, 4),
        r"BN 'bn': \w+ \(conv\) is computed in the network, not a parameter of it; put a plain layer with the weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_named_with_the_reason(case: str) -> None:
    network, shape, message = REFUSED[case]
    program = traced(settled(network), randn(*shape))
    with pytest.raises(FoldingError, match=f"cannot fold {message}"):
        fold_batchnorm(program)


@pytest.mark.parametrize(
    "bn", [nn.BatchNorm2d(4).train(), nn.BatchNorm2d(4, track_running_stats=False)], ids=["training", "no statistics"]
)
def test_bn_in_training_mode_is_refused(bn: nn.Module) -> None:
    network = named(conv=nn.Conv2d(2, 4, 3), bn=bn).double()
    network.train(bn.training)
    with pytest.raises(FoldingError, match=r"cannot fold BN 'bn': it is in training mode, .* call net\.eval\(\) first"):
        fold_batchnorm(traced(network, randn(2, 2, 4, 4)))


def test_nested_modules_are_named_by_their_path() -> None:
    network = named(stage=named(block=OverTime(nn.MaxPool2d(2), tdBN(2))))
    program = traced(settled(network), randn(3, 2, 2, 4, 4))
    with pytest.raises(FoldingError, match=r"BN 'stage\.block\.1': what comes before .* \(stage\.block\.0\)"):
        fold_batchnorm(program)


def test_a_refusal_leaves_the_program_as_it_was() -> None:
    network = settled(named(conv=nn.Conv2d(2, 2, 1), bn=nn.BatchNorm2d(2), act=nn.ReLU(), late=nn.BatchNorm2d(2)))
    program, x = traced(network, randn(2, 2, 4, 4)), randn(2, 2, 4, 4)
    text = str(program)
    with pytest.raises(FoldingError, match="BN 'late'"):
        fold_batchnorm(program)
    assert str(program) == text
    torch.testing.assert_close(program.module()(x), network(x), rtol=0, atol=0)


def test_a_decomposed_program_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    program = torch.export.export(network, (torch.zeros(2, 1, 5, 5),)).run_decompositions()
    with pytest.raises(FoldingError, match="fold before run_decompositions"):
        fold_batchnorm(program)
