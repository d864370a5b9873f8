"""`tetdeploy landscape`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.class_names import check_classes
from tetdeploy.cli.errors import INTERRUPTED
from tetdeploy.cli.inputs import load_classifier, load_part
from tetdeploy.cli.options import (
    AT_LEAST_1,
    PARTS,
    STEPS,
    check_distinct,
    check_plot,
    data_dir_option,
    default_plot,
    json_option,
    own_network_option,
    runs_option,
    torch_batch_option,
    torch_device_option,
    torch_precision_option,
)
from tetdeploy.cli.terminal import console, progress_bar
from tetdeploy.names import is_npz
from tetdeploy.steps import trained_T
from tetdeploy.storage.files import check_writable, write_json
from tetdeploy.storage.provenance import own_fraction
from tetdeploy.storage.run_folder import SHARDS_NAME, newest_run
from tetdeploy.system.extras import import_extra
from tetdeploy.system.signals import deferred_interrupt

if TYPE_CHECKING:
    from tetdeploy.checkpoint import Checkpoint
    from tetdeploy.networks import Classifier
    from tetdeploy.train.landscape import Landscape, LandscapeConfig


@click.command(
    epilog="""\b
Examples:
  tetdeploy landscape                                      round the newest run's weights
  tetdeploy landscape runs/sdt runs/tet                    Figure 2: two minima, both losses, one scale
  tetdeploy landscape runs/tet --points 41 --extent 0.5 -o closer.npz    a closer look
  tetdeploy landscape runs/tet --split test --limit 10000 --device cuda -o test.npz
"""
)
@click.argument("checkpoints", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option("--T", "T", type=STEPS, help="Time steps. [default: the training's]")
@click.option(
    "--points", default=21, show_default=True, help="Grid points along each direction, an odd number up to 1001."
)
@click.option("--extent", default=1.0, show_default=True, help="The grid runs from -extent to extent, in filter norms.")
@click.option("--seed", default=0, show_default=True, help="Of the two random directions.")
@click.option(
    "--split",
    default="train",
    show_default=True,
    type=PARTS,
    help="Images to measure on; train and validation are the run's own parts; for several runs, the images that all "
    "trained on, or all held out.",
)
@click.option("--limit", default=1000, show_default=True, type=AT_LEAST_1, help="Use at most this many images.")
@click.option("--radius", type=float, help="Radius of the sharpness measure, up to the extent. [default: half of it]")
@click.option("--data", help="Another data set. [default: the training's]")
@data_dir_option
@own_network_option
@torch_batch_option
@torch_device_option
@torch_precision_option
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The numbers. [default: RUN/landscape.npz]")
@click.option("--plot", type=click.Path(path_type=Path), help="The plot. [default: beside the numbers, .png]")
@runs_option
@json_option
@click.pass_context
def landscape(
    ctx: click.Context,
    /,
    checkpoints: tuple[Path, ...],
    T: int | None,
    split: str,
    limit: int,
    radius: float | None,
    data: str | None,
    data_dir: Path,
    model: str | None,
    out: Path | None,
    plot: Path | None,
    runs: Path,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Loss landscape round one or more trained networks (Figure 2).

    Both losses, L_SDT (Eq. 7) and L_TET (Eq. 9), and the accuracy on a grid along two random filter-normalised
    directions. Writes the numbers (.npz) and a contour plot (.png). Ctrl-C keeps what is measured; the same command
    goes on from there.

    Sharpness is the mean rise of a loss over the grid points at most RADIUS away from the trained weights.
    """
    import_extra("torch", "train")
    from tetdeploy.checkpoint import read_checkpoint, trained_on
    from tetdeploy.train.landscape import LandscapeConfig

    checkpoints = checkpoints or (newest_run(runs),)
    weights = [read_checkpoint(path) for path in checkpoints]
    files, metadata = [each.file for each in weights], [each.metadata for each in weights]
    source = _common("data", files, list(map(trained_on, metadata, files))) if data is None else data
    steps = [trained_T(m) for m in metadata]
    if metadata[0]["data"]["encoding"] == "frames" and not is_npz(source) and len(set(steps)) > 1:
        raise ValueError(
            f"recordings of {source} are cut into as many frames as a run was trained with, whatever --T, and these "
            f"differ ({_listed(files, steps)}); measure each run by itself"
        )
    config = LandscapeConfig(T=T or _common("T", files, steps), **options)
    step = config.extent / (config.points // 2)
    radius = max(config.extent / 2, step) if radius is None else radius
    if not 0 < radius < math.inf:
        raise ValueError(f"--radius is {radius:g}; it must be above 0 and finite")
    if radius < step * (1 - 1e-9):
        raise ValueError(f"--radius {radius:g} is shorter than a step of the grid, {step:g}; give more --points")
    if radius > config.extent * (1 + 1e-9):
        raise ValueError(
            f"--radius {radius:g} leaves the grid, which ends at {config.extent:g}; give a larger --extent"
        )
    path = out or _default_out(files)
    plot = _checked_plot(path, plot, json_path, named=out is not None)
    images = _images(source, split, limit, data_dir, files, metadata)
    classifiers = _classifiers(checkpoints, weights, model)
    del weights  # their tensors
    for name, classifier in classifiers.items():
        check_classes(name, classifier.class_names, images.name, images.class_names)
    result = _measure(classifiers, images, config, path)
    if not result.complete:
        kept = f", kept in {path}; the same command goes on from there" if result.finished else ""
        console.print(f"interrupted after {result.finished:,} of {result.total:,} points{kept}")
        ctx.exit(INTERRUPTED)
    _report(result, path, plot, json_path, radius, f"{images.name}, {split}")


def _checked_plot(path: Path, plot: Path | None, json_path: Path | None, *, named: bool) -> Path:
    """Where the plot goes; outputs that cannot be written, or are one file, are refused before hours of measuring."""
    check_writable(path, ".npz", begins=b"PK", remedy="choose another with --out")
    plot = plot or default_plot(path, named=named)
    check_writable(plot, remedy="choose another with --plot")
    check_distinct({"--out": path, "--plot": plot, "--json": json_path})
    check_plot(plot)
    return plot


def _measure(classifiers: dict[str, Classifier], images: Any, config: LandscapeConfig, path: Path) -> Landscape:
    """Measure with a progress bar, until done or interrupted."""
    from tetdeploy.train.landscape import measure_landscape

    with deferred_interrupt() as interrupt, progress_bar() as bar:
        task = bar.add_task(f"{', '.join(classifiers)} on {len(images):,} images of {images.name}")

        def begun(finished: int, total: int) -> None:
            bar.update(task, completed=finished, total=total)
            if finished:
                console.print(f"{path} holds {finished:,} of {total:,} points already")

        return measure_landscape(
            classifiers,
            images.x[:],
            images.labels,
            config,
            path,
            begun=begun,
            point_done=lambda: bar.advance(task),
            stop=interrupt.is_set,
        )


def _report(result: Landscape, path: Path, plot: Path, json_path: Path | None, radius: float, images: str) -> None:
    """Plot and JSON, and then the table: `| head` may end the printing."""
    from tetdeploy.report.landscape import landscape_table, plot_landscape, summarise

    settings = result.settings
    count, frames = settings["num_images"], settings.get("frames")
    steps = f"T={settings['T']}" + (f" of {frames} frames" if frames else "")
    plot_landscape(result, plot, radius=radius, title=f"{count:,} images of {images}   {steps}")
    rows = summarise(result, radius)
    if json_path is not None:
        content = {"numbers": str(path), "plot": str(plot), "images": images, "radius": radius}
        write_json(json_path, content | {"settings": dict(settings), "rows": rows})
    console.print(landscape_table(result, radius))
    if any(value is None for row in rows for value in row.values()):
        console.print(
            f"- : some losses at most {radius:g} away are not finite; take a smaller --extent, or --precision fp32",
            style="yellow",
        )
    rises = f"rises over the grid points at most {radius:g} away; {count:,} images of {images}; {steps}"
    console.print(rises, style="dim")
    console.print("   ".join(str(written) for written in (path, plot, json_path) if written is not None))
    console.print("next: look at the plot; a flatter minimum has fewer lines inside the circle")


def _images(
    source: str, split: str, limit: int, data_dir: Path, files: list[Path], metadata: list[Mapping[str, Any]]
) -> Any:
    """The images to measure on, a fair sample of at most `limit`. Recordings are cut for the T of the first run."""
    from tetdeploy.data import Framing, warn_of_other_framing
    from tetdeploy.data.images import mixed_order

    part = partial(load_part, source, split, data_dir=data_dir, T=trained_T(metadata[0]))
    fractions = [own_fraction(m) for m in metadata]
    if split != "validation":
        images = part(fraction=max(fractions), known=metadata[0]["data"])
    else:
        runs = zip(fractions, (m["data"] for m in metadata), strict=True)
        distinct = {(fraction, known.get("fingerprint")): known for fraction, known in runs}
        # What the smaller share holds out is part of what the larger one does: no run trained on the images.
        images = min((part(fraction=fraction, known=known) for (fraction, _), known in distinct.items()), key=len)
    framings = [Framing.of(m["data"]) for m in metadata]
    for file, framing in zip(files, framings, strict=True):
        if framing != framings[0]:  # of which `load_part` warns
            warn_of_other_framing(images, framing, str(file))
    return images.select(mixed_order(len(images))[:limit])


def _classifiers(paths: tuple[Path, ...], weights: list[Checkpoint], model: str | None) -> dict[str, Classifier]:
    """The checkpoints' classifiers by a name for the table and the plot."""
    named = [path.resolve() for path in paths]  # "." has no name
    names = [path.name if path.is_dir() else path.parent.name + "/" + path.name for path in named]
    if len(set(names)) < len(names):
        names = _without_common_parts(named)
    if len(set(names)) < len(names):
        raise ValueError(f"a checkpoint is named twice: {', '.join(names)}")
    return {name: load_classifier(each, model) for name, each in zip(names, weights, strict=True)}


def _without_common_parts(paths: Sequence[Path]) -> list[str]:
    """Several paths without the parts that all of them begin or end with; something of each remains."""
    parts = [path.parts for path in paths]
    most = min(map(len, parts)) - 1
    first = next((k for k in range(most) if len({own[k] for own in parts}) > 1), most)
    last = next((k for k in range(most - first) if len({own[-1 - k] for own in parts}) > 1), most - first)
    return [str(Path(*own[first : len(own) - last])) for own in parts]


def _default_out(files: list[Path]) -> Path:
    others = "".join(f"-{_name(file)}" for file in files[1:])
    return _run(files[0]) / f"landscape{others}.npz"


def _run(file: Path) -> Path:
    """The folder of the run that weights are of; shards lie in a folder of it."""
    in_shards = file.is_dir() and file.parent.absolute().name == SHARDS_NAME
    return Path(os.path.normpath(file.parent / "..")) if in_shards else file.parent


def _name(file: Path) -> str:
    return _run(file).resolve().name


def _common(what: str, files: list[Path], values: list[Any]) -> Any:
    """The one value that all checkpoints have."""
    if len(set(values)) > 1:
        listed = _listed(files, values)
        raise ValueError(f"the checkpoints were trained with different {what} ({listed}); say which with --{what}")
    return values[0]


def _listed(files: list[Path], values: list[Any]) -> str:
    return ", ".join(f"{_name(file)}: {value}" for file, value in zip(files, values, strict=True))
