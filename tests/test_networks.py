"""Networks: shapes, both forms of input, the integrating output, the classifier round them, the user's own."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tetdeploy.layers import tdBN
from tetdeploy.networks import NETWORKS, Classifier, NetworkConfig, build_network, code_sha256, import_network
from tetdeploy.networks.blocks import conv_bn
from tetdeploy.networks.resnet19 import ResNet19
from tetdeploy.networks.vggsnn import VGGSNN
from tetdeploy.neurons import LIF
from tetdeploy.storage.files import sha256_of

SIDE = 32  # the smallest image that every network takes


def lively(network: nn.Module) -> nn.Module:
    """The network in inference, with currents so strong that all layers spike; a fresh narrow one may be silent."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return network.eval()


def small(model: str = "convsnn", **options: Any) -> nn.Module:
    """A narrow network of 5 classes for 2 channels."""
    settings = {"num_classes": 5, "in_channels": 2, "image_size": (SIDE, SIDE), "width": 0.1} | options
    return lively(build_network(NetworkConfig(model, **settings)))


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NETWORKS)
def test_images_and_frames_become_logits_of_every_step(model: str) -> None:
    network = small(model).double()
    x = torch.randn(3, 2, SIDE, SIDE, dtype=torch.float64)
    logits = network(x, 4)
    assert logits.shape == (4, 3, 5)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[-1]).abs().max() > 0  # the neurons make steps differ
    frames = x.expand(4, *x.shape)
    for shown in (network(frames), network(frames, 4), network(frames, T=4)):
        torch.testing.assert_close(shown, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_parameter_is_learnt(model: str) -> None:
    network = small(model).train()
    network(torch.randn(3, 2, SIDE, SIDE), 4).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if parameter.dim() > 1:  # a bias in front of BN has a gradient of zero
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("model", NETWORKS)
def test_images_need_not_be_square_and_wrong_ones_are_refused(model: str) -> None:
    config = NetworkConfig(model, 3, 1, (SIDE, 2 * SIDE), width=0.05)
    network = build_network(config).eval()
    assert network(torch.randn(2, 1, SIDE, 2 * SIDE), 2).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=rf"{model} needs images of at least \d+x\d+ pixels, got 2x{SIDE}"):
        build_network(NetworkConfig(model, 3, 1, (2, SIDE)))


@pytest.mark.parametrize("model", NETWORKS)
def test_neurons_have_the_configured_parameters(model: str) -> None:
    config = NetworkConfig(model, 3, 1, (SIDE, SIDE), width=0.05, tau=0.25, v_th=0.75, gamma=2.0)
    network = build_network(config)
    neurons = {(m.tau, m.v_th, m.gamma) for m in network.modules() if isinstance(m, LIF)}
    assert {w for m in network.modules() if isinstance(m, tdBN) for w in m.weight.tolist()} == {0.75}  # alpha v_th
    assert neurons == {(config.tau, 0.75, 2.0)}


@settings(max_examples=20)
@given(T=st.integers(1, 6), k=st.integers(1, 6), N=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_the_first_k_steps_of_a_run_are_a_run_of_k_steps(T: int, k: int, N: int, seed: int) -> None:
    k = min(k, T)
    torch.manual_seed(seed)
    x, network = torch.randn(N, 2, SIDE, SIDE, dtype=torch.float64), small().double()
    torch.testing.assert_close(network(x, T)[:k], network(x, k), rtol=1e-9, atol=1e-9)


# --- the output layer --------------------------------------------------------------------------------------------


def readout_of(network: nn.Module) -> nn.Module:
    """The last child: what follows the last neurons."""
    return list(network.children())[-1]


def spikes_into(readout: nn.Module, network: nn.Module, x: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """What reaches the output layer, and the network's logits."""
    seen: list[Tensor] = []
    handle = readout.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    logits = network(x, T)
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("model", ["convsnn", "resnet19"])
def test_the_output_neither_leaks_nor_fires(model: str) -> None:
    """A step's logits are a linear map of that step's spikes alone: their mean forgets the order of the steps."""
    network = small(model).double()
    readout = readout_of(network)
    assert not any(isinstance(module, LIF) for module in readout.modules())
    spikes, logits = spikes_into(readout, network, torch.randn(3, 2, SIDE, SIDE, dtype=torch.float64), 6)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert (spikes[1:] != spikes[:-1]).any()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(readout(spikes[order]), logits[order], rtol=1e-12, atol=1e-12)
    for t in range(6):
        torch.testing.assert_close(readout(spikes[t : t + 1])[0], logits[t], rtol=1e-12, atol=1e-12)
    assert len(logits.unique()) > 6 and (logits < 0).any()  # not spikes, and not cut at any threshold


# --- resnet19 ----------------------------------------------------------------------------------------------------


def test_resnet19_has_as_many_parameters_as_the_papers() -> None:
    with torch.device("meta"):
        network = build_network(NetworkConfig("resnet19", 10, 3, (32, 32)))
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_630_858
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    shortcuts = [module for module in layers if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]
    assert len(layers) - len(shortcuts) == 19


def test_width_scales_every_layer() -> None:
    config = NetworkConfig("resnet19", 10, 3, (32, 32), width=0.25)
    outputs = [m.out_channels for m in build_network(config).modules() if isinstance(m, nn.Conv2d)]
    assert (outputs[0], max(outputs)) == (16, 128)
    narrowest = build_network(NetworkConfig("convsnn", 3, 1, (8, 8), width=1e-9))
    assert {m.out_channels for m in narrowest.modules() if isinstance(m, nn.Conv2d)} == {1}


@pytest.mark.parametrize(("in_channels", "stride_in_training"), [(8, 1), (15, 1), (16, 2)])
def test_few_channels_are_subsampled_before_a_1x1_convolution_in_training(
    in_channels: int, stride_in_training: int
) -> None:
    """oneDNN's backward of it writes where it must not; its gradients are those of the plain convolution."""
    conv, _ = conv_bn(in_channels, 5, 1, stride=2)
    x = torch.randn(2, in_channels, 7, 6).requires_grad_()
    arriving = torch.randn(2, 5, 4, 3)
    y, wanted = conv(x), nn.functional.conv2d(x, conv.weight, stride=2)
    assert y.grad_fn._saved_stride == (stride_in_training,) * 2
    assert conv.eval()(x).grad_fn._saved_stride == (2, 2)
    for got, expected in zip(
        (y, *torch.autograd.grad(y, (x, conv.weight), arriving)),
        (wanted, *torch.autograd.grad(wanted, (x, conv.weight), arriving)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_resnet19_halves_the_image_twice() -> None:
    network = small("resnet19")
    assert isinstance(network, ResNet19)
    spikes = network.blocks(network.lif1(network.encode(torch.randn(1, 2, SIDE, SIDE), 2)))
    assert spikes.shape[-2:] == (SIDE // 4, SIDE // 4)


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet18", "", ":", "module:", ":function", ".relative:function", "a:b:c", "a b:c"])
def test_an_unknown_model_lists_the_choices(model: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown model .*; choose one of convsnn, resnet19.* package\.module:function"
    ):
        NetworkConfig(model, 10, 3, (32, 32))


@pytest.mark.parametrize(
    ("model", "own"),
    [
        ("examples/own_network.py:my_network", ": here examples.own_network:my_network"),
        ("./own.py:net", ": here own:net"),
        ("/home/own.py:net", ""),
        ("../own.py:net", ""),
        ("own.py", ""),
    ],
)
def test_a_file_is_named_as_a_module(model: str, own: str) -> None:
    with pytest.raises(ValueError, match=rf"or package\.module:function for your own{own}$"):
        NetworkConfig(model, 10, 3, (32, 32))


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
def test_numbers_that_are_not_whole_are_refused(name: str) -> None:
    settings: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "image_size": (8, 8)}
    for value, message in (
        (0, "at least 1, got 0"),
        (10.5, r"a whole number, got 10\.5"),
        (True, "a whole number, got True"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {message}"):
            NetworkConfig("convsnn", **settings | {name: value})
    assert json.dumps(asdict(NetworkConfig("convsnn", **settings | {name: np.int64(3)})))


@pytest.mark.parametrize(
    ("size", "message"),
    [((8,), "height and width, got"), (8, "height and width, got 8"), ((8, 0), "at least 1"), ((8, 8.5), "a whole")],
)
def test_sizes_that_are_no_height_and_width_are_refused(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"image_size must be {message}"):
        NetworkConfig("convsnn", 10, 3, size)
    assert NetworkConfig("convsnn", 10, 3, torch.zeros(8, 9).shape).image_size == (8, 9)


@pytest.mark.parametrize("name", ["width", "v_th", "gamma"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_settings_out_of_their_range_are_refused(name: str, value: float) -> None:
    settings = {"num_classes": 10, "in_channels": 3, "image_size": (8, 8)} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {value}"):
        NetworkConfig("convsnn", **settings)


def test_a_width_beyond_any_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be at most 100, got 1e\+18; 1 is the network as published"):
        NetworkConfig("convsnn", 10, 3, (8, 8), width=1e18)


def test_a_threshold_whose_square_float32_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"v_th must be at most 1e\+18, got 1e\+39"):
        NetworkConfig("convsnn", 10, 3, (8, 8), v_th=1e39)


@pytest.mark.parametrize("name", ["width", "tau", "v_th", "gamma", "smooth_spike"])
def test_settings_that_are_no_numbers_are_refused(name: str) -> None:
    settings: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "image_size": (8, 8), name: "1"}
    with pytest.raises(ValueError, match=f"{name} must be a number, got '1'"):
        NetworkConfig("convsnn", **settings)
    assert json.dumps(asdict(NetworkConfig("convsnn", **settings | {name: np.float32(0.5)})))


def test_a_twin_is_wanted_or_not() -> None:
    with pytest.raises(ValueError, match="ann must be True or False, got 'no'"):
        NetworkConfig("convsnn", 10, 3, (8, 8), ann="no")  # type: ignore[arg-type]


def test_a_leak_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
        build_network(NetworkConfig("convsnn", 10, 3, (8, 8), tau=2.0))


# --- the user's own ----------------------------------------------------------------------------------------------

MODULE = """
from torch import nn
from tetdeploy.neurons import LIF

def network(num_classes, in_channels, image_size):
    return nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

def number(num_classes, in_channels, image_size):
    return 3

def too_few(num_classes):
    return nn.Identity()

def normed(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(1, num_classes)))

def lazy(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def lazy_statistics(num_classes, in_channels, image_size):
    return nn.LazyBatchNorm2d(affine=False)

class InAList(nn.Module):
    def __init__(self, num_classes, register):
        super().__init__()
        self.layers = [nn.Flatten(), nn.Linear(24, num_classes), {"teacher": nn.Linear(1, 1).requires_grad_(False)}]
        self.layers.append(self.layers)
        if register:
            self.readout = self.layers[1]

def in_a_list(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Identity(), InAList(num_classes, register=False))

def in_a_list_too(num_classes, in_channels, image_size):
    return InAList(num_classes, register=True)

class Beside(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = {"teacher": nn.Sequential(nn.Linear(1, 1), LIF(), nn.Dropout()).requires_grad_(False)}
        self.stages = [self.layers, *layers]

def neurons_in_a_list(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Identity(), Beside(nn.Sequential(nn.Identity(), LIF())))

def dropout_in_a_list(num_classes, in_channels, image_size):
    return Beside(nn.Dropout(0.1))

def teacher_in_a_list(num_classes, in_channels, image_size):
    lif = LIF()
    return nn.Sequential(lif, Beside(lif, nn.ReLU()))

value = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    return name


def test_an_own_network_is_found_in_the_current_folder(own_module: str) -> None:
    config = NetworkConfig(f"{own_module}:network", 7, 2, (3, 4))
    network = import_network(config)
    assert config.is_own and isinstance(network, nn.Linear)
    assert (network.in_features, network.out_features) == (24, 7)


def test_the_code_of_an_own_network_is_told_by_its_file(own_module: str) -> None:
    config = NetworkConfig(f"{own_module}:network", 7, 2, (3, 4))
    assert code_sha256(config) is None  # it is not imported for this
    import_network(config)
    assert code_sha256(config) == sha256_of(Path(f"{own_module}.py"))
    for model in ("convsnn", "__main__:network", "sys:network"):
        assert code_sha256(NetworkConfig(model, 7, 2, (3, 4))) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", r"'own_\d+' has no 'missing' \(.*own_\d+\.py\); it has .*normed, "),
        ("number", r"own_\d+:number must return a torch\.nn\.Module, got int"),
        ("too_few", r"own_\d+:too_few must be a function of num_classes, in_channels, image_size: got an unexpected"),
        ("normed", r"own_\d+:normed returns a network whose '1' keeps a weight that it computes of others"),
        ("lazy_statistics", "whose 'running_mean' gets its size from the first image"),
        ("lazy", r"own_\d+:lazy returns a network whose .1\.weight. gets its size from the first image; .* run the"),
        ("in_a_list", r"own_\d+:in_a_list returns a network whose '1' keeps weights to train out of .*; use nn\.Mod"),
        ("neurons_in_a_list", r"own_\d+:neurons_in_a_list returns a network whose '1' keeps neurons or dropout where "),
        ("dropout_in_a_list", "whose 'module' keeps neurons or dropout where PyTorch does not see .*; use nn.ModuleL"),
        ("value", r"own_\d+:value must be a function of num_classes, .*: 3 is not a callable object"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_own_networks_that_are_none_are_refused(own_module: str, function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_network(NetworkConfig(f"{own_module}:{function}", 7, 2, (3, 4)))


def test_layers_of_an_own_network_may_be_in_a_list_as_well(own_module: str) -> None:
    network = import_network(NetworkConfig(f"{own_module}:in_a_list_too", 7, 2, (3, 4)))
    assert set(network.state_dict()) == {"readout.weight", "readout.bias"}
    assert isinstance(import_network(NetworkConfig(f"{own_module}:teacher_in_a_list", 7, 2, (3, 4))), nn.Sequential)


def test_an_own_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot import 'network' from 'no_such\.module': No module named 'no_such'"):
        import_network(NetworkConfig("no_such.module:network", 10, 3, (8, 8)))


class Answering(nn.Module):
    """Gives what it was made with."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, T: int | None = None) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.zeros(3, 5, 4), r"\[3, 5, 4\]"),  # would train, and name classes that there are not
        (torch.zeros(3, 5, 1), r"\[3, 5, 1\]"),
        (torch.zeros(5, 3, 2), r"\[5, 3, 2\]"),
        (torch.zeros(5, 2), r"\[5, 2\]"),
        ((torch.zeros(3, 5, 2), torch.zeros(3, 5, 2)), "a tuple"),
        ({"class": torch.zeros(3, 5, 2)}, "a dict"),
    ],
)
def test_an_own_network_that_gives_other_than_logits_is_told_so(answer: Any, got: str) -> None:
    config = NetworkConfig("mine:net", 2, 3, (8, 8))
    asked = Classifier(Answering(answer), config=config, mean=(0.0,) * 3, std=(1.0,) * 3, class_names=("cat", "dog"))
    message = rf"mine:net must give logits \[T, N, K\], here \[3, 5, 2\], got {got}; time comes first"
    with pytest.raises(ValueError, match=message):
        asked(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=message):
        asked(torch.zeros(3, 5, 3, 8, 8))


def test_images_that_are_none_are_refused() -> None:
    config = NetworkConfig("convsnn", 2, 3, (8, 8), width=0.1)
    asked = Classifier(build_network(config), config=config, mean=(0.0,) * 3, std=(1.0,) * 3, class_names=("a", "b"))
    images: Any
    for images, message in (
        (np.zeros((5, 3, 8, 8), np.uint8), r"of type Tensor, got ndarray; pass torch\.from_numpy"),
        (torch.zeros(5, 3, 8, 8, dtype=torch.int64), "uint8, or floating point that is normalised .*, got torch.int64"),
        (torch.zeros(5, 1, 8, 8, dtype=torch.uint8), r"with C=3, got \[5, 1, 8, 8\]"),  # which would be broadcast
        (torch.zeros(2, 5, 4, 8, 8), r"with C=3, got \[2, 5, 4, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"images must be .*{message}"):
            asked(images, 2)


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="strided must be True or False, got 'no'"):
        VGGSNN(num_classes=2, in_channels=2, image_size=(16, 16), strided="no")  # type: ignore[arg-type]


def test_images_of_another_size_are_the_layers_to_judge() -> None:
    config = NetworkConfig("convsnn", 2, 3, (8, 8), width=0.1)
    options: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "class_names": ("a", "b")}
    asked = Classifier(build_network(config), config=config, **options)
    T: int | None
    for x, T in ((torch.zeros(1, 3, 16, 12), 2), (torch.zeros(2, 1, 3, 16, 12), None)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shape") as caught:
            asked(x, T)
        assert caught.value.__notes__ == ["the network was made for images of 8x8, and these are of 16x12"]
    any_size = Classifier(Pooled(), config=config, **options)
    assert any_size(torch.zeros(1, 3, 16, 12), 2).shape == (2, 1, 2)
    with pytest.raises(RuntimeError, match="own fault"):  # of the size that it was made for: what the network raises
        Classifier(Faulty(), config=config, **options)(torch.zeros(1, 3, 8, 8), 2)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif, self.readout = LIF(), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        logits: torch.Tensor = self.readout(self.lif(x.expand(T, *x.shape)).mean((3, 4)))
        return logits


class Faulty(nn.Module):
    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        raise RuntimeError("own fault")


def test_own_networks_are_imported_only_on_request() -> None:
    config = NetworkConfig("mine.nets:small", 10, 3, (8, 8))
    with pytest.raises(ValueError, match=r"not imported because a file says so; pass --model mine\.nets:small"):
        build_network(config)


# --- classifier --------------------------------------------------------------------------------------------------


def classifier(**options: Any) -> Classifier:
    config = NetworkConfig("convsnn", 2, 3, (8, 8), width=0.25)
    settings = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 2.0), "class_names": ("cat", "dog")} | options
    return Classifier(lively(build_network(config)), config=config, **settings).eval()


def test_uint8_images_are_normalised_and_floats_are_not() -> None:
    net, x = classifier(), torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    by_hand = torch.stack([(x[:, c] / 255 - m) / s for c, (m, s) in enumerate([(0.5, 0.5), (0.25, 0.25), (0, 2)])], 1)
    torch.testing.assert_close(net.normalize(x), by_hand)
    torch.testing.assert_close(net(x, 3), net.network(net.normalize(x), 3), rtol=0, atol=0)
    torch.testing.assert_close(net(by_hand, 3), net.network(by_hand, 3), rtol=0, atol=0)
    assert (net(x, 3) - net(x.float(), 3)).abs().max() > 0


def test_uint8_frames_are_normalised_step_by_step() -> None:
    net, frames = classifier(), torch.randint(256, (3, 4, 3, 8, 8), dtype=torch.uint8)
    wanted = net.network(torch.stack([net.normalize(frame) for frame in frames]))
    torch.testing.assert_close(net(frames), wanted, rtol=0, atol=0)
    torch.testing.assert_close(net(frames, T=3), wanted, rtol=0, atol=0)


def test_a_classifier_knows_its_images_and_keeps_normalisation_out_of_the_weights() -> None:
    net = classifier(data="pets")
    assert (net.image_shape, net.class_names, net.data) == ((3, 8, 8), ("cat", "dog"), "pets")
    assert {name.partition(".")[0] for name in net.state_dict()} == {"network"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "mean and std must have 3 values each, got 1 and 3"),
        ({"std": (0.5, 0.5)}, "mean and std must have 3 values each, got 3 and 2"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0 in every channel, got"),
        ({"std": (0.5, math.nan, 0.5)}, "std must be above 0 in every channel, got"),
        ({"std": (0.5, math.inf, 0.5)}, "mean and std must be finite, got"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean and std must be finite, got"),
        ({"class_names": ("cat",)}, "2 classes need as many names, got 1"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**options)


@pytest.mark.parametrize("v_th", [0.5, 1.0])
def test_the_hidden_neurons_of_resnet19_fire_from_the_start(v_th: float) -> None:
    """Their currents have a standard deviation of v_th, to what the rates in front of them vary with T and width."""
    torch.manual_seed(0)
    network = ResNet19(num_classes=10, in_channels=3, image_size=(SIDE, SIDE), width=0.25, v_th=v_th).train()
    with torch.no_grad():
        current = network.fc1(network.blocks(network.lif1(network.encode(torch.randn(16, 3, SIDE, SIDE), 4))))
        spikes = network.lif2(current)
    assert 0.7 * v_th < current.std() < 1.4 * v_th
    assert 0.05 < spikes.mean() < 0.3


def test_vggsnn_starts_as_the_authors() -> None:
    network = build_network(NetworkConfig("vggsnn", 3, 2, (SIDE, SIDE), width=0.25))
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.15)
