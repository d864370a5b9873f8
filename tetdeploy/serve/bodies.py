"""The bodies of requests: how large one may be, how long it may take to arrive, and how many bytes all may hold.

What a request holds counts from its first byte until its answer begins, since it is in memory for so long, once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_SECONDS = 30.0  # that a body may take to arrive
LARGE = 2**16  # bytes of a request; smaller ones of JSON are parsed within some milliseconds
CUT_OFF = "the server is shutting down and could not finish this in time; ask another one, or later"


@dataclass(frozen=True)
class Sizes:
    """Bytes: of a request, of its part that is read number by number (JSON, or `contents` over gRPC), which takes up to
    some ninety times as many while it is read, and of all requests that are being read or answered together."""

    max_request: int
    max_json: int
    max_total: int

    def __post_init__(self) -> None:
        if not 0 < self.max_request <= self.max_total:
            raise ValueError(
                f"all requests together must be allowed what one is, {self.max_request:,} bytes, got "
                f"{self.max_total:,}; raise --max-total-mb or lower --max-request-mb"
            )

    def check_listed(self, size: int) -> None:
        """Refuse a request of which so many bytes would have to be read number by number.

        Raises:
            TooLargeError: they are more than `max_json`.
        """
        if size > self.max_json:
            raise TooLargeError(
                f"a request may hold at most {self.max_json:,} bytes of numbers one by one (JSON, or contents over "
                f"gRPC), got {size:,}: send raw bytes, as clients do by default, or fewer images; --max-json-mb sets "
                "the server's limit"
            )


class TooLargeError(ValueError):
    """More of a request would have to be read number by number than may be."""


class OverBudgetError(ValueError):
    """All requests together hold as many bytes as they may; try again later."""


class Budget:
    """The bytes that all requests of a server together may hold.

    Attributes:
        held: by those that are being read or answered now.
        next_large: the lock of the large request that is parsed next.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0
        self.next_large = asyncio.Lock()


class Share:
    """Bytes of a budget that one request holds, given back when the block ends."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._size = budget, 0

    def add(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            OverBudgetError: that is more than the budget has left.
        """
        budget = self._budget
        if budget.held + size > budget.max_bytes:
            raise OverBudgetError(
                f"all requests together may hold {budget.max_bytes:,} bytes and hold {budget.held:,} already; try "
                "again later (--max-total-mb sets the server's limit)"
            )
        self._size += size
        budget.held += size

    async def turn(self) -> None:
        """Before a whole request is parsed, which nothing interrupts: a turn of the event loop with no other large one,
        so that probes are answered between two that arrived together."""
        if self._size > LARGE:
            async with self._budget.next_large:
                await asyncio.sleep(0)

    def give_back(self) -> None:
        self._budget.held -= self._size
        self._size = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class BodyLimit:
    """Reads the body of a request before the application does: within a size, a time and a budget."""

    def __init__(self, app: ASGIApp, max_bytes: int, budget: Budget) -> None:
        self.app, self.max_bytes, self.budget = app, max_bytes, budget
        self._seconds, self._arriving = BODY_SECONDS, set[asyncio.Timeout]()

    def stop(self) -> None:
        """Wait for no body any more, nor for the rest of one."""
        self._seconds = 0
        for arriving in self._arriving:
            if not arriving.expired():
                arriving.reschedule(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        with Share(self.budget) as share:
            answer = _Answer(share, send)
            try:
                await self._call(scope, receive, answer, share)
            except asyncio.CancelledError:  # the time to finish is over: uvicorn would say 500, and log a traceback
                if not answer.began:
                    await JSONResponse({"error": CUT_OFF}, 503)(scope, receive, answer)

    async def _call(self, scope: Scope, receive: Receive, answer: _Answer, share: Share) -> None:
        try:
            replay = await self._read(scope, receive, share)
        except HTTPException as refused:
            told = {"error": refused.detail}
            return await JSONResponse(told, refused.status_code, refused.headers)(scope, receive, answer)
        if replay is not None:
            await share.turn()
            await self.app(scope, replay, answer)
        return None

    async def _read(self, scope: Scope, receive: Receive, share: Share) -> Receive | None:
        """The whole body, to be received; None if the client left before its end. A body that is refused is thrown away
        as it comes: a client that is still sending when the connection closes would not see the answer."""
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in scope["headers"]):
            raise HTTPException(415, "compressed bodies are not read here; send them as they are")
        headers = dict(scope["headers"])
        announced = int(headers.get(b"content-length", b"0"))  # a number, or the server would have refused it
        if announced > self.max_bytes and headers.get(b"expect", b"").lower() == b"100-continue":
            raise self._too_large(announced)  # the client waits to hear whether it may send that
        body, size, more = bytearray(), 0, True  # a list of small parts would hold more than their bytes
        refused: HTTPException | None = None
        try:
            async with self._in_time():
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    refused = refused or self._refusal(size, len(part), share)
                    if refused is None:
                        body += part
                    else:
                        body.clear()
                        share.give_back()
        except TimeoutError:
            late = (408, f"the body took more than {self._seconds:g} s to arrive") if self._seconds else (503, CUT_OFF)
            refused = refused or HTTPException(*late, {"Connection": "close"})
        if size > self.max_bytes:
            refused = self._too_large(size)
        if refused is not None:
            body.clear()  # the error's traceback holds this frame while it is answered
            raise refused
        return _replay(body, receive)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        async with asyncio.timeout(self._seconds) as arriving:
            self._arriving.add(arriving)
            try:
                yield
            finally:
                self._arriving.discard(arriving)

    def _too_large(self, size: int) -> HTTPException:
        wanted = f"a request may hold at most {self.max_bytes:,} bytes, got {size:,}"
        return HTTPException(413, f"{wanted}; --max-request-mb sets the server's limit")

    def _refusal(self, size: int, added: int, share: Share) -> HTTPException | None:
        """Why a body of which `size` bytes came, the last `added` just now, is not kept."""
        if size > self.max_bytes:
            return HTTPException(413, "")  # its message needs the whole size
        try:
            share.add(added)
        except OverBudgetError as error:
            return HTTPException(503, str(error))
        return None


def _replay(body: bytearray, receive: Receive) -> Receive:
    """A body that was read already, for the application to receive once and keep as long as it needs it; then what else
    the client says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _Answer:
    """Sends an answer, and gives the share back when it begins: the body is done with, and a client may take as long
    as it likes to read."""

    def __init__(self, share: Share, send: Send) -> None:
        self._share, self._send, self.began = share, send, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            self._share.give_back()
        await self._send(message)
