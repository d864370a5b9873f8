"""The Open Inference Protocol v2, whatever carries it: models, what they are asked for, and what they answer.

A model has one version, 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from tetdeploy import __version__
from tetdeploy.class_names import as_utf8
from tetdeploy.engine import Array, Result
from tetdeploy.serve.models import ServedModel
from tetdeploy.serve.requests import DATATYPES, InferRequest, Input, InvalidRequestError, Parameters, tensor
from tetdeploy.serve.scheduler import StoppingError

BINARY_OUTPUTS = "binary_data_output"  # of a request: its outputs are to be raw bytes, which over gRPC they always are
BINARY_OUTPUT = "binary_data"  # of an output, the same
VERSION = "1"
SERVER = {
    "name": "tetdeploy",
    "version": __version__,
    "extensions": ["binary_tensor_data", "sequence", "sequence(string_id)", "parameters"],
}


class UnknownModelError(ValueError):
    """There is no such model."""


class UnknownVersionError(ValueError):
    """A model has no such version."""


def refuse_loading() -> NoReturn:
    """What a client gets that wants models loaded or unloaded."""
    raise InvalidRequestError(
        "models are neither loaded nor unloaded while the server runs; name them when you start it"
    )


class OpenInferenceModel:
    """A served model in the terms of the protocol: one input `x`, outputs `logits`, `per_step`, `steps` and `class`.

    Attributes:
        ready: whether it takes requests.
    """

    def __init__(self, served: ServedModel) -> None:
        self.name, self.served, self.ready = served.name, served, True
        self._class_names = np.array([as_utf8(name) for name in served.engine.class_names], object)
        self._output_names = [output["name"] for output in self.metadata()["outputs"]]

    def metadata(self) -> dict[str, Any]:
        engine = self.served.engine
        time = (-1,) if engine.encoding == "frames" else ()
        K, float32 = len(engine.class_names), np.dtype(np.float32)
        return {
            "name": self.name,
            "platform": "",
            "inputs": [_described("x", engine.input_dtype, -1, *time, *engine.input_shape)],
            "outputs": [
                _described("logits", float32, -1, K),
                _described("per_step", float32, -1, -1, K),
                _described("steps", np.dtype(np.int64), -1),
                _described("class", np.dtype(object), -1),
            ],
            "versions": [VERSION],
        }

    async def predict(self, request: InferRequest) -> dict[str, Array]:
        """The outputs that a request names, in its order.

        Raises:
            InvalidRequestError: it asks for what there is not.
            ValueError, RuntimeError: as `ServedModel.infer` and `ServedModel.push`.
        """
        try:
            wanted = self._wanted(request)  # before anything runs: a sequence would go on, and its client not know
            result = await self._run(request)
        except ValueError as error:
            if type(error) is ValueError:
                raise InvalidRequestError(str(error)) from error
            raise
        values = {
            "logits": result.logits,
            "per_step": result.per_step,
            "steps": result.steps,
            "class": self._class_names[result.logits.argmax(-1)],
        }
        return {name: values[name] for name in wanted}

    async def _run(self, request: InferRequest) -> Result:
        _check_flag(BINARY_OUTPUTS, request.parameters.get(BINARY_OUTPUTS, False))
        given = {name: value for name, value in request.parameters.items() if name != BINARY_OUTPUTS}
        parameters = Parameters.parse(given)
        x = self._input(request.inputs)
        request.inputs.clear()  # numbers that came one by one are larger than x, and are not to wait beside it
        if parameters.sequence_id is not None:
            start, end = parameters.sequence_start, parameters.sequence_end
            return await self.served.push(parameters.sequence_id, x, T=parameters.T, start=start, end=end)
        if x is None:
            raise ValueError(f"{self.name} needs the input x")
        return await self.served.infer(x, T=parameters.T, early_exit=parameters.early_exit)

    def _input(self, inputs: list[Input]) -> Array | None:
        if not inputs:
            return None
        if [given.name for given in inputs] != ["x"]:
            raise ValueError(f"{self.name} takes one input, x; got {', '.join(given.name for given in inputs)}")
        [x] = inputs
        return tensor("x", x.datatype, x.shape, x.data, self.served.engine.input_dtype)

    def _wanted(self, request: InferRequest) -> list[str]:
        """The names of the outputs asked for, by default all."""
        names = self._output_names
        for output in request.outputs:
            _check_output(output.name, output.parameters)
        wanted = [output.name for output in request.outputs] or names
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"{self.name} has no output {unknown[0]!r}; there are {', '.join(names)}")
        if len(set(wanted)) < len(wanted):  # an answer is to be no larger than a request allows for
            raise ValueError(f"an output of {self.name} is asked for twice; name each once")
        return wanted


def _described(name: str, dtype: np.dtype[Any], *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[dtype.name], "shape": list(shape)}


def _check_output(output: str, parameters: Mapping[str, Any]) -> None:
    """Refuse what would make of an output something else than its tensor, such as `classification`."""
    for name, value in parameters.items():
        if name != BINARY_OUTPUT:
            raise ValueError(f"unknown parameter {name!r} of the output {output}; there is {BINARY_OUTPUT}")
        _check_flag(name, value)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"parameter {name} must be true or false, got {value!r}")


class Models:
    """All models of a server, by name."""

    def __init__(self, models: Iterable[OpenInferenceModel]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def ready(self) -> bool:
        return all(model.ready for model in self._models.values())

    def find(self, name: str, version: str = "") -> OpenInferenceModel:
        """A model; a version of "" leaves the choice to the server.

        Raises:
            UnknownModelError, UnknownVersionError: there is none.
        """
        if (model := self._models.get(name)) is None:
            raise UnknownModelError(f"Model with name {name} does not exist.")
        if version not in ("", VERSION):
            raise UnknownVersionError(f"{name} has the version {VERSION} only, got {version!r}; leave it out")
        return model

    def running(self, name: str, version: str = "") -> OpenInferenceModel:
        """A model that takes requests.

        Raises:
            UnknownModelError, UnknownVersionError: there is none.
            StoppingError: it takes none any more.
        """
        model = self.find(name, version)
        if not model.ready:
            raise StoppingError("the server is shutting down; ask another one, or later")
        return model
