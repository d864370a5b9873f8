"""What an error is to a client."""

from __future__ import annotations

import logging

import grpc

from tetdeploy.serve.bodies import OverBudgetError, TooLargeError
from tetdeploy.serve.protocol import UnknownModelError, UnknownVersionError
from tetdeploy.serve.requests import InvalidRequestError
from tetdeploy.serve.scheduler import CallFailedError, QueueFullError, StoppingError
from tetdeploy.serve.sequences import LostSequenceError, TooManySequencesError, UnknownSequenceError

logger = logging.getLogger(__name__)
CLIENT_LEFT = 499  # nginx's status for a request whose client did not wait; only metrics see it
_ANY_CLIENT = (
    "Invalid HTTP request received.",  # uvicorn
    "Invalid encoding on",  # gRPC, of metadata that are no text
    "ExecuteBatchError",  # gRPC, of a client that left at an awkward moment
)
LONGEST = 600  # characters of a message: it may repeat the request, and gRPC sends it as a header of 8 KB at most

# The first class that fits. Anything else is our bug, and says nothing to clients.
STATUS: dict[type[Exception], tuple[int, grpc.StatusCode]] = {
    TooLargeError: (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    OverBudgetError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    QueueFullError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    TooManySequencesError: (503, grpc.StatusCode.RESOURCE_EXHAUSTED),
    StoppingError: (503, grpc.StatusCode.UNAVAILABLE),
    UnknownSequenceError: (404, grpc.StatusCode.NOT_FOUND),
    UnknownVersionError: (404, grpc.StatusCode.NOT_FOUND),
    UnknownModelError: (404, grpc.StatusCode.NOT_FOUND),
    LostSequenceError: (500, grpc.StatusCode.ABORTED),
    CallFailedError: (500, grpc.StatusCode.INTERNAL),
    InvalidRequestError: (400, grpc.StatusCode.INVALID_ARGUMENT),
}


def status_of(error: Exception) -> tuple[int, grpc.StatusCode, str]:
    """HTTP status, gRPC status and message for an error."""
    for kind, (http, rpc) in STATUS.items():
        if isinstance(error, kind):
            return http, rpc, _shortened(str(error))
    logger.error("a bug of the server", exc_info=error)
    return 500, grpc.StatusCode.INTERNAL, "internal error"


def forget_frames(error: Exception) -> None:
    """Let go of what an error has seen on its way, a request's body above all, for as long as something keeps it."""
    error.__traceback__ = error.__cause__ = error.__context__ = None


def names_something(record: logging.LogRecord) -> bool:
    """Whether a library's log says more than any client can have it say until a pipe that nobody reads is full, and the
    server waits for ever."""
    return not record.getMessage().startswith(_ANY_CLIENT)


def _shortened(message: str) -> str:
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
