"""The Open Inference Protocol v2 over gRPC: KServe's servicer with our models behind it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NoReturn

import grpc
from grpc_interceptor import AsyncExceptionToStatusInterceptor
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer

from tetdeploy.serve.bodies import Budget, Share
from tetdeploy.serve.errors import CLIENT_LEFT, status_of
from tetdeploy.serve.metrics import Metrics
from tetdeploy.serve.protocol import TensorDataPlane, refuse_loading


def grpc_server(plane: TensorDataPlane, calls: Calls, max_request_bytes: int) -> grpc.aio.Server:
    """The server, which listens nowhere yet."""
    server = grpc.aio.server(
        interceptors=[calls],
        options=[
            ("grpc.max_receive_message_length", max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(_Servicer(plane, _FixedModels()), server)
    return server


class _Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's, which ignores versions and does not tell of them."""

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        described = await self._data_plane.model_metadata(request.name, request.version)
        answer = await super().ModelMetadata(request, context)
        answer.versions.extend(described["versions"])
        return answer

    async def ModelReady(self, request: Any, context: Any) -> Any:
        await self._data_plane.model_ready(request.name, request.version)
        return await super().ModelReady(request, context)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self._data_plane.running(request.model_name, request.model_version)
        if any(given.HasField("contents") for given in request.inputs):
            self._data_plane.check_listed(request.ByteSize())
        return await super().ModelInfer(request, context)


class _FixedModels:
    """KServe's repository extension, refused."""

    async def load(self, model_name: str) -> NoReturn:
        refuse_loading()

    unload = load


class Calls(AsyncExceptionToStatusInterceptor):
    """What all calls have in common: the budget that inference shares with HTTP, and errors as statuses. A message
    counts once it is here: gRPC says nothing of those on their way. Probes are small, and never refused for it.

    Attributes:
        running: inferences that are being answered.
        stopping: what is cancelled from now on is cut off by the server.
    """

    def __init__(self, metrics: Metrics, budget: Budget) -> None:
        super().__init__()
        self._metrics, self._budget = metrics, budget
        self.running, self.stopping = 0, False

    async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
        is_inference = method_name.endswith("/ModelInfer")

        async def within_budget(request: Any, context: Any) -> Any:
            with Share(self._budget) as share:
                if not is_inference:
                    return await method(request, context)
                share.add(request.ByteSize())
                started = time.perf_counter()
                answer = await method(request, context)
                self._metrics.seconds.labels(request.model_name).observe(time.perf_counter() - started)
                return answer

        self.running += is_inference
        try:
            return await super().intercept(within_budget, request_or_iterator, context, method_name)
        except asyncio.CancelledError:  # its client has left, or its deadline passed
            if is_inference and not self.stopping:
                self._metrics.refuse(request_or_iterator.model_name, CLIENT_LEFT)
            raise
        finally:
            self.running -= is_inference

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str
    ) -> NoReturn:
        http, rpc, message = status_of(ex)
        if method_name.endswith("/ModelInfer"):
            self._metrics.refuse(request_or_iterator.model_name, http)
        await context.abort(rpc, message)
        raise AssertionError("abort raises")
