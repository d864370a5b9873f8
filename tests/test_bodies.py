"""The bodies of requests, read beside each other by a server that is no more than this."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the extra serve")
from starlette.types import Message, Receive, Scope, Send

from tetdeploy.serve import bodies
from tetdeploy.serve.bodies import LARGE, BodyLimit, Budget, OverBudgetError, Share


class Client:
    """A request whose body comes when the test sends it. Its answer waits where the client does not `read`."""

    def __init__(self, limit: BodyLimit, method: str = "POST", headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self._coming: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: list[Message] = []
        self.read = asyncio.Event()
        self.read.set()
        scope: Scope = {"type": "http", "method": method, "path": "/", "headers": list(headers)}
        self._call = asyncio.create_task(limit(scope, self._coming.get, self._send))

    async def _send(self, message: Message) -> None:
        await self.read.wait()
        self._sent.append(message)

    async def send(self, body: bytes, *, more: bool = False) -> None:
        self._coming.put_nowait({"type": "http.request", "body": body, "more_body": more})
        await self._settled()

    async def leave(self) -> None:
        self._coming.put_nowait({"type": "http.disconnect"})
        await self._settled()

    def cancel(self) -> None:
        self._call.cancel()

    async def _settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def answer(self) -> tuple[int, str]:
        await asyncio.wait_for(self._call, 60)
        status, body = self._sent
        return status["status"], json.loads(body["body"]).get("error", "")


class App:
    """Keeps a request until it is let go, then answers with its length."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.lengths: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.lengths.append(len((await receive())["body"]))
        await self.let_go.wait()
        await bodies.JSONResponse({})(scope, receive, send)


def running(
    test: Callable[[BodyLimit, App], Any], *, max_bytes: int = 100, max_total: int = 250, app: type[App] = App
) -> None:
    """Run `test`, after which the budget must be whole."""

    async def run() -> None:
        made = app()
        limit = BodyLimit(made, max_bytes, Budget(max_total))
        await asyncio.wait_for(test(limit, made), 120)
        assert limit.budget.held == 0

    asyncio.run(run())


def test_half_bodies_together_hold_no_more_than_the_budget() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        app.let_go.set()
        slow = [Client(limit) for _ in range(3)]
        for client in slow:
            await client.send(bytes(80), more=True)
        assert limit.budget.held == 240
        late = Client(limit)
        await late.send(bytes(11))
        status, error = await late.answer()
        assert (status, "may hold 250 bytes and hold 240 already" in error) == (503, True)
        assert "--max-total-mb" in error
        await slow[0].leave()  # its bytes are free again
        again = Client(limit)
        await again.send(bytes(11))
        assert await again.answer() == (200, "")
        for client in slow[1:]:
            await client.send(bytes(20))
            assert await client.answer() == (200, "")
        assert app.lengths == [11, 100, 100]

    running(test)


def test_a_body_counts_until_its_answer_begins() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        clients = [Client(limit) for _ in range(2)]
        for client in clients:
            await client.send(bytes(100))
        refused = Client(limit)
        await refused.send(bytes(60))
        assert (await refused.answer())[0] == 503
        app.let_go.set()
        assert [await client.answer() for client in clients] == [(200, ""), (200, "")]

    running(test)


def test_what_is_refused_is_thrown_away_as_it_comes() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        large = Client(limit)
        await large.send(bytes(90), more=True)
        await large.send(bytes(90), more=True)
        assert limit.budget.held == 0
        await large.send(bytes(1000))
        status, error = await large.answer()
        assert (status, "at most 100 bytes, got 1,180" in error) == (413, True)
        over = [Client(limit) for _ in range(3)]
        for client in over:
            await client.send(bytes(90), more=True)
        assert limit.budget.held == 180  # the third holds nothing, and is told once it has sent all
        await over[2].send(bytes(10))
        assert (await over[2].answer())[0] == 503
        for client in over[:2]:
            await client.leave()

    running(test)


def test_a_client_that_asks_first_is_told_before_it_sends_too_much() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        asks = (b"expect", b"100-Continue")
        status, error = await Client(limit, headers=(asks, (b"content-length", b"101"))).answer()
        assert (status, "at most 100 bytes, got 101" in error) == (413, True)
        app.let_go.set()
        small = Client(limit, headers=(asks, (b"content-length", b"100")))
        await small.send(bytes(100))
        assert await small.answer() == (200, "")

    running(test)


def test_a_slow_body_gives_its_bytes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)

    async def test(limit: BodyLimit, app: App) -> None:
        client = Client(limit)
        await client.send(bytes(80), more=True)
        status, error = await client.answer()
        assert (status, error) == (408, "the body took more than 0.05 s to arrive")
        assert (b"connection", b"close") in client._sent[0]["headers"]  # its rest would be read as another request

    running(test)


def test_a_refused_body_that_keeps_coming_gets_its_refusal_when_the_time_is_up() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        large, over = Client(limit), Client(limit)
        await large.send(bytes(101), more=True)
        others = Share(limit.budget)
        others.add(200)
        await over.send(bytes(60), more=True)
        for arriving in limit._arriving:
            arriving.reschedule(0)  # the time is up
        status, error = await large.answer()
        assert (status, "at most 100 bytes, got 101" in error) == (413, True)
        status, error = await over.answer()
        assert (status, "may hold 250 bytes and hold 200 already" in error) == (503, True)
        others.give_back()

    running(test)


def test_on_a_stop_what_is_half_sent_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 600.0)  # longer than a client here waits

    async def test(limit: BodyLimit, app: App) -> None:
        whole, half, large, late = (Client(limit) for _ in range(4))
        await whole.send(bytes(10))
        await half.send(bytes(80), more=True)
        await large.send(bytes(101), more=True)
        limit.stop()
        await late.send(bytes(20), more=True)
        for client in (half, late):
            status, error = await client.answer()
            assert (status, "the server is shutting down" in error) == (503, True)
            assert (b"connection", b"close") in client._sent[0]["headers"]
        assert (await large.answer())[0] == 413
        app.let_go.set()
        again = Client(limit)
        await again.send(bytes(30))
        assert [await client.answer() for client in (whole, again)] == [(200, "")] * 2

    running(test)


def test_a_stop_at_the_moment_when_a_body_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        loop, passed = asyncio.get_running_loop(), 0.0
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + passed)
        client = Client(limit)
        await client.send(bytes(80), more=True)
        errors: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda loop, context: errors.append(context))
        loop.call_at(loop.time() + bodies.BODY_SECONDS, limit.stop)  # in the turn in which the time is up, after it
        passed = bodies.BODY_SECONDS + 1
        assert ((await client.answer())[0], errors) == (503, [])

    running(test)


def test_an_answer_that_nobody_reads_holds_nothing() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        client = Client(limit)
        client.read.clear()
        await client.send(bytes(100))
        assert limit.budget.held == 100
        app.let_go.set()
        await client._settled()
        assert limit.budget.held == 0
        client.read.set()
        assert await client.answer() == (200, "")

    running(test)


class Counting(App):
    """Answers with how many hold the body beside itself."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        assert bytes(body) == b"whole"
        alone = bytes(5)
        self.lengths.append(sys.getrefcount(body) - sys.getrefcount(alone))
        await bodies.JSONResponse({})(scope, receive, send)


@pytest.mark.parametrize("parts", [[b"whole"], [b"wh", b"", b"ole"]])
def test_the_application_alone_holds_a_body(parts: list[bytes]) -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        client = Client(limit)
        for k, part in enumerate(parts):
            await client.send(part, more=k < len(parts) - 1)
        assert await client.answer() == (200, "")
        assert app.lengths == [0]

    running(test, app=Counting)


def test_a_compressed_body_is_refused_before_it_comes() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        for more in ((), ((b"content-encoding", b"identity"),)):
            status, error = await Client(limit, headers=((b"content-encoding", b"gzip"), *more)).answer()
            assert (status, "compressed bodies are not read here" in error) == (415, True)
        app.let_go.set()
        plain = Client(limit, headers=((b"content-encoding", b"identity"),))
        await plain.send(bytes(5))
        assert await plain.answer() == (200, "")
        assert app.lengths == [5]

    running(test)


def test_only_posts_are_read_here() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        app.let_go.set()
        client = Client(limit, "GET")
        await client.send(bytes(400), more=True)
        assert await client.answer() == (200, "")
        assert (app.lengths, limit.budget.held) == ([400], 0)  # as it came, and without a share

    running(test)


def test_a_body_of_no_bytes() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        app.let_go.set()
        client = Client(limit)
        await client.send(b"")
        assert await client.answer() == (200, "")
        assert app.lengths == [0]

    running(test)


class Failing(App):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")


def test_an_application_that_raises_gives_its_bytes_back() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        client = Client(limit)
        await client.send(bytes(100))
        with pytest.raises(RuntimeError, match="a bug"):
            await client.answer()

    running(test, app=Failing)


@pytest.mark.parametrize("more", [True, False], ids=["half sent", "being answered"])
def test_a_cancelled_call_gives_its_bytes_back_and_is_answered(more: bool) -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        client = Client(limit)
        await client.send(bytes(100), more=more)
        assert limit.budget.held == 100
        client.cancel()
        status, error = await client.answer()
        assert (status, "is shutting down and could not finish this in time" in error) == (503, True)

    running(test)


def test_a_call_that_is_cancelled_while_its_answer_is_read_says_nothing_more() -> None:
    async def test(limit: BodyLimit, app: App) -> None:
        app.let_go.set()
        client = Client(limit)
        client.read.clear()
        await client.send(bytes(100))
        client.cancel()
        await asyncio.wait_for(client._call, 60)
        assert not client._sent

    running(test)


@pytest.mark.parametrize("size", [LARGE, LARGE + 1])
def test_probes_are_answered_between_large_bodies(size: int) -> None:
    happened: list[str] = []

    class Parser(App):
        async def __call__(self, *given: Any) -> None:
            happened.append("body")
            await super().__call__(*given)

    async def probe() -> None:
        for _ in range(10):
            happened.append("probe")
            await asyncio.sleep(0)

    async def test(limit: BodyLimit, app: App) -> None:
        app.let_go.set()
        clients = [Client(limit) for _ in range(3)]
        await asyncio.gather(*(client.send(bytes(size)) for client in clients), probe())
        for client in clients:
            assert await client.answer() == (200, "")

    running(test, max_bytes=size, max_total=3 * size, app=Parser)
    assert ("body body" in " ".join(happened)) is (size == LARGE)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), max_size=40))
def test_a_budget_is_the_sum_of_its_shares(added: list[tuple[int, int]]) -> None:
    budget, sizes = Budget(100), [0] * 5
    shares = [Share(budget) for _ in sizes]
    for who, size in added:
        if sum(sizes) + size <= 100:
            shares[who].add(size)
            sizes[who] += size
        else:
            with pytest.raises(OverBudgetError, match="may hold 100 bytes"):
                shares[who].add(size)
        assert budget.held == sum(sizes)
    for share in shares:
        with share:
            pass
    assert budget.held == 0
