"""`tetdeploy export`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import TaskID

from tetdeploy.cli.cluster import FORMATS, export_for_cluster
from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.inputs import load_classifier, note_unfit_threshold
from tetdeploy.cli.options import STEPS, PlaceToWrite, data_dir_option, json_option, own_network_option, runs_option
from tetdeploy.cli.recipe import is_typed
from tetdeploy.cli.terminal import console, progress_bar, say_next
from tetdeploy.storage.files import check_writable, write_json
from tetdeploy.storage.run_folder import newest_run
from tetdeploy.system.extras import import_extra
from tetdeploy.wording import counted, shorten

if TYPE_CHECKING:
    from tetdeploy.export import ExportConfig, Exported, Parity
    from tetdeploy.export.nir_format import NirExported
    from tetdeploy.export.trained import Trained
    from tetdeploy.networks import Classifier

# What says how an ONNX graph runs and is checked; a NIR graph is one step of a normalised image, whatever runs it.
_ONNX_ONLY = {
    "T": "--T",
    "layout": "--layout",
    "precision": "--precision",
    "target": "--target",
    "num_calibration": "--calibrate",
    "with_state": "--with-state",
    "normalize": "--[no-]normalize",
    "data": "--data",
    "num_check": "--check",
}


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy export --T 6 --fold-bn                 the newest run, unrolled over 6 steps
  tetdeploy export runs/r19 --layout dynamic       any T in one call
  tetdeploy export runs/r19 --layout step          a frame at a time: streaming, early exit
  tetdeploy export runs/r19 --precision int8       convolutions of spikes in 8 bits: smaller, and faster on a CPU
  tetdeploy export runs/r19 --precision fp16 --target tensorrt-rtx      for tetdeploy build
  tetdeploy export runs/own --model my_package.my_module:my_network
  tetdeploy export runs/r19 --format nir -o r19.nir
  tetdeploy export runs/r19 --layout dynamic --format triton-repository -o models
  tetdeploy export runs/r19/model-step.onnx --format kserve --storage-uri s3://models/r19
""",
)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "file_format",
    default="onnx",
    show_default=True,
    type=click.Choice(("onnx", "nir", *FORMATS)),
    help="onnx, for tetdeploy's engine; nir, for other frameworks and neuromorphic chips; triton-repository or kserve, "
    "for many machines.",
)
@click.option("--T", "T", type=STEPS, help="Steps of an unrolled graph. [default: the training's]")
@click.option(
    "--layout",
    default="unrolled",
    show_default=True,
    help="unrolled (T fixed), dynamic (any T) or step (one step, state outside).",
)
@click.option(
    "--with-state",
    is_flag=True,
    help="An unrolled graph also takes and returns every membrane: long streams in chunks of T.",
)
@click.option(
    "--encoding",
    help="direct (one image at every step) or frames (input changes). [default: that of the training's data]",
)
@click.option(
    "--normalize/--no-normalize",
    default=True,
    show_default=True,
    help="Normalise inside the graph (uint8 in), or not (float32 in).",
)
@click.option("--fold-bn/--no-fold-bn", default=True, show_default=True, help="Fold BN into the convolutions (Eq. 6).")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(("fp32", "fp16", "int8")),
    help="int8: convolutions of spikes and their sums compute in 8 bits; fp16: layers between neurons in float16, on "
    "GPUs. Spikes stay exact.",
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    type=click.Choice(("cpu", "cuda", "tensorrt", "tensorrt-rtx", "openvino")),
    help="What will run the graph; docs/precision.md says which precision goes with which target.",
)
@click.option(
    "--calibrate",
    "num_calibration",
    default=512,
    show_default=True,
    type=click.IntRange(min=32),
    help="Training images from which int8 takes the scales of the input currents; a run of train --qat has its own "
    "scales.",
)
@own_network_option
@click.option("--data", help="Images for the check and the reference. [default: the training images of the run]")
@data_dir_option
@click.option(
    "--check",
    "num_check",
    default=1000,
    show_default=True,
    type=click.IntRange(min=0),
    help="Images compared with PyTorch; 0 is off.",
)
@click.option(
    "--out",
    "-o",
    type=PlaceToWrite(path_type=Path),
    help="The file (.onnx, .nir), or Triton's folder. [default: in RUN: model-T6.onnx, model-step-int8.onnx and so on, "
    "by layout, precision and target; model.nir; triton; kserve.yaml]",
)
@click.option("--name", help="Name of the served model (triton-repository, kserve). [default: the run folder's]")
@click.option("--storage-uri", help="Where the cluster finds the model (kserve): s3://..., pvc://..., ...")
@click.option("--image", help="The image that examples/serving/Dockerfile builds (kserve). [default: tetdeploy:latest]")
@runs_option
@json_option
@click.pass_context
def export(
    ctx: click.Context,
    /,
    run: Path | None,
    file_format: str,
    T: int | None,
    model: str | None,
    data: str | None,
    data_dir: Path,
    num_check: int,
    num_calibration: int,
    out: Path | None,
    runs: Path,
    json_path: Path | None,
    name: str | None,
    storage_uri: str | None,
    image: str | None,
    **options: Any,
) -> Path | None:
    """Write a trained network as ONNX (checked against PyTorch), as NIR, or for servers on many machines.

    RUN is a run folder, a checkpoint, or shards (RUN/shards: the last weights, not the best epoch's); by default the
    newest run. An ONNX model comes with MODEL.reference.npz: up to 256 reference images, of the training set or of
    --data, with PyTorch's answers. A NIR file is not run here; docs/nir.md says how other tools read it. For Triton and
    KServe, RUN may also be an exported model or, for Triton, a TensorRT engine; see docs/cluster.md.
    """
    _refuse_cluster_options(ctx, file_format)
    if file_format == "nir":
        _refuse_onnx_options(ctx)
        _export_nir(run, model, out, runs, json_path, options["encoding"])
        return None
    if is_typed(ctx, "num_calibration") and options["precision"] != "int8":
        raise click.UsageError("--calibrate goes with --precision int8")
    if is_typed(ctx, "T") and options["layout"] in ("dynamic", "step"):
        runs_it = "any T, which each call says" if options["layout"] == "dynamic" else "one step a call"
        text = f"--T has no effect with --layout {options['layout']}, whose graph runs {runs_it}"
        warnings.warn(text, RuntimeWarning, stacklevel=1)
    if file_format in FORMATS:
        export_for_cluster(ctx, _typed_onnx_options(ctx))
        return None
    for package, extra in (("torch", "train"), ("onnxscript", "train"), ("onnxruntime", "cpu")):
        import_extra(package, extra)
    from tetdeploy.export import ExportConfig

    trained, classifier = _load(run, runs, model)
    options["encoding"] = options["encoding"] or trained.encoding
    config = ExportConfig(T=T or trained.T, trained_T=trained.T, **options)
    path = out or trained.file.parent / config.file_name
    check_writable(path, ".onnx", remedy="choose another with --out")
    exported = _export_onnx(ctx, trained, classifier, path, config)
    if json_path is not None:
        write_json(json_path, exported.to_dict())
    print_exported(exported, config)
    note_unfit_threshold(exported.path)
    if ctx.parent is None or ctx.parent.command is not ctx.command:  # as for a cluster, which says itself what is next
        say_next(*_next(exported.path, config.target))
    return exported.path


def _export_onnx(
    ctx: click.Context, trained: Trained, classifier: Classifier, path: Path, config: ExportConfig
) -> Exported:
    """Load images, and export with a progress bar."""
    from tetdeploy.export import export_model
    from tetdeploy.export.reference import NUM_REFERENCE

    given = ctx.params
    num_check, int8 = given["num_check"], config.precision == "int8"
    scales = trained.scales if int8 else None
    if scales is not None and is_typed(ctx, "num_calibration"):
        raise click.UsageError(
            f"{trained.file} was fine-tuned at scales of its own (train --qat): leave out --calibrate"
        )
    (images, labels), calibration = trained.images(
        given["data"],
        given["data_dir"],
        config.encoding,
        num_check=max(num_check, NUM_REFERENCE),
        num_calibration=given["num_calibration"] if int8 and scales is None else 0,
    )
    with _progress() as progress:
        return export_model(
            classifier,
            path,
            config,
            images,
            labels=labels,
            source=trained.source,
            num_check=num_check,
            calibration=scales or calibration,
            progress=progress,
        )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that goes on, from its first call on: what, done, all."""
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield progress


def _typed_onnx_options(ctx: click.Context) -> list[str]:
    given = [option for name, option in _ONNX_ONLY.items() if is_typed(ctx, name)]
    return given + ["--no-fold-bn"] * (not ctx.params["fold_bn"])


def _refuse_cluster_options(ctx: click.Context, file_format: str) -> None:
    allowed = {"triton-repository": {"name"}, "kserve": {"name", "storage_uri", "image"}}.get(file_format, set())
    for name in ("name", "storage_uri", "image"):
        if name not in allowed and is_typed(ctx, name):
            goes_with = "triton-repository or kserve" if name == "name" else "kserve"
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --format {goes_with}")


def _refuse_onnx_options(ctx: click.Context) -> None:
    if given := _typed_onnx_options(ctx):
        raise click.UsageError(
            f"{', '.join(given)} cannot go with --format nir: a NIR graph is one step of a normalised image with BN "
            "folded, and whoever runs it chooses T"
        )


def _export_nir(
    run: Path | None, model: str | None, out: Path | None, runs: Path, json_path: Path | None, encoding: Any
) -> None:
    for package, extra in (("torch", "train"), ("onnxscript", "train"), ("nir", "nir")):
        import_extra(package, extra)
    from tetdeploy.export.nir_format import export_nir

    trained, classifier = _load(run, runs, model)
    path = out or trained.file.parent / "model.nir"
    check_writable(path, ".nir", remedy="choose another with --out")
    exported = export_nir(
        classifier,
        path,
        trained_T=trained.T,
        encoding=encoding or trained.encoding,
        source=trained.source,
    )
    if json_path is not None:
        write_json(json_path, exported.to_dict())
    print_nir(exported)


def print_nir(exported: NirExported) -> None:
    nodes = ", ".join(f"{count} {kind}" for kind, count in exported.nodes.items() if kind not in ("Input", "Output"))
    console.print(f"folded {exported.num_folded} BN | {nodes} | {exported.num_edges} edges")
    console.print(f"{exported.path}   {exported.size_bytes / 1e6:.1f} MB")
    console.print("it takes normalised images, and a step is 0.1 ms: docs/nir.md", style="dim")


def print_exported(exported: Exported, config: ExportConfig) -> None:
    """What was done and how far the result is from PyTorch."""
    steps = f" T={config.T}" if config.layout == "unrolled" else ""
    lowered = f"lowered {config.layout}{steps}"
    console.print(f"folded {exported.num_folded} BN | {exported.num_neurons} neuron layers | {lowered}")
    for what, parity in (("from u = 0", exported.parity), ("from random u", exported.from_state)):
        if parity is not None:
            _print_parity(what, parity)
    if exported.parity is not None and exported.silent:
        _print_silent(exported.silent, exported.parity.num_images)
    if exported.int8 is not None:
        _print_int8(exported.int8)
    if exported.fp16 is not None and (kept := exported.fp16["kept"]):
        _print_kept(kept, "fp16")
    if exported.parity is None:
        console.print("not checked against PyTorch (--check 0)")
    elif config.target == "openvino":
        console.print(
            "checked under OpenVINO too, within the same limits"
            if "openvino" in exported.checked_under
            else "OpenVINO itself was not run, as it is not installed here: pip install 'tetdeploy[openvino]'",
        )
    if exported.uncounted:
        names = ", ".join(exported.uncounted)
        console.print(f"operations of these layers will not be counted: {names} (why: docs/energy.md)")
    console.print(f"{exported.path}   {exported.size_bytes / 1e6:.1f} MB")


def _print_parity(what: str, parity: Parity) -> None:
    console.print(
        f"checked {what} on {parity.num_images:,} images at T={parity.T}: "
        f"top-1 agreement {parity.top1_agreement:.2%}   "
        f"spike mismatch {parity.spike_mismatch_rate * 1e6:.2f} ppm "
        f"({parity.local_mismatch_rate * 1e6:.2f} in the worst layer by itself)   "
        f"largest logit error {parity.max_abs_logit_error:.1e}"
    )
    if parity.amplified is not None:
        there, floor = (f"{rate * 1e6:,.0f} ppm" for rate in parity.amplified)
        itself = f"PyTorch rounded otherwise differs from itself in {floor}"
        begun = "all began within rounding of a threshold"
        console.print(
            f"  the network amplifies rounding: on the images that differ most {there} differ, and "
            f"{begun if parity.at_threshold else itself}"
        )


def _print_silent(silent: list[str], num_images: int) -> None:
    console.print(
        f"no neuron of {shorten(silent)} fired on the {num_images:,} checked images: what reads them was compared at "
        "0 only; train longer, or with a larger gamma or a lower v_th, or check more images with --check",
        style="yellow",
    )


def _next(path: Path, target: str) -> tuple[Path | str, ...]:
    """What goes on with a model for this target."""
    if target in ("tensorrt", "tensorrt-rtx"):
        return ("build", path, "--package", target)
    where = {"cuda": ("--device", "cuda"), "openvino": ("--runtime", "openvino")}
    return ("sweep", path, *where.get(target, ()))


def _print_int8(int8: dict[str, Any]) -> None:
    number = len(int8["in_float32"])
    others = f" ({counted(number, 'layer')} between neurons in float32)" if number else ""
    convolutions = f"int8: {counted(len(int8['scales']), 'convolution')}{others}"
    if int8["fine_tuned"]:
        console.print(f"{convolutions}, at the scales that the run was fine-tuned at (--qat)")
    else:
        found = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in int8["accuracy"].items())
        console.print(
            f"{convolutions}, scales by {int8['method']} on {int8['num_images']:,} training images (accuracy there: "
            f"{found})"
        )
    if kept := int8["kept"]:
        _print_kept(kept, "int8")


def _print_kept(kept: dict[str, Any], precision: str) -> None:
    from tetdeploy.report.result_table import ResultTable

    headers = {
        "agreement": "agrees\nwith fp32",
        f"accuracy_{precision}": "accuracy",
        "accuracy_fp32": "accuracy\nof fp32",
    }
    shown = [name for name in headers if name in kept]  # without labels no accuracies
    table = ResultTable(numbers=("T", *(headers[name] for name in shown)))
    for k, T in enumerate(kept["T"]):
        table.add_row(str(T), *(f"{kept[name][k]:.2%}" for name in shown))
    console.print(f"{precision} on the {kept['num_images']:,} checked images")
    console.print(table)


def _load(run: Path | None, runs: Path, own: str | None) -> tuple[Trained, Classifier]:
    """What a checkpoint says, and its network; shards, which hold other weights than the checkpoint of their run, are
    told."""
    from tetdeploy.checkpoint import read_checkpoint
    from tetdeploy.export.trained import Trained

    if run is None:
        run = newest_run(runs)
        console.print(f"exporting {run}", style="dim")
    checkpoint = read_checkpoint(run)
    trained = Trained.of(checkpoint)
    if trained.file.is_dir():
        besides = " and not their moving average" if trained.metadata["training"].get("ema") else ""
        epoch, step = (trained.metadata.get("restart", {}).get(name, 0) for name in ("epoch", "step"))
        console.print(
            f"{trained.file}: the weights after {epoch} epochs and {step} steps, not the best epoch's{besides}",
        )
    return trained, load_classifier(checkpoint, own)
