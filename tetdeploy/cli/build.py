"""`tetdeploy build`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.options import AT_LEAST_1, check_distinct, json_option, runs_option
from tetdeploy.cli.terminal import console, progress_bar
from tetdeploy.storage.files import write_json
from tetdeploy.storage.run_folder import newest_export
from tetdeploy.system.extras import import_extra

if TYPE_CHECKING:
    from tetdeploy.export.tensorrt import Built


def parse_range(text: str) -> tuple[int, int, int]:
    """`MIN:OPT:MAX`, or one number for all three."""
    try:
        numbers = [int(part) for part in text.split(":")]
        least, usual, most = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither MIN:OPT:MAX nor a number, such as 1:8:64 or 8") from None
    if not 1 <= least <= usual <= most:
        raise click.BadParameter(f"{text}: 1 <= MIN <= OPT <= MAX must hold")
    return least, usual, most


def parse_architectures(text: str) -> tuple[str, ...]:
    """`8.6,8.9`."""
    return tuple(part.strip() for part in text.split(","))


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy build                                     the newest export, for all cards that TensorRT-RTX knows
  tetdeploy build runs/r19/model-T4.onnx --batch 1:32:256 --gpu-arch 8.9 --verbose
  tetdeploy build model-dynamic.onnx --T 1:4:8
  tetdeploy build model-T4.onnx --package tensorrt --timing-cache timings.bin      on the machine with the GPU
  tetdeploy predict model-T4.engine cat.png --device tensorrt
""",
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option(
    "--package",
    type=click.Choice(("auto", "tensorrt", "tensorrt-rtx")),
    default="auto",
    show_default=True,
    help="tensorrt builds for the GPU at hand, tensorrt-rtx for GeForce and RTX cards on any machine; "
    "auto is the one installed.",
)
@click.option(
    "--batch",
    type=parse_range,
    metavar="MIN:OPT:MAX",
    default="1:8:64",
    show_default=True,
    help="Images of one call.",
)
@click.option(
    "--T",
    "T",
    type=parse_range,
    metavar="MIN:OPT:MAX",
    help="Steps of one call, of a dynamic graph. [default: 1, the training's T, twice that or 16]",
)
@click.option(
    "--gpu-arch",
    "gpu_architectures",
    type=parse_architectures,
    metavar="X.Y[,...]",
    help="Compute capabilities. [default: all from 8.0 on that tensorrt-rtx has; the GPU at hand for tensorrt]",
)
@click.option("--workspace-mb", type=AT_LEAST_1, help="Most scratch memory of a kernel. [default: no limit]")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep TensorRT's measurements here for the next build (tensorrt only).",
)
@click.option("--verbose", "-v", is_flag=True, help="A table of the kernels: precisions, fused operators, neurons.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The .engine file. [default: MODEL.engine]")
@runs_option
@json_option
def build(
    model: Path | None,
    verbose: bool,
    out: Path | None,
    runs: Path,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Build a TensorRT engine from an exported model.

    MODEL is an .onnx file; the newest export by default. Precision and layout are those of the graph. Beside the engine
    lies a manifest, MODEL.engine.json: the model's metadata, library, GPU architectures, hash of the graph, kernels.
    """
    import_extra("onnx", "rtx")
    from tetdeploy.export.tensorrt import BuildConfig, build_engine
    from tetdeploy.runtimes.manifest import manifest_path

    model = model or newest_export(runs)
    out = out or model.with_suffix(".engine")
    cache = options["timing_cache"]
    check_distinct({"--out": out, "the manifest": manifest_path(out), "--timing-cache": cache, "--json": json_path})
    with progress_bar() as bar:
        task = bar.add_task("building", total=None)
        built = build_engine(
            model,
            out,
            BuildConfig(**options),
            progress=lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total),
        )
    if json_path is not None:
        write_json(
            json_path, {"engine": str(built.path)} | {k: v for k, v in built.manifest.items() if k != "metadata"}
        )
    print_built(built, verbose=verbose)


def print_built(built: Built, *, verbose: bool) -> None:
    """Where it runs, what it is made of, and where it lies."""
    manifest = built.manifest
    free = "".join(f"   {name} {':'.join(map(str, manifest[name]))}" for name in ("batch", "T") if manifest[name])
    console.print(
        f"{manifest['package']} {manifest['version']} for GPU architecture "
        f"{', '.join(manifest['gpu_architectures'])}{free}"
    )
    precisions = Counter("+".join(layer["outputs"]) for layer in manifest["layers"])
    kinds = ", ".join(f"{count} {name}" for name, count in precisions.most_common())
    made_of = f"{len(manifest['layers'])} kernels by the precision they write: {kinds}" if kinds else "kernels unknown"
    console.print(f"built in {manifest['build_seconds']:.1f} s   {made_of}")
    if verbose:
        console.print(_kernels(manifest["layers"]))
    console.print(f"{built.path}   {manifest['engine_bytes'] / 1e6:.1f} MB")
    console.print("it was built, not run; tetdeploy predict --device tensorrt runs it on an NVIDIA GPU", style="dim")


def _kernels(layers: list[dict[str, Any]]) -> Any:
    from tetdeploy.report.result_table import ResultTable

    table = ResultTable("kernel", "reads", "writes", "operators fused", "neurons")
    for layer in layers:
        operators = " ".join(name if n == 1 else f"{n}x{name}" for name, n in layer["operators"].items())
        reads, writes = (", ".join(layer[side]) for side in ("inputs", "outputs"))
        table.add_row(layer["type"], reads, writes, operators, ", ".join(layer["neurons"]))
    return table
