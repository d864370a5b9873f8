"""Activation checkpointing: the same training bit for bit, with less kept for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tetdeploy.fused_bn import FiringSequential
from tetdeploy.layers import DirectEncoding, OverTime, tdBN
from tetdeploy.networks import NETWORKS, NetworkConfig, build_network
from tetdeploy.neurons import LIF
from tetdeploy.train import total_loss
from tetdeploy.train.recompute import recompute_blocks

T = 3


def network_of(model: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = NetworkConfig(model, num_classes=5, in_channels=2, image_size=(32, 32), width=0.0625, **options)
    return build_network(config).train()


def recomputed(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network)
    recompute_blocks(copied)
    return copied


def batch(*, frames: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.rand((T, 4, 2, 32, 32) if frames else (4, 2, 32, 32), generator=torch.Generator().manual_seed(1)) * 2
    return x, torch.arange(4)


def step(network: nn.Module, x: Tensor, labels: Tensor, steps: int | None = T) -> Tensor:
    loss = total_loss(network(x, steps), labels)
    loss.backward()
    return loss.detach()


def kept_bytes(network: nn.Module, x: Tensor, steps: int | None = T) -> int:
    """Memory that a forward pass keeps for backward, each storage once, the parameters and the input left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # no other tensor may come to lie where this one was
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x, steps)
    return sum(kept.values())


@pytest.mark.parametrize("model", NETWORKS)
def test_training_is_the_same_bit_for_bit(model: str) -> None:
    plain = network_of(model)
    frugal = recomputed(plain)
    x, labels = batch()
    for _ in range(2):
        assert torch.equal(step(plain, x, labels), step(frugal, x, labels))
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in plain.parameters())
    for (name, b), c in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        assert torch.equal(b, c), name  # running_mean, running_var, num_batches_tracked
    assert list(plain.state_dict()) == list(frugal.state_dict())


@pytest.mark.parametrize(("model", "share"), [("convsnn", 0.8), ("vggsnn", 0.5), ("resnet19", 0.4)])
def test_less_is_kept(model: str, share: float) -> None:
    plain = network_of(model)
    frugal = recomputed(plain)
    x, _ = batch()
    assert 0 < kept_bytes(frugal, x) < share * kept_bytes(plain, x)
    for (name, b), c in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        assert torch.equal(b, c), name  # a batch is counted without a backward pass, too


def test_frames_recompute_their_first_layers_too() -> None:
    plain = network_of("vggsnn")
    frugal = recomputed(plain)
    x, labels = batch(frames=True)
    assert torch.equal(step(plain, x, labels, None), step(frugal, x, labels, None))
    for (name, p), q in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert q[0] == name
        assert p.grad is not None and q[1].grad is not None
        assert torch.equal(p.grad, q[1].grad), name
    for (name, b), c in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert 0 < kept_bytes(frugal, x, None) < 0.37 * kept_bytes(plain, x, None)  # 0.42 with those layers kept
    with pytest.raises(ValueError, match="hold T=3 steps, but T=5"):
        frugal(x, 5)


def test_random_layers_draw_the_same_again() -> None:
    torch.manual_seed(0)
    layers = [OverTime(nn.Conv2d(2, 4, 3), tdBN(4), nn.Dropout(0.5)), LIF(), OverTime(nn.Flatten(), nn.Linear(3600, 5))]
    plain = nn.Sequential(*layers)
    frugal = recomputed(plain)
    x, labels = batch(frames=True)
    for network in (plain, frugal):
        torch.manual_seed(3)
        total_loss(network(x), labels).backward()
    for p, q in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_an_ann_twin_recomputes_block_by_block() -> None:
    plain = network_of("resnet19", ann=True)
    frugal = recomputed(plain)
    x, labels = batch()
    assert torch.equal(step(plain, x, labels, 1), step(frugal, x, labels, 1))
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name
    assert 0.1 < kept_bytes(frugal, x, 1) / kept_bytes(plain, x, 1) < 0.4  # 0.04 as one block


def test_a_block_of_which_a_part_is_in_training_recomputes() -> None:
    layer = OverTime(nn.Conv2d(2, 4, 3), tdBN(4))
    frugal, calls = recomputed(nn.Sequential(layer.eval(), LIF())), []
    layers = frugal.get_submodule("0")
    layers.register_forward_hook(lambda *_: calls.append(1))
    frugal(batch(frames=True)[0]).sum().backward()
    assert len(calls) == 2


def test_inference_is_untouched_and_nothing_is_computed_twice() -> None:
    plain = network_of("resnet19").eval()
    frugal = recomputed(plain)
    calls = []
    neurons = next(module for module in frugal.modules() if isinstance(module, LIF))
    neurons.register_forward_hook(lambda *_: calls.append(1))
    x, _ = batch()
    with torch.inference_mode():
        assert torch.equal(plain(x, T), frugal(x, T))
    assert len(calls) == 1


def test_it_exports_as_the_plain_network() -> None:
    plain = network_of("vggsnn").eval()
    x, _ = batch()
    programs = [torch.export.export(network, (x, T)) for network in (plain, recomputed(plain))]
    targets = [[node.target for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("model", ["resnet19", "vggsnn"])
def test_autocast_is_the_same_the_second_time(model: str) -> None:
    plain = network_of(model)
    frugal = recomputed(plain)
    x, labels = batch()
    for network in (plain, frugal):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(x, T)
        total_loss(logits, labels).backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad), name


def test_twice_is_once() -> None:
    network = network_of("resnet19")
    names = recompute_blocks(network)
    kinds = [type(module) for module in network.modules()]
    assert names == ["encode", "blocks"]
    assert recompute_blocks(network) == names
    assert [type(module) for module in network.modules()] == kinds


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has nothing to recompute.*without --recompute"):
        recompute_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has nothing to recompute"):
        recompute_blocks(DirectEncoding(nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize("firing", [False, True])
def test_channels_last_layers_in_a_row_are_fused_as_they_are_without(firing: bool) -> None:
    """A plain chain by modules, one that fires by the fused kernels: with the same bits."""
    torch.manual_seed(0)
    layers = [OverTime(nn.Conv2d(4, 6, 3), tdBN(6)), LIF(), OverTime(nn.Conv2d(6, 5, 3), tdBN(5)), LIF()]
    network = (FiringSequential if firing else nn.Sequential)(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(3, 2, 4, 9, 9)
    results = []
    for one in (network, recomputed(network)):
        one(x).square().sum().backward()
        results.append([p.grad for p in one.parameters()] + [*one.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(a.abs().sum() > 0 for a in results[0])
