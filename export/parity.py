"""PyTorch and the engine side by side, and PyTorch with itself step by step.

Spikes are discontinuous: one unit in the last place of a current flips a spike whose h is near v_th. Parity is
therefore a rate, the neuron-steps that differ over all neuron-steps, with the top-1 agreement and the logit error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tetdeploy.engine import Engine, Stream
from tetdeploy.networks import Classifier

from .counters import spikes_overlay
from .graph import Encoding

MAX_MISMATCH = 100e-6
MIN_AGREEMENT = 0.999
_BATCH = 50


class ParityError(ValueError):
    """The exported graph does not compute what PyTorch computes."""


class NeuronRecorder(TorchDispatchMode):
    """Within it, every LIF operator's spikes and last membrane are kept, in the order in which the layers fire.

    Args:
        state: membranes `[N, ...]` to start from instead, in the same order.
    """

    def __init__(self, state: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = state
        self.spikes: list[Tensor] = []
        self.state: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.tetdeploy.lif.default:
            return func(*args, **(kwargs or {}))
        current, u, *parameters = args
        if self.given is not None:
            u = self.given[len(self.state)]
        spikes, u_last = func(current, u, *parameters)
        self.spikes.append(spikes)
        self.state.append(u_last)
        return spikes, u_last


@dataclass(frozen=True)
class Parity:
    """How far the engine is from PyTorch on the same images.

    Attributes:
        T: steps compared; by causality this covers every smaller T.
        top1_agreement: images whose predicted class is the same, a fraction, after all T steps.
        top1_agreement_by_step: the same after 1..T steps.
        spike_mismatch_rate: differing neuron-steps over all neuron-steps.
        max_abs_logit_error: the largest difference of a per-step logit.
    """

    num_images: int
    T: int
    top1_agreement: float
    top1_agreement_by_step: tuple[float, ...]
    spike_mismatch_rate: float
    max_abs_logit_error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, what: str) -> None:
        """The gate.

        Raises:
            ParityError: more neuron-steps differ, or fewer images agree, than an export may have.
        """
        if self.spike_mismatch_rate > MAX_MISMATCH or self.top1_agreement < MIN_AGREEMENT:
            raise ParityError(
                f"{what} does not compute what PyTorch computes: {self.spike_mismatch_rate * 1e6:,.0f} of a million "
                f"neuron-steps differ (at most {MAX_MISMATCH * 1e6:.0f}), top-1 agreement "
                f"{self.top1_agreement:.2%} (at least {MIN_AGREEMENT:.1%}) on {self.num_images} images at T={self.T}; "
                "nothing was written"
            )


class _InFloat64(TorchDispatchMode):
    """Within it, what a network asks for in float32, as `x.float()` does, is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@torch.no_grad()
def check_steps(classifier: Classifier, x: Tensor, encoding: Encoding, *, T: int = 4) -> int:
    """Refuse a network in which more than neurons carries something from one step to the next.

    In float64, T steps at once are compared with T single steps between which only membranes are handed on.

    Args:
        x: a few images `[N, C, H, W]`, or frames `[N, T, C, H, W]`; where these hold fewer steps they come round again.

    Returns:
        The number of neuron layers that run.

    Raises:
        ValueError: they differ, or the network fails or does not return `[T, N, K]`.
    """
    double = copy.deepcopy(classifier).double()
    x = x if x.dtype == torch.uint8 else x.double()
    if encoding == "frames":
        x = x[:, [t % x.shape[1] for t in range(T)]]
    whole, logits = _recorded(double, x, T, encoding)
    state: list[Tensor] | None = None
    for t in range(T):
        single, step = _recorded(double, x[:, t : t + 1] if encoding == "frames" else x, 1, encoding, state)
        state = single.state
        if len(single.spikes) != len(whole.spikes):
            raise ValueError(
                f"the network runs its neurons {len(whole.spikes)} times for T={T} and {len(single.spikes)} times for "
                "one step; give each layer of neurons its whole sequence [T, ...] in one call"
            )
        same = all(torch.equal(a[0], b[t]) for a, b in zip(single.spikes, whole.spikes, strict=True))
        if not same or not torch.allclose(step[0], logits[t], rtol=1e-9, atol=1e-9):
            raise ValueError(
                f"the network mixes time outside its neurons: its answer at step {t + 1} of T={T} differs from that of "
                "a single step that starts from the same membranes; only LIF and IF neurons may carry anything from "
                "one step to the next"
            )
    return len(whole.spikes)


def _recorded(
    classifier: Classifier, x: Tensor, T: int, encoding: str, state: Sequence[Tensor] | None = None
) -> tuple[NeuronRecorder, Tensor]:
    """One run in float64, with its neurons' spikes and membranes; a network's own errors become ValueErrors."""
    recorder = NeuronRecorder(state)
    try:
        with _InFloat64(), recorder:  # type: ignore[no-untyped-call]
            logits = _forward(classifier, x, T, encoding)
    except Exception as error:  # whatever the user's network may raise
        raise ValueError(f"the network fails at T={T} on input {list(x.shape)}: {error}") from error
    wanted = [T, len(x), len(classifier.class_names)]
    if list(logits.shape) != wanted:
        raise ValueError(f"the network must return logits [T, N, K] = {wanted}, got {list(logits.shape)}")
    return recorder, logits


def compare(
    classifier: Classifier,
    engine: Engine,
    x: NDArray[Any],
    T: int,
    *,
    from_random_state: bool = False,
    tick: Callable[[int], None] | None = None,
) -> Parity:
    """Run `x` through PyTorch and the engine and compare every spike and logit.

    Args:
        from_random_state: start both from the same random membranes in [0, v_th) instead of zero (T must then be what
            one call of the graph runs).
        tick: called with the number of images done, for a progress bar.
    """
    neurons = [(n["name"], float(n["v_th"]), tuple(n["shape"])) for n in engine.metadata["neurons"]]
    overlay = spikes_overlay([name for name, _, _ in neurons])
    generator = np.random.default_rng(0)
    differing = neuron_steps = 0
    error = 0.0
    agree = np.zeros(T)
    for batch in _batches(x):
        state = None
        if from_random_state:
            state = [generator.random((len(batch), *shape), np.float32) * v_th for _, v_th, shape in neurons]
        expected, spikes = run_torch(classifier, batch, T, engine.encoding, state)
        per_step, got = _run_engine(engine, overlay, batch, T, [name for name, _, _ in neurons], state)
        for k, (name, _, _) in enumerate(neurons):
            other = got[f"spikes.{name}"].reshape(spikes[k].shape)
            differing += int(np.count_nonzero(other != spikes[k]))
            neuron_steps += other.size
        error = max(error, float(np.abs(per_step - expected).max()))
        agree += (_running_class(per_step) == _running_class(expected)).sum(0)
        if tick:
            tick(len(batch))
    by_step = tuple(float(a) for a in agree / len(x))
    return Parity(len(x), T, by_step[-1], by_step, differing / max(neuron_steps, 1), error)


@torch.no_grad()
def run_torch(
    classifier: Classifier, x: NDArray[Any], T: int, encoding: str, state: Sequence[NDArray[Any]] | None = None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Per-step logits `[N, T, K]` and every layer's spikes `[T, N, ...]`, as PyTorch computes them."""
    device = classifier.mean.device
    given = None if state is None else [torch.from_numpy(u).to(device) for u in state]
    with NeuronRecorder(given) as recorder:
        logits = _forward(classifier, torch.from_numpy(x).to(device), T, encoding)
    return logits.transpose(0, 1).cpu().numpy(), [spikes.cpu().numpy() for spikes in recorder.spikes]


def _forward(classifier: Classifier, x: Tensor, T: int, encoding: str) -> Tensor:
    logits: Tensor = classifier(x[:, :T].transpose(0, 1)) if encoding == "frames" else classifier(x, T)
    return logits


def _run_engine(
    engine: Engine,
    overlay: bytes,
    x: NDArray[Any],
    T: int,
    names: Sequence[str],
    state: Sequence[NDArray[Any]] | None,
) -> tuple[NDArray[Any], Mapping[str, NDArray[Any]]]:
    if state is None:
        result, spikes = engine.run_with(overlay, x, T)
        return result.per_step, spikes
    stream = Stream(engine, len(x), engine.overlaid(overlay)[0])
    stream.state = {f"u.{name}": u for name, u in zip(names, state, strict=True)}
    outputs = stream.call(x[:, :T] if engine.encoding == "frames" else x, [f"spikes.{name}" for name in names])
    return outputs["per_step"], outputs


def _running_class(per_step: NDArray[Any]) -> NDArray[np.int64]:
    """The predicted class after each number of steps, `[N, T]`: argmax of the running mean."""
    classes: NDArray[np.int64] = np.cumsum(per_step, axis=1).argmax(-1)
    return classes


def _batches(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (x[start : start + _BATCH] for start in range(0, len(x), _BATCH))
