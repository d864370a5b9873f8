"""`tetdeploy import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.options import STEPS, PlaceToWrite, json_option
from tetdeploy.cli.terminal import console, say_next
from tetdeploy.storage.files import check_writable, write_json
from tetdeploy.system.extras import import_extra


@click.command(
    "import",
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy import resnet19.pth --arch resnet19 -o runs/theirs
  tetdeploy import vggsnn.pth --arch vggsnn -o vggsnn.safetensors   # of their DVS-CIFAR10 frames
""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--arch", required=True, help="resnet19, vggsnn or vggsnn-strided.")
@click.option(
    "--out", "-o", required=True, type=PlaceToWrite(path_type=Path), help="A .safetensors file or a run folder."
)
@click.option("--data", help="What it was trained on: cifar10, cifar100, dvs-cifar10. [default: by the classes]")
@click.option("--T", "T", type=STEPS, help="Steps it was trained with, if known.")
@json_option
def import_(file: Path, arch: str, out: Path, json_path: Path | None, **options: Any) -> None:
    """Import a checkpoint of the TET authors' code, the state dict of their ResNet-19 or VGGSNN.

    FILE is read with torch.load(weights_only=True): no code in it runs. The names that their code gives one tensor are
    merged and must agree; unknown, missing and misshapen ones are listed.
    """
    import_extra("torch", "train")
    from tetdeploy.foreign import import_to_checkpoint, output_file

    check_writable(output_file(out), ".safetensors", remedy="choose another with --out")
    report = import_to_checkpoint(file, arch, out, **options)
    if json_path is not None:
        write_json(
            json_path,
            {"path": str(report.path), "data": report.data, "keys": report.num_keys, "merged": report.num_merged},
        )
    console.print(
        f"{report.num_keys} keys, {report.num_merged} of them second names of a tensor   "
        f"{report.config.model} {report.num_parameters / 1e6:.3g} M parameters, {report.config.num_classes} classes of "
        f"{report.data}"
    )
    console.print(str(report.path))
    if not report.names_data:
        console.print(
            f"its frames must be made as the authors made theirs, which those of --data {report.data} are not "
            "(docs/training.md), so the checkpoint names no data",
            style="yellow",
        )
    say_next(
        "export", out, "--T", options["T"] or 6, "--fold-bn", *(() if report.names_data else ("--data", "FRAMES.npz"))
    )
