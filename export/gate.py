"""The gate: on which runs a graph must compute what PyTorch computes before it is kept.

`parity` has the comparison, and how much may differ. ONNX Runtime runs every graph; one for OpenVINO that runs too.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tetdeploy.engine import Engine
from tetdeploy.int8.network import Int8Network
from tetdeploy.system.memory import reused_memory
from tetdeploy.traced_network import Runnable, TracedNetwork

from .audit import audit
from .config import ExportConfig
from .counters import spikes_overlay
from .half import HalfNetwork
from .parity import Parity, ParityError, compare, compare_folded
from .progress import Progress
from .reference import Answers

_NUM_FOLDED, _NUM_COUNTED, _NUM_ROUNDED = 8, 4, 2


def gate_runtimes(config: ExportConfig) -> tuple[str, ...]:
    """The runtimes, of those that are installed, that must compute what PyTorch computes."""
    return ("onnxruntime", *["openvino"] * (config.target == "openvino" and find_spec("openvino") is not None))


def check_graph(
    classifier: Runnable,
    file: Path,
    config: ExportConfig,
    x: NDArray[Any],
    answers: Answers,
    progress: Progress | None,
) -> tuple[Parity, Parity | None]:
    """Compare at the graph's own T, or two steps beyond the training's; from random membranes too, where it has state.
    A graph that hands on the state of T steps is called twice: the second call reads what the first one gave.

    Args:
        classifier: what computes the graph's answers in PyTorch.
        file: the graph.
        x: input as the graph takes it.
        answers: is given PyTorch's, of at least the graph's own T.

    Returns:
        How far ONNX Runtime is from PyTorch.

    Raises:
        CountError: the graph counts other operations than PyTorch's layers do.
        ParityError: a runtime differs; or what computes its answers, a network in int8 or fp16, is made of a folded one
            in float32 that does not compute what the classifier does, layer by layer.
        HalfError, Int8Error: a layer differs by more than rounding from that of the folded network.
        ValueError: OpenVINO cannot load the graph.
    """
    first, *others = gate_runtimes(config)
    for other in others:  # one that cannot load the graph says so before all comparing
        Engine(file, native=False, runtime=other)
    engine = Engine(file, native=False, runtime=first)
    T = config.steps_on(x, beyond=2)
    if isinstance(classifier, TracedNetwork):
        _check_folding(classifier, engine, x[:_NUM_FOLDED], T)
    if isinstance(classifier, HalfNetwork | Int8Network):
        some = torch.tensor(x[:_NUM_ROUNDED], device=classifier.mean.device)
        classifier.check_layers(some[:, :T] if config.encoding == "frames" else some, T)
    found = _check_engine(classifier, engine, config, x, progress, answers)
    own = classifier.classifier if isinstance(classifier, TracedNetwork) else classifier
    audit(own, engine, x[:_NUM_COUNTED], T)
    del engine  # each has all weights
    for other in others:
        engine = Engine(file, native=False, runtime=other)
        _check_engine(classifier, engine, config, x, progress)
        audit(own, engine, x[:_NUM_COUNTED], T)
    return found


def _check_engine(
    classifier: Runnable,
    engine: Engine,
    config: ExportConfig,
    x: NDArray[Any],
    progress: Progress | None,
    answers: Answers | None = None,
) -> tuple[Parity, Parity | None]:
    """Args: `engine` is without native operators: spikes are read by an overlay, from the plain graph."""
    T = config.steps_on(x, beyond=2)
    if config.with_state:
        T *= 2
        if config.encoding == "frames" and x.shape[1] < T:
            x = np.concatenate([x, x], axis=1)  # the same frames again
    under = "" if engine.runtime == "onnxruntime" else f" under {engine.runtime}"
    what = f"the {config.layout} graph{under}"
    bar = f"checking against PyTorch{under}"
    # Before: what is freed as the session opens that gives spikes is not to stay with the process.
    engine.overlaid(spikes_overlay(neuron["name"] for neuron in engine.metadata["neurons"]))
    with reused_memory():
        parity = compare(classifier, engine, x, T, answers=answers, progress=progress, what=bar)
        parity.check(what)
        if config.layout == "dynamic":
            for other in {1, min(T, config.trained_T)} - {T}:
                compare(classifier, engine, x[:64], other).check(f"{what} at T={other}")
        if not engine.with_state:
            return parity, None
        from_state = compare(
            classifier,
            engine,
            x[:200],
            engine.chunk_T,
            from_random_state=True,
            progress=progress,
            what=f"from a state{under}",
        )
        # Here spikes decide, not classes: see `compare`.
        replace(from_state, top1_agreement=1.0).check(f"{what} from a non-zero state")
        return parity, from_state


def _check_folding(reduced: TracedNetwork, engine: Engine, x: NDArray[Any], T: int) -> None:
    folded = compare_folded(reduced, engine, x, T)
    if not folded.is_local:
        ppm = folded.local_mismatch_rate * 1e6
        raise ParityError(
            f"with BN folded, a layer does not compute what it did: in the worst one {ppm:,.0f} of a million "
            f"neuron-steps differ, and logits by {folded.local_logit_error:.1e} of the largest, on "
            f"{folded.num_images} images at T={T}; nothing was written"
        )
