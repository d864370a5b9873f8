"""`tetdeploy early-exit`."""

from __future__ import annotations

from pathlib import Path

import click

from tetdeploy.cli.errors import Recorded
from tetdeploy.cli.inputs import load_inputs, note_other_checkpoint, note_replaced
from tetdeploy.cli.options import (
    AT_LEAST_1,
    STEPS,
    ChosenModel,
    data_dir_option,
    limit_option,
    opens_model,
    output_path,
    result_option,
    test_data_option,
)
from tetdeploy.cli.terminal import command_line, console, image_bar, say_next
from tetdeploy.storage.files import write_json


@click.command(
    cls=Recorded,
    epilog="""\b
Examples:
  tetdeploy early-exit                                   the newest export, on the test set of its training's data
  tetdeploy early-exit MODEL --data test.npz --batch-size 256
  tetdeploy early-exit MODEL --limit 1000 --threads 1

\b
Exit codes: 0, 1 an error, 2 wrong usage, 130 Ctrl-C.
""",
)
@click.option("--T", "T", type=STEPS, help="The most steps. [default: that of the calibration]")
@test_data_option
@data_dir_option
@limit_option
@click.option("--batch-size", default=64, show_default=True, type=AT_LEAST_1, help="Images that start together.")
@opens_model()
@result_option(".early-exit.json")
def early_exit(
    chosen: ChosenModel,
    T: int | None,
    data: str | None,
    data_dir: Path,
    limit: int | None,
    batch_size: int,
    json_path: Path | None,
) -> None:
    """What early exit keeps and saves, on a test set: accuracy, steps, energy, time.

    MODEL is an .onnx file of the step layout with the MODEL.exit.json that tetdeploy calibrate wrote beside it; the
    newest export by default. Every batch runs with T steps for each image and with early exit, taking turns, and both
    are timed. Writes MODEL.early-exit.json, which tetdeploy report shows. Needs no torch.
    """
    from tetdeploy.early_exit import check_calibrated, load_rule
    from tetdeploy.early_exit.savings import measure
    from tetdeploy.report.early_exit import savings_shown
    from tetdeploy.sweep import check_images

    engine = chosen.engine()
    note_other_checkpoint(engine)
    engine.check_early_exit()
    rule = load_rule(engine.path)
    T = T or rule.T
    check_calibrated(engine.path, rule.T, T)
    if rule.T < T:
        console.print(
            f"the threshold was found for T={rule.T} and promises nothing against T={T}; for that run "
            + command_line("calibrate", engine.path, "--T", T),
            style="yellow",
        )
    json_path = output_path(json_path, engine, ".early-exit.json")
    name, x, labels = load_inputs(engine, data, data_dir, limit)
    check_images(engine, x, labels, T)
    note_replaced(json_path, name, len(x))
    with image_bar(f"{engine.path.name} on {name}", len(x)) as tick:
        result = measure(engine, x, labels, rule.exit, T, data=name, batch_size=batch_size, tick=tick)
    result["early_exit"]["confident"] = rule.confident
    if result["images_sha256"] == rule.images_sha256:
        result["early_exit"]["calibrated_on"] = True
        console.print(
            "the threshold was found on these very images, so what it keeps looks better than it is; give others with "
            "--data",
            style="yellow",
        )
    write_json(json_path, result)
    for part in savings_shown(result):
        console.print(part)
    console.print(str(json_path))
    say_next("report", json_path)
