"""The networks at the paper's widths, their small forms through training and export, and their ANN twins."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import shared_traces
from torch import Tensor, nn
from zoo_helpers import MODELS, SIZES, classifier_of, config_of, for_export, lively

from tetdeploy.checkpoint import load, save_checkpoint
from tetdeploy.data import ImageSet
from tetdeploy.export import ExportConfig, export_model
from tetdeploy.export.causality import check_steps
from tetdeploy.folding import count_batchnorm, fold_batchnorm
from tetdeploy.layers import DirectEncoding, OverTime
from tetdeploy.networks import (
    NETWORKS,
    Classifier,
    NetworkConfig,
    ann_twin,
    build_network,
    import_network,
    smooth_twin,
)
from tetdeploy.networks.sew_resnet34 import SEWBlock
from tetdeploy.networks.smooth_spike import SmoothLIF
from tetdeploy.neurons import IF, LIF
from tetdeploy.train import TrainConfig, train


def test_every_network_is_tested() -> None:
    assert set(NETWORKS) == set(SIZES)


@pytest.mark.parametrize(
    ("model", "num_classes", "parameters"),
    [
        # convolutions without bias 8 x 2 + 1 + 3 shortcuts, BN, and two linear layers
        ("resnet19", 10, 12_630_858),
        # sum of the shapes in the fixture of the authors' checkpoints
        ("vggsnn", 10, 9_271_498),
        ("vggsnn-strided", 10, 9_271_498),
        # torchvision's resnet34
        ("spiking-resnet34", 1000, 21_797_672),
        ("sew-resnet34", 1000, 21_797_672),
    ],
)
def test_full_widths_have_the_published_number_of_parameters(model: str, num_classes: int, parameters: int) -> None:
    channels, side, _ = SIZES[model]
    with torch.device("meta"):
        network = build_network(NetworkConfig(model, num_classes, channels, (side, side)))
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(("model", "neuron", "layers"), [("spiking-resnet34", LIF, 33), ("sew-resnet34", IF, 36)])
def test_resnet34_has_its_weights_shapes(model: str, neuron: type, layers: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours = build_network(NetworkConfig(model, 1000, 3, (224, 224)))
        theirs = torchvision.models.resnet34()
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert sum(type(module) is neuron for module in ours.modules()) == layers
    assert not any(isinstance(module, nn.ReLU) for module in ours.modules())


@pytest.mark.parametrize("model", MODELS)
def test_images_and_repeated_frames_give_the_same_logits(model: str) -> None:
    classifier = classifier_of(model)
    images = torch.rand(2, *classifier.image_shape)
    with torch.no_grad():
        logits = classifier(images, 3)
        frames = classifier(images.expand(3, *images.shape))
    assert logits.shape == (3, 2, 5)
    torch.testing.assert_close(frames, logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits[0], logits[2])  # neurons fire, and what they fire depends on time


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_learns(model: str) -> None:
    config = config_of(model)
    network = build_network(config)
    images = torch.randn(4, config.in_channels, *config.image_size)
    network(images, 4).square().mean().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert not [n for n, grad in grads.items() if grad is None or not torch.isfinite(grad).all() or not grad.any()]


@pytest.mark.parametrize("model", MODELS)
def test_sizes_that_are_not_square_and_odd(model: str) -> None:
    smallest = SIZES[model][2]
    config = config_of(model, image_size=(smallest + 5, 2 * smallest + 3))
    network = build_network(config).eval()
    with torch.no_grad():
        assert network(torch.randn(2, config.in_channels, *config.image_size), 2).shape == (2, 2, 5)


@pytest.mark.parametrize("model", MODELS)
def test_images_that_are_too_small_are_refused(model: str) -> None:
    side = SIZES[model][2]
    with pytest.raises(ValueError, match=rf"^{model} needs images of at least {side}x{side} pixels, got 64x{side - 1}"):
        build_network(config_of(model, image_size=(64, side - 1)))


def test_average_pooling_comes_after_the_neurons() -> None:
    """Spikes 1, 0, 0, 0 pool to a quarter; pooling currents first would give 0 or 1."""
    classifier = classifier_of("vggsnn")
    seen: list[Tensor] = []
    pools = [m for m in classifier.network.modules() if isinstance(m, nn.AvgPool2d)]
    assert len(pools) == 4
    for pool in pools:
        pool.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    classifier.network(torch.randn(4, 2, 16, 16), 4)
    assert all(set(spikes.unique().tolist()) <= {0.0, 1.0} for spikes in seen[::2])
    assert set(seen[1].unique().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_a_silent_sew_block_is_the_identity() -> None:
    block = SEWBlock(4, 4, stride=1, v_th=1.0, gamma=1.0).eval()
    nn.init.zeros_(block.layer2[1].weight)  # the last BN gives no current, so nothing fires
    x = torch.randint(3, (2, 1, 4, 6, 6)).float()
    assert torch.equal(block(x), x)


def test_sew_adds_spikes_to_spikes() -> None:
    classifier = classifier_of("sew-resnet34")
    values: set[float] = set()
    for block in classifier.network.blocks:
        block.register_forward_hook(lambda module, inputs, output: values.update(output.unique().tolist()))
    classifier.network(torch.randn(2, 3, 32, 32), 3)
    assert values <= set(map(float, range(8)))  # a stage of six blocks: at most 1 + 6
    assert max(values) >= 2  # an OR would stay binary


def test_sew_neurons_never_leak_and_the_configuration_says_so() -> None:
    config = config_of("sew-resnet34", tau=0.5)
    assert config.tau == 1.0
    assert {m.tau for m in build_network(config).modules() if isinstance(m, LIF)} == {1.0}


@pytest.mark.parametrize("model", MODELS)
def test_neuron_parameters_reach_every_neuron(model: str) -> None:
    network = build_network(config_of(model, tau=0.25, v_th=0.5, gamma=2.0))
    tau = 1.0 if model == "sew-resnet34" else 0.25
    assert {(m.tau, m.v_th, m.gamma) for m in network.modules() if isinstance(m, LIF)} == {(tau, 0.5, 2.0)}


# --- export -----------------------------------------------------------------------------------------------------------


EVERY = ("unrolled", "dynamic", "step")
LAYOUTS = {  # every layout has two or more of them: what layouts do to layers is for test_export.py
    "convsnn": ("unrolled",),
    "resnet19": ("unrolled", "dynamic"),
    "vggsnn": ("step",),
    "vggsnn-strided": ("dynamic",),
    "spiking-resnet34": ("step",),
    "sew-resnet34": ("dynamic",),
}


@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model in MODELS for layout in LAYOUTS.get(model, EVERY)]
)
def test_every_network_exports(model: str, layout: Any, tmp_path: Path) -> None:
    classifier = for_export(model)
    # Few images and steps: in deep networks with random weights a spike that one ulp flips sets off an avalanche, which
    # the export lets pass where PyTorch's own rounding does the same.
    images = np.random.default_rng(0).integers(256, size=(8, *classifier.image_shape), dtype=np.uint8)
    config = ExportConfig(layout, T=3, trained_T=1)
    with shared_traces():
        exported = export_model(classifier, tmp_path / "m.onnx", config, images, num_check=8)
    neurons = sum(isinstance(module, LIF) for module in classifier.modules())
    batch_norms = sum(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())
    assert (exported.num_neurons, exported.num_folded, exported.uncounted) == (neurons, batch_norms, ())
    assert exported.parity is not None and exported.parity.local_mismatch_rate <= 1e-4


def test_frames_of_two_polarities_export(tmp_path: Path) -> None:
    classifier = classifier_of("vggsnn")
    frames = np.random.default_rng(0).integers(256, size=(10, 4, 2, 16, 16), dtype=np.uint8)
    config = ExportConfig("dynamic", T=4, trained_T=2, encoding="frames")
    exported = export_model(classifier, tmp_path / "m.onnx", config, frames, num_check=10)
    assert exported.parity is not None and exported.parity.T == 4


# --- ANN twins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_twin_has_the_same_weights_and_no_neurons(model: str) -> None:
    network, twin = build_network(config_of(model)), build_network(config_of(model, ann=True))
    wanted, state = network.state_dict(), twin.state_dict()
    assert list(state) == list(wanted)
    assert all(state[name].shape == wanted[name].shape for name in wanted)
    twin.load_state_dict(wanted)
    neurons = sum(isinstance(module, LIF) for module in network.modules())
    assert sum(isinstance(module, nn.ReLU) for module in twin.modules()) == neurons
    assert not any(isinstance(module, LIF) for module in twin.modules())


@pytest.mark.parametrize("model", MODELS)
def test_a_twin_trains_at_one_step(model: str) -> None:
    config = config_of(model, ann=True)
    twin = build_network(config)
    images = torch.randn(4, config.in_channels, *config.image_size)
    logits = twin(images, 1)
    assert logits.shape == (1, 4, 5)
    assert torch.equal(twin.eval()(images), twin(images, 1))
    logits.square().mean().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_the_training_loop_takes_a_twin(tmp_path: Path) -> None:
    config = config_of("convsnn", image_size=(8, 8), ann=True)
    names, statistics = tuple("abcde"), {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    classifier = Classifier(build_network(config), config=config, class_names=names, **statistics)
    labels = np.arange(40) % 5
    images = np.random.default_rng(0).integers(40, size=(40, 3, 8, 8), dtype=np.uint8)
    images += (labels * 50).astype(np.uint8)[:, None, None, None]  # brighter from class to class
    data = ImageSet("toy", "train", images, labels, names, **statistics)
    settings = TrainConfig(T=1, epochs=20, batch_size=20, lr=0.01, augment="none", lam=0.0, device="cpu")
    result = train(classifier, data, data, settings, tmp_path / "run")
    assert result.best is not None and result.best.val_accuracy is not None and result.best.val_accuracy > 0.6
    loaded = load(result.checkpoint)
    assert loaded.config.ann
    with torch.no_grad():
        assert loaded(torch.from_numpy(images), 1).shape == (1, 40, 5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, when it copies a traced graph
@pytest.mark.parametrize("model", MODELS)
def test_a_twins_batch_normalisation_folds(model: str) -> None:
    config = config_of(model, ann=True)
    shape = (config.in_channels, *config.image_size)
    twin = lively(build_network(config), *shape).double()
    images = torch.randn(2, *shape, dtype=torch.float64)
    program = torch.export.export(twin, (images, 1))
    folded = fold_batchnorm(program)
    assert count_batchnorm(program.graph) > 0 and count_batchnorm(folded.graph) == 0
    torch.testing.assert_close(folded(images, 1), twin(images, 1), rtol=1e-9, atol=1e-9)


def test_a_twin_of_resnet19_computes_relu() -> None:
    """Against the layers called by hand."""
    twin = lively(build_network(config_of("resnet19", image_size=(8, 8), ann=True)), 3, 8, 8)
    images = torch.randn(3, 3, 8, 8)

    def layer(module: nn.Module, x: Tensor) -> Tensor:
        return nn.Sequential.forward(module, x)  # type: ignore[arg-type]

    with torch.no_grad():
        x = layer(twin.encode, images).relu()
        for block in twin.blocks:
            main = layer(block.layer2, layer(block.layer1, x).relu())
            x = (main + (x if isinstance(block.shortcut, nn.Identity) else layer(block.shortcut, x))).relu()
        x = layer(twin.fc2, layer(twin.fc1, x).relu())
        torch.testing.assert_close(twin(images, 1), x[None], rtol=1e-5, atol=1e-5)


def test_a_twin_takes_frames_one_by_one() -> None:
    twin = lively(build_network(config_of("vggsnn", ann=True)), 2, 16, 16)
    frames = torch.randn(3, 2, 2, 16, 16)
    expected = torch.cat([twin(frame) for frame in frames])
    torch.testing.assert_close(twin(frames), expected, rtol=1e-5, atol=1e-5)


def test_making_a_twin_leaves_the_network() -> None:
    network = build_network(config_of("resnet19"))
    before = str(network)
    twin = ann_twin(network)
    assert str(network) == before
    twin.fc2[0].weight.data.zero_()
    assert network.fc2[0].weight.any()


def test_a_twin_of_neurons_has_their_settings_and_leaves_membranes_as_they_are() -> None:
    (twin,) = ann_twin(nn.Sequential(LIF(tau=0.3, v_th=0.7, gamma=2.0)))
    assert (twin.tau, twin.v_th, twin.gamma) == (0.3, 0.7, 2.0)
    current, u = torch.randn(1, 3), torch.rand(3)
    activations, u_last = twin.with_state(current, u)
    assert torch.equal(activations, current.relu()) and u_last is u


def test_a_twin_has_no_neurons_in_a_list_that_only_the_network_knows() -> None:
    network = nn.Sequential(nn.Linear(3, 3), LIF())
    network.stages = [network[1]]
    current = torch.randn(1, 3) + 1.0
    (relu,) = ann_twin(network).stages
    (smooth,) = smooth_twin(network, k=3).stages
    assert torch.equal(relu(current), current.relu())
    torch.testing.assert_close(smooth(current), torch.sigmoid(3 * (current - 1.0)))
    assert type(network.stages[0]) is LIF


def test_a_twin_refuses_more_than_one_step() -> None:
    twin = build_network(config_of("convsnn", ann=True))
    for T in (0, 4):
        with pytest.raises(ValueError, match=rf"an ANN has no time .*use T=1, got T={T}"):
            twin(torch.randn(2, 3, 4, 4), T)
    with pytest.raises(ValueError, match=r"hold T=3 steps, but T=4 was asked for"):
        twin(torch.randn(3, 2, 3, 4, 4), 4)
    with pytest.raises(ValueError, match=r"input must be images"):
        twin(torch.randn(3, 4, 4), 1)


def test_what_does_not_spike_has_no_twin() -> None:
    with pytest.raises(ValueError, match=r"Linear has no LIF or IF neurons to replace"):
        ann_twin(nn.Linear(2, 2))


class SlowLIF(LIF):
    """Settings of its own, and nothing else."""

    def __init__(self) -> None:
        super().__init__(tau=0.9)


class ScaledLIF(LIF):
    def forward(self, current: Tensor) -> Tensor:
        return super().forward(current * 1.1)


class LearnedLIF(LIF):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


def test_what_neurons_compute_of_their_own_is_not_dropped() -> None:
    assert [m.tau for m in ann_twin(nn.Sequential(SlowLIF(), IF())) if isinstance(m, nn.ReLU)] == [0.9, 1.0]
    for make in (ann_twin, lambda network: smooth_twin(network, k=3)):
        for own in (ScaledLIF, LearnedLIF):
            with pytest.raises(ValueError, match=f"^{own.__name__} computes or learns something of its own"):
                make(nn.Sequential(LIF(), own()))


class OwnNetwork(nn.Module):
    """A user's own, with one neuron module under two names and one encoder with named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = DirectEncoding()
        self.encode.add_module("conv", nn.Conv2d(1, 4, 3))
        self.lif = self.again = LIF()
        self.readout = OverTime(nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.again(self.lif(self.encode(x, T))))
        return logits


def test_a_users_own_network_has_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_nets")
    module.small = lambda **options: OwnNetwork()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_nets", module)
    twin = import_network(NetworkConfig("own_nets:small", 5, 1, (4, 4), ann=True))
    assert list(twin.state_dict()) == list(OwnNetwork().state_dict())
    assert not any(isinstance(m, LIF) for m in twin.modules())
    assert twin(torch.randn(2, 1, 4, 4)).shape == (1, 2, 5)


def test_a_spiking_network_does_not_pass_for_a_twin() -> None:
    config = NetworkConfig("own_nets:small", 5, 1, (4, 4), ann=True)
    with pytest.raises(ValueError, match=r"says ann, but the network has neurons; pass ann_twin\(network\)"):
        Classifier(OwnNetwork(), config=config, mean=(0.0,), std=(1.0,), class_names=tuple("abcde"))


def test_a_twin_does_not_pass_for_a_spiking_network() -> None:
    spiking = NetworkConfig("own_nets:small", 5, 1, (4, 4))
    smooth = replace(spiking, smooth_spike=2.0)
    arguments: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "class_names": tuple("abcde")}
    with pytest.raises(ValueError, match="is an ANN twin, but the configuration does not say ann; set ann=True"):
        Classifier(ann_twin(OwnNetwork()), config=spiking, **arguments)
    with pytest.raises(ValueError, match=r"says smooth_spike=0, but .* smooth spikes of k=3; set smooth_spike"):
        Classifier(smooth_twin(OwnNetwork(), k=3), config=spiking, **arguments)
    with pytest.raises(ValueError, match=r"says smooth_spike=2, but .* smooth spikes of k=3"):
        Classifier(smooth_twin(OwnNetwork(), k=3), config=smooth, **arguments)
    with pytest.raises(ValueError, match=r"smooth_spike=2, but .* spikes of 0 and 1; .*pass smooth_twin\(network, k"):
        Classifier(OwnNetwork(), config=smooth, **arguments)


class Hybrid(nn.Module):
    """Of a user's own making: a twin's layers before neurons, and more than one kind of these."""

    def __init__(self, *kinds: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kinds)

    def forward(self, x: Tensor, T: int) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_networks_of_several_kinds_are_their_makers_affair() -> None:
    spiking = NetworkConfig("own_nets:hybrid", 5, 1, (4, 4))
    arguments: dict[str, Any] = {"mean": (0.0,), "std": (1.0,), "class_names": tuple("abcde")}
    relu = ann_twin(nn.Sequential(LIF()))
    Classifier(Hybrid(relu, LIF()), config=spiking, **arguments)
    smooth = Classifier(Hybrid(LIF(), SmoothLIF(k=3)), config=spiking, **arguments)
    with pytest.raises(ValueError, match="trained with smooth spikes, Sigmoid"):
        check_steps(smooth, torch.zeros(2, 1, 4, 4), "direct")


def test_a_classifiers_twin_is_saved_as_what_it_is(tmp_path: Path) -> None:
    classifier = classifier_of("convsnn", image_size=(4, 4))
    for twin, T in ((ann_twin(classifier), 1), (smooth_twin(classifier, k=3), 2)):
        save_checkpoint(tmp_path / "twin.safetensors", twin, training={}, provenance={})
        loaded = load(tmp_path / "twin.safetensors")
        x = torch.rand(2, 3, 4, 4)
        assert torch.equal(loaded(x, T), twin(x, T))
        with pytest.raises(ValueError, match=r"ANN|smooth spikes"):
            export_model(loaded, tmp_path / "m.onnx", ExportConfig(), np.zeros((2, 3, 4, 4), np.uint8))
    again = ann_twin(smooth_twin(classifier, k=3))
    assert (again.config.ann, again.config.smooth_spike) == (True, 0.0)
    assert classifier.config.is_spiking
