"""What a graph says of itself: all that serving needs, and nothing of the machine that wrote it.

docs/exported-model.md lists the fields.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from tetdeploy import __version__
from tetdeploy.int8.quantisation import Scales, scales_sha256
from tetdeploy.networks import Classifier
from tetdeploy.storage.form import as_json
from tetdeploy.storage.model_file import FORMAT, METADATA_KEY
from tetdeploy.storage.provenance import written

from .config import ExportConfig
from .counters import counting_overlay
from .encoder import Encoder
from .neuron_steps import Neurons
from .operations import Layers
from .reading import parse_graph

_MOST_BYTES = 2**31 - 1  # of a protocol buffer, for whatever reads it


def describe(
    model: ir.Model,
    classifier: Classifier,
    config: ExportConfig,
    neurons: list[Neurons],
    encoders: list[Encoder],
    layers: Layers,
    source: Mapping[str, Any] | None,
    scales: Scales | None = None,
) -> dict[str, Any]:
    """Put all that serving needs into the metadata of `model`, in the place of what torch's exporter left there.

    Args:
        neurons, encoders, layers: of the lowered graph.
        source: what the model was made from.
        scales: of an int8 graph.

    Returns:
        What was put there.
    """
    _strip(model)
    normalization = None
    if config.normalize:
        mean, std = classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()
        normalization = {"scale": 255.0, "mean": mean, "std": std}
    description = {
        "format": FORMAT,
        "layout": config.layout,
        "T": config.steps,
        "trained_T": config.trained_T,
        "encoding": config.encoding,
        "input": {"shape": classifier.image_shape, "dtype": "uint8" if config.normalize else "float32"},
        "normalization": normalization,
        "class_names": classifier.class_names,
        "fires": "u > v_th",
        "reset": "hard, to 0",
        "neurons": [{"name": n.name, "tau": n.tau, "v_th": n.v_th, "shape": n.shape} for n in neurons],
        "states": [
            {"input": f"u.{n.name}", "output": f"u_next.{n.name}", "shape": n.shape}
            for n in neurons
            if config.has_state
        ],
        "encoded": [
            {"input": f"encoded.{e.name}", "output": f"encoded_next.{e.name}", "shape": e.shape} for e in encoders
        ],
        "layers": [layer.to_dict() for layer in layers.layers],
        "uncounted": layers.uncounted,
        "other_ops": layers.other_ops,
        "counting_overlay": base64.b64encode(counting_overlay(layers, neurons)).decode(),
        "fold_bn": config.fold_bn,
        "precision": config.precision,
        "scales_sha256": None if scales is None else scales_sha256(scales),
        "target": config.target,
        "source": as_json(dict(source or {})),
    } | written(**versions())
    model.metadata_props[METADATA_KEY] = json.dumps(description)
    model.producer_name, model.producer_version, model.doc_string = "tetdeploy", __version__, None
    return description


def describe_check(model: ir.Model, description: dict[str, Any], *, checked: bool) -> None:
    """Add to both whether the model is compared with PyTorch before it is kept."""
    description["checked"] = checked
    model.metadata_props[METADATA_KEY] = json.dumps(description)


def _strip(model: ir.Model) -> None:
    """torch's exporter leaves stack traces with paths of this machine in every node."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


def versions() -> dict[str, str]:
    """Of the packages that write an export."""
    modules = {name: importlib.import_module(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")}
    return {name: str(module.__version__) for name, module in modules.items()}


def in_bytes(proto: onnx.ModelProto) -> bytes:
    """A graph as a file holds it.

    Raises:
        ValueError: it is larger than ONNX's files may be.
    """
    content: bytes = proto.SerializeToString()
    if len(content) > _MOST_BYTES:
        raise ValueError(
            f"the graph takes {len(content) / 1e9:.2f} GB, and an ONNX file can be read up to "
            f"{_MOST_BYTES / 1e9:.2f} GB; take fewer weights, as with a smaller --width, or, if this is fp32, "
            "--precision fp16 or int8"
        )
    return content


def serialised(model: ir.Model, path: Path) -> bytes:
    """A described model as it goes to `path`. If the one that is there differs in its date alone, it is that one, date
    and all: calibrations and engines know a model by its SHA-256.

    Raises: see `in_bytes`.
    """
    proto = ir.to_proto(model)
    new = in_bytes(proto)
    try:
        there = path.read_bytes()
        created = parse_graph(there, path)[1]["created"]
    except (OSError, ValueError, KeyError):
        return new
    (entry,) = proto.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"created": created})
    return there if proto.SerializeToString() == there else new
