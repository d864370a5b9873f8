"""Learning rate and random numbers as pure functions of the step: a resumed run has nothing of either to restore."""

from __future__ import annotations

import math

import numpy as np


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of one step: linear warm-up to `peak`, then half a cosine towards 0.

    lr(s) = peak (s + 1) / warmup_steps                                              for s < warmup_steps
    lr(s) = peak (1 + cos(pi (s - warmup_steps) / (total_steps - warmup_steps))) / 2  from there

    The first step after the warm-up has `peak`, the last step is still a little above 0.

    Args:
        step: s, from 0 to total_steps - 1.
        peak: the highest rate.
        total_steps: of the whole run.
        warmup_steps: of these, fewer than total_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def derive_seed(seed: int, purpose: str, index: int) -> int:
    """A 64-bit seed that depends on nothing but its arguments; neighbours are unrelated.

    Args:
        seed: the run's seed, at least 0.
        purpose: what it is for, so that two uses at the same index differ.
        index: epoch or global step, at least 0.
    """
    words = (seed, int.from_bytes(purpose.encode(), "little"), index)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
