"""A model repository of Triton Inference Server from exported models and TensorRT engines.

::

    REPOSITORY/NAME/config.pbtxt            unrolled or dynamic: requests that wait are one batch
                    labels.txt
                    1/model.onnx            or model.plan, a TensorRT engine
    REPOSITORY/NAME-stream/config.pbtxt     step: a sequence of requests is a stream, whose state Triton keeps
                           labels.txt
                           1/model.onnx     see `sequence_graph`

T travels as a shape, `steps [N, T]` or frames `[N, T, ...]`, so that requests of different T never share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from tetdeploy import __version__
from tetdeploy.class_names import as_utf8
from tetdeploy.runtimes.manifest import read_manifest
from tetdeploy.storage.files import atomic_folder
from tetdeploy.storage.model_file import parse_metadata, read_model

from .reading import parse_graph
from .sequence_graph import sequence_graph

MAX_BATCH = 64
MAX_STREAMS = 1024
IDLE_SECONDS = 60
OURS = "tetdeploy"  # the parameter that marks a config.pbtxt as ours; its value is the version that wrote it

# Where Triton runs a graph that was made for a target.
_GPU, _CPU = triton.ModelInstanceGroup.KIND_GPU, triton.ModelInstanceGroup.KIND_CPU
_KINDS = {"cpu": _CPU, "openvino": _CPU, "cuda": _GPU, "tensorrt": _GPU}
_ONNX_TYPES = {1: "FP32", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16"}
_TENSORRT_TYPES = {"float": "FP32", "half": "FP16", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "bool": "BOOL"}


@dataclass(frozen=True)
class Added:
    """A version of a model of a repository: `path` is the model's folder."""

    name: str
    version: int
    path: Path
    platform: str

    def to_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"path": str(self.path)}


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]  # -1 is free; the batch is not in it


@dataclass(frozen=True)
class _Source:
    """What goes into a version folder, and what its configuration is made of."""

    data: bytes
    file_name: str
    platform: str
    target: str
    max_batch: int
    metadata: dict[str, Any]
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]

    @property
    def is_stream(self) -> bool:
        return bool(self.metadata["layout"] == "sequence")

    @property
    def labels(self) -> str:
        # a line is a class; a name may be that of a folder, which can have a line break
        return "".join(as_utf8(name).replace("\n", " ") + "\n" for name in self.metadata["class_names"])


def add_to_repository(repository: Path | str, models: Sequence[Path], name: str) -> list[Added]:
    """Put models into a repository: as new ones, or as the next version of those that are there already. All of them,
    or, after an error, none.

    Args:
        repository: the folder that Triton is given; made if it is not there.
        models: exported `.onnx` files, or `.engine` files that `tetdeploy build` made with TensorRT.
        name: of the model; that of a stream ends in `-stream`.

    Raises:
        ValueError: Triton cannot serve one of them, and why; a folder of that name is not ours; the versions there have
            other inputs, outputs or classes.
        OSError: a file cannot be read or written.
    """
    check_name(name)
    sources = [_read(Path(model)) for model in models]
    names = [f"{name}-stream" if source.is_stream else name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(str(model) for model in models)} would all be {names[0]}; add one of them")
    with ExitStack() as writing:
        return [_add(writing, Path(repository) / named, source) for named, source in zip(names, sources, strict=True)]


def check_name(name: str) -> None:
    """Refuse what is no name of a model.

    Raises:
        ValueError: it is empty, holds more than letters, digits, `.`, `_` and `-`, or begins with one of the last.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} is no name for a served model, which is letters and digits, and after them '.', '_' and '-'; "
            "choose one with --name"
        )


def model_config(source: _Source, name: str) -> Any:
    """What Triton must know of a model."""
    states = {tensor for state in source.metadata["states"] for tensor in (state["input"], state["output"])}
    config = triton.ModelConfig(name=name, platform=source.platform, max_batch_size=source.max_batch)
    for tensor in source.inputs:
        if tensor.name not in states:
            config.input.add(name=tensor.name, data_type=_type(tensor), dims=tensor.shape)
    for tensor in source.outputs:
        if tensor.name not in states:
            labels = "labels.txt" if tensor.name == "logits" else ""
            config.output.add(name=tensor.name, data_type=_type(tensor), dims=tensor.shape, label_filename=labels)
    if source.is_stream:
        _keep_sequences(config.sequence_batching, source)
    else:
        config.dynamic_batching.SetInParent()
    config.instance_group.add(count=1, kind=_KINDS[source.target])
    accelerators = config.optimization.execution_accelerators
    if source.platform == "onnxruntime_onnx" and source.target == "tensorrt":
        accelerators.gpu_execution_accelerator.add(name="tensorrt")
    if source.target == "openvino":
        accelerators.cpu_execution_accelerator.add(name="openvino")
    config.parameters[OURS].string_value = __version__
    return config


def _keep_sequences(batching: Any, source: _Source) -> None:
    """Implicit state: what a request writes, the sequence's next one reads, and its first one reads zeros."""
    batching.max_sequence_idle_microseconds = IDLE_SECONDS * 1_000_000
    batching.oldest.max_candidate_sequences = MAX_STREAMS
    tensors, states = {tensor.name: tensor for tensor in source.inputs}, source.metadata["states"]
    # Triton takes the k-th output by name for the k-th input by name, whatever the configuration says (server#8586).
    by_input = sorted(states, key=lambda state: str(state["input"]))
    assert [state["output"] for state in by_input] == sorted(state["output"] for state in states)
    for state in states:
        tensor = tensors[state["input"]]
        added = batching.state.add(
            input_name=state["input"], output_name=state["output"], data_type=_type(tensor), dims=tensor.shape
        )
        added.initial_state.add(
            name=f"zeros for {tensor.name}", data_type=_type(tensor), dims=tensor.shape, zero_data=True
        )


def _read(path: Path) -> _Source:
    source = _read_engine(path) if path.suffix == ".engine" else _read_graph(path)
    if source.metadata["states"] and not source.is_stream:
        raise ValueError(
            f"{path} is an unrolled graph with its state outside, which Triton cannot keep in chunks of T; for streams "
            "export with --layout step"
        )
    check_target(path, source.target)
    return source


def check_target(what: object, target: str) -> None:
    """Refuse what was made, or is to be, for a target that Triton has not.

    Raises:
        ValueError: it is such a target.
    """
    if target not in _KINDS:
        raise ValueError(f"{what} is for {target}, which Triton has not; choose --target {', '.join(_KINDS)}")


def _read_graph(path: Path) -> _Source:
    data = read_model(path)
    graph, metadata = parse_graph(data, path)
    if metadata["layout"] == "step":
        graph = sequence_graph(graph, metadata)
        data = graph.SerializeToString()
        (text,) = (entry.value for entry in graph.metadata_props)
        metadata = parse_metadata(text, path)
    inputs, outputs = (
        tuple(_Tensor(v.name, _ONNX_TYPES[v.type.tensor_type.elem_type], _dims(v.type.tensor_type)) for v in values)
        for values in (graph.graph.input, graph.graph.output)
    )
    return _Source(data, "model.onnx", "onnxruntime_onnx", metadata["target"], MAX_BATCH, metadata, inputs, outputs)


def _dims(tensor: Any) -> tuple[int, ...]:
    return tuple(-1 if dim.dim_param else dim.dim_value for dim in tensor.shape.dim[1:])


def _read_engine(path: Path) -> _Source:
    manifest = read_manifest(path)
    if manifest["package"] != "tensorrt":
        raise ValueError(
            f"{path} is an engine of {manifest['package']}, which Triton has not; build it with --package tensorrt on "
            "the GPU that Triton will run on, or give the .onnx"
        )
    least, _, most = manifest["batch"]
    if least > 1:
        raise ValueError(
            f"{path} was built for {least} images or more, and Triton may send one; build with --batch 1:..."
        )
    if manifest["metadata"]["layout"] == "step":
        raise ValueError(
            f"{path} is a step engine, whose state is not all inside the batch; put its .onnx into the repository, and "
            "build from the graph there, NAME-stream/1/model.onnx"
        )
    inputs, outputs = (
        tuple(
            _Tensor(tensor["name"], _TENSORRT_TYPES[tensor["dtype"]], tuple(tensor["shape"][1:]))
            for tensor in manifest["tensors"]
            if tensor["kind"] == kind
        )
        for kind in ("input", "output")
    )
    data, metadata = path.read_bytes(), manifest["metadata"]
    return _Source(data, "model.plan", "tensorrt_plan", "tensorrt", most, metadata, inputs, outputs)


def _type(tensor: _Tensor) -> int:
    return int(triton.DataType.Value(f"TYPE_{tensor.dtype}"))


def _add(writing: ExitStack, folder: Path, source: _Source) -> Added:
    """Stage a version; it is there when `writing` closes without an error."""
    config = model_config(source, folder.name)
    if folder.exists():
        _check_successor(folder, config, source)
        version = 1 + max((int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()), default=0)
        staged = writing.enter_context(atomic_folder(folder / str(version)))
    else:
        version = 1
        model = writing.enter_context(atomic_folder(folder))
        (model / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
        (model / "labels.txt").write_text(source.labels, encoding="utf-8")
        staged = model / "1"
        staged.mkdir()
    (staged / source.file_name).write_bytes(source.data)
    return Added(folder.name, version, folder, source.platform)


def _check_successor(folder: Path, config: Any, source: _Source) -> None:
    """Refuse what cannot be the next version of the model in `folder`: one configuration, which its owner may have
    edited, serves all versions."""
    try:
        there = text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), triton.ModelConfig())
    except (OSError, ValueError, text_format.ParseError):
        there = triton.ModelConfig()
    if OURS not in there.parameters:
        raise ValueError(f"{folder} is there and was not written by tetdeploy; choose another --name or folder")
    old = _essence(there, (folder / "labels.txt").read_text(encoding="utf-8"))
    for what, new in _essence(config, source.labels).items():
        if old[what] != new:
            raise ValueError(
                f"{folder} has {what} {old[what]} and the new version {new}, but one config.pbtxt serves all versions; "
                "choose another --name or folder"
            )
    if source.platform == "tensorrt_plan" and there.max_batch_size > source.max_batch:  # a graph's batch is free
        raise ValueError(
            f"{folder} sends batches of up to {there.max_batch_size} and the engine takes {source.max_batch}; build it "
            f"with --batch 1:8:{there.max_batch_size}, or lower max_batch_size in config.pbtxt"
        )


def _essence(config: Any, labels: str) -> dict[str, str]:
    """What all versions of a model have in common, in words."""
    return {
        "the platform": config.platform,
        "the inputs": _shapes((v.name, v) for v in config.input),
        "the outputs": _shapes((v.name, v) for v in config.output),
        "the states": _shapes((v.input_name, v) for v in config.sequence_batching.state),
        "the classes": ", ".join(labels.splitlines()),
    }


def _shapes(tensors: Iterable[tuple[str, Any]]) -> str:
    types = triton.DataType
    return ", ".join(f"{name} {types.Name(v.data_type).removeprefix('TYPE_')} {list(v.dims)}" for name, v in tensors)
