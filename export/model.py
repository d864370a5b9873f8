"""`export_model`: trace, fold, lower, describe, check, write."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from tetdeploy.agreement import reference_path
from tetdeploy.arguments import check_type, check_whole
from tetdeploy.engine import Engine
from tetdeploy.folding import FoldingError
from tetdeploy.int8.calibration import METHODS, Calibration, calibrate
from tetdeploy.int8.network import Int8Network
from tetdeploy.int8.quantisation import Int8Error, Scales
from tetdeploy.networks import Classifier, check_classifier
from tetdeploy.storage.files import atomic_write, temporary_folder
from tetdeploy.storage.form import check_form
from tetdeploy.storage.provenance import ORIGIN
from tetdeploy.sweep import check_class_numbers
from tetdeploy.system.memory import reused_memory
from tetdeploy.traced_network import Runnable
from tetdeploy.tracing import Tracer, callers_autocast_off, float32_convolutions
from tetdeploy.wording import first_line

from .causality import check_reached, check_steps, float_types, steps_to_check
from .config import GPU_TARGETS, ExportConfig
from .description import describe, describe_check, in_bytes, serialised
from .encoder import find_encoder, is_one_layer, split_encoder
from .gate import check_graph, gate_runtimes
from .half import HalfNetwork
from .kept_answers import measure_kept, per_step_logits
from .lowering import lower
from .onnx_tracer import OnnxTracer
from .openvino import write_for_openvino
from .operations import Layers
from .parity import Parity
from .pooling import close_windows, refuse_divisors
from .progress import Progress, ticker
from .reference import NUM_REFERENCE, Answers, write_reference

CalibrationImages = tuple[NDArray[Any], NDArray[np.int64] | None]  # and their labels

_LARGE = 2**26  # bytes of a model: a collection of garbage, some tenths of a second, frees several times as many


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `parity` is ONNX Runtime's, None without a check; `from_state` compares from random
    membranes; `checked_under` names all runtimes that were compared with PyTorch; `int8` says how the scales of an int8
    graph were found, what accuracy it keeps (`kept`, None without a check) and which layers behind neurons, but for the
    readout, stay `in_float32`; `fp16` what a graph in float16 keeps."""

    path: Path
    num_folded: int
    num_neurons: int
    size_bytes: int
    parity: Parity | None
    from_state: Parity | None
    checked_under: tuple[str, ...]
    uncounted: tuple[str, ...]
    int8: dict[str, Any] | None = None
    fp16: dict[str, Any] | None = None

    @property
    def silent(self) -> list[str]:
        """Layers of which no neuron fired in the check, neither from u = 0 nor from random membranes."""
        checks = [check for check in (self.parity, self.from_state) if check is not None]
        return [name for name in checks[0].silent if all(name in check.silent for check in checks)] if checks else []

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "silent": self.silent}


@callers_autocast_off()
@float32_convolutions()  # of a network on a GPU, which the graph is compared with
def export_model(
    classifier: Classifier,
    path: Path | str,
    config: ExportConfig,
    images: NDArray[Any],
    *,
    labels: NDArray[np.int64] | None = None,
    source: Mapping[str, Any] | None = None,
    num_check: int = 1000,
    calibration: CalibrationImages | Calibration | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a classifier as ONNX, with up to 256 reference images beside it, after checking it against PyTorch.

    Args:
        classifier: put into inference mode here. Only its neurons may carry anything from one step to the next, and
            nothing may pass from one image of a batch to another.
        path: the `.onnx` file; the reference goes to `<path without .onnx>.reference.npz`.
        images: real input, uint8 `[N, C, H, W]` or frames `[N, T, C, H, W]`; float32 that is normalised already where
            `config.normalize` is off and the data have no pixels. The first `num_check` are compared, up to 256
            are kept.
        labels: of the images, whole numbers `[N]`, kept with the reference.
        source: what the model was made from, kept in the metadata: `network`, `data`, `training` and `provenance` of a
            checkpoint, its `checkpoint_sha256`, and whatever else.
        num_check: images compared with PyTorch; 0 leaves the check out.
        calibration: images and labels of the training set from which an int8 graph takes its scales, different from
            `images` where there are enough; or the scales themselves, for a network that was fine-tuned at them.
        progress: called with (what, done, all), done from 0 on, while images run: of the calibration, of the check,
            and of what int8 or fp16 keeps.

    Raises:
        ValueError: the network cannot be exported in this way; the message says why (FoldingError and ParityError are
            among them). Nothing is written then, and earlier files stay as they were.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    check_classifier(classifier)
    check_type("config", config, ExportConfig)
    check_form(source or {}, ORIGIN, "source")
    classifier.eval()
    x = _checked_input(classifier, config, images, labels, num_check)
    some = torch.from_numpy(x[:2]).to(classifier.mean.device)
    num_layers = check_steps(classifier, some, config.encoding, T=steps_to_check(config.trained_T, config.T))
    graph, expected, scales = build_graph(classifier, config, calibration=calibration, source=source, progress=progress)
    description, num_folded = graph.description, graph.num_folded
    check_reached(num_layers, len(description["neurons"]))
    _refuse_bfloat16(graph.model.graph)
    describe_check(graph.model, description, checked=num_check > 0)
    parity = from_state = kept = None
    answers = Answers()
    with atomic_write(path) as temporary, atomic_write(reference_path(path)) as reference:
        model = serialised(graph.model, path)
        temporary.write_bytes(model)
        size_bytes = len(model)
        del graph  # it has all weights, as has what it was made of, in circles
        if size_bytes > _LARGE:
            gc.collect()
        with _without_naming(temporary):
            _check_form(model, classifier)
            del model
            if num_check:
                parity, from_state = check_graph(expected, temporary, config, x[:num_check], answers, progress)
            with reused_memory():
                first = x[:NUM_REFERENCE]
                tick = ticker(progress, "reference images", len(first) - answers.num_images)
                write_reference(reference, expected, first, labels, config, description, answers, tick)
            if num_check and config.precision != "fp32":
                kept = measure_kept(classifier, temporary, config, x[:num_check], labels, progress)
    reduced: dict[str, Any] = {"kept": kept}
    if scales:
        behind = [layer for layer in description["layers"] if not (layer["from_input"] or "product" in layer)]
        in_float32 = [layer["name"] for layer in behind[:-1] if layer["precision"] == "fp32"]
        reduced = scales.to_dict() | reduced | {"in_float32": in_float32}
    return Exported(
        path,
        num_folded,
        len(description["neurons"]),
        size_bytes,
        parity,
        from_state,
        gate_runtimes(config) if num_check else (),
        tuple(description["uncounted"]),
        int8=reduced if config.precision == "int8" else None,
        fp16=reduced if config.precision == "fp16" else None,
    )


def _refuse_bfloat16(graph: ir.Graph) -> None:
    """Raises: ValueError: something is computed in bfloat16, for which runtimes have few operations."""
    casts = (node for node in graph.all_nodes() if node.op_type == "Cast")
    if any(cast.attributes["to"].as_int() == ir.DataType.BFLOAT16 for cast in casts):
        raise ValueError(
            "the network computes in bfloat16, as under torch.autocast, for which runtimes lack operations; compute in "
            "float32 in evaluation"
        )


def _check_form(model: bytes, classifier: Classifier) -> None:
    """Raises: ValueError: a node of a graph is not as ONNX describes it."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        others = float_types(classifier) - {torch.float32}
        floats = f"it has parameters in {', '.join(sorted(map(str, others)))}, call classifier.float()"
        raise ValueError(
            f"torch.onnx wrote a layer of the network otherwise than ONNX describes it: {first_line(error)}; nothing "
            f"was written: {floats if others else 'compute that layer by other operations'}"
        ) from error


@contextmanager
def _without_naming(file: Path) -> Iterator[None]:
    """Errors speak of the graph in place of a file that is gone by then."""
    name = "the graph that was to be written"
    try:
        yield
    except ValueError as error:
        if file.name not in str(error):
            raise
        raise ValueError(str(error).replace(str(file), name).replace(file.name, name)) from error


def _checked_input(
    classifier: Classifier,
    config: ExportConfig,
    images: NDArray[Any],
    labels: NDArray[np.int64] | None,
    num_check: int,
) -> NDArray[Any]:
    """The images that will be compared or kept, as the graph takes them."""
    if check_whole("num_check", num_check) < 0:
        raise ValueError(f"num_check must be 0 or more, got {num_check}")
    _check_labels(classifier, images, labels)
    return _as_input(classifier, config, images[: max(num_check, NUM_REFERENCE)])


def _check_labels(classifier: Classifier, images: NDArray[Any], labels: NDArray[np.int64] | None) -> None:
    if labels is not None:
        check_class_numbers(labels, len(images), len(classifier.class_names), "the network")


def _as_input(classifier: Classifier, config: ExportConfig, images: NDArray[Any]) -> NDArray[Any]:
    """The images as the graph takes them."""
    frames = config.encoding == "frames"
    if not isinstance(images, np.ndarray):
        raise ValueError(f"images must be a NumPy array, got {type(images).__name__}")
    if 0 in images.shape or images.ndim != 4 + frames:
        raise ValueError(f"images must be [N, {'T, ' * frames}C, H, W] and some, got {list(images.shape)}")
    if images.shape[-3:] != classifier.image_shape:
        raise ValueError(f"the network takes images {classifier.image_shape}, got {images.shape[-3:]}")
    if frames and config.layout == "unrolled" and images.shape[1] < config.T:
        raise ValueError(f"T={config.T} steps are checked on as many frames, got {images.shape[1]}; choose a smaller T")
    if config.normalize and images.dtype != np.uint8:
        raise ValueError(f"with normalisation in the graph the images must be uint8, got {images.dtype}")
    if not config.normalize and images.dtype == np.uint8:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(classifier.mean.device)
        with torch.no_grad():
            return classifier.normalize(pixels).cpu().numpy()
    if not config.normalize and (images.dtype != np.float32 or not np.isfinite(images).all()):
        raise ValueError(
            "without normalisation in the graph the images must be uint8, or finite float32 that is normalised "
            f"already; got {images.dtype}{'' if np.isfinite(images).all() else ' with NaN or infinite values'}"
        )
    return np.ascontiguousarray(images)


@dataclass(frozen=True)
class LoweredGraph:
    """A lowered graph with its metadata."""

    model: ir.Model
    description: dict[str, Any]
    num_folded: int


def build_graph(
    classifier: Classifier,
    config: ExportConfig,
    *,
    calibration: CalibrationImages | Calibration | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[LoweredGraph, Runnable, Calibration | None]:
    """Trace, fold, lower and describe, without writing anything.

    Args: see `export_model`.

    Returns:
        The graph; what computes its answers in PyTorch; and the scales of an int8 graph.
    """
    tracer = Tracer(classifier, encoding=config.encoding, uint8=config.normalize)
    onnx_tracer = OnnxTracer(tracer, fold_bn=config.fold_bn, half=config.precision == "fp16")
    try:
        if config.precision == "int8":
            graph, found = _build_int8(onnx_tracer, config, calibration, source, progress)
            return graph, Int8Network(tracer, found.scales, frozen=True), found
        graph = _build(onnx_tracer, config, source)
    except Int8Error as error:
        raise Int8Error(f"{error}; use --precision fp32") from error
    except FoldingError as error:
        options = "--no-fold-bn" if config.precision == "fp32" else "--precision fp32 --no-fold-bn"
        raise FoldingError(f"{error}, or export without folding ({options})") from error
    expected = HalfNetwork(tracer) if config.precision == "fp16" else classifier
    return graph, expected, None


def _build_int8(
    onnx_tracer: OnnxTracer,
    config: ExportConfig,
    calibration: CalibrationImages | Calibration | None,
    source: Mapping[str, Any] | None,
    progress: Progress | None,
) -> tuple[LoweredGraph, Calibration]:
    """The graph, at scales that are given or are found on images."""
    if isinstance(calibration, Calibration):
        return _build(onnx_tracer, config, source, calibration.scales), calibration
    if calibration is None:
        raise ValueError("precision int8 takes its scales from images of the training set; give some as calibration")
    if not isinstance(calibration, tuple | list) or len(calibration) != 2:
        raise ValueError(
            f"calibration must be a pair, (images, labels) or (images, None), got {type(calibration).__name__}"
        )
    _check_labels(onnx_tracer.tracer.classifier, *calibration)
    x = _as_input(onnx_tracer.tracer.classifier, config, calibration[0][:])  # of images on disk, too
    T = replace(config, T=config.trained_T).steps_on(x)
    trial = replace(config, T=max(config.T, T))  # scales are tried out on no fewer steps than the training had
    trials: list[tuple[Scales, LoweredGraph]] = []

    def answers(scales: Scales) -> NDArray[np.float32]:
        graph = _build(onnx_tracer, trial, source, scales)
        trials.append((scales, graph))
        tick = ticker(progress, f"trying scales {len(trials)} of {len(METHODS)}", len(x))
        return per_step_logits(_in_memory(graph), x, trial.steps_on(x), tick)[:, :T]

    tick = ticker(progress, "calibrating", len(x))
    with reused_memory():
        found = calibrate(onnx_tracer.tracer, x, calibration[1], T, answers, tick)
    if trial.steps != config.steps:
        return _build(onnx_tracer, config, source, found.scales), found
    return next(graph for scales, graph in trials if scales == found.scales), found


def _build(
    onnx_tracer: OnnxTracer,
    config: ExportConfig,
    source: Mapping[str, Any] | None,
    int8: Scales | None = None,
) -> LoweredGraph:
    step = config.layout == "step"
    refuse_divisors(onnx_tracer.tracer.program(config.steps, step=step).graph)
    model, num_folded = onnx_tracer.graph(config.steps, step=step, int8=int8)
    close_windows(model)
    neurons = lower(
        model,
        T=config.steps,
        with_state=config.has_state,
        byte_spikes=int8 is not None,
        for_cpu=config.target == "cpu",
    )
    if not neurons:
        raise ValueError("no LIF or IF of the network reaches its logits; take out those whose spikes are not used")
    encoder = find_encoder(model.graph) if config.layout == "step" and config.encoding == "direct" else []
    layers = Layers(model.graph, neurons, config.steps, frames=config.encoding == "frames", encoder=encoder)
    encoders = [] if config.target in GPU_TARGETS and is_one_layer(encoder) else split_encoder(model, encoder)
    classifier = onnx_tracer.tracer.classifier
    description = describe(model, classifier, config, neurons, encoders, layers, source, int8)
    if config.target == "openvino":
        write_for_openvino(model, int8=int8 is not None)
    return LoweredGraph(model, description, num_folded)


def _in_memory(graph: LoweredGraph) -> Engine:
    with temporary_folder() as folder:
        file = folder / "model.onnx"
        file.write_bytes(in_bytes(ir.to_proto(graph.model)))
        with _without_naming(file):
            return Engine(file)
