"""NIR files: what is in them, read back; the same spikes in other frameworks; what NIR cannot hold."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_helpers import invoke, printed, refused
from export_helpers import convsnn, digits
from run_helpers import small_files
from torch import Tensor, nn
from zoo_helpers import classifier_of

from tetdeploy.export import ExportConfig, export_model
from tetdeploy.export.margins import margins
from tetdeploy.export.nir_format import DT, export_nir, nir_graph
from tetdeploy.export.recorder import NeuronRecorder, compare_torch
from tetdeploy.folding import FoldingError
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import NETWORKS, Classifier, NetworkConfig
from tetdeploy.neurons import IF, LIF

nir = pytest.importorskip("nir")

SIZE = 16


@cache
def images() -> np.ndarray[Any, Any]:
    """Real digits, 16x16."""
    return np.kron(digits().images[:192], np.ones((2, 2), np.uint8))


def oblong() -> np.ndarray[Any, Any]:
    """The same, 12x20."""
    return np.pad(images()[:, :, 2:14], ((0, 0), (0, 0), (0, 0), (2, 2)))


def calibrated(network: nn.Module, x: np.ndarray[Any, Any] | None = None) -> Classifier:
    """A classifier in inference whose BN have seen data, and whose neurons fire in every layer."""
    x = images() if x is None else x
    config = NetworkConfig("my.networks:odd", num_classes=10, in_channels=1, image_size=x.shape[2:])
    data = digits()
    made = Classifier(network, config=config, mean=data.mean, std=data.std, class_names=data.class_names)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.9, 1.6)
            nn.init.uniform_(module.bias, -0.1, 0.3)
            module.momentum = None  # the mean over the batches below
    with torch.no_grad():
        for start in (0, 96):
            made.train()(torch.from_numpy(x[start : start + 96]), 3)
    return made.eval()


@cache
def built(name: str, width: float, **neuron: float) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": (SIZE, SIZE), "width": width}
        return calibrated(NETWORKS[name](**options, **neuron))


class Everything(nn.Module):
    """All that a NIR graph can hold, once; `change` stands in front of the second layer."""

    def __init__(self, change: nn.Module | None = None) -> None:
        super().__init__()
        self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), tdBN(4))
        self.lif1 = LIF(tau=0.25, v_th=0.8)
        self.change = OverTime(change or nn.Sequential(nn.Dropout(), nn.MaxPool2d(3, 1, padding=1), nn.Dropout2d()))
        self.layer2 = OverTime(nn.Conv2d(4, 4, 3, padding="same", dilation=2), tdBN(4))
        self.if2 = IF(v_th=1.5)
        self.pool = OverTime(nn.AvgPool2d(2, padding=1, stride=1), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.hidden = OverTime(nn.Linear(36, 6, bias=False))
        self.lif3 = LIF(v_th=0.1)
        self.readout = OverTime(nn.Linear(6, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        first = self.lif1(self.encode(x, T))
        second = self.layer2(self.change(first)) + first
        logits: Tensor = self.readout(self.lif3(self.hidden(self.pool(self.if2(second)))))
        return logits


class Oblong(nn.Module):
    """Nothing in it is square, a convolution has groups and neither bias nor BN, what can be is done in place, and it
    has two heads, whose answers it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, stride=(2, 1), padding=1, bias=False), tdBN(4))
        self.lif1 = LIF(v_th=0.8)
        self.pool1 = OverTime(nn.Dropout(inplace=True), nn.MaxPool2d((1, 3)), nn.Dropout2d(inplace=True))
        self.layer2 = OverTime(nn.Conv2d(4, 4, 3, stride=(2, 1), padding=1, groups=2, bias=False))
        self.down = OverTime(nn.AvgPool2d((3, 1), stride=(2, 1), padding=(1, 0)))
        self.lif2 = LIF(tau=0.25, v_th=0.3)
        self.pool2 = OverTime(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten())
        self.readout, self.second = OverTime(nn.Linear(24, 10)), OverTime(nn.Linear(4, 10, bias=False))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        first = self.pool1(self.lif1(self.encode(x, T)))  # [T, N, 4, 6, 6]
        second = self.layer2(first)  # [T, N, 4, 3, 6]
        second += self.down(first)
        spikes = self.lif2(second)
        logits: Tensor = sum([self.readout(self.pool2(spikes)), self.second(spikes.mean((-1, 3)))])  # from 0
        return logits


# ------------------------------------------------------------------------------------------- what is in the file


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Any]:
    """A network, and the graph of its file read back."""
    torch.manual_seed(0)
    made = calibrated(Everything())
    file = tmp_path_factory.mktemp("nir") / "deep" / "model.nir"
    export_nir(made, file, trained_T=3, source={"checkpoint_sha256": "ab", "loss": math.nan})
    return made, nir.read(file)


def test_every_layer_is_a_node_of_its_name(everything: tuple[Classifier, Any]) -> None:
    kinds = {name: type(node).__name__ for name, node in everything[1].nodes.items()}
    assert kinds == {
        "input": "Input", "encode.0": "Conv2d", "lif1": "LIF", "change.0.1": "AvgPool2d", "change.0.1.any": "LIF",
        "layer2.0": "Conv2d", "if2": "IF", "pool.0": "AvgPool2d", "pool.1": "AvgPool2d", "pool.2": "Flatten",
        "hidden.0": "Linear", "lif3": "LIF", "readout.0": "Affine", "output": "Output",
    }  # fmt: skip


def test_edges_meet_where_the_network_adds(everything: tuple[Classifier, Any]) -> None:
    chain = ["input", "encode.0", "lif1", "change.0.1", "change.0.1.any", "layer2.0", "if2", "pool.0", "pool.1",
             "pool.2", "hidden.0", "lif3", "readout.0", "output"]  # fmt: skip
    assert sorted(everything[1].edges) == sorted([*itertools.pairwise(chain), ("lif1", "if2")])


def test_weights_are_folded(everything: tuple[Classifier, Any]) -> None:
    """Eq. 6, written out: W' = W gamma / alpha, b' = beta + (b - mu) gamma / alpha."""
    network, graph = everything
    conv, bn = network.network.encode
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    node = graph.nodes["encode.0"]
    np.testing.assert_allclose(node.weight, weight.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(node.bias, (bn.bias - bn.running_mean * scale).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert (node.weight.dtype, tuple(node.stride), tuple(node.padding)) == (np.float32, (2, 2), (1, 1))
    same = graph.nodes["layer2.0"]
    assert (same.padding, tuple(same.dilation), int(same.groups)) == ("same", (2, 2), 1)


def test_one_euler_step_of_the_neurons_is_ours(everything: tuple[Classifier, Any]) -> None:
    """v + dt / tau (v_leak - v + R I), by the file's own numbers, is tau u + I; with no leak v + dt R I is u + I."""
    v, current = np.random.default_rng(0).normal(size=(2, 4, 8, 8))
    lif = everything[1].nodes["lif1"]
    np.testing.assert_allclose(v + DT / lif.tau * (lif.v_leak - v + lif.r * current), 0.25 * v + current, atol=1e-12)
    assert {*lif.v_threshold.flat} == {0.8} and {*lif.v_reset.flat} == {0.0}
    no_leak = everything[1].nodes["if2"]
    np.testing.assert_allclose(v + DT * no_leak.r * current, v + current, atol=1e-12)
    assert {*no_leak.v_threshold.flat} == {1.5} and {*no_leak.v_reset.flat} == {0.0}


def test_a_maximum_of_spikes_is_their_mean_and_neurons_that_remember_nothing(
    everything: tuple[Classifier, Any],
) -> None:
    mean, neurons = (everything[1].nodes[name] for name in ("change.0.1", "change.0.1.any"))
    assert [tuple(pair) for pair in (mean.kernel_size, mean.stride, mean.padding)] == [(3, 3), (1, 1), (1, 1)]
    steps = (torch.rand(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    maxima = nn.functional.max_pool2d(steps, 3, 1, 1).numpy() == 1
    assert 0.2 < maxima.mean() < 0.8
    v = np.zeros(neurons.tau.shape)
    for current, expected in zip(nn.functional.avg_pool2d(steps, 3, 1, 1).numpy(), maxima, strict=True):
        v = v + DT / neurons.tau * (neurons.v_leak - v + neurons.r * current)
        fires = v > neurons.v_threshold
        np.testing.assert_array_equal(fires, expected)
        v = np.where(fires, neurons.v_reset, v)


def in_euler(graph: Any, x: Tensor, T: int) -> Tensor:
    """Logits `[T, N, K]` of what the file says, in float64: neurons by forward Euler, edges that meet add, but in the
    output, to which readers take one."""
    before: dict[str, list[str]] = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    assert len(before["output"]) == 1
    order = [*TopologicalSorter(before).static_order()]
    v: dict[str, Any] = {}
    steps = []
    for _ in range(T):
        values: dict[str, Any] = {"input": x.double()}
        for name in order[1:]:
            node, current = graph.nodes[name], sum(values[source] for source in before[name])
            if isinstance(node, nir.LIF | nir.IF):
                old = v.get(name, 0.0)
                leak = (torch.from_numpy(node.v_leak) - old) / torch.from_numpy(node.tau) if hasattr(node, "tau") else 0
                scale = torch.from_numpy(node.r / getattr(node, "tau", 1.0))
                h = old + DT * (leak + scale * current)
                fires = h > torch.from_numpy(node.v_threshold)
                v[name], values[name] = torch.where(fires, torch.from_numpy(node.v_reset), h), fires.double()
            else:
                values[name] = euler_layer(node, current)
        steps.append(values["output"])
    return torch.stack(steps)


def euler_layer(node: Any, x: Tensor) -> Tensor:
    """What a node without a membrane makes of `[N, ...]`."""
    weight, bias = (
        torch.from_numpy(value).double() if isinstance(value, np.ndarray) else None
        for value in (getattr(node, name, None) for name in ("weight", "bias"))
    )
    if isinstance(node, nir.Conv2d):
        padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
        return nn.functional.conv2d(x, weight, bias, pair(node.stride), padding, pair(node.dilation))
    if isinstance(node, nir.Affine | nir.Linear):
        return nn.functional.linear(x, weight, bias)
    if isinstance(node, nir.AvgPool2d):
        return nn.functional.avg_pool2d(x, pair(node.kernel_size), pair(node.stride), pair(node.padding))
    if isinstance(node, nir.Flatten):
        return x.flatten(node.start_dim, node.end_dim)
    assert isinstance(node, nir.Output)
    return x


def pair(value: Any) -> tuple[int, int]:
    return int(value[0]), int(value[1])


NETS = [  # read by other frameworks, below
    ("vggsnn-strided", 0.125, {}),
    ("vggsnn-strided", 0.125, {"tau": 0.3, "v_th": 0.7}),
    ("vggsnn-strided", 0.125, {"tau": 1.0}),
    ("vggsnn", 0.125, {}),
    ("resnet19", 0.0625, {}),
    ("convsnn", 0.25, {}),
]


def made_with_pixels(network: type[nn.Module] | str) -> tuple[Classifier, np.ndarray[Any, Any]]:
    if isinstance(network, str):
        return classifier_of(network, image_size=(32, 32)), np.kron(digits().images[:4], np.ones((3, 4, 4), np.uint8))
    x = oblong() if network is Oblong else images()
    torch.manual_seed(0)
    return calibrated(network(), x), x[:16]


@pytest.mark.parametrize("network", [Everything, Oblong, *sorted(set(NETWORKS) - {name for name, *_ in NETS})])
def test_the_file_says_what_the_network_computes(network: type[nn.Module] | str, tmp_path: Path) -> None:
    made, x = made_with_pixels(network)
    pixels = torch.from_numpy(x)
    export_nir(made, tmp_path / "m.nir", trained_T=4)
    with torch.no_grad():
        expected = made.double()(pixels, 5)
    assert expected.std(1).mean() > 0.01 and (expected[1:] != expected[0]).any()  # images and steps differ
    torch.testing.assert_close(
        in_euler(nir.read(tmp_path / "m.nir"), made.normalize(pixels), 5), expected, rtol=1e-4, atol=1e-5
    )


def test_shapes_are_those_of_one_image(everything: tuple[Classifier, Any]) -> None:
    nodes = everything[1].nodes
    shapes = {name: [int(n) for n in node.output_type["output"]] for name, node in nodes.items()}
    assert shapes["input"] == [1, 16, 16] and shapes["lif1"] == [4, 8, 8] and shapes["pool.0"] == [4, 9, 9]
    assert shapes["pool.1"] == [4, 3, 3] and shapes["pool.2"] == [36] and shapes["output"] == [10]


def test_the_metadata_say_what_goes_in_and_comes_out(everything: tuple[Classifier, Any]) -> None:
    found = json.loads(everything[1].metadata["tetdeploy"])
    assert found["dt"] == DT and found["trained_T"] == 3 and found["encoding"] == "direct"
    assert found["normalization"]["mean"] == pytest.approx(digits().mean)
    assert found["class_names"] == list(digits().class_names)
    assert found["source"] == {"checkpoint_sha256": "ab", "loss": None}


def test_frames_give_the_same_graph() -> None:
    network = built("vggsnn", 0.0625)
    direct, frames = (nir_graph(network, encoding=encoding)[0] for encoding in ("direct", "frames"))
    assert direct.edges == frames.edges
    for name, node in direct.nodes.items():
        for key, value in node.to_dict().items():
            np.testing.assert_array_equal(value, frames.nodes[name].to_dict()[key])


def test_a_layer_used_twice_becomes_two_nodes() -> None:
    class Twice(Everything):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            spikes = self.if2(self.layer2(self.lif1(self.layer2(self.lif1(self.encode(x, T))))))
            logits: Tensor = self.readout(self.lif3(self.hidden(self.pool(spikes))))
            return logits

    graph, num_folded = nir_graph(calibrated(Twice()))
    assert num_folded == 3
    assert {"lif1", "lif1_2", "layer2.0", "layer2.0_2"} <= set(graph.nodes)


class Confusing(nn.Module):
    """Names that readers, who write `_` for a dot, or HDF5, whose folders end at a slash, could take for others."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = DirectEncoding(nn.Conv2d(1, 4, 3, padding=1))
        self.neurons = nn.ModuleDict({"3/4": LIF(v_th=0.1)})
        self.b = OverTime(nn.Conv2d(4, 4, 3, padding=1))  # its convolution is b.0
        self.b_0 = LIF(v_th=0.2)
        self.readout = OverTime(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, x: Tensor, T: int | None = None) -> Tensor:
        logits: Tensor = self.readout(self.b_0(self.b(self.neurons["3/4"](self.encode(x, T)))))
        return logits


def test_no_two_nodes_have_names_that_a_reader_takes_for_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_nir(calibrated(Confusing()), tmp_path / "m.nir", trained_T=4)
    names = nir.read(tmp_path / "m.nir").nodes.keys()
    assert {"neurons.3_4", "b.0", "b_0_2"} < names
    assert len({name.replace(".", "_") for name in names}) == len(names)


# ------------------------------------------------------------------------------------------- in other frameworks


def in_snntorch(file: Path) -> nn.Module:
    reader = pytest.importorskip("snntorch.import_nir")
    module: nn.Module = reader.import_from_nir(nir.read(file))
    return module


def in_spikingjelly(file: Path) -> nn.Module:
    reader = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    module: nn.Module = reader.import_from_nir(file, dt=DT)
    return module


READERS = {"snntorch": in_snntorch, "spikingjelly": in_spikingjelly}


@torch.no_grad()
def their_spikes(
    module: nn.Module, network: Classifier, x: Tensor, T: int
) -> tuple[Tensor, list[np.ndarray[Any, Any]]]:
    """Logits `[T, N, K]` and the spikes `[T, N, ...]` of every neuron layer, one step after the other."""
    names = [name for name, m in network.network.named_modules() if isinstance(m, LIF)]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module.get_submodule(name.replace(".", "_")).register_forward_hook(
            lambda m, i, o, name=name: kept[name].append(o[0] if isinstance(o, tuple) else o)
        )
    logits, state = [], None
    for _ in range(T):
        out, state = module.eval()(network.normalize(x), state)
        logits.append(out)
    return torch.stack(logits), [torch.stack(steps).numpy() for steps in kept.values()]


def far_from_ours(network: Classifier, x: Tensor, T: int, others: list[np.ndarray[Any, Any]]) -> tuple[int, float]:
    """Each layer by itself, on the spikes that theirs read: how many neurons fire otherwise, and how far from the
    threshold at most, as a fraction of it, their membranes lie when they first do. (Later they differ for that.)"""
    distances = []

    def watch(layer: int, current: Tensor, spikes: Tensor, different: Tensor, tau: float, v_th: float) -> None:
        first = different & (different.cumsum(0) == 1)
        distances.extend(margins(current, spikes, tau, v_th)[first].tolist())

    compare_torch(network, x.numpy(), T, others, replacing=True, watch=watch)
    return len(distances), max(distances, default=0.0)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("name", "width", "neuron"), NETS, ids=lambda value: str(value).strip("{}") or "default")
def test_others_fire_as_we_do(name: str, width: float, neuron: dict[str, float], tmp_path: Path) -> None:
    """Step by step on real images. What differs must be a membrane within rounding of the threshold."""
    network, T = built(name, width, **neuron), 6
    export_nir(network, tmp_path / "m.nir", trained_T=4)
    x = torch.from_numpy(images()[:32])
    with torch.no_grad(), NeuronRecorder() as ours:
        expected = network(x, T)
    for reader, read in READERS.items():
        # snnTorch takes R = 1 only of nir.IF, which over a dt of 1e-4 is another neuron, and lets it leak.
        if reader == "snntorch" and neuron.get("tau") == 1.0:
            continue
        logits, others = their_spikes(read(tmp_path / "m.nir"), network, x, T)
        assert all(0.01 < spikes.mean() < 0.9 for spikes in others[:-1])  # the comparison sees neurons that fire
        alone, margin = far_from_ours(network, x, T, others)
        assert margin < 1e-5 and alone <= 1e-4 * sum(spikes.size for spikes in others)  # the export's own gate
        num_differing = sum(int((a.numpy() != b).sum()) for a, b in zip(ours.spikes, others, strict=True))
        print(f"{reader}: {num_differing} of {sum(s.size for s in others):,} differ; {alone} by themselves")
        if num_differing == 0:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # of the readers
@pytest.mark.parametrize("reader", READERS)
def test_others_add_two_heads_and_take_what_is_not_square(reader: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, pixels = calibrated(Oblong(), oblong()), torch.from_numpy(oblong()[:16])
    export_nir(network, tmp_path / "m.nir", trained_T=4)
    logits, _ = their_spikes(READERS[reader](tmp_path / "m.nir"), network, pixels, 4)
    with torch.no_grad():
        torch.testing.assert_close(logits, network(pixels, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", ["norse", "sinabs"])
@pytest.mark.parametrize(("name", "width", "neuron"), NETS, ids=lambda value: str(value).strip("{}") or "default")
def test_norse_and_sinabs_by_the_example(
    reader: str, name: str, width: float, neuron: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(reader, reason=f"needs {reader}")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    logits_of = getattr(importlib.import_module("nir_readers"), f"{reader}_logits")
    network, x = built(name, width, **neuron), torch.from_numpy(images()[:8])
    export_nir(network, tmp_path / "m.nir", trained_T=4)
    with torch.no_grad(), NeuronRecorder() as ours:
        expected = network(x, 4)
    with torch.no_grad():
        logits = logits_of(tmp_path / "m.nir", network.normalize(x), 4)
    assert 0.01 < ours.spikes[-1].mean() < 0.9
    alike = ((logits - expected).abs() < 1e-5).all(-1)  # of each step of each image; one spike changes more
    assert alike.double().mean() > 0.9


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_others_tell_names_apart(reader: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, pixels = calibrated(Confusing()), torch.from_numpy(images()[:16])
    export_nir(network, tmp_path / "m.nir", trained_T=4)
    module, state = READERS[reader](tmp_path / "m.nir").eval(), None
    with torch.no_grad():
        for expected in network(pixels, 4):
            logits, state = module(network.normalize(pixels), state)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_that_comparison_sees_a_leak_that_is_one_percent_off(tmp_path: Path) -> None:
    network = built("vggsnn-strided", 0.125)
    graph, _ = nir_graph(network)
    for node in graph.nodes.values():
        if isinstance(node, nir.LIF):
            node.tau *= 1.01
            node.r *= 1.01
    nir.write(tmp_path / "m.nir", graph)
    x = torch.from_numpy(images()[:8])
    _, others = their_spikes(in_snntorch(tmp_path / "m.nir"), network, x, 4)
    alone, margin = far_from_ours(network, x, 4, others)
    assert alone > 20 and margin > 1e-4


SHOWN: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, T: x.expand(T, *x.shape),
    lambda x, T: x.unsqueeze(0).repeat(T, 1, 1, 1, 1),
    lambda x, T: x.repeat(T, 1, 1, 1).unflatten(0, (T, -1)),
    lambda x, T: torch.stack([x] * T),
]


@pytest.mark.parametrize("show", SHOWN, ids=["expand", "repeat", "repeat-batch", "stack"])
def test_an_image_may_be_shown_in_several_ways(show: Callable[[Tensor, int], Tensor]) -> None:
    class Shown(Everything):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            return super().forward(x if T is None else show(x, T))

    torch.manual_seed(0)
    network, x = calibrated(Shown()), torch.from_numpy(images()[:4])
    graph, _ = nir_graph(network)
    with torch.no_grad():
        expected = network.double()(x, 3)
    torch.testing.assert_close(in_euler(graph, network.normalize(x), 3), expected, rtol=1e-4, atol=1e-5)


def test_a_callers_autocast_is_not_in_the_graph() -> None:
    classifier = classifier_of("vggsnn-strided")
    wanted, _ = nir_graph(classifier)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = nir_graph(classifier)
    assert list(got.nodes) == list(wanted.nodes)
    for name, node in wanted.nodes.items():
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(vars(got.nodes[name])[key], value)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_T": 0}, "trained_T must be at least 1, got 0"),
        ({"trained_T": "4"}, "trained_T must be a whole number, got '4'"),
        ({"trained_T": 4, "encoding": "images"}, "unknown encoding 'images'; choose one of direct, frames"),
        ({"trained_T": 4, "classifier": nn.Identity()}, "classifier must be a Classifier, got Identity"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_nir(**{"classifier": convsnn(), "path": tmp_path / "m.nir"} | options)
    assert not (tmp_path / "m.nir").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_classifier_in_another_type_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"must be in float32, .* got {dtype}; call classifier\.float\(\)"):
        export_nir(calibrated(Everything()).to(dtype), tmp_path / "m.nir", trained_T=3)
    assert not list(tmp_path.iterdir())


class Thrown(nn.Module):
    """Applies a function to spikes `[N, 4, 8, 8]`."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x)
        return result


class Halved(nn.Conv2d):
    """A convolution whose own forward computes its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight / 2, self.bias)


def smooth(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1)


def summed_in_place(x: Tensor) -> Tensor:
    """What was smoothed is read again by another name when the sum has taken its place."""
    y = smooth(x)
    rows = y.flatten(1)
    y += x
    return y + rows.view(y.shape)


def summed_into_a_copy(x: Tensor) -> Tensor:
    y = smooth(x)
    z = y.clone()
    z += x
    return z + smooth(y)


def test_a_sum_may_take_the_place_of_a_copy() -> None:
    torch.manual_seed(0)
    nir_graph(calibrated(Everything(Thrown(summed_into_a_copy))))


def test_a_maximum_of_sums_of_spikes_is_none_of_spikes() -> None:
    class Summed(Everything):
        def __init__(self) -> None:
            super().__init__()
            self.lif4 = LIF(v_th=0.5)

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            first = self.lif1(self.encode(x, T))
            second = self.layer2(self.change(first + self.lif4(first))) + first
            return self.readout(self.lif3(self.hidden(self.pool(self.if2(second)))))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="max pooling of values that are not spikes"):
        nir_graph(calibrated(Summed()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nn.MaxPool2d(3, 1, 1, ceil_mode=True), r"'change\.0': max pooling with ceil_mode or dilation"),
        (nn.MaxPool2d(2, 1, 1, dilation=2), r"'change\.0': max pooling with ceil_mode or dilation"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 1, 1)),
            r"'change\.0\.1': max pooling of values that are not spikes",
        ),
        (nn.AdaptiveMaxPool2d(8), r"'change\.0': aten\.adaptive_max_pool2d"),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "a kernel of 1x3"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "padding that is left out of the mean"),
        (nn.AvgPool2d(1, ceil_mode=True), "average pooling with ceil_mode, a divisor"),
        (nn.AvgPool2d(1, divisor_override=2), "average pooling with ceil_mode, a divisor"),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d((3, 4)), nn.Upsample((8, 8))),
            r"adaptive average pooling of \[8, 8\] to \[3, 4\]",
        ),
        (Thrown(lambda x: x + x), "a value added to itself"),
        (Thrown(lambda x: x + 1.0), "a sum with something that is not computed from the input"),
        (Thrown(lambda x: torch.add(x, smooth(x), alpha=2)), "not computed from the input, or scaled"),
        (Thrown(lambda x: x + nn.functional.avg_pool2d(x, 8)), r"different shapes, \[4, 8, 8\] and \[4, 1, 1\]"),
        (
            Thrown(lambda x: x - x.mean(1, keepdim=True)),
            r"a mean of \[4, 8, 8\] over other axes than both of the image",
        ),
        (Thrown(lambda x: x.relu()), r"'change\.0': aten\.relu"),
        (Thrown(lambda x: x.add_(smooth(x))), r"written over a value that is read again later; write y = y \+ x"),
        (Thrown(lambda x: smooth(x).add_(x, alpha=2)), "not computed from the input, or scaled"),
        (Thrown(summed_in_place), r"written over a value that is read again later; write y = y \+ x"),
        (
            Thrown(lambda x: x.reshape(-1, 8, 4, 8).reshape(-1, 4, 8, 8)),
            r"a change of shape from \[4, 8, 8\] to \[8, 4, 8\]",
        ),
        (
            Thrown(lambda x: torch.stack([x, smooth(x)], 2).mean(2)),
            "a stack of other than the same image .* or expand",
        ),
        (Thrown(lambda x: x.repeat(1, 2, 1, 1)[:, :4]), r"a change of shape from \[4, 8, 8\] to \[8, 8, 8\]"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), r"network computes; remove the parametrization"),
        (Halved(4, 4, 1), "weights that the network computes; put a plain layer"),
        (nn.Linear(8, 8), r"a linear layer on \[4, 8, 8\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_nir_has_no_node_for(change: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        export_nir(calibrated(Everything(change)), tmp_path / "m.nir", trained_T=4)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced_and_does_not_say_why() -> None:
    def silent(x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError
        return x

    with pytest.raises(ValueError, match=r"torch\.export cannot trace the network: NotImplementedError"):
        nir_graph(calibrated(Everything(Thrown(silent))))


def test_batch_normalisation_that_cannot_be_folded() -> None:
    with pytest.raises(FoldingError, match=r"cannot fold BN 'change\.0'.* move the BN behind one$"):
        nir_graph(calibrated(Everything(nn.BatchNorm2d(4))))


def test_neurons_that_nothing_reads(tmp_path: Path) -> None:
    class Idle(Everything):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            self.lif3(self.encode(x, T))
            return super().forward(x, T)

    idle = calibrated(Idle())
    for export in (nir_graph, lambda net: export_model(net, tmp_path / "m.onnx", ExportConfig(), images())):
        with pytest.raises(ValueError, match="runs 4 neuron layers, but only 3 of them reach its logits; take out"):
            export(idle)


def test_layers_that_know_time() -> None:
    class Mixing(Everything):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            return super().forward(x, T).cumsum(0)

    with pytest.raises(ValueError, match="mixes time outside its neurons"):
        nir_graph(calibrated(Mixing()))


def test_a_membrane_that_is_read() -> None:
    class Reading(Everything):
        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            spikes, u_last = self.lif1.with_state(self.encode(x, T))
            second = self.layer2(spikes) + 0 * u_last  # anything but 0 mixes time
            logits: Tensor = self.readout(self.lif3(self.hidden(self.pool(self.if2(second)))))
            return logits

    with pytest.raises(ValueError, match="a membrane potential that is read"):
        nir_graph(calibrated(Reading()))


def test_a_membrane_of_the_network_s_own() -> None:
    class Started(Everything):
        def __init__(self) -> None:
            super().__init__()
            self.u0 = nn.Parameter(torch.zeros(4, 8, 8))

        def forward(self, x: Tensor, T: int | None = None) -> Tensor:
            current = self.encode(x, T)
            spikes, _ = self.lif1.with_state(current, self.u0.expand(current.shape[1:]).contiguous())
            logits: Tensor = self.readout(self.lif3(self.hidden(self.pool(self.if2(self.layer2(spikes))))))
            return logits

    with pytest.raises(ValueError, match="neurons that start from a membrane of the network's own"):
        nir_graph(calibrated(Started()))


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nir-runs")
    printed("train", "--epochs", "1", "--model", "vggsnn-strided", "--width", "0.0625", "--runs", folder)
    return folder


def test_export_writes_the_newest_run(runs: Path, tmp_path: Path) -> None:
    file, summary = tmp_path / "out.nir", tmp_path / "out.json"
    output = printed("export", "--format", "nir", "--runs", runs, "-o", file, "--json", summary)
    assert "folded 8 BN | 8 Conv2d, 8 LIF, 1 Flatten, 1 Affine" in output
    graph = nir.read(file)
    assert Counter(type(node).__name__ for node in graph.nodes.values()) == json.loads(summary.read_text())["nodes"]
    source = json.loads(graph.metadata["tetdeploy"])["source"]
    assert source["network"]["model"] == "vggsnn-strided" and len(source["checkpoint_sha256"]) == 64


def test_a_full_disk_is_one_line(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_files(4096):
        result = invoke("export", "--format", "nir", "--runs", runs, "-o", tmp_path / "m.nir")
    assert (result.exit_code, result.stderr) == (1, f"Error: {tmp_path / 'm.nir'}: File too large\n")
    assert capfd.readouterr().err == ""  # nor does HDF5 say anything
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--T", "4"), ("--layout", "step"), ("--with-state",), ("--no-normalize",), ("--check", "9")]
)
def test_options_of_onnx_are_refused(options: tuple[str, ...], runs: Path) -> None:
    output = refused("export", "--format", "nir", "--runs", runs, *options, code=2)
    assert "cannot go with --format nir" in output and options[0].removeprefix("--no-") in output
    assert "--no-fold-bn" in refused("export", "--format", "nir", "--runs", runs, "--no-fold-bn", code=2)


def test_without_the_package(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nir", None)
    assert "pip install 'tetdeploy[nir]'" in refused("export", "--format", "nir", "--runs", runs)


def test_a_package_that_is_too_old(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nir, "version", "1.0.4")  # what sinabs asks for
    monkeypatch.delitem(nir.LIF.__dataclass_fields__, "v_reset")
    result = invoke("export", "--format", "nir", "--runs", runs, "-o", tmp_path / "m.nir")
    wanted = "Error: nir 1.0.4 is too old, its neurons have no v_reset: pip install -U nir\n"
    assert (result.exit_code, result.stderr, list(tmp_path.iterdir())) == (1, wanted, [])
