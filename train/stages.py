"""Time inheritance training (`tit`) and random time steps (`random_T`): their short notation."""

from __future__ import annotations

from dataclasses import dataclass

from tetdeploy.steps import MAX_T

MAX_FACTOR = 1e18  # float32 holds no square of a much larger one


@dataclass(frozen=True)
class Stage:
    """Epochs with one T and one schedule of the learning rate: warm-up, then a cosine to 0.

    Attributes:
        number: 1 for the first.
        T: time steps.
        epochs: how many.
        lr: peak learning rate.
        first_epoch: index of its first epoch in the whole run.
    """

    number: int
    T: int
    epochs: int
    lr: float
    first_epoch: int


def parse_tit(text: str, *, lr: float) -> tuple[Stage, ...]:
    """Stages of time inheritance training: "2:300,6:50" is 300 epochs at T=2, then 50 at T=6.

    A network trained with TET at a small T starts the training at a larger one; the paper: 300 epochs at T=2 and 50 at
    T=6 cost half of 300 epochs at T=6. A third number is a stage's own peak learning rate: "2:300:1e-3,6:50:1e-4".

    Args:
        text: T:epochs or T:epochs:lr, separated by commas.
        lr: peak learning rate of the stages that name none.

    Raises:
        ValueError: it does not parse, or a number is out of its range.
    """
    stages: list[Stage] = []
    for part in text.split(","):
        numbers = part.split(":")
        try:
            T, epochs = int(numbers[0]), int(numbers[1])
            rate = float(numbers[2]) if len(numbers) == 3 else lr
        except (ValueError, IndexError):
            raise _unreadable(text, part) from None
        if len(numbers) > 3 or T < 1 or epochs < 1 or not 0.0 < rate <= MAX_FACTOR:
            raise _unreadable(text, part)
        first_epoch = sum(stage.epochs for stage in stages)
        stages.append(Stage(len(stages) + 1, T, epochs, rate, first_epoch))
    return tuple(stages)


@dataclass(frozen=True)
class TimeRange:
    """From which numbers of time steps each training step draws, and how many it draws."""

    low: int
    high: int
    draws: int = 3


def parse_random_T(text: str) -> TimeRange:
    """ "1:6" is T from 1 to 6, three of them at each training step; "1:6:2" is two of them.

    Raises:
        ValueError: it does not parse, or a number is out of its range.
    """
    try:
        found = TimeRange(*(int(number) for number in text.split(":")))
    except (ValueError, TypeError):
        found = None
    if found is None or not 1 <= found.low < found.high or not 1 <= found.draws <= MAX_T:
        raise ValueError(
            f"random_T is {text!r}; it must be LOW:HIGH with 1 <= LOW < HIGH, such as 1:6, or LOW:HIGH:DRAWS with "
            f"DRAWS from 1 to {MAX_T}"
        )
    return found


def _unreadable(text: str, part: str) -> ValueError:
    where = "" if part == text else f" ({part!r} in it does not parse)"
    return ValueError(
        f"tit is {text!r}{where}; it must be T:epochs or T:epochs:lr for each stage, T and epochs whole numbers from 1 "
        f"and lr above 0 and at most {MAX_FACTOR:g}, separated by commas, such as 2:300,6:50 or 2:300:1e-3,6:50:1e-4"
    )
