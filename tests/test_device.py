"""Layout and memory on a training device."""

from __future__ import annotations

import platform
import resource
from dataclasses import replace

import pytest
import torch
from torch import nn

from tetdeploy.networks import NetworkConfig
from tetdeploy.train.device import place, reused_memory, wants_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NETWORK = NetworkConfig("resnet19", 10, 3, (32, 32))


def test_on_a_gpu_every_network_but_ones_own_is_channels_last() -> None:
    assert all(wants_channels_last(n, GPU, "fp16", plain_bn=True) for n in (NETWORK, replace(NETWORK, ann=True)))
    own = replace(NETWORK, model="somebody.networks:make")
    assert not any(wants_channels_last(own, device, "bf16", plain_bn=False) for device in (CPU, GPU))


def test_on_a_cpu_where_bn_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")

    def wanted(network: NetworkConfig = NETWORK, precision: str = "fp32", plain_bn: bool = False) -> bool:
        return wants_channels_last(network, CPU, precision, plain_bn=plain_bn)

    assert wanted() and wanted(precision="bf16")
    assert not wanted(precision="fp16") and not wanted(plain_bn=True)
    assert not wanted(replace(NETWORK, ann=True)) and not wanted(replace(NETWORK, smooth_spike=10.0))
    monkeypatch.setattr("tetdeploy.train.device.cpu_kernels", lambda dtype: None)
    assert not wanted()


@pytest.mark.parametrize("channels_last", [True, False])
def test_only_convolutions_change_their_layout(channels_last: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    place(network, CPU, channels_last=channels_last)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert network[1].weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def new_pages() -> int:
    """Pages that come anew for ten tensors of 64 MB, each freed before the next."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory as it likes")
def test_freed_memory_is_taken_again_within_and_given_back_after() -> None:
    assert new_pages() > 100
    with reused_memory():
        new_pages()
        assert new_pages() < 50
    assert new_pages() > 100
