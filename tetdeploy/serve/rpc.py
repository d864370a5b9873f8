"""The Open Inference Protocol v2 over gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2 as pb

from tetdeploy.serve.bodies import Budget, Share, Sizes
from tetdeploy.serve.errors import CLIENT_LEFT, forget_frames, names_something, status_of
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.protocol import SERVER, Models, refuse_loading
from tetdeploy.serve.rpc_messages import check_tensors, parse, parse_probe, read_request, write_response


def grpc_server(models: Models, inferences: Inferences, sizes: Sizes) -> grpc.aio.Server:
    """The server, which listens nowhere yet. Calls that it does not know are UNIMPLEMENTED."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(names_something)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", sizes.max_request),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
        ]
    )
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _answering(answer, getattr(pb, f"{name}Request")),
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name, answer in _probes(models).items()
    }
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
        inferences.answer, response_serializer=pb.ModelInferResponse.SerializeToString
    )
    # The standard probe, of Kubernetes for one. Its request's one field, a text, is the first of this message too.
    health = {
        "Check": grpc.unary_unary_rpc_method_handler(
            _answering(lambda request: _health(models, request.name), pb.ModelReadyRequest)
        )
    }
    services = {"inference.GRPCInferenceService": handlers, "grpc.health.v1.Health": health}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, calls) for name, calls in services.items()]
    )
    return server


def _health(models: Models, service: str) -> bytes:
    """A `HealthCheckResponse` of a model, or of the server where none is named: field 1 is SERVING or NOT_SERVING."""
    ready = models.find(service).ready if service else models.ready
    return b"\x08\x01" if ready else b"\x08\x02"


def _probes(models: Models) -> dict[str, Callable[[Any], Any]]:
    """All but inference. It is small, and never refused for want of room."""

    def load(request: Any) -> NoReturn:
        refuse_loading()

    return {
        "ServerLive": lambda request: pb.ServerLiveResponse(live=True),
        "ServerReady": lambda request: pb.ServerReadyResponse(ready=models.ready),
        "ServerMetadata": lambda request: pb.ServerMetadataResponse(**SERVER),
        "ModelReady": lambda request: pb.ModelReadyResponse(ready=models.find(request.name, request.version).ready),
        "ModelMetadata": lambda request: pb.ModelMetadataResponse(
            **models.find(request.name, request.version).metadata()
        ),
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": load,
    }


def _answering(answer: Callable[[Any], Any], kind: Any) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def call(data: bytes, context: Any) -> Any:
        try:
            return answer(parse_probe(data, kind))
        except Exception as error:
            _, code, message = status_of(error)
            forget_frames(error)
            del data  # gRPC keeps what abort raises, and that keeps this frame
            await context.abort(code, message)

    return call


class Inferences:
    """Inference, within the budget that it shares with HTTP. A message counts once it is here: gRPC says nothing of
    those on their way.

    Attributes:
        running: how many are being answered.
        stopping: what is cancelled from now on is cut off by the server.
    """

    def __init__(self, models: Models, metrics: Metrics, sizes: Sizes, budget: Budget) -> None:
        self._models, self._metrics, self._sizes, self._budget = models, metrics, sizes, budget
        self.running, self.stopping = 0, False

    async def answer(self, data: bytes, context: Any) -> Any:
        """The answer to the bytes of a message."""
        self.running += 1
        message: Any = None
        name = ""  # until it is parsed
        try:
            with Share(self._budget) as share:
                share.add(len(data))
                started = time.perf_counter()
                await share.turn()
                message = parse(data, self._sizes)
                name = message.model_name
                response = await self._infer(message)
                self._metrics.seconds.labels(name).observe(time.perf_counter() - started)
                return response
        except asyncio.CancelledError:  # its client has left, or its deadline passed
            if not self.stopping:
                self._metrics.refuse(name, CLIENT_LEFT)
            raise
        except Exception as error:
            http, code, text = status_of(error)
            self._metrics.refuse(name, http)
            forget_frames(error)
            del data, message  # as above
            await context.abort(code, text)
        finally:
            self.running -= 1

    async def _infer(self, message: Any) -> Any:
        model = self._models.running(message.model_name, message.model_version)
        check_tensors(message)
        request = read_request(message)
        return write_response(model.name, request, await model.predict(request))
