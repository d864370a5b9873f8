"""The Open Inference Protocol v2 in KServe's terms: a `kserve.Model` for each served model, and how requests are read.

KServe's own reading of binary tensors turns every value into a Python object, and a malformed request into an internal
error; `TensorDataPlane` reads them in its place. A model has one version, 1.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import numpy as np
from google.protobuf.unknown_fields import UnknownFieldSet
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model, ModelRepository
from kserve.errors import InvalidInput
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.rest.v2_datamodels import InferenceRequest, RequestInput, RequestOutput
from pydantic import Field, ValidationError

from tetdeploy import __version__
from tetdeploy.engine import Array, Result
from tetdeploy.serve.bodies import TooLargeError
from tetdeploy.serve.models import ServedModel
from tetdeploy.serve.requests import DATATYPES, Parameters, tensor
from tetdeploy.serve.scheduler import StoppingError

JSON_LENGTH = "inference-header-content-length"
BINARY_OUTPUTS = "binary_data_output"
VERSION = "1"
_VARINT, _FIXED64 = 0, 1  # as which an integer and a double travel
DOUBLE_PARAM, UINT64_PARAM = 4, 5  # Triton's field numbers; KServe's InferParameter lacks them: they arrive as unknown


class UnknownVersionError(ValueError):
    """A model has no such version."""


def check_version(name: str, version: str) -> None:
    """Refuse a version that a model has not; "" leaves the choice to the server.

    Raises:
        UnknownVersionError: it is so.
    """
    if version not in ("", VERSION):
        raise UnknownVersionError(f"{name} has the version {VERSION} only, got {version!r}; leave it out")


def refuse_loading() -> NoReturn:
    """What a client gets that wants models loaded or unloaded."""
    raise InvalidInput("models are neither loaded nor unloaded while the server runs; name them when you start it")


class OpenInferenceModel(Model):  # type: ignore[misc]
    """A served model as KServe sees it: one input `x`, outputs `logits`, `per_step`, `steps` and `class`."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served.name)
        self.served = served
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        engine = self.served.engine
        time = (-1,) if engine.encoding == "frames" else ()
        return [_described("x", engine.input_dtype, -1, *time, *engine.input_shape)]

    def get_output_types(self) -> list[dict[str, Any]]:
        K, float32 = len(self.served.engine.class_names), np.dtype(np.float32)
        return [
            _described("logits", float32, -1, K),
            _described("per_step", float32, -1, -1, K),
            _described("steps", np.dtype(np.int64), -1),
            _described("class", np.dtype(object), -1),
        ]

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        wanted = self._wanted(payload)  # before anything runs: a sequence would go on, and its client not know
        outputs = self._outputs(await self._run(payload), wanted)
        return InferResponse(
            payload.id or str(uuid.uuid4()),
            self.name,
            outputs,
            model_version=VERSION,
            from_grpc=payload.from_grpc,
            use_binary_outputs=payload.use_binary_outputs and not payload.from_grpc,  # there arrays always are
            requested_outputs=payload.request_outputs,
        )

    async def _run(self, request: InferRequest) -> Result:
        try:
            return await self._answer(request)
        except ValueError as error:
            raise (error if type(error) is not ValueError else InvalidInput(str(error))) from error

    async def _answer(self, request: InferRequest) -> Result:
        parameters = Parameters.parse(_parameters(request))
        x = self._input(request.inputs)
        if parameters.sequence_id is not None:
            start, end = parameters.sequence_start, parameters.sequence_end
            return await self.served.push(parameters.sequence_id, x, T=parameters.T, start=start, end=end)
        if x is None:
            raise ValueError(f"{self.name} needs the input x")
        return await self.served.infer(x, T=parameters.T, early_exit=parameters.early_exit)

    def _input(self, inputs: list[InferInput]) -> Array | None:
        if not inputs:
            return None
        if [given.name for given in inputs] != ["x"]:
            raise ValueError(f"{self.name} takes one input, x; got {', '.join(given.name for given in inputs)}")
        [x] = inputs
        data = x.data if x._raw_data is None else x._raw_data  # as_numpy() would trust the shape and copy lists
        return tensor("x", x.datatype, x.shape, data, self.served.engine.input_dtype)

    def _wanted(self, request: InferRequest) -> list[str]:
        """The names of the outputs asked for, by default all."""
        names = [output["name"] for output in self.get_output_types()]
        asked = request.request_outputs or ()
        for output in asked:
            _check_output(output)
        wanted = [output.name for output in asked] or names
        if unknown := [name for name in wanted if name not in names]:
            raise InvalidInput(f"{self.name} has no output {unknown[0]!r}; there are {', '.join(names)}")
        if len(set(wanted)) < len(wanted):  # an answer is to be no larger than a request allows for
            raise InvalidInput(f"an output of {self.name} is asked for twice; name each once")
        return wanted

    def _outputs(self, result: Result, wanted: list[str]) -> list[InferOutput]:
        names = np.array(self.served.engine.class_names, object)
        values = {
            "logits": result.logits,
            "per_step": result.per_step,
            "steps": result.steps,
            "class": names[result.logits.argmax(-1)],
        }
        return [
            InferOutput(name, list(values[name].shape), DATATYPES[values[name].dtype.name], values[name])
            for name in wanted
        ]


def _described(name: str, dtype: np.dtype[Any], *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[dtype.name], "shape": list(shape)}


def _check_output(output: RequestedOutput) -> None:
    """Refuse what would make of an output something else than its tensor, such as `classification`."""
    for name, value in (output.parameters or {}).items():
        if name != "binary_data":
            raise InvalidInput(f"unknown parameter {name!r} of the output {output.name}; there is binary_data")
        _check_flag(name, value)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name} must be true or false, got {value!r}")


def _parameters(request: InferRequest) -> dict[str, Any]:
    """The parameters of a request but for the one that is KServe's."""
    given: Mapping[str, Any] = request.parameters or {}
    if request.from_grpc:
        given = {name: _grpc_parameter(name, parameter) for name, parameter in given.items()}
    _check_flag(BINARY_OUTPUTS, given.get(BINARY_OUTPUTS, False))
    return {name: value for name, value in given.items() if name != BINARY_OUTPUTS}


def _grpc_parameter(name: str, parameter: Any) -> Any:
    if (choice := parameter.WhichOneof("parameter_choice")) is not None:
        return getattr(parameter, choice)
    for field in UnknownFieldSet(parameter):
        if (field.field_number, field.wire_type) == (DOUBLE_PARAM, _FIXED64):
            return struct.unpack("<d", struct.pack("<Q", field.data))[0]
        if (field.field_number, field.wire_type) == (UINT64_PARAM, _VARINT):
            return field.data
    raise ValueError(f"parameter {name} has no value of a type that is known here")


# Of what a request got wrong the first is enough: pydantic would otherwise describe each of a million bad entries, and
# the server stand still. Of a dict it does so in any case; parameters are checked where they are read.
class _BinaryInput(RequestInput):  # type: ignore[misc]
    shape: Annotated[list[int], Field(fail_fast=True)]
    parameters: dict[str, Any] | None = None
    data: list[Any] = []  # noqa: RUF012  pydantic copies it


class _Output(RequestOutput):  # type: ignore[misc]
    parameters: dict[str, Any] | None = None


class _BinaryRequest(InferenceRequest):  # type: ignore[misc]
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[_BinaryInput], Field(fail_fast=True)]
    outputs: Annotated[list[_Output], Field(fail_fast=True)] | None = None


class TensorDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's data plane, with requests read by us.

    Args:
        models: what is served.
        max_json: bytes of a request that may be read number by number.
    """

    def __init__(self, models: ModelRepository, max_json: int) -> None:
        super().__init__(model_registry=models)
        self._max_json = max_json

    def check_listed(self, size: int) -> None:
        """Refuse a request of which so many bytes would have to be read number by number.

        Raises:
            TooLargeError: they are more than `max_json`.
        """
        if size > self._max_json:
            raise TooLargeError(
                f"a request may hold at most {self._max_json:,} bytes of numbers one by one (JSON, or contents over "
                f"gRPC), got {size:,}: send raw bytes, as clients do by default, or fewer images; --max-json-mb sets "
                "the server's limit"
            )

    def metadata(self) -> dict[str, Any]:
        return {
            "name": "tetdeploy",
            "version": __version__,
            "extensions": ["binary_tensor_data", "sequence", "sequence(string_id)", "parameters"],
        }

    async def ready(self) -> bool:
        return all(model.ready for model in self.model_registry.get_models().values())

    def running(self, name: str, version: str = "") -> OpenInferenceModel:
        """A model that takes requests.

        Raises:
            ModelNotFound, UnknownVersionError: there is none.
            StoppingError: it takes none any more.
        """
        model: OpenInferenceModel = self.get_model_from_registry(name)
        check_version(name, version)
        if not model.ready:
            raise StoppingError("the server is shutting down; ask another one, or later")
        return model

    async def model_metadata(self, model_name: str, version: str = "") -> dict[str, Any]:
        described: dict[str, Any] = await super().model_metadata(model_name)
        check_version(model_name, version)
        return described | {"versions": [VERSION]}

    async def model_ready(self, model_name: str, version: str = "") -> bool:
        model: OpenInferenceModel = self.get_model_from_registry(model_name)
        check_version(model_name, version)
        return model.ready

    async def infer(
        self, model_name: str, request: InferRequest, headers: Any = None
    ) -> tuple[InferResponse, dict[str, str]]:
        """What KServe's gRPC calls; its own takes four times of every request."""
        return await self.running(model_name).predict(request), {}

    def decode_inference_request(
        self, body: bytes | bytearray, headers: Mapping[str, str], model_name: str
    ) -> InferRequest:
        """A request as JSON, or as JSON followed by the inputs' bytes.

        Raises:
            InvalidInput: it is neither.
            TooLargeError: the JSON is.
        """
        length = _json_length(headers.get(JSON_LENGTH), len(body))
        self.check_listed(length)
        try:
            request = _BinaryRequest.model_validate_json(body if length == len(body) else body[:length])
        except ValidationError as error:
            raise InvalidInput(malformed(error.errors())) from error
        decoded = InferRequest.from_inference_request(request, model_name)
        for output in decoded.request_outputs or () if decoded.use_binary_outputs else ():  # unless they say otherwise
            output.parameters = {"binary_data": True} | (output.parameters or {})
        _attach(decoded.inputs, memoryview(body)[length:])
        return decoded


def _json_length(header: str | None, available: int) -> int:
    if header is None:
        return available
    if not header.isdecimal() or len(header) > 18 or int(header) > available:  # int() refuses thousands of digits
        raise InvalidInput(f"{JSON_LENGTH} must lie in 0..{available}, the length of the body; got {header}")
    return int(header)


def _attach(inputs: list[InferInput], binary: memoryview) -> None:
    """Give inputs with a `binary_data_size` their part of what follows the JSON."""
    start = 0
    for given in inputs:
        size = given.parameters.get("binary_data_size")
        if size is None:
            continue
        left = len(binary) - start
        if type(size) is not int or not 0 <= size <= left:
            raise InvalidInput(f"input {given.name} has binary_data_size {size}, but {left} bytes follow")
        given._raw_data = binary[start : start + size]
        start += size
    if start != len(binary):
        raise InvalidInput(f"{len(binary) - start} bytes follow the JSON that belong to no input")


def malformed(errors: Any) -> str:
    """One line about the first thing that a request got wrong, from pydantic's list."""
    where = ".".join(str(part) for part in errors[0]["loc"] if part not in ("body", "InferenceRequest"))
    return f"the request is malformed: {errors[0]['msg']}" + (f" at {where}" if where else "")
