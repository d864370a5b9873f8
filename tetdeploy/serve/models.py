"""A served model: an engine with its thread, its queue and its sequences. No transport here.

One thread runs the engine, which uses as many cores as it was given: two calls at once would only share them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tetdeploy.agreement import load_reference
from tetdeploy.early_exit import Exit, load_rule
from tetdeploy.energy import Operations, layers_of
from tetdeploy.engine import Array, Engine, Result
from tetdeploy.engine_stream import StepResult
from tetdeploy.serve.scheduler import Limits, Scheduler
from tetdeploy.serve.sequences import LostSequenceError, Sequences
from tetdeploy.steps import MAX_T
from tetdeploy.streams import StreamPool

logger = logging.getLogger(__name__)

_NUM_MEASURED = 32  # reference images that a step's energy is estimated from
STEPS = "steps"  # the scheduler's key of all sequences; other keys are tuples


@dataclass(frozen=True)
class Bounds:
    """What a served model lets requests ask for.

    Attributes:
        max_T: most steps of one request.
        sequence_timeout: seconds after its last answer in which a sequence ends.
        max_sequences: sequences that may be open at once.
        max_state: bytes of their state, by which there may be fewer; one may always be open.
    """

    max_T: int
    sequence_timeout: float
    max_sequences: int
    max_state: int = 500_000_000


class ServedModel:
    """An engine that answers many requests at once. Belongs to one event loop.

    Args:
        name: what requests call it.
        on_call: told of every call of the engine, on its thread: the steps that each image took, `[N]`.

    Attributes:
        scheduler: its queue.
        sequences: those open; None if the model cannot step.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        limits: Limits,
        bounds: Bounds,
        on_call: Callable[[NDArray[np.int64]], None] = lambda steps: None,
    ) -> None:
        if engine.max_batch is not None:  # a TensorRT engine refuses a call of more than it was built for
            limits = replace(limits, max_batch=min(limits.max_batch, engine.max_batch))
        self.name, self.engine, self.bounds, self._on_call = name, engine, bounds, on_call
        self.scheduler: Scheduler[Any, Any] = Scheduler(self._run, limits)
        self.sequences: Sequences[Array, StepResult] | None = None
        if engine.layout == "step":
            pool = StreamPool(engine, max_batch=limits.max_batch)
            limit = max(1, min(bounds.max_sequences, bounds.max_state // pool.stream_nbytes))
            self.sequences = Sequences(pool, timeout=bounds.sequence_timeout, limit=limit)
        self._rule = _calibrated(engine) if engine.layout == "step" else None
        for steps, asked in ((engine.own_T, ""), (self._rule[1] if self._rule else 0, ", asked for early exit,")):
            if engine.encoding == "direct" and steps > bounds.max_T:
                text = "%s%s takes %d steps unless a request says T, and --max-T %d refuses that"
                logger.warning(text, name, asked, steps, bounds.max_T)

    async def infer(self, x: Array, *, T: int | None = None, early_exit: bool | float = False) -> Result:
        """Run images or frames from u = 0, together with other requests of the same T, shape and early exit.

        Args:
            x, T: as `Engine.run` takes them; images by the threshold of `tetdeploy calibrate` run its T by default.
            early_exit: stop each image when its answer is certain: by the threshold of `tetdeploy calibrate` (True), or
                at this confidence.

        Raises:
            ValueError: the engine cannot run this, or not in one batch; there is no such threshold.
            QueueFullError, StoppingError, CallFailedError: as `Scheduler.submit`.
        """
        x = self.engine.check_input(x)
        if T is None and early_exit is True and self._rule is not None and self.engine.encoding == "direct":
            T = self._rule[1]
        if T is not None and T > MAX_T and not self.engine.is_fixed and self.engine.encoding == "direct":
            self._check_T(T, whole=True)  # before the engine, whose remedy is one of Python's
        T = self._check_T(self.engine.check_T(T, x), whole=True)
        key = (T, x.shape[1:], self._exit(early_exit, T))
        [answer] = await self.scheduler.submit(key, [x], size=len(x))
        assert isinstance(answer, Result)
        return answer

    async def push(
        self, id: int | str, x: Array | None, *, T: int | None = None, start: bool = False, end: bool = False
    ) -> Result:
        """Run the next steps of a sequence, together with those of others.

        Args:
            x: an image `[1, C, H, W]`, shown for T steps (by default one); None goes on with the last one. Or frames
                `[1, T, C, H, W]`, each for a step.
            start, end: whether the sequence begins with the first, and ends with the last of these steps.

        Returns:
            `logits [1, K]`, their mean since the sequence began; `per_step [1, T, K]` of these steps; `steps [1]` since
            it began.

        Raises:
            ValueError: the model is of another layout than step, or x does not fit.
            UnknownSequenceError, TooManySequencesError: as `Sequences.admit`.
            LostSequenceError: an earlier step failed.
            QueueFullError, StoppingError, CallFailedError: as `Scheduler.submit`.
        """
        if self.sequences is None:
            raise ValueError(
                f"{self.name} has layout {self.engine.layout} and keeps no state between requests; "
                "sequences need a model of tetdeploy export --layout step"
            )
        frames = self._frames(x, T, start)
        self.scheduler.check_room(len(frames))  # before the sequence takes note of them
        time = asyncio.get_running_loop().time
        steps = self.sequences.admit(id, frames, start=start, end=end, now=time())
        sequence = steps[0].sequence
        sequence.unanswered += 1
        try:
            answers: list[StepResult] = await self.scheduler.submit(STEPS, steps, order=sequence.order)
        except RuntimeError:  # CallFailedError, LostSequenceError
            self.sequences.forget(id, sequence)
            raise
        finally:
            sequence.unanswered -= 1
            sequence.used = time()  # idle from here on, however long the answer took
        per_step = np.stack([answer.step_logits for answer in answers])
        return Result(answers[-1].logits[None], per_step[None], np.array([answers[-1].t]))

    async def expire(self) -> None:
        """End the sequences that were idle for too long."""
        if self.sequences is not None and (idle := self.sequences.expire(asyncio.get_running_loop().time())):
            await self.scheduler.on_thread(partial(self.sequences.close, idle))

    def _run(self, key: Hashable, payloads: list[Any]) -> list[Result] | list[StepResult | LostSequenceError]:
        """One call of the engine."""
        if key == STEPS:
            assert self.sequences is not None
            answers = self.sequences.run(payloads)
            if taken := sum(isinstance(answer, StepResult) for answer in answers):  # those of lost sequences were not
                self._on_call(np.ones(taken, np.int64))
            return answers
        assert isinstance(key, tuple)
        T, _, exit = key
        result = self.engine.run(payloads[0] if len(payloads) == 1 else np.concatenate(payloads), T, exit=exit)
        self._on_call(result.steps)
        ends = np.cumsum([len(x) for x in payloads])
        return [_part(result, slice(end - len(x), end)) for x, end in zip(payloads, ends, strict=True)]

    def _frames(self, x: Array | None, T: int | None, start: bool) -> list[Array | None]:
        """What each step of a sequence is shown, `[C, H, W]`, or None for the last image again."""
        direct = self.engine.encoding == "direct"
        if x is None:
            if not direct or start:
                raise ValueError("only a directly encoded sequence goes on without an image, and not at its start")
            return [None] * self._check_T(1 if T is None else T)
        x = self.engine.check_input(x)
        if len(x) != 1:
            raise ValueError(f"a sequence is one stream: send a batch of 1, got {len(x)}")
        if direct:
            return [x[0], *[None] * (self._check_T(1 if T is None else T) - 1)]
        return list(x[0, : self._check_T(self.engine.check_T(T, x))])

    def _check_T(self, T: int, *, whole: bool = False) -> int:
        """`whole`: of a request that is no part of a sequence. It keeps each step of its images, for MAX_T at most."""
        bounded = whole and self.engine.encoding == "direct"
        most = min(self.bounds.max_T, MAX_T) if bounded else self.bounds.max_T
        if not 1 <= T <= most:
            raised = "" if bounded and T > MAX_T else "--max-T lets a server run more, and "
            kept = "a sequence" if self.sequences is not None else "a sequence of a model of layout step"
            raise ValueError(f"T must lie in 1..{most}, got {T}; {raised}{kept} takes more in several requests")
        return T

    def _exit(self, wanted: bool | float, T: int) -> Exit | None:
        if wanted is False:
            return None
        self.engine.check_early_exit()
        if wanted is not True:
            return Exit(wanted)
        if self._rule is None:
            raise ValueError(
                f"{self.name} had no threshold when the server started: it takes tetdeploy calibrate, and a new start; "
                "or send early_exit=0.9, say"
            )
        rule, calibrated_T = self._rule
        if calibrated_T > T:
            raise ValueError(
                f"the threshold of {self.name} was found for T={calibrated_T} and says nothing of T={T}; send no T, or "
                "more steps"
            )
        return rule


def _calibrated(engine: Engine) -> tuple[Exit, int] | None:
    """The rule of `tetdeploy calibrate` for a model and the T that it was found for, if there is one. Read once: the
    file may be overwritten with another model, whose rule is none for this one."""
    try:
        return load_rule(engine.path, sha256=None if engine.path.suffix == ".engine" else engine.sha256)[:2]
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("%s has no threshold for early_exit: %s", engine.path, error)
        return None


def _part(result: Result, rows: slice) -> Result:
    return Result(result.logits[rows], result.per_step[rows], result.steps[rows])


def step_energy_pj(engine: Engine, threads: int | None) -> float | None:
    """An estimate of what one step costs: the mean over the first reference images beside the model, run for the T of
    the training (of an unrolled graph, its own), by the convention `paper`. None where there are none, or on a GPU. By
    an engine of its own, since the counting graph is not needed again. A reference that cannot be used is warned of."""
    if engine.device != "cpu":
        return None
    counting = Engine(engine.path, runtime=engine.runtime, threads=threads, native=False)
    try:
        reference = load_reference(engine)
        x = reference.x[:_NUM_MEASURED]
        _, counts = counting.count(x, reference.T)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        logger.warning("the energy of %s is not counted: %s", engine.path, error)
        return None
    operations = Operations(layers_of(engine.metadata))
    operations.add(counts, len(x), reference.T)
    return operations.at(reference.T).energy_pj / reference.T
