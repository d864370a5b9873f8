"""Which requests run together, and when. Knows neither engines nor transports: only keys, sizes and a clock.

Requests of one key may share a call; their sizes add up to at most `max_batch`. A call starts as soon as the one worker
is free and either a key has `max_batch` waiting or its oldest request has waited `max_wait`. Keys whose turn has come
are served in rotation, so that none starves behind a busier one. Beyond `queue` waiting requests the next is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
GRACE_SECONDS = 30.0  # that requests may take to finish once a server is told to stop

P = TypeVar("P")
R = TypeVar("R")


class QueueFullError(ValueError):
    """As many requests wait as may; try again later."""


class StoppingError(ValueError):
    """The server finishes what it took and takes nothing more."""


class CallFailedError(RuntimeError):
    """A call of the worker raised; its requests have no answer. Why is logged."""


@dataclass(frozen=True)
class Limits:
    """What bounds a scheduler: `max_batch` and `queue` at least 1, `max_wait` in seconds; at 0 those requests share a
    call that come while another one runs."""

    max_batch: int = 64
    max_wait: float = 0.0
    queue: int = 256

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.queue < 1 or not 0 <= self.max_wait < math.inf:
            raise ValueError(f"max_batch and queue must be at least 1 and max_wait finite and not negative, got {self}")


@dataclass(eq=False)
class Request(Generic[P, R]):
    """One request that waits.

    Attributes:
        order: requests of equal `order` (not None) never share a call and run in order of arrival.
    """

    payload: P
    size: int
    arrived: float
    answer: asyncio.Future[R]
    order: object = None


@dataclass(eq=False)
class _Lane(Generic[P, R]):
    """The waiting requests of one key, oldest first, and their sizes' sum."""

    requests: deque[Request[P, R]]
    size: int = 0

    def due(self, limits: Limits) -> float:
        """When they may run."""
        return -math.inf if self.size >= limits.max_batch else self.requests[0].arrived + limits.max_wait

    def take(self, max_batch: int) -> list[Request[P, R]]:
        """The requests of the next call: in order of arrival, none whose client is gone, none that must come later."""
        taken: list[Request[P, R]] = []
        later: list[Request[P, R]] = []
        room = max_batch
        orders: set[object] = set()
        while self.requests and self.requests[0].size <= room:
            request = self.requests.popleft()
            if request.answer.cancelled():
                self.size -= request.size
            elif request.order is not None and request.order in orders:
                later.append(request)
            else:
                taken.append(request)
                orders.add(request.order)
                room -= request.size
                self.size -= request.size
        self.requests.extendleft(reversed(later))
        return taken


class Waiting(Generic[P, R]):
    """Requests that wait, by key. Keys take turns."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lanes: OrderedDict[Hashable, _Lane[P, R]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def check_room(self, count: int) -> None:
        """Raise QueueFullError if there is no room for so many now, ValueError if there never is."""
        if count > self.limits.queue:
            raise ValueError(
                f"a request may hold at most {self.limits.queue} steps, as many as the queue holds, got {count}; "
                "send several requests"
            )
        if self._count + count > self.limits.queue:
            raise QueueFullError(
                f"{self._count} requests wait already and the queue holds {self.limits.queue}; try again later"
            )

    def add(self, key: Hashable, requests: Sequence[Request[P, R]]) -> None:
        """Let requests wait, for which `check_room` has found room; all or none.

        Raises:
            ValueError: one is larger than a whole batch.
        """
        largest = max(request.size for request in requests)
        if largest > self.limits.max_batch:
            raise ValueError(
                f"a request may hold at most {self.limits.max_batch} images, got {largest}; send several requests"
            )
        lane = self._lanes.setdefault(key, _Lane(deque()))
        lane.requests.extend(requests)
        lane.size += sum(request.size for request in requests)
        self._count += len(requests)

    def drop(self, key: Hashable, request: Request[P, R]) -> None:
        """Let a request go whose client has left; nothing if a call has taken it already."""
        lane = self._lanes.get(key)
        if lane is None or request not in lane.requests:
            return
        lane.requests.remove(request)
        lane.size -= request.size
        self._count -= 1
        if not lane.requests:
            del self._lanes[key]

    def cancel(self) -> None:
        """Let everything go."""
        for lane in self._lanes.values():
            for request in lane.requests:
                request.answer.cancel()

    def due(self) -> float:
        """When the next call may start; infinity if nothing waits."""
        return min((lane.due(self.limits) for lane in self._lanes.values()), default=math.inf)

    def take(self, now: float) -> tuple[Hashable, list[Request[P, R]]] | None:
        """The requests of the next call and their key; None if none is due."""
        for key, lane in list(self._lanes.items()):
            if lane.due(self.limits) > now:
                continue
            before = len(lane.requests)
            taken = lane.take(self.limits.max_batch)
            self._count -= before - len(lane.requests)
            if lane.requests:
                self._lanes.move_to_end(key)
            else:
                del self._lanes[key]
            if taken:
                return key, taken
        return None


class Scheduler(Generic[P, R]):
    """Runs requests in batches on one thread.

    Args:
        run: what a call does: a key and its payloads to as many answers; an exception among them is raised to its
            caller alone. Called on the scheduler's thread.
    """

    def __init__(self, run: Callable[[Hashable, list[P]], Sequence[R | Exception]], limits: Limits) -> None:
        self._run = run
        self._waiting: Waiting[P, R] = Waiting(limits)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._call: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = self._hurry = False

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def check_room(self, count: int) -> None:
        """Whether `submit` would take so many payloads now; raises as it does."""
        if self._stopping:
            raise StoppingError("the server is shutting down; ask another one, or later")
        self._waiting.check_room(count)

    async def submit(self, key: Hashable, payloads: Sequence[P], *, size: int = 1, order: object = None) -> list[R]:
        """The answers to payloads of one request, each of `size`. With an `order` they run one after the other, even
        if the caller is cancelled; without one, payloads of a cancelled caller that still wait are dropped.

        Raises:
            QueueFullError: there is no room for all of them.
            StoppingError: after `drain`.
            CallFailedError: the call failed.
            ValueError: `size` is more than a batch holds, or there are more payloads than the queue holds.
        """
        self.check_room(len(payloads))
        loop = asyncio.get_running_loop()
        requests = [Request[P, R](p, size, loop.time(), loop.create_future(), order) for p in payloads]
        self._waiting.add(key, requests)
        for request in requests:
            request.answer.add_done_callback(partial(self._left, key, request))
        self._start()
        answers = [request.answer for request in requests]
        # Without a name: in a cycle with the traceback of its error it would keep this frame, and the payloads.
        if order is None:
            return await asyncio.gather(*answers)
        await asyncio.shield(asyncio.gather(*answers, return_exceptions=True))  # an error may have nobody to be told
        return [answer.result() for answer in answers]

    def _left(self, key: Hashable, request: Request[P, R], answer: asyncio.Future[R]) -> None:
        """A request has its answer, or its client has left and it takes no room in the queue any more."""
        if answer.cancelled():
            self._waiting.drop(key, request)

    async def on_thread(self, function: Callable[[], object]) -> None:
        """Run something between two calls."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def hurry(self) -> None:
        """From now on no request waits for others: the server is about to stop."""
        self._hurry = True
        self._start()

    async def drain(self) -> None:
        """Take no more, let go what waits, finish the call that runs, and end the thread."""
        self._stopping = True
        self._waiting.cancel()
        while self._call is not None:
            await asyncio.wait([self._call])
        self._thread.shutdown()

    def _start(self) -> None:
        """Start the next call if the worker is free and one is due; else look again when one will be."""
        if self._call is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        batch = self._waiting.take(math.inf if self._hurry else loop.time())
        if batch is not None:
            self._call = loop.create_task(self._answer(*batch))
        elif len(self._waiting):
            self._timer = loop.call_at(self._waiting.due(), self._start)

    async def _answer(self, key: Hashable, requests: list[Request[P, R]]) -> None:
        """One call. The next one starts before its answers are handed out: the worker should not idle meanwhile."""
        payloads = [request.payload for request in requests]
        outcome: Sequence[R | Exception] | CallFailedError
        try:
            outcome = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, key, payloads)
        except Exception as error:
            outcome = CallFailedError(f"the model failed: {error}")
            logger.error("%s", outcome, exc_info=error)  # here, as all its clients may have left
        self._call = None
        self._start()
        if isinstance(outcome, CallFailedError):
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(outcome)
        else:
            for request, answer in zip(requests, outcome, strict=True):
                if request.answer.done():
                    continue
                if isinstance(answer, Exception):
                    request.answer.set_exception(answer)
                else:
                    request.answer.set_result(answer)
