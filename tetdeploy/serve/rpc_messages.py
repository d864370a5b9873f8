"""Requests and answers of the Open Inference Protocol v2 over gRPC. The messages are Triton's: those of the protocol,
and more types of parameters."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from tetdeploy.engine import Array
from tetdeploy.serve.bodies import Sizes
from tetdeploy.serve.protocol import VERSION
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
)

_CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents"}  # where numbers of a datatype are, one by one

MAX_FIELDS = 6 * MAX_TENSORS  # of a message: inputs, outputs, raw bytes, and more parameters than there are
_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types; the others are groups, which it deprecates


def parse(data: bytes, sizes: Sizes) -> Any:
    """A `ModelInferRequest`. What it would take is known before: a field of two bytes becomes an object of a hundred.

    Raises:
        InvalidRequestError: it is none, or has more fields than one may have.
        TooLargeError: all but its raw bytes is.
    """
    try:
        listed = len(data)
        for k, (number, size) in enumerate(_fields(data)):
            if k == MAX_FIELDS:
                raise InvalidRequestError(
                    f"a message may have {MAX_FIELDS} fields (inputs, outputs, parameters, raw contents), got more"
                )
            if number == _RAW:
                listed -= size
        sizes.check_listed(listed)
        return pb.ModelInferRequest.FromString(data)
    except (IndexError, DecodeError) as error:
        raise InvalidRequestError("the message is no ModelInferRequest, or was cut off") from error


def parse_probe(data: bytes, kind: Any) -> Any:
    """A message of another kind.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError("the message is malformed, or was cut off") from error


def _fields(data: bytes) -> Iterator[tuple[int, int]]:
    """The number of each field of a message, and its size, without what is inside it. Raises IndexError at its end if
    it is cut off, or holds something else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, len(data))
        at += size
        if at > len(data):
            raise IndexError
        yield tag >> 3, size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at an offset, 7 bits a byte and the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError


def check_tensors(message: Any) -> None:
    """Refuse more tensors than a request may name, and raw ones that do not fit, with InvalidRequestError."""
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
        InvalidRequestError: a parameter has no value; an input has one other than its size, as in shared memory, or
            numbers where those of another datatype belong.
    """
    for given in message.inputs:
        check_input_parameters(given.name, given.parameters)
    raw = message.raw_input_contents
    return InferRequest(
        message.id or str(uuid.uuid4()),
        [
            Input(given.name, given.datatype, list(given.shape), raw[k] if raw else _numbers(given))
            for k, given in enumerate(message.inputs)
        ],
        [WantedOutput(output.name, _parameters(output.parameters)) for output in message.outputs],
        _with_threshold(_parameters(message.parameters)),
    )


def _numbers(given: Any) -> Array:
    field = _CONTENTS.get(given.datatype)
    held = [found.name for found, _ in given.contents.ListFields()]
    if field is not None and held and field not in held:
        raise InvalidRequestError(f"{given.name} has {held[0]}; put values of {given.datatype} into {field}")
    return numbers(given.name, [] if field is None else list(getattr(given.contents, field)))


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, parameter in given.items():
        if (choice := parameter.WhichOneof("parameter_choice")) is None:
            raise InvalidRequestError(f"parameter {name} has no value of a type that is known here")
        values[name] = getattr(parameter, choice)
    return values


def _with_threshold(parameters: dict[str, Any]) -> dict[str, Any]:
    """A threshold may come as a string: the parameters of KServe's gRPC clients have no floating-point numbers."""
    if isinstance(text := parameters.get("early_exit"), str):
        with suppress(ValueError):  # another text is refused with the request
            return parameters | {"early_exit": float(text)}
    return parameters


def write_response(model: str, request: InferRequest, outputs: Mapping[str, Array]) -> Any:
    """The `ModelInferResponse` to a request."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.id)
    for name, values in outputs.items():
        raw = raw_bytes(values)
        output = response.outputs.add(name=name, datatype=DATATYPES[values.dtype.name], shape=values.shape)
        output.parameters[SIZE].int64_param = len(raw)
        response.raw_output_contents.append(raw)
    return response
