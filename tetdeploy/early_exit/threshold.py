"""The threshold of early exit: the least mean T for a bearable loss of accuracy. Needs no torch.

LIF neurons are causal, so one run at T over labelled images says what every threshold would have done: an image that
stops after t steps has the mean of its first t per-step logits for an answer. As the threshold falls from 1, an image
moves from T to the step of its highest certainty, from there to the highest of the steps before, and so on. Each move
is an event at one certainty; sorted and summed up, the events give steps and flips at every threshold there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.arguments import check_flag
from tetdeploy.batches import parts
from tetdeploy.early_exit import CRITERIA, Criterion, Exit, certainty
from tetdeploy.engine import Engine
from tetdeploy.measured import engine_provenance
from tetdeploy.sweep import check_images, check_logits, running_sum

Z = 1.96  # of a one-sided level of 2.5 %
SHOWN_LOSSES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01)


@dataclass(frozen=True)
class Paired:
    """Answers by early exit beside those after T steps, on the same images.

    Attributes:
        lost: images that were right after T steps and are not by early exit.
        gained: the reverse.
    """

    num_images: int
    lost: int
    gained: int

    @property
    def loss(self) -> float:
        """Accuracy lost, a fraction; below 0 where early exit is better."""
        return (self.lost - self.gained) / self.num_images

    @property
    def loss_95(self) -> float:
        """Half the width of the loss's 95 % interval, adjusted so that no flips at all are no proof of no loss (Bonett
        and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data",
        2012)."""
        N, lost, gained = self.num_images + 2, self.lost + 1, self.gained + 1
        return Z * math.sqrt(lost + gained - (lost - gained) ** 2 / N) / N

    def to_dict(self) -> dict[str, float]:
        return {"lost": self.lost, "gained": self.gained, "loss": self.loss, "loss_95": self.loss_95}


def shows_less(num_images: int, lost: Any, gained: Any, loss: float) -> Any:
    """Whether paired answers show that less than `loss` is lost, a fraction; of numbers or arrays.

    The score test of Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998, at a one-sided level of 2.5 %, which it keeps even where few
    answers flip: of those that lose as much as is allowed, it takes for ones that do not, in the worst cases that a
    search found, 2.9 % with 300 images or more, and 3.2 % with 20 or more, while at most 30 % are gained; 4.3 % where
    nearly all of so few answers flip. An interval of Wald's kind, adjusted or not, does not keep it: without any flip
    it would take 6.2 %.
    """
    N, lost, gained = num_images, np.asarray(lost, float), np.asarray(gained, float)
    b = (2 * N - lost + gained) * loss - lost - gained
    c = -gained * loss * (1 - loss)
    rate = (np.sqrt(b**2 - 8 * N * c) - b) / (4 * N)  # of gains, most likely if exactly `loss` is lost
    return lost - gained - N * loss < -Z * np.sqrt(N * (2 * rate + loss * (1 - loss)))


def provable_loss(num_images: int) -> float:
    """The loss that so many images can just not show to be less, even if no answer flips."""
    return Z**2 / (num_images + Z**2)


def images_to_prove(loss: float) -> int:
    """How many images can show that less than `loss` is lost, which is above 0, if no answer flips."""
    return math.floor(Z**2 * (1 - loss) / loss) + 1


@dataclass(frozen=True)
class Answers:
    """Of labelled images, after each number of steps.

    Attributes:
        right: `[N, T]`.
        certainty: `[N, T]` by criterion.
    """

    right: NDArray[np.bool_]
    certainty: Mapping[Criterion, NDArray[np.float64]]

    @staticmethod
    def of(per_step: NDArray[Any], labels: NDArray[np.int64]) -> Answers:
        """From per-step logits `[N, T, K]` and labels `[N]`. Raises: see `check_logits`."""
        check_logits(per_step)
        mean = running_sum(per_step) / np.arange(1, per_step.shape[1] + 1, dtype=np.float32)[:, None]
        return Answers(mean.argmax(-1) == labels[:, None], {c: certainty(mean, c) for c in CRITERIA})

    @staticmethod
    def joined(batches: Sequence[Answers]) -> Answers:
        right = np.concatenate([batch.right for batch in batches])
        return Answers(right, {c: np.concatenate([batch.certainty[c] for batch in batches]) for c in CRITERIA})

    def steps(self, exit: Exit) -> NDArray[np.int64]:
        """How many steps each image takes, `[N]`."""
        stops = self.certainty[exit.criterion] > exit.threshold
        stops[:, : exit.min_T - 1], stops[:, -1] = False, True
        steps: NDArray[np.int64] = stops.argmax(1) + 1
        return steps


@dataclass(frozen=True)
class ThresholdResult:
    """A threshold and what it does."""

    exit: Exit
    mean_T: float
    accuracy: float
    paired: Paired

    def to_dict(self) -> dict[str, Any]:
        numbers = {"accuracy": self.accuracy, "mean_T": self.mean_T} | self.paired.to_dict()
        return {"criterion": self.exit.criterion, "threshold": self.exit.threshold, **numbers}


@dataclass(frozen=True)
class Frontier:
    """Every threshold that makes a difference, from 1, at which no image stops early, downwards: `[P]` each.

    Attributes:
        steps: taken by all images together.
        lost, gained: see `Paired`.
    """

    criterion: Criterion
    min_T: int
    num_images: int
    right_after_T: int
    threshold: NDArray[np.float64]
    steps: NDArray[np.int64]
    lost: NDArray[np.int64]
    gained: NDArray[np.int64]

    @staticmethod
    def of(answers: Answers, criterion: Criterion, min_T: int = 1) -> Frontier:
        right, sure = answers.right, answers.certainty[criterion]
        N, T = right.shape
        lost, gained = right[:, -1:] & ~right, ~right[:, -1:] & right
        now = np.full(N, T - 1)
        events = [np.array([[np.inf], [N * T], [0], [0]])]  # certainty, and by how much steps, lost and gained change
        for t in reversed(range(min_T - 1, T - 1)):
            moved = np.flatnonzero(sure[:, t] > sure[:, min_T - 1 : t].max(1, initial=0.0))
            flips = [kind[moved, t].astype(int) - kind[moved, now[moved]] for kind in (lost, gained)]
            events.append(np.stack([sure[moved, t], t - now[moved], *flips]))
            now[moved] = t
        value, *changes = np.concatenate(events, axis=1)
        order = np.argsort(-value, kind="stable")
        value, sums = value[order], np.cumsum(np.array(changes)[:, order], axis=1).astype(np.int64)
        last = np.append(value[1:] != value[:-1], True)  # equal certainties move together
        value, sums = value[last], sums[:, last]
        below = np.append(value[1:], 0.0)
        middle = (value + below) / 2
        threshold = np.where(middle < value, middle, below)
        threshold[0] = 1.0
        return Frontier(criterion, min_T, N, int(right[:, -1].sum()), threshold, *sums)

    def cheapest(self, loss: float, *, confident: bool = True) -> ThresholdResult:
        """The threshold of the least mean T that loses at most `loss`, a fraction of the images.

        Args:
            confident: `shows_less` says so of it and of every threshold above it: of thousands of thresholds the best
                on some images is lucky there. (Fixed sequence testing: Angelopoulos et al., Learn then Test, Annals of
                Applied Statistics 2025.) False judges by the loss found alone, which other images exceed in most cases.
        """
        check_flag("confident", confident)
        if confident:
            bearable = shows_less(self.num_images, self.lost, self.gained, loss)
            bearable[0] = True  # no image stops early
            bearable = np.logical_and.accumulate(bearable)
        else:
            bearable = self.lost - self.gained <= loss * self.num_images + 1e-9
        k = int(np.flatnonzero(bearable)[-1])
        paired = Paired(self.num_images, int(self.lost[k]), int(self.gained[k]))
        accuracy = (self.right_after_T - paired.lost + paired.gained) / self.num_images
        exit = Exit(float(self.threshold[k]), self.criterion, self.min_T)
        return ThresholdResult(exit, float(self.steps[k] / self.num_images), accuracy, paired)


def run_answers(
    engine: Engine,
    x: NDArray[Any],
    labels: NDArray[np.int64],
    T: int,
    *,
    batch_size: int = 64,
    tick: Callable[[int], None] | None = None,
) -> Answers:
    """Run labelled images, T steps each.

    Args:
        tick: called with the number of images done.

    Raises:
        ValueError: labels do not fit the images or the model's classes; see also `Engine.run`.
    """
    check_images(engine, x, labels, T)
    return Answers.joined(
        [Answers.of(engine.run(x[part], T).per_step, labels[part]) for part in parts(len(x), batch_size, tick)]
    )


@dataclass(frozen=True)
class FoundThreshold:
    """The rule found for a loss of accuracy, and those for others.

    Attributes:
        point: the one found; `loss` is what it was allowed, a fraction.
        shown: the best rules for `SHOWN_LOSSES` and `loss`, by what each was allowed.
    """

    answers: Answers
    loss: float
    point: ThresholdResult
    shown: Mapping[float, ThresholdResult]
    confident: bool

    @property
    def T(self) -> int:
        return int(self.answers.right.shape[1])

    @property
    def accuracy_by_T(self) -> list[float]:
        """Accuracy after 1, ..., T steps for every image."""
        return [float(share) for share in self.answers.right.mean(0)]

    def to_dict(self, engine: Engine, data: str) -> dict[str, Any]:
        """The content of `MODEL.exit.json`. `data`: what the images were."""
        steps = self.answers.steps(self.point.exit)
        return {
            "kind": "exit",
            "model": str(engine.path),
            "data": data,
            "num_samples": len(self.answers.right),
            "T": self.T,
            "min_T": self.point.exit.min_T,
            "allowed_loss": self.loss,
            "confident": self.confident,
            **self.point.to_dict(),
            "fixed_accuracy": self.accuracy_by_T[-1],
            "accuracy_by_T": self.accuracy_by_T,
            "num_images_by_steps": np.bincount(steps, minlength=self.T + 1)[1:].tolist(),
            "frontier": [{"allowed_loss": loss} | point.to_dict() for loss, point in self.shown.items()],
        } | engine_provenance(engine)


def check_min_T(min_T: int, T: int) -> None:
    """Refuse a least number of steps that is none of T, with ValueError."""
    if not 1 <= min_T <= T:
        raise ValueError(f"min_T must lie within the T={T} steps, got {min_T}")


def find_threshold(
    answers: Answers,
    *,
    loss: float = 0.001,
    criteria: Sequence[Criterion] = CRITERIA,
    min_T: int = 1,
    confident: bool = True,
) -> FoundThreshold:
    """The rule of the least mean T that loses at most `loss`, a fraction, of the accuracy after T steps.

    Args:
        criteria: those to choose from.
        confident: see `Frontier.cheapest`.

    Raises:
        ValueError: `loss` is not within 0..1; `min_T` is not within T.
    """
    check_min_T(min_T, answers.right.shape[1])
    if not 0 <= loss <= 1:
        raise ValueError(f"the loss of accuracy must lie in 0..1, a fraction, got {loss}")
    loss = float(loss)
    frontiers = [Frontier.of(answers, criterion, min_T) for criterion in criteria]

    def best(loss: float) -> ThresholdResult:
        return min(
            (f.cheapest(loss, confident=confident) for f in frontiers),
            key=lambda point: (point.mean_T, point.paired.loss),
        )

    shown = {allowed: best(allowed) for allowed in sorted({*SHOWN_LOSSES, loss})}
    return FoundThreshold(answers, loss, shown[loss], shown, confident)
