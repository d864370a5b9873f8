"""`export_model`: trace, fold, lower, describe, check, write."""

from __future__ import annotations

import base64
import importlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from tetdeploy import __version__
from tetdeploy.agreement import reference_path
from tetdeploy.data import Encoding
from tetdeploy.engine import Engine
from tetdeploy.files import atomic_write
from tetdeploy.int8.calibration import Calibration, calibrate
from tetdeploy.int8.network import Int8Network
from tetdeploy.int8.quantisation import Scales
from tetdeploy.model_file import METADATA_KEY
from tetdeploy.networks import Classifier
from tetdeploy.tracing import Tracer

from .counters import Layers, counting_overlay
from .encoder import Encoder, split_encoder
from .graph import OnnxTracer
from .half import HalfNetwork
from .lowering import lower
from .neuron_steps import Neurons
from .parity import Parity, check_steps, compare
from .precision import kept_answers, per_step_logits
from .reading import parse_graph
from .recorder import run_torch, torch_logits
from .targets import Precision, Target, check_target

Layout = Literal["unrolled", "dynamic", "step"]
LAYOUTS: tuple[Layout, ...] = ("unrolled", "dynamic", "step")
NUM_REFERENCE = 256


@dataclass(frozen=True)
class ExportConfig:
    """What graph to write.

    Attributes:
        layout: `unrolled` (T fixed), `dynamic` (any T in one call) or `step` (one step; membranes go in and out).
        T: steps of an unrolled graph; ignored by the other layouts.
        trained_T: the T of the training, for the default number of steps of the other layouts.
        with_state: an unrolled graph also takes and returns every membrane, for long streams in chunks of T.
        encoding: `direct` for images shown at every step, `frames` for an input that changes.
        normalize: input normalisation is part of the graph, which then takes uint8.
        fold_bn: fold BN (Eq. 6).
        precision: `int8` computes the convolutions that read spikes in 8 bits, see `tetdeploy.int8.quantisation`;
            `fp16` the layers between neurons in float16, see `export.half`.
        target: where the graph is to run; says which precisions there are, see `export.targets`.
    """

    layout: Layout = "unrolled"
    T: int = 4
    trained_T: int = 4
    with_state: bool = False
    encoding: Encoding = "direct"
    normalize: bool = True
    fold_bn: bool = True
    precision: Precision = "fp32"
    target: Target = "cpu"

    def __post_init__(self) -> None:
        check_target(self.target, self.precision)
        if self.precision != "fp32" and not self.fold_bn:
            raise ValueError(
                f"precision {self.precision} needs BN folded into the convolutions: leave out --no-fold-bn"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; choose one of {', '.join(LAYOUTS)}")
        if self.encoding not in ("direct", "frames"):
            raise ValueError(f"unknown encoding {self.encoding!r}; choose direct or frames")
        for name in ("T", "trained_T"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.with_state and self.layout != "unrolled":
            raise ValueError(
                f"with_state goes with the unrolled layout; a {self.layout} graph "
                + ("always has its state outside" if self.layout == "step" else "runs any T in one call")
            )

    @property
    def steps(self) -> int | None:
        """Steps of the trace: None where they are a dimension of the input."""
        return {"unrolled": self.T, "dynamic": None, "step": 1}[self.layout]

    @property
    def has_state(self) -> bool:
        """Whether every membrane is an input and an output of the graph."""
        return self.with_state or self.layout == "step"

    @property
    def file_name(self) -> str:
        """`model-T6.onnx`, `model-T6-state.onnx`, `model-dynamic.onnx`, `model-T6-fp16-cuda.onnx`."""
        name = f"model-T{self.T}" if self.layout == "unrolled" else f"model-{self.layout}"
        precision = "" if self.precision == "fp32" else f"-{self.precision}"
        target = "" if self.target == "cpu" else f"-{self.target}"
        return f"{name}{'-state' if self.with_state else ''}{precision}{target}.onnx"


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `parity` is None without a check; `from_state` compares from random membranes; `int8` says
    how the scales of an int8 graph were found and what accuracy it keeps (`kept`, None without a check), `fp16` what a
    graph in float16 keeps."""

    path: Path
    num_folded: int
    num_neurons: int
    size_bytes: int
    parity: Parity | None
    from_state: Parity | None
    uncounted: tuple[str, ...]
    int8: dict[str, Any] | None = None
    fp16: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def export_model(
    classifier: Classifier,
    path: Path | str,
    config: ExportConfig,
    images: NDArray[Any],
    *,
    labels: NDArray[np.int64] | None = None,
    source: Mapping[str, Any] | None = None,
    num_check: int = 1000,
    calibration: tuple[NDArray[Any], NDArray[np.int64] | None] | Calibration | None = None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Write a classifier as ONNX, with 256 reference images beside it, after checking it against PyTorch.

    Args:
        classifier: put into inference mode here. Only its neurons may carry anything from one step to the next.
        path: the `.onnx` file; the reference goes to `<path without .onnx>.reference.npz`.
        images: real input, uint8 `[N, C, H, W]` or frames `[N, T, C, H, W]`; float32 that is normalised already where
            `config.normalize` is off and the data have no pixels. The first `num_check` are compared, 256 are kept.
        labels: of the images, kept with the reference.
        source: what the model was made from, kept in the metadata.
        num_check: images compared with PyTorch; 0 leaves the check out.
        calibration: images and labels of the training set that an int8 graph takes its scales from, other ones than
            `images` where there are enough; or the scales themselves, of a network that was fine-tuned at them.
        tick: called with (what, done, all) during the check.

    Raises:
        ValueError: the network cannot be exported so, and why (FoldingError, ParityError among them). Nothing is
            written then, and earlier files stay as they were.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    classifier.eval()
    if num_check < 0:
        raise ValueError(f"num_check must be 0 or more, got {num_check}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} images need as many labels, got {len(labels)}")
    x = _as_input(classifier, images[: max(num_check, NUM_REFERENCE)], config)
    some = torch.from_numpy(x[:2]).to(classifier.mean.device)
    num_layers = check_steps(classifier, some, config.encoding, T=max(4, config.T, config.trained_T + 2))
    onnx_tracer = _onnx_tracer(classifier, config)
    found, graph = None, None
    if config.precision == "int8":
        found, graph = _calibrate(onnx_tracer, config, calibration, source, tick)
    graph = graph or _build(onnx_tracer, config, source, found.scales if found else None)
    if len(graph.neurons) != num_layers:
        raise ValueError(
            f"the network runs {num_layers} neuron layers, but only {len(graph.neurons)} of them reach its logits; "
            "take out those whose spikes are not used"
        )
    expected: Any = classifier  # what computes the graph's answers in PyTorch
    if found is not None:
        expected = Int8Network(onnx_tracer.tracer, found.scales)
    elif config.precision == "fp16":
        expected = HalfNetwork(onnx_tracer.tracer)
    parity = from_state = kept = None
    with atomic_write(path) as temporary, atomic_write(reference_path(path)) as reference:
        temporary.write_bytes(_serialised(graph.model, path))
        onnx.checker.check_model(str(temporary), full_check=True)
        if num_check:
            parity, from_state = _check(expected, temporary, config, x[:num_check], tick)
        _write_reference(reference, expected, x[:NUM_REFERENCE], labels, config, graph.neurons, source or {})
        size = temporary.stat().st_size
        if num_check and config.precision != "fp32":
            kept = _kept(classifier, temporary, config, x[:num_check], labels)
    return Exported(
        path,
        graph.num_folded,
        len(graph.neurons),
        size,
        parity,
        from_state,
        tuple(graph.uncounted),
        int8=None if found is None else found.to_dict() | {"kept": kept},
        fp16={"kept": kept} if config.precision == "fp16" else None,
    )


@dataclass(frozen=True)
class Graph:
    """A lowered graph with its metadata; `uncounted` names layers whose operations cannot be counted."""

    model: ir.Model
    neurons: list[Neurons]
    uncounted: list[str]
    num_folded: int


def build_graph(classifier: Classifier, config: ExportConfig) -> Graph:
    """Trace, fold, lower and describe, without writing anything."""
    return _build(_onnx_tracer(classifier, config), config)


def _onnx_tracer(classifier: Classifier, config: ExportConfig) -> OnnxTracer:
    tracer = Tracer(classifier, encoding=config.encoding, uint8=config.normalize)
    return OnnxTracer(tracer, fold_bn=config.fold_bn, half=config.precision == "fp16")


def _build(
    onnx_tracer: OnnxTracer,
    config: ExportConfig,
    source: Mapping[str, Any] | None = None,
    int8: Scales | None = None,
) -> Graph:
    model, num_folded = onnx_tracer.graph(config.steps, step=config.layout == "step", int8=int8)
    neurons = lower(
        model,
        T=config.steps,
        with_state=config.has_state,
        byte_spikes=int8 is not None,
        for_cpu=config.target == "cpu",
    )
    if not neurons:
        raise ValueError("the network has no LIF or IF neurons of tetdeploy, so there is nothing that spikes to export")
    encoders = split_encoder(model) if config.layout == "step" and config.encoding == "direct" else []
    layers = Layers(model.graph, neurons, config.steps, frames=config.encoding == "frames")
    _strip(model)
    description = _describe(onnx_tracer.tracer.classifier, config, neurons, encoders, layers, source)
    model.metadata_props[METADATA_KEY] = json.dumps(description)
    model.producer_name, model.producer_version, model.doc_string = "tetdeploy", __version__, None
    return Graph(model, neurons, layers.uncounted, num_folded)


def _serialised(model: ir.Model, path: Path) -> bytes:
    """A model as it goes to `path`. If the one that is there differs in its date alone, it is that one, date and all:
    calibrations and engines know a model by its SHA-256."""
    proto = ir.to_proto(model)
    new: bytes = proto.SerializeToString()
    try:
        there = path.read_bytes()
        created = parse_graph(there, path)[1]["created"]
    except (OSError, ValueError, KeyError):
        return new
    (entry,) = proto.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"created": created})
    return there if proto.SerializeToString() == there else new


def _describe(
    classifier: Classifier,
    config: ExportConfig,
    neurons: list[Neurons],
    encoders: list[Encoder],
    layers: Layers,
    source: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that serving needs, for the ONNX metadata."""
    normalization = None
    if config.normalize:
        mean, std = classifier.mean.flatten().tolist(), classifier.std.flatten().tolist()
        normalization = {"scale": 255.0, "mean": mean, "std": std}
    return {
        "format": 1,
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
        "target": config.target,
        "source": dict(source or {}),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """The versions that write an export."""
    modules = {name: importlib.import_module(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")}
    return {"tetdeploy": __version__, "python": platform.python_version()} | {
        name: str(module.__version__) for name, module in modules.items()
    }


def _calibrate(
    onnx_tracer: OnnxTracer,
    config: ExportConfig,
    calibration: tuple[NDArray[Any], NDArray[np.int64] | None] | Calibration | None,
    source: Mapping[str, Any] | None,
    tick: Callable[[str, int, int], None] | None,
) -> tuple[Calibration, Graph | None]:
    """Scales for an int8 graph, and the wanted graph at them where they were tried out on it: where it has as many
    steps as the training."""
    if isinstance(calibration, Calibration):
        return calibration, None
    if calibration is None:
        raise ValueError("precision int8 takes its scales from images of the training set; give some as calibration")
    x = _as_input(onnx_tracer.tracer.classifier, calibration[0], config)
    T = min(config.trained_T, x.shape[1]) if config.encoding == "frames" else config.trained_T
    trial = replace(config, T=T) if config.layout == "unrolled" and config.T < T else config
    steps = trial.T if trial.layout == "unrolled" else T
    trials: list[tuple[Scales, Graph]] = []

    def answers(scales: Scales) -> NDArray[np.float32]:
        graph = _build(onnx_tracer, trial, source, scales)
        trials.append((scales, graph))
        return per_step_logits(_in_memory(graph), x, steps)[:, :T]

    ticker = _ticker(tick, "calibrating", len(x))
    found = calibrate(onnx_tracer.tracer, x, calibration[1], T, answers, ticker)
    return found, next(graph for scales, graph in trials if scales == found.scales) if trial == config else None


def _in_memory(graph: Graph) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(ir.to_proto(graph.model).SerializeToString())
        return Engine(file)


def _kept(
    classifier: Classifier, file: Path, config: ExportConfig, x: NDArray[Any], labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    """What the graph keeps of the float32 network's answers on the checked images."""
    T = _steps(config, x)
    full = torch_logits(classifier, x, T)
    return kept_answers(full, per_step_logits(Engine(file), x, T), config.precision, labels)


def _check(
    classifier: Classifier,
    file: Path,
    config: ExportConfig,
    x: NDArray[Any],
    tick: Callable[[str, int, int], None] | None,
) -> tuple[Parity, Parity | None]:
    """The parity gate: at the graph's own T, or two steps beyond the training's; from a state too, where it has one."""
    engine = Engine(file, native=False)  # spikes are read by an overlay, from the plain graph
    T = _steps(config, x, beyond=2)
    what = f"the {config.layout} graph"
    parity = compare(classifier, engine, x, T, tick=_ticker(tick, "checking against PyTorch", len(x)))
    parity.check(what)
    if config.layout == "dynamic":
        for other in {1, min(T, config.trained_T)} - {T}:
            compare(classifier, engine, x[:64], other).check(f"{what} at T={other}")
    if not engine.with_state:
        return parity, None
    steps, some = engine.T or 1, x[:200]
    from_state = compare(
        classifier, engine, some, steps, from_random_state=True, tick=_ticker(tick, "from a state", len(some))
    )
    # One step from random membranes may leave two classes near a tie, so that here spikes decide, not classes.
    replace(from_state, top1_agreement=1.0).check(f"{what} from a non-zero state")
    return parity, from_state


def _steps(config: ExportConfig, x: NDArray[Any], *, beyond: int = 0) -> int:
    """How many steps to run `x`: as many as an unrolled graph has, or else `beyond` more than the training had; but no
    more than there are frames."""
    T = config.T if config.layout == "unrolled" else config.trained_T + beyond
    return min(T, x.shape[1]) if config.encoding == "frames" else T


def _ticker(tick: Callable[[str, int, int], None] | None, what: str, total: int) -> Callable[[int], None] | None:
    if tick is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tick(what, done, total)

    return advance


def _write_reference(
    file: Path,
    classifier: Classifier,
    x: NDArray[Any],
    labels: NDArray[np.int64] | None,
    config: ExportConfig,
    neurons: list[Neurons],
    source: Mapping[str, Any],
) -> None:
    """What PyTorch computes for the reference images, so that another machine can prove it computes the same."""
    T = _steps(config, x)
    per_step, counts = [], []
    for start in range(0, len(x), 32):
        logits, spikes = run_torch(classifier, x[start : start + 32], T)
        per_step.append(logits)
        counts.append(np.stack([s.reshape(T, s.shape[1], -1).sum(-1).T for s in spikes], axis=-1).astype(np.int64))
    arrays: dict[str, Any] = {
        "x": x,
        "per_step": np.concatenate(per_step),
        "spike_counts": np.concatenate(counts),
        "neurons": np.array([layer.name for layer in neurons]),
        "checkpoint_sha256": np.array(source.get("checkpoint_sha256", "")),
    }
    if labels is not None:
        arrays["labels"] = labels[: len(x)]
    with file.open("wb") as handle:
        np.savez_compressed(handle, **arrays)


def _as_input(classifier: Classifier, images: NDArray[Any], config: ExportConfig) -> NDArray[Any]:
    """The images as the graph takes them."""
    frames = config.encoding == "frames"
    if 0 in images.shape or images.ndim != 4 + frames:
        raise ValueError(f"images must be [N, {'T, ' * frames}C, H, W] and some, got {list(images.shape)}")
    if images.shape[-3:] != classifier.image_shape:
        raise ValueError(f"the network takes images {classifier.image_shape}, got {images.shape[-3:]}")
    if frames and config.layout == "unrolled" and images.shape[1] < config.T:
        raise ValueError(f"T={config.T} steps are checked on as many frames, got {images.shape[1]}; choose a smaller T")
    if config.normalize and images.dtype != np.uint8:
        raise ValueError(f"with normalisation in the graph the images must be uint8, got {images.dtype}")
    if not config.normalize and images.dtype == np.uint8:
        with torch.no_grad():
            return classifier.normalize(torch.from_numpy(images).to(classifier.mean.device)).cpu().numpy()
    if not config.normalize and (images.dtype != np.float32 or not np.isfinite(images).all()):
        raise ValueError(
            "without normalisation in the graph the images must be uint8, or finite float32 that is normalised "
            f"already; got {images.dtype}{'' if np.isfinite(images).all() else ' with NaN or infinite values'}"
        )
    return np.ascontiguousarray(images)


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
