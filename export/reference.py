"""The reference beside a model: images and what PyTorch computes for them, which `tetdeploy.agreement` runs again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.agreement import computed_by
from tetdeploy.batches import parts
from tetdeploy.traced_network import Runnable

from .config import ExportConfig
from .recorder import run_torch

NUM_REFERENCE = 256


def write_reference(
    file: Path,
    classifier: Runnable,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    config: ExportConfig,
    description: Mapping[str, Any],
) -> None:
    """Write what PyTorch computes for `x`, so that another machine can prove it computes the same.

    Args:
        classifier: what computes the graph's answers in PyTorch.
        x: input as the graph takes it.
        labels: of at least these images.
        description: the metadata of the graph.
    """
    T = config.steps_on(x)
    per_step, counts = [], []
    for part in parts(len(x), 32):
        logits, spikes = run_torch(classifier, x[part], T)
        per_step.append(logits)
        counts.append(np.stack([s.reshape(T, s.shape[1], -1).sum(-1).T for s in spikes], axis=-1).astype(np.int64))
    arrays: dict[str, Any] = {
        "x": x,
        "per_step": np.concatenate(per_step),
        "spike_counts": np.concatenate(counts),
        "neurons": np.array([layer["name"] for layer in description["neurons"]]),
    } | {key: np.array(value) for key, value in computed_by(description).items()}
    if labels is not None:
        arrays["labels"] = labels[: len(x)]
    with file.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
