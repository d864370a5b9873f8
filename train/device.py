"""Which device a run uses and in what precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tetdeploy import kernels
from tetdeploy.networks import NetworkConfig
from tetdeploy.system.machine import emulates_bf16, read_cpuinfo
from tetdeploy.tracing import float32_convolutions

from .ranks import current_ranks

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(name: str) -> None:
    """Refuse a device that no machine has.

    Raises:
        ValueError: it is none of auto, cpu, cuda and cuda:<number>.
    """
    is_text = isinstance(name, str)  # a torch.device is none
    if not is_text or (name not in ("auto", "cpu", "cuda") and not name.removeprefix("cuda:").isdecimal()):
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:<number>")


def pick_device(name: str) -> torch.device:
    """The device of `TrainConfig.device`; "auto" is the current GPU if there is one.

    Raises:
        ValueError: the name is of none, or of a GPU that is not there.
    """
    check_device(name)
    ranks = current_ranks()
    if ranks.size > 1 and name.startswith("cuda:"):
        raise ValueError(f"device {name} is one GPU for {ranks.size} processes; use --device cuda: each takes its own")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.removeprefix("cuda:")) if name.startswith("cuda:") else ranks.local_rank
    if index >= count:
        if ranks.size > 1 and count:
            raise ValueError(
                f"process {index} of this machine, counted from 0, takes GPU {index}, and PyTorch sees {count} here: "
                "start fewer processes, let each see every GPU (CUDA_VISIBLE_DEVICES), or use --device cpu"
            )
        built = "" if torch.version.cuda else "; this PyTorch is built for the CPU only"
        raise ValueError(f"device {name} is not there: PyTorch sees {count} GPUs{built}; use --device cpu or auto")
    return torch.device("cuda", index if name.startswith("cuda:") else torch.cuda.current_device())


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of `TrainConfig.precision` on a device: what "auto" comes to, or `name` itself. Warns of one that
    is slower on a CPU.

    Raises:
        ValueError: bf16 on a GPU that has none.
    """
    if device.type == "cpu":
        name = "fp32" if name == "auto" else name
        slower = None
        if name == "fp16":
            slower = "fp16 is for GPUs: on a CPU it is slower than fp32, in training up to a hundred times"
        elif name == "bf16" and emulates_bf16(read_cpuinfo()):
            slower = "this processor has no instructions for bf16, which is slower than fp32 here"
        if slower is not None and current_ranks().writes:
            warnings.warn(slower, RuntimeWarning, stacklevel=2)
        return name
    with torch.cuda.device(device):  # which is the one that PyTorch looks at
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise ValueError(f"{device_name(device)} has no bf16; use --precision fp16 or fp32")
    if name == "auto":
        return "bf16" if has_bf16 else "fp16"
    return name


def device_name(device: torch.device) -> str:
    """The card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def forward_batch(device: torch.device) -> int:
    """Images at a time where nothing is trained: on a CPU activations then fit the cache."""
    return 64 if device.type == "cpu" else 512


def place(network: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Move a network to its device in place; if so wished, its convolutions get channels-last weights.

    A convolution takes the layout of its weights for its input and output, and all that follows keeps it: `[T*N, C, H,
    W]` lies channel by channel in memory, as fast convolutions and the fused BN (`fused_bn`) want it, from the first
    convolution on. The images themselves, of three channels, are not worth a pass of their own. `view` may refuse such
    activations, so that this is not for networks that others wrote.
    """
    network.to(device)
    if not channels_last:
        return
    for parameter in network.parameters():
        if parameter.dim() == 4:
            # `contiguous` would leave the strides of a single channel, of which a convolution makes nothing
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this process on the device; a GPU copies from pinned memory while this process goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def wants_channels_last(config: NetworkConfig, device: torch.device, precision: str, *, fusable: bool) -> bool:
    """Whether a network runs faster channels-last: on a GPU any of ours; on a CPU where it is trained with BN and
    neurons fused, since PyTorch's own BN takes five times as long in that layout there.

    Args:
        fusable: it is trained, in one process, with BN of float weights.
    """
    if config.is_own or device.type == "cuda":
        return not config.is_own
    fused = fusable and config.is_spiking
    return fused and kernels.numba_for(DTYPES[precision] or torch.float32) is not None


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Within it cuDNN times its algorithms once for each shape and keeps the fastest, and float32 is float32 to it.
    Nothing changes on a CPU.

    Nothing is timed with `torch.use_deterministic_algorithms`: two runs may find another algorithm the fastest.
    """
    cudnn: Any = torch.backends.cudnn
    benchmark = cudnn.benchmark
    cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        with float32_convolutions():
            yield
    finally:
        cudnn.benchmark = benchmark


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a network runs in a precision; "fp32" is no autocast at all.

    Within an autocast of a caller's, PyTorch would keep weights in half precision from step to step, whatever the
    optimizer makes of them.
    """
    dtype = DTYPES[precision]
    torch.clear_autocast_cache()
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
