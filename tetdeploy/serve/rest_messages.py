"""Requests and answers of the Open Inference Protocol v2 over HTTP: JSON, or JSON followed by the tensors' bytes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, Field, StrictInt, ValidationError
from starlette.responses import Response

from tetdeploy.engine import Array
from tetdeploy.serve.bodies import Sizes
from tetdeploy.serve.errors import forget_frames
from tetdeploy.serve.protocol import BINARY_OUTPUT, BINARY_OUTPUTS, VERSION
from tetdeploy.serve.requests import (
    DATATYPES,
    MAX_TENSORS,
    SIZE,
    InferRequest,
    Input,
    InvalidRequestError,
    WantedOutput,
    check_input_parameters,
    numbers,
    raw_bytes,
    uncollected,
)

JSON_LENGTH = "inference-header-content-length"


# Of what a request got wrong the first is enough: pydantic would otherwise describe each of a million bad entries, and
# the server stand still. Of a dict it does so in any case; parameters are checked where they are read.
class _Input(BaseModel):
    name: str
    shape: Annotated[list[StrictInt], Field(fail_fast=True)]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] = []


class _Output(BaseModel):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(BaseModel):
    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[_Input], Field(fail_fast=True, max_length=MAX_TENSORS)]
    outputs: Annotated[list[_Output], Field(fail_fast=True, max_length=MAX_TENSORS)] | None = None


def read_request(body: bytes | bytearray, headers: Mapping[str, str], sizes: Sizes) -> InferRequest:
    """A request as JSON, or as JSON followed by the inputs' bytes, which are not copied.

    Raises:
        InvalidRequestError: it is neither.
        TooLargeError: the JSON is.
    """
    length = _json_length(headers.get(JSON_LENGTH), len(body))
    sizes.check_listed(length)
    with uncollected():  # the lists are gone when it ends
        try:
            return _read(body, length)
        except InvalidRequestError as error:
            forget_frames(error)
            raise


def _read(body: bytes | bytearray, length: int) -> InferRequest:
    try:
        given = _Request.model_validate_json(body if length == len(body) else body[:length])
    except ValidationError as error:
        raise InvalidRequestError(_malformed(error)) from error
    return InferRequest(
        given.id or str(uuid.uuid4()),
        _inputs(given.inputs, memoryview(body)[length:]),
        [WantedOutput(output.name, output.parameters or {}) for output in given.outputs or ()],
        given.parameters or {},
    )


def _json_length(header: str | None, available: int) -> int:
    if header is None:
        return available
    if not header.isdecimal() or len(header) > 18 or int(header) > available:  # int() refuses thousands of digits
        raise InvalidRequestError(f"{JSON_LENGTH} must lie in 0..{available}, the length of the body; got {header}")
    return int(header)


def _malformed(error: ValidationError) -> str:
    """One line about the first thing that a request got wrong."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"the request is malformed: {first['msg']}" + (f" at {where}" if where else "")


def _inputs(given: list[_Input], binary: memoryview) -> list[Input]:
    """Inputs with their numbers, or with their part of what follows the JSON."""
    inputs, start = [], 0
    for one in given:
        check_input_parameters(one.name, one.parameters or {})
        if (size := (one.parameters or {}).get(SIZE)) is not None:
            if one.data:
                raise InvalidRequestError(f"input {one.name} has data and {SIZE}; send one of them")
            left = len(binary) - start
            if type(size) is not int or not 0 <= size <= left:
                raise InvalidRequestError(f"input {one.name} has {SIZE} {size!r}, but {left} bytes follow")
            data = binary[start : start + size]
            start += size
            inputs.append(Input(one.name, one.datatype.upper(), one.shape, data))
        else:
            inputs.append(Input(one.name, one.datatype.upper(), one.shape, numbers(one.name, one.data)))
    if start != len(binary):
        raise InvalidRequestError(f"{len(binary) - start} bytes follow the JSON that belong to no input")
    return inputs


def write_response(model: str, request: InferRequest, outputs: Mapping[str, Array]) -> Response:
    """The answer to a request, each output as JSON or as bytes, as it asks."""
    default = request.parameters.get(BINARY_OUTPUTS, False)
    binary = {wanted.name: wanted.parameters.get(BINARY_OUTPUT, default) for wanted in request.outputs}
    described, parts = [], []
    for name, values in outputs.items():
        output: dict[str, Any] = {"name": name, "shape": values.shape, "datatype": DATATYPES[values.dtype.name]}
        if binary.get(name, default):
            parts.append(raw_bytes(values))
            output["parameters"] = {SIZE: len(parts[-1])}
        else:
            output["data"] = values.ravel().tolist()
        described.append(output)
    head = orjson.dumps({"id": request.id, "model_name": model, "model_version": VERSION, "outputs": described})
    if not parts:
        return Response(head, media_type="application/json")
    headers = {JSON_LENGTH: str(len(head))}
    return Response(b"".join([head, *parts]), media_type="application/octet-stream", headers=headers)
