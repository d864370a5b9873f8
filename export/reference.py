"""The reference beside a model: images and what PyTorch computes for them, which `tetdeploy.agreement` runs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.agreement import computed_by
from tetdeploy.batches import images_with_spikes, parts
from tetdeploy.traced_network import Runnable

from .config import ExportConfig
from .recorder import run_torch

NUM_REFERENCE = 256
_BATCH = 32


class Answers:
    """What PyTorch computes for the first images, a batch after the other.

    Attributes:
        num_images: images noted so far.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._per_step: list[NDArray[Any]] = []
        self._counts: list[NDArray[np.int64]] = []

    def add(self, per_step: NDArray[Any], counts: Sequence[NDArray[np.int64]]) -> None:
        """Note a batch: logits `[N, T, K]`, and how many neurons of each layer fire, `[T, N]` by layer."""
        self.num_images += len(per_step)
        self._per_step.append(per_step)
        self._counts.append(np.stack(counts, axis=-1).transpose(1, 0, 2))

    def first(self, count: int, T: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Logits `[N, T, K]` and spike counts `[N, T, layers]` of the first images and steps, of which batches may have
        more."""
        per_step, counts = (np.concatenate([b[:, :T] for b in batches]) for batches in (self._per_step, self._counts))
        return per_step[:count], counts[:count]


def write_reference(
    file: Path,
    classifier: Runnable,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    config: ExportConfig,
    description: Mapping[str, Any],
    answers: Answers,
    tick: Callable[[int], None] | None = None,
) -> None:
    """Write what PyTorch computes for `x`, so that another machine can prove it computes the same.

    Args:
        classifier: what computes the graph's answers in PyTorch.
        x: input as the graph takes it.
        labels: of at least these images.
        description: the metadata of the graph.
        answers: what is known of them; those of the other images are added.
        tick: called with the number of images that were run for this, for a progress bar.
    """
    T, known = config.steps_on(x), answers.num_images
    size = min(_BATCH, images_with_spikes(description["neurons"], T))
    for part in parts(max(len(x) - known, 0), size, tick):
        per_step, spikes = run_torch(classifier, x[known:][part], T)
        answers.add(per_step, [s.reshape(T, s.shape[1], -1).sum(-1).astype(np.int64) for s in spikes])
    per_step, counts = answers.first(len(x), T)
    arrays: dict[str, Any] = {
        "x": x,
        "per_step": per_step,
        "spike_counts": counts,
        "neurons": np.array([layer["name"] for layer in description["neurons"]]),
    } | {key: np.array(value) for key, value in computed_by(description).items()}
    if labels is not None:
        arrays["labels"] = labels[: len(x)]
    with file.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
