"""Batches, queues and sequences by themselves: no engine, no transport, and where time matters no clock but ours."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Coroutine, Hashable, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetdeploy.serve.scheduler import (
    CallFailedError,
    Limits,
    QueueFullError,
    Request,
    Scheduler,
    StoppingError,
    Waiting,
)
from tetdeploy.serve.sequences import LostSequenceError, Sequences, Step, TooManySequencesError, UnknownSequenceError

R = TypeVar("R")
PATIENCE = 60  # seconds before a test that hangs fails


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    async def with_patience() -> R:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(with_patience())


class Worker:
    """A model that doubles numbers, notes its calls, and waits in each until it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.calls: list[tuple[Hashable, list[Any]]] = []
        self.entered = threading.Event()
        self.free = threading.Event()
        if not held:
            self.free.set()

    def __call__(self, key: Hashable, payloads: list[int]) -> list[int]:
        self.calls.append((key, payloads))
        self.entered.set()
        assert self.free.wait(PATIENCE)
        return [2 * payload for payload in payloads]

    async def busy(self) -> None:
        """Until a call has begun."""
        await asyncio.get_running_loop().run_in_executor(None, self.entered.wait, PATIENCE)


def waiting(limits: Limits, *requests: tuple[Hashable, str, float], order: bool = False) -> Waiting[str, str]:
    """Requests `(key, payload, arrived)` of one image each; with `order`, those of one letter follow one another."""
    loop = asyncio.new_event_loop()
    made: Waiting[str, str] = Waiting(limits)
    for key, payload, arrived in requests:
        made.add(key, [Request(payload, 1, arrived, loop.create_future(), payload[0] if order else None)])
    loop.close()
    return made


def taken(queue: Waiting[str, str], now: float) -> tuple[Hashable, str] | None:
    batch = queue.take(now)
    return None if batch is None else (batch[0], "".join(request.payload for request in batch[1]))


def test_a_batch_runs_when_it_is_full_or_its_oldest_request_has_waited() -> None:
    queue = waiting(Limits(max_batch=3, max_wait=5), ("T4", "a", 10.0), ("T4", "b", 12.0))
    assert queue.due() == 15.0
    assert taken(queue, 14.9) is None
    assert taken(queue, 15.0) == ("T4", "ab")
    assert queue.due() == math.inf
    full = waiting(Limits(max_batch=3, max_wait=5), *(("T4", name, 10.0) for name in "abcd"))
    assert taken(full, 10.0) == ("T4", "abc")
    assert taken(full, 10.0) is None and len(full) == 1
    assert taken(full, 15.0) == ("T4", "d")
    assert waiting(Limits(), ("T4", "a", 10.0)).due() == 10.0  # unless asked to, it waits for nobody


def test_a_client_that_left_fills_no_batch() -> None:
    loop, queue = asyncio.new_event_loop(), waiting(Limits(max_batch=2, max_wait=5))
    requests = [Request[str, str](name, 1, 10.0, loop.create_future()) for name in "abcd"]
    requests[0].answer.cancel()
    gone = Request[str, str]("z", 2, 9.0, loop.create_future())
    gone.answer.cancel()  # all that its key has: no call is made for it
    queue.add("T6", [gone])
    queue.add("T4", requests)
    loop.close()
    assert taken(queue, 10.0) == ("T4", "bc")
    assert taken(queue, 14.9) is None and queue.due() == 15.0
    assert taken(queue, 15.0) == ("T4", "d") and len(queue) == 0


def test_what_is_dropped_counts_no_more() -> None:
    loop, queue = asyncio.new_event_loop(), waiting(Limits(max_batch=2, max_wait=5))
    first, second = requests = [Request[str, str](name, 1, 10.0, loop.create_future()) for name in "ab"]
    loop.close()
    queue.add("T4", requests)
    for key in ("T4", "T4", "T6"):  # what is gone is let be
        queue.drop(key, first)
        assert len(queue) == 1 and queue.due() == 15.0
    queue.drop("T4", second)
    assert len(queue) == 0 and queue.due() == math.inf


def test_sizes_fill_a_batch_and_the_key_that_waited_longest_is_due_first() -> None:
    loop, queue = asyncio.new_event_loop(), waiting(Limits(max_batch=4, max_wait=5), ("T6", "z", 12.0))
    queue.add("T4", [Request[str, str]("a", 3, 10.0, loop.create_future())])
    assert queue.due() == 15.0 and taken(queue, 14.9) is None
    queue.add("T4", [Request[str, str]("b", 1, 11.0, loop.create_future())])
    loop.close()
    assert taken(queue, 11.0) == ("T4", "ab")
    assert queue.due() == 17.0


def test_only_requests_of_one_key_share_a_call() -> None:
    queue = waiting(Limits(max_batch=8, max_wait=0), ("T4", "a", 0), ("T6", "b", 0), ("T4", "c", 0))
    assert [taken(queue, 1) for _ in range(3)] == [("T4", "ac"), ("T6", "b"), None]


def test_a_rare_key_does_not_starve_behind_a_busy_one() -> None:
    queue = waiting(Limits(max_batch=2, max_wait=0), *(("busy", name, 0) for name in "abcdef"), ("rare", "z", 1))
    assert [taken(queue, 1) for _ in range(4)] == [("busy", "ab"), ("rare", "z"), ("busy", "cd"), ("busy", "ef")]


def test_requests_that_follow_one_another_never_share_a_call() -> None:
    queue = waiting(Limits(max_batch=8, max_wait=0), *(("steps", name, 0) for name in "aabacb"), order=True)
    assert [taken(queue, 1) for _ in range(4)] == [("steps", "abc"), ("steps", "ab"), ("steps", "a"), None]


def test_what_must_wait_for_another_call_stays_before_what_came_later() -> None:
    steps = (("steps", name, 0) for name in ("a1", "a2", "b1", "a3"))
    queue = waiting(Limits(max_batch=2, max_wait=0), *steps, order=True)
    assert [taken(queue, 1) for _ in range(3)] == [("steps", "a1b1"), ("steps", "a2"), ("steps", "a3")]


def test_a_large_request_is_neither_split_nor_overtaken() -> None:
    async def scenario() -> list[tuple[Hashable, list[int]]]:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=4, max_wait=0))
        first = asyncio.create_task(scheduler.submit("T4", [0]))
        await worker.busy()
        tasks = [asyncio.create_task(scheduler.submit("T4", [k], size=size)) for k, size in enumerate([2, 3, 1, 1], 1)]
        await asyncio.sleep(0)
        worker.free.set()
        assert await asyncio.gather(first, *tasks) == [[0], [2], [4], [6], [8]]
        with pytest.raises(ValueError, match="at most 4 images, got 5"):
            await scheduler.submit("T4", [9], size=5)
        await scheduler.drain()
        return worker.calls

    assert run(scenario()) == [("T4", [0]), ("T4", [1]), ("T4", [2, 3]), ("T4", [4])]


def test_concurrent_requests_share_a_call_within_the_wait() -> None:
    async def scenario() -> list[tuple[Hashable, list[int]]]:
        worker = Worker()
        scheduler = Scheduler(worker, Limits(max_batch=3, max_wait=60))
        answers = await asyncio.gather(*(scheduler.submit("T4", [k]) for k in range(3)))
        assert answers == [[0], [2], [4]]
        await scheduler.drain()
        return worker.calls

    assert run(scenario()) == [("T4", [0, 1, 2])]


def test_a_lone_request_runs_after_the_wait() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(Worker(), Limits(max_batch=8, max_wait=0.01))
        assert await scheduler.submit("T4", [21]) == [42]
        await scheduler.drain()

    run(scenario())


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    async def scenario() -> None:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=1, max_wait=0, queue=2))
        kept = [asyncio.create_task(scheduler.submit("T4", [0]))]
        await worker.busy()
        kept.append(asyncio.create_task(scheduler.submit("T4", [1])))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):  # all of a request's payloads or none
            await scheduler.submit("T4", [2, 3])
        kept.append(asyncio.create_task(scheduler.submit("T4", [2])))
        await asyncio.sleep(0)
        assert scheduler.waiting == 2
        with pytest.raises(QueueFullError, match="2 requests wait already and the queue holds 2"):
            await scheduler.submit("T4", [3])
        with pytest.raises(QueueFullError):
            scheduler.check_room(1)
        worker.free.set()
        assert await asyncio.gather(*kept) == [[0], [2], [4]]
        with pytest.raises(ValueError, match="at most 2 steps, as many as the queue holds, got 3") as never:
            await scheduler.submit("T4", [4, 5, 6])
        assert not isinstance(never.value, QueueFullError)  # which says: try again later
        assert scheduler.waiting == 0
        await scheduler.drain()

    run(scenario())


def test_requests_of_clients_that_left_take_no_room_in_the_queue() -> None:
    async def scenario() -> list[tuple[Hashable, list[int]]]:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=2, max_wait=0, queue=3))
        first = asyncio.create_task(scheduler.submit("T4", [0]))
        await worker.busy()
        gone = [asyncio.create_task(scheduler.submit("T4", [k])) for k in (1, 2, 3)]
        await asyncio.sleep(0)
        waits = weakref.ref(scheduler._waiting._lanes["T4"].requests[0])
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        await asyncio.sleep(0)
        assert scheduler.waiting == 0
        del gone, task
        assert waits() is None  # which held a body
        stay = [asyncio.create_task(scheduler.submit("T4", [k])) for k in (4, 5, 6)]
        await asyncio.sleep(0)
        stay.pop(1).cancel()
        await asyncio.sleep(0)
        worker.free.set()
        assert await asyncio.gather(first, *stay) == [[0], [8], [12]]
        await scheduler.drain()
        return worker.calls

    assert run(scenario()) == [("T4", [0]), ("T4", [4, 6])]


@pytest.mark.parametrize(("order", "calls"), [(None, [[0], [2]]), ("sequence", [[0], [1], [2]])])
def test_requests_of_clients_that_left_are_dropped_unless_others_follow_them(
    order: object, calls: list[list[int]]
) -> None:
    async def scenario() -> list[tuple[Hashable, list[int]]]:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=4, max_wait=0))
        running = asyncio.create_task(scheduler.submit("T4", [0]))
        await worker.busy()
        gone, stays = (asyncio.create_task(scheduler.submit("T4", [k], order=order)) for k in (1, 2))
        await asyncio.sleep(0)
        running.cancel()  # in the call already: it runs, and nobody hears the answer
        gone.cancel()
        await asyncio.sleep(0)
        worker.free.set()
        assert await stays == [4]
        await scheduler.drain()
        return worker.calls

    assert run(scenario()) == [("T4", payloads) for payloads in calls]


def test_a_failed_call_fails_its_own_requests_only() -> None:
    def fails_on_three(key: Hashable, payloads: list[int]) -> list[int | Exception]:
        if 3 in payloads:
            raise OSError("out of memory")
        return [LostSequenceError("lost") if payload == 5 else payload for payload in payloads]

    async def scenario() -> list[Any]:
        scheduler = Scheduler(fails_on_three, Limits(max_batch=2, max_wait=60))
        tasks = [scheduler.submit("T4", [k]) for k in (1, 2, 3, 4, 5, 6)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.drain()
        return found

    one, two, three, four, five, six = run(scenario())
    assert (one, two, six) == ([1], [2], [6])
    assert isinstance(three, CallFailedError) and isinstance(four, CallFailedError)
    assert "out of memory" in str(three)
    assert isinstance(five, LostSequenceError)


def test_what_runs_between_two_calls_waits_for_the_first() -> None:
    async def scenario() -> None:
        called: list[threading.Thread] = []
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_wait=0))
        first = asyncio.create_task(scheduler.submit("T4", [1]))
        await worker.busy()
        between = asyncio.create_task(scheduler.on_thread(lambda: called.append(threading.current_thread())))
        await asyncio.wait([between], timeout=0.05)
        assert not called
        worker.free.set()
        await between
        assert await first == [2]
        await scheduler.drain()
        assert not called[0].is_alive()

    run(scenario())


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_leaves_during_a_call_takes_no_answer_from_the_others(fails: bool) -> None:
    async def scenario() -> None:
        worker = Worker(held=True)

        def call(key: Hashable, payloads: list[int]) -> list[int]:
            answers = worker(key, payloads)
            if fails:
                raise OSError("out of memory")
            return answers

        scheduler = Scheduler(call, Limits(max_batch=2, max_wait=60))
        gone, stays = (asyncio.create_task(scheduler.submit("T4", [k])) for k in (1, 2))
        await worker.busy()
        gone.cancel()
        await asyncio.sleep(0)
        worker.free.set()
        (outcome,) = await asyncio.gather(stays, return_exceptions=True)
        assert isinstance(outcome, CallFailedError) if fails else outcome == [4]
        await scheduler.drain()

    run(scenario())


@pytest.mark.parametrize("order", [None, "a sequence"])
def test_a_call_that_fails_is_logged_once_even_if_no_client_is_left(
    order: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        worker = Worker(held=True)

        def call(key: Hashable, payloads: list[int]) -> list[int]:
            worker(key, payloads)
            raise MemoryError("40 GiB")

        scheduler = Scheduler(call, Limits(max_batch=2, max_wait=60))
        gone = [asyncio.create_task(scheduler.submit("T4", [1], order=order and f"{order} {k}")) for k in range(2)]
        await worker.busy()
        for client in gone:
            client.cancel()
        await asyncio.wait(gone)
        worker.free.set()
        await scheduler.drain()
        gc.collect()  # of a future whose error nobody took asyncio speaks when it is gone

    run(scenario())
    gc.collect()
    assert caplog.messages == ["the model failed: 40 GiB"] and "MemoryError: 40 GiB" in caplog.text


def test_draining_finishes_the_call_that_runs_and_takes_no_more() -> None:
    async def scenario() -> None:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=1, max_wait=0))
        first = asyncio.create_task(scheduler.submit("T4", [1]))
        await worker.busy()
        drain = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await scheduler.submit("T4", [3])
        worker.free.set()
        await drain
        assert first.result() == [2]

    run(scenario())


def test_draining_lets_go_what_nobody_waits_for() -> None:
    """Steps of a sequence run although their client has left, but not when the server is about to end."""

    async def scenario() -> list[tuple[Hashable, list[int]]]:
        worker = Worker(held=True)
        scheduler = Scheduler(worker, Limits(max_batch=1, max_wait=0))
        steps = asyncio.create_task(scheduler.submit("steps", list(range(60)), order="sequence"))
        await worker.busy()
        steps.cancel()
        await asyncio.sleep(0)
        assert scheduler.waiting == 59
        drain = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        worker.free.set()
        await drain
        assert scheduler.waiting == 0
        return worker.calls

    assert run(scenario()) == [("steps", [0])]


def test_a_server_about_to_stop_does_not_wait_for_a_fuller_batch() -> None:
    async def scenario() -> None:
        scheduler = Scheduler(Worker(), Limits(max_batch=8, max_wait=3600))
        task = asyncio.create_task(scheduler.submit("T4", [1]))
        await asyncio.sleep(0)
        scheduler.hurry()
        assert await task == [2]
        await scheduler.drain()

    run(scenario())


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"queue": 0}, {"max_wait": -1.0}, {"max_wait": math.nan}, {"max_wait": math.inf}]
)
def test_limits_that_nothing_could_pass_are_refused(wrong: dict[str, Any]) -> None:
    Limits(max_batch=1, queue=1, max_wait=0.0)
    with pytest.raises(ValueError, match="must be at least 1"):
        Limits(**wrong)


class Pool:
    """Streams whose state is all that was pushed to them."""

    def __init__(self) -> None:
        self.pushed: dict[int, list[int | None]] = {}
        self.made = 0
        self.batches: list[int] = []

    def open(self) -> int:
        self.made += 1
        self.pushed[self.made] = []
        return self.made

    def push(self, frames: Mapping[int, int | None]) -> dict[int, tuple[int | None, ...]]:
        if -1 in frames.values():
            raise OSError("out of memory")
        self.batches.append(len(frames))
        for stream, frame in frames.items():
            self.pushed[stream].append(frame)
        return {stream: tuple(self.pushed[stream]) for stream in frames}

    def close(self, id: int) -> None:
        del self.pushed[id]


def admit(
    sequences: Sequences[int, Any], id: int, *frames: int, start: bool = False, end: bool = False, now: float = 0
) -> list[Step[int]]:
    return sequences.admit(id, list(frames), start=start, end=end, now=now)


# What clients may do, in any order: (sequence, number of frames, start, end).
actions = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans()), max_size=40)


@settings(max_examples=60)
@given(actions=actions, max_batch=st.integers(1, 4), pause=st.lists(st.booleans(), min_size=40, max_size=40))
def test_sequences_never_see_one_anothers_state(
    actions: list[tuple[int, int, bool, bool]], max_batch: int, pause: list[bool]
) -> None:
    pool = Pool()

    async def scenario() -> None:
        sequences = Sequences(pool, timeout=60, limit=10)
        scheduler = Scheduler(lambda _, steps: sequences.run(steps), Limits(max_batch, 0, queue=1000))
        expected: list[list[tuple[int, ...]]] = []
        tasks = []
        said: dict[int, list[int]] = defaultdict(list)
        unique = 0
        for (id, count, start, end), rest in zip(actions, pause, strict=False):
            frames = list(range(unique, unique + count))
            unique += count
            if not start and id not in said:
                with pytest.raises(UnknownSequenceError):
                    admit(sequences, id, *frames, start=start, end=end)
                continue
            before = [] if start else said[id]
            said[id] = before + frames
            expected.append([tuple(before + frames[: k + 1]) for k in range(count)])
            steps = admit(sequences, id, *frames, start=start, end=end)
            tasks.append(asyncio.create_task(scheduler.submit("steps", steps, order=steps[0].sequence.order)))
            if end:
                del said[id]
            if rest:
                await asyncio.sleep(0)
        assert await asyncio.gather(*tasks) == expected
        assert len(sequences) == len(said) == len(pool.pushed)
        await scheduler.drain()

    run(scenario())


def test_steps_of_several_sequences_share_a_call() -> None:
    pool = Pool()
    sequences = Sequences(pool, timeout=60, limit=10)
    steps = [admit(sequences, id, 10 * id, 10 * id + 1, start=True) for id in (1, 2, 3)]
    assert sequences.run([step for step, _ in steps]) == [(10,), (20,), (30,)]
    assert sequences.run([step for _, step in steps]) == [(10, 11), (20, 21), (30, 31)]
    assert pool.batches == [3, 3]


def test_a_sequence_that_was_never_begun_or_has_ended_is_unknown() -> None:
    sequences = Sequences(Pool(), timeout=60, limit=10)
    with pytest.raises(UnknownSequenceError, match="sequence 7 is not open"):
        admit(sequences, 7, 0)
    sequences.run(admit(sequences, 7, 0, start=True, end=True))
    with pytest.raises(UnknownSequenceError, match="has ended"):
        admit(sequences, 7, 1, end=True)
    assert not sequences.pool.pushed  # type: ignore[attr-defined]


def test_idle_sequences_expire_and_busy_ones_do_not() -> None:
    pool = Pool()
    sequences = Sequences(pool, timeout=60, limit=10)
    sequences.run(admit(sequences, 1, 0, start=True, now=100))
    waits = admit(sequences, 2, 0, start=True, now=100)  # its step still waits
    assert sequences.expire(159) == []
    idle = sequences.expire(160)
    sequences.close(idle)
    assert len(idle) == 1 and len(sequences) == 1 and not pool.pushed
    with pytest.raises(UnknownSequenceError):
        admit(sequences, 1, 1, now=161)
    sequences.run(waits)
    waits[0].sequence.unanswered = 1  # the answer is on its way
    assert sequences.expire(500) == []
    assert sequences.run(admit(sequences, 2, 1, now=161)) == [(0, 1)]


def test_open_sequences_are_bounded() -> None:
    sequences = Sequences(Pool(), timeout=60, limit=2)
    for id in (1, 2):
        admit(sequences, id, 0, start=True)
    with pytest.raises(TooManySequencesError, match="2 sequences are open"):
        admit(sequences, 3, 0, start=True)
    admit(sequences, 2, 0, start=True)  # begins anew
    admit(sequences, 2, 0, end=True)
    admit(sequences, 3, 0, start=True)


def test_a_sequence_begun_anew_outlives_the_failure_of_what_it_replaces() -> None:
    pool = Pool()
    sequences = Sequences(pool, timeout=60, limit=1)
    sequences.run(admit(sequences, 1, 0, start=True))
    (failing,) = admit(sequences, 1, -1)
    (anew,) = admit(sequences, 1, 5, start=True)
    assert anew.sequence.order is failing.sequence.order  # so that no call holds both
    with pytest.raises(OSError, match="out of memory"):
        sequences.run([failing])
    sequences.forget(1, failing.sequence)
    assert sequences.run([anew]) == [(5,)]
    assert len(sequences) == len(pool.pushed) == 1
    assert sequences.run(admit(sequences, 1, 6, end=True)) == [(5, 6)]
    assert not pool.pushed


def test_a_failed_step_ends_the_sequences_of_its_call() -> None:
    pool = Pool()
    sequences = Sequences(pool, timeout=60, limit=10)
    bystander = admit(sequences, 1, 0, 1, start=True)
    failing = admit(sequences, 2, 0, -1, 2, start=True)
    sequences.run([bystander[0], failing[0]])
    with pytest.raises(OSError, match="out of memory"):
        sequences.run([failing[1]])
    seen, lost = sequences.run([bystander[1], failing[2]])
    assert seen == (0, 1) and isinstance(lost, LostSequenceError)
    with pytest.raises(UnknownSequenceError):
        admit(sequences, 2, 3)  # whether or not its client was there to be told
    assert len(pool.pushed) == len(sequences) == 1


def test_what_a_failed_call_was_to_replace_is_closed() -> None:
    class Full(Pool):
        def open(self) -> int:
            if self.made == 2:
                raise MemoryError
            return super().open()

    pool = Full()
    sequences = Sequences(pool, timeout=60, limit=10)
    sequences.run([admit(sequences, id, 0, start=True)[0] for id in (1, 2)])
    with pytest.raises(MemoryError):
        sequences.run([admit(sequences, id, 0, start=True)[0] for id in (1, 2)])
    assert not pool.pushed
    sequences.expire(0)
    assert len(sequences) == 0


def test_a_sequence_of_which_steps_still_wait_does_not_expire() -> None:
    sequences: Any = Sequences(Pool(), timeout=1, limit=1)
    steps = sequences.admit("a", [1, 2, 3], start=True, end=False, now=0)
    for step in steps:
        assert sequences.expire(9) == []
        sequences.run([step])
    assert sequences.expire(9) == [steps[0].sequence]
