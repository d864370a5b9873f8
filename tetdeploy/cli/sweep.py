"""`tetdeploy sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.inputs import default_steps, load_inputs, note_other_checkpoint, note_replaced
from tetdeploy.cli.options import (
    AT_LEAST_1,
    ChosenModel,
    check_distinct,
    check_plot,
    data_dir_option,
    default_plot,
    limit_option,
    opens_model,
    output_path,
    result_option,
    steps_option,
    test_data_option,
)
from tetdeploy.cli.terminal import console, print_notes, progress_bar, say_next
from tetdeploy.storage.files import check_writable, write_json
from tetdeploy.storage.run_folder import CONFIG_NAME
from tetdeploy.system.extras import MissingExtraError, import_extra

if TYPE_CHECKING:
    from tetdeploy.engine import Engine
    from tetdeploy.sweep import Sweep


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy sweep                                    the newest export, every T it holds
  tetdeploy sweep runs/r19/model-T6.onnx --T 1:6 --json r19.json
  tetdeploy sweep model-dynamic.onnx --T 1,2,4,8,16 --data test.npz     no torch needed
  tetdeploy sweep --layers --other-ops               where the energy goes, and what it leaves out
  tetdeploy sweep --energy once --ac-pj 0.03 --mac-pj 0.23
""",
)
@steps_option("1 to the graph's T; 1:8 where T is free")
@test_data_option
@data_dir_option
@limit_option
@click.option("--batch-size", default=64, show_default=True, type=AT_LEAST_1)
@click.option(
    "--energy",
    "conventions",
    multiple=True,
    type=click.Choice(("paper", "exact", "once")),
    default=("paper", "exact"),
    show_default="paper, exact",
    help="Energies in the table. paper: the first layer multiplies, all others add; exact: every layer whose input is "
    "not binary multiplies; once: as paper, but for a constant image the first layer multiplies once. May be repeated; "
    "the JSON has all.",
)
@click.option("--layers", "show_layers", is_flag=True, help="Also a table of the layers, at the T of the training.")
@click.option("--other-ops", is_flag=True, help="Also what no energy includes: biases, residual sums, the neurons.")
@click.option(
    "--ac-pj",
    type=float,
    help="Picojoules of an accumulate. [default: by the layer's precision, 0.9 for fp32; 45 nm]",
)
@click.option(
    "--mac-pj",
    type=float,
    help="Picojoules of a multiply-accumulate. [default: by the layer's precision, 4.6 for fp32; 45 nm]",
)
@opens_model()
@result_option(".sweep.json")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Where the plot goes. [default: as --json, .png]"
)
def sweep(
    chosen: ChosenModel,
    steps: tuple[int, ...] | None,
    data: str | None,
    data_dir: Path,
    limit: int | None,
    batch_size: int,
    conventions: tuple[str, ...],
    show_layers: bool,
    other_ops: bool,
    ac_pj: float | None,
    mac_pj: float | None,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Accuracy, firing rate, operations, energy and latency of an exported model at each T.

    MODEL is an .onnx file; the newest export by default. Accuracy and operations at every T come from one run over the
    test set. Needs no torch.
    """
    from tetdeploy.picojoules import energy_constants
    from tetdeploy.sweep import NUM_TIMED, check_images
    from tetdeploy.sweep import sweep as measure

    if plot is not None:
        import_extra("matplotlib", "report")  # before any work
    engine = chosen.engine()
    note_other_checkpoint(engine)
    named, json_path = json_path is not None, output_path(json_path, engine, ".sweep.json")
    picture = plot or default_plot(json_path, named=named)
    check_writable(picture, remedy="choose another with --plot")
    check_distinct({"--json": json_path, "--plot": picture})
    if plot is not None:
        check_plot(plot)
    wanted = steps or default_steps(engine)
    own = ac_pj is not None or mac_pj is not None
    constants = energy_constants(engine.precision, ac_pj=ac_pj, mac_pj=mac_pj) if own else None
    name, x, labels = load_inputs(engine, data, data_dir, limit)
    check_images(engine, x, labels, max(wanted))
    note_replaced(json_path, name, len(x))
    with progress_bar("images") as bar:
        counted = bar.add_task(f"{engine.path.name} on {name}", total=len(x))
        timed = bar.add_task("timing one image at each T", total=NUM_TIMED + 2, visible=False, rate=False)
        result = measure(
            engine,
            x,
            labels,
            wanted,
            data=name,
            batch_size=batch_size,
            constants=constants,
            tick=lambda done: bar.advance(counted, done),
            timing=lambda done: bar.update(timed, advance=done, visible=True),
        )
    written = save_sweep(result, engine, json_path, picture)  # before a line is printed: `| head` may end that
    print_sweep(result, engine, conventions)
    print_details(result, engine, conventions, layers=show_layers, other_ops=other_ops)
    console.print("   ".join(map(str, written)))
    in_run = json_path.name.endswith(".sweep.json") and (json_path.parent / CONFIG_NAME).is_file()
    say_next("report", json_path.parent if in_run else json_path)


def print_sweep(result: Sweep, engine: Engine, conventions: Sequence[str]) -> None:
    from tetdeploy.report.numbers import energy
    from tetdeploy.report.tables import sweep_table, uncounted_note

    trained_T = engine.trained_T
    console.print(f"{result.model}   {result.num_samples:,} images of {result.data}   {engine.layout}")
    console.print(sweep_table(result, trained_T, conventions=conventions))
    star = "* the T of the training; " if trained_T in [row.T for row in result.rows] else ""
    notes = [
        f"{star}energy per image: {_bills(result, conventions)}",
        f"ANN: the same layers once, all inputs multiplied, {energy(result.details['ann']['energy_pj'])}",
    ]
    if engine.is_fixed:
        notes.append(f"an unrolled graph always runs its T={engine.T} steps: the latency is the same at every T")
    print_notes([*notes, *uncounted_note(engine.metadata["uncounted"], engine.layout)])


def print_details(result: Sweep, engine: Engine, conventions: Sequence[str], *, layers: bool, other_ops: bool) -> None:
    """What the options ask for below the table, at the T of the training or else the largest."""
    from tetdeploy.report.tables import layers_table, other_ops_table

    steps, trained_T = [row.T for row in result.rows], engine.trained_T
    T = trained_T if trained_T in steps else max(steps)
    if layers:
        console.print(f"layers, per image at T={T}")
        console.print(layers_table(result.details, T, conventions=conventions))
    if other_ops:
        console.print(f"other operations, per image at T={T}")
        console.print(other_ops_table(result.details, T))


def _bills(result: Sweep, conventions: Sequence[str]) -> str:
    bills = {
        "paper": "the first layer multiplies, all others add",
        "exact": "exact: every layer whose input is not binary multiplies",
        "once": "once: the first layer multiplies once, not at every step",
    }
    return "; ".join([*(bills[name] for name in conventions), _prices(result)])


def _prices(result: Sweep) -> str:
    """What an operation costs, for each precision of the layers unless both figures were given."""
    from tetdeploy.picojoules import CONSTANTS, EnergyConstants

    constants = EnergyConstants(**result.details["constants"])
    prices = {"": constants}
    precisions = sorted({layer["precision"] for layer in result.details["layers"]})
    if len(precisions) > 1 and constants.by_layer:
        prices = {f" in {name}": constants.of(name) for name in precisions}
    elif len(precisions) > 1 and not constants.source.startswith("given"):
        prices = {f" in {name}": CONSTANTS[name] for name in precisions}
    return ", ".join(
        f"{price.mac_pj:g} pJ a multiply-accumulate and {price.ac_pj:g} pJ an addition{name}"
        for name, price in prices.items()
    )


def save_sweep(result: Sweep, engine: Engine, json_path: Path, picture: Path) -> list[Path]:
    """Write JSON, and where matplotlib is there PNG; returns what was written.

    Raises:
        OSError: one cannot be written; the message says whether the JSON, which took the time, is.
    """
    from tetdeploy.report.sweep_plot import plot_sweep

    write_json(json_path, result.to_dict())
    try:
        plot_sweep(result, picture, engine.trained_T)
    except MissingExtraError as error:
        console.print(f"no plot: {error}", style="dim")
        return [json_path]
    except OSError as error:
        raise OSError(f"{json_path} is written, but not {picture}: {error.strerror or error}") from error
    return [json_path, picture]
