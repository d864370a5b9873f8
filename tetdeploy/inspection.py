"""What a file is: a checkpoint, the state of a training, an exported model, or a file of others. Needs no torch.

Descriptions are JSON-able and have "kind", "path", "size_bytes", "sha256"; what else depends on the kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetdeploy.checkpoint import read_metadata
from tetdeploy.energy import Layer, input_kind, layers_of
from tetdeploy.names import section
from tetdeploy.runtimes.manifest import manifest_path
from tetdeploy.storage.files import is_utf8
from tetdeploy.storage.form import check_form
from tetdeploy.storage.model_file import METADATA_KEY, load_fault, parse_metadata, session_metadata
from tetdeploy.storage.run_folder import POSITION, weights_file, weights_sha256
from tetdeploy.storage.shards import shard_files
from tetdeploy.storage.tensor_file import read_content, read_header
from tetdeploy.system.extras import import_extra

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_DTYPES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_PICKLES = (".pt", ".pth", ".pkl", ".ckpt", ".bin")  # what torch writes has a refusal that says why
_BN_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def inspect(path: Path | str) -> dict[str, Any]:
    """Describe a file, the checkpoint of a run folder, or a folder of shards.

    Returns:
        Of kind "checkpoint", "shards", "training state", "model", "safetensors" or "onnx"; the last two are not of
        tetdeploy.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no checkpoint.
        ValueError: neither safetensors nor ONNX, such as a TensorRT engine; damaged; shards of which some are missing.
        MissingExtraError: an ONNX model, and onnxruntime is not installed.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder, a .safetensors or an .onnx file")
    file = weights_file(path)
    if file.is_dir():
        found = _inspect_shards(file)
    elif file.suffix == ".onnx":
        found = _inspect_onnx(file)
    elif file.suffix in (".safetensors", *_PICKLES):
        found = _inspect_safetensors(file)
    elif file.suffix == ".engine":
        raise ValueError(
            f"{file} is a TensorRT engine, which {manifest_path(file).name} beside it describes; "
            "inspect shows the .onnx file it was built from"
        )
    else:
        raise ValueError(
            f"{file} is neither a checkpoint (.safetensors) nor a model (.onnx); "
            "a result of sweep or validate is shown by tetdeploy report"
        )
    same = {"path": str(file), "size_bytes": file.stat().st_size, "sha256": weights_sha256(file)}
    return {"kind": found.pop("kind")} | same | found


def _inspect_shards(folder: Path) -> dict[str, Any]:
    files = list(shard_files(folder))
    tensors = {name: tensor for file in files for name, tensor in _tensors(file)[0].items()}
    return _shards(folder, tensors) | {"size_bytes": sum(file.stat().st_size for file in files)}


def _shards(path: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """Of the tensors of all files of a folder, or of one file."""
    metadata = read_metadata(path)
    if not metadata.get("restart"):
        raise ValueError(f"{path} is damaged: it does not say where its run stood")
    averaged = any(name.startswith("average.") for name in tensors)
    return {"kind": "shards", "averaged": averaged} | metadata | _modules(section(tensors, "network."))


def _inspect_safetensors(file: Path) -> dict[str, Any]:
    tensors, metadata = _tensors(file)
    if METADATA_KEY not in metadata:
        return {"kind": "safetensors", "metadata": metadata} | _modules(tensors)
    content = read_content(file)
    if "resume" in content:
        network = _modules(section(tensors, "network."))
        try:
            check_form(content["resume"], POSITION)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: where the run stands, {error}") from error
        return {"kind": "training state", "resume": content["resume"], "num_tensors": len(tensors)} | network
    if "restart" in content:
        return _shards(file, tensors)
    return {"kind": "checkpoint"} | read_metadata(file) | _modules(tensors)


def count_parameters(file: Path) -> int:
    """How many parameters the weights of a .safetensors file have.

    Raises:
        ValueError: it is damaged.
    """
    parameters: int = _modules(_tensors(file)[0])["parameters"]
    return parameters


def _tensors(file: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, str]]:
    """Type and shape of each tensor, and the file's metadata."""
    header = read_header(file)
    metadata = header.pop("__metadata__", None) or {}
    try:
        tensors = {
            name: (_DTYPES.get(entry["dtype"], str(entry["dtype"])), [int(d) for d in entry["shape"]])
            for name, entry in header.items()
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file} is damaged: its header does not describe its tensors ({error!r})") from error
    return tensors, metadata


def _modules(tensors: Mapping[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """The modules that tensors belong to, with their parameters; statistics of BN are none."""
    modules: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for name in sorted(tensors, key=_natural):
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module or name, {})[leaf] = tensors[name]
    layers = [_module(name, leaves) for name, leaves in modules.items()]
    return {"parameters": sum(layer["parameters"] for layer in layers), "layers": layers}


def _module(name: str, leaves: Mapping[str, tuple[str, list[int]]]) -> dict[str, Any]:
    own = {leaf: shape for leaf, (_, shape) in leaves.items() if leaf not in _BN_STATISTICS}
    shape = own.get("weight", next(iter(own.values()), []))
    return {
        "name": name,
        "type": _type("running_mean" in leaves, own),
        "shape": shape,
        "bias": "bias" in leaves,
        "parameters": sum(math.prod(s) for s in own.values()),
        "dtype": next((dtype for leaf, (dtype, _) in leaves.items() if leaf in own), None),
    }


def _type(has_statistics: bool, parameters: Mapping[str, list[int]]) -> str:
    """What a module is, as far as its tensors tell."""
    if has_statistics:
        return "batch norm"
    dims = len(parameters.get("weight", []))
    return {2: "linear", 3: "convolution 1d", 4: "convolution", 5: "convolution 3d"}.get(dims, "other")


def _inspect_onnx(file: Path) -> dict[str, Any]:
    session = _session(file)
    ports = {
        "inputs": [_port(port) for port in session.get_inputs()],
        "outputs": [_port(port) for port in session.get_outputs()],
    }
    texts = session_metadata(session, file)
    if METADATA_KEY not in texts:
        about = session.get_modelmeta()
        names = {"producer": about.producer_name, "graph": about.graph_name, "metadata": sorted(texts)}
        return {"kind": "onnx"} | names | ports
    return {"kind": "model"} | ports | _model(parse_metadata(texts[METADATA_KEY], file))


def _model(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All but what only programs read, with the layers' sizes worked out."""
    hidden = ("format", "counting_overlay", "layers", "neurons")
    states = {state["input"].removeprefix("u."): state for state in metadata["states"]}
    neurons = [
        neuron | {"size": math.prod(neuron["shape"]), "state": states.get(neuron["name"], {}).get("input")}
        for neuron in metadata["neurons"]
    ]
    layers = [_layer(layer) for layer in layers_of(metadata)]
    shown = {key: value for key, value in metadata.items() if key not in hidden}
    return shown | {
        "num_weights": sum(layer["weights"] for layer in layers),
        "num_neurons": sum(neuron["size"] for neuron in neurons),
        "layers": layers,
        "neurons": neurons,
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "type": "convolution" if layer.kernel else "product" if layer.product else "linear",
        "input_shape": list(layer.input_shape),
        "input": input_kind(layer.to_dict()),
        "outputs": layer.outputs,
        "kernel": list(layer.kernel),
        "precision": layer.precision,
        "strides": list(layer.strides),
        "weights": layer.num_weights,
        "fan_out": float(layer.fan_out().mean()),
        "dense_ops": layer.dense_ops(),
        "once": layer.once,
    }


def _session(file: Path) -> Any:
    """An ONNX Runtime session, only to be asked."""
    ort = import_extra("onnxruntime", "cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        model = file if is_utf8(file) else file.read_bytes()  # of bytes it finds no data beside the model
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception classes are private
        raise load_fault(file, error) from error


def _port(port: Any) -> dict[str, Any]:
    """An input or output; `batch` and other free dimensions are names."""
    dtype = port.type.removeprefix("tensor(").removesuffix(")")
    return {"name": port.name, "shape": port.shape, "dtype": {"float": "float32"}.get(dtype, dtype)}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """blocks.2 before blocks.10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
