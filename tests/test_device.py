"""Layout and memory on a training device."""

from __future__ import annotations

import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tetdeploy.data import ImageSet
from tetdeploy.networks import Classifier, NetworkConfig, build_network
from tetdeploy.train import TrainConfig, train
from tetdeploy.train.device import pick_device, pick_precision, place, wants_channels_last
from tetdeploy.train.ranks import Ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NETWORK = NetworkConfig("resnet19", 10, 3, (32, 32))


def test_on_a_gpu_every_network_but_ones_own_is_channels_last() -> None:
    assert all(wants_channels_last(n, GPU, "fp16", fusable=False) for n in (NETWORK, replace(NETWORK, ann=True)))
    own = replace(NETWORK, model="somebody.networks:make")
    assert not any(wants_channels_last(own, device, "bf16", fusable=True) for device in (CPU, GPU))


def test_on_a_cpu_where_bn_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")

    def wanted(network: NetworkConfig = NETWORK, precision: str = "fp32", fusable: bool = True) -> bool:
        return wants_channels_last(network, CPU, precision, fusable=fusable)

    assert wanted() and wanted(precision="bf16")
    assert not wanted(precision="fp16") and not wanted(fusable=False)
    assert not wanted(replace(NETWORK, ann=True)) and not wanted(replace(NETWORK, smooth_spike=10.0))
    monkeypatch.setattr("tetdeploy.kernels.numba_for", lambda dtype: None)
    assert not wanted()


@pytest.mark.parametrize("channels_last", [True, False])
def test_only_convolutions_change_their_layout(channels_last: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    place(network, CPU, channels_last=channels_last)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert network[1].weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("cpuinfo", "emulated"),
    [
        ("flags\t\t: avx2 avx512f avx512_vnni", True),
        ("flags\t\t: avx512_vnni avx512_bf16", False),
        ("flags\t\t: amx_bf16 avx512_fp16", False),
        ("Features\t: asimd", False),  # of another kind of processor, of which nothing is known
        ("", False),
    ],
)
def test_what_is_slower_on_a_cpu_is_named(cpuinfo: str, emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.train.device.read_cpuinfo", cpuinfo.splitlines)
    for asked, precision in {"fp32": "fp32", "auto": "fp32", "bf16": "bf16", "fp16": "fp16"}.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert pick_precision(asked, CPU) == precision
        expected = {"fp16": ["fp16 is for GPUs: on a CPU it is slower than fp32, in training up to a hundred times"]}
        if emulated:
            expected["bf16"] = ["this processor has no instructions for bf16, which is slower than fp32 here"]
        assert [str(warning.message) for warning in said] == expected.get(asked, [])


def test_a_process_without_a_gpu_of_its_number_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Slurm shows each process one GPU alone."""
    monkeypatch.setattr("tetdeploy.train.device.current_ranks", lambda: Ranks(1, 2, local_rank=1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"process 1 .* takes GPU 1, and PyTorch sees 1 .*let each see every GPU"):
        pick_device("auto")


@pytest.mark.parametrize(("card", "precision"), [(0, "bf16"), (1, "fp16")])
def test_the_card_that_trains_is_asked_for_bf16(card: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]  # PyTorch's own, whatever trains

    @contextmanager
    def switched(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr("torch.cuda.device", switched)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: current[-1] == 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"card {device.index}")
    assert pick_precision("auto", torch.device("cuda", card)) == precision
    if precision == "fp16":
        with pytest.raises(ValueError, match="card 1 has no bf16; use --precision fp16 or fp32"):
            pick_precision("bf16", torch.device("cuda", card))


@pytest.mark.parametrize("first", [True, False])
def test_of_several_processes_the_first_names_it(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetdeploy.train.device.read_cpuinfo", lambda: ["flags: avx2"])
    monkeypatch.setattr("tetdeploy.train.device.current_ranks", lambda: SimpleNamespace(writes=first))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pick_precision("bf16", CPU) == "bf16"
    assert len(said) == first


IMAGES = ImageSet(
    name="blobs",
    split="train",
    images=np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8)).astype(np.uint8),
    labels=np.arange(24) % 3,
    class_names=("a", "b", "c"),
    mean=(0.5,),
    std=(0.25,),
)


def fused_in_a_run(out: Path, precision: str = "fp32", **network: Any) -> int:
    """How often a step of `train` runs the fused kernels."""
    kernels = pytest.importorskip("tetdeploy.kernels.numba_bn_lif")
    config = NetworkConfig("convsnn", 3, 1, (8, 8), width=0.1, **network)
    about = {"mean": IMAGES.mean, "std": IMAGES.std, "class_names": IMAGES.class_names, "data": IMAGES.name}
    classifier = Classifier(build_network(config), config=config, **about)
    settings = TrainConfig(T=1 if config.ann else 2, epochs=1, batch_size=24, device="cpu", precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        forward = kernels.forward
        patch.setattr(kernels, "forward", lambda *arguments: (calls.append(1), forward(*arguments)))
        train(classifier, IMAGES, None, settings, out, progress=False)
    return len(calls)


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, 3), ({"precision": "bf16"}, 3), ({"precision": "fp16"}, 0), ({"ann": True}, 0), ({"smooth_spike": 10.0}, 0)],
)
def test_a_run_on_a_cpu_fuses_every_layer(options: dict[str, Any], layers: int, tmp_path: Path) -> None:
    """The first, of one channel, too."""
    assert fused_in_a_run(tmp_path, **options) == layers


PAGES = """
import resource
import torch
from tetdeploy.system.memory import reused_memory

def new_pages(megabytes, blocks=10):
    "What comes anew for blocks that are freed before the next: not for the first ones; the kernel may add its own."
    counts = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(blocks):
            torch.ones(megabytes << 18)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts[1:])

def kept(megabytes):
    "Megabytes of address space that stay after so much was taken and freed; nothing is written."
    def size():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) / 1024
    before = size()
    blocks = [torch.empty(256 << 18) for _ in range(megabytes // 256)]
    del blocks
    return size() - before

with reused_memory():
    print(kept(512), new_pages(8), new_pages(64))
# Below memory that stays in use there may be as much address space as was kept, free for what fits in it.
print(new_pages(1), new_pages(8), new_pages(640, blocks=1), kept(3072))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its memory as it likes")
def test_freed_memory_is_taken_again_within_and_given_back_after() -> None:
    """In a process of its own, of which nobody has changed the allocator."""
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    within, after = (list(map(float, line.split())) for line in done.stdout.splitlines())
    assert within[0] > 500 and max(within[1:]) < 50
    assert max(after[:2]) < 50  # as of a process that never was within
    assert after[2] > 100 and after[3] < 500
