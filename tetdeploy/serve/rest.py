"""The Open Inference Protocol v2 over HTTP.

These endpoints are ours: KServe's, through FastAPI and pydantic, take longer than a small network.
"""

from __future__ import annotations

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tetdeploy.serve.errors import status_of
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.protocol import JSON_LENGTH, TensorDataPlane, refuse_loading


def application(plane: TensorDataPlane, metrics: Metrics) -> Starlette:
    """The endpoints, as an ASGI application."""

    async def about(request: Request) -> Response:
        return JSONResponse(plane.metadata())

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        is_ready = await plane.ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def models(request: Request) -> Response:
        return JSONResponse({"models": list(plane.model_registry.get_models())})

    async def model_metadata(request: Request) -> Response:
        return JSONResponse(await plane.model_metadata(*_model(request)))

    async def model_ready(request: Request) -> Response:
        is_ready = await plane.model_ready(*_model(request))
        return JSONResponse({"name": _model(request)[0], "ready": is_ready}, 200 if is_ready else 503)

    async def infer(request: Request) -> Response:
        name, version = _model(request)
        model = plane.running(name, version)
        # BodyLimit gives the body as one message, of which request.body() would make a copy. Nothing here keeps it.
        answer = await model.predict(
            plane.decode_inference_request((await request.receive())["body"], request.headers, name)
        )
        content, json_length = answer.to_rest()
        if json_length is None:
            return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
        headers = {JSON_LENGTH: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def load(request: Request) -> Response:
        refuse_loading()

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no such page, or another method
            status, message = error.status_code, error.detail
        else:
            status, _, message = status_of(error)
        if (model := request.path_params.get("name")) and request.method == "POST":
            metrics.refuse(model, status)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold the body
        return JSONResponse({"error": message}, status, getattr(error, "headers", None))  # of a 405: Allow

    versions = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    routes = [
        Route("/v2", about),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models", models),
        *(Route(model, model_metadata) for model in versions),
        *(Route(f"{model}/ready", model_ready) for model in versions),
        *(Route(f"{model}/infer", infer, methods=["POST"]) for model in versions),
        *(Route(f"/v2/repository/models/{{name}}/{what}", load, methods=["POST"]) for what in ("load", "unload")),
        Route("/metrics", show_metrics),
    ]
    # A handler of the application for Exception would have the error raised once more, and uvicorn log it once more.
    every = Middleware(ExceptionMiddleware, handlers={Exception: failed})
    return Starlette(routes=routes, middleware=[every], exception_handlers={HTTPException: failed})


def _model(request: Request) -> tuple[str, str]:
    """The name and the version that a path holds; without one "", which is the only one there is."""
    return request.path_params["name"], request.path_params.get("version", "")
