"""Refusing a network in which more than neurons carries something from one step to the next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from tetdeploy.data import Encoding
from tetdeploy.networks import Classifier, NetworkConfig, run_network

from .lowering import misplaced
from .recorder import NeuronRecorder


class InFloat64(TorchDispatchMode):
    """Within it, what a network asks for in float32, as `x.float()` does, is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _NamedNeurons(NeuronRecorder):
    """Keeps the names of the modules that fire as well; of neurons in a forward of the network itself "lif"."""

    def __init__(self, state: Sequence[Tensor] | None = None) -> None:
        super().__init__(state)
        self.modules = ModuleTracker()
        self.names: list[str] = []

    def fired(self, current: Tensor, spikes: Tensor, u_last: Tensor, tau: float, v_th: float) -> Tensor:
        *_, name = max(self.modules.parents, key=len).split(".", 2)  # of Classifier.network.NAME
        self.names.append("lif" if name == "network" else name)
        return super().fired(current, spikes, u_last, tau, v_th)


@torch.no_grad()
def check_steps(classifier: Classifier, x: Tensor, encoding: Encoding, *, T: int = 4) -> int:
    """Refuse a network in which more than neurons carries something from one step to the next.

    In float64, T steps at once are compared with T single steps between which only membranes are handed on.

    Args:
        x: a few images `[N, C, H, W]`, or frames `[N, T, C, H, W]`; where these hold fewer steps they come round again.

    Returns:
        The number of neuron layers that run.

    Raises:
        ValueError: they differ; the network fails or does not return finite `[T, N, K]`; neurons get other than
            `[T, N, ...]`; it is an ANN twin, or one with smooth spikes.
    """
    _refuse_without_spikes(classifier.config)
    double = copy.deepcopy(classifier).double()
    x = x if x.dtype == torch.uint8 else x.double()
    if encoding == "frames":
        x = x[:, [t % x.shape[1] for t in range(T)]]
    whole, logits = _recorded(double, x, T)
    if not logits.isfinite().all():
        raise ValueError("the network gives NaN or infinite logits: its weights are damaged, or its training diverged")
    state: list[Tensor] | None = None
    for t in range(T):
        single, step = _recorded(double, x[:, t : t + 1] if encoding == "frames" else x, 1, state)
        state = single.state
        if len(single.spikes) != len(whole.spikes):
            raise ValueError(
                f"the network runs its neurons {len(whole.spikes)} times for T={T} and {len(single.spikes)} times for "
                "one step; give each layer of neurons its whole sequence [T, ...] in one call"
            )
        for run, steps, length in ((single, 1, "one step of"), (whole, T, f"T={T} and")):
            for name, spikes in zip(run.names, run.spikes, strict=True):
                if spikes.shape[:2] != (steps, len(x)):
                    raise ValueError(f"for {length} {len(x)} images {misplaced(name, spikes.shape)}")
        same = all(torch.equal(a[0], b[t]) for a, b in zip(single.spikes, whole.spikes, strict=True))
        if not same or not torch.allclose(step[0], logits[t], rtol=1e-9, atol=1e-9):
            raise ValueError(
                f"the network mixes time outside its neurons: its answer at step {t + 1} of T={T} differs from that of "
                "a single step that starts from the same membranes; only LIF and IF neurons may carry anything from "
                "one step to the next"
            )
    return len(whole.spikes)


def _refuse_without_spikes(config: NetworkConfig) -> None:
    if config.ann:
        raise ValueError(
            "the network is an ANN twin: it has no neurons and no time, and is there to be compared with and learned "
            "from (train --distill); train without --ann to export"
        )
    if k := config.smooth_spike:
        raise ValueError(
            f"the network was trained with smooth spikes, Sigmoid({k:g} x): it neither fires nor saves operations, and "
            "is there for Table 2 only; train without --smooth-spike to export"
        )


def _recorded(
    classifier: Classifier, x: Tensor, T: int, state: Sequence[Tensor] | None = None
) -> tuple[_NamedNeurons, Tensor]:
    """One run in float64, with its neurons' spikes and membranes; a network's own errors become ValueErrors."""
    recorder = _NamedNeurons(state)
    try:
        with InFloat64(), recorder.modules, recorder:  # type: ignore[no-untyped-call]
            logits = run_network(classifier, x, T)
    except Exception as error:  # whatever the user's network may raise
        raise ValueError(f"the network fails at T={T} on input {list(x.shape)}: {error}") from error
    return recorder, logits
