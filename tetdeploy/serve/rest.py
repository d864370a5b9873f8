"""The Open Inference Protocol v2 over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tetdeploy.serve.bodies import Sizes
from tetdeploy.serve.errors import CLIENT_LEFT, forget_frames, status_of
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.protocol import SERVER, Models, OpenInferenceModel, refuse_loading
from tetdeploy.serve.rest_messages import read_request, write_response
from tetdeploy.serve.scheduler import StoppingError

A = TypeVar("A")
_ENDPOINTS = "there are the endpoints of the Open Inference Protocol v2, /v2/models and /metrics"


def application(models: Models, metrics: Metrics, sizes: Sizes) -> Starlette:
    """The endpoints, as an ASGI application."""
    ends = _Endpoints(models, metrics, sizes)
    versions = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    routes = [
        Route("/v2", _about),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", ends.ready),
        Route("/v2/models", ends.models),
        *(Route(model, ends.model_metadata) for model in versions),
        *(Route(f"{model}/ready", ends.model_ready) for model in versions),
        *(Route(f"{model}/infer", ends.infer, methods=["POST"]) for model in versions),
        *(Route(f"/v2/repository/models/{{name}}/{what}", _load, methods=["POST"]) for what in ("load", "unload")),
        Route("/metrics", _metrics),
    ]
    # A handler of the application for Exception would have the error raised once more, and uvicorn log it once more.
    every = Middleware(ExceptionMiddleware, handlers={Exception: ends.failed})
    app = Starlette(routes=routes, middleware=[every], exception_handlers={HTTPException: ends.failed})
    app.router.redirect_slashes = False  # to http://, which behind a proxy with TLS leads out of it
    return app


class _Endpoints:
    """What is answered from the models and counted."""

    def __init__(self, models: Models, metrics: Metrics, sizes: Sizes) -> None:
        self._models, self._metrics, self._sizes = models, metrics, sizes

    async def ready(self, request: Request) -> Response:
        is_ready = self._models.ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"models": self._models.names})

    async def model_metadata(self, request: Request) -> Response:
        return JSONResponse(self._models.find(*_model(request)).metadata())

    async def model_ready(self, request: Request) -> Response:
        model = self._models.find(*_model(request))
        return JSONResponse({"name": model.name, "ready": model.ready}, 200 if model.ready else 503)

    async def infer(self, request: Request) -> Response:
        name, version = _model(request)
        model = self._models.running(name, version)
        started = time.perf_counter()
        response = await self._infer(request, model)
        self._metrics.seconds.labels(name).observe(time.perf_counter() - started)
        return response

    async def _infer(self, request: Request, model: OpenInferenceModel) -> Response:
        # BodyLimit gives the body as one message, of which request.body() would make a copy. Nothing here keeps it.
        given = read_request((await request.receive())["body"], request.headers, self._sizes)
        return write_response(model.name, given, await _unless_left(request, model.predict(given)))

    async def failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no such page, or another method
            asked = f"{request.method} {request.scope['path'][:100]}"
            status, message = error.status_code, f"{error.detail}: {asked}; {_ENDPOINTS}"
        else:
            status, _, message = status_of(error)
        if (model := request.path_params.get("name")) and request.scope["path"].endswith("/infer"):
            self._metrics.refuse(model, status)
        headers = getattr(error, "headers", None)  # of a 405: Allow
        if isinstance(error, StoppingError):  # a client that went on would find its connection reset
            headers = {"Connection": "close"}
        forget_frames(error)
        return JSONResponse({"error": message}, status, headers)


async def _unless_left(request: Request, answer: Coroutine[Any, Any, A]) -> A:
    """An answer, worked at for as long as its client listens.

    Raises:
        HTTPException: the client has left: 499, which only metrics see.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    leaving.add_done_callback(lambda _: work.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if not leaving.done():  # it is the server that cancels
            raise
        raise HTTPException(CLIENT_LEFT, "the client has left") from None
    finally:
        leaving.cancel()


async def _about(request: Request) -> Response:
    return JSONResponse(SERVER)


async def _live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def _load(request: Request) -> Response:
    refuse_loading()


async def _metrics(request: Request) -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _model(request: Request) -> tuple[str, str]:
    """The name and the version that a path holds; without one "", which is the only one there is."""
    return request.path_params["name"], request.path_params.get("version", "")
