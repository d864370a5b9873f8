"""tdBN over ranks against one process that sees the whole batch, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_helpers import load, on_ranks, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy.layers import OverTime, tdBN
from tetdeploy.train.ranks import current_ranks
from tetdeploy.train.synchronised import synchronise_bn


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Sequential(
        tdBN(3, v_th=0.5, eps=0.5),
        OverTime(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)),
        tdBN(4, affine=False),
    )
    return layers.double()


def untracked() -> tdBN:
    """In inference, too, it takes the statistics of what it gets, which are then those of a share."""
    return tdBN(3, track_running_stats=False).double()


def batch(size: int = 6) -> Tensor:
    """`[T, N, C, H, W]` whose images differ so much that the statistics of half of them are wrong."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.arange(1, size + 1, dtype=torch.float64).view(1, size, 1, 1, 1)
    return torch.randn(2, size, 3, 5, 6, generator=generator, dtype=torch.float64) * scale + scale


def passes(layers: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two training passes with gradients, then one in inference."""
    x = x.clone().requires_grad_(True)
    for _ in range(2):
        y = layers(x)
    (y**3).sum().backward()
    assert x.grad is not None
    gradients = {f"grad.{name}": p.grad for name, p in layers.named_parameters() if p.grad is not None}
    inference = layers.eval()(x.detach())
    return {"y": y.detach(), "grad.x": x.grad, "inference": inference.detach(), **gradients, **layers.state_dict()}


class FromHost(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers, which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def _work(folder: Path) -> None:
    ranks, layers = current_ranks(), network()
    synchronise_bn(layers)
    norm, bare = tdBN(3), untracked()
    for each in (norm, bare):
        synchronise_bn(each)
    copied, share = copy.deepcopy(layers), batch().split([2, 4], 1)[ranks.rank]
    half = passes(norm, share.bfloat16())
    with FromHost() as from_host:
        bare(share)
    found = {"itself": passes(layers, share), "copied": passes(copied, share), "untracked": passes(bare, share)}
    save(folder, ranks.rank, half=half, from_host=from_host.count, **found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("synchronised")
    on_ranks(2, _work, made)
    return made


@pytest.mark.parametrize("which", ["itself", "copied"])
def test_two_ranks_normalise_like_one_process(folder: Path, which: str) -> None:
    halves, whole = [load(folder, rank)[which] for rank in (0, 1)], passes(network(), batch())
    assert list(halves[0]) == list(whole) and "grad.1.0.weight" in whole
    for name, wanted in whole.items():
        first, second = halves[0][name], halves[1][name]
        if name in ("y", "grad.x", "inference"):
            got = torch.cat([first, second], 1)
        elif name.startswith("grad."):  # each rank's own share of the sum, as DistributedDataParallel wants it
            got = first + second
        else:
            assert torch.equal(first, second), name
            got = first
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_without_running_statistics_a_batch_has_those_of_all_ranks(folder: Path) -> None:
    halves, whole = [load(folder, rank)["untracked"] for rank in (0, 1)], passes(untracked(), batch())
    for name in ("y", "grad.x"):
        torch.testing.assert_close(torch.cat([h[name] for h in halves], 1), whole[name], rtol=1e-9, atol=1e-9)


def test_no_number_of_the_host_is_waited_for(folder: Path) -> None:
    assert [load(folder, rank)["from_host"] for rank in (0, 1)] == [0, 0]
    with FromHost() as from_host:
        torch.zeros(1).new_tensor([2.5])
    assert from_host.count == 1


def test_in_half_precision_statistics_are_float32(folder: Path) -> None:
    """Of values as they were rounded before."""
    halves = [load(folder, rank)["half"] for rank in (0, 1)]
    whole = passes(tdBN(3).double(), batch().bfloat16().double())
    for name in ("running_mean", "running_var"):
        assert halves[0][name].dtype == torch.float32
        torch.testing.assert_close(halves[0][name].double(), whole[name], rtol=1e-5, atol=1e-6)
    for name in ("y", "grad.x"):
        got = torch.cat([half[name] for half in halves], 1)
        assert got.dtype == torch.bfloat16
        wanted = whole[name]
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2**-7 * wanted.abs().max().item())


def test_the_network_stays_what_it_was_outside_training() -> None:
    plain, layers = network(), network()
    synchronise_bn(layers)
    synchronise_bn(layers)  # a second time changes nothing
    assert [type(m).__name__ for m in layers.modules() if isinstance(m, nn.BatchNorm2d)] == [
        "SynchronisedtdBN",
        "SynchronisedBatchNorm2d",
        "SynchronisedtdBN",
    ]
    assert isinstance(layers[0], tdBN) and list(layers.state_dict()) == list(plain.state_dict())
    assert torch.equal(layers.eval()(batch()), plain.eval()(batch()))
    with pytest.raises(ValueError, match="expected 4D input"):
        layers.train()[1][1](batch())
