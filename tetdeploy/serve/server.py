"""The inference server: KServe's REST and gRPC endpoints on uvicorn and grpc.aio, with our models behind them.

`kserve.ModelServer` itself is not used: it binds to all interfaces, lets clients unload models, and logs a traceback
for every bad request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse
from grpc_interceptor import AsyncExceptionToStatusInterceptor
from kserve import ModelRepository
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tetdeploy.engine import Engine
from tetdeploy.serve.bodies import BodyLimit, Budget, OverBudgetError, Sizes
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.models import Bounds, ServedModel, step_energy_pj
from tetdeploy.serve.protocol import OpenInferenceModel, TensorDataPlane, malformed
from tetdeploy.serve.scheduler import CallFailedError, Limits, QueueFullError, StoppingError
from tetdeploy.serve.sequences import LostSequenceError, TooManySequencesError, UnknownSequenceError

logger = logging.getLogger(__name__)

# What an error is to a client: the first class that fits. Anything else is our bug, and says nothing to clients.
STATUS: dict[type[Exception], tuple[int, grpc.StatusCode]] = {
    OverBudgetError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    QueueFullError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    TooManySequencesError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    StoppingError: (503, grpc.StatusCode.UNAVAILABLE),
    ModelNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    UnknownSequenceError: (404, grpc.StatusCode.NOT_FOUND),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    LostSequenceError: (500, grpc.StatusCode.ABORTED),
    CallFailedError: (500, grpc.StatusCode.INTERNAL),
    NotImplementedError: (400, grpc.StatusCode.INVALID_ARGUMENT),  # KServe's, for versions of a model
    InvalidInput: (400, grpc.StatusCode.INVALID_ARGUMENT),
}
GRACE_SECONDS = 30.0  # that requests may take to finish once the server is told to stop


@dataclass(frozen=True)
class Address:
    """Where a server listens. A port of 0 is any free one."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081


def serve(
    engines: dict[str, Engine],
    address: Address,
    limits: Limits,
    bounds: Bounds,
    *,
    sizes: Sizes,
    announce: Callable[[str, str], None],
) -> None:
    """Serve models, by name, until SIGINT or SIGTERM; then finish what was taken.

    Args:
        announce: told the HTTP and the gRPC address once both are open.

    Raises:
        OSError: an address cannot be listened to.
    """
    asyncio.run(_serve(engines, address, limits, bounds, sizes, announce))


async def _serve(
    engines: dict[str, Engine],
    address: Address,
    limits: Limits,
    bounds: Bounds,
    sizes: Sizes,
    announce: Callable[[str, str], None],
) -> None:
    metrics, models, repository = Metrics(), [], ModelRepository()
    for name, engine in engines.items():
        served = ServedModel(name, engine, limits, bounds, metrics.on_call(name, _step_energy_pj(engine)))
        metrics.watch(served)
        models.append(OpenInferenceModel(served, metrics))
        repository.update(models[-1])
    plane = TensorDataPlane(model_registry=repository)
    stop, budget = _stop_signal(), Budget(sizes.max_total)
    with _listening(address.host, address.http_port) as listener:
        rpc, grpc_port = await _start_grpc(plane, metrics, address, sizes.max_request, budget)
        server = _http_server(BodyLimit(_application(plane, metrics), sizes.max_request, budget))
        http = asyncio.create_task(server.serve([listener]))
        expiry = asyncio.create_task(_expire([model.served for model in models], bounds.sequence_timeout))
        announce(f"{address.host}:{listener.getsockname()[1]}", f"{address.host}:{grpc_port}")
        await stop.wait()
        for model in models:
            model.ready = False
            model.served.scheduler.hurry()
        server.should_exit = True
        await asyncio.gather(http, rpc.stop(GRACE_SECONDS))
        expiry.cancel()
        await asyncio.gather(*(model.served.scheduler.drain() for model in models))


def _step_energy_pj(engine: Engine) -> float | None:
    """By an engine of its own: the counting graph is not needed again."""
    return step_energy_pj(Engine(engine.path)) if engine.device == "cpu" else None


def _stop_signal() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set. A SIGINT after that ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def set_stop() -> None:
        stop.set()
        loop.add_signal_handler(signal.SIGINT, os._exit, 128 + signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, set_stop)
    return stop


async def _expire(models: list[ServedModel], timeout: float) -> NoReturn:
    while True:
        await asyncio.sleep(min(1.0, timeout / 4))
        for model in models:
            await model.expire()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host}:{port}: {reason}; choose another --http-port") from error
    # asyncio does so only for sockets that were made with IPPROTO_TCP; without it an answer waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: there is gRPC to stop too, and queues to empty."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(app: ASGIApp) -> uvicorn.Server:
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=int(GRACE_SECONDS)
    )
    return _Uvicorn(config)


async def _start_grpc(
    plane: TensorDataPlane, metrics: Metrics, address: Address, max_request_bytes: int, budget: Budget
) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(
        interceptors=[_Calls(metrics, budget)],
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(InferenceServicer(plane, _FixedModels()), server)
    host = f"[{address.host}]" if ":" in address.host else address.host
    try:
        port = server.add_insecure_port(f"{host}:{address.grpc_port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{address.grpc_port}; choose another --grpc-port") from error
    await server.start()
    return server, port


class _FixedModels:
    """KServe's repository extension, refused: the models are those that the server was started with."""

    async def load(self, model_name: str) -> NoReturn:
        raise InvalidInput("models are neither loaded nor unloaded while the server runs; name them when you start it")

    unload = load


def status_of(error: Exception) -> tuple[int, grpc.StatusCode, str]:
    """HTTP status, gRPC status and message for an error."""
    for kind, (http, rpc) in STATUS.items():
        if isinstance(error, kind):
            if http == 500:
                logger.error("%s", error, exc_info=error.__cause__)
            return http, rpc, str(error)
    logger.error("a bug of the server", exc_info=error)
    return 500, grpc.StatusCode.INTERNAL, "internal error"


class _Calls(AsyncExceptionToStatusInterceptor):
    """What all calls of gRPC have in common: the budget that they share with HTTP, and errors as statuses. A message
    counts once it is here: gRPC says nothing of those on their way."""

    def __init__(self, metrics: Metrics, budget: Budget) -> None:
        super().__init__()
        self._metrics, self._budget = metrics, budget

    async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
        async def within_budget(request: Any, context: Any) -> Any:
            with self._budget.share() as share:
                share.add(request.ByteSize())
                return await method(request, context)

        return await super().intercept(within_budget, request_or_iterator, context, method_name)

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str
    ) -> NoReturn:
        http, rpc, message = status_of(ex)
        if method_name.endswith("/ModelInfer"):
            self._metrics.refuse(request_or_iterator.model_name, http)
        await context.abort(rpc, message)
        raise AssertionError("abort raises")


def _application(plane: TensorDataPlane, metrics: Metrics) -> ASGIApp:
    app = FastAPI(title="tetdeploy", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/metrics", metrics_handler, methods=["GET"])
    register_v2_endpoints(app, plane, _FixedModels())

    def refused(request: Request, status: int, message: str) -> JSONResponse:
        if (model := request.path_params.get("model_name")) and request.method == "POST":
            metrics.refuse(model, status)
        return JSONResponse({"error": message}, status)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        status, _, message = status_of(error)
        return refused(request, status, message)

    async def unreadable(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refused(request, 400, malformed(error.errors()))

    async def no_such_page(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return refused(request, error.status_code, error.detail)

    for kind in (*STATUS, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(HTTPException, no_such_page)
    return app
