"""A network that `tetdeploy export --format nir` has written, in Norse or sinabs. From this folder, in Python:

    from nir_readers import norse_logits, sinabs_logits
    logits = norse_logits("model.nir", x, T=4)    # [T, N, K]

`x` are images [N, C, H, W], normalised as docs/nir.md shows. The `from_nir` of either makes another network of the
file, or none: Norse's ignores R, that of sinabs resets by subtraction, and neither has average pooling or adds edges
that meet. nirtorch adds them, given what makes a module of each kind of node: `pip install norse nirtorch`, or sinabs.
Tried with norse 1.1.0, sinabs 3.1.3, nirtorch 2.6 and nir 1.0.8. sinabs brings an older nir, so `pip install -U nir
nirtorch` comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir
import nirtorch
import numpy as np
import torch
from torch import Tensor, nn

DT = 1e-4  # seconds a step


def norse_logits(file: Path | str, x: Tensor, T: int) -> Tensor:
    """The logits `[T, N, K]` of images `[N, C, H, W]`."""
    network, state, per_step = read(file, {nir.LIF: norse_lif, nir.IF: norse_if}), None, []
    for _ in range(T):
        logits, state = network(x, state)
        per_step.append(logits)
    return torch.stack(per_step)


def sinabs_logits(file: Path | str, x: Tensor, T: int) -> Tensor:
    """The same; in sinabs the batch comes before time, and the neurons keep their state: each call reads anew."""
    network = read(file, {nir.LIF: lambda node: sinabs_lif(node, T), nir.IF: lambda node: sinabs_if(node, T)})
    logits = network(x.repeat_interleave(T, 0))
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.unflatten(0, (-1, T)).transpose(0, 1)


def read(file: Path | str, neurons: dict[type, Callable[[Any], nn.Module]]) -> nn.Module:
    layers = {nir.Conv2d: convolution, nir.Affine: linear, nir.Linear: linear, nir.AvgPool2d: pool}
    network: nn.Module = nirtorch.nir_to_torch(nir.read(file), {**layers, nir.Flatten: flatten, **neurons})
    return network.eval()


def norse_lif(node: Any) -> nn.Module:
    from norse.torch import LIFBoxCell
    from norse.torch.functional.lif_box import LIFBoxParameters

    # Norse knows no R: its membrane is ours over R
    return LIFBoxCell(LIFBoxParameters(tau_mem_inv=tensor(1 / node.tau), v_th=tensor(node.v_threshold / node.r)), dt=DT)


def norse_if(node: Any) -> nn.Module:
    from norse.torch import IAFCell
    from norse.torch.functional.iaf import IAFParameters

    return IAFCell(IAFParameters(v_th=tensor(node.v_threshold)), dt=DT)


def sinabs_lif(node: Any, T: int) -> nn.Module:
    from sinabs.layers import LIFSqueeze

    leak = np.maximum(1 - DT / node.tau, 1e-30)  # tau of ours, which is exp(-1 / tau_mem); 0 has no logarithm
    return LIFSqueeze(tau_mem=tensor(-1 / np.log(leak)), norm_input=False, **hard_reset(node, T))


def sinabs_if(node: Any, T: int) -> nn.Module:
    from sinabs.layers import IAFSqueeze

    return IAFSqueeze(**hard_reset(node, T))


def hard_reset(node: Any, T: int) -> dict[str, Any]:
    from sinabs.activation import MembraneReset, SingleSpike

    threshold = tensor(node.v_threshold)
    return {"spike_threshold": threshold, "spike_fn": SingleSpike, "reset_fn": MembraneReset(), "num_timesteps": T}


def convolution(node: Any) -> nn.Module:
    out, in_, *kernel = node.weight.shape
    layer = nn.Conv2d(in_, out, kernel, pair(node.stride), pair(node.padding), pair(node.dilation))
    return filled(layer, node)


def linear(node: Any) -> nn.Module:
    out, in_ = node.weight.shape
    return filled(nn.Linear(in_, out, bias=hasattr(node, "bias")), node)


def filled(layer: Any, node: Any) -> nn.Module:
    layer.weight.data = tensor(node.weight)
    if layer.bias is not None:
        layer.bias.data = tensor(node.bias)
    return layer


def pool(node: Any) -> nn.Module:
    return nn.AvgPool2d(pair(node.kernel_size), pair(node.stride), pair(node.padding))


def flatten(node: Any) -> nn.Module:
    return nn.Flatten(node.start_dim, node.end_dim)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def pair(values: Any) -> tuple[int, int]:
    first, second = np.broadcast_to(values, 2)
    return int(first), int(second)
