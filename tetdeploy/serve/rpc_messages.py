"""Requests and answers of the Open Inference Protocol v2 over gRPC. The messages are Triton's: those of the protocol,
and more types of parameters."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from tetdeploy.engine import Array
from tetdeploy.serve.protocol import VERSION
from tetdeploy.serve.requests import (
    DATATYPES,
    MAX_TENSORS,
    InferRequest,
    Input,
    InvalidRequestError,
    WantedOutput,
    raw_bytes,
)

_CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents"}  # where numbers of a datatype are, one by one


def check_tensors(message: Any) -> None:
    """Refuse more tensors than a request may name, before each of them is an object, and raw ones that do not fit.

    Raises:
        InvalidRequestError: it is so.
    """
    for what in ("inputs", "outputs"):
        if (count := len(getattr(message, what))) > MAX_TENSORS:
            raise InvalidRequestError(f"a request may name {MAX_TENSORS} {what}, got {count:,}")
    count = len(message.raw_input_contents)
    if count not in (0, len(message.inputs)):
        raise InvalidRequestError(
            f"the number of inputs ({len(message.inputs)}) does not match the expected number of raw input contents "
            f"({count}) for model '{message.model_name}'."
        )
    for given in message.inputs if count else ():
        if given.HasField("contents"):
            raise InvalidRequestError(
                f"contents field must not be specified when using raw_input_contents for input '{given.name}' for "
                f"model '{message.model_name}'"
            )


def read_request(message: Any) -> InferRequest:
    """A `ModelInferRequest` that `check_tensors` let pass.

    Raises:
        InvalidRequestError: a parameter has no value.
    """
    raw = message.raw_input_contents
    return InferRequest(
        message.id or str(uuid.uuid4()),
        [
            Input(given.name, given.datatype, list(given.shape), raw[k] if raw else _numbers(given))
            for k, given in enumerate(message.inputs)
        ],
        [WantedOutput(output.name, _parameters(output.parameters)) for output in message.outputs],
        _parameters(message.parameters),
    )


def _numbers(given: Any) -> list[Any]:
    field = _CONTENTS.get(given.datatype)
    return [] if field is None else list(getattr(given.contents, field))


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, parameter in given.items():
        if (choice := parameter.WhichOneof("parameter_choice")) is None:
            raise InvalidRequestError(f"parameter {name} has no value of a type that is known here")
        values[name] = getattr(parameter, choice)
    return values


def write_response(model: str, request: InferRequest, outputs: Mapping[str, Array]) -> Any:
    """The `ModelInferResponse` to a request."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.id)
    for name, values in outputs.items():
        raw = raw_bytes(values)
        output = response.outputs.add(name=name, datatype=DATATYPES[values.dtype.name], shape=values.shape)
        output.parameters["binary_data_size"].int64_param = len(raw)
        response.raw_output_contents.append(raw)
    return response
