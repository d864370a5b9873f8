"""The bodies of requests: how large one may be, how long it may take to arrive, and how many bytes all may hold.

What a request holds counts from its first byte until it is answered, since it is in memory for so long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_SECONDS = 30.0  # that a body may take to arrive


@dataclass(frozen=True)
class Sizes:
    """The bytes that a request may hold, and all that are being read or answered together."""

    max_request: int
    max_total: int

    def __post_init__(self) -> None:
        if not 0 < self.max_request <= self.max_total:
            raise ValueError(
                f"all requests together must be allowed what one is, {self.max_request:,} bytes, got "
                f"{self.max_total:,}; raise --max-total-mb or lower --max-request-mb"
            )


class OverBudgetError(ValueError):
    """All requests together hold as many bytes as they may; try again later."""


class Budget:
    """The bytes that all requests of a server together may hold.

    Attributes:
        held: by those that are being read or answered now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0

    def share(self) -> Share:
        """What one request holds, given back when the block ends."""
        return Share(self)


class Share:
    """Bytes of a budget that one request holds."""

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

    def give_back(self) -> None:
        self._budget.held -= self._size
        self._size = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


class BodyLimit:
    """Reads the body of a request before the application does: within a size, a time and a budget."""

    def __init__(self, app: ASGIApp, max_bytes: int, budget: Budget) -> None:
        self.app, self.max_bytes, self.budget = app, max_bytes, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        with self.budget.share() as share:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._read(headers, receive, share)
            except _BodyRefusedError as refused:
                return await JSONResponse({"error": str(refused)}, refused.status)(scope, receive, send)
            except TimeoutError:
                message = f"the body took more than {BODY_SECONDS:g} s to arrive"
                return await JSONResponse({"error": message}, 408)(scope, receive, send)
            if body is not None:
                await self.app(scope, _replay(body, receive), send)
        return None

    async def _read(self, headers: dict[bytes, str], receive: Receive, share: Share) -> bytes | None:
        """The whole body; None if the client left before its end. A body that is refused is thrown away as it comes: a
        client that is still sending when the connection closes would not see the answer."""
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise _BodyRefusedError(415, "compressed bodies are not read here; send them as they are")
        parts: list[bytes] = []
        size, more = 0, True
        refused: _BodyRefusedError | None = None
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if refused is None:
                parts.append(part)
                refused = self._refusal(size, len(part), share)
            if refused is not None:
                parts.clear()
                share.give_back()
            more = message.get("more_body", False)
        if size > self.max_bytes:
            wanted = f"a request may hold at most {self.max_bytes:,} bytes, got {size:,}"
            raise _BodyRefusedError(413, f"{wanted}; --max-request-mb sets the server's limit")
        if refused is not None:
            raise refused
        return b"".join(parts)

    def _refusal(self, size: int, added: int, share: Share) -> _BodyRefusedError | None:
        """Why a body of which `size` bytes came, the last `added` just now, is not kept."""
        if size > self.max_bytes:
            return _BodyRefusedError(413, "")  # its message needs the whole size
        try:
            share.add(added)
        except OverBudgetError as error:
            return _BodyRefusedError(503, str(error))
        return None


class _BodyRefusedError(ValueError):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A body that was read already, for the application to read; then what else the client says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
