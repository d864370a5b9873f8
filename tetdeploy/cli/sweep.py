"""`tetdeploy sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetdeploy.cli.options import (
    as_model_input,
    console,
    data_dir_option,
    device_option,
    json_option,
    newest_export,
    progress_bar,
    runs_option,
    threads_option,
)

if TYPE_CHECKING:
    from tetdeploy.engine import Engine
    from tetdeploy.validate import Sweep


@click.command(
    epilog="""\b
Examples:
  tetdeploy sweep                                    the newest export, every T it holds
  tetdeploy sweep runs/r19/model-T6.onnx --T 1:6 --json r19.json
  tetdeploy sweep model-dynamic.onnx --T 1,2,4,8,16 --data test.npz     no torch needed
"""
)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--T", "steps", help="Steps: 6, 1:6 or 1,2,4. [default: 1 to the T of the graph; 1:8 where it is free]")
@click.option(
    "--data",
    help="A data set's name or FILE.npz with images and labels. [default: the test set of the training's data]",
)
@data_dir_option
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@device_option
@threads_option
@runs_option
@json_option
@click.option("--plot", type=click.Path(path_type=Path), help="Where the plot goes. [default: MODEL.sweep.png]")
def sweep(
    model: Path | None,
    steps: str | None,
    data: str | None,
    data_dir: Path,
    limit: int | None,
    batch_size: int,
    device: str,
    threads: int | None,
    runs: Path,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Accuracy, firing rate, operations, energy and latency of an exported model at each T.

    MODEL is an .onnx file; the newest export by default. Accuracy and operations at every T come from one run over the
    test set. Needs no torch.
    """
    from tetdeploy.engine import Engine
    from tetdeploy.validate import parse_steps

    engine = Engine(model or newest_export(runs), device=device, threads=threads)
    wanted = parse_steps(steps) if steps else default_steps(engine)
    result = run_sweep(engine, wanted, data, data_dir, limit=limit, batch_size=batch_size)
    print_sweep(result, engine)
    save_sweep(result, engine, json_path, plot)


def default_steps(engine: Engine) -> tuple[int, ...]:
    """Every T that an unrolled graph holds; where T is free 1..8, or with frames up to the T of the training."""
    free = int(engine.metadata["trained_T"]) if engine.encoding == "frames" else 8
    last = engine.T if engine.layout == "unrolled" and engine.T else free
    return tuple(range(1, last + 1))


def run_sweep(
    engine: Engine, steps: tuple[int, ...], data: str | None, data_dir: Path, *, limit: int | None, batch_size: int = 64
) -> Sweep:
    """Load the data and sweep, with a progress bar."""
    from tetdeploy.data import load_frames
    from tetdeploy.validate import sweep as measure

    name = data or str(engine.metadata["source"].get("data", {}).get("name", ""))
    if not name:
        raise click.UsageError(f"{engine.path.name} does not say what data it was trained on; name some with --data")
    if engine.encoding == "frames" and name.lower().endswith(".npz"):
        x, labels = load_frames(name)
    else:
        x, labels = _inputs(engine, name, data_dir)
    x, labels = x[:limit], labels[:limit]
    engine.check_T(max(steps), engine.check_input(x[:1]))
    with progress_bar() as bar:
        task = bar.add_task(f"{engine.path.name} on {name}", total=len(x))
        return measure(
            engine, x, labels, steps, data=name, batch_size=batch_size, tick=lambda done: bar.advance(task, done)
        )


def print_sweep(result: Sweep, engine: Engine) -> None:
    from tetdeploy.report import sweep_table

    trained_T = int(engine.metadata["trained_T"])
    console.print(f"{result.model}   {result.num_samples:,} images of {result.data}   {engine.layout}")
    console.print(sweep_table(result, trained_T))
    notes = [f"* the T of the training; energy per image: {_BILLS}"]
    if engine.layout == "unrolled" and not engine.with_state:
        notes.append(f"an unrolled graph always runs its T={engine.T} steps: the latency is the same at every T")
    if engine.metadata["uncounted"]:
        notes.append(f"operations not counted: {', '.join(engine.metadata['uncounted'])}")
    for note in notes:
        console.print(f"[dim]{note}[/dim]")


_BILLS = (
    "the first layer multiplies (4.6 pJ), all others add (0.9 pJ); "
    "exact: every layer whose input is not binary multiplies"
)


def save_sweep(result: Sweep, engine: Engine, json_path: Path | None, plot: Path | None) -> None:
    """Write JSON and PNG, beside the model unless told otherwise."""
    from tetdeploy.extras import MissingExtraError
    from tetdeploy.files import write_json
    from tetdeploy.report import plot_sweep

    json_path = json_path or engine.path.with_suffix(".sweep.json")
    write_json(json_path, result.to_dict())
    written = [str(json_path)]
    picture = plot or engine.path.with_suffix(".sweep.png")
    try:
        plot_sweep(result, picture, int(engine.metadata["trained_T"]))
        written.append(str(picture))
    except MissingExtraError as error:
        if plot is not None:
            raise
        console.print(f"[dim]no plot: {error}[/dim]")
    console.print("   ".join(written))
    if engine.encoding == "direct":
        console.print(f"next: tetdeploy predict {engine.path} IMAGE...")


def _inputs(engine: Engine, name: str, data_dir: Path) -> tuple[Any, Any]:
    """The test images or frames of a data set, as the graph takes them."""
    from tetdeploy.data import load_data

    test = load_data(name, "test", data_dir=data_dir, T=int(engine.metadata["trained_T"]))
    return as_model_input(engine, test.x, mean=test.mean, std=test.std), test.labels
