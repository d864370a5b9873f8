"""Tables of `tetdeploy inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from tetdeploy.data import Framing
from tetdeploy.names import has_regulariser, is_own_model
from tetdeploy.report.numbers import count, percent, three_digits
from tetdeploy.report.result_table import ResultTable
from tetdeploy.report.tables import versions
from tetdeploy.wording import counted

_KINDS = {
    "checkpoint": "a checkpoint of tetdeploy: trained weights, with how they were trained",
    "shards": "the last weights of a training run of tetdeploy in shards, for train --restart-from",
    "training state": "the state of a training run of tetdeploy, for train --resume",
    "model": "a model that tetdeploy exported",
    "safetensors": "a safetensors file, not a checkpoint of tetdeploy (see tetdeploy import)",
    "onnx": "an ONNX model, not one that tetdeploy exported",
}


def inspection_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """What `tetdeploy.inspection.inspect` found: facts first, then inputs and outputs, layers, neurons."""
    yield _facts(_FACTS[found["kind"]](found))
    if "inputs" in found:
        yield _ports(found)
    if found["kind"] == "model":
        yield _layers(found["layers"])
        yield _neurons(found["neurons"])
    elif found.get("layers"):
        yield _modules(found["layers"])


def _file_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "what": _KINDS[found["kind"]],
        "file": f"{found['path']}   {size(found['size_bytes'])}",
        "SHA-256": found["sha256"],
    }


def _checkpoint_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    return _file_facts(found) | {"parameters": f"{found['parameters']:,}"} | _origin_facts(found)


def _shards_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    facts = _checkpoint_facts(found) | {"where it stands": _stand(found["restart"])}
    if found["path"].endswith(".safetensors"):
        facts["what"] = f"one of several files with {_KINDS['shards']}: name their folder"
    if found["averaged"]:
        facts["moving average"] = "of the weights, beside them"
    facts.pop("kept", None)  # these are the last weights, not the best
    return facts


def _state_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    resume = found["resume"]
    best = resume.get("best") or {}
    kept = f"{best['epoch']}, {percent(best.get('val_accuracy'))} of validation images right" if best else "none yet"
    return _file_facts(found) | {
        "where it stands": _stand(resume),
        "best epoch": kept,
        "parameters": f"{found['parameters']:,}, with the optimizer's state {found['num_tensors']} tensors",
    }


def _stand(position: Mapping[str, Any]) -> str:
    return f"{position['epoch']} epochs and {position['step']} steps finished"


def _model_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    steps = f"T={found['T']}" if found["T"] is not None else "T free"
    normalised = "inside the graph" if found["normalization"] else f"no: {_expected(found['source'].get('data') or {})}"
    return (
        _file_facts(found)
        | {
            "layout": f"{found['layout']}, {steps}; trained at T={found['trained_T']}; {found['encoding']} encoding",
            "input": f"{_shape(found['input']['shape'])} {found['input']['dtype']}; normalised {normalised}",
            "classes": _classes(found["class_names"]),
            "neurons": f"{found['num_neurons']:,}; fire at {found['fires']}; reset {found['reset']}",
            "weights": f"{found['num_weights']:,} of convolutions and linear layers, {_precisions(found)}",
            "BN": "folded into the convolutions (Eq. 6)" if found.get("fold_bn", True) else "not folded",
            "operations not counted": ", ".join(found["uncounted"]),
            "compared with PyTorch": _checked(found),
            "exported": f"{found['created']} with {versions(found['versions']) or 'unknown versions'}",
            "from checkpoint": found["source"].get("checkpoint_sha256") or "",
        }
        | _origin_facts(found["source"])
    )


def _precisions(found: Mapping[str, Any]) -> str:
    """Those of the layers, the model's first: what reads the image stays in float32."""
    of_layers = {layer["precision"] for layer in found["layers"]}
    return " and ".join(sorted(of_layers, key=lambda precision: (precision != found["precision"], precision)))


def _expected(data: Mapping[str, Any]) -> str:
    """What a graph that does not normalise takes."""
    if not (data.get("mean") and data.get("std")):
        return "the input is normalised already"
    mean, std = (", ".join(f"{value:g}" for value in data[name]) for name in ("mean", "std"))
    return f"the input is (pixel / 255 - mean) / std of each channel, mean {mean}, std {std}"


def _foreign_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    metadata = found["metadata"]
    listed = [f"{k}={v}" for k, v in metadata.items()] if isinstance(metadata, dict) else metadata
    facts = {"producer": found.get("producer"), "metadata": ", ".join(listed)[:300]}
    parameters = {"parameters": f"{found['parameters']:,}"} if "parameters" in found else {}
    return _file_facts(found) | parameters | facts


_FACTS = {
    "checkpoint": _checkpoint_facts,
    "shards": _shards_facts,
    "training state": _state_facts,
    "model": _model_facts,
    "safetensors": _foreign_facts,
    "onnx": _foreign_facts,
}


def _checked(found: Mapping[str, Any]) -> str:
    """Models of earlier versions do not say it."""
    if "checked" not in found:
        return ""
    return "before it was written" if found["checked"] else "no (--check 0); tetdeploy validate does so"


def _origin_facts(source: Mapping[str, Any]) -> dict[str, Any]:
    """How it was trained: of a checkpoint's metadata, or of a model's source."""
    network, data, training, origin = (source.get(k) or {} for k in ("network", "data", "training", "provenance"))
    facts: dict[str, Any] = {}
    if network:
        kind = ", ANN twin" if network.get("ann") else ""
        model = str(network.get("model") or "?")
        facts["network"] = f"{model}{kind}"
        if not is_own_model(model):  # the user's own has settings of its own
            known = [name for name in ("tau", "v_th", "gamma") if network.get(name) is not None]
            neurons = ", ".join(f"{name} {network[name]:g}" for name in known)
            facts["network"] += f", width {network.get('width') or 1:g}; {neurons}"
    if data:
        facts["data"] = f"{data.get('name')}, images {_shape(data.get('image_shape') or [])}"
        if (framing := Framing.of(data)) is not None:
            facts["recordings"] = str(framing)
        if (names := data.get("class_names")) is not None:
            facts["classes"] = _classes(names)
    if training:
        facts["training"] = _training(training)
    if parent := origin.get("init"):
        facts["began with"] = f"{parent['path']}, checkpoint {parent['checkpoint_sha256']}"
    if origin.get("epoch") is not None:
        facts["kept"] = f"epoch {origin['epoch']}, validation accuracy {percent(origin.get('val_accuracy'))}"
    if origin.get("created"):
        made_with = versions(origin.get("versions")) or "unknown versions"
        facts["trained"] = f"{origin['created']} on {origin.get('device', '?')} with {made_with}"
    return facts


def _training(training: Mapping[str, Any]) -> str:
    epochs: Any = training.get("epochs")
    tit, random_T = training.get("tit"), training.get("random_T")
    validated = f"T={training.get('T')}"
    steps = f"T drawn from {random_T}, validated at {validated}" if random_T else validated
    steps = f"TIT {tit}" if tit else f"{steps}, {counted(epochs, 'epoch')}"
    name, first, lam = str(training.get("loss", "")), training.get("switch_to_tet"), training.get("lam")
    loss = name.upper()
    if first:
        loss += f" for {counted(first, 'epoch')}, then TET"
    if name and lam is not None and (first or has_regulariser(name)):
        loss += f" λ={lam:g}"
    rest = ", ".join(f"{key} {training[key]}" for key in ("optimizer", "lr", "batch_size", "seed") if key in training)
    qat = "fine-tuned in 8 bits (--qat)" if training.get("qat") else ""
    return ", ".join(part for part in (steps, loss, rest.replace("_", " "), qat) if part)


def _facts(facts: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts.items():
        if value not in (None, ""):
            table.add_row(label, str(value))
    return table


def _ports(found: Mapping[str, Any]) -> Table:
    table = ResultTable("", "name", "shape", "dtype", num_labels=2)
    for direction in ("inputs", "outputs"):
        for port in found[direction]:
            table.add_row(direction.removesuffix("s"), port["name"], _shape(port["shape"]), port["dtype"])
    return table


def _layers(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = ResultTable(
        "layer", "reads", "shape", numbers=("kernel", "stride", "outputs", "weights", "fan-out", "dense ops")
    )
    for layer in layers:
        fan_out = layer["fan_out"]
        table.add_row(
            layer["name"],
            layer["input"] + (", once" if layer["once"] else ""),
            _shape(layer["input_shape"]),
            "×".join(map(str, layer["kernel"])) or "–",
            "×".join(map(str, layer["strides"])) or "–",
            f"{layer['outputs']:,}",
            f"{layer['weights']:,}" + (f" {layer['precision']}" if layer["precision"] != "fp32" else ""),
            three_digits(fan_out),
            count(layer["dense_ops"]),
        )
    return table


def _neurons(neurons: Sequence[Mapping[str, Any]]) -> Table:
    table = ResultTable("neurons", "state input", numbers=("tau", "v_th", "shape", "size"))
    for neuron in neurons:
        numbers = (f"{neuron['tau']:g}", f"{neuron['v_th']:g}", _shape(neuron["shape"]), f"{neuron['size']:,}")
        table.add_row(neuron["name"], neuron["state"] or "none: starts at 0", *numbers)
    return table


def _modules(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = ResultTable("layer", "type", "dtype", numbers=("weight", "bias", "parameters"))
    for layer in layers:
        shape, bias = "×".join(map(str, layer["shape"])) or "–", "yes" if layer["bias"] else "no"
        table.add_row(layer["name"], layer["type"], layer["dtype"] or "–", shape, bias, f"{layer['parameters']:,}")
    return table


def size(num_bytes: int) -> str:
    """A file's size: `249 kB`."""
    return f"{count(num_bytes)}B" if num_bytes >= 1000 else f"{num_bytes} bytes"


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _classes(names: Sequence[Any]) -> str:
    more = ", …" if len(names) > 10 else ""
    return f"{len(names)}: {', '.join(map(str, names[:10]))}{more}"
