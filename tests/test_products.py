"""Products of two activations, as in attention: the pairs that a graph counts, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import classifier, digits, unchecked
from torch import Tensor, nn

from tetdeploy.energy import Layer, Operations, input_kind, layers_of
from tetdeploy.engine import Engine
from tetdeploy.export import ExportConfig, counters
from tetdeploy.inspection import inspect
from tetdeploy.networks import Classifier
from tetdeploy.neurons import LIF

Product = Callable[[Tensor, Tensor], Tensor]
Way = Callable[[Product, Tensor, Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    """`[..., tokens, 8]` as `[..., 2 heads, tokens, 4]`."""
    return x.unflatten(-1, (2, 4)).transpose(-2, -3)


def by_heads(product: Product, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return product(product(heads(q), heads(k).mT), heads(v)).transpose(-2, -3).flatten(-2)


def batch_first(product: Product, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return by_heads(product, q, k, v).transpose(0, 1)


def merged(product: Product, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One batch of matrices, of all steps, images and heads."""
    flat = [heads(x).flatten(0, 2) for x in (q, k, v)]
    return product(product(flat[0], flat[1].mT), flat[2]).view_as(heads(q)).transpose(-2, -3).flatten(-2)


def merged_batch_first(product: Product, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    return product(product(flat[0], flat[1].mT), flat[2]).view(-1, q.shape[0], *q.shape[2:]).transpose(0, 1)


COUNTED: dict[str, Way] = {
    "plain": lambda product, q, k, v: product(product(q, k.mT), v),
    "keys_first": lambda product, q, k, v: product(q, product(k.mT, v)) * 0.25,
    "by_heads": by_heads,
    "batch_first": batch_first,
    "merged": merged,
    "merged_batch_first": merged_batch_first,
    "softmax": lambda product, q, k, v: product(product(k, q.mT).softmax(-1), v * 0.3),
}
NOT_COUNTED: dict[str, Way] = {
    "one_head_of_keys": lambda product, q, k, v: product(heads(q), heads(k)[:, :, :1].mT).sum((2, -1))[..., None] + v,
    "steps_behind_heads": lambda product, q, k, v: (
        product(heads(q).permute(2, 0, 1, 3, 4), heads(k).permute(2, 0, 1, 3, 4).mT).sum((0, -1))[..., None] + v
    ),
}


class Multiply(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Attention(nn.Module):
    """The rows of an image as tokens, and self-attention in several ways, each with its own product."""

    def __init__(self, ways: dict[str, Way]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(21)
            self.embed, self.readout = nn.Linear(8, 24), nn.Linear(8, 10)
        self.lif, self.ways = LIF(v_th=0.3), ways
        self.products = nn.ModuleDict({name: Multiply() for name in ways})

    def forward(self, x: Tensor, T: int) -> Tensor:
        current = self.embed(x.squeeze(1))
        q, k, v = self.lif(current.expand(T, *current.shape)).split(8, -1)
        mixed = [way(self.products[name], q, k, v) for name, way in self.ways.items()]
        return self.readout(self.lif(torch.stack(mixed).sum(0)).mean(2))


@pytest.fixture(scope="module")
def net() -> Classifier:
    """Of all the ways."""
    return classifier(Attention(COUNTED | NOT_COUNTED))


@pytest.fixture(scope="module")
def runner_of(net: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    """Its graph in a layout, unrolled over 4 steps unless told otherwise; of long traces, so each is made once."""
    folder = tmp_path_factory.mktemp("products")

    @cache
    def made(layout: Any, T: int = 4, with_state: bool = False) -> Engine:
        config = ExportConfig(layout=layout, T=T, with_state=with_state)
        return unchecked(net.network, folder / f"{layout}-{T}.onnx", config)

    return made


def operations_of(runner: Engine, x: np.ndarray[Any, Any], T: int) -> Operations:
    operations = Operations(layers_of(runner.metadata))
    for part in (x[:4], x[4:]):  # two batches of different sizes
        operations.add(runner.count(part, T)[1], len(part), T)
    return operations


@pytest.mark.parametrize(
    ("layout", "options"),
    [("unrolled", {}), ("dynamic", {}), ("step", {}), ("unrolled", {"T": 2, "with_state": True})],
)
def test_the_pairs_of_a_product_are_counted_in_each_step(
    layout: str, options: dict[str, Any], net: Classifier, runner_of: Callable[..., Engine]
) -> None:
    runner, x, T = runner_of(layout, **options), digits().images[:11], 4
    operations, expected = operations_of(runner, x, T), pairs_of(net, x, T)
    expected = {name: pairs for name, pairs in expected.items() if way_of(name) in COUNTED}
    assert expected.keys() == {
        layer.name for layer in operations.layers if layer.product and way_of(layer.name) in COUNTED
    }
    for name, by_step in expected.items():
        assert len({*by_step}) > 1  # the steps can be told apart
        np.testing.assert_array_equal(operations.counts[name], by_step, err_msg=name)


def way_of(product: str) -> str:
    """`by_heads`, of `products.by_heads#2`."""
    return product.removeprefix("products.").partition("#")[0]


def pairs_of(net: Classifier, x: np.ndarray[Any, Any], T: int) -> dict[str, np.ndarray[Any, Any]]:
    """Of every product in PyTorch the pairs of numbers that are not 0, `[T]`."""
    found: dict[str, np.ndarray[Any, Any]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, factors: tuple[Tensor, Tensor], output: Tensor) -> None:
            a, b = ((factor != 0).double() for factor in factors)
            pairs = (a @ b).sum((-1, -2))
            by_step = pairs.reshape(len(x), T, -1).transpose(0, 1) if "batch_first" in name else pairs
            found[name + "#2" if name in found else name] = by_step.reshape(T, -1).sum(1).numpy()

        return hook

    products = [(name, module) for name, module in net.network.named_modules() if isinstance(module, Multiply)]
    hooks = [module.register_forward_hook(note(name)) for name, module in products]
    with torch.no_grad():
        net(torch.from_numpy(x), T)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.peer
def test_spikingjelly_counts_the_same_pairs_of_spikes(tmp_path: Path) -> None:
    """Of spikes with other numbers it counts those that meet a 0, too."""
    peers = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="needs spikingjelly 2.0")
    net, x, T = classifier(Attention({"scores": lambda product, q, k, v: product(q, k.mT)})), digits().images[:11], 4
    operations = operations_of(unchecked(net.network, tmp_path / "m.onnx", ExportConfig(T=T)), x, T)
    theirs = peers.SynOpCounter()
    with torch.no_grad(), peers.DispatchCounterMode([theirs]):
        net(torch.from_numpy(x), T)
    counted = sum(theirs.get_counts()["Classifier.network.products.scores"].values())
    assert counted == operations.counts["products.scores"].sum() > 0


@pytest.mark.parametrize("layout", ["unrolled", "dynamic", "step"])
def test_a_product_says_what_it_is(layout: str, runner_of: Callable[..., Engine]) -> None:
    runner = runner_of(layout)
    products = (layer for layer in layers_of(runner.metadata) if layer.product)
    layers = {layer.name: layer for layer in products if way_of(layer.name) in ("by_heads", "softmax")}
    assert len(layers) == 4
    assert {name for name, layer in layers.items() if not layer.binary} == {"products.softmax#2"}
    scores, mixed = layers["products.by_heads"], layers["products.by_heads#2"]
    assert scores == Layer("products.by_heads", (8 * 4 * 8,), 1, positions=2, product=True)
    assert (mixed.input_shape, mixed.dense_ops(), mixed.num_weights) == ((8 * 8 * 4,), 2 * 8 * 8 * 4, 0)
    assert Operations((mixed,)).ann() == {"mac_ops": 2 * 8 * 8 * 4, "energy_pj": pytest.approx(2 * 8 * 8 * 4 * 4.6)}
    shown = {layer["name"]: (layer["type"], layer["input"]) for layer in inspect(runner.path)["layers"]}
    assert shown["products.softmax"] == ("product", "pairs of spikes") and shown["readout"] == ("linear", "analogue")
    assert (shown["products.softmax#2"], shown["embed"][1]) == (("product", "pairs"), "image")
    by_layer = operations_of(runner, digits().images[:5], 4).by_layer([4])
    kinds = {layer["name"]: input_kind(layer) for layer in by_layer}
    assert input_kind({"product": True}) == "pairs of spikes"  # a result may lack what is so by default
    assert (kinds["products.by_heads#2"], kinds["products.softmax#2"]) == ("pairs of spikes", "pairs")
    assert (kinds["embed"], kinds["readout"]) == ("image", "analogue")


@pytest.mark.parametrize(("layout", "uncounted"), [("unrolled", 2), ("dynamic", 2), ("step", 1)])
def test_products_whose_pairs_cannot_be_told_are_named(
    layout: str, uncounted: int, runner_of: Callable[..., Engine]
) -> None:
    assert runner_of(layout).metadata["uncounted"] == [f"products.{name}" for name in [*NOT_COUNTED][:uncounted]]


def test_a_product_of_which_one_factor_has_some_of_the_steps_is_named(tmp_path: Path) -> None:
    def first_keys(product: Product, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return product(q, k[:1].expand_as(k).mT).sum(-1, keepdim=True) + v

    network = classifier(Attention({"first_keys": first_keys})).network
    metadata = unchecked(network, tmp_path / "m.onnx", ExportConfig(T=3)).metadata
    assert metadata["uncounted"] == ["products.first_keys"]
    assert [layer["name"] for layer in metadata["layers"]] == ["embed", "readout"]


def test_a_product_of_the_image_alone_is_named(tmp_path: Path) -> None:
    class OfTheImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif, self.readout = LIF(v_th=0.3), nn.Linear(8, 10)

        def forward(self, x: Tensor, T: int) -> Tensor:
            current = (x @ x.mT).squeeze(1)
            return self.readout(self.lif(current.expand(T, *current.shape)).mean(2))

    runner = unchecked(OfTheImage(), tmp_path / "m.onnx", ExportConfig(T=3))
    assert len(runner.metadata["uncounted"]) == 1 and len(runner.metadata["layers"]) == 1


def test_more_pairs_than_float32_can_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_EXACT", 100)
    net, x, T = classifier(Attention({"by_heads": by_heads})), digits().images[:11], 4
    runner = unchecked(net.network, tmp_path / "m.onnx", ExportConfig(layout="dynamic"))
    session, _ = runner.overlaid(runner.counting_overlay)
    kinds = {output.name: output.type for output in session.get_outputs()}
    assert kinds["active.products.by_heads"] == "tensor(double)" and kinds["active.readout"] == "tensor(float)"
    operations = operations_of(runner, x, T)
    for name, by_step in pairs_of(net, x, T).items():
        np.testing.assert_array_equal(operations.counts[name], by_step, err_msg=name)
