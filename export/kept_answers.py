"""What an fp16 or int8 graph keeps of the float32 network's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.batches import parts
from tetdeploy.engine import Engine
from tetdeploy.networks import Classifier
from tetdeploy.sweep import running_class
from tetdeploy.system.memory import reused_memory

from .config import ExportConfig, Precision
from .progress import Progress, ticker
from .recorder import torch_logits

_BATCH = 32


def measure_kept(
    classifier: Classifier,
    file: Path,
    config: ExportConfig,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the float32 network and the graph in `file` on `x`; see `kept_answers`."""
    T = config.steps_on(x)
    engine = Engine(file)  # before: what is freed as it opens is not to stay with the process
    with reused_memory():
        full = torch_logits(classifier, x, T, ticker(progress, "answers in fp32", len(x)))
        tick = ticker(progress, f"answers in {config.precision}", len(x))
        return kept_answers(full, per_step_logits(engine, x, T, tick), config.precision, labels)


def kept_answers(
    full: NDArray[np.float32], reduced: NDArray[np.float32], precision: Precision, labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    """What a graph keeps of the float32 network's answers after 1..T steps.

    Args:
        full, reduced: per-step logits `[N, T, K]` of network and graph on the same images.
        precision: of the graph.
        labels: of at least these images.

    Returns:
        `num_images`, `T` (a list), `agreement` of the classes for each T; with labels also `accuracy_fp32` and, by its
        precision, that of the graph.
    """
    num_images, T, _ = full.shape
    classes = {name: running_class(logits) for name, logits in (("fp32", full), (precision, reduced))}
    kept: dict[str, Any] = {"num_images": num_images, "T": list(range(1, T + 1))}
    kept["agreement"] = (classes["fp32"] == classes[precision]).mean(0).tolist()
    if labels is not None:
        for name, chosen in classes.items():
            kept[f"accuracy_{name}"] = (chosen == labels[:num_images, None]).mean(0).tolist()
    return kept


def per_step_logits(
    engine: Engine, x: NDArray[Any], T: int, tick: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """Per-step logits `[N, T, K]`, a batch at a time; `tick` is called with its images."""
    return np.concatenate([engine.run(x[part], T).per_step for part in parts(len(x), _BATCH, tick)])
