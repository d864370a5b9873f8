"""The gate: on which runs a graph must compute what PyTorch computes before it is kept.

`parity` has the comparison, and how much may differ.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tetdeploy.engine import Engine
from tetdeploy.traced_network import Runnable

from .config import ExportConfig
from .parity import Parity, compare
from .progress import Progress, ticker


def check_graph(
    classifier: Runnable, file: Path, config: ExportConfig, x: NDArray[Any], progress: Progress | None
) -> tuple[Parity, Parity | None]:
    """Compare at the graph's own T, or two steps beyond the training's; from random membranes too, where it has state.

    Args:
        classifier: what computes the graph's answers in PyTorch.
        file: the graph.
        x: input as the graph takes it.

    Raises:
        ParityError: it differs.
    """
    engine = Engine(file, native=False)  # spikes are read by an overlay, from the plain graph
    T = config.steps_on(x, beyond=2)
    what = f"the {config.layout} graph"
    parity = compare(classifier, engine, x, T, tick=ticker(progress, "checking against PyTorch", len(x)))
    parity.check(what)
    if config.layout == "dynamic":
        for other in {1, min(T, config.trained_T)} - {T}:
            compare(classifier, engine, x[:64], other).check(f"{what} at T={other}")
    if not engine.with_state:
        return parity, None
    steps, some = engine.T or 1, x[:200]
    from_state = compare(
        classifier, engine, some, steps, from_random_state=True, tick=ticker(progress, "from a state", len(some))
    )
    # One step from random membranes may leave two classes near a tie, so that here spikes decide, not classes.
    replace(from_state, top1_agreement=1.0).check(f"{what} from a non-zero state")
    return parity, from_state
