"""Requests that continue one another: each sequence has a LIF state of its own, kept in a pool of streams.

Admission happens where requests arrive, and decides at once whether a request is in its place; steps run later, on the
engine's thread, many sequences in one call. Knows no engine and no transport: the pool may be any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

F = TypeVar("F")
A = TypeVar("A")
F_contra = TypeVar("F_contra", contravariant=True)
A_co = TypeVar("A_co", covariant=True)


class UnknownSequenceError(ValueError):
    """No such sequence is open."""


class TooManySequencesError(ValueError):
    """As many sequences are open as may be."""


class LostSequenceError(RuntimeError):
    """An earlier step of the sequence failed, and its state is lost."""


class Pool(Protocol[F_contra, A_co]):
    """Streams that run together, such as `tetdeploy.streams.StreamPool`."""

    def open(self) -> int: ...
    def push(self, frames: Mapping[int, F_contra | None]) -> Mapping[int, A_co]: ...
    def close(self, id: int) -> None: ...


@dataclass(eq=False)
class Sequence:
    """One sequence.

    Attributes:
        used: when its last request came or was answered.
        order: its steps run one after the other, and after those of the sequence that it begins anew, if there is one.
        unanswered: its requests that wait for their answer.
        admitted, done: steps admitted, and steps that ran. Only the engine's thread writes `done`, `stream` and `lost`.
        stream: its id in the pool while it has a state there.
        lost: a step failed, and the state is gone.
    """

    used: float
    order: object = field(default_factory=object)
    unanswered: int = 0
    admitted: int = 0
    done: int = 0
    stream: int | None = None
    lost: bool = False


@dataclass(frozen=True)
class Step(Generic[F]):
    """One step of a sequence. A frame of None shows the last image again. The first step of a sequence that takes the
    place of another, `before`, ends that."""

    sequence: Sequence
    frame: F | None
    start: bool = False
    end: bool = False
    before: Sequence | None = None


class Sequences(Generic[F, A]):
    """The open sequences of one model.

    Args:
        timeout: seconds after its last answer in which a sequence ends.
        limit: how many may be open.
    """

    def __init__(self, pool: Pool[F, A], *, timeout: float, limit: int) -> None:
        self.pool, self.timeout, self.limit = pool, timeout, limit
        self._open: dict[int | str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, id: int | str, frames: list[F | None], *, start: bool, end: bool, now: float) -> list[Step[F]]:
        """The steps of a request: `frames` to push, in order. `start` on an open sequence puts a new one in its place,
        which a failure of the earlier one's steps that still wait does not touch.

        Raises:
            UnknownSequenceError: it is not open and this is not its start.
            TooManySequencesError: there is no room for one more.
        """
        before = self._open.get(id)
        if before is not None and before.lost:  # and its client may have left before it was told
            del self._open[id]
            before = None
        sequence = self._begin(id, before, start, now) if start or before is None else before
        if end:
            del self._open[id]
        sequence.used = now
        sequence.admitted += len(frames)
        last = len(frames) - 1
        return [
            Step(sequence, frame, start and k == 0, end and k == last, before if start and k == 0 else None)
            for k, frame in enumerate(frames)
        ]

    def _begin(self, id: int | str, before: Sequence | None, start: bool, now: float) -> Sequence:
        if not start:
            raise UnknownSequenceError(
                f"sequence {id!r} is not open: it never started, has ended, failed, or was idle for more "
                f"than {self.timeout:g} s; begin one with sequence_start"
            )
        if before is None and len(self._open) >= self.limit:
            raise TooManySequencesError(f"{self.limit} sequences are open, and no more may be; end one first")
        self._open[id] = Sequence(now) if before is None else Sequence(now, order=before.order)
        return self._open[id]

    def forget(self, id: int | str, sequence: Sequence) -> None:
        """End a sequence of which a step failed."""
        if self._open.get(id) is sequence:
            del self._open[id]

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences that were idle for too long; `close` them on the engine's thread."""
        idle = {id: s for id, s in self._open.items() if s.lost or self._is_idle(s, now)}
        for id in idle:
            del self._open[id]
        return list(idle.values())

    def _is_idle(self, sequence: Sequence, now: float) -> bool:
        """Not while steps run, whether or not their client is still there, nor while their answer is on its way."""
        runs = sequence.unanswered > 0 or sequence.done < sequence.admitted
        return not runs and sequence.used + self.timeout <= now

    def run(self, steps: list[Step[F]]) -> list[A | LostSequenceError]:
        """Run one step of each of several sequences, in one call of the pool."""
        try:
            self.close(step.before for step in steps if step.before is not None)
            for step in steps:
                if step.start:
                    step.sequence.stream = self.pool.open()
            frames = {step.sequence.stream: step.frame for step in steps if step.sequence.stream is not None}
            answers = self.pool.push(frames) if frames else {}
        except Exception:
            for step in steps:
                step.sequence.lost = True
            self.close(step.sequence for step in steps)
            raise
        finally:
            for step in steps:
                step.sequence.done += 1
        lost = LostSequenceError("an earlier step of this sequence failed and its state is lost; start it anew")
        found = [lost if (id := step.sequence.stream) is None else answers[id] for step in steps]
        self.close(step.sequence for step in steps if step.end)
        return found

    def close(self, sequences: Iterable[Sequence]) -> None:
        """Free what sequences keep in the pool."""
        for sequence in sequences:
            if sequence.stream is not None:
                self.pool.close(sequence.stream)
                sequence.stream = None
