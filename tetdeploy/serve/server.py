"""The inference server: HTTP on uvicorn and gRPC on grpc.aio, from start to a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn

import grpc
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tetdeploy.engine import Engine
from tetdeploy.serve.bodies import BodyLimit, Budget, Sizes
from tetdeploy.serve.errors import names_something
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.models import Bounds, ServedModel, step_energy_pj
from tetdeploy.serve.protocol import Models, OpenInferenceModel
from tetdeploy.serve.rest import application
from tetdeploy.serve.rpc import Inferences, grpc_server
from tetdeploy.serve.scheduler import GRACE_SECONDS, Limits
from tetdeploy.system.signals import handled, terminations

logger = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep a connection idle, or they may ask at the moment it is closed
# In which a server that is to stop still says so to who asks. Closing cancels gRPC calls (grpc/grpc#41785) and resets
# HTTP connections that come at that moment, so clients are to have gone by then.
LEAVING_SECONDS = 0.3
CALL_SECONDS = 1.0  # that a call of the engine may run on after the grace; nothing can end it but the process


@dataclass(frozen=True)
class Address:
    """Where a server listens. A port of 0 is any free one."""

    host: str
    http_port: int
    grpc_port: int

    def __post_init__(self) -> None:
        if not self.host:  # sockets take it for every interface, and it is what an unset variable leaves
            raise ValueError("--host is empty; name an interface, or :: for all of them")

    def at(self, port: int) -> str:
        """`127.0.0.1:8080`, `[::1]:8080`."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


async def serve(
    engines: dict[str, Engine],
    address: Address,
    limits: Limits,
    bounds: Bounds,
    *,
    sizes: Sizes,
    threads: int | None,
    announce: Callable[[str, str], None],
) -> int:
    """Serve models, by name, until SIGINT, SIGTERM or SIGHUP; then finish what was taken. The process ends here where
    a call of an engine runs on after the grace.

    Args:
        threads: what the engines were made with, for the engine that counts operations.
        announce: told the HTTP and the gRPC address once both are open.

    Returns:
        The requests that were cut off: GRACE_SECONDS did not suffice for them.

    Raises:
        OSError: an address cannot be listened to, or `announce` cannot say so.
    """
    asyncio.get_running_loop().set_exception_handler(_LoopErrors())
    metrics, models = Metrics(), []
    for name, engine in engines.items():
        served = ServedModel(name, engine, limits, bounds, metrics.on_call(name, step_energy_pj(engine, threads)))
        metrics.watch(served)
        models.append(OpenInferenceModel(served))
        await asyncio.sleep(0)  # for a Ctrl-C until now to end it here, and not as gRPC starts, which would complain
    named = Models(models)
    budget = Budget(sizes.max_total)
    with _stop_signal() as stop, _listening(address) as listener:
        inferences = Inferences(named, metrics, sizes, budget)
        limit = BodyLimit(application(named, metrics, sizes), sizes.max_request, budget)
        server, rpc = _http_server(limit), grpc_server(named, inferences, sizes)
        grpc_port = await _start_grpc(rpc, address, listener.getsockname()[0])
        http = asyncio.create_task(server.serve([listener]))
        expiry = asyncio.create_task(_expire([model.served for model in models], bounds.sequence_timeout))
        try:
            announce(address.at(listener.getsockname()[1]), address.at(grpc_port))
            await stop.wait()
        finally:
            for model in models:
                model.ready = False
                model.served.scheduler.hurry()
            await asyncio.sleep(LEAVING_SECONDS)
            limit.stop()  # what is half sent now would be refused when it is here
            server.should_exit = True
            end = asyncio.get_running_loop().time() + GRACE_SECONDS + CALL_SECONDS
            cut_off = sum(await asyncio.gather(_stop_http(server, http), _stop_grpc(rpc, inferences)))
            expiry.cancel()
            # What still waits has nobody to answer: requests that were cut off, steps whose client has left.
            await _drain(models, end, cut_off)
        return cut_off


async def _stop_http(server: uvicorn.Server, http: asyncio.Task[None]) -> int:
    """How many requests were cut off when the grace was over; by then they have been told so."""
    await http
    cut_off, unread = set(server.server_state.tasks), len(server.server_state.connections)
    if cut_off:
        await asyncio.wait(cut_off, timeout=1)
    return max(len(cut_off), unread)  # the end of an answer may still wait for its client to read


async def _stop_grpc(server: grpc.aio.Server, inferences: Inferences) -> int:
    """How many calls were cut off when the grace was over."""
    stopping = asyncio.ensure_future(server.stop(GRACE_SECONDS + 1))  # a shorter one later counts
    await asyncio.wait([stopping], timeout=GRACE_SECONDS)
    # Within the grace there is none, though handlers of calls that gRPC cancelled may still be about to end. After it
    # there is one at least: an answer that is not running any more, and whose client has not read it.
    cut_off, inferences.stopping = 0 if stopping.done() else max(inferences.running, 1), True
    await asyncio.gather(server.stop(None), stopping)
    return cut_off


async def _drain(models: list[OpenInferenceModel], end: float, cut_off: int) -> None:
    """Wait for the calls that run until `end`, and CALL_SECONDS at least, then leave: a thread has no other end."""
    loop = asyncio.get_running_loop()
    drains = {model.name: loop.create_task(model.served.scheduler.drain()) for model in models}
    await asyncio.wait(drains.values(), timeout=max(end - loop.time(), CALL_SECONDS))
    if running := [name for name, drain in drains.items() if not drain.done()]:
        logger.error(
            "stopped in the middle of a call of %s; %d of the requests taken could not be answered in time",
            *(" and of ".join(running), cut_off),
        )
        logging.shutdown()
        os._exit(1)


@contextlib.contextmanager
def _stop_signal() -> Iterator[asyncio.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set. A SIGINT after that ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def set_stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop.set)
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    with handled(set_stop, signal.SIGINT, *terminations()):  # Windows' loops take no handlers
        yield stop


async def _expire(models: list[ServedModel], timeout: float) -> NoReturn:
    while True:
        await asyncio.sleep(_expiry_period(timeout))
        for model in models:
            await model.expire()


def _expiry_period(timeout: float) -> float:
    """Seconds between two looks for sequences that were idle for `timeout`."""
    return max(0.01, min(1.0, timeout / 4))


class _LoopErrors:
    """Says once a second, in a line, that no connection can be accepted; asyncio would, with a traceback each, 2,048
    times. It tries again after a second, as often, of which nothing is said where the listener has been closed."""

    def __init__(self) -> None:
        self._said = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context["message"]:
            return None  # 2,048 tracebacks would fill a pipe that nobody reads, and the server would wait for ever
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            return loop.default_exception_handler(context)
        if loop.time() - self._said >= 0.9:
            self._said = loop.time()
            logger.error("no connection can be accepted: %s; allow more (ulimit -n, LimitNOFILE=)", error.strerror)
        return None


def _listening(address: Address) -> socket.socket:
    """A socket for HTTP. `::` is every interface, of IPv4 too; of IPv4 alone where the machine has nothing else."""
    host, every = address.host, address.host == "::"
    if every and not socket.has_dualstack_ipv6():
        logger.warning("this machine has no IPv6, so --host :: listens to IPv4 only, as 0.0.0.0 does")
        host, every = "0.0.0.0", False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, address.http_port), family=family, dualstack_ipv6=every)
    except OSError as error:
        where, reason = address.at(address.http_port), error.strerror or error
        raise OSError(f"cannot listen on {where}: {reason}; choose another --http-port or --host") from error
    # asyncio does so only for sockets that were made with IPPROTO_TCP; without it an answer waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: there is gRPC to stop too, and queues to empty."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _H11(H11Protocol):
    """Says nothing of upgrades, which are not offered: uvicorn would advise to install libraries for WebSockets. Of a
    connection that was reset it keeps nothing: uvicorn's timer would hold its last request for KEEP_ALIVE_SECONDS."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def _unsupported_upgrade_warning(self, *_: Any) -> None:
        pass


def _http_server(app: ASGIApp) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=_H11,  # the other one takes the body of a request with `Upgrade: h2c` for a request of its own
        ws="none",
        lifespan="off",
        log_config=None,  # as everything else here
        log_level="warning",
        access_log=False,
        workers=1,  # or $WEB_CONCURRENCY is read, which is for other servers and need not be a number
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )
    logging.getLogger("uvicorn.error").addFilter(names_something)
    return _Uvicorn(config)


async def _start_grpc(server: grpc.aio.Server, address: Address, host: str) -> int:
    """Let it listen where HTTP does: a name can be of several addresses. Gives the port."""
    where = address.at(address.grpc_port)
    try:
        port: int = server.add_insecure_port(replace(address, host=host).at(address.grpc_port))
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {where}, which may be in use or not be allowed; choose another --grpc-port or --host"
        ) from error
    await server.start()
    return port
